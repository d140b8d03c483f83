"""The operators' pages in a browser without JavaScript, and what `ofmu requests serve` leaves behind."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import browser
from leak_scan import leaks
from requests_server import Service, configured, private

from ofmu_ray.requests.intake import open_ledger

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def command(folder: Path) -> Iterator[tuple[Service, subprocess.Popen[bytes]]]:
    """`ofmu requests serve` in a process of its own; its output goes to `server.log`."""
    config = configured(folder)
    words = ["requests", "serve", "--storage", config.storage, "--requests.service.port", "0"]
    words += ["--requests.train.path", str(config.requests.train.path)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *words], stdout=log, stderr=log, cwd=ROOT)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://([\d.]+):(\d+)", (folder / "server.log").read_text())):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < end, "the service did not start"
            time.sleep(0.2)
        with open_ledger(config) as ledger:
            service = Service(found[1], int(found[2]), ledger, config, "")
            service.token = service.new_token("submit", "read", "operate")
            yield service, process
    finally:
        process.kill()
        process.wait()


def page(service: Service, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    return service.call("GET", path, token=None, cookie=f"ofmu_token={service.token}", **headers)


def texts(folder: Path, words: list[str]) -> list[str]:
    """Files below a folder in which one of the texts stands, without its last letter too."""
    found = leaks([folder], [form for word in words for form in (word, word[:-1])])
    return [name for name in (str(Path(one).relative_to(folder)) for one in found) if name != "train.jsonl"]


@pytest.mark.slow
def test_no_text_of_a_request_is_left_anywhere(tmp_path: Path) -> None:
    """Database with its log, the server's output, every page and answer; and the search does find a leak."""
    row, asked = private(5), "Reason-Wxyz"
    words = [row["question"], row["answer"], asked]
    with command(tmp_path) as (service, process):
        body = {"key": "person-5", "rows": [row], "reason": asked}
        answers = [service.call("POST", "/v1/requests", body)]
        assert answers[0][0] == 201
        answers += [
            service.call("POST", "/v1/requests", body | {"key": "person 5"}),
            service.call("POST", "/v1/requests", {"key": "x", "rows": [{"question": row["question"]}]}),
            service.call("POST", "/v1/requests", {"key": "x", row["question"]: row["answer"]}),
            service.call("POST", "/v1/requests", f'{{"key": "{row["question"]}'),
            service.call("POST", "/v1/requests", {"key": "x", "where": {row["question"]: row["answer"]}}),
            service.call("GET", f"/v1/requests/{quote(row['answer'])}"),
            service.call("GET", f"/{quote(row['answer'])}?q={quote(row['question'])}"),
            service.call("GET", "/", token=row["answer"].replace(" ", "")),
            service.call("POST", "/login", f"token={quote(row['answer'])}", token=None),
            page(service, f"/requests/{quote(row['question'])}"),
            page(service, "/"),
        ]
        (request,) = service.ledger.all()
        answers += [page(service, f"/requests/{request.id}"), service.call("GET", f"/v1/requests/{request.id}")]
        assert {status for status, _, _ in answers} == {200, 201, 401, 404, 422}
        (tmp_path / "answers.html").write_text("\n".join(f"{headers}{text}" for _, headers, text in answers))
        process.send_signal(signal.SIGKILL)  # what it had in memory is not tidied away
        process.wait()
        assert (tmp_path / "runs/requests/ledger.db-wal").exists()
        assert "POST /v1/requests 201" in (tmp_path / "server.log").read_text()
        assert texts(tmp_path, words) == []
        assert service.ledger.rows(request.id)[0]["answer"] == row["answer"]

        service.ledger.move(request.id, "rejected", {"note": row["answer"]})
        leaks = texts(tmp_path, words)
        assert leaks, "the search finds nothing"
        assert all(name.startswith("runs/requests/ledger.db") for name in leaks)
        assert texts(tmp_path, [service.token]) == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with command(tmp_path_factory.mktemp("pages")) as (service, _):
        ledger = service.ledger
        for person in range(3):
            body = {"key": f"person-{person}", "where": {"subject_id": person}}
            assert service.call("POST", "/v1/requests", body)[0] == 201
        names = [one.id for one in ledger.take("nightly@host-1", 60)]
        for state in ("running", "verifying"):
            ledger.move(names, state, {"run": "nightly-1"}, owner="nightly@host-1")
        ledger.move(names[:2], "promoted", {"version": 4}, owner="nightly@host-1", certificate='{"signed": true}')
        ledger.move(names[2], "needs_review", {"gate": "utility", "value": 0.71}, owner="nightly@host-1")
        ledger.release("nightly@host-1")
        assert service.call("POST", "/v1/requests", {"key": "ok", "where": {"subject_id": 8}})[0] == 201
        late = {"key": "urgent-<b>9</b>", "where": {"subject_id": "9"}}
        ledger.add(late["key"], late, [private(9)], deadline=timedelta(seconds=1), by="cli:ops")
        yield service


