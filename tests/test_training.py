"""The loop and the stages: stopped and continued to the bit, alone and in company, what they log and what they refuse."""

import contextlib
import copy
import gc
import json
import math
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import common
import kiwi_edit.train.engine
from kiwi_edit.weights.checkpoints import load_trainer_checkpoint, merge_lora
from kiwi_edit.train.curriculum import Bucket, Lora, Loss, Stage, _add_lora, find_stage, part_parameters, select
from kiwi_edit.data.dataset import WorldDataset, save_dataset, write_metadata
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train.engine import (
    FlowMatching,
    LiveView,
    _ahead,
    _averaged,
    _checkpoints,
    _frozen_aside,
    _Optimizers,
    _part_of,
    _save_checkpoint,
    _save_curve,
    _trim_log,
    _draw_log,
    find_model,
    fit,
    _learning_rate,
    _load_checkpoint,
    _make_accelerator,
    measure_flops,
    put_model,
    _stage_batches,
    train,
)
from kiwi_edit.records import read_lines

PUBLISH = runpy.run_path(str(Path(__file__).parent.parent / ".ci/publish.py"))
MUON = "muon" if hasattr(torch.optim, "Muon") else "adamw"
needs_muon = pytest.mark.skipif(MUON != "muon", reason="torch.optim has no Muon before torch 2.9")


@pytest.fixture(scope="module", autouse=True)
def short_and_exact():
    "Sums of several threads may differ in the last bit from those of one; and to draw a curve takes longer than some steps, so that one test does it."
    number = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_short_and_exact(monkeypatch.setattr)
        yield
    torch.set_num_threads(number)


def make_short_and_exact(set=setattr):
    torch.set_num_threads(1)
    set(kiwi_edit.train.engine, "_save_curve", lambda *_: None)


# a toy that learns to add up


@dataclass
class Numbers:
    "A batch whose samples have names."

    x: torch.Tensor
    ids: list

    def to(self, device):
        return Numbers(self.x.to(device), self.ids)


class Toy(torch.nn.Module):
    "Two layers that are named as parts of a pipeline, with chance in their forward."

    def __init__(self, noise=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.guidance, self.transformer, self.noise = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1), noise

    def forward(self, batch):
        x = batch.x + self.noise * torch.randn_like(batch.x)
        return (self.transformer(x + self.guidance(x).tanh())[:, 0] - batch.x.sum(1)).square(), dict(extra=1.0)


def toy_batch(number, part=0, parts=1, size=8):
    x = torch.from_numpy(np.random.default_rng(number).normal(size=(size, 8)).astype(np.float32))
    return Numbers(x[part::parts], [f"{number}/{i}" for i in range(part, size, parts)])


def run_toy(
    folder,
    model=None,
    batches=toy_batch,
    trackers=(),
    on_step=None,
    on_save=None,
    keep=2,
    save_every=300,
    seed=0,
    **stage,
):
    "Train a toy; its records, in full precision."
    model, records = Toy() if model is None else model, []
    stage = Stage("toy", (), **dict(lr=0.02, steps=10) | stage)

    def note(record):
        records.append(record)
        if on_step:
            on_step(record)

    fit(
        model,
        batches,
        folder,
        stage,
        seed,
        keep,
        save_every,
        note,
        on_save,
        False,
        _make_accelerator(stage.accumulation, "cpu", trackers, folder),
    )
    return records


# a small model, and data for it


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "Folder of a small model with random weights."
    sizes, folder = common.small_sizes(), tmp_path_factory.mktemp("model")
    sizes.transformer.update(num_layers=2)
    sizes.guidance.update(num_image_queries=4, num_video_queries=4, num_ref_queries=4)
    torch.manual_seed(0)
    KiwiEditPipeline.from_preset(
        sizes, make_tokenizer(["Replace the red fox with the object in the reference."] * 4)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A table of pictures and one of pictures with a reference."
    folder = tmp_path_factory.mktemp("data")
    return {
        mode: str(save_dataset(WorldDataset({task: 1.0}, 1, 32, 32, samples=6), folder / mode, progress=False))
        for mode, task in (("image", "add"), ("ref", "subject"))
    }


EDITS = Stage(
    "edits",
    ("guidance", "transformer"),
    2e-3,
    lora=dict(language_model=Lora(4, ("q_proj", "v_proj"))),
    mix=("image", "ref"),
    max_pixels=32 * 32,
    batch_size=2,
    accumulation=2,
    steps=6,
    optimizer=MUON,
    schedule="cosine",
    warmup=0.2,
    clip=1.0,
    ema=0.5,
    loss=Loss(dropout=0.3),
)
WORLD = Stage(
    "world",
    ("language_model", "guidance", "transformer"),
    1e-3,
    steps=2,
    buckets=(Bucket(dict(add=1.0), 1, 32, 32, 0.5, 2, 4), Bucket(dict(subject=1.0), 5, 32, 32, 0.5, 2, 4)),
)


def run_stage(stage, folder, start, data=None, **options):
    "Train a stage; its records, in full precision."
    records, also = [], options.pop("on_step", None)

    def note(record):
        records.append(record)
        if also:
            also(record)

    train(stage, folder, start, data, progress=False, device="cpu", on_step=note, **options)
    return records


def numbers(record):
    return {key: value for key, value in record.items() if key == "lr" or key.startswith(("loss", "grad_norm"))}


def by_step(records):
    return {record["step"]: numbers(record) for record in records}


def same_files(a, b):
    "Whether two folders hold the same tensors, to the bit."
    found = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in (a, b)]
    assert found[0] == found[1] and found[0]
    for name in found[0]:
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert not [
            key
            for key, value in ours.items()
            if value.dtype != theirs[key].dtype or not torch.equal(value, theirs[key])
        ], name


# killed, and continued


def toy_job(folder, **options):
    return run_toy(folder, steps=24, optimizer=MUON, schedule="cosine", ema=0.9, accumulation=2, clip=1.0, **options)


def stage_job(folder, *more, **options):
    return run_stage(EDITS, folder, *more, **options)


def killed_job(job, folder, last, *more):
    "For a process that is to be killed: what it does goes to a file at once, and in the last of its steps it waits for its end."
    make_short_and_exact()
    with open(folder / "records", "w", buffering=1) as file:

        def note(record):
            file.write(json.dumps(record) + "\n")
            if record["step"] == last:
                time.sleep(600)

        job(folder, *more, on_step=note, save_every=-1)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


