"""Requests worked off for real: recipes, gates, promotion, certificate, a kill, rollback, two processors."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from leak_scan import leaks
from ledger_machine import Clock
from mlflow import MlflowClient
from requests_kill import PHASES, WITHDRAWALS, kill_in
from requests_server import PEOPLE, ROWS_EACH, configured
from requests_world import CRIPPLED as UNCHANGED
from requests_world import STRONG, World, pairs, people, write_rows
from s3_server import s3_server

import ofmu_ray
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import SourceConfig
from ofmu_ray.config.promotion import RecipeConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.data.row_checks import digests
from ofmu_ray.data.sources import fingerprint, fragments
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.models.source import model_fingerprint
from ofmu_ray.requests import ladder
from ofmu_ray.requests.certificate import NOT_PROVED, CertificateError, verify
from ofmu_ray.requests.gate_tables import gate_cache
from ofmu_ray.requests.intake import Submission, submit
from ofmu_ray.requests.ladder import Attempt, RequestBatch
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.process import ChampionMoved, ProcessingFailed, process, rollback
from ofmu_ray.requests.registry import Registry, Version
from ofmu_ray.requests.renewal import drop_dead
from ofmu_ray.requests.request_rows import write_sources
from ofmu_ray.requests.statement import keys_of
from ofmu_ray.requests.vault import Vault, master_key
from ofmu_ray.runs.job import REQUESTED

pytestmark = pytest.mark.system


CRIPPLED = {"inner": {"lr": 1e-9}, "outer": {"lr": 1e-9}, "inner_steps": 1, "outer_steps": 1}
SWEPT = {"name": "swept", "options": {"training.rounds": 8}, "grid": {"ofmu": [CRIPPLED, {"inner": {"lr": 1.2e-3}}]}}
"""A small sweep: the first combination forgets nothing."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Person 0 was promoted by the grid's second combination; then a processor was killed as it promoted person 1."""
    world = World.made(tmp_path_factory.mktemp("world"), [SWEPT])
    world.add(0)
    assert world.call("process") == 0, world.said[-1]
    world.add(1)
    kill_in(world, "alias moved")
    return world


def test_the_ladder_goes_on_until_all_gates_pass(world: World) -> None:
    said = next(text for text in world.said if "promoted" in text)
    assert "swept-1: failed: forget_probability against holdout" in said
    with world.ledger() as ledger:
        first = ledger.all()[0]
        assert first.state == "promoted"
        states = [event.event for event in ledger.events(first.id)]
        assert states == ["received", "accepted", "scheduled", "running", "verifying", "running", "verifying",
                          "promoted"]  # fmt: skip
        number = ledger.events(first.id)[-1].detail["version"]
        document = ledger.certificate(first.id)
    made = world.registry.version(number)
    assert (made.number, made.replaces, made.tags["ofmu.requests"]) == ("2", "1", first.id)
    assert made.run_id
    path = world.storage / "requests" / "certificates" / f"{first.batch}.json"
    assert path.read_text() == document
    content = verify(path, world.storage / "requests" / "keys", made.path).content
    check_certificate(world, content)
    with pytest.raises(CertificateError, match="weights"):
        verify(path, world.storage / "requests" / "keys", world.registry.version("1").path)
    assert [one["verdict"] for one in content["attempts"]] == ["failed", "passed"]
    assert {gate["result"] for gate in content["gates"]} == {"passed", "skipped"}
    assert content["data"]["forget"] == {"rows": 8}
    assert content["data"]["retain"]["rows"] == 948
    with world.ledger() as ledger:
        row = pairs(people("forget"), 0)[3]
        assert ledger.hashes.row(row["question"], row["answer"]) in content["requests"][0]["rows"]


