"""Room for trials is checked before any starts."""

import pytest

from ofmu_ray.config import ModelConfig, TrainingConfig
from ofmu_ray.errors import UserError
from ofmu_ray.search.capacity import check_disk, concurrency

TWO = TrainingConfig(engine="deepspeed", workers=2, batch_size=8)


@pytest.mark.parametrize(
    ("nodes", "trials"),
    [
        ([{"CPU": 2.0}], 1),
        ([{"CPU": 1.0}, {"CPU": 1.0}], 1),
        ([{"CPU": 5.0}, {"CPU": 3.0}, {}], 4),
    ],
)
def test_workers_are_counted_node_by_node(nodes, trials):
    assert concurrency(TWO, None, nodes) == trials
    assert concurrency(TWO, 1, nodes) == 1


def test_a_worker_needs_its_share_on_one_node():
    training = TrainingConfig(cpus_per_worker=2, gpus_per_worker=1)
    assert concurrency(training, None, [{"CPU": 9.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 8.0}]) == 2
    with pytest.raises(UserError, match=r"needs 1 workers x 2 CPU \+ 1 GPU.*the nodes have 1 CPU \+ 8 GPU; 8 CPU"):
        concurrency(training, None, [{"CPU": 1.0, "GPU": 8.0}, {"CPU": 8.0}])


def test_more_trials_at_once_than_fit():
    with pytest.raises(UserError, match=r"concurrency = 3: .* room for 1 at a time; set --concurrency 1"):
        concurrency(TWO, 3, [{"CPU": 3.0}])


def test_a_full_disk_is_noticed_first(tmp_path):
    model = ModelConfig()
    with pytest.raises(UserError, match=r"storage: .* free, but 2 models .* lower --keep_models"):
        check_disk(model, tmp_path / "not_there_yet", models=2, free=1000)
    check_disk(model, tmp_path / "not_there_yet", models=2)
