"Several seeds of one edit, recipes for few steps, and words that a model knows."

import numpy as np
import pytest
from PIL import Image
from test_backends import Server, openai_reply
from test_cli import clip, edit, encode, kiwi, picture, refused  # noqa: F401

from kiwi_edit.core import InputError
from kiwi_edit.data import files
from kiwi_edit.data.backends import OpenAIChat
from kiwi_edit.data.files import load_model, plan_edit, run_edit, suggest
from kiwi_edit.eval.judge import MetricJudge, edit_seeds
from kiwi_edit.video import read_video

pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture(scope="module")
def pipe(random_model):
    return load_model(random_model, "cpu")


class Judge:
    "Gives scores in turn; None is a failure."

    name, is_model = "a judge", True

    def __init__(self, *scores):
        self.scores, self.cases = scores, []

    def judge(self, cases, progress=True):
        self.cases = cases
        names = cases[0].rubric.names
        given = zip(cases, self.scores, strict=True)
        return [c.judged("", *([dict.fromkeys(names, s)] if s else [None, "endpoint: away"])) for c, s in given]


# several tries


def test_each_seed_is_the_edit_that_it_would_be_alone_and_the_source_is_read_and_encoded_once(
    pipe, clip, tmp_path, monkeypatch
):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    given = dict(references=tmp_path / "red.png", steps=2, seed=5)
    reads, encoded = [], []
    read = files.read_video
    monkeypatch.setattr(files, "read_video", lambda *a, **k: reads.append(a) or read(*a, **k))
    with pipe.vae.encoder.register_forward_pre_hook(lambda *a: encoded.append(a)):
        tries = edit_seeds(pipe, plan_edit(clip, "make it snow", out=tmp_path / "new.mp4", seeds=3, **given))
        several = len(encoded)
        pipe.memory.kept.clear()
        one = run_edit(pipe, plan_edit(clip, "make it snow", out=tmp_path / "one.mp4", **given | dict(seed=6)))
    assert len(encoded) == 2 * several and len(reads) == 2
    assert [t.path.name for t in tries.edited] == ["new-5.mp4", "new-6.mp4", "new-7.mp4"]
    results = [read_video(t.path).frames for t in tries.edited]
    assert np.array_equal(results[1], read_video(one.path).frames) and not np.array_equal(results[0], results[1])
    assert tries.best is None and not tries.judgements and "nobody judges" in tries.about
    sheet = Image.open(tmp_path / "new-strip.png")
    assert sheet.height > 400 and tries._repr_png_() == (tmp_path / "new-strip.png").read_bytes()


def test_long_clips_flow_through_each_time(pipe, clip, tmp_path):
    source = encode(tmp_path / "long.mp4", picture(count=13))
    steps = []
    plan = plan_edit(source, "make it snow", out=tmp_path / "new.mp4", seeds=2, whole=True, steps=1)
    tries = edit_seeds(pipe, plan, MetricJudge(), lambda *now: steps.append(now))
    assert [done.frames for done in tries.edited] == [13, 13] and all(j.ok for j in tries.judgements)
    assert {"reading", "decoding", "writing"} <= {what for _, _, what in steps}


def test_the_best_is_picked_where_it_can_be_told(pipe, clip, tmp_path):
    def pick(*scores, measured=False):
        judge = Judge(*scores)
        judge.is_model = not measured
        plan = plan_edit(clip, "make it snow", out=tmp_path / "new.mp4", seeds=len(scores), overwrite=True, steps=1)
        tries = edit_seeds(pipe, plan, judge)
        assert [case.instruction for case in judge.cases] == ["make it snow"] * len(scores)
        assert all(case.source.shape == read_video(case.edited).frames.shape for case in judge.cases)
        return tries

    picked = pick(2, 4, 3)
    assert picked.best == 1 and "seed 1, 4.00 of 5, picked: " in picked.about and "chance" not in picked.about
    assert pick(None, 2).best == 1 and "no score" in pick(None, 2).about
    assert pick(4, 4).best is None and "too close" in pick(4, 4).about
    away = pick(None, None)
    assert away.best is None and "endpoint: away" in away.about and len(away.edited) == 2
    assert pick(4, 4.5, measured=True).best is None
    rough = pick(2, 4.5, measured=True)
    assert rough.best == 1 and "no better than chance" in rough.about


