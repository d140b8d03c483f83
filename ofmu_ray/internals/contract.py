"""A private name of a library, and the error when it has moved."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Private:
    """A private name of a library."""

    module: str
    name: str
    purpose: str
    """What we use it for."""
    fields: tuple[str, ...] = ()
    """Of a pydantic model: those that we set."""

    def get(self) -> Any:
        """The object.

        Raises:
            AssertionError: this release no longer has it; names module, attribute and purpose.
        """
        try:
            value = getattr(importlib.import_module(self.module), self.name)
        except (ImportError, AttributeError):
            raise AssertionError(f"{self._where()} is gone; used for {self.purpose}") from None
        missing = [field for field in self.fields if field not in value.model_fields]
        if missing:
            raise AssertionError(f"{self._where()} no longer has {', '.join(missing)}; used for {self.purpose}")
        return value

    def _where(self) -> str:
        return f"{_release(self.module)}: {self.module}.{self.name}"


def check_attributes(library: str, thing: object, names: Iterable[str]) -> None:
    """Raise AssertionError with those of `names` that an object of a library lacks."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise AssertionError(f"{_release(library)}: {_class(thing)} no longer has {', '.join(missing)}")


def _class(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__


def _release(module: str) -> str:
    library = module.partition(".")[0]
    return f"{library} {version(library)}"
