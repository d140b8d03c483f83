"""What a scheduler starts: work off all due requests, batch by batch, under the ledger's lease; and roll back.

outcomes = process(config)          # LeaseHeld: another processor is at work
withdrawn = rollback(config, "wrong answers in production")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb

from ofmu_ray import progress
from ofmu_ray.config.requests import RequestsConfig, duration
from ofmu_ray.errors import UserError, causes
from ofmu_ray.requests.gate_tables import gate_cache
from ofmu_ray.requests.intake import open_ledger
from ofmu_ray.requests.ladder import BatchOutcome, RequestBatch, remove_left_text
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.registry import Registry, Version
from ofmu_ray.requests.renewal import leased
from ofmu_ray.requests.statement import certificate_path, publish
from ofmu_ray.runs.preflight import prepare_storage
from ofmu_ray.storage import explained, is_file, remove_folder


class ProcessingFailed(UserError):
    """Something unforeseen; named by type and place only, as its message could quote a row."""

    status = 1


class ChampionMoved(UserError):
    """The champion is not what the ledger promoted last; a person has to decide."""

    status = 1


def process(config: RequestsConfig) -> list[BatchOutcome]:
    """Work off what an earlier process left, then everything that is accepted; the outcome of each batch.

    Raises:
        LeaseHeld: another processor is at work.
        ChampionMoved: it was moved back past a promotion, and not by `rollback`.
        UserError: a mistake in configuration or data, or the storage refuses; what was taken waits for the next start.
        ProcessingFailed: the requests of the batch are `failed`.
    """
    outcomes, seconds = [], config.requests.lease_seconds
    with explained(config.storage):
        storage = prepare_storage(config.storage)
        with open_ledger(config) as ledger, leased(ledger, seconds) as owner:
            registry = _registry(config, storage)
            finish_withdrawals(ledger, registry, owner)
            _refuse_moved_back(ledger, registry)
            _republish(config, storage, ledger)
            while taken := ledger.take(owner, seconds):
                progress.note("batch", f"{taken[0].batch}: {len(taken)} requests")
                try:
                    outcomes.append(_worked_off(RequestBatch(config, storage, ledger, registry, taken, owner)))
                finally:
                    remove_folder(gate_cache(storage))
            remove_folder(gate_cache(storage))  # of a process that was killed after its last step
            remove_left_text(storage)
            ledger.destroy_expired(duration("requests.keep_rows", config.requests.keep_rows))
    return outcomes


def _refuse_moved_back(ledger: Ledger, registry: Registry) -> None:
    """Raise if `champion` is a version from before a promotion that was not withdrawn, whose rows it has not forgotten.

    A processor that was paused (`Registry.promote`) moved it back, or a person without `rollback`.
    """
    champion = registry.champion()
    later = {} if champion is None else {one.batch: one for one in registry.made_from(champion)}
    undone = [one for one in ledger.all(("promoted",)) if one.batch in later]
    if champion is not None and undone:
        last = max((later[one.batch or ""] for one in undone), key=lambda one: int(one.number))
        raise ChampionMoved(
            f"{registry.name}: the champion is version {champion.number}, but version {last.number} was promoted after "
            f"it and not rolled back, so {len(undone)} promoted requests are not forgotten by the model in use: in "
            f"MLflow's registry, give the alias `champion` to version {last.number} (then, to withdraw that version, "
            "`ofmu requests rollback`)"
        )


def _republish(config: RequestsConfig, storage: str, ledger: Ledger) -> None:
    """Write the files of certificates that a killed process recorded only in the ledger."""
    batches = {one.batch: one.id for one in ledger.all(("promoted",)) if one.batch is not None}
    for batch, request in batches.items():
        document = ledger.certificate(request)
        if document is not None and not is_file(certificate_path(storage, batch)):
            publish(storage, batch, document)


def _worked_off(batch: RequestBatch) -> BatchOutcome:
    try:
        with explained(batch.storage):  # a full disk is no failure of the requests
            return batch.work_off()
    except UserError:
        raise
    except Exception as error:
        last = extract_tb(error.__traceback__)[-1]
        kinds = dict.fromkeys(type(one).__name__ for one in causes(error))  # also what workers raised, or died of
        where = f"{' from '.join(kinds)} in {Path(last.filename).name}, line {last.lineno}"
    # outside the handler, so that no traceback leads to the message
    batch.fail({"error": where})
    raise ProcessingFailed(f"batch {batch.name}: {where}; its requests are failed, `ofmu requests retry` accepts them")


@dataclass(frozen=True)
class Withdrawal:
    """A rollback."""

    version: str
    """The withdrawn version."""
    champion: str
    """The version in use again."""
    reopened: list[str]
    """Requests that are open again, with their deadlines."""
    for_review: list[str]
    """Requests whose rows cannot be decrypted any more: a person has to look at them."""


def rollback(config: RequestsConfig, reason: str) -> Withdrawal:
    """Withdraw the champion: the version before is in use again, and what the withdrawn one satisfied is open.

    Raises:
        LeaseHeld: a processor or another rollback is at work.
        ChampionMoved: it was moved back past a promotion, and not by `rollback`.
        UserError: there is no version to go back to.
    """
    storage = prepare_storage(config.storage)
    with open_ledger(config, keyed=False) as ledger, leased(ledger, config.requests.lease_seconds) as owner:
        registry = _registry(config, storage)
        unfinished = finish_withdrawals(ledger, registry, owner)
        if unfinished is not None:  # a rollback that was killed; not a second one
            return unfinished
        _refuse_moved_back(ledger, registry)
        champion = registry.champion()
        if champion is None or champion.replaces is None:
            raise UserError(f"{registry.name}: no promoted version is in use, so there is none to roll back to")
        ledger.check_lease(owner)
        registry.mark_withdrawn(champion, reason)
        done = finish_withdrawals(ledger, registry, owner)
        assert done is not None
        return done


def finish_withdrawals(ledger: Ledger, registry: Registry, owner: str) -> Withdrawal | None:
    """Do what is left of a rollback whose version is marked; None: nothing is. Can be repeated by who has the lease."""
    champion, marked = registry.champion(), registry.withdrawn()
    moved = None
    if champion is not None and champion.withdrawn:
        ledger.check_lease(owner)
        moved, champion = champion, registry.withdraw(champion)
    batches = {one.batch: one for one in marked}
    promoted = [one for one in ledger.all(("promoted",)) if one.batch in batches]
    if moved is None and not promoted:
        return None
    reopened: list[str] = []
    for_review: list[str] = []
    for request in promoted:
        version = batches[request.batch or ""]
        detail = {"withdrawn": version.number, "withdrawn_recipe": _recipe(ledger, request.id)}
        readable = ledger.readable(request.id)
        ledger.move(request.id, "accepted" if readable else "needs_review", detail, owner=owner, by="rollback")
        (reopened if readable else for_review).append(request.id)
    last: Version = moved or max(batches.values(), key=lambda one: int(one.number))
    return Withdrawal(last.number, champion.number if champion else "none", reopened, for_review)


def _recipe(ledger: Ledger, request_id: str) -> str:
    """The recipe of a request's last promotion."""
    events = [event for event in ledger.events(request_id) if event.event == "promoted"]
    return str(events[-1].detail.get("recipe", "")) if events else ""


def _registry(config: RequestsConfig, storage: str) -> Registry:
    return Registry(config.tracking, storage, config.requests.promotion.model_name)
