"""Reference values by a run's workers, with the model that they share, are those of a process that loads it whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from engine_ranks import run_ranks
from live_reference_ranks import Case, start
from safetensors.torch import load_file
from test_reference import TARGET, encoder_of, prepared, stream, template  # noqa: F401 (fixtures)
from tiers import asked, tiered

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import LoraConfig, ModelConfig, TrainingConfig
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.errors import UserError
from ofmu_ray.features import reference
from ofmu_ray.features.protocol import FeatureContext
from ofmu_ray.features.reference import write_references
from ofmu_ray.methods.altpo import AltPOConfig
from ofmu_ray.methods.dpo import DPOConfig
from ofmu_ray.methods.lunar import LUNARConfig
from ofmu_ray.methods.npo import NPOConfig
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.methods.rmu import RMUConfig
from ofmu_ray.methods.salun import SalUnConfig
from ofmu_ray.runs.job import Spec, make_job, with_references
from ofmu_ray.training.worker_job import WorkerJob

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 2
TRAINING = TrainingConfig(engine="deepspeed", workers=2, zero_stage=3, rounds=ROUNDS, batch_size=4)
LORA = ModelConfig(lora=LoraConfig(rank=2), precision="bf16_autocast")
MADE = {
    "npo": (NPOConfig(retain_loss="kl"), TARGET),
    "dpo": (DPOConfig(), TARGET),
    "rmu": (RMUConfig(), TARGET),
    "lora": (NPOConfig(retain_loss="kl"), LORA),
    "altpo": (AltPOConfig(alternatives=2, max_new_tokens=6), TARGET),
    "lunar": (LUNARConfig(layer=1), TARGET),
    "ofmu": (OFMUConfig.default(), TARGET),
}
NAMES = tiered(MADE, quick=lambda name: name in ("npo", "altpo", "ofmu"))


def spec_of(name: str, method: Any, model: ModelConfig = TARGET, **options: Any) -> Spec:
    return Spec(
        task="causal_lm", method_name=name, method=method, model=model, **{"training": TRAINING, **options}
    )  # fmt: skip


def job_of(spec: Spec, prepared: PreparedData, folder: Path) -> tuple[WorkerJob, Any]:  # noqa: F811
    job, plan = make_job(spec, prepared, str(folder), str(folder / "cache"), "hash", here=True)
    return with_references(job, spec, prepared, plan, str(folder / "cache")), plan


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.Reference, "load", lambda *_: pytest.fail("the whole model was loaded"))


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prepared: PreparedData,  # noqa: F811
) -> tuple[dict[str, WorkerJob], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    wanted = asked(request, test_workers_compute_what_one_process_would.__name__, "name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.Reference, "load", lambda *_: pytest.fail("the whole model was loaded"))
        jobs = {name: job_of(spec_of(name, *MADE[name]), prepared, folder / name)[0] for name in {"npo", *wanted}}
    cases = [Case(job, killed=name == "npo") for name, job in jobs.items()]
    assert not [missing for job in jobs.values() for missing in job.references if missing.written]
    return jobs, run_ranks(2, cases, tmp_path_factory.mktemp("ranks"), start)


@pytest.mark.system
@pytest.mark.parametrize("name", NAMES)
def test_workers_compute_what_one_process_would(
    name: str,
    runs: Any,
    prepared: PreparedData,  # noqa: F811
    tmp_path: Path,
) -> None:
    job, measured = runs[0][name], runs[1][name]
    method, model = MADE[name]
    spec = spec_of(name, method, model, training=TrainingConfig(rounds=ROUNDS, batch_size=4))
    own, plan = make_job(spec, prepared, str(tmp_path), str(tmp_path / "cache"), "hash", here=True)
    places = {"folder": str(tmp_path / "sidecars"), "cache": str(tmp_path / "cache")}
    settings = FeatureContext(name, None, 0)
    sidecars = write_references(own.build_method().needs, prepared, plan, model, settings=settings, **places)
    compared = 0
    for where, folder in sidecars.items():
        theirs, ours = (json.loads(Path(at, "sidecar.json").read_text()) for at in (folder, job.sidecars[where]))
        assert ours["keys"] == theirs["keys"]
        for quantity, path in theirs["tables"].items():
            assert Path(path).name == Path(ours["tables"][quantity]).name  # the same key in the cache
            expected, found = (np.load(Path(at, "values.npy")) for at in (path, ours["tables"][quantity]))
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
            compared += 1
            ids = [Path(at, "index.parquet").read_bytes() for at in (path, ours["tables"][quantity])]
            assert ids[0] == ids[1]
        for prefix in theirs["texts"]:
            expected, found = (pq.read_table(at["texts"][prefix]["path"]) for at in (theirs, ours))
            assert found.equals(expected)
            assert len(set(map(tuple, found["input_ids"].to_pylist()))) > len(found) / 2
            compared += name == "altpo"  # refusals need no model: they are there before the workers start
        for quantity, path in theirs["parameters"].items():
            torch.testing.assert_close(load_file(ours["parameters"][quantity]), load_file(path))
            compared += 1
    if name == "ofmu":
        assert isinstance(own.method, OFMUConfig)
        assert measured["level"] == pytest.approx(own.method.level, rel=1e-6)
        assert measured["notes"] == [f"forget up to {own.method.level:.3g} nats per token (matched_row)"]
        compared += 1
    assert compared == len(job.references) > 0
    assert measured["loaded"] == []
    assert measured["whole"] == []  # every parameter is cut
    assert measured["training"]
    assert len(measured["series"]) == ROUNDS
    steps = getattr(method, "inner_steps", 1)
    assert measured["passes"]["forget"] == ROUNDS * steps  # these passes are not part of the run's cost
    if method == MADE["npo"][0]:
        first, last = measured["series"]
        rel = 1e-5 if model is TARGET else 1e-2
        assert first["forget_loss"] == pytest.approx(2 / method.beta * math.log(2), rel=rel)  # model = reference
        assert first["retain_loss"] == pytest.approx(0.0, abs=1e-5)
        assert last["forget_loss"] != first["forget_loss"]


@pytest.mark.system
def test_a_start_after_a_kill_computes_what_is_missing(runs: Any) -> None:
    assert runs[1]["npo"]["kept"] == 1
    assert not runs[1]["npo"]["computed_again"]


@pytest.mark.system
def test_a_resumed_run_finds_them(
    runs: Any,
    prepared: PreparedData,  # noqa: F811
    nothing_loaded: None,
) -> None:
    job = runs[0]["npo"]
    again, _ = job_of(spec_of("npo", *MADE["npo"]), prepared, Path(job.run_dir))
    assert again.references == ()
    assert again.sidecars == job.sidecars
    one = spec_of("npo", *MADE["npo"], training=TrainingConfig(rounds=ROUNDS, batch_size=4))
    alone, _ = job_of(one, prepared, Path(job.run_dir))  # fewer workers go on with the same tables
    assert alone.sidecars == job.sidecars


def test_who_loads_the_whole_model(
    prepared: PreparedData,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_loaded: None,
) -> None:
    """What needs one process is refused where the workers share a model that it cannot hold."""
    monkeypatch.setattr(reference, "_room", lambda: 1_000_000)
    spec = spec_of("salun", SalUnConfig())
    words = r"method salun needs drawn_labels of forget from one process .* do not fit 0\.001 GB; use a method whose"
    with pytest.raises(UserError, match=words):
        job_of(spec, prepared, tmp_path / "refused")


@pytest.mark.full
@pytest.mark.system
def test_two_ray_workers_at_zero_3_equal_one_worker(tmp_path: Path) -> None:
    """Through the command: NPO's reference values come from the workers, or from one process."""
    words = [sys.executable, "-m", "pipelines.cli", "unlearn", "--method", "npo", "--storage", str(tmp_path)]
    words += ["--training.rounds", "4", "--training.batch_size", "8", "--evaluation.enabled", "false"]
    two = ["--training.engine", "deepspeed", "--training.workers", "2", "--training.zero_stage", "3"]
    for name, options in {"two": two, "one": ["--training.engine", "torch", "--training.workers", "1"]}.items():
        subprocess.run([*words, "--name", name, *options], check=True, cwd=ROOT)
    weights = {name: load_file(tmp_path / name / "model/model.safetensors") for name in ("two", "one")}
    for name, value in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], value, rtol=1e-4, atol=1e-5)
    before = load_file(Path(resolve_builtin("builtin:people/target")) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights["one"][name] - before[name]).abs().max() > 1e-4
