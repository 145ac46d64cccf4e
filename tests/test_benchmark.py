"""The benchmark on a small random model and on editors whose scores are known."""

import json
import runpy
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from kiwi_edit.eval import benchmark
from kiwi_edit.eval.benchmark import (
    Report,
    Scene,
    benchmark_samples,
    _candidate_targets,
    _edit_batch,
    _flicker_error,
    measure,
    provenance,
    run_benchmark,
    run_editors,
    _succeeded,
)
from kiwi_edit.core import asset, preset
from kiwi_edit.encoder import make_tokenizer
from kiwi_edit.metrics import nearest, perceptual_features, squared_error
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.video import as_frames
from kiwi_edit.world import DIFFICULTIES, EVAL_SEED, TASKS, World

runpy.run_path(str(asset("benchmarks/baselines.py")))["read_baselines"]()  # from here on a module by this name
import ranked
from ranked import BENCH_DIGESTS, Ranking, _bench_digest, baselines, check_bench

WORLD = World(32, 32, split="eval")
QUICK = dict(size=32, progress=False)
OTHERS = baselines()
COPIED = OTHERS["copy of the source"]


class Target:
    "Returns the target, or that of another scene."

    def __init__(self, wrong=False, world=WORLD):
        self.wrong, self.world = wrong, world

    def edit_samples(self, samples, steps=None):
        targets = [
            s.target if not self.wrong else self.world.sample(s.meta["seed"], s.task, edit=3).target for s in samples
        ]
        return np.stack(targets)


class Noise:
    "Returns noise of its own for each scene."

    def edit_samples(self, samples, steps=None):
        return np.stack(
            [np.random.default_rng(s.meta["seed"]).integers(0, 256, s.source.shape, np.uint8) for s in samples]
        )


@pytest.fixture
def network():
    "A test that asks for it measures with the network, the others without."
    if perceptual_features() is None:
        pytest.skip("the extra `eval` is not installed")


@pytest.fixture(autouse=True)
def blind(request, monkeypatch):
    if "network" not in request.fixturenames:
        monkeypatch.setattr(benchmark, "perceptual_features", lambda device: None)


@pytest.fixture(scope="module")
def pipe():
    small = preset("tiny")
    tokenizer = make_tokenizer(
        [WORLD.sample(EVAL_SEED + i, task).instruction for i in range(20) for task in TASKS], 400
    )
    text = dict(small.mllm["text_config"], num_hidden_layers=1)
    vision = dict(small.mllm["vision_config"], depth=1, fullatt_block_indexes=[0])
    small = replace(
        small,
        transformer=dict(small.transformer, num_layers=2),
        mllm=dict(small.mllm, text_config=text, vision_config=vision),
        vae=dict(small.vae, base_dim=8, decoder_base_dim=8),
        height=32,
        width=32,
        max_pixels=32 * 32,
    )
    torch.manual_seed(0)
    pipe = KiwiEditPipeline.from_preset(small, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_batch_gives_what_each_edit_gives_alone(pipe):
    # clips with and without references, words of all lengths
    samples = [WORLD.sample(EVAL_SEED + i, task) for i, task in enumerate(TASKS[:6])]
    together, latents = edited_with_latents(pipe, samples)
    assert together.shape == (6, 5, 32, 32, 3) and together.dtype == np.uint8
    for i, sample in enumerate(samples):
        reference = None if sample.reference is None else PIL.Image.fromarray(sample.reference)
        generator = torch.Generator().manual_seed(EVAL_SEED + i)
        alone = pipe(
            sample.instruction,
            sample.source,
            reference,
            num_inference_steps=2,
            generator=generator,
            output_type="latent",
        ).frames
        torch.testing.assert_close(latents[i], alone[0], atol=2e-4, rtol=2e-4)

    # each of what an edit is given matters by far more than that
    changed = [
        replace(samples[0], instruction="Erase it."),
        replace(samples[0], reference=None),
        replace(samples[0], source=samples[1].source),
    ]
    for other in changed:
        assert (edited_with_latents(pipe, [other])[1][0] - latents[0]).abs().max() > 5e-3
    reseeded = replace(samples[0], meta=samples[0].meta | dict(seed=7))
    assert (edited_with_latents(pipe, [reseeded])[1][0] - latents[0]).abs().max() > 0.5


def edited_with_latents(pipe, samples):
    "What a batch gives, before and after it is decoded (the statistics of a random model are 0 and 1)."
    seen = []
    handle = pipe.vae.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    edited = _edit_batch(pipe, samples, steps=2)
    handle.remove()
    return edited, seen[-1]


@pytest.mark.parametrize("schedule", ["diffusers", "native"])
def test_a_batch_follows_the_schedule_of_its_model(pipe, schedule):
    "Released models end their noise levels elsewhere than the kit's own."
    sample, before = WORLD.sample(EVAL_SEED, "add"), pipe.config.schedule
    pipe.register_to_config(schedule=schedule)
    try:
        _, latents = edited_with_latents(pipe, [sample])
        settings = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(EVAL_SEED), output_type="latent")
        alone = pipe(sample.instruction, sample.source, None, **settings).frames
    finally:
        pipe.register_to_config(schedule=before)
    torch.testing.assert_close(latents[0], alone[0], atol=1e-6, rtol=1e-6)


