"""`ofmu runs`, `ofmu show NAME` and `ofmu report NAME`: what earlier commands left in the storage."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from ofmu_ray.commandline.parse import PlainParser, fail
from ofmu_ray.commandline.terminal import metrics_table, plain_table, say
from ofmu_ray.errors import UserError
from ofmu_ray.runs.catalog import HEADLINE, PastRun, past_run, past_runs
from ofmu_ray.storage import is_uri


def main(arguments: list[str], command: str) -> int:
    """Exit status 0, 2 for a user's mistake."""
    prog = f"ofmu {command}"
    parser = PlainParser(prog=prog, description=__doc__)
    if command != "runs":
        parser.add_argument("name", help="name of a run, evaluation, sweep or benchmark")
    if command == "report":
        parser.add_argument("--open", action="store_true", help="show it in a browser")
    parser.add_argument("--storage", default="runs", help="folder or URI of the runs (default: runs)")
    try:
        options = parser.parse_args(arguments)
        if command == "runs":
            return _list(options.storage)
        run = past_run(options.storage, options.name)
        return _show(run) if command == "show" else _report(run, options.open)
    except UserError as error:
        return fail(error, prog)


def _list(storage: str) -> int:
    runs = past_runs(storage)
    if not runs:
        say(f"nothing in {storage} yet")
        return 0
    head = ("name", "command", "method", "status", "rounds", "forget quality", "utility", "changed (UTC)")
    print(plain_table([head, *map(_line, runs)]))
    return 0


def _line(run: PastRun) -> tuple[str, ...]:
    values = run.headline()
    numbers = [f"{values[name]:.3g}" if name in values else "" for name in HEADLINE]
    changed = f"{run.changed:%Y-%m-%d %H:%M}" if run.changed else ""
    rounds = "" if run.rounds is None else str(run.rounds)
    return (run.name, run.command, run.method, run.status, rounds, *numbers, changed)


def _show(run: PastRun) -> int:
    if run.command == "unlearn" and run.metrics:
        from ofmu_ray.runs.outcome import read_unlearned
        from pipelines.unlearn import show

        outcome = read_unlearned(run.home)
        assert outcome is not None
        show(outcome)
    elif run.command == "evaluate":
        print(metrics_table(run.metrics, list(run.metrics)))
    print(f"{run.command}: {run.status}" + (f" after {run.rounds} rounds" if run.rounds else ""))
    print(f"folder  {run.home}")
    if run.report and run.command != "unlearn":
        print(f"report  {run.report}")
    if run.status == "interrupted":
        say("the command that started it resumes")
    return 0


def _report(run: PastRun, show: bool) -> int:
    if run.report is None:
        raise UserError(f"{run.name} has no report: `ofmu {run.command}`, {run.status}")
    print(run.report)
    if show and not webbrowser.open(run.report if is_uri(run.report) else Path(run.report).as_uri()):
        say("no browser here; open the path above in one")
    return 0
