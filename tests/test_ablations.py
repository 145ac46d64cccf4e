"The experiments' cells: what a recipe shuts stays shut, the order is the only difference of curricula, and the tables say what the numbers say."

import runpy

import numpy as np
import pytest
import torch

from kiwi_edit.train import foundations
from kiwi_edit.train.cache import OnlineRows, RowSettings
from kiwi_edit.core import asset
from kiwi_edit.encoder import encode_context
from kiwi_edit.train.curriculum import STAGES
from kiwi_edit.guidance import denoise
from kiwi_edit.world import EVAL_SEED

SCRIPT = runpy.run_path(str(asset("benchmarks/ablations.py")))
experiment = SCRIPT["read_experiment"]()  # from here on a module by this name
from experiment import *

FOUNDATIONS = str(asset("kiwi-edit-tiny"))  # any model will do


@pytest.fixture(scope="module", autouse=True)
def few_words():
    "The tokenizer of a random model, which no cell takes over, is made of a few sentences."
    texts = foundations._world_texts
    foundations._world_texts = lambda: texts(50)
    experiment._start.cache_clear()
    yield
    foundations._world_texts = texts
    experiment._start.cache_clear()


@pytest.fixture(scope="module")
def data():
    pipe = fresh_model(FOUNDATIONS, 0)

    def small(*asked):
        return [halved(q, 16) for q in scenes(*asked)]

    def rows(quadruplets, references=None):
        return OnlineRows(pipe, Scenes(quadruplets, references), RowSettings(batch=4), progress=False)

    def ways(quadruplets):
        seen = rows(quadruplets, [q.reference for q in quadruplets])
        return dict.fromkeys(REFERENCES, seen) | dict(blind=rows(quadruplets))

    pairs, words = small(WITH_REFERENCE, 6, TRAIN_SEED["references"]), small(dict(add=1.0), 6, TRAIN_SEED["words"])
    subject, add = (small({task: 1.0}, 2, EVAL_SEED, "eval") for task in ("subject", "add"))
    held = dict(subject=(subject, ways(subject)), add=(add, dict(blind=rows(add))))
    return Data(ways(pairs) | dict(words=rows(words)), held)


@pytest.mark.parametrize("seed", (0, 1))
def test_curricula_differ_in_nothing_but_the_order(seed):
    plan = Plan(steps=50)
    both, shuffled = batch_order(plan, Recipe(), seed), batch_order(plan, Recipe(progressive=False), seed)
    assert sorted(both) == sorted(shuffled) and both != shuffled
    assert {kind for kind, _ in both[:15]} == {"words"} and {kind for kind, _ in shuffled[:15]} == {"words", "pairs"}
    assert sum(kind == "pairs" for kind, _ in both) == 30
    for kind in ("words", "pairs"):
        assert [k for name, k in both if name == kind] == list(range(sum(name == kind for name, _ in both)))


def test_a_shut_way_lets_nothing_through(data):
    "With the queries shut the context, and with the latents shut the denoiser's tokens, are the same whatever the reference is."
    pipe = fresh_model(FOUNDATIONS, 0)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)  # which begins with a copy of the source, whatever it sees
    full, blind = data.rows["authentic"].rows([0, 1]), data.rows["blind"].rows([0, 1])
    ids = data.rows["blind"].token_ids
    other = [row | dict(reference=row["reference"].flip(-1) + 1, vision=row["vision"] + 1) for row in full]

    def seen(name, rows):
        batch = gated(rows, blind, RECIPES[name], ids)
        context, mask = encode_context(pipe.mllm, pipe.guidance, batch.inputs, batch.vision)
        step = torch.full((2,), 500.0), torch.full((2,), 0.5)
        given = pipe.transformer, pipe.guidance, batch.target, *step, context, mask, batch.source, batch.reference
        with torch.no_grad():
            return context, denoise(*given)

    for name, context, velocity in (
        ("both", True, True),
        ("queries only", True, True),
        ("latents only", False, True),
        ("neither", False, False),
    ):
        changed = [not torch.equal(a, b) for a, b in zip(seen(name, full), seen(name, other))]
        assert changed == [context, velocity], name
    assert gated(full, blind, RECIPES["latents only"], ids).inputs.modes == ["image"] * 2
    assert gated(full, blind, RECIPES["queries only"], ids).inputs.modes == ["ref"] * 2


