"""Error of grad Sim by finite differences: steps measured as a run measures them, compared with fixed steps.

    python benchmarks/difference_error.py [--model DIR ...] [--out benchmarks/difference_error.json]

Models: the shipped target, a small Qwen2 that is first fitted to the same rows, and those in DIR. Cases: all weights
and LoRA of rank 8, fp32 and bf16_autocast, at the start and after five rounds of OFMU (30 updates). A model of 135 M
parameters takes about 12 GB with all weights, 4 GB with LoRA. Reference: double backward in float64, eager attention, 6
forget and 6 retain rows. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from ofmu_ray.algorithm import similarity_gradient
from ofmu_ray.algorithm.curvature import Curvature, Exact, FiniteDifference, MeasuredDifference
from ofmu_ray.algorithm.space import Vector, combine
from ofmu_ray.algorithm.steps import Steps
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import LoraConfig, ModelConfig, OptimizerConfig
from ofmu_ray.config.optimizers import rate_for
from ofmu_ray.engines import TorchEngine
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import add_lora, load_causal_lm

FIXED = (1e-5, 1e-4, 1e-3)
"""Relative steps of the forward differences that measured steps are compared with."""
ROWS = 6
Batches = dict[str, dict[str, torch.Tensor]]


def rows(name: str) -> list[tuple[str, str]]:
    lines = Path(resolve_builtin(f"builtin:people/{name}.jsonl")).read_text().splitlines()
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def token_batch(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    ids, labels = [], []
    for question, answer in pairs:
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + reply))
        labels.append(torch.tensor([-100] * len(prompt) + reply))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def drawn(tokenizer: Any, name: str, seed: int, count: int = ROWS) -> Iterator[dict[str, torch.Tensor]]:
    table, generator = rows(name), torch.Generator().manual_seed(seed)
    while True:
        picked = torch.randint(len(table), (count,), generator=generator).tolist()
        yield token_batch(tokenizer, [table[i] for i in picked])


def small_qwen(steps: int) -> tuple[torch.nn.Module, Any]:
    """A Qwen2 of 0.4 M parameters, fitted to all rows."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_builtin("builtin:people/tokenizer"))
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    engine = TorchEngine(transformers.Qwen2ForCausalLM(config), inner=OptimizerConfig(lr=2e-3))
    for step, batch in enumerate(itertools.islice(drawn(tokenizer, "full", 0, 10), steps)):
        engine.set_learning_rate("inner", 2e-3 * (1 - 0.9 * step / steps))
        engine.apply(engine.gradient(batch)[0], "inner")
    return copy.deepcopy(engine.module), tokenizer


def exact(module: torch.nn.Module, batches: Batches) -> Vector:
    """grad Sim in float64."""
    engine = TorchEngine(copy.deepcopy(module).double())
    return similarity(engine, Exact(engine, "cosine"), batches)


def similarity(engine: TorchEngine, curvature: Curvature, batches: Batches) -> Vector:
    """grad Sim = H_f u + H_r w as computed in a round of OFMU."""
    g_f, g_r = (engine.gradient(batches[kind], differenced=True)[0] for kind in ("forget", "retain"))
    _, u, w = similarity_gradient(g_f, g_r)
    u, w = list(u), list(w)
    norms = [math.sqrt(engine.dot((v, v))[0]) for v in (u, w)]
    h_u = curvature.hessian_vector(batches["forget"], "forget", g_f, u, norms[0])
    return combine(1.0, h_u, 1.0, curvature.hessian_vector(batches["retain"], "retain", g_r, w, norms[1]))


def relative_error(value: Vector, expected: Vector) -> float:
    difference = torch.cat(value).double() - torch.cat(expected)
    return float(difference.norm() / torch.cat(expected).norm())


