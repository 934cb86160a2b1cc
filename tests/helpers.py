"""Tiny random models shared by the tests. No pretrained weights, no network: a config and a seed.

Fresh weights of transformers (std 0.02) give nearly uniform attention, next to which a wrong mask
or a swapped head hardly shows. Here matrices have std 1.5 / sqrt(fan in): attention scores have a
standard deviation of about 2.
"""

import copy

import numpy as np
import torch
import transformers

from runtime.scoring import Sequence

VOCABULARY = 40
WINDOW = 8  # of the sliding-window models: shorter than every test sequence
KINDS = ("qwen2", "qwen3", "llama", "qwen2_window", "mistral")
WINDOWED = ("qwen2_window", "mistral")


def tiny_model(kind: str, seed: int = 0, **overrides):
    """A causal model in evaluation mode, fp32: 3 layers, 4 heads, 2 key-value heads (GQA), head
    dimension 8.

    qwen2_window has full and sliding-window layers, mistral sliding windows in all layers.
    """
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if kind == "qwen2_window":
        settings |= dict(
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    if kind == "mistral":
        settings |= dict(sliding_window=WINDOW)
    config = {
        "qwen2": transformers.Qwen2Config,
        "qwen2_window": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
    }[kind](**(settings | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return randomise(model, seed)


@torch.no_grad()
def randomise(model, seed: int):
    """Large random weights from a private generator: the same for a seed whatever ran before."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            # smaller logits: log-probs of about -4, not -10, where rounding in float32 alone comes
            # near 1e-5
            scale = 0.7 if name == "lm_head.weight" else 1.5
            parameter.copy_(noise * scale / parameter.shape[1] ** 0.5)
        # Qwen3 normalises q and k: their size is set here
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1.5 + 0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1 + 0.1 * noise)  # RMSNorm
    return model


def random_tokens(rng, count: int) -> list[int]:
    """`count` token ids from random.Random `rng`; 0, the padding id, is among them on purpose."""
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def random_bounds(rng, length: int, steps: int) -> list[int]:
    """A random cut of `length` tokens into `steps` steps of at least one token."""
    return [0, *sorted(rng.sample(range(1, length), steps - 1)), length]


# --------------------------------------------------------------------------------------------------
# The second opinion on FCI: plain loops in float64 over attention that transformers itself returns,
# one unpadded sequence at a time. It shares no code with fci.py.
# --------------------------------------------------------------------------------------------------
def eager_twin(model):
    """The same weights with transformers' own eager attention, which never heard of fci.py."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


@torch.no_grad()
def eager_attention(model, sequence: Sequence) -> np.ndarray:
    """alpha[l, h, q, s] in float64."""
    output = model(torch.tensor([sequence.prompt_ids + sequence.tokens]), output_attentions=True)
    return torch.cat(output.attentions).double().numpy()


def fci_by_definition(alpha: np.ndarray, sequence: Sequence, delta: int) -> list[float]:
    """AttnRL Eq. 4 is alpha; its mean over two steps, Eq. 5 and Eq. 6, read aloud."""
    spans = [
        [len(sequence.prompt_ids) + t for t in range(a, b)]
        for a, b in zip(sequence.bounds, sequence.bounds[1:])
    ]
    scores = []
    for k, keys in enumerate(spans):
        best = 0.0
        for layer in alpha:
            for head in layer:
                y = 0.0
                for queries in spans[k + delta :]:  # Eq. 5: j >= k + Delta
                    y += np.mean([np.mean([head[q, s] for s in keys]) for q in queries])
                best = max(best, y)  # Eq. 6
        scores.append(best if k > 0 else 0.0)
    return scores


def random_sequence(rng, longest: int = 60) -> Sequence:
    """1 to 6 prompt tokens and at least 12 response tokens, cut anywhere."""
    tokens = random_tokens(rng, rng.randint(12, longest))
    bounds = random_bounds(rng, len(tokens), rng.randint(1, len(tokens)))
    return Sequence(random_tokens(rng, rng.randint(1, 6)), tokens, bounds)


# --------------------------------------------------------------------------------------------------
# A model leaves as it came
# --------------------------------------------------------------------------------------------------
def fingerprint(model):
    return (
        model.config._attn_implementation,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.is_grad_enabled(),
    )


def same(a, b) -> bool:
    """Fingerprints hold tensors, for which == is no truth value."""
    return (
        a[:3] == b[:3]
        and a[4] == b[4]
        and all(
            (x is None) == (y is None) and (x is None or torch.equal(x, y))
            for x, y in zip(a[3], b[3])
        )
    )
