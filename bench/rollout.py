"""bench/rollout.py: tokens per second of the engines, against what one would call without them.

    python bench/rollout.py                        # the transformers engine against model.generate;
                                                   prefixes shared or not
    .venv-vllm/bin/python bench/rollout.py --vllm  # VLLMEngine against llm.generate on the same
    prompts

1. The call of a real training step on the toy: continuations of one batch (prefixes of all lengths)
   and the initial responses of the next. `generate` gets the same requests in one left-padded
   batch, as one would call it; it goes on until the last row is finished. Tokens up to the end
   token count, for both.
2. The same with initial responses only: 24 problems x 6 responses of 50 to 90 tokens, equal
   prompts, nothing to skip but tails. And with programs of 4 to 9 variables, so that some responses
   are twice as long as others.
3. Continuations: 8 responses with 3 branch points each and 2 continuations a point, on a model of
   two wide layers, where the prompt costs something; "without" computes the prefix of each request
   anew. Tokens of prefixes computed stand beside.
4. vLLM on the toy's mix. What the engine adds to raw `llm.generate` is one SamplingParams a request
   and the copying of results.
"""

import random

import torch
from measure import command, gain, interleave, positive, record

import rollout
from attnrl import Trainer, parse_config
from data import load_problems
from errors import UserError, stop_on_user_error
from eval import load_model
from rollout import Request, TransformersEngine, request_seed
from runlog import Display


def toy_requests(sets: list[str], tokenizer, samples: int) -> list[Request]:
    problems = [p for source in sets for p in load_problems(source, tokenizer, max_prompt=1024)]
    return [
        Request(p.prompt_ids, 110, 1.0, request_seed(0, i, j))
        for i, p in enumerate(problems)
        for j in range(samples)
    ]


def step_requests() -> list[Request]:
    """What the second generation call of a run asks for."""
    trainer = Trainer(parse_config(["--test_problems", "toy:8:4:2"]), Display(1, quiet=True))
    first, asked, generate = trainer.new_batch(1), [], trainer.engine.generate
    trainer.engine.generate = lambda requests: [asked.append(requests), generate(requests)][1]
    trainer.sample(None, first)
    trainer.sample(first, trainer.new_batch(2))
    return asked[1]


def plain_generate(model, requests: list[Request], eos_id: int) -> int:
    """The same requests with transformers' own loop; how many tokens it sampled, end tokens
    included."""
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.tensor(
        [[eos_id] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests],
        device=model.device,
    )
    mask = torch.tensor(
        [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests],
        device=model.device,
    )
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_id,
            max_new_tokens=max(r.max_tokens for r in requests),
            pad_token_id=eos_id,
        )[:, width:].tolist()
    return sum(row.index(eos_id) + 1 if eos_id in row else len(row) for row in out)


def against_generate(repeats: int) -> None:
    model, tokenizer, (eos_id,) = load_model("toy/model", "auto")
    # all in one batch, as generate has them
    engine, rows, ratios = TransformersEngine(model, [eos_id], 10**6), [], []
    mixes = {
        "a training step's call": step_requests(),
        "initial responses": toy_requests(["toy:8:24:1"], tokenizer, 6),
        "4 to 9 variables": toy_requests([f"toy:{n}:4:1" for n in range(4, 10)], tokenizer, 6),
    }
    for name, requests in mixes.items():
        seconds = interleave(
            {
                "engine": lambda: sum(len(c.tokens) for c in engine.generate(requests)),
                "generate": lambda: plain_generate(model, requests, eos_id),
            },
            repeats,
        )
        ours, other = 1 / seconds["engine"], 1 / seconds["generate"]
        rows.append(
            {
                "requests": f"{name}, {len(requests)}",
                "engine, tokens/s": ours,
                "model.generate, tokens/s": other,
            }
        )
        goal = 2 if name == "a training step's call" else None
        ratios.append(
            gain(f"rollout, {name}: model.generate", ours, other, "tokens/s", goal, more=True)
        )
    record("rollout/generate", rows, ratios)


def shared_prefixes(repeats: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    rng, requests = random.Random(0), []
    for i in range(8):
        prompt = [rng.randrange(512) for _ in range(200)]
        response = [rng.randrange(512) for _ in range(400)]
        requests += [
            Request(prompt + response[:at], 16, 1.0, request_seed(i, at, t))
            for at in (100, 200, 300)
            for t in range(2)
        ]
    engine, share = TransformersEngine(model, []), rollout.share_prefixes
    nobody = lambda prompts: (list(range(len(prompts))), list(range(len(prompts))))  # noqa: E731
    computed = {}

    def run(name: str, how):
        rollout.share_prefixes, engine.prefilled = how, 0
        engine.generate(requests)
        rollout.share_prefixes, computed[name] = share, engine.prefilled

    seconds = interleave(
        {"shared": lambda: run("shared", share), "without": lambda: run("without", nobody)}, repeats
    )
    once = 8 * (200 + 300)  # each response's prompt, and the response up to its last branch point
    assert computed["shared"] == once, computed
    rows = [
        {"prefixes": name, "s": seconds[name], "prefix tokens computed": computed[name]}
        for name in seconds
    ]
    what = "48 continuations of 8 responses, without sharing prefixes"
    record(
        "rollout/prefixes",
        rows,
        [
            gain(f"rollout, {what}: time", seconds["shared"], seconds["without"], "s"),
            gain(
                f"rollout, {what}: prefix tokens",
                computed["shared"],
                computed["without"],
                "tokens",
                computed["without"] / once,
            ),
        ],
    )


def against_vllm(repeats: int) -> None:
    try:
        from vllm import SamplingParams
    except ImportError:
        raise UserError(
            "--vllm: vllm is not installed here; make bench runs this in .venv-vllm"
        ) from None

    from vllm_engine import VLLMEngine

    model, tokenizer, eos_ids = load_model("toy/model", "cpu")
    requests = toy_requests(["toy:8:24:1"], tokenizer, 6)
    engine = VLLMEngine("toy/model", eos_ids, 256)
    engine.sync_weights(model.state_dict().items())
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=r.max_tokens,
            seed=r.seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=eos_ids,
        )
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r.prompt_ids} for r in requests]

    def raw() -> int:
        return sum(
            len(o.outputs[0].token_ids)
            for o in engine.llm.generate(prompts, params, use_tqdm=False)
        )

    seconds = interleave(
        {"engine": lambda: sum(len(c.tokens) for c in engine.generate(requests)), "raw": raw},
        repeats,
    )
    ours, other = 1 / seconds["engine"], 1 / seconds["raw"]
    record(
        "rollout/vllm",
        [
            {
                "requests": "initial responses",
                "VLLMEngine, tokens/s": ours,
                "llm.generate, tokens/s": other,
            }
        ],
        [
            gain(
                "rollout, initial responses, vLLM: llm.generate",
                ours,
                other,
                "tokens/s",
                0.95,
                more=True,
            )
        ],
    )


def main() -> None:
    parser = command(__doc__, "--repeats 3")
    parser.add_argument("--vllm", action="store_true", help="the vLLM engine (in .venv-vllm)")
    parser.add_argument(
        "--repeats", type=positive, default=15, help="timed rounds; the median counts"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in [against_vllm] if args.vllm else [against_generate, shared_prefixes]:
        part(args.repeats)


if __name__ == "__main__":
    with stop_on_user_error("bench/rollout.py"):
        main()
