"""How the denoiser of kiwi-edit-tiny was finished: python assets/benchmarks/finish.py OUT [--minutes N --critic 0.03 ...]

The encoder and the autoencoder stay as they are, and what they make of a sample is computed once. So a step costs the
denoiser alone: 0.4 s for 8 single frames on one core of an AMD EPYC that multiplies bfloat16 (470 GFLOP/s). The loss is the
root of each place's squared error, which rewards what is sharp; places that the edit leaves alone count little, since the
matte lets the source show through there.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from tqdm.auto import tqdm

from kiwi_edit.data.dataset import WorldDataset
from kiwi_edit.encoder import encode_context
from kiwi_edit.guidance import EditCache, denoise
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.cache import RowSettings, _encode_samples, _placeholder_ids, collate_rows
from kiwi_edit.train.engine import _Optimizers
from kiwi_edit.train.foundations import metric_factor, pixel_metric

SHOWN = dict(subject=0.64, background=0.36)  # tasks with a reference, and shares among them
SAID = dict(isolate=0.29, remove=0.22, change=0.18, add=0.13, style=0.11, plate=0.07)
LEFT_ALONE = 0.15  # weight of a place of which no pixel changes
MATTE, MATCH = 0.3, 0.5  # weights of the matte's cross-entropy and of the critic's features


class Critic(torch.nn.Module):
    "Tells latents of targets from those of edits, place by place."

    def __init__(self, channels, width=128):
        super().__init__()
        sizes = [channels, width, width, width]
        convs = [torch.nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:])]
        self.layers = torch.nn.ModuleList(map(spectral_norm, [*convs, torch.nn.Conv2d(width, 1, 1)]))

    def forward(self, x):  # (N, z, h, w) -> score (N, 1, h, w), features
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x).float(), features


@torch.no_grad()
def make_rows(pipe, tasks, num_frames, samples, first_seed):
    "Rows of the easy world, each with the context of its words and pictures."
    data = WorldDataset(tasks, num_frames, samples=samples, first_seed=first_seed, difficulty="easy")
    rows, token_ids = [], _placeholder_ids(pipe.processor)
    for start in tqdm(range(0, samples, 8), desc=f"rows of {num_frames} frames", mininterval=2):
        made = _encode_samples(pipe, [data[i] for i in range(start, min(start + 8, samples))], RowSettings(batch=8))
        for row in made:
            batch = collate_rows([row], token_ids)
            row["context"] = encode_context(pipe.mllm, pipe.guidance, batch.inputs, batch.vision)[0][0].half()
        rows += made
    return rows


def shuffled(rows, size, rng):
    "Batches of rows of one shape without end."
    shapes = {}
    for row in rows:
        shapes.setdefault(row["shape"], []).append(row)
    groups = list(shapes.values())
    weights = np.array([len(group) for group in groups]) / len(rows)
    while True:
        group = groups[rng.choice(len(groups), p=weights)]
        yield [group[i] for i in rng.choice(len(group), size, replace=len(group) < size)]


def step_loss(pipe, rows, token_ids, factor):
    "Loss of a batch; the clean latents that it names, those of the target, and which places change."
    batch = collate_rows(rows, token_ids)
    noise, sigma, step = torch.randn_like(batch.target), torch.ones(len(rows)), EditCache(key_values=None)
    context = torch.nn.utils.rnn.pad_sequence([row["context"].float() for row in rows], batch_first=True)
    given = noise, 1000 * sigma, sigma, context, None, batch.source, batch.reference
    with torch.autocast("cpu", torch.bfloat16):
        velocity = denoise(pipe.transformer, pipe.guidance, *given, cache=step).float()
    error = torch.einsum("ij,bifhw->bjfhw", factor, velocity - (noise - batch.target))
    touched = batch.kept < 0.995
    weight = torch.where(touched, 1.0, LEFT_ALONE)
    weight = weight / weight.mean((1, 2, 3, 4), keepdim=True)
    loss = ((error.square().mean(1, keepdim=True) + 1e-4).sqrt() * weight).mean()
    matte = F.binary_cross_entropy_with_logits(step.matte.float(), batch.changed)
    return loss + MATTE * matte, noise - velocity, batch.target, touched


def criticised(critic, optimizer, edit, target, touched):
    "Teach the critic once; what an edit has to add to its loss so as to look like a target."
    flat = lambda x: x.transpose(1, 2).flatten(0, 1)
    fake, real, mask = flat(torch.where(touched, edit, target)), flat(target), flat(touched.float())
    mask = mask / mask.mean().clamp(min=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        hinge = F.relu(1 - critic(real)[0]) + F.relu(1 + critic(fake.detach())[0])
    optimizer.zero_grad()
    (hinge * mask).mean().backward()
    optimizer.step()
    critic.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        score, ours = critic(fake)
        _, theirs = critic(real)
    critic.requires_grad_(True)
    apart = sum(((a.float() - b.float()).abs() * mask).mean() for a, b in zip(ours, theirs)) / len(ours)
    return -(score * mask).mean(), apart


def finish(pipe, out, minutes, rate, floor, critic_weight, clip_share, samples):
    "Train the denoiser and the embedders for so many minutes."
    torch.manual_seed(0)
    rng, token_ids = np.random.default_rng(0), _placeholder_ids(pipe.processor)
    kinds = [(tasks, frames) for frames in (1, 5) for tasks in (SHOWN, SAID) if frames == 1 or clip_share]
    seeds = {1: 1000, 5: 400_000}
    sources = []
    for k, (tasks, frames) in enumerate(kinds):
        tasks = tasks if frames == 1 else {name: x for name, x in tasks.items() if name not in ("isolate", "plate")}
        count = samples if frames == 1 else samples // 5
        rows = make_rows(pipe, tasks, frames, count, seeds[frames] + k * 100_000)
        sources.append(shuffled(rows, 8 if frames == 1 else 4, rng))
    gram = pixel_metric(pipe.vae, torch.stack([row["target"].float() for row in rows[:24]]), progress=False)
    factor = metric_factor(gram, 0.75)
    share = np.array([clip_share if frames > 1 else 1 - clip_share for _, frames in kinds])
    parts = torch.nn.ModuleDict(dict(transformer=pipe.transformer, guidance=pipe.guidance)).requires_grad_(False)
    for part in (pipe.transformer, pipe.guidance.source_embedder, pipe.guidance.ref_embedder):
        part.requires_grad_(True)
    pipe.transformer.condition_embedder.text_embedder.requires_grad_(False)
    for block in pipe.transformer.blocks:
        block.compile(dynamic=False)
    optimizer, critic = _Optimizers(parts, rate, "muon", weight_decay=0.0), Critic(pipe.vae.config.z_dim)
    teacher = torch.optim.AdamW(critic.parameters(), 4e-4, betas=(0.0, 0.98), weight_decay=0.0)
    start, bar = time.monotonic(), tqdm(desc="steps", mininterval=10)
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rows = next(sources[rng.choice(len(sources), p=share / share.sum())])
        loss, *pictures = step_loss(pipe, rows, token_ids, factor)
        if critic_weight:
            fooled, apart = criticised(critic, teacher, *pictures)
            loss = loss + critic_weight * fooled + MATCH * apart
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parts.parameters() if p.requires_grad], 1.0)
        optimizer.step(min(1, done / 0.03 + 1e-3) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))))
        bar.update()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = None
    pipe.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("finish.py", description=__doc__.partition("\n\n")[2])
    parser.add_argument("out", type=Path, help="folder of the finished model")
    parser.add_argument("--start", default="kiwi-edit-tiny", help="bundled name or folder of the model to go on from")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="at its peak, of Muon [0.0012]")
    parser.add_argument("--floor", type=float, default=0.02, help="share of it at the end [0.02]")
    parser.add_argument("--critic", type=float, default=0.0, help="its weight; 0 goes without [0]")
    parser.add_argument("--clips", type=float, default=0.0, help="share of the steps that are on clips [0]")
    parser.add_argument(
        "--samples", type=int, default=10_000, help="single frames of each kind, and a fifth as many clips"
    )
    given = parser.parse_args()
    model = KiwiEditPipeline.from_pretrained(given.start)
    settings = given.minutes, given.rate, given.floor, given.critic, given.clips, given.samples
    finish(model, given.out, *settings)