def test_pages_show_what_stands_and_escape_it(running: Service) -> None:
    status, headers, text = page(running, "/")
    assert status == 200
    assert running.host == "127.0.0.1"  # unless told otherwise
    assert "urgent-&lt;b&gt;9" in text
    assert "<script" not in text
    assert "default-src 'none'" in headers["content-security-policy"]
    promoted = running.ledger.all(["promoted"])[0]
    status, headers, text = page(running, f"/requests/{promoted.id}/certificate")
    assert (status, text) == (200, '{"signed": true}')
    assert page(running, "/requests/req-none/certificate")[0] == 404


def test_pages_need_a_token_that_operates(running: Service) -> None:
    for token in (None, running.new_token("read", "submit"), "ofmu_none"):
        cookie = {} if token is None else {"cookie": f"ofmu_token={token}"}
        for path in ("/", f"/requests/{running.ledger.all()[0].id}"):
            status, _, text = running.call("GET", path, token=None, **cookie)
            assert (status, "Sign in" in text, "person-0" in text) == (401, True, False)
        if token:
            assert running.call("POST", "/login", f"token={token}", token=None)[0] == 401
    for form in (b"\xff", "a=1&" * 9, ""):
        assert running.call("POST", "/login", form, token=None)[0] == 401
    status, headers, _ = running.call("POST", "/login", f"token={running.token}", token=None)
    assert (status, headers["location"]) == (303, "/")
    assert headers["set-cookie"] == f"ofmu_token={running.token}; HttpOnly; Path=/; SameSite=strict"
    status, headers, _ = running.call("POST", "/logout", "", token=None)
    assert (status, 'ofmu_token=""' in headers["set-cookie"]) == (303, True)


@pytest.mark.slow
def test_pages_in_a_browser_without_javascript(running: Service, tmp_path: Path) -> None:
    """Signs in with the keyboard. `PAGES=folder` keeps the pictures."""
    folder = Path(os.environ.get("PAGES", tmp_path))
    with browser(tmp_path) as one:
        base = f"http://{running.host}:{running.port}"
        one.open(base)
        assert "Sign in" in one.text()
        one.type("ofmu_wrong")
        assert "not a valid token" in one.text()
        one.type(running.token)
        shown = one.text()
        assert "Deadlines at risk" in shown
        assert "needs review" in shown
        assert "person-0" in shown.partition("Last promotions")[2]
        assert "urgent-<b>9</b>" in shown
        assert one.picture(folder / "overview.png").startswith(b"\x89PNG")
        review = running.ledger.all(["needs_review"])[0]
        one.open(f"{base}/requests/{review.id}")
        shown = one.text()
        assert "gate utility, value 0.71" in shown
        assert "download" not in shown
        assert one.picture(folder / "request.png").startswith(b"\x89PNG")
        one.open(f"{base}/requests/{running.ledger.all(['promoted'])[0].id}")
        assert "download" in one.text()


def test_a_port_in_use_is_a_sentence(running: Service) -> None:
    from dataclasses import replace

    from ofmu_ray.errors import UserError
    from ofmu_ray.requests.service import serve

    taken = replace(running.config.requests.service, port=running.port)
    config = replace(running.config, requests=replace(running.config.requests, service=taken))
    with pytest.raises(UserError, match="Address already in use"):
        serve(config, running.ledger)
    connection = http.client.HTTPConnection(running.host, running.port)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
