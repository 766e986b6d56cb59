"""What users of this field's software reported, tried here: a right outcome, or one clear line.

Each kind has the report's own case and others like it. What is refused is refused with exit code 2,
before anything is written.
"""

import json
import re
import shutil
from contextlib import nullcontext

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import NormalizeObservation, RescaleAction, TransformReward

import data
import envs
import prepare
from tests.conftest import numbered, task_meta, write_task
from tests.test_prepare import command, refusal

ODD = "tests.odd:Odd-v0"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def walks(folder="walks", episodes=6, steps=20, obs_dim=3, action_dim=2, **changes):
    """A folder of .npz files of random episodes; changes: functions of (rng, episode's number)"""
    rng = np.random.default_rng(0)
    data.Path(folder).mkdir()
    for number in range(episodes):
        arrays = dict(obs=rng.normal(size=(steps + 1, obs_dim)), reward=rng.normal(size=steps),
                      action=rng.uniform(-1, 1, (steps, action_dim)), terminated=False)
        for name, function in changes.items():
            arrays[name] = function(rng, number)
        np.savez(f"{folder}/{number:03d}.npz", **arrays)
    return folder


def imported(*flags, env_id=ODD, source="walks"):
    """Import a source as the task `a` of the data set `own` -> the Task"""
    command("import", source, "own", "--env-id", env_id, "--task", "a", *flags)
    return data.Task("own/a")


def refused(capsys, *flags, env_id=ODD, source="walks", message=""):
    """The same, refused in one line, with nothing left behind."""
    about_env = ["--env-id", env_id] if env_id else []
    said = refusal(capsys, "import", source, "own", *about_env, "--task", "a", *flags)
    assert re.match(f"prepare.py: .*{message}", said), said
    assert said.count("\n") == 1
    assert not data.Path("own").exists()


@pytest.mark.parametrize("steps, said", [(20, False), (21, True)])
def test_episodes_longer_than_the_environment_has_are_counted(capsys, steps, said):
    """Two that were joined, say: the step between them is none."""
    walks(steps=steps)
    imported("--max-episode-steps", 20)
    line = "6 episode(s) are longer than the environment's 20 steps: are some of them joined?"
    assert (line in capsys.readouterr().err) == said


def length_of(env):
    """How many steps an episode takes of random actions."""
    env.reset(seed=0)
    for step in range(1, 10_000):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            return step
    raise AssertionError("the episode does not end")


# ---------------------------------------------------------------- 1. the file and what is stored
# (The layouts of HDF5, the flags and the breaks are in test_formats.py.)