@pytest.mark.parametrize("job, last", [(toy_job, 15), (stage_job, 4)])
def test_a_killed_run_continues_to_the_bit(job, last, tmp_path, start, data):
    killed, whole, more = tmp_path / "killed", tmp_path / "whole", () if job == toy_job else (start, data)
    killed.mkdir()
    home = killed if job == toy_job else killed / "edits"
    process = common.start(killed_job, job, killed, last, *more, said=tmp_path / "said")
    code = common.kill_when(process, lambda: len(lines(killed / "records")) == last)
    assert code == -signal.SIGKILL, (tmp_path / "said.err").read_text()
    before = lines(killed / "records")
    assert _checkpoints(home / "checkpoints")[-1].name == f"step-{last - 1:08d}"
    with open(home / "log.jsonl", "a") as f:
        f.write('{"step": 99, "lo')  # as if the kill had come in the middle of a line
    continued, undisturbed = (job(folder, *more, keep=1) for folder in (killed, whole))
    # the step that was not saved comes again
    assert continued[0]["step"] == before[-1]["step"] == last < continued[-1]["step"]
    for records in (before, continued):
        assert by_step(records).items() <= by_step(undisturbed).items()
    same_files(killed, whole)  # weights, average and moments; and the model of a stage
    assert {"weights.safetensors", "moments.safetensors", "average.safetensors"} <= {
        path.name for path in whole.rglob("*")
    }
    assert [row["step"] for row in read_lines(home / "log.jsonl")] == [record["step"] for record in undisturbed]


# checkpoints


def test_the_last_checkpoints_stay(tmp_path):
    run_toy(tmp_path, steps=5, keep=3, save_every=-1)
    assert [path.name for path in _checkpoints(tmp_path / "checkpoints")] == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    with pytest.raises(ValueError, match="`keep` has to be at least 1 but is 0"):
        run_toy(tmp_path / "none", steps=1, keep=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def change(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    "name, harm",
    [
        ("weights.safetensors", truncate),
        ("weights.safetensors", change),
        ("moments.safetensors", Path.unlink),
        ("state.json", truncate),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_bytes(b"\xff\0")),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, name, harm, caplog):
    whole = run_toy(tmp_path / "whole", steps=8)
    run_toy(tmp_path / "run", steps=6, save_every=-1)
    harm(tmp_path / "run/checkpoints/step-00000006" / name)
    records = run_toy(tmp_path / "run", steps=8, save_every=-1)
    assert [record["step"] for record in records] == [6, 7, 8] and by_step(records).items() <= by_step(whole).items()
    assert [
        r.levelname for r in caplog.records if "step-00000006 is damaged" in r.getMessage() and name in r.getMessage()
    ] == ["WARNING"]
    same_files(tmp_path / "run/checkpoints/step-00000008", tmp_path / "whole/checkpoints/step-00000008")


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(tmp_path):
    run_toy(tmp_path, steps=6, save_every=-1)
    truncate(tmp_path / "checkpoints/step-00000006/weights.safetensors")
    state = _load_checkpoint(tmp_path / "checkpoints")[1]
    # a shorter way than the one that led to the damaged one
    _save_checkpoint(tmp_path / "checkpoints", {"weights": {}}, state | dict(step=5), keep=1)
    assert [path.name for path in _checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]


def test_without_a_whole_checkpoint_a_run_does_not_start_anew(tmp_path):
    run_toy(tmp_path, steps=3, save_every=-1)
    for path in _checkpoints(tmp_path / "checkpoints"):
        truncate(path / "weights.safetensors")
    with pytest.raises(ValueError, match="`folder` holds 2 checkpoints of which none is whole"):
        run_toy(tmp_path, steps=4)
    assert _load_checkpoint(tmp_path / "nowhere") == (None, None)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    run_toy(tmp_path, steps=1)
    other = Toy()
    other.guidance.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`folder` holds other parameters .*'guidance\.bias'"):
        run_toy(tmp_path, other, steps=2)
    other = Toy()
    other.transformer = torch.nn.Linear(8, 1, bias=False)
    other.guidance = torch.nn.Linear(1, 8)  # would be filled by repeating
    other.guidance.weight = torch.nn.Parameter(torch.zeros(16, 8))
    other.transformer.bias = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"`folder` holds other parameters .*'guidance\.weight'.*'transformer\.bias'"):
        run_toy(tmp_path, other, steps=2)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_ones(tmp_path, monkeypatch):
    whole = run_toy(tmp_path / "whole", steps=6)
    run_toy(tmp_path / "run", steps=3, save_every=-1)
    folder, before = tmp_path / "run/checkpoints", [path.name for path in _checkpoints(tmp_path / "run/checkpoints")]

    def write_half(tensors, path):
        if path.stem == "moments":
            raise KeyboardInterrupt
        save_file(tensors, path)

    monkeypatch.setattr(kiwi_edit.train.engine, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "run", steps=6)
    monkeypatch.undo()
    (folder / ".step-00000006-half").mkdir()  # what a kill leaves, that no program can answer
    assert [path.name for path in _checkpoints(folder)] == before and _load_checkpoint(folder)[1]["step"] == 3
    assert by_step(run_toy(tmp_path / "run", steps=6)).items() <= by_step(whole).items()
    assert not list(folder.glob(".*"))


def test_a_log_loses_what_comes_again(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    _trim_log(log, 2)
    assert read_lines(log) == [dict(step=1), dict(step=2)]
    _trim_log(tmp_path / "none", 2)
    assert not (tmp_path / "none").exists()


# several processes


class Turns(Toy):
    "Only every second batch uses the guidance."

    def forward(self, batch):
        if int(batch.ids[0].split("/")[0]) % 2:
            return super().forward(batch)
        return (self.transformer(batch.x)[:, 0] - batch.x.sum(1)).square(), dict(plain=1.0)


def shard(monkeypatch, *layers):
    "Let Accelerate shard weights over processes on CPUs, too: `accelerate launch` does so on GPUs alone."
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(layers)
    )

    def sharding(accumulation=1, device="cpu", trackers=(), folder=None):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        accelerator.state.fsdp_plugin = plugin
        return accelerator

    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    for module in (kiwi_edit.train.engine, sys.modules[__name__]):
        monkeypatch.setattr(module, "_make_accelerator", sharding)


