"Loading, parsing, stages and duplicates of the quadruplet pipeline."

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kiwi_edit.data.embedded import *
from kiwi_edit.quadruplets import *
from kiwi_edit.data.embedded import _fill_patches, _parse_instruction
from kiwi_edit.world import World

WORLD = World()


def pair(seed, task=None, **changes):
    made = WORLD.sample(seed, task)
    given = dict(id=f"{seed:04d}", source=made.source, edited=made.target, instruction=made.instruction)
    return Pair(**given | changes)


def bytes_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def run(pairs):
    records = [load_record(p) for p in pairs]
    for stage in embedded_stages():
        records = stage(records)
    return records


@pytest.mark.parametrize(
    "text, task, subject",
    [
        ("Replace the orange sweater with a cozy blue winter jacket.", "change", "cozy blue winter jacket"),
        ("Replace the plant with broad leaves with a lush tropical palm plant.", "change", "lush tropical palm plant"),
        ("Add a classic brown fedora hat to the boy's head.", "add", "classic brown fedora hat"),
        ("Remove the small bird.", "remove", "small bird"),
    ],
)
def test_parse(text, task, subject):
    found = _parse_instruction(text)
    assert (found.task, found.subject) == (task, subject)


def test_world_tasks_are_parsed():
    for seed in range(200):
        made = WORLD.sample(seed)
        assert _parse_instruction(made.instruction).task == made.task, made.instruction


RED = bytes_of(Image.new("RGB", (24, 24), "red"), "AVIF")
TORN = "unreadable reference: `path` has to be a complete image"


@pytest.mark.parametrize(
    "reason, changes",
    [
        ("lengths differ", dict(edited=pair(0).edited[:3])),
        ("sizes differ", dict(edited=pair(0).edited[:, :32])),
        ("unreadable edited", dict(edited="bad.mp4")),
        ("unreadable source", dict(source="none.mp4")),
        ("unreadable reference", dict(reference=b"rubbish")),
        (TORN, dict(reference=bytes_of(Image.new("1", (20000, 20000))))),  # DecompressionBombError
        (TORN, dict(reference=RED[:-9])),  # SyntaxError
        (TORN, dict(reference=RED[:-40] + bytes(40))),  # RuntimeError
        ("unreadable instruction", dict(instruction="Add a hat \ud83d.")),
        ("unknown task", dict(task="dance")),
    ],
)
def test_what_one_row_cannot_be_is_a_verdict_of_that_row(reason, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.mp4").write_bytes(b"no video" * 99)
    record = load_record(replace(pair(0), **changes))
    assert not record.alive and record.verdicts[0].reason.startswith(reason)


def test_a_clip_without_a_name_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(WORLD.sample(0).source[0]).save("holiday.png")
    assert load_record(pair(0, source="")).verdicts[0].reason == "unreadable source: no file is named"


def test_a_reference_is_the_same_as_bytes_and_as_a_file(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    found = []
    for data in (bytes_of(Image.new("RGBA", (30, 20))), bytes_of(Image.new("RGB", (30, 20), "red"), exif=turned)):
        (tmp_path / "a.png").write_bytes(data)
        a, b = (load_record(pair(0, reference=r)).authentic_reference for r in (data, str(tmp_path / "a.png")))
        assert np.array_equal(a, b)
        found.append(a)
    assert found[0].min() == 255 and found[1].shape == (30, 20, 3)


def test_no_pictures_have_no_vectors():
    assert PixelEmbedder().embed([]).shape == (0, PixelEmbedder().embed([WORLD.sample(0).source[0]]).shape[1])


def test_defects_are_caught():
    for seed in range(4):
        good = pair(seed, "add")
        dark = good.edited.copy()
        dark[2] = 0
        for edited, reason in ((good.source, "no edit done"), (dark, "broken frames")):
            assert run([pair(seed, "add", edited=edited)])[0].verdicts[-1].reason == reason


def test_no_reference_for_removals_and_styles():
    for record in run([pair(1, "remove"), pair(2, "style")]):
        assert not record.alive and record.reference is None


def test_grounding_agrees_with_the_world():
    seeds = range(12)
    truth = [WORLD.sample(s, "add").mask for s in seeds]
    found = [r.changed for r in run([pair(s, "add") for s in seeds])]
    assert np.mean([(f & m).sum() / (f | m).sum() for f, m in zip(found, truth) if f is not None]) > 0.9


def test_duplicates_do_not_depend_on_order():
    pairs = [pair(s, "add") for s in range(6)] + [pair(s, "add", id=f"z{s}") for s in range(3)]
    kept = []
    for order in range(2):
        random.Random(order).shuffle(pairs)
        records = run(pairs)
        deduplicate(records)
        kept.append({r.pair.id for r in records if r.alive})
    assert kept[0] == kept[1] and kept[0] and not any(k.startswith("z") for k in kept[0])


def test_backend_error_drops_one_record():
    class Refuses:
        name = "refuses"

        def score(self, records):
            return [BackendError("refused: no")] + [dict(edit=1.0)] * (len(records) - 1)

    records = ScoreStage(Refuses())([load_record(pair(0)), load_record(pair(1))])
    assert [r.alive for r in records] == [False, True] and records[0].verdicts[-1].reason == "refused: no"


def test_inpaint_fills_a_flat_hole():
    image, hole = np.full((60, 80, 3), 120, np.uint8), np.zeros((60, 80), bool)
    hole[20:40, 30:50] = True
    spoiled = np.where(hole[..., None], np.uint8(0), image)
    assert abs(_fill_patches(spoiled, hole).astype(int) - 120).max() <= 4


@pytest.mark.parametrize(
    "task, turned, words, least",
    [
        ("add", True, None, 10),  # what came has gone
        ("add", False, "Remove the thing.", 10),
        ("remove", True, None, 10),
        ("remove", False, "Add a thing.", 10),
        (
            "background",
            False,
            "Make the video look like a pencil drawing.",
            8,
        ),  # where what stands in front has a colour
        ("style", False, "Replace the background with a beach.", 9),
    ],
)
def test_what_came_went_or_stayed_is_held_against_the_words(task, turned, words, least):
    caught = 0
    for seed in range(10):
        good = pair(seed, task)
        clips = dict(source=good.edited, edited=good.source) if turned else {}
        wrong = replace(good, instruction=words or good.instruction, **clips)
        right, said = (embedded_stages()[0]([load_record(p)])[0].verdicts[-1] for p in (good, wrong))
        assert right.passed, (seed, right)
        caught += said.reason == "not what the words say"
    assert caught >= least
