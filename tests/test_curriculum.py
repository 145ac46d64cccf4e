"""The stages as data."""
import pytest

from kiwi_edit.curriculum import STAGES
from kiwi_edit.training import PARTS
from kiwi_edit.world import TASKS


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_stage_is_consistent(stage):
    assert STAGES[stage.name] is stage and stage.minutes > 0 and 0 < stage.lr < .01 and 0 <= stage.floor <= 1
    assert set(stage.trains) <= PARTS.keys() and set(stage.lr_scales) <= set(stage.trains)
    assert bool(stage.buckets) == ("transformer" in stage.trains)
    if stage.buckets: assert sum(b.weight for b in stage.buckets) == pytest.approx(1)
    for bucket in stage.buckets:
        assert set(bucket.tasks) <= set(TASKS) and sum(bucket.tasks.values()) == pytest.approx(1)
        assert bucket.num_frames % 4 == 1 and bucket.height % 8 == bucket.width % 8 == 0 and bucket.height * bucket.width <= 64 * 64
        assert bucket.samples >= bucket.batch_size
        reference = set(bucket.tasks) & {"subject", "background"}
        assert not reference or reference == set(bucket.tasks)  # a batch has references or has none


def test_every_task_of_the_bench_is_trained_on_clips():
    for stage in (STAGES["reference"],):
        assert {task for b in stage.buckets if b.num_frames == 5 for task in b.tasks} == set(TASKS[:6])


def test_stages_come_in_the_order_in_which_they_are_run():
    assert list(STAGES) == ["autoencoder-image", "autoencoder-video", "autoencoder-motion", "autoencoder-decoder", "encoder", "image", "video", "reference"]
