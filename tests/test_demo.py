"""The page: through its own client, by raw requests as strangers send them, and in a browser where there is one."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
import httpx  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from browser import ARGUMENTS, ROOT, Page, chromium, why_no_browser  # noqa: E402
from test_cli import picture  # noqa: E402

from kiwi_edit.apps import demo  # noqa: E402
from kiwi_edit.core import asset, settings  # noqa: E402
from kiwi_edit.data.files import Limits  # noqa: E402
from kiwi_edit.video import read_video, video_info, write_video  # noqa: E402


@pytest.fixture(scope="module")
def server(random_model):
    patch = pytest.MonkeyPatch()
    patch.setenv("KIWI_EDIT_DEVICE", "cpu")
    settings.cache_clear()
    patch.setattr(demo, "_UPLOAD_SIZE", "2mb")
    page = demo.launch("127.0.0.1", 0, random_model, block=False, say=lambda line: None)
    yield page
    demo.close(page)
    patch.undo()
    settings.cache_clear()


@pytest.fixture(scope="module")
def client(server):
    found = gradio_client.Client(server.local_url, verbose=False)
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A clip, and two references."
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (20, 30), "red").save(folder / "red.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "blue.png")
    write_video(folder / "clip.mp4", picture(count=9), 10)
    return folder


REST = None, False, None, 1, 1, 1, 1  # mask, LoRA, tries and scales that are off


def arguments(video=None, image=None, instruction="make it snow", references=(), steps=1, seed=0, **more):
    handle = gradio_client.handle_file
    return dict(
        video=handle(str(video)) if video else None,
        image=handle(str(image)) if image else None,
        instruction=instruction,
        references=[{"image": handle(str(r)), "caption": None} for r in references],
        steps=steps,
        seed=seed,
        **more,
    )


@pytest.fixture(scope="module")
def predict(client):
    "Press the button from a program: result, its kind, film strip, note."

    def run(**given):
        clip, still, strip, note = client.predict(**arguments(**given), api_name="/edit")
        kind = [part["visible"] for part in (clip, still)]
        result = (clip if given.get("video") else still)["value"]
        return result["video"] if isinstance(result, dict) else result, kind, strip, note

    return run


def refused(predict, *words, **given):
    with pytest.raises(Exception) as error:
        predict(**given)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message and "/tmp" not in message
    for word in words:
        assert word in message, message


# the edit


def test_every_endpoint_has_a_name_and_documented_arguments(client):
    found = client.view_api(return_format="dict")["named_endpoints"]
    assert set(found) == set("/edit /cancel /frame /look /take_away /versus /pairs /open_set /funnel /judge".split())
    for name, endpoint in found.items():
        assert len(endpoint["description"]) > 20, name
        for argument in endpoint["parameters"]:
            assert argument["label"] and not argument["label"].startswith("parameter_"), (name, argument)
            if name not in ("/funnel",):
                assert argument["parameter_name"] in endpoint["description"] or name in (
                    "/look",
                    "/take_away",
                    "/versus",
                ), (name, argument["parameter_name"])


def test_a_clip_is_edited_and_the_reference_counts(predict, files):
    result, kind, strip, note = predict(video=files / "clip.mp4", references=[files / "red.png"])
    assert kind == [True, False]
    assert read_video(result).frames.shape == (5, 32, 40, 3) and video_info(result).fps == 10
    assert Image.open(strip).width > 300
    assert "5 frames of 40x32" in note and "Edited frames 0 to 4 of 9" in note
    other = predict(video=files / "clip.mp4", references=[files / "red.png", files / "blue.png"])[0]
    assert not np.array_equal(read_video(other).frames, read_video(result).frames), "the reference counts"
    exact, near = (
        read_video(predict(video=files / "clip.mp4", steps=3, approximate=names)[0]).frames
        for names in ([], ["fewer steps"])
    )
    assert not np.array_equal(exact, near) and np.abs(exact.astype(int) - near).mean() < 64, "another solver"


def test_an_image_is_edited(predict, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(60, 20)[0]).save(tmp_path / "photo.jpg", exif=exif)
    result, kind, _, note = predict(image=tmp_path / "photo.jpg", size="32x32")
    assert kind == [False, True] and Image.open(result).size == (20, 60) and "1 frame of 20x60, edited at 32x32" in note


def test_all_examples_can_be_edited(predict):
    examples = demo._sample_examples()
    assert len(examples) >= 4 and sum(bool(references) for *_, references in examples) >= 2
    clip, image, instruction, references = examples[0]
    assert (
        image is None
        and video_info(predict(video=clip, instruction=instruction, references=references or ())[0]).frames == 5
    )
    assert all(Path(row[0]).is_file() and all(Path(r).is_file() for r in row[3] or []) for row in examples)


def test_errors_are_one_line_with_the_names_of_the_fields(predict, files, tmp_path):
    clip = files / "clip.mp4"
    refused(predict, "The clip has to be there first")
    refused(predict, "The instruction has to say what to edit", video=clip, instruction="  ")
    refused(predict, "The seed has to be a whole number from 0", video=clip, seed=-1)
    refused(predict, "The seed has to be a whole number from 0 to", "but is empty", video=clip, seed=None)
    refused(predict, "The size has to be WIDTHxHEIGHT", video=clip, size="<b>big</b>")
    (tmp_path / "text.mp4").write_text("this is no video\n" * 20)
    refused(predict, "The clip has to be a video", video=tmp_path / "text.mp4")
    (tmp_path / "text.png").write_text("this is no image\n" * 20)
    refused(predict, "A reference has to be an image", video=clip, references=[tmp_path / "text.png"])
    refused(predict, "A picture has to be an image", image=tmp_path / "text.png")
    with zipfile.ZipFile(tmp_path / "archive.mp4", "w") as archive:
        archive.writestr("a.txt", "a" * 1000)
    refused(predict, "The clip has to be a video", video=tmp_path / "archive.mp4")
    assert predict(video=clip, instruction="<script>alert(1)</script> <img src=x onerror=alert(2)>")[1] == [
        True,
        False,
    ], "and the page still works"


def test_the_files_of_a_phone(predict, tmp_path):
    cases = Path(__file__).parent / "cases"
    refused(predict, "The clip has to be a video or an image", "'grid.heic' is a HEIF photo", video=cases / "grid.heic")
    refused(predict, "A picture has to be an image", image=cases / "grid.heic")
    assert read_video(predict(video=cases / "hlg.mov")[0]).frames.shape == (5, 96, 128, 3)
    assert Image.open(predict(image=cases / "exif_neg.jpg")[0]).size == (96, 128)
    two_minutes = write_video(tmp_path / "long.mp4", np.zeros((6, 2160, 3840, 3), np.uint8), 0.05)
    assert video_info(predict(video=two_minutes)[0]).width == 3840
    refused(
        predict,
        "The clip has to be at most 120 s long but is 140 s",
        video=write_video(tmp_path / "longer.mp4", np.zeros((7, 32, 32, 3), np.uint8), 0.05),
    )


def test_frames_of_odd_sizes_are_compared(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 49, 63, 3), np.uint8)
    Image.fromarray(frames[0]).save(tmp_path / "odd.gif", save_all=True, append_images=[Image.fromarray(frames[1])])
    edit = demo._Edit(str(tmp_path / "odd.gif"), str(write_video(tmp_path / "odd.mp4", frames, 10)), [], "", 2, "")
    before, after = demo._frame_pair(edit, 1)
    assert before.shape == after.shape == (49, 63, 3) and demo._difference_map(before, after)[0].shape == before.shape


def test_frames_appear_and_the_time_that_is_left(client, files):
    seen = list(client.submit(**arguments(video=files / "clip.mp4", steps=8), api_name="/edit"))
    notes, pictures = [step[3] for step in seen], [step[2] for step in seen]
    assert any("step 3 of 8, about" in str(note) for note in notes), notes
    previews = [p for p in pictures if isinstance(p, str) and Image.open(p).size == (5 * 96, 80)] or [
        p for p in pictures if isinstance(p, str)
    ]
    assert len(set(previews)) >= 2, "at least one preview before the film strip"


def test_an_edit_can_be_cancelled_and_others_wait_for_their_turn(server, client, predict, files):
    "One place on the device: the second waits, a queue that is full says so, and cancelling lets all go on."
    running = client.submit(**arguments(video=files / "clip.mp4", steps=100), api_name="/edit")
    other = gradio_client.Client(server.local_url, verbose=False)
    deadline = time.time() + 60
    while not any("step 2 of" in str(step) for step in running.outputs()):
        assert time.time() < deadline
        time.sleep(0.05)
    waiting = other.submit(**arguments(video=files / "clip.mp4"), api_name="/edit")
    while waiting.status().code.name not in ("IN_QUEUE",):
        assert time.time() < deadline
        time.sleep(0.05)
    number = next(i for i, f in server.fns.items() if f.api_name == "edit")

    def join(k):
        return httpx.post(
            f"{server.local_api_url}queue/join",
            json=dict(
                data=[None, None, "x", [], 1, 0, "", None, None, *REST], fn_index=number, session_hash=f"stranger{k}"
            ),
            timeout=60,
        ).status_code

    codes = [join(k) for k in range(20)]
    assert codes.count(200) == 15 and set(codes) == {200, 503}, codes  # with the one that waits they are 16
    began = time.time()
    httpx.post(
        f"{server.local_api_url}run/cancel", json=dict(data=[], session_hash=client.session_hash)
    ).raise_for_status()  # as the browser does, past the queue
    with pytest.raises(Exception, match="The edit was cancelled"):
        running.result(timeout=60)
    assert time.time() - began < 30
    assert "edited at" in waiting.result(timeout=120)[3]
    other.close()
    while len(server._queue):
        assert time.time() < began + 120
        time.sleep(0.1)
    assert "edited at" in predict(video=files / "clip.mp4")[3]


def test_what_is_taken_home(client, predict, files, tmp_path, monkeypatch, random_model):
    "The call as Python makes the same clip; frame, GIF and archive hold it too."
    result = predict(video=files / "clip.mp4", references=[files / "red.png"], seed=3, steps=2)[0]
    (before, after), heat, text = client.predict(number=5, api_name="/frame")
    assert np.array_equal(np.asarray(Image.open(after).convert("RGB")), read_video(result).frames[4])
    assert Image.open(before).size == Image.open(heat).size == (40, 32) and "levels of 255" in text
    monkeypatch.chdir(files)
    call = demo._call_as_python(
        str(random_model),
        str(files / "clip.mp4"),
        "make it snow",
        [str(files / "red.png")],
        str(tmp_path / "again.mp4"),
        seed=3,
        steps=2,
        size=None,
    )
    exec(compile(call, "edit.py", "exec"), {})
    assert np.array_equal(read_video(tmp_path / "again.mp4").frames, read_video(result).frames)
    made = demo._make_downloads(
        demo._Edit(str(files / "clip.mp4"), str(tmp_path / "again.mp4"), [], "make it snow", 5, call)
    )
    assert [Path(f).name for f in made] == ["again.mp4", "again.gif", "frames.zip", "edit.py"]
    with zipfile.ZipFile(made[2]) as archive, archive.open("frame-0004.png") as frame:
        assert np.array_equal(np.asarray(Image.open(frame)), read_video(result).frames[4])
    assert read_video(made[1]).frames.shape == (5, 32, 40, 3)


# what else an edit may be told


def drawing(box=None, size=(40, 32), folder=None):
    "What the editor sends: the frame, and a layer that is painted in a box."
    layer = Image.new("RGBA", size)
    if box:
        layer.paste((240, 83, 45, 255), box)
    paths = folder / "frame.png", folder / "layer.png"
    Image.new("RGB", size).save(paths[0])
    layer.save(paths[1])
    frame, painted = (gradio_client.handle_file(str(path)) for path in paths)
    return dict(background=frame, layers=[painted], composite=frame)


def test_what_is_painted_may_change(predict, files, tmp_path, monkeypatch):
    clip, frame = files / "clip.mp4", tmp_path / "source.png"
    Image.fromarray(picture(40, 32)[0]).save(frame)
    made = []
    monkeypatch.setattr(demo, "_call_as_python", lambda *a, **k: made.append(k) or "")
    size, painted = Image.open(frame).size, drawing((0, 0, 20, 32), Image.open(frame).size, tmp_path)
    edited = np.asarray(Image.open(predict(image=frame, mask=painted)[0]).convert("RGB"))
    apart = np.abs(edited.astype(int) - np.asarray(Image.open(frame).convert("RGB"))).max(-1)
    assert edited.shape[1::-1] == size and apart[:, 20:].max() == 0 < apart[:, :20].mean()
    predict(video=clip, mask=drawing((0, 0, 20, 32), folder=tmp_path), follow=True)
    assert [k["mask"].name for k in made] == ["mask.png"] * 2 and [k["follow"] for k in made] == [False, True]
    plain = read_video(predict(video=clip)[0]).frames
    empty = read_video(predict(video=clip, mask=drawing(folder=tmp_path))[0]).frames
    assert np.array_equal(plain, empty), "nothing painted is no mask"
    refused(predict, "The mask has to be painted before it can be followed", video=clip, follow=True)
    given = dict(video=clip, mask=drawing((0, 0, 9, 9), (32, 64), folder=tmp_path))
    refused(predict, "The mask has to have the shape of the source, which is 40x32", **given)
    given["mask"] = dict(background=None, layers=[], composite=None)
    refused(predict, "The mask has to be painted anew", **given)


def test_drawings_in_memory_are_few_and_moderate(server):
    editor = next(block for block in server.blocks.values() if isinstance(block, gr.ImageEditor))

    def send(name, index="0", picture=b"x"):
        data = dict(session_hash="s", component_id=editor._id, fn_name="accept_blobs", id=name, type="layer")
        sent = dict(data=data | dict(index=index), files=dict(file=("layer.png", picture)))
        return httpx.post(f"{server.local_api_url}component_server", **sent).status_code

    assert {send(f"drawing {n}") for n in range(40)} == {200} and len(editor.blob_storage) == 32
    assert send("enormous", picture=b"x" * (demo._UPLOAD_SIZE == "2mb" and 2**22)) >= 400 <= send("many", "99999999999")
    assert len(editor.blob_storage) == 32
    editor.blob_storage.clear()


@pytest.fixture(scope="module")
def lora(random_model, files):
    "A LoRA that PEFT has made for the random model."
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    from kiwi_edit.data.files import load_model

    wan = load_model(random_model, "cpu").transformer
    wan.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(wan)
    save_file({f"transformer.{name}": tensor for name, tensor in weights.items()}, files / "style.safetensors")
    return files / "style.safetensors"


def test_a_lora_is_there_for_one_edit(predict, files, lora):
    from safetensors.torch import load_file, save_file

    handle, clip = (lambda path: gradio_client.handle_file(str(path))), files / "clip.mp4"
    edited = lambda **given: read_video(predict(video=clip, **given)[0]).frames
    plain, styled = edited(), edited(lora=handle(lora))
    assert not np.array_equal(plain, styled)
    assert np.array_equal(edited(), plain) and np.array_equal(edited(lora=handle(lora), lora_scale=0), plain)
    weights = load_file(lora)
    first = next(name for name in weights if "lora_A" in name)
    save_file(weights | {first: weights[first][:1].contiguous()}, files / "rank.safetensors")
    refused(predict, "The LoRA has to be a LoRA of this model", video=clip, lora=handle(files / "rank.safetensors"))
    (files / "half.safetensors").write_bytes(lora.read_bytes()[:-100])
    refused(predict, "The LoRA has to be", "'half.safetensors'", video=clip, lora=handle(files / "half.safetensors"))
    refused(predict, "The LoRA has to have a scale of 0 or more", video=clip, lora=handle(lora), lora_scale=-1)
    refused(predict, "Invalid file type", video=clip, lora=handle(clip))
    assert np.array_equal(edited(), plain), "and the model is as it was"


def test_several_tries_and_a_pick(server, predict, random_model, files):
    clip, _, sheet, note = predict(video=files / "clip.mp4", seeds=3, seed=5)
    assert "of 5" in note and "ontact sheet" in note and Image.open(sheet).height > 400
    listen = {fn.name: fn.fn for fn in server.fns.values()}
    edits = list(
        demo._make_editor(demo._LazyPipeline(None, str(random_model)), server.visitors)(
            str(files / "clip.mp4"), None, "make it snow", [], 1, 5, seeds=3
        )
    )
    last = edits[-1][-1]
    assert [one.label.split(",")[0] for one in last.tries] == ["seed 5", "seed 6", "seed 7"]
    *_, picked = listen["pick"](last, type("Event", (), dict(index=2)))
    assert "seed=7" in picked.call and picked.tries == last.tries and picked.edited.endswith("edited-7.mp4")
    alone = predict(video=files / "clip.mp4", seed=7)[0]
    assert np.array_equal(read_video(picked.edited).frames, read_video(alone).frames)
    refused(predict, "maximum value", video=files / "clip.mp4", seeds=9)


def test_scales(predict, files):
    clip, red = files / "clip.mp4", files / "red.png"
    plain, same, less, more = (
        read_video(predict(video=clip, references=[red], **scales)[0]).frames
        for scales in ({}, dict(reference_scale=None), dict(reference_scale=0), dict(guidance_scale=2))
    )
    assert np.array_equal(plain, same) and not np.array_equal(plain, less) and not np.array_equal(plain, more)
    refused(predict, "The reference scale has to be a number from 0", "is -1", video=clip, reference_scale=-1)
    refused(predict, "The guidance scale has to be a number from 1", "is 0.5", video=clip, guidance_scale=0.5)


def test_ways_to_say_it(server):
    ways = next(fn.fn for fn in server.fns.values() if fn.name == "ways")
    shown, hints = ways("make the car red", [])
    assert shown.raw_samples[0] == ["Make the car red."] and "One sentence" in hints
    assert len(ways("", None)[0].raw_samples) == 6 and "the reference image" in ways("", ["x.png"])[0].raw_samples[0][0]


def test_the_call_tells_what_is_not_as_usual():
    options = dict(steps=4, seed=0, size=None, mask=Path("x/mask.png"), follow=True, guidance_scale=1)
    files = "clip.mp4", "make it snow", [], "edited.mp4"
    call = demo._call_as_python("m", *files, loras=[("x/a.safetensors", 0.5)], reference_scale=0.5, **options)
    assert "load_model('m', loras=[('a.safetensors', 0.5)])" in call
    assert "out='edited.mp4', reference_scale=0.5, steps=4, seed=0, mask='mask.png', follow=True)" in call


# what it opens with


@pytest.fixture(scope="module")
def tiny():
    from kiwi_edit.data.files import load_model

    return load_model("kiwi-edit-tiny", "cpu")


def test_the_result_that_was_made_beforehand_is_the_models(tiny, tmp_path):
    from kiwi_edit.data.files import edit_file

    opening = demo._opening_edit()
    done = edit_file(
        tiny, opening.source, opening.instruction, opening.references, out=tmp_path / "again.mp4", steps=1, seed=0
    )
    shipped, made = (read_video(path).frames.astype(float) for path in (opening.edited, done.path))
    assert done.frames == opening.frames and np.abs(shipped - made).mean() < 1, "run assets/demo/prepare.py"
    clip = tmp_path / "edit.mp4"
    assert opening.call.count("steps=1, seed=0") == 1 and compile(opening.call, str(clip), "exec")


def test_every_tab_opens_with_the_example(server):
    fields = {block.elem_id: block for block in server.blocks.values() if getattr(block, "elem_id", None)}
    opening = demo._opening_edit()
    for name in ("clip", "references", "result", "strip", "wipe", "heat", "downloads"):
        assert fields[name].value, name
    for name in ("guidance-picture", "other", "judge-source", "judge-edited", "judge-reference"):
        assert fields[name].value, name
    assert fields["instruction"].value == fields["judge-instruction"].value == opening.instruction
    assert opening.instruction in fields["guidance-text"].value and "self-attention" in fields["guidance-text"].value
    assert "of 5, by metrics" in fields["judgement"].value
    assert "of 6" in fields["kept"].value and fields["sheets"].value.count("<figure") == 6
    assert "6 of 6 left" in fields["funnel"].value
    assert sum(path.stat().st_size for path in asset("demo").rglob("*")) < 500_000


def test_the_card_is_a_page_of_its_own(server):
    answer = httpx.get(f"{server.local_url}card")
    assert answer.status_code == 200
    text = demo._card()
    assert "](../" not in text and "data:image/png" in text and "Benchmark" in text


# the other tabs


def test_guidance(client, files):
    given = arguments(video=files / "clip.mp4", references=[files / "red.png"])
    shown, text = client.predict(**given, api_name="/look")
    assert Image.open(shown).width > 400 and "self-attention" in text
    shown, text = client.predict(**given, away="the reference", api_name="/take_away")
    assert "Without the reference the result is" in text and " is 0.0 levels" not in text
    shown, text = client.predict(**given, other=gradio_client.handle_file(str(files / "blue.png")), api_name="/versus")
    assert "the second" in text and Image.open(shown).width > 300
    with pytest.raises(Exception, match="A reference has to be there before it can be taken away"):
        client.predict(**arguments(video=files / "clip.mp4"), away="the reference", api_name="/take_away")


def test_data(client, tmp_path):
    kept, bars, sheets, *least = client.predict(number=4, first_seed=0, api_name="/pairs")
    assert sheets.count("<figure") == 4 and "data:image/jpeg" in sheets and least == [0.5, 0.3, 4, 3]
    result = demo._world_set(tmp_path, 4)
    for chosen in (least, [0, 0, 0, 0], [1, 1, 10, 10]):
        left = result.funnel(dict(zip(demo._THRESHOLDS, chosen)))
        line, moved = client.predict(*chosen, api_name="/funnel")
        assert line.startswith(f"**{left['deduplicate']} of 4**") and all(
            f"{stage}: {n} of 4 left" in moved for stage, n in left.items()
        )
    assert result.funnel({"score.edit": 0.5})["score"] < 4 == result.funnel()["score"], (
        "a spoilt pair falls below the threshold"
    )
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict("../../etc", api_name="/open_set")


def test_data_sets_of_the_data_folder(tmp_path, monkeypatch):
    from kiwi_edit.data.synthesis import WorldPairs, synthesize

    monkeypatch.setenv("KIWI_EDIT_DATA_DIR", str(tmp_path))
    settings.cache_clear()
    synthesize(WorldPairs(2, 40), tmp_path / "few", progress=False)
    assert list(demo._data_sets()) == ["few"]
    result = demo._read_set("few")
    assert demo._set_html(result).count("<figure") == 2 and demo._funnel_html(result).count("of 2") >= 2
    with pytest.raises(ValueError, match="`folder` has to be of few but is '../few'"):
        demo._read_set("../few")


def test_judge(client, files, predict):
    result = predict(video=files / "clip.mp4")[0]
    handle = lambda path: gradio_client.handle_file(str(path))
    text = client.predict(
        source=handle(files / "clip.mp4"),
        edited=handle(result),
        reference=handle(files / "red.png"),
        instruction="make it snow",
        kind="a background from the reference",
        api_name="/judge",
    )
    assert (
        "of 5, by metrics (no model)" in text
        and "Matting Quality" in text
        and "share of the pixels that the edit touches" in text
        and "No model has looked" in text
    )
    with pytest.raises(Exception, match="take the last edit"):
        client.predict(source=None, edited=None, reference=None, api_name="/judge")
    (files / "no.mp4").write_text("no video at all")
    with pytest.raises(Exception, match="The clip has to be a video"):
        client.predict(source=handle(files / "no.mp4"), edited=handle(result), reference=None, api_name="/judge")


def test_a_configured_judge_is_asked(monkeypatch, files):
    "A local server that speaks the protocol."
    pytest.importorskip("openai")
    from test_backends import Server, openai_reply

    judge = Server(
        openai_reply,
        ["Fine.\nInstruction Compliance: 4\nVisual Quality & Stability: 5\nConsistency & Detail Fidelity: 3"],
    )
    name = f"openai:tiny@http://127.0.0.1:{judge.server_port}/v1"
    monkeypatch.setenv("KIWI_EDIT_JUDGE", name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
    settings.cache_clear()
    assert demo._judge_names() == [demo._METRICS, name]
    text = demo._judge_edit(
        name, "any edit", str(files / "clip.mp4"), str(files / "clip.mp4"), None, "make <b>snow</b>"
    )
    assert "3.67 of 5" in text and "some were lowered" in text and len(judge.asked) == 1
    judge.shutdown()
    judge.server_close()


# strangers


def test_no_file_outside_is_served_or_read(server, files):
    "Paths in addresses and in what is sent."
    url = server.local_api_url
    secret = files / "secret.txt"
    secret.write_text("hidden words")
    for path in (
        "/etc/passwd",
        str(secret),
        "../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        str(demo._UPLOADS / ".." / ".." / "etc" / "passwd"),
        os.path.join(os.getcwd(), "settings.ini"),
        server.visitors.root.name,
    ):
        answer = httpx.get(f"{url}file={path}")
        assert answer.status_code in (403, 404) and "hidden words" not in answer.text and "root:" not in answer.text, (
            path
        )
    number = next(i for i, f in server.fns.items() if f.api_name == "edit")

    def ask(value):
        httpx.post(
            f"{url}queue/join",
            json=dict(
                data=[value, None, "x", [], 1, 0, "", None, None, *REST], fn_index=number, session_hash="../../stranger"
            ),
            timeout=60,
        ).raise_for_status()
        with httpx.stream("GET", f"{url}queue/data", params=dict(session_hash="../../stranger"), timeout=60) as stream:
            return next(json.loads(line[6:]) for line in stream.iter_lines() if "process_completed" in line)

    clip = dict(meta={"_type": "gradio.FileData"})
    for path in (str(files / "clip.mp4"), "/etc/passwd", "http://127.0.0.1:1/clip.mp4"):
        answer = ask(clip | dict(path=path))
        assert answer["success"] is False and "Traceback" not in json.dumps(answer), path
    assert "A file has to be uploaded" in answer["output"]["error"]
    assert server.visitors.place("../../stranger").parent == Path(server.visitors.root.name)


def folder_size(folder):
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def test_uploads_that_are_too_large_or_never_end(server):
    "The server stops reading, and nothing stays."
    before = folder_size(demo._UPLOADS)
    answer = httpx.post(f"{server.local_api_url}upload", files=dict(files=("big.mp4", b"x" * 3_000_000)))
    assert answer.status_code == 413
    sent, host = 0, ("127.0.0.1", server.server_port)
    with socket.create_connection(host, timeout=20) as connection:
        head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n"
        part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="endless.mp4"\r\nContent-Type: video/mp4\r\n\r\n'
        connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(part), part))
        chunk = b"x" * 65536
        while sent < 50_000_000 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            sent += len(chunk)
        answer = connection.recv(1000)
    assert b" 413 " in answer.split(b"\r\n")[0] and sent < 50_000_000, "the answer comes while more is sent"
    assert folder_size(demo._UPLOADS) - before < 1000


def test_more_than_the_page_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_LONGEST", 0.5)
    monkeypatch.setattr(demo, "_LARGEST", 1000)
    clip = write_video(tmp_path / "clip.mp4", picture(count=9), 10)
    with pytest.raises(ValueError, match="at most 0.5 s long"):
        demo._check_source(clip)
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="million pixels but has 40x30"):
        demo._check_references([tmp_path / "large.png"])
    with pytest.raises(ValueError, match="at most 8 but are 9"):
        demo._check_references([tmp_path / "large.png"] * 9)


def test_what_a_killed_process_has_left_is_cleared(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (tmp_path / f"kiwi-edit-page-{pid}-x" / "somebody").mkdir(parents=True)
    (tmp_path / "kiwi-edit-page-of-a-book").mkdir()
    demo._sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"kiwi-edit-page-{os.getpid()}-x", "kiwi-edit-page-of-a-book"]


def test_a_worker_that_fails_leaves_a_message_and_the_page_goes_on(server, client, predict, files, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr(demo, "run_edit", full)
    refused(predict, "which is full", video=files / "clip.mp4")

    def broken(*args, **kwargs):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(demo, "run_edit", broken)
    refused(predict, "There is a fault in the kit (RuntimeError)", video=files / "clip.mp4")
    monkeypatch.undo()
    assert "edited at" in predict(video=files / "clip.mp4")[3]


def test_who_leaves_takes_his_files_along(server, files):
    visitor = gradio_client.Client(server.local_url, verbose=False)
    visitor.predict(**arguments(video=files / "clip.mp4"), api_name="/edit")
    folder = server.visitors.place(visitor.session_hash)
    assert list(folder.glob("*/edited.mp4"))
    visitor.close()
    deadline = time.time() + 40
    while folder.exists():
        assert time.time() < deadline
        time.sleep(0.1)


def test_old_uploads_go(server):
    old, new = demo._UPLOADS / "x" / "old.mp4", demo._UPLOADS / "x" / "new.mp4"
    old.parent.mkdir(parents=True, exist_ok=True)
    for file in (old, new):
        file.write_bytes(b"x")
    for path in [old, *server.visitors.kept]:
        os.utime(path, (0, 0))
    server.visitors.tidy()
    assert (
        not old.exists()
        and new.exists()
        and server.visitors.kept
        and all(Path(path).exists() for path in server.visitors.kept)
    )


def test_who_leaves_stops_the_edit(tmp_path):
    stop, ended = threading.Event(), threading.Event()

    def job(tell):
        while not stop.wait(0.01):
            tell(1)
        ended.set()

    steps = demo._running(job, stop)
    assert next(steps) == 1
    steps.close()
    assert ended.is_set()


# the model


def test_the_model_is_loaded_once_and_only_when_needed(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(demo, "load_model", lambda model: loaded.append(model) or f"pipe of {model}")
    monkeypatch.setattr(demo, "find_model", lambda model: Path(model))
    load = demo._LazyPipeline(None, "some-model", any_model=True)
    assert not loaded and load() == load() == "pipe of some-model" and loaded == ["some-model"]
    assert load(model="another") == load() == "pipe of another" and loaded == ["some-model", "another"], (
        "the other one took its place"
    )
    with pytest.raises(ValueError, match="`model` has to be of the page's list, some-model, but is 'another'"):
        demo._LazyPipeline(None, "some-model")(model="another")


def test_unknown_models_and_taken_ports_are_refused_at_once(server):
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        demo.launch("127.0.0.1", 0, "no-such-model", block=False)
    with pytest.raises(ValueError, match="`port` has to be free"):
        demo.launch("127.0.0.1", server.server_port, None, block=False)
    with pytest.raises(ValueError, match="`port` has to lie between"):
        demo._free_port("127.0.0.1", 70000)
    with pytest.raises(ValueError, match="`host` an address of this machine"):
        demo._free_port("no.such.host.invalid", 0)


def test_it_talks_to_nobody(server):
    assert server.analytics_enabled is False and server.share is False and server.config["run_history"] is False
    assert "http" not in str(demo._LOOK["theme"]._stylesheets), "no fonts from elsewhere"
    shared = [f for f in server.fns.values() if f.concurrency_id == "device"]
    assert {f.api_name for f in shared} == {"edit", "look", "take_away", "versus", "pairs", "judge"} and all(
        f.concurrency_limit == 1 for f in shared
    )
    assert server.max_file_size == 2 * 10**6 or server.max_file_size == 2 * 2**20


def test_the_note_promises_what_the_model_takes():
    text = demo._describe("some/folder/wan", Limits(max_frames=81, max_pixels=921600, size_multiple=32, steps=50))
    assert "**wan**" in text and "81 frames" in text and "960x960" in text and "small world" not in text
    assert "[Its card](card)" in demo._describe("kiwi-edit-tiny", Limits(5, 96 * 96, 16, 1))


def test_the_memory_is_said_before_anything_is_loaded(random_model):
    from kiwi_edit.core import preset

    assert "weights take" in demo._memory_note(str(random_model))
    assert "known once it is fetched" in demo._memory_note("some/body")
    assert "takes 23.5 GB" in demo._memory_note(preset("wan2.2-5b").checkpoint)


@pytest.mark.skipif(
    not (asset() / "kiwi-edit-tiny" / "model_index.json").is_file(), reason="the trained model is not there"
)
def test_the_page_starts_from_what_the_model_says():
    page = demo.make_demo(model="kiwi-edit-tiny")
    text = "\n".join(str(block.value) for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "**kiwi-edit-tiny** restyles" in text and "what a reference shows" in text
    fields = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    assert "GB with all that it works with" in fields["model"].info
    steps = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "steps")
    assert steps.value == demo._LazyPipeline(model="kiwi-edit-tiny").limits().steps == 1
    page.visitors.root.cleanup()


# in a browser


@pytest.fixture(scope="module")
def browser():
    "Playwright, where it and a Chromium are installed and start."
    playwright = pytest.importorskip("playwright.sync_api")
    if reason := why_no_browser():
        pytest.skip(reason)
    with playwright.sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def page(server, browser):
    found = Page(browser, server.local_url)
    yield found
    found.close()


def test_an_example_is_edited_and_plays(page):
    page.click_example(0)
    page.set_steps(2)
    page.edit()
    source, note = page.wait_for_result()
    assert source and "5 frames of 384x384" in note
    assert all(name in page.wait_for_comparison() for name in ("edited.mp4", "edited.gif", "frames.zip", "edit.py"))
    assert page.plays()
    assert page.foreign == [] and page.faults == []


def test_cancel_and_bad_files_in_a_browser(page, tmp_path):
    page.set_steps(100)
    page.edit()
    page.wait_for_text("note", " of 100")  # any step: a fast machine does not tell of each
    page.click("cancel")
    page.wait_for_text("note", "Nothing was edited")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.open_tab("Image")
    page.upload("image", tmp_path / "bad.png")
    page.page.wait_for_selector("#image img")
    page.set_steps(1)
    page.edit()
    message = page.wait_for_error("A picture has to be an image")
    assert "Traceback" not in message and "/tmp" not in message
    assert page.page.locator("#clip video").count() == 0, "there is one source"
    page.click_example(0)
    assert page.page.locator("#clip").is_visible(), "an example opens its tab"


def test_the_other_tabs_in_a_browser(page):
    page.open_tab("Guidance")
    page.look()
    page.page.locator("#away").get_by_label("the queries").check()
    page.wait_for_text("guidance-text", "Without the queries")
    page.open_tab("Data")
    page.page.locator("#pairs-number input[type=number]").fill("2")
    page.click("pairs")
    page.wait_for_text("kept", "of 2")
    page.page.wait_for_selector("#sheets figure")
    page.page.wait_for_selector("#funnel [aria-label*='load: 2 of 2']")
    page.open_tab("Judge")
    page.click("take")
    page.page.wait_for_function(
        "(document.querySelector('#judge-instruction textarea, #judge-instruction input')?.value ?? '').length > 0"
    )
    page.page.locator("#kind").get_by_label("a background from the reference").check()
    page.click("judge")
    page.wait_for_text("judgement", "Matting Quality")
    assert "of 5, by metrics" in page.page.locator("#judgement").inner_text()
    assert page.foreign == [] and page.faults == []


def test_small_screens_and_names_for_all_fields(page):
    page.page.set_viewport_size(dict(width=390, height=844))
    for tab in ("Edit", "Guidance", "Data", "Judge"):
        page.open_tab(tab)
        page.page.wait_for_timeout(200)
        assert page.overflow() <= 0, tab
    nameless = page.page.evaluate("""() => [...document.querySelectorAll('input:not([type=file]):not([type=hidden]), textarea, select')].filter(e => e.offsetParent).filter(e =>
        !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title || e.placeholder)).map(e => e.outerHTML.slice(0, 120))""")
    assert nameless == []
    page.open_tab("Edit")
    page.page.locator("#instruction textarea").focus()
    for _ in range(40):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.id") == "edit":
            break
    assert page.page.evaluate("document.activeElement.id") == "edit", "the button is reached by keyboard"


def test_the_cell_of_the_notebook_in_jupyterlab(browser, tmp_path):
    "The page comes up below its cell, and edits there."
    cell = next(
        c
        for c in json.loads((ROOT / "nbs/library/51_demo.ipynb").read_text(encoding="utf-8"))["cells"]
        if "make_demo().launch(" in "".join(c["source"])
    )
    notebook = dict(
        cells=[cell | dict(source="from kiwi_edit.apps.demo import make_demo\n" + "".join(cell["source"]))],
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")),
    )
    (tmp_path / "demo.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")} | dict(
        JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / "spaces")
    )
    with open(tmp_path / "log", "wb") as log:
        lab = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                f"--port={port}",
                "--IdentityProvider.token=",
                f"--ServerApp.root_dir={tmp_path}",
            ],
            stdout=log,
            stderr=log,
            env=os.environ | folders | dict(KIWI_EDIT_DEVICE="cpu"),
        )
    opened = browser.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
    try:
        deadline = time.monotonic() + 180
        while b"is running at" not in (tmp_path / "log").read_bytes():
            assert lab.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        page = opened.new_page(viewport=dict(width=1400, height=1300))
        page.set_default_timeout(300_000)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/demo.ipynb")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.wait_for_selector("[data-status=idle]", state="attached")
        page.keyboard.press("Shift+Enter")
        inside = page.frame_locator(".jp-OutputArea iframe")
        inside.locator("#examples button").first.click()
        inside.locator("#clip video").wait_for()
        inside.locator("#edit").click()
        inside.locator("#note", has_text="5 frames of 384x384").wait_for()
        inside.locator("#result video").wait_for()
    finally:
        opened.close()
        lab.send_signal(signal.SIGINT)
        lab.send_signal(signal.SIGINT)  # the second one answers "shut down?"
        try:
            lab.wait(20)
        except subprocess.TimeoutExpired:
            lab.kill()


def test_close_leaves_nothing(random_model, files):
    served = demo.launch("127.0.0.1", 0, random_model, block=False, say=lambda line: None)
    visitor, root = gradio_client.Client(served.local_url, verbose=False), Path(served.visitors.root.name)
    visitor.predict(**arguments(image=files / "blue.png"), api_name="/edit")
    # examples, which go with the process
    kept = {f for block in served.blocks.values() for f in getattr(block, "keep_in_cache", ())}
    own = {f for some in served.temp_file_sets for f in some} - kept
    visitor.close()
    assert own and any(Path(f).exists() for f in own)
    demo.close(served)
    assert not root.exists() and not [f for f in own if Path(f).exists()]
