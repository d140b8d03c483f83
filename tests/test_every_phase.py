"""A worker killed at exact points in every phase of a run, which ends with the weights of an undisturbed run."""

import json
from dataclasses import replace
from pathlib import Path

import fault_table
import pytest

from benchmarks.faults import EVERY, ROUNDS, Fault, difference, make_job, run
from ofmu_ray.config import ExportConfig

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


def test_a_worker_killed_while_weights_are_cut_or_streamed(tmp_path, local_ray):
    """ZeRO-3: a worker dies with part of its share read, rank 0 with the first file of the export written."""
    faults = (
        Fault("worker killed between two weights of its share (ZeRO-3)", "share", round=0),
        Fault("rank 0 killed between two files of the export (ZeRO-3)", "shard", round=2, rank=0),
    )

    def cut(name):
        job = make_job(tmp_path, name, rounds=2, every=1, export=ExportConfig(max_shard_size="1MB"))
        return replace(job, training=replace(job.training, zero_stage=3))

    undisturbed, job = cut("undisturbed"), cut("disturbed")
    run(undisturbed, ())
    result = run(job, faults)
    off = difference(job, undisturbed)
    for cost in result["costs"]:
        lost, seconds = cost["rounds_lost"], cost["seconds"]
        fault_table.record(cost["fault"], phase=cost["phase"], lost=lost, seconds=seconds, difference=off)
    assert off == 0
    assert len(list(Path(job.run_dir, "model").glob("model-*.safetensors"))) > 1
    assert not list(Path(job.run_dir).glob(".model*"))


def training(job) -> dict:
    return json.loads(Path(job.run_dir, "training.json").read_text())
