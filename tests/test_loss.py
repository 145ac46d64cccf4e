"""The loss: what is drawn, what is dropped, what counts how much, and every number of the official training step."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file

from kiwi_edit.train.curriculum import Loss
from kiwi_edit.data.dataset import shrink_reference
from kiwi_edit.encoder import encode_context, prepare_inputs, vision_features
from kiwi_edit.guidance import EditCache, denoise, rounded_sigma
from kiwi_edit.latents import encode_frames, latent_statistics
from kiwi_edit.pipeline import KiwiEditPipeline, fit_reference, flow_sigmas
from kiwi_edit.train.cache import Batch, changed_pixels
from kiwi_edit.train.engine import FlowMatching, _split_losses
from kiwi_edit.train.foundations import metric_factor, pixel_metric
from kiwi_edit.training import (
    Dice,
    draw_noise,
    draw_noise_levels,
    drop_instructions,
    _edit_weights,
    flow_matching_loss,
    _training_table,
)
from kiwi_edit.world import World

GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden")) / "wan22"
CASES = json.loads((GOLDEN / "cases/cases.json").read_text(encoding="utf-8"))["cases"]
NATIVE = [name for name, case in CASES.items() if "train" in case]
TABLE = json.loads((GOLDEN / "cases/schedule.json").read_text(encoding="utf-8"))["training"]
OFFICIAL = Loss(sampling="table", weighting="gaussian", balance=1.0)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


# noise levels


class Picks:
    "A generator that picks what it is told."

    def __init__(self, values):
        self.values = np.array(values)

    def integers(self, high, size):
        return self.values


def test_table():
    rows, (sigmas, timesteps, weights) = TABLE["rows"], _training_table(TABLE["shift"], TABLE["num_train_timesteps"])
    index = [row["index"] for row in rows]
    for ours, name in ((sigmas, "sigma"), (timesteps, "timestep"), (weights, "weight")):
        assert np.allclose(ours[index], [row[name] for row in rows], rtol=1e-5, atol=0), name
    assert abs(float(weights.double().sum()) / TABLE["weight_sum"] - 1) < 1e-6
    assert weights.min() == TABLE["weight_min"] and abs(float(weights.max()) / TABLE["weight_max"] - 1) < 1e-6


@pytest.mark.parametrize("rounded", (False, True))
def test_table_draws(rounded):
    rows = TABLE["rows"]
    sigma, weight = draw_noise_levels(
        OFFICIAL, len(rows), Picks([row["index"] for row in rows]), round_timestep=rounded
    )
    theirs = [row["bf16"] if rounded else row for row in rows]
    assert np.allclose(sigma, [row["sigma"] for row in theirs], rtol=1e-5, atol=0)
    assert np.allclose(weight, [row["weight"] for row in theirs], rtol=1e-5, atol=0)
    if rounded:  # the timestep that `denoise` makes of such a level is the official one
        assert (1000 * sigma).bfloat16().tolist() == [row["timestep"] for row in theirs]
        sigmas, timesteps, _ = _training_table()
        levels = rounded_sigma(timesteps, timesteps, sigmas)
        assert len(levels.unique()) == 294
        assert torch.equal((1000 * levels).bfloat16(), timesteps.bfloat16())


def test_rounding_acts_on_every_sampling():
    sigmas = _training_table(3.0)[0]
    for sampling in ("table", "uniform", "logit_normal"):
        drawn = [
            draw_noise_levels(Loss(sampling=sampling), 4000, np.random.default_rng(0), 3.0, rounded)[0]
            for rounded in (False, True)
        ]
        assert torch.isin(drawn[1], sigmas).all() and (drawn[0] - drawn[1]).abs().max() < 0.003
        assert not torch.equal(*drawn) and len(drawn[1].unique()) < 400


def test_samplings():
    rng, unshift = np.random.default_rng(0), lambda sigma: sigma / (5 - 4 * sigma)
    size = 20_000
    u = {
        name: unshift(draw_noise_levels(Loss(sampling=name), size, rng)[0].double()).sort().values
        for name in ("table", "uniform", "logit_normal")
    }
    even = (torch.arange(size) + 0.5) / size
    assert (u["table"] - even).abs().max() < 0.02
    assert (u["uniform"] - even).abs().max() < 0.6 / size  # one in each part of the range
    assert (u["logit_normal"] - torch.sigmoid(torch.special.ndtri(even.double()))).abs().max() < 0.02
    batch = unshift(draw_noise_levels(Loss(sampling="uniform"), 16, rng)[0].double())
    assert sorted((batch * 16).int().tolist()) == list(range(16)) and (batch * 16).int().tolist() != list(range(16))
    with pytest.raises(ValueError, match="`options.sampling` has to be .* but is 'cosine'"):
        draw_noise_levels(_loss(sampling="cosine"), 1, rng)
    with pytest.raises(ValueError, match="`options.weighting` has to be .* but is 'snr'"):
        draw_noise_levels(_loss(weighting="snr"), 1, rng)


def _loss(**wrong):
    "Options with a value that they would refuse themselves."
    options = Loss()
    for name, value in wrong.items():
        object.__setattr__(options, name, value)
    return options


def test_bell_between_the_entries_of_the_table():
    sigma, weight = draw_noise_levels(Loss(sampling="uniform", weighting="gaussian"), 5000, np.random.default_rng(0))
    sigmas, _, weights = (np.append(x.numpy(), 0.0)[::-1] for x in _training_table())  # the bell is as low at 0 as at 1
    assert np.allclose(weight, np.interp(sigma, sigmas, weights), atol=1e-4)
    assert abs(weight.mean() - 1) < 2e-3 and (weight >= 0).all()
    assert (draw_noise_levels(Loss(), 5, np.random.default_rng(0))[1] == 1).all()


# the dice


def blank_batch(size, shape=(4, 2, 3, 3)):
    return Batch(None, [], None, torch.zeros(size, *shape), None, torch.ones(size, 1, *shape[1:]), [""] * size)


def test_dice_do_not_depend_on_the_split():
    options = Loss(dropout=0.5)
    whole = draw_noise(blank_batch(8), options, 3, 11, range(8), 8)
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [6, 2], [5]):
        dice = draw_noise(blank_batch(len(part)), options, 3, 11, part, 8)
        for name in ("noise", "sigma", "weight", "drop"):
            assert torch.equal(getattr(dice, name), getattr(whole, name)[part]), name
    for seed, step in ((3, 12), (4, 11), (11, 3)):
        other = draw_noise(blank_batch(8), options, seed, step, range(8), 8)
        assert (other.noise != whole.noise).all() and not torch.equal(other.sigma, whole.sigma)
    # dropout does not move the noise
    assert torch.equal(draw_noise(blank_batch(8), Loss(), 3, 11, range(8), 8).noise, whole.noise)
    with pytest.raises(ValueError, match="`indices` has to hold 2 places below 8 but is"):
        draw_noise(blank_batch(2), options, 0, 0, [7, 8], 8)


def test_dice_are_fair():
    dice = [draw_noise(blank_batch(32), Loss(dropout=0.25), 0, step, range(32), 32) for step in range(40)]
    noise, drop = torch.cat([d.noise for d in dice]).flatten(1), torch.cat([d.drop for d in dice])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    similar = torch.corrcoef(noise[:300]).fill_diagonal_(0)
    assert similar.abs().max() < 0.6  # 72 values each
    assert abs(drop.float().mean() - 0.25) < 0.04
    assert not draw_noise(blank_batch(32), Loss(), 0, 0, range(32), 32).drop.any()


# the official training step


def with_lora(pipe):
    "The trainer's adapters beside the language model that they were merged into, instead of in it."
    tensors = {
        k.removeprefix("pipe.").removeprefix("mllm.model."): v
        for file in (GOLDEN / "trainer").glob("*.safetensors")
        for k, v in load_file(file).items()
        if ".lora_" in k
    }
    with torch.no_grad():
        for name in {k.split(".lora_")[0] for k in tensors}:
            low, high = (tensors[f"{name}.lora_{x}.default.weight"] for x in "AB")
            pipe.mllm.get_parameter(f"{name}.weight").sub_(high @ low)
    rank = next(v.shape[0] for k, v in tensors.items() if "lora_A" in k)
    pipe.mllm.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*language_model.*\.(q|k|v|o)_proj"), pipe.mllm
    )
    missing, unexpected = pipe.mllm.load_state_dict(tensors, strict=False)
    assert not unexpected and not any("lora_" in k for k in missing)
    return pipe


@pytest.fixture(scope="module")
def merged():
    return {
        first: KiwiEditPipeline.from_pretrained(GOLDEN / "diffusers", round_timestep=False, ref_pad_first=first)
        for first in (False, True)
    }


@pytest.fixture(scope="module")
def adapted():
    return {
        first: with_lora(
            KiwiEditPipeline.from_pretrained(GOLDEN / "diffusers", round_timestep=False, ref_pad_first=first)
        )
        for first in (False, True)
    }


def training_step(name, pipe):
    "What a case of the official trainer has drawn and loaded, in our terms."
    case, tensors = CASES[name], load_file(GOLDEN / f"cases/{name}.safetensors")
    frames = tensors["src_frames"].numpy()
    references = [tensors[k].numpy() for k in sorted(tensors) if k.startswith("ref_image")]
    with torch.no_grad():
        inputs = prepare_inputs(
            pipe.processor, pipe.guidance.config, [case["prompt"]], [frames], [[Image.fromarray(r) for r in references]]
        )
        reference = None
        if references:
            shown = shrink_reference(references[0], case["width"], case["height"], case["train_ref_shrink"])
            reference = encode_frames(pipe.vae, shown[None].copy())
        batch = Batch(
            inputs.without_pixels(),
            vision_features(pipe.mllm, inputs),
            encode_frames(pipe.vae, frames),
            encode_frames(pipe.vae, 255 - frames),
            reference,
            torch.ones(1, 1, 1, 1, 1),
            [""],
        )
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(case["train_noise_seed"]))
    sigma, weight = draw_noise_levels(OFFICIAL, 1, Picks([case["train"]["timestep_index"]]))
    return case["train"], tensors, batch, Dice(noise, sigma, weight, torch.tensor([False]))


OURS = {  # group of the trainer -> parameters here
    "mllm.image_queries": lambda pipe: [pipe.guidance.image_queries],
    "mllm.video_queries": lambda pipe: [pipe.guidance.video_queries],
    "mllm.ref_queries": lambda pipe: [pipe.guidance.ref_queries],
    "mllm.connetor": lambda pipe: list(pipe.guidance.connector.parameters()),
    "mllm.ref_connector": lambda pipe: list(pipe.guidance.ref_connector.parameters()),
    "vae_condition": lambda pipe: list(pipe.guidance.source_embedder.parameters()),
    "ref_vae_condition": lambda pipe: list(pipe.guidance.ref_embedder.parameters()),
    "mllm_lora": lambda pipe: [p for k, p in pipe.mllm.named_parameters() if ".lora_" in k],
    "dit": lambda pipe: list(pipe.transformer.parameters()),
}
NAMES = {  # parameter of the trainer -> parameter here; the adapters' names only lose their prefix
    "dit.head.modulation": "transformer.scale_shift_table",
    "mllm.connetor.2.bias": "guidance.connector.2.bias",
    "mllm.ref_connector.2.bias": "guidance.ref_connector.2.bias",
    "vae_condition.patch_embedding.bias": "guidance.source_embedder.bias",
    "ref_vae_condition.patch_embedding.bias": "guidance.ref_embedder.bias",
    "mllm.image_queries.q": "guidance.image_queries",
    "mllm.video_queries.q": "guidance.video_queries",
    "mllm.ref_queries.q": "guidance.ref_queries",
}


@pytest.mark.parametrize("name", NATIVE)
def test_official_step(name, adapted):
    pipe = adapted[CASES[name]["ref_pad_first"]]
    facts, tensors, batch, dice = training_step(name, pipe)
    # what goes in
    assert error(batch.target, tensors["train_input_latents"]) < 1e-5
    assert error(batch.source, tensors["src_latents"]) < 1e-5
    if batch.reference is not None:
        assert error(batch.reference, tensors["train_ref_latents"]) < 1e-5
    assert torch.equal(dice.noise, tensors["train_noise"])
    assert abs(dice.sigma.item() / facts["sigma"] - 1) < 1e-5 and abs(dice.weight.item() / facts["weight"] - 1) < 1e-5
    # what comes out
    model, seen = FlowMatching(pipe, OFFICIAL), {}
    hooks = [
        pipe.transformer.register_forward_hook(
            lambda module, args, kwargs, out: seen.update(noisy=kwargs["hidden_states"], velocity=out[0]),
            with_kwargs=True,
        )
    ]
    model.zero_grad()
    loss, numbers = model((batch, dice))
    for hook in hooks:
        hook.remove()
    frames = batch.target.shape[2]
    own = slice(-frames, None) if CASES[name]["ref_pad_first"] else slice(0, frames)
    assert error(seen["noisy"][:, :, own].detach(), tensors["train_noisy_latents"]) < 1e-5
    assert error(seen["velocity"][:, :, own].detach(), tensors["train_pred"]) < 1e-5
    assert abs(numbers[f"loss/{batch.inputs.modes[0]}"] / facts["mse"] - 1) < 1e-5
    assert abs(loss.item() / facts["loss"] - 1) < 1e-5
    # what flows back
    loss.mean().backward()
    for key in (k.removeprefix("grad.") for k in tensors if k.startswith("grad.")):
        ours = NAMES.get(key) or key.removeprefix("mllm.model.").join(("mllm.", ""))
        assert error(model.get_parameter(ours).grad, tensors[f"grad.{key}"]) < 1e-4, key
    assert set(facts["grad_norm"]) == set(OURS)
    for group, theirs in facts["grad_norm"].items():
        parameters = OURS[group](pipe)
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert (len(parameters), len(gradients)) == (theirs["tensors"], theirs["tensors_with_grad"]), group
        norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()) if gradients else 0.0
        assert abs(norm - theirs["norm"]) <= 1e-4 * theirs["norm"], group


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_merged_adapters_give_the_same_loss(name, merged):
    pipe = merged[CASES[name]["ref_pad_first"]]
    facts, _, batch, dice = training_step(name, pipe)
    assert abs(flow_matching_loss(pipe, batch, dice)[0].item() / facts["loss"] - 1) < 1e-5


@torch.no_grad()
def test_the_model_sees_the_rounded_timestep(merged):
    facts, _, batch, dice = training_step("image", merged[False])
    rounding = KiwiEditPipeline.from_pretrained(GOLDEN / "diffusers")
    assert rounding.guidance.config.round_timestep
    sigma, weight = draw_noise_levels(OFFICIAL, 1, Picks([facts["timestep_index"]]), round_timestep=True)
    assert sigma != dice.sigma
    rounded, seen = replace(dice, sigma=sigma, weight=weight), []
    hook = rounding.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].item()), with_kwargs=True
    )
    loss = flow_matching_loss(rounding, batch, rounded)[0]
    hook.remove()
    assert seen == [torch.tensor(facts["timestep"]).bfloat16().item()]
    assert abs(loss / flow_matching_loss(merged[False], batch, dice)[0] - 1) > 1e-5


# one sample among others


@pytest.fixture(scope="module")
def tiny():
    pipe = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    for part in (pipe.vae, pipe.mllm, pipe.guidance, pipe.transformer):
        part.requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def batch(tiny):
    world = World(num_frames=1, split="eval", difficulty="easy")
    samples = [world.sample(1_630_000 + i, task) for i, task in enumerate(("subject", "background", "subject"))]
    references = [Image.fromarray(s.reference) for s in samples]
    with torch.no_grad():
        inputs = prepare_inputs(
            tiny.processor,
            tiny.guidance.config,
            [s.instruction for s in samples],
            [s.source for s in samples],
            [[r] for r in references],
        )
        latents = [
            encode_frames(tiny.vae, np.stack(clips))
            for clips in (
                [s.source for s in samples],
                [s.target for s in samples],
                [fit_reference(r, 96, 96)[None] for r in references],
            )
        ]
        changed = torch.stack([changed_pixels(s.source, s.target, *latents[0].shape[2:]) for s in samples]).float()
        return Batch(
            inputs.without_pixels(), vision_features(tiny.mllm, inputs), *latents, changed, [s.task for s in samples]
        )


def part_of(batch, i):
    return Batch(
        batch.inputs[i],
        batch.vision[i : i + 1],
        *(x[i : i + 1] for x in (batch.source, batch.target, batch.reference, batch.changed)),
        batch.tasks[i : i + 1],
    )


@torch.no_grad()
def test_a_sample_has_the_same_loss_alone_and_among_others(tiny, batch):
    loss = lambda x, places: flow_matching_loss(tiny, x, draw_noise(x, Loss(), 0, 5, places, 3), balance=4.0)
    together, alone = loss(batch, range(3)), [loss(part_of(batch, i), [i]) for i in range(3)]
    for whole, parts in zip(together, zip(*alone)):
        assert whole.shape == (3,) and whole.dtype == torch.float32
        assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)


@torch.no_grad()
def test_sums_are_float32_in_a_bfloat16_run(tiny, batch):
    dice = draw_noise(batch, Loss(), 0, 0, range(3), 3)
    gram = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(0)).double())
    exact, near = (
        FlowMatching(tiny, Loss(pixel_metric=0.5), gram, autocast=on)((batch, dice))[0] for on in (False, True)
    )
    assert near.dtype == torch.float32
    assert torch.allclose(near, exact, rtol=0.1) and not torch.equal(near, exact)
    assert not torch.equal(near, near.bfloat16().float())


@torch.no_grad()
def test_a_stage_without_the_source(tiny, batch):
    dice = draw_noise(batch, Loss(), 1, 0, range(3), 3)
    with_source, without = (FlowMatching(tiny, Loss(), source=given)((batch, dice))[0] for given in (True, False))
    assert (without / with_source - 1).abs().min() > 0.1
    hook = tiny.guidance.source_embedder.register_forward_hook(lambda module, args, out: out * 0)
    tiny.guidance.register_to_config(names="sample")  # or what the model names would be added to the source
    # and the balance still knows what is touched
    assert torch.allclose(without, FlowMatching(tiny, Loss())((batch, dice))[0], rtol=1e-5)
    tiny.guidance.register_to_config(names="edit")
    hook.remove()


def test_the_matte_is_taught_which_pixels_change(tiny, batch):
    dice = draw_noise(batch, Loss(), 0, 0, range(3), 3)
    plain, taught = (flow_matching_loss(tiny, batch, dice, matte=weight) for weight in (0.0, 0.5))
    assert torch.equal(plain[1], taught[1]), "the squared error is of the latents alone"
    with torch.no_grad():  # the denoiser's own guess, from a call by hand
        seen, sigma = EditCache(key_values=None), dice.sigma
        noisy = torch.lerp(batch.target, dice.noise, sigma.view(-1, 1, 1, 1, 1))
        context, mask = encode_context(tiny.mllm, tiny.guidance, batch.inputs, batch.vision)
        given = noisy, 1000 * sigma, sigma, context, mask, batch.source, batch.reference
        denoise(tiny.transformer, tiny.guidance, *given, cache=seen)
    share = seen.matte.sigmoid()
    right = torch.where(batch.changed.bool(), share, 1 - share)
    assert torch.allclose(taught[0] - plain[0], -0.5 * right.log().mean((1, 2, 3, 4)), rtol=1e-3)


# what the edit touches


def test_balance():
    kept = torch.ones(3, 1, 1, 4, 4)
    kept[0, 0, 0, 0, :3] = 0.0  # 3 of 16 places are touched
    kept[2] = 0.0
    plain, balanced = _edit_weights(kept, 1.0), _edit_weights(kept, 4.0)
    assert torch.equal(plain, torch.ones(3, 1, 1, 4, 4))
    first = balanced[0, 0, 0]
    assert torch.allclose(first[0, :3].sum(), first.sum() / 2) and torch.allclose(first.mean(), torch.tensor(1.0))
    assert torch.allclose(balanced[1:], plain[1:])
    half = _edit_weights(torch.full((1, 1, 1, 2, 2), 0.5), 4.0)
    assert torch.equal(half, torch.ones(1, 1, 1, 2, 2))
    capped = _edit_weights(kept, 2.0)[0, 0, 0]
    assert torch.allclose(capped[0, 0] / capped[3, 3], torch.tensor(2 / (0.5 / (13 / 16))))


@torch.no_grad()
def test_balance_changes_the_loss_and_not_the_plain_error(tiny, batch):
    dice = draw_noise(batch, Loss(), 0, 0, range(3), 3)
    (plain, squared), (balanced, same) = (flow_matching_loss(tiny, batch, dice, balance) for balance in (1.0, 4.0))
    assert torch.equal(plain, squared) and torch.equal(squared, same)
    assert (balanced / plain - 1).abs().max() > 0.05


# without the instruction

HARD = [
    "Make it snow.",
    "Ersetze die Tür durch ein Fenster – schön!",
    "two spaces  ",
    "a line\n",
    "tab\t",
    "quote'",
    "换成红色的船",
    " ",
    "x",
]


@pytest.mark.parametrize("mode", ("image", "video", "ref"))
def test_dropped_instructions_are_the_pipelines_other_branch(mode, tiny, merged):
    frames = np.full((1 if mode == "image" else 5, 64, 64, 3), 90, np.uint8)
    reference = [Image.new("RGB", (40, 30))] if mode == "ref" else []
    for pipe in (tiny, merged[False]):
        prepare = lambda prompts: prepare_inputs(
            pipe.processor, pipe.guidance.config, prompts, [frames] * len(prompts), [reference] * len(prompts)
        )
        inputs, empty = prepare(HARD).without_pixels(), prepare([""])
        drop = torch.arange(len(HARD)) % 2 == 0
        dropped = drop_instructions(inputs, drop, pipe.processor)
        assert drop_instructions(inputs, torch.zeros(len(HARD), dtype=torch.bool), pipe.processor) is inputs
        for i in range(len(HARD)):
            expected = empty if drop[i] else inputs[i]
            for name in ("input_ids", "position_ids", "lengths"):
                assert torch.equal(getattr(dropped[i], name), getattr(expected, name)), (HARD[i], name)
        assert dropped.modes == inputs.modes
        everything = drop_instructions(inputs, torch.ones(len(HARD), dtype=torch.bool), pipe.processor)
        assert torch.equal(everything.input_ids, empty.input_ids.expand(len(HARD), -1))  # and no padding is left


@torch.no_grad()
def test_dropping_changes_the_loss_of_that_sample_alone(tiny, batch):
    dice = draw_noise(batch, Loss(), 0, 0, range(3), 3)
    dropped = replace(batch, inputs=drop_instructions(batch.inputs, torch.tensor([False, True, False]), tiny.processor))
    (before, _), (after, _) = (flow_matching_loss(tiny, x, dice) for x in (batch, dropped))
    assert torch.allclose(after[[0, 2]], before[[0, 2]], rtol=1e-5) and abs(after[1] / before[1] - 1) > 1e-4


# errors as the eye meets them


@pytest.fixture(scope="module")
def gram(tiny):
    world = World(num_frames=1, split="eval")
    with torch.no_grad():
        clips = encode_frames(
            tiny.vae, np.stack([world.sample(1_640_000 + i, ("add", "style")[i % 2]).target for i in range(40)])
        )
    return pixel_metric(tiny.vae, clips, progress=False)


@torch.no_grad()
def test_pixel_metric_predicts_pixel_errors(tiny, gram):
    assert gram.shape == (32, 32) and torch.allclose(gram, gram.T, rtol=0, atol=1e-12)
    values, directions = torch.linalg.eigh(gram)
    assert values.min() > -1e-12
    world, (mean, std) = World(num_frames=1, split="eval"), latent_statistics(tiny.vae, "cpu")
    clips = encode_frames(
        tiny.vae, np.stack([world.sample(1_650_000 + i, ("remove", "change")[i % 2]).target for i in range(8)])
    )
    decode = lambda x: tiny.vae.decode(x * std + mean).sample
    base, signs = decode(clips), torch.randn(clips[:, :1].shape, generator=torch.Generator().manual_seed(1)).sign()
    errors = [0.2 * signs * d.float().view(1, -1, 1, 1, 1) for d in directions.T[5::6]] + [
        0.2 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))
    ]
    real = torch.stack([(decode(clips + e) - base).square().mean() for e in errors])
    factor = metric_factor(gram, 1.0)
    measured = torch.stack([torch.einsum("ij,bifhw->bjfhw", factor, e).square().mean() for e in errors])
    plain = torch.stack([e.square().mean() for e in errors])
    off = lambda guess: (guess / guess.mean() / (real / real.mean())).log().abs()
    assert off(measured).max() < np.log(1.3)
    assert off(plain).median() > np.log(1.8)
    # and as a whole: the mean over the channels times their number is the pixel error
    assert abs((measured * 32 * gram.diagonal().mean() / real).log().median()) < np.log(1.5)


@torch.no_grad()
def test_pixel_metric_in_the_loss(tiny, batch, gram):
    dice = draw_noise(batch, Loss(), 0, 0, range(3), 3)
    plain, _ = flow_matching_loss(tiny, batch, dice)
    assert torch.allclose(flow_matching_loss(tiny, batch, dice, factor=metric_factor(gram, 0.0))[0], plain, rtol=1e-5)
    for share in (0.5, 1.0):
        matrix = (1 - share) * torch.eye(len(gram)) + share * (gram / gram.diagonal().mean()).float()
        factor = metric_factor(gram, share)
        assert torch.allclose(factor @ factor.T, matrix, atol=1e-5)
        errors = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))
        assert torch.allclose((factor.T @ errors).square().sum(0), (errors * (matrix @ errors)).sum(0), rtol=1e-4)
        loss, numbers = FlowMatching(tiny, Loss(balance=1.0, pixel_metric=share), gram)((batch, dice))
        assert abs(numbers["loss/ref"] / plain.mean().item() - 1) < 1e-5 and (loss / plain - 1).abs().max() > 0.02
    flat = torch.randn(48, 4, generator=torch.Generator().manual_seed(0)).double()
    assert metric_factor(flat @ flat.T, 1.0).isfinite().all()  # a decoder that ignores 44 of 48 directions
    with pytest.raises(ValueError, match="`share` has to lie in 0..1 but is 2"):
        metric_factor(gram, 2)
    with pytest.raises(ValueError, match="`gram` has to be given for a `pixel_metric` of 0.5 but is None"):
        FlowMatching(tiny, Loss(pixel_metric=0.5))


# numbers to watch


def test_split_losses():
    numbers = _split_losses(
        torch.tensor([1.0, 2.0, 3.0, 6.0]),
        torch.tensor([0.0, 0.3, 0.26, 1.0]),
        ["image", "ref", "ref", "video"],
        ["add", "subject", "", "add"],
    )
    assert numbers == {
        "loss/image": 1.0,
        "loss/add": 3.5,
        "loss/0-0.25": 1.0,
        "loss/ref": 2.5,
        "loss/subject": 2.0,
        "loss/0.25-0.5": 2.5,
        "loss/video": 6.0,
        "loss/0.75-1": 6.0,
    }


# fewer steps


def test_noise_levels_of_few_steps_are_those_of_an_edit_with_so_many(tiny):
    for few in (1, 2, 4):
        tiny.scheduler.set_timesteps(sigmas=flow_sigmas(few))
        sigma, weight = draw_noise_levels(Loss(few=few), 64, np.random.default_rng(0), tiny.scheduler.config.shift)
        assert np.allclose(np.unique(sigma), np.unique(tiny.scheduler.sigmas[:-1]), atol=1e-6) and (weight == 1).all()
