"""Text as hashed n-grams: which rows of an embedding table belong to a text.

Training and the query encoder call the same function, so they cannot differ. A text is put into
Unicode's compatibility form, case folded and cut into words; word n-grams and the character n-grams
of each ``<word>`` are hashed with CRC-32, the same on every machine and in every process.
"""

import re
import unicodedata
import zlib

WORD = re.compile(r"\w+")
WORD_SEED, CHAR_SEED = 1, 0  # the word "cat" and the letters "cat" inside a word are different
# CRC-32 is linear, so its low bits alone spread badly; Knuth's multiplier mixes them upwards
MULTIPLIER = 0x9E3779B1

Range = tuple[int, int]  # smallest and largest n


def ngram_buckets(
    text: str, *, buckets: int, words: Range | None, chars: Range | None, limit: int
) -> list[int]:
    """Buckets 1 .. ``buckets`` of the text's first ``limit`` n-grams, word by word, with repeats.

    Empty where the text holds no letter or digit, or only words too short for any n-gram.
    """
    hashes: list[int] = []
    before: list[str] = []
    for match in WORD.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match.group()
        if words is not None:  # the word n-grams that end with this word
            before = [*before, word][-words[1] :]
            for size in range(words[0], min(words[1], len(before)) + 1):
                hashes.append(zlib.crc32(" ".join(before[-size:]).encode(), WORD_SEED))
        if chars is not None:
            framed = f"<{word}>"
            for size in range(chars[0], chars[1] + 1):
                # no more than are asked for: a word may be megabytes long
                starts = range(min(len(framed) - size + 1, limit - len(hashes)))
                hashes += [zlib.crc32(framed[at : at + size].encode(), CHAR_SEED) for at in starts]
        if len(hashes) >= limit:
            break
    return [1 + (((each * MULTIPLIER) & 0xFFFFFFFF) * buckets >> 32) for each in hashes[:limit]]
