"""Error of finite-difference Hessian-vector products by precision, difference and step; defaults come from here.

    python benchmarks/difference_error.py [--steps 400]

Fits a small Llama to the embedded corpus, then compares H_f g_f and grad Sim = H_f u + H_r w with double backward in
float64 at the same (for bf16: rounded) weights. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ofmu_ray.algorithm import similarity_gradient
from ofmu_ray.algorithm.curvature import Exact, FiniteDifference
from ofmu_ray.algorithm.space import Vector, combine
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines import TorchEngine

SWEEP = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)
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
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def fitted_model(tokenizer: Any, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    module = transformers.LlamaForCausalLM(config)
    engine = TorchEngine(module, inner=OptimizerConfig(lr=2e-3))
    full = rows("full")
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        engine.set_learning_rate("inner", 2e-3 * (1 - 0.9 * step / steps))
        picked = torch.randint(len(full), (10,), generator=generator).tolist()
        gradient, loss = engine.gradient(token_batch(tokenizer, [full[i] for i in picked]))
        engine.apply(gradient, "inner")
    print(f"{engine.numel} parameters, {steps} steps, last loss {loss:.3f}, |theta| {engine.parameters_norm():.1f}\n")
    return copy.deepcopy(module)


def exact(module: torch.nn.Module, batches: Batches) -> tuple[Vector, Vector, Vector, Vector]:
    """H_f g_f, grad Sim and the two vectors u and w, in float64."""
    engine = TorchEngine(copy.deepcopy(module).double())
    curvature = Exact(engine, "cosine")
    g_f, g_r = (engine.gradient(batches[kind])[0] for kind in ("forget", "retain"))
    _, u, w = similarity_gradient(g_f, g_r)
    h_g = curvature.hessian_vector(batches["forget"], "forget", g_f, g_f, 1.0)
    h_u = curvature.hessian_vector(batches["forget"], "forget", g_f, u, 1.0)
    h_w = curvature.hessian_vector(batches["retain"], "retain", g_r, w, 1.0)
    return h_g, combine(1.0, h_u, 1.0, h_w), u, w


def relative_error(found: Vector, expected: Vector) -> float:
    difference = torch.cat(found).double() - torch.cat(expected)
    return float(difference.norm() / torch.cat(expected).norm())


def errors(engine: TorchEngine, batches: Batches, reference: Any, difference: Any) -> list[tuple[float, float]]:
    h_g, grad_sim, u, w = reference
    g_f, g_r = (engine.gradient(batches[kind], differenced=True)[0] for kind in ("forget", "retain"))
    u32, w32 = ([v[0].float()] for v in (u, w))
    found = []
    for step in SWEEP:
        curvature = FiniteDifference(engine, difference, step)

        def product(kind: Any, base: Vector, direction: Vector, by: FiniteDifference = curvature) -> Vector:
            norm = math.sqrt(engine.dot((direction, direction))[0])
            return by.hessian_vector(batches[kind], kind, base, direction, norm)

        similarity = combine(1.0, product("forget", g_f, u32), 1.0, product("retain", g_r, w32))
        found.append((relative_error(product("forget", g_f, g_f), h_g), relative_error(similarity, grad_sim)))
    return found


def report(module: torch.nn.Module, batches: Batches, show: Callable[[str], None] = print) -> None:
    show("| precision | difference | quantity | " + " | ".join(f"{s:.0e}" for s in SWEEP) + " |")
    show("|---" * (3 + len(SWEEP)) + "|")
    for precision in ("fp32", "bf16_autocast", "bf16"):
        engine = TorchEngine(copy.deepcopy(module), precision=precision)  # type: ignore[arg-type]
        reference = exact(engine.module, batches)
        for difference in ("forward", "central"):
            both = errors(engine, batches, reference, difference)
            for index, quantity in enumerate(("H_f g_f", "grad Sim")):
                best = min(pair[index] for pair in both)
                cells = [
                    f"{'**' if p[index] == best else ''}{p[index]:.1e}{'**' if p[index] == best else ''}" for p in both
                ]
                show(f"| {precision} | {difference} | {quantity} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of the fit")
    steps = parser.parse_args().steps
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_builtin("builtin:people/tokenizer"))
    module = fitted_model(tokenizer, steps)
    batches = {name: token_batch(tokenizer, rows(name)[:10]) for name in ("forget", "retain")}
    report(module, batches)


if __name__ == "__main__":
    main()