def check_certificate(world: World, content: Mapping[str, Any]) -> None:
    """What it says of base, data, method, cost and software is what was used."""
    home, digest = world.storage / content["run"], model_fingerprint(Path(resolve_builtin("builtin:people/target")))
    assert content["base"] == {"version": "1", "weights": digest}
    assert content["not_proved"] == list(NOT_PROVED)
    assert len(NOT_PROVED) == 5
    assert (content["method"]["name"], content["method"]["recipe"], content["method"]["seed"]) == ("ofmu", "swept-2", 0)
    options = content["method"]["options"]
    assert (options["ofmu"]["inner"]["lr"], options["ofmu"]["forget_loss"]) == (1.2e-3, "bounded_row")
    assert (options["training"]["rounds"], options["training"]["batch_size"]) == (8, 8)
    manifest = json.loads((home / "manifest.json").read_text())
    assert content["method"]["config_hash"] == manifest["config_hash"]
    assert content["cost"] == json.loads((home / "metrics.json").read_text())["cost"] == content["attempts"][1]["cost"]
    assert content["cost"]["gradient_passes"] == {"forget": 3 * 8, "retain": 8 * 8}
    assert content["code"] == manifest["code"]
    assert content["verified_with"]["version"] == content["code"]["version"] == ofmu_ray.__version__
    used = {name: version(name) for name in ("torch", "transformers", "mlflow", "cryptography")}
    assert used.items() <= content["packages"].items()
    assert content["python"] == platform.python_version()
    with world.ledger() as ledger:
        events = ledger.events()
        entries = content["ledger"]["entries"]
        assert content["ledger"]["head"] == events[entries - 1].hash
        assert (events[entries - 1].event, events[entries].event) == ("verifying", "promoted")
        first = ledger.all()[0]
        begun = datetime.fromisoformat(next(event.at for event in events if event.event == "scheduled"))
        folder = world.folder / "again"  # beside the storage: not left there
        paths = write_sources(str(folder), world.config, ledger, [first], begun)
    pieces = fragments(SourceConfig(path=paths["retain"]), None, stream="retain", option="x")
    assert content["data"]["retain"]["sha256"] == fingerprint(pieces)
    shutil.rmtree(folder)


def test_a_processor_killed_after_the_alias_moved_is_resumed(world: World) -> None:
    with world.ledger() as ledger:
        second = ledger.all()[1]
        assert second.state == "verifying"
        assert ledger.holder() is not None
    assert world.registry.champion().number == "3"
    (outcome,) = process(world.config)
    assert (outcome.state, outcome.version, outcome.requests) == ("promoted", "3", [second.id])
    assert (world.registry.champion().number, world.registry.previous().number) == ("3", "2")
    with world.ledger() as ledger:
        assert [event.event for event in ledger.events(second.id)].count("promoted") == 1
        assert ledger.audit() == []
    gates = verify(outcome.certificate, world.storage / "requests" / "keys").content["gates"]
    persistence = [gate for gate in gates if "earlier" in gate["name"]]
    assert [gate["result"] for gate in persistence] == ["passed"] * 2  # together, and the one request on its own
    assert process(world.config) == []


def guesses(rows: list[dict[str, str]], folder: Path) -> list[str]:
    """Digests that somebody who guesses a request's rows can compute: of a file of them, as a source, of the rows."""
    write_rows(folder / "forget.jsonl", rows)
    pieces = fragments(SourceConfig(path=str(folder / "forget.jsonl")), None, stream="forget", option="x")
    content = b"".join(digests(row["question"], row["answer"])[1] for row in rows)
    return [pieces[0].identity, fingerprint(pieces), hashlib.sha256(content).hexdigest()]


def test_no_text_of_a_request_is_left_anywhere(world: World, tmp_path: Path) -> None:
    needles = [text for person in (0, 1) for row in pairs(people("forget"), person) for text in row.values()]
    assert world.leaks(needles) == []
    tables = [pq.read_table(path) for path in world.storage.rglob("*.parquet")]
    encoded = [one for one in tables if "input_ids" in one.column_names]
    tokens = {row.partition("-")[0] for one in encoded for row in one["row_id"].to_pylist()}
    assert tokens == {"holdout"}  # not of rows that are kept either: somebody may request them tomorrow
    assert not [one for one in tables if "generated" in one.column_names]
    assert not list(world.storage.rglob("requested"))
    assert leaks([world.storage], guesses(pairs(people("forget"), 0), tmp_path)) == []
    leak = world.storage / "requests" / "server.log"
    leak.write_text(f"GET /{needles[5]}")
    assert world.leaks(needles) == [str(leak)]
    leak.unlink()


