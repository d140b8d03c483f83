"""Evaluation of a model directory: same numbers in-process and on actors, cache, private text, and metrics."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fault_table
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from evaluation_models import tiny_model, tiny_tokenizer
from metric_names import LISTED
from scipy import stats

from ofmu_ray.cluster import map_tasks
from ofmu_ray.config import DataConfig, EvaluationConfig, FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation import actors
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.rows import evaluation_rows, without_private_text
from ofmu_ray.evaluation.runner import evaluate_live, evaluate_model, summarise
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.scoring import token_scores
from ofmu_ray.metrics.rouge import rouge_l_recall
from ofmu_ray.models.source import model_fingerprint

CONFIG = EvaluationConfig(max_new_tokens=12, batch_size=8, bootstrap_samples=50)


def _rows(count: int, *, paraphrase: bool, wrong: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"who is person {index}{' or so' * (index % 4)}?",
            "answer": f"the answer is {index}{' long' * (index % 3)}",
            **({"paraphrased_answer": f"it is {index}"} if paraphrase else {}),
            **({"perturbed_answer": [f"the answer is {index + 1 + k}" for k in range(wrong)]} if wrong else {}),
        }
        for index in range(count)
    ]


SETS = {
    "forget": _rows(11, paraphrase=True, wrong=3),
    "retain": _rows(9, paraphrase=True, wrong=2),
    "real_authors": _rows(7, paraphrase=False, wrong=3),
    "world_facts": _rows(5, paraphrase=False, wrong=2),
}
for _index, _row in enumerate(SETS["forget"]):
    _row["cluster"] = f"person {_index // 3}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory.mktemp("model"), seed=0)


def _saved(folder: Path, seed: int) -> Path:
    tiny_model("llama", seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _evaluate(model_dir: Path, storage: Path, config: EvaluationConfig = CONFIG, **options: Any) -> pa.Table:
    sets = options.pop("sets", SETS)
    return evaluate_model(model_dir, model_dir, sets, FormatConfig(), config, storage, label="test", **options)


def _assert_same(table: pa.Table, expected: pa.Table, rel: float = 1e-6) -> None:
    """Equal texts and counts; numbers up to rounding."""
    assert table.schema == expected.schema
    for name in expected.schema.names:
        values, wanted = table[name].to_pylist(), expected[name].to_pylist()
        if pa.types.is_floating(expected.schema.field(name).type):
            assert [value is None for value in values] == [value is None for value in wanted], name
            numbers = [value for value in wanted if value is not None]
            assert [value for value in values if value is not None] == pytest.approx(numbers, rel=rel), name
        elif name in ("wrong_nll", "answer_logprobs", "answer_zscores"):
            for losses, wanted_losses in zip(values, wanted, strict=True):
                assert (losses is None) == (wanted_losses is None), name
                assert (losses or []) == pytest.approx(wanted_losses or [], rel=rel, abs=rel), name
        else:
            assert values == wanted, name


# ------------------------------------------------------------------------------------------------ per-row values


@pytest.mark.slow
def test_rows_hold_what_the_model_says(model_dir: Path, tmp_path: Path) -> None:
    table = _evaluate(model_dir, tmp_path)
    assert table["row_id"].to_pylist() == [f"{name}-{index}" for name in SETS for index in range(len(SETS[name]))]
    model, template = tiny_model("llama"), Template(tiny_tokenizer(), FormatConfig())
    scorer = Scorer(model, template.tokenizer, template)
    for record in table.to_pylist():
        row = SETS[record["set"]][record["index"]]

        def nll(answer: str, question: str = row["question"]) -> float:
            return float(scorer.mean_nll([question], [answer])[0])

        right, wrong = nll(row["answer"]), [nll(answer) for answer in row["perturbed_answer"]]
        assert record["answer_nll"] == pytest.approx(right, rel=1e-5)
        assert record["wrong_nll"] == pytest.approx(wrong, rel=1e-5)
        ids, prompt = template.encode(row["question"], row["answer"])
        assert record["answer_tokens"] == len(ids) - prompt
        scores = token_scores(model, [(ids, prompt)], batch_size=1)[0]
        assert record["answer_logprobs"] == pytest.approx(scores.logprobs, rel=1e-4, abs=1e-5)
        assert record["answer_zscores"] == pytest.approx(scores.zscores, rel=1e-3, abs=1e-4)
        assert record["answer_matches"] == scores.matches
        assert -np.mean(record["answer_logprobs"]) == pytest.approx(record["answer_nll"])
        assert record["answer_zlib_bytes"] == len(zlib.compress(row["answer"].encode("utf-8")))
        assert record["cluster"] == row.get("cluster")
        if record["set"] in ("forget", "retain"):
            correct = nll(row["paraphrased_answer"])
            assert record["paraphrase_nll"] == pytest.approx(correct, rel=1e-5)
            assert record["probability"] == pytest.approx(math.exp(-right), rel=1e-4)
        else:
            correct = right
            assert record["paraphrase_nll"] is None
            options = [math.exp(-right), *(math.exp(-loss) for loss in wrong)]
            assert record["probability"] == pytest.approx(options[0] / sum(options), rel=1e-4)
        assert record["truth_ratio"] == pytest.approx(math.exp(correct - sum(wrong) / len(wrong)), rel=1e-4)
        if record["set"] == "forget":
            assert record["generated"] is None
        else:
            assert record["rouge_l_recall"] == rouge_l_recall([row["answer"]], [record["generated"]])[0]
        assert 0 <= record["generated_tokens"] <= CONFIG.max_new_tokens


def test_the_live_model_gives_the_same_rows(model_dir: Path, tmp_path: Path) -> None:
    template = Template(tiny_tokenizer(), FormatConfig())
    scorer = Scorer(tiny_model("llama"), template.tokenizer, template, max_new_tokens=CONFIG.max_new_tokens)
    rows = evaluation_rows("retain", SETS["retain"], FormatConfig())
    table = _evaluate(model_dir, tmp_path, sets={"retain": SETS["retain"]})
    _assert_same(scorer.rows(rows, batch_size=CONFIG.batch_size), table)


def test_a_module_in_memory_is_evaluated_as_its_export(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_model("llama").train()

    def live(**options: Any) -> pa.Table:
        return evaluate_live(module, tiny_tokenizer(), SETS, FormatConfig(), CONFIG, label="test", **options)

    expected = _evaluate(model_dir, tmp_path / "exported", reveal_text=True)
    _assert_same(live(reveal_text=True), expected)
    assert module.training
    assert module.config._attn_implementation == "sdpa"  # as it was before the trees
    kept = {"storage_cache_dir": tmp_path / "exported", "fingerprint": model_fingerprint(model_dir)}
    ran = _count_units(monkeypatch)
    assert live(**kept) == without_private_text(expected)  # the folder's values serve the module
    assert ran == []
    live(**{**kept, "fingerprint": "other weights"})
    assert set(ran) == set(SETS)


@pytest.mark.parametrize("reveal", [False, True])
def test_a_trials_rows_have_the_text_of_forget_rows_only_if_asked_for(
    model_dir: Path, tmp_path: Path, reveal: bool
) -> None:
    sets = {name: SETS[name] for name in ("forget", "retain")}
    evaluator = Evaluator(CONFIG, DataConfig(), str(model_dir), tmp_path, sets=sets, reveal_text=reveal)
    table = evaluator.live_table(tiny_model("llama"), tiny_tokenizer(), "trial")
    for name, shown in (("forget", reveal), ("retain", True)):
        texts = table.filter(pc.equal(table["set"], name))["generated"]
        assert len(texts) == len(SETS[name])
        assert texts.null_count == (0 if shown else len(texts)), name


@pytest.mark.slow
def test_batch_size_changes_nothing_but_rounding(model_dir: Path, tmp_path: Path) -> None:
    expected = _evaluate(model_dir, tmp_path / "a")
    for batch_size in (1, 3, 64):
        config = EvaluationConfig(max_new_tokens=12, batch_size=batch_size)
        _assert_same(_evaluate(model_dir, tmp_path / str(batch_size), config), expected, rel=1e-5)


def _kill_actors() -> list[int]:
    """SIGKILL of all evaluation actors of this process's Ray."""
    actors = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and any("WarmProcess" in part for part in process.cmdline())
    ]
    for process in actors:
        process.kill()
    return [process.pid for process in actors]


