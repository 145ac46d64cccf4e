"Watching attention: the shares are right, nothing is changed by looking, and what is taken away is gone."

import numpy as np
import pytest
import torch
from PIL import Image

from kiwi_edit.attention import (
    PARTS,
    Looks,
    attention_shares,
    draw_looks,
    lay_over,
    _recording,
    spread,
    watch_edit,
    without,
)
from kiwi_edit.core import preset
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.guidance import KiwiAttnProcessor, attend, find_wan
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.video import as_frames


def random_pipe(**guidance):
    torch.manual_seed(0)
    sizes = preset("tiny")
    sizes.guidance.update(guidance)
    made = KiwiEditPipeline.from_preset(sizes, make_tokenizer(["make it snow"], vocab_size=512))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe():
    return random_pipe()


@pytest.fixture(scope="module")
def clip():
    t, y, x = np.mgrid[0:5, 0:48, 0:64][..., None]
    return ((x + 2 * y + 4 * t) * np.array([3, 5, 7]) % 256).astype(np.uint8)


RED, BLUE = Image.new("RGB", (20, 30), "red"), Image.new("RGB", (30, 20), "blue")


def run(pipe, clip, reference=RED, **options):
    return as_frames(
        pipe(
            "make it snow",
            video=clip,
            reference=reference,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            **options,
        ).frames[0]
    )


def test_shares_are_those_of_attention_itself():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(9, 3, 4, generator=generator), torch.randn(6, 3, 4, generator=generator)
    mask = torch.tensor([True, True, False, True, True, False])
    value = torch.eye(6)[:, None].expand(6, 3, 6)  # attending to unit vectors gives the weights
    weights = attend(query[None], key[None], value[None], mask[None, None, None])[0].mean(1)
    for most in (2**24, 20):
        groups, received = attention_shares(query, key, [slice(0, 2), slice(2, 6)], mask, most)
        torch.testing.assert_close(groups, torch.stack([weights[:, :2].sum(1), weights[:, 2:].sum(1)]))
        torch.testing.assert_close(received, weights.mean(0))
        assert received[~mask].abs().max() == 0


def test_looking_changes_nothing(pipe, clip):
    plain = run(pipe, clip)
    with _recording(pipe) as recorder:
        watched = run(pipe, clip)
    assert np.array_equal(plain, watched) and np.array_equal(plain, run(pipe, clip))
    assert all(
        type(attn.processor) is KiwiAttnProcessor
        for block in find_wan(pipe.transformer).blocks
        for attn in (block.attn1, block.attn2)
    )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (
            pipe.guidance.connector,
            pipe.guidance.ref_connector,
            pipe.guidance.ref_embedder,
            pipe.transformer.patch_embedding,
            pipe.transformer.condition_embedder,
        )
    )
    assert len(recorder.looks().timesteps) == 2


def test_an_edit_that_fails_leaves_the_pipeline_as_it_was(pipe, clip):
    with pytest.raises(RuntimeError, match="enough"):
        with _recording(pipe):

            def stop(*_):
                raise RuntimeError("enough")

            run(pipe, clip, callback_on_step_end=stop)
    assert all(
        type(attn.processor) is KiwiAttnProcessor
        for block in pipe.transformer.blocks
        for attn in (block.attn1, block.attn2)
    )
    with _recording(pipe) as recorder:
        pass
    with pytest.raises(ValueError, match="`recorder` has to have seen an edit"):
        recorder.looks()


@pytest.mark.parametrize("references, features", [([], 0), ([RED], 1), ([RED, BLUE], 2)])
def test_shapes_and_sums(pipe, clip, references, features):
    edited, looks = watch_edit(pipe, "make it snow", clip, references or None, steps=2)
    grid, layers = (5, 6, 8), pipe.transformer.config.num_layers
    r = len(references)
    assert looks.reference.shape == (2, layers, r, *grid) and looks.places.shape == (2, layers, r, *grid[1:])
    assert looks.features.shape == (2, layers, *grid)
    assert looks.tokens.shape[2] - looks.num_features == len(looks.queries) == pipe.guidance.config.num_ref_queries
    assert (looks.num_features > 0) == bool(r)
    np.testing.assert_allclose(looks.tokens.sum(2), 1, atol=1e-5)
    np.testing.assert_allclose(
        looks.features.mean((2, 3, 4)), looks.tokens[:, :, : looks.num_features].sum(2), atol=1e-5
    )
    np.testing.assert_allclose(looks.reference.mean((3, 4, 5)), looks.places.sum((3, 4)), atol=1e-5)
    assert looks.timesteps[0] > looks.timesteps[1] and 0 <= looks.summary()["reference"] < 1
    pictures = [np.asarray(image.resize((64, 48))) for image in references]
    draw_looks(looks, clip, edited, pictures).savefig(__import__("io").BytesIO())


def test_maps_say_who_looks_at_the_reference(pipe, clip):
    "Keys of the reference that are made to match what one token asks are looked at by that token."
    with _recording(pipe) as recorder:
        run(pipe, clip)
    query, key = torch.zeros(288, 2, 8), torch.zeros(288, 2, 8)
    query[10], key[240:] = 10, 10  # frame 0, row 1, column 2 of a grid of 6x6x8
    recorder.saw(0, True, query, key, None)
    shares, places = recorder.seen[1][0, True]
    assert shares.shape == (1, 5, 6, 8) and shares[0, 0, 1, 2] > 0.99
    assert np.delete(shares.ravel(), 10) == pytest.approx(1 / 6, abs=1e-5)
    assert places.shape == (1, 6, 8)


