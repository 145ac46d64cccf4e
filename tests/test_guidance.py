"One denoiser call: what is added, what is appended, what is masked, what is computed once."

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel

import kiwi_edit.guidance
from kiwi_edit.guidance import (
    _NAMES,
    EditCache,
    KiwiGuidance,
    attend,
    denoise,
    rounded_sigma,
    to_velocity,
    window_caches,
)
from kiwi_edit.windows import denoise_windows, latent_windows


def models(zero_init=False, **config):
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, freq_dim=16, ffn_dim=32, num_layers=2)
    channels, patch = dict(in_channels=4), dict(patch_size=(1, 2, 2))
    transformer = WanTransformer3DModel(**sizes, **channels, **patch, out_channels=4, text_dim=8)
    queries = dict(num_image_queries=2, num_video_queries=3, num_ref_queries=4)
    own = dict(hidden_size=16, dim=24, zero_init=zero_init)
    return transformer.eval(), KiwiGuidance(**own, **channels, **patch, **queries, **config).eval()


def arguments():
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    return dict(
        latents=normal(3, 4, 2, 4, 6),
        timestep=torch.linspace(900, 100, 3),
        sigma=torch.linspace(0.9, 0.1, 3),
        context=normal(3, 5, 24),
        source_latents=normal(3, 4, 2, 4, 6),
        reference_latents=normal(3, 4, 2, 4, 6),
    )


def call(models, **changes):
    "The denoiser's velocity for these arguments, some of them changed."
    return denoise(*models, **arguments() | changes)


def masks(context, references=((1, 1), (1, 0), (0, 0))):
    "Masks of so many tokens of a context, and of these references."
    context = torch.tensor([[i < n for i in range(5)] for n in context])
    return dict(context_mask=context, reference_mask=torch.tensor(references, dtype=torch.bool))


@torch.no_grad()
def test_zero_initialised_embedders_add_nothing():
    for zero_init in (True, False):
        both = models(zero_init)
        added = call(both, reference_latents=None) - call(both, reference_latents=None, source_latents=None)
        assert added.eq(0).all() if zero_init else added.abs().max() > 1e-3


@torch.no_grad()
def test_source_is_scaled_by_sigma():
    both, alone, given = models(), dict(reference_latents=None), arguments()
    silent = call(both, **alone, sigma=torch.zeros(3))
    assert torch.allclose(silent, call(both, **alone, source_latents=None), atol=1e-6)
    both[1].source_embedder.bias.zero_()
    doubled = dict(sigma=given["sigma"] / 2, source_latents=given["source_latents"] * 2)
    assert torch.allclose(call(both, **alone), call(both, **alone, **doubled), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True))
def test_a_batch_gives_what_each_sample_gives_alone(first):
    both, args, given = models(ref_pad_first=first), arguments(), masks((5, 2, 4))
    together = call(both, **given)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in args.items()}
        one["context"] = one["context"][:, given["context_mask"][i]]
        references = one["reference_latents"][:, :, given["reference_mask"][i]]
        one["reference_latents"] = references if references.numel() else None
        assert torch.allclose(together[i : i + 1], denoise(*both, **one), atol=2e-6), i


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True))
def test_cache_gives_the_same_and_computes_once(first):
    transformer, guidance = both = models(ref_pad_first=first)
    given, block = masks((5, 4, 5), ((1, 1), (1, 0), (1, 1))), transformer.blocks[0]
    steps = [dict(sigma=torch.full((3,), s), timestep=torch.full((3,), 1000 * s)) for s in (0.9, 0.5, 0.1)]
    expected = [call(both, **step, **given) for step in steps]
    watched = dict(key=block.attn2.to_k, self=block.attn1.to_k)
    watched |= dict(source=guidance.source_embedder, reference=guidance.ref_embedder)
    calls, cache = Counter(), EditCache()
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    for step, plain in zip(steps, expected):
        assert torch.equal(call(both, **step, **given, cache=cache), plain)
    assert calls == {"key": 1, "self": 3, "source": 1, "reference": 1}


# what the network names


@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("names", _NAMES)
def test_a_perfect_network_gives_one_velocity_whatever_it_names(names, first):
    transformer, guidance = models(names=names, ref_pad_first=first)
    args = arguments()
    sigma, source = args["sigma"].view(-1, 1, 1, 1, 1), args["source_latents"]
    clean, noise = torch.randn_like(source), torch.randn_like(source)
    named = dict(velocity=noise - clean, sample=clean, edit=clean - source)[names]
    blank = torch.zeros_like(args["reference_latents"])
    transformer.forward = lambda **_: (torch.cat([blank, named] if first else [named, blank], 2),)
    velocity = denoise(transformer, guidance, **args | dict(latents=torch.lerp(clean, noise, sigma)))
    assert torch.allclose(velocity, noise - clean, atol=1e-4)


