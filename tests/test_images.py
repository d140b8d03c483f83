"""Image classifiers from end to end: data, training, unlearning, resume, workers, export, mistakes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import IMAGE_METHODS, ROOT
from PIL import Image
from safetensors.torch import load_file

from ofmu_ray import train, unlearn
from ofmu_ray.config import METHODS, TrainConfig, UnlearnConfig, apply_overrides, outcome_hash, to_dict
from ofmu_ray.data.image_files import digits
from ofmu_ray.data.image_reading import augmented, draws
from ofmu_ray.errors import UserError
from ofmu_ray.methods import build_method
from ofmu_ray.training import worker
from pipelines import cli

DATA = {"images": {"size": 8, "padding": 1, "flip": False}}
SHAPE = {"architecture": "resnet8", "channels": 1, "image_size": 8, "enlarge": 1, "mean": [0.3], "std": [0.38]}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip": None, "decay": "step", "milestones": [0.5]}
QUIET = {"tracking": {"system_metrics": False}, "task": "image_classification"}


def training(storage: Path, name: str, **changes: Any) -> TrainConfig:
    options = {
        **QUIET, "name": name, "storage": str(storage), "classifier": SHAPE,
        "data": {"train": {"path": "builtin:digits/train"}, **DATA},
        "finetune": {"optimizer": SGD}, "epochs": 6.0, "training": {"batch_size": 64, "checkpoint_every": 1000},
    }  # fmt: skip
    return apply_overrides(apply_overrides(TrainConfig(), options), changes)


def forgetting(models: dict[str, str], storage: Path, name: str, **changes: Any) -> UnlearnConfig:
    options = {
        **QUIET, "name": name, "storage": str(storage), "model": {"path": models["target"]},
        "data": {
            "retain": {"path": "builtin:digits/train"}, "test": {"path": "builtin:digits/test"},
            "split": {"classes": [3]}, **DATA,
        },
        "training": {"engine": "torch", "rounds": 12, "batch_size": 32, "checkpoint_every": 1000},
        "evaluation": {"max_rows": None, "retrained": models["retrained"], "bootstrap_samples": 20},
    }  # fmt: skip
    return apply_overrides(apply_overrides(UnlearnConfig(), options), changes)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs: MLflow makes its database once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def models(storage: Path) -> dict[str, str]:
    target = train(training(storage, "target"))
    without = training(storage, "retrained", **{"data.split": {"classes": [3]}, "seed": 1})
    retrained = train(without)
    assert train(without).reused  # the rows that it claims are those that it read
    return {"target": target.model, "retrained": retrained.model}


OFMU = {"forget_loss": "bounded_token", "forget_level": 4.0, "inner": {"name": "sgd", "lr": 0.05}}
RUNS = {
    "ofmu": {"ofmu": {**OFMU, "outer": {"name": "sgd", "lr": 0.02, "momentum": 0.9}}},
    "salun": {"salun": {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}, "share": 0.5}},
    "boundary_shrink": {"boundary_shrink": {"optimizer": {"name": "sgd", "lr": 0.05}, "retain_weight": 1.0}},
    "l1_sparse": {"l1_sparse": {"optimizer": {"name": "sgd", "lr": 0.05}}},
    "npo": {"npo": {"optimizer": {"name": "sgd", "lr": 0.05}, "retain_loss": "kl", "retain_weight": 3.0}},
}


@pytest.mark.full
@pytest.mark.system
def test_the_shipped_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three commands of digits.yaml, in its working directory."""
    monkeypatch.chdir(tmp_path)
    for command, name in (("train", "digits_target"), ("train", "digits_retrained"), ("unlearn", "digits")):
        assert cli.main([command, "--config", str(ROOT / f"pipelines/configs/{name}.yaml")]) == 0
    metrics = json.loads(Path("runs/digits/metrics.json").read_text())
    value = {
        model: {name: metric_value["value"] for name, metric_value in metrics[model].items()}
        for model in ("before", "after", "retrained")
    }
    assert metrics["run"]["status"] == "finished"
    assert value["before"]["testing_accuracy"] > 95
    assert value["retrained"]["average_gap"] == 0
    assert value["after"]["unlearning_accuracy"] > value["before"]["unlearning_accuracy"]
    assert value["after"]["testing_accuracy"] > 90
    assert "Confusion of the forgotten rows" in Path("runs/digits/report.html").read_text()


