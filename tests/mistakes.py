"""What is asked of every mistake at the command line: status 2 and one message."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from pipelines import cli


def one_message(status: int, out: str, err: str, *parts: str, notes: bool = False) -> str:
    """The message with which a command refused, a line and perhaps a list; `notes` of how it began may precede it."""
    before, *errors = re.split(r"^(?=ofmu(?: \w+)*: error: )", err, flags=re.MULTILINE)
    assert (status, out, len(errors)) == (2, "", 1), out + err
    assert notes or not before, err
    assert "Traceback" not in err
    assert all(line.startswith("  - ") for line in errors[0].splitlines()[1:]), err
    for part in parts:
        assert part in errors[0], err
    return errors[0]


def refused(words: Sequence[str], *parts: str, capsys: pytest.CaptureFixture[str], notes: bool = False) -> str:
    """Run `ofmu WORDS` in this process: its one message, of which `parts` are parts."""
    capsys.readouterr()
    status = cli.main(list(words))
    return one_message(status, *capsys.readouterr(), *parts, notes=notes)
