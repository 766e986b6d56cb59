"""The environments that data sets are of: described, made, timed, filmed and played in.

Beside `env_id` a task's meta.json may hold `env_args` (of the constructor), `max_episode_steps` and
`wrappers`, where they differ from what the id is registered with. `make` builds that environment.
Dicts of observations are flattened by name; `obs_parts` has the order, and the widths.
"""

import ctypes.util
import importlib.util
import json
import os
import random
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple

from data import FORMAT, HISTORY, LARGEST, DataError, Episode, flatten

RENDER_SIZE = 256  # pixels, of a video's edge
VIDEO_FPS = 25
ENV_SECONDS = 60  # an environment that needs longer for one answer hangs; MuJoCo's need under 0.001
LARGEST_RETURN = float(np.finfo(np.float32).max)
KEPT = ("env_args", "max_episode_steps", "wrappers")  # of an environment, beside its id
# Packages that register environments when they are imported, by how the ids begin.
PACKAGES = {"dm_control/": "shimmy", "Meta-World/": "metaworld", "HalfCheetahGoal": "behaviors",
            **dict.fromkeys(("PointMaze", "AntMaze", "Fetch", "Hand", "Adroit", "FrankaKitchen"),
                            "gymnasium_robotics")}
# Wrappers of gymnasium: these change nothing; those have seen data that a new one has not.
NEUTRAL = ("OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo")
STATEFUL = ("NormalizeObservation", "NormalizeReward")
PROBE_STEPS = 10_000  # in which an environment without a registered limit has to set its own
PROBE_SECONDS = 60
NO_DRAWING = "disable"  # what MuJoCo calls it


def drawn_by():
    """What MuJoCo draws videos with, without a screen. Where EGL is missing, as in a slim
    container, MuJoCo with EGL would not even be imported; and all but videos needs none."""
    if sys.platform != "linux":
        return "glfw"
    return "egl" if ctypes.util.find_library("EGL") else NO_DRAWING


os.environ.setdefault("MUJOCO_GL", drawn_by())  # before MuJoCo is imported


def describe(env_id, instruction, discount=0.99, reference=None, **kept):
    """What meta.json says of a task before its first episode. reference: the returns that score 0
    and 1. kept: what the environment has beside its id, see KEPT.

    DataError if there is no such environment, or if it is not one of vectors.
    """
    if not 0 <= discount < 1:
        raise DataError(f"discount {discount}: it has to be at least 0 and below 1")
    check_reference(reference)
    try:
        environment = {"env_id": env_id, **only_changes(env_id, kept)}
        env = make(environment)
    except DataError as error:
        raise DataError(f"{env_id}: {error}") from None
    except Exception as error:  # a constructor may raise anything
        raise DataError(f"environment {env_id!r} cannot be made: {in_a_line(error)}"
                        f"{advice(env_id, error)}") from None
    check_end(env, env_id)
    if isinstance(env, Flat) and env.parts:
        environment["obs_parts"] = env.parts
    obs, action = env.observation_space, env.action_space
    env.close()
    if not isinstance(action, Box) or len(action.shape) != 1:
        raise DataError(f"{env_id}: its actions are {action}, and only vectors (a flat Box) can be "
                        "learnt")
    if action.dtype.kind != "f":
        raise DataError(f"{env_id}: its actions are {action}, whole numbers, and only real ones "
                        "can be learnt: wrap it to round actions of a float Box")
    if not action.is_bounded():
        raise DataError(f"{env_id}: its actions have no bounds: {action}")
    if max(np.abs(action.low).max(), np.abs(action.high).max()) > LARGEST:
        raise DataError(f"{env_id}: its actions reach from {action.low.min():g} to "
                        f"{action.high.max():g}, and float32 cannot hold that box's width")
    return {
        "format": FORMAT,
        **environment,
        "instruction": instruction,
        "obs_dim": obs.shape[0],
        "action_dim": action.shape[0],
        "action_low": action.low.tolist(),
        "action_high": action.high.tolist(),
        "discount": discount,
        "reference": reference,
        "return_to_go": None,
        "rows": 0,
    }


