"""The laws in a table of scaling runs: what `python -m studies.scaling fit` computes, by numpy.

Of the return, as the paper has it: at each budget C of operations the best size is looked for, as
the top of a parabola through the sizes' returns over log N. Its parameters are N_opt and the
transitions it has seen D_opt, and straight lines through their logarithms give the exponents

    N_opt ∝ C^a          D_opt ∝ C^b

Of a loss, as Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): all rows at once are fitted by

    L(N, D) = E + A / N^alpha + B / D^beta

Where an update of N parameters takes N^g operations a transition, this gives

    a = beta / (alpha + g beta)          b = alpha / (alpha + g beta)

A budget counts only where the top lies between the smallest and the largest size that were measured
there. Else the sweep's own edge would be taken for an optimum: small sizes end early, and large
ones begin late, so the best of those there are grows with C whatever the returns are. Some of this
is left: `recovery` says how much, by synthetic sweeps of a known law, and of noise alone.
"""

from typing import NamedTuple

import numpy as np

from learner import RISE

BATCH = 128  # transitions an update
WIDE = ("w256", "w512")  # one seed, by a GPU: drawn, and in no law
HALF = 2048  # updates until when the critic learns the returns that were observed, wholly or half
BUDGETS = 25  # log-spaced, over all that was measured
RESAMPLES = 200  # of the returns
LOSS_RESAMPLES = 40  # of the losses: each is a fit of its own
DELTA = 1e-3  # of the Huber loss, as Hoffmann et al. have it
FEWEST = 4  # sizes that a law is fitted to
LAST = 3  # the last factor of compute is predicted


class Profile(NamedTuple):
    """One size's run: its parameters N, and of each evaluation D, C, the value and its error."""
    params: float
    transitions: np.ndarray  # D
    flops: np.ndarray  # C
    value: np.ndarray
    std: np.ndarray

    def take(self, which):
        return Profile(self.params, *(column[which] for column in self[1:]))


def profiles_of(rows, column):
    """Rows of one way to train -> a list of runs' Profiles for each size, the smallest first"""
    runs = {}
    for row in rows:
        runs.setdefault((row["params"], row["seed"]), []).append(row)
    sizes = {}
    for (params, _), found in sorted(runs.items()):
        found.sort(key=lambda row: row["updates"])
        updates, flops, value, std = (np.array([row[name] for row in found], float)
                                      for name in ("updates", "flops", column, "return_std"))
        profile = Profile(params, BATCH * updates, flops, value, std)
        sizes.setdefault(params, []).append(profile)
    return list(sizes.values())


def select(rows, way, **which):
    """The rows of a way to train, (algo, weighting, data), on all episodes at a constant rate."""
    which = {"share": "1", "variant": "constant", **dict(zip(("algo", "weighting", "data"), way)),
             **which}
    return [row for row in rows if which.items() <= row.items()]


def mean_profile(runs):
    """The mean of several seeds' Profiles of one size; of what all of them have reached."""
    count = min(len(run.flops) for run in runs)
    value = np.mean([run.value[:count] for run in runs], axis=0)
    variance = np.sum([run.std[:count] ** 2 for run in runs], axis=0) / len(runs) ** 2
    return runs[0].take(slice(count))._replace(value=value, std=np.sqrt(variance))


def resampled(sizes, rng):
    """The sizes' mean Profiles, with seeds drawn again and evaluation noise added.

    The same seeds for all sizes, if they have equally many: runs of a seed see the same batches and
    are played from the same starts.
    """
    found, numbers = [], []
    for runs in sizes:
        if len(numbers) != len(runs):
            numbers = rng.integers(len(runs), size=len(runs))
        profile = mean_profile([runs[number] for number in numbers])
        noise = profile.std * rng.standard_normal(len(profile.value))
        found.append(profile._replace(value=profile.value + noise))
    return found


# ---------------------------------------------------------------- the return's laws

class Optima(NamedTuple):
    """At each budget the best value of all sizes, and N_opt and D_opt, which may not be known."""
    budgets: np.ndarray
    best: np.ndarray
    params: np.ndarray  # nan: the parabola has its top outside of what was measured
    transitions: np.ndarray


def fitted(rows):
    """The rows of those sizes that laws are of."""
    return [row for row in rows if row["size"] not in WIDE]