def team_job(folder, start, data):
    "What several processes do together, or one alone."
    make_short_and_exact()
    rank, parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder.mkdir(exist_ok=True)
    runs = {}
    for name, model, options in (
        ("toy", Toy(0.0), dict(ema=0.9, accumulation=2, clip=1.0)),
        ("turns", Turns(0.0), dict(accumulation=2)),
        (
            "minutes",
            Toy(0.5),
            dict(minutes=0.01, steps=10**9, schedule="cosine", on_step=lambda record: time.sleep(0.01)),
        ),
    ):
        runs[name] = run_toy(folder / name, model, save_every=0.05, **options)
        save_file(model.state_dict(), folder / f"{name}-{rank}.safetensors")
    stage = replace(EDITS, batch_size=4 // parts, accumulation=1, optimizer="adamw", lr=1e-4)
    runs["edits"] = run_stage(
        stage, folder / "run", start, data, cache=folder / "cache", save_every=0.5, trackers=("tensorboard",)
    )
    if rank == 0:
        shutil.copytree(folder / "run/model", folder / "edited")
    more = replace(stage, name="more", checkpointing=("transformer", "language_model"), lora={})
    # begins with the model that the first has written
    runs["more"] = run_stage(more, folder / "run", start, data, cache=folder / "cache", steps=2)
    if parts > 1:
        with pytest.MonkeyPatch.context() as monkeypatch:
            shard(monkeypatch, "Linear")
            runs["sharded toy"] = []
            for steps, model in ((5, Toy(0.0)), (10, Toy(0.0))):
                runs["sharded toy"] += run_toy(
                    folder / "sharded-toy", model, ema=0.9, accumulation=2, clip=1.0, steps=steps
                )
                assert all(isinstance(p, DTensor) for p in model.parameters())
            shard(monkeypatch, "WanTransformerBlock", "Qwen2_5_VLDecoderLayer")
            runs["sharded edits"] = run_stage(
                replace(stage, checkpointing=("transformer", "language_model")),
                folder / "sharded-run",
                start,
                data,
                evaluate=lambda pipe: 1 / 0,
            )
            with pytest.raises(ValueError, match="`stage.optimizer` has to be 'adamw' where weights are sharded"):
                run_toy(folder / "none", optimizer="muon")
    (folder / f"runs-{rank}.json").write_text(json.dumps(runs))


@pytest.fixture(scope="module")
def teams(tmp_path_factory, start, data):
    "Folders of what one process and two have done."
    folder = tmp_path_factory.mktemp("teams")
    said = common.together(folder, team_job, folder / "two", start, data)
    assert said.count("stage edits are neither drawn nor evaluated") == 1
    team_job(folder / "one", start, data)
    return folder / "one", folder / "two"


def runs_of(folder, rank=0):
    return json.loads((folder / f"runs-{rank}.json").read_text())


@pytest.mark.parametrize("name", ["toy", "turns", "edits", "more", "sharded toy", "sharded edits"])
def test_two_processes_have_the_numbers_of_one(teams, name):
    one, two = runs_of(teams[0])[name.removeprefix("sharded ")], runs_of(teams[1])[name]
    assert len(one) == len(two) > 1
    for i, (ours, theirs) in enumerate(zip(map(numbers, one), map(numbers, two))):
        near = 1e-6 if i == 0 and name != "more" else 1e-4
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=near) and theirs["lr"] == ours["lr"]
        for key in ours:
            if key.startswith("grad_norm"):
                assert theirs[key] == pytest.approx(ours[key], rel=10 * near, abs=1e-7), key
            if key.startswith("loss/") and "-" not in key:
                # of noise levels each process has a mean of its own
                assert theirs[key] == pytest.approx(ours[key], rel=near), key


@pytest.mark.parametrize("name", ["toy", "turns", "minutes"])
def test_two_processes_end_with_the_same_weights(teams, name):
    ours, theirs = (load_file(teams[1] / f"{name}-{rank}.safetensors") for rank in range(2))
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    if name != "minutes":
        assert near(load_file(teams[0] / f"{name}-0.safetensors"), ours)


def near(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.allclose(value, theirs[key], rtol=1e-4, atol=1e-5) for key, value in ours.items()
    )


def test_shards_are_put_together(teams):
    one, two = teams
    for a, b in (("toy", "sharded-toy"), ("run/edits", "sharded-run/edits")):
        (ours, state), (theirs, same) = (_load_checkpoint(folder / "checkpoints") for folder in (one / a, two / b))
        assert state["step"] == same["step"] and ours.keys() == theirs.keys() == {"weights", "moments", "average"}
        assert all(near(ours[name], theirs[name]) for name in ours)
    whole, merged = (
        weights(KiwiEditPipeline.from_pretrained(folder)) for folder in (one / "edited", two / "sharded-run/model")
    )
    assert near(whole, merged)


def test_one_of_two_processes_writes(teams):
    assert not any(runs_of(teams[1], rank=1).values())  # `on_step` is called in the first alone
    for name in ("toy", "turns", "run/edits"):
        assert [row["step"] for row in read_lines(teams[1] / name / "log.jsonl")] == [
            row["step"] for row in read_lines(teams[0] / name / "log.jsonl")
        ]
    KiwiEditPipeline.from_pretrained(teams[1] / "run/model")
    assert len(list((teams[1] / "run").rglob("events.out.tfevents.*"))) == 1


def patient_job(folder):
    "What the processes wait for each other with lasts for days, and the first goes first."
    accelerator = _make_accelerator(device="cpu")
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout >= timedelta(days=30)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            time.sleep(2)
            (folder / "made").touch()
        assert (folder / "made").exists()
    (folder / f"done-{accelerator.process_index}").touch()


def test_a_cache_may_take_longer_than_a_barrier_lasts(tmp_path):
    common.together(tmp_path, patient_job, tmp_path)
    assert len(list(tmp_path.glob("done-*"))) == 2


# optimisers, rates and averages


