"""What a cluster says of the index that it serves, for `doctor`: recall, and repairs due."""

from collections.abc import Iterator
from typing import Any

from shardline.cluster.preflight.check import Check, passed, warned

NAME = "served index"


def index_checks(report: dict[str, Any]) -> Iterator[Check]:
    """report: of a router, or of a controller; those before this version say nothing."""
    for repair in report.get("repairs", ()):
        yield warned(NAME, f"{repair['code']}: {repair['text']}")
    quality = report.get("quality")
    if quality is None:
        yield passed(NAME, "recall of served queries is not known yet")
    else:
        about = f"{quality['recall']:.3f} of {quality['queries']} served queries"
        yield passed(NAME, f"recall@{quality['k']} {about}")
