"""CPU seconds of whole commands on the built-in example, beside a plain loop and transformers' Trainer.

    OMP_NUM_THREADS=1 python benchmarks/command_cost.py [--steps 30] [--out benchmarks/command_cost.json]

User and system seconds of a process with its children, imports included. GradDiff takes one pass over a forget and one
over a retain batch per step, which a plain loop can repeat; so can a `Trainer` whose loss is GradDiff's, on which
OpenUnlearning's trainers are built. A step's cost is the difference between runs of 30 and of 150 steps. No evaluation
is part of `unlearn`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEOPLE = ROOT / "ofmu_ray/assets/people"
BATCH = 8
LONGER = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=list(LOOPS), help="only this loop, in this process")
    options = parser.parse_args()
    if options.only:
        LOOPS[options.only](options.steps)
        return
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as storage:
            for name, command in commands(options.steps, storage).items():
                seconds.setdefault(name, []).append(cost(command))
    median = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    step = {
        name: round(1000 * (median[f"{name}_longer"] - median[name]) / (options.steps * (LONGER - 1)))
        for name in ("unlearn", *LOOPS)
    }
    result = {"steps": options.steps, "longer": options.steps * LONGER, "batch_size": BATCH}
    result |= {"cpu_seconds": median, "all": seconds, "cpu_milliseconds_per_step": step}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def commands(steps: int, storage: str) -> dict[str, list[str]]:
    """What is measured, in this order; `evaluate_again` finds the results of `evaluate`."""
    ofmu = [sys.executable, "-m", "pipelines.cli"]
    where = ["--storage", storage, "--tracking.system_metrics", "false"]
    run = ["--method", "grad_diff", "--training.engine", "torch", "--training.workers", "1"]
    run += ["--training.batch_size", str(BATCH), "--evaluation.enabled", "false", "--stop.forgotten", "null", *where]
    evaluate = [*ofmu, "evaluate", "--models", "{target: builtin:people/target}", "--name", "e", *where[:2]]
    every: dict[str, list[str]] = {}
    for suffix, number in (("", steps), ("_longer", steps * LONGER)):
        rounds = ["--name", f"u{suffix}", "--training.rounds", str(number)]
        every[f"unlearn{suffix}"] = [*ofmu, "unlearn", *rounds, *run]
        for name in LOOPS:
            every[f"{name}{suffix}"] = [sys.executable, __file__, "--only", name, "--steps", str(number)]
    return every | {"evaluate": evaluate, "evaluate_again": evaluate}


def cost(command: list[str]) -> float:
    """CPU seconds of a command with the children that it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(PEOPLE / "target"), AutoTokenizer.from_pretrained(PEOPLE / "target")


def pairs(steps: int) -> list[dict[str, str]]:
    """The texts of a forget and a retain row, for every row of every step."""
    rows = {name: [*map(json.loads, (PEOPLE / f"{name}.jsonl").open())] for name in ("forget", "retain")}
    text = {
        name: [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in some] for name, some in rows.items()
    }
    return [{name: some[index % len(some)] for name, some in text.items()} for index in range(steps * BATCH)]


def collated(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    """A forget and a retain batch of tokens, padded to their longest rows."""
    batch = {name: tokenizer([row[name] for row in rows], padding=True, return_tensors="pt") for name in rows[0]}
    for one in batch.values():
        one["labels"] = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
    return batch


def grad_diff(model: Any, batch: dict[str, Any]) -> Any:
    return model(**batch["retain"]).loss - model(**batch["forget"]).loss


def plain_loop(steps: int) -> None:
    """Ascent on forget and descent on retain batches, and nothing around it."""
    import torch

    model, tokenizer = loaded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = pairs(steps)
    for step in range(steps):
        grad_diff(model, collated(tokenizer, rows[step * BATCH : (step + 1) * BATCH])).backward()
        optimizer.step()
        optimizer.zero_grad()


def trainer_loop(steps: int) -> None:
    """The same loss in transformers' Trainer, with its defaults but for what would add work: no reports, no file."""
    from transformers import Trainer, TrainingArguments

    class GradDiff(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return grad_diff(model, inputs)

    model, tokenizer = loaded()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = GradDiff(model, arguments, lambda rows: collated(tokenizer, rows), pairs(steps))
        trainer.train()


LOOPS = {"plain_loop": plain_loop, "trainer": trainer_loop}

if __name__ == "__main__":
    main()
