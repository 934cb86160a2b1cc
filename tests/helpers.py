"""Tiny random models shared by the tests. No pretrained weights, no network: a config and a seed.

Fresh weights of transformers (std 0.02) give nearly uniform attention, next to which a wrong mask
or a swapped head hardly shows. Here matrices have std 1.5 / sqrt(fan in): attention scores have a
standard deviation of about 2.
"""

import torch
import transformers

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
