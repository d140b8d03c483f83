"""Evaluation as runs use it: which rows, which models, which metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import DataConfig, EvaluationConfig, FormatConfig, ModelConfig, SourceConfig, UnlearnConfig
from ofmu_ray.errors import UserError
from ofmu_ray.evaluation.sample import RowSample, metrics_of
from ofmu_ray.models.source import model_source
from ofmu_ray.storage import PathLike, join

if TYPE_CHECKING:
    from ofmu_ray.config.evaluate import EvaluateConfig

CHOICE_SETS = ("forget_choice", "retain_choice")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with one of these files contains a tokenizer."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on the rows of a configuration; results are cached under <storage>/cache.

    Rows are read and checked on construction, before any worker starts.
    """

    evaluation: EvaluationConfig
    data: DataConfig
    tokenizer: str
    """Folder or hub name."""
    cache: PathLike
    seed: int = 0
    """Seed of the intervals."""
    reveal_text: bool = False
    trust_remote_code: bool = False
    sets: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    own_tokenizers: bool = False
    """Evaluate a model that has a tokenizer with its own one, the others with `tokenizer`."""
    sample: RowSample | None = None
    """If `sets` are a sample of larger sets: the names of its rows there."""
    models: tuple[str, ...] = ()
    """The models that are compared with one another, for the number format of all."""
    exported: str = "auto"
    """The type that the run writes its model in (export.dtype)."""

    @classmethod
    def of(cls, config: UnlearnConfig, storage: PathLike) -> Evaluator:
        """The evaluation at the end of a run."""
        return cls(
            config.evaluation,
            config.data,
            config.model.tokenizer or config.model.path,
            join(storage, "cache"),
            config.seed,
            config.report.reveal_text,
            config.model.trust_remote_code,
            sets=read_sets(config.evaluation, config.data, config.model) if config.evaluation.enabled else {},
            models=tuple(filter(None, (config.model.path, config.evaluation.retrained))),
            exported=config.export.dtype,
        )

    @classmethod
    def of_many(cls, config: EvaluateConfig, storage: PathLike) -> Evaluator:
        """The evaluation of models side by side, each with its own tokenizer if it has one.

        Raises:
            UserError: no model has a tokenizer, one is an image classifier, or the rows are unusable.
        """
        for label, path in config.compared.items():
            _refuse_classifier(path, config.option(label))
        tokenizer = config.tokenizer or next(filter(has_tokenizer, config.models.values()), None)
        if tokenizer is None:
            raise UserError(
                "tokenizer: none of the models comes with one; name a folder or a hub name with --tokenizer"
            )
        reader = ModelConfig(path=tokenizer, trust_remote_code=config.trust_remote_code)
        return cls(
            config.evaluation,
            config.data,
            tokenizer,
            join(storage, "cache"),
            config.seed,
            config.report.reveal_text,
            config.trust_remote_code,
            sets=read_sets(config.evaluation, config.data, reader),
            own_tokenizers=config.tokenizer is None,
            models=tuple(config.compared.values()),
        )

    def table(self, model: str | None, label: str) -> Any:
        """Per-row values of a model as a pyarrow Table; None without a model, or if evaluation is off."""
        if model is None or not self.evaluation.enabled:
            return None
        from ofmu_ray.evaluation.runner import evaluate_model

        table = evaluate_model(
            resolve_builtin(model),
            resolve_builtin(self.tokenizer_of(model)),
            self.sets,
            self.row_format,
            self.evaluation,
            self.cache,
            label=label,
            reveal_text=self.reveal_text,
            dtype=self.dtype(model),
            trust_remote_code=self.trust_remote_code,
        )
        return table if self.sample is None else self.sample.named(table)

    def stored(self, model: str) -> Any:
        """`table` of a model if the cache has all of it, else None. Runs nothing."""
        from ofmu_ray.evaluation.runner import stored_table

        table = stored_table(*self._store(model), reveal_text=self.reveal_text)
        return table if table is None or self.sample is None else self.sample.named(table)

    def store(self, model: str, table: Any) -> None:
        """Keep the table of a model that was evaluated in memory, as if `table` had made it."""
        from ofmu_ray.evaluation.runner import store_table

        assert self.sample is None, "the rows of a sample have other names in the cache"
        store_table(table, *self._store(model))

    def _store(self, model: str) -> Any:
        from ofmu_ray.evaluation.runner import Store

        loading = self.loading(model)
        store = Store.of(self.cache, resolve_builtin(model), loading)
        return store, loading.template, self.sets, self.row_format, self.evaluation

    def live_table(self, module: Any, tokenizer: Any, label: str) -> Any:
        """The same for a model in memory. On a CPU it is converted to fp32, like an exported model on loading."""
        from ofmu_ray.evaluation.runner import evaluate_live

        module = module.get_base_model() if hasattr(module, "get_base_model") else module
        if next(module.parameters()).device.type == "cpu":
            module = module.float()
        table = evaluate_live(
            module, tokenizer, self.sets, self.row_format, self.evaluation, label=label, reveal_text=self.reveal_text
        )
        return table if self.sample is None else self.sample.named(table)

    def shared_table(self, module: Any, tokenizer: Any, label: str) -> Any:
        """`table` for a model that all ranks of the process group hold together, on every rank. Collective.

        The model is neither copied nor converted.
        """
        import torch.distributed as dist

        from ofmu_ray.evaluation.runner import evaluate_live
        from ofmu_ray.models.answers import unwrapped

        table = evaluate_live(
            unwrapped(module),
            tokenizer,
            self.sets,
            self.row_format,
            self.evaluation,
            label=label,
            reveal_text=self.reveal_text,
            together=dist.is_initialized() and dist.get_world_size() > 1,
        )
        return table if self.sample is None else self.sample.named(table)

    def dtype(self, model: str) -> Any:
        """The type (torch) that the weights of a model are loaded in: evaluation.dtype, the same for all `models`.

        auto: fp32 on CPUs; on GPUs the widest type that one of them is stored in.
        """
        import torch

        from ofmu_ray.cluster.map_tasks import device_kind
        from ofmu_ray.models.exporting import DTYPES, widest_type

        asked = "fp32" if self.evaluation.dtype == "auto" and device_kind() == "cpu" else self.evaluation.dtype
        if asked != "auto":
            return DTYPES[asked]
        stored = widest_type(dict.fromkeys((*self.models, model)))
        return torch.promote_types(stored, DTYPES.get(self.exported, stored))

    def in_type(self, name: Literal["fp32", "bf16"]) -> Evaluator:
        """A copy that loads all models in this type: that of a model in memory."""
        return replace(self, evaluation=replace(self.evaluation, dtype=name))

    def sampled(self, rows: int | None, evaluation: EvaluationConfig, seed: int) -> Evaluator:
        """A copy for `rows` rows of each set, evenly spread (None: all), with these options."""
        sample = RowSample.of(self.sets, rows)
        return replace(self, evaluation=evaluation, seed=seed, sets=sample.sets, sample=sample)

    def tokenizer_of(self, model: str) -> str:
        """Folder or hub name of the tokenizer for evaluating this model; a hub model has its own."""
        return model if self.own_tokenizers and has_tokenizer(model) else self.tokenizer

    def tokenizers(self) -> int:
        """How many different tokenizers `models` have."""
        return len({self.loading(path).template.fingerprint() for path in self.models})

    @property
    def row_format(self) -> FormatConfig:
        """How the rows of `sets` become tokens; their columns are already renamed."""
        return replace(self.data.format, question="question", answer="answer")

    def model_config(self, model: str) -> Any:
        """The text part of the model's configuration (transformers)."""
        from ofmu_ray.models.loading import read_config

        return read_config(model, "model", trust_remote_code=self.trust_remote_code).get_text_config()

    def check_fits(self, model: str, option: str) -> None:
        """Check that the model knows the rows' tokens and has positions for them.

        Raises:
            UserError: it does not; names `option`.
        """
        from ofmu_ray.data.muse_sets import MUSE_SETS
        from ofmu_ray.evaluation.layouts import row_tokens
        from ofmu_ray.evaluation.rows import evaluation_rows

        template, shape = self.loading(model).template, self.model_config(model)
        known, positions = shape.vocab_size, getattr(shape, "max_position_embeddings", None) or math.inf
        if len(template.tokenizer) <= known and self.row_format.max_length <= positions:
            return
        for name, content in self.sets.items():
            if name in (*CHOICE_SETS, *MUSE_SETS):  # what reads these cuts or refuses them
                continue
            rows = evaluation_rows(name, content, self.row_format)
            encoded = [text.input_ids for tokens in row_tokens(rows, template) for text in tokens.texts]
            largest, longest = max(map(max, encoded)), max(map(len, encoded))
            if largest >= known:
                raise UserError(
                    f"{option} = {model!r}: it knows {known} tokens, but the rows of {name} have token number "
                    f"{largest} with the tokenizer {self.tokenizer_of(model)!r}; put the model's own tokenizer into "
                    "its folder, or drop the option tokenizer"
                )
            if longest > positions:
                raise UserError(
                    f"{option} = {model!r}: it has {positions} positions, but the longest text of {name} has {longest} "
                    f"tokens: set --data.format.max_length {positions}"
                )

    def loading(self, model: str) -> Any:
        """How a process loads a model (ofmu_ray.evaluation.actors.Loading)."""
        from ofmu_ray.evaluation.runner import loading_of

        return loading_of(
            resolve_builtin(model),
            resolve_builtin(self.tokenizer_of(model)),
            self.row_format,
            max_new_tokens=self.evaluation.max_new_tokens,
            dtype=self.dtype(model),
            device_map=self.evaluation.device_map,
            trust_remote_code=self.trust_remote_code,
        )

    def texts(self) -> dict[str, tuple[str, str]]:
        """Question and answer by row id; forget rows only if the report may reveal them."""
        from ofmu_ray.evaluation.rows import is_private

        return {
            f"{name}-{index}": (row["question"], row["answer"])
            for name, rows in self.sets.items()
            if self.reveal_text or not is_private(name)
            for index, row in enumerate(rows)
        }

    def metrics(self, table: Any, retrained: Any) -> dict[str, Any] | None:
        """Metrics of a model, each {"value", "low", "high", "n"} or {"value": null, "reason"}; None without a table."""
        return metrics_of(table, retrained, self.sample, self.evaluation.bootstrap_samples, self.seed)

    def words(self, table: Any, measured: Mapping[str, Any], target: Any, retrained: Any) -> dict[str, Any]:
        """Of a model with these metrics: whether it is `degenerate`, and sentences on `generations` and `forgetting`.

        None where nothing is known. Tables: None if missing.
        """
        from ofmu_ray.metrics.degeneration import failed_measures
        from ofmu_ray.metrics.fronts import plain
        from ofmu_ray.metrics.generations import damaged_words, sound_generations
        from ofmu_ray.metrics.tofu import forgetting_words

        samples = self.evaluation.bootstrap_samples
        sound = sound_generations(target, retrained, bootstrap_samples=samples, seed=self.seed)
        failed = failed_measures(plain(measured), sound)
        return {
            "degenerate": None if failed is None else bool(failed),
            "generations": None if table is None else damaged_words(table, retrained, failed),
            "forgetting": forgetting_words(measured.get("forget_quality")),
        }

    def verdict(self, tables: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
        """OpenUnlearning's aggregate of the unlearned model, and whether its answers to forget prompts are degenerate.

        `tables` and `metrics`: by before, after and retrained; None if missing.
        """
        from ofmu_ray.metrics.aggregate import aggregate_inputs, aggregate_metrics

        before, after, retrained = (tables.get(name) for name in ("before", "after", "retrained"))
        verdict: dict[str, Any] = {"run": self.words(after, metrics.get("after") or {}, before, retrained)}
        if after is not None:
            model, target, reference = (aggregate_inputs(table) for table in (after, before, retrained))
            aggregate = aggregate_metrics(model, target, reference)
            verdict["aggregate"] = {name: metric.to_json() for name, metric in aggregate.items()}
        return verdict


def _refuse_classifier(path: str, option: str) -> None:
    """Raise UserError if `path` is a folder with an image classifier, before a tokenizer is asked for."""
    config = Path(resolve_builtin(path)) / "config.json"
    kinds = json.loads(config.read_text()).get("architectures") or () if config.is_file() else ()
    if any("ImageClassification" in kind for kind in kinds):
        raise UserError(f"{option} = {path!r} is an image classifier: set --task image_classification")


def has_tokenizer(model: str) -> bool:
    """Whether a model comes with a tokenizer; assumed for a model on the hub."""
    folder = Path(model_source(model, "model"))
    return not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES)


