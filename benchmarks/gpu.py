"""The check for whoever has a GPU: tests on CUDA, then what a step costs there, as one JSON file.

    python -m benchmarks.gpu --minutes 9 --out gpu.json        # or: make gpu-check
    python -m benchmarks.gpu --minutes 9 --out gpu.json        # once more: goes on with what is missing
    python -m benchmarks.gpu --out gpu.json --only "1b bf16"   # again, these steps only (--list names all)
    python -m benchmarks.gpu --device cpu --smoke --out /tmp/smoke.json

Needs no network, no data and no Ray. Steps run in order of worth in a process of their own; the file is written after
each part of a step. A step that fails, hangs or kills its process is recorded with the reason, and the next one runs.
docs/gpu.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"tests": 240.0, "rates": 60.0, "evaluation": 150.0}
"""Seconds that a step may take; a cell 150."""
POISONED = 75
"""Exit status of a process whose CUDA context broke: the next step gets a new process."""


# ---------------------------------------------------------------------------------------------- the file of results


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"about": None, "steps": {}}
    return content


def write(out: Path, content: Mapping[str, Any]) -> None:
    new = out.with_name(f"{out.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(out)


def steps(smoke: bool) -> list[str]:
    from benchmarks.gpu_cells import cells

    names = [cell.name for cell in cells(smoke)]
    return ["tests", "rates", *names[:3], "evaluation", *names[3:]]


# --------------------------------------------------------------------------------------------------- the own process


def work(args: argparse.Namespace) -> int:
    """Run the steps that the file lacks, one after the other."""
    import torch

    from benchmarks import gpu_device

    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    content = read(args.out)
    try:
        content["about"] = content["about"] or gpu_device.about(device)
    except Exception as error:
        content["about"] = {"error": repr(error)}
    for name in args.steps:
        if name in content["steps"]:
            continue
        step: dict[str, Any] = {"status": "running", "began": time.time()}
        content["steps"][name] = step
        write(args.out, content)

        def save(result: Mapping[str, Any], step: dict[str, Any] = step) -> None:
            step["result"] = result
            write(args.out, content)

        poisoned = False
        try:
            step["result"] = action_of(name, args, device, content, save)()
            step["status"] = "done"
        except gpu_device.Poisoned as error:
            step |= {"status": "failed", "error": f"the CUDA context broke: {error}"}
            poisoned = True
        except Exception as error:
            step["status"] = "failed"
            try:
                step |= gpu_device.failure(error, device)
            except gpu_device.Poisoned as broken:
                step["error"], poisoned = f"the CUDA context broke: {broken}", True
        step["seconds"] = time.time() - step["began"]
        write(args.out, content)
        if poisoned:
            return POISONED
        gpu_device.free(device)
    return 0


def action_of(
    name: str, args: argparse.Namespace, device: Any, content: Mapping[str, Any], save: Callable[..., None]
) -> Callable[[], dict[str, Any]]:
    from benchmarks import gpu_cells, gpu_device, gpu_steps

    if name == "tests":
        return lambda: run_tests(device.type)
    if name == "rates":
        return lambda: gpu_device.rates(device, args.smoke, save)
    if name == "evaluation":
        return lambda: gpu_steps.evaluation(device, args.smoke, save)
    cell = next(cell for cell in gpu_cells.cells(args.smoke) if cell.name == name)
    rate = content["steps"].get("rates", {}).get("result", {}).get("bf16_flops")
    return lambda: gpu_steps.measure_cell(cell, device, rate, args.smoke, save)


def run_tests(device: str) -> dict[str, Any]:
    """The tests marked `gpu`, in a process of their own: an error of CUDA would break this one."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        words = ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "100", "-o", "addopts="]
        command = [sys.executable, *words, "--junitxml", str(report), str(ROOT / "tests/test_gpu.py")]
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        output = Path(folder, "output.txt")
        with output.open("w") as file:
            running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
            try:
                status: int | None = running.wait(timeout=230)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                status = None
        text = output.read_text(errors="replace")
        found: dict[str, Any] = {"status": status, "device": device, "output": text[-6000:], "tests": []}
        if not report.exists():
            return found
        found["tests"] = [outcome_of(case) for case in ElementTree.parse(report).iter("testcase")]
    for outcome in ("passed", "failed", "skipped"):
        found[outcome] = sum(test["outcome"] == outcome for test in found["tests"])
    return found


def outcome_of(case: ElementTree.Element) -> dict[str, Any]:
    """One test: outcome, seconds, and what it measured (record_property)."""
    test: dict[str, Any] = {"name": case.get("name"), "seconds": float(case.get("time", 0)), "outcome": "passed"}
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            test["outcome"] = "skipped" if child.tag == "skipped" else "failed"
            test["message"] = (child.get("message") or "")[:1000]
            test["text"] = (child.text or "")[-2500:] if child.tag != "skipped" else ""
        for entry in child if child.tag == "properties" else ():
            test.setdefault("measured", {})[entry.get("name")] = entry.get("value")
    return test


# ------------------------------------------------------------------------------------------------------- the watcher


