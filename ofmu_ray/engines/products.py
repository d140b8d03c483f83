"""How many digits fp32 matrix products and convolutions have on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def fp32_products(precision: str, *, exact: bool) -> Iterator[None]:
    """Within the context, forward and backward, fp32 products are fp32, whatever the process allowed before.

    With `precision` tf32 they are TF32 (10 bits of mantissa), unless `exact`: a difference would divide their rounding
    by its step. torch allows TF32 in convolutions unless it is told otherwise.
    """
    backends: Any = torch.backends
    # torch's newer options, the general ones first: a process may have set them instead of those below
    places = [backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn]
    places += [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [(place, place.fp32_precision) for place in places]
    earlier = None
    with suppress(RuntimeError):  # it cannot express what the newer ones say
        earlier = torch.get_float32_matmul_precision()
    allowed = precision == "tf32" and not exact
    for place in (backends, backends.cudnn):
        if place.fp32_precision == "tf32":
            place.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        if earlier is not None:
            torch.set_float32_matmul_precision(earlier)
        backends.cudnn.allow_tf32 = before[2][1] == "tf32"
        for place, value in before:
            if place.fp32_precision != value:
                place.fp32_precision = value
