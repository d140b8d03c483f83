"""Jobs of a Ray cluster as `ofmu submit` sees them: find, start, follow, stop."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ofmu_ray.errors import UserError
from ofmu_ray.storage import without_credentials

START_PATIENCE_SECONDS = 60
STOP_PATIENCE_SECONDS = 120
RECONNECTIONS = 6


class Jobs:
    """The job server behind a dashboard's address.

    `tell` gets status messages; `show` gets the jobs' output as it arrives, and their status lines.

    Raises:
        UserError: no answer, or the server asks for a token.
    """

    def __init__(self, address: str, tell: Callable[[str], None], show: Callable[[str], None]):
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log every .gitignore and every request
        self.tell, self.show = tell, show
        self.address = without_credentials(address)
        with self._answering():
            self.client = JobSubmissionClient(address)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turns connection problems into UserError."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"address = {self.address!r}: the cluster wants its token, and got none or a wrong one; set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the token file (default ~/.ray/auth_token)"
            ) from None
        except OSError as error:  # includes the errors of requests
            raise UserError(
                f"address = {self.address!r}: no answer ({type(error).__name__}); is the cluster up, and the "
                "dashboard's port forwarded (ray dashboard CLUSTER.yaml, kubectl port-forward, ssh -L)?"
            ) from None

    def _info(self, submission: str) -> Any:
        with self._answering():
            try:
                return self.client.get_job_info(submission)
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
                raise UserError(f"{submission!r}: no such job at {self.address}; ray job list shows all") from None

    def find(self, base: str) -> tuple[bool, str]:
        """(True, id) of a running job with this name, else (False, next free id): base, base-2, base-3."""
        with self._answering():
            jobs = {job.submission_id: job for job in self.client.list_jobs() if job.submission_id}
        taken = {
            int(match[1] or 1): name for name in jobs if (match := re.fullmatch(re.escape(base) + r"(?:-(\d+))?", name))
        }
        for name in taken.values():
            if not jobs[name].status.is_terminal():
                return True, name
        return False, f"{base}-{max(taken) + 1}" if taken else base

    def start(self, submission: str, entrypoint: str, environment: dict[str, Any]) -> None:
        """Upload and start. If another process has meanwhile started a job with this id, use that one."""
        end = time.monotonic() + START_PATIENCE_SECONDS
        while True:
            try:
                with self._answering():
                    self.client.submit_job(
                        entrypoint=entrypoint, submission_id=submission, runtime_env=dict(environment)
                    )
                return
            except RuntimeError as error:
                if "already exists" in str(error):
                    return
                if "No available agent" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise UserError(
                        f"address = {self.address!r}: the head accepts no jobs after {START_PATIENCE_SECONDS} s; see "
                        "dashboard_agent.log in its logs"
                    ) from None
                time.sleep(1)  # the head has just started

    def follow(self, submission: str) -> int:
        """Show the job's output until it ends. Returns its exit status, or 130 after Ctrl-C; the job then goes on."""
        self._info(submission)
        try:
            asyncio.run(self._tail(submission))
            return self._wait(submission)
        except KeyboardInterrupt:
            self.tell(f"\n{submission} goes on.\n{self.hints(submission)}")
            return 130

    async def _tail(self, submission: str) -> None:
        """Show the output as it arrives; resume where a broken connection stopped."""
        from aiohttp import ClientError

        shown = broken = 0
        while True:
            received = 0
            try:
                async for text in self.client.tail_job_logs(submission):
                    self.show(text[max(0, shown - received) :])
                    received += len(text)
                    if received > shown:
                        shown, broken = received, 0
                return
            except (ClientError, OSError, RuntimeError) as error:
                broken += 1
                if broken > RECONNECTIONS:
                    raise UserError(
                        f"address = {self.address!r}: connection lost ({type(error).__name__}); the job may still be "
                        f"running.\n{self.hints(submission)}"
                    ) from None
                await asyncio.sleep(2.0**broken)

    def _wait(self, submission: str) -> int:
        """Wait for the job's final status, which comes a moment after the end of its output."""
        info = self._info(submission)
        while not info.status.is_terminal():
            time.sleep(0.5)
            info = self._info(submission)
        self.tell(_line(info))
        return exit_status(info)

    def status(self, submission: str) -> int:
        """Show the status. Returns the exit status as in `follow`, 0 while the job is running."""
        info = self._info(submission)
        self.show(f"{_line(info)}\n")
        return exit_status(info) if info.status.is_terminal() else 0

    def stop(self, submission: str) -> int:
        """SIGTERM, then SIGKILL after RAY_JOB_STOP_WAIT_TIME_S (3 s unless set on the head); wait for the end."""
        self._info(submission)
        with self._answering():
            self.client.stop_job(submission)
        end = time.monotonic() + STOP_PATIENCE_SECONDS
        while not (info := self._info(submission)).status.is_terminal():
            if time.monotonic() > end:
                self.tell(f"{submission} is still {info.status} after {STOP_PATIENCE_SECONDS} s")
                return 1
            time.sleep(0.5)
        self.show(f"{_line(info)}\n")
        if info.status == "STOPPED":
            self.tell("run the same ofmu submit command to resume it")
        return 0

    def hints(self, submission: str) -> str:
        """Commands to follow, inspect and stop a job."""
        where = shlex.join(["--address", self.address])
        return "\n".join(
            f"{title:8}ofmu submit --{option} {submission} {where}"
            for title, option in (("follow", "attach"), ("status", "status"), ("stop", "stop"))
        )


def exit_status(info: Any) -> int:
    """The pipeline's exit status: 0, 2 for a user error, 1 for everything else (killed, stopped, not started)."""
    if info.status == "SUCCEEDED":
        return 0
    return 2 if info.driver_exit_code == 2 else 1


def _line(info: Any) -> str:
    line = f"{info.submission_id} {info.status.value}"
    if info.status == "FAILED" and info.driver_exit_code is None:  # the command never ran, so it has no output
        line += f": {info.message}"
    return line