def check_reference(reference):
    """DataError if the returns that score 0 and 1 are not finite, or not in this order."""
    if reference and reference.keys() != {"random", "expert"}:
        raise DataError(f"reference {reference}: it has to be of `random` and `expert`")
    if reference and not -LARGEST < reference["random"] < reference["expert"] < LARGEST:
        raise DataError(f"reference {reference['random']:g} {reference['expert']:g}: the returns "
                        "that score 0 and 1 have to be finite, the second above the first")


def check_end(env, env_id):
    """DataError if an environment has no time limit: neither registered, nor one of its own."""
    if env.spec and env.spec.max_episode_steps:
        return
    try:
        with time_limit(PROBE_SECONDS):
            env.reset(seed=0)
            for _ in range(PROBE_STEPS):
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                if truncated:
                    return
                if terminated:
                    env.reset()
    except Exception as error:
        raise DataError(f"{env_id}: an episode cannot be played: {in_a_line(error)}") from None
    raise DataError(f"{env_id} has no time limit: none is registered, and no random episode was "
                    f"cut off within {PROBE_STEPS:,} steps; give --max-episode-steps")


def in_a_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def advice(env_id, error):
    """What may help where an environment cannot be made."""
    package = package_of(env_id)
    if isinstance(error, gymnasium.error.UnregisteredEnv):
        if package:
            return f"; it is registered by {package}: `pip install {package.replace('_', '-')}`"
        if ":" not in env_id:
            return f"; if a package registers it, name that too: --env-id package:{env_id}"
    if isinstance(error, ModuleNotFoundError):
        if error.name == env_id.partition(":")[0]:  # one's own, and on PyPI perhaps a stranger's
            return f"; install {error.name}, or put the folder that it is in on PYTHONPATH"
        return f"; `pip install {error.name.replace('_', '-')}`"
    if isinstance(error, TypeError):
        return "; a constructor's arguments are given as --env-args '{\"name\": \"value\"}'"
    return ""


# ---------------------------------------------------------------- the same environment again

def package_of(env_id):
    """The package that registers an id, if it is among PACKAGES."""
    for start, package in PACKAGES.items():
        if env_id.startswith(start):
            return package
    return None


def registered(env_id):
    """The EnvSpec of an id, such as Hopper-v5 or package:Id-v0; its package is imported."""
    package, _, name = env_id.rpartition(":")
    if not package and importlib.util.find_spec(package_of(env_id) or "gymnasium"):
        package = package_of(env_id)
    if package:
        importlib.import_module(package)
    return gymnasium.spec(name)


def only_changes(env_id, kept):
    """Those entries of KEPT that differ from what the id is registered with, as JSON has them."""
    spec, kept = registered(env_id), json.loads(json.dumps(kept))
    args = kept.get("env_args") or {}
    args = {key: value for key, value in args.items()
            if key != "render_mode" and (key not in spec.kwargs or spec.kwargs[key] != value)}
    limit = kept.get("max_episode_steps")
    if limit is not None and limit < 1:
        raise ValueError(f"max_episode_steps is {limit}")
    if limit == spec.max_episode_steps:
        limit = None
    found = dict(env_args=args, max_episode_steps=limit, wrappers=kept.get("wrappers"))
    return {key: value for key, value in found.items() if value}


def kept_of(spec):
    """What is kept of a gymnasium EnvSpec that came with a data set -> env_id, and KEPT.

    The id is looked up here: a file does not say what code to run. So of the wrappers, only
    gymnasium's own are kept.
    """
    wrappers = []
    for wrapper in spec.additional_wrappers:
        if wrapper.name in NEUTRAL:
            continue
        ours = wrapper.entry_point.startswith("gymnasium.wrappers.")
        if not ours or wrapper.kwargs is None or wrapper.name in STATEFUL:
            raise DataError(f"its environment {spec.id} is wrapped in {wrapper.entry_point}, which "
                            "cannot be made again: give --env-id of one that needs no such wrapper")
        wrappers.append([wrapper.name, wrapper.kwargs])
    return {"env_id": spec.id, "env_args": spec.kwargs, "wrappers": wrappers,
            "max_episode_steps": spec.max_episode_steps}


