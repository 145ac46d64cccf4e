"Video in and out: golden sizes and pixels, both decoders, what can be wrong with a file, and files that appear whole or not at all."

import gc, io, json, os, struct, subprocess, sys, threading, time, weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import common
from kiwi_edit import video
from kiwi_edit.core import InputError
from kiwi_edit.video import *
from kiwi_edit.video import _FORMATS, _RESIZES, _flatten

GOLDEN = Path(os.environ.get("KIWI_EDIT_GOLDEN", Path(__file__).parent / "golden")) / "wan22/cases"
TABLE = json.loads((GOLDEN / "resize.json").read_text())
PIXELS = load_file(GOLDEN / "resize.safetensors")


def gradient(count=12, height=48, width=64):
    "Smooth frames whose brightness tells their index and whose corners differ."
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 10 + 20 * t % 240)], -1) for t in range(count)]
    ).astype(np.uint8)


def encode(
    path, frames, fps=10, codec="libx264", pixels="yuv420p", fmt=None, sound=0.0, tags={}, context={}, **options
):
    "A video file made without the module under test; `sound` is the length of a tone that starts after half of it."
    with av.open(str(path), "w", format=fmt) as out:
        stream = out.add_stream(codec, rate=Fraction(fps), options={k: str(v) for k, v in options.items()})
        stream.metadata.update(tags)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        tone = out.add_stream("aac", rate=48000, layout="mono") if sound else None
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            picture.pts, picture.time_base = i, 1 / Fraction(fps)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        if tone:
            samples = (np.sin(np.arange(int(48000 * sound)) / 48000 * 2 * np.pi * 440) * 0.5).astype(np.float32)
            samples[: len(samples) // 2] = 0
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(tone.encode(frame))
            out.mux(tone.encode(None))
    return path


def turn(path, degrees):
    "Write a rotation into the track header of an mp4, as a phone does."
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (v << 16 for v in matrix)
    data[at + 40 : at + 76] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def loudness(path):
    "Root mean square of the first audio stream in tenths of a second."
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=48000)
        samples = np.concatenate([b.to_ndarray()[0] for f in container.decode(audio=0) for b in resampler.resample(f)])
    return np.array([np.sqrt((part**2).mean()) for part in np.array_split(samples, max(1, len(samples) // 4800))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def plain(folder):
    return encode(folder / "plain.mp4", gradient(), crf=10)


@pytest.fixture(scope="module")
def texture(folder):
    "24 frames of 320x240 with detail that moves."
    rng = np.random.default_rng(5)
    wide = np.asarray(
        Image.fromarray(rng.integers(0, 255, (30, 60, 3), dtype=np.uint8)).resize((480, 240), Image.BICUBIC)
    )
    return encode(folder / "texture.mp4", np.stack([wide[:, 5 * t : 5 * t + 320] for t in range(24)]), crf=12)


@pytest.fixture(scope="module")
def large(folder):
    "120 frames of 1920x1080."
    frames = np.repeat(gradient(2, 1080, 1920), 60, 0)
    return encode(folder / "large.mp4", frames, fps=30, preset="ultrafast", tune="zerolatency")


def pieces(path, chunk, ahead=2, **options):
    "A stream whose clips have so many frames."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_CHUNK", chunk)
        patch.setattr(video, "_AHEAD", ahead)
        yield from stream_video(path, **options)


# the official rules


@pytest.mark.parametrize("table", ["training_operator", "inference_video_data"])
def test_golden_sizes(table):
    for row in TABLE[table]:
        assert fit_size(row["width"], row["height"], row["max_pixels"], 32) == (row["out_width"], row["out_height"]), (
            row
        )


@pytest.mark.parametrize("table,limit", [("training", "num_frames"), ("inference_video_data", "max_frame")])
def test_golden_frame_counts(table, limit):
    for row in TABLE["frame_count"][table]:
        assert min(nearest_frame_count(row["file_frames"]), row[limit]) == row["used"], row


def test_golden_sampling():
    for count, chosen in TABLE["mllm_frame_sampling"].items():
        assert sample_indices(int(count)) == chosen


@pytest.mark.parametrize(
    "mode,name", [("training", "training_operator_max4096"), ("inference", "inference_video_data_max4096")]
)
def test_golden_pixels(mode, name):
    source = PIXELS["input"]
    out = resize_frames(source, *fit_size(source.shape[1], source.shape[0], 4096), mode=mode)[0]
    assert np.abs(out.astype(int) - PIXELS[name]).max() <= 1  # one level where Pillow's version differs


@pytest.mark.parametrize("width,height", [(8, 480), (480, 8), (31, 31), (1, 1), (8, 10000), (10000, 8)])
def test_narrow_sources_keep_one_multiple(width, height):
    w, h = fit_size(width, height, 4096, 32)
    assert w >= 32 and h >= 32 and w % 32 == h % 32 == 0 and w * h <= 4096
    for mode in ("training", "inference", "stretch"):
        assert resize_frames(np.zeros((1, height, width, 3), np.uint8), w, h, mode).shape == (1, h, w, 3)


def test_size_errors():
    with pytest.raises(ValueError, match="`width` has to be at least 1 but is 0"):
        fit_size(0, 10, 4096)
    with pytest.raises(ValueError, match="`max_pixels` .* 1024 but is 100"):
        fit_size(64, 64, 100)
    with pytest.raises(ValueError, match="`mode` has to be one of .* 'cover'"):
        resize_frames(gradient(1), 8, 8, "cover")


@pytest.mark.parametrize("bad", [0, -3, 4, 6, 80])
def test_frame_count_errors(bad):
    with pytest.raises(ValueError, match=rf"4k\+1 .* is {bad}; the nearest are"):
        check_frame_count(bad)
    assert check_frame_count(81) == 81


# frames


def test_as_frames_forms():
    frames = gradient(3)
    for form in (
        frames,
        frames / 255.0,
        (frames / 255).astype(np.float32),
        [Image.fromarray(f) for f in frames],
        list(frames),
        Clip(frames),
    ):
        assert np.array_equal(as_frames(form), frames)
    assert as_frames(frames[0]).shape == (1, 48, 64, 3) and as_frames(frames[..., 0]).shape == (3, 48, 64, 3)
    assert as_frames(frames[..., :1]).shape == (3, 48, 64, 3)


def test_a_gray_clip_three_pixels_wide():
    "As an array it looks like one frame in colour, so it comes with a fourth axis or as a list of frames."
    clip = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for form in (clip[..., None], list(clip)):
        frames = as_frames(form)
        assert frames.shape == (4, 5, 3, 3) and (frames == clip[..., None]).all()
    assert np.array_equal(as_frames(clip), clip[None])


@pytest.mark.parametrize(
    "bad,words",
    [
        ([], "at least one frame"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no empty axis"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"\(2, 4, 4, 4\)"),
        (np.full((1, 4, 4, 3), 7.0), r"spans \[7, 7\]"),
        (np.full((1, 4, 4, 3), np.nan), "nan"),
        (np.zeros((1, 4, 4, 3), np.int64), "int64"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "of one shape"),
    ],
)
def test_as_frames_errors(bad, words):
    with pytest.raises(InputError, match=words):
        as_frames(bad)


def test_clip_slices_know_their_seconds():
    clip = Clip(gradient(12), fps=4, start=10.0)
    assert (clip.end, len(clip), clip.width, clip.height) == (13.0, 12, 64, 48)
    part = clip[4:8]
    assert (part.start, part.end, part.fps) == (11.0, 12.0, 4) and np.array_equal(part.frames, clip.frames[4:8])
    assert clip[::3].fps == pytest.approx(4 / 3) and clip[::3].end == 13.0
    assert np.array_equal(np.asarray(clip[-1]), clip.frames[-1])
    with pytest.raises(IndexError):
        clip[5:5]
    with pytest.raises(InputError, match="`fps`"):
        Clip(gradient(1), fps=0)


@pytest.mark.parametrize("shape", [(5, 64, 64), (1, 8, 300), (40, 180, 320)])
def test_clip_shows_itself(shape):
    count, height, width = shape
    data = Clip(gradient(count, height, width), fps=8)._repr_png_()
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and image.width <= 240 and image.height <= 120
        assert getattr(image, "n_frames", 1) == min(count, 12)
    assert len(data) < 150_000


# images


def test_read_image_modes(tmp_path):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (6, 10, 3), dtype=np.uint8))
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png")) == 255).all()  # transparency shows white
    rgb.quantize(8).save(tmp_path / "palette.png")
    rgb.quantize(8).save(tmp_path / "seethrough.png", transparency=bytes([0] * 8))
    assert read_image(tmp_path / "palette.png").mode == "RGB"
    assert (np.asarray(read_image(tmp_path / "seethrough.png")) == 255).all()
    gray = rng.integers(0, 255, (6, 10), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    for name in ("gray.png", "gray16.png"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.repeat(gray[..., None], 3, -1))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(gray > 100).save(tmp_path / "bits.png")
    for name in ("cmyk.jpg", "bits.png"):
        assert read_image(tmp_path / name).mode == "RGB"


@pytest.mark.parametrize("level", [100, 255, 256, 2000])
def test_sixteen_bits_that_are_dark_stay_dark(tmp_path, level):
    Image.fromarray(np.full((4, 4), level, np.uint16)).save(tmp_path / "dark.png")
    assert (np.asarray(read_image(tmp_path / "dark.png")) == round(level / 257)).all()


@pytest.mark.parametrize("width", [4, 10])
def test_read_image_arrays(width):
    rgba = np.random.default_rng(0).integers(0, 256, (6, width, 4), dtype=np.uint8)
    expected = np.asarray(_flatten(Image.fromarray(rgba)))
    for form in (rgba, rgba / 255, (rgba / 255).astype(np.float32), np.asfortranarray(rgba)):
        assert np.array_equal(np.asarray(read_image(form)), expected)
    gray = np.repeat(rgba[..., :1], 3, -1)
    for form in (rgba[..., 0], rgba[..., :1], gray, gray / 255):
        assert np.array_equal(np.asarray(read_image(form)), gray)
    for form in (rgba, rgba[None], [rgba, rgba]):
        with pytest.raises(InputError, match="without transparency, which `read_image` lays on white, but is .*4\\)"):
            as_frames(form)


def test_read_image_errors(tmp_path):
    (tmp_path / "text.png").write_text("text")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image(tmp_path / "none.png")
    for bad, words in (("text.png", "is none"), ("cut.png", "complete image"), ("", "is a folder")):
        with pytest.raises(InputError, match=words) as error:
            read_image(tmp_path / bad)
        assert "\n" not in str(error.value)


def test_huge_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(gradient(1)[0]).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="`path`"):
        read_image(tmp_path / "bomb.png")


# reading


def test_read_all_and_some(plain):
    clip = read_video(plain)
    assert clip.frames.shape == (12, 48, 64, 3) and clip.fps == 10 and clip.path == plain
    assert np.abs(clip.frames.astype(int) - gradient()).mean() < 4
    part = read_video(plain, indices=[2, 6, 10])
    assert np.array_equal(part.frames, clip.frames[[2, 6, 10]]) and part.fps == pytest.approx(2.5)
    assert part.start == pytest.approx(0.2)
    assert np.array_equal(read_video(plain, indices=[0, 11]).frames, clip.frames[[0, 11]])
    assert np.array_equal(read_video(plain, size=(32, 32)).frames, resize_frames(clip.frames, 32, 32))


@pytest.mark.parametrize("degrees,turns", [(90, 3), (180, 2), (270, 1)])
def test_rotation_metadata(folder, plain, degrees, turns):
    path = folder / f"turned{degrees}.mp4"
    path.write_bytes(plain.read_bytes())
    turn(path, degrees)
    expected = np.rot90(read_video(plain).frames, turns, axes=(1, 2))
    info, clip = video_info(path), read_video(path)
    assert (info.width, info.height) == (clip.width, clip.height) == (expected.shape[2], expected.shape[1])
    assert np.array_equal(clip.frames, expected)


def test_a_tag_of_transparency_on_another_codec_is_passed_over(folder):
    frames = np.full((3, 48, 64, 3), 90, np.uint8)
    path = encode(folder / "tagged.mkv", frames, tags=dict(alpha_mode="1"))
    assert read_video(path).frames.shape == (3, 48, 64, 3)


def shown(clip):
    return [int(f[..., 2].mean().round()) for f in clip.frames]


@pytest.mark.parametrize(
    "name,options",
    [
        ("bframes.mp4", dict(bf=3, g=8)),
        ("opengop.mp4", {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}),
        ("bframes.mkv", dict(bf=3, g=8)),
        ("bframes.avi", dict(bf=3, g=8)),
        ("stream.ts", dict(bf=2, g=8)),
    ],
)
def test_any_index_is_the_right_frame(folder, name, options):
    frames = gradient(60)
    frames[..., 2] = (np.arange(60) * 4)[:, None, None]
    frames[..., :2] = 128  # a gray level a frame, and nothing else: an index that is off by one shows
    path = encode(folder / name, frames, crf=4, **options)
    everything = read_video(path)
    assert len(everything) == 60 and np.abs(np.diff(shown(everything)) - 4).max() <= 2
    for chosen in ([0], [7, 8, 9], [31, 59], [3, 17, 40, 41, 58]):
        assert np.array_equal(read_video(path, indices=chosen).frames, everything.frames[chosen]), (name, chosen)
    assert video_info(path).fps == pytest.approx(10)


def test_seeking_decodes_little(folder, monkeypatch):
    path = encode(folder / "keys.mp4", gradient(100), g=10, bf=0)
    decoded = []
    original = video._decode

    def counted(*args):
        for frame in original(*args):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    assert np.array_equal(read_video(path, indices=[5, 95]).frames.shape, (2, 48, 64, 3))
    assert len(decoded) < 30


@pytest.mark.parametrize(
    "codec,pixels,suffix",
    [
        ("libx264", "yuv420p10le", "mp4"),
        ("libx265", "yuv420p10le", "mp4"),
        ("libvpx-vp9", "yuv420p", "webm"),
        ("ffv1", "bgr0", "mkv"),
        ("mjpeg", "yuvj420p", "avi"),
        ("libx264", "gray", "mp4"),
        ("libx264", "yuv444p", "mp4"),
    ],
)
def test_formats(folder, codec, pixels, suffix):
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is not in this build of FFmpeg")
    path = encode(folder / f"{codec}-{pixels}.{suffix}", gradient(), codec=codec, pixels=pixels)
    info, clip = video_info(path), read_video(path)
    assert clip.frames.shape == (12, 48, 64, 3) and info.frames == 12 and clip.fps == pytest.approx(10, rel=0.02)
    expected = gradient() if pixels != "gray" else np.repeat((gradient() @ [0.299, 0.587, 0.114])[..., None], 3, -1)
    assert np.abs(clip.frames.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("height,width", [(48, 8), (8, 8), (97, 161), (2160, 3840)])
def test_sizes(folder, height, width):
    path = encode(folder / f"{width}x{height}.mp4", gradient(2, height, width), pixels="yuv444p", preset="ultrafast")
    assert read_video(path).frames.shape == (2, height, width, 3)
    assert read_video(path, num_frames=1, size=(32, 16)).frames.shape == (1, 16, 32, 3)


def test_truncated(folder):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    whole = write_video(folder / "whole.mp4", frames, 10)
    data = whole.read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    clip = read_video(folder / "cut.mp4")
    assert 5 <= len(clip) < 20 and np.array_equal(clip.frames[:5], read_video(whole).frames[:5])
    assert video_info(folder / "cut.mp4").frames < 20  # what is there, not what the header promises
    with pytest.raises(ValueError, match="`indices` have to ascend"):
        read_video(folder / "cut.mp4", indices=[0, 19])
    late = encode(folder / "late.mp4", frames)  # the index comes last and is lost
    late.write_bytes(late.read_bytes()[:3000])
    with pytest.raises(InputError, match="late.mp4"):
        read_video(late)


def test_damaged_middle(folder):
    path = encode(
        folder / "damaged.mp4", np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8), g=5
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4000] = np.random.default_rng(1).bytes(4000)
    path.write_bytes(data)
    clip = read_video(path)
    assert 20 <= len(clip) <= 40


def test_gif_and_folder(tmp_path):
    frames = gradient(12)
    images = [Image.fromarray(f) for f in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    clip = read_video(tmp_path / "a.gif", indices=range(2, 7))
    assert clip.frames.shape == (5, 48, 64, 3) and clip.fps == 10
    assert np.abs(clip.frames.astype(int) - frames[2:7]).mean() < 12
    (tmp_path / "shots").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / f"shots/shot{i}.png")
    (tmp_path / "shots/notes.txt").write_text("not an image")
    assert np.array_equal(read_video(tmp_path / "shots").frames, frames)  # 2 comes before 10
    Image.fromarray(frames[0, :, :32]).save(tmp_path / "shots/shot99.png")
    with pytest.raises(InputError, match="one size .* 64x48 and, at frame 12, 32x48"):
        read_video(tmp_path / "shots")
    assert read_video(tmp_path / "shots", size=(32, 48)).frames.shape == (13, 48, 32, 3)


@pytest.mark.parametrize("kind", [kind for kind in ("gif", "png", "webp", "avif") if kind.upper() in _FORMATS])
def test_rate_of_animations(tmp_path, kind):
    images = [Image.fromarray(f) for f in gradient(6)]
    images[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=images[1:], duration=40)
    info, clip = video_info(tmp_path / f"a.{kind}"), read_video(tmp_path / f"a.{kind}")
    assert info.frames == 6 and info.fps == clip.fps == pytest.approx(25)
    assert np.abs(clip.frames.astype(int) - gradient(6)).mean() < 12


def test_names_that_look_like_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("take:3").mkdir()
    for name in ("take2:final.mp4", "take:3/a.mp4"):
        write_video(name, gradient(5), 10)
        assert len(read_video(name)) == video_info(name).frames == 5


def test_bad_files(tmp_path, capfd):
    (tmp_path / "text.mp4").write_text("this is text\n" * 50)
    (tmp_path / "text.txt").write_text("this is text\n" * 50)  # FFmpeg would draw it
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    for name in ("text.mp4", "text.txt", "list.mp4", "empty.mp4", "nothing"):
        for call in (read_video, video_info):
            with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
                call(tmp_path / name)
            assert "\n" not in str(error.value) and "`path`" in str(error.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_video(tmp_path / "none.mp4")
    assert capfd.readouterr().err == ""  # the decoder says nothing


def test_sound_without_pictures(tmp_path):
    path = encode(tmp_path / "a.mp4", gradient(2), sound=0.5)
    with av.open(str(path)) as source, av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    with pytest.raises(InputError, match="no video stream"):
        read_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(num_frames=0), "`num_frames` has to be at least 1 but is 0"),
        (dict(indices=[]), "`indices` have to hold"),
        (dict(indices=[3, 2]), r"`indices` have to ascend .* \[3, 2\]"),
        (dict(indices=[12]), "at most 11"),
        (dict(size=(8, 8), mode="tile"), "`mode`"),
        (dict(size=(0, 8)), "`width` and `height`"),
    ],
)
def test_argument_errors(plain, options, words):
    with pytest.raises(ValueError, match=words):
        read_video(plain, **options)


def test_memory_is_bounded(plain, monkeypatch):
    monkeypatch.setattr(video, "_MAX_CLIP_BYTES", 64 * 48 * 3 * 6)
    with pytest.raises(InputError, match="12 frames of 64x48"):
        read_video(plain)
    assert len(read_video(plain, num_frames=6)) == 6 and len(read_video(plain, size=(16, 16))) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@pytest.mark.parametrize(
    "code",
    [
        "count = 15 * len(read_video(sys.argv[1], indices=sample_indices(120, 8), size=(64, 32)))",
        "video._CHUNK = 4; count = sum(len(clip) for clip in stream_video(sys.argv[1]))  # not resized",
    ],
)
def test_long_videos_need_little_memory(large, code):
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    start = f"import resource, sys; from kiwi_edit import video; from kiwi_edit.video import *; before = {peak}"
    code = f"{start}\n{code}\nprint(({peak} - before) // 1024, count)"
    environment = os.environ | {"PYTHONPATH": str(Path(video.__file__).parents[1])}
    out = subprocess.check_output([sys.executable, "-c", code, str(large)], text=True, env=environment)
    peak, count = map(int, out.split())
    assert count == 120 and peak < 250  # all 120 frames would take 746 MB


# what a player shows

CASES = Path(__file__).parent / "cases"
COLOURS = dict(
    red=(255, 0, 0),
    lime=(0, 255, 0),
    blue=(0, 0, 255),
    yellow=(255, 255, 0),
    white=(255, 255, 255),
    gray=(128, 128, 128),
)


def colour(pixel):
    return min(COLOURS, key=lambda name: np.abs(np.subtract(COLOURS[name], pixel)).sum())


def corners(frame):
    return " ".join(colour(frame[y, x]) for y, x in ((8, 8), (8, -8), (-8, 8), (-8, -8)))


def four_corners(count=6, width=128, height=96):
    frame = np.full((height, width, 3), 128, np.uint8)
    for rows, columns, name in (
        (slice(24), slice(32), "red"),
        (slice(24), slice(-32, None), "lime"),
        (slice(-24, None), slice(32), "blue"),
        (slice(-24, None), slice(-32, None), "yellow"),
    ):
        frame[rows, columns] = COLOURS[name]
    return np.repeat(frame[None], count, axis=0)


def frames_of(path):
    "All frames, after a look whether every way of reading gives them."
    frames, info = read_video(path).frames, video_info(path)
    assert frames.shape[:3] == (info.frames, info.height, info.width)
    assert np.array_equal(np.concatenate([part.frames for part in pieces(path, chunk=5)]), frames)
    some = sorted({len(frames) // 2, len(frames) - 1})
    assert np.array_equal(read_video(path, indices=some).frames, frames[some])
    small = read_video(path, size=(32, 24), mode="stretch").frames
    assert np.array_equal(small, resize_frames(frames, 32, 24, "stretch"))
    return frames


def first_sound(path):
    "(second of the first sound, its pitch in Hz)."
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=48000)
        samples = np.concatenate([b.to_ndarray()[0] for f in container.decode(audio=0) for b in resampler.resample(f)])
    return np.argmax(np.abs(samples) > 0.1) / 48000, np.abs(np.fft.rfft(samples)).argmax() * 48000 / len(samples)


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_all_display_matrices(folder, plain, matrix):
    data, shown = bytearray(plain.read_bytes()), read_video(plain).frames[3]
    a, b, c, d = matrix
    at = data.index(b"tkhd") + 4
    data[at + 40 : at + 76] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path = folder / "matrix.mp4"
    path.write_bytes(data)
    y, x = np.mgrid[:48, :64]
    columns, rows = a * x + c * y, b * x + d * y  # where the matrix says that each pixel goes
    columns, rows = columns - columns.min(), rows - rows.min()
    expected = np.empty((rows.max() + 1, columns.max() + 1, 3), np.uint8)
    expected[rows, columns] = shown
    assert np.array_equal(frames_of(path)[3], expected)


def test_square_pixels_come_out(folder):
    frames = frames_of(CASES / "sar43.mp4")
    assert frames.shape[1:3] == (96, 128) and corners(frames[3]) == "red lime blue yellow"
    for ratio, size in ((Fraction(3, 4), (128, 128)), (Fraction(16, 9), (96, 228)), (Fraction(1440, 1439), (96, 128))):
        encode(folder / "ratio.mkv", four_corners(3), context=dict(sample_aspect_ratio=ratio))
        frames = frames_of(folder / "ratio.mkv")
        assert frames.shape[1:3] == size and corners(frames[1]) == "red lime blue yellow", ratio


@pytest.mark.parametrize("name,rate", [("f23976.mkv", Fraction(24000, 1001)), ("f60.mkv", Fraction(60))])
def test_rates_are_the_containers(tmp_path, name, rate):
    frames_of(CASES / name)
    with av.open(str(write_video(tmp_path / "out.mp4", read_video(CASES / name)))) as container:
        assert container.streams.video[0].average_rate == rate


@pytest.mark.parametrize("rate", ["30000/1001", "60000/1001", "15/2", "25", "240"])
def test_rates_in_milliseconds_are_exact(folder, rate):
    for suffix in ("mkv", "flv", "ts"):
        encode(folder / f"rate.{suffix}", gradient(48), rate)
        info = video_info(folder / f"rate.{suffix}")
        assert Fraction(info.fps).limit_denominator(1001) == Fraction(rate) and info.frames == 48, suffix


def test_picture_and_sound_stay_together(tmp_path):
    clip = read_video(CASES / "vfr.mp4")
    assert (clip.fps, len(frames_of(CASES / "vfr.mp4")), video_info(CASES / "vfr.mp4").duration) == (30, 90, 3)
    back = read_video(out := clip.save(tmp_path / "out.mp4"))
    white = [(frame.min(axis=-1) > 200).sum() > 20 for frame in back.frames]
    assert np.argmax(white) / back.fps == pytest.approx(1.5, abs=1 / 30)
    assert first_sound(out)[0] == pytest.approx(1.49, abs=0.03)
    late = read_video(CASES / "vfr.mp4", indices=range(60, 80))
    assert (late.start, late.end) == (pytest.approx(2), pytest.approx(2 + 20 / 30))
    assert np.array_equal(late.frames, clip.frames[60:80])


@pytest.mark.parametrize("suffix", ["mkv", "ts", "nut"])
@pytest.mark.parametrize(
    "gaps",
    [
        [1 / 30] * 30 + [0.25] * 8,
        [0.25] * 6 + [1 / 30] * 40,
        [(1 + (i % 7 == 3)) / 30 for i in range(60)],
        [0.5, 2, 0.5, 0.04, 0.04, 1],
    ],
)
def test_pictures_come_when_their_stamps_say(folder, suffix, gaps):
    times = np.cumsum([0, *gaps[:-1]])
    shades = np.linspace(20, 230, len(times)).round().astype(np.uint8)
    path = folder / f"stamps.{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options=dict(crf="1", g="12"))
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = (
            64,
            48,
            "yuv420p",
            Fraction(1, 1000),
        )
        for time, shade in zip(times, shades):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    frames, fps = frames_of(path), video_info(path).fps
    for i, frame in enumerate(frames):
        near = shades[
            [np.searchsorted(times, i / fps + d, "right") - 1 for d in (-0.51 / fps, 0.51 / fps) if i / fps + d >= 0]
        ]
        assert near.min() - 3 <= frame.mean() <= near.max() + 3, i
    assert fps <= 60 and len(frames) / fps >= times[-1]


@pytest.mark.parametrize("kind", [kind for kind in ("gif", "png", "webp", "avif") if kind.upper() in _FORMATS])
def test_delays_of_animations(tmp_path, kind):
    images = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (20, 120, 220)]
    images[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=images[1:], duration=[100, 500, 200])
    clip = read_video(tmp_path / f"a.{kind}")
    assert (clip.fps, clip.end) == (10, pytest.approx(0.8))
    assert clip.frames.mean(axis=(1, 2, 3)) == pytest.approx([20] + [120] * 5 + [220] * 2, abs=6)
    assert np.array_equal(
        np.concatenate([part.frames for part in pieces(tmp_path / f"a.{kind}", chunk=3)]), clip.frames
    )


@pytest.mark.parametrize("delays,seconds", [([100, 100, 3000], 3.2), ([100, 1900, 100], 2.1)])
def test_a_picture_that_is_held_keeps_its_time(tmp_path, delays, seconds):
    images = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (20, 120, 220)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=delays)
    clip = read_video(tmp_path / "a.gif")
    assert clip.end == pytest.approx(seconds, abs=0.11)
    assert video_info(tmp_path / "a.gif").duration == pytest.approx(seconds, abs=0.11)
    shown = [int((np.abs(clip.frames.mean(axis=(1, 2, 3)) - shade) < 8).sum()) / clip.fps for shade in (20, 120, 220)]
    assert shown == pytest.approx([delay / 1000 for delay in delays], abs=0.11)


