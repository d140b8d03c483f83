"""A storage with two people's requests, for tests of processing: the built-in model, a few rounds, loose gates."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from leak_scan import leaks

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.requests.intake import open_ledger
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.registry import Registry
from pipelines import cli

STRONG = {"name": "strong", "options": {"training.rounds": 8, "ofmu.inner.lr": 1.2e-3}}
CRIPPLED = {"name": "crippled", "options": {"training.rounds": 1, "ofmu.inner.lr": 1e-9, "ofmu.outer.lr": 1e-9}}
GATES = [
    {"metric": "forget_probability", "against": "holdout", "at_most": 0.4},
    {"metric": "forget_extraction_strength", "against": "holdout", "at_most": 0.6},
    {"metric": "forget_truth_ratio", "against": "holdout", "at_least": -0.5, "if_absent": "skip"},
    {"metric": "forget_repetition", "against": "holdout", "at_most": 0.4},
    {"metric": "retain_probability", "against": "champion", "at_least": 0.7},
    {"metric": "forget_probability", "rows": "earlier", "against": "holdout", "at_most": 0.4},
    {"metric": "relearn/forget/step_1", "against": "holdout", "at_most": 0.5},
]


def people(name: str) -> list[dict[str, Any]]:
    """Rows of a built-in file."""
    return [json.loads(line) for line in Path(resolve_builtin(f"builtin:people/{name}.jsonl")).read_text().splitlines()]


def pairs(rows: list[dict[str, Any]], person: int) -> list[dict[str, str]]:
    """Question and answer of the eight rows of a person."""
    return [{name: row[name] for name in ("question", "answer")} for row in rows[8 * person : 8 * person + 8]]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class World:
    """A folder with data, configuration and storage, and what the commands said."""

    folder: Path
    said: list[str] = field(default_factory=list)

    @classmethod
    def made(
        cls, folder: Path, recipes: list[dict[str, Any]], training: dict[str, Any] | None = None, **requests: Any
    ) -> "World":
        """With a ledger and a signing key. The people 0 to 5 are those of the built-in forget rows.

        `training`, `requests`: more options of these sections.
        """
        world = cls(folder)
        write_rows(folder / "train.jsonl", people("full")[::-1])  # rows to forget would be the first to be evaluated
        for person in range(6):
            write_rows(folder / f"person{person}.jsonl", pairs(people("forget"), person))
        none = dict.fromkeys(("forget", "retain", "real_authors", "world_facts"))
        config = {
            "storage": str(world.storage),
            "ofmu": {"forget_loss": "bounded_row"},
            "training": {"engine": "torch", "batch_size": 8, "checkpoint_every": 4, **(training or {})},
            "evaluation": {
                "enabled": False, "sets": none, "max_rows": 24, "max_new_tokens": 8, "bootstrap_samples": 100,
            },
            "tracking": {"system_metrics": False},
            "requests": {
                "train": {"path": str(folder / "train.jsonl")},
                "promotion": {
                    "gates": GATES, "recipes": recipes, "relearn": {"rows": 4, "steps": [1], "batch_size": 4},
                },
                **requests,
            },
        }  # fmt: skip
        (folder / "requests.yaml").write_text(yaml.safe_dump(config))
        assert world.call("init") == 0
        assert world.call("keys", "create") == 0
        return world

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def config(self) -> RequestsConfig:
        return parse(RequestsConfig, ["--config", str(self.folder / "requests.yaml")], "ofmu requests")

    @property
    def registry(self) -> Registry:
        return Registry(self.config.tracking, str(self.storage), "ofmu")

    def ledger(self) -> Ledger:
        return open_ledger(self.config)

    def call(self, *words: str) -> int:
        """A subcommand of `ofmu requests` in this process; its output is in `said`."""
        out = io.StringIO()
        configured = ["--config", str(self.folder / "requests.yaml")]
        with redirect_stdout(out), redirect_stderr(out):
            status = cli.main(["requests", *words, *configured])
        self.said.append(out.getvalue())
        return status

    def add(self, person: int) -> str:
        """Request a person's rows; the request's id."""
        assert self.call("add", "--rows", str(self.folder / f"person{person}.jsonl"), "--key", f"person-{person}") == 0
        return self.said[-1].split()[0]

    def state(self, request: str) -> str:
        with self.ledger() as ledger:
            return ledger.get(request).state

    def leaks(self, needles: list[str]) -> list[str]:
        """Files below the storage that contain one of the texts, and `said` if the output does."""
        return leaks([self.storage], needles) + (
            ["said"] if any(one in text for text in self.said for one in needles) else []
        )
