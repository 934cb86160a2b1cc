"""models.py: load a causal language model and its tokenizer, or refuse it with one line.

Models with which attnrl would be silently wrong are refused before anything is sampled: layers
without softmax attention, rescaled logits, weights that are missing or not finite.

    python -m pytest tests/runtime/test_models.py
"""

import os
import re
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fci import scoring_mode
from runtime.cli import UserError, first_line
from runtime.data import Problem
from runtime.scoring import Sequence, score

# Rotary embeddings whose frequencies depend on the current length of the sequence. The engine sees
# a growing response, a scoring pass sees all of it: they would rotate the same token differently.
LENGTH_DEPENDENT = {"longrope", "dynamic"}
SOFTMAX_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def pick_device(device: str) -> str:
    """The device; for "auto": "cuda" if there is a GPU, else "cpu". Raises UserError for "cuda"
    without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: cannot be used (PyTorch sees no GPU)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------
def load_model(path: str, device: str):
    """(model in fp32, tokenizer, end token ids) of a directory or hub name. Raises UserError."""
    transformers_logging.disable_progress_bar()  # the only bar on the terminal is ours
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it reports every attempt to reach the hub
    check_path(path)
    check_files(path)
    device = pick_device(device)
    try:
        # an explicit False: otherwise transformers asks on the terminal whether to run code from
        # the model's folder
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        model, found = loaded[0].to(device), loaded[1]
    # many types: no such model, no such tokenizer, broken weights
    except Exception as error:
        raise UserError(f"--model {path}: cannot be loaded ({first_line(error)})") from error
    check_parts(path, model, tokenizer, sorted(found["missing_keys"]))
    return model, tokenizer, end_tokens(path, model, tokenizer)


def check_path(path: str) -> None:
    """Raises UserError if name and files show that the path is not a model."""
    if os.path.isfile(os.path.join(path, "metrics.jsonl")):  # its config.json is that of the run
        raise UserError(
            f"--model {path}: is the folder of a run; give one of its models,"
            f" {os.path.join(path, 'last')} or best"
        )
    if path.endswith(".gguf") and os.path.isfile(path):
        raise UserError(
            f"--model {path}: is a GGUF file; save it as a directory first: pip install gguf"
            " accelerate, then AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME), del"
            " model.config.quantization_config, model.hf_quantizer = None, save_pretrained(DIR);"
            " the tokenizer in the same way (docs/data-and-models.md)"
        )
    # not a hub name (OWNER/NAME) either, so the hub need not be asked
    if os.path.isfile(path) or not (
        os.path.isdir(path) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)
    ):
        what = "is a file, not a model directory" if os.path.isfile(path) else "no such directory"
        raise UserError(f"--model {path}: cannot be loaded ({what})")


def check_files(path: str) -> None:
    """Raises UserError for a directory that is not a whole model: an adapter, shards of a training
    run, GGUF files. The message says what it is and what to do."""
    if not os.path.isdir(path):
        return  # a hub name
    names = os.listdir(path)
    if "adapter_config.json" in names:
        raise UserError(
            f"--model {path}: is a LoRA adapter, not a whole model; merge it first: pip install"
            " peft, then peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
            ".save_pretrained(NEW), and save the tokenizer there"
        )
    if "config.json" in names:
        return
    if any(name.endswith(".gguf") for name in names):
        gguf = next(name for name in sorted(names) if name.endswith(".gguf"))
        check_path(os.path.join(path, gguf))
    if any(name.endswith(".distcp") or name.startswith("__0_") for name in names) or any(
        "fsdp" in name or name.startswith(("global_step", "model_world_size")) for name in names
    ):
        raise UserError(
            f"--model {path}: holds shards of a distributed checkpoint, not a model; merge them"
            " with the trainer that wrote them (accelerate merge-weights, verl's model_merger)"
        )
    inside = [n for n in sorted(names) if os.path.isfile(os.path.join(path, n, "config.json"))]
    hint = f"; did you mean {os.path.join(path, inside[0])}?" if inside else ""
    raise UserError(f"--model {path}: cannot be loaded (no config.json in it){hint}")


def check_parts(path: str, model, tokenizer, lacking: list[str]) -> None:
    """Raises UserError for unsupported layers, missing weights, or another model's tokenizer."""
    config = model.config.get_text_config()
    if rotary := rotary_kinds(config) & LENGTH_DEPENDENT:
        raise UserError(
            f"--model {path}: its rotary embeddings depend on the length of the sequence"
            f" ({', '.join(sorted(rotary))}), so sampling and scoring would disagree;"
            " attnrl does not support them"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - SOFTMAX_LAYERS:
        raise UserError(
            f"--model {path}: has layers without softmax attention ({', '.join(sorted(others))}),"
            " which attnrl does not support"
        )
    if lacking:  # transformers would use random numbers instead
        raise UserError(
            f"--model {path}: cannot be loaded (its weights lack {lacking[0]} and"
            f" {len(lacking) - 1} more tensors)"
        )
    # without files, transformers makes an empty tokenizer
    if not tokenizer.encode("1", add_special_tokens=False):
        raise UserError(
            f"--model {path}: cannot be loaded (its tokenizer knows no text; is tokenizer.json"
            " missing?)"
        )
    if len(tokenizer) > (size := model.get_input_embeddings().num_embeddings):
        raise UserError(
            f"--model {path}: the tokenizer has {len(tokenizer)} tokens, the model only {size}"
        )


def rotary_kinds(config) -> set[str]:
    """The kinds of rotary embedding in a config: {"default"}, {"longrope"} ... transformers has
    one set of parameters, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return set()
    each = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    return {str(p.get("rope_type") or p.get("type")) for p in each} - {"None"}


def end_tokens(path: str, model, tokenizer) -> list[int]:
    """The ids that end a response, from the generation config and the tokenizer."""
    end = model.generation_config.eos_token_id if model.generation_config else None
    ids = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise UserError(
            f"--model {path}: neither its generation config nor its tokenizer names an"
            " end-of-sequence token"
        )
    return sorted(ids)


# --------------------------------------------------------------------------------------------------
# Checks of a loaded model
# --------------------------------------------------------------------------------------------------
def check_model(model, path: str) -> None:
    """Raises UserError for a model whose log-probs or FCI would be wrong or are not finite."""
    try:
        probe = Sequence([0], [0, 0, 0], [0, 1, 2, 3])
        found = torch.tensor(score(model, [probe], delta=1)[0].logprobs)
        with scoring_mode(model):
            logits = model(torch.zeros(1, 4, dtype=torch.long, device=model.device)).logits[0, :3]
    except ValueError as error:  # ours
        raise UserError(f"--model {path}: cannot be used ({first_line(error)})") from error
    except Exception as error:  # from a model that is built in another way
        raise UserError(
            f"--model {path}: cannot be used: {type(model).__name__} does not compute four tokens"
            " in the way attnrl needs (a plain decoder under transformers' attention registry):"
            f" {type(error).__name__}, {first_line(error)}"
        ) from error
    if not found.isfinite().all():
        raise UserError(
            f"--model {path}: its log-probs are not finite, its weights are damaged (a checkpoint:"
            " remove it)"
        )
    if not torch.allclose(logits.float().log_softmax(-1)[:, 0].cpu(), found, atol=1e-3):
        raise UserError(
            f"--model {path}: rescales its hidden states or logits, which attnrl does not reproduce"
        )


def packing_obstacle(model) -> str:
    """Why packed rows (runtime/packing.py) are not exact with this model; "" if they are exact."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None):
        return "not all of its layers see the whole sequence"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}, which may take other masks"
    # other reasons are found by a try: e.g. positions that are computed elsewhere
    leaves = [Sequence([0, 0], [0, 0, *end]) for end in ([0, 0, 0], [1, 0], [1, 1, 0])]
    try:
        packed = score(model, leaves, packing=lambda leaves: [list(range(len(leaves)))])
    except Exception as error:
        return f"it refuses them: {first_line(error)}"
    gaps = [
        abs(a - b)
        for one, other in zip(packed, score(model, leaves))
        for a, b in zip(one.logprobs, other.logprobs)
    ]
    return "" if max(gaps) < 1e-4 else f"its log-probs would be up to {max(gaps):.2g} off"


def check_context(
    model,
    problems: list[Problem],
    max_response: int | None,
    at_most: int = 1024,
    option: str = "max_response",
) -> int:
    """The response length that fits the model's positions after the longest prompt: `max_response`,
    or if it is None the available room, but not more than `at_most`. Raises a UserError that names
    the option if `max_response` does not fit."""
    longest = max(problems, key=lambda p: len(p.prompt_ids))
    if not longest.prompt_ids:
        raise UserError(f"{longest.source}: the problem is empty for this tokenizer")
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 40
    room = positions - len(longest.prompt_ids)
    if room < (max_response or 1):
        length, has = len(longest.prompt_ids), f"the model's {positions} positions"
        if room < 1:
            where = longest.source
            raise UserError(f"{where}: {length} prompt tokens leave no room in {has}")
        raise UserError(
            f"--{option} {max_response}: with the {length} prompt tokens of {longest.source} that"
            f" is more than {has}; give at most {room}"
        )
    return max_response or min(room, at_most)
