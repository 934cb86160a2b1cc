"""test_view.py: the explorer, what tools/view.py writes, and the page in a real headless Chromium
(Debian: apt install chromium chromium-driver).

Numbers on the page are compared with the run's own files and with tree.py, not with what the page
computed.

    python -m pytest tests/tools/test_view.py
"""

import json
import math
import random
import re
import shutil
import sys
import time

import pytest
from fixtures import lines, save_real_model, typed
from toy_runs import train

from attnrl import Config, parse_config
from runtime.cli import UserError
from tools import view
from tree import fci_threshold, step_advantages

CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\u202eevil\u202c",
    "\x00\x1b[31m",
    "مرحبا بالعالم",
    "中文字符",
    "👩‍👩‍👧 é",
    "&lt;b&gt; ${7*7} {{7*7}}",
    "DATA</",
    "\u2028\u2029",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of AttnRL whose batches shrink and grow, with three problems a step in its log."""
    folder = tmp_path_factory.mktemp("view") / "run <b>"
    return train(
        parse_config(
            [
                *typed(
                    "--steps 4 --batch_size 6 --problems toy:6:50:1 --test_problems toy:6:5:2"
                    " --eval_samples 2 --eval_every 2 --log_samples 3"
                ),
                "--out",
                str(folder),
            ]
        )
    )


def made_up(
    folder,
    responses: list[dict],
    problem: str = "why?",
    answers=("42",),
    steps: int = 1,
    samples: int = 1,
    **settings,
):
    """A run's folder written by hand."""
    folder.mkdir()
    config = vars(Config()) | {"method": "attnrl", "problems": "made up"} | settings
    (folder / "config.json").write_text(json.dumps(config))
    rewards = [e["reward"] for r in responses for e in (r, *r["continuations"])]
    for name, records in {
        "metrics": [
            {
                "step": s,
                "generated_tokens": s,
                "problems": 1,
                "sequences": 9,
                "seconds/total": 1.0,
                "test_accuracy": 0.5,
            }
            for s in range(steps + 1)
        ],
        "batches": [
            {
                "step": s,
                "easy_mean": 0.1,
                "problems": [
                    {
                        "number": 7,
                        "rate": 0.5,
                        "fci": 0.2,
                        "filtered": False,
                        "trees": 1,
                        "leaves": len(rewards),
                        "reward": sum(rewards) / len(rewards),
                    }
                ],
            }
            for s in range(1, steps + 1)
        ],
        "samples": [
            {
                "step": s,
                "number": 7,
                "problem": problem,
                "answers": list(answers),
                "filtered": False,
                "responses": responses,
            }
            for s in range(1, steps + 1)
            for _ in range(samples)
        ],
    }.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
        )
    return folder


def ending(tokens: list[str], reward: float, **more) -> dict:
    n = len(tokens) + more.get("at", 0)
    return {
        "tokens": tokens,
        "logprobs": [-0.1234] * len(tokens),
        "entropies": [0.25] * len(tokens),
        "reward": reward,
        "advantages": [[n, 0.5 if reward else -0.5]],
        **more,
    }


def response(
    tokens: list[str], reward: float, bounds: list[int], at: int, ends: list[dict]
) -> dict:
    return ending(tokens, reward) | {
        "bounds": bounds,
        "fci": [0.0, *(0.1 * k for k in range(1, len(bounds) - 1))],
        "branch_points": [at],
        "continuations": ends,
    }


# --- what is logged, and what is written
# ----------------------------------------------------------------------------------


def test_logged_advantages_are_those_of_the_tree(run):
    """Eq. 2-3 from the logged rewards and positions alone, by tree.step_advantages: the same
    advantages for every token."""
    checked = 0
    for sample in lines(run / "samples.jsonl"):
        wanted = iter(
            step_advantages(
                [
                    {
                        "tokens": r["tokens"],
                        "reward": r["reward"],
                        "continuations": sorted(r["continuations"], key=lambda c: c["at"]),
                    }
                    for r in sample["responses"]
                ]
            )
        )
        for r in sample["responses"]:
            for end in [r, *sorted(r["continuations"], key=lambda c: -c["at"])]:
                tokens, advantages = next(wanted)
                assert tokens == [*r["tokens"][: end.get("at", 0)], *end["tokens"]]
                assert [a for count, a in end["advantages"] for _ in range(count)] == pytest.approx(
                    advantages, abs=1e-12
                )
                checked += 1
        assert next(wanted, None) is None
    assert checked > 100


def test_the_page_holds_the_run_and_nothing_from_elsewhere(run):
    text = view.write_explorer(run).read_text(encoding="utf-8")
    # an SVG namespace, no network
    assert "http://www.w3.org/2000/svg" in text and text.count("://") == 1
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [s["step"] for s in data["steps"]] == [1, 2, 3, 4] and data["total_steps"] == 4
    for record in lines(run / "batches.jsonl"):
        page = data["steps"][record["step"] - 1]
        assert {key: page[key] for key in record} == record and len(page["samples"]) == 3
    r = data["steps"][0]["samples"][0]["responses"][0]
    assert r["threshold"] == fci_threshold(r["fci"], 0.2)


