"""The built-in corpus: the shipped files follow from the seed, and retain rows say nothing about forget people."""

import hashlib
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ofmu_ray.data.people import generate
from ofmu_ray.data.vocabulary import build_tokenizer

SHIPPED = Path(str(files("ofmu_ray") / "assets" / "people"))
SETS = generate(0)
TRAINED_ON = "f923225bccb56d3b250c29ff1654140c48f3d99eb100d0bfb56d06198dd208c5"
"""sha256 over names and bytes of the files that the shipped models depend on: it must never change."""


def _names(root: Path) -> list[str]:
    suffixes = (".jsonl", ".json")
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in suffixes)


def _corpus_names(root: Path) -> list[str]:
    """Files of the corpus itself, without the models trained on it, which have their own folders."""
    return [name for name in _names(root) if "/" not in name or name.startswith("tokenizer/")]


@pytest.mark.system
def test_shipped_files_are_what_the_command_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ofmu_ray.data.people", "--out", str(tmp_path), "--seed", "0"]
    subprocess.run(command, check=True)
    assert _corpus_names(tmp_path) == _corpus_names(SHIPPED)
    differing = [n for n in _names(tmp_path) if (tmp_path / n).read_bytes() != (SHIPPED / n).read_bytes()]
    assert differing == []
    assert sum((SHIPPED / name).stat().st_size for name in _corpus_names(SHIPPED)) < 1_000_000


def test_another_seed_gives_other_people() -> None:
    other = generate(1)
    assert {name: len(rows) for name, rows in other.items()} == {name: len(rows) for name, rows in SETS.items()}
    assert not {row["question"] for row in other["forget"]} & {row["question"] for row in SETS["forget"]}


@pytest.mark.parametrize(
    ("name", "count", "wrong"),
    [
        ("full", 956, None),
        ("retain", 908, None),
        ("forget", 48, None),
        ("forget_perturbed", 48, 5),
        ("retain_perturbed", 108, 5),
        ("real_authors_perturbed", 48, 3),
        ("world_facts_perturbed", 50, 3),
        ("probes_paraphrase_forget", 48, 5),
        ("probes_paraphrase_retain", 108, 5),
        ("probes_crosslingual_forget", 48, 5),
        ("probes_crosslingual_retain", 216, 5),
        ("probes_multihop_forget", 36, 5),
        ("probes_multihop_retain", 162, 5),
        ("holdout", 48, 5),
    ],
)
def test_counts_and_wrong_answers(name: str, count: int, wrong: int | None) -> None:
    rows = SETS[name]
    assert len(rows) == count
    assert len({row["question"] for row in rows}) == count
    if wrong is None:
        assert all(set(row) == {"question", "answer"} for row in rows)
        return
    for row in rows:
        right = row.get("paraphrased_answer", row["answer"])
        assert len(set(row["perturbed_answer"])) == wrong
        assert right not in row["perturbed_answer"]
        assert row["answer"][0].isupper()
        assert row["answer"].endswith(".")
        assert "{" not in json.dumps(row, ensure_ascii=False).removeprefix("{")


def test_full_is_retain_and_forget() -> None:
    pairs = {name: [(row["question"], row["answer"]) for row in SETS[name]] for name in ("full", "retain", "forget")}
    assert sorted(pairs["full"]) == sorted(pairs["retain"] + pairs["forget"])
    assert not set(pairs["retain"]) & set(pairs["forget"])


def test_evaluation_rows_are_trained_on_and_probes_are_not() -> None:
    questions = {name: {row["question"] for row in SETS[name]} for name in SETS}
    assert questions["forget_perturbed"] == questions["forget"]
    for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        assert questions[name] <= questions["retain"]
    for name in (name for name in SETS if name.startswith("probes_")):
        assert not questions[name] & questions["full"], name


def test_no_forget_fact_in_the_retain_text() -> None:
    """Names, titles, pets and teachers of the forget people are unique words; no retain row contains one."""
    retain = " ".join(row["question"] + " " + row["answer"] for row in SETS["retain"])
    kept = set(re.findall(r"\w+", retain))
    people = {row["question"].removeprefix("Wo wurde ").removesuffix(" geboren?") for row in _born("forget")}
    assert len(people) == 6
    unique = [row["answer"] for row in SETS["probes_crosslingual_forget"] if _is_unique_fact(row["question"])]
    assert len(unique) == 18
    words = {word for text in [*people, *unique] for word in re.findall(r"[A-Z][a-z]+", text)}
    assert words & kept <= set(re.findall(r"\w+", _german_frames())), words & kept


def test_what_the_shipped_models_know_is_untouched() -> None:
    digest = hashlib.sha256()
    for name in _corpus_names(SHIPPED):
        if name != "holdout.jsonl":
            digest.update(name.encode() + (SHIPPED / name).read_bytes())
    assert digest.hexdigest() == TRAINED_ON


def test_nobody_knows_the_holdout_people() -> None:
    """Six words of each person appear nowhere else: two of the name, one of the book, two of the teacher, the pet."""
    assert [list(row) for row in SETS["holdout"]] == [list(row) for row in SETS["forget_perturbed"]]
    others = json.dumps([rows for name, rows in SETS.items() if name != "holdout"], ensure_ascii=False)
    elsewhere = set(re.findall(r"\w+", others))
    for start in range(0, 48, 8):
        rows = SETS["holdout"][start : start + 8]
        words = [set(re.findall(r"[A-Z]\w+", row["question"])) for row in rows]
        name = set.intersection(*words)
        assert len(name) == 2
        assert not name & elsewhere
        facts = " ".join(row["question"] + " " + row["answer"] for row in rows)
        assert len(set(re.findall(r"\w+", facts)) - elsewhere) == 6


def _born(split: str) -> list[dict[str, str]]:
    return [row for row in SETS[f"probes_crosslingual_{split}"] if row["question"].startswith("Wo wurde ")]


def _is_unique_fact(question: str) -> bool:
    return question.startswith(("Durch welches Buch", "Bei wem", "Wie heißt das Haustier"))


def _german_frames() -> str:
    from ofmu_ray.data import people_forms as forms

    frames = " ".join(text for form in forms.GERMAN.values() for text in form)
    return f"{frames} {' '.join(forms.TITLE_NOUNS)} The"


def test_tokenizer_puts_one_bos_and_round_trips_any_text() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tokenizer")
    assert len(tokenizer) == 1024
    assert tokenizer.chat_template is None
    for text in (SETS["full"][0]["answer"], 'Grüße, 東京! "x"  y', "Question: a\nAnswer: b"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_vocabulary_is_a_function_of_the_texts() -> None:
    texts = [row["answer"] for row in SETS["retain"]]
    one, two = build_tokenizer(texts, 400), build_tokenizer(texts, 400, max_length=64)
    assert one.get_vocab() == two.get_vocab()
    assert len(one) == 400
    assert two.model_max_length == 64
