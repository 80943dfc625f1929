"""``status`` and ``query``: asking a running cluster over HTTP. Starts fast: no Ray, no torch."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from shardline.cluster.cli import Settings
from shardline.cluster.commands.address import address_of, key_file_option, launched_of
from shardline.cluster.commands.publish_text import print_noted
from shardline.cluster.commands.rearrange_options import rearrange_fields, rearrange_options
from shardline.cluster.commands.status_text import print_launched, print_status
from shardline.cluster.console import print_table
from shardline.cluster.control.publish_note import told_in
from shardline.router.client.answers import SearchAnswer
from shardline.router.client.http1 import Server
from shardline.router.client.sync_client import Client
from shardline.router.contract import Reason
from shardline.shards.core.errors import InvalidInput, NotFound, ShardlineError, Unavailable
from shardline.shards.core.messages import SearchParams
from shardline.shards.core.name_lists import split_names

# fields of the API -> how they are typed here
OPTIONS = {
    "exclude_lists": "--exclude-list",
    "vectors": "--vector",
    "features": "--features",
    "item_ids": "--item",
    "texts": "--text",
    "params.nprobe": "--nprobe",
    "k": "-k",
    "return": "--show",
    "filter": "--filter",
    "exclude_history": "--exclude-history",
    "exclude": "--exclude",
    "cap": "--cap",
    "boost": "--boost",
    "diversify": "--diversify",
    "experiment_key": "--experiment-key",
}
API_FIELD = re.compile(rf"^({'|'.join(map(re.escape, OPTIONS))})\b(\[\d+\])?")
NOT_FOUND_PARTIAL = "not_found_partial"  # a shard that did not answer may hold the item
NOT_FOUND = ("not_found", NOT_FOUND_PARTIAL)  # all other codes are of short answers
MOST = float(np.finfo(np.float32).max)
API_ADVICE = ("send vectors or item_ids", "ask with --vector or --item")
LARGEST_ID = 2**63 - 1


def _checked_url(ctx: click.Context, option: click.Parameter, url: str | None) -> str | None:
    try:
        if url is not None:
            Server.of(url, key=None)
    except InvalidInput as error:
        raise click.BadParameter(f"{url!r} is not of the form {error.expected}") from error
    return url


url_option = click.option(
    "--url",
    envvar="SHARDLINE_URL",
    callback=_checked_url,
    help="The cluster's address.  [default: this store's cluster]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@url_option
@key_file_option
@json_option
@click.pass_obj
def status(settings: Settings, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Show what a running cluster serves: generation, shards, rows, coverage.

    Of a launched cluster also its hosts and routers, and where each replica is. That is told by
    the controller, also while no router answers.
    """
    launched = launched_of(settings, url)
    told = None if launched is None else launched.report
    try:
        address = address_of(settings, url, key_file, launched)
        with address.client() as client:
            report = client.status()
    except Unavailable:
        if told is not None:
            _show(as_json, None, told)
        raise
    _show(as_json, report, told)
    if told is None and url is None and not as_json:
        print_noted(report["generation"], told_in(settings.store.root))


def _show(as_json: bool, report: dict[str, Any] | None, told: dict[str, Any] | None) -> None:
    """report: a router's; told: the controller's."""
    if as_json:
        content = (report or {}) if told is None else {**(report or {}), "cluster": told}
        click.echo(json.dumps(content, indent=2))
        return
    if told is not None:
        print_launched(told)
    if report is not None:
        print_status(report, has_quality=told is None)


