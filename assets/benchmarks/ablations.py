"""`./kit ablations a`: run an experiment of nbs/library/43_ablations.ipynb out of the notebook's own cells, and write its results."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also where somebody runs this file by its path
from cells import read_cells


def read_experiment():
    "What the cells marked `#| experiment` define, as the module `experiment`."
    return read_cells("43_ablations", "experiment")


def main(arguments: list[str] | None = None) -> int:
    experiment = read_experiment()
    parser = argparse.ArgumentParser(
        "./kit ablations",
        description="What drives the result: guidance, curriculum, references (a); synthesised against authentic references (b).",
    )
    add = parser.add_argument
    add("experiment", choices=(*experiment.EXPERIMENTS, "all"))
    add("--folder", type=Path, default=Path("outputs/ablations"), help="for the runs; a stopped command goes on there")
    add("--seeds", type=int, default=experiment.Plan.seeds, help="runs of each arm")
    add("--steps", type=int, default=experiment.Plan.steps, help="training steps of each arm, behind the common ones")
    add("--out", type=Path, help="results, .json [results-EXPERIMENT.json in the folder]")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / f"results-{given.experiment}.json"
    if out.suffix != ".json":
        parser.error(f"--out has to be a .json file but is {out}")
    try:
        plan = experiment.Plan(steps=given.steps, seeds=given.seeds)
    except ValueError as error:
        parser.error(str(error))
    found = experiment.run_experiment(given.experiment, given.folder, plan)
    found.save(out)
    tables = [] if given.experiment == "b" else [found.arms_table()]
    if given.experiment != "a":
        tables += [
            table(task) for task in experiment.WITH_REFERENCE for table in (found.user_table, found.transfer_table)
        ]
        tables.append(found.distance_table())
    print("\n\n".join(map(str, [*tables, f"results: {out}"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