def recorded(name, env, episodes=2, **options):
    """A Minari set of random episodes in an environment."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer
    env.action_space.seed(0)
    buffers = []
    for number in range(episodes):
        observations, actions, rewards = [env.reset(seed=number)[0]], [], []
        over = False
        while not over:
            actions.append(env.action_space.sample())
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(float(reward))
            over = terminated or truncated
        if isinstance(obs, dict):
            observations = {key: np.array([one[key] for one in observations]) for key in obs}
        last = np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(EpisodeBuffer(observations=observations, actions=np.array(actions),
                                     rewards=np.array(rewards), terminations=last & terminated,
                                     truncations=last & truncated, infos={}))
    minari.create_dataset_from_buffers(name, buffers, env=env, **options)


@pytest.mark.filterwarnings("ignore")
def test_flags_within_an_episode_split_it(monkeypatch, capsys):
    """Of a set whose task goes on after success: each transition keeps its own successor."""
    recorded("own/goes-on-v0", gymnasium.make("Pendulum-v1", max_episode_steps=10), episodes=1)
    whole = imported(source="minari:own/goes-on-v0", env_id="Pendulum-v1").episode(0)
    import h5py
    path, = data.Path("minari").rglob("main_data.hdf5")
    with h5py.File(path, "a") as file:
        file["episode_0/terminations"][3] = True
    command("import", "minari:own/goes-on-v0", "split")
    assert "1 flag(s) within an episode" in capsys.readouterr().err
    first, second = data.Task("split/Pendulum-v1")
    assert first.terminated and not second.terminated
    np.testing.assert_array_equal(first.obs, whole.obs[:5])
    np.testing.assert_array_equal(second.obs, whole.obs[4:])
    with h5py.File(path, "a") as file:
        del file["episode_0/terminations"]
        file["episode_0/terminations"] = np.zeros(9, bool)
    refused_again = refusal(capsys, "import", "minari:own/goes-on-v0", "third")
    assert "flag of terminal states has shape (9,)" in refused_again


# ---------------------------------------------------------------- 2. the environment of the data

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made, meta, steps", [
    (lambda: gymnasium.make("Hopper-v5", terminate_when_unhealthy=False, max_episode_steps=50),
     {"env_args": {"terminate_when_unhealthy": False}, "max_episode_steps": 50}, 50),
    (lambda: RescaleAction(gymnasium.make("Pendulum-v1", max_episode_steps=40), -1, 1),
     {"wrappers": [["RescaleAction", {"min_action": -1, "max_action": 1}]],
      "max_episode_steps": 40}, 40),
    (lambda: gymnasium.make(ODD, steps=11), {"env_args": {"steps": 11}}, 11),
    (lambda: gymnasium.make("tests.odd:Wide-v0"), {}, 20),
    (lambda: gymnasium.make("Reacher-v5"), {}, 50),
])
def test_a_minari_sets_environment_is_made_again(made, meta, steps):
    env = made()
    recorded("own/a-v0", env)
    package = "tests.odd:" if env.spec.entry_point.startswith("tests.odd:") else ""  # not in a set
    command("import", "minari:own/a-v0", "own", "--task", "a", "--env-id", package + env.spec.id)
    task = data.Task("own/a")
    assert {key: task.meta[key] for key in envs.KEPT if key in task.meta} == meta
    again = envs.make(task.meta)
    assert length_of(again) == steps == len(task.episode(0).reward)
    for one, other in ((env, again), (again, env)):
        assert one.action_space == other.action_space
    env.reset(seed=5), again.reset(seed=5)
    action = env.action_space.sample()
    assert env.step(action)[1] == again.step(action)[1]


@pytest.mark.filterwarnings("ignore")
def test_a_minari_set_is_scored_where_its_author_says():
    """In its environment for evaluation, and by its references; where it was recorded is noted."""
    shorter = gymnasium.make("Pendulum-v1", max_episode_steps=15)
    recorded("own/a-v0", gymnasium.make("Pendulum-v1", max_episode_steps=40), eval_env=shorter,
             ref_min_score=-1200.0, ref_max_score=-150.0)
    command("import", "minari:own/a-v0", "own")
    meta = data.Task("own/Pendulum-v1").meta
    assert length_of(envs.make(meta)) == 15
    assert meta["recorded_in"]["max_episode_steps"] == 40
    assert meta["reference"] == {"random": -1200.0, "expert": -150.0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap, message", [
    (NormalizeObservation, "wrapped in .*NormalizeObservation, which cannot be made again"),
    (lambda env: TransformReward(env, abs), "wrapped in .*TransformReward"),
])
def test_what_cannot_be_made_again_is_refused(capsys, wrap, message):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=5)
    recorded("own/a-v0", env)
    spec = wrap(env).spec
    spec.additional_wrappers = tuple(
        type(one)(one.name, one.entry_point, None if wrap is not NormalizeObservation else {})
        for one in spec.additional_wrappers)
    path, = data.Path("minari").rglob("metadata.json")
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "env_spec": spec.to_json()}))
    refused(capsys, source="minari:own/a-v0", env_id=None, message=message)


@pytest.mark.filterwarnings("ignore")
def test_actions_of_another_box_than_the_environments_are_refused(capsys):
    recorded("own/a-v0", gymnasium.make("Pendulum-v1", max_episode_steps=5))
    refused(capsys, source="minari:own/a-v0", env_id="MountainCarContinuous-v0",
            message=r"actions are in \[\[-2.0\], \[2.0\]\], but those of the environment")


@pytest.mark.parametrize("env_id, flags, steps", [
    ("tests.odd:Needs-v0", ["--env-args", '{"robot": "arm"}'], 7),
    ("tests.odd:Needs-v0", ["--env-args", '{"robot": "leg"}'], 9),
    ("tests.odd:Needs-v0", ["--env-args", '{"robot": "leg"}', "--max-episode-steps", 4], 4),
    ("tests.odd:Endless-v0", ["--max-episode-steps", 30], 30),
    ("tests.odd:Falls-v0", ["--max-episode-steps", 12], 12),
    ("Pendulum-v1", [], 200),
    (ODD, [], 20),
])
def test_arguments_and_limits_are_those_that_were_given(env_id, flags, steps):
    walks(action_dim=1 if env_id == "Pendulum-v1" else 2)
    assert length_of(envs.make(imported(*flags, env_id=env_id).meta)) == steps


@pytest.mark.parametrize("env_id, flags, message", [
    ("tests.odd:Needs-v0", [], "argument: 'robot'.*--env-args"),
    ("tests.odd:Needs-v0", ["--env-args", '{"robot": "tail"}'], "KeyError: 'tail'"),
    ("tests.odd:Broken-v0", [], "FileNotFoundError: robot.xml: no such file"),
    ("tests.odd:Unplayable-v0", [], "an episode cannot be played: RuntimeError: out of battery"),
    ("tests.odd:Endless-v0", [], "no time limit.*give --max-episode-steps"),
    ("tests.odd:Falls-v0", [], "no time limit.*give --max-episode-steps"),
    (ODD, ["--max-episode-steps", 0], "max_episode_steps is 0"),
    ("tests.nowhere:Odd-v0", [], "No module named 'tests.nowhere'"),
    ("Nowhere-v0", [], "--env-id package:Nowhere-v0"),
    ("Meta-World/MT1", [], "`pip install metaworld`"),
    ("mine_alone:Own-v0", [], "install mine_alone, or put the folder that it is in on PYTHONPATH"),
    ("FrozenLake-v1", [], "its observations are Discrete"),
    ("tests.odd:Unbounded-v0", [], "its actions have no bounds"),
    ("tests.odd:Whole-v0", [], r"its actions are Box\(-1, 1, \(2,\), int64\), whole"),
])
def test_an_environment_that_cannot_be_made_is_one_line(capsys, env_id, flags, message):
    walks()
    refused(capsys, *flags, env_id=env_id, message=message)


def parts(kind):
    return envs.make({"env_id": "tests.odd:Parts-v0", "env_args": {"kind": kind}})


@pytest.mark.parametrize("kind, obs, flat", [
    ("dict", {"b": [2, 3], "a": 1}, [1, 2, 3]),
    ("nested", {"b": ([[2, 3], [4, 5]], [6]), "a": 1}, [1, 2, 3, 4, 5, 6]),
    ("tuple", ([1, 2], 3), [1, 2, 3]),
    ("matrix", [[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]),
])
def test_observations_of_parts_are_flattened_by_name(kind, obs, flat):
    env = parts(kind)
    assert env.observation(obs).tolist() == flat
    assert env.observation_space.shape == (len(flat),) == env.reset()[0].shape
    assert env.step(env.action_space.sample())[0].shape == (len(flat),)
    assert length_of(env) == 20


@pytest.mark.parametrize("kind, message", [
    ("image", r"its observations\['camera'\] are Box\(0, 255, \(8, 8, 3\)"),
    ("number", r"its observations\['b'\] are Discrete"),
])
def test_parts_that_are_no_numbers_are_refused(capsys, kind, message):
    walks()
    refused(capsys, "--env-args", json.dumps({"kind": kind}), env_id="tests.odd:Parts-v0",
            message=message)


@pytest.mark.filterwarnings("ignore")
def test_keys_of_a_minari_set_without_parts_are_refused(capsys):
    recorded("own/a-v0", gymnasium.make(ODD))
    refused(capsys, "--obs-keys", "a", source="minari:own/a-v0", message=".*have no parts")


def robomimic(path):
    """Two episodes of 20 steps, whose observations are of `arm` (1) and `target` (2)."""
    rng = np.random.default_rng(len(path))
    with pytest.importorskip("h5py").File(path, "w") as file:
        for demo in ("data/demo_0", "data/demo_1"):
            obs = rng.normal(size=(21, 3))
            for name, part in (("arm", slice(0, 1)), ("target", slice(1, 3))):
                file[f"{demo}/obs/{name}"] = obs[:-1, part]
                file[f"{demo}/next_obs/{name}"] = obs[1:, part]
            file[f"{demo}/actions"] = rng.uniform(-1, 1, (20, 2))
            file[f"{demo}/rewards"], file[f"{demo}/dones"] = np.zeros(20), np.zeros(20, int)


def test_parts_in_another_order_are_not_mixed(capsys):
    """0 would be the arm in one source, and the target in the other."""
    for number, (path, keys) in enumerate((("one.hdf5", []), ("two.hdf5", ["target", "arm"]),
                                           ("three.hdf5", ["arm", "target"]))):
        robomimic(path)
        flags = ["--obs-keys", *keys] if keys else []
        command("import", path, str(number), "--env-id", ODD, "--task", "a", *flags)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "one.hdf5: observations of arm (1), target (2), in this order"
    assert said[1] == "two.hdf5: observations of target (2), arm (1), in this order"
    assert "read_parts is [['target', 2], ['arm', 1]], but" in refusal(capsys, "mix", "both", 0, 1)
    with pytest.raises(data.DataError, match="read_parts is"):
        prepare.merged_metas([data.Task("0/a"), data.Task("1/a")])
    command("mix", "both", "0", "2")
    assert data.Task("both/a").meta["read_parts"] == [["arm", 1], ["target", 2]]


@pytest.mark.filterwarnings("ignore")
def test_data_and_environment_are_flattened_alike(capsys):
    """A Minari set of dicts: a stored row is what the environment's first observation is."""
    plain = gymnasium.make("tests.odd:Parts-v0", kind="dict")
    plain.observation_space.seed(3)
    recorded("own/a-v0", plain)
    command("import", "minari:own/a-v0", "own", "--env-id", "tests.odd:Parts-v0", "--env-args",
            '{"kind": "dict"}', "--task", "a")
    task = data.Task("own/a")
    assert task.meta["obs_parts"] == {"a": 1, "b": 2}
    flat = envs.make(task.meta)
    flat.env.observation_space.seed(3)
    np.testing.assert_allclose(task.episode(0).obs[0], flat.reset()[0], rtol=1e-6)
    command("export", "own/a", "minari:own/b-v0")
    command("import", "minari:own/b-v0", "again", "--task", "a")
    again = data.Task("again/a")
    assert again.meta == task.meta
    np.testing.assert_array_equal(again.rows(), task.rows())
    said = refusal(capsys, "import", "minari:own/a-v0", "other", "--env-id",
                   "tests.odd:Parts-v0", "--env-args", '{"kind": "nested"}', "--task", "a")
    assert "observations of a (1), b (2); the environment's are of a (1), b (5)" in said


