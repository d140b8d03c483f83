"""`ofmu requests`: from a command line to the ledger, and what is refused before anything is written."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mistakes import one_message
from requests_server import PEOPLE, ROWS_EACH, private, training_data

from ofmu_ray.commandline.parse import parse
from ofmu_ray.config.requests import RequestsConfig, duration
from ofmu_ray.errors import UserError
from ofmu_ray.requests.ledger import Ledger
from pipelines import cli, requests

parsed = functools.cache(parse)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `ofmu requests ...` over a storage of its own; (status, output, errors)."""
    # reading all options takes half a second of CPU time: the same ones are read once
    monkeypatch.setattr(requests, "parse", lambda kind, words, prog: parsed(kind, tuple(words), prog))
    config = tmp_path / "nightly.yaml"
    config.write_text(f"storage: {tmp_path}/runs\nrequests: {{train: {{path: {training_data(tmp_path)}}}}}\n")

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main(["requests", words[0], "--config", str(config), *words[1:]])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    assert call("init")[0] == 0
    return call


def test_a_person_from_request_to_report(run: Run) -> None:
    status, out, _ = run("add", "--key", "ticket-1", "--where", "subject_id=3", "--deadline", "10d", "--json")
    request = json.loads(out)
    assert (status, request["new"], request["rows"], request["state"]) == (0, True, ROWS_EACH, "accepted")
    assert _time_to_answer(request) == timedelta(days=10)
    assert "(was there)" in run("add", "--key", "ticket-1", "--where", "subject_id=3", "--deadline", "10d")[1]
    status, _, err = run("add", "--key", "ticket-1", "--where", "subject_id=4")
    assert (status, "asks for something else" in err) == (2, True)
    assert run("add", "--key", "ticket-2", "--where", "subject_id=3", "country=X")[0] == 0

    listed = json.loads(run("list", "--json")[1])
    assert [one["key"] for one in listed] == ["ticket-1", "ticket-2"]
    assert _time_to_answer(listed[1]) == timedelta(days=30)
    assert run("list", "--state", "promoted")[1] == "no requests\n"
    shown = json.loads(run("show", request["id"], "--json")[1])
    assert (shown["id"], shown["key"], shown["rows"]) == (request["id"], "ticket-1", ROWS_EACH)
    status, out, _ = run("show", request["id"])
    assert (status, "kept encrypted" in out, "selector=['subject_id'] matched=4" in out) == (0, True, False)
    assert "matched=4" in out
    assert run("report")[1] == "accepted 2\n"
    head = json.loads(run("audit", "--json")[1])
    assert (head["entries"], head["problems"]) == (4, [])

    second = json.loads(run("list", "--json")[1])[1]["id"]
    assert run("cancel", second, "--superseded-by", request["id"])[1] == f"{second}  superseded\n"
    assert "destroyed" in run("show", second)[1]
    status, _, err = run("cancel", second)
    assert (status, "this state is final" in err) == (2, True)
    assert run("audit", "--known", head["head"])[0] == 0
    status, out, _ = run("audit", "--known", "0" * 64, "--known", head["head"])
    assert (status, "is gone" in out) == (1, True)
    assert run("expire")[1] == "nothing to destroy\n"


def _time_to_answer(request: dict[str, str]) -> timedelta:
    return datetime.fromisoformat(request["deadline"]) - datetime.fromisoformat(request["created"])


def test_options_that_are_repeated_add_up(run: Run) -> None:
    """The last one alone would name more rows than were asked for."""
    assert f"{ROWS_EACH} rows" in run("add", "--key", "k", "--where", "subject_id=3", "--where", "country=X")[1]
    status, _, err = run("add", "--key", "n", "--where", "subject_id=3", "--where", "subject_id=4")
    assert (status, "one condition per column" in err) == (2, True)
    assert "accepted" in run("list", "--state", "accepted", "--state", "promoted")[1]
    made = run("token", "create", "--name", "crm", "--scopes", "submit", "--scopes", "read")[1]
    assert "read,submit" in made


