"""Ship the model of a run: python .ci/publish.py RUN assets/kiwi-edit-tiny"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure

from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.records import read_lines
from kiwi_edit.train.curriculum import STAGES


def draw_stages(
    logs: dict,  # stage -> records of its log
) -> Figure:
    "What each stage has learned over its minutes: decibels, next tokens that are right, or loss."
    figure = Figure(figsize=(11, 2.8))
    panels = figure.subplots(1, 3)
    kinds = dict(psnr="autoencoder, dB", accuracy="encoder, next tokens right", loss="denoiser, loss")
    for name, log in logs.items():
        value = next(value for value in kinds if value in log[-1])
        panel = panels[list(kinds).index(value)]
        panel.plot([record["seconds"] / 60 for record in log], [record[value] for record in log], label=name, lw=1)
        panel.set_title(kinds[value], fontsize=9)
    for panel in panels:
        panel.set_xlabel("minutes in the stage", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
    figure.tight_layout()
    return figure


def thin(records, points=300):
    "Means over runs of steps, about so many."
    width, thinned = max(1, len(records) // points), []
    for start in range(0, len(records), width):
        rows = records[start : start + width]
        keys = sorted({key for row in rows for key in row} - {"step", "seconds"})
        means = {key: round(float(np.mean([row[key] for row in rows if key in row])), 5) for key in keys}
        thinned.append(dict(step=rows[-1]["step"], seconds=rows[-1]["seconds"]) | means)
    return thinned


def publish_stage(home, training, points):
    "Log, validation and first and last film strip of a stage."
    rows = thin(read_lines(home / "log.jsonl"), points)
    (training / f"{home.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if (home / "validation.jsonl").exists():
        shutil.copy(home / "validation.jsonl", training / f"{home.name}-validation.jsonl")
    strips = sorted(home.glob("strip-*.png"))
    for name, strip in zip(("before", "after"), (strips[0], strips[-1]) if strips else ()):
        picture = PIL.Image.open(strip).convert("RGB").reduce(2).quantize(128)
        picture.save(training / f"{home.name}-{name}.png", optimize=True)


def publish(
    folder: str | Path,  # of a run
    destination: str | Path,  # folder of the model to ship; what else lies there stays
    points: int = 300,  # of each curve
) -> None:
    "Write a run's model in half precision, and under `training` its thinned logs, curves and film strips."
    folder, training = Path(folder), Path(destination) / "training"
    KiwiEditPipeline.from_pretrained(folder / "model").to(torch.float16).save_pretrained(destination)
    training.mkdir(exist_ok=True)
    for log in folder.glob("*/log.jsonl"):
        publish_stage(log.parent, training, points)
    logs = {name: read_lines(training / f"{name}.jsonl") for name in STAGES}
    if any(logs.values()):
        draw_stages({name: log for name, log in logs.items() if log}).savefig(training / "curves.png", dpi=80)


if __name__ == "__main__":
    publish(*sys.argv[1:])
