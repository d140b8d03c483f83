"""The HTTP service: requests in, states and certificates out, and a page for operators.

POST /v1/requests                     scope submit
GET  /v1/requests/{id}                scope read
GET  /v1/requests/{id}/certificate    scope read
GET  /openapi.json, /healthz          open
GET  /, /requests/{id}                scope operate; `operator_pages.py`
"""

from __future__ import annotations

import logging
import re
import socket
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ofmu_ray import __version__
from ofmu_ray.config.requests import RequestsConfig, ServiceOptions
from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.progress import note
from ofmu_ray.requests import intake, operator_pages
from ofmu_ray.requests.guard import LOG, Guard, refusal
from ofmu_ray.requests.lease import LeaseHeld
from ofmu_ray.requests.ledger import KeyTaken, Ledger
from ofmu_ray.requests.records import Request as LedgerRequest
from ofmu_ray.requests.records import UnknownRequest
from ofmu_ray.requests.tokens import Token
from ofmu_ray.requests.vault import WrongKey

ID = re.compile(r"req-[0-9a-f]{20}")
BEARER = HTTPBearer(auto_error=False)
STATUS: dict[type[UserError], int] = {
    KeyTaken: 409,
    UnknownRequest: 404,
    LeaseHeld: 409,
    StorageError: 503,
    WrongKey: 503,
}
"""Other user errors are 422."""


class Body(BaseModel):
    """A request to forget: rows, or a selector over columns of the training data."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: str | None = Field(None, description="Idempotency key, unless the header Idempotency-Key gives it.")
    where: dict[str, str | int] | None = Field(None, description="Column -> value; rows that fulfil all conditions.")
    rows: list[dict[str, Any]] | None = Field(None, description="Rows, with the columns of data.format.")
    deadline: str | None = Field(None, description="Time to answer, such as 30d.")
    reason: str | None = Field(None, description="Kept encrypted with the rows.")


class Entry(BaseModel):
    """A step of a request's history."""

    at: str
    event: str


class Answer(BaseModel):
    """A request as it stands; without any text."""

    id: str
    key: str
    state: str
    rows: int = Field(description="Different rows that it names.")
    created: str
    deadline: str
    ended: str | None
    history: list[Entry] = []


def needs(scope: str) -> Any:
    """A dependency that refuses a call without a valid token of this scope."""

    def check(request: Request, _: Annotated[object, Depends(BEARER)]) -> Token:
        token = request.state.token
        if not isinstance(token, Token):
            raise HTTPException(401, token, {"www-authenticate": "Bearer"})
        if scope not in token.scopes:
            raise HTTPException(403, f"this token lacks the scope {scope}")
        return token

    return Depends(check)


def make_app(config: RequestsConfig, ledger: Ledger) -> FastAPI:
    """The service over a ledger with a vault."""
    app = FastAPI(title="Requests to forget", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, ledger=ledger, options=config.requests.service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_routes(app, config, ledger)
    operator_pages.add_routes(app, ledger)
    return app


def _add_routes(app: FastAPI, config: RequestsConfig, ledger: Ledger) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        401: {"description": "No valid token"},
        403: {"description": "The token lacks the scope"},
        429: {"description": "Too many calls"},
    }

    @app.post("/v1/requests", status_code=201, responses={**errors, 200: {"model": Answer}, 409: {}, 413: {}})
    def submit(
        body: Body,
        response: Response,
        token: Annotated[Token, needs("submit")],
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> Answer:
        """Record a request. 200 if the key has brought it before, 409 if the key belongs to another one."""
        keys = {key for key in (body.key, idempotency_key) if key is not None}
        if len(keys) != 1:
            raise UserError("key: give one idempotency key, in the body or in the header Idempotency-Key")
        where = None if body.where is None else {column: str(value) for column, value in body.where.items()}
        submission = intake.Submission(
            key=keys.pop(), where=where, rows=body.rows, deadline=body.deadline, reason=body.reason
        )
        request, new = intake.submit(config, ledger, submission, by=token.id)
        response.status_code = 201 if new else 200
        response.headers["location"] = f"/v1/requests/{request.id}"
        return _answer(request)

    @app.get("/v1/requests/{request_id}", responses={**errors, 404: {}}, dependencies=[needs("read")])
    def read(request_id: str) -> Answer:
        """State, deadline and history of a request."""
        events = ledger.events(known_id(request_id))
        return _answer(ledger.get(request_id), [Entry(at=event.at, event=event.event) for event in events])

    @app.get(
        "/v1/requests/{request_id}/certificate", responses={**errors, 404: {}}, dependencies=[needs("read")],
        response_class=Response,
    )  # fmt: skip
    def certificate(request_id: str) -> Response:
        """The signed certificate, byte for byte. 404 with the reason while there is none, or after a rollback."""
        document = ledger.certificate(known_id(request_id))
        if document is None:
            state = ledger.get(request_id).state
            raise HTTPException(404, f"no certificate: the request is {state}, and one is made when it is promoted")
        headers = {"content-disposition": f'attachment; filename="{request_id}.certificate.json"'}
        return Response(document, media_type="application/json", headers=headers)

    @app.get("/healthz", include_in_schema=False)
    def health() -> dict[str, str]:
        ledger.head()
        return {"status": "ok"}


def known_id(request_id: str) -> str:
    """The id, if it has the form of one."""
    if not ID.fullmatch(request_id):
        raise UnknownRequest("no request with this id")
    return request_id


def _answer(request: LedgerRequest, history: list[Entry] | None = None) -> Answer:
    content = request.to_json()
    names = ("id", "key", "state", "created", "deadline", "ended")
    return Answer(**{name: content[name] for name in names}, rows=request.row_count, history=history or [])


def _invalid(request: Request, error: Exception) -> Response:
    """Which field is wrong and how; pydantic's own text repeats what was sent."""
    assert isinstance(error, RequestValidationError)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return JSONResponse({"error": "body: must be JSON, sent with Content-Type: application/json"}, 422)
    fields = {*Body.model_fields, "body", "header", "path", "idempotency-key"}
    lines = []
    for one in error.errors():
        place = ".".join(part if part in fields else "*" for part in map(str, one["loc"][:2]))
        lines.append(f"{place}: {one['type'].replace('_', ' ')}")
    return JSONResponse({"error": "; ".join(dict.fromkeys(lines))}, 422)


def _user_error(_: Request, error: Exception) -> Response:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 422)
    return JSONResponse({"error": str(error) if status != 404 else "no request with this id"}, status)


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error)


def serve(config: RequestsConfig, ledger: Ledger) -> None:
    """Serve until interrupted. Notes the address once connections are accepted.

    Raises:
        UserError: the address cannot be listened on.
    """
    options = config.requests.service
    logging.basicConfig(format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    listener = listening(options)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    note("serve", f"http://{shown}:{port}  (operators' page: /, description: /openapi.json)")
    if host != "::1" and not host.startswith("127."):
        note("note", "not on loopback: put a proxy with TLS in front, tokens travel in the clear")
    make_server(config, ledger).run(sockets=[listener])


def listening(options: ServiceOptions) -> socket.socket:
    """A socket that listens on the configured address, of IPv4 or IPv6. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=256)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise UserError(f"requests.service: cannot listen on {where} ({error.strerror}); set host and port") from None


def make_server(config: RequestsConfig, ledger: Ledger) -> uvicorn.Server:
    """The server of `make_app`."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(config, ledger),
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=256,
            proxy_headers=config.requests.service.proxy_headers,
        )
    )
