"ComfyUI's nodes: what ComfyUI asks of a node, the example's graph, and results that are the pipeline's own."

import importlib.util
import inspect
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kiwi_edit import footage
from kiwi_edit.apps import comfy
from kiwi_edit.apps.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from kiwi_edit.core import InputError, asset
from kiwi_edit.pipeline import KiwiEditPipeline
from kiwi_edit.video import read_image, read_video

WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
WIRES = {"IMAGE", "MASK", "KIWI_MODEL"}
WORDS = "Replace the flamingo with what the reference shows."
SETTINGS = dict(instruction=WORDS, seed=3, steps=1, guidance=1.0, strength=1.0)
# ComfyUI's own nodes of the example: inputs, whether they have to be there, and what is given
STOCK = {
    "LoadVideo": (dict(file="STRING"), ["VIDEO"]),
    "GetVideoComponents": (dict(video="VIDEO"), ["IMAGE", "AUDIO", "FLOAT"]),
    "LoadImage": (dict(image="STRING"), ["IMAGE", "MASK"]),
    "CreateVideo": (dict(images="IMAGE", fps="FLOAT", audio="AUDIO"), ["VIDEO"]),
    "SaveVideo": (dict(video="VIDEO", filename_prefix="STRING", format="STRING", codec="STRING"), []),
}


def faults(kind):
    "What ComfyUI would not like about the class of a node."
    inputs = kind.INPUT_TYPES()
    if set(inputs) - {"required", "optional", "hidden"}:
        yield f"groups {list(inputs)}"
    for name, (wire, *options) in (inputs["required"] | inputs.get("optional", {})).items():
        if not name.isidentifier() or wire not in WIRES | set(WIDGETS):
            yield f"{name} of type {wire}"
        options = options[0] if options else {}
        default = options.get("default", "" if wire == "STRING" else None)
        if wire in WIDGETS and type(default) is not WIDGETS[wire]:
            yield f"{name} begins as {default!r}"
        if wire in ("INT", "FLOAT") and not options["min"] <= default <= options["max"]:
            yield f"{name} lies outside of its range"
        if wire in ("INT", "FLOAT") and options["step"] <= 0:
            yield f"{name} makes no steps"
    if type(kind.RETURN_TYPES) is not tuple or set(kind.RETURN_TYPES) - WIRES:
        yield f"it gives {kind.RETURN_TYPES}"
    if not callable(getattr(kind(), kind.FUNCTION, None)):
        yield f"it has no {kind.FUNCTION}"
    if not isinstance(kind.CATEGORY, str) or not kind.CATEGORY:
        yield "it stands nowhere in the menu"


def run(name, **inputs):
    "What a node gives, called as ComfyUI calls it."
    kind = NODE_CLASS_MAPPINGS[name]
    asked = kind.INPUT_TYPES()
    assert set(asked["required"]) <= set(inputs) <= set(asked["required"] | asked["optional"])
    with torch.inference_mode():
        result = getattr(kind(), kind.FUNCTION)(**inputs)
    assert isinstance(result, tuple) and len(result) == len(kind.RETURN_TYPES)
    return result[0]


@pytest.fixture(scope="module")
def clip():
    return read_video(asset("samples/clip.mp4"), num_frames=5, size=(96, 96))


@pytest.fixture(scope="module")
def images(clip):
    return torch.from_numpy(clip.frames / 255).float()


@pytest.fixture(scope="module")
def reference():
    return torch.from_numpy(np.asarray(read_image(asset("samples/reference.png")))[None] / 255).float()


@pytest.fixture
def model(own_settings):
    comfy._pipeline.cache_clear()
    yield run("KiwiEditLoad", model="kiwi-edit-tiny", offload=False)
    comfy._pipeline.cache_clear()


