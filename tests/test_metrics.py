"""The metrics on clips whose scores are known."""

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from kiwi_edit.eval.clips import CLIP_METRICS, DAMAGES, measure_clip, reference_match, set_distance
from kiwi_edit.eval.clips import _DISTANCES, _frechet_distance, _gaussian_kl, _kernel_distance, _optical_flow
from kiwi_edit.metrics import (
    PerceptualFeatures,
    bootstrap,
    done_share,
    edit_box,
    edit_done,
    feature_distance,
    nearest,
    perceptual_features,
    pooled_share,
    psnr,
    psnr_from_error,
    share_interval,
    sharpness_share,
    squared_error,
)
from kiwi_edit.world import EVAL_SEED, World


@pytest.fixture(scope="module")
def samples():
    world = World(32, 32, split="eval")
    return [
        world.sample(EVAL_SEED + i, task)
        for i, task in enumerate(("subject", "background", "add", "remove", "change", "style"))
    ]


def stacked(samples):
    return [np.stack([getattr(s, name) for s in samples]) for name in ("source", "target", "mask")]


def test_copying_is_exactly_zero_and_the_target_exactly_one(samples):
    source, target, mask = stacked(samples)
    assert edit_done(source, source, target, mask).tolist() == [0.0] * 6
    assert edit_done(target, source, target, mask).tolist() == [1.0] * 6


def test_halfway_is_three_quarters(samples):
    source, target, mask = stacked(samples)
    half = (source.astype(np.float64) + target) / 2
    np.testing.assert_allclose(edit_done(half, source, target, mask), 0.75, atol=1e-5)


def test_going_the_wrong_way_is_below_zero(samples):
    source, target, mask = stacked(samples)
    assert (edit_done(2.0 * source - target, source, target, mask) < -2.9).all()  # twice as far: 1 - 4


def test_only_the_inside_counts(samples):
    s = samples[0]
    broken = np.where(s.mask[..., None], s.target, 255 - s.target).astype(np.uint8)
    assert edit_done(broken, s.source, s.target, s.mask) == 1 and psnr(broken, s.source, ~s.mask) < 20
    broken = np.where(s.mask[..., None], 255 - s.source, s.source).astype(np.uint8)
    assert np.isinf(psnr(broken, s.source, ~s.mask)) and edit_done(broken, s.source, s.target, s.mask) < 1


def test_a_batch_is_its_clips_one_by_one(samples):
    source, target, mask = stacked(samples)
    noisy = np.clip(target + np.random.default_rng(0).normal(0, 20, target.shape), 0, 255).astype(np.uint8)
    alone = [edit_done(noisy[i], source[i], target[i], mask[i]) for i in range(6)]
    np.testing.assert_allclose(edit_done(noisy, source, target, mask), alone, rtol=1e-12)
    np.testing.assert_allclose(psnr(noisy, source, ~mask)[:5], [psnr(noisy[i], source[i], ~mask[i]) for i in range(5)])


def test_unsigned_bytes_do_not_wrap():
    a, b = np.full((1, 2, 2, 3), 250, np.uint8), np.full((1, 2, 2, 3), 5, np.uint8)
    assert squared_error(a, b) == squared_error(b, a) == 245**2


def test_a_sample_without_an_edit_is_refused(samples):
    source, target, mask = stacked(samples)
    target[2] = source[2]
    with pytest.raises(ValueError, match="1 of 6 samples have nothing to edit"):
        edit_done(source, source, target, mask)
    with pytest.raises(ValueError, match="nothing to edit"):
        edit_done(source[0], source[0], target[0], np.zeros_like(mask[0]))  # empty mask
    with pytest.raises(ValueError, match="nothing to edit"):
        done_share(1.0, 0.0)


def test_shapes_are_checked(samples):
    s = samples[0]
    with pytest.raises(ValueError, match="of one size"):
        squared_error(s.source, s.source[:, :16])
    with pytest.raises(ValueError, match="of one size"):
        squared_error(s.source[0], s.source[0])
    with pytest.raises(ValueError, match="`mask` has to be bool"):
        squared_error(s.source, s.target, s.mask.astype(np.uint8))
    with pytest.raises(ValueError, match="`mask` has to be bool"):
        squared_error(s.source, s.target, s.mask[:2])