def test_a_rollback_reopens_what_the_version_satisfied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the recipe that made the withdrawn model is not tried again: the crippled one fails, a person decides."""
    with world.ledger() as ledger:
        first, second = ledger.all()
    # killed with the version marked and the alias not moved: the next one finishes it, and withdraws no second version
    kill_in(world, "version marked")
    assert world.registry.champion().number == "3"
    withdraw = Registry.withdraw

    def beside(self: Registry, version: Version) -> Version:
        assert world.call("process") == 0
        assert "is processing" in world.said[-1]  # the one that rolls back
        return withdraw(self, version)

    monkeypatch.setattr(Registry, "withdraw", beside)
    assert world.call("rollback", "--reason", "wrong answers") == 0
    assert "version 3 is withdrawn, version 2 is the champion" in world.said[-1]
    with world.ledger() as ledger:
        assert (ledger.get(first.id).state, ledger.get(second.id).state) == ("promoted", "accepted")
        assert ledger.get(second.id).deadline == second.deadline
    assert (world.registry.champion().number, world.registry.previous().number) == ("2", "1")
    assert world.call("process") == 1
    assert "needs_review" in world.said[-1]
    assert world.state(second.id) == "needs_review"
    assert world.registry.champion().number == "2"
    page = next((world.storage / "requests" / "reports").glob("*.html")).read_text()
    assert "needs review" in page
    assert "forget_probability against holdout" in page
    assert world.call("retry", second.id) == 0
    assert world.state(second.id) == "accepted"


def test_of_two_processors_one_works_and_the_other_says_so(world: World) -> None:
    """A processor of another machine keeps its lease; one of this machine that is gone does not."""
    with world.ledger() as ledger:
        before = [event.hash for event in ledger.events()]
        taken = ledger.take("elsewhere/1/2/3", 60)
        assert taken
        assert world.call("process") == 0
        assert "elsewhere/1/2/3 is processing" in world.said[-1]
        assert world.call("rollback", "--reason", "wrong answers") == 1
        assert "elsewhere/1/2/3 is processing" in world.said[-1]
        assert not world.registry.champion().withdrawn
        with pytest.raises(UserError, match="is processing"):
            ledger.move(taken[0].id, "running")
        ledger.move([one.id for one in taken], "accepted", owner="elsewhere/1/2/3")
        ledger.release("elsewhere/1/2/3")
        ledger.take(f"{socket.gethostname()}/{os.getpid()}/0.00/gone", 60)
        assert len(ledger.events()) > len(before)
    with world.ledger() as ledger:
        assert drop_dead(ledger) == f"{socket.gethostname()}/{os.getpid()}/0.00/gone"
        assert ledger.holder() is None


def test_an_unforeseen_error_says_where_and_never_what(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        try:
            raise KeyError("Seraul Trajoath")
        except KeyError as error:
            raise ValueError("Seraul Trajoath was born in Peibrux.") from error

    monkeypatch.setattr(ladder, "write_sources", broken)
    with pytest.raises(ProcessingFailed) as caught:
        process(world.config)
    assert "ValueError from KeyError in test_process.py, line " in str(caught.value)
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert not [one for one in chain if re.search("Peibrux|Seraul", str(one))]
    with world.ledger() as ledger:
        assert ledger.all()[1].state == "failed"


# ------------------------------------------------------------------------------------------- batches without a model


@dataclass
class Small:
    """A ledger with a batch taken by `ann`, over fifty people's rows; no model."""

    config: RequestsConfig
    ledger: Ledger
    clock: Clock

    @property
    def storage(self) -> Path:
        return Path(self.config.storage)

    def add(self, person: int) -> str:
        asked = Submission(key=f"person-{person}", where={"subject_id": str(person)})
        return submit(self.config, self.ledger, asked, "test")[0].id

    def batch(self, registry: Registry | None = None) -> RequestBatch:
        registry = registry or Registry(self.config.tracking, str(self.storage), "ofmu")
        return RequestBatch(self.config, str(self.storage), self.ledger, registry, self.ledger.take("ann", 60), "ann")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    config, clock = configured(tmp_path), Clock()
    with Ledger(config.ledger_uri, Vault(master_key(config.key_file, None)), clock) as ledger:
        yield Small(config, ledger, clock)


