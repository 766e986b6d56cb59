"""The task that `python prepare.py import` makes: described beforehand, judged afterwards."""

import numpy as np

import envs
from behaviors.formats import TOLD
from data import FINAL_OBS, FLAG, REWARD, DataError, commit, notice

CLIPPED = 0.03  # the share of actions outside of the box that is taken for an oversight
NARROW = 0.05  # the share of the box, below which bins over all of it are too coarse


def describe_import(args, about):
    """The meta of the task that is imported: as the flags say, and otherwise as its source."""
    said, given = (name and name.rpartition(":")[2] for name in (about.get("env_id"), args.env_id))
    if given not in (None, said):  # what is said of another environment does not hold
        about = {key: about[key] for key in ("box", "discount", "frame") if key in about}
    kept = {key: about.get(key) for key in envs.KEPT}
    for key in ("env_args", "max_episode_steps"):
        if getattr(args, key) is not None:
            kept[key] = getattr(args, key)
    env_id = args.env_id or about.get("env_id")
    if not env_id:
        raise DataError(f"{args.source} does not name its environment: give --env-id, such as "
                        "--env-id Hopper-v5")
    reference = about.get("reference")
    if args.reference:
        reference = dict(zip(("random", "expert"), args.reference))
    discount = about.get("discount", 0.99) if args.discount is None else args.discount
    instruction = args.instruction or about.get("instruction") or env_id
    meta = envs.describe(env_id, instruction, discount, reference, **kept)
    said = envs.only_changes(env_id, {key: about.get(key) for key in envs.KEPT})
    changed = [key for key in ("env_args", "max_episode_steps") if meta.get(key) != said.get(key)]
    if reference and changed and not args.reference:
        meta["reference"] = None
        notice(f"{args.source}: its reference is left out, for it is of another {changed[0]}: "
               "without one there are returns and no scores; --reference gives one")
    if about.get("frame"):
        meta["frame"] = frame = about["frame"]
        if len(frame) != 3 or min(frame[:2]) < 8:
            raise DataError(f"{args.source}: its pictures are {frame}; expected are height, width "
                            "and channels, of 8 x 8 pixels at least")
        try:
            envs.make(meta).close()
        except Exception as error:  # a constructor may raise anything
            raise DataError(f"{args.source} has pictures, and {env_id} cannot draw: "
                            f"{envs.in_a_line(error)}") from None
    for name in TOLD[1:]:
        if getattr(args, name) or about.get(name):
            meta[name] = getattr(args, name) or about[name]
    box = [meta["action_low"], meta["action_high"]]
    if about.get("box", box) != box:
        raise DataError(f"{args.source}: its actions are in {about['box']}, but those of the "
                        f"environment {env_id} in {box}")
    if "recorded_in" in about:
        meta["recorded_in"] = about["recorded_in"]
    return meta


def report(task, tally, args):
    """Say what was not kept as it was; refuse what looks like an oversight."""
    meta, where = task.meta, f"{args.source}:"
    if tally.skipped:
        notice(f"{where} {len(tally.skipped):,} bad episode(s) left out; the first: "
               f"{tally.skipped[0]}")
    for column in np.flatnonzero(tally.coarse()):
        notice(f"{where} what changes in column {column} of the observations is too small beside "
               "its size for float32; subtract a constant from it")
    share = tally.clipped / meta["transitions"]
    if tally.clipped:
        said = f"{where} {share:.1%} of the actions lie outside of the environment's box, " \
               f"{meta['action_low']} to {meta['action_high']}"
        if share > CLIPPED and not args.clip_actions:
            raise DataError(f"{said}: are they in its units? --clip-actions cuts them to it")
        notice(f"{said}, and were cut to it")
    fit_actions(task, args)


def fit_actions(task, args):
    """Have a box that is far wider than the data's actions be no wider than these need [ours]."""
    meta, O = task.meta, task.meta["obs_dim"]
    box_low, box_high = np.array(meta["action_low"]), np.array(meta["action_high"])
    action, there = task.rows()[:, O:REWARD], task.rows()[:, FLAG:] != FINAL_OBS
    low = action.min(axis=0, where=there, initial=np.inf)
    high = action.max(axis=0, where=there, initial=-np.inf)
    spread = high - low
    narrow = (spread > 0) & (spread < NARROW * (box_high - box_low))
    if not narrow.any():
        return
    said = ", ".join(f"{d} ({low[d]:g} to {high[d]:g} of {box_low[d]:g} to {box_high[d]:g})"
                     for d in np.flatnonzero(narrow))
    if not args.fit_actions:
        notice(f"{args.source}: bins over the whole box are coarse for action {said}")
        return
    notice(f"{args.source}: bins over the data's range for action {said}")
    low = np.where(narrow, np.maximum(low - spread / 10, box_low), box_low)
    high = np.where(narrow, np.minimum(high + spread / 10, box_high), box_high)
    commit(task.folder, {**meta, "action_low": low.tolist(), "action_high": high.tolist()},
           task.episodes.tolist())