def test_only_what_failed_or_needs_a_review_is_retried(run: Run, tmp_path: Path) -> None:
    """A promoted request is reopened by a rollback; one of a batch in work would change what its run forgets."""
    names = [run("add", "--key", f"k-{n}", "--where", f"subject_id={n}")[1].split()[0] for n in (1, 2)]
    with Ledger(f"sqlite:///{tmp_path}/runs/requests/ledger.db") as ledger:
        for state in ("running", "verifying", "promoted"):
            ledger.take("ann", 60)
            ledger.move(names[0], state, owner="ann")
            ledger.release("ann")
            status, _, err = run("retry", *names)
            assert (status, "only what is needs_review or failed" in err) == (2, True), state
        ledger.take("ann", 60)
        ledger.move(names[1], "failed", owner="ann")
        ledger.release("ann")
        assert run("retry", names[1])[1] == f"{names[1]}  accepted\n"
        assert [ledger.get(name).state for name in names] == ["promoted", "accepted"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    ["number=5", "number=5.0", "born=1990-01-05", "seen=2020-01-05 12:00:00", "seen=2020-01-05T12:00:00", "sum=5.50"],
)
def test_selectors_find_typed_columns_of_parquet(run: Run, tmp_path: Path, where: str) -> None:
    typed = [
        {"number": float(n) if n < 9 else None, "born": date(1990, 1, n), "seen": datetime(2020, 1, n, 12)}
        | {"sum": Decimal(f"{n}.50"), **private(n)}
        for n in range(1, 10)
    ]
    pq.write_table(pa.Table.from_pylist(typed), tmp_path / "typed.parquet")
    status, out, err = run("add", "--key", "k", "--where", where, "--requests.train.path", f"{tmp_path}/typed.parquet")
    assert (status, " 1 rows " in out) == (0, True), err


def test_rows_of_any_file(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([private(1), private(2)]), tmp_path / "rows.parquet")
    assert "2 rows" in run("add", "--key", "parquet", "--rows", str(tmp_path / "rows.parquet"))[1]
    (tmp_path / "rows.jsonl").write_text(json.dumps(private(PEOPLE)) + "\n")
    status, _, err = run("add", "--key", "unknown", "--rows", str(tmp_path / "rows.jsonl"))
    assert (status, f"({PEOPLE * ROWS_EACH} rows) matches the text of any given row" in err) == (2, True)
    (tmp_path / "rows.jsonl").write_text('{"question": "Qx1Zebra"}\nno JSON\n')
    status, _, err = run("add", "--key", "broken", "--rows", str(tmp_path / "rows.jsonl"))
    assert status == 2
    assert "rows-1" in err
    assert "rows-2" in err
    assert "Zebra" not in err


REFUSED = [
    (["add", "--key", "k"], "one of the arguments --rows --where is required"),
    (["add", "--where", "subject_id=1"], "--key"),
    (["add", "--key", "k/k", "--where", "subject_id=1"], "letters, digits"),
    (["add", "--key", "k", "--where", "subject_id"], "COLUMN=VALUE"),
    (["add", "--key", "k", "--where", "subject_id=1", "subject_id=2"], "one condition per column"),
    (["add", "--key", "k", "--where", "subject=1"], "Did you mean subject_id?"),
    (["add", "--key", "k", "--where", "subject_id=77"], "nothing to forget"),
    (["add", "--key", "k", "--where", "country=X"], "200 of 200 rows match, more than requests.largest_share"),
    (["add", "--key", "k", "--where", "subject_id=\udcff"], "half of a surrogate pair"),
    (["add", "--key", "k", "--where", "subject_id=1", "--deadline", "soon"], "such as 30d"),
    (["add", "--key", "k", "--where", "subject_id=1", "--deadline", "0d"], "longer than no time"),
    (["list", "--requests.deadline", "0d"], "must be longer than 0"),
    (["add", "--key", "k", "--rows", "none.jsonl"], "no such file"),
    (["add", "--key", "k", "--where", "a=1", "--requests.train.path", "none.jsonl"], "requests.train.path"),
    (["add", "--key", "k", "--where", "subject_id=1", "--requests.key_file", "none"], "ofmu requests init"),
    (["add", "--key", "k", "--where", "subject_id=1", "--requests.key_env", "OFMU_NONE"], "not set"),
    (["show", "req-1"], "there is none with this id"),
    (["cancel", "req-1"], "there is none with this id"),
    (["list", "--state", "gone"], "invalid choice"),
    (["list", "--requests.leger", "x"], "Did you mean requests.ledger?"),
    (["list", "--storage", "s3://bucket/x"], "use PostgreSQL"),
    (["add", "--key", "k", "--rows", "x.jsonl", "--data.format.kind", "text"], "no documents or chats"),
    (["process", "--export.push_to_hub", "me/model"], "would send models before their gates"),
    (["init", "--requests.train.kind", "messages"], "requests.train.kind = messages: requests forget questions"),
    (["process", "--task", "image_classification"], "task = image_classification"),
    (["process", "--requests.keep_rows", "999999d"], "requests.keep_rows: must be at most 36500d"),
    (["process", "--requests.deadline", "999999d"], "requests.deadline: must be at most 36500d"),
    (["process", "--requests.lease_seconds", "999999999999"], "lease_seconds = 999999999999: must be at most a week"),
    (["token", "create", "--name", "x", "--scopes", "read", "--expires", "999999d"], "--expires: must be at most"),
    (["rekey", "--new-key-env", "A", "--new-key-file", "b"], "give one of them"),
    (["rekey", "--new-key-env", "OFMU_NONE"], "not set"),
    (["lst"], "Commands: init, add"),
    (["token", "revoke"], "revoke ID"),
    (["token", "create", "--scopes", "read"], "--name"),
    (["token", "create", "--name", "x", "--scopes", "all"], "submit, read, operate"),
]


