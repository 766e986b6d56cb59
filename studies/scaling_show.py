"""What the scaling study shows: its figures, from the rows alone, and its tables, of the laws.

    scaling.png          return against operations, a line a size, and the best of all sizes
    scaling_optima.png   N_opt at each budget with its law, and where each size reaches a return
    scaling_losses.png   held-out losses against operations, with the fitted law; and the return
                         against the cloning loss
    scaling_data.png     one size on fewer episodes
"""

import numpy as np

import plots
from plots import plt
from studies import print_table
from studies.scaling_fit import (FEWEST, budgets_of, end_of, fit_loss, fitted, flat, learnt,
                                 loss_column, mean_profile, name_of, optima, profiles_of, select)

LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of return
OPERATIONS = "operations of the training"


def panels(ways):
    """A figure with a panel for each way, three in a row -> the figure and these panels"""
    across = min(3, len(ways))
    down = -(-len(ways) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.4 * across, 2.9 * down + 0.8), sharex=True,
                                sharey=True, squeeze=False, layout="constrained")
    for ax in axes.flat[len(ways):]:
        ax.remove()
    for way, ax in zip(ways, axes.flat):
        ax.set_title(name_of(way), fontsize=9)
        ax.set_xlabel(OPERATIONS)
        ax.xaxis.set_tick_params(labelbottom=True)
    return figure, axes.flat[:len(ways)]


def looks(number, count):
    """How one of several sizes is drawn: the largest is the darkest."""
    return dict(marker=plots.MARKERS[number % len(plots.MARKERS)], markersize=4, linewidth=1.2,
                color=plots.shade(number, count))


def size_names(rows):
    """The name of each size, by its parameters"""
    return {row["params"]: f"{row['size']}: {row['params']:,}" for row in rows}


def mean_profiles(rows, way):
    """The mean profile of the return of each size"""
    return [mean_profile(runs) for runs in profiles_of(select(rows, way), "return")]


def draw_profiles(ax, rows, names, column="return"):
    """The mean profile of each size"""
    for profile in map(mean_profile, profiles_of(rows, column)):
        number = sorted(names).index(profile.params)
        error = profile.std if column == "return" else None
        ax.errorbar(profile.flops, profile.value, yerr=error, label=names[profile.params],
                    **looks(number, len(names)))
    ax.set_xscale("log")


def profiles_figure(rows, ways):
    """Return against operations; grey: the best of the fitted sizes at each budget."""
    figure, axes = panels(ways)
    names = size_names(rows)
    for way, ax in zip(ways, axes):
        draw_profiles(ax, select(rows, way), names)
        profiles = mean_profiles(fitted(rows), way)
        found = optima(profiles, budgets_of(profiles))
        ax.plot(found.budgets, found.best, color="0.75", linewidth=6, zorder=0, label="the best")
        ax.grid(color="0.9", linewidth=0.5)
    axes[0].set_ylabel("return (IQM of scores)")
    plots.legend_below(figure, axes)
    return figure


def first_at(profile, level):
    """The operations after which a profile first has a return; nan: it never has."""
    so_far = np.maximum.accumulate(profile.value)
    if so_far[-1] < level or so_far[0] >= level:
        return np.nan
    after = int(np.argmax(so_far >= level))
    between = slice(after - 1, after + 1)
    return np.exp(np.interp(level, so_far[between], np.log(profile.flops[between])))


def optima_figure(rows, ways):
    """Lines of equal return, and N_opt with its law."""
    figure, axes = panels(ways)
    for way, ax in zip(ways, axes):
        profiles = mean_profiles(fitted(rows), way)
        params = np.array([profile.params for profile in profiles])
        for number, level in enumerate(LEVELS):
            flops = np.array([first_at(profile, level) for profile in profiles])
            known = np.isfinite(flops)
            if not known.any():
                continue
            style = looks(number, len(LEVELS)) | {"linewidth": 0.8}
            ax.plot(flops[known], params[known], label=f"return {level:g}", **style)
        found = optima(profiles, budgets_of(profiles))
        ax.plot(found.budgets, found.params, "*", color="crimson", markersize=7, label="N_opt")
        known = np.isfinite(found.params)
        if known.sum() >= 3 and len(profiles) >= FEWEST:
            ends = np.log(found.budgets[known][[0, -1]])
            line = np.polyfit(np.log(found.budgets[known]), np.log(found.params[known]), 1)
            ax.plot(np.exp(ends), np.exp(np.polyval(line, ends)), color="crimson", label="its law")
            ax.annotate(f"N_opt ∝ C^{line[0]:.2f}", (0.04, 0.92), xycoords="axes fraction")
        ax.set(xscale="log", yscale="log")
    axes[0].set_ylabel("parameters")
    plots.legend_below(figure, axes)
    return figure


def losses_figure(rows, ways):
    """Two losses against operations, dashed: the law; and the return against the cloning loss."""
    figure, axes = plt.subplots(3, len(ways), figsize=(3.2 * len(ways) + 0.6, 8.5), sharey="row",
                                squeeze=False, layout="constrained")
    names = size_names(rows)
    for way, column in zip(ways, axes.T):
        column[0].set_title(name_of(way), fontsize=9)
        of_way, cloning = select(rows, way), loss_column(way)
        for loss, ax in ((cloning, column[0]), ("critic_loss", column[1])):
            draw_profiles(ax, of_way, names, loss)
            draw_law(ax, profiles_of(learnt(fitted(of_way), loss), loss))
            ax.set_xlabel(OPERATIONS)
        for number, params in enumerate(sorted(names)):
            some = [row for row in of_way if row["params"] == params]
            column[2].plot([row[cloning] for row in some], [row["return"] for row in some],
                           **looks(number, len(names)) | {"linestyle": "none"})
        column[2].set_xlabel("cloning loss")
    for ax, label in zip(axes[:, 0], ("cloning loss", "critic loss", "return")):
        ax.set_ylabel(f"{label}, held-out episodes" if ax is not axes[2, 0] else label)
    plots.legend_below(figure, axes[0])
    return figure


