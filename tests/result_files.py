"""result_files.py: result files of an evaluation, made up."""

import json
from dataclasses import asdict
from pathlib import Path

from runtime.results import Results, Sample, header


def results(rewards: list[list[float]], name: str = "set", **settings) -> Results:
    """A result file in memory: question q has the rewards of row q. Response i has 10 q + i
    tokens."""
    k = len(rewards[0])
    samples = [
        Sample(
            f"p.jsonl, line {q + 1}",
            f"question {q}",
            ["7"],
            i,
            i,
            float(r),
            10 * q + i,
            True,
            True,
            "",
            "text",
        )
        for q, row in enumerate(rewards)
        for i, r in enumerate(row)
    ]
    return Results(Path(f"{name}.jsonl"), {"k": k, "questions": len(rewards)} | settings, samples)


def write(path: Path, rewards: list[list[float]], **settings) -> Path:
    given = results(rewards, **settings)
    path.write_bytes(
        header(given.settings)
        + b"".join(json.dumps(asdict(s)).encode() + b"\n" for s in given.samples)
    )
    return path


def sample_line(**changes) -> bytes:
    return json.dumps(asdict(results([[1, 0]]).samples[0]) | changes).encode()
