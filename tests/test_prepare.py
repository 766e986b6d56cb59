"""Data sets come in and go out to the bit; each byte is checked; no half of a set is believed."""

import json
import re
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import behaviors
import data
import prepare
from behaviors import LEVELS, PARTS, SHARES, TASKS, collect, goal
from data import REWARD, row_width
from prepare import merged_metas, new_target, open_sources, open_tasks, verify
from tests.conftest import numbered, task_meta, write_task

ROOT = Path(__file__).parent.parent
ARRAYS = ("obs", "action", "reward", "terminated")


def command(*flags):
    """python prepare.py FLAGS, within this process."""
    prepare.main([str(flag) for flag in flags])


def refusal(capsys, *flags):
    """What python prepare.py FLAGS, which must fail, says on stderr."""
    with pytest.raises(SystemExit) as caught:
        command(*flags)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- opened

def test_tasks_are_opened_by_name_or_all(tmp_path):
    for name in ("b", "a", ".c"):  # a hidden one is what a killed command left
        write_task(tmp_path / name, [3])
    assert [task.name for task in open_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in open_tasks(tmp_path, ["b", "a"])] == ["b", "a"]
    with pytest.raises(data.DataError, match="no task 'd'; there are: a, b"):
        open_tasks(tmp_path, ["a", "d"])
    with pytest.raises(data.DataError, match="no data set here; `python prepare.py build` makes"):
        open_tasks(tmp_path / "nowhere")


def test_sources_of_a_task_must_agree(tmp_path):
    one = write_task(tmp_path / "one" / "a", [5])
    wider = write_task(tmp_path / "two" / "a", [9], obs_dim=3)
    message = "two/a/meta.json: obs_dim is 3, but 2 in another source"
    with pytest.raises(data.DataError, match=message):
        merged_metas([one, wider])


def test_merged_metas_have_the_range_of_all_returns(tmp_path):
    one = write_task(tmp_path / "one" / "a", [5])
    other = write_task(tmp_path / "one" / "b", [2])
    two = write_task(tmp_path / "two" / "a", [9, 1])
    a, b = merged_metas([one, other, two])
    assert (a["name"], b["name"]) == ("a", "b")
    assert (a["episodes"], a["transitions"]) == (3, 15)
    assert (b["episodes"], b["transitions"]) == (1, 2)
    assert a["return_to_go"] == [0, two.meta["return_to_go"][1]]  # the longer has higher returns
    assert one.meta["return_to_go"][1] < a["return_to_go"][1]
    assert one.meta["transitions"] == 5  # the task's own meta is as it was


@pytest.mark.parametrize("paraphrases, found", [
    ((["x", "y"], ["y", "z"]), ["x", "y", "z"]), ((None, ["z", "x"]), ["z", "x"]),
    ((["x"], None), ["x"]), ((None, None), None),
])
def test_paraphrases_are_those_of_all_sources_in_a_mix_too(tmp_path, paraphrases, found):
    for number, (name, told) in enumerate(zip(("one", "two"), paraphrases)):
        meta = {**task_meta(), "paraphrases": told} if told else task_meta()
        data.append(tmp_path / name / "a", [numbered(number, 5)], meta)
    folders = [tmp_path / "one", tmp_path / "two"]
    tasks = open_sources(folders)["tasks"]
    merged, = merged_metas(tasks)
    assert merged.get("paraphrases") == found
    command("mix", tmp_path / "both", *folders)
    assert data.Task(tmp_path / "both" / "a").meta.get("paraphrases") == found
    assert tasks[0].meta.get("paraphrases") == paraphrases[0]  # the task's own meta is as it was


def test_a_folder_s_weight_is_shared_by_its_tasks(tmp_path):
    for name, length in (("one/a", 20), ("one/b", 20), ("two/a", 21)):
        write_task(tmp_path / name, [length])
    folders = [tmp_path / "one", tmp_path / "two"]
    sources = open_sources(folders, weights=[3, 1], alphas=[0.1, 0.2])
    assert sources["weights"] == [1.5, 1.5, 1]
    assert sources["alphas"] == [0.1, 0.1, 0.2]
    batch = data.Sampler(batch_size=8, **sources).sample(np.random.default_rng(0))
    assert batch.task.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert open_sources(folders)["weights"] == [0.5, 0.5, 1]
    assert open_sources(folders)["alphas"] is None
    assert [task.name for task in open_sources(folders, ["a"])["tasks"]] == ["a", "a"]


