"""Write a causal language model as a directory, without ever holding all of it."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ExportConfig, ModelConfig
from ofmu_ray.errors import UserError
from ofmu_ray.internals.transformers_private import saved_names
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.models.loading import quiet
from ofmu_ray.models.source import base_folder, weights_folder
from ofmu_ray.models.weights import Weights, return_freed_memory
from ofmu_ray.progress import Bar
from ofmu_ray.storage import NewFolder, is_uri, scratch

METADATA = {"format": "pt"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def export_causal_lm(
    module: Any, processor: Any, weights: Weights, folder: NewFolder | None, model: ModelConfig, options: ExportConfig
) -> None:
    """Fill `folder` with what transformers (an adapter alone: peft) loads; None on ranks other than 0. Collective.

    Files, names and types of the weights are those of save_pretrained and of the model that came in. Peak host memory:
    `options.max_shard_size` on rank 0, one tensor elsewhere; a model whose tensors transformers converts on saving
    (fused experts) is gathered whole on rank 0. config.json comes last: without it nothing looks like a model.

    Raises:
        UserError: fp16 does not hold a weight.
    """
    if options.weights == "adapter":
        _export_adapter(module, weights, folder, model, options)
    else:
        base = unwrapped(module)
        types = Types(weights.shapes, model, options)
        names = saved_names(base, weights.shapes)
        if names is None:
            _write_whole(base, weights, types, folder, options)
        else:
            _write_shards(names, weights, types, folder, options)
        if folder is not None:
            _write_config(base, types, folder.path)
    if folder is not None:
        processor.save_pretrained(folder.path)


def exported_as_is(module: torch.nn.Module, model: ModelConfig, options: ExportConfig) -> bool:
    """Whether the exported weights are to the bit those of the module (fp32 adapters: but for their sum's rounding)."""
    if model.lora is not None and model.precision == "bf16":
        return False  # the sum is rounded to bf16
    weights = Weights(module, lambda _: nullcontext(), keep=False)
    types = Types(weights.shapes, model, options)
    return options.weights == "merged" and all(types.of(name) == t.dtype for name, t in weights.shapes.items())


def converts(model: torch.nn.Module) -> bool:
    """Whether transformers changes tensors of this model between module and files, so that both ways take it whole."""
    return saved_names(model, model.state_dict(keep_vars=True)) is None


class Types:
    """The type that each weight is written in."""

    def __init__(self, shapes: Mapping[str, torch.Tensor], model: ModelConfig, options: ExportConfig):
        self._shapes, self._asked = shapes, DTYPES.get(options.dtype)
        self._stored = {} if self._asked else stored_types(model.path)
        self._usual = _usual(self._stored)

    def of(self, name: str, written: str | None = None) -> torch.dtype:
        """`name`: in the state dict; `written`: in the files."""
        own = self._shapes[name].dtype
        if not own.is_floating_point:
            return own
        return self._asked or self._stored.get(written or name, (self._usual or own, 0))[0]

    def most(self) -> torch.dtype:
        """What config.json says."""
        return self._asked or self._usual or next(t.dtype for t in self._shapes.values() if t.dtype.is_floating_point)


@torch.no_grad()
def round_as_exported(module: Any, model: ModelConfig, options: ExportConfig) -> None:
    """Give the weights in memory (what this rank has of them) the values that their export has.

    With LoRA they stay as they are: export rounds the sums of weights and adapters.
    """
    if model.lora is not None:
        return
    weights = Weights(module, lambda _: nullcontext(), keep=False)
    types, written = Types(weights.shapes, model, options), saved_names(unwrapped(module), weights.shapes) or {}
    names = {inside: name for name, inside in written.items()}
    weights.round(lambda inside: types.of(inside, names.get(inside)))


def widest_type(models: Iterable[str]) -> torch.dtype:
    """The type that holds the weights of all these models (paths or hub names); of each, that of most weights."""
    usual = (_usual(stored_types(model)) or torch.float32 for model in models)
    return functools.reduce(torch.promote_types, usual)


def _usual(stored: Mapping[str, tuple[torch.dtype, int]]) -> torch.dtype | None:
    sizes: Counter[torch.dtype] = Counter()
    for dtype, numel in stored.values():
        sizes[dtype] += numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def stored_types(model: str) -> dict[str, tuple[torch.dtype, int]]:
    """(type, number of elements) of a model's fp32, bf16 and fp16 weights, from the headers of its files."""
    from safetensors import safe_open

    folder = base_folder(weights_folder(resolve_builtin(model)))
    found: dict[str, tuple[torch.dtype, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                part = file.get_slice(name)
                if part.get_dtype() in _STORED:
                    found[name] = _STORED[part.get_dtype()], int(torch.Size(part.get_shape()).numel())
    return found


def _write_shards(
    names: Mapping[str, str], weights: Weights, types: Types, folder: NewFolder | None, options: ExportConfig
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shapes = {name: weights.shapes[inside].to(types.of(inside, name)) for name, inside in names.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=options.max_shard_size)
    with progress.bar("export", len(shapes), "tensor") as bar:
        for file, inside in split.filename_to_tensors.items():
            shard = dict(_read(inside, names, weights, shapes, bar))
            if folder is not None:
                save_file(shard, folder.path / file, metadata=METADATA)
                folder.flush()
            del shard  # before the next one is gathered
            return_freed_memory()
    if folder is not None and split.is_sharded:
        parameters = sum(shape.numel() for shape in shapes.values())
        totals = {"total_parameters": parameters, **split.metadata}
        index = json.dumps({"metadata": totals, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        (folder.path / "model.safetensors.index.json").write_text(index + "\n")


def _read(
    written: list[str], names: Mapping[str, str], weights: Weights, shapes: Mapping[str, torch.Tensor], bar: Bar
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in written:
        yield name, _checked(name, weights.read(names[name], shapes[name].dtype)).contiguous()
        bar.update()


def _checked(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.dtype == torch.float16 and not value.isfinite().all():
        raise UserError(f"export.dtype: fp16 does not hold {name}, which is beyond 65504; export as bf16 or fp32")
    return value


def _write_whole(base: Any, weights: Weights, types: Types, folder: NewFolder | None, options: ExportConfig) -> None:
    content = weights.whole()
    if folder is None or content is None:
        return
    cast: dict[int, torch.Tensor] = {}
    for name, value in content.items():
        if id(value) not in cast:
            cast[id(value)] = _checked(name, value.to(types.of(name)))
    with quiet():
        state = {name: cast[id(value)] for name, value in content.items()}
        base.save_pretrained(folder.path, state_dict=state, max_shard_size=options.max_shard_size)


def _write_config(base: Any, types: Types, folder: Path) -> None:
    """config.json, generation_config.json and a custom model's code, as save_pretrained writes them."""
    with quiet(), scratch() as apart:  # save_pretrained deletes the shards that it finds in its folder
        base.save_pretrained(apart, state_dict={})
        shutil.copytree(apart, folder, dirs_exist_ok=True)
    config = copy.deepcopy(base.config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = str(types.most()).removeprefix("torch.")
    config.save_pretrained(folder)


def _export_adapter(
    module: Any, weights: Weights, folder: NewFolder | None, model: ModelConfig, options: ExportConfig
) -> None:
    import peft
    from safetensors.torch import save_file

    content = weights.adapters()
    if folder is None:
        return
    wanted = DTYPES.get(options.dtype)
    state = {name: _checked(name, value.to(wanted or value.dtype)) for name, value in content.items()}
    state = peft.get_peft_model_state_dict(module, state_dict=state, save_embedding_layers=False)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder.path / "adapter_model.safetensors", METADATA
    )
    settings = copy.deepcopy(module.peft_config["default"])
    settings.inference_mode = True
    local = not is_uri(model.path) and Path(model.path).is_dir()
    settings.base_model_name_or_path = folder.relative(model.path) if local else model.path
    settings.save_pretrained(str(folder.path))
