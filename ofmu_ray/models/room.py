"""How many numbers one pass may make at a time, by device."""

from __future__ import annotations

import torch

CPU_LOGITS = 1 << 25
"""fp32 logits of a pass on a CPU: 128 MiB."""
CPU_CHUNK = 1 << 20
"""fp32 numbers that fit a CPU's cache."""
CUDA_CHUNK = 1 << 27
"""512 MiB: kernels far longer than their launch."""
_SHARE = 16
"""Of the free memory of a GPU, logits take this part; copies of them in other forms take a few times as much."""


def logits_at_once(device: torch.device) -> int:
    """Elements of the fp32 logits of one pass."""
    if device.type != "cuda":
        return CPU_LOGITS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what it has freed
    return max(CPU_LOGITS, int(free) // (_SHARE * torch.float32.itemsize))


def rows_at_once(logits_nv: torch.Tensor) -> int:
    """Rows of logits to process at a time, in several fp32 copies."""
    device = logits_nv.device
    most = min(CUDA_CHUNK, logits_at_once(device)) if device.type == "cuda" else CPU_CHUNK
    return max(1, most // logits_nv.shape[1])
