"""cli.py: command lines, messages to the user when something is wrong, and how a command ends then:
one line, exit code 2."""

import argparse
import difflib
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, in a form for a UserError."""
    return plain((str(error).strip() or type(error).__name__).splitlines()[0])[:500]


def reason(error: BaseException) -> str:
    """Why a file could not be read or written. Without the name: our message begins with it."""
    return getattr(error, "strerror", None) or first_line(error)


def plain(text: str) -> str:
    """Text of unknown origin, made safe for a terminal: control characters, which may move the
    cursor or do worse, are replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# Names of options in other trainers -> our names
ELSEWHERE = {
    "beta": "kl_coef",
    "data": "problems",
    "dataset": "problems",
    "eval_steps": "eval_every",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "learning_rate": "lr",
    "max_completion_length": "max_response",
    "max_new_tokens": "max_response",
    "max_prompt_length": "max_prompt",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "num_generations": "group_size",
    "output_dir": "out",
    "report_to": "track",
    "save_steps": "save_every",
    "train_file": "problems",
    "total_epochs": "steps",
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are not empty. Does not reformat the example, or a text of several
    lines."""

    def _get_help_string(self, action):
        return (
            action.help
            if action.default in (None, "") or action.nargs == 0
            else super()._get_help_string(action)
        )

    def _fill_text(self, text, width, indent):
        return (
            text
            if "\n" in text or text.startswith("example: ")
            else super()._fill_text(text, width, indent)
        )


class ShortHelp(argparse.Action):
    """--help of a command whose options do not fit on one screen."""

    def __call__(self, parser, *_):
        print(parser.short_help(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A command line. Its --help shows defaults and ends with an example; a wrong option raises a
    UserError. first: the most important options; --help then shows only these, and --help_all shows
    all."""

    def __init__(
        self,
        prog: str,
        description: str,
        example: str,
        usage: str = "",
        first: Sequence[str] = (),
    ):
        super().__init__(
            f"python {prog}",
            f"%(prog)s {usage}" if usage else None,
            description,
            f"example: {example}",
            formatter_class=Help,
            allow_abbrev=False,
            add_help=not first,
        )
        self.first = first
        if first:
            few, silent = f"show the {len(first)} options to begin with", argparse.SUPPRESS
            self.add_argument("-h", "--help", action=ShortHelp, nargs=0, default=silent, help=few)
            self.add_argument("--help_all", action="help", help="show all options")

    def short_help(self) -> str:
        """The options to begin with, in the order in which they are named."""
        formatter, count = self._get_formatter(), len(self._actions) - 2  # without the helps
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        formatter.start_section(f"options to begin with (--help_all shows all {count})")
        formatter.add_arguments([self._option_string_actions[f"--{name}"] for name in self.first])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(self, args=None, namespace=None):
        """Like argparse, but dashes count as underscores, and for a wrong option or value the
        message names the closest right one."""
        words = [self.underscored(word) for word in (sys.argv[1:] if args is None else args)]
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def underscored(self, word: str) -> str:
        """--batch-size=3 -> --batch_size=3, if that is an option."""
        name, equals, value = word.partition("=")
        known = name.startswith("--") and "--" + name[2:].replace("-", "_")
        return known + equals + value if known in self._option_string_actions else word

    def error(self, message: str):
        raise UserError(f"{plain(message)}{self.hint(message)} (see --help)")

    def hint(self, message: str) -> str:
        """The end of an error message, "; did you mean --lr?", if an option or a value is close to
        a right one; else nothing."""
        if unknown := re.match(r"unrecognized arguments: --([^\s=]+)", message):
            name = unknown[1].replace("-", "_")
            names = [option[2:] for option in self._option_string_actions]
            close = [ELSEWHERE.get(name)] if ELSEWHERE.get(name) in names else []
            close = close or difflib.get_close_matches(name, names, 1, 0.6)
            return f"; did you mean --{close[0]}?" if close else ""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            close = difflib.get_close_matches(wrong[1], choices, 1, 0.4)
            return f"; did you mean {close[0]}?" if close else ""
        return ""

    def add_settings(self, kind: type, tables: dict[str, dict]) -> None:
        """An option for every field of a dataclass, in the groups that its metadata names
        (runtime/config.py). tables: the fields whose values are the keys of a table."""
        group: Any = self
        how: dict[str, Any]
        for one in fields(kind):
            if one.metadata["group"]:
                group = self.add_argument_group(one.metadata["group"])
            text = one.metadata["help"]
            if one.name in tables:
                how = dict(choices=list(tables[one.name]))
                if len(tables[one.name]) > 5:  # argparse would write them all on one line
                    how["metavar"], text = "NAME", f"{text}: %(choices)s"
            elif one.type is bool:
                how = dict(type=yes_or_no, metavar="true|false", nargs="?", const=True)
            elif choices := get_args(one.type):
                how = dict(choices=choices)
            else:
                how = dict(type=one.type, metavar=getattr(one.type, "__name__", "").upper())
            group.add_argument(f"--{one.name}", help=text, default=one.default, **how)


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


def leave(code: int):
    """Exit. With several ranks, end this process at once: after an error a normal exit may wait for
    the other ranks while they wait for this one, and at the end of a run it may hang (dist.stop).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def stop_on_user_error(command: str):
    """Every command runs inside this: bad input ends it with one line and exit code 2, Ctrl-C with
    130."""
    # characters that the terminal's encoding lacks (in file names, answers) must not end a run
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        # rank 0 usually prints the same; torchrun then ends this process before it prints
        if int(os.environ.get("RANK", 0)):
            # during a run SIGTERM asks for one more step (monitor.stop_on_signals)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"{command}: {error}", file=sys.stderr)
        leave(2)
    except BrokenPipeError:  # the output is no longer read, as in `| head`
        # otherwise Python complains again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(1)
    except Exception:
        traceback.print_exc()
        leave(1)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(0)
