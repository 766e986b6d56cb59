"""Train one model on a data set of several tasks, then evaluate it.

    python train.py                                  the default: PAC, size small, seven tasks
    python train.py --size tiny                      the whole tour, data to evaluation, in minutes
    python train.py --algo bc --seed 1               another algorithm, another seed
    python train.py --tasks Hopper-v5 --eta 0.1      one task; any setting of the loss is a flag
    python train.py --data datasets/own datasets/levels --alphas 1 0.5      an alpha for each source
    python train.py --resume runs/pac-small-0        go on where a run was stopped
    python train.py --size l --dry-run               what it would take: memory, operations, time
    torchrun --nproc-per-node 8 train.py --size l    on several GPUs

A run's folder holds config.json, metrics.jsonl, checkpoints/ and, at the end, eval.json and
curve.png. Exit codes: 0; 2, the message says what is wrong; 3, trained, but episodes of the
evaluation failed; 128 + n, stopped by signal n (Ctrl-C: 130) after the update in hand, saved. A
second signal, some seconds later, ends at once.
"""

import argparse
import ast
import math
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote

STEPS = {"tiny": 600, "small": 10_000}  # updates by default; other sizes: 100,000
ONE_THREAD = ("tiny", "small")  # beside other work on the cores, a second made a run 8 times slower
LARGE = ("s", "m", "l")  # these are sharded over the ranks and recompute activations by default


@dataclass
class TrainConfig:
    """The flags of a run. The comments are their help."""
    size: str = "small"  # of the model
    algo: str = "pac"  # the algorithm
    data: list[str] = None  # data sets: folders with one directory a task (default: switching)
    weights: list[float] = None  # how often each data set is drawn from (default: equally)
    alphas: list[float] = None  # alpha for each data set, in the place of --alpha
    verify: bool = True  # read every byte of the data before training
    prefetch: bool = False  # make batches ahead in a thread: the same ones, in the same order
    tasks: list[str] = None  # some of the data set's tasks (default: all)
    embodiments: bool = True  # tasks of one share the whole model; no: each has maps of its own
    steps: int = None  # updates (default: tiny 600, small 10000, others 100000)
    batch_size: int = 128  # transitions an update, of all ranks together
    seed: int = 0  # of everything random
    out: str = None  # the run's folder (default: runs/ALGO-SIZE-SEED)
    eval_every: int = 3000  # updates between evaluations on the way; 0: none
    eval_episodes: int = 3  # a task in those evaluations
    episodes: int = 10  # a task in the evaluation at the end; 0: none
    save_every: int = 500  # updates between checkpoints; 0: one at the end
    keep: int = 2  # checkpoints, the newest
    log_every: int = 50  # updates between lines of metrics.jsonl; 0: one at the end
    log: list[str] = None  # other loggers
    threads: int = None  # of the CPU (default: 1 for tiny and small, otherwise torch's choice)
    device: str = None  # what computes (default: cuda if there is one, with bf16 from large on)
    compile: bool = False  # the loss, by torch.compile: faster after a minute or two; needs g++
    graph: bool = None  # each update as one CUDA graph: one launch (default: on one GPU, to xs)
    accumulate: int = 1  # work a batch off in so many parts, for less memory
    recompute: bool = None  # activations: less memory, a third more work (default: for s, m, l)
    shard: bool = None  # the weights over the ranks, by FSDP, not DDP (default: for s, m, l)
    deterministic: bool = False  # on a GPU: the same bits every time; a CPU's always are


# On --resume: how, not what, is computed. The bits may differ; with `accumulate` also the
# statistics within a part. `data`: the same, elsewhere. `steps` may grow.
MAY_CHANGE = ("verify", "prefetch", "keep", "log", "threads", "device", "compile", "graph",
              "accumulate", "recompute", "shard", "data", "steps", "episodes", "eval_every",
              "eval_episodes", "log_every", "save_every")

