"""The wheel, installed into an environment of its own outside the checkout, and the image's steps without a builder.

Nothing is downloaded: the environment sees the packages of the one that runs the tests.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--training.rounds", "2", "--training.engine", "torch", "--training.workers", "1"]
SHORT += ["--evaluation.max_rows", "8", "--evaluation.max_new_tokens", "8", "--tracking.system_metrics", "false"]


def run(*words: str | Path, at: Path, **environment: str) -> str:
    """A command's output."""
    return finished(*words, at=at, **environment).stdout


def finished(*words: str | Path, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that ended well; without this checkout on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, words)], cwd=at, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one; its folder of commands."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, at=ROOT)
    [site] = (folder / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def install(command: Path, wheel: Path) -> None:
    run(command / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel, at=ROOT)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("ofmu_ray", "pipelines", "tune_spaces", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, source / name, at=ROOT)
    build = ["--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    run(sys.executable, "-m", "pip", "wheel", *build, at=folder)
    command = environment(folder / "venv")
    install(command, next(folder.glob("ofmu_ray-*.whl")))
    return command


def test_the_wheel_runs_the_quickstart_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import ofmu_ray, pipelines; print(ofmu_ray.__file__); print(pipelines.__file__)"
    for line in run(installed / "python", "-c", code, at=tmp_path).splitlines():
        assert Path(line).is_relative_to(installed.parent), "not the checkout"
    printed = run(installed / "ofmu", "quickstart", *SHORT, at=tmp_path)
    assert "Forget quality" in printed
    metrics = json.loads((tmp_path / "runs/quickstart/metrics.json").read_text())
    assert metrics["run"]["status"] == "finished"
    assert (tmp_path / "runs/quickstart/report.html").is_file()
    again = [installed / "ofmu", "unlearn", "--config", "quickstart", *SHORT]
    assert "already finished" in finished(*again, at=tmp_path).stderr
    assert "quickstart" in run(installed / "ofmu", "runs", at=tmp_path)


def test_what_the_wheel_carries(installed: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import ofmu_ray, pipelines, tune_spaces\n"
        "for m in (ofmu_ray, pipelines, tune_spaces):\n"
        "  r = Path(m.__file__).parent\n"
        "  print(*(f'{m.__name__}/{p.relative_to(r)}' for p in r.rglob('*') if p.is_file()), sep='\\n')"
    )
    carried = {line for line in run(installed / "python", "-c", code, at=tmp_path).splitlines() if ".pyc" not in line}
    listed = run("git", "ls-files", "ofmu_ray", "pipelines", "tune_spaces", at=ROOT).splitlines()
    assert carried == {*listed}


def test_the_images_steps_in_an_environment_of_their_own(tmp_path: Path) -> None:
    """What cluster/Dockerfile copies and runs after the dependencies."""
    app, command = tmp_path / "app", environment(tmp_path / "venv")
    app.mkdir()
    first, _, then = (ROOT / "cluster/Dockerfile").read_text().partition("rm requirements.txt")
    for line in [*(line for line in first.splitlines() if line.startswith("COPY")), *then.splitlines()]:
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *names, target = rest.split()
            (app / target).parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-r", *(ROOT / name for name in names), app / target, at=ROOT)
        elif word == "RUN":
            assert rest.startswith("pip install"), rest
            offline = ["--no-index", "--no-build-isolation", "--ignore-installed"]
            run(command / "python", "-m", *shlex.split(rest), *offline, at=app)
    assert "unlearn" in run(command / "ofmu", "--help", at=app)
    assert str(app) in run(command / "python", "-c", "import ofmu_ray; print(ofmu_ray.__file__)", at=tmp_path)
