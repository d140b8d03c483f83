"""MUSE's scalability and sustainability: growing forget sets, and requests one after another.

    python -m benchmarks.muse --root PATH --out build/muse [--folds 4] [-- --method npo --training.rounds 50]

PATH as in pipelines/configs/muse_news.yaml; what follows `--` are options of `ofmu unlearn`. Runs resume by name.

scalability: the target forgets the first k folds at once, in k times the rounds (the release fixes epochs).
sustainability: the model of k - 1 forgets fold k, up to the target's level. Both are judged by the metrics of MUSE,
above all by its utility; the target and the retrained model stand above. The retrained model has not seen fold 1 but
the others: metrics that compare with it mean something for k = 1 only, and are left out beyond.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import UnlearnConfig, apply_overrides
from ofmu_ray.runs.run import run
from ofmu_ray.storage import atomic_write

CONFIG = Path(__file__).resolve().parent.parent / "pipelines/configs/muse_news.yaml"
FOLDS = ("raw/forget.json", "sust/forget_2.json", "sust/forget_3.json", "sust/forget_4.json")
"""Disjoint sets of documents; the first k are the k-th set of scalability."""
METRICS = ("muse_retain_knowledge", "muse_forget_knowledge", "muse_verbatim", "muse_min_k_auc", "muse_privleak")
MODELS = {"target": "before", "retrained": "retrained"}


def chains(base: UnlearnConfig, folds: int) -> dict[str, list[dict[str, Any]]]:
    """Mode -> a line for each k: k, documents' files, name, status, rounds, and the metrics after the run.

    Also one line each with the metrics of the target and the retrained model, k 0.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for mode in ("scalability", "sustainability"):
        model = base.model.path
        for k in range(1, folds + 1):
            growing = mode == "scalability"
            files = list(FOLDS[:k] if growing else FOLDS[k - 1 : k])
            changes: dict[str, Any] = {"data.forget.path": files, "name": f"{base.name}_{mode}_{k}"}
            if k == 1:
                changes["name"] = f"{base.name}_1"  # the same run in both
            else:
                changes["evaluation.retrained"] = None
            if growing:
                changes["training.rounds"] = k * base.training.rounds
            elif k > 1:
                changes |= {"model.path": model, base.method: base.method_options.for_sequence(base.model.path)}
            outcome = run(apply_overrides(base, changes))
            model = outcome.model
            if k == 1:
                for name, when in MODELS.items():
                    lines[name] = [{"k": 0} | {metric: outcome.metrics[when][metric] for metric in METRICS}]
            line = {"k": k, "files": files, "name": outcome.name, "status": outcome.status, "rounds": outcome.rounds}
            lines.setdefault(mode, []).append(line | {name: outcome.metrics["after"][name] for name in METRICS})
    return lines


def table(lines: dict[str, list[dict[str, Any]]]) -> str:
    """As text: a line for each mode and k."""
    rows = [["mode", "k", *METRICS]]
    for mode, runs in lines.items():
        for line in runs:
            values = [line[name]["value"] for name in METRICS]
            rows.append([mode, str(line["k"]), *("-" if value is None else f"{value:.2f}" for value in values)])
    return "\n".join("  ".join(cell.rjust(len(head)) for cell, head in zip(row, rows[0], strict=True)) for row in rows)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    given = list(sys.argv[1:] if words is None else words)
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, choices=range(1, len(FOLDS) + 1), default=len(FOLDS))
    chosen = parser.parse_args(own)
    arguments = ["--config", str(CONFIG), "--data.root", chosen.root, "--storage", str(chosen.out), *options]
    base = parse(UnlearnConfig, arguments, "ofmu unlearn")
    lines = chains(base, chosen.folds)
    atomic_write(chosen.out / "muse.json", json.dumps(lines, indent=1) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