@pytest.mark.parametrize("brand", [b"heic", b"mif2", b"miaf", b"hevm"])
def test_photos_in_the_container_of_films_are_refused(tmp_path, brand):
    data = bytearray((CASES / "grid.heic").read_bytes())
    data[8:12] = brand
    (tmp_path / "a.heic").write_bytes(data)
    with pytest.raises(InputError, match="HEIF"):
        read_video(tmp_path / "a.heic")


def test_light_beyond_white_is_toned_down(folder):
    frame = frames_of(CASES / "hlg.mov")[3]
    assert frame[48, 64].tolist() == pytest.approx([128] * 3, abs=15) and frame.min(axis=-1).max() >= 235
    assert frame[8, 8, 0] >= 220 and frame[8, 8, 1:].max() <= 40
    ramp = np.repeat(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], 3, -1).repeat(96, 0)[None].repeat(3, 0)
    for transfer, white in (
        (18, 0.75),
        (16, 0.58),
        (14, 1),
    ):  # HLG, PQ, BT.2020 as bright as paper: what a white sheet is coded as
        path = folder / "ramp.mkv"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p10le"
            for frame in ramp:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                    format="yuv420p10le", dst_colorspace="BT2020"
                )
                (
                    stream.codec_context.colorspace,
                    stream.codec_context.color_primaries,
                    stream.codec_context.color_trc,
                ) = 9, 9, transfer
                out.mux(stream.encode(picture))
            out.mux(stream.encode(None))
        line = frames_of(path)[1, 48].astype(int)
        assert (np.diff(line[:, 0]) >= -1).all()
        assert np.ptp(line, axis=-1).max() <= 6  # gray stays gray, brighter stays brighter
        assert 235 <= line[round(white * 127), 0] and line[round(white * 127), 0] < 250 or transfer == 14
        assert line[-1, 0] >= 250


