"""The ranking of the trials of a sweep as table, CSV and picture."""

import csv
import io
import math
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from clipjax.runtime.terminal import format_table, printable
from clipjax.sweeps.folder import Folder
from clipjax.sweeps.space import Choice, Grid, Sweep, format_value
from clipjax.sweeps.trial import Trial, format_overrides, formatted


def rank_trials(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, the best first; those without the metric come last."""
    sign = -1 if sweep.maximize else 1
    return sorted(trials, key=lambda trial: math.inf if trial.metric is None else sign * trial.metric)


def write_leaderboard(sweep: Sweep, trials: Sequence[Trial], home: Folder) -> None:
    """Print the ranking and write `leaderboard.csv` and `sweep.png` into the folder of the sweep.

    Raises:
        OSError: they cannot be written.
    """
    paths = list(trials[0].overrides)
    header = ["rank", "trial", sweep.metric, *paths, "loss", "seconds", "status"]
    table, exact = [], []
    for rank, trial in enumerate(rank_trials(sweep, trials), start=1):
        start = ["" if trial.metric is None else str(rank), trial.name]
        values, end = list(formatted(trial.overrides).values()), [f"{trial.seconds:.0f}", trial.status]
        table.append([*start, _number(trial.metric, ".4f"), *values, _number(trial.loss, ".4f"), *end])
        exact.append([*start, _number(trial.metric, "r"), *values, _number(trial.loss, "r"), *end])
    print(f"\n{format_table(table, header)}\n")
    for trial in trials:
        if trial.problem:
            print(f"{trial.name}: {printable(trial.problem)}")
    text, picture = io.StringIO(), io.BytesIO()
    csv.writer(text, lineterminator="\n").writerows([header, *exact])
    home.write("leaderboard.csv", text.getvalue())
    plot_sweep(sweep, trials, picture)
    home.write("sweep.png", picture.getvalue())
    best = rank_trials(sweep, trials)[0]
    if best.metric is not None:
        flags = shlex.join(f"--config.{path}={value}" for path, value in formatted(best.overrides).items())
        print(printable(f"best: {best.place}  {sweep.metric} {best.metric:.4f}"), printable(f"  {flags}"), sep="\n")
    print(printable(f"wrote {home.at('leaderboard.csv')} and {home.at('sweep.png')}"), flush=True)


def _number(value: float | None, style: str) -> str:
    if value is None:
        return ""
    return repr(value) if style == "r" else format(value, style)


def plot_sweep(sweep: Sweep, trials: Sequence[Trial], file: io.BytesIO) -> None:
    """Draw, as PNG, the metric against each swept field, one panel per field, on axes of the search's own scale."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a value is no formula
        _plot(sweep, trials, file)


def _plot(sweep: Sweep, trials: Sequence[Trial], file: io.BytesIO) -> None:
    from matplotlib.figure import Figure

    fields = list(trials[0].overrides)
    columns = min(len(fields), 3)
    rows = math.ceil(len(fields) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.4), 3.6 * rows + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    best = rank_trials(sweep, trials)[0]
    for panel, name in zip(panels, fields, strict=False):
        _draw_panel(panel, sweep, trials, name)
    for panel in panels[len(fields) :]:
        panel.remove()
    figure.supylabel(f"{sweep.metric} ({'larger' if sweep.maximize else 'smaller'} is better)", fontsize=10)
    finished = sum(trial.metric is not None for trial in trials)
    title = f"{sweep.metric} over {finished} of {len(trials)} trials"
    if best.metric is not None:
        line = f"best {best.metric:.4f} in {best.name}: {format_overrides(best.overrides)}"
        title += "\n" + textwrap.fill(line, width=int(12 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=10)
    handles = {label: handle for p in figure.axes for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def _draw_panel(panel: Any, sweep: Sweep, trials: Sequence[Trial], name: str) -> None:
    from matplotlib.ticker import LogLocator

    values = [trial.overrides[name] for trial in trials]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    labels = sorted({format_value(value) for value in values})
    places = values if numeric else [labels.index(format_value(value)) for value in values]
    by_place = list(zip(places, trials, strict=True))
    done = [(place, trial.metric) for place, trial in by_place if trial.metric is not None]
    failed = [place for place, trial in by_place if trial.metric is None]
    choose = max if sweep.maximize else min
    is_grid = isinstance(sweep.search, Grid)
    if numeric and is_grid and done:
        tops = {place: choose(metric for other, metric in done if other == place) for place, _ in sorted(done)}
        panel.plot(
            list(tops), list(tops.values()), color="#9db4cc", linewidth=1.2, zorder=1, label="best at each value"
        )
    if done:
        panel.scatter(*zip(*done, strict=True), s=34, color="#2b6cb0", alpha=0.85, zorder=2, label="trial")
        panel.scatter(
            *choose(done, key=lambda point: point[1]), s=170, marker="*", color="#dd6b20", zorder=3, label="best"
        )
    if failed:
        at_bottom = {"linestyle": "none", "transform": panel.get_xaxis_transform()}
        panel.plot(failed, [0.03] * len(failed), marker="x", color="#c53030", label="no result", **at_bottom)
    if sweep.is_log(name):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    if not numeric:
        slant = {"rotation": 20, "ha": "right"} if sum(map(len, labels)) > 40 else {}
        panel.set_xticks(range(len(labels)), labels, **slant)
        panel.set_xlim(-0.5, len(labels) - 0.5)
    elif (is_grid or isinstance(sweep.search.fields[name], Choice)) and len(set(values)) <= 8:
        panel.set_xticks(sorted(set(values)), [format_value(value) for value in sorted(set(values))])
    panel.margins(0.12)
    panel.set_xlabel(name)
    panel.grid(color="#e2e8f0", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
