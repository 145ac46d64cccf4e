"""The autoencoder and the encoder before anything is edited: their batches, their losses, and what a first model is made of."""

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKLWan

import kiwi_edit.train.foundations
import common
from kiwi_edit.train.curriculum import STAGES
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.train.foundations import (
    Description,
    _LinearProjection,
    Reconstruction,
    autoencoder_batch,
    _description,
    description_batch,
    _initialize_autoencoder,
    measure_latents,
    start_model,
    _world_texts,
)
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.engine import train
from kiwi_edit.world import World


@pytest.fixture(scope="module")
def small():
    return common.small_sizes()


@pytest.fixture
def vae(small):
    torch.manual_seed(0)
    model = AutoencoderKLWan(**small.vae)
    _initialize_autoencoder(model)
    return model


@pytest.fixture(scope="module")
def pipe(small):
    torch.manual_seed(0)
    return KiwiEditPipeline.from_preset(
        small, make_tokenizer(_world_texts(200), small.mllm["text_config"]["vocab_size"])
    )


# the autoencoder


def test_autoencoder_batches_are_a_function_of_the_step():
    batch = autoencoder_batch(3, 4, 32)
    assert batch.shape == (4, 3, 1, 32, 32) and batch.min() >= -1 and batch.max() <= 1 and batch.std() > 0.2
    assert torch.equal(batch, autoencoder_batch(3, 4, 32))
    others = autoencoder_batch(4, 4, 32), autoencoder_batch(3, 4, 32, seed=1), autoencoder_batch(3, 4, 32, split="eval")
    for other in others:
        assert not any(torch.equal(a, b) for a in batch for b in other)
    parts = [autoencoder_batch(3, 4, 32, part=part, parts=2) for part in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batch)


@torch.no_grad()
def test_a_fresh_autoencoder_sees_frames_one_by_one_and_has_little_noise(vae):
    clip = autoencoder_batch(0, 5, 32).transpose(0, 2)
    posterior = vae.encode(clip).latent_dist
    assert posterior.std.max() < 0.1 and 0.2 < posterior.mean.std() < 5
    alone = torch.cat([vae.encode(frame).latent_dist.mean for frame in clip.split(1, 2)], 2)
    assert torch.allclose(posterior.mean, alone, atol=1e-5)
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            assert not module.weight[:, :, :-1].any() and module.weight[:, :, -1].any(), name


def test_a_projection_keeps_the_components_of_blocks_and_no_better_line_can(vae):
    pixels = autoencoder_batch(0, 32, 64)
    few, many = (_LinearProjection(pixels, channels) for channels in (12, 48))
    errors = [(projection.decode(projection.encode(pixels)) - pixels).square().mean() for projection in (few, many)]
    assert errors[1] < 0.5 * errors[0] < 0.1 * pixels.var()
    latents = many.encode(pixels)
    assert latents.shape == (32, 48, 1, 8, 8)
    flat = latents.movedim(1, -1).flatten(0, -2)
    assert torch.allclose(torch.cov(flat.T), torch.eye(48), atol=0.02) and flat.mean(0).abs().max() < 0.01
    assert torch.allclose(few.encode(pixels), latents[:, :12], atol=1e-3)
    left, right = pixels[..., :32], pixels[..., 32:]
    assert torch.allclose(torch.cat([many.encode(left), many.encode(right)], -1), latents, atol=1e-4)


def test_reconstruction_is_graded_sample_by_sample(vae):
    batch = autoencoder_batch(0, 3, 32)
    for projection in (None, _LinearProjection(autoencoder_batch(1, 16, 32))):
        torch.manual_seed(0)
        losses, numbers = Reconstruction(vae, projection)(batch)
        assert losses.shape == (3,) and 0 < numbers["psnr"] < 30
        torch.manual_seed(0)
        with torch.no_grad():
            mean = vae.encode(batch).latent_dist.mean
            wanted = mean if projection is None else projection.encode(batch)
            error = vae.decode(wanted + 0.03 * torch.randn_like(wanted)).sample - batch
        away, weight = (mean, 1e-4) if projection is None else (mean - wanted, 0.1)
        pull = away.square().flatten(1).mean(1)
        squared, absolute = error.square().flatten(1).mean(1), error.abs().flatten(1).mean(1)
        assert torch.allclose(losses, 4 * squared + 0.2 * absolute + weight * pull, rtol=1e-4)
        assert numbers["psnr"] == pytest.approx(10 * math.log10(4 / squared.mean()), rel=1e-4)
        assert numbers["pull"] == pytest.approx(pull.mean().item(), rel=1e-4)


def learn(model, batch, steps, lr=3e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch)[0].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("towards_a_projection", (False, True))
def test_an_autoencoder_learns(vae, towards_a_projection):
    batch = autoencoder_batch(0, 4, 32)
    projection = _LinearProjection(batch) if towards_a_projection else None
    losses = learn(Reconstruction(vae, projection), batch, 12)
    assert losses[-1] < 0.75 * losses[0]


def test_measured_latents_are_standard_normal_afterwards(vae):
    measure_latents(vae, batches=2)
    with torch.no_grad():
        latents = torch.cat([vae.encode(autoencoder_batch(10_000_000 + i, 32)).latent_dist.mode() for i in range(2)])
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    normal = ((latents - mean) / std).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 1e-3 and (normal.std(1) - 1).abs().max() < 1e-2


# the encoder


def test_a_description_says_what_was_and_what_is():
    sample = World(32, 32, 1).sample(3, "change")
    assert _description(sample) == f"Before: {sample.source_caption}. After: {sample.caption}."
    assert sample.source_caption != sample.caption


