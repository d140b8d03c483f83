"""training.compile: the same weights as without, the same names, and eager passes where something does not compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import tiny_model, token_batch
from fault_job import make_job

from ofmu_ray.config import TrainingConfig, UnlearnConfig, apply_overrides, config_hash, outcome_hash
from ofmu_ray.engines import TorchEngine, compiled
from ofmu_ray.engines.compiled import CompiledLayers, compiled_passes
from ofmu_ray.engines.layers import decoder_layers, layer_output
from ofmu_ray.training.start import run_local
from ofmu_ray.training.worker import Worker

ROUNDS = 3
TRAINING = TrainingConfig(engine="torch", rounds=ROUNDS, batch_size=4, checkpoint_every=2)


def ran(folder: Path, name: str, **options: Any) -> Worker:
    return run_local(make_job(folder, training=replace(TRAINING, **options), name=name))


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return ran(tmp_path_factory.mktemp("eager"), "eager")


def compare(worker: Worker, eager: Worker) -> None:
    """OFMU's rounds have finite differences, similarities and a penalty."""
    weights, expected = worker.engine.full_weights(), eager.engine.full_weights()
    assert weights is not None
    assert expected is not None
    assert list(weights) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    assert list(worker.module.state_dict()) == list(eager.module.state_dict())
    assert worker.engine.layout == eager.engine.layout
    for key, value in eager.state.series[-1].items():
        if key.endswith("loss"):
            assert worker.state.series[-1][key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.full
def test_the_same_weights_with_compiled_passes(eager: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", backend)
    worker = ran(tmp_path, "compiled", compile=True)
    assert 0 < len(graphs) < 5  # one for all layers and lengths, not one for each
    assert worker.state.notes == []
    compare(worker, eager)


@pytest.mark.full
def test_without_a_compiler_the_run_is_eager_and_says_so(eager: Worker, tmp_path: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",), "compile_threads": 1}):
        worker = ran(tmp_path, "without", compile=True)
    (note,) = worker.state.notes
    assert "no-such-compiler" in note or "C++" in note
    compare(worker, eager)


@pytest.mark.full
def test_gradients_by_inductor() -> None:
    """torch's own backend."""
    from torch._inductor import config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as reason:
        pytest.skip(f"no C++ compiler: {reason}")
    eager, module = tiny_model("llama"), tiny_model("llama")
    made = compiled_passes(module, replace(TRAINING, compile=True))
    assert made is not None
    engines = TorchEngine(eager), TorchEngine(module, compiled=made)
    with config.patch(compile_threads=1):  # no processes
        for lengths in ([9, 12], [7, 5, 20]):
            (expected, loss), (found, other) = (engine.gradient(token_batch(lengths, seed=0)) for engine in engines)
            assert other == pytest.approx(loss, rel=1e-5)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert made.new_notes() == []


@pytest.mark.slow
def test_what_does_not_compile_runs_as_it_is(eager: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("no compiler found\nin a long message")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    worker = ran(tmp_path, "fallback", compile=True)
    (note,) = worker.state.notes
    assert "training.compile: " in note
    assert "no compiler found" in note
    assert note.endswith("; passes are eager")
    for name, value in (eager.engine.full_weights() or {}).items():
        assert torch.equal((worker.engine.full_weights() or {})[name], value), name


@pytest.mark.slow
def test_a_backward_pass_that_does_not_compile(eager: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no backward")

    def forward(graph: Any, _: Any) -> Any:
        return graph

    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=forward, bw_compiler=refuse))
    worker = ran(tmp_path, "backward", compile=True)
    (note,) = worker.state.notes
    assert "no backward" in note
    for name, value in (eager.engine.full_weights() or {}).items():
        assert torch.equal((worker.engine.full_weights() or {})[name], value), name


def test_passes_without_gradients_and_single_layers_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def compile_(forward: Any, **_: Any) -> Any:
        return lambda *args, **options: (ran.append("compiled"), forward(*args, **options))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    module: Any = tiny_model("llama")
    batch = token_batch([9, 12], seed=0)
    expected = layer_output(module, batch, 0)
    made = compiled_passes(module, replace(TRAINING, compile=True))
    engine = TorchEngine(module, compiled=made)
    engine.gradient(batch)
    assert len(ran) == len(decoder_layers(module))
    engine.evaluate(batch, lambda model, micro: model(**micro))
    with engine.reading() as model:
        model(**batch)
    assert len(ran) == len(decoder_layers(module))
    with made or CompiledLayers():
        torch.testing.assert_close(layer_output(module, batch, 0), expected)  # of its forward hook
    assert len(ran) == len(decoder_layers(module)) + 1


def test_zero_3_runs_as_it_is() -> None:
    module: Any = tiny_model("llama")
    forward = module.forward
    options = TrainingConfig(engine="deepspeed", workers=2, batch_size=4, zero_stage=3, compile=True)
    made = compiled_passes(module, options)
    assert made is not None
    assert made.new_notes() == [
        "training.compile: ZeRO-3 gathers weights between the operations of a layer; passes are eager"
    ]
    assert made.new_notes() == []
    assert module.forward == forward
    assert compiled_passes(module, replace(options, compile=False)) is None


def test_hashes_of_runs_without_it_are_as_before() -> None:
    before = {"ofmu.inner.lr": 1e-5, "ofmu.outer.lr": 1e-5, "ofmu.forget_loss": "bounded_token"}  # the defaults then
    plain = apply_overrides(UnlearnConfig(), before)
    asked = replace(plain, training=replace(plain.training, compile=True))
    assert outcome_hash(asked) == outcome_hash(plain)  # a run that resumes may turn it on or off
    assert config_hash(asked) != config_hash(plain)  # a benchmark measures seconds
    assert config_hash(plain) == "fa3191bfb9db86fa"
