"""The sweep's report recommends and qualifies; its numbers follow from the data; it handles partial data."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ofmu_ray.attacks.importance import MINIMUM_TRIALS
from ofmu_ray.metrics.rule import Goal
from ofmu_ray.reporting import formats
from ofmu_ray.reporting.sweep_page import write_sweep_report

pytestmark = pytest.mark.slow

FLOOR = 0.54
SPACE = [
    {"field": "ofmu.inner.lr", "prior": "loguniform(3e-06, 0.0001)", "why": "half a decade <below>", "given": None},
    {"field": "ofmu.outer.lr", "prior": "loguniform(3e-06, 0.0001)", "why": "a decade above", "given": None},
    {"field": "ofmu.inner_steps", "prior": "integer(1, 4)", "why": "the paper's", "given": None},
    {"field": "ofmu.rho", "prior": "zero_or_loguniform(1e-05, 0.01)", "why": "small", "given": None},
    {"field": "ofmu.rho_growth", "prior": "uniform(1, 1.1)", "why": "more than 1", "given": "ofmu.rho"},
    {"field": "ofmu.schedule", "prior": "choice(constant, linear)", "why": "both", "given": None},
]
REFERENCES = {
    "target": {
        "forget_quality": {"value": 2e-9, "low": 1e-11, "high": 3e-6, "n": 40},
        "model_utility": {"value": 0.6, "low": 0.57, "high": 0.63, "n": 300},
    },
    "retrained": {
        "forget_quality": {"value": 1.0, "low": 1.0, "high": 1.0, "n": 40},
        "model_utility": {"value": 0.58, "low": 0.55, "high": 0.61, "n": 300},
    },
}
CHOSEN_FIGURES = {
    "forget_quality": {"value": 0.31, "low": 0.05, "high": 0.7, "n": 40},
    "model_utility": {"value": 0.563, "low": 0.53, "high": 0.59, "n": 400},
    "forget_rouge": {"value": 0.4, "low": 0.35, "high": 0.45, "n": 40},
}
Options = dict[str, Any]


def draw(rng: np.random.Generator) -> Options:
    options = {
        "ofmu.inner.lr": float(10 ** rng.uniform(-5.5, -4)), "ofmu.outer.lr": float(10 ** rng.uniform(-5.5, -4)),
        "ofmu.inner_steps": int(rng.integers(1, 5)), "ofmu.schedule": ["constant", "linear"][rng.integers(2)],
        "ofmu.rho": 0.0 if rng.random() < 0.3 else float(10 ** rng.uniform(-5, -2)),
    }  # fmt: skip
    return options | ({"ofmu.rho_growth": float(rng.uniform(1, 1.1))} if options["ofmu.rho"] else {})


def judged(options: Options, rng: np.random.Generator, share: float = 1.0) -> dict[str, float]:
    """A higher inner learning rate forgets more and keeps less."""
    strength = (np.log10(options["ofmu.inner.lr"]) + 5.5) / 1.5 * share + 0.05 * options["ofmu.inner_steps"]
    quality = 10 ** (-9 + 9 * np.sqrt(strength / 1.2) + 0.3 * rng.standard_normal())
    utility = 0.6 - 0.12 * strength**2 + 0.005 * rng.standard_normal()
    return {"forget_quality": float(min(quality, 0.99)), "model_utility": float(utility)}


def with_intervals(values: dict[str, float]) -> dict[str, float]:
    quality, utility = values["forget_quality"], values["model_utility"]
    return {
        "forget_quality": quality, "forget_quality_low": quality / 30, "forget_quality_high": min(1.0, quality * 30),
        "model_utility": utility, "model_utility_low": utility - 0.02, "model_utility_high": utility + 0.02,
    }  # fmt: skip


def trial(number: int, options: Options, share: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "number": number, "phase": "search", "seed": 0, "status": "finished", "message": "",
        "options": json.dumps(options), "stage": round(4 * share), "stages": 4, "flops": 2e12 * share,
        "forget_passes": 70, "retain_passes": 30, "updates": 60, "tokens": 12345, "train_seconds": 40.0 * share,
        "total_seconds": 52.0 * share, "peak_memory_bytes": 731_000_000, "ended_seconds": 60.0 + 30 * number,
        "selected": False, "feasible": None, "front": False, "parent": None, **more,
    }  # fmt: skip


def rule(**changes: Any) -> dict[str, Any]:
    return {
        "objective": "forget_quality", "utility": "model_utility", "floor": FLOOR, "utility_floor": 0.9,
        "relative_to": "target", "tie_break": "cost", "objectives": [],
        "higher_is_better": {"forget_quality": True, "model_utility": True}, **changes,
    }  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "sweep <people>", "command": ["ofmu", "sweep", "--config", "my file.yaml"], "method": "ofmu_full",
        "config": {"name": "sweep", "base": {"model": {"path": "builtin:people/target"}, "seed": 0}},
        "machine": "2 cores", "code": {"version": "0.2.0", "commit": "27bcc7d0000000", "modified": False},
        "packages": {"torch": "2.13.0", "ray": "2.60.0"}, "seconds": 1500.0, "rule": rule(),
        "search": {
            "kind": "tpe", "trials": 40, "seed": 0, "rows": 100,
            "early": {"kind": "asha", "stages": 4, "reduction_factor": 2.0, "grace": 1},
        },
        "space": SPACE, "references": REFERENCES, "chosen": None, "nearest": None, "hypervolume": 0.4, "priors": {},
        **changes,
    }  # fmt: skip


def make_sweep(count: int = 40, stopped: int = 12, fresh: int = 3) -> Any:
    """(trials, stages, settings) of a finished sweep: trials of every status, one chosen, and fresh seeds."""
    rng = np.random.default_rng(4)
    trials, stages = [], []
    for number in range(count):
        options = draw(rng)
        share = 0.25 * (1 + number % 3) if 1 <= number <= stopped else 1.0
        for stage in range(1, round(4 * share)):
            values = judged(options, rng, stage / 4)
            stages.append({"number": number, "stage": stage, "flops": 5e11 * stage, "train_seconds": 1.0, **values})
        trials.append(trial(number, options, share, **with_intervals(judged(options, rng, share))))
        if share < 1:
            trials[-1]["status"] = "stopped"
    nothing = dict.fromkeys(with_intervals(judged(draw(rng), rng)))
    trials[-1] |= {"status": "failed", "message": "CUDA <out> of memory", "stage": 1, "flops": None, **nothing}
    trials[-2] |= {"status": "non_finite", "message": "loss of round 7 is not finite", "forget_quality": 1e-6}
    trials[-3] |= {"status": "utility_floor", "message": "utility fell below stop.utility_floor"}
    goal = Goal("forget_quality", "model_utility", FLOOR)
    completed = [t for t in trials if t["status"] not in ("failed", "stopped")]
    for t in trials:
        t["feasible"] = goal.enough(t)
    for t in completed:
        t["front"] = not any(
            o["forget_quality"] > t["forget_quality"] and o["model_utility"] > t["model_utility"] for o in completed
        )
    best = max(completed, key=goal.score)
    best["selected"] = True
    chosen = {
        "number": best["number"], "options": json.loads(best["options"]), "floor_missed": False,
        "figures": CHOSEN_FIGURES, "config_file": "best.yaml", "model": "best/model",
    }  # fmt: skip
    for seed in range(1, fresh + 1):
        values = with_intervals({"forget_quality": 0.1 * seed, "model_utility": 0.55 + 0.005 * seed})
        trials.append(trial(best["number"], chosen["options"], phase="confirm", seed=seed, **values))
    priors = {"ofmu.inner.lr": "loguniform(2e-05, 9e-05)"}
    return trials, stages, settings(chosen=chosen, priors=priors)


class _Page(HTMLParser):
    """Element structure, everything a browser would fetch, and the tables as texts by cell."""

    void = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[list[str]]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "a")
        for name, value in attributes:
            assert name not in ("src", "href", "xlink:href") or str(value).startswith("#")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([])
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and data.strip():
            self.tables[-1][-1][-1].append(data.strip())

    def table(self, *header: str) -> dict[str, dict[str, list[str]]]:
        """The one table whose header has these words, as row -> column -> texts."""
        tables = [table for table in self.tables if set(header) <= {" ".join(cell) for cell in table[0]}]
        assert len(tables) == 1, header
        names = [" ".join(cell) for cell in tables[0][0]]
        return {" ".join(row[0][:1]): dict(zip(names, row, strict=True)) for row in tables[0][1:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    write_sweep_report(path, *make_sweep())
    return path


def drawings(page: str) -> dict[str, str]:
    svgs = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)
    return {str(re.search(r'aria-label="(.*?)"', one)[1]): one for one in svgs}  # type: ignore[index]


def test_the_page_is_well_formed_and_says_what_to_do(folder: Path) -> None:
    page, text = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    _Page(page)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
    assert not re.search(r"#0[1-3]0[1-3a][01]\d", page)  # placeholder colours
    assert set(drawings(page)) == {"Forgetting and utility", "The best so far"}
    for drawing in drawings(page).values():
        ET.fromstring(drawing)
    trials, _, wanted = make_sweep()
    number = wanted["chosen"]["number"]
    enough = sum(
        t["feasible"] is True and t["status"] not in ("stopped", "failed") and t["phase"] == "search" for t in trials
    )
    for written in (page, text):
        assert f"Take trial {number}: it has the best forget quality among the {enough} trials whose" in written
        assert "ofmu unlearn --config best.yaml" in written
        assert f"lr: {wanted['chosen']['options']['ofmu.inner.lr']}" in written
    assert "half a decade &lt;below&gt;" in page
    assert "sweep &lt;people&gt;" in page
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:3] == ["What to do", "How sure", "The best trials"]


def test_metrics_have_intervals_and_fresh_seeds_next_to_them(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    table = _Page(page).tables[0]
    table = {" ".join(row[0]): dict(zip((" ".join(c) for c in table[0]), row, strict=True)) for row in table[1:]}
    row = table["Model utility ↑"]
    assert row["Chosen, all rows"] == ["0.563", "0.530 – 0.590"]
    assert row["target, as judged"][0] == "0.600"
    half = 4.302653 * 0.005 / np.sqrt(3)
    low, high = formats.number(0.56 - half), formats.number(0.56 + half)
    assert row["Fresh seeds, all rows"] == ["0.560", f"{low} – {high}", "3 of 3 seeds"]
    assert table["Forget quality ↑"]["Fresh seeds, all rows"][:2] == [
        formats.number(float(np.exp(np.mean(np.log([0.1, 0.2, 0.3]))))), "runs 0.100 · 0.200 · 0.300",
    ]  # fmt: skip
    rouge = next(row for name, row in table.items() if name.startswith("Forget ROUGE-L recall"))
    assert rouge["Chosen, all rows"] == ["0.400", "0.350 – 0.450"]
    assert "Values on all rows are not comparable" in page
    assert "is optimistic" in page
    assert "Trust these runs" in page


def test_what_was_spent_counts_every_trial_and_what_was_saved(folder: Path) -> None:
    page, (trials, _, _) = (folder / "report.html").read_text(), make_sweep()
    spent = sum(t["flops"] or 0 for t in trials)
    saved = sum(2e12 - t["flops"] for t in trials if t["status"] == "stopped")
    words = f"{formats.quantity(spent, 'FLOP')}, {saved / (spent + saved):.0%} saved by stopping trials early"
    assert f"<dd>{words}</dd>" in page


def test_the_front_has_its_trials_numbers_and_the_floor(folder: Path) -> None:
    page, (trials, _, wanted) = (folder / "report.html").read_text(), make_sweep()
    plane = drawings(page)["Forgetting and utility"]
    words = set(re.findall(r"<text[^>]*>(.*?)</text>", plane))
    front = {str(t["number"]) for t in trials if t["front"]}
    assert {"floor", "target", "retrained", str(wanted["chosen"]["number"])} <= words
    assert len(front & words) >= len(front) - 1  # one may be dominated by a tie
    assert not {str(t["number"]) for t in trials if t["status"] == "stopped"} & words - front
    for kind in ("completed", "fresh seed", "without a result, at its last evaluation", "chosen"):
        assert f"</svg>{kind}</span>" in page


def test_tables_of_options_and_trials(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    parsed = _Page(page)
    matter = parsed.table("Option", "Prior")
    assert next(iter(matter)) == "inner.lr"
    share, interval, p_value, rank = matter["inner.lr"]["Forget quality, share"]
    assert float(share) > 0.4
    assert " – " in interval
    assert float(p_value.removeprefix("p = ")) < 0.05
    assert float(rank.removeprefix("rank ")) > 0.8
    assert matter["inner.lr"]["For a next sweep"] == ["loguniform(2e-05, 9e-05)"]
    assert matter["rho_growth"]["Option"] == ["rho_growth", "only where ofmu.rho is not 0"]
    trials, _, wanted = make_sweep()
    table = parsed.table("Trial", "rho_growth")
    goal = Goal("forget_quality", "model_utility", FLOOR)
    completed = [t for t in trials if t["phase"] == "search" and t["status"] not in ("stopped", "failed")]
    completed.sort(key=lambda t: (-goal.score(t), t["number"]))
    assert list(table) == [*(str(t["number"]) for t in completed[:10]), "seed 1", "seed 2", "seed 3"]
    assert next(iter(table)) == str(wanted["chosen"]["number"])
    for t in completed[:10]:
        options, row = json.loads(t["options"]), table[str(t["number"])]
        assert row["rho"] == [f"{options['ofmu.rho']:.4g}"]
        assert row["rho_growth"] == [f"{options['ofmu.rho_growth']:.4g}" if "ofmu.rho_growth" in options else "–"]
        assert row["Model utility ↑"][0] == formats.number(t["model_utility"])
        assert "–" in row["Model utility ↑"][1]
    assert '<p class="note">Trial 39: CUDA &lt;out&gt; of memory.</p>' in page
    assert "trials in MLflow and compare them" in page


def test_the_csv_has_full_precision(folder: Path) -> None:
    with (folder / "trials.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    trials, _, _ = make_sweep()
    assert len(rows) == len(trials)
    for row, t in zip(rows, trials, strict=True):
        assert row["model_utility"] == ("" if t["model_utility"] is None else str(t["model_utility"]))
        assert float(row["option.ofmu.inner.lr"]) == json.loads(t["options"])["ofmu.inner.lr"]


def test_single_files_bring_their_colours_and_legend(folder: Path) -> None:
    text = (folder / "plane.svg").read_text()
    ET.fromstring(text)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))
    assert ">fresh seed</text>" in text


def test_no_trial_meets_the_floor(tmp_path: Path) -> None:
    trials, stages, wanted = make_sweep(16, stopped=4, fresh=0)
    for t in trials:
        t |= {"feasible": False, "selected": False}
    completed = [t for t in trials if t["status"] not in ("failed", "stopped")]
    nearest = max(completed, key=lambda t: t["model_utility"])
    wanted |= {"chosen": None, "nearest": nearest["number"], "rule": rule(floor=0.7)}
    write_sweep_report(tmp_path, trials, stages, wanted)
    page = (tmp_path / "report.html").read_text()
    assert "nothing to recommend" in page
    assert f"the nearest trial, {nearest['number']}, has {formats.number(nearest['model_utility'])}" in page
    table = _Page(page).table("Trial", "inner.lr")
    assert {str(t["number"]) for t in completed if t["front"] or t is nearest} <= set(table)
    assert table[str(nearest["number"])]["Trial"][:2] == [str(nearest["number"]), "nearest"]
    assert "best.yaml" not in page
    assert "How sure" not in page


def test_the_margin_decides_and_the_page_says_so(tmp_path: Path) -> None:
    """The best objective of all is below the margin; of two equal ones the cheaper comes first."""
    values = ((0.9, 0.001, 1e12), (0.5, 0.05, 3e12), (0.5, 0.04, 2e12), (0.3, 0.1, 1e12))
    trials = [
        trial(number, {"ofmu.inner.lr": 1e-5}, flops=flops)
        | with_intervals({"forget_quality": quality, "model_utility": FLOOR + above})
        for number, (quality, above, flops) in enumerate(values)
    ]
    chosen = {"number": 2, "options": {"ofmu.inner.lr": 1e-5}, "floor_missed": False, "figures": CHOSEN_FIGURES}
    write_sweep_report(tmp_path, trials, [], settings(chosen=chosen, rule=rule(margin=0.02)))
    text = (tmp_path / "report.md").read_text()
    least = formats.number(FLOOR + 0.02)
    assert f"the best forget quality among the 3 trials whose model utility is at least {least} " in text
    assert "(0.9 × the target's, plus the margin of 0.0200)" in text
    table = _Page((tmp_path / "report.html").read_text()).table("Trial", "inner.lr")
    assert list(table) == ["2", "1", "3", "0"]


def one_only() -> Any:
    trials, stages, wanted = make_sweep(fresh=0)
    number = wanted["chosen"]["number"]
    return (
        [t for t in trials if t["number"] == number],
        stages,
        wanted | {"references": {"target": {}, "retrained": None}},
    )


@pytest.mark.parametrize(("retrained", "arrow"), [(REFERENCES["retrained"], " → retrained"), (None, "")])
def test_an_arrow_points_to_a_retrained_model_that_there_is(tmp_path: Path, retrained: Any, arrow: str) -> None:
    trials, stages, wanted = make_sweep(fresh=0)
    wanted["references"] = {"target": REFERENCES["target"], "retrained": retrained}
    write_sweep_report(tmp_path, trials, stages, wanted)
    text = (tmp_path / "report.md").read_text()
    assert f"| {formats.label('forget_rouge')}{arrow} |" in text


def all_failed() -> Any:
    trials, _, wanted = make_sweep(4, stopped=0, fresh=0)
    return [trials[-1] | {"number": n} for n in range(4)], [], wanted | {"chosen": None}


def all_stopped() -> Any:
    trials, stages, wanted = make_sweep(fresh=0)
    return [t for t in trials if t["status"] == "stopped"], stages, wanted | {"chosen": None}


@pytest.mark.parametrize(
    ("make", "files", "words"),
    [
        (lambda: ([], [], {}), {"trials"}, "No trial has finished yet"),
        (lambda: ([], [], settings()), {"trials"}, "No trial has finished yet"),
        (one_only, {"trials", "plane"}, "It was not run again with a fresh seed"),
        (all_failed, {"trials"}, "4 of 4 trials failed"),
        (all_stopped, {"trials", "plane"}, "No trial completed with both"),
    ],
)
def test_it_takes_what_there_is(tmp_path: Path, make: Callable[[], Any], files: set[str], words: str) -> None:
    paths = write_sweep_report(tmp_path, *make())
    assert {path.stem for path in paths} == files | {"report"}
    assert all(path.exists() for path in paths)
    page = (tmp_path / "report.html").read_text()
    _Page(page)
    assert words in page


def test_few_trials_have_no_importances(tmp_path: Path) -> None:
    trials, stages, wanted = make_sweep(MINIMUM_TRIALS, stopped=0, fresh=0)  # one of them failed
    write_sweep_report(tmp_path, trials, stages, wanted)
    page = (tmp_path / "report.html").read_text()
    assert f"{MINIMUM_TRIALS - 1} completed trials; importances mean nothing below {MINIMUM_TRIALS}" in page
    share, rank = _Page(page).table("Option", "Prior")["inner.lr"]["Forget quality, share"]
    assert share == "–"
    assert float(rank.removeprefix("rank ")) > 0.8


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("ks_statistic", "low is better"),
        ("forget_rouge", "distance of forget ROUGE-L recall"),
        ("forget_choice_above_chance", "distance of forget multiple choice, accuracy above chance to 0"),
    ],
)
def test_what_is_to_be_low_is_drawn_upside_down(tmp_path: Path, name: str, label: str) -> None:
    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {key.replace("forget_quality", name): value for key, value in row.items()}

    trials, stages, wanted = make_sweep(12, stopped=2, fresh=0)
    wanted["references"] = {model: renamed(metrics) for model, metrics in REFERENCES.items()}
    wanted |= {"rule": rule(objective=name)}
    write_sweep_report(tmp_path, [renamed(t) for t in trials], [renamed(s) for s in stages], wanted)
    plane = (tmp_path / "plane.svg").read_text()
    assert label in plane
    places = {words: float(y) for y, words in re.findall(r' y="([\d.]+)"[^>]*>(target|retrained)</text>', plane)}
    # its value is 2e-9 and the retrained model's 1: better as a KS distance or one to 0, worse as one to that model
    assert (places["target"] < places["retrained"]) == (name != "forget_rouge")  # in SVG, y grows downwards
