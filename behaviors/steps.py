"""Steps recorded elsewhere -> Episodes, by one rule for all formats.

An episode ends at each flag, and where the state that a step led to is not the next step's. What
was done so is counted in `Reading.notes`, for the user.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

import envs
from data import DataError, Episode, flatten

DISORDER = 0.25  # where more steps than this lead elsewhere, the rows are not in order of time
BLOCK = 1 << 16  # rows compared at a time


@dataclass
class Reading:
    """How to read a source, and what was found on the way."""
    limit: int = None  # where a source has no time limits: an episode's end
    longest: int = None  # what an episode can have in its environment
    obs_keys: list = None  # the parts of observations to take, in order (default: all, by name)
    obs_parts: dict = None  # what the environment's observations are of, {name: width}
    rewards: bool = True  # False: 0 where a source has none
    task: int = None  # of LeRobot's tasks, that of the episodes so far
    parts: list = None  # what the observations were of: [[name, width], ...], in their order
    notes: dict = field(default_factory=dict)  # {what was done: (how often, where first)}

    def note(self, what, count, where):
        if count:
            before, first = self.notes.get(what, (0, where))
            self.notes[what] = before + int(count), first

    def without_parts(self, where):
        """DataError if parts were asked for of observations that have none."""
        if self.obs_keys:
            raise DataError(f"{where}: its observations have no parts, so leave out --obs-keys "
                            f"{' '.join(self.obs_keys)}")


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"this needs `pip install {name.split('.')[0]}`") from None


def flags(array, count, where):
    """An array of 0 and 1, (count,), as bool."""
    array = np.asarray(array)
    if array.shape != (count,) or not np.isin(array, (0, 1)).all():
        raise DataError(f"{where} has shape {array.shape} and values from {array.min()} to "
                        f"{array.max()}, expected ({count},) of 0 and 1")
    return array.astype(bool)


def vectors(obs, reading, where):
    """Observations (T, O) of an array, a tuple or a dict; of a dict, the parts asked for."""
    if not isinstance(obs, Mapping):
        reading.without_parts(where)
        return flatten(obs)
    names = reading.obs_keys or sorted(obs)
    for name in names:
        if name not in obs:
            raise DataError(f"{where}: no part {name!r} of the observations; there are: "
                            f"{', '.join(sorted(obs))}")
        part = np.asarray(obs[name])
        if part.dtype == np.uint8 and part.ndim > 2:
            raise DataError(f"{where}: {name} are images, which cannot be learnt from; name the "
                            "other parts with --obs-keys")
    widths = {name: flatten(obs[name]).shape[1] for name in names}
    said = ", ".join(f"{name} ({width})" for name, width in widths.items())
    if reading.obs_parts and [*widths.items()] != [*reading.obs_parts.items()]:  # the order too
        raise DataError(f"{where}: observations of {said}; the environment's are of "
                        f"{', '.join(f'{n} ({w})' for n, w in reading.obs_parts.items())}")
    parts = [[name, width] for name, width in widths.items()]
    if reading.parts not in (None, parts):
        raise DataError(f"{where}: observations of {said}, and those before of {reading.parts}")
    reading.parts = parts
    return flatten(tuple(obs[name] for name in names))


def leads_on(obs, next_obs):
    """(N,) whether a step leads to the next one's observation; obs, next_obs: (N, O)"""
    found = np.zeros(len(obs), bool)
    for first in range(0, len(obs) - 1, BLOCK):
        last = min(first + BLOCK, len(obs) - 1)
        there, here = next_obs[first:last], obs[first + 1:last + 1]
        near = np.isclose(there, here, rtol=1e-4, atol=1e-6, equal_nan=True)
        found[first:last] = near.all(axis=1)
    return found


def at_limit(ends, limit):
    """(N,) whether a step is the limit-th, or a multiple of it, of its episode."""
    step = np.arange(len(ends))
    begins = np.concatenate([[True], ends[:-1]])
    return (step - np.maximum.accumulate(np.where(begins, step, 0)) + 1) % limit == 0


def ends_of(obs, next_obs, terminated, truncated, reading, where):
    """(N,) whether an episode ends with a step; arguments as of `episodes_of`."""
    count, ends = len(terminated), terminated.copy()
    if truncated is not None:
        ends |= truncated
    if next_obs is not None:
        on = leads_on(obs, next_obs)
        reading.note("flag(s) within an episode, which is split there", sum(on & ends),
                     f"{where}, step {np.argmax(on & ends)}")
        breaks = ~on[:-1] & ~ends[:-1]
        first = f"{where}, step {np.argmax(breaks) if len(breaks) else 0}"
        if breaks.sum() > DISORDER * count:
            raise DataError(f"{first}: the next observation is not the next row's, nor in "
                            f"{breaks.sum() - 1:,} more of {count:,} rows: put them in order")
        reading.note("step(s) that do not lead to the next one, where the episode is split",
                     breaks.sum(), first)
        ends[:-1] |= breaks
    elif truncated is None and not reading.limit:
        raise DataError(f"{where}: neither time limits nor next observations say where an episode "
                        "ends: give --max-episode-steps")
    if reading.limit and (truncated is None or not truncated.any()):
        ends |= at_limit(ends, reading.limit)
    ends[-1:] = True
    return ends


def episodes_of(obs, next_obs, action, reward, terminated, truncated, reading, where):
    """The Episodes of N steps, in order.

    obs, next_obs: (N, O), sliced; action (N, A); reward, terminated, truncated (N,). If next_obs is
    None, the last step before a time limit is dropped: the state that it led to is not known. If
    truncated is None, or never set, an episode ends at reading.limit.
    """
    terminated = flags(terminated, len(reward), f"{where}: the flag of terminal states")
    if truncated is not None:
        truncated = flags(truncated, len(reward), f"{where}: the flag of time limits")
    start, ends = 0, ends_of(obs, next_obs, terminated, truncated, reading, where)
    for end in np.flatnonzero(ends) + 1:
        if next_obs is not None:
            final, stop = next_obs[end - 1:end], end
        elif terminated[end - 1]:  # a terminal state's successor is never looked at
            final, stop = obs[end - 1:end], end
        else:
            final, stop = obs[:0], end - 1
            reading.note("last step(s) dropped, for the state that followed is not there", 1,
                         f"{where}, step {stop}")
        if next_obs is None and reading.longest and end - start > reading.longest:
            raise DataError(f"{where}, step {start}: {end - start:,} steps without an end, but "
                            f"its environment has {reading.longest:,}: give --max-episode-steps")
        if stop > start:
            yield Episode(np.concatenate([obs[start:end], final]), action[start:stop],
                          reward[start:stop], terminated[end - 1])
        start = end


def each(items, read):
    """What read(where, item) yields for each (where, item); an error in the place of a bad one."""
    for where, item in items:
        try:
            yield from read(where, item)
        except DataError as error:
            yield error
        except Exception as error:  # a damaged file may raise anything
            yield DataError(f"{where}: it is damaged, or lacks an array: {envs.in_a_line(error)}")


def rewards(found, count, reading, where):
    """The rewards found; if there are none, zeros, if they were asked for."""
    if found is None and reading.rewards:
        raise DataError(f"{where}: no rewards; --no-rewards takes 0, for cloning alone")
    return np.zeros(count) if found is None else np.asarray(found)
