"Differences to the official implementation, as the golden tests find them, in one table at the end of a run."

import logging

import pytest

FOUND = {}  # (case, quantity) -> largest relative difference


def pytest_sessionfinish(session):
    "A process that shares the tests with others tells the first one what it has found."
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["found"] = [[*key, value] for key, value in FOUND.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    FOUND.update(
        {(case, quantity): value for case, quantity, value in getattr(node, "workeroutput", {}).get("found", ())}
    )


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
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("kiwi_edit")]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    "Folder of a model of the tiny sizes that has learnt nothing."
    import torch

    from kiwi_edit.core import preset
    from kiwi_edit.encoder import make_tokenizer
    from kiwi_edit.pipeline import KiwiEditPipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "random-tiny"
    KiwiEditPipeline.from_preset(preset("tiny"), make_tokenizer(["make it snow"], vocab_size=512)).save_pretrained(
        folder
    )
    return folder


def pytest_terminal_summary(terminalreporter):
    if not FOUND:
        return
    quantities = list(dict.fromkeys(quantity for _, quantity in FOUND))
    terminalreporter.section("largest difference to the official implementation, relative to its largest value")
    width = max(len(case) for case, _ in FOUND)
    for case in dict.fromkeys(case for case, _ in FOUND):
        row = [f"{quantity} {FOUND[case, quantity]:.0e}" for quantity in quantities if (case, quantity) in FOUND]
        terminalreporter.write_line(f"{case:{width}}  " + ", ".join(row))
