r"""results.py: the result files of an evaluation (eval.py), their statistics and tables.

A result file has one line of settings, then one line per response (`Sample`); the k responses to a
question are together.

    avg@k      mean over questions of c / n                       c right of n samples: mean reward
    pass@k     mean over questions of 1 - C(n - c, k) / C(n, k)   unbiased, n the actual number
    bootstrap  mean* = sum_q m_q x_q / Q,  m ~ multinomial(Q; 1/Q ... 1/Q): Q questions drawn with
               replacement, 10,000 times
    interval   the 2.5 % and 97.5 % quantiles of mean*

Questions are drawn, not samples: more samples of 30 AIME problems say nothing about the 31st. The
standard error from the choice of 30 questions is about 5 points even at k = 32: a difference of 2
points is no sign of progress. Two models on the same questions (`compare`) differ with less noise,
because the difficulty of the questions cancels. Left out: tests of significance.

    python -m tools.report runs/eval-X/*.jsonl
    python -m pytest tests/runtime/test_results.py
"""

import json
import math
import os
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from runtime.cli import UserError, first_line, plain
from sampler import is_correct


# --------------------------------------------------------------------------------------------------
# Result files
# --------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """One graded response: a line of a result file."""

    source: str  # "FILE, line 7"
    problem: str
    answers: list
    sample: int  # 0 ... k - 1
    seed: int
    reward: float
    tokens: int
    finished: bool  # False: cut off at the length limit
    boxed: bool  # an answer to grade: a closed box (--reward number: a number)
    error: str  # "", or why grading failed (it then counts as wrong): "timeout", "died", "error"
    response: str


@dataclass
class Results:
    """A result file: its settings, and its samples in order."""

    path: Path
    settings: dict
    samples: list[Sample] = field(default_factory=list)
    size: int = 0  # bytes of complete lines
    half: int = 0  # bytes after them: an incomplete line of a process that was killed

    def questions(self) -> dict[str, list[Sample]]:
        """The k samples of each question, by its problem and answers. A last question with fewer
        samples is left out."""
        k = self.settings["k"]
        whole = [self.samples[i : i + k] for i in range(0, len(self.samples) - k + 1, k)]
        if not whole:
            raise UserError(
                f"{self.path}: no question has its {k} samples yet; repeat the eval.py command that"
                " wrote it"
            )
        found = {json.dumps([group[0].problem, *group[0].answers]): group for group in whole}
        if len(found) < len(whole):
            raise UserError(f"{self.path}: a question occurs twice in it")
        return found


def read_results(path: Path) -> Results:
    """Read a result file. Raises a UserError that names file, line and field."""
    try:
        *lines, half = path.read_bytes().split(b"\n")
    except OSError as error:
        hint = f"; give its files, {path}/*.jsonl" if path.is_dir() else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    results = Results(path, {}, [], sum(len(line) + 1 for line in lines), len(half))
    for place, line in enumerate(lines or [b"{}"], -1):  # -1: the settings
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            if place >= 0:
                results.samples.append(parse_sample(row, place, results))
                continue
            results.settings = row["settings"] if isinstance(row.get("settings"), dict) else {}
            for name in ("k", "questions"):
                if type(results.settings.get(name)) is not int or results.settings[name] < 1:
                    raise ValueError(
                        f"no settings with a number {name!r}: not the result file of an evaluation"
                    )
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {place + 2}: {first_line(error)}") from error
    return results


def parse_sample(row: dict, place: int, results: Results) -> Sample:
    """The sample at this place of the file. Raises ValueError."""
    for f in fields(Sample):
        if (
            type(row.get(f.name)) is not f.type
            or f.type is float
            and not math.isfinite(row[f.name])
        ):
            kind = "finite number" if f.type is float else getattr(f.type, "__name__", "")
            raise ValueError(f"the field {f.name!r} is no {kind}")
    one, k = Sample(**{f.name: row[f.name] for f in fields(Sample)}), results.settings["k"]
    if one.sample != place % k:
        raise ValueError(f"sample {one.sample}, but sample {place % k} is expected here (k = {k})")
    if one.sample and (one.problem, one.answers) != (
        results.samples[-1].problem,
        results.samples[-1].answers,
    ):
        raise ValueError(
            "another problem or other answers than in the line before, a sample of the same"
            " question"
        )
    return one


