"""What a person sees: progress with and without a terminal, help on one screen, the list of past runs."""

import io
import json
import re
import sys
import warnings
import webbrowser
from pathlib import Path

import pytest
from mistakes import refused

from ofmu_ray import progress
from ofmu_ray.commandline import terminal
from ofmu_ray.commandline.terminal import Terminal
from ofmu_ray.runs.catalog import past_runs
from ofmu_ray.runs.claims import locked
from ofmu_ray.training.session import ListenerReports
from pipelines import cli


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_few_seconds(clock, capsys):
    with Terminal(seconds=10).bar("train", 20, "round") as bar:
        for done in range(1, 21):
            clock[0] = 100 + 4.0 * done  # 100 s until the workers have loaded the model
            bar.at(done, forget="3.142")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train   round 1 of 20, forget 3.142"
    assert lines[1] == "train   round 4 of 20, forget 3.142, about 0:01:04 left", "time left by rounds, not by loading"
    assert len(lines) == 7


def test_a_resumed_run_counts_its_speed_from_where_it_resumes(clock, capsys):
    with Terminal(seconds=0).bar("train", 20, "round") as bar:
        bar.at(10)
        clock[0] = 5.0
        bar.at(11)
    assert capsys.readouterr().err.splitlines()[-1] == "train   round 11 of 20, about 0:00:45 left"


def test_a_bar_shows_the_time_left_where_a_round_takes_minutes(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen())
    shown = Terminal()
    with shown.bar("train", 20, "round") as bar:
        monkeypatch.setattr(shown._bars, "get_time", lambda: clock[0])
        for done in range(1, 5):
            clock[0] += 120.0
            bar.at(done)
        [task] = shown._bars.tasks
        assert task.time_remaining == 120 * 16


def test_bars_of_a_terminal_leave_lines_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    shown = Terminal()
    with shown.bar("evaluate", 4, "batch") as outer:
        outer.update()
        with shown.bar("train", 8, "round") as inner:
            inner.at(3, forget="1.5")
            shown.note("data", "rows [1] of [data]: " + "x" * 200)
        outer.update(3)
    shown.note("run", "runs/a")
    text = screen.getvalue()
    assert "data    rows [1] of [data]: " + "x" * 200 in text
    assert text.endswith("run     runs/a\n")
    assert "evaluate" in text


def test_help_is_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("unlearn", "train", "evaluate", "sweep", "benchmark", "submit", "plan"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 60, command
        assert any(line.startswith("  --config ") for line in lines)


def test_help_is_the_same_after_a_command_was_parsed(capsys):
    # parsing adds the completion's hidden option to the parser, which a process keeps, and reads no descriptions
    assert cli.main(["plan", "--seed", "-1"]) == 2
    for words in (["--print_config"], ["--help"]):
        with pytest.raises(SystemExit):
            cli.main(["plan", *words])
    text = capsys.readouterr().out
    assert "SUPPRESS" not in text
    assert re.search(r"--model\.path +Folder", text)


def test_warnings_that_libraries_mean_for_programmers_are_hidden(capsys):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        cli.main(["schema", "plan"])
        for module in ("transformers.modeling_utils", "mine"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in shown] == ["mine"]


def test_help_on_a_section_and_on_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["unlearn", "--help", "npo"])
    text = capsys.readouterr().out
    assert "--npo.beta" in text
    assert "--ofmu.beta" not in text


def test_help_all_shows_every_section(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help", "all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert {"--training.micro_batch_size", "--npo.beta"} <= set(text.split()), "the short help has neither"


def test_a_resumed_run_says_from_where(capsys):
    shown = Terminal()
    with progress.listening(shown), shown.bar("train", 8, "round") as bar:
        ListenerReports(bar).resumed(3)
    assert "train   resumes after round 3" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("browser", [True, False])
def test_a_report_is_opened_in_a_browser(browser, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda where: opened.append(where) or browser)
    folder = _folder(tmp_path, "r", run={"config_hash": "x", "command": "unlearn", "options": {"method": "npo"}})
    page = folder / "report.html"
    page.write_text("<html></html>")
    assert cli.main(["report", "r", "--storage", str(tmp_path)]) == 0
    assert opened == []
    assert cli.main(["report", "r", "--open", "--storage", str(tmp_path)]) == 0
    assert opened == [page.as_uri()]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(page)] * 2
    assert ("no browser here" in printed.err) is not browser


def _folder(storage: Path, name: str, **files: object) -> Path:
    (storage / name).mkdir(parents=True)
    for stem, content in files.items():
        (storage / name / f"{stem}.json").write_text(json.dumps(content))
    return storage / name


def test_past_runs(tmp_path, capsys):
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    record = {"config_hash": "x", "command": "unlearn", "options": {"method": "npo"}}
    summary = {"after": {"model_utility": value}, "run": {"status": "utility_floor", "method": "npo"}, "cost": {}}
    _folder(tmp_path, "stopped", run=record, training={"round": 7, "status": "utility_floor"}, metrics=summary)
    killed = _folder(tmp_path, "killed", run=record)
    _folder(tmp_path, "fit", run=record | {"command": "train"}, training={"round": 9, "status": "finished"})
    _folder(tmp_path, "compared", metrics={"a": {"model_utility": value}})
    _folder(tmp_path, "table", benchmark={})
    _folder(tmp_path, "cache", run=record)
    _folder(tmp_path, "strange")
    assert {run.name: (run.command, run.status) for run in past_runs(str(tmp_path))} == {
        "stopped": ("unlearn", "utility_floor"),
        "killed": ("unlearn", "interrupted"),
        "fit": ("train", "finished"),
        "compared": ("evaluate", "finished"),
        "table": ("benchmark", "finished"),
    }
    with locked(killed):
        assert cli.main(["runs", "--storage", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "running" in lines["killed"]
    assert "0.5" in lines["stopped"]
    assert cli.main(["show", "compared", "--storage", str(tmp_path)]) == 0
    assert "0.500 [0.400, 0.600]" in capsys.readouterr().out
    refused(["report", "fit", "--storage", str(tmp_path)], "fit has no report", capsys=capsys)
    refused(["show", "kiled", "--storage", str(tmp_path)], "Did you mean killed?", capsys=capsys)
    refused(["runs", "--storage", str(tmp_path / "nowhere")], capsys=capsys)
