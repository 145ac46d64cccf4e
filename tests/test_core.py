from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from kiwi_edit import core
from kiwi_edit.core import (
    PRESETS,
    Settings,
    asset,
    InputError,
    InputTypeError,
    check_instruction,
    choose_device,
    choose_dtype,
    multiplies_bfloat16,
    preset,
    settings,
)


def ini(tmp_path, text):
    path = tmp_path / "my.ini"
    path.write_text(text, encoding="utf-8")
    return path


# presets


@pytest.mark.parametrize("name", PRESETS)
def test_parts_of_a_preset_agree(name):
    p = preset(name)
    t, v, g = p.transformer, p.vae, p.guidance
    assert p.name == name
    assert (
        t["in_channels"]
        == t["out_channels"] - (v["scale_factor_spatial"] ** 2 if name == "tiny" else 0)  # the matte's pixels
        == v["z_dim"]
        == g["in_channels"]
        == len(v["latents_mean"])
        == len(v["latents_std"])
    )
    assert g["dim"] == t["num_attention_heads"] * t["attention_head_dim"]
    assert g["hidden_size"] == p.mllm["text_config"]["hidden_size"] == p.mllm["vision_config"]["out_hidden_size"]
    assert tuple(g["patch_size"]) == tuple(t["patch_size"])
    assert p.height % p.size_multiple == p.width % p.size_multiple == 0
    assert p.height * p.width <= p.max_pixels
    assert p.num_frames % 4 == 1
    # the strides that the autoencoder states are those that it has
    halvings = len(v["dim_mult"]) - 1
    assert v["scale_factor_spatial"] == 2**halvings * v.get("patch_size", 1)
    assert v["scale_factor_temporal"] == 2 ** sum(v["temperal_downsample"])
    assert len(v["temperal_downsample"]) == halvings
    heads = p.mllm["text_config"]
    section = heads["rope_parameters"]["mrope_section"]
    assert 2 * sum(section) == heads["hidden_size"] // heads["num_attention_heads"]


def test_sizes_of_the_published_models():
    assert [PRESETS[n].size_multiple for n in ("tiny", "wan2.2-5b", "wan2.1-14b")] == [8, 32, 16]


def test_released_guidance_keeps_the_released_habits_and_tiny_does_not():
    for name in ("wan2.2-5b", "wan2.1-14b"):
        g = preset(name).guidance
        assert (g["query_read_out"], g["round_timestep"], g["round_pixels"], g["zero_init"]) == (
            "last_positions",
            True,
            True,
            True,
        )
    g = preset("tiny").guidance
    assert (g["query_read_out"], g["round_timestep"], g["round_pixels"], g["zero_init"]) == (
        "queries",
        False,
        False,
        False,
    )


def test_a_preset_is_a_copy():
    mine = preset("tiny")
    mine.transformer["num_layers"] = 1
    mine.vae["dim_mult"].append(9)
    assert preset("tiny").transformer["num_layers"] == 6
    assert 9 not in preset("tiny").vae["dim_mult"]
    assert preset(mine) == mine and preset(mine) is not mine
    with pytest.raises(FrozenInstanceError):
        mine.height = 8


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"`preset` has to be one of tiny, wan2.2-5b, wan2.1-14b but is 'Tiny'"):
        preset("Tiny")


def test_tokens_follow_from_the_sizes():
    p = preset("wan2.2-5b")
    assert p.num_tokens == 21 * 22 * 40
    assert replace(p, num_frames=1).num_tokens == 22 * 40


# settings


def test_defaults_without_a_file(monkeypatch):
    monkeypatch.setattr(core, "checkout", lambda: None)
    s = core._read_settings(environ={})
    assert s == Settings()
    assert s.checkpoint == "kiwi-edit-tiny"
    assert not s.data_dir.is_absolute() and s.cache_dir.is_absolute()


def test_the_checkout_file_is_read_and_equals_the_defaults_in_code():
    s = core._read_settings(environ={})
    top = core.checkout()
    assert (s.output_dir, s.data_dir) == (top / "outputs", top / "data")
    assert replace(s, output_dir=Path("outputs"), data_dir=Path("data")) == Settings()


def test_not_searched_for_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[kiwi-edit]\nseed = 99\n")
    monkeypatch.chdir(tmp_path)
    assert core._read_settings(environ={}).seed == 0


def test_file_then_environment(tmp_path, monkeypatch):
    path = ini(
        tmp_path,
        "[kiwi-edit]\npreset = wan2.1-14b\nseed = 7\ndemo_port = 8000\ndata_dir = ~/clips\noutput_dir = out\ncheckpoint =\n",
    )
    monkeypatch.chdir(tmp_path.parent)
    s = core._read_settings(
        environ={
            "KIWI_EDIT_SETTINGS": str(path),
            "KIWI_EDIT_SEED": "8",
            "KIWI_EDIT_CACHE_DIR": "cache",
            "KIWI_EDIT_DEVICE": "",
        }
    )
    assert (s.preset, s.seed, s.demo_port, s.device, s.checkpoint) == ("wan2.1-14b", 8, 8000, "auto", "")
    assert s.data_dir == Path.home() / "clips"
    assert s.output_dir == tmp_path.resolve() / "out"  # beside the file
    assert s.cache_dir == Path.cwd() / "cache"  # from where the command was given


