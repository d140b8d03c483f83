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

    `tell` is given lines about what happens, `show` the jobs' output as it comes, and lines of their status.

    Raises:
        UserError: nothing answers there, or it asks for a token.
    """

    def __init__(self, address: str, tell: Callable[[str], None], show: Callable[[str], None]):
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell every .gitignore and every request
        self.tell, self.show = tell, show
        self.address = without_credentials(address)
        with self._answering():
            self.client = JobSubmissionClient(address)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """What can go wrong between here and the cluster, as a user's mistake."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"address = {self.address!r}: the cluster wants its token, and got none or another; set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds it (default ~/.ray/auth_token)"
            ) from None
        except OSError as error:  # requests' own errors are among them
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
        """Whether a job of this name is running, and its id; otherwise the next free id: base, base-2, base-3."""
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
        """Upload and start; a job that another process has started meanwhile under this id is taken for ours."""
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
                        f"address = {self.address!r}: the head takes no jobs after {START_PATIENCE_SECONDS} s; look at "
                        "dashboard_agent.log in its logs"
                    ) from None
                time.sleep(1)  # a head that has just started

    def follow(self, submission: str) -> int:
        """Show the job's output until its end; its exit status, or 130 after Ctrl-C, which leaves the job alone."""
        self._info(submission)
        try:
            asyncio.run(self._tail(submission))
            return self._ended(submission)
        except KeyboardInterrupt:
            self.tell(f"\n{submission} goes on.\n{self.hints(submission)}")
            return 130

    async def _tail(self, submission: str) -> None:
        """The output as it comes; a connection that breaks is taken up where it broke."""
        from aiohttp import ClientError

        shown = broken = 0
        while True:
            seen = 0
            try:
                async for text in self.client.tail_job_logs(submission):
                    self.show(text[max(0, shown - seen) :])
                    seen += len(text)
                    if seen > shown:
                        shown, broken = seen, 0
                return
            except (ClientError, OSError, RuntimeError) as error:
                broken += 1
                if broken > RECONNECTIONS:
                    raise UserError(
                        f"address = {self.address!r}: the connection is lost ({type(error).__name__}); the job may be "
                        f"going on.\n{self.hints(submission)}"
                    ) from None
                await asyncio.sleep(2.0**broken)

    def _ended(self, submission: str) -> int:
        """Wait for the job's status to become final, which it does a moment after its output has ended."""
        info = self._info(submission)
        while not info.status.is_terminal():
            time.sleep(0.5)
            info = self._info(submission)
        self.tell(_line(info))
        return exit_status(info)

    def status(self, submission: str) -> int:
        """Show the status; exit status as of `follow`, 0 while the job is running."""
        info = self._info(submission)
        self.show(f"{_line(info)}\n")
        return exit_status(info) if info.status.is_terminal() else 0

    def stop(self, submission: str) -> int:
        """SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S (3 s unless the head has another); wait for the end."""
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
            self.tell("the same ofmu submit command takes it up again")
        return 0

    def hints(self, submission: str) -> str:
        """How to follow, look at and stop a job."""
        where = shlex.join(["--address", self.address])
        return "\n".join(
            f"{title:8}ofmu submit --{option} {submission} {where}"
            for title, option in (("follow", "attach"), ("status", "status"), ("stop", "stop"))
        )


def exit_status(info: Any) -> int:
    """The pipeline's exit status: 0, 2 for a user's mistake, 1 for everything else (killed, stopped, not started)."""
    if info.status == "SUCCEEDED":
        return 0
    return 2 if info.driver_exit_code == 2 else 1


def _line(info: Any) -> str:
    line = f"{info.submission_id} {info.status.value}"
    if info.status == "FAILED" and info.driver_exit_code is None:  # the command was never run; its output says nothing
        line += f": {info.message}"
    return line
