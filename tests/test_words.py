"""Tasks of one embodiment, which words alone tell apart; wordings; and what is told otherwise."""

import numpy as np
import pytest
import torch

import data
from behaviors import suite
from checkpoint import load_run
from eval import file_of
from learner import Learner, settings_for
from model import Perceiver, tokenize
from studies import words
from studies.suite import metas_of, random_batch
from tests.conftest import meta, numbered, task_meta, tiny
from tests.test_model import outputs, seeded
from tests.test_train import run, tensors

TWO = [{**meta("push", 3, 2), "instruction": "push it", "embodiment": "arm"},
       {**meta("pull", 3, 2), "instruction": "pull it", "embodiment": "arm",
        "paraphrases": ["draw it here", "pull"]},
       meta("walk", 5, 1)]


def made(metas=TWO):
    torch.manual_seed(0)
    model = Perceiver(tiny(metas))
    with torch.no_grad():  # heads begin at values that hardly differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def asked(model, task):
    obs, action = seeded(2, 5), seeded(2, 3, 2)
    return torch.cat([x.flatten() for x in outputs(model, obs, action, torch.tensor([task] * 2))])


def test_words_alone_tell_tasks_of_one_embodiment_apart():
    model = made()
    assert len(model.obs_mean) == len(model.obs_encoder.bias) == len(model.policy_query) == 2
    assert not torch.allclose(asked(model, 0), asked(model, 1))
    model.set_instruction(0, "pull it")
    torch.testing.assert_close(asked(model, 0), asked(model, 1))


def test_tasks_without_an_embodiment_share_nothing():
    alone = [{key: value for key, value in one.items() if key != "embodiment"} for one in TWO]
    model = made(alone)
    assert len(model.obs_mean) == len(model.obs_encoder.bias) == len(model.policy_query) == 3
    model.set_instruction(0, "pull it")
    assert not torch.allclose(asked(model, 0), asked(model, 1))


@pytest.mark.parametrize("asked, maps", [(True, 2), (False, 3)])
def test_a_run_shares_maps_or_not_as_asked(tmp_path, asked, maps):
    for about in TWO:
        source = task_meta(about["obs_dim"], about["action_dim"])
        told = {name: about[name] for name in ("instruction", "embodiment", "paraphrases")
                if name in about}
        episodes = [numbered(number, 9, about["obs_dim"], about["action_dim"]) for number in (0, 1)]
        data.append(tmp_path / "set" / about["name"], episodes, {**source, **told})
    flag = "--embodiments" if asked else "--no-embodiments"
    run(tmp_path / "set", tmp_path / "run", flag, steps=2)
    assert tensors(tmp_path / "run")["target.obs_encoder.bias"].shape[0] == maps
    assert len(load_run(tmp_path / "run")[0].obs_mean) == maps


def test_an_embodiment_has_one_width():
    with pytest.raises(ValueError, match="push.*another task of its embodiment 'arm'"):
        Perceiver(tiny([{**TWO[0], "obs_dim": 4}, TWO[0]]))


def test_wordings_take_turns():
    model = made()
    ids = [tokenize(text) for text in ("pull it", "draw it here", "pull", "pull it")]
    for number, expected in enumerate(ids):
        model.use_wording(number)
        there = model.input_mask[1, model.config.obs_tokens:]
        assert model.words[1, there].tolist() == expected
        assert model.words[0, :2].tolist() == tokenize("push it")  # it has one alone


def test_a_text_that_was_told_stays_whatever_the_turn():
    model = made()
    model.set_instruction(1, "draw it here")
    for number in range(3):
        model.use_wording(number)
        assert model.words[1].tolist() == tokenize("draw it here")
    for text in ("", "more words than it was built for"):
        with pytest.raises(ValueError, match="this model reads 1 to 3"):
            model.set_instruction(1, text)


def test_a_learner_takes_turns_and_the_scale_is_of_the_embodiment():
    learner = Learner(tiny(TWO), settings_for("pac"), TWO, 100, seed=0)
    candidates = random_batch(TWO, 60 * learner.pool)
    learner.start_at(candidates)
    arm = candidates.task < 2
    mean = candidates.obs[arm, 0].mean(0)
    torch.testing.assert_close(learner.model.obs_mean[0], mean)
    heard = []
    for _ in range(4):
        learner.update_from(candidates, torch.Generator().manual_seed(0))
        for model in (learner.model, learner.target_model):
            heard.append(int(model.input_mask[1].sum()) - model.config.obs_tokens)
    assert heard == [2, 2, 3, 3, 1, 1, 2, 2]


def test_what_was_told_is_in_the_evaluations_name():
    assert file_of(instruction="go to it", tasks=["push"]) == "eval-told-go-to-it-of-push.json"
    many = [file_of(tasks=[name] * 40) for name in ("push", "pull", "\u63a8" * 9)]
    assert len(set(many)) == 3 and max(len(name.encode()) for name in many) < 120


