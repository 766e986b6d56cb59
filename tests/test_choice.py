"""What studies.choice says on tables whose answer is known, and that it plays nothing twice; and
what studies.pretrained may replace."""

import numpy as np
import pytest
import torch

import prepare
from envs import Play
from model import Perceiver
from studies import choice, pretrained
from studies.choice import COLUMNS, NUMBERS, SEED, WAYS, choose, iqms, play, scores_of
from studies.runs import Table
from tests.conftest import tiny

TASKS, EPISODES, RUN = 7, 32, "runs/mine"


def noise(seed, scale=1.0):
    """The scores (ways, tasks, episodes) of ways that are all alike."""
    return scale * np.random.default_rng(seed).standard_normal((len(WAYS), TASKS, EPISODES))


# ---------------------------------------------------------------- the choice

def test_what_is_clearly_best_is_found_by_one_episode():
    scores = noise(0, scale=0.01)
    scores[4] += 1
    picks, found = choose(scores, seen=1, repeats=50)
    assert set(picks) == {4}
    assert (found["one"] - found["own"]).mean() == pytest.approx(1, abs=0.01)
    assert found["chance"].mean() == pytest.approx(1 / len(WAYS), abs=0.01)


def test_who_has_seen_nothing_takes_the_recipe_s_way():
    picks, found = choose(noise(0), seen=0, repeats=50)
    assert not picks.any()
    for name in ("one", "each"):
        assert (found[name] == found["own"]).all()


@pytest.mark.parametrize("seen", [1, 16])
def test_ways_that_are_alike_gain_nothing_by_a_choice(seen):
    """Luck in what was seen is not counted: by that alone the best would seem far better."""
    gains, luck = {"one": [], "each": []}, []
    for seed in range(60):
        scores = noise(seed)
        _, found = choose(scores, seen, repeats=20, seed=seed)
        for name, values in gains.items():
            values.append((found[name] - found["own"]).mean())
        luck.append(iqms(scores[:, :, :seen]).max() - iqms(scores[:, :, :seen])[0])
    error = np.std(gains["one"]) / np.sqrt(len(luck))
    assert np.mean(luck) > 6 * error
    for values in gains.values():
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_level_ways_leave_the_choice_with_the_recipe():
    picks, found = choose(np.ones((len(WAYS), TASKS, EPISODES)), seen=4, repeats=5)
    assert not picks.any() and (found["each"] == 1).all()


def test_a_way_for_each_task():
    """Each task has a way that scores 1 in it, and all else scores 0."""
    scores = np.zeros((len(WAYS), TASKS, EPISODES))
    scores[np.arange(TASKS), np.arange(TASKS)] = 1
    _, found = choose(scores, seen=1, repeats=5)
    assert (found["each"] == 1).all() and (found["one"] == 0).all()


def test_more_seen_is_a_better_choice():
    scores = noise(0)
    scores[3] += 0.5
    gains = []
    for seen in (1, 4, 16):
        _, found = choose(scores, seen, repeats=300)
        gains.append((found["one"] - found["own"]).mean())
    assert gains == sorted(gains) and gains[0] > 0.05


def test_the_interval_of_a_way_is_its_standard_error_s():
    """Where nothing is seen it is that of the mean of all episodes."""
    scores = noise(0)
    _, found = choose(scores, seen=0, repeats=1000)
    middle = np.sort(scores[0].mean(-1))[1:-1]
    assert found["own"].mean() == pytest.approx(middle.mean(), abs=0.02)
    assert found["own"].std() == pytest.approx(1 / np.sqrt(5 * EPISODES), rel=0.25)


# ---------------------------------------------------------------- episodes

def table_of(folder):
    return Table("choice", COLUMNS, COLUMNS[:-1], folder, NUMBERS)


@pytest.fixture
def trained(monkeypatch):
    """An untrained model of Reacher in the place of a run -> its config"""
    metas = prepare.default_metas(["Reacher-v5"])
    metas[0]["reference"] = {"random": -50.0, "expert": 0.0}
    torch.manual_seed(0)
    model = Perceiver(tiny(metas)).eval()
    config = {"algo": "pac", "settings": {"beta": 1.0, "critic": "q"}, "tasks": metas}
    monkeypatch.setattr(choice, "load_run", lambda run: (model, config))
    return config


