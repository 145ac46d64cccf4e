"What several test files share: a small model, processes that start within a second, and disks that are full."

import contextlib
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


def small_sizes():
    "Sizes of a model with the kinds of layers that tiny has, and fewer of each."
    from kiwi_edit.core import preset

    sizes = preset("tiny")
    sizes.transformer.update(num_layers=1, num_attention_heads=2, attention_head_dim=32, ffn_dim=96)
    sizes.vae.update(base_dim=8, decoder_base_dim=8)
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    sizes.mllm["text_config"].update(text, intermediate_size=96)
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64)
    sizes.mllm["vision_config"].update(vision, fullatt_block_indexes=[1])
    sizes.guidance.update(hidden_size=64, dim=64)
    return sizes


# numbers of the official implementation
GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden"))

# one process imports what is slow to import, and the others are forked from it
CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
CONTEXT.set_forkserver_preload(["kiwi_edit.train.engine", "kiwi_edit.data.synthesis", "kiwi_edit.apps.cli"])


def _run(function, arguments, said, environment):
    os.environ.update(environment)
    for number, suffix in ((1, ".out"), (2, ".err")):
        with open(f"{said}{suffix}", "ab", buffering=0) as file:
            os.dup2(file.fileno(), number)
    function(*arguments)


def start(function, *arguments, said, **environment):
    "Run a function of a module in a process of its own; what it says goes to two files, `said`.out and `said`.err."
    for suffix in (".out", ".err"):
        Path(f"{said}{suffix}").touch()
    process = CONTEXT.Process(target=_run, args=(function, arguments, said, os.environ | environment))
    process.start()
    return process


def fork_workers():
    "From now on, worker processes that would start anew are forked from this one."
    multiprocessing.get_context = lambda kind=None, get=multiprocessing.get_context: get("fork")


def defined_in(notebook, module, cell):
    "What a cell of a notebook defines that is not exported, beside what the notebook's module has."
    from kiwi_edit.core import checkout

    names = dict(vars(module))
    cells = json.loads((checkout() / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    exec("".join(next(c["source"] for c in cells if c["id"] == cell)), names)
    return names


def wait_until(process, reached, seconds=300):
    "Wait until something is so or a process has ended."
    until = time.monotonic() + seconds
    while process.is_alive() and not reached() and time.monotonic() < until:
        time.sleep(0.01)


def kill_when(process, reached):
    "Kill a process as soon as something is so; its exit code."
    wait_until(process, reached)
    process.kill()
    process.join(10)
    return process.exitcode


def together(folder, function, *arguments, parts=2):
    "Run a function in processes that train together, as `torchrun` starts them; what they say."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(parts), DS_ACCELERATOR="cpu")
    said = Path(folder) / "said"
    processes = [
        start(function, *arguments, said=said, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(parts)
    ]
    try:
        # where one fails the others would wait for it
        while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.05)
        assert not any(process.exitcode for process in processes), Path(f"{said}.err").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    return Path(f"{said}.err").read_text()


@contextlib.contextmanager
def full_disk(size):
    "Within it, no file of this process may grow beyond so many bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