def budgets_of(profiles):
    first = min(profile.flops[0] for profile in profiles)
    last = max(profile.flops[-1] for profile in profiles)
    return np.geomspace(first, last, BUDGETS)


def at_budget(profile, column, budget):
    """A column of the profile at a budget, along straight lines in log C; nan outside of it."""
    return np.interp(np.log(budget), np.log(profile.flops), column, left=np.nan, right=np.nan)


def optima(profiles, budgets):
    """The Optima of profiles of several sizes, the smallest first."""
    log_n = np.log([profile.params for profile in profiles])
    # What each size had returned, and seen, at each budget: (sizes, budgets).
    values = np.array([at_budget(profile, profile.value, budgets) for profile in profiles])
    seen = np.array([at_budget(profile, np.log(profile.transitions), budgets)
                     for profile in profiles])
    params, transitions = np.full((2, len(budgets)), np.nan)
    for number, (value, log_d) in enumerate(zip(values.T, seen.T)):
        known = np.isfinite(value)
        place = top(log_n[known], value[known])
        if np.isfinite(place):
            params[number] = np.exp(place)
            transitions[number] = np.exp(np.interp(place, log_n[known], log_d[known]))
    return Optima(budgets, np.nanmax(values, axis=0), params, transitions)


def top(x, y):
    """Where the parabola through some points is highest; nan if that is not between them."""
    if len(x) < 3:
        return np.nan
    bend, slope, _ = np.polyfit(x, y, 2)
    if bend >= 0:
        return np.nan
    place = -slope / bend / 2
    return place if x[0] < place < x[-1] else np.nan


def operations_of(profiles):
    """Operations a transition of each size, over its whole run."""
    return np.array([profile.flops[-1] / profile.transitions[-1] for profile in profiles])


def exponent(budgets, counts):
    """The slope of log counts over log budgets; nan below three budgets that count."""
    known = np.isfinite(counts)
    if known.sum() < 3:
        return np.nan
    return np.polyfit(np.log(budgets[known]), np.log(counts[known]), 1)[0]


def slope_at_the_end(budgets, best):
    """What the best return gains a decade, over the last decade of compute."""
    last = (budgets >= budgets[-1] / 10 * 0.999) & np.isfinite(best)
    return np.polyfit(np.log10(budgets[last]), best[last], 1)[0]


def low_mid_high(mid, values):
    """low, mid, high of a 95% bootstrap; nan becomes None, which JSON can hold."""
    values = np.array(values)
    values = values[np.isfinite(values)]
    if not np.isfinite(mid) or len(values) < 10:
        return {"low": None, "mid": finite(mid), "high": None}
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": finite(low), "mid": finite(mid), "high": finite(high)}


def finite(number):
    return float(f"{number:.5g}") if np.isfinite(number) else None


def return_laws(sizes, seed=0):
    """The exponents of the return, by the paper's way, as a dict for JSON."""
    rng = np.random.default_rng(seed)
    profiles = [mean_profile(runs) for runs in sizes]
    budgets = budgets_of(profiles)
    found = optima(profiles, budgets)
    names = ("a", "b", "gain")
    again = {name: [] for name in names}
    for _ in range(RESAMPLES):
        for name, value in zip(names, numbers_of(optima(resampled(sizes, rng), budgets))):
            again[name].append(value)
    mids = zip(names, numbers_of(found))
    laws = {name: low_mid_high(mid, again[name]) for name, mid in mids}
    laws["budgets"] = [finite(budget) for budget in budgets]
    laws["best_return"] = [finite(value) for value in found.best]
    laws["N_opt"] = [finite(value) for value in found.params]
    laws["D_opt"] = [finite(value) for value in found.transitions]
    return laws


def numbers_of(found):
    """a, b and the gain at the end of some Optima"""
    return (exponent(found.budgets, found.params), exponent(found.budgets, found.transitions),
            slope_at_the_end(found.budgets, found.best))


# ---------------------------------------------------------------- the loss' law

