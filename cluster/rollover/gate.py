"""Whether a generation may go live: figures that were measured, each against its bound. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from shardline.cluster.rollover.publish_config import PublishConfig

SHORTEST_MS = 1.0  # of a p99 in a ratio: below it a ratio says more of the machine than of an index


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What ``gate_run`` has measured of a candidate and of the live generation; None: could not be.

    recall, served_recall: recall@k of so many queries against exact answers; live_recall: of the
    live generation's sample queries. held_out_recall: relevant items found, divided by relevant
    items, mean over ``held_out`` queries. p99_ms, live_p99_ms: of single queries; None: the
    candidate is measured in its files. rows, live_rows:
    searched. overlap: share of live's results that the candidate has too. unreplayed: written rows
    that the candidate lacks.
    """

    k: int
    queries: int
    recall: float | None
    live_recall: float | None = None
    served: int = 0
    served_recall: float | None = None
    held_out: int = 0
    held_out_recall: float | None = None
    live_held_out_recall: float | None = None
    p99_ms: float | None
    live_p99_ms: float | None
    rows: int
    live_rows: int
    overlap: float | None = None
    unreplayed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFigure:
    """One figure. bound: as text, with the key of the configuration; "" for none. text: what was
    measured, a sentence for people."""

    figure: str
    value: float | None
    bound: str
    ok: bool
    text: str

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        bound = f", bound {self.bound}" if self.bound else ""
        return f"{'ok' if self.ok else 'FAIL':<5} {self.figure} {value}{bound}: {self.text}"


@dataclass(frozen=True, slots=True)
class GateReport:
    """All figures, in a fixed order; those without a bound are among them, and ok."""

    figures: tuple[GateFigure, ...]

    @property
    def ok(self) -> bool:
        return all(each.ok for each in self.figures)

    @property
    def failed(self) -> tuple[GateFigure, ...]:
        return tuple(each for each in self.figures if not each.ok)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the generation does not pass: a sentence for each figure that failed."""
        return tuple(
            f"{each.figure} is {'unknown' if each.value is None else format(each.value, '.4g')}, "
            f"bound {each.bound}"
            for each in self.failed
        )

    def as_json(self) -> dict[str, Any]:
        """{"ok", "figures": [{"figure", "value", "bound", "ok", "text"}]}."""
        return {"ok": self.ok, "figures": [asdict(each) for each in self.figures]}

    def with_figure(self, figure: GateFigure) -> "GateReport":
        """In place of the one of its name."""
        others = (each for each in self.figures if each.figure != figure.figure)
        return GateReport((*others, figure))


def judge(figures: Figures, config: PublishConfig) -> GateReport:
    """A figure that has a bound and could not be measured does not pass."""
    found = [
        _recall(figures, config),
        _rows(figures, config),
        unreplayed_figure(figures.unreplayed, config),
    ]
    if figures.p99_ms is not None and figures.live_p99_ms is not None:
        found.insert(1, _latency(figures.p99_ms, figures.live_p99_ms, config))
    if figures.served:
        found.insert(1, _served_recall(figures, config))
    if figures.held_out or config.min_held_out_recall:
        found.append(_held_out(figures, config))
    if figures.overlap is not None or config.min_overlap:
        found.append(_overlap(figures, config))
    return GateReport(tuple(found))


def latency_ratio(p99_ms: float, live_p99_ms: float) -> float:
    return max(p99_ms, SHORTEST_MS) / max(live_p99_ms, SHORTEST_MS)


def _recall(figures: Figures, config: PublishConfig) -> GateFigure:
    about = f"recall@{figures.k} of {figures.queries} sample queries, against exact answers"
    return _at_least(
        "recall", figures.recall, "min_recall", config.min_recall,
        _beside_live(about, figures.live_recall),
    )  # fmt: skip


def _served_recall(figures: Figures, config: PublishConfig) -> GateFigure:
    about = f"recall@{figures.k} of {figures.served} queries served lately, against exact answers"
    return _at_least("served_recall", figures.served_recall, "min_recall", config.min_recall, about)


def _held_out(figures: Figures, config: PublishConfig) -> GateFigure:
    about = f"relevant items in the first {figures.k}, mean of {figures.held_out} held-out queries"
    return _at_least(
        "held_out_recall", figures.held_out_recall, "min_held_out_recall",
        config.min_held_out_recall, _beside_live(about, figures.live_held_out_recall),
    )  # fmt: skip


def _overlap(figures: Figures, config: PublishConfig) -> GateFigure:
    about = f"share of the live generation's first {figures.k} results that the new one has"
    if figures.overlap is None:
        about += "; with another model it needs publish.held_out with features"
    return _at_least("overlap", figures.overlap, "min_overlap", config.min_overlap, about)


def _latency(p99_ms: float, live_p99_ms: float, config: PublishConfig) -> GateFigure:
    ratio = latency_ratio(p99_ms, live_p99_ms)
    most = config.max_latency_ratio
    text = f"p99 of a query is {p99_ms:.2f} ms, live {live_p99_ms:.2f} ms"
    return GateFigure(
        figure="latency_ratio",
        value=ratio,
        bound=f"publish.max_latency_ratio <= {most:g}" if most else "",
        ok=not most or ratio <= most,
        text=text,
    )


def _rows(figures: Figures, config: PublishConfig) -> GateFigure:
    ratio = figures.rows / max(1, figures.live_rows)
    low, high = config.min_rows_ratio, config.max_rows_ratio
    bounds = [f"publish.min_rows_ratio >= {low:g}"] if low else []
    bounds += [f"publish.max_rows_ratio <= {high:g}"] if high else []
    return GateFigure(
        figure="rows_ratio",
        value=ratio,
        bound=", ".join(bounds),
        ok=low <= ratio and (not high or ratio <= high),
        text=f"{figures.rows:,} rows, live {figures.live_rows:,}",
    )


def unreplayed_figure(rows: int, config: PublishConfig) -> GateFigure:
    """rows: written ones that the candidate lacks."""
    most = config.max_unreplayed_rows
    return GateFigure(
        figure="unreplayed_rows",
        value=rows,
        bound=f"publish.max_unreplayed_rows <= {most}",
        ok=rows <= most,
        text="written rows that the new generation lacks: by vector, for another model",
    )


def _at_least(figure: str, value: float | None, key: str, least: float, text: str) -> GateFigure:
    return GateFigure(
        figure=figure,
        value=value,
        bound=f"publish.{key} >= {least:g}" if least else "",
        ok=not least or (value is not None and value >= least),
        text=text,
    )


def _beside_live(about: str, live: float | None) -> str:
    return about if live is None else f"{about}; live {live:.4g}"