@click.command()
@click.option("--vector", help="A JSON list of numbers.")
@click.option("--features", help="A JSON object of query features, e.g. '{\"age\": 31}'.")
@click.option(
    "--item",
    "items",
    multiple=True,
    help="An item id: find similar items. With --data also an id of your own. Repeatable.",
)
@click.option("--text", help="Words to search by, where the cluster has a text encoder.")
@click.option("--user", help="A user of the data set given by --data, by your own id.")
@click.option("--data", type=click.Path(path_type=Path), help="Where --user and --item are known.")
@click.option(
    "--show",
    help="Attributes of the items to show, as in title,price; CSV, so a name may be quoted.",
)
@click.option(
    "--filter",
    "given_filter",
    help='Only items that match, e.g. \'{"price": {"$lt": 20}}\'; see docs/FILTERS.md.',
)
@click.option("--exclude", help="Ids of items that must not come back, as in 1,2,3.")
@click.option(
    "--exclude-history", is_flag=True, help="With features: leave out the items of the history."
)
@rearrange_options
@click.option(
    "--exclude-list",
    "exclude_lists",
    multiple=True,
    metavar="NAME",
    help="No items of this list; `shardline lists`, docs/LISTS.md. Repeatable.",
)
@click.option(
    "-k", type=click.IntRange(min=1), default=10, show_default=True, help="Results wanted."
)
@click.option(
    "--nprobe",
    type=click.IntRange(min=1),
    help="Inverted lists visited, instead of the index's default.",
)
@click.option(
    "--experiment-key",
    help="Who asks, for the experiments of the cluster; docs/EXPERIMENTS.md.",
)
@click.option(
    "--print-request", is_flag=True, help="Print the body for POST /v1/search instead of asking."
)
@url_option
@key_file_option
@json_option
@click.pass_obj
def query(
    settings: Settings,
    exclude_lists: tuple[str, ...],
    vector: str | None,
    features: str | None,
    items: tuple[str, ...],
    text: str | None,
    user: str | None,
    data: Path | None,
    show: str | None,
    given_filter: str | None,
    exclude: str | None,
    exclude_history: bool,
    caps: tuple[str, ...],
    boosts: tuple[str, ...],
    diversify: str | None,
    k: int,
    nprobe: int | None,
    experiment_key: str | None,
    print_request: bool,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Ask a running cluster for the top K, by vector, features, items, text or user.

    Items that the cluster does not know are named, the others answered; the exit code is 3 then.
    """
    given = {
        "--vector": vector,
        "--features": features,
        "--item": items,
        "--text": text,
        "--user": user,
    }
    if sum(value not in (None, ()) for value in given.values()) != 1:
        raise InvalidInput("say what to search for", expected=f"exactly one of {', '.join(given)}")
    if user is not None and data is None:
        raise InvalidInput("--user needs --data", hint="name the data set the user is in")
    body: dict[str, Any] = {"exclude_lists": list(exclude_lists)} if exclude_lists else {}
    if vector is not None:
        body["vectors"] = [_numbers(vector)]
    elif items:
        body["item_ids"] = _item_ids(items, data)
    elif text is not None:
        body["texts"] = [text]
    elif features is not None:
        body["features"] = [_map(features, "--features", "not features", '{"age": 31}')]
    if given_filter is not None:
        body["filter"] = filter_map(given_filter)
    if exclude is not None:
        queries = len(body.get("item_ids", (None,)))
        body["exclude"] = [_excluded_ids(exclude)] * queries
    if exclude_history:
        body["exclude_history"] = True
    body |= rearrange_fields(caps, boosts, diversify)
    if experiment_key is not None:
        body["experiment_key"] = experiment_key
    with address_of(settings, url, key_file).client() as client:
        if user is not None and data is not None:
            body["features"] = [_features_of(client, user, data)]
        if print_request:
            body |= {"k": k} | ({"return": split_names("--show", show)} if show else {})
            click.echo(json.dumps(body | {"return_original_ids": True}))
            return
        if nprobe is not None:
            _warn_without_lists(client)
        try:
            answer = client.search(
                **body,
                k=k,
                params=SearchParams(nprobe=nprobe),
                return_=split_names("--show", show) if show else None,
                return_original_ids=True,
            )
        except InvalidInput as error:
            raise _in_terms_of_options(error) from error
    if as_json:
        _print_json(answer, body.get("item_ids"))
    else:
        _print_tables(answer, items)
    if unanswered := _not_asked(answer):
        raise _unanswered(answer, unanswered, items)


def _print_json(answer: SearchAnswer, items: list[int] | None) -> None:
    results = [
        row | ({"similar_to": items[place]} if items else {})
        for place in range(len(answer.ids))
        for row in _rows(answer, place)
    ]
    report = {
        "results": results,
        "generation": answer.generation,
        "model_version": answer.model_version,
        "coverage": asdict(answer.coverage),
        "reasons": [reason.content for reason in answer.reasons],
        "took_ms": answer.took_ms,
        "arms": dict(answer.arms),
    }
    if answer.pool:
        report["pool"] = list(answer.pool)
    click.echo(json.dumps(report, indent=2))


def _print_tables(answer: SearchAnswer, items: tuple[str, ...]) -> None:
    unanswered = {reason.query for reason in _not_asked(answer)}
    for place in range(len(answer.ids)):
        if place not in unanswered:
            if items:
                click.echo(f"similar to item {items[place]}")
            _print_rows(_rows(answer, place), answer)
    coverage = answer.coverage
    for reason in answer.reasons:
        if reason.code not in NOT_FOUND:
            about = f"item {items[reason.query]}: " if items else ""
            click.echo(f"{about}{reason.text}", err=True)
    if len(unanswered) < len(answer.ids):
        click.echo(
            f"{int((answer.ids >= 0).sum())} results from generation {answer.generation}, "
            f"{coverage.rows_answered:,} of {coverage.rows_asked:,} rows, "
            f"{answer.took_ms:.1f} ms"
        )
    for experiment, arm in answer.arms.items():
        click.echo(f"experiment {experiment}: arm {arm}")
    for missing in coverage.degraded:
        click.echo(f"partial: {missing}", err=True)
    for missing in answer.attributes_missing:
        click.echo(f"without attributes: {missing}", err=True)


def _print_rows(rows: list[dict[str, Any]], answer: SearchAnswer) -> None:
    tells = [row.get("original_id") not in (None, row["item_id"]) for row in rows]
    columns = ["item_id", "original_id", "score"] if any(tells) else ["item_id", "score"]
    header = [*columns, *answer.attributes]
    texts = [{**row, "score": f"{row['score']:.4f}"} for row in rows]
    cells = [
        [row[name] for name in columns] + [row["attributes"][name] for name in answer.attributes]
        for row in texts
    ]
    print_table("", header, [list(map(_text, row)) for row in cells])


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _rows(answer: SearchAnswer, place: int) -> list[dict[str, Any]]:
    """One query's results, best first, with what was asked for beside them."""
    ids, scores = answer.ids[place].tolist(), answer.scores[place].tolist()
    rows: list[dict[str, Any]] = [
        {"item_id": item, "score": score}
        for item, score in zip(ids, scores, strict=True)
        if item >= 0
    ]
    for number, row in enumerate(rows):
        if answer.original_ids is not None:
            row["original_id"] = answer.original_ids[place][number]
        shown = {name: values[place][number] for name, values in answer.attributes.items()}
        if shown:
            row["attributes"] = shown
    return rows


def _not_asked(answer: SearchAnswer) -> list[Reason]:
    """The reasons of queries that have no answer at all; not those of short ones."""
    return [reason for reason in answer.reasons if reason.code in NOT_FOUND]


def _unanswered(
    answer: SearchAnswer, reasons: list[Reason], items: tuple[str, ...]
) -> ShardlineError:
    """Why some items have no answer: unknown, or possibly in a shard that did not answer."""
    if any(reason.code == NOT_FOUND_PARTIAL for reason in reasons):
        return Unavailable(
            ", ".join(reason.text for reason in reasons),
            hint="`shardline status` shows which shards are missing",
        )
    unknown = ", ".join(items[reason.query] for reason in reasons)
    return NotFound(f"no item {unknown} in generation {answer.generation}")


def _in_terms_of_options(error: InvalidInput) -> InvalidInput:
    """The API's error with its fields named as options of this command."""
    field = error.field and API_FIELD.sub(lambda found: OPTIONS[found[1]], error.field)
    hint = error.hint and error.hint.replace(*API_ADVICE)
    return type(error)(
        error.message, field=field, expected=error.expected, got=error.got, hint=hint
    )


def _warn_without_lists(client: Client) -> None:
    """Warns of a parameter that the index does not have, which the API ignores."""
    from shardline.shards.index.resolve import FIELD_KINDS

    kind = client.status()["index"]
    if kind not in FIELD_KINDS["nprobe"]:
        click.echo(f"warning: --nprobe changes nothing: the index is of kind {kind}", err=True)


def _item_ids(items: tuple[str, ...], data: Path | None) -> list[int]:
    """Ids of the cluster, of items called by them, or as in ``data`` where that is given."""
    if data is not None:
        from shardline.training.data.tables import ITEMS, open_dataset

        dataset = open_dataset(data)
        return [dataset.id_of(ITEMS, item) for item in items]
    return [_id(item, "--item", "; with --data it may be an id of your own") for item in items]


def _id(text: str, option: str, advice: str = "") -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= LARGEST_ID):
        raise click.BadParameter(
            f"{text!r} is not an id of the cluster, 0 to {LARGEST_ID}{advice}", param_hint=option
        )
    return int(text)


