"""`python assets/benchmarks/baselines.py`: a model in one ranking with editors that cheat, out of the cells of nbs/library/40_benchmark.ipynb."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also where somebody runs this file by its path
from cells import read_cells


def read_baselines():
    "The benchmark's module with what the cells marked `#| ranked` add: `check_bench`, `baselines` and `Ranking`."
    from kiwi_edit.eval import benchmark

    known = {name: value for name, value in vars(benchmark).items() if not name.startswith("__")}
    return read_cells("40_benchmark", "ranked", **known)


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
