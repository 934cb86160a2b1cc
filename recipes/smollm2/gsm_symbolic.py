"""gsm_symbolic.py: GSM-Symbolic word problems of the package reasoning-gym as a problem file.

    pip install reasoning-gym
    python recipes/smollm2/gsm_symbolic.py gsm.jsonl --count 200

Templates of GSM8K with other names and numbers (Mirzadeh et al., arXiv 2410.05229), a well-known
benchmark. Rows have "problem", "answer" and "solution", a worked solution that ends in a box.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.word_problems import write_rows
from runtime.cli import Parser, UserError, stop_on_user_error


def problem_of(row: dict) -> dict:
    """A row in our format: GSM8K's last line, "#### 288", becomes a box."""
    worked, _, _ = row["metadata"]["answer_cot"].rpartition("####")
    solution = f"{worked.strip()}\n\n\\boxed{{{row['answer']}}}"
    return {"problem": row["question"], "answer": row["answer"], "solution": solution}


def main(argv: list[str]) -> None:
    example = "python recipes/smollm2/gsm_symbolic.py gsm.jsonl --count 200"
    parser = Parser("recipes/smollm2/gsm_symbolic.py", "Write GSM-Symbolic problems.", example)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--count", type=int, default=200, help="problems")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other problems")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"pip install reasoning-gym, then the same again ({error})") from error
    rows = reasoning_gym.create_dataset("gsm_symbolic", size=args.count, seed=args.seed)
    write_rows(args.out, map(problem_of, rows))
    print(f"{args.count} problems: {args.out}")


if __name__ == "__main__":
    with stop_on_user_error("recipes/smollm2/gsm_symbolic.py"):
        main(sys.argv[1:])
