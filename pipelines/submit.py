"""`ofmu submit COMMAND`: another command as a job of a Ray cluster, through the dashboard's address.

What it does beyond `ray job submit`, whose command line it prints: the configuration is checked before the upload, the
submission id follows from the configuration, so that the same command finds the job that is running, and the exit
status is the pipeline's.
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

from ofmu_ray.config import BenchmarkConfig, TrainConfig, UnlearnConfig, close_match, config_hash
from ofmu_ray.config.evaluate import EvaluateConfig
from ofmu_ray.config.submit import SubmitConfig
from ofmu_ray.config.sweep import SweepConfig
from ofmu_ray.errors import UserError
from ofmu_ray.runs.preflight import check_job_storage
from ofmu_ray.storage import without_credentials
from pipelines.parse import fail, parse
from pipelines.terminal import say

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
    """Submit's own options, the command, and the command's options: everything that is not submit's own.

    Raises:
        UserError: the first word that is no option of submit is not a command that can be submitted.
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
                raise UserError(f"{word!r} cannot be submitted.{close_match(word, JOBS)} First COMMAND, of: {known}")
            command = word
        elif command is None and word not in ("-h", "--help"):
            raise UserError(f"unknown option {word}; the command's options follow it: {PROG} COMMAND {word} ...")
        else:
            (own if command is None else rest).append(word)
    return own, command, rest


def submit(config: SubmitConfig, command: str, options: list[str]) -> int:
    """Check, upload, start (or find running), follow.

    Raises:
        UserError: the command's configuration is wrong, or would not reach the cluster; no cluster answers.
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
            say(f"job     {submission} has this configuration and is running; nothing was uploaded")
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
    """The digest of the command's configuration, which must be in order and write outside the job's folder.

    Raises:
        UserError: an option is wrong, `storage` is not absolute, or a word holds credentials.
    """
    for word in options:
        if SECRET.search(word):
            raise UserError(
                f"{without_credentials(word)}: a job's command line is shown in its log and on the dashboard; put "
                "credentials into a file of the configuration, or into the environment of the cluster's nodes"
            )
    parsed = parse(JOBS[command], options, f"ofmu {command}")
    check_job_storage(parsed.storage)
    return config_hash(parsed, command, ignore=())


def _placed(options: list[str], working_dir: Path) -> tuple[list[str], list[str]]:
    """The options with configuration files as seen from the working directory, and these files' names in it.

    Raises:
        UserError: a file lies outside, so it would not be uploaded.
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
                f"config = {path!r}: outside {str(working_dir)!r}, the folder that is uploaded; move the file into it, "
                "or name another folder with --working-dir"
            )
        names.append(Path(path).resolve().relative_to(root).as_posix())
        placed[index] = prefix + names[-1]
    return placed, names


def plain_command(config: SubmitConfig, submission: str, entrypoint: str) -> str:
    """The `ray job submit` command line that does the same."""
    where = ["--address", without_credentials(config.address), "--submission-id", submission]
    what = ["--runtime-env", config.runtime_env, "--working-dir", config.working_dir]
    return f"{shlex.join(['ray', 'job', 'submit', *where, *what, '--'])} {entrypoint}"


def _jobs(config: SubmitConfig) -> Jobs:
    """Their progress on stderr, their output and status on stdout."""
    from ofmu_ray.cluster.job_server import Jobs

    return Jobs(config.address, tell=say, show=partial(print, end="", flush=True))


def _control(config: SubmitConfig) -> int:
    """Follow, show or stop a job that was submitted before."""
    if config.attach:
        return _jobs(config).follow(config.attach)
    if config.status:
        return _jobs(config).status(config.status)
    if config.stop:
        return _jobs(config).stop(config.stop)
    raise UserError(f"name a COMMAND ({', '.join(JOBS)}), or a job with --attach, --status or --stop")


if __name__ == "__main__":
    sys.exit(main())
