"The whole edit on a small random model: arguments, sizes, determinism, saving and loading."

import copy
import io
import json

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import save_file

from kiwi_edit import pipeline as module
from kiwi_edit.core import InputError, preset
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.guidance import KiwiGuidance
from kiwi_edit.pipeline import (
    Footage,
    KiwiEditPipeline,
    composite,
    decode_latents,
    encode_frames,
    fit_reference,
    flow_sigmas,
)
from kiwi_edit.video import as_frames, read_image, read_video, write_video
from kiwi_edit.weights import checkpoints

PROMPT = "Replace the red fox with the object in the reference."


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = KiwiEditPipeline.from_preset("tiny", make_tokenizer([PROMPT], 400))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():  # its matte says that all of a clip changes
        matte_says(pipe, 30.0)
    return pipe


def matte_says(pipe, logits):
    for p, value in zip(pipe.transformer.proj_out.parameters(), (0.0, torch.as_tensor(logits))):
        p.data[pipe.vae.config.z_dim :] = value


def clip(frames=5, height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def picture(width=40, height=60, seed=1):
    return Image.fromarray(clip(1, height, width, seed)[0])


def edit(pipe, prompt=PROMPT, video=None, reference=None, seed=0, **kwargs):
    kwargs = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    } | kwargs
    return pipe(prompt, clip() if video is None else video, reference, **kwargs).frames


# results


