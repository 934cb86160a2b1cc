"""programs.py: the toy's problems, straight-line programs modulo 10, and the teacher that solves
them (toy/README.md)."""

import random
from collections.abc import Iterator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPS = {
    "+": lambda x, y: (x + y) % 10,
    "-": lambda x, y: (x - y) % 10,
    "*": lambda x, y: (x * y) % 10,
}


def toy_program(
    n_vars: int,
    rng: random.Random,
    hub: int | None = None,
    pull: float = 0.8,
    constant: bool = True,
) -> str:
    """One program as text, e.g. "a=3;b=a+4;c=a*b;?c": n_vars assignments, then the question for the
    last variable.

    One variable, the fourth or a later one, is a "hub": a constant that each later line uses with
    probability `pull`. So steps differ in how much of the rest depends on them, and the earliest
    steps are not the most important ones: FCI should find this. (toy/build.py uses other hubs in
    its first stage.)
    """
    if hub is None:
        hub = rng.randrange(3, max(4, n_vars // 2 + 1))
    lines = [f"a={rng.randrange(10)}"]
    for i in range(1, n_vars):
        first, second = i - 1, rng.randrange(i)
        if i > hub:
            first = rng.choices(
                [hub, i - 1, rng.randrange(i)], [pull, (1 - pull) * 2 / 3, (1 - pull) / 3]
            )[0]
            second = rng.choice([hub, second])
        operand = LETTERS[second] if rng.random() < 0.5 else str(rng.randrange(10))
        expression = f"{LETTERS[first]}{rng.choice('+-*')}{operand}"
        lines.append(f"{LETTERS[i]}={rng.randrange(10) if constant and i == hub else expression}")
    return ";".join(lines) + f";?{LETTERS[n_vars - 1]}"


def toy_solution(program: str, slip: float = 0.0, rng: random.Random | None = None) -> str:
    r"""The teacher's response: one step "b=3+4=7" and a blank line per variable, then "\boxed{7}".

    With probability `slip` a step's result is replaced by a wrong digit, and later steps use it.
    This teacher knows how to solve every program but slips; reinforcement learning can correct that
    in minutes.
    >>> toy_solution("a=3;b=a+4;?b")
    'a=3\n\nb=3+4=7\n\n\\boxed{7}'
    """
    values: dict[str, int] = {}
    steps = []
    *lines, question = program.split(";")
    for line in lines:
        name, _, expression = line.partition("=")
        filled = "".join(str(values[c]) if c in values else c for c in expression)
        values[name] = (
            int(filled) if len(filled) == 1 else OPS[filled[1]](int(filled[0]), int(filled[2]))
        )
        if slip and rng.random() < slip:
            values[name] = (values[name] + rng.randrange(1, 10)) % 10
        steps.append(
            f"{name}={values[name]}" if len(filled) == 1 else f"{name}={filled}={values[name]}"
        )
    return "\n\n".join([*steps, rf"\boxed{{{values[question[1]]}}}"])


def toy_set(source: str) -> Iterator[tuple[str, str]]:
    """(program, answer) pairs for "toy[:VARIABLES[:COUNT[:SEED]]]"; no program twice. VARIABLES is
    a number, or a range such as 8-10 for programs of mixed difficulty. Raises ValueError."""
    given = source.split(":")[1:]
    lengths, count, seed = given + ["8", "2000", "0"][len(given) :]
    low, high = [int(part) for part in lengths.split("-")] if "-" in lengths else [int(lengths)] * 2
    count, seed = int(count), int(seed)
    # a set is held in memory
    if not (4 <= low <= high <= 26 and 1 <= count <= 10**6 and seed >= 0):
        raise ValueError(source)
    rng = random.Random(f"toy/{lengths}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        program = toy_program(low if low == high else rng.randint(low, high), rng)
        if program not in seen:
            seen.add(program)
            yield program, toy_solution(program).rsplit("{")[-1].rstrip("}")
