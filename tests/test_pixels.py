"""Pictures: on the disk, in batches, in the model, and in roll-outs. No renderer is needed."""

import json

import numpy as np
import pytest
import torch

import data
import envs
import parallel
import plots
import prepare
import train
from checkpoint import RunError
from data import HISTORY, DataError, Sampler
from envs import Play
from learner import SHIFT, Learner, settings_for, shifted
from model import Perceiver, Pixels
from tests.conftest import meta, numbered, task_meta, tiny
from tests.test_train import run

SHAPE = [16, 24, 3]


def seen(number, length):
    """An Episode whose pictures have their episode and step in them."""
    episode = numbered(number, length)
    episode.frames = np.zeros((length + 1, *SHAPE), np.uint8)
    episode.frames[..., 0] = number
    episode.frames[..., 1] = np.arange(length + 1)[:, None, None]
    return episode


def write(folder, lengths=(5, 7), **changes):
    data.append(folder, [seen(*pair) for pair in enumerate(lengths)],
                {**task_meta(), "frame": SHAPE, **changes})
    return data.Task(folder)


# ---------------------------------------------------------------- on the disk

def test_episodes_come_back_with_their_pictures(tmp_path):
    task = write(tmp_path / "a")
    for number, (episode, length) in enumerate(zip(task, (5, 7))):
        np.testing.assert_array_equal(episode.frames, seen(number, length).frames)
    data.append(tmp_path / "a", [seen(2, 4)])
    task = data.Task(tmp_path / "a")
    np.testing.assert_array_equal(task.episode(2).frames, seen(2, 4).frames)
    assert task.frames().shape == (6 + 8 + 5, *SHAPE)
    prepare.verify([task])


def test_what_a_killed_writer_left_is_cut_off(tmp_path):
    write(tmp_path / "a")
    with open(tmp_path / "a/frames.bin", "ab") as file:
        file.write(b"half a picture")
    data.append(tmp_path / "a", [seen(2, 4)])
    prepare.verify([data.Task(tmp_path / "a")])


def test_a_changed_or_missing_picture_is_named(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a/frames.bin"
    content = bytearray(path.read_bytes())
    content[7 * 16 * 24 * 3] ^= 1  # the second episode's second picture
    path.write_bytes(content)
    with pytest.raises(DataError, match="task a, episode 1: wrong checksum"):
        prepare.verify([data.Task(tmp_path / "a")])
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="frames.bin: .*cut short"):
        data.Task(tmp_path / "a")
    path.unlink()
    with pytest.raises(DataError, match="frames.bin: the file is missing"):
        data.Task(tmp_path / "a")


@pytest.mark.parametrize("frames, expected", [
    (None, "none"), (np.zeros((6, 16, 24, 1), np.uint8), r"\(6, 16, 24, 1\) of uint8"),
    (np.zeros((6, *SHAPE), np.float32), "of float32"),
    (np.zeros((5, *SHAPE), np.uint8), r"\(5, 16, 24, 3\)")])
def test_pictures_have_to_be_those_of_the_task(tmp_path, frames, expected):
    episode = seen(0, 5)
    episode.frames = frames
    with pytest.raises(DataError, match=f"episode 0: pictures: .*{expected}.*expected"):
        data.append(tmp_path / "a", [episode], {**task_meta(), "frame": SHAPE})
    with pytest.raises(DataError, match="expected none"):
        data.append(tmp_path / "b", [seen(0, 5)], task_meta())
    assert not (tmp_path / "a/meta.json").exists()


def test_pictures_go_out_and_in_as_npz_alone(tmp_path, capsys):
    painted(tmp_path / "set")
    prepare.main(["export", str(tmp_path / "set/Painted-v0"), str(tmp_path / "npz")])
    prepare.main(["import", str(tmp_path / "npz"), str(tmp_path / "again")])
    (tmp_path / "npz/task.json").unlink()  # then the files say what pictures there are
    prepare.main(["import", str(tmp_path / "npz"), str(tmp_path / "third"), "--env-id",
                  "Painted-v0"])
    file = min((tmp_path / "npz").glob("*.npz"))
    prepare.main(["import", str(file), str(tmp_path / "one"), "--env-id", "Painted-v0"])
    assert len(data.Task(tmp_path / "one/Painted-v0").episodes) == 1
    for folder in ("again", "third"):
        task = data.Task(tmp_path / folder / "Painted-v0")
        assert task.meta["frame"] == SHAPE
        np.testing.assert_array_equal(task.frames(), painted_frames(tmp_path))
    for target in ("minari:a/b-v0", "out.hdf5"):
        with pytest.raises(SystemExit):
            prepare.main(["export", str(tmp_path / "set/Painted-v0"), target])
        assert "only a folder of .npz files takes these" in capsys.readouterr().err