class Flat(gymnasium.ObservationWrapper):
    """Observations of dicts, tuples and arrays as one vector, by data.flatten; of a dict, `parts`
    has the names and widths, in order."""

    def __init__(self, env):
        super().__init__(env)
        check_parts(env.observation_space, "")
        sample = env.observation_space.sample()
        width, self.parts = len(self.observation(sample)), {}
        if isinstance(sample, dict):
            self.parts = {name: len(self.observation(sample[name])) for name in sorted(sample)}
        self.observation_space = Box(-np.inf, np.inf, (width,), np.float64)

    def observation(self, obs):
        return flatten(obs, steps=False)


def check_parts(space, name):
    """DataError if a part of an observation is neither a number nor an array of numbers."""
    parts = {}
    if isinstance(space, Dict):
        parts = space.spaces
    elif isinstance(space, Tuple):
        parts = dict(enumerate(space.spaces))
    elif not isinstance(space, Box) or (space.dtype == np.uint8 and len(space.shape) > 1):
        raise DataError(f"its observations{name} are {space}, and only vectors, and dicts and "
                        "tuples of them, can be learnt from")
    for key, part in parts.items():
        check_parts(part, f"{name}[{key!r}]")


def make(meta, render=False):
    """The environment of a task's meta.json; its observations are vectors. render: for videos; that
    of a task with pictures always draws, in their size."""
    registered(meta["env_id"])
    frame = meta.get("frame")
    render = render or bool(frame)
    options = dict(meta.get("env_args", {}))
    if "max_episode_steps" in meta:
        options["max_episode_steps"] = meta["max_episode_steps"]
    if render:
        options["render_mode"] = "rgb_array"
    if frame and meta["env_id"].startswith("dm_control/"):
        options["render_kwargs"] = {"height": frame[0], "width": frame[1], "camera_id": 0}
    env = gymnasium.make(meta["env_id"], disable_env_checker=True, **options)
    for name, kwargs in meta.get("wrappers", ()):
        env = getattr(gymnasium.wrappers, name)(env, **kwargs)
    if not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        env = Flat(env)
    if render:
        film(env, frame[:2] if frame else (RENDER_SIZE, RENDER_SIZE))
    return env


def film(env, size):
    """Have MuJoCo render small pictures, fast, by the camera that follows the robot if its model
    has one; other environments render as they will. size: height and width"""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    import mujoco
    renderer.height, renderer.width = size
    # Default quality renders 8 frames a second without a GPU; without these, over 145 (64 x 64,
    # 2026-11-22).
    renderer.model.vis.quality.offsamples = 0
    renderer.model.vis.quality.shadowsize = 0
    if renderer.camera_id == -1:  # a free one, which stays where it is
        camera = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(renderer.model, camera, "track")


def picture(env, shape=None):
    """What an environment that was made with `render` looks like: (H, W, 3) uint8. shape: that of
    the pictures that a model is given, which may have other channels. DataError if it is not."""
    frame = drawn(env)
    is_array = isinstance(frame, np.ndarray)
    if is_array and frame.dtype == np.uint8:
        if frame.shape == (tuple(shape) if shape else (*frame.shape[:2], 3)):
            return frame
    given = f"{frame.dtype} of shape {frame.shape}" if is_array else type(frame).__name__
    expected = tuple(shape) if shape else "(height, width, 3)"
    raise DataError(f"render() gave {given}, and it has to give uint8 of shape {expected}")


def drawn(env):
    """What render() gives."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.viewer is not None:
        # Else the newest environment's is drawn in, and nothing once any of them was closed.
        renderer.viewer.make_context_current()
    try:
        return env.render()
    except Exception:
        if renderer is None or os.environ["MUJOCO_GL"] != NO_DRAWING:
            raise
        raise DataError("MuJoCo can draw nothing here, for EGL is missing: `apt install libegl1`") \
            from None


@contextmanager
def time_limit(seconds):
    """TimeoutError if the block takes longer: on Unix, in the main thread; elsewhere no limit."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_video(path, frames):
    """Write frames, a list of (H, W, 3) uint8, to a .gif or .mp4; smaller ones in a black border"""
    if not frames:
        raise DataError(f"{path}: nothing was filmed")
    height, width, _ = np.max([frame.shape for frame in frames], axis=0)
    frames = [np.pad(frame, ((0, height - len(frame)), (0, width - frame.shape[1]), (0, 0)))
              for frame in frames]
    try:
        import imageio.v3 as imageio
        if Path(path).suffix == ".gif":
            imageio.imwrite(path, frames, duration=1000 / VIDEO_FPS, loop=0)
        else:
            imageio.imwrite(path, frames, fps=VIDEO_FPS)
    except ImportError:
        raise DataError(f"{path}: writing this format needs `pip install imageio imageio-ffmpeg`; "
                        "a .gif needs no more than requirements.txt") from None