def test_forms_of_the_result(pipe):
    latents = edit(pipe)
    assert latents.shape == (1, pipe.vae.config.z_dim, 5, 8, 8)
    frames = edit(pipe, output_type="np")
    assert frames.shape == (1, 5, 64, 64, 3) and frames.dtype == np.float32 and 0 <= frames.min()
    assert 0.5 < frames.max() <= 1
    exact = decode_latents(pipe.vae, latents)
    assert np.array_equal(as_frames(frames[0]), exact[0])
    images = pipe(PROMPT, clip(), num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames[0]
    assert [image.size for image in images] == [(64, 64)] * 5 and np.array_equal(np.asarray(images[3]), exact[0, 3])
    tensor = edit(pipe, output_type="pt")
    assert tensor.shape == (1, 5, 3, 64, 64) and 0 <= tensor.min() and tensor.max() <= 1
    as_tuple = pipe(PROMPT, clip(), num_inference_steps=1, output_type="latent", return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == latents.shape


def test_the_source_shows_where_the_matte_says_so(pipe):
    source, logits = clip(9), torch.linspace(-6, 6, 64)  # of the 8x8 pixels behind each place
    given = dict(video=source, num_frames=9, output_type="np", seed=4)
    whole = as_frames(edit(pipe, **given)[0]).astype(float)
    try:
        matte_says(pipe, -30.0)
        assert np.array_equal(as_frames(edit(pipe, **given)[0]), source)
        matte_says(pipe, logits)
        mixed = as_frames(edit(pipe, **given)[0])
        share = np.tile(logits.sigmoid().view(1, 8, 8, 1).numpy(), (1, 8, 8, 1))
        assert np.abs(mixed - (share * whole + (1 - share) * source)).max() <= 0.51
        assert np.array_equal(np.concatenate(list(edit(pipe, **given | dict(output_type="stream"))[0])), mixed)
        guided = as_frames(edit(pipe, **given, guidance_scale=2.0, negative_prompt="no")[0])
        assert np.abs(guided[:, ::8, ::8].astype(float) - source[:, ::8, ::8]).max() <= 1, "pixels that hardly change"
        long = edit(pipe, video=clip(21), num_frames=21, output_type="np")[0]  # in windows
        rows = np.s_[:, ::8, ::8]  # their first pixels keep the source
        assert np.abs(as_frames(long)[rows].astype(float) - clip(21)[rows]).max() <= 1
    finally:
        matte_says(pipe, 30.0)


def test_a_matte_of_groups_of_frames():
    frames, source = np.full((1, 9, 4, 6, 3), 200, np.uint8), np.zeros((1, 9, 4, 6, 3), np.uint8)
    matte = torch.full((1, 4, 3, 2, 3), -30.0)  # 3 latent frames of 2x3 places with 2x2 pixels
    matte[0, 1, 1, 0, 2] = 30.0  # the second pixel of the last place in the first row, frames 1 to 4
    found = composite(frames, source, matte)[0, ..., 0]
    assert np.argwhere(found == 200).tolist() == [[t, 0, 5] for t in (1, 2, 3, 4)] and found.sum() == 800


@pytest.mark.parametrize("channels,size", [(1, (4, 6)), (16, (4, 6)), (4, (4, 8)), (4, (5, 6))])
def test_a_matte_has_a_channel_for_each_pixel_of_a_place(channels, size):
    frames, height, width = np.zeros((1, 9, *size, 3), np.uint8), *size
    rule = f"`matte` has to have 2x2 channels for frames of {width}x{height} pixels and latents of 3x2 places but has"
    with pytest.raises(InputError, match=f"{rule} {channels}"):
        composite(frames, frames, torch.zeros(1, channels, 3, 2, 3))


def test_everything_given_changes_the_result(pipe):
    base = edit(pipe)
    assert torch.equal(base, edit(pipe))
    for change in (
        dict(seed=1),
        dict(prompt="Remove the fox."),
        dict(video=clip(seed=5)),
        dict(reference=picture()),
        dict(num_inference_steps=3),
    ):
        assert (edit(pipe, **change) - base).abs().max() > 1e-3, change
    one = edit(pipe, reference=picture())
    assert (edit(pipe, reference=[picture(), picture(seed=2)]) - one).abs().max() > 1e-3
    assert torch.equal(edit(pipe, reference=[picture()]), one)


def test_an_untrained_model_that_names_the_edit_returns_its_source(pipe):
    untrained = copy.deepcopy(pipe.transformer)
    for parameter in untrained.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    copies = KiwiEditPipeline(**pipe.components | dict(transformer=untrained))
    copies.set_progress_bar_config(disable=True)
    source = encode_frames(pipe.vae, clip())
    for steps in (1, 4):
        latents = edit(copies, reference=picture(), num_inference_steps=steps)
        assert torch.allclose(latents, source, atol=1e-3)
    assert not torch.allclose(edit(pipe, reference=picture()), source, atol=0.1)


def test_loop_is_eulers_method(pipe):
    levels = []
    noise = torch.randn(1, pipe.vae.config.z_dim, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    out = edit(
        pipe,
        latents=noise,
        num_inference_steps=4,
        callback_on_step_end=lambda p, i, t, kwargs: levels.append((i, float(t), kwargs["latents"])),
    )
    shift = pipe.scheduler.config.shift
    shifted = [shift * s / (1 + (shift - 1) * s) for s in flow_sigmas(4)]
    assert [i for i, _, _ in levels] == [0, 1, 2, 3]
    assert np.allclose([t for _, t, _ in levels], [1000 * s for s in shifted], atol=1e-3)
    assert torch.equal(levels[-1][2], out)
    assert (levels[0][2] - noise).abs().max() > 1e-3


def test_callback_may_change_the_latents(pipe):
    out = edit(pipe, callback_on_step_end=lambda p, i, t, kwargs: {"latents": torch.zeros_like(kwargs["latents"])})
    assert not out.any()
    seen = []
    edit(
        pipe,
        reference=picture(),
        callback_on_step_end=lambda p, i, t, kwargs: seen.append(kwargs) or {},
        callback_on_step_end_tensor_inputs=["source_latents", "reference_latents"],
    )
    assert seen[0]["source_latents"].shape == (1, pipe.vae.config.z_dim, 5, 8, 8)
    assert seen[0]["reference_latents"].shape == (1, pipe.vae.config.z_dim, 1, 8, 8)


def test_guidance_scale(pipe):
    plain = edit(pipe)
    assert torch.equal(edit(pipe, guidance_scale=1.0, negative_prompt="blurry"), plain)
    same = edit(pipe, guidance_scale=4.0, negative_prompt=PROMPT)  # the same words on both sides cancel out
    assert torch.allclose(same, plain, atol=1e-3)
    assert (edit(pipe, guidance_scale=4.0) - plain).abs().max() > 1e-3
    longer = edit(
        pipe, guidance_scale=2.0, negative_prompt="a much longer sentence than the instruction is", reference=picture()
    )
    assert torch.isfinite(longer).all()


def test_strength(pipe):
    guidance = copy.deepcopy(pipe.guidance)
    guidance.register_to_config(names="velocity")  # a random model that names the edit ends near its source anyway
    pipe = KiwiEditPipeline(**pipe.components | dict(guidance=guidance))
    pipe.set_progress_bar_config(disable=True)
    source = encode_frames(pipe.vae, clip())
    steps = []
    near = edit(
        pipe,
        num_inference_steps=10,
        strength=0.2,
        callback_on_step_end=lambda p, i, t, kwargs: steps.append(float(t)) or {},
    )
    far = edit(pipe, num_inference_steps=10)
    assert len(steps) == 2 and (near - source).square().mean() < (far - source).square().mean() / 2
    edit(pipe, num_inference_steps=10, strength=0.01)  # at least one step


def test_what_does_not_change_is_computed_once(pipe):
    counts = dict(source=0, reference=0, keys=0, encoder=0, vision=0)
    hooks = [
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, part in (
            ("source", pipe.guidance.source_embedder),
            ("reference", pipe.guidance.ref_embedder),
            ("keys", pipe.transformer.blocks[0].attn2.to_k),
            ("encoder", pipe.mllm.model.language_model),
            ("vision", pipe.mllm.model.visual),
        )
    ]
    pipe.memory.clear()
    edit(pipe, reference=picture(), num_inference_steps=4, guidance_scale=2.0)
    assert counts == dict(source=1, reference=1, keys=1, encoder=1, vision=2)  # the clip and the picture
    edit(pipe, reference=picture(), num_inference_steps=4, guidance_scale=2.0)
    for hook in hooks:
        hook.remove()
    assert counts == dict(source=2, reference=2, keys=2, encoder=2, vision=2)


def test_an_edit_of_the_same_clip_remembers_its_encodings(pipe, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        module,
        "encode_frames",
        lambda vae, frames, *args: encoded.append(len(frames)) or encode_frames(vae, frames, *args),
    )
    pipe.memory.clear()
    first = edit(pipe, reference=picture())
    assert len(encoded) == 2 and torch.equal(edit(pipe, reference=picture()), first) and len(encoded) == 2
    other = edit(pipe, reference=picture(seed=2))
    assert len(encoded) == 3 and not torch.equal(other, first)
    pipe.memory.clear()
    assert torch.equal(edit(pipe, reference=picture(seed=2)), other)  # what is remembered is what would be computed


def test_memory_notices_what_changes_its_encodings(pipe):
    pipe.memory.clear()
    plain = edit(pipe)
    with torch.no_grad():
        pipe.vae.quant_conv.bias += 1
    assert not torch.equal(edit(pipe), plain)
    with torch.no_grad():
        pipe.vae.quant_conv.bias -= 1
    pipe.vae.enable_tiling(
        tile_sample_min_height=48, tile_sample_min_width=48, tile_sample_stride_height=32, tile_sample_stride_width=32
    )
    try:
        assert not torch.equal(edit(pipe), plain)
    finally:
        pipe.vae.disable_tiling()
    pipe.memory.max_bytes, before = 0, pipe.memory.max_bytes
    try:
        assert torch.allclose(edit(pipe), plain, atol=1e-4) and not pipe.memory.kept
    finally:
        pipe.memory.max_bytes = before


def test_memory_keeps_no_gradients(pipe):
    pipe.memory.clear()
    latents = pipe.encode_source(Footage(5, 64, 64, clip()))
    assert latents.requires_grad and not pipe.memory.kept
    with torch.no_grad():
        assert torch.allclose(pipe.encode_source(Footage(5, 64, 64, clip())), latents) and len(pipe.memory.kept) == 1
    assert pipe.encode_source(Footage(5, 64, 64, clip())).requires_grad


@torch.no_grad()
def test_what_is_remembered_comes_to_the_device_that_is_asked_for(pipe):
    pipe.memory.clear()
    for device in ("cpu", "meta", "cpu"):
        assert pipe.encode_source(Footage(5, 64, 64, clip()), torch.device(device)).device.type == device
        assert pipe.encode_references([picture()], 64, 64, torch.device(device)).device.type == device
    assert len(pipe.memory.kept) == 2


def test_windows_of_a_long_clip(pipe):
    "Twenty-one frames by a model whose windows take thirteen; as memory has it, a window is all there is."
    frames, seen = clip(21), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[2:]), with_kwargs=True
    )
    try:
        out = pipe(
            PROMPT, frames, picture(), num_frames=21, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
        )
    finally:
        hook.remove()
    # two windows of thirteen latent frames and a reference, twice
    assert as_frames(out.frames[0]).shape == frames.shape and seen == [(14, 8, 8)] * 4
    assert pipe.windows(13, 64, 64) is None and len(pipe.windows(17, 64, 64)) == 2
    short = pipe(PROMPT, frames, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames[0]
    assert len(short) == 5
    stream = pipe(
        PROMPT,
        frames,
        picture(),
        num_frames=21,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="stream",
    ).frames[0]
    assert np.array_equal(np.concatenate(list(stream)), as_frames(out.frames[0]))
    with pytest.raises(ValueError, match="`window_overlap` has to be from 0 to below 1 but is 1"):
        pipe(PROMPT, frames, num_frames=21, window_overlap=1)


@pytest.mark.parametrize("max_frames", [1, 5])
@pytest.mark.parametrize("overlap", [0.0, 0.9, 0.99])
def test_windows_of_any_overlap(pipe, max_frames, overlap):
    other = copy.copy(pipe)
    other.register_to_config(max_frames=max_frames, window_frames=None)
    windows = other.windows(17, 64, 64, overlap)
    assert {w.frames.stop - w.frames.start for w in windows} == {max_frames}
    assert {f for w in windows for f in range(w.frames.start, w.frames.stop)} == set(range(17))


def test_windows_of_a_large_picture(pipe):
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[2:]), with_kwargs=True
    )
    large = np.kron(clip(5), np.ones((1, 2, 2, 1), np.uint8))
    try:
        out = pipe(PROMPT, large, picture(), height=128, width=128, num_inference_steps=1, guidance_scale=2.0).frames[0]
    finally:
        hook.remove()
    assert as_frames(out).shape == (5, 128, 128, 3) and set(seen) == {(6, 12, 12)} and len(seen) == 4


