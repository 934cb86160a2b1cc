"""rollout.py: engines turn requests (token ids in) into completions (token ids and their
log-probabilities out).

An engine has the methods of `TransformersEngine`: `generate(requests)`, `sleep()` while the policy
is updated, `sync_weights(weights)` after that, `close()`. There are two:

    TransformersEngine   the default: plain transformers; samples with the policy itself, even on a
                         laptop
    VLLMEngine           vLLM inside the training process, one engine per rank: for real models
                         (vllm_engine.py)

Sampling takes a quarter to two thirds of a training step. So TransformersEngine works like this:
- A prefix shared by several requests is computed once: six samples of a problem, two continuations
  of one branch point, a branch point whose prefix begins the prefix of a later one, and the common
  beginning of all prompts (a few-shot preamble, a system prompt).
- Requests of similar length run together; finished rows leave the batch.
- A request's tokens depend only on its seed. The random number of its t-th token comes from
  (seed, t), never from a global generator, so neither the other requests nor their order matter (up
  to float rounding in the model).

Log-probabilities are those of the distribution that was sampled: log_softmax(logits / temperature).
An engine with a separate copy of the weights could silently sample from old ones: `engine_gap`
(scoring.py) checks this after every sync.

Left out: top-p and top-k (the paper samples from the full distribution), continuous refilling of a
running batch.

    python -m pytest tests/runtime/test_rollout.py
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from fci import scoring_mode
from runtime.packing import common
from runtime.scoring import output_head

PREAMBLE = 16  # all prompts must share at least so many tokens to make a separate pass worthwhile


@dataclass
class Request:
    """Sample after `prompt_ids` until an end token or `max_tokens`. Temperature 0 is greedy."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int


@dataclass
class Completion:
    """Sampled tokens (including an end token) and their log-probs; finished: it ended with an end
    token, not at `max_tokens`."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def request_seed(*path: int) -> int:
    """A 63-bit seed for one rollout from its place in the run: (run seed, step, problem, response,
    branch, continuation).

    >>> request_seed(0, 1, 2) == request_seed(0, 1, 2)
    True
    >>> request_seed(0, 1, 2) == request_seed(0, 2, 1)
    False
    """
    high, low = np.random.SeedSequence([len(path), *path]).generate_state(2)
    return (int(high) << 31 | int(low) >> 1) & (2**63 - 1)


def probe_requests(requests: Sequence[Request], completions: list[Completion]) -> list[Request]:
    """Requests for a few more tokens from the middle of the first completions: the engine has these
    prefixes in its cache."""
    probes = []
    for request, completion in zip(requests[:4], completions):
        half = len(completion.tokens) // 2
        prefix = request.prompt_ids + completion.tokens[:half]
        length = min(16, request.max_tokens - half)
        probes.append(Request(prefix, length, request.temperature, request.seed))
    return probes


def share_prefixes(prompts: list[list[int]]) -> tuple[list[int], list[int]]:
    """(longest, rides): indices of the prompts that must be computed, and for each prompt the
    computed one that begins with it.

    >>> share_prefixes([[1, 2], [1, 2, 3], [4], [1, 2]])
    ([1, 2], [1, 1, 2, 1])
    """
    # a prefix sorts directly before its extensions
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    rides = list(range(len(prompts)))
    for i, after in zip(reversed(order[:-1]), reversed(order[1:])):
        if prompts[after][: len(prompts[i])] == prompts[i]:
            rides[i] = rides[after]
    return sorted(set(rides)), rides


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (R, heads, P, D) with room for more tokens: the parent class
    copies all of them for every token."""

    # room: tensors whose filled part are keys and values; spare: tokens by which they grow
    room, spare = None, 64

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        end = self.keys.shape[2] + 1  # after the prompts tokens come one at a time
        if self.room is None or end > self.room[0].shape[2]:
            self.room = [
                torch.nn.functional.pad(x, (0, 0, 0, self.spare)) for x in (self.keys, self.values)
            ]
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, end - 1 : end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None


