"""The loop, its checkpoints, the caches and the losses."""
import copy
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from kiwi_edit.core import preset
from kiwi_edit.curriculum import STAGES, Bucket, Stage
from kiwi_edit.encoder import prepare_sample
from kiwi_edit.training import (PARTS, Optimizers, autoencoder_batch, autoencoder_loss, build_cache, cached_batch, description_batch, description_loss,
                                fast_images, fingerprint, fit, flow_matching_loss, initialize_autoencoder, learning_rate, load_state, measure_latents,
                                publish, save_state, start_model, train, train_motion_only)
from kiwi_edit.world import TASKS


@pytest.fixture(scope="module")
def pipe():
    model = start_model()
    for part in (model.vae, model.mllm, model.guidance, model.transformer): part.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def cache(pipe, tmp_path_factory):
    bucket = Bucket(dict(subject=.5, background=.5), num_frames=1, height=32, width=32, batch_size=4, samples=8)
    return bucket, build_cache(pipe, bucket, tmp_path_factory.mktemp("cache"), 1000, progress=False)


def batch_of(pipe, cache, step=0):
    bucket, tensors = cache
    ids = prepare_sample(pipe.processor, pipe.guidance.config, "x", np.zeros((1, 64, 64, 3), np.uint8)).token_ids
    return cached_batch([tensors], (replace(bucket, weight=1.),), ids, step)


# the loop

TOY = textwrap.dedent("""
    import sys, time, numpy as np, torch, torch.nn.functional as F
    from kiwi_edit.training import fit
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    def batch(step): return torch.from_numpy(np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32))
    def loss(x, step):
        time.sleep(float(sys.argv[2]))
        return F.mse_loss(layers(x + .1 * torch.randn_like(x)), x.sum(1, keepdim=True)), {}
    fit({"layers": layers}, loss, batch, sys.argv[1], steps=60, lr=.02, progress=False, save_every=0)
""")


def toy(folder, pause="0"): return subprocess.Popen([sys.executable, "-c", TOY, str(folder), pause])
def losses(folder): return {r["step"]: r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}


def test_a_killed_run_continues_with_the_losses_it_would_have_had(tmp_path):
    killed = toy(tmp_path / "killed", ".2")
    log = tmp_path / "killed/log.jsonl"
    while killed.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 12): time.sleep(.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    assert max(losses(tmp_path / "killed")) < 60
    with open(log, "a") as f: f.write('{"step": 99, "lo')  # as if the kill had come in the middle of a line
    assert toy(tmp_path / "killed").wait(120) == toy(tmp_path / "whole").wait(120) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_loop_learns_and_logs(tmp_path):
    layer = torch.nn.Linear(4, 1)
    state = fit({"layer": layer}, lambda x, step: ((layer(x) - x.sum(1, keepdim=True)).square().mean(), dict(extra=1.)),
                lambda step: torch.from_numpy(np.random.default_rng(step).normal(size=(32, 4)).astype(np.float32)), tmp_path, steps=80, lr=1., progress=False)
    assert state["step"] == 80
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert rows[-1]["loss"] < .05 * rows[0]["loss"] and {"step", "loss", "grad_norm", "lr", "seconds", "extra"} <= rows[0].keys()


def test_not_a_number_stops_the_run(tmp_path):
    layer = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="step 3"):
        fit({"layer": layer}, lambda x, step: (layer(x).mean() * (float("nan") if step == 3 else 1), {}), lambda step: torch.ones(1, 2), tmp_path, steps=9, progress=False)


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    layer = torch.nn.Linear(2, 1)
    def batch(step):
        if step == 2: raise OSError("no such clip")
        return torch.ones(1, 2)
    with pytest.raises(OSError, match="no such clip"): fit({"layer": layer}, lambda x, step: (layer(x).mean(), {}), batch, tmp_path, steps=9, progress=False)


def test_checkpoint_of_other_parameters_is_refused(tmp_path):
    small, large = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1)
    save_state(tmp_path / "last", {"layer": small}, [], dict(step=1))
    with pytest.raises(ValueError, match="bias"): load_state(tmp_path / "last", {"layer": large})
    assert load_state(tmp_path / "none", {"layer": small}) is None


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    layer = torch.nn.Linear(2, 1)
    save_state(tmp_path / "last", {"layer": layer}, [], dict(step=7))
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert load_state(tmp_path / "last", {"layer": layer}) == dict(step=7)