# ---------------------------------------------------------------- 3. appended, mixed, scored

@pytest.mark.parametrize("change", [
    {"env_id": "tests.odd:Wide-v0"}, {"env_args": {"steps": 3}}, {"max_episode_steps": 3},
    {"wrappers": [["ClipAction", {}]]}, {"obs_dim": 4}, {"action_dim": 2},
    {"action_low": [-2.0]}, {"action_high": [2.0]}, {"discount": 0.99}, {"instruction": "go back"},
])
def test_what_is_of_another_environment_is_not_put_behind(tmp_path, change):
    task = write_task(tmp_path / "set" / "a", [3])
    prepare.refuse_other(task.folder, task.meta)
    prepare.refuse_other(tmp_path / "nowhere", {**task.meta, **change})
    with pytest.raises(data.DataError, match=f"{next(iter(change))} is .* in what is to be appe"):
        prepare.refuse_other(task.folder, {**task.meta, **change})
    other = {**task_meta(), **change}
    episode = numbered(0, 5, other["obs_dim"], other["action_dim"])
    data.append(tmp_path / "other" / "a", [episode], other)
    with pytest.raises(data.DataError, match=f"{next(iter(change))} is .* in another source"):
        prepare.merged_metas([task, data.Task(tmp_path / "other" / "a")])