def test_each_wording_has_its_own_evaluation():
    """The names differ where a model reads other words, and only there."""
    texts = ["reach the target", "reach, the target", "reach the target.", "reach-the target",
             "reach/the target", "go " * 40 + "!", "go " * 40 + "?"]
    names = [file_of(instruction=text) for text in texts]
    assert names[0] == "eval-told-reach-the-target.json"
    assert names[1].startswith("eval-told-reach-the-target-")
    assert len(set(names)) == len(texts) == len({tuple(tokenize(text)) for text in texts})
    assert max(map(len, names)) < 120 and not any(set(name) & set(" /,?!") for name in names)
    for text in ("Reach  the target ", "reach\tTHE target"):
        assert tokenize(text) == tokenize(texts[0]) and file_of(instruction=text) == names[0]


# ---------------------------------------------------------------- the suite, and its study

def test_held_out_wordings_are_held_out_and_can_be_read():
    tasks = {row["task"] for row in suite.read("wordings.csv")}
    assert tasks == set(suite.chosen(["metaworld:10"]))
    trained = {task: [suite.TABLE[task].instruction, *suite.paraphrases(task)] for task in tasks}
    longest = max(len(text.split()) for texts in trained.values() for text in texts)
    everything = [text for texts in trained.values() for text in texts]
    assert len(set(everything)) == len(everything) == 40
    vocabulary = {word for text in everything for word in text.split()}
    for task in tasks:
        held_out = suite.paraphrases(task, held_out=True)
        assert len(held_out) == 2 and not set(held_out) & set(everything)
        for text in held_out:
            assert len(text.split()) <= longest
            assert set(text.split()) <= vocabulary, text  # words are hashed: others mean nothing


def test_embodiments_of_the_suite_have_one_width_each():
    widths = {}
    for row in suite.TABLE.values():
        name = suite.embodiment(row.task) or row.task
        widths.setdefault(name, set()).add((row.obs_dim, row.action_dim))
    assert all(len(found) == 1 for found in widths.values()) and len(widths) == 51
    assert len(Perceiver(tiny(metas_of(suite.chosen(["metaworld"])))).obs_mean) == 1


def episode(hand, puck, goal=(0.5, 0.5, 0.2)):
    """obs (T, 39) of where hand and puck go."""
    obs = np.zeros((len(hand), 39))
    obs[:, words.HAND], obs[:, words.PUCK], obs[:, words.GOAL] = hand, puck, goal
    return obs


@pytest.mark.parametrize("hand, puck, expected", [
    ([(0, 0, 0), (0.5, 0.5, 0.18)], [(0, 0.6, 0.02)] * 2, "reach"),
    ([(0, 0, 0), (0.3, 0.5, 0.18)], [(0, 0.6, 0.02)] * 2, "none"),
    ([(0, 0, 0), (0.5, 0.5, 0.18)], [(0, 0.6, 0.02), (0.1, 0.6, 0.02)], "push"),
    ([(0, 0, 0), (0, 0.6, 0.1)], [(0, 0.6, 0.02), (0, 0.6, 0.1)], "lift")])
def test_what_an_episode_came_to(hand, puck, expected):
    assert words.did(episode(hand, puck)) == expected


def test_the_tables_average_over_tasks_and_scenes(capsys):
    def row(task, told, words, success, push=""):
        came_to = {"reach": "", "push": "", "lift": "", "none": ""}
        if push != "":
            came_to = {"reach": 0, "push": push, "lift": 0, "none": 1 - push}
        return {"algo": "pac", "seed": 0, "task": task, "told": told, "words": words,
                "success": success, **came_to}

    words.show([row("push", "own", "push it", 1.0, 0.8), row("push", "held out", "shove", 0.5, 1),
                row("push", "reach", "go there", 0.1, 0.2), row("reach", "own", "go there", 0.6, 0),
                row("reach", "push", "push it", 0.3, 0.4), row("door", "own", "open it", 0.2)])
    said = capsys.readouterr().out
    assert "| pac | 1 | 60% | 50% | 80% | 20% |" in said
    assert "| pac | push it | 0% | 60% | 0% | 40% |" in said
    assert "| pac | go there | 0% | 10% | 0% | 90% |" in said and "shove" not in said


def test_tasks_are_told_their_own_held_out_and_anothers_words():
    told = list(words.tellings("metaworld-push"))
    assert [name for name, _ in told] == ["own", "held out", "held out", "reach", "pick-place"]
    assert told[3][1] == "move the hand to the goal"
    assert [name for name, _ in words.tellings("metaworld-door-open")] == ["own", *["held out"] * 2]