# ---------------------------------------------------------------- one episode

class Play:
    """One episode being played; if its environment raises, hangs or answers with what cannot be
    learnt from, `failed` says so.

    All that is random in it comes from its own seed: it is the same whatever is played beside it.
    """

    def __init__(self, index, number, meta, keep, render):
        self.index, self.number, self.meta = index, number, meta
        self.keep, self.render = keep, render
        self.low = np.array(meta["action_low"], np.float32)
        self.high = np.array(meta["action_high"], np.float32)
        self.obs, self.action, self.reward, self.frames = [], [], [], []
        self.total = 0.0  # the return
        self.seen = []  # the pictures that a model is given: the last ones, or all there were
        self.terminated = self.live = False
        self.env = self.failed = self.success = self.limit = None

    def ask(self, function, *args):
        """Call what calls the environment; if that fails, this episode ends."""
        seed = int(self.rng.integers(2**32))  # of an environment that draws from what is global
        random.seed(seed)
        np.random.seed(seed)
        try:
            with time_limit(ENV_SECONDS):
                function(*args)
        except Exception as error:
            self.failed = (f"{self.meta['name']}, episode {self.number}, step {len(self.reward)}: "
                           f"{type(error).__name__}: {error}")
            self.close()

    def start(self, seed):
        self.rng = np.random.default_rng([seed, self.index])
        self.ask(self.reset, seed)

    def reset(self, seed):
        self.env = make(self.meta, self.render)
        self.limit = self.env.spec.max_episode_steps if self.env.spec else None
        self.observe(self.env.reset(seed=seed)[0])
        self.live = True

    def step(self, unit_action):
        """unit_action (A,) in [-1, 1], padded"""
        unit_action = unit_action[:len(self.low)]
        self.ask(self.advance, self.low + (unit_action + 1) / 2 * (self.high - self.low))

    def advance(self, action):
        obs, reward, self.terminated, truncated, info = self.env.step(action)
        self.reward.append(np.asarray(reward).item())
        self.total += self.reward[-1]
        if not abs(self.total) <= LARGEST_RETURN:
            raise ValueError(f"the return is {self.total}")
        self.action.append(action)
        self.observe(obs)
        for name in ("success", "is_success"):
            if name in info:
                self.success = bool(self.success or np.any(info[name]))
        if self.render and len(self.reward) % 2:
            self.frames.append(picture(self.env, self.meta.get("frame")))
        if self.terminated or truncated:
            self.close()

    def observe(self, obs):
        """Take an observation (O,); ValueError if it is anything else."""
        obs, shape = np.array(obs, np.float32), (self.meta["obs_dim"],)
        if obs.shape != shape or not np.isfinite(obs).all():
            raise ValueError(f"an observation of shape {obs.shape} with {np.isfinite(obs).sum()} "
                             f"finite numbers, expected {shape}")
        if not self.keep:
            self.obs.clear()
            del self.seen[:-HISTORY + 1]
        self.obs.append(obs)
        if self.meta.get("frame"):
            self.seen.append(picture(self.env, self.meta["frame"]))

    def history(self):
        """The last pictures (HISTORY, height, width, channels). Before the first stands the first.
        """
        missing = HISTORY - len(self.seen)
        return np.stack([self.seen[0]] * missing + self.seen[-HISTORY:])

    def close(self):
        """Let the environment go: many would fill the memory."""
        env, self.env, self.live = self.env, None, False
        with suppress(Exception), time_limit(ENV_SECONDS):
            env.close()

    def steps_left(self):
        """How many steps a live episode can still take; 0 for an unknown number."""
        return max(0, (self.limit or 0) - len(self.reward))

    def episode(self):
        """All of it if it was kept, otherwise the rewards alone."""
        obs, action = (np.array(x, np.float32) for x in (self.obs, self.action))
        frames = np.stack(self.seen) if self.seen else None
        return Episode(obs, action, np.array(self.reward, np.float32), self.terminated, frames)