def test_the_command_tries_seeds(edit, clip, tmp_path):  # noqa: F811
    status, out, err = edit(clip, "--out", tmp_path / "new.mp4", "--seeds", 2, "--seed", 8)
    assert status == 0, err
    names = {"clip.mp4", "new-8.mp4", "new-9.mp4", "new-8-strip.png", "new-9-strip.png", "new-strip.png"}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == names
    assert "seed 9, " in out and "no better than chance" in out and "new-strip.png" in out and "2/2 steps" in err
    refused(edit(clip, "--out", tmp_path / "new.mp4", "--seeds", 2, "--seed", 9), "--out has to be a new file")
    assert edit(clip, "--out", tmp_path / "b.mp4", "--seeds", 2, "--judge", "none")[0] == 0
    status, out, _ = edit(clip, "--seeds", 2)
    assert status == 0 and "clip-edited-1.mp4" in out


def test_a_server_judges_tries(edit, clip, tmp_path):
    names = "Instruction Compliance", "Visual Quality & Stability", "Consistency & Detail Fidelity"
    server = Server(openai_reply, ["\n".join(f"{name}: {n}" for name in names) for n in (2, 4)])
    url = f"openai:m@http://127.0.0.1:{server.server_port}/v1"
    options = "--judge", url, "--parameter", "top_k=1"
    status, out, err = edit(clip, "--out", tmp_path / "new.mp4", "--seeds", 2, *options)
    server.shutdown()
    server.server_close()
    assert status == 0 and out.count("picked: ") == 1 and "4.00 of 5, picked" in out and "by m" in out, err
    assert len(server.asked) == 2 and all(body["top_k"] == 1 for _, _, body in server.asked)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seeds", 0], "--seeds has to be from 1 to 64 but is 0"),
        (["--seeds", -1], "--seeds has to be from 1 to 64 but is -1"),
        (["--seeds", 65], "--seeds has to be from 1 to 64 but is 65"),
        (["--seeds", 2, "--seed", 2**63 - 1], "--seed has to be from 0"),
        (["--seeds", 2, "--judge", "me"], "--judge has to be metrics"),
        (["--seeds", 2, "--parameter", "a=1"], "--parameter has to be left out"),
        (["--seeds", 2, "--judge", "none", "--parameter", "a=1"], "--parameter has to be left out"),
        (["--judge", "none"], "--judge has to be left out unless --seeds is above 1"),
        (["--recipe", "slow"], "--recipe has to be of fastwan, turbo but is 'slow'"),
        (["--recipe", "turbo", "--steps", 4], "--steps has to be left out where --recipe names them but is 4"),
        (["--recipe", "turbo", "--guidance-scale", 2], "--guidance-scale has to be 1, which is off, with a --recipe"),
        (["--recipe", "turbo", "--approximate", "fewer steps"], "--recipe has to be left out with 'fewer steps'"),
    ],
)
def test_wrong_tries_and_recipes_are_refused_first(kiwi, clip, tmp_path, arguments, words):  # noqa: F811
    out = tmp_path / "new.mp4"
    refused(kiwi("edit", clip, "-i", "x", "--out", out, "--model", "never-looked-up", *arguments), words)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("option", [("--seeds", 2), ("--recipe", "turbo"), ("--judge", "none")])
def test_lists_have_neither_tries_nor_recipes(kiwi, tmp_path, option):  # noqa: F811
    (tmp_path / "edits.jsonl").write_text('{"video": "clip.mp4", "instruction": "x"}')
    refused(kiwi("edit", tmp_path / "edits.jsonl", *option), f"{option[0]} has to be left out where VIDEO is a list")


def test_one_edit_is_not_several(pipe, clip, tmp_path):
    with pytest.raises(InputError, match="`seeds` has to be 1 for `run_edit` but is 2"):
        run_edit(pipe, plan_edit(clip, "x", out=tmp_path / "new.mp4", seeds=2))


# recipes


