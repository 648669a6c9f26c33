"""The paper's comparison of objectives on `scenes`: zero-shot accuracy by examples seen (arXiv 2103.00020, figure 2).

make quickstart                      # data and tokenizer
python -m benchmarks.baselines       # trains what is missing under runs/baselines, then writes JSON and the plot
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks.machine import describe

OBJECTIVES = {
    "contrastive": "bag of words, contrastive",
    "bag_of_words": "bag of words, predicted",
    "caption": "transformer language model",
}
TASKS = ("scenes/val", "scenes/unseen")
SEEDS = (0, 1)
CHANCE = 1 / 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/baselines"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/baselines.json"))
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("docs/images/baselines.png"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("overrides", nargs="*", help="--config.FIELD=VALUE for all runs, after --")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for objective in OBJECTIVES:
            workdir = arguments.runs / f"{objective}-{seed}"
            if not (workdir / "results.json").exists():
                train(objective, seed, workdir, arguments.overrides)
            rows += read(objective, seed, workdir)
    arguments.output.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")
    draw(rows, arguments.plot)
    for objective in OBJECTIVES:
        print(objective, {task: f"{100 * final(rows, objective, task):.1f} %" for task in TASKS})
    return 0


def train(objective: str, seed: int, workdir: pathlib.Path, overrides: list[str]) -> None:
    config = f"--config=configs/baselines.py:{objective}"
    command = [sys.executable, "-m", "clipjax", "train", config, f"--workdir={workdir}", f"--config.seed={seed}"]
    subprocess.run([*command, *overrides], check=True)


def read(objective: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {"objective": objective, "seed": seed, "examples": line["examples_seen"], "task": task, "top1": values["top1"]}
        for line in lines
        for task, values in line.get("eval", {}).items()
    ]


def curve(rows: list[dict], objective: str, task: str) -> dict[int, list[float]]:
    """Accuracies of all seeds by examples seen."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["objective"], row["task"]) == (objective, task):
            found.setdefault(row["examples"], []).append(row["top1"])
    return dict(sorted(found.items()))


def final(rows: list[dict], objective: str, task: str) -> float:
    last = list(curve(rows, objective, task).values())[-1]
    return sum(last) / len(last)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(11, 4), sharey=True, layout="constrained")
    for panel, task in zip(panels, TASKS, strict=True):
        for objective, label in OBJECTIVES.items():
            found = curve(rows, objective, task)
            middle = [100 * sum(values) / len(values) for values in found.values()]
            [line] = panel.plot(list(found), middle, marker="o", markersize=3, label=label)
            low, high = ([100 * edge(values) for values in found.values()] for edge in (min, max))
            panel.fill_between(list(found), low, high, alpha=0.2, color=line.get_color())
        panel.axhline(100 * CHANCE, color="gray", linestyle="--", label="chance")
        panel.set(title=task, xlabel="pairs seen")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("zero-shot accuracy, %")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