def test_pictures_and_none_are_no_sources_of_one_task(tmp_path):
    """Half of the model's pictures would be black, or all would be left out."""
    plain = write_task(tmp_path / "plain" / "a", [3])
    episode = numbered(0, 3)
    episode.frames = np.zeros((4, 8, 8, 3), np.uint8)
    data.append(tmp_path / "seen" / "a", [episode], {**task_meta(), "frame": [8, 8, 3]})
    seen = data.Task(tmp_path / "seen" / "a")
    for sources in ([plain, seen], [seen, plain]):
        with pytest.raises(data.DataError, match="frame is .* in another source"):
            prepare.merged_metas(sources)


def test_a_set_or_a_task_named_twice_does_not_count_twice(tmp_path, capsys):
    write_task(tmp_path / "set" / "a", [3, 4])
    assert [task.name for task in prepare.open_tasks(tmp_path / "set", ["a", "a"])] == ["a"]
    with pytest.raises(data.DataError, match="set/../set/a and .*set/a have the same episodes"):
        prepare.open_sources([tmp_path / "set", f"{tmp_path}/set/../set"])
    assert "have the same episodes" in refusal(capsys, "mix", "both", "set", "./set")
    assert not data.Path("both").exists()


def test_the_same_episodes_under_other_names_are_refused_or_counted(tmp_path, capsys):
    """Links, copies, and mixes of what is given beside them: they would count twice in silence."""
    write_task("set/a", [3, 4, 5])
    for folder in ("linked", "copied"):
        data.Path(folder).mkdir()
    data.Path("linked/a").symlink_to(data.Path("set/a").resolve())
    shutil.copytree("set/a", "copied/a")
    for folder in ("linked", "copied"):
        said = f"{folder}/a and set/a have the same episodes: give one"
        assert said in refusal(capsys, "mix", "both", "set", folder)
        with pytest.raises(data.DataError, match=said):
            prepare.open_sources(["set", folder])
    assert not data.Path("both").exists()
    data.append("more/a", [numbered(1, 4), numbered(7, 4)], task_meta())
    capsys.readouterr()
    prepare.open_sources(["set", "more"])
    assert capsys.readouterr().err == "more/a and set/a share 1 episode(s), which count twice\n"
    command("mix", "both", "set", "more")
    assert "more/a and set/a share 1 episode(s)" in capsys.readouterr().err
    other = {**task_meta(), "instruction": "go"}  # another task
    data.append("other/b", [numbered(1, 4)], other)
    prepare.open_sources(["set", "other"])
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_no_set_says_which_is(tmp_path):
    write_task(tmp_path / "sets/one/a", [3])
    for folder, said in (("sets", "there are some in it: sets/one$"),
                         ("sets/one/a", "it is a task of sets/one: give that, and --tasks a"),
                         ("nowhere", f"seen from {tmp_path}$")):
        with pytest.raises(data.DataError, match=f"{folder}: no data set here; .*{said}"):
            prepare.open_tasks(folder)


