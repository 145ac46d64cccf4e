"Metadata and world to samples: golden sizes, lengths and pixels, what can be wrong with a table or a row, order, keys, and files that appear whole."

import csv
import io
import json
import os
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from kiwi_edit.data import dataset as module
from kiwi_edit.data.dataset import *
from kiwi_edit.video import read_video, write_video
from kiwi_edit.world import EVAL_SEED, TASKS, World

GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden")) / "wan22/cases"
TABLE = json.loads((GOLDEN / "resize.json").read_text())
PIXELS = load_file(GOLDEN / "resize.safetensors")


def gradient(count, height=32, width=48, shift=0):
    "Smooth frames whose brightness tells their index."
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [
            np.stack([x * 255 // width, y * 255 // height, np.full_like(x, (10 + shift + 12 * t) % 256)], -1)
            for t in range(count)
        ]
    ).astype(np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def table(folder, rows, name="meta.csv"):
    return write_metadata(folder / name, [dict(prompt="Make it red.") | row for row in rows], overwrite=True)


def still(folder, name, width, height, value=90):
    Image.new("RGB", (width, height), (value, 20, 30)).save(folder / name)
    return name


@pytest.fixture
def pair(tmp_path):
    "A folder with a clip of 9 frames before and after an edit, and a reference."
    write_video(tmp_path / "a.mp4", gradient(9))
    write_video(tmp_path / "b.mp4", gradient(9, shift=60))
    Image.fromarray(gradient(1, 70, 50)[0]).save(tmp_path / "r.png")
    return tmp_path


ROW = dict(src_video="a.mp4", tgt_video="b.mp4", prompt="Make it red.", ref_image="r.png")


# golden rules


def test_sizes_are_the_official_ones(tmp_path):
    for size in {(r["width"], r["height"]) for r in TABLE["training_operator"]}:
        still(tmp_path, f"{size[0]}x{size[1]}.png", *size)
    for row in TABLE["training_operator"]:
        name = f"{row['width']}x{row['height']}.png"
        ds = MetadataDataset(table(tmp_path, [dict(src_video=name, tgt_video=name)]), max_pixels=row["max_pixels"])
        assert ds.shape(0) == (1, row["out_height"], row["out_width"], False)


def test_lengths_are_the_official_ones(tmp_path):
    counts = [1, 4, 5, 13, 48, 82]
    for n in counts:
        write_video(tmp_path / f"{n}.mp4", np.zeros((n, 32, 32, 3), np.uint8))
    seen = 0
    for row in TABLE["frame_count"]["training"]:
        if row["file_frames"] not in counts:
            continue
        name, seen = f"{row['file_frames']}.mp4", seen + 1
        path = table(tmp_path, [dict(src_video=name, tgt_video=name)])
        assert MetadataDataset(path, num_frames=row["num_frames"]).shape(0)[0] == row["used"]
    assert seen >= 3 * (len(counts) - 1)


def test_pixels_are_the_official_ones(tmp_path):
    (tmp_path / "in.png").write_bytes(png(PIXELS["input"]))
    path = table(tmp_path, [dict(src_video="in.png", tgt_video="in.png", ref_image="in.png")])
    ours, official = (MetadataDataset(path, max_pixels=4096, crop_reference=crop)[0] for crop in (False, True))
    expected = PIXELS["training_operator_max4096"]
    assert np.array_equal(ours.source[0], expected) and np.array_equal(ours.target[0], expected)
    assert np.array_equal(ours.reference, PIXELS["input"])
    assert np.array_equal(official.reference, expected)


@pytest.mark.parametrize("shrink, width, height", [(0.85, 64, 64), (0.71, 96, 32)])
def test_shrunk_reference_is_the_official_one(shrink, width, height):
    assert np.array_equal(
        shrink_reference(PIXELS["input_wide"], width, height, shrink), PIXELS[f"ref_shrink_{shrink}_{width}x{height}"]
    )


def test_shrunk_reference():
    assert np.array_equal(shrink_reference(PIXELS["input_wide"], 64, 64), PIXELS["ref_pad_64x64"])
    assert shrink_reference(np.zeros((1, 300, 3), np.uint8), 32, 64, 0.7).shape == (64, 32, 3)  # thinner than a pixel
    for wrong in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`shrink` has to lie above 0"):
            shrink_reference(PIXELS["input_wide"], 64, 64, wrong)


def test_frames_are_the_first_of_the_file(pair):
    sample = MetadataDataset(table(pair, [ROW]), num_frames=5, max_pixels=32 * 64)[0]
    assert sample.source.shape == (5, 32, 32, 3)
    assert np.array_equal(sample.source, read_video(pair / "a.mp4", num_frames=5, size=(32, 32)).frames)
    assert sample.mode == "ref" and sample.reference.shape == (70, 50, 3) and sample.id == "meta.csv row 0"
    assert sample.task == ""


def test_a_narrow_source_is_enlarged(tmp_path):
    still(tmp_path, "thin.png", 20, 100)
    still(tmp_path, "long.png", 4000, 64)
    ds = MetadataDataset(
        table(tmp_path, [dict(src_video=n, tgt_video=n) for n in ("thin.png", "long.png")]), max_pixels=10_000
    )
    assert [ds[i].source.shape[1:3] for i in (0, 1)] == [(96, 32), (32, 288)]


# tables


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_tables_come_back(tmp_path, suffix):
    rows = [
        dict(src_video="a.mp4", tgt_video="b.mp4", prompt='Say "hi",\nplease — 雪'),
        dict(src_video="c", tgt_video="d", prompt="x", ref_image="r.png"),
    ]
    path = write_metadata(tmp_path / f"m{suffix}", rows)
    back = read_metadata(path)
    assert [{k: v for k, v in row.items() if v} for row in back] == rows
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileExistsError):
        write_metadata(path, rows)
    assert len(read_metadata(write_metadata(path, rows[:1], overwrite=True))) == 1


def test_shards_in_natural_order_and_references_only_when_wanted(pair):
    (pair / "shards").mkdir()
    for n, name in ((10, "chunk_10"), (9, "chunk_9")):
        write_metadata(
            pair / f"shards/{name}.parquet",
            [
                dict(
                    iid=str(n),
                    src_video="../a.mp4",
                    tgt_video="../b.mp4",
                    prompt=f"{n}-{i}",
                    ref_image_bytes=png(gradient(1, 20 + n, 9 + i)[0]) if i else None,
                )
                for i in range(70)
            ],
        )
    rows = read_metadata(pair / "shards")
    assert [row["prompt"] for row in rows] == [f"{n}-{i}" for n in (9, 10) for i in range(70)]
    assert all(isinstance(row["ref_image_bytes"], ParquetCell) for row in rows)
    assert rows[0]["ref_image_bytes"].read() is None and {row["ref_image_bytes"].group for row in rows} == {0, 1}
    ds = MetadataDataset(pair / "shards", num_frames=1)
    assert ds[0].mode == "image" and ds[70 + 69].reference.shape == (30, 78, 3)
    assert ds[65].reference.shape == (29, 74, 3)
    assert ds[139].id == "chunk_10.parquet row 69"


def test_an_embedded_reference_and_a_file_are_one(pair):
    embedded = table(
        pair,
        [{k: v for k, v in ROW.items() if k != "ref_image"} | dict(ref_image_bytes=(pair / "r.png").read_bytes())],
        "m.parquet",
    )
    a, b = MetadataDataset(table(pair, [ROW])), MetadataDataset(embedded)
    assert np.array_equal(a[0].reference, b[0].reference) and a.key(0) == b.key(0)


def test_a_shard_that_changes_under_the_reader_is_said(pair):
    rows = [ROW | dict(ref_image_bytes=png(gradient(1, 20 + i, 20)[0])) for i in range(140)]
    path = write_metadata(pair / "m.parquet", rows)
    ds = MetadataDataset(path, num_frames=1)
    heights = [ds[i].reference.shape[0] for i in (139, 0, 63, 64, 9, 120, 66)]  # forwards, backwards, across groups
    assert heights == [159, 20, 83, 84, 29, 140, 86]
    write_metadata(path, rows[:30], overwrite=True)
    assert ds[5].reference.shape[0] == 25
    for i in (50, 139):  # a row that is gone, a group that is gone
        with pytest.raises(BadRow, match="`ref_image_bytes` has to be where it was"):
            ds[i]


def test_a_byte_order_mark_is_no_part_of_the_table(tmp_path):
    for name, text in (
        ("a.csv", "src_video,tgt_video,prompt\na,b,c\n"),
        ("a.jsonl", json.dumps(ROW)),
        ("a.json", json.dumps([ROW])),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert set(module._COLUMNS) <= set(read_metadata(tmp_path / name)[0])


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", b"src_video,target,prompt\na,b,c\n", "a.csv' lacks tgt_video; it has src_video, target, prompt"),
        (
            "a.csv",
            b"src_video;tgt_video;prompt\na;b;c\n",
            "lacks src_video, tgt_video, prompt; it has src_video;tgt_video;prompt",
        ),
        ("a.csv", b"", "at least one row"),
        ("a.csv", b"src_video,tgt_video,prompt\n", "at least one row"),
        (
            "a.csv",
            "src_video,tgt_video,prompt\na,b,caf\xe9\n".encode("latin-1"),
            "readable UTF-8 .csv but .*a.csv' is not",
        ),
        ("a.csv", "src_video,tgt_video,prompt\na,b,c\n".encode("utf-16"), "readable UTF-8 .csv but .*a.csv' is not"),
        ("a.json", b"", "readable UTF-8 .json"),
        ("a.json", b"[]", "at least one row"),
        ("a.json", b'{"src_video": "a"}', "every row has to be an object"),
        ("a.json", b'[{"src_video": "a", "prompt": "x"}]', "lacks tgt_video; it has src_video, prompt"),
        ("a.jsonl", b"\n\n", "at least one row"),
        ("a.jsonl", b'{"src_video": "a", "tgt_video": "b", "prompt": "x"}\n{"src_vid', "is not: line 2: "),
        ("a.jsonl", json.dumps(ROW).encode() + b'\n["a", "b", "x"]', "every row has to be an object"),
        ("a.parquet", b"", "readable .parquet but .*a.parquet' is not"),
        ("a.parquet", b"PAR1 and then nothing PAR1", "readable .parquet"),
        ("a.tsv", b"src_video\ttgt_video\tprompt\n", "end in .csv, .json, .jsonl, .parquet but is"),
    ],
)
def test_a_wrong_table_is_an_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / name)
    with pytest.raises(ValueError, match="`metadata` has to"):
        MetadataDataset(tmp_path / name)