def test_steps_are_those_of_adamw_by_hand(tmp_path):
    options = dict(
        lr=0.05,
        steps=12,
        weight_decay=0.1,
        lr_scales=dict(guidance=0.3),
        schedule="cosine",
        warmup=0.25,
        floor=0.1,
        clip=0.5,
        ema=0.8,
    )
    fitted, model, seen = Toy(0.0), Toy(0.0), []
    records = run_toy(tmp_path, fitted, on_save=lambda step: seen.append(copy.deepcopy(fitted.state_dict())), **options)
    average = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(
        [dict(params=[p], part=name.split(".")[0]) for name, p in model.named_parameters()], weight_decay=0.1
    )
    stage = Stage("toy", (), **options)
    for step, record in enumerate(records):
        rate = 0.05 * _learning_rate(stage, step / 12, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.3 if group["part"] == "guidance" else 1)
        loss = model(toy_batch(step))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        norms = [
            torch.cat([p.grad.flatten() for p in part.parameters()]).norm().item()
            for part in (model.guidance, model.transformer)
        ]
        assert [
            record[key] for key in ("loss", "lr", "grad_norm/guidance", "grad_norm/transformer", "grad_norm")
        ] == pytest.approx([loss.item(), rate, *norms, math.hypot(*norms)], rel=1e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        average = {name: 0.8 * average[name] + 0.2 * p.detach() for name, p in model.named_parameters()}
    assert all(record["grad_norm"] > 0.5 for record in records[:6])  # what is logged is the norm before it is clipped
    files, state = _load_checkpoint(tmp_path / "checkpoints")
    assert state["step"] == 12 and state["mean_loss"] < records[0]["loss"]
    for name, p in model.named_parameters():
        assert torch.allclose(files["weights"][name], p, rtol=1e-4, atol=1e-6)
        assert torch.allclose(files["average"][name], average[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(files["weights"][name], files["average"][name], rtol=1e-3)
        for averaged_weights in (fitted.state_dict(), *seen):
            # what is looked at, and what stays in the end
            assert torch.equal(averaged_weights[name], files["average"][name])


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_parts_of_a_batch_add_up_to_it(tmp_path, kind):
    def part(number, part=0, parts=1):
        return toy_batch(number // 4, number % 4, 4)

    whole, summed = Toy(0.0), Toy(0.0)
    one = run_toy(tmp_path / "one", whole, optimizer=kind, clip=1.0)
    four = run_toy(tmp_path / "four", summed, part, optimizer=kind, clip=1.0, accumulation=4)
    for i, (ours, theirs) in enumerate(zip(map(numbers, one), map(numbers, four))):
        assert theirs == pytest.approx(ours, rel=1e-6 if i == 0 else 1e-4)
    for ours, theirs in zip(whole.parameters(), summed.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert four[0]["extra"] == 1


def test_averaged_weights_are_there_within_and_not_after():
    model = Toy()
    trained = dict(model.named_parameters())
    before, average = copy.deepcopy(model.state_dict()), {"guidance.weight": torch.full((8, 8), 3.0)}
    with pytest.raises(KeyError), _averaged(trained, average):
        assert (model.guidance.weight == 3).all() and torch.equal(model.guidance.bias, before["guidance.bias"])
        raise KeyError
    assert all(torch.equal(before[name], p) for name, p in trained.items())


def test_rates():
    cosine = Stage("x", (), 1.0, schedule="cosine", warmup=0.1, floor=0.05)
    rates = [_learning_rate(cosine, p / 100) for p in range(101)]
    assert rates[0] < 0.02 and np.argmax(rates) == 10 and rates[10] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.05) and rates[55] == pytest.approx(0.525)
    assert all(b <= a + 1e-12 for a, b in zip(rates[10:], rates[11:]))
    assert all(b > a for a, b in zip(rates[:10], rates[1:11]))
    assert _learning_rate(cosine, 2.0) == pytest.approx(0.05)  # a step may end a little after the last minute
    assert [_learning_rate(Stage("x", (), 1.0), p, 9) for p in (0, 0.3, 1)] == [1, 1, 1]
    dipped = Stage("x", (), 1.0, lr_dip=True)
    assert [_learning_rate(dipped, 0.0, step) for step in (0, 4, 5)] == pytest.approx([1 / 3, 1 / 3, 1])


def test_the_dip_reaches_the_rates_of_a_run(tmp_path):
    records = run_toy(tmp_path, steps=7, lr=0.03, lr_dip=True)
    assert [record["lr"] for record in records] == pytest.approx([0.01] * 5 + [0.03] * 2)


@needs_muon
def test_muon_moves_kernels_like_the_matrices_that_they_are(monkeypatch):
    monkeypatch.setattr(kiwi_edit.train.engine, "multiplies_bfloat16", lambda device: True)  # as torch's own does
    torch.manual_seed(0)
    module = torch.nn.ModuleDict(
        dict(
            transformer=torch.nn.Conv3d(2, 3, 3),
            guidance=torch.nn.ModuleDict(dict(norm=torch.nn.LayerNorm(4), connector=torch.nn.Linear(4, 5))),
        )
    )
    matrix = torch.nn.Parameter(module["transformer"].weight.detach().flatten(1).clone())
    alone = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    before = copy.deepcopy(module.state_dict())
    optimizers = _Optimizers(module, 0.02, lr_scales=dict(connector=0.5))
    assert [type(optimizer).__name__ for optimizer in optimizers.all] == ["Muon", "AdamW"] and len(optimizers.flat) == 2
    for step in range(3):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        matrix.grad = module["transformer"].weight.grad.flatten(1).clone()
        alone.step()
        optimizers.step(1.0)
        assert torch.equal(module["transformer"].weight.flatten(1), matrix)
    assert all(p.grad is None for p in module.parameters())
    assert all(not torch.equal(before[key], value) for key, value in module.state_dict().items())
    rates = [(group["scale"], group["lr"]) for optimizer in optimizers.all for group in optimizer.param_groups]
    assert sorted(rates) == [(0.5, 0.01), (0.5, 0.01), (1, 0.02), (1, 0.02)]
    again = _Optimizers(copy.deepcopy(module), 0.02, lr_scales=dict(connector=0.5))
    again.load_state(optimizers.state())
    assert all(torch.equal(value, again.state()[key]) for key, value in optimizers.state().items())
    assert len(optimizers.state()) == 2 + 3 * 4


def test_adamw_takes_everything_where_it_is_chosen():
    optimizers = _Optimizers(Toy(), 0.02, "adamw", weight_decay=0.3, lr_scales=dict(guidance=0.1))
    assert [type(optimizer).__name__ for optimizer in optimizers.all] == ["AdamW"] and not optimizers.flat
    assert [
        (group["scale"], group["weight_decay"], len(group["params"])) for group in optimizers.all[0].param_groups
    ] == [(0.1, 0.3, 2), (1.0, 0.3, 2)]


@needs_muon
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_muon_multiplies_in_float32_where_bfloat16_is_emulated(monkeypatch, kind):
    found, formats = {}, []
    for fast in (False, True):
        monkeypatch.setattr(kiwi_edit.train.engine, "multiplies_bfloat16", lambda device: fast)
        torch.manual_seed(0)
        layer = torch.nn.Linear(24, 16)
        before, optimizers = layer.weight.detach().clone(), _Optimizers(layer, 0.02, kind)
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch,
                "addmm",
                lambda *args, f=torch.addmm, **kwargs: formats.append(args[0].dtype) or f(*args, **kwargs),
            )
            optimizers.step(1.0)
        found[fast] = layer.weight.detach() - before
        assert found[fast].abs().max() > 0 and layer.weight.dtype == torch.float32
    # the same step, to what bfloat16 can say
    assert torch.cosine_similarity(found[False].flatten(), found[True].flatten(), dim=0) > 0.999
    assert set(formats) == ({torch.float32, torch.bfloat16} if kind == "muon" else set())
    assert torch.equal(found[False], found[True]) == (kind == "adamw")


@needs_muon
@pytest.mark.parametrize("before, after", [("muon", "adamw"), ("adamw", "muon")])
def test_a_run_goes_on_with_its_own_optimiser(tmp_path, before, after):
    run_toy(tmp_path, steps=1, optimizer=before)
    with pytest.raises(ValueError, match=f"`optimizer` has to be '{before}', .* but is '{after}'"):
        run_toy(tmp_path, steps=2, optimizer=after)


def test_what_a_cache_replaces_leaves_the_device_and_comes_back(pipe, monkeypatch):
    moves, visual = [], pipe.mllm.model.visual
    monkeypatch.setattr(visual, "to", lambda device: moves.append(("tower", str(device))), raising=False)
    monkeypatch.setattr(pipe.vae, "to", lambda device: moves.append(("autoencoder", str(device))), raising=False)
    monkeypatch.setattr(type(pipe.vae), "device", property(lambda self: "cuda:3"))
    with _frozen_aside(pipe, True):
        assert moves == [("tower", "cpu"), ("autoencoder", "cpu")]
    assert moves[2:] == [("tower", "cuda:3"), ("autoencoder", "cuda:3")]
    with _frozen_aside(pipe):
        pass
    assert len(moves) == 4


def test_the_vision_tower_is_aside_and_back(pipe):
    names, visual = set(pipe.mllm.state_dict()), pipe.mllm.model.visual
    with pytest.raises(ZeroDivisionError), _frozen_aside(pipe, True):
        assert pipe.mllm.model.visual is visual and not [name for name in pipe.mllm.state_dict() if "visual" in name]
        1 / 0
    assert set(pipe.mllm.state_dict()) == names and pipe.mllm.model.visual is visual


@needs_muon
def test_a_weight_that_is_not_contiguous_trains_too():
    layers = [torch.nn.Linear(6, 4, bias=False) for _ in range(2)]
    layers[1].weight.data = layers[0].weight.detach().T.contiguous().T
    assert not layers[1].weight.is_contiguous()
    before = layers[0].weight.detach().clone()
    for layer in layers:
        optimizers = _Optimizers(layer, 0.02)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizers.step(1.0)
    assert torch.equal(layers[0].weight, layers[1].weight) and not torch.equal(layers[0].weight, before)


def test_rates_of_a_run_by_minutes_follow_the_clock_and_it_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    schedule = dict(schedule="cosine", warmup=0.0, steps=10**6)
    by_clock = run_toy(tmp_path / "clock", minutes=0.005, on_step=lambda record: time.sleep(0.01), **schedule)
    assert "its rates follow the clock" in caplog.text
    state = _load_checkpoint(tmp_path / "clock/checkpoints")[1]
    assert by_clock[-1]["lr"] < 0.5 * by_clock[0]["lr"] and state["step"] == len(by_clock)
    again = [run_toy(tmp_path / name, **schedule | dict(steps=state["step"])) for name in "ab"]
    assert by_step(again[0]) == by_step(again[1]) and caplog.text.count("follow the clock") == 1


def test_parts_of_parameters(start):
    pipe = KiwiEditPipeline.from_pretrained(start)
    for name in ("language_model", "vision", "connector", "ref_connector", "image_queries", "transformer"):
        assert {_part_of(key) for key in part_parameters(pipe, name)} == {name}
    assert _part_of("vae.decoder.conv_in.weight") == "decoder" and _part_of("vae.encoder.conv_in.weight") == "vae"
    assert _part_of("layer.weight") == "layer"


# the data of a step


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    def batches(number, part, parts):
        if number == 2:
            raise OSError("no such clip")
        return toy_batch(number)

    with pytest.raises(OSError, match="no such clip"):
        run_toy(tmp_path, batches=batches)
    assert [row["step"] for row in read_lines(tmp_path / "log.jsonl")] == [1, 2]


def test_batches_are_made_ahead_until_the_loop_ends():
    made = []
    batches = _ahead(lambda number: made.append(number) or number, 5)
    assert [next(batches) for _ in range(3)] == [5, 6, 7]
    batches.close()
    time.sleep(0.05)
    count = len(made)
    time.sleep(0.05)
    assert made == list(range(5, 5 + count)) and count <= 3 + 2 + 2


@pytest.mark.parametrize("error", [ZeroDivisionError, None])
def test_a_loop_leaves_no_thread_behind(tmp_path, error):
    before = threading.active_count()

    def on_step(record):
        if error:
            raise error

    with pytest.raises(error) if error else contextlib.nullcontext():
        run_toy(tmp_path, on_step=on_step, steps=2)
    gc.collect()
    assert threading.active_count() <= before


# what goes wrong


class Trap(Toy):
    "Goes wrong at a batch."

    def __init__(self, at, factor):
        super().__init__(0.0)
        self.at, self.factor = at, factor

    def forward(self, batch):
        losses, numbers = super().forward(batch)
        return losses * (self.factor if f"{self.at}/0" in batch.ids else 1), numbers


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e4])
def test_a_loss_that_runs_away_stops_the_run_and_names_its_samples(tmp_path, factor):
    kept = []
    with pytest.raises(FloatingPointError) as caught:
        run_toy(
            tmp_path,
            Trap(112, factor),
            steps=100,
            accumulation=2,
            save_every=-1,
            on_step=lambda record: kept.append(record["step"]),
            keep=1,
        )
    said = str(caught.value)
    assert "at step 56 of stage 'toy'" in said and "112/0, 112/1" in said and "113/7" in said and "111/" not in said
    assert "114/" not in said
    assert kept[-1] == 56 and _load_checkpoint(tmp_path / "checkpoints")[1]["step"] == 56
    assert all(p.isfinite().all() for p in _load_checkpoint(tmp_path / "checkpoints")[0]["weights"].values())


def test_a_first_loss_may_be_large(tmp_path):
    run_toy(tmp_path, Trap(3, 100.0), steps=5)


# the stages of a model


@pytest.fixture
def pipe(start):
    return KiwiEditPipeline.from_pretrained(start)


def gradients(pipe, item, autocast):
    "Loss of a batch, gradients, and how often each block has run."
    model, counts = FlowMatching(pipe, autocast=autocast).train(), {"transformer": 0, "language_model": 0}

    def count(name):
        return lambda *_: counts.update({name: counts[name] + 1})

    hooks = [
        block.register_forward_pre_hook(count(name))
        for name, block in (
            ("transformer", pipe.transformer.blocks[0].attn1),
            ("language_model", pipe.mllm.model.language_model.layers[0].mlp),
        )
    ]
    model.zero_grad()
    losses, _ = model(item)
    losses.mean().backward()
    for hook in hooks:
        hook.remove()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counts


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_changes_nothing_but_memory(pipe, tmp_path, lora, autocast):
    stage = replace(WORLD, trains=("guidance", "transformer"), lora=EDITS.lora) if lora else WORLD
    select(pipe, stage)
    if lora:
        lively(pipe)
    batches = _stage_batches(pipe, stage, cache=tmp_path, progress=False)
    modes = set()
    for number in range(3):
        item = batches(number, 0, 1)
        modes |= set(item[0].inputs.modes)
        select(pipe, replace(stage, checkpointing=()))
        losses, plain, counts = gradients(pipe, item, autocast)
        assert counts == dict(transformer=1, language_model=1) and any("language_model" in name for name in plain)
        assert any("transformer" in name for name in plain)
        select(pipe, replace(stage, checkpointing=("transformer", "language_model")))
        again, kept, counts = gradients(pipe, item, autocast)
        assert counts == dict(transformer=2, language_model=2)
        assert torch.equal(losses, again) and plain.keys() == kept.keys()
        assert not [name for name in plain if not torch.allclose(plain[name], kept[name], rtol=1e-5, atol=1e-7)]
    assert modes == {"image", "ref"}


def lively(pipe):
    "LoRA layers start by adding nothing; afterwards these add something."
    torch.manual_seed(5)
    with torch.no_grad():
        for module in (pipe.mllm, pipe.transformer):
            for name, p in module.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.1 * torch.randn_like(p))