# The numbers that settings take: in words, as a test, and for which settings.
RANGES = (
    ("from 0 to 1", lambda x: 0 <= x <= 1, "alpha alphas warmup"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "top target_rate"),
    ("above 0", lambda x: 0 < x < math.inf, "eta learning_rate weights"),
    ("0 or more", lambda x: 0 <= x < math.inf,
     "beta max_grad_norm episodes eval_every save_every log_every"),
    ("from 0 to 40", lambda x: 0 <= x <= 40, "focus"),  # exp(2 focus) is to be a float32
    ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "seed"),
    ("1 or more", lambda x: x >= 1,
     "steps batch_size eval_episodes keep threads accumulate n_step"),
    ("2 or more", lambda x: x >= 2, "samples"),  # one alone has no spread
)
ANY = "finite", math.isfinite, ""  # a setting of your own, say


# ---------------------------------------------------------------- flags, before torch is imported

def source_of(file):
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def fields_of(file, name):
    """(name, type, default, comment) of a dataclass' fields, as they stand in a file.

    Read as text, for learner.py imports torch, which takes seconds, and a typing error should be
    answered at once. Besides, the comments are the flags' help.
    """
    body = re.search(rf"class {name}:\n(.*?)\n\n\n", source_of(file), re.S)[1]
    fields = re.findall(r"^    (\w+): (.+?) = (.+?)(?:  # (.+))?$", body, re.M)
    for field, kind, _, comment in fields:
        if not comment or re.sub(r"^list\[(.+)]$", r"\1", kind) not in (*TYPES, "bool"):
            sys.exit(f"{file}: {name}.{field} is to be a flag, so it needs a comment, its help, "
                     f"and a type of {', '.join(TYPES)}, bool, or a list of these")
    return fields


