"""What an edit costs, and what each saving takes off: switched on, switched off, and measured.

    python assets/benchmarks/speed.py

Exact savings are always on and have no options; here, and only here, each can be switched off, to see what it is worth. The plain
computation is put in the place of the quick one from outside, and taken away afterwards, also when an error ends the block.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from kiwi_edit import footage, guidance, latents, pipeline
from kiwi_edit.eval.benchmark import describe_hardware, run_benchmark
from kiwi_edit.core import InputError, Preset, asset, choose_device, multiplies_bfloat16, preset
from kiwi_edit.apps.approximations import approximately
from kiwi_edit.guidance import find_wan
from kiwi_edit.footage import Memory
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.engine import cast_weights, measure_flops
from kiwi_edit.video import (
    Clip,
    Strip,
    as_frames,
    av,
    read_image,
    read_video,
    replacing,
    resize_frames,
    video_info,
    write_video,
)
from kiwi_edit.world import EVAL_SEED, World


def allocated_by(
    run: Callable,  # without arguments
    device: str = "cpu",
) -> int:  # bytes
    "The most memory that an allocator has given at once while something ran, above what it had given before."
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max([0, *np.cumsum(sizes).tolist()])


PARTS = {
    "read_video": "reading",
    "encode_prompt": "words and pictures",
    "encode_source": "source to latents",
    "encode_references": "reference to latents",
    "denoise": "denoising",
    "decode_latents": "latents to frames",
}  # functions of the pipeline and what they do


@contextmanager
def patched(
    *changes,  # (owner, name of an attribute, value)
):
    "Attributes of modules and objects are others for the length of a block."
    missing, before = object(), []
    try:
        for owner, name, value in changes:
            before.append((owner, name, vars(owner).get(name, missing)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is not missing:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def operations() -> FlopCounterMode:  # a context; `get_total_flops()` tells afterwards
    "Counts additions and multiplications of products, convolutions and attention while they happen."

    def attention(query, key, value, *args, **kwargs):
        return sdpa_flop_count(query, key, value)  # of their shapes

    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )  # PyTorch's counter does not know this one


def profile_edit(
    pipe: KiwiEditPipeline,
    edit: Callable,  # runs one edit with the pipeline
) -> tuple[dict[str, float], list]:  # seconds of the parts of an edit, and the profiler's averages by operation
    "One edit under PyTorch's profiler."

    def named(part, function):
        def run(*args, **kwargs):
            with record_function(f"part: {part}"):
                return function(*args, **kwargs)

        return run

    modules = (pipeline, footage)
    at = lambda name: pipe if hasattr(type(pipe), name) else next(m for m in modules if hasattr(m, name))
    owners = {name: at(name) for name in PARTS}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (pipe._execution_device.type == "cuda")
    with (
        patched(*((owner, name, named(PARTS[name], getattr(owner, name))) for name, owner in owners.items())),
        profile(activities=activities) as profiled,
    ):
        start = time.perf_counter()
        edit()
        total = time.perf_counter() - start
    averages = profiled.key_averages()
    parts = {
        event.key.removeprefix("part: "): event.cpu_time_total / 1e6
        for event in averages
        if event.key.startswith("part: ")
    }
    parts = {part: parts.get(part, 0.0) for part in PARTS.values()}
    return parts | {"the rest": max(0.0, total - sum(parts.values()))}, averages


@dataclass(frozen=True)
class Saving:
    "Something that an edit is spared, and the way back to an edit without it, which comes to the same result."

    name: str
    what: str
    without: Callable  # of a pipeline: a context manager within which it is computed after all
    saves: str = "every edit"  # or "the next edit" of a clip, or "memory" where clips are long


def _forgetting(*names):
    "A way back: what the cache of an edit holds under these names is lost before each call."
    denoise = guidance.denoise

    def forgetful(*arguments, cache=None, **options):
        for name in names if cache is not None else ():
            setattr(cache, name, {} if name == "key_values" else None)
        return denoise(*arguments, cache=cache, **options)

    return lambda pipe: patched((pipeline, "denoise", forgetful))


@contextmanager
def _positions_each_step(pipe):
    "Rotary tables made at each step in double precision on the CPU, and applied in double precision."
    wan = find_wan(pipe.transformer)

    def tables(hidden_states):
        sides, rope, angles = [n // p for n, p in zip(hidden_states.shape[2:], wan.rope.patch_size)], wan.rope, []
        for axis, (side, dim) in enumerate(zip(sides, (rope.t_dim, rope.h_dim, rope.w_dim))):
            turns = torch.outer(
                torch.arange(side, dtype=torch.float64),
                10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim),
            )
            angles.append(turns.view(*(side if i == axis else 1 for i in range(3)), -1).expand(*sides, -1))
        angles = torch.cat(angles, -1).reshape(1, math.prod(sides), 1, -1).repeat_interleave(2, -1)
        return angles.cos().to(hidden_states.device), angles.sin().to(hidden_states.device)

    def rotate(x, rope):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.complex(rope.cos.double(), rope.sin.double())
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    with _forgetting("rope")(pipe), patched((wan.rope, "forward", tables), (guidance, "rotate", rotate)):
        yield


def _head_on_all(pipe):
    "The head turns the tokens of references into a velocity too."
    wan, hooked = find_wan(pipe.transformer), guidance.hooked

    def on_all(*pairs, before=()):
        return hooked(
            *(pair for pair in pairs if pair[0] is not wan.proj_out),
            before=[pair for pair in before if pair[0] is not wan.norm_out],
        )

    return patched((guidance, "hooked", on_all))


def _language_model_that_keeps(pipe):
    "The language model keeps keys, values and the states of all layers."
    language = pipe.mllm.model.language_model
    forward = language.forward

    def keeping(**kwargs):
        out = forward(**kwargs | dict(use_cache=True, output_hidden_states=True))
        out.last_hidden_state = out.hidden_states[-1]
        return out

    return patched((language, "forward", keeping))


def _frame_by_frame(path, num_frames=None, start=0, stride=1, indices=None, size=None, mode="training", **_):
    "Frames as the official code reads them: one is decoded, cropped and resized, then the next."
    wanted, frames = range(start, video_info(path).frames, stride)[:num_frames] if indices is None else indices, []
    with av.open(os.path.abspath(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i > wanted[-1]:
                break
            picture = frame.to_ndarray(format="rgb24")[None]
            if i in wanted:
                frames.append(resize_frames(picture, *size, mode=mode)[0] if size else picture[0])
    return Clip(np.stack(frames), video_info(path).fps, Path(path))


def _all_at_once(pipe):
    "Long clips through the autoencoder in one piece."

    def to_latents(vae, chunks, device=None, drop_rest=False):
        frames = np.concatenate(list(chunks))
        if drop_rest:
            frames = frames[
                : (len(frames) - 1) // vae.config.scale_factor_temporal * vae.config.scale_factor_temporal + 1
            ]
        yield latents.encode_frames(vae, frames, device)

    def to_frames(vae, latents, matte, source, mask=None):
        frames = np.concatenate(list(source.chunks()))[None]
        yield pipeline.composite(pipeline.decode_latents(vae, latents), frames, matte, mask)[0]

    return patched((pipeline, "stream_latents", to_latents), (pipeline, "_stream_composite", to_frames))


SAVINGS = {
    saving.name: saving
    for saving in (
        Saving(
            "embeddings", "source and references are embedded once for all steps", _forgetting("source", "reference")
        ),
        Saving("positions", "rotary tables are made once, and applied in single precision", _positions_each_step),
        Saving(
            "keys and values", "those of cross-attention are projected once for all steps", _forgetting("key_values")
        ),
        Saving("head", "the denoiser's head sees the tokens of the clip and not those of references", _head_on_all),
        Saving(
            "language model",
            "it keeps neither keys and values nor the states of all of its layers",
            _language_model_that_keeps,
        ),
        Saving(
            "autoencoder",
            "on a CPU its 3D convolutions run as 2D ones, and its norms sum in the order of memory",
            lambda pipe: patched((latents, "fast_layers", nullcontext)),
        ),
        Saving(
            "reading",
            "frames are decoded by threads and resized by others",
            lambda pipe: patched((footage, "read_video", _frame_by_frame)),
        ),
        Saving(
            "memory",
            "what the encoders made of a clip and of pictures is remembered",
            lambda pipe: patched((pipe, "memory", Memory(0))),
            "the next edit",
        ),
        Saving("streams", "long clips go through the autoencoder in pieces", _all_at_once, "memory"),
    )
}


@contextmanager
def recomputed(
    pipe: KiwiEditPipeline,
    *names: str,  # of `SAVINGS`; none are all of them
) -> Iterator[KiwiEditPipeline]:
    "Within it, edits compute what these savings spare them."
    if unknown := [name for name in names if name not in SAVINGS]:
        raise InputError(f"`names` have to be among {', '.join(SAVINGS)} but hold {unknown[0]!r}.")
    with ExitStack() as stack:
        for name in names or SAVINGS:
            stack.enter_context(SAVINGS[name].without(pipe))
        yield pipe


BENCH_MODELS = ("tiny", "large", "5b")


@dataclass
class Subject:
    "A model and an edit to be timed."

    name: str  # of `BENCH_MODELS`
    pipe: KiwiEditPipeline
    sample: dict  # arguments of the edit: prompt, video (a file), reference
    steps: tuple[int, ...] = (4, 20)  # the model's own number, and one at which approximations have something to do

    def edit(self, steps: int | None = None, **options):
        "One edit, always with the same noise."
        noise = torch.Generator().manual_seed(0)
        return self.pipe(**self.sample, generator=noise, num_inference_steps=steps, **options).frames

    def __str__(self):
        c, info = self.pipe.transformer.config, video_info(self.sample["video"])
        width, height = pipeline.fit_size(info.width, info.height, self.pipe.config.max_pixels, self.pipe.size_multiple)
        return f"{c.num_layers} layers of width {c.num_attention_heads * c.attention_head_dim}, {min(info.frames, self.pipe.config.max_frames)} frames of {width}x{height}"


def bench_subject(
    name: str,  # of `BENCH_MODELS`
    folder: str | Path,  # for its clip
    device: str | torch.device = "auto",
) -> Subject:
    "A model of the benchmark and its edit."
    if name not in BENCH_MODELS:
        raise InputError(f"`name` has to be one of {', '.join(BENCH_MODELS)} but is {name!r}.")
    device, tiny = choose_device(device), KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    if name == "tiny":
        pipe, steps = tiny.to(device), (tiny.config.default_steps, 20)
        sample = dict(
            prompt=asset("samples/instruction.txt").read_text(),
            video=asset("samples/clip.mp4"),
            reference=read_image(asset("samples/reference.png")),
        )
    else:
        sizes = preset("wan2.2-5b" if name == "5b" else "tiny")
        sizes.guidance["zero_init"], steps = False, (4, 20)
        if name == "5b":
            sizes, steps = replace(sizes, height=480, width=832, max_pixels=480 * 832), (50,)
        else:
            sizes.transformer.update(
                patch_size=(1, 2, 2), num_layers=8, num_attention_heads=8, attention_head_dim=64, ffn_dim=2048
            )
            sizes.guidance.update(dim=512, patch_size=(1, 2, 2))
            sizes = replace(sizes, height=128, width=128, num_frames=17, max_pixels=128 * 128)
        torch.manual_seed(0)
        with torch.device(device):
            pipe = KiwiEditPipeline.from_preset(sizes, tiny.processor.tokenizer)
        if name == "5b":
            cast_weights(pipe, torch.bfloat16)
        else:
            pipe.vae, pipe.mllm = tiny.vae.to(device), tiny.mllm.to(device)
        scene = World(128, 128, sizes.num_frames, split="eval").sample(EVAL_SEED, "background")
        larger = 1 if name == "5b" else 2  # than the model's frames, so that reading has something to do
        clip = Clip(resize_frames(scene.source, larger * sizes.width, larger * sizes.height, mode="stretch"), sizes.fps)
        sample = dict(
            prompt=scene.instruction,
            video=clip.save(Path(folder) / f"{name}.mp4", overwrite=True),
            reference=PIL.Image.fromarray(scene.reference),
        )
    pipe.set_progress_bar_config(disable=True)
    return Subject(name, pipe, sample, steps)


def step_flops(
    sizes: Preset,
    frames: int,
    height: int,
    width: int,  # of a clip, in frames and pixels
    references: int = 1,
) -> float:  # operations
    "What one call of the denoiser takes, counted from its classes without any weights."
    vae, z = sizes.vae, sizes.vae["z_dim"]
    shape = (
        1,
        z,
        (frames - 1) // vae["scale_factor_temporal"] + 1,
        height // vae["scale_factor_spatial"],
        width // vae["scale_factor_spatial"],
    )
    tokens = (
        sizes.guidance["num_ref_queries"] + sizes.guidance["max_object_token"]
        if references
        else sizes.guidance["num_video_queries"]
    )
    with torch.device("meta"), torch.no_grad():
        wan, ours = WanTransformer3DModel(**sizes.transformer), guidance.KiwiGuidance(**sizes.guidance)
        clip, context, one = torch.empty(shape), torch.empty(1, tokens, sizes.guidance["dim"]), torch.empty(1)
        reference = torch.empty(*shape[:2], references, *shape[3:]) if references else None
        with operations() as counter:
            guidance.denoise(wan, ours, clip, one, one, context, None, clip, reference)
    return float(counter.get_total_flops())


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Configuration:
    "A way to edit that is timed."

    name: str
    kind: str  # "exact", "without" (a saving), "recomputed" or "approximate"
    steps: int
    enter: Callable  # of the pipeline: a context manager within which it edits so
    fresh: bool = True  # whether the pipeline has forgotten the clip
    asked: bool = True  # whether the edit is asked for so many steps; otherwise the approximation says how many


TRIED = (  # approximations and their options, at twenty steps
    {"first-block cache": dict(threshold=0.2)},
    {"taylor series": {}},
    {"fewer steps": dict(steps=10)},
    {"fewer steps": dict(steps=7)},
    {"fewer steps": dict(steps=10), "first-block cache": dict(threshold=0.2)},
    {"fewer steps": dict(steps=8), "taylor series": {}},
    {"bfloat16": {}},
    {"float8 weights": {}},
    {"int8 weights": {}},
    {"tiled autoencoder": dict(overlap=0.5)},
    {"compiled": {}},
    {"compiled": {}, "fewer steps": dict(steps=10), "first-block cache": dict(threshold=0.2)},
)
QUICK = (
    {"first-block cache": dict(threshold=0.2)},
    {"fewer steps": dict(steps=7)},
    {"fewer steps": dict(steps=8), "taylor series": {}},
)


def _title(chosen):
    return " + ".join(
        name + (f" ({', '.join(f'{k} {v}' for k, v in options.items())})" if options else "")
        for name, options in chosen.items()
    )


def _impossible(subject, chosen):
    "Why an approximation is not measured here, None where it is."
    if "bfloat16" in chosen and subject.name == "5b":
        return "this model has them already"
    if "bfloat16" in chosen and not multiplies_bfloat16(subject.pipe._execution_device):
        return "products in bfloat16 are emulated here"
    if "int8 weights" in chosen and find_spec("torchao") is None:
        return "torchao is not installed"


def configurations(
    subject: Subject,
    quick: bool = False,  # a few of them
) -> tuple[list[Configuration], dict[str, str]]:  # what is measured, and what is not with the reason
    "All that is measured of a model."
    own, many, left_out = subject.steps[0], subject.steps[-1], {}
    found = [
        Configuration("exact", "exact", own, nullcontext),
        Configuration("everything recomputed", "recomputed", own, recomputed),
        Configuration("the next edit of the clip", "exact", own, nullcontext, fresh=False),
    ]
    for name, saving in ({} if quick else SAVINGS).items():
        if saving.saves == "every edit" and (name != "autoencoder" or subject.pipe._execution_device.type == "cpu"):
            found.append(Configuration(f"without {name}", "without", own, saving.without))
    if many != own:
        found += [
            Configuration("exact", "exact", many, nullcontext),
            Configuration("everything recomputed", "recomputed", many, recomputed),
        ]
    for chosen in QUICK if quick else TRIED:
        if reason := _impossible(subject, chosen):
            left_out[_title(chosen)] = reason
            continue
        chosen, title = {name: dict(options) for name, options in chosen.items()}, _title(chosen)
        if "tiled autoencoder" in chosen:
            unit = subject.pipe.vae.config.scale_factor_spatial
            chosen["tiled autoencoder"]["tile"] = math.isqrt(subject.pipe.config.max_pixels) * 3 // 4 // unit * unit
        found.append(
            Configuration(
                title,
                "approximate",
                many,
                lambda pipe, chosen=chosen: approximately(pipe, chosen),
                asked="fewer steps" not in chosen,
            )
        )
    return found, left_out


@torch.no_grad()
def measure_model(
    subject: Subject,
    runs: int = 5,  # rounds, in each of which every configuration is timed once
    quick: bool = False,  # few configurations
    scores: int = 8,  # samples of each task on which an approximation of `tiny` is scored; 0: not
    progress: bool = True,
    difficulty: str = "easy",  # of the world that they are scored on
) -> dict:
    "Seconds, operations, memory and differences of all configurations."
    if runs < 1:
        raise InputError(f"`runs` has to be at least 1 but is {runs}.")
    pipe, device, exact, rows = subject.pipe, subject.pipe._execution_device, {}, []
    subject.edit(1)
    pipe.memory.clear()  # the first edit of a process is slower than the others
    ways, left_out = configurations(subject, quick)
    with tqdm(total=len(ways) * (runs + 1), unit="edit", disable=not progress) as bar:

        def forget(way):
            if way.fresh:
                pipe.memory.clear()

        for way in ways:  # once for the results; what has to be compiled is
            bar.set_description(f"{subject.name}: {way.name}"[:40])
            with way.enter(pipe):
                steps, compiled, result = way.steps if way.asked else None, "compiled" in way.name, {}
                forget(way)
                with nullcontext() if compiled else operations() as counter:
                    frames = as_frames(
                        subject.edit(steps, callback_on_step_end=lambda pipe, i, t, tensors: result.update(tensors))[0]
                    )
                result = result["latents"].float().cpu()
                forget(way)
                few = None if compiled else allocated_by(lambda: subject.edit(steps and 1), str(device))
                row = dict(
                    name=way.name,
                    kind=way.kind,
                    steps=way.steps,
                    gflop=None if compiled else counter.get_total_flops() / 1e9,
                    bytes=few,
                    runs=[],
                )
                if way.kind == "exact" and way.fresh:
                    exact[way.steps] = frames, result
                if way.kind == "approximate" and scores and subject.name == "tiny":
                    row["scores"] = _scores(subject, way, scores, difficulty)
            if way.name == "exact" and scores and subject.name == "tiny":
                row["scores"] = _scores(subject, way, scores, difficulty)
            mse = np.square(frames.astype(float) - exact[way.steps][0]).mean()
            row |= dict(
                latents=float((result - exact[way.steps][1]).abs().max()),
                psnr=None if mse == 0 else float(10 * np.log10(255**2 / mse)),
            )
            rows.append(row)
            bar.update()
        for turn in range(runs):
            for i in range(len(ways)):
                way, row = ways[(i + turn * 3) % len(ways)], rows[(i + turn * 3) % len(ways)]
                bar.set_description(f"{subject.name}: {way.name}"[:40])
                with way.enter(pipe):
                    if not way.fresh:
                        subject.edit(1)  # of which the encodings are remembered
                    forget(way)
                    _synchronize(device)
                    start = time.perf_counter()
                    subject.edit(way.steps if way.asked else None)
                    _synchronize(device)
                    row["runs"].append(time.perf_counter() - start)
                bar.update()
    pipe.memory.clear()
    for row in rows:
        row["seconds"] = statistics.median(row["runs"])
    return dict(
        name=subject.name,
        what=str(subject),
        rows=rows,
        left_out=left_out,
        rate=measure_flops(device, pipe.transformer.dtype),
        difficulty=difficulty,
    )


def _scores(subject, way, samples, difficulty):
    "Means over the tasks of the kit's own benchmark; None where a network has to see it and is not installed."
    report = run_benchmark(
        subject.pipe,
        samples=samples,
        steps=way.steps if way.asked else None,
        difficulty=difficulty,
        progress=False,
        keep=0,
    )
    columns = {name: [row[name] for row in report.rows.values()] for name in ("pooled", "told_apart")}
    return {name: None if None in values else statistics.mean(values) for name, values in columns.items()}


@torch.no_grad()
def stream_memory(
    pipe: KiwiEditPipeline,
    lengths: tuple[int, ...] = (5, 21, 41, 81),  # frames, 4k+1
    size: int = 96,  # pixels, square
) -> list[dict]:  # "frames", "streamed" and "whole" in bytes
    "Memory of decoding a clip to its frames, in pieces and at once."
    rows, vae = [], pipe.vae.config
    for frames in lengths:
        shape = 1, vae.z_dim, (frames - 1) // vae.scale_factor_temporal + 1, *[size // vae.scale_factor_spatial] * 2
        given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe._execution_device)

        source = pipeline.Footage(frames, size, size, np.zeros((frames, size, size, 3), np.uint8))

        def use():
            for piece in pipeline._stream_composite(pipe.vae, given, given[:, :0], source):
                piece.sum()  # a writer that keeps nothing

        row = dict(frames=frames, streamed=allocated_by(use, str(given.device)))
        with recomputed(pipe, "streams"):
            rows.append(row | dict(whole=allocated_by(use, str(given.device))))
    return rows


def seam_error(
    clip: np.ndarray,  # (T, H, W, 3) uint8
    windows: list,  # of `Window`, in which it was denoised
    target: np.ndarray | None = None,  # (T, H, W, 3) uint8; None: every change is an error
    group: int = 4,  # frames to a latent frame after the first
) -> dict[str, float]:  # "seam" and "inside", NaN where there is none
    "Error of the change between two frames, on borders of latent frames: where other windows take over, and where they do not."
    change = lambda frames: np.diff(frames.astype(np.float32), axis=0)[
        ::group
    ]  # the last frame of a latent frame, and the first of the next
    errors = np.abs(change(clip) - (0 if target is None else change(target))).mean((1, 2, 3))
    covered = [
        frozenset(k for k, window in enumerate(windows) if window.frames.start <= i < window.frames.stop)
        for i in range(len(errors) + 1)
    ]
    seams = np.array([one != two for one, two in zip(covered, covered[1:])])
    return {
        name: float(errors[where].mean()) if where.any() else math.nan
        for name, where in (("seam", seams), ("inside", ~seams))
    }


@torch.no_grad()
def measure_windows(
    subject: Subject,
    frames: int = 161,  # of the long clip, 4k+1
    seed: int = EVAL_SEED + 9,  # of its scenes
    tasks: tuple[str, ...] = (
        "background",
        "subject",
        "add",
        "remove",
        "change",
        "style",
    ),  # whose edits are looked at; with random weights the first one
    difficulty: str = "easy",  # of the world
) -> dict:  # "difficulty", "frames", "windows", "one_bytes", "all_bytes", "seconds", "seam", "inside"
    "A long clip in windows: memory beside that of a single window, and how rough its seams are."
    pipe, trained = subject.pipe, subject.name == "tiny"
    window, side = pipe.window_frames, math.isqrt(pipe.config.max_pixels) // pipe.size_multiple * pipe.size_multiple
    world, device = World(side, side, frames, split="eval", difficulty=difficulty), str(pipe._execution_device)

    def edit(sample, count=frames, **options):
        pipe.memory.clear()
        reference = None if sample.reference is None else PIL.Image.fromarray(sample.reference)
        return pipe(
            sample.instruction,
            sample.source[:count],
            reference,
            num_frames=count,
            generator=torch.Generator().manual_seed(0),
            **dict(output_type="stream") | options,
        ).frames[0]

    def use(count):
        for piece in edit(first, count):
            piece.sum()  # a writer that keeps nothing

    first = world.sample(seed, tasks[0])
    edit(first, window, output_type="latent")
    one, all_of_it = (allocated_by(lambda: use(count), device) for count in (window, frames))
    start = time.perf_counter()
    clips = [np.concatenate(list(edit(first)))]
    seconds = time.perf_counter() - start
    samples, windows = [first], pipe.windows(frames, side, side)
    for task in tasks[1:] if trained else ():
        samples.append(world.sample(seed, task))
        clips.append(np.concatenate(list(edit(samples[-1]))))
    group = pipe.vae.config.scale_factor_temporal
    errors = [
        seam_error(clip, windows, sample.target if trained else None, group) for clip, sample in zip(clips, samples)
    ]
    pipe.memory.clear()
    return dict(
        difficulty=difficulty,
        frames=frames,
        windows=len(windows),
        one_bytes=one,
        all_bytes=all_of_it,
        seconds=seconds,
        **{name: float(np.mean([error[name] for error in errors])) for name in ("seam", "inside")},
    )


def reading_rates(
    frames: int = 96,  # of a clip of 1280x720 pixels
    sizes: tuple = ((80, 48), (832, 480)),  # (width, height) to which they are shrunk
    runs: int = 3,  # whose medians count
) -> list[dict]:  # "size", "loop", "exact" in frames a second
    "Frames a second of decoding and resizing: imageio's loop frame by frame, and `read_video`."
    import imageio.v3 as imageio

    scene = World(num_frames=min(frames, 33), split="eval").sample(EVAL_SEED, "style").source
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        grain = np.random.default_rng(0)
        large = (
            np.clip(
                resize_frames(scene[i % len(scene)][None], 1280, 720, mode="stretch").astype(np.int16)
                + grain.integers(-4, 5, (1, 720, 1280, 1)),
                0,
                255,
            ).astype(np.uint8)
            for i in range(frames)
        )
        write_video(path, large, 24)
        for size in sizes:

            def loop():
                for frame in imageio.imiter(path, plugin="pyav"):
                    resize_frames(frame, *size, mode="inference")

            ways = dict(loop=loop, exact=lambda: read_video(path, size=size, mode="inference"))
            seconds = {name: [] for name in ways}
            for _ in range(runs + 1):
                for name, run in ways.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
            rows.append(
                dict(size=list(size)) | {name: frames / statistics.median(found[1:]) for name, found in seconds.items()}
            )
    return rows


_CHILD = """
import sys, time
times = dict(start=float(sys.argv[1]), interpreter=time.time())
import torch
from kiwi_edit.apps import cli
from kiwi_edit.data.files import load_model, plan_edit, run_edit
from kiwi_edit.pipeline import KiwiEditPipeline
times["imports"] = time.time()
plan = plan_edit(sys.argv[2], sys.argv[3], [sys.argv[4]], sys.argv[5], overwrite=True)
pipe = load_model(check=plan.check)
times["weights"] = time.time()
done = run_edit(pipe, plan, lambda *_: None)
times["edit"], times["writing"] = times["weights"] + done.seconds, time.time()
import json
print(json.dumps(times))
"""


def first_start(
    runs: int = 3,  # their median counts
) -> dict[str, float]:  # seconds of each part, and of the whole command
    "What `kiwi-edit edit` of the sample clip takes in a fresh process, and what that is made of."
    if runs < 1:
        raise InputError(f"`runs` has to be at least 1 but is {runs}.")
    video, reference, words = (
        asset("samples/clip.mp4"),
        asset("samples/reference.png"),
        asset("samples/instruction.txt").read_text(),
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "edited.mp4"
        for _ in range(runs):

            def run(*arguments):
                start = time.time()
                done = subprocess.run(
                    [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=folder
                )
                if done.returncode:
                    raise RuntimeError(f"`kiwi-edit edit` fails here: {done.stderr.strip().splitlines()[-1]}")
                return done.stdout, time.time() - start

            text, _ = run("-c", _CHILD, time.time(), video, words, reference, out)
            times = json.loads(text.strip().splitlines()[-1])
            names = list(times)
            parts = {name: times[name] - times[before] for before, name in zip(names, names[1:])}
            _, whole = run(
                "-m", "kiwi_edit.apps.cli", "edit", video, "-i", words, "-r", reference, "-o", out, "--overwrite"
            )
            found.append(parts | dict(command=whole))
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


@dataclass
class SpeedReport:
    "What `measure_model` and the other measurements found."

    hardware: dict[str, str]
    versions: dict[str, str]
    models: list[dict] = field(default_factory=list)  # as `measure_model` gives them
    streams: list[dict] = field(default_factory=list)  # as `stream_memory`
    windows: dict[str, dict] = field(default_factory=dict)  # model -> as `measure_windows`
    reading: list[dict] = field(default_factory=list)  # as `reading_rates`
    start: dict[str, float] = field(default_factory=dict)  # as `first_start`

    @staticmethod
    def rows(model: dict) -> list[dict]:
        "Rows of a model with how many times as fast as everything recomputed they are."
        plain = {row["steps"]: row["seconds"] for row in model["rows"] if row["kind"] == "recomputed"}
        return [row | dict(ratio=plain[row["steps"]] / row["seconds"]) for row in model["rows"]]

    @staticmethod
    def best(model: dict, quality: float = 35) -> dict | None:
        "The fastest approximation that is at least so many dB from the exact edit."
        good = [
            row
            for row in SpeedReport.rows(model)
            if row["kind"] == "approximate" and (row["psnr"] is None or row["psnr"] >= quality)
        ]
        return min(good, key=lambda row: row["seconds"], default=None)

    def _repr_markdown_(self) -> str:
        lines = []
        for model in self.models:
            scored = any("scores" in row for row in model["rows"])
            lines += [
                f"**{model['name']}**: {model['what']}",
                "",
                "| | steps | seconds | times as fast | GFLOP | MB | dB to exact |"
                + (" edit done | told apart |" if scored else ""),
                "|---|" + "--:|" * (8 if scored else 6),
            ]
            for row in self.rows(model):
                quality = (
                    "equal"
                    if row["psnr"] is None
                    else "equal to 1e-5"
                    if row["latents"] < 1e-5
                    else f"{row['psnr']:.1f}"
                )
                cells = [
                    row["name"],
                    str(row["steps"]),
                    f"{row['seconds']:.3g}",
                    f"{row['ratio']:.2f}",
                    *("" if row[k] is None else f"{row[k] / unit:.1f}" for k, unit in (("gflop", 1), ("bytes", 1e6))),
                    quality,
                ]
                if scored:
                    cells += [
                        "" if row.get("scores", {}).get(name) is None else format(row["scores"][name], form)
                        for name, form in (("pooled", ".2f"), ("told_apart", ".0%"))
                    ]
                lines.append("| " + " | ".join(cells) + " |")
            floor = [
                f"{row['steps']} steps of the exact edit cannot take less than {1e9 * row['gflop'] / model['rate']:.3g} s"
                for row in model["rows"]
                if row["name"] == "exact"
            ]
            lines += [
                f"\nProducts of matrices: {model['rate'] / 1e9:,.0f} GFLOP a second, so that {' and '.join(floor)}."
                + "".join(f" Not measured: {name}, since {reason}." for name, reason in model["left_out"].items())
                + f" Scored on the world: {model.get('difficulty', 'full')}." * scored,
                "",
            ]
        for name, w in self.windows.items():
            lines += [
                f"**{name}**, {w['frames']} frames of the world ({w.get('difficulty', 'full')}) in {w['windows']} windows, {w['seconds']:.3g} s: {w['all_bytes'] / 1e6:.0f} MB at most, {w['one_bytes'] / 1e6:.0f} MB for one window ({w['all_bytes'] / w['one_bytes'] - 1:+.0%}); "
                f"error at seams {w['seam']:.2f}, inside windows {w['inside']:.2f} ({w['seam'] / w['inside'] - 1:+.0%}).",
                "",
            ]
        for row in self.reading:
            lines += [
                f"**Reading** 720p to {row['size'][0]}x{row['size'][1]}: {row['loop']:.0f} frames a second in a loop, {row['exact']:.0f} by threads ({row['exact'] / row['loop']:.1f} times).",
                "",
            ]
        if self.start:
            lines += [
                "**From a cold start**, seconds: "
                + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.start.items())
                + ".",
                "",
            ]
        notes = [f"{k} {v}" for k, v in (self.hardware | self.versions).items()]
        return "\n".join(lines) + "\n" + ", ".join(notes) + ".\n"

    def save(
        self,
        path: str | Path,  # .json, made or replaced
    ) -> Path:
        "Write it all."
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, True) as temporary:
            Path(temporary).write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,  # written by `save`
    ) -> SpeedReport:
        "Read a report."
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`path` has to be a report written by `SpeedReport.save` but {str(path)!r} does not exist."
            )
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"`path` has to be a report written by `SpeedReport.save` but {str(path)!r} is none: {error}."
            ) from error

    def draw(self) -> Strip:
        "For each model: an edit with each saving switched off, and what approximations give for what they cost."
        figure = Strip(figsize=(9.6, 3.3 * len(self.models)))
        for (left, right), model in zip(
            np.atleast_2d(figure.subplots(len(self.models), 2, width_ratios=(1, 1.25))), self.models
        ):
            rows = self.rows(model)
            own = rows[0]["steps"]
            bars = [row for row in rows if row["steps"] == own and row["kind"] != "approximate"]
            colors = dict(exact="#4a90d9", recomputed="#f2a65a", without="#bbbbbb")
            left.barh(
                [row["name"] for row in bars],
                [row["seconds"] for row in bars],
                color=[colors[row["kind"]] for row in bars],
            )
            for i, row in enumerate(bars):
                left.text(row["seconds"], i, f" {row['seconds']:.2f}", va="center", fontsize=7)
            left.invert_yaxis()
            left.tick_params(labelsize=7)
            left.set_xlabel("seconds", fontsize=8)
            left.margins(x=0.15)
            left.set_title(f"{model['name']}: savings, at {own} steps", fontsize=9)
            tried = [row for row in rows if row["kind"] == "approximate"]
            for i, row in enumerate(tried):
                right.plot(
                    row["ratio"],
                    min(row["psnr"] or 90, 90),
                    "o",
                    ms=4,
                    color="#4a90d9" if " + " in row["name"] else "#5cb85c",
                )
                right.annotate(
                    row["name"].replace(" + ", "\n+ "),
                    (row["ratio"], min(row["psnr"] or 90, 90)),
                    xytext=(4, 0),
                    textcoords="offset points",
                    fontsize=5.5,
                    va="center",
                )
            exact = next(
                (row for row in rows if row["kind"] == "exact" and tried and row["steps"] == tried[0]["steps"]), None
            )
            if exact:
                right.axvline(exact["ratio"], color="#4a90d9", lw=0.8)
            right.axhline(35, color="lightgray", lw=0.8, zorder=0)
            right.margins(x=0.25, y=0.1)
            right.tick_params(labelsize=7)
            right.set_xlabel("times as fast as everything recomputed (line: exact)", fontsize=8)
            right.set_ylabel("dB to the exact edit", fontsize=8)
            if tried:
                right.set_title(f"{model['name']}: approximations, at {tried[0]['steps']} steps", fontsize=9)
            for ax in (left, right):
                for side in ("top", "right"):
                    ax.spines[side].set_visible(False)
        figure.tight_layout()
        return figure


def main(
    arguments: list[str] | None = None,  # None takes those of the command line
) -> int:
    "`python assets/benchmarks/speed.py`: measure everything and write it down."
    parser = argparse.ArgumentParser(
        "python assets/benchmarks/speed.py",
        description="Measure what each saving and each approximation does to an edit.",
    )
    parser.add_argument(
        "--model",
        choices=(*BENCH_MODELS, "all"),
        default="all",
        help="which to measure; all are those that fit the device",
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds, whose medians count")
    parser.add_argument(
        "--scores", type=int, default=8, help="samples of each task on which approximations of tiny are scored; 0: none"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="one round of a few configurations")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/speed.json"),
        help="report to write; a figure of the same name lies beside it",
    )
    given = parser.parse_args(arguments)
    for name, least in (("runs", 1), ("scores", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} has to be at least {least} but is {getattr(given, name)}")
    if given.out.suffix != ".json":
        parser.error(f"--out has to be a .json file but is {given.out}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write between the lines of the bar
    device = choose_device(given.device)
    if given.model == "5b" and device.type != "cuda":
        parser.error(f"--model 5b has to run on a GPU but the device is {device}")
    names = [given.model] if given.model != "all" else ["tiny", "large"] + ["5b"] * (device.type == "cuda")
    given.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    report = SpeedReport(
        describe_hardware(device), {name: version(name) for name in ("diffusers", "transformers", "numpy")}
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            subject = bench_subject(name, folder, device)
            report.models.append(
                measure_model(
                    subject, 1 if given.quick else given.runs, given.quick, 0 if given.quick else given.scores
                )
            )
            if name == "tiny":
                report.streams = stream_memory(subject.pipe, (5, 21, 41) if given.quick else (5, 21, 41, 81))
            if name != "5b":
                report.windows[name] = (
                    measure_windows(subject, 41, tasks=("background",)) if given.quick else measure_windows(subject)
                )
    if find_spec("imageio"):
        report.reading = reading_rates(24 if given.quick else 96, runs=1 if given.quick else 3)
    report.start = first_start(1 if given.quick else 3)
    report.save(given.out)
    with replacing(given.out.with_suffix(".png"), True) as temporary:
        Path(temporary).write_bytes(report.draw()._repr_png_())
    sys.stdout.write(report._repr_markdown_() + f"\nreport: {given.out}\nfigure: {given.out.with_suffix('.png')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
