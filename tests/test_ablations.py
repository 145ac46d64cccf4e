"The experiments' cells: what an arm shuts stays shut, the order is the only difference of curricula, the tables say what the numbers say."

import runpy

import numpy as np
import pytest
import torch

from kiwi_edit.core import asset
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.train import foundations
from kiwi_edit.train.curriculum import STAGES
from kiwi_edit.world import EVAL_SEED

SCRIPT = runpy.run_path(str(asset("benchmarks/ablations.py")))
experiment = SCRIPT["read_experiment"]()  # from here on a module by this name
from experiment import *

PLAN = Plan(pairs=6, words=6, scenes=2, batch_size=2, base=2, first=2, steps=4, seeds=1)


@pytest.fixture(scope="module")
def data():
    "Rows of a few scenes, the references of every kind the world's own, and an arm that is no copy of the source."
    texts = foundations._world_texts
    foundations._world_texts = lambda: texts(50)  # of the tokenizer, which nobody asks
    arm = Arm(torch.eye(32))
    foundations._world_texts = texts
    torch.nn.init.normal_(arm.transformer.proj_out.weight, std=0.1)
    pipe = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")

    def pairs(tasks, number, *more):
        fit = lambda image: np.asarray(PIL.Image.fromarray(image).resize((96, 96)))
        found, kinds = scenes(tasks, number, *more), (*REFERENCES, WHITE)
        references = [dict.fromkeys(kinds, fit(q.reference)) for q in found]
        pictures = {f"{kind} picture": torch.from_numpy(np.stack([r[kind] for r in references])) for kind in kinds}
        return found, make_rows(pipe, found, references) | pictures

    world = World(num_frames=1, split="eval", difficulty=SAME_VIEW)
    held = {}
    for task in ("subject", "background"):
        found, rows = pairs({task: 1.0}, 2, EVAL_SEED, "eval")
        held[task] = [Scene(world, q, q.target, perceptual_features()) for q in found], rows
    words = make_rows(pipe, scenes(WITHOUT, 6, TRAIN_SEED["words"]))
    return Data(pipe, words, pairs(WITH_REFERENCE, 6, TRAIN_SEED["pairs"])[1], held, arm, {})


@pytest.fixture(autouse=True)
def plain():
    "Without a compiler."
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("seed", (0, 1))
def test_curricula_differ_in_nothing_but_the_order(seed, data):
    plan = Plan(steps=50, first=20)
    both, shuffled = (batch_order(plan, Recipe(progressive=way), seed) for way in (True, False))
    assert sorted(both) == sorted(shuffled) and both != shuffled
    assert not any(both[:20]) and any(shuffled[:20]) and sum(both) == 38
    for turn in ("words", "pairs"):  # and the batches are the same ones
        a, b = (
            [
                batches_of(data, PLAN, Recipe(), seed, order)(i, 0, 1)[0]["target"]
                for i, pairs in enumerate(order)
                if pairs == (turn == "pairs")
            ]
            for order in (both, shuffled)
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_a_shut_way_lets_nothing_through(data):
    "With the queries shut the context, and with the latents shut the edit, is the same whatever the reference is."
    rows = {name: values[:2] for name, values in data.pairs.items()}
    latents, context = (f"same view {name}" for name in ("latents", "context"))
    other = rows | {latents: rows[latents].flip(-1) + 1, context: rows[context] + 1}

    def seen(name, rows):
        torch.manual_seed(0)
        batch = rows, "same view", RECIPES[name]
        return data.arm.context(*batch), data.arm(batch)[0]

    for name, by_encoder, by_any in (
        ("both", True, True),
        ("queries only", True, True),
        ("latents only", False, True),
        ("neither", False, False),
    ):
        changed = [not torch.equal(a, b) for a, b in zip(seen(name, rows), seen(name, other))]
        assert changed == [by_encoder, by_any], name


def test_all_arms_learn_from_the_same_samples(data):
    order = batch_order(PLAN, Recipe(), 0)
    a, b = (batches_of(data, PLAN, RECIPES[name], 0, order) for name in ("both", "neither"))
    for number in range(len(order)):
        (one, kind, _), (two, *_) = a(number, 0, 1), b(number, 0, 1)
        assert torch.equal(one["target"], two["target"]) and (kind == "same view") == order[number]


def test_scenes_are_those_of_no_stage_and_of_no_evaluation():
    used = [
        range(stage.first_seed + 100_000 * i, stage.first_seed + 100_000 * i + bucket.samples)
        for stage in STAGES.values()
        for i, bucket in enumerate(stage.buckets)
    ]
    own = [range(first, first + 40_000) for first in TRAIN_SEED.values()]
    assert max(Plan.pairs, Plan.words) <= 30_000  # some pairs are dropped
    for one in own:
        assert one.stop <= EVAL_SEED
        for other in used + [r for r in own if r is not one]:
            assert one.stop <= other.start or other.stop <= one.start, (one, other)


def test_what_was_cut_out_is_put_back_where_it_was():
    frame = np.random.default_rng(0).integers(0, 200, (96, 96, 3), np.uint8)
    cut = np.full((40, 40, 3), 255, np.uint8)
    cut[5:35, 10:30] = frame[50:80, 20:40]
    back = put_back(cut, frame)
    assert np.array_equal(back[50:80, 20:40], frame[50:80, 20:40])
    back[50:80, 20:40] = 255
    assert (back == 255).all()


def test_an_arm_is_run_once_and_goes_on_after_a_stop(data, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "LOOKS", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "measure", stop)  # trained, not tested
        run_arm("both", 1, PLAN, tmp_path, data, progress=False)
    assert not list(tmp_path.rglob("result.json"))
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "batches_of", lambda *args: stop)  # no batch is asked for again
        result = run_arm("both", 1, PLAN, tmp_path, data, progress=False)
    assert set(result["scores"]) == {f"{task} / {kind}" for task in WITH_REFERENCE for kind in kinds_of(task)}
    assert [step for step, _ in result["curve"]] == [2, 4, 6]  # what was seen before the stop is known
    assert run_arm("both", 1, PLAN, tmp_path, data) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match="`name` has to be one of both"):
        run_arm("all", 1, PLAN, tmp_path, data)