def test_descriptions_are_graded_on_the_answer_alone(pipe):
    inputs, answer = description_batch(pipe.processor, pipe.guidance.config, 1, batch_size=4)
    decode, token = pipe.processor.tokenizer.decode, inputs.token_ids
    assert answer.shape == inputs.input_ids.shape and len({int(row.sum()) for row in answer}) > 1
    for ids, row, length in zip(inputs.input_ids, answer, inputs.lengths):
        said, asked = decode(ids[row]), decode(ids[:length][~row[:length]])
        assert said.startswith("Before: ") and "After: " in said and said.endswith("<|im_end|>\n")
        assert asked.endswith("<|im_start|>assistant\n") and "Before: " not in asked
        assert not row[length:].any() and not (ids == token["query"]).any()
        assert (ids == token["image"]).any() | (ids == token["video"]).any()
    assert (
        inputs.position_ids.max(0).values.gather(1, inputs.lengths[:, None] - 1) > inputs.lengths[:, None] // 4
    ).all()
    model = Description(pipe.mllm, pipe.guidance.config)
    with torch.no_grad():
        losses, numbers = model((inputs, answer))
        changed = copy.deepcopy(inputs)
        changed.input_ids[0, int(inputs.lengths[0]) - 2] = 5  # a word of the answer of the first
        other, _ = model((changed, answer))
    assert losses.shape == (4,) and abs(losses.mean() - math.log(1536)) < 1 and numbers["accuracy"] < 0.2
    assert other[0] != losses[0] and torch.equal(other[1:], losses[1:])


def test_description_batches_are_a_function_of_the_step_and_can_be_shared(pipe):
    make = lambda step, **more: description_batch(pipe.processor, pipe.guidance.config, step, batch_size=4, **more)[0]
    whole = make(1)
    assert torch.equal(whole.input_ids, make(1).input_ids) and torch.equal(whole.pixel_values, make(1).pixel_values)
    assert not torch.equal(whole.input_ids[0], make(2).input_ids[0][: whole.input_ids.shape[1]])
    parts = [make(1, part=part, parts=2) for part in range(2)]
    for i in range(4):
        assert torch.equal(parts[i % 2][i // 2].input_ids, whole[i].input_ids)
    assert {grid[0] for grids in whole.grids for grid in grids} == {1}
    assert max(grid[0] for grids in make(3).grids for grid in grids) > 1  # every third batch is of clips


def test_an_encoder_learns_to_describe(pipe):
    mllm = copy.deepcopy(pipe.mllm)
    losses = learn(
        Description(mllm, pipe.guidance.config),
        description_batch(pipe.processor, pipe.guidance.config, 1, batch_size=4),
        8,
    )
    assert losses[-1] < 0.8 * losses[0]


# what a first model is made of


def test_a_first_model_knows_the_words_of_the_world_and_follows_its_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(kiwi_edit.train.foundations, "_world_texts", lambda: seen.append(1) or _world_texts(300))
    torch.manual_seed(7)
    a, b = start_model(), start_model()
    assert len(seen) == 2
    assert all(torch.equal(value, b.transformer.state_dict()[key]) for key, value in a.transformer.state_dict().items())
    assert not torch.equal(a.transformer.patch_embedding.weight, start_model(seed=1).transformer.patch_embedding.weight)
    assert a.guidance.config.names == "edit"
    assert not any(p.any() for p in a.transformer.proj_out.parameters())  # a copy to begin with
    assert a.processor.tokenizer.tokenize("Remove the scene.") == ["Remove", "Ġthe", "Ġscene", "."]
    assert len(a.processor.tokenizer) <= 1536
    weight = a.vae.encoder.conv_in.weight
    assert not weight[:, :, :-1].any() and weight[:, :, -1].any()


@pytest.mark.parametrize("name, part", [("autoencoder-start", "vae"), ("autoencoder", "vae"), ("encoder", "mllm")])
def test_a_stage_trains_its_part_alone(pipe, name, part, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(
        "kiwi_edit.train.engine.autoencoder_batch", lambda step, *_, **more: autoencoder_batch(step, 2, 32, **more)
    )
    monkeypatch.setattr(
        "kiwi_edit.train.engine.description_batch",
        lambda processor, config, step, **more: description_batch(processor, config, step, 2, **more),
    )
    monkeypatch.setattr("kiwi_edit.train.engine.measure_latents", lambda vae: measure_latents(vae, batches=1))
    monkeypatch.setattr(
        "kiwi_edit.train.engine.fit_projection",
        lambda channels: _LinearProjection(autoencoder_batch(0, 16, 32), channels),
    )
    records = []
    assert (
        train(
            name,
            tmp_path / "run",
            str(tmp_path / "start"),
            steps=2,
            device="cpu",
            progress=False,
            on_step=records.append,
        )["step"]
        == 2
    )
    assert ("accuracy" if name == "encoder" else "psnr") in records[0] and records[0]["lr"] < STAGES[name].lr
    before, after = (KiwiEditPipeline.from_pretrained(tmp_path / folder) for folder in ("start", "run/model"))
    changed = {
        f"{module}.{key}"
        for module in ("vae", "mllm", "guidance", "transformer")
        for key, value in getattr(before, module).state_dict().items()
        if not torch.equal(value, getattr(after, module).state_dict()[key])
    }
    assert changed and all(key.startswith(f"{part}.") for key in changed)
    assert (before.vae.config.latents_std != after.vae.config.latents_std) == (part == "vae")