def test_high_definition_without_tags_is_bt709(folder):
    frame = frames_of(CASES / "hd_untagged709.mp4")[3]
    assert frame[40, 40].tolist() == pytest.approx((253, 0, 0), abs=4)
    assert frame[40, -40].tolist() == pytest.approx((0, 253, 0), abs=4)


def test_colours_that_nobody_converts_are_refused(folder):
    path = folder / "ycgco.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.colorspace = 128, 96, "yuv444p", 8
        for frame in four_corners(2):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv444p")
            picture.colorspace = 8
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    with pytest.raises(InputError, match="matrix 8"):
        read_video(path)


@pytest.mark.parametrize(
    "codec,pixels,suffix",
    [("prores_ks", "yuva444p10le", "mov"), ("png", "rgba", "mov"), ("qtrle", "argb", "mov"), ("ffv1", "bgra", "mkv")],
)
def test_transparent_clips_lie_on_white(folder, codec, pixels, suffix):
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is not in this build of FFmpeg")
    clear = np.concatenate([four_corners(), np.full((6, 96, 128, 1), 255, np.uint8)], axis=-1)
    clear[:, :48, 64:, 3], clear[:, 48:, 64:, 3] = 0, 128
    path = encode(folder / f"clear.{suffix}", clear, 10, codec, pixels)
    frames = frames_of(path)
    assert (frames[:, 4:40, 72:] > 250).all() and frames[3, 60, 80].tolist() == pytest.approx([191] * 3, abs=8)
    assert colour(frames[3, 8, 8]) == "red"


