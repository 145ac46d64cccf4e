"""`python assets/benchmarks/baselines.py`: a model in one ranking with editors that cheat, out of the cells of nbs/library/40_benchmark.ipynb."""

from __future__ import annotations  # for the cells too, which `compile` reads as this file is read

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType

NOTEBOOK = Path(__file__).resolve().parents[2] / "nbs" / "library" / "40_benchmark.ipynb"


def read_baselines() -> ModuleType:
    "The benchmark's module, and what the notebook's cells marked `#| baselines` add to it: `check_bench`, `baselines` and `Ranking`."
    from kiwi_edit.eval import benchmark

    module = sys.modules["ranked"] = ModuleType("ranked")
    vars(module).update((name, value) for name, value in vars(benchmark).items() if not name.startswith("__"))
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(r"#\|\s*baselines\b", source):
            exec(compile(source, f"{NOTEBOOK.name}, cell {cell['id']}", "exec"), vars(module))
    return module


def main(arguments: list[str] | None = None) -> None:
    from kiwi_edit.data.files import find_model, load_model

    ranked = read_baselines()
    parser = argparse.ArgumentParser("baselines.py", description="Rank a model among editors that cheat.")
    parser.add_argument("--model", help="bundled name, folder or hub id [the settings' checkpoint]")
    parser.add_argument("--difficulty", choices=ranked.BENCH_DIGESTS, default="full", help="of the world [full]")
    parser.add_argument("--samples", type=int, default=ranked.BENCH_SAMPLES, help="scenes of each task")
    parser.add_argument("--out", type=Path, default=Path("baselines.json"), help="the numbers; a .png lies beside them")
    given = parser.parse_args(arguments)
    ranked.check_bench(difficulty=given.difficulty)
    folder, pipe = find_model(given.model), load_model(given.model)
    options = dict(samples=given.samples, difficulty=given.difficulty, keep=2)
    reports = ranked.run_editors({folder.name: pipe} | ranked.baselines(pipe), **options)
    ranking = ranked.Ranking(reports, ranked.provenance(pipe.device, folder))
    ranking.save(given.out)
    ranking.strips("subject", 2).savefig(given.out.with_suffix(".png"))
    print(*ranking.tables(), sep="\n\n")


if __name__ == "__main__":
    main()
