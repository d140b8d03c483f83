"""ROUGE-L recall, with the library and the settings that published TOFU numbers use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """Longest common subsequence of words / words of the reference, per pair, in [0, 1].

    Words are lower-cased runs of a-z and 0-9, those longer than three letters are Porter-stemmed. A text without such
    words (another script) scores 0.
    """
    scorer = _scorer()
    return [
        float(scorer.score(target=reference, prediction=text)["rougeL"].recall)
        for reference, text in zip(references, generated, strict=True)
    ]
