"Every approximation acts, stays near, and leaves nothing behind; the benchmark's exact savings act and change nothing."

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.overrides import TorchFunctionMode

import common
from kiwi_edit import footage, guidance, latents, pipeline
from kiwi_edit.apps.approximations import APPROXIMATIONS, _FlowUniPC, approximately, parallelise
from kiwi_edit.core import asset
from kiwi_edit.guidance import find_wan
from kiwi_edit.pipeline import KiwiEditPipeline, flow_sigmas
from kiwi_edit.video import Clip, as_frames, read_video
from kiwi_edit.windows import latent_windows
from kiwi_edit.world import World

sys.path.insert(0, str(asset("benchmarks")))
import speed  # noqa: E402
from speed import SAVINGS, SpeedReport, recomputed  # noqa: E402

SCENE = World(split="eval").sample(10_000_012, "background")
CASES = {
    "reference": dict(reference=PIL.Image.fromarray(SCENE.reference)),
    "no reference": {},
    "guidance": dict(reference=PIL.Image.fromarray(SCENE.reference), guidance_scale=1.5),
}


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe():
    pipe = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    pipe.set_progress_bar_config(disable=True)
    with recomputed(pipe, "language model"):  # at the first call that wants them transformers installs hooks that stay
        edit(pipe, 1)
    return pipe


def edit(pipe, steps=2, video=SCENE.source, output_type="latent", **options):
    frames = pipe(
        SCENE.instruction,
        video,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=steps,
        output_type=output_type,
        **options,
    ).frames
    return np.stack(list(map(as_frames, frames))) if output_type == "np" else frames


@pytest.fixture(scope="module")
def exact(pipe):
    "Edits of all cases, computed once."
    kept = {}

    def get(case, **options):
        key = case, *options.items()
        if key not in kept:
            kept[key] = edit(pipe, **CASES[case], **options)
        return kept[key]

    return get


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


def state(pipe):
    "All that savings and approximations may change, to be compared."
    wan, vae = find_wan(pipe.transformer), pipe.vae
    parts = [
        (name, id(value))
        for module in (footage, guidance, pipeline, latents)
        for name, value in sorted(vars(module).items())
        if not name.startswith("__")
    ]
    modules = []
    for root in (wan, pipe.mllm, pipe.guidance, vae):
        for name, module in root.named_modules():
            registry = vars(module).get("_diffusers_hook")
            modules.append(
                (
                    name,
                    sorted(set(vars(module)) - {"_diffusers_hook", "_cache_config", "_fast_users"}),
                    sorted(registry.hooks) if registry else [],
                    len(module._forward_hooks),
                    len(module._forward_pre_hooks),
                )
            )
    weights = [
        (name, p.data_ptr(), p.dtype) for root in (wan, pipe.mllm, pipe.guidance) for name, p in root.named_parameters()
    ]
    settings = [getattr(vae, name) for name in vars(vae) if name.startswith(("use_", "tile_"))]
    return dict(
        parts=parts,
        modules=modules,
        weights=weights,
        settings=settings,
        pipe=sorted(vars(pipe)),
        memory=id(pipe.memory),
        config=dict(pipe.config),
        scheduler=id(pipe.scheduler),
        transformer=id(pipe.transformer),
        processors=[type(attn.processor) for block in wan.blocks for attn in (block.attn1, block.attn2)],
        cache=wan._cache_config,
    )


