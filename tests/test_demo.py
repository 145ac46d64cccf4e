"""The page: through its own client, and in a browser where there is one."""
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio")

sys.path.insert(0, str(Path(__file__).parent))
from browser import Page, chromium  # noqa: E402
from test_cli import encode, one_error, picture, random_model  # noqa: E402, F401

from kiwi_edit import demo  # noqa: E402
from kiwi_edit.core import assets_dir  # noqa: E402
from kiwi_edit.files import Limits  # noqa: E402
from kiwi_edit.video import read_video, video_info, write_video  # noqa: E402


@pytest.fixture(scope="module")
def server(random_model):  # noqa: F811
    page = demo.launch("127.0.0.1", 0, random_model, block=False, say=lambda line: None)
    yield page
    page.close(verbose=False)


@pytest.fixture(scope="module")
def predict(server):
    "Press the button from a program: result, its kind, film strip, note."
    client = pytest.importorskip("gradio_client").Client(server.local_url, verbose=False)
    handle = pytest.importorskip("gradio_client").handle_file

    def run(video=None, image=None, instruction="make it snow", references=(), steps=1, seed=0):
        shown = [{"image": handle(str(r)), "caption": None} for r in references]
        clip, still, strip, note = client.predict(
            handle(str(video)) if video else None, handle(str(image)) if image else None, instruction, shown, steps, seed, api_name="/edit")
        kind = [part["visible"] for part in (clip, still)]
        result = clip["value"]["video"] if video and isinstance(clip["value"], dict) else (clip if video else still)["value"]
        return result, kind, strip, note

    return run


def refused(predict, *words, **arguments):
    with pytest.raises(Exception) as error:
        predict(**arguments)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    for word in words:
        assert word in message, message