class Law(NamedTuple):
    """L(N, D) = exp(e) + exp(a) N^-alpha + exp(b) D^-beta, for N and D over `scale`."""
    theta: np.ndarray  # e, a, b, alpha, beta
    scale: tuple  # geometric means of N and of D

    def parts(self, n, d):
        """The three terms, each (rows,)"""
        e, a, b, alpha, beta = self.theta
        n, d = np.log(n / self.scale[0]), np.log(d / self.scale[1])
        return np.exp(e) + 0 * n, np.exp(a - alpha * n), np.exp(b - beta * d)

    def loss(self, n, d):
        return sum(self.parts(n, d))

    def exponents(self, g):
        """a and b of N_opt and D_opt, where a transition takes N^g operations"""
        alpha, beta = self.theta[3:]
        return beta / (alpha + g * beta), alpha / (alpha + g * beta)


def huber(residual):
    """Its sum over residuals: squares near 0, and beyond DELTA absolute values."""
    size = np.abs(residual)
    return np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum()


def step_of(law, n, d, loss, damping):
    """A step of Levenberg and Marquardt for log L, its rows weighted as Huber's loss has it."""
    log_n, log_d = np.log(n / law.scale[0]), np.log(d / law.scale[1])
    parts = np.array(law.parts(n, d))
    of_e, of_a, of_b = parts / parts.sum(0)  # the derivatives of log L by e, a and b
    slopes = np.stack([of_e, of_a, of_b, -of_a * log_n, -of_b * log_d])  # (5, rows)
    residual = np.log(parts.sum(0) / loss)
    weighted = slopes / np.maximum(1, np.abs(residual) / DELTA)
    square = weighted @ slopes.T
    square += damping * np.diag(np.diag(square) + 1e-9)
    return np.linalg.solve(square, weighted @ residual)


def improve(law, n, d, loss, steps):
    """The Law after so many steps, or when none helps any more -> it, and its Huber loss"""
    damping, now = 1e-2, huber(np.log(law.loss(n, d) / loss))
    for _ in range(steps):
        theta = law.theta - np.clip(step_of(law, n, d, loss, damping), -1, 1)
        theta = np.clip(theta, -20, 20)
        theta[3:] = np.clip(theta[3:], 0.01, 3)  # a loss does not rise with N or D
        tried = law._replace(theta=theta)
        then = huber(np.log(tried.loss(n, d) / loss))
        if then < now:
            law, now, damping = tried, then, max(damping / 3, 1e-9)
            continue
        damping *= 4
        if damping > 1e6:
            break
    return law, now


def fit_loss(n, d, loss, start=None):
    """The Law of rows N, D, loss, each (rows,): the best of several starts, or from one."""
    scale = (np.exp(np.log(n).mean()), np.exp(np.log(d).mean()))
    if start is not None:
        return improve(start, n, d, loss, 40)[0]
    tried = []
    for share in (0.3, 0.9):  # of the lowest loss, that stays for ever
        for alpha in (0.2, 0.7):
            for beta in (0.2, 0.7):
                rest = np.log((1 - share) * loss.min() / 2)
                theta = np.array([np.log(share * loss.min()), rest, rest, alpha, beta])
                tried.append(improve(Law(theta, scale), n, d, loss, 150))
    return min(tried, key=lambda result: result[1])[0]


def flat(sizes):
    """N, D, loss of all rows of all runs"""
    runs = [run for of_size in sizes for run in of_size]
    n = np.concatenate([np.full(len(run.value), run.params) for run in runs])
    d = np.concatenate([run.transitions for run in runs])
    return n, d, np.concatenate([run.value for run in runs])


def power_of_operations(sizes):
    """g: a transition takes N^g operations"""
    profiles = [runs[0] for runs in sizes]
    log_n = np.log([profile.params for profile in profiles])
    return np.polyfit(log_n, np.log(operations_of(profiles)), 1)[0]


def loss_law(sizes, seed=0):
    """The parametric fit of a loss, as a dict for JSON. Runs are drawn again for the intervals."""
    rng, g = np.random.default_rng(seed), power_of_operations(sizes)
    rows = flat(sizes)
    law = fit_loss(*rows)
    runs = [run for of_size in sizes for run in of_size]
    again = []
    for _ in range(LOSS_RESAMPLES):
        chosen = [runs[number] for number in rng.integers(len(runs), size=len(runs))]
        if len({run.params for run in chosen}) >= 3:
            other = fit_loss(*flat([chosen]), start=law)
            again.append((*other.theta[3:], *other.exponents(g), np.exp(other.theta[0])))
    mids = (*law.theta[3:], *law.exponents(g), np.exp(law.theta[0]))
    names = ("alpha", "beta", "a", "b", "E")
    found = {name: low_mid_high(mid, values) for name, mid, values in zip(names, mids, zip(*again))}
    found["A"] = finite(np.exp(law.theta[1]) * law.scale[0] ** law.theta[3])
    found["B"] = finite(np.exp(law.theta[2]) * law.scale[1] ** law.theta[4])
    found["g"] = finite(g)
    found["error"] = finite(mean_error(law, rows))
    return found


