"""Hostile text: fuzzing of the grader, and what a grading worker may not do."""
import json
import socket
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grading
from fixtures import bpe_tokenizer
from grading import Grader, last_box

TOKENIZER = bpe_tokenizer()
FRAGMENTS = ["\\boxed{", "}", "{", "\\", "\\frac", "\\dfrac12", "\\sqrt", "\\text{", "\\left(", "\\right)", "</think>", "^", "_", "^{", "$", "%", "&",
             "\\\\", "\\begin{pmatrix}", "\\end{pmatrix}", "\\sum_{n=1}", "\\int", "\\pm", "\\cup", "10^{99999999}", "99999999!", "1e9999", ",", "=",
             "x\\in", "\0", "\x1b[2J", "\u202e", "\ud800", "\ufeff", "\u0661", "\u00b2", "\u2212", "\n", "7", "0", "1/0", "i", "e", ".", "...", "import os",
             "__import__('os')", "\\input{/etc/passwd}", "\\write18{x}"]
nasty = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
nested = st.tuples(st.sampled_from(["\\boxed{", "{", "\\frac{", "\\sqrt{", "("]), st.integers(1, 3000), nasty, st.integers(0, 3000)).map(
    lambda t: t[0] * t[1] + t[2] + "}" * t[3])
hostile = st.text(st.characters(exclude_categories=()), max_size=60) | nasty | nested
loose = dict(deadline=5000, suppress_health_check=list(HealthCheck), database=None)


def check_grade(response, gold):
    """All of grade() but the question to a worker (the fast path decides, or makes the question that can be sent)."""
    for text in (response, "\\boxed{" + response + "}"):
        box = last_box(text)
        for decision in [] if box is None else [grading._decide(box, gold)]:
            assert isinstance(decision, bool) or json.loads(json.dumps(decision).encode()) == list(decision)


@pytest.mark.parametrize("examples", [800, pytest.param(70_000, marks=pytest.mark.full)])
def test_fuzz_grading(examples):
    settings(max_examples=examples, **loose)(given(hostile, hostile)(check_grade))()


ATTACKS = {
    "write": "open(TARGET, 'w').write('x')", "append": "open(TARGET, 'a')", "os.open": "os.open(TARGET, os.O_CREAT | os.O_WRONLY)",
    "mkdir": "os.mkdir(TARGET)", "symlink": "os.symlink('/', TARGET)", "remove": "os.remove(VICTIM)", "rename": "os.rename(VICTIM, TARGET)",
    "truncate": "os.truncate(VICTIM, 0)", "system": "os.system('touch ' + TARGET)", "fork": "os.fork()", "kill": "os.kill(os.getppid(), 0)",
    "program": "subprocess.run(['touch', TARGET])", "spawn": "os.posix_spawn('/usr/bin/touch', ['touch', TARGET], {})",
    "loopback": "socket.create_connection(('127.0.0.1', PORT), 2)", "listen": "socket.socket().bind(('127.0.0.1', 0))",
    "machine code": "ctypes.CDLL(None).system(b'touch x')"}


def test_a_worker_writes_no_file_opens_no_socket_and_starts_no_program(tmp_path, monkeypatch):
    """The real worker; in place of math-verify a module that does what a text would do that had taken it over."""
    target, victim = tmp_path / "target", tmp_path / "victim"
    victim.write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import os, socket, subprocess, ctypes\nTARGET, VICTIM, PORT = {str(target)!r}, {str(victim)!r}, {server.getsockname()[1]}\n"
        code += f"ATTACKS = {ATTACKS!r}\nclass LatexExtractionConfig:\n    def __init__(self, **_): pass\n"
        code += "def parse(text, *_, **__):\n    if text[7:-1] in ATTACKS:\n        exec(ATTACKS[text[7:-1]])\n    return [text]\n"
        code += "def verify(*_, **__): return True\n"
        (tmp_path / "math_verify.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        before = {p.name for p in tmp_path.iterdir()}
        with Grader(workers=1) as grader:
            assert json.loads(json.dumps(grader._ask(b'[["harmless", "x"]]\n'))) == {"correct": True, "error": ""}
            for attack in ATTACKS:
                assert grader._ask(json.dumps([[attack, "x"]]).encode() + b"\n") == {"correct": False, "error": "error"}, attack
            if sys.platform == "linux":
                import resource
                pid = grader._idle.queue[-1].pid
                assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == before and victim.read_text() == "whole"
