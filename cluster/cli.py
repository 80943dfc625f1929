"""The ``shardline`` command: global options, lazily loaded subcommands, errors as one line.

Exit codes: 0 done; 1 a defect of ours; 2 usage, configuration or input; 3 data or files;
4 something is not running or did not answer in time; 130 interrupted.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.errors import (
    ConfigError,
    CorruptFile,
    DataError,
    InvalidInput,
    NewerFormat,
    NotFound,
    ShardlineError,
    Unavailable,
)

if TYPE_CHECKING:
    from cluster.config import ShardlineConfig
    from cluster.store import Store

# name -> (module, attribute, one line of help): nothing heavy is imported to print `--help`
COMMANDS = {
    "data": ("cluster.commands.data", "data", "Make a synthetic data set, or import a real one."),
    "train": ("cluster.commands.model", "train", "Train the two towers, data-parallel."),
    "evaluate": ("cluster.commands.evaluate", "evaluate", "Recall, MRR, NDCG beside baselines."),
    "export": ("cluster.commands.model", "export", "Write the items' embeddings as Arrow files."),
    "mine": ("cluster.commands.mine", "mine", "Find hard negatives for the next training."),
    "build": ("cluster.commands.build", "build", "Turn an embedding set into index shards."),
    "serve": ("cluster.commands.serve", "serve", "Serve the live generation over HTTP."),
    "status": ("cluster.commands.query", "status", "What a running cluster serves, and how well."),
    "query": ("cluster.commands.query", "query", "Ask a running cluster for the top K."),
    "keys": ("cluster.commands.keys", "keys", "List, add and remove API keys."),
    "down": ("cluster.commands.serve", "down", "Stop the cluster that serves this store."),
    "doctor": ("cluster.commands.doctor", "doctor", "Check this machine and the store's files."),
    "demo": ("cluster.commands.demo", "demo", "The whole main job, from data to HTTP answers."),
    "bench": ("cluster.commands.bench", "bench", "Measure, with the floor beside the figure."),
}

EXIT_CODES: tuple[tuple[tuple[type[ShardlineError], ...], int], ...] = (
    ((InvalidInput, ConfigError), 2),
    ((DataError, CorruptFile, NewerFormat, NotFound), 3),
    ((Unavailable,), 4),
)


@dataclass
class Settings:
    """The global options; the configuration is read when a command first asks for it."""

    config_path: Path | None = None
    overrides: tuple[str, ...] = ()
    store_path: Path | None = None
    verbose: bool = False
    extra_overrides: list[str] = field(default_factory=list)
    preferences: dict[str, object] = field(default_factory=dict)

    @cached_property
    def config(self) -> "ShardlineConfig":
        """``extra_overrides`` are options that stand for --set, ``preferences`` a command's own
        defaults, below what the user's file says."""
        from cluster.config import load_config  # pydantic: not needed for --help

        overrides = (*self.overrides, *self.extra_overrides)
        config = load_config(self.config_path, overrides, self.preferences)
        if self.store_path is not None:
            config = config.model_copy(update={"store": self.store_path})
        return config

    @property
    def store(self) -> "Store":
        from cluster.store import Store

        return Store(self.config.store.resolve())


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, summary) for name, (_, _, summary) in COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar="SHARDLINE_CONFIG",
    help="YAML file over the defaults.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="One configuration value, e.g. --set index.nlist=4096. Repeatable.",
)
@click.option(
    "--store",
    "store_path",
    type=click.Path(path_type=Path),
    envvar="SHARDLINE_STORE",
    help="Folder of runs, embeddings and generations.  [default: shardline-store]",
)
@click.option("-v", "--verbose", is_flag=True, help="Logs, and tracebacks of errors.")
@click.version_option(package_name="shardline")
@click.pass_context
def cli(
    ctx: click.Context,
    config_path: Path | None,
    overrides: tuple[str, ...],
    store_path: Path | None,
    verbose: bool,
) -> None:
    """Train a two-tower model, shard its item embeddings, answer top-K queries in milliseconds.

    The usual order: data, train, evaluate, export, build, serve, query. `shardline demo` does all
    of it on synthetic data.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    ctx.obj = Settings(config_path, overrides, store_path, verbose)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command, turns errors into one line and an exit code."""
    args: list[str] = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code: Any = cli.main(args=args, prog_name="shardline", standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ShardlineError as error:
        if {"-v", "--verbose"} & set(args):
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(exit_code(error))
    except Exception as error:
        if {"-v", "--verbose"} & set(args):
            raise
        click.echo(f"internal error: {type(error).__name__}: {error}; -v shows where", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def exit_code(error: ShardlineError) -> int:
    """The process exit code of an error, as the module's docstring lists them."""
    for kinds, code in EXIT_CODES:
        if isinstance(error, kinds):
            return code
    return 1
