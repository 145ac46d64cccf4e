"""Make what the page of `kiwi-edit demo` opens with: an example, edited by the embedded model, on every tab.

python assets/demo/prepare.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

from kiwi_edit.apps import demo
from kiwi_edit.data.files import edit_file, load_model
from kiwi_edit.video import film_strip, read_image, read_video

FOLDER = Path(__file__).resolve().parent


def small(picture, path):
    "A drawing in 256 colours."
    PIL.Image.fromarray(np.asarray(picture)).quantize(256, dither=PIL.Image.Dither.NONE).save(path, optimize=True)


def main():
    clip, _, instruction, references = demo._sample_examples()[demo._FIRST]
    pipe = load_model("kiwi-edit-tiny", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        done = edit_file(pipe, clip, instruction, references, out=Path(folder) / "edited.mp4", steps=1, seed=0)
        shutil.copy(done.path, FOLDER / "edited.mp4")
        small(read_image(done.strip), FOLDER / "strip.png")
        made = demo._world_set(folder, 6)
        shutil.rmtree(FOLDER / "pairs", ignore_errors=True)
        shutil.copytree(made.folder, FOLDER / "pairs", ignore=shutil.ignore_patterns("clips", "report.html", ".*"))
    looked, looks = demo._show_looks(pipe, clip, instruction, references, 1, 0)
    small(looked, FOLDER / "looks.png")
    edited = str(FOLDER / "edited.mp4")
    clips = dict(before=read_video(clip).frames, after=read_video(edited).frames)
    small(demo._to_picture(film_strip(clips)), FOLDER / "judged.png")
    judgement = demo._judge_edit(demo._METRICS, "any edit", clip, edited, references[0], instruction)
    note = f"Made beforehand by kiwi-edit-tiny. {done.note[:1].upper()}{done.note[1:]}".strip()
    words = dict(frames=done.frames, note=note, looks=f"“{instruction}” {looks}", judgement=judgement)
    (FOLDER / "words.json").write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
