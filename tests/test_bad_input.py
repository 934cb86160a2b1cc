"""test_bad_input.py: bad input to every command. One line that names the culprit, exit code 2,
nothing written, nothing run.

One table, in one process (each command's main inside stop_on_user_error, as its last lines have
it); a few of the same as real subprocesses. {w} is a folder of bad files and model directories,
which `world` builds once.
"""

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures import ROOT, TOY_MODEL, save_real_model, typed
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import eval as evaluation
from runtime.cli import stop_on_user_error

COMMANDS = [
    "attnrl.py",
    "eval.py",
    "tools.show_fci",
    "tools.view",
    "tools.plan",
    "tools.report",
    "experiments/methods.py",
    "experiments/forks.py",
    "experiments/disruption.py",
    "experiments/sparkle.py",
    "experiments/what_fci_finds.py",
    "recipes/sft.py",
    "recipes/word_problems.py",
    "recipes/smollm2/fetch.py",
    "recipes/smollm2/gsm_symbolic.py",
    "toy/build.py",
    "bench/exchange.py",
    "bench/longrun.py",
]


@functools.cache
def main_of(command: str):
    """The main of a command, by the name under which it speaks of itself."""
    if "/" not in command:
        return importlib.import_module(command.removesuffix(".py")).main
    spec = importlib.util.spec_from_file_location(
        command.replace("/", "_").removesuffix(".py"), ROOT / command
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def words_of(command: str) -> list[str]:
    """How a person types it."""
    return [str(ROOT / command)] if command.endswith(".py") else ["-m", command]


PROGRAM = "a=4;b=a-2;c=b+b;d=7;?d"
GOOD = {"step": 0, "test_accuracy": 0.5, "generated_tokens": 0, "seconds/total": 0.0}


def variant(folder: Path, **files) -> Path:
    """The toy's model directory with some files replaced (dict: keys changed, None: removed).
    Weights are a link."""
    folder.mkdir()
    for path in TOY_MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    for name, content in files.items():
        path = (
            folder
            / {
                "config": "config.json",
                "generation": "generation_config.json",
                "tokenizer": "tokenizer.json",
                "tokenizer_config": "tokenizer_config.json",
                "weights": "model.safetensors",
            }[name]
        )
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text()) | content)
        path.unlink()
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ.get("EVIL_PICKLE", "/nowhere/at/all"),)


def no_eos(folder: Path) -> None:
    variant(
        folder, config={"eos_token_id": None}, generation=None, tokenizer_config={"eos_token": None}
    )


def small_vocabulary(folder: Path) -> None:
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            bos_token_id=None,
            num_attention_heads=2,
            num_key_value_heads=2,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY_MODEL).save_pretrained(folder)


