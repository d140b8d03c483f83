"""Tables of values by row id: which rows they have, how their rows are cut into passes, how they are written."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ofmu_ray.data.sidecar import StoredValues, has_table, new_table, read_rows
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.data.tokenise import take_rows
from ofmu_ray.features.protocol import ParameterValues, Row, Tokens, Values, answer_tokens, row_tokens
from ofmu_ray.storage import is_file

if TYPE_CHECKING:
    from ofmu_ray.data.template import Template

BATCH_TOKENS = 4096
"""Tokens of a forward pass, padding counted."""
HALF_ABOVE_BYTES = 2 * 2**30
"""Tables larger than this in fp32 are stored as fp16: a relative error of 2^-11 = 5e-4 of each log-probability or
activation, at most 2e-4 of any probability."""
LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Elements of one forward pass: 128 MiB of fp32, on GPUs 1 GiB."""
_ROW = ["input_ids", "prompt_tokens", "image_pixels", "label"]


class ChosenRows:
    """The rows of a stream that the run uses; `columns`: those of them to read that there are."""

    def __init__(self, stream: TokenisedStream, at: np.ndarray, columns: Sequence[str] = _ROW) -> None:
        self.key = digest(stream.fingerprint, hashlib.sha256(at.tobytes()).hexdigest())
        self.read = partial(_taken, stream.folder, [name for name, _ in stream.parts], at, ["row_id", *columns])

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Read once."""
        return self.read()


@dataclass(frozen=True)
class ValueTable:
    """A table of values that is missing, and how to compute it. It can be sent to another node."""

    folder: str
    feature: Values
    stream: str
    read: Callable[[], list[Row]]
    """Reads its rows."""
    shape: tuple[int, ...]
    """Of an entry."""
    width: int
    """Numbers that a forward pass keeps per answer token."""

    @property
    def title(self) -> str:
        """What it has."""
        return f"{self.feature.name} of {self.stream}"

    @property
    def written(self) -> bool:
        """Whether it is there."""
        return has_table(self.folder)

    def means(self) -> np.ndarray:
        """Each row's value over its answer tokens, float64 [rows]. For values of one number per row."""
        rows = self.read()
        sums = StoredValues(self.folder).rows([row["row_id"] for row in rows]).double().numpy()
        return np.asarray(sums / np.array([answer_tokens(row) for row in rows]))

    def entries(self, rows: Sequence[Row]) -> np.ndarray:
        """Entries of each row, int64 [rows]."""
        return np.array([self.feature.entries(row) for row in rows], dtype=np.int64)

    def bytes_fp32(self, entries: np.ndarray) -> int:
        """Its size in fp32."""
        return 4 * int(entries.sum()) * int(np.prod(self.shape))

    def sizes(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """`lengths` and `wide` for `cut`."""
        return np.array([row_tokens(row) for row in rows]), np.array([answer_tokens(row) for row in rows]) * self.width

    def write(self, rows: Sequence[Row], results: Iterable[tuple[int, np.ndarray]]) -> None:
        """Publish it, from (row number, entries) of every row in any order."""
        entries, feature = self.entries(rows), self.feature
        dtype = "float16" if self.bytes_fp32(entries) > HALF_ABOVE_BYTES else feature.dtype
        about = {"quantity": feature.name, **asdict(feature), "stream": self.stream, "dtype": dtype}
        ids = [row["row_id"] for row in rows]
        with new_table(self.folder, ids, entries, self.shape, dtype, about) as (values, starts):
            for number, piece in results:
                values[starts[number] : starts[number] + entries[number]] = piece


@dataclass(frozen=True)
class MissingTexts:
    """Texts from the reference model that are missing, and how to make them. It can be sent to another node."""

    path: str
    tokens: Tokens
    read: Callable[[], list[Row]]
    """Reads the rows that they belong to."""
    template: Template

    @property
    def title(self) -> str:
        """What it has."""
        return type(self.tokens).__name__.lower()

    @property
    def written(self) -> bool:
        """Whether they are there."""
        return is_file(self.path)


@dataclass(frozen=True)
class MissingTensors:
    """Named tensors from all rows of a stream that are missing, and how to compute them. It can be sent to another
    node."""

    path: str
    feature: ParameterValues
    read: Callable[[], list[Row]]
    """Reads the rows."""

    @property
    def title(self) -> str:
        """What it has."""
        return self.feature.name.replace("_", " ")

    @property
    def written(self) -> bool:
        """Whether they are there."""
        return is_file(self.path)


Missing = ValueTable | MissingTexts | MissingTensors
"""What a run's workers compute before their first round."""


def cut(lengths: np.ndarray, wide: np.ndarray, most: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first: at most BATCH_TOKENS tokens with padding, and `most`
    elements of logits (`wide`: those of each row); single rows may exceed both."""
    batches: list[list[int]] = []
    elements = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        elements += int(wide[number])
        full = not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS
        if full or elements > most:
            batches.append([])
            elements = int(wide[number])
        batches[-1].append(number)
    return batches


def _taken(folder: str, parts: list[str], at: np.ndarray, columns: list[str]) -> list[Row]:
    rows: list[Row] = take_rows(folder, parts, at, columns).to_pylist()
    return rows


def texts_in(path: str) -> list[Row]:
    """The rows of a file of texts."""
    rows: list[Row] = read_rows(path).to_pylist()
    return rows


def digest(*parts: str) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