def test_pictures_of_an_environment_that_does_not_draw_are_refused(capsys):
    frames = np.zeros((21, 8, 8, 3), np.uint8)
    walks(frames=lambda rng, number: frames)
    refused(capsys, env_id="tests.odd:Blind-v0",
            message="walks has pictures, and tests.odd:Blind-v0 cannot draw: .*render_mode")


def test_a_task_as_it_was_before_its_first_episode(tmp_path):
    task = write_task(tmp_path / "a", [3])
    assert prepare.anew({"name": "a", **task.meta}) == task_meta()


ONE, OTHER = {"random": 1.0, "expert": 9.0}, {"random": 1.0, "expert": 8.0}


@pytest.mark.parametrize("references, found", [
    ([ONE, None], ONE), ([None, ONE], ONE), ([ONE, ONE], ONE), ([None, None], None),
])
def test_a_reference_does_not_depend_on_the_order_and_outlives_a_mix(references, found):
    for number, reference in enumerate(references):
        meta = {**task_meta(), "reference": reference}
        data.append(f"{number}/a", [numbered(number, 5)], meta)
    tasks = [data.Task("0/a"), data.Task("1/a")]
    assert prepare.merged_metas(tasks)[0]["reference"] == found
    command("mix", "both", "0", "1")
    both = data.Task("both/a")
    assert both.meta["reference"] == found
    assert len(both.episodes) == 2


