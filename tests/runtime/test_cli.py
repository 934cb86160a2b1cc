"""cli.py: a typing error is answered with what was meant."""

import pytest

from attnrl import parse_config
from runtime.cli import UserError


@pytest.mark.parametrize(
    "words, said",
    [
        (["--methd", "grpo"], "did you mean --method?"),
        (["--learning_rate", "1e-4"], "did you mean --lr?"),  # another trainer's name
        (["--learning-rate=1e-4"], "did you mean --lr?"),
        (["--num_generations", "8"], "did you mean --group_size?"),
        (["--branch", "fci_entropi"], "did you mean entropy?"),
        (["--method", "treelr"], "did you mean treerl?"),
        (["--preset", "papr"], "did you mean paper?"),
    ],
)
def test_the_closest_option_or_value_is_named(words, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        parse_config(words)


def test_what_is_close_to_nothing_gets_no_guess():
    with pytest.raises(UserError, match=r"unrecognized arguments: --zzz \(see --help\)"):
        parse_config(["--zzz"])


def test_dashes_pass_for_underscores():
    config = parse_config(["--batch-size", "7", "--eval-samples=3"])
    assert (config.batch_size, config.eval_samples) == (7, 3)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--steps", "-3"], "--steps -3: must be at least 1"),
        (["--lr", "nan"], "--lr nan: must be a finite number, at least 0"),
        (["--lr", "inf"], "--lr inf: must be a finite number, at least 0"),
    ],
)
def test_a_number_outside_its_range_says_only_what_is_wrong(words, said):
    with pytest.raises(UserError) as error:
        parse_config(words)
    assert str(error.value) == said


@pytest.mark.parametrize(
    "words, option",
    [
        (["--method", "grpo", "--rho", "0.5"], "--rho"),
        (["--method", "grpo", "--ads-filter", "none"], "--ads_filter"),
        (["--method", "treerl", "--min_branch_gap", "4"], "--min_branch_gap"),
        (["--prl_eta", "3"], "--prl_eta"),
        (["--method", "atb", "--batch_lam", "0.5"], "--batch_lam"),
        (["--method", "prl", "--prl_length", "3"], "--prl_length"),  # the toy's end at blank lines
        (["--grpo_samples", "3"], "--grpo_samples"),
    ],
)
def test_an_option_that_the_method_does_not_use_is_refused(words, option):
    with pytest.raises(UserError, match=f"{option}: has no effect with --method"):
        parse_config(words)


def test_options_that_the_method_uses_are_taken():
    assert parse_config(["--method", "prl", "--prl_eta", "3"]).prl_eta == 3
    assert parse_config(["--method", "grpo", "--grpo_samples", "3"]).grpo_samples == 3
    assert parse_config(["--method", "treerl", "--delta", "2"]).delta == 2
