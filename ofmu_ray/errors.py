"""Errors a user can act on."""


class UserError(ValueError):
    """A user's mistake: the message names the option or the file and row, what was found and the remedy.

    The command line prints it without a traceback and exits with status 2. Messages never contain the text of a
    forget row (rows are named by id).
    """