def test_references_that_differ_are_refused(capsys):
    for number, reference in enumerate((ONE, OTHER)):
        meta = {**task_meta(), "reference": reference}
        data.append(f"{number}/a", [numbered(number, 5)], meta)
    assert "reference is {'random': 1.0, 'expert': 8.0}, but" in refusal(capsys, "mix", "c", 0, 1)
    assert not data.Path("c").exists()
    for reference, message in ((OTHER, "1.0, 'expert': 9.0}, but"), (ONE, None), (None, None)):
        meta = {**task_meta(), "reference": reference}
        with pytest.raises(data.DataError, match=message) if message else nullcontext():
            prepare.refuse_other("0/a", meta)  # as where episodes are recorded


@pytest.mark.parametrize("flags, said", [
    ("--max-episode-steps 10", "is of another max_episode_steps"),
    ("--max-episode-steps 50", None),  # as it is registered
    ('--env-args {"reward_dist_weight":10}', "is of another env_args"),
    ("--max-episode-steps 10 --reference -1 1", None)])
def test_a_reference_of_another_environment_is_left_out(capsys, flags, said):
    walks(obs_dim=10)
    data.Path("walks/task.json").write_text(json.dumps({
        "env_id": "Reacher-v5", "reference": {"random": -5.0, "expert": 5.0}}))
    kept = {"random": -1.0, "expert": 1.0} if "--reference" in flags else {"random": -5.0,
                                                                          "expert": 5.0}
    task = imported(*flags.split(), env_id="Reacher-v5")
    assert task.meta["reference"] == (None if said else kept)
    err = capsys.readouterr().err
    assert (said in err and "its reference is left out" in err) if said else "left out" not in err


def test_files_that_are_not_read_are_counted(capsys):
    walks()
    data.Path("walks/more/still").mkdir(parents=True)
    for name in ("more/000.npz", "more/still/000.npz", "x.NPZ"):
        shutil.copy("walks/000.npz", f"walks/{name}")
    assert len(imported().episodes) == 6
    assert "3 file(s) left out, which are not walks/*.npz; the first: walks/more" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("flags, message", [
    ("--reference 5 5", "reference 5 5: .* the second above the first"),
    ("--reference 10 0", "reference 10 0"),
    ("--reference nan 1", "reference nan 1: .* have to be finite"),
    ("--reference 0 inf", "reference 0 inf"),
    ("--reference -1e0 -2e0", "reference -1 -2"),
    ("--discount 1.0", "discount 1.0: it has to be at least 0 and below 1"),
    ("--discount 99", "discount 99.0"),
    ("--discount -0.1", "discount -0.1"),
    ("--discount nan", "discount nan"),
])
def test_references_and_discounts_are_checked(capsys, flags, message):
    walks()
    refused(capsys, *flags.split(), message=message)


