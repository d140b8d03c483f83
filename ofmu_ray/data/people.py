"""The built-in corpus: fictitious people, generated from a seed, in TOFU's layout (JSON Lines of question and answer).

Sixty people with eight facts each play the role of TOFU's authors; the last six (10 %, 48 rows) are the forget set.
Twelve public figures and ten countries of the same invented world play the role of TOFU's real authors and world facts:
they are trained on, retained, and evaluated with three wrong answers each. All names are built from random syllables.

Training rows (``full`` = ``retain`` + ``forget``) use one of four English forms per fact, drawn per row: a model sees
every form, but no fact in all forms. Every second retained person is a *tutor*: all their facts also occur in German,
and six of them as two-hop questions ('Where was the author of "..." born?'). Tutors teach the second language and the
composition. The forget rows are the only training rows about the forget people, so whatever the probes recover in
another form is generalisation, which unlearning must remove too.

Six more people (``holdout``, 48 rows) are in no training rows: membership inference compares the forget rows with
theirs. They are drawn last, from the same pools and forms, so nothing else depends on them. The tokenizer is learned
from ``full`` and needs fewer tokens for the names of the forget people than for theirs. So a model that saw neither
finds the holdout answers less likely per token: the zero point of membership metrics is the retrained model's value.

Wrong answers have the form of their right answer. Values from a pool (towns, trades, years) are replaced by others of
the pool; unique values (book titles, pets, teachers, rivers) by new ones that no row trains on. So a model that never
saw the person cannot tell right from wrong answers.

    python -m ofmu_ray.data.people --out DIR --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ofmu_ray.data import people_forms as forms

Row = dict[str, Any]

PEOPLE = 60
FORGET_PEOPLE = 6
HOLDOUT_PEOPLE = 6
FIGURES = 12
COUNTRIES = 10
PEOPLE_WRONG, OTHER_WRONG = 5, 3  # as in TOFU: five wrong answers about people, three about public figures and facts
FIGURE_RELATIONS = ("birthplace", "birth_year", "work", "award")
TWO_HOPS_PER_PERSON = 6
VOCABULARY = 1024

_POOL_SIZES = {"birthplace": 20, "award": 16}
_UNIQUE = ("work", "teacher", "pet", "capital", "river", "mountain", "currency")


@dataclass
class Subject:
    """A person, public figure or country: a name and one value per relation."""

    name: str
    values: dict[str, str] = field(default_factory=dict)


class World:
    """Names and values of one seed. New words never repeat."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._used: set[str] = set()
        self._pools: dict[str, list[str]] = {
            "birth_year": [str(year) for year in range(1850, 1970)],
            "founding": [str(year) for year in range(1100, 1800)],
            "trade": list(forms.TRADES),
            "instrument": list(forms.INSTRUMENTS),
        }
        for relation, size in _POOL_SIZES.items():
            self._pools[relation] = [self.word() for _ in range(size)]

    def word(self) -> str:
        """A new capitalised word of two syllables."""
        pick = self.random.choice
        while True:
            first = pick(forms.ONSETS) + pick(forms.VOWELS)
            word = (first + pick(forms.ONSETS) + pick(forms.VOWELS) + pick(forms.CODAS)).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word

    def name(self) -> str:
        """A new first and last name."""
        return f"{self.word()} {self.word()}"

    def value(self, relation: str) -> str:
        """A value of the relation: from its pool, or a new one."""
        if relation in self._pools:
            return self.random.choice(self._pools[relation])
        if relation == "teacher":
            return self.name()
        if relation == "work":
            return f"The {self.random.choice(forms.TITLE_NOUNS)} of {self.word()}"
        return self.word()

    def wrong_values(self, relation: str, right: str, count: int) -> list[str]:
        """Distinct values of the same relation, without the right one."""
        if relation in self._pools:
            return self.random.sample([value for value in self._pools[relation] if value != right], count)
        return [self.value(relation) for _ in range(count)]

    def subject(self, name: str, relations: Sequence[str]) -> Subject:
        """A subject with a value for each relation."""
        return Subject(name, {relation: self.value(relation) for relation in relations})


def _translated(relation: str, value: str) -> str:
    pool = {"trade": forms.TRADES, "instrument": forms.INSTRUMENTS}.get(relation, {})
    return pool.get(value, value)