def test_learning_rate_warms_up_and_falls_to_its_floor():
    rates = [learning_rate(p / 100, .1, .05) for p in range(101)]
    assert rates[0] < .02 and np.argmax(rates) == 10 and rates[10] == pytest.approx(1) and rates[-1] == pytest.approx(.05)
    assert all(b <= a + 1e-12 for a, b in zip(rates[10:], rates[11:]))


def test_muon_moves_every_matrix_and_adamw_the_rest():
    module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.LayerNorm(4), torch.nn.Linear(4, 5))
    before = copy.deepcopy(module.state_dict())
    optimizers = Optimizers({"m": module}, .01)
    assert [type(o).__name__ for o in optimizers.all] == ["Muon", "AdamW"] and len(optimizers.flat) == 2
    for p in module.parameters(): p.grad = torch.randn_like(p)
    optimizers.step(1.)
    assert all(not torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    with pytest.raises(ValueError, match="kind"): Optimizers({"m": module}, .01, kind="sgd")


# the autoencoder


def test_fast_images_gives_the_same_and_leaves_no_trace():
    vae = AutoencoderKLWan(**preset("tiny").vae)
    pixels = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    plain = vae(pixels).sample
    with fast_images(vae):
        fast = vae(pixels).sample
        clip = vae.encode(torch.zeros(1, 3, 5, 32, 32)).latent_dist.mean
    assert torch.allclose(plain, fast, atol=1e-5) and clip.shape == (1, 48, 2, 4, 4)
    assert not any("forward" in vars(m) for m in vae.modules())


def test_motion_training_leaves_single_frames_alone_to_the_bit(tmp_path):
    vae = AutoencoderKLWan(**preset("tiny").vae)
    initialize_autoencoder(vae)
    frame, clip = autoencoder_batch(0, 2, 1, 32), autoencoder_batch(0, 2, 5, 32)
    before = [vae.encode(x).latent_dist.mean.detach() for x in (frame, clip)]
    train_motion_only(vae)
    fit({"vae": vae}, lambda x, step: autoencoder_loss(vae, x), lambda step: clip, tmp_path, steps=3, lr=1e-2, weight_decay=0., progress=False)
    after = [vae.encode(x).latent_dist.mean.detach() for x in (frame, clip)]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-4)


def test_autoencoder_batches_are_a_function_of_the_step():
    assert torch.equal(autoencoder_batch(3, 4, 1, 32), autoencoder_batch(3, 4, 1, 32))
    assert not torch.equal(autoencoder_batch(3, 4, 1, 32), autoencoder_batch(4, 4, 1, 32))
    assert autoencoder_batch(0, 2, 5, 32).shape == (2, 3, 5, 32, 32)


def test_measured_latents_are_standard_normal_afterwards():
    vae = AutoencoderKLWan(**preset("tiny").vae)
    initialize_autoencoder(vae)
    measure_latents(vae, batches=2, num_frames=1)
    latents = torch.cat([vae.encode(autoencoder_batch(10_000_000 + i, 8, 1)).latent_dist.mode() for i in range(2)]).detach()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normal = (latents - mean) / std
    assert normal.mean().abs() < 1e-3 and (normal.std() - 1).abs() < 1e-2


# the encoder


def test_descriptions_are_graded_on_the_answer_alone(pipe):
    inputs, answer = description_batch(pipe.processor, pipe.guidance.config, 1, batch_size=3)
    said = pipe.processor.tokenizer.decode(inputs.input_ids[0][answer[0]])
    assert said.startswith("Before: ") and "After: " in said and said.endswith("<|im_end|>\n")
    loss, numbers = description_loss(pipe.mllm, pipe.guidance.config, (inputs, answer))
    assert 5 < loss < 9 and numbers["accuracy"] < .2


# the denoiser


def test_cache_is_read_back_and_changes_with_weights_and_settings(pipe, tmp_path):
    bucket = Bucket(dict(add=1.), num_frames=1, height=32, width=32, samples=3)
    first = build_cache(pipe, bucket, tmp_path, 1000, progress=False)
    files = list(tmp_path.iterdir())
    again = build_cache(pipe, bucket, tmp_path, 1000, progress=False)
    assert all(torch.equal(first[k], again[k]) for k in first) and list(tmp_path.iterdir()) == files
    name = fingerprint(pipe, bucket, 1000)
    assert name == fingerprint(pipe, replace(bucket, weight=.3, batch_size=2), 1000)  # how it is read does not matter
    assert len({name, fingerprint(pipe, replace(bucket, samples=4), 1000), fingerprint(pipe, bucket, 1001), fingerprint(pipe, replace(bucket, num_frames=5), 1000)}) == 4
    with torch.no_grad(): pipe.vae.quant_conv.bias[0] += 1
    assert fingerprint(pipe, bucket, 1000) != name
    with torch.no_grad(): pipe.vae.quant_conv.bias[0] -= 1


