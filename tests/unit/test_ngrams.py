"""Hashed n-grams against a plain list of them, and how they spread over the buckets."""

import unicodedata
import zlib

import numpy as np
import pytest

from shardline.shards.core.ngrams import ngram_buckets


def plain(text: str, words: range, chars: range) -> list[tuple[str, int]]:
    """The n-grams as text, with the seed of their hash, in the documented order."""
    found = []
    tokens = text.split()
    for end, token in enumerate(tokens, start=1):
        found += [(" ".join(tokens[end - n : end]), 1) for n in words if n <= end]
        framed = f"<{token}>"
        found += [
            (framed[i : i + n], 0)
            for n in chars
            for i in range(len(framed))
            if i + n <= len(framed)
        ]
    return found


def bucket(ngram: str, seed: int, buckets: int) -> int:
    return 1 + (zlib.crc32(ngram.encode(), seed) * 2654435761 % 2**32 * buckets) // 2**32


@pytest.mark.parametrize(
    ("words", "chars"), [((1, 1), None), ((1, 3), None), ((2, 2), (3, 4)), (None, (2, 5))]
)
def test_buckets_against_the_ngrams_written_out(
    words: tuple[int, int] | None, chars: tuple[int, int] | None
) -> None:
    text = "the return of the living dead été 1985"
    as_range = [range(r[0], r[1] + 1) if r else range(0) for r in (words, chars)]
    expected = [bucket(gram, seed, 999) for gram, seed in plain(text, *as_range)]
    found = ngram_buckets(text, buckets=999, words=words, chars=chars, limit=4096)
    assert found == expected
    assert ngram_buckets(text, buckets=999, words=words, chars=chars, limit=5) == expected[:5]


def test_the_hash_never_changes() -> None:
    """Stored models depend on it."""
    found = ngram_buckets("The Thing", buckets=1 << 14, words=(1, 2), chars=(3, 3), limit=99)
    assert found == [574, 9131, 856, 68, 695, 5776, 9131, 72, 15007, 5951, 3580]


def test_spelling_that_does_not_matter() -> None:
    def buckets(text: str) -> list[int]:
        return ngram_buckets(text, buckets=1000, words=(1, 2), chars=(3, 3), limit=99)

    composed = buckets("Été à Paris!")
    assert buckets(unicodedata.normalize("NFD", "été, à\tPARIS")) == composed
    assert buckets("ﬁlm") == buckets("film")
    assert buckets("Strasse") == buckets("straße")


@pytest.mark.parametrize("text", ["", "   ", "?!… —", "\n\t"])
def test_texts_without_words_have_none(text: str) -> None:
    assert ngram_buckets(text, buckets=10, words=(1, 2), chars=(1, 2), limit=9) == []


def test_short_words_have_no_long_ngrams() -> None:
    assert ngram_buckets("a b", buckets=10, words=None, chars=(4, 9), limit=9) == []


@pytest.mark.parametrize("buckets", [1, 7, 1024, 1000])
def test_ngrams_spread_evenly(buckets: int) -> None:
    """5,000 words that differ in a few letters: no bucket has far more than its share."""
    text = " ".join(f"item{i}" for i in range(5000))
    found = ngram_buckets(text, buckets=buckets, words=(1, 1), chars=None, limit=5000)
    counts = np.bincount(found, minlength=buckets + 1)
    assert counts[0] == 0
    assert counts.sum() == 5000
    mean = 5000 / buckets
    # the variance of Poisson counts is their mean; 5 deviations of its estimate
    assert counts[1:].var() < mean * (1 + 5 * np.sqrt(2 / max(buckets - 1, 1)))
