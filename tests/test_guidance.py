"One denoiser call: what is added, what is appended, what is masked, what is computed once."

import copy

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

SIZES = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)


def models(zero_init=False, **config):
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**SIZES).eval()
    guidance = KiwiGuidance(
        hidden_size=16,
        dim=24,
        in_channels=4,
        patch_size=(1, 2, 2),
        num_image_queries=2,
        num_video_queries=3,
        num_ref_queries=4,
        zero_init=zero_init,
        **config,
    ).eval()
    return transformer, guidance


def arguments(batch=3, frames=2, references=2, tokens=5):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    return dict(
        latents=normal(batch, 4, frames, 4, 6),
        timestep=torch.linspace(900, 100, batch),
        sigma=torch.linspace(0.9, 0.1, batch),
        context=normal(batch, tokens, 24),
        source_latents=normal(batch, 4, frames, 4, 6),
        reference_latents=normal(batch, 4, references, 4, 6),
    )


def test_zero_initialised_embedders_add_nothing():
    transformer, guidance = models(zero_init=True)
    with torch.no_grad():
        args = arguments() | {"reference_latents": None}
        assert torch.equal(
            denoise(transformer, guidance, **args), denoise(transformer, guidance, **args | {"source_latents": None})
        )
        _, guidance = models()
        assert not torch.allclose(
            denoise(transformer, guidance, **args),
            denoise(transformer, guidance, **args | {"source_latents": None}),
            atol=1e-3,
        )


def test_source_is_scaled_by_sigma():
    transformer, guidance = models()
    args = arguments() | {"reference_latents": None}
    with torch.no_grad():
        silent = denoise(transformer, guidance, **args | {"sigma": torch.zeros(3)})
        assert torch.allclose(silent, denoise(transformer, guidance, **args | {"source_latents": None}), atol=1e-6)
        guidance.source_embedder.bias.zero_()
        doubled = args | {"sigma": args["sigma"] / 2, "source_latents": args["source_latents"] * 2}
        assert torch.allclose(
            denoise(transformer, guidance, **args), denoise(transformer, guidance, **doubled), atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True))
def test_a_batch_gives_what_each_sample_gives_alone(first):
    transformer, guidance = models(ref_pad_first=first)
    args = arguments()
    context_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    reference_mask = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    together = denoise(transformer, guidance, **args, context_mask=context_mask, reference_mask=reference_mask)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in args.items()}
        one["context"] = one["context"][:, context_mask[i]]
        one["reference_latents"] = (
            one["reference_latents"][:, :, reference_mask[i]] if reference_mask[i].any() else None
        )
        assert torch.allclose(together[i : i + 1], denoise(transformer, guidance, **one), atol=2e-6), i


