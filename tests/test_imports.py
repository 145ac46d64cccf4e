"What importing a module brings along: nothing that is slow to import before it is needed."

import subprocess
import sys

import pytest

LIGHT = {  # what is done in one process after the other, and what is not imported by then
    "import kiwi_edit.core; kiwi_edit.core.settings()": "numpy torch transformers diffusers",
    "import kiwi_edit.train.curriculum": "numpy torch transformers diffusers peft",
    "from kiwi_edit.apps.cli import main; main(['--help'])": "numpy torch transformers diffusers av gradio",
    "import kiwi_edit.data.backends": "torch transformers diffusers openai google.genai",
    "import kiwi_edit.eval.judge": "torch transformers diffusers openai google.genai scipy.stats",
    "from kiwi_edit.video import *": "torch transformers diffusers matplotlib",
    "from PIL import Image; figure = film_strip(Image.new('RGB', (8, 8)))": "torch transformers diffusers",
}
DONE = "import matplotlib.figure\nassert isinstance(figure, matplotlib.figure.Figure) and isinstance(figure, Strip)"


@pytest.fixture(scope="module")
def imported():
    "Modules that a process knows after each of these."
    steps = [f"try: {code}\nexcept SystemExit: pass\nprint('modules:', *sys.modules)" for code in LIGHT]
    script = "\n".join(["import sys", *steps, DONE])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = [set(line.split()) for line in done.stdout.splitlines() if line.startswith("modules:")]
    return dict(zip(LIGHT, found, strict=True))


@pytest.mark.parametrize("code", LIGHT)
def test_importing_brings_nothing_slow(imported, code):
    assert "kiwi_edit.core" in imported[code] and not imported[code] & set(LIGHT[code].split())
