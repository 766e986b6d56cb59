"""Controllers that are written down: Meta-World's own, and ours for gymnasium-robotics.

A controller takes an observation (O,), as envs.make gives it, and returns an action (A,), which may
leave [-1, 1].
"""

import warnings

import numpy as np

from behaviors.steps import package


def scripted(row, env):
    """The controller of a row of suite.csv."""
    if row.domain == "metaworld":
        return metaworld(row.env_id.rpartition("/")[2])
    if row.task.startswith("PointMaze"):
        return point_maze(env.unwrapped.maze)
    return FETCH[row.task]


def metaworld(name):
    """The package's own script for a task such as reach-v3."""
    policy = package("metaworld.policies").ENV_POLICY_MAP[name]()
    warnings.filterwarnings("ignore", "Constant")  # where an action leaves [-1, 1]
    return policy.get_action


# ---------------------------------------------------------------- Fetch
# An observation is achieved_goal, desired_goal, then the robot's own: the gripper's place, and
# where there is an object its place, its distance, the two fingers. An action's last entry opens
# these.

GAIN = 15  # of an action by the distance in metres
HIGH = 0.07  # above the object


def action_to(here, there, fingers=0.0):
    return np.append(GAIN * (there - here), fingers)


def fetch_reach(obs):
    return action_to(obs[6:9], obs[3:6])


def fetch_push(obs):
    """Go behind the object, as seen from the goal, then down, then push it along."""
    goal, hand, thing = obs[3:6], obs[6:9], obs[9:12]
    way = goal[:2] - thing[:2]
    distance = np.linalg.norm(way)
    if distance < 0.03:
        return np.zeros(4)
    way = way / distance
    behind = np.append(thing[:2] - 0.07 * way, thing[2])
    offset = hand[:2] - thing[:2]
    along = offset @ way  # negative: the hand is behind
    across = offset - along * way
    straight = np.linalg.norm(across) < 0.02 and along < -0.03
    if straight and hand[2] < thing[2] + 0.02:
        speed = min(1.0, GAIN * distance)
        return np.array([*(speed * way - GAIN * across), GAIN * (thing[2] - hand[2]), 0.0])
    if straight:
        return action_to(hand, behind)
    if hand[2] < thing[2] + HIGH / 2:
        return np.array([0.0, 0.0, 1.0, 0.0])
    return action_to(hand, behind + [0.0, 0.0, HIGH])


def fetch_pick_and_place(obs):
    """Go above the object with open fingers, down, close them, carry."""
    goal, hand, thing, fingers = obs[3:6], obs[6:9], obs[9:12], obs[15:17]
    offset = thing - hand
    if np.linalg.norm(offset[:2]) > 0.015 and np.abs(offset[2]) < 0.1:
        return action_to(hand, thing + [0.0, 0.0, HIGH], 1.0)
    if np.linalg.norm(offset) > 0.02:
        return action_to(hand, thing, 1.0)
    if fingers.sum() > 0.055:  # the object is 5 cm wide
        return action_to(hand, thing, -1.0)
    return action_to(thing, goal, -1.0)


FETCH = {"FetchReachDense-v4": fetch_reach, "FetchPushDense-v4": fetch_push,
         "FetchSlideDense-v4": fetch_push, "FetchPickAndPlaceDense-v4": fetch_pick_and_place}


# ---------------------------------------------------------------- mazes

def point_maze(maze):
    """Roll to the middle of the next cell on the shortest way to the goal's cell."""
    ways = {}

    def control(obs):
        goal, here, speed = obs[2:4], obs[4:6], obs[6:8]
        cell, end = (tuple(maze.cell_xy_to_rowcol(place)) for place in (here, goal))
        if end not in ways:
            ways[end] = steps_to(maze.maze_map, end)
        target = goal
        if cell != end and cell in ways[end]:
            target = maze.cell_rowcol_to_xy(np.array(ways[end][cell]))
        return 10 * (target - here) - 2 * speed

    return control


def steps_to(cells, end):
    """{cell: the next one on a shortest way to `end`}; cells: rows of a map, where 1 is a wall"""
    ways, waiting = {end: end}, [end]
    for row, column in waiting:
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if cells[cell[0]][cell[1]] != 1 and cell not in ways:
                ways[cell] = (row, column)
                waiting.append(cell)
    return ways
