"The kit against numbers of the official implementation; the folder comes from KIWI_EDIT_GOLDEN, sizes from cases.json."
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kiwi_edit.checkpoints import load_official
from kiwi_edit.encoder import encode_context, encode_hidden, prepare_inputs
from kiwi_edit.guidance import EditCache, denoise, rounded_sigma
from kiwi_edit.pipeline import decode_latents, encode_frames, fit_reference, flow_sigmas

GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden")) / "wan22"
FACTS = json.loads((GOLDEN / "cases/cases.json").read_text(encoding="utf-8"))
SCHEDULE = json.loads((GOLDEN / "cases/schedule.json").read_text(encoding="utf-8"))
CASES = FACTS["cases"]
NATIVE = [name for name, case in CASES.items() if "dit_sigma" in case]


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def pipes():
    pipes = {first: load_official(GOLDEN / "diffusers", round_timestep=False, ref_pad_first=first) for first in (False, True)}
    for pipe in pipes.values(): pipe.set_progress_bar_config(disable=True)
    return pipes


def case(name, pipes):
    facts, tensors = CASES[name], load_file(GOLDEN / f"cases/{name}.safetensors")
    references = [Image.fromarray(tensors[k].numpy()) for k in sorted(tensors) if k.startswith("ref_image")]
    return facts, tensors, references, pipes[facts["ref_pad_first"]]


def reference_latents(tensors):
    keys = sorted(k for k in tensors if k.startswith("ref_latents"))
    return torch.cat([tensors[k] for k in keys], dim=2) if keys else None


def inputs_of(name, pipes):
    facts, tensors, references, pipe = case(name, pipes)
    return prepare_inputs(pipe.processor, pipe.guidance.config, [facts["prompt"]], [tensors["src_frames"].numpy()], [references])


def test_sizes(pipes):
    model, pipe = FACTS["model"], pipes[False]
    assert pipe.transformer.config.num_layers == model["layers"]
    assert pipe.transformer.config.num_attention_heads == model["heads"]
    assert pipe.vae.config.scale_factor_spatial == model["vae"]["spatial_factor"]
    assert pipe.vae.config.decoder_base_dim == model["vae"]["dec_dim"]
    assert pipe.processor.query_token_id == model["placeholder_id"]
    for mode in ("image", "video", "ref"):
        assert tuple(pipe.guidance.queries(mode).shape)[0] == model[f"num_{mode}_queries"]


def test_released_weights_keep_their_quirks():
    config = load_official(GOLDEN / "diffusers").guidance.config
    assert (config.query_read_out, config.round_timestep, config.round_pixels) == ("last_positions", True, True)


@pytest.mark.parametrize("name", CASES)
def test_encoder_inputs(name, pipes):
    facts, tensors, _, _ = case(name, pipes)
    inputs = inputs_of(name, pipes)
    assert inputs.modes == [facts["mode"]]
    assert torch.equal(inputs.input_ids[0].int(), tensors["input_ids"])
    assert torch.equal(inputs.position_ids[:, 0].int(), tensors["position_ids"])
    assert [list(g) for g in inputs.grids[0]] == facts.get("video_grid_thw", []) + facts.get("image_grid_thw", [])
    parts = list(inputs.pixel_values.split([int(np.prod(g)) for g in inputs.grids[0]]))
    for key in ("pixel_values_videos", "pixel_values"):
        if f"{key}_sample" not in tensors: continue
        pixels = parts.pop(0)
        assert list(pixels.shape) == facts[f"{key}_shape"]
        sample = pixels.flatten()[:: FACTS["pixel_sample_stride"]]
        # exact where Pillow is the one the numbers were made with; other versions differ by one 8-bit level here and there
        assert (sample - tensors[f"{key}_sample"]).abs().max() <= 0.016


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_context(name, pipes):
    _, tensors, _, pipe = case(name, pipes)
    inputs = inputs_of(name, pipes)
    tail = tensors["mllm_hidden_tail"]
    assert error(encode_hidden(pipe.mllm, pipe.guidance, inputs)[0, -len(tail):], tail) < 1e-5
    context, mask = encode_context(pipe.mllm, pipe.guidance, inputs)
    assert error(context, tensors["context"]) < 1e-5 and mask.all()


@torch.no_grad()
def test_read_out_of_the_queries_is_another_context(pipes):
    right = load_official(GOLDEN / "diffusers", query_read_out="queries")
    context, _ = encode_context(right.mllm, right.guidance, inputs_of("image", pipes))
    theirs = load_file(GOLDEN / "cases/image.safetensors")["context"]
    assert error(context, theirs) > 0.02
    assert error(context[:, 2:], theirs[:, :-2]) < 1e-5  # the released read-out starts two queries late


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_latents_of_source_and_references(name, pipes):
    facts, tensors, references, pipe = case(name, pipes)
    assert error(encode_frames(pipe.vae, tensors["src_frames"]), tensors["src_latents"]) < 1e-5
    if not references: return
    size = facts["width"], facts["height"]
    if "ref_padded" in tensors: assert np.array_equal(fit_reference(references[0], *size), tensors["ref_padded"].numpy())
    assert error(pipe.encode_references(references, size[1], size[0]), reference_latents(tensors)) < 1e-5