def test_a_missing_table_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="`metadata` has to be an existing file.*nowhere.csv"):
        MetadataDataset(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="folder with .parquet files but"):
        MetadataDataset(tmp_path)
    pq.write_table(pa.table({"src_video": ["a"], "prompt": ["b"]}), tmp_path / "chunk_0.parquet")
    with pytest.raises(ValueError, match="chunk_0.parquet' lacks tgt_video"):
        MetadataDataset(tmp_path)


def test_what_cannot_be_written_is_an_error(tmp_path):
    for path, rows, message in (
        ("a.txt", [ROW], "end in .csv"),
        ("a.csv", [], "at least one row"),
        ("a.csv", [dict(src_video="a", prompt="b")], "lacks tgt_video"),
        ("a.jsonl", [ROW | dict(ref_image_bytes=b"x")], "only .parquet keeps"),
    ):
        with pytest.raises(ValueError, match=message):
            write_metadata(tmp_path / path, rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=80), "`num_frames` has to be 4k\\+1"),
        (dict(num_frames=0), "`num_frames` has to be"),
        (dict(max_pixels=1000), "`max_pixels` has to be at least factor\\*factor = 1024 but is 1000"),
        (dict(factor=0), "`factor` has to be at least 1"),
        (dict(root="nowhere"), "`root` has to be an existing folder"),
    ],
)
def test_wrong_settings_are_errors(pair, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MetadataDataset(table(pair, [ROW]), **options)


def test_paths_start_from_the_table_or_the_root(pair, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    inside, outside = table(pair, [ROW]), table(elsewhere, [ROW])
    absolute = table(elsewhere, [{k: str(pair / v) if k != "prompt" else v for k, v in ROW.items()}], "absolute.csv")
    expected = MetadataDataset(inside)[0].source
    for ds in (
        MetadataDataset(outside, root=pair),
        MetadataDataset("absolute.csv"),
        MetadataDataset(absolute, root=elsewhere),
    ):
        assert np.array_equal(ds[0].source, expected)
    with pytest.raises(BadRow, match="`src_video`: .* has to be an existing file"):
        MetadataDataset(outside)[0]


# rows


def bad(folder, row, name="meta.jsonl", **options):
    "The reason why a row is bad."
    ds = MetadataDataset(
        write_metadata(folder / name, [ROW, ROW | row], overwrite=True),
        **(dict(num_frames=5, max_pixels=4096) | options),
    )
    assert len(ds[0].source) >= 5
    with pytest.raises(BadRow) as caught:
        ds[1]
    assert (caught.value.index, caught.value.name) == (1, f"{name} row 1") and "\n" not in str(caught.value)
    assert str(caught.value) == f"{name} row 1: {caught.value.reason}"
    return caught.value.reason


def test_bad_words(pair):
    assert "`prompt` has to be given but is missing" in bad(pair, dict(prompt=None))
    assert "`prompt` has to be given but is missing" in bad(pair, dict(prompt=float("nan")))
    assert "`prompt` has to be text but is ' '" in bad(pair, dict(prompt="  "))
    assert "`prompt` has to be text but is 7" in bad(pair, dict(prompt=7))
    (pair / "s.jsonl").write_text(json.dumps(ROW | dict(prompt="\ud800 hello")))
    with pytest.raises(BadRow, match="`prompt` has to be Unicode text"):
        MetadataDataset(pair / "s.jsonl")[0]


def test_bad_fields(pair):
    lines = table(pair, [{k: ROW[k] for k in module._COLUMNS}] * 4).read_text().splitlines()
    lines[2] += " Please, now."
    lines[3] = "b.mp4,a.mp4"
    (pair / "meta.csv").write_text("\n".join(lines))
    good = GoodSamples(MetadataDataset(pair / "meta.csv"))
    assert [s.id for s in good] == ["meta.csv row 0", "meta.csv row 3"]
    assert "1 more; text with a comma needs quotes" in good.skipped[0].reason
    assert "missing" in good.skipped[1].reason


def test_bad_clips(pair):
    (pair / "empty.mp4").touch()
    (pair / "text.mp4").write_text("this is no video, whatever its name says")
    whole = (pair / "a.mp4").read_bytes()
    (pair / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (pair / "folder").mkdir()
    for name in ("nowhere.mp4", "empty.mp4", "text.mp4", "folder"):
        for column in ("src_video", "tgt_video"):
            assert f"`{column}`: " in bad(pair, {column: name})
    assert "`tgt_video`" in bad(pair, dict(tgt_video="cut.mp4"))
    assert "`src_video` has to be given" in bad(pair, dict(src_video=""))
    assert "`src_video` has to be text but is ['a.mp4']" in bad(pair, dict(src_video=["a.mp4"]))
    assert bad(pair, dict(src_video="a\0.mp4"))


def test_a_frame_that_is_lost_makes_a_bad_row(pair):
    noise = np.random.default_rng(0).integers(0, 255, (17, 48, 64, 3), np.uint8)
    data = bytearray(write_video(pair / "n.mp4", noise).read_bytes())
    data[len(data) // 3 : len(data) * 7 // 12] = bytes(len(data) * 7 // 12 - len(data) // 3)
    (pair / "lost.mp4").write_bytes(data)
    reason = bad(pair, dict(src_video="n.mp4", tgt_video="lost.mp4"), num_frames=17)
    assert "`tgt_video`: " in reason and "decode" in reason


def test_pairs_that_do_not_match(pair):
    write_video(pair / "short.mp4", gradient(4))
    write_video(pair / "large.mp4", gradient(9, 64, 48))
    still(pair, "one.png", 48, 32)
    assert "are 32x32 with 5 frames and 32x32 with 1." in bad(pair, dict(tgt_video="short.mp4"))
    assert "are 32x32 with 5 frames and 32x64 with 5." in bad(pair, dict(tgt_video="large.mp4"))
    assert "with 1 frames and" in bad(pair, dict(src_video="one.png"))


def test_pairs_that_come_out_alike_match(pair):
    write_video(pair / "longer.mp4", gradient(7, 33, 60))
    sample = MetadataDataset(table(pair, [ROW | dict(tgt_video="longer.mp4")]), num_frames=5)[0]
    assert sample.source.shape == sample.target.shape == (5, 32, 32, 3)


def test_images_are_clips_of_one_frame(pair):
    still(pair, "x.png", 40, 40)
    still(pair, "y.jpg", 40, 40, 200)
    rows = [dict(src_video="x.png", tgt_video="y.jpg"), dict(src_video="x.png", tgt_video="y.jpg", ref_image="r.png")]
    ds = MetadataDataset(table(pair, rows))
    assert [(s.mode, s.source.shape) for s in (ds[0], ds[1])] == [("image", (1, 32, 32, 3)), ("ref", (1, 32, 32, 3))]
    one = MetadataDataset(table(pair, [ROW | dict(ref_image="")], "v.csv"), num_frames=1)
    assert one[0].mode == "image" and MetadataDataset(pair / "v.csv")[0].mode == "video"


# of an image or a video in a table that `datasets` writes
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(folder, kinds=None, **columns):
    "A table of the published columns, some of which hold files."
    count = len(next(iter(columns.values())))
    columns = dict(src_video=["a.mp4"] * count, tgt_video=["b.mp4"] * count, prompt=["Make it red."] * count) | columns
    arrays = {
        name: pa.array(values, type=(kinds or {}).get(name, CELL if any(isinstance(v, dict) for v in values) else None))
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), folder / "hf.parquet", row_group_size=2)
    return MetadataDataset(folder / "hf.parquet")


@pytest.mark.parametrize("column", ["ref_image", "ref_image_bytes"])
def test_images_as_datasets_writes_them(pair, column, monkeypatch):
    data = (pair / "r.png").read_bytes()
    cells = [
        dict(bytes=data, path=None),
        dict(bytes=data, path="gone/x.jpg"),
        dict(bytes=None, path="r.png"),
        dict(bytes=None, path=str(pair / "r.png")),
        None,
        dict(bytes=None, path=None),
    ]
    ds = parquet(pair, **{column: cells})
    wanted = MetadataDataset(table(pair, [ROW, ROW | dict(ref_image=None)]))
    for i in range(6):
        sample, same = ds[i], wanted[i > 3]
        assert (sample.reference is None) == (same.reference is None) == (i > 3)
        assert np.array_equal(sample.source, same.source)
        assert i > 3 or np.array_equal(sample.reference, same.reference)
        assert ds.key(i) == wanted.key(i > 3)
    monkeypatch.chdir(pair)
    (pair / "tables").mkdir()
    moved = parquet(
        pair / "tables",
        src_video=[dict(bytes=None, path="a.mp4")],
        tgt_video=[dict(bytes=None, path="b.mp4")],
        **{column: [dict(bytes=None, path="r.png")]},
    )
    assert np.array_equal(moved[0].reference, wanted[0].reference)  # `datasets` lets paths start where it was started


def test_videos_as_datasets_writes_them(pair, monkeypatch):
    monkeypatch.setattr(module, "settings", lambda: SimpleNamespace(cache_dir=pair / "cache"))
    cells = {
        name: [dict(bytes=(pair / file).read_bytes(), path=path) for path in (None, "x.mp4")]
        + [dict(bytes=None, path=file)]
        for name, file in (("src_video", "a.mp4"), ("tgt_video", "b.mp4"))
    }
    ds, wanted = parquet(pair, **cells), MetadataDataset(table(pair, [dict(ROW, ref_image=None)]))
    for i in (2, 0, 1):
        assert np.array_equal(ds[i].source, wanted[0].source) and np.array_equal(ds[i].target, wanted[0].target)
        assert ds.key(i) == wanted.key(0)
    pictures = parquet(
        pair,
        src_video=[dict(bytes=png(gradient(1)[0]), path=None)],
        tgt_video=[dict(bytes=png(gradient(1, shift=60)[0]), path=None)],
    )
    assert pictures[0].source.shape == (1, 32, 32, 3) and pictures[0].mode == "image"


def test_columns_of_files_are_read_side_by_side(pair):
    "Each keeps its own place in the file, so that going on is no starting again."
    opened = []
    ds = parquet(
        pair,
        ref_image=[dict(bytes=png(gradient(1, 8, 8, shift=i)[0]), path=None) for i in range(6)],
        src_video=[dict(bytes=None, path="a.mp4")] * 6,
    )

    class Counted(module._Stream):
        def __init__(self, *args):
            opened.append(args[1:])
            super().__init__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_Stream", Counted)
        module._stream.cache_clear()
        shifts = [int(ds[i].reference[0, 0, 2]) for i in range(6)]
    assert shifts == [10 + i for i in range(6)]
    assert sorted(opened) == sorted((g, c) for g in range(3) for c in ("ref_image", "src_video"))


def test_bytes_and_lists_of_images(pair):
    data = (pair / "r.png").read_bytes()
    assert parquet(pair, ref_image=[data])[0].reference is not None  # as pandas writes them
    ds = parquet(
        pair,
        dict(ref_image=pa.list_(CELL)),
        ref_image=[[dict(bytes=data, path=None)], [], [dict(bytes=data, path=None)] * 2],
    )
    assert ds[0].reference is not None and ds[1].reference is None
    with pytest.raises(BadRow, match="`ref_image` has to be text but is") as caught:
        ds[2]
    assert len(str(caught.value)) <= 300


def test_no_message_quotes_a_whole_file(pair, monkeypatch):
    monkeypatch.setattr(module, "settings", lambda: SimpleNamespace(cache_dir=pair / "cache"))
    noise = np.random.default_rng(0).bytes(20000)
    for column in ("ref_image", "ref_image_bytes", "src_video"):
        ds = parquet(pair, **{column: [dict(bytes=noise, path="x" * 900 + ".png")]})
        with pytest.raises(BadRow) as caught:
            ds[0]
        assert len(str(caught.value)) <= 300 and str(caught.value).startswith("hf.parquet row 0: ")
    for row in (dict(prompt=["x"] * 5000), dict(prompt={"a": "x" * 5000}), dict(src_video="x" * 200 + "/" + "y" * 200)):
        (pair / "meta.jsonl").write_text(json.dumps(ROW | row) + "\n")
        with pytest.raises(BadRow) as caught:
            MetadataDataset(pair / "meta.jsonl")[0]
        assert len(str(caught.value)) <= 300
    (pair / "meta.csv").write_text(",".join(f"column{i}" for i in range(500)) + "\n")
    with pytest.raises(ValueError) as caught:
        MetadataDataset(pair / "meta.csv")
    assert len(str(caught.value)) <= 300 + len(str(pair))


def test_bad_references(pair):
    whole = png(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    (pair / "broken.png").write_bytes(whole[:200])
    assert "`ref_image` has to be an existing file" in bad(pair, dict(ref_image="nowhere.png"))
    assert "the reference has to be a complete image but its 200 bytes" in bad(pair, dict(ref_image="broken.png"))
    assert "the reference has to be" in bad(pair, dict(ref_image="a.mp4"))
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(buffer, "AVIF")
    for data in (
        b"",
        b"no image",
        whole[:200],
        buffer.getvalue()[:-40] + bytes(40),
    ):  # the last is a RuntimeError of Pillow
        assert f"the reference has to be a complete image but its {len(data)} bytes" in bad(
            pair, dict(ref_image_bytes=data), name="meta.parquet"
        )
    assert "has to be bytes but is a dict" in bad(pair, dict(ref_image_bytes=dict(bytes="x")))


def test_a_fault_of_the_code_is_no_bad_row(pair, monkeypatch):
    monkeypatch.setattr(module.video, "read_video", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(GoodSamples(MetadataDataset(table(pair, [ROW]))))


# shapes


@pytest.fixture
def no_pixels(monkeypatch):
    "Neither decodes nor draws."
    for owner, name in ((module.video, "read_video"), (World, "sample")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("pixels were asked for"))


def test_shapes_come_from_headers(pair, request):
    rows = [ROW, ROW | dict(ref_image=""), ROW | dict(src_video="b.mp4", ref_image="")]
    ds = MetadataDataset(table(pair, rows), num_frames=5, max_pixels=32 * 64)
    expected = [(*ds[i].source.shape[:3], ds[i].reference is not None) for i in range(3)]
    request.getfixturevalue("no_pixels")
    assert [ds.shape(i) for i in range(3)] == expected == [(5, 32, 32, True), (5, 32, 32, False), (5, 32, 32, False)]


def test_shapes_of_the_world_need_no_drawing(request):
    ds = WorldDataset(dict.fromkeys(TASKS, 1), num_frames=5, height=32, width=48, samples=30)
    expected = [(*s.source.shape[:3], s.reference is not None) for s in (ds[i] for i in range(30))]
    request.getfixturevalue("no_pixels")
    assert [ds.shape(i) for i in range(30)] == expected


# order


@pytest.fixture
def mixed(pair):
    "Ten rows, of which 2, 5 and 6 are bad."
    rows = [dict(ROW, prompt=f"Number {i}.", src_video="nowhere.mp4" if i in (2, 5) else "a.mp4") for i in range(10)]
    rows[6]["prompt"] = ""
    return MetadataDataset(table(pair, rows), num_frames=5)


def test_bad_rows_are_skipped_counted_and_named(mixed, caplog):
    order = [7, 2, 0, 6, 9, 5]
    good = GoodSamples(mixed, order)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [s.instruction for s in good] == ["Number 7.", "Number 0.", "Number 9."]
    assert good.kept == [7, 0, 9]
    assert [(b.index, b.name) for b in good.skipped] == [
        (2, "meta.csv row 2"),
        (6, "meta.csv row 6"),
        (5, "meta.csv row 5"),
    ]
    messages = [r.getMessage() for r in caplog.records if r.name == "kiwi_edit.data.dataset"]
    assert len(messages) == 3 and messages[1] == "Skipped meta.csv row 6: `prompt` has to be given but is missing."


def test_the_order_is_the_same_with_worker_processes(mixed):
    order = np.random.default_rng(3).permutation(10).tolist()
    walks = [GoodSamples(mixed, order, workers) for workers in (0, 1, 2)]
    samples = [list(walk) for walk in walks]
    for walk, found in zip(walks[1:], samples[1:]):
        assert [s.id for s in found] == [s.id for s in samples[0]]
        assert all(
            np.array_equal(a.source, b.source) and np.array_equal(a.reference, b.reference)
            for a, b in zip(found, samples[0])
        )
        assert walk.kept == walks[0].kept and [str(b) for b in walk.skipped] == [str(b) for b in walks[0].skipped]
    assert len(samples[0]) == 7


def test_a_walk_leaves_the_random_state_alone(mixed):
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        list(GoodSamples(mixed, [0, 1], workers))
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


def test_order_has_to_lie_in_the_dataset(mixed):
    for wrong in ([0, 10], [-1]):
        with pytest.raises(ValueError, match="`order` has to hold indices from 0 to 9"):
            GoodSamples(mixed, wrong)
    assert list(GoodSamples(mixed, [])) == []


def test_indices_and_errors(mixed):
    assert mixed[-1].instruction == "Number 9."
    with pytest.raises(IndexError):
        mixed[10]
    error = BadRow(3, "a.csv row 3", "why")
    assert str(pickle.loads(pickle.dumps(error))) == "a.csv row 3: why"
    assert pickle.loads(pickle.dumps(mixed)).key(0) == mixed.key(0)  # what a worker that is not forked needs


# keys


def test_the_key_changes_with_content_and_settings_only(pair, tmp_path_factory):
    ds = MetadataDataset(table(pair, [ROW, ROW | dict(ref_image="")]))
    key, moved = ds.key(0), tmp_path_factory.mktemp("moved") / "new"
    shutil.copytree(pair, moved)
    (moved / "a.mp4").rename(moved / "other.mp4")
    assert MetadataDataset(table(moved, [ROW | dict(src_video="other.mp4")], "other.jsonl")).key(0) == key
    settings = [dict(num_frames=5), dict(max_pixels=4096), dict(factor=16), dict(crop_reference=True)]
    others = [MetadataDataset(pair / "meta.csv", **s).key(0) for s in settings]
    others += [
        MetadataDataset(table(pair, [ROW | row], "x.csv")).key(0)
        for row in (dict(prompt="Make it blue."), dict(ref_image=""), dict(task="change"), dict(tgt_video="a.mp4"))
    ]
    others += [MetadataDataset(table(pair, [ROW | dict(src_video="b.mp4", tgt_video="a.mp4")], "x.csv")).key(0)]
    assert len({key, *others}) == len(others) + 1
    assert MetadataDataset(pair / "meta.csv", crop_reference=True).key(1) == ds.key(1)  # no reference, nothing to crop
    for name, row in (("a.mp4", 1), ("b.mp4", 1), ("r.png", 0)):
        before, data = ds.key(row), (pair / name).read_bytes()
        (pair / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert ds.key(row) != before
        (pair / name).write_bytes(data)
        assert ds.key(row) == before


def test_the_key_of_a_folder_of_frames(pair):
    for name in ("one", "two"):
        (pair / name).mkdir()
        for t, frame in enumerate(gradient(5)):
            Image.fromarray(frame).save(pair / name / f"{t}.png")
    ds = MetadataDataset(table(pair, [dict(src_video=n, tgt_video=n) for n in ("one", "two")]))
    assert len(ds[0].source) == 5 and ds.key(0) == ds.key(1)
    (pair / "two" / "4.png").unlink()
    assert ds.key(0) != ds.key(1)


def test_key_and_shape_of_a_bad_row_name_it(pair):
    for of in (MetadataDataset.key, MetadataDataset.shape):
        with pytest.raises(BadRow, match="meta.csv row 0: "):
            of(MetadataDataset(table(pair, [ROW | dict(src_video="nowhere.mp4")])), 0)


def test_a_reference_in_a_shard_that_changes_changes_the_key(pair):
    def shard(value):
        return write_metadata(
            pair / "m.parquet", [ROW | dict(ref_image_bytes=png(gradient(1, 20, 20, value)[0]))], overwrite=True
        )

    before = MetadataDataset(shard(0)).key(0)
    assert MetadataDataset(shard(1)).key(0) != before and MetadataDataset(shard(0)).key(0) == before


# the world


SHARES = dict(add=0.3, remove=0.2, change=0.35, style=0.15)


def test_world_samples_are_drawn_one_task_an_index():
    ds = WorldDataset(SHARES, num_frames=5, height=48, width=80, samples=300, first_seed=1000)
    rng, names, shares = np.random.default_rng(1000), list(SHARES), np.array(list(SHARES.values()))
    assert ds.tasks == [names[rng.choice(len(names), p=shares / shares.sum())] for _ in range(300)]
    for i in (0, 299):
        expected = World(48, 80, 5).sample(1000 + i, ds.tasks[i])
        sample = ds[i]
        assert np.array_equal(sample.source, expected.source) and np.array_equal(sample.target, expected.target)
        assert (sample.instruction, sample.task, sample.id) == (
            expected.instruction,
            ds.tasks[i],
            f"world train seed {1000 + i}",
        )
    assert (len(ds), ds.num_frames) == (300, 5) and ds[-1].id == ds[299].id
    with pytest.raises(IndexError):
        ds[300]


def test_world_modes():
    ds = WorldDataset(dict(subject=1, style=1, plate=1), num_frames=5, samples=20)
    modes = {ds.tasks[i]: ds[i].mode for i in range(20)}
    assert modes == dict(subject="ref", style="video", plate="image")
    assert WorldDataset(dict(style=1), samples=1, first_seed=EVAL_SEED, split="eval")[0].mode == "image"


def test_world_keys_change_with_the_settings(monkeypatch):
    keys = [
        WorldDataset(tasks, n, h, w, samples=5, first_seed=seed).key(2)
        for tasks, n, h, w, seed in (
            (dict(add=1), 1, 96, 96, 1000),
            (dict(remove=1), 1, 96, 96, 1000),
            (dict(add=1), 5, 96, 96, 1000),
            (dict(add=1), 1, 80, 96, 1000),
            (dict(add=1), 1, 96, 80, 1000),
            (dict(add=1), 1, 96, 96, 1001),
        )
    ]
    keys.append(WorldDataset(dict(add=1), samples=5, difficulty="easy").key(2))
    assert len(set(keys)) == len(keys)
    ds = WorldDataset(dict(add=1), samples=9)
    assert ds.key(2) == keys[0] and ds.key(2) != ds.key(3)
    with monkeypatch.context() as patch:
        patch.setitem(module._VERSIONS, "world", 99)
        assert ds.key(2) != keys[0]
    monkeypatch.setattr(module, "asset", lambda name: Path(__file__))  # other pictures
    assert ds.key(2) != keys[0]


def test_the_version_of_the_world_is_raised_when_its_pixels_change():
    # When this fails because the world draws something else, raise _VERSIONS["world"] and note the new numbers here.
    expected = {3: [125.3, 108.7, 120.9, 127.2, 136.4, 111.3, 184.9, 133.4]}
    ds = WorldDataset(dict.fromkeys(TASKS, 1), num_frames=5, samples=100, first_seed=EVAL_SEED, split="eval")
    first = [ds[ds.tasks.index(task)] for task in TASKS]
    means = [float(s.source.mean() / 2 + s.target.mean() / 2) for s in first]
    assert np.allclose(means, expected[module._VERSIONS["world"]], atol=0.1), [round(m, 1) for m in means]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tasks={}), "`tasks` have to be some of .* but are none"),
        (dict(tasks=dict(fly=1)), "`tasks` have to be some of .* but are fly"),
        (dict(tasks=dict(add=0)), "shares above 0"),
        (dict(num_frames=4), "`num_frames` has to be 4k\\+1"),
        (dict(samples=0), "`samples` has to be at least 1"),
        (dict(split="test"), "`split` has to be 'train' or 'eval'"),
        (dict(first_seed=EVAL_SEED - 10, samples=11), "`first_seed` has to leave all seeds"),
        (dict(split="eval"), "`first_seed` has to leave all seeds"),
    ],
)
def test_wrong_worlds_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        WorldDataset(**(dict(tasks=dict(add=1)) | options))


# to a disk and back


@pytest.mark.parametrize("format", ["parquet", "csv", "json", "jsonl"])
def test_saved_samples_come_back(tmp_path, format):
    ds = WorldDataset(dict(subject=1, change=1), samples=6)
    path = save_dataset(ds, tmp_path / "new" / "set", number=4, format=format, progress=False)
    back = MetadataDataset(path)
    assert path.name == f"metadata.{format}" and len(back) == 4 and {ds[i].mode for i in range(4)} == {"ref", "image"}
    for i in range(4):
        a, b = ds[i], back[i]
        assert np.array_equal(a.source, b.source) and np.array_equal(a.target, b.target)
        assert (a.instruction, a.task, a.mode) == (b.instruction, b.task, b.mode)
        assert a.reference is None or np.array_equal(a.reference, b.reference)


def test_a_shard_without_references_has_the_column_all_the_same(tmp_path):
    path = save_dataset(WorldDataset(dict(add=1), samples=1), tmp_path, progress=False)
    assert pq.read_schema(path).field("ref_image_bytes").type == pa.binary()


def test_saved_clips_keep_their_frames(tmp_path):
    ds = WorldDataset(dict(style=1), num_frames=5, height=64, width=96, samples=2)
    back = MetadataDataset(save_dataset(ds, tmp_path, progress=False))
    assert back[1].source.shape == (5, 64, 96, 3)
    assert np.abs(back[1].source.astype(int) - ds[1].source).mean() < 8
    errors = [np.abs(back[1].source[0].astype(int) - frame).mean() for frame in ds[1].source]
    assert np.argmin(errors) == 0


def test_saving_leaves_bad_rows_out_and_other_tables_alone(mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saved = save_dataset(mixed, folder, format="csv", progress=False)
    assert [row["prompt"] for row in read_metadata(saved)] == [f"Number {i}." for i in (0, 1, 3, 4, 7, 8, 9)]
    assert [row["iid"] for row in read_metadata(saved)][2] == "000003"
    with pytest.raises(FileExistsError, match="`folder` has to be without a dataset"):
        save_dataset(mixed, folder, progress=False)
    for options, message in (
        (dict(number=11), "`number` has to be from 1 to"),
        (dict(format="xls"), "has to end in .csv"),
    ):
        with pytest.raises(ValueError, match=message):
            save_dataset(mixed, folder / "x", progress=False, **options)


def test_a_killed_save_leaves_no_table(tmp_path, monkeypatch):
    ds = WorldDataset(dict(add=1), samples=3)
    monkeypatch.setattr(module, "write_metadata", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_dataset(ds, tmp_path, progress=False)
    monkeypatch.undo()
    assert not list(tmp_path.glob("metadata.*"))
    assert len(MetadataDataset(save_dataset(ds, tmp_path, progress=False))) == 3


def test_csv_as_pandas_and_others_write_it(pair):
    with open(pair / "p.csv", "w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(
            [["", "prompt", "tgt_video", "src_video"], ["0", "two\nlines", "b.mp4", "a.mp4"]]
        )
    sample = MetadataDataset(pair / "p.csv")[0]
    assert sample.instruction == "two\nlines" and sample.mode == "video"