@pytest.mark.full
def test_any_number_of_actors_gives_the_same_rows(
    model_dir: Path, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Counted(map_tasks.ProcessPool[Any, Any]):
        def __init__(self, make: Any, size: int, **more: Any) -> None:
            started.append(size)
            super().__init__(make, size, **more)

    monkeypatch.setattr(map_tasks, "ProcessPool", Counted)
    tables = [
        _evaluate(model_dir, tmp_path / str(count), EvaluationConfig(max_new_tokens=12, batch_size=8, actors=count))
        for count in (1, 2)
    ]
    assert started == [1, 2]
    assert tables[0] == tables[1]  # to the bit: the batches are the same
    _assert_same(_evaluate(model_dir, tmp_path / "here"), tables[0], rel=1e-5)
    assert started == [1, 2]  # left to itself, so small a job starts no actors

    def killing(*args: Any) -> Iterator[Any]:
        for number, result in enumerate(actors.run_units(*args)):
            if number == 0:
                killed.extend(_kill_actors())
            times.append(time.monotonic())
            yield result

    killed: list[int] = []
    times: list[float] = []
    small = EvaluationConfig(max_new_tokens=12, batch_size=2)
    undisturbed = _evaluate(model_dir, tmp_path / "undisturbed", small)  # here, the same batches
    monkeypatch.setattr("ofmu_ray.evaluation.runner.run_units", killing)
    assert _evaluate(model_dir, tmp_path / "disturbed", replace(small, actors=2)) == undisturbed
    assert killed
    waited = max(after - before for before, after in pairwise(times))
    fault_table.record(
        "all actors killed", phase="evaluation", lost=len(killed), unit="unit", seconds=waited, difference=0.0
    )
    damaged = _saved(tmp_path / "damaged", seed=0)
    (damaged / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="does not load"):  # raised in the actor
        _evaluate(damaged, tmp_path, EvaluationConfig(actors=1))


# -------------------------------------------------------------------------------------------- cache and private text


def test_a_second_evaluation_runs_nothing(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _evaluate(model_dir, tmp_path)
    ran = _count_units(monkeypatch)
    assert _evaluate(model_dir, tmp_path, EvaluationConfig(max_new_tokens=12, batch_size=2)) == first
    assert ran == []
    changed = {**SETS, "retain": [*SETS["retain"][:-1], {**SETS["retain"][-1], "answer": "another"}]}
    _evaluate(model_dir, tmp_path, sets=changed)
    assert set(ran) == {"retain"}  # only the set that changed
    ran.clear()
    _evaluate(model_dir, tmp_path, EvaluationConfig(max_new_tokens=11))
    assert set(ran) == set(SETS)


def test_other_weights_are_another_evaluation(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _evaluate(model_dir, tmp_path / "cache")
    other = _saved(tmp_path / "model", seed=1)
    assert _evaluate(other, tmp_path / "cache")["answer_nll"] != first["answer_nll"]
    _saved(tmp_path / "model", seed=0)  # the first model's weights in the other folder: the cached rows are found
    ran = _count_units(monkeypatch)
    assert _evaluate(tmp_path / "model", tmp_path / "cache") == first
    assert ran == []


def _count_units(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    run = Scorer.run_all
    monkeypatch.setattr(
        Scorer, "run_all", lambda self, units: ran.extend(unit.set for unit in units) or run(self, units)
    )
    return ran


def test_an_interrupted_evaluation_keeps_finished_sets(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Scorer.run_all

    def fail_on_the_last_set(self: Scorer, units: Any) -> Iterator[Any]:
        yield from (each for each in run(self, units) if units[each[0]].set != "world_facts")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "run_all", fail_on_the_last_set)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(model_dir, tmp_path)
    ran = _count_units(monkeypatch)
    _evaluate(model_dir, tmp_path)
    assert set(ran) == {"world_facts"}


def test_text_of_forget_rows_stays_out_of_files(model_dir: Path, tmp_path: Path) -> None:
    revealed = _evaluate(model_dir, tmp_path, reveal_text=True)
    secret = [record["generated"] for record in revealed.to_pylist() if record["set"] == "forget"]
    assert all(isinstance(text, str) and len(text) > 3 for text in secret)
    files = list((tmp_path / "evaluation").iterdir())
    assert len(files) == len(SETS)
    assert all(path.suffix == ".parquet" for path in files)
    stored = [record for path in files for record in pq.read_table(path).to_pylist()]
    assert [record["generated"] for record in stored if record["set"] == "forget"] == [None] * len(secret)
    assert all(record["generated"] is not None for record in stored if record["set"] != "forget")
    hidden = _evaluate(model_dir, tmp_path)
    assert hidden == without_private_text(revealed)
    # when requested again, the text is there although the cache never contained it
    again = _evaluate(model_dir, tmp_path, reveal_text=True)
    assert again == revealed


# ----------------------------------------------------------------------------------------------------- the metrics


def _by_hand(table: pa.Table, name: str) -> list[float]:
    """(probability, ROUGE-L, truth-ratio score) of a set from the raw losses."""
    records = [record for record in table.to_pylist() if record["set"] == name]
    probabilities, scores = [], []
    for record in records:
        wrong = record["wrong_nll"]
        right = math.exp(-record["answer_nll"])
        ra_wf = name in ("real_authors", "world_facts")
        probabilities.append(right / (right + sum(math.exp(-loss) for loss in wrong)) if ra_wf else right)
        correct = record["answer_nll"] if ra_wf else record["paraphrase_nll"]
        ratio = stats.gmean(np.exp(-np.array(wrong))) / math.exp(-correct)
        scores.append(min(ratio, 1 / ratio) if name == "forget" else max(0.0, 1 - ratio))
    rouge = [record["rouge_l_recall"] for record in records]
    return [float(np.mean(values)) for values in (probabilities, rouge, scores)]


def _with_some_rouge(table: pa.Table) -> pa.Table:
    """Random models recall nothing; replace the recall by values with a distinguishable mean."""
    column = table.schema.get_field_index("rouge_l_recall")
    return table.set_column(column, "rouge_l_recall", pa.array(np.linspace(0.1, 0.9, table.num_rows)))


def test_metrics_by_hand(model_dir: Path, tmp_path: Path) -> None:
    table = _with_some_rouge(_evaluate(model_dir, tmp_path))
    retrained = _evaluate(_saved(tmp_path / "retrained", seed=1), tmp_path)
    metrics = summarise(table, retrained, bootstrap_samples=50, seed=0)
    assert tuple(metrics) == LISTED
    utility = []
    for name in SETS:
        expected = _by_hand(table, name)
        values = [metrics[f"{name}_{metric}"] for metric in ("probability", "rouge", "truth_ratio")]
        assert [value.value for value in values] == pytest.approx(expected, rel=1e-9)
        assert {value.n for value in values} == {len(SETS[name])}
        utility += [] if name == "forget" else expected
    assert metrics["model_utility"].value == pytest.approx(stats.hmean(utility))
    ratios = [
        [record["truth_ratio"] for record in source.to_pylist() if record["set"] == "forget"]
        for source in (table, retrained)
    ]
    assert metrics["forget_quality"].value == pytest.approx(stats.ks_2samp(*ratios).pvalue)
    assert metrics["ks_statistic"].value == pytest.approx(stats.ks_2samp(*ratios).statistic)
    for value in metrics.values():
        assert value.value is not None
        assert value.low is not None
        assert value.high is not None
        assert value.low <= value.value <= value.high
    assert summarise(table, retrained, bootstrap_samples=50, seed=0) == metrics


def test_absent_metrics_have_a_reason(model_dir: Path, tmp_path: Path) -> None:
    sets = {
        "forget": _rows(4, paraphrase=False, wrong=2),
        "retain": _rows(4, paraphrase=True, wrong=2),
        "world_facts": _rows(3, paraphrase=False, wrong=0),
    }
    table = _evaluate(model_dir, tmp_path, sets=sets)
    metrics = summarise(table, bootstrap_samples=10)
    assert tuple(metrics) == LISTED
    reasons = {name: value.reason for name, value in metrics.items() if value.value is None}
    assert set(reasons) == {
        "forget_quality",
        "ks_statistic",
        "model_utility",
        "forget_truth_ratio",
        "real_authors_probability",
        "real_authors_rouge",
        "real_authors_truth_ratio",
        "world_facts_probability",
        "world_facts_truth_ratio",
    }
    assert "evaluation.retrained" in str(reasons["forget_quality"])
    assert "evaluation.sets.real_authors" in str(reasons["real_authors_rouge"])
    assert "evaluation.sets.real_authors" in str(reasons["model_utility"])
    assert "paraphrased_answer" in str(reasons["forget_truth_ratio"])
    assert "perturbed_answer" in str(reasons["world_facts_probability"])
    with_reference = summarise(table, table, bootstrap_samples=10)["forget_quality"]
    assert "paraphrased_answer" in str(with_reference.reason)


def test_rows_without_paraphrase_do_not_count_where_it_is_needed(model_dir: Path, tmp_path: Path) -> None:
    mixed = _rows(4, paraphrase=True, wrong=2) + _rows(3, paraphrase=False, wrong=2)
    metrics = summarise(_evaluate(model_dir, tmp_path, sets={"forget": mixed}), bootstrap_samples=10)
    assert metrics["forget_truth_ratio"].n == 4
    assert metrics["forget_probability"].n == 7


def test_losses_that_are_not_finite_are_reported(model_dir: Path, tmp_path: Path) -> None:
    broken = tiny_model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    metrics = summarise(_evaluate(tmp_path / "broken", tmp_path), _evaluate(model_dir, tmp_path), bootstrap_samples=10)
    assert "not finite on 11 of 11 forget rows" in str(metrics["forget_probability"].reason)
    assert "not finite" in str(metrics["model_utility"].reason)
    assert "not finite" in str(metrics["forget_quality"].reason)
    assert metrics["forget_rouge"].value is not None


def test_another_forget_set_is_no_reference(model_dir: Path, tmp_path: Path) -> None:
    table = _evaluate(model_dir, tmp_path)
    fewer = _evaluate(model_dir, tmp_path, sets={"forget": SETS["forget"][:5]})
    assert "other forget rows" in str(summarise(table, fewer, bootstrap_samples=10)["forget_quality"].reason)


# ----------------------------------------------------------------------------------------------- the user's mistakes


def test_rows_that_cannot_be_evaluated_are_named_without_their_text(model_dir: Path, tmp_path: Path) -> None:
    good = {"question": "who?", "answer": "a secret name"}
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "evaluation.sets.forget has no rows"),
        ([good, {"question": "who?"}], "row forget-1 has no column 'answer'"),
        ([{**good, "answer": "  "}], "row forget-0 has an empty text in column 'answer'"),
        ([{**good, "paraphrased_answer": 3}], "row forget-0 has a int in column 'paraphrased_answer'"),
        ([{**good, "perturbed_answer": ["x", None]}], "row forget-0 has a NoneType in column 'perturbed_answer'"),
        ([{**good, "question": "who " * 600}], "row forget-0 has no answer token left"),
    ]
    for rows, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            _evaluate(model_dir, tmp_path, sets={"forget": rows})
        assert "secret" not in str(caught.value)


def test_columns_of_the_format_or_of_tofu(model_dir: Path) -> None:
    fmt = FormatConfig(question="prompt", answer="reply")
    own = evaluation_rows("forget", [{"prompt": "a", "reply": "b"}], fmt)
    tofu = evaluation_rows("forget", [{"question": "a", "answer": "b"}], fmt)
    assert own == tofu


def test_folders_without_a_model_or_tokenizer_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no usable tokenizer"):
        _evaluate(tmp_path, tmp_path)
    with pytest.raises(UserError, match="is not a model directory"):
        evaluate_model(tmp_path, model_dir, SETS, FormatConfig(), CONFIG, tmp_path, label="test")
    with pytest.raises(UserError, match="neither a model directory nor a model on the hub"):
        evaluate_model("no-such/model", model_dir, SETS, FormatConfig(), CONFIG, tmp_path, label="test")
    damaged = _saved(tmp_path / "damaged", seed=0)
    (damaged / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="does not load"):
        evaluate_model(damaged, model_dir, SETS, FormatConfig(), CONFIG, tmp_path, label="test")


def test_only_the_first_rows_count(model_dir: Path, tmp_path: Path) -> None:
    table = _evaluate(model_dir, tmp_path, EvaluationConfig(max_new_tokens=2, max_rows=3))
    assert table.num_rows == 12
