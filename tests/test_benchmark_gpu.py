"""The check for GPUs runs from end to end on a CPU: every step, the watcher, the plan's predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.gpu import outcome_of as parsed
from benchmarks.gpu_cells import cells, methods


@pytest.mark.full
def test_every_step_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--smoke", "--minutes", "9", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(out.read_text())
    assert content["about"]["device"] == "cpu"
    assert {name: step["status"] for name, step in content["steps"].items()} == dict.fromkeys(
        ["tests", "rates", *(cell.name for cell in cells(smoke=True)), "evaluation"], "done"
    ), done.stdout
    tests = content["steps"]["tests"]["result"]
    assert tests["failed"] == 0, tests
    assert tests["passed"] + tests["skipped"] > 20
    for cell in cells(smoke=True):
        result = content["steps"][cell.name]["result"]
        assert all("error" not in part for group in ("passes", "methods") for part in result[group].values()), result
        assert set(result["methods"]) == set(methods())
        assert result["methods"]["OFMU lite"]["differenced_passes"] > 0
        assert set(content["compared"][cell.name]) == set(methods())


@pytest.mark.system
def test_a_step_that_kills_its_process_is_named_and_the_next_one_runs(tmp_path, monkeypatch) -> None:
    """The watcher, with workers that stand in for a crash and a hang."""
    import argparse
    import time

    from benchmarks import gpu

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "if '--plan' in sys.argv: sys.exit()\n"
        "content = json.load(open(out))\n"
        "for name in ('crash', 'hang', 'fine'):\n"
        "    if name in content['steps']: continue\n"
        "    content['steps'][name] = {'status': 'running', 'began': time.time()}\n"
        "    json.dump(content, open(out + '.new', 'w')); os.replace(out + '.new', out)\n"
        "    if name == 'crash': os.abort()\n"
        "    if name == 'hang': time.sleep(600)\n"
        "    content['steps'][name]['status'] = 'done'\n"
        "    json.dump(content, open(out + '.new', 'w')); os.replace(out + '.new', out)\n"
    )
    monkeypatch.setattr(gpu, "LIMITS", {"hang": 2.0})
    original = subprocess.Popen
    swap = {sys.executable: [sys.executable, str(script)]}

    def start(command: list[str], **options: object) -> object:
        changed = [word for part in command for word in swap.get(part, [part])]
        return original([word for word in changed if word not in ("-m", "benchmarks.gpu")], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    out = tmp_path / "gpu.json"
    gpu.write(out, {"about": {}, "steps": {}})
    args = argparse.Namespace(out=out, device="cpu", smoke=True, steps=["crash", "hang", "fine"])
    gpu.watch(args, time.time() + 100)
    steps = gpu.read(out)["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {
        "crash": "failed", "hang": "stopped", "fine": "done"
    }  # fmt: skip
    assert "status -6" in steps["crash"]["error"]
    assert "did not end in 2 s" in steps["hang"]["error"]


def test_a_report_of_pytest_is_read() -> None:
    from xml.etree.ElementTree import fromstring

    case = fromstring(
        '<testcase name="a" time="1.5"><properties><property name="gradient" value="1e-6"/></properties>'
        '<failure message="assert 1 &lt; 0">text</failure></testcase>'
    )
    assert parsed(case) == {
        "name": "a", "seconds": 1.5, "outcome": "failed", "message": "assert 1 < 0", "text": "text",
        "measured": {"gradient": "1e-6"},
    }  # fmt: skip
