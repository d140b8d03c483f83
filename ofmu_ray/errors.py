"""Errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A user's mistake: the message names the option (or the file and row), the problem and the remedy.

    The command line prints it without a traceback and exits with `status`. Messages never contain the text of a
    forget row; rows are named by id.
    """

    status = 2


class StorageError(UserError):
    """Storage ran out of space, denied access or stopped responding: the run is interrupted, not wrong."""

    status = 1


class StartError(UserError):
    """Ray does not start on this machine now; nothing is wrong with the command."""

    status = 1


def user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError inside an error that Ray wrapped, if there is one."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes as a traceback shows them, including those that Ray wrapped."""
    visited: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in visited:
            continue
        visited.add(id(current))
        yield current
        queue += [current.__cause__, None if current.__suppress_context__ else current.__context__]
        queue += [getattr(current, "cause", None)]
        queue += [getattr(current, "controller_failure", None), *getattr(current, "worker_failures", {}).values()]
