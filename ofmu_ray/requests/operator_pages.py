"""Pages for operators: server-rendered, no JavaScript. The token comes from a form and stays in a cookie."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import DictLoader, Environment, StrictUndefined
from starlette.concurrency import run_in_threadpool

from ofmu_ray.requests import tokens
from ofmu_ray.requests.guard import COOKIE
from ofmu_ray.requests.ledger import Ledger
from ofmu_ray.requests.records import UnknownRequest
from ofmu_ray.requests.standing import standing

SHOWN = 100
"""Open requests listed."""


@functools.cache
def _environment() -> Environment:
    folder = files("ofmu_ray.requests")
    sources = {name: folder.joinpath(name).read_text() for name in ("operator_pages.j2", "operator_style.j2")}
    environment = Environment(autoescape=True, loader=DictLoader(sources), undefined=StrictUndefined, trim_blocks=True)
    environment.filters["minute"] = lambda moment: f"{moment:%Y-%m-%d %H:%M}"
    return environment


def _page(view: str, status: int = 200, **values: Any) -> HTMLResponse:
    template = _environment().get_template("operator_pages.j2")
    return HTMLResponse(template.render(view=view, **values), status)


def _allowed(request: Request) -> bool:
    token = request.state.token
    return isinstance(token, tokens.Token) and "operate" in token.scopes


def add_routes(app: FastAPI, ledger: Ledger) -> None:
    """`/`, `/requests/{id}`, `/login`, `/logout` and the style sheet."""

    @app.get("/", include_in_schema=False)
    def overview(request: Request) -> Response:
        if not _allowed(request):
            return _page("login", 401, message="")
        return _page("overview", now=standing(ledger), shown=SHOWN)

    @app.get("/requests/{request_id}", include_in_schema=False)
    def one(request: Request, request_id: str) -> Response:
        if not _allowed(request):
            return _page("login", 401, message="")
        try:
            found = ledger.get(request_id)
        except UnknownRequest:
            return _page("missing", 404)
        events, readable = ledger.events(found.id), ledger.readable(found.id)
        certified = ledger.certificate(found.id) is not None
        return _page("one", request=found, events=events, readable=readable, certified=certified, now=standing(ledger))

    @app.get("/requests/{request_id}/certificate", include_in_schema=False)
    def certificate(request: Request, request_id: str) -> Response:
        if not _allowed(request):
            return _page("login", 401, message="")
        try:
            document = ledger.certificate(request_id)
        except UnknownRequest:
            document = None
        if document is None:
            return _page("missing", 404)
        headers = {"content-disposition": f'attachment; filename="{request_id}.certificate.json"'}
        return Response(document, media_type="application/json", headers=headers)

    @app.post("/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        try:
            fields = parse_qs((await request.body()).decode(), max_num_fields=4)
        except ValueError:  # not UTF-8, or many fields
            fields = {}
        secret = fields.get("token", [""])[0].strip()
        token = await run_in_threadpool(tokens.find, ledger, secret) if secret.isascii() else None
        if token is None or token.problem(ledger.clock()) or "operate" not in token.scopes:
            return _page("login", 401, message="This is not a valid token with the scope operate.")
        answer = RedirectResponse("/", 303)
        https = request.url.scheme == "https"
        answer.set_cookie(COOKIE, secret, httponly=True, samesite="strict", secure=https, path="/")
        return answer

    @app.post("/logout", include_in_schema=False)
    async def logout() -> Response:
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict", path="/")
        return answer

    @app.get("/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(_environment().get_template("operator_style.j2").render(), media_type="text/css")
