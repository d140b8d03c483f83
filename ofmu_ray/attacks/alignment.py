"""How similarly two models represent the same answers, per layer: centred kernel alignment (CKA) and cosine.

The reference is the retrained model (does forgetting reach the representations, or only the output?) or the original
target (how far has the model moved?). CKA is the linear one of Kornblith et al. 2019
(https://arxiv.org/abs/1905.00414). It is 1 for representations that differ by a rotation, a scale and a shift, so it
also compares models with different initialisations or widths. With fewer rows than features it is large even for
unrelated representations, and resampling rows raises it further, so it has no interval. The debiased CKA has neither
problem. The cosine compares coordinate by coordinate, which is meaningful only between models with a common ancestor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ofmu_ray.attacks.texts import answer_texts
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.rows import EvaluationRow
from ofmu_ray.evaluation.scoring import length_sorted
from ofmu_ray.metrics.functions import FloatArray
from ofmu_ray.metrics.intervals import Clusters, MetricValue, mean_metric, resampled_estimates
from ofmu_ray.models.answers import Text, right_padded

Pooling = Literal["mean", "last"]

_CONSTANT = 1e-12  # below this variance, relative to the mean square, a layer represents all rows alike


@dataclass(frozen=True)
class LayerAlignment:
    """One set and layer. Layer 0 is the embeddings, the last layer the output of the final norm."""

    set: str
    layer: int
    cka: MetricValue
    cka_debiased: MetricValue
    cosine: MetricValue


def alignment_texts(sets: Mapping[str, Sequence[EvaluationRow]], template: Any) -> dict[str, list[Text]]:
    """The answers of each set; plus `SET_paraphrase`, the paraphrased answers, for a set whose rows all have one."""
    texts = {}
    for name, rows in sets.items():
        texts[name] = answer_texts(rows, template)
        paraphrased = [replace(row, answer=row.paraphrase) for row in rows if row.paraphrase is not None]
        if paraphrased and len(paraphrased) == len(rows):
            texts[f"{name}_paraphrase"] = answer_texts(paraphrased, template)
    return texts


@torch.inference_mode()
def representations(
    model: Any, texts: Sequence[Text], *, batch_size: int = 32, pooling: Pooling = "mean"
) -> list[FloatArray]:
    """Each layer's hidden states (embeddings first) at the answer tokens, pooled: layers x [texts, width] float64.

    mean: over the answer tokens; last: the last answer token. EOS does not count, because nothing is predicted from it.
    One batch is in memory at a time; no logits are computed. Every text needs two answer tokens (the last is EOS).
    """
    device = model.get_input_embeddings().weight.device
    pooled: list[list[torch.Tensor]] = [[] for _ in texts]
    for batch in length_sorted([len(ids) for ids, _ in texts], batch_size):
        ids_bt = right_padded([texts[row] for row in batch])
        weights_bt = torch.zeros(ids_bt.shape)
        for slot, row in enumerate(batch):
            ids, prompt = texts[row]
            if not 0 < prompt < len(ids) - 1:
                raise AssertionError(
                    f"a text of {len(ids)} tokens with {prompt} prompt tokens has no answer besides EOS"
                )
            first = prompt if pooling == "mean" else len(ids) - 2
            weights_bt[slot, first : len(ids) - 1] = 1 / (len(ids) - 1 - first)
        body = model.base_model  # without the head
        states = body(input_ids=ids_bt.to(device), use_cache=False, output_hidden_states=True).hidden_states
        weights = weights_bt.to(device)
        layers_lbd = torch.stack([torch.einsum("bt,btd->bd", weights, state.float()) for state in states])
        for slot, row in enumerate(batch):
            pooled[row] = list(layers_lbd[:, slot].double().cpu())
    return [torch.stack(layer).numpy() for layer in zip(*pooled, strict=True)]


def align(
    model: Sequence[FloatArray],
    reference: Sequence[FloatArray],
    *,
    set_name: str,
    samples: int,
    seed: int,
    name: str,
    clusters: Clusters = None,
) -> list[LayerAlignment]:
    """Alignment of two models' `representations` of the same texts, with intervals over texts.

    `name` separates the random streams of metrics that share a seed. All layers of a set use the same resamples.

    Raises UserError if the models have different numbers of layers.
    """
    if len(model) != len(reference):
        raise UserError(
            f"alignment: the model has {len(model) - 1} layers and the reference {len(reference) - 1}; "
            "both models must have the same depth"
        )
    stream: dict[str, Any] = {"samples": samples, "seed": seed, "name": f"{name}/{set_name}", "clusters": clusters}
    return [
        LayerAlignment(set_name, layer, *_cka_values(x, y, **stream), _cosine_value(x, y, **stream))
        for layer, (x, y) in enumerate(zip(model, reference, strict=True))
    ]


def alignment_table(rows: Sequence[LayerAlignment]) -> pa.Table:
    """set, layer, and per measure: value, low, high and, for an absent value or interval, the reason."""
    table: dict[str, list[Any]] = {"set": [row.set for row in rows], "layer": [row.layer for row in rows]}
    for measure in ("cka", "cka_debiased", "cosine"):
        values = [getattr(row, measure) for row in rows]
        for part in ("value", "low", "high", "reason"):
            column = measure if part == "value" else f"{measure}_{part}"
            table[column] = [getattr(value, part) for value in values]
    numbers = [name for name in table if name.startswith("c") and not name.endswith("_reason")]
    types = {"set": pa.string(), "layer": pa.int32()} | {name: pa.float64() for name in numbers}
    return pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in table.items()})


# ------------------------------------------------------------------------------------------------------- measures


def linear_cka(x: FloatArray, y: FloatArray) -> float:
    """||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of column-centred X [rows, p], Y [rows, q]; in [0, 1], NaN if one is 0.

    Uses the feature form (Kornblith et al. 2019): its matrices do not grow with the rows.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / norms) if norms > 0 else float("nan")


