"""From "delete my data" to a signed certificate, and back: `make requests-demo`.

    python -m benchmarks.requests_demo --out build/requests-demo

Starts the HTTP service, submits the rows of one of the built-in (invented) people, works the request off, verifies the
certificate, rolls the promotion back, and says where certificate and page are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "pipelines/configs/requests_people.yaml"
START_SECONDS = 120


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build/requests-demo", help="storage; deleted first")
    out = parser.parse_args(arguments).out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    demo = Demo(out)
    demo.step("a ledger, its master key, a signing key, a token", "init")
    demo.step(None, "keys", "create")
    token = json.loads(
        demo.quiet("token", "create", "--name", "demo", "--scopes", "submit", "read", "operate", "--json")
    )["token"]
    with demo.served() as address:
        print(f"\n== somebody asks for their rows to be deleted: POST {address}/v1/requests")
        request = posted(f"{address}/v1/requests", token, {"rows": person()}, key="ticket-1")
        print(f"{request['id']}  {request['state']}  {request['rows']} rows  due {request['deadline'][:10]}")
    demo.step("the nightly job: unlearn, check by gates, promote, certify", "process")
    (certificate,) = (out / "requests/certificates").glob("*.json")
    (key,) = (out / "requests/keys").glob("*.pub")
    model = demo.champion()
    check = ["verify", str(certificate), "--public-key", str(key), "--model", model]
    demo.step("anybody, offline: is the certificate genuine, and about this model?", *check)
    demo.step("the log of everything that happened", "audit")
    demo.step("second thoughts: the model before is in use, the request open again", "rollback", "--reason", "demo")
    demo.step(None, "list")
    shown = " ".join(["ofmu requests", *check])
    print(f"\ncertificate  {certificate}\npage         open {certificate.with_suffix('.html')} in a browser")
    print(f"verify       {shown}")
    return 0


class Demo:
    """The commands of `ofmu requests` on one storage."""

    def __init__(self, out: Path) -> None:
        self.options = ["--config", str(CONFIG), "--storage", str(out)]
        self.out = out

    def step(self, title: str | None, *words: str) -> None:
        """Run a subcommand in this process, with a heading; SystemExit if it fails."""
        from pipelines import cli

        if title is not None:
            print(f"\n== {title}: ofmu requests {words[0]}", flush=True)
        status = cli.main(["requests", *words, *self.options])
        if status:
            raise SystemExit(f"ofmu requests {words[0]} ended with status {status}")

    def quiet(self, *words: str) -> str:
        """The output of a subcommand."""
        output = StringIO()
        with redirect_stdout(output):
            self.step(None, *words)
        return output.getvalue()

    @contextmanager
    def served(self) -> Iterator[str]:
        """The service in a process of its own; its address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "pipelines.cli", "requests", "serve", *self.options]
        with (self.out / "requests/server.log").open("w") as log:
            server = subprocess.Popen(
                [*command, "--requests.service.port", str(port)], cwd=ROOT, stdout=log, stderr=log
            )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{address}/healthz", server)
            yield address
        finally:
            server.terminate()
            server.wait()

    def champion(self) -> str:
        """Folder of the model in use."""
        from ofmu_ray.config import TrackingConfig
        from ofmu_ray.requests.registry import Registry

        champion = Registry(TrackingConfig(), str(self.out), "ofmu").champion()
        assert champion is not None
        return champion.path


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise SystemExit("the service did not start; see requests/server.log")


def person() -> list[dict[str, str]]:
    """The eight rows of an invented person."""
    from ofmu_ray.assets import resolve_builtin

    lines = Path(resolve_builtin("builtin:people/forget.jsonl")).read_text().splitlines()[:8]
    return [json.loads(line) for line in lines]


def posted(address: str, token: str, body: dict[str, Any], key: str) -> Any:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Idempotency-Key": key}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
