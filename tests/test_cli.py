"""`kiwi-edit`: what it makes of files, good ones and bad ones, and how it fails."""
import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kiwi_edit import cli
from kiwi_edit.core import assets_dir, settings
from kiwi_edit.files import make_samples
from kiwi_edit.video import read_video, video_info, write_video

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "kiwi_edit.cli"]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    "Folder of a model of the tiny sizes that has learnt nothing."
    import torch

    from kiwi_edit.core import preset
    from kiwi_edit.encoder import make_tokenizer
    from kiwi_edit.pipeline import KiwiEditPipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "random-tiny"
    KiwiEditPipeline.from_preset(preset("tiny"), make_tokenizer(["make it snow"], vocab_size=512)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    "Outputs go to the test's folder; the command's logging ends with the test."
    monkeypatch.setenv("KIWI_EDIT_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.setenv("KIWI_EDIT_DEVICE", "cpu")
    settings.cache_clear()
    yield
    settings.cache_clear()
    logging.getLogger("kiwi_edit").handlers.clear()


@pytest.fixture
def kiwi(capfd):
    "Run the command in this process: exit code, standard output, standard error."

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def edit(kiwi, random_model):
    "Edit with the random model in one step."

    def run(video, *arguments, instruction="make it snow"):
        return kiwi("edit", video, "--instruction", instruction, "--model", random_model, "--steps", 1, *arguments)

    return run


def picture(width=40, height=32, count=5):
    "A ramp of colours that moves."
    t, y, x = np.mgrid[0:count, 0:height, 0:width][..., None]
    return ((x + 2 * y + 4 * t) * np.array([3, 5, 7]) % 256).astype(np.uint8)


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", picture(), 10)


def encode(path, frames, pix_fmt="yuv420p", fps=10, seconds_of_sound=0, **options):
    "A video with features that `write_video` never writes."
    with av.open(str(path), "w", **options) as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        sound = file.add_stream("aac", rate=48000, layout="stereo") if seconds_of_sound else None
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(int(48000 * seconds_of_sound)) / 20).astype(np.float32)
            file.mux(sound.encode(_audio(wave)))
            file.mux(sound.encode(None))
    return path


def _audio(wave):
    frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = 48000, 0
    return frame


def one_error(err):
    "The one line of an error; anything else on standard error fails."
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not line.startswith("loading ") and "steps," not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def refused(result, *words, code=1):
    "Check that a command said no, in one line."
    status, out, err = result
    line = one_error(err)
    assert status == code and out == "", (status, out)
    for word in words:
        assert word in line, line
    return line


# what it does


def test_edit_writes_result_strip_and_comparison(edit, clip, tmp_path):
    status, out, err = edit(clip, "--out", tmp_path / "new.mp4", "--compare")
    assert status == 0
    assert str(tmp_path / "new.mp4") in out and str(tmp_path / "new-strip.png") in out and str(tmp_path / "new-compare.mp4") in out
    assert video_info(tmp_path / "new.mp4").frames == 5 and video_info(tmp_path / "new.mp4").fps == 10
    assert read_video(tmp_path / "new.mp4").frames.shape == (5, 32, 40, 3)
    assert read_video(tmp_path / "new-compare.mp4").frames.shape == (5, 32, 84, 3)
    assert Image.open(tmp_path / "new-strip.png").width > 300
    assert "loading" in err and "1/1 steps" in err and "edited frame" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "new-compare.mp4", "new-strip.png", "new.mp4"]


def test_a_long_clip_says_what_was_edited_and_keeps_the_sound_of_it(edit, tmp_path):
    source = encode(tmp_path / "long.mp4", picture(count=24), fps=12, seconds_of_sound=2)
    status, out, _ = edit(source, "--out", tmp_path / "new.mp4")
    assert status == 0
    assert "edited frames 0 to 4 of 24 (0.00 s to 0.42 s of 2.00 s): this model takes 5" in out
    info = video_info(tmp_path / "new.mp4")
    assert info.frames == 5 and info.fps == 12 and info.has_audio
    with av.open(str(tmp_path / "new.mp4")) as file:
        sound = file.streams.audio[0]
        assert abs(float(sound.duration * sound.time_base) - 5 / 12) < 0.05
    status, out, _ = edit(source, "--out", tmp_path / "short.mp4", "--frames", 1)
    assert status == 0 and "edited frame 0 of 24 (0.00 s to 0.08 s of 2.00 s): --frames is 1" in out


