"""CPU seconds of whole commands on the built-in example, beside the plain loop that takes the same steps.

    OMP_NUM_THREADS=1 python benchmarks/command_cost.py [--steps 30] [--out benchmarks/command_cost.json]

User and system seconds of a process with its children, imports included. GradDiff takes one pass over a forget and one
over a retain batch per step, which a plain loop can repeat. No evaluation is part of `unlearn`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", action="store_true", help="only the plain loop, in this process")
    options = parser.parse_args()
    if options.plain:
        plain_loop(options.steps)
        return
    with tempfile.TemporaryDirectory() as storage:
        ofmu = [sys.executable, "-m", "pipelines.cli"]
        where = ["--storage", storage, "--tracking.system_metrics", "false"]
        run = ["--method", "grad_diff", "--training.engine", "torch", "--training.workers", "1"]
        run += ["--training.rounds", str(options.steps), "--training.batch_size", str(BATCH)]
        run += ["--evaluation.enabled", "false", "--stop.forgotten", "null"]
        evaluate = [*ofmu, "evaluate", "--models", "{target: builtin:people/target}", "--name", "e", *where[:2]]
        seconds = {
            "unlearn": cost([*ofmu, "unlearn", "--name", "u", *run, *where]),
            "plain_loop": cost([sys.executable, __file__, "--plain", "--steps", str(options.steps)]),
            "evaluate": cost(evaluate),
            "evaluate_again": cost(evaluate),
        }
    text = json.dumps({"steps": options.steps, "batch_size": BATCH, "cpu_seconds": seconds}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def cost(command: list[str]) -> float:
    """CPU seconds of a command with the children that it waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def plain_loop(steps: int) -> None:
    """Ascent on forget and descent on retain batches, and nothing around it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    people = ROOT / "ofmu_ray/assets/people"
    tokenizer = AutoTokenizer.from_pretrained(people / "target")
    model = AutoModelForCausalLM.from_pretrained(people / "target")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = {name: [*map(json.loads, (people / f"{name}.jsonl").open())] for name in ("forget", "retain")}

    def loss(name: str, step: int) -> torch.Tensor:
        chosen = [rows[name][(step * BATCH + index) % len(rows[name])] for index in range(BATCH)]
        texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in chosen]
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss

    for step in range(steps):
        (loss("retain", step) - loss("forget", step)).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
