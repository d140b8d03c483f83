"""A long run with a random worker killed again and again; its weights must equal those of an undisturbed run.

    python -m benchmarks.soak                       # 200 rounds, a kill in every 20: minutes on two quiet cores

Not part of CI. Prints the kills, the cost of each, and the largest difference of a final weight (must be 0).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.faults import Fault, Phase, difference, make_job, run


def kills(rounds: int, every: int, seed: int) -> list[Fault]:
    """One kill in every `every` rounds, at a random round and point of a random worker."""
    draw = random.Random(seed)
    points: tuple[Phase, ...] = ("inner_loop", "displaced", "outer_step")
    return [
        Fault("kill", draw.choice(points), round=draw.randint(first, first + every - 1), rank=draw.randrange(2))
        for first in range(1, rounds - every + 2, every)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="rounds between kills")
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from ofmu_ray.cluster.connect import connect

    torch.set_num_threads(1)
    connect(2)
    faults = kills(options.rounds, options.every, options.seed)
    with tempfile.TemporaryDirectory() as name:
        layout = (options.rounds, options.checkpoint_every)
        jobs = [make_job(Path(name), kind, *layout) for kind in ("whole", "killed")]
        undisturbed, killed = (run(job, chosen) for job, chosen in zip(jobs, ((), faults), strict=True))
        off = difference(*jobs)
    for fault, cost in zip(faults, killed["costs"], strict=True):
        print(json.dumps({"round": fault.round, "rank": fault.rank} | cost))
    print(
        f"{options.rounds} rounds, {len(faults)} kills: {undisturbed['seconds']:.0f} s undisturbed, "
        f"{killed['seconds']:.0f} s with them, largest difference of a weight {off:g}"
    )
    return 0 if off == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