def read_sets(evaluation: EvaluationConfig, data: DataConfig, model: ModelConfig) -> dict[str, list[dict[str, Any]]]:
    """The checked rows of every set in the configuration; the model's tokenizer cuts documents into passages.

    Raises:
        UserError: a missing file, or unusable rows, with all problems of a file.
    """
    from ofmu_ray.data.evaluation_rows import evaluation_rows
    from ofmu_ray.data.muse_sets import muse_sets

    @cache
    def layout() -> Any:
        from ofmu_ray.data.windows import TextLayout
        from ofmu_ray.models.loading import load_tokenizer

        return TextLayout(load_tokenizer(model), data.format)

    sets, limit, question, own = evaluation.sets, evaluation.max_rows, data.format.question, data.sources
    sources: dict[str, tuple[str, str | SourceConfig | None, str]] = {
        name: (f"evaluation.sets.{name}", rows, question) if rows else (f"data.{name}", fallback, question)
        for name, rows, fallback in (("forget", sets.forget, own["forget"]), ("retain", sets.retain, own["retain"]))
    }
    for name in ("real_authors", "world_facts", "holdout"):
        sources[name] = f"evaluation.sets.{name}", getattr(sets, name), question
    for probe in sets.probes if isinstance(sets.probes, list) else ():
        for side in ("forget", "retain"):
            option = f"evaluation.sets.probes.{probe.name}.{side}"
            sources[f"{probe.name}_{side}"] = option, getattr(probe, side), probe.question
    clusters = evaluation.clusters if isinstance(evaluation.clusters, dict) else {}
    return (
        _choice_sets(evaluation, data.root)
        | muse_sets(sets, data.root, limit)
        | {
            name: evaluation_rows(
                source,
                data.root,
                limit,
                name=name,
                option=option,
                fmt=replace(data.format, question=column),
                cluster=clusters.get(name),
                kind=data.kind(name) if option == f"data.{name}" else None,
                layout=layout,
            )
            for name, (option, source, column) in sources.items()
            if source is not None
        }
    )


def _choice_sets(evaluation: EvaluationConfig, root: str | None) -> dict[str, list[dict[str, Any]]]:
    """The multiple-choice questions of the configuration: {choice, question, answer, kind}."""
    from ofmu_ray.data.choices import choice_rows
    from ofmu_ray.evaluation.sample import spread

    sets = {}
    for name in CHOICE_SETS:
        path = getattr(evaluation.sets, name)
        if path is not None:
            rows = choice_rows(SourceConfig(path=path), root, name=name, option=f"evaluation.sets.{name}")
            chosen = [rows[index] for index in spread(len(rows), evaluation.max_rows)]
            if len({row.cluster for row in chosen}) == 1:  # one subject: its rows are resampled one by one
                chosen = [replace(row, cluster=None) for row in chosen]
            sets[name] = [
                {
                    "row_id": row.row_id,
                    "question": row.question,
                    "answer": row.choices[row.answer],
                    "kind": evaluation.sets.choice_scoring,
                    "choice": asdict(row),
                }
                for row in chosen
            ]
    return sets