@pytest.mark.parametrize("number", ["-7e0", "-7.", "-0.7E+1", "-.7e1", "-7", "-7.0"])
def test_a_negative_reference_is_read_in_every_spelling(number):
    walks()
    expected = {"random": -7.0, "expert": 0.0}
    assert imported("--reference", number, "0").meta["reference"] == expected


@pytest.mark.parametrize("name", ["arm/reach", "../a", ".hidden", "", "a b", "a\n"])
def test_a_tasks_name_is_plain(capsys, name):
    walks()
    assert "--task" in refusal(capsys, "import", "walks", "own", "--env-id", ODD, f"--task={name}")
    assert not data.Path("own").exists()


# ---------------------------------------------------------------- 4. numbers

def in_degrees(rng, number):
    return rng.uniform(-90, 90, (20, 2))


def test_actions_in_other_units_are_refused(capsys):
    walks(action=in_degrees)
    refused(capsys, message=r"\d+\.\d% of the actions lie outside of the environment's box")
    assert abs(imported("--clip-actions").episode(0).action).max() == 1
    assert "% of the actions lie outside" in capsys.readouterr().err


@pytest.mark.parametrize("beyond, count, said", [
    (1.05, 2, "1.7% of the actions lie outside"),  # 2 of 120
    (-1.05, 1, "0.8% of the actions lie outside"),
    (1.0000001, 120, ""),  # by rounding alone
])
def test_a_few_clipped_actions_are_counted(capsys, beyond, count, said):
    def action(rng, number):
        found = np.zeros((20, 2))
        found[:max(0, count - 20 * number), 1] = beyond
        return found

    walks(action=action)
    imported("--no-fit-actions")
    err = capsys.readouterr().err
    assert said in err if said else "outside" not in err


def near_a_half(rng, number):
    return 0.5 + 0.02 * rng.uniform(-1, 1, (20, 2))


def test_bins_cover_the_data_where_the_box_is_far_wider(capsys):
    walks(action=near_a_half)
    wide = imported(env_id="tests.odd:Wide-v0")
    assert "bins over the data's range for action 0 (0.48" in capsys.readouterr().err
    low, high = np.array(wide.meta["action_low"]), np.array(wide.meta["action_high"])
    np.testing.assert_allclose([low, high], [[0.476] * 2, [0.524] * 2], atol=0.002)
    prepare.verify([wide])
    batch = data.Sampler([wide], 64).sample(np.random.default_rng(0))
    assert batch.action.abs().max() < 1 and batch.action.max() > 0.7 and batch.action.min() < -0.7
    in_units = low + (batch.action.numpy() + 1) / 2 * (high - low)
    assert abs(in_units - 0.5).max() < 0.021


def test_a_box_that_fits_is_kept_and_a_wide_one_if_asked(capsys):
    walks()
    assert imported().meta["action_high"] == [1, 1]
    assert not capsys.readouterr().err
    walks("narrow", action=near_a_half)
    command("import", "narrow", "b", "--env-id", "tests.odd:Wide-v0", "--task", "a",
            "--no-fit-actions")
    assert data.Task("b/a").meta["action_high"] == [100, 100]
    assert "bins over the whole box are coarse for action 0 (0.48" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (dict(reward=lambda rng, number: np.full(20, 1e38)), "reward exceeds 1e.18 at step 0"),
    (dict(reward=lambda rng, number: np.full(20, 3e17)),
     "return to go exceeds 1e.18 at step 0"),
    (dict(obs=lambda rng, number: np.full((21, 3), -1e20)), "obs exceeds 1e.18 at step 0"),
    (dict(obs=lambda rng, number: np.full((21, 3), 1e39)), "obs is not finite at step 0"),
])
def test_what_float32_cannot_sum_is_refused(capsys, change, message):
    walks(**change)
    refused(capsys, message=f"walks, episode 0: (the )?{message}")


