"""The README's examples of a change: each applies to the code as it is, and trains."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CHANGES = ROOT / "course" / "changes"
PACKAGES = ("behaviors", "kernels")


@pytest.fixture
def changed(tmp_path):
    """apply(name) -> a copy of the program with one change, and run(*command) for it."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name)

    def run(*command):
        subprocess.run(list(map(str, command)), cwd=tmp_path, check=True)

    def apply(name):
        run("git", "apply", CHANGES / f"{name}.diff")
        return tmp_path, lambda *command: run(sys.executable, *command)

    return apply


def trained(folder, run, data, *flags):
    """The last line of the log of a few updates."""
    run("train.py", "--size", "tiny", "--steps", 8, "--warmup", 0.5, "--batch-size", 16, "--data",
        data, "--eval-every", 0, "--episodes", 1, "--device", "cpu", "--out", "run", *flags)
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("path", sorted(CHANGES.glob("*.diff")), ids=lambda path: path.stem)
def test_a_change_is_short(path):
    lines = path.read_text().splitlines()
    changes = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changes) <= 20


def test_a_loss_term(changed, small_data):
    folder, run = changed("awac")
    line = trained(folder, run, small_data, "--tasks", "Reacher-v5", "--algo", "awac")
    assert np.isfinite(line["loss"]) and "critic/loss" in line
    run("-c", f"import plots; scene = plots.Scene('run', 'Reacher-v5', '{small_data}', None, 5); "
        "assert next(plots.lecture(scene))[0] == 'q'")  # it has a Q, whatever its name is


def test_an_encoder(changed, small_data):
    line = trained(*changed("encoder"), small_data, "--tasks", "Reacher-v5")
    assert np.isfinite(line["loss"])


def test_a_task(changed, tmp_path):
    folder, run = changed("task")
    (tmp_path / "jumps").mkdir()
    env = gymnasium.make("Hopper-v5")
    for number in range(3):
        obs, action, reward = [env.reset(seed=number)[0]], [], []
        terminated = False
        while not terminated:
            action.append(env.action_space.sample())
            after, earned, terminated, _, _ = env.step(action[-1])
            obs.append(after)
            reward.append(earned)
        np.savez(tmp_path / "jumps" / f"{number}.npz", obs=np.float32(obs),
                 action=np.float32(action), reward=np.float32(reward), terminated=terminated)
    run("prepare.py", "import", "jumps", "own", "--env-id", "MoonHopper-v0")
    assert np.isfinite(trained(folder, run, "own")["loss"])
    summary = json.loads((folder / "run" / "eval.json").read_text())
    assert list(summary["tasks"]) == ["MoonHopper-v0"]


def test_a_modality(changed):
    """Depth beside the colours: a channel more in the data and in the model."""
    folder, run = changed("depth")
    script = """
import json, prepare
from pathlib import Path
from behaviors import pixels
if __name__ == "__main__":
    prepare.build(Path("seen"), ["switching"], ["Reacher-v5"], 400, source=pixels)
    print("made")
"""
    (folder / "make.py").write_text(script)
    made = subprocess.run([sys.executable, "make.py"], cwd=folder, capture_output=True, text=True)
    if "made" not in made.stdout and ("EGL" in made.stderr or "OpenGL" in made.stderr):
        pytest.skip("nothing can be rendered here")
    assert "made" in made.stdout, made.stderr
    meta = json.loads((folder / "seen/switching/Reacher-v5/meta.json").read_text())
    assert meta["frame"] == [64, 64, 4]
    line = trained(folder, run, "seen/switching")
    assert np.isfinite(line["loss"])
