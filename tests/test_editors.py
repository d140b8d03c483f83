"""What editors and shells are given: a JSON schema of configurations, and a completion script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ofmu_ray.config import UnlearnConfig
from ofmu_ray.config.json_schema import schema_of
from pipelines import cli
from pipelines.editors import CONFIGURATIONS, configuration, script

SHIPPED = sorted((Path(cli.__file__).parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    found = {command: schema_of(configuration(command)) for command in CONFIGURATIONS}
    for schema in found.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    return found


@pytest.mark.slow
def test_shipped_configurations_are_valid(schemas: dict[str, Any]) -> None:
    for path in SHIPPED:
        content = yaml.safe_load(path.read_text())
        command = path.stem.partition("_")[0]
        if command not in CONFIGURATIONS:
            command = "train" if "finetune" in content else "unlearn"
        jsonschema.validate(json.loads(json.dumps(content)), schemas[command])


@pytest.mark.system
@pytest.mark.parametrize(
    "mistake",
    [{"ofmu": {"betta": 1}}, {"method": "npoo"}, {"training": {"rounds": "many"}}, {"training": [1]}, {"rounds": 3}],
    ids=str,
)
def test_an_editor_sees_a_mistake(mistake: dict[str, Any], schemas: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(mistake, schemas["unlearn"])


def test_options_have_their_text(schemas: dict[str, Any]) -> None:
    definitions = schemas["unlearn"]["$defs"]
    assert definitions["TrainingConfig"]["properties"]["rounds"]["description"].startswith("Rounds of the method")
    assert "weight of the forget loss" in definitions["NPOConfig"]["properties"]["forget_weight"]["description"], (
        "inherited"
    )
    assert {*schemas["unlearn"]["properties"]} == {*UnlearnConfig.__dataclass_fields__}


EXPECTED = {
    "unl": "unlearn",
    "unlearn --training.zer": "--training.zero_stage",
    "quickstart --method np": "npo",
    "train --task image --finetune.optimizer.name s": "sgd",
    "sweep --config sweep_t": "sweep_tofu",
    "show mi": "mine",
    "evaluate --peer": "--peer-names --peer_names",
}


def completed(tmp_path: Path, shell: str, lines: list[str]) -> list[str]:
    """What lines of a shell print once it has read its script, in a folder with the run `mine`."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "ofmu").write_text(script(cli.COMMANDS, shell))
    (tmp_path / "runs/mine").mkdir(parents=True)
    text = "\n".join(["source ./ofmu", *lines])
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([shell, "-c", text], cwd=tmp_path, env=home, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.system
def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    expected = EXPECTED | {"unlearn --stop.utility_floor ''": ""}
    lines = [
        f'COMP_WORDS=(ofmu {words}); COMP_CWORD={len(words.split())}; _ofmu; echo "${{COMPREPLY[*]}}"'
        for words in expected
    ]
    assert completed(tmp_path, "bash", lines) == [*expected.values()]


@pytest.mark.system
def test_fish_completes_the_same(tmp_path: Path) -> None:
    lines = [f"echo (complete -C 'ofmu {words}')" for words in EXPECTED]
    assert completed(tmp_path, "fish", lines) == [*EXPECTED.values()]


@pytest.mark.system
def test_zsh_reads_the_script(tmp_path: Path) -> None:
    assert completed(tmp_path, "zsh", ["print $_comps[ofmu]"]) == ["_bash_complete -o default -F _ofmu"]


@pytest.mark.system
def test_scripts_of_all_shells_have_the_same_words() -> None:
    bash, zsh, fish = (script(cli.COMMANDS, shell) for shell in ("bash", "zsh", "fish"))
    assert bash.splitlines()[1:] == zsh.splitlines()[-len(bash.splitlines()) + 1 :]
    assert zsh.startswith("autoload -U +X compinit bashcompinit\n")
    lines = [line.strip() for line in bash.splitlines() if line.endswith('" ;;') and "$(" not in line]
    assert len(lines) > 40
    for words in (line.partition(' words="')[2].removesuffix('" ;;') for line in lines):
        assert f"; set words {words}\n" in fish


def test_the_schema_and_the_script_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "plan"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