def test_same_seed_same_result_other_seed_another(edit, clip, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert edit(clip, "--out", tmp_path / f"{name}.mp4", "--seed", seed)[0] == 0
    a, b, c = (read_video(tmp_path / f"{name}.mp4").frames for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_references_and_options_reach_the_model(edit, clip, tmp_path):
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (20, 30), color).save(tmp_path / f"{color}.png")
    results = {}
    for name, options in dict(plain=(), red=("-r", tmp_path / "red.png"), both=("-r", tmp_path / "red.png", "-r", tmp_path / "blue.png"),
                              weak=("--strength", 0.5, "--steps", 4), guided=("--guidance-scale", 3), small=("--size", "16x16")).items():
        status, out, err = edit(clip, "--out", tmp_path / f"{name}.mp4", *options)
        assert status == 0, err
        results[name] = read_video(tmp_path / f"{name}.mp4").frames
        assert ("16x16" in out) == (name == "small") and ("2/2 steps" in err) == (name == "weak")
    names = list(results)
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if np.array_equal(results[a], results[b])]


def test_the_result_goes_to_the_settings_folder(edit, clip, tmp_path):
    status, out, _ = edit(clip)
    assert status == 0 and (tmp_path / "outputs" / "clip-edited.mp4").is_file()
    refused(edit(clip), "--out has to be a new file unless --overwrite is set", "clip-edited.mp4")
    assert edit(clip, "--overwrite")[0] == 0


@pytest.mark.parametrize("suffix, result", [(".png", ".png"), (".jpg", ".jpg"), (".bmp", ".png")])
def test_an_image_gives_an_image(edit, tmp_path, suffix, result):
    Image.fromarray(picture(50, 33)[0]).save(tmp_path / f"photo{suffix}")
    status, out, _ = edit(tmp_path / f"photo{suffix}", "--compare")
    assert status == 0 and "1 frame of 50x33" in out
    assert Image.open(tmp_path / "outputs" / f"photo-edited{result}").size == (50, 33)
    assert Image.open(tmp_path / "outputs" / f"photo-edited-compare{result}").size == (104, 33)


def test_evaluate_writes_a_report(kiwi, random_model, tmp_path):
    command = "evaluate", "--model", random_model, "--samples", 1, "--steps", 1, "--tasks", "style, background", "--out", tmp_path / "report.json"
    status, out, err = kiwi(*command)
    assert status == 0, err
    assert "| style | 1 |" in out and "| background | 1 |" in out
    assert {r["task"] for r in json.loads((tmp_path / "report.json").read_text())["records"]} == {"style", "background"}
    refused(kiwi(*command), "--out has to be a new file unless --overwrite is set")


def test_version_help_and_no_command(kiwi):
    assert re.fullmatch(r"kiwi-edit \d+\.\d+\S*\n", kiwi("--version")[1])
    status, out, _ = kiwi("edit", "--help")
    assert status == 0 and all(flag in out for flag in "--instruction --reference --model --out --compare --overwrite --seed --steps --frames --size --device".split())
    assert kiwi()[0] == 2


def test_help_is_fast():
    code = "import sys; from kiwi_edit.cli import main\ntry: main(['--help'])\nexcept SystemExit: print([m for m in ('torch', 'numpy', 'av', 'diffusers', 'gradio') if m in sys.modules])"
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]" and time.perf_counter() - began < 3


# unusual sources


def odd(path): return write_video(path, picture(33, 47), 10)
def narrow(path): return encode(path, picture(8, 64))
def very_narrow(path): return encode(path, picture(8, 2400))
def uhd(path): return encode(path, np.repeat(np.repeat(picture(60, 34, 1), 64, axis=1), 64, axis=2)[:, :2160], options={"preset": "ultrafast"})
def gray(path): return encode(path, picture(), pix_fmt="gray")
def ten_bit(path): return encode(path, picture(), pix_fmt="yuv420p10le")
def one_frame(path): return encode(path, picture(count=1))
def three_frames(path): return encode(path, picture(count=3))