class Counted(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls[getattr(function, "__name__", "")] += 1
        return function(*args, **(kwargs or {}))


# -- exact savings ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SAVINGS)
def test_saving_changes_nothing(pipe, exact, name, case):
    before = exact(case)
    with recomputed(pipe, name):
        plain = edit(pipe, **CASES[case])
    assert (plain - before).abs().max() < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_everything_recomputed_changes_nothing(pipe, exact, case):
    before, frames = exact(case), edit(pipe, output_type="np", **CASES[case])
    with recomputed(pipe):
        plain, again = edit(pipe, **CASES[case]), edit(pipe, output_type="np", **CASES[case])
    assert (plain - before).abs().max() < 1e-5 * before.abs().max()
    # a sum in another order may fall on the other side of a whole level
    assert np.abs(again.astype(int) - frames).max() <= 1


def amount(pipe, name):
    "How much of what a saving saves two steps, and another edit of the clip, take."
    wan, found, handles = find_wan(pipe.transformer), Counter(), []

    def count(module, number):
        handles.append(
            module.register_forward_hook(lambda module, args, out: found.update(n=number(module, args, out)))
        )

    if name == "embeddings":
        count(pipe.guidance.source_embedder, lambda *_: 1)
        count(pipe.guidance.ref_embedder, lambda *_: 1)
    if name == "keys and values":
        [count(block.attn2.to_k, lambda *_: 1) for block in wan.blocks]
    if name == "head":
        count(wan.proj_out, lambda module, args, out: args[0].shape[1])
    if name == "language model":
        handle = pipe.mllm.model.language_model.register_forward_hook(
            lambda module, args, out: found.update(n=(out.past_key_values is not None) + len(out.hidden_states or ()))
        )
        handles.append(handle)
    if name == "memory":
        count(pipe.vae.encoder, lambda *_: 1)
        count(pipe.mllm.model.visual, lambda *_: 1)
    pipe.memory.clear()
    with Counted() as counted:
        edit(pipe, **CASES["reference"])
    if name == "memory":
        edit(pipe, **CASES["reference"])
    for handle in handles:
        handle.remove()
    if name == "autoencoder":
        return counted.calls["conv3d"] + counted.calls["normalize"]
    if name == "positions":
        return counted.calls["cos"] + counted.calls["view_as_complex"]
    return found["n"]


@pytest.mark.parametrize(
    "name", ["embeddings", "positions", "keys and values", "head", "language model", "autoencoder", "memory"]
)
def test_saving_acts(pipe, name):
    saved = amount(pipe, name)
    with recomputed(pipe, name):
        plain = amount(pipe, name)
    assert plain > saved


def test_plain_reading_is_the_same(pipe, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)
    path = Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    for options in (dict(num_frames=5), dict(indices=[1, 4, 7]), dict(num_frames=5, size=(32, 16), mode="inference")):
        quick = read_video(path, **options).frames
        with recomputed(pipe, "reading"):
            assert footage.read_video is not read_video
            assert np.array_equal(footage.read_video(path, **options).frames, quick)
    assert footage.read_video is read_video


def test_streams_are_the_whole_in_pieces(pipe):
    clip = World(num_frames=13, split="eval").sample(10_000_012, "background").source

    def run():
        return list(edit(pipe, 1, clip, "stream", num_frames=13)[0])

    pieces = run()
    with recomputed(pipe, "streams", "memory"):
        whole = run()
    assert len(pieces) == 12 // pipe.vae.config.scale_factor_temporal + 1 and len(whole) == 1
    assert np.abs(np.concatenate(pieces).astype(int) - whole[0]).max() <= 1
    grown = {row["frames"]: row for row in speed.stream_memory(pipe, (21, 61))}
    assert grown[61]["whole"] - grown[21]["whole"] > 10 * (grown[61]["streamed"] - grown[21]["streamed"])


@pytest.mark.parametrize("name", [*SAVINGS, "everything"])
def test_saving_leaves_nothing_behind(pipe, name):
    edit(pipe, 1)
    before = state(pipe)
    with pytest.raises(RuntimeError, match="on the way"):
        with recomputed(pipe, *(() if name == "everything" else (name,))):
            edit(pipe, 1, **CASES["reference"])
            raise RuntimeError("on the way")
    assert state(pipe) == before


# -- approximations --------------------------------------------------------------------------------------------------------------------------

STEPS = 8
CACHES = ("first-block cache", "taylor series")
NEAR = 20  # decibels; how near an approximation comes is the model's affair, and what is broken lies far below


def flops(run):
    with speed.operations() as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.fixture(scope="module")
def counted(pipe):
    "Operations and frames of the exact edits of all cases."
    kept = {}

    def get(case):
        if case not in kept:
            edit(pipe, 1, **CASES[case])  # fills the memory, so that all counts leave out the same
            kept[case] = flops(lambda: edit(pipe, STEPS, output_type="np", **CASES[case])[0])
        return kept[case]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CACHES)
