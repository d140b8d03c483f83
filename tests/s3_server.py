"""An S3 server on loopback (moto) with one bucket, and a proxy in front that fails as networks do."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


@dataclass
class Server:
    """The server's address, and how to reach it."""

    endpoint: str
    bucket: str = f"s3://{BUCKET}"
    key: str = "test"
    secret: str = "test"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the AWS SDK reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client(self) -> Any:
        """A boto3 client."""
        return self._service("s3")

    def _service(self, name: str) -> Any:
        keys = {"aws_access_key_id": self.key, "aws_secret_access_key": self.secret}
        return boto3.client(name, endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def keys(self, prefix: str = "") -> list[str]:
        """Names of all objects, without folder markers."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return [key for key in names if not key.endswith("/")]

    def read(self, key: str) -> bytes:
        """An object's content."""
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def user(self) -> Server:
        """The server for a user with all rights, whose credentials are checked."""
        iam = self._service("iam")
        iam.create_user(UserName="user")
        rights = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=json.dumps(rights))
        made = iam.create_access_key(UserName="user")["AccessKey"]
        return replace(self, key=made["AccessKeyId"], secret=made["SecretAccessKey"])

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Accept only the credentials of a `user` during the block."""
        self._authenticate("0")
        try:
            yield
        finally:
            self._authenticate("inf")

    def _authenticate(self, after: str) -> None:
        address, plain = f"{self.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, after.encode(), plain, method="POST")).close()


@contextmanager
def s3_server() -> Iterator[Server]:
    """A running server, stopped at the end of the block."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    running = Server(f"http://{host}:{port}")
    urllib.request.urlopen(f"{running.endpoint}/moto-api/reset", b"").close()  # moto keeps one content per process
    running.client.create_bucket(Bucket=BUCKET)
    try:
        yield running
    finally:
        server.stop()


@dataclass
class Proxy:
    """The proxy's faults."""

    broken: dict[str, int] = field(default_factory=dict)
    """Method -> how many of its next requests fail: in turn by a 503, a closed connection and half a response."""
    spoil: Callable[[str, bytes], bytes] = lambda path, body: body
    """Changes the body of uploads."""
    failures: int = 0
    lock: Any = field(default_factory=Lock)

    def fails(self, method: str) -> int | None:
        """How this request fails; None: not at all."""
        with self.lock:
            if not self.broken.get(method):
                return None
            self.broken[method] -= 1
            self.failures += 1
            return self.failures % 3


@contextmanager
def proxy(server: Server) -> Iterator[tuple[Server, Proxy]]:
    """The server behind a proxy, and the proxy's faults."""
    behind, state = server.endpoint.removeprefix("http://"), Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.body()
            how = state.fails(self.command)
            if how == 1:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if how == 2:
                self.close_connection = True
                return
            body = state.spoil(self.path, body) if self.command in ("PUT", "POST") else body
            onward = http.client.HTTPConnection(behind)
            onward.request(self.command, self.path, body, dict(self.headers))
            answer = onward.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if how == 0:
                self.close_connection = True
                content = content[: len(content) // 2]
            self.wfile.write(content)

        def body(self) -> bytes:
            """The raw body: the AWS SDK sends parts in chunks, with a checksum after the last."""
            if "Transfer-Encoding" not in self.headers:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw, size = b"", 1
            while size:
                line = self.rfile.readline()
                size = int(line.partition(b";")[0], 16)
                raw += line + (self.rfile.read(size + 2) if size else b"")
            while raw[-4:] != b"\r\n\r\n":
                raw += self.rfile.readline()
            return raw

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{listener.server_port}"), state
    finally:
        listener.shutdown()
        listener.server_close()