@pytest.mark.parametrize("name", ["alpha_vp9.webm", "alpha_prores.mov"])
def test_a_transparent_half_is_white(name):
    frames = frames_of(CASES / name)
    assert (frames[:, :, 68:] > 250).all() and (frames[:, 40:56, :60] < 250).any()


@pytest.mark.parametrize("first", ["top", "bottom"])
def test_half_pictures_become_whole_ones(folder, first):
    frames = np.full((10, 96, 128, 3), 30, np.uint8)
    for t, frame in enumerate(frames):
        for half in (0, 1):
            frame[half if first == "top" else 1 - half :: 2, 8 * t + 4 * half : 8 * t + 4 * half + 16] = 220
    field = {"x264-params": "tff=1" if first == "top" else "bff=1"}
    path = encode(folder / f"{first}.mp4", frames, 25, crf=4, **field)
    for clip, starts in ((frames_of(path), (40, 44)), (frames_of(CASES / "interlaced.mp4"), (44, 48))):
        bright = clip[5, 8:88, :, 0] > 125
        start = np.flatnonzero(bright[0])[0]
        assert start in starts and all(np.flatnonzero(row).tolist() == list(range(start, start + 16)) for row in bright)


def test_the_default_track_is_kept(tmp_path):
    frames_of(CASES / "two_audio.mkv")
    assert first_sound(read_video(CASES / "two_audio.mkv").save(tmp_path / "out.mp4"))[1] == pytest.approx(3000, abs=20)


