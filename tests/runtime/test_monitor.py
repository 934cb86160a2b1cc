"""test_monitor.py: what a run shows on the terminal.

python -m pytest tests/runtime/test_monitor.py
"""

from fixtures import typed
from toy_runs import train_tiny


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