def mean_error(law, rows):
    """The mean error of a Law on some rows, as a share of the loss."""
    n, d, loss = rows
    return np.abs(law.loss(n, d) / loss - 1).mean()


# ---------------------------------------------------------------- what was predicted

def beginnings(sizes):
    """Without the largest size, and without the last factor of LAST of compute."""
    end = max(run.flops[-1] for runs in sizes for run in runs) / LAST
    kept = [[run.take(run.flops <= end) for run in runs] for runs in sizes[:-1]]
    return [runs for runs in kept if len(runs[0].flops)]


def predicted_losses(sizes):
    """Fit on the beginnings, predict the rest -> the errors, and the end of the largest run"""
    law = fit_loss(*flat(beginnings(sizes)))
    end = max(run.flops[-1] for runs in sizes for run in runs) / LAST
    late = [[run.take(run.flops > end) for run in runs] for runs in sizes[:-1]]
    rest = flat([*late, sizes[-1]])
    largest = mean_profile(sizes[-1])
    predicted = law.loss(np.array([largest.params]), largest.transitions[-1:])[0]
    return {"rows": len(rest[0]), "mean_error": finite(mean_error(law, rest)),
            "at_the_end": {"predicted": finite(predicted), "measured": finite(largest.value[-1])}}


def predicted_return(sizes):
    """The best return, and N_opt, beyond the beginnings: by straight lines over log C.

    The return's line goes through the last decade of the beginnings.
    """
    begun = [mean_profile(runs) for runs in beginnings(sizes)]
    whole = [mean_profile(runs) for runs in sizes]
    known, measured = optima(begun, budgets_of(begun)), optima(whole, budgets_of(whole))
    end = measured.budgets[-1]
    last = (known.budgets >= known.budgets[-1] / 10) & np.isfinite(known.best)
    line = np.polyfit(np.log(known.budgets[last]), known.best[last], 1)
    found = {"budget": finite(end), "return": {"predicted": finite(np.polyval(line, np.log(end))),
                                               "measured": finite(measured.best[-1])}}
    counted = np.isfinite(known.params)
    if counted.sum() >= 3:
        found["N_opt"] = predicted_sizes(known.budgets[counted], known.params[counted], measured)
    return found


def predicted_sizes(budgets, params, measured):
    """N_opt at the budgets behind `budgets` where it could be measured: by which factor the law of
    `params` is wrong there."""
    line = np.polyfit(np.log(budgets), np.log(params), 1)
    ahead = np.isfinite(measured.params) & (measured.budgets > budgets[-1])
    wrong = np.polyval(line, np.log(measured.budgets[ahead])) - np.log(measured.params[ahead])
    factor = np.exp(np.abs(wrong).mean()) if ahead.any() else np.nan
    return {"budgets_compared": int(ahead.sum()), "wrong_by_factor": finite(factor)}


# ---------------------------------------------------------------- synthetic sweeps: the bias

def synthetic(sizes, rng, noise, alpha=0.5, beta=0.5, size=0.35):
    """A sweep of the same sizes and budgets whose return obeys a known law, with noise.

    return = 1 - A / N^alpha - B / D^beta, the two terms equal in the sweep's middle, and `size` in
    all there. size 0: a sweep of noise alone.
    """
    profiles = [runs[0] for runs in sizes]
    n_mid = np.exp(np.log([profile.params for profile in profiles]).mean())
    d_mid = np.exp(np.log(np.concatenate([profile.transitions for profile in profiles])).mean())
    made = []
    for profile in profiles:
        short = (profile.params / n_mid) ** -alpha + (profile.transitions / d_mid) ** -beta
        value = 1 - size / 2 * short + noise * rng.standard_normal(len(short))
        made.append([profile._replace(value=value, std=np.full(len(short), noise))])
    return made


