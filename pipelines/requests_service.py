"""`ofmu requests serve | token`."""

from __future__ import annotations

import argparse
import json

from ofmu_ray.config.requests import RequestsConfig, duration
from ofmu_ray.errors import UserError
from ofmu_ray.requests import intake
from pipelines.requests_intake import MANY, operator


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "POST /v1/requests, GET /v1/requests/{id}, its certificate, and a page for operators"


def serve(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Serve until interrupted."""
    from ofmu_ray.requests import service

    with intake.open_ledger(config) as ledger:
        service.serve(config, ledger)
    return 0


def _token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["create", "revoke", "list"])
    parser.add_argument("id", nargs="?", help="revoke: the token's id")
    parser.add_argument("--name", help="create: whose it is")
    parser.add_argument("--scopes", **MANY, default=[], help="create: some of submit, read, operate")
    parser.add_argument("--expires", default="90d", help="create: its lifetime, such as 90d")
    parser.add_argument("--json", action="store_true", help="print JSON")


def token(options: argparse.Namespace, config: RequestsConfig) -> int:
    """Create, revoke or list bearer tokens of the service."""
    from ofmu_ray.requests import tokens

    if (options.action == "revoke") != (options.id is not None):
        raise UserError("token: `revoke ID`, `create --name NAME --scopes SCOPE ...` or `list`")
    if options.action == "create" and options.name is None:
        raise UserError("--name: not set; say whose token it is")
    secret = None
    with intake.open_ledger(config, keyed=False) as ledger:
        now = ledger.clock()
        if options.action == "create":
            lifetime = duration("--expires", options.expires)
            one, secret = tokens.create(ledger, options.name, options.scopes, lifetime, operator())
            found = [one]
        elif options.action == "revoke":
            found = [tokens.revoke(ledger, options.id, operator())]
        else:
            found = tokens.tokens(ledger)
    if options.json:
        entries = [
            {"id": one.id, "name": one.name, "scopes": one.scopes, "expires": one.expires.isoformat()}
            | {"problem": one.problem(now)}
            for one in found
        ]
        print(json.dumps(entries[0] | {"token": secret} if secret else entries, indent=1))
        return 0
    for one in found:
        state = one.problem(now) or f"until {one.expires:%Y-%m-%d}"
        print(f"{one.id}  {one.name}  {','.join(one.scopes)}  {state}")
    if secret:
        print(f"{secret}\nThis is the only time that the token is shown.")
    return 0


COMMANDS = {
    "serve": ("serve requests over HTTP, with a page for operators", _serve, serve),
    "token": ("create, revoke or list the service's bearer tokens", _token, token),
}