def _gap(metrics: Any, retrained: Any) -> float:
    names = ("unlearning_accuracy", "remaining_accuracy", "testing_accuracy")
    return sum(abs(metrics[name]["value"] - retrained[name]["value"]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["ofmu", "salun", *(pytest.param(name, marks=pytest.mark.full) for name in [*RUNS][2:])]
)
def test_a_class_is_forgotten(models: dict[str, str], storage: Path, method: str) -> None:
    outcome = unlearn(forgetting(models, storage, method, method=method, **RUNS[method]))
    before, after, retrained = (outcome.metrics[name] for name in ("before", "after", "retrained"))
    value = {name: metric_value["value"] for name, metric_value in after.items()}
    assert before["unlearning_accuracy"]["value"] < 20
    assert retrained["unlearning_accuracy"]["value"] == 100
    assert before["testing_accuracy"]["value"] > 85
    assert value["testing_accuracy"] > 75
    assert after["test_accuracy"] == after["testing_accuracy"]
    assert after["retain_accuracy"] == after["remaining_accuracy"]
    assert set(value) == set(before) and "forgotten_class_accuracy" in value  # noqa: PT018
    if method != "l1_sparse":  # which forgets only by chance
        assert value["unlearning_accuracy"] > 50
        # without MIA: on so few, well separated rows it is 0 or 100 by chance
        assert _gap(after, retrained) < _gap(before, retrained) / 4
    if method == "salun":  # weights outside the mask stay to the bit
        start, end = (load_file(Path(path, "model.safetensors")) for path in (models["target"], outcome.model))
        trained = [name for name in start if "running" not in name and "tracked" not in name]
        moved = sum(int((start[name] != end[name]).sum()) for name in trained)
        assert 0.1 < moved / sum(start[name].numel() for name in trained) <= 0.501
    _loads(outcome.model, after)
    report = Path(outcome.run["report"]).read_text()
    assert "Average gap" in report
    assert "Confusion of the forgotten rows" in report
    pictures = report.count("data:image/png")
    assert pictures == 3 * 5  # test rows (the class and the others) and retain rows; forget rows are not to be shown
    shown = json.loads((Path(outcome.home) / "metrics.json").read_text())["run"]["config_hash"]
    assert shown == outcome_hash(forgetting(models, storage, "other", method=method, **RUNS[method]))


@pytest.mark.slow
def test_models_side_by_side(
    models: dict[str, str], storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ofmu evaluate` has the numbers of the run, a page with images, and refuses what is for texts."""
    from ofmu_ray.models.classifiers import write_initial_classifier

    run = forgetting(models, storage, "salun", method="salun", **RUNS["salun"])
    outcome = unlearn(run)
    write_initial_classifier(
        tmp_path / "three", apply_overrides(training(tmp_path, "x"), {"classifier.classes": ["a", "b", "c"]})
    )
    file = tmp_path / "config.yaml"
    shared = {name: to_dict(run)[name] for name in ("storage", "task", "data", "evaluation", "tracking")}
    compared = {"target": models["target"], "unlearned": outcome.model}
    file.write_text(yaml.safe_dump({"name": "side", "models": compared, **shared}))
    words = ["evaluate", "--config", str(file)]
    assert cli.main(words) == 0
    assert "Average gap" in capsys.readouterr().out
    measured = json.loads((storage / "side/metrics.json").read_text())["models"]
    assert measured == {"target": outcome.metrics["before"], "unlearned": outcome.metrics["after"],
                        "retrained": outcome.metrics["retrained"]}  # fmt: skip
    page = (storage / "side/report.html").read_text()
    assert "Confusion of the forgotten rows" in page
    assert page.count("data:image/png") == 3 * 5
    for more, said in (
        (["--checks.alignment", "true"], "checks.alignment: for language models only"),
        (["--checks.relearn", "{}"], "checks.relearn: for language models only"),
        (["--peer-names"], "peer_names: for language models only"),
        (["--models.other", str(tmp_path / "three")], "has 3 classes, and the rows were read for 10"),
        (["--models.other", str(tmp_path)], "models.other = "),
    ):
        assert cli.main([*words, *more]) == 2
        assert said in capsys.readouterr().err


def _loads(path: str, results: dict[str, Any]) -> None:
    """transformers alone loads the model and finds the accuracy on the test rows of the other classes."""
    from transformers import AutoModelForImageClassification

    model: Any = AutoModelForImageClassification.from_pretrained(path).eval()
    settings = json.loads(Path(path, "preprocessor_config.json").read_text())
    right = []
    for row in digits("builtin:digits/test").to_pylist():
        if row["label"] == 3:
            continue
        with Image.open(io.BytesIO(row["image"])) as opened:
            side = settings["size"]["height"]
            pixels = np.asarray(opened.resize((side, side), Image.Resampling.NEAREST), dtype=np.float32) / 255
        values = (pixels - settings["image_mean"][0]) / settings["image_std"][0]
        with torch.no_grad():
            right.append(int(model(pixel_values=torch.tensor(values)[None, None]).logits.argmax()) == row["label"])
    assert 100 * np.mean(right) == pytest.approx(results["testing_accuracy"]["value"])
    assert model.config.id2label[3] == "3"


@pytest.mark.slow
def test_a_vision_transformer_is_unlearned_and_loads(storage: Path, tmp_path: Path) -> None:
    """Layer normalisation and an input of its own size; random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10, id2label=dict(enumerate("0123456789")),
    )  # fmt: skip
    ViTForImageClassification(shape).save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 8, "width": 8}, "resample": 0, "image_mean": [0.3], "image_std": [0.38]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    models = dict.fromkeys(("target", "retrained"), str(tmp_path / "vit"))
    outcome = unlearn(forgetting(models, storage, "vit", method="salun", **RUNS["salun"]))
    assert outcome.finished
    start, end = (load_file(Path(path, "model.safetensors")) for path in (models["target"], outcome.model))
    assert sum(value.numel() for value in start.values()) < 1000
    assert not torch.equal(start["classifier.weight"], end["classifier.weight"])
    _loads(outcome.model, outcome.metrics["after"])


def test_statistics_of_other_batch_normalisations_are_refused() -> None:
    from ofmu_ray.models.batch_norm import fix_statistics, share_statistics

    for refuse in (fix_statistics, share_statistics):
        with pytest.raises(UserError, match=r"model\.path: .* has a BatchNorm1d; .* give one with BatchNorm2d"):
            refuse(torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm1d(2)))


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_bits(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics, momentum and augmentation included."""
    changes = {"epochs": 0.4, "training.checkpoint_every": 3}
    weights = []
    run_round, rounds = worker.run_round, 0

    def killed(*arguments: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == 8:
            raise KeyboardInterrupt
        return run_round(*arguments)

    for name in ("through", "killed"):
        if name == "killed":
            with monkeypatch.context() as patched:
                patched.setattr(worker, "run_round", killed)
                with pytest.raises(KeyboardInterrupt):
                    train(training(storage, name, **changes))
        outcome = train(training(storage, name, **changes))
        assert outcome.rounds == 9
        weights.append(load_file(Path(outcome.model, "model.safetensors")))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert rounds == 8


@pytest.mark.slow
@pytest.mark.full
def test_two_workers_train_the_same_model_as_one(storage: Path, local_ray: None) -> None:
    """Batch normalisation over both workers' rows; Ray Data reads and augments."""
    weights = []
    for workers in (1, 2):
        changes = {"epochs": 0.25, "training": {"engine": "deepspeed", "workers": workers, "batch_size": 64}}
        outcome = train(training(storage, f"workers{workers}", **changes))
        weights.append(load_file(Path(outcome.model, "model.safetensors")))
    moved = load_file(storage / "workers1" / "initial" / "model.safetensors")
    for name, value in weights[0].items():
        torch.testing.assert_close(value.double(), weights[1][name].double(), rtol=2e-3, atol=2e-4, msg=name)
    assert any((value - moved[name]).abs().max() > 0.01 for name, value in weights[0].items() if "running" in name)


@pytest.mark.slow
@pytest.mark.full
def test_two_workers_unlearn_the_same_model_as_one(models: dict[str, str], storage: Path, local_ray: None) -> None:
    """Fixed statistics: a batch may be cut in any way, and what was measured in training stays to the bit."""
    weights = []
    for workers in (1, 2):
        engine = {"engine": "deepspeed", "workers": workers, "batch_size": 32, "rounds": 3}
        run = forgetting(models, storage, f"forget{workers}", **RUNS["ofmu"], training=engine)
        weights.append(load_file(Path(unlearn(run).model, "model.safetensors")))
    start = load_file(Path(models["target"], "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value.double(), weights[1][name].double(), rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(value, start[name]) == ("running" in name or "tracked" in name), name


# ------------------------------------------------------------------------------------------------------------- data


def test_crops_and_flips_depend_on_seed_row_and_round_alone() -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (50, 6, 6, 3), dtype=np.uint8)
    ids, rounds = [f"train-{row}" for row in range(50)], np.full(50, 4)
    bits = draws(ids, rounds, 7)
    whole = augmented(pixels, bits, padding=2, flip=True)
    np.testing.assert_array_equal(
        whole[20:30], augmented(pixels[20:30], draws(ids[20:30], rounds[20:30], 7), padding=2, flip=True)
    )
    assert not np.array_equal(bits, draws(ids, rounds + 1, 7))
    assert not np.array_equal(bits, draws(ids, rounds, 8))
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for row in range(50):
        places = [
            (down, right, flip)
            for down in range(5)
            for right in range(5)
            for flip in (1, -1)
            if np.array_equal(padded[row, down : down + 6, right : right + 6][:, ::flip], whole[row])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 20
    np.testing.assert_array_equal(augmented(pixels, bits, padding=0, flip=False), pixels)


def png(side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def refusal(models: dict[str, str], tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        unlearn(forgetting(models, tmp_path, "refused", **changes))
    assert not (tmp_path / "refused" / "model").exists()
    return str(refused.value)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Enough to be refused something."""
    from ofmu_ray.models.classifiers import write_initial_classifier

    folder = tmp_path_factory.mktemp("untrained") / "model"
    write_initial_classifier(folder, training(folder.parent, "x"))
    return {"target": str(folder), "retrained": str(folder)}


def test_mistakes_in_the_rows(untrained: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"image": {"bytes": png(), "path": None}, "label": number} for number in (*range(10), 3, 6)]
    rows[4]["image"] = {"bytes": b"no image", "path": None}
    rows[6]["label"] = 12
    pq.write_table(pa.Table.from_pylist(rows), path)
    source = {"data.retain.path": str(path)}
    said = refusal(untrained, tmp_path, **source)
    assert "the image does not decode (rows.parquet row 5)" in said
    assert "label 12 is not one of the 10 classes" in said
    assert "rows.parquet row 7" in said
    assert "no column 'picture'" in refusal(untrained, tmp_path, **source, **{"data.images.image": "picture"})
    pq.write_table(pa.Table.from_pylist([{**row, "label": row["label"] % 8} for row in rows if row["label"] < 9]), path)
    said = refusal(untrained, tmp_path, **source, **{"data.images.image": "image"})
    assert "no rows of 2 of the model's classes" in said
    assert "8, 9" in said


def test_what_a_task_cannot_run_is_refused_in_a_sentence(untrained: dict[str, str], tmp_path: Path) -> None:
    assert "texts of a language model" in refusal(untrained, tmp_path, method="dpo")
    assert "adapters" in refusal(untrained, tmp_path, **{"model.lora.rank": 4})
    for name in METHODS:
        asked = build_method(METHODS[name].default()).asks
        assert ("classes" in asked) == (name in IMAGE_METHODS), name
    with pytest.raises(UserError, match="classes of a classifier"):
        unlearn(UnlearnConfig(storage=str(tmp_path), method="salun"))
    with pytest.raises(UserError, match="either a share or classes"):
        forgetting(untrained, tmp_path, "both", **{"data.split": {"classes": [3], "share": 0.1}})
    said = refusal(untrained, tmp_path, **{"data.split": {"classes": [3, 77]}})
    assert "data.split.classes: 77 is not one of the 10 classes of the model (numbers 0 to 9, or 0, 1, 2, ...)" in said


def test_parts_of_a_source(tmp_path: Path) -> None:
    """Forget and retain rows are complementary; a retrained model is trained on the retain rows."""
    from ofmu_ray.config import DataConfig, SourceConfig, SplitConfig, TrainDataConfig
    from ofmu_ray.data.sources import fingerprint, fragments, read

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"label": [row % 10 for row in range(5000)]}), path, row_group_size=700)

    def numbers(source: SourceConfig) -> list[int]:
        return [
            number for piece in fragments(source, None, stream="x", option="x") for number, _ in read(piece, ["label"])
        ]

    for split in (SplitConfig(share=0.1), SplitConfig(classes=[3]), SplitConfig(share=0.5, seed=4)):
        data = DataConfig(retain=SourceConfig(path=str(path)), split=split)
        forget, retain = (numbers(data.sources[name]) for name in ("forget", "retain"))
        assert sorted(forget + retain) == list(range(1, 5001))
        assert len(forget) == pytest.approx((split.share or 0.1) * 5000, abs=0 if split.classes else 150)
        again = TrainDataConfig(train=SourceConfig(path=str(path)), split=split)
        assert numbers(again.source) == retain
        prints = {fingerprint(fragments(one, None, stream="x", option="x")) for one in data.sources.values()}
        assert len(prints) == 2
    other = DataConfig(retain=SourceConfig(path=str(path)), split=dataclasses.replace(split, seed=5))
    assert numbers(other.sources["forget"]) != forget


def test_a_folder_of_classes(untrained: dict[str, str], tmp_path: Path) -> None:
    from ofmu_ray.config import ImagesConfig, SourceConfig
    from ofmu_ray.data.image_encoder import ImageEncoder
    from ofmu_ray.data.row_checks import Problems
    from ofmu_ray.data.sources import fragments, read

    for name, grey in (("cat", 10), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(np.full((20, 30), grey, np.uint8)).save(tmp_path / "pets" / name / "a.png")
        (tmp_path / "pets" / name / "._a.png").write_bytes(b"a note of the system")
    (tmp_path / "pets" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "cat" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "pets" / "cat" / ".ipynb_checkpoints" / "a-checkpoint.png").write_bytes(png())
    [piece] = fragments(SourceConfig(path=str(tmp_path / "pets"), format="images"), None, stream="f", option="data.f")
    rows = [(str(number), row) for number, row in read(piece)]
    encoder = ImageEncoder(ImagesConfig(), size=6, channels=1, classes=["dog", "cat"])
    encoded = [row for _, row in encoder.encode(rows, Problems())]
    assert [(row.payload[1], set(row.payload[0])) for row in encoded] == [(1, {10}), (0, {200})]
    assert [len(row.payload[0]) for row in encoded] == [36, 36]
    with pytest.raises(UserError, match="one folder of images"):
        fragments(SourceConfig(path=str(tmp_path / "none"), format="images"), None, stream="f", option="data.f")


def test_images_of_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Image feature arrives as bytes, and crosses the same encoder as the Parquet files of the hub's layout."""
    import datasets

    from ofmu_ray.config import ImagesConfig, SourceConfig
    from ofmu_ray.data.image_encoder import ImageEncoder
    from ofmu_ray.data.row_checks import Problems
    from ofmu_ray.data.sources import fragments, read

    pictures = [Image.fromarray(np.full((6, 6, 3), grey, np.uint8)) for grey in (10, 200)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    folder = tmp_path / "owner" / "set" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"img": pictures, "label": [1, 0]}, features).to_parquet(folder / "test-0.parquet")
    monkeypatch.chdir(tmp_path)
    pieces = fragments(SourceConfig(path="owner/set", format="hub", hub_split="test"), None, stream="f", option="o")
    rows = [(str(number), row) for piece in pieces for number, row in read(piece, ["img", "label"])]
    encoder = ImageEncoder(ImagesConfig(image="img"), size=6, channels=3, classes=["cat", "dog"])
    encoded = [row for _, row in encoder.encode(rows, Problems())]
    assert [(row.payload[1], set(row.payload[0])) for row in encoded] == [(1, {10}), (0, {200})]


def test_a_sample_of_rows_sorted_by_class_has_all_classes(untrained: dict[str, str], tmp_path: Path) -> None:
    from ofmu_ray.evaluation.image_evaluator import ImageEvaluator
    from ofmu_ray.tasks import task_named

    rows = [{"image": {"bytes": png(), "path": None}, "label": number // 6} for number in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = {"data.retain.path": str(tmp_path / "rows.parquet"), "data.test.path": str(tmp_path / "rows.parquet")}
    config = forgetting(untrained, tmp_path, "sample", **source, **{"evaluation.max_rows": 18})
    task = task_named("image_classification")
    encoder = task.encoder(task.check_model(config.model), config.data)
    images = ImageEvaluator.of(config, encoder, tmp_path).images
    assert {name: len(one) for name, one in images.items()} == {
        "forget": 6, "retain": 18, "test": 16, "test_forgotten": 2,
    }  # fmt: skip
    assert np.bincount(images["retain"].labels).tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_keep_their_shades(channels: int, suffix: str) -> None:
    from ofmu_ray.config import ImagesConfig
    from ofmu_ray.data.image_encoder import ImageEncoder

    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, suffix)
    encoder = ImageEncoder(ImagesConfig(), size=8, channels=channels, classes=["a", "b"])
    pixels = np.frombuffer(encoder.pixels(stream.getvalue()) or b"", np.uint8).reshape(8, 8, channels)
    np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None] // 256, channels, 2))


def test_learning_rates_fall_at_milestones() -> None:
    from ofmu_ray.algorithm.schedules import learning_rate
    from ofmu_ray.config import OptimizerConfig

    rate = OptimizerConfig(lr=1.0, decay="step", milestones=[0.5, 0.8], step_factor=0.1, warmup_fraction=0.2)
    expected = [0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose([learning_rate(rate, done, 10) for done in range(10)], expected)


def test_new_options_do_not_change_the_hashes_of_other_runs() -> None:
    content = json.dumps(dataclasses.asdict(UnlearnConfig()))
    assert '"milestones"' in content
    assert '"images"' in content
    from ofmu_ray.config.values import without_added

    kept = json.dumps(without_added(dataclasses.asdict(TrainConfig())))
    assert not any(f'"{name}"' in kept for name in ("milestones", "images", "split", "classifier", "step_factor"))
    changed = apply_overrides(TrainConfig(), {"classifier.architecture": "resnet18"})
    assert outcome_hash(changed) != outcome_hash(TrainConfig())


def test_the_page_of_images() -> None:
    from ofmu_ray.reporting.image_section import Images, confusion_lines, image_samples, shown_rows

    def table(predicted: list[int]) -> pa.Table:
        ids = [*(f"forget-{row}" for row in range(4)), "retain-0"]
        return pa.table(
            {
                "row_id": ids,
                "set": [row_id.partition("-")[0] for row_id in ids],
                "label": [1, 1, 1, 2, 0],
                "predicted": predicted,
                "confidence": [0.5] * 5,
            }
        )

    tables = {"before": table([1, 1, 1, 2, 0]), "after": table([1, 0, 0, 2, 0])}
    assert shown_rows(tables, 2) == ["forget-1", "forget-2", "retain-0"]
    images = Images(["ant", "bee", "cat"], {"retain-0": b"picture"})
    samples = image_samples(tables, images, 2)
    assert samples["forget"][0].picture is None
    assert samples["forget"][0].predictions == {"before": ("bee", 0.5, True), "after": ("ant", 0.5, False)}
    assert str(samples["retain"][0].picture).startswith("data:image/png;base64,")
    lines = {(line.label, line.model): line for line in confusion_lines(tables, images.classes)}
    assert lines["bee", "before"].predictions == "bee 3"
    assert lines["bee", "after"].predictions == "ant 2, bee 1"
    assert lines["bee", "after"].right == pytest.approx(100 / 3)


def test_drawn_classes_are_even_and_belong_to_seed_and_row() -> None:
    from ofmu_ray.features.label_features import drawn_class

    drawn = [drawn_class(f"forget-{row}", 10, 0) for row in range(2000)]
    assert np.bincount(drawn, minlength=10).min() > 150
    assert drawn == [drawn_class(f"forget-{row}", 10, 0) for row in range(2000)]
    assert drawn != [drawn_class(f"forget-{row}", 10, 1) for row in range(2000)]
