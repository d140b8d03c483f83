"""Tasks by name: a module of this folder, or any importable module with a `TASK`."""

from __future__ import annotations

import importlib
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ofmu_ray.config.values import close_match
from ofmu_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from ofmu_ray.config import ModelConfig
    from ofmu_ray.models.unread import UnreadWeights
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


def loaded(task: Task, config: ModelConfig) -> tuple[torch.nn.Module, Any, UnreadWeights | None, list[str]]:
    """The task's model and processor; the weights that the engine has still to read, if any; notes for the user.

    A task without `load_unread` loads its models whole.
    """
    notes: list[str] = task.remarks(config) if hasattr(task, "remarks") else []
    load_unread = getattr(task, "load_unread", None)
    result = None if load_unread is None else load_unread(config)
    if result is None or isinstance(result, str):
        return *task.load(config), None, notes + ([result] if result else [])
    return *result, notes