def test_cached_and_direct_loss_agree(pipe, cache):
    import PIL.Image
    from kiwi_edit.encoder import collate_inputs, encode_context
    from kiwi_edit.world import World
    bucket, tensors = cache
    batch = batch_of(pipe, cache)
    with torch.no_grad(): cached = encode_context(pipe.mllm, pipe.guidance, batch.inputs, batch.vision)[0]
    rng, world = np.random.default_rng(1000), World(32, 32, 1)
    samples = [world.sample(1000 + i, list(bucket.tasks)[rng.choice(2, p=(.5, .5))]) for i in range(8)]
    rows = [int((tensors["source"] == s.half()).flatten(1).all(1).nonzero()[0]) for s in batch.source]
    inputs = collate_inputs([prepare_sample(pipe.processor, pipe.guidance.config, samples[i].instruction, samples[i].source, [PIL.Image.fromarray(samples[i].reference)]) for i in rows])
    with torch.no_grad(): direct = encode_context(pipe.mllm, pipe.guidance, inputs)[0]
    assert torch.allclose(cached, direct, atol=2e-2 * direct.abs().max())  # features are kept in half precision
    assert batch.tasks == [samples[i].task for i in rows]


def test_loss_reaches_every_part_that_is_to_learn(pipe, cache):
    parts = {name: PARTS[name](pipe) for name in ("language_model", "guidance", "transformer")}
    for part in parts.values(): part.requires_grad_(True)
    torch.manual_seed(0)
    loss, numbers = flow_matching_loss(pipe, batch_of(pipe, cache))
    loss.backward()
    try:
        assert 1 < loss < 3 and set(numbers) <= {f"loss/{task}" for task in TASKS}
        silent = [f"{name}.{key}" for name, part in parts.items() for key, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert not [key for key in silent if not any(word in key for word in ("text_embedder", "image_queries", "video_queries", "embed_tokens"))], silent
    finally:
        for part in parts.values(): part.requires_grad_(False)
        for p in (p for part in parts.values() for p in part.parameters()): p.grad = None


def test_a_stage_runs_resumes_and_is_published(tmp_path, monkeypatch):
    stage = Stage("image", ("language_model", "guidance", "transformer"), minutes=5, lr=1e-3,
                  buckets=(Bucket(dict(add=1.), num_frames=1, height=32, width=32, batch_size=2, samples=4),))
    monkeypatch.setitem(STAGES, "image", stage)
    assert train("image", tmp_path / "run", steps=2, progress=False, device="cpu")["step"] == 2
    written = (tmp_path / "run/model/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "run/model").rename(tmp_path / "run/model.old")  # as a kill between the two renames leaves it
    assert train("image", tmp_path / "run", steps=2, progress=False, device="cpu")["step"] == 2
    assert (tmp_path / "run/model/transformer/diffusion_pytorch_model.safetensors").read_bytes() == written and not (tmp_path / "run/model.old").exists()
    assert train("image", tmp_path / "run", steps=3, progress=False, device="cpu")["step"] == 3
    assert len(list((tmp_path / "run/image").glob("strip-*.png"))) == 2 and set(json.loads((tmp_path / "run/image/validation.jsonl").read_text().splitlines()[0])) == {"step", *TASKS[:6]}
    assert (tmp_path / "run/image/curve.png").stat().st_size > 5000
    publish(tmp_path / "run", tmp_path / "shipped")
    from kiwi_edit.pipeline import KiwiEditPipeline
    whole, shipped = (KiwiEditPipeline.from_pretrained(tmp_path / folder) for folder in ("run/model", "shipped"))
    for a, b in zip(whole.transformer.parameters(), shipped.transformer.parameters()): assert torch.allclose(a, b, atol=1e-3)
    assert "_name_or_path" not in (tmp_path / "shipped/model_index.json").read_text()
    assert (tmp_path / "shipped/training/image.jsonl").exists()


def test_unknown_stage_is_named(tmp_path):
    with pytest.raises(ValueError, match="stage.*'stage-9'"): train("stage-9", tmp_path)
    assert not list(tmp_path.iterdir())
