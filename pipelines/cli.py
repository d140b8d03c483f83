"""The console command `ofmu`: one subcommand per pipeline."""

from __future__ import annotations

import importlib
import logging
import os
import select
import sys
import warnings

# Two processes with two spinning threads each on two cores run ten times slower than with one thread each. Set
# before torch is imported; the user's values take precedence.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# DeepSpeed warns of a machine without GPUs whenever it is imported, and peft imports it
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

COMMANDS = {
    "quickstart": "unlearn with the built-in example: six of sixty fictitious people",
    "unlearn": "make a model forget some rows and keep the rest",
    "train": "fit a target or a retrained model on a data set",
    "evaluate": "compare models: metrics, probes, attacks",
    "sweep": "tune a method's options by an explicit rule",
    "benchmark": "compare methods at equal compute: methods x splits x seeds",
    "requests": "take in, work off and prove requests to forget",
    "submit": "run a command as a job on a Ray cluster",
    "plan": "estimate memory, time and cost of an unlearn run",
    "runs": "list what is in the storage, and how far it got",
    "show": "print the results of a run",
    "report": "print the path of a report; --open shows it in a browser",
    "metrics": "metrics from evaluation logs of other programs",
    "schema": "print a JSON schema of a command's configuration, for editors",
    "completion": "print a script that completes commands and options in bash, zsh or fish",
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status is 0 on success, 2 on a user's mistake and 1 on a failure.

    As of other programs it is 130 after Ctrl-C, and 141 if the reader of a pipe (`| head`) has seen enough.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not sys.warnoptions:  # theirs are for programmers; -W or PYTHONWARNINGS shows them
        warnings.filterwarnings("ignore", module="transformers|peft")
    try:
        try:
            return _called(words)
        finally:
            sys.stdout.flush()  # what is left for the interpreter's end cannot be caught
    except KeyboardInterrupt:  # commands say more themselves, once they are imported
        print("\nofmu: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more: a connection may break, too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _called(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("usage: ofmu COMMAND [--config FILE] [--section.option VALUE ...]\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\nofmu COMMAND --help shows a command's options; --print_config prints the configuration as YAML.")
        return 0 if words else 2
    if words[0] == "--version":
        from ofmu_ray import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        from ofmu_ray.config import close_match

        hint = close_match(words[0], COMMANDS)
        print(f"ofmu: error: unknown command {words[0]!r}.{hint} Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if words[0] == "quickstart":
        words = ["unlearn", "--config", "quickstart", *words[1:]]
    if words[0] in ("runs", "show", "report"):
        from pipelines import past

        return past.main(words[1:], words[0])
    if words[0] in ("schema", "completion"):
        from pipelines import editors

        return editors.main(words[1:], words[0], COMMANDS)
    status: int = importlib.import_module(f"pipelines.{words[0]}").main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
