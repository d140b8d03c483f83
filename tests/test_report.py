"""A run's page, card and manifest: complete, self-contained, and without forget rows' text."""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from scipy.stats import ks_2samp

from ofmu_ray.commandline.terminal import metrics_table
from ofmu_ray.config import TrackingConfig, TrainConfig, UnlearnConfig, config_hash, to_dict
from ofmu_ray.reporting.card import write_model_card
from ofmu_ray.reporting.formats import byte_size, cell, duration, metric_table, number, quantity
from ofmu_ray.reporting.manifest import build_manifest
from ofmu_ray.reporting.page import ReportData, write_report
from ofmu_ray.reporting.plots import kolmogorov_smirnov
from ofmu_ray.tracking import finish, start

pytestmark = pytest.mark.slow

SECRET = "Moabi Trygrerk's secret"
SETS = {"forget": 48, "retain": 108, "real_authors": 48, "world_facts": 50}


def make_table(shift: float, seed: int, rouge: float) -> pa.Table:
    """Per-row values as from an evaluation, with the planted text in every forget row."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "row_id": f"{name}-{index}",
            "set": name,
            "truth_ratio": float(np.exp(rng.normal(shift if name == "forget" else -1.2, 0.5))),
            "probability": float(rng.uniform(0.5, 1)),
            "rouge_l_recall": float(min(1, max(0, rng.normal(rouge if name == "forget" else 0.9, 0.1)))),
            "generated": SECRET if name == "forget" else f"A {name} answer <b>{index}</b>",
            "generated_tokens": int(rng.integers(5, 20)),
            "generated_empty": bool(index == 3),
            "repetition": 0.05,
        }
        for name, count in SETS.items()
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows)


def make_data(**changes: Any) -> ReportData:
    config = to_dict(UnlearnConfig())
    rng = np.random.default_rng(0)
    metrics = {
        model: {
            name: {"value": value, "low": max(0, value - 0.05), "high": min(1, value + 0.05), "n": 48}
            for name, value in {
                "forget_quality": quality, "model_utility": 0.84 - 0.02 * at, "forget_truth_ratio": 0.4 + 0.2 * at,
                "forget_probability": 0.99 - 0.4 * at, "forget_rouge": 0.98 - 0.35 * at, "retain_probability": 0.98,
                "retain_rouge": 0.97, "retain_truth_ratio": 0.63, "real_authors_probability": 0.71,
                "real_authors_rouge": 0.95, "real_authors_truth_ratio": 0.58, "world_facts_probability": 0.8,
                "world_facts_rouge": 0.94,
            }.items()
        }
        for at, (model, quality) in enumerate({"before": 2.4e-11, "after": 0.31, "retrained": 1.0}.items())
    }  # fmt: skip
    absent = {"value": None, "reason": "the world_facts rows lack the columns it needs (perturbed_answer)"}
    for named in metrics.values():
        named["world_facts_truth_ratio"] = absent
    values: dict[str, Any] = {
        "title": "ofmu-lite-3f9a1c2e",
        "config": config,
        "metrics": metrics,
        "run": {"status": "finished", "message": "", "rounds": 60, "model": "runs/x/model", "mlflow": "mlflow ui",
                "generations": "answers to forget prompts: 38 of 48 repeat themselves: degenerate (repetition)",
                "forgetting": "p = 0.31: not distinguishable from the retrained model (p > 0.05)"},
        "cost": {
            "gradient_passes": {"forget": 420, "retain": 180}, "tokens": 412_345, "flops": 1.31e12, "updates": 360,
            "seconds": {"start": 5.1, "data": 9.7, "evaluation": 21.4, "training": 75.2},
            "peak_memory_bytes": 731_000_000,
        },
        "series": [
            {
                "round": k, "forget_loss": 0.02 + 0.06 * k, "retain_loss": 0.02 + 0.1 * float(rng.random()),
                "gradient_cosine": 0.5 - 0.008 * k + 0.1 * float(rng.standard_normal()),
                "phi_gradient_norm": 0.3 + k / 20, "outer_gradient_norm": 0.5, "penalty_norm": 0.002 * 1.05**k,
                "inner_gradient_norm": 0.3 + k / 25, "rho": 0.001 * 1.05**k, "inner_lr": 1e-5, "outer_lr": 1e-5,
                "forget_passes": 7 * k, "retain_passes": 3 * k, "tokens_per_second": 5500 + 200 * float(rng.random()),
                **({"utility": 0.98 - 0.001 * k} if k % 5 == 0 else {}),
            }
            for k in range(1, 61)
        ],
        "tables": {
            "before": make_table(-1.0, 1, 0.98), "after": make_table(-0.15, 2, 0.5),
            "retrained": make_table(0.0, 3, 0.45),
        },
        "texts": {"retain-0": ("Where was <i>Boany</i> born?", "In Suxem."), "forget-0": (SECRET, SECRET)},
        "data": {
            "streams": {
                name: {
                    "source": f"builtin:people/{name}.jsonl", "rows": rows, "used_rows": rows, "tokens": 29 * rows,
                    "label_tokens": 13 * rows, "truncated_rows": 0, "longest": 47, "normalised_duplicates": 0,
                    "sha256": hashlib.sha256(name.encode()).hexdigest(), "dropped_ids": [],
                }
                for name, rows in {"forget": 48, "retain": 908}.items()
            },
            "overlap": {"exact": 0, "normalised": 0, "row_ids": []},
            "tokenizer_sha256": "0" * 64,
        },
        "manifest": build_manifest(
            name="ofmu-lite-3f9a1c2e", config=config, config_hash=config_hash(UnlearnConfig()), seed=0, data={},
            models={"target": None}, command="ofmu unlearn",
        ),
        "command": ["ofmu", "unlearn", "--config", "my config.yaml"],
        "open_command": "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db",
    }  # fmt: skip
    return ReportData(**{**values, **changes})


class _Page(HTMLParser):
    """Element structure and everything that a browser would fetch."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe")
        names = ("src", "href", "xlink:href")
        self.fetched += [str(v) for k, v in attributes if k in names and not str(v).startswith("#")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_data())
    return path.read_text()


