"""A plan as a readable table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text; `plan` as pipelines/plan.py describes it."""
    model, setup, memory = plan["model"], plan["setup"], plan["memory"]
    yield f"model    {model['path']}: {_count(model['parameters'])} parameters, {_count(model['trainable'])} trained"
    yield "rows     " + ", ".join(
        f"{stream} {rows['mean']:.0f} tokens on average, {rows['longest']} at most"
        for stream, rows in plan["rows"].items()
    )
    yield (
        f"set-up   {'proposed' if plan['proposed'] else 'as configured'}: {setup['workers']} worker(s), ZeRO stage "
        f"{setup['zero_stage']}, micro-batch {setup['micro_batch_size']} x {setup['micro_batches']}, offload "
        f"{setup['offload']}, checkpointing {'on' if setup['gradient_checkpointing'] else 'off'}, "
        f"{'LoRA rank ' + str(setup['lora']['rank']) if setup['lora'] else 'all weights'}"
    )
    if plan["proposed"]:
        yield f"         {' '.join(plan['options'])}"
    yield ""
    yield f"memory of one worker at its peak ({memory['phase']})"
    for name, size in sorted(memory["components"].items(), key=lambda item: -item[1]):
        yield f"  {name:28} {_bytes(size):>10}  {size / memory['peak_bytes']:4.0%}"
    fits = f" of {_bytes(memory['usable_bytes'])} usable" if memory["usable_bytes"] else ""
    yield f"  {'total':28} {_bytes(memory['peak_bytes']):>10}{fits}"
    yield ""
    loading, export = plan["loading"], plan["export"]
    yield (
        f"loading  {_bytes(loading['read_bytes_per_rank'])} read by each worker of {_bytes(loading['model_bytes'])}, "
        f"{_bytes(loading['peak_bytes'])} of memory at most"
    )
    if loading["whole"] is not None:
        yield f"         each worker loads the whole model before it is cut: {loading['whole']}"
    yield f"export   {_bytes(export['written_bytes'])} written, {_bytes(export['held_bytes'])} of host memory at a time"
    yield ""
    one, run = plan["round"], plan["run"]
    yield f"{'':30} {'round':>12} {'run':>12}   ({run['rounds']} rounds)"
    for kind in ("forget", "retain"):
        passes = one["gradient_passes"][kind], run["gradient_passes"][kind]
        yield f"  {kind + ' gradient passes':28} {passes[0]:>12} {passes[1]:>12}"
    ran = ", ".join(f"{count} in {name}" for name, count in sorted(one["precisions"].items()))
    yield f"  {'passes by precision':28} {'':>12} {'':>12}   {ran} a round"
    yield f"  {'tokens':28} {_count(one['tokens']):>12} {_count(run['tokens']):>12}"
    yield f"  {'FLOPs (6 x parameters)':28} {one['flops']:>12.2e} {run['flops']:>12.2e}"
    sent = one["sent_bytes_per_rank"]
    yield f"  {'sent by one worker':28} {_bytes(sent):>12} {_bytes(sent * run['rounds']):>12}   over {plan['link']}"
    seconds = one["seconds"]
    if seconds is None:
        yield f"  {'time':28} {'-':>12} {'-':>12}   {one['seconds_missing']}"
        return
    for part in ("passes", "vectors", "communication"):
        yield f"  {part:28} {_time(seconds[part]):>12} {_time(seconds[part] * run['rounds']):>12}"
    yield f"  {'time':28} {_time(seconds['total']):>12} {_time(seconds['run']):>12}"
    if run["cost"] is not None:
        yield f"  {'cost':28} {'':>12} {run['cost']:>12.2f}"


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
