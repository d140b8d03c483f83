"""Search spaces, and the overrides by which draws, labels and splits change a configuration."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import LABELS, METHODS, BenchmarkConfig, SearchConfig, UnlearnConfig, apply_overrides
from ofmu_ray.errors import UserError
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.search.priors import at, text_of
from ofmu_ray.search.run_benchmark import space_of
from ofmu_ray.search.spaces import read_space, space_for
from ofmu_ray.search.suggest import EarlierTrial, Search
from tune_spaces import (
    Choice,
    Integers,
    Knob,
    LogUniform,
    Space,
    Uniform,
    ZeroOrLogUniform,
    parse_prior,
)

BASE = UnlearnConfig()
CONFIGS = Path(__file__).resolve().parent.parent / "pipelines/configs"
LITE = space_for("ofmu_lite", BASE)


def test_every_method_has_a_space_of_its_own_fields_with_sources():
    for label, options in LABELS.items():
        base = apply_overrides(BASE, options)
        space = space_for(label, base)
        assert space.knobs
        space.check(base)
        for knob in space.knobs:
            assert knob.field.split(".")[0] == label.removesuffix("_full").removesuffix("_lite")
            assert len(knob.why) > 20


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_reproducible_and_fit_the_configuration(method):
    space = Space.of(method).scaled(30)
    draws = space.draws(6, 3, BASE)
    assert draws == space.draws(6, 3, BASE)
    assert draws != space.draws(6, 4, BASE)
    for draw in draws:
        changed = apply_overrides(BASE, {"method": method, **draw})
        assert changed != BASE
        assert changed.method == method


SUGGESTED = [
    {
        "ofmu.beta": 0.01047,
        "ofmu.inner.decay": "linear",
        "ofmu.inner.lr": 1.263e-05,
        "ofmu.inner_steps": 6,
        "ofmu.outer.lr": 8.818e-05,
        "ofmu.outer_steps": 6,
        "ofmu.rho": 0.0003889,
        "ofmu.rho_growth": 1.014,
    },
    {
        "ofmu.beta": 0.0,
        "ofmu.inner.decay": "linear",
        "ofmu.inner.lr": 5.985e-06,
        "ofmu.inner_steps": 3,
        "ofmu.outer.lr": 7.689e-06,
        "ofmu.outer_steps": 3,
        "ofmu.rho": 0.001373,
        "ofmu.rho_growth": 1.089,
    },
    {
        "ofmu.beta": 0.9316,
        "ofmu.inner.decay": "constant",
        "ofmu.inner.lr": 3.834e-06,
        "ofmu.inner_steps": 6,
        "ofmu.outer.lr": 2.411e-05,
        "ofmu.outer_steps": 4,
        "ofmu.rho": 0.0,
    },
]
FIRST_DRAWS = {
    "ofmu": [
        {"ofmu.inner.lr": 3.522e-05, "ofmu.outer_ratio": 0.4546},
        {"ofmu.inner.lr": 5.374e-05, "ofmu.outer_ratio": 0.6147},
        {"ofmu.inner.lr": 4.132e-05, "ofmu.outer_ratio": 0.5372},
    ],
    "npo": [
        {"npo.beta": 0.1975, "npo.optimizer.lr": 1.03e-05, "npo.retain_weight": 7.955},
        {"npo.beta": 0.7764, "npo.optimizer.lr": 2.584e-05, "npo.retain_weight": 0.5259},
        {"npo.beta": 0.4214, "npo.optimizer.lr": 1.458e-05, "npo.retain_weight": 2.93},
    ],
    "rmu": [
        {"rmu.optimizer.lr": 1.03e-05, "rmu.retain_weight": 7.955, "rmu.steering": 11.88},
        {"rmu.optimizer.lr": 2.584e-05, "rmu.retain_weight": 0.5259, "rmu.steering": 71.73},
        {"rmu.optimizer.lr": 1.458e-05, "rmu.retain_weight": 2.93, "rmu.steering": 32.14},
    ],
    "simnpo": [
        {"simnpo.beta": 3.881, "simnpo.forget_weight": 0.8066, "simnpo.optimizer.lr": 1.03e-05},
        {"simnpo.beta": 5.247, "simnpo.forget_weight": 0.06292, "simnpo.optimizer.lr": 2.584e-05},
        {"simnpo.beta": 4.637, "simnpo.forget_weight": 0.3157, "simnpo.optimizer.lr": 1.458e-05},
    ],
    "grad_diff": [
        {"grad_diff.optimizer.lr": 1.03e-05, "grad_diff.retain_weight": 2.502},
        {"grad_diff.optimizer.lr": 2.584e-05, "grad_diff.retain_weight": 8.056},
        {"grad_diff.optimizer.lr": 1.458e-05, "grad_diff.retain_weight": 4.779},
    ],
}
"""The first of eight draws with seed 0, unchanged since the first benchmark, whose runs are found by them."""


@pytest.mark.parametrize("method", FIRST_DRAWS)
def test_draws_are_those_of_earlier_benchmarks(method):
    base = apply_overrides(BASE, {"method": method})
    assert space_for(method, base).draws(8, 0, base)[:3] == FIRST_DRAWS[method]


def test_suggestions_are_those_of_earlier_sweeps():
    """Sobol points, and the estimator's suggestions."""
    base = apply_overrides(BASE, LABELS["ofmu_lite"])
    goal = Goal("forget_quality", "model_utility", 0.5)
    search = Search(SearchConfig(kind="tpe", startup_trials=4), space_for("ofmu_lite", base), base, goal)
    earlier: list[EarlierTrial] = []
    for number in range(6):
        metrics = {"forget_quality": 0.1 + 0.05 * ((number * 7) % 5), "model_utility": 0.6}
        earlier.append(EarlierTrial(search.suggest(number, earlier), "finished", [metrics], flops=1e9 * (1 + number)))
    assert [one.suggestion.options for one in (earlier[0], earlier[3], earlier[5])] == SUGGESTED


