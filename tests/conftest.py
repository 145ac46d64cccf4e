"Differences to the official implementation, as the golden tests find them, in one table at the end of a run; and tests shared out to two processes."

import logging
import os
import sys
from functools import cache
from pathlib import Path

import pytest

FOUND = {}  # (case, quantity) -> largest relative difference
TAKEN = os.environ.get(
    "KIT_TESTS_TAKEN"
)  # folder in which processes that share the tests mark the files that they take; the second one begins at the end


@cache
def _mine(path):
    try:
        (Path(TAKEN) / path.stem).mkdir()
    except FileExistsError:
        return False
    return True


def pytest_collection_modifyitems(items):
    if TAKEN and os.environ.get("KIT_TESTS_SECOND"):
        items.sort(key=lambda item: item.path, reverse=True)  # stable, so within a file the order stays


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if TAKEN and not _mine(item.path):
        return True  # the other process runs it


def pytest_sessionfinish(session, exitstatus):
    session.config.verdict = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "Where tests are shared out, a process ends with the verdict of its tests, and not with what threads of libraries do while an interpreter goes down."
    if TAKEN and hasattr(config, "verdict"):
        config.get_terminal_writer().flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.verdict)


@pytest.fixture(scope="session")
def found():
    return FOUND


@pytest.fixture
def one_thread():
    "How sums are split among cores changes their last bit, and a busy machine splits them anew."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_settings(tmp_path, monkeypatch):
    "Outputs go to the test's folder; the command's logging ends with the test."
    from kiwi_edit.core import settings

    monkeypatch.setenv("KIWI_EDIT_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.setenv("KIWI_EDIT_DEVICE", "cpu")
    settings.cache_clear()
    yield
    settings.cache_clear()
    logging.getLogger("kiwi_edit").handlers.clear()
    logging.getLogger("kiwi_edit").setLevel(logging.NOTSET)


def pytest_terminal_summary(terminalreporter):
    if not FOUND:
        return
    quantities = list(dict.fromkeys(quantity for _, quantity in FOUND))
    terminalreporter.section("largest difference to the official implementation, relative to its largest value")
    width = max(len(case) for case, _ in FOUND)
    for case in dict.fromkeys(case for case, _ in FOUND):
        row = [f"{quantity} {FOUND[case, quantity]:.0e}" for quantity in quantities if (case, quantity) in FOUND]
        terminalreporter.write_line(f"{case:{width}}  " + ", ".join(row))