@pytest.mark.parametrize("make, frames", [(odd, 5), (narrow, 5), (very_narrow, 5), (uhd, 1), (gray, 5), (ten_bit, 5), (one_frame, 1), (three_frames, 1)])
def test_unusual_videos_work(edit, tmp_path, make, frames):
    source = make(tmp_path / "odd.mp4")
    status, out, err = edit(source, "--out", tmp_path / "new.mp4")
    assert status == 0, err
    before, after = video_info(source), video_info(tmp_path / "new.mp4")
    assert (after.frames, after.width, after.height, after.fps) == (frames, before.width, before.height, before.fps)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(picture(60, 20)[0]).save(path, exif=exif)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_images_of_any_mode_work_as_source_and_reference(edit, tmp_path, mode):
    array = picture(40, 24)[0]
    image = Image.fromarray(array[..., 0].astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(array).convert(mode)
    image.save(tmp_path / "odd.png")
    status, _, err = edit(tmp_path / "odd.png", "-r", tmp_path / "odd.png", "--out", tmp_path / "new.png")
    assert status == 0, err
    assert Image.open(tmp_path / "new.png").size == (40, 24) and Image.open(tmp_path / "new.png").mode == "RGB"


def test_rotated_photos_stand_upright(edit, tmp_path):
    rotated(tmp_path / "photo.jpg")
    assert edit(tmp_path / "photo.jpg", "-r", tmp_path / "photo.jpg", "--out", tmp_path / "new.png")[0] == 0
    assert Image.open(tmp_path / "new.png").size == (20, 60)


@pytest.mark.parametrize("instruction", ["把背景换成雪山", "Сделай зиму", "أضف الثلج", "❄️🦊", "costs $5 or $x^{", "line\nbreak", "x" * 3000], ids=range(7))
def test_any_language_is_read(edit, clip, tmp_path, instruction):
    status, _, err = edit(clip, "--out", tmp_path / "new.mp4", instruction=instruction)
    assert status == 0, err
    assert "Glyph" not in err and "Warning" not in err


# bad input


def text(path): path.write_text("this is no video\n" * 50)
def empty(path): path.write_bytes(b"")
def header_cut(path): path.write_bytes(encode(path, picture(64, 64, 20), options={}).read_bytes()[:-400])  # the index is at the end
def sound_only(path):
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=48000, layout="stereo")
        file.mux(sound.encode(_audio(np.zeros(48000, np.float32))))
        file.mux(sound.encode(None))
def no_frames(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        file.mux(stream.encode(None))


@pytest.mark.parametrize("make", [text, empty, header_cut, sound_only, no_frames, lambda path: None, lambda path: path.mkdir()],
                         ids=["text", "empty", "cut", "sound", "no frames", "missing", "empty folder"])
def test_files_that_are_no_video_are_refused(kiwi, tmp_path, make):
    make(tmp_path / "bad.mp4")
    refused(kiwi("edit", tmp_path / "bad.mp4", "-i", "make it snow", "--model", "never-looked-up"), "VIDEO has to", "bad.mp4")
    assert not list((tmp_path / "outputs").glob("*"))


def test_what_is_left_of_a_cut_video_is_edited(edit, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), dtype=np.uint8)
    whole = write_video(tmp_path / "whole.mp4", noise, 10).read_bytes()  # its index is at the front
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 8])
    status, out, err = edit(tmp_path / "cut.mp4", "--out", tmp_path / "new.mp4")
    assert status in (0, 1) and "Traceback" not in err
    if status == 0:
        assert "of 24" in out and video_info(tmp_path / "new.mp4").frames in (1, 5)
    else:
        one_error(err)


