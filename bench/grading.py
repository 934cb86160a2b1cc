r"""bench/grading.py: errors and time of graders: ours, raw math-verify, a string match.

    python bench/grading.py FILE.jsonl [FILE.jsonl ...]

A line of a file is one case: {"response": ..., "gold": ..., "expect": ...} with "correct", "wrong"
or "incorrect"; any other expectation (such as "no_crash") is only timed, not judged. "Refused" are
right answers called wrong, "accepted" wrong answers called right.

`--split FILE` reports the cases of one file in two parts: those that were used to write the rules
of runtime/grading.py, and those that nobody looked at (a quarter, chosen by two hashes: see
`unseen`).

- ours: Grader(workers=1), one case per call.
- math-verify: verify(parse(gold in a box), parse(response)), as its README says, in a process with
  2 GB that is killed after 30 s. A case that ends the process counts as a refusal.
- string match: the last number of the response against the last of the gold, as GSM8K graders do.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.grading import Grader  # noqa: E402

RIGHT = {"correct": True, "wrong": False, "incorrect": False}


def unseen(case: dict) -> bool:
    """Two hashes, since the first list of failures was printed with another one than meant: only
    what both left out was seen by nobody before the rules were finished."""
    both = (case["response"] + case["gold"], case["response"] + "\n" + case["gold"])
    return all(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2 for text in both)


def string_match(response: str, gold: str) -> bool:
    def number(text: str) -> str:
        found = re.findall(r"-?[0-9.,]*[0-9]", text.replace("$", ""))
        return found[-1].replace(",", "") if found else ""

    return number(response) == number(gold) != ""


def raw_worker() -> None:
    """math-verify without anything around it: a case a line in, a verdict a line out."""
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        response, gold = json.loads(line)
        try:
            correct = bool(verify(parse("\\boxed{" + gold + "}"), parse(response)))
        except Exception:
            correct = False
        print(json.dumps(correct), flush=True)


class RawMathVerify:
    """The other end of raw_worker."""

    def __init__(self):
        self.process = None

    def __call__(self, response: str, gold: str) -> bool:
        if self.process is None:
            command = [sys.executable, __file__, "--raw_worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            self.process = subprocess.Popen(command, **pipes)
            self.process.stdout.readline()
        self.process.stdin.write(json.dumps([response, gold]).encode() + b"\n")
        if wait([self.process.stdout], 30) and (reply := self.process.stdout.readline()):
            return json.loads(reply)
        self.close()
        return False

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def measure(grade: Callable[[str, str], bool], cases: list[dict]) -> tuple[list[bool], list[float]]:
    """Verdicts and milliseconds."""
    verdicts, times = [], []
    for case in cases:
        start = time.perf_counter()
        verdicts.append(grade(case["response"], case["gold"]))
        times.append(1000 * (time.perf_counter() - start))
    return verdicts, times


def row(part: str, name: str, cases: list[dict], verdicts: list[bool], times: list[float]) -> str:
    judged = [
        (RIGHT[c["expect"]], v)
        for c, v in zip(cases, verdicts, strict=True)
        if c["expect"] in RIGHT
    ]
    refused = sum(right and not verdict for right, verdict in judged)
    accepted = sum(verdict and not right for right, verdict in judged)
    late = quantiles(times, n=100)[98] if len(times) > 1 else times[0]
    return (
        f"| {part} | {len(judged)} | {name} | {refused} | {accepted} "
        f"| {median(times):.1f} | {late:.0f} |"
    )


def parts_of(path: Path, split: bool) -> list[tuple[str, list[dict]]]:
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    if not split:
        return [(path.name, cases)]
    return [
        (f"{path.name}, {name}", [case for case in cases if unseen(case) is wanted])
        for name, wanted in (("seen", False), ("unseen", True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--split", type=Path, metavar="FILE", action="append", default=[])
    parser.add_argument("--raw_worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.raw_worker:
        return raw_worker()
    for path in (*arguments.files, *arguments.split):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    raw = RawMathVerify()
    print("| cases | judged | grader | refused | accepted | ms, median | ms, 99 % |")
    print("|---|---|---|---|---|---|---|")
    with Grader(workers=1) as grader:
        graders = {
            "ours": lambda response, gold: grader.grade_many([(response, [gold])])[0].correct,
            "math-verify": raw,
            "string match": string_match,
        }
        for grade in graders.values():  # start the processes before the clock
            grade(r"\boxed{2(n-1)}", "2n-2")
        files = [(path, False) for path in arguments.files] + [(p, True) for p in arguments.split]
        for path, split in files:
            for part, cases in parts_of(path, split):
                for name, grade in graders.items():
                    print(row(part, name, cases, *measure(grade, cases)), flush=True)
    raw.close()
    return None


if __name__ == "__main__":
    main()