def names_of(file, table):
    """The names in a table, a dict or a tuple, as it stands in a file; of a dict with their values
    where these are words."""
    for node in ast.parse(source_of(file)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == table:
            if isinstance(node.value, ast.Tuple):
                return ast.literal_eval(node.value)
            return {key.value: getattr(value, "value", None)
                    for key, value in zip(node.value.keys, node.value.values)}


def algorithm(name):
    """The name of an algorithm; one that it had before is refused with the one it has now."""
    renamed = names_of("learner.py", "RENAMED")
    if name in renamed:
        raise argparse.ArgumentTypeError(f"{name!r} is called {renamed[name]!r} now")
    return name


def steps_of(size):
    """The updates of a run by default."""
    return STEPS.get(size, 100_000)


TYPES = {"str": str, "int": int, "float": float}


def number(name, kind):
    """The type of a setting's flag: one that takes the numbers of RANGES."""
    words, allowed, _ = next((row for row in RANGES if name in row[2].split()), ANY)

    def read(text):
        if not allowed(kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: it has to be {words}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse names it where a text is no number at all
    return read


def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(group, fields, choices, prefix=""):
    for name, kind, default, comment in fields:
        options = dict(metavar=name.upper(), choices=choices.get(name))
        if kind.startswith("list"):
            kind, options["nargs"] = kind[5:-1], "+"
        if kind == "bool":
            options = dict(action=argparse.BooleanOptionalAction)
        else:
            options["type"] = str if kind == "str" else number(name, TYPES[kind])
        if name in choices:
            comment += ": " + ", ".join(choices[name])
        if default != "None":
            comment += f" ({prefix}{default})"
        if name == "algo":
            options["type"] = algorithm
        group.add_argument(flag(name), help=comment.replace("%", "%%"), **options)


@dataclass
class Flags:
    """What was asked for: the run's flags and the settings of the loss, those given alone."""
    run: dict
    loss: dict
    resume: str
    at: int
    dry_run: bool


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"size": names_of("model.py", "SIZES"), "algo": names_of("learner.py", "ALGORITHMS"),
               "log": names_of("checkpoint.py", "LOGGERS"), "act": names_of("eval.py", "ACTS"),
               "device": ("cpu", "cuda"), "critic": names_of("learner.py", "CRITICS"),
               "merit": names_of("data.py", "MERITS")}
    add_flags(parser.add_argument_group("the run"), fields_of("train.py", "TrainConfig"), choices)
    more = parser.add_argument_group("instead of a new run")
    more.add_argument("--resume", metavar="RUN", default=None, help="go on with this run")
    more.add_argument("--at", metavar="UPDATE", type=int, default=None,
                      help="with --resume: from the checkpoint of this update (default: newest)")
    more.add_argument("--dry-run", action="store_true", default=False,
                      help="print what the run would take, and stop")
    settings = fields_of("learner.py", "LossSettings")
    loss = parser.add_argument_group("the loss (default: the algorithm's own, see learner.py)")
    add_flags(loss, settings, choices, "pac: ")
    given = vars(parser.parse_args(argv))
    if given["at"] is not None and not given["resume"]:
        parser.error("--at goes with --resume")
    alone = [given.pop(name) for name in ("resume", "at", "dry_run")]
    changes = {name: given.pop(name) for name, *_ in settings if name in given}
    return Flags(given, changes, *alone)


if __name__ == "__main__":
    FLAGS = parse_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while there is nothing to save

import faulthandler
import importlib.util
import json
import os
import shutil
from contextlib import nullcontext

import numpy as np
import torch

import data
import envs
import parallel
import prepare
from checkpoint import (FORMAT, Log, RunError, check_device, checkpoints, find_checkpoint,
                        from_config, read_config, restore, save, set_aside)
from eval import (EPISODES_FAILED, evaluate, failures, file_of, kept_path, shown, table,
                  write_summary)
from kernels.graph import Graphs
from learner import CONSTANT, Learner, LossSettings, NonFinite, settings_for
from model import config_for, count_parameters, tokenize
from parallel import over_ranks
from plots import curve

FEW = 8  # rows of a task, fewer than which say little of how its advantages lie
# Sound runs of ours had an entropy above 2 nats, and |value - observed| below 0.05 [ours].
LOW_ENTROPY, HIGH_VALUE = 0.1, 0.25


# ---------------------------------------------------------------- what is run

def check(config, settings):
    """RunError for what cannot be; nothing has been written yet."""
    check_device(config.device)
    if config.batch_size % (parallel.RANKS * config.accumulate):
        raise RunError(f"--batch-size {config.batch_size} cannot be divided among {parallel.RANKS} "
                       f"ranks in {config.accumulate} parts each")
    if config.alphas and (settings.beta == 0 or settings.warmup == 1):
        raise RunError(f"--alphas: {config.algo} only clones, so alpha changes nothing")
    if settings.beta == 0 and settings.alpha < 1:
        raise RunError(f"--beta 0 --alpha {settings.alpha:g}: without a critic there is nothing to "
                       "improve by; --alpha 1 clones alone")
    if settings.act in ("improved", "best") and (settings.beta == 0 or settings.critic == "v"):
        raise RunError(f"--act {settings.act} needs a critic Q, and these settings train none")
    for name in ("weights", "alphas"):
        given = getattr(config, name)
        if given and len(given) != len(config.data):
            raise RunError(f"--{name}: {len(given)} for {len(config.data)} data set(s); "
                           "give one for each")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if config.compile and not shutil.which(compiler):
        raise RunError(f"--compile needs a C++ compiler, and there is no {compiler}: "
                       "`apt install g++`, or name yours in CXX")
    for name in config.log or ():
        if not importlib.util.find_spec(name):
            raise RunError(f"--log {name} needs `pip install {name}`")
    if config.graph and (config.device == "cpu" or parallel.RANKS > 1 or config.compile):
        raise RunError("--graph is for one GPU, without --compile: a CPU has no launches to save")
    if config.compile and config.shard:
        raise RunError("--compile and --shard do not go together: choose one")


def idle(settings):
    """Settings that change nothing beside the others, and why: ({names}, reason)"""
    if not settings.focus:
        yield {"merit"}, "it says what --focus weighs by, and the focus is 0"
    if settings.beta == 0:
        yield ({"critic", "eta", "samples", "n_step", "warmup"},
               "without a critic the policy only clones")
    elif settings.warmup == 1:
        yield ({"alpha", "n_step"}, "the warm-up is all of the run: the policy clones, and the "
               "critic learns observed returns")
    if settings.critic == "v":
        yield {"samples"}, "PAC+V improves on the data's actions, and draws none"


def new_run(flags):
    """Flags -> (TrainConfig, LossSettings) of a new run."""
    config = TrainConfig(**flags.run)
    settings = settings_for(config.algo, **flags.loss)
    for names, why in idle(settings):
        for name in sorted(flags.loss.keys() & names):
            raise RunError(f"{flag(name)} {flags.loss[name]} changes nothing: {why}")
    if config.alphas and "alpha" in flags.loss:
        raise RunError(f"--alpha {settings.alpha:g} changes nothing: --alphas has one for each "
                       "data set")
    config.data = config.data or [str(prepare.default_folder(config.size))]
    config.steps = config.steps or steps_of(config.size)
    config.threads = config.threads or (1 if config.size in ONE_THREAD else None)
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.out = config.out or f"runs/{config.algo}-{config.size}-{config.seed}"
    for name in ("recompute", "shard"):
        if getattr(config, name) is None:
            setattr(config, name, config.size in LARGE)
    # config.json makes a folder a run: what a run killed before that has left is no obstacle.
    out = Path(config.out)
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    ours = found - {".lock", "checkpoints", "config.json.partial"}
    if parallel.RANK == 0 and (ours or checkpoints(out)):
        raise RunError(f"{out} is in use: continue it with --resume {quote(config.out)}, or choose "
                       "another --out")
    return config, settings


def old_run(flags):
    """Flags -> (TrainConfig, LossSettings) of the run that is resumed."""
    stored = read_config(flags.resume)
    config = from_config(TrainConfig, stored["train"], flags.resume)
    settings = from_config(LossSettings, stored["settings"], flags.resume)
    if settings.merit not in data.MERITS:
        raise RunError(f"{flags.resume} weighs its data by {settings.merit}, which is no more: "
                       "finish it with the version of this code that began it")
    before = asdict(config) | asdict(settings)
    for name, value in (flags.run | flags.loss).items():
        if name not in MAY_CHANGE and value != before[name]:
            raise RunError(f"{flags.resume} was trained with {flag(name)} {before[name]}, not "
                           f"{value}: resume without the flag, or start a new run")
    config = replace(config, **flags.run)
    if len(config.data) != len(before["data"]):
        raise RunError(f"{flags.resume} was trained on {len(before['data'])} data set(s), not on "
                       f"{len(config.data)}")
    if config.steps < before["steps"]:
        raise RunError(f"{flags.resume} was trained with --steps {before['steps']}: "
                       f"{config.steps} is fewer, and they may only become more")
    if config.steps > before["steps"]:
        warmup = "the warm-up is still all of the run"
        if settings.warmup < 1:
            settings.warmup = round(settings.warmup * before["steps"]) / config.steps
            warmup = "the warm-up stays as long as it was"
        print(f"--steps {before['steps']} becomes {config.steps}: the learning rate, and the share "
              f"of observed returns after the warm-up, follow the schedule of {config.steps} from "
              f"here on; {warmup}")
    return config, settings


def open_data(config):
    """The data sets, verified, as arguments of Sampler; a default one is made first."""
    if parallel.RANK == 0:
        for folder in config.data:
            prepare.build_default(Path(folder), config.tasks)
    over_ranks([0], config.device)  # the others wait for rank 0
    verify = config.verify and parallel.RANK == 0
    return prepare.open_sources(config.data, config.tasks, config.weights, config.alphas, verify)


def tell_of_missing(metas):
    """A line on the tasks whose environments are not to be had here: they get no scores."""
    missing = {}
    for meta in metas:
        try:
            envs.registered(meta["env_id"])
        except Exception as error:  # an import may raise anything
            missing.setdefault(envs.in_a_line(error), []).append(meta["name"])
    for why, names in missing.items():
        data.notice(f"no environment here for {', '.join(names)}, so no scores: {why}")


def model_config(config, metas):
    """The ModelConfig that a run's flags ask for."""
    model = config_for(config.size, metas)
    if not config.embodiments:
        model.tasks = [replace(task, embodiment="") for task in model.tasks]
    return model


def dry_run(config, settings):
    """Print what the run would take. The data need not be there yet."""
    tasks, metas = [], []
    for folder in map(Path, config.data):
        if prepare.lacks_default(folder, config.tasks):
            metas = prepare.default_metas(config.tasks)
        else:
            tasks += prepare.open_tasks(folder, config.tasks)
    names = {task.name for task in tasks}
    metas = [meta for meta in metas if meta["name"] not in names] + prepare.merged_metas(tasks)
    learner = Learner(model_config(config, metas), settings, metas, 0, "meta")
    print(parallel.report(learner, config.batch_size, config.accumulate, config.recompute,
                          config.shard))


# ---------------------------------------------------------------- training

def random_streams(seed, step, device):
    """The numpy and torch generators of one update: functions of seed, step and rank alone.

    So a resumed run draws what the undisturbed one would have drawn, with no state to save.
    """
    rng = np.random.default_rng([seed, step])  # of all ranks: each reads its share of one batch
    seed = int(rng.integers(2**62)) + parallel.RANK
    return rng, torch.Generator(device).manual_seed(seed)


def check_tasks(config, settings, metas):
    """RunError for tasks that nothing tells apart; a line on those without a better action."""
    told = {}
    for meta in metas:
        body = config.embodiments and meta.get("embodiment") or meta["name"]
        for words in (meta["instruction"], *meta.get("paraphrases", ())):
            other = told.setdefault((body, tuple(tokenize(words))), meta["name"])
            if other != meta["name"]:
                raise RunError(f"{other} and {meta['name']} are of one embodiment, {body}, and "
                               f"both are told {words!r}: words alone tell them apart. Give each "
                               "its --instruction when it is imported")
        low, high = meta["return_to_go"]
        alike = high - low <= 1e-4 * max(abs(low), abs(high))
        if alike and (settings.beta or settings.focus) and parallel.RANK == 0:
            data.notice(f"{meta['name']}: all returns are {low:g}, so nothing tells its good "
                        "actions from bad ones")


def tell_of_few_rows(config, settings, tasks):
    """A line on more tasks than a batch can tell of."""
    rows = config.batch_size // config.accumulate // tasks
    if settings.critic == "v" and settings.warmup < 1 and rows < FEW:
        least = FEW * config.accumulate * tasks
        data.notice("PAC+V compares an advantage with those of its task's other rows, and here a "
                    f"task has {rows} at a time, too few: give --batch-size {least} or more")


def by_graph(config, metas):
    """Whether updates are CUDA graphs: by default where that was measured."""
    pictures = any(meta.get("frame") for meta in metas)
    if config.graph and pictures:
        raise RunError("--graph: a graph cannot read pictures, and these tasks have some")
    if config.graph is not None:
        return config.graph
    others = pictures or config.compile or config.recompute or config.deterministic
    return config.device == "cuda" and parallel.RANKS == 1 and not others


def tell_of_constants(batch, model, metas):
    """A line on the observations of each task that vary, and by too little to be seen."""
    std = model.obs_std[model.body_of(torch.arange(len(metas), device=model.obs_std.device))].cpu()
    for number, meta in enumerate(metas):
        obs = batch.obs[batch.task == number, 0]
        if len(obs):
            varies = obs.amax(0) > obs.amin(0)
            faint = (varies & (std[number] == 1)).nonzero().flatten().tolist()  # see start_at
            if faint:
                data.notice(f"{meta['name']}: observations {faint} vary by less than {CONSTANT:g} "
                            "and count as constants: give them in other units, if they matter")


def start(config, settings, metas, sources):
    """A learner that begins at the data, on all ranks."""
    learner = Learner(model_config(config, metas), settings, metas, config.steps, config.device,
                      config.seed, config.accumulate)
    learner.model.recompute = config.recompute
    if config.compile:
        learner.compile()
    rng, _ = random_streams(config.seed, config.steps, "cpu")  # a stream that no update has
    if config.weights:  # what is seldom drawn has a scale too
        sources = {**sources, "weights": None}
    batch = data.Sampler(**sources, batch_size=20_000).sample(rng)
    learner.start_at(batch)
    if parallel.RANK == 0:
        tell_of_constants(batch, learner.model, metas)
    if parallel.RANKS > 1:
        parallel.join(learner, config.shard)
    return learner


def make_batches(config, settings, sources, learner):
    """A sampler, and a generator of the batches that are still to come."""
    device = f"cuda:{parallel.LOCAL_RANK}" if config.device == "cuda" else config.device
    sampler = data.Sampler(**sources, batch_size=config.batch_size * learner.pool,
                           steps=settings.n_step, top=settings.top, focus=settings.focus,
                           merit=settings.merit, device=device)
    to_come = range(learner.updates, config.steps)
    rngs = (random_streams(config.seed, step, "cpu")[0] for step in to_come)
    batches = sampler.batches(rngs, parallel.RANK, parallel.RANKS)
    return sampler, data.prefetch(batches, 2) if config.prefetch else batches


def begin(config, settings, sources, metas, learner, run, resume, at):
    """Restore the run's checkpoint, if it goes on, and write its config.json."""
    checksums = [task.meta["checksum"] for task in sources["tasks"]]
    if resume:
        before = read_config(run)
        if before["tasks"] != metas or before.get("checksums", checksums) != checksums:
            raise RunError(f"{config.data} is not the data that {run} was trained on "
                           "(its config.json lists that)")
        if checkpoints(run) or at is not None:  # otherwise it was stopped before its first
            restore(find_checkpoint(run, at), learner)
    elif parallel.RANK == 0 and (run / "config.json").exists():
        raise RunError(f"{run} is in use: another process has made it meanwhile")
    if parallel.RANK > 0:
        return
    if at is not None:
        set_aside(run, at)
    stored = {"format": FORMAT, "algo": config.algo, "train": asdict(config),
              "settings": asdict(settings), "model": learner.model.config.to_dict(),
              "tasks": metas, "checksums": checksums}
    data.write_file(run / "config.json", json.dumps(stored, indent=2) + "\n")


def warnings_of(metrics):
    """What looks unsound in a line of the log, and what to do about it."""
    if metrics["policy/entropy"] < LOW_ENTROPY:
        yield (f"the policy's entropy has collapsed (below {LOW_ENTROPY} nats a dimension): "
               "raise --eta or --alpha")
    if metrics.get("critic/value", 0) - metrics.get("critic/observed", 0) > HIGH_VALUE:
        yield (f"the critic overestimates (mean Q exceeds the observed returns by {HIGH_VALUE} of "
               "the range of values): raise --alpha, or lower --n-step")


def show(line, bar, warned):
    """The loss beside the progress bar, and what looks unsound; warned: what was said before"""
    numbers = {name: f"{line[name]:.3g}" for name in ("loss", "grad_norm")}
    bar.set_postfix(numbers, refresh=False)
    for text in set(warnings_of(line)) - warned:
        bar.write(f"update {bar.n}: warning: {text}")
        warned.add(text)


def averaged(metrics, device):
    """0-d tensors -> numbers, averaged over the ranks."""
    totals = over_ranks([value.item() for value in metrics.values()], device)
    return {name: total / parallel.RANKS for name, total in zip(metrics, totals)}


def evaluate_on_the_way(target, metas, config, settings, batch, bar):
    """A small evaluation of the averaged model -> its line of the log"""
    summary = evaluate(target, metas, config.eval_episodes, config.seed, settings.act, settings.eta)
    line, short = {"eval/failed": len(summary["failed"])}, f"IQM {shown(summary['iqm'])} "
    if summary["iqm"] is not None:
        line["eval/iqm"] = summary["iqm"]
    for name, row in summary["tasks"].items():
        what = "return" if row["score"] is None else "score"
        line[f"eval/{name}/{what}"] = row[what]
        short += f"  {name.split('-')[0]} {row[what]:.2f}"
        if "success" in row:
            line[f"eval/{name}/success"] = row["success"]
    bar.write(f"update {bar.n}: {short}")
    for text in failures(summary):
        bar.write(f"  {text}")
    if target.pixels is None:
        entropy = target.attention_entropy(batch.obs[:, 0], batch.task)
        line["model/attention_entropy"] = entropy.item()
    return line


def due(every, step):
    return every > 0 and step % every == 0


def train(config, settings, sources, run, resume=None, at=None):
    parallel.set_up(config.threads, config.deterministic)
    metas = prepare.merged_metas(sources["tasks"])
    check_tasks(config, settings, metas)
    if parallel.RANK == 0:
        tell_of_few_rows(config, settings, len(metas))
    if parallel.RANK == 0 and (config.episodes or config.eval_every):
        tell_of_missing(metas)
    graph = by_graph(config, metas)
    learner = start(config, settings, metas, sources)
    begin(config, settings, sources, metas, learner, run, resume, at)
    transitions = sum(meta["transitions"] for meta in metas)
    print(f"{run}: {config.algo}, {config.size}, {count_parameters(learner.model):,} parameters, "
          f"{len(metas)} tasks, {transitions:,} transitions, {config.device}")
    sampler, batches = make_batches(config, settings, sources, learner)
    updates = Graphs(learner) if graph else learner
    stop, stopped, warned = parallel.Stop(), 0, set()
    log = Log(run, learner.updates, config.log)
    bar = data.progress(total=config.steps, initial=learner.updates, desc="train", unit="update",
                        disable=parallel.RANK > 0)
    with log.file, bar:
        while learner.updates < config.steps and not stopped:
            candidates = next(batches).to(learner.device)
            _, generator = random_streams(config.seed, learner.updates, config.device)
            step, line = learner.updates + 1, {}
            last = step == config.steps
            logs = due(config.log_every, step) or last
            # Without them it would be another graph, and another program to compile.
            learner.with_metrics = logs or graph or config.compile
            try:
                metrics = updates.update_from(candidates, generator)
                stopped = stop.agreed(learner.device)
                saves = due(config.save_every, step) or last or stopped
                if logs or saves:
                    learner.check(metrics)
            except NonFinite as error:
                raise not_finite(run, config.seed, sampler, error) from None
            bar.update()
            if logs:
                line = averaged(metrics, learner.device)
                if parallel.RANK == 0:
                    show(line, bar, warned)
            if saves or due(config.eval_every, step):
                learner.measure_spread(candidates)
            if due(config.eval_every, step) and not last:
                target = parallel.gathered(learner.target_model)
                if parallel.RANK == 0:
                    line |= evaluate_on_the_way(target, metas, config, settings, candidates, bar)
            if line:
                log.write(step, line)
            if saves:
                log.sync()  # the log first: a checkpoint's lines are there when it is
                save(run, learner, config.keep)
    batches.close()
    if stopped:
        print(f"stopped at update {learner.updates:,}; go on with: "
              f"python train.py --resume {quote(str(run))}")
        sys.exit(128 + stopped)
    stop.default()  # all is saved: from here on a signal ends at once
    target = parallel.gathered(learner.target_model)
    if parallel.RANK == 0:
        finish(run, config, settings, target, metas)


def finish(run, config, settings, target, metas):
    """The evaluation at the end, and the curve."""
    failed = []
    if config.episodes:
        about = {"run": str(run), "act": settings.act, "eta": settings.eta,
                 "seed": config.seed + 1, "episodes": config.episodes,
                 "checkpoint": find_checkpoint(run).name}
        summary = evaluate(target, metas, config.episodes, about["seed"], settings.act,
                           settings.eta)
        print(f"{config.episodes} episodes a task, acting by {settings.act}:\n{table(summary)}")
        summary = about | summary
        write_summary(kept_path(run / file_of(), summary), summary)
        failed = summary["failed"]
    curve(run)
    print(f"the run is in {run}; look closer with: python eval.py {quote(str(run))} "
          "--episodes 20")
    if failed:
        sys.exit(EPISODES_FAILED)


def not_finite(run, seed, sampler, error):
    """Write run/nonfinite.json, what one needs to make a failed update again -> a RunError"""
    rng, _ = random_streams(seed, error.update, "cpu")
    episode, begin, _ = sampler.draw([rng])
    rows = {}
    for number, source in enumerate(sampler.sources):
        rows[str(source.data.folder)] = begin[sampler.source[episode] == number].tolist()
    found = {"update": error.update, "seed": seed, "message": str(error), "metrics": error.metrics,
             "rows": rows}
    path = run / "nonfinite.json"
    if parallel.RANK == 0:
        data.write_file(path, json.dumps(found, indent=2) + "\n")
    return RunError(f"{error} The rows that the update was made from, and its metrics, are in "
                    f"{path}; the newest checkpoint is from before it")


def main(argv=None, flags=None):
    flags = flags or parse_args(argv)
    try:
        config, settings = old_run(flags) if flags.resume else new_run(flags)
        check(config, settings)
        if flags.dry_run:
            dry_run(config, settings)
            return
        with parallel.ranks(config.device):
            sources, run = open_data(config), Path(flags.resume or config.out)
            with data.only_writer(run) if parallel.RANK == 0 else nullcontext():
                train(config, settings, sources, run, flags.resume, flags.at)
    except (RunError, parallel.RankLost, data.DataError, ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    parallel.outlive_readers()
    faulthandler.enable()  # a data file cut short during a read ends the process: this tells where
    main(flags=FLAGS)
