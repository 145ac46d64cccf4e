"Judges: rubrics, replies, endpoints that behave and that do not, scores put together, and the page for people."

import base64
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from browser import ARGUMENTS, chromium, why_no_browser
from test_backends import BROKEN, KEY, PROCESSOR, Server, camel, gemini_reply, openai_reply, qwen25
from kiwi_edit.data.backends import GeminiChat, OpenAIChat, TransformersChat
from kiwi_edit.core import asset
from kiwi_edit.eval.judge import *
from kiwi_edit.eval.judge import _WORTH, _krippendorff_alpha, _metric_scores, _read_scores
from kiwi_edit.eval.clips import DAMAGES
from kiwi_edit.video import read_video, resize_frames, write_video
from kiwi_edit.world import World

sys.path.insert(0, str(asset("benchmarks")))
import cells  # noqa: E402

SUBJECT, BACKGROUND, OPENVE = RUBRICS["refvie-subject"], RUBRICS["refvie-background"], RUBRICS["openve"]
CLIP = asset("samples/clip.mp4")
WORLD = cache(World(num_frames=9).sample)


def lines(rubric, *scores):
    return "\n".join(f"{name}: {score}" for name, score in zip(rubric.names, scores))


def case(seed=6, task="subject", known=False, **changes):
    made = WORLD(seed, task)
    truth = dict(mask=made.mask, target=made.target) if known else {}
    return Case(
        **dict(
            dict(
                id=f"{task}-{seed}",
                instruction=made.instruction,
                source=made.source,
                edited=made.target,
                reference=made.reference,
                rubric=rubric_for("kit", task),
                edit_type=task,
            )
            | truth
            | changes
        )
    )


def judgement(id, scores, rubric=OPENVE, judge="me", **facts):
    return Judgement(id, judge, rubric.name, dict(zip(rubric.names, scores)), **facts)


# rubrics


def test_published_names_and_scale():
    assert SUBJECT.names == (
        "Identity Consistency & Compliance",
        "Temporal Consistency & Texture Fidelity",
        "Physical Integration & Tracking",
    )
    assert BACKGROUND.names == (
        "Reference Fidelity & Preservation",
        "Matting Quality & Temporal Stability",
        "Visual Harmony & Perspective",
    )
    assert OPENVE.names == ("Instruction Compliance", "Visual Quality & Stability", "Consistency & Detail Fidelity")
    for rubric in RUBRICS.values():
        text = rubric.instruction()
        assert rubric.capped
        assert all(
            len(c.anchors) == 5 and c.asks in text and all(a in text for a in c.anchors) for c in rubric.criteria
        )
        assert text.endswith("\n".join(f"{name}: n" for name in rubric.names))
        assert f"higher than that of {rubric.names[0]}" in text


@pytest.mark.parametrize(
    "bench, kind, name",
    [
        ("refvie", "subject", "refvie-subject"),
        ("refvie", "background", "refvie-background"),
        ("refvie", "anything else", "refvie-background"),
        ("openve", "subject", "openve"),
        ("openve", "local_add", "openve"),
        ("imgedit", "style", "openve"),
        ("kit", "subject", "refvie-subject"),
        ("kit", "background", "refvie-background"),
        ("kit", "plate", "openve"),
    ],
)
def test_rubric_of_a_row(bench, kind, name):
    assert rubric_for(bench, kind).name == name


def test_rubric_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps(
            dict(
                name="mine",
                capped=False,
                system="Word for word.",
                criteria=["Neatness", dict(name="Charm", asks="Is it?", anchors=list("abcde"))],
            )
        )
    )
    rubric = load_rubric(file)
    assert (rubric.names, rubric.capped, rubric.instruction(), rubric.criteria[1].anchors) == (
        ("Neatness", "Charm"),
        False,
        "Word for word.",
        tuple("abcde"),
    )
    file.with_suffix(".yaml").write_text("name: mine\ncriteria:\n- {name: Neatness, asks: 'Is it neat?'}\n")
    assert "Neatness. Is it neat?" in load_rubric(file.with_suffix(".yaml")).instruction()


@pytest.mark.parametrize(
    "content, why",
    [
        ("[1]", "mapping.*list"),
        ("name: x\ncriteria: []", "a list under `criteria`"),
        ("criteria: [a]", "a `name`"),
        ("name: x\ncriteria: [a]", "`asks`.*'a'"),
        ("name: x\nsystem: s\ncriteria: [a, A]", "different names"),
        ("name: x\nsystem: s\ncriteria: ['a: b']", "colon"),
        ("name: x\nsystem: s\ncriteria: ['&&']", "colon"),
        ("name: x\nsystem: 3\ncriteria: [a]", "system"),
        ("name: x\nsystem: s\ncapped: 2\ncriteria: [a]", "capped"),
        ("name: x\nsystem: s\ncriteria: [{name: a, anchors: [b]}]", "five"),
        ("name: x\nsystem: s\ncriteria: [{name: a, weight: 2}]", "anchors` only"),
        ("name: x\nsystem: s\nmore: 1\ncriteria: [a]", "more"),
        ("{name: x", "YAML or JSON"),
        ("name: x\nsystem: s\ncriteria: [3]", "criteria"),
        ("name: x\nsystem: s\ncriteria: [{name: a, asks: 3}]", "asks"),
        ("name: x\nsystem: s\ncriteria: a", "list"),
    ],
)
def test_rubric_files_say_what_is_wrong(tmp_path, content, why):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"(?s)`path`.*{why}"):
        load_rubric(tmp_path / "bad.yaml")


# replies

