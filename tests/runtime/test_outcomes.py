"""Why is the reward 0? What is graded of a response, and how the outcomes are counted and told."""

import pytest
from fixtures import bpe_tokenizer, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from runtime.metrics import Outcomes, outcome_lines, shortened
from runtime.rewards import Reward, number_in_a_box, response_texts


@pytest.mark.parametrize(
    "response, number",
    [
        ("so 3 + 4 = 7", "7"),
        ("It costs $1,200.50 in all.", "1,200.50"),
        ("from 5 to -3.", "-3"),
        ("3/4 of it", "3/4"),
        ("x5 and 12", "12"),
        ("<think>9</think> so 8", "8"),
        ("#### 42", "42"),
        ("none", None),
        ("only x5", None),
        ("<think>9</think> none", None),
    ],
)
def test_the_last_number_of_a_response(response, number):
    assert number_in_a_box(response) == ("" if number is None else rf"\boxed{{{number}}}")


@pytest.mark.parametrize(
    "spec, rewards, boxed",
    [
        ("boxed", [1, 0, 0, 0], [True, False, True, False]),
        ("number", [1, 1, 1, 0], [True, True, True, False]),
        ("boxed_or_number", [1, 1, 0, 0], [True, True, True, False]),
        ("eval:grade", [1, 0, 0, 0], [True, False, True, False]),
    ],
)
def test_rewards_in_the_box(spec, rewards, boxed):
    texts = [r"so \boxed{7}", "so 7.", r"\boxed{8}, or was it 7?", "I do not know"]
    reward = Reward(spec, workers=1)
    assert reward([(text, ["7"]) for text in texts]) == rewards
    assert reward.boxed == boxed and reward.counts["unboxed"] == boxed.count(False)


def test_the_marks_of_thinking_stay_where_they_are_special_tokens():
    r"""A box inside the thinking is no answer, also where decoding would skip </think>."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    text = r"<think>\boxed{7}</think>so \boxed{8}"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == r"\boxed{7}so \boxed{8}"
    assert response_texts(tokenizer, [tokens]) == [text]
    thinking = tokenizer(r"\boxed{7}</think>so", add_special_tokens=False)["input_ids"]
    assert Reward(workers=1)([(response_texts(tokenizer, [thinking])[0], ["7"])]) == [0.0]


def test_texts_of_responses_are_those_without_special_tokens():
    tokenizer = toy_tokenizer()
    tokens = tokenizer("a=3\n\n\\{7}")["input_ids"] + [tokenizer.eos_token_id]
    assert response_texts(tokenizer, [tokens, []]) == ["a=3\n\n\\{7}", ""]


def test_outcomes_by_hand():
    outcomes = Outcomes()
    for given_ in (
        dict(reward=1.0, boxed=True, finished=True),
        dict(reward=0.0, boxed=True, finished=True),
        dict(reward=0.0, boxed=False, finished=True),
        dict(reward=0.0, boxed=False, finished=False),
        dict(reward=0.0, boxed=True, finished=True, error="timeout"),
        dict(reward=1.0, boxed=True, finished=False),
    ):
        outcomes.add(**given_)
    assert vars(outcomes) == dict(right=2, ungraded=1, unboxed=1, unboxed_cut=1, wrong=1)
    assert str(outcomes) == (
        "of 6 responses 2 right, 2 without an answer to grade (1 of them cut off), 1 wrong,"
        " 1 could not be graded"
    )
    assert vars(Outcomes.sum([outcomes, outcomes])) == {k: 2 * v for k, v in vars(outcomes).items()}


def test_the_option_that_would_change_it_is_named():
    lines = outcome_lines(
        Outcomes(unboxed=13, unboxed_cut=13), ("Sure! " * 99, ["7", "VII"]), "boxed", "max_response"
    )
    assert lines[0].startswith("of 26 responses 0 right, 26 without")
    assert lines[1].startswith("one that is not right: Sure! Sure!") and len(lines[1]) < 210
    assert lines[1].endswith("Sure! (right: 7 or VII)")
    assert "--prompt_suffix" in lines[2] and "--reward boxed_or_number" in lines[2]
    assert "--max_response" in lines[3]
    assert len(outcome_lines(Outcomes(right=99, unboxed=1), None, "boxed", "max_response")) == 1
    assert "--reward" not in outcome_lines(Outcomes(unboxed=1), None, "number", "max_response")[1]
    asked = outcome_lines(Outcomes(unboxed=1), None, "boxed", "max_response", r"in \boxed{}.")[1]
    assert "although every prompt asks" in asked and "--reward boxed_or_number" in asked


def test_a_model_that_solves_nothing_needs_a_warm_up():
    hint = "recipes/sft.py"
    assert hint in outcome_lines(Outcomes(wrong=8, unboxed=2), None, "boxed", "x")[-1]
    assert hint not in str(outcome_lines(Outcomes(wrong=8, right=1), None, "boxed", "x"))
    assert hint not in str(outcome_lines(Outcomes(right=8), None, "boxed", "x"))


@given(st.text(max_size=400))
def test_a_shortened_response_is_one_short_line(text):
    line = shortened(text)
    assert len(line) <= 160 and "\n" not in line and "\x1b" not in line
