"""`ofmu submit COMMAND`: run another command as a job on a Ray cluster, through the dashboard's address.

It prints the equivalent `ray job submit` command line and does more: it checks the configuration before the upload,
derives the submission id from the configuration, so the same command finds the running job, and returns the
pipeline's exit status.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofmu_ray.commandline.parse import fail, parse
from ofmu_ray.commandline.terminal import say
from ofmu_ray.config import BenchmarkConfig, TrainConfig, UnlearnConfig, close_match, config_hash
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.config.submit import SubmitConfig
from ofmu_ray.config.sweep import SweepConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.preflight import check_job_storage
from ofmu_ray.storage import without_credentials

if TYPE_CHECKING:
    from ofmu_ray.cluster.job_server import Jobs

PROG = "ofmu submit"
JOBS: dict[str, type[Any]] = {
    "unlearn": UnlearnConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "benchmark": BenchmarkConfig,
}
OWN = {field.name for field in dataclasses.fields(SubmitConfig)}
SECRET = re.compile(r"://[^/@\s]*@|[?&][^=&]*(key|secret|token|password|signature)[^=&]*=", re.IGNORECASE)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is the job's (0, 1, 2); 0 after --no-follow, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        own, command, options = split(words)
        config = parse(SubmitConfig, own, PROG)
        if command is not None:
            return submit(config, command, options)
        return _control(config)
    except UserError as error:
        return fail(error, PROG)


def split(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Submit's options, the command, and the command's options (all others).

    Raises:
        UserError: the first word that is not an option of submit is not a command that can be submitted.
    """
    own: list[str] = []
    command: str | None = None
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word == "--" and command is not None:
            return own, command, rest + queue
        if word.startswith("--") and name in ("follow", "no_follow") and not equals:
            own += ["--follow", str(name == "follow").lower()]
        elif word.startswith("--") and name in OWN:
            own += [f"--{name}", word.partition("=")[2]] if equals else [f"--{name}", *queue[:1]]
            queue = queue if equals else queue[1:]
        elif command is None and not word.startswith("-"):
            if word not in JOBS:
                known = ", ".join(JOBS)
                raise UserError(
                    f"{word!r} cannot be submitted.{close_match(word, JOBS)} Give COMMAND first, one of: {known}"
                )
            command = word
        elif command is None and word not in ("-h", "--help"):
            raise UserError(f"unknown option {word}; the command's options follow it: {PROG} COMMAND {word} ...")
        else:
            (own if command is None else rest).append(word)
    return own, command, rest


def submit(config: SubmitConfig, command: str, options: list[str]) -> int:
    """Check, upload, start (or find running), follow.

    Raises:
        UserError: the command's configuration is wrong or does not reach the cluster, or no cluster responds.
    """
    from ofmu_ray.cluster.upload import load_environment, packed

    if config.attach or config.status or config.stop:
        raise UserError("attach, status and stop take a submission id and no COMMAND")
    digest = check(command, options)
    options, needed = _placed(options, Path(config.working_dir))
    environment = load_environment(config)
    entrypoint = shlex.join(["python", "-m", f"pipelines.{command}", *options])
    jobs = _jobs(config)
    with packed(config, environment, needed) as package:
        running, submission = jobs.find(f"ofmu-{command}-{digest[:8]}")
        if running:
            say(f"job     {submission} with this configuration is already running; nothing uploaded")
        else:
            say(f"upload  {package.files} files, {package.megabytes:.1f} MB")
            say(f"$ {plain_command(config, submission, entrypoint)}")
            jobs.start(submission, entrypoint, environment | {"working_dir": str(package.path)})
            say(f"job     {submission}")
    if config.follow:
        return jobs.follow(submission)
    say(jobs.hints(submission))
    return 0


def check(command: str, options: list[str]) -> str:
    """Check the command's configuration, which must write outside the job's folder; returns its digest.

    Raises:
        UserError: an option is wrong, `storage` is not absolute, or a word contains credentials.
    """
    for word in options:
        if SECRET.search(word):
            raise UserError(
                f"{without_credentials(word)}: a job's command line is visible in its log and on the dashboard; put "
                "credentials into a configuration file, or into the environment of the cluster's nodes"
            )
    parsed = parse(JOBS[command], options, f"ofmu {command}")
    check_job_storage(parsed.storage)
    return config_hash(parsed, command, ignore=())


def _placed(options: list[str], working_dir: Path) -> tuple[list[str], list[str]]:
    """The options with configuration files relative to the working directory, and these files' names in it.

    Raises:
        UserError: a file is outside and would not be uploaded.
    """
    placed, names = list(options), []
    root = working_dir.resolve()
    for index, word in enumerate(options):
        previous = options[index - 1] if index else ""
        prefix, path = ("", word) if previous == "--config" else ("--config=", word.removeprefix("--config="))
        if (prefix and not word.startswith(prefix)) or not Path(path).is_file():
            continue
        if not Path(path).resolve().is_relative_to(root):
            raise UserError(
                f"config = {path!r}: outside {str(working_dir)!r}, the uploaded folder; move the file there, or set "
                "another folder with --working-dir"
            )
        names.append(Path(path).resolve().relative_to(root).as_posix())
        placed[index] = prefix + names[-1]
    return placed, names


def plain_command(config: SubmitConfig, submission: str, entrypoint: str) -> str:
    """The equivalent `ray job submit` command line."""
    where = ["--address", without_credentials(config.address), "--submission-id", submission]
    what = ["--runtime-env", config.runtime_env, "--working-dir", config.working_dir]
    return f"{shlex.join(['ray', 'job', 'submit', *where, *what, '--'])} {entrypoint}"


def _jobs(config: SubmitConfig) -> Jobs:
    """The job client: progress on stderr, output and status on stdout."""
    from ofmu_ray.cluster.job_server import Jobs

    return Jobs(config.address, tell=say, show=partial(print, end="", flush=True))


def _control(config: SubmitConfig) -> int:
    """Follow, show or stop a submitted job."""
    if config.attach:
        return _jobs(config).follow(config.attach)
    if config.status:
        return _jobs(config).status(config.status)
    if config.stop:
        return _jobs(config).stop(config.stop)
    raise UserError(f"give a COMMAND ({', '.join(JOBS)}), or a job with --attach, --status or --stop")


if __name__ == "__main__":
    sys.exit(main())
