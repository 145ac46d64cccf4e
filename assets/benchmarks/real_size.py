"""A model of the published size with random weights is written, loaded and edits a clip on this CPU.

    python assets/benchmarks/real_size.py

What it takes is measured beside what `edit_cost` of nbs/library/34_estimate.ipynb says. TMPDIR is where the model
lies, in twice the space of its weights. A CPU without circuits for bfloat16 multiplies it ten times slower than
float32. There each layer's weights are made float32 when their turn comes, and what comes out is rounded to bfloat16:
weights and activations take the memory of bfloat16, and an edit takes minutes.
"""

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
from accelerate import init_empty_weights
from diffusers.hooks import apply_group_offloading
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # also where somebody runs this file by its path
from cells import read_cells

from kiwi_edit.core import PRESETS, expect, multiplies_bfloat16, preset
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.eval.benchmark import describe_hardware
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train import estimate
from kiwi_edit.train.engine import measure_flops
from kiwi_edit.weights import checkpoints

CASES = dict(
    kit="the kit's layout",
    offload="group offload to disk",
    float8="the denoiser's layers in 8 bits",
    official="the released layout",
)
LIMIT = 12e9  # bytes of memory that the case `offload` should do with
CLIP, STEPS, SHARD = (5, 128, 128), 2, 10**9  # frames, height and width; denoising steps; bytes of a file


class Float32Products(TorchFunctionMode):
    "Within it, products of bfloat16 are computed in float32, with room for the weights of one layer."

    def __init__(self):
        super().__init__()
        self.room = torch.empty(0)  # new memory for each layer would take longer than the numbers in it

    def weight(self, x):
        if len(self.room) < x.numel():
            self.room = torch.empty(x.numel())
        return self.room[: x.numel()].view(x.shape).copy_(x)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        product, attention = name in ("linear", "conv2d", "conv3d"), name == "scaled_dot_product_attention"
        if not (product or attention) or next(iter((*args, *kwargs.values()))).dtype != torch.bfloat16:
            return function(*args, **kwargs)
        if product:
            args = args[0], self.weight(args[1]), *args[2:]
        larger = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
        return function(*tree_map(larger, args), **tree_map(larger, kwargs)).to(torch.bfloat16)


@contextmanager
def phase(name, found):
    "Seconds and most memory of a block, into a dict; a line of progress meanwhile."
    # `bytes` only the process can give back; `resident` has pages of mapped files too, which the system may drop
    status, most, done = Path("/proc/self/status"), 0, threading.Event()
    kilobytes = lambda key: int(status.read_text().split(f"{key}:")[1].split()[0])

    def watch():
        nonlocal most
        with tqdm(desc=name, bar_format="{desc}: {elapsed}{postfix}", mininterval=1) as bar:
            while not done.wait(0.02):
                most = max(most, kilobytes("RssAnon"))
                bar.set_postfix_str(f"{most / 1e6:.1f} GB at most", refresh=False)
                bar.update()

    Path("/proc/self/clear_refs").write_text("5")  # the most that was resident is counted anew
    watcher, began = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    sizes = dict(bytes=1024 * max(most, kilobytes("RssAnon")), resident=1024 * kilobytes("VmHWM"))
    found[name] = dict(seconds=seconds, **sizes)


