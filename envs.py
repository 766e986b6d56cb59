"""The environments that data sets are of: described, made, timed and filmed."""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from data import FORMAT, DataError

RENDER_SIZE = 256  # pixels, of a video's edge
VIDEO_FPS = 25
# What a video needs of MuJoCo without a screen; set before MuJoCo is imported.
os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")


def describe(env_id, instruction, discount=0.99, reference=None):
    """What meta.json says of a task before its first episode. reference: the returns that score 0
    and 1.

    DataError if there is no such environment, or if it is not one of vectors.
    """
    try:
        env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError) as error:
        raise DataError(f"environment {env_id!r} cannot be made: {error}") from None
    obs, action = env.observation_space, env.action_space
    env.close()
    for name, space in (("observations", obs), ("actions", action)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise DataError(f"{env_id}: its {name} are {space}, and only vectors (a flat Box) "
                            "can be learnt from")
    if not action.is_bounded():
        raise DataError(f"{env_id}: its actions have no bounds: {action}")
    return {
        "format": FORMAT,
        "env_id": env_id,
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


def make(meta, render=False):
    """The environment of a task's meta.json."""
    if not render:
        return gymnasium.make(meta["env_id"], disable_env_checker=True)
    env = gymnasium.make(meta["env_id"], disable_env_checker=True, render_mode="rgb_array")
    film(env)
    return env


def film(env):
    """Have MuJoCo render small pictures, fast, by the camera that follows the robot if its model
    has one; other environments render as they will."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    import mujoco
    renderer.width = renderer.height = RENDER_SIZE
    # Default quality renders 8 frames a second without a GPU; without these, over 145 (64 x 64,
    # 2026-11-22).
    renderer.model.vis.quality.offsamples = 0
    renderer.model.vis.quality.shadowsize = 0
    if renderer.camera_id == -1:  # a free one, which stays where it is
        camera = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(renderer.model, camera, "track")


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
