"""Models in GGUF files: dequantised once per machine into a Hugging Face folder, which everything else reads."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, atomic_dir
from ofmu_ray.storage.local import node_folder

SUFFIX = ".gguf"


def is_gguf(path: str) -> bool:
    """Whether a model's path names a GGUF file on this machine."""
    return path.endswith(SUFFIX) and Path(path).is_file()


def converted(path: str, option: str) -> Path:
    """The file's model as a folder: safetensors in fp32, configuration and tokenizer. Made again if the file changes.

    Raises:
        UserError: the package `gguf` is not installed, or transformers cannot read the file; names `option`.
    """
    from filelock import FileLock

    status = Path(path).stat()
    key = f"{Path(path).absolute()}/{status.st_size}/{status.st_mtime_ns}"
    folder = node_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_folder(Path(path), folder, option)
    return folder


def write_folder(file: Path, folder: PathLike, option: str) -> None:
    """Write the file's model to a new folder, as transformers dequantises it.

    Raises:
        UserError: as `converted`.
        StorageError: the folder cannot be written.
    """
    if find_spec("gguf") is None:
        raise UserError(f"{option} = {str(file)!r}: GGUF files need the package gguf: pip install 'ofmu-ray[gguf]'")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **options, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    except Exception as error:  # a damaged file or an unknown architecture raises many types of errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{option} = {str(file)!r}: transformers cannot read this GGUF file ({reason})") from None
    with atomic_dir(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
