"""What a step of NPO costs: ours and a plain one with a resident reference model, on the same rows and weights.

    OMP_NUM_THREADS=1 python -m benchmarks.methods [--data DIR] [--out benchmarks/methods.json] [--smoke]

CPU seconds (of the process, one thread) of a step: a forget and a retain batch, AdamW. The plain step does what public
code does: a copy of the model runs every forget batch again, logits are computed at prompts and padding too, cross
entropy is computed twice (by transformers, because labels are passed, and by hand for sums per row), and batches are
not sorted by length. Both run in turn over the same rows; on the same batch they must give the same losses. The
variants in between remove one of these at a time. benchmarks/README.md explains the results.

`--data`: a folder with TOFU's files; uses its forget10 and retain90 rows (with a vocabulary learned from them). Without
it, the built-in people, two to a row.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.step import machine
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import FormatConfig, OptimizerConfig
from ofmu_ray.data.batches import collate
from ofmu_ray.data.order import WINDOW_BATCHES, batch_order
from ofmu_ray.data.template import Template
from ofmu_ray.data.vocabulary import build_tokenizer
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.methods import build_method
from ofmu_ray.methods.npo import NPOConfig, answer_nll

SHAPE = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 2048
RATE, CLIP = 1e-4, 1.0
OPTIONS = NPOConfig(optimizer=OptimizerConfig(name="adamw", lr=RATE, weight_decay=0.01, clip=CLIP))
TOLERANCE = 1e-5
Rows = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------ rows and model


def read_rows(data: Path | None) -> tuple[dict[str, Rows], Any]:
    """Rows of both streams as tokens, and the tokenizer."""
    if data is None:
        folder, names = Path(resolve_builtin("builtin:people")), {"forget": "forget.jsonl", "retain": "retain.jsonl"}
    else:
        folder, names = data, {"forget": "forget10.json", "retain": "retain90.json"}
    texts = {name: _lines(folder / file) for name, file in names.items()}
    if data is None:
        texts = {name: [_joined(rows[i : i + 2]) for i in range(0, len(rows), 2)] for name, rows in texts.items()}
    full = texts["forget"] + texts["retain"]
    tokenizer = build_tokenizer((f"{row['question']} {row['answer']}" for row in full), VOCABULARY)
    template = Template(tokenizer, FormatConfig())
    encoded_rows = {}
    for name, rows in texts.items():
        encoded = template.encode_rows([row["question"] for row in rows], [row["answer"] for row in rows])
        encoded_rows[name] = [row._asdict() | {"row_id": f"{name}-{i}"} for i, row in enumerate(encoded)]
    return encoded_rows, tokenizer


def _lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _joined(rows: Rows) -> dict[str, str]:
    return {column: " ".join(row[column] for row in rows) for column in ("question", "answer")}


def build_model(tokenizer: Any, shape: dict[str, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()  # type: ignore[no-any-return]


def batches(rows: Rows, stream: str, steps: int, size: int, pad: int, *, sort: bool) -> list[dict[str, torch.Tensor]]:
    """`steps` batches of the first rows of one shuffle: sorted by length within windows, or unsorted."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = batch_order(
        len(rows), max(steps, WINDOW_BATCHES), size, lengths=lambda numbers: lengths[numbers], seed=0, stream=stream
    )[:steps]
    if not sort:  # the same rows, without grouping by length
        order = np.random.default_rng(0).permutation(order.ravel()).reshape(order.shape)
    return [collate([rows[i] for i in slots], pad) for slots in order]


# ---------------------------------------------------------------------------------------------------------------- steps