def test_sources_are_verified_if_asked(tmp_path):
    write_task(tmp_path / "a", [3, 4])
    flip(30)(tmp_path / "a" / "rows.bin")
    open_sources([tmp_path], check=False)
    with pytest.raises(data.DataError, match="wrong checksum"):
        open_sources([tmp_path])


# ---------------------------------------------------------------- damage

def flip(at):
    """-> a function that changes one bit of a file"""
    def damage(path):
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
    return damage


def narrow_bounds(path):
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "return_to_go": [0, 1]}))


@pytest.mark.parametrize("name, damage, message", [
    ("rows.bin", flip(30), "rows.bin: task a, episode 0: wrong checksum"),
    ("rows.bin", flip(100), "rows.bin: task a, episode 1: wrong checksum"),
    ("rows.bin", flip(-1), "rows.bin: task a, episode 1: wrong checksum"),
    ("meta.json", narrow_bounds, "rows.bin: task a, episode 0: its returns leave the bounds"),
])
def test_damage_is_named(tmp_path, name, damage, message):
    """Episode 0 has 4 rows of 24 bytes. (What opening a task finds already is in test_data.py.)"""
    task = write_task(tmp_path / "a", [3, 4])
    verify([task])
    damage(tmp_path / "a" / name)
    with pytest.raises(data.DataError, match=message):
        verify([data.Task(tmp_path / "a")])


def test_nan_is_named_by_file_episode_and_step(tmp_path):
    task = write_task(tmp_path / "a", [3, 4])
    rows = np.fromfile(tmp_path / "a" / "rows.bin", "<f4").reshape(task.rows().shape)
    rows[task.episodes["start"][1] + 2, 0] = np.nan
    rows.tofile(tmp_path / "a" / "rows.bin")
    message = "rows.bin: task a, episode 1, step 2: a number is not finite"
    with pytest.raises(data.DataError, match=message):
        verify([data.Task(tmp_path / "a")])


def test_a_return_that_is_no_number_is_found_though_its_checksum_is_right(tmp_path):
    """As another program may have written it: NaN is neither below nor above a bound."""
    task = write_task(tmp_path / "a", [3, 4])
    rows = task.rows().copy()
    rows[5, data.RETURN] = np.nan
    rows.tofile(tmp_path / "a" / "rows.bin")
    task.episodes["checksum"][1] = zlib.crc32(rows[4:])
    with pytest.raises(data.DataError, match="episode 1: its returns leave the bounds"):
        verify([task])


@pytest.mark.parametrize("starts, lengths", [
    ([0, 3], [3, 4]),  # the two overlap
    ([0, 5], [3, 4]),  # a gap between them
    ([1, 4], [3, 4]),  # the first row is nobody's
    ([0, 4], [3, 3]),  # the last row is nobody's
    ([0, 4], [3, 5]),  # there are not so many rows
    ([0, 1], [0, 7]),  # an episode without a transition
])
def test_episodes_that_do_not_cover_the_rows_are_found(tmp_path, starts, lengths):
    task = write_task(tmp_path / "a", [3, 4])  # 9 rows
    task.episodes["start"], task.episodes["length"] = starts, lengths
    with pytest.raises(data.DataError, match="episodes.npy: the episodes do not cover the rows"):
        verify([task])


def test_verify_holds_one_episode_at_a_time(tmp_path):
    task = write_task(tmp_path / "a", [1000] * 100)
    verify([task])  # once before: what is made once, such as the bar's lock, does not count
    tracemalloc.start()
    verify([task])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000 < task.rows().nbytes


def test_verify_and_info_say_what_is_there(tmp_path, capsys):
    write_task(tmp_path / "a", [3, 4])
    command("info", tmp_path)
    line, = capsys.readouterr().out.splitlines()
    for part in ("a ", "2 episodes", "7 transitions", "return 4 ± 2, best 6", "obs 2, action 1"):
        assert part in line  # returns 0 + 1 + 2 and 0 + 1 + 2 + 3
    command("verify", tmp_path)
    assert capsys.readouterr().out == line + ", every byte checked\n"