def painted_frames(folder):
    return data.Task(folder / "set/Painted-v0").frames()


def test_an_export_without_pictures_needs_no_pickle(tmp_path):
    from tests.conftest import write_task
    write_task(tmp_path / "a", [3])
    prepare.main(["export", str(tmp_path / "a"), str(tmp_path / "npz")])
    with np.load(next((tmp_path / "npz").glob("*.npz")), allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file} == {
            "obs": "f", "action": "f", "reward": "f", "terminated": "b"}


def test_a_first_file_that_is_damaged_is_named(tmp_path, capsys):
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz/0.npz").write_bytes(b"half a file")
    with pytest.raises(SystemExit):
        prepare.main(["import", str(tmp_path / "npz"), str(tmp_path / "own"), "--env-id",
                      "Painted-v0"])
    assert "0.npz: it is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- in batches

def test_a_window_has_the_pictures_of_its_ends_and_of_those_before(tmp_path):
    tasks = [write(tmp_path / "a"), write(tmp_path / "b", lengths=(9,))]
    sampler = Sampler(tasks, 64, steps=3)
    batch = sampler.sample(np.random.default_rng(0))
    frames = sampler.pictures.read(batch.place)
    assert frames.shape == (64, 2, HISTORY, *SHAPE)
    first = batch.obs[:, 0]  # (episode, step)
    last = batch.next_obs[:, -1]
    for end, obs in enumerate((first, last)):
        for back in range(HISTORY):
            picture = frames[:, end, HISTORY - 1 - back, 0, 0]
            np.testing.assert_array_equal(picture[:, 0], obs[:, 0])
            np.testing.assert_array_equal(picture[:, 1], (obs[:, 1] - back).clamp(min=0))
    chosen = batch.take(torch.tensor([5, 3]))
    torch.testing.assert_close(chosen.pictures.read(chosen.place), frames[[5, 3]])


def test_a_task_without_pictures_beside_one_with_has_zeros(tmp_path):
    from tests.conftest import write_task
    tasks = [write(tmp_path / "a"), write_task(tmp_path / "b", [6])]
    batch = Sampler(tasks, 32).sample(np.random.default_rng(0))
    frames = batch.pictures.read(batch.place)
    assert (frames[batch.task == 1] == 0).all()
    assert frames[batch.task == 0, :, :, 0, 0, 1].float().mean() > 1


def test_one_model_takes_pictures_of_one_shape(tmp_path):
    write(tmp_path / "a")
    other = data.Task(tmp_path / "a")
    other.meta = {**other.meta, "frame": [16, 24, 2]}
    with pytest.raises(DataError, match="pictures of several shapes"):
        Sampler([data.Task(tmp_path / "a"), other], 4)


# ---------------------------------------------------------------- learning

def test_a_shift_moves_all_of_a_rows_pictures_and_repeats_the_edge():
    frames = torch.arange(2 * 3 * 6 * 7 * 2).reshape(2, 3, 6, 7, 2).to(torch.uint8)
    middle = torch.full((2, 2), 0.5)
    assert torch.equal(shifted(frames, middle), frames)
    noise = torch.tensor([[0.0, 0.5], [0.999, 0.5 + 1 / (2 * SHIFT + 1)]])  # by -4, 0; by 4, 1
    moved = shifted(frames, noise)
    assert torch.equal(moved[0, :, 4:], frames[0, :, :2])
    assert torch.equal(moved[0, :, 0], frames[0, :, 0])  # the edge
    assert torch.equal(moved[1, :, :2, :6], frames[1, :, 4:, 1:])
    assert torch.equal(moved[1, :, 2:, 6], frames[1, :, 5:, 6].expand(-1, 4, -1))


def metas_with():
    return [{**meta("a", 2, 1), "frame": SHAPE}, meta("b", 2, 1)]


def test_pictures_matter_to_the_tasks_that_have_them_alone():
    torch.manual_seed(0)
    model = Perceiver(tiny(metas_with()))
    obs, task = torch.rand(2, 2), torch.tensor([0, 1])
    latents = []
    for value in (0, 255):
        frames = torch.full((2, HISTORY, *SHAPE), value, dtype=torch.uint8)
        latents.append(model.encode(obs, task, frames))
    assert not torch.allclose(latents[0][0], latents[1][0])
    torch.testing.assert_close(latents[0][1], latents[1][1])


