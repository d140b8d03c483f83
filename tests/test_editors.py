"""What editors and shells are given: a JSON schema of configurations, and a completion script."""

from __future__ import annotations

import json
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


def test_shipped_configurations_are_valid(schemas: dict[str, Any]) -> None:
    for path in SHIPPED:
        content = yaml.safe_load(path.read_text())
        command = path.stem.partition("_")[0]
        if command not in CONFIGURATIONS:
            command = "train" if "finetune" in content else "unlearn"
        jsonschema.validate(json.loads(json.dumps(content)), schemas[command])


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


@pytest.mark.system
def test_a_shell_completes_commands_options_and_values(tmp_path: Path) -> None:
    (tmp_path / "ofmu.bash").write_text(script(cli.COMMANDS))
    (tmp_path / "runs/mine").mkdir(parents=True)
    expected = {
        "unl": "unlearn",
        "unlearn --training.zer": "--training.zero_stage",
        "quickstart --method np": "npo",
        "train --task image --finetune.optimizer.name s": "sgd",
        "unlearn --stop.utility_floor ''": "",
        "sweep --config sweep_t": "sweep_tofu",
        "show mi": "mine",
        "evaluate --peer": "--peer-names --peer_names",
    }
    lines = ["source ofmu.bash"]
    for words in expected:
        lines.append(f'COMP_WORDS=(ofmu {words}); COMP_CWORD={len(words.split())}; _ofmu; echo "${{COMPREPLY[*]}}"')
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*expected.values()]
    assert not done.stderr


def test_the_schema_and_the_script_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "plan"]) == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False