@given(st.integers(1, 30), st.integers(0, 1000))
def test_draws_cover_each_range_once_per_part(count, seed):
    """A Latin hypercube: for each field, one value in each of `count` parts of equal probability."""
    space = Space((Knob("npo.beta", LogUniform(1e-3, 1e1), ""), Knob("npo.retain_weight", Uniform(0.0, 2.0), "")))
    draws = space.draws(count, seed, BASE)
    logs = [math.log10(draw["npo.beta"]) for draw in draws]
    assert sorted(int((x + 3) / 4 * count - 1e-3) for x in logs) == pytest.approx(range(count), abs=1)
    parts = np.floor(np.array([draw["npo.retain_weight"] for draw in draws]) / 2 * count + 1e-3)
    assert np.abs(np.sort(parts) - np.arange(count)).max() <= 1


def test_a_field_without_its_condition_is_not_drawn():
    lite = apply_overrides(BASE, LABELS["ofmu_lite"])
    draws = LITE.with_priors({"ofmu.rho": Choice((0.0, 1e-3))}).draws(8, 0, lite)
    assert {("ofmu.rho_growth" in draw, draw["ofmu.rho"] > 0) for draw in draws} == {(True, True), (False, False)}
    fixed = LITE.with_priors({"ofmu.rho": None})
    without = apply_overrides(lite, {"ofmu.rho": 0})
    assert all("ofmu.rho_growth" in draw for draw in fixed.draws(3, 0, lite))
    assert not any("ofmu.rho_growth" in draw for draw in fixed.draws(3, 0, without))


def test_a_second_round_is_drawn_around_the_best():
    space = Space(
        (
            Knob("ofmu.inner.lr", LogUniform(1e-6, 1e-2), "wide"),
            Knob("ofmu.beta", Uniform(0.0, 0.8), "wide"),
            Knob("ofmu.inner_steps", Integers(1, 17), "wide"),
            Knob("ofmu.rho", ZeroOrLogUniform(1e-8, 1.0), "wide"),
            Knob("ofmu.rho_growth", Uniform(1.0, 1.1), "wide", given="ofmu.rho"),
            Knob("ofmu.inner.decay", Choice(("constant", "linear")), "wide"),
        )
    )
    best = {"ofmu.inner.lr": 1e-4, "ofmu.beta": 0.05, "ofmu.inner_steps": 17, "ofmu.rho": 1e-3, "ofmu.rho_growth": 1.05,
            "ofmu.inner.decay": "linear"}  # fmt: skip
    near = {knob.field: knob.prior for knob in space.around(best, "near").knobs}
    rate, rho = near["ofmu.inner.lr"], near["ofmu.rho"]
    assert isinstance(rate, FloatDistribution)
    assert isinstance(rho, FloatDistribution)
    assert rate.log
    assert rho.log
    assert (rate.low, rate.high) == pytest.approx((1e-4 / 10**0.5, 1e-4 * 10**0.5))  # an eighth of four decades
    assert (rho.low, rho.high) == pytest.approx((1e-4, 1e-2))
    assert text_of(near["ofmu.beta"]) == "uniform(0, 0.15)"  # clipped to the prior
    assert near["ofmu.inner_steps"] == Integers(15, 17)
    assert near["ofmu.inner.decay"] == Choice(("linear",))
    draws = space.around(best, "near").draws(6, (3, 1), BASE)
    assert draws == space.around(best, "near").draws(6, (3, 1), BASE)
    assert len({draw["ofmu.inner.lr"] for draw in draws}) == 6
    for draw in draws:
        apply_overrides(BASE, draw)
    off = {name: value for name, value in best.items() if name != "ofmu.rho_growth"} | {"ofmu.rho": 0.0}
    left = space.around(off, "near")
    assert {draw["ofmu.rho"] for draw in left.draws(3, 0, BASE)} == {0.0}
    assert "ofmu.rho_growth" not in {knob.field for knob in left.knobs}


