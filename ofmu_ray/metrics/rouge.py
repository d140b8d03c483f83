"""ROUGE-L with the words of rouge_score: recall of stems as in the published TOFU results, MUSE's F-measure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

    return PorterStemmer()


class _CachedStemmer:
    """The stemmer that rouge_score uses; cached, as words repeat and stemming costs more than the rest of the score."""

    @staticmethod
    @lru_cache(maxsize=1 << 16)
    def stem(word: str) -> str:
        return str(_stemmer().stem(word))


@lru_cache(maxsize=1 << 12)
def _words(text: str, stemmed: bool = True) -> tuple[str, ...]:
    from rouge_score.tokenize import tokenize

    return tuple(tokenize(text, _CachedStemmer if stemmed else None))


def rouge_l_recall(references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """Longest common subsequence of words / words of the reference, per pair, in [0, 1].

    Words are lower-cased runs of a-z and 0-9; those longer than three letters are Porter-stemmed. A text without such
    words (another script) scores 0. Equal to rouge_score's `rougeL` with `use_stemmer=True`.
    """
    return [_recall(_words(reference), _words(text)) for reference, text in zip(references, generated, strict=True)]


def rouge_l_f(references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """2 x longest common subsequence / words of both texts, per pair, in [0, 1].

    Equal to rouge_score's `rougeL.fmeasure` with `use_stemmer=False`.
    """
    pairs = [(_words(one, False), _words(two, False)) for one, two in zip(references, generated, strict=True)]
    return [2 * common_subsequence(*pair) / max(len(pair[0]) + len(pair[1]), 1) for pair in pairs]


def _recall(reference: tuple[str, ...], generated: tuple[str, ...]) -> float:
    return common_subsequence(reference, generated) / len(reference) if reference else 0.0


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table per machine operation (Hyyrö 2004).

    Bit i of `row` is 0 if the table's row grows between columns i and i + 1.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        matching = row & places.get(word, 0)
        row = ((row + matching) | (row - matching)) & ones
    return len(first) - row.bit_count()
