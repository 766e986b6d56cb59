"""What a file says is what is stored: readers of other formats, each fault of theirs named."""

import re

import numpy as np
import pytest

import data
from behaviors import formats
from behaviors.steps import Reading, at_limit
from tests.test_prepare import arrays_of, assert_same, command, pendulum, refusal


def hdf5(path, mode="r"):
    return pytest.importorskip("h5py").File(path, mode)


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
    with hdf5(path, "a") as file:
        if name in file:
            del file[name]
        if array is not None:
            file[name] = array


# ---------------------------------------------------------------- D4RL's layout

@pytest.fixture
def d4rl(tmp_path):
    """7 steps in D4RL's layout: step 2 is terminal, step 4 hits a time limit, the end is open."""
    path = tmp_path / "a.hdf5"
    with hdf5(path, "w") as file:
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


def test_a_number_that_is_none_does_not_split_an_episode(d4rl):
    """It is refused, or left out, with its episode."""
    obs = np.arange(14.0).reshape(7, 2)
    obs[1, 0] = np.nan
    change(d4rl, "observations", obs)
    change(d4rl, "next_observations", next_of(obs, [2, 4, 6]))
    episodes, notes = read(d4rl)
    assert [len(made.reward) for made in episodes] == [3, 2, 2]
    assert not notes


@pytest.mark.parametrize("rows", [np.random.default_rng(0).permutation(90), slice(None, None, 10)])
def test_rows_that_are_in_no_order_are_refused_by_row_and_count(tmp_path, rows):
    obs = np.arange(180.0).reshape(90, 2)
    columns = {"observations": obs, "next_observations": next_of(obs, [89]),
               "actions": np.zeros((90, 1)), "rewards": np.zeros(90), "terminals": np.zeros(90),
               "timeouts": np.zeros(90)}
    with hdf5(tmp_path / "a.hdf5", "w") as file:
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
    change(d4rl, "timeouts", np.zeros(7))
    with pytest.raises(data.DataError, match="step 3: 4 steps without an end, .* has 3: give"):
        read(d4rl, longest=3)
    assert len(read(d4rl, longest=2, limit=2)[0]) == 4
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
    np.savez(tmp_path / "npz" / "2.npz", **{**arrays_of(episodes[2]), "reward": reward})
    np.savez(tmp_path / "npz" / "4.npz", **{**arrays_of(episodes[4]), "obs": np.zeros((3, 3))})
    flags = ["import", tmp_path / "npz", tmp_path / "own", "--env-id", "Pendulum-v1"]
    assert "1.npz: it is damaged" in refusal(capsys, *flags)
    command(*flags, "--skip-bad")
    said = capsys.readouterr().err
    assert "3 bad episode(s) left out; the first: " in said
    assert "1.npz: it is damaged" in said
    assert_same(data.Task(tmp_path / "own" / "Pendulum-v1"), [episodes[0], episodes[3]])


def test_a_chunk_that_cannot_be_read_is_named(tmp_path, d4rl):
    path = tmp_path / "b.hdf5"
    with hdf5(d4rl) as old, hdf5(path, "w") as file:
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
    ("npz/task.json", "[]", r"npz: what it says of its task is no object: \[\]"),
    ("npz/task.json", '{"env_id": 5}', "damaged: env_id is 5, expected str"),
    ("npz/task.json", '{"discount": "0.9"}', "damaged: discount is '0.9', expected float"),
    ("npz/task.json", '{"discount": true}', "damaged: discount is True, expected float"),
    ("npz/task.json", '{"paraphrases": "move it"}', "paraphrases is 'move it', expected list.str."),
    ("npz/task.json", '{"paraphrases": [1]}', r"paraphrases is \[1\], expected list.str."),
    ("npz/task.json", '{"reference": [0, 1]}', r"reference is \[0, 1\], expected dict.str, float."),
    ("npz/task.json", '{"reference": {"random": "a"}}', "expected dict.str, float."),
    ("npz/task.json", '{"frame": [8.5, 8, 3]}', "frame is .*, expected list.int."),
    ("a.hdf5", "no file of HDF5", "a.hdf5: .*file signature not found"),
])
def test_what_is_no_source_is_named(tmp_path, name, text, message):
    pytest.importorskip("h5py")
    pendulum(tmp_path / "npz")
    (tmp_path / name).write_text(text)
    source = tmp_path / name.split("/")[0]
    with pytest.raises(data.DataError, match=message):
        read(source)


