"Backends with weights: real classes with few random weights, and a server that speaks the real protocols."

import base64
import importlib.util
import io
import json
import pickle
import re
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from kiwi_edit.data import backends as module
from kiwi_edit.data.backends import *
from kiwi_edit.data.backends import _called, _qwen_processor, _read_grounding, _read_score, _seed_of
from kiwi_edit.core import asset
from kiwi_edit.encoder import KiwiProcessor
from kiwi_edit.data.embedded import _mask_boxes, deduplicate
from kiwi_edit.quadruplets import (
    BackendError,
    GroundStage,
    Pair,
    ScoreStage,
    SegmentStage,
    SynthesizeStage,
    VerifyStage,
    load_record,
)
from kiwi_edit.world import World

WORLD = World()
MADE = WORLD.sample(5, "subject")
KEY = "sk-very-secret-1234"


def record(id="world-5", made=MADE, **facts):
    found = load_record(Pair(id, made.source, made.target, made.instruction))
    for name, value in facts.items():
        setattr(found, name, value)
    return found


def grounded(id="world-5", **facts):
    return record(
        id, **dict(dict(task="subject", subject="garden gnome", mask=MADE.mask, boxes=_mask_boxes(MADE.mask)), **facts)
    )


# a server on this machine


def openai_reply(text, finish="stop", refusal=None):
    return dict(
        id="chatcmpl-9x",
        object="chat.completion",
        created=1760000000,
        model="qwen3-vl",
        system_fingerprint=None,
        service_tier=None,
        choices=[
            dict(
                index=0,
                message=dict(role="assistant", content=text, refusal=refusal, annotations=[], tool_calls=[]),
                logprobs=None,
                finish_reason=finish,
                stop_reason=None,
            )
        ],
        usage=dict(prompt_tokens=812, completion_tokens=9, total_tokens=821, prompt_tokens_details=None),
    )


def gemini_reply(text, finish="STOP"):
    content = dict(parts=[dict(text=text)], role="model") if text is not None else {}
    return dict(
        candidates=[dict(content=content, finishReason=finish, index=0)],
        modelVersion="gemini-2.5-flash",
        responseId="a1b2",
        usageMetadata=dict(
            promptTokenCount=1033,
            candidatesTokenCount=6,
            totalTokenCount=1039,
            promptTokensDetails=[dict(modality="IMAGE", tokenCount=1032)],
        ),
    )


class Server(ThreadingHTTPServer):
    "Takes the next of `replies` (the last one for ever): a text, a dict as it is, (status, dict, headers), or a callable that makes one of these of the request."

    daemon_threads = True

    def __init__(self, make, replies):
        self.make, self.replies, self.asked, self.lock = make, list(replies), [], threading.Lock()
        self.uploads, self.bytes, self.looks, self.states = {}, {}, {}, ["PROCESSING", "PROCESSING", "ACTIVE"]
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *args):
        pass  # a client that no longer waits


def camel(body):
    "Protocol buffers take a key in either spelling, and the client writes both."
    if isinstance(body, dict):
        return {re.sub("_(.)", lambda m: m[1].upper(), k): camel(v) for k, v in body.items()}
    return [camel(v) for v in body] if isinstance(body, list) else body


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):  # a file of Gemini's, which takes two looks to be ready
        with self.server.lock:
            name = re.search(r"/v1\w*/(files/\w+)", self.path)[1]
            self.server.looks[name] = self.server.looks.get(name, 0) + 1
            file = self.server.uploads[name] | dict(
                state=self.server.states[min(self.server.looks[name], len(self.server.states) - 1)]
            )
        self.speak(200, file, {})

    def uploaded(self):
        "Gemini's upload protocol: an address for the bytes, then the bytes."
        raw, server = self.rfile.read(int(self.headers["content-length"])), self.server
        headers = {k.lower(): v for k, v in self.headers.items()}
        with server.lock:
            name = (
                f"files/f{len(server.uploads)}"
                if headers["x-goog-upload-command"] == "start"
                else "files/" + self.path.split("id=")[1]
            )
            base = f"http://127.0.0.1:{server.server_port}"
            if headers["x-goog-upload-command"] == "start":
                server.uploads[name] = dict(
                    name=name,
                    uri=f"{base}/v1beta/{name}",
                    mimeType=headers["x-goog-upload-header-content-type"],
                    sizeBytes=headers["x-goog-upload-header-content-length"],
                    state=server.states[0],
                )
                return self.speak(
                    200,
                    {},
                    {
                        "x-goog-upload-url": f"{base}/upload/v1beta/files?id={name[6:]}",
                        "x-goog-upload-status": "active",
                    },
                )
            server.bytes[name] = raw
        self.speak(200, dict(file=server.uploads[name]), {"x-goog-upload-status": "final"})

    def do_POST(self):
        if self.path.startswith("/upload/"):
            return self.uploaded()
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
        if callable(reply):
            reply = reply(body)
        status, content, headers = (
            reply if isinstance(reply, tuple) else (200, server.make(reply) if isinstance(reply, str) else reply, {})
        )
        self.speak(status, content, headers)

    def speak(self, status, content, headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(params=["openai", "gemini"])
def serve(request):
    "Called with replies, gives a chat and its server."
    servers = []

    def start(*replies, tries=3, timeout=5.0, concurrency=1, **kwargs):
        openai = request.param == "openai"
        server = Server(openai_reply if openai else gemini_reply, replies)
        servers.append(server)
        base = f"http://127.0.0.1:{server.server_port}"
        common = dict(api_key=KEY, timeout=timeout, tries=tries, concurrency=concurrency, **kwargs)
        return (
            OpenAIChat("qwen3-vl", base + "/v1", **common) if openai else GeminiChat(base_url=base, **common)
        ), server

    start.openai = request.param == "openai"
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def heard(request):
    "Model, system prompt, key, and the parts of a request of either protocol, pictures decoded."
    path, headers, body = request
    decode = lambda data: np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    if "messages" in body:
        assert path == "/v1/chat/completions"
        system, user = body["messages"] if len(body["messages"]) == 2 else [dict(content=""), *body["messages"]]
        parts = [
            p["text"] if p["type"] == "text" else decode(p["image_url"]["url"].removeprefix("data:image/png;base64,"))
            for p in user["content"]
        ]
        return body["model"], system["content"], headers["authorization"].removeprefix("Bearer "), parts
    parts = [
        p["text"] if "text" in p else decode(p["inlineData"]["data"].translate({45: "+", 95: "/"}))
        for p in body["contents"][0]["parts"]
    ]  # the client writes the alphabet for addresses
    system = "".join(p["text"] for p in body.get("systemInstruction", dict(parts=[]))["parts"])
    return path.split("/models/")[1].removesuffix(":generateContent"), system, headers["x-goog-api-key"], parts


ASK = Question(("What is it?", MADE.source[0]), "Be brief.", _read_score)
BROKEN = (503, dict(error=dict(code=503, message=f"overloaded, key {KEY}", status="UNAVAILABLE")), {})
BUSY = (429, dict(error=dict(code=429, message="slow down", status="RESOURCE_EXHAUSTED")), {"retry-after": "0.1"})

# what replies say


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"score": 7}', dict(score=7)),
        ('```json\n{"score": 7}\n```', dict(score=7)),
        ('Here [as asked]: {"a": {"b": [1, {"c": 2}]}} Enjoy!', dict(a=dict(b=[1, dict(c=2)]))),
        ('<think>{"score": 1}? {no}</think>{"score": 7}', dict(score=7)),
        ('{"text": "a } and a { and ```"}', dict(text="a } and a { and ```")),
        ('Draft: {"score": 5}, no.</think>\n{"score": 7}', dict(score=7)),
        ('{"score": 7}<think>{"score": 1}?</think>', dict(score=7)),
    ],
)
def test_parse_json(text, value):
    assert parse_json(text) == value


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "holds 0"),
        ("eight", "holds 0"),
        ('{"score": 7} {"score": 7}', "holds 2"),
        ('[{"score": 7}]', "a list"),
        ("[1, 2]", "a list"),
        ('{"score": 7', "no JSON"),
        ('[{"score": 7}', "no JSON"),
        ("{'score': 7}", "no JSON"),
        ('{"a": {"score": 7}, b}', "no JSON"),
        ('{"score": 7, "score": 8}', "unique"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 100_000, "deep"),
    ],
)
def test_parse_json_says_what_is_wrong(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 0}',
        '{"score": 11}',
        '{"score": 7.5}',
        '{"score": "7.5"}',
        '{"score": "seven"}',
        '{"score": "7/5"}',
        '{"score": [7]}',
        '{"score": true}',
        '{"score": null}',
        '{"score": NaN}',
        '{"points": 7}',
    ],
)
def test_scores_are_integers_in_range(text):
    with pytest.raises(ValueError, match="score"):
        _read_score(text)


