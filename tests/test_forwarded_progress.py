"""What workers of Ray Train report reaches the listener of the driver."""

import contextlib
import time
from collections.abc import Iterator

import ray

from ofmu_ray import progress
from ofmu_ray.training import watch


class Shown(progress.Listener):
    """Bars as they are opened, moved and closed."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextlib.contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[progress.Bar]:
        self.events.append(f"{title} of {total} {unit}s")
        yield _Bar(self.events, title)
        self.events.append(f"{title} closed")


class _Bar(progress.Bar):
    def __init__(self, events: list[str], title: str) -> None:
        self.events, self.title = events, title

    def at(self, done: int, **shown: str) -> None:
        if self.events[-1] != f"{self.title} {done}":
            self.events.append(f"{self.title} {done}")


def until(shown: Shown, event: str) -> None:
    ends = time.monotonic() + 60
    while event not in shown.events:
        assert time.monotonic() < ends, shown.events
        time.sleep(0.01)


def test_the_work_after_the_last_round_has_its_own_bar(local_ray, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)
    actor, shown = watch.Progress.remote(), Shown()
    with progress.listening(shown), watch.ProgressForwarder(actor, 3, "train"):
        ray.get(actor.update.remote(3, {"forget_loss": 1.0}))
        until(shown, "train 3")
        with progress.listening(watch.ActorListener(actor)), progress.bar("export", 2, "tensor") as bar:
            for done in (1, 2):
                bar.update()
                until(shown, f"export {done}")
        until(shown, "export closed")
        ray.get(actor.phase.remote(("evaluate", 2, "row", 1)))
        until(shown, "evaluate 1")
        ray.get(actor.begin.remote())  # the workers died and start again
        until(shown, "evaluate closed")
    kept = [event for event in shown.events if not event.startswith(("train 0", "train 3"))]
    export = ["export of 2 tensors", "export 1", "export 2", "export closed"]
    evaluation = ["evaluate of 2 rows", "evaluate 1", "evaluate closed"]
    assert kept == ["train of 3 rounds", *export, *evaluation, "train closed"]
