"""The stages as data, what they train, and what the dry run says of them."""

import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import init_empty_weights

import common
import kiwi_edit.train.estimate
from kiwi_edit.core import preset
from kiwi_edit.train.curriculum import (
    COMPONENTS,
    OFFICIAL,
    PARTS,
    STAGES,
    Bucket,
    Loss,
    Lora,
    Stage,
    as_official,
    find_stage,
    part_parameters,
    select,
)
from kiwi_edit.encoder import collate_inputs, encode_context, make_tokenizer, prepare_sample
from kiwi_edit.guidance import EditCache, denoise
from kiwi_edit.latents import in_tiles
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.engine import stage_data
from kiwi_edit.train.estimate import _batch_shapes, estimate
from kiwi_edit.world import EVAL_SEED, TASKS


# the stages of tiny


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_stage_is_consistent(stage):
    assert STAGES[stage.name] is stage and stage.minutes > 0 and 0 < stage.lr < 0.01 and 0 <= stage.floor <= 1
    assert set(stage.trains) <= PARTS.keys() and set(stage.lr_scales) <= set(stage.trains)
    assert bool(stage.buckets) == ("transformer" in (*stage.trains, *stage.lora)) and not stage.mix
    assert stage.preset == "tiny"
    if stage.buckets:
        assert sum(b.weight for b in stage.buckets) == pytest.approx(1)
    for bucket in stage.buckets:
        assert set(bucket.tasks) <= set(TASKS) and sum(bucket.tasks.values()) == pytest.approx(1)
        assert bucket.num_frames % 4 == 1 and bucket.height % 16 == bucket.width % 16 == 0
        assert bucket.height * bucket.width <= 96 * 96
        assert bucket.samples >= bucket.batch_size
        reference = set(bucket.tasks) & {"subject", "background"}
        assert not reference or reference == set(bucket.tasks)  # a batch has references or has none
        assert bucket.mode == ("ref" if reference else "image" if bucket.num_frames == 1 else "video")


def test_clips_have_every_task_and_scenes_of_their_own():
    clips = STAGES["clips"]
    assert {task for b in clips.buckets if b.num_frames == 5 for task in b.tasks} == set(TASKS[:6])
    assert {task for b in clips.buckets for task in b.tasks} == set(TASKS)
    seeds = sorted(
        (d.first_seed, d.first_seed + len(d))
        for stage in STAGES.values()
        if stage.buckets
        for d, _ in stage_data(stage).values()
    )
    for (_, end), (start, _) in zip(seeds, seeds[1:]):
        assert end <= start
    assert seeds[-1][1] <= EVAL_SEED


def test_stages_come_in_the_order_in_which_they_are_run():
    assert list(STAGES) == ["autoencoder-start", "autoencoder", "encoder", "pictures", "clips"]
    assert [stage.follows for stage in STAGES.values()] == ["", *list(STAGES)[:-1]]


def test_tiny_is_trained_as_its_card_says():
    for stage in STAGES.values():
        assert (stage.optimizer, stage.schedule, stage.warmup, stage.clip, stage.accumulation, stage.steps) == (
            "muon",
            "cosine",
            0.03,
            1.0,
            1,
            100_000,
        )
        learns = "edits" if stage.buckets else "words" if stage.trains == ("mllm",) else "pictures"
        assert stage.learns == learns and stage.measure_latents == ("vae" in stage.trains)
        assert stage.loss == (Loss(few=1, pixel_metric=0.75, matte=0.3) if stage.buckets else Loss())
        assert stage.autocast == bool(stage.buckets)


# the official recipe, as its table reads