def test_the_whole_run_on_a_model(pipe, tmp_path):
    report = run_benchmark(pipe, samples=3, steps=1, batch_size=2, progress=False)
    assert list(report.rows) == list(TASKS) and all(row["samples"] == 3 for row in report.rows.values())
    assert report.size == (5, 32, 32) and report.difficulty == "full" and report.steps == 1
    assert report.seconds_per_edit > 0
    assert report.rows["style"]["psnr_outside"] is None and report.rows["style"]["psnr_lost"] is None
    row = report.rows["subject"]
    # what a scene gains does not make up for what another one loses
    assert row["psnr_lost"] >= max(0, row["psnr_ceiling"] - row["psnr_outside"]) - 1e-6
    saved = report.save(tmp_path / "new" / "folder" / "benchmark.json")
    json.loads(saved.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = Report.load(saved)
    assert loaded.rows == report.rows and loaded._repr_markdown_() == report._repr_markdown_()
    assert loaded.size == report.size
    report.strips(2).savefig(tmp_path / "benchmark.png")
    image = PIL.Image.open(tmp_path / "benchmark.png")
    assert image.width > image.height > 300
    with pytest.raises(ValueError, match="no pictures"):
        loaded.strips()


def test_the_batch_size_changes_nothing(pipe):
    one, three = (run_benchmark(pipe, "add", samples=3, steps=1, batch_size=size, progress=False) for size in (1, 3))
    for a, b in zip(one.records, three.records):
        assert a["error"] == pytest.approx(b["error"], rel=1e-2) and a["distance"] == b["distance"]


def test_copying_scores_zero_and_keeps_everything():
    report = run_benchmark(COPIED, samples=4, **QUICK)
    for task, row in report.rows.items():
        assert row["pooled"] == 0 and row["ceiling"] is None and row["psnr_lost"] is None
        if task in ("style", "isolate", "plate"):
            assert row["psnr_outside"] is None
        else:
            assert row["psnr_outside"] > 75  # source and target may differ by a level at the rim of a shadow
    assert "nan" not in report._repr_markdown_()


def test_without_the_network_success_is_unknown_and_the_report_says_what_is_missing(tmp_path):
    reports = [run_benchmark(editor, ("remove", "style"), samples=2, **QUICK) for editor in (Target(), COPIED)]
    row = reports[0].rows["remove"]
    assert [row[name] for name in ("success", "success_interval", "told_apart", "likeness")] == [None] * 4
    assert row["sharpness"] == 1
    for shown in (reports[0], Ranking(reports), reports[0].compare(reports[1])):
        assert "nan" not in shown._repr_markdown_().lower()
    assert "kiwi-edit[eval]" in reports[0]._repr_markdown_() and "kiwi-edit[eval]" in Ranking(reports)._repr_markdown_()
    assert Report.load(reports[0].save(tmp_path / "r.json")).rows == reports[0].rows
    assert list(Ranking.load(Ranking(reports).save(tmp_path / "ranking.json")).rows) == ["Target", "copy of the source"]


def test_the_target_succeeds_always(network):
    for row in run_benchmark(Target(), samples=2, **QUICK).rows.values():
        assert row["pooled"] == row["told_apart"] == row["sharpness"] == row["success"] == 1
        assert row["likeness"] == pytest.approx(1, abs=1e-4)
        assert row["success_interval"] == row["told_apart_interval"] == pytest.approx((0.342, 1), abs=1e-3)  # of two


def test_another_references_target_is_never_told_apart(network):
    rows = run_benchmark(Target(wrong=True), ("subject", "background"), samples=3, **QUICK).rows
    assert [(row["told_apart"], row["success"]) for row in rows.values()] == [(0, 0)] * 2
    assert all(row["pooled"] < 0.6 for row in rows.values())


def test_what_must_not_succeed_does_not(network):
    editors = baselines(KiwiEditPipeline.from_pretrained("kiwi-edit-tiny"))
    del editors["frame by frame"], editors["reference pasted"]
    reports = run_editors(editors, samples=3, batch_size=3, progress=False)
    best, blurred, *rest = [[record["success"] for record in report.records] for report in reports]
    assert not np.any(rest)
    assert np.mean(blurred) < np.mean(best) / 3
    assert np.mean([record["told_apart"] for record in reports[0].records]) > 0.9


def test_scenes_are_shared_and_change_nothing(pipe):
    editors = dict(target=Target(), model=pipe, copied=COPIED)
    shared = run_editors(editors, ("add", "plate"), samples=3, steps=1, batch_size=2, progress=False)
    alone = run_benchmark(pipe, ("add", "plate"), samples=3, steps=1, batch_size=2, progress=False, name="model")
    assert [report.model for report in shared] == list(editors) and shared[1].steps == 1
    for a, b in zip(shared[1].records, alone.records):
        assert (a["task"], a["seed"]) == (b["task"], b["seed"])
        numbers = [
            [record[name] for name in ("error", "sharpness", "ceiling_error", "outside_error", "ceiling_outside_error")]
            for record in (a, b)
        ]
        assert numbers[0] == pytest.approx(numbers[1], nan_ok=True)
    assert [row["pooled"] for row in shared[0].rows.values()] == [1, 1]
    assert [row["pooled"] for row in shared[2].rows.values()] == [0, 0]


GOOD = dict(
    told_apart=True,
    sharpness=0.61,
    feature_error=0.4,
    feature_distance=0.5,
    outside_error=15.0,
    ceiling_outside_error=10.0,
)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, True),
        (dict(told_apart=False), False),
        (dict(sharpness=0.59), False),
        (dict(feature_error=0.5), False),
        (dict(outside_error=15.8), True),
        (dict(outside_error=15.9), False),  # 2 dB are a factor of 1.585
        (dict(outside_error=np.nan, ceiling_outside_error=np.nan), True),  # an edit of the whole frame
        (dict(outside_error=0.0, ceiling_outside_error=np.nan), True),
        (dict(outside_error=0.1, ceiling_outside_error=np.nan), False),  # no autoencoder
        (dict(outside_error=0.005, ceiling_outside_error=np.nan), True),  # a rounded level here and there
    ],
)
def test_a_success_is_all_of_it(change, expected):
    assert _succeeded(GOOD | change) is expected