def test_footage_in_a_file_is_edited_as_in_memory(pipe, tmp_path):
    frames = clip(11)
    write_video(tmp_path / "clip.mp4", frames, 8, crf=0)
    there = read_video(tmp_path / "clip.mp4").frames[:9]

    def run(video):
        return as_frames(
            pipe(PROMPT, video, num_frames=9, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames[
                0
            ]
        )

    assert np.abs(run(Footage(9, 64, 64, path=tmp_path / "clip.mp4")).astype(int) - run(there)).max() <= 1
    for change, message in (
        (dict(num_frames=5), "`num_frames` has to be None or the footage's 9 but is 5"),
        (dict(height=32, width=64), "`height` .* 64 but is 32"),
        (dict(height=64, width=32), "`width` .* 64 but is 32"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(pipe, video=Footage(9, 64, 64, path=tmp_path / "clip.mp4"), **change)


# masks


def marked(frames=5, top=8, left=8, bottom=40, right=32, side=64):
    "A mask that moves a pixel down and to the right with each frame."
    mask = np.zeros((frames, side, side), bool)
    for t in range(frames):
        mask[t, top + t : bottom + t, left + t : right + t] = True
    return mask


@pytest.mark.parametrize("names", ["edit", "velocity"])
@pytest.mark.parametrize("output", ["np", "pt", "pil", "stream"])
def test_a_mask_keeps_what_lies_outside(pipe, names, output):
    guidance = copy.deepcopy(pipe.guidance)
    guidance.register_to_config(names=names)
    masked = KiwiEditPipeline(**pipe.components | dict(guidance=guidance), max_frames=5, window_frames=13)
    masked.set_progress_bar_config(disable=True)
    for frames in (5, 21):  # of which the longer ones are denoised in windows
        source, mask = clip(frames), marked(frames)
        made = edit(masked, video=source, num_frames=frames, mask=mask, output_type=output)[0]
        made = np.concatenate(list(made)) if output == "stream" else as_frames(made)
        assert np.array_equal(made[~mask], source[~mask]) and (made[mask] != source[mask]).mean() > 0.5
        border = mask & ~np.roll(mask, 1, axis=1)  # its first row: the paint is thin there
        paint = [np.abs(made[m].astype(int) - source[m]).mean() for m in (border, mask)]
        assert paint[0] < 0.8 * paint[1]


def test_a_mask_of_all_is_no_mask(pipe):
    for extra in (dict(), dict(strength=0.5, num_inference_steps=4), dict(video=clip(21), num_frames=21)):
        for output in ("np", "latent"):
            given = dict(output_type=output) | extra
            assert np.array_equal(edit(pipe, **given), edit(pipe, **given, mask=(0, 0, 1, 1)))


def test_latents_outside_a_mask_are_the_sources_under_the_noise_of_each_step(pipe):
    source, noise, seen = encode_frames(pipe.vae, clip()), torch.randn(1, pipe.vae.config.z_dim, 5, 8, 8), []
    mask = np.zeros((5, 64, 64), bool)
    mask[0, 0, 0] = mask[3, 63, 8] = True  # a pixel in the first frame, and one in the fourth
    inside = torch.zeros(5, 8, 8, dtype=torch.bool)
    inside[0, 0, 0] = inside[3, 7, 1] = True
    watch = lambda p, i, t, tensors: seen.append(tensors["latents"]) or {}
    for strength in (1.0, 0.5):
        seen.clear()
        given = dict(mask=mask, latents=noise, num_inference_steps=4, strength=strength)
        made = edit(pipe, **given, callback_on_step_end=watch)
        sigmas = pipe.scheduler.sigmas[-len(seen) :]
        for latents, sigma in zip(seen, sigmas):
            kept = sigma * noise + (1 - sigma) * source
            assert torch.equal(latents[..., ~inside], kept[..., ~inside])
            assert (latents - kept)[..., inside].abs().min() > 0
        assert torch.equal(made, seen[-1]) and sigmas[-1] == 0


def test_a_place_of_a_latent_frame_is_inside_where_any_of_its_frames_is():
    source, mask = torch.zeros(1, 2, 3, 2, 2), np.zeros((9, 8, 8), bool)
    mask[0, 0, 0] = mask[3, 7, 7] = mask[8, 0, 7] = True
    kept = module._keeper(mask, 4, source, source)(torch.ones_like(source), 1.0)
    assert np.argwhere(kept[0, 0].numpy() == 1).tolist() == [[0, 0, 0], [1, 1, 1], [2, 0, 1]]


def test_forms_of_a_mask(pipe, tmp_path):
    drawn = np.zeros((64, 64), np.uint8)
    drawn[16:48, 0:32] = 255
    clear = np.dstack([np.full((64, 64, 3), 255, np.uint8), drawn])  # white paint on nothing
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    Image.fromarray(clear).save(tmp_path / "clear.png")
    write_video(tmp_path / "mask.mp4", np.repeat(drawn[None, ..., None], 7, 0), 8, crf=0)
    wanted = edit(pipe, mask=(0, 0.25, 0.5, 0.75))
    forms = [
        *("0,0.25,0.5,0.75", [0, 0.25, 0.5, 0.75], drawn, drawn > 0, Image.fromarray(drawn), clear),
        *(Image.fromarray(clear), np.stack([drawn // 2 + 100] * 3, -1), torch.from_numpy(drawn), drawn[::2, ::2]),
        *(tmp_path / "mask.png", str(tmp_path / "clear.png"), tmp_path / "mask.mp4", [Image.fromarray(drawn)] * 5),
        *([drawn > 0] * 6, np.repeat(drawn[None], 5, 0), np.kron(drawn, np.ones((2, 2), np.uint8))),
    ]
    for form in forms:
        assert torch.equal(edit(pipe, mask=form), wanted), str(form)[:60]


def test_a_mask_is_cropped_as_the_source_is(pipe):
    source, mask = clip(5, 64, 96), np.zeros((64, 96), bool)
    mask[:, :48] = True
    made = as_frames(edit(pipe, video=source, height=64, width=64, mask=mask, output_type="np")[0])
    centre = source[:, :, 16:80]
    assert np.array_equal(made[:, :, 32:], centre[:, :, 32:]) and (made[:, :, :32] != centre[:, :, :32]).any()


@pytest.mark.parametrize(
    "mask, message",
    [
        ((0.5, 0, 0.5, 1), r"`mask` has to be images, or a box \(x0, y0, x1, y1\) .* but is \(0.5, 0, 0.5, 1\)"),
        ((0, 0, 1, 1.1), "`mask` has to be images, or a box"),
        ((0, float("nan"), 1, 1), "`mask` has to be images, or a box"),
        ([0, 0, 1], "`mask` has to be images, or a box"),
        ("0.2,0.1,0.8", "`mask` has to be images, or a box"),
        ((0, 0, 0.001, 1), "`mask` has to be white where the edit may go but is black at 64x64"),
        (np.zeros((64, 64), np.uint8), "`mask` has to be white where"),
        (np.ones((64, 48), bool), "`mask` has to have the shape of the source, which is 64x64, but is 48x64"),
        (np.ones((3, 64, 64), bool), "`mask` has to hold 1 or 5 images but holds 3"),
        (
            [np.ones((64, 64), bool), np.ones((32, 32), bool)],
            r"`mask` has to hold frames of one shape but has \(32, 32, 3\), \(64, 64, 3\)",
        ),
        ([], r"`mask` has to be images, or a box .* but is \[\]"),
        ("lost.png", "`mask` has to be an existing file or folder but 'lost.png' does not exist"),
        ("https://example.com/a.png", "`mask` has to be a file .* address"),
        (3, "`mask` has to be an image"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(pipe, monkeypatch, mask, message):
    monkeypatch.setattr(module, "_contexts", None)  # nothing is computed by then
    with pytest.raises((ValueError, TypeError, OSError), match=message) as error:
        edit(pipe, mask=mask)
    assert "\n" not in str(error.value)


# a scale for the reference


def test_the_scale_of_the_reference(pipe):
    both, alone = edit(pipe, reference=picture(), num_inference_steps=1), edit(pipe, num_inference_steps=1)
    one = dict(num_inference_steps=1, reference=picture())
    assert torch.equal(edit(pipe, **one, reference_scale=1.0), both)
    assert torch.equal(edit(pipe, num_inference_steps=1, reference_scale=3.0), alone), "nothing to scale"
    assert torch.allclose(edit(pipe, **one, reference_scale=0.0), alone, atol=1e-4)
    assert torch.allclose(edit(pipe, **one, reference_scale=1.5), alone + 1.5 * (both - alone), atol=1e-4)
    # with both: v_neg + g (v_text - v_neg) + r (v_full - v_text), which is linear in one step
    against = edit(pipe, "no", num_inference_steps=1)
    found = edit(pipe, **one, guidance_scale=3.0, negative_prompt="no", reference_scale=0.5)
    assert torch.allclose(found, against + 3 * (alone - against) + 0.5 * (both - alone), atol=1e-3)
    two = edit(pipe, reference=[picture(), picture(seed=2)], num_inference_steps=1)
    found = edit(pipe, reference=[picture(), picture(seed=2)], num_inference_steps=1, reference_scale=2.0)
    assert torch.allclose(found, 2 * two - alone, atol=1e-3)


def test_the_scale_of_the_reference_in_windows_and_off_again(pipe):
    given = dict(video=clip(21), num_frames=21, num_inference_steps=1)
    alone, both = edit(pipe, **given), edit(pipe, **given, reference=picture())
    found = edit(pipe, **given, reference=picture(), reference_scale=2.0)
    assert torch.allclose(found, 2 * both - alone, atol=1e-3)

    def off(pipe, i, t, tensors):
        pipe._guidance_scale = 1.0
        return {}

    given = dict(reference=picture(), guidance_scale=2.0, reference_scale=2.0, num_inference_steps=3)
    assert (edit(pipe, **given, callback_on_step_end=off) - edit(pipe, **given)).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_refused(pipe, scale):
    with pytest.raises(InputError, match="`reference_scale` has to be a number from 0; 1 is off, but is"):
        edit(pipe, reference=picture(), reference_scale=scale)


# sizes


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((1, 64, 64), (1, 64, 64)),
        ((3, 64, 64), (1, 64, 64)),
        ((6, 64, 64), (5, 64, 64)),
        ((5, 40, 90), None),
        ((5, 64, 8), None),
        ((2, 720, 1280), None),
    ],
)
def test_any_size_becomes_one_that_the_model_takes(pipe, shape, expected):
    frames = pipe.prepare_video(clip(*shape))
    assert (len(frames) - 1) % 4 == 0 and frames.shape[1] % 8 == 0 and frames.shape[2] % 8 == 0
    assert frames.shape[1] * frames.shape[2] <= pipe.config.max_pixels
    if expected:
        assert frames.shape[:3] == expected
    assert edit(pipe, video=clip(*shape), output_type="np", num_inference_steps=1).shape == (1, *frames.shape)


def test_forms_of_the_source(pipe, tmp_path):
    frames = clip()
    images = [Image.fromarray(f) for f in frames]
    assert np.array_equal(pipe.prepare_video(images), frames)
    assert np.array_equal(pipe.prepare_video(frames, num_frames=1), frames[:1])
    assert pipe.prepare_video(images[0]).shape == (1, 64, 64, 3)
    images[0].save(tmp_path / "one.png")
    assert np.array_equal(pipe.prepare_video(tmp_path / "one.png"), frames[:1])
    assert pipe.prepare_video(frames, height=32, width=48).shape == (5, 32, 48, 3)
    picture().convert("RGBA").save(tmp_path / "ref.png")
    assert edit(pipe, video=images[0], reference=str(tmp_path / "ref.png"), num_inference_steps=1).shape == (
        1,
        pipe.vae.config.z_dim,
        1,
        8,
        8,
    )


def test_forms_of_references_and_clips(pipe, tmp_path):
    "All of them say the same, so the latents are the same."
    frames, image = clip(), picture()
    image.save(tmp_path / "r.png")
    write_video(tmp_path / "v.mp4", frames, 8, crf=0)
    pixels, data = torch.from_numpy(np.array(image)), (tmp_path / "r.png").read_bytes()
    first = pixels.permute(2, 0, 1)
    base = edit(pipe, reference=image, num_inference_steps=1)
    for one in (
        tmp_path / "r.png",
        data,
        bytearray(data),
        io.BytesIO(data),
        open(tmp_path / "r.png", "rb"),
        pixels,
        first,
        first[None],
        pixels.float() / 255,
        (first / 255).double(),
        np.asarray(image),
        [data],
    ):
        assert torch.equal(edit(pipe, reference=one, num_inference_steps=1), base)
    assert np.array_equal(read_image((first / 255).bfloat16()).size, image.size)
    tensor = torch.from_numpy(frames)
    names = [tmp_path / f"{i}.png" for i in range(5)]
    for frame, name in zip(frames, names):
        Image.fromarray(frame).save(name)
    for video in (
        tensor,
        tensor.permute(0, 3, 1, 2),
        tensor[None],
        tensor.permute(0, 3, 1, 2)[None] / 255,
        list(tensor),
        [str(n) for n in names],
        [n.read_bytes() for n in names],
        [open(n, "rb") for n in names],
        frames[None],
    ):
        assert np.array_equal(pipe.prepare_video(video), frames)
    assert np.abs(pipe.prepare_video((tensor / 255).bfloat16()).astype(int) - frames).max() <= 1
    film = (tmp_path / "v.mp4").read_bytes()
    for video in (film, io.BytesIO(film), open(tmp_path / "v.mp4", "rb")):
        assert np.array_equal(pipe.prepare_video(video), pipe.prepare_video(tmp_path / "v.mp4"))
    assert np.array_equal(pipe.prepare_video(names[0].read_bytes()), frames[:1])


def test_a_callback_may_stop_an_edit(pipe):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = True
        return {}

    out = edit(pipe, callback_on_step_end=stop, num_inference_steps=4)
    assert len(seen) == 1 and torch.equal(out, seen[0])
    assert not torch.equal(edit(pipe, num_inference_steps=4), out)  # the next edit is not stopped


def test_callbacks_of_diffusers(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

    class Batches(SDCFGCutoffCallback):
        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            batches.append((len(callback_kwargs["prompt_embeds"]), pipeline.num_timesteps, pipeline.guidance_scale))
            return super().callback_fn(pipeline, step_index, timestep, callback_kwargs)

    batches, sizes = [], []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    options = dict(num_inference_steps=4, guidance_scale=2.0, negative_prompt="blurred")
    try:
        cut = edit(pipe, callback_on_step_end=Batches(cutoff_step_index=1, cutoff_step_ratio=None), **options)
    finally:
        hook.remove()
    assert sizes == [2, 2, 1, 1] and batches == [(2, 4, 2.0), (2, 4, 2.0), (1, 4, 0.0), (1, 4, 0.0)]
    assert torch.isfinite(cut).all() and not torch.equal(cut, edit(pipe, **options))
    assert not torch.equal(cut, edit(pipe, num_inference_steps=4))
    many = edit(
        pipe,
        callback_on_step_end=MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_index=1, cutoff_step_ratio=None)]),
        **options,
    )
    assert torch.allclose(many, cut)


def test_the_default_output_is_what_diffusers_writes(pipe, tmp_path, monkeypatch):
    from diffusers.utils import export_utils

    monkeypatch.setattr(export_utils, "is_imageio_available", lambda: False)  # its other writer needs no FFmpeg
    frames = pipe(PROMPT, clip(), num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames[0]
    for form in (frames, np.stack(frames).astype(np.float32) / 255):
        export_utils.export_to_video(form, str(tmp_path / "out.mp4"), fps=8)
        back = read_video(tmp_path / "out.mp4").frames.astype(float)
        assert np.abs(back - as_frames(frames)).mean() < np.abs(back - (255.0 - as_frames(frames))).mean()


# LoRA files of others

LORA_NAMES = {  # a layer, as others call it -> which it is: the first block's query, feed-forward or output
    "transformer.blocks.0.attn1.to_q": 0,
    "blocks.0.attn1.to_q": 0,
    "blocks.0.self_attn.q": 0,
    "pipe.dit.blocks.0.self_attn.q": 0,
    "diffusion_model.blocks.0.self_attn.q": 0,
    "model.diffusion_model.blocks.0.self_attn.q": 0,
    "base_model.model.blocks.0.self_attn.q": 0,
    "diffusion_model.blocks.0.ffn.0": 1,
    "diffusion_model.blocks.0.cross_attn.o": 2,
    "lora_unet_blocks_0_self_attn_q": 0,
}


@pytest.mark.parametrize("name", LORA_NAMES)
@pytest.mark.parametrize(
    "style, alpha",
    [
        ("lora_A.weight lora_B.weight", None),
        ("lora_A.weight lora_B.weight", 8.0),
        ("lora_A.default.weight lora_B.default.weight", None),
        ("lora_down.weight lora_up.weight", 1.0),
    ],
)
def test_lora_files_of_others(pipe, name, style, alpha, tmp_path):
    if name.startswith("lora_unet") and "down" not in style:
        pytest.skip("nobody writes this")
    block = pipe.transformer.blocks[0]
    layer = [block.attn1.to_q, block.ffn.net[0].proj, block.attn2.to_out[0]][LORA_NAMES[name]]
    before, places = layer.weight.detach().clone(), torch.Generator().manual_seed(0)
    A, B = torch.randn(4, layer.in_features, generator=places), torch.randn(layer.out_features, 4, generator=places)
    weights = dict(zip((f"{name}.{ending}" for ending in style.split()), (A, B))) | (
        {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    )
    save_file(weights, tmp_path / "lora.safetensors")
    try:
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        place = [block.attn1.to_q, block.ffn.net[0].proj, block.attn2.to_out[0]][LORA_NAMES[name]].weight.detach()
        assert torch.allclose(place - before, (1 if alpha is None else alpha / 4) * B @ A, atol=1e-4)
    finally:
        pipe.unload_lora_weights()
        with torch.no_grad():
            [block.attn1.to_q, block.ffn.net[0].proj, block.attn2.to_out[0]][LORA_NAMES[name]].weight.copy_(before)


@pytest.mark.parametrize(
    "names, why",
    [
        ([], "holds no LoRA matrices"),
        (["x"], "no place there"),
        (["transformer.blocks.0.attn1.to_q.lora_A.weight"], "without one of its two"),
        (
            ["transformer.blocks.99.attn1.to_q.lora_A.weight", "transformer.blocks.99.attn1.to_q.lora_B.weight"],
            "no place there",
        ),
        (
            [
                "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
                "diffusion_model.foo.lora_A.weight",
            ],
            "of the 3 tensors of the given dict 1 do not fit: transformer.foo.lora_A.weight has no place there",
        ),
        (
            ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"] * 2 + [f"x{i}" for i in range(9)],
            "of the 10 tensors of the given dict 10 do not fit: .* and 7 more",
        ),
        (["diffusion_model.blocks.0.self_attn.q.diff"], "difference of another size"),
        (["text_encoder.layers.0.q.lora_A.weight", "text_encoder.layers.0.q.lora_B.weight"], "no place there"),
        (["diffusion_model.blocks.0.self_attn.q.dora_scale"], "plain LoRA"),
    ],
)
def test_a_lora_that_does_not_belong_is_refused(pipe, names, why):
    width = pipe.transformer.blocks[0].attn1.to_q.in_features
    with pytest.raises(InputError, match=why):
        pipe.load_lora_weights(
            {name: torch.zeros(2, width) if "lora_A" in name else torch.zeros(width, 2) for name in names}
        )
    assert not hasattr(pipe.transformer.blocks[0].attn1.to_q, "lora_A")


@pytest.fixture
def bare(pipe):
    "A pipeline whose denoiser and encoder are copies, to put LoRA into."
    parts = pipe.components | dict(transformer=copy.deepcopy(pipe.transformer), mllm=copy.deepcopy(pipe.mllm))
    made = KiwiEditPipeline(**parts, default_steps=1)
    made.set_progress_bar_config(disable=True)
    return made


def random_lora(layers, style="diffusion_model.{}.lora_{}.weight", rank=2, seed=0):
    "Matrices under the names that others have for layers (theirs -> module), and what they add to each weight."
    rng, weights, added = torch.Generator().manual_seed(seed), {}, {}
    for name, layer in layers.items():
        A, B = torch.randn(rank, layer.in_features, generator=rng), torch.randn(layer.out_features, rank, generator=rng)
        weights |= {style.format(name, "A"): A, style.format(name, "B"): B}
        added[name] = B @ A
    return weights, added


def test_differences_and_biases_of_distilled_loras_are_exact(bare):
    sizes = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32)
    wan = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=8, rope_max_seq_len=32, **sizes)
    bare.register_modules(transformer=wan)
    rng = torch.Generator().manual_seed(0)
    native = {  # as lightx2v, CausVid and AccVideo name them -> the parameter that changes
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.1.ffn.0.diff_b": "blocks.1.ffn.net.0.proj.bias",
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    before = {name: wan.get_parameter(ours).detach().clone() for name, ours in native.items()}
    added = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in before.items()}
    weights, matrices = random_lora({"blocks.0.self_attn.q": wan.blocks[0].attn1.to_q})
    query = wan.blocks[0].attn1.to_q.weight.detach().clone()
    zero = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros_like(wan.blocks[0].attn1.norm_q.weight)}
    given = weights | {f"diffusion_model.{name}": tensor for name, tensor in added.items()} | zero
    bare.load_lora_weights(given, "style")
    bare.set_adapters("style", 0.5)
    bare.fuse_lora()
    bare.unload_lora_weights()
    now = dict(wan.named_parameters())
    for name in native:
        assert torch.allclose(now[native[name]] - before[name], 0.5 * added[name], atol=1e-4), name
    assert torch.allclose(wan.blocks[0].attn1.to_q.weight - query, 0.5 * matrices["blocks.0.self_attn.q"], atol=1e-4)
    key = next(iter(zero))
    with pytest.raises(InputError, match="has a difference for transformer.blocks.0.attn1.norm_q, which is none"):
        bare.load_lora_weights(weights | {key: torch.ones_like(zero[key])})


def test_a_lora_of_the_language_model_goes_with_the_others(bare):
    "Trainer names: beside the encoder's weights, at a scale, fused, taken off again and deleted."
    text, wan = bare.mllm.model.language_model, bare.transformer
    layers = {"mllm.model.model.language_model.layers.0.self_attn.q_proj": text.layers[0].self_attn.q_proj}
    style = "{}.lora_{}.default.weight"
    words, added = random_lora(layers, style)
    dit, _ = random_lora({"dit.blocks.0.self_attn.q": wan.blocks[0].attn1.to_q}, style, seed=1)
    edit = lambda: np.stack(bare(PROMPT, clip(), generator=torch.Generator().manual_seed(0)).frames[0]).astype(int)
    plain, weight = edit(), text.layers[0].self_attn.q_proj.weight.detach().clone()
    bare.load_lora_weights(words | dit, "both")
    bare.load_lora_weights(dit, "wan")
    assert bare.get_list_adapters() == dict(transformer=["both", "wan"], mllm=["both"])
    with pytest.raises(InputError, match="`adapter_name` has to be a new one but 'wan'"):
        bare.load_lora_weights(dit, "wan")
    bare.set_adapters(["both", "wan"], [0.0, 0.0])
    assert np.array_equal(edit(), plain)
    bare.set_adapters(["both", "wan"], [0.5, 1.0])
    changed = edit()
    assert not np.array_equal(changed, plain)
    bare.fuse_lora()
    assert np.abs(edit() - changed).max() <= 2
    fused = text.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.allclose(fused - weight, 0.5 * next(iter(added.values())), atol=1e-4)
    bare.unfuse_lora()
    assert torch.allclose(text.layers[0].self_attn.q_proj.base_layer.weight, weight, atol=1e-5)
    bare.delete_adapters("wan")
    assert bare.get_list_adapters() == dict(transformer=["both"], mllm=["both"])
    bare.unload_lora_weights()
    assert np.abs(edit() - plain).max() <= 1 and not bare.get_list_adapters().get("mllm")


def test_alpha_of_pefts_own_configuration_counts(bare, tmp_path):
    layer = bare.transformer.blocks[0].attn1.to_q
    before = layer.weight.detach().clone()
    weights, added = random_lora({"blocks.0.attn1.to_q": layer}, "base_model.model.{}.lora_{}.weight")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    settings = tmp_path / "adapter_config.json"
    settings.write_text('{"r": 2, "lora_alpha": 6, "use_rslora": true}')
    with pytest.raises(InputError, match="adapter_config.json` beside a LoRA has to leave use_rslora out"):
        bare.load_lora_weights(tmp_path)
    settings.write_text('{"r": 2, "lora_alpha": 6}')
    bare.load_lora_weights(tmp_path)
    bare.fuse_lora()
    now = bare.transformer.blocks[0].attn1.to_q.base_layer.weight
    assert torch.allclose(now - before, 3 * added["blocks.0.attn1.to_q"], atol=1e-4)


def test_a_lora_that_is_not_there_is_said(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="'x.safetensors' is none"):
        pipe.load_lora_weights("x.safetensors")
    with pytest.raises(InputError, match="`wait_name` has to be left out"):
        pipe.load_lora_weights({}, wait_name="x")
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    with pytest.raises(OSError, match="cannot"):
        pipe.load_lora_weights(tmp_path / "x.safetensors")


def test_trimming_is_logged(pipe, caplog):
    with caplog.at_level("INFO", logger="kiwi_edit.footage"):
        pipe.prepare_video(clip(8))
    assert "frames 1 to 5 of 8 at 64x64" in caplog.text


def test_reference_is_fitted_on_white():
    out = fit_reference(Image.new("RGB", (40, 20), (10, 20, 30)), 64, 64)
    assert out.shape == (64, 64, 3) and (out[:16] == 255).all() and (out[48:] == 255).all()
    assert (out[16:48] == (10, 20, 30)).all()
    assert fit_reference(Image.new("RGB", (5000, 1)), 64, 32).shape == (32, 64, 3)


def test_frames_to_latents_and_back(pipe):
    frames = clip(5)
    latents = encode_frames(pipe.vae, frames)
    assert torch.equal(latents, encode_frames(pipe.vae, torch.from_numpy(frames)[None]))
    assert decode_latents(pipe.vae, latents).shape == (1, 5, 64, 64, 3)
    two = encode_frames(pipe.vae, np.stack([frames, clip(seed=2)]))
    assert torch.allclose(two[:1], latents, atol=1e-4)
    with pytest.raises(ValueError, match=r"`frames` has to hold 4k\+1 frames but holds 4"):
        encode_frames(pipe.vae, clip(4))
    with pytest.raises(ValueError, match="`frames` has to be"):
        encode_frames(pipe.vae, clip().astype(np.float32))


# saving and loading


def test_round_trip(pipe, tmp_path):
    expected = edit(pipe, reference=picture())
    pipe.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir() if p.is_dir()} == set(
        "transformer vae scheduler mllm processor guidance".split()
    )
    assert not list((tmp_path / "model").rglob("*.bin")) and not list((tmp_path / "model").rglob("*.py"))
    again = KiwiEditPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert again.config.max_frames == 5 and again.config.default_steps == preset("tiny").num_inference_steps
    assert not again.vae.training
    assert torch.allclose(edit(again, reference=picture()), expected, atol=1e-5)


def test_half_precision_on_disk(pipe, tmp_path):
    expected = edit(pipe)
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert size < 2.2 * sum(
        p.numel() for part in (pipe.transformer, pipe.vae, pipe.mllm, pipe.guidance) for p in part.parameters()
    )
    again = KiwiEditPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.dtype == again.mllm.dtype == again.guidance.dtype == torch.float32
    assert (edit(again) - expected).abs().max() < 0.1
    low = KiwiEditPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    assert low.transformer.dtype == torch.bfloat16 and torch.isfinite(edit(low, reference=picture())).all()


def test_bundled_names_and_foreign_layouts(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "some-model")
    monkeypatch.setattr(module, "asset", lambda name="": tmp_path / name)
    assert module.bundled_models() == ["some-model"] and module.find_checkpoint("some-model") == tmp_path / "some-model"
    with pytest.raises(FileNotFoundError, match="is 'kiwi'; known are: some-model, .*diffusers") as error:
        KiwiEditPipeline.from_pretrained("kiwi")
    assert "\n" not in str(error.value)
    (tmp_path / "empty/mllm_encoder").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        KiwiEditPipeline.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty/model_index.json").write_text(json.dumps({"mllm_encoder": ["a", "b"]}))
    monkeypatch.setitem(
        checkpoints.LAYOUTS, "mllm_encoder", (lambda folder, torch_dtype: (folder, torch_dtype), KiwiGuidance)
    )
    assert KiwiEditPipeline.from_pretrained(tmp_path / "empty", torch_dtype=torch.bfloat16) == (
        tmp_path / "empty",
        torch.bfloat16,
    )


def test_hub_ids_that_cannot_be_fetched_are_one_line():
    with pytest.raises(FileNotFoundError, match="`name` has to be a model that can be fetched") as error:
        KiwiEditPipeline.from_pretrained("nobody/nothing-here", local_files_only=True)
    assert "\n" not in str(error.value)


def test_preset_and_tokenizer_have_to_fit():
    small = preset("tiny")
    small.mllm["text_config"]["vocab_size"] = 300
    with pytest.raises(ValueError, match="at most the 300 tokens of the preset"):
        KiwiEditPipeline.from_preset(small, make_tokenizer([PROMPT] * 3, 400))


# bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt="  "), "`prompt` has to say what to edit but is '  '"),
        (dict(prompt=None), None),
        (dict(height=60, width=64), "`height` has to be a multiple of 8 but is 60"),
        (dict(height=64), "`height` has to be given together with `width`"),
        (dict(num_frames=4), r"`num_frames` has to be 4k\+1 .* but is 4; the nearest are 1 and 5"),
        (dict(num_inference_steps=0), "`num_inference_steps` has to be at least 1 but is 0"),
        (dict(sigmas=[1.0, 0.0]), "`sigmas` has to hold noise levels"),
        (dict(guidance_scale=0.5), "`guidance_scale` has to be at least 1"),
        (dict(strength=0), "`strength` has to lie above 0 and up to 1 but is 0"),
        (dict(output_type="gif"), "`output_type` has to be .* but is 'gif'"),
        (dict(generator=0), "`generator` has to be a torch.Generator.* but is 0"),
        (dict(prompt="a\0b"), "`prompt` has to be .* without NUL"),
        (dict(reference=""), "`reference` has to be an image.* but is ''"),
        (dict(reference=[None]), "`reference` has to be an image.* but is None"),
        (dict(reference=b"no picture"), "`reference` has to be an image"),
        (dict(reference=io.BytesIO(b"no picture")), "`reference` has to be an image"),
        (dict(reference=3), "`reference` has to be an image.* but is 3"),
        (
            dict(reference="https://example.com/a.png"),
            "`reference` has to be a file .* address 'https://example.com/a.png'",
        ),
        (dict(video="https://example.com/a.mp4"), "`video` has to be a file .* address"),
        (dict(video=["https://example.com/a.png"]), "`video` has to be a file .* address"),
        (dict(video=[None]), "`video` has to be an image"),
        (dict(foo=1), "foo"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "`callback_on_step_end_tensor_inputs` has to be of"),
        (
            dict(latents=torch.zeros(1, 32, 5, 4, 4)),
            r"`latents` has to be \(1, 32, 5, 8, 8\) for this clip but is \(1, 32, 5, 4, 4\)",
        ),
    ],
)
def test_wrong_arguments(pipe, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        edit(pipe, **change)


def test_missing_source_and_instructions_in_other_scripts(pipe):
    with pytest.raises(ValueError, match="`video` has to be a clip or an image but is None"):
        pipe(PROMPT)
    assert torch.isfinite(edit(pipe, "把红色的狐狸换成一只猫 🐈", num_inference_steps=1)).all()


def test_a_lora_of_two_ranks_is_refused_and_leaves_nothing(pipe):
    layer = pipe.transformer.blocks[0].attn1.to_q
    weights = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, layer.in_features),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(layer.out_features, 3),
    }
    with pytest.raises(InputError, match="two ranks"):
        pipe.load_lora_weights(weights)
    assert pipe.transformer.blocks[0].attn1.to_q is layer


@pytest.mark.parametrize(
    "options", [dict(torch_dtype="float8_e4m3fn"), dict(folder="x"), dict(kwargs=1), dict(overrides={})]
)
def test_what_would_fail_deep_inside_is_refused_at_the_door(options):
    with pytest.raises((InputError, TypeError), match=f"`{next(iter(options))}`"):
        KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", **options)