@pytest.mark.parametrize("said", ["hopper-medium", "3", "[1]", 7])
def test_a_file_s_own_attribute_of_that_name_is_no_obstacle(d4rl, capsys, said):
    with hdf5(d4rl, "r+") as file:
        file.attrs["task"] = said
    read_, found = formats.reader(str(d4rl))
    assert found == {} and len([*read_(Reading())])
    assert "its attribute `task` is none that export writes" in capsys.readouterr().err


# ---------------------------------------------------------------- robomimic, imitation, LeRobot

@pytest.fixture
def recorded():
    """Two episodes of Pendulum-v1's widths, the second terminated."""
    random, episodes = np.random.default_rng(0), []
    for length, end in ((4, False), (3, True)):
        obs = random.normal(size=(length + 1, 3)).astype(np.float32)
        action = random.uniform(-2, 2, (length, 1)).astype(np.float32)
        reward = random.normal(size=length).astype(np.float32)
        episodes.append(data.Episode(obs, action, reward, end))
    return episodes


def same(episodes, others):
    assert len(episodes) == len(others)
    for one, two in zip(episodes, others):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def without_last(episode):
    """What is left of an episode whose last state is not known."""
    return data.Episode(episode.obs[:-1], episode.action[:-1], episode.reward[:-1], False)


def write_robomimic(path, episodes, next_obs=True):
    """Demonstrations 2 and 10, with the parts `a` and `b` of observations."""
    with hdf5(path, "w") as file:
        for number, made in zip((2, 10), episodes):
            demo = file.create_group(f"data/demo_{number}")
            for name, part in (("b", slice(1, 3)), ("a", slice(0, 1))):
                demo[f"obs/{name}"] = made.obs[:-1, part]
                if next_obs:
                    demo[f"next_obs/{name}"] = made.obs[1:, part]
            demo["actions"], demo["rewards"] = made.action, made.reward
            ends = np.zeros(len(made.reward), int)
            ends[-1] = made.terminated
            demo["dones"] = ends
    return path


def test_robomimics_demonstrations_are_read(tmp_path, recorded):
    episodes, notes = read(write_robomimic(tmp_path / "a.hdf5", recorded))
    same(episodes, recorded)
    assert not notes
    first, second = read(write_robomimic(tmp_path / "b.hdf5", recorded, next_obs=False))[0]
    same([first], [without_last(recorded[0])])
    np.testing.assert_array_equal(second.obs[:-1], recorded[1].obs[:-1])
    np.testing.assert_array_equal(second.reward, recorded[1].reward)
    assert second.terminated


