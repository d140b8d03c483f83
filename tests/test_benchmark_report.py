"""The benchmark's report: all numbers and marks follow from the data, and nothing is fetched."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ofmu_ray.metrics.summary import summarise
from ofmu_ray.reporting import formats
from ofmu_ray.reporting.benchmark_page import write_benchmark_report
from ofmu_ray.reporting.tables import Cell, Table, cells, csv_text, markdown

pytestmark = pytest.mark.slow

SIZES = {"forget": 40, "retain": 40, "real_authors": 20, "world_facts": 20}
FIGURES = (
    "forget_quality",
    "ks_statistic",
    "model_utility",
    "forget_truth_ratio",
    "retain_probability",
    "retain_rouge",
)
# method -> (shift of the forget rows' truth ratios against the retrained model's, loss of utility)
METHODS = {"grad_diff": (-0.2, 0.05), "npo": (0.0, 0.05), "ofmu_full": (0.0, 0.05), "gradient_ascent": (0.0, 0.3)}
SEEDS = (1, 2, 3)


def row_table(seed: int, shift: float, loss: float) -> pa.Table:
    common, own = np.random.default_rng(99), np.random.default_rng(seed)
    parts = []
    for name, size in SIZES.items():
        level = common.uniform(0.35, 0.65, size) + (shift if name == "forget" else 0.0)
        columns = {}
        for column in ("probability", "rouge_l_recall", "truth_ratio"):
            moved = 0.0 if name == "forget" else (loss if column == "truth_ratio" else -loss)
            columns[column] = np.clip(level + moved + 0.03 * own.standard_normal(size), 0.01, 0.99)
        parts.append(
            pa.table(
                {
                    "row_id": [f"{name}-{i}" for i in range(size)], "set": [name] * size, "index": list(range(size)),
                    "cluster": [f"{name} {i // 4}" for i in range(size)], **columns,
                }
            )
        )  # fmt: skip
    return pa.concat_tables(parts)


def half(table: pa.Table) -> pa.Table:
    """The rows that tuning runs are judged on: every other one."""
    return table.filter(pa.array([index % 2 == 0 for index in table["index"].to_pylist()]))


def labelled(table: pa.Table, **values: Any) -> pa.Table:
    kinds = {"seed": pa.int64()}
    for name, value in values.items():
        table = table.append_column(name, pa.array([value] * len(table), kinds.get(name, pa.string())))
    return table


def trial(table: pa.Table, retrained: pa.Table, **values: Any) -> dict[str, Any]:
    flops = 1.9e12 + 1e10 * values["seed"]
    row = {
        "trial": None, "status": "finished", "message": "", "selected": False, "options": "{}",
        "budget_unit": "flops", "budget": 2e12, "forget_passes": 70, "retain_passes": 30, "updates": 60,
        "tokens": 123456, "flops": flops, "train_seconds": 20.0 + values["seed"], "total_seconds": 31.0,
        "peak_memory_bytes": 731_000_000, **values,
    }  # fmt: skip
    metrics = summarise(table, retrained, bootstrap_samples=20)
    for name in FIGURES:
        row |= {name: metrics[name].value, f"{name}_low": metrics[name].low, f"{name}_high": metrics[name].high}
    return row


def make_split(split: str, ablation: bool = True, methods: dict[str, tuple[float, float]] = METHODS) -> Any:
    """(trials, rows) of a finished benchmark on one split."""
    retrained = row_table(1000, 0.0, 0.0)
    references = {"target": row_table(1001, -0.3, 0.0), "retrained": retrained}
    rows = [labelled(t, method=m, split=split, phase="reference", seed=None) for m, t in references.items()]
    trials = []
    for place, (method, (shift, loss)) in enumerate(methods.items()):
        for number in range(6):
            options = {f"{method.split('_')[0]}.beta": 0.1 * (number + 1), "optimizer.lr": 1e-5 * 3**number}
            table = row_table(10_000 + 100 * place + number, shift * (1 + number / 5) - 0.02 * number, loss * 0.5)
            chosen = {"selected": number == 0, "options": json.dumps(options)}
            labels = {"method": method, "split": split, "phase": "tune", "seed": 0}
            trials.append(trial(half(table), half(retrained), **labels, **chosen) | {"trial": number})
            rows.append(labelled(half(table), **labels))
        for seed in SEEDS:
            table = row_table(100 * place + seed, shift, loss)
            trials.append(trial(table, retrained, method=method, split=split, phase="report", seed=seed))
            rows.append(labelled(table, method=method, split=split, phase="report", seed=seed))
    for place, (variant, shift) in enumerate({"no_penalty": 0.0, "one_inner_step": -0.25}.items() if ablation else ()):
        for seed in SEEDS:
            table = row_table(5000 + 100 * place + seed, shift, 0.05)
            trials.append(trial(table, retrained, method=variant, split=split, phase="ablation", seed=seed))
            rows.append(labelled(table, method=variant, split=split, phase="ablation", seed=seed))
    return trials, rows


def make_settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "benchmark <people>", "command": ["ofmu", "benchmark", "--config", "my file.yaml"],
        "config": {
            "methods": list(METHODS), "splits": {"forget01": {}}, "seeds": list(SEEDS), "tuning": {"trials": 6},
            "rule": {"objective": "forget_quality", "utility": "model_utility", "floor": 0.8},
            "ablation": {"of": "ofmu_full", "variants": {"no_penalty": {}, "one_inner_step": {}}},
            "base": {"model": {"path": "builtin:people/target"}, "evaluation": {"bootstrap_samples": 300}},
        },
        "code": {"version": "0.2.0", "commit": "27bcc7d0000000", "modified": False}, "machine": "2 cores", **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark")
    trials, rows = make_split("forget01")
    trials.append(
        {**trials[-1], "method": "npo", "phase": "tune", "trial": 6, "seed": 0, "status": "failed",
         "message": "loss of 3 <rows> is not finite", **dict.fromkeys(FIGURES)}
    )  # fmt: skip
    write_benchmark_report(path, pa.Table.from_pylist(trials), pa.concat_tables(rows), make_settings())
    return path


class _Page(HTMLParser):
    """Element structure, everything a browser would fetch, and the tables as (text, small lines) by cell."""

    void = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tables: list[list[list[list[str]]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "a")
        names = ("src", "href", "xlink:href")
        self.fetched += [str(value) for name, value in attributes if name in names and not str(value).startswith("#")]
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


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def seed_values(folder: Path, method: str, metric: str, phase: str = "report") -> list[float]:
    rows = read_csv(folder / "trials.csv")
    return [float(row[metric]) for row in rows if (row["method"], row["phase"]) == (method, phase) and row[metric]]


def test_the_page_is_well_formed_and_fetches_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert _Page(page).fetched == []
    assert not re.search(r"url\((?!#)|@import", page)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert not re.search(r"#0[1-3]0[1-3a][01]\d", page)  # placeholder colours
    drawings = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2 + 2 * len(METHODS)
    for drawing in drawings:
        ET.fromstring(drawing)


def test_every_number_of_the_results_table_is_the_datas(folder: Path) -> None:
    table = _Page((folder / "report.html").read_text()).table("Method", "KS distance to retrained ↓", "Passes")
    text = (folder / "report.md").read_text()
    for method in METHODS:
        row = table[method]
        p_values = seed_values(folder, method, "forget_quality")
        assert row["Forget quality ↑"][0] == formats.number(float(np.exp(np.mean(np.log(p_values)))))
        assert row["Forget quality ↑"][-1] == "runs " + " · ".join(map(formats.number, p_values))
        for name, heading in (("ks_statistic", "KS distance to retrained ↓"), ("model_utility", "Model utility ↑"),
                              ("forget_truth_ratio", "Forget truth ratio → retrained")):  # fmt: skip
            values = seed_values(folder, method, name)
            mean, half = np.mean(values), 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
            assert row[heading][0] == formats.number(float(mean))
            assert f"seeds {formats.span(mean, mean - half, mean + half)}" in row[heading]
            assert any(line.startswith("rows ") for line in row[heading])
            assert f"seeds {formats.span(mean, mean - half, mean + half)}" in text
        assert [row[name][0] for name in ("Passes", "FLOPs", "Training", "Peak memory")] == [
            "100", "1.92 T", "22.0 s", "697 MiB",
        ]  # fmt: skip
    assert table["retrained"]["KS distance to retrained ↓"] == ["0.000"]
    target = table["target"]["Model utility ↑"][0]
    expected = summarise(row_table(1001, -0.3, 0.0), row_table(1000, 0.0, 0.0), bootstrap_samples=20)
    assert target == formats.number(expected["model_utility"].value)
    assert table["target"]["Forget quality ↑"][0] == formats.number(expected["forget_quality"].value)
    utility = np.mean(seed_values(folder, "npo", "model_utility")) / (expected["model_utility"].value or 0)
    assert f"{utility:.3f} of the target's" in table["npo"]["Model utility ↑"]


def test_the_csv_has_full_precision_and_every_metric(folder: Path) -> None:
    rows = {(row["method"], row["figure"]): row for row in read_csv(folder / "results.csv")}
    assert rows.keys() == {(method, name) for method in METHODS for name in FIGURES}
    for (method, name), row in rows.items():
        values = seed_values(folder, method, name)
        mean = np.exp(np.mean(np.log(values))) if name == "forget_quality" else np.mean(values)
        assert float(row["mean"]) == pytest.approx(mean, rel=1e-12)
    assert len(read_csv(folder / "trials.csv")) == len(METHODS) * 9 + 6 + 1


def test_marks_follow_from_the_data(folder: Path) -> None:
    table = _Page((folder / "report.html").read_text()).table("Method", "KS distance to retrained ↓", "Passes")
    marks = {method: table[method]["KS distance to retrained ↓"][1] for method in METHODS}
    assert {marks["npo"], marks["ofmu_full"]} == {"★", "≈"}  # the two that are equal by construction
    assert marks["gradient_ascent"] == "▽"  # equally near to the retrained model, but it destroyed the rest
    assert marks["grad_diff"].startswith("seeds")  # no mark: worse
    assert table["gradient_ascent"]["Model utility ↑"][1] == "▽"
    results = {row["method"]: row for row in read_csv(folder / "results.csv") if row["figure"] == "ks_statistic"}
    assert results["grad_diff"]["result"] == "worse"
    assert float(results["grad_diff"]["p_holm"]) < 0.05
    assert results["grad_diff"]["test_covers"] == "rows and seeds"
    quality = {
        row["method"]: row["result"] for row in read_csv(folder / "results.csv") if row["figure"] == "forget_quality"
    }
    assert quality == {method: row["result"] for method, row in results.items()}


def test_the_plane_has_every_run(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    plane = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)[0]
    words = re.findall(r"<title>(.*?)</title>", plane)
    assert len(words) == len(METHODS) * 9 + 2
    values = seed_values(folder, "npo", "ks_statistic")
    assert any(
        word.startswith("npo, report seed 1: ") and f"1 − KS distance to retrained {1 - values[0]:.3f}" in word
        for word in words
    )


def test_the_ablation_tells_what_matters(folder: Path) -> None:
    rows = {row["variant"]: row for row in read_csv(folder / "ablation.csv")}
    for variant, row in rows.items():
        own, reference = (
            np.mean(seed_values(folder, label, "ks_statistic", phase))
            for label, phase in ((variant, "ablation"), ("ofmu_full", "report"))
        )
        assert float(row["ks_statistic_better_by"]) == pytest.approx(reference - own)
    assert (
        float(rows["one_inner_step"]["ks_statistic_p_holm"]) < 0.05 < float(rows["no_penalty"]["ks_statistic_p_holm"])
    )
    table = _Page((folder / "report.html").read_text()).table("Variant", "Forgetting, difference")
    assert table["one_inner_step"]["Forgetting, difference"][1] == "−"
    assert "no_penalty" not in {row["method"] for row in read_csv(folder / "results.csv")}


def test_failures_the_rule_and_published_numbers(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "loss of 3 &lt;rows&gt; is not finite" in page
    assert "benchmark &lt;people&gt;" in page
    assert "Runs that did not finish as planned: 1" in page
    tuned = [row for row in read_csv(folder / "trials.csv") if (row["method"], row["phase"]) == ("npo", "tune")]
    best = max((row for row in tuned if row["forget_quality"]), key=lambda row: float(row["forget_quality"]))
    noted = f"npo: trial 0 was used, but the rule chooses {best['trial']}." in page
    assert noted == (best["trial"] != "0")
    table = _Page(page).table("Published", "Here")
    assert table["NPO"]["Forget quality, published"] == ["0.400"]
    assert table["NPO"]["Forget quality, here"] == [
        formats.number(float(np.exp(np.mean(np.log(seed_values(folder, "npo", "forget_quality"))))))
    ]
    assert table["retrain"]["Forget quality, here"] == ["1.000"]


def test_a_killed_benchmark_shows_what_is_there(tmp_path: Path) -> None:
    trials, rows = make_split("people", ablation=False, methods={name: METHODS[name] for name in ("npo", "grad_diff")})
    some = [t for t in trials if t["method"] == "npo"][:7] + [t for t in trials if t["method"] == "grad_diff"][:2]
    write_benchmark_report(tmp_path, some, pa.concat_tables(rows), make_settings())
    page = (tmp_path / "report.html").read_text()
    assert "9 of 42 runs" in page
    assert "1 of 3 seeds" in page
    assert "0 of 3 seeds" in page
    assert "Published numbers" not in page
    (only,) = [row for row in read_csv(tmp_path / "results.csv") if row["figure"] == "ks_statistic"]
    assert (only["method"], only["seeds_low"], only["result"]) == ("npo", "", "")


def test_degenerate_runs_are_marked_and_count_for_nothing(tmp_path: Path) -> None:
    """npo is better by construction, but most of its runs repeat themselves, as does the best trial of grad_diff."""
    trials, rows = make_split("people", ablation=False, methods={name: METHODS[name] for name in ("npo", "grad_diff")})
    for one in trials:
        one["degenerate"] = one["method"] == "npo" and not (one["phase"] == "report" and one["seed"] == 1)
        one["degenerate_by"] = "repetition" if one["degenerate"] else ""
        repetition = 0.8 if one["degenerate"] else 0.0
        one |= {f"forget_repetition{end}": repetition for end in ("", "_low", "_high")}
    tuned = [one for one in trials if (one["method"], one["phase"]) == ("grad_diff", "tune")]
    best = max(tuned, key=lambda one: one["forget_quality"])
    best |= {f"forget_repetition{end}": 0.9 for end in ("", "_low", "_high")} | {"degenerate": True}
    goal = {"objective": "forget_quality", "utility": "model_utility", "floor": 0.0, "retrained_objective": 1.0,
            "sound": {"of": "retrained", "bounds": {"repetition": [0.0, 0.0, 0.05]}}}  # fmt: skip
    write_benchmark_report(tmp_path, trials, pa.concat_tables(rows), make_settings(goals={"people": goal}))
    page = (tmp_path / "report.html").read_text()
    table = _Page(page).table("Method", "KS distance to retrained ↓", "Passes")
    assert table["npo"]["KS distance to retrained ↓"][1] == "⊘"
    assert table["npo"]["Method"] == ["npo", "3 of 3 seeds", "2 degenerate"]
    assert table["grad_diff"]["KS distance to retrained ↓"][1] == "★"
    results = {(row["method"], row["figure"]): row["result"] for row in read_csv(tmp_path / "results.csv")}
    assert (results["npo", "ks_statistic"], results["grad_diff", "ks_statistic"]) == ("degenerate", "best")
    assert results["npo", "model_utility"] != "degenerate"
    selected = {row["method"]: row for row in read_csv(tmp_path / "selected.csv")}
    assert [selected[name]["degenerate"] for name in ("npo", "grad_diff")] == ["True", "False"]
    second = max((one for one in tuned if one is not best), key=lambda one: one["forget_quality"])
    if second["trial"] != 0:
        assert f"grad_diff: trial 0 was used, but the rule chooses {second['trial']}." in page
    areas = {row["method"]: row for row in read_csv(tmp_path / "hypervolume.csv")}
    [lone] = [one for one in trials if one["method"] == "npo" and not one["degenerate"]]
    expected = lone["model_utility"] / float(areas["npo"]["utility_of_1"]) * (1 - lone["ks_statistic"])
    assert float(areas["npo"]["hypervolume"]) == pytest.approx(expected)
    assert float(areas["npo"]["hypervolume_all_runs"]) > float(areas["npo"]["hypervolume"])
    assert (areas["npo"]["degenerate"], areas["grad_diff"]["degenerate"]) == ("8", "1")


def test_a_rule_of_metrics_without_a_paired_test(tmp_path: Path) -> None:
    """Multiple choice, nearest to chance; the floor counts, and the ablation is tested over seeds or rows."""
    objective, utility = "forget_choice_above_chance", "retain_choice_accuracy"
    given: dict[str, dict[str, tuple[float, float]]] = {
        "report": {"npo": (0.3, 0.8), "ofmu_full": (-0.1, 0.8), "grad_diff": (0.0, 0.2)},
        "ablation": {"no_penalty": (0.2, 0.8)},
    }
    labels = [("target", "reference", None, 0.5, 0.8)]
    labels += [(m, phase, seed, *values) for phase, of in given.items() for m, values in of.items() for seed in SEEDS]
    trials, rows = [], []
    for method, phase, seed, above, kept in labels:
        correct = np.concatenate([np.arange(20) < 20 * (0.5 + above), np.arange(20) < 20 * kept])
        table = pa.table(
            {
                "row_id": [f"row {i}" for i in range(40)], "set": ["forget_choice"] * 20 + ["retain_choice"] * 20,
                "index": [*range(20), *range(20)], "cluster": pa.nulls(40, pa.string()),
                "correct": correct, "chance": [0.5] * 40,
            }
        )  # fmt: skip
        rows.append(labelled(table, method=method, split="bio", phase=phase, seed=seed))
        if seed is not None:
            figures = {f"{name}{end}": value for name, value in ((objective, above), (utility, kept))
                       for end in ("", "_low", "_high")}  # fmt: skip
            trials.append({"method": method, "split": "bio", "phase": phase, "seed": seed, "status": "finished",
                           "options": "{}", **figures})  # fmt: skip
    settings = make_settings()
    settings["config"]["rule"] |= {"objective": objective, "utility": utility}
    write_benchmark_report(tmp_path, trials, pa.concat_tables(rows), settings)
    text = (tmp_path / "report.md").read_text()
    assert "choose the one with the best forget multiple choice, accuracy above chance (near 0)" in text
    assert "rows are missing" not in text
    table = _Page((tmp_path / "report.html").read_text()).table("Method", "Retain multiple-choice accuracy ↑", "Passes")
    assert "▽" in " ".join(table["grad_diff"]["Retain multiple-choice accuracy ↑"])
    assert "▽" not in " ".join(table["npo"]["Retain multiple-choice accuracy ↑"])
    [variant] = read_csv(tmp_path / "ablation.csv")
    assert float(variant[f"{objective}_better_by"]) == pytest.approx(-0.1)  # 0.2 from chance, not 0.1


def test_p_values_of_probes_are_summarised_like_forget_quality(tmp_path: Path) -> None:
    trials, rows = make_split("people", ablation=False, methods={"npo": METHODS["npo"]})
    for one in trials:
        quality = {1: 1e-8, 2: 1e-4, 3: 1.0}.get(one["seed"])
        one |= {f"paraphrase_forget_quality{end}": quality for end in ("", "_low", "_high")}
    write_benchmark_report(tmp_path, trials, pa.concat_tables(rows), make_settings())
    [record] = [row for row in read_csv(tmp_path / "results.csv") if row["figure"] == "paraphrase_forget_quality"]
    assert (float(record["mean"]), record["seeds_low"]) == (pytest.approx(1e-4), "")
    table = _Page((tmp_path / "report.html").read_text()).table("Metric", "npo")
    assert table["Paraphrase forget quality ↑"]["npo"] == ["1.0e-4", "runs 1.0e-8 · 1.0e-4 · 1.000"]


def test_a_method_without_utility_is_not_ranked_in_forgetting(tmp_path: Path) -> None:
    """Its loss on rows to keep is not finite: it has no utility that could reach the floor."""
    trials, rows = make_split("people", ablation=False, methods={name: METHODS[name] for name in ("npo", "grad_diff")})
    for one in trials:
        if one["method"] == "npo" and one["phase"] == "report":
            one["model_utility"] = None
    write_benchmark_report(tmp_path, trials, pa.concat_tables(rows), make_settings())
    results = {(row["method"], row["figure"]): row["result"] for row in read_csv(tmp_path / "results.csv")}
    assert (results["npo", "ks_statistic"], results["grad_diff", "ks_statistic"]) == ("below the utility floor", "best")


@pytest.mark.parametrize("count", [0, 1, 24])
def test_without_rows_nothing_is_claimed_about_the_floor(tmp_path: Path, count: int) -> None:
    trials, _ = make_split("people", ablation=False, methods={name: METHODS[name] for name in ("npo", "grad_diff")})
    write_benchmark_report(tmp_path, trials[:count], [], {})
    page = (tmp_path / "report.html").read_text()
    _Page(page)
    assert ("no run can be compared with the utility floor" in page) == (count > 0)
    if count == 24:
        results = {(row["method"], row["figure"]): row for row in read_csv(tmp_path / "results.csv")}
        assert results["grad_diff", "ks_statistic"]["test_covers"] == "seeds only"
        assert results["grad_diff", "ks_statistic"]["result"] == "worse"
        assert results["grad_diff", "ks_statistic"]["rows_low"] == ""


def test_recorded_values_that_differ_from_their_rows_are_reported(tmp_path: Path) -> None:
    trials, rows = make_split("people", ablation=False, methods={"npo": METHODS["npo"]})
    trials[-1]["model_utility"] += 0.01
    write_benchmark_report(tmp_path, trials, pa.concat_tables(rows), make_settings())
    text = (tmp_path / "report.md").read_text()
    assert text.count("Recorded values that differ from those computed from the rows") == 1
    assert "npo, seed 3: model_utility is " in text


def test_tables_as_markdown_and_csv() -> None:
    table = Table(
        name="x", caption="A_b", header=["M", "N"],
        rows=[cells("a|b", Cell("1.0", ("low <x>",), "★", strong=True))], records=[],
    )  # fmt: skip
    assert markdown(table) == "A\\_b\n\n| M | N |\n| --- | ---: |\n| a\\|b | **1.0** ★<br>low &lt;x&gt; |\n"
    assert csv_text([{"a": 1, "b": None}, {"a": "x,y", "c": 2.5}]) == 'a,b,c\n1,,\n"x,y",,2.5\n'


def test_images_have_a_plane_of_their_own_metric(tmp_path: Path) -> None:
    """By the average gap, of trials alone."""
    trials = [
        {"split": "class", "method": name, "phase": phase, "trial": number, "seed": number, "status": "finished",
         "train_seconds": 5.0, **{f"average_gap{end}": gap for end in ("", "_low", "_high")},
         **{f"testing_accuracy{end}": 90.0 for end in ("", "_low", "_high")}}
        for name, gap in (("salun", 2.0), ("ofmu", 1.0)) for phase, number in (("tune", 0), ("report", 1))
    ]  # fmt: skip
    settings = {"config": {"rule": {"objective": "average_gap", "utility": "testing_accuracy"}}}
    write_benchmark_report(tmp_path, trials, [], settings)
    page = (tmp_path / "report.html").read_text()
    assert "1 − average gap / 100 0.990" in page
    assert "p-value: tables show" not in page
    areas = {row["method"]: float(row["hypervolume"]) for row in read_csv(tmp_path / "hypervolume.csv")}
    assert areas == {"salun": pytest.approx(90.0 * 0.98), "ofmu": pytest.approx(90.0 * 0.99)}
