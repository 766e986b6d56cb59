"""What a file says is what is stored: readers of other formats, each fault of theirs named."""

import json
import re

import numpy as np
import pytest

import data
from behaviors import formats
from behaviors.steps import Reading, at_limit
from tests.test_prepare import assert_same, command, pendulum, refusal

h5py = pytest.importorskip("h5py")


def read(source, **reading):
    """-> the Episodes of a source, and what was noted"""
    reading = Reading(**reading)
    function, _ = formats.reader(str(source))
    episodes = list(function(reading))
    for episode in episodes:
        if isinstance(episode, data.DataError):
            raise episode
    return episodes, reading.notes


def change(path, name, array=None):
    """Replace an array of an .hdf5 file, or delete it."""
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        if array is not None:
            file[name] = array


# ---------------------------------------------------------------- D4RL's layout

@pytest.fixture
def d4rl(tmp_path):
    """7 steps in D4RL's layout: step 2 is terminal, step 4 hits a time limit, the end is open."""
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(14.0).reshape(7, 2)
        file["actions"] = np.zeros((7, 1))
        file["rewards"] = np.arange(7.0)
        file["terminals"] = np.arange(7) == 2
        file["timeouts"] = np.arange(7) == 4
    return path


def next_of(obs, ends):
    """The next rows; at the ends, states that no row has."""
    found = np.concatenate([obs[1:], obs[-1:]])
    found[ends] = 100 + obs[ends]
    return found


def test_a_time_limits_last_transition_needs_next_observations(d4rl):
    episodes, notes = read(d4rl)
    found = [(made.reward.tolist(), bool(made.terminated)) for made in episodes]
    assert found == [([0, 1, 2], True), ([3], False), ([5], False)]
    (count, first), = notes.values()
    assert count == 2 and first.endswith("step 4")
    change(d4rl, "next_observations", next_of(np.arange(14.0).reshape(7, 2), [2, 4, 6]))
    (first, second, third), notes = read(d4rl)
    assert not notes
    assert first.terminated and not second.terminated and not third.terminated
    assert second.reward.tolist() == [3, 4]
    assert second.obs[:, 0].tolist() == [6, 8, 108]
    assert third.reward.tolist() == [5, 6]


def pairs(episodes):
    """{(state, next state)} of all transitions, by their first numbers"""
    found = set()
    for made in episodes:
        found |= set(zip(made.obs[:-1, 0].tolist(), made.obs[1:, 0].tolist()))
    return found


@pytest.mark.parametrize("timeouts, lengths, note", [
    (np.arange(7) == 4, [3, 2, 2], None),
    (np.arange(7) == 5, [3, 2, 1, 1], "do not lead to the next one"),  # a row late
    (np.arange(7) == 3, [3, 1, 1, 2], "within an episode"),  # a row early
    (np.zeros(7), [3, 2, 2], "do not lead to the next one"),
    (None, [3, 2, 2], "do not lead to the next one"),
])
def test_each_transition_leads_to_the_state_that_the_file_says(d4rl, timeouts, lengths, note):
    obs = np.arange(14.0).reshape(7, 2)
    next_obs = next_of(obs, [2, 4, 6])
    change(d4rl, "next_observations", next_obs)
    change(d4rl, "timeouts", timeouts)
    episodes, notes = read(d4rl)
    assert [len(made.reward) for made in episodes] == lengths
    assert pairs(episodes) == set(zip(obs[:, 0].tolist(), next_obs[:, 0].tolist()))
    assert bool(notes) == bool(note)
    assert not note or any(note in what for what in notes)
    for count, first in notes.values():
        assert count == 1 and re.search(r"a.hdf5, step \d$", first)


@pytest.mark.parametrize("rows", [np.random.default_rng(0).permutation(90), slice(None, None, 10)])
def test_rows_that_are_in_no_order_are_refused_by_row_and_count(tmp_path, rows):
    obs = np.arange(180.0).reshape(90, 2)
    columns = {"observations": obs, "next_observations": next_of(obs, [89]),
               "actions": np.zeros((90, 1)), "rewards": np.zeros(90), "terminals": np.zeros(90),
               "timeouts": np.zeros(90)}
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, column in columns.items():
            file[name] = column[rows]
    message = r"a.hdf5, step 0: the next observation is not the next row's, nor in \d+ more of"
    with pytest.raises(data.DataError, match=message):
        read(tmp_path / "a.hdf5")


def test_breaks_are_found_at_the_ends_of_blocks(monkeypatch, d4rl):
    obs = np.arange(14.0).reshape(7, 2)
    change(d4rl, "next_observations", next_of(obs, [2, 4, 6]))
    change(d4rl, "timeouts")
    for block in range(1, 9):
        monkeypatch.setattr("behaviors.steps.BLOCK", block)
        assert [len(made.reward) for made in read(d4rl)[0]] == [3, 2, 2]


