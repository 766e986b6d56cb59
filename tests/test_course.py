"""The course: its graders both ways, the commands as a student gives them, and its texts.

A grader passes on the repository's own code, and on each of RIGHT: the same in another style. It
fails on the blanked body and on each of WRONG: the answers that students give. Both are made by a
change of the repository's own text.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from course import EXERCISES, Exercise, blank, grade, notebook
from course.checks import CHECKS
from course.grade import fault_of, function_of
from kernels import triton_support
from tests.test_eval import STOP_AFTER_PARSING, commands_of

ROOT = Path(__file__).parent.parent

# By exercise: a wrong answer as (text, what a student writes there, part of the grader's answer).
WRONG = {
    "return_to_go": [
        ("if not terminated:", "if False:", "a time limit, which is not an end"),
        ("if not terminated:", "if True:", "the episode is over for good"),
        ("reward[-horizon:]", "reward", "which steps stand for the unseen future"),
        (" / (1 - discount)\n    returns", "\n    returns", "a time limit"),
        ("reversed(range(len(reward)))", "range(len(reward))", "returns of three steps"),
        ("discount * future", "future", "returns of three steps"),
        ("np.empty(len(reward))", "reward", "changes what it is given"),
        ("round(1 / (1 - discount))", "int(1 / (1 - discount))", "a hundred steps before"),
    ],
    "n_step_return": [
        (" * (~batch.terminated.any(1)).float()", "", "ends for good"),
        ("~batch.terminated.any(1)", "~(batch.terminated | batch.truncated).any(1)",
         "the future still counts"),
        ("~batch.terminated.any(1)", "~batch.terminated[:, :-1].any(1)",
         "at the last step of the window"),
        ("batch.valid.sum(1)", "batch.reward.shape[1]", "the future still counts"),
        ("batch.valid.sum(1)", "(batch.valid.sum(1) - 1)", "what follows three steps"),
        ("(powers * batch.reward)", "batch.reward", "the rewards of three steps"),
        ("discount[:, None] ** steps", "discount[0] ** steps[None]", "two tasks"),
    ],
    "project": [
        ("probs * (moved - lower)", "probs * (moved - lower).round()", "between two atoms"),
        ("probs * (moved - lower)", "probs * (1 - moved + lower)", "not moved at all"),
        (".clamp(0, 1) *", " *", "past the first or the last atom"),
        (".scatter_add(-1, lower,", ".scatter(-1, lower,", "not moved at all"),
        ("scale[:, None] * atoms", "atoms", "a scale of 1/2"),
        ("shift[:, None] + scale[:, None] * atoms", "scale[:, None] * (shift[:, None] + atoms)",
         "a scale of 1/2"),
    ],
    "bellman": [
        ("return -(", "return (", "a sign"),
        ("returns, mc_share)\n", "returns, 1 - mc_share)\n", "next state's value alone"),
        ("torch.log_softmax(", "torch.softmax(", "a value"),
        (".sum(-1)", ".mean(-1)", "a value"),
        ("with torch.no_grad():", "if True:", "must not learn itself"),
        ("returns, mc_share)\n", "(returns.clamp(0, 1) * 4).round() / 4, mc_share)\n",
         "the observed return alone"),
        ("(next_probs, shift, scale, returns", "(next_probs, (shift * 4).round() / 4, scale, returns",
         "next state's value alone"),
    ],
    "log_prob": [
        (" * self.mask[:, None, :, None]", "", "a mask"),
        ("self.mask[:, None, :, None]", "self.mask[:1, None, :, None]", "two states"),
        ("self.log_bins.gather", "self.log_bins.detach().gather", "a gradient"),
        ("self.log_components[..., None] + ", "", "unlike weight"),
        ("of_dims.sum(2)", "of_dims.mean(2)", "with one component"),
        ("torch.logsumexp(", "torch.sum(", "unlike weight"),
        ("torch.logsumexp(self.log_components[..., None] + of_dims.sum(2), dim=1)",
         "torch.logsumexp(self.log_components[..., None, None] + of_dims, dim=1).sum(1)",
         "unlike weight"),
        ("to_bins(action, K)", "((action + 1) / 2 * (K - 1)).round().long()", "four bins"),
        ("torch.logsumexp(self.log_components[..., None] + of_dims.sum(2), dim=1)",
         "(self.log_components[..., None] + of_dims.sum(2)).exp().sum(1).log()", "not finite"),
    ],
    "sample": [
        ("bin_centre(index, cdf_of_bins.shape[-1])",
         "2 * index / cdf_of_bins.shape[-1] - 1", "beside the centre"),
        ("noise[..., 1:])", "noise[..., :1].expand_as(noise[..., 1:]))", "independently"),
        ("noise[..., 1:])", "noise[..., 1:2].expand_as(noise[..., 1:]))", "independently"),
        ("cdf_of_bins[rows, component]", "cdf_of_bins[rows, 0 * component]", "heavier component"),
        ("cdf_of_bins[rows, component]",
         "(self.log_components.exp()[..., None, None] * cdf_of_bins).sum(1)[:, None]"
         ".expand(-1, noise.shape[1], -1, -1)", "no component would ever make"),
        ("self.log_bins.exp().cumsum(-1)", "self.log_bins.exp()", "how often each bin"),
        ("return bin_centre", "bin_centre", "a type"),
        ("noise[..., 1:])", "torch.rand_like(noise[..., 1:]))", "the same noise"),
        ("noise[..., 0])  # (B, N)", "torch.rand_like(noise[..., 0]))", "two components: the same"),
        ("noise[..., 1:])", "noise[..., :-1])", "chose the component"),
        ("cdf_of_bins[rows, component]", "cdf_of_bins[0 * rows, component]", "two states"),
        ("self.log_components.exp()", "self.log_components[:1].expand(len(noise), -1).exp()",
         "components of its own weight"),
        ("draw(cdf_of_bins[rows, component], noise[..., 1:])",
         "(cdf_of_bins[rows, component] <= noise[..., 1:, None]).sum(-1).clamp(max="
         "cdf_of_bins.shape[-1] - 1)", "not normalised"),
    ],
    "entropy": [
        ("(entropy * self.mask).sum() / self.mask.sum()", "entropy.mean()", "a mask"),
        ("-torch.xlogy", "torch.xlogy", "a sign"),
        ("log_probs.detach().exp().sum(1)", "self.log_bins.exp().mean(1)", "unlike weight"),
        ("(entropy * self.mask).sum() / self.mask.sum()", "(entropy * self.mask).sum()",
         "two dimensions"),
        ("log_probs.detach().exp().sum(1)", "log_probs.detach().exp()", "unlike weight"),
        ("self.mask.sum()", "self.mask[0].sum()", "two states"),
        ("(entropy * self.mask).sum() / self.mask.sum()",
         "((entropy * self.mask).sum(1) / self.mask.sum(1)).mean()", "of two dimensions and"),
    ],
    "cloning_loss": [
        ("return -", "return ", "a sign"),
        ("[:, 0]", "[:, 0].exp()", "a value"),
        ("[:, 0]", "[:, 0].mean()", "a shape"),
        ("[:, 0]", "[:, 0].detach()", "a gradient"),
        ("[:, 0]", "", "a shape"),
    ],
    "data_weights": [
        (".clamp(-2, 2)", "", "rules the weights"),
        (".clamp(-2, 2)", ".clamp(max=2)", "far below"),
        (".clamp(-2, 2)", ".clamp(min=-2)", "far above"),
        ("return w / mean_per_task(w, task, num_tasks)", "return w", "one mean deviation"),
        ("merit - mean_per_task(merit, task, num_tasks)", "merit - merit.mean()", "two tasks"),
        ("w / mean_per_task(w, task, num_tasks)", "w / w.sum()", "one mean deviation"),
        (" + 1e-8", "", "one row"),
        ("focus * scaled.clamp(-2, 2)", "(focus * scaled).clamp(-2, 2)", "a focus of 3"),
    ],
    "improvement_weights": [
        (" * spread[:, None]", "", "a tenth"),
        ("q / (", "-q / (", "differ by log 3"),
        ("q / (eta * spread[:, None] + 1e-8)", "q * eta / spread[:, None]", "eta of 0.2"),
        ("dim=-1", "dim=0", "a value"),
        ("torch.softmax(q / (eta * spread[:, None] + 1e-8), dim=-1)",
         "torch.exp(q / (eta * spread[:, None]))", "differ by log 3"),
        ("torch.softmax(q / (eta * spread[:, None] + 1e-8), dim=-1)",
         "(lambda w: w / w.sum(-1, True))(torch.exp(q / (eta * spread[:, None])))", "not finite"),
        (" + 1e-8", "", "a spread of 0"),
    ],
    "improve_on_data": [
        ("return w * clone", "return clone", "weighted by how good it was"),
        (" - target.expectation(now)", "", "weighted by how good it was"),
        ("bootstrap * target.expectation(after)", "target.expectation(after)", "how good it was"),
        ("1 / self.settings.eta", "self.settings.eta", "weighted by how good it was"),
        ("self.target_model, batch.task", "self.model, batch.task", "values n steps on"),
        ("target.v(target.encode(*self.now_and_after(batch))).chunk(2)",
         "(target.v(target.encode(o[:, 0], task)) for o in (batch.obs, batch.next_obs))",
         "values n steps on"),
        ("return w * clone", "return w * clone.detach() + 0 * clone", "a gradient"),
        ('{"policy/ess": ess}', "None", "a type"),
    ],
    "iqm": [
        ("int(0.25 * len(flat))", "round(0.25 * len(flat))", "seven scores"),
        ("int(0.25 * len(flat))", "-int(-0.25 * len(flat) // 1)", "seven scores"),
        ("np.sort(np.ravel(scores))", "np.ravel(scores)", "do not come in order"),
        ("flat[cut:len(flat) - cut].mean()", "np.median(flat)", "seven scores"),
        ("flat[cut:len(flat) - cut].mean()", "flat[cut:].mean()", "outlier"),
        ("flat[cut:len(flat) - cut].mean()", "flat.mean()", "outlier"),
        ("np.sort(np.ravel(scores))", "np.ravel(scores); flat.sort()", "changes what it is given"),
        ("flat[cut:len(flat) - cut]", "flat[cut:-cut]", "two scores"),
    ],
    "interval": [
        ("[2.5, 97.5]", "[5, 95]", "a width"),
        ("default_rng(seed)", "default_rng()", "asked for twice"),
        ("[2.5, 97.5]", "[97.5, 2.5]", "an order"),
        ("len(x))", "len(x), replace=False)", "a width"),
        ("rng.choice(x, len(x))", "rng.choice(x, len(x) // 2)", "a width"),
        ("rng.choice(x, len(x))", "rng.choice(x, len(samples[0]))", "its own length"),
        ("[rng.choice(x, len(x)) for x in samples]",
         "[rng.choice(np.concatenate(samples), len(x)) for x in samples]", "two groups"),
        ("[rng.choice(x, len(x)) for x in samples]",
         "[x[i] for i in [rng.integers(len(samples[0]), size=len(samples[0]))] for x in samples]",
         "each drawn again by itself"),
        ("[float(v) for v in np.percentile(values, [2.5, 97.5])]",
         "np.percentile(values, [2.5, 97.5])", "a type"),
        ("range(resamples)", "range(2000)", "one resample"),
        ("np.percentile(values, [2.5, 97.5])",
         "(np.mean(values) - 1.96 * np.std(values), np.mean(values) + 1.96 * np.std(values))",
         "cannot be below 0"),
    ],
    "attention": [
        (" * q.shape[-1] ** -0.5", "", "seven keys"),
        ("torch.softmax(scores, dim=-1", "torch.softmax(scores, dim=-2", "seven keys"),
        ("~mask[:, None, None, :]", "mask[:, None, None, :]", "a mask"),
        ("weights = weights.masked_fill(padding, 0.0)", "pass", "all of whose keys"),
        ("torch.finfo(scores.dtype).min", "0.0", "padding has a say"),
        ("k.transpose(-2, -1)", "k.detach().transpose(-2, -1)", "a gradient"),
        ("torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))",
         "scores.exp() / scores.exp().sum(-1, keepdim=True)", "scores in the hundreds"),
    ],
    "forward_kernel": [
        ("v, out * shrink[:, None])", "v, out)", "more keys than one tile"),
        ("total * shrink +", "total +", "more keys than one tile"),
        ("scale * LOG2_E", "LOG2_E", "one tile"),
        ("load_tile(k_ptr, start_k, k_l,", "load_tile(k_ptr, start_k, D,", "one tile"),
        ('s = tl.where(attend[None, :], s, float("-inf"))', "pass", "one tile"),
        ("out / total[:, None]", "out", "one tile"),
        ("highest + tl.log2(total)", "tl.log2(total)", "the second output"),
        ("tl.maximum(highest, tl.max(s, 1))", "tl.zeros_like(highest)", "not finite"),
    ],
}
# By exercise: right answers in another style, each as (text, what a student writes there).
RIGHT = {
    "return_to_go": [
        ("return returns", "return np.array(list(returns)[::-1])[::-1]"),
        ("return returns", "return list(returns)"),
    ],
    "n_step_return": [
        ("return reward, bootstrap", "return [reward, bootstrap]"),
        ("discount ** batch.valid.sum(1) * (~batch.terminated.any(1)).float()",
         "torch.stack([d ** sum(v.tolist()) * (not any(end.tolist())) for d, v, end in"
         " zip(discount, batch.valid, batch.terminated)])"),
    ],
    "project": [("lower + 1, to_upper)", "lower + 1, to_upper).double()")],
    "sample": [  # the last number, and not the first, chooses the component
        ("noise[..., 0])  # (B, N)\n", "noise[..., -1])\n        noise = noise.roll(1, -1)\n"),
    ],
    "improve_on_data": [
        ('return w * clone, next_probs, {"policy/ess": ess}', "return [w * clone, next_probs, {}]"),
    ],
    "iqm": [
        ("def iqm(scores)", "def iqm(scores: list) -> float"),
        ("flat[cut:len(flat) - cut].mean()",
         "sum(flat[i] for i in range(cut, len(flat) - cut)) / (len(flat) - 2 * cut)"),
    ],
    "interval": [
        ("resamples=2000, seed=0", "resamples: int = 1000, seed: int = 7"),
        ("[float(v) for v in np.percentile(values, [2.5, 97.5])]",
         "tuple(np.quantile(values, (0.025, 0.975)))"),
    ],
}
INTERPRETED = ["forward_kernel"]  # needs a process in which Triton is interpreted
IN_PROCESS = [name for name in EXERCISES if name not in INTERPRETED]


def text_of(name):
    return (ROOT / EXERCISES[name].file).read_text(encoding="utf-8")


def made(name, source, tmp_path):
    """The exercise's function from another source, with its module's names around it."""
    module = sys.modules[EXERCISES[name].module]
    path = tmp_path / f"{name}.py"  # Triton reads a kernel's text from its file
    path.write_text(textwrap.dedent(source))
    namespace = dict(vars(module))
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace[EXERCISES[name].function.split(".")[-1]]


def judge(name, tmp_path):
    """The grader of one exercise, both ways."""
    check, source = CHECKS[name], blank.source_of(text_of(name), EXERCISES[name].function)
    assert fault_of(check, function_of(EXERCISES[name])) is None
    assert fault_of(check, made(name, source, tmp_path)) is None
    emptied = blank.source_of(blank.blanked(text_of(name), EXERCISES[name].function),
                              EXERCISES[name].function)
    assert fault_of(check, made(name, emptied, tmp_path)) == "its body is still to be written"
    for before, after, said in WRONG[name]:
        assert before in source, f"{name}: WRONG names {before!r}, which is not in it any more"
        fault = fault_of(check, made(name, source.replace(before, after), tmp_path))
        assert fault is not None, f"{name}: {after!r} passes for {before!r}"
        assert said in fault, f"{name}: {after!r} for {before!r}: {fault}"
    for before, after in RIGHT.get(name, ()):
        assert before in source, f"{name}: RIGHT names {before!r}, which is not in it any more"
        fault = fault_of(check, made(name, source.replace(before, after), tmp_path))
        assert fault is None, f"{name}: {after!r} for {before!r}: {fault}"


# ---------------------------------------------------------------- graders, both ways

def test_every_exercise_has_a_check_and_three_wrong_answers_at_least():
    assert list(EXERCISES) == list(CHECKS) == list(WRONG)
    assert min(map(len, WRONG.values())) >= 3


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_grader_tells_right_from_wrong(name, tmp_path):
    judge(name, tmp_path)


class TestInterpreted:
    __test__ = triton_support.INTERPRETED

    @pytest.mark.parametrize("name", INTERPRETED)
    def test_a_grader_tells_right_from_wrong(self, name, tmp_path):
        judge(name, tmp_path)


@pytest.mark.skipif(triton_support.triton is None, reason="triton is not installed (Linux only)")
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               f"{__file__}::TestInterpreted"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert f"{len(INTERPRETED)} passed" in ran.stdout


# ---------------------------------------------------------------- the commands

def git(folder, *words):
    identity = ["-c", "user.name=student", "-c", "user.email=student@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path):
    """A repository of its own, with the one file that these exercises are in."""
    (tmp_path / "course").mkdir()
    (tmp_path / "eval.py").write_text(text_of("iqm"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "eval.py")
    git(tmp_path, "commit", "-q", "-m", "the repository")
    return tmp_path


def run_blank(clone, *words):
    """-> the text of eval.py after `python -m course.blank WORDS`"""
    blank.main(list(words), clone)
    return (clone / "eval.py").read_text()


def refused(clone, capsys, *words):
    """What a refusal says; nothing may have changed."""
    before = (clone / "eval.py").read_text()
    with pytest.raises(SystemExit) as end:
        blank.main(list(words), clone)
    assert end.value.code == 2 and (clone / "eval.py").read_text() == before
    return capsys.readouterr().err


def test_a_body_is_taken_out_and_comes_back_and_the_answer_is_kept(clone):
    whole = text_of("iqm")
    text = run_blank(clone, "iqm")
    assert "cut = int(" not in text and "interquartile mean" in text  # the docstring stays
    assert text.count("yours to write") == 1
    both = run_blank(clone, "interval")
    assert both.count("yours to write") == 2
    answer = both.replace('raise NotImplementedError("yours to write")', "return 0.0", 1)
    (clone / "eval.py").write_text(answer.replace("EPISODES = 20", "EPISODES = 3"))
    text = run_blank(clone, "iqm", "--restore")
    assert text == blank.blanked(whole, "interval").replace("EPISODES = 20", "EPISODES = 3")
    assert "return 0.0" in (clone / "course/answers/iqm.py").read_text()
    assert run_blank(clone, "interval", "--restore") == whole.replace("EPISODES = 20",
                                                                      "EPISODES = 3")


def write_answer(clone, body):
    text = (clone / "eval.py").read_text()
    text = text.replace('raise NotImplementedError("yours to write")', body)
    (clone / "eval.py").write_text(text)


def test_no_answer_is_lost_by_another_or_by_none(clone, capsys):
    answer, older = (clone / "course/answers" / name for name in ("iqm.py", "iqm-1.py"))
    for body in ("return 1.0", None, "return 1.0", "return 2.0"):
        run_blank(clone, "iqm")
        if body:
            write_answer(clone, body)
        assert run_blank(clone, "iqm", "--restore") == text_of("iqm")
        assert (body or "return 1.0") in answer.read_text()
    said = [line.split("; ")[1] for line in capsys.readouterr().out.splitlines()[1::2]]
    assert said == [f"your answer is in {answer}", "no new answer to keep",
                    f"your answer is in {answer} already",
                    f"your answer is in {answer}, the one before it in iqm-1.py"]
    assert "return 1.0" in older.read_text()


def test_a_body_that_git_brought_back_is_no_answer(clone):
    for _ in range(2):
        run_blank(clone, "iqm")
        git(clone, "checkout", "eval.py")
    assert "yours to write" in run_blank(clone, "iqm")
    git(clone, "checkout", "eval.py")
    assert run_blank(clone, "iqm", "--restore") == text_of("iqm")
    assert list((clone / "course/answers").iterdir()) == []


@pytest.mark.parametrize("above", ['PAGE = "\f\u2028"  # no ends of lines',
                                   'def iqm(scores):\n    return "a draft"'])
def test_the_answer_is_what_python_runs(clone, above):
    """Lines are counted as Python does, and the last of two functions counts."""
    run_blank(clone, "iqm")
    write_answer(clone, "return 1.0")
    text = (clone / "eval.py").read_text().replace("def iqm(", f"{above}\n\n\ndef iqm(")
    (clone / "eval.py").write_text(text)
    text = run_blank(clone, "iqm", "--restore")
    assert text == text_of("iqm").replace("def iqm(", f"{above}\n\n\ndef iqm(")
    assert "return 1.0" in (clone / "course/answers/iqm.py").read_text()


def test_an_editor_may_mark_the_file(clone):
    run_blank(clone, "iqm")
    text = (clone / "eval.py").read_text()
    (clone / "eval.py").write_text(text, encoding="utf-8-sig")
    assert run_blank(clone, "iqm", "--restore") == text_of("iqm")


def test_a_file_that_is_no_text_is_refused(clone, capsys):
    run_blank(clone, "iqm")
    (clone / "eval.py").write_bytes(b"# caf\xe9\n" + text_of("iqm").encode())
    with pytest.raises(SystemExit) as end:
        blank.main(["iqm", "--restore"], clone)
    assert end.value.code == 2 and "mend this first" in capsys.readouterr().err


def test_what_would_be_lost_or_cannot_be_done_is_refused(clone, capsys):
    assert "iqm is not taken out" in refused(clone, capsys, "iqm", "--restore")
    whole = text_of("iqm")
    (clone / "eval.py").write_text(whole.replace("0.25 * len(flat)", "0.2 * len(flat)"))
    assert "iqm in eval.py has changes that are not committed" in refused(clone, capsys, "iqm")
    (clone / "eval.py").write_text(whole + "\n)\n")
    assert "mend this first" in refused(clone, capsys, "iqm")
    (clone / "eval.py").write_text(whole.replace("def iqm(", "def iqn("))
    assert "eval.py has no iqm any more" in refused(clone, capsys, "iqm")
    (clone / "eval.py").write_text(whole)
    run_blank(clone, "iqm")
    assert "is taken out already" in refused(clone, capsys, "iqm")


def test_outside_a_clone_nothing_is_taken_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "eval.py").write_text(text_of("iqm"))
    assert "clone the repository" in refused(tmp_path, capsys, "iqm")


@pytest.mark.parametrize("name", EXERCISES)
def test_only_the_body_goes(name):
    text, function = text_of(name), EXERCISES[name].function
    without = blank.blanked(text, function)
    assert blank.replaced(without, function, blank.source_of(text, function)) == text
    before, after = (blank.source_of(t, function).splitlines() for t in (text, without))
    assert after[:-1] == before[:len(after) - 1]
    assert after[-1].strip() == 'raise NotImplementedError("yours to write")'


def test_as_a_student_does_it(tmp_path):
    """In a copy of the repository: take out, write, grade, bring back."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.npz"], cwd=ROOT, capture_output=True,
                            text=True, check=True)
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "the repository")

    def course(*words):
        ran = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True,
                             text=True)
        return ran.returncode, ran.stdout + ran.stderr

    for name in ("cloning_loss", "entropy"):
        assert course("course.blank", name)[0] == 0
    file = tmp_path / "learner.py"
    file.write_text(file.read_text().replace('raise NotImplementedError("yours to write")',
                                             "return policy.probability(action)"))
    code, said = course("course.grade", "cloning_loss", "entropy", "log_prob")
    first, second, third = said.splitlines()
    assert code == 1
    assert "cloning_loss: not yet: it raises AttributeError" in first
    assert "(learner.py, line" in first
    assert second == "entropy: not yet: its body is still to be written"
    assert third == "log_prob: right"
    for name in ("cloning_loss", "entropy"):
        assert course("course.blank", name, "--restore")[0] == 0
    assert file.read_text() == text_of("cloning_loss")


