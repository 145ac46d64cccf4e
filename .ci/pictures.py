"""What the README and the card show of the model that ships, none of it picked: python .ci/pictures.py [CLIP ...] [--share 0.1]

Draws assets/figures/hero.gif, hero.png and edit-strip.png, and below assets/kiwi-edit-tiny subjects.png, benchmark.json,
benchmark.png and real-footage.png, and assets/benchmarks/baselines.json and .png; prints the card's tables.
"""

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kiwi_edit.core import asset
from kiwi_edit.data.files import edit_file
from kiwi_edit.eval.benchmark import BENCH_SAMPLES, benchmark_samples, run_benchmark
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.video import as_frames
from kiwi_edit.world import EVAL_SEED, TASKS, World

sys.path.insert(0, str(asset("benchmarks")))
from baselines import read_baselines

MODEL = asset("kiwi-edit-tiny")
FIGURES = asset("figures")
REAL = (  # instruction, and the held-out place that is its reference
    ("Make the video look snowy.", None),
    ("Give the whole video a grayscale look.", None),
    ("Use the reference image as the new background.", 0),
    ("Add a pumpkin at the bottom right.", None),
)


def draw(figure) -> PIL.Image.Image:
    "A figure as a picture."
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def edit(pipe, instruction, clip, reference=None, seed=0):
    "Frames of an edit, (T, H, W, 3) uint8."
    shown = None if reference is None else PIL.Image.fromarray(reference)
    return as_frames(pipe(instruction, clip, shown, generator=torch.Generator().manual_seed(seed)).frames[0])


def panel(axis, picture, title=""):
    "One picture of a figure."
    axis.set_axis_off()
    axis.set_title(title, fontsize=10, color="#777", loc="left", pad=3)
    if picture is None:
        axis.text(0.5, 0.5, "(words alone)", ha="center", va="center", fontsize=10, color="#777")
    else:
        axis.imshow(picture, interpolation="lanczos")


def hero_frame(scenes, time) -> PIL.Image.Image:
    "The first eight evaluation scenes at one time."
    figure = Figure(figsize=(11, 8.6), dpi=100)
    for i, (sample, output) in enumerate(scenes):
        row, column = divmod(i, 2)
        place = dict(left=0.01 + 0.5 * column, right=0.49 + 0.5 * column, wspace=0.03)
        place |= dict(top=0.975 - 0.245 * row, bottom=0.765 - 0.245 * row)
        axes = figure.add_gridspec(1, 3, **place).subplots()
        at = min(time, len(output) - 1)
        for axis, picture, name in zip(
            axes, (sample.source[at], sample.reference, output[at]), ("source", "reference", "output")
        ):
            panel(axis, picture, name if row == 0 else "")
        axes[0].text(0, -0.04, sample.instruction, transform=axes[0].transAxes, va="top", fontsize=10)
    return draw(figure)


def draw_hero(pipe):
    "The first evaluation scenes of the easy world, one of each task."
    world = World(split="eval", difficulty="easy")
    samples = [benchmark_samples(world, task, 1, EVAL_SEED + i)[0] for i, task in enumerate(TASKS)]
    scenes = [(s, edit(pipe, s.instruction, s.source, s.reference, s.meta["seed"])) for s in samples]
    pictures = [hero_frame(scenes, time) for time in range(world.num_frames)]
    pictures[0].quantize(256).save(FIGURES / "hero.png", optimize=True)
    palette = pictures[0].quantize(128)
    frames = [p.quantize(palette=palette, dither=PIL.Image.Dither.NONE) for p in pictures + pictures[-2:0:-1]]
    frames[0].save(FIGURES / "hero.gif", save_all=True, append_images=frames[1:], duration=300, loop=0, optimize=True)


