"""Bounded forget losses, their level, the projection, and rounds with nothing left to forget."""

import dataclasses
import math
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ofmu_ray.algorithm.losses import bounded_rows, bounded_tokens, capped, matched_rows
from ofmu_ray.algorithm.two_loop import RoundStats, project
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import ModelConfig, OptimizerConfig, StopConfig, UnlearnConfig, apply_overrides
from ofmu_ray.data.batches import collate
from ofmu_ray.data.stored_stream import TokenisedStream
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.training.worker import Worker

ROWS = [
    {"input_ids": [5, 9, 11, 30, 31, 2], "prompt_tokens": 3},
    {"input_ids": [7, 40, 41, 42, 2], "prompt_tokens": 1},
]


def tiny_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    module, tokenizer = load_causal_lm(ModelConfig(path="builtin:people/target"))
    return module, collate(ROWS, tokenizer.pad_token_id)


def bounded(level: float, **options: object) -> OFMUConfig:
    return OFMUConfig.from_preset("first_order", forget_level=level, **options)


def token_losses(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return [row[mask] for row, mask in zip(nll, labels != -100, strict=True)]


def test_bounded_losses_by_hand() -> None:
    nll = torch.tensor([1.0, 5.0, 9.0], requires_grad=True)
    total, count = bounded_tokens(nll, level=6.0)
    total.backward()
    assert (float(total), count, nll.grad.tolist()) == (12.0, 3, [1.0, 1.0, 0.0])

    sums, tokens = torch.tensor([8.0, 21.0], requires_grad=True), torch.tensor([4.0, 3.0])
    total, count = bounded_rows(sums, tokens, level=6.0)  # means of 2 and 7 nats a token
    total.backward()
    assert (float(total), float(count), sums.grad.tolist()) == (8.0 + 18.0, 7.0, [1.0, 0.0])

    # rows with means of 2, 7, 5.5 and 6.5 of what counts, up to 12 a token; from 5.4 to 6.6 is at the level
    nll = torch.tensor([1.0, 3.0, 2.0, 20.0, 5.0, 6.0, 4.0, 9.0], requires_grad=True)
    total, count = matched_rows(nll, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 4, level=6.0)
    total.backward()
    assert float(total) == pytest.approx(2 * (6 - 3.4) + 2 * (6 - 0.4) + 12 + 12)
    assert (float(count), nll.grad.tolist()) == (8.0, [1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert [capped(level) for level in (0.5, 3.0, 6.0)] == [3.5, 6.0, 12.0]
    far = torch.tensor([30.0, 1.0], requires_grad=True)  # 6 beyond twice 12; the row has a mean of 6.5
    total, _ = matched_rows(far, torch.tensor([0, 0]), 1, level=6.0)
    total.backward()
    assert (float(total), far.grad.tolist()) == (2 * 6.0 - 6.0, [-1.0, 0.0])


@pytest.mark.parametrize("loss", ["nll", "bounded_token", "bounded_row", "matched_row", "simnpo", "npo"])
def test_one_inner_step_raises_the_named_loss(loss: str) -> None:
    """One plain gradient step of the inner loop ascends the written formula, by autograd on plain logits."""
    module, batch = tiny_model()
    module.double()
    losses = [row.detach() for row in token_losses(module, batch)]
    between = float(torch.stack([row.mean() for row in losses]).mean())  # one row has a gradient, the other none
    levels = {"bounded_row": between, "matched_row": between / 1.1}
    level = levels.get(loss, 1.01 * float(torch.cat(losses).median()))  # cuts some tokens off
    rate, beta = 1e-3, 0.5
    reference = torch.tensor([10.0, 12.0], dtype=torch.float64)
    rows = token_losses(module, batch)
    tokens = sum(len(row) for row in rows)
    expected = {
        "nll": lambda: sum(row.sum() for row in rows) / tokens,
        "bounded_token": lambda: sum(torch.minimum(row, row.new_tensor(level)).sum() for row in rows) / tokens,
        "bounded_row": lambda: sum(len(row) * row.mean().clamp(max=level) for row in rows) / tokens,
        "matched_row": lambda: (  # no token is beyond twice the level
            sum(len(row) * (level - ((row.mean() - level).abs() - 0.1 * level).clamp(min=0)) for row in rows) / tokens
        ),
        "simnpo": lambda: sum(2 / beta * torch.log(torch.sigmoid(beta * row.mean())) for row in rows) / 2,
        "npo": lambda: (
            sum(
                2 / beta * torch.log(torch.sigmoid(beta * (row.sum() - known)))
                for row, known in zip(rows, reference, strict=True)
            )
            / 2
        ),
    }[loss]()
    start = [p.detach().clone() for p in module.parameters()]
    step = [rate * g for g in torch.autograd.grad(expected, list(module.parameters()))]
    plain = OptimizerConfig(name="sgd", lr=rate, clip=None)
    engine = TorchEngine(module, inner=plain, outer=dataclasses.replace(plain, lr=1e-30))
    options = {"inner_steps": 1, "outer_steps": 1, "forget_beta": beta, "forget_loss": loss}
    metrics = OFMU(bounded(level, **options)).round(engine, [{**batch, "reference_nll": reference}], [batch])
    assert metrics["forget_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert any(bool(moved.any()) for moved in step)
    for parameter, before, moved in zip(module.parameters(), start, step, strict=True):
        torch.testing.assert_close(parameter.detach() - before, moved, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("loss", ["bounded_token", "bounded_row", "matched_row"])
def test_a_batch_at_its_level_takes_no_step(loss: str) -> None:
    """Not even one from Adam's momentum; and the round reports it."""
    module, batch = tiny_model()
    far = bounded(1e3, forget_loss=loss, outer_steps=1)
    still = OptimizerConfig(name="sgd", lr=1e-30, clip=None)
    engine = TorchEngine(module, inner=OptimizerConfig(lr=1e-4), outer=still)
    before = engine.weights()
    assert OFMU(far).round(engine, [batch], [batch])["skipped_ascents"] == 0
    moved = engine.weights()
    assert not torch.equal(before[0], moved[0])
    means = torch.stack([row.detach().mean() for row in token_losses(module, batch)])
    assert float(means.max()) < 1.1 * float(means.mean())
    near = bounded(float(means.mean()) if loss == "matched_row" else 1e-6, forget_loss=loss, outer_steps=1)
    method = OFMU(near)
    metrics = method.round(engine, [batch], [batch])
    assert metrics["skipped_ascents"] == near.inner_steps
    assert ["no ascent step taken" in note for note in method.notes] == [True]
    assert metrics["inner_gradient_norm"] == 0
    assert torch.equal(engine.weights()[0], moved[0])
    assert engine.account.gradient_passes == {"forget": 6, "retain": 2}


def one_beyond_the_level() -> tuple[torch.nn.Module, float, list[dict[str, torch.Tensor]]]:
    """A model, a level, and a forget batch beyond it, another below it, and a retain batch."""
    module, both = tiny_model()
    means = [float(row.detach().mean()) for row in token_losses(module, both)]
    order = sorted(range(2), key=lambda row: -means[row])
    return module, 0.5 * sum(means), [*(collate([ROWS[row]], 0) for row in order), both]


def test_a_skipped_step_leaves_its_refresh_of_the_similarity_to_the_next() -> None:
    """Else the rest of a round of `lite` would ascend without decorrelation."""
    module, level, (beyond, below, retain) = one_beyond_the_level()
    still = OptimizerConfig(name="sgd", lr=1e-30, clip=None)
    options = {"inner_steps": 3, "rho": 0.0, "forget_loss": "bounded_row", "forget_level": level}
    method = OFMU(OFMUConfig.from_preset("lite", relative_step=1e-4, **options))
    engine = TorchEngine(module, inner=still, outer=still)
    metrics = method.round(engine, [beyond, below, below], [retain])
    assert metrics["skipped_ascents"] == 1
    assert "gradient_cosine" in metrics
    assert engine.account.gradient_passes == {"forget": 4, "retain": 3}


def test_a_penalty_measures_the_steps_that_skipped_ascents_left_unknown() -> None:
    module, level, (beyond, below, retain) = one_beyond_the_level()
    still = OptimizerConfig(name="sgd", lr=1e-30, clip=None)
    options = {"inner_steps": 1, "forget_loss": "bounded_row", "forget_level": level}
    method = OFMU(OFMUConfig.from_preset("full", **options))
    engine = TorchEngine(module, inner=still, outer=still)
    metrics = method.round(engine, [beyond, below], [retain])
    assert metrics["skipped_ascents"] == 1
    assert metrics["penalty_norm"] > 0
    assert set(method.steps.products) == {"forget", "retain", "penalty"}


def test_projection_takes_out_what_raises_the_retain_loss() -> None:
    class Space:
        def __init__(self, mean: list[float] | None):
            self.mean = None if mean is None else [torch.tensor(mean)]

        def first_moment(self, loop: str) -> list[torch.Tensor] | None:
            assert loop == "outer"
            return self.mean

        def dot(self, *pairs: tuple[list[torch.Tensor], list[torch.Tensor]]) -> list[float]:
            return [float(a[0] @ b[0]) for a, b in pairs]

    def projected(mean: list[float] | None, share: float) -> tuple[list[float], RoundStats]:
        ascent, stats = [torch.tensor([3.0, 4.0])], RoundStats()
        project(Space(mean), ascent, share, stats)  # type: ignore[arg-type]
        return ascent[0].tolist(), stats

    assert projected([2.0, 0.0], 1.0)[0] == [0.0, 4.0]
    vector, stats = projected([2.0, 0.0], 0.5)
    assert (vector, stats.conflict_cosine) == ([1.5, 4.0], pytest.approx(0.6))
    assert projected([-2.0, 0.0], 1.0)[0] == [3.0, 4.0]  # what lowers the retain loss stays
    assert projected(None, 1.0) == ([3.0, 4.0], RoundStats())
    assert projected([0.0, 0.0], 1.0)[0] == [3.0, 4.0]


def test_first_moment_is_the_running_mean_of_the_gradients() -> None:
    module, batch = tiny_model()
    engine = TorchEngine(module, outer=OptimizerConfig(lr=1e-4, beta1=0.5, clip=None))
    assert engine.first_moment("outer") is None
    expected = torch.zeros(engine.numel)
    for _ in range(2):
        gradient, _ = engine.gradient(batch, kind="retain")
        expected = 0.5 * expected + 0.5 * gradient[0]
        engine.apply(gradient, "outer")
    moment = engine.first_moment("outer")
    assert moment is not None
    torch.testing.assert_close(moment[0], expected, rtol=1e-5, atol=1e-8)
    assert engine.first_moment("inner") is None


def test_first_order_makes_one_pass_an_update() -> None:
    module, batch = tiny_model()
    engine = TorchEngine(module)
    method = OFMU(bounded(1e3, inner_steps=4, outer_steps=5, projection=0.5))
    assert method.batches_per_round() == {"forget": 4, "retain": 5}
    method.round(engine, [batch], [batch])
    assert engine.account.gradient_passes == {"forget": 4, "retain": 5}
    assert engine.account.updates == 9


def written_stream(folder, name: str, rows: list[dict[str, object]]) -> TokenisedStream:
    folder.mkdir(parents=True)
    table = pa.table(
        {key: [row[key] for row in rows] for key in rows[0]} | {"row_id": [f"{name}:{i}" for i in range(len(rows))]}
    )
    pq.write_table(table, folder / "part.parquet")
    lengths = [len(row["input_ids"]) for row in rows]  # type: ignore[arg-type]
    none, stored = np.empty(0, dtype=np.int64), (("part.parquet", len(rows)),)
    return TokenisedStream(name, str(folder), stored, none, sum(lengths), max(lengths), name)


def test_level_from_holdout_rows_and_from_frequencies(tmp_path) -> None:
    holdout = written_stream(tmp_path / "holdout", "holdout", ROWS)  # type: ignore[arg-type]
    retain = written_stream(tmp_path / "retain", "retain", [{"input_ids": [3, 3, 5, 5, 6, 7], "prompt_tokens": 2}])
    prepared = types.SimpleNamespace(streams={"retain": retain, "holdout": holdout}, encoder=None)
    model = ModelConfig(path=resolve_builtin("builtin:people/target"))
    module, batch = tiny_model()
    losses = [float(row.mean()) for row in token_losses(module, batch)]

    def level(wanted: float | str | None, streams: object = prepared, loss: str = "bounded_token") -> object:
        config = OFMUConfig(forget_loss=loss, forget_level=wanted)  # type: ignore[arg-type]
        return config.completed(streams, model, str(tmp_path / "cache")).forget_level  # type: ignore[arg-type]

    assert level("holdout") == pytest.approx(np.mean(losses), rel=1e-5)
    assert level(None) == level("holdout")
    assert level("holdout:0.75") == pytest.approx(np.quantile(losses, 0.75), rel=1e-5)
    # answers 5 5 6 7: one token in two, two in four
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert level("unigram") == pytest.approx(entropy)
    assert level(None, types.SimpleNamespace(streams={"retain": retain})) == pytest.approx(entropy)
    assert level(3) == 3.0
    assert level(None, loss="nll") is None


def test_the_level_can_be_another_models(tmp_path, monkeypatch) -> None:
    """It is left to workers only if it is theirs, the model to change, and computed once for runs one after another."""
    stream = written_stream(tmp_path / "holdout", "holdout", ROWS)  # type: ignore[arg-type]
    prepared = types.SimpleNamespace(streams={"holdout": stream}, encoder=None)
    first = resolve_builtin("builtin:people/target")
    changed, tokenizer = tiny_model()[0], load_causal_lm(ModelConfig(path=first))[1]
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    changed.save_pretrained(tmp_path / "changed")
    tokenizer.save_pretrained(tmp_path / "changed")
    model, cache = ModelConfig(path=str(tmp_path / "changed")), str(tmp_path / "cache")

    def level(left: list[object] | None = None, **options: object) -> object:
        config = OFMUConfig(forget_loss="bounded_row", **options)  # type: ignore[arg-type]
        return config.completed(prepared, model, cache, left).forget_level  # type: ignore[arg-type]

    expected = np.mean([float(row.mean()) for row in token_losses(*tiny_model())])
    theirs: list[object] = []
    assert level(theirs, level_model=model.path) == level([]) == "holdout"
    assert len(theirs) == 1
    left: list[object] = []
    assert level(left, level_model=first) == pytest.approx(expected, rel=1e-5)
    assert left == []
    assert level() != pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr("ofmu_ray.features.reference._room", lambda: 1)
    with pytest.raises(UserError, match=r"^ofmu\.level_model = .*do not fit.*or give ofmu\.forget_level in nats"):
        OFMUConfig(forget_loss="bounded_row", level_model=first).completed(  # the cache has nothing
            prepared, model, str(tmp_path / "other"), left
        )
    tables = set((tmp_path / "cache").rglob("*.parquet"))
    assert level(level_model=first) == pytest.approx(expected, rel=1e-5)
    assert set((tmp_path / "cache").rglob("*.parquet")) == tables


@pytest.mark.parametrize("level", [0.0, -1.0, "hold", "holdout:2", "holdout:x", "unigram:0.5"])
def test_levels_that_mean_nothing_are_refused(level: float | str) -> None:
    with pytest.raises(UserError, match=r"ofmu\.forget_level = .*: must be nats per token"):
        OFMUConfig(forget_level=level)


def test_a_level_from_holdout_rows_needs_them() -> None:
    """Refused when the configuration is built, before a name is claimed or Ray is started."""
    own = {"data.forget.path": "mine.jsonl", "ofmu.forget_level": "holdout:0.5"}
    with pytest.raises(UserError, match=r"ofmu\.forget_level = 'holdout:0\.5'.*data\.holdout"):
        apply_overrides(UnlearnConfig(), own)
    apply_overrides(UnlearnConfig(), {"ofmu.forget_level": "holdout"})  # the built-in rows have theirs
    apply_overrides(UnlearnConfig(), {**own, "data.holdout": {"path": "unseen.jsonl"}})
    apply_overrides(UnlearnConfig(), {**own, "ofmu.forget_loss": "nll"})
    apply_overrides(UnlearnConfig(), {**own, "method": "npo"})


def test_holdout_rows_are_read_only_where_they_decide() -> None:
    def streams(**changes: object) -> set[str]:
        return set(apply_overrides(UnlearnConfig(), {f"ofmu.{name}": value for name, value in changes.items()}).sources)

    assert streams() == streams(forget_level="holdout:0.5") == {"forget", "retain", "holdout"}
    assert streams(forget_level=5.0) == streams(forget_level="unigram") == streams(forget_loss="nll")
    assert streams(preset="full") == set(UnlearnConfig(method="npo").sources) == {"forget", "retain"}


def test_the_outer_rate_follows_the_inner_one_unless_it_is_given() -> None:
    given = {"ofmu.inner.lr": 1e-3, "ofmu.outer.lr": 1e-4}
    assert apply_overrides(UnlearnConfig(), given).ofmu.optimizers[1].lr == 1e-4
    inner, outer = apply_overrides(UnlearnConfig(), {"ofmu.inner.lr": 1e-3, "ofmu.outer_ratio": 0.5}).ofmu.optimizers
    assert (inner.lr, outer.lr) == (1e-3, 5e-4)
    with pytest.raises(UserError, match=r"ofmu\.projection = 0\.5 needs the first moment"):
        OFMUConfig(projection=0.5, outer=OptimizerConfig(name="sgd"))
    with pytest.raises(UserError, match=r"ofmu\.projection needs a first moment of retain gradients alone"):
        OFMUConfig(projection=0.5, shared_optimizer=True)


@pytest.mark.parametrize(
    ("skipped", "patience", "ends"),
    [([0, 3, 3], 2, True), ([3, 0, 3], 2, False), ([3], 2, False), ([3, 3], None, False), ([3, 2], 1, False)],
)
def test_a_run_ends_when_nothing_is_left_to_forget(skipped: list[int], patience: int | None, ends: bool) -> None:
    worker = Worker.__new__(Worker)
    worker.job = types.SimpleNamespace(stop=StopConfig(forgotten=patience), method=bounded(5.0))  # type: ignore[assignment]
    worker.state = types.SimpleNamespace(series=[{"skipped_ascents": n} for n in skipped], message="")  # type: ignore[assignment]
    assert worker.forgotten() is ends
    assert ("stop.forgotten" in worker.state.message) is ends
