"""bench/rollout.py: tokens per second of the engines, against the usual call without them.

    python bench/rollout.py                        # the transformers engine
    .venv-vllm/bin/python bench/rollout.py --vllm  # VLLMEngine against llm.generate

1. The call of a real training step on the toy: continuations of one batch (prefixes of all lengths)
   and the initial responses of the next. `generate` gets the same requests in one left-padded
   batch, the usual way; it runs until the last row is finished. For both, tokens up to the end
   token count.
2. The same with initial responses only: 24 problems x 6 responses of 50 to 90 tokens, equal
   prompts, only the ends of rows can be skipped. And with programs of 4 to 9 variables, so that
   some responses are twice as long as others.
3. Continuations: 8 responses with 3 branch points each and 2 continuations per point, on a model
   with two wide layers, so that the prompt has a cost; "without" computes the prefix of each
   request again. The table also counts the prefix tokens that were computed.
4. vLLM on the toy's initial responses. Beyond raw `llm.generate`, the engine makes one
   SamplingParams per request and copies the results.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import command, gain, interleave, positive, record
from pipeline import Side

from runtime import rollout
from runtime.cli import UserError, stop_on_user_error
from runtime.data import load_problems
from runtime.models import load_model
from runtime.rollout import Request, TransformersEngine, request_seed


def toy_requests(sets: list[str], tokenizer, samples: int) -> list[Request]:
    problems = [p for source in sets for p in load_problems(source, tokenizer, max_prompt=1024)]
    return [
        Request(p.prompt_ids, 110, 1.0, request_seed(0, i, j))
        for i, p in enumerate(problems)
        for j in range(samples)
    ]


def step_requests() -> list[Request]:
    """What the second generation call of a run asks for: in it batch 1 is continued, and batch 2
    begins."""
    side = Side("attnrl")
    side.step()
    return side.calls[1]


def plain_generate(model, requests: list[Request], eos_id: int) -> int:
    """The same requests with transformers' own loop; how many tokens it sampled, end tokens
    included."""
    width = max(len(r.prompt_ids) for r in requests)
    padding = [width - len(r.prompt_ids) for r in requests]
    rows = [[eos_id] * n + r.prompt_ids for n, r in zip(padding, requests)]
    seen = [[0] * n + [1] * (width - n) for n in padding]
    with torch.no_grad():
        out = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=eos_id,
            max_new_tokens=max(r.max_tokens for r in requests),
            pad_token_id=eos_id,
        )[:, width:].tolist()
    return sum(row.index(eos_id) + 1 if eos_id in row else len(row) for row in out)


def engine_tokens(engine, requests: list[Request]) -> int:
    return sum(len(c.tokens) for c in engine.generate(requests))


def against_generate(repeats: int) -> None:
    model, tokenizer, (eos_id,) = load_model("toy/model", "auto")
    engine = TransformersEngine(model, [eos_id], 10**6)  # all in one batch, as generate has them
    rows, ratios = [], []
    mixes = {
        "a training step's call": step_requests(),
        "initial responses": toy_requests(["toy:8:24:1"], tokenizer, 6),
        "4 to 9 variables": toy_requests([f"toy:{n}:4:1" for n in range(4, 10)], tokenizer, 6),
    }
    for name, requests in mixes.items():
        cases = {
            "engine": lambda: engine_tokens(engine, requests),
            "generate": lambda: plain_generate(model, requests, eos_id),
        }
        ours, other = (1 / seconds for seconds in interleave(cases, repeats).values())
        counted = {"engine, tokens/s": ours, "model.generate, tokens/s": other}
        rows.append({"requests": f"{name}, {len(requests)}"} | counted)
        goal = 2 if name == "a training step's call" else None
        what = f"rollout, {name}: model.generate"
        ratios.append(gain(what, ours, other, "tokens/s", goal, more=True))
    record("rollout/generate", rows, ratios)


def wide_model():
    """Two layers in which a prompt costs something; few words."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
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
    return Qwen2ForCausalLM(config).eval()


def continuation_requests() -> list[Request]:
    """Of 8 prompts of 200 tokens and their responses: two from each of three points."""
    rng, requests = random.Random(0), []
    for i in range(8):
        prompt = [rng.randrange(512) for _ in range(200)]
        response = [rng.randrange(512) for _ in range(400)]
        requests += [
            Request(prompt + response[:at], 16, 1.0, request_seed(i, at, t))
            for at in (100, 200, 300)
            for t in range(2)
        ]
    return requests


def shared_prefixes(repeats: int) -> None:
    engine, requests = TransformersEngine(wide_model(), []), continuation_requests()
    share, computed = rollout.share_prefixes, {}
    alone = lambda prompts: (list(range(len(prompts))), list(range(len(prompts))))  # noqa: E731

    def run(name: str, how):
        rollout.share_prefixes, engine.prefilled = how, 0
        engine.generate(requests)
        rollout.share_prefixes, computed[name] = share, engine.prefilled

    cases = {"shared": lambda: run("shared", share), "without": lambda: run("without", alone)}
    seconds = interleave(cases, repeats)
    once = 8 * (200 + 300)  # each response's prompt, and the response up to its last branch point
    assert computed["shared"] == once, computed
    rows = [
        {"prefixes": name, "s": seconds[name], "prefix tokens computed": computed[name]}
        for name in seconds
    ]
    what = "rollout, 48 continuations of 8 responses, without sharing prefixes"
    ours, other = computed["shared"], computed["without"]
    ratios = [
        gain(f"{what}: time", seconds["shared"], seconds["without"], "s"),
        gain(f"{what}: prefix tokens", ours, other, "tokens", other / once),
    ]
    record("rollout/prefixes", rows, ratios)


def against_vllm(repeats: int) -> None:
    try:
        from vllm import SamplingParams
    except ImportError:
        raise UserError(
            "--vllm: vllm is not installed here; make bench runs this in .venv-vllm"
        ) from None

    from runtime.vllm_engine import VLLMEngine

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
        found = engine.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    cases = {"engine": lambda: engine_tokens(engine, requests), "raw": raw}
    ours, other = (1 / seconds for seconds in interleave(cases, repeats).values())
    counted = {"VLLMEngine, tokens/s": ours, "llm.generate, tokens/s": other}
    what = "rollout, initial responses, vLLM: llm.generate"
    ratio = gain(what, ours, other, "tokens/s", 0.95, more=True)
    record("rollout/vllm", [{"requests": "initial responses"} | counted], [ratio])


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
