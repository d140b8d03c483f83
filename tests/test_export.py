"""Export as a stream: what two ranks at ZeRO-3 write, tensor by tensor, is what save_pretrained would write."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_models import tiny_model
from engine_ranks import run_ranks
from export_ranks import SHARD, Export, export, fit_and_die_in_the_export, source
from fault_job import make_job
from s3_server import Server, s3_server
from safetensors.torch import load_file

from ofmu_ray import progress, storage
from ofmu_ray.config import ExportConfig, LoraConfig, ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.internals.transformers_private import saved_names
from ofmu_ray.models.exporting import export_causal_lm
from ofmu_ray.models.loading import load_causal_lm, pretrained, read_config
from ofmu_ray.models.source import adapter_base, correct_base, model_fingerprint
from ofmu_ray.models.weights import Weights
from ofmu_ray.training.start import fit_here

BF16 = torch.bfloat16


def cases(folder: Path) -> dict[str, Export]:
    adapter = ExportConfig(weights="adapter")
    made = [
        Export("plain", str(folder)),
        Export("tied", str(folder), tie=True),
        Export("renamed", str(folder), model="neox"),
        Export("bf16", str(folder), stored=BF16),
        Export("asked", str(folder), options=ExportConfig(dtype="fp16", max_shard_size=SHARD)),
        Export("merged", str(folder), lora=LoraConfig(rank=2)),
        Export("adapter", str(folder), stored=BF16, precision="bf16", lora=LoraConfig(rank=2), options=adapter),
    ]
    return {case.name: case for case in made}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Export], dict[str, Any]]:
    made = cases(tmp_path_factory.mktemp("exports"))
    return made, run_ranks(2, list(made.values()), tmp_path_factory.mktemp("ranks"), measure=export)


@pytest.mark.system
@pytest.mark.parametrize("name", ["plain", "tied", "renamed", "bf16", "asked", "merged"])
def test_two_ranks_write_what_save_pretrained_writes(name: str, exported: Any, tmp_path: Path) -> None:
    made, known = exported
    case, weights = made[name], known[name]["weights"]
    folder = Path(case.folder) / name
    dtype = torch.float16 if name == "asked" else case.stored
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    whole = transformers.AutoModelForCausalLM.from_pretrained(source(case), dtype=dtype)
    before = whole.state_dict()
    assert any(not torch.equal(before[key], value.to(dtype)) for key, value in weights.items())
    whole.load_state_dict({key: value.to(dtype) for key, value in weights.items()})
    whole.save_pretrained(tmp_path, max_shard_size=SHARD)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in folder.iterdir() if not path.name.startswith("tokenizer")
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    assert all(torch.equal(loaded.state_dict()[key], value.to(dtype)) for key, value in weights.items())
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) > 256


@pytest.mark.system
def test_the_adapter_alone_is_loaded_by_peft_and_evaluated_with_its_base(exported: Any, tmp_path: Path) -> None:
    import peft

    made, known = exported
    case, weights = made["adapter"], known["adapter"]["weights"]
    folder = Path(case.folder) / "adapter"
    names = {path.name for path in folder.iterdir() if "token" not in path.name}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    base = transformers.AutoModelForCausalLM.from_pretrained(source(case))
    merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload().state_dict()
    loaded = pretrained(str(folder)).state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(merged[key], value)
        torch.testing.assert_close(loaded[key], value)
    assert read_config(str(folder)).vocab_size == base.config.vocab_size
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "../adapter-in"
    assert {value.dtype for value in tensors(folder).values()} == {torch.float32}
    before = model_fingerprint(folder)
    file = source(case) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert model_fingerprint(folder) != before  # another base is another model
    copy = tmp_path / "a sweep's/best"
    shutil.copytree(folder, copy, copy_function=os.link)
    correct_base(copy, adapter_base(folder))
    assert adapter_base(copy) == adapter_base(folder) == str(source(case).resolve())
    shutil.rmtree(copy)
    Path(case.folder).rename(tmp_path / "moved")  # both
    assert read_config(str(tmp_path / "moved/adapter")).vocab_size == base.config.vocab_size
    (tmp_path / "moved/adapter").rename(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_config\.json names '\.\./adapter-in' as the base of this adapter"):
        read_config(str(tmp_path / "adapter"))
    (tmp_path / "moved").rename(case.folder)


@pytest.mark.system
def test_exported_files_are_readable_by_others(exported: Any) -> None:
    folder = Path(exported[0]["plain"].folder) / "plain"
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def test_converted_tensors_are_detected() -> None:
    """Mixtral's experts are split into files as they came; GPT-NeoX's head only has another name there."""
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    mixtral = transformers.AutoModelForCausalLM.from_config(config)
    for model, whole in ((mixtral, True), (tiny_model("llama", tie=True), False)):
        names = saved_names(model, weights_of(model).shapes)
        assert (names is None) == whole


def weights_of(module: torch.nn.Module) -> Weights:
    from contextlib import nullcontext

    return Weights(module, lambda _: nullcontext(), keep=True)


@pytest.fixture
def job(tmp_path: Path) -> tuple[ModelConfig, Any, Any]:
    """The built-in model as loaded."""
    config = ModelConfig()
    return (config, *load_causal_lm(config))


@pytest.mark.slow
def test_converted_tensors_are_written_whole(tmp_path: Path, job: tuple[ModelConfig, Any, Any]) -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config).to(BF16)
    model.save_pretrained(tmp_path / "in")
    model, source = model.float(), ModelConfig(path=str(tmp_path / "in"))
    with storage.new_folder(tmp_path / "out") as folder:
        export_causal_lm(model, job[2], weights_of(model), folder, source, ExportConfig(max_shard_size=SHARD))
    before, after = (tensors(tmp_path / name) for name in ("in", "out"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Counted(progress.Listener, progress.Bar):
    """Adds up what bars report, as (title, of, done)."""

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[progress.Bar]:
        self.title, self.total, self.done = title, total, 0
        yield self

    def update(self, count: int = 1) -> None:
        self.done += count


def test_progress_of_an_export_counts_tensors(tmp_path: Path, job: tuple[ModelConfig, Any, Any]) -> None:
    config, model, tokenizer = job
    with storage.new_folder(tmp_path / "out") as folder, progress.listening(Counted()) as heard:
        export_causal_lm(model, tokenizer, weights_of(model), folder, config, ExportConfig(max_shard_size=SHARD))
    assert (heard.title, heard.total, heard.done) == ("export", *[len(tensors(tmp_path / "out"))] * 2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with s3_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield running


class Killed(BaseException):
    """As a signal ends a process: no handler for errors runs."""


@pytest.mark.slow
def test_a_bucket_gets_shard_by_shard_and_counts_as_a_model_at_the_end(
    server: Server, tmp_path: Path, job: tuple[ModelConfig, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, options = f"{server.bucket}/run/model", ExportConfig(max_shard_size="500KB")
    held: list[int] = []

    config, module, tokenizer = job

    def write(after: int | None = None) -> None:
        held.clear()
        with storage.new_folder(place) as folder:
            sent = folder.flush

            def counted() -> None:
                held.append(sum(path.stat().st_size for path in folder.path.iterdir()))
                sent()
                if len(held) == after:
                    raise Killed

            folder.flush = counted  # type: ignore[method-assign]
            export_causal_lm(module, tokenizer, weights_of(module), folder, config, options)

    with pytest.raises(Killed):
        write(after=2)
    assert len([key for key in server.keys("run") if key.endswith(".safetensors")]) == 2
    assert not storage.is_whole(place)
    with pytest.raises(UserError, match="is incomplete"):
        pretrained(place)
    write()
    assert len(held) > 3
    assert max(held) < 600_000
    assert "run/model/model.safetensors.index.json" in server.keys("run")
    loaded = pretrained(place).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())
    manifest = json.loads(server.read("run/model/manifest.json"))
    assert set(manifest["files"]) | {"manifest.json"} == {key.rpartition("/")[2] for key in server.keys("run")}


def test_fp16_that_overflows_and_options_that_do_not_fit_are_refused(
    tmp_path: Path, job: tuple[ModelConfig, Any, Any]
) -> None:
    config, module, tokenizer = job
    with torch.no_grad():
        module.model.norm.weight[0] = 1e5
    with (
        pytest.raises(UserError, match=r"export\.dtype: fp16 does not hold model\.norm\.weight"),
        storage.new_folder(tmp_path / "out") as folder,
    ):
        export_causal_lm(module, tokenizer, weights_of(module), folder, config, ExportConfig(dtype="fp16"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"export\.weights = adapter, but no adapters are trained"):
        ExportConfig(weights="adapter").check(ModelConfig())
    with pytest.raises(UserError, match=r"export\.max_shard_size = '5 GB'"):
        ExportConfig(max_shard_size="5 GB")


@pytest.mark.full
@pytest.mark.system
def test_a_kill_within_the_export_leaves_no_model_and_the_same_command_resumes(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=fit_and_die_in_the_export, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = list((tmp_path / "run").glob(".model.*.part/model-*.safetensors"))
    assert len(left) == 1  # it died between two shards
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/training.json").exists()
    for name in ("run", "undisturbed"):
        job = replace(make_job(tmp_path, name=name), export=ExportConfig(max_shard_size="500KB"))
        fit_here(job, name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run/model").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed/model").iterdir()}
    assert "model.safetensors.index.json" in files
    assert not left[0].parent.exists()
