"""Ctrl-C for processes that tests start."""

import signal


def heed_ctrl_c() -> None:
    """As `preexec_fn`: a shell's background jobs, and so perhaps the tests and all they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