def test_all_recipes_learn_from_the_same_samples_and_noise(data):
    plan = Plan(size=16, steps=6, batch_size=2)
    a, b = (batches_of(data, plan, RECIPES[name], 0) for name in ("both", "neither"))
    for number in range(6):
        (one, dice), (two, other) = a(number, 0, 1), b(number, 0, 1)
        assert one.ids == two.ids and torch.equal(dice.noise, other.noise) and torch.equal(dice.sigma, other.sigma)
    halves = [a(4, part, 2)[0].ids for part in range(2)]
    assert [i for pair in zip(*halves) for i in pair] == a(4, 0, 1)[0].ids


def test_scenes_are_those_of_no_stage_and_of_no_evaluation():
    used = [
        range(stage.first_seed + 100_000 * i, stage.first_seed + 100_000 * i + bucket.samples)
        for stage in STAGES.values()
        for i, bucket in enumerate(stage.buckets)
    ]
    plan = Plan(pairs=40_000)  # as many as there may be
    own = [range(first, first + plan.pairs) for first in TRAIN_SEED.values()]
    for one in own:
        assert one.stop <= EVAL_SEED
        for other in used + [r for r in own if r is not one]:
            assert one.stop <= other.start or other.stop <= one.start, (one, other)


def test_a_cell_is_run_once_and_goes_on_after_a_stop(data, tmp_path, monkeypatch):
    plan = Plan(size=16, steps=3, batch_size=2, scenes=2, edit_steps=1)
    monkeypatch.setattr(experiment, "make_foundations", lambda *args: FOUNDATIONS)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "measure_edits", stop)  # trained, not tested
        run_cell("both", 1, plan, tmp_path, data, progress=False)
    assert not list(tmp_path.rglob("result.json"))
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "batches_of", lambda *args: stop)  # no batch is asked for again
        result = run_cell("both", 1, plan, tmp_path, data, progress=False)
    assert result["steps"] == 3
    assert set(result["scores"]) == {"subject / authentic", "subject / cut-out", "subject / kiwi-edit", "add / blind"}
    assert run_cell("both", 1, plan, tmp_path, None) == result
    with pytest.raises(ValueError, match="`name` has to be one of both"):
        run_cell("all", 1, plan, tmp_path, data)


def runs(error, told, seeds=3, scenes=40):
    rng = np.random.default_rng(0)
    same = {name: [value] * scenes for name, value in dict(distance=100.0, outside=10.0, edges=1.0).items()}
    same["told_apart"] = [i < told * scenes for i in range(scenes)]
    kinds = [f"{task} / {kind}" for task in WITH_REFERENCE for kind in REFERENCES]
    kinds += [f"{task} / blind" for task in ("add", "remove", "change", "style")]
    scores = {kind: same | dict(error=list(100 * error + rng.normal(0, 3, scenes))) for kind in kinds}
    return [dict(scores=scores, steps=10, seconds=3.6)] * seeds


def test_tables_say_what_the_numbers_say(tmp_path):
    cells = {"both": runs(0.3, 0.5), "neither": runs(0.5, 0.1), "cut-outs": runs(0.4, 0.4)}
    found = Ablation(dict(batch_size=2, size=32), cells)
    assert found.score("both", "edit done")[0] == pytest.approx(0.7, abs=0.02)
    assert found.score("both", "told apart")[0] == 0.5
    value, low, high = found.score("neither", "edit done", minus="both")
    assert low < value < high < 0 and value == pytest.approx(-0.2, abs=0.02)
    assert "| neither | 0.5" in found.guidance_table() and "−0.2" in found.difference_table()
    assert "| cut-out | subject |" in found.transfer_table()
    assert Ablation.load(found.save(tmp_path / "a.json")) == found
    assert found.draw()._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="`column`"):
        found.score("both", "beauty")


def test_the_committed_results_are_whole():
    found = Ablation.load(asset("benchmarks/ablations.json"))
    assert set(found.cells) == set(RECIPES) and all(len(each) >= 3 for each in found.cells.values())
    assert {run["steps"] for each in found.cells.values() for run in each} == {found.plan["steps"]}
    assert found.hardware["on"]
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
