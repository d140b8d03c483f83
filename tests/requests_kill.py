"""A process that works on requests and kills itself with SIGKILL on the way: `python requests_kill.py FOLDER PHASE`.

A process of its own: a fork of one in which Ray and torch have threads can wait for their locks forever.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requests_world import World

from ofmu_ray.requests import ladder
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.process import process, rollback
from ofmu_ray.requests.registry import Registry
from ofmu_ray.runs import writing

Kill = Callable[[], None]


def before_move(to: str) -> Callable[[Kill], None]:
    """Between the alias and the ledger: before it moves requests to a state."""
    move = Ledger.move

    def patch(kill: Kill) -> None:
        def moved(self: Ledger, ids: Any, state: Any, *arguments: Any, **options: Any) -> Any:
            if state == to:
                kill()
            return move(self, ids, state, *arguments, **options)

        Ledger.move = moved  # type: ignore[method-assign]

    return patch


def at_promotion(kill: Kill) -> None:
    """Before the alias of a version that replaces another (the first one is promoted at the start)."""
    promote = Registry.promote
    Registry.promote = (  # type: ignore[method-assign]
        lambda self, version, *rest: kill() if version.replaces else promote(self, version, *rest)
    )


def patched(where: Any, name: str) -> Callable[[Kill], None]:
    """Kill where a function is called."""
    return lambda kill: setattr(where, name, lambda *_, **__: kill())


PHASES: dict[str, Callable[[Kill], None]] = {
    "taken": patched(ladder.RequestBatch, "work_off"),
    "rows written": patched(ladder, "run"),
    "trained": patched(writing, "write"),
    "gates decided": patched(ladder.RequestBatch, "_registered"),
    "version registered": at_promotion,
    "alias moved": before_move("promoted"),
    "ledger moved": patched(ladder, "publish"),
}
"""Of `process`."""
WITHDRAWALS: dict[str, Callable[[Kill], None]] = {
    "version marked": patched(Registry, "withdraw"),
    "alias moved back": before_move("accepted"),
}
"""Of `rollback`."""


def kill_in(world: World, phase: str) -> None:
    """Run `process` or `rollback` in another process until it is killed in this phase."""
    done = subprocess.run([sys.executable, __file__, str(world.folder), phase], timeout=600)
    assert done.returncode == -signal.SIGKILL, phase


if __name__ == "__main__":
    config, phase = World(Path(sys.argv[1])).config, sys.argv[2]
    patch = (PHASES | WITHDRAWALS)[phase]
    patch(lambda: os.kill(os.getpid(), signal.SIGKILL))
    if phase in WITHDRAWALS:
        rollback(config, "wrong answers")
    else:
        process(config)