def test_step_cache_skips_and_stays_near(pipe, counted, name, case):
    count, before = counted(case)

    def run(**more):
        return edit(pipe, STEPS, output_type="np", **CASES[case], **more)[0]

    def stop(pipe, i, t, tensors):
        if i == STEPS // 2:
            raise RuntimeError("stopped")

    edit(pipe, 1, **CASES[case])
    with approximately(pipe, name):
        less, first = flops(run)
        with pytest.raises(RuntimeError, match="stopped"):
            run(callback_on_step_end=stop)
        again = run()  # starts afresh after an edit, and after one that an error cut off
    assert less < count
    assert NEAR < psnr(first, before) < 90
    assert np.array_equal(first, again)
    if case == "reference":
        assert np.array_equal(run(), before)


def test_step_caches_and_windows(pipe):
    clip = World(num_frames=21, split="eval").sample(10_000_012, "background").source
    run = lambda: edit(pipe, 8, clip, "np", num_frames=21)[0]
    count, before = flops(run)
    for name in ("first-block cache", "taylor series"):
        with approximately(pipe, name):
            less, near = flops(run)
        assert less < count and NEAR < psnr(near, before) < 90


def test_fewer_steps(pipe):
    own = pipe.config.default_steps
    ten = edit(pipe, 10, output_type="np")[0]
    with approximately(pipe, "fewer steps", steps=10):
        assert pipe.config.default_steps == 10
        other = edit(pipe, None, output_type="np")[0]
        assert edit(pipe, 6, strength=0.5).isfinite().all()
    assert pipe.config.default_steps == own and isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert NEAR < psnr(other, ten) < 90


def test_solver_needs_fewer_steps_where_the_way_is_known(pipe):
    "Flow matching between two normal distributions of deviation 1: a sample ends where it began, on a bent way."

    def missed(scheduler):
        x = start = torch.linspace(-2, 2, 9)[None, :, None]
        scheduler.set_timesteps(sigmas=flow_sigmas(20))
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            velocity = x * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        return (x - start).abs().max()

    assert missed(_FlowUniPC.like(pipe.scheduler)) < 0.3 * missed(
        FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    )


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_solver_has_the_same_noise_levels(pipe, steps):
    other = _FlowUniPC.like(_FlowUniPC.like(pipe.scheduler))
    for schedule in pipeline._SCHEDULES:
        for scheduler in (pipe.scheduler, other):
            scheduler.set_timesteps(sigmas=flow_sigmas(steps, schedule))
        assert torch.allclose(other.sigmas, pipe.scheduler.sigmas, atol=2e-6)
        assert torch.allclose(other.timesteps.float(), pipe.scheduler.timesteps, atol=2e-3)


@pytest.mark.parametrize(
    "name, options", [("float8 weights", {}), ("tiled autoencoder", dict(tile=48, overlap=0.5)), ("bfloat16", {})]
)
def test_cheaper_arithmetic(pipe, exact, name, options):
    before = edit(pipe, 1, output_type="np", **CASES["reference"])[0]
    with approximately(pipe, name, **options):
        near = edit(pipe, 1, output_type="np", **CASES["reference"])[0]
    assert NEAR < psnr(near, before) < 90
    assert np.array_equal(edit(pipe, 1, output_type="np", **CASES["reference"])[0], before)


@pytest.mark.skipif(speed.find_spec("torchao") is not None, reason="torchao is installed")
def test_int8_without_torchao(pipe):
    with pytest.raises(ImportError, match="pip install torchao"):
        approximately(pipe, "int8 weights")


