"""The kit against numbers of the official implementation: every case, every quantity that it stores, every layout that holds the model.

The folder comes from KIWI_EDIT_GOLDEN, all sizes from its cases.json, so that any set of the same structure can be walked."""

import json
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import GOLDEN
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.weights.checkpoints import load_trainer_checkpoint, _open_weights, _trainer_name
from kiwi_edit.encoder import encode_context, encode_hidden, prepare_inputs
from kiwi_edit.guidance import EditCache, denoise, rounded_sigma
from kiwi_edit.latents import decode_latents, encode_frames, in_tiles, latent_statistics
from kiwi_edit.pipeline import fit_reference, flow_sigmas
from kiwi_edit.training import _training_table

HOMES = [folder for folder in sorted(GOLDEN.iterdir()) if (folder / "cases/cases.json").is_file()]


def table(family, name):
    "A table of a family's cases."
    return json.loads((GOLDEN / family / f"cases/{name}.json").read_text(encoding="utf-8"))


FAMILIES = {folder.name: table(folder.name, "cases") for folder in HOMES}
MLLM = next(GOLDEN.glob("*/base/Qwen*"), None)
CASES = [(family, name) for family, facts in FAMILIES.items() for name in facts["cases"]]
TRAINED = [(family, name) for family, name in CASES if "train" in FAMILIES[family]["cases"][name]]
FILES = dict(official="diffusers/model_index.json", trainer="trainer/step-1.safetensors")
FILES["adapters"] = FILES["trainer"]  # beside the weights, not merged into them
LAYOUTS = {family: [way for way in FILES if (GOLDEN / family / FILES[way]).is_file()] for family in FAMILIES}
WAYS = [(family, name, layout) for family, name in CASES for layout in LAYOUTS[family]]


def each(names, values):
    return pytest.mark.parametrize(names, values, ids=[" ".join(value) for value in values])


