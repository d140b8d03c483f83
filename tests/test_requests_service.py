"""The HTTP service of requests: what it takes, what it refuses, and eight clients at once."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from requests_server import PEOPLE, ROWS_EACH, Service, configured, private, served

from ofmu_ray.config.requests import ServiceOptions
from ofmu_ray.requests import guard, service, tokens
from ofmu_ray.requests.guard import Rates


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = configured(tmp_path_factory.mktemp("service"), rate=1_000_000, largest_body=20_000)
    with served(config) as one:
        yield one


keys = (f"key-{number}" for number in itertools.count())


def submit(server: Service, body: dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
    status, _, text = server.call("POST", "/v1/requests", body, **more)
    return status, json.loads(text)


def test_a_request_from_submission_to_certificate(server: Service) -> None:
    key = next(keys)
    status, headers, text = server.call("POST", "/v1/requests", {"where": {"subject_id": 3}}, idempotency_key=key)
    answer = json.loads(text)
    assert (status, answer["state"], answer["rows"], answer["key"]) == (201, "accepted", ROWS_EACH, key)
    assert submit(server, {"key": key, "where": {"subject_id": "3"}}) == (200, answer)
    status, conflict = submit(server, {"key": key, "where": {"subject_id": "4"}})
    assert status == 409
    assert answer["id"] in conflict["error"]

    place = headers["location"]
    status, _, text = server.call("GET", place)
    assert (status, [one["event"] for one in json.loads(text)["history"]]) == (200, ["received", "accepted"])
    status, _, text = server.call("GET", f"{place}/certificate")
    assert (status, "the request is accepted" in text) == (404, True)
    names = [one.id for one in server.ledger.take("ann", 60)]
    for state in ("running", "verifying"):
        server.ledger.move(names, state, owner="ann")
    document = '{ "signature":"ä" }'
    server.ledger.move(names, "promoted", owner="ann", certificate=document)
    server.ledger.release("ann")
    status, headers, text = server.call("GET", f"{place}/certificate")
    assert (status, text) == (200, document)
    assert answer["id"] in headers["content-disposition"]
    page = f"/requests/{answer['id']}"
    assert server.call("GET", f"{page}/certificate")[::2] == (200, document)
    assert f'<a href="{page}/certificate">' in server.call("GET", page)[2]
    server.ledger.move(names, "accepted")  # as a rollback does
    status, _, text = server.call("GET", f"{place}/certificate")
    assert (status, "the request is accepted" in text) == (404, True)
    assert server.call("GET", f"{page}/certificate")[0] == 404
    status, _, text = server.call("GET", page)
    assert (status, "/certificate" in text) == (200, False)
    server.ledger.move(names, "rejected")  # not left to other tests


def test_rows_are_found_whatever_their_case_and_spaces(server: Service) -> None:
    wanted = private(7)
    rows = [{"question": wanted["question"].upper(), "answer": f"  {wanted['answer']}"}, private(PEOPLE + 1)]
    status, answer = submit(server, {"key": next(keys), "rows": rows, "reason": "asked by letter"})
    assert (status, answer["rows"]) == (201, 1)
    assert server.ledger.rows(answer["id"]) == [{"id": f"train-{7 * ROWS_EACH + 1}", **wanted}]
    assert server.ledger.content(answer["id"])["reason"] == "asked by letter"
    detail = server.ledger.events(answer["id"])[0].detail
    assert (detail["given"], detail["matched"], detail["searched"]) == (2, 1, PEOPLE * ROWS_EACH)


REFUSED = {
    "no body": (None, 422, "body"),
    "not json": ('{"key": "Qx', 422, "json invalid"),
    "not an object": ([1], 422, "body"),
    "an unknown field": ({"key": "n", "where": {"subject_id": 1}, "Qx1": 1}, 422, "extra forbidden"),
    "no key": ({"where": {"subject_id": 1}}, 422, "idempotency key"),
    "a key with a path": ({"key": "../x", "where": {"subject_id": 1}}, 422, "letters, digits"),
    "neither rows nor selector": ({"key": "n"}, 422, "either rows or where"),
    "rows and a selector": ({"key": "n", "rows": [private(1)], "where": {"subject_id": 1}}, 422, "either rows or"),
    "no rows": ({"key": "n", "rows": []}, 422, "none given"),
    "rows without an answer": ({"key": "n", "rows": [{"question": "Qx1?"}]}, 422, "no column 'answer'"),
    "rows that nobody trained on": ({"key": "n", "rows": [private(PEOPLE)]}, 422, "matches the text of any given row"),
    "an empty selector": ({"key": "n", "where": {}}, 422, "1 to 16 conditions"),
    "an unknown column": ({"key": "n", "where": {"Qx1": 1}}, 422, "only answer, country, question, subject_id"),
    "one known, one unknown": ({"key": "n", "where": {"subject_id": 1, "subject": 1}}, 422, "condition 2"),
    "a selector without a match": ({"key": "n", "where": {"subject_id": "Qx1"}}, 422, "nothing to forget"),
    "a selector of everything": ({"key": "n", "where": {"country": "X"}}, 422, "200 of 200 rows match"),
    "a list in a selector": ({"key": "n", "where": {"subject_id": ["Qx1"]}}, 422, "body.where"),
    "no time": ({"key": "n", "where": {"subject_id": 1}, "deadline": "Qx1"}, 422, "a number and d, h, m or s"),
    "a deadline that has passed": ({"key": "n", "where": {"subject_id": 1}, "deadline": "0d"}, 422, "than no time"),
    "no end of time": ({"key": "n", "where": {"subject_id": 1}, "deadline": "999999d"}, 422, "at most 36500d"),
    "a number as a key": ({"key": 1, "where": {"subject_id": 1}}, 422, "body.key: string type"),
    "a long reason": ({"key": "n", "where": {"subject_id": 1}, "reason": "Qx1" * 999}, 422, "at most 500"),
    "not a number": ({"key": "n", "rows": [{**private(1), "x": float("nan")}]}, 422, "not plain JSON"),
    "half a surrogate pair": ({"key": "n", "where": {"subject_id": "\ud800"}}, 422, "not plain JSON"),
    "a large body": ({"key": "n", "where": {"subject_id": "Qx1" * 9999}}, 413, "more than 20000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_not_written(server: Service, name: str) -> None:
    body, expected, reason = REFUSED[name]
    before = server.ledger.head()
    status, headers, text = server.call("POST", "/v1/requests", body)
    assert (status, list(json.loads(text))) == (expected, ["error"])
    assert reason in text, text
    assert "Qx" not in text.replace("Qx1 of", ""), "the answer repeats what was sent"
    assert server.ledger.head() == before
    assert headers["cache-control"] == "no-store"


def test_json_that_does_not_say_so(server: Service) -> None:
    """As of `curl -d` without its header."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    headers = {"authorization": f"Bearer {server.token}", "content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/v1/requests", b'{"key": "n", "where": {"subject_id": 1}}', headers)
    answer = connection.getresponse()
    assert (answer.status, "Content-Type: application/json" in answer.read().decode()) == (422, True)
    connection.close()


