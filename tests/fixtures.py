"""fixtures.py: what stands in for downloads, a real byte-level BPE tokenizer with a chat template
and a tiny Qwen2 that goes with it; and how files are read and compared."""

import dataclasses
import filecmp
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
TOY_MODEL = ROOT / "toy" / "model"
TEXT = (
    "Find the sum of all positive integers $n$ such that $\\frac{n}{2} + \\sqrt{n} = 12$.\n\nFirst,"
    " we square both sides.\n\nTherefore, the answer is \\boxed{42}.\n\nWait, let me"
    " check.\nYes.\n\n" * 20
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def typed(command: str) -> list[str]:
    """A command line, as one types it."""
    return command.split()


def bpe_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Trained here on a few lines, as Qwen's is on the web: byte level, merges such as ".\\n\\n",
    special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=6,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY_MODEL)


def save_real_model(folder: Path, chat: bool = True, **overrides) -> Path:
    """A tiny random Qwen2 with the BPE tokenizer, as a model directory."""
    tokenizer = bpe_tokenizer(chat)
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(Qwen2Config(**(settings | overrides))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics_of(folder: Path) -> list[dict]:
    return lines(folder / "metrics.jsonl")


def same_file(got: Path, expected: Path) -> None:
    """Byte for byte. Not `==` on the contents: where CI is set, pytest shows the whole difference
    of two strings, and finding it in two files of weights takes hours."""
    assert filecmp.cmp(got, expected, shallow=False), f"{got} and {expected} differ"


def saved_and_restored(state):
    """Through JSON, as a checkpoint would: the state must be plain numbers."""
    return type(state)(**json.loads(json.dumps(dataclasses.asdict(state))))