def test_the_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    parsed = _Page(page)
    assert parsed.fetched == []
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert parsed.headings == [
        "Before, after, retrained", "Truth ratios of the forget rows", "Rounds", "Generations", "Cost", "Data",
        "Run it again", "Manifest", "Configuration",
    ]  # fmt: skip


def test_forget_rows_are_shown_by_id_unless_revealed(page: str, tmp_path: Path) -> None:
    escaped = SECRET.replace("'", "&#39;")
    assert "forget-0" in page
    assert SECRET not in page
    assert escaped not in page
    write_report(tmp_path / "revealed.html", make_data(reveal_text=True))
    assert escaped in (tmp_path / "revealed.html").read_text()


def test_other_rows_are_shown_escaped(page: str, tmp_path: Path) -> None:
    write_report(tmp_path / "long.html", make_data(samples=100))
    complete = (tmp_path / "long.html").read_text()
    assert "A retain answer &lt;b&gt;0&lt;/b&gt;" in complete
    assert "Where was &lt;i&gt;Boany&lt;/i&gt; born?" in complete
    assert len(set(re.findall(r"<code>(retain-\d+)</code>", page))) == 5  # report.samples


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    data = make_data()
    write_report(tmp_path / "1.html", data)
    write_report(tmp_path / "2.html", data)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_plots_are_valid_and_follow_the_pages_colours(page: str) -> None:
    drawings = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 1 + 8
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "var(--" in drawing
        assert not re.search(r"#0[1-3]0[1-3a]0[1-4]", drawing)


def test_the_header_names_the_model_that_was_changed(page: str) -> None:
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["model"] == "builtin:people/target"
    assert facts["method"] == "ofmu (first_order)"
    assert facts["engine"] == "torch"
    assert facts["rounds"] == "60"
    assert "mlflow" not in facts


def test_a_degenerate_model_is_called_so(page: str) -> None:
    assert "<strong>Answers to forget prompts: 38 of 48 repeat themselves: degenerate (repetition).</strong>" in page
    assert "<strong>p = 0.31: not distinguishable from the retrained model (p &gt; 0.05).</strong>" in page


def test_absent_metrics_have_a_reason(page: str) -> None:
    """The reason names them below the table, which is not padded with them."""
    assert ">World facts truth ratio: the world_facts rows lack the columns it needs" in page
    assert '<td class="name">World facts truth ratio' not in page
    assert '<td class="name">World facts probability' in page


def test_a_fit_without_evaluation_has_a_page_too(tmp_path: Path) -> None:
    series = [{"round": k, "loss": 4 / k, "lr": 1e-3, "novel": 1.0} for k in range(1, 4)]
    write_report(tmp_path / "page.html", ReportData(title="fit", config=to_dict(TrainConfig()), series=series))
    page = (tmp_path / "page.html").read_text()
    assert _Page(page).headings == ["Rounds", "Configuration"]
    assert page.count("<svg role=") == 3


def test_without_a_retrained_model_there_is_no_test(tmp_path: Path) -> None:
    data = make_data()
    metrics = {**data.metrics, "retrained": None}
    tables = {**data.tables, "retrained": None}
    write_report(tmp_path / "page.html", make_data(metrics=metrics, tables=tables))
    text = (tmp_path / "page.html").read_text()
    assert "forget quality is absent" in text
    assert "Before, after" in _Page(text).headings
    assert "should match\nthe model that was retrained" not in text
    assert '<th class="n">Retrained</th>' not in text


