"""Errors a user can act on."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A user's mistake: the message names the option or the file and row, what was found and the remedy.

    The command line prints it without a traceback and exits with `status`. Messages never contain the text of a
    forget row (rows are named by id).
    """

    status = 2


class StorageError(UserError):
    """Storage that was fine at the start has no room, refuses or does not answer: the work is stopped, not wrong."""

    status = 1


def user_error_within(error: BaseException | None) -> UserError | None:
    """The user's mistake inside an error that Ray wrapped, if there is one."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it came from as a traceback would show it, also where Ray wrapped it."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue += [current.__cause__, None if current.__suppress_context__ else current.__context__]
        queue += [getattr(current, "cause", None)]
        queue += [getattr(current, "controller_failure", None), *getattr(current, "worker_failures", {}).values()]
