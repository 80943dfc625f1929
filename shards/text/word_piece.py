"""BERT's tokenizer: a text to the numbers of its pieces.

Clean, lower-case, split at white space and punctuation, then the longest known pieces from the
left: WordPiece (Devlin et al. 2018, https://arxiv.org/abs/1810.04805, appendix; Wu et al. 2016).
Names of special tokens in a text are text like any other, so nobody can write a [SEP]. The same
as the tokenizers library on every character that Unicode had in 2015; a few marks that came later
are split here and not there.
"""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from shardline.shards.core.errors import ConfigError, CorruptFile

CLS, SEP = "[CLS]", "[SEP]"
# first and last code point: CJK ideographs, each of which is a word
IDEOGRAPHS = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)
# ASCII that is no letter, digit or space: punctuation too, whatever Unicode calls it
ASCII_MARKS = ((33, 47), (58, 64), (91, 96), (123, 126))
KEPT_WORDS = 1 << 16  # whose pieces are remembered


class WordPiece:
    """Of a ``tokenizer.json``. Threads may share it."""

    def __init__(self, content: dict[str, Any], where: str) -> None:
        """Raises ConfigError: another kind of tokenizer. CorruptFile: a part is missing."""
        try:
            model, normalizer = content["model"], content["normalizer"]
            kinds = model["type"], normalizer["type"], content["pre_tokenizer"]["type"]
            expected = "WordPiece", "BertNormalizer", "BertPreTokenizer"
            if kinds != expected:
                raise ConfigError(
                    f"{where}: a tokenizer that is not known",
                    expected=", ".join(expected),
                    got=", ".join(map(str, kinds)),
                )
            self._vocabulary: dict[str, int] = dict(model["vocab"])
            self._unknown = self._vocabulary[model["unk_token"]]
            self._prefix: str = model["continuing_subword_prefix"]
            self._longest_word: int = model["max_input_chars_per_word"]
            self._first, self._last = self._vocabulary[CLS], self._vocabulary[SEP]
            self._cleans: bool = normalizer["clean_text"]
            self._splits_ideographs: bool = normalizer["handle_chinese_chars"]
            self._lowers: bool = normalizer["lowercase"]
            strips = normalizer["strip_accents"]
            self._strips: bool = self._lowers if strips is None else strips
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{where}: not a tokenizer", got=repr(error)) from error
        self._pieces = lru_cache(maxsize=KEPT_WORDS)(self._pieces_of)

    @property
    def rows(self) -> int:
        """Of the table of embeddings that the numbers point into: at least so many."""
        return max(self._vocabulary.values()) + 1

    def numbers(self, text: str) -> list[int]:
        """Those of [CLS], the text's pieces, [SEP]."""
        found = [self._first]
        for word in self._words(text):
            if len(word) > self._longest_word:  # not kept: many long words would fill memory
                found.append(self._unknown)
            else:
                found.extend(self._pieces(word))
        found.append(self._last)
        return found

    def _words(self, text: str) -> Iterator[str]:
        if self._cleans:
            text = "".join(" " if _is_space(c) else c for c in text if not _is_control(c))
        if self._splits_ideographs and not text.isascii():
            text = "".join(f" {c} " if _is_ideograph(c) else c for c in text)
        if self._strips and not text.isascii():
            decomposed = unicodedata.normalize("NFD", text)
            text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        if self._lowers:
            # letter by letter, as the reference does: a final sigma is like any other
            text = text.lower() if text.isascii() else "".join(map(str.lower, text))
        for run in text.split():
            start = 0
            for place, letter in enumerate(run):
                if _is_mark(letter):
                    if start < place:
                        yield run[start:place]
                    yield letter
                    start = place + 1
            if start < len(run):
                yield run[start:]

    def _pieces_of(self, word: str) -> tuple[int, ...]:
        found, start = [], 0
        while start < len(word):
            prefix = self._prefix if start else ""
            for end in range(len(word), start, -1):
                number = self._vocabulary.get(prefix + word[start:end])
                if number is not None:
                    found.append(number)
                    start = end
                    break
            else:
                return (self._unknown,)
        return tuple(found)


def _is_space(letter: str) -> bool:
    return letter in " \t\n\r" or unicodedata.category(letter) == "Zs"


def _is_control(letter: str) -> bool:
    if letter in "\t\n\r":
        return False
    return letter in "\0\ufffd" or unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs")


@lru_cache(maxsize=KEPT_WORDS)
def _is_mark(letter: str) -> bool:
    point = ord(letter)
    if point < 128:
        return any(low <= point <= high for low, high in ASCII_MARKS)
    return unicodedata.category(letter).startswith("P")


def _is_ideograph(letter: str) -> bool:
    return any(low <= ord(letter) <= high for low, high in IDEOGRAPHS)