def test_an_edit_without_a_source_is_the_clean_clip_and_low_noise_does_not_blow_up():
    clean, noise = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    sigma = torch.tensor([0.5, 0.001])
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    velocity = to_velocity(clean, "edit", noisy, sigma)
    assert torch.allclose(velocity[0], (noise - clean)[0], atol=1e-5)
    assert torch.allclose(velocity[1], (noise - clean)[1] * 0.001 / 0.05, atol=1e-5)


def test_half_precision_of_the_network_does_not_reach_the_velocity_of_a_sample():
    clean, noisy = torch.randn(2, 1, 4, 1, 2, 2).bfloat16()
    exact = (noisy.float() - clean.float()) / 0.1
    assert torch.allclose(to_velocity(clean, "sample", noisy, torch.tensor([0.1])), exact)


@pytest.mark.parametrize(
    "wrong, rule",
    [
        (dict(names="noise"), "`names` has to be one of velocity, sample, edit but is 'noise'"),
        (dict(query_read_out="first"), "`query_read_out` has to be \"queries\" or .* but is 'first'"),
    ],
)
def test_unknown_ways_are_refused(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        models(**wrong)


@torch.no_grad()
def test_the_stock_forward_runs_and_is_left_as_it_was():
    transformer, guidance = both = models()
    calls, args = [], arguments()
    transformer.register_forward_hook(lambda *_: calls.append(1))
    stock = dict(hidden_states=args["latents"], timestep=args["timestep"], encoder_hidden_states=torch.randn(3, 7, 8))
    before = transformer(**stock).sample
    call(both)
    after = transformer(**stock).sample
    with pytest.raises(RuntimeError):
        call(both, timestep=torch.zeros(2))
    assert torch.equal(transformer(**stock).sample, after)
    assert len(calls) == 4 and torch.allclose(before, after, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in list(transformer.modules())[1:])


@torch.no_grad()
def test_wrapped_transformers_work():
    transformer, guidance = models()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = transformer

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    assert torch.equal(call((Wrapper(), guidance)), call((transformer, guidance)))
    with pytest.raises(TypeError, match="`transformer` has to hold a WanTransformer3DModel but is a Linear"):
        call((torch.nn.Linear(2, 2), guidance))


@torch.no_grad()
def test_what_a_user_has_set_on_attention_stays():
    transformer, _ = both = models()
    transformer.set_attention_backend("native")
    call(both)
    assert {attn.processor._attention_backend for b in transformer.blocks for attn in (b.attn1, b.attn2)} == {"native"}

    class Own:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    transformer.blocks[1].attn1.set_processor(own := Own())
    with pytest.raises(TypeError, match="attention processors.* but block 1 has a Own"):
        call(both)
    assert transformer.blocks[1].attn1.processor is own


def test_gradient_checkpointing_gives_the_same_gradients():
    both, given = models(), masks((5, 3, 5), [(1, 0)] * 3)
    gradients = []
    for checkpointing in (False, True):
        a, b = copy.deepcopy(both[0]).train(), copy.deepcopy(both[1])
        if checkpointing:
            a.enable_gradient_checkpointing()
        # the second has no masks: the first call's must still be known when it is computed again
        sum(out.square().mean() for out in [call((a, b), **given), call((a, b))]).backward()
        gradients.append({n: p.grad for m in (a, b) for n, p in m.named_parameters() if p.grad is not None})
    assert "source_embedder.weight" in gradients[0]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_every_weight_but_the_text_embedder_learns_under_autocast():
    transformer, guidance = models()
    with torch.autocast("cpu", torch.bfloat16):
        out = call((transformer, guidance))
    out.float().square().mean().backward()
    for name, parameter in transformer.named_parameters():
        assert (parameter.grad is None) == ("text_embedder" in name), name
    assert guidance.source_embedder.weight.grad.abs().sum() > 0 and guidance.ref_embedder.weight.grad.abs().sum() > 0


def test_written_out_attention_is_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator).bfloat16() for n in (6, 9, 9))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., 5:] = False
    for m in (None, mask):
        written = attend(q, k, v, m)
        with torch.no_grad():
            stock = attend(q, k, v, m)
        exact = attend(q.float(), k.float(), v.float(), m)
        assert written.shape == stock.shape == (2, 6, 3, 8)
        assert (written - exact).abs().max() < 0.02 and (stock - exact).abs().max() < 0.02


@torch.no_grad()
def test_rounding_of_the_timestep():
    timesteps, sigmas = torch.tensor([1000.0, 937.5, 833.3333]), torch.tensor([1.0, 0.9375, 0.8333, 0.0])
    assert torch.equal(rounded_sigma(timesteps, timesteps, sigmas), sigmas[:3])
    (transformer, right), (_, rounding) = models(), models(round_timestep=True)
    given = dict(timestep=torch.tensor([833.3333, 832.0, 500.0]))
    a, b = call((transformer, right), **given), call((transformer, rounding), **given)
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1:], b[1:])  # 832 and 500 are bfloat16 numbers, 833.3 is not