@torch.no_grad()
def test_reference_position_matters():
    transformer, guidance = models()
    _, before = models(ref_pad_first=True)
    args = arguments(references=1)
    assert not torch.allclose(denoise(transformer, guidance, **args), denoise(transformer, before, **args), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", (False, True))
def test_cache_gives_the_same_and_computes_once(first):
    transformer, guidance = models(ref_pad_first=first)
    args = arguments()
    masks = dict(
        context_mask=torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 5]),
        reference_mask=torch.tensor([[True, True], [True, False], [True, True]]),
    )
    calls = {"key": 0, "self": 0, "source": 0, "reference": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    transformer.blocks[0].attn2.to_k.register_forward_hook(count("key"))
    transformer.blocks[0].attn1.to_k.register_forward_hook(count("self"))
    guidance.source_embedder.register_forward_hook(count("source"))
    guidance.ref_embedder.register_forward_hook(count("reference"))
    cache = EditCache()
    for sigma in (0.9, 0.5, 0.1):
        step = args | {"sigma": torch.full((3,), sigma), "timestep": torch.full((3,), 1000 * sigma)}
        kept = {k: v for k, v in calls.items()}
        expected = denoise(transformer, guidance, **step, **masks)
        calls.update(kept)
        assert torch.equal(denoise(transformer, guidance, **step, **masks, cache=cache), expected)
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
    clean = torch.randn(1, 4, 1, 2, 2).bfloat16()
    noisy, sigma = torch.randn(1, 4, 1, 2, 2), torch.tensor([0.1])
    assert torch.allclose(to_velocity(clean, "sample", noisy, sigma), (noisy - clean.float()) / 0.1)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`names` has to be one of velocity, sample, edit but is 'noise'"):
        models(names="noise")


def test_the_stock_forward_runs_and_is_left_as_it_was():
    transformer, guidance = models()
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    args = arguments()
    stock = dict(
        hidden_states=args["latents"],
        timestep=args["timestep"],
        encoder_hidden_states=torch.randn(3, 7, 8),
        return_dict=False,
    )
    with torch.no_grad():
        before = transformer(**stock)[0]
        denoise(transformer, guidance, **args)
        after = transformer(**stock)[0]
        with pytest.raises(RuntimeError):
            denoise(transformer, guidance, **args | {"timestep": torch.zeros(2)})
        assert torch.equal(transformer(**stock)[0], after)
    assert len(calls) == 4 and torch.allclose(before, after, atol=1e-6)
    names = [transformer.patch_embedding, transformer.rope, transformer.condition_embedder.text_embedder]
    assert all(not module._forward_hooks for module in names)


def test_wrapped_transformers_work():
    transformer, guidance = models()

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    args = arguments()
    with torch.no_grad():
        assert torch.equal(denoise(Wrapper(transformer), guidance, **args), denoise(transformer, guidance, **args))
    with pytest.raises(TypeError, match="has to hold a WanTransformer3DModel but is a Linear"):
        denoise(torch.nn.Linear(2, 2), guidance, **args)


def test_what_a_user_has_set_on_attention_stays():
    transformer, guidance = models()
    transformer.set_attention_backend("native")
    with torch.no_grad():
        denoise(transformer, guidance, **arguments())
    assert {attn.processor._attention_backend for b in transformer.blocks for attn in (b.attn1, b.attn2)} == {"native"}

    class Own:
        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    transformer.blocks[1].attn1.set_processor(own := Own())
    with pytest.raises(TypeError, match="attention processors.* but block 1 has a Own"):
        denoise(transformer, guidance, **arguments())
    assert transformer.blocks[1].attn1.processor is own


def test_gradient_checkpointing_gives_the_same_gradients():
    transformer, guidance = models()
    args = arguments()
    masks = dict(
        context_mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5]),
        reference_mask=torch.tensor([[True, False]] * 3),
    )
    gradients = []
    for checkpointing in (False, True):
        a, b = copy.deepcopy(transformer).train(), copy.deepcopy(guidance)
        if checkpointing:
            a.enable_gradient_checkpointing()
        first = denoise(a, b, **args, **masks)
        second = denoise(a, b, **args)  # without masks: the first call's must still be known when it is computed again
        (first.square().mean() + second.square().mean()).backward()
        gradients.append({n: p.grad for m in (a, b) for n, p in m.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "source_embedder.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_every_weight_but_the_text_embedder_learns_under_autocast():
    transformer, guidance = models()
    with torch.autocast("cpu", torch.bfloat16):
        out = denoise(transformer, guidance, **arguments())
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


def test_rounding_of_the_timestep():
    timesteps, sigmas = torch.tensor([1000.0, 937.5, 833.3333]), torch.tensor([1.0, 0.9375, 0.8333, 0.0])
    assert torch.equal(rounded_sigma(timesteps, timesteps, sigmas), sigmas[:3])
    transformer, right = models()
    _, rounding = models(round_timestep=True)
    args = arguments() | {"timestep": torch.tensor([833.3333, 832.0, 500.0])}
    with torch.no_grad():
        a, b = denoise(transformer, right, **args), denoise(transformer, rounding, **args)
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1:], b[1:])  # 832 and 500 are bfloat16 numbers, 833.3 is not