each_case, each_way = each("family, name", CASES), each("family, name, layout", WAYS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def load(family, layout, first=False):
    "A model with its timesteps not rounded, as the numbers were made."
    home, facts = GOLDEN / family, FAMILIES[family]
    changes = dict(round_timestep=False, ref_pad_first=first)
    if layout == "official":
        pipe = KiwiEditPipeline.from_pretrained(home / "diffusers", **changes)
    else:
        base = home / "base/Wan_DiT.safetensors"
        pipe = load_trainer_checkpoint(
            home / "trainer/step-1.safetensors",
            base if base.is_file() else None,
            home / "base/Wan_VAE.safetensors",
            MLLM,
            merge=layout == "trainer",
            transformer_config=dict(num_attention_heads=facts["model"]["heads"]),
            vae_config=json.loads((home / "base/latents_mean_std.json").read_text()),
            max_object_token=facts["model"]["max_object_token"],
            **changes,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tensors_of(family, name):
    return load_file(GOLDEN / family / f"cases/{name}.safetensors")


def case(family, name, layout=None):
    facts, tensors = FAMILIES[family]["cases"][name], tensors_of(family, name)
    references = [Image.fromarray(tensors[k].numpy()) for k in sorted(tensors) if k.startswith("ref_image")]
    return facts, tensors, references, load(family, layout or LAYOUTS[family][0], facts["ref_pad_first"])


def reference_latents(tensors):
    keys = sorted(k for k in tensors if k.startswith("ref_latents"))
    return torch.cat([tensors[k] for k in keys], dim=2) if keys else None


def inputs_of(facts, tensors, references, pipe):
    given = [facts["prompt"]], [tensors["src_frames"].numpy()], [references]
    return prepare_inputs(pipe.processor, pipe.guidance.config, *given)


def seeded(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def close(found, request):
    "A quantity of a test's case, or of its family's autoencoder, is that of the official implementation."
    given = request.node.callspec.params
    where = f"{given['family']} {given.get('name', 'vae')}"

    def check(quantity, ours, theirs, tolerance):
        value = difference(ours, theirs)
        found[where, quantity] = max(value, found.get((where, quantity), 0.0))
        assert value < tolerance, f"{where}, {quantity}: {value:.1e}"

    return check


# sizes and switches


@each_family
def test_sizes(family):
    model = FAMILIES[family]["model"]
    for layout in LAYOUTS[family]:
        pipe = load(family, layout)
        sizes, vae, guidance = pipe.transformer.config, pipe.vae.config, pipe.guidance
        assert (sizes.num_layers, sizes.num_attention_heads) == (model["layers"], model["heads"])
        assert vae.scale_factor_spatial == model["vae"]["spatial_factor"]
        assert (vae.decoder_base_dim or vae.base_dim) == model["vae"]["dec_dim"]
        assert pipe.processor.query_token_id == model["placeholder_id"]
        if guidance.config.takes_reference:
            for mode in ("image", "video", "ref"):
                assert guidance.queries(mode).shape[0] == model[f"num_{mode}_queries"]


@pytest.mark.parametrize("family", [family for family, layouts in LAYOUTS.items() if "official" in layouts])
def test_released_weights_keep_their_quirks(family):
    pipe = KiwiEditPipeline.from_pretrained(GOLDEN / family / "diffusers")
    config = pipe.guidance.config
    assert config.query_read_out == "last_positions" and pipe.config.schedule == "diffusers"
    assert config.round_timestep is config.round_pixels is True
    assert load(family, "trainer").config.schedule == "native"


# the encoder


@each_case
def test_encoder_inputs(family, name):
    facts, tensors, references, pipe = case(family, name)
    inputs = inputs_of(facts, tensors, references, pipe)
    assert inputs.modes == [facts["mode"]]
    assert torch.equal(inputs.input_ids[0].int(), tensors["input_ids"])
    assert torch.equal(inputs.position_ids[:, 0].int(), tensors["position_ids"])
    assert [list(g) for g in inputs.grids[0]] == facts.get("video_grid_thw", []) + facts.get("image_grid_thw", [])
    parts = iter(inputs.pixel_values.split([int(np.prod(g)) for g in inputs.grids[0]]))
    for key in ("pixel_values_videos", "pixel_values"):
        if f"{key}_sample" not in tensors:
            continue
        pixels = next(parts)
        assert list(pixels.shape) == facts[f"{key}_shape"]
        sample = pixels.flatten()[:: FAMILIES[family]["pixel_sample_stride"]]
        # exact where Pillow is the one the numbers were made with; other versions differ by one 8-bit level here and there
        assert (sample - tensors[f"{key}_sample"]).abs().max() <= 0.016


@torch.no_grad()
@each_way
def test_context(family, name, layout, close):
    facts, tensors, references, pipe = case(family, name, layout)
    inputs, tail = inputs_of(facts, tensors, references, pipe), tensors["mllm_hidden_tail"]
    close("hidden states", encode_hidden(pipe.mllm, pipe.guidance, inputs)[0, -len(tail) :], tail, 1e-5)
    context, mask = encode_context(pipe.mllm, pipe.guidance, inputs)
    close("context", context, tensors["context"], 1e-5)
    assert mask.all()


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f, name in CASES if name == "image" and "official" in LAYOUTS[f]])
def test_read_out_of_the_queries_is_another_context(family):
    facts, tensors, references, pipe = case(family, "image")
    right = KiwiEditPipeline.from_pretrained(GOLDEN / family / "diffusers", query_read_out="queries")
    context, _ = encode_context(right.mllm, right.guidance, inputs_of(facts, tensors, references, pipe))
    assert difference(context, tensors["context"]) > 0.02
    # the released read-out starts two queries late
    assert difference(context[:, 2:], tensors["context"][:, :-2]) < 1e-5


# the autoencoder


@torch.no_grad()
@each_way
def test_latents_of_source_and_references(family, name, layout, close):
    facts, tensors, references, pipe = case(family, name, layout)
    close("source latents", encode_frames(pipe.vae, tensors["src_frames"]), tensors["src_latents"], 1e-5)
    if not references:
        return
    width, height = facts["width"], facts["height"]
    if "ref_padded" in tensors:
        assert np.array_equal(fit_reference(references[0], width, height), tensors["ref_padded"].numpy())
    ours = pipe.encode_references(references, height, width)
    close("reference latents", ours, reference_latents(tensors), 1e-5)


@torch.no_grad()
@each_family
def test_autoencoder(family, close):
    tensors, facts = tensors_of(family, "vae"), FAMILIES[family]["vae"]
    for layout in LAYOUTS[family][:2]:
        vae = load(family, layout).vae
        close("encoded", encode_frames(vae, tensors["frames"]), tensors["encoded"], 1e-5)
        mean, std = latent_statistics(vae, "cpu")
        decoded = in_tiles(vae, tensors["decode_input"] * std + mean, "decode")
        close("decoded", decoded[..., ::3, ::3], tensors["decoded_sample"], 1e-4)
    assert torch.equal(seeded(tensors["decode_input"], facts["decode_input_seed"]), tensors["decode_input"])


@torch.no_grad()
@each_family
def test_autoencoder_in_tiles(family, close):
    video, tensors, facts = tensors_of(family, "video"), tensors_of(family, "vae"), FAMILIES[family]["vae"]
    vae = load(family, LAYOUTS[family][0]).vae
    factor = vae.config.scale_factor_spatial
    mean, std = latent_statistics(vae, "cpu")
    latents = video["src_latents"] * std + mean
    vae.enable_tiling(*(factor * size for size in (*facts["tile_size"], *facts["tile_stride"])))
    try:
        encoded, decoded = encode_frames(vae, video["src_frames"]), in_tiles(vae, latents, "decode")
        theirs = vae.decode(latents).sample  # diffusers' own, which clamps each tile
    finally:
        vae.disable_tiling()
    close("encoded in tiles", encoded, tensors["tiled_encoded_of_case_video"], 1e-5)
    expected = tensors["tiled_decoded_of_case_video_src_latents_sample"]
    close("decoded in tiles", decoded[..., ::3, ::3], expected, 1e-4)
    assert difference(theirs[..., ::3, ::3], expected) > 1e-2


# the denoiser and whole edits


@torch.no_grad()
@each("family, name, layout", [way for way in WAYS if way[:2] in TRAINED])
def test_one_call_of_the_denoiser(family, name, layout, close):
    facts, tensors, _, pipe = case(family, name, layout)
    step = torch.tensor([facts["dit_timestep"]]), torch.tensor([facts["dit_sigma"]])
    sources = tensors["src_latents"], reference_latents(tensors)
    given = pipe.transformer, pipe.guidance, tensors["dit_latents"], *step, tensors["context"], None, *sources
    kept = EditCache()
    for _ in range(2):  # the second call reads what the first left in the cache
        close("denoiser", denoise(*given, cache=kept), tensors["dit_out"], 1e-5)


@each_way
def test_whole_edits(family, name, layout, close):
    facts, tensors, references, pipe = case(family, name, layout)
    for schedule, prefix in (("native", ""), ("diffusers", "diffusers_")):
        for steps in (2, 4):
            if f"{prefix}latents_n{steps}" not in tensors:
                continue
            latents = pipe(
                facts["prompt"],
                tensors["src_frames"].numpy(),
                references or None,
                latents=tensors["noise"],
                output_type="latent",
                num_inference_steps=steps,
                sigmas=flow_sigmas(steps, schedule),
            ).frames
            close(f"{schedule} latents", latents, tensors[f"{prefix}latents_n{steps}"], 2e-5)
            if (theirs := tensors.get(f"{prefix}frames_n{steps}")) is not None:
                off = np.abs(decode_latents(pipe.vae, latents)[0].astype(int) - theirs.numpy().astype(int))
                assert off.max() <= 1 and (off > 0).mean() < 1e-3


@each_case
def test_noise_of_a_seed(family, name):
    noise = tensors_of(family, name)["noise"]
    assert torch.equal(seeded(noise, FAMILIES[family]["cases"][name]["seed"]), noise)


# tables

SCHEDULES = [family for family in FAMILIES if (GOLDEN / family / "cases/schedule.json").is_file()]


@pytest.mark.parametrize("family", SCHEDULES)
def test_schedule(family):
    known, scheduler = table(family, "schedule"), load(family, LAYOUTS[family][0]).scheduler
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=0)
    for name, schedule in (("native", "native"), ("diffusers_format", "diffusers")):
        for steps, theirs in known[name].items():
            scheduler.set_timesteps(sigmas=flow_sigmas(int(steps), schedule))
            same(scheduler.sigmas[:-1], theirs["sigmas"])
            assert scheduler.sigmas[-1] == theirs["final_sigma"]
            same(scheduler.timesteps, theirs["timesteps"])
            looked_up = rounded_sigma(scheduler.timesteps, scheduler.timesteps, scheduler.sigmas)
            same(looked_up, [theirs["sigmas"][i] for i in theirs["table_index_of_bf16_timestep"]])


