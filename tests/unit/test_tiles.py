"""Tiled losses against whole matrices and autograd, in value, gradient and memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from shardline.training.loss import tiles
from shardline.training.loss.joins import Join
from shardline.training.loss.tiles import Frame, TileLoss, tiled_loss

KINDS: dict[str, TileLoss] = {
    "softmax": tiles.softmax,
    "hardest": partial(tiles.softmax_of_hardest, hardest=1, weight=1.0),
    "hardest-share": partial(tiles.softmax_of_hardest, hardest=4, weight=0.3),
    "negatives": tiles.log_sum_of_negatives,
    "sigmoid": tiles.sigmoid,
}


def whole(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """() mean loss of masked logits (b, n) by plain torch."""
    label = logits.gather(1, labels[:, None])
    rest = logits.scatter(1, labels[:, None], -torch.inf)
    if kind == "softmax":
        return functional.cross_entropy(logits, labels)
    if kind == "negatives":
        return rest.logsumexp(1).mean()
    if kind == "sigmoid":
        signs = torch.full_like(logits, -1.0).scatter(1, labels[:, None], 1.0)
        there = logits > -torch.inf
        return -functional.logsigmoid(signs * logits)[there].sum() / len(logits)
    hardest, weight = (1, 1.0) if kind == "hardest" else (4, 0.3)
    few = torch.cat([label, rest.topk(min(hardest, logits.shape[1]), dim=1).values], 1)
    of_hardest = (few.logsumexp(1) - label[:, 0]).mean()
    return weight * of_hardest + (1 - weight) * functional.cross_entropy(logits, labels)


def case(b: int, c: int, k: int, kind: str, dtype: torch.dtype, *, own_label: bool, correct: bool):
    generator = torch.Generator().manual_seed(b + c + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, columns, own = draw(b, 6) * 2, draw(c, 6), draw(b, k, 6)
    labels = torch.full((b,), c) if own_label else torch.arange(b) % c
    masks = tuple(
        Join.equal(
            torch.randint(0, 5, (b,), generator=generator),
            torch.randint(0, 9, (c,), generator=generator),
        )
        for _ in range(2)
    )
    own_masked = torch.rand(b, k, generator=generator) < 0.3
    if own_label:
        own_masked[:, 0] = False
    frame = Frame(
        labels=labels,
        correction=draw(c),
        own_correction=draw(b, k),
        correct_label=correct,
        masks=masks,
        own_masked=own_masked,
        loss=KINDS[kind],
        tile_mib=1,
    )
    return [part.to(dtype).requires_grad_() for part in (queries, columns, own)], frame


def masked_logits(queries: Tensor, columns: Tensor, own: Tensor, frame: Frame):
    raw = torch.cat([queries @ columns.T, (own @ queries[:, :, None])[..., 0]], dim=1)
    correction = torch.cat([frame.correction.expand(len(queries), -1), frame.own_correction], dim=1)
    mask = torch.zeros_like(raw, dtype=torch.bool)
    for join in frame.masks:
        mask[join.pairs(0, len(queries))] = True
    mask[:, len(columns) :] = frame.own_masked
    is_label = functional.one_hot(frame.labels, raw.shape[1]).bool()
    mask &= ~is_label
    keep = torch.ones_like(raw) if frame.correct_label else (~is_label).to(raw)
    return (raw - correction * keep).masked_fill(mask, -torch.inf), raw, mask, is_label


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("b", "c", "k", "own_label", "correct"),
    [
        (9, 12, 0, False, True),
        (9, 12, 3, False, False),
        (40, 12, 3, True, True),
        (7, 0, 5, True, False),
        (1, 1, 1, False, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_loss_gradient_and_sums_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    b: int,
    c: int,
    k: int,
    own_label: bool,
    correct: bool,
    rows: int,
) -> None:
    monkeypatch.setattr(tiles, "CPU_ROWS", rows)
    parts, frame = case(b, c, k, kind, torch.float64, own_label=own_label, correct=correct)
    loss, sums = tiled_loss(*parts, frame)
    found = torch.autograd.grad(3 * loss, parts)
    logits, raw, mask, is_label = masked_logits(*parts, frame)
    expected = whole(kind, logits, frame.labels)
    if kind == "negatives":  # rows without any count as 0
        rest = logits.masked_fill(is_label, -torch.inf)
        some = (rest > -torch.inf).any(1)
        expected = rest[some].logsumexp(1).sum() / b
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(found, torch.autograd.grad(3 * expected, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert sums.masked == mask.sum()
    right = logits.gather(1, frame.labels[:, None])[:, 0] >= logits.amax(1)
    assert sums.right == right.sum()
    torch.testing.assert_close(sums.positives, raw[is_label].sum().detach())
    torch.testing.assert_close(sums.negatives, raw[~mask & ~is_label].sum().detach())


def large_case(b: int, dim: int = 32) -> tuple[Tensor, Tensor, Frame]:
    generator = torch.Generator().manual_seed(1)
    queries, columns = (
        functional.normalize(torch.randn(b, dim, generator=generator), dim=1) for _ in range(2)
    )
    keys = torch.randint(0, b // 2, (b,), generator=generator)
    nothing = torch.zeros(b, 0)
    frame = Frame(
        labels=torch.arange(b),
        correction=torch.randn(b, generator=generator),
        own_correction=nothing,
        correct_label=True,
        masks=(Join.equal(keys, keys),),
        own_masked=nothing.bool(),
        loss=tiles.softmax,
        tile_mib=1,
    )
    return queries.requires_grad_(), columns.requires_grad_(), frame


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_single_precision_equals_the_untiled_loss(temperature: float) -> None:
    queries, columns, frame = large_case(1500)
    tau = torch.tensor(temperature, requires_grad=True)
    leaves = (queries, columns, tau)
    loss, _ = tiled_loss(queries / tau, columns, queries.new_zeros(1500, 0, 32), frame)
    found = torch.autograd.grad(loss, leaves)
    own = queries.new_zeros(1500, 0, 32)
    expected = functional.cross_entropy(
        masked_logits(queries / tau, columns, own, frame)[0], frame.labels
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_bf16_vectors_and_autocast_are_summed_in_single_precision() -> None:
    queries, columns, frame = large_case(300)
    halves = [part.detach().bfloat16().requires_grad_() for part in (queries, columns)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = tiled_loss(halves[0] * 8, halves[1], halves[0].new_zeros(300, 0, 32), frame)
    assert loss.dtype == torch.float32
    loss.backward()
    floats = [part.detach().float().requires_grad_() for part in halves]
    expected, _ = tiled_loss(floats[0] * 8, floats[1], floats[0].new_zeros(300, 0, 32), frame)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for half, exact in zip(halves, floats, strict=True):
        assert half.grad.dtype == torch.bfloat16
        torch.testing.assert_close(half.grad, exact.grad.bfloat16(), rtol=0.02, atol=1e-6)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch held at once beyond what it held before, from its own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory_does_not_grow_with_rows_times_columns() -> None:
    peaks = {}
    for b in (1024, 4096):
        queries, columns, frame = large_case(b)

        def work(queries=queries, columns=columns, frame=frame, b=b) -> None:
            loss, _ = tiled_loss(queries * 20, columns, queries.new_zeros(b, 0, 32), frame)
            loss.backward()

        peaks[b] = peak_bytes(work)
    vectors = 2 * 4096 * 32 * 4
    assert peaks[4096] < 5 * vectors + 4 * tiles.MIB  # of 64 MiB of logits
    assert peaks[4096] < 4.5 * peaks[1024]
