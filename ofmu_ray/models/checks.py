"""Checks of a language model that do not load its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.models.causal import check_causal, check_folder
from ofmu_ray.models.gguf_files import SUFFIX, is_gguf
from ofmu_ray.models.source import model_source
from ofmu_ray.storage import is_uri
from ofmu_ray.storage.hub import unreachable


def check_model(config: ModelConfig, option: str = "model.path") -> Any:
    """Load configuration and tokenizer, and check the weights' headers; returns the tokenizer.

    Raises:
        UserError: no such folder, no answer from the hub, no weights, unreadable weights, not a causal language model,
            no tokenizer, or a tokenizer without EOS.
    """
    from ofmu_ray.models.loading import load_tokenizer, read_config
    from ofmu_ray.models.unread import check_stored

    path = check_stored_model(config, option, check_folder)
    shape = read_config(config.path, option, trust_remote_code=config.trust_remote_code)
    check_causal(shape, config, option)
    if Path(path).is_dir():
        check_stored(shape, Path(path), config, option)
    return load_tokenizer(config)


def check_rows(config: ModelConfig, longest: Mapping[str, int], largest: Mapping[str, int]) -> None:
    """Check that the model knows the tokens of rows and has positions for them.

    `longest`: stream -> tokens of its longest row. `largest`: stream -> its largest token number.

    Raises:
        UserError: it does not; names the stream.
    """
    from ofmu_ray.models.loading import read_config

    shape = read_config(config.path, trust_remote_code=config.trust_remote_code).get_text_config()
    for stream, token in largest.items():
        if token >= shape.vocab_size:
            raise UserError(
                f"data.{stream}: its rows have token number {token} with the tokenizer "
                f"{config.tokenizer or config.path!r}, but {config.path} knows {shape.vocab_size} tokens: name the "
                "model's own with --model.tokenizer, or resize the model's embeddings (resize_token_embeddings)"
            )
    positions = getattr(shape, "max_position_embeddings", None)
    for stream, tokens in longest.items():
        if positions is not None and tokens > positions:
            raise UserError(
                f"data.{stream}: its longest row has {tokens} tokens, but {config.path} has {positions} positions: set "
                f"--data.format.max_length {positions}"
            )


def check_stored_model(config: ModelConfig, option: str, check: Callable[[Path, str], None] | None = None) -> str:
    """Check that a model is there and its weights are safetensors; returns its place on this machine or the hub.

    `check`: called with a local folder and the option, before its weights are looked at.

    Raises:
        UserError: no such folder, no answer from the hub, no weights, or unreadable weights.
    """
    check_place(config.path, option)
    try:
        path = model_source(config.path, option)
    except StorageError as error:  # before the start this is the user's mistake
        raise UserError(str(error)) from None
    if Path(path).is_dir():
        if check is not None:
            check(Path(path), option)
        _check_weights(Path(path), option, config.trust_remote_code)
    return path


def check_place(path: str, option: str) -> None:
    """Check that there is a folder, or a hub to ask. Takes no time, so call it before anything that does.

    Raises:
        UserError: there is neither.
    """
    local = resolve_builtin(path)
    if is_uri(path) or is_gguf(path) or Path(local).is_dir():
        return
    # a hub name has at most one slash
    here = local.startswith((".", "/", "~")) or local.endswith(SUFFIX)
    if here or local.count("/") > 1 or (Path(local).parent.is_dir() and "/" in local):
        run = Path(local).parent.name
        hint = f"; run `ofmu train` first, with the configuration named {run}" if Path(local).name == "model" else ""
        raise UserError(f"{option} = {path!r}: no such {'file' if path.endswith(SUFFIX) else 'folder'}{hint}")
    reason = unreachable(path, "model")
    if reason is not None:
        raise UserError(f"{option} = {path!r}: no such folder here, and as a name on the hub: {reason}")


def placed(config: ModelConfig) -> ModelConfig:
    """The same model with local paths as absolute ones, as workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

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
