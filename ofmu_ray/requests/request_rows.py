"""The rows of a batch: what is to be forgotten, what was forgotten before, what is kept.

Texts of requests come decrypted from the vault and stay in memory, except for the files that a run reads, which are in
its own folder and go with what else of it contains text (`runs.job.remove_text`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from ofmu_ray.config import FormatConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.data import sources
from ofmu_ray.data.evaluation_rows import evaluation_rows
from ofmu_ray.evaluation.evaluator import read_sets
from ofmu_ray.requests.gate_tables import GateRows
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request
from ofmu_ray.storage import is_uri, join, locate

Row = dict[str, Any]
SALT = "ofmu_salt"


def gate_rows(config: RequestsConfig, ledger: Ledger, batch: Sequence[Request]) -> GateRows:
    """The rows that gates look at.

    Raises:
        UserError: rows of the batch cannot be decrypted any more, or evaluation rows cannot be used.
    """
    gone = ledger.rows_requested()
    requested = _distinct(ledger, (row for request in batch for row in ledger.rows(request.id)))
    hashes = {ledger.hashes.row(row["question"], row["answer"]) for row in requested}
    ids = {request.id for request in batch}
    before = [one for one in ledger.all(("promoted",)) if one.id not in ids and ledger.readable(one.id)]
    earlier = [
        (request.id, row)
        for request in before
        for row in _distinct(ledger, ledger.rows(request.id))
        if ledger.hashes.row(row["question"], row["answer"]) not in hashes
    ]
    return GateRows(_with_other_answers(config, ledger, requested), earlier, _kept(config, ledger, gone))


def retained(config: RequestsConfig, ledger: Ledger, requested: set[str]) -> Iterator[tuple[str, str]]:
    """(question, answer) of the training rows whose hash is not among the requested; unreadable rows are left out."""
    fmt = config.data.format
    for piece in sources.fragments(config.requests.train, config.data.root, stream="train", option="requests.train"):
        for _, row in sources.read(piece, [fmt.question, fmt.answer]):
            if isinstance(row, sources.UnreadableRow):
                continue
            question, answer = row.get(fmt.question), row.get(fmt.answer)
            usable = isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()
            if usable and ledger.hashes.row(question, answer) not in requested:  # type: ignore[arg-type]
                yield question, answer  # type: ignore[misc]


def write_sources(
    folder: str, config: RequestsConfig, ledger: Ledger, batch: Sequence[Request], before: datetime
) -> dict[str, str]:
    """Write the files that a run reads: `forget` and `retain`, JSON Lines that only their owner can read.

    `before`: other requests accepted later do not count, so that a batch that is resumed has the same rows (its own
    always count: the clock of the machine that accepted them may be ahead). The first row has a secret (`SALT`) as
    well: the run's records keep digests of these files, from which few rows could be guessed.
    """
    fmt = config.data.format
    rows = _distinct(ledger, (row for request in batch for row in ledger.rows(request.id)))
    paths = {name: join(folder, f"{name}.jsonl") for name in ("forget", "retain")}
    salt = ledger.hashes.salt(str(batch[0].batch))
    _write(paths["forget"], ((row["question"], row["answer"]) for row in rows), fmt, salt)
    own = {name for request in batch for name in ledger.row_hashes(request.id)}
    _write(paths["retain"], retained(config, ledger, ledger.rows_requested(before) | own), fmt, salt)
    return paths


def _write(path: str, pairs: Iterable[tuple[str, str]], fmt: FormatConfig, salt: str) -> None:
    if not is_uri(path):
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    filesystem, inside = locate(path)
    with filesystem.open_output_stream(inside) as file:
        secret = {SALT: salt}
        for question, answer in pairs:
            row = {fmt.question: question, fmt.answer: answer, **secret}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            secret = {}


def _distinct(ledger: Ledger, rows: Iterable[Row]) -> list[Row]:
    """Question and answer of the rows, each once."""
    by_hash = {ledger.hashes.row(row["question"], row["answer"]): row for row in rows}
    return [{"question": row["question"], "answer": row["answer"]} for row in by_hash.values()]


def _kept(config: RequestsConfig, ledger: Ledger, gone: set[str]) -> dict[str, list[Row]]:
    """Rows of the other sets. Rows that were ever requested are nobody's utility."""
    evaluation, data, limit = config.evaluation, config.data, config.evaluation.max_rows
    named = replace(evaluation.sets, forget=None, probes=[], holdout=None)
    train = config.requests.train  # stands in for sets that are dropped below or have no file
    found: dict[str, list[Row]] = read_sets(
        replace(evaluation, sets=named),
        replace(data, forget=replace(train, limit=1), retain=replace(train, limit=1)),
        config.model,
    )
    found.pop("forget")
    if named.retain is None:
        pairs = islice(retained(config, ledger, gone), limit)
        found["retain"] = [{"question": question, "answer": answer} for question, answer in pairs]
    else:
        kept = (row for row in found["retain"] if ledger.hashes.row(row["question"], row["answer"]) not in gone)
        found["retain"] = list(kept)
    holdout: Any = evaluation.sets.holdout or data.sources.get("holdout")
    if holdout is not None:
        clusters = evaluation.clusters if isinstance(evaluation.clusters, dict) else {}
        found["holdout"] = evaluation_rows(
            holdout, data.root, limit, name="holdout", option="data.holdout", fmt=data.format,
            cluster=clusters.get("holdout"),
        )  # fmt: skip
    return found


def _with_other_answers(config: RequestsConfig, ledger: Ledger, rows: list[Row]) -> list[Row]:
    """The rows, with paraphrased and wrong answers where `evaluation.sets.forget` has them for the same row."""
    path = config.evaluation.sets.forget
    if path is None:
        return rows
    known: dict[str, Row] = {}
    for row in evaluation_rows(path, config.data.root, name="forget", fmt=config.data.format):
        known[ledger.hashes.row(row["question"], row["answer"])] = row
    extras = ("paraphrased_answer", "perturbed_answer")
    found = [known.get(ledger.hashes.row(row["question"], row["answer"]), {}) for row in rows]
    return [row | {name: more[name] for name in extras if name in more} for row, more in zip(rows, found, strict=True)]