def test_a_body_of_unknown_length_is_limited_too(server: Service) -> None:
    """Reading ends at the limit. Without a network: a server that closes early may reset the connection instead."""
    before, taken, sent = server.ledger.head(), itertools.count(), []
    headers = {"authorization": f"Bearer {server.token}", "content-type": "application/json"}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * 5000, "more_body": next(taken) < 100}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/requests", "query_string": b"", "client": ("127.0.0.1", 1)}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(service.make_app(server.config, server.ledger)({**scope, "headers": encoded}, receive, send))
    assert (sent[0]["status"], next(taken)) == (413, 20_000 // 5000 + 1)
    assert b"more than 20000 bytes" in sent[1]["body"]

    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("POST", "/v1/requests", iter([b'{"key": ', b'"n"}']), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, "either rows or where" in answer.read().decode()) == (422, True)
    connection.close()
    assert server.ledger.head() == before


def test_tokens(server: Service) -> None:
    body = {"key": "n", "where": {"subject_id": 1}}
    before = len(server.ledger.all())
    revoked, secret = tokens.create(server.ledger, "gone", ["submit"], timedelta(days=1))
    tokens.revoke(server.ledger, revoked.id)
    expired = server.new_token("submit", lifetime=timedelta(microseconds=1))
    for token, status, reason in (
        (None, 401, "is needed"),
        ("ofmu_wrong", 401, "not known"),
        ("ümläut", 401, "not known"),
        (secret, 401, "was revoked"),
        (expired, 401, "has expired"),
        (server.new_token("read", "operate"), 403, "lacks the scope submit"),
    ):
        got, headers, text = server.call("POST", "/v1/requests", body, token=token and token.encode().decode("latin-1"))
        assert (got, reason in text) == (status, True), text
        assert ("www-authenticate" in headers) == (status == 401)
    assert server.call("GET", "/v1/requests/req-1", token=server.new_token("submit"))[0] == 403
    assert server.call("POST", "/v1/requests", body, token=None, cookie=f"ofmu_token={server.token}")[0] == 401
    assert len(server.ledger.all()) == before
    known = "".join(one.body for one in _events(server))
    assert secret not in known
    assert server.ledger.audit() == []


def _events(server: Service) -> list[Any]:
    from sqlalchemy import select

    from ofmu_ray.requests.database import reading
    from ofmu_ray.requests.schema import EventRecord

    with reading(server.ledger.engine) as session:
        return list(session.scalars(select(EventRecord)))


@pytest.mark.parametrize(
    "path",
    ["..%2f..%2fetc%2fpasswd", "../../etc/passwd", "req-%00", "req-" + "0" * 20, "%2e%2e", "' OR 1=1 --", "x" * 999],
)
@pytest.mark.parametrize("tail", ["", "/certificate"])
def test_path_tricks_find_nothing(server: Service, path: str, tail: str) -> None:
    before = server.ledger.head()
    for root in ("/v1/requests/", "/requests/"):
        status, _, text = server.call("GET", (root + path + tail).replace(" ", "%20"))
        assert (status, "root:" in text) == (404, False)
    assert server.ledger.head() == before


def test_the_description_names_every_answer(server: Service) -> None:
    described = json.loads(server.call("GET", "/openapi.json", token=None)[2])
    assert set(described["paths"]) == {
        "/v1/requests", "/v1/requests/{request_id}", "/v1/requests/{request_id}/certificate",
    }  # fmt: skip
    assert {"200", "201", "401", "403", "409", "413", "422", "429"} <= set(
        described["paths"]["/v1/requests"]["post"]["responses"]
    )
    assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_rates_are_limited_by_token(tmp_path: Path) -> None:
    with served(configured(tmp_path, rate=1)) as server:
        other = server.new_token("read")
        assert server.call("GET", "/v1/requests/req-1")[0] == 404
        status, headers, text = server.call("GET", "/v1/requests/req-1")
        assert (status, "1 calls a minute" in text) == (429, True)
        assert 0 < int(headers["retry-after"]) <= 60
        assert server.call("GET", "/v1/requests/req-1", token=other)[0] == 404


@pytest.mark.parametrize(("believed", "second"), [(False, 429), (True, 401)])
def test_an_address_that_a_caller_makes_up_counts_only_behind_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, believed: bool, second: int
) -> None:
    """And however many addresses there are, the rate of a token is remembered."""
    monkeypatch.setattr(guard, "MOST_CLIENTS", 2)
    with served(configured(tmp_path, rate=1, proxy_headers=believed)) as server:
        assert server.call("GET", "/v1/requests/req-1")[0] == 404
        answers = [
            server.call("GET", "/v1/requests/req-1", token=None, x_forwarded_for=f"10.0.0.{n}")[0] for n in range(4)
        ]
        assert answers == [401, second, second, second]
        assert server.call("GET", "/v1/requests/req-1")[0] == 429