@pytest.mark.parametrize("error, code, said", [
    (None, 0, "iqm: right"),
    (SyntaxError("invalid syntax (eval.py, line 3)"), 1, "cannot be imported: invalid syntax"),
])
def test_what_grade_answers(error, code, said, monkeypatch, capsys):
    def broken(_):
        raise error

    if error:
        monkeypatch.setattr(grade, "function_of", broken)
    with pytest.raises(SystemExit) as end:
        grade.main(["iqm"])
    assert end.value.code == code and said in capsys.readouterr().out


@pytest.mark.parametrize("text, said", [
    ("x = 1\niqm = y", "imported: NameError: name 'y' is not defined (answered.py, line 2)"),
    ("import sys\nsys.exit('bye')", "imported: SystemExit: bye (answered.py, line 2)"),
    ("raise ValueError('one\\ntwo')", "imported: ValueError: one two (answered.py, line 1)"),
    ("def iqn(): 1", "imported: AttributeError: module 'answered' has no attribute 'iqm' "
                     "(answered.py)"),
    ("def iqm(scores):\n    exit(0)", "raises SystemExit: 0 (answered.py, line 2)"),
    ("def iqm(scores):\n    while True: scores",
     "raises TimeoutError: it has not ended after 1 seconds (answered.py, line 2)"),
    ("while True: 1", "TimeoutError: it has not ended after 1 seconds (answered.py, line 1)"),
])
def test_a_broken_file_is_answered_in_one_line(text, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "answered.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    monkeypatch.setattr(grade, "SECONDS", 1)
    monkeypatch.setitem(EXERCISES, "iqm", Exercise("answered", "iqm"))
    with pytest.raises(SystemExit) as end:
        grade.main(["iqm"])
    sys.modules.pop("answered", None)
    assert end.value.code == 1 and signal.alarm(0) == 0  # none is to come any more
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("iqm: not yet: ") and line.endswith(said)


def test_a_second_import_tells_the_first_ones_error(monkeypatch, capsys):
    errors = iter([NameError("the cause"), RuntimeError("registered twice")])

    def broken(_):
        raise next(errors)

    monkeypatch.setattr(grade, "function_of", broken)
    with pytest.raises(SystemExit):
        grade.main(["iqm", "interval"])
    assert capsys.readouterr().out.count("NameError: the cause") == 2


def test_a_blank_that_an_answer_calls_is_named(tmp_path):
    function = made("iqm", blank.source_of(text_of("iqm"), "iqm"), tmp_path)
    emptied = blank.source_of(blank.blanked(text_of("interval"), "interval"), "interval")
    interval = made("interval", emptied, tmp_path)
    fault = fault_of(lambda iqm: interval([iqm([1, 2])], max), function)
    assert fault == "it needs interval, whose body is still to be written"


def test_typing_errors_are_answered(capsys):
    for main in (blank.main, grade.main):
        with pytest.raises(SystemExit) as end:
            main(["iqn"])
        assert end.value.code == 2 and "invalid choice: 'iqn'" in capsys.readouterr().err


# ---------------------------------------------------------------- the texts

def test_every_command_of_the_course_parses():
    """As in test_eval: the flags and choices exist."""
    commands = list(commands_of((ROOT / "course" / "README.md").read_text()))
    assert len(commands) >= 20
    script = f"COMMANDS = {commands!r}\n{STOP_AFTER_PARSING}"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_course_names_every_exercise_and_what_it_links_to_is_there():
    text = (ROOT / "course" / "README.md").read_text()
    for name in EXERCISES:
        assert f"`{name}`" in text, name
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / "course" / link).exists()] == []


def test_the_notebook_is_made_of_its_script():
    cells = notebook.cells_of(notebook.SCRIPT.read_text())
    stored = json.loads(notebook.NOTEBOOK.read_text())["cells"]
    assert len(cells) > 20
    for cell, there in zip(cells, stored, strict=True):
        source = "".join(there["source"])
        assert (there["cell_type"], source) == (cell["cell_type"], cell["source"])
        assert not [output for output in there.get("outputs", ()) if "ename" in output]


def test_a_script_becomes_cells():
    script = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1\n\n\n# %%\nx\n"
    text, first, second = notebook.cells_of(script)
    assert (text["cell_type"], text["source"]) == ("markdown", "# Title\n\nText.")
    assert (first["cell_type"], first["source"]) == ("code", "x = 1")
    assert second["source"] == "x"


@pytest.mark.slow
def test_the_notebook_runs():
    pytest.importorskip("nbclient")
    cells = notebook.cells_of(notebook.SCRIPT.read_text())
    played = notebook.executed(notebook.notebook_of(cells), ROOT / "course")
    pictures = [output for cell in played.cells for output in cell.get("outputs", ())
                if "image/png" in output.get("data", ())]
    assert len(pictures) == 6
