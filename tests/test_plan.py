"""`ofmu plan`: its memory against measured processes, its counts against real models, its proposals and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, TEXT_METHODS
from engine_models import tiny_model, token_batch
from mistakes import refused

from ofmu_ray.config import METHODS, ExportConfig, LoraConfig, ModelConfig, TrainingConfig
from ofmu_ray.engines import Batch, TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method
from ofmu_ray.methods.ofmu import OFMUConfig
from ofmu_ray.models.answers import causal_lm_loss
from ofmu_ray.models.loading import empty_model
from ofmu_ray.planning.cost import GPUS, LINKS
from ofmu_ray.planning.propose import Target, propose
from ofmu_ray.planning.replay import replay
from ofmu_ray.planning.setup import Planner, Requirements, Rows
from ofmu_ray.planning.shapes import micro_batch, parameter_counts
from ofmu_ray.planning.trace import trace_pass
from pipelines import cli

# a Llama-2-7B of four layers instead of 32: 1.07 G parameters, and traced in a tenth of the time
SHALLOW = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32
)


@pytest.mark.full
def test_memory_within_a_tenth_of_the_measured_peak(tmp_path: Path) -> None:
    """All stages at one size and all sizes at one stage (the benchmark covers all combinations), with two gloo workers:
    peaks of a round and of a checkpoint above the base."""
    cases = []
    for number, chosen in enumerate((["--sizes", "3m"], ["--sizes", "10m", "30m", "--stages", "3"])):
        out = tmp_path / f"plan{number}.json"
        command = [sys.executable, str(ROOT / "benchmarks/plan.py"), "--out", str(out), *chosen]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        cases += json.loads(out.read_text())
    assert [(case["size"], case["zero_stage"]) for case in cases] == [
        *(("3m", stage) for stage in range(4)), ("10m", 3), ("30m", 3),
    ]  # fmt: skip
    for case in cases:
        assert case["predicted"]["parameters"] == case["measured"]["parameters"]
        for phase in ("round_bytes", "checkpoint_bytes"):
            assert case["predicted"][phase] == pytest.approx(case["measured"][phase], rel=0.1), (case, phase)


@pytest.mark.full
def test_traffic_is_what_the_collectives_carry(tmp_path: Path) -> None:
    """All bytes that two workers reduce and gather in a round, at stages 0, 2 and 3."""
    out = tmp_path / "scaling.json"
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [case for case in json.loads(out.read_text())["measured"] if case["workers"] == 2]
    assert {case["zero_stage"] for case in cases} == {0, 2, 3}
    for case in cases:
        assert case["planned_bytes"] == case["bytes"]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("variant", ["plain", "tied", "lora", "frozen"])
def test_parameters_counted_as_the_real_model_has_them(kind: str, variant: str) -> None:
    real = tiny_model(kind, tie=variant == "tied")
    config = ModelConfig(
        lora=LoraConfig(rank=2) if variant == "lora" else None, freeze=["embed"] if variant == "frozen" else []
    )
    empty = empty_model(real.config, config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    if variant == "lora":
        from ofmu_ray.models.loading import add_lora

        real = add_lora(real, LoraConfig(rank=2))
    if variant == "frozen":
        from ofmu_ray.models.loading import freeze_matching

        freeze_matching(real, ["embed"])
    total, trainable = parameter_counts(real)
    assert parameter_counts(empty) == (total, trainable)
    engine = TorchEngine(real)
    assert engine.numel == trainable


@pytest.mark.parametrize("preset", ["full", "lite"])
@pytest.mark.parametrize("steps", [(1, 1), (5, 3)])
def test_replayed_passes_and_updates_are_those_of_a_real_round(preset: Any, steps: tuple[int, int]) -> None:
    config = OFMUConfig.from_preset(preset, inner_steps=steps[0], outer_steps=steps[1], relative_step=1e-3)
    engine = TorchEngine(tiny_model(), inner=config.inner, outer=config.outer)
    batches = [[Batch([token_batch([9, 12], seed)])] for seed in (0, 1)]
    build_method(config, 4).round(engine, *batches)
    module = empty_model(tiny_model().config, ModelConfig())
    replayed = replay(build_method(config, 4), module, config.optimizers, "fp32", lambda _: token_batch([4], 0))
    counted = {kind: sum(one.kind == kind for one in replayed.passes) for kind in ("forget", "retain")}
    assert counted == engine.account.gradient_passes
    assert sum(replayed.steps.values()) == engine.account.updates


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_METHODS)
def test_every_method_is_planned_with_its_own_losses(name: Any) -> None:
    planner = _planner(tiny_model().config, method=METHODS[name]())
    estimate = planner.estimate(planner.given())
    assert sum(estimate.passes.values()) >= 1
    assert estimate.peak.bytes > estimate.sizes.total * 4
    assert all(trace.flops > 0 for trace in estimate.traces.values())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2"])
def test_traced_flops_and_activations_are_those_of_a_real_pass(kind: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    real = tiny_model(kind)
    config = ModelConfig(attention="eager")
    empty = empty_model(real.config, config)
    micro = micro_batch(real.config, 2, 24, 8)
    trace = trace_pass(empty, causal_lm_loss, micro, "fp32")
    with FlopCounterMode(display=False) as counter:
        value, _ = causal_lm_loss(real, {**micro, "attention_mask": torch.ones(2, 24, dtype=torch.long)})
        value.backward()  # type: ignore[no-untyped-call]
    assert trace.flops == counter.get_total_flops()
    halved = trace_pass(empty, causal_lm_loss, micro_batch(real.config, 1, 24, 8), "fp32")
    assert 1.6 < trace.forward_bytes / halved.forward_bytes < 2.4


def test_traced_flops_of_experts_are_those_of_a_real_pass() -> None:
    """A real pass multiplies expert by expert; the traced one, all at once."""
    from torch.utils.flop_counter import FlopCounterMode

    real: Any = tiny_model("mixtral")
    empty = empty_model(transformers.MixtralConfig(**real.config.to_dict()), ModelConfig(attention="eager"))
    real.set_experts_implementation("eager")
    micro = micro_batch(real.config, 2, 24, 8)
    with FlopCounterMode(display=False) as counter:
        value, _ = causal_lm_loss(real, {**micro, "attention_mask": torch.ones(2, 24, dtype=torch.long)})
        value.backward()  # type: ignore[no-untyped-call]
    assert trace_pass(empty, causal_lm_loss, micro, "fp32").flops == counter.get_total_flops()


@pytest.mark.slow
def test_checkpointing_adapters_and_bf16_save_what_they_should() -> None:
    planner = _planner(SHALLOW, batch_size=4, precision="bf16", row_tokens=512)
    given = planner.given()
    plain = planner.estimate(given)
    recomputed = planner.estimate(replace(given, gradient_checkpointing=True))
    adapted = planner.estimate(replace(given, lora=LoraConfig()))
    assert plain.sizes.total == 2 * 32000 * 4096 + 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert max(t.forward_bytes for t in recomputed.traces.values()) < 0.5 * max(
        t.forward_bytes for t in plain.traces.values()
    )
    assert adapted.sizes.trainable < 0.01 * plain.sizes.trainable
    assert adapted.peak.bytes < 0.4 * plain.peak.bytes
    # the paper's setting on one GPU: weights 2, masters 4, moments of both loops 16 bytes a parameter at least
    assert plain.peak.bytes > 22 * plain.sizes.total


@pytest.mark.slow
def test_proposal_fits_is_faster_with_more_memory_and_trains_all_weights_when_it_can() -> None:
    planner = _planner(SHALLOW, batch_size=16, precision="bf16", row_tokens=512)
    device, link = GPUS["A100-80GB"].device("bf16", 0.4), LINKS["nvlink"]
    proposals: list[Requirements] = []
    for memory in (6e9, 16e9, 40e9, 80e9):
        proposal = propose(planner, Target(int(memory), 8, device, link))
        assert proposal.peak.bytes <= memory
        proposals.append(proposal)
    assert [estimate.setup.lora is None for estimate in proposals] == sorted(
        estimate.setup.lora is None for estimate in proposals
    )
    assert proposals[0].setup.lora is not None
    seconds = [e.time(device, link).total for e in proposals if e.setup.lora is None]
    assert len(seconds) >= 2
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_component_and_remedy() -> None:
    planner = _planner(SHALLOW, batch_size=2, precision="fp32", row_tokens=256)
    with pytest.raises(UserError, match=r"largest component is .*weights.*Nearest that would fit: \d+ GPU") as caught:
        propose(planner, Target(2 * 10**9, 1, GPUS["L4-24GB"].device("fp32", 0.4), LINKS["nvlink"]))
    assert "plan.gpu_memory" in str(caught.value)


@pytest.mark.system
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    words = ["plan", "--training.rounds", "10", "--plan.gpu", "A100-80GB", "--plan.gpus", "2"]
    assert cli.main([*words, "--plan.price_per_gpu_hour", "2", "--plan.json", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["model"]["parameters"] == 541_536
    assert content["round"]["gradient_passes"] == {"forget": 3, "retain": 8}
    assert content["run"]["gradient_passes"] == {"forget": 30, "retain": 80}
    assert content["round"]["precisions"] == {"fp32": 11}
    assert content["loading"]["read_bytes_per_rank"] == content["export"]["written_bytes"] == 4 * 541_536
    assert cli.main([*words, "--ofmu.preset", "lite", "--plan.json", str(out)]) == 0
    lite = json.loads(out.read_text())
    assert lite["round"]["gradient_passes"] == {"forget": 9, "retain": 4}  # auto, at most
    assert content["memory"]["peak_bytes"] == sum(content["memory"]["components"].values())
    assert content["run"]["cost"] == pytest.approx(content["run"]["seconds"] / 3600 * 2 * 2)
    shown = capsys.readouterr().out
    assert "activations" in shown
    assert "--training.zero_stage" in shown
    refused([*words, "--plan.gpu_memory", "1MB"], "largest component", capsys=capsys, notes=True)


@pytest.mark.parametrize("preset", ["lite", "full"])
def test_passes_of_bf16_autocast_are_priced_as_they_run(preset: Any) -> None:
    """Those of a real round between checks, with central differences; fp32 passes at the fp32 rate."""
    method = OFMUConfig.from_preset(preset, difference="central")
    planner = _planner(tiny_model().config, method=method, precision="bf16_autocast")
    estimate = planner.estimate(planner.given())
    ran = Counter(trace.precision for trace in estimate.traces.values())
    assert ran == {"lite": {"bf16_autocast": 4, "fp32": 9}, "full": {"fp32": 48}}[preset]
    gpu, link = GPUS["H100-80GB"], LINKS["nvlink"]
    slow = replace(gpu, fp32=gpu.fp32 / 1e9)  # then nothing but fp32 passes takes time
    fp32 = sum(trace.flops for trace in estimate.traces.values() if trace.precision == "fp32")
    seconds = estimate.time(slow.device("bf16_autocast", 1.0), link).passes
    assert seconds == pytest.approx(fp32 * estimate.layout.micro_batches / slow.fp32, rel=1e-3)


def test_bytes_of_loading_and_export_are_those_of_the_files(tmp_path: Path) -> None:
    """A bf16 model, read by a real engine and exported; shares of ZeRO-3; an adapter alone."""
    from contextlib import nullcontext

    from safetensors.torch import load_file

    from ofmu_ray import storage
    from ofmu_ray.models.exporting import export_causal_lm
    from ofmu_ray.models.loading import load_tokenizer
    from ofmu_ray.models.unread import load_unread
    from ofmu_ray.models.weights import Weights

    tiny_model("llama", tie=True).bfloat16().save_pretrained(tmp_path / "in")
    config = ModelConfig(path=str(tmp_path / "in"), tokenizer="builtin:people/target")
    result = load_unread(config)
    assert not isinstance(result, str)
    module, unread = result
    TorchEngine(module, unread=unread)
    planner = _planner(tiny_model("llama", tie=True).config, stored=torch.bfloat16)
    files = planner.estimate(planner.given()).files
    assert files.read == files.model == unread.bytes_read
    with storage.new_folder(tmp_path / "out") as folder:
        weights = Weights(module, lambda _: nullcontext(), keep=True)
        export_causal_lm(module, load_tokenizer(config), weights, folder, config, ExportConfig())
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert files.written == sum(value.nbytes for value in load_file(file).values())
    cut = planner.estimate(replace(planner.given(), zero_stage=3, workers=2)).files
    assert files.read / 2 <= cut.read < files.read / 2 + 2 * len(list(module.parameters()))
    adapter = ExportConfig(weights="adapter")
    planner = _planner(tiny_model().config, precision="bf16", stored=torch.bfloat16, export=adapter)
    alone = planner.estimate(replace(planner.given(), lora=LoraConfig(rank=2)))
    assert alone.files.written == alone.files.held == 4 * alone.sizes.trainable
    assert alone.files.model == 2 * (alone.sizes.total - alone.sizes.trainable)


@pytest.mark.slow
def test_a_model_of_fused_experts_is_planned_as_it_loads_and_exports(tmp_path: Path) -> None:
    """Mixtral's tensors have another form in the files: loading and export take the whole model."""
    from ofmu_ray.models.unread import load_unread

    experts: Any = tiny_model("mixtral")
    experts.save_pretrained(tmp_path)
    planner = _planner(experts.config)
    cut = planner.estimate(replace(planner.given(), zero_stage=3, workers=2))
    assert f"({cut.files.whole})" in str(load_unread(ModelConfig(path=str(tmp_path))))
    size = 4 * cut.sizes.total
    assert cut.files.read == cut.files.model == cut.files.written == size
    assert cut.files.held == 2 * size
    assert cut.phases["loading"].components["whole model"] == size
    adapted = planner.estimate(replace(planner.given(), lora=LoraConfig(rank=1)))
    assert 0 < adapted.sizes.trainable < cut.sizes.trainable
    llama = _planner(tiny_model().config)
    usual = llama.estimate(replace(llama.given(), zero_stage=3, workers=2))
    assert usual.files.whole is None
    assert usual.files.held == usual.files.written
    assert "whole model" not in usual.phases["loading"].components


def _planner(
    shape: Any, *, method: Any = None, batch_size: int = 2, precision: Any = "fp32", row_tokens: int = 24,
    **files: Any,
) -> Planner:  # fmt: skip
    rows = Rows(row_tokens, float(row_tokens), row_tokens // 3)
    return Planner(
        shape,
        ModelConfig(precision=precision),
        method or OFMUConfig(),
        TrainingConfig(batch_size=batch_size),
        {"forget": rows, "retain": rows},
        "cuda",
        **files,
    )
