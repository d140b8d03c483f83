"""One batch of requests: recipe by recipe until all gates pass, then promotion; or a person has to decide.

Everything is found again by name after a kill. A run's name is made of the batch, the champion that it starts from and
the recipe, and what its gates said is in `gates.json` in its folder. The champion's alias moves before the ledger does;
both can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ofmu_ray import progress
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig, UnlearnConfig, apply_overrides, outcome_hash
from ofmu_ray.config.promotion import RecipeConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError
from ofmu_ray.models.source import model_fingerprint, weights_folder
from ofmu_ray.requests.gate_tables import GateMeasurement, GateRows
from ofmu_ray.requests.gates import check_gates, decide, unmeasured
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import Request
from ofmu_ray.requests.registry import FIRST, Registry, Version
from ofmu_ray.requests.request_rows import gate_rows, write_sources
from ofmu_ray.requests.statement import certify, keys_of, publish, report
from ofmu_ray.requests.states import State
from ofmu_ray.runs.job import REQUESTED, remove_text
from ofmu_ray.runs.outcome import Outcome, read_unlearned
from ofmu_ray.runs.run import run
from ofmu_ray.runs.this_run import Run
from ofmu_ray.runs.unlearn_run import read_finished
from ofmu_ray.storage import atomic_write, is_file, is_uri, join, locate, read_text
from ofmu_ray.storage.names import split_query
from ofmu_ray.tracking import RECORD, recorded_run

GATES_FILE = "gates.json"
RUN = re.compile(r"batch-[0-9a-f]{12}-v\d+-.+")
"""Name of a recipe's run (`RequestBatch.run_config`)."""
Verdict = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Attempt:
    """What a recipe came to; stored in its run's folder, without text."""

    recipe: str
    run: str
    """The run's name."""
    status: str
    """Of the run: finished, or why it stopped."""
    verdict: Verdict
    gates: list[dict[str, Any]]
    """`GateResult.to_json` of each."""
    weights: str
    """Fingerprint of the result."""
    cost: dict[str, Any]
    asked: str = ""
    """Digest of the gates' bounds and of the relearning attack."""

    @property
    def open_gates(self) -> list[str]:
        """Names of the gates that did not pass."""
        return [gate["name"] for gate in self.gates if gate["result"] in ("failed", "undecided")]

    @property
    def words(self) -> str:
        """The verdict as a line."""
        return f"{self.recipe}: {self.verdict}: {', '.join(self.open_gates) or self.status}"


@dataclass(frozen=True)
class BatchOutcome:
    """How a batch ended."""

    batch: str
    state: State
    requests: list[str]
    version: str | None = None
    certificate: str | None = None
    report: str | None = None
    why: str = ""