def test_round_trip(tmp_path):
    _, guidance = models(ref_pad_first=True)
    guidance.save_pretrained(tmp_path)
    again = KiwiGuidance.from_pretrained(tmp_path)
    assert again.config.ref_pad_first and tuple(again.config.patch_size) == (1, 2, 2)
    torch.testing.assert_close(again.state_dict(), guidance.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("latents", torch.zeros(3, 5, 2, 4, 6), "4 channels"),
        ("latents", torch.zeros(3, 4, 2, 4, 5), "multiples of"),
        ("context", torch.zeros(3, 5, 8), r"\(3, 5, 24\) but is \(3, 5, 8\)"),
        ("context_mask", torch.ones(3, 4, dtype=torch.bool), ""),
        ("source_latents", torch.zeros(3, 4, 1, 4, 6), ""),
        ("reference_latents", torch.zeros(3, 4, 1, 2, 2), ""),
        ("reference_mask", torch.ones(3, 1, dtype=torch.bool), ""),
    ],
)
def test_wrong_shapes(name, wrong, message):
    with pytest.raises(ValueError, match=f"`{name}` has to .*{message}"):
        call(models(), **{name: wrong})


# windows


@pytest.mark.parametrize(
    "shape, size, overlap, multiple",
    [
        ((11, 8, 20), (5, 8, 8), (1, 0, 2), 1),
        ((41, 16, 16), (2, 8, 8), (1, 2, 2), 2),
        ((3, 30, 52), (21, 30, 52), (5, 7, 13), 2),
        ((7, 10, 6), (3, 4, 4), (0, 0, 0), 2),
    ],
)
def test_windows_cover_everything_and_are_of_one_size(shape, size, overlap, multiple):
    windows, total = latent_windows(shape, size, overlap, multiple), torch.zeros(shape)
    for window in windows:
        total[window.place] += window.weight
        assert all(part.start % multiple == 0 for part in (window.rows, window.columns)) and window.weight.min() > 0
        assert window.weight.max() <= 1
    assert total.min() > 0 and {tuple(window.weight.shape) for window in windows} == {tuple(map(min, shape, size))}
    for axis, shared in zip(("frames", "rows", "columns"), overlap):
        # neighbours share at least what was asked for, less what rounding to a patch takes
        least = shared - (multiple - 1) * (axis != "frames")
        parts = sorted({(part.start, part.stop) for part in (getattr(w, axis) for w in windows)})
        assert all(before[1] - after[0] >= least for before, after in pairwise(parts))


def test_one_window_is_the_whole_clip():
    (window,) = latent_windows((5, 8, 8), (5, 8, 8), (1, 1, 1))
    assert window.weight.eq(1).all() and torch.zeros(1, 2, 5, 8, 8)[window.place].shape == (1, 2, 5, 8, 8)
    with pytest.raises(ValueError, match="`overlap` has to be from 0 to below the window's 2 but is 2"):
        latent_windows((5, 8, 8), (2, 8, 8), (2, 0, 0))


def test_windows_blend_what_each_says():
    "A call that says the number of its window: where two overlap, the mean by weight."
    windows = latent_windows((4, 2, 2), (2, 2, 2), (1, 0, 0))
    numbers = iter(range(3))
    call = lambda noisy, source, cache: torch.full_like(noisy, next(numbers))
    velocity = denoise_windows(windows, call, torch.zeros(1, 3, 4, 2, 2), None, window_caches(windows))
    assert velocity[0, 0, :, 0, 0].tolist() == [0, 0.5, 1.5, 2]


def test_windows_share_what_does_not_differ():
    windows = latent_windows((4, 2, 2), (2, 2, 2), (1, 0, 0))
    caches = window_caches(windows, num_steps=7)
    assert len({id(cache.key_values) for cache in caches}) == 1 and {cache.num_steps for cache in caches} == {7}
    assert len({cache.name for cache in caches}) == 3

    def call(noisy, source, cache):
        seen.append((cache.reference, cache.source))
        cache.reference, cache.source = "reference", "source"
        return noisy

    for seen in ([], []):
        denoise_windows(windows, call, torch.zeros(1, 3, 4, 2, 2), None, caches)
    assert seen == [("reference", None)] * 3  # the embedded source would be another in each


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True))
def test_the_head_leaves_references_out(first, monkeypatch):
    wan, _ = both = models(ref_pad_first=first)
    seen = []
    hook = wan.proj_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    velocity = call(both)
    hook.remove()
    assert seen == [2 * 2 * 3]  # tokens of the clip
    plain = kiwi_edit.guidance.hooked
    everywhere = lambda *pairs, before=(): plain(*[pair for pair in pairs if pair[0] is not wan.proj_out])
    monkeypatch.setattr(kiwi_edit.guidance, "hooked", everywhere)  # the head over all tokens
    torch.testing.assert_close(call(both), velocity, atol=1e-6, rtol=1e-6)
