"""Checks of a language model that do not load its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.models.source import model_source


def check_model(config: ModelConfig, option: str = "model.path") -> Any:
    """Load configuration and tokenizer, and check the weights' headers; returns the tokenizer.

    Raises:
        UserError: no such folder, no weights, unreadable weights, no tokenizer, or a tokenizer without EOS.
    """
    from ofmu_ray.models.loading import load_tokenizer, read_config
    from ofmu_ray.models.unread import check_stored

    try:
        path = model_source(config.path, option)
    except StorageError as error:  # before the start this is the user's mistake
        raise UserError(str(error)) from None
    if Path(path).is_dir():
        _check_weights(Path(path), option, config.trust_remote_code)
    elif path.startswith((".", "/", "~")) or config.path.startswith("builtin:"):
        raise UserError(f"{option} = {config.path!r}: no such folder")
    shape = read_config(config.path, option, trust_remote_code=config.trust_remote_code)
    if Path(path).is_dir():
        check_stored(shape, Path(path), config, option)
    return load_tokenizer(config)


def placed(config: ModelConfig) -> ModelConfig:
    """The same model with local folders as absolute paths, as workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).is_dir() else path

    return replace(config, path=absolute(config.path) or config.path, tokenizer=absolute(config.tokenizer))


def _check_weights(folder: Path, option: str, trusted: bool) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files and not trusted:
        raise UserError(f"{option} = {str(folder)!r}: no *.safetensors there; convert the weights with save_pretrained")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{option}: {file} is not a readable safetensors file ({error})") from None