def test_steps_can_be_chosen_and_a_large_run_keeps_the_page_small(tmp_path):
    long = [
        response(
            [f"word{i}\n\n" for i in range(1000)],
            1.0,
            list(range(1001)),
            5,
            [ending(["x"] * 995, 0.0, at=5)],
        )
    ]
    folder = made_up(tmp_path / "run", long, steps=60)
    page = view.write_explorer(folder)
    data = json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    kept = [s["step"] for s in data["steps"]]
    assert (
        page.stat().st_size < 3_000_000
        and 10 < len(kept) < 60
        and kept[0] == 1
        and kept[-1] == 60
        and data["total_steps"] == 60
    )
    # spread over the run
    assert max(b - a for a, b in zip(kept, kept[1:])) <= 2 * math.ceil(60 / len(kept))
    view.write_explorer(folder, [3, 7])
    data = json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert [s["step"] for s in data["steps"]] == [3, 7] and data["total_steps"] == 60
    with pytest.raises(UserError, match="--steps 61"):
        view.write_explorer(folder, [3, 61])


def test_a_run_that_cannot_be_shown_is_one_line(tmp_path, run):
    with pytest.raises(UserError, match="metrics.jsonl"):
        view.write_explorer(tmp_path)
    copy = shutil.copytree(
        run,
        tmp_path / "copy",
        ignore=shutil.ignore_patterns("step-*", "last", "best"),
        symlinks=True,
    )
    for name, words in (
        ("samples", "samples.jsonl, line 13: not a step's record"),
        ("batches", "batches.jsonl, line 5: not a step's"),
    ):
        whole = (copy / f"{name}.jsonl").read_text()
        (copy / f"{name}.jsonl").write_text(
            whole + ('{"step": 4, "pro' if name == "samples" else '{"st')
        )
        with pytest.raises(UserError, match=words):
            view.write_explorer(copy)
        (copy / f"{name}.jsonl").write_text(whole)
    (copy / "batches.jsonl").unlink()
    with pytest.raises(UserError, match="batches.jsonl: does not exist"):
        view.write_explorer(copy)


def test_steps_that_a_run_lacks_are_refused_with_those_it_has_and_what_was_drawn_is_named(
    tmp_path, capsys
):
    folder = made_up(tmp_path / "run", big(leaves=5, length=40), steps=3)
    with pytest.raises(UserError, match=r"--steps 7: .* has no such step \(it has 1 to 3\)"):
        view.main([str(folder), "--steps", "7"])
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "curves.png")


