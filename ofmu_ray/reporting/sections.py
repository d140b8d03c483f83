"""A page as sections of notes, tables and plots, rendered as HTML or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ofmu_ray.reporting.marks import Plot
from ofmu_ray.reporting.page import page_environment
from ofmu_ray.reporting.tables import Table, markdown


@dataclass(frozen=True)
class Section:
    """A heading and what is under it, in this order."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    code: Sequence[str] = ()
    """Texts to copy: YAML, commands."""
    plots: Sequence[Plot] = ()
    more: Sequence[Table] = ()
    """Tables after the plots."""
    panels: Sequence[Plot] = field(default_factory=tuple)
    """Small plots."""
    fold: str = ""
    """Summary under which the small plots (or, without plots, the code) are folded; empty: open."""
    level: int = 2
    lead: Sequence[str] = ()
    """The main message: above the notes, in full contrast."""


@dataclass(frozen=True)
class Head:
    """What is above the sections."""

    status: str
    finished: bool
    facts: Mapping[str, str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Tile:
    """A number to be seen first."""

    label: str
    text: str
    words: str
    before: str = ""
    """Its earlier value."""


def some(*tables: Table | None) -> list[Table]:
    """The tables that have rows."""
    return [table for table in tables if table is not None and table.rows]


def all_tables(sections: Iterable[Section]) -> list[Table]:
    """All tables in page order."""
    return [table for section in sections for table in (*section.tables, *section.more)]


def html_page(
    kind: str, title: str, head: Head, command: str, sections: Sequence[Section], tiles: Sequence[Tile] = ()
) -> str:
    """The self-contained page; `kind`: what it reports on."""
    template = page_environment().get_template("sections.html.j2")
    return str(template.render(kind=kind, title=title, head=head, command=command, sections=sections, tiles=tiles))


def markdown_page(title: str, head: Head, command: str, sections: Iterable[Section]) -> str:
    """The page without its plots."""
    facts = " · ".join(f"{name}: {words}" for name, words in head.facts.items())
    parts = [f"# {title}", f"{facts}", *head.notes]
    if command:
        parts.append(_fenced(command))
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [
            *section.lead,
            *section.notes,
            *(markdown(table).rstrip() for table in section.tables),
            *map(_fenced, section.code),
        ]
        parts += [markdown(table).rstrip() for table in section.more]
        if section.plots:
            parts.append("The plots are in report.html.")
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    return f"```\n{text.rstrip()}\n```"