GOLDEN = next(
    iter(sorted(Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden")).glob("*/cases/judge.json"))),
    None,
)
golden = pytest.mark.skipif(GOLDEN is None, reason="KIWI_EDIT_GOLDEN names no folder with cases/judge.json")


@golden
@pytest.mark.parametrize("bench", ["openve", "refvie"])
def test_released_parsers(bench):
    released_scores = cells.read_cells("41_judge", "released", RUBRICS=RUBRICS).released_scores
    rubrics = [OPENVE] if bench == "openve" else [SUBJECT, BACKGROUND]
    rows = json.loads(GOLDEN.read_text())[bench]["replies"]
    assert len(rows) > 10
    for row in rows:
        for rubric in rubrics:
            assert (released_scores(row["reply"], rubric) or ([] if row["result"] == [] else False)) == row["result"], (
                row["reply"]
            )


@golden
def test_released_means():
    found = json.loads(GOLDEN.read_text())

    def made(row, rubric, i, kind=""):
        one = Case(str(i), "", None, None, None, rubric, kind)
        return (
            judgement(str(i), row["scores"], rubric, edit_type=kind)
            if row["scores"]
            else one.judged("me", error="rubbish: none")
        )

    openve = found["openve"]["aggregate"]
    total = Summary([made(row, OPENVE, i, row["edited_type"]) for i, row in enumerate(openve["records"])])
    assert {name: value for name, (value, _, _) in total.types.items()} == pytest.approx(openve["per_type"])
    assert total.means["edit types"][0] == pytest.approx(openve["overall"])
    printed = found["refvie"]["aggregate"]
    rubrics = dict(subject=SUBJECT, background=BACKGROUND)
    total = Summary([made(row, rubrics[row["subtask"]], i) for i, row in enumerate(printed["records"])])
    for name, means in printed["printed_to_4_decimals"].items():
        if name == "overall":
            assert round(total.means["rows"][0], 4) == means["overall_average"]
        else:
            assert {c: round(total.columns[rubrics[name].name, c][0], 4) for c in rubrics[name].names} | dict(
                average=round(total.subtasks[rubrics[name].name][0], 4)
            ) == means
    assert (total.counts["scored"], total.counts["failed"]) == (5, 1)


A, B, C = OPENVE.names


@pytest.mark.parametrize(
    "text, scores",
    [
        (lines(OPENVE, 5, 4, 3), (5, 4, 3)),
        (lines(OPENVE, "4/5", "3 / 5", "2 out of 5"), (4, 3, 2)),
        (f"**{A}:** 4\n**{B}**: **3**\n__{C}__ = *2*", (4, 3, 2)),
        (lines(OPENVE, 5, 4, 3).lower(), (5, 4, 3)),
        (lines(OPENVE, 5, 4, 3).upper(), (5, 4, 3)),
        ("   " + lines(OPENVE, 5, 4, 3).replace("\n", "\n\t"), (5, 4, 3)),
        (f"- {A}: 5\n* {B}: 4\n• {C}: 3", (5, 4, 3)),
        (f"1. {A}: 5\n2) {B}: 4\n3. {C}: 3", (5, 4, 3)),
        (f"{A}: 5, {B}: 4, {C}: 3", (5, 4, 3)),
        (f"1) {A}: 5, 2) {B}: 4; 3. {C}: 3", (5, 4, 3)),
        (f"| {A} | 5 |\n|---|---|\n| {B} | 4 |\n| {C} | 3 |", (5, 4, 3)),
        (f"{A} – 5\n{B} - 4\n{C} 3", (5, 4, 3)),
        (f"{A}:\n5\n{B}:\n**4/5**\n{C}:\n3", (5, 4, 3)),
        (f"{A} (score: 5)\n{B}: Score 4\n{C}: rating = 3", (5, 4, 3)),
        (lines(OPENVE, 4.5, 3.9, 1.0), (4.5, 3.9, 1)),
        (lines(OPENVE, "4.", "3.", "2."), (4, 3, 2)),
        (lines(OPENVE, "the edit is right: 4", "4 (one frame flickers)", "3, as the wall changed"), (4, 4, 3)),
        (lines(OPENVE, 5, 4, 3).replace("&", "and"), (5, 4, 3)),
        (lines(OPENVE, 5, 4, 3).replace(" ", "_").replace("_&_", "_and_").replace(":_", ": "), (5, 4, 3)),
        (json.dumps({A: 5, B: 4.5, C: 3}), (5, 4.5, 3)),
        (
            "```json\n" + json.dumps({"scores": {A: 5, B: "4/5", C: 3}, "reason": "{fine}"}, indent=1) + "\n```",
            (5, 4, 3),
        ),
        (
            json.dumps(
                {
                    "instruction_compliance": {"score": 5, "why": "x"},
                    "visual quality and stability": {"rating": 4},
                    C: 3,
                }
            ),
            (5, 4, 3),
        ),
        (f"The {A} is fine, 3 hats.\n\n" + lines(OPENVE, 5, 4, 3), (5, 4, 3)),
        ("<think>" + lines(OPENVE, 1, 1, 1) + "</think>" + lines(OPENVE, 5, 4, 3), (5, 4, 3)),
        (f"{A}: 5\n{A}: 5\n" + lines(OPENVE, 5, 4, 3), (5, 4, 3)),
        (lines(OPENVE, 5, 4, 3).replace("\n", "\r\n"), (5, 4, 3)),
        (f"{C}: 3\n{A}: 5\n{B}: 4", (5, 4, 3)),
        (lines(OPENVE, "5", "4", "3").replace(":", "："), (5, 4, 3)),
        ("{not JSON}\n" + lines(OPENVE, 5, 4, 3), (5, 4, 3)),
        (f"{A}: 4 {B}: 3 {C}: 2.", (4, 3, 2)),
        (f"{A} (1-5): 4\n{B} (out of 5): 3\n{C} [1 to 5]: 2/5", (4, 3, 2)),
    ],
)
def test_replies_that_everybody_can_read(text, scores):
    assert _read_scores(text, OPENVE) == dict(zip(OPENVE.names, scores))
    assert list(_read_scores(text, OPENVE)) == list(OPENVE.names)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no score"),
        ("Very nice!", "no score"),
        (lines(OPENVE, 5, 4), f"{C} has no score"),
        (lines(OPENVE, 5, "", 3), f"{B} has no score"),
        (lines(OPENVE, "five", 4, 3), "no score"),
        (lines(OPENVE, 0, 3, 3), "1 to 5 but is 0"),
        (lines(OPENVE, 6, 3, 3), "1 to 5 but is 6"),
        (lines(OPENVE, -1, 3, 3), "1 to 5 but is -1"),
        (lines(OPENVE, "4 or 5", 3, 3), "one score"),
        (lines(OPENVE, "4-5", 3, 3), "one score"),
        (lines(OPENVE, "3 to 4", 3, 3), "one score"),
        (lines(OPENVE, "7/10", 3, 3), "out of 5"),
        (lines(OPENVE, "80%", 3, 3), "no score"),
        (f"{A}: 5\n" + lines(OPENVE, 4, 3, 3), "one score but has 5 and 4"),
        (json.dumps({A: 5, B: 4}), f"{C} has no score"),
        (json.dumps({A: True, B: 4, C: 3}), "a number"),
        (json.dumps({A: None, B: 4, C: 3}), "a number"),
        (json.dumps({A: 9, B: 4, C: 3}), "1 to 5"),
        (json.dumps({A: 5, B: 4, C: 3}) + json.dumps({A: 4, B: 4, C: 3}), "one score"),
        (f'{{"{A}": 5, "{A}": 4, "{B}": 4, "{C}": 3}}', "one score"),
        (f'{{"{A}": 5, "{B}": 4, "Consist', "no score"),
        (lines(OPENVE, "nan", 3, 3), "no score"),
        (lines(OPENVE, "1e0", 3, 3), "no score"),
        (lines(SUBJECT, 5, 4, 3), "no score"),
        (f"{A}\n1. The hat is there.\n" + lines(OPENVE, "good", 4, 3), f"{A} has no score"),
        (lines(OPENVE, "4 or 5. ", 3, 3).replace("\n", " "), "one score"),
    ],
)
def test_replies_that_nobody_should_guess_at(text, why):
    with pytest.raises(ValueError, match=why):
        _read_scores(text, OPENVE)


