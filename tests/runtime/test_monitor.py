"""test_monitor.py: what a run shows on the terminal.

python -m pytest tests/runtime/test_monitor.py
"""

from fixtures import typed
from toy_runs import train_tiny

from runtime import monitor


def test_levels_of_the_display(tmp_path, capsys):
    """Each shows what the one before shows, and more."""
    shown = {}
    levels = {
        "quiet": ["--quiet"],
        "warning": ["--log_level", "warning"],
        "info": [],
        "debug": ["--log_level", "debug"],
    }
    short = typed("--steps 1 --batch_size 1 --eval_every 0")
    for name, options in levels.items():
        train_tiny(tmp_path, *short, *options, name=name)
        shown[name] = capsys.readouterr().out.splitlines()
    assert shown["quiet"] == shown["warning"] and not any(
        line.startswith(("before", "step    1   reward")) for line in shown["quiet"]
    )
    assert sum("reward" in line for line in shown["info"]) == 1 and [
        line[:12] for line in shown["info"][:2]
    ] == ["run folder: ", "before train"]
    assert (
        set(shown["quiet"]) <= set(shown["info"]) and len(shown["debug"]) == len(shown["info"]) + 1
    )
    assert any(line.strip().startswith("generate ") and "train " in line for line in shown["debug"])


def test_a_log_file_shows_the_slow_phases_of_the_first_step(tmp_path, capsys, monkeypatch):
    """It has no bar. Here every phase counts as slow."""
    monkeypatch.setattr(monitor, "SLOW", 0.0)
    train_tiny(tmp_path, *typed("--steps 2 --batch_size 1 --eval_every 0"))
    before, after = capsys.readouterr().out.split("step    1   reward")
    for phase in ("evaluate", "generate", "score", "train"):
        assert f"\n    {phase} took " in before
    assert " took " not in after
    train_tiny(tmp_path, *typed("--steps 1 --batch_size 1 --quiet"), name="quiet")
    assert " took " not in capsys.readouterr().out
