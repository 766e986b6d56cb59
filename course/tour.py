# %% [markdown]
# # A tour of offline reinforcement learning
#
# From recorded episodes to a policy that is better than the episodes, on two tasks and one CPU
# core, in some minutes. Each step is a session of the [course](README.md). Everything is made in
# `runs/tour`.
#
# This notebook is made from `tour.py` by `python -m course.notebook`: change it there.

# %%
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

if not Path("train.py").exists():  # Jupyter starts in course/
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import numpy as np
import torch
from IPython.display import Image

import data
import plots
from eval import iqm
from kernels.categorical_projection import project
from learner import data_weights, improvement_weights

torch.set_num_threads(1)
torch.set_grad_enabled(False)
FOLDER = Path("runs/tour")
shutil.rmtree(FOLDER, ignore_errors=True)  # of the last time


def show(figure):
    """A matplotlib figure, as the cell's result."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=70)
    plots.plt.close(figure)
    return Image(png.getvalue())


def run(program, *flags):
    """What one of the programs prints."""
    command = [sys.executable, program, *map(str, flags)]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# %% [markdown]
# ## 1. Data that nobody chose
#
# Four policies, from random to expert, take turns within each episode. We get 20,000 transitions
# of each task, and never act until the end.

# %%
run("prepare.py", "build", "--out", FOLDER, "--part", "switching",
    "--tasks", "HalfCheetah-v5", "Reacher-v5", "--transitions", 20_000)
run("prepare.py", "info", FOLDER / "switching")

# %% [markdown]
# ## 2. Returns, and where they end
#
# The return of a step is what it earns from then on, discounted. Below, both episodes earn 1 at
# each of 5 steps. The first one is over for good after that. The second one was cut off by a
# clock: it is taken to go on as before.

# %%
ones = np.ones(5, np.float32)
print("terminated", data.return_to_go(ones, True, 0.9).round(2))
print("truncated ", data.return_to_go(ones, False, 0.9).round(2))

# %% [markdown]
# ## 3. A value is a distribution
#
# A value lies on one of five atoms, 0 to 1. The Bellman target moves it: here to 0.1 + 0.9 times
# itself. It lands between atoms, and is shared between its neighbours by nearness. The mean is
# kept.

# %%
atoms = torch.linspace(0, 1, 5)
before = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]])
after = project(before, torch.tensor([0.1]), torch.tensor([0.9]))
for name, probs in (("before", before[0]), ("after", after[0])):
    print(name, probs.numpy().round(3), "of mean", round((probs @ atoms).item(), 4))

# %% [markdown]
# ## 4. Cloning
#
# The simplest policy does what the data did. A score of 0 is a random policy's, 1 the expert's.

# %%
common = ["--size", "tiny", "--data", FOLDER / "switching", "--steps", 600, "--eval-every", 0,
          "--episodes", 3]
run("train.py", *common, "--algo", "bc", "--out", FOLDER / "bc")

# %% [markdown]
# ## 5. Scores, and better data
#
# Of several scores the interquartile mean averages the middle half. It does not hear one outlier.

# %%
scores = [0.1, 0.4, 0.5, 0.5, 0.6, 0.7, 0.8, 40.0]
print("mean", np.mean(scores), "  IQM", iqm(scores))

# %% [markdown]
# Episodes with a high return can be cloned with a larger weight. That needs no critic, so it is
# the baseline for whatever has one.

# %%
returns, task = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0, 0, 0])
print("weights of three returns", data_weights(returns, task, 1, focus=1.0).tolist())
run("train.py", *common, "--algo", "rwr", "--out", FOLDER / "weighted")

# %% [markdown]
# ## 6. A critic, and one step of improvement
#
# PAC learns a critic Q too. It draws actions from its policy, and learns those more that Q
# prefers.

# %%
run("train.py", *common, "--algo", "pac", "--out", FOLDER / "pac")

# %% [markdown]
# What Q says at one state: over one dimension of the action, over another, and over both. In grey
# the policy's bins.

# %%
scene = plots.Scene(FOLDER / "pac", "HalfCheetah-v5")
show(plots.q_figure(scene))

# %% [markdown]
# The weights of 64 draws at this state. A small eta trusts Q alone, a large one the policy.

# %%
q = torch.tensor([[0.50, 0.51, 0.52]])
for eta in (0.1, 1.0, 10.0):
    w = improvement_weights(q, torch.tensor([0.01]), eta)
    print("eta", eta, w[0].numpy().round(3))
show(plots.weights_figure(scene))

# %% [markdown]
# ## 7. The loop, and what breaks it
#
# Does the critic know what will happen? Along one episode of the data: what it expects, and the
# return that followed.

# %%
show(plots.value_figure(scene))

# %% [markdown]
# The target of one update: the next value's distribution, moved by a reward and a discount.

# %%
show(plots.target_figure(scene))

# %% [markdown]
# ## 8. Attention
#
# The latents read the observation's tokens and the words of the instruction.

# %%
show(plots.attention_figure(scene))

# %% [markdown]
# ## The three, side by side

# %%
figure = FOLDER / "compare.png"
runs = [FOLDER / name for name in ("bc", "weighted", "pac")]
run("eval.py", *runs, "--episodes", 5, "--plot", figure)
Image(figure, width=700)

# %% [markdown]
# The bars say how much of this may be chance, with five episodes of one run each. What do they
# tell apart, and what not? What would you run to know more?
#
# Sessions 9 and 10, a Triton kernel and scaling, are in the [course](README.md). So are the
# exercises: `python -m course.blank --list`.