IMAGE = {"image_queries", "connector"}
CLIPS = IMAGE | {"video_queries", "transformer", "source_embedder"}
ALL = CLIPS | {"ref_queries", "ref_connector", "ref_embedder"}
FROZEN = CLIPS - {"transformer"}
QKVO = 64, {"q_proj", "k_proj", "v_proj", "o_proj"}
WIDE = 256, QKVO[1] | {"gate_proj", "up_proj", "down_proj"}
WAN = 128, {"to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"}
PAIRS, MIX = ("image", "video"), ("image", "video", "ref")
SMALL, LARGE = "wan2.2-5b", "wan2.1-14b"
TABLE = [  # preset, stage, trains, language model's LoRA, denoiser's LoRA, data, frames, pixels, rate, accumulation, steps, follows
    (SMALL, "stage1-image", IMAGE, QKVO, None, ("image",), 1, 1024 * 1024, 1e-5, 1, 30_000, ""),
    (SMALL, "stage2-600", CLIPS, QKVO, None, PAIRS, 81, 360_000, 1e-5, 2, 20_000, "stage1-image"),
    (SMALL, "stage2-720", CLIPS, QKVO, None, PAIRS, 81, 921_600, 1e-5, 2, 20_000, "stage2-600"),
    (SMALL, "stage3-mix", ALL, QKVO, None, MIX, 81, 921_600, 5e-6, 3, 15_000, "stage2-720"),
    (SMALL, "stage3-ref", ALL, QKVO, None, ("ref",), 81, 921_600, 5e-6, 1, 30_000, "stage2-720"),
    (LARGE, "stage1-image", IMAGE, WIDE, None, ("image",), 1, 1024 * 1024, 1e-5, 1, None, ""),
    (LARGE, "stage2-600", FROZEN, WIDE, WAN, PAIRS, 49, 360_000, 1e-5, 2, None, "stage1-image"),
    (LARGE, "stage2-720", FROZEN, WIDE, WAN, PAIRS, 49, 921_600, 5e-6, 2, None, "stage2-600"),
]


RECIPE = dict(optimizer="adamw", weight_decay=0.01, schedule="constant", warmup=0, batch_size=1, dtype="bfloat16")
RECIPE |= dict(alternation="round_robin", autocast=False, ema=0, minutes=None)
RECIPE |= dict(loss=Loss(sampling="table", weighting="gaussian", balance=1.0))


@pytest.mark.parametrize("row", TABLE, ids=[f"{row[0]}-{row[1]}" for row in TABLE])
def test_official_stage_is_that_of_the_table(row):
    name, stage_name, trains, language, denoiser, *columns = row
    stage = find_stage(name, stage_name)
    assert stage is OFFICIAL[name][stage_name]
    named = "mix", "num_frames", "max_pixels", "lr", "accumulation", "steps", "follows"
    for key, value in (RECIPE | dict(zip(named, columns, strict=True))).items():
        assert getattr(stage, key) == value, key
    lora = {part: (lora.rank, set(lora.targets)) for part, lora in stage.lora.items()}
    assert (stage.preset, stage.name, set(stage.trains)) == (name, stage_name, trains)
    assert lora == {"language_model": language} | ({"transformer": denoiser} if denoiser else {})
    assert "transformer" in stage.checkpointing and stage.source == (stage_name != "stage1-image")
    assert stage.loss.dropout == stage.loss.pixel_metric == 0


def test_the_table_has_no_other_rows():
    assert [(name, stage) for name, stages in OFFICIAL.items() for stage in stages] == [row[:2] for row in TABLE]
    config = preset("wan2.2-5b").guidance
    assert (
        config["num_image_queries"],
        config["num_video_queries"],
        config["num_ref_queries"],
        config["ref_pad_first"],
    ) == (256, 512, 768, False)


def test_the_cure_is_the_default():
    for stage in [*STAGES.values(), *(stage for stages in OFFICIAL.values() for stage in stages.values())]:
        assert not (stage.lr_dip or stage.round_timestep or stage.crop_reference)
        sick = as_official(stage)
        assert sick.lr_dip and sick.round_timestep and sick.crop_reference
        assert replace(sick, lr_dip=False, round_timestep=False, crop_reference=False) == stage


