"What several test files share: processes that start within a second, and disks that are full."

import contextlib
import multiprocessing
import os
import socket
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

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
