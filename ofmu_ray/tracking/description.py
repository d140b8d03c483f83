"""What MLflow shows of a finished run besides its numbers: source, data sets, headline, intervals, the model."""

from __future__ import annotations

import csv
import getpass
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ofmu_ray.storage import is_uri

EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""Tag of an experiment that MLflow shows as training runs, not as traces of a language model."""
LONGEST_DIGEST = 36
"""MLflow's limit, in characters."""


def describe(client: Any, run_id: str, summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Complete a run in MLflow; a second call changes nothing.

    `summary`, `manifest`: content of metrics.json and manifest.json. Raises MLflow's errors.
    """
    describe_source(client, run_id, manifest["command"], manifest["code"]["commit"], headline(summary))
    client.log_text(run_id, intervals(summary), "intervals.csv")
    client.log_inputs(run_id, list(_data_sets(manifest["data"]["streams"], run_id)))
    run, digests = summary["run"], manifest["models"].get("unlearned") or {}
    _log_model(client, run_id, manifest["name"], run["model"], run["rounds"], digests)


def describe_fit(client: Any, run_id: str, manifest: Mapping[str, Any], note: str, model: str, steps: int) -> None:
    """Complete a run of `ofmu train` in MLflow; a second call changes nothing.

    `manifest`: with name, command, code and data. Raises MLflow's errors.
    """
    describe_source(client, run_id, manifest["command"], manifest["code"]["commit"], note)
    client.log_inputs(run_id, list(_data_sets(manifest["data"]["streams"], run_id)))
    _log_model(client, run_id, manifest["name"], model, steps, {})


def describe_comparison(
    client: Any, run_id: str, command: str, commit: str | None, metrics: Mapping[str, Any], words: Mapping[str, Any]
) -> None:
    """Complete a run of `ofmu evaluate` in MLflow; a second call changes nothing.

    `metrics`: model -> its metrics; `words`: model -> sentences. Raises MLflow's errors.
    """
    note = "\n\n".join(f"{model}: {sentence}" for model, sentences in words.items() for sentence in sentences)
    describe_source(client, run_id, command, commit, note)
    client.log_text(run_id, intervals(metrics), "intervals.csv")


def describe_words(client: Any, run_id: str, command: str, commit: str | None, text: str) -> None:
    """Complete a run of `ofmu sweep` or `ofmu benchmark`, or one of its trials; a second call changes nothing.

    `text`: what the terminal shows, in columns; empty: nothing yet. Raises MLflow's errors.
    """
    words = text.strip("\n")
    describe_source(client, run_id, command, commit, words and f"```text\n{words}\n```")


def describe_source(client: Any, run_id: str, command: str, commit: str | None, note: str) -> None:
    """Set the tags from which MLflow's page has source, user, commit and description."""
    from mlflow.utils import mlflow_tags as tag

    command = command or "ofmu_ray"
    tags = {
        tag.MLFLOW_SOURCE_NAME: " ".join(command.split()[:2]),  # MLflow's page shows what follows the last slash
        "ofmu.command": command,
        tag.MLFLOW_SOURCE_TYPE: "JOB" if "RAY_JOB_ID" in os.environ else "LOCAL",
        tag.MLFLOW_USER: _user(),
        tag.MLFLOW_GIT_COMMIT: commit,
        tag.MLFLOW_RUN_NOTE: note,
    }
    for name, value in tags.items():
        if value:
            client.set_tag(run_id, name, value)


def _user() -> str | None:
    """The user's name; None: a container runs as a number that its system has no name for."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # until Python 3.12, from 3.13
        return None


def headline(summary: Mapping[str, Any]) -> str:
    """The run's description, in Markdown: how it ended, the metrics that lead, verdicts."""
    from ofmu_ray.metrics import registry  # numpy and pyarrow, which a refused command does not need

    run = summary["run"]
    after = summary.get("after") or {}
    words = [f"`{run['method']}`, {run['rounds']} rounds: {run['status']}"]
    for one in (one for one in registry.metrics() if one.lead):
        value = (after.get(one.name) or {}).get("value")
        words += [] if value is None else [f"{one.noun} {value:.3g}"]
    lines = [" · ".join(words)]
    lines += [text for text in (run["message"], *map(run.get, ("forgetting", "level", "generations"))) if text]
    return "\n\n".join(lines)


def intervals(summary: Mapping[str, Any]) -> str:
    """All metrics with their 95 % intervals, as CSV, which MLflow shows as a table."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["metric", "model", "value", "low", "high", "n", "reason"])
    for model, metrics in summary.items():
        if model not in ("cost", "run"):
            for name, metric in (metrics or {}).items():
                if isinstance(metric, Mapping) and "value" in metric:
                    cells = [metric.get(key) for key in ("value", "low", "high", "n", "reason")]
                    table.writerow([name, model, *cells])
    return out.getvalue()


def _data_sets(streams: Mapping[str, Any], run_id: str) -> Iterator[Any]:
    """What the run read. A few forget rows could be guessed from a digest: theirs is the run's id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for name, stream in streams.items():
        source = stream["source"]
        profile = {key: stream[key] for key in ("rows", "used_rows", "tokens") if key in stream}
        data_set = Dataset(
            name=name,
            digest=run_id if name == "forget" else stream["sha256"][:LONGEST_DIGEST],
            source_type="uri" if is_uri(source) else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
        yield DatasetInput(data_set, [InputTag("mlflow.data.context", name)])


def _log_model(client: Any, run_id: str, name: str, path: str, step: int, digests: Mapping[str, str]) -> None:
    """The model stays where it is: MLflow gets its path and the digests of its files."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    if run.outputs is not None and run.outputs.model_outputs:
        return
    tags = {"ofmu.path": path, **{f"ofmu.sha256.{file}": value for file, value in digests.items()}}
    model = client.create_logged_model(run.info.experiment_id, name=model_name(name), source_run_id=run_id, tags=tags)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])


def model_name(run: str) -> str:
    """A run's name as that of a model: MLflow does not take / : . % and quotes."""
    return "".join("-" if letter in "/:.%\"'" else letter for letter in run)
