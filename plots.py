"""Every figure: a run's curve, the comparison of runs, and what the studies show.

Readable in grey and at a column's width: methods differ in their markers, and the one that matters
is the darkest.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "osD^vP>X"
PANELS = {  # of a run's curve: the axis' label, and the metrics shown
    "loss": ["policy/clone_loss", "policy/improve_loss", "critic/loss"],
    "value, scaled to [0, 1]": ["critic/value", "critic/observed", "critic/error"],
    "entropy (nats a dimension), ESS": ["policy/entropy", "policy/ess"],
}
SCORE = "normalised score (0: uniform random policy, 1: expert)"


def save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shade(number, count):
    """A grey-safe colour: the last of `count` is the darkest."""
    return plt.cm.viridis(0.85 * (1 - (number + 1) / count))


# ---------------------------------------------------------------- one run

def curve(run):
    """run/curve.png: the main metrics and the scores against updates, from metrics.jsonl.

    A dotted line marks the end of the warm-up; the scores of the evaluation at the end are marked
    too.
    """
    run = Path(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (label, names), ax in zip(PANELS.items(), axes.flat):
        for name in names:
            draw_metric(ax, lines, name, name)
        ax.set_ylabel(label)
    draw_scores(axes[1, 1], lines, run / "eval.json", config["train"]["steps"])
    for ax in axes.flat:
        if config["settings"]["beta"]:
            warm_until = config["settings"]["warmup"] * config["train"]["steps"]
            ax.axvline(warm_until, color="grey", linestyle=":")
        ax.set_xlabel("update")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{run}; dotted: the warm-up ends")
    save(figure, run / "curve.png")


def draw_metric(ax, lines, name, label, **style):
    points = [(line["update"], line[name]) for line in lines if name in line]
    if points:
        ax.plot(*zip(*points), label=label, **{"linewidth": 1, **style})


def draw_scores(ax, lines, evaluation, steps):
    """The scores along the way, and at the end those of eval.json, if it is there."""
    names = {name for line in lines for name in line if name.endswith("/score")}
    final = json.loads(evaluation.read_text()) if evaluation.exists() else {"tasks": {}}
    steps = int(final.get("checkpoint", steps))  # that it is of
    for number, name in enumerate(sorted(names)):
        task = name.removeprefix("eval/").removesuffix("/score")
        marker, color = MARKERS[number % len(MARKERS)], plt.cm.tab10(number % 10)
        style = dict(marker=marker, markersize=4, color=color)
        draw_metric(ax, lines, name, task, **style)
        if task in final["tasks"]:
            ax.plot(steps, final["tasks"][task]["score"], **{**style, "markersize": 7})
    draw_metric(ax, lines, "eval/iqm", "IQM", color="black", linewidth=2.5, marker=".")
    if final.get("iqm") is not None:
        ax.plot(steps, final["iqm"], color="black", marker="*", markersize=12)
    ax.set_ylabel("normalised score")


# ---------------------------------------------------------------- several methods

def rows(ax, names, methods, label=SCORE):
    """Names downwards, a marker and an interval for each method; the last method's is the boldest.

    names: the rows, the last one (IQM) at the bottom; methods: name -> a list of (centre, low,
    high), one a row, None where there is no number.
    """
    for number, (method, points) in enumerate(methods.items()):
        offset = 0.8 * (0.5 - (number + 0.5) / len(methods))
        places = [len(names) - 1 - k + offset for k, point in enumerate(points) if point]
        centre, low, high = np.array([point for point in points if point]).T
        ax.errorbar(centre, places, xerr=[centre - low, high - centre], label=method,
                    **style(number, len(methods)))
    for x in (0, 1):
        ax.axvline(x, color="grey", linewidth=0.8, linestyle=":")
    for place in range(len(names) - 1):
        ax.axhline(place + 0.5, color="black" if place == 0 else "0.85", linewidth=0.5)
    ax.set_yticks(range(len(names)), reversed(names))
    ax.set_ylim(-0.5, len(names) - 0.5)
    ax.set_xlabel(label)


def style(number, count):
    """How one of several methods is drawn."""
    return dict(fmt=MARKERS[number % len(MARKERS)], color=shade(number, count), capsize=2,
                markersize=5, linewidth=2.2 if number == count - 1 else 1.2)


def legend_below(figure, ax):
    handles, labels = ax.get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def compare(methods, names, path, title="", panels=None, label=SCORE):
    """One figure of several methods, a row a task, the IQM last. panels: name -> methods"""
    panels = panels or {"": methods}
    most = max(map(len, panels.values()))
    size = (4.5 * len(panels) + 1.5, (0.2 + 0.07 * most) * len(names) + 1.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False,
                                layout="constrained")
    for (name, methods), ax in zip(panels.items(), axes[0]):
        rows(ax, names, methods, label)
        ax.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=10)
    legend_below(figure, axes[0, 0])
    save(figure, path)


def against(methods, x_names, path, x_label, y_label):
    """Lines over a few named conditions; methods: name -> {x: (centre, low, high)}"""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (method, points) in enumerate(methods.items()):
        apart = 0.05 * (number - (len(methods) - 1) / 2)
        places = np.array([x_names.index(x) for x in points]) + apart
        centre, low, high = np.array(list(points.values())).T
        ax.errorbar(places, centre, yerr=[centre - low, high - centre], label=method, linestyle="-",
                    **style(number, len(methods)))
    for y in (0, 1):
        ax.axhline(y, color="grey", linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(x_names)), x_names)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    legend_below(figure, ax)
    save(figure, path)