def test_the_service_listens_on_loopback_and_on_ipv6() -> None:
    assert ServiceOptions().host == "127.0.0.1"
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback on this machine")
    with service.listening(ServiceOptions(host="::1", port=0)) as listener:
        socket.create_connection(listener.getsockname()[:2]).close()


def test_a_rate_is_spent_and_comes_back() -> None:
    rates = Rates(60)
    assert [rates.take("a", 0.0) for _ in range(60)] == [0] * 60
    assert rates.take("a", 0.0) == 1
    assert rates.take("b", 0.0) == 0
    assert rates.take("a", 0.5) == 0.5
    assert rates.take("a", 2.0) == 0


def test_an_unexpected_error_says_nothing_of_the_request(
    server: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(private(1)["answer"])

    monkeypatch.setattr(service.intake, "submit", broken)
    status, _, text = server.call("POST", "/v1/requests", {"key": "n", "rows": [private(1)]})
    assert (status, json.loads(text)) == (500, {"error": "internal error; see the server's log"})
    assert "RuntimeError at test_requests_service.py" in caplog.text
    assert private(1)["answer"] not in caplog.text


# --------------------------------------------------------------------------------------------------- many clients


def check_clients(server: Service, count: int, prefix: str) -> None:
    """Eight clients, every key four times, in any order: one request per key, no answer above 499."""
    order = [number % (count // 4) for number in range(count)]
    random.Random(0).shuffle(order)

    def client(numbers: list[int]) -> list[tuple[int, int, str, float]]:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=300)
        answers = []
        for number in numbers:
            body = {"key": f"{prefix}-{number}", "where": {"subject_id": number % PEOPLE}}
            start = time.perf_counter()
            status, _, text = server.call_on(connection, "POST", "/v1/requests", body, "")
            answers.append((number, status, json.loads(text)["id"], time.perf_counter() - start))
        connection.close()
        return answers

    with ThreadPoolExecutor(8) as pool:
        answers = [one for part in pool.map(client, [order[n::8] for n in range(8)]) for one in part]
    statuses = Counter(status for _, status, _, _ in answers)
    assert statuses == {201: count // 4, 200: count - count // 4}
    ids = {(number, name) for number, _, name, _ in answers}
    assert len(ids) == count // 4
    written = [one for one in server.ledger.all() if one.key.startswith(f"{prefix}-")]
    assert sorted(one.key for one in written) == sorted(f"{prefix}-{number}" for number in range(count // 4))
    assert server.ledger.audit() == []
    for status in (201, 200):
        taken = [1000 * seconds for _, got, _, seconds in answers if got == status]
        low, high, most = np.percentile(taken, [50, 95, 99])
        print(f"{status}: {len(taken)} calls, median {low:.0f} ms, 95 % {high:.0f} ms, 99 % {most:.0f} ms")


@pytest.mark.slow
def test_eight_clients_with_repeated_keys(server: Service) -> None:
    check_clients(server, 200, "few")


@pytest.mark.full
def test_eight_clients_with_two_thousand_requests(server: Service) -> None:
    check_clients(server, 2000, "many")