@pytest.mark.parametrize("arguments, words", [
    (["-i", ""], ["--instruction has to say what to edit", "''"]),
    (["-i", " \n "], ["--instruction has to say what to edit"]),
    (["-i", "x", "-r", "nowhere.png"], ["--reference has to", "nowhere.png"]),
    (["-i", "x", "-r", "{clip}"], ["--reference has to be an image", "clip.mp4"]),
    (["-i", "x", "--frames", "6"], ["--frames has to be 4k+1", "6", "5 and 9"]),
    (["-i", "x", "--frames", "0"], ["--frames has to be 4k+1", "0"]),
    (["-i", "x", "--steps", "0"], ["--steps has to be from 1", "0"]),
    (["-i", "x", "--size", "big"], ["--size has to be WIDTHxHEIGHT", "'big'"]),
    (["-i", "x", "--size", "0x64"], ["--size has to have sides from 1", "0x64"]),
    (["-i", "x", "--strength", "0"], ["--strength has to lie above 0", "0.0"]),
    (["-i", "x", "--strength", "nan"], ["--strength has to lie above 0", "nan"]),
    (["-i", "x", "--guidance-scale", "0.5"], ["--guidance-scale has to be", "0.5"]),
    (["-i", "x", "--seed", "-1"], ["--seed has to be from 0", "-1"]),
    (["-i", "x", "--out", "{clip}"], ["--out has to be another file", "clip.mp4"]),
    (["-i", "x", "--out", "{clip}", "--overwrite"], ["--out has to be another file", "clip.mp4"]),
    (["-i", "x", "--out", "{folder}"], ["--out has to end in"]),
    (["-i", "x", "--out", "{folder}/new.avi"], ["--out has to end in", "new.avi"]),
    (["-i", "x", "--out", "{folder}/new.png"], ["--out has to end in .mp4", "5 frames"]),
    (["-i", "x", "--out", "{folder}/no/new.mp4"], ["--out has to be in an existing folder"]),
    (["-i", "x", "--out", "{clip}/new.mp4"], ["--out has to be in an existing folder"]),
])
def test_wrong_arguments_are_refused_before_a_model_is_looked_up(kiwi, clip, tmp_path, arguments, words):
    arguments = [a.format(clip=clip, folder=tmp_path) for a in arguments]
    before = clip.read_bytes()
    refused(kiwi("edit", clip, *arguments, "--model", "never-looked-up"), *words)
    assert clip.read_bytes() == before and not list(tmp_path.glob("new*")) and not list((tmp_path / "outputs").glob("*"))