def test_psnr_in_decibels():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(a, a + 1) == pytest.approx(48.1308, abs=1e-3)
    assert psnr(a, a + 10) == pytest.approx(28.1308, abs=1e-3)
    assert np.isinf(psnr(a, a)) and psnr_from_error(255.0**2) == pytest.approx(0, abs=1e-9)


def test_nothing_outside_is_nan_not_a_number_of_decibels(samples):
    style = samples[5]
    assert style.mask.all() and np.isnan(psnr(style.target, style.source, ~style.mask))


def test_pooled_weighs_by_what_there_is_to_do():
    error, distance = np.array([60.0, 60.0]), np.array([6000.0, 20.0])
    assert pooled_share(error, distance) == pytest.approx(1 - 120 / 6020)
    assert done_share(error, distance).mean() == pytest.approx((0.99 - 2) / 2)


def test_nearest_finds_the_own_target_and_looks_only_where_candidates_differ():
    world = World(32, 32, split="eval")
    targets = np.stack([world.sample(EVAL_SEED + 4, "subject", edit=k).target for k in range(8)])
    assert [nearest(t, targets) for t in targets] == list(range(8))
    where = (targets != targets[0]).any((0, -1))
    assert 0 < where.mean() < 0.5 and all((targets[k] == targets[0])[~where].all() for k in range(8))
    hazy = np.where(where[..., None], 0.8 * targets[3] + 0.2 * world.sample(EVAL_SEED + 4, "subject").source, 0).astype(
        np.uint8
    )
    assert nearest(hazy, targets) == 3


def test_noise_is_told_apart_about_by_chance():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 256, (8, 1, 16, 16, 3), dtype=np.uint8)
    answers = [nearest(rng.integers(0, 256, targets.shape[1:], dtype=np.uint8), targets) == k % 8 for k in range(400)]
    assert 0.06 < np.mean(answers) < 0.2


def test_nearest_refuses_what_has_no_answer():
    same = np.zeros((3, 1, 4, 4, 3), np.uint8)
    for candidates in (same, same[:1]):
        with pytest.raises(ValueError, match="have to differ"):
            nearest(same[0], candidates)


def test_bootstrap_holds_what_it_says():
    rng = np.random.default_rng(1)
    covered = [
        low <= 0.5 <= high
        for low, high in (bootstrap(rng.normal(0.5, 1, 40), resamples=300, seed=i) for i in range(200))
    ]
    assert 0.88 < np.mean(covered) < 0.99
    assert bootstrap(np.ones(5)) == (1.0, 1.0)
    assert bootstrap(np.arange(9.0)) == bootstrap(np.arange(9.0))


def test_bootstrap_keeps_rows_together():
    distance = np.geomspace(1, 1000, 30)
    low, high = bootstrap(0.4 * distance, distance, statistic=lambda e, d: 1 - e.sum() / d.sum())
    assert low == pytest.approx(0.6) and high == pytest.approx(0.6)


