"""How many digits fp32 matrix products and convolutions have on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fp32_products(precision: str, *, exact: bool) -> Iterator[None]:
    """Within the context, forward and backward, fp32 products are fp32, whatever the process allowed before.

    With `precision` tf32 they are TF32 (10 bits of mantissa), unless `exact`: a difference would divide their rounding
    by its step. torch allows TF32 in convolutions unless it is told otherwise.
    """
    cudnn: Any = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision
    allowed = precision == "tf32" and not exact
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1] == "tf32"
