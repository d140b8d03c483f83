"""Peak memory of a rank while a model loads (whole on every rank first, or each tensor straight to its place), and
while it is exported.

    OMP_NUM_THREADS=1 python benchmarks/loading.py [--ranks 2 4] [--model runs/smollm2] [--out benchmarks/loading.json]
    python benchmarks/loading.py --shape 70b --ranks 64      # what each rank would read and hold; loads nothing

A Llama of SmolLM2-135M's shape with random weights, or `--model`, on gloo ranks. A peak is what loading and building
the engine, or the export, adds to what the process had before (VmHWM, reset in between). The bound of loading: the
rank's part of weights, masters and gradients, and the largest tensor, plus 10 %, plus what a tiny model takes. That of
the export, beside the rank's part: one file (`--max-shard-size`, or the largest tensor if that is more) and the largest
tensor, plus the same. gloo gathers a tensor into a second buffer, so ranks that write nothing hold two tensors as well.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import itertools
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ofmu_ray.config import ExportConfig, ModelConfig
from ofmu_ray.config.plan import parsed_bytes
from ofmu_ray.models.weights import return_freed_memory

MIB = 2**20
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


def of_process(name: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def engine_of(config: ModelConfig, stage: int, way: str) -> tuple[Any, int | None]:
    """The engine, and the bytes that it read of the files (None: transformers read them)."""
    from ofmu_ray.engines import DeepSpeedEngine

    options: dict[str, Any] = {"zero_stage": stage, "precision": config.precision}
    if way == "whole":
        from ofmu_ray.tasks.causal_lm import TASK

        return DeepSpeedEngine(TASK.load(config)[0], **options), None
    from ofmu_ray.models.unread import load_unread

    result = load_unread(config)
    assert not isinstance(result, str), result
    module, unread = result
    return DeepSpeedEngine(module, unread=unread, **options), unread.bytes_read


@contextmanager
def added(figures: dict[str, Any], name: str) -> Iterator[None]:
    """The MiB by which the block raises this process's peak above what was resident before."""
    gc.collect()
    return_freed_memory()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here
    before = of_process("VmRSS")
    yield
    figures[name] = (of_process("VmHWM") - before) / MIB


def run_once(config: ModelConfig, stage: int, way: str, shard_size: str, folder: Path) -> dict[str, Any]:
    """Load and export; `config`'s processor is not read: the weights alone count."""
    from ofmu_ray.models.exporting import export_causal_lm
    from ofmu_ray.storage import new_folder

    figures: dict[str, Any] = {}
    with added(figures, "load_mib"):
        engine, read = engine_of(config, stage, way)
    figures["read_mib"] = None if read is None else read / MIB
    weights, options = engine.readable_weights(), ExportConfig(max_shard_size=shard_size)
    with added(figures, "export_mib"), new_folder(folder) if dist.get_rank() == 0 else nullcontext() as target:
        export_causal_lm(engine.module, NoProcessor(), weights, target, config, options)
    dist.barrier()
    engine.close()
    return figures


class NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def rank_main(
    rank: int, world: int, port: int, config: ModelConfig, stage: int, way: str, shard_size: str, out: str
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["DS_ACCELERATOR"] = "cpu"
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=datetime.timedelta(seconds=600))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    tiny = ModelConfig(path=f"{config.path}-tiny", tokenizer=config.tokenizer, precision=config.precision)
    run_once(tiny, stage, way, shard_size, Path(f"{out}-first"))  # imports, and buffers of the process group
    constant = run_once(tiny, stage, way, shard_size, Path(f"{out}-tiny"))
    figures = run_once(config, stage, way, shard_size, Path(f"{out}-model"))
    figures |= {f"tiny_{name}": constant[name] for name in ("load_mib", "export_mib")}
    Path(f"{out}.{rank}").write_text(json.dumps({"rank": rank} | figures))
    dist.barrier()
    dist.destroy_process_group()


def model_of(shape: str, device: str) -> Any:
    import transformers

    with torch.device(device):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape]))


