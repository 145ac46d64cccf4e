"Clips to latents and back: convolutions in two dimensions, streams, windows; each against the plain way."

import copy
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm

from kiwi_edit.core import asset
from kiwi_edit.latents import *

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def frames(count, height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def video(*size):
    "Such frames as an autoencoder takes them."
    return torch.from_numpy(frames(*size)).permute(3, 0, 1, 2)[None] / 127.5 - 1


def encoded(vae, x):
    return vae.encode(x).latent_dist.mode()


def streamed(vae, *chunks):
    return torch.cat(list(stream_latents(vae, chunks)), 2)


def levels_apart(vae, given, latents):
    "8-bit levels between the frames that flow out and those of the whole clip."
    whole = decode_latents(vae, latents)[0].astype(int)
    return np.abs(np.concatenate(list(stream_frames(vae, given))) - whole).max()


def replaced(vae):
    "Modules with a forward of their own."
    return {name for name, module in vae.named_modules() if "forward" in vars(module)}


@pytest.fixture(scope="module")
def vae():
    tiny = AutoencoderKLWan.from_pretrained(asset("kiwi-edit-tiny"), subfolder="vae", torch_dtype=torch.float32)
    return tiny.eval().requires_grad_(False)


@contextmanager
def tiles(vae):
    vae.enable_tiling(48, 48, 32, 32)
    try:
        yield
    finally:
        vae.disable_tiling()


def small(**changes):
    "An autoencoder of the same class with other options."
    torch.manual_seed(0)
    config = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    config |= dict(temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return AutoencoderKLWan(**config | changes).eval().requires_grad_(False)


residual = dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2, decoder_base_dim=8)
kinds = {
    "wan2.1": {},
    "wan2.2": residual,
    "each frame its own": residual | dict(temperal_downsample=[False] * 3, scale_factor_temporal=1),
}


@pytest.fixture(params=["tiny", *kinds])
def one(request, vae):
    "An autoencoder of each kind."
    return vae if request.param == "tiny" else small(**kinds[request.param])


@pytest.mark.parametrize("count", [1, 5, 13])
def test_convolutions_in_two_dimensions_give_the_same(one, count):
    x, near = video(count, 32, 48), dict(atol=1e-4, rtol=1e-4)
    plain = encoded(one, x)
    back = one.decode(plain).sample
    with fast_layers(one):
        assert all("forward" in vars(m) for m in one.modules() if isinstance(m, (WanCausalConv3d, WanRMS_norm)))
        close(encoded(one, x), plain, **near)
        close(one.decode(plain).sample, back, **near)
    assert not replaced(one) and "_fast_users" not in vars(one.decoder)


def alone(module):
    "A layer as all that an autoencoder has."
    whole = torch.nn.Module()
    whole.decoder = module
    return whole


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("past", [0, 1, 2])
def test_a_lone_convolution(stride, past):
    conv = WanCausalConv3d(3, 5, 3, stride=(stride, 1, 1), padding=1)
    x, before = torch.randn(2, 3, 6, 7, 9), torch.randn(2, 3, past, 7, 9) if past else None
    plain = conv(x, before)
    with fast_layers(alone(conv)):
        close(conv(x, before), plain)


def test_a_lone_norm_also_of_nothing_and_in_half_precision():
    norm = WanRMS_norm(5, images=False)
    x = torch.randn(2, 5, 3, 4, 6)
    x[:, :, 1, 2, 3] = 0

    def results():
        given = x.clone().requires_grad_()
        y = norm(given)
        y.square().sum().backward()
        return y.detach(), given.grad

    plain, half = results(), norm(x.bfloat16())
    with fast_layers(alone(norm)):
        close(results(), plain)
        assert torch.equal(norm(x.bfloat16()), half)


def test_gradients_are_the_same():
    one, x = small().requires_grad_(True), video(5, 16, 16)

    def gradients():
        one.zero_grad()
        encoded(one, x).square().sum().backward()
        return [p.grad.clone() for p in one.parameters() if p.grad is not None]

    plain = gradients()
    with fast_layers(one):
        close(gradients(), plain, atol=1e-4, rtol=1e-3)


def test_the_switch_counts_its_users_and_survives_errors(vae):
    inside, go_on = threading.Event(), threading.Event()

    def work():
        with fast_layers(vae):
            inside.set()
            go_on.wait(10)

    other = threading.Thread(target=work)
    other.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="on purpose"):
        with fast_layers(copy.copy(vae)):
            raise RuntimeError("on purpose")
    assert replaced(vae)  # the other thread is still within
    go_on.set()
    other.join()
    assert not replaced(vae)


