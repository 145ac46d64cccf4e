"""Whether the lessons are written as lessons: python .ci/lessons.py prints a table; the exit status counts broken rules.

A lesson shows a picture in its first cells, brings its code in small pieces, and says more than it computes.
"""

import ast
import json
import statistics
import sys
from pathlib import Path

from size import ROOT, code_lines

LONGEST = {True: 25, False: 20}  # code lines of a cell that exports, and of one that does not
MEDIAN, TOTAL = 8, 3_000  # of the cells that export, and of all that they export together
FIRST = 5  # cells of code among which there has to be a picture, imports not counted
ALLOWED = {"f16a78c2": 45}  # the pipeline's call: its signature alone, an argument a line, has 25


def read(
    path: Path,  # a notebook
) -> dict:
    "What is counted of a lesson."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = dict(lesson=path.stem, lines={True: [], False: []}, long=[], words=0, picture=False)
    seen = 0
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found["words"] += len(text.split())
            continue
        tree = ast.parse(text)
        if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
            continue
        exported, lines, seen = text.startswith("#| export"), len(code_lines(text, tree)), seen + 1
        found["lines"][exported].append(lines)
        if lines > ALLOWED.get(cell["id"], LONGEST[exported]):
            found["long"].append(f"{cell['id']} ({lines})")
        kinds = [kind for out in cell["outputs"] for kind in out.get("data", {})]
        found["picture"] |= seen <= FIRST and any(kind.startswith("image/") for kind in kinds)
    return found


def main() -> int:
    "Print the table and what is broken."
    lessons = [read(path) for path in sorted((ROOT / "nbs").glob("[01]*.ipynb"))]
    broken = []
    print(f"{'lesson':20}{'exported':>9}{'median':>7}{'longest':>8}{'other':>7}{'longest':>8}{'words':>7}  picture")
    for lesson in lessons:
        exported, others = lesson["lines"][True], lesson["lines"][False]
        median = statistics.median_low(exported or [0])
        row = f"{sum(exported):9,}{median:7.0f}{max(exported or [0]):8}{sum(others):7}{max(others):8}"
        print(f"{lesson['lesson']:20}{row}{lesson['words']:7,}  {'yes' if lesson['picture'] else 'no'}")
        rules = {
            f"cells that are too long: {', '.join(lesson['long'])}": not lesson["long"],
            f"a median of {median:.0f} lines in cells that export, of at most {MEDIAN}": median <= MEDIAN,
            "more lines of code than words": lesson["words"] >= sum(exported) + sum(others),
            f"no picture in the first {FIRST} cells": lesson["picture"],
        }
        broken += [f"{lesson['lesson']} has {rule}" for rule, holds in rules.items() if not holds]
    total = sum(sum(lesson["lines"][True]) for lesson in lessons)
    print(f"{'together':20}{total:9,}  of at most {TOTAL:,}")
    if total > TOTAL:
        broken.append(f"lessons export {total:,} lines and may export {TOTAL:,}")
    print("\n".join(broken), file=sys.stderr)
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