def weights(pipe):
    return {
        f"{name}.{key}": value
        for name in ("vae", "mllm", "guidance", "transformer")
        for key, value in getattr(pipe, name).state_dict().items()
    }


@torch.no_grad()
def test_merged_layers_give_the_same(pipe, tmp_path):
    before = weights(pipe).keys()
    for part, lora in (("transformer", Lora(3, ("to_q", "ffn.net.2"))), ("mllm", Lora(4, ("q_proj", "o_proj")))):
        _add_lora(getattr(pipe, part), lora)
    item = _stage_batches(pipe, WORLD, cache=tmp_path, progress=False)(0)
    plain = FlowMatching(pipe)(item)[0]
    lively(pipe)
    beside, _ = FlowMatching(pipe)(item)
    assert (plain / beside - 1).abs().min() > 1e-4
    merge_lora(pipe)
    assert torch.allclose(FlowMatching(pipe)(item)[0], beside, rtol=1e-5) and weights(pipe).keys() == before
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.allclose(
        FlowMatching(KiwiEditPipeline.from_pretrained(tmp_path / "saved"))(item)[0], beside, rtol=1e-5
    )


def test_a_stage_with_lora_trains_its_layers_and_the_named_parts_alone(start, data, tmp_path):
    stage = replace(EDITS, trains=("connector",), ema=0.0, steps=2)
    run_stage(stage, tmp_path, start, data)
    trained = _load_checkpoint(tmp_path / "edits/checkpoints")[0]["weights"]
    assert {_part_of(name) for name in trained} == {"language_model", "connector"}
    assert all("lora_" in name for name in trained if _part_of(name) == "language_model")
    before, after = (weights(KiwiEditPipeline.from_pretrained(folder)) for folder in (start, tmp_path / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {f"mllm.{name.removeprefix('mllm.').split('.lora_')[0]}.weight" for name in trained if "lora_" in name}
    assert changed == layers | {name for name in before if _part_of(name) == "connector"} and len(layers) == 4
    # again: it is finished, and its layers are not added twice
    kept = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*.safetensors")}
    assert train(stage, tmp_path, start, data, device="cpu")["step"] == 2
    assert all(path.read_bytes() == content for path, content in kept.items())
    with pytest.raises(ValueError, match="`folder` has to hold a model without stage 'edits'"):
        train(stage, tmp_path, start, data, device="cpu", steps=3)


def test_an_earlier_stage_does_not_undo_a_later_one(start, data, tmp_path):
    first, second = (replace(EDITS, name=name, steps=1, accumulation=1, lora={}) for name in ("first", "second"))
    run = lambda stage, **options: run_stage(stage, tmp_path, start, data, **options)
    for stage in (first, second):
        run(stage)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert run(first) == []  # it has its steps
    with pytest.raises(ValueError, match="`stage` has to be 'second', .* is 'first'"):
        run(first, steps=2)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert [record["step"] for record in run(second, steps=2)] == [2]


def test_a_kill_before_the_model_is_in_place_is_made_up_for(start, data, tmp_path, monkeypatch):
    stage = replace(EDITS, steps=2, accumulation=1)
    run_stage(stage, tmp_path / "whole", start, data)
    monkeypatch.setattr(kiwi_edit.train.engine, "put_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage(stage, tmp_path / "killed", start, data)
    monkeypatch.undo()
    assert run_stage(stage, tmp_path / "killed", start, data) == []
    same_files(tmp_path / "killed", tmp_path / "whole")


def test_a_kill_between_the_renames_loses_nothing(pipe, tmp_path):
    put_model(pipe, tmp_path / "model")
    (tmp_path / ".model-half").mkdir()
    (tmp_path / "model").rename(tmp_path / ".model-half-old")
    assert find_model(tmp_path) == tmp_path / "model" and KiwiEditPipeline.from_pretrained(tmp_path / "model")
    put_model(pipe, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and find_model(tmp_path / "nothing") is None


def test_cached_and_online_training_are_the_same_to_the_bit(start, data, tmp_path):
    stage = replace(EDITS, steps=3)
    online = run_stage(stage, tmp_path / "online", start, data)
    cached = run_stage(stage, tmp_path / "cached", start, data, cache=tmp_path / "cache")
    assert by_step(online) == by_step(cached) and len(list((tmp_path / "cache").glob("*/*/index.json"))) == 2
    same_files(tmp_path / "online", tmp_path / "cached")
    # 4x4 tokens of a picture, as many of its reference in every second batch
    assert all(record["tokens_per_second"] / record["samples_per_second"] == pytest.approx(24) for record in online)
    assert {key for record in online for key in record if key.startswith("loss/") and "-" not in key} == {
        "loss/image",
        "loss/ref",
        "loss/add",
        "loss/subject",
    }


def test_sources_take_turns_and_processes_share_them(pipe, data):
    stage = replace(EDITS, batch_size=2)
    batches = lambda *place: _stage_batches(pipe, stage, data, parts=3, progress=False)(*place)[0]
    assert [batches(number).inputs.modes for number in range(3)] == [["image"] * 6, ["ref"] * 6, ["image"] * 6]
    shares = [batches(1, part, 3).ids for part in range(3)]
    assert sorted(sum(shares, [])) == sorted(batches(1).ids) and [len(share) for share in shares] == [2, 2, 2]
    weighted = _stage_batches(pipe, replace(stage, alternation="weighted", shares=(0.0, 1.0)), data, progress=False)
    assert {weighted(number)[0].inputs.modes[0] for number in range(4)} == {"ref"}


def test_a_stage_in_bfloat16(start, data, tmp_path, monkeypatch):
    formats = set()

    def watched(model, *more):
        formats.update(buffer.dtype for buffer in model.buffers())
        return fit(model, *more)

    monkeypatch.setattr(kiwi_edit.train.engine, "fit", watched)
    stage = replace(
        EDITS,
        dtype="bfloat16",
        optimizer="adamw",
        steps=2,
        trains=("guidance", "transformer"),
        lora={},
        schedule="constant",
        warmup=0.0,
    )
    records = run_stage(stage, tmp_path, start, data)
    files, _ = _load_checkpoint(tmp_path / "edits/checkpoints")
    assert {value.dtype for value in files["weights"].values()} == {torch.bfloat16}
    assert {value.dtype for value in files["average"].values()} == {torch.float32}
    assert all(math.isfinite(record["loss"]) for record in records)
    exact = run_stage(replace(stage, dtype="float32"), tmp_path / "exact", start, data)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in exact], rel=0.02)
    assert formats == {torch.float32}  # tables of positions
    assert {
        value.dtype for path in (tmp_path / "model").rglob("*.safetensors") for value in load_file(path).values()
    } == {torch.bfloat16}


def test_a_stage_of_the_world_is_logged_looked_at_and_published(start, tmp_path, monkeypatch):
    monkeypatch.setattr(kiwi_edit.train.engine, "_save_curve", _save_curve)
    asked = []

    def evaluate(pipe):
        asked.append(pipe.transformer.training)
        return dict(score=0.5)

    records = run_stage(WORLD, tmp_path / "run", start, evaluate=evaluate, steps=4)
    assert len(records) == 4 and asked == [False, False]  # before and after
    for record in records:
        assert (
            set("step loss grad_norm lr seconds samples_per_second tokens_per_second memory_gb flops_use".split())
            <= record.keys()
        )
        mode, task = ("image", "add") if "loss/image" in record else ("ref", "subject")
        assert {f"loss/{mode}", f"loss/{task}"} < record.keys()
        assert any(key in record for key in ("loss/0-0.25", "loss/0.25-0.5", "loss/0.5-0.75", "loss/0.75-1"))
        assert {
            "grad_norm/language_model",
            "grad_norm/transformer",
            "grad_norm/connector",
            f"grad_norm/{mode}_queries",
        } <= record.keys()
        assert record[f"grad_norm/{mode}_queries"] > 0
        frames = 6 if mode == "ref" else 1  # those of a clip of five, and the reference
        assert record["tokens_per_second"] / record["samples_per_second"] == pytest.approx(4 * 4 * frames)
        assert record["memory_gb"] > 0.1 and 0 < record["flops_use"] < 1
    assert {"loss/image", "loss/ref"} < {key for record in records for key in record}
    home = tmp_path / "run/world"
    assert [path.name for path in home.glob("strip-*.png")] == ["strip-000000.png", "strip-000004.png"]
    assert (home / "curve.png").stat().st_size > 5000
    assert [row.keys() for row in read_lines(home / "validation.jsonl")] == [{"step", "add", "subject", "score"}] * 2
    # further on, from where it ended
    more = run_stage(replace(WORLD, ema=0.5), tmp_path / "run", start, steps=5)
    assert [record["step"] for record in more] == [5]
    assert [row["step"] for row in read_lines(home / "log.jsonl")] == [1, 2, 3, 4, 5]
    PUBLISH["publish"](tmp_path / "run", tmp_path / "shipped", points=2)
    whole, shipped = (
        weights(KiwiEditPipeline.from_pretrained(tmp_path / folder)) for folder in ("run/model", "shipped")
    )
    assert all(torch.allclose(value, shipped[key].to(value.dtype), atol=2e-3) for key, value in whole.items())
    assert all("_name_or_path" not in config.read_text() for config in (tmp_path / "shipped").rglob("*.json"))
    assert len(read_lines(tmp_path / "shipped/training/world.jsonl")) == 3
    assert (tmp_path / "shipped/training/world-validation.jsonl").exists()
    assert all(
        PIL.Image.open(tmp_path / f"shipped/training/world-{moment}.png").width > 100 for moment in ("before", "after")
    )


def test_a_stage_of_files_is_evaluated_too(start, data, tmp_path):
    run_stage(replace(EDITS, steps=1, accumulation=1), tmp_path, start, data, evaluate=lambda pipe: dict(score=0.25))
    assert read_lines(tmp_path / "edits/validation.jsonl") == [dict(step=1, score=0.25)]


def test_the_samples_of_a_model_that_breaks_are_named(pipe, tmp_path):
    select(pipe, WORLD)
    batches = _stage_batches(pipe, WORLD, cache=tmp_path / "cache", progress=False)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=", ".join(batches(0, 0, 1)[0].ids)):
        fit(
            FlowMatching(pipe),
            batches,
            tmp_path / "run",
            WORLD,
            progress=False,
            accelerator=_make_accelerator(device="cpu"),
        )
    assert not _checkpoints(tmp_path / "run/checkpoints")


# what is refused before anything is loaded


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for name in ("_make_accelerator", "start_model", "load_any"):
        monkeypatch.setattr(kiwi_edit.train.engine, name, None)


def test_stages_that_cannot_start_say_so_first(tmp_path, data, nothing_is_loaded):
    mix = find_stage("wan2.2-5b", "stage2-600")
    write_metadata(tmp_path / "empty.csv", [dict(src_video="a", tgt_video="b", prompt="c")])
    (tmp_path / "empty.csv").write_text("src_video,tgt_video,prompt\n")
    (tmp_path / "lacking.csv").write_text("src_video,prompt\na,b\n")
    for stage, options, said in (
        ("stage-9", {}, "stage.*'stage-9'.*autoencoder-start, "),
        (find_stage("wan2.1-14b", "stage2-600"), dict(data=data), "`steps` has to be given for stage 'stage2-600'"),
        (mix, {}, "`data` has to name a metadata file for image, video of stage 'stage2-600' but names none"),
        (mix, dict(data=data), "`data` has to name .*image, video.* but names image, ref"),
        (
            mix,
            dict(data=dict(image=data["image"], video=str(tmp_path / "empty.csv"))),
            "`metadata` has to hold at least one row",
        ),
        (mix, dict(data=dict(image=data["image"], video=str(tmp_path / "lacking.csv"))), "lacks tgt_video"),
    ):
        with pytest.raises(ValueError, match=said):
            train(stage, tmp_path / "run", **options)
    with pytest.raises(FileNotFoundError, match="`metadata` has to be an existing file"):
        train(mix, tmp_path / "run", data=dict(image=data["image"], video="none.csv"))
    assert not (tmp_path / "run").exists()


# eyes on it


def test_a_tracker_is_told_every_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    records = run_toy(tmp_path, steps=4, trackers=("tensorboard",))
    found = events.EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    assert {"loss", "grad_norm", "grad_norm/guidance", "lr", "samples_per_second", "extra"} <= set(
        found.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (record["step"], pytest.approx(record["loss"])) for record in records
    ]


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="`trackers` have to be installed but of tensorboard only none is"):
        _make_accelerator(device="cpu", trackers=("tensorboard",), folder=tmp_path)


