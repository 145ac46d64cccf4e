"Readers, engines, shards that survive, failures per row, and what the command line makes of them."

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import common
from kiwi_edit.core import InputError
from kiwi_edit.data.dataset import MetadataDataset, write_metadata
from kiwi_edit.data.embedded import embedded_stages
from kiwi_edit.quadruplets import BackendError, Pair, ScoreStage
from kiwi_edit.data.synthesis import *
from kiwi_edit.data.synthesis import _FilePairs, _settings_of, _stage_groups
from kiwi_edit.video import write_video
from kiwi_edit.world import Difficulty, World

SMALL = SynthesisOptions(shard=4)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Six pairs as files, one of them with an authentic reference."
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i, task in enumerate(("subject", "add", "change", "remove", "background", "subject")):
        made = World().sample(40 + i, task)
        for name, clip in (("source", made.source), ("edited", made.target)):
            write_video(folder / f"{i}-{name}.mp4", clip, 10, crf=8)
        if i == 5:
            Image.fromarray(made.reference).save(folder / "5-reference.png")
        rows.append(
            dict(
                id=f"p{9 - i}",
                source=f"{i}-source.mp4",
                edited=f"{i}-edited.mp4",
                instruction=made.instruction,
                task=task,
                reference="5-reference.png" if i == 5 else None,
                licence="CC0",
            )
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "pairs.jsonl"


def shards(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted([*folder.glob("chunk_*.parquet"), *folder.glob("verdicts/*.parquet")])
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    synthesize(PlantedPairs(16), folder, options=SMALL, progress=False)
    return folder


# --- readers


def test_every_format_gives_the_same_pairs_in_the_order_of_their_ids(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    wanted = [(p.id, p.source, p.edited, p.instruction, p.task) for p in read_pairs(table)]
    assert [w[0] for w in wanted] == sorted(r["id"] for r in rows) and Path(wanted[0][1]).is_file()
    published = [
        dict(iid=r["id"], src_video=r["source"], tgt_video=r["edited"], prompt=r["instruction"], edited_type=r["task"])
        for r in rows
    ]
    for name in ("m.csv", "m.parquet", "m.json", "m.jsonl"):
        found = read_pairs(write_metadata(tmp_path / name, published), root=table.parent)
        assert [(p.id, p.source, p.edited, p.instruction, p.task) for p in found] == wanted, name
    shard = tmp_path / "shards"
    shard.mkdir()
    for k in range(2):
        write_metadata(shard / f"chunk_{k}.parquet", published[3 * k : 3 * k + 3])
    assert [p.id for p in read_pairs(shard, root=table.parent)] == [w[0] for w in wanted]
    assert read_pairs(table.parent)[0].id == wanted[0][0]  # a folder with pairs.jsonl


def test_own_column_names_and_what_is_missing_are_said(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    odd = tmp_path / "odd.csv"
    with open(odd, "w", newline="") as file:
        writer = csv.DictWriter(file, ["before", "after", "words"])
        writer.writeheader()
        writer.writerows(dict(before=r["source"], after=r["edited"], words=r["instruction"]) for r in rows)
    with pytest.raises(ValueError, match="source and edited and instruction.*'odd.csv' has before, after, words"):
        read_pairs(odd)
    found = read_pairs(odd, table.parent, dict(source="before", edited="after", instruction="words"))
    assert found[2].id == "odd-0000002" and found[2].instruction == rows[2]["instruction"]
    with pytest.raises(ValueError, match="names 'befor'"):
        read_pairs(odd, columns=dict(source="befor"))
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_pairs(tmp_path / "nowhere.csv")
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(2)))
    with pytest.raises(ValueError, match="'p9' names 2"):
        read_pairs(twice)


def test_a_folder_of_clips_is_read_by_their_names(table, tmp_path):
    for i in range(2):
        here = tmp_path / "flat" if i else tmp_path / "flat" / "deep"
        here.mkdir(parents=True, exist_ok=True)
        for name in ("source", "edited"):
            (here / f"{'clip-' if i else ''}{name}.mp4").symlink_to(table.parent / f"{i}-{name}.mp4")
        (here / ("clip.txt" if i else "instruction.txt")).write_text("Add a red fox.")
    found = read_pairs(tmp_path / "flat")
    assert [p.id for p in found] == ["clip", "deep"]
    assert all(Path(p.edited).is_file() and p.instruction == "Add a red fox." for p in found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none of them"):
        read_pairs(tmp_path / "empty")


def test_a_row_with_more_fields_than_the_header_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("src_video,tgt_video,prompt\na.mp4,b.mp4,Add a star.\na.mp4,b.mp4,Add a star, red and small.\n")
    with pytest.raises(ValueError, match="t.csv row 1 has 1 more; text with a comma needs quotes"):
        read_pairs(path)
    path.write_text("src_video,tgt_video,prompt\na.mp4,b.mp4," + "x" * 140000 + "\n")
    with pytest.raises(ValueError, match="`pairs` has to be readable UTF-8 .csv but '.*t.csv' is not: field larger"):
        read_pairs(path)


def test_tables_of_datasets_are_read_as_training_reads_them(table, tmp_path, monkeypatch):
    monkeypatch.setattr("kiwi_edit.data.dataset.settings", lambda: SimpleNamespace(cache_dir=tmp_path / "cache"))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    data = [(table.parent / row["source"]).read_bytes() for row in rows[:3]]
    cells = [
        dict(bytes=data[0], path="x.mp4"),
        dict(bytes=data[1], path=None),
        dict(bytes=None, path=rows[2]["source"]),
    ]
    png = b"\x89PNG" + bytes(9)
    columns = dict(
        src_video=pa.array(cells, cell),
        tgt_video=[row["edited"] for row in rows[:3]],
        prompt=["x"] * 3,
        ref_image=pa.array([dict(bytes=png, path=None), None, dict(bytes=None, path="r.png")], cell),
    )
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    pairs = read_pairs(tmp_path / "t.parquet", root=table.parent)
    assert [Path(p.source).read_bytes() for p in pairs] == [
        data[0],
        data[1],
        (table.parent / rows[2]["source"]).read_bytes(),
    ]
    assert [p.reference for p in pairs] == [png, None, str(table.parent / "r.png")]


def test_slices_are_light_and_the_same():
    pairs = PlantedPairs(12, 5, tasks=("add", "remove", "style"))
    part = pairs[4:9]
    assert len(part) == 5 and not any(isinstance(v, np.ndarray) for v in vars(part).values())
    for i in range(5):
        a, b = part[i], pairs[4 + i]
        assert (a.id, a.instruction) == (b.id, b.instruction) and (a.edited == b.edited).all()
    assert part.ids == pairs.ids[4:9] and [part.spoilt(i) for i in range(5)] == [pairs.spoilt(4 + i) for i in range(5)]
    assert len(pairs[12:]) == 0 and list(pairs[12:]) == pairs[12:].ids == []


# --- shards


def test_the_released_columns_come_first_and_training_reads_the_shards(undisturbed):
    rows = [row for path in sorted(undisturbed.glob("chunk_*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert list(rows[0])[:5] == ["iid", "prompt", "src_video", "tgt_video", "ref_image_bytes"]
    assert [r["iid"] for r in rows] == sorted(r["iid"] for r in rows)
    assert len(rows) == len(inspect_folder(undisturbed).kept) > 3
    data = MetadataDataset(undisturbed, num_frames=5, max_pixels=96 * 96, factor=16)
    assert len(data) == len(rows) and data[0].reference.ndim == 3 and data[0].mode == "ref"
    assert data[0].instruction == rows[0]["prompt"]
    assert {r["task"] for r in rows} <= {"subject", "background"} and {r["ref_source"] for r in rows} == {"synthesised"}


def test_huggingface_datasets_reads_the_folder_and_it_reads_datasets(undisturbed, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(str(undisturbed), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(data.features)[:5] == ["iid", "prompt", "src_video", "tgt_video", "ref_image_bytes"]
    assert len(data) == len(inspect_folder(undisturbed).kept)
    asked = []

    def load(name, split):
        asked.append((name, split))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs = read_pairs("somebody/pairs:train[:4]", root=undisturbed)
    assert asked == [("somebody/pairs", "train[:4]")] and pairs[1:3][0].id == data["iid"][1]
    assert isinstance(pairs[0].reference, bytes)


def test_doubles_far_apart_are_found_and_leave_no_clips(undisturbed, tmp_path):
    made = World().sample(3, "add")
    pairs = [
        Pair(
            f"{k:02d}",
            World().sample(k, "add").source,
            World().sample(k, "add").target,
            World().sample(k, "add").instruction,
        )
        for k in range(6)
    ]
    pairs.append(Pair("99", made.source, made.target, made.instruction))
    result = synthesize(pairs, tmp_path / "out", options=SynthesisOptions(shard=2), progress=False)
    assert [(r["iid"], r["verdicts"][-1]["reason"]) for r in result.rows if not r["verdicts"][-1]["passed"]] == [
        ("99", "duplicate of 03")
    ]
    assert not list((tmp_path / "out" / "clips").glob("99-*"))
    assert len(list((tmp_path / "out" / "clips").iterdir())) == 12


def test_clips_are_copied_or_referred_to(table, tmp_path):
    for how in ("refer", "copy"):
        result = synthesize(table, tmp_path / how, options=SynthesisOptions(clips=how), progress=False)
        rows = pq.read_table(tmp_path / how / "chunk_00000.parquet").to_pylist()
        assert len(rows) == len(result.kept) > 2
        for row in rows:
            path = tmp_path / how / row["src_video"]
            assert path.is_file() and (path.resolve().parent == table.parent.resolve()) == (how == "refer")
        assert next(r for r in rows if r["iid"] == "p4")["authentic_ref_image_bytes"][:4] == b"\x89PNG"
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "| pairs | CC0 |" in card and "| subject | synthesised |" in card
    result = synthesize(table, tmp_path / "authentic", options=SynthesisOptions(authentic=True), progress=False)
    kinds = {
        r["iid"]: r["ref_source"] for r in pq.read_table(tmp_path / "authentic" / "chunk_00000.parquet").to_pylist()
    }
    assert kinds["p4"] == "authentic" and set(kinds.values()) == {"authentic", "synthesised"}


def test_clips_that_are_folders_of_frames_are_copied(tmp_path):
    rows = []
    for name, task in (("a", "subject"), ("b", "subject"), ("c", "remove")):
        made = World().sample(0, task)
        for which, clip in (("source", made.source), ("edited", made.target)):
            (tmp_path / f"{name}-{which}").mkdir()
            for i, frame in enumerate(clip):
                Image.fromarray(frame).save(tmp_path / f"{name}-{which}" / f"{i}.png")
        rows.append(dict(id=name, source=f"{name}-source", edited=f"{name}-edited", instruction=made.instruction))
    out = tmp_path / "out"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = synthesize(tmp_path / "t.jsonl", out, options=SynthesisOptions(clips="copy"), progress=False)
    assert [r["iid"] for r in result.kept] == ["a"]
    # b is a double, c has nothing to show
    assert sorted(p.name for p in (out / "clips").iterdir()) == ["a-edited", "a-source"]
    assert MetadataDataset(out, num_frames=5, max_pixels=96 * 96, factor=16)[0].source.shape == (5, 96, 96, 3)


def test_folders_of_others_are_left_alone(undisturbed, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other things"):
        synthesize(PlantedPairs(4), tmp_path, progress=False)
    (tmp_path / "run.json").write_text('{"key": "of something else"}')  # a name that others use, too
    with pytest.raises(FileExistsError, match="holds other things"):
        synthesize(PlantedPairs(4), tmp_path, overwrite=True, progress=False)
    with pytest.raises(FileExistsError, match="another run"):
        synthesize(PlantedPairs(17), undisturbed, options=SMALL, progress=False)
    before = shards(undisturbed)
    again = synthesize(PlantedPairs(16), undisturbed, options=SMALL, progress=False)  # finished: read, not done again
    assert shards(undisturbed) == before and again.funnel() == inspect_folder(undisturbed).funnel()


def test_what_a_killed_run_was_writing_is_no_obstacle_and_goes(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".abcd1234.json").write_text("{")
    synthesize(PlantedPairs(3), out, progress=False)
    (out / "SHA256SUMS").unlink()
    (out / ".abcd5678.parquet").write_text("half")
    synthesize(PlantedPairs(3), out, progress=False)
    assert not (out / ".abcd5678.parquet").exists() and (out / "SHA256SUMS").exists()


def test_a_changed_byte_is_noticed(tmp_path):
    synthesize(PlantedPairs(6), tmp_path / "out", options=SMALL, progress=False)
    path = tmp_path / "out" / "chunk_00000.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    with pytest.raises(ValueError, match="chunk_00000.parquet differs"):
        inspect_folder(tmp_path / "out")


# --- keys: other inputs are another run


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (shade,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def test_keys_of_a_world_know_its_difficulty_and_its_pictures(monkeypatch):
    keys = {
        WorldPairs(6).key,
        WorldPairs(6, world=World(difficulty="easy")).key,
        WorldPairs(6, world=World(difficulty=Difficulty(motion=0.5))).key,
    }
    assert len(keys) == 3 and WorldPairs(6, world=World(difficulty=Difficulty())).key in keys
    assert PlantedPairs(6).key not in keys
    monkeypatch.setattr("kiwi_edit.data.synthesis.asset", lambda name: Path(__file__))
    assert WorldPairs(6).key not in keys


def test_keys_of_a_table_know_what_is_embedded_in_it(tmp_path):
    row, path, found = dict(src_video="a.mp4", tgt_video="b.mp4", prompt="Add a star."), tmp_path / "t.parquet", set()
    for shade in (40, 200, 40):
        write_metadata(path, [row | dict(ref_image_bytes=png(shade))], overwrite=True)
        found.add(read_pairs(path).key)
    columns = dict(source="v", edited="v", instruction="p", reference="r")
    for video, image in ((b"1", b"1"), (b"2", b"1"), (b"1", b"2")):
        found.add(_FilePairs([dict(v=dict(bytes=video, path="v.mp4"), p="Add a star.", r=image)], columns).key)
    assert len(found) == 5


def test_keys_of_a_list_know_references_and_where_it_is_from():
    a, b = World().sample(1).source, World().sample(1).target
    key = lambda **facts: _settings_of([Pair("0", a, b, "Add a star.", **facts)], embedded_stages, SMALL)["pairs"]
    found = [
        key(),
        key(reference=png(1)),
        key(reference=png(2)),
        key(reference="a.png"),
        key(reference=a[0]),
        key(reference=b[0]),
        key(origin=dict(licence="CC0")),
    ]
    assert len(set(found)) == len(found) and key(reference=a[0].copy()) == found[4]


LAMBDAS = """
import functools, sys
from kiwi_edit.data.synthesis import _named, digest, model_stages, embedded_stages
least = 7.
def mine(): return model_stages(thresholds={"verify.quality": least}) if "a" in {"a", "b", "c"} else None
def of(n): return lambda: model_stages(thresholds={"verify.quality": n})
class Chat: pass
def itself(n): return lambda: (itself, n)
made = [lambda: 1, lambda: 2, of(1), of(2), lambda n=1: n, lambda n=2: n, lambda: least, lambda: of, mine, functools.partial(model_stages, editor=lambda: 1), functools.partial(model_stages, editor=lambda: 2),
        of(Chat()), itself(3), embedded_stages]
found = [digest(_named(m)) for m in made]
least = 8.
print(*found, digest(_named(mine)), digest(_named(of(1))))
"""


def test_factories_without_a_name_are_told_apart_and_are_the_same_in_every_process():
    a, b = (
        [
            *subprocess.run(
                [sys.executable, "-c", LAMBDAS],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | dict(PYTHONHASHSEED=seed),
            ).stdout.split()
        ]
        for seed in "12"
    )
    assert a == b and len(set(a[:-1])) == len(a) - 1 and a[-1] == a[2]


# --- engines


def test_workers_change_nothing(undisturbed, tmp_path):
    synthesize(
        PlantedPairs(16), tmp_path / "two", options=SynthesisOptions(shard=4, batch=3, workers=2), progress=False
    )
    assert shards(tmp_path / "two") == shards(undisturbed)


def job(out, workers, engine):
    common.fork_workers()
    options = SynthesisOptions(shard=4, workers=workers, engine=engine)
    synthesize(PlantedPairs(16), out, options=options, progress=False)


@pytest.mark.parametrize("engine, workers, moments", [("local", 0, (1, 2, 3)), ("local", 2, (1, 3)), ("ray", 1, (1,))])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(undisturbed, tmp_path, engine, workers, moments):
    if engine == "ray":
        pytest.importorskip("ray")
    out, said, kept = tmp_path / "out", tmp_path / "said", {}
    start = partial(common.start, job, out, workers, engine, said=said, OMP_NUM_THREADS="1")

    def late():
        "Whether Ray's node did not start in its 30 s, which it has however busy the machine is."
        err = Path(f"{said}.err")
        found = "timed out during startup" in err.read_text()
        if found:
            err.write_text("")
        return found

    for parts in moments:  # killed once so many parts are there
        for _ in range(3):
            common.kill_when(start(), lambda: len(list((out / "parts").glob("part_*"))) >= parts)
            if not late():
                break
        if not (out / "parts").is_dir() or (out / "SHA256SUMS").exists():
            break  # it was faster than the kill
        for name, stamp in kept.items():
            assert (out / "parts" / name).stat().st_mtime_ns == stamp, "a finished part was done again"
        kept = {p.name: p.stat().st_mtime_ns for p in (out / "parts").glob("part_*")}
        assert len(kept) >= parts
    process = start()
    process.join(300)
    if process.exitcode and late():
        process = start()
        process.join(300)
    assert process.exitcode == 0, Path(f"{said}.err").read_text()[-2000:]
    assert shards(out) == shards(undisturbed) and not (out / "parts").exists()
    assert not [p for p in out.rglob(".*")], "temporary files stay"


def test_stages_with_actors_of_their_own_stand_alone():
    names = ["score", "ground", "segment"]
    assert _stage_groups(names, {}, 3) == [(0, 3, (3, 0))]
    assert _stage_groups(names, dict(ground=(2, 1.0)), 3) == [(0, 1, (3, 0)), (1, 2, (2, 1.0)), (2, 3, (3, 0))]
    with pytest.raises(ValueError, match="names dance"):
        _stage_groups(names, dict(dance=(1, 0)), 1)


# --- failures


class _Fails:
    "A scorer that knows some pairs and not others."

    name = "fails"

    def __init__(self, share):
        self.share = share

    def score(self, records):
        if any(r.pair.id.endswith("7") for r in records):
            raise RuntimeError("a crash of the backend itself")
        return [
            BackendError("time-out: no reply within 9 s") if int(r.pair.id[-1]) < 10 * self.share else dict(edit=1.0)
            for r in records
        ]


def failing(share):
    return [ScoreStage(_Fails(share)), *embedded_stages()[1:]]


def test_failures_are_recorded_per_row_and_too_many_stop_the_run(tmp_path):
    pairs = WorldPairs(20, tasks=("add",))
    result = synthesize(pairs, tmp_path / "some", partial(failing, 0.2), SynthesisOptions(batch=5), progress=False)
    verdicts = {r["iid"][-2:]: r["verdicts"][-1] for r in result.rows}
    assert verdicts["01"]["reason"].startswith("time-out") and verdicts["01"]["error"]
    assert verdicts["07"]["reason"].startswith("RuntimeError: a crash") and result.failures == 6
    assert verdicts["08"]["passed"]
    with pytest.raises(InputError, match=r"`max_failures` .* 30% .* 14 of 20 .* 12 times score: time-out"):
        synthesize(
            pairs, tmp_path / "many", partial(failing, 0.6), SynthesisOptions(batch=5, max_failures=0.3), progress=False
        )
    assert not (tmp_path / "many" / "SHA256SUMS").exists()


up = False


class _Away:
    "An endpoint that is not there until it is up."

    name = "away"

    def score(self, records):
        return [
            dict(edit=1.0) if up or r.pair.id < "world-0000002" else BackendError("endpoint: no connection")
            for r in records
        ]


def away():
    return [ScoreStage(_Away()), *embedded_stages()[1:]]


def test_rows_that_failed_before_the_run_stopped_are_asked_again(tmp_path, monkeypatch):
    pairs, options = WorldPairs(24, tasks=("add",)), SynthesisOptions(shard=4)
    with pytest.raises(InputError, match="18 of 20 did"):
        synthesize(pairs, tmp_path / "out", away, options, progress=False)
    monkeypatch.setitem(globals(), "up", True)
    result = synthesize(pairs, tmp_path / "out", away, options, progress=False)
    assert result.failures == 2 and result.done == 20  # half of the first part had failed, which is allowed


def test_halves_of_characters_in_names_end_no_run(table, tmp_path):
    "File names and ids that are no Unicode: the rows are told from others, and what cannot be written is dropped."
    row = json.loads(table.read_text().splitlines()[1])
    here = {name: str(table.parent / row[name]) for name in ("source", "edited")}
    odd = tmp_path / os.fsdecode(b"odd-\xff.mp4")
    odd.write_bytes(Path(here["edited"]).read_bytes())
    rows = [row | here | dict(id="a\udcff"), row | here | dict(id="b", edited=str(odd), instruction="Add a \ud83d.")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = synthesize(
        tmp_path / "t.jsonl", tmp_path / "out", options=SynthesisOptions(max_failures=1.0), progress=False
    )
    assert [r["iid"] for r in result.kept] == ["a\\udcff"]
    made = World().sample(3, "add")
    pairs = [
        Pair("x\udcff", made.source, made.target, made.instruction),
        Pair("y", here["source"], str(odd), row["instruction"]),
    ]
    result = synthesize(pairs, tmp_path / "list", options=SynthesisOptions(max_failures=1.0), progress=False)
    assert {r["iid"]: r["verdicts"][-1]["stage"] for r in result.rows} == {"x\\udcff": "deduplicate", "y": "write"}


def test_bad_files_are_rows_of_the_report(table, tmp_path):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    bad, short = tmp_path / "bad.mp4", tmp_path / "short.mp4"
    bad.write_bytes((table.parent / "0-source.mp4").read_bytes()[:300])
    write_video(short, World().sample(1, "add").source[:3], 10)
    write_video(tmp_path / "small.mp4", World(48, 48).sample(1, "add").source, 10)
    here = lambda name: str(table.parent / name)
    spoil = [
        dict(edited=str(bad)),
        dict(source="missing.mp4"),
        dict(edited=str(short)),
        dict(edited=str(tmp_path / "small.mp4")),
        dict(reference=str(bad)),
        dict(source=None),
        dict(instruction=None),
        dict(instruction="Add a hat \ud83d."),
    ]
    full = [r | dict(source=here(r["source"]), edited=here(r["edited"]), reference=None) for r in rows]
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in full + [full[1] | dict(id=f"x{k}") | s for k, s in enumerate(spoil)])
    )
    result = synthesize(path, tmp_path / "out", options=SynthesisOptions(max_failures=1.0), progress=False)
    why = {r["iid"]: r["verdicts"][-1]["reason"] for r in result.rows if r["iid"].startswith("x")}
    for k, words in enumerate(
        (
            "unreadable edited",
            "unreadable source",
            "lengths differ",
            "sizes differ",
            "unreadable reference",
            "unreadable source",
            "",
            "unreadable instruction",
        )
    ):
        assert why[f"x{k}"].startswith(words), why
    assert not any(r["verdicts"][-1]["passed"] for r in result.rows if r["iid"] == "x6")
    assert len(result.kept) >= 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "lengths differ" in page and page.count("<figure>") >= 6 and "http" not in page


def test_spoilt_pairs_are_caught_and_good_ones_kept(undisturbed):
    pairs, fate = PlantedPairs(16), {row["iid"]: row["verdicts"][-1] for row in inspect_folder(undisturbed).rows}
    through = {
        i: last["passed"] or last["reason"].startswith("nothing to show") for i, last in enumerate(fate.values())
    }
    assert sorted(fate) == list(fate) == pairs.ids
    assert all(through[i] for i in range(16) if not pairs.spoilt(i))
    assert not any(through[i] for i in range(16) if pairs.spoilt(i) in ("no edit", "broken frames"))


class _Dies:
    name = "score"

    def __call__(self, records):
        os.kill(os.getpid(), signal.SIGKILL)


def dying():
    return [_Dies()]


def test_a_factory_that_raises_is_said_by_its_worker(tmp_path):
    with pytest.raises(ValueError, match="`make_stages` .* InputError: `thresholds` .* 'verify.beauty'"):
        synthesize(
            WorldPairs(3),
            tmp_path / "out",
            partial(model_stages, thresholds={"verify.beauty": 1}),
            SynthesisOptions(workers=1),
            progress=False,
        )


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tmp_path):
    with pytest.raises(InputError, match="`workers` lost one of them: .* memory"):
        synthesize(WorldPairs(3), tmp_path / "out", dying, SynthesisOptions(workers=1), progress=False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nowhere.jsonl", "--out", "{tmp}/out"), "PAIRS has to be an existing table or folder"),
        (("world:4", "--out", "{tmp}/out", "--threshold", "verify.charm=3"), "--threshold has to name score.edit"),
        (("world:4", "--out", "{tmp}/out", "--actors", "ground"), "--actors has to be STAGE=NUMBERxGPUS"),
        (("world:4", "--out", "{tmp}/out", "--engine", "spark"), "--engine has to be local or ray"),
        (("world:4", "--out", "{tmp}/full"), "--out has to be a new or empty folder"),
        (
            ("{tmp}/lost.jsonl", "--out", "{tmp}/out"),
            "--max-failures allows 50% of the rows to fail but 20 of 20 did; 20 times load: unreadable source",
        ),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(capfd, tmp_path, arguments, words):
    from kiwi_edit.apps.cli import main

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "lost.jsonl").write_text(
        "".join(
            json.dumps(dict(id=f"r{i}", source="lost.mp4", edited="lost.mp4", instruction="Add a hat.")) + "\n"
            for i in range(30)
        )
    )
    with pytest.raises(SystemExit) as stop:
        main(["synthesize", *(a.format(tmp=tmp_path) for a in arguments)])
    said = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert stop.value.code == 1 and said.startswith(f"error: {words}"), said


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(shard=0), "`shard`"),
        (dict(engine="spark"), "local or ray"),
        (dict(max_failures=0), "`max_failures`"),
        (dict(clips="move"), "refer or copy"),
        (dict(workers=-1), "`workers`"),
    ],
)
def test_wrong_options(changes, words):
    with pytest.raises(ValueError, match=words):
        SynthesisOptions(**changes)


def test_thresholds_reach_their_stages():
    by = {s.name: s for s in model_stages(thresholds={"verify.quality": 9, "score.edit": 0.7, "segment.area": 0.01})}
    assert by["verify"].quality == 9 and by["score"].threshold == 0.7 and by["segment"].smallest == 0.01
    assert [*by] == list(model_stages.names)
    with pytest.raises(ValueError, match="names 'verify.beauty'"):
        model_stages(thresholds={"verify.beauty": 1})


def test_the_embedded_model_trains_on_the_shards(undisturbed, tmp_path):
    from kiwi_edit.train.curriculum import Stage
    from kiwi_edit.train.engine import train

    losses = []
    stage = Stage(
        "quadruplets", ("guidance", "transformer"), 1e-4, mix=("ref",), num_frames=5, max_pixels=96 * 96, batch_size=2
    )
    train(
        stage,
        tmp_path / "run",
        "kiwi-edit-tiny",
        dict(ref=undisturbed),
        steps=2,
        device="cpu",
        progress=False,
        on_step=lambda record: losses.append(record["loss"]),
    )
    assert len(losses) == 2 and np.isfinite(losses).all()
    data = MetadataDataset(undisturbed, num_frames=5, max_pixels=96 * 96, factor=16)
    assert data[0].source.shape == (5, 96, 96, 3)