def test_another_size_in_the_middle_is_fitted_to_the_first(folder):
    frames = frames_of(CASES / "reschange.ts")
    assert frames.shape == (12, 96, 128, 3) and corners(frames[1]) == "red red red red"
    assert corners(frames[10]) == "blue blue blue blue"


def test_photos_in_a_film_container_are_refused():
    for call in (video_info, read_video, read_image):
        with pytest.raises(InputError, match="has to be .*image.*grid.heic"):
            call(CASES / "grid.heic")


@pytest.mark.parametrize("name", ["exif_neg.jpg", "exif_ascii_in_rational.jpg", "bad_exif_struct.jpg"])
def test_of_exif_only_the_orientation_counts(name):
    image, info = read_image(CASES / name), video_info(CASES / name)
    assert image.size == (info.width, info.height) == (96, 128) and corners(np.asarray(image)).startswith("blue")
    assert np.array_equal(read_video(CASES / name).frames[0], np.asarray(image))
    assert np.array_equal(_flatten(image), image)  # it is turned once


def test_any_exif_can_be_read(tmp_path):
    data, rng = (CASES / "exif_neg.jpg").read_bytes(), np.random.default_rng(0)
    start = data.index(b"Exif") + 6
    end = start - 8 + int.from_bytes(data[start - 8 : start - 6], "big")
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(start, end, 3):
            damaged[at] = rng.integers(256)
        (tmp_path / "a.jpg").write_bytes(damaged)
        assert (
            sorted(read_image(tmp_path / "a.jpg").size)
            == [96, 128]
            == sorted([video_info(tmp_path / "a.jpg").width, video_info(tmp_path / "a.jpg").height])
        )


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_all_orientations(tmp_path, tag, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / f"a.{kind}"
    Image.fromarray(gradient(1)[0]).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(expected, np.asarray(read_image(path)))
    assert (video_info(path).height, video_info(path).width) == expected.shape[:2]


def test_profiles_of_pictures(tmp_path):
    frame = np.asarray(read_image(CASES / "icc_adobe.jpg"))
    for at, rgb in (
        ((8, 8), (200, 60, 40)),
        ((8, -8), (40, 180, 60)),
        ((-8, 8), (50, 60, 190)),
        ((-8, -8), (220, 200, 60)),
    ):
        assert frame[at].tolist() == pytest.approx(rgb, abs=4)
    with Image.open(CASES / "icc_adobe.jpg") as image:
        profile, clear = image.info["icc_profile"], image.convert("RGBA")
        expected = frame[8, 8].tolist()
        clear.putalpha(
            Image.fromarray(
                np.repeat(np.arange(image.height)[:, None] < image.height // 2, image.width, 1).astype(np.uint8) * 255
            )
        )
        clear.save(tmp_path / "clear.png", icc_profile=profile)
        # of another kind of colours: it says nothing
        image.convert("L").save(tmp_path / "gray.png", icc_profile=profile)
        image.convert("RGB").save(tmp_path / "broken.png", icc_profile=profile[:200])
        plain = np.asarray(image.convert("RGB"))
    on_white = np.asarray(read_image(tmp_path / "clear.png"))
    assert on_white[8, 8].tolist() == pytest.approx(expected, abs=2) and (on_white[-8:] == 255).all()
    tags = (
        (b"wtpt", b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)),
        (b"kTRC", b"curv" + bytes(4) + struct.pack(">IHxx", 1, 256)),
    )
    table = b"".join(name + struct.pack(">II", 156 + 20 * i, len(tag)) for i, (name, tag) in enumerate(tags))
    head = (
        struct.pack(">IxxxxI12s", 192, 0x02100000, b"mntrGRAYXYZ ")
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + struct.pack(">3i", 63190, 65536, 54061)
    )
    linear = head.ljust(128, b"\0") + struct.pack(">I", 2) + table + b"".join(tag for _, tag in tags)
    for mode in ("L", "LA", "I;16"):
        Image.new("L" if mode == "L" else mode, (8, 8), {"L": 128, "LA": (128, 255), "I;16": 128 * 257}[mode]).save(
            tmp_path / "linear.png", icc_profile=linear
        )
        assert read_image(tmp_path / "linear.png").getpixel((3, 3)) == pytest.approx((188, 188, 188), abs=2), mode
    assert read_image(tmp_path / "gray.png").mode == "RGB"
    assert np.array_equal(np.asarray(read_image(tmp_path / "broken.png")), plain)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_names_that_are_no_unicode(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    folder.mkdir()
    path = write_video(folder / os.fsdecode(b"caf\xe9.mp4"), gradient(5), 10)
    assert video_info(path).frames == 5
    assert len(read_video(path)) == sum(map(len, stream_video(path))) == 5
    assert len(read_video(write_video(folder / os.fsdecode(b"\xe8.gif"), gradient(3), 10))) == 3


# writing


@pytest.mark.parametrize("height,width", [(48, 64), (47, 63), (1, 1), (8, 8)])
def test_write_for_browsers(tmp_path, height, width):
    frames = gradient(6, height, width)
    path = write_video(tmp_path / "out.mp4", frames, 12)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, container.streams.video[0].average_rate) == ("h264", "yuv420p", 12)
    back = read_video(path)
    # an odd side gets its last line once more
    assert back.frames.shape == (6, height + height % 2, width + width % 2, 3)
    # colours of 2x2 pixels are one
    assert np.abs(back.frames[:, :height, :width].astype(int) - frames).mean() < (6 if width > 8 else 12)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("fps", [0.5, 23.976, 29.97, 120])
def test_rates_survive(tmp_path, fps):
    assert video_info(write_video(tmp_path / "a.mp4", gradient(10), fps)).fps == pytest.approx(fps, rel=1e-4)


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_very_slow_clips(tmp_path, suffix):
    assert video_info(write_video(tmp_path / f"a.{suffix}", gradient(3), 0.01)).fps == pytest.approx(0.01)
    assert video_info(write_video(tmp_path / f"b.{suffix}", iter([Clip(gradient(3), fps=1e-6)]))).fps == pytest.approx(
        0.01
    )


def test_write_gif(tmp_path):
    clip = read_video(write_video(tmp_path / "a.gif", Clip(gradient(8), fps=8)))
    assert len(clip) == 8 and clip.fps == pytest.approx(8, rel=0.01)
    assert np.abs(clip.frames.astype(int) - gradient(8)).mean() < 12


def test_sound_of_the_span(tmp_path):
    source = encode(tmp_path / "source.mp4", gradient(40), fps=10, sound=4.0)  # silent for 2 s, then a tone
    assert video_info(source).has_audio
    quiet, loud = read_video(source, indices=range(5, 15)), read_video(source, indices=range(25, 35))
    for clip, level in ((quiet, 0), (loud, 0.35)):
        path = clip.save(tmp_path / f"part{level}.mp4")
        assert video_info(path).frames == 10
        parts = loudness(path)
        assert len(parts) in (10, 11) and parts[1:9] == pytest.approx(np.full(8, level), abs=0.03)
    edge = loudness(read_video(source, indices=range(10, 30)).save(tmp_path / "edge.mp4"))
    assert edge[8] < 0.03 < 0.3 < edge[11]  # the tone starts in the middle, where it should
    assert not video_info(loud.save(tmp_path / "mute.mp4", audio=False)).has_audio
    assert not video_info(write_video(tmp_path / "b.mp4", gradient(4), 10, audio_from=tmp_path / "mute.mp4")).has_audio
    # a path: from the beginning
    assert loudness(write_video(tmp_path / "c.mp4", gradient(5), 10, audio_from=source))[:4].max() < 0.03
    with pytest.raises(FileNotFoundError, match="`audio_from`"):
        write_video(tmp_path / "d.mp4", gradient(2), 10, audio_from=tmp_path / "none.mp4")


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        write_video(path, gradient(2))
    assert path.read_text() == "precious"
    assert video_info(write_video(path, gradient(2), overwrite=True)).frames == 2
    assert path.stat().st_mode & 0o777 == 0o666 & ~(lambda mask: (os.umask(mask), mask)[1])(os.umask(0))


@pytest.mark.parametrize(
    "path,error,words",
    [
        ("a.webm", ValueError, "has to end in .mp4"),
        ("nowhere/a.mp4", FileNotFoundError, "existing folder"),
        ("", ValueError, "has to end in"),
    ],
)
def test_bad_destinations(tmp_path, path, error, words):
    with pytest.raises(error, match=words):
        write_video(tmp_path / path, gradient(2))
    assert not list(tmp_path.iterdir())


def test_read_only_folder(tmp_path):
    place = tmp_path
    if os.access(place, os.W_OK):
        place.chmod(0o500)
    if os.access(place, os.W_OK):  # root may write anywhere but there
        if not Path("/proc/self").is_dir():
            pytest.skip("no folder that this user cannot write to")
        place = Path("/proc")
    with pytest.raises(PermissionError, match="can be written") as error:
        write_video(place / "a.mp4", gradient(2))
    assert "\n" not in str(error.value)
    tmp_path.chmod(0o700)


@pytest.mark.skipif(common.resource is None, reason="needs a limit of file size")
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "strip.png"])
def test_full_disk(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=f"{name}.*File too large"), common.full_disk(50_000):
        film_strip(noise, height=4).save(tmp_path / name) if name == "strip.png" else write_video(
            tmp_path / name, noise
        )
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    done = []

    def interrupted(frames, *args, **kwargs):
        done.append(1)
        if len(done) > 3:
            raise KeyboardInterrupt
        return frames

    monkeypatch.setattr(np, "pad", interrupted)
    (tmp_path / "a.mp4").write_text("the old one")
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", gradient(8), overwrite=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.mp4", "the old one")]


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(fps=0), "`fps`"),
        (dict(fps=1e-4), "`fps` has to be from 0.01 to 1000 but is 0.0001"),
        (dict(fps=float("nan")), "`fps`"),
        (dict(fps=8, crf=70), "`crf`"),
    ],
)
def test_write_arguments(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "a.mp4", gradient(2), **options)


