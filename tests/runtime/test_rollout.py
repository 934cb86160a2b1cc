"""test_rollout.py: what is sampled depends on a request's own prompt, temperature and seed, and on
nothing else.

The second opinion is `reference`: one request at a time, the whole sequence recomputed for every
token, eager attention, no cache, no batch, no padding, the inverse of the cumulative distribution
in numpy.

    python -m pytest tests/runtime/test_rollout.py
"""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from helpers import KINDS, VOCABULARY, WINDOW, WINDOWED, random_tokens, tiny_model

from runtime.rollout import (
    PREAMBLE,
    Completion,
    Request,
    RoomyLayer,
    TransformersEngine,
    request_seed,
    sample_tokens,
    share_prefixes,
)
from runtime.scoring import Sequence, score

CLOSE = dict(rtol=0, atol=1e-5)
EOS = [5, 11]
MODELS = {kind: tiny_model(kind) for kind in KINDS}
# so that the cache of these short completions outgrows its room, again and again
RoomyLayer.spare = 3
EAGER = {kind: copy.deepcopy(model) for kind, model in MODELS.items()}
for twin in EAGER.values():
    twin.set_attn_implementation("eager")


@torch.no_grad()
def reference(model, request: Request, eos_ids=EOS) -> Completion:
    """Sampling as one would explain it."""
    uniform = np.random.default_rng(request.seed).random(request.max_tokens)
    tokens, logprobs = [], []
    for t in range(request.max_tokens):
        logits = model(torch.tensor([request.prompt_ids + tokens])).logits[0, -1].double().numpy()
        scaled = logits / (request.temperature or 1.0)
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        token, cumulative = 0, p[0]
        while uniform[t] >= cumulative and token < len(p) - 1:
            token += 1
            cumulative += p[token]
        if request.temperature == 0:
            token = int(np.argmax(logits))
        tokens.append(token)
        logprobs.append(float(np.log(p[token])))
        if token in eos_ids:
            return Completion(tokens, logprobs, True)
    return Completion(tokens, logprobs, False)


def requests_for(seed: int, temperatures=(1.0, 0.6, 0)) -> list[Request]:
    """Like a training step's call: samples of three problems, continuations of branch points (one
    prefix begins another) and single requests; prompts of 1 to 40 tokens (sliding windows are 8),
    budgets of 1 to 25 tokens."""
    rng = random.Random(seed)
    prompts = []
    for length in (3, 17, 30):
        problem = random_tokens(rng, length)
        prompts += [problem] * 3
        response = random_tokens(rng, 10)
        prompts += [problem + response[:4]] * 2 + [problem + response[:9]]
    prompts += [random_tokens(rng, length) for length in (1, 2, 40)]
    return [
        Request(
            prompt, rng.randint(1, 25), temperatures[i % len(temperatures)], request_seed(seed, i)
        )
        for i, prompt in enumerate(prompts)
    ]


