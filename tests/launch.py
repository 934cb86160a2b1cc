"""launch.py: commands of the project as real processes, alone and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from fixtures import ROOT


def run(*args, cwd=ROOT, code=0):
    """Run a command of the project as a user does; returns its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


class Launched:
    """A torchrun in the background. Its environment carries a mark of its own, which is inherited:
    so all processes of the run can be found, grading workers and those that outlive their parent
    too, and none of them outlives the test."""

    def __init__(self, *arguments, prefix=(), env=None):
        self.mark = f"ATTNRL_TEST={uuid.uuid4().hex}"
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        name, value = self.mark.split("=")
        # one thread a rank and sleeping OpenMP pools: CI machines have as many cores as there are
        # ranks, or fewer
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", name: value}
            | (env or {})
        )
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.out, stderr=self.err
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def processes(self, *words: str) -> list[int]:
        """Ids of the run's processes whose command line and environment contain all of these
        words."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has just ended, or is another user's
                continue
            if self.mark in environment and all(
                w in environment or any(w in part for part in command) for w in words
            ):
                found.append(int(folder.name))
        return found

    def rank(self, number: int) -> int:
        """The process id of one rank (grading workers inherit RANK, but have another command
        line)."""
        found = self.processes(f"RANK={number}", "attnrl.py")
        assert len(found) == 1, (
            f"{len(found)} processes of rank {number}, expected 1; stderr:\n{self.stderr()}"
        )
        return found[0]

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s; stderr:\n{self.stderr()}")

    def wait_until(self, condition, what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended before {what}; stderr:\n{self.stderr()}"
            assert time.monotonic() < end, (
                f"{what}: not within {seconds} s; stderr:\n{self.stderr()}"
            )
            time.sleep(0.05)

    def text(self, file) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")

    def stdout(self) -> str:
        return self.text(self.out)

    def stderr(self) -> str:
        return self.text(self.err)


def one_node(ranks: int) -> list:
    # standalone: a free port, so two runs do not meet
    return ["--standalone", "--nproc_per_node", ranks]


def torchrun(ranks: int, *arguments) -> None:
    with Launched(*one_node(ranks), *arguments) as run:
        code = run.wait(180)
        assert code == 0, f"exit code {code}, expected 0\n{run.stdout()}\n{run.stderr()}"


def steps_done(folder: Path) -> int:
    """The newest step that is on the disk."""
    file = folder / "metrics.jsonl"
    return (
        max((json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]), default=0)
        if file.exists()
        else 0
    )