def test_a_pasted_reference_leaves_the_rest_as_it_is(data):
    held, rows = data.held_out["subject"]
    laid = pasted(rows, "subject", "same view", [scene.sample for scene in held])
    paper = np.stack([paper_of(picture) for picture in rows["same view picture"].numpy()])
    assert 0.3 < paper.mean() < 0.99
    sources = np.stack([scene.sample.source[0] for scene in held])
    assert np.array_equal(laid[:, 0][paper], sources[paper])
    assert np.array_equal(laid[:, 0][~paper], rows["same view picture"].numpy()[~paper])


def runs(done, seeds=3, scenes=40):
    rng = np.random.default_rng(0)
    scores = {
        column: [int(i < done * scenes) for i in range(scenes)] for column in ("success", "told_apart", "sharpness")
    }
    scores |= dict(distance=[100.0] * scenes, error=list(100 * (1 - done) + rng.normal(0, 3, scenes)))
    names = [f"{task} / {kind}" for task in WITH_REFERENCE for kind in kinds_of(task)] + list(WITHOUT)
    return [dict(seconds=3.6, curve=[[300, 0.5], [600, 0.4]], scores=dict.fromkeys(names, scores))] * seeds


def test_tables_say_what_the_numbers_say(tmp_path):
    arms = {name: runs(0.5) for name in (*RECIPES, *BASELINES)} | {"neither": runs(0.25), "cut-outs": runs(0.45)}
    one = dict(frechet=(0.1, 0.05, 0.15), kernel=(0.1, 0.05, 0.15), ssim=(0.8, 0.7, 0.9), perceptual=(0.2, 0.1, 0.3))
    distances = {"cut-out": one | dict(floor=dict(frechet=0.01, kernel=0.0))}
    found = Ablation(asdict(PLAN), arms, distances)
    assert str(found.score("both", "success")).startswith("50 [")
    value, low, high, _ = found.score("neither", "edit done", minus="both")
    assert low <= value <= high < 0 and value == pytest.approx(-25)
    assert found.p("neither", "both") == "0.0001" and found.p("latents only", "both") == "1.0000"
    assert "neither" in str(found.arms_table()) and "-25 [" in str(found.arms_table())
    assert "cut-outs" in str(found.transfer_table("subject")) and "-5 [" in str(found.user_table("subject"))
    assert "0.1000 [0.0500, 0.1500]" in str(found.distance_table())
    written = found.save(tmp_path / "a.json")
    assert Ablation.load(written).arms_table() == found.arms_table()
    assert all(figure._repr_png_()[:4] == b"\x89PNG" for figure in (found.draw(), found.draw_curves()))


def test_the_committed_results_are_whole():
    found = Ablation.load(asset("benchmarks/ablations.json"))
    assert set(found.arms) == {*RECIPES, *BASELINES} and all(len(found.arms[name]) >= 3 for name in RECIPES)
    assert {run["curve"][-1][0] for name in RECIPES for run in found.arms[name]} == {
        (Plan.first + Plan.steps) // 300 * 300
    }
    assert found.hardware["on"] and found.plan == asdict(Plan())
    assert asset("benchmarks/ablations.json").stat().st_size < 700_000


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["c"], "invalid choice"),
        (["a", "--seeds", "0"], "`seeds` has to be at least 1"),
        (["a", "--out", "x.txt"], "--out has to be a .json file"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_works(arguments, said, capsys):
    with pytest.raises(SystemExit):
        SCRIPT["main"](arguments)
    assert said in capsys.readouterr().err
