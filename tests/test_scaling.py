"""The scaling study: its sizes, its operations, runs that are killed, and what its fits recover."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import Sampler
from learner import Learner
from model import SIZES
from studies import scaling
from studies.scaling import Job, config_of, new_learner, open_part, operations, shape

PAC = Job("pac", 0, "switching", "1", "w16", 0)


def shortened(monkeypatch):
    """A run of eight updates, evaluated after four of them and at the end, without roll-outs."""
    monkeypatch.setattr(scaling, "EVALUATED", (4, 8))
    monkeypatch.setattr(scaling, "SAVE_EVERY", 3)
    monkeypatch.setattr(scaling, "WARMUP", 3)
    monkeypatch.setattr(scaling, "HALF", 6)
    monkeypatch.setattr(scaling, "HELD_OUT_STATES", 256)
    monkeypatch.setattr(scaling, "scores", lambda *_: {"return": 0.5, "return_std": 0.1})


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
        learner.set_learning_rate()
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
        learner.set_learning_rate()
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
    """At every update once; the rows, losses to the last bit, are the same."""
    shortened(monkeypatch)
    whole = scaling.train(PAC, tmp_path / "whole", small_data, last=8)
    update = Learner.update_from
    for last_update in range(8):

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
    assert json.loads((tmp_path / "killed" / "rows.json").read_text()) == whole