@pytest.mark.parametrize("said", ["7", "7.0", '"7"', '" 7.0 "', '"7/10"', '"7 out of 10"'])
def test_scores_are_read_as_models_write_them(said):
    score = _read_score('{"score": %s}' % said)
    assert score == 7 and type(score) is int


def test_numbers_of_boxes_are_read_as_models_write_them():
    found = _read_grounding('{"task": "add", "subject": "hat", "boxes": [["0", "100", 200.0, 300, "400.0"]]}', [0], 1)
    assert np.allclose(found.boxes, [[0.1, 0.2, 0.3, 0.4]])


THINKING = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<Thought>", "</Thought>"),
    ("<reasoning effort='high'>", "</reasoning >"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<unused94>thought", "<unused95>"),
    ("&lt;think&gt;", "&lt;/think&gt;"),
]


@pytest.mark.parametrize("opening, closing", THINKING)
def test_thoughts_are_no_answer(opening, closing):
    draft, answer = 'The form is {"score": 1}.', '{"score": 7}'
    for text in (
        f"{opening}{draft}{closing}{answer}",
        f"{draft}\n{closing}\n{answer}",
        f"{opening}{draft}{closing}\n{answer}\n{opening}{draft}{closing}",
        f"{opening}{draft}{closing}{draft}{closing}{answer}",
    ):
        assert _read_score(text) == 7
    for text in (f"{opening}{draft}", f"{opening}{draft}{closing}{opening}{draft}", f"{answer}{opening}"):
        with pytest.raises(ValueError, match="cut off"):
            _read_score(text)


# endpoints


def test_request_carries_words_pictures_and_key(serve):
    chat, server = serve('{"score": 7}')
    assert chat.answer([ASK]) == [7]
    (model, system, key, parts), body = heard(server.asked[0]), server.asked[0][2]
    assert (model, system, key, parts[0]) == (chat.model, "Be brief.", KEY, "What is it?")
    assert np.array_equal(parts[1], MADE.source[0])
    if serve.openai:
        assert (body["temperature"], body["max_tokens"]) == (0, 256)
    else:
        assert [body["generationConfig"][k] for k in ("temperature", "maxOutputTokens")] == [0, 256]
        assert list(body["generationConfig"]["thinkingConfig"].values()) == [0]


@pytest.mark.parametrize("away", [BUSY, BROKEN], ids=["busy", "broken"])
def test_a_server_that_is_away_is_asked_again(serve, away):
    chat, server = serve(away, '{"score": 7}')
    assert chat.answer([ASK]) == [7] and len(server.asked) == 2


def test_broken_for_ever(serve):
    chat, server = serve(BROKEN, tries=2)
    (answer,) = chat.answer([ASK])
    assert isinstance(answer, BackendError) and str(answer).startswith("endpoint: 503") and len(server.asked) == 2
    assert KEY not in str(answer) and "***" in str(answer)


def test_time_out(serve):
    chat, server = serve(lambda body: time.sleep(0.4) or '{"score": 7}', timeout=0.1, tries=2)
    assert str(chat.answer([ASK])[0]) == "time-out: no reply within 0.1 s"


def test_rubbish_then_good(serve):
    chat, server = serve("I like it.", '{"score": 12}', '{"score": 7}')
    assert chat.answer([ASK]) == [7]
    first, second, third = (heard(request)[3] for request in server.asked)
    assert len(first) == 2 and "I like it." in second[2] and "12" in third[2] and len(third) == 3  # the last fault only


def test_rubbish_for_ever(serve):
    chat, server = serve("")
    assert str(chat.answer([ASK])[0]) == "rubbish: empty reply (3 tries)" and len(server.asked) == 3


@pytest.mark.parametrize("content", [b"<html>It works!</html>", b'{"half": ', {}, {"choices": [], "candidates": []}])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_replies_of_another_kind(serve, content, kind):
    chat, server = serve((200, content, {"content-type": kind}), tries=2)
    assert str(chat.answer([ASK])[0]).startswith("rubbish: ") and len(server.asked) == 2


def test_refusals_are_not_asked_again(serve):
    if serve.openai:
        refusals = [
            openai_reply(None, refusal="I can't help with that."),
            openai_reply("", "content_filter"),
            (400, dict(error=dict(message="filtered", code="content_filter")), {}),
        ]
    else:
        refusals = [
            gemini_reply(None, "SAFETY"),
            gemini_reply("{", "PROHIBITED_CONTENT"),
            dict(promptFeedback=dict(blockReason="BLOCKLIST"), usageMetadata=dict(totalTokenCount=9)),
        ]
    for refusal in refusals:
        chat, server = serve(refusal)
        assert str(chat.answer([ASK])[0]).startswith("refused: ") and len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_cannot_get_better_is_asked_once(serve, status):
    chat, server = serve(
        (status, dict(error=dict(code=status, message=f"Incorrect API key provided: {KEY}", status="X")), {})
    )
    answer = str(chat.answer([ASK])[0])
    assert answer == f"endpoint: {status} " + answer[14:] and "Incorrect" in answer and KEY not in answer
    assert len(server.asked) == 1


