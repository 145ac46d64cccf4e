"""Released layouts in and out: round trips, what is refused and how, files that are damaged, and nothing that unpickles."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from kiwi_edit.weights import checkpoints
from kiwi_edit.weights.checkpoints import (
    convert,
    describe_weights,
    load_any,
    load_trainer_checkpoint,
    _load_transformer,
    _native_wan_name,
    _open_weights,
)
from kiwi_edit.core import PRESETS, asset
from kiwi_edit.latents import decode_latents, in_tiles, latent_statistics
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.world import EVAL_SEED, World

GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden"))
RELEASED, MLLM = GOLDEN / "wan22/diffusers", GOLDEN / "wan22/base/Qwen2.5-VL-tiny"
FACTS = {
    family: json.loads((GOLDEN / family / "cases/cases.json").read_text(encoding="utf-8"))
    for family in ("wan22", "wan21")
}


def bases(family="wan22", **changes):
    "What a trainer checkpoint of the golden set needs beside itself."
    base, model = GOLDEN / family / "base", FACTS[family]["model"]
    known = dict(
        vae=base / "Wan_VAE.safetensors",
        mllm=MLLM,
        transformer_config=dict(num_attention_heads=model["heads"]),
        max_object_token=model["max_object_token"],
        vae_config=json.loads((base / "latents_mean_std.json").read_text()),
    )
    if family == "wan21":
        known["transformer"] = base / "Wan_DiT.safetensors"
    return known | changes


def edit(pipe, family="wan22", name="video", steps=2):
    "Pixels of a short edit."
    case, facts = load_file(GOLDEN / family / f"cases/{name}.safetensors"), FACTS[family]["cases"][name]
    references = [Image.fromarray(case[key].numpy()) for key in sorted(case) if key.startswith("ref_image")]
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        facts["prompt"],
        case["src_frames"].numpy(),
        references or None,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]


@cache
def original():
    return edit(KiwiEditPipeline.from_pretrained(RELEASED), name="ref")


def weights_of(folder):
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(Path(folder).rglob("*.safetensors"))}


# places


def test_parts_of_a_released_model_are_read_to_the_devices_that_are_named():
    pipe = KiwiEditPipeline.from_pretrained(
        RELEASED, device_map=dict(transformer="meta", guidance=torch.device("meta"))
    )
    where = {part: {p.device.type for p in getattr(pipe, part).parameters()} for part in ("mllm", "vae")}
    assert where == dict(mllm={"cpu"}, vae={"cpu"})
    for part in (pipe.transformer, pipe.guidance):
        assert {x.device.type for x in (*part.parameters(), *part.buffers())} == {"meta"}
    assert np.array_equal(edit(KiwiEditPipeline.from_pretrained(RELEASED, device_map="cpu"), name="ref"), original())


@pytest.mark.parametrize("device_map", [dict(denoiser="cpu"), "gpu", dict(vae="cuda:99")])
def test_places_that_are_none_are_refused(device_map):
    with pytest.raises(ValueError, match="`device") as caught:
        KiwiEditPipeline.from_pretrained(RELEASED, device_map=device_map)
    assert "\n" not in str(caught.value)


# round trips


@pytest.mark.parametrize(
    "route",
    [
        ("kit", "official"),
        ("trainer", "official"),
        ("kit", "trainer", "kit"),
        ("trainer", "kit", "trainer", "official"),
    ],
    ids="-".join,
)
def test_the_golden_model_goes_through_every_layout(tmp_path, route):
    source = RELEASED
    for number, to in enumerate(route):
        source = convert(source, tmp_path / f"{number}-{to}", to)
        assert np.array_equal(edit(load_any(source), name="ref"), original())
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left
    if route[-1] == "official":
        assert {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and p.suffix == ".json"} >= {
            "model_index.json",
            "mllm_encoder/config.json",
            "processor/qwen_config.json",
            "ref_embedder/config.json",
        }
        ours, theirs = weights_of(source), weights_of(RELEASED)
        for folder in ("transformer", "vae", "source_embedder", "ref_embedder"):
            name = f"{folder}/diffusion_pytorch_model.safetensors"
            assert ours[name].keys() == theirs[name].keys()
            assert all(torch.equal(ours[name][key], value) for key, value in theirs[name].items())
        flat = lambda weights: {
            key: value
            for name, tensors in weights.items()
            if name.startswith("mllm_encoder")
            for key, value in tensors.items()
        }
        assert flat(ours).keys() == flat(theirs).keys()
        assert all(torch.equal(flat(ours)[key], value) for key, value in flat(theirs).items())
        for name in (
            "model_index.json",
            "mllm_encoder/config.json",
            "ref_embedder/config.json",
            "source_embedder/config.json",
            "vae/config.json",
        ):
            here, there = (json.loads((root / name).read_text()) for root in (source, RELEASED))
            assert {key: here.get(key) for key in there if not key.startswith("_")} == {
                key: value for key, value in there.items() if not key.startswith("_")
            }, name


def test_tiny_goes_to_the_trainer_and_back(tmp_path):
    sample = World(split="eval").sample(EVAL_SEED, "subject")

    def run(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            sample.instruction,
            sample.source,
            Image.fromarray(sample.reference),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames[0]

    there = convert("kiwi-edit-tiny", tmp_path / "trainer", "trainer")
    back = convert(there, tmp_path / "kit", "kit")
    before = run(KiwiEditPipeline.from_pretrained("kiwi-edit-tiny"))
    assert np.array_equal(run(load_any(there)), before)
    assert np.array_equal(run(KiwiEditPipeline.from_pretrained(back)), before)
    shipped, returned = weights_of(asset("kiwi-edit-tiny")), weights_of(back)
    assert shipped.keys() == returned.keys()
    assert all(
        torch.equal(returned[name][key], value) for name, tensors in shipped.items() for key, value in tensors.items()
    )
    with pytest.raises(ValueError, match="its autoencoder is one of the two native ones"):
        convert("kiwi-edit-tiny", tmp_path / "official", "official")
    assert not (tmp_path / "official").exists() and not list(tmp_path.glob(".*"))


def test_lora_merged_and_beside_the_weights_edit_alike(tmp_path):
    step = GOLDEN / "wan21/trainer/step-1.safetensors"
    merged, apart = (load_trainer_checkpoint(step, merge=merge, **bases("wan21")) for merge in (True, False))
    assert not any("lora_" in name for name, _ in merged.transformer.named_parameters())
    assert any("lora_" in name for name, _ in apart.mllm.named_parameters())
    one, two = edit(merged, "wan21").astype(int), edit(apart, "wan21").astype(int)
    assert np.abs(one - two).max() <= 1
    kit = convert(step, tmp_path / "kit", "kit", **bases("wan21"))
    assert np.array_equal(edit(load_any(kit), "wan21"), edit(merged, "wan21"))


@pytest.mark.parametrize("family", FACTS)
def test_every_spelling_of_a_trainers_names_is_read(tmp_path, family):
    step, plain = GOLDEN / family / "trainer/step-1.safetensors", None
    variants = json.loads((GOLDEN / family / "trainer/key_variants.json").read_text(encoding="utf-8"))
    tensors = load_file(step)
    for spelling in (
        variants
        if isinstance(variants, list)
        else [value for value in variants.values() if isinstance(value, (dict, list))]
    ):
        names = dict(zip(tensors, spelling)) if isinstance(spelling, list) else spelling
        if set(names) != set(tensors):
            continue
        save_file({names[key]: value for key, value in tensors.items()}, tmp_path / "step-1.safetensors")
        pipe = load_trainer_checkpoint(tmp_path / "step-1.safetensors", **bases(family))
        state = {part: getattr(pipe, part).state_dict() for part in ("transformer", "mllm", "guidance")}
        plain = plain or {
            part: getattr(load_trainer_checkpoint(step, **bases(family)), part).state_dict() for part in state
        }
        assert all(torch.equal(state[part][key], value) for part in plain for key, value in plain[part].items())
    respelled = {key.replace("connetor", "connector"): value for key, value in tensors.items()}
    save_file(respelled, tmp_path / "step-2.safetensors")
    load_trainer_checkpoint(tmp_path / "step-2.safetensors", **bases(family))


def test_where_reference_tokens_go_is_recorded_or_given(tmp_path):
    step = GOLDEN / "wan22/trainer/step-1.safetensors"
    assert not load_trainer_checkpoint(step, **bases()).guidance.config.ref_pad_first
    assert load_trainer_checkpoint(step, **bases(ref_pad_first=True)).guidance.config.ref_pad_first
    shutil.copy(step, tmp_path / "kiwi_pad_first.safetensors")
    assert load_trainer_checkpoint(tmp_path / "kiwi_pad_first.safetensors", **bases()).guidance.config.ref_pad_first
    there = convert(step, tmp_path / "kit", "trainer", **bases(ref_pad_first=True))
    assert load_any(there).guidance.config.ref_pad_first


def test_shards_and_number_formats(tmp_path):
    small = convert(RELEASED, tmp_path / "small", "kit", torch.bfloat16, max_shard_size="100KB")
    assert len(list((small / "transformer").glob("*.safetensors"))) > 1
    assert {value.dtype for value in load_file(small / "guidance/diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }
    again = convert(small, tmp_path / "again", "official", torch.float32, max_shard_size="100KB")
    exact, rounded = (
        KiwiEditPipeline.from_pretrained(RELEASED).transformer.state_dict(),
        load_any(again).transformer.state_dict(),
    )
    kept = [key for key, value in exact.items() if torch.equal(rounded[key], value)]  # what diffusers keeps in float32
    assert all(any(part in key for part in ("time_embedder", "scale_shift_table", "norm")) for key in kept)
    assert len(kept) < len(exact) / 2
    assert all(torch.equal(rounded[key], value.bfloat16().float()) for key, value in exact.items() if key not in kept)


def test_both_schedules_have_their_layout():
    assert KiwiEditPipeline.from_pretrained(RELEASED).config.schedule == "diffusers"
    assert load_trainer_checkpoint(GOLDEN / "wan22/trainer/step-1.safetensors", **bases()).config.schedule == "native"
    native, other = (
        KiwiEditPipeline.from_pretrained(RELEASED, schedule=schedule) for schedule in ("native", "diffusers")
    )
    assert not np.array_equal(edit(native), edit(other))


def test_a_repository_without_reference_embedder_takes_instructions_alone(tmp_path):
    shutil.copytree(RELEASED, tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain/ref_embedder")
    index = json.loads((tmp_path / "plain/model_index.json").read_text())
    index.pop("ref_embedder")
    (tmp_path / "plain/model_index.json").write_text(json.dumps(index))
    pipe = KiwiEditPipeline.from_pretrained(tmp_path / "plain")
    assert np.array_equal(edit(pipe), edit(KiwiEditPipeline.from_pretrained(RELEASED)))
    with pytest.raises(ValueError, match="`reference` has to be None for this model"):
        edit(pipe, name="ref")
    again = convert(tmp_path / "plain", tmp_path / "kit", "kit")
    assert not load_any(again).guidance.config.takes_reference


# what is refused


def test_a_destination_that_is_taken_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="`overwrite` replaces it"):
        convert(RELEASED, tmp_path / "mine", "kit")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    convert(RELEASED, tmp_path / "mine", "kit", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="`destination` has to be a folder"):
        convert(RELEASED, tmp_path / "file", "kit", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "mine/notes.txt").exists()
    with pytest.raises(ValueError, match="`to` has to be one of kit, official, trainer but is 'onnx'"):
        convert(RELEASED, tmp_path / "x", "onnx")


def test_an_error_while_writing_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    convert(RELEASED, tmp_path / "model", "kit")
    before = weights_of(tmp_path / "model")

    def fail(pipe, folder, size):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(checkpoints._WRITERS, "trainer", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(RELEASED, tmp_path / "model", "trainer", overwrite=True)
    assert weights_of(tmp_path / "model").keys() == before.keys() and [p.name for p in tmp_path.iterdir()] == ["model"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def test_nothing_unpickles(tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    torch.save({"weight": Harmful()}, tmp_path / "Wan_VAE.pth")
    with pytest.raises(ValueError, match="not loaded because that may run code"):
        _open_weights(tmp_path / "Wan_VAE.pth")
    with pytest.raises(ValueError, match="not loaded because that may run code"):
        load_trainer_checkpoint(GOLDEN / "wan22/trainer/step-1.safetensors", **bases(vae=tmp_path / "Wan_VAE.pth"))
    assert not (tmp_path / "harm").exists()
    # the same weights as tensors are fine
    torch.save(load_file(GOLDEN / "wan22/base/Wan_VAE.safetensors"), tmp_path / "good_VAE.pth")
    pipe = load_trainer_checkpoint(GOLDEN / "wan22/trainer/step-1.safetensors", **bases(vae=tmp_path / "good_VAE.pth"))
    assert np.array_equal(
        edit(pipe), edit(load_trainer_checkpoint(GOLDEN / "wan22/trainer/step-1.safetensors", **bases()))
    )


def test_no_code_of_a_repository_runs(tmp_path, monkeypatch):
    shutil.copytree(RELEASED, tmp_path / "repo")
    for place in (".", "mllm_encoder", "vae", "ref_embedder"):
        for name in ("pipeline_kiwi_edit", "mllm_encoder", "wan_video_vae", "conditional_embedder"):
            (tmp_path / "repo" / place / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'harm')!r})")
    KiwiEditPipeline.from_pretrained(tmp_path / "repo")
    assert not (tmp_path / "harm").exists()


# damage: one clear error each


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first_matrix(tensors):
    return next(key for key, value in tensors.items() if value.ndim >= 2)


def wrong_shape(tensors):
    tensors[key] = tensors[key := first_matrix(tensors)][:-1].clone()


def extra_key(tensors):
    tensors["surprise.weight"] = torch.zeros(3)


def not_a_number(tensors):
    tensors[key].view(-1)[0] = float("nan") if (key := first_matrix(tensors)) else 0


def integers(tensors):
    tensors[key] = (tensors[key := first_matrix(tensors)] * 0).int()


def missing_key(tensors):
    tensors.pop(first_matrix(tensors))


def cut(file):
    file.write_bytes(file.read_bytes()[:2000])


def rubbish(file):
    file.write_bytes(b"\0" * 64)


DAMAGE = {
    "truncated": (cut, "cannot be read|not a whole|damaged|incomplete|invalid|truncated|too large|not covered"),
    "rubbish": (rubbish, "cannot be read|invalid|header|whole"),
    "wrong shape": (wrong_shape, r"has to|shape"),
    "extra key": (extra_key, "surprise.weight"),
    "NaN": (not_a_number, "finite|NaN"),
    "integers": (integers, "float|I32|int"),
    "missing key": (missing_key, "missing"),
}
PLACES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "qwen": "mllm_encoder/model-00001-of-00002.safetensors",
    "queries": "mllm_encoder/diffusion_pytorch_model.safetensors",
    "embedder": "ref_embedder/diffusion_pytorch_model.safetensors",
}


def harm(file, damage):
    if damage in (cut, rubbish):
        damage(file)
    else:
        rewrite(file, damage)


def one_clear_error(caught):
    text = str(caught.value)
    assert isinstance(caught.value, (ValueError, FileNotFoundError, OSError)) and text.count("\n") == 0, text
    assert 20 < len(text) < 2500, text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_release_is_named(tmp_path, place, kind):
    shutil.copytree(RELEASED, tmp_path / "repo")
    damage, words = DAMAGE[kind]
    file = tmp_path / "repo" / PLACES[place]
    if damage not in (cut, rubbish) and not any(value.ndim >= 2 for value in load_file(file).values()):
        pytest.skip("this part has no matrix")
    harm(file, damage)
    with pytest.raises(Exception, match=words) as caught:
        KiwiEditPipeline.from_pretrained(tmp_path / "repo")
    one_clear_error(caught)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_trainer_checkpoint_is_named(tmp_path, kind):
    file = tmp_path / "step-1.safetensors"
    shutil.copy(GOLDEN / "wan22/trainer/step-1.safetensors", file)
    damage, words = DAMAGE[kind]
    harm(file, damage)
    with pytest.raises(Exception, match=words) as caught:
        load_trainer_checkpoint(file, **bases())
    one_clear_error(caught)


def test_a_model_of_the_kit_without_one_tensor_is_named(tmp_path):
    shutil.copytree(asset("kiwi-edit-tiny"), tmp_path / "tiny")
    rewrite(
        tmp_path / "tiny/guidance/diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("connector.0.bias")
    )
    with pytest.raises(ValueError, match=r"1 are missing \(connector\.0\.bias\)") as caught:
        KiwiEditPipeline.from_pretrained(tmp_path / "tiny")
    one_clear_error(caught)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "mllm_encoder/config.json",
        "processor/qwen_config.json",
        "mllm_encoder/model.safetensors.index.json",
    ],
)
def test_wrong_json_is_named(tmp_path, name):
    for number, text in enumerate(("{not json", "[1, 2]", "{}")):
        shutil.copytree(RELEASED, tmp_path / str(number))
        (tmp_path / str(number) / name).write_text(text)
        with pytest.raises(Exception) as caught:
            KiwiEditPipeline.from_pretrained(tmp_path / str(number))
        one_clear_error(caught)


def test_missing_files_are_named(tmp_path):
    for number, name in enumerate(
        (
            "mllm_encoder/model-00002-of-00002.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "processor/tokenizer.json",
            "scheduler/scheduler_config.json",
        )
    ):
        shutil.copytree(RELEASED, tmp_path / str(number))
        for file in [
            tmp_path / str(number) / name,
            *((tmp_path / str(number) / "processor").glob("vocab.json") if "tokenizer" in name else ()),
        ]:
            file.unlink()
        with pytest.raises(Exception) as caught:
            KiwiEditPipeline.from_pretrained(tmp_path / str(number))
        one_clear_error(caught)


def test_bases_that_are_missing_are_named(tmp_path):
    step = GOLDEN / "wan22/trainer/step-1.safetensors"
    for part in ("vae", "mllm"):
        with pytest.raises(ValueError, match=f"`{part}` has to name the base model"):
            load_trainer_checkpoint(step, **bases(**{part: None}))
        with pytest.raises(FileNotFoundError, match=f"`{part}` has to be a"):
            load_trainer_checkpoint(step, **bases(**{part: tmp_path / "nowhere"}))
    with pytest.raises(ValueError, match="`transformer` has to name the base model"):
        load_trainer_checkpoint(GOLDEN / "wan21/trainer/step-1.safetensors", **bases("wan21", transformer=None))
    with pytest.raises(FileNotFoundError):
        load_trainer_checkpoint(tmp_path / "step-9.safetensors", **bases())


# ways to need less memory, all of them diffusers' own


def test_layers_in_eight_bits_edit_roughly_alike():
    pipe = KiwiEditPipeline.from_pretrained(RELEASED)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert 0 < np.abs(edit(pipe, name="ref").astype(float) - original()).mean() < 64


def test_group_offload_changes_a_level_at_most():
    pipe = KiwiEditPipeline.from_pretrained(RELEASED)
    for part in (pipe.transformer, pipe.vae):
        part.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    # layers with a hook run as they are, which rounds otherwise
    assert np.abs(edit(pipe, name="ref").astype(int) - original()).max() <= 1


@torch.no_grad()
def test_slices_of_a_batch_with_tiles_and_without():
    vae = KiwiEditPipeline.from_pretrained(RELEASED).vae
    latents = torch.randn(2, vae.config.z_dim, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    whole, found, (mean, std) = decode_latents(vae, latents), [], latent_statistics(vae, "cpu")
    for tiling in (False, True):
        if tiling:
            vae.enable_tiling(
                tile_sample_min_height=32,
                tile_sample_min_width=32,
                tile_sample_stride_height=16,
                tile_sample_stride_width=16,
            )
        found.append(decode_latents(vae, latents))
        vae.enable_slicing()
        assert np.abs(decode_latents(vae, latents).astype(int) - found[-1]).max() <= 1
        vae.disable_slicing()
    assert np.array_equal(found[0], whole) and (found[1] != whole).any()
    vae.enable_tiling(
        tile_sample_min_height=16, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=32
    )  # side by side
    parts = [
        vae.decode(latents_of[..., y : y + 1, x : x + 2]).sample
        for latents_of in [latents * std + mean]
        for y in (0, 1)
        for x in (0, 2)
    ]
    beside = torch.cat([torch.cat(parts[:2], -1), torch.cat(parts[2:], -1)], -2)
    torch.testing.assert_close(in_tiles(vae, latents * std + mean, "decode"), beside, atol=1e-5, rtol=1e-4)
    vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=48, tile_sample_stride_width=16
    )
    with pytest.raises(ValueError, match="strides no longer than sides"):
        decode_latents(vae, latents)


def test_quantised_loading_goes_through_diffusers(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    convert(RELEASED, tmp_path / "kit", "kit")
    eight = PipelineQuantizationConfig(
        quant_mapping={"transformer": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    )
    pipe = KiwiEditPipeline.from_pretrained(tmp_path / "kit", quantization_config=eight)
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    assert 0 < np.abs(edit(pipe, name="ref").astype(float) - original()).mean() < 8


# number formats and variants


@pytest.fixture(scope="module")
def two_formats(tmp_path_factory):
    "The tiny model with plain files and files of half the size, told apart by a bias; in the encoder's folder these are shards."
    folder = tmp_path_factory.mktemp("variant") / "model"
    KiwiEditPipeline.from_pretrained("kiwi-edit-tiny").save_pretrained(folder)
    for part, name, wanted in (
        ("transformer", "diffusion_pytorch_model", "proj_out.bias"),
        ("vae", "diffusion_pytorch_model", "post_quant_conv.bias"),
        ("mllm", "model", None),
    ):
        half = {
            key: (value + 1 if key == wanted else value).half()
            for key, value in load_file(folder / part / f"{name}.safetensors").items()
        }
        if part != "mllm":
            save_file(half, folder / part / f"{name}.fp16.safetensors")
        else:
            keys, files = sorted(half), [f"{name}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
            for i, file in enumerate(files):
                save_file({key: half[key] for key in keys[i::2]}, folder / part / file)
            (folder / part / f"{name}.safetensors.index.fp16.json").write_text(
                json.dumps(dict(metadata={}, weight_map={key: files[i % 2] for i, key in enumerate(keys)}))
            )
    return folder


def test_of_several_variants_one_is_read(two_formats):
    plain = KiwiEditPipeline.from_pretrained(two_formats)
    half = KiwiEditPipeline.from_pretrained(two_formats, variant="fp16")
    for part, name in (("transformer", "proj_out.bias"), ("vae", "post_quant_conv.bias")):
        assert torch.allclose(
            getattr(half, part).state_dict()[name], getattr(plain, part).state_dict()[name] + 1, atol=2e-3
        ), part
    assert half.dtype == plain.dtype == torch.float32
    assert torch.equal(half.guidance.image_queries, plain.guidance.image_queries)  # which has no other files
    assert (
        KiwiEditPipeline.from_pretrained(two_formats, variant="fp16", torch_dtype="auto").transformer.dtype
        == torch.float16
    )
    with pytest.raises(FileNotFoundError, match="`variant` has to be one that files of the model have but is 'bf16'"):
        KiwiEditPipeline.from_pretrained(two_formats, variant="bf16")
    (two_formats / "mllm/model.fp16-00002-of-00002.safetensors").rename(two_formats / "away")
    with pytest.raises(FileNotFoundError, match="model.fp16-00002-of-00002.safetensors"):
        KiwiEditPipeline.from_pretrained(two_formats, variant="fp16")
    (two_formats / "away").rename(two_formats / "mllm/model.fp16-00002-of-00002.safetensors")


def test_number_formats_are_named_as_in_diffusers():
    load = lambda torch_dtype: KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", torch_dtype=torch_dtype)
    stored = torch.float16
    for given, wanted in (
        ("auto", stored),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (None, torch.float32),
    ):
        assert load(given).transformer.dtype == wanted, given
    mixed = load(dict(transformer=torch.bfloat16, vae="auto", default="float32"))
    assert (mixed.transformer.dtype, mixed.vae.dtype, mixed.mllm.dtype, mixed.guidance.dtype) == (
        torch.bfloat16,
        stored,
        torch.float32,
        torch.float32,
    )
    for wrong in ("bf17", torch.int8, 16, dict(unet=torch.float16), dict(vae="x"), "nn"):
        with pytest.raises(ValueError, match="`torch_dtype` has to be"):
            load(wrong)


@pytest.mark.parametrize(
    "options",
    [
        dict(foo=1),
        dict(subfolder="nowhere"),
        dict(custom_pipeline="x"),
        dict(trust_remote_code=True),
        dict(schedul="native"),
    ],
)
def test_unknown_arguments_are_refused_by_name(options):
    for source in ("kiwi-edit-tiny", RELEASED):
        with pytest.raises(TypeError, match=f"`{next(iter(options))}` has to be left out"):
            KiwiEditPipeline.from_pretrained(source, **options)


def test_parts_that_are_loaded_already_are_taken():
    vae = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny").vae
    assert KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", vae=vae).vae is vae


def test_a_denoiser_in_other_programs_files(tmp_path):
    tiny = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny").transformer
    config = {name: value for name, value in tiny.config.items() if not name.startswith("_")}
    for prefix in ("model.diffusion_model.", "diffusion_model.", ""):
        save_file(
            {prefix + _native_wan_name(key): value.contiguous() for key, value in tiny.state_dict().items()},
            tmp_path / "wan.safetensors",
        )
        found = _load_transformer(tmp_path / "wan.safetensors", config)
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), tiny.state_dict().values()))
    native = dict(num_heads=config["num_attention_heads"], dim=256, eps=config["eps"], model_type="t2v")
    read = _load_transformer(
        tmp_path / "wan.safetensors", native
    ).config  # of the original release: sizes are in shapes
    assert {name: list(value) if name == "patch_size" else value for name, value in read.items()} == {
        name: list(value) if name == "patch_size" else value for name, value in tiny.config.items()
    } | {name: value for name, value in read.items() if name.startswith("_")}


def packed(transformer, file, scale="scale_weight", rows=False):
    "A denoiser as ComfyUI writes it: a prefix, float8, a scale for each matrix or each of its rows; what it stands for."
    tensors, meant = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in transformer.state_dict().items():
        theirs = "model.diffusion_model." + _native_wan_name(name)
        meant[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight"):
            most = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()
            tensor = (tensor / (most / 448)).to(torch.float8_e4m3fn)
            meant[name] = tensor.float() * (most / 448)
            tensors[theirs.replace(".weight", f".{scale}")] = most / 448
            tensors[theirs.replace(".weight", ".scale_input" if scale == "scale_weight" else ".input_scale")] = (
                torch.ones(())
            )
        tensors[theirs] = tensor.contiguous()
    save_file(tensors, file)
    return meant


@pytest.mark.parametrize("scale, rows", [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)])
def test_eight_bits_are_multiplied_by_their_scale(tmp_path, scale, rows):
    tiny, file = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny").transformer, tmp_path / "fp8.safetensors"
    meant = packed(tiny, file, scale, rows)
    found = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", transformer=file).transformer.state_dict()
    assert all(torch.allclose(found[name], tensor, rtol=1e-6, atol=0) for name, tensor in meant.items())
    auto = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", "auto", transformer=file).transformer
    assert auto.dtype == torch.bfloat16
    what = describe_weights(file)["fp8.safetensors"]
    assert "Wan denoiser, 6 layers of width 256, native names behind 'model.diffusion_model.'" in what
    assert "F8_E4M3, F32 with scales; fits tiny" in what


def test_lora_is_added_to_eight_bits_times_their_scale(tmp_path):
    "The trainer's checkpoint of wan21 has LoRA alone of the denoiser; its base comes in eight bits."
    base = load_file(GOLDEN / "wan21/base/Wan_DiT.safetensors")
    given = bases("wan21")
    config = given["transformer_config"]
    meant = packed(_load_transformer(given["transformer"], config), tmp_path / "fp8.safetensors")
    save_file({_native_wan_name(name): x.contiguous() for name, x in meant.items()}, tmp_path / "plain.safetensors")
    step = GOLDEN / "wan21/trainer/step-1.safetensors"
    both = [
        load_trainer_checkpoint(step, **given | dict(transformer=tmp_path / f"{name}.safetensors")).transformer
        for name in ("fp8", "plain")
    ]
    a, b = (model.state_dict() for model in both)
    assert len(a) == len(base) and all(torch.allclose(a[name], b[name], atol=1e-6) for name in b)


def lose_scale(tensors):
    tensors.pop(next(name for name in tensors if name.endswith("weight_scale")))


def block_scales(tensors):
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = torch.ones(3, 5, dtype=torch.uint8)


def four_bits(tensors):
    name = next(name for name in tensors if name.endswith("ffn.0.weight"))
    tensors[name] = tensors[name].view(torch.uint8)


@pytest.mark.parametrize(
    "change, reason",
    [(lose_scale, "have none"), (block_scales, "scales of torch.uint8"), (four_bits, "is torch.uint8 with")],
)
def test_other_ways_to_quantise_are_refused(tmp_path, change, reason):
    tiny, file = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny").transformer, tmp_path / "q.safetensors"
    packed(tiny, file, "weight_scale")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=reason) as caught:
        KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", transformer=file)
    one_clear_error(caught)


def write_gguf(transformer, file, kind="Q8_0", prefix=""):
    "A denoiser as GGUF in native names: matrices in that kind, the rest in half precision."
    gguf = pytest.importorskip("gguf")
    kind, writer = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter(file, "wan")
    for name, tensor in transformer.state_dict().items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and name.endswith(".weight"):
            writer.add_tensor(prefix + _native_wan_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(prefix + _native_wan_name(name), values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind, most", [("F16", 1e-3), ("Q8_0", 1e-2)])
def test_gguf_edits_as_the_plain_weights_do_nearly(tmp_path, kind, most):
    plain = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    file = write_gguf(plain.transformer, tmp_path / "wan.gguf", kind, "model.diffusion_model.")
    stored = f"{kind}, F16" if kind != "F16" else "F16"
    assert (
        f"6 layers of width 256, native names behind 'model.diffusion_model.'; 6.13M numbers in {stored}; fits tiny"
        in (describe_weights(file)["wan.gguf"])
    )
    quantised = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", transformer=file)
    sample = World(split="eval", difficulty="easy").sample(EVAL_SEED, task="background")
    results = []
    for pipe in (plain, quantised):
        pipe.set_progress_bar_config(disable=True)
        given = dict(generator=torch.Generator().manual_seed(0), output_type="np")
        results.append(pipe(sample.instruction, sample.source[:5], **given).frames[0])
    assert np.abs(results[0] - results[1]).mean() < most
    convert_to = tmp_path / "whole"
    convert("kiwi-edit-tiny", convert_to, torch_dtype=torch.float32, transformer=file)
    again = KiwiEditPipeline.from_pretrained(convert_to).transformer.state_dict()
    assert all(
        (again[n] - x).abs().max() < 0.01 * x.abs().max() + 1e-6 for n, x in plain.transformer.state_dict().items()
    )


def test_gguf_as_the_base_of_a_trainers_lora(tmp_path):
    given = bases("wan21")
    base = _load_transformer(given["transformer"], given["transformer_config"])
    given["transformer"] = write_gguf(base, tmp_path / "base.gguf", "F16")
    step = GOLDEN / "wan21/trainer/step-1.safetensors"
    a, b = (load_trainer_checkpoint(step, **x).transformer.state_dict() for x in (bases("wan21"), given))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_gguf_that_is_no_denoiser_or_not_whole_is_said(tmp_path):
    tiny = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    whole = write_gguf(tiny.transformer, tmp_path / "wan.gguf").read_bytes()
    for name, content in dict(half=whole[: len(whole) // 2], begun=whole[:900], empty=b"GGUF" + bytes(60)).items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        with pytest.raises(ValueError, match="has to be a whole GGUF file") as caught:
            KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", transformer=file)
        one_clear_error(caught)
    with pytest.raises(ValueError, match="GGUF, which is read as a denoiser"):
        checkpoints._load_vae(tmp_path / "wan.gguf", None, torch.float32)
    other = write_gguf(tiny.vae, tmp_path / "vae.gguf", "F16")
    with pytest.raises(ValueError, match="`weights` of WanTransformer3DModel have to match") as caught:
        KiwiEditPipeline.from_pretrained("kiwi-edit-tiny", transformer=other)


def test_a_trainers_file_goes_by_any_name(tmp_path):
    "As Kiwi-Sparkle's model.safetensors: the whole denoiser in it, base models named beside it."
    step = GOLDEN / "wan22/trainer/step-1.safetensors"
    shutil.copy(step, tmp_path / "model.safetensors")
    for found in (
        KiwiEditPipeline.from_pretrained(tmp_path / "model.safetensors", **bases()),
        load_any(tmp_path, **bases()),
    ):
        expected = load_trainer_checkpoint(step, **bases())
        a, b = found.transformer.state_dict(), expected.transformer.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    with pytest.raises(ValueError, match="`vae` has to name the base model, since a trainer checkpoint has no vae"):
        KiwiEditPipeline.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match="checkpoint of the trainer but Wan_DiT.safetensors is a Wan denoiser, 2 layers"
    ):
        KiwiEditPipeline.from_pretrained(GOLDEN / "wan21/base/Wan_DiT.safetensors", **bases())


WHAT = {  # a file or folder -> what is said of its parts
    "trainer/step-1.safetensors": {
        "step-1.safetensors": "checkpoint of the trainer with a whole denoiser, LoRA of rank 4"
    },
    "base/Wan_VAE.safetensors": {
        "Wan_VAE.safetensors": "Wan autoencoder, 48 channels of latents, base width 2, native"
    },
    "base/Qwen2.5-VL-tiny": {"model.safetensors": "Qwen2.5-VL encoder, 2 layers of width 32"},
    "diffusers": {
        "model": "whole, in the released layout",
        "transformer/diffusion_pytorch_model.safetensors": "usual names",
    },
    "diffusers/vae": {"diffusion_pytorch_model.safetensors": "Wan autoencoder, 48 channels of latents"},
}


@pytest.mark.parametrize("path", WHAT)
def test_what_weights_are_is_said_from_headers(path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoints, "load_file", never)
    found = describe_weights(GOLDEN / "wan22" / path)
    for name, words in WHAT[path].items():
        assert words in found[name]


def test_presets_are_told_by_names_and_shapes(tmp_path):
    "Headers of the published sizes: what is in the file is zeros that take no place on the disk."
    with torch.device("meta"):
        for name, wan in (("wan2.2-5b", 3072), ("wan2.1-14b", 5120)):
            sizes = PRESETS[name].transformer
            model = WanTransformer3DModel(**sizes)
            names = {_native_wan_name(key): (tuple(x.shape), "BF16") for key, x in model.state_dict().items()}
            layers = sizes["num_layers"]
            assert f"{layers} layers of width {wan}, native" in (said := checkpoints._describe(names))
            assert said.endswith(f"fits {name}")
            lora = {
                f"diffusion_model.blocks.{n}.self_attn.q.lora_{side}.weight": (shape, "BF16")
                for n in range(layers)
                for side, shape in (("down", (64, wan)), ("up", (wan, 64)))
            }
            said = checkpoints._describe(lora)
            assert said.startswith(f"LoRA of rank 64 for {layers} layers of a denoiser, width {wan}, ComfyUI's")
            assert said.endswith(f"fits {name}")
    torch.save(load_file(GOLDEN / "wan22/base/Wan_VAE.safetensors"), tmp_path / "Wan2.2_VAE.pth")
    assert "Wan autoencoder, 48 channels" in describe_weights(tmp_path / "Wan2.2_VAE.pth")["Wan2.2_VAE.pth"]
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "nothing that the kit knows" in describe_weights(tmp_path / "x.safetensors")["x.safetensors"]


@pytest.mark.parametrize(
    "name, content", [("half.safetensors", None), ("page.safetensors", b"<html>"), ("a.pth", b"PK\x03\x04")]
)
def test_files_that_are_no_weights_are_said(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content or (GOLDEN / "wan22/base/Wan_VAE.safetensors").read_bytes()[:9000])
    with pytest.raises(ValueError, match=f"`{name}` has to be a whole ") as caught:
        describe_weights(file)
    one_clear_error(caught)
    with pytest.raises(FileNotFoundError, match="`path` has to be a file of weights or a folder but .* does not exist"):
        describe_weights(tmp_path / "nowhere")