def test_every_stage_can_be_followed_back_to_its_beginning():
    for stages in (STAGES, *OFFICIAL.values()):
        for stage in stages.values():
            for _ in stages:
                if not stage.follows:
                    break
                stage = stages[stage.follows]
            assert not stage.follows


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("trains", dict(trains=("denoiser",))),
        ("lora", dict(trains=("transformer",), lora=dict(transformer=Lora(4, ("to_q",))))),
        ("optimizer", dict(optimizer="sgd")),
        ("schedule", dict(schedule="linear")),
        ("dtype", dict(dtype="float16")),
        ("checkpointing", dict(checkpointing=("vae",))),
        ("lr", dict(lr=0)),
        ("accumulation", dict(accumulation=0)),
        ("mix", dict(mix=("audio",))),
        ("learns", dict(learns="dances")),
        ("shares", dict(mix=("image", "ref"), max_pixels=4096, alternation="weighted", shares=(1,))),
        ("num_frames", dict(mix=("video",), max_pixels=4096, num_frames=16)),
    ],
)
def test_a_wrong_stage_is_refused(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}` of stage 'x'"):
        Stage(**dict(name="x", trains=("connector",), lr=1e-3) | arguments)


def test_unknown_stages_are_named_with_those_there_are():
    with pytest.raises(ValueError, match="`name` .* wan2.2-5b .* 'pictures'; .* stage1-image, .*, stage3-ref"):
        find_stage("wan2.2-5b", "pictures")
    with pytest.raises(ValueError, match="`preset` has to be one of tiny, wan2.2-5b, wan2.1-14b but is 'huge'"):
        find_stage("huge", "pictures")
    assert find_stage("tiny", "pictures") is STAGES["pictures"]


# what trains


def fresh_pipeline(sizes):
    return KiwiEditPipeline.from_preset(sizes, make_tokenizer(["Make it blue."], 400))


def expected(name, stage):
    "Whether a parameter of that name has to train, from the table."
    part = {"transformer": "transformer", "mllm": "language_model"}.get(name.split(".")[0], name.split(".")[1])
    if "lora_" in name:
        return part in stage.lora and (part != "language_model" or name.startswith("mllm.model.language_model."))
    return part in stage.trains and part != "language_model" and "text_embedder" not in name


@pytest.mark.parametrize("name", OFFICIAL)
def test_exactly_the_parts_of_the_table_train_and_lora_finds_its_layers(name):
    with init_empty_weights():
        pipe = fresh_pipeline(preset(name))
        for stage in OFFICIAL[name].values():
            chosen = select(pipe, stage)
            opened = {key for part in COMPONENTS for key, p in part_parameters(pipe, part).items() if p.requires_grad}
            everything = {key for part in COMPONENTS for key in part_parameters(pipe, part)}
            assert (
                opened
                == {key for key in everything if expected(key, stage)}
                == {key for parameters in chosen.values() for key in parameters}
            )
            assert set(chosen) == {*stage.trains, *stage.lora} and all(chosen.values())
            for part, lora in stage.lora.items():
                layers, per_layer = (36, 1) if part == "language_model" else (40, 2)
                for target in lora.targets:
                    there = [key for key in chosen[part] if f".{target}.lora_A.default.weight" in key]
                    assert len(there) == layers * (1 if "ffn" in target else per_layer), target
                assert len(chosen[part]) == 2 * sum(
                    len([key for key in chosen[part] if f".{target}.lora_A" in key]) for target in lora.targets
                )
                assert {p.shape[0] for key, p in chosen[part].items() if "lora_A" in key} == {lora.rank}
    assert not any("visual" in key and "lora_" in key for key in everything)


def small(name="wan2.2-5b"):
    "Sizes of a preset's shape with two thin layers."
    sizes = preset(name)
    if name == "tiny":
        return sizes
    sizes.transformer.update(num_layers=2, num_attention_heads=4, ffn_dim=2048, text_dim=64)
    sizes.mllm["text_config"].update(
        num_hidden_layers=2,
        vocab_size=400,
        hidden_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2048,
    )
    sizes.mllm["vision_config"].update(depth=1, out_hidden_size=512)
    sizes.guidance.update(
        dim=512,
        hidden_size=512,
        num_image_queries=32,
        num_video_queries=48,
        num_ref_queries=64,
        max_object_token=64,
        max_pixels_per_frame=112 * 112,
        min_pixels_per_frame=112 * 112,
    )
    sizes.vae.update(base_dim=8, decoder_base_dim=8)
    return sizes


def step_of(pipe, stage, shape):
    "Forward of one batch of random numbers, as a function that gives its loss."
    vae, size, dtype = pipe.vae.config, shape.batch_size, getattr(torch, stage.dtype)
    references = [PIL.Image.new("RGB", (shape.width, shape.height))] * (shape.mode == "ref")
    sample = prepare_sample(
        pipe.processor,
        pipe.guidance.config,
        "x" * 40,
        np.zeros((shape.num_frames, shape.height, shape.width, 3), np.uint8),
        references,
    )
    target = torch.randn(
        size,
        vae.z_dim,
        (shape.num_frames - 1) // vae.scale_factor_temporal + 1,
        shape.height // vae.scale_factor_spatial,
        shape.width // vae.scale_factor_spatial,
        dtype=dtype,
    )
    source = torch.randn_like(target) if stage.source else None
    reference = torch.randn_like(target[:, :, :1]) if references else None
    vision = [
        torch.randn(sum(map(math.prod, sample.grids[0])) // 4, pipe.guidance.config.hidden_size, dtype=dtype)
        for _ in range(size)
    ]
    inputs, sigma = collate_inputs([sample] * size), torch.rand(size)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.autocast):
            context, _ = encode_context(pipe.mllm, pipe.guidance, inputs, vision)
            velocity = denoise(
                pipe.transformer, pipe.guidance, target, sigma * 1000, sigma, context.to(dtype), None, source, reference
            )
        return ((velocity.float() - target.float()) ** 2).mean()

    return forward


def in_dtype(pipe, dtype):
    for name in COMPONENTS:
        for p in getattr(pipe, name).parameters():
            p.data = p.data.to(getattr(torch, dtype))
    return pipe


@pytest.mark.parametrize("stage_name", ["stage1-image", "stage3-ref"])
def test_what_is_selected_gets_gradients_and_nothing_else_does(stage_name):
    stage = replace(
        find_stage("wan2.2-5b", stage_name),
        num_frames=1 if "image" in stage_name else 5,
        max_pixels=64 * 64,
        dtype="float32",
    )
    sizes = small()
    pipe = fresh_pipeline(sizes)
    with torch.no_grad():  # connectors start at zero, through which nothing would flow
        for part in (pipe.guidance.connector, pipe.guidance.ref_connector):
            torch.nn.init.normal_(part[2].weight, std=0.1)
    chosen = select(pipe, stage)
    step_of(pipe, stage, _batch_shapes(stage, sizes)[0])().backward()
    got = {key for part in COMPONENTS for key, p in part_parameters(pipe, part).items() if p.grad is not None}
    # queries of the other modes
    others = {"guidance.image_queries", "guidance.video_queries"} if stage_name == "stage3-ref" else set()
    assert got == {key for parameters in chosen.values() for key in parameters} - others
    for key, p in chosen["language_model"].items():
        assert bool(p.grad.abs().sum()) == ("lora_B" in key), key  # A has none while B is zero


def test_lora_is_added_as_it_is_in_the_number_format_of_the_model_and_only_once():
    stage, sizes = find_stage("wan2.2-5b", "stage2-600"), small()
    pipe = in_dtype(fresh_pipeline(sizes), "bfloat16")
    chosen = select(pipe, stage)["language_model"]
    assert {p.dtype for p in chosen.values()} == {torch.bfloat16}
    layer = pipe.mllm.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 1
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    merged = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, merged, layer.base_layer.bias), atol=0.05, rtol=0.05
        )
    again = select(pipe, find_stage("wan2.2-5b", "stage2-720"))["language_model"]
    assert {key: id(p) for key, p in again.items()} == {key: id(p) for key, p in chosen.items()}
    with pytest.raises(ValueError, match=r"`lora.rank` .* that are there, \[64\], but is 8"):
        select(pipe, replace(stage, lora=dict(language_model=Lora(8, ("q_proj",)))))


def test_an_older_name_of_checkpointing(monkeypatch):
    "Before 5.18 transformers knew it by its old name alone."
    from transformers import PreTrainedModel

    pipe, asked = fresh_pipeline(small()), []
    for switch in ("enable", "disable"):
        monkeypatch.delattr(PreTrainedModel, f"activation_checkpointing_{switch}", raising=False)
        monkeypatch.setattr(
            PreTrainedModel, f"gradient_checkpointing_{switch}", lambda self, switch=switch: asked.append(switch)
        )
    for names in ((), ("language_model",)):
        select(pipe, replace(find_stage("wan2.2-5b", "stage2-600"), checkpointing=names))
    assert asked == ["disable", "enable"]


def test_shares_of_buckets_are_of_all_batches():
    stage = Stage("two", ("transformer",), 1e-3, buckets=(Bucket(dict(add=1.0)), Bucket(dict(subject=1.0), 5)), steps=2)
    assert [shape.share for shape in _batch_shapes(stage)] == [0.5, 0.5]
    found = estimate(stage, progress=False)
    assert found.flops == pytest.approx(np.mean([sum(cost.flops.values()) for cost in found.batches]))


def test_checkpointing_is_switched_on_and_off_and_changes_no_gradient():
    sizes, grads = small(), []
    pipe = fresh_pipeline(sizes)
    with torch.no_grad():
        torch.nn.init.normal_(pipe.guidance.connector[2].weight, std=0.1)
    for checkpointing in ((), ("transformer", "language_model"), ()):
        stage = replace(
            find_stage("wan2.2-5b", "stage2-600"),
            mix=("video",),
            num_frames=5,
            max_pixels=64 * 64,
            dtype="float32",
            checkpointing=checkpointing,
        )
        chosen = select(pipe, stage)
        assert (
            pipe.transformer.is_gradient_checkpointing
            == pipe.mllm.model.language_model.is_activation_checkpointing
            == bool(checkpointing)
        )
        torch.manual_seed(0)
        step_of(pipe, stage, _batch_shapes(stage, sizes)[0])().backward()
        grads.append(
            [p.grad.clone() for parameters in chosen.values() for p in parameters.values() if p.grad is not None]
        )
        for parameters in chosen.values():
            for p in parameters.values():
                p.grad = None
    assert len(grads[0]) > 50
    for others in grads[1:]:
        for a, b in zip(grads[0], others):
            torch.testing.assert_close(a, b)


# the dry run


def profiled(run):
    "Bytes that the allocator holds after something ran, and at most, and its result."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    now, most = 0, 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        most = max(most, now)
    return now, most, result


def seen(stage, sizes, shape):
    "Bytes that autograd keeps, that the allocator holds after the forward, and that it holds at most, weights aside; of a real step."
    pipe = in_dtype(fresh_pipeline(sizes), stage.dtype)
    select(pipe, stage)
    forward, kept = step_of(pipe, stage, shape), {}
    weights = {p.untyped_storage().data_ptr() for part in COMPONENTS for p in getattr(pipe, part).parameters()}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()

    after, _, loss = profiled(forward)
    del loss
    _, most, _ = profiled(lambda: forward().backward())
    return sum(kept.values()), after, most


BOTH = ("transformer", "language_model")
CASES = [
    ("tiny", (), "float32", True),
    ("wan2.2-5b", (), "float32", False),
    ("wan2.2-5b", (), "bfloat16", False),
    ("wan2.2-5b", ("transformer",), "bfloat16", False),
    ("wan2.2-5b", BOTH, "float32", False),
]


@pytest.mark.parametrize(
    "name, checkpointing, dtype, autocast",
    CASES,
    ids=lambda value: "+".join(value) or "kept" if isinstance(value, tuple) else str(value),
)
def test_memory_is_as_the_dry_run_says(name, checkpointing, dtype, autocast):
    stage = (
        replace(STAGES["clips"], buckets=(Bucket(dict(subject=0.7, background=0.3), 5, batch_size=2),))
        if name == "tiny"
        else replace(find_stage(name, "stage3-ref"), num_frames=9, max_pixels=256 * 256)
    )
    stage, sizes = replace(stage, checkpointing=checkpointing, dtype=dtype, autocast=autocast), small(name)
    cost = estimate(stage, sizes, progress=False).batches[0]
    kept, after, most = seen(stage, sizes, cost.shape)
    assert cost.kept == pytest.approx(after, rel=0.03)
    if not checkpointing:
        # what checkpointing holds on to, autograd's hooks do not show
        assert cost.kept == pytest.approx(kept, rel=0.03)
    assert sum(cost.memory.values()) - cost.memory["weights"] == pytest.approx(most, rel=0.03)


def test_checkpointing_and_batch_size_do_what_they_should():
    stage, sizes = replace(find_stage("wan2.2-5b", "stage3-ref"), num_frames=9, max_pixels=256 * 256), small()
    one, plain, two = (
        estimate(stage, sizes, progress=False, **changes)
        for changes in (dict(), dict(checkpointing=()), dict(batch_size=2))
    )
    assert one.batches[0].kept < 0.3 * plain.batches[0].kept and one.peak < plain.peak
    assert one.flops > 1.2 * plain.flops and one.model_flops == pytest.approx(plain.model_flops, rel=0.01)
    assert plain.batches[0].again == dict(transformer=0, language_model=0)
    assert two.samples == 2 and two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert two.batches[0].kept == pytest.approx(2 * one.batches[0].kept, rel=0.1)


def test_operations_are_those_of_the_formula():
    sizes = small()
    stage = replace(find_stage("wan2.2-5b", "stage3-ref"), num_frames=9, max_pixels=256 * 256, checkpointing=())
    cost = estimate(stage, sizes, progress=False).batches[0]
    dim, tokens, context = 512, cost.latent_tokens, cost.context_tokens
    assert tokens == (3 + 1) * (192 // 32) * (320 // 32)  # three latent frames and the reference, of 192x320 pixels
    block = (
        2 * tokens * (6 * dim**2 + 2 * dim * 2048) + 2 * context * 2 * dim**2 + 4 * dim * tokens * (tokens + context)
    )
    # forward, twice that back, and the first product of attention once more
    trained = 3 * 2 * block + 2 * (10 - 8) * dim * tokens * (tokens + context)
    assert cost.flops["transformer"] == pytest.approx(trained, rel=0.05)


def test_accumulation_keeps_gradients_from_the_first_batch_on():
    stage, sizes = replace(find_stage("wan2.2-5b", "stage3-ref"), num_frames=5, max_pixels=64 * 64), small()
    once, twice = (estimate(stage, sizes, progress=False, accumulation=n) for n in (1, 2))
    trained = 2 * sum(trains for trains, _ in twice.parameters.values())
    assert twice.batches[0].memory["gradients"] == pytest.approx(trained, rel=1e-3)
    assert twice.memory["gradients"] == pytest.approx(trained, rel=1e-3)
    assert twice.flops == 2 * once.flops and twice.samples == 2


def test_optimizers_and_averages_are_counted():
    stage, sizes = replace(find_stage("wan2.2-5b", "stage1-image"), mix=()), small()
    plain, muon, average, wide, away = (
        estimate(stage, sizes, progress=False, **changes)
        for changes in (
            dict(),
            dict(optimizer="muon"),
            dict(ema=0.999),
            dict(dtype="float32"),
            dict(offload_optimizer=True),
        )
    )
    trained = sum(trains for trains, _ in plain.parameters.values())
    assert plain.optimizer == 2 * 2 * trained and average.optimizer == plain.optimizer + 4 * trained
    assert wide.optimizer == 2 * plain.optimizer
    assert plain.optimizer / 2 < muon.optimizer < 0.6 * plain.optimizer
    assert away.optimizer == plain.optimizer and away.memory["optimizer"] == 0 and "In the host's memory" in str(away)


def test_online_adds_the_frozen_networks():
    stage, sizes = replace(find_stage("wan2.2-5b", "stage3-ref"), num_frames=5, max_pixels=64 * 64), small()
    cached, online = (estimate(stage, sizes, online=value, progress=False) for value in (False, True))
    assert set(online.batches[0].flops) == {"vae", "vision", "language_model", "transformer"}
    assert set(cached.batches[0].flops) == {"language_model", "transformer"}
    frozen = sum(sum(online.parameters[part]) for part in ("vae", "vision"))
    assert online.memory["weights"] - cached.memory["weights"] == pytest.approx(2 * frozen, rel=0.02)
    assert all(online.batches[0].flops[part] > 0 for part in ("vae", "vision"))


def test_the_full_size_needs_no_memory():
    result = estimate(find_stage("wan2.2-5b", "stage3-ref"), flops_per_second=4e14, progress=False)
    assert result.parameters["transformer"][0] + result.parameters["transformer"][1] == 4_999_787_712
    # q, o square; k, v to 256
    assert result.parameters["language_model"][0] == 36 * 64 * 4 * 2048 + 36 * 64 * (2 * 2048 + 2 * 256)
    cost = result.batches[0]
    assert cost.latent_tokens == 22 * 22 * 40
    assert (cost.shape.num_frames, cost.shape.height, cost.shape.width) == (81, 704, 1280)
    # the inputs of all blocks
    assert cost.kept > 30 * cost.latent_tokens * 3072 * 2 + 36 * cost.encoder_tokens * 2048 * 2
    blocks = 30 * (2 * cost.latent_tokens * (6 * 3072**2 + 2 * 3072 * 14336) + 4 * 3072 * cost.latent_tokens**2)
    assert result.model_flops > 3 * blocks and cost.again["transformer"] == pytest.approx(blocks, rel=0.15)
    assert cost.again["language_model"] > 0
    assert result.seconds_per_step == pytest.approx(result.flops / 4e14)
    assert result.hours == pytest.approx(30_000 * result.seconds_per_step / 3600)
    assert 40 * 10**9 < result.peak < 80 * 10**9
    with pytest.raises(
        ValueError, match=r"`memory` .* at least 5\d\.\d GB .* 24 GB; .* weights 16.3 GB.*the optimizer offloaded"
    ):
        result.check_fits(24 * 10**9)
    result.check_fits(80 * 10**9)
    for text in (str(result), result._repr_markdown_()):
        assert "1 x ref, 81x704x1280" in text and "language_model (LoRA)" in text and "hours" in text


def test_stages_of_tiny_are_estimated_too():
    # kinds of words and canvases cost the same
    assert [shape.share for shape in _batch_shapes(STAGES["pictures"])] == pytest.approx([0.5, 0.5])
    image = estimate(replace(STAGES["pictures"], buckets=STAGES["pictures"].buckets[:1]), progress=False, batch_size=2)
    assert [cost.shape.batch_size for cost in image.batches] == [2]
    encoder = estimate(STAGES["encoder"], progress=False)
    assert not encoder.batches and encoder.flops == 0 and "does not denoise" in str(encoder)
    assert encoder.parameters["vision"][0] == 1_007_552
    with pytest.raises(ValueError, match="`changes` of stage 'pictures' .* name max_pixels"):
        estimate(STAGES["pictures"], max_pixels=4096)


def test_shapes_of_a_weighted_mix():
    stage = replace(find_stage("wan2.2-5b", "stage3-mix"), alternation="weighted", shares=(1, 2, 5))
    assert [(shape.mode, shape.num_frames, shape.share) for shape in _batch_shapes(stage)] == [
        ("image", 1, 0.125),
        ("video", 81, 0.25),
        ("ref", 81, 0.625),
    ]
    assert [(shape.height, shape.width) for shape in _batch_shapes(find_stage("wan2.2-5b", "stage2-600"))] == [
        (448, 800)
    ] * 2


# what an edit costs


@torch.no_grad()
@pytest.mark.parametrize("name, size", [("tiny", (5, 64, 64)), ("wan2.2-5b", (5, 96, 160))], ids=["tiny", "thin 5b"])
def test_memory_of_an_edit_is_as_said(name, size):
    sizes = small(name)
    edit_cost = common.defined_in("library/34_estimate.ipynb", kiwi_edit.train.estimate, "ed17c002")["edit_cost"]
    cost, pipe = edit_cost(sizes, *size, "float32", tile=(4, 4), stride=(3, 3)), fresh_pipeline(sizes)
    frames, references = np.zeros((*size, 3), np.uint8), [PIL.Image.new("RGB", size[:0:-1])]
    sample = prepare_sample(pipe.processor, pipe.guidance.config, "x" * 40, frames, references)
    factor, sigma = pipe.vae.config.scale_factor_spatial, torch.ones(1)
    latents = torch.zeros(
        1,
        pipe.vae.config.z_dim,
        (size[0] - 1) // pipe.vae.config.scale_factor_temporal + 1,
        size[1] // factor,
        size[2] // factor,
    )
    pixels, context = torch.zeros(1, 3, *size), encode_context(pipe.mllm, pipe.guidance, sample)[0]
    step = lambda: denoise(
        pipe.transformer,
        pipe.guidance,
        latents,
        1000 * sigma,
        sigma,
        context,
        None,
        latents,
        latents[:, :, :1],
        cache=EditCache(),
    )
    for phase, run in (("read", lambda: encode_context(pipe.mllm, pipe.guidance, sample)), ("denoise", step)):
        assert cost.activations[phase] == pytest.approx(profiled(run)[1], rel=0.1), phase
    for phase, x in (
        ("encode", pixels),
        ("decode", latents),
    ):  # on a CPU a convolution unfolds its input while it runs, which is not in the ledger
        assert x.numel() * 4 < cost.activations[phase] < profiled(lambda: in_tiles(pipe.vae, x, phase))[1]
    assert cost.weights == {part: sum(p.numel() * 4 for p in getattr(pipe, part).parameters()) for part in cost.weights}
    whole, tiles, turns, groups, eight = (
        cost.peak(**options)[0]
        for options in (
            {},
            dict(tiles=True),
            dict(offload="model", tiles=True),
            dict(offload="group", tiles=True),
            dict(eight_bit=True),
        )
    )
    assert groups <= turns < tiles <= whole and eight < whole and cost.flops["decode in tiles"] > cost.flops["decode"]
    assert f"{sum(cost.weights.values()) / 1e9:.2f}" in str(cost)
