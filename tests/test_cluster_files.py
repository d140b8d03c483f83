"""cluster.yaml and the files in cluster/: valid, consistent with the pinned versions, closed to the outside."""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from sqlalchemy import make_url

from ofmu_ray import __version__
from ofmu_ray.commandline.parse import parse
from ofmu_ray.config import UnlearnConfig
from ofmu_ray.config.requests import RequestsConfig
from ofmu_ray.runs.preflight import check_job_storage

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ["cluster.yaml", "cluster/on_premise.yaml"]
KUBERNETES = [f"cluster/kuberay/{name}.yaml" for name in ("rayjob", "raycronjob", "cronjob", "requests")]
DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def load(name: str):
    return yaml.safe_load((ROOT / name).read_text())


def strings(content) -> list[str]:
    """All the text of a YAML document, without its comments."""
    if isinstance(content, dict):
        return [text for item in content.items() for part in item for text in strings(part)]
    if isinstance(content, list):
        return [text for item in content for text in strings(item)]
    return [str(content)]


# ----------------------------------------------------------------------------------------------- Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_launcher_file(name):
    """By the functions and the schema of `ray up`, except what only the cloud knows."""
    validate_config(prepare_config(load(name)))
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(prepare_config(load(name)), json.loads(schema.read_text()))


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_mistake_in_a_launcher_file_is_found(name):
    broken = load(name) | {"idle_timeout_minuts": 3}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_are_closed(name):
    """A token on every connection, the dashboard on loopback, every node on the shared folder."""
    config = load(name)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--head" in head
    assert "--autoscaling-config=" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "0.0.0.0" not in " ".join(strings(config))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "--volume /mnt/ofmu:/mnt/ofmu" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (
        "initialization_commands",
        "setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        for command in config[commands]:
            assert shlex.split(command)  # no open quote


def test_the_cloud_head_runs_no_tasks_and_gpus_come_on_demand():
    config = prepare_config(load("cluster.yaml"))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    (workers,) = (node for name, node in types.items() if name != config["head_node_type"])
    assert (workers["min_workers"], workers["max_workers"]) == (0, config["max_workers"])
    assert workers["resources"]["GPU"] > 0
    sources = [Path(source) for source in config["file_mounts"].values() if not source.startswith("~")]
    assert sources
    assert all((ROOT / source).exists() for source in sources)


def test_launcher_versions_are_the_pinned_ones():
    docker = load("cluster.yaml")["docker"]
    python = f"py{''.join(python_version().split('.'))}"
    assert docker["head_image"] == f"rayproject/ray:{PINS['ray']}-{python}-cpu"
    assert docker["worker_image"] == f"rayproject/ray:{PINS['ray']}-{python}-gpu"
    installs = [c for c in strings(load("cluster.yaml")) if "pip install" in c]
    assert installs
    assert all("-c ~/ofmu-ray/constraints.txt" in command for command in installs)
    assert load("cluster/on_premise.yaml")["docker"]["image"] == f"ofmu-ray:{__version__}"


# ----------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module")
def schema():
    return json.loads((ROOT / "tests/schemas/kubernetes.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_files_follow_their_schema(name, schema):
    content = load(name)
    rules = {"$defs": schema["$defs"], "$ref": f"#/$defs/{content['kind']}"}
    jsonschema.validate(content, rules)
    for where, wrong in ((("spec", "suspendd"), True), (("metadata", "name"), "A_b"), (("apiVersion",), "v9")):
        broken = copy.deepcopy(content)
        target = broken
        for key in where[:-1]:
            target = target[key]
        target[where[-1]] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, rules)


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_have_no_privileges_and_volumes_for_their_mounts(name):
    pods = [pod for pod in _pods(load(name)) if "containers" in pod]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["image"] == f"registry.example.org/ofmu-ray:{__version__}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
            assert container["resources"]["limits"]["memory"]


def _pods(content) -> list[dict]:
    if isinstance(content, dict):
        own = [content["spec"]] if "containers" in content.get("spec", {}) else []
        return own + [pod for value in content.values() for pod in _pods(value)]
    return [pod for item in content for pod in _pods(item)] if isinstance(content, list) else []


def test_ray_jobs_ask_for_the_token_and_the_pinned_ray():
    job, nightly = load(KUBERNETES[0])["spec"], load(KUBERNETES[1])["spec"]["jobTemplate"]
    for spec in (job, nightly):
        assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        assert spec["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    assert nightly["rayClusterSpec"] == job["rayClusterSpec"]
    environment = load("runtime_env.yaml")["env_vars"]
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == environment
    submit = load(KUBERNETES[2])["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in submit["env"]


@pytest.mark.slow
def test_commands_of_kubernetes_files_are_commands_of_this_project(tmp_path):
    """The arguments of `python -m pipelines.unlearn` parse and write to the shared volume."""
    job, nightly = load(KUBERNETES[0])["spec"], load(KUBERNETES[1])["spec"]["jobTemplate"]
    submit = load(KUBERNETES[2])["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    commands = [job["entrypoint"], nightly["entrypoint"], shlex.join(submit[submit.index("--") + 1 :])]
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "pipelines.unlearn"] or words[1].endswith("cluster/nightly.sh")
        options = words[3:] if words[0] == "python" else words[2:]
        (tmp_path / "unlearn.yaml").write_text("seed: 3\n")
        options = [word.replace("/mnt/ofmu/unlearn.yaml", str(tmp_path / "unlearn.yaml")) for word in options]
        config = parse(UnlearnConfig, options, "ofmu unlearn")
        assert config.seed == 3
        check_job_storage(config.storage)
    assert "pipelines.unlearn" in (ROOT / "cluster/nightly.sh").read_text()


@pytest.mark.slow
def test_the_nights_requests_have_a_ledger_that_several_machines_can_open():
    """Not SQLite on the shared volume; the image has the driver, and the head the password."""
    job = load(KUBERNETES[3])["spec"]["jobTemplate"]
    ledger = make_url(parse(RequestsConfig, _storage_only(job["entrypoint"]), "ofmu requests").requests.ledger)
    assert (ledger.drivername, ledger.password) == ("postgresql+psycopg", None)
    assert "psycopg" in PINS
    (head,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in head["env"]}
    assert secrets == {"OFMU_MASTER_KEY": "master_key", "PGPASSWORD": "ledger_password"}


def _storage_only(entrypoint: str) -> list[str]:
    """The options of `ofmu requests process`, without the file that only the cluster has."""
    words = shlex.split(entrypoint)
    assert words[:5] == ["ofmu", "requests", "process", "--config", "/mnt/ofmu/requests.yaml"]
    return words[5:]


# ------------------------------------------------------------------------------------------------------------ the image


def python_version() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["requires-python"].removeprefix(">=")


def test_the_image_has_the_python_of_the_project():
    (base,) = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert base == f"python:{python_version()}-slim-bookworm"


def test_the_image_installs_from_the_constraints_as_a_user():
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert len(installs) == 2
    assert "-c constraints.txt -r requirements.txt" in installs[0]
    assert "--no-deps -e ." in installs[1]
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] == "ray"
    assert {"torch", "ray", "deepspeed", "transformers", "mlflow"} <= set(PINS)


def test_what_the_image_copies_is_there_and_let_through():
    ignore = (ROOT / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore


@pytest.mark.system
def test_the_dependencies_step_of_the_image_reads_the_project():
    """The one-liner that turns pyproject.toml into requirements, as the image's shell runs it."""
    command = re.search(r'python (-c ".*")', DOCKERFILE)[1]
    printed = subprocess.check_output(["sh", "-c", f"{sys.executable} {command}"], cwd=ROOT, text=True).splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert printed == [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
