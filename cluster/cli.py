"""The ``shardline`` command: global options, lazily loaded subcommands, errors as one line.

The exit codes are in ``cluster.exits``.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardline.cluster.exits import DEFECT, EXITS, INTERRUPTED, as_known, exit_code
from shardline.cluster.signals import interrupting, postponed
from shardline.cluster.streams import open_closed_streams, outlive_readers
from shardline.shards.core.errors import last_line

if TYPE_CHECKING:
    from shardline.cluster.config import ShardlineConfig
    from shardline.cluster.store import Store

# name -> (module, attribute, one line of help): nothing heavy is imported to print `--help`
COMMANDS = {
    "data": (
        "shardline.cluster.commands.data",
        "data",
        "Make a synthetic data set, or import a real one.",
    ),
    "train": ("shardline.cluster.commands.model", "train", "Train the two towers, data-parallel."),
    "evaluate": (
        "shardline.cluster.commands.evaluate",
        "evaluate",
        "Recall, MRR, NDCG beside baselines.",
    ),
    "export": (
        "shardline.cluster.commands.model",
        "export",
        "Write the items' embeddings as Arrow files.",
    ),
    "mine": (
        "shardline.cluster.commands.mine",
        "mine",
        "Find hard negatives for the next training.",
    ),
    "build": (
        "shardline.cluster.commands.build",
        "build",
        "Turn an embedding set into index shards.",
    ),
    "tune": (
        "shardline.cluster.commands.tune",
        "tune",
        "Find the fastest index within bounds on recall and size.",
    ),
    "plan": (
        "shardline.cluster.commands.plan",
        "plan",
        "Shards, hosts, memory, latency and cost for a load, on paper.",
    ),
    "generations": (
        "shardline.cluster.commands.generations",
        "generations",
        "List and delete the generations of a store.",
    ),
    "snapshot": (
        "shardline.cluster.commands.snapshot",
        "snapshot",
        "Copy a generation and its writes to a folder or URL.",
    ),
    "restore": (
        "shardline.cluster.commands.snapshot",
        "restore",
        "Make a generation of a snapshot.",
    ),
    "publish": (
        "shardline.cluster.commands.publish",
        "publish",
        "Make another generation live, without a failed query.",
    ),
    "rollback": (
        "shardline.cluster.commands.publish",
        "rollback",
        "Make the generation live again that was before.",
    ),
    "gc": ("shardline.cluster.commands.gc", "gc", "Remove what a store no longer needs."),
    "serve": ("shardline.cluster.commands.serve", "serve", "Serve the live generation over HTTP."),
    "status": (
        "shardline.cluster.commands.query",
        "status",
        "What a running cluster serves, and how well.",
    ),
    "query": ("shardline.cluster.commands.query", "query", "Ask a running cluster for the top K."),
    "upsert": (
        "shardline.cluster.commands.upsert",
        "upsert",
        "Write items to a running cluster.",
    ),
    "delete": (
        "shardline.cluster.commands.delete",
        "delete",
        "Delete items of a running cluster.",
    ),
    "lists": (
        "shardline.cluster.commands.lists",
        "lists",
        "Lists of items that searches leave out: seen, blocked, sold out.",
    ),
    "batch": (
        "shardline.cluster.commands.batch",
        "batch",
        "Answer many queries at once, as Parquet files.",
    ),
    "ab": (
        "shardline.cluster.commands.ab",
        "ab",
        "Compare the arms of experiments; events as interactions.",
    ),
    "keys": ("shardline.cluster.commands.keys", "keys", "List, add and remove API keys."),
    "config": ("shardline.cluster.commands.config", "config", "Explain every configuration key."),
    "down": (
        "shardline.cluster.commands.down",
        "down",
        "Stop the cluster that serves this store.",
    ),
    "restart": (
        "shardline.cluster.commands.restart",
        "restart",
        "Replace every shard process, one after the other.",
    ),
    "cluster": (
        "shardline.cluster.commands.cluster",
        "cluster",
        "Check the hosts of a launcher file before `ray up`.",
    ),
    "doctor": (
        "shardline.cluster.commands.doctor",
        "doctor",
        "Check this machine and the store's files.",
    ),
    "demo": (
        "shardline.cluster.commands.demo",
        "demo",
        "The whole main job, from data to HTTP answers.",
    ),
    "bench": (
        "shardline.cluster.commands.bench",
        "bench",
        "Measure latency, throughput and quality, each beside its floor.",
    ),
}

# What Ray tells a driver on its standard output, whatever log_to_driver says: of processes that
# commands end, of calls that are repeated, of how many processes there are. It would stand in the
# middle of JSON. Not so a process that was ended for want of memory.
RAYS_WORDS = "^(?!.*(?:memory|OOM))"


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
        """``extra_overrides`` are options that are short for --set. ``preferences`` are a command's
        own defaults; the user's file overrides them."""
        from shardline.cluster.config import load_config

        overrides = (*self.overrides, *self.extra_overrides)
        config = load_config(self.config_path, overrides, self.preferences)
        if self.store_path is not None:
            config = config.model_copy(update={"store": self.store_path})
        return config

    @property
    def store(self) -> "Store":
        from shardline.cluster.store import Store

        return Store(self.config.store.resolve())


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        with postponed():  # an import that is interrupted says that a library is broken
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:  # click knows only commands imported so far
            raise click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, summary) for name, (_, _, summary) in COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(row.code), row.meaning) for row in EXITS])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar="SHARDLINE_CONFIG",
    help="YAML file over the defaults.  [default: $SHARDLINE_CONFIG]",
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
    help="Folder of runs, embeddings and generations.  [default: $SHARDLINE_STORE; else "
    "shardline-store]",
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
    open_closed_streams()
    outlive_readers()
    args: list[str] = list(sys.argv[1:] if arguments is None else arguments)
    is_verbose = bool({"-v", "--verbose"} & set(args))
    if not is_verbose:
        # the pattern is read when Ray is imported; the controller says what became of a shard
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAYS_WORDS)
    if any("\udc80" <= letter <= "\udcff" for argument in args for letter in argument):
        click.echo("error: an argument is not UTF-8; names of files and folders must be", err=True)
        sys.exit(2)
    try:
        with interrupting():
            code: Any = cli.main(args=args, prog_name="shardline", standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        _with_place(error).show()
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the one border where all become a line and a code
        if is_verbose:
            traceback.print_exc()
        known = as_known(error)
        says_all = is_verbose or known is error or isinstance(error, ModuleNotFoundError)
        where = "" if says_all else "; -v shows where"
        if known is None:
            said = str(error) if is_verbose else last_line(error)
            click.echo(f"internal error: {type(error).__name__}: {said}{where}", err=True)
            sys.exit(DEFECT)
        click.echo(f"error: {known}{where}", err=True)
        sys.exit(exit_code(known))
    sys.exit(code if isinstance(code, int) else 0)


def _with_place(error: click.ClickException) -> click.ClickException:
    """A hint for a global option that was given after the command: where it belongs."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        name, _, command = error.ctx.command_path.partition(" ")
        if error.option_name in (each for option in cli.params for each in option.opts):
            place = f"`{name} {error.option_name} ... {command}`"
            text = f"{error.option_name} goes before the command: {place}."
            return click.UsageError(text, error.ctx)
    return error


if __name__ == "__main__":
    main()
