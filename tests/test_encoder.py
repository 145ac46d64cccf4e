"Words and pictures into ids, positions and pixels; queries and connectors out as a context."

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
from kiwi_edit.core import preset
from kiwi_edit.encoder import *
from kiwi_edit.encoder import _chat_text, _mrope_positions, _patchify_frames
from kiwi_edit.encoder import _SPECIAL_TOKENS
from kiwi_edit.pipeline import KiwiEditPipeline

CLIP = np.zeros((5, 64, 64, 3), np.uint8)
GOLDEN = common.GOLDEN / "wan22"
TEXTS = [
    "Replace the red fox with the object in the reference.",
    "Make it look like a painting.",
    "Remove the blue boat.",
]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return KiwiEditPipeline.from_preset(preset("tiny"), make_tokenizer(TEXTS, 600))


def prepare(pipe, prompts, *given, processor=None):
    return prepare_inputs(processor or pipe.processor, pipe.guidance.config, prompts, *given)


def context_of(pipe, *given):
    return encode_context(pipe.mllm, pipe.guidance, *given)


@pytest.fixture(scope="module")
def inputs(pipe):
    "A batch of an image, a clip with a reference, and a clip."
    rng = np.random.default_rng(0)
    clip = lambda frames, h=64, w=64: rng.integers(0, 256, (frames, h, w, 3), dtype=np.uint8)
    references = [[], [Image.fromarray(clip(1, 48, 80)[0])], []]
    return prepare(pipe, TEXTS, [clip(1), clip(5), clip(5, 48, 80)], references)


# tokenizer and processor


def test_tokenizer_keeps_any_text_and_the_special_tokens():
    tokenizer = make_tokenizer(TEXTS, 500)
    assert len(tokenizer) <= 500
    for text in ("Füge ein Boot hinzu.", "把红色的球换成蓝色", "добавь 🛶", TEXTS[0]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.convert_tokens_to_ids(_SPECIAL_TOKENS)
    assert len(set(ids)) == len(_SPECIAL_TOKENS) and max(ids) < len(tokenizer)
    assert tokenizer(QUERY_TOKEN * 3)["input_ids"] == [tokenizer.convert_tokens_to_ids(QUERY_TOKEN)] * 3
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"


def test_tokenizer_learns_its_texts():
    few, many = make_tokenizer(TEXTS, 278), make_tokenizer(TEXTS, 600)
    assert len(many(TEXTS[0])["input_ids"]) < len(few(TEXTS[0])["input_ids"]) / 2
    with pytest.raises(ValueError, match="`vocab_size` has to be at least 278 .* but is 100"):
        make_tokenizer(TEXTS, 100)


def test_own_chat_layout_is_that_of_released_tokenizers():
    ours = KiwiProcessor(make_tokenizer(TEXTS, 400))
    theirs = KiwiProcessor.from_pretrained(GOLDEN / "diffusers/processor")
    for mode in ("image", "video", "ref"):
        assert _chat_text(ours, mode, "Remove the cat.", 3) == _chat_text(theirs, mode, "Remove the cat.", 3)


def test_processor_round_trip(pipe, tmp_path):
    pipe.processor.save_pretrained(tmp_path / "processor")
    again = KiwiProcessor.from_pretrained(tmp_path / "processor")
    clip = np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    a, b = (prepare(pipe, ["Ändere das Wetter"], [clip], processor=p) for p in (pipe.processor, again))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)
    assert a.token_ids == b.token_ids
    with pytest.raises(FileNotFoundError, match="`folder` has to be"):
        KiwiProcessor.from_pretrained(tmp_path / "nothing")


# sizes, pixels, positions


def test_tables_of_frames_and_sizes():
    tables = json.loads((GOLDEN / "cases/resize.json").read_text(encoding="utf-8"))
    for n, expected in tables["mllm_frame_sampling"].items():
        assert sample_frames(int(n)) == expected
    for row in tables["mllm_video_grid"]:
        first, second = video_sizes(row["width"], row["height"], row["max_pixels"])
        assert [list(first), list(second)] == [row["first_resize_wh"], row["second_resize_wh"]]
    processor = KiwiProcessor.from_pretrained(GOLDEN / "diffusers/processor")
    for row in tables["mllm_image_grid"]:
        limit = 28 * 28 * (row["max_object_token"] or 16384)
        _, grid = processor.image_patches(Image.new("RGB", (row["width"], row["height"])), 56 * 56, limit)
        wanted = row["image_grid_thw"]
        assert list(grid) == (wanted[0] if isinstance(wanted[0], list) else wanted)


