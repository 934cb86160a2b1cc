"""cli.py: a typing error is answered with what was meant; --help fits a screen.

python -m pytest tests/runtime/test_cli.py
"""

import dataclasses
import re

import pytest
from fixtures import typed

import eval as evaluation
from attnrl import METHODS, PRESETS, parse_config
from runtime.cli import UserError
from runtime.config import Config
from tools import ask


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


# --------------------------------------------------------------------------------------------------
# --help
# --------------------------------------------------------------------------------------------------
TEN = typed("preset method model problems test_fraction reward steps batch_size lr out")
SCREEN = 45


def help_text(capsys, words: str, parse=parse_config) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(typed(words))
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> list[str]:
    """Those that have a line of their own."""
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.M)


def default_of(text: str, name: str) -> str | None:
    own = re.search(rf"^  --{name} (.*?)(?=^  --|^\S|\Z)", text, re.M | re.S)
    found = re.search(r"\(default: (.*?)\)", " ".join(own[1].split()))
    return found and found[1]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("words", ["--help", "-h", "--preset paper --help", "--help --method prl"])
def test_help_is_a_screen_with_the_ten_options_to_begin_with(words, capsys):
    text = help_text(capsys, words)
    assert options_in(text) == TEN
    assert len(text.splitlines()) <= SCREEN
    # a line that is longer would take two; the last one is to copy
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert f"--help_all shows all {len(dataclasses.fields(Config))}" in " ".join(text.split())


@pytest.mark.parametrize("words", ["--help_all", "--help-all", "--preset small --help-all"])
def test_help_all_lists_every_option(words, capsys):
    shown = options_in(help_text(capsys, words))
    assert sorted(shown) == sorted([f.name for f in dataclasses.fields(Config)] + HELPS)


HELPS = ["help", "help_all"]


@pytest.mark.parametrize("asked", ["--help", "--help_all"])
@pytest.mark.parametrize("order", ["{p} {h}", "{h} {p}"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_defaults_are_those_of_the_preset_that_is_named(preset, order, asked, capsys):
    words = order.format(p=f"--preset {preset} --method grpo", h=asked)
    text = help_text(capsys, words)
    settings = {f.name: f.default for f in dataclasses.fields(Config)}
    settings |= PRESETS[preset] | METHODS["grpo"]
    for name in TEN if asked == "--help" else ("batch_size", "lr", "delta", "advantage", "kl_coef"):
        if name not in ("model", "problems", "out"):  # texts, which may be empty or broken
            assert default_of(text, name) == str(settings[name]), name
    assert f"those of --preset {preset} --method grpo" in " ".join(text.split())


def test_the_help_says_how_to_see_another_presets_values(capsys):
    assert "as in --preset small --help" in " ".join(help_text(capsys, "--help").split())
    assert "as in --preset toy --help" in " ".join(help_text(capsys, "--preset small -h").split())


@pytest.mark.parametrize("asked", ["-h", "--help", "--help_all", "--help-all"])
@pytest.mark.parametrize("order", ["{p} {h}", "{h} {p}"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--preset papr", "argument --preset: invalid choice: .*; did you mean paper?"),
        ("--preset=papr", "argument --preset: invalid choice: .*; did you mean paper?"),
        ("--method treelr", "argument --method: invalid choice: .*; did you mean treerl?"),
    ],
)
def test_help_of_a_preset_or_method_that_is_none_is_the_usual_error(wrong, said, order, asked):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        parse_config(typed(order.format(p=wrong, h=asked)))


def test_a_preset_without_its_name_is_the_usual_error():
    for words in ("--preset", "--preset --steps 3", "--preset --help"):
        with pytest.raises(UserError, match="argument --preset: expected one argument"):
            parse_config(typed(words))


def test_help_of_the_evaluation_is_a_screen_too(capsys):
    text = help_text(capsys, "--help", evaluation.parse)
    shown = options_in(text)
    assert len(shown) == 10 and {"model", "problems", "ask", "k", "out"} <= set(shown)
    assert len(text.splitlines()) <= 40
    every = options_in(help_text(capsys, "--help-all", evaluation.parse))
    assert set(shown) < set(every) and set(HELPS) < set(every)
    assert f"--help_all shows all {len(every) - 2}" in " ".join(text.split())


@pytest.mark.parametrize("words", ["", "--help", "-h"])
def test_ask_shows_the_same(words, capsys):
    assert options_in(help_text(capsys, words, ask.main))[:2] == ["model", "problems"]
    assert "seed" in options_in(help_text(capsys, "--help_all", ask.main))