def recovery(sizes, noise, times=100, seed=0, **law):
    """The mean and deviation of the estimated a over synthetic sweeps, and the true one."""
    rng, g = np.random.default_rng(seed), power_of_operations(sizes)
    alpha, beta = law.get("alpha", 0.5), law.get("beta", 0.5)
    estimates = []
    for _ in range(times):
        profiles = [runs[0] for runs in synthetic(sizes, rng, noise, **law)]
        estimates.append(numbers_of(optima(profiles, budgets_of(profiles)))[0])
    known = [estimate for estimate in estimates if np.isfinite(estimate)] or [np.nan]
    return {"true_a": finite(beta / (alpha + g * beta)), "mean_a": finite(np.mean(known)),
            "deviation": finite(np.std(known)), "fitted": finite(np.mean(np.isfinite(estimates)))}


# ---------------------------------------------------------------- all of it

def loss_column(way):
    """The cloning loss that a way to train has in view: with weights, where it weighs the data."""
    return "weighted_clone_loss" if way[1] else "clone_loss"


def learnt(rows, loss):
    """The rows that the law of a loss is of: behind the learning rate's rise, and for the critic as
    long as it learns the returns that were observed."""
    last = HALF if loss == "critic_loss" else np.inf
    return [row for row in rows if RISE < row["updates"] <= last]


def laws_of(rows, way):
    """Everything that is fitted to one way to train, (algo, weighting, data)."""
    rows = select(rows, way)
    sizes = profiles_of(rows, "return")
    if len(sizes) < FEWEST:
        return {"sizes": len(sizes), "why_not": f"a law needs {FEWEST} sizes"}
    noise = float(np.mean([run.std.mean() for runs in sizes for run in runs]))
    found = {"sizes": len(sizes), "seeds": len({row["seed"] for row in rows}),
             "return": return_laws(sizes), "held_out": {"return": predicted_return(sizes)},
             "estimator": {"noise": finite(noise), "of_a_law": recovery(sizes, noise),
                           "of_noise_alone": recovery(sizes, noise, size=0)}}
    for name, column in (("clone_loss", loss_column(way)), ("critic_loss", "critic_loss")):
        some = learnt(rows, name)
        of_loss = profiles_of(some, column)
        found[name] = loss_law(of_loss)
        found[name]["rank_correlation_with_the_return"] = correlations(some, column)
        found["held_out"][name] = predicted_losses(of_loss)
    return found


def correlations(rows, column):
    """Spearman's, of a loss and the return: over all rows, and over the runs' ends alone."""
    last = max(row["updates"] for row in rows)
    ends = [row for row in rows if row["updates"] == last]
    found = {}
    for name, some in (("all", rows), ("ends", ends)):
        pairs = np.array([(row[column], row["return"]) for row in some])
        ranks = pairs.argsort(0).argsort(0)
        found[name] = finite(np.corrcoef(ranks.T)[0, 1])
    return found


def laws_of_all(rows, ways, variants, shares):
    """What scaling_fit.json holds."""
    laws = {name_of(way): laws_of(rows, way) for way in ways}
    laws["variants"] = compare(rows, ways, "variant", variants)
    laws["shares"] = compare(rows, ways, "share", shares)
    return laws


def end_of(rows, columns=("return", "clone_loss", "critic_loss")):
    """The means over seeds of some columns at the last updates."""
    last = max(row["updates"] for row in rows)
    rows = [row for row in rows if row["updates"] == last]
    means = {name: finite(np.mean([row[name] for row in rows])) for name in columns}
    return {"updates": last, **means}


def compare(rows, ways, column, values):
    """Runs that differ in one column, at the end of the shortest: for each way and size that has
    several values."""
    found = {}
    for way in ways:
        for size in dict.fromkeys(row["size"] for row in rows):
            ends = {}
            for value in values:
                some = select(rows, way, size=size, seed=0, **{column: value})
                if some:
                    ends[value] = some
            if len(ends) < 2:
                continue
            last = min(max(row["updates"] for row in some) for some in ends.values())
            of_size = {}
            for value, some in ends.items():
                of_size[value] = end_of([row for row in some if row["updates"] <= last])
            found[f"{name_of(way)}, {size}"] = of_size
    return found


def name_of(way):
    algo, weighting, part = way
    return f"{algo}, focus {weighting}, {part}"
