"""report.py: a table of eval.py's result files, or a comparison of two models.

    python -m tools.report runs/eval-X/*.jsonl            # a row per result file, and their mean
    python -m tools.report --compare A.jsonl B.jsonl      # the same questions: B minus A

runtime/results.py explains the numbers.
"""

import runtime  # isort: split

import sys
from pathlib import Path

from runtime.cli import Parser, UserError, stop_on_user_error
from runtime.results import compare, read_results, results_table


def main(argv: list[str]) -> None:
    parser = Parser(
        "-m tools.report",
        "A table of eval.py's result files, or a comparison of two.",
        "python -m tools.report --compare runs/A/aime24.jsonl runs/B/aime24.jsonl",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="two files of the same questions: the second minus the first",
    )
    args = parser.parse_args(argv)
    if args.compare and len(args.files) != 2:
        raise UserError(f"--compare: takes two result files, got {len(args.files)}")
    files = [
        read_results(path) for path in (args.files if args.compare else dict.fromkeys(args.files))
    ]
    print(compare(*files) if args.compare else results_table(files))


if __name__ == "__main__":
    with stop_on_user_error("tools.report"):
        main(sys.argv[1:])