def test_what_was_played_is_not_played_again(trained, tmp_path, monkeypatch):
    """A table that was made in three parts, one of them killed, is that which was made at once."""
    whole, parts = table_of(tmp_path / "whole"), table_of(tmp_path / "parts")
    play(whole, RUN, 3)
    played, rollout = [], choice.rollout

    def counted(model, metas, episodes, seed, act, eta, first):
        if len(played) == len(WAYS) + 2:
            raise KeyboardInterrupt
        played.append((act, eta, episodes, first))
        return rollout(model, metas, episodes, seed, act, eta, first=first)

    monkeypatch.setattr(choice, "rollout", counted)
    play(parts, RUN, 1)
    with pytest.raises(KeyboardInterrupt):
        play(parts, RUN, 3)
    assert played[len(WAYS):] == [("improved", 2.0, 2, [1]), ("improved", 0.5, 2, [1])]
    monkeypatch.setattr(choice, "rollout", rollout)
    play(parts, RUN, 3)
    for part, at_once in zip(scores_of(parts, RUN), scores_of(whole, RUN)):
        assert np.array_equal(part, at_once)
    before = parts.path.read_bytes()
    play(parts, RUN, 3)
    assert parts.path.read_bytes() == before


def test_a_row_is_the_score_of_its_way_and_episode(trained, tmp_path):
    play(table_of(tmp_path), RUN, 2)
    tasks, scores = scores_of(table_of(tmp_path), RUN)
    assert tasks == ["Reacher-v5"] and scores.shape == (len(WAYS), 1, 2)
    model, _ = choice.load_run(RUN)
    for way, (act, eta) in enumerate(WAYS):
        plays = choice.rollout(model, trained["tasks"], 2, SEED, act, float(eta or 1))
        totals = np.array([one.total for one in plays])
        assert scores[way, 0] == pytest.approx(1 + totals / 50, abs=1e-4)


def test_runs_do_not_mix(trained, tmp_path):
    table = table_of(tmp_path)
    play(table, RUN, 1)
    play(table, "runs/other", 2)
    assert scores_of(table, RUN)[1].shape == (len(WAYS), 1, 1)
    assert len(table.rows()) == 3 * len(WAYS)


def test_a_model_that_was_trained_anew_is_refused(trained, tmp_path, capsys):
    """Its run has the name of the one that played: their episodes would be taken for one's."""
    table, (model, _) = table_of(tmp_path), choice.load_run(RUN)
    play(table, RUN, 1)
    before = table.path.read_bytes()
    with torch.no_grad():
        model.policy_head[-1].bias[0] += 1e-3
    assert "another model that was called" in ends_with_2(capsys, RUN, "--folder", tmp_path)
    assert table.path.read_bytes() == before


def test_tables_and_figure(trained, tmp_path, capsys):
    choice.main([RUN, "--folder", str(tmp_path), "--episodes", "4"])
    said = capsys.readouterr().out
    assert "| 4 episodes | Reacher | IQM |" in said
    assert "| 2 | 16 |" in said and "| 4 | 32 |" not in said  # half of the episodes are never seen
    assert (tmp_path / "choice.png").stat().st_size > 10_000


# ---------------------------------------------------------------- bad input