@pytest.mark.parametrize("name", ["info", "verify"])
def test_how_much_a_killed_writer_left_is_said(tmp_path, capsys, name):
    write_task(tmp_path / "a", [3, 4])
    with open(tmp_path / "a" / "rows.bin", "ab") as file:
        file.write(bytes(1_234))
    command(name, tmp_path)
    said = capsys.readouterr().out
    assert "ignored: 1,234 bytes at the end of rows.bin" in said
    assert "of a writer that was killed" in said
    data.append(tmp_path / "a", [numbered(2, 5)])
    command(name, tmp_path)
    assert "ignored" not in capsys.readouterr().out


# ---------------------------------------------------------------- whole or not at all

def test_two_do_not_write_beside_each_other(tmp_path):
    with new_target(tmp_path / "b") as partial:
        partial.mkdir()
        for name in "bc":
            with pytest.raises(data.DataError, match="another process is writing here"):
                with new_target(tmp_path / name):
                    pass
    assert (tmp_path / "b").is_dir()
    with pytest.raises(data.DataError, match="b exists already: delete it, or choose another name"):
        with new_target(tmp_path / "b"):
            pass


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_a_killed_command_left_is_cleared_by_the_next(tmp_path, make):
    make(tmp_path / ".b.partial")
    with new_target(tmp_path / "b") as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert (tmp_path / "b").read_text() == "whole"