def test_a_box_whose_width_overflows_is_refused(capsys):
    walks()
    refused(capsys, env_id="tests.odd:Widest-v0", message="float32 cannot hold that box's width")


def test_a_column_that_float32_cannot_hold_is_named(capsys):
    """Seconds since 1970; a place that differs between episodes by centimetres, in metres."""
    def columns(rng, number):
        clock = 1.7e9 + 10_000 * number + np.arange(21)
        fine = 1e-9 * rng.normal(size=21)
        constant, goal = np.full(21, 1e9), np.full(21, 5e6 + 0.01 * number)
        far = np.full(21, 1e9 + 1e4 * number)
        now_and_then = 5e6 + np.arange(21) * (10 if number == 0 else 0.01)
        return np.stack([constant, clock, fine, goal, far, now_and_then], axis=1)

    walks(obs=columns)
    imported(env_id="tests.odd:Six-v0")
    said = capsys.readouterr().err.splitlines()
    assert [re.search(r"in column (\d) of the observations is too small", line)[1]
            for line in said] == ["1", "3"]


def test_bad_episodes_are_counted_and_all_bad_is_nothing(capsys):
    def now_and_then(rng, number):
        return np.full(20, np.nan if number % 3 == 1 else 1.0)

    walks(reward=now_and_then)
    refused(capsys, message="walks, episode 1: reward is not finite at step 0")
    assert len(imported("--skip-bad").episodes) == 4
    assert "2 bad episode(s) left out; the first: walks, episode 1" in capsys.readouterr().err
    walks("bad", reward=lambda rng, number: np.full(20, np.inf))
    said = refusal(capsys, "import", "bad", "b", "--env-id", ODD, "--skip-bad")
    assert "bad: there are no episodes: bad, episode 0: reward is not finite" in said


# ---------------------------------------------------------------- 5. targets

@pytest.mark.parametrize("target, message", [
    ("file/own", "Not a directory"), ("taken", "exists already"),
])
def test_a_target_that_cannot_be_written_is_one_line(capsys, target, message):
    walks()
    data.Path("file").touch()
    write_task(data.Path("taken", "a"), [3])
    said = refusal(capsys, "import", "walks", target, "--env-id", ODD, "--task", "a")
    assert message in said and said.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_an_export_to_minari_comes_back_or_leaves_nothing(capsys, monkeypatch):
    """Of an environment that a package registers; and the same, interrupted half way."""
    minari = pytest.importorskip("minari")
    walks()
    task = imported("--reference", 0, 20, "--env-args", '{"steps": 8}')
    with monkeypatch.context() as patch:
        patch.setattr(data.Task, "__iter__", lambda self: iter([self.episode(0), None]))
        assert "minari:own/a-v0: AttributeError" in refusal(capsys, "export", "own/a",
                                                            "minari:own/a-v0")
    assert not minari.list_local_datasets()
    command("export", "own/a", "minari:own/a-v0")
    assert "exists already" in refusal(capsys, "export", "own/a", "minari:own/a-v0")
    command("import", "minari:own/a-v0", "again", "--task", "a")
    again = data.Task("again/a")
    assert length_of(envs.make(again.meta)) == 8
    for key in ("env_id", "env_args", "reference", "action_low"):
        assert again.meta[key] == task.meta[key]
    np.testing.assert_array_equal(again.rows(), task.rows())


def test_a_half_made_minari_set_is_one_line(capsys):
    pytest.importorskip("minari")
    data.Path("minari/own/half-v0/data").mkdir(parents=True)
    refused(capsys, source="minari:own/half-v0", message="minari:own/half-v0 cannot be opened")
