"""``config``: every key of the configuration with its default, unit, range and meaning."""

import dataclasses
import json
import shutil
import textwrap

import click

from shardline.cluster.config_keys import Key, Section, config_sections
from shardline.shards.core.errors import ConfigError

DEEP = " " * 6


@click.command()
@click.argument("section", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def config(section: str | None, as_json: bool) -> None:
    """Print every key with its type, range, unit, default and meaning.

    SECTION is one section and those below it, e.g. `router` or `training.loss`; all when left
    out. Set a key in the file of -c, or with --set SECTION.KEY=VALUE.
    """
    sections = config_sections()
    chosen = [each for each in sections if section is None or _within(each, section)]
    if not chosen:
        known = dict.fromkeys(path.partition("[")[0] for s in sections for path in s.paths if path)
        raise ConfigError("no such section", expected=f"one of {', '.join(known)}", got=section)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in chosen], indent=2))
        return
    width = min(shutil.get_terminal_size().columns, 100)
    click.echo("\n\n".join(_as_text(each, width) for each in chosen))


def _within(section: Section, name: str) -> bool:
    return any(f"{path}.".startswith((f"{name}.", f"{name}[")) for path in section.paths)


def _as_text(section: Section, width: int) -> str:
    title = f"{' and '.join(section.paths) or '(top level)'}: {section.about}"
    lines = textwrap.wrap(title, width)
    for key in section.keys:
        lines += [
            "",
            *textwrap.wrap(_head(key), width, initial_indent="  ", subsequent_indent=DEEP),
        ]
        lines += textwrap.wrap(key.meaning, width, initial_indent=DEEP, subsequent_indent=DEEP)
    return "\n".join(lines)


def _head(key: Key) -> str:
    """A key, its default and its legal values, in one line."""
    return (
        f"{key.name}: {key.default}  ({', '.join(filter(None, (key.type, key.range, key.unit)))})"
    )
