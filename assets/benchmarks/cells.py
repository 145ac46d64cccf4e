"The program that the marked cells of a notebook are."

from __future__ import annotations  # for the cells too, which `compile` reads as this file is read

import json
import re
import sys
from pathlib import Path
from types import ModuleType

LIBRARY = Path(__file__).resolve().parents[2] / "nbs" / "library"


def read_cells(
    name: str,  # of a notebook of the library, without its ending
    mark: str,  # of its cells: "experiment" for those that begin with `#| experiment`; also the module's name
    **known,  # what the cells find there
) -> ModuleType:
    "What marked cells of a notebook define, as a module that can be imported from then on."
    module = sys.modules[mark] = ModuleType(mark)
    vars(module).update(known)
    for cell in json.loads((LIBRARY / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(rf"#\|\s*{mark}\b", source):
            exec(compile(source, f"{name}.ipynb, cell {cell['id']}", "exec"), vars(module))
    return module
