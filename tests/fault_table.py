"""The measured table of docs/reliability.md, written by the tests that do the faults.

    FAULT_TABLE=faults.jsonl make test PYTEST_ARGS="-m slow"
    python tests/fault_table.py faults.jsonl docs/reliability.md

Without FAULT_TABLE the tests measure and write nothing down.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- faults: written by tests/fault_table.py -->", "<!-- end of faults -->"


def record(fault: str, *, lost: str, seconds: float | None = None, difference: float | None = None) -> None:
    """One row. `lost`: what had to be done again; `seconds`: until work went on; `difference`: largest of a final
    weight (or of a value) from the undisturbed run."""
    if "FAULT_TABLE" in os.environ:
        row = {"fault": fault, "lost": lost, "seconds": seconds, "difference": difference}
        with open(os.environ["FAULT_TABLE"], "a") as file:
            file.write(json.dumps(row) + "\n")


def rounds(count: int) -> str:
    """As `lost` says it."""
    return f"{count} round" if count == 1 else f"{count} rounds"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| fault | done again | seconds until work went on | largest difference at the end |", "|---|---|---|---|"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        difference = "" if row["difference"] is None else f"{row['difference']:.2g}"
        lines.append(f"| {row['fault']} | {row['lost']} | {seconds} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    rows, page = Path(sys.argv[1]), Path(sys.argv[2])
    text = page.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    shown = table([json.loads(line) for line in rows.read_text().splitlines()])
    page.write_text(f"{text[:before]}\n{shown}\n{text[after:]}")


if __name__ == "__main__":
    main()
