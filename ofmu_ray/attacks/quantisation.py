"""Quantisation attack: does rounding the weights bring back what unlearning removed?

Weight-only round-to-nearest (RTN) rounds the weights and scales them back: a weight-only kernel multiplies by the same
values. Activations are not changed. bitsandbytes' formats need a GPU and the bitsandbytes package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from ofmu_ray.attacks.texts import answer_texts, measured
from ofmu_ray.config.robustness import QuantiseOptions
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.evaluation.scoring import mean_nll
from ofmu_ray.models.loading import pretrained

FULL = "full"
BitsAndBytes = Literal["bnb_int8", "bnb_nf4"]


def quantisation_attack(
    model: Any,
    template: Template,
    rows: Sequence[EvaluationRow],
    options: QuantiseOptions,
    *,
    batch_size: int = 64,
) -> pa.Table:
    """Answer losses of the unchanged model ("full") and with rounded weights ("rtn8", "rtn4").

    Columns of `texts.measured` plus `scheme`. Afterwards the model has its original weights, bit for bit.
    """
    texts = answer_texts(rows, template)
    tables = [measured(rows, mean_nll(model, texts, batch_size), scheme=FULL)]
    for bits in options.bits:
        with quantised(model, bits, group_size=options.group(bits), head=options.head):
            tables.append(measured(rows, mean_nll(model, texts, batch_size), scheme=f"rtn{bits}"))
    return pa.concat_tables(tables)


@contextmanager
def quantised(model: Any, bits: int, *, group_size: int | None = None, head: bool = False) -> Iterator[int]:
    """Rounds the weights of the linear layers (`rtn`) within the context; yields the number of rounded weights.

    Covers torch's Linear and GPT-2's Conv1D layers, per output channel; not norms, embeddings, or experts in fused
    tensors. As usual for weight-only formats, the output head is skipped unless `head`; rounding a tied head also
    rounds the input embedding. Only the parameters' data is swapped: the original tensors are never written to, and are
    restored afterwards.

    Raises UserError if there is nothing to round.
    """
    weights = _linear_weights(model, head)
    if not weights:
        raise UserError("checks.quantise: the model has no linear layer to round; drop this check")
    originals = [(weight, weight.data) for weight, _ in weights]
    try:
        for weight, transposed in weights:
            weight.data = rtn(weight.data.T, bits, group_size).T if transposed else rtn(weight.data, bits, group_size)
        yield sum(weight.numel() for weight, _ in weights)
    finally:
        for weight, data in originals:
            weight.data = data


def rtn(weight: torch.Tensor, bits: int, group_size: int | None = None) -> torch.Tensor:
    """Symmetric round-to-nearest of [out, in] to `bits`-bit integers and back, in the weight's dtype.

    A group of `group_size` neighbouring inputs of an output channel shares a scale (None: the complete channel; the
    last group of a channel may be shorter): s = max |w| / (2^(bits-1) - 1), and w becomes s * round(w / s). Halves
    round to even; a group of zeros stays zero. Computed in fp32.
    """
    outputs, inputs = weight.shape
    width = min(group_size or inputs, inputs)
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % width))  # zeros do not change the maximum
    groups = padded.reshape(outputs, -1, width)
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale[scale == 0] = 1.0
    rounded: torch.Tensor = (groups / scale).round_() * scale
    return rounded.reshape(outputs, -1)[:, :inputs].to(weight.dtype).contiguous()


def bitsandbytes_missing() -> str | None:
    """Why bitsandbytes' formats are not available here; None if they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (pip install bitsandbytes)"
    if not torch.cuda.is_available():
        return "bitsandbytes' formats need a CUDA device, and there is none"
    return None


def load_bitsandbytes(folder: str | Path, scheme: BitsAndBytes, *, trust_remote_code: bool = False) -> Any:
    """The folder's model in bitsandbytes' int8 (arXiv 2208.07339) or NF4 (arXiv 2305.14314), in eval mode on the GPU.

    With bitsandbytes' defaults: the output head is not rounded; int8 also rounds activations. Raises UserError with the
    reason if it is not available here.
    """
    reason = bitsandbytes_missing()
    if reason is not None:
        raise UserError(f"checks.quantise: {scheme} is not available: {reason}")
    return _load_bitsandbytes(folder, scheme, "cuda", trust_remote_code)


def _load_bitsandbytes(folder: str | Path, scheme: BitsAndBytes, device: str, trust_remote_code: bool) -> Any:
    from transformers import BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**(nf4 if scheme == "bnb_nf4" else {"load_in_8bit": True}))
    return pretrained(
        str(folder), "model", quantization_config=config, device_map={"": device}, trust_remote_code=trust_remote_code
    ).eval()


def _linear_weights(model: Any, head: bool) -> list[tuple[torch.Tensor, bool]]:
    """Each linear layer's weight once, and whether it is stored as [in, out]."""
    from transformers import Conv1D

    skipped = set() if head else {id(model.get_output_embeddings().weight)}
    weights: dict[int, tuple[torch.Tensor, bool]] = {}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in skipped:
            weights.setdefault(id(module.weight), (module.weight, isinstance(module, Conv1D)))
    return list(weights.values())