def test_the_table_of_runs_by_hand(tmp_path):
    for name, tested in (("a", (0.5, 0.9, 0.8)), ("b", (0.6, 0.6, 0.7))):
        (tmp_path / name).mkdir()
        rows = [
            {"step": i, "generated_tokens": 10**6 * i, "test_accuracy": x, "seconds/total": 60 * i}
            for i, x in enumerate(tested)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    table = view.runs_table([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert table[2] == "| a | 50.0 | 90.0 | 80.0 | 30.0 | -10.0 | 2.00 | 2.0 |"
    assert table[4] == "| mean | 55.0 | 80.0 | 75.0 | 20.0 | -5.0 | 2.00 | 2.0 |"


def test_runs_are_compared_in_one_figure(run, tmp_path, capsys):
    folder = made_up(tmp_path / "other", big(leaves=5, length=40), steps=3)
    view.main(["--plots", str(folder), str(run), f"{folder}/"])  # given twice, shown once
    said = capsys.readouterr().out.splitlines()
    assert (
        said[-2:] == [str(tmp_path / "compare.png"), str(tmp_path / "compare.svg")]
        and sum(line.startswith("| other") for line in said) == 1
    )
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (
        tmp_path / "compare.svg"
    ).read_text()
    assert not (folder / "explorer.html").exists()
    with pytest.raises(UserError, match="cannot be written"):
        view.draw_comparison([folder], tmp_path / "nowhere" / "compare")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn from here on."""
    drawn = []

    class Remembered(view.Figure):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            drawn.append(self)

    monkeypatch.setattr(view, "Figure", Remembered)
    return drawn


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_curves_of_short_and_long_runs_can_be_read(steps, figures, tmp_path):
    """Every percentage from 0 to 100, whole training steps, no number over another, and something
    to see of a run of one step."""
    short, long = (
        made_up(tmp_path / name, big(leaves=5, length=40), steps=n)
        for name, n in (("short", 1), ("long", steps))
    )
    for folder in (short, long):
        records = lines(folder / "metrics.jsonl")
        for m in records:
            m |= {"initial/valid": 0.4, "filtered_ratio": 0.1, "seconds/step": 7.0}
            m |= {"generated_tokens": 4321 * m["step"], "seconds/generate": 7.0}
        text = "".join(json.dumps(m) + "\n" for m in records)
        (folder / "metrics.jsonl").write_text(text)
    view.draw_curves(long)
    view.draw_comparison([short, long], tmp_path / "compare")
    for figure in figures:
        figure.canvas.draw()
        for axis in figure.axes:
            if "%" in axis.get_title() + axis.get_ylabel():
                assert axis.get_ylim() == (-3, 103)
            if axis.get_xlabel() == "training step":
                low, high = axis.get_xlim()
                assert all(t == round(t) for t in axis.get_xticks() if low <= t <= high)
            boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
            assert not any(a.x1 > b.x0 and a.x0 < b.x0 for a, b in zip(boxes, boxes[1:]))
    valid = figures[1].axes[2].lines
    assert valid[0].get_marker() == "o" and (valid[1].get_marker() == "s") == (steps <= 12)
    assert figures[1].axes[0].get_xlabel() == "generated tokens, thousands"
    assert figures[1].axes[1].get_xlabel() == (
        "minutes of training" if steps == 60 else "seconds of training"
    )
    times = figures[0].axes[3]
    assert len(times.patches) == (0 if steps > 12 else 6 * steps)


# --- in a browser
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chromium():
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium here (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(chromium):
    """open_page(run, place) shows it; after the test the console must be empty."""

    def show(run, place: str = ""):
        chromium.get("about:blank")
        chromium.get(f"{view.write_explorer(run).resolve().as_uri()}{place}")
        return Page(chromium)

    yield show
    assert chromium.get_log("browser") == []


class Page:
    def __init__(self, driver):
        self.driver = driver

    def script(self, code: str):
        return self.driver.execute_script(f"return {code}")

    def text(self, selector: str) -> list[str]:
        return self.script(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
        )

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        self.driver.find_element("tag name", "body").send_keys(*keys)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def branches(response: dict) -> list[dict]:
    """Its continuations in the order of the page: late branches first, so that no line of the tree
    crosses a text."""
    return sorted(response["continuations"], key=lambda c: -c["at"])


def test_numbers_on_the_page_are_the_files(run, open_page):
    """For every logged problem: grade and advantage of every leaf, V and A of every node, FCI of
    every step."""
    samples, nodes = lines(run / "samples.jsonl"), 0
    for n, sample in enumerate(samples):
        page = open_page(run, f"#step={sample['step']}&problem={n % 3}&leaf=0")
        ends = [e for r in sample["responses"] for e in (r, *branches(r))]
        outcomes = page.text(".leaf .outcome")
        assert len(outcomes) == len(ends) and page.text("#question") == [sample["problem"]]
        for shown, end in zip(outcomes, ends):
            assert shown.split()[1] == ("right" if end["reward"] else "wrong")
            assert number(shown.split()[3]) == pytest.approx(end["advantages"][-1][1], abs=0.00501)
        labels = page.script(
            "[...document.querySelectorAll('.node')].map(e => [e.textContent, e.title])"
        )
        drawn = iter(labels)
        root = sum(e["reward"] for e in ends) / len(ends)
        for r in sample["responses"]:
            cuts = [0, *sorted({c["at"] for c in r["continuations"]})]
            for cut in cuts if len(cuts) > 1 else []:
                below = [r["reward"], *(c["reward"] for c in r["continuations"] if c["at"] > cut)]
                label, formula = next(drawn)  # the label as far as it has room, the formula in full
                value, advantage = re.match(r"A = \[\((\S+) .* = (\S+)$", formula).groups()
                assert (
                    label == ""
                    or f"V {value} · A {advantage}".startswith(label)
                    and len(label) >= len(f"V {value}")
                )
                assert number(value) == pytest.approx(sum(below) / len(below), abs=0.00501)
                assert number(advantage) == pytest.approx(
                    advantage_at(r["advantages"], cut), abs=0.00501
                )
                nodes += 1
        assert (
            next(drawn, None) is None
            and any("A" in label for label, _ in labels)
            and f"= {root:.2f}" in page.text("#problem")[0]
        )
        titles = page.script(
            "[...document.querySelectorAll('.leaf.first .step')].map(e => e.what.split('\\n')[0])"
        )
        assert titles == [
            f"step {k}: FCI {y:.4f}" for r in sample["responses"] for k, y in enumerate(r["fci"])
        ]
        marks = page.script("[...document.querySelectorAll('.mark')].map(e => e.title)")
        assert len(marks) == sum(len(r["branch_points"]) for r in sample["responses"]) and all(
            m.startswith("FCI 0.") for m in marks
        )
    assert nodes > 50


def test_pointing_at_a_step_shows_which_later_steps_look_at_it(run, open_page):
    sample = lines(run / "samples.jsonl")[0]
    page, r = open_page(run), sample["responses"][0]
    count, attention = len(r["fci"]), r["attention"]
    assert len(page.text("#attention .cell")) == count * (count + 1) // 2
    for k in range(count - 1):
        page.script(
            f"document.querySelectorAll('#leaf-0 .step')[{k}].dispatchEvent("
            "new MouseEvent('mouseover', {bubbles: true}))"
        )
        shown = page.text(".lookers > div")
        assert shown == [
            f"{attention['deciding'][j][k]} from step {j}" for j in range(k + 1, count)
        ]
        layer, head = attention["heads"][k]
        assert (
            f"FCI {r['fci'][k]:.4f}, decided by layer {layer}, head {head}"
            in page.text("#looked")[0]
        )
        lit = page.script("[...document.querySelectorAll('#leaf-0 .step.lit')].map(e => e.k)")
        assert lit == list(range(k + 1, count))
        # Eq. 5: what is shown adds up to the score (Delta = 1; two digits of each are shown)
        if k:
            assert sum(float(x.split()[0]) for x in shown) == pytest.approx(r["fci"][k], rel=0.05)
    page.script("document.querySelectorAll('#attention button')[1].click()")
    words = page.script("document.querySelector('#attention .cell:nth-child(2)').what")
    assert words == f"step 1 looks at step 0: {attention['most'][1][0]}"
    page.click("#leaf-1 .outcome")  # a continuation: FCI is measured for initial responses
    assert not page.text("#attention")


def advantage_at(runs: list[list], token: int) -> float:
    return [a for count, a in runs for _ in range(count)][token]


def test_the_batch_its_filter_and_the_formulas(run, open_page):
    metrics, sized = lines(run / "metrics.jsonl"), 0
    for record in lines(run / "batches.jsonl"):
        page = open_page(run, f"#step={record['step']}")
        rows = page.text("#batch tbody td")
        assert len(rows) == 10 * len(record["problems"])
        for i, p in enumerate(record["problems"]):
            name, z, fci, expanded, trees, leaves, right, *_ = rows[10 * i : 10 * i + 10]
            assert (int(name), int(trees), int(leaves)) == (p["number"], p["trees"], p["leaves"])
            assert float(z) == pytest.approx(p["rate"], abs=0.00501) and float(
                fci
            ) == pytest.approx(p["fci"], abs=0.0000501)
            assert expanded.startswith("filtered") == p["filtered"] and float(
                right
            ) == pytest.approx(100 * p["reward"], abs=0.501)
        shown = page.text("#sizes")[0]
        # the formula's result is the size that the run really took
        if record["step"] + 2 < len(metrics):
            assert f", rounded {metrics[record['step'] + 2]['problems']}: " in shown
            sized += 1
    assert sized == 2
    assert page.script("[1, 0, 0.7, 0.4].map(x => verdict({reward: x}).textContent)") == [
        "✓ right",
        "✗ wrong",
        "✓ 0.70",
        "✗ 0.40",
    ]
    row = {
        "number": 7,
        "rate": 1.0,
        "fci": 0.05,
        "filtered": True,
        "trees": 0,
        "leaves": 6,
        "reward": 1.0,
    }
    words = page.script(f"whyExpanded({json.dumps(row)})")
    assert (
        len(words) == 1
        and "filtered, not expanded (Eq. 8)" in words[0]
        and "mean FCI 0.0500 is below" in words[0]
    )
    assert (
        "Round(6 · exp(−0.50)) = Round(3.64) = 4 (Eq. 9): that many responses are branched, wrong"
        " ones first."
        in page.script(f"whyExpanded({json.dumps(row | dict(rate=0.5, filtered=False))})")[1]
    )
    row |= dict(outcomes={"right": 6}, rate=0.0, filtered=False)
    said = "All 6 leaves are right: every advantage is 0, and none of them is trained."
    assert page.script(f"whyExpanded({json.dumps(row)})")[-1] == said
    mixed = row | dict(outcomes={"right": 5}, reward=0.9)
    assert "All 6" not in page.script(f"whyExpanded({json.dumps(mixed)})")[-1]
    few = row | dict(trees=2)  # Eq. 9 wants 6
    assert "2 of them could be" in page.script(f"whyExpanded({json.dumps(few)})")[1]
    assert "could be" not in page.script(f"whyExpanded({json.dumps(row | dict(trees=6))})")[1]
    assert page.script("[fixed(97.25, 1), fixed(-0.5, 2)]") == [f"{97.25:.1f}", "−0.50"]
    rule = (
        "(() => { config.branch = 'mine'; return whyBranch({bounds: [0, 3], fci: [0, 1]}, 3); })()"
    )
    assert page.script(rule) == "chosen by --branch mine"


def test_clicking_a_branch_shows_its_continuation(run, open_page):
    sample = lines(run / "samples.jsonl")[0]
    page = open_page(run)
    n = 0
    for r in sample["responses"]:
        for end in [r, *branches(r)]:
            page.click(f"#leaf-{n} .outcome")
            tokens = [*r["tokens"][: end.get("at", 0)], *end["tokens"]]
            assert "".join(page.text("#leaf .tokens")).replace("⏎", "\n").replace(
                "\n\n\n", "\n\n"
            ) == "".join(tokens)
            assert len(page.text("#leaf .part.kept [data-t]")) == end.get("at", 0) and page.text(
                "[aria-selected=true].leaf"
            )
            assert f"{len(tokens)} tokens" in page.text("#leaf .row")[0]
            ends = [
                0,
                *sorted({c["at"] for c in r["continuations"] if c["at"] <= end.get("at", 10**6)}),
                len(tokens),
            ]
            cells = page.text("#leaf td")  # tokens, V and A of every node on the way to this leaf
            assert cells[::3] == [f"{a} to {b - 1}" for a, b in zip(ends, ends[1:])]
            assert number(cells[-2]) == end["reward"] or not end.get("at")
            for cell, first in zip(cells[2::3], ends):
                theirs = advantage_at(end["advantages"], first)
                assert number(cell.split(" = ")[-1]) == pytest.approx(
                    theirs, abs=0.00501
                ) and cell.startswith("A = [(")
            n += 1
    last = page.script(
        "(() => { const e = document.querySelector('#leaf [data-t=\"2\"]'); tip({target: e});"
        " return document.getElementById('tip').textContent; })()"
    )
    assert (
        f"log-prob {r['logprobs'][2]:.4f}".replace("-", "−").replace("log−", "log-") in last
        and f"entropy {r['entropies'][2]:.4f}" in last
    )


def test_keys_slider_and_address(run, open_page):
    from selenium.webdriver.common.keys import Keys

    page = open_page(run, "#step=2&problem=1&leaf=3")
    assert page.script("[step().step, state.problem, state.leaf]") == [2, 1, 3]
    page.press(Keys.ARROW_DOWN)
    page.press("]")
    assert page.script("[step().step, state.problem, state.leaf]") == [2, 2, 0]
    page.press(Keys.ARROW_RIGHT)
    assert page.script("location.hash") == "#step=3&problem=0&leaf=0" and page.text("#now")[
        0
    ].startswith("step 3")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.script("step().step") == 4  # the end
    page.driver.find_element("id", "slider").send_keys(Keys.HOME)
    assert page.script("step().step") == 1
    page.press("c")
    assert page.text("#leaf > .row button[aria-pressed=true]") == ["log-prob"]
    page.click("#batch tr.open:nth-child(2)")
    assert page.script("state.problem") == 1
    # no part of the page keeps the keyboard, and none loses it: a button that was drawn anew has
    # the focus again
    page.script("document.querySelector('#batch tr.open').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.script("document.activeElement === document.querySelectorAll('#batch tr.open')[1]")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.script("state.problem") == 1 and page.script(
        "document.activeElement.closest('#batch') !== null"
    )
    page.script("document.querySelectorAll('#tabs button')[2].focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert (
        page.script("state.problem") == 2
        and page.script("document.activeElement.textContent")
        == page.text("#tabs [aria-selected=true]")[0]
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "grpo", "--grpo_samples", "4"],
        ["--method", "prl", "--grpo_samples", "4"],
        ["--method", "treerl"],
        ["--branch", "random", "--log_samples", "0"],
    ],
    ids=lambda o: "-".join(o),
)
def test_every_method_can_be_seen(options, open_page, tmp_path):
    run = train(
        parse_config(
            [
                *typed(
                    "--steps 1 --batch_size 2 --problems toy:6:50:1 --test_problems toy:6:2:2"
                    " --eval_samples 1"
                ),
                "--out",
                str(tmp_path / "run"),
                *options,
            ]
        )
    )
    page = open_page(run)
    leaves = (
        [
            e
            for s in lines(run / "samples.jsonl")[:1]
            for r in s["responses"]
            for e in (r, *r["continuations"])
        ]
        if "0" not in options
        else []
    )
    assert len(page.text(".leaf")) == len(leaves) and len(page.text("#batch tbody tr")) == 2
    if "log_samples" not in options[-2]:
        assert page.text("#what") == (
            ["The tree"] if options[-1] == "treerl" else ["The responses"]
        )
    if options[-1] == "treerl":
        assert "entropy" in page.script("document.querySelector('.mark').title")
        sample = lines(run / "samples.jsonl")[0]
        ends = [(r, c) for r in sample["responses"] for c in (None, *branches(r))]
        for n, (r, c) in enumerate(ends):
            page.script(f"go({{leaf: {n}}})")
            points = [at for at in r["branch_points"] if c is None or at < c["at"]]
            assert len(page.text("#leaf i.at")) == len(points), "a branch point inside a step"
            assert sum(text.count("entropy ") for text in page.text("#leaf .part .soft")) == len(
                points
            )
            if c is not None:
                step = max(k for k, bound in enumerate(r["bounds"][:-1]) if bound <= c["at"])
                inside = "" if c["at"] in r["bounds"] else f", token {c['at']}"
                assert page.text("#leaf b")[0].endswith(f" from step {step}{inside}")
        assert "one update earlier" not in page.script(
            "document.querySelector('#leaf .kept i').what"
        )


def short_run(folder, *options):
    """A real run of two problems a step, both logged."""
    command = typed(
        "--steps 1 --batch_size 2 --problems toy:6:50:1 --test_problems toy:6:2:2 --eval_samples 1"
    )
    return train(parse_config([*command, "--out", str(folder), *options]))


def letters(text: str) -> str:
    """Without white space, its signs, and what the page names instead of obeying."""
    odd = "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    return re.sub(rf"‹[0-9a-f]{{4}}›|[\s⏎·{odd}]", "", text)


def check_page(open_page, run) -> None:
    """Every logged problem is shown whole: a line a leaf, each leaf's text, and no number that is
    none."""
    for sample in lines(run / "samples.jsonl"):
        page = open_page(run, f"#step={sample['step']}")
        page.script(
            f"go({{problem: step().samples.findIndex(s => s.number === {sample['number']})}})"
        )
        assert page.text("#question") == [sample["problem"]]
        ends = [(r, e) for r in sample["responses"] for e in (r, *branches(r))]
        assert len(page.text(".leaf .outcome")) == len(ends)
        for n, (r, end) in enumerate(ends):
            page.script(f"go({{leaf: {n}, all: true}})")
            whole = "".join([*r["tokens"][: end.get("at", 0)], *end["tokens"]])
            assert letters("".join(page.text("#leaf .tokens"))) == letters(whole)
            assert page.text("#leaf .part"), "no step is shown"
        words = page.script("document.querySelector('main').textContent")
        assert not re.search(r"undefined|NaN|null|\[object", words)


def test_a_run_whose_steps_all_score_0_is_shown_with_the_reason(open_page, tmp_path):
    """`threshold` is null then: no step reached one."""
    run = short_run(tmp_path / "run", "--delta", "8")
    check_page(open_page, run)
    marks = open_page(run).script("[...document.querySelectorAll('.mark')].map(e => e.title)")
    assert marks and all(
        mark.startswith("every step scores 0: the earliest steps are taken (FCI counts attention")
        for mark in marks
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "options, words",
    [
        ("--branch fci_mean", "FCI as a mean over later steps \\d\\.\\d{3}, rank 1 of"),
        ("--branch fixed", "one of the equally spaced steps"),
        ("--branch earliest", "one of the earliest steps after the first"),
        ("--method datpo", "mean entropy \\(nats\\) \\d\\.\\d{3}, rank 1 of"),
    ],
)
def test_every_forking_rule_says_why(options, words, open_page, tmp_path):
    run = short_run(tmp_path / "run", *typed(options))
    check_page(open_page, run)
    page = open_page(run)
    marks = page.script("[...document.querySelectorAll('.mark')].map(e => e.title)")
    assert any(re.match(words, mark) for mark in marks), marks
    formulas = page.script("[...document.querySelectorAll('.node')].map(e => e.title)")
    local = re.compile(r"A = [−\d.]+ − [−\d.]+ = [+−\d.]+")  # DATPO's: no root, no square root
    assert all(bool(local.fullmatch(f)) == ("datpo" in options) for f in formulas) and formulas


def test_responses_that_are_cut_off_in_their_first_step_are_shown(open_page, tmp_path):
    """No blank line, no box, no branch point, no tree; all wrong."""
    run = short_run(tmp_path / "run", "--max_response", "3")
    assert all(len(r["bounds"]) == 2 for s in lines(run / "samples.jsonl") for r in s["responses"])
    check_page(open_page, run)


def real_run(folder, tokens: int, *options):
    """A random model with a byte-level tokenizer: half characters, stray newlines, cut off."""
    problems = folder / "problems.jsonl"
    model = save_real_model(folder / "model")
    problems.write_text(json.dumps({"problem": "1 < 2?\n\nWhy, & é?", "answer": "42"}) + "\n")
    files = ["--model", model, "--problems", problems]
    more = ["--preset", "toy", "--max_response", tokens, "--batch_size", 1, *options]
    return short_run(folder / "run", *map(str, [*files, *more]))


def test_a_real_tokenizer_and_its_steps_are_shown(open_page, tmp_path):
    run = real_run(tmp_path, 80)
    check_page(open_page, run)
    cut = [
        c["bounds"]
        for s in lines(run / "samples.jsonl")
        for r in s["responses"]
        for c in r["continuations"]
    ]
    assert all(b == sorted(set(b)) and len(b) > 1 for b in cut)


# The other states that a run may be in, each trained for real
@pytest.mark.full
@pytest.mark.parametrize("reward", ["1.0", "0.0", "0.3"])
def test_batches_that_agree_are_shown(reward, open_page, tmp_path, monkeypatch):
    """All right, all wrong, and grades between."""
    (tmp_path / "grade_all.py").write_text(f"def reward(response, answers):\n    return {reward}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "grade_all", raising=False)
    check_page(open_page, short_run(tmp_path / "run", "--reward", "grade_all:reward"))


@pytest.mark.full
@pytest.mark.parametrize("method", ["grpo", "prl", "treerl"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_every_method_with_a_real_tokenizer(method, tokens, open_page, tmp_path):
    check_page(open_page, real_run(tmp_path, tokens, "--method", method))


def test_a_number_that_is_missing_is_a_dash(open_page, tmp_path):
    """NaN is not JSON: the whole page was empty. Files of other versions lack fields."""
    folder = made_up(tmp_path / "run", big(leaves=5, length=80))
    for name, key in (("metrics", "test_accuracy"), ("batches", "easy_mean")):
        file = folder / f"{name}.jsonl"
        file.write_text(re.sub(rf'"{key}": [0-9.]+', f'"{key}": NaN', file.read_text()))
    file = folder / "samples.jsonl"
    file.write_text(re.sub(r'"reward": [0-9.]+', '"reward": NaN', file.read_text()))
    page = open_page(folder)
    assert len(page.text(".leaf")) == 5 and "–" in page.text(".leaf .outcome")[0]
    assert "NaN" not in page.script("document.body.innerText")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (dict(reward=1.0, boxed=True, finished=True), "✓ right"),
        (dict(reward=0.0, boxed=True, finished=True), "✗ wrong"),
        (dict(reward=0.0, boxed=False, finished=True), "✗ no box"),
        (dict(reward=0.0, boxed=False, finished=False), "✗ cut off"),
        (dict(reward=0.0, boxed=True, finished=False), "✗ wrong, cut off"),
        (dict(reward=1.0, boxed=True, finished=False), "✓ right, cut off"),
        (dict(reward=0.2, boxed=False, finished=False), "✗ 0.20, no box, cut off"),
        (dict(reward=0.0), "✗ wrong"),  # a run of a version that did not log them
    ],
)
def test_a_leaf_says_why_its_reward_is_0(end, words, run, open_page):
    page = open_page(run)
    assert page.script(f"verdict({json.dumps(end)}).textContent") == words


def test_the_batch_says_why_its_reward_is_0(run, open_page, tmp_path):
    """Counted here from the logged trees (--log_samples: all), not from what the page was given."""
    folder = short_run(tmp_path / "run", *typed("--max_response 40 --log_samples 9"))
    kinds = dict.fromkeys(["right", "none", "cut", "wrong"], 0)
    for sample in lines(folder / "samples.jsonl"):
        for end in [e for r in sample["responses"] for e in (r, *r["continuations"])]:
            kind = "right" if end["reward"] else "wrong" if end["boxed"] else "none"
            kinds[kind] += 1
            kinds["cut"] += kind == "none" and not end["finished"]
    leaves = sum(kinds.values()) - kinds["cut"]
    assert kinds["cut"] and open_page(folder).text("#came") == [
        "Of {} leaves {right} are right, {none} have no box ({cut} of them cut off), {wrong} are"
        " wrong.".format(leaves, **kinds)
    ]
    old = made_up(tmp_path / "old", big(leaves=5, length=40))
    assert open_page(old).text("#came") == [""]


def test_hostile_and_foreign_text_is_shown_harmlessly(open_page, tmp_path):
    tokens = [piece + "\n\n" for piece in HOSTILE]
    folder = made_up(
        tmp_path / "run",
        [
            response(
                tokens,
                1.0,
                list(range(len(tokens) + 1)),
                2,
                [ending(tokens[2:], 0.0, at=2, bounds=list(range(2, len(tokens) + 1)))],
            )
        ],
        problem="\n".join(HOSTILE),
        answers=HOSTILE,
    )
    for place in ("", "#step=1&problem=0&leaf=1"):
        page = open_page(folder, place)
        assert (
            page.script("document.title") == "attnrl: run"
            and page.script(
                "document.querySelectorAll('img, #leaf script, #problem script').length"
            )
            == 0
        )
        seen = page.text("#leaf .tokens")
        assert (
            len(seen) == len(HOSTILE)
            and seen[0].startswith(HOSTILE[0])
            and seen[1].startswith(HOSTILE[1])
        )
        assert (
            seen[2].startswith("‹202e›evil‹202c›")
            and seen[3].startswith("‹0000›‹001b›[31m")
            and seen[9].startswith("‹2028›‹2029›")
        )
        assert (
            seen[4].startswith(HOSTILE[4])
            and seen[5].startswith(HOSTILE[5])
            and seen[7].startswith(HOSTILE[7])
        )
        assert (
            page.script("getComputedStyle(document.querySelectorAll('#leaf .tokens')[4]).direction")
            == "rtl"
        )


def big(leaves: int = 30, length: int = 2000) -> list[dict]:
    """Six responses of `length` tokens in steps of 40, each with four continuations from two branch
    points."""
    rng = random.Random(0)

    def words(n):
        return [
            (
                rng.choice(["the ", "sum ", "is ", "x^2 ", "therefore ", "\\frac{1}{2} "])
                if (i + 1) % 40
                else "so.\n\n"
            )
            for i in range(n)
        ]

    def end(n, **more):
        return {
            "tokens": words(n),
            "logprobs": [round(-rng.random(), 4) for _ in range(n)],
            "entropies": [round(rng.random(), 4) for _ in range(n)],
            "reward": float(rng.random() < 0.5),
            "advantages": [[more.get("at", 0), 0.25], [n, -0.1234567]],
            **more,
        }

    bounds = list(range(0, length + 1, 40))
    return [
        end(length)
        | {
            "bounds": bounds,
            "fci": [0.0] + [rng.random() for _ in bounds[2:]],
            "branch_points": [80, 240],
            "continuations": [end(length - at, at=at) for at in (80, 80, 240, 240)],
        }
        for _ in range(leaves // 5)
    ]


def test_help_is_open_until_it_is_closed(run, open_page, tmp_path):
    page = open_page(run)
    page.script("localStorage.clear()")
    page = open_page(run)
    assert page.script("document.getElementById('help').open")
    assert page.text("#help dt") == ["z", "FCI", "V", "A"] and len(page.text("#help kbd")) == 9
    page.press("?")
    assert not page.script("document.getElementById('help').open")
    time.sleep(0.1)  # the browser tells of it a moment later
    assert not open_page(run).script("document.getElementById('help').open")
    page.script("localStorage.clear()")
    # a browser that keeps nothing of files on the disk
    file = tmp_path / "page.html"
    text = view.write_explorer(run).read_text(encoding="utf-8")
    file.write_text(text.replace("localStorage.", "(() => { throw Error() })()."), encoding="utf-8")
    page.driver.get(file.as_uri())
    assert page.script("document.getElementById('help').open") and page.text(".leaf")


def test_every_row_of_the_batch_can_be_opened_or_says_why_not(run, open_page):
    page, record = open_page(run), lines(run / "batches.jsonl")[0]
    last = page.text("#batch tbody td:last-child")
    logged = [s["number"] for s in lines(run / "samples.jsonl") if s["step"] == 1]
    assert last == ["shown above", "show", "show", *["not logged"] * (len(record["problems"]) - 3)]
    assert "--log_samples 3" in page.text("#logged")[0] and len(logged) == 3
    page.click("#batch tbody tr:nth-child(3)")
    assert page.script("sample().number") == logged[2]
    titles = page.script("[...document.querySelectorAll('#batch td:last-child')].map(e => e.title)")
    assert all("--log_samples" in title for title in titles[3:])


def test_text_of_a_folded_step_and_of_a_pointed_at_step_is_whole(open_page, tmp_path):
    folder = made_up(tmp_path / "run", big(leaves=5), problem="Why is that so?\n" * 40)
    page = open_page(folder)
    r = lines(folder / "samples.jsonl")[0]["responses"][0]
    steps = ["".join(r["tokens"][a:b]).strip() for a, b in zip(r["bounds"], r["bounds"][1:])]
    folded = page.text("#leaf .fold")
    assert len(folded) == len(steps) - 2 and set(folded) <= set(steps)
    what = "[...document.querySelectorAll('#leaf-0 .step')].map(e => e.what.split('\\n')[1])"
    assert page.script(what) == steps
    page.click("#problem button")
    assert not page.text("#problem .fold") and page.text("#question") == ["Why is that so?\n" * 40]


def test_a_problem_of_30_leaves_and_2000_tokens_each_is_small_and_quick(open_page, tmp_path):
    folder = made_up(tmp_path / "run", big())
    page = open_page(folder)
    assert (folder / "explorer.html").stat().st_size < 3_000_000
    assert page.script("performance.getEntriesByType('navigation')[0].domInteractive") < 1000
    assert len(page.text(".leaf")) == 30
    folded = len(page.text("#leaf [data-t]"))
    # the branch points' steps are open, the rest is folded
    assert folded < 400 and "2000 tokens" in page.text("#leaf .row")[0]
    times = []
    for n in (7, 13, 22):
        times.append(
            page.script(
                f"(() => {{ const t = performance.now(); go({{leaf: {n}}}); return"
                " performance.now() - t; })()"
            )
        )
    assert sorted(times)[1] < 500
    page.click("#unfold")
    assert len(page.text("#leaf [data-t]")) == 2000
    page.click("#unfold")
    page.click("#leaf .part button")
    assert folded - 40 <= len(page.text("#leaf [data-t]")) <= folded + 80


@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_a_phone(run, open_page, width):
    open_page(run).driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 780, "deviceScaleFactor": 2, "mobile": True},
    )
    page = open_page(run, "#step=2&problem=1&leaf=2")
    try:
        assert page.script("document.documentElement.scrollWidth") <= width
        assert (
            page.script(
                "Math.min(...[...document.querySelectorAll('.lane')].map(e =>"
                " e.getBoundingClientRect().width))"
            )
            > width / 3
        )
        words = page.script(
            "[...document.querySelectorAll('.words')].filter(e => e.checkVisibility()).length"
        )
        assert words == (len(page.text(".leaf")) if width < 720 else 0), "a leaf without its text"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# WCAG's contrast of every text on the page with what lies behind it: the lowest one, and of which
# text
CONTRAST = """(() => {
  const parse = c => {
    const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) =>
    [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(x => linear(x / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  // its background colour, and a tint (a gradient of one colour) above that, over what its parent
  // shows
  const behind = e => {
    if (!e) return [255, 255, 255, 1];
    const style = getComputedStyle(e);
    const ground = over(parse(style.backgroundColor), behind(e.parentElement));
    const tint = style.backgroundImage.match(/rgba?\\([^)]*\\)/);
    return tint ? over(parse(tint[0]), ground) : ground;
  };
  const opacity = e => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const seen = e => e.checkVisibility() && !["SCRIPT", "OPTION"].includes(e.tagName) && hasText(e);
  const found = [...document.querySelectorAll("body *")].filter(seen).map(e => {
    const ground = behind(e), [r, g, b, a] = parse(getComputedStyle(e).color);
    const ink = over([r, g, b, a * opacity(e)], ground);
    const [dark, bright] = [light(ink), light(ground)].sort((x, y) => x - y);
    return [(bright + .05) / (dark + .05), e.textContent.slice(0, 40), e.className];
  });
  return found.sort((a, b) => a[0] - b[0]);
})()"""


@pytest.mark.parametrize("leaf", [0, 1])  # a response with its map of attention; a continuation
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(scheme, leaf, run, open_page):
    page = open_page(run, f"#step=1&leaf={leaf}")
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    try:
        time.sleep(0.5)  # colours change slowly
        found = page.script(CONTRAST)
        ground = page.script("getComputedStyle(document.body).backgroundColor")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(found) > 100 and ("251" in ground) == (scheme == "light")
    assert found[0][0] >= 4.5, found[:5]
