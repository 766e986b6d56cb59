"""The scaling study: its sizes, its operations, runs that are killed, and what its fits recover."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from behaviors import TASKS
from checkpoint import RunError
from data import Sampler
from kernels import graph
from learner import Learner
from model import SIZES
from studies import scaling, scaling_fit, scaling_show
from studies.scaling import Job, new_learner, open_part, operations, shape
from studies.scaling_fit import budgets_of, mean_profile, numbers_of, optima, profiles_of
from tests.test_launches import captured

PAC = Job("pac", 0, "switching", "1", "w16", 0)


def shortened(monkeypatch):
    """A run of eight updates, evaluated after four of them and at the end, without roll-outs."""
    monkeypatch.setattr(scaling, "EVALUATED", (4, 8))
    monkeypatch.setattr(scaling, "SAVE_EVERY", 3)
    monkeypatch.setattr(scaling, "WARMUP", 3)
    monkeypatch.setattr(scaling, "HALF", 6)
    monkeypatch.setattr(scaling, "HELD_OUT_STATES", 256)
    monkeypatch.setattr(scaling, "scores", lambda *_: {"return": 0.5, "return_std": 0.1})


def test_graphs_make_the_same_updates(monkeypatch, small_data):
    """As --device cuda has them; a CPU plays the GPU. The rate is one that a graph reads anew."""
    monkeypatch.setattr(graph, "capture", captured)
    monkeypatch.setattr(graph, "aside", lambda function: function())
    part = scaling.open_part(small_data)
    ends = []
    for by_graph in (False, True):
        learner = scaling.new_learner(PAC, part.metas)
        learner.updates = scaling.WARMUP - 3  # across the warm-up's end
        updates = graph.Graphs(learner) if by_graph else learner
        sampler = scaling.sampler_for(learner, part)
        for number in range(8):
            candidates = sampler.sample(np.random.default_rng(number))
            updates.update_from(candidates, torch.Generator().manual_seed(number))
        ends.append(torch.cat([weight.flatten() for weight in learner.weights]))
    assert torch.equal(*ends)


def test_tiny_and_small_are_sizes_of_the_family():
    assert shape(32) == SIZES["tiny"]
    assert shape(64) == SIZES["small"]


def test_the_sizes_span_two_decades_and_every_one_can_be_made(small_data):
    metas = open_part(small_data).metas
    counts = []
    for width in scaling.WIDTHS:
        job = Job("bc_q", 0, "switching", "1", f"w{width}", 0)
        counts.append(scaling.parameters(new_learner(job, metas, "meta").model))
    assert counts == sorted(counts)
    assert counts[-1] > 50 * counts[0]


@pytest.mark.parametrize("algo", ["bc_q", "pac"])
@pytest.mark.parametrize("updates, phase", [(0, "warm"), (scaling.WARMUP, "after")])
def test_the_operations_are_those_that_torch_counts_in_an_update(small_data, algo, updates, phase):
    job = Job(algo, 0, "switching", "1", "w32", 0)
    part = open_part(small_data)
    learner = new_learner(job, part.metas)
    learner.updates = updates
    batch = Sampler(**part.training, batch_size=scaling.BATCH, steps=3)
    batch = batch.sample(np.random.default_rng(0))
    with FlopCounterMode(display=False) as counter:
        learner.update_from(batch, torch.Generator())
    counted = getattr(operations(new_learner(job, part.metas, "meta")), phase)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_operations_of_a_run_are_those_of_its_two_phases():
    cost = scaling.Operations(warm=2, after=10)
    assert cost.until(100) == 200
    assert cost.until(scaling.WARMUP + 3) == 2 * scaling.WARMUP + 30


def test_the_phases_are_counts_of_updates(small_data):
    """The same updates whatever follows them: so a run's beginning is the shorter run."""
    learner = new_learner(PAC, open_part(small_data).metas)
    shares, rates = {}, {}
    for updates in (0, 100, 511, 512, 2047, 2048, 4095):
        learner.updates = updates
        learner.begin_update()
        shares[updates] = learner.share()
        rates[updates] = learner.optimizer.param_groups[0]["lr"]
    assert shares == {0: 1, 100: 1, 511: 1, 512: 0.5, 2047: 0.5, 2048: 0, 4095: 0}
    highest = scaling.learning_rate(16)
    assert rates[0] < rates[100] < rates[511]
    assert rates[511] == rates[4095] == highest


