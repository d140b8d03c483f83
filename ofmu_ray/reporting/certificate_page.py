"""A certificate, or the report of a batch that was not promoted, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ofmu_ray.config import flatten
from ofmu_ray.reporting.formats import duration
from ofmu_ray.reporting.page import page_environment


def certificate_page(content: Mapping[str, Any], key_id: str | None, name: str) -> str:
    """The page, without outside parts and without text of rows.

    `content`: `requests.statement`'s. `key_id`: of the signature; None: not promoted, so nothing is signed. `name`: the
    file with the same content as JSON.
    """
    gates = [{**gate, "shown": _number(gate["value"]), "interval": _interval(gate), "bound": _bound(gate)}
             for gate in content.get("gates", ())]  # fmt: skip
    seconds = sum((content.get("cost") or {}).get("seconds", {}).values())
    return str(
        page_environment()
        .get_template("certificate.html.j2")
        .render(
            c=content,
            key_id=key_id,
            name=name,
            gates=gates,
            took=duration(seconds),
            options=flatten(dict(content.get("method", {}).get("options", {}))),
        )
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(gate: Mapping[str, Any]) -> str:
    return "" if gate["low"] is None else f"{_number(gate['low'])} to {_number(gate['high'])}"


def _bound(gate: Mapping[str, Any]) -> str:
    sides = (("at least", gate["at_least"]), ("at most", gate["at_most"]))
    return ", ".join(f"{words} {value:g}" for words, value in sides if value is not None)