def test_a_clip_is_edited(predict, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", picture(count=9), 10)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    result, kind, strip, note = predict(clip, references=[tmp_path / "red.png"])
    assert kind == [True, False]
    assert read_video(result).frames.shape == (5, 32, 40, 3) and video_info(result).fps == 10
    assert Image.open(strip).width > 300
    assert "5 frames of 40x32" in note and "Edited frames 0 to 4 of 9" in note
    other = predict(clip)[0]
    assert not np.array_equal(read_video(other).frames, read_video(result).frames), "the reference counts"


def test_an_image_is_edited(predict, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(60, 20)[0]).save(tmp_path / "photo.jpg", exif=exif)
    result, kind, _, note = predict(image=tmp_path / "photo.jpg")
    assert kind == [False, True] and Image.open(result).size == (20, 60) and "1 frame of 20x60" in note


def test_all_examples_can_be_edited(predict):
    examples = demo.sample_examples()
    assert len(examples) >= 4 and sum(bool(references) for *_, references in examples) >= 2
    for clip, image, instruction, references in examples[:2]:
        assert image is None and video_info(predict(clip, instruction=instruction, references=references or ())[0]).frames == 5


def test_errors_are_one_line_with_the_names_of_the_fields(predict, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", picture(), 10)
    refused(predict, "The clip is missing")
    refused(predict, "The instruction has to say what to edit", video=clip, instruction="  ")
    refused(predict, "The seed has to be from 0", video=clip, seed=-1)
    (tmp_path / "text.mp4").write_text("this is no video\n" * 20)
    refused(predict, "The clip has to be a video", video=tmp_path / "text.mp4")
    (tmp_path / "text.png").write_text("this is no image\n" * 20)
    refused(predict, "A reference has to be an image", video=clip, references=[tmp_path / "text.png"])
    assert predict(clip)[1] == [True, False], "and the page still works"


def test_the_model_is_loaded_once_and_only_when_needed(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(demo, "load_model", lambda model: loaded.append(model) or "pipe")
    load = demo.LazyPipeline(None, "some-model")
    assert not loaded and load() == load() == "pipe" and loaded == ["some-model"]


def test_unknown_models_and_taken_ports_are_refused_at_once(server):
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        demo.launch("127.0.0.1", 0, "no-such-model", block=False)
    with pytest.raises(ValueError, match="`port` has to be free but"):
        demo.launch("127.0.0.1", server.server_port, None, block=False)
    with pytest.raises(ValueError, match="`port` has to lie between"):
        demo.free_port("127.0.0.1", 70000)
    with pytest.raises(ValueError, match="`host` has to be an address of this machine"):
        demo.free_port("no.such.host.invalid", 0)


def test_it_talks_to_nobody(server):
    assert server.analytics_enabled is False and server.share is False and server.config["run_history"] is False
    fn = next(f for f in server.fns.values() if f.api_name == "edit")
    assert fn.concurrency_limit == 1


def test_the_note_promises_what_the_model_takes():
    text = demo.describe("some/folder/wan", Limits(max_frames=81, max_pixels=921600, size_multiple=32, steps=50))
    assert "**wan**" in text and "81 frames" in text and "960x960" in text and "drawn world" not in text
    assert "drawn world" in demo.describe("kiwi-edit-tiny", Limits(5, 4096, 8, 20))


@pytest.mark.skipif(not (assets_dir() / "kiwi-edit-tiny" / "model_index.json").is_file(), reason="the trained model is not there")
def test_the_page_of_the_bundled_model():
    page = demo.build_demo(model="kiwi-edit-tiny")
    text = next(block.value for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "**kiwi-edit-tiny** edits the first" in text and "drawn world" in text
    page.results.cleanup()


# in a browser


@pytest.fixture(scope="module")
def browser():
    "Playwright, where it and a Chromium are installed."
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium() is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as running:
        yield running


def test_example_and_button_in_a_browser(server, browser):
    page = Page(browser, server.local_url)
    page.click_example(1)
    page.set_steps(2)
    page.edit()
    source, note = page.wait_for_result()
    assert source and "5 frames of 256x256" in note
    page.instruct("")
    page.edit()
    assert "The instruction has to say what to edit" in page.wait_for_error()
    assert page.page.locator("#clip video").count() == 1, "the inputs are kept"
    page.open_tab("Image")
    page.upload("image", assets_dir() / "samples" / "reference.png")
    page.page.wait_for_selector("#image img")
    page.instruct("make it snow")
    page.edit()
    page.wait_for_result("image")
    assert page.page.locator("#clip video").count() == 0, "there is one source"
    page.click_example(0)
    assert page.page.locator("#clip").is_visible(), "an example opens its tab"
    assert page.foreign == [] and page.faults == []
    page.close()


@pytest.mark.skipif(not (assets_dir() / "kiwi-edit-tiny" / "fast" / "config.json").is_file(), reason="the few-step weights are not there")
def test_the_switch_for_fewer_steps(tmp_path):
    page = demo.build_demo(model="kiwi-edit-tiny")
    box = next(block for block in page.blocks.values() if isinstance(block, gr.Checkbox))
    assert box.visible and "1 step" in box.info
    load = demo.LazyPipeline(model="kiwi-edit-tiny")
    assert load.limits().fast_steps == 1
    edit, clip = demo.make_editor(load, tmp_path / "results"), write_video(tmp_path / "clip.mp4", picture(count=5), 10)
    def run(fast): return read_video(edit(str(clip), None, "make it snow", [], 4, 0, fast, progress=lambda *args, **kwargs: None)[0]["value"]).frames
    plain, fast = run(False), run(True)
    assert plain.shape == fast.shape and not np.array_equal(plain, fast) and np.array_equal(run(False), plain)
    assert load(True).config.default_steps == 1 and load(True).vae is load(False).vae
    with pytest.raises(ValueError, match="`fast` has to be off for a pipeline that was handed in"): demo.LazyPipeline(load(False), "kiwi-edit-tiny")(True)
    page.results.cleanup()