def test_a_decayed_end_falls_from_three_quarters_of_the_updates_on(small_data):
    learner = new_learner(PAC._replace(variant="decayed"), open_part(small_data).metas)
    rates = []
    for learner.updates in (3072, 3584, 4095):
        learner.begin_update()
        rates.append(learner.optimizer.param_groups[0]["lr"] / scaling.learning_rate(16))
    assert rates == pytest.approx([1, 0.5, 0], abs=0.001)


def test_no_episode_is_both_trained_on_and_held_out(small_data):
    part, quarter = open_part(small_data), open_part(small_data, "1/4")
    for kept, fewer, away in zip(*(sources["tasks"] for sources in
                                   (part.training, quarter.training, part.held_out))):
        starts = set(kept.episodes["start"])
        assert starts.isdisjoint(away.episodes["start"])
        assert starts > set(fewer.episodes["start"])
        assert len(starts) + len(away.episodes) == kept.meta["episodes"]


class Killed(Exception):
    pass


def test_a_killed_run_ends_as_an_undisturbed_one(small_data, tmp_path, monkeypatch):
    """Before its first checkpoint, after it, and after an evaluation. The rows are the same, losses
    to the last bit."""
    shortened(monkeypatch)
    whole = scaling.train(PAC, tmp_path / "whole", small_data, last=8)
    update = Learner.update_from
    for last_update in (2, 3, 7):

        def killed(self, *args):
            if self.updates == last_update:
                raise Killed
            return update(self, *args)

        monkeypatch.setattr(Learner, "update_from", killed)
        with pytest.raises(Killed):
            scaling.train(PAC, tmp_path / "killed", small_data, last=8)
    monkeypatch.setattr(Learner, "update_from", update)
    again = scaling.train(PAC, tmp_path / "killed", small_data, last=8)
    assert [row["updates"] for row in again] == [4, 8]
    assert again == whole
    assert json.loads((tmp_path / "killed" / "rows.json").read_text())["rows"] == whole


def test_a_run_does_not_go_on_with_other_data(small_data, tmp_path, monkeypatch):
    shortened(monkeypatch)
    scaling.train(PAC, tmp_path / "run", small_data, last=4)
    path = tmp_path / "run/rows.json"
    kept = json.loads(path.read_text())
    kept["checksums"][0] += 1
    path.write_text(json.dumps(kept))
    with pytest.raises(RunError, match="was begun on other data"):
        scaling.train(PAC, tmp_path / "run", small_data, last=8)


def test_a_checkpoint_is_saved_of_sound_weights_alone(small_data, tmp_path, monkeypatch):
    """On a GPU nobody else asks: a run would go on from after the update that failed."""
    shortened(monkeypatch)
    asked = []
    monkeypatch.setattr(Learner, "check", lambda self, metrics: asked.append(self.updates))
    saved = []
    monkeypatch.setattr(scaling, "save", lambda run, learner, **_: saved.append(learner.updates))
    scaling.train(PAC, tmp_path / "run", small_data, last=8)
    assert saved and set(saved) <= set(asked)


# ---------------------------------------------------------------- the laws

# Of the sizes, on seven tasks: parameters, and operations of an update after the warm-up.
SIZES_MADE = {"w8": (13_394, 0.034e9), "w16": (31_514, 0.091e9), "w32": (83_162, 0.308e9),
              "w64": (248_090, 1.39e9), "w96": (569_594, 4.95e9), "w128": (956_442, 10.8e9)}
ALPHA, BETA = 0.5, 0.5
NOISE = 0.03  # about that of three episodes a task


