"""Join the cluster and check on its nodes that all of them see the same files."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

from ofmu_ray.cluster.shared_files import SharedFiles, unreadable, why
from ofmu_ray.config import ModelConfig, SourceConfig, TrainingConfig, UnlearnConfig
from ofmu_ray.errors import UserError
from ofmu_ray.storage import PathLike, is_uri, join, read_text, remove_folder, write_text


def join_cluster(training: TrainingConfig, storage: PathLike, paths: Mapping[str, Iterable[str | None]]) -> None:
    """Join or start Ray with room for the workers; with several nodes, check the files on each.

    `paths`: option -> files, folders, URIs or hub names that workers will read. Only paths that exist on this node are
    checked. Nodes that join later are checked when workers start on them (`rendezvous`).

    Raises:
        UserError: no room, or a node does not share the storage, lacks a path, or lacks the network interface.
    """
    from ofmu_ray.cluster.connect import connect
    from ofmu_ray.cluster.nodes import alive, here, on_each

    connect(training.workers, training.cpus_per_worker, training.gpus, training.node_timeout)
    nodes = alive()
    if len(nodes) == 1:
        return
    folder, own = join(storage, f".nodes-{uuid.uuid4().hex[:12]}"), here().address
    try:
        shared = SharedFiles.of(storage, folder, paths)
        answers = on_each(nodes, look, shared, folder, training.network_interface)
        problems = [
            f"node {node.address} {problem}"
            for node, answer in answers.items()
            for problem in ([f"gave no answer: {answer}"] if isinstance(answer, Exception) else answer)
        ]
        problems += [
            f"node {own} cannot read in storage what node {node.address} wrote"
            for node, answer in answers.items()
            if answer == [] and not _reads(join(folder, node.id))
        ]
    finally:
        remove_folder(folder)
    shared.refuse(problems)


def run_paths(config: UnlearnConfig, where: str = "") -> dict[str, list[str | None]]:
    """What the workers of a run read, for `join_cluster`; `where` is a prefix for the options' names."""
    return {
        f"{where}evaluation.retrained": [config.evaluation.retrained],
        **{f"{where}{option}": [path] for option, path in config.method_options.models.items()},
        **model_paths(config.model, where),
        **{
            option: paths
            for name, source in config.data.sources.items()
            for option, paths in source_paths(f"{where}data.{name}", source, config.data.root).items()
        },
    }


def model_paths(model: ModelConfig, where: str = "") -> dict[str, list[str | None]]:
    """The same for a model."""
    return {f"{where}model.path": [model.path], f"{where}model.tokenizer": [model.tokenizer]}


def source_paths(option: str, source: SourceConfig, root: str | None) -> dict[str, list[str | None]]:
    """The same for rows. Globs are expanded where they are read."""
    return {option: [path if root is None or is_uri(path) else join(root, path) for path in source.paths]}


def look(shared: SharedFiles, folder: str, interface: str | None) -> list[str]:
    """Runs on a node: its problems, as text to follow its name. Leaves a file in `folder`."""
    import ray

    from ofmu_ray.cluster.rendezvous import choose_here

    problems = shared.missing_here()
    if not problems:
        try:
            write_text(join(folder, ray.get_runtime_context().get_node_id()), "")
        except (OSError, UserError) as error:
            problems.append(unreadable(why(error)))
    try:
        choose_here(interface)
    except UserError as error:
        problems.append(f"has another network: {error}")
    return problems


def _reads(path: str) -> bool:
    try:
        return read_text(path) == ""
    except OSError:
        return False