def test_without_time_limits_the_flag_s_is_taken(d4rl):
    """Of each episode, and the last step before it is dropped, for its successor is not there."""
    change(d4rl, "timeouts")
    message = "neither time limits nor next observations .* --max-episode-steps"
    with pytest.raises(data.DataError, match=message):
        read(d4rl)
    episodes, _ = read(d4rl, limit=2)
    found = [(made.reward.tolist(), bool(made.terminated)) for made in episodes]
    assert found == [([0], False), ([2], True), ([3], False), ([5], False)]
    ends = np.array([0, 0, 1, 0, 0, 0, 0], bool)
    assert np.flatnonzero(at_limit(ends, 2)).tolist() == [1, 4, 6]


@pytest.mark.parametrize("name, array, message", [
    ("terminals", np.zeros((7, 1)), r"terminals has shape \(7, 1\), expected \(7,\)"),
    ("timeouts", np.zeros(6), r"timeouts has shape \(6,\), expected \(7,\)"),
    ("timeouts", np.full(7, 0.5), "flag of time limits has shape .* values from 0.5 to 0.5"),
    ("terminals", np.full(7, np.nan), "flag of terminal states has shape .* from nan to nan"),
    ("next_observations", np.zeros((6, 2)), r"next_observations has shape \(6, 2\), expected"),
    ("next_observations", np.zeros(7), r"next_observations has shape \(7,\), expected \(7, n\)"),
    ("actions", None, "a.hdf5: no actions; there are: observations, rewards"),
])
def test_a_wrong_array_of_d4rls_layout_is_named(d4rl, name, array, message):
    change(d4rl, name, array)
    with pytest.raises(data.DataError, match=message):
        read(d4rl)


def test_a_group_in_the_place_of_an_array_is_named(d4rl):
    change(d4rl, "observations")
    change(d4rl, "observations/qpos", np.zeros((7, 2)))
    message = "observations is a group of qpos, expected an array"
    with pytest.raises(data.DataError, match=message):
        read(d4rl)


# ---------------------------------------------------------------- damage

def test_a_damaged_npz_is_named_and_a_retry_works(tmp_path, capsys):
    episodes = pendulum(tmp_path / "npz")
    good = (tmp_path / "npz" / "1.npz").read_bytes()
    (tmp_path / "npz" / "1.npz").write_bytes(good[:100])
    flags = ["import", tmp_path / "npz", tmp_path / "own", "--env-id", "Pendulum-v1"]
    assert "npz/1.npz: it is damaged, or lacks an array: BadZipFile" in refusal(capsys, *flags)
    assert not (tmp_path / "own").exists()
    (tmp_path / "npz" / "1.npz").write_bytes(good)
    command(*flags)
    assert_same(data.Task(tmp_path / "own" / "Pendulum-v1"), episodes)


def test_bad_episodes_are_left_out_if_asked_with_a_count(tmp_path, capsys):
    """A damaged file, a number that is none, an array too short."""
    episodes = pendulum(tmp_path / "npz", [3, 4, 5, 6, 7], [False] * 5)
    (tmp_path / "npz" / "1.npz").write_bytes(b"PK")
    reward = np.array([0, 1, np.nan, 3, 4])
    np.savez(tmp_path / "npz" / "2.npz", **{**vars(episodes[2]), "reward": reward})
    np.savez(tmp_path / "npz" / "4.npz", **{**vars(episodes[4]), "obs": np.zeros((3, 3))})
    flags = ["import", tmp_path / "npz", tmp_path / "own", "--env-id", "Pendulum-v1"]
    assert "1.npz: it is damaged" in refusal(capsys, *flags)
    command(*flags, "--skip-bad")
    said = capsys.readouterr().err
    assert "3 bad episode(s) left out; the first: " in said
    assert "1.npz: it is damaged" in said
    assert_same(data.Task(tmp_path / "own" / "Pendulum-v1"), [episodes[0], episodes[3]])


def test_a_chunk_that_cannot_be_read_is_named(tmp_path, d4rl):
    path = tmp_path / "b.hdf5"
    with h5py.File(d4rl) as old, h5py.File(path, "w") as file:
        for name in old:
            file.create_dataset(name, data=old[name][:], compression="gzip", chunks=True)
        chunk = file["actions"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset:chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(raw)
    with pytest.raises(data.DataError, match="b.hdf5: it is damaged, or lacks an array: OSError"):
        read(path)


@pytest.mark.parametrize("name, text, message", [
    ("npz/task.json", "{", "npz: what it says of its task is damaged"),
    ("a.hdf5", "no file of HDF5", "a.hdf5: .*file signature not found"),
])
def test_what_is_no_source_is_named(tmp_path, name, text, message):
    pendulum(tmp_path / "npz")
    (tmp_path / name).write_text(text)
    source = tmp_path / name.split("/")[0]
    with pytest.raises(data.DataError, match=message):
        read(source)