def made_rows(rng, way=("bc_q", 0, "switching"), alpha=ALPHA, beta=BETA, noise=NOISE, seeds=(0,)):
    """A table of the whole sweep whose return and losses obey known laws."""
    rows = []
    for seed in seeds:
        for size, (params, flops) in SIZES_MADE.items():
            for updates in scaling.EVALUATED:
                n, d = params / 120_000, updates / 512
                short = 0.5 * n**-alpha + 0.5 * d**-beta
                loss = 2 + short * np.exp(0.01 * rng.standard_normal())
                rows.append({
                    **dict(zip(("algo", "weighting", "data"), way)), "share": "1", "size": size,
                    "seed": seed, "variant": "constant", "params": params, "updates": updates,
                    "flops": flops * updates, "return_std": noise, "clone_loss": loss,
                    "return": 1 - 0.35 * short + noise * rng.standard_normal(),
                    "weighted_clone_loss": loss, "critic_loss": loss})
    return rows


def true_exponent(sizes, alpha, beta):
    return beta / (alpha + scaling_fit.power_of_operations(sizes) * beta)


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (0.3, 0.6), (0.6, 0.3)])
def test_known_exponents_are_recovered_from_a_sweep_with_our_noise(alpha, beta):
    """The means over 30 sweeps. What is left of the sweep's edge pulls a towards that of noise
    alone, 0.6: by 0.02 where it is 0.42, by 0.07 where it is 0.30. A single sweep errs by 0.05
    to 0.08."""
    rng, estimates = np.random.default_rng(0), []
    for _ in range(30):
        sizes = profiles_of(made_rows(rng, alpha=alpha, beta=beta), "return")
        profiles = [mean_profile(runs) for runs in sizes]
        estimates.append(numbers_of(optima(profiles, budgets_of(profiles)))[:2])
    assert np.isfinite(estimates).all()
    a = true_exponent(sizes, alpha, beta)
    mean_a, mean_b = np.mean(estimates, axis=0)
    assert mean_a == pytest.approx(a, abs=0.12)
    assert mean_b == pytest.approx(a * alpha / beta, abs=0.15)
    assert np.std(estimates, axis=0).max() < 0.15


def test_the_interval_of_one_sweep_holds_the_known_exponent():
    sizes = profiles_of(made_rows(np.random.default_rng(1), seeds=(0, 1)), "return")
    a = scaling_fit.return_laws(sizes)["a"]
    assert a["low"] < true_exponent(sizes, ALPHA, BETA) < a["high"]
    assert a["low"] < a["mid"] < a["high"]


def test_noise_alone_gives_an_exponent_too():
    """Why no exponent is told without this one beside it: the sweep's edges make it."""
    sizes = profiles_of(made_rows(np.random.default_rng(0)), "return")
    alone = scaling_fit.recovery(sizes, NOISE, times=50, size=0)
    assert 0.4 < alone["mean_a"] < 0.8 and alone["deviation"] > 0.1


def test_the_law_of_a_loss_is_recovered():
    sizes = profiles_of(made_rows(np.random.default_rng(0)), "clone_loss")
    found = scaling_fit.loss_law(sizes)
    assert found["E"]["mid"] == pytest.approx(2, abs=0.1)
    assert found["alpha"]["mid"] == pytest.approx(ALPHA, abs=0.1)
    assert found["beta"]["mid"] == pytest.approx(BETA, abs=0.1)
    assert found["a"]["mid"] == pytest.approx(true_exponent(sizes, ALPHA, BETA), abs=0.05)
    assert found["error"] < 0.01


def test_huber_s_loss_leaves_outliers_alone():
    rng = np.random.default_rng(0)
    n, d, loss = scaling_fit.flat(profiles_of(made_rows(rng), "clone_loss"))
    clean = scaling_fit.fit_loss(n, d, loss)
    loss[[3, 20]] *= 3
    spoilt = scaling_fit.fit_loss(n, d, loss)
    assert spoilt.loss(n, d) == pytest.approx(clean.loss(n, d), rel=0.02)