def draw_law(ax, sizes):
    """The law of these sizes' loss, where there are enough of them."""
    if len(sizes) < FEWEST:
        return
    law = fit_loss(*flat(sizes))
    for runs in sizes:
        run = runs[0]
        ax.plot(run.flops, law.loss(run.params, run.transitions), "--", color="0.4", linewidth=0.8)


def data_figure(rows, ways):
    """Return and losses of one size on shares of the episodes, against updates."""
    size = next(row["size"] for row in rows if row["share"] != "1")
    shares = sorted({row["share"] for row in rows}, key=lambda share: -int(share.split("/")[-1]))
    columns = ("return", "clone_loss", "critic_loss")
    figure, axes = plt.subplots(len(ways), 3, figsize=(10, 2.9 * len(ways) + 0.6), sharex=True,
                                sharey="col", squeeze=False, layout="constrained")
    for way, line in zip(ways, axes):
        for column, ax in zip(columns, line):
            for number, share in enumerate(shares):
                some = select(rows, way, share=share, size=size, seed=0)
                ax.plot([row["updates"] for row in some], [row[column] for row in some],
                        label=f"{share} of the episodes", **looks(number, len(shares)))
            ax.set(xscale="log", title=f"{name_of(way)}, {size}")
            ax.title.set_size(8)
            ax.set_ylabel(column.replace("_", " "))
    for ax in axes[-1]:
        ax.set_xlabel("updates")
    plots.legend_below(figure, axes[0])
    return figure


def draw(rows, ways, folder):
    """All figures that the rows give, into a folder."""
    ways = [way for way in ways if len(profiles_of(select(rows, way), "return")) > 1]
    on_less = [way for way in ways if select(rows, way, share="1/4")]
    figures = {"scaling": (profiles_figure, ways), "scaling_optima": (optima_figure, ways),
               "scaling_losses": (losses_figure, ways), "scaling_data": (data_figure, on_less)}
    for name, (function, shown) in figures.items():
        if not shown:
            print(f"{name}.png: no rows for it yet")
            continue
        path = folder / f"{name}.png"
        plots.save(function(rows, shown), path)
        print(f"wrote {path}")


# ---------------------------------------------------------------- tables

def print_ends(rows, ways):
    """Return of each size at the end of its runs, and cloning loss as the way sees it: a table."""
    sizes = dict.fromkeys(row["size"] for row in sorted(rows, key=lambda row: row["params"]))
    shown = []
    for size in sizes:
        cells = []
        for way in ways:
            some, loss = select(rows, way, size=size), loss_column(way)
            end = end_of(some, ("return", loss)) if some else None
            cells.append(f"{end['return']:.2f}, {end[loss]:.2f}" if end else "")
        shown.append([size, *cells])
    print_table(["return, cloning loss", *map(name_of, ways)], shown)


def print_laws(laws):
    """The laws that were fitted, and how well, as tables in markdown."""
    fitted = {name: found for name, found in laws.items() if "return" in found}
    rows = []
    for name, found in fitted.items():
        exponents = [of_law(found[of], letter) for of in ("return", "clone_loss", "critic_loss")
                     for letter in "ab"]
        rows.append([name, *exponents, of_law(found["return"], "gain")])
    if fitted:
        print_table(["", "return: a", "b", "cloning loss: a", "b", "critic loss: a", "b",
                     "return a decade, in the last"], rows)
        print_errors(fitted)
    for name, found in laws.items():
        if "why_not" in found:
            print(f"{name}: {found['sizes']} sizes; {found['why_not']}")
    for kind in ("variants", "shares"):
        for name, ends in laws[kind].items():
            print(f"\n{name}\n")
            rows = [[value, *end.values()] for value, end in ends.items()]
            print_table([kind, *next(iter(ends.values()))], rows)


def print_errors(fitted):
    """What the estimator makes of a known law and of noise, and what was predicted."""
    rows = []
    for name, found in fitted.items():
        law, noise = found["estimator"]["of_a_law"], found["estimator"]["of_noise_alone"]
        ahead = found["held_out"]
        predicted = [beside(end) for end in (ahead["return"]["return"],
                                             ahead["clone_loss"]["at_the_end"],
                                             ahead["critic_loss"]["at_the_end"])]
        rows.append([name, f"{law['true_a']} → {law['mean_a']} ± {law['deviation']}",
                     f"{noise['mean_a']} ± {noise['deviation']}", *predicted])
    print()
    print_table(["", "a of a known law → estimated", "a of noise alone",
                 "return at the end: predicted, measured", "cloning loss", "critic loss"], rows)


def beside(end):
    return f"{end['predicted']:.3f}, {end['measured']:.3f}"


def of_law(found, letter):
    """A law's number with its interval, as text."""
    low, mid, high = (found[letter][of] for of in ("low", "mid", "high"))
    if mid is None:
        return "-"
    return f"{mid:.2f}" if low is None else f"{mid:.2f} [{low:.2f}, {high:.2f}]"
