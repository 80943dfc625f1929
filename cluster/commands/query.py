"""``status`` and ``query``: asking a running cluster over HTTP. Starts fast: no Ray, no torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cluster.cli import Settings
from cluster.commands.address import address_of, key_file_option
from cluster.console import print_table
from router.client import Client
from shards.errors import InvalidInput
from shards.types import SearchParams

url_option = click.option(
    "--url", envvar="SHARDLINE_URL", help="The cluster's address.  [default: this store's cluster]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@url_option
@key_file_option
@json_option
@click.pass_obj
def status(settings: Settings, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """What a running cluster serves: generation, shards, rows, coverage."""
    with address_of(settings, url, key_file).client() as client:
        report = client.status()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for name in ("generation", "model_version", "index", "dim", "metric", "rows"):
        click.echo(f"{name:>14}  {report[name]}")
    print_table(
        "shards",
        ("shard", "rows", "epoch", "address", "connected"),
        [
            (
                str(shard["shard"]),
                f"{shard['rows']:,}",
                str(shard["epoch"]),
                str(shard["address"] or "none"),
                "yes" if shard["connected"] else "no",
            )
            for shard in report["shards"]
        ],
    )


@click.command()
@click.option("--vector", help="A JSON list of numbers.")
@click.option("--features", help="A JSON object of query features, e.g. '{\"age\": 31}'.")
@click.option("--item", "item_id", type=int, help="An item id: what is similar to it?")
@click.option("--user", "user_id", type=int, help="A user id of the data set given by --data.")
@click.option("--data", type=click.Path(path_type=Path), help="The data set --user looks in.")
@click.option("-k", default=10, show_default=True, help="Results wanted.")
@click.option("--nprobe", type=int, help="Inverted lists visited, instead of the index's default.")
@url_option
@key_file_option
@json_option
@click.pass_obj
def query(
    settings: Settings,
    vector: str | None,
    features: str | None,
    item_id: int | None,
    user_id: int | None,
    data: Path | None,
    k: int,
    nprobe: int | None,
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Ask a running cluster for the top K, by vector, features, item or user."""
    given = {"--vector": vector, "--features": features, "--item": item_id, "--user": user_id}
    if sum(value is not None for value in given.values()) != 1:
        raise InvalidInput("say what to search for", expected=f"exactly one of {', '.join(given)}")
    if user_id is not None and data is None:
        raise InvalidInput("--user needs --data", hint="name the data set the user is in")
    body: dict[str, Any] = {}
    if vector is not None:
        body["vectors"] = [_json(vector, "--vector")]
    elif item_id is not None:
        body["item_ids"] = [item_id]
    elif features is not None:
        body["features"] = [_json(features, "--features")]
    with address_of(settings, url, key_file).client() as client:
        if user_id is not None and data is not None:
            body["features"] = [_features_of(client, user_id, data)]
        answer = client.search(**body, k=k, params=SearchParams(nprobe=nprobe))
    rows = [
        (int(item), float(score))
        for item, score in zip(answer.ids[0], answer.scores[0], strict=True)
        if item >= 0
    ]
    if as_json:
        results = [{"item_id": item, "score": score} for item, score in rows]
        report = {
            "results": results,
            "generation": answer.generation,
            "model_version": answer.model_version,
            "coverage": asdict(answer.coverage),
            "reasons": list(answer.reasons.values()),
            "took_ms": answer.took_ms,
        }
        click.echo(json.dumps(report, indent=2))
        return
    print_table("", ("item", "score"), [(str(item), f"{score:.4f}") for item, score in rows])
    coverage = answer.coverage
    click.echo(
        f"{len(rows)} results from generation {answer.generation}, "
        f"{coverage.rows_answered:,} of {coverage.rows_asked:,} rows, "
        f"{answer.took_ms:.1f} ms"
    )
    for reason in coverage.degraded:
        click.echo(f"partial: {reason}", err=True)
    for reason in answer.reasons.values():
        click.echo(f"no answer: {reason}", err=True)


def _features_of(client: Client, user_id: int, data: Path) -> dict[str, Any]:
    from cluster.commands.remote import encoder_kinds  # torch: only when a user is asked for
    from training.queries import query_features_of_user
    from training.tables import open_dataset

    return query_features_of_user(open_dataset(data), encoder_kinds(client), user_id)


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput("not JSON", field=option, got=text[:60]) from error