def test_nobody_listens(serve):
    chat, server = serve('{"score": 7}', tries=2)
    server.shutdown()
    server.server_close()
    assert str(chat.answer([ASK])[0]).startswith("endpoint: no connection")


def test_questions_travel_together(serve):
    together = threading.Barrier(3, timeout=5)  # opens for three requests under way at once

    def reply(body):
        together.wait()
        return json.dumps(
            dict(
                score=int(
                    (
                        "messages" in body
                        and body["messages"][0]["content"]
                        or body.get("contents", [{}])[0].get("parts")
                    )[0]["text"]
                )
            )
        )

    chat, server = serve(reply, concurrency=3)
    assert chat.answer([Question((str(n),), read=_read_score) for n in (3, 1, 2)]) == [3, 1, 2]


def test_keys_stay_inside(serve, caplog):
    caplog.set_level("DEBUG")
    chat, server = serve(BROKEN, '{"score": 7}')
    chat.answer([ASK])
    assert KEY not in repr(chat) + str(chat) and KEY not in caplog.text


def test_chats_travel_to_workers(serve):
    chat, server = serve('{"score": 7}')
    chat.answer([ASK])
    assert pickle.loads(pickle.dumps(chat)).answer([ASK]) == [7] and heard(server.asked[1])[2] == KEY


