"""Features are extensible: custom features on three streams, used in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_reference import TARGET, encoder_of, stream, template  # noqa: F401 (a fixture)

from ofmu_ray.config import WeightedConfig
from ofmu_ray.config.methods import Ranges
from ofmu_ray.data.batch_plan import write_plan
from ofmu_ray.data.batches import local_rounds, padded
from ofmu_ray.data.prepare import PreparedData
from ofmu_ray.data.row_checks import DataReport
from ofmu_ray.data.template import Template
from ofmu_ray.engines import TorchEngine
from ofmu_ray.features.builtin import NLL
from ofmu_ray.features.protocol import FeatureContext, Need, Row, Tokens, Values
from ofmu_ray.features.reference import write_references
from ofmu_ray.methods.npo import answer_nll
from ofmu_ray.methods.one_loop import WeightedLoop
from ofmu_ray.methods.protocol import Batches, drawn, run_round
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.planning.shapes import micro_batch

ROUNDS, BATCH, WIDTH = 3, 4, 5


@dataclass(frozen=True)
class Embeddings(Values):
    """Mean over a row's tokens of the first embedding dimensions, which no layer outputs."""

    name = "embeddings"
    key = "reference_embeddings"
    per_token = False
    first: int = WIDTH

    def shape(self, config: Any) -> tuple[int, ...]:
        return (self.first,)

    def measure(self, module: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        embeddings = module.get_input_embeddings()(batch["input_ids"])[..., : self.first]  # type: ignore[operator]
        mask = batch["attention_mask"][..., None]
        return (embeddings * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Reversed(Tokens):
    """Two texts per row: the answer's tokens backwards, and as they are."""

    prefix = "other_"

    @property
    def count(self) -> int:
        return 2

    def rows(self, model: Any, rows: Sequence[Row], template: Template) -> list[dict[str, Any]]:  # noqa: F811
        encoded = []
        for row in rows:
            prompt, answer = row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] : -1]
            for number, text in enumerate((answer[::-1], answer)):
                ids = [*prompt, *text, template.eos]
                encoded.append({**row, "row_id": f"{row['row_id']}/{number}", "input_ids": ids})
        return encoded


class Mine(WeightedLoop[WeightedConfig]):
    """Pulls forget rows to their other text, weighted by how unlikely it is, and raises holdout rows."""

    name = "mine"
    options = WeightedConfig
    space: ClassVar[Ranges] = {}

    @property
    def needs(self) -> tuple[Need, ...]:
        other = Reversed()
        return (Need("forget", other), Need("forget", NLL, of=other), Need("holdout", Embeddings()), *super().needs)

    def batches_per_round(self) -> dict[str, int]:
        return {"forget": 1, "retain": 1, "holdout": 1}

    def forget_loss(self, module: torch.nn.Module, micro: Mapping[str, Any]) -> Any:
        nll_r = answer_nll(module, micro, "other_")
        return (nll_r / micro["other_reference_nll"].to(nll_r.dtype)).sum(), len(nll_r)

    def round(
        self, engine: Any, forget_batches: Batches, retain_batches: Batches, *further: Any, **streams: Any
    ) -> Any:
        """The usual round of methods with one loop; the third stream's features go into a metric."""
        assert not further
        metrics = super().round(engine, forget_batches, retain_batches)
        [batch] = [next(drawn(streams.pop("holdout_batches"), "holdout"))]
        assert not streams
        return {**metrics, "embedding": float(sum(micro["reference_embeddings"].sum() for micro in batch.micro))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, template: Template) -> PreparedData:  # noqa: F811
    folder = tmp_path_factory.mktemp("tokens")
    streams = {name: stream(name, folder / name, template) for name in ("forget", "retain", "holdout")}
    return PreparedData(streams, DataReport(streams={}, overlap=None, tokenizer_sha256=""), encoder_of(template))


def test_custom_features(prepared: PreparedData, template: Template, tmp_path: Path) -> None:  # noqa: F811
    method = Mine(WeightedConfig(), ROUNDS)
    options = {"rounds": ROUNDS, "batch_size": BATCH, "workers": 1, "seed": 1}
    plan = write_plan(prepared.streams, str(tmp_path / "plan"), batches_per_round=method.batches_per_round(), **options)
    places = {"folder": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    sidecars = write_references(method.needs, prepared, plan, TARGET, settings=FeatureContext("mine"), **places)
    assert set(sidecars) == {"forget", "holdout"}

    module, _ = load_causal_lm(TARGET)
    engine = TorchEngine(module)
    method.start(engine)
    embeddings = module.get_input_embeddings().weight.detach().clone()  # type: ignore[union-attr,operator]
    series = []
    for batches in local_rounds(plan, 0, collate=padded(template.pad), sidecars=sidecars):
        expected = 0.0
        for micro in batches["holdout"][0].micro:
            for ids, mask in zip(micro["input_ids"], micro["attention_mask"], strict=True):
                expected += float(embeddings[ids[mask.bool()]][:, :WIDTH].mean(0).sum())
            assert micro["reference_embeddings"].shape == (BATCH, WIDTH)
        series.append(run_round(method, engine, batches))
        assert series[-1]["embedding"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert series[0]["forget_loss"] == pytest.approx(1.0, rel=1e-4)  # the model is still the reference model
    assert series[-1]["forget_loss"] < 1.0


def test_a_plan_knows_their_shapes(prepared: PreparedData) -> None:
    shape = load_causal_lm(TARGET)[0].config
    batch = micro_batch(shape, 2, 10, 4, [Need("forget", NLL, of=Reversed()), Need("forget", Embeddings(3))])
    assert batch["other_reference_nll"].shape == (2,)
    assert batch["other_input_ids"].shape == (2, 10)
    assert batch["reference_embeddings"].shape == (2, 3)


def test_other_settings_are_another_table(prepared: PreparedData, tmp_path: Path) -> None:
    plan = write_plan(
        prepared.streams, str(tmp_path / "plan"), batches_per_round={"forget": 1}, rounds=1, batch_size=1, workers=1,
        seed=0,
    )  # fmt: skip
    places = {"folder": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    for first in (1, 2):
        write_references([Need("holdout", Embeddings(first))], prepared, plan, TARGET, **places)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2