def _excluded_ids(text: str) -> list[int]:
    """The value of ``--exclude``."""
    return [_id(each.strip(), "--exclude") for each in text.split(",") if each.strip()]


def _features_of(client: Client, user: str, data: Path) -> dict[str, Any]:
    from shardline.cluster.commands.encoder_kinds import encoder_kinds
    from shardline.training.data.tables import open_dataset
    from shardline.training.evaluation.user_queries import query_features_of_user

    splits = ("train", "val", "test")  # all that the user took
    return query_features_of_user(open_dataset(data), encoder_kinds(client), user, splits)


def _numbers(text: str) -> list[float]:
    found = _json(text, "--vector", "a list of numbers, as in '[0.1, 0.2]'")
    if not isinstance(found, list) or not all(type(each) in (int, float) for each in found):
        raise InvalidInput(
            "not a vector", field="--vector", expected="a list of numbers", got=text[:60]
        )
    if any(abs(each) > MOST for each in found):
        raise InvalidInput(
            "a number too large", field="--vector", expected=f"at most {MOST:.1e}", got=text[:60]
        )
    return found


def filter_map(text: str) -> dict[str, Any]:
    """The value of ``--filter``. Raises InvalidInput: it is no map of JSON."""
    return _map(text, "--filter", "not a filter", '{"price": {"$lt": 20}}')


def _map(text: str, option: str, complaint: str, example: str) -> dict[str, Any]:
    expected = f"names and values, as in '{example}'"
    found = _json(text, option, expected)
    if not isinstance(found, dict):
        raise InvalidInput(complaint, field=option, expected=expected, got=text[:60])
    return found


def _json(text: str, option: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput("not JSON", field=option, expected=expected, got=text[:60]) from error