def test_keys_from_the_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="`api_key`.*OPENAI_API_KEY"):
        OpenAIChat("gpt-x")
    with pytest.raises(ValueError, match="`api_key`.*GEMINI_API_KEY"):
        GeminiChat()
    OpenAIChat("local", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    assert (
        OpenAIChat("gpt-x").api_key == KEY == GeminiChat().api_key
        and OpenAIChat("gpt-x", api_key="mine").api_key == "mine"
    )
    assert "pw" not in repr(OpenAIChat("x", "http://me:pw@host/v1"))


@pytest.mark.parametrize(
    "make, package",
    [(lambda: OpenAIChat("x", "http://h/v1"), "openai"), (lambda: GeminiChat(api_key="x"), "google-genai")],
)
def test_missing_package_says_what_to_install(make, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{package}.*kiwi-edit\[judge\]"):
        make()


@pytest.mark.parametrize(
    "arguments, name", [(dict(concurrency=0), "concurrency"), (dict(timeout=0), "timeout"), (dict(tries=0), "tries")]
)
def test_settings_are_checked(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`.* but is 0"):
        OpenAIChat("x", "http://h/v1", **arguments)


# what an exchange was


def test_attempts_are_kept_with_their_tokens(serve):
    chat, server = serve("I like it.", BROKEN, '{"score": 7}')
    (exchange,) = chat.ask([ASK])
    tokens = (812, 9) if serve.openai else (1033, 6)
    assert exchange.answer == 7 and [a.text for a in exchange.attempts] == ["I like it.", '{"score": 7}']
    assert [a.failure.split(":")[0] for a in exchange.attempts] == ["rubbish", ""]
    assert [(a.input_tokens, a.output_tokens) for a in exchange.attempts] == [tokens, tokens]
    assert KEY not in str(exchange)


def test_unreadable_replies_have_their_own_limit(serve):
    chat, server = serve("no", "no", '{"score": 7}', tries=4)
    (exchange,) = chat.ask([ASK], unreadable=2)
    assert str(exchange.answer).endswith("(2 tries)") and len(server.asked) == 2


def test_an_echoed_key_is_cut_out(serve):
    chat, server = serve("x" * 190 + KEY, f"{KEY} is what you sent", tries=2)
    (exchange,) = chat.ask([ASK])
    assert KEY not in str(exchange) and not any(KEY[:n] in str(exchange) for n in range(6, len(KEY)))
    assert "***" in exchange.attempts[1].text


def test_a_word_in_brackets_within_an_answer_is_no_thought():
    assert parse_json('{"score": 3, "why": "a <reflection> in the water is missing"}') == dict(
        score=3, why="a <reflection> in the water is missing"
    )


def test_a_cut_reply_is_no_answer_whatever_it_holds(serve):
    draft = 'The form is {"score": 5}. Let me look again'
    chat, server = serve(
        openai_reply(draft, "length") if serve.openai else gemini_reply(draft, "MAX_TOKENS"), '{"score": 7}'
    )
    (exchange,) = chat.ask([ASK])
    assert exchange.answer == 7 and [a.text for a in exchange.attempts] == [draft, '{"score": 7}']


@pytest.mark.parametrize("key", ["0", "1", "e", "EMPTY", "none"])
def test_what_is_no_secret_is_not_taken_out(serve, key):
    chat, server = serve('{"score": 10, "note": "none, EMPTY"}')
    chat.api_key = key
    (exchange,) = chat.ask([ASK])
    assert exchange.answer == 10 and exchange.attempts[0].text == '{"score": 10, "note": "none, EMPTY"}'


def test_a_key_is_taken_out_of_what_is_kept_and_not_of_what_is_read(serve):
    chat, server = serve(f'{{"score": 10, "note": "{KEY}"}}')
    heard = []
    scores, words = chat.ask(
        [replace(ASK, read=lambda text: heard.append(text) or _read_score(text)), replace(ASK, read=str)]
    )
    assert KEY in heard[0] and scores.answer == 10 and KEY not in str(scores) + str(words)


@pytest.fixture
def one_chat():
    "Called with replies, gives an `OpenAIChat` and its server."
    servers = []

    def start(*replies, **options):
        servers.append(Server(openai_reply, replies))
        where = f"http://127.0.0.1:{servers[-1].server_port}/v1"
        return OpenAIChat("x", where, "k", tries=2, concurrency=1, **options), servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "content, answer",
    [
        ([dict(type="text", text='{"score":'), dict(type="text", text=" 7}")], 7),
        ([dict(type="output_text", text='{"score": 7}')], 7),
        (['{"score": 7}'], 7),
        (dict(type="text", text='{"score": 7}'), 7),
        (
            [
                dict(type="thinking", thinking=[dict(type="text", text='{"score": 1}')]),
                dict(type="text", text='{"score": 7}'),
            ],
            7,
        ),
        ([], "rubbish"),
        ([None], "rubbish"),
        (7, "rubbish"),
        ([dict(type="text", text=None)], "rubbish"),
        ([dict(type="image_url")], "rubbish"),
    ],
)
def test_content_may_be_parts(one_chat, content, answer):
    chat, server = one_chat(openai_reply(content))
    found = chat.answer([ASK])[0]
    assert found == 7 if answer == 7 else str(found).startswith(answer)


@pytest.mark.parametrize(
    "choices",
    [
        [None],
        [{}],
        [dict(message=None)],
        [dict(message={}, finish_reason="stop")],
        "abc",
        [dict(message="words", finish_reason="stop")],
        5,
    ],
)
def test_a_reply_without_its_parts_is_rubbish(one_chat, choices):
    chat, server = one_chat((200, dict(id="1", object="chat.completion", choices=choices), {}))
    found = str(chat.answer([ASK])[0])
    assert found.startswith("rubbish: ")


def picky(*names, status=400):
    "A server that refuses some parameters."

    def reply(body):
        wrong = next((name for name in names if name in body), None)
        if wrong is None:
            return openai_reply('{"score": 7}')
        if status == 422:
            return (
                422,
                dict(detail=[dict(type="extra_forbidden", loc=["body", wrong], msg="Extra inputs are not permitted")]),
                {},
            )
        return (
            400,
            dict(
                error=dict(
                    message=f"Unsupported parameter: '{wrong}' is not supported with this model.",
                    param=wrong,
                    code="unsupported_parameter",
                )
            ),
            {},
        )

    return reply


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "refused, sent",
    [
        (("max_tokens",), {"max_completion_tokens", "temperature"}),
        (("temperature",), {"max_tokens"}),
        (("max_tokens", "temperature"), {"max_completion_tokens"}),
    ],
)
def test_of_a_refused_parameter_the_other_spelling_is_tried_once_and_remembered(one_chat, refused, sent, status):
    chat, server = one_chat(picky(*refused, status=status))
    assert chat.answer([ASK, ASK]) == [7, 7] and len(server.asked) == len(refused) + 2
    assert set(server.asked[-1][2]) - {"model", "messages"} == sent


def test_a_parameter_refused_in_both_spellings_is_said(one_chat):
    chat, server = one_chat(picky("max_tokens", "max_completion_tokens"))
    found = str(chat.answer([ASK])[0])
    assert found.startswith("endpoint: 400") and "max_completion_tokens" in found and len(server.asked) == 2
    chat.extra = dict(max_completion_tokens=9)
    assert str(chat.answer([ASK])[0]).startswith("endpoint: 400") and len(server.asked) == 4


def test_parameters_that_the_client_does_not_know_travel_too(one_chat):
    chat, server = one_chat(
        '{"score": 7}', extra=dict(top_k=1, max_completion_tokens=99, temperature=None, extra_body=dict(min_p=0.1))
    )
    assert chat.answer([ASK]) == [7]
    body = server.asked[0][2]
    assert (body["top_k"], body["min_p"], body["max_completion_tokens"]) == (1, 0.1, 99)
    assert not {"max_tokens", "temperature"} & set(body)


def test_cut_replies_get_more_room(serve):
    cut = openai_reply('{"sco', "length") if serve.openai else gemini_reply('{"sco', "MAX_TOKENS")
    chat, server = serve(cut, cut, '{"score": 7}')
    (exchange,) = chat.ask([ASK])
    rooms = [
        body["max_tokens"] if serve.openai else body["generationConfig"]["maxOutputTokens"]
        for _, _, body in server.asked
    ]
    assert exchange.answer == 7 and exchange.attempts[0].cut
    assert exchange.attempts[0].failure.startswith("rubbish: cut at 256 tokens") and rooms == [256, 512, 1024]


def test_a_used_up_quota_is_said(serve):
    if serve.openai:
        reply = (
            429,
            dict(
                error=dict(
                    message="You exceeded your current quota", type="insufficient_quota", code="insufficient_quota"
                )
            ),
            {},
        )
    else:
        reply = (
            429,
            dict(
                error=dict(
                    code=429,
                    message="You exceeded your current quota",
                    status="RESOURCE_EXHAUSTED",
                    details=[
                        {
                            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                            "violations": [dict(quotaId="GenerateRequestsPerDayPerProjectPerModel-FreeTier")],
                        }
                    ],
                )
            ),
            {},
        )
    chat, server = serve(reply, tries=1)
    assert str(chat.answer([ASK])[0]).startswith("quota: ")


def gemini(*replies, **options):
    server = Server(gemini_reply, replies)
    base = f"http://127.0.0.1:{server.server_port}"
    return GeminiChat(**dict(api_key=KEY, base_url=base, timeout=5, tries=3, concurrency=1) | options), server


@pytest.mark.parametrize(
    "model, budget", [("gemini-2.5-flash", 0), ("gemini-2.5-pro", None), ("gemini-3-flash-preview", None)]
)
def test_thoughts_are_left_to_models_that_need_them(model, budget):
    chat, server = gemini('{"score": 7}', model=model)
    chat.answer([ASK])
    config = camel(server.asked[0][2])["generationConfig"]
    assert config.get("thinkingConfig", {}).get("thinkingBudget") == budget
    assert config["maxOutputTokens"] == (256 if budget == 0 else 256 + 8192)


# videos

CLIP = asset("samples/clip.mp4")
FILM = Question(("Before:", VideoPart(CLIP), "Good?"), read=_read_score)


def test_openai_video(one_chat):
    chat, server = one_chat('{"score": 7}')
    assert chat.answer([FILM]) == [7]
    part = server.asked[0][2]["messages"][0]["content"][1]
    kind, _, data = part["video_url"]["url"].partition(",")
    assert part["type"] == "video_url" and kind == "data:video/mp4;base64"
    assert base64.b64decode(data) == CLIP.read_bytes()


def test_gemini_small_video_is_inside():
    chat, server = gemini('{"score": 7}')
    assert chat.answer([FILM]) == [7] and not server.uploads
    part = camel(server.asked[0][2])["contents"][0]["parts"][1]
    data = part["inlineData"]["data"].translate({45: "+", 95: "/"})
    assert base64.b64decode(data + "=" * (-len(data) % 4)) == CLIP.read_bytes()
    assert part["inlineData"]["mimeType"] == "video/mp4" and part["videoMetadata"]["fps"] == 2


def test_gemini_large_video_is_uploaded_once(tmp_path):
    copy = tmp_path / "of the same bytes.mp4"
    copy.write_bytes(CLIP.read_bytes())
    chat, server = gemini('{"score": 7}', inline=100, concurrency=3)
    assert chat.answer([FILM, Question((VideoPart(copy), "Good?"), read=_read_score), FILM]) == [7, 7, 7]
    assert list(server.bytes.values()) == [CLIP.read_bytes()] and server.uploads["files/f0"]["mimeType"] == "video/mp4"
    parts = [part for _, _, body in server.asked for part in camel(body)["contents"][0]["parts"] if "fileData" in part]
    assert len(parts) == 3 and {part["fileData"]["fileUri"] for part in parts} == {server.uploads["files/f0"]["uri"]}
    assert KEY not in json.dumps(server.uploads) and pickle.loads(pickle.dumps(GeminiChat(api_key=KEY)))._files == {}
    assert chat.__getstate__()["_files"] == {}


def test_gemini_that_cannot_read_a_video():
    chat, server = gemini('{"score": 7}', inline=100)
    server.states = ["PROCESSING", "FAILED"]
    assert str(chat.answer([FILM])[0]) == "endpoint: the service cannot read the video" and not server.asked


def test_video_for_a_model_that_sees_pictures():
    parts = module._seen(VideoPart(CLIP, fps=4), most=5)
    assert parts[0] == "0.0 s:" and 4 <= len(parts) <= 10 and all(p.dtype == np.uint8 for p in parts[1::2])
    chat = TransformersChat(qwen25(), PROCESSOR, device="cpu")
    (exchange,) = chat.ask([Question((VideoPart(CLIP, fps=1), "What?"), max_tokens=4)])
    assert exchange.attempts[0].input_tokens > 20 and 0 < exchange.attempts[0].output_tokens <= 4


# judges


def boxes_of(mask, frames):
    return [[int(t), *(int(round(v * 1000)) for v in _mask_boxes(mask)[t])] for t in frames]


GOOD = dict(task="subject", subject="garden gnome", boxes=boxes_of(MADE.mask, (0, 1, 3, 4)))


def test_scorer(serve):
    chat, server = serve('{"score": 8}', '{"score": 2}', "no idea", "no idea", "no idea")
    found = ScoreStage(ChatBackend(chat))([record("a"), record("b"), record("c")])
    assert [(r.alive, r.verdicts[-1].reason[:9], r.verdicts[-1].scores) for r in found] == [
        (True, "", dict(edit=0.8)),
        (False, "poor edit", dict(edit=0.2)),
        (False, "rubbish: ", {}),
    ]
    assert {r.verdicts[-1].backend for r in found} == {chat.model}
    model, system, key, parts = heard(server.asked[0])
    shown = [p for p in parts if not isinstance(p, str)]
    assert len(shown) == 8
    assert all(
        np.array_equal(a, b)
        for i, t in enumerate((0, 1, 3, 4))
        for a, b in zip(shown[2 * i :], (MADE.source[t], MADE.target[t]))
    )
    assert json.dumps(MADE.instruction) in parts[-2] and '{"score": n}' in parts[-1] and parts[10] == "Frame 3 after:"
    assert system == ChatBackend.system and key == KEY


def test_grounder(serve):
    chat, server = serve("It is " + json.dumps(GOOD))
    (found,) = GroundStage(ChatBackend(chat))([record()])
    truth = _mask_boxes(MADE.mask)
    assert found.alive and (found.task, found.subject, found.in_source) == ("subject", "garden gnome", False)
    assert np.abs(found.boxes[[0, 1, 3, 4]] - truth[[0, 1, 3, 4]]).max() < 1e-3
    assert np.allclose(found.boxes[2], found.boxes[[1, 3]].mean(0), atol=1e-6)
    assert found.boxes.dtype == np.float32 and found.verdicts[-1].scores == dict(confidence=1.0)


def test_known_task_is_said_and_kept(serve):
    chat, server = serve(json.dumps(GOOD | dict(task="add")))
    assert GroundStage(ChatBackend(chat))([record(task="change")])[0].task == "change"
    assert any('known to be "change"' in p for p in heard(server.asked[0])[3] if isinstance(p, str))


def test_removals_have_nothing_to_show(serve):
    (found,) = GroundStage(ChatBackend(serve(json.dumps(GOOD | dict(task="remove")))[0]))([record()])
    assert found.in_source and found.verdicts[-1].reason.startswith("nothing to show")


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(task="dance"), "task"),
        (dict(task=["add"]), "task"),
        (dict(subject=" "), "subject"),
        (dict(subject=None), "subject"),
        (dict(boxes=[]), "boxes"),
        (dict(boxes="none"), "boxes"),
        (dict(boxes=None), "boxes"),
        (dict(boxes=[[0, 10, 10, 20]]), "five"),
        (dict(boxes=[[0, 10, "a", 20, 30]]), "five"),
        (dict(boxes=[[0, True, 1, 20, 30]]), "five"),
        (dict(boxes=[[2, 10, 10, 20, 20]]), "frame"),
        (dict(boxes=[[0, 10, 10, 1001, 20]]), "0..1000"),
        (dict(boxes=[[0, 20, 10, 10, 20]]), "0..1000"),
        (dict(boxes=[[0, -1, 10, 10, 20]]), "0..1000"),
        (dict(boxes=[7]), "five"),
    ],
)
def test_grounding_is_read_strictly(serve, change, why):
    chat, server = serve(json.dumps(GOOD | change), json.dumps(GOOD))
    assert GroundStage(ChatBackend(chat))([record()])[0].alive and len(server.asked) == 2
    assert why in heard(server.asked[1])[3][-1]
    chat, server = serve(json.dumps(GOOD | change))
    (lost,) = GroundStage(ChatBackend(chat))([record()])
    assert not lost.alive and lost.verdicts[-1].reason.startswith("rubbish: ") and why in lost.verdicts[-1].reason
    assert len(server.asked) == 3


def test_boxes_between_frames():
    a, b = (0.0, 0.0, 0.2, 0.2), (0.4, 0.4, 0.6, 0.6)
    found = module._spread_boxes({0: a, 4: b, 8: None}, 10)
    assert np.allclose(found[1], (0.1, 0.1, 0.3, 0.3)) and np.allclose(found[5:7], b) and np.isnan(found[7:]).all()
    assert np.isnan(module._spread_boxes({0: None, 2: None}, 3)).all()
    assert np.allclose(module._spread_boxes({1: a}, 3), a)
    two = _read_grounding(
        json.dumps(dict(task="background", subject="sea", boxes=[[0, 0, 0, 100, 200], [0, 300, 100, 400, 500]])), [0], 1
    )
    assert np.allclose(two.boxes, (0, 0, 0.4, 0.5)) and two.confidence == 1


def test_one_refusal_drops_one_record(serve):
    refused = openai_reply(None, refusal="no") if serve.openai else gemini_reply(None, "SAFETY")
    found = GroundStage(ChatBackend(serve(json.dumps(GOOD), refused, json.dumps(GOOD))[0]))(
        [record("a"), record("b"), record("c")]
    )
    assert [r.alive for r in found] == [True, False, True] and found[1].verdicts[-1].reason.startswith("refused: ")


def test_verifier(serve):
    chat, server = serve('{"score": 9}', '{"score": 6}', '{"score": 3}', '{"score": 9}', '{"score": 9}', "?", "?", "?")
    records = [grounded(id, reference=MADE.reference) for id in "abc"] + [grounded("d")]
    VerifyStage(ChatBackend(chat))(records)
    assert [(r.alive, r.verdicts[-1].reason[:24]) for r in records] == [
        (True, ""),
        (False, "reference does not show "),
        (False, "rubbish: it has to hold "),
        (False, "no reference"),
    ]
    assert records[0].verdicts[-1].scores == dict(consistency=9.0, quality=6.0) and len(server.asked) == 8
    first, second = (heard(request)[3] for request in server.asked[:2])
    assert np.array_equal(first[-2], MADE.reference) and sum(not isinstance(p, str) for p in first) == 9
    assert np.array_equal(second[0], MADE.reference) and sum(not isinstance(p, str) for p in second) == 1
    assert '"garden gnome"' in second[1]


def test_large_pictures_are_shrunk(serve):
    chat, server = serve('{"score": 9}')
    ChatBackend(chat, side=40).verify([grounded(reference=np.zeros((80, 160, 3), np.uint8))])
    assert heard(server.asked[0])[3][-2].shape == (20, 40, 3) and heard(server.asked[0])[3][1].shape == (40, 40, 3)


# language models in this process

PROCESSOR = KiwiProcessor.from_pretrained(asset("kiwi-edit-tiny/processor"))


def qwen25():  # random weights of the bundled model's sizes
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(asset("kiwi-edit-tiny/mllm"))).float()


def qwen3():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    ids = {
        f"{name}_token_id": PROCESSOR.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = dict(
        vocab_size=len(PROCESSOR.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True),
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        patch_size=14,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


MODELS = dict(argvalues=[qwen25, qwen3], ids=["Qwen2.5-VL", "Qwen3-VL"])


@pytest.mark.parametrize("make", **MODELS)
def test_random_language_model_ends_as_rubbish(make):
    chat = TransformersChat(make(), PROCESSOR, device="cpu")
    grounder = ChatBackend(chat, frames=2)
    grounder._where = lambda r, ask=grounder._where: replace(ask(r), max_tokens=8)
    found = GroundStage(grounder)([record("a"), record("b")])
    assert [r.alive for r in found] == [False, False]
    assert all(r.verdicts[-1].reason.startswith("rubbish: ") and "(2 tries)" in r.verdicts[-1].reason for r in found)
    assert found[0].verdicts[-1].backend == type(chat.model).__name__


@pytest.mark.parametrize("make", **MODELS)
def test_batches_say_what_single_questions_say(make):
    chat = TransformersChat(make(), PROCESSOR, device="cpu", batch_size=3)
    questions = [
        Question((MADE.source[0], "What?", MADE.source[4]), "Be brief.", max_tokens=6),
        Question(("Which one of these two is it, and why?", MADE.reference), max_tokens=6),
        Question(("Hello",), max_tokens=6),
    ]
    together = [str(a) for a in chat.answer(questions)]
    assert together == [str(chat.answer([q])[0]) for q in questions] and len(set(together)) > 1


def test_pictures_become_as_many_tokens_as_they_have_patches():
    inputs = _qwen_processor(PROCESSOR)(
        text=["a<|image_pad|>b<|image_pad|>", "<|image_pad|>"],
        images=[Image.new("RGB", size) for size in ((56, 28), (28, 28), (84, 56))],
    )
    grids = (inputs["image_grid_thw"].prod(1) // 4).tolist()  # four patches to a token
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [grids[0] + grids[1], grids[2]]
    assert grids[2] >= grids[0] >= grids[1] > 0
    assert inputs["attention_mask"][:, -1].all()
    assert inputs["pixel_values"].shape[0] == inputs["image_grid_thw"].prod(1).sum()


def test_the_picture_reaches_the_model():
    chat, seen = TransformersChat(qwen25(), PROCESSOR, device="cpu"), []
    chat.model.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    chat.answer([Question((MADE.source[0],), max_tokens=2)])
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    wanted = Qwen2VLImageProcessorPil.from_pretrained(asset("kiwi-edit-tiny/processor"))(
        images=[Image.fromarray(MADE.source[0])], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(seen[0], wanted)


def test_language_model_from_a_folder_that_answers():
    "The real `generate` with its choices forced to a well-formed answer."
    chat = TransformersChat(asset("kiwi-edit-tiny/mllm"), asset("kiwi-edit-tiny/processor"), device="cpu")
    words = PROCESSOR.tokenizer('{"score": 8}')["input_ids"] + [PROCESSOR.tokenizer.eos_token_id]

    def force(ids, scores, start=[]):
        if not start or ids.shape[1] < start[0]:
            start[:] = [ids.shape[1]]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, words[min(ids.shape[1] - start[0], len(words) - 1)]] = 0
        return forced

    generate = chat.model.generate
    chat.model.generate = lambda **kwargs: generate(**kwargs, logits_processor=[force])
    found = ScoreStage(ChatBackend(chat))([record()])[0]
    assert found.alive and found.verdicts[-1].scores == dict(edit=0.8) and found.verdicts[-1].backend.endswith("mllm")


def test_loaded_model_needs_a_processor():
    with pytest.raises(ValueError, match="`processor`"):
        TransformersChat(qwen25())
    with pytest.raises(ValueError, match="`batch_size`"):
        TransformersChat(qwen25(), PROCESSOR, batch_size=0)


# masks


def shaken(model):
    "Weights large enough that boxes and pictures matter, of a seed with which masks are neither empty nor full."
    torch.manual_seed(5)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def sam():
    from transformers import SamConfig, SamModel

    return shaken(
        SamModel(
            SamConfig(
                vision_config=dict(
                    hidden_size=16,
                    output_channels=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=64,
                    patch_size=8,
                    mlp_dim=16,
                    window_size=4,
                    global_attn_indexes=[0],
                    num_pos_feats=8,
                ),
                prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4),
                mask_decoder_config=dict(
                    hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
                ),
            )
        )
    )


def sam2():
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    return shaken(
        Sam2Model(
            Sam2Config(
                vision_config=vision,
                prompt_encoder_config=dict(hidden_size=32, image_size=64, patch_size=16, mask_input_channels=4),
                mask_decoder_config=dict(
                    hidden_size=32, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
                ),
            )
        )
    )


def tall(id):  # (5, 60, 40): a size that is no square
    made = WORLD.sample(5, "subject")
    found = load_record(Pair(id, made.source[:, :60, :40].copy(), made.target[:, :60, :40].copy(), made.instruction))
    found.task, found.boxes = "subject", np.tile(np.float32([0.2, 0.3, 0.7, 0.8]), (5, 1))
    return found


@pytest.mark.parametrize("make", [sam, sam2])
def test_masks_have_the_size_of_the_record(make):
    records = [grounded("a"), tall("b"), grounded("c", boxes=None)]
    records[1].boxes[2] = np.nan
    for r in records:
        r.mask = None
    masks = SamSegmenter(make(), device="cpu").segment(records)
    assert [m.shape for m in masks[:2]] == [(5, 96, 96), (5, 60, 40)] and masks[0].dtype == bool
    assert not masks[1][2].any()
    assert isinstance(masks[2], BackendError) and str(masks[2]) == "empty mask"
    by_batch, segmenter = [], SamSegmenter(make().double(), device="cpu")  # in float32 another order moves some pixels
    for segmenter.batch_size in (4, 1):
        by_batch.append(segmenter.segment(records[:2]))
    assert all(np.array_equal(a, b) for a, b in zip(*by_batch)) and 0 < by_batch[0][0].mean() < 1
    SegmentStage(SamSegmenter(make(), device="cpu"), smallest=0.0, largest=1.0)(records)
    assert [r.alive for r in records] == [True, True, False] and records[2].verdicts[-1].reason == "empty mask"
    assert records[0].mask.shape == (5, 96, 96)


@pytest.mark.parametrize("make", [sam, sam2])
def test_masks_depend_on_box_and_frame(make):
    logits = []
    segmenter = SamSegmenter(make(), device="cpu")
    segmenter.model.register_forward_hook(lambda module, inputs, output: logits.append(output.pred_masks.clone()))
    for boxes, in_source in (
        (_mask_boxes(MADE.mask), False),
        (_mask_boxes(MADE.mask) * 0.5, False),
        (_mask_boxes(MADE.mask), True),
    ):
        segmenter.segment([grounded(boxes=boxes, in_source=in_source)])
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


def test_masks_as_sam_processor_makes_them():
    from transformers import SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    processor = SamProcessor(SamImageProcessorPil(size=dict(longest_edge=64), pad_size=dict(height=64, width=64)))
    ours, r, shown = SamSegmenter(sam(), device="cpu"), tall("a"), []
    ours.model.register_forward_pre_hook(lambda model, args, kwargs: shown.append(kwargs), with_kwargs=True)
    mask = ours.segment([r])[0]
    boxes = [[(box * (40, 60, 40, 60)).tolist()] for box in r.boxes]
    theirs = processor(images=list(r.edited), input_boxes=boxes, return_tensors="pt")
    inputs = dict(pixel_values=theirs["pixel_values"], input_boxes=theirs["input_boxes"].float())
    assert torch.allclose(shown[0]["pixel_values"], inputs["pixel_values"], atol=2e-2)
    assert torch.allclose(shown[0]["input_boxes"], inputs["input_boxes"], atol=1e-3)
    with torch.inference_mode():
        logits = ours.model(**inputs, multimask_output=False).pred_masks
    official = processor.post_process_masks(logits, theirs["original_sizes"], theirs["reshaped_input_sizes"])
    assert (mask == np.stack([m[0, 0].numpy() for m in official])).mean() > 0.99


def test_empty_masks_are_errors_but_for_backgrounds():
    model = sam()
    model.mask_decoder.register_forward_hook(lambda module, inputs, output: (output[0] * 0 - 1, *output[1:]))
    subject, background = grounded(), grounded(task="background", boxes=np.full((5, 4), np.nan, np.float32))
    masks = SamSegmenter(model, device="cpu").segment([subject, background])
    assert str(masks[0]) == "empty mask" and masks[1].shape == (5, 96, 96) and not masks[1].any()


def test_sam_from_a_folder(tmp_path):
    sam().save_pretrained(tmp_path / "sam")
    sam2().save_pretrained(tmp_path / "sam2")
    for name in ("sam", "sam2"):
        segmenter = SamSegmenter(tmp_path / name, device="cpu")
        found = segmenter.segment([grounded(task="background")])[0]
        assert segmenter.name.endswith(name) and found.shape == (5, 96, 96) and found.dtype == bool


# image editors


def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def kontext():
    from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<unk>"] + sorted(set(" ".join(EditorSynthesizer.prompts.values()).split()))
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = lambda: PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=77
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=2))
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    return FluxKontextPipeline(flow(), vae.eval(), clip.eval(), tokenizer(), t5.eval(), tokenizer(), transformer.eval())


def qwen_edit(kind="QwenImageEditPlusPipeline"):
    import diffusers
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    config = Qwen2_5_VLConfig.from_pretrained(asset("kiwi-edit-tiny/mllm"))
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=192,
        axes_dims_rope=(8, 4, 4),
    )
    return getattr(diffusers, kind)(
        flow(),
        vae.eval(),
        Qwen2_5_VLForConditionalGeneration(config).float().eval(),
        PROCESSOR.tokenizer,
        _qwen_processor(PROCESSOR),
        transformer.eval(),
    )


@pytest.fixture
def small(monkeypatch):
    "Qwen's pipelines enlarge each picture to a megapixel; not here."
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))


EDITORS = {
    "FluxKontextPipeline": (
        kontext,
        dict(height=16, width=16, _auto_resize=False, max_area=256, max_sequence_length=16),
    ),
    "QwenImageEditPlusPipeline": (qwen_edit, dict(height=32, width=32)),
    "QwenImageEditPipeline": (lambda: qwen_edit("QwenImageEditPipeline"), dict(height=32, width=32)),
}


@pytest.mark.parametrize("name", EDITORS)
def test_editor(name, small):
    make, options = EDITORS[name]
    pipe, calls, scale = make(), [], "true_cfg_scale" if name.startswith("Qwen") else "guidance_scale"
    pipe.set_progress_bar_config(disable=True)
    synthesizer = EditorSynthesizer(pipe, num_inference_steps=2, **{scale: 2.0}, **options)
    encode = pipe.encode_prompt

    def listen(*args, **kwargs):
        calls.append(kwargs["prompt"])
        return encode(*args, **kwargs)

    pipe.encode_prompt = listen
    records = [
        grounded("a"),
        grounded("b"),
        grounded("a", task="background", mask=~MADE.mask),
        grounded("a", mask=np.zeros_like(MADE.mask)),
    ]
    SynthesizeStage(synthesizer)(records)
    assert [r.alive for r in records] == [True, True, True, False] and records[3].verdicts[-1].reason == "empty mask"
    assert records[0].verdicts[-1].backend == name
    assert records[0].reference.shape == (options["height"], options["width"], 3)
    assert records[0].reference.dtype == np.uint8
    prompts = [prompt for prompt in calls if prompt.strip()]
    assert "the garden gnome, whole" in prompts[0] and prompts[2] == EditorSynthesizer.prompts["background"]
    assert (len(calls) == 6) == name.startswith("Qwen")  # Qwen is guided away from a blank
    assert np.array_equal(synthesizer.synthesize([grounded("a")])[0], records[0].reference)
    assert not np.array_equal(records[0].reference, records[1].reference)


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "QwenImageEditPlusPipeline"])
def test_editor_from_a_folder(name, small, tmp_path):
    make, options = EDITORS[name]
    pipe = make()
    pipe.save_pretrained(tmp_path)
    if name.startswith("Qwen"):  # as it is published
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(
            json.dumps(index | dict(processor=["transformers", "Qwen2VLProcessor"]))
        )
    loaded = EditorSynthesizer.from_pretrained(tmp_path, device="cpu", num_inference_steps=1, **options)
    assert type(loaded.pipe).__name__ == name
    ours, theirs = (
        editor.synthesize([grounded()])[0].astype(int)
        for editor in (loaded, EditorSynthesizer(pipe, num_inference_steps=1, **options))
    )
    assert abs(ours - theirs).max() <= 1  # weights lie elsewhere in memory, so that sums may round otherwise


def test_editor_sees_the_best_frame_at_full_size():
    class Pipe:
        config = {}

        def __call__(self, image, prompt, generator, **kwargs):
            self.seen, self.prompt, self.seed, self.kwargs = np.array(image), prompt, generator.initial_seed(), kwargs
            return type("Out", (), dict(images=[Image.new("RGB", (8, 8))]))

    from kiwi_edit.data.embedded import CutoutSynthesizer
    from kiwi_edit.quadruplets import LoadOptions

    big = lambda clip: clip.repeat(4, 1).repeat(4, 2)
    found = load_record(Pair("big", big(MADE.source), big(MADE.target), "Add a hat"), LoadOptions(side=64))
    found.task, found.subject, found.mask = "add", "A hat", MADE.mask
    pipe = Pipe()
    synthesizer = EditorSynthesizer(pipe)
    assert str(synthesizer.synthesize([found])[0]) == "rubbish: a picture of one colour"
    assert np.array_equal(pipe.seen, big(MADE.target)[CutoutSynthesizer().best_frame(found)])
    assert pipe.prompt.startswith("Show only the hat, whole") and pipe.seed == _seed_of("big") and not pipe.kwargs
    found.task, found.mask = "background", MADE.mask.copy()
    found.mask[3] = False
    synthesizer.synthesize([found])
    assert np.array_equal(pipe.seen, big(MADE.target)[3])


def test_seeds_and_words():
    # the start of sha256("a")
    assert _seed_of("a") == 0xCA978112CA1BBDCA >> 1 and len({_seed_of(str(i)) for i in range(1000)}) == 1000
    assert [_called(s) for s in ("red fox", "The red fox.", "object in the reference image", "")] == [
        "the red fox",
        "the red fox",
        "the main object",
        "the main object",
    ]


@pytest.fixture(scope="module")
def kiwi():
    from kiwi_edit.pipeline import KiwiEditPipeline

    pipe = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_own_model_as_synthesizer(kiwi):
    big = lambda clip: clip.repeat(3, 1).repeat(4, 2)  # 288x384: more than the model takes
    pair, prompts = Pair("big", big(MADE.source), big(MADE.target), MADE.instruction), []
    records = [load_record(pair) for _ in range(3)]
    for r, task, mask in zip(
        records, ("subject", "background", "subject"), (big(MADE.mask), ~big(MADE.mask), big(MADE.mask) & False)
    ):
        r.task, r.subject, r.mask = task, "garden gnome", mask
    encode = kiwi.encode_prompt
    kiwi.encode_prompt = lambda texts, *args: prompts.extend(texts) or encode(texts, *args)
    try:
        SynthesizeStage(KiwiSynthesizer(kiwi, num_inference_steps=2))(records)
    finally:
        kiwi.encode_prompt = encode
    assert [r.alive for r in records] == [True, True, False]
    assert prompts == ["Show only the garden gnome on a white canvas.", "Show the scene without any objects."]
    image = records[0].reference
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] * image.shape[1] <= kiwi.config.max_pixels
    assert not any(s % kiwi.size_multiple for s in image.shape[:2])
    again = KiwiSynthesizer(kiwi, num_inference_steps=2)
    assert np.array_equal(again.synthesize([records[0]])[0], image)
    other = load_record(replace(pair, id="other"))
    other.task, other.subject, other.mask = "subject", "garden gnome", records[0].mask
    assert not np.array_equal(again.synthesize([other])[0], image)


def test_own_model_isolates(kiwi):
    image = KiwiSynthesizer(kiwi).synthesize([grounded()])[0]
    canvas = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]))
    assert canvas > 230 and np.median(image[36:60, 36:60].min(axis=-1)) < canvas - 10


# embeddings


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            initializer_range=0.2,
        )
    )


def clip_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            projection_dim=24,
        )
    )


def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2
            ),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
            ),
            projection_dim=24,
        )
    )


PICTURES = [
    MADE.reference,
    WORLD.sample(6, "subject").reference,
    WORLD.sample(7, "background").reference[:50],
    MADE.reference.copy(),
    np.zeros((9, 300, 3), np.uint8),
]


@pytest.mark.parametrize("make, size", [(dinov2, 32), (clip_vision, 24), (clip, 24)])
def test_embeddings(make, size, tmp_path):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    make().save_pretrained(tmp_path / "model")
    model = make()
    embedder = ImageEmbedder(model, device="cpu")
    embedder.batch_size = 2
    vectors = embedder.embed(PICTURES)
    assert vectors.shape == (5, size) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(vectors[0], vectors[3], atol=1e-5) and vectors[0] @ vectors[1] < 0.99999
    assert ImageEmbedder(model, device="cpu").embed([]).shape[0] == 0
    official = dict(size=dict(shortest_edge=56), crop_size=dict(height=56, width=56))
    if make is dinov2:
        official |= dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    processor = (BitImageProcessorPil if make is dinov2 else CLIPImageProcessorPil)(**official)
    with torch.inference_mode():
        pixels = processor(Image.fromarray(PICTURES[0]), return_tensors="pt")["pixel_values"]
        wanted = (
            model(pixel_values=pixels).last_hidden_state[0, 0]
            if make is dinov2
            else model(pixel_values=pixels).image_embeds[0]
            if make is clip_vision
            else model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
        )
    assert np.allclose(vectors[0], wanted / wanted.norm(), atol=1e-5)
    if make is not clip:
        assert np.allclose(ImageEmbedder(tmp_path / "model", device="cpu").embed(PICTURES), vectors, atol=1e-5)


def test_duplicates_by_embedding():
    records = [grounded(id, reference=MADE.reference) for id in "ab"] + [grounded("c", reference=PICTURES[1])]
    deduplicate(records, ImageEmbedder(dinov2(), device="cpu"), similarity=0.9999)
    assert [r.alive for r in records] == [True, False, True] and records[1].verdicts[-1].reason == "duplicate of a"
    assert records[1].verdicts[-1].backend == "Dinov2Model"