@pytest.mark.parametrize(
    "opening, closing",
    [("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")],
)
def test_thoughts_are_no_scores(opening, closing):
    drafts = lines(OPENVE, 1, 1, 1), json.dumps({A: 1, B: 1, C: 1})
    for draft in drafts:
        for text in (
            f"{opening}{draft}{closing}{lines(OPENVE, 5, 4, 3)}",
            f"{draft}\n{closing}\n\n{lines(OPENVE, 5, 4, 3)}",
            f"{draft}{closing}{json.dumps({A: 5, B: 4, C: 3})}",
        ):
            assert _read_scores(text, OPENVE) == {A: 5, B: 4, C: 3}
        with pytest.raises(ValueError, match="cut off"):
            _read_scores(f"{opening}{draft}\nBut the sky flickers", OPENVE)


def test_names_inside_names():
    rubric = Rubric("x", (Criterion("Quality", "?"), Criterion("Visual Quality", "?")))
    assert _read_scores("Visual Quality: 4\nQuality: 2", rubric) == {"Quality": 2, "Visual Quality": 4}


def test_cap():
    given = lambda *scores: dict(zip(OPENVE.names, scores))
    assert OPENVE.cap(given(2, 5, 1)) == given(2, 2, 1) and OPENVE.cap(given(4, 4, 1)) == given(4, 4, 1)
    assert replace(OPENVE, capped=False).cap(given(2, 5, 1)) == given(2, 5, 1)
    judged = [case(rubric=OPENVE).judged("me", given(*scores)) for scores in ((2, 5, 1), (4, 4, 1))]
    assert [(j.capped, j.scores) for j in judged] == [(True, given(2, 2, 1)), (False, given(4, 4, 1))]


def test_judgements_travel():
    found = judgement("a", (5, 4, 3), replies=["x"], usage=dict(calls=1, cost=None), seconds=1.5, edit_type="add")
    assert Judgement(**json.loads(json.dumps(asdict(found)))) == found and found.mean == 4
    for scores in ({A: 6}, {}, {A: None}, [1]):
        with pytest.raises(ValueError, match="1 to 5"):
            replace(found, scores=scores)


# models as judges


@pytest.fixture(params=["openai", "gemini"])
def serve(request):
    "Called with replies, gives a chat and its server."
    servers = []

    def start(*replies, tries=4, timeout=5.0, concurrency=1):
        openai = request.param == "openai"
        server = Server(openai_reply if openai else gemini_reply, replies)
        servers.append(server)
        base = f"http://127.0.0.1:{server.server_port}"
        common = dict(api_key=KEY, timeout=timeout, tries=tries, concurrency=concurrency)
        return (
            OpenAIChat("vlm", base + "/v1", **common)
            if openai
            else GeminiChat("vlm", base_url=base, thinking=0, **common)
        ), server

    start.openai = request.param == "openai"
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def heard(request):
    "System instruction and parts of a request: words, or the kind of a medium with its bytes."
    body = camel(request[2])
    if "messages" in body:
        system, user = body["messages"]

        def part(p):
            if p["type"] == "text":
                return p["text"]
            kind, _, data = p[p["type"].replace("_url", "Url")]["url"].partition(";base64,")
            return kind.removeprefix("data:"), base64.b64decode(data)

        return system["content"], [part(p) for p in user["content"]]

    def part(p):
        if "text" in p:
            return p["text"]
        data = p["inlineData"]["data"].translate({45: "+", 95: "/"})
        return p["inlineData"]["mimeType"], base64.b64decode(data + "=" * (-len(data) % 4))

    return "".join(p["text"] for p in body["systemInstruction"]["parts"]), [
        part(p) for p in body["contents"][0]["parts"]
    ]


GOOD = lines(SUBJECT, 5, 4, 3)
TOKENS = dict(openai=(812, 9), gemini=(1033, 6))


def kinds(parts):
    return [p if isinstance(p, str) else p[0] for p in parts]