def rescaled_logits(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    CohereForCausalLM(
        CohereConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            bos_token_id=0,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_attention(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            bos_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    w = tmp_path_factory.mktemp("world")
    good = b'{"problem": "%s", "answer": "7"}\n' % PROGRAM.encode()
    for name, content in {
        "file": b"x",
        "good.jsonl": good,
        "latin1.jsonl": good + '{"problem": "ü", "answer": "1"}'.encode("latin-1"),
        "deep.jsonl": good + b"[" * 10**6,
        "deep.json": b"[" * 10**6,
        "number.jsonl": good + b"7",
        "half.json": b'[{"problem": "a", ',
        "object.json": b"{}",
        "empty.json": b"[]",
        "latin1.json": b'["\xff"]',
        "empty.parquet": b"",
        "half.parquet": b"PAR1" + b"\0" * 100,
        "blank.jsonl": b"\n \n\t\n",
        "nan.jsonl": good + b'{"problem": NaN, "answer": "1"}',
        "utf16.jsonl": good.decode().encode("utf-16"),
        "nul.jsonl": good + b"\0" * 1000,
        "bigint.jsonl": good + b'{"problem": "a", "answer": %s}' % (b"9" * 5000),
        "emptytext.txt": b"",
        "latin1.txt": b"\xff\xfe\xfa",
        "long.txt": b"a=1\n\n" * 5000,
        "broken_reward.py": b"def f(:\n",
        "raising_reward.py": b"raise RuntimeError('two\\nlines')\n",
    }.items():
        (w / name).write_bytes(content)
    # one line of 100 MB, of which the disk holds nothing
    with (w / "huge.jsonl").open("wb") as file:
        file.write(good + b'{"problem": "')
        file.truncate(100 << 20)
    (w / "folder.jsonl").mkdir()
    (w / "curves" / "curves.png").mkdir(parents=True)
    for name, lines in {
        "halfline": [json.dumps(GOOD), '{"step": 1, "tes'],
        "nometrics": None,
        "emptymetrics": [],
        "list": ["[1]"],
        "nostep": ['{"test_accuracy": 1.0}'],
        "words": [json.dumps(GOOD | {"test_accuracy": "high"})],
        "deepline": ["[" * 10**6],
        "lacking": [json.dumps(GOOD), json.dumps({"step": 1, "test_accuracy": 0.5})],
        "untested": ['{"step": 1}'],
        "curves": [json.dumps(GOOD)],
        "nulls": [json.dumps(GOOD | {"step": None})],
    }.items():
        (w / name).mkdir(exist_ok=True)
        if lines is not None:
            (w / name / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (w / "latin1run").mkdir()
    (w / "latin1run" / "metrics.jsonl").write_bytes(b"\xff\n")
    # models
    (w / "emptymodel").mkdir()
    weights = (TOY_MODEL / "model.safetensors").read_bytes()
    tensors = load_file(TOY_MODEL / "model.safetensors")
    variant(w / "noconfig", config=None)
    variant(w / "badconfig", config="{")
    variant(w / "deepconfig", config="[" * 100_000)
    variant(w / "listconfig", config="[]")
    variant(w / "latin1config", config=b"\xff")
    variant(w / "wrongtype", config={"num_hidden_layers": "many"})
    variant(w / "negative", config={"hidden_size": -8})
    variant(w / "unknowntype", config={"model_type": "nonsense"})
    variant(w / "othersize", config={"hidden_size": 64})
    variant(w / "noweights", weights=None)
    variant(w / "halfweights", weights=weights[:1000])
    variant(w / "zeroweights", weights=b"")
    variant(w / "notokenizer", tokenizer=None)
    variant(w / "badtokenizer", tokenizer="{")
    variant(w / "short", config={"max_position_embeddings": 16})
    variant(w / "badtemplate", tokenizer_config={"chat_template": "{% for m in"})
    variant(
        w / "raisingtemplate",
        tokenizer_config={"chat_template": "{{ raise_exception('no user here') }}"},
    )
    no_eos(w / "noeos")
    small_vocabulary(w / "smallvocab")
    rescaled_logits(w / "cohere")
    without_attention(w / "lfm2")
    variant(w / "lacksweights", weights=None)
    save_file(
        {k: v for k, v in tensors.items() if "layers.0.mlp" not in k},
        w / "lacksweights" / "model.safetensors",
        {"format": "pt"},
    )
    # code in a model directory: it would make the folder evil-ran-* beside itself
    code = (
        "import os\nos.makedirs(%r, exist_ok=True)\n"
        + "from transformers import *\nclass E(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    code += "class T(PreTrainedTokenizerFast): pass\nclass M(Qwen2ForCausalLM): pass\n"
    variant(
        w / "automap",
        config={
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M"},
        },
    )
    variant(
        w / "automaptokenizer",
        tokenizer_config={"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}},
        config={"model_type": "evil"},
    )
    for name in ("automap", "automaptokenizer"):
        (w / name / "evil.py").write_text(code % str(w / f"evil-ran-{name}"))
    variant(w / "pickle", weights=None)
    os.environ["EVIL_PICKLE"] = str(w / "evil-ran-pickle")
    torch.save({"model.embed_tokens.weight": Evil()}, w / "pickle" / "pytorch_model.bin")
    return w


# (command, arguments, words that the one line must hold). A command's usual arguments come first
# (USUAL).
USUAL = {
    "attnrl.py": typed(
        "--preset toy --steps 1 --batch_size 2 --problems toy:6:20:1 --test_problems toy:6:3:2"
        " --out out"
    ),
    "eval.py": ["--k", "1", "--out", "out"],
    "tools.show_fci": ["--model", str(TOY_MODEL), "--problem", PROGRAM],
    "tools.view": [],
    "tools.plan": [],
    "tools.report": [],
    "toy/build.py": ["--out", "out"],
} | {script: [] for script in COMMANDS if script[:3] in ("exp", "ben", "rec")}
TOY = f"--model {TOY_MODEL}"
CASES = [
    # settings of a training run
    ("attnrl.py", "--steps", "--steps"),
    ("attnrl.py", "--steps 1e3", "--steps|1e3"),
    ("attnrl.py", "--steps -3", "--steps -3: must be at least 1"),
    ("attnrl.py", "--seed -1", "--seed -1"),
    ("attnrl.py", "--lr inf", "--lr inf"),
    ("attnrl.py", "--lr 1e999", "--lr inf"),
    ("attnrl.py", "--lr ten", "--lr"),
    ("attnrl.py", "--problems {w}/none.jsonl", "{w}/none.jsonl: no such problem file"),
    ("attnrl.py", "--kl_coef nan", "--kl_coef nan"),
    ("attnrl.py", "--temperature nan", "--temperature nan"),
    ("attnrl.py", "--temperature -1", "--temperature -1.0: must be above 0"),
    ("attnrl.py", "--max_grad_norm inf", "--max_grad_norm inf"),
    ("attnrl.py", "--batch_range 0.5", "--batch_range 0.5"),
    ("attnrl.py", "--batch_range 1e308", "--batch_range"),
    ("attnrl.py", "--batch_lam 1.5", "--batch_lam 1.5: must be at most 1"),
    ("attnrl.py", "--engine_memory 2", "--engine_memory 2.0: must be at most 1"),
    ("attnrl.py", "--dual_clip 0.9", "--dual_clip 0.9"),
    ("attnrl.py", "--delta 0", "--delta 0"),
    ("attnrl.py", "--group_size 0", "--group_size 0"),
    ("attnrl.py", "--eval_samples 0", "--eval_samples 0"),
    ("attnrl.py", "--grading_workers 0", "--grading_workers 0"),
    ("attnrl.py", "--keep 0", "--keep 0"),
    ("attnrl.py", "--max_prompt 1", "over-long prompt"),
    ("attnrl.py", "--eval_max_response 1000000", "--eval_max_response 1000000"),
    ("attnrl.py", "--device cuda", "--device cuda"),
    ("attnrl.py", "--engine llm", "--engine"),
    ("attnrl.py", "--ads_filter 2", "--ads_filter"),
    ("attnrl.py", "nonsense", "nonsense"),
    ("attnrl.py", "--lr_schedul cosine", "--lr_schedul"),
    # contradictory switches
    ("attnrl.py", "--dry_run --parallel ddp --dtype bf16", "--parallel ddp"),
    ("attnrl.py", "--parallel ddp --cpu_offload", "--parallel ddp"),
    ("attnrl.py", "--cpu_offload", "--cpu_offload: needs --parallel fsdp"),
    ("attnrl.py", "--resume auto --out=", "--resume auto: name the run's folder"),
    ("attnrl.py", "--tis_cap 0.5", "--tis_cap 0.5"),
    ("attnrl.py", "--tis_cap 2 --behaviour engine", "--tis_cap 2.0"),
    # plan of a run
    ("attnrl.py", "--dry_run --gpus -1", "--gpus -1"),
    ("attnrl.py", "--dry_run --gpu_gib nan", "--gpu_gib nan"),
    ("attnrl.py", "--dry_run --model {w}/noconfig", "noconfig: cannot be loaded"),
    ("attnrl.py", "--dry_run --model {w}/wrongtype", "wrongtype: cannot be loaded"),
    ("attnrl.py", "--dry_run --model {w}/automap", "automap: cannot be loaded"),
    ("attnrl.py", "--dry_run --batch_range 1e308", "--batch_range"),
    # model directories
    *[
        (
            command,
            f"--model {{w}}/{model} " + ("--ask x" if command == "eval.py" else ""),
            f"--model {{w}}/{model}: |cannot be loaded",
        )
        for command in ("attnrl.py", "eval.py")
        for model in ("nothing", "emptymodel", "halfweights", "badtokenizer")
    ],
    *[
        ("eval.py", f"--model {{w}}/{model} --ask x", f"--model {{w}}/{model}: cannot be loaded")
        for model in (
            "file",
            "noconfig",
            "badconfig",
            "deepconfig",
            "listconfig",
            "latin1config",
            "wrongtype",
            "negative",
            "unknowntype",
            "othersize",
            "noweights",
            "zeroweights",
            "notokenizer",
            "automap",
            "automaptokenizer",
            "pickle",
        )
    ],
    ("eval.py", "--model {w}/lacksweights --ask x", "lacksweights|model.layers.0.mlp"),
    ("eval.py", "--model {w}/noeos --ask x", "noeos|end-of-sequence"),
    ("attnrl.py", "--model {w}/noeos", "noeos|end-of-sequence"),
    ("eval.py", "--model {w}/smallvocab --ask x", "smallvocab|the model only 8"),
    ("attnrl.py", "--model {w}/smallvocab", "smallvocab|the model only 8"),
    (
        "attnrl.py",
        "--model {w}/short --max_response 1",
        "toy:6:20:1, program|leave no room in the model's 16 positions",
    ),
    ("eval.py", "--model {w}/short --problems toy:6:3", "toy:6:3, program|16 positions"),
    ("eval.py", "--model {w}/short --ask a=1;b=2;c=3;d=4;e=5;?e", "--ask|16 positions"),
    ("eval.py", "--model {w}/badtemplate --ask x", "--ask|chat template"),
    ("tools.show_fci", "--model {w}/raisingtemplate", "--problem|no user here"),
    (
        "eval.py",
        "--model {w}/badtemplate --problems {w}/good.jsonl",
        "good.jsonl: bad rows (1 malformed)",
    ),
    ("tools.show_fci", "--model {w}/cohere", "--model {w}/cohere|rescales its logits"),
    ("attnrl.py", "--model {w}/cohere", "--model {w}/cohere|rescales its logits"),
    (
        "eval.py",
        "--model {w}/curves --ask x",
        "--model {w}/curves|the folder of a run; give one of its models, {w}/curves/last or best",
    ),
    ("eval.py", f"{TOY} --ask x --k 3", "--k: is for --problems, not for --ask"),
    (
        "eval.py",
        "--model {w}/lfm2 --ask x",
        "--model {w}/lfm2|layers without softmax attention (conv)",
    ),
    # problem files
    *[
        ("eval.py", f"{TOY} --problems {{w}}/{name}", f"{{w}}/{name}: {words}")
        for name, words in {
            "nothing.jsonl": "no such problem file",
            "folder.jsonl": "no such problem file",
            "latin1.jsonl": "bad rows (1 malformed)",
            "deep.jsonl": "bad rows (1 malformed)",
            "number.jsonl": "bad rows (1 malformed)",
            "deep.json": "not JSON in UTF-8",
            "half.json": "not JSON in UTF-8",
            "object.json": "not an array",
            "empty.json": "no usable problem",
            "latin1.json": "not JSON in UTF-8",
            "empty.parquet": "not a readable parquet file",
            "half.parquet": "not a readable parquet file",
            "blank.jsonl": "no usable problem",
            "nan.jsonl": "bad rows (1 malformed)",
            "utf16.jsonl": "bad rows (",
            "nul.jsonl": "bad rows (1 malformed)",
            "bigint.jsonl": "bad rows (1 malformed)",
            "huge.jsonl": "bad rows (1 malformed)",
        }.items()
    ],
    (
        "eval.py",
        f"{TOY} --problems {{w}}/utf16.jsonl --drop_bad_rows",
        "utf16.jsonl: no usable problem",
    ),
    ("attnrl.py", "--problems {w}/deep.json", "deep.json: not JSON in UTF-8"),
    ("attnrl.py", "--test_problems {w}/latin1.jsonl", "latin1.jsonl: bad rows (1 malformed)"),
    (
        "attnrl.py",
        "--problems {w}/good.jsonl --test_problems {w}/good.jsonl",
        "bad rows (1 in the evaluation set)",
    ),
    (
        "attnrl.py",
        "--problems {w}/good.jsonl --test_problems {w}/good.jsonl --drop_bad_rows",
        "no usable problem",
    ),
    ("attnrl.py", "--problems toy:6:1:1 --test_problems toy:6:1:1", "toy:6:1:1"),
    ("eval.py", f"{TOY} --problems toy:4:99999999999", "toy:4:99999999999"),
    ("eval.py", f"{TOY} --problems toys", "toys: no such problem file"),
    ("eval.py", f"{TOY} --problems toy:6:3 --max_prompt 2", "bad rows (3 over-long prompt)"),
    # the other options of an evaluation
    ("eval.py", f"{TOY} --problems toy:6:3 --k 0", "--k 0"),
    ("eval.py", f"{TOY} --problems toy:6:3 --k 2.5", "--k"),
    ("eval.py", f"{TOY} --problems toy:6:3 --temperature -1", "--temperature -1.0"),
    ("eval.py", f"{TOY} --problems toy:6:3 --temperature inf", "--temperature inf"),
    ("eval.py", f"{TOY} --problems toy:6:3 --seed -1", "--seed -1"),
    ("eval.py", f"{TOY} --problems toy:6:3 --max_prompt 0", "--max_prompt 0"),
    ("eval.py", f"{TOY} --problems toy:6:3 --max_response 0", "--max_response 0"),
    ("eval.py", TOY, "--problems|--ask"),
    ("eval.py", f"{TOY} --problems toy:6:3 --colour red", "--colour"),
    ("eval.py", f"{TOY} --problems toy:6:3 --out {{w}}", "--out {w}: is not empty"),
    ("eval.py", f"{TOY} --problems toy:6:3 --out {{w}}/file", "--out {w}/file: cannot be written"),
    # the problem file itself
    (
        "eval.py",
        f"{TOY} --problems {{w}}/good.jsonl --out {{w}}",
        "{w}/good.jsonl, line 1: no settings",
    ),
    (
        "eval.py",
        f"{TOY} --problems toy:6:3 {{w}}/nothing.jsonl",
        "nothing.jsonl: no such problem file",
    ),
    (
        "eval.py",
        f"{TOY} --problems toy:6:3 toy:6:3",
        "--problems toy:6:3: toy:6:3 is called toy-6-3, too",
    ),
    (
        "eval.py",
        f"{TOY} --problems a=toy:6:3 a=toy:6:4",
        "--problems a=toy:6:4: toy:6:3 is called a, too",
    ),
    ("eval.py", f"{TOY} --problems a=", "a=: no such problem file"),
    ("eval.py", f"{TOY} --problems", "--problems"),
    ("eval.py", f"{TOY} --suite papers --problems toy:6:3", "--suite|papers"),
    (
        "eval.py",
        f"{TOY} --suite paper --problems toy:6:3",
        "--problems toy:6:3: write NAME=FILE|aime24, aime25, amc23, math500, minerva",
    ),
    (
        "eval.py",
        f"{TOY} --suite paper --problems aime=toy:6:3",
        "--problems aime=toy:6:3: write NAME=FILE",
    ),
    (
        "eval.py",
        f"{TOY} --suite paper --problems aime24=toy:6:3 minerva=toy:6:3",
        "no file for aime25, amc23, math500, olympiad|--subset",
    ),
    (
        "eval.py",
        f"{TOY} --suite paper --problems aime24=toy:6:3 aime24=toy:6:4 --subset",
        "--problems aime24=toy:6:4: toy:6:3 is called",
    ),
    # the toy has not the room
    (
        "eval.py",
        f"{TOY} --suite paper --problems aime24=toy:6:3 --subset",
        "--max_response 32768: |toy:6:3",
    ),
    (
        "eval.py",
        f"{TOY} --suite paper --problems aime24={{w}}/nothing.jsonl --subset",
        "nothing.jsonl: no such problem file",
    ),
    (
        "eval.py",
        f"{TOY} --problems toy:6:3 --out {{w}}/file/x",
        "--out {w}/file/x: cannot be written",
    ),
    ("eval.py", f"{TOY} --problems toy:6:3 --out " + "n" * 300, "--out nnn|: cannot be written"),
    (
        "eval.py",
        f"{TOY} --problems toy:6:3 --reward broken_reward:f",
        "--reward broken_reward:f: cannot be imported",
    ),
    (
        "eval.py",
        f"{TOY} --problems toy:6:3 --reward raising_reward:f",
        "--reward raising_reward:f: cannot be imported",
    ),
    ("eval.py", f"{TOY} --problems toy:6:3 --reward .x:f", "--reward .x:f: cannot be imported"),
    ("eval.py", f"{TOY} --problems toy:6:3 --reward :", "--reward :: cannot be imported"),
    ("eval.py", f"{TOY} --ask \udcff", "--ask"),
    # the folder of a run
    (
        "attnrl.py",
        "--out {w}",
        (
            "--out {w}: is not empty; give another folder, remove it, or (if it is this run's)"
            " --resume auto"
        ),
    ),
    (
        "attnrl.py",
        "--out {w} --resume auto",
        "--out {w}: is not empty, and has no config.json of a run to go on with",
    ),
    ("attnrl.py", "--out {w}/file", "--out {w}/file: cannot be made a folder"),
    ("attnrl.py", "--out {w}/file/x", "--out {w}/file/x: cannot be made a folder"),
    ("attnrl.py", "--out " + "n" * 300, "--out nnn|: cannot be made a folder"),
    # FCI of one response
    ("tools.show_fci", "--delta 0", "--delta"),
    ("tools.show_fci", "--rho nan", "--rho"),
    ("tools.show_fci", "--max_response 0", "--max_response"),
    ("tools.show_fci", "--seed -1", "--seed"),
    ("tools.show_fci", "--delta four", "--delta"),
    ("tools.show_fci", "--response {w}", "--response {w}: cannot be read"),
    ("tools.show_fci", "--response {w}/latin1.txt", "latin1.txt: cannot be read"),
    ("tools.show_fci", "--response {w}/emptytext.txt", "the response is empty"),
    ("tools.show_fci", "--response {w}/long.txt", "--response {w}/long.txt|positions"),
    ("tools.show_fci", "--problem=", "--problem|empty"),
    ("tools.show_fci", "--problem= --response {w}/good.jsonl", "--problem|empty"),
    ("tools.show_fci", "--plot {w}/nothing/x.png", "--plot {w}/nothing/x.png: cannot be written"),
    ("tools.show_fci", "--plot {w}/x.nonsense", "--plot {w}/x.nonsense: cannot be written"),
    ("tools.show_fci", "--plot {w}/folder.jsonl", "--plot {w}/folder.jsonl: cannot be written"),
    (
        "tools.show_fci",
        "--plot {w}/curves",
        "--plot {w}/curves: cannot be written (Is a directory)",
    ),
    ("tools.show_fci", "--plots x", "--plots"),
    # curves and tables
    ("tools.view", "", "the following arguments are required: runs/NAME"),
    ("tools.view", "{w}/curves --help-me", "--help-me"),
    *[
        ("tools.view", f"{{w}}/{name}", f"{{w}}/{name}/metrics.jsonl{words}")
        for name, words in {
            "nothing": ": cannot be read",
            "file": ": cannot be read",
            "nometrics": ": cannot be read",
            "emptymetrics": ": no test_accuracy",
            "halfline": ", line 2: ",
            "list": ", line 1: ",
            "nostep": ", line 1: |step",
            "words": ", line 1: |test_accuracy",
            "deepline": ", line 1: ",
            "lacking": ", line 2: |generated_tokens",
            "untested": "",
            "latin1run": ": cannot be read",
            "nulls": ", line 1: |step",
        }.items()
    ],
    ("tools.view", "{w}/curves", "{w}/curves/curves.png: cannot be written"),
    (
        "tools.view",
        "{w}/curves/metrics.jsonl",
        "metrics.jsonl: cannot be read (Not a directory); give the folder of a run",
    ),
    ("tools.plan", "--gpus 8", "--gpus"),
    ("tools.plan", "1.5B", "1.5B"),
    # results of evaluations
    ("tools.report", "", "FILE.jsonl"),
    ("tools.report", "--compares x", "--compares"),
    ("tools.report", "{w}/nothing.jsonl", "{w}/nothing.jsonl: cannot be read"),
    (
        "tools.report",
        "{w}/folder.jsonl",
        (
            "{w}/folder.jsonl: cannot be read (Is a directory); give its files,"
            " {w}/folder.jsonl/*.jsonl"
        ),
    ),
    ("tools.report", "--compare {w}/good.jsonl", "--compare: takes two result files, got 1"),
    *[
        ("tools.report", f"{{w}}/{name}", f"{{w}}/{name}, line 1: ")
        for name in (
            "file",
            "good.jsonl",
            "blank.jsonl",
            "utf16.jsonl",
            "empty.parquet",
            "deep.json",
        )
    ],
    # experiments, the toy, timings
    ("experiments/methods.py", "--tokens nan", "--tokens nan: must be a number above 0"),
    (
        "experiments/methods.py",
        "--folder {w}/file",
        "--folder {w}/file: cannot be written (Not a directory)",
    ),
    ("experiments/sparkle.py", "--samples x", "--samples: invalid int value: 'x'"),
    ("experiments/sparkle.py", "--models toy/model", "--models toy/model: write NAME=DIR"),
    ("experiments/sparkle.py", "--problems {w}/good.jsonl", "good.jsonl: only the toy's programs"),
    ("experiments/sparkle.py", "--folder {w}/file", "{w}/file/toy.json: cannot be read"),
    (
        "experiments/sparkle.py",
        "--models a={w}/nothing --name nothing",
        "--model {w}/nothing: cannot be loaded",
    ),
    ("experiments/what_fci_finds.py", "--quik", "unrecognized arguments: --quik"),
    (
        "experiments/what_fci_finds.py",
        "--model {w}/nothing",
        "--model {w}/nothing: cannot be loaded",
    ),
    ("experiments/forks.py", "--points 0", "--points or --rho: not in its range"),
    ("experiments/forks.py", "--rho 1.5", "--points or --rho: not in its range"),
    ("experiments/forks.py", "--folder {w}/file", "{w}/file/toy.jsonl: cannot be read"),
    ("experiments/disruption.py", "--rho 0.2", "unrecognized arguments: --rho 0.2"),
    ("experiments/disruption.py", "--continuations 0", "--continuations 0: must be at least 1"),
    ("experiments/disruption.py", "--temperature nan", "--temperature, --count or --seed"),
    ("experiments/disruption.py", "--problems {w}/none.jsonl", "no such problem file"),
    ("experiments/disruption.py", "--folder {w}/file", "{w}/file/toy.jsonl: cannot be read"),
    ("experiments/disruption.py", "--folder {w}/file --report", "cannot be read"),
    ("recipes/sft.py", "--model toy/model", "the following arguments are required: --problems"),
    (
        "recipes/sft.py",
        "--model {w}/nothing --problems {w}/good.jsonl --out {w}/o",
        "--model {w}/nothing: cannot be loaded",
    ),
    (
        "recipes/sft.py",
        f"{TOY} --problems {{w}}/good.jsonl --out o",
        '{w}/good.jsonl, line 1: the field "solution" must be a text',
    ),
    (
        "recipes/sft.py",
        f"{TOY} --problems {{w}}/none.jsonl --out o",
        "{w}/none.jsonl: no such problem file",
    ),
    ("recipes/sft.py", "--model a --problems b --out c --lr nan", "--lr: not above 0"),
    ("recipes/word_problems.py", "{w}/o --people 1-3", "people '1-3': write 10 or 5-10"),
    ("recipes/word_problems.py", "{w}/o --count 0", "--count 0: must be at least 1"),
    ("recipes/word_problems.py", "{w}/file/o", "{w}/file/o: cannot be written (Not a directory)"),
    ("recipes/smollm2/fetch.py", "{w}/file", "{w}/file: cannot be made a new directory"),
    ("recipes/smollm2/fetch.py", "{w}/file/o", "{w}/file/o: cannot be made a new directory"),
    ("recipes/smollm2/fetch.py", ".", ".: cannot be made a new directory"),
    ("recipes/smollm2/gsm_symbolic.py", "{w}/o --count 0", "--count 0: must be at least 1"),
    ("toy/build.py", "--steps x", "--steps: invalid int value: 'x'"),
    ("toy/build.py", "--steps -1", "--steps -1: must be between 0 and"),
    ("toy/build.py", "--slip 7", "--slip 7.0: must be between 0 and 1"),
    (
        "toy/build.py",
        "--start {w}/nothing",
        "--start {w}/nothing: cannot be loaded (no such directory)",
    ),
    ("toy/build.py", "--start {w}/badconfig", "--start {w}/badconfig: cannot be loaded"),
    ("toy/build.py", "--out {w}/file", "--out {w}/file: cannot be made a folder (File exists)"),
    ("bench/exchange.py", "--tokens x", "--tokens: invalid int value: 'x'"),
    ("bench/exchange.py", "--problems 0", "--problems and --tokens: must be at least 1"),
    ("bench/longrun.py", "--steps 0", "--steps 0: must be at least 3"),
]


def files(*folders: Path) -> set:
    return {
        (str(p), p.lstat().st_size)
        for folder in folders
        for p in folder.rglob("*")
        if "__pycache__" not in p.parts
    }


@pytest.mark.parametrize(
    "command, args, words",
    [pytest.param(*case, id=f"{case[0]} {case[1][-60:]!a}") for case in CASES],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command, args, words, world, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(world)
    # a directory that is missing is no reason to ask a hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = [
        *(USUAL[command] if "--ask" not in args else []),
        *args.replace("{w}", str(world)).split(),
    ]
    before = files(world)
    with pytest.raises(SystemExit) as stop, stop_on_user_error(command):
        main_of(command)(argv)
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error[-3000:]
    assert error.startswith(f"{command}: ") and "Traceback" not in out + error
    assert (
        all(word.replace("{w}", str(world)) in error for word in words.split("|"))
        and len(error) < 1500
    ), error
    assert files(world) == before and not files(tmp_path), "something was written"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_defaults_that_say_something_and_ends_with_an_example_to_copy(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main_of(command)(["--help"])
    text = capsys.readouterr().out
    shown = command if command.endswith(".py") else f"-m {command}"
    assert (
        stop.value.code == 0
        and text.startswith(f"usage: python {shown} ")
        and text.count("example: ") == 1
    )
    # one line, however long
    assert command in text.splitlines()[-1] and text.splitlines()[-1].startswith("example: ")
    assert "default: None" not in text and "default: )" not in text


@pytest.mark.parametrize(
    "command, args, words",
    [
        pytest.param("attnrl.py", "--steps 0", "--steps 0", marks=pytest.mark.full),
        ("eval.py", "--model {w}/automap --ask x", "cannot be loaded"),
        ("tools.view", "{w}/halfline", "line 2"),
        pytest.param("tools.plan", "x", "takes no arguments", marks=pytest.mark.full),
        ("tools.report", "{w}/good.jsonl", "good.jsonl, line 1: no settings"),
    ],
)
def test_the_same_as_real_commands(command, args, words, world, tmp_path):
    before = files(world)
    done = subprocess.run(
        [sys.executable, *words_of(command), *args.replace("{w}", str(world)).split()],
        cwd=tmp_path,
        input="y\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, (
        done.stderr
    )
    # "y" on the standard input: no question was asked, no code run
    assert files(world) == before and not files(tmp_path)


def test_a_model_without_chat_template_is_asked_in_plain_text(tmp_path, capsys):
    model = save_real_model(tmp_path / "model", chat=False)
    capsys.readouterr()  # transformers' own progress bar
    evaluation.main(
        ["--model", str(model), "--ask", "1+1?", "--max_response", "4", "--temperature", "0"]
    )
    assert capsys.readouterr().err == ""