class PlainStep:
    """A step as in public code; switching off a flag removes one inefficiency."""

    def __init__(self, model: torch.nn.Module, *, resident: bool = True, twice: bool = True, everywhere: bool = True):
        self.model = model
        self.reference = copy.deepcopy(model).eval() if resident else None
        self.twice, self.everywhere = twice, everywhere
        rule = OPTIONS.optimizer
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, weight_decay=rule.weight_decay, eps=rule.eps, fused=True
        )

    def nll(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the token losses of each row."""
        if not self.everywhere:
            return answer_nll(model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", *(["labels"] if self.twice else []))}
        logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return losses.sum(1)

    def losses(self, forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        nll_r = self.nll(self.model, forget)
        with torch.no_grad():
            before_r = forget["reference_nll"] if self.reference is None else self.nll(self.reference, forget)
        ratio_r = OPTIONS.beta * (nll_r - before_r)
        forget_loss = -2 / OPTIONS.beta * torch.nn.functional.logsigmoid(ratio_r).mean()
        if self.everywhere:
            texts = {name: retain[name] for name in ("input_ids", "attention_mask", "labels")}
            return forget_loss, self.model(**texts).loss
        return forget_loss, answer_nll(self.model, retain).sum() / (retain["labels"] >= 0).sum()

    def __call__(self, forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> tuple[float, float]:
        self.optimizer.zero_grad()
        forget_loss, retain_loss = self.losses(forget, retain)
        (forget_loss + retain_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return forget_loss.item(), retain_loss.item()


class OurStep:
    """A round of the method on the engine; the batch contains the reference values."""

    def __init__(self, model: torch.nn.Module):
        self.engine = TorchEngine(model, inner=OPTIONS.optimizer, outer=OPTIONS.optimizer)
        self.method = build_method(OPTIONS)

    def __call__(self, forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> tuple[float, float]:
        metrics = self.method.round(self.engine, iter([Batch([forget])]), iter([Batch([retain])]))
        return metrics["forget_loss"], metrics["retain_loss"]


Step = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], tuple[float, float]]


def steps_of(model: torch.nn.Module) -> dict[str, tuple[Step, bool]]:
    """Steps and whether their batches are sorted by length, from the least to the most efficient."""
    fresh = lambda: copy.deepcopy(model)  # noqa: E731
    return {
        "plain": (PlainStep(fresh()), False),
        "without resident reference": (PlainStep(fresh(), resident=False), False),
        "and cross entropy once": (PlainStep(fresh(), resident=False, twice=False), False),
        "and head at answers only": (PlainStep(fresh(), resident=False, everywhere=False), False),
        "and sorted": (PlainStep(fresh(), resident=False, everywhere=False), True),
        "ours": (OurStep(fresh()), True),
    }


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(rows: dict[str, Rows], tokenizer: Any, shape: dict[str, int], size: int, steps: int, repeats: int) -> Any:
    """Results of every step on batches of `size` rows: medians over repeats of CPU seconds over `steps` steps."""
    model = build_model(tokenizer, shape)
    streams = {
        sort: [batches(rows[name], name, steps, size, tokenizer.pad_token_id, sort=sort) for name in rows]
        for sort in (True, False)
    }
    started = time.process_time()
    with torch.no_grad():
        for forget, _ in streams.values():
            for batch in forget:
                batch["reference_nll"] = answer_nll(model, batch)
    reference = (time.process_time() - started) / (2 * steps)
    check(model, *(stream[:3] for stream in streams[True]))
    actions = steps_of(model)
    spent: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, (step, sort) in actions.items():
            started = time.process_time()
            for forget, retain in zip(*streams[sort], strict=True):
                step(forget, retain)
            if repeat:  # the first one warms up
                spent[name].append((time.process_time() - started) / steps)
    seconds = {name: median(times) for name, times in spent.items()}
    pairs = zip(spent["plain"], spent["ours"], strict=True)
    tokens = {sort: [count(batch) for stream in streams[sort] for batch in stream] for sort in streams}
    mean = {name: float(np.mean([c[i] for c in tokens[True]])) for i, name in enumerate(("tokens", "answer"))}
    return {
        "batch": size,
        "steps": steps,
        "repeats": repeats,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_of_a_row": {name: value / size for name, value in mean.items()},
        "padding": {
            "sorted" if sort else "unsorted": 1 - sum(c[0] for c in counts) / sum(c[2] for c in counts)
            for sort, counts in tokens.items()
        },
        "cpu_seconds": seconds,
        "speedup": median(a / b for a, b in pairs),
        "reference_cpu_seconds": reference,
        "gflop": 2 * gflop(model, mean["tokens"], mean["answer"]),
    }


def count(batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Tokens, answer tokens, and positions including padding."""
    return int(batch["attention_mask"].sum()), int((batch["labels"] >= 0).sum()), batch["input_ids"].numel()


def gflop(model: Any, tokens: float, answers: float) -> float:
    """GFLOP of a forward and backward pass without padding: layers at all tokens, head at answer tokens."""
    inner = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return 6e-9 * (inner * tokens + model.lm_head.weight.numel() * answers)


def check(model: torch.nn.Module, forget: Any, retain: Any) -> None:
    """Assert that plain and ours give the same losses on the same batches, over three steps."""
    plain, ours = PlainStep(copy.deepcopy(model)), OurStep(copy.deepcopy(model))
    for f, r in zip(forget, retain, strict=True):
        np.testing.assert_allclose(ours(f, r), plain(f, r), rtol=TOLERANCE)


def table(result: dict[str, Any], rate: float) -> Iterator[str]:
    """Markdown."""
    of_a_row, padding = result["tokens_of_a_row"], result["padding"]
    floor = result["gflop"] / rate
    yield (
        f"\nbatches of {result['batch']} rows, {result['parameters'] / 1e6:.2f} M parameters, "
        f"{of_a_row['tokens']:.0f} tokens a row ({of_a_row['answer']:.0f} of the answer); padding "
        f"{padding['unsorted']:.0%} unsorted, {padding['sorted']:.0%} sorted\n"
    )
    yield "| step | CPU ms | times ours |"
    yield "|---|---|---|"
    for name, seconds in result["cpu_seconds"].items():
        yield f"| {name} | {1e3 * seconds:.1f} | {seconds / result['cpu_seconds']['ours']:.2f} |"
    yield f"| floor: {result['gflop']:.1f} GFLOP at {rate:.0f} GFLOP/s | {1e3 * floor:.1f} | |"
    yield (
        f"\nplain / ours: {result['speedup']:.2f}; the reference model's pass over a forget batch, once a run: "
        f"{1e3 * result['reference_cpu_seconds']:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TOFU's forget10.json and retain90.json")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16], help="rows per batch")
    parser.add_argument("--steps", type=int, default=8, help="steps per measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--smoke", action="store_true", help="two steps of a tiny model")
    args = parser.parse_args()
    shape = SHAPE
    if args.smoke:
        args.batches, args.steps, args.repeats, shape = [4], 3, 1, TINY
    torch.set_num_threads(1)
    rows, tokenizer = read_rows(args.data)
    results: dict[str, Any] = {"machine": machine(), "rows": "tofu" if args.data else "people", "workloads": []}
    for size in args.batches:
        results["workloads"].append(measure(rows, tokenizer, shape, size, args.steps, args.repeats))
        print("\n".join(table(results["workloads"][-1], results["machine"]["matmul_gflop_per_second"])), flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
