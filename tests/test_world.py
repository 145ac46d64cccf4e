"""The procedural world: exact, seeded, and keeping its evaluation part back."""
import numpy as np
import pytest

from kiwi_edit.world import (COLORS, DIFFICULTIES, EVAL_PHOTOS, EVAL_SEED, HELD_OUT_PAIRS, SHAPES, STYLES, TASKS, TEXTURES, WORDINGS, Difficulty, Scene,
                             Thing, World, photo_crop, photo_paths, plate_reference, render, thing_reference)

MOVING = World()


@pytest.mark.parametrize("task", TASKS)
def test_sample_has_the_promised_shapes(task):
    q = World(48, 80, 5).sample(3, task)
    frames = 1 if task in ("isolate", "plate") else 5
    assert q.source.shape == q.target.shape == (frames, 48, 80, 3) and q.source.dtype == q.target.dtype == np.uint8
    assert q.mask.shape == (frames, 48, 80) and q.mask.dtype == bool
    assert (q.reference is not None) == (task in ("subject", "background"))
    assert q.task == task and q.instruction and q.caption and q.source_caption


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_quadruplet_and_another_seed_another(task):
    a, b, other = MOVING.sample(5, task), World().sample(5, task), MOVING.sample(6, task)
    assert np.array_equal(a.target, b.target) and a.instruction == b.instruction
    assert not np.array_equal(a.source, other.source)


@pytest.mark.parametrize("task", TASKS[:6])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_changes_outside_the_mask_and_something_inside(task, seed):
    q = MOVING.sample(seed, task)
    differs = (q.source != q.target).any(-1)
    assert not (differs & ~q.mask).any()
    if task in ("background", "style"): assert differs.any()


def test_most_edits_change_something():
    changed = [(q.source != q.target).any() for q in (MOVING.sample(seed, task) for task in TASKS[:6] for seed in range(40))]
    assert np.mean(changed) > .97  # a thing can be removed behind another


@pytest.mark.parametrize("task", ("subject", "background"))
def test_edits_of_a_scene_share_source_and_words_but_not_the_reference(task):
    edits = [MOVING.sample(9, task, edit=k) for k in range(4)]
    assert all(np.array_equal(e.source, edits[0].source) and e.instruction == edits[0].instruction for e in edits)
    assert len({e.target.tobytes() for e in edits}) == 4


def test_splits_share_no_seed_no_wording_and_no_photograph():
    with pytest.raises(ValueError, match="seed"): World(split="train").sample(EVAL_SEED)
    with pytest.raises(ValueError, match="seed"): World(split="eval").sample(EVAL_SEED - 1)
    assert not {p.name for p in photo_paths("train")} & set(EVAL_PHOTOS)
    assert {p.name for p in photo_paths("eval")} == set(EVAL_PHOTOS)
    for kind, lines in WORDINGS.items():
        assert not set(lines["train"]) & set(lines["eval"]), kind


def test_evaluation_words_are_all_known_from_training():
    words = lambda split: {w.strip(".,") for lines in WORDINGS.values() for line in lines[split] for w in line.lower().split()}
    assert words("eval") <= words("train")


def test_held_out_pairs_stay_out_of_training_in_look_and_target():
    world = World(32, 32, 1)
    named = [f"{'' if t == 'plain' else 'picture' if t == 'photo' else t} {s}".strip() for s, t in HELD_OUT_PAIRS if t not in ("plain",)]
    for seed in range(400):
        q = world.sample(seed)
        for name in named:
            texture, shape = name.split()
            for thing in (q.source_caption + ", " + q.caption).replace(" and ", ", ").split(", "):
                words = thing.split(" on ")[0].split()
                assert not (texture in words and shape in words), thing


def test_evaluation_shows_held_out_pairs():
    world = World(32, 32, 1, split="eval")
    captions = " ".join(world.sample(EVAL_SEED + i, "style").source_caption for i in range(60))
    assert "picture diamond" in captions


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_inside_its_square(shape):
    v, u = np.mgrid[-1.3:1.3:90j, -1.3:1.3:90j]
    inside = SHAPES[shape](u, v) < 0
    assert .15 < inside.mean() < .6
    assert not inside[np.maximum(abs(u), abs(v)) > 1.12].any()


@pytest.mark.parametrize("style", STYLES)
def test_styles_stay_in_range_and_change_the_picture(style):
    frames = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    styled = STYLES[style](frames)
    assert styled.shape == frames.shape and styled.min() >= -1 and styled.max() <= 256 and np.abs(styled - frames).mean() > 10


def test_a_reference_is_no_crop_of_the_target():
    rng = np.random.default_rng(0)
    thing = Thing("star", "plain", "red", size="large")
    target = render(Scene(np.full((82, 82, 3), 255, np.float32), "plain", (thing,)), 1, 64, 64)[0][0]
    views = [thing_reference(thing, np.random.default_rng(i)) for i in range(8)]
    assert len({v.shape for v in views}) > 4
    areas = [(v[..., 1] < 128).sum() for v in views]
    assert max(areas) > 1.3 * min(areas) and all(a != (target[..., 1] < 128).sum() for a in areas)
    plate = photo_crop(rng, 82, 82)
    assert np.array_equal(plate_reference(plate, np.random.default_rng(1), change=0.).shape, (80, 80, 3))


def test_motion_goes_along_the_path():
    thing = Thing("circle", "plain", "black", center=(.3, .5), path=(.4, 0.))
    frames = render(Scene(np.full((82, 82, 3), 255, np.float32), "plain", (thing,)), 5, 64, 64)[0]
    centers = [np.argwhere(f[..., 0] < 128).mean(0) for f in frames]
    assert np.allclose([c[1] for c in centers], [.3 * 64 - .5 + .1 * 64 * t for t in range(5)], atol=.3)
    assert np.allclose([c[0] for c in centers], 31.5, atol=.3)


def test_difficulty_is_a_setting_with_effect():
    calm = World(difficulty=Difficulty(max_objects=1, photo_backgrounds=0., photo_objects=0., motion=0.))
    for seed in range(10):
        q = calm.sample(seed, "style")
        assert np.array_equal(q.source[0], q.source[-1]) and "photo" not in q.source_caption and "picture" not in q.source_caption and " and " not in q.source_caption
    assert MOVING.sample(0).meta["difficulty"] == "full"


@pytest.mark.parametrize("bad", (dict(split="test"), dict(difficulty="hard"), dict(height=8), dict(num_frames=0)))
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): World(**bad)


@pytest.mark.parametrize("bad", (dict(motion=1.5), dict(motion=-.1), dict(max_objects=0)))
def test_a_world_that_cannot_be_drawn_is_named(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` has to be"): Difficulty(**bad)


@pytest.mark.parametrize("size", ((16, 16, 2), (64, 64, 5), (40, 100, 3)))
def test_the_camera_stays_on_the_plate_at_the_most_motion(size):
    wild = World(*size, difficulty=Difficulty(motion=4 / 3))
    for seed in range(60): wild.sample(seed)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="task.*'recolor'"): MOVING.sample(0, "recolor")