@pytest.mark.skipif(speed.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8(pipe):
    before = edit(pipe, 2, output_type="np")[0]
    with approximately(pipe, "int8 weights"):
        near = edit(pipe, 2, output_type="np")[0]
    assert NEAR < psnr(near, before) < 90 and np.array_equal(edit(pipe, 2, output_type="np")[0], before)


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_one_graph(pipe, exact, case):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with approximately(pipe, "compiled", backend=backend):
        same = edit(pipe, **CASES[case])
    assert len(graphs) == 1 and (same - exact(case)).abs().max() < 1e-5


def test_compiled_with_a_step_cache(pipe):
    def backend(graph, inputs):
        return graph.forward

    before = edit(pipe, 8, output_type="np")[0]
    with approximately(pipe, "first-block cache"), pytest.raises(ValueError, match="before a step cache"):
        approximately(pipe, "compiled", backend=backend)
    with approximately(pipe, {"compiled": dict(backend=backend), "first-block cache": dict(threshold=0.2)}):
        near = edit(pipe, 8, output_type="np")[0]
    with approximately(pipe, "first-block cache", threshold=0.2):
        assert np.abs(near.astype(int) - edit(pipe, 8, output_type="np")[0]).max() <= 1
    assert psnr(near, before) < 90


def test_compiled_without_a_compiler(pipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' is not found"):
        approximately(pipe, "compiled")


WAYS = {name: {} for name in APPROXIMATIONS if name not in ("int8 weights", "compiled")}
WAYS["compiled"] = dict(backend="eager")


@pytest.mark.parametrize("name", WAYS)
def test_approximation_leaves_nothing_behind(pipe, name):
    edit(pipe, 1)
    before = state(pipe)
    with pytest.raises(RuntimeError, match="on the way"):
        with approximately(pipe, name, **WAYS[name]):
            assert state(pipe) != before
            edit(pipe, 1, **CASES["reference"])
            raise RuntimeError("on the way")
    assert state(pipe) == before


def test_several_at_once_or_none(pipe):
    before = state(pipe)
    with pytest.raises(ValueError, match="one step cache at most but a FirstBlockCacheConfig"):
        approximately(pipe, {"fewer steps": {}, "first-block cache": {}, "taylor series": {}})
    assert state(pipe) == before  # what had been started has ended
    kept = approximately(pipe, {"fewer steps": dict(steps=3), "first-block cache": dict(threshold=0.3)})
    assert pipe.config.default_steps == 3 and find_wan(pipe.transformer).is_cache_enabled
    kept.close()
    assert state(pipe) == before


@pytest.mark.parametrize(
    "chosen, options, message",
    [
        ("magic", {}, "`chosen` has to be among"),
        ("fewer steps", dict(threshold=1), "among steps, order but gives 'threshold'"),
        ("fewer steps", dict(steps=0), "`steps` has to be at least 1 but is 0"),
        ("float8 weights", dict(steps=0), "among none"),
        ("tiled autoencoder", dict(tile=20), "multiple of 8 pixels but is 20"),
        ("tiled autoencoder", dict(overlap=1), "below 1 but is 1"),
    ],
)
def test_options_that_cannot_be(pipe, chosen, options, message):
    before = state(pipe)
    with pytest.raises(ValueError, match=message):
        approximately(pipe, chosen, **options)
    assert state(pipe) == before


# -- many processes --------------------------------------------------------------------------------------------------------------------------


def parallel_job(folder):
    torch.set_num_threads(1)
    pipe = KiwiEditPipeline.from_pretrained("kiwi-edit-tiny")
    pipe.set_progress_bar_config(disable=True)

    def edit(seed=0, **options):
        noise, clip = torch.Generator().manual_seed(seed), asset("samples/clip.mp4")
        return pipe(
            "Make it snow.", clip, generator=noise, output_type="latent", num_inference_steps=2, **options
        ).frames

    cases = dict(reference=asset("samples/reference.png")), dict(guidance_scale=2.0)
    alone = [edit(**case) for case in cases]
    with parallelise(pipe):
        rank = torch.distributed.get_rank()
        together = [edit(**case) for case in cases]
        shared = edit(rank)  # other noise in each process: that of the first counts
    with pytest.raises(ValueError, match="`ring` has to be 1 with PyTorch's own attention"):
        parallelise(pipe, ring=2)
    assert torch.equal(edit(**cases[0]), alone[0])
    torch.save([*alone, *together, shared, edit()], folder / f"out{rank}")


def test_parallel_in_two_processes(tmp_path):
    common.together(tmp_path, parallel_job, tmp_path)
    for rank in (0, 1):
        alone, guided, together, together_guided, shared, first = torch.load(tmp_path / f"out{rank}")
        assert (alone - together).abs().max() < 1e-5 and (guided - together_guided).abs().max() < 1e-5
        assert (shared - first).abs().max() < 1e-5


def test_parallel_alone(pipe, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="`torchrun` but this is a single process"):
        parallelise(pipe)


# -- the benchmark ---------------------------------------------------------------------------------------------------------------------------


def test_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        speed, "QUICK", ({"first-block cache": dict(threshold=0.2)}, {"int8 weights": {}}, {"bfloat16": {}})
    )
    monkeypatch.setattr(speed, "multiplies_bfloat16", lambda device: False)
    # these three have tests of their own
    monkeypatch.setattr(speed, "stream_memory", lambda pipe, lengths: [dict(frames=5, streamed=1, whole=1)])
    monkeypatch.setattr(
        speed,
        "measure_windows",
        lambda subject, frames, tasks: dict(
            frames=frames, windows=1, one_bytes=1, all_bytes=1, seconds=1.0, seam=1.0, inside=1.0
        ),
    )
    monkeypatch.setattr(
        speed, "reading_rates", lambda frames, runs: [dict(size=[80, 48], loop=1.0, exact=2.0, fast=3.0)]
    )
    out = tmp_path / "made" / "speed.json"
    assert speed.main(["--model", "tiny", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    report = SpeedReport.load(out)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    (model,) = report.models
    own = model["rows"][0]["steps"]
    assert f"everything recomputed | {own} |" in shown and "emulated here" in shown and str(out) in shown
    rows = {(row["name"], row["steps"]): row for row in SpeedReport.rows(model)}
    assert rows["everything recomputed", own]["ratio"] == 1 and rows["everything recomputed", own]["latents"] < 1e-5
    assert rows["exact", own]["psnr"] is None
    assert rows["exact", own]["gflop"] > rows["the next edit of the clip", own]["gflop"]
    near = rows["first-block cache (threshold 0.2)", 20]
    assert near["gflop"] < rows["exact", 20]["gflop"] and NEAR < near["psnr"] < 90
    assert SpeedReport.best(model, NEAR)["name"] == near["name"]
    assert set(report.start) == {"interpreter", "imports", "weights", "edit", "writing", "command"}
    assert all(seconds > 0 for seconds in report.start.values())
    assert "Reading" in shown and set(report.windows) == {"tiny"} and len(report.reading) == 1
    assert {"on", "threads", "torch"} <= set(report.hardware) and "diffusers" in report.versions


@pytest.mark.parametrize("told", [0.5, None])
def test_scores_name_their_world_and_may_lack_what_a_network_sees(pipe, monkeypatch, tmp_path, told):
    asked = {}

    def bench(pipe, **options):
        asked.update(options)
        return SimpleNamespace(
            rows={"add": dict(pooled=0.25, told_apart=told), "remove": dict(pooled=0.75, told_apart=told)}
        )

    monkeypatch.setattr(speed, "run_benchmark", bench)
    way = speed.Configuration("exact", "exact", 1, None)
    scores = speed._scores(speed.Subject("tiny", pipe, {}), way, 2, "easy")
    assert scores == dict(pooled=0.5, told_apart=told)
    assert (asked["difficulty"], asked["samples"], asked["steps"]) == ("easy", 2, 1)
    row = dict(
        name="exact",
        kind="recomputed",
        steps=1,
        gflop=1.0,
        bytes=1,
        runs=[1.0],
        seconds=1.0,
        latents=0.0,
        psnr=None,
        scores=scores,
    )
    report = SpeedReport(
        {}, {}, [dict(name="tiny", what="small", rows=[row], left_out={}, rate=1e9, difficulty="easy")]
    )
    shown = SpeedReport.load(report.save(tmp_path / "speed.json"))._repr_markdown_()
    assert f"| 0.50 | {'' if told is None else '50%'} |" in shown and "Scored on the world: easy." in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--runs", "0"], "--runs has to be at least 1 but is 0"),
        (["--out", "speed.txt"], "has to be a .json file"),
        (["--model", "5b", "--device", "cpu"], "has to run on a GPU"),
        (["--model", "huge"], "invalid choice"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_committed_report():
    report = SpeedReport.load(asset("benchmarks/speed.json"))
    assert {"tiny", "large"} <= {model["name"] for model in report.models} and set(report.windows) == {"tiny", "large"}
    assert report.reading and report.start
    for model in report.models:
        assert all(row["latents"] < 1e-5 for row in model["rows"] if row["kind"] in ("without", "recomputed"))
        if model["name"] == "tiny":
            assert {row["name"].removeprefix("without ") for row in model["rows"] if row["kind"] == "without"} == {
                name for name, saving in SAVINGS.items() if saving.saves == "every edit"
            }
        assert SpeedReport.best(model)["psnr"] >= 35


def test_subjects(tmp_path):
    with pytest.raises(ValueError, match="but is 'huge'"):
        speed.bench_subject("huge", tmp_path)
    large = speed.bench_subject("large", tmp_path, "cpu")
    assert str(large) == "8 layers of width 512, 17 frames of 128x128"
    one, other = large.edit(1, output_type="latent"), large.edit(1, output_type="latent")
    assert one.shape == (1, large.pipe.vae.config.z_dim, 17, 16, 16) and torch.equal(one, other)
    large.sample["reference"] = None
    # guidance says something although weights are random
    assert not torch.equal(large.edit(1, output_type="latent"), one)


def test_flops_are_those_of_an_edit(pipe):
    counted = speed.step_flops(speed.preset("tiny"), *SCENE.source.shape[:3])
    edit(pipe, 1, **CASES["reference"])
    one, two = (flops(lambda: edit(pipe, n, **CASES["reference"]))[0] for n in (1, 2))
    assert 0 < counted - (two - one) < 0.05 * counted  # the second step has keys, values and embeddings already


# long clips and reading


def test_seams_are_borders_where_other_windows_take_over():
    windows = latent_windows((5, 1, 1), (3, 1, 1), (1, 0, 0))  # latent frames 0-2 and 2-4
    clip = np.zeros((17, 4, 4, 3), np.uint8)
    for border, level in ((1, 10), (5, 20), (9, 30), (13, 40)):
        clip[border:] += np.uint8(level)  # from latent frame 0 to 1, 1 to 2, ...
    assert speed.seam_error(clip, windows) == dict(seam=25.0, inside=25.0)  # 20 and 30; 10 and 40
    target = np.zeros_like(clip)
    target[5:] += np.uint8(20)
    assert speed.seam_error(clip, windows, target) == dict(seam=15.0, inside=25.0)
    alone = speed.seam_error(clip, latent_windows((5, 1, 1), (2, 1, 1), (1, 0, 0)))
    assert np.isnan(alone["inside"]) and alone["seam"] == 25.0


def test_a_long_clip_is_measured_and_the_model_is_as_before(pipe):
    before = dict(pipe.config)
    found = speed.measure_windows(speed.Subject("tiny", pipe, {}), frames=21, tasks=("background",))
    assert found["windows"] == 2 and found["frames"] == 21 and found["all_bytes"] < 1.3 * found["one_bytes"]
    assert found["seam"] > 0 and found["inside"] > 0
    assert dict(pipe.config) == before and not pipe.memory.kept


def test_reading_is_measured_against_a_loop():
    pytest.importorskip("imageio")
    (row,) = speed.reading_rates(frames=6, sizes=((80, 48),), runs=1)
    assert row["size"] == [80, 48] and all(row[name] > 0 for name in ("loop", "exact"))