def test_wilsons_interval_has_known_values():
    assert share_interval(np.zeros(10)) == pytest.approx((0, 0.2775), abs=1e-4)
    assert share_interval(np.ones(10)) == pytest.approx((0.7225, 1), abs=1e-4)
    assert share_interval(np.arange(10) < 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_bootstrap_is_checked():
    with pytest.raises(ValueError, match="one length above 0"):
        bootstrap(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="one length above 0"):
        bootstrap(np.ones(0))


# what a blur costs


@pytest.fixture(scope="module")
def textured():
    "A clip with edges and texture, and the middle of it as a mask."
    clip = np.kron(np.random.default_rng(5).integers(0, 256, (2, 16, 16, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    clip[:, :32] = clip[:, :32] // 8 + 100  # the upper half is nearly flat
    mask = np.zeros(clip.shape[:3], bool)
    mask[:, 8:56, 8:56] = True
    return clip, mask


def test_sharpness_is_one_for_the_target_alone(textured):
    clip, mask = textured
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 25, clip.shape)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in clip]).astype(float)
    shares = {
        name: sharpness_share(frames.clip(0, 255).astype(np.uint8), clip, mask)
        for name, frames in dict(
            target=clip,
            shifted=np.roll(clip, 1, 2),
            unseen=clip + rng.normal(0, 1.5, clip.shape),
            blur=soft,
            grainy_blur=soft + grain,
            noise=rng.integers(0, 256, clip.shape),
            flat=np.full_like(clip, 128),
        ).items()
    }
    assert shares["target"] == 1 and shares["flat"] == 0
    assert shares["shifted"] > 0.6 and shares["unseen"] > 0.9
    assert max(shares["blur"], shares["grainy_blur"], shares["noise"]) < 0.4


def test_sharpness_looks_inside_and_is_taken_clip_by_clip(textured):
    clip, mask = textured
    broken = np.where(mask[..., None], clip, 255 - clip[:, ::-1])
    assert sharpness_share(broken, clip, mask) == 1
    half = (clip // 2 + 60).astype(np.uint8)
    together = sharpness_share(np.stack([clip, half]), np.stack([clip, clip]), np.stack([mask, mask]))
    assert together.tolist() == [1, sharpness_share(half, clip, mask)]
    assert together[1] == pytest.approx(0.25, abs=0.03)  # half the contrast, a quarter of the energy


def test_sharpness_beside_a_flat_target(textured):
    clip, mask = textured
    flat = np.full_like(clip, 100)
    assert sharpness_share(flat, flat, mask) == 1 and sharpness_share(clip, flat, mask) == 0
    # grain that nobody sees
    assert sharpness_share(flat + np.random.default_rng(0).integers(0, 3, flat.shape, np.uint8), flat, mask) == 1


def test_features_are_compared_where_the_mask_is():
    x = torch.nn.functional.normalize(torch.randn(3, 8, 4, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    y = x.clone()
    y[:, :, :, 3:] *= -1
    mask = np.zeros((3, 8, 12), bool)
    mask[..., :6] = True
    assert feature_distance([x], [x]) == pytest.approx(0, abs=1e-6)
    assert [float(feature_distance([x], [y], m)) for m in (mask, ~mask, None)] == pytest.approx([0, 2, 1], abs=1e-6)
    assert feature_distance([x, x], [torch.stack([x, y]), torch.stack([x, x])], ~mask) == pytest.approx(
        [0, 1], abs=1e-6
    )


@pytest.mark.parametrize(
    "height, width, at, box",
    [
        (96, 96, (40, 60, 30, 50), ((37, 63), (27, 53))),  # 21 pixels and a quarter more
        (96, 96, (0, 3, 90, 95), ((0, 24), (72, 96))),  # not below a quarter of the frame, moved in at the rim
        (48, 96, (0, 47, 0, 95), ((0, 48), (0, 96))),  # as far as the frame goes
    ],
)
def test_the_box_of_an_edit(height, width, at, box):
    mask = np.zeros((2, height, width), bool)
    mask[0, at[0], at[2]] = mask[1, at[1], at[3]] = True  # it moves
    assert [(s.start, s.stop) for s in edit_box(mask)] == list(box)


@pytest.fixture(scope="module")
def network():
    found = perceptual_features()
    if found is None:
        pytest.skip("the extra `eval` is not installed")
    return found


def test_a_blur_is_farther_than_a_shift_and_grain_on_it_farther_still(network):
    from skimage.data import astronaut

    picture = np.asarray(PIL.Image.fromarray(astronaut()[:256, 100:356]).resize((96, 96), PIL.Image.LANCZOS))
    rng, soft = np.random.default_rng(0), cv2.GaussianBlur(picture, (0, 0), 2)
    grain = rng.normal(0, 12, picture.shape)
    faults = [
        picture,
        picture.astype(float) * 1.05,
        np.roll(picture, 1, 1),
        picture + grain,
        soft,
        soft + grain,
        np.full_like(picture, picture.mean((0, 1))),
    ]
    clips = np.stack([f.clip(0, 255).astype(np.uint8)[None] for f in faults])
    found = network.distance(clips, picture[None])
    same, brighter, shifted, grainy, blurred, both, flat = found
    assert same == pytest.approx(0, abs=1e-5) and brighter < 0.05
    assert shifted < 0.5 * blurred and grainy < blurred < both < 1.2 * flat
    noise = rng.integers(0, 256, picture[None].shape, np.uint8)
    assert network.distance(noise, picture[None]) > 2 * blurred


def test_features_are_those_of_each_frame_alone(network, textured):
    clip, mask = textured
    whole = network.features(np.stack([clip, 255 - clip]))
    assert [tuple(layer.shape[:2]) for layer in whole] == [(2, 2)] * 5
    for layer, alone in zip(whole, network.features(clip[1:])):
        torch.testing.assert_close(layer[0, 1], alone[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.norm(dim=2), torch.ones_like(layer[:, :, 0]))
    with pytest.raises(ValueError, match="`frames` have to be uint8"):
        network.features(clip / 255)


def test_pictures_as_vectors(network):
    from skimage.data import astronaut, coffee

    small = np.asarray(PIL.Image.fromarray(astronaut()).resize((120, 90)))
    vectors = network.embed([astronaut(), small, coffee()])
    assert vectors.shape == (3, 192) and np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]


def test_weights_are_read_as_data_only(network, monkeypatch):
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs) or load(*args, **kwargs))
    PerceptualFeatures()
    assert asked == [dict(weights_only=True)]


def test_nothing_is_loaded_where_the_extra_is_missing(monkeypatch):
    monkeypatch.setattr("kiwi_edit.metrics.find_spec", lambda name: None)
    assert perceptual_features.__wrapped__() is None


# two sets of pictures


def test_distances_of_sets_have_known_values():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (3000, 4))
    for distance in _DISTANCES.values():
        assert distance(a, a) == pytest.approx(0, abs=0.01)
    assert _frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4)
    with pytest.raises(ValueError, match="`b` has to hold finite features .N, d. of 4 pictures or more"):
        set_distance(a, a[:3])
    assert _frechet_distance(a, a * 3 + 2) == pytest.approx(4 * (4 + 4), rel=0.05)
    assert _gaussian_kl(a * 2, a, ridge=0) == pytest.approx(4 * (4 - 1 - np.log(4)) / 2, rel=0.05)
    x, y = a[:40], a[40:90] + 1
    slow = lambda p, q: np.array([[(u @ v / 4 + 1) ** 3 for v in q] for u in p])
    within = lambda p: (slow(p, p).sum() - np.trace(slow(p, p))) / (len(p) * (len(p) - 1))
    assert _kernel_distance(x, y) == pytest.approx(within(x) + within(y) - 2 * slow(x, y).mean())