def ends_with_2(capsys, *flags):
    """What `python -m studies.choice FLAGS` says before it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        choice.main([str(flag) for flag in flags])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_no_run(tmp_path, capsys):
    said = ends_with_2(capsys, tmp_path / "none", "--folder", tmp_path)
    assert said.startswith("studies.choice: ") and "not a run's folder" in said


def test_a_run_without_a_critic_of_actions(trained, tmp_path, capsys):
    for settings in {"beta": 0, "critic": "q"}, {"beta": 1, "critic": "v"}:
        trained["settings"] = settings
        assert "no Q decoder" in ends_with_2(capsys, RUN, "--folder", tmp_path)


def test_a_task_without_a_reference(trained, tmp_path, capsys):
    trained["tasks"][0]["reference"] = None
    assert "Reacher-v5 has no reference" in ends_with_2(capsys, RUN, "--folder", tmp_path)


def test_an_episode_that_fails(trained, tmp_path, capsys, monkeypatch):
    def fail(self, seed):
        self.failed = "the simulator is gone"

    monkeypatch.setattr(Play, "start", fail)
    assert "the simulator is gone" in ends_with_2(capsys, RUN, "--folder", tmp_path)


@pytest.mark.parametrize("flags, says", [
    (["--episodes", "0"], "1 or more"),
    (["--episodes", "1"], "2 or more"),
    (["--episodes", "many"], "invalid int value"),
])
def test_a_number_of_episodes_that_cannot_be(flags, says, capsys):
    assert says in ends_with_2(capsys, *flags)


ROW = "runs/mine,00c0ffee,mean,,Reacher-v5,0,0.5\n"


@pytest.mark.parametrize("rows, says", [
    ("", "no episodes of runs/mine yet"),
    ("runs/other,00c0ffee,mean,,Reacher-v5,0,0.5\n", "no episodes of runs/mine yet"),
    (ROW, "lacks (('improved', '2'), 'Reacher-v5', 0)"),
    (ROW + ROW, "choice.csv, line 3: it is cut off"),
    (ROW + "runs/mine,me", "choice.csv, line 3: it is cut off"),
    (ROW.replace("0.5", "half"), "choice.csv, line 2: it is cut off"),
    (ROW + ROW.replace("00c0ffee,mean,,Reacher-v5,0", "00c0ffef,mean,,Reacher-v5,1"), "several models"),
])
def test_a_table_that_is_not_whole(rows, says, tmp_path, capsys):
    (tmp_path / "choice.csv").write_text(",".join(COLUMNS) + "\n" + rows)
    assert says in ends_with_2(capsys, RUN, "--folder", tmp_path, "--table")


def test_a_table_of_other_columns(tmp_path, capsys):
    (tmp_path / "choice.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as ended:
        scores_of(table_of(tmp_path), RUN)
    assert ended.value.code == 2
    assert "choice.csv, line 2: it is cut off, or of another table" in capsys.readouterr().err


# ---------------------------------------------------------------- studies.pretrained

def pretrained_refuses(capsys, *flags):
    """What `python -m studies.pretrained FLAGS` says before it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        pretrained.main([str(flag) for flag in flags])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_pretrained_model_of_no_run_is_one_line(tmp_path, capsys):
    said = pretrained_refuses(capsys, tmp_path / "none", "--out", tmp_path / "out")
    assert said.startswith("studies.pretrained: ") and said.count("\n") == 1
    assert "none: not a run's folder" in said


@pytest.mark.parametrize("run, out, says", [
    ("run", "run", "is the run itself"),
    ("run", "run/../run", "is the run itself"),
    ("run", "notes", "notes/notes.txt is not this command's"),
    ("run", ".", "/new.partial is not this command's"),
    ("run", "new", "new.partial/notes.txt is not this command's"),
    ("run", "notes/notes.txt", "is a file"),
])
def test_what_pretrained_has_not_written_is_kept(tmp_path, monkeypatch, capsys, run, out, says):
    for path in "run/config.json", "notes/config.json", "notes/notes.txt", "new.partial/notes.txt":
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    said = pretrained_refuses(capsys, run, "--out", out)
    assert says in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_pretrained_has_written_is_replaced(tmp_path, trained, monkeypatch):
    trained |= {"train": {"seed": 0}, "settings": {"act": "mean", "eta": 1.0}}
    out = tmp_path / "out"

    def strip(run, folder):
        folder.mkdir()
        (folder / "config.json").write_text(run.name)
        return None, trained

    for name, value in {"strip": strip, "evaluate": lambda *_: {"iqm": 0.5}, "film": list,
                        "rollout": lambda *_, **__: [], "table": str}.items():
        monkeypatch.setattr(pretrained, name, value)
    monkeypatch.setattr(pretrained.envs, "write_video", lambda path, _: path.write_text(""))
    for name in "one", "two":
        pretrained.main([name, "--out", str(out)])
        assert {path.name for path in out.iterdir()} == {"config.json", "eval.json", "tasks.gif"}
        assert (out / "config.json").read_text() == name