def assert_same(got: list[Completion], wanted: list[Completion]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert one.tokens == other.tokens and one.finished == other.finished
        np.testing.assert_allclose(one.logprobs, other.logprobs, **CLOSE)


def generate(
    kind: str, requests: list[Request], token_budget: int = 65536, eos_ids=EOS
) -> list[Completion]:
    return TransformersEngine(MODELS[kind], eos_ids, token_budget).generate(requests)


class Calls:
    """Watches an engine's model: (rows, new tokens a row, cached tokens a row) of each forward
    pass."""

    def __init__(self, model):
        self.seen: list[tuple[int, int, int]] = []
        self.handle = model.base_model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.seen.append((*kwargs["input_ids"].shape, kwargs["past_key_values"].get_seq_length()))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self.handle.remove()


# --------------------------------------------------------------------------------------------------
# Agreement with the reference, with scoring.score and with transformers
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_completions_equal_sampling_without_cache_or_batch(kind):
    """All families (GQA, sliding windows with prompts longer than the window), short and long
    prompts in one batch."""
    requests = requests_for(1)
    wanted = [reference(EAGER[kind], r) for r in requests]
    assert any(c.finished for c in wanted) and not all(c.finished for c in wanted)
    assert_same(generate(kind, requests), wanted)
    assert_same(generate(kind, requests, token_budget=150), wanted)


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_matter_here(kind):
    """The premise of the test above: without the window other tokens are sampled."""
    free = copy.deepcopy(MODELS[kind])
    free.config.sliding_window = 10**6
    requests = [r for r in requests_for(1) if len(r.prompt_ids) > 2 * WINDOW]
    without = TransformersEngine(free, EOS).generate(requests)
    assert [c.tokens for c in without] != [c.tokens for c in generate(kind, requests)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_the_scoring_pass(kind, temperature):
    """Sampler and learner agree: the PPO ratio of an unchanged policy is 1."""
    requests = requests_for(2, temperatures=[temperature])
    completions = generate(kind, requests)
    scored = score(
        MODELS[kind],
        [Sequence(r.prompt_ids, c.tokens) for r, c in zip(requests, completions)],
        temperature,
    )
    for completion, scores in zip(completions, scored):
        np.testing.assert_allclose(completion.logprobs, scores.logprobs, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_generate(kind):
    requests = [Request(r.prompt_ids, r.max_tokens, 0, r.seed) for r in requests_for(3)]
    for request, completion in zip(requests, generate(kind, requests)):
        ids = torch.tensor([request.prompt_ids])
        out = MODELS[kind].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=EOS,
            max_new_tokens=request.max_tokens,
            pad_token_id=EOS[0],
        )
        assert completion.tokens == out[0, len(request.prompt_ids) :].tolist()


# --------------------------------------------------------------------------------------------------
# Independence from everything else
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_tokens_depend_on_the_own_seed_only(kind):
    """Alone, in any order, with other company, under any token budget: the same tokens."""
    requests = requests_for(4)
    wanted = generate(kind, requests)
    assert_same([generate(kind, [r])[0] for r in requests], wanted)
    rng = random.Random(4)
    for budget in (65536, 200, 60, 1):
        order = rng.sample(range(len(requests)), len(requests))
        got = generate(kind, [requests[i] for i in order], budget)
        assert_same(got, [wanted[i] for i in order])
    strangers = requests_for(5)
    assert_same(generate(kind, requests[:7] + strangers + requests[7:])[:7], wanted[:7])
    assert_same(generate(kind, requests[::3]), wanted[::3])


def test_another_seed_gives_other_tokens():
    """Not vacuous: 12 samples of one prompt that differ by the seed only are nearly all
    different."""
    requests = [Request([1, 2, 3], 10, 1.0, request_seed(0, i)) for i in range(12)]
    assert len({tuple(c.tokens) for c in generate("qwen2", requests, eos_ids=[])}) >= 11
    same = [Request([1, 2, 3], 10, 1.0, 77)] * 3
    assert len({tuple(c.tokens) for c in generate("qwen2", same)}) == 1


def test_a_larger_budget_only_appends():
    """The t-th random number belongs to (seed, t): max_tokens cuts a completion, it does not change
    it."""
    short, long = generate("qwen3", [Request([1, 2, 3], n, 1.0, 9) for n in (6, 20)], eos_ids=[])
    assert long.tokens[:6] == short.tokens and len(long.tokens) == 20


def test_global_random_states_are_neither_read_nor_touched():
    requests = requests_for(6)
    results = []
    for seed in (0, 123):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        results.append(generate("qwen2", requests))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == str(before[1]) and np.array_equal(
            np.random.get_state()[1], before[1][1]
        )
        assert random.getstate() == before[2]
    assert results[0] == results[1]  # bit for bit


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_leaves_as_it_came(implementation):
    """A policy in the middle of training (dropout on, mixed modes): sampled in evaluation mode,
    left as it came."""
    model = tiny_model("llama", attention_dropout=0.5)
    model.set_attn_implementation(implementation)
    requests = requests_for(7)
    wanted = TransformersEngine(model, EOS).generate(requests)
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    assert_same(TransformersEngine(model, EOS).generate(requests), wanted)
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    assert model.config._attn_implementation == implementation
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        TransformersEngine(model, EOS).generate([Request([1, VOCABULARY], 3, 1.0, 0)])
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------
# Shared prefixes, batches, rows that leave
# --------------------------------------------------------------------------------------------------
def test_shared_prefixes_are_computed_once():
    """Six samples of a 20-token problem, two continuations at 5 tokens more, two at 9 more: 29
    tokens, not 228."""
    problem, response = random_tokens(random.Random(8), 20), random_tokens(random.Random(9), 9)
    prompts = [problem] * 6 + [problem + response[:5]] * 2 + [problem + response] * 2
    requests = [Request(p, 8, 1.0, request_seed(1, i)) for i, p in enumerate(prompts)]
    engine = TransformersEngine(MODELS["qwen2_window"], EOS)
    together = engine.generate(requests)
    assert engine.prefilled == 29
    # one request a batch: nothing is shared
    separate = TransformersEngine(MODELS["qwen2_window"], EOS, token_budget=1)
    assert_same(separate.generate(requests), together)
    assert separate.prefilled == 6 * 20 + 2 * 25 + 2 * 29
    engine.generate(requests[:1] + [Request([1, 2, 3], 4, 1.0, 0)])
    assert engine.prefilled == 29 + 20 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_prompts_begin_with_is_computed_once_a_call(kind):
    """A preamble of 30 tokens before problems of 5, 9 and 1, and a continuation of the second at 4
    tokens more, in two batches: 30 + 5 + 13 + 1 tokens, not 31 + 35 + 43."""
    rng = random.Random(16)
    preamble, *problems, more = (random_tokens(rng, n) for n in (30, 5, 9, 1, 4))
    problems = [[i, *problem[1:]] for i, problem in enumerate(problems)]  # they part at once
    prompts = [preamble + problem for problem in problems] * 2 + [preamble + problems[1] + more]
    requests = [Request(p, 8, 1.0, request_seed(5, i)) for i, p in enumerate(prompts)]
    engine = TransformersEngine(MODELS[kind], EOS, token_budget=4 * (43 + 8))
    assert_same(engine.generate(requests), [reference(MODELS[kind], r) for r in requests])
    assert engine.prefilled == 30 + 5 + 13 + 1
    # a prompt that IS what the others begin with keeps its last token for itself
    requests.append(Request(preamble, 8, 1.0, 3))
    assert_same(engine.generate(requests), [reference(MODELS[kind], r) for r in requests])


def test_a_few_common_tokens_are_not_worth_a_pass_of_their_own():
    engine = TransformersEngine(MODELS["qwen2"], EOS)
    for count, prefilled in ((PREAMBLE - 1, 2 * PREAMBLE), (PREAMBLE, PREAMBLE + 2)):
        engine.prefilled = 0
        engine.generate([Request([3] * count + [i], 2, 1.0, i) for i in (1, 2)])
        assert engine.prefilled == prefilled


def test_requests_that_share_a_prefix_go_into_one_batch():
    """Two problems of 20 tokens, each with two samples and a continuation at 28; room for three
    requests a batch."""
    rng = random.Random(15)
    problems = [random_tokens(rng, 20) for _ in range(2)]
    prompts = problems * 2 + [problem + random_tokens(rng, 8) for problem in problems]
    engine = TransformersEngine(MODELS["qwen2"], EOS, token_budget=3 * (28 + 8))
    engine.generate([Request(p, 8, 1.0, request_seed(4, i)) for i, p in enumerate(prompts)])
    assert engine.prefilled == 2 * 28


@pytest.mark.parametrize(
    "prompts, longest, rides",
    [
        ([[1, 2], [1, 2, 3], [4], [1, 2]], [1, 2], [1, 1, 2, 1]),
        ([[1]], [0], [0]),
        ([[1, 2], [1, 3]], [0, 1], [0, 1]),  # a common beginning alone is not shared
        ([[1, 2, 3], [1], [1, 2]], [0], [0, 0, 0]),
        ([[2, 1], [1, 2, 1], [2]], [0, 1], [0, 1, 0]),
    ],
)
def test_share_prefixes(prompts, longest, rides):
    assert share_prefixes(prompts) == (longest, rides)


def test_share_prefixes_on_random_prompts():
    rng = random.Random(10)
    for _ in range(200):
        prompts = [
            [rng.randint(0, 1) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 12))
        ]
        longest, rides = share_prefixes(prompts)
        assert longest == sorted(set(rides)) and all(rides[i] == i for i in longest)
        assert all(prompts[ride][: len(p)] == p for p, ride in zip(prompts, rides))
        # none that is computed could ride on another one
        for i, j in itertools.permutations(longest, 2):
            assert prompts[i][: len(prompts[j])] != prompts[j]


MANY = requests_for(12)
# 50 tokens each, but side by side the cache is 40 + 48 wide: the longest prompt and the longest
# completion are different rows'
UNEVEN = [Request([1 + i, 2], 48, 1.0, i) for i in range(9)]
UNEVEN.append(Request(random_tokens(random.Random(11), 40), 10, 1.0, 9))


@pytest.mark.parametrize(
    "requests, budget", [(MANY, 60), (MANY, 150), (MANY, 400), (MANY, 65536), (UNEVEN, 500)]
)
def test_the_cache_stays_within_the_token_budget(requests, budget):
    """rows x cached tokens <= token_budget in every forward pass, unless a single row needs
    more."""
    engine = TransformersEngine(MODELS["llama"], [], budget)
    batches = engine._batches(requests)
    assert sorted(i for batch in batches for i in batch) == list(range(len(requests)))
    with Calls(engine.model) as calls:
        completions = engine.generate(requests)
    assert [len(c.tokens) for c in completions] == [r.max_tokens for r in requests]
    assert all(rows * (new + cached) <= budget or rows == 1 for rows, new, cached in calls)
    assert (len(batches) == 1) == (budget == 65536)


def test_finished_rows_leave_the_batch():
    """Budgets of 2, 4, ... 32 tokens: rows of the forward passes fall from 16 to 1, and nobody
    notices."""
    requests = [Request([1 + i, 2], 2 * (i + 1), 1.0, request_seed(2, i)) for i in range(16)]
    engine = TransformersEngine(MODELS["mistral"], [])
    with Calls(engine.model) as calls:
        completions = engine.generate(requests)
    rows = [rows for rows, *_ in calls]
    assert (
        rows == sorted(rows, reverse=True)
        and rows[0] == 16
        and rows[-1] == 1
        and len(set(rows)) >= 8
    )
    assert len(calls) == 32  # the prompts, then 31 single tokens: nothing runs after the last token
    assert_same(completions, [reference(EAGER["mistral"], r, []) for r in requests])


def test_end_tokens_finish_a_completion():
    """EOS is the last token of its completion, counts as one, and is never passed; without one
    max_tokens are made."""
    requests = [Request([i % VOCABULARY], 1 + i % 30, 1.0, request_seed(3, i)) for i in range(80)]
    free = generate("qwen3", requests, eos_ids=[])
    assert all(len(c.tokens) == r.max_tokens and not c.finished for r, c in zip(requests, free))
    hits = 0
    for request, completion, whole in zip(requests, generate("qwen3", requests), free):
        ends = [t for t, token in enumerate(whole.tokens) if token in EOS]
        stop = ends[0] + 1 if ends else request.max_tokens
        assert (
            completion.tokens == whole.tokens[:stop]
            and len(completion.logprobs) == stop <= request.max_tokens
        )
        assert completion.finished == bool(ends)  # also when EOS is the very last token allowed
        hits += bool(ends)
    assert 20 < hits < 70


def test_every_token_is_streamed_once_and_in_order():
    requests = requests_for(13)
    streams = [[] for _ in requests]
    engine = TransformersEngine(MODELS["qwen2"], EOS, token_budget=200)
    completions = engine.generate(requests, on_token=lambda i, token: streams[i].append(token))
    assert streams == [c.tokens for c in completions]


def test_wrong_requests_are_refused():
    engine = TransformersEngine(MODELS["qwen2"], EOS)
    for bad in (Request([], 5, 1.0, 0), Request([1], 0, 1.0, 0)):
        with pytest.raises(ValueError, match="at least one prompt token"):
            engine.generate([Request([1], 5, 1.0, 0), bad])
    assert engine.generate([]) == []


def test_sync_weights_switches_the_weights():
    requests, other = requests_for(14), tiny_model("qwen2", seed=1)
    engine = TransformersEngine(copy.deepcopy(MODELS["qwen2"]), EOS)
    first = engine.generate(requests)
    engine.sync_weights(other.state_dict().items())
    second = engine.generate(requests)
    assert second == TransformersEngine(other, EOS).generate(requests)
    assert [c.tokens for c in first] != [c.tokens for c in second]
    engine.sync_weights(MODELS["qwen2"].state_dict().items())
    assert engine.generate(requests) == first


# --------------------------------------------------------------------------------------------------
# sample_tokens and request_seed
# --------------------------------------------------------------------------------------------------
def draw(
    logits: torch.Tensor, temperature: float, u: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    return sample_tokens(
        logits.expand(len(u), -1), torch.full((len(u),), temperature), torch.tensor(u)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sample_tokens_draws_from_the_tempered_softmax(temperature):
    logits = 1.5 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits[0].double() / temperature, -1).numpy()
    n = 100_000
    # u on an even grid: every token's count is its probability, to one draw at each end of its
    # interval
    tokens, logprobs = draw(logits, temperature, (np.arange(n) + 0.5) / n)
    np.testing.assert_allclose(np.bincount(tokens, minlength=20), n * p, rtol=0, atol=1.1)
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], **CLOSE)
    # random u: chi-square with 19 degrees of freedom; 43.8 is its 99.9 % quantile
    counts = np.bincount(
        draw(logits, temperature, np.random.default_rng(1).random(n))[0], minlength=20
    )
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 43.8
    # the test can tell temperatures apart
    wrong = torch.softmax(logits[0].double() / (temperature + 0.1), -1).numpy()
    assert ((counts - n * wrong) ** 2 / (n * wrong)).sum() > 43.8


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 0.5])
def test_impossible_tokens_are_never_drawn(u):
    """At both ends of [0, 1) and in between, with impossible tokens first, last and in the
    middle."""
    rng = torch.Generator().manual_seed(2)
    for _ in range(300):
        logits = 5 * torch.randn(1, 50, generator=rng)
        logits[0, torch.rand(50, generator=rng) < 0.3] = -torch.inf
        logits[0, [0, -1]] = -torch.inf
        (token,), (logprob,) = draw(logits, 1.0, np.array([u]))
        assert logits[0, token] > -torch.inf and logprob > -torch.inf
        possible = (logits[0] > -torch.inf).nonzero()[:, 0]
        if u == 0:
            assert token == possible[0]
        elif u > 0.5:
            assert (
                token == possible[-1] or torch.softmax(logits[0].double(), -1)[possible[-1]] < 1e-15
            )
    assert draw(torch.tensor([[-torch.inf, 3.0, -torch.inf]]), 1.0, np.array([u]))[0].item() == 1