def write_random(tensors, folder, size, name="diffusion_pytorch_model"):
    "What `checkpoints._save` does for tensors without memory: random numbers and norms of 1, one file after the other."
    folder.mkdir(parents=True, exist_ok=True)
    size = size if isinstance(size, int) and size > 10**12 else SHARD  # what is one file in a released folder stays one
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{name}{{suffix}}.safetensors", max_shard_size=size
    )
    block = torch.randn(999_983, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def numbers(key, shape):
        if key.endswith("gamma") or key.endswith("weight") and len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16)
        for piece in values.view(-1).split(len(block)):
            piece.copy_(block[: len(piece)])
        return values

    for file, names in tqdm(plan.filename_to_tensors.items(), desc=f"{folder.name}/{name}"):
        save_file({key: numbers(key, tensors[key].shape) for key in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def write_model(sizes, folder, layout):
    "A model folder of random bfloat16 weights, in the kit's layout or the released one."
    with init_empty_weights():
        pipe = KiwiEditPipeline.from_preset(sizes, make_tokenizer(["Make it blue."], 400))
    found = {}
    with phase("write", found):
        if layout == "official":
            with patch.object(checkpoints, "_save", write_random):
                checkpoints._write_official(pipe, folder)
            return found
        pipe.save_config(folder)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        pipe.processor.save_pretrained(folder / "processor")
        for part in ("transformer", "vae", "guidance"):
            getattr(pipe, part).save_config(folder / part)
            write_random(getattr(pipe, part).state_dict(), folder / part, SHARD)
        pipe.mllm.config.save_pretrained(folder / "mllm")
        write_random(checkpoints._tied(pipe.mllm), folder / "mllm", SHARD, "model")
    return found


def offload(pipe, folder):
    "Every part lies on disk, and a layer or block is read when its turn comes."
    cpu, parts = torch.device("cpu"), {"transformer": pipe.transformer, "vae": pipe.vae}
    parts |= dict(language=pipe.mllm.model.language_model, vision=pipe.mllm.model.visual)
    for name, part in parts.items():
        # the kit calls layers of the last three by themselves, which groups by blocks do not see
        how = dict(offload_type="block_level", num_blocks_per_group=1) if name == "transformer" else {}
        how = dict(offload_type="leaf_level") | how
        apply_group_offloading(part, onload_device=cpu, offload_to_disk_path=str(folder / name), **how)


def load_and_edit(case, folder, clip):
    "Seconds and memory of a case, in a process of its own, and how much its result varies."
    found, times = {}, []
    with phase("begin", found):
        pass  # the process with its libraries
    with phase("load", found):
        pipe = KiwiEditPipeline.from_pretrained(folder, torch_dtype="auto")
    if case == "float8":
        with phase("cast", found):
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    if case == "offload":
        with phase("offload", found):
            offload(pipe, folder / "offloaded")
    frames = np.random.default_rng(0).integers(0, 256, (*clip, 3), np.uint8)
    given = dict(video=frames, reference=PIL.Image.fromarray(frames[0]), generator=torch.Generator().manual_seed(0))

    def each(pipe, step, timestep, tensors):
        times.append(time.perf_counter())
        return {}

    with phase("edit", found), nullcontext() if multiplies_bfloat16("cpu") else Float32Products():
        pipe.set_progress_bar_config(disable=True)
        options = dict(num_inference_steps=STEPS, output_type="np", callback_on_step_end=each)
        result = pipe("Make it blue.", height=clip[1], width=clip[2], **given, **options).frames
    return found | dict(seconds_per_step=times[-1] - times[-2], varies=float(result.std()), shape=list(result.shape))


def answer(pipe, function, arguments):
    try:
        pipe.send(function(*arguments))
    except Exception as error:  # also what a layout says of a size that it cannot hold
        pipe.send(dict(failed=f"{type(error).__name__}: {error}"))


def in_child(function, *arguments):
    "What a function gives in a process of its own, which ends with it, whatever happens."
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(there, function, arguments))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        child.join()
        return dict(failed=f"its process ended with {child.exitcode}")
    finally:
        child.join(5)
        child.kill()
        child.join()


def try_size(sizes, cases=tuple(CASES), clip=None):
    "All cases of a size: what was measured, and what the dry run says of it."
    clip = clip or CLIP
    known = {name: value for name, value in vars(estimate).items() if not name.startswith("__")}
    said, found = read_cells("34_estimate", "costs", **known).edit_cost(sizes, *clip), {}
    weights = sum(said.weights.values())
    place, free = tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free
    rule = f"`TMPDIR` has to have {2.1 * weights / 1e9:.1f} GB free"
    expect(free > 2.1 * weights, f"{rule} but {place!r} has {free / 1e9:.1f} GB.")
    peaks = dict(kit={}, official={}, offload=dict(offload="group"), float8=dict(eight_bit=True))
    for layout in ("kit", "official"):
        wanted = [case for case in CASES if case in cases and (case == "official") == (layout == "official")]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="real-size-") as folder:
            written = in_child(write_model, sizes, Path(folder), layout)
            for case in wanted:
                print(f"{CASES[case]}:", flush=True)
                measured = written if "failed" in written else in_child(load_and_edit, case, Path(folder), clip)
                found[case] = written | measured | dict(said_bytes=said.peak(**peaks[case])[0])
    once = {name: flops for name, flops in said.flops.items() if "tiles" not in name}
    flops = sum(once.values()) + (STEPS - 1) * once["denoise"]  # what else an edit does comes to less than a twentieth
    about = dict(preset=sizes.name, weights=weights, clip=clip, steps=STEPS, limit=LIMIT, flops=flops)
    about |= dict(flops_per_second=measure_flops("cpu", torch.float32), hardware=describe_hardware(torch.device("cpu")))
    return about | dict(float32_products=not multiplies_bfloat16("cpu"), cases=found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("real_size.py", description="Try a size with random weights on this CPU.")
    parser.add_argument("--preset", choices=PRESETS, default="wan2.2-5b", help="the size [wan2.2-5b]")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which of the cases [all]")
    parser.add_argument(
        "--out", type=Path, default=Path("real_size.json"), help="for the numbers, beside those there [real_size.json]"
    )
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder is removed then too
    found = try_size(preset(given.preset), given.cases)
    before = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if before.get("preset") == given.preset:  # cases may be tried one by one
        found["cases"] = before["cases"] | found["cases"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    for case, numbers in found["cases"].items():
        print(f"{case}: {json.dumps(numbers)}")


if __name__ == "__main__":
    main()
