"""Evaluations by two gloo ranks that share one model (ZeRO-3), which tests/test_live.py compares with its export's."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from engine_models import token_batch
from evaluation_models import tiny_model, tiny_tokenizer

from ofmu_ray.cluster.watchdog import Watchdog
from ofmu_ray.config import (
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    FormatConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
)
from ofmu_ray.data.choices import ChoiceRow
from ofmu_ray.engines import deepspeed_engine
from ofmu_ray.evaluation.evaluator import Evaluator
from ofmu_ray.evaluation.in_step import InStep
from ofmu_ray.models.answers import unwrapped
from ofmu_ray.models.exporting import export_causal_lm
from ofmu_ray.models.loading import load_causal_lm
from ofmu_ray.storage import new_folder
from ofmu_ray.tasks.causal_lm import TASK
from ofmu_ray.training.live import LiveEvaluation
from ofmu_ray.training.stages import Stages

SGD = OptimizerConfig(name="sgd", lr=0.05, clip=None)
CONFIG = EvaluationConfig(max_new_tokens=8, batch_size=1, bootstrap_samples=20)  # units of four rows


def rows(count: int, wrong: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "question": f"who is person {index}{' or so' * (index % 4)}?",
            "answer": f"the answer is {index}{' long' * (index % 3)}",
            "paraphrased_answer": f"it is {index}",
            "perturbed_answer": [f"the answer is {index + 1 + k}" for k in range(wrong)],
        }
        for index in range(count)
    ]


def choices(count: int) -> list[dict[str, Any]]:
    made = [ChoiceRow(f"c-{i}", f"what is {i}?", ("yes", "no", "long"), i % 3, None) for i in range(count)]
    return [
        {"question": row.question, "answer": row.choices[row.answer], "kind": "letters", "choice": asdict(row)}
        for row in made
    ]


SETS = {
    "forget": rows(6, 3),
    "retain": rows(4),
    "real_authors": rows(3),
    "world_facts": rows(3),
    "holdout": rows(3),
    "forget_choice": choices(3),
}


@dataclass(frozen=True)
class Case:
    """A model that is evaluated before its first step, on the way, and after its export."""

    name: str
    folder: str
    model: str = "llama"
    stored: torch.dtype = torch.float32
    lora: LoraConfig | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def source(self) -> Path:
        return Path(self.folder) / f"{self.name}-in"

    @property
    def exported(self) -> Path:
        return Path(self.folder) / self.name

    @property
    def live(self) -> LiveEvaluation:
        folder = str(Path(self.folder) / f"{self.name}-tables")
        return LiveEvaluation(folder=folder, evaluation=self.evaluator, before=True)

    @property
    def evaluator(self) -> Evaluator:
        cache = Path(self.folder) / "cache"
        data = DataConfig(format=FormatConfig())
        return Evaluator(CONFIG, data, str(self.source), cache, sets=SETS, models=(str(self.source),))


def write_source(case: Case) -> None:
    tiny_model(case.model).to(case.stored).save_pretrained(case.source)
    tiny_tokenizer().save_pretrained(case.source)


def worker_of(engine: Any, module: torch.nn.Module, tokenizer: Any, config: ModelConfig, rank: int) -> Any:
    """What an evaluation needs of a worker, before its first round."""
    return SimpleNamespace(
        task=TASK,
        module=module,
        processor=tokenizer,
        engine=engine,
        job=SimpleNamespace(model=config, export=ExportConfig()),
        watchdog=Watchdog(rank, None, None),
        session=SimpleNamespace(rank=rank, device=torch.device("cpu")),
        state=SimpleNamespace(round=0, status=""),
    )


def evaluations(case: Case, rank: int, world: int) -> dict[str, Any]:
    """What rank 0 knows: tables of the live model, passes of the ranks, and whether the model is as it was."""
    deepspeed_engine.PERSISTENT_BELOW = 0  # shard all parameters of this small model
    if rank == 0:
        write_source(case)
    dist.barrier()
    config = ModelConfig(path=str(case.source), lora=case.lora)
    torch.manual_seed(0)
    module, tokenizer = load_causal_lm(config)
    engine = deepspeed_engine.DeepSpeedEngine(module, zero_stage=3, inner=SGD, outer=SGD)
    worker = worker_of(engine, module, tokenizer, config, rank)
    with counted(module) as passes:
        case.live.begin(worker)
    weights = engine.full_weights()
    stages = Stages(folder="", count=2, evaluation=case.evaluator, live=True)
    series = stages.measure(TASK, engine, module, tokenizer, rank, worker.watchdog)
    again = engine.full_weights()
    same = weights is None or all(torch.equal(value, again[name]) for name, value in weights.items())
    measured = {"passes": passes, "as_it_was": same, "figures": plain(series)}
    measured["in_training_mode"] = module.training
    step(engine, rank)
    measured["whole"] = whole_parameters(module)
    readable = engine.readable_weights()
    with new_folder(case.exported) if rank == 0 else contextlib.nullcontext() as folder:
        export_causal_lm(module, tokenizer, readable, folder, config, ExportConfig())
    worker.state.round = 1
    case.live.end(worker)
    engine.close()
    return measured


def step(engine: Any, rank: int) -> None:
    batch = token_batch([9, 12], seed=rank)
    engine.apply(engine.gradient(batch)[0], "inner")


def plain(series: Any) -> Any:
    """Without numpy's numbers."""
    return json.loads(json.dumps(series))


def whole_parameters(module: torch.nn.Module) -> list[str]:
    """Parameters that this rank holds completely."""
    return [name for name, parameter in module.named_parameters() if parameter.numel()]


@contextlib.contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[dict[str, int]]]:
    """Passes of every rank: all, and those for its own rows."""
    found: list[dict[str, int]] = []
    mine: Counter[str] = Counter()
    hook = unwrapped(module).register_forward_hook(lambda *_: mine.update(all=1))
    leave = InStep.__exit__

    def counting(self: InStep, *error: Any) -> None:
        mine["own"] += self.passes
        leave(self, *error)

    InStep.__exit__ = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        InStep.__exit__ = leave  # type: ignore[method-assign]
        hook.remove()
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    found += map(dict, shares)
