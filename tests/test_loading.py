"""Loading without a second copy: each engine reads the weights to where it keeps them, a ZeRO-3 rank only its share."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import tiny_model
from engine_ranks import run_ranks
from fault_job import make_job
from loading_ranks import Loading, fit_and_die, measure, whole
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from ofmu_ray.config import ModelConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.models import stored
from ofmu_ray.models.checks import check_model
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.models.stored import share, stored_tensors
from ofmu_ray.models.unread import load_unread
from ofmu_ray.tasks import loaded
from ofmu_ray.tasks.causal_lm import TASK
from ofmu_ray.training.start import fit_here

TOKENIZER = "builtin:people/target"
CASES = [
    *(("llama", stage) for stage in (0, 1, 2, 3)),
    ("neox", 3),
    *(("qwen2", stage) for stage in (2, 3)),
    *(("llama", stage, "fp32", variant) for variant in ("lora", "frozen") for stage in (0, 2, 3)),
    *(("half", stage, "bf16") for stage in (0, 2, 3)),
    ("half", 3, "fp32"),
    ("half", 3, "bf16", "lora"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(root / "llama", max_shard_size="30KB")  # several files and an index
    tiny_model("neox").save_pretrained(root / "neox")
    tiny_model("qwen2", tie=True).save_pretrained(root / "qwen2")
    tiny_model("llama").bfloat16().save_pretrained(root / "half")
    return root


@pytest.fixture(scope="module")
def two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = [Loading(str(models / name), *how) for name, *how in CASES]
    return run_ranks(2, cases, tmp_path_factory.mktemp("two"), measure)


@pytest.mark.system
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_cut_equals_whole_bit_for_bit(case: Any, models: Path, two_ranks: dict[str, dict[str, Any]]) -> None:
    name, *how = case
    found = two_ranks[str(Loading(str(models / name), *how))]
    assert all(found["equal"]), "masters, exported weights, buffers, gradient; after ten rounds, masters and weights"
    assert found["rest"], "names, losses, layout and generation options"
    assert found["resumed"], "a checkpoint of a run that had loaded whole"
    assert found["random"], "the same random numbers are left for the run"
    part = 0.5 if how[0] == 3 else 1.0
    assert found["share"] == pytest.approx([part, part], rel=0.05)  # the files' headers are not read again


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize(("name", "variant"), [("llama", "plain"), ("qwen2", "frozen"), ("half", "lora")])
def test_one_process(name: str, variant: str, precision: Any, models: Path) -> None:
    case = Loading(str(models / name), 0, precision, variant)
    expected = TorchEngine(whole(case), precision=precision)
    torch.manual_seed(5)
    result = load_unread(case.config)
    assert not isinstance(result, str)
    module, unread = result
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in module.parameters() if parameter in unread)
    engine = TorchEngine(module, precision=precision, unread=unread)
    assert torch.equal(engine.weights()[0], expected.weights()[0])
    weights, other = engine.full_weights(), expected.full_weights()
    assert weights is not None
    assert other is not None
    assert list(weights) == list(other)
    assert all(torch.equal(weights[name], other[name]) and weights[name].dtype == other[name].dtype for name in other)


@pytest.mark.parametrize("piece", [stored.PIECE, 20, 1])
def test_any_part_of_any_shape_is_read(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every share of tensors of 0 to 3 dimensions, in another dtype; the shares are disjoint and complete."""
    monkeypatch.setattr(stored, "PIECE", piece)
    tensors = {
        "scalar": torch.tensor(3.5),
        "vector": torch.arange(7.0),
        "matrix": torch.arange(15.0).view(5, 3),
        "experts": torch.arange(24.0).view(2, 4, 3).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for name, entry in stored_tensors(tmp_path).items():
        value = tensors[name].reshape(-1)
        for world in (1, 2, 3, 5, 16):
            parts, read = [], 0
            for rank in range(world):
                first, stop = share(value.numel(), rank, world)
                assert stop - first <= math.ceil(value.numel() / world)
                parts.append(torch.full((stop - first,), -1.0, dtype=torch.float64))
                read += entry.read(parts[-1], first)
            assert torch.equal(torch.cat(parts), value.double()), (name, world)
            assert read == value.numel() * value.element_size()


def test_a_model_saved_without_its_head_class(tmp_path: Path) -> None:
    """Its tensors lack the prefix `model.`; the head is tied."""
    tiny_model("qwen2", tie=True).model.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    assert "layers.0.mlp.up_proj.weight" in stored_tensors(tmp_path)
    result = load_unread(ModelConfig(path=str(tmp_path)))
    assert not isinstance(result, str)
    engine = TorchEngine(result[0], unread=result[1])
    assert torch.equal(engine.weights()[0], TorchEngine(whole(Loading(str(tmp_path), 0))).weights()[0])


def test_what_is_stored_in_another_form_is_loaded_whole(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)  # type: ignore[operator]
    config = ModelConfig(path=str(tmp_path), tokenizer=TOKENIZER)
    module, _, unread, (note,) = loaded(TASK, config)
    assert unread is None
    assert "every worker loads the whole model first (its tensors are stored in another form)" in note
    expected = load_causal_lm(config)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_flash_attention_falls_back_with_a_note(tmp_path: Path) -> None:
    tiny_model("qwen2", tie=True).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), tokenizer=TOKENIZER, attention="flash_attention_2")
    reasons = {
        "bf16": "flash-attn is not installed here, or there is no GPU",
        "fp32": "flash_attention_2 computes in bf16 and model.precision = fp32 has passes in fp32",
    }
    for precision, reason in reasons.items():
        module, _, _, notes = loaded(TASK, replace(config, precision=precision))  # type: ignore[arg-type]
        if precision == "bf16" and is_flash_attn_2_available():
            assert notes == []
        else:
            assert notes == [f"{reason}; sdpa attention is used instead"]
            assert module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert loaded(TASK, replace(config, attention="sdpa"))[3] == []


