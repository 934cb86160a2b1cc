r"""word_problems.py: word problems whose steps depend on each other in a known way.

    python recipes/word_problems.py train.jsonl --count 2000 --people 5-10 --part train
    python recipes/word_problems.py test.jsonl --count 200 --people 5-10 --part test

A problem of four people, its statements shuffled:

    Emma has twice as many coins as Leo. Anna has 4 coins. Ben has as many coins as Anna and Emma
    together. Leo has 3 more coins than Anna. How many coins does Ben have?

and its solution, a paragraph for each person, then the box:

    Anna has 4 coins.                                           depends on nothing
    Leo has 3 more coins than Anna: 4 + 3 = 7.                  on step 0 (Anna)
    Emma has twice as many coins as Leo: 2 * 7 = 14.            on step 1 (Leo)
    Ben has as many coins as Anna and Emma together: 4 + 14 = 18.  on 0 and 2
    \boxed{18}

A row has "problem", "answer", "solution", and for experiments/what_fci_finds.py "steps" (the
paragraphs without the box) and "depends" (for each step, the earlier steps that it needs). More of
the later people depend on one person, the hub, than on others, so steps at the same place can
differ in influence. All numbers are from 2 to 50.

--part: `warm` for supervised learning, `train` for RL, `test`. Each has its own names. The test has
its own things and structures (who depends on whom, and how), too: a fifth of all structures.

    python -m pytest tests/test_word_problems.py
"""

import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.cli import Parser, UserError, reason, stop_on_user_error