def open_results(path: Path, settings: dict, expected: list[tuple[str, int]]) -> Results:
    """The samples that a result file already has, to resume an evaluation with these settings;
    writes nothing. Raises a UserError that names the settings that differ, or the line whose
    (problem, sample) is not the expected one."""
    try:
        # no file, or a part of the first line: the process was killed at once
        if not path.exists() or header(settings).startswith(path.read_bytes()):
            return Results(path, settings, half=path.stat().st_size if path.exists() else 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    results = read_results(path)
    # settings that files of version 1 lack
    later = {"grade_units": "loose", "date": settings.get("date")}
    results.settings = {k: later[k] for k in later if k in settings} | results.settings
    if results.settings.get("reward") == "eval:grade":  # of version 1
        results.settings["reward"] = "boxed"
    if changed := differing(results.settings, settings):
        raise UserError(
            f"{path}: was written with other settings ({changed}); use those, or give another --out"
        )
    for i, one in enumerate(results.samples):
        if expected[i : i + 1] != [(one.problem, one.sample)]:
            raise UserError(f"{path}, line {i + 2}: not the expected problem; were lines removed?")
    return results


def header(settings: dict) -> bytes:
    return json.dumps({"settings": settings}).encode() + b"\n"


def differing(old: dict, new: dict) -> str:
    """The settings that differ: "temperature 1.0 -> 0.6; ..."."""
    return "; ".join(
        plain(f"{name} {old.get(name)!r:.100} -> {new.get(name)!r:.100}")
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    )


def append_samples(results: Results, samples: list[Sample]) -> None:
    """Write samples after the last complete line, and flush them to the disk. Raises
    UserError."""
    text = b"".join(json.dumps(asdict(s)).encode() + b"\n" for s in samples)
    try:
        with results.path.open("ab") as file:
            if file.seek(0, os.SEEK_END) != results.size + results.half:
                raise UserError(f"{results.path}: another process is writing there")
            if results.half:
                file.truncate(results.size)
            file.write(text if results.size else header(results.settings) + text)
            file.flush()
            os.fsync(file.fileno())
            results.size, results.half = file.seek(0, os.SEEK_END), 0
    except OSError as error:
        raise UserError(
            f"{results.path}: cannot be written ({error.strerror}); the same command with --out "
            f"{results.path.parent} goes on after the last whole line"
        ) from error
    results.samples += samples


def make_folder(folder: Path, paths: list[Path]) -> None:
    """The folder of an evaluation: a new one, an empty one, or one with some of these files. Raises
    UserError."""
    try:
        if folder.is_dir() and any(folder.iterdir()) and not any(path.exists() for path in paths):
            raise UserError(
                f"--out {folder}: is not empty, and has no {paths[0].name} to go on with; give"
                " another name"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from error


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------
def avg_at_k(rewards: list[float]) -> float:
    """Mean accuracy over the samples of one problem: c / n."""
    return sum(rewards) / len(rewards)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, unbiased from n >= k samples of which c
    are right.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021), with n the actual number of samples. Raises
    ValueError for k > n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, got n = {n}, c = {c}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def powers(n: int) -> list[int]:
    """The k of pass@k: powers of two up to n, and n. powers(6) -> [1, 2, 4, 6]."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 10_000) -> np.ndarray:
    """(draws, M) means over redrawn questions, from the (Q, M) values of Q questions."""
    random, count = np.random.default_rng(seed), len(values)
    # not at once: 25,000 questions would need 2 GB
    blocks = [min(500, draws - i) for i in range(0, draws, 500)]
    return np.concatenate(
        [random.multinomial(count, [1 / count] * count, size) @ values / count for size in blocks]
    )


def estimate(mean: float, means: np.ndarray) -> str:
    """A mean with its interval, both times 100: "49.7 [38.1, 61.5]"."""
    low, high = 100 * np.quantile(means, [0.025, 0.975])
    return f"{100 * mean:.1f} [{low:.1f}, {high:.1f}]"


def measure(results: Results) -> dict[str, tuple[float, np.ndarray]]:
    """Name -> (mean over questions, bootstrap means) of every column of the tables."""
    questions, n = results.questions(), results.settings["k"]
    rows = []
    for group in questions.values():
        right = sum(is_correct(s.reward) for s in group)
        rows.append(
            {
                "avg@k": avg_at_k([s.reward for s in group]),
                **{f"pass@{k}": pass_at_k(n, right, k) for k in powers(n)},
                "tokens": fmean(s.tokens for s in group),
                "cut off": fmean(not s.finished for s in group),
                "no box": fmean(not s.boxed for s in group),
                "wrong": fmean(s.boxed and not s.error and not is_correct(s.reward) for s in group),
                "not graded": fmean(bool(s.error) for s in group),
            }
        )
    values = np.array([list(row.values()) for row in rows])
    # seeded by the questions: other sets are drawn independently, and a file's interval does not
    # depend on its place in the list
    means = bootstrap(values, zlib.crc32("".join(questions).encode()))
    return {name: (values[:, i].mean(), means[:, i]) for i, name in enumerate(rows[0])}


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------
SHARES = ("cut off", "no box", "wrong", "not graded")  # of the samples; see Sample


def markdown(rows: list[list[str]]) -> str:
    """A table of rows of equal length, the head first; padded, so that it also fits a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def results_table(files: list[Results]) -> str:
    """One row per file and the mean over files: accuracy, lengths and shares; then pass@k. In %,
    with intervals."""
    stems = Counter(f.path.stem for f in files)
    names = [
        plain(f.path.stem if stems[f.path.stem] == 1 else str(f.path.with_suffix("")))
        for f in files
    ]
    rows: list[dict[str, Any]] = [measure(f) for f in files]
    sizes, notes = [[len(f.questions()), f.settings["k"]] for f in files], []
    for name, f, (count, _) in zip(names, files, sizes):
        if count < f.settings["questions"]:
            notes.append(f"{name}: only {count} of {f.settings['questions']} questions so far")
        errors = Counter(s.error for s in f.samples if s.error)
        notes += [
            f"{name}: grading: {n} x {error} (counted as wrong)"
            for error, n in sorted(errors.items())
        ]
    # all sets have equal weight, as in the paper; a column that one set lacks has no mean
    if len(files) > 1:
        rows.append(
            {
                name: tuple(sum(row[name][i] for row in rows) / len(rows) for i in (0, 1))
                for name in rows[0]
                if all(name in row for row in rows)
            }
        )
        names, sizes = [*names, f"mean of {len(files)}"], [*sizes, ["", ""]]
    ks = [f"pass@{k}" for k in sorted({k for f in files for k in powers(f.settings["k"])})]
    first, second = (
        [["set", "questions", "k", "avg@k", "tokens", *SHARES]],
        [["set", *ks]],
    )
    for name, size, row in zip(names, sizes, rows):
        first.append(
            [
                name,
                *map(str, size),
                estimate(*row["avg@k"]),
                f"{row['tokens'][0]:.0f}",
                *(f"{100 * row[share][0]:.1f}" for share in SHARES),
            ]
        )
        second.append([name, *(estimate(*row[k]) if k in row else "-" for k in ks)])
    return "\n\n".join([markdown(first), markdown(second), *notes])


def compare(a: Results, b: Results) -> str:
    """B minus A on the same questions, in points of avg@k, and how often each is better. If the
    questions differ, raises a UserError that names common ones."""
    one, two = a.questions(), b.questions()
    if one.keys() != two.keys():
        common = [plain(group[0].source) for question, group in one.items() if question in two]
        named = ": " + "; ".join(common[:5]) + "; ..." * (len(common) > 5) if common else ""
        raise UserError(
            f"{a.path} and {b.path}: not the same questions ({len(one)} and {len(two)}, "
            f"{len(common)} in common{named})"
        )
    values = np.array(
        [[avg_at_k([s.reward for s in group]) for group in (one[q], two[q])] for q in one]
    )
    values = np.column_stack([values, values[:, 1] - values[:, 0]])
    means, (_, _, difference) = bootstrap(values, zlib.crc32("".join(one).encode())), values.T
    better = [
        f"{(difference < 0).sum()} better",
        f"{(difference > 0).sum()} better",
        f"{(difference == 0).sum()} equal",
    ]
    rows = [
        [name, k, estimate(values[:, i].mean(), means[:, i]), better[i]]
        for i, (name, k) in enumerate(
            [
                (plain(f"A: {a.path}"), str(a.settings["k"])),
                (plain(f"B: {b.path}"), str(b.settings["k"])),
                ("B - A", ""),
            ]
        )
    ]
    return (
        markdown([["", "k", "avg@k", f"of {len(one)} questions"], *rows])
        + "\n\nsettings, A's -> B's: "
        + (differing(a.settings, b.settings) or "the same")
    )