def test_round_trip(tmp_path):
    _, guidance = models(ref_pad_first=True)
    guidance.save_pretrained(tmp_path)
    again = KiwiGuidance.from_pretrained(tmp_path)
    assert again.config.ref_pad_first and again.config.patch_size == [1, 2, 2] or again.config.patch_size == (1, 2, 2)
    for name, value in guidance.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_wrong_shapes():
    transformer, guidance = models()
    args = arguments()
    for change, message in (
        ({"latents": torch.zeros(3, 5, 2, 4, 6)}, "`latents` has to have 4 channels"),
        ({"latents": torch.zeros(3, 4, 2, 4, 5)}, "multiples of"),
        ({"context": torch.zeros(3, 5, 8)}, r"`context` has to be \(3, 5, 24\) but is \(3, 5, 8\)"),
        ({"context_mask": torch.ones(3, 4, dtype=torch.bool)}, "`context_mask` has to be"),
        ({"source_latents": torch.zeros(3, 4, 1, 4, 6)}, "`source_latents` has to be"),
        ({"reference_latents": torch.zeros(3, 4, 1, 2, 2)}, "`reference_latents` has to be"),
        ({"reference_mask": torch.ones(3, 1, dtype=torch.bool)}, "`reference_mask` has to be"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(transformer, guidance, **args | change)
    with pytest.raises(ValueError, match='`query_read_out` has to be "queries"'):
        models(query_read_out="first")


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
    for axis, shared in zip(
        ("frames", "rows", "columns"), overlap
    ):  # neighbours share at least what was asked for, less what rounding to a patch takes
        parts = sorted({(getattr(w, axis).start, getattr(w, axis).stop) for w in windows})
        assert all(
            before[1] - after[0] >= shared - (multiple - 1 if axis != "frames" else 0)
            for before, after in zip(parts, parts[1:])
        )


def test_one_window_is_the_whole_clip():
    (window,) = latent_windows((5, 8, 8), (5, 8, 8), (1, 1, 1))
    assert window.weight.eq(1).all() and torch.zeros(1, 2, 5, 8, 8)[window.place].shape == (1, 2, 5, 8, 8)
    with pytest.raises(ValueError, match="`overlap` has to be from 0 to below the window's 2 but is 2"):
        latent_windows((5, 8, 8), (2, 8, 8), (2, 0, 0))


def test_windows_blend_what_each_says():
    "A call that says the number of its window: where two overlap, the mean by weight."
    windows = latent_windows((4, 2, 2), (2, 2, 2), (1, 0, 0))
    numbers = iter(range(3))
    velocity = denoise_windows(
        windows,
        lambda noisy, source, cache: torch.full_like(noisy, next(numbers)),
        torch.zeros(1, 3, 4, 2, 2),
        None,
        window_caches(windows),
    )
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
def test_the_head_leaves_references_out(monkeypatch):
    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    ).eval()
    for first in (False, True):
        guidance = KiwiGuidance(
            hidden_size=32,
            dim=48,
            in_channels=16,
            zero_init=False,
            num_image_queries=4,
            num_video_queries=6,
            num_ref_queries=8,
            ref_pad_first=first,
        )
        given = dict(
            latents=torch.randn(1, 16, 3, 4, 4),
            timestep=torch.tensor([900.0]),
            sigma=torch.tensor([0.9]),
            context=torch.randn(1, 5, 48),
            source_latents=torch.randn(1, 16, 3, 4, 4),
            reference_latents=torch.randn(1, 16, 2, 4, 4),
        )
        seen = []
        hook = wan.proj_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        velocity = denoise(wan, guidance, **given)
        hook.remove()
        assert seen == [3 * 4]
        plain = kiwi_edit.guidance.hooked
        with monkeypatch.context() as patch:  # the head over all tokens
            patch.setattr(
                kiwi_edit.guidance,
                "hooked",
                lambda *pairs, before=(): plain(*[pair for pair in pairs if pair[0] is not wan.proj_out]),
            )
            torch.testing.assert_close(denoise(wan, guidance, **given), velocity, atol=1e-6, rtol=1e-6)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in wan.modules())
