"""``data synth`` and ``data import``: where a data set folder comes from."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import click

from shardline.cluster.catalogue_cut import NO_CUT_HELP, assumption_of, catalogue_cut
from shardline.cluster.cli import Settings
from shardline.cluster.commands.data_options import out_option, overwrite_option, validated
from shardline.cluster.commands.data_sessions import sessions
from shardline.cluster.commands.report import metric_rows
from shardline.cluster.console import StageProgress, print_table
from shardline.cluster.serving.ray_session import cores
from shardline.shards.core.name_lists import split_names
from shardline.training.data.importers import Format, ImportConfig, import_dataset
from shardline.training.data.tables import open_dataset
from shardline.training.features.infer import suggested_kinds
from shardline.training.synthetic.generator import PRESETS, Observed, SynthConfig, generate


@click.group()
def data() -> None:
    """Make a synthetic data set, or import a real one."""


@data.command()
@out_option
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="seed", show_default=True)
@click.option("--users", "num_users", type=int, help="Users.  [default: 10000]")
@click.option("--items", "num_items", type=int, help="Items.  [default: 100000]")
@click.option("--interactions-per-user", type=int, help="Different items per user.  [default: 20]")
@click.option("--sharpness", type=float, help="Factor on affinities; larger is less random.")
@click.option("--noise", type=float, help="Standard deviation of the noise on an affinity.")
@click.option("--seed", type=int, help="Same seed, same files.  [default: 42]")
@click.option(
    "--observe",
    type=click.Choice(get_args(Observed)),
    multiple=True,
    help="Hidden vectors to write as feature columns. Repeatable.  [default: attributes]",
)
@overwrite_option
def synth(
    out: Path, preset: str, observe: tuple[Observed, ...], overwrite: bool, **options: Any
) -> None:
    """Make users with hidden interests, items with attributes, and interactions.

    Prints the ceilings of the split: what ranking by the true affinities reaches (oracle), and
    the best that can be done knowing the items but not the users' interests (best estimate).
    """
    values = PRESETS[preset].model_dump() | {k: v for k, v in options.items() if v is not None}
    if observe:
        values["observe"] = observe
    config = validated(SynthConfig, values)
    with StageProgress() as progress:
        dataset = generate(config, out, threads=cores(), overwrite=overwrite, progress=progress)
    rows = ", ".join(f"{count:,} {name}" for name, count in dataset.rows.items())
    click.echo(f"{out}: {rows}")
    if dataset.ceilings:
        header, table = metric_rows(
            {"oracle": dataset.ceilings["oracle"]["means"]}, dataset.ceilings
        )
        keep = [header.index(name) for name in ("metric", "best estimate", "oracle")]
        print_table(
            "ceilings of the test split",
            [header[place] for place in keep],
            [[row[place] for place in keep] for row in table],
        )


@data.command("import")
@click.option(
    "--format",
    "kind",
    type=click.Choice([each.value for each in Format]),
    default=Format.TABLE.value,
    show_default=True,
    help="table: Parquet, Arrow, CSV or JSON lines, by content; parquet is an older name of it.",
)
@click.option("--source", required=True, help="Folder of the files, a file, or a URL of either.")
@out_option
@click.option(
    "--on-error",
    type=click.Choice(["raise", "skip"]),
    default="raise",
    show_default=True,
    help="A malformed line: stop there, or skip and count it.",
)
@click.option("--val-users", type=int, help="Users with validation items.  [default: 2000]")
@click.option("--val-per-user", type=int, help="Validation items per such user.  [default: 1]")
@click.option(
    "--val-items",
    type=click.Choice(["last", "random"]),
    help="A user's last items by time, or random ones as in a random test split.  [default: last]",
)
@click.option(
    "--cold-items", type=float, help="Share of the items whose interactions all go to test."
)
@click.option("--test-per-user", type=int, help="Items held out, where there is no test split.")
@click.option("--min-rating", type=int, help="MovieLens: leave out ratings below.")
@click.option("--users-file", help="Table of users in the source's folder; 'none' derives it.")
@click.option("--items-file", help="Table of items in the source's folder; 'none' derives it.")
@click.option("--interactions-file", help="Table of interactions, where the source is a folder.")
@click.option("--user-column", help="Column of user ids.")
@click.option("--item-column", help="Column of item ids.")
@click.option("--time-column", help="Column of times, or 'none' for the rows' order.")
@click.option(
    "--weight-column",
    help="Column of the interactions' weights, such as a rating: numbers >= 0 or null.",
)
@click.option(
    "--types",
    multiple=True,
    metavar="COLUMN=TYPE",
    help="Type of a CSV or JSON column, not inferred. Repeatable.",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="COLUMN,...",
    help="Columns to leave out, as in CSV: 'a,\"b, c\"'. Repeatable.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="COLUMN,...",
    help="The only feature columns, written as those of --drop. Repeatable.",
)
@click.option("--no-cut", is_flag=True, help=NO_CUT_HELP)
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_obj
def import_command(
    settings: Settings,
    /,
    kind: str,
    source: str,
    out: Path,
    no_cut: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Import real data: map ids, drop repeats, report missing and malformed lines."""
    values = {name: value for name, value in options.items() if value not in (None, ())}
    for name in ("types", "drop", "only"):
        if name in values:
            values[name] = tuple(
                each for text in values[name] for each in split_names(f"--{name}", text)
            )
    for name in ("users_file", "items_file", "time_column"):
        if values.get(name) == "none":
            values[name] = None
    config = validated(ImportConfig, values)
    # before the first look: later writes may be missing
    cut = None if no_cut else catalogue_cut(settings.store)
    if (assumption := assumption_of(cut)) is not None:
        click.echo(assumption, err=True)
    report = import_dataset(Format(kind), source, out, config, cut=cut, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    splits = ", ".join(f"{count:,} {name}" for name, count in report.interactions.items())
    click.echo(f"{out}: {report.users:,} users, {report.items:,} items, interactions: {splits}")
    for name, count in asdict(report).items():
        if isinstance(count, int) and count and name not in ("users", "items"):
            click.echo(f"  {name.replace('_', ' ')}: {count:,}")
    for example in report.examples:
        click.echo(f"  {example}")
    for line in _columns_of(out):
        click.echo(f"  {line}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _columns_of(folder: Path) -> Iterator[str]:
    """What training makes of the columns of a data set, unless its configuration names features."""
    dataset = open_dataset(folder, verify=False)
    for name, table in (("users", dataset.users()), ("items", dataset.items())):
        kinds = suggested_kinds(table)
        used = ", ".join(f"{column} {kind}" for column, kind in kinds.items() if kind)
        unused = ", ".join(
            f"{column} ({table[column].type})" for column, kind in kinds.items() if not kind
        )
        if kinds:
            yield f"features of {name}: {used or 'none'}" + (
                f"; not used: {unused}" if unused else ""
            )


@data.command("embed-text")
@click.option(
    "--data", "source", type=click.Path(path_type=Path), required=True, help="Data set folder."
)
@out_option
@click.option("--column", required=True, help="Text column of the items, or of the users.")
@click.option(
    "--of",
    type=click.Choice(["items", "users"]),
    default="items",
    show_default=True,
    help="Whose texts; in a product search users are queries.",
)
@click.option("--name", help="Name of the vector column.  [default: <column>_vector]")
@click.option(
    "--model",
    required=True,
    help="Folder of a transformer (BERT with WordPiece, as sentence-transformers saves it), or "
    "an installed Python package that carries one; nothing is downloaded.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:<i>.")
@overwrite_option
def embed_text(
    source: Path,
    out: Path,
    column: str,
    of: Literal["items", "users"],
    name: str | None,
    model: str,
    device: str,
    overwrite: bool,
) -> None:
    """Add the vectors that a transformer gives texts, as a column of numbers (docs/TEXT.md).

    A router with the same model takes texts as queries. Without a model, a text feature hashes
    n-grams.
    """
    from shardline.training.data.tables import open_dataset
    from shardline.training.features.embed_text import embed_texts

    vectors = name or f"{column}_vector"
    with StageProgress() as progress:
        embed_texts(
            open_dataset(source),
            out,
            column=column,
            of=of,
            name=vectors,
            model=model,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    click.echo(f"{out}: {of} have a column {vectors}")


data.add_command(sessions)