def test_priors_as_text():
    pairs = {
        "loguniform(1e-5, 1e-3)": LogUniform(1e-5, 1e-3),
        "uniform(0, 2)": Uniform(0, 2),
        "integer(1, 4)": Integers(1, 4),
        "choice(npo, 1e-2, null)": Choice(("npo", 1e-2, None)),
        "zero_or_loguniform(1e-4, 1e-2)": ZeroOrLogUniform(1e-4, 1e-2),
        "zero_or_loguniform(1e-4, 1e-2, 0.5)": ZeroOrLogUniform(1e-4, 1e-2, 0.5),
    }
    for text, prior in pairs.items():
        assert parse_prior(text) == prior
        assert parse_prior(text_of(prior)) == prior
    assert {at(Integers(1, 3), q / 10) for q in range(10)} == {1, 2, 3}


def test_a_term_is_optional():
    prior = ZeroOrLogUniform(1e-4, 1e-2, 0.25)
    values = [at(prior, q / 100) for q in range(100)]
    assert values.count(0.0) == 25
    assert at(prior, 0.25) == 1e-4
    assert at(prior, 1 - 1e-12) == pytest.approx(1e-2)
    assert at(prior, 0.625) == pytest.approx(1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("benchmark_*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_benchmark_can_draw(path):
    config = parse(BenchmarkConfig, ["--config", str(path)], "ofmu benchmark")
    for label in config.methods:
        assert space_of(config, label).draws(2, 0, config.run(next(iter(config.splits)), label))


def test_spaces_from_files(tmp_path):
    start = LITE
    (tmp_path / "priors.yaml").write_text("ofmu.beta: loguniform(1e-3, 1e-2)\nofmu: {rho: null}\n")
    space = read_space(str(tmp_path / "priors.yaml"), start)
    assert {knob.field: knob.prior for knob in space.knobs}["ofmu.beta"] == LogUniform(1e-3, 1e-2)
    assert {knob.field for knob in start.knobs} - {knob.field for knob in space.knobs} == {"ofmu.rho"}
    (tmp_path / "space.py").write_text(
        "from tune_spaces import *\nSPACE = Space((Knob('ofmu.beta', Choice((0.0, 1.0)), 'a test'),))\n"
    )
    assert read_space(str(tmp_path / "space.py"), start) == Space((Knob("ofmu.beta", Choice((0.0, 1.0)), "a test"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "ofmu.beta: 0.3", r"a.yaml: ofmu.beta = 0.3 is not a prior"),
        (
            "a.yaml",
            "ofmu.beta: loguniform(1)",
            r"a.yaml: ofmu.beta: prior 'loguniform\(1\)': loguniform takes two numbers",
        ),
        ("a.yaml", "- 3", r"must contain priors by field"),
        ("a.yaml", "a: [", r"not YAML"),
        ("a.py", "SPACE = 3", r"must define SPACE"),
        ("a.txt", "", r"name a .yaml file"),
    ],
)
def test_bad_files_are_the_users_mistake(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_space(str(tmp_path / name), LITE)


@pytest.mark.parametrize(
    "text", ["normal(0, 1)", "uniform(1)", "uniform(2, 1)", "loguniform(0, 1)", "integer(1.5, 2)", "choice()", "1e-3"]
)
def test_bad_priors_are_the_users_mistake(text):
    with pytest.raises(UserError, match="prior"):
        parse_prior(text)


def test_overrides_reach_sections_lists_and_optional_ones():
    changed = apply_overrides(
        BASE,
        {
            "data": {"forget.path": ["a.json", "b.json"]},
            "data.retain.path": "c.json",
            "model.lora": {"rank": 4},
            "evaluation.clusters": {"forget": 20},
            "evaluation.sets.probes": [{"name": "p", "forget": "d.json"}],
            "npo.optimizer.lr": 1,
            "stop.utility_floor": None,
        },
    )
    assert changed.data.forget.path == ["a.json", "b.json"]
    assert (changed.data.retain.path, changed.model.lora.rank) == ("c.json", 4)
    assert changed.evaluation.clusters == {"forget": 20}
    assert changed.evaluation.sets.probes[0].forget == "d.json"
    assert isinstance(changed.npo.optimizer.lr, float)
    assert changed.evaluation.sets.world_facts == BASE.evaluation.sets.world_facts
    assert changed.data.format == BASE.data.format


def test_a_preset_comes_before_the_fields_next_to_it():
    changed = apply_overrides(BASE, {"ofmu.decorrelate_every": 2, "ofmu.preset": "full"})
    assert changed.ofmu.penalty_curvature == "full"
    assert changed.ofmu.decorrelate_every == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"npo.betta": 1.0}, "unknown option npo.betta. Did you mean beta"),
        ({"npoo.beta": 1.0}, "unknown option npoo. Did you mean npo"),
        ({"npo.beta": "much"}, "npo.beta = 'much': must be float"),
        ({"npo.beta": -1.0}, "npo.beta = -1.0: must be greater than 0"),
        ({"ofmu.inner_steps": 2.5}, "ofmu.inner_steps = 2.5: must be int"),
        ({"ofmu.inner_steps": True}, "must be int"),
        ({"ofmu.preset": "ful"}, "must be first_order, lite, full"),
        ({"npo": 3}, "npo = 3"),
    ],
)
def test_wrong_overrides_name_the_option(overrides, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(BASE, overrides)


# --------------------------------------------------------------------------------------------- benchmark options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["npoo"]}, "no method 'npoo'. Did you mean npo"),
        ({"methods": []}, "methods"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "without repetitions"),
        ({"seeds": [0, 1]}, "tuning.seed = 0"),
        ({"splits": {"x": {"data.forgt.path": "y"}}}, "unknown option x: data.forgt"),
        (
            {"labels": {"mine": {"method": "npo", "npo.bta": 1}}, "methods": ["mine"]},
            "mine: npo.bta. Did you mean beta",
        ),
        ({"ablation": {"of": "dpo", "variants": {"v": {}}}}, "ablation.of"),
    ],
)
def test_mistakes_in_a_benchmark_are_found_when_it_is_read(options, message):
    from ofmu_ray.config import AblationConfig

    if "ablation" in options:
        options = {"ablation": AblationConfig(**options["ablation"])}
    with pytest.raises(UserError, match=message):
        BenchmarkConfig(**options)


