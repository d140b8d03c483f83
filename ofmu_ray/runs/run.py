"""A run as one function: check, prepare, plan, precompute what the method needs, fit, evaluate, write.

It neither prints nor exits: progress goes to a listener (ofmu_ray.progress), user errors are raised as `UserError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ofmu_ray import progress
from ofmu_ray.config import ExportConfig, TrainConfig, UnlearnConfig, outcome_hash
from ofmu_ray.runs.outcome import Outcome, read_trained
from ofmu_ray.runs.preflight import check_machine, prepare_storage
from ofmu_ray.runs.this_run import Run
from ofmu_ray.runs.train_run import train
from ofmu_ray.runs.unlearn_run import read_finished, unlearn
from ofmu_ray.storage import explained, fetched, is_uri
from ofmu_ray.storage.hub_push import check_push, push
from ofmu_ray.tracking.connection import check_server


def run(
    config: UnlearnConfig | TrainConfig, listener: progress.Listener | None = None, command: Sequence[str] = ()
) -> Outcome:
    """Run to the end, or resume a killed run of the same name. A finished run is read, not repeated.

    Raises:
        UserError: a user's mistake, or the storage or cluster refuses; existing files are left untouched.
    """
    active_listener = progress.current() if listener is None else listener
    with progress.listening(active_listener), explained(config.storage):
        storage = prepare_storage(config.storage)
        config = replace(config, training=check_machine(config.training))
        this_run = as_begun(Run(config, storage, outcome_hash(config), command))
        config = this_run.config
        ours = this_run.claim.check()
        if config.export.push_to_hub is not None:
            check_push(config.export.push_to_hub, public=config.export.hub_public)
        if isinstance(config, TrainConfig):
            outcome = read_trained(this_run.home, reused=True) if ours else None
            outcome = outcome or _observed(this_run, lambda: train(this_run, config))
        else:
            outcome = read_finished(this_run, config) if ours else None
            outcome = outcome or _observed(this_run, lambda: unlearn(this_run, config))
        return _pushed(outcome, config.export)


def as_begun(this_run: Run) -> Run:
    """The run; with `training.decay_norms` if it began before that option, when weight decay was for all parameters."""
    config = replace(this_run.config, training=replace(this_run.config.training, decay_norms=True))
    earlier = replace(this_run, config=config, digest=outcome_hash(config))
    return earlier if earlier.digest != this_run.digest and earlier.claim.began() else this_run


def _pushed(outcome: Outcome, export: ExportConfig) -> Outcome:
    if export.push_to_hub is None or not outcome.finished:
        return outcome
    folder = fetched(outcome.model, "storage") if is_uri(outcome.model) else Path(outcome.model)
    progress.note("hub", f"uploading the model to {export.push_to_hub}")
    return replace(outcome, hub=push(folder, export.push_to_hub, public=export.hub_public))


def _observed(this_run: Run, work: Callable[[], Outcome]) -> Outcome:
    check_server(this_run.config.tracking.uri)  # as the start of tracking will, but before torch is imported
    listener, outcome = progress.current(), None
    listener.started(this_run)
    try:
        outcome = work()
    finally:
        listener.ended(this_run, outcome)
    return outcome