@pytest.mark.slow
def test_what_is_refused_is_not_written(run: Run, tmp_path: Path) -> None:
    for words, reason in REFUSED:
        one_message(*run(*words), reason)
    assert json.loads(run("audit", "--json")[1])["entries"] == 0


def test_tokens_are_shown_once(run: Run, tmp_path: Path) -> None:
    made = json.loads(run("token", "create", "--name", "crm", "--scopes", "submit", "read", "--json")[1])
    assert run("token", "list")[1].startswith(f"{made['id']}  crm  read,submit  until ")
    assert "revoked" in run("token", "revoke", made["id"])[1]
    files = [path.read_bytes() for path in (tmp_path / "runs/requests").iterdir()]
    assert not any(made["token"].encode() in content for content in files)


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["requests", "--help"]) == 0
    assert "withdraw a request" in capsys.readouterr().out
    assert cli.main(["requests"]) == 2


def test_files_are_their_owners_alone(run: Run, tmp_path: Path) -> None:
    run("add", "--key", "k", "--where", "subject_id=1")
    for path in (tmp_path / "runs/requests").iterdir():
        assert not path.stat().st_mode & 0o077, path
    assert not os.stat(tmp_path / "runs/requests").st_mode & 0o077


@pytest.mark.parametrize("text", ["", "30", "d", "1.5d", "-1d", "1w", "9999999d", "999999d", "36501d"])
def test_durations(text: str) -> None:
    assert duration("x", " 90 m ").total_seconds() == 5400
    assert duration("x", "36500d").days == 36500
    with pytest.raises(UserError, match="x: must be"):
        duration("x", text)


def test_a_runs_name_cannot_be_that_of_the_ledger() -> None:
    with pytest.raises(UserError, match="the storage uses it"):
        RequestsConfig(name="requests")


@pytest.mark.parametrize("name", ["requests.cron", "requests_airflow.py", "kuberay/requests.yaml"])
def test_schedulers_files_start_commands_that_exist(name: str, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "cluster" / name).read_text()
    if name.endswith(".py"):
        compile(text, name, "exec")
    calls = re.findall(r"^[^#\n]*ofmu requests (\w+) ([^\n\"']*)", text, re.MULTILINE)
    assert "process" in dict(calls)
    config = tmp_path / "requests.yaml"
    config.write_text(f"storage: {tmp_path}\n")
    for word, options in calls:
        assert word in requests.SUBCOMMANDS
        words = [str(config) if one.endswith("requests.yaml") else one for one in options.split()]
        assert parse(RequestsConfig, words, "ofmu requests").storage
