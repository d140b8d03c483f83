"""Per-round series of a run, written by rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from ofmu_ray.errors import UserError
from ofmu_ray.tracking import connection
from ofmu_ray.tracking.mlflow_run import RunHandle

FLUSH_ROUNDS = 50
FLUSH_SECONDS = 2.0
RETRY_SECONDS = 30.0
METRICS_PER_CALL = 1000  # MLflow's limit
LONGEST_BUFFER = 200_000

_log = logging.getLogger(__name__)


class _Point(NamedTuple):
    name: str
    value: float
    time_ms: int
    step: int


class RoundLogger:
    """Logs a few numbers per round without delaying the round: buffered, one call per flush; to TensorBoard, too, if
    the handle says so.

    After a resumption, the rounds since the last checkpoint run again; values logged before are skipped, series by
    series, so each step occurs once. If MLflow stops responding, training continues: points stay in the buffer, with a
    retry every 30 seconds; `close` reports undelivered values once.

    Use it as a context manager, or call `close`. One instance per run, on rank 0 only.

    Raises:
        UserError: the run is in a SQLite file that is not on this machine.
    """

    def __init__(
        self, handle: RunHandle, *, flush_rounds: int = FLUSH_ROUNDS, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        file = connection.sqlite_file(handle.uri)
        if file is not None and not file.is_file():
            raise UserError(
                f"tracking.uri = {handle.uri!r}: this worker's machine has no such file: "
                "workers on several machines need a tracking server (--tracking.uri http://HOST:PORT)"
            )
        self._run_id = handle.run_id
        self._folder = handle.tensorboard
        self._events: Any = None
        self._client = connection.client(handle.uri)
        self._flush_rounds, self._flush_seconds = flush_rounds, flush_seconds
        self._buffer: list[_Point] = []
        self._rounds = 0
        self._next_flush = time.monotonic() + flush_seconds
        self._last: dict[str, int] = {}
        self._known: frozenset[str] | None = None
        self._failing = False

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Log the values of one round (the MLflow step); flushes every 50 rounds or 2 seconds."""
        now = int(time.time() * 1000)
        self._buffer += [_Point(name, float(value), now, round) for name, value in values.items()]
        del self._buffer[:-LONGEST_BUFFER]
        self._write_events(round, values)
        self._rounds += 1
        due = time.monotonic() >= self._next_flush
        if due or (self._rounds >= self._flush_rounds and not self._failing):
            self.flush()

    def flush(self) -> bool:
        """Deliver the buffer; False if MLflow did not accept it (it stays buffered)."""
        try:
            with connection.impatient(retries=1, timeout_seconds=10):
                self._deliver()
        except Exception as error:  # MLflow's stores raise their own, sqlalchemy's and requests' errors
            if not self._failing:
                _log.warning("MLflow does not accept the series (%s); retrying.", type(error).__name__)
            self._failing = True
            self._next_flush = time.monotonic() + RETRY_SECONDS
            return False
        self._failing = False
        self._rounds = 0
        self._next_flush = time.monotonic() + self._flush_seconds
        return True

    def rewind(self, round: int) -> None:
        """Prepare for running the rounds after `round` again with other steps: their values will be logged again.

        MLflow deletes nothing: the history of a series also contains the values of the discarded rounds, and the latest
        value of a step is shown.
        """
        self._close_events()
        self.flush()
        self._buffer = [point for point in self._buffer if point.step <= round]
        self._last = {name: min(last, round) for name, last in self._last.items()}

    def close(self) -> bool:
        """Deliver the rest; False: MLflow did not accept it."""
        self._close_events()
        if not self._buffer or self.flush():
            return True
        _log.warning("%d values of the series were not delivered to MLflow.", len(self._buffer))
        return False

    def __enter__(self) -> RoundLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deliver(self) -> None:
        from mlflow.entities import Metric

        while self._buffer:
            chunk = self._buffer[:METRICS_PER_CALL]
            last = {name: self._last_step(name) for name in {point.name for point in chunk}}
            fresh = []
            for point in chunk:
                if point.step > last[point.name]:
                    fresh.append(Metric(*point))
                    last[point.name] = point.step
            if fresh:
                self._client.log_batch(self._run_id, metrics=fresh)
            self._last |= last
            del self._buffer[: len(chunk)]

    def _write_events(self, round: int, values: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # hides what was written before of this round and later ones: they run again
            self._events = SummaryWriter(self._folder, purge_step=round)
        for name, value in values.items():
            self._events.add_scalar(name, float(value), round)

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _last_step(self, name: str) -> int:
        """The last step of a series in MLflow (-1: none); queried once, as this logger is the only writer."""
        if name not in self._last:
            if self._known is None:
                self._known = frozenset(self._client.get_run(self._run_id).data.metrics)
            history: list[Any] = self._client.get_metric_history(self._run_id, name) if name in self._known else []
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]