MOST = 20  # people of a problem
SMALLEST, LARGEST = 2, 50  # 1 would be "1 coins"
PARTS = ("warm", "train", "test")
# With few names a model would learn them by heart, not copy. After the warm-up it still puts the
# warm-up's names in the place of new ones; so RL trains on names as new to it as those of the test.
NAMES = {
    "warm": """
    Abigail Adam Adrian Agnes Albert Alfred Amanda Amir Amy Andrea Andrew Angela Anita Anna
    Anton Arthur Astrid Audrey Barbara Beatrice Bella Ben Bernard Bianca Brandon Brenda Brian
    Camila Carl Carla Carmen Caroline Cecilia Charles Charlotte Chloe Chris Christina Claire
    Claude Colin Connor Daisy David Dean Deborah Dennis Derek Diana Dominic Donald Dora Dorothy
    Douglas Dylan Edgar Edith Edward Eileen Eli Elisa Ellen Elliot Elsa Emil Emily Emma Eric
    Erica Ernest Esther Ethan Eva Evan Evelyn Felix Fiona Flora Florence Francis Fred Gabriel
    George Gerald Gilbert Gloria Gordon Grace Greg Greta Gustav Hannah Harold Harry Harvey
    Heather Hector Helen Henry Herbert Hilda Holly Howard Ian Igor Ingrid Irene Iris Isaac
    Isabel Ivan Ivy Jack Jacob James Jamie Jane Janet Jason Jasmine Jasper Jean Jeff Jenna Jerry
    Jessica Jill Joan Joel John Jonas Joseph Joyce Judith June Justin Karen Kate Keith Kelly
    Kevin Kim Kurt Lars Leah Leo Leon Lily Lisa Logan Louis Lucas Lucy Luna Lydia Mabel Magnus
    Maggie Marco Margaret Maria Marie Marion Martha Martin Mary Mason Matilda Matt Max Maya
    Megan Mia Michael Milan Mildred Miles Milo Molly Monica Morris Nadia Naomi Nathan Neil Nelly
    Nicholas Noah Noel Norman Olga Oliver Olivia Omar Oscar Owen Pamela Patricia Paul Paula
    Pearl Penny Percy Philip Phoebe Priya Quinn Rachel Ralph Ray Rebecca Regina Rita Roger
    Roland Roman Ronald Rosa Rose Ruby Rudolf Rupert Ruth Ryan Sally Sam Samira Sandra Sean
    Selma Sheila Silvia Simon Stanley Stella Steve Susan Sven Sylvia Tamara Tanya Tara Terry
    Thelma Thomas Tina Toby Todd Tracy Trevor Tristan Ursula Valerie Victor Vincent Viola Violet
    Vivian Wade Wallace Walter Wanda Wayne Wendy Wesley Wilma Yusuf Yvonne Zach Zara
    """,
    "train": """
    Aaron Alan Alec Alexis Alfie Allison Alma Alvin Amelia Amos Angus Annie April Ariel Arnold
    Asher Ashley Barry Basil Becky Belinda Benny Bert Beth Betty Billy Blake Bob Bonnie Boris
    Brad Brent Brett Bridget Bryce Byron Caleb Calvin Candice Carol Casey Cathy Cedric Celia
    Chad Chester Cindy Clark Clay Cliff Clive Cody Cole Cora Craig Curtis Cynthia Dale Damian
    Dana Darren Dave Dawn Debbie Della Denise Dexter Dinah Dolly Doris Doug Drew Duncan Dustin
    Dwight Earl Eddie Edna Edwin Elaine Eleanor Ella Elias Elmer Eloise Erin Ernie Estelle
    Eugene Eunice Fay Fern Fletcher Floyd Frances Franklin Freya Gail Garry Gavin Gene Gerard
    Gemma Georgia Ginger Glen Gwen Hank Hans Harriet Hazel Heidi Hope Hubert Imogen Irma Irving
    Jackie Jake Jared Jay Jed Jenny Jeremy Jesse Jim Jimmy Joanna Jodie Joe Jordan Josie Joshua
    Joy Juan Judy Julian Juliet Kara Kathy Katie Kay Ken Kenneth Kent Kirk Kyle Lana Lance Lara
    Larry Lauren Lawrence Lena Leonard Leslie Levi Lewis Libby Lionel Liz Lloyd Lois Lola Lorna
    Lou Luke Luther Lynn Mandy Marcus Margot Marvin Maureen Mavis Melanie Melvin Mickey Mitchell
    Mona Muriel Myra Nancy Natalie Ned Nick Nicole Nigel Nolan Norma Oleg Olive Oswald Pablo
    Paige Pam Patsy Patty Pedro Peggy Perry Phil Phyllis Polly Preston Ramona Randy Raymond
    Reggie Rex Rhoda Ricardo Richard Rick Robin Rodney Ron Roy Rufus Russell Sabrina Sadie Sarah
    Saul Scott Serena Seth Shane Shannon Sharon Shawn Sidney Sonia Sophie Spencer Stacy Stefan
    Stuart Sue Sybil Ted Teresa Tiffany Timothy Tony Trudy Tyler Vanessa Vernon Vicky Virginia
    Warren Wilbur Willa Winston Xavier Yvette
    """,
    "test": """
    Laura Mark Nina Petra Sofia Tom Vera Will Alice Bruno Clara Daniel Elena Frank Gina Hugo
    Julia Karl Linda Mike Nora Otto Pia Robert Sara Theo Uma Zoe Rosie Peter
    """,
}
THINGS = {
    False: "coins books apples cards stamps shells pens marbles dolls plums rings hats kites"
    " boxes keys eggs cups maps lemons balls toys bricks candles ribbons nuts leaves pears pins"
    " socks tickets",
    True: "beads stickers oranges buttons stones flowers",
}


def word_problem(people: int, rng: random.Random, part: str = "warm") -> dict:
    """One problem as a row (see above). part: one of PARTS."""
    test = part == "test"
    while True:
        names = rng.sample(NAMES[part].split(), people)
        thing = rng.choice(THINGS[test].split())
        said, steps, values, depends = statements(names, thing, rng, test)
        if all(SMALLEST <= value <= LARGEST for value in values):
            break
    rng.shuffle(said)
    return {
        "problem": f"{' '.join(said)} How many {thing} does {names[-1]} have?",
        "answer": str(values[-1]),
        "solution": "\n\n".join([*steps, rf"\boxed{{{values[-1]}}}"]),
        "steps": steps,
        "depends": depends,
    }