def test_parts_of_observations_are_chosen_and_compared_with_the_environments(tmp_path, recorded):
    path = write_robomimic(tmp_path / "a.hdf5", recorded)
    episodes, _ = read(path, obs_keys=["b", "a"])
    np.testing.assert_array_equal(episodes[0].obs, np.roll(recorded[0].obs, -1, axis=1))
    with pytest.raises(data.DataError, match="no part 'c' of the observations; there are: a, b"):
        read(path, obs_keys=["c"])
    message = r"observations of a \(1\), b \(2\); the environment's are of a \(1\), c \(2\)"
    with pytest.raises(data.DataError, match=message):
        read(path, obs_parts={"a": 1, "c": 2})
    with pytest.raises(data.DataError, match=r"of b \(2\), a \(1\); the environment's are of a"):
        read(path, obs_keys=["b", "a"], obs_parts={"a": 1, "b": 2})
    change(path, "data/demo_2/obs/c", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(data.DataError, match="obs: c are images, .* --obs-keys"):
        read(path)
    change(path, "data/demo_2/obs")
    with pytest.raises(data.DataError, match="data/demo_2: no obs; robomimic's"):
        read(path)


@pytest.mark.parametrize("kind", ["npz", "hdf5", "imitation"])
def test_keys_of_observations_without_parts_are_refused(tmp_path, recorded, kind, request):
    source = tmp_path / "source"
    if kind == "npz":
        pendulum(source)
    elif kind == "hdf5":
        source = request.getfixturevalue("d4rl")
    else:
        write_arrow(source, {"obs": [recorded[0].obs], "acts": [recorded[0].action],
                             "rews": [recorded[0].reward], "terminal": [False]})
    assert read(source)[0]
    with pytest.raises(data.DataError, match="have no parts, so leave out --obs-keys a b"):
        read(source, obs_keys=["a", "b"])


def test_rewards_that_are_missing_are_asked_for(tmp_path, recorded):
    path = write_robomimic(tmp_path / "a.hdf5", recorded)
    change(path, "data/demo_2/rewards")
    with pytest.raises(data.DataError, match="demo_2: no rewards; --no-rewards takes 0"):
        read(path)
    (first, second), _ = read(path, rewards=False)
    assert first.reward.tolist() == [0] * 4
    np.testing.assert_array_equal(second.reward, recorded[1].reward)


def test_imitations_npz_is_read(tmp_path, recorded):
    """Arrays of all trajectories one behind the other, and where each but the first begins."""
    one, two = recorded
    arrays = {"obs": np.concatenate([one.obs, two.obs]), "indices": np.array([4]),
              "acts": np.concatenate([one.action, two.action]), "terminal": np.array([False, True]),
              "rews": np.concatenate([one.reward, two.reward])}
    infos = np.array([{}] * 7, object)  # pickled, and not read
    np.savez(tmp_path / "a.npz", **arrays, infos=infos)
    same(read(tmp_path / "a.npz")[0], recorded)
    np.savez(tmp_path / "b.npz", **{**arrays, "terminal": [True]})
    with pytest.raises(data.DataError, match="b.npz: .*zip.*argument"):
        read(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **{**arrays, "acts": infos})
    with pytest.raises(data.DataError, match="c.npz: .*Object arrays cannot be loaded"):
        read(tmp_path / "c.npz")


def write_arrow(folder, columns):
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    table = arrow.table({name: [np.asarray(value).tolist() for value in values]
                         for name, values in columns.items()})
    with arrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        with arrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def test_imitations_saved_data_set_is_read(tmp_path, recorded):
    columns = {"obs": [made.obs for made in recorded], "acts": [made.action for made in recorded],
               "rews": [made.reward for made in recorded],
               "terminal": [made.terminated for made in recorded], "infos": [["{}"], ["{}"]]}
    write_arrow(tmp_path / "a", columns)
    same(read(tmp_path / "a")[0], recorded)
    del columns["acts"]
    write_arrow(tmp_path / "b", columns)
    with pytest.raises(data.DataError, match="trajectory 0: no acts; there are: obs, rews"):
        read(tmp_path / "b")


def write_lerobot(folder, episodes, **changes):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {name: [] for name in ("observation.a", "observation.b", "observation.image",
                                     "action", "next.reward", "next.done", "next.success",
                                     "episode_index", "frame_index")}
    for number, made in enumerate(episodes):
        count = len(made.reward)
        last = np.arange(count) == count - 1
        columns["observation.b"] += made.obs[:-1, 1:].tolist()
        columns["observation.a"] += made.obs[:-1, 0].tolist()
        columns["observation.image"] += [{"path": "a.png"}] * count
        columns["action"] += made.action.tolist()
        columns["next.reward"] += made.reward.tolist()
        columns["next.done"] += last.tolist()
        columns["next.success"] += (last & made.terminated).tolist()
        columns["episode_index"] += [number] * count
        columns["frame_index"] += list(range(count))
    columns.update(changes)
    for name in ("meta", "data/chunk-000"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "meta/info.json").write_text("{}")
    columns = {name: column for name, column in columns.items() if column is not None}
    parquet.write_table(arrow.table(columns), folder / "data/chunk-000/file-000.parquet")
    return folder


def test_lerobots_tables_are_read(tmp_path, recorded):
    """The state that the last step led to is not there, so that step is kept only if terminal."""
    (first, second), notes = read(write_lerobot(tmp_path / "a", recorded))
    same([first], [without_last(recorded[0])])
    np.testing.assert_array_equal(second.obs[:-1], recorded[1].obs[:-1])
    np.testing.assert_array_equal(second.action, recorded[1].action)
    assert second.terminated
    assert any("without observation.image" in what for what in notes)
    assert any("dropped" in what for what in notes)


@pytest.mark.parametrize("changes, message", [
    ({"frame_index": [0, 1, 2, 3, 0, 2, 3]}, "episode 1: frame_index is not 0, 1, 2"),
    ({"episode_index": [0, 1, 0, 0, 1, 1, 1]}, "steps of an episode do not stand together"),
    ({"next.reward": None}, "episode 0: no rewards"),
    ({"action": None}, "file-000.parquet: no action; there are: observation.a"),
    ({"task_index": [3, 3, 3, 3, 5, 5, 5]}, "episode 1: task_index is 5, and 3 before: one task"),
])
def test_a_wrong_table_of_lerobots_is_named(tmp_path, recorded, changes, message):
    with pytest.raises(data.DataError, match=message):
        read(write_lerobot(tmp_path / "a", recorded, **changes))


def test_a_damaged_table_is_named(tmp_path, recorded):
    write_lerobot(tmp_path / "a", recorded)
    path = tmp_path / "a/data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(data.DataError, match="file-000.parquet: it is damaged"):
        read(tmp_path / "a")
