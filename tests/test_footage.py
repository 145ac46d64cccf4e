"Masks that follow what they lie on, against the exact ones of the procedural world."

import numpy as np
import pytest

from kiwi_edit.footage import follow_mask
from kiwi_edit.world import EVAL_SEED, World


def overlap(mask, exact):
    return (mask & exact)[1:].sum() / (mask | exact)[1:].sum()


@pytest.mark.parametrize("difficulty, num_frames, least", [("easy", 5, 0.75), ("full", 5, 0.5), ("full", 17, 0.5)])
def test_a_mask_follows_better_than_it_stands_still(difficulty, num_frames, least):
    world = World(num_frames=num_frames, split="eval", difficulty=difficulty)
    found = []
    for seed in range(12):
        sample = world.sample(EVAL_SEED + seed, task="remove")
        followed = follow_mask(iter(sample.source), sample.mask[0])
        assert followed.dtype == bool and followed.shape == sample.mask.shape
        assert np.array_equal(followed[0], sample.mask[0])
        still = sample.mask[:1].repeat(num_frames, 0)
        found.append((overlap(followed, sample.mask), overlap(still, sample.mask)))
    with_flow, alone = np.transpose(found)
    assert with_flow.mean() > max(least, alone.mean() + 0.05) and (with_flow > alone).mean() > 0.7


def test_a_mask_goes_where_a_picture_goes():
    rng = np.random.default_rng(0)
    plate = np.kron(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    frames = np.stack([plate[40 - 2 * t : 120 - 2 * t, 48 - 3 * t : 144 - 3 * t] for t in range(6)])
    mask = np.zeros((80, 96), bool)
    mask[20:50, 20:60] = True
    for t, found in enumerate(follow_mask(frames, mask)):
        assert overlap(found[None].repeat(2, 0), np.roll(mask, (2 * t, 3 * t), (0, 1))[None].repeat(2, 0)) > 0.9


def test_a_clip_that_stands_still_keeps_its_mask():
    frames = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8).repeat(5, 0)
    mask = np.random.default_rng(1).random((48, 64)) > 0.5
    assert all(np.array_equal(found, mask) for found in follow_mask(frames, mask))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`mask` has to be \(48, 64\), as the frames, but is \(64, 48\)"):
        follow_mask(np.zeros((2, 48, 64, 3), np.uint8), np.ones((64, 48), bool))