@pytest.mark.parametrize("algo", ["bc", "pacv", "pac"])
def test_an_update_learns_from_pictures(tmp_path, algo):
    tasks = [write(tmp_path / "a", lengths=(9, 9))]
    metas = prepare.merged_metas(tasks)
    settings = settings_for(algo, warmup=0.0)
    learner = Learner(tiny(metas), settings, metas, 10)
    sampler = Sampler(tasks, 16 * learner.pool, settings.n_step, focus=settings.focus)
    batch = sampler.sample(np.random.default_rng(0))
    learner.start_at(batch)
    before = learner.model.pixels.layers[0].weight.clone()
    for number in range(2):
        learner.update_from(batch, torch.Generator().manual_seed(number))
    assert not torch.equal(before, learner.model.pixels.layers[0].weight)
    assert batch.frames is None  # they are read for the rows that were chosen


def test_what_a_run_would_take_counts_the_pictures():
    def flops(metas):
        learner = Learner(tiny(metas), settings_for("pac"), metas, 10, "meta")
        return parallel.flops_per_update(learner, 8)

    assert flops(metas_with()) > 2 * flops([meta("a", 2, 1), meta("b", 2, 1)])


# ---------------------------------------------------------------- whole runs

class Painted(envs.gymnasium.Env):
    """Its state is in its pictures alone."""
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = envs.Box(1, 1, (2,), np.float32)
    action_space = envs.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(2, np.float32), 1.0, False, self.t == 6, {}

    def render(self):
        return np.full(SHAPE, self.t, np.uint8)


envs.gymnasium.register("Painted-v0", Painted)


def painted(folder):
    return write(folder / "Painted-v0", (6, 6, 6), env_id="Painted-v0",
                 reference={"random": 0.0, "expert": 6.0})


def test_a_run_on_pictures_goes_on_and_is_evaluated(tmp_path):
    from tests.test_train import assert_same_end
    painted(tmp_path / "set")
    run(tmp_path / "set", tmp_path / "whole", "--episodes", "2")
    with pytest.raises(RunError, match="learnt from pictures"):
        plots.Scene(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole/eval.json").read_text())
    assert summary["tasks"]["Painted-v0"]["return"] == 6 and not summary["failed"]
    run(tmp_path / "set", tmp_path / "part", steps=10)
    train.main(["--resume", str(tmp_path / "part"), "--steps", "20"])
    again = tmp_path / "again"
    run(tmp_path / "set", again, steps=10)
    train.main(["--resume", str(again), "--steps", "20"])
    assert_same_end(tmp_path / "part", again)


def test_a_play_shows_the_last_pictures_and_keeps_all_if_asked(tmp_path):
    about = {**painted(tmp_path).meta, "name": "Painted-v0"}
    for keep in (False, True):
        play = Play(0, 0, about, keep, render=False)
        play.start(0)
        histories = [play.history()[:, 0, 0, 0].tolist()]
        for _ in range(3):
            play.step(np.zeros(1, np.float32))
            histories.append(play.history()[:, 0, 0, 0].tolist())
        assert histories == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
        assert len(play.seen) == (4 if keep else HISTORY)
    assert play.episode().frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_an_environment_that_draws_in_another_size_costs_its_episode(tmp_path):
    about = {**painted(tmp_path).meta, "name": "Painted-v0", "frame": [16, 16, 3]}
    play = Play(0, 0, about, False, render=False)
    play.start(0)
    assert ("render() gave uint8 of shape (16, 24, 3), and it has to give uint8 of shape "
            "(16, 16, 3)") in play.failed


@pytest.mark.parametrize("shape", [(16, 24), (4, 24, 3)])
def test_pictures_that_no_model_takes_are_not_imported(tmp_path, capsys, shape):
    (tmp_path / "npz").mkdir()
    episode = {**vars(seen(0, 5)), "frames": np.zeros((6, *shape), np.uint8)}
    np.savez(tmp_path / "npz/0.npz", **episode)
    with pytest.raises(SystemExit):
        prepare.main(["import", str(tmp_path / "npz"), str(tmp_path / "own"), "--env-id",
                      "Painted-v0"])
    assert "of 8 x 8 pixels at least" in capsys.readouterr().err


@pytest.mark.parametrize("height, breadth", [(8, 8), (9, 15), (20, 33), (64, 64), (84, 100)])
def test_a_token_for_each_place_whatever_the_size(height, breadth):
    pixels = Pixels([height, breadth, 3], 8)
    frames = torch.zeros(2, HISTORY, height, breadth, 3, dtype=torch.uint8)
    assert pixels(frames).shape == (2, pixels.places, 8)