# the same, faster


def one_at_a_time(path, size, mode):
    "Decode a frame, resize it by Pillow, go on: what everything faster has to equal."
    with av.open(str(path)) as container:
        return np.stack([np.asarray(_RESIZES[mode](f.to_image(), *size)) for f in container.decode(video=0)])


@pytest.mark.parametrize("mode", _RESIZES)
@pytest.mark.parametrize("size", [(32, 16), (80, 48), (100, 131)])
def test_threads_change_no_pixel(texture, mode, size):
    expected = one_at_a_time(texture, size, mode)
    assert np.array_equal(read_video(texture, size=size, mode=mode).frames, expected)
    assert np.array_equal(np.concatenate([c.frames for c in pieces(texture, size=size, mode=mode, chunk=7)]), expected)
    assert np.array_equal(resize_frames(read_video(texture).frames, *size, mode), expected)


def test_number_of_threads_changes_no_pixel(texture, monkeypatch):
    some = {}
    for cores in (0, 1, 2, 5):
        monkeypatch.setattr(video, "_cores", lambda: cores)
        some[cores] = read_video(texture, size=(48, 48)).frames
    assert all(np.array_equal(frames, some[0]) for frames in some.values())


@pytest.mark.parametrize(
    "options", [dict(bf=3, g=12), dict(bf=0), {"x264-params": "b-pyramid=none:bframes=5:open-gop=1:keyint=9"}]
)
def test_pictures_that_are_skipped_are_not_missed(folder, options, monkeypatch):
    noise = np.random.default_rng(3).integers(0, 255, (8, 6, 8, 3), dtype=np.uint8)
    frames = np.stack([np.asarray(Image.fromarray(noise[t % 8]).resize((128, 96), Image.BICUBIC)) for t in range(40)])
    path = encode(folder / f"skip{len(options)}{options.get('bf')}.mp4", frames, **options)
    everything, decoded, original = read_video(path).frames, [], video._decode

    def counted(*args):
        for frame in original(*args):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    for chosen in (range(0, 40, 2), range(3, 40, 5), [1, 2, 3, 20, 22, 39]):
        assert np.array_equal(read_video(path, indices=chosen).frames, everything[list(chosen)])
    if options.get("bf") == 3:
        assert 50 < len(decoded) < 100  # of the 117 up to the last one wanted