def test_percent_signs_unicode_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "my.ini"
    path.write_bytes("\ufeff[kiwi-edit]\ncheckpoint = Wägen/50%\n".encode())
    assert core._read_settings(path, environ={}).checkpoint == "Wägen/50%"


@pytest.mark.parametrize(
    "text, message",
    [
        ("[kiwi-edit]\nsede = 1\n", "`sede` in .*my.ini is no setting; there are preset, checkpoint"),
        ("[kiwi-edit]\nsede =\n", "`sede` in .*my.ini is no setting"),
        ("[kiwi-edit]\nseed = 1.5\n", "`seed` in .*my.ini has to be a whole number but is '1.5'"),
        ("[kiwi-edit]\nseed = -1\n", "`seed` has to be 0 or more but is -1"),
        ("[kiwi-edit]\npreset = huge\n", "`preset` has to be one of .* but is 'huge'"),
        ("[kiwi-edit]\ndtype = int8\n", "`dtype` has to be one of .* but is 'int8'"),
        ("[kiwi-edit]\ndemo_port = 99999\n", "`demo_port` has to lie between 0 and 65535 but is 99999"),
        ("[kiwi]\nseed = 1\n", r"one section, \[kiwi-edit\], but has \[kiwi\]"),
        ("seed = 1\n", "is no settings file"),
        ("[kiwi-edit]\nseed = 1\nseed = 2\n", "is no settings file"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        core._read_settings(ini(tmp_path, text), environ={})


def test_a_file_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "my.ini"
    path.write_bytes("[kiwi-edit]\ndata_dir = données\n".encode("latin-1"))
    with pytest.raises(ValueError, match="my.ini` is no settings file"):
        core._read_settings(path, environ={})


def test_wrong_environment():
    with pytest.raises(ValueError, match=r"`devise` in the environment \(KIWI_EDIT_DEVISE\) is no setting"):
        core._read_settings(environ={"KIWI_EDIT_DEVISE": "cpu"})
    with pytest.raises(FileNotFoundError, match="no-such.ini"):
        core._read_settings(environ={"KIWI_EDIT_SETTINGS": "no-such.ini"})


def test_settings_are_read_once(monkeypatch):
    settings.cache_clear()
    try:
        assert settings() is settings()
        monkeypatch.setenv("KIWI_EDIT_SEED", "5")
        assert settings().seed == 0
        settings.cache_clear()
        assert settings().seed == 5
        monkeypatch.setenv("KIWI_EDIT_PRESET", "wan2.2-5b")
        settings.cache_clear()
        assert preset().name == "wan2.2-5b"
    finally:
        settings.cache_clear()


# device, number format


def test_devices():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device().type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    with pytest.raises(ValueError, match="`device` has to be one of auto, cpu, cuda, mps but is 'toaster'"):
        choose_device("toaster")
    with pytest.raises(ValueError, match="'cuda:99' is not: this machine has"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="'cpu:1' is not: this machine has 1 of that kind"):
        choose_device("cpu:1")


def test_dtypes():
    assert choose_dtype("auto", "cpu") == torch.float32
    assert choose_dtype("bfloat16", "cpu") == choose_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` has to be one of auto, float32, bfloat16, float16 but is 'half'"):
        choose_dtype("half")


# what is asked for


def test_an_instruction_is_text():
    assert check_instruction(" 把背景换成雪山\n") == "把背景换成雪山"
    for wrong in ("", " \n", "snow\0y", "snow\ud800y"):
        with pytest.raises(InputError, match="`prompt` has to"):
            check_instruction(wrong, "prompt")
    with pytest.raises(InputTypeError, match="`instruction` has to be a string but is a list"):
        check_instruction(["snow"])


# assets, start-up


def test_assets(tmp_path, monkeypatch):
    assert asset() == core.checkout() / "assets"
    package = tmp_path / "site-packages" / "kiwi_edit"
    (package / "assets" / "samples").mkdir(parents=True)
    (package / "assets" / "samples" / "clip.mp4").touch()
    monkeypatch.setattr(core, "_PACKAGE", package)
    assert core.checkout() is None
    assert asset("samples/clip.mp4") == package / "assets" / "samples" / "clip.mp4"
    with pytest.raises(FileNotFoundError, match=r"`asset` .* 'samples/clop.mp4'; there are: clip.mp4"):
        asset("samples/clop.mp4")
    with pytest.raises(FileNotFoundError, match="there are: samples"):
        asset("sample/clip.mp4")


def test_bfloat16_is_multiplied_where_there_are_circuits_for_it(monkeypatch):
    for known, answer in (
        ({}, False),
        (dict(avx2=True), False),
        (dict(avx512_bf16=True), True),
        (dict(amx_bf16=True, avx512_bf16=False), True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert multiplies_bfloat16("cpu") is answer
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert multiplies_bfloat16("cpu") is False  # an older torch does not say
