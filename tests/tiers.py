"""Cases in two tiers, `make test` and `make test-all`; a fixture computes those that a session asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import pytest


def tiered(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """Parameters of which those that are not `quick` are marked `full`."""
    return [case if quick(case) else pytest.param(case, marks=pytest.mark.full) for case in cases]


def asked(request: pytest.FixtureRequest, test: str, argument: str = "case") -> list[Any]:
    """The values of `argument` that this session runs `test` of the fixture's module with, in order."""
    return [
        item.callspec.params[argument]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and item.originalname == test
    ]


def missing(program: str, why: str) -> NoReturn:
    """Skip the test; fail it where OFMU_REQUIRE (names with commas) says that the program has to be there."""
    if program in os.environ.get("OFMU_REQUIRE", "").split(","):
        pytest.fail(f"{why} (OFMU_REQUIRE names {program})")
    pytest.skip(why)
