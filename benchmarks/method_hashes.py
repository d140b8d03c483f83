"""SHA-256 of the weights after six rounds of every method on the built-in data, to show that a code change changed no
number:

    python benchmarks/method_hashes.py --out before.json     # then change the code
    python benchmarks/method_hashes.py --compare before.json

Hashes depend on the machine and the version of torch; compare on the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from ofmu_ray.cluster.connect import connect
from ofmu_ray.config import METHODS, UnlearnConfig, apply_overrides
from ofmu_ray.tasks import task_named
from ofmu_ray.training.start import run_local

OPTIONS = {"training.engine": "torch", "training.rounds": 6, "training.batch_size": 4, "evaluation.enabled": False}


def hashes() -> dict[str, str]:
    """Method -> first 16 digits of the digest of its final weights."""
    from ofmu_ray.runs.trial import Trial, job_of
    from ofmu_ray.runs.trial_data import prepare

    base, digests = apply_overrides(UnlearnConfig(), OPTIONS), {}
    connect(1)
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        evaluation = task_named(base.task).evaluation(base, folder)
        data, _ = prepare("people", base, storage, storage / "benchmark", evaluation)
        for method in sorted(set(METHODS) - {"finetune"}):
            trial = Trial(
                method=method, split="people", phase="tune", trial=0, config=apply_overrides(base, {"method": method}),
                options={}, budget_unit="flops", budget=0.0,
            )  # fmt: skip
            weights = run_local(job_of(trial, data, storage / "work" / method)).engine.full_weights()
            assert weights is not None
            content = b"".join(weight.numpy().tobytes() for _, weight in sorted(weights.items()))
            digests[method] = hashlib.sha256(content).hexdigest()[:16]
            print(f"{method:16} {digests[method]}", flush=True)
    return digests


def main() -> int:
    """Write or compare hashes; return 1 if a method has different weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--compare")
    options = parser.parse_args()
    digests = hashes()
    if options.out:
        Path(options.out).write_text(json.dumps(digests, indent=1) + "\n")
    if not options.compare:
        return 0
    before = json.loads(Path(options.compare).read_text())
    moved = [name for name in before if digests.get(name) != before[name]]
    print(f"{len(before) - len(moved)} of {len(before)} methods have the same weights", *moved, sep="\n")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
