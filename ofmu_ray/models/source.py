"""Locations of models: built in, a folder, a GGUF file, a URI or a name on the hub; and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ofmu_ray.assets import PREFIX, resolve_builtin
from ofmu_ray.data.content import content
from ofmu_ray.errors import UserError
from ofmu_ray.models.gguf_files import converted, is_gguf
from ofmu_ray.storage import NewFolder, fetched, is_uri

ADAPTER = "adapter_config.json"
_MODEL_FILES = ("*.safetensors", "config.json", ADAPTER, "generation_config.json", "*.py")


def model_source(path: str, option: str = "model.path") -> str:
    """A model's path for transformers on this machine: a URI's content is fetched and a GGUF file converted (once), a
    hub name is kept.

    Raises:
        UserError: the URI has no complete model, or the file cannot be converted; names `option`.
    """
    if is_gguf(path):
        return str(converted(path, option))
    return str(fetched(path, option)) if is_uri(path) else resolve_builtin(path)


def adapter_base(source: str | Path) -> str | None:
    """Path or hub name of the model that the adapter alone (peft) in a local folder belongs to; None: no adapter.

    A relative path starts at the adapter's folder, or else, as peft has it, at the working directory.

    Raises:
        UserError: a path that leads nowhere.
    """
    settings = Path(source) / ADAPTER
    if not settings.is_file() or (Path(source) / "config.json").is_file():
        return None
    base: str = json.loads(settings.read_text())["base_model_name_or_path"]
    if is_uri(base) or base.startswith(PREFIX):
        return base
    if (beside := Path(source) / base).is_dir():
        return str(beside.resolve())
    if base.startswith((".", "/", "~")) and not Path(base).is_dir():
        raise UserError(
            f"{settings} names {base!r} as the base of this adapter, and no such folder is there: move both together, "
            "or correct base_model_name_or_path"
        )
    return base


def correct_base(folder: Path, base: str | None) -> None:
    """Make the relative path of a copied or moved adapter lead to its base; `base`: `adapter_base` of the original."""
    if base is None or not Path(base).is_dir():
        return
    settings = folder / ADAPTER
    content = json.loads(settings.read_text()) | {"base_model_name_or_path": NewFolder(folder).relative(base)}
    settings.unlink()  # it may be a hard link
    settings.write_text(json.dumps(content, indent=2, sort_keys=True))


def base_folder(folder: Path) -> Path:
    """The folder with the complete weights: the adapter's base, else `folder`."""
    base = adapter_base(folder)
    return folder if base is None else weights_folder(resolve_builtin(base))


def weights_folder(model: str) -> Path:
    """The model's folder on this machine; hub names and URIs are fetched once and cached.

    Raises UserError if there is no such model, or if it has no safetensors weights or no config.json.
    """
    folder = Path(model_source(model, "model"))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model} is neither a model directory nor a model on the hub ({type(error).__name__})"
            ) from None
    described = any((folder / name).is_file() for name in ("config.json", ADAPTER))
    if not any(folder.glob("*.safetensors")) or not described:
        raise UserError(
            f"{model} is not a model directory: it needs config.json and weights as *.safetensors "
            "(convert others with save_pretrained)"
        )
    return folder


def model_fingerprint(folder: Path, *, reread: bool = False) -> str:
    """Hex digest of the content of the model's weights and configuration, independent of the folder.

    For an adapter alone, its base counts too. Files are read once, and known again by size and time. `reread`: read
    them in any case, because somebody relies on the bytes: size and time can be kept when a file is changed.
    """
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {_sha256(path) if reread else content(str(path)).sha256}\n".encode())
    base = base_folder(folder)
    if base != folder:
        digest.update(model_fingerprint(base, reread=reread).encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
