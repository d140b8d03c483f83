"""`ofmu requests process | rollback | retry | verify | keys`."""

from __future__ import annotations

import argparse
from typing import Any

from ofmu_ray.commandline.terminal import say
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.errors import UserError


def _none(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def process(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Work off everything that is due; status 0 also if another processor is at work, 1 if a person has to decide."""
    from ofmu_ray.requests.lease import LeaseHeld
    from ofmu_ray.requests.process import process as work

    try:
        outcomes = work(config)
    except LeaseHeld as error:
        say(f"lease   {error}")
        return 0
    for one in outcomes:
        if one.state == "promoted":
            print(f"{one.batch}  promoted  {len(one.requests)} requests  version {one.version}  {one.certificate}")
        else:
            print(f"{one.batch}  {one.state}  {len(one.requests)} requests  {one.report}\n  {one.why}")
    if not outcomes:
        print("no requests are due")
    return 0 if all(one.state == "promoted" for one in outcomes) else 1


def _rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, help="kept with the withdrawn version")


def rollback(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Use the version before the champion again; the requests that the champion satisfied are open again."""
    from ofmu_ray.requests.process import rollback as back

    done = back(config, options.reason)
    print(f"version {done.version} is withdrawn, version {done.champion} is the champion")
    for state, requests in (("accepted", done.reopened), ("needs_review", done.for_review)):
        print("\n".join(f"{name}  {state}" for name in requests), end="\n" if requests else "")
    return 0


def _retry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="+", help="requests that are needs_review or failed")


def retry(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Accept requests again, for the next `process`."""
    from ofmu_ray.requests.intake import open_ledger
    from pipelines.requests_intake import operator

    with open_ledger(config, keyed=False) as ledger:
        for request in ledger.retry(options.id, operator()):
            print(f"{request.id}  {request.state}")
    return 0


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("certificate", help="the certificate's JSON file")
    parser.add_argument("--public-key", required=True, metavar="FILE", help="public key, or folder of them")
    parser.add_argument("--model", metavar="DIR", help="a model, to compare with the certificate's result")


def verify(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Check a certificate's signature and gates, and that a model is the one it speaks of; status 1 if not."""
    from ofmu_ray.requests.certificate import verify as check

    found = check(options.certificate, options.public_key, options.model)
    content: Any = found.content
    print(f"valid    signed by {found.key_id}, {content['issued']}")
    print(f"requests {', '.join(one['id'] for one in content['requests'])}")
    print(f"result   version {content['result']['version']}, weights {content['result']['weights'][:16]}", end="")
    print(" = --model" if found.model else " (--model DIR compares a model)")
    passed = sum(gate["result"] == "passed" for gate in content["gates"])
    print(f"gates    {passed} passed, {len(content['gates']) - passed} skipped")
    return 0


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("create", "rotate", "list"), help="rotate: a new key signs from now on")


def keys(options: argparse.Namespace, config: RequestsConfig) -> int:
    """The Ed25519 keys that sign certificates."""
    from ofmu_ray.requests.signing import Keys

    folder = Keys(config.signing_keys)
    if options.action != "list":
        key = folder.create() if options.action == "create" else folder.rotate()
        print(f"{key.key_id}  {key.path}")
        return 0
    known = folder.all()
    if not known:
        raise UserError(f"{folder.folder} has no key: `ofmu requests keys create` makes the first")
    for key in known:
        print(f"{key.key_id}  {key.created[:19]}  {'signs  ' if key.current else 'retired'}  {key.path}")
    return 0


COMMANDS = {
    "process": ("work off all due requests: unlearn, check by gates, promote, certify", _none, process),
    "rollback": ("withdraw the champion and reopen what it satisfied", _rollback, rollback),
    "retry": ("accept requests again that failed or need a review", _retry, retry),
    "verify": ("check a certificate offline", _verify, verify),
    "keys": ("create, rotate or list signing keys", _keys, keys),
}