def test_pixels_of_a_video_frame():
    pixels = load_file(GOLDEN / "cases/resize.safetensors")
    ours = resize_for_encoder(pixels["input"][None].numpy())[0].permute(1, 2, 0)[::5, ::5]
    off = (ours.int() - pixels["mllm_video_frame_of_input_sample"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01


def test_patches_hold_every_pixel_once_and_neighbours_together():
    pixels = torch.arange(3 * 3 * 28 * 56, dtype=torch.float32).reshape(3, 3, 28, 56)
    rows, grid = _patchify_frames(pixels)
    assert grid == (2, 2, 4) and rows.shape == (16, 3 * 2 * 14 * 14)
    assert torch.equal(rows[0].view(3, 2, 14, 14)[:, 1], pixels[1, :, :14, :14])
    # the third patch of the first merged token
    assert torch.equal(rows[2].view(3, 2, 14, 14)[:, 0], pixels[0, :, 14:, :14])
    last = rows[8:].view(8, 3, 2, 14, 14)
    assert torch.equal(last[:, :, 0], last[:, :, 1])  # the missing fourth frame repeats the third


def test_positions():
    flags = torch.tensor([0, 0] + [1] * 12 + [0, 0, 0], dtype=torch.bool)
    positions = _mrope_positions(flags, [(3, 4, 4)])
    assert positions[:, :2].tolist() == [[0, 1]] * 3
    assert positions[0, 2:14].tolist() == [2] * 4 + [4] * 4 + [6] * 4
    assert positions[2, 2:6].tolist() == [2, 3, 2, 3]
    assert positions[:, 14:].tolist() == [[7, 8, 9]] * 3  # beyond the largest, which is time here
    with pytest.raises(ValueError, match="has to mark 16 tokens"):
        _mrope_positions(flags, [(4, 4, 4)])


# batches


@torch.no_grad()
def test_a_batch_gives_what_each_sample_gives_alone(pipe, inputs):
    assert inputs.modes == ["image", "ref", "video"] and len(set(inputs.lengths.tolist())) == 3
    context, mask = context_of(pipe, inputs)
    for i in range(3):
        alone, alone_mask = context_of(pipe, inputs[i])
        assert alone_mask.all() and int(mask[i].sum()) == alone.shape[1] and mask[i, : alone.shape[1]].all()
        assert torch.allclose(context[i, mask[i]], alone[0], atol=1e-5)
    reference_tokens = int(mask[1].sum()) - 16
    assert reference_tokens > 0 and int(mask[0].sum()) == int(mask[2].sum()) == 16


@torch.no_grad()
@pytest.mark.parametrize("read_out", ("queries", "last_positions"))
def test_cached_features_change_nothing(pipe, inputs, read_out):
    pipe.guidance.register_to_config(query_read_out=read_out)
    features, bare = vision_features(pipe.mllm, inputs), inputs.without_pixels()
    expected, _ = context_of(pipe, inputs)
    assert torch.equal(context_of(pipe, bare, features)[0], expected)
    order = [2, 0, 1]  # stored one by one, batched again in another order
    again, _ = context_of(pipe, collate_inputs([bare[i] for i in order]), [features[i] for i in order])
    assert torch.allclose(again, expected[order], atol=1e-5)
    half, _ = context_of(pipe, bare, [f.half() for f in features])
    assert half.dtype == torch.float32 and torch.allclose(half, expected, atol=1e-2)
    pipe.guidance.register_to_config(query_read_out="queries")


def test_collate_is_undone_by_indexing(inputs):
    again = collate_inputs([inputs[i] for i in range(3)])
    for field in ("input_ids", "position_ids", "lengths", "pixel_values"):
        assert torch.equal(getattr(inputs, field), getattr(again, field))
    assert again.grids == inputs.grids and len(again) == 3
    with pytest.raises(ValueError, match="empty"):
        collate_inputs([])


def test_gradients_reach_queries_and_connectors_under_autocast(pipe, inputs):
    features = [f.half().detach() for f in vision_features(pipe.mllm, inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        context, _ = context_of(pipe, inputs.without_pixels(), features)
    context.float().square().sum().backward()
    for name in ("image_queries", "video_queries", "ref_queries", "connector.0.weight", "ref_connector.2.weight"):
        assert pipe.guidance.get_parameter(name).grad.abs().sum() > 0, name
    assert pipe.mllm.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_no_character_of_an_instruction_becomes_a_picture(pipe):
    ours, theirs = (prepare(pipe, [text], [CLIP]) for text in ("a b", "a\0b"))
    pictures = lambda inputs: int((inputs.input_ids == inputs.token_ids["video"]).sum())
    assert pictures(ours) == pictures(theirs) > 0


# bad input


@pytest.mark.parametrize(
    "prompts, source, error, message",
    [
        *((["a " + token], CLIP, ValueError, re.escape(f"special token '{token}'")) for token in _SPECIAL_TOKENS),
        ([3], CLIP, TypeError, "`prompt` has to be a string but is a int"),
        (["a"], CLIP[0], ValueError, "`source` has to be"),
        (["a"], CLIP.astype(np.float32), ValueError, "`source` has to be"),
        (["a", "b"], CLIP, ValueError, "of one length but have 2, 1 and 2"),
    ],
)
def test_wrong_inputs(pipe, prompts, source, error, message):
    with pytest.raises(error, match=message):
        prepare(pipe, prompts, [source])


def test_vision_and_queries_fit_their_placeholders(pipe):
    inputs = prepare(pipe, ["a"], [CLIP])
    with pytest.raises(ValueError, match="`vision` has to hold one row for each placeholder, 48, but holds 47"):
        context_of(pipe, inputs, [torch.zeros(47, 192)])
    with pytest.raises(ValueError, match="cached features"):
        vision_features(pipe.mllm, inputs.without_pixels())
    short = replace(inputs, input_ids=inputs.input_ids.masked_fill(inputs.input_ids == inputs.token_ids["query"], 5))
    with pytest.raises(ValueError, match="`queries` has to hold one row for each placeholder, 0, but holds 16"):
        context_of(pipe, short)
