"""Tasks by name: a module of this folder, or any importable module with a `TASK`."""

from __future__ import annotations

import importlib
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    from ofmu_ray.tasks.protocol import Task


def is_builtin(name: str) -> bool:
    """Whether the task is built in, and so available on every node."""
    return name in _builtin()


def _builtin() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__) if module.name != "protocol")


def importable(name: str) -> bool:
    """Whether this process can import the task's module; checked on the other nodes before a run."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def task_named(name: str) -> Task:
    """The task that the option `task` names.

    Raises:
        UserError: there is no such module, or it has no TASK.
    """
    known = _builtin()
    try:
        module = importlib.import_module(f"{__name__}.{name}" if name in known else name)
    except ImportError as error:
        raise UserError(
            f"task = {name!r}: {error}.{close_match(name, known)} Give one of {', '.join(known)}, or the name of a "
            "module that every node can import"
        ) from None
    if not hasattr(module, "TASK"):
        raise UserError(f"task = {name!r}: the module defines no TASK (see ofmu_ray/tasks/protocol.py)")
    task: Task = module.TASK
    return task