@pytest.mark.parametrize("name", ["mean colour", "pixel noise", "target, blurred"])
def test_editors_that_cheat_stay_inside_the_mask(name):
    editor = OTHERS[name]
    for sample in benchmark_samples(WORLD, "subject", 2):
        (output,) = editor.edit_samples([sample])
        (again,) = editor.edit_samples([sample])
        assert output.dtype == np.uint8 and (output == again).all()
        assert np.abs(output.astype(int) - sample.source)[~sample.mask].max() <= 1
        assert (output != sample.target)[sample.mask].any()


def test_the_oracle_is_the_ceiling(pipe):
    rows = run_benchmark(baselines(pipe)["autoencoder of the target"], samples=2, **QUICK).rows
    for row in rows.values():
        assert row["pooled"] == pytest.approx(row["ceiling"], abs=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_candidates_are_distinct_edits_of_one_source(task):
    for seed in range(EVAL_SEED, EVAL_SEED + 4):
        sample = WORLD.sample(seed, task)
        targets, own = _candidate_targets(WORLD, sample)
        assert len(targets) == 8 and own == seed % 8 and (targets[own] == sample.target).all()
        assert min(squared_error(targets[i], targets[j]) for i in range(8) for j in range(i)) > 1
        assert [nearest(t, targets) for t in targets] == list(range(8))


def test_pictures_are_scored_beside_clips():
    report = run_benchmark(Target(), ("isolate", "plate", "remove"), samples=2, **QUICK)
    assert [sample.source.shape[0] for pairs in report.shown.values() for sample, _ in pairs[:1]] == [1, 1, 5]


def test_white_paper_is_no_isolated_thing(network):
    white = type(
        "White",
        (),
        dict(edit_samples=lambda self, samples, steps: np.stack([np.full_like(s.target, 255) for s in samples])),
    )()
    row = run_benchmark(white, "isolate", samples=4, **QUICK).rows["isolate"]
    assert 0 < row["pooled"] < 1 and row["success"] == 0


def test_candidates_of_a_reference_task_share_the_words():
    for task in ("subject", "background"):
        edits = [WORLD.sample(EVAL_SEED + 3, task, edit=k) for k in range(8)]
        assert len({e.instruction for e in edits}) == 1 and all((e.source == edits[0].source).all() for e in edits)
        targets, own = _candidate_targets(WORLD, edits[0])
        known = [any((t == e.target).all() for e in edits) for t in targets]
        assert sum(known) >= 7


def test_too_many_candidates_are_refused():
    plain = World(16, 16, 1, split="eval", difficulty="easy")
    with pytest.raises(ValueError, match="has to be at most the"):
        _candidate_targets(_OnlyOneEdit(plain), plain.sample(EVAL_SEED, "style"), 8)


class _OnlyOneEdit:
    "A world with one edit a scene."

    def __init__(self, world):
        self.world = world

    def sample(self, seed, task, edit=0):
        return self.world.sample(seed, "style")


class _Hidden:
    "A world where every second edit changes nothing."

    def sample(self, seed, task):
        sample = WORLD.sample(seed, task)
        return replace(sample, target=sample.source.copy()) if seed % 2 else sample


def test_edits_that_cannot_be_seen_are_passed_over():
    assert [s.meta["seed"] - EVAL_SEED for s in benchmark_samples(_Hidden(), "change", 3)] == [0, 2, 4]


def test_comparison_in_pairs():
    report, copied, target = (
        run_benchmark(e, ("add", "style"), samples=4, **QUICK) for e in (Noise(), COPIED, Target())
    )
    minus = lambda a, b: {
        task: dict(zip(("success", "told_apart", "pooled"), rest)) for task, _, *rest in a.compare(b).rows
    }
    rows = minus(target, copied)
    assert [row["pooled"].value for row in rows.values()] == [1, 1] and rows["add"]["pooled"][1:3] == (1, 1)
    assert minus(report, copied)["add"]["pooled"].value == pytest.approx(report.rows["add"]["pooled"])
    better = minus(with_success(target, 3), with_success(copied, 1))["add"]["success"]
    assert better.value == 50 and better.low <= 50 <= better.high
    assert "minus" in target.compare(copied)._repr_markdown_()
    with pytest.raises(ValueError, match="same difficulty"):
        copied.compare(replace(copied, difficulty="easy"))
    with pytest.raises(ValueError, match="share none"):
        copied.compare(replace(copied, records=[dict(r, seed=0) for r in copied.records]))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(tasks=("subject", "dance")), "`tasks` has to hold names of .* but holds 'dance'"),
        (dict(tasks=()), "`tasks` has to hold names of .* but holds 'none'"),
        (dict(samples=0), "`samples` has to be at least 1 but is 0"),
        (dict(batch_size=0), "`batch_size` has to be at least 1"),
        (dict(steps=0), "`steps` has to be at least 1"),
        (dict(seed=5), "`seed` has to be at least 1000000"),
        (dict(difficulty="hard"), "`difficulty` has to be one of"),
        (dict(size=36), "`size` has to be a multiple of 8"),
    ],
)
def test_arguments_are_checked(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(pipe, **dict(samples=1, progress=False) | wrong)


def test_outputs_of_another_shape_are_refused():
    samples = benchmark_samples(WORLD, "add", 2)
    with pytest.raises(ValueError, match="`outputs` has to be"):
        measure([Scene(WORLD, s) for s in samples], np.zeros((2, 5, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": "x"}'])
def test_reports_that_are_none(tmp_path, text):
    with pytest.raises(FileNotFoundError):
        Report.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="has to be a saved Report"):
        Report.load(tmp_path / "bad.json")


@pytest.mark.parametrize("difficulty", BENCH_DIGESTS)
def test_the_fixed_sets_are_what_they_were(difficulty, monkeypatch):
    assert set(BENCH_DIGESTS[difficulty]) == set(TASKS)
    assert check_bench(("add", "plate"), difficulty) == {
        task: BENCH_DIGESTS[difficulty][task] for task in ("add", "plate")
    }
    monkeypatch.setitem(ranked.BENCH_DIGESTS[difficulty], "plate", "0" * 16)
    with pytest.raises(ValueError, match="but plate are not"):
        check_bench(("add", "plate"), difficulty)


def test_a_difficulty_without_a_fixed_set():
    with pytest.raises(ValueError, match="`difficulty` has to be one of easy, full but is 'hard'"):
        check_bench(difficulty="hard")


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_every_report_names_its_difficulty(difficulty, tmp_path):
    reports = [
        run_benchmark(editor, samples=2, difficulty=difficulty, keep=0, **QUICK)
        for editor in (Target(world=World(32, 32, split="eval", difficulty=difficulty)), COPIED)
    ]
    assert {sample["task"] for sample in reports[0].records} == set(TASKS)
    assert [row["pooled"] for row in reports[0].rows.values()] == [1] * 8
    ranking = Ranking.load(Ranking(reports).save(tmp_path / "ranking.json"))
    for found in (*reports, Report.load(reports[1].save(tmp_path / "benchmark.json")), ranking):
        assert found.difficulty == difficulty and f"world: {difficulty}, 5 frames of 32x32" in found._repr_markdown_()
    assert f"world: {difficulty}" in reports[0].compare(reports[1])._repr_markdown_()
    other = replace(reports[1], difficulty="another")
    with pytest.raises(ValueError, match="same difficulty"):
        reports[0].compare(other)
    with pytest.raises(ValueError, match="on the same scenes"):
        Ranking([reports[0], other])


@pytest.mark.parametrize("task", TASKS)
def test_easy_scenes_have_eight_candidates_too(task):
    world = World(32, 32, split="eval", difficulty="easy")
    for sample in benchmark_samples(world, task, 4):
        targets, own = _candidate_targets(world, sample)
        assert len(targets) == 8 and (targets[own] == sample.target).all() and sample.meta["difficulty"] == "easy"


@pytest.mark.parametrize("part", ["source", "target", "mask", "reference", "instruction"])
def test_the_digest_sees_every_part(part):
    sample = WORLD.sample(EVAL_SEED, "subject")
    value = getattr(sample, part)
    other = replace(
        sample,
        **{part: value + "." if part == "instruction" else ~value if part == "mask" else np.roll(value, 4, axis=-2)},
    )
    assert _bench_digest([sample]) != _bench_digest([other])
    if part == "source":
        flipped = value.copy()
        flipped[0, 3, 3, 0] ^= 1  # the last bit of one pixel is the processor's
        assert _bench_digest([sample]) == _bench_digest([replace(sample, source=flipped)])


def test_a_pasted_reference_stays_in_its_place():
    for task in ("subject", "background"):
        for sample in benchmark_samples(WORLD, task, 4):
            (output,) = OTHERS["reference pasted"].edit_samples([sample])
            assert output.dtype == np.uint8 and (output[~sample.mask] == sample.source[~sample.mask]).all()
            assert (output != sample.source)[sample.mask].any()
    white = replace(benchmark_samples(WORLD, "subject", 1)[0], reference=np.full((20, 30, 3), 255, np.uint8))
    assert (OTHERS["reference pasted"].edit_samples([white])[0][white.mask] == 255).all()
    plain = WORLD.sample(EVAL_SEED, "add")
    assert (OTHERS["reference pasted"].edit_samples([plain])[0] == plain.source).all()


def test_frames_alone_are_the_pipelines_own(pipe):
    sample = WORLD.sample(EVAL_SEED, "add")
    (output,) = baselines(pipe)["frame by frame"].edit_samples([sample], 1)
    for frame, edited in zip(sample.source, output):
        alone = as_frames(
            pipe(
                sample.instruction,
                frame[None],
                num_inference_steps=1,
                generator=torch.Generator().manual_seed(EVAL_SEED),
            ).frames[0]
        )
        assert np.abs(alone[0].astype(int) - edited).max() <= 2


def test_flicker_has_known_values():
    target = np.zeros((3, 8, 8, 3), np.uint8)
    target[:, :, 4:] = 200
    mask = np.ones((3, 8, 8), bool)
    blinking = target.copy()
    blinking[1] += 10
    assert _flicker_error(target, target, mask) == 0 and _flicker_error(blinking, target, mask) == 10
    assert np.isnan(_flicker_error(target[:1], target[:1], mask[:1]))
    assert _flicker_error(
        np.stack([target, blinking]), np.stack([target, target]), np.stack([mask, mask])
    ).tolist() == [0, 10]


def with_success(report, hits):
    "The same report with a success for some of its scenes, as a network would have found."
    return replace(
        report,
        records=[
            record | dict(success=i % 4 < hits, told_apart=i % 4 < hits, feature_error=1.0, feature_distance=2.0)
            for i, record in enumerate(report.records)
        ],
    )


def test_editors_are_ranked_by_success(tmp_path):
    editors = {"mean colour": OTHERS["mean colour"], "noise": Noise(), "copied": COPIED, "target": Target()}
    found = run_editors(editors, ("add", "plate"), samples=4, **QUICK)
    reports = [with_success(report, hits) for report, hits in zip(found, (1, 2, 0, 4))]
    ranking = Ranking(reports, dict(versions=dict(torch="2"), hardware=dict(on="a machine"), checkpoint="abc"))
    rows = ranking.rows
    assert list(rows) == ["target", "noise", "mean colour", "copied"]
    assert [row["success"] for row in rows.values()] == [1, 0.5, 0.25, 0]
    assert rows["target"]["pooled"] == rows["target"]["sharpness"] == 1
    assert rows["copied"]["pooled"] == rows["target"]["flicker"] == 0
    assert rows["copied"]["success_interval"] == pytest.approx((0, 0.324), abs=1e-3)
    assert rows["target"]["likeness"] == 0.5
    own = rows["mean colour"]
    assert own["difference"] == 0 and own["difference_interval"] == (0, 0)
    assert rows["target"]["difference"] == -0.75 and rows["target"]["difference_interval"][1] < 0
    loaded = Ranking.load(ranking.save(tmp_path / "ranking.json"))
    assert loaded._repr_markdown_() == ranking._repr_markdown_() and "checkpoint abc" in loaded._repr_markdown_()
    assert "| all tasks | mean colour minus it | add | plate |" in loaded._repr_markdown_()
    assert ranking.strips("add", 2).get_figwidth() > 5
    with pytest.raises(ValueError, match="whose pictures the reports keep"):
        loaded.strips("add")
    with pytest.raises(ValueError, match="on the same scenes"):
        Ranking([reports[0], replace(reports[2], records=reports[2].records[1:])])
    with pytest.raises(ValueError, match="`reports` have to have different names but 'noise' is there more than once"):
        Ranking([*reports, reports[1]])
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match="has to be a saved Ranking"):
        Ranking.load(tmp_path / "none.json")


def test_the_published_ranking_is_of_the_model_that_ships():
    path = asset("benchmarks/baselines.json")
    assert path.stat().st_size < 300_000
    ranking = Ranking.load(path)
    assert ranking.about["checkpoint"] == provenance(torch.device("cpu"), asset("kiwi-edit-tiny"))["checkpoint"]
    full = Report.load(asset("kiwi-edit-tiny/benchmark.json"))
    assert ranking.difficulty == full.difficulty
    for a, b in zip(ranking.reports[0].records, full.records):
        assert (a["task"], a["seed"]) == (b["task"], b["seed"])
        assert a["distance"] == pytest.approx(b["distance"], rel=1e-4)


def test_provenance_names_what_matters():
    about = provenance(torch.device("cpu"))
    assert about["checkpoint"] is None
    assert set(about["versions"]) >= {"kiwi-edit", "torch", "diffusers", "transformers", "pillow"}
    assert "on" in about["hardware"]


def test_a_model_is_ranked_among_the_baselines(pipe, tmp_path):
    reports = run_editors(
        {"random": pipe} | baselines(pipe), "add", 2, difficulty="easy", steps=1, keep=2, progress=False
    )
    ranking = Ranking(reports, provenance(torch.device("cpu")))
    assert ranking.difficulty == "easy"
    assert set(ranking.rows) == {
        "random",
        "frame by frame",
        "reference pasted",
        "mean colour",
        "pixel noise",
        "target, blurred",
        "copy of the source",
        "autoencoder of the target",
    }
    assert {report.size for report in ranking.reports} == {(5, 32, 32)} and ranking.strips("add", 2).get_figwidth() > 5
    loaded = Ranking.load(ranking.save(tmp_path / "baselines.json"))
    assert loaded.rows["random"]["pooled"] == pytest.approx(ranking.rows["random"]["pooled"], abs=1e-4)