def watch(args: argparse.Namespace, deadline: float) -> None:
    """Start processes for the steps until all are done or the time is over."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out), "--device", args.device]
    words += ["--smoke"] if args.smoke else []
    planning = subprocess.Popen(["nice", *words, "--plan", "--only", *args.steps], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = args.out.with_suffix(".log")
    shown: set[str] = set()
    try:
        while time.time() < deadline and any(name not in read(args.out)["steps"] for name in args.steps):
            known = set(read(args.out)["steps"])
            with log.open("a") as errors:
                command = [*words, "--work", "--only", *args.steps]
                worker = subprocess.Popen(command, cwd=ROOT, stderr=errors, stdout=errors, start_new_session=True)
            reason = None
            while worker.poll() is None and reason is None:
                time.sleep(0.2)
                reason = overdue(read(args.out), deadline)
                tell(args.out, shown)
            if reason is not None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            content = read(args.out)
            for step in content["steps"].values():
                if step["status"] == "running":
                    step["status"] = "failed" if reason is None else "stopped"
                    step["error"] = reason or f"its process ended with status {worker.returncode}: {tail(log)}"
            write(args.out, content)
            tell(args.out, shown)
            if set(content["steps"]) == known:  # the process ended before any step
                print(f"no step could start (status {worker.returncode}): {tail(log)}", flush=True)
                break
        planning.wait(timeout=max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        planning.kill()
        planning.wait()


def overdue(content: Mapping[str, Any], deadline: float) -> str | None:
    """Why the running step must end."""
    for name, step in content["steps"].items():
        limit = LIMITS.get(name, 150.0)
        if step["status"] == "running" and time.time() > min(step["began"] + limit, deadline):
            late = time.time() > deadline
            return "the time was over" if late else f"it did not end in {limit:g} s"
    return "the time was over" if time.time() > deadline else None


def tail(log: Path, size: int = 3000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def tell(out: Path, shown: set[str]) -> None:
    for name, step in read(out)["steps"].items():
        if name not in shown and step["status"] != "running":
            shown.add(name)
            print(f"{name}: {step['status']} {step.get('error', '')[:300]}", flush=True)
            print("\n".join(table(name, step)), flush=True)


def plan(args: argparse.Namespace) -> None:
    """Write the predictions of `ofmu plan` beside the file of results, as they are made."""
    import torch

    from benchmarks.gpu_cells import cells
    from benchmarks.gpu_steps import predictions

    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    place = args.out.with_suffix(".plan.json")
    known: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    wanted = [cell for cell in cells(args.smoke) if cell.name in args.only and cell.name not in known]
    for cell, found in predictions(wanted, name, args.smoke):
        known[cell] = found
        write(place, known)


def merged(out: Path) -> dict[str, Any]:
    """The results with the predictions beside what was measured."""
    content, planned = read(out), out.with_suffix(".plan.json")
    content["plan"] = json.loads(planned.read_text()) if planned.exists() else {}
    compared = content["compared"] = {}
    for name, methods in content["plan"].items():
        measured = content["steps"].get(name, {}).get("result", {}).get("methods", {})
        for method, predicted in methods.items():
            real = measured.get(method, {})
            if real.get("round_seconds") and "seconds" in predicted:
                seconds = predicted["seconds"]["total"] / real["round_seconds"]
                memory = predicted["peak_bytes"] / real["peak_bytes"] if real["peak_bytes"] else None
                compared.setdefault(name, {})[method] = {"memory": memory, "seconds": seconds}
    return content


def table(name: str, step: Mapping[str, Any]) -> Iterator[str]:
    """A step's result in lines."""
    result = step.get("result") or {}
    if name == "tests":
        yield f"  {result.get('passed')} passed, {result.get('failed')} failed, {result.get('skipped')} skipped"
        for test in result.get("tests", []):
            if test["outcome"] == "failed":
                yield f"  {test['name']}: {test['message'][:300]}"
        return
    for length, kinds in result.get("passes", {}).items():
        for kind, row in kinds.items() if "error" not in kinds else ():
            yield f"  pass of {length} tokens, {kind}: {1e3 * row['seconds']:.1f} ms, MFU {row['mfu'] or 0:.1%}"
    for method, row in result.get("methods", {}).items():
        if "error" in row:
            yield f"  {method}: {row['error'][:200]}"
            continue
        yield (
            f"  {method}: {1e3 * row['seconds_per_update']:.1f} ms/update, MFU {row['mfu'] or 0:.1%}, outside passes "
            f"{row['outside_passes']:.1%}, peak {(row['peak_bytes'] or 0) / 1e9:.1f} GB"
        )
    if "passes" not in result:
        yield f"  {json.dumps(result)[:1500]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="end by then, whatever is missing")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), help="the results; a file that exists is continued"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny models, to test this script")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps, again if need be")
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.absolute()
    started = time.time()
    if args.plan:
        plan(args)
        return 0
    if args.work:
        args.steps = args.only
        return work(args)
    every = steps(args.smoke)
    unknown = set(args.only or ()) - set(every)
    if args.list or unknown:
        print(*every, sep="\n")
        return int(bool(unknown))
    args.steps = args.only or every
    content = read(args.out)
    for name in args.only or [name for name, step in content["steps"].items() if step["status"] == "stopped"]:
        content["steps"].pop(name, None)
    write(args.out, content)
    watch(args, started + 60 * args.minutes - 5)
    content = merged(args.out)
    write(args.out, content)
    missing = [name for name in args.steps if name not in content["steps"]]
    print(f"{args.out}: {time.time() - started:.0f} s; not run: {', '.join(missing) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