@pytest.mark.parametrize("way", ["casting", "offload", "group offload"])
def test_hooks_of_casting_and_offloading_stay(way):
    "They live where the switch puts its own forwards."
    one, clip, cpu = small(), frames(5, 32, 48), torch.device("cpu")
    plain, near = encode_frames(one, clip), dict(atol=1e-4, rtol=1e-3)
    if way == "casting":
        one.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        near = dict(atol=0.1, rtol=0.1)
    elif way == "offload":
        accelerate.cpu_offload(one, cpu)
    else:
        one.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    hooked = replaced(one)
    assert any(isinstance(one.get_submodule(name), WanCausalConv3d) for name in hooked)
    with torch.no_grad():
        for _ in range(2):
            close(encode_frames(one, clip, cpu), plain, **near)
        assert decode_latents(one, plain).shape == (1, *clip.shape)
    assert replaced(one) == hooked


def test_streams_give_what_whole_clips_give(one):
    clip, group = frames(13, 32, 48), one.config.scale_factor_temporal
    latents = encode_frames(one, clip)
    for size in (1, 5, 13):
        close(streamed(one, *(clip[i : i + size] for i in range(0, 13, size))), latents)
    for given in (latents, latents.split(1, 2), latents.split(3, 2)):
        assert levels_apart(one, given, latents) <= 1
    assert latents.shape[2] == 1 + 12 // group
    assert [len(x) for x in stream_frames(one, latents)] == [1] + [group] * (12 // group)


@pytest.mark.parametrize("kind", ("wan2.2", "each frame its own"))
def test_no_frame_is_left_out(kind):
    one = small(**kinds[kind])
    with pytest.raises(ValueError, match=r"`frames` has to hold 4k\+1 frames but holds 7"):
        encode_frames(one, frames(7))


def test_streams_of_two_clips_at_once(vae):
    "One flows in while another flows out, and a third call comes between."
    clips = [frames(9, seed=i) for i in range(2)]
    latents = [encode_frames(vae, clip) for clip in clips]
    out, streams = [], [stream_latents(vae, [clip]) for clip in clips]
    decoded = stream_frames(vae, latents[0])
    for pair in zip(*streams):
        out.append(pair)
        next(decoded)
        encode_frames(vae, clips[0][:1])
    for i in range(2):
        close(torch.cat([pair[i] for pair in out], 2), latents[i])


def test_a_stream_in_tiles(vae):
    clip = frames(9, 64, 96)
    with tiles(vae):
        latents = encode_frames(vae, clip)
        close(streamed(vae, clip), latents)
        assert levels_apart(vae, latents, latents) <= 1
    assert not torch.allclose(encode_frames(vae, clip), latents, atol=1e-3)


def test_tiles_of_two_clips_at_once(vae):
    "While one clip is within a tile another begins: both have tiles."
    found, clip, x = [], frames(5, 64, 96), video(5, 64, 96)

    def run(part, number):
        if not found:
            found.append(streamed(vae, clip))
        return encoded(vae, part)

    with tiles(vae):
        apart = streamed(vae, clip)
        assert torch.allclose(in_tiles(vae, x, "encode", run), in_tiles(vae, x, "encode"), atol=1e-5)
    torch.testing.assert_close(found[0], apart)


def test_memory_of_a_stream_does_not_grow_with_the_clip(vae):
    def allocated(stream):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            deque(stream, maxlen=0)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))

    clip = frames(41)
    chunks = lambda n: (clip[i : min(i + 4, n)] for i in range(0, n, 4))
    few, many = (allocated(stream_latents(vae, chunks(n))) for n in (13, 41))
    assert many < 1.05 * few
    latents = torch.randn(1, vae.config.z_dim, 11, 6, 8)
    few, many = (allocated(stream_frames(vae, latents[:, :, :n])) for n in (4, 11))
    assert many < 1.05 * few


def test_groups_and_what_is_left_over():
    clip = frames(11)
    assert [len(x) for x in regroup([clip[:2], clip[2:10], clip[10:]], drop_rest=True)] == [1, 4, 4]
    with pytest.raises(ValueError, match=r"`chunks` has to hold 4k\+1 frames for this autoencoder but 2 are left over"):
        list(regroup([clip]))
    assert np.array_equal(np.concatenate(list(regroup([clip[:3], clip[3:9]]))), clip[:9])


def test_the_stream_brings_an_offloaded_autoencoder_to_its_device():
    class Hook:
        calls = 0

        def pre_forward(self, module):
            self.calls += 1

    vae = small()
    vae._hf_hook = hook = Hook()
    list(stream_latents(vae, [frames(5)]))
    assert hook.calls == 2