def measured(config: ModelConfig, stage: int, way: str, shard_size: str, ranks: int) -> list[dict[str, Any]]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = str(Path(folder, "figures"))
        torch.multiprocessing.start_processes(
            rank_main, (ranks, port, config, stage, way, shard_size, out), ranks, start_method="spawn"
        )
        return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def shard(sizes: list[int], stage: int, ranks: int, wide: int) -> float:
    """Bytes of a rank's weights (`wide` bytes an element), fp32 masters and gradients once the engine is built."""
    numel = sum(sizes)
    if stage == 0:  # with fp32 weights these are the masters, and one buffer has the gradients
        return numel * (2 * wide if wide == 4 else 2 * wide + 8)
    return numel * wide / (ranks if stage == 3 else 1) + numel * 8 / ranks


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = arguments.shape or "135m"
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name, of in (("model", shape), ("model-tiny", "tiny")):
            if name == "model" and arguments.model:
                Path(root, name).symlink_to(arguments.model.resolve())
            else:
                model_of(of, "cpu").to(getattr(torch, arguments.stored)).save_pretrained(Path(root, name))
        wide = 2 if arguments.precision == "bf16" else 4
        sizes = [parameter.numel() for parameter in model_of(shape, "meta").parameters()]
        largest = max(sizes) * wide / MIB
        file = max(parsed_bytes(arguments.max_shard_size) / MIB, largest)  # a tensor is in one file
        config = ModelConfig(
            path=str(Path(root, "model")), tokenizer="builtin:people/target", precision=arguments.precision
        )
        for ranks, stage, way in itertools.product(arguments.ranks, arguments.stages, arguments.ways):
            own = shard(sizes, stage, ranks, wide) / MIB
            for figures in measured(config, stage, way, arguments.max_shard_size, ranks):
                figures["load_bound_mib"] = 1.1 * (own + largest) + figures["tiny_load_mib"]
                figures["export_bound_mib"] = 1.1 * (file + largest) + figures["tiny_export_mib"]
                rows.append({"ranks": ranks, "zero_stage": stage, "way": way} | figures)
                print({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    about = {"shape": shape, "parameters": sum(sizes), "largest_tensor_mib": largest, "largest_file_mib": file}
    return about | {"stored": arguments.stored, "precision": arguments.precision, "rows": rows}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown; of the ranks, the highest peaks."""
    yield "| ranks | stage | loaded | MiB read by a rank | load: peak | bound | export: peak | bound |"
    yield "|" + "---|" * 8
    for (ranks, stage, way), of in itertools.groupby(rows, lambda row: (row["ranks"], row["zero_stage"], row["way"])):
        most = functools.reduce(lambda a, b: {key: max(a[key], b[key]) for key in a}, of)
        cells = [most["read_mib"], *(most[f"{phase}{of}_mib"] for phase in ("load", "export") for of in ("", "_bound"))]
        yield f"| {ranks} | {stage} | {way} | " + " | ".join("all" if c is None else f"{c:.0f}" for c in cells) + " |"


def computed(shape: str, ranks: int, stored_bytes: int = 2) -> dict[str, Any]:
    """What each rank of a ZeRO-3 run would read, hold and write, from the functions that decide it: nothing is loaded.

    `stored_bytes`: of an element in the files, bf16 by default, trained with precision bf16.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    from ofmu_ray.engines.deepspeed_engine import PERSISTENT_BELOW
    from ofmu_ray.models.stored import share

    model = model_of(shape, "meta").bfloat16()
    sizes = [parameter.numel() for parameter in model.parameters()]
    weights = model.state_dict()
    split = split_torch_state_dict_into_shards(weights, max_shard_size=ExportConfig().max_shard_size)
    files = [sum(weights[name].nbytes for name in names) for names in split.filename_to_tensors.values()]
    small = sum(size for size in sizes if size <= PERSISTENT_BELOW)
    elements = []
    for rank in range(ranks):
        spans = [share(size, rank, ranks) for size in sizes]
        elements.append(sum(stop - start for start, stop in spans))
    assert sum(elements) == sum(sizes), "ranks together read every element once"
    gb = 1e-9
    return {
        "shape": shape,
        "ranks": ranks,
        "parameters": sum(sizes),
        "whole_gb": sum(sizes) * stored_bytes * gb,
        "read_by_a_rank_gb": [min(elements) * stored_bytes * gb, max(elements) * stored_bytes * gb],
        "read_by_a_node_of_8_gb": sum(elements[:8]) * stored_bytes * gb,
        "bf16_weights_of_a_rank_gb": (max(elements) + small) * 2 * gb,
        "fp32_masters_of_a_rank_gb": max(elements) * 4 * gb,
        "largest_tensor_gb": max(sizes) * 2 * gb,
        "written_gb": sum(files) * gb,  # by rank 0, one file at a time
        "files": len(files),
        "largest_file_gb": max(files) * gb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=["whole", "cut"], choices=["whole", "cut"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--stored", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--model", type=Path, help="a folder with a model of this shape, instead of random weights")
    parser.add_argument("--max-shard-size", default="100MB", help="of the export's files")
    parser.add_argument("--shape", choices=SHAPES, help="8b and 70b are computed, not loaded")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.shape in ("8b", "70b"):
        result = computed(arguments.shape, *arguments.ranks)
        print(json.dumps(result, indent=2))
    else:
        result = measure(arguments)
        print("\n".join(table(result["rows"])))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
