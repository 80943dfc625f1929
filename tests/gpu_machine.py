"""A machine with cards: the double of faiss's GPU builds, and what the driver and pip would say."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from shardline.shards.index import cards
from tests.fake_gpu_faiss import Card, Variant, installed

GPU_WHEEL: Mapping[str, str] = {"faiss-gpu": "1.15.1"}


@contextmanager
def machine(
    *there: Card,
    wheels: Mapping[str, str] = GPU_WHEEL,
    cuda: int | None = 12_040,
    variant: Variant = Variant.GPU,
) -> Iterator[Card]:
    """With these cards and a driver for ``cuda``; the first card."""
    with installed(*there, variant=variant), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "installed_wheels", lambda: dict(wheels))
        patch.setattr(cards, "driver_cuda", lambda: cuda)
        patch.setattr(
            cards,
            "memory_of",
            lambda card: cards.Memory(there[card].free_bytes, there[card].total_bytes),
        )
        yield there[0] if there else Card()
