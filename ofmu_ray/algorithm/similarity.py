"""Similarity of the forget and retain gradients, and its derivatives with respect to both.

OFMU (arXiv 2509.22483) penalises Sim = cos(g_f, g_r). With unit vectors a = g_f/|g_f|, b = g_r/|g_r| and c = <a, b>:

    dc/dg_f = (b - c a) / |g_f| =: u        dc/dg_r = (a - c b) / |g_r| =: w

Both are linear combinations of g_f and g_r, so three inner products determine them without extra storage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Similarity = Literal["cosine", "squared_cosine"]
Gradient = TypeVar("Gradient", torch.Tensor, Sequence[torch.Tensor])


@dataclass(frozen=True)
class SimilarityCoefficients:
    """u = u_f g_f + u_r g_r and w = w_f g_f + w_r g_r, the derivatives of Sim, and their norms."""

    cosine: float
    u_f: float
    u_r: float
    w_f: float
    w_r: float
    u_norm: float
    w_norm: float


def similarity_coefficients(
    ff: float, fr: float, rr: float, similarity: Similarity = "cosine"
) -> SimilarityCoefficients:
    """Coefficients from the inner products <g_f,g_f>, <g_f,g_r>, <g_r,g_r>.

    A zero gradient has no direction: the similarity and its derivatives are then 0. For `squared_cosine`
    (Sim = c^2) the derivatives are those of c times 2c.
    """
    if ff <= 0.0 or rr <= 0.0 or not math.isfinite(ff * rr):
        value = 0.0 if math.isfinite(ff + rr) else math.nan
        return SimilarityCoefficients(value, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    f, r = math.sqrt(ff), math.sqrt(rr)
    c = max(-1.0, min(1.0, fr / (f * r)))
    factor = 2.0 * c if similarity == "squared_cosine" else 1.0
    sine = math.sqrt(max(0.0, 1.0 - c * c)) * abs(factor)
    cross = factor / (f * r)
    return SimilarityCoefficients(
        cosine=c,
        u_f=-factor * c / ff,
        u_r=cross,
        w_f=cross,
        w_r=-factor * c / rr,
        u_norm=sine / f,
        w_norm=sine / r,
    )


def similarity_gradient(
    g_f: Gradient, g_r: Gradient, similarity: Similarity = "cosine"
) -> tuple[torch.Tensor, Gradient, Gradient]:
    """(cosine, u, w) of complete gradients: two tensors of the same shape, or sequences of such tensors.

    Args:
        g_f: gradient of the forget loss.
        g_r: gradient of the retain loss, of the same shape(s).
        similarity: the Sim of u = dSim/dg_f and w = dSim/dg_r (the returned cosine is always c).

    Returns:
        The cosine (0-dim, in the gradients' dtype); u and w, shaped like the gradients.
    """
    single = isinstance(g_f, torch.Tensor)
    f = _listed(g_f)
    r = _listed(g_r)

    def dot(x: list[torch.Tensor], y: list[torch.Tensor]) -> float:
        return sum(float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double())) for a, b in zip(x, y, strict=True))

    k = similarity_coefficients(dot(f, f), dot(f, r), dot(r, r), similarity)
    u = [k.u_f * a + k.u_r * b for a, b in zip(f, r, strict=True)]
    w = [k.w_f * a + k.w_r * b for a, b in zip(f, r, strict=True)]
    cosine = torch.tensor(k.cosine, dtype=f[0].dtype, device=f[0].device)
    return (cosine, u[0], w[0]) if single else (cosine, u, w)  # type: ignore[return-value]


def _listed(g: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [g] if isinstance(g, torch.Tensor) else list(g)