def test_frames_in_the_published_order(serve):
    chat, server = serve(GOOD)
    (found,) = ChatJudge(chat, frames=2, media="frames", prices=(1.0, 10.0)).judge([case()], progress=False)
    shown, said = TOKENS["openai" if serve.openai else "gemini"]
    assert found.ok and found.scores == dict(zip(SUBJECT.names, (5, 4, 3)))
    assert (found.judge, found.rubric, found.edit_type, found.replies) == ("vlm", "refvie-subject", "subject", [GOOD])
    assert found.usage == dict(
        input_tokens=shown, output_tokens=said, calls=1, cost=pytest.approx((shown + 10 * said) / 1e6)
    )
    assert found.seconds > 0
    system, parts = heard(server.asked[0])
    frames = ["Frame 1:", "image/png", "Frame 9:", "image/png"]
    assert system == SUBJECT.instruction()
    assert kinds(parts) == [
        "Reference picture:",
        "image/png",
        "The clip before the edit:",
        *frames,
        "The clip after the edit:",
        *frames,
        f"Kind of edit: subject. Instruction: {json.dumps(case().instruction)}",
    ]
    assert np.array_equal(np.array(Image.open(io.BytesIO(parts[4][1]))), case().source[0])
    assert np.array_equal(np.array(Image.open(io.BytesIO(parts[11][1]))), case().edited[-1])


def test_clips_as_video(serve, tmp_path):
    chat, server = serve(GOOD)
    (found,) = ChatJudge(chat, media="video").judge([case(source=CLIP)], progress=False)
    system, parts = heard(server.asked[0])
    assert found.ok
    assert kinds(parts)[:-1] == [
        "Reference picture:",
        "image/png",
        "The clip before the edit:",
        "video/mp4",
        "The clip after the edit:",
        "video/mp4",
    ]
    assert parts[3][1] == CLIP.read_bytes()
    (tmp_path / "sent.mp4").write_bytes(parts[5][1])
    # colours are stored for 2x2 pixels
    assert np.abs(read_video(tmp_path / "sent.mp4").frames.astype(int) - case().edited).mean() < 8
    assert ChatJudge(chat).video is (not serve.openai)


def test_pictures_and_no_reference(serve):
    chat, server = serve(lines(OPENVE, 5, 4, 3))
    still = case(
        task="add", source=WORLD(8, "add").source[:1], edited=WORLD(8, "add").target[:1], edit_type="local_add"
    )
    assert ChatJudge(chat, media="video").judge([still], progress=False)[0].ok
    assert kinds(heard(server.asked[0])[1]) == [
        "The picture before the edit:",
        "Frame 1:",
        "image/png",
        "The picture after the edit:",
        "Frame 1:",
        "image/png",
        f"Kind of edit: local add. Instruction: {json.dumps(still.instruction)}",
    ]


def test_cap_is_said(serve):
    (found,) = ChatJudge(serve(lines(SUBJECT, 2, 5, 1))[0]).judge([case()], progress=False)
    assert found.capped and list(found.scores.values()) == [2, 2, 1]


def test_rubbish_is_asked_about_so_many_times(serve):
    chat, server = serve("Nice.", lines(SUBJECT, 5, 4), GOOD, tries=9)
    assert ChatJudge(chat).judge([case()], progress=False)[0].ok
    assert "Physical Integration & Tracking has no score" in heard(server.asked[2])[1][-1]
    chat, server = serve("Nice.", tries=9)
    (found,) = ChatJudge(chat, attempts=2).judge([case()], progress=False)
    assert found.error.startswith("rubbish: ") and found.error.endswith("(2 tries)") and found.replies == ["Nice."] * 2
    assert set(found.scores.values()) == {None} and found.usage["calls"] == 2