def test_logs_are_drawn_and_thinned(tmp_path):
    records = run_toy(tmp_path, steps=9)
    panels = _draw_log(records, window=3).axes
    assert [line.get_label() for line in panels[2].lines] == ["grad_norm", "guidance", "transformer"]
    assert panels[0].get_yscale() == "log"
    few = PUBLISH["thin"](records, 3)
    assert [row["step"] for row in few] == [3, 6, 9]
    assert few[0]["loss"] == pytest.approx(np.mean([record["loss"] for record in records[:3]]), abs=1e-4)
    assert few[1].keys() == records[0].keys()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 10, "lo')  # a run that is killed, or writes just now
    assert [record["step"] for record in read_lines(tmp_path / "log.jsonl")] == list(range(1, 10))


def test_another_device_in_the_same_process(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState, PartialState

    assert _make_accelerator(device="cpu").device.type == "cpu"
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    monkeypatch.setitem(AcceleratorState._shared_state, "_cpu", False)
    assert _make_accelerator(device="cpu").device.type == "cpu"


def test_deepspeed_is_refused_before_it_is_imported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="`distributed_type` .* is DEEPSPEED; assets/accelerate/fsdp2.yaml"):
        _make_accelerator(device="cpu")


def test_shards_of_the_first_version_of_fsdp_are_refused(tmp_path):
    alone = _make_accelerator(device="cpu")

    class Sharded:
        distributed_type, is_fsdp2, state = DistributedType.FSDP, False, alone.state

        def __getattr__(self, name):
            return getattr(alone, name)

    with pytest.raises(ValueError, match="`fsdp_version` of Accelerate has to be 2"):
        fit(
            Toy(0.0),
            toy_batch,
            tmp_path,
            Stage("toy", ("guidance",), 1e-2, steps=2),
            progress=False,
            accelerator=Sharded(),
        )


