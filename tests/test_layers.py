"""The layers of the package: imports point down, no cycles, library code never prints, pipelines stay thin."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    "pipelines", "commandline", "requests", "search", "runs", "planning", "reporting", "attacks", "training",
    "tracking", "methods", "features", "tasks", "evaluation", "metrics", "engines", "models", "data", "cluster",
    "internals", "algorithm", "config", "storage", "assets",
)  # fmt: skip
"""From top to bottom, as in docs/architecture.md."""
GROUND = {"errors", "progress", "__version__", ""}
"""Top-level modules, which everything may import."""


UPWARD = {
    "ofmu_ray/config/method_sections.py imports ofmu_ray.methods.registry": "a section of options for every method is "
    "derived from the method's class, which stands with the method: one place for a method is worth one cycle",
}
"""The imports that point up, each with its reason."""


def room(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "pipelines":
        return "pipelines"
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, including those inside functions, for type hints and by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted([*(ROOT / "ofmu_ray").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")]):
        yield room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")), path


def test_imports_point_down() -> None:
    wrong = []
    for own, path in sources():
        for name in imports(path):
            other = room(name) if name.startswith(("ofmu_ray.", "pipelines.")) else own
            if own in GROUND or other in GROUND or own == other:
                continue
            if other not in LAYERS or LAYERS.index(other) < LAYERS.index(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert sorted(wrong) == sorted(UPWARD)


def test_every_room_is_drawn() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for name in {own for own, _ in sources()} - GROUND:
        assert name in LAYERS, f"{name}/ has no place in LAYERS"
        assert f"{name}/" in text, f"docs/architecture.md does not show {name}/"


@pytest.mark.parametrize("forbidden", ["print"])
def test_library_code_never_prints(forbidden: str) -> None:
    """Except modules that are programs (`python -m`)."""
    offenders = []
    for own, path in sources():
        text = path.read_text()
        if own in ("pipelines", "commandline") or '__name__ == "__main__"' in text:
            continue
        calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == forbidden for call in calls):
            offenders.append(str(path.relative_to(ROOT)))
    assert not offenders


def test_models_are_made_in_one_room() -> None:
    """Loaded, or built from a configuration or by hand: only models/ calls transformers for this."""
    made = {"from_pretrained", "from_config", "snapshot_download"}
    places = []
    for own, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", getattr(node, "id", ""))
            if own != "models" and (name in made or str(name).endswith("ForCausalLM")):
                places.append(f"{path.relative_to(ROOT)}: {name}")
    assert not places, places


def test_pipelines_are_thin() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "pipelines").glob("*.py")}
    assert sum(lines.values()) <= 1500, lines


SAME_NAMES = {"__init__", "protocol", "registry"}
"""File names that several packages have: the protocol of their parts, the registry that lists them."""


def test_a_file_name_says_which_file_is_meant() -> None:
    """A command in pipelines/ and its options in config/ share the command's name; no other two files share a name."""
    files: dict[str, list[str]] = {}
    for own, path in sources():
        if path.stem not in SAME_NAMES and own != "pipelines":
            files.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    shared = {name: paths for name, paths in files.items() if len(paths) > 1}
    commands = {path.stem for own, path in sources() if own == "pipelines"}
    elsewhere = {name: files[name] for name in commands & files.keys() if files[name] != [f"ofmu_ray/config/{name}.py"]}
    assert not shared, f"rename one of each: {shared}"
    assert not elsewhere, f"rename: {elsewhere}"


BROUGHT = {"huggingface_hub": "transformers", "starlette": "fastapi", "aiohttp": "ray", "nltk": "rouge-score"}
"""Packages imported here that a declared dependency has to bring, in a version that suits it."""


def distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.slow
def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = {distribution(name) for name in [*project["dependencies"], *extras]}
    for package, parent in BROUGHT.items():
        assert parent in declared
        assert distribution(package) in {distribution(name) for name in requires(parent) or ()}
    own = {*sys.stdlib_module_names, "ofmu_ray", "pipelines", "tune_spaces", *BROUGHT}
    installed = packages_distributions()
    missing = {
        f"{path.relative_to(ROOT)} imports {package}"
        for _, path in sources()
        for package in (name.partition(".")[0] for name in imports(path))
        if package and package not in own
        and declared.isdisjoint(map(distribution, installed.get(package, [package])))
    }  # fmt: skip
    assert not missing
