"""What `python plots.py RUN` draws: the numbers behind the figures, and which figures there are."""

import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import envs
import plots
import train
from data import RETURN, DataError, Sampler, append
from learner import Learner, settings_for
from tests.conftest import numbered, task_meta, write_task

HOPPER, REACHER = "Hopper-v5", "Reacher-v5"
ALL = ["q", "weights", "target", "value", "attention", "histograms", "frames"]


def trained(algo, small_data, folder):
    """A short run of two tasks, which have 11 and 10 observations, 3 and 2 actions."""
    out = folder / algo
    train.main(["--size", "tiny", "--algo", algo, "--data", str(small_data), "--out", str(out),
                "--steps", "4", "--batch-size", "32", "--eval-every", "0", "--episodes", "0"])
    return out


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    return trained("pac", small_data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def no_renderer(monkeypatch):
    make = envs.make

    def filmed(meta, render=False):
        env = make(meta)
        env.render = lambda: np.zeros((8, 8, 3), np.uint8)
        return env

    monkeypatch.setattr(envs, "make", filmed)


def command(*flags):
    plots.main(plots.parse_args([str(flag) for flag in flags]))


# ---------------------------------------------------------------- the numbers

def test_a_mean_beside_its_range_by_rounding_has_an_arm_of_no_length():
    scores = np.full(3, 0.1)
    mean = scores.mean()
    assert mean > scores.max()  # by the last bit
    centre, low, high = np.array([[mean, 0.1, 0.1], [1.0, 0.5, 2.0]]).T
    arms = plots.arms(centre, low, high)
    assert arms.min() == 0 and arms[:, 1].tolist() == [0.5, 1.0]


def test_a_scene_is_what_the_model_was_trained_on(run):
    """The steps of an episode are those that the sampler would give."""
    scene = plots.Scene(run, REACHER, episode=3)
    task, T = scene.tasks[1], len(scene.reward)
    assert T == 50 and not scene.terminated
    sampler = Sampler([scene.tasks[0], task], 4096)
    batch = sampler.sample(np.random.default_rng(0))
    rows = task.episode_rows(3)
    found = 0
    for row in range(4096):
        for t in (0, 20, 49):
            if batch.task[row] == 1 and (batch.obs[row, 0, :10].numpy() == rows[t, :10]).all():
                assert torch.equal(batch.obs[row, 0], scene.obs[t])
                assert torch.equal(batch.next_obs[row, 0], scene.obs[t + 1])
                assert torch.equal(batch.action[row, 0], scene.action[t])
                assert batch.reward[row, 0] == scene.reward[t]
                assert scene.returns[t] == rows[t, RETURN]
                found += 1
    assert found > 0


def test_values_are_returns_as_the_learner_scales_them(run):
    scene = plots.Scene(run, HOPPER)
    metas = scene.config["tasks"]
    learner = Learner(scene.model.config, settings_for("pac"), metas, 1)
    value = torch.tensor([0.0, 0.3, 1.0])
    returns = torch.from_numpy(scene.as_return(value))
    torch.testing.assert_close(learner.scale(returns, scene.of_task(3)), value)


def test_the_default_episode_is_that_of_the_median_return(run):
    scene = plots.Scene(run, HOPPER)
    returns = scene.tasks[0].episodes["return"]
    assert abs((returns < returns[scene.number]).sum() - len(returns) / 2) <= 1


@torch.no_grad()
def test_attention_is_drawn_without_its_padding(run):
    figure = plots.attention_figure(plots.Scene(run, REACHER))
    ax = figure.axes[0]
    shares = ax.images[0].get_array()  # (L, tokens and words)
    words = [label.get_text() for label in ax.get_xticklabels()]
    plt.close(figure)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert words[:2] == ["obs 0", "obs 1"] and len(words) == shares.shape[1] > 8


@torch.no_grad()
def test_a_larger_eta_weighs_more_draws(run):
    figure = plots.weights_figure(plots.Scene(run, HOPPER))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    plt.close(figure)
    draws = [float(label.split()[-2]) for label in labels]
    assert draws == sorted(draws) and 1 <= draws[0] < draws[-1] <= 64


@torch.no_grad()
@pytest.mark.parametrize("terminated", [False, True])
def test_the_target_is_a_reward_and_what_follows_unless_nothing_does(run, terminated):
    scene = plots.Scene(run, HOPPER)
    scene.terminated, scene.step = terminated, len(scene.reward) - 1
    figure = plots.target_figure(scene)
    bars = figure.axes[0].patches
    centres = np.array([bar.get_x() + bar.get_width() / 2 for bar in bars])
    target = np.array([bar.get_height() for bar in bars])
    plt.close(figure)
    assert target.sum() == pytest.approx(1, abs=1e-4)
    latents, policy = scene.at_state(scene.step + 1)
    after = scene.as_return(scene.q(latents, scene.draws(policy, 64)).mean())
    expected = scene.reward[-1] + (0 if terminated else 0.99) * after
    assert (target * centres).sum() == pytest.approx(float(expected), rel=1e-3, abs=0.05)


def test_each_task_is_of_the_first_set_that_has_it(tmp_path):
    for folder, name in (("one", "a"), ("two", "b"), ("two", "a")):
        write_task(tmp_path / folder / name, [3])
    found = plots.first_of(["b", "a"], [str(tmp_path / "one"), str(tmp_path / "two")])
    assert [task.folder for task in found] == [tmp_path / "two/b", tmp_path / "one/a"]
    with pytest.raises(DataError, match="no task 'c'"):
        plots.first_of(["c"], [str(tmp_path / "one")])


def test_a_curve_without_evaluations_on_the_way_shows_the_scores_at_the_end(tmp_path):
    tasks = {"a": {"score": 0.4, "return": 90.0}, "b": {"score": None, "return": 7.0}}
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": tasks, "iqm": 0.4}))
    figure, ax = plt.subplots()
    plots.draw_scores(ax, [{"update": 5, "loss": 1.0}], tmp_path / "eval.json", 600)
    points = [(line.get_label(), *line.get_xydata()[0]) for line in ax.get_lines()]
    plt.close(figure)
    assert ax.get_ylabel() == "normalised score"
    assert points[0] == ("a", 600, 0.4) and points[1][1:] == (600, 0.4) and len(points) == 2


@pytest.mark.parametrize("count, named", [(20, 20), (132, 0)])
def test_a_legend_of_many_tasks_leaves_the_panels_their_room(tmp_path, count, named):
    """That of 132 tasks was taller than the figure, and the panels had shrunk to nothing."""
    tasks = {f"task-{k}": {"score": 0.4, "return": 9.0} for k in range(count)}
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": tasks, "iqm": 0.4}))
    lines = [{"update": 5, **{f"eval/{name}/score": 0.1 for name in tasks}, "eval/iqm": 0.2}]
    figure, ax = plt.subplots()
    plots.draw_scores(ax, lines, tmp_path / "eval.json", 600)
    labels = ax.get_legend_handles_labels()[1]
    plt.close(figure)
    assert len(labels) == named + 1 and labels[-1] == "IQM"


@pytest.mark.parametrize("values, seen", [
    ([0.3], [0.3]), ([None, 0.3], [0.3]), ([0.3, 0.5], [])])
def test_a_single_logged_number_is_seen(values, seen):
    """A line through one point alone leaves nothing on the paper."""
    figure, ax = plt.subplots()
    lines = [{"update": 50 * number, "loss": value} for number, value in enumerate(values, 1)]
    plots.draw_metric(ax, lines, "loss", "loss")
    line, = ax.get_lines()
    marked = [] if line.get_marker() == "None" else line.get_ydata(orig=False)
    plt.close(figure)
    assert [value for value in marked if value == value] == seen


# ---------------------------------------------------------------- the command

def test_a_run_with_a_critic_has_every_figure(run, tmp_path, capsys):
    command(run, "--task", HOPPER)
    names = [f"{name}.png" for name in ALL]
    folder = run / "figures" / HOPPER
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert capsys.readouterr().out.count("wrote ") == len(ALL)
    command(run, "--task", REACHER, "--step", 49, "--format", "pdf", "--out", tmp_path)
    assert all((tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in ALL)


@pytest.mark.parametrize("algo, there", [("bc", ALL[4:]), ("pacv", ALL[3:])])
def test_what_a_run_has_no_critic_for_is_left_out(algo, there, small_data, tmp_path):
    command(trained(algo, small_data, tmp_path), "--out", tmp_path / "figures")
    names = [path.stem for path in (tmp_path / "figures").iterdir()]
    assert sorted(names) == sorted(there)


@pytest.mark.parametrize("flags, said", [
    (["--task", "Ant-v5"], f"no task 'Ant-v5'; it was trained on: {HOPPER}, {REACHER}"),
    (["--episode", "9999"], "--episode 9999: the data has"),
    (["--step", "-1"], "--step -1: the episode has"),
    (["--data", "nowhere"], "nowhere: no data set here"),
])
def test_bad_input_is_one_line_before_anything_is_written(flags, said, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command(run, *flags, "--out", tmp_path / "figures")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("key, value", [("obs_dim", 12), ("action_dim", 2),
                                        ("action_low", [-2.0] * 3), ("discount", 0.9)])
def test_data_that_the_model_cannot_look_at_is_one_line(run, tmp_path, capsys, key, value):
    for name, obs_dim, action_dim in ((HOPPER, 11, 3), (REACHER, 10, 2)):
        meta = {**task_meta(obs_dim, action_dim), "discount": 0.99}
        if name == HOPPER:
            found, meta[key] = meta[key], value
            if key == "action_dim":
                meta["action_low"], meta["action_high"] = [-1.0] * 2, [1.0] * 2
        episode = numbered(0, 5, meta["obs_dim"], meta["action_dim"])
        append(tmp_path / "other" / name, [episode], meta)
    flags = ["--data", tmp_path / "other", "--out", tmp_path / "figures"]
    with pytest.raises(SystemExit) as end:
        command(run, "--task", HOPPER, *flags)
    assert end.value.code == 2
    assert capsys.readouterr().err == (f"plots.py: {tmp_path}/other/{HOPPER}/meta.json: {key} is "
                                       f"{value}, but {found} in {run}\n")
    assert not (tmp_path / "figures").exists()


def test_data_may_lack_other_tasks_of_the_run(run, small_data, tmp_path, capsys):
    """As episodes have that were recorded of some tasks alone: the others' are the training's."""
    own = shutil.copytree(small_data / REACHER, tmp_path / "own" / REACHER).parent
    scene = plots.Scene(run, REACHER, own)
    assert [task.folder for task in scene.tasks] == [small_data / HOPPER, own / REACHER]
    with pytest.raises(DataError, match=f"own: no task '{HOPPER}'; there are: {REACHER}"):
        plots.Scene(run, HOPPER, own)


def test_what_cannot_be_filmed_costs_the_frames_alone(run, tmp_path, monkeypatch, capsys):
    def no_screen(meta, render=False):
        raise OSError("no display")

    monkeypatch.setattr(envs, "make", no_screen)
    with pytest.raises(SystemExit) as end:
        command(run, "--task", HOPPER, "--out", tmp_path)
    assert end.value.code == 2
    assert f"{HOPPER} cannot be filmed here (OSError: no display)" in capsys.readouterr().err
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(ALL[:-1])
