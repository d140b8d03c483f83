"""The private parts of Ray, DeepSpeed, transformers and jsonargparse that we use still exist, or are named if not."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from ofmu_ray.commandline.parse import parser_for
from ofmu_ray.config import SweepConfig, UnlearnConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.internals import (
    datasets_private,
    deepspeed_private,
    jsonargparse_private,
    ray_private,
    transformers_private,
)
from ofmu_ray.internals.contract import Private
from ofmu_ray.training.checkpoint_list import RAY_TRAIN_LIST

ROOT = Path(__file__).resolve().parent.parent
BORROWED = [
    name
    for module in (ray_private, deepspeed_private, transformers_private, jsonargparse_private)
    for name in vars(module).values()
    if isinstance(name, Private)
]
PRIVATE = (
    r"ray\.(\w+\.)*_\w+",
    r"ray\.train\.torch\.config",
    r"deepspeed\.(runtime|ops|utils)",
    r"transformers\.(?!utils\b)[a-z]\w*",
    r"\._(can_set_)?attn_implementation",
    r"\._supports_\w+",
    r"\bds_\w+",
    r"\b_from_model_config\b",
    r"\._fingerprint\b",
)
"""Patterns of private access."""


@pytest.mark.parametrize("borrowed", BORROWED, ids=lambda borrowed: f"{borrowed.module}.{borrowed.name}")
def test_it_is_where_it_was(borrowed: Private) -> None:
    """Fails with module, attribute and purpose if a release has moved it."""
    assert borrowed.get() is not None


def test_deepspeeds_optimisers_have_the_attributes() -> None:
    """Those declared by their classes; the engine tests check the others on running optimisers."""
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2

    for module in (engine, partition_parameters, stage3, stage_1_and_2):
        for name, attributes in deepspeed_private.CONTRACT.items():
            if getattr(vars(module).get(name), "__module__", None) == module.__name__:
                text = Path(str(module.__file__)).read_text()
                assert [one for one in attributes if not re.search(rf"(def |self\.){one}\b", text)] == [], name
    text = Path(str(partition_parameters.__file__)).read_text()
    assert [one for one in deepspeed_private.CONTRACT["Parameter"] if f"param.{one} = " not in text] == []


def test_ray_trains_way_with_interrupts_can_be_left_out() -> None:
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(lambda: None)
    ray_private.leave_interrupts(trainer)
    text = Path(str(inspect.getsourcefile(type(trainer).fit))).read_text()
    assert f"self.{ray_private.INTERRUPTS}(controller)" in text


def test_generation_options_of_a_model_without_a_file_of_them(tmp_path: Path) -> None:
    import transformers

    text = inspect.getsource(transformers.GenerationConfig.from_pretrained)
    assert f'"{transformers_private.FROM_MODEL}"' in text
    shape = transformers.LlamaConfig(eos_token_id=[6, 7], pad_token_id=0)
    (tmp_path / "config.json").write_text(shape.to_json_string())
    named = {"config_file_name": "config.json", transformers_private.FROM_MODEL: True}
    options = transformers.GenerationConfig.from_pretrained(str(tmp_path), **named)
    assert (options.eos_token_id, options.pad_token_id) == ([6, 7], 0)


def test_data_sets_have_a_fingerprint() -> None:
    from datasets import Dataset

    one, other = (Dataset.from_dict({"a": [value]}) for value in (1, 2))
    prints = {datasets_private.fingerprint(data) for data in (one, other)}
    assert len(prints) == 2
    with pytest.raises(AssertionError, match=r"datasets .*: int no longer has _fingerprint"):
        datasets_private.fingerprint(1)


def test_architectures_say_whether_they_have_sdpa() -> None:
    import transformers

    assert transformers_private.supports_sdpa(transformers.LlamaForCausalLM)
    assert not transformers_private.supports_sdpa(transformers.BloomForCausalLM)


def test_architectures_say_whether_they_are_recurrent() -> None:
    import transformers

    assert transformers_private.is_stateful(transformers.MambaForCausalLM)
    assert not transformers_private.is_stateful(transformers.LlamaForCausalLM)


def test_the_list_of_checkpoints_is_one_that_ray_train_reads() -> None:
    text = ray_private.checkpoint_list(["a", "b"])
    state = ray_private.SNAPSHOT.get().parse_raw(text)
    assert [entry.checkpoint_dir_name for entry in state.checkpoint_results] == ["a", "b"]
    assert state.latest_checkpoint_result.checkpoint_dir_name == "b"
    assert json.loads(text)["current_report_index"] == 2


def test_the_list_has_the_name_that_ray_train_gives_it() -> None:
    """Known without importing Ray."""
    assert ray_private.SNAPSHOT_FILE.get() == RAY_TRAIN_LIST


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [UnlearnConfig, SweepConfig, RequestsConfig])
def test_options_are_found_as_jsonargparse_finds_them(config_class: type) -> None:
    """Also groups, names that are no option, and with a kind of option left out."""
    parser = parser_for(config_class, "ofmu")
    find = jsonargparse_private.FINDER.get()
    options = [action.dest for action in parser._actions]
    assert len(options) > 300
    for name in {*options, *(option.rpartition(".")[0] for option in options), "config", "none", "-", ""}:
        for left_out in (None, jsonargparse_private.LOADS_A_CLASS.get(), (argparse._HelpAction,)):
            assert find(parser, name, left_out) == find.__wrapped__(parser, name, left_out), name
    assert parser in jsonargparse_private._indexes


def test_other_parsers_keep_the_usual_search() -> None:
    parser_for(UnlearnConfig, "ofmu")
    other = ArgumentParser(exit_on_error=False)
    subcommand = ArgumentParser(exit_on_error=False)
    subcommand.add_argument("--number", type=int)
    other.add_subcommands().add_subcommand("run", subcommand)
    assert other.parse_args(["run", "--number", "3"]).run.number == 3
    assert other not in jsonargparse_private._indexes


def test_an_option_that_is_added_later_is_found() -> None:
    parser = ArgumentParser(exit_on_error=False)
    jsonargparse_private.index_options(parser)
    parser.add_argument("--later", type=int)
    assert parser.parse_args(["--later", "3"]).later == 3


def test_what_moved_is_named() -> None:
    with pytest.raises(AssertionError, match=r"ray 2\.[\d.]+: ray\.train\.Gone is gone; used for a test"):
        Private("ray.train", "Gone", "a test").get()
    with pytest.raises(AssertionError, match=r"ray [\d.]+: ray\._private\.gone\.Thing is gone"):
        Private("ray._private.gone", "Thing", "a test").get()
    entry = ray_private.SNAPSHOT_ENTRY
    with pytest.raises(AssertionError, match="_TrainingResultState no longer has weights; used for a test"):
        Private(entry.module, entry.name, "a test", ("metrics", "weights")).get()


def test_no_other_package_reaches_into_them() -> None:
    files = [*(ROOT / "ofmu_ray").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    others = [file for file in files if file.parent.name != "internals"]
    assert len(others) > 200
    offenders = []
    for file in others:
        for line in file.read_text().splitlines():
            code = line.partition("#")[0]
            imports = re.match(r"\s*(from|import) (.*)", code)
            if any(
                re.search(pattern, code if "attn" in pattern or "ds_" in pattern else imports[2] if imports else "")
                for pattern in PRIVATE
            ):
                offenders.append(f"{file.relative_to(ROOT)}: {line.strip()}")
    assert offenders == []
