"""`kiwi-edit`: what it makes of files, good ones and bad ones, and how it fails."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import common
from kiwi_edit.apps import cli
from kiwi_edit.core import asset
from kiwi_edit.video import read_video, video_info, write_video

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("own_settings")


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
    lines = [
        line
        for line in re.split(r"[\r\n]+", err)
        if line.strip() and not line.startswith("loading ") and not re.search(r"\d steps,", line)
    ]
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
    assert str(tmp_path / "new.mp4") in out and str(tmp_path / "new-strip.png") in out
    assert str(tmp_path / "new-compare.mp4") in out
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
    Image.fromarray(np.uint8(255) * (np.mgrid[:32, :40][1] < 20)).save(tmp_path / "mask.png")
    results = {}
    for name, options in dict(
        plain=(),
        red=("-r", tmp_path / "red.png"),
        both=("-r", tmp_path / "red.png", "-r", tmp_path / "blue.png"),
        weak=("--strength", 0.5, "--steps", 4),
        guided=("--guidance-scale", 3),
        small=("--size", "16x16"),
        fond=("-r", tmp_path / "red.png", "--reference-scale", 2),
        masked=("--mask", "0.2,0.1,0.8,0.9"),
        drawn=("--mask", tmp_path / "mask.png"),
    ).items():
        status, out, err = edit(clip, "--out", tmp_path / f"{name}.mp4", *options)
        assert status == 0, err
        results[name] = read_video(tmp_path / f"{name}.mp4").frames
        assert ("16x16" in out) == (name == "small") and ("2/2 steps" in err) == (name == "weak")
    names = list(results)
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if np.array_equal(results[a], results[b])]


def test_approximations_are_chosen_by_name(kiwi, clip, random_model, tmp_path):
    command = "edit", clip, "-i", "x", "--model", random_model, "--out", tmp_path / "new.mp4", "--approximate"
    refused(kiwi(*command, "magic"), "--approximate has to be among", "'magic'")
    refused(kiwi(*command, 'fewer steps={"threshold": 1}'), "--approximate", "'threshold'")
    refused(
        kiwi("edit", tmp_path / "list.jsonl", "--approximate", "bfloat16"), "--approximate has to be left out where"
    )
    status, _, err = kiwi(*command, 'fewer steps={"steps": 3}')
    assert status == 0 and "3/3 steps" in err


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
    command = (
        "evaluate",
        "--model",
        random_model,
        "--samples",
        1,
        "--steps",
        1,
        "--tasks",
        "style, background",
        "--out",
        tmp_path / "report.json",
    )
    status, out, err = kiwi(*command)
    assert status == 0, err
    assert "| style | 1 |" in out and "| background | 1 |" in out
    assert {r["task"] for r in json.loads((tmp_path / "report.json").read_text())["records"]} == {"style", "background"}
    refused(kiwi(*command), "--out has to be a new file unless --overwrite is set")


@pytest.fixture
def bench(clip):
    "RefVIE-Bench of two rows, the second of which lacks its source."
    Image.fromarray(picture()[0]).save(clip.parent / "ref.png")
    rows = [
        f"- {{src_video: {name}, instruction: make it snow, ref_img: ref.png, edit_type: background}}\n"
        for name in ("clip.mp4", "lost.mp4")
    ]
    (clip.parent / "bench.yaml").write_text("".join(rows))
    return "--bench", "refvie", "--data", clip.parent / "bench.yaml"


def test_evaluate_makes_and_scores_the_rows_of_a_published_bench(kiwi, random_model, bench, tmp_path):
    command = "evaluate", *bench, "--model", random_model, "--steps", 1, "--out", tmp_path / "run"
    status, out, err = kiwi(*command, "--parts", "1/2")
    assert status == 0 and "1 of 1 videos there" in out and "part 1 of 2" in out, err
    assert not (tmp_path / "run" / "report.json").exists(), err
    status, out, err = kiwi(*command)
    assert status == 1 and "1 of 2 videos there, 1 of them before, 1 failed" in out, err
    assert "1 scored, 0 failed, 1 missing" in out, err
    assert "row 1 failed: `source` has to be" in err and "lost.mp4" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["about"]["steps"] == 1 and report["about"]["seed"] == 0 and len(report["about"]["checkpoint"]) == 16
    assert report["about"]["versions"]["torch"]
    refused(
        kiwi("evaluate", *bench, "--model", random_model, "--steps", 2, "--out", tmp_path / "run"),
        "--out has to be new or of the same making",
    )
    status, out, err = kiwi(
        "evaluate", *bench, "--videos", tmp_path / "run" / "videos", "--limit", 1, "--out", tmp_path / "again"
    )
    assert status == 0 and "1 rows 1 scored, 0 failed, 0 missing" in out, err
    assert (tmp_path / "again" / "report.html").is_file() and "steps 1" in out, err


def test_evaluate_scores_videos_of_the_kits_bench(kiwi, tmp_path):
    from kiwi_edit.eval.published import world_rows

    (row,) = world_rows(("add",), 1)
    (tmp_path / "add").mkdir()
    write_video(tmp_path / row.output, row.target, 15)
    status, out, err = kiwi(
        "evaluate", "--tasks", "add", "--samples", 1, "--videos", tmp_path, "--out", tmp_path / "scores"
    )
    assert status == 0 and "Judge: metrics (no model), which is no model" in out and "| edit_done |" in out, err


def test_parameters_reach_a_judge_of_ones_own(kiwi, tmp_path):
    from kiwi_edit.eval.published import world_rows

    heard = []

    class Endpoint(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            names = [
                line.split(":")[0]
                for line in str(heard[-1]["messages"][0]["content"]).split("\n")
                if line.endswith(": n")
            ]
            choice = dict(
                index=0,
                finish_reason="stop",
                message=dict(role="assistant", content="\n".join(f"{name}: 4" for name in names)),
            )
            data = json.dumps(dict(id="1", object="chat.completion", created=1, model="m", choices=[choice])).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (row,) = world_rows(("add",), 1)
    (tmp_path / "clips/add").mkdir(parents=True)
    write_video(tmp_path / "clips" / row.output, row.target, 15)
    command = (
        "evaluate",
        "--tasks",
        "add",
        "--samples",
        1,
        "--videos",
        tmp_path / "clips",
        "--judge",
        f"openai:m@http://127.0.0.1:{server.server_port}/v1",
        "--out",
        tmp_path / "out",
    )
    given = (
        *"--parameter max_completion_tokens=4096 --parameter temperature=null --parameter".split(),
        'chat_template_kwargs={"enable_thinking": false}',
        "--parameter",
        "reasoning_effort=low",
    )
    status, out, err = kiwi(*command, *given)
    server.shutdown()
    server.server_close()
    assert not status and heard and not {"temperature", "max_tokens"} & set(heard[0])
    assert (heard[0]["max_completion_tokens"], heard[0]["chat_template_kwargs"], heard[0]["reasoning_effort"]) == (
        4096,
        {"enable_thinking": False},
        "low",
    )
    for wrong in ("temperature", "=1"):
        refused(kiwi(*command, "--parameter", wrong), "--parameter has to be NAME=VALUE", wrong)
    refused(
        kiwi("evaluate", "--videos", tmp_path, "--judge", "metrics", "--parameter", "temperature=1"),
        "--parameter has to be left out",
    )
    refused(kiwi("evaluate", "--parameter", "temperature=1"), "--parameter has to be left out")
    refused(
        kiwi("synthesize", "world:1", "--out", tmp_path / "pairs", "--parameter", "temperature=1"),
        "--parameter has to be left out",
    )


def test_evaluate_says_what_is_wrong_first(kiwi, bench, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    refused(kiwi("evaluate", "--bench", "vbench"), "--bench has to be of kit, refvie, openve, imgedit", "'vbench'")
    refused(kiwi("evaluate", "--bench", "openve"), "--data has to be the file of openve")
    refused(
        kiwi("evaluate", "--bench", "openve", "--data", tmp_path / "lost.csv"),
        "--data has to be the file of a bench",
        "lost.csv",
    )
    refused(kiwi("evaluate", "--bench", "openve", *bench[2:]), "--data has to", "'original_video'")
    refused(kiwi("evaluate", *bench, "--limit", 0), "--limit has to be 1 or more but is 0")
    refused(kiwi("evaluate", *bench, "--parts", "3/2"), "--parts has to be I/N")
    refused(kiwi("evaluate", *bench, "--tasks", "add"), "--tasks has to be left out of the bench refvie")
    for difficulty in ("easy", "full"):
        wrong = kiwi("evaluate", *bench, "--difficulty", difficulty)
        refused(wrong, "--difficulty has to be left out of the bench refvie", difficulty)
    refused(kiwi("evaluate", "--limit", 3), "--limit has to be left out of the bench kit")
    refused(
        kiwi("evaluate", *bench, "--videos", tmp_path, "--model", "x"),
        "--model has to be left out where finished videos are scored",
    )
    refused(kiwi("evaluate", *bench, "--videos", tmp_path / "lost"), "--videos has to be a folder of results")
    refused(kiwi("evaluate", *bench, "--out", "report.json"), "--out has to be a folder where rows are scored")
    refused(kiwi("evaluate", *bench, "--judge", "gpt"), "--judge has to be metrics, gemini", "'gpt'")
    refused(kiwi("evaluate", *bench, "--judge", "gemini"), "--judge has to have its key in GEMINI_API_KEY")
    refused(kiwi("evaluate", "--concat"), "--concat has to be left out of the kit's bench unless --judge is given")
    refused(kiwi("evaluate", *bench, "--overwrite"), "--overwrite has to be left out")


def test_version_help_and_no_command(kiwi):
    assert re.fullmatch(r"kiwi-edit \d+\.\d+\S*\n", kiwi("--version")[1])
    status, out, _ = kiwi("edit", "--help")
    assert status == 0
    assert all(
        flag in out
        for flag in "--instruction --reference --model --out --compare --overwrite --seed --steps --frames --size --device".split()
    )
    assert kiwi()[0] == 2


# unusual sources


def odd(path):
    return write_video(path, picture(33, 47), 10)


def narrow(path):
    return encode(path, picture(8, 64))


def very_narrow(path):
    return encode(path, picture(8, 2400))


def uhd(path):
    return encode(
        path,
        np.repeat(np.repeat(picture(60, 34, 1), 64, axis=1), 64, axis=2)[:, :2160],
        options={"preset": "ultrafast"},
    )


def gray(path):
    return encode(path, picture(), pix_fmt="gray")


def ten_bit(path):
    return encode(path, picture(), pix_fmt="yuv420p10le")


def one_frame(path):
    return encode(path, picture(count=1))


def three_frames(path):
    return encode(path, picture(count=3))


@pytest.mark.parametrize(
    "make, frames",
    [(odd, 5), (narrow, 5), (very_narrow, 5), (uhd, 1), (gray, 5), (ten_bit, 5), (one_frame, 1), (three_frames, 1)],
)
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
    image = (
        Image.fromarray(array[..., 0].astype(np.uint16) * 200)
        if mode == "I;16"
        else Image.fromarray(array).convert(mode)
    )
    image.save(tmp_path / "odd.png")
    status, _, err = edit(tmp_path / "odd.png", "-r", tmp_path / "odd.png", "--out", tmp_path / "new.png")
    assert status == 0, err
    assert Image.open(tmp_path / "new.png").size == (40, 24) and Image.open(tmp_path / "new.png").mode == "RGB"


def test_rotated_photos_stand_upright(edit, tmp_path):
    rotated(tmp_path / "photo.jpg")
    assert edit(tmp_path / "photo.jpg", "-r", tmp_path / "photo.jpg", "--out", tmp_path / "new.png")[0] == 0
    assert Image.open(tmp_path / "new.png").size == (20, 60)


@pytest.mark.parametrize(
    "instruction",
    ["把背景换成雪山", "Сделай зиму", "أضف الثلج", "❄️🦊", "costs $5 or $x^{", "line\nbreak", "x" * 3000],
    ids=range(7),
)
def test_any_language_is_read(edit, clip, tmp_path, instruction):
    status, _, err = edit(clip, "--out", tmp_path / "new.mp4", instruction=instruction)
    assert status == 0, err
    assert "Glyph" not in err and "Warning" not in err


# bad input


def text(path):
    path.write_text("this is no video\n" * 50)


def empty(path):
    path.write_bytes(b"")


def header_cut(path):
    path.write_bytes(encode(path, picture(64, 64, 20), options={}).read_bytes()[:-400])  # the index is at the end


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


@pytest.mark.parametrize(
    "make",
    [text, empty, header_cut, sound_only, no_frames, lambda path: None, lambda path: path.mkdir()],
    ids=["text", "empty", "cut", "sound", "no frames", "missing", "empty folder"],
)
def test_files_that_are_no_video_are_refused(kiwi, tmp_path, make):
    make(tmp_path / "bad.mp4")
    refused(
        kiwi("edit", tmp_path / "bad.mp4", "-i", "make it snow", "--model", "never-looked-up"),
        "VIDEO has to",
        "bad.mp4",
    )
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


@pytest.mark.parametrize(
    "arguments, words",
    [
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
        (["-i", "x", "--reference-scale", "-1"], ["--reference-scale has to be a number from 0", "-1"]),
        (["-i", "x", "--mask", "0.5,0,0.2,1"], ["--mask has to be images, or a box", "(0.5, 0.0, 0.2, 1.0)"]),
        (["-i", "x", "--mask", "nowhere.png"], ["--mask has to be an existing file", "nowhere.png"]),
        (["-i", "x", "--mask", "{folder}"], ["--mask has to be a folder with at least one image"]),
        (["-i", "x", "--follow"], ["--follow has to be left out where there is no --mask"]),
        (["-i", "x", "--seed", "-1"], ["--seed has to be from 0", "-1"]),
        (["-i", "x", "--out", "{clip}"], ["--out has to be another file", "clip.mp4"]),
        (["-i", "x", "--out", "{clip}", "--overwrite"], ["--out has to be another file", "clip.mp4"]),
        (["-i", "x", "--out", "{folder}"], ["--out has to end in"]),
        (["-i", "x", "--out", "{folder}/new.avi"], ["--out has to end in", "new.avi"]),
        (["-i", "x", "--out", "{folder}/new.png"], ["--out has to end in .mp4", "5 frames"]),
        (["-i", "x", "--out", "{folder}/no/new.mp4"], ["--out has to be in an existing folder"]),
        (["-i", "x", "--out", "{clip}/new.mp4"], ["--out has to be in an existing folder"]),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_looked_up(kiwi, clip, tmp_path, arguments, words):
    arguments = [a.format(clip=clip, folder=tmp_path) for a in arguments]
    before = clip.read_bytes()
    refused(kiwi("edit", clip, *arguments, "--model", "never-looked-up"), *words)
    assert clip.read_bytes() == before and not list(tmp_path.glob("new*"))
    assert not list((tmp_path / "outputs").glob("*"))


def test_wrong_arguments_are_refused_before_weights_are_read(kiwi, clip, tmp_path, random_model, monkeypatch):
    from kiwi_edit import pipeline

    monkeypatch.setattr(pipeline.KiwiEditPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    base = ["edit", clip, "-i", "x", "--out", tmp_path / "new.mp4", "--model"]
    refused(kiwi(*base, "no-such-model"), "--model has to be a model that ships with the kit", "no-such-model")
    refused(kiwi(*base, tmp_path / "nowhere"), "--model has to be", "nowhere")
    refused(kiwi(*base, tmp_path), "--model has to be a model folder")
    refused(kiwi(*base, random_model, "--size", "60x64"), "--size has to be multiples of 8", "60x64")
    refused(kiwi(*base, random_model, "--device", "tpu"), "--device has to be", "tpu")
    refused(kiwi(*base, random_model, "--device", "cuda:99"), "--device has to be there", "cuda:99")


def test_usage_errors_are_one_line_too(kiwi, clip):
    refused(kiwi("edit", clip), "--instruction", code=2)
    refused(kiwi("edit", clip, "-i", "x", "--steps", "many"), "--steps", "many", code=2)
    refused(kiwi("edit", clip, "-i", "x", "--nonsense"), "--nonsense", code=2)
    refused(kiwi("edti"), "edti", code=2)
    refused(kiwi("evaluate", "--tasks", "fly"), "--tasks has to be of", "'fly'")
    refused(kiwi("train", "--steps", "many"), "--steps", "many", code=2)
    refused(kiwi("cache", "table.csv"), "--out", code=2)


def test_faults_of_the_kit_keep_their_traceback(monkeypatch):
    import kiwi_edit.data.files

    monkeypatch.setattr(kiwi_edit.data.files, "plan_edit", lambda *a, **k: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="broadcast"):
        cli.main(["edit", "x.mp4", "-i", "x"])


def test_text_that_is_no_unicode_is_refused(kiwi, clip):
    refused(kiwi("edit", clip, "-i", os.fsdecode(b"snow \xff")), "--instruction has to be Unicode text")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_letters(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    def shows_a_name(**_):
        print("中文.mp4")
        return 0

    monkeypatch.setattr(cli, "app", shows_a_name)
    with pytest.raises(SystemExit) as stop:
        cli.main(["edit"])
    sys.stdout.flush()
    assert stop.value.code == 0 and written.getvalue().split() == [rb"\u4e2d\u6587.mp4"]


def test_nothing_is_overwritten(kiwi, clip, tmp_path):
    for name in ("new.mp4", "new-strip.png", "new-compare.mp4"):
        (tmp_path / name).write_text("mine")
        refused(
            kiwi("edit", clip, "-i", "x", "--compare", "--out", tmp_path / "new.mp4", "--model", "never-looked-up"),
            "--out has to be a new file unless --overwrite is set",
            name,
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


# places that cannot be written


@contextlib.contextmanager
def mounted(folder, options):
    "A small file system of its own; skips where it cannot be had."
    folder.mkdir()
    done = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if shutil.which("mount")
        else None
    )
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
        refused(
            kiwi(*arguments, tmp_path / "locked" / "new.mp4"),
            "--out has to be in a folder that can be written",
            "locked",
        )
        return
    with mounted(tmp_path / "locked", "size=1m,ro") as folder:
        refused(kiwi(*arguments, folder / "new.mp4"), "--out has to be in a folder that can be written", "locked")


def test_full_disk(edit, clip, tmp_path):
    with mounted(tmp_path / "small", "size=24k") as folder:
        (folder / "new.mp4").write_text("mine")
        refused(
            edit(clip, "--out", folder / "new.mp4", "--overwrite"),
            "--out has to be on a disk that takes the whole file",
            "No space left",
        )
        assert [p.name for p in folder.iterdir()] == ["new.mp4"] and (folder / "new.mp4").read_text() == "mine"


def test_file_size_limit(edit, clip, tmp_path):
    with common.full_disk(9000):
        found = edit(clip, "--out", tmp_path / "new.mp4")
    refused(found, "--out has to be on a disk that takes the whole file", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


# Ctrl-C


def run_command(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(arguments))


@pytest.fixture
def apart(tmp_path_factory):
    "Run the command in a process of its own, and press Ctrl-C as soon as it says something; as `kiwi`."

    def run(*arguments, moment):
        said = tmp_path_factory.mktemp("said") / "said"
        process = common.start(run_command, list(map(str, arguments)), said=said)
        common.wait_until(process, lambda: moment in Path(f"{said}.err").read_text())
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
        return process.exitcode, Path(f"{said}.out").read_text(), Path(f"{said}.err").read_text()

    return run


@pytest.mark.parametrize("moment", ["loading", "editing"])
def test_interrupt_leaves_nothing(apart, clip, tmp_path, random_model, moment):
    (tmp_path / "new.mp4").write_text("mine")
    arguments = "edit", clip, "-i", "x", "--steps", 1000, "--model", random_model
    status, out, err = apart(*arguments, "--out", tmp_path / "new.mp4", "--overwrite", moment=moment)
    assert (status, out) == (130, ""), err
    assert one_error(err) == "error: interrupted; no partial file is left"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "new.mp4"]
    assert (tmp_path / "new.mp4").read_text() == "mine"


def test_the_error_that_a_library_makes_of_a_signal_ends_as_the_signal():
    with pytest.raises(SystemExit) as stop, cli._tidy_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        except SystemExit as asked:
            raise RuntimeError("the weights could not be read") from asked
    assert stop.value.code == 130


def test_a_lost_signal_stops_at_the_next_step():
    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    steps = []
    with pytest.raises(SystemExit) as stop:
        with cli._tidy_signals(), cli._bar() as report:
            hook, sys.unraisablehook = sys.unraisablehook, lambda lost: None
            Deaf()
            sys.unraisablehook = hook
            for i in range(3):
                report(i, 3, "editing")
                steps.append(i)
    assert stop.value.code == 130 and steps == []


# training


def learning(name, **changes):
    "A small stage of the tiny model's."
    from kiwi_edit.train.curriculum import Stage

    return Stage(name, ("guidance", "transformer"), 1e-3, **dict(steps=2, batch_size=2, clip=1.0) | changes)


@pytest.fixture
def small(monkeypatch):
    "Two stages that take seconds: one of the world, one of files."
    from kiwi_edit.train import curriculum

    buckets = (
        curriculum.Bucket({"add": 1.0}, 1, 32, 32, 0.5, 2, 4),
        curriculum.Bucket({"subject": 1.0}, 5, 32, 32, 0.5, 2, 4),
    )
    lora = dict(language_model=curriculum.Lora(2, ("q_proj",)))
    for stage in (
        learning("small", buckets=buckets),
        learning("files", mix=("image", "ref"), num_frames=5, max_pixels=1024, lora=lora),
        learning("later", mix=("ref",), num_frames=5, max_pixels=1024, steps=None),
    ):
        monkeypatch.setitem(curriculum.STAGES, stage.name, stage)


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    "Metadata files: pictures, and references of which one row lacks its clip."
    from kiwi_edit.data.dataset import WorldDataset, read_metadata, save_dataset, write_metadata

    folder = tmp_path_factory.mktemp("data")
    image = save_dataset(
        WorldDataset({"add": 1.0}, 1, 32, 32, samples=3), folder / "pictures", format="csv", progress=False
    )
    ref = save_dataset(
        WorldDataset({"subject": 1.0}, 5, 32, 32, samples=3), folder / "references", format="csv", progress=False
    )
    rows = read_metadata(ref)
    write_metadata(ref, rows + [dict(rows[0], src_video="clips/lost.mp4")], overwrite=True)
    for name, changes in dict(lost=dict(src_video="no.mp4"), short={}, plain=dict(ref_image="")).items():
        write_metadata(folder / "references" / f"{name}.csv", [rows[0] | changes])
    text = (folder / "references" / "short.csv").read_text().replace("tgt_video", "target")
    (folder / "references" / "short.csv").write_text(text)
    (folder / "references" / "none.csv").write_text("src_video,tgt_video,prompt\n")
    (folder / "references" / "w.safetensors").write_bytes(b"")
    return dict(image=image, ref=ref)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_runs_stages_one_after_the_other_from_what_cache_has_made(kiwi, small, tables, random_model, tmp_path):
    data = [f"{mode}={path}" for mode, path in tables.items()]
    caches, run = tmp_path / "caches", tmp_path / "run"
    assert kiwi("cache", "--stage", "small", "--model", random_model, "--out", caches)[0] == 0
    status, out, err = kiwi("cache", *data, "--stage", "files", "--model", random_model, "--out", caches)
    assert status == 0 and "ref: 3 rows, 1 bad" in out and "image: 3 rows, 0 bad" in out and err.count("lost.mp4") == 1
    made = {path: path.stat().st_mtime_ns for path in caches.rglob("*.safetensors")}
    assert len(made) == 4
    flags = [flag for text in data for flag in ("--data", text)]
    command = [
        *"train --stage small --stage files".split(),
        *flags,
        "--cache",
        caches,
        "--out",
        run,
        *"--track none --keep".split(),
        1,
    ]
    status, out, err = kiwi(*command, "--start", random_model, "--seed", 3)
    assert status == 0 and out == f"model: {run / 'model'}\n" and "stage small" in err and "stage files" in err
    assert {path: path.stat().st_mtime_ns for path in caches.rglob("*.safetensors")} == made
    assert [len(lines(run / name / "log.jsonl")) for name in ("small", "files")] == [2, 2]
    assert list(json.loads((run / "model" / "stages.json").read_text())) == ["small", "files"]
    assert "loss/ref" in lines(run / "files" / "log.jsonl")[1]
    refused(kiwi(*command), "--out has to hold no run of stage 'small' unless --resume is given")
    before = (run / "model" / "stages.json").stat().st_mtime_ns
    assert kiwi(*command, "--resume")[0] == 0 and (run / "model" / "stages.json").stat().st_mtime_ns == before
    status, out, err = kiwi("train", *command[3:], "--resume", "--steps", 3)
    assert status == 1
    assert err.startswith(
        "stage files\nerror: --out has to hold a model without stage 'files', whose LoRA layers are merged"
    )


def test_cache_of_a_table_is_reused_split_and_pruned(kiwi, tables, random_model, tmp_path):
    command = (
        "cache",
        tables["ref"],
        "--model",
        random_model,
        "--out",
        tmp_path / "caches",
        "--num-frames",
        1,
        "--dtype",
        "float32",
        "--max-pixels",
    )
    status, out, err = kiwi(*command, 1024, "--parts", "1/2")
    assert status == 0 and "image: part 1 of 2 is done" in out and not list(tmp_path.rglob("index.json"))
    assert kiwi(*command, 1024, "--parts", "2/2")[0] == 0
    status, out, err = kiwi(*command, 1024, "--workers", 1)
    assert "3 of 4 rows reused, 0 to compute, 1 bad" in err and "image: 3 rows, 1 bad" in out
    first = list(tmp_path.rglob("rows-*"))
    status, out, err = kiwi(*command, 400, "--prune")
    assert "0 of 4 rows reused, 3 to compute" in err and re.search(r"image: 0\.\d MiB deleted", out)
    assert not [path for path in first if path.exists()] and list(tmp_path.rglob("rows-*"))


def test_dry_run_says_what_is_needed_and_loads_nothing(kiwi, small, monkeypatch, tmp_path):
    from kiwi_edit import pipeline

    monkeypatch.chdir(tmp_path)
    for name in ("from_pretrained", "to"):
        monkeypatch.setattr(pipeline.KiwiEditPipeline, name, lambda *a, **k: pytest.fail("it was loaded"))
    from kiwi_edit.train import curriculum

    monkeypatch.setitem(
        curriculum.STAGES,
        "wide",
        learning("wide", buckets=(curriculum.Bucket({"subject": 1.0}, 5, 96, 96, 1.0, 24, 4),)),
    )
    status, out, err = kiwi(
        "train", "--stage", "wide", "--dry-run", "--steps", 1800, "--seconds-per-step", 2, "--options"
    )
    assert status == 0 and "1,800 steps, 2 s each, 1.0 hours" in out and "matrix products" not in out
    parts = {name: (trains, frozen) for name, trains, frozen in re.findall(r"^(\w+) +([\d,]+) +([\d,]+)$", out, re.M)}
    assert len(parts["transformer"][1]) >= 5 and parts["vae"][0] == "0"
    named = "as above|online|checkpointing of both networks|optimizer in the host's memory"
    rows = re.findall(rf"^({named}) +([\d. ]+)$", out, re.M)
    choices = {name: [float(x) for x in row.split()] for name, row in rows}
    assert len(choices) == 4 and all(abs(sum(row[:4]) - row[4]) < 0.03 for row in choices.values())
    assert choices["checkpointing of both networks"][3] < choices["as above"][3]
    assert choices["optimizer in the host's memory"][2] == 0 < choices["as above"][2]
    assert choices["online"][0] > choices["as above"][0]
    status, out, err = kiwi("train", "--stage", "encoder", "--dry-run")
    assert "TFLOP/s" in out and " minutes on two CPU cores" in out
    assert not list(tmp_path.iterdir())


REF = "--data", "ref={ref}"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stage", "fly"], ["--stage has to be a stage of tiny", "'fly'", "encoder"]),
        (["--preset", "huge"], ["--preset has to be one of tiny", "'huge'"]),
        (["--preset", "wan2.2-5b"], ["--stage has to be given for wan2.2-5b", "stage3-mix"]),
        (
            ["--preset", "wan2.1-14b", "--stage", "stage2-600"],
            ["--steps has to be given for stage 'stage2-600' of wan2.1-14b"],
        ),
        (["--steps", "0"], ["--steps has to be above 0", "0"]),
        (["--minutes", "nan"], ["--minutes has to be above 0", "nan"]),
        (["--keep", "0"], ["--keep has to be above 0"]),
        (["--seed", "-1"], ["--seed has to be 0 or more", "-1"]),
        (["--track", "paper"], ["--track has to be", "'paper'"]),
        (["--score", "0"], ["--score has to be above 0", "0"]),
        (
            ["--preset", "wan2.2-5b", "--stage", "stage3-ref", "--score", "2"],
            ["--score has to be left out for wan2.2-5b"],
        ),
        (["--device", "tpu"], ["--device has to be", "'tpu'"]),
        (["--options"], ["--options has to come with --dry-run"]),
        (["--seconds-per-step", "3"], ["--seconds-per-step has to come with --dry-run"]),
        (["--stage", "later", "--steps", "1", "--data", "ref"], ["--data has to be MODE=METADATA", "'ref'"]),
        (
            ["--stage", "later", "--steps", "1", "--data", "sound={ref}"],
            ["--data has to be MODE=METADATA", "image, video, ref"],
        ),
        (["--stage", "later", "--steps", "1", *REF, *REF], ["--data has to give each name once", "'ref' twice"]),
        (["--stage", "encoder", *REF], ["--data has to be left out", "ref"]),
        (["--stage", "later", "--steps", "1"], ["--data has to name a metadata file for ref but names none"]),
        (["--stage", "files", *REF], ["--data has to name a metadata file for image, ref but names ref"]),
        (
            ["--stage", "later", "--steps", "1", "--data", "ref={folder}/gone.csv"],
            ["--data has to be an existing file", "gone.csv"],
        ),
        (
            ["--stage", "later", "--steps", "1", "--data", "ref={folder}/short.csv"],
            ["--data has to have the columns", "lacks tgt_video"],
        ),
        (
            ["--stage", "later", "--steps", "1", "--data", "ref={folder}/none.csv"],
            ["--data has to hold at least one row"],
        ),
        (
            ["--stage", "later", "--steps", "1", "--data", "ref={folder}/lost.csv"],
            ["--data of ref has to have a good row", "lost.csv row 0"],
        ),
        (
            ["--stage", "later", "--steps", "1", "--data", "ref={folder}/plain.csv"],
            ["--data of ref has to have a reference", "plain.csv row 0 has none"],
        ),
        (
            ["--stage", "files", *REF, "--data", "image={ref}"],
            ["--data of image has to have no references", "row 0 has one"],
        ),
        (["--stage", "later", *REF], ["--steps has to be given for stage 'later'"]),
        (["--stage", "encoder", "--out", "{ref}"], ["--out has to be a folder", "metadata.csv"]),
        (["--stage", "encoder", "--start", "nowhere"], ["--start has to be a model", "'nowhere'"]),
        (
            ["--stage", "encoder", "--start", "gone.safetensors", "--base", "vae=x", "--base", "mllm=y"],
            ["--start has to be a file", "'gone.safetensors'"],
        ),
        (
            ["--stage", "encoder", "--start", "{folder}/w.safetensors", "--base", "vae=x"],
            ["--base has to name vae and mllm", "lacks mllm"],
        ),
        (
            [
                "--stage",
                "encoder",
                "--start",
                "{folder}/w.safetensors",
                "--base",
                "vae={folder}/gone.pth",
                "--base",
                "mllm=y",
            ],
            ["--vae has to be a file"],
        ),
        (["--stage", "encoder", "--base", "vae=x"], ["--base has to be left out", "vae"]),
        (["--stage", "encoder", "--base", "clip=x"], ["--base has to be PART=SOURCE", "'clip=x'"]),
        (["--stage", "encoder", "--start", "{folder}"], ["--start has to be a model folder"]),
    ],
)
def test_wrong_training_is_refused_before_weights_are_read(
    kiwi, small, tables, monkeypatch, tmp_path, arguments, words
):
    from kiwi_edit import pipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.KiwiEditPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    arguments = [a.format(**tables, folder=tables["ref"].parent) for a in arguments]
    refused(kiwi("train", *arguments), *words)
    assert not list(tmp_path.iterdir())


def test_places_and_processes_that_do_not_fit_are_refused(kiwi, small, tables, random_model, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(random_model, tmp_path / "run" / "model")
    train = "train", "--stage", "small", "--out", tmp_path / "run"
    refused(
        kiwi(*train, "--start", random_model), "--start has to be left out where --out holds a model", "random-tiny"
    )
    official = "train", "--preset", "wan2.2-5b", "--stage", "stage3-ref", "--data", f"ref={tables['ref']}", "--out"
    refused(kiwi(*official, tmp_path / "new"), "--start has to be given for wan2.2-5b")
    refused(
        kiwi(*official, tmp_path / "new", "--start", random_model),
        "--start has to be a model of the sizes of wan2.2-5b, with num_layers 30",
        "has 6",
    )
    refused(kiwi(*official, tmp_path / "run"), "--out has to be a model of the sizes of wan2.2-5b")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(kiwi(*train), "--stage 'small' has batches of 2 samples", "3 processes")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(
        kiwi("train", "--stage", "encoder", "--out", tmp_path / "run"),
        "--stage 'encoder' has to be one that AdamW trains",
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model"] and not (tmp_path / "new").exists()


def test_too_little_memory_is_said_first(kiwi, small, random_model, monkeypatch, tmp_path):
    command = "train", "--stage", "small", "--start", random_model, "--out", tmp_path / "run"
    for free, words in (
        (2e7, "activations 0 GB"),
        (1.15e8, "activations 0."),
    ):  # weights, gradients and moments take 109 MB, activations 13
        monkeypatch.setattr(cli, "_free_memory", lambda device: int(free))
        line = one_error(
            "\n".join(part for part in re.split(r"[\r\n]+", kiwi(*command)[2]) if not part.startswith("dry run"))
        )
        assert line.startswith("error: free memory has to be at least") and "for stage 'small' of tiny" in line
        assert words in line
    assert not (tmp_path / "run").exists()


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    import torch

    alone = cli._free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 1e8 < alone and abs(4 * cli._free_memory(torch.device("cpu")) / alone - 1) < 0.2


def test_a_stage_without_what_it_builds_on_warns_and_a_loss_that_is_no_number_is_one_line(
    kiwi, small, monkeypatch, tmp_path
):
    from kiwi_edit.train import engine as training

    def explode(*arguments, **options):
        raise FloatingPointError("the loss is nan at step 3; its samples: a, b. The last checkpoint is kept.")

    monkeypatch.setattr(training, "train", explode)
    status, out, err = kiwi("train", "--stage", "pictures", "--out", tmp_path)
    assert status == 1
    assert err.splitlines() == [
        "warning: stage pictures starts from a random model, without encoder, which it builds on",
        "stage pictures",
        "error: the loss is nan at step 3; its samples: a, b. The last checkpoint is kept.",
    ]

    def fill(*arguments, **options):
        raise MemoryError("CUDA out of memory.")

    monkeypatch.setattr(training, "train", fill)
    assert (
        kiwi("train", "--stage", "pictures", "--out", tmp_path)[2].splitlines()[-1]
        == "error: `train` has to ask for no more than fits into memory, which is full: CUDA out of memory."
    )
    monkeypatch.setattr(training, "train", explode)
    monkeypatch.setenv("RANK", "1")
    status, out, err = kiwi("train", "--stage", "pictures", "--out", tmp_path)
    assert status == 1 and err.startswith("error in process 1: the loss is nan") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["DATA has to be one metadata file"]),
        (["{ref}", "{ref}"], ["DATA has to be one metadata file", "2"]),
        (["gone.csv"], ["DATA has to be an existing file", "gone.csv"]),
        (["{folder}/short.csv"], ["DATA has to have the columns", "tgt_video"]),
        (["{ref}", "--num-frames", "6"], ["--num-frames has to be 4k+1", "6"]),
        (["{ref}", "--max-pixels", "9"], ["--max-pixels has to be at least", "9"]),
        (["{ref}", "--dtype", "int8"], ["--dtype has to be", "'int8'"]),
        (["{ref}", "--parts", "3/2"], ["--parts has to be I/N", "'3/2'"]),
        (["{ref}", "--parts", "1/2", "--prune"], ["--prune has to be left to a run over all rows"]),
        (["{ref}", "--workers", "-1"], ["--workers has to be 0 or more"]),
        (["{ref}", "--model", "nowhere"], ["--model has to be a model", "'nowhere'"]),
        (["{ref}", "--preset", "wan2.1-14b"], ["--model has to be given for wan2.1-14b"]),
        (
            ["{ref}", "--preset", "wan2.2-5b", "--model", "{model}"],
            ["--model has to be a model of the sizes of wan2.2-5b"],
        ),
        (["{ref}", "--stage", "small"], ["DATA has to be left out for stage 'small'"]),
        (["{ref}", "--stage", "files"], ["DATA has to be MODE=METADATA"]),
        (["video={ref}", "--stage", "files"], ["DATA has to be of image, ref for stage 'files' but is video"]),
        (["image={ref}", "--stage", "files"], ["DATA of image has to have no references"]),
        (["--stage", "files"], ["DATA has to be of image, ref for stage 'files' but is missing"]),
        (["--stage", "encoder"], ["--stage has to be one that denoises", "'encoder'"]),
        (
            ["ref={ref}", "--stage", "later", "--max-pixels", "900"],
            ["--max-pixels has to be left out where --stage is given", "900"],
        ),
    ],
)
def test_wrong_caches_are_refused_before_weights_are_read(
    kiwi, small, tables, random_model, monkeypatch, tmp_path, arguments, words
):
    from kiwi_edit import pipeline

    monkeypatch.setattr(pipeline.KiwiEditPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    arguments = [a.format(**tables, folder=tables["ref"].parent, model=random_model) for a in arguments]
    refused(kiwi("cache", *arguments, "--out", tmp_path / "caches"), *words)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_cache_says_how_to_go_on(apart, tmp_path, random_model):
    arguments = "cache", "--stage", "pictures", "--model", random_model, "--out", tmp_path / "caches"
    status, _, err = apart(*arguments, moment="rows:")
    assert status == 130 and "error: interrupted; the same command goes on from here" in err
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors"}


def test_trackers(monkeypatch):
    import importlib.util

    there = {"tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    assert cli._find_tracker(None) == cli._find_tracker("tensorboard") == ("tensorboard",)
    assert cli._find_tracker("none") == ()
    with pytest.raises(ImportError, match="`wandb` has to be installed"):
        cli._find_tracker("wandb")
    there.clear()
    assert cli._find_tracker(None) == ()


# accelerate's files

CONFIGS = asset("accelerate")


@pytest.mark.parametrize("name", ["cpu-2", "gpu-1", "ddp", "fsdp2"])
def test_accelerate_reads_its_files(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    text = (CONFIGS / f"{name}.yaml").read_text()
    kinds = {"cpu-2": ("MULTI_GPU", 2), "gpu-1": ("NO", 1), "ddp": ("MULTI_GPU", 8), "fsdp2": ("FSDP", 8)}
    assert (config.distributed_type.value, config.num_processes) == kinds[name] and config.num_machines == 1
    assert config.use_cpu == (name == "cpu-2") and ("Untested" in text) == (name != "cpu-2")
    header = " ".join(line.lstrip("# ").rstrip("\\ ") for line in text.splitlines() if line.startswith("#"))
    shown = re.search(
        rf"accelerate launch --config_file assets/accelerate/{name}\.yaml -m kiwi_edit\.apps\.cli train (.*?)(?: [A-Z-][a-z]+ |$)",
        header,
    )[1]
    flags = dict(re.findall(r"(--preset|--stage) (\S+)", shown))
    assert cli._choose_stages(flags.get("--preset", "tiny"), [flags["--stage"]])


def test_sharding_wraps_layers_that_exist(random_model):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import load_config_from_file

    from kiwi_edit.pipeline import KiwiEditPipeline
    from kiwi_edit.train.engine import FlowMatching

    config = {
        key.removeprefix("fsdp_"): value
        for key, value in load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config.items()
    }
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["version"],
        reshard_after_forward=config["reshard_after_forward"],
        state_dict_type=config["state_dict_type"],
        auto_wrap_policy=config["auto_wrap_policy"],
        transformer_cls_names_to_wrap=config["transformer_layer_cls_to_wrap"].split(","),
    )
    model = FlowMatching(KiwiEditPipeline.from_pretrained(random_model))
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        name
        for name, module in model.named_modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=1)
    ]
    assert {name.rpartition(".")[0] for name in wrapped} == {"transformer.blocks", "mllm.model.language_model.layers"}
    assert len(wrapped) == len(model.transformer.blocks) + len(model.mllm.model.language_model.layers)


def test_two_processes_train_one_model_and_speak_once(tmp_path, random_model):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu-2.yaml"),
        "-m",
        "kiwi_edit.apps.cli",
    ]
    command = [
        *launch,
        *"train --device cpu --stage encoder --steps 1 --start".split(),
        str(random_model),
        "--out",
        str(tmp_path / "run"),
        "--track",
        "none",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"model: {tmp_path / 'run' / 'model'}\n" and done.stderr.count("stage encoder") == 1
    assert len(lines(tmp_path / "run" / "encoder" / "log.jsonl")) == 1


# samples and the bundled model


@pytest.mark.skipif(
    not (asset() / "kiwi-edit-tiny" / "model_index.json").is_file(), reason="the trained model is not there"
)
def test_the_bundled_model_edits_the_sample(kiwi, tmp_path):
    samples = asset("samples")
    status, out, err = kiwi(
        "edit",
        samples / "clip.mp4",
        "-i",
        (samples / "instruction.txt").read_text(),
        "-r",
        samples / "reference.png",
        "--out",
        tmp_path / "new.mp4",
    )
    assert status == 0, err
    seconds = float(re.search(r"in ([\d.]+) s\)", out)[1])
    before = read_video(samples / "clip.mp4").frames.astype(float)
    after = read_video(tmp_path / "new.mp4").frames.astype(float)
    assert seconds < 60 and np.abs(after - before).mean() > 10, "an edit changes the clip"
    grain = np.abs(np.diff(after[:, ::4, ::4], axis=2)).mean()
    assert grain < 40, "and no noise"


# what libraries raise


@pytest.mark.parametrize(
    "arguments, module, extra",
    [
        (["demo"], "gradio", "demo"),
        (["evaluate", "--videos", ".", "--judge", "openai:m@http://localhost:1/v1"], "openai", "judge"),
        (["evaluate", "--videos", ".", "--judge", "gemini:m"], "google.genai", "judge"),
        (["synthesize", "somebody/pairs", "--out", "out"], "datasets", "scale"),
    ],
)
@pytest.mark.parametrize("noticed", ["before", "at its import"])
def test_a_missing_package_is_one_line_that_names_the_extra(
    kiwi, monkeypatch, tmp_path, arguments, module, extra, noticed
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setenv("GEMINI_API_KEY", "x")
    monkeypatch.chdir(tmp_path)
    if noticed == "before":
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest)
        )
    else:
        monkeypatch.setitem(sys.modules, module, None)
    refused(kiwi(*arguments), f"pip install 'kiwi-edit[{extra}]'")


def test_weights_that_the_disk_does_not_take_are_one_line(kiwi, random_model, tmp_path):
    with common.full_disk(20_000):
        status, out, err = kiwi("convert", random_model, tmp_path / "copy")
    refused((status, out, err.removeprefix("reading and writing the weights\n")), "too large")
    assert not list(tmp_path.iterdir())


def test_addresses_are_refused(kiwi, clip):
    refused(kiwi("edit", "https://example.com/a.mp4", "-i", "make it snow"), "VIDEO has to be a file", "is the address")
    refused(
        kiwi("edit", clip, "-i", "make it snow", "-r", "https://example.com/a.png"),
        "--reference has to be a file",
        "is the address",
    )


# weights and LoRAs of others


@pytest.fixture
def lora(random_model, tmp_path):
    "A file of a LoRA that the random model takes."
    import torch
    from safetensors.torch import save_file

    width = json.loads((random_model / "transformer/config.json").read_text())
    width = width["num_attention_heads"] * width["attention_head_dim"]
    torch.manual_seed(0)
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    weights = {name.format("down"): torch.randn(2, width), name.format("up"): torch.randn(width, 2)}
    save_file(weights, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_inspect_says_what_weights_are(kiwi, random_model, lora, clip, tmp_path):
    status, out, err = kiwi("inspect", random_model)
    assert status == 0 and out.startswith("model: Kiwi-Edit, whole, in the kit's layout\n")
    assert {line.split("/")[0] for line in out.splitlines()[1:]} == {"transformer", "vae", "mllm", "guidance"}
    status, out, err = kiwi("inspect", lora)
    assert status == 0 and out.startswith("style.safetensors: LoRA of rank 2 for 1 layers of a denoiser, width ")
    refused(kiwi("inspect", clip), "clip", "safetensors")
    refused(kiwi("inspect", tmp_path / "gone"), "gone")
    refused(kiwi("inspect", lora, "--row", "x"), "--row has to be left out where PATH is weights")


@pytest.mark.parametrize(
    "text, source, scale",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2.0),
        ("owner/name", "owner/name", 1.0),
        ("owner/name:v2", "owner/name:v2", 1.0),
        ("a:b:.25", "a:b", 0.25),
        ("a:0", "a", 0.0),
    ],
)
def test_a_scale_is_the_number_behind_the_last_colon(text, source, scale):
    assert cli._parse_lora(text) == (source, scale)


def test_edit_with_loras(edit, clip, lora, tmp_path):
    results = {}
    for name, given in dict(none=[], zero=[0], one=[1], halves=[0.5, 0.5]).items():
        more = [part for scale in given for part in ("--lora", f"{lora}:{scale}")]
        status, out, err = edit(clip, "--out", tmp_path / f"{name}.mp4", *more)
        assert status == 0, err
        results[name] = read_video(tmp_path / f"{name}.mp4").frames.astype(int)
    assert np.array_equal(results["none"], results["zero"])
    assert (results["none"] != results["one"]).any()
    assert np.abs(results["one"] - results["halves"]).mean() < np.abs(results["one"] - results["none"]).mean() / 4


def test_a_list_of_edits_takes_loras_in_all_rows(kiwi, random_model, clip, lora, tmp_path):
    (tmp_path / "edits.jsonl").write_text("\n".join(json.dumps(dict(video=str(clip), instruction=x)) for x in "ab"))
    run = lambda *more: kiwi(
        "edit", tmp_path / "edits.jsonl", "--model", random_model, "--steps", 1, "--out", tmp_path / "out", *more
    )
    assert run()[0] == 0
    plain = [read_video(path).frames for path in sorted((tmp_path / "out").glob("*.mp4"))]
    status, out, err = run("--lora", lora)
    assert status == 1 and "was made from other files or by another model" in err
    assert run("--lora", lora, "--overwrite")[0] == 0
    styled = [read_video(path).frames for path in sorted((tmp_path / "out").glob("*.mp4"))]
    assert len(plain) == len(styled) == 2 and all((a != b).any() for a, b in zip(plain, styled))
    status, out, err = run("--lora", lora)
    assert status == 0 and "2 of them before" in out


def test_loras_that_do_not_fit_are_said_before_weights_are_read(edit, clip, lora, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file
    from kiwi_edit.pipeline import KiwiEditPipeline

    monkeypatch.setattr(KiwiEditPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    refused(edit(clip, "--lora", tmp_path / "gone.safetensors"), "--lora has to be an existing file", "gone")
    refused(edit(clip, "--lora", f"{lora}:-1"), "--lora has to have a scale of 0 or more", ":-1")
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    large = {name.format("down"): torch.zeros(4, 5120), name.format("up"): torch.zeros(5120, 4)}
    save_file(large, tmp_path / "14b.safetensors")
    words = "--lora has to be a LoRA of this model", "2 tensors", "[5120, 4] times [4, 5120] for ["
    refused(edit(clip, "--lora", tmp_path / "14b.safetensors"), *words)
    (tmp_path / "half.safetensors").write_bytes(lora.read_bytes()[:200])
    refused(edit(clip, "--lora", tmp_path / "half.safetensors"), "whole safetensors file")


def test_a_file_of_weights_as_model_says_what_to_do(kiwi, clip, lora):
    words = "--model has to be a model folder or a hub id", "LoRA of rank 2", "kiwi-edit convert"
    refused(kiwi("edit", clip, "--instruction", "x", "--model", lora), *words)


def test_convert_takes_another_programs_denoiser(kiwi, random_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    from kiwi_edit.weights.checkpoints import _native_wan_name

    own = load_file(random_model / "transformer/diffusion_pytorch_model.safetensors")
    other = {f"model.diffusion_model.{_native_wan_name(name)}": (x * 2).contiguous() for name, x in own.items()}
    save_file(other, tmp_path / "wan.safetensors")
    status, out, err = kiwi("convert", random_model, tmp_path / "made", "--transformer", tmp_path / "wan.safetensors")
    assert status == 0, err
    made = load_file(tmp_path / "made/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(made[name].float(), 2 * x.float()) for name, x in own.items())
