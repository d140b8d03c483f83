"""A worker killed at exact points in every phase of a run, which ends with the weights of an undisturbed run."""

import json
from pathlib import Path

import fault_table
import pytest

from benchmarks.faults import EVERY, ROUNDS, Fault, difference, make_job, run

pytestmark = pytest.mark.full

FAULTS = (
    Fault("worker killed while it loads the model", "start"),
    Fault("worker killed in the first pass", "first_gather", round=1),
    Fault("worker killed in the inner loop", "inner_loop", round=3),
    Fault("worker killed with displaced weights", "displaced", round=5),
    Fault("worker killed before the outer step", "outer_step", round=6),
    Fault("rank 0 killed in a checkpoint's write", "checkpoint_write", round=8, rank=0),
    Fault("worker raises an exception", "inner_loop", "raise", round=10),
    Fault("newest checkpoint damaged, worker killed", "inner_loop", "damage", round=11),
    Fault("rank 0 killed in the export", "export", round=ROUNDS, rank=0),
)


def test_a_worker_killed_in_every_phase(tmp_path, local_ray):
    undisturbed = make_job(tmp_path, "undisturbed")
    run(undisturbed, ())
    job = make_job(tmp_path, "disturbed")
    result = run(job, FAULTS)  # fails unless every fault happened
    off = difference(job, undisturbed)
    for cost in result["costs"]:
        fault_table.record(
            cost["fault"], phase=cost["phase"].replace("_", " "), lost=cost["rounds_lost"], seconds=cost["seconds"],
            difference=off,
        )  # fmt: skip
    assert off == 0
    for fault, cost in zip(FAULTS, result["costs"], strict=True):
        # a checkpoint counts a moment after it is written, when Ray Train has taken note of it
        assert cost["rounds_lost"] <= (2 if fault.does == "damage" else 1) * EVERY + 1
    (note,) = (note for note in result["notes"] if not note.startswith("round "))  # without the method's notes
    assert "was skipped" in note
    assert [row["round"] for row in training(job)["series"]] == list(range(1, ROUNDS + 1))
    assert training(job)["account"] == training(undisturbed)["account"]


def training(job) -> dict:
    return json.loads(Path(job.run_dir, "training.json").read_text())
