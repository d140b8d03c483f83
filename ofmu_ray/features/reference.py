"""What a method needs to know about rows under the untouched model: computed once, before the first round.

Each quantity of a stream becomes a table (ofmu_ray.data.sidecar) under <cache>/reference/<hash of weights, tokens,
rows, quantity and this code>, so that the runs of a sweep compute it once. What would give a forget row's text away
lies in the run's own folder instead, which goes with the run: refusals and alternatives, which begin with the question,
and log-probabilities and activations of forget rows, because the likeliest words of a model that knows a text spell it.

Small jobs run in this process; others on processes with one CPU or GPU each, which load the model once.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ofmu_ray import progress
from ofmu_ray.algorithm.losses import row_sums, token_nll
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.cluster.map_tasks import device_kind, map_tasks, runs_here
from ofmu_ray.config import ModelConfig
from ofmu_ray.data.batch import IGNORED
from ofmu_ray.data.batch_plan import Plan, places
from ofmu_ray.data.batches import collate
from ofmu_ray.data.prepare import Prepared, TokenisedStream, spread
from ofmu_ray.data.sidecar import Values, has_table, new_table, read_rows, write_sidecar
from ofmu_ray.data.tokenise import take_rows
from ofmu_ray.engines.layers import chosen_layer, decoder_layers, layer_output
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.generation import Draws, generate_batch, stop_ids
from ofmu_ray.features import alternatives, refusals
from ofmu_ray.methods.protocol import Need, Sampling
from ofmu_ray.models.answers import answers
from ofmu_ray.models.loading import load_causal_lm, read_config
from ofmu_ray.models.source import model_fingerprint, weights_folder
from ofmu_ray.storage import is_file, join

BATCH_TOKENS = 4096
"""Tokens of a forward pass, padding counted."""
MOST_BYTES = 20 * 10**9
"""A table that would be larger is refused."""
HALF_ABOVE_BYTES = 2 * 2**30
"""A table that would be larger in fp32 holds fp16: a relative error of 2^-11 = 5e-4 of each log-probability or
activation, at most 2e-4 of any probability."""

_LOGITS_AT_ONCE = 1 << 25  # elements of one forward pass: 128 MiB of fp32
_CODE = ("features/reference.py", "engines/layers.py", "models/answers.py", "evaluation/generation.py")
_ROW = ["row_id", "input_ids", "prompt_tokens"]

Row = Mapping[str, Any]
"""row_id, input_ids, prompt_tokens."""


@dataclass(frozen=True)
class Quantity:
    """What is computed of every row."""

    name: str
    """nll, logits, activations or alternative."""
    layer: int | None = None
    sampling: Sampling | None = None
    seed: int = 0
    """Of `sampling`."""


def write_references(
    needs: Sequence[Need],
    prepared: Prepared,
    plan: Plan,
    model: ModelConfig,
    *,
    folder: str,
    cache: str,
    private: str | None = None,
    refusals_path: str | None = None,
    root: str | None = None,
    seed: int = 0,
    method: str = "",
) -> dict[str, str]:
    """Compute what is missing of `needs`; returns the sidecars' folders (<folder>/<stream>) by stream.

    `cache`: folder of the storage's caches. `private`: where what must not outlive the run goes (default
    <folder>/private); the caller deletes it. Of retain rows only those that the plan uses are looked at.

    Raises UserError: a table would be too large, the refusals are unusable, the model has no such layer.
    """
    if not needs:
        return {}
    source = _Source(model, cache, private or join(folder, "private"), method)
    found = {}
    for stream in dict.fromkeys(need.stream for need in needs):
        mine = [need for need in needs if need.stream == stream]
        whole = prepared.streams[stream]
        tokens = _Tokens(whole, whole.rows if stream == "forget" else np.unique(places(whole, plan).row))
        answered: str | None = None
        sampling = next((need.sampling for need in mine if need.sampling), None)
        if sampling is not None:
            answered = source.alternatives(stream, tokens, sampling, prepared, seed)
        elif any(need.quantity.startswith("refusal") for need in mine):
            texts = refusals.read_refusals(refusals_path, root, f"{method}.refusals")
            answered = source.refusals(tokens, texts, prepared, seed)
        tables = {}
        for need in mine:
            if need.quantity == "refusal_nll":
                assert answered is not None
                rows = read_rows(answered).to_pylist()
                key = Path(answered).stem
                tables["refusal_nll"] = source.table(Quantity("nll"), f"{stream}_refusal", rows, key)
            elif need.quantity not in ("refusal", "alternative"):
                quantity = Quantity(need.quantity, need.layer)
                tables[need.quantity] = source.table(quantity, stream, tokens.rows, tokens.key)
        found[stream] = write_sidecar(join(folder, stream), tables, answered, sampling.count if sampling else None)
    return found


def holdout_losses(prepared: Prepared, model: ModelConfig, cache: str, most: int = 1000) -> np.ndarray:
    """Mean token loss of each holdout row's answer under the untouched model (nats), of at most `most` rows, evenly
    spread; float64 [rows]. Kept in the cache."""
    stream = prepared.streams["holdout"]
    tokens = _Tokens(stream, spread(stream.rows, most))
    folder = _Source(model, cache, "", "ofmu").table(Quantity("nll"), "holdout", tokens.rows, tokens.key)
    sums = Values(folder).rows([row["row_id"] for row in tokens.rows]).double().numpy()
    counts = np.array([_answer_tokens(row) for row in tokens.rows])
    return np.asarray(sums / counts)


def unigram_entropy(prepared: Prepared, most: int = 10_000) -> float:
    """Entropy of the tokens of retain answers (nats), of at most `most` rows: the loss of who knows the vocabulary's
    frequencies and nothing else."""
    stream = prepared.streams["retain"]
    rows = _Tokens(stream, spread(stream.rows, most)).rows
    tokens = np.concatenate([row["input_ids"][row["prompt_tokens"] :] for row in rows])
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())


class _Tokens:
    """The rows of a stream that the run looks at."""

    def __init__(self, stream: TokenisedStream, at: np.ndarray) -> None:
        self.key = _digest(stream.fingerprint, hashlib.sha256(at.tobytes()).hexdigest())
        self.table = take_rows(stream.folder, [name for name, _ in stream.parts], at, _ROW)

    @property
    def rows(self) -> list[Row]:
        found: list[Row] = self.table.to_pylist()
        return found


class _Source:
    """The untouched model, and where tables of it lie."""

    def __init__(self, model: ModelConfig, cache: str, private: str, method: str) -> None:
        self.model = replace(model, lora=None, freeze=[], gradient_checkpointing=False)
        self.cache, self.private, self.method = join(cache, "reference"), private, method
        self.weights = weights_folder(resolve_builtin(model.path))
        self.fingerprint = _digest(
            model_fingerprint(self.weights),
            model.precision,
            *(importlib.resources.files("ofmu_ray").joinpath(file).read_text() for file in _CODE),
        )

    def refusals(self, tokens: _Tokens, texts: Sequence[str], prepared: Prepared, seed: int) -> str:
        """Path of the rows' refusals, whose name is a hash of what they are."""
        key = _digest(tokens.key, prepared.template.fingerprint(), str(seed), *texts)
        path = join(self.private, f"{key}.parquet")
        if not is_file(path):
            rows = refusals.refusal_rows(tokens.table, texts, prepared.template, seed)
            refusals.write_refusals(path, rows)
        return path

    def alternatives(self, stream: str, tokens: _Tokens, sampling: Sampling, prepared: Prepared, seed: int) -> str:
        """Path of the rows' alternatives, whose name is a hash of what they are drawn from."""
        quantity = Quantity("alternative", sampling=sampling, seed=seed)
        key = _digest(
            self.fingerprint, tokens.key, prepared.template.fingerprint(), json.dumps(asdict(quantity), sort_keys=True)
        )
        path = join(self.private, f"{key}.parquet")
        if not is_file(path):
            rows = tokens.rows
            asked = alternatives.asked(rows, sampling.count, sampling.prompt, prepared.template)
            drawn: list[np.ndarray] = [np.empty(0)] * len(asked)
            lengths = np.array([len(row["input_ids"]) + sampling.max_new_tokens for row in asked])
            wide = np.full(len(asked), _text_config(self.model).vocab_size)
            for numbers, found in self._measured(quantity, stream, asked, lengths, wide):
                for number, ids in zip(numbers, found, strict=True):
                    drawn[number] = ids
            refusals.write_refusals(
                path, alternatives.answered(rows, [ids.tolist() for ids in drawn], prepared.template)
            )
        return path

    def table(self, quantity: Quantity, stream: str, rows: Sequence[Row], rows_key: str) -> str:
        """Folder of the table, computed if it is not there."""
        tells = stream == "forget" and quantity.name != "nll"
        key = _digest(self.fingerprint, json.dumps(asdict(quantity)), rows_key)
        folder = join(self.private if tells else self.cache, key)
        if has_table(folder):
            return folder
        config = _text_config(self.model)
        counts = np.array([_answer_tokens(row) for row in rows])
        entries, shape, dtype = counts, [config.vocab_size], "float32"
        if quantity.name == "activations":
            shape = [config.hidden_size]
        elif quantity.name == "nll":
            entries, shape, dtype = np.ones(len(rows), dtype=np.int64), [], "float64"
        bytes_fp32 = 4 * int(entries.sum()) * int(np.prod(shape))
        dtype = "float16" if bytes_fp32 > HALF_ABOVE_BYTES else dtype
        self._refuse_large(quantity, stream, int(entries.sum()), shape, bytes_fp32 // 2)
        about = {"quantity": quantity.name, "layer": quantity.layer, "stream": stream, "dtype": dtype}
        with new_table(folder, [row["row_id"] for row in rows], entries, shape, dtype, about) as (values, starts):
            lengths = np.array([len(row["input_ids"]) for row in rows])
            wide = counts * (1 if quantity.name == "activations" else config.vocab_size)
            for numbers, found in self._measured(quantity, stream, rows, lengths, wide):
                for number, piece in zip(numbers, found, strict=True):
                    values[starts[number] : starts[number] + entries[number]] = piece
        return folder

    def _refuse_large(self, quantity: Quantity, stream: str, entries: int, shape: Sequence[int], size: int) -> None:
        if size > MOST_BYTES:
            remedy = f"--{self.method}.retain_loss nll, " if stream == "retain" and quantity.name == "logits" else ""
            raise UserError(
                f"method {self.method} needs {quantity.name} of the untouched model at {entries} answer tokens of "
                f"{stream} rows, {shape[0]} numbers each: {size} bytes in fp16, more than {MOST_BYTES}; use {remedy}"
                "fewer rows or rounds, or another method"
            )

    def _measured(
        self, quantity: Quantity, stream: str, rows: Sequence[Row], lengths: np.ndarray, wide: np.ndarray
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """(numbers of rows, values of each) until every row has come once; `lengths`, `wide`: as in `cut`."""
        batches = cut(lengths, wide)
        jobs = [[rows[number] for number in numbers] for numbers in batches]
        flops = 2 * sum(file.stat().st_size for file in self.weights.glob("*.safetensors")) / 4 * lengths.sum()
        title = f"reference {quantity.name} of {stream}"
        with progress.bar(title, len(rows), "row") as bar:
            make = partial(_reader, self.model, quantity, device_kind())
            for number, found in enumerate(map(make(), jobs)) if runs_here(flops) else map_tasks(make, jobs):
                yield batches[number], found
                bar.update(len(batches[number]))


def cut(lengths: np.ndarray, wide: np.ndarray) -> list[list[int]]:
    """Numbers of rows in batches of like length, longest first: at most BATCH_TOKENS tokens with padding, and logits
    (`wide`: their elements, by row) that fit in memory; single rows may be larger."""
    batches: list[list[int]] = []
    elements = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        elements += int(wide[number])
        full = not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS
        if full or elements > _LOGITS_AT_ONCE:
            batches.append([])
            elements = int(wide[number])
        batches[-1].append(number)
    return batches


class Reference:
    """The untouched model in memory: values of batches of rows."""

    def __init__(self, model: ModelConfig, quantity: Quantity, device: str) -> None:
        self.module, tokenizer = load_causal_lm(model)
        self.module.to(device).eval()
        self.stop = stop_ids(self.module, tokenizer)
        self.quantity, self.device, self.pad_id = quantity, torch.device(device), tokenizer.pad_token_id
        self.autocast = model.precision == "bf16_autocast"

    @torch.no_grad()
    def values(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Values of each row: nll float64 [1]; logits and activations fp32 [answer tokens, vocabulary or width];
        alternative int64 [tokens drawn after the row's]."""
        if self.quantity.sampling is not None:
            return self._drawn(rows, self.quantity.sampling)
        batch = {name: tensor.to(self.device) for name, tensor in collate(rows, self.pad_id).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if self.quantity.name == "activations":
                layer = chosen_layer(self.quantity.layer, len(decoder_layers(self.module)))
                found = layer_output(self.module, batch, layer)[batch["labels"] != IGNORED].float()
            else:
                logits_tv, labels_t, rows_t, count = answers(self.module, batch)
                if self.quantity.name == "nll":
                    sums = row_sums(token_nll(logits_tv.float(), labels_t).double(), rows_t, count)
                    return [*sums[:, None].cpu().numpy()]
                found = logits_tv.float().log_softmax(1)
        return [piece.numpy() for piece in torch.split(found.cpu(), [_answer_tokens(row) for row in rows])]

    def _drawn(self, rows: Sequence[Row], sampling: Sampling) -> list[np.ndarray]:
        names = [f"{self.quantity.seed}/{row['row_id']}" for row in rows]
        most = sampling.max_new_tokens
        draws = Draws.of(names, most, sampling.temperature, sampling.top_k)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            prompts = [row["input_ids"] for row in rows]
            new = generate_batch(self.module, prompts, max_new_tokens=[most] * len(rows), stop=self.stop, draws=draws)
        return [np.array(ids, dtype=np.int64) for ids in new]


def _reader(model: ModelConfig, quantity: Quantity, device: str) -> Callable[[Sequence[Row]], list[np.ndarray]]:
    return Reference(model, quantity, device).values


def _answer_tokens(row: Row) -> int:
    return len(row["input_ids"]) - int(row["prompt_tokens"])


def _text_config(model: ModelConfig) -> Any:
    return read_config(model.path, trust_remote_code=model.trust_remote_code).get_text_config()


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