@pytest.mark.parametrize("error", [data.DataError, OSError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(tmp_path, error):
    (tmp_path / "old").mkdir()
    for target in ("new/b", "new/er/b", "old/b"):
        with pytest.raises(error):
            with new_target(tmp_path / target) as partial:
                partial.mkdir()
                (partial / "rows.bin").touch()
                raise error
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name for path in (tmp_path / "old").iterdir()} == {".lock"}


# ---------------------------------------------------------------- the default data set

@pytest.mark.parametrize("part", PARTS)
def test_the_work_of_a_build_is_divided_into_blocks(part):
    """Each of its own seed, so that the result does not depend on who does which."""
    jobs = collect.jobs_of("Hopper-v5", part, 50_000, SHARES, seed=3)
    seeds = [tuple(seed) for *_, seed in jobs]
    assert len(set(seeds)) == len(jobs)
    steps = {}
    for env_id, level, transitions, _, _ in jobs:
        assert env_id == "Hopper-v5"
        assert 0 < transitions <= collect.BLOCK
        steps[level] = steps.get(level, 0) + transitions
    levels = {level: 50_000 * share for level, share in SHARES.items()}
    assert steps == (pytest.approx(levels) if part == "levels" else {None: 50_000})
    other = [tuple(seed) for *_, seed in collect.jobs_of("Hopper-v5", part, 50_000, SHARES, seed=4)]
    assert not set(seeds) & set(other)


def test_beyond_has_no_expert_and_the_others_keep_their_proportions():
    *_, shares, _ = collect.jobs_of("Hopper-v5", "beyond", 50_000, SHARES, seed=3)[0]
    assert shares == pytest.approx({"random": 2 / 9, "weak": 4 / 9, "medium": 3 / 9})
    *_, shares, _ = collect.jobs_of("Hopper-v5", "switching", 50_000, SHARES, seed=3)[0]
    assert shares == SHARES


def test_a_build_is_a_function_of_its_seed(small_data, tmp_path):
    prepare.build(tmp_path, ["switching"], ["Reacher-v5"], transitions=2_000)
    one = data.Task(small_data / "Reacher-v5")
    two = data.Task(tmp_path / "switching" / "Reacher-v5")
    assert one.meta["checksum"] == two.meta["checksum"]
    assert one.meta["transitions"] >= 2_000
    assert set(one.meta["reference"]) == {"random", "expert"} < set(LEVELS)


def test_an_interrupted_build_is_not_believed_and_the_next_makes_it(tmp_path, monkeypatch):
    def interrupted(folder, episodes, meta):
        folder.mkdir(parents=True)
        (folder / "rows.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.build(tmp_path, ["switching"], ["Reacher-v5"], transitions=100)
    with pytest.raises(data.DataError, match="no data set here"):
        open_tasks(tmp_path / "switching")

    flags = f"--out {tmp_path} --part switching --tasks Reacher-v5 --transitions 100".split()
    line = [sys.executable, "prepare.py", "build", *flags]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"the data is in {tmp_path}/switching\n"
    assert "100%" in ran.stderr  # where the bar ends
    verify(open_tasks(tmp_path / "switching"))


def test_a_build_says_where_whole_episodes_change_the_shares(tmp_path, capfd):
    """Reacher's episodes have 50 steps: of 100 transitions the expert's share is a fifth of one."""
    for transitions in (100, 1_000):
        prepare.main(f"build --out {tmp_path / str(transitions)} --part levels switching "
                     f"--tasks Reacher-v5 --transitions {transitions}".split())
    said = [line for line in capfd.readouterr().err.splitlines() if "their shares" in line]
    assert len(said) == 1
    assert "100/levels/Reacher-v5 has 200 transitions and not 100: each level has" in said[0]


def test_what_is_there_is_not_made_again(small_data, monkeypatch):
    monkeypatch.setattr(collect, "processes", None)  # no work can be given to it
    prepare.build(small_data.parent, ["switching"], ["Hopper-v5", "Reacher-v5"])


def test_a_build_says_what_it_left_and_refuses_data_that_is_not_as_asked(small_data, capsys):
    flags = f"build --out {small_data.parent} --part switching --tasks Hopper-v5 Reacher-v5".split()
    prepare.main([*flags, "--transitions", "2000"])
    assert "2 of its tasks were there already, and were left as they were" in capsys.readouterr().out
    for more, said in ((["--transitions", "2000", "--discount", "0.995"],
                        "a discount of 0.99 and not 0.995"),
                       (["--transitions", "200000"], "transitions and not 200,000")):
        with pytest.raises(SystemExit) as ended:
            prepare.main([*flags, *more])
        assert ended.value.code == 2
        assert f"{small_data}/Hopper-v5 is there already, with" in (err := capsys.readouterr().err)
        assert said in err


def test_only_the_default_folders_are_made_by_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(prepare, "build", lambda *args: made.append(args))
    for folder in ("own", "datasets/own", "own/switching", "datasets/tiny"):
        prepare.build_default(Path(folder))
    assert not made
    prepare.build_default(prepare.default_folder("small"), ["Hopper-v5"])
    prepare.build_default(prepare.default_folder("tiny"))
    small, tiny = made
    assert small == (Path("datasets"), ["switching"], ["Hopper-v5"], prepare.TRANSITIONS)
    assert tiny == (Path("datasets/tiny"), ["switching"], TASKS, 20_000)


def test_a_default_set_is_not_filled_up_with_data_of_another_kind(monkeypatch, tmp_path):
    """By one discount and another, or 1,000 transitions beside 20,000."""
    monkeypatch.chdir(tmp_path)
    folder = prepare.default_folder("tiny")
    write_task(folder / "Reacher-v5", [3, 4])
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(data.DataError, match="Reacher-v5 is there already, with a discount of 0.9 "):
        prepare.build_default(folder)
    assert sorted(folder.parent.rglob("*")) == before
    prepare.build_default(folder, ["Reacher-v5"])  # what is there, and all there, is the user's


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare.COMMANDS, "info", interrupted)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["info", "somewhere"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "prepare.py: stopped; what was not finished is not there\n"


def test_default_metas_are_those_of_the_data(small_data):
    """A dry run has no data yet: it must find the dimensions that the data will have."""
    metas = prepare.default_metas(["Hopper-v5", "Reacher-v5"])
    for expected, meta in zip(merged_metas(open_tasks(small_data)), metas, strict=True):
        for key in ("name", "instruction", *prepare.MUST_AGREE):
            assert meta.get(key) == expected.get(key)


def test_a_sparse_task_pays_once():
    """HalfCheetahGoal-v0: a reward of 1 at the goal, where the episode ends, and 0 before.

    Its id alone is enough, as an evaluation knows no more. Only the expert gets there.
    """
    line = "import envs; print(envs.make({'env_id': 'HalfCheetahGoal-v0'}).observation_space.shape)"
    ran = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "(18,)\n", ran.stderr

    env, rng = gymnasium.make("HalfCheetahGoal-v0"), np.random.default_rng(0)
    policies = behaviors.load("HalfCheetahGoal-v0")
    shares = dict.fromkeys(policies, 0.25)
    expert = collect.play(env, policies, 0.0, "expert", shares, rng)
    assert expert.reward.sum() == expert.reward[-1] == 1 and expert.terminated
    assert expert.obs[-1, 0] >= goal.GOAL > expert.obs[-2, 0]
    weak = collect.play(env, policies, 0.0, "weak", shares, rng)
    assert weak.reward.sum() == 0 and not weak.terminated and len(weak.reward) == 150


def test_the_goal_task_has_its_source_s_policies():
    """Its first observation is the position, to which they are blind."""
    rng, obs = np.random.default_rng(0), np.random.default_rng(1).normal(size=18)
    source = behaviors.load(goal.SOURCE)
    for level, policy in behaviors.load(goal.TASK).items():
        if level != "random":
            np.testing.assert_allclose(policy(obs, rng), source[level](obs[1:], rng), atol=1e-5)


# ---------------------------------------------------------------- in and out

def arrays_of(episode):
    return {name: array for name, array in vars(episode).items() if array is not None}


def pendulum(folder, lengths=(3, 5), terminated=(False, True)):
    """Write an .npz folder of Pendulum-v1, whose actions reach from -2 to 2; -> its episodes"""
    random, episodes = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for number, (length, end) in enumerate(zip(lengths, terminated)):
        obs = random.normal(size=(length + 1, 3)).astype(np.float32)
        action = random.uniform(-2, 2, (length, 1)).astype(np.float32)
        reward = random.normal(size=length).astype(np.float32)
        episodes.append(data.Episode(obs, action, reward, end))
        np.savez(folder / f"{number}.npz", **arrays_of(episodes[-1]))
    return episodes


def assert_same(task, episodes):
    verify([task])
    assert len(task.episodes) == len(episodes)
    for one, two in zip(task, episodes):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("target", ["out", "out.hdf5", "minari:own/pendulum-v0"])
def test_in_out_and_in_again(tmp_path, monkeypatch, capsys, target):
    """.npz -> ours -> another format -> ours: to the bit."""
    if target != "out":
        pytest.importorskip("h5py" if "hdf5" in target else "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    episodes = pendulum(tmp_path / "npz")
    flags = "--env-id Pendulum-v1 --max-episode-steps 40 --env-args".split()
    about = ["--instruction", "swing up", "--reference", -1200, -150, "--discount", 0.9,
             "--paraphrases", "get it up", "swing it", "--embodiment", "pole"]
    command("import", "npz", "own", *flags, '{"g": 9.81}', *about)
    assert_same(data.Task("own/Pendulum-v1"), episodes)
    command("export", "own/Pendulum-v1", target)
    command("import", target, "again", "--task", "b")
    assert_same(data.Task("again/b"), episodes)
    said = capsys.readouterr().out.splitlines()
    assert said == ["wrote own/Pendulum-v1", f"wrote {target}", "wrote again/b"]
    meta, again = data.Task("own/Pendulum-v1").meta, data.Task("again/b").meta
    assert meta["env_args"] == {"g": 9.81}
    assert meta["action_high"] == [2.0]
    assert meta["paraphrases"] == ["get it up", "swing it"] and meta["embodiment"] == "pole"
    assert again == meta


@pytest.mark.parametrize("target", ["out", "out.HDF5", "minari:own/pendulum-v0"])
def test_a_discount_of_0_goes_out_and_in(tmp_path, monkeypatch, target):
    if target != "out":
        pytest.importorskip("h5py" if "HDF5" in target else "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    pendulum(tmp_path / "npz")
    command("import", "npz", "own", "--env-id", "Pendulum-v1", "--discount", 0)
    command("export", "own/Pendulum-v1", target)
    assert target == "out" or not Path(target).is_dir()
    command("import", target, "again")
    assert data.Task("again/Pendulum-v1").meta["discount"] == 0


@pytest.mark.parametrize("flags, message", [
    ("import nothing own", "nothing: neither minari:ID nor an .hdf5 file nor a folder of .npz"),
    ("import npz own", "npz does not name its environment: give --env-id"),
    ("import npz own --env-id Nowhere-v0", "environment 'Nowhere-v0' cannot be made"),
    ("import npz own --env-id CartPole-v1", "CartPole-v1: its actions are Discrete"),
    ("import npz own --env-id MountainCarContinuous-v0",
     r"npz, episode 0: obs has shape \(4, 3\), expected \(4, 2\)"),
    ("import npz full --env-id Pendulum-v1", "full/Pendulum-v1 exists already"),
    ("import empty own --env-id Pendulum-v1", "empty: there are no episodes"),
    ("import npz own --env-id Pendulum-v1 --obs-keys nonsense",
     "npz/0.npz: its observations have no parts, so leave out --obs-keys nonsense"),
    ("mix both full --shares 0.5 0.5", "one for each of the 1 data sets"),
    ("mix both full --shares 0", "above 0 and at most 1"),
    ("mix full full", "full exists already"),
    ("mix both nowhere", "nowhere: no data set here"),
    ("export full/Pendulum-v1 npz", "npz exists already"),
    ("export nowhere npz", "nowhere: no data set here"),
    ("info nowhere", "nowhere: no data set here"),
    ("build --shares 1 1 1 1", r".*they add up to 4.0, not 1"),
    ("build --shares 2 -1 0 0", r".*or one is negative"),
    ("build --shares nan 0 0 1", r".*they add up to nan, not 1"),
    ("build --transitions 0", "--transitions 0: there would be no data"),
    ("build --discount 1 --out own", "discount 1.0: it has to be at least 0 and below 1"),
])
def test_what_cannot_be_done_says_why(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    pendulum(tmp_path / "npz")
    (tmp_path / "empty").mkdir()
    write_task(tmp_path / "full" / "Pendulum-v1", [3])
    assert re.match(f"prepare.py: .*{message}", refusal(capsys, *flags.split()))
    assert not (tmp_path / "own" / "Pendulum-v1").exists()
    assert not (tmp_path / "both").exists()


def test_a_missing_package_names_its_install(tmp_path, monkeypatch, capsys):
    write_task(tmp_path / "a", [3])
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    said = refusal(capsys, "export", tmp_path / "a", tmp_path / "a.hdf5")
    assert "this needs `pip install h5py`" in said
    assert not (tmp_path / "a.hdf5").exists()


@pytest.mark.parametrize("flags", [["mix", "mixed", "set"], ["export", "set/a", "out"],
                                   ["export", "set/a", "out.hdf5"]])
def test_damage_is_not_passed_on_with_a_new_checksum(tmp_path, monkeypatch, capsys, flags):
    """What is written anew has new checksums: from then on nobody could tell."""
    monkeypatch.chdir(tmp_path)
    task = write_task(Path("set/a"), [3, 4])
    rows = np.memmap("set/a/rows.bin", np.float32, "r+").reshape(-1, row_width(task.meta))
    rows[5, REWARD] = 1000
    rows.flush()
    assert "a, episode 1: wrong checksum" in refusal(capsys, *flags)
    assert {path.name for path in Path().iterdir()} <= {"set", ".lock"}


def test_no_shares_leave_nothing_for_beyond(tmp_path, capsys):
    flags = ["build", "--out", tmp_path / "x", "--shares", 0, 0, 0, 1, "--transitions", 100]
    assert "`beyond` has no expert, so nothing is left for it" in refusal(capsys, *flags)
    assert not (tmp_path / "x").exists()


def test_mix_is_a_union_of_shares(tmp_path):
    write_task(tmp_path / "one" / "a", [3] * 10)
    write_task(tmp_path / "one" / "b", [2] * 4)
    write_task(tmp_path / "two" / "a", [7] * 5)
    sources = [tmp_path / "one", tmp_path / "two", "--shares", 0.5, 1]
    command("mix", tmp_path / "both", *sources)
    command("mix", tmp_path / "same", *sources)
    command("mix", tmp_path / "other", *sources, "--seed", 1)
    a, b = open_tasks(tmp_path / "both")
    verify([a, b])
    assert a.episodes["length"].tolist() == [3] * 5 + [7] * 5
    assert len(b.episodes) == 2
    numbers = [made.obs[0, 0] for made in a]
    assert len(set(numbers[:5])) == 5  # without replacement
    assert a.meta["sources"] == [
        {"folder": str(tmp_path / "one" / "a"), "episodes": 5},
        {"folder": str(tmp_path / "two" / "a"), "episodes": 5},
    ]
    assert a.meta["checksum"] == data.Task(tmp_path / "same" / "a").meta["checksum"]
    assert a.meta["checksum"] != data.Task(tmp_path / "other" / "a").meta["checksum"]