class TransformersEngine:
    """The embedded engine: `model` (the policy itself, or a copy of it where the policy is
    sharded), with a KV cache. `eos_ids` end a response; at most `token_budget` tokens (rows x
    longest prompt and completion) are in the cache at once.
    """

    def __init__(self, model, eos_ids: list[int], token_budget: int = 65536):
        self.model, self.eos_ids, self.token_budget = model, eos_ids, token_budget
        # prompt tokens computed so far, for tests and bench: shared prefixes count once
        self.prefilled = 0

    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the new weights after an update. If the model is the policy itself it already has
        them; a copy copies them."""
        own = self.model.state_dict()
        for name, value in weights:
            if own[name].data_ptr() != value.data_ptr():
                own[name].copy_(value)

    def sleep(self) -> None:
        """Nothing to free: the KV cache exists only during `generate`."""

    def close(self) -> None:
        pass

    def generate(
        self, requests: list[Request], on_token: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """One Completion per request, in order. on_token(index, token) is called for every sampled
        token (streaming).

        Raises ValueError for an empty prompt or a budget below one token.
        """
        for r in requests:
            if not r.prompt_ids or r.max_tokens < 1:
                raise ValueError("a request needs at least one prompt token and max_tokens >= 1")
        completions = [Completion([], [], False) for _ in requests]
        with scoring_mode(self.model):
            preamble = self._preamble([r.prompt_ids for r in requests])
            for batch in self._batches(requests):
                self._sample(batch, requests, completions, on_token, preamble)
        return completions

    def _preamble(self, prompts: list[list[int]]) -> Cache:
        """A cache of one row with the common beginning of all prompts; empty if it is too short."""
        preamble: Any = Cache(layer_class_to_replicate=DynamicLayer)
        longest, _ = share_prefixes(prompts)
        if len(longest) > 1:
            # in sorted order all others are between these two; every prompt keeps its last token
            length = common(min(prompts), max(prompts))
            length = min(length, min(map(len, prompts)) - 1)
            if length >= PREAMBLE:
                self.prefilled += length
                ids = torch.tensor([prompts[0][:length]], device=self.model.device)
                self.model.base_model(input_ids=ids, past_key_values=preamble, use_cache=True)
        return preamble

    def _batches(self, requests: list[Request]) -> list[list[int]]:
        """Indices grouped by length; requests that share a prefix stay together if they fit into
        the budget."""
        _, rides = share_prefixes([r.prompt_ids for r in requests])
        prompt = [len(requests[i].prompt_ids) for i in rides]
        batches: list[list[int]] = []
        # completion of the newest batch; its longest prompt is that of the newest request
        longest = 0
        for i in sorted(range(len(requests)), key=lambda i: (prompt[i], rides[i])):
            longest = max(longest, requests[i].max_tokens)
            # every row is as wide as the longest prompt AND the longest completion, which may be
            # another row's
            if not batches or (len(batches[-1]) + 1) * (prompt[i] + longest) > self.token_budget:
                batches.append([])
                longest = requests[i].max_tokens
            batches[-1].append(i)
        return batches

    def _prefill(self, requests: list[Request], preamble: Any):
        """(cache, mask, hidden): prompts of all requests in the cache, right-aligned; mask (R, P);
        last states (R, d).

        Only prompts that are not a prefix of another are computed, from the end of the preamble on;
        the others take their part of that cache row. Right-aligned, so that distances between cache
        slots are distances between tokens (this keeps sliding windows right).
        """
        device = self.model.device
        prompts = [r.prompt_ids for r in requests]
        longest, rides = share_prefixes(prompts)
        width, start = max(len(prompts[i]) for i in longest), preamble.get_seq_length()
        ids = torch.tensor(
            [prompts[i][start:] + [0] * (width - len(prompts[i])) for i in longest], device=device
        )
        self.prefilled += sum(len(prompts[i]) - start for i in longest)
        # this layer class keeps all tokens, even for sliding windows
        computed: Any = Cache(layer_class_to_replicate=DynamicLayer)
        for index, layer in enumerate(preamble.layers):
            every = len(longest), -1, -1, -1
            computed.update(layer.keys.expand(every), layer.values.expand(every), index)
        hidden = self.model.base_model(
            input_ids=ids, past_key_values=computed, use_cache=True
        ).last_hidden_state
        row = torch.tensor([longest.index(i) for i in rides], device=device)  # (R,)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        # (R, P): token index, < 0 = none
        slots = torch.arange(width, device=device)[None] - (width - lengths)[:, None]
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        for index, layer in enumerate(computed.layers):
            pick = row[:, None], slice(None), slots.clamp(min=0)  # -> (R, P, heads, D)
            cache.update(
                layer.keys[pick].transpose(1, 2), layer.values[pick].transpose(1, 2), index
            )
        return cache, slots >= 0, hidden[row, lengths - 1 - start]

    def _sample(
        self,
        rows: list[int],
        requests: list[Request],
        completions: list[Completion],
        on_token,
        preamble: Cache,
    ) -> None:
        """Fill the completions of one batch. `rows` lists the requests that are still in it, in the
        order of the cache."""
        device, head = self.model.device, output_head(self.model)
        cache, mask, hidden = self._prefill([requests[i] for i in rows], preamble)
        # [request][t]
        uniform = {
            i: np.random.default_rng(requests[i].seed).random(requests[i].max_tokens) for i in rows
        }
        temperature = torch.tensor([requests[i].temperature for i in rows], device=device)
        for t in range(max(requests[i].max_tokens for i in rows)):
            u = torch.tensor([uniform[i][min(t, len(uniform[i]) - 1)] for i in rows], device=device)
            tokens, logprobs = sample_tokens(head(hidden), temperature, u)
            done = []
            for position, (i, token, logprob) in enumerate(
                zip(rows, tokens.tolist(), logprobs.tolist())
            ):
                one = completions[i]
                if not one.finished and len(one.tokens) < requests[i].max_tokens:
                    one.tokens.append(token)
                    one.logprobs.append(logprob)
                    one.finished = token in self.eos_ids
                    if on_token:
                        on_token(i, token)
                if one.finished or len(one.tokens) == requests[i].max_tokens:
                    done.append(position)
            if len(done) == len(rows):
                break
            # removing rows copies the cache: only worth it for at least an eighth of the rows
            if 8 * len(done) >= len(rows):
                stay = torch.tensor(sorted(set(range(len(rows))) - set(done)), device=device)
                rows = [rows[i] for i in stay.tolist()]
                tokens, temperature, mask = tokens[stay], temperature[stay], mask[stay]
                cache.batch_select_indices(stay)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = self.model.base_model(
                input_ids=tokens[:, None],
                attention_mask=mask.long(),
                use_cache=True,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            ).last_hidden_state[:, -1]


def sample_tokens(
    logits: torch.Tensor, temperature: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R,) and log-probs (R,) from logits (R, V): the inverse of the cumulative distribution
    at u in [0, 1).

    With one uniform number per token, sampling is reproducible per request. Temperature 0 takes the
    most likely token.
    """
    greedy = temperature == 0
    logprobs = (logits.float() / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    target = (u * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
    tokens = torch.where(greedy, logprobs.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
