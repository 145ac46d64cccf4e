"""Rows of the frozen parts, from files and online; what makes a cache out of date; which rows make up a batch."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import kiwi_edit.train.cache
from kiwi_edit.train.cache import (
    Batch,
    Batches,
    BatchPlan,
    LatentCache,
    OnlineRows,
    RowSettings,
    build_cache,
    collate_rows,
    _draw_shrink,
    _encode_samples,
    _frozen_digests,
    _placeholder_ids,
    _sample_shape,
    survey_cache,
)
from kiwi_edit.data.dataset import BadRow, MetadataDataset, WorldDataset, save_dataset
from kiwi_edit.encoder import encode_context
from kiwi_edit.guidance import denoise
from kiwi_edit.pipeline import KiwiEditPipeline, decode_latents, fit_reference

SMALL = dict(height=32, width=32)


@contextmanager
def raised(p, place=...):
    "Within it, weights are larger by one."
    kept = p.detach().clone()
    with torch.no_grad():
        p[place] += 1
    try:
        yield
    finally:
        with torch.no_grad():
            p.copy_(kept)


@pytest.fixture(scope="module")
def pipe(random_model):
    return KiwiEditPipeline.from_pretrained(random_model)


@dataclass
class Rows:
    "World samples that can be changed, be bad and be counted."

    samples: list
    num_frames: int = 1

    def __post_init__(self):
        self.bad, self.read = {}, []

    def __len__(self):
        return len(self.samples)

    def key(self, i):
        return f"{self.samples[i].id} {self.samples[i].instruction} {self.samples[i].source.sum()} {self.samples[i].target.sum()}"

    def shape(self, i):
        return _sample_shape(self.samples[i])

    def __getitem__(self, i):
        self.read.append(i)
        if i in self.bad:
            raise BadRow(i, f"table row {i}", self.bad[i])
        return self.samples[i]


def world(count=6, tasks=("add",), num_frames=1, **size):
    data = WorldDataset(dict.fromkeys(tasks, 1.0), num_frames, samples=count, **(SMALL | size))
    return Rows([data[i] for i in range(count)], num_frames)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def assert_same(a: Batch, b: Batch):
    assert (a.ids, a.tasks, a.places, a.inputs.modes) == (b.ids, b.tasks, b.places, b.inputs.modes)
    for name in ("input_ids", "position_ids", "lengths"):
        assert torch.equal(getattr(a.inputs, name), getattr(b.inputs, name))
    assert torch.equal(a.source, b.source) and torch.equal(a.target, b.target)
    assert all(map(torch.equal, a.vision, b.vision))
    assert (a.reference is None) == (b.reference is None)
    assert a.reference is None or torch.equal(a.reference, b.reference)


# rows


@pytest.mark.parametrize(
    "settings", [RowSettings(), RowSettings("bfloat16", (0.7, 1.0), batch=3), RowSettings("float32", batch=2)]
)
def test_cached_and_online_steps_are_equal_to_the_bit(pipe, tmp_path, settings):
    sources = [world(5, ("subject", "background")), world(3, num_frames=5), world(4, width=64)]
    cached = Batches(
        [
            build_cache(pipe, data, tmp_path / str(i), settings, shard_size=2, progress=False)
            for i, data in enumerate(sources)
        ],
        2,
        seed=1,
    )
    online = Batches([OnlineRows(pipe, data, settings) for data in sources], 2, seed=1)
    modes = set()
    for step in range(6):
        a, b = cached(step), online(step)
        assert_same(a, b)
        modes |= set(a.inputs.modes)
        assert a.target.dtype == torch.float32 and len(a) == 2
        if step > 2:
            continue
        velocities = []
        for batch in (a, b):
            noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(step))
            sigma = torch.full((2,), 0.7)
            with torch.no_grad():
                context, mask = encode_context(pipe.mllm, pipe.guidance, batch.inputs, batch.vision)
                velocities.append(
                    denoise(
                        pipe.transformer,
                        pipe.guidance,
                        torch.lerp(batch.target, noise, 0.7),
                        1000 * sigma,
                        sigma,
                        context,
                        mask,
                        batch.source,
                        batch.reference,
                    )
                )
        assert torch.equal(*velocities)
    assert modes == {"image", "video", "ref"}


def test_cached_context_is_that_of_the_pixels(pipe):
    data = world(3, ("subject", "background"), num_frames=5)
    batch = collate_rows(_encode_samples(pipe, data.samples), _placeholder_ids(pipe.processor))
    with torch.no_grad():
        cached, mask = encode_context(pipe.mllm, pipe.guidance, batch.inputs, batch.vision)
        for i, s in enumerate(data.samples):
            direct, _ = pipe.encode_prompt([s.instruction], s.source, [Image.fromarray(s.reference)])
            # features are kept in half precision
            assert torch.allclose(cached[i][mask[i]], direct[0], atol=2e-2 * direct.abs().max())


def test_neighbours_and_autocast_change_nothing(pipe):
    samples, settings = world(5, num_frames=5).samples, RowSettings("float32", batch=4)
    alone = _encode_samples(pipe, samples[:1], settings)[0]
    assert equal(alone, _encode_samples(pipe, samples[::-1], settings)[4])
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(alone, _encode_samples(pipe, samples[:3], settings)[0])


def test_rows_are_made_while_another_thread_decodes(pipe, monkeypatch, one_thread):
    samples, inside = world(5, num_frames=5).samples, []
    alone, encode = _encode_samples(pipe, samples[:1])[0], kiwi_edit.train.cache.encode_frames

    def watched(*arguments):
        inside.append(1)
        try:
            return len(inside), encode(*arguments)
        finally:
            inside.pop()

    def checked(*arguments):
        others, latents = watched(*arguments)
        assert others == 1  # one thread at a time
        return latents

    monkeypatch.setattr(kiwi_edit.train.cache, "encode_frames", checked)
    with ThreadPoolExecutor(3) as pool:
        rows = [pool.submit(lambda: [_encode_samples(pipe, samples[:1])[0] for _ in range(4)]) for _ in range(2)]

        def decode():
            with torch.no_grad():
                return [decode_latents(pipe.vae, torch.zeros(1, 32, 3, 4, 4)) for _ in range(8)]

        frames = pool.submit(decode).result()
        assert all(equal(alone, row) for future in rows for row in future.result())
    assert all(np.array_equal(frames[0], more) for more in frames)


def test_a_shrink_belongs_to_a_row_and_a_seed(pipe, tmp_path):
    official, one = RowSettings(shrink=(0.7, 1.0)), world(1, ("subject",)).samples[0]
    drawn = np.array([_draw_shrink(official, replace(one, instruction=f"edit {i}")) for i in range(500)])
    assert 0.7 <= drawn.min() < 0.72 and 0.98 < drawn.max() <= 1 and abs(drawn.mean() - 0.85) < 0.02
    assert _draw_shrink(replace(official, seed=1), one) != _draw_shrink(official, one)
    assert _draw_shrink(official, replace(one, source=one.target, id="another place")) == _draw_shrink(official, one)
    assert _draw_shrink(RowSettings(), one) is None and _draw_shrink(official, world(1).samples[0]) is None
    data = world(3, ("subject",))
    plain, shrunk = (build_cache(pipe, data, tmp_path, s, progress=False) for s in (RowSettings(), official))
    assert plain.folder != shrunk.folder and not torch.equal(plain.row(0)["reference"], shrunk.row(0)["reference"])
    assert torch.equal(plain.row(0)["vision"], shrunk.row(0)["vision"])  # the encoder sees the reference as it is
    data.samples.insert(0, world(5, ("subject",)).samples[4])
    again = build_cache(pipe, data, tmp_path, official, progress=False)
    assert data.read[-1] == 0 and equal(again.row(1), shrunk.row(0))
    whole = data.samples[1]
    canvas = fit_reference(Image.fromarray(whole.reference), 32, 32)
    same = _encode_samples(pipe, [replace(whole, reference=canvas)])[0]
    assert torch.equal(same["reference"], plain.row(0)["reference"])


def test_what_cannot_be_kept_is_named(pipe):
    sample = world(1).samples[0]
    mean = list(pipe.vae.config.latents_mean)
    pipe.vae.register_to_config(latents_mean=[1e6] + mean[1:])
    try:
        with pytest.raises(ValueError, match="`dtype`.*float16.*world train seed 1000"):
            _encode_samples(pipe, [sample])
        assert _encode_samples(pipe, [sample], RowSettings("bfloat16"))[0]["target"].isfinite().all()
    finally:
        pipe.vae.register_to_config(latents_mean=mean)
    with pytest.raises(ValueError, match="multiples of 8 .*world train seed 1000 is 20x32"):
        _encode_samples(pipe, [replace(sample, source=sample.source[:, :, :20], target=sample.target[:, :, :20])])
    for wrong, name in (
        (dict(dtype="int8"), "dtype"),
        (dict(shrink=(1.0, 0.7)), "shrink"),
        (dict(batch=0), "batch"),
        (dict(seed=-1), "seed"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            RowSettings(**wrong)
    rows = _encode_samples(pipe, [sample, world(1, width=64).samples[0]])
    with pytest.raises(ValueError, match="`rows` have to have one shape"):
        collate_rows(rows, _placeholder_ids(pipe.processor))
    with pytest.raises(ValueError, match="`rows`.*none"):
        collate_rows([], _placeholder_ids(pipe.processor))


def test_a_batch_pads_the_words_and_goes_to_a_device(pipe):
    token_ids = _placeholder_ids(pipe.processor)
    short, long = (
        replace(s, instruction=text)
        for s, text in zip(
            world(2).samples, ("Add a ring.", "Add a small yellow ring to the top left of the picture, please.")
        )
    )
    batch = collate_rows(_encode_samples(pipe, [short, long]), token_ids, places=[3, 1]).to("cpu")
    n, m = batch.inputs.lengths.tolist()
    assert n < m == batch.inputs.input_ids.shape[1] and (batch.inputs.input_ids[0, n:] == token_ids["pad"]).all()
    assert pipe.processor.tokenizer.decode(batch.inputs.input_ids[0, :n]).count("Add a ring.") == 1
    assert batch.places == [3, 1] and batch.ids == ["world train seed 1000", "world train seed 1001"]
    assert batch.tasks == ["add", "add"] and batch.reference is None


# fingerprints


def test_fingerprint_covers_what_rows_depend_on_and_nothing_else(pipe, random_model, tmp_path, monkeypatch):
    data = world(1)

    def fingerprint(pipe, settings=RowSettings(), single_frame=False):
        data.num_frames = 1 if single_frame else 5
        return survey_cache(pipe, data, tmp_path, settings, progress=False).folder.name

    now, images = fingerprint(pipe), fingerprint(pipe, single_frame=True)
    # saving and loading changes nothing
    assert now == fingerprint(KiwiEditPipeline.from_pretrained(random_model)) != images

    def with_more(p, place=...):
        with raised(p, place):
            return fingerprint(pipe), fingerprint(pipe, single_frame=True)

    vae, qwen = pipe.vae, pipe.mllm.model
    for p in (
        vae.decoder.conv_in.bias,
        vae.post_quant_conv.bias,
        pipe.transformer.proj_out.bias,
        qwen.language_model.norm.weight,
        pipe.guidance.image_queries,
        pipe.guidance.connector[0].bias,
    ):
        assert with_more(p) == (now, images)
    past = vae.encoder.conv_in.weight, (0, 0, 0)
    assert with_more(*past)[0] != now and with_more(*past)[1] == images
    for p in (vae.encoder.conv_in.bias, vae.quant_conv.bias, qwen.visual.patch_embed.proj.weight):
        assert not set(with_more(p)) & {now, images}
    assert (
        len(
            {
                fingerprint(pipe, s)
                for s in (
                    RowSettings(),
                    RowSettings("bfloat16"),
                    RowSettings(shrink=(0.7, 1)),
                    RowSettings(shrink=(0.7, 1), seed=1),
                    RowSettings(batch=2),
                )
            }
        )
        == 5
    )

    def parts():
        return {name for name, value in _frozen_digests(pipe).items() if value != before[name]}

    before = _frozen_digests(pipe)
    with monkeypatch.context() as m:
        m.setattr(pipe.processor.tokenizer, "chat_template", pipe.processor.tokenizer.chat_template + " ")
        assert parts() == {"processor"}
    mean = list(vae.config.latents_mean)
    vae.register_to_config(latents_mean=[0.5] + mean[1:])
    assert parts() == {"autoencoder"}
    vae.register_to_config(latents_mean=mean)
    queries = pipe.guidance.config.num_ref_queries
    pipe.guidance.register_to_config(num_ref_queries=queries + 1)
    assert parts() == {"guidance config"}
    pipe.guidance.register_to_config(num_ref_queries=queries)
    assert not parts() and fingerprint(pipe) == now


# files


def test_only_what_changed_is_computed(pipe, tmp_path):
    data = world(6)
    first = build_cache(pipe, data, tmp_path, shard_size=2, progress=False)
    assert sorted(data.read) == list(range(6)) and len(list(first.folder.glob("rows-*"))) == 3
    times = {path: path.stat().st_mtime_ns for path in first.folder.glob("rows-*")}
    data.read.clear()
    again = build_cache(pipe, data, tmp_path, shard_size=4, progress=False)
    assert data.read == [] and {path: path.stat().st_mtime_ns for path in again.folder.glob("rows-*")} == times
    data.samples[3] = replace(data.samples[3], instruction="Add a blue ring to the left.")
    state = survey_cache(pipe, data, tmp_path, progress=False)
    assert state.missing == [3] and not state.stale and "5 of 6 rows reused, 1 to compute" in repr(state)
    assert data.read == []
    changed = build_cache(pipe, data, tmp_path, progress=False)
    assert data.read == [3] and not torch.equal(changed.row(3)["input_ids"], first.row(3)["input_ids"])
    assert equal(changed.row(4), first.row(4))
    data.read.clear()
    other = build_cache(pipe, data, tmp_path, RowSettings("bfloat16"), progress=False)
    assert sorted(data.read) == list(range(6)) and other.folder != first.folder
    assert other.row(0)["target"].dtype == torch.bfloat16
    state = survey_cache(pipe, data, tmp_path, progress=False)
    assert state.stale == [other.folder] and state.prune() > 1000 and not other.folder.exists() and not state.stale
    data.samples = data.samples[2:]
    state = survey_cache(pipe, data, tmp_path, progress=False)
    assert len(state.stale) == 1 and state.prune() > 1000  # the shard of the first two rows
    assert equal(build_cache(pipe, data, tmp_path, progress=False).row(0), first.row(2))
    assert "stale" not in repr(survey_cache(pipe, data, tmp_path, progress=False))


def test_another_model_gets_other_rows(pipe, tmp_path):
    clips, images = world(2, num_frames=5), world(2)
    for name, data in (("clips", clips), ("images", images)):
        build_cache(pipe, data, tmp_path / name, progress=False)
    with raised(pipe.vae.encoder.conv_in.weight, (0, 0, 0)):  # acts on the past only
        assert survey_cache(pipe, images, tmp_path / "images", progress=False).missing == []
        assert survey_cache(pipe, clips, tmp_path / "clips", progress=False).missing == [0, 1]


class Slow(WorldDataset):
    def __getitem__(self, i):
        time.sleep(0.1)
        return super().__getitem__(i)


def build(model, folder, kind=WorldDataset):
    data = kind(dict(add=1.0), 1, 32, 32, samples=40)
    return build_cache(KiwiEditPipeline.from_pretrained(model), data, folder, shard_size=3, progress=False)


def test_a_killed_build_goes_on_where_it_was(pipe, random_model, tmp_path):
    data = WorldDataset(dict(add=1.0), 1, 32, 32, samples=40)
    process = common.start(build, random_model, tmp_path / "cache", Slow, said=tmp_path / "said")
    assert common.kill_when(process, lambda: len(list((tmp_path / "cache").glob("*/rows-*"))) >= 4) == -signal.SIGKILL
    shards = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*/rows-*")}
    with pytest.raises(FileNotFoundError, match="`folder` has to hold a finished cache"):
        LatentCache(next((tmp_path / "cache").glob("*/made_with.json")).parent)
    state = survey_cache(pipe, data, tmp_path / "cache", progress=False)
    assert 4 <= len(shards) < 13 and state.missing == list(range(3 * len(shards), 40)) and not state.broken
    cache = build(random_model, tmp_path / "cache")
    assert all((cache.folder / name).read_bytes() == content for name, content in shards.items())
    whole = _encode_samples(pipe, [data[i] for i in range(40)])
    assert len(cache) == 40 and all(equal(cache.row(i), whole[i]) for i in range(40))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, bytes: path.write_bytes(bytes[:-10]),
        lambda path, bytes: path.write_bytes(b"\0" * len(bytes)),
        lambda path, bytes: path.unlink(),
    ],
)
def test_a_damaged_shard_is_named_by_readers_and_mended_by_builders(pipe, tmp_path, damage, caplog):
    data = world(4)
    cache = build_cache(pipe, data, tmp_path, shard_size=2, progress=False)
    rows, shard = LatentCache(cache.folder, preload=True).rows(range(4)), cache.folder / cache.entries[0][1]
    content = shard.read_bytes()
    damage(shard, content)
    opened = LatentCache(cache.folder)
    with pytest.raises(ValueError, match=f"`folder` has to hold whole shards but .*{shard.name}.*`build_cache`"):
        opened.row(1)
    assert equal(opened.row(2), rows[2])
    missing = not shard.exists()
    data.read.clear()
    mended = build_cache(pipe, data, tmp_path, progress=False)
    assert data.read == [0, 1] and all(map(equal, mended.rows(range(4)), rows))
    assert missing or f"{shard.name} cannot be read" in caplog.text


def test_bad_rows_are_skipped_counted_and_named(pipe, tmp_path, caplog):
    data = world(5)
    data.samples[4] = data.samples[1]
    data.bad = {1: "no such file", 4: "no such file"}
    cache = build_cache(pipe, data, tmp_path, RowSettings(batch=2), progress=False)
    assert len(cache) == 3
    assert [row["id"] for row in cache.rows(range(3))] == [f"world train seed {1000 + i}" for i in (0, 2, 3)]
    assert [error.index for error in cache.bad] == [1, 4] and str(cache.bad[0]) == "table row 1: no such file"
    assert caplog.text.count("table row 1: no such file") == 1
    assert [str(error) for error in LatentCache(cache.folder).bad] == [str(error) for error in cache.bad]
    data.bad.clear()
    assert len(build_cache(pipe, data, tmp_path, RowSettings(batch=2), progress=False)) == 5  # somebody has mended them
    data.bad = dict.fromkeys(range(5), "gone")
    with pytest.raises(ValueError, match="`dataset`.*all 5 are bad.*table row 0: gone"):
        build_cache(pipe, data, tmp_path, progress=False)
    data.samples = []
    for make in (
        lambda: build_cache(pipe, data, tmp_path),
        lambda: survey_cache(pipe, data, tmp_path),
        lambda: OnlineRows(pipe, data),
    ):
        with pytest.raises(ValueError, match="`dataset`.*at least one.*empty"):
            make()


def test_a_row_without_a_key_is_bad(pipe, tmp_path, caplog):
    data, good = world(3), Rows.key

    class Keyless(Rows):
        def key(self, i):
            if i == 1:
                raise BadRow(1, "table row 1", "no such file")
            return good(self, i)

    cache = build_cache(pipe, Keyless(data.samples), tmp_path, progress=False)
    assert len(cache) == 2 and [error.index for error in cache.bad] == [1]
    assert caplog.text.count("Skipped table row 1: no such file") == 1


def test_many_builders_share_the_rows(pipe, tmp_path):
    data = world(16)
    for part in range(3):
        assert build_cache(pipe, data, tmp_path / "parts", part=part, parts=3, progress=False) is None
    assert sorted(data.read) == list(range(16)) and len(list(tmp_path.glob("parts/*/rows-*"))) == 3
    shared, alone = (build_cache(pipe, data, tmp_path / name, progress=False) for name in ("parts", "alone"))
    assert len(data.read) == 32 and all(map(equal, shared.rows(range(16)), alone.rows(range(16))))
    with pytest.raises(ValueError, match="`part`"):
        build_cache(pipe, data, tmp_path / "parts", part=3, parts=3)
    with pytest.raises(ValueError, match="`shard_size`"):
        build_cache(pipe, data, tmp_path / "parts", shard_size=0)


def test_worker_processes_change_nothing(pipe, tmp_path):
    data = world(5)
    data.bad = {2: "broken"}
    a, b = (
        build_cache(pipe, data, tmp_path / str(workers), workers=workers, shard_size=2, progress=False)
        for workers in (0, 2)
    )
    assert [p.name for p in sorted(a.folder.iterdir())] == [p.name for p in sorted(b.folder.iterdir())]
    assert all(map(equal, a.rows(range(4)), b.rows(range(4))))


def test_a_cache_reads_what_is_asked_for(pipe, tmp_path):
    data = world(6)
    built = build_cache(pipe, data, tmp_path, shard_size=1, progress=False)
    lazy, preloaded = LatentCache(built.folder), LatentCache(built.folder, preload=True)
    assert lazy.shapes == [(1, 32, 32, False)] * 6 and lazy._open.cache_info().currsize == 0
    row = lazy.rows([4])[0]
    assert lazy._open.cache_info().currsize == 1 and equal(row, preloaded.row(4))
    for path in built.folder.glob("rows-*"):
        path.unlink()
    assert len(preloaded.rows(range(6))) == 6
    with pytest.raises(ValueError, match="whole shards"):
        lazy.row(0)
    assert json.loads((built.folder / "made_with.json").read_text())["settings"]["dtype"] == "float16"


# plans


SQUARE, WIDE, CLIP = (1, 64, 64, False), (1, 48, 80, False), (5, 64, 64, True)


def stream(plan, source, batches):
    return [i for n in range(batches) for i in plan.rows(source, n)]


@pytest.mark.parametrize("sizes, batch", [((7,), 3), ((7, 4, 1), 3), ((16, 5), 4), ((2, 2, 2), 5)])
def test_every_row_comes_once_before_any_comes_again(sizes, batch):
    shapes = [shape for shape, n in zip((SQUARE, WIDE, CLIP), sizes) for _ in range(n)]
    shapes = [shapes[i] for i in np.random.default_rng(0).permutation(len(shapes))]
    plan = BatchPlan([shapes], batch, seed=3)
    orders = {shape: [] for shape in set(shapes)}
    epochs = 6 * batch  # after so many, every bucket has filled whole batches
    for n in range(epochs * len(shapes) // batch):
        rows = plan.rows(0, n)
        assert len(rows) == batch and len({shapes[i] for i in rows}) == 1
        orders[shapes[rows[0]]] += rows
    for shape, order in orders.items():
        size = shapes.count(shape)
        walks = [order[k : k + size] for k in range(0, len(order), size)]
        assert len(walks) == epochs
        assert all(sorted(walk) == [i for i, s in enumerate(shapes) if s == shape] for walk in walks)
        if size > 3:
            assert len(set(map(tuple, walks))) > epochs / 2  # reshuffled


def test_no_bucket_waits_for_long():
    plan = BatchPlan([[SQUARE] * 40 + [WIDE] * 20], 4)
    wide = [n for n in range(300) if plan.rows(0, n)[0] >= 40]
    assert 95 <= len(wide) <= 105 and max(np.diff(wide)) <= 20


def test_round_robin_takes_turns_and_exhausted_sources_start_again():
    plan = BatchPlan([[SQUARE] * 8, [CLIP] * 3, [WIDE] * 2], [4, 1, 2], seed=5)
    turns = [plan(step) for step in range(18)]
    assert [source for source, _ in turns] == [0, 1, 2] * 6 and [len(rows) for _, rows in turns[:3]] == [4, 1, 2]
    assert sorted(turns[0][1] + turns[3][1]) == list(range(8))
    assert sorted(sum((turns[k][1] for k in (1, 4, 7)), [])) == [0, 1, 2]
    assert sorted(turns[2][1]) == sorted(turns[17][1]) == [0, 1]


def test_weights_are_shares_and_no_batch_is_passed_over():
    plan = BatchPlan([[SQUARE] * 10, [CLIP] * 10, [WIDE] * 10], 2, "weighted", [6, 3, 0])
    turns = [plan.turn(step) for step in range(6000)]
    for source, share in enumerate((2 / 3, 1 / 3, 0)):
        numbers = [n for s, n in turns if s == source]
        assert numbers == list(range(len(numbers))) and len(numbers) / 6000 == pytest.approx(share, abs=0.03)
    firsts = [source for source, _ in turns[:64]]
    assert firsts != sorted(firsts)


def test_a_plan_is_a_function_of_seed_and_step():
    def make(seed=2):
        return BatchPlan([[SQUARE] * 30 + [WIDE] * 9, [CLIP] * 11], [4, 2], "weighted", [0.5, 0.5], seed)

    walked, steps = make(), list(range(0, 3000, 7))
    forward = [walked(step) for step in steps]
    assert forward == [make()(step) for step in steps[:5]] + [walked(step) for step in reversed(steps)][::-1][5:]
    assert make()(2996) == forward[428] and make(3)(2996) != forward[428]
    assert make()(1_000_003) == walked(1_000_003)


def test_parts_make_up_the_whole_batch(pipe, tmp_path):
    caches = [
        build_cache(pipe, data, tmp_path / str(i), progress=False)
        for i, data in enumerate((world(6), world(5, ("subject",))))
    ]
    batches = Batches(caches, 4, seed=2)
    for step in range(4):
        whole, parts = batches(step), [Batches(caches, 4, seed=2)(step, part, 2) for part in range(2)]
        assert whole.places == [0, 1, 2, 3] and [part.places for part in parts] == [[0, 2], [1, 3]]
        for part in parts:
            assert part.ids == [whole.ids[i] for i in part.places]
            assert torch.equal(part.target, whole.target[part.places])
            assert torch.equal(part.inputs[0].input_ids, whole.inputs[part.places[0]].input_ids)
    with pytest.raises(ValueError, match="`parts` has to divide the batch of 4 rows"):
        batches(0, 0, 3)
    with pytest.raises(ValueError, match="`part`"):
        batches(0, 2, 2)


def test_bad_rows_met_online_leave_the_batch_and_never_stop_it(pipe, caplog):
    data = world(4)
    rows = OnlineRows(pipe, data)
    batches = Batches([rows], 2, seed=1)
    (_, first), (_, second) = batches.plan(0), batches.plan(1)
    data.bad = {first[0]: "broken"}
    batch = batches(0)
    assert batch.places == [1] and batch.ids == [data.samples[first[1]].id]
    assert f"table row {first[0]}: broken" in caplog.text and [e.index for e in rows.bad] == [first[0]]
    data.bad = dict.fromkeys(first, "broken")
    batch = batches(0)
    assert batch.ids == [data.samples[i].id for i in second] and "the source's next batch" in caplog.text
    batches(0)
    assert caplog.text.count("Skipped") == 2  # each is named once
    data.bad = dict.fromkeys(range(4), "broken")
    with pytest.raises(ValueError, match="at least one good row.*table row"):
        batches(0)


@pytest.mark.parametrize("task, num_frames", [("subject", 5), ("add", 1), ("isolate", 5)])
def test_online_rows_neither_decode_nor_hash_before_they_are_asked(pipe, tmp_path, monkeypatch, task, num_frames):
    drawn = WorldDataset({task: 1.0}, num_frames, samples=2, **SMALL)
    table = save_dataset(drawn, tmp_path, format="csv", progress=False)
    files = MetadataDataset(table, num_frames=num_frames, max_pixels=32 * 32, factor=16)
    shapes = [_sample_shape(drawn[i]) for i in range(2)]
    rows = [
        OnlineRows(pipe, data, RowSettings(shrink=(0.7, 1.0)), progress=False).rows([0])[0] for data in (drawn, files)
    ]
    for data in (WorldDataset, MetadataDataset):
        monkeypatch.setattr(data, "__getitem__", None)
        monkeypatch.setattr(data, "key", None)
    assert [OnlineRows(pipe, data, progress=False).shapes for data in (drawn, files)] == [shapes] * 2
    assert [row["shape"] for row in rows] == [shapes[0]] * 2


def test_clips_that_do_not_fit_together_are_no_part_of_the_plan(pipe, tmp_path):
    table = save_dataset(WorldDataset(dict(add=1.0), 1, samples=2, **SMALL), tmp_path, format="csv", progress=False)
    Image.new("RGB", (64, 32)).save(tmp_path / "clips/000001-target.png")
    rows = OnlineRows(pipe, MetadataDataset(table, num_frames=1, max_pixels=64 * 64, factor=16), progress=False)
    assert len(rows) == 1 and [error.index for error in rows.bad] == [1]


def test_rows_that_the_headers_show_to_be_bad_are_no_part_of_the_plan(pipe):
    class Headers(Rows):
        def shape(self, i):
            if i == 0:
                raise BadRow(0, "table row 0", "3 frames against 5")
            return super().shape(i)

    rows = OnlineRows(pipe, Headers(world(3).samples))
    assert len(rows) == len(rows.shapes) == 2 and [e.index for e in rows.bad] == [0]
    assert rows.rows([0])[0]["id"] == "world train seed 1001"
