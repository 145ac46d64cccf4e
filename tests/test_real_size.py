"""The script that tries the published size, on small ones."""

import json
import os
import sys
import tempfile
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from kiwi_edit.core import InputError, asset, preset

sys.path.insert(0, str(asset("benchmarks")))
import real_size  # noqa: E402


@pytest.fixture
def here(monkeypatch, tmp_path):
    "What the script runs in processes of their own runs in this one; the folder for its models."
    monkeypatch.setattr(real_size, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(real_size, "CLIP", (5, 64, 64))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def released():
    "Sizes of the published shape with thin layers."
    sizes = preset("wan2.2-5b")
    sizes.transformer.update(num_layers=2, num_attention_heads=4, ffn_dim=1024, text_dim=64)
    small = dict(num_hidden_layers=2, vocab_size=400, hidden_size=512, num_attention_heads=4, intermediate_size=1024)
    sizes.mllm["text_config"].update(small)
    sizes.mllm["vision_config"].update(depth=1, out_hidden_size=512)
    sizes.guidance.update(dim=512, hidden_size=512, num_ref_queries=64, max_object_token=64)
    sizes.vae.update(base_dim=8, decoder_base_dim=8)
    return sizes


def test_command_tries_a_preset_and_removes_its_folder(here, tmp_path, monkeypatch):
    given = ["--preset", "tiny", "--out", str(tmp_path / "out.json"), "--cases"]
    real_size.main([*given, "kit", "offload", "float8"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["cases"]) == ["kit", "offload", "float8"] and not list(here.iterdir())
    for numbers in found["cases"].values():
        assert numbers["shape"] == [1, 5, 64, 64, 3] and numbers["varies"] > 0
        for phase in ("write", "begin", "load", "edit"):
            assert numbers[phase]["seconds"] > 0 and 0 < numbers[phase]["bytes"] < numbers[phase]["resident"]
    kit, layers, eight = found["cases"].values()
    assert kit["said_bytes"] > layers["said_bytes"] and kit["said_bytes"] > eight["said_bytes"]
    assert abs(layers["varies"] / kit["varies"] - 1) < 0.01
    # numbers of a second run go beside those of the first
    monkeypatch.setattr(real_size, "try_size", lambda *_: found | dict(cases=dict(official=dict(failed="why"))))
    real_size.main([*given, "official"])
    assert list(json.loads((tmp_path / "out.json").read_text())["cases"]) == ["kit", "offload", "float8", "official"]


def test_released_layout_is_written_file_by_file(here, monkeypatch):
    monkeypatch.setattr(real_size, "SHARD", 2 * 10**6)
    files = []

    def load_and_edit(case, folder, clip):
        files.extend(sorted(folder.rglob("*.safetensors")))
        for file in files:
            with safe_open(file, "pt") as opened:
                assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())
        return plain(case, folder, clip)

    plain = real_size.load_and_edit
    monkeypatch.setattr(real_size, "load_and_edit", load_and_edit)
    found = real_size.try_size(released(), ["official"], (5, 64, 64))["cases"]["official"]
    assert found["shape"] == [1, 5, 64, 64, 3] and not list(here.iterdir())
    assert len([file for file in files if file.parent.name == "transformer"]) > 2
    assert len([file for file in files if file.parent.name == "vae"]) == 1


def test_child_that_dies_or_refuses_is_told():
    assert real_size.in_child(os._exit, 9) == dict(failed="its process ended with 9")
    assert real_size.in_child(int, "x")["failed"].startswith("ValueError: invalid literal")


def test_too_small_a_disk_is_refused_before_anything_is_written(here, monkeypatch):
    said = SimpleNamespace(weights=dict(transformer=5 * 10**7))
    monkeypatch.setattr(real_size, "read_cells", lambda *_, **__: SimpleNamespace(edit_cost=lambda *_: said))
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match="`TMPDIR` has to have 0.1 GB free but .* has 0.0 GB"):
        real_size.try_size(preset("tiny"), ["kit"])
    assert not list(here.iterdir())
