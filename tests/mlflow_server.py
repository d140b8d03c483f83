"""A real `mlflow server` process that a test starts, kills and restarts on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 120
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Disables the server's job processes (for prompts and traces), which take most of its start time."""


class MlflowServer:
    """One worker on loopback; its database and artifacts are in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
            *("--artifacts-destination", str(self.folder / "files")),
        ]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=os.environ | WITHOUT_JOBS
            )
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.healthy():
            late = time.monotonic() > end or self.process.poll() is not None
            assert not late, (self.folder / "server.log").read_text()
            time.sleep(0.5)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self, sent: signal.Signals = signal.SIGKILL) -> None:
        """Kill the group that `start` started: server and worker."""
        if self.process is not None:
            os.killpg(self.process.pid, sent)
            self.process.wait(timeout=30)
            self.process = None


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A running server, stopped at the end of the block."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill(signal.SIGTERM)
