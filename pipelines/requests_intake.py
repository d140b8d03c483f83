"""`ofmu requests init | add | list | show | cancel | audit | report | expire`."""

from __future__ import annotations

import argparse
import getpass
import json
from typing import Any

from ofmu_ray.config.requests import RequestsConfig, duration
from ofmu_ray.errors import UserError
from ofmu_ray.requests import intake
from ofmu_ray.requests.records import Request
from ofmu_ray.requests.standing import standing
from ofmu_ray.requests.states import STATES, State
from ofmu_ray.requests.vault import write_master_key

MANY: dict[str, Any] = {"nargs": "+", "action": "extend"}  # of a repeated option, too, all values count


def operator() -> str:
    """Who types, for the log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user id without a name, as in containers
        return "cli"


def _none(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the request's id")
    _json(parser)


def _print(value: Any) -> None:
    print(json.dumps(value, indent=1))


def init(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Write a master key, unless there is one, and create the ledger."""
    if config.requests.key_env is None:
        if config.key_file is None:
            raise UserError("requests.key_file: not set, and storage is a URI: name a file or requests.key_env")
        written = write_master_key(config.key_file)
        print(f"key     {config.key_file} ({'written: back it up' if written else 'was there'})")
    with intake.open_ledger(config) as ledger:
        print(f"ledger  {ledger.engine.url.render_as_string(hide_password=True)}")
    return 0


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", required=True, help="idempotency key: a second add with it gives the same request")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--rows", metavar="FILE", help="rows to forget: JSON Lines, or any format of a data source")
    rows.add_argument("--where", **MANY, metavar="COLUMN=VALUE", help="rows of the training data with these values")
    parser.add_argument("--deadline", help="time to answer, such as 30d (default: requests.deadline)")
    parser.add_argument("--reason", help="kept encrypted with the rows")
    _json(parser)


def add(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Count the rows a request names, and record it."""
    submission = intake.Submission(
        key=options.key,
        where=None if options.where is None else intake.conditions(options.where),
        rows=None if options.rows is None else intake.rows_of_file(config, options.rows),
        deadline=options.deadline,
        reason=options.reason,
    )
    with intake.open_ledger(config) as ledger:
        request, new = intake.submit(config, ledger, submission, operator())
    if options.json:
        _print(request.to_json() | {"new": new})
    else:
        print(f"{request.id}  {request.state}  {request.row_count} rows  until {request.deadline:%Y-%m-%d}", end="")
        print("" if new else "  (was there)")
    return 0


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", **MANY, choices=STATES, help="only requests in these states")
    _json(parser)


def list_(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Requests, oldest first."""
    with intake.open_ledger(config, keyed=False) as ledger:
        requests = ledger.all(options.state)
    if options.json:
        _print([request.to_json() for request in requests])
        return 0
    print(_table(requests))
    return 0


def _table(requests: list[Request]) -> str:
    if not requests:
        return "no requests"
    width = max(len(request.key) for request in requests)
    return "\n".join(
        f"{one.id}  {one.key:{width}}  {one.state:12}  {one.row_count:>6} rows  until {one.deadline:%Y-%m-%d %H:%M}"
        for one in requests
    )


def show(options: argparse.Namespace, config: RequestsConfig) -> int:
    """One request and its history, without any text."""
    with intake.open_ledger(config, keyed=False) as ledger:
        request, events, readable = ledger.get(options.id), ledger.events(options.id), ledger.readable(options.id)
    if options.json:
        _print(request.to_json() | {"readable": readable, "events": [vars(event) for event in events]})
        return 0
    print(_table([request]))
    print(f"rows are {'kept encrypted' if readable else 'destroyed; their hashes remain'}")
    for event in events:
        detail = " ".join(f"{name}={value}" for name, value in event.detail.items())
        print(f"  {event.at[:19]}  {event.event:13}  {event.by}  {detail}")
    return 0


def _cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the request's id")
    parser.add_argument("--superseded-by", metavar="ID", help="the request that takes its place")
    _json(parser)


def cancel(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Withdraw a request that is not being processed; its texts are destroyed."""
    with intake.open_ledger(config, keyed=False) as ledger:
        other = options.superseded_by
        if other == options.id:
            raise UserError("--superseded-by: names the request itself")
        detail = {"cancelled": True} if other is None else {"superseded_by": ledger.get(other).id}
        state: State = "rejected" if other is None else "superseded"
        (request,) = ledger.move(options.id, state, detail, by=operator())
    if options.json:
        _print(request.to_json())
    else:
        print(f"{request.id}  {request.state}")
    return 0


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--known", **MANY, default=[], metavar="HASH", help="entries noted earlier, still to be there")
    _json(parser)


def audit(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Check the chain of the log and the tables against it; status 1 if something is wrong."""
    with intake.open_ledger(config, keyed=False) as ledger:
        problems, (entries, head) = ledger.audit(options.known), ledger.head()
    if options.json:
        _print({"entries": entries, "head": head, "problems": problems})
    else:
        print("\n".join(problems) or f"intact: {entries} entries, the last one {head}")
    return 1 if problems else 0


def report(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Counts by state, and deadlines at risk."""
    with intake.open_ledger(config, keyed=False) as ledger:
        summary = standing(ledger)
    if options.json:
        _print(summary.to_json())
        return 0
    print("  ".join(f"{state} {count}" for state, count in summary.counts.items()) or "no requests")
    for request in summary.at_risk:
        print(f"at risk  {request.id}  {request.key}  {request.state}  {summary.left(request)}")
    return 0


def _expire(parser: argparse.ArgumentParser) -> None:
    _json(parser)


def expire(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Destroy the keys of rows that requests.keep_rows has passed for; `process` does it as well."""
    with intake.open_ledger(config, keyed=False) as ledger:
        expired = ledger.destroy_expired(duration("requests.keep_rows", config.requests.keep_rows))
    if options.json:
        _print(expired)
    else:
        print("\n".join(f"{name}  rows destroyed" for name in expired) or "nothing to destroy")
    return 0


def _rekey(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--new-key-file", metavar="FILE", help="the new key; default: made, in requests.key_file")
    parser.add_argument("--new-key-env", metavar="NAME", help="environment variable with the new key")
    _json(parser)


def rekey(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Replace the master key; the old one opens nothing afterwards."""
    from ofmu_ray.requests.rekey import rekey as replaced

    if options.new_key_file is not None and options.new_key_env is not None:
        raise UserError("--new-key-file, --new-key-env: give one of them")
    done = replaced(config, operator(), to_file=options.new_key_file, to_env=options.new_key_env)
    if options.json:
        _print(vars(done))
        return 0
    print(f"{done.keys} keys wrapped by {done.place}; the old master key is of no use any more")
    if not done.configured:
        print(f"set requests.{'key_env' if options.new_key_env else 'key_file'} to it")
    return 0


COMMANDS = {
    "init": ("create the ledger and its master key", _none, init),
    "add": ("record a request: rows, or a selector over columns of the training data", _add, add),
    "list": ("requests and their states", _list, list_),
    "show": ("one request and its history", _one, show),
    "cancel": ("withdraw a request", _cancel, cancel),
    "audit": ("check the log's chain", _audit, audit),
    "report": ("counts by state, deadlines at risk", _json, report),
    "rekey": ("replace the master key", _rekey, rekey),
    "expire": ("destroy the texts of requests that requests.keep_rows has passed for", _expire, expire),
}