def test_windows_are_refused(pipe, clip):
    with _recording(pipe), pytest.raises(ValueError, match="comes in windows"):
        run(pipe, np.concatenate([clip] * 4), num_frames=17)


def test_a_second_edit_is_refused(pipe, clip):
    with _recording(pipe):
        run(pipe, clip)
        with pytest.raises(ValueError, match="or is the second"):
            run(pipe, clip)


def test_layers_that_a_step_cache_leaves_out_look_as_in_the_step_before(pipe, clip):
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # all but the first block, after the first step
    try:
        _, looks = watch_edit(pipe, "make it snow", clip, RED, steps=3)
    finally:
        pipe.transformer.disable_cache()
    assert looks.reference.shape[:2] == (3, pipe.transformer.config.num_layers)
    for maps in (looks.reference, looks.features, looks.tokens):
        assert np.array_equal(maps[1, 1:], maps[0, 1:]) and not np.array_equal(maps[1, 0], maps[0, 0])


def test_steps_may_share_a_rounded_timestep(clip):
    rounded = random_pipe(round_timestep=True)
    with _recording(rounded) as recorder:
        run(rounded, clip, sigmas=[1.0, 0.999, 0.5])
    looks = recorder.looks()
    assert len(looks.reference) == 3 and looks.timesteps[0] == looks.timesteps[1] > looks.timesteps[2]


@pytest.mark.parametrize(
    "reference, parts, features, queries",
    [
        (RED, [], True, 12),
        (RED, ["tokens"], True, 12),
        (RED, ["tokens", "features"], True, 12),
        (None, [], False, 8),
        (None, ["queries"], False, 8),
    ],
)
def test_queries_of_each_mode(clip, reference, parts, features, queries):
    "A model that has 4 queries for images, 8 for clips and 12 where there is a reference."
    modes = random_pipe(num_image_queries=4, num_video_queries=8, num_ref_queries=12)
    with _recording(modes) as recorder:
        run(without(modes, *parts), clip, reference)
    looks = recorder.looks()
    assert len(looks.queries) == queries and (looks.num_features > 0) == features
    if reference is None:
        with _recording(modes) as recorder:
            run(modes, clip[:1], None)
        assert len(recorder.looks().queries) == 4


def test_what_is_taken_away_does_not_count(pipe, clip):
    full = run(pipe, clip)
    both = run(without(pipe, "tokens", "features"), clip), run(without(pipe, "tokens", "features"), clip, BLUE)
    assert not np.array_equal(full, run(pipe, clip, BLUE)), "the reference counts"
    with _recording(pipe) as recorder:
        run(without(pipe, "tokens", "features"), clip)
    looks = recorder.looks()
    assert looks.reference.shape[2] == 0 and looks.features.max() == 0
    assert not np.array_equal(both[0], full)
    assert np.array_equal(full, run(pipe, clip)), "the pipeline is as it was"
    for part in PARTS:
        assert not np.array_equal(run(without(pipe, part), clip), full), part


def test_single_queries(pipe, clip):
    with _recording(pipe) as recorder:
        run(without(pipe, 0, 5), clip)
    queries = recorder.looks().queries
    assert queries[0] == queries[5] == 0 and (np.delete(queries, [0, 5]) > 0).all()
    with _recording(pipe) as recorder:
        run(without(pipe, "queries"), clip)
    assert recorder.looks().queries.max() == 0
    with pytest.raises(ValueError, match="numbers of queries from 0 to 15 but has 16"):
        run(without(pipe, 16), clip)


def test_without_anything_in_the_context_attention_sees_zeros(pipe, clip):
    other = without(pipe, "queries")
    context, mask = other.encode_prompt(["make it snow"], clip)
    assert context.abs().max() == 0 and mask.all()
    assert np.isfinite(run(other, clip, None).astype(float)).all()


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_every_reference_is_drawn(count):
    looks = Looks(
        [900, 500],
        np.full((2, 3, count, 2, 4, 5), 0.1),
        np.full((2, 3, count, 4, 5), 0.1),
        np.zeros((2, 3, 2, 4, 5)),
        np.full((2, 3, 8), 0.125),
        0,
    )
    frames = np.zeros((5, 32, 40, 3), np.uint8)
    figure = draw_looks(looks, frames, frames, [frames[0]] * count)
    assert sum(ax.get_title() == "what is looked at" for ax in figure.axes) == count


def test_maps_lie_on_the_frames_that_a_token_stands_for():
    maps = np.arange(3.0)[:, None, None] * np.ones((3, 2, 2))
    assert spread(maps, (9, 6, 8)).mean((1, 2)).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert spread(maps[:1], (1, 6, 8)).shape == (1, 6, 8)
    laid = lay_over(np.full((1, 4, 4, 3), 90, np.uint8), np.zeros((1, 4, 4)))
    assert laid.dtype == np.uint8 and laid.shape == (1, 4, 4, 3)