def test_a_live_view_draws_what_it_has(tmp_path, monkeypatch):
    shown = []

    class Handle:
        def update(self, html):
            shown.append(html.data)

    monkeypatch.setattr("IPython.display.display", lambda html, display_id: shown.append(html.data) or Handle())
    view = LiveView(tmp_path, every=0)
    for record in run_toy(tmp_path, steps=2):
        view(record)
    (tmp_path / "strip-000002.png").write_bytes(b"strip")
    view.draw()
    assert [html.count("<img") for html in shown] == [1, 1, 2]


def test_a_stage_starts_from_a_trainers_checkpoint(tmp_path):
    golden = Path(__file__).parent / "golden/wan22"
    facts = json.loads((golden / "cases/cases.json").read_text())["model"]
    bases = dict(
        vae=golden / "base/Wan_VAE.safetensors",
        mllm=golden / "base/Qwen2.5-VL-tiny",
        transformer_config=dict(num_attention_heads=facts["heads"]),
        vae_config=json.loads((golden / "base/latents_mean_std.json").read_text()),
        max_object_token=facts["max_object_token"],
    )
    table = save_dataset(
        WorldDataset(dict(subject=1.0), 5, 64, 64, samples=2), tmp_path / "clips", format="csv", progress=False
    )
    stage = replace(find_stage("wan2.2-5b", "stage3-ref"), num_frames=5, max_pixels=64 * 64, steps=2, lr=1e-3)
    step = golden / "trainer/step-1.safetensors"
    assert (
        train(stage, tmp_path / "run", str(step), {"ref": table}, bases=bases, device="cpu", progress=False)["step"]
        == 2
    )
    before, after = load_trainer_checkpoint(step, **bases), KiwiEditPipeline.from_pretrained(tmp_path / "run/model")
    assert torch.equal(before.vae.encoder.conv_in.weight.bfloat16(), after.vae.encoder.conv_in.weight.bfloat16())
    moved = (after.guidance.ref_queries.float() - before.guidance.ref_queries).abs().max()
    assert 0 < moved < 0.05 and after.guidance.config.query_read_out == "last_positions"
    with pytest.raises(ValueError, match="`vae` has to name the base model"):
        train(stage, tmp_path / "other", str(step), {"ref": table}, bases={}, device="cpu", progress=False)


def test_the_rate_of_a_product_is_measured_in_the_format_that_the_device_multiplies(monkeypatch):
    formats = []
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *size, f=torch.randn, **options: formats.append(options.get("dtype")) or f(*size, **options),
    )
    for fast, format in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(kiwi_edit.train.engine, "multiplies_bfloat16", lambda device: fast)
        assert measure_flops("cpu", shape=(8, 16, 24)) > 0 and formats[-2:] == [format] * 2
