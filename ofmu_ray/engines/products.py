"""How many digits fp32 matrix products have on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fp32_products(precision: str, *, exact: bool) -> Iterator[None]:
    """Within the context, forward and backward, fp32 products are fp32, whatever the process allowed before.

    With `precision` tf32 they are TF32 (10 bits of mantissa), unless `exact`: a difference would divide their rounding
    by its step.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" and not exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