def statements(names: list[str], thing: str, rng: random.Random, test: bool) -> tuple:
    """(statement about each person, its step in the solution, the values, the dependencies)."""
    kinds, depends = structure(len(names), rng, test)
    said, steps, values = [], [], []
    for name, kind, needs in zip(names, kinds, depends):
        others = [(names[k], values[k]) for k in needs]
        text, worked, value = relation(kind, thing, others, rng)
        said.append(f"{name} has {text}.")
        steps.append(f"{name} has {text}{worked}.")
        values.append(value)
    return said, steps, values, depends


def structure(people: int, rng: random.Random, test: bool) -> tuple[list[str], list[list[int]]]:
    """(kind of each statement, the earlier people that it names)."""
    while True:
        hub = rng.randrange(max(1, people - 2))
        kinds, depends = ["number"], [[]]
        for i in range(1, people):
            kind = rng.choices(["number", "more", "fewer", "twice", "sum"], [1, 3, 3, 1, 2])[0]
            if i == people - 1 and kind == "number" or i == 1 and kind == "sum":
                kind = "more"
            choices = [hub if hub < i else i - 1, i - 1, rng.randrange(i)]
            first = rng.choices(choices, [4, 3, 3])[0]
            needs = [] if kind == "number" else [first]
            if kind == "sum":
                needs = sorted([first, rng.choice([k for k in range(i) if k != first])])
            kinds.append(kind)
            depends.append(needs)
        if is_for_tests(kinds, depends) == test:
            return kinds, depends


def is_for_tests(kinds: list[str], depends: list[list[int]]) -> bool:
    return zlib.crc32(repr((kinds, depends)).encode()) % 5 == 0


def relation(kind: str, thing: str, others: list, rng) -> tuple[str, str, int]:
    """(what a person has according to the problem, how it is calculated, the number). others: the
    (name, number) of each person that is named."""
    number = rng.randrange(2, 10)
    if kind == "number":
        return f"{number} {thing}", "", number
    other, known = others[0]
    if kind == "more":
        text, sign = f"{number} more {thing} than {other}", "+"
    elif kind == "fewer":
        text, sign = f"{number} fewer {thing} than {other}", "-"
    elif kind == "twice":
        text, sign, number, known = f"twice as many {thing} as {other}", "*", known, 2
    else:
        second, number = others[1]
        text, sign = f"as many {thing} as {other} and {second} together", "+"
    value = {"+": known + number, "-": known - number, "*": known * number}[sign]
    return text, f": {known} {sign} {number} = {value}", value


def word_problems(people: str, count: int, seed: int, part: str = "warm") -> Iterator[dict]:
    """`count` different rows; people: "10" or "5-10", drawn uniformly; part: one of PARTS."""
    low, high = bounds_of(people)
    rng, seen = random.Random(f"{people}:{seed}:{part == 'test'}"), set()
    while len(seen) < count:
        row = word_problem(rng.randint(low, high), rng, part)
        if row["problem"] not in seen:
            seen.add(row["problem"])
            yield row


def bounds_of(people: str) -> tuple[int, int]:
    """The lowest and highest number of people. Raises UserError."""
    low, _, high = people.partition("-")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = 0, 0
    if not 3 <= found[0] <= found[1] <= MOST:
        raise UserError(f"people {people!r}: write 10 or 5-10, from 3 to {MOST}")
    return found


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSONL. Raises UserError."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({reason(error)})") from error


def main(argv: list[str]) -> None:
    parser = Parser(
        "recipes/word_problems.py",
        "Write word problems with known dependencies as JSONL.",
        "python recipes/word_problems.py train.jsonl --count 2000 --people 5-10",
    )
    add = parser.add_argument
    add("out", type=Path, help="the file to write")
    add("--count", type=int, default=1000, help="problems")
    add("--people", default="5-10", help="people per problem: 10, or 5-10")
    add("--seed", type=int, default=1, help="another seed gives other problems")
    what = "other names in each; test: other things and structures, too"
    add("--part", choices=PARTS, default="warm", help=what)
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    rows = word_problems(args.people, args.count, args.seed, args.part)
    write_rows(args.out, rows)
    print(f"{args.count} problems of {args.people} people: {args.out}")


if __name__ == "__main__":
    with stop_on_user_error("recipes/word_problems.py"):
        main(sys.argv[1:])