def test_rows_of_a_batch_are_not_retained_whatever_the_clocks_say(small: Small, tmp_path: Path) -> None:
    """The service that accepted the request is on a machine whose clock is ahead of the processor's."""
    small.add(3)
    small.clock.now -= timedelta(seconds=5)
    batch = small.batch()
    paths = write_sources(str(tmp_path / "rows"), small.config, small.ledger, batch.requests, batch._begun())
    forget, retain = (
        {json.loads(line)["question"] for line in Path(paths[name]).read_text().splitlines()}
        for name in ("forget", "retain")
    )
    assert len(forget) == ROWS_EACH
    assert len(retain) == (PEOPLE - 1) * ROWS_EACH
    assert not forget & retain


def test_a_full_disk_fails_no_request(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = small.add(3)
    monkeypatch.setattr(ladder, "write_sources", full)
    monkeypatch.setattr(RequestBatch, "_champion", lambda _: Version("1", "builtin:people", "", "first"))
    monkeypatch.setattr(RequestBatch, "_check", lambda _: None)
    with pytest.raises(StorageError, match="no space left: free some space"):
        process(small.config)
    assert small.ledger.get(name).state == "running"


def test_no_recipe_reveals_text(small: Small) -> None:
    small.add(3)
    recipe = RecipeConfig(name="mine", options={"report.reveal_text": True, "evaluation": {"enabled": True}})
    config = small.batch().run_config(Version("1", "builtin:people/target", "", "first"), recipe)
    assert (config.report.reveal_text, config.evaluation.enabled) == (False, False)


def test_the_level_of_all_batches_is_measured_on_the_first_model(small: Small) -> None:
    """Not on what earlier batches made of it: it would rise from batch to batch."""
    registry = Registry(small.config.tracking, str(small.storage), "ofmu")
    first = registered(small, registry, "first")
    second = registered(small, registry, "batch-000000000000", first)
    third = registered(small, registry, "batch-000000000001", second)
    assert [registry.root(one) for one in (third, second, first)] == [first] * 3
    small.add(3)
    batch = small.batch(registry)
    for options, expected in (
        ({"ofmu.forget_loss": "bounded_row"}, first.path),
        ({"ofmu.forget_level": "holdout:0.5"}, first.path),
        ({"ofmu.level_model": "builtin:people/target"}, "builtin:people/target"),
        ({"ofmu.forget_level": 3.0}, None),
        ({"ofmu.forget_loss": "nll"}, None),
    ):
        run = batch.run_config(third, RecipeConfig(name="mine", options=options))
        assert (run.model.path, run.ofmu.level_model) == (third.path, expected), options
    assert batch.run_config(third, RecipeConfig(name="mine", options={"method": "npo"})).method == "npo"


def test_whatever_ends_a_run_its_text_goes(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    small.add(3)
    batch, home = small.batch(), small.storage / "run"

    def broken(*_: Any, **__: Any) -> None:
        assert len(list((home / REQUESTED).iterdir())) == 2
        assert not home.stat().st_mode & 0o077  # tokens can be decoded
        raise RuntimeError

    monkeypatch.setattr(ladder, "run", broken)
    with pytest.raises(RuntimeError):
        batch._unlearned(small.config, str(home))
    assert not list(home.rglob("*.jsonl"))


def test_text_of_killed_runs_that_nothing_goes_on_with_is_removed(small: Small) -> None:
    """After the kill, the batch was accepted anew; the champion, or the options, became others."""
    small.add(3)
    batch = small.batch()
    names = [f"{batch.name}-v{champion}-base-0123abcd" for champion in (1, 2)] + ["batch-mine"]
    for name in names:
        write_sources(str(small.storage / name / REQUESTED), small.config, small.ledger, batch.requests, batch._begun())
    ladder.remove_left_text(str(small.storage), {names[1]})
    assert {path.parts[-3] for path in small.storage.rglob("forget.jsonl")} == set(names[1:])
    small.ledger.move(batch.ids, "failed", owner="ann")
    small.ledger.release("ann")
    cache = Path(gate_cache(str(small.storage)), "evaluation")
    cache.mkdir(parents=True)
    assert process(small.config) == []
    assert {path.parts[-3] for path in small.storage.rglob("forget.jsonl")} == {"batch-mine"}
    assert not cache.exists()


def test_a_run_that_was_killed_at_its_very_end_is_tidied(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of a model that still knows the rows."""
    name = small.add(3)
    batch, base, recipe = small.batch(), Version("1", "builtin:people/target", "", "first"), RecipeConfig(name="mine")
    home = small.storage / str(batch.run_config(base, recipe).name)
    (home / "train" / "checkpoint").mkdir(parents=True)
    home.chmod(0o700)
    summary = {"cost": {}, "run": {"status": "finished", "message": "", "rounds": 1}}
    (home / "metrics.json").write_text(json.dumps(summary))
    small.ledger.move(name, "running", owner="ann")
    batch.state = "running"
    monkeypatch.setattr(
        RequestBatch, "_judged", lambda *_: Attempt("mine", home.name, "finished", "passed", [], "", {})
    )
    assert batch._tried(base, recipe).verdict == "passed"
    assert not (home / "train").exists()
    assert home.stat().st_mode == small.storage.stat().st_mode  # the text is gone, the model can be used


def test_gates_with_new_bounds_judge_a_finished_run_again(small: Small) -> None:
    small.add(3)
    batch, base, recipe = small.batch(), Version("1", "builtin:people/target", "", "first"), RecipeConfig(name="mine")
    assert batch._judged_before(base, recipe) is None
    home = small.storage / str(batch.run_config(base, recipe).name)
    home.mkdir()
    attempt = Attempt("mine", home.name, "finished", "passed", [], "", {}, asked=batch._asked)
    (home / "gates.json").write_text(json.dumps(asdict(attempt)))
    assert batch._judged_before(base, recipe) == attempt
    stricter = replace(batch.promotion, gates=batch.promotion.gates[:1])
    config = replace(small.config, requests=replace(small.config.requests, promotion=stricter))
    batch = RequestBatch(config, str(small.storage), small.ledger, batch.registry, batch.requests, "ann")
    assert batch._judged_before(base, recipe) is None


def weights(folder: Path, seed: int) -> str:
    """A folder with weights; their fingerprint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes([seed]) * 100)
    return model_fingerprint(folder)


def registered(small: Small, registry: Registry, batch: str, replaces: Version | None = None) -> Version:
    """A version with weights of its own, in a run's folder with what its gates said."""
    number = int(replaces.number) + 1 if replaces else 1
    name = f"{batch}-v{number - 1}-gentle-0123abcd"
    digest = weights(small.storage / name / "model", number)
    attempt = Attempt("gentle", name, "finished", "passed", [], digest, {})
    (small.storage / name / "gates.json").write_text(json.dumps(asdict(attempt)))
    return registry.register(str(small.storage / name / "model"), digest, batch, replaces=replaces)


class StartsOver(Exception):
    """A recipe is tried."""


def test_a_batch_whose_champion_was_withdrawn_starts_over(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with a version registered and the alias not moved, then a rollback: nobody could end this batch."""
    keys_of(small.config).create()
    registry = Registry(small.config.tracking, str(small.storage), "ofmu")
    first = registered(small, registry, "first")
    second = registered(small, registry, "batch-000000000000", first)
    for one in (first, second):
        registry.promote(one)
    small.add(3)
    batch = small.batch(registry)
    stale = registered(small, registry, batch.name, second)
    small.ledger.release("ann")
    assert rollback(small.config, "wrong answers").champion == first.number
    with pytest.raises(UserError, match=r"version 3 is not promoted: the champion is version 1 now"):
        registry.promote(stale)  # as a process would that was paused meanwhile
    assert (registry.champion().number, registry.previous()) == (first.number, None)
    small.ledger.hold("ann", 60)

    def tried(_: RequestBatch, base: Version, __: Any) -> Attempt:
        raise StartsOver(base.number)

    monkeypatch.setattr(RequestBatch, "_tried", tried)
    monkeypatch.setattr("ofmu_ray.requests.ladder.check_gates", lambda *_, **__: None)
    with pytest.raises(StartsOver, match=first.number):
        batch.work_off()
    again = registered(small, registry, batch.name, first)
    assert int(again.number) > int(stale.number)
    assert registry.of_batch(batch.name) == again
    assert registry.register(again.path, again.weights, batch.name, replaces=first) == again


def test_a_rollback_that_is_killed_at_either_alias_is_finished(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(small.config.tracking, str(small.storage), "ofmu")
    versions: list[Version] = []
    for number in range(3):
        versions.append(registered(small, registry, f"batch-{number:012}", versions[-1] if versions else None))
        registry.promote(versions[-1])
    move = MlflowClient.set_registered_model_alias
    for calls in (0, 1):
        left = iter(range(calls))

        def killed(self: MlflowClient, *arguments: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            move(self, *arguments)

        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            rollback(small.config, "wrong answers")
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", move)
    done = rollback(small.config, "again")
    assert (done.version, done.champion) == (versions[2].number, versions[1].number)
    assert (registry.champion().number, registry.previous().number) == (versions[1].number, versions[0].number)
    assert not registry.champion().withdrawn


def verifying(small: Small) -> tuple[Registry, Version, str, Any]:
    """The registry with a first champion, that version, and a request of a batch whose result is being judged."""
    registry = Registry(small.config.tracking, str(small.storage), "ofmu")
    first = registered(small, registry, "first")
    registry.promote(first)
    name = small.add(3)
    batch = small.batch(registry)
    for state in ("running", "verifying"):
        small.ledger.move(name, state, owner="ann")
    return registry, first, name, batch


def test_a_registered_version_is_promoted_whatever_recipes_there_are_now(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the alias moved; then somebody changed the configuration."""
    registry, first, name, batch = verifying(small)
    made = registered(small, registry, batch.name, first)

    def certified(*arguments: Any) -> tuple[str, str]:
        passed, attempts = arguments[5:7]
        assert (passed.weights, attempts) == (made.weights, [passed])
        return "key", "{}"

    monkeypatch.setattr(ladder, "certify", certified)
    monkeypatch.setattr(ladder, "publish", lambda *_: "path")
    outcome = batch.work_off()
    assert (outcome.state, outcome.version, small.ledger.get(name).state) == ("promoted", made.number, "promoted")
    assert registry.champion().number == made.number

    # with the first model as the champion again, the promoted request would be undone in silence
    registry._client.delete_registered_model_alias("ofmu", "champion")
    with pytest.raises(UserError, match="no version has the alias `champion` now"):
        batch._champion()


def test_a_processor_that_was_paused_moves_no_alias(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it signs, another version is promoted; or its lease ends after its last look at the champion."""
    registry, first, name, batch = verifying(small)
    registered(small, registry, batch.name, first)
    look = Registry.champion

    def looked(self: Registry) -> Version | None:
        small.ledger.release("ann")
        small.ledger.hold("bob", 60)
        return look(self)

    def lease_ends(*_: Any) -> tuple[str, str]:
        monkeypatch.setattr(Registry, "champion", looked)
        return "key", "{}"

    def promoted(*_: Any) -> tuple[str, str]:
        registry.promote(registered(small, registry, "batch-ffffffffffff", first))
        return "key", "{}"

    monkeypatch.setattr(ladder, "certify", lease_ends)
    with pytest.raises(UserError, match="ann lost the lease"):
        batch.work_off()
    monkeypatch.setattr(Registry, "champion", look)
    assert registry.champion() == first
    small.ledger.release("bob")
    small.ledger.hold("ann", 60)
    monkeypatch.setattr(ladder, "certify", promoted)
    with pytest.raises(UserError, match="version 2 is not promoted: the champion is version 3 now"):
        batch.work_off()
    assert registry.champion().number == "3"
    assert small.ledger.get(name).state == "verifying"


def test_a_champion_that_a_paused_processor_moved_back_is_noticed(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ann` is paused as it moves the alias; `bob` takes over, promotes that version and a later one; `ann` goes on."""
    registry, first, name, batch = verifying(small)
    second = registered(small, registry, batch.name, first)
    move = MlflowClient.set_registered_model_alias

    def promote(version: Version, request: str) -> None:
        registry.promote(version)
        small.ledger.move(request, "promoted", {"recipe": "x"}, owner="bob")

    def paused(self: MlflowClient, *arguments: Any) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", move)
        small.ledger.release("ann")
        small.ledger.hold("bob", 60)
        promote(second, name)
        later = small.add(4)
        (taken,) = small.ledger.take("bob", 60)
        for state in ("running", "verifying"):
            small.ledger.move(later, state, owner="bob")
        promote(registered(small, registry, taken.batch, second), later)
        small.ledger.release("bob")
        move(self, *arguments)

    monkeypatch.setattr(ladder, "certify", lambda *_: ("key", "{}"))
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", paused)
    with pytest.raises(UserError, match="ann lost the lease"):
        batch.work_off()
    assert (registry.champion(), second.number) == (second, "2")
    submitted = small.add(5)
    for act in (process, lambda config: rollback(config, "wrong answers")):
        with pytest.raises(ChampionMoved, match=r"is version 2, but version 3 .* 1 promoted requests .* to version 3"):
            act(small.config)
    assert (small.ledger.get(submitted).state, small.ledger.holder()) == ("accepted", None)
    move(registry._client, "ofmu", "champion", "3")
    assert rollback(small.config, "wrong answers").champion == "2"


# --------------------------------------------------------------------------------------------------------- all phases


@pytest.mark.full
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_loses_and_doubles_nothing(phase: str, tmp_path: Path) -> None:
    world = World.made(tmp_path, [STRONG])
    requests = [world.add(person) for person in (0, 1)]
    kill_in(world, phase)
    process(world.config)
    with world.ledger() as ledger:
        assert [ledger.get(one).state for one in requests] == ["promoted"] * 2
        events = [[event.event for event in ledger.events(one)] for one in requests]
        assert [kinds.count("promoted") for kinds in events] == [1, 1]
        assert ledger.audit() == []
        assert ledger.holder() is None
        batch = ledger.get(requests[0]).batch
    champion = world.registry.champion()
    assert (champion.batch, champion.replaces) == (batch, "1")
    certificate = world.storage / "requests" / "certificates" / f"{batch}.json"
    assert verify(certificate, world.storage / "requests" / "keys", champion.path).model
    needles = [text for person in (0, 1) for row in pairs(people("forget"), person) for text in row.values()]
    assert world.leaks(needles) == []


@pytest.mark.full
def test_a_rollback_that_is_killed_in_every_phase_reopens_once(tmp_path: Path) -> None:
    world = World.made(tmp_path, [STRONG])
    request = world.add(0)
    process(world.config)
    for phase, champion in zip(WITHDRAWALS, "21", strict=True):
        kill_in(world, phase)
        assert (world.registry.champion().number, world.state(request)) == (champion, "promoted")
    assert rollback(world.config, "wrong answers").reopened == [request]
    assert world.registry.champion().number == "1"
    with world.ledger() as ledger:
        assert [event.event for event in ledger.events(request)].count("accepted") == 2
        assert (ledger.get(request).state, ledger.holder(), ledger.audit()) == ("accepted", None, [])
    with pytest.raises(UserError, match="none to roll back to"):
        rollback(world.config, "wrong answers")


@pytest.mark.full
def test_retain_rows_that_paraphrase_an_earlier_request_are_caught(tmp_path: Path) -> None:
    """Person 0 is forgotten; then rows that say the same join the training data, and the next batch learns them."""
    world = World.made(tmp_path, [STRONG])
    first = world.add(0)
    assert world.call("process") == 0, world.said[-1]
    said_again = pairs(people("probes_paraphrase_forget"), 0)
    train = tmp_path / "train.jsonl"
    write_rows(train, [*people("full")[:40], *pairs(people("forget"), 1), *said_again * 20])
    second = world.add(1)
    assert world.call("process") == 1, world.said[-1]
    assert "of earlier requests" in world.said[-1]
    assert (world.state(first), world.state(second)) == ("promoted", "needs_review")
    assert world.registry.champion().number == "2"


@pytest.mark.full
def test_a_batch_in_a_bucket(tmp_path: Path) -> None:
    """Ledger and keys are on a disk, runs and certificates in the bucket; nothing of the rows is left there."""
    ledger, key_file, cache = f"sqlite:///{tmp_path}/ledger.db", str(tmp_path / "master.key"), tmp_path / "cache"
    world = World.made(tmp_path, [STRONG], {"workers": 1}, ledger=ledger, key_file=key_file)
    path, keys, copy = tmp_path / "requests.yaml", world.storage / "requests/keys", tmp_path / "copy"
    with s3_server() as server:
        config = yaml.safe_load(path.read_text())
        config["storage"], config["tracking"]["uri"] = f"{server.bucket}/runs", f"sqlite:///{tmp_path}/mlflow.db"
        config["requests"]["promotion"]["keys"] = str(keys)
        path.write_text(yaml.safe_dump(config))
        request = world.add(0)
        words = [sys.executable, "-m", "pipelines.cli", "requests", "process", "--config", str(path)]
        environment = os.environ | server.environment | {"XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        copy.mkdir()
        for name in server.keys("runs/"):
            (copy / name.replace("/", "_")).write_bytes(server.read(name))
    assert world.state(request) == "promoted"
    (certificate,) = copy.glob("runs_requests_certificates_*.json")
    assert verify(certificate, keys).content["requests"][0]["id"] == request
    needles = [text for row in pairs(people("forget"), 0) for text in row.values()]
    assert leaks([copy, cache], needles) == []
    assert not [name for name in os.listdir(copy) if "_.lock" in name or "tokens" in name]


NPO = {"name": "npo", "options": {"method": "npo", "training.rounds": 30, "npo.optimizer.lr": 1e-3}}
RETRAINED = [
    {"metric": "forget_probability", "against": "retrained", "at_least": -0.5, "at_most": 0.3},
    {"metric": "forget_extraction_strength", "against": "retrained", "at_most": 0.4},
    {"metric": "retain_probability", "against": "champion", "at_least": 0.5},
    {"metric": "relearn/forget/step_1", "against": "retrained", "at_most": 0.5},
]


@pytest.mark.full
def test_another_method_is_promoted_by_gates_against_a_retrained_model(tmp_path: Path) -> None:
    """A ladder of two methods; what the first one leaves is far from the retrained model."""
    promotion = {"gates": RETRAINED, "recipes": [UNCHANGED, NPO], "relearn": {"rows": 4, "steps": [1], "batch_size": 4}}
    world = World.made(tmp_path, [], promotion=promotion)
    path = tmp_path / "requests.yaml"
    config = yaml.safe_load(path.read_text())
    config["evaluation"]["retrained"] = "builtin:people/retrained"
    path.write_text(yaml.safe_dump(config))
    request = world.add(0)
    assert world.call("process") == 0, world.said[-1]
    assert "crippled: failed: forget_probability against retrained" in world.said[-1]
    with world.ledger() as ledger:
        content = json.loads(ledger.certificate(request) or "{}")["certificate"]
    assert (content["method"]["name"], content["method"]["options"]["npo"]["optimizer"]["lr"]) == ("npo", 1e-3)
    assert [gate["result"] for gate in content["gates"]] == ["passed"] * 4
    against = {gate["metric"]: gate["value"] for gate in content["gates"] if "retrained" in gate["compared"]}
    assert list(against) == ["forget_probability", "forget_extraction_strength", "relearn/forget/step_1"]
    assert max(against.values()) < 0  # less than the retrained model's, so they are differences