def test_the_top_of_a_parabola_counts_only_inside():
    x = np.array([0.0, 1, 2, 3])
    assert scaling_fit.top(x, -(x - 1.2) ** 2) == pytest.approx(1.2)
    assert np.isnan(scaling_fit.top(x, -(x - 3.1) ** 2))  # an edge
    assert np.isnan(scaling_fit.top(x, x**2))  # a valley
    assert np.isnan(scaling_fit.top(x[:2], np.array([1.0, 2])))  # two sizes alone


def test_what_was_held_out_is_not_in_the_prediction():
    """The largest size's rows, and the last factor of three of compute, may be anything."""
    rng = np.random.default_rng(0)
    sizes = profiles_of(made_rows(rng), "clone_loss")
    before = scaling_fit.predicted_losses(sizes)["at_the_end"]["predicted"]
    end = max(runs[0].flops[-1] for runs in sizes) / scaling_fit.LAST
    for number, runs in enumerate(sizes):
        late = runs[0].flops > end
        if number == len(sizes) - 1:
            late[:] = True
        runs[0].value[late] *= 5
    after = scaling_fit.predicted_losses(sizes)["at_the_end"]
    assert after["predicted"] == before
    assert before == pytest.approx(after["measured"] / 5, rel=0.05)


# ---------------------------------------------------------------- the commands

def write_made_table(folder, rows):
    folder.mkdir()
    scaling.scaling_table(folder).append({**dict.fromkeys(TASKS, 0.5), **row} for row in rows)


def test_fit_and_plot_need_the_table_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_fit, "RESAMPLES", 20)
    monkeypatch.setattr(scaling_fit, "LOSS_RESAMPLES", 12)
    rng = np.random.default_rng(0)
    rows = [row for way in scaling.COMPARED[:2] for row in made_rows(rng, way, seeds=(0, 1))]
    rows += [{**row, "share": "1/4"} for row in made_rows(rng) if row["size"] == "w32"]
    rows += [{**row, "variant": "decayed"} for row in made_rows(rng) if row["size"] == "w16"]
    write_made_table(tmp_path / "made", rows)
    scaling.main(["fit", "--folder", str(tmp_path / "made")])
    scaling.main(["plot", "--folder", str(tmp_path / "made")])
    laws = json.loads((tmp_path / "made" / "scaling_fit.json").read_text())
    one = laws["bc_q, focus 0, switching"]
    assert one["sizes"] == len(SIZES_MADE) and one["seeds"] == 2
    assert set(one["return"]["a"]) == {"low", "mid", "high"}
    assert laws["pac, focus 5, switching"] == {"sizes": 0, "why_not": "a law needs 4 sizes"}
    assert list(laws["variants"]["bc_q, focus 0, switching, w16"]) == ["constant", "decayed"]
    assert list(laws["shares"]["bc_q, focus 0, switching, w32"]) == ["1", "1/4"]
    figures = {path.name for path in (tmp_path / "made").glob("*.png")}
    assert figures == {"scaling.png", "scaling_optima.png", "scaling_losses.png",
                       "scaling_data.png"}


def test_sizes_are_drawn_with_the_same_seeds():
    """A seed's runs share batches and starts: what moves all of them is no difference of sizes."""
    flops, none = np.array([1e9, 2e9]), np.zeros(2)
    sizes = [[scaling_fit.Profile(params, flops, flops, none + seed, none) for seed in (0.0, 1.0)]
             for params in (10, 20, 30)]
    means = {tuple(profile.value[0] for profile in scaling_fit.resampled(sizes, rng))
             for rng in map(np.random.default_rng, range(20))}
    assert means == {(0, 0, 0), (0.5, 0.5, 0.5), (1, 1, 1)}


