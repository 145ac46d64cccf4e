"""`python assets/benchmarks/step.py`: a step of the 5B model's last stage on random weights and samples, beside what `estimate` says of it."""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from speed import allocated_by  # beside this file

from kiwi_edit.core import preset
from kiwi_edit.encoder import collate_inputs, make_tokenizer
from kiwi_edit.eval.benchmark import describe_hardware
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.cache import Batch
from kiwi_edit.train.curriculum import find_stage, select
from kiwi_edit.train.engine import FlowMatching, _frozen_aside, _Optimizers, cast_weights, measure_flops
from kiwi_edit.train.estimate import _latent_size, _sample, estimate
from kiwi_edit.training import Dice


def random_batch(pipe, shape, dtype):
    "A batch of a shape, as a cache would give it, and its dice."
    sample = _sample(pipe, *shape[1:4], references=int(shape.mode == "ref"))
    size = b, z, _, h, w = _latent_size(pipe.vae, shape.batch_size, *shape[1:4])
    pictures = sum(math.prod(grid) for grid in sample.grids[0]) // 4, pipe.guidance.config.hidden_size
    vision = [torch.randn(pictures, dtype=dtype) for _ in range(b)]
    reference = torch.randn(b, z, 1, h, w) if shape.mode == "ref" else None
    kept, tasks = torch.ones(b, 1, *size[2:]), [""] * b
    batch = Batch(collate_inputs([sample] * b), vision, torch.randn(size), torch.randn(size), reference, kept, tasks)
    return batch, Dice(torch.randn(size), torch.full((b,), 0.5), torch.ones(b), torch.zeros(b, dtype=torch.bool))


def timed(run, device):
    "Seconds of a run, to its end."
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def measure_step(stage, sizes, device="cpu", steps=3):
    "Bytes and seconds of a step, and what the dry run says of both."
    said = estimate(stage, sizes, progress=False)
    fullest, dtype = max(said.batches, key=lambda cost: sum(said.memory_of(cost).values())), getattr(torch, stage.dtype)
    flops = sum(fullest.flops.values())
    torch.manual_seed(0)
    with torch.device(device):
        pipe = KiwiEditPipeline.from_preset(sizes, make_tokenizer(["Make it blue."], 400))
    cast_weights(pipe, dtype)
    select(pipe, stage)
    item, wan = tuple(part.to(device) for part in random_batch(pipe, fullest.shape, dtype)), pipe.transformer.config
    rows = item[0].target[:, 0].numel() // math.prod(wan.patch_size)
    product = rows, wan.num_attention_heads * wan.attention_head_dim, wan.ffn_dim
    bytes_of = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    with _frozen_aside(pipe, cached=True):
        model = FlowMatching(pipe, replace(stage.loss, pixel_metric=0.0), None, stage.source, stage.autocast)
        optimizers = _Optimizers(model, stage.lr, "adamw", stage.weight_decay)

        def step():
            model(item)[0].mean().backward()
            optimizers.step(1.0)

        step()  # moments are made
        parts = [p for part in (pipe.mllm, pipe.guidance, pipe.transformer) for p in part.parameters()]
        most = bytes_of(parts) + bytes_of(optimizers.state().values()) + allocated_by(step, device)
        # each beside a plain product, since a machine changes its pace; the middle one counts
        runs = [(timed(step, device), measure_flops(device, dtype, product)) for _ in range(steps)]
    seconds, rate = sorted(runs, key=math.prod)[len(runs) // 2]
    found = dict(bytes=int(most), said_bytes=said.peak, seconds=seconds, said_seconds=flops / rate)
    return found | dict(flops=flops, flops_per_second=rate)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("step.py", description="Measure a step of training, beside its estimate.")
    parser.add_argument("--layers", type=int, default=2, help="of denoiser and language model; 30 is the whole [2]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--out", type=Path, default=Path("step.json"), help="for the numbers [step.json]")
    given = parser.parse_args(arguments)
    sizes, stage = preset("wan2.2-5b"), find_stage("wan2.2-5b", "stage3-ref")
    sizes.transformer["num_layers"] = given.layers
    if given.layers < 30:  # a small clip too, as much as two cores do in minutes
        sizes.mllm["text_config"]["num_hidden_layers"] = given.layers
        stage = replace(stage, num_frames=17, max_pixels=256 * 256)
    if given.device == "cpu":
        stage = replace(stage, dtype="float32")
    found = measure_step(stage, sizes, given.device)
    about = dict(layers=given.layers, frames=stage.num_frames, pixels=stage.max_pixels)
    found |= about | dict(hardware=describe_hardware(torch.device(given.device)))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    memory, pace = found["bytes"] / found["said_bytes"] - 1, found["seconds"] / found["said_seconds"] - 1
    print(f"memory: {found['bytes'] / 1e9:.2f} GB, said {found['said_bytes'] / 1e9:.2f} GB ({memory:+.1%})")
    print(f"time: {found['seconds']:.1f} s, said {found['said_seconds']:.1f} s ({pace:+.1%})")


if __name__ == "__main__":
    main()