# streams


@pytest.mark.parametrize("options", [{}, dict(num_frames=5), dict(num_frames=7, size=(24, 40), mode="inference")])
@pytest.mark.parametrize("chunk,ahead", [(1, 1), (4, 2), (100, 3)])
def test_stream_is_the_clip_in_pieces(texture, options, chunk, ahead):
    whole, parts = read_video(texture, **options), list(pieces(texture, chunk, ahead, **options))
    assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)
    assert {len(part) for part in parts[:-1]} <= {chunk} and len(parts) == -(-len(whole) // chunk)
    assert all(part.fps == pytest.approx(whole.fps) and part.path == texture for part in parts)
    assert parts[0].start == pytest.approx(whole.start, abs=1e-6) and parts[-1].end == pytest.approx(whole.end)
    for one, other in zip(parts, parts[1:]):
        assert other.start - one.start == pytest.approx(len(one) / whole.fps, abs=1e-6)


def test_stream_of_images(tmp_path):
    images = [Image.fromarray(f) for f in gradient(12)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    (tmp_path / "shots").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / f"shots/shot{i}.png")
    for path in (tmp_path / "a.gif", tmp_path / "shots", tmp_path / "shots/shot3.png"):
        for options in ({}, dict(size=(32, 24))):
            assert np.array_equal(
                np.concatenate([c.frames for c in pieces(path, **options, chunk=5)]), read_video(path, **options).frames
            )


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("stream_video", "video"))]


def opened(path):
    "How often this process has a file open."
    return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


def test_stream_is_bounded_and_ends(texture, monkeypatch):
    made, original = [], video._gather

    def counted(*args):
        made.append(1)
        return original(*args)

    monkeypatch.setattr(video, "_gather", counted)
    monkeypatch.setattr(video, "_CHUNK", 2)
    monkeypatch.setattr(video, "_AHEAD", 3)
    stream = stream_video(texture)
    assert not threads() and not made  # nothing before it is asked for
    assert len(next(stream)) == 2
    for _ in range(50):
        if len(made) < 4:
            time.sleep(0.02)
    time.sleep(0.1)
    assert len(made) == 4 and len(threads()) >= 1  # the one that is read and three ahead, not all twelve
    if sys.platform == "linux":
        assert opened(texture) == 1
    stream.close()
    assert not threads()
    if sys.platform == "linux":
        assert opened(texture) == 0
    for part in stream_video(texture):
        break  # a loop that is left does the same
    del part
    gc.collect()
    assert not threads()
    assert sum(map(len, stream_video(texture))) == 24 and not threads()


