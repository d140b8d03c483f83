"""Small slices of MUSE-News in the layout of its release, for a small model on a CPU.

    python -m benchmarks.muse_slices --root PATH --out build/muse_news [--texts 16] [--characters 800]

Half of the texts to forget are what `verbmem` asks for: the end of a prompt and its continuation. The other half are
passages with the answer to a question of `knowmem`, from documents with at least 80 % of the words of question and
answer. The texts to keep begin with the passages of their own questions. `privleak` has the texts to forget, and as
many that were never seen; `raw/holdout` has others, for the forget level. The other forget sets are beginnings of
documents. Examples of questions stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

SHARE = 0.8
FOLDS = ("sust/forget_2", "sust/forget_3", "sust/forget_4")


def words(text: str) -> set[str]:
    """Words that tell texts apart."""
    found: set[str] = set(re.findall(r"[a-z0-9]+", text.lower())) - ENGLISH_STOP_WORDS
    return found


def passages(
    questions: list[dict[str, str]], documents: list[str], count: int, size: int
) -> list[tuple[dict[str, str], str]]:
    """The first `count` questions with an answer in a document of their own, and the passage around it."""
    found: list[tuple[dict[str, str], str]] = []
    left = {number: words(document) for number, document in enumerate(documents)}
    for row in questions:
        asked, answer = words(f"{row['question']} {row['answer']}"), row["answer"].strip(" .").lower()
        fits = [number for number, known in left.items() if len(asked & known) >= SHARE * len(asked)]
        fits = [number for number in fits if answer in documents[number].lower()]
        if fits and len(found) < count:
            best = max(fits, key=lambda number: len(asked & left[number]))
            document = documents[best]
            at = max(0, min(document.lower().index(answer) - size // 2, len(document) - size))
            found.append((row, document[at : at + size]))
            del left[best]
    return found


def beginnings(documents: list[str], count: int, size: int) -> list[str]:
    """Those of the first `count` documents that are long enough."""
    return [document[:size] for document in documents if len(document) >= size][:count]


def slices(root: Path, texts: int, size: int) -> dict[str, list[Any]]:
    """Content of each file, by its name without the ending."""

    def read(name: str) -> list[Any]:
        rows: list[Any] = json.loads((root / f"{name}.json").read_text())
        return rows

    half = texts // 2
    verbatim = [{"prompt": row["prompt"][-size // 2 :], "gt": row["gt"]} for row in read("verbmem/forget")[:half]]
    forget = passages(read("knowmem/forget_qa"), read("raw/forget"), texts - half, size)
    retain = passages(read("knowmem/retain2_qa"), read("privleak/retain2"), half, size)
    seen = [row["prompt"] + row["gt"] for row in verbatim] + [passage for _, passage in forget]
    unseen = beginnings(read("privleak/holdout"), 2 * texts, size)
    others = beginnings(read("privleak/retain2")[::-1], texts - len(retain), size)
    return {
        "raw/forget": seen,
        "privleak/forget": seen,
        "privleak/holdout": unseen[:texts],
        "raw/holdout": unseen[texts:],
        "privleak/retain2": [passage for _, passage in retain] + others,
        "verbmem/forget": verbatim,
        "knowmem/forget_qa": [row for row, _ in forget],
        "knowmem/retain2_qa": [row for row, _ in retain],
        **{name: beginnings(read(name), texts, size) for name in FOLDS},
        **{name: read(name) for name in ("knowmem/forget_qa_icl", "knowmem/retain2_qa_icl")},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=16, help="of each set")
    parser.add_argument("--characters", type=int, default=800, help="of each text")
    chosen = parser.parse_args()
    for name, rows in slices(chosen.root, chosen.texts, chosen.characters).items():
        path = chosen.out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
        print(f"{name}: {len(rows)}")


if __name__ == "__main__":
    main()
