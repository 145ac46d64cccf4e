"Published benches from their files to a report: names, runs that stop, rows that fail, judges that do not answer."

import csv
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from kiwi_edit.eval import published
from kiwi_edit.data.backends import OpenAIChat
from kiwi_edit.eval.judge import ChatJudge, MetricJudge, lay_beside
from kiwi_edit.eval.clips import DAMAGES
from kiwi_edit.core import InputError
from kiwi_edit.eval.published import (
    BenchReport,
    _output_name,
    _source_frames,
    edit_rows,
    judge_of,
    read_bench,
    score_rows,
    world_rows,
    write_imgedit_list,
)
from kiwi_edit.video import video_info, write_video

KEY = "sk-never-shown-77"
STEPS = 1


def moving(count=9, width=64, height=48, seed=0):
    "A textured clip that drifts."
    wide = (
        np.random.default_rng(seed)
        .integers(0, 256, (height // 4, width // 4 + count, 3), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)
    )
    return np.stack([wide[:, t : t + width] for t in range(count)])


class Tint:
    "An editor that is called as the pipeline is: it reddens the left half. An instruction with `fail` is too much for it."

    def __init__(self):
        self.seen = []

    def __call__(self, prompt, video=None, reference=None, num_inference_steps=None, generator=None):
        self.seen.append((prompt, np.shape(video), reference, num_inference_steps, generator.initial_seed()))
        if "fail" in prompt:
            raise InputError("`prompt` has to be one that this editor likes but is not.")
        edited = np.array(video)
        edited[:, :, : edited.shape[2] // 2, 0] = 230
        return SimpleNamespace(frames=[edited])


@pytest.fixture
def clips(tmp_path):
    "Folder with three clips and two references."
    folder = tmp_path / "bench"
    folder.mkdir()
    for k in range(3):
        write_video(folder / f"clip{k}.mp4", moving(seed=k), 15, crf=8)
    for k in range(2):
        Image.fromarray(moving(1, seed=9 + k)[0]).save(folder / f"ref{k}.png")
    return folder


def refvie(folder, rows=None):
    rows = (
        [
            ("clip0.mp4", "Replace the hat.", "ref0.png", "subject"),
            ("clip1.mp4", "Make it rain behind him.", "ref1.png", "background"),
            ("clip2.mp4", "Swap the dog.", "ref0.png", "subject"),
        ]
        if rows is None
        else rows
    )
    (folder / "refvie.yaml").write_text(
        yaml.safe_dump(
            [dict(src_video=a, instruction=b, ref_img=c, edit_type=d) for a, b, c, d in rows], allow_unicode=True
        )
    )
    return folder / "refvie.yaml"


def openve(folder, rows):
    with open(folder / "openve.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("original_video", "prompt", "edited_type"), *rows])
    return folder / "openve.csv"


# files of benches


def test_refvie_rows(clips):
    rows = read_bench("refvie", refvie(clips))
    assert [row.output for row in rows] == [
        "0_Replace th_clip0.mp4",
        "1_Make it ra_clip1.mp4",
        "2_Swap the d_clip2.mp4",
    ]
    assert [(row.edit_type, row.reference.name, row.source.parent) for row in rows[:2]] == [
        ("subject", "ref0.png", clips),
        ("background", "ref1.png", clips),
    ]
    assert rows[0].fields["instruction"] == rows[0].instruction == "Replace the hat."


def test_openve_passes_over_three_types_and_tells_twins_apart(clips, caplog):
    kinds = ("global_style", "creative_edit", "camera_edit", "subtitle_edit", "local_add", "local_remove")
    rows = read_bench(
        "openve",
        openve(
            clips,
            [("sub/../clip0.mp4" if kind == "local_remove" else "clip0.mp4", f"Do {kind}.", kind) for kind in kinds],
        ),
    )
    assert [(row.id, row.output) for row in rows] == [
        ("0", "clip0_edited.mp4"),
        ("4", "clip0_edited_2.mp4"),
        ("5", "clip0_edited_3.mp4"),
    ]
    assert "is that of row 0, too" in rows[1].note and "2 of 3 results get another name" in caplog.text


def test_names_that_differ_only_in_case_are_twins(clips):
    for name in ("Clip9.mp4", "clip9.mp4"):
        (clips / name).write_bytes((clips / "clip0.mp4").read_bytes())
    assert [
        row.output for row in read_bench("openve", openve(clips, [("Clip9.mp4", "a", "x"), ("clip9.mp4", "a", "x")]))
    ] == ["Clip9_edited.mp4", "clip9_edited_2.mp4"]


def test_imgedit_rows(clips):
    (clips / "pets").mkdir()
    Image.fromarray(moving(1)[0]).save(clips / "pets" / "cat.jpg")
    (clips / "imgedit.json").write_text(
        json.dumps(
            {
                "97": dict(id="pets/cat.jpg", prompt="Add a hat.", edit_type="add"),
                "98": dict(id="pets/cat.jpg", prompt="Remove it.", edit_type="remove"),
            }
        )
    )
    rows = read_bench("imgedit", clips / "imgedit.json")
    assert [row.output for row in rows] == ["add/97cat.jpg", "remove/98cat.jpg"]
    assert edit_rows(Tint(), rows, clips / "out", STEPS, progress=False).made == 2
    assert Image.open(clips / "out" / "add" / "97cat.jpg").size == (64, 32)  # a multiple of 32, cut from the middle
    lines = [json.loads(line) for line in write_imgedit_list(rows, clips / "out").read_text().splitlines()]
    assert (
        lines[0] == dict(key="97", id="pets/cat.jpg", prompt="Add a hat.", edit_type="add", output="add/97cat.jpg")
        and len(lines) == 2
    )


@pytest.mark.parametrize(
    "instruction, name",
    [
        ("../../etc/x", "0_.._.._etc__clip0.mp4"),
        ("a\\b:c*d?e", "0_a_b_c_d_e_clip0.mp4"),
        ("Füge\nhinzu", "0_Füge_hinzu_clip0.mp4"),
        ("..", "0_.._clip0.mp4"),
    ],
)
def test_no_instruction_leads_out_of_the_folder(clips, instruction, name):
    (row,) = read_bench("refvie", refvie(clips, [("clip0.mp4", instruction, "ref0.png", "subject")]))
    assert row.output == name and (clips / "out" / row.output).resolve().parent == (clips / "out").resolve()
    edit_rows(Tint(), [row], clips / "out", STEPS, progress=False)
    assert (clips / "out" / name).is_file()


@pytest.mark.parametrize(
    "row",
    [
        dict(edit_type=".."),
        dict(edit_type="a/b"),
        dict(edit_type="a\\b"),
        dict(source="pets/.."),
        dict(source="x" * 250 + ".png"),
    ],
)
def test_names_that_are_none_are_refused(row):
    with pytest.raises(ValueError, match="has to give a file name"):
        _output_name("imgedit", "97", dict(source="cat.png", instruction="x", edit_type="add") | row)


def test_endings_that_cannot_be_written(clips):
    (clips / "clip0.mp4").rename(clips / "clip0.avi")
    (row,) = read_bench("refvie", refvie(clips, [("clip0.avi", "Replace the hat.", "ref0.png", "subject")]))
    assert row.output == "0_Replace th_clip0.avi.mp4" and ".avi" in row.note


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (
            "refvie",
            "src_video: a",
            "has to be refvie's file but 'bench' is not: it has to hold a list of rows but holds a dict",
        ),
        ("refvie", "- [", "has to be refvie's file"),
        ("refvie", "- 5", "row 0 of 'bench' is '5'"),
        ("refvie", "[]", "at least one row to edit"),
        (
            "refvie",
            "- {src_video: clip0.mp4, instruction: 5, ref_img: ref0.png, edit_type: subject}",
            "text in the column 'instruction' but row 0 of 'bench' has 5",
        ),
        (
            "refvie",
            "- {src_video: clip0.mp4, instruction: x, ref_img: 7, edit_type: subject}",
            "text in the column 'ref_img' but row 0 of 'bench' has 7",
        ),
        (
            "refvie",
            "- {src_video: clip0.mp4, instruction: x, ref_img: ref0.png}",
            "'edit_type' but row 0 of 'bench' has None",
        ),
        ("openve", "video,prompt\na,b\n", "'original_video' but row 0 of 'bench' has None"),
        (
            "openve",
            "original_video,prompt,edited_type\nclip0.mp4,b,c\nclip1.mp4,  ,c\n",
            "'prompt' but row 1 of 'bench' has '  '",
        ),
        ("openve", "original_video,prompt,edited_type\na,b,c,d\n", "row 0 has 1 more fields"),
        ("openve", 'original_video,prompt,edited_type\na,"b', "has to be openve's file"),
        ("imgedit", "[]", "an object of rows but holds a list"),
        ("imgedit", '{"1": {"id": "a", "prompt": "\\ud800", "edit_type": "x"}}', "'prompt' but row 1 of 'bench' has"),
        (
            "imgedit",
            '{"../1": {"id": "clip0.mp4", "prompt": "b", "edit_type": ".."}}',
            "has to give a file name but gives '..': 'bench', row ../1",
        ),
        (
            "openve",
            "original_video,prompt,edited_type\nlost.mp4,b,c\n",
            "`root` has to be where the 1 sources of 'bench' are but none is there",
        ),
        ("openve", b"\xff\xfe\x00", "has to be openve's file"),
    ],
)
def test_bad_files_say_where(clips, kind, text, message):
    (clips / "bench").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_bench(kind, clips / "bench")


def test_bad_arguments(clips):
    with pytest.raises(ValueError, match="`kind` has to be one of refvie, openve, imgedit"):
        read_bench("kit", clips / "bench")
    with pytest.raises(FileNotFoundError, match="`path` has to be the file of a bench"):
        read_bench("refvie", clips / "lost.yaml")
    with pytest.raises(FileNotFoundError, match="`root` has to be a folder"):
        read_bench("refvie", refvie(clips), clips / "lost")
    with pytest.raises(ValueError, match="`rows` and `steps` have to be at least 1"):
        edit_rows(Tint(), [], clips / "out")
    with pytest.raises(ValueError, match="`part` has to be from 0 to 1"):
        edit_rows(Tint(), read_bench("refvie", refvie(clips)), clips / "out", part=2, parts=2)
    with pytest.raises(ValueError, match="`rows` and `steps` have to be at least 1 but are 3 and 0"):
        edit_rows(Tint(), read_bench("refvie", refvie(clips)), clips / "out", 0)


# making videos


def test_the_published_settings_reach_the_model(clips):
    tint = Tint()
    edit_rows(tint, read_bench("refvie", refvie(clips))[:1], clips / "out", progress=False)
    ((prompt, shape, reference, steps, seed),) = tint.seen
    assert (prompt, shape, steps, seed) == ("Replace the hat.", (9, 32, 64, 3), 50, 0) and reference.size == (64, 48)
    made = video_info(clips / "out" / "0_Replace th_clip0.mp4")
    assert (made.frames, made.fps, made.width, made.height) == (9, 15, 64, 32)


def test_long_and_large_sources_are_cut(clips):
    write_video(clips / "clip0.mp4", np.zeros((90, 32, 32, 3), np.uint8), 15, overwrite=True)
    row = read_bench("refvie", refvie(clips))[0]
    assert _source_frames(None, row).shape == (81, 32, 32, 3)
    limited = SimpleNamespace(config=SimpleNamespace(max_frames=5, max_pixels=16 * 16), size_multiple=8)
    assert _source_frames(limited, row).shape == (5, 16, 16, 3)


def test_rows_that_fail_do_not_stop_the_others(clips):
    rows = read_bench(
        "refvie",
        refvie(
            clips,
            [
                ("clip0.mp4", "a", "ref0.png", "subject"),
                ("clip1.mp4", "please fail", "ref0.png", "subject"),
                ("lost.mp4", "b", "ref0.png", "subject"),
                ("clip2.mp4", "c", "lost.png", "subject"),
            ],
        ),
    )
    made = edit_rows(Tint(), rows, clips / "out", STEPS, progress=False)
    assert (made.made, made.before, len(made.failed)) == (1, 0, 3) and str(made) == "1 of 4 videos there, 3 failed"
    lines = map(json.loads, (clips / "out" / "made.jsonl").read_text().splitlines())
    errors = {line["key"][0]: line["error"] for line in lines}
    assert (
        "this editor likes" in errors["1"]
        and errors["2"].startswith("`source` has to be")
        and errors["3"].startswith("`reference` has to be")
    )
    assert sorted(p.suffix for p in (clips / "out").iterdir()) == [".json", ".jsonl", ".mp4"]  # no half file
    report = score_rows(rows, clips / "out", MetricJudge(), clips / "scores", progress=False)
    assert report.counts == dict(scored=1, failed=0, missing=3) and "this editor likes" in report.records[1]["reason"]


def test_half_a_line_of_a_run_that_was_cut_is_left_out(clips, caplog):
    rows, out = read_bench("refvie", refvie(clips)), clips / "out"
    edit_rows(Tint(), rows[:1], out, STEPS, progress=False)
    with open(out / "made.jsonl", "ab") as file:
        file.write(b'[5]\n{"key": "hal')
    assert edit_rows(Tint(), rows[:2], out, STEPS, progress=False).made == 1
    assert (
        edit_rows(Tint(), rows, out, STEPS, progress=False).before == 2
        and "left out a line that is torn" in caplog.text
    )
    outputs = re.findall(r'"key": "([^"]+mp4)"', (out / "made.jsonl").read_text())
    assert outputs == [row.output for row in rows]
    assert score_rows(rows, out, MetricJudge(), clips / "scores", progress=False).counts["scored"] == 3


def test_what_is_there_is_not_made_again(clips):
    rows, tint = read_bench("refvie", refvie(clips)), Tint()
    for part in (0, 1):
        edit_rows(tint, rows, clips / "out", STEPS, part=part, parts=2, progress=False)
    assert [seen[0] for seen in tint.seen] == ["Replace the hat.", "Swap the dog.", "Make it rain behind him."]
    before = {p: p.stat().st_mtime_ns for p in (clips / "out").glob("*.mp4")}
    assert edit_rows(tint, rows, clips / "out", STEPS, progress=False).before == 3 and len(tint.seen) == 3
    (clips / "out" / rows[1].output).unlink()
    assert edit_rows(tint, rows, clips / "out", STEPS, progress=False).made == 1
    assert {
        p: p.stat().st_mtime_ns for p in (clips / "out").glob("*.mp4") if p.name != rows[1].output
    }.items() <= before.items()


def test_a_folder_belongs_to_one_model_and_its_settings(clips):
    rows = read_bench("refvie", refvie(clips))[:1]
    edit_rows(Tint(), rows, clips / "out", STEPS, about=dict(checkpoint="a"), progress=False)
    with pytest.raises(FileExistsError, match="of the same making but"):
        edit_rows(Tint(), rows, clips / "out", 2, about=dict(checkpoint="a"), progress=False)
    with pytest.raises(FileExistsError, match="of the same model but"):
        edit_rows(Tint(), rows, clips / "out", STEPS, about=dict(checkpoint="b"), progress=False)
    with pytest.raises(FileExistsError, match="was made for 'Replace the hat.'"):
        edit_rows(
            Tint(),
            [replace(rows[0], instruction="Another.")],
            clips / "out",
            STEPS,
            about=dict(checkpoint="a"),
            progress=False,
        )


def test_a_killed_run_leaves_no_half_video(clips):
    rows = read_bench("refvie", refvie(clips))

    class Killed(Tint):
        def __call__(self, prompt, **kwargs):
            if len(self.seen) == 1:
                raise KeyboardInterrupt
            return super().__call__(prompt, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        edit_rows(Killed(), rows, clips / "out", STEPS, progress=False)
    assert len(list((clips / "out").glob("*.mp4"))) == 1
    assert len((clips / "out" / "made.jsonl").read_text().splitlines()) == 1
    assert edit_rows(Tint(), rows, clips / "out", STEPS, progress=False).made == 2


def test_side_by_side(clips):
    row = read_bench("refvie", refvie(clips))[0]
    edit_rows(Tint(), [row], clips / "out", STEPS, concat=True, progress=False)
    assert video_info(clips / "out" / f"concat_{row.output}").width > 2 * 64


def test_the_kits_own_bench_as_rows(tmp_path):
    rows = world_rows(("subject", "plate"), 1)
    assert [row.output for row in rows] == ["subject/1000000.mp4", "plate/1000000.png"]
    for row in rows:
        (tmp_path / row.output).parent.mkdir(exist_ok=True)
        if row.output.endswith("png"):
            Image.fromarray(row.target[0]).save(tmp_path / row.output)
        else:
            write_video(tmp_path / row.output, row.target, 15, crf=5)
    report = score_rows(rows, tmp_path, MetricJudge(), tmp_path / "scores", progress=False)
    assert report.counts["scored"] == 2 and all(record["metrics"]["edit_done"] > 0.8 for record in report.records)
    write_video(tmp_path / rows[0].output, rows[0].target[:, :32], 15, overwrite=True)
    again = score_rows(rows, tmp_path, MetricJudge(), tmp_path / "scores", progress=False)
    assert (
        again.counts == dict(scored=1, failed=1, missing=0)
        and "96x96 pixels of its scene" in again.records[0]["reason"]
    )


def test_a_judge_adds_scores_to_what_the_targets_say(tmp_path):
    rows = world_rows(("add",), 2, difficulty="easy")
    exact = {row.instruction: row.target for row in rows}
    perfect = lambda prompt, **settings: SimpleNamespace(frames=[exact[prompt]])
    edit_rows(perfect, rows, tmp_path / "videos", STEPS, progress=False)
    report = score_rows(rows, tmp_path / "videos", MetricJudge(), tmp_path, progress=False)
    assert report.rows["add"]["pooled"] == 1 and report.counts["scored"] == 2
    text = report._repr_markdown_()
    assert "| add | 2 |" in text and "edit done" in text and "Scores, rubric openve" in text
    assert BenchReport.load(tmp_path / "report.json").rows == report.rows


def test_the_kits_own_bench_names_its_difficulty(tmp_path):
    for difficulty, name in (("full", "add/1000000.mp4"), ("easy", "easy/add/1000000.mp4")):
        (row,) = world_rows(("add",), 1, difficulty=difficulty)
        assert row.output == name and row.fields["difficulty"] == difficulty
        report = score_rows([row], tmp_path, MetricJudge(), tmp_path / difficulty, progress=False)
        assert (
            report.difficulty == difficulty
            and f"world: {difficulty}" in report._repr_markdown_()
            and f"world: {difficulty}" in (tmp_path / difficulty / "report.html").read_text()
        )
        assert BenchReport.load(tmp_path / difficulty / "report.json").difficulty == difficulty
    with pytest.raises(ValueError, match="`difficulty` has to be one of"):
        world_rows(("add",), 1, difficulty="hard")


# scoring


@pytest.fixture
def made(clips):
    "Rows and a folder of their results."
    rows = read_bench("refvie", refvie(clips))
    edit_rows(Tint(), rows, clips / "out", STEPS, progress=False)
    return rows, clips / "out", clips / "scores"


def test_every_row_is_accounted_for(made):
    rows, folder, out = made
    (folder / rows[0].output).write_bytes((folder / rows[0].output).read_bytes()[:300])
    (folder / rows[2].output).unlink()
    report = score_rows(rows, folder, MetricJudge(), out, progress=False)
    assert [record["status"] for record in report.records] == ["failed", "scored", "missing"]
    assert report.records[0]["reason"].startswith("`result` has to hold pictures") and report.summary.counts == dict(
        scored=1, failed=1, missing=1
    )
    text = report._repr_markdown_()
    assert "of 3 rows 1 scored, 1 failed, 1 missing" in text and "which is no model" in text and "no such file" in text
    data = json.loads((out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["is_model"] is False and BenchReport.load(out / "report.json").records == report.records


@pytest.mark.parametrize(
    "frames, message",
    [
        (moving(12), "at most the 9 frames of its source but has 12"),
        (moving(1), "a clip for a source of 9 frames but is one picture"),
    ],
)
def test_wrong_lengths_fail(made, frames, message):
    rows, folder, out = made
    write_video(folder / rows[0].output, frames, 15, overwrite=True)
    report = score_rows(rows[:1], folder, MetricJudge(), out, progress=False)
    assert report.counts["failed"] == 1 and message in report.records[0]["reason"]


def test_shorter_and_smaller_results_are_scored_and_noted(made):
    rows, folder, out = made
    write_video(folder / rows[0].output, moving(5, 96, 48), 15, overwrite=True)
    record = score_rows(rows[:1], folder, MetricJudge(), out, progress=False).records[0]
    assert (
        record["status"] == "scored"
        and record["note"] == "5 frames for 9 of the source; 96x48 for a source of 64x48"
        and record["frames"] == [5, 9]
    )
    beside = lay_beside(replace(rows[0], edited=folder / rows[0].output))
    assert beside.source.shape == beside.edited.shape == (5, 48, 96, 3)


def test_large_results_are_measured_small(made):
    rows, folder, _ = made
    write_video(folder / rows[0].output, moving(9, 640, 480), 15, overwrite=True)
    beside = lay_beside(replace(rows[0], edited=folder / rows[0].output))
    assert beside.edited.shape == beside.source.shape == (9, 192, 256, 3) and beside.note == ""


def test_sources_and_references_that_are_lost_cost_their_row(made):
    rows, folder, out = made
    rows[0].source.unlink()
    rows[1].reference.write_bytes(b"no picture")
    report = score_rows(rows, folder, MetricJudge(), out, progress=False)
    assert report.counts == dict(scored=1, failed=2, missing=0)
    assert report.records[0]["reason"].startswith("`source` has to be") or "No such file" in report.records[0]["reason"]
    assert report.records[1]["reason"].startswith("`reference` has to be")


def test_nothing_is_scored_twice_and_nothing_is_lost(made, monkeypatch):
    rows, folder, out = made
    first = score_rows(rows, folder, MetricJudge(), out, progress=False)
    log = out / "scores.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    log.write_bytes(b"".join(lines[:2]) + b"[5]\n" + lines[2][:40])  # a run that was killed while it wrote
    asked, measure_case = [], published.measure_case
    monkeypatch.setattr(published, "measure_case", lambda case: asked.append(case.id) or measure_case(case))
    again = score_rows(rows, folder, MetricJudge(), out, progress=False)
    assert asked == ["2"] and again.records == first.records
    write_video(folder / rows[0].output, moving(9, seed=5), 15, overwrite=True)  # another result is another question
    asked.clear()
    score_rows(rows, folder, MetricJudge(), out, progress=False)
    assert asked == ["0"]


def test_what_is_another_question_is_measured_again(made, monkeypatch):
    rows, folder, out = made
    asked, measure_case = [], published.measure_case
    monkeypatch.setattr(published, "measure_case", lambda case: asked.append(case.id) or measure_case(case))
    count = lambda row, judge=MetricJudge(): (score_rows([row], folder, judge, out, progress=False), len(asked))[1]
    assert count(rows[0]) == count(rows[0]) == count(replace(rows[0], id="another name")) == 1
    others = [
        replace(rows[0], instruction="x"),
        replace(rows[0], reference=rows[1].reference),
        replace(rows[0], source=rows[1].source),
        replace(rows[0], edit_type="background"),
        replace(rows[0], output=rows[1].output),
    ]
    assert [count(row) for row in others] == [2, 3, 4, 5, 6]
    other = type("Other", (MetricJudge,), dict(name="another judge"))()  # adds its scores to what was measured
    report = score_rows(rows[:1], folder, other, out, progress=False)
    assert len(asked) == 6 and report.counts["scored"] == 1 and {j.judge for j in report.judgements} == {other.name}


@pytest.mark.parametrize(
    "damage, criterion",
    [
        ("flicker", "Temporal Consistency & Texture Fidelity"),
        ("slide", "Physical Integration & Tracking"),
        ("freeze", "Physical Integration & Tracking"),
    ],
)
def test_damage_lowers_the_criterion_that_names_it(made, damage, criterion):
    rows, folder, out = made
    write_video(rows[0].source, moving(17, 128, 96), 15, overwrite=True)
    scores = []
    for name in ("intact", damage):
        frames = np.array(moving(17, 128, 96))
        frames[:, 20:60, 30:70, 0] = 220
        write_video(
            folder / rows[0].output, frames if name == "intact" else DAMAGES[name](frames), 15, overwrite=True, crf=10
        )
        scores.append(score_rows(rows[:1], folder, MetricJudge(), out, progress=False).records[0]["scores"][criterion])
    assert scores[1] < scores[0] - 0.5


def test_published_score_files(made, clips):
    rows, folder, out = made
    score_rows(rows, folder, MetricJudge(), out, progress=False)
    lines = [json.loads(line) for line in (out / "refvie_scores.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"scores", "result", "meta_info", "subtask"}] * 3 and [
        line["subtask"] for line in lines
    ] == ["subject", "background", "subject"]
    assert (
        len(lines[0]["scores"]) == 3
        and lines[0]["meta_info"] == rows[0].fields
        and lines[0]["result"].startswith("Identity Consistency & Compliance: ")
    )
    rows = read_bench("openve", openve(clips, [("clip0.mp4", "Make it red.", "global_style")]))
    edit_rows(Tint(), rows, clips / "more", STEPS, progress=False)
    score_rows(rows, clips / "more", MetricJudge(), clips / "more-scores", progress=False)
    (line,) = map(json.loads, (clips / "more-scores" / "openve_scores.jsonl").read_text().splitlines())
    assert set(line) == {"scores", "prompt", "edited_type", "result"} and (line["prompt"], line["edited_type"]) == (
        "Make it red.",
        "global_style",
    )


def test_the_page_is_whole_and_escaped(made):
    rows, folder, out = made
    rows[0] = replace(rows[0], instruction='<img src=x onerror="alert(1)">&')
    (folder / rows[1].output).unlink()
    score_rows(rows, folder, MetricJudge(), out, progress=False)
    page = (out / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=" in page and page.count("<figure>") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "no such file" in page and page.endswith("</html>\n")


def test_no_results_at_all(made, tmp_path):
    rows, _, out = made
    with pytest.raises(ValueError, match="`rows` has to hold at least one"):
        score_rows([], tmp_path, MetricJudge(), out)
    with pytest.raises(FileNotFoundError, match="`folder` has to be that of the results"):
        score_rows(rows, tmp_path / "lost", MetricJudge(), out)
    (tmp_path / "empty").mkdir()
    report = score_rows(rows, tmp_path / "empty", MetricJudge(), out, progress=False)
    assert (
        report.counts == dict(scored=0, failed=0, missing=3)
        and (out / "refvie_scores.jsonl").read_text() == ""
        and "<figure>" not in (out / "report.html").read_text()
    )


# judges that are models


class Server(ThreadingHTTPServer):
    "Chat completions: the next of `replies`, the last one for ever; a text, or (status, error)."

    daemon_threads = True

    def __init__(self, replies):
        self.replies, self.asked, self.lock = list(replies), [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(body)
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        status, content = (
            (
                200,
                dict(
                    id="c1",
                    object="chat.completion",
                    created=1760000000,
                    model="judge",
                    usage=dict(prompt_tokens=900, completion_tokens=40, total_tokens=940),
                    choices=[dict(index=0, message=dict(role="assistant", content=reply), finish_reason="stop")],
                ),
            )
            if isinstance(reply, str)
            else (reply[0], dict(error=reply[1]))
        )
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("content-type", "application/json"), ("content-length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def judge():
    "Called with replies, gives a judge and its server."
    servers = []

    def start(*replies):
        servers.append(Server(replies))
        chat = OpenAIChat(
            "judge", f"http://127.0.0.1:{servers[-1].server_port}/v1", api_key=KEY, timeout=5, tries=2, concurrency=1
        )
        return ChatJudge(chat, attempts=2, frames=2, side=64, prices=(1.0, 4.0)), servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SUBJECT = "Fine.\nIdentity Consistency & Compliance: 4\nTemporal Consistency & Texture Fidelity: 3\nPhysical Integration & Tracking: 2"
BACKGROUND = (
    "Reference Fidelity & Preservation: 5\nMatting Quality & Temporal Stability: 4\nVisual Harmony & Perspective: 4"
)
DOWN = (503, dict(message="overloaded", code=503))


def test_a_model_is_asked_its_cost_is_said_and_its_words_are_kept(made, judge):
    rows, folder, out = made
    model, server = judge(SUBJECT, BACKGROUND, SUBJECT)
    said = []
    report = score_rows(rows, folder, model, out, say=said.append, progress=False)
    assert (
        report.counts["scored"] == 3
        and report.is_model
        and report.records[0]["scores"]["Physical Integration & Tracking"] == 2
    )
    assert re.fullmatch(r"judge: about 3 calls, about [\d,]+ tokens in, 0.0\d USD", said[0]) and said[1].startswith(
        "judge: 3 calls, 2,700 tokens in, 0.00 USD"
    )
    assert json.loads((out / "refvie_scores.jsonl").read_text().splitlines()[0])["result"] == SUBJECT
    assert (
        "which is a model" in report._repr_markdown_()
        and "Kling-O1" in report._repr_markdown_()
        and "Fine." in (out / "report.html").read_text()
    )
    score_rows(rows, folder, model, out, say=said.append, progress=False)
    assert len(server.asked) == 3 and len(said) == 2
    assert not [path for path in out.parent.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_rubbish_and_partial_scores_fail_and_are_asked_again_later(made, judge):
    rows, folder, out = made
    model, server = judge(SUBJECT, "What a lovely clip.", "Reference Fidelity & Preservation: 5", SUBJECT)
    report = score_rows(rows, folder, model, out, progress=False)
    assert (
        [record["status"] for record in report.records] == ["scored", "failed", "scored"]
        and report.records[1]["reason"].startswith("rubbish")
        and report.records[1]["scores"] == {}
    )
    assert report.records[1]["judgement"]["replies"] == ["What a lovely clip.", "Reference Fidelity & Preservation: 5"]
    assert "Reference Fidelity" not in (out / "refvie_scores.jsonl").read_text()
    server.replies[:] = [BACKGROUND]
    again = score_rows(rows, folder, model, out, progress=False)
    assert again.counts["scored"] == 3 and len(server.asked) == 5


def test_a_judge_that_is_down_is_not_asked_for_ever(clips, judge):
    edits = [(f"clip{k % 3}.mp4", f"Edit {k}.", "ref0.png", "subject") for k in range(12)]
    rows = read_bench("refvie", refvie(clips, edits))
    edit_rows(Tint(), rows, clips / "out", STEPS, progress=False)
    model, server = judge(SUBJECT, SUBJECT, DOWN)
    report = score_rows(rows, clips / "out", model, clips / "scores", progress=False)
    assert report.counts == dict(scored=2, failed=10, missing=0)
    assert report.records[2]["reason"].startswith("endpoint: 503")
    assert report.records[-1]["reason"].startswith("not asked: 8 failures in a row")
    before = len(server.asked)
    server.replies[:] = [SUBJECT]
    assert score_rows(rows, clips / "out", model, clips / "scores", progress=False).counts["scored"] == 12
    assert len(server.asked) == before + 10


def test_quota_and_key_are_named(made, judge):
    rows, folder, out = made
    model, _ = judge(
        (429, dict(message="You exceeded your current quota", code="insufficient_quota", type="insufficient_quota"))
    )
    report = score_rows(rows, folder, model, out, progress=False)
    assert report.counts["failed"] == 3 and "quota" in report.records[0]["reason"]
    model, _ = judge((401, dict(message=f"Incorrect API key provided: {KEY}", code="invalid_api_key")))
    report = score_rows(rows, folder, model, out, progress=False)
    assert (
        report.counts["failed"] == 3
        and "401" in report.records[0]["reason"]
        and KEY not in report._repr_markdown_() + (out / "report.html").read_text()
    )


def test_judges_by_name(monkeypatch):
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert judge_of("metrics").name == "metrics (no model)"
    assert judge_of("openai:qwen3-vl@http://localhost:1/v1").chat.base_url == "http://localhost:1/v1"
    assert judge_of("openai:x@http://localhost:1/v1", extra=dict(temperature=1)).chat.extra == dict(temperature=1)
    for text in ("metrics", "gemini:gemini-2.5-pro", "transformers:x"):
        with pytest.raises(ValueError, match="`extra` has to be left out"):
            judge_of(text, extra=dict(temperature=1))
    for text in ("gemini", "gemini:gemini-2.5-pro", "openai:gpt-5"):
        with pytest.raises(ValueError, match="`judge` has to have its key in"):
            judge_of(text)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    assert [judge_of("gemini", bench).name for bench in ("refvie", "openve")] == [
        "gemini-3-flash-preview",
        "gemini-2.5-pro",
    ]
    assert judge_of("gemini:other").chat.thinking is None and KEY not in repr(judge_of("gemini"))
    for text in ("", "gpt-5", "openai:", "transformers:"):
        with pytest.raises(ValueError, match="`judge` has to be metrics, gemini"):
            judge_of(text)