def draw_subjects(pipe):
    "The first scenes in which a reference brings a thing."
    samples = benchmark_samples(World(split="eval", difficulty="easy"), "subject", 8)
    figure = Figure(figsize=(16, 6.4), dpi=80)
    axes = figure.subplots(3, len(samples))
    figure.subplots_adjust(left=0.055, right=1, top=0.9, bottom=0, wspace=0.04, hspace=0.04)
    for column, sample in zip(axes.T, samples):
        output = edit(pipe, sample.instruction, sample.source, sample.reference, sample.meta["seed"])
        for axis, picture in zip(column, (sample.source[0], sample.reference, output[0])):
            panel(axis, picture)
        column[0].set_title(textwrap.fill(sample.instruction, 26), fontsize=9)
    for axis, name in zip(axes[:, 0], ("source", "reference", "output")):
        axis.text(-0.05, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=11)
    draw(figure).quantize(256).save(MODEL / "subjects.png", optimize=True)


def draw_strip(pipe):
    "What `./kit edit` gives."
    samples = asset("samples")
    with tempfile.TemporaryDirectory() as folder:
        words = (samples / "instruction.txt").read_text().strip()
        done = edit_file(pipe, samples / "clip.mp4", words, samples / "reference.png", out=Path(folder) / "edited.mp4")
        PIL.Image.open(done.strip).save(FIGURES / "edit-strip.png")


def draw_real(pipe, clips):
    "Edits of real clips, as they come out, and of one that Gradio ships."
    import gradio

    clips = [*clips, Path(gradio.__file__).parent / "media_assets" / "videos" / "world.mp4"]
    clips = [pipe.prepare_video(clip) for clip in clips]
    world = World(split="eval", difficulty="easy")
    figure = Figure(figsize=(23, 2.05 * len(clips)), dpi=80)
    for row, clip in enumerate(clips):
        for column, (words, place) in enumerate(REAL):
            shown = None if place is None else world.sample(EVAL_SEED + place, "background").reference
            spot = dict(left=0.005 + column * 0.25, right=0.245 + column * 0.25, wspace=0.02)
            spot |= dict(top=1 - row / len(clips), bottom=1 - (row + 0.85) / len(clips))
            axes = figure.add_gridspec(1, 2, **spot).subplots()
            for axis, picture in zip(axes, (clip[0], edit(pipe, words, clip, shown)[0])):
                panel(axis, picture)
            axes[0].text(0, -0.03, words, transform=axes[0].transAxes, va="top", fontsize=10)
    draw(figure).quantize(256).save(MODEL / "real-footage.png", optimize=True)


def measure(pipe, share=1.0):
    "The bench in the full world, and in the easy one beside editors that cheat; what is found there is kept."
    ranked, bench = read_baselines(), asset("benchmarks")
    samples = max(2, round(share * BENCH_SAMPLES))
    full = run_benchmark(pipe, name=MODEL.name, samples=max(2, samples // 2), difficulty="full")
    editors = {MODEL.name: pipe} | ranked.baselines(pipe)
    easy, *others = ranked.run_editors(editors, samples=samples, difficulty="easy", keep=2)
    easy.save(MODEL / "benchmark.json")
    easy.strips(2).savefig(MODEL / "benchmark.png")
    ranking = ranked.Ranking([easy, *others], ranked.provenance(pipe.device, MODEL))
    ranking.save(bench / "baselines.json")
    ranking.strips("subject", 2).savefig(bench / "baselines.jpg", pil_kwargs=dict(quality=85))
    for found in (easy, full, ranking):
        print(found._repr_markdown_(), "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("pictures.py", description="Draw and measure what the README and the card show.")
    parser.add_argument("clips", nargs="*", type=Path, metavar="CLIP", help="real footage to edit for the card")
    parser.add_argument("--share", type=float, default=1.0, help="of the benchmark's scenes, to try it with few [1]")
    given = parser.parse_args()
    model = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    model.set_progress_bar_config(disable=True)
    for drawing in (draw_hero, draw_subjects, draw_strip):
        drawing(model)
    draw_real(model, given.clips)
    measure(model, given.share)
