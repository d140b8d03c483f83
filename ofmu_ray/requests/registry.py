"""The champion in MLflow's model registry: a version per promotion, the aliases `champion` and `previous`.

A version and its tags are created in one transaction, and `champion` moves in one call, so a killed process leaves a
version that nobody uses or a finished promotion. All calls can be repeated: a version is found again by its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ofmu_ray.config import TrackingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import is_uri
from ofmu_ray.tracking import connection

CHAMPION, PREVIOUS = "champion", "previous"
BATCH, REPLACES, REQUESTS, REPORT, WEIGHTS, WITHDRAWN = (
    f"ofmu.{name}" for name in ("batch", "replaces", "requests", "report", "weights", "withdrawn")
)
FIRST = "first"
"""The batch of the version that everything starts from."""
_LONGEST_TAG = 5000  # characters of a tag's value that MLflow keeps


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: str
    path: str
    """Folder or URI of the model."""
    weights: str
    """Fingerprint (`models.source.model_fingerprint`)."""
    batch: str
    """Which requests it satisfies; `first` for the model that everything starts from."""
    replaces: str | None = None
    """Number of the version that was the champion before it."""
    run_id: str | None = None
    """MLflow run that made it."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def withdrawn(self) -> bool:
        """Whether a rollback took it back."""
        return WITHDRAWN in self.tags


class Registry:
    """The registered model of a tracking server or database."""

    def __init__(self, tracking: TrackingConfig, storage: str, name: str) -> None:
        self.name = name
        self.uri = connection.resolve_uri(tracking.uri, storage)
        connection.check_reachable(self.uri)
        with connection.creation_lock(self.uri):
            self._client = connection.client(self.uri)  # creates the tables of a fresh database

    def champion(self) -> Version | None:
        """The model in use; None before the first."""
        return self._alias(CHAMPION)

    def previous(self) -> Version | None:
        """The model that a rollback goes back to."""
        return self._alias(PREVIOUS)

    def version(self, number: str) -> Version:
        """A version by its number."""
        with self._asked():
            return _version(self._client.get_model_version(self.name, number))

    def of_batch(self, batch: str) -> Version | None:
        """The version that was registered for a batch and not withdrawn."""
        with self._asked():
            found = self._client.search_model_versions(f"name = '{self.name}' and tags.`{BATCH}` = '{batch}'")
        versions = [one for one in map(_version, found) if not one.withdrawn]
        return max(versions, key=lambda one: int(one.number), default=None)

    def register(
        self,
        path: str,
        weights: str,
        batch: str,
        *,
        replaces: Version | None = None,
        run_id: str | None = None,
        requests: Sequence[str] = (),
        report: str = "",
    ) -> Version:
        """The version of a batch made from `replaces`; a second call returns the same one. Nobody's champion yet."""
        from mlflow.exceptions import MlflowException

        there = self.of_batch(batch) if self._exists() else None
        if there is not None and there.replaces == (replaces.number if replaces is not None else None):
            return there
        tags = {BATCH: batch, WEIGHTS: weights, REPORT: report, REQUESTS: _joined(requests)}
        tags |= {REPLACES: replaces.number} if replaces is not None else {}
        source = path if is_uri(path) else Path(path).absolute().as_uri()
        with self._asked():
            try:
                self._client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            made = self._client.create_model_version(
                self.name, source, run_id=run_id, tags={name: value for name, value in tags.items() if value}
            )
        return _version(made)

    def promote(self, version: Version, confirm: Callable[[], None] = lambda: None) -> None:
        """Make a version the champion, and the one that it replaces `previous`. Can be repeated.

        `confirm` is called right before `champion` moves, to raise if the caller lost its lease. MLflow has no move on
        condition: a process that is paused in this last step, while its lease ends and its successor promotes this
        version and a later one, still moves `champion` back from the later one; the next `process` notices.

        Raises:
            UserError: the champion is neither the version that this one replaces nor this one.
        """
        champion = self.champion()
        number = None if champion is None else champion.number
        if number not in (version.replaces, version.number):
            now = "nobody" if number is None else f"version {number}"
            began = "there was no champion" if version.replaces is None else f"it was version {version.replaces}"
            raise UserError(
                f"{self.name}: version {version.number} is not promoted: the champion is {now} now, and {began} when "
                f"the batch {version.batch} began"
            )
        confirm()
        with self._asked():
            self._client.set_registered_model_alias(self.name, CHAMPION, version.number)
            if version.replaces is not None:
                self._client.set_registered_model_alias(self.name, PREVIOUS, version.replaces)

    def mark_withdrawn(self, version: Version, reason: str) -> None:
        """Note that a version is taken back, before anything else changes."""
        text = reason[:_LONGEST_TAG] or "rollback"
        with self._asked():
            self._client.set_model_version_tag(self.name, version.number, WITHDRAWN, text)

    def withdrawn(self) -> list[Version]:
        """All versions that were taken back."""
        return [one for one in self._versions() if one.withdrawn]

    def root(self, version: Version) -> Version:
        """The version that its line of promotions started from: itself, if it replaced none."""
        known = {one.number: one for one in self._versions()}
        while version.replaces in known:
            version = known[version.replaces]
        return version

    def made_from(self, version: Version) -> list[Version]:
        """Versions made from it, directly or one from another, and not taken back; oldest first."""
        numbers, made = {version.number}, []
        for one in sorted(self._versions(), key=lambda one: int(one.number)):
            if one.replaces in numbers and not one.withdrawn:
                numbers.add(one.number)
                made.append(one)
        return made

    def withdraw(self, version: Version) -> Version:
        """Give `champion` back to the version that `version` replaced, and return that. Can be repeated.

        `champion` moves last: a withdrawn champion is how a killed rollback is noticed.
        """
        assert version.replaces is not None, "the first version replaces none"
        before = self.version(version.replaces)
        with self._asked():
            if before.replaces is not None:
                self._client.set_registered_model_alias(self.name, PREVIOUS, before.replaces)
            else:
                self._client.delete_registered_model_alias(self.name, PREVIOUS)
            self._client.set_registered_model_alias(self.name, CHAMPION, before.number)
        return before

    def _alias(self, alias: str) -> Version | None:
        from mlflow.exceptions import MlflowException

        with self._asked():
            try:
                return _version(self._client.get_model_version_by_alias(self.name, alias))
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def _versions(self) -> list[Version]:
        if not self._exists():
            return []
        with self._asked():
            return [_version(one) for one in self._client.search_model_versions(f"name = '{self.name}'")]

    def _exists(self) -> bool:
        with self._asked():
            return bool(self._client.search_registered_models(f"name = '{self.name}'"))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with connection.impatient(retries=2):
                yield
        except (MlflowException, SQLAlchemyError) as error:
            raise connection.unreachable(self.uri, str(error).splitlines()[0][:300]) from None


def _version(entity: Any) -> Version:
    tags = dict(entity.tags)
    parts = urlsplit(entity.source)
    path = unquote(parts.path) if parts.scheme == "file" else entity.source
    return Version(
        number=str(entity.version),
        path=path,
        weights=tags.get(WEIGHTS, ""),
        batch=tags.get(BATCH, ""),
        replaces=tags.get(REPLACES),
        run_id=entity.run_id or None,
        tags=tags,
    )


def _joined(requests: Sequence[str]) -> str:
    """Ids with commas, as many as a tag holds."""
    text = ",".join(requests)
    return text if len(text) <= _LONGEST_TAG else text[: _LONGEST_TAG - 1].rpartition(",")[0] + ",…"