@pytest.fixture
def comfyui(monkeypatch):
    "The two modules of ComfyUI that are asked for, and what they are told."

    class Interrupted(BaseException):
        pass

    told = SimpleNamespace(stop=False, bars=[], Interrupted=Interrupted)

    class ProgressBar:
        def __init__(self, total):
            told.bars.append([total])

        def update_absolute(self, value, total=None, preview=None):
            told.bars[-1].append((value, total))

    def throw_exception_if_processing_interrupted():
        if told.stop:
            raise Interrupted

    package, management, utils = (ModuleType(name) for name in ("comfy", "comfy.model_management", "comfy.utils"))
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    utils.ProgressBar = ProgressBar
    for module in (package, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_nodes_are_what_comfyui_asks_for(name):
    assert not list(faults(NODE_CLASS_MAPPINGS[name]))
    assert NODE_DISPLAY_NAME_MAPPINGS[name] and NODE_CLASS_MAPPINGS[name].DESCRIPTION


def test_the_checker_finds_faults():
    inputs = dict(required=dict(a=("INT", dict(default=1.5, min=2, max=3, step=1)), b=("PICTURE",)))
    broken = type(
        "",
        (),
        dict(INPUT_TYPES=lambda: inputs, RETURN_TYPES=("IMAGE"), FUNCTION="go", CATEGORY="", __init__=lambda s: None),
    )
    assert len(list(faults(broken))) == 6


def test_functions_take_what_their_nodes_ask_for():
    for name, kind in NODE_CLASS_MAPPINGS.items():
        function = getattr(comfy, "_" + name.removeprefix("KiwiEdit").lower())
        asked = kind.INPUT_TYPES()
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [*asked["required"], *asked["optional"]]
        assert {n for n, p in parameters.items() if p.default is None} == set(asked["optional"])


def test_the_folder_for_custom_nodes_offers_the_nodes():
    folder = asset("comfyui/kiwi_edit")
    spec = importlib.util.spec_from_file_location("custom_nodes_kiwi_edit", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS is NODE_DISPLAY_NAME_MAPPINGS


def test_the_example_is_a_graph_that_comfyui_takes_and_its_edit_runs(model, images, reference):
    graph = json.loads(asset("comfyui/kiwi_edit/workflow.json").read_text())
    for node in graph.values():
        if node["class_type"] in STOCK:
            asked, needed = STOCK[node["class_type"]][0], set()
        else:
            groups = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            asked, needed = {n: t[0] for n, t in (groups["required"] | groups["optional"]).items()}, groups["required"]
        assert set(needed) <= set(node["inputs"]) <= set(asked)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                before = graph[value[0]]["class_type"]
                gives = STOCK[before][1] if before in STOCK else NODE_CLASS_MAPPINGS[before].RETURN_TYPES
                assert gives[value[1]] == asked[name]
            else:
                assert type(value) is WIDGETS[asked[name]]
    given = next(node["inputs"] for node in graph.values() if node["class_type"] == "KiwiEditEdit")
    widgets = {name: value for name, value in given.items() if not isinstance(value, list)}
    assert run("KiwiEditEdit", model=model, images=images, reference=reference, **widgets).shape == (5, 96, 96, 3)


def test_an_edit_is_the_pipelines_own(model, clip, images, reference):
    edited = run("KiwiEditEdit", model=model, images=images, reference=reference, **SETTINGS)
    own = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")(
        WORDS,
        clip.frames,
        read_image(asset("samples/reference.png")),
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    )
    assert edited.dtype == torch.float32 and edited.device.type == "cpu"
    assert torch.equal(edited, torch.from_numpy(own.frames[0]))


def test_a_model_is_loaded_once(model):
    assert run("KiwiEditLoad", model="kiwi-edit-tiny", offload=False).pipe is model.pipe


def test_all_frames_of_a_batch_are_edited_but_for_a_rest(model, images):
    many = torch.cat([images, images, images, images[:3]]) * 1.001  # upscalers leave values just outside of [0, 1]
    alpha = torch.ones(*many.shape[:3], 1)
    assert len(run("KiwiEditEdit", model=model, images=torch.cat([many, alpha], dim=3), **SETTINGS)) == 17
    assert len(run("KiwiEditEdit", model=model, images=images[:1], **SETTINGS)) == 1


def test_widgets_and_inputs_arrive_as_arguments_of_the_pipeline(images, reference):
    calls = []

    def pipe(*args, **kwargs):
        calls.append((args, kwargs))
        return SimpleNamespace(frames=[np.zeros((1, 8, 8, 3), np.float32)])

    pipe.config = SimpleNamespace(default_steps=7)
    model = comfy._Model(pipe)
    mask = run("KiwiEditMask", images=images, left=0.0, top=0.5, right=0.25, bottom=1.0, follow=False)
    widgets = dict(instruction="go", seed=2**64 - 1, steps=0, guidance=2.0, strength=0.5)
    run("KiwiEditEdit", model=model, images=images, reference=torch.cat([reference] * 2), mask=mask, **widgets)
    run("KiwiEditEdit", model=model, images=images, **(widgets | dict(steps=4)))
    (args, first), (_, second) = calls
    assert args[0] == "go" and np.array_equal(args[1], images.numpy())
    assert (first["num_inference_steps"], first["guidance_scale"], first["strength"]) == (None, 2.0, 0.5)
    assert first["num_frames"] == 5 and first["generator"].initial_seed() == 2**64 - 1
    assert [picture.shape for picture in first["reference"]] == [reference.shape[1:]] * 2
    assert first["mask"].shape == (1, 96, 96) and first["mask"].mean() == 0.125 and first["mask"][0, -1, 0] == 1
    assert second["num_inference_steps"] == 4 and not {"mask", "reference"} & set(second)


def test_a_mask_follows(images, monkeypatch):
    given = []
    follow = lambda frames, first: given.append((frames, first)) or np.repeat(first[None], len(frames), axis=0)
    monkeypatch.setattr(footage, "follow_mask", follow)
    drawn = torch.zeros(1, 96, 96)
    drawn[:, :8] = 0.8
    box = dict(left=0.0, top=0.0, right=1.0, bottom=0.5)
    for mask, share in ((drawn, 8 / 96), (None, 0.5)):
        found = run("KiwiEditMask", images=images, **box, follow=True, **({} if mask is None else dict(mask=mask)))
        assert found.shape == (5, 96, 96) and found.dtype == torch.float32
        assert found.mean().item() == pytest.approx(share)
    assert given[0][0].dtype == np.uint8 and given[0][1].dtype == bool
    assert torch.equal(run("KiwiEditMask", images=images, **box, follow=False, mask=drawn), drawn)


def test_progress_is_shown_and_stop_is_heard(model, images, comfyui):
    run("KiwiEditEdit", model=model, images=images, **(SETTINGS | dict(steps=4, strength=0.5)))
    assert comfyui.bars == [[4, (1, 2), (2, 2)]]
    comfyui.stop = True
    with pytest.raises(comfyui.Interrupted):
        run("KiwiEditEdit", model=model, images=images, **SETTINGS)
    comfyui.stop = False
    run("KiwiEditEdit", model=model, images=images, **(SETTINGS | dict(steps=0)))
    assert comfyui.bars[-1] == [1, (1, 1)]


@pytest.fixture
def lora(model, tmp_path):
    "Files of two LoRAs."
    generator, files = torch.Generator().manual_seed(0), []
    for name in ("a", "b"):
        weights = {}
        for layer in ("to_q", "to_v"):
            place = f"transformer.blocks.0.attn1.{layer}"
            weights[f"{place}.lora_A.weight"] = torch.randn(4, 256, generator=generator)
            weights[f"{place}.lora_B.weight"] = torch.randn(256, 4, generator=generator)
        save_file(weights, tmp_path / f"{name}.safetensors")
        files.append(str(tmp_path / f"{name}.safetensors"))
    return files


def test_a_lora_acts_on_its_own_wire_alone(model, images, lora):
    edit = lambda wire: run("KiwiEditEdit", model=wire, images=images, **SETTINGS)
    plain = edit(model)
    strong = run("KiwiEditLora", model=model, lora=lora[0], strength=1.0)
    weak = run("KiwiEditLora", model=model, lora=lora[0], strength=0.1)
    off = run("KiwiEditLora", model=model, lora=lora[0], strength=0.0)
    both = run("KiwiEditLora", model=strong, lora=lora[1], strength=1.0)
    results = [edit(wire) for wire in (strong, weak, both)]
    differences = [(result - plain).abs().mean().item() for result in results]
    assert differences[0] > differences[1] > 0 and not torch.equal(results[0], results[2])
    assert torch.equal(edit(off), plain)
    assert torch.equal(edit(strong), results[0]) and torch.equal(edit(model), plain)
    assert not [name for name, _ in model.pipe.transformer.named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("KiwiEditEdit", dict(instruction=" "), "`instruction` has to say what to edit but is ' '."),
        ("KiwiEditEdit", dict(images=torch.zeros(1, 96, 96, 2)), "`images` has to be shaped"),
        ("KiwiEditLora", dict(lora=""), "`lora` has to be a file, a folder or a hub id but is empty."),
        (
            "KiwiEditLora",
            dict(lora="no.safetensors"),
            "`lora` has to be an existing file or folder, a hub id or a dict but",
        ),
        ("KiwiEditLoad", dict(model="./nothing"), "`model` has to be a model that ships with the kit"),
        ("KiwiEditMask", dict(left=0.5, right=0.5), "`left` has to be below `right`"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(model, images, name, inputs, message):
    asked = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    wires = dict(model=model, images=images, lora="")
    widgets = {n: wires[n] if n in wires else options[0].get("default", WORDS) for n, (_, *options) in asked.items()}
    if name == "KiwiEditLoad":
        widgets["model"] = "kiwi-edit-tiny"
    with pytest.raises((InputError, FileNotFoundError)) as caught:
        run(name, **(widgets | inputs))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_bad_lora_leaves_the_model_as_it_was(model, images, lora, tmp_path):
    edit = lambda wire: run("KiwiEditEdit", model=wire, images=images, **SETTINGS)
    plain = edit(model)
    good = run("KiwiEditLora", model=model, lora=lora[0], strength=1.0)
    save_file({"transformer.blocks.99.to_q.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="`lora` has to be a LoRA of this model but"):
        run("KiwiEditLora", model=good, lora=str(tmp_path / "bad.safetensors"), strength=1.0)
    assert torch.equal(edit(model), plain) and not torch.equal(edit(good), plain)
