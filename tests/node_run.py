"""A small OFMU run, two workers on the cluster of RAY_ADDRESS: python node_run.py FOLDER NAME PLACEMENT INTERFACE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fault_job import make_job

from ofmu_ray.cluster.connect import connect
from ofmu_ray.config import TrainingConfig
from ofmu_ray.training.launch import fit

EVERY = 8
"""Rounds between checkpoints; the run has three times as many."""


def main(folder: str, name: str, placement: Any, interface: str) -> None:
    training = TrainingConfig(
        workers=2,
        placement=placement,
        network_interface=interface or None,
        rounds=3 * EVERY,
        batch_size=4,
        checkpoint_every=EVERY,
        max_failures=3,
    )
    connect(training.workers)
    fit(make_job(Path(folder), training=training, name=name), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
