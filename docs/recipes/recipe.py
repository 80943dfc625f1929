"""What the recipes share: tables to files, the commands in order, a cluster, the table of outcomes.

Each recipe works in a temporary folder, runs the commands that a user types, in this process so
that libraries are loaded once, and serves from a private Ray. Nothing is left at the end.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from outcomes import Outcome, measured, table

from shardline import Client
from shardline.cluster.cli import cli
from shardline.cluster.commands.serve import serving_cpus
from shardline.cluster.config import load_config
from shardline.cluster.preflight.open_files import requests_in_flight
from shardline.cluster.serving.deployment import serving
from shardline.cluster.serving.ray_session import ray_for
from shardline.router.http.api_keys import Scope

TIMEOUT_MS = 10_000.0  # the recipes are about what is answered, not how fast


@dataclass(kw_only=True)
class Recipe:
    """One run in ``folder``. quick: on less data, as the tests run it."""

    folder: Path
    quick: bool
    outcomes: list[Outcome] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def size(self, full: int, quick: int) -> int:
        """How much data to make."""
        return quick if self.quick else full

    def note(self, line: str) -> None:
        """One line on the standard error, with the seconds since the start."""
        click.echo(f"[{time.monotonic() - self.started:5.1f} s] {line}", err=True)

    def configure(self, content: dict[str, Any]) -> None:
        """Writes the configuration that the commands read; without names of a store or a port."""
        self._config.write_text(yaml.safe_dump(content))

    def write_tables(self, **tables: pa.Table) -> None:
        """users, items and interactions, as ``shardline data import`` reads them."""
        folder = self.folder / "tables"
        folder.mkdir()
        for name, content in tables.items():
            self.note(f"{name}: {content.num_rows:,} rows of {', '.join(content.column_names)}")
            pq.write_table(content, folder / f"{name}.parquet")

    def build(self, *import_options: str) -> None:
        """From the tables to a generation, by the commands of docs/QUICKSTART.md."""
        tables, data = str(self.folder / "tables"), str(self.folder / "data")
        self._shardline("data", "import", "--source", tables, "--out", data, *import_options)
        self._shardline("train", "--data", data)
        self._shardline("export", "--data", data)
        self._shardline("build", "--in-process")

    @contextmanager
    def served(self) -> Iterator[Client]:
        """What ``shardline serve`` does, on a free port; a client with a key that may write."""
        config = load_config(self._config, [f"store={self._store}", "cluster.http_port=0"])
        self.note("serving: Ray, shards, router, HTTP")
        with (
            ray_for("local", num_cpus=serving_cpus(config), in_flight=requests_in_flight(config)),
            serving(config) as endpoint,
        ):
            address = endpoint.address_for(Scope.WRITE)
            with Client(address.url, key=address.key) as client:
                self.note(f"asking {address.url}")
                yield client
            self.note("stopping")

    def outcome(self, name: str, must_be: str, value: float) -> None:
        """Adds a row to the table of outcomes, with the bound as ``outcomes`` describes it."""
        self.outcomes.append(measured(name, must_be, value))

    @property
    def _config(self) -> Path:
        return self.folder / "shardline.yaml"

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    def _shardline(self, *words: str) -> None:
        """One command line of shardline, in this process."""
        self.note(f"shardline {' '.join(words)}")
        options = ["--config", str(self._config), "--store", str(self._store)]
        cli.main(args=[*options, *words], prog_name="shardline", standalone_mode=False)


def command(run: Callable[[Recipe], None]) -> click.Command:
    """A recipe as a command with the option --quick; it prints its outcomes.

    Its exit code is 1 where one of them is out of its bound.
    """

    @click.command(help=sys.modules[run.__module__].__doc__)
    @click.option("--quick", is_flag=True, help="On less data, as the tests run it.")
    def main(quick: bool) -> None:
        with tempfile.TemporaryDirectory(prefix="shardline-recipe.") as folder:
            recipe = Recipe(folder=Path(folder), quick=quick)
            run(recipe)
            recipe.note("done")
        click.echo("\n".join(table(recipe.outcomes)))
        broken = [each.name for each in recipe.outcomes if not each.holds]
        if broken:
            raise click.ClickException(f"out of bounds: {'; '.join(broken)}")

    return main