def test_a_set_distance_names_what_it_measured():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (60, 40)) + 0.5, rng.normal(0, 1, (80, 40))
    found = set_distance(a, b, ("made", "photographed"), "noise", dims=8, resamples=20)
    assert found.sizes == (60, 80) and found.dims == 8
    assert all(low < value < high for value, low, high in found.values.values())  # also the divergence's
    assert all(found.values[name][0] > found.floor[name] for name in ("frechet", "kl"))
    text = found._repr_markdown_()
    assert "made" in text and "noise, 8 numbers" in text and text.count("| frechet |") == 1
    again = set_distance(a, b, ("made", "photographed"), "noise", dims=8, resamples=20)
    assert again == found


@pytest.mark.parametrize(
    "a, b",
    [
        (np.zeros((1, 3)), np.zeros((5, 3))),
        (np.zeros((5, 3)), np.full((5, 3), np.nan)),
        (np.zeros((5, 3)), np.zeros((5, 4))),
        (np.zeros(5), np.zeros((5, 3))),
    ],
)
def test_features_that_are_no_sets_are_refused(a, b):
    with pytest.raises(ValueError, match="has to hold finite features"):
        set_distance(a, b)


# clips without a target


def clip_of_noise(frames=9, side=48):
    "A textured picture that slides by a pixel a frame."
    big = cv2.resize(
        np.random.default_rng(3).integers(0, 256, (20, 20, 3), np.uint8),
        (side + frames, side + frames),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.stack([big[t : t + side, t : t + side] for t in range(frames)])


@pytest.mark.parametrize(
    "fault, number, sign",
    [
        ("flicker", "flicker", 1),
        ("flicker", "warp_error", 1),
        ("slide", "shift", 1),
        ("freeze", "frozen", 1),
        ("freeze", "motion", -1),
        ("blur", "sharpness", -1),
    ],
)
def test_a_fault_moves_the_number_that_names_it(fault, number, sign):
    source = clip_of_noise()
    good, bad = measure_clip(source, source), measure_clip(DAMAGES[fault](source), source)
    assert sign * (bad[number] - good[number]) > 0.03
    assert list(good) == list(CLIP_METRICS)


def test_a_clip_is_measured_at_the_size_and_frames_that_are_asked_for():
    source = clip_of_noise(9, 96)
    small = np.stack([cv2.resize(f, (48, 48), interpolation=cv2.INTER_AREA) for f in source])
    whole = measure_clip(DAMAGES["flicker"](source), source, side=48)
    shrunk = measure_clip(
        np.stack([cv2.resize(f, (48, 48), interpolation=cv2.INTER_AREA) for f in DAMAGES["flicker"](source)]), small
    )
    assert whole == pytest.approx(shrunk, nan_ok=True)
    assert measure_clip(source[:1], source[:1])["psnr_outside"] == np.inf
    assert np.isnan(measure_clip(source[:1], source[:1])["flicker"])
    with pytest.raises(ValueError, match="`edited` has to be uint8"):
        measure_clip(source[:3], source)
    with pytest.raises(ValueError, match="`mask`"):
        measure_clip(source, source, mask=np.ones(source.shape[:3]))


@pytest.mark.parametrize("height, width", [(16, 256), (31, 256), (12, 48), (8, 8), (256, 5), (1, 1)])
def test_flow_of_thin_and_of_small_clips(height, width):
    "OpenCV crashes on some of these by itself."
    wide = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (height, width + 4, 3)).astype(np.uint8), (0, 0), 2
    )
    clip = np.stack([wide[:, 2 * t : 2 * t + width] for t in range(3)])
    flow = _optical_flow(clip)
    assert flow.shape == (2, height, width, 2)
    if width == 256:
        assert np.median(flow[..., 0]) == pytest.approx(-2, abs=0.3) and measure_clip(clip, clip)["frozen"] == 0


def test_an_embedder_sees_what_came_in():
    seen = []

    class Embedder:
        def embed(self, images):
            seen.extend(images)
            return np.eye(2)[[0, 0]]

    source = np.zeros((2, 20, 20, 3), np.uint8)
    edited, region = source.copy(), np.zeros((2, 20, 20), bool)
    edited[1, 5:9, 3:11] = 200
    region[1, 5:9, 3:11] = True
    reference = np.full((7, 7, 3), 200, np.uint8)
    assert reference_match(edited, source, reference, region, Embedder()) == 1
    assert seen[0].shape == (4, 8, 3) and (seen[0] == 200).all() and seen[1] is reference
    for colour in (
        (255, 0, 0),
        (0, 0, 255),
        (240, 140, 30),
        (0, 255, 0),
        (255, 255, 255),
        (0, 0, 0),
    ):  # the most saturated ones, too
        new, plain = np.full_like(source, 127), np.full((7, 7, 3), colour, np.uint8)
        new[region] = colour
        assert reference_match(new, np.full_like(source, 127), plain, region) > 0.98, colour
    assert reference_match(edited, source, reference, region) > 0.9
    assert np.isnan(reference_match(edited, source, reference, ~region & False))