def test_both_names_of_a_tied_parameter_are_stored(tmp_path: Path) -> None:
    """transformers compares them, and unties them if they differ: left to it."""
    tiny_model("qwen2", tie=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "are one parameter, and both are stored" in str(load_unread(ModelConfig(path=str(tmp_path))))


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def name_another_file(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"model.norm.weight": "model-00009-of-00004.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_a_file(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_a_file(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def lose_it_from_the_index(folder: Path) -> None:
    lose_a_tensor(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 66}))


def quantise_a_tensor(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.dim() == 2)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_index, r"model\.path: \S+index\.json is not an index of safetensors files"),
        (name_another_file, r"index\.json names model-00009-of-00004\.safetensors, which is not in the folder"),
        (remove_a_file, r"index\.json names model-00002\S+, which is not in the folder"),
        (cut_a_file, r"model-00002\S+ is not a readable safetensors file"),
        (lose_a_tensor, r"model-\S+ has no tensor 'model\.norm\.weight', which model\S+ says it has"),
        (lose_it_from_the_index, r"no file in \S+ has the tensor 'model\.norm\.weight' of this model"),
        (quantise_a_tensor, r"\S+ has '\S+' as F8_E4M3, and config\.json no way to read that: give a copy"),
        (widen, r"\S+ has 'model\S+' of shape \[\d+, \d+\], but config\.json asks for \["),
    ],
)
def test_damage_is_named_before_any_worker_starts(damage: Any, message: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    config = ModelConfig(path=str(tmp_path), tokenizer=TOKENIZER)
    check_model(config)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        check_model(config)


def test_a_quantised_model_is_refused_where_it_is_trained(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scheme = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config | scheme))
    trained = ModelConfig(path=str(tmp_path), tokenizer=TOKENIZER)
    check_model(trained)  # may be evaluated
    with pytest.raises(
        UserError, match=r"model\.path = \S+: its weights are quantised \(fp8\), which no engine trains"
    ):
        TASK.skeleton(trained)


@pytest.mark.full
@pytest.mark.system
def test_a_kill_while_a_resumed_run_reads_its_model_changes_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["rank_imports"])
    for where in ("round", "load", "load"):
        child = context.Process(target=fit_and_die, args=(tmp_path, where))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, where
    fit_here(make_job(tmp_path), "run")
    fit_here(make_job(tmp_path, name="undisturbed"), "undisturbed")
    series = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("run", "undisturbed")]
    assert [one["round"] for one in series] == [8, 8]
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()}
        for name in ("run", "undisturbed")
    ]
    assert files[0] == files[1]
    assert any(name.endswith(".safetensors") for name in files[0])


@pytest.mark.slow
def test_a_llama_of_70_billion_on_eight_nodes() -> None:
    """What each of 64 ranks reads, holds and writes, by the functions that cut and split; nothing is loaded."""
    from benchmarks.loading import computed

    found = computed("70b", 64)
    assert found["parameters"] == 70_553_706_496
    least, most = found["read_by_a_rank_gb"]
    assert least <= found["whole_gb"] / 64 <= most < 1.001 * found["whole_gb"] / 64
    assert found["bf16_weights_of_a_rank_gb"] + found["fp32_masters_of_a_rank_gb"] < 7
    assert found["written_gb"] == pytest.approx(found["whole_gb"])
    assert found["largest_file_gb"] <= 5
    assert found["files"] >= found["whole_gb"] / 5
