"""Rounds of the methods that compare with the reference model: ours on an engine, and plainly with a resident copy.

For tests/test_methods_reference.py, alone or as a rank of a gloo group.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from engine_models import VOCABULARY
from invariant_ranks import close, seeded_model, shard_of

from ofmu_ray import config
from ofmu_ray.engines import Batch
from ofmu_ray.methods import build_method
from ofmu_ray.models.loading import disable_dropout

ROUNDS = 3
SGD = config.OptimizerConfig(name="sgd", lr=0.02, clip=None)
OPTIONS: dict[str, Any] = {
    "npo": config.METHODS["npo"](optimizer=SGD, beta=0.5),
    "npo-kl": config.METHODS["npo"](optimizer=SGD, retain_loss="kl"),
    "idk": config.METHODS["idk"](optimizer=SGD),
    "dpo": config.METHODS["dpo"](optimizer=SGD, beta=0.3, retain_weight=0.5),
    "altpo": config.METHODS["altpo"](optimizer=SGD, beta=0.4, retain_weight=0.5),
    "undial": config.METHODS["undial"](optimizer=SGD, beta=3.0),
    "rmu": config.METHODS["rmu"](optimizer=SGD, steering=3.0),
    "rmu-last": config.METHODS["rmu"](optimizer=SGD, train_layers=1, retain_weight=0.7),
}
LAYER = 0
"""The steered layer, one of two."""


@dataclass(frozen=True)
class Case:
    variant: str
    stage: int | None = None
    model: str = "llama"
    micro: int | None = None

    def __str__(self) -> str:
        return f"{self.variant}-{self.model}-{'torch' if self.stage is None else f'zero{self.stage}'}"


def reference_model(kind: str) -> torch.nn.Module:
    module = seeded_model(kind)
    disable_dropout(module)
    return module


def rounds(case: Case, world: int, rank: int) -> list[dict[str, list[Batch]]]:
    """This rank's batches for each round, without the sidecars' columns except refusals."""
    counts = build_method(OPTIONS[case.variant]).batches_per_round()
    shards = {
        s: shard_of(s, counts[s], ROUNDS, world, rank, case.micro) if counts[s] else [[]] * ROUNDS for s in counts
    }
    batches = [{s: shards[s][at] for s in shards} for at in range(ROUNDS)]
    if case.variant in ("idk", "dpo", "altpo"):
        for streams in batches:
            streams["forget"] = [refused(batch) for batch in streams["forget"]]
    return batches


def refused(batch: Batch) -> Batch:
    return Batch([{**micro, **refusal(micro)} for micro in batch.micro])


def refusal(micro: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each row's prompt with an answer of 2 to 4 tokens that depends on its first token."""
    rows = []
    for ids, mask, labels in zip(*(micro[n] for n in ("input_ids", "attention_mask", "labels")), strict=True):
        prompt = ids[: int(mask.sum() - (labels >= 0).sum())].tolist()
        answer = [(7 * prompt[0] + at) % VOCABULARY for at in range(2 + prompt[0] % 3)]
        rows.append((prompt, answer))
    width = max(len(p) + len(a) for p, a in rows)
    padded = {
        "refusal_input_ids": [[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in rows],
        "refusal_attention_mask": [[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in rows],
        "refusal_labels": [[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows],
    }
    return {name: torch.tensor(value) for name, value in padded.items()}


# ------------------------------------------------------------------ values of a resident copy of the reference model


def row_nll(model: Any, micro: Mapping[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """Sum of the token losses of each row, one row at a time and without padding."""
    sums = []
    names = [prefix + name for name in ("input_ids", "attention_mask", "labels")]
    for ids, mask, labels in zip(*(micro[name] for name in names), strict=True):
        length = int(mask.sum())
        logp = model(input_ids=ids[None, :length]).logits[0, :-1].log_softmax(1)
        sums.append(-sum(logp[at - 1, labels[at]] for at in range(1, length) if labels[at] >= 0))
    return torch.stack(sums)


def answer_logits(model: Any, micro: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
    return torch.cat([z[:-1][y[1:] >= 0] for z, y in zip(logits, micro["labels"], strict=True)])


def activations(model: Any, micro: Mapping[str, torch.Tensor]) -> torch.Tensor:
    output = model(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], output_hidden_states=True)
    return output.hidden_states[LAYER + 1]


@torch.no_grad()
def known(untouched: Any, batch: Batch) -> Batch:
    """The batch with the columns that the sidecar adds."""
    micros = []
    for micro in batch.micro:
        columns = {
            "reference_nll": row_nll(untouched, micro),
            "reference_logprobs": answer_logits(untouched, micro).log_softmax(1),
            "reference_activations": activations(untouched, micro)[micro["labels"] >= 0],
        }
        if "refusal_labels" in micro:
            columns["refusal_reference_nll"] = row_nll(untouched, micro, "refusal_")
        micros.append({**micro, **columns})
    return Batch(micros)


def probe(model: Any, micro: Mapping[str, torch.Tensor]) -> float:
    return float(answer_logits(model, micro).logsumexp(1).sum())


# ----------------------------------------------------------------------------------------------------- ours, on engines


def build_engine(case: Case, method: Any, dtype: torch.dtype) -> Any:
    from ofmu_ray.engines import DeepSpeedEngine, TorchEngine

    torch.manual_seed(5)  # the run's seed, which RMU's vector comes from
    module = reference_model(case.model).to(dtype)
    torch.manual_seed(5)
    method.freeze(module)
    optimizer = OPTIONS[case.variant].optimizer
    if case.stage is None:
        return TorchEngine(module, inner=optimizer, outer=optimizer)
    return DeepSpeedEngine(module, inner=optimizer, outer=optimizer, zero_stage=case.stage)  # type: ignore[arg-type]


def trajectory(case: Case, rank: int, world: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Run the case's rounds, evaluating the full model in between. Only rank 0 has the full weights."""
    method = build_method(OPTIONS[case.variant], ROUNDS)
    untouched = reference_model(case.model).to(dtype)
    engine = build_engine(case, method, dtype)
    method.start(engine)
    metrics, utilities = [], []
    for streams in rounds(case, world, rank):
        batches = {name: [known(untouched, batch) for batch in stream] for name, stream in streams.items()}
        metrics.append(method.round(engine, iter(batches["forget"]), iter(batches["retain"])))
        probed = streams["forget"][0].micro[0]
        utilities += engine.evaluate(
            probed, lambda module, micro: float(answer_logits(module, micro).logsumexp(1).sum())
        )
    result = {
        "weights": engine.full_weights(),
        "figures": metrics,
        "utilities": utilities,
        "account": engine.account.state(),
        "state": copy.deepcopy(method.state_dict()),
    }
    close(engine)
    return result