def test_a_split_with_its_own_rows_leaves_the_built_in_rows():
    """`auto` in the base was resolved to the built-in rows before the split named others."""
    rows = {"data.forget.path": "f.json", "data.retain.path": "r.json", "evaluation.sets.forget": "p.json"}
    config = BenchmarkConfig(splits={"own": rows, "people": {}}, methods=["npo"])
    own, people = config.run("own", "npo"), config.run("people", "npo")
    assert (own.evaluation.sets.forget, own.evaluation.sets.world_facts) == ("p.json", None)
    assert own.evaluation.retrained is None
    assert own.evaluation.clusters is None
    assert people.evaluation == UnlearnConfig().evaluation


def test_what_a_label_fixes_is_not_tuned():
    from ofmu_ray.search.run_benchmark import space_of

    labels = {"one_step": {"method": "ofmu", "ofmu.preset": "full", "ofmu.inner_steps": 1}}
    config = BenchmarkConfig(methods=["one_step"], labels=labels)
    fields = {knob.field for knob in space_of(config, "one_step").knobs}
    assert fields == {knob.field for knob in Space.of("ofmu").knobs} - {"ofmu.inner_steps"}
    assert config.run("people", "one_step", {"ofmu.beta": 0.5}).ofmu.inner_steps == 1