@torch.no_grad()
def test_autoencoder(pipes):
    tensors, vae = load_file(GOLDEN / "cases/vae.safetensors"), pipes[False].vae
    assert error(encode_frames(vae, tensors["frames"]), tensors["encoded"]) < 1e-5
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    decoded = vae.decode(tensors["decode_input"] * std + mean).sample[..., ::3, ::3]
    assert error(decoded, tensors["decoded_sample"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_one_call_of_the_denoiser(name, pipes):
    facts, tensors, _, pipe = case(name, pipes)
    cache = EditCache()
    step = torch.tensor([facts["dit_timestep"]]), torch.tensor([facts["dit_sigma"]])
    conditions = None, tensors["src_latents"], reference_latents(tensors)
    for _ in range(2):  # the second call reads what the first left in the cache
        out = denoise(pipe.transformer, pipe.guidance, tensors["dit_latents"], *step, tensors["context"], *conditions, cache=cache)
        assert error(out, tensors["dit_out"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_whole_edits(name, pipes):
    facts, tensors, references, pipe = case(name, pipes)
    for kind, last in (("", 0.0), ("diffusers_", 0.003 / 1.002)):
        for steps in (2, 4):
            if f"{kind}latents_n{steps}" not in tensors: continue
            latents = pipe(facts["prompt"], tensors["src_frames"].numpy(), references or None, latents=tensors["noise"], output_type="latent",
                           num_inference_steps=steps, sigmas=np.linspace(1, last, steps + 1)[:-1].tolist()).frames
            assert error(latents, tensors[f"{kind}latents_n{steps}"]) < 2e-5
            if f"{kind}frames_n{steps}" not in tensors: continue
            frames = decode_latents(pipe.vae, latents)[0].astype(int)
            off = np.abs(frames - tensors[f"{kind}frames_n{steps}"].numpy().astype(int))
            assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_noise_of_a_seed(pipes):
    facts, tensors, _, _ = case("video", pipes)
    noise = torch.randn(tensors["noise"].shape, generator=torch.Generator().manual_seed(facts["seed"]))
    assert torch.equal(noise, tensors["noise"])


@pytest.mark.parametrize("steps", (2, 4, 50))
def test_schedule(steps, pipes):
    scheduler = pipes[False].scheduler
    for table, sigmas in (("native", flow_sigmas(steps)), ("diffusers_format", np.linspace(1, 0.003 / 1.002, steps + 1)[:-1].tolist())):
        theirs = SCHEDULE[table][str(steps)]
        scheduler.set_timesteps(sigmas=sigmas)
        assert np.allclose(scheduler.sigmas[:-1], theirs["sigmas"], rtol=1e-5, atol=0) and scheduler.sigmas[-1] == theirs["final_sigma"]
        assert np.allclose(scheduler.timesteps, theirs["timesteps"], rtol=1e-5, atol=0)
        looked_up = rounded_sigma(scheduler.timesteps, scheduler.timesteps, scheduler.sigmas)
        expected = [theirs["sigmas"][i] for i in theirs["table_index_of_bf16_timestep"]]
        assert np.allclose(looked_up, expected, rtol=1e-5, atol=0)


OURS = {  # native parameter name -> owner and name here; queries are matched by prefix
    "dit.head.modulation": ("transformer", "scale_shift_table"),
    "mllm.connetor.2.bias": ("guidance", "connector.2.bias"),
    "mllm.ref_connector.2.bias": ("guidance", "ref_connector.2.bias"),
    "vae_condition.patch_embedding.bias": ("guidance", "source_embedder.bias"),
    "ref_vae_condition.patch_embedding.bias": ("guidance", "ref_embedder.bias"),
    "mllm.image_queries.q": ("guidance", "image_queries"),
    "mllm.video_queries.q": ("guidance", "video_queries"),
    "mllm.ref_queries.q": ("guidance", "ref_queries"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_gradients(name, pipes):
    facts, tensors, _, pipe = case(name, pipes)
    train = facts["train"]
    for part in (pipe.transformer, pipe.guidance, pipe.mllm): part.zero_grad()
    context, mask = encode_context(pipe.mllm, pipe.guidance, inputs_of(name, pipes))
    step = torch.tensor([train["timestep"]]), torch.tensor([train["sigma"]])
    pred = denoise(pipe.transformer, pipe.guidance, tensors["train_noisy_latents"], *step, context, mask, tensors["src_latents"],
                   tensors.get("train_ref_latents"))
    assert error(pred.detach(), tensors["train_pred"]) < 1e-5
    mse = (pred - (tensors["train_noise"] - tensors["train_input_latents"])).square().mean()
    assert abs(mse.item() / train["mse"] - 1) < 1e-5
    (mse * train["weight"]).backward()
    checked = 0
    for key, (part, parameter) in OURS.items():
        if f"grad.{key}" not in tensors: continue
        gradient = getattr(pipe, part).get_parameter(parameter).grad
        assert error(gradient, tensors[f"grad.{key}"]) < 1e-4, key
        checked += 1
    assert checked >= 4