def test_wrong_arguments_are_refused_before_weights_are_read(kiwi, clip, tmp_path, random_model):
    broken = tmp_path / "broken"
    shutil.copytree(random_model, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    base = ["edit", clip, "-i", "x", "--out", tmp_path / "new.mp4", "--model"]
    refused(kiwi(*base, "no-such-model"), "--model has to be a model that ships with the kit", "no-such-model")
    refused(kiwi(*base, tmp_path / "nowhere"), "--model has to be", "nowhere")
    refused(kiwi(*base, tmp_path), "--model has to be a model folder")
    refused(kiwi(*base, broken, "--size", "60x64"), "--size has to be multiples of 8", "60x64")
    refused(kiwi(*base, broken, "--device", "tpu"), "--device has to be", "tpu")
    refused(kiwi(*base, broken, "--device", "cuda:99"), "--device has to be there", "cuda:99")


def test_usage_errors_are_one_line_too(kiwi, clip):
    refused(kiwi("edit", clip), "--instruction", code=2)
    refused(kiwi("edit", clip, "-i", "x", "--steps", "many"), "--steps", "many", code=2)
    refused(kiwi("edit", clip, "-i", "x", "--nonsense"), "--nonsense", code=2)
    refused(kiwi("edti"), "edti", code=2)
    refused(kiwi("evaluate", "--tasks", "fly"), "--tasks has to be of", "'fly'")
    refused(kiwi("train", "--stage", "fly"), "--stage has to be one of", "'fly'")


def test_faults_of_the_kit_keep_their_traceback(monkeypatch):
    import kiwi_edit.files

    monkeypatch.setattr(kiwi_edit.files, "plan_edit", lambda *a, **k: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="broadcast"):
        cli.main(["edit", "x.mp4", "-i", "x"])


def test_text_that_is_no_unicode_is_refused(clip):
    done = subprocess.run([*COMMAND, "edit", str(clip), "-i", b"snow \xff"], capture_output=True, text=True)
    refused((done.returncode, done.stdout, done.stderr), "--instruction has to be Unicode text")


def test_nothing_is_overwritten(kiwi, clip, tmp_path):
    for name in ("new.mp4", "new-strip.png", "new-compare.mp4"):
        (tmp_path / name).write_text("mine")
        refused(kiwi("edit", clip, "-i", "x", "--compare", "--out", tmp_path / "new.mp4", "--model", "never-looked-up"), "--out has to be a new file unless --overwrite is set", name)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


# places that cannot be written


@contextlib.contextmanager
def mounted(folder, options):
    "A small file system of its own; skips where it cannot be had."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_folder(kiwi, clip, tmp_path):
    arguments = "edit", clip, "-i", "x", "--model", "never-looked-up", "--out"
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(kiwi(*arguments, tmp_path / "locked" / "new.mp4"), "--out has to be in a folder that can be written", "locked")
        return
    with mounted(tmp_path / "locked", "size=1m,ro") as folder:
        refused(kiwi(*arguments, folder / "new.mp4"), "--out has to be in a folder that can be written", "locked")


def test_full_disk(edit, clip, tmp_path):
    with mounted(tmp_path / "small", "size=24k") as folder:
        (folder / "new.mp4").write_text("mine")
        refused(edit(clip, "--out", folder / "new.mp4", "--overwrite"), "--out has to be on a disk that takes the whole file", "No space left")
        assert [p.name for p in folder.iterdir()] == ["new.mp4"] and (folder / "new.mp4").read_text() == "mine"


def test_file_size_limit(clip, tmp_path, random_model):
    done = subprocess.run([*COMMAND, "edit", str(clip), "-i", "x", "--steps", "1", "--model", str(random_model), "--out", str(tmp_path / "new.mp4")], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    refused((done.returncode, done.stdout, done.stderr), "--out has to be on a disk that takes the whole file", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


# Ctrl-C


@pytest.mark.parametrize("moment", ["loading", "editing"])
def test_interrupt_leaves_nothing(clip, tmp_path, random_model, moment):
    (tmp_path / "new.mp4").write_text("mine")
    command = [*COMMAND, "edit", str(clip), "-i", "x", "--steps", "1000", "--model", str(random_model), "--out", str(tmp_path / "new.mp4"), "--overwrite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = b""
        while moment.encode() not in seen:
            seen += os.read(process.stderr.fileno(), 4096) or pytest.fail(seen.decode())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert one_error((seen + err).decode()) == "error: interrupted; no partial file is left"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "new.mp4"] and (tmp_path / "new.mp4").read_text() == "mine"


def test_a_lost_signal_stops_at_the_next_step():
    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    steps = []
    with pytest.raises(SystemExit) as stop:
        with cli.tidy_signals(), cli.bar() as report:
            hook, sys.unraisablehook = sys.unraisablehook, lambda lost: None
            Deaf()
            sys.unraisablehook = hook
            for i in range(3):
                report(i, 3, "editing")
                steps.append(i)
    assert stop.value.code == 130 and steps == []


# samples and the bundled model


def test_samples_are_what_the_code_makes(tmp_path):
    examples = make_samples(tmp_path)
    folder = assets_dir() / "samples"
    assert [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()] == examples
    assert (folder / "instruction.txt").read_text().strip() == examples[0]["instruction"]
    for name in {e["reference"] for e in examples} - {None}:
        assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(Image.open(tmp_path / name)))
    shipped, made = read_video(folder / "clip.mp4").frames, read_video(tmp_path / "clip.mp4").frames
    assert shipped.shape == made.shape and np.abs(shipped.astype(int) - made).mean() < 1
    assert sum(p.stat().st_size for p in folder.iterdir()) < 200_000


@pytest.mark.skipif(not (assets_dir() / "kiwi-edit-tiny" / "model_index.json").is_file(), reason="the trained model is not there")
def test_the_bundled_model_edits_the_sample(kiwi, tmp_path):
    samples = assets_dir() / "samples"
    status, out, err = kiwi("edit", samples / "clip.mp4", "-i", (samples / "instruction.txt").read_text(), "-r", samples / "reference.png", "--out", tmp_path / "new.mp4")
    assert status == 0, err
    seconds = float(re.search(r"in ([\d.]+) s\)", out)[1])
    before, after = read_video(samples / "clip.mp4").frames.astype(float), read_video(tmp_path / "new.mp4").frames.astype(float)
    assert seconds < 60 and np.abs(after - before).mean() > 10, "an edited background is another picture"
    grain = np.abs(np.diff(after[:, ::4, ::4], axis=2)).mean()
    assert grain < 40, "and no noise"
