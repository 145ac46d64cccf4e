"""Lists of edits: what is refused, what is kept, and what a run that was stopped in the middle leaves behind."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from test_video import encode, gradient

import common
from kiwi_edit.apps import cli
from kiwi_edit.data import files
from kiwi_edit.core import asset
from kiwi_edit.data.files import _enlarged, read_edits, run_edits
from kiwi_edit.footage import follow_mask
from kiwi_edit.records import Workers
from kiwi_edit.video import read_video, resize_frames, video_info, write_video

MODEL = "kiwi-edit-tiny"
SNOW = "Make everything look snowy."
pytestmark = [
    pytest.mark.usefixtures("own_settings"),
    pytest.mark.skipif(not (asset() / MODEL / "model_index.json").is_file(), reason="the trained model is not there"),
]


@pytest.fixture
def folder(tmp_path):
    "The sample clip and a reference."
    for name in ("clip.mp4", "reference.png"):
        shutil.copy(asset("samples") / name, tmp_path)
    return tmp_path


def write(folder, *rows):
    "A list of edits; dicts for good rows, text for any line."
    path = folder / "edits.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def rows(number, **more):
    return [dict(video="clip.mp4", instruction=SNOW, seed=i) | more for i in range(number)]


def records(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def visible(out):
    return {p.name for p in out.iterdir() if not p.name.startswith(".")}


def left_behind(out):
    return {p.name for p in out.iterdir() if p.name.startswith(".")} - {".lock"}


# what is refused


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"video": "clip.mp4"', "`line` has to be a JSON object in UTF-8"),
        ("[" * 100_000, "`line` has to be a JSON object in UTF-8"),
        ('"clip.mp4"', "`line` has to be a JSON object but is"),
        (dict(instruction=SNOW), "`video` has to be given"),
        (dict(video="clip.mp4"), "`instruction` has to be given"),
        (dict(video="clip.mp4", instruction=" "), "`instruction` has to say what to edit"),
        (dict(video="clip.mp4", instruction=7), "`instruction` has to be a string"),
        (dict(video=["clip.mp4"], instruction=SNOW), "`video` has to be a path"),
        (dict(video="clip\0.mp4", instruction=SNOW), "`video` has to be an existing file"),
        (dict(video="edits.jsonl", instruction=SNOW), "`video` has to"),
        (dict(video="clip.mp4", prompt=SNOW, instruction=SNOW), "`instruction` has to be given once"),
        (dict(video="clip.mp4", instruction=SNOW, sede=1), "`line` has to have names out of"),
        (dict(video="clip.mp4", instruction=SNOW, reference="lost.png"), "`reference` has to be an existing file"),
        (dict(video="clip.mp4", instruction=SNOW, reference=[1]), "`reference` has to be a path or a list of paths"),
        (dict(video="clip.mp4", instruction=SNOW, out="sub/a.mp4"), "`out` has to be the name of a file"),
        (dict(video="clip.mp4", instruction=SNOW, out="..\\a.mp4"), "`out` has to be the name of a file"),
        (dict(video="clip.mp4", instruction=SNOW, out="a.avi"), "`out` has to end in"),
        (dict(video="clip.mp4", instruction=SNOW, out="a" * 252 + ".mp4"), "too long"),
        (dict(video="clip.mp4", instruction="snow\0"), "`instruction` has to be Unicode text without NUL"),
        (
            dict(video="clip.mp4", instruction=SNOW, out="GOOD.mp4"),
            "`out` has to be a name of its own but 'GOOD.mp4' is what row 1 writes",
        ),
        (dict(video="clip.mp4", instruction=SNOW, out="good.mov"), "'good-strip.png' is what row 1 writes"),
        (dict(video="clip.mp4", instruction=SNOW, seed=True), "`seed` has to be a whole number but is True"),
        (dict(video="clip.mp4", instruction=SNOW, seed=-1), "`seed` has to be from 0"),
        (dict(video="clip.mp4", instruction=SNOW, strength=10**400), "`strength` has to be a number"),
        ('{"video": "clip.mp4", "instruction": "x", "strength": NaN}', "`strength` has to lie above 0"),
        (dict(video="clip.mp4", instruction=SNOW, size=[64]), '`size` has to be "WIDTHxHEIGHT" or [width, height]'),
        (dict(video="clip.mp4", instruction=SNOW, compare="yes"), "`compare` has to be true or false"),
        (dict(video="clip.mp4", instruction=SNOW, mask=""), "`mask` has to be a path, or a box"),
        (dict(video="clip.mp4", instruction=SNOW, mask=[0, 0, 2, 1]), "`mask` has to be images, or a box"),
        (dict(video="clip.mp4", instruction=SNOW, mask="lost.png"), "`mask` has to be an existing file"),
        (dict(video="clip.mp4", instruction=SNOW, follow=True), "`follow` has to be left out where there is no"),
        (dict(video="clip.mp4", instruction=SNOW, reference_scale=-1), "`reference_scale` has to be a number from 0"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_made(folder, row, words):
    edits = read_edits(write(folder, dict(video="clip.mp4", instruction=SNOW, out="good.mp4"), "", row), folder / "out")
    assert [r.number for r in edits.rows] == [1] and len(edits.bad) == 1
    assert str(edits.bad[0]).startswith("row 3: ") and words in str(edits.bad[0])
    with pytest.raises(files.BadEdits, match="1 of 2 rows are bad"):
        run_edits(edits, "never-looked-up")
    assert not (folder / "out").exists()


def test_rows_do_not_write_what_others_read(folder):
    path = write(
        folder,
        dict(video="clip.mp4", instruction=SNOW, out="clip.mp4"),
        dict(video="clip.mp4", instruction=SNOW, out="new.mp4"),
    )
    assert [b.number for b in read_edits(path, folder).bad] == [1] and not read_edits(path, folder / "out").bad


def test_what_is_wrong_with_the_whole_list_is_said_once(folder, monkeypatch):
    path = write(folder, *rows(3))
    for wrong, words in (
        (dict(strength=0.0), "`strength` has to lie"),
        (dict(reference="lost.png"), "`reference` has to be an existing file"),
        (dict(out=folder / "clip.mp4"), "`out` has to be a folder"),
    ):
        with pytest.raises((ValueError, OSError), match=re.escape(words)):
            read_edits(path, **dict(out=folder / "out") | wrong)
    with pytest.raises(ValueError, match="at least one edit"):
        read_edits(write(folder, "", " "), folder / "out")
    from kiwi_edit import pipeline

    monkeypatch.setattr(pipeline.KiwiEditPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(files.BadEdits, match="row 2: `size` has to be multiples of 8"):
        run_edits(read_edits(write(folder, *rows(1), *rows(1, size="60x64", out="b.mp4")), folder / "out"), MODEL)
    assert not (folder / "out").exists()


def test_a_folder_is_for_one_run_at_a_time(folder):
    (folder / "out").mkdir()
    with FileLock(folder / "out" / ".lock"), pytest.raises(ValueError, match="no other run writes to"):
        run_edits(read_edits(write(folder, *rows(1)), folder / "out"), MODEL)


@pytest.mark.parametrize("text", ["a list of groceries", "a list of groceries\n", '["a"]\n', '{"a": 1}\n'])
def test_results_that_no_list_has_written_are_left_alone(folder, text):
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="was written by a list of edits"):
        run_edits(read_edits(write(folder, *rows(1, out="a.mp4")), folder), MODEL)
    assert (folder / "results.jsonl").read_text(encoding="utf-8") == text


# names


def test_names_of_results_fit(tmp_path):
    for stem in ("a" * 240, "é" * 120, "視" * 84, os.fsdecode(b"\xe9" * 240)):
        names = [files._file_name(stem + more, "-edited.mp4") for more in ("", "b")]
        assert len(set(names)) == 2
        assert all(name.startswith(stem[:50]) and name.endswith("-edited.mp4") for name in names)
        for name in names:
            (tmp_path / f"{Path(name).stem}-compare.mp4").touch()  # the longest that is written beside it
    assert files._file_name("clip", "-edited.mp4") == "clip-edited.mp4"


def test_a_long_name_has_a_default_output(folder):
    long = (folder / "clip.mp4").rename(folder / f"{'a' * 240}.mp4")
    plan = files.plan_edit(long, SNOW, compare=True)
    for path in (plan.out, plan.strip, plan.comparison):
        path.touch()
    edits = read_edits(write(folder, dict(video=long.name, instruction=SNOW)), folder / "out")
    assert len(edits.rows) == 1 and not edits.bad


# what is kept


def test_only_what_is_missing_is_done(folder):
    out = folder / "out"
    path = write(folder, *rows(2, steps=1), dict(video="clip.mp4", instruction=SNOW, out="cut.mp4", steps=1))
    first = run_edits(read_edits(path, out), MODEL)
    assert first.counts == dict(done=3, failed=0, bad=0) and left_behind(out) == set()
    times = {name: (out / name).stat().st_mtime_ns for name in visible(out)}
    (out / "cut.mp4").unlink()
    path = write(
        folder,
        *rows(2, steps=1),
        dict(video="clip.mp4", instruction=SNOW, out="cut.mp4", steps=1),
        *rows(1, steps=1, out="more.mp4", seed=9),
    )
    again = run_edits(read_edits(path, out), MODEL)
    assert (again.before, again.counts["done"]) == (2, 4)
    assert [(r["row"], r["out"]) for r in records(out)] == [
        (1, "0001-clip.mp4"),
        (2, "0002-clip.mp4"),
        (3, "cut.mp4"),
        (4, "more.mp4"),
    ]
    assert all((out / name).stat().st_mtime_ns == times[name] for name in ("0001-clip.mp4", "0002-clip.mp4"))

    # another seed, and then another clip of that name
    reseeded = write(folder, dict(video="clip.mp4", instruction=SNOW, seed=5, steps=1))
    with pytest.raises(files.BadEdits, match="'0001-clip.mp4' was made with another seed"):
        run_edits(read_edits(reseeded, out), MODEL)
    path = write(folder, *rows(2, steps=1), *rows(1, steps=1, out="cut.mp4"), *rows(1, steps=1, out="more.mp4", seed=9))
    (folder / "clip.mp4").write_bytes(asset("samples/clip.mp4").read_bytes() + b"\0" * 8)
    with pytest.raises(files.BadEdits, match="was made from other files or by another model"):
        run_edits(read_edits(path, out), MODEL)
    assert all((out / name).stat().st_mtime_ns == times[name] for name in ("0001-clip.mp4", "0002-clip.mp4"))
    (out / "results.jsonl").unlink()  # now they are files of which nobody knows
    with pytest.raises(files.BadEdits, match="4 of 4 rows are bad.* exists"):
        run_edits(read_edits(path, out), MODEL)


def test_a_result_without_a_line_is_made_again(folder, monkeypatch):
    "Killed after the file got its name and before its line was written; then the row is changed back to what the last line says."
    out = folder / "out"
    make = lambda seed: read_edits(write(folder, *rows(1, seed=seed, steps=1)), out)
    run_edits(make(1), MODEL)
    wanted = (out / "0001-clip.mp4").read_bytes()

    def killed(*arguments):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr("kiwi_edit.records.append_line", killed)
        with pytest.raises(SystemExit):
            run_edits(make(2), MODEL, overwrite=True)
    assert (out / "0001-clip.mp4").read_bytes() != wanted and records(out)[0]["status"] == "failed"
    done = run_edits(make(1), MODEL)
    assert done.before == 0 and (out / "0001-clip.mp4").read_bytes() == wanted and left_behind(out) == set()


def test_a_fault_fails_its_row_and_keeps_its_traceback(folder, monkeypatch):
    real = files.run_edit
    monkeypatch.setattr(
        files, "run_edit", lambda pipe, plan, progress: 1 / 0 if plan.seed == 0 else real(pipe, plan, progress)
    )
    run = run_edits(read_edits(write(folder, *rows(2, steps=1)), folder / "out"), MODEL)
    assert run.counts == dict(done=1, failed=1, bad=0)
    failed = records(folder / "out")[0]
    assert failed["error"] == "ZeroDivisionError: division by zero" and "1 / 0" in failed["traceback"]


# processes


def run_list(path, out):
    "The command on a list, in a group of processes of its own; its workers are forked, which is quick."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    common.fork_workers()
    sys.exit(cli.main(["edit", str(path), "--out", str(out), "--workers", "2", "--skip-bad"]))


def test_what_a_matte_leaves_alone_keeps_its_own_pixels():
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    small = resize_frames(source, 24, 16, mode="stretch")
    edited = small.copy()
    edited[:, 8:, 12:] = 255 - edited[:, 8:, 12:]
    pipe = lambda channels: SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(out_channels=channels)),
        vae=SimpleNamespace(config=SimpleNamespace(z_dim=32)),
    )
    pieces = [edited[:1], edited[1:5], edited[5:]]
    found = np.concatenate(list(_enlarged(pipe(96), pieces, source, 96, 64)))
    assert np.array_equal(found[:, :24], source[:, :24]) and np.array_equal(found[:, :, :36], source[:, :, :36])
    plain = np.concatenate(list(_enlarged(pipe(32), pieces, [], 96, 64)))
    assert np.array_equal(plain, resize_frames(edited, 96, 64, mode="stretch"))
    assert np.array_equal(found[:, 44:, 62:], plain[:, 44:, 62:])
    [same] = _enlarged(pipe(96), [source], [], 96, 64)
    assert np.array_equal(same, source)


def test_what_a_mask_leaves_alone_keeps_its_own_pixels():
    rng = np.random.default_rng(0)
    source, edited = (rng.integers(0, 256, (6, *size, 3), dtype=np.uint8) for size in ((64, 96), (16, 24)))
    mask = rng.random((6, 64, 96)) > 0.5
    mask[:, :, :48] = True
    same = SimpleNamespace(config=SimpleNamespace(out_channels=32, z_dim=32))
    pipe = SimpleNamespace(transformer=same, vae=same)
    pieces = [edited[:1], edited[1:5], edited[5:]]
    found = np.concatenate(list(_enlarged(pipe, pieces, source, 96, 64, mask)))
    assert np.array_equal(found[~mask], source[~mask])
    assert np.array_equal(found[:, :, :40], resize_frames(edited, 96, 64, mode="stretch")[:, :, :40])


def stopped(folder, until, stop):
    "Run it, and send it a signal when it has got somewhere; its exit code and what it said."
    said = folder / "said"
    process = common.start(run_list, folder / "edits.jsonl", folder / "out", said=said, OMP_NUM_THREADS="1")
    common.wait_until(process, lambda: re.search(until, Path(f"{said}.err").read_text()))
    stop(process.pid)
    process.join(300)
    found = [Path(f"{said}{suffix}") for suffix in (".out", ".err")]
    texts = [file.read_text() for file in found]
    for file in found:
        file.unlink()
    return process.exitcode, *texts


def test_a_list_that_is_stopped_twice_ends_with_the_same_results(folder, capfd, one_thread):
    path = write(
        folder,
        *rows(6),
        dict(
            video="clip.mp4", instruction="Erase the flamingo from the clip.", reference="reference.png", compare=True
        ),
        '{"video": ',
    )
    out = folder / "out"
    late = True

    def interrupt(pid):
        nonlocal late
        late = "7/7 rows" in (folder / "said.err").read_text()  # on a busy machine the list may be faster than we are
        os.killpg(pid, signal.SIGINT)  # Ctrl-C reaches all of them

    while late:
        shutil.rmtree(out, ignore_errors=True)
        status, said, err = stopped(folder, "[1-6]/7 rows", interrupt)
    assert (status, said) == (130, "") and "Traceback" not in err and "leaked" not in err, err
    done = int(re.search(r"error: interrupted; (\d) of 7 rows are done; the same command goes on from here\n$", err)[1])
    assert 1 <= done < 7 and sum(r["status"] == "done" for r in records(out)) == done and left_behind(out) == set()
    status, *_ = stopped(folder, f"[{done + 1}-7]/7 rows", lambda pid: os.kill(pid, signal.SIGKILL))
    assert status in (-9, 1)  # 1 where the last rows came too quickly
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "1", "sta')  # a line that was cut
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["edit", str(path), "--out", str(out), "--skip-bad"])
    said, err = capfd.readouterr()
    assert stop.value.code == 1 and "row 8 bad: `line` has to be a JSON object" in err
    assert re.search(r"7 of 8 rows done, \d of them before, 1 bad", said)
    assert [(r["row"], r["status"]) for r in records(out)] == [(k, "done") for k in range(1, 8)] + [(8, "bad")]
    assert left_behind(out) == set()

    alone = run_edits(read_edits(path, folder / "alone"), MODEL, skip_bad=True)
    assert alone.counts == dict(done=7, failed=0, bad=1) and visible(out) == visible(folder / "alone")
    assert "0007-clip-compare.mp4" in visible(out)
    for name in visible(out) - {"results.jsonl"}:
        assert (out / name).read_bytes() == (folder / "alone" / name).read_bytes(), name
    assert [r["key"] for r in records(out)] == [r["key"] for r in records(folder / "alone")]


def test_ctrl_c_waits_while_a_process_begins(monkeypatch):
    begin = lambda self, *arguments: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", begin)
    with Workers(1, print) as workers, pytest.raises(KeyboardInterrupt):
        workers.submit(print)


START = files._start_worker  # before it is replaced


def start_and_die(*arguments):
    "What a process of a pool does first; it is killed in the edit with seed 1, after the result is written."
    real = files.run_edit

    def run_edit(pipe, plan, progress):
        done = real(pipe, plan, progress)
        if plan.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    files.run_edit = run_edit
    START(*arguments)


def test_a_process_that_is_killed_fails_one_row_and_is_replaced(folder, monkeypatch):
    shutil.copy(folder / "clip.mp4", folder / "passing.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_start_worker", start_and_die)
        patch.setattr(multiprocessing, "get_context", lambda kind: common.CONTEXT)
        edits = read_edits(
            write(
                folder, *rows(3), dict(video="lost.mp4", instruction=SNOW), dict(video="passing.mp4", instruction=SNOW)
            ),
            folder / "out",
        )
        assert [b.number for b in edits.bad] == [4]
        (folder / "passing.mp4").unlink()  # while others are at work
        run = run_edits(edits, MODEL, workers=2, skip_bad=True)
    assert run.lost == 1 and run.counts == dict(done=2, failed=2, bad=1) and not multiprocessing.active_children()
    lost = [r for r in records(folder / "out") if r["status"] == "failed" and r["seconds"] is None]
    assert [r["row"] for r in lost] == [2] and left_behind(folder / "out") == set()
    shutil.copy(folder / "clip.mp4", folder / "passing.mp4")
    again = run_edits(read_edits(folder / "edits.jsonl", folder / "out"), MODEL, skip_bad=True)
    assert again.counts == dict(done=4, failed=0, bad=1) and again.before == 2 and left_behind(folder / "out") == set()


def test_the_whole_of_a_file_counts(folder):
    "A sample of its bytes would not tell these two apart."
    picture = folder / "reference.png"
    data = picture.read_bytes()
    path = write(folder, dict(video="clip.mp4", instruction=SNOW, reference="reference.png"))
    marks = []
    for value in (1, 2):
        picture.write_bytes(data + bytes(1 << 20) + bytes([value]) * 900_000 + bytes((32 << 20) - 900_000))
        marks.append(read_edits(path, folder / "out").rows[0].inputs)
    assert marks[0] != marks[1]


# clips that are longer than the model takes


@pytest.fixture(scope="module")
def pipe():
    return files.load_model(MODEL, "cpu")


def test_a_long_clip_flows_from_file_to_file(tmp_path, pipe, monkeypatch):
    source = encode(tmp_path / "source.mp4", gradient(30), fps=10, sound=3.0)
    monkeypatch.setattr(
        files,
        "resize_frames",
        lambda frames, *args, resize=files.resize_frames, **kwargs: (
            longest.append(len(frames)) or resize(frames, *args, **kwargs)
        ),
    )
    longest, seen = [], []
    done = files.edit_file(
        pipe,
        source,
        SNOW,
        out=tmp_path / "out.mp4",
        whole=True,
        compare=True,
        steps=1,
        progress=lambda *told: seen.append(told),
    )
    info, both = video_info(done.path), video_info(done.comparison)
    before = video_info(source)
    assert (info.frames, info.fps, info.has_audio, info.width, info.height) == (
        29,
        10,
        True,
        before.width,
        before.height,
    )
    assert (both.frames, both.fps, both.has_audio) == (29, 10, True) and done.frames == 29 and "4k+1" in done.note
    assert max(longest) <= 16  # never the whole clip at its own size
    assert (29, 29, "writing") in seen and (29, 29, "comparing") in seen and done.strip.is_file()
    # the first five frames alone are the model's own business
    short = files.edit_file(pipe, source, SNOW, out=tmp_path / "short.mp4", steps=1)
    assert short.frames == 5 and "`whole` edits all" in short.note


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_holds_at_the_sources_size(tmp_path, pipe, whole):
    count, frames = 13 if whole else 5, gradient(14)
    for t in range(14):
        Image.fromarray(frames[t]).save(tmp_path / f"{t:02}.png")
    seen, made = [], []
    write = lambda path, frames, *args, **options: made.append(frames if isinstance(frames, np.ndarray) else [*frames])
    with pytest.MonkeyPatch.context() as patch:  # before a file format rounds it
        patch.setattr(files, "write_video", write)
        patch.setattr(files, "film_strip", lambda rows, **options: seen.append(rows) or SimpleNamespace(save=print))
        patch.setattr(files, "replacing", lambda path, overwrite: contextlib.nullcontext(path))
        files.edit_file(pipe, tmp_path, SNOW, out=tmp_path.parent / "o.mp4", whole=whole, mask="0.25,0,1,0.5", steps=1)
    made = np.concatenate(made[0]) if whole else made[0]
    height, width = frames.shape[1:3]
    inside = np.zeros((height, width), bool)
    inside[: round(height / 2), round(width / 4) :] = True
    assert made.shape == frames[:count].shape and np.array_equal(made[:, ~inside], frames[:count, ~inside])
    assert (made[:, inside] != frames[:count, inside]).mean() > 0.3
    assert list(seen[0]) == ["source", "mask", "result"] and np.array_equal(seen[0]["mask"][0], inside)


def test_a_mask_follows_in_files_and_lists(folder, pipe):
    info = video_info(folder / "clip.mp4")
    mask = np.zeros((info.height, info.width), np.uint8)
    mask[info.height // 4 : info.height // 2, info.width // 4 : info.width // 2] = 255
    (folder / "masks").mkdir()
    Image.fromarray(mask).save(folder / "masks/mask.png")
    plan = files.plan_edit(folder / "clip.mp4", SNOW, out=folder / "o.mp4", mask=folder / "masks/mask.png", follow=True)
    expected = follow_mask(read_video(folder / "clip.mp4", num_frames=5).frames, mask > 0)
    assert np.array_equal(plan.masks(5), expected)
    row = dict(video="clip.mp4", instruction=SNOW, mask="masks/mask.png", follow=True, reference_scale=0.5)
    [found] = read_edits(write(folder, row), folder / "out").rows
    assert found.plan.mask == folder / "masks/mask.png" and found.plan.follow and found.plan.reference_scale == 0.5
    [other] = read_edits(write(folder, row | dict(mask=[0, 0, 0.5, 1], follow=False)), folder / "out").rows
    assert other.inputs != found.inputs and other.plan.masks(5).mean() == pytest.approx(0.5, abs=0.01)
    Image.fromarray(255 - mask).save(folder / "masks/mask.png")
    assert read_edits(write(folder, row), folder / "out").rows[0].inputs != found.inputs
    bad = read_edits(write(folder, row | dict(out="mask.png", video="one.png")), folder / "masks")
    assert bad.bad, "a result does not take the place of a mask"
    assert run_edits(read_edits(write(folder, row), folder / "out"), MODEL, "cpu").counts["done"] == 1
    with pytest.raises(ValueError, match="`out` has to be another file than those that are read"):
        files.plan_edit(
            folder / "clip.mp4", SNOW, out=folder / "o.mp4", mask=shutil.copy(folder / "clip.mp4", folder / "o.mp4")
        )


def test_a_clip_of_masks_has_as_many_frames_as_are_edited(folder):
    info = video_info(folder / "clip.mp4")
    frames = np.zeros((3, info.height, info.width, 3), np.uint8)
    frames[1] = 255
    write_video(folder / "masks.mp4", frames, 8)
    plan = files.plan_edit(folder / "clip.mp4", SNOW, out=folder / "o.mp4", mask=folder / "masks.mp4")
    with pytest.raises(ValueError, match="`mask` has to hold 1 or 5 images but holds 3"):
        plan.check(files.Limits(5, 96 * 96, 8, 1))
    with pytest.raises(ValueError, match="`mask` has to have the shape of the source, which is"):
        files.plan_edit(folder / "clip.mp4", SNOW, out=folder / "o.mp4", mask=np.ones((20, 90), bool))
    with pytest.raises(ValueError, match="`mask` has to be white where the edit may go"):
        files.plan_edit(folder / "clip.mp4", SNOW, out=folder / "o.mp4", mask=np.zeros((info.height, info.width), bool))


def test_a_long_clip_that_fails_on_the_way_leaves_nothing(tmp_path, pipe, monkeypatch):
    source = encode(tmp_path / "source.mp4", gradient(13), fps=10)
    real = pipe.vae.decoder.forward
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("on purpose")
        return real(*args, **kwargs)

    monkeypatch.setattr(pipe.vae.decoder, "forward", breaks)
    with pytest.raises(RuntimeError, match="on purpose"):
        files.edit_file(pipe, source, SNOW, out=tmp_path / "out.mp4", whole=True, steps=1)
    assert [p.name for p in tmp_path.iterdir()] == ["source.mp4"]


def test_frames_and_whole_are_asked_for_one_at_a_time(folder):
    with pytest.raises(ValueError, match="`frames` has to be left out where `whole` is set but is 5"):
        files.plan_edit(folder / "clip.mp4", SNOW, out=folder / "out.mp4", frames=5, whole=True)


# whose fault an error is


def test_the_class_of_an_error_says_whose_fault_it_is():
    from safetensors import SafetensorError
    from kiwi_edit.core import InputError, InputTypeError, MissingPackage
    from kiwi_edit.data.dataset import BadRow

    message = "`seed` has to be at least 0 but is -1."
    for error in (InputError(message), InputTypeError(message)):
        assert files.one_line(error, dict(seed="--seed")) == "--seed" + message[6:]
    for error in (
        ValueError(message),
        TypeError(message),
        KeyError(message),
        RuntimeError(message),
        ImportError(message),
    ):
        assert files.one_line(error) is None
    assert files.one_line(BadRow(1, "a.csv row 1", "no file")) == "a.csv row 1: no file"
    assert "No space left" in files.one_line(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert files.one_line(OSError(28, "No space left on device", "x.mp4")) == "No space left on device: x.mp4"
    assert files.one_line(OSError("a library's own words")) == "a library's own words"
    assert files.one_line(MissingPackage("`x` has to be installed")) == "`x` has to be installed"
    assert files.one_line(ModuleNotFoundError("No module named 'kiwi_edit.nothing'", name="kiwi_edit.nothing")) is None
    assert len(files.one_line(InputError("`path` has to be shorter but is " + "x" * 5000))) == 300
