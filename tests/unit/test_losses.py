"""The loss of a step, ingredient by ingredient, against loops over every row and column."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardline.training.config.loss_config import LossConfig
from shardline.training.loss.loss_columns import Ids, Vectors
from shardline.training.loss.losses import step_loss
from shardline.training.loss.memory_bank import LossState

ITEMS, DIM, ROWS, KEPT = 14, 5, 8, 6
TRAIN_COUNTS = torch.tensor([5, 9, 1, 4, 7, 2, 3, 8, 6, 1, 2, 5, 3, 0])
TAU = 0.5


def draw_case(config: LossConfig, seed: int = 0, *, weighted: bool = False) -> tuple[Vectors, Ids]:
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape: int) -> Tensor:
        return torch.randn(
            *shape, DIM, generator=generator, dtype=torch.float64, requires_grad=True
        )

    def rows(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    users, items = rows(4, ROWS), rows(ITEMS - 1, ROWS)
    hard = rows(ITEMS, ROWS, config.hard_negatives)
    hard[torch.rand(hard.shape, generator=generator) < 0.3] = -1
    known = {(int(users[row]), int(items[row])) for row in range(ROWS)}
    known |= {(int(rows(4, 1)), int(rows(ITEMS, 1))) for _ in range(6)}
    pairs = [(r, i) for r in range(ROWS) for u, i in sorted(known) if u == users[r]]
    known_rows, known_items = (torch.tensor(part) for part in zip(*pairs, strict=True))
    uniform, random = config.uniform_negatives, config.random_negatives
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed + 1)) * 3
    weights[2] = 0.0
    ids = Ids(
        users=users,
        items=items,
        uniform=rows(ITEMS, uniform),
        hard=hard,
        random=rows(ITEMS, ROWS, random),
        known_rows=known_rows,
        known_items=known_items,
        weights=weights if weighted else None,
    )
    embedded = Vectors(
        queries=vectors(ROWS),
        items=vectors(ROWS),
        uniform=vectors(uniform),
        hard=vectors(ROWS, config.hard_negatives),
        random=vectors(ROWS, random),
        temperature=torch.tensor(TAU, dtype=torch.float64, requires_grad=True),
    )
    return embedded, ids


def mean_of(losses: list[Tensor], ids: Ids) -> Tensor:
    """Over rows, each times its weight."""
    weights = torch.ones(ROWS) if ids.weights is None else ids.weights
    return (torch.stack(losses) * weights).mean()


@dataclass
class Column:
    vector: Tensor
    item: int
    user: int | None = None
    mined: bool = False
    is_label: bool = False


def columns_of(
    config: LossConfig, row: int, vectors: Vectors, ids: Ids, kept: list[Column]
) -> list[Column]:
    label = Column(vectors.items[row], int(ids.items[row]), int(ids.users[row]), is_label=True)
    columns = [label]
    if config.in_batch:
        for other in range(ROWS):
            if other != row:
                item, user = int(ids.items[other]), int(ids.users[other])
                columns.append(Column(vectors.items[other], item, user))
    for place, item in enumerate(ids.uniform.tolist()):
        columns.append(Column(vectors.uniform[place], item))
    for place, item in enumerate(ids.random[row].tolist()):
        columns.append(Column(vectors.random[row, place], item))
    for owner in range(ROWS) if config.hard_shared else [row]:
        for place, item in enumerate(ids.hard[owner].tolist()):
            if item >= 0:
                columns.append(Column(vectors.hard[owner, place], item, mined=True))
    return columns + kept


def is_masked(config: LossConfig, row: int, column: Column, ids: Ids) -> bool:
    if column.is_label:
        return False
    own, user = int(ids.items[row]), int(ids.users[row])
    pairs = zip(ids.known_rows.tolist(), ids.known_items.tolist(), strict=True)
    known = {item for of, item in pairs if of == row} - {own}
    return (
        (config.mask_duplicates and column.item == own)
        or (config.mask_known_positives and column.item in known)
        or (config.mask_same_user and column.user == user)
    )


def slow_correction(config: LossConfig, column: Column, kept: int) -> float:
    weight = math.log(config.hard_weight) if column.mined else 0.0
    by_share = (ROWS if config.in_batch else 0) + kept
    uniform = config.uniform_negatives + config.random_negatives
    draws = by_share + uniform
    if draws == 0:
        return -weight
    if config.logq == "none":
        return (math.log(draws) if config.kind == "sigmoid" else 0.0) - weight
    share = max(int(TRAIN_COUNTS[column.item]), 0.5) / int(TRAIN_COUNTS.sum())
    count = by_share * share + uniform / ITEMS
    strength = config.logq_strength
    if config.kind == "sigmoid":
        return math.log(draws) + strength * math.log(count / draws) - weight
    if config.logq == "standard":
        return strength * math.log(count / draws) - weight
    if config.kind == "infonce" and (column.is_label or column.mined):
        return -weight
    return strength * math.log(count) - weight


def slow_loss(
    config: LossConfig, vectors: Vectors, ids: Ids, kept: list[Column]
) -> tuple[Tensor, dict[str, float]]:
    losses, positives, negatives, right, masked, total = [], [], [], 0, 0, 0
    tau = vectors.temperature
    for row in range(ROWS):
        columns = columns_of(config, row, vectors, ids, kept)
        hidden = [is_masked(config, row, column, ids) for column in columns]
        # empty slots of the mined list are columns too, masked ones
        empty = 0 if config.hard_shared else int((ids.hard[row] < 0).sum())
        masked, total = masked + sum(hidden) + empty, total + len(columns) + empty
        there = [column for column, gone in zip(columns, hidden, strict=True) if not gone]
        raw = torch.stack([vectors.queries[row] @ column.vector / tau for column in there])
        taken = torch.tensor([slow_correction(config, column, len(kept)) for column in there])
        label, rest = (raw - taken)[0], (raw - taken)[1:]
        positives.append(raw[0].item())
        negatives += raw[1:].tolist()
        right += bool((label >= rest).all())
        losses.append(one_loss(config, label, rest))
    loss = mean_of(losses, ids)
    if config.symmetric:
        loss = (1 - config.symmetric) * loss + config.symmetric * slow_symmetric(
            config, vectors, ids
        )
    shares = {"accuracy": right / ROWS, "masked": masked / total}
    means = {"positive_logit": np.mean(positives), "negative_logit": np.mean(negatives)}
    return loss, shares | means


def one_loss(config: LossConfig, label: Tensor, rest: Tensor) -> Tensor:
    if config.kind == "sigmoid":
        signs = torch.cat([label[None], -rest])
        return -torch.nn.functional.logsigmoid(signs).sum()
    loss = torch.logsumexp(torch.cat([label[None], rest]), 0) - label
    if config.batch_hard:
        few = rest.topk(min(config.batch_hard, len(rest))).values
        of_few = torch.logsumexp(torch.cat([label[None], few]), 0) - label
        loss = loss + config.batch_hard_weight * (of_few - loss)
    return loss


def slow_symmetric(config: LossConfig, vectors: Vectors, ids: Ids) -> Tensor:
    pairs = set(zip(ids.known_rows.tolist(), ids.known_items.tolist(), strict=True))
    losses = []
    for row in range(ROWS):
        item, user = int(ids.items[row]), int(ids.users[row])
        scores = [vectors.items[row] @ vectors.queries[row] / vectors.temperature]
        for other in range(ROWS):
            same = int(ids.users[other]) == user or int(ids.items[other]) == item
            hidden = (config.mask_duplicates and same) or (
                config.mask_known_positives and (other, item) in pairs
            )
            if other != row and not hidden:
                score = vectors.items[row] @ vectors.queries[other] / vectors.temperature
                scores.append(score)
        losses.append(torch.logsumexp(torch.stack(scores), 0) - scores[0])
    return mean_of(losses, ids)


def leaves(vectors: Vectors) -> list[Tensor]:
    names = ("queries", "items", "uniform", "hard", "random", "temperature")
    return [getattr(vectors, name) for name in names]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"logq": "none", "mask_duplicates": False, "mask_known_positives": False},
    "duplicates": {"logq": "none", "mask_known_positives": False},
    "known": {"logq": "none", "mask_duplicates": False},
    "same user": {
        "logq": "none",
        "mask_same_user": True,
        "mask_duplicates": False,
        "mask_known_positives": False,
    },
    "logq": {},
    "logq, stronger": {"logq_strength": 1.5, "uniform_negatives": 3},
    "expected count, weaker": {"logq_strength": 0.5, "logq": "expected_count"},
    "uniform": {"uniform_negatives": 7},
    "expected count": {"uniform_negatives": 7, "logq": "expected_count"},
    "hard": {"hard_negatives": 3, "hard_weight": 0.5},
    "hard, expected count": {"hard_negatives": 3, "logq": "expected_count", "hard_weight": 2},
    "hard shared": {"hard_negatives": 2, "hard_shared": True},
    "hard alone": {"strategy": "offline-mined", "hard_negatives": 4},
    "uniform alone": {"in_batch": False, "uniform_negatives": 9, "logq": "expected_count"},
    "random alone": {"in_batch": False, "random_negatives": 5},
    "mixed": {"strategy": "mixed", "logq": "expected_count"},
    "batch-hard": {"strategy": "batch-hard"},
    "batch-hard share": {"batch_hard": 3, "batch_hard_weight": 0.4},
    "symmetric": {"symmetric": 0.3},
    "symmetric unmasked": {
        "symmetric": 1.0,
        "mask_duplicates": False,
        "mask_known_positives": False,
    },
    "sigmoid": {"kind": "sigmoid", "logq": "none", "uniform_negatives": 3},
    "sigmoid with counts": {"kind": "sigmoid", "hard_negatives": 2, "uniform_negatives": 3},
    "memory": {"memory_size": KEPT, "memory_warmup_steps": 0},
    "all": {
        "uniform_negatives": 5,
        "random_negatives": 2,
        "hard_negatives": 3,
        "hard_weight": 0.7,
        "batch_hard": 4,
        "batch_hard_weight": 0.2,
        "logq": "expected_count",
        "mask_same_user": True,
        "memory_size": KEPT,
        "memory_warmup_steps": 0,
        "symmetric": 0.4,
    },
}


def with_memory(config: LossConfig) -> tuple[LossState, list[Column]]:
    """A state whose memory, if any, holds six columns."""
    state = LossState(config, TRAIN_COUNTS, DIM).double()
    if state.memory is None:
        return state, []
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(KEPT, DIM, generator=generator, dtype=torch.float64)
    items, users = torch.tensor([1, 4, 4, 7, 8, 0]), torch.tensor([0, 1, 2, 3, 0, 1])
    state.memory.keep(vectors, items, users, state.shares.of(items))
    return state, [
        Column(vector, item, user)
        for vector, item, user in zip(vectors, items.tolist(), users.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("weighted", [False, True])
def test_every_ingredient_against_loops(name: str, seed: int, weighted: bool) -> None:
    config = LossConfig.model_validate(SETTINGS[name])
    vectors, ids = draw_case(config, seed, weighted=weighted)
    state, kept = with_memory(config)
    terms = step_loss(config, vectors, ids, state, ITEMS)
    expected, logged = slow_loss(config, vectors, ids, kept)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for field, value in logged.items():
        assert getattr(terms, field).item() == pytest.approx(value, rel=1e-5, abs=1e-6), field
    found = torch.autograd.grad(terms.loss, leaves(vectors), allow_unused=True)
    wanted = torch.autograd.grad(expected, leaves(vectors), allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None or theirs is None:  # of vectors that this setting does not use
            assert not any(gradient.any() for gradient in (ours, theirs) if gradient is not None)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("logq", ["none", "standard"])
@pytest.mark.parametrize("weight", [1.0, 1.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_bsl_against_loops(logq: str, weight: float, weighted: bool) -> None:
    config = LossConfig(kind="bsl", logq=logq, bsl_negative_weight=weight, uniform_negatives=4)
    vectors, ids = draw_case(config, weighted=weighted)
    terms = step_loss(config, vectors, ids, LossState(config, TRAIN_COUNTS, DIM), ITEMS)
    labels, losses = [], []
    for row in range(ROWS):
        columns = columns_of(config, row, vectors, ids, [])
        there = [c for c in columns if not is_masked(config, row, c, ids)]
        logits = torch.stack(
            [vectors.queries[row] @ c.vector / TAU - slow_correction(config, c, 0) for c in there]
        )
        labels.append(logits[0])
        losses.append(weight * torch.logsumexp(logits[1:], 0))
    for row in range(ROWS):
        same = [labels[other].exp() for other in range(ROWS) if ids.users[other] == ids.users[row]]
        losses[row] = losses[row] - torch.stack(same).mean().log()
    expected = mean_of(losses, ids)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(terms.loss, [vectors.queries, vectors.items]),
        torch.autograd.grad(expected, [vectors.queries, vectors.items]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bsl_without_any_negative_is_finite() -> None:
    config = LossConfig(kind="bsl", in_batch=False, hard_negatives=2)
    vectors, ids = draw_case(config)
    ids = replace(ids, hard=torch.full_like(ids.hard, -1))
    terms = step_loss(config, vectors, ids, LossState(config, TRAIN_COUNTS, DIM), ITEMS)
    assert torch.isfinite(terms.loss)
    assert terms.negative_logit == 0


def test_half_precision_towers_give_a_single_precision_loss() -> None:
    config = LossConfig()
    vectors, ids = draw_case(config)
    halves = Vectors(
        **{
            name: getattr(vectors, name).detach().bfloat16()
            for name in ("queries", "items", "uniform", "hard", "random")
        },
        temperature=torch.tensor(TAU),
    )
    terms = step_loss(config, halves, ids, LossState(config, TRAIN_COUNTS, DIM), ITEMS)
    fields = (terms.loss, terms.accuracy, terms.masked, terms.positive_logit, terms.negative_logit)
    assert {field.dtype for field in fields} == {torch.float32}  # they are stacked to be reduced


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("logq", "low", "high"), [("none", 0.5, 2), ("standard", 0.5, 2), ("expected_count", 0, 0.1)]
)
def test_expected_counts_give_the_gradient_of_the_full_softmax(
    logq: str, low: float, high: float, seed: int
) -> None:
    """Items drawn by popularity and uniformly, corrected, point where all items would."""
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(1.5 * np.random.default_rng(2).standard_normal((6, 3)))
    query = torch.from_numpy(np.random.default_rng(3).standard_normal(3)).requires_grad_()
    positive = int((vectors @ query).argmax())
    shares = np.array([0.5, 0.25, 0.1, 0.08, 0.05, 0.02])
    loss = torch.logsumexp(vectors @ query, 0) - vectors[positive] @ query
    full = torch.autograd.grad(loss, query)[0]
    batch, uniform = 3000, 1000
    config = LossConfig(logq=logq, uniform_negatives=uniform, mask_known_positives=False)
    items = torch.from_numpy(rng.choice(6, batch, p=shares))
    items[0] = positive
    drawn = torch.from_numpy(rng.integers(0, 6, uniform))
    state = LossState(config, torch.from_numpy(shares * 1e6).long(), 3)
    queries = torch.cat([query[None], torch.zeros(batch - 1, 3, dtype=torch.float64)])
    empty = torch.zeros(batch, 0, dtype=torch.int64)
    terms = step_loss(
        config,
        Vectors(
            queries=queries,
            items=vectors[items],
            uniform=vectors[drawn],
            hard=torch.zeros(batch, 0, 3, dtype=torch.float64),
            random=torch.zeros(batch, 0, 3, dtype=torch.float64),
            temperature=torch.tensor(1.0),
        ),
        Ids(
            users=torch.arange(batch),
            items=items,
            uniform=drawn,
            hard=empty,
            random=empty,
            known_rows=empty[0],
            known_items=empty[0],
        ),
        state,
        6,
    )
    sampled = torch.autograd.grad(terms.loss * batch, query)[0]
    off = float((sampled - full).norm() / full.norm())
    assert low <= off <= high