def test_temperatures_of_a_batch_do_not_mix():
    """Greedy rows beside sampled ones: each as if alone; greedy log-probs are those of the
    untempered model."""
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    temperatures, u = (
        torch.tensor([1.0, 0.0, 0.6, 0.0]),
        torch.tensor([0.3, 0.9, 0.8, 0.1], dtype=torch.float64),
    )
    tokens, logprobs = sample_tokens(logits, temperatures, u)
    assert tokens[1] == logits[1].argmax() and tokens[3] == logits[3].argmax()
    assert logprobs[1].item() == pytest.approx(logits[1].log_softmax(-1).max().item(), abs=1e-6)
    for row in range(4):
        token, logprob = sample_tokens(
            logits[row : row + 1], temperatures[row : row + 1], u[row : row + 1]
        )
        assert (token.item(), logprob.item()) == (
            tokens[row].item(),
            pytest.approx(logprobs[row].item(), abs=1e-6),
        )


def test_request_seeds_are_distinct_stable_and_fit_an_engine():
    """Known values: a seed that changed would silently change every run (numpy promises
    SeedSequence's stability)."""
    grid = list(itertools.product(range(2), range(6), range(20), range(6), range(3), range(3)))
    grid += [(0,) * n for n in range(6)] + [(0, 1), (1, 0), (1,), (2**31, 5), (2**63 - 1, 0)]
    seeds = [request_seed(*path) for path in grid]
    assert len(set(seeds)) == len(grid)
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in seeds)  # vLLM takes an int64
    assert max(seeds) > 2**62  # all 63 bits are used
    assert request_seed(0, 1, 2, 3, 4, 5) == 6241987655047474482