@pytest.mark.parametrize("family", SCHEDULES)
def test_training_table(family):
    theirs = table(family, "schedule")["training"]
    sigmas, timesteps, weights = _training_table(theirs["shift"], theirs["num_train_timesteps"])
    for row in theirs["rows"]:
        for values, key in ((sigmas, "sigma"), (timesteps, "timestep"), (weights, "weight")):
            assert float(values[row["index"]]) == pytest.approx(row[key], rel=1e-5, abs=1e-6)
    for key, value in (("weight_min", weights.min()), ("weight_max", weights.max()), ("weight_sum", weights.sum())):
        assert float(value) == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)


# training


GROUPS = [f"mllm.{part}" for part in "image_queries video_queries ref_queries connetor ref_connector".split()]
GROUPS += ["ref_vae_condition", "vae_condition", "dit"]


def group_of(name):
    "The trainer's group of one of its tensors."
    if "lora_" in name:
        return "mllm_lora" if name.startswith("mllm.") else "dit_lora"
    return next(group for group in GROUPS if name.startswith(f"{group}."))


@each("family, name", TRAINED)
def test_loss_and_gradients(family, name, close):
    facts, tensors, references, pipe = case(family, name, "adapters")
    train = facts["train"]
    for part in (pipe.transformer, pipe.guidance, pipe.mllm):
        part.zero_grad()
        part.requires_grad_(True)
    context, mask = encode_context(pipe.mllm, pipe.guidance, inputs_of(facts, tensors, references, pipe))
    step = torch.tensor([train["timestep"]]), torch.tensor([train["sigma"]])
    noisy, sources = tensors["train_noisy_latents"], (tensors["src_latents"], tensors.get("train_ref_latents"))
    velocity = denoise(pipe.transformer, pipe.guidance, noisy, *step, context, mask, *sources)
    close("training velocity", velocity.detach(), tensors["train_pred"], 1e-5)
    mse = (velocity - (tensors["train_noise"] - tensors["train_input_latents"])).square().mean()
    assert mse.item() == pytest.approx(train["mse"], rel=1e-5)
    assert mse.item() * train["weight"] == pytest.approx(train["loss"], rel=1e-5)
    (mse * train["weight"]).backward()

    def gradient(key):
        part, place = _trainer_name(key)
        return getattr(pipe, part).get_parameter(place).grad

    stored = [key for key in tensors if key.startswith("grad.")]
    assert stored
    for key in stored:
        close("gradients", gradient(key.removeprefix("grad.")), tensors[key], 1e-4)
    groups = {}
    for key in _open_weights(GOLDEN / family / "trainer/step-1.safetensors"):
        plain = key.removeprefix("pipe.")
        groups.setdefault(group_of(plain), []).append(gradient(key))
    for group, theirs in train["grad_norm"].items():
        given = [g for g in groups[group] if g is not None]
        assert (len(groups[group]), len(given)) == (theirs["tensors"], theirs["tensors_with_grad"]), group
        norm = float(torch.stack([g.double().square().sum() for g in given]).sum().sqrt()) if given else 0.0
        assert norm == pytest.approx(theirs["norm"], rel=1e-4), group