FAILURES = {
    "partial": (lines(SUBJECT, 5, 4), "rubbish"),
    "refused": (None, "refused"),
    "key": (
        (401, dict(error=dict(code=401, message=f"Incorrect API key provided: {KEY}", status="X")), {}),
        "endpoint",
    ),
    "quota": (
        (
            429,
            dict(
                error=dict(
                    code="insufficient_quota",
                    message="used up",
                    status="RESOURCE_EXHAUSTED",
                    details=[dict(quotaId="RequestsPerDay")],
                )
            ),
            {},
        ),
        "quota",
    ),
    "broken": (BROKEN, "endpoint"),
    "cut": ("cut", "rubbish"),
    "html": ((200, b"<html>It works!</html>", {"content-type": "text/html"}), "rubbish"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_one_failure_leaves_the_others_alone(serve, name, tmp_path, caplog):
    caplog.set_level("DEBUG")
    reply, kind = FAILURES[name]
    if name == "refused":
        reply = openai_reply(None, refusal="I will not.") if serve.openai else gemini_reply(None, "SAFETY")
    if name == "cut":
        reply = (
            openai_reply(lines(SUBJECT, 5, 4), "length")
            if serve.openai
            else gemini_reply(lines(SUBJECT, 5, 4), "MAX_TOKENS")
        )
    told = "number two"
    answer = lambda body: reply if told in json.dumps(body) else GOOD
    chat, server = serve(answer, tries=2)
    judge = ChatJudge(chat, frames=1, folder=tmp_path)
    found = judge.judge([case(id="1"), case(id="2", instruction=told), case(id="3")], progress=False)
    assert [j.id for j in found] == ["1", "2", "3"] and [j.state for j in found] == ["scored", "failed", "scored"]
    assert found[1].error.startswith(kind + ":")
    if name == "cut":
        assert "cut at 2048 tokens" in found[1].error
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    assert not any(KEY in text for text in (written, repr(judge), str(found), caplog.text))
    assert found[1].error in written.replace('\\"', '"')
    total = Summary(found)
    assert total.counts == dict(scored=2, failed=1, missing=0) and total.reasons == {kind: 1}


def test_server_that_goes_down_and_a_second_run(serve, tmp_path):
    chat, server = serve(GOOD, GOOD, (503, dict(error=dict(code=503, message="gone")), {}), tries=1)
    cases = [case(seed, id=str(seed)) for seed in range(5, 9)]
    judge = ChatJudge(chat, frames=1, folder=tmp_path)
    assert judge.estimate(cases)["calls"] == 4
    first = judge.judge(cases, progress=False)
    assert [j.state for j in first] == ["scored", "scored", "failed", "failed"]
    server.replies[:] = [lines(SUBJECT, 3, 3, 3)]
    with open(tmp_path / "judgements.jsonl", "a") as file:
        file.write('{"key": "abc", "id"')
    asked = len(server.asked)
    assert judge.estimate(cases)["calls"] == 2
    second = ChatJudge(chat, frames=1, folder=tmp_path).judge(
        [replace(c, id="renamed " + c.id) for c in cases], progress=False
    )
    assert len(server.asked) == asked + 2
    assert [list(j.scores.values()) for j in second] == [[5, 4, 3]] * 2 + [[3, 3, 3]] * 2
    assert second[0].id == "renamed 5"
    assert [j.state for j in judge.judge(cases, progress=False)] == ["scored"] * 4 and len(server.asked) == asked + 2


def test_what_is_another_question_is_asked_again(serve, tmp_path):
    chat, server = serve(GOOD)
    (tmp_path / "a.mp4").write_bytes(CLIP.read_bytes())
    one = case(edited=tmp_path / "a.mp4")
    count = lambda c, **settings: (
        ChatJudge(chat, **dict(dict(frames=1, media="frames", folder=tmp_path / "kept") | settings)).judge(
            [c], progress=False
        ),
        len(server.asked),
    )[1]
    assert count(one) == count(one) == 1 and count(replace(one, edited=CLIP)) == 1
    assert count(replace(one, instruction="else")) == 2 and count(one, frames=2) == 3 and count(one, media="video") == 4
    assert count(one, side=64) == 5
    assert count(replace(one, rubric=replace(SUBJECT, system="Other words."))) == 6
    assert count(replace(one, reference=one.reference[:-1])) == 7
    write_video(tmp_path / "a.mp4", one.source, overwrite=True)
    assert count(one) == 8 and count(one) == 8


def test_nobody_answers_any_more(serve):
    chat, server = serve((503, dict(error=dict(code=503, message="gone")), {}), tries=1)
    found = ChatJudge(chat, frames=1).judge([case(id=str(i), instruction=f"do {i}") for i in range(12)], progress=False)
    assert len(server.asked) == 8 and all(j.error.startswith("endpoint: 503") for j in found[:8])
    assert all(j.error.startswith("not asked: 8 failures in a row, the last one endpoint: 503") for j in found[8:])
    assert Summary(found).reasons == {"endpoint": 8, "not asked": 4}


def test_cases_without_their_files(serve, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(CLIP.read_bytes()[:900])
    (tmp_path / "no.png").write_bytes(b"hello")
    chat, server = serve(GOOD)
    cases = [
        case(id="a", edited=tmp_path / "none.mp4"),
        case(id="b", edited=tmp_path / "broken.mp4"),
        case(id="c", reference=tmp_path / "no.png"),
        case(id="d"),
    ]
    for judge in (ChatJudge(chat, frames=1, media="frames", folder=tmp_path / "kept"), MetricJudge()):
        found = judge.judge(cases, progress=False)
        assert [j.state for j in found] == ["missing", "failed", "failed", "scored"]
        assert found[0].error == "missing: none.mp4" and all(j.error.startswith("unreadable: ") for j in found[1:3])
    assert len(server.asked) == 1


def test_several_at_once_in_their_order(serve):
    def answer(body):
        text = json.dumps(body)
        n = next(i for i in range(6) if f"number {i}!" in text)
        time.sleep(0.05 * (6 - n))
        return lines(SUBJECT, 5, 5, 1 + n % 5)

    chat, server = serve(answer, concurrency=6)
    found = ChatJudge(chat, frames=1, media="frames").judge(
        [case(id=str(i), instruction=f"number {i}!") for i in range(6)], progress=False
    )
    assert [(j.id, j.scores[SUBJECT.names[2]]) for j in found] == [(str(i), 1 + i % 5) for i in range(6)]


def test_estimate_grows_with_what_is_shown(serve):
    chat, server = serve(GOOD)
    big = case(source=np.zeros((9, 720, 1280, 3), np.uint8), edited=np.zeros((9, 720, 1280, 3), np.uint8))
    few, many = (
        ChatJudge(chat, frames=n, side=1280, media="frames", prices=(2.0, 0.0)).estimate([big, big]) for n in (1, 8)
    )
    assert few["calls"] == many["calls"] == 2
    assert many["input_tokens"] - few["input_tokens"] == 2 * 2 * (8 - 1) * 720 * 1280 // 784 + 4 - 2
    assert many["cost"] == pytest.approx(2e-6 * many["input_tokens"])
    assert ChatJudge(chat).estimate([])["calls"] == 0 and not server.asked
    assert ChatJudge(chat).estimate([big])["cost"] is None


@pytest.mark.parametrize(
    "settings, why",
    [
        (dict(attempts=0), "attempts"),
        (dict(frames=0), "frames"),
        (dict(side=0), "side"),
        (dict(media="film"), "media"),
        (dict(prices=(1,)), "prices"),
        (dict(prices=(1, -1)), "prices"),
    ],
)
def test_settings_are_checked(settings, why):
    with pytest.raises(ValueError, match=f"`{why}`"):
        ChatJudge(OpenAIChat("x", "http://h/v1"), **settings)


def test_large_clips_are_uploaded_once(tmp_path):
    server = Server(gemini_reply, [GOOD])
    chat = GeminiChat("vlm", f"http://127.0.0.1:{server.server_port}", KEY, 5, 2, 2, thinking=0, inline=100)
    cases = [
        case(id=str(i), source=CLIP, edited=write_video(tmp_path / f"{i}.mp4", case(5 + i).edited)) for i in range(3)
    ]
    found = ChatJudge(chat, folder=tmp_path / "kept").judge(cases, progress=False)
    server.shutdown()
    server.server_close()
    assert [j.state for j in found] == ["scored"] * 3 and len(server.uploads) == 4
    assert sorted(server.bytes.values()) == sorted(
        Path(p).read_bytes() for p in {c.source for c in cases} | {c.edited for c in cases}
    )
    assert KEY not in (tmp_path / "kept" / "judgements.jsonl").read_text()


def test_language_model_that_cannot_speak():
    chat = TransformersChat(qwen25(), PROCESSOR, device="cpu", batch_size=2, tries=2)
    judge = ChatJudge(chat, frames=1, attempts=1)
    judge._question = lambda c, folder, ask=judge._question: replace(ask(c, folder), max_tokens=6)
    found = judge.judge([case(id=str(i)) for i in range(3)], progress=False)
    assert [j.state for j in found] == ["failed"] * 3
    assert all(
        j.error.startswith("rubbish: ")
        and j.usage["calls"] == 1
        and j.usage["input_tokens"] > 100
        and len(j.replies) == 1
        for j in found
    )


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[1, 2]",
        "5",
        "null",
        '"text"',
        "{}",
        '{"key": "x", "id": "a", "judge": "b", "rubric": "c", "scores": {"d": 9}}',
    ],
)
def test_a_line_that_is_no_judgement_costs_nothing_but_itself(tmp_path, line):
    server = Server(openai_reply, [GOOD])
    judge = ChatJudge(OpenAIChat("vlm", f"http://127.0.0.1:{server.server_port}/v1", KEY), frames=1, folder=tmp_path)
    first = judge.judge([case()], progress=False)
    memory = tmp_path / "judgements.jsonl"
    memory.write_text(f'{line}\n{memory.read_text()}{line}\n{{"key": "hal')
    assert judge.judge([case()], progress=False) == first and len(server.asked) == 1
    server.shutdown()
    server.server_close()


# a formula as judge


@pytest.mark.parametrize(
    "task, falls",
    [
        ("subject", dict(flicker=1, blur=1, freeze=2, slide=2)),
        ("background", dict(flicker=1, freeze=1, slide=2)),
        ("change", dict(flicker=1, blur=1, freeze=1, slide=2)),
    ],
)
def test_damage_lowers_its_criterion(task, falls):
    one = case(25, task, known=True)
    names = one.rubric.names
    cases = [one] + [replace(one, id=name, edited=DAMAGES[name](one.edited)) for name in falls]
    best, *found = MetricJudge().judge(cases, progress=False)
    assert best.ok and min(best.scores.values()) > 3.5 and best.judge == "metrics (no model)"
    assert not MetricJudge.is_model
    for (name, at), worse in zip(falls.items(), found):
        assert worse.scores[names[at]] < best.scores[names[at]] - 1, (name, worse.scores, best.scores)


@pytest.mark.parametrize("task", ["subject", "background"])
def test_another_reference_lowers_the_first_criterion(task):
    one = case(25, task)
    own, other = MetricJudge().judge([one, replace(one, id="b", reference=case(45, task).reference)], progress=False)
    assert list(other.scores.values())[0] < list(own.scores.values())[0] - 1


def test_a_copy_of_the_source_is_no_edit():
    for task in ("subject", "change"):
        one = case(6, task, known=True)
        (found,) = MetricJudge().judge([replace(one, edited=one.source)], progress=False)
        assert set(found.scores.values()) == {1.0} and found.capped


def test_metrics_of_files_of_other_size_and_length(tmp_path):
    clip = read_video(CLIP).frames
    flickering = DAMAGES["flicker"](clip)
    wide = resize_frames(flickering[:-2], 160, 120, mode="stretch")
    worse = write_video(tmp_path / "worse.mp4", wide, fps=8)
    dark = write_video(tmp_path / "dark.mp4", (clip * 0.5).astype(np.uint8), fps=8)
    made = lambda path: Case(path.name, "Make it dark", CLIP, path, None, OPENVE, "style")
    good, bad = MetricJudge().judge([made(dark), made(worse)], progress=False)
    assert good.ok and bad.ok and bad.scores[OPENVE.names[1]] < good.scores[OPENVE.names[1]]
    laid = lay_beside(made(worse), side=64)
    source, edited = laid.source, laid.edited
    assert source.shape == edited.shape and len(source) == len(clip) - 2 and max(source.shape[1:3]) <= 64


def test_nothing_to_measure_by():
    with pytest.raises(ValueError, match="Identity.*nothing to be measured by"):
        _metric_scores(dict.fromkeys(_WORTH, math.nan), SUBJECT)
    known = dict.fromkeys(_WORTH, math.nan) | dict(changed=0.0075, flicker=-9.0, shift=9.0)
    assert list(_metric_scores(known, OPENVE).values()) == [3, 5, 1]


# put together


def test_counts_and_intervals():
    rng = np.random.default_rng(0)
    rows = [
        judgement(
            str(i),
            rng.integers(1, 6, 3).tolist(),
            edit_type="ab"[i % 2],
            usage=dict(input_tokens=10, output_tokens=1, calls=1, cost=0.5),
        )
        for i in range(40)
    ]
    lost = [
        case(id=name, rubric=OPENVE).judged("me", error=error)
        for name, error in (("x", "missing: a.mp4"), ("y", "rubbish: no"), ("z", "time-out: no"))
    ]
    total = Summary([*rows, *lost])
    assert total.counts == dict(scored=40, failed=2, missing=1)
    assert total.reasons == {"missing": 1, "rubbish": 1, "time-out": 1}
    assert total.usage == dict(input_tokens=400, output_tokens=40, calls=40, cost=20.0)
    means = np.array([list(r.scores.values()) for r in rows])
    assert [total.columns["openve", n][0] for n in OPENVE.names] == pytest.approx(means.mean(0))
    assert total.means["rows"][0] == pytest.approx(means.mean())
    for value, low, high in (
        *total.columns.values(),
        *total.types.values(),
        total.means["rows"],
        total.means["criteria"],
        total.means["edit types"],
    ):
        assert low < value < high
    half = 1.96 * means.mean(1).std() / math.sqrt(40)
    assert total.means["rows"][2] - total.means["rows"][1] == pytest.approx(2 * half, rel=0.15)
    assert "40 scored, 2 failed, 1 missing" in total._repr_markdown_()
    # many draws have none of the rare type
    rare = Summary([judgement(str(i), (3, 4, 2 + i % 3), edit_type="rare" if i < 2 else "often") for i in range(42)])
    assert rare.means["edit types"][1] < rare.means["edit types"][0] < rare.means["edit types"][2]
    none = Summary(lost)
    assert (none.counts["scored"], none.means, none.columns) == (0, {}, {}) and "0 scored" in none._repr_markdown_()


def test_what_cannot_be_put_together():
    with pytest.raises(ValueError, match="one judge.*0 judges"):
        Summary([])
    with pytest.raises(ValueError, match="one judge.*2 judges"):
        Summary([judgement("a", (1, 1, 1)), judgement("b", (1, 1, 1), judge="you")])
    with pytest.raises(ValueError, match="different cases.*1 cases, 2 judgements"):
        Summary([judgement("a", (1, 1, 1)), judgement("a", (2, 1, 1))])


def beside(bench, rows, name):
    "The last row of a published table."
    table = beside_published(bench, Summary(rows), name)
    return table, table.rows[-1][0], tuple(cell.value for cell in table.rows[-1][1:])


def test_beside_published_numbers():
    rows = [judgement("a", (5, 4, 3), SUBJECT), judgement("b", (2, 2, 2), BACKGROUND)]
    table, name, values = beside("refvie", rows, "mine")
    assert values == (5, 4, 3, 2, 2, 2, 3) and name == "mine (judge: me; 2 scored, 0 failed, 0 missing)"
    assert len(PUBLISHED["refvie"]["rows"]) == 5 and "gemini-3-flash-preview" in table._repr_markdown_()
    assert "| Kling-O1 | 4.75 |" in table._repr_markdown_()
    kinds = ("background_change", "local_change", "global_style")
    rated = [judgement(t, (s,) * 3, edit_type=t) for t, s in zip(kinds, (1, 3, 5))]
    assert beside("openve", rated, "mine")[2] == (3, 5, 1, 3, None, None)
    assert PUBLISHED["openve"]["rows"]["Kiwi-Edit, stage 3"] == [3.02, 3.64, 2.64, 3.83, 2.63, 2.36]
    assert beside("refvie", rows[:1], "half")[2] == (5, 4, 3, None, None, None, 4)


# agreement

N = math.nan
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


def test_alpha_of_the_published_example():
    "Four observers, twelve units, missing values: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011)."
    assert round(_krippendorff_alpha(KRIPPENDORFF, "ordinal"), 3) == 0.815
    assert round(_krippendorff_alpha(KRIPPENDORFF, "interval"), 3) == 0.849


def by_definition(ratings, distance):
    "Observed over expected disagreement, pair by pair."
    units = [[v for v in column if not math.isnan(v)] for column in np.transpose(ratings)]
    units = [u for u in units if len(u) > 1]
    every = [v for u in units for v in u]
    observed = sum(
        sum(distance(a, b, every) for i, a in enumerate(u) for j, b in enumerate(u) if i != j) / (len(u) - 1)
        for u in units
    ) / len(every)
    expected = sum(distance(a, b, every) for i, a in enumerate(every) for j, b in enumerate(every) if i != j) / (
        len(every) * (len(every) - 1)
    )
    return 1 - observed / expected


def ordinal(a, b, every):
    low, high = sorted((a, b))
    return (sum(low <= v <= high for v in every) - (every.count(low) + every.count(high)) / 2) ** 2


def test_alpha_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(5):
        ratings = rng.integers(1, 6, (3, 15)).astype(float)
        ratings[rng.random(ratings.shape) < 0.2] = N
        assert _krippendorff_alpha(ratings, "interval") == pytest.approx(
            by_definition(ratings, lambda a, b, _: (a - b) ** 2)
        )
        assert _krippendorff_alpha(ratings) == pytest.approx(by_definition(ratings, ordinal))
    assert _krippendorff_alpha([[1, 2, 3], [1, 2, 3]]) == 1 and math.isnan(_krippendorff_alpha([[1, N], [N, 2]]))
    assert math.isnan(_krippendorff_alpha([[2, 2], [2, 2]]))


def test_agreement_of_judges():
    from scipy.stats import kendalltau, spearmanr

    rng = np.random.default_rng(0)
    x = rng.integers(1, 6, (20, 3))
    y = np.clip(x + rng.integers(-1, 2, x.shape), 1, 5)
    a = [judgement(str(i), r.tolist(), judge="a") for i, r in enumerate(x)]
    b = [judgement(str(i), r.tolist(), judge="b") for i, r in enumerate(y)][::-1]
    b[3] = replace(b[3], scores=dict.fromkeys(OPENVE.names), error="rubbish: no")
    found = agreement(a, b[1:], resamples=60)
    keep = [i for i in range(19) if i != 16]
    rows = {name: rest for name, *rest in found.rows}
    n, tau, rho, ordinal, _, close = rows[A]
    assert n == 18 and tau.value == pytest.approx(kendalltau(x[keep, 0], y[keep, 0]).statistic)
    assert rho.value == pytest.approx(spearmanr(x[keep, 0], y[keep, 0]).statistic)
    assert rows["all"][3].value == pytest.approx(_krippendorff_alpha([x[keep].ravel(), y[keep].ravel()]))
    assert close.value == 1 and all(v.low <= v.value <= v.high for v in (tau, ordinal))
    assert "a and b; 2 cases" in found._repr_markdown_()
    same = agreement(a, [replace(j, judge="b", scores=dict.fromkeys(OPENVE.names, 3.0)) for j in a], resamples=20)
    assert same.rows[0][:3] == [A, 20, None] and "nan" not in str(same)
    apart = agreement(a[:5], [replace(j, judge="b") for j in a[5:]])
    assert apart.rows == [] and "20 cases" in apart.title
    with pytest.raises(ValueError, match="`b` has to be one judge"):
        agreement(a, [])
    with pytest.raises(ValueError, match="`a` has to be one judge"):
        agreement(a + a, b)


# people as judges


def page_cases():
    return [
        case(6, id="first system/1"),
        case(6, "background", id="second", instruction='</script><img src=x onerror="fail()"> & "more"'),
        case(8, "add", id="third", source=CLIP),
    ]


def facts(text):
    "What a page knows of its cases."
    return json.loads(text.split('id="facts">')[1].split("</script>")[0])["cases"]


def test_page_is_whole_and_safe(tmp_path):
    text = save_score_page(page_cases(), tmp_path / "p.html").read_text()
    assert "<img src=x" not in text and [c["instruction"] for c in facts(text)] == [c.instruction for c in page_cases()]
    assert "://" not in text and text.count("data:video/mp4") == 6 and text.count("data:image/png") == 2
    assert text.count("</script>") == 2 and all(a in text for a in ("fieldset", "legend", "aria-live"))
    assert base64.b64encode(CLIP.read_bytes()).decode() in text
    with pytest.raises(ValueError, match="`cases`"):
        save_score_page([], tmp_path / "q.html")
    with pytest.raises(ValueError, match="`cases`"):
        save_score_page([case(), case()], tmp_path / "q.html")
    with pytest.raises(ValueError, match=r"\.html"):
        save_score_page(page_cases(), tmp_path / "q.txt")
    with pytest.raises(FileNotFoundError):
        save_score_page([case(edited=tmp_path / "none.mp4")], tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_page_with_files_beside_it(tmp_path):
    odd = save_score_page(page_cases(), tmp_path / "new/100% #1.html", embed=False).read_text()
    assert facts(odd)[0]["media"][0]["src"].startswith("100%25%20%231_files/1-")
    text = save_score_page(page_cases(), tmp_path / "p.html", embed=False).read_text()
    assert "data:" not in text and len(list((tmp_path / "p_files").iterdir())) == 8
    assert facts(text)[2]["media"][0] == dict(name="before", still=False, src="p_files/3-before.mp4")
    assert (tmp_path / "p_files" / "3-before.mp4").read_bytes() == CLIP.read_bytes()


def test_blind_order(tmp_path):
    cases = [case(id=f"kiwi-{i}", instruction=f"do {i}") for i in range(6)]
    shown = lambda **o: facts(save_score_page(cases, tmp_path / "p.html", **o).read_text())
    order = lambda **o: [int(c["instruction"].removeprefix("do ")) for c in shown(**o)]
    assert order() == list(range(6)) != order(seed=3) == order(seed=3) != order(seed=4)
    assert sorted(order(seed=4)) == list(range(6))
    assert "kiwi-" not in (tmp_path / "p.html").read_text().split('<script type="application/json"')[0]


def test_scores_of_people(tmp_path):
    row = dict(
        id="a",
        judge="Ada",
        rubric="openve",
        edit_type="add",
        capped=True,
        criteria=list(OPENVE.names),
        scores=[3, 5, 2],
    )
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row | dict(id="b", scores=[3, None, 2])) + "\n")
    a, b = read_scores_file(file)
    assert (a.judge, a.edit_type, list(a.scores.values()), a.capped, b.error) == (
        "Ada",
        "add",
        [3, 3, 2],
        True,
        f"incomplete: {B}",
    )
    for bad, why in (
        ("{", "line 1"),
        (json.dumps(dict(id="a")), "line 1"),
        (json.dumps(row | dict(scores=[1, 2])), "line 1"),
        (json.dumps(row | dict(scores=[1, 2, 7])), "1 to 5.*7"),
        (json.dumps(row | dict(scores=[1, 2, True])), "1 to 5"),
        ("[1]", "line 1"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match=why):
            read_scores_file(file)


def test_a_person_scores_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if reason := why_no_browser():
        pytest.skip(reason)
    page_file = save_score_page(page_cases(), tmp_path / "p.html", seed=1)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        page, faults, foreign = browser.new_page(viewport=dict(width=1100, height=1000)), [], []
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("dialog", lambda d: faults.append(d.message))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else foreign.append(r.url))
        page.goto(page_file.as_uri())
        page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState && v.videoWidth)")
        assert page.locator("section:visible").count() == 1 and page.locator("#place").inner_text() == "Edit 1 of 3"
        assert page.locator("#count").inner_text() == "0 of 3 scored"
        page.locator("section:visible input").first.focus()
        for key in "452":
            page.keyboard.press(key)
        assert page.locator("#count").inner_text() == "1 of 3 scored"
        page.keyboard.press("n")
        page.keyboard.press("5")
        page.get_by_role("button", name="Next").click()
        page.locator("section:visible fieldset").nth(0).locator("label").nth(2).click()
        for at in (1, 2):
            page.locator("section:visible fieldset").nth(at).locator("label").nth(3).click()
        page.reload()
        assert page.locator("#count").inner_text() == "2 of 3 scored"
        assert page.locator("#place").inner_text() == "Edit 3 of 3"
        page.locator("#save").click()  # nobody's
        page.locator("#person").fill("Ada L. 15")
        with page.expect_download() as download:
            page.locator("#save").click()
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        browser.close()
    assert not faults and not foreign and saved.name == "scores-Ada-L-15.jsonl"
    found = read_scores_file(saved)
    assert {j.id for j in found} == {c.id for c in page_cases()} and {j.judge for j in found} == {"Ada L. 15"}
    assert [list(j.scores.values()) for j in found if j.ok] == [[4, 4, 2], [3, 3, 3]]
    assert [j.state for j in found] == ["scored", "failed", "scored"] and all(j.capped for j in found if j.ok)
