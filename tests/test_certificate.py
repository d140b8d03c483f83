"""Certificates: what was signed verifies offline, and nothing else does."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ofmu_ray.errors import UserError
from ofmu_ray.models.source import model_fingerprint
from ofmu_ray.requests.certificate import FORMAT, CertificateError, canonical, signed, verify
from ofmu_ray.requests.signing import Keys, read_public_keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "keys")
    keys.create()
    return keys


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    return folder


def written(path: Path, keys: Keys, model: Path, **more: object) -> Path:
    content = {
        "format": FORMAT,
        "issued": "2026-01-01T00:00:00+00:00",
        "requests": [{"id": "req-1", "rows": ["ab" * 32], "reason": "ü"}],
        "gates": [{"name": "forget_probability", "result": "passed", "value": 0.1, "high": 1e-7}],
        "result": {"version": "2", "weights": model_fingerprint(model)},
        **more,
    }
    path.write_bytes(signed(content, keys.signer()))
    return path


def test_a_certificate_verifies_with_its_public_key_and_model(tmp_path: Path, keys: Keys, model: Path) -> None:
    path = written(tmp_path / "c.json", keys, model)
    (key,) = keys.all()
    found = verify(path, key.path, model)
    assert (found.key_id, found.model) == (key.key_id, True)
    assert found.content["requests"][0]["reason"] == "ü"


def test_a_changed_byte_anywhere_does_not_verify(tmp_path: Path, keys: Keys, model: Path) -> None:
    original = written(tmp_path / "c.json", keys, model).read_bytes()
    copy = tmp_path / "copy.json"
    public = keys.all()[0].path
    for place in range(len(original)):
        for changed in (bytes([original[place] ^ 1 << place % 7]), b""):
            copy.write_bytes(original[:place] + changed + original[place + 1 :])
            with pytest.raises(CertificateError):
                verify(copy, public)
    copy.write_text(json.dumps(json.loads(original), indent=1))  # the same content in another form
    with pytest.raises(CertificateError, match="saved again"):
        verify(copy, public)


@pytest.mark.parametrize("key", [["x"], {}, 1, None])
def test_a_key_id_that_is_no_text_does_not_verify(key: object, tmp_path: Path, keys: Keys) -> None:
    path = tmp_path / "c.json"
    envelope = {"certificate": {}, "key_id": key, "algorithm": "Ed25519", "signature": "00"}
    path.write_bytes(canonical(envelope) + b"\n")
    with pytest.raises(CertificateError, match="not as it was written"):
        verify(path, keys.folder)


def test_another_model_does_not_verify(tmp_path: Path, keys: Keys, model: Path) -> None:
    path = written(tmp_path / "c.json", keys, model)
    other = shutil.copytree(model, tmp_path / "other")
    assert verify(path, keys.folder, other).model  # wherever it lies
    (other / "model.safetensors").write_bytes(bytes(range(255)))
    with pytest.raises(CertificateError, match="weights"):
        verify(path, keys.folder, other)
    with pytest.raises(UserError, match="safetensors"):
        verify(path, keys.folder, tmp_path)


def test_weights_changed_in_place_with_size_and_time_kept_do_not_verify(
    tmp_path: Path, keys: Keys, model: Path
) -> None:
    weights = model / "model.safetensors"
    os.utime(weights, (1e9, 1e9))  # long ago, so that its digest may be remembered
    path = written(tmp_path / "c.json", keys, model)
    assert verify(path, keys.folder, model).model
    with weights.open("r+b") as file:
        file.write(b"x")
    os.utime(weights, (1e9, 1e9))
    with pytest.raises(CertificateError, match="weights"):
        verify(path, keys.folder, model)


def test_a_gate_that_did_not_pass_is_no_certificate(tmp_path: Path, keys: Keys, model: Path) -> None:
    path = written(tmp_path / "c.json", keys, model, gates=[{"name": "model_utility", "result": "failed"}])
    with pytest.raises(CertificateError, match="model_utility"):
        verify(path, keys.folder)


def test_old_certificates_verify_after_a_rotation(tmp_path: Path, keys: Keys, model: Path) -> None:
    old = written(tmp_path / "old.json", keys, model)
    first = keys.signer().key_id
    second = keys.rotate().key_id
    new = written(tmp_path / "new.json", keys, model)
    assert [(key.key_id, key.current) for key in keys.all()] == [(first, False), (second, True)]
    for path, key in ((old, first), (new, second)):
        assert verify(path, keys.folder).key_id == key
        assert verify(path, keys.folder / f"{key}.pub").key_id == key
    with pytest.raises(CertificateError, match=f"signed by the key {first}"):
        verify(old, keys.folder / f"{second}.pub")
    both = tmp_path / "both.pem"
    both.write_text("".join(key.path.read_text() for key in keys.all()))
    assert set(read_public_keys(both)) == {first, second}
    assert not (keys.folder / f"{first}.key").exists()


def test_a_rotation_that_was_killed_leaves_no_private_key_to_the_next(keys: Keys) -> None:
    with keys._locked():
        keys._new()  # killed here, before the old private key was deleted
    (keys.folder / "web-server.key").touch()  # not ours
    assert len(list(keys.folder.glob("*.key"))) == 3
    new = keys.rotate()
    assert {path.stem for path in keys.folder.glob("*.key")} == {new.key_id, "web-server"}
    assert len(keys.all()) == 3


def test_a_private_key_is_its_owners_alone(keys: Keys) -> None:
    path = next(keys.folder.glob("*.key"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="rotate"):
        keys.create()
    path.chmod(0o640)
    with pytest.raises(UserError, match="others may read"):
        keys.signer()
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(UserError, match="not the Ed25519 key"):
        keys.signer()
    with pytest.raises(UserError, match="keys create"):
        Keys(keys.folder / "none").signer()


@pytest.mark.system
def test_the_command_needs_neither_ledger_nor_torch_nor_ray(tmp_path: Path, keys: Keys, model: Path) -> None:
    path = written(tmp_path / "c.json", keys, model)
    program = (
        "import sys; from pipelines import cli; status = cli.main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    words = ["requests", "verify", str(path), "--public-key", str(keys.all()[0].path), "--model", str(model)]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.endswith("0 []\n"), done
    assert "= --model" in done.stdout
    assert [one.name for one in tmp_path.iterdir() if one.name == "runs"] == []