def test_the_marked_distance_is_where_the_distributions_differ_most() -> None:
    rng = np.random.default_rng(5)
    one, two = rng.normal(0, 1, 60), rng.normal(0.6, 1, 45)
    test, expected = kolmogorov_smirnov(one, two), ks_2samp(one, two)
    assert test.p_value == pytest.approx(expected.pvalue)
    assert test.distance == pytest.approx(expected.statistic)
    gap = abs(np.mean(one <= test.location) - np.mean(two <= test.location))
    assert gap == pytest.approx(expected.statistic)
    assert test.location == pytest.approx(expected.statistic_location)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"), (number(2.44e-11), "2.4e-11"), (number(0), "0.000"), (number(None), "–"),
        (quantity(1.31e12, "FLOP"), "1.31 TFLOP"), (quantity(360), "360"), (quantity(412_345), "412 k"),
        (byte_size(731_000_000), "697 MiB"), (duration(75.25), "1 min 15 s"),
        (duration(59.96), "60.0 s"), (duration(7500), "2 h 05 min"),
    ],
)  # fmt: skip
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.522, 1e-4, 0.693, "0.522 (0.000 – 0.693)"),
        (0.00326, 0.00201, 0.0412, "0.00326 (0.00201 – 0.04120)"),
        (0.0, 0.0, 0.05, "0.000 (0.000 – 0.050)"),
        (2.44e-11, 0.0, 0.05, "2.4e-11 (0 – 5.0e-2)"),
        (-0.0412, -0.09, 0.012, "-0.0412 (-0.0900 to 0.0120)"),
        (1.5, 0.9, 12.25, "1.500 (0.900 – 12.250)"),
    ],
)
def test_an_interval_has_the_digits_of_its_value(value: float, low: float, high: float, expected: str) -> None:
    shown = cell({"value": value, "low": low, "high": high})
    assert f"{shown.text} ({shown.interval})" == expected
    entry = {"forget_rouge": {"value": value, "low": low, "high": high}}
    bounds = shown.interval.replace(" – ", ", ").replace(" to ", ", ")
    assert f"{shown.text} [{bounds}]" in metrics_table({"after": entry})


def test_directions_of_the_metrics() -> None:
    aims = {row.name: row.direction for row in metric_table(make_data().metrics)}
    assert aims["forget_quality"] == aims["model_utility"] == aims["world_facts_rouge"] == "↑ better"
    assert aims["forget_probability"] == aims["forget_rouge"] == aims["forget_truth_ratio"] == "match retrained"


def test_the_card_has_front_matter_metrics_and_no_text(tmp_path: Path) -> None:
    data = make_data()
    config = to_dict(UnlearnConfig())
    config["model"]["path"] = "someone/tiny-llama"
    write_model_card(
        tmp_path, name=data.title, config=config, metrics=data.metrics, data=data.data, config_hash="abc", rounds=60
    )
    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "someone/tiny-llama"
    assert "machine-unlearning" in yaml.safe_load(front)["tags"]
    assert "| Forget quality | ↑ better | 2.4e-11 (0 – 5.0e-2) | 0.310 (0.260 – 0.360) |" in body
    options = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert options["ofmu"]["inner_steps"] == 3
    assert SECRET not in card


def test_a_card_before_the_evaluation(tmp_path: Path) -> None:
    write_model_card(tmp_path, name="fit", config=to_dict(TrainConfig()))
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card
    assert "## Evaluation" not in card


def test_the_manifest_identifies_code_packages_and_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    manifest = build_manifest(
        name="run", config={"seed": 3}, config_hash="abc", seed=3, data={"rows": 1},
        models={"after": tmp_path, "hub": "someone/model", "retrained": None}, command="ofmu unlearn",
        extra={"plan": "f00"},
    )  # fmt: skip
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["models"] == {
        "after": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()},
        "hub": None,
        "retrained": None,
    }
    assert manifest["packages"]["torch"]
    assert manifest["code"]["version"]
    assert manifest["plan"] == "f00"
    assert str(tmp_path) not in json.dumps(manifest)


def test_nothing_that_mlflow_gets_holds_forget_text(tmp_path: Path) -> None:
    """Page, metrics and manifest of rows with planted text, logged to a real database: the text is nowhere on disk."""
    data = make_data()
    run = tmp_path / "run"
    write_report(run / "report.html", data)
    (run / "metrics.json").write_text(json.dumps(dict(data.metrics)))
    (run / "manifest.json").write_text(json.dumps(dict(data.manifest)))
    write_model_card(run, name=data.title, config=data.config, metrics=data.metrics, data=data.data)
    handle = start(TrackingConfig(), str(tmp_path), data.title, data.config)
    assert finish(handle, metrics=data.metrics, cost=data.cost, artifacts=sorted(run.iterdir()))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "report.html", "README.md"} <= {path.name for path in files}
    words = SECRET.encode().split(b"'")[0]
    assert [path.name for path in files if words in path.read_bytes()] == []