def debiased_cka(gram_x: FloatArray, gram_y: FloatArray, weights: FloatArray) -> FloatArray:
    """CKA from unbiased HSIC estimates of Gram matrices [rows, rows]; rows count `weights` times [draws, rows].

    The estimate of Song et al. 2012 (https://jmlr.org/papers/v13/song12a.html) never pairs a row with itself (or its
    copies), so it stays near 0 for unrelated representations of any width. It may be negative, and is NaN if a model's
    estimate with itself is not positive. Needs four rows. Returns [draws].
    """
    gram_x, gram_y = (gram - np.diag(np.diag(gram)) for gram in (gram_x, gram_y))
    n = weights.sum(axis=1)
    drawn_x, drawn_y = weights @ gram_x, weights @ gram_y
    total_x, total_y = (np.einsum("dn,dn->d", drawn, weights) for drawn in (drawn_x, drawn_y))

    def hsic(product: FloatArray, drawn: tuple[FloatArray, FloatArray], totals: FloatArray) -> FloatArray:
        """Without its factor 1 / (n (n - 3)), which cancels in the ratio."""
        pairs = np.einsum("dn,dn->d", weights @ product, weights)
        rows = np.einsum("dn,dn,dn->d", weights, *drawn)
        return np.asarray(pairs - 2 * rows / (n - 2) + totals / ((n - 1) * (n - 2)))

    both = hsic(gram_x * gram_y, (drawn_x, drawn_y), total_x * total_y)
    own = hsic(gram_x**2, (drawn_x, drawn_x), total_x**2), hsic(gram_y**2, (drawn_y, drawn_y), total_y**2)
    positive = np.minimum(*own) > 0
    return np.where(positive, both / np.sqrt(np.where(positive, own[0] * own[1], 1.0)), np.nan)


def row_cosines(x: FloatArray, y: FloatArray) -> FloatArray:
    """Cosine of each row of X with the same row of Y, [rows, width] x 2 -> [rows]; 0 if either is 0."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.asarray(np.einsum("nd,nd->n", x, y) / np.where(norms > 0, norms, 1.0))


def _cka_values(
    x: FloatArray, y: FloatArray, *, samples: int, seed: int, name: str, clusters: Clusters
) -> tuple[MetricValue, MetricValue]:
    """(CKA without an interval, debiased CKA)."""
    if _constant(x) or _constant(y):
        absent = MetricValue.absent("a layer represents all rows alike, so there is nothing to align")
        return absent, absent
    plain = MetricValue(linear_cka(x, y), n=len(x), reason="no interval: resampling rows raises CKA; see debiased CKA")
    if len(x) < 4:
        return plain, MetricValue.absent("debiased CKA needs four rows")
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)  # so that the Gram matrices lose no digits to the mean
    gram_x, gram_y = x @ x.T, y @ y.T
    value = float(debiased_cka(gram_x, gram_y, np.ones((1, len(x))))[0])
    if np.isnan(value):
        return plain, MetricValue.absent("debiased CKA is not defined: a model's own estimate is not positive")

    def cka(weights: FloatArray) -> FloatArray:
        return debiased_cka(gram_x, gram_y, weights)

    estimate = resampled_estimates(cka, [value], [(len(x), clusters)], samples, seed, name)[0]
    return plain, estimate.metric_value()


def _cosine_value(x: FloatArray, y: FloatArray, **stream: Any) -> MetricValue:
    if x.shape[1] != y.shape[1]:
        return MetricValue.absent(f"the models' hidden sizes differ ({x.shape[1]} and {y.shape[1]})")
    return mean_metric(row_cosines(x, y), **stream)


def _constant(x: FloatArray) -> bool:
    return bool(((x - x.mean(axis=0)) ** 2).mean() <= _CONSTANT * (x**2).mean())