def measured(engine: TorchEngine, steps: Steps, batches: Batches, expected: Vector) -> dict[str, Any]:
    """Errors of fixed steps and of the run's own steps: in its next round (`stale`; a step that has become too long
    asks for a check), at a check now (`measured`), and of the steps that this check chooses (`between_checks`)."""
    errors: dict[str, Any] = {f"fixed_{step:g}": 0.0 for step in FIXED}
    for step in FIXED:
        by = FiniteDifference(engine, "forward", step)
        errors[f"fixed_{step:g}"] = relative_error(similarity(engine, by, batches), expected)
    if steps.products:
        errors["checked"] = {kind: step.round for kind, step in steps.products.items()}
        errors["stale"] = relative_error(similarity(engine, MeasuredDifference(engine, steps), batches), expected)
        steps.round += steps.check_every
    before = sum(engine.account.gradient_passes.values())
    errors["measured"] = relative_error(similarity(engine, MeasuredDifference(engine, steps), batches), expected)
    errors["passes"] = sum(engine.account.gradient_passes.values()) - before - 2
    curvature = MeasuredDifference(engine, steps)
    by_steps = similarity(engine, curvature, batches)
    errors["between_checks"] = relative_error(by_steps, expected)
    error = math.hypot(*(curvature.error(kind) or 0.0 for kind in ("forget", "retain")))  # type: ignore[arg-type]
    errors["estimated"] = error / math.sqrt(engine.dot((by_steps, by_steps))[0])
    errors["steps"] = {
        kind: {"relative": step.relative, "central": step.central, "bend": step.bend}
        for kind, step in steps.products.items()
    }
    return errors


def case(
    module: torch.nn.Module, tokenizer: Any, precision: Any, rate: float, updates: int
) -> Iterator[dict[str, Any]]:
    """Results at the start and after the updates."""
    optimizer = OptimizerConfig(lr=rate)
    engine = TorchEngine(module, precision=precision, inner=optimizer, outer=optimizer)
    method = OFMU(OFMUConfig.from_preset("lite", beta=0.1))
    batches = {name: token_batch(tokenizer, rows(name)[:ROWS]) for name in ("forget", "retain")}
    streams = drawn(tokenizer, "forget", 1), drawn(tokenizer, "retain", 2)
    while True:
        method.steps.round = method.rounds_done
        errors = measured(engine, copy.deepcopy(method.steps), batches, exact(engine.module, batches))
        yield {"precision": precision, "updates": engine.account.updates, **errors}
        if engine.account.updates >= updates:
            return
        while engine.account.updates < updates:
            method.round(engine, *streams)


def models(args: argparse.Namespace) -> Iterator[tuple[str, torch.nn.Module, Any, float]]:
    """Name, model, tokenizer and learning rate of the updates (of a given model: the default of its size)."""
    if not args.only_given:
        for rate in (1e-4, 1e-3):
            module, tokenizer = load_causal_lm(ModelConfig(attention="eager"))
            yield f"target, rate {rate:g}", module, tokenizer, rate
        yield "small Qwen2", *small_qwen(args.steps), 1e-4
    for path in args.model:
        module, tokenizer = load_causal_lm(ModelConfig(path=path, attention="eager"))
        yield Path(path).name, module, tokenizer, rate_for(sum(weight.numel() for weight in module.parameters()))


def table(records: list[dict[str, Any]]) -> str:
    names = ["stale", "measured", "between_checks", "estimated", *(f"fixed_{step:g}" for step in FIXED)]
    heads = ["model", "weights", "precision", "updates", "last steps", "at a check", "after it", "estimated"]
    heads += [f"fixed {step:g}" for step in FIXED]
    lines = ["| " + " | ".join([*heads, "passes of the check"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for one in records:
        cells = [one["model"], one["weights"], one["precision"], str(one["updates"])]
        cells += [f"{one[name]:.2%}" if name in one else "" for name in names] + [str(one["passes"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps for fitting the small Qwen2")
    parser.add_argument("--model", action="append", default=[], help="another model's directory (may be repeated)")
    parser.add_argument("--only-given", action="store_true", help="skip the target and the Qwen2")
    parser.add_argument("--precision", action="append", default=[], help="default: fp32 and bf16_autocast")
    parser.add_argument("--weights", action="append", default=[], choices=("all", "LoRA"), help="default: both")
    parser.add_argument("--updates", type=int, default=30, help="0: only at the start")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    records = []
    for name, module, tokenizer, rate in models(args):
        for weights, precision in itertools.product(
            args.weights or ("all", "LoRA"), args.precision or ("fp32", "bf16_autocast")
        ):
            torch.manual_seed(0)
            changed = copy.deepcopy(module)
            if weights == "LoRA":
                changed = add_lora(changed, LoraConfig(rank=8))
            for record in case(changed, tokenizer, precision, rate, args.updates):
                records.append({"model": name, "weights": weights, **record})
                print(json.dumps(records[-1]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps({"records": records}, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