@pytest.mark.parametrize("flags, said", [
    (["fit"], "has no rows yet"),
    (["plot"], "has no rows yet"),
    (["run", "--index", "999"], "the plan has runs 0 to"),
    (["run", "--episodes", "1"], "one alone tells of no spread"),
    (["run", "--updates", "0", "--index", "0"], "argument --updates: 0: it has to be 1 or more"),
    (["run", "--updates", "-8", "--index", "0"], "argument --updates: -8: it has to be 1 or more"),
    (["run", "--workers", "0"], "argument --workers: 0: it has to be 1 or more"),
    (["run", "--index", "0", "--datasets", "nowhere"], "nowhere/switching: no data set here"),
])
def test_what_cannot_be_is_said_in_a_line(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        scaling.main([*flags, "--folder", str(tmp_path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_trial_s_rows_do_not_come_among_the_sweep_s(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["run", "--updates", "8"])
    assert "give it a --folder of its own" in capsys.readouterr().err


def test_a_run_that_is_in_the_table_is_not_made_again(tmp_path, capsys):
    job = scaling.sweep()[0]
    rows = [row for row in made_rows(np.random.default_rng(0)) if row["size"] == job.size]
    write_made_table(tmp_path / "made", rows)
    scaling.main(["run", "--index", "0", "--folder", str(tmp_path / "made")])
    assert "run 0 is in" in capsys.readouterr().out


def test_a_run_of_the_sweep_leaves_its_rows(small_data, tmp_path, capsys):
    """By real roll-outs, and shorter. A second call finds the rows there."""
    flags = ["run", "--index", "1", "--folder", str(tmp_path), "--updates", "2", "--episodes", "2",
             "--datasets", str(small_data.parent)]
    scaling.main(flags)
    row, = scaling.scaling_table(tmp_path).rows()
    assert Job(*(row[column] for column in scaling.KEY)) == scaling.sweep()[1]
    assert row["updates"] == 2 and row["flops"] > 0
    assert np.isfinite([row[column] for column in ("return", "clone_loss", "critic_loss")]).all()
    assert np.isfinite(row["Reacher-v5"]) and np.isnan(row["Pusher-v5"])  # there is no such data
    scaling.main(flags)
    assert "run 1 is in" in capsys.readouterr().out


def test_the_plan_tells_what_is_missing(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "WIDTHS", (8,))
    monkeypatch.setattr(scaling, "MEASURED_AT", ("w8",))
    monkeypatch.setattr(scaling, "SHARES_AT", "w8")
    rows = [row for row in made_rows(np.random.default_rng(0)) if row["size"] == "w8"]
    write_made_table(tmp_path / "made", rows)
    scaling.main(["plan", "--folder", str(tmp_path / "made"), "--datasets", str(small_data.parent)])
    said = capsys.readouterr().out
    jobs = scaling.sweep()
    assert f"{len(jobs) - 1} of {len(jobs)} runs are missing" in said
    assert said.count("in the table") == 1
    assert said.count("a GPU, with --device cuda") == 16
    assert all(job.name in said for job in jobs)


@pytest.mark.parametrize("device, sizes", [("cpu", {"w8"}), ("cuda", {"w8", "w256", "w512"})])
def test_the_widest_sizes_are_run_on_a_gpu_alone(device, sizes, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(scaling, "WIDTHS", (8,))
    monkeypatch.setattr(scaling, "call", lambda command, log: ran.append(command[4]))
    args = scaling.parse_args(["run", "--device", device, "--folder", str(tmp_path)])
    jobs = scaling.sweep()
    scaling.run(jobs, jobs, scaling.scaling_table(tmp_path), args)
    assert {jobs[index].size for index in ran} == sizes | {"w16", "w32", "w64"}  # and variants


def test_no_law_is_of_the_sizes_that_a_gpu_has_trained(tmp_path):
    """They are drawn; with one seed and the last decades to themselves they would bend every law."""
    rows = made_rows(np.random.default_rng(0))
    wide = [{**row, "size": "w256", "params": 10 * row["params"], "return": 5.0} for row in rows
            if row["size"] == "w128"]
    figure = scaling_show.profiles_figure(rows + wide, [("bc_q", 0, "switching")])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert max(lines["the best"].get_ydata()) < 2
    assert scaling_fit.fitted(rows + wide) == rows


def test_every_run_of_the_sweep_is_another_one():
    jobs = scaling.sweep()
    assert len(set(jobs)) == len(jobs) == len({job.name for job in jobs})
    assert jobs[0].seed == 0 and jobs[-1].seed == 1