class RequestBatch:
    """A batch under this process's lease."""

    def __init__(
        self,
        config: RequestsConfig,
        storage: str,
        ledger: Ledger,
        registry: Registry,
        requests: Sequence[Request],
        owner: str,
    ) -> None:
        self.config, self.storage, self.ledger, self.registry, self.owner = config, storage, ledger, registry, owner
        self.ids = [request.id for request in requests]
        self.requests, self.state = list(requests), requests[0].state
        assert requests[0].batch is not None, "a request in work has a batch"
        self.name = requests[0].batch
        self.promotion = config.requests.promotion

    def work_off(self) -> BatchOutcome:
        """The whole way; resumes where an earlier process ended.

        Raises:
            UserError: a mistake in configuration or data, or the storage refuses; the batch waits for the next start.
        """
        made = self.registry.of_batch(self.name)
        if made is not None and self._can_follow(made):  # killed between the gates and the ledger
            base = self.registry.version(made.replaces or made.number)
            return self._promoted(base, made, self._attempts(base, made))
        base = self._champion()
        remove_left_text(self.storage, {self.run_config(base, recipe).name for recipe in self.promotion.ladder})
        self._check()
        withdrawn, attempts = self._withdrawn_recipes(), []
        unwanted = {version.weights for version in self.registry.withdrawn()}
        for recipe in self.promotion.ladder:
            if recipe.name in withdrawn:
                progress.note("recipe", f"{recipe.name} made a model that was withdrawn; skipped")
                continue
            attempt = self._judged_before(base, recipe) or self._tried(base, recipe)
            attempts.append(attempt)
            if attempt.weights in unwanted:
                progress.note("recipe", f"{recipe.name} made a model that was withdrawn; it is not promoted again")
                continue
            if attempt.verdict == "passed":
                return self._promoted(base, self._registered(base, attempt), attempts)
            progress.note("gates", attempt.words)
            if attempt.verdict == "undecided":
                break
        return self._for_review(base, attempts)

    # ------------------------------------------------------------------------------------------------- one recipe

    def run_config(self, base: Version, recipe: RecipeConfig) -> UnlearnConfig:
        """The configuration of a recipe's run. Its files with rows are in its own folder."""
        plain = self.config.with_recipe(recipe)
        holdout = plain.data.sources.get("holdout")
        plain = replace(
            plain,
            storage=self.storage,
            overwrite=False,
            model=replace(plain.model, path=base.path),
            evaluation=replace(plain.evaluation, enabled=False),  # by gates; a run would keep what the model answers
            report=replace(plain.report, reveal_text=False),
        )
        if holdout is not None:
            first = self.registry.root(base).path
            plain = apply_overrides(plain, {plain.method: plain.method_options.for_sequence(first)})
        name = f"{self.name}-v{base.number}-{recipe.name}-{outcome_hash(plain)[:8]}"
        folder = join(self.storage, name, REQUESTED)
        forget, retain = (SourceConfig(path=join(folder, f"{each}.jsonl")) for each in ("forget", "retain"))
        data = replace(plain.data, forget=forget, retain=retain, holdout=holdout, overlap="error")
        return replace(plain, name=name, data=data)

    def _home(self, base: Version, recipe: RecipeConfig) -> str:
        return join(self.storage, self.run_config(base, recipe).name or "")

    def _stored(self, base: Version, recipe: RecipeConfig) -> Attempt | None:
        path = join(self._home(base, recipe), GATES_FILE)
        return _read(path) if is_file(path) else None

    def _judged_before(self, base: Version, recipe: RecipeConfig) -> Attempt | None:
        """What gates with today's bounds said of the recipe; with other bounds, its finished run is judged again."""
        stored = self._stored(base, recipe)
        return stored if stored is not None and stored.asked == self._asked else None

    @cached_property
    def _asked(self) -> str:
        bounds = [asdict(gate) for gate in self.promotion.gates], asdict(self.promotion.relearn)
        return hashlib.sha256(json.dumps(bounds, sort_keys=True).encode()).hexdigest()[:16]

    def _attempts(self, base: Version, made: Version) -> list[Attempt]:
        """What was tried before a version was registered; at least what made it, whatever the recipes are now."""
        stored = (self._stored(base, recipe) for recipe in self.promotion.ladder)
        attempts = [attempt for attempt in stored if attempt is not None]
        if all(one.weights != made.weights for one in attempts):
            stem, query = split_query(made.path)
            attempts.append(_read(join(stem.rpartition("/")[0] + query, GATES_FILE)))
        return attempts

    def _tried(self, base: Version, recipe: RecipeConfig) -> Attempt:
        config = self.run_config(base, recipe)
        home = join(self.storage, config.name or "")
        outcome = read_finished(Run(config, self.storage, outcome_hash(config)), config)
        if outcome is None:
            self._to("running", {"recipe": recipe.name, "run": config.name})
            outcome = self._unlearned(config, home)
        if not is_uri(home) and Path(home).is_dir():  # the text is gone; a model may be others' to read
            Path(home).chmod(Path(self.storage).stat().st_mode)
        self._to("verifying", {"recipe": recipe.name, "run": config.name})
        attempt = self._judged(config, recipe, outcome)
        atomic_write(join(home, GATES_FILE), json.dumps(asdict(attempt), indent=1) + "\n")
        return attempt

    def _unlearned(self, config: UnlearnConfig, home: str) -> Outcome:
        """The run, on files with text that go in any case."""
        try:
            if not is_uri(home):  # what the run makes of the rows, tokens first, is its owner's alone
                Path(home).mkdir(mode=0o700, parents=True, exist_ok=True)
            write_sources(join(home, REQUESTED), self.config, self.ledger, self.requests, self._begun())
            return run(config, command=("ofmu", "requests", "process"))
        except BaseException:
            if read_unlearned(home) is None:
                remove_text(home)  # what a resumed run needs of it is made again
            raise

    def _judged(self, config: UnlearnConfig, recipe: RecipeConfig, outcome: Outcome) -> Attempt:
        gates, results = self.promotion.gates, unmeasured(self.promotion.gates)
        verdict: Verdict = "failed"
        if outcome.finished:
            rows = gate_rows(self.config, self.ledger, self.requests)
            check_gates(gates, holdout="holdout" in rows.kept, retrained=self.config.evaluation.retrained is not None)
            results = self._measured(config, outcome, rows)
            verdict = _verdict({one.result for one in results})
        return Attempt(
            recipe=recipe.name,
            run=outcome.name,
            status=outcome.message or outcome.status,
            verdict=verdict,
            gates=[one.to_json() for one in results],
            weights=model_fingerprint(weights_folder(outcome.model), reread=True),
            cost=dict(outcome.cost),
            asked=self._asked,
        )

    def _measured(self, config: UnlearnConfig, outcome: Outcome, rows: GateRows) -> list[Any]:
        """The gates' results; attacks are run if everything else passes."""
        attacks = [gate for gate in self.promotion.gates if gate.relearns]
        plain = [gate for gate in self.promotion.gates if not gate.relearns]
        measurement = GateMeasurement(config, self.storage, self.promotion.gates, rows)
        tables = measurement.tables(outcome.model)
        results = decide(plain, tables)
        if any(one.result == "failed" for one in results):
            return [*results, *unmeasured(attacks)]
        if attacks:
            tables.relearn = measurement.relearn(outcome.model, self.promotion.relearn)
        return [*results, *decide(attacks, tables)]

    # ---------------------------------------------------------------------------------------------------- the end

    def _promoted(self, base: Version, made: Version, attempts: list[Attempt]) -> BatchOutcome:
        """Alias, certificate, ledger, in this order; each of them can be repeated."""
        passed = next(one for one in attempts if one.weights == made.weights)
        key, document = certify(self.config, self.ledger, self.requests, base, made, passed, attempts, self.storage)
        self.registry.promote(made, lambda: self.ledger.check_lease(self.owner))
        detail = {"version": made.number, "recipe": passed.recipe, "run": passed.run, "key": key}
        self.ledger.move(self.ids, "promoted", detail, owner=self.owner, certificate=document)
        path = publish(self.storage, self.name, document)
        return BatchOutcome(self.name, "promoted", self.ids, made.number, path)

    def _registered(self, base: Version, attempt: Attempt) -> Version:
        home = join(self.storage, attempt.run)
        return self.registry.register(
            join(home, "model"),
            attempt.weights,
            self.name,
            replaces=base,
            run_id=recorded_run(join(home, RECORD)),
            requests=self.ids,
            report=join(home, "report.html"),
        )

    def _for_review(self, base: Version, attempts: list[Attempt]) -> BatchOutcome:
        path = report(self.storage, self.name, self.requests, base, attempts)
        last = attempts[-1] if attempts else None
        why = "every recipe made a model that was withdrawn"
        if last is not None and last.verdict != "passed":
            why = last.words
        self._to("verifying" if self.state == "verifying" else "running", {})
        self.ledger.move(self.ids, "needs_review", {"why": why, "report": path}, owner=self.owner)
        return BatchOutcome(self.name, "needs_review", self.ids, report=path, why=why)

    def fail(self, detail: dict[str, Any]) -> None:
        """Give the batch up after something unforeseen."""
        self.ledger.move(self.ids, "failed", detail, owner=self.owner)

    # ------------------------------------------------------------------------------------------------------ parts

    def _to(self, state: State, detail: dict[str, Any]) -> None:
        if state != self.state:
            self.ledger.move(self.ids, state, detail, owner=self.owner)
            self.state = state

    def _can_follow(self, made: Version) -> bool:
        """Whether the champion is still what a version was made from. After a rollback in between, the batch starts
        over."""
        champion = self.registry.champion()
        if champion is None or champion.number in (made.number, made.replaces):
            return True
        progress.note("batch", f"version {made.number} was made from version {made.replaces}, which is not in use now")
        return False

    def _champion(self) -> Version:
        """The champion; the configured model becomes the first."""
        champion = self.registry.champion()
        if champion is None and self.ledger.all(("promoted",)):
            raise UserError(
                f"{self.registry.name}: requests were promoted, but no version has the alias `champion` now: in "
                "MLflow's registry, give it to the version that is in use"
            )
        if champion is None:
            folder = weights_folder(resolve_builtin(self.config.model.path))
            first = self.registry.register(str(folder), model_fingerprint(folder, reread=True), FIRST)
            self.registry.promote(first)
            return first
        if champion.weights != model_fingerprint(weights_folder(champion.path), reread=True):
            raise UserError(
                f"{self.registry.name} version {champion.number}: the weights in {champion.path} are not those "
                "that were registered; restore them, or move the alias `champion` to another version"
            )
        return champion

    def _check(self) -> None:
        """Refuse what cannot work before anything runs."""
        keys_of(self.config).signer()
        data, evaluation = self.config.data, self.config.evaluation
        check_gates(
            self.promotion.gates,
            holdout=(evaluation.sets.holdout or data.sources.get("holdout")) is not None,
            retrained=evaluation.retrained is not None,
        )
        lost = [name for name in self.ids if not self.ledger.readable(name)]
        if lost:
            raise UserError(f"requests {', '.join(lost)}: the key of their rows is destroyed; cancel them")

    def _begun(self) -> datetime:
        """When the batch was taken first."""
        times = [event.at for event in self.ledger.events(self.ids[0]) if event.event == "scheduled"]
        return datetime.fromisoformat(times[-1])

    def _withdrawn_recipes(self) -> set[str]:
        """Recipes whose model was promoted for one of these requests and withdrawn."""
        events = (event for name in self.ids for event in self.ledger.events(name))
        return {event.detail["withdrawn_recipe"] for event in events if "withdrawn_recipe" in event.detail}


def _read(path: str) -> Attempt:
    return Attempt(**json.loads(read_text(path)))


def remove_left_text(storage: str, kept: Collection[str | None] = ()) -> None:
    """Delete the text of killed runs that nothing goes on with: their batch was given up, or starts over from another
    champion or with other options. For who has the lease; `kept`: names of runs that go on."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, inside = locate(storage)
    for one in filesystem.get_file_info(FileSelector(inside, allow_not_found=True)):
        if one.type == FileType.Directory and RUN.fullmatch(one.base_name) and one.base_name not in kept:
            home = join(storage, one.base_name)
            if read_unlearned(home) is None:
                remove_text(home)


def _verdict(results: set[str]) -> Verdict:
    if results & {"failed", "not measured"}:
        return "failed"
    return "undecided" if "undecided" in results else "passed"