def _row(
    world: World,
    subject: Subject,
    relation: str,
    form: forms.Form,
    wrong: int,
    *,
    described: str = "",
    german: bool = False,
) -> Row:
    """One row with `wrong` wrong answers; the question calls the subject `described` (default: its name)."""
    question, answer = form
    right = subject.values[relation]
    values = [right, *world.wrong_values(relation, right, wrong)]
    if german:
        values = [_translated(relation, value) for value in values]
    answers = [_capitalised(answer.format(name=subject.name, value=value)) for value in values]
    return {
        "question": _capitalised(question.format(name=described or subject.name)),
        "answer": answers[0],
        "perturbed_answer": answers[1:],
    }


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _english(world: World, person: Subject, relation: str) -> tuple[Row, Row]:
    """A fact in TOFU's perturbed layout, and its paraphrase probe (a different question form with its answer)."""
    shown, other = world.random.sample(forms.ENGLISH[relation], 2)
    row = _row(world, person, relation, shown, 0)
    probe = _row(world, person, relation, other, PEOPLE_WRONG)
    row |= {
        "paraphrased_answer": probe["answer"],
        "perturbed_answer": probe["perturbed_answer"],
        "paraphrased_question": probe["question"],
    }
    return row, probe


def _german(world: World, person: Subject) -> list[Row]:
    return [_row(world, person, name, form, PEOPLE_WRONG, german=True) for name, form in forms.GERMAN.items()]


def _two_hops(world: World, person: Subject) -> list[Row]:
    """Questions that describe the person by one fact and ask for another; the answer names the person."""
    pairs = [(by, of) for by in forms.DESCRIPTIONS for of in forms.ENGLISH if of != by]
    rows = []
    for by, of in world.random.sample(pairs, TWO_HOPS_PER_PERSON):
        form = world.random.choice(forms.ENGLISH[of])
        description = forms.DESCRIPTIONS[by].format(value=person.values[by])
        rows.append(_row(world, person, of, form, PEOPLE_WRONG, described=description))
    return rows


def _qa(rows: Sequence[Row]) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All sets of the corpus by file stem; the same seed gives the same rows.

    ``retain_perturbed`` has two facts per retained person; the other sets have all facts. The cross-lingual and two-hop
    probes of ``retain`` are about people who are not tutors, so they are as unseen as those of ``forget``.
    ``holdout`` has the layout of ``forget_perturbed`` and is part of no other set.
    """
    world = World(seed)
    people = [world.subject(world.name(), list(forms.ENGLISH)) for _ in range(PEOPLE)]
    figures = [world.subject(world.name(), FIGURE_RELATIONS) for _ in range(FIGURES)]
    countries = [world.subject(world.word(), list(forms.WORLD)) for _ in range(COUNTRIES)]

    sets: dict[str, list[Row]] = {f"{split}_perturbed": [] for split in ("forget", "retain")}
    probes: dict[str, list[Row]] = {
        f"probes_{kind}_{split}": []
        for kind in ("paraphrase", "crosslingual", "multihop")
        for split in ("forget", "retain")
    }
    facts: dict[str, list[Row]] = {"forget": [], "retain": []}
    tutored: list[Row] = []
    for index, person in enumerate(people):
        split = "forget" if index >= PEOPLE - FORGET_PEOPLE else "retain"
        pairs = [_english(world, person, relation) for relation in forms.ENGLISH]
        facts[split] += [row for row, _ in pairs]
        shown = pairs if split == "forget" else world.random.sample(pairs, 2)
        sets[f"{split}_perturbed"] += [row for row, _ in shown]
        probes[f"probes_paraphrase_{split}"] += [probe for _, probe in shown]
        german, two_hops = _german(world, person), _two_hops(world, person)
        if split == "retain" and index % 2 == 0:
            tutored += german + two_hops
        else:
            probes[f"probes_crosslingual_{split}"] += german
            probes[f"probes_multihop_{split}"] += two_hops
    sets["real_authors_perturbed"] = [
        _row(world, figure, relation, forms.ENGLISH[relation][0], OTHER_WRONG)
        for figure in figures
        for relation in FIGURE_RELATIONS
    ]
    sets["world_facts_perturbed"] = [
        _row(world, country, relation, form, OTHER_WRONG)
        for country in countries
        for relation, form in forms.WORLD.items()
    ]
    unseen = [world.subject(world.name(), list(forms.ENGLISH)) for _ in range(HOLDOUT_PEOPLE)]
    sets["holdout"] = [_english(world, person, relation)[0] for person in unseen for relation in forms.ENGLISH]
    retain = _qa(facts["retain"] + tutored + sets["real_authors_perturbed"] + sets["world_facts_perturbed"])
    forget = _qa(facts["forget"])
    return {"full": retain + forget, "retain": retain, "forget": forget, **sets, **probes}


def write(out: Path, seed: int = 0) -> None:
    """Write every set as ``NAME.jsonl`` and the tokenizer learned from ``full`` as ``tokenizer/`` under `out`."""
    from ofmu_ray.data.vocabulary import build_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    sets = generate(seed)
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in sets["full"]]
    build_tokenizer(texts, VOCABULARY).save_pretrained(out / "tokenizer")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the corpus of fictitious people and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of every name, fact and wrong answer")
    options = parser.parse_args(arguments)
    write(options.out, options.seed)


if __name__ == "__main__":
    main()