def test_stream_errors(tmp_path, texture, monkeypatch, caplog):
    for options, words in ((dict(num_frames=0), "`num_frames`"), (dict(size=(8, 8), mode="tile"), "`mode`")):
        with pytest.raises(ValueError, match=words):
            stream_video(texture, **options)  # at once, not at the first clip
    with pytest.raises(FileNotFoundError):
        stream_video(tmp_path / "none.mp4")
    (tmp_path / "shots").mkdir()
    for i, frame in enumerate(gradient(8)):
        Image.fromarray(frame[:, :32] if i == 6 else frame).save(tmp_path / f"shots/{i}.png")
    stream = pieces(tmp_path / "shots", chunk=3)
    assert len(next(stream)) == len(next(stream)) == 3
    with pytest.raises(InputError, match="one size .* 64x48 and, at frame 6, 32x48"):
        next(stream)
    (tmp_path / "shots/4.png").write_bytes((tmp_path / "shots/4.png").read_bytes()[:60])
    stream = pieces(tmp_path / "shots", size=(16, 16), chunk=2)
    assert len(next(stream)) == len(next(stream)) == 2
    with pytest.raises(InputError, match="4.png"):
        next(stream)
    assert not threads()


def test_stream_of_a_damaged_file(folder, caplog):
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), dtype=np.uint8)
    data = write_video(folder / "to-cut.mp4", frames, 10).read_bytes()
    (folder / "stream-cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    whole = read_video(folder / "stream-cut.mp4")
    warned = [r.getMessage() for r in caplog.records]
    caplog.clear()
    parts = list(pieces(folder / "stream-cut.mp4", chunk=3))
    assert np.array_equal(np.concatenate([p.frames for p in parts]), whole.frames) and len(whole) < 20
    assert [r.getMessage() for r in caplog.records] == warned and len(warned) == 1 and "is damaged" in warned[0]


# writing in pieces


def test_pieces_are_the_whole(tmp_path):
    frames = gradient(30)
    whole = write_video(tmp_path / "whole.mp4", frames, 12).read_bytes()
    pieces = {
        "arrays": (frames[i : i + 7] for i in range(0, 30, 7)),
        "clips": (Clip(frames[i : i + 4], 12) for i in range(0, 30, 4)),
        "pictures": map(Image.fromarray, frames),
        "floats": map(lambda f: f / 255.0, frames),
    }
    for name, made in pieces.items():
        assert write_video(tmp_path / f"{name}.mp4", made, 12).read_bytes() == whole, name
    assert (
        write_video(tmp_path / "rate.mp4", (Clip(frames[i : i + 4], 12) for i in range(0, 30, 4))).read_bytes() == whole
    )  # the first clip's rate
    gif = write_video(tmp_path / "whole.gif", frames, 12).read_bytes()
    assert write_video(tmp_path / "pieces.gif", (frames[i : i + 7] for i in range(0, 30, 7)), 12).read_bytes() == gif


def test_pieces_are_forgotten(tmp_path):
    alive, most = [], []

    def pieces():
        for i in range(8):
            made = gradient(3) + np.uint8(i)
            alive.append(weakref.ref(made))
            most.append(sum(ref() is not None for ref in alive))
            yield made
            del made

    assert video_info(write_video(tmp_path / "a.mp4", pieces(), 10)).frames == 24
    assert max(most) <= 3  # the first is held until its size is known, one is encoded, one is new


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_broken_pieces_leave_nothing(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("the old one")

    def broken(error):
        yield gradient(5)
        if error:
            raise error
        yield gradient(5, 32, 32)

    for error, kind, words in (
        (RuntimeError("no more"), RuntimeError, "no more"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (None, InputError, "one size but are 64x48, then 32x32"),
        (FileNotFoundError("a.png is gone"), InputError, "FileNotFoundError: a.png is gone"),
    ):
        with pytest.raises(kind, match=words):
            write_video(path, broken(error), 10, overwrite=True)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "the old one")]
    with pytest.raises(InputError, match="at least one frame but is empty"):
        write_video(path, iter([]), 10, overwrite=True)
    with pytest.raises(InputError, match="at least one frame but is empty"):
        write_video(path, iter([]), overwrite=True)
    untouched = iter([gradient(1)])
    with pytest.raises(FileExistsError):
        write_video(path, untouched)
    assert len(next(untouched)) == 1 and path.read_text() == "the old one"


def test_sound_of_pieces(tmp_path):
    source = encode(tmp_path / "source.mp4", gradient(40), fps=10, sound=4.0)  # silent for 2 s, then a tone
    inverted = (replace(part, frames=255 - part.frames) for part in pieces(source, chunk=6))
    out = write_video(tmp_path / "out.mp4", inverted, audio_from=source)
    info, parts = video_info(out), loudness(out)
    assert (info.frames, info.fps, info.has_audio) == (40, 10, True)
    assert len(parts) in (40, 41) and parts[:19].max() < 0.03 and parts[21:39].min() > 0.3
    assert np.abs(read_video(out).frames.astype(int) + read_video(source).frames - 255).mean() < 6
    with av.open(str(out)) as container:  # sound and pictures lie side by side, or a player of a long file has to jump
        kinds = [packet.stream.type for packet in container.demux() if packet.size]
    assert kinds.index("audio") < len(kinds) / 2 and kinds[-len(kinds) // 4 :].count("audio") < len(kinds) // 4


# looking


def test_film_strip(tmp_path):
    rows = {
        "source": gradient(21),
        "edited": Clip(255 - gradient(5)),
        "reference": Image.fromarray(gradient(1, 20, 60)[0]),
    }
    figure = film_strip(rows, max_columns=4, title="three rows")
    assert len(figure.axes) == 4 + 4 + 1 and [t.get_text() for t in figure.texts][:3] == list(rows)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    path = film_strip(rows, max_columns=3).save(tmp_path / "strip.png")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels.max(axis=-1) - pixels.min(axis=-1)).max() > 100  # colour arrived
    film_strip(gradient(1)).save(path)
    with pytest.raises(FileExistsError):
        film_strip(gradient(1)).save(path, overwrite=False)
    with pytest.raises(ValueError, match="`rows`"):
        film_strip({})


def test_compare():
    left, right = gradient(6), gradient(4, 96, 128)
    both = compare(left, right)
    assert both.shape == (4, 48, 64 + 4 + 64, 3)
    assert np.array_equal(both[:, :, :64], left[:4]) and (both[:, :, 64:68] == 255).all()
    assert compare(left, left, left).shape == (6, 48, 200, 3)
    with pytest.raises(ValueError, match="at least 2"):
        compare(left)


def test_decord_and_pyav_give_the_same_pictures(plain, monkeypatch):
    pytest.importorskip("decord")
    with monkeypatch.context() as patch:
        patch.setattr(video, "_frames_decord", lambda path, indices: None)
        frames = read_video(plain).frames
    seen = []
    with monkeypatch.context() as patch:
        decord = video._frames_decord
        patch.setattr(video, "_frames_decord", lambda *given: seen.append(decord(*given)) or seen[-1])
        assert np.array_equal(read_video(plain).frames, frames)
    assert seen[0] is not None


@pytest.mark.parametrize("given", (dict(indices=[0, 2]), dict(size=(32, 32))))
def test_what_is_not_plain_is_read_by_pyav(plain, monkeypatch, given):
    monkeypatch.setattr(video, "_frames_decord", lambda *given: pytest.fail("decord was asked"))
    assert len(read_video(plain, **given)) > 1
