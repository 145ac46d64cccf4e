"Saving, pushing to a hub and loading from it: the real client against a small hub on this machine."

import base64
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig

import kiwi_edit.pipeline
from kiwi_edit.pipeline import KiwiEditPipeline, bundled_models, find_checkpoint

PROMPT = "Replace the red fox with the object in the reference."
PARTS = {"transformer", "vae", "scheduler", "mllm", "processor", "guidance"}
TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    "What the hub's client asks of a hub: repositories of one branch, every commit kept."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.log, self.blobs, self.commits, self.heads, self.rules = (
            f"http://127.0.0.1:{self.server_port}",
            [],
            {},
            {},
            {},
            {},
        )

    def commit(self, repo, files):
        sha = hashlib.sha1(json.dumps([repo, len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[sha], self.heads[repo] = files, sha
        return sha

    def add(self, repo, folder, **rule):
        "A repository with the files of a folder."
        self.rules[repo] = rule
        return self.commit(
            repo, {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        )

    def files(self, repo):
        return self.commits[self.heads[repo]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def do(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        hub.log.append((self.command, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.rules.get("down") or path.endswith(hub.rules.get("lost", "nothing")):
            return self.refuse(503)
        if token and token != TOKEN:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self.answer(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            if not token:
                return self.refuse(401, message="Invalid username or password.")
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            if repo.startswith("others/"):
                return self.refuse(403, message="You don't have the rights to create a model under this namespace")
            if repo in hub.heads:
                return self.answer(409, {"url": f"{hub.url}/{repo}", "error": "You already created this model repo"})
            hub.commit(repo, {".gitattributes": b""})
            return self.answer(body={"url": f"{hub.url}/{repo}", "name": repo})
        if path.startswith("/upload/"):
            if hub.rules.get("full"):
                return self.refuse(403)
            if hashlib.sha256(body).hexdigest() != path.rpartition("/")[2]:
                return self.refuse(400)
            hub.blobs[path.rpartition("/")[2]] = body
            return self.answer()
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(revision|tree|preupload|commit|resolve|info)/(.+))?", path
        )
        repo, what, rest = found.groups()
        if repo not in hub.heads or hub.rules.get(repo, {}).get("private") and not token:
            return self.refuse(401 if not token else 404, "RepoNotFound")
        if what == "info":
            objects = [
                dict(
                    oid=o["oid"],
                    size=o["size"],
                    **(
                        {}
                        if o["oid"] in hub.blobs
                        else {"actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}}
                    ),
                )
                for o in json.loads(body)["objects"]
            ]
            return self.answer(body={"transfer": "basic", "objects": objects})
        revision, _, name = (rest or "main").partition("/")
        sha = hub.heads[repo] if revision == "main" else revision
        if sha not in hub.commits:
            return self.refuse(404, "RevisionNotFound")
        files = hub.commits[sha]
        if what == "preupload":
            return self.answer(
                body={
                    "files": [
                        dict(
                            path=f["path"],
                            uploadMode="lfs" if f["path"].endswith(".safetensors") else "regular",
                            shouldIgnore=False,
                        )
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if what == "commit":
            files = dict(files)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = hub.commit(repo, files)
            return self.answer(body={"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})
        if what == "tree":
            return self.answer(
                body=[
                    dict(type="file", path=p, size=len(data), oid=hashlib.sha1(data).hexdigest())
                    for p, data in files.items()
                ]
            )
        if what == "resolve":
            if hub.rules.get(repo, {}).get("gated") and not token:
                return self.refuse(401, "GatedRepo", f"Access to model {repo} is restricted.")
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return self.answer(body=files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"', X_Repo_Commit=sha)
        self.answer(body=dict(id=repo, sha=sha, private=False, siblings=[dict(rfilename=p) for p in files]))

    do_GET = do_HEAD = do_POST = do_PUT = do


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def client(hub, tmp_path, monkeypatch):
    "The client's settings, which it reads from the environment when it is imported: this hub, an empty cache, no token."
    for name, value in dict(
        ENDPOINT=hub.url,
        HUGGINGFACE_CO_URL_TEMPLATE=hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_TOKEN_PATH=str(tmp_path / "token"),
        HF_HUB_DISABLE_XET=True,
        HF_HUB_OFFLINE=False,
    ).items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub.log.clear()


@pytest.fixture(scope="module")
def pipe():
    # trained: of a fresh model the parts that start at zero would not show in an edit
    return quiet(KiwiEditPipeline.from_pretrained("kiwi-edit-tiny"))


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save_pretrained(folder)
    return folder


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe):
    video = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    # weights of a file lie there as its header lets them, and sums round by how they lie
    pipe = quiet(copy.deepcopy(pipe))
    return pipe(
        PROMPT, video, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames


def listing(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refused(name, **kwargs):
    "The one line that a load is refused with."
    with pytest.raises(FileNotFoundError) as error:
        KiwiEditPipeline.from_pretrained(name, **kwargs)
    assert "\n" not in str(error.value) and str(name) in str(error.value)
    assert error.value.__suppress_context__ | (error.value.__context__ is None)
    return str(error.value)


# saving


def test_shards_and_what_else_lies_in_the_folder(pipe, saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "README.md").write_text("a card")
    (folder / "training").mkdir()
    (folder / "training/log.jsonl").write_text("{}")
    pipe.save_pretrained(folder, max_shard_size="5MB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    assert not (folder / "transformer/diffusion_pytorch_model.safetensors").exists()
    assert all(p.stat().st_size < 6e6 for p in folder.rglob("*.safetensors"))
    assert (folder / "README.md").read_text() == "a card" and (folder / "training/log.jsonl").exists()
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == {"model"} and not list(folder.rglob("*.bin"))
    assert torch.equal(edit(KiwiEditPipeline.from_pretrained(folder)), edit(pipe))
    pipe.save_pretrained(folder)
    assert {k: v for k, v in listing(folder).items() if k not in ("README.md", "training/log.jsonl")} == listing(saved)


def test_a_model_is_saved_over_the_folder_that_it_came_from(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    KiwiEditPipeline.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    before, after = listing(saved), listing(tmp_path / "model")
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name.endswith(".safetensors"))
    # no config says where the parts came from
    assert not [name for name, data in after.items() if str(tmp_path).encode() in data]


def test_an_error_while_saving_changes_nothing(pipe, saved, tmp_path):
    broken = copy.copy(pipe)
    broken.mllm = copy.deepcopy(pipe.mllm).to("meta")  # has no numbers to write
    shutil.copytree(saved, tmp_path / "old")
    for name in ("old", "fresh"):
        with pytest.raises(Exception):
            broken.save_pretrained(tmp_path / name)
    assert listing(tmp_path / "old") == listing(saved) and {p.name for p in tmp_path.iterdir()} - {"cache"} == {"old"}
    with pytest.raises(NotADirectoryError, match="`save_directory` has to be a folder but .*config.json' is a file"):
        pipe.save_pretrained(saved / "vae/config.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that can be killed is forked")
@pytest.mark.parametrize("where", ["processor", "vae", "model_index.json"])
def test_a_kill_while_saving(pipe, saved, tmp_path, monkeypatch, where):
    "While a part is written, while parts are moved, and just before the index is."
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "README.md").write_text("a card")

    def die_at(path, *_):
        if path.parent.name == ".new" and path.name == where:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, *_)

    child = os.fork()
    if not child:
        replace = Path.replace
        if where == "processor":
            pipe.processor.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        else:
            Path.replace = die_at
        pipe.save_pretrained(folder)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.setattr(kiwi_edit.pipeline, "asset", lambda name="": tmp_path / name)
    whole = where == "processor"  # the folder is the old model, or none: never a mixture
    assert bundled_models() == (["model"] if whole else [])
    if whole:
        assert find_checkpoint(folder) == folder
    else:
        assert "holds none" in refused(folder)
    pipe.save_pretrained(folder)
    assert listing(folder) == listing(saved) | {"README.md": b"a card"}


def test_lora_beside_the_weights_is_refused(pipe, hub, tmp_path):
    lora = copy.copy(pipe)
    lora.transformer = copy.deepcopy(pipe.transformer)
    lora.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for save in (
        lambda: lora.save_pretrained(tmp_path / "model"),
        lambda: lora.push_to_hub("somebody/lora", token=TOKEN),
    ):
        with pytest.raises(ValueError, match="`transformer` .* LoRA layers merged .* 12 .* blocks.0.attn1.to_q"):
            save()
    assert not (tmp_path / "model").exists() and "somebody/lora" not in hub.heads


# pushing


def test_push_and_load_back(pipe, hub, tmp_path):
    url = pipe.push_to_hub("kiwi", token=TOKEN, license="mit")
    files = hub.files("somebody/kiwi")
    assert str(url).startswith(f"{hub.url}/somebody/kiwi/commit/")
    assert {name.split("/")[0] for name in files} == PARTS | {"model_index.json", "README.md", ".gitattributes"}
    card = files["README.md"].decode()
    head, text = card.split("---\n")[1:]
    assert {"license: mit", "library_name: kiwi-edit", "pipeline_tag: video-to-video"} <= set(head.splitlines())
    assert 'from_pretrained("somebody/kiwi")' in text
    assert f"{pipe.transformer.config.num_layers} layers of width {pipe.guidance.config.dim}" in text
    assert f"{pipe.config.max_pixels:,} pixels" in text
    again = KiwiEditPipeline.from_pretrained("somebody/kiwi", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(edit(again), edit(pipe)) and not list((tmp_path / "cache").rglob("*.safetensors"))

    # again, in shards: one file of weights goes, its shards come; a card that somebody wrote stays
    hub.commit(
        "somebody/kiwi",
        files
        | {
            "README.md": b"---\ntags: [mine]\n---\nMy words.\n",
            "picture.png": b"png",
            "transformer/modeling.py": b"raise SystemExit",
        },
    )
    pipe.push_to_hub(
        "somebody/kiwi", token=TOKEN, max_shard_size="5MB", license="apache-2.0", commit_message="In shards"
    )
    files = hub.files("somebody/kiwi")
    assert "transformer/diffusion_pytorch_model.safetensors" not in files
    assert "transformer/diffusion_pytorch_model-00001-of-00006.safetensors" in files
    assert "picture.png" in files and "My words." in files["README.md"].decode()
    assert "license: apache-2.0" in files["README.md"].decode()
    assert torch.equal(edit(KiwiEditPipeline.from_pretrained("somebody/kiwi")), edit(pipe))


def test_a_card_without_a_licence_names_none(pipe, hub):
    pipe.push_to_hub("somebody/plain", token=TOKEN)
    assert "license" not in hub.files("somebody/plain")["README.md"].decode()


@pytest.mark.parametrize(
    "repo, token, reason",
    [
        ("somebody/x", "hf_wrong", "the hub does not know the `token`"),
        ("somebody/x", None, "the hub does not know the `token`, or wants one"),
        ("others/x", TOKEN, "the `token` gives no right to do this"),
        ("not a name", TOKEN, "epo id must use alphanumeric chars"),
    ],
)
def test_pushes_that_are_refused(pipe, hub, repo, token, reason):
    with pytest.raises(OSError, match=f"`repo_id` .* can be written to but '{repo}'") as error:
        pipe.push_to_hub(repo, token=token)
    assert reason in str(error.value) and "\n" not in str(error.value) and repo not in hub.heads


def test_an_upload_that_is_refused_commits_nothing(pipe, hub, monkeypatch):
    monkeypatch.setattr(hub, "blobs", {})
    monkeypatch.setitem(hub.rules, "full", True)
    with pytest.raises(OSError, match="'somebody/full' cannot: the `token` gives no right to do this.$"):
        pipe.push_to_hub("somebody/full", token=TOKEN)
    assert set(hub.files("somebody/full")) == {".gitattributes"}


# loading


def test_what_is_fetched(hub, saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "repo")
    for name in ("evil.py", "transformer/evil.py", "vae/weights.bin", "mllm/weights.pt", "picture.png"):
        (folder / name).write_bytes(b"raise SystemExit")
    sha = hub.add("somebody/code", folder)
    assert edit(KiwiEditPipeline.from_pretrained("somebody/code")).isfinite().all()
    asked = {Path(path).suffix for _, path in hub.log if "/resolve/" in path}
    assert asked <= {".json", ".safetensors", ".txt", ".jinja"} and not list((tmp_path / "cache").rglob("*evil*"))
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}
    hub.log.clear()
    KiwiEditPipeline.from_pretrained("somebody/code")  # a second time: is it still the same commit?
    assert not [path for method, path in hub.log if method == "GET" and "/resolve/" in path]
    changed = shutil.copytree(saved, tmp_path / "changed")
    index = json.loads((changed / "model_index.json").read_text())
    (changed / "model_index.json").write_text(json.dumps(index | {"default_steps": 7}))
    hub.add("somebody/code", changed)
    assert KiwiEditPipeline.from_pretrained("somebody/code").config.default_steps == 7
    assert (
        KiwiEditPipeline.from_pretrained("somebody/code", revision=sha).config.default_steps == index["default_steps"]
    )
    assert "has no `revision` 'nowhere'" in refused("somebody/code", revision="nowhere")
    hub.log.clear()
    KiwiEditPipeline.from_pretrained("somebody/code", force_download=True)
    assert [path for method, path in hub.log if method == "GET" and path.endswith(".safetensors")]
    monkeypatch.setitem(hub.rules, "lost", ".safetensors")
    assert "fails with status 503" in refused("somebody/code", force_download=True)


def test_without_network(hub, saved, tmp_path, monkeypatch):
    hub.add("somebody/far", saved)
    offline = (
        "is not in the cache, or not all of it, and `local_files_only` or HF_HUB_OFFLINE keeps it from being fetched"
    )
    assert offline in refused("somebody/far", local_files_only=True)
    assert not hub.log
    KiwiEditPipeline.from_pretrained("somebody/far")
    hub.log.clear()
    KiwiEditPipeline.from_pretrained("somebody/far", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    KiwiEditPipeline.from_pretrained("somebody/far")
    assert offline in refused("somebody/else") and not hub.log
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.rules["down"] = True
    KiwiEditPipeline.from_pretrained("somebody/far")
    assert "fails with status 503" in refused("somebody/else")
    hub.rules.pop("down")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    KiwiEditPipeline.from_pretrained("somebody/far")
    assert "and the hub at http://127.0.0.1:9 cannot be reached" in refused("somebody/else")
    snapshot = next((tmp_path / "cache").rglob("vae/config.json"))
    snapshot.unlink()
    assert "not all of it" in refused("somebody/far", local_files_only=True)
    assert "not all of it" in refused("somebody/far")


def test_offline_by_the_environment(hub, saved, monkeypatch):
    hub.add("somebody/far", saved)
    there, asked = find_checkpoint("somebody/far"), len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the client reads it from the environment
    assert find_checkpoint("somebody/far") == there
    assert asked and len(hub.log) == asked


def test_repositories_that_are_refused(hub, saved, tmp_path):
    hub.add("somebody/gated", saved, gated=True)
    hub.add("somebody/private", saved, private=True)
    assert "the hub has no such repository" in refused("somebody/missing")
    assert "wants the `token`" in refused("somebody/private")
    assert (
        f"it is gated: accept its licence at {hub.url}/somebody/gated, then log in with `hf auth login` or give `token`"
        in refused("somebody/gated")
    )
    assert "the hub does not know the `token`" in refused("somebody/gated", token="hf_wrong")
    for name in ("somebody/gated", "somebody/private"):
        assert find_checkpoint(name, token=TOKEN).is_dir()
    other = tmp_path / "other"
    (other / "unet").mkdir(parents=True)
    (other / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"much")
    hub.add("somebody/bert", other)
    assert "has to be a model folder with a model_index.json but 'somebody/bert' holds none" in refused("somebody/bert")
    (other / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    hub.add("somebody/other", other)
    hub.log.clear()
    assert (
        "has to be a Kiwi-Edit model but the model_index.json of 'somebody/other' is that of 'StableDiffusionPipeline'"
        in refused("somebody/other")
    )
    assert not [path for _, path in hub.log if path.endswith(".safetensors")]
    hub.add("somebody/half", shutil.copytree(saved, tmp_path / "half", ignore=shutil.ignore_patterns("guidance")))
    assert "of 'somebody/half' guidance/ is missing" in refused("somebody/half")


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae/ is missing"),
        (
            lambda f: (f / "guidance/diffusion_pytorch_model.safetensors").unlink(),
            "the weights of guidance/ are missing",
        ),
        (
            lambda f: (f / "transformer/diffusion_pytorch_model-00002-of-00006.safetensors").unlink(),
            "transformer/diffusion_pytorch_model-00002-of-00006.safetensors is missing",
        ),
        (
            lambda f: [
                (f / "transformer" / name).unlink()
                for name in (
                    "diffusion_pytorch_model-00006-of-00006.safetensors",
                    "diffusion_pytorch_model.safetensors.index.json",
                )
            ],
            "transformer/diffusion_pytorch_model-00006-of-00006.safetensors is missing",
        ),
        (
            lambda f: os.truncate(f / "mllm/model-00001-of-00003.safetensors", 4_000_000),
            "mllm/model-00001-of-00003.safetensors is cut off or damaged",
        ),
        (
            lambda f: (f / "guidance/diffusion_pytorch_model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "is cut off or damaged",
        ),
        (
            lambda f: os.truncate(f / "mllm/model.safetensors.index.json", 100),
            "mllm/model.safetensors.index.json is cut off or damaged",
        ),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "the config of scheduler/ is missing"),
        (
            lambda f: (f / "vae/weights.safetensors.incomplete").touch(),
            "vae/weights.safetensors.incomplete is half of a download",
        ),
        (lambda f: os.truncate(f / "model_index.json", 100), "is no json object; it may have been cut off"),
        (lambda f: (f / "model_index.json").write_text("null"), "is no json object"),
        (lambda f: (f / "model_index.json").unlink(), "holds none"),
    ],
)
def test_folders_that_are_not_whole(shards, tmp_path, harm, reason):
    folder = shutil.copytree(shards, tmp_path / "model")
    assert find_checkpoint(folder) == folder
    harm(folder)
    assert reason in refused(folder)


@pytest.fixture(scope="module")
def shards(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "model"
    pipe.save_pretrained(folder, "5MB")
    return folder