@pytest.mark.parametrize(
    "recipe, levels", [("fastwan", [1000, 757, 522]), ("turbo", [1000, 937.5, 833.33, 625]), (None, [1000, 833.33])]
)
def test_the_denoiser_is_asked_at_the_levels_of_the_recipe(pipe, clip, tmp_path, recipe, levels):
    asked, before, steps = [], pipe.scheduler, None if recipe else 2
    plan = plan_edit(clip, "x", out=tmp_path / "new.mp4", recipe=recipe, steps=steps, overwrite=True, seed=3)
    hook = lambda module, args, given: asked.append(float(given["timestep"].flatten()[0]))
    with pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True):
        first = read_video(run_edit(pipe, plan).path).frames
        assert np.allclose(asked, levels, atol=0.01)
        assert np.array_equal(first, read_video(run_edit(pipe, plan).path).frames)
    assert pipe.scheduler is before


def test_a_recipe_that_fails_leaves_the_scheduler(pipe, clip, tmp_path, monkeypatch):
    before = pipe.scheduler
    monkeypatch.setattr(type(pipe), "decode", lambda *a: (_ for _ in ()).throw(RuntimeError("full")))
    with pytest.raises(RuntimeError, match="full"):
        run_edit(pipe, plan_edit(clip, "x", out=tmp_path / "new.mp4", recipe="fastwan"))
    assert pipe.scheduler is before and not (tmp_path / "new.mp4").exists()


def test_the_command_warns_of_a_recipe(kiwi, clip, random_model, tmp_path):  # noqa: F811
    base = "edit", clip, "-i", "x", "--model", random_model, "--out", tmp_path / "new.mp4"
    status, _, err = kiwi(*base, "--recipe", "turbo")
    assert status == 0 and "untried on published ones" in err and "4/4 steps" in err


# words


@pytest.mark.parametrize(
    "words, kind, text",
    [
        ("make the car red", "change", "Make the car red."),
        ("Please make the old car bright red.", "change", "Make the old car bright red."),
        ("replace the sofa with a chair", "swap", "Replace the sofa with a chair."),
        ("turn the car into a boat", "swap", "Replace the car with a boat."),
        ("remove the man from the video", "remove", "Remove the man."),
        ("take the man out", "remove", "Remove the man."),
        ("put a hat on the {head}", "add", "Add a hat on the {head}."),
        ("add snow", "add", "Add snow."),
        ("change the background to a beach", "background", "Replace the background with a beach."),
        ("turn the video into a pencil drawing", "style", "Apply the pencil drawing style to this video."),
    ],
)
def test_words_are_filled_into_three_ways(words, kind, text):
    found, _ = suggest(words)
    assert [k for k, _ in found] == [kind] * 3 and found[0][1] == text and len({t for _, t in found}) == 3


def test_a_reference_is_spoken_of():
    for words in ("replace the sofa with a chair", "add a hat on the table", "", "change"):
        found, hints = suggest(words, reference=True)
        assert all("the reference image" in text for _, text in found) and '"the reference image"' in hints
    assert "No kind of edit" not in suggest("", reference=True)[1]


def test_every_way_can_be_filled_and_unknown_words_give_one_of_each():
    found, hints = suggest("sing me a song")
    kinds = [kind for kind, _ in found]
    assert len(set(kinds)) == len(kinds) == 6 and "No kind of edit was found" in hints and "kiwi-edit-tiny" in hints
    assert suggest()[0] == found and "No kind of edit" not in suggest()[1]
    for kind in kinds:
        ways = suggest(kind)[0]
        assert len(ways) == 10 == len(set(ways)) and all(k == kind and "{" not in text for k, text in ways)


def test_a_language_model_words_an_edit_anew(kiwi):  # noqa: F811
    server = Server(openai_reply, ["Paint the\n car red.", ""])
    url = f"http://127.0.0.1:{server.server_port}/v1"
    status, out, err = kiwi("suggest", "make the car red", "--reference", "--rewrite", f"openai:m@{url}")
    assert status == 0 and "rewritten:  Paint the car red.\n" in out and "change: " in out, err
    ((_, _, body),) = server.asked
    assert "make the car red (There is a reference image.)" in str(body["messages"][1])
    with pytest.raises(InputError, match="`chat` has to be a model that answers but there is: rubbish"):
        suggest("x", chat=OpenAIChat("m", url, "k", tries=1))
    server.shutdown()
    server.server_close()
    refused(kiwi("suggest", "x", "--rewrite", "gemini:m"), "--rewrite has to be openai:MODEL", "'gemini:m'")
    refused(kiwi("suggest", "--rewrite", f"openai:m@{url}"), "WORDS have to be given")
