"""test_plan.py: the plan of a run. Parameters and bytes are those of real models, arithmetic is
monotone, the text says what it should."""

import json
import resource
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import transformers
from fixtures import TOY_MODEL
from helpers import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from attnrl import Config
from runtime import dist
from runtime.cli import UserError
from runtime.rollout import Request, TransformersEngine
from runtime.scoring import HEAD_CHUNK, Sequence, TokenLogprobs, score, token_logprobs
from tools import plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [
    dict(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
    ),
    dict(
        hidden_size=64,
        intermediate_size=400,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    ),
    dict(
        hidden_size=96,
        intermediate_size=128,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=32,
    ),
]


def settings(**overrides) -> Config:
    """The paper's settings on FSDP2 in bf16 with vLLM, unless overridden."""
    chosen = dict(
        dtype="bf16",
        parallel="fsdp",
        engine="vllm",
        engine_memory=0.4,
        activation_checkpointing=False,
        cpu_offload=False,
        target_sequences=1920,
        grpo_samples=30,
    )
    return Config(**(chosen | overrides))


def qwen2(size: str) -> plan.Shape:
    return plan.count(
        transformers.Qwen2Config(
            num_hidden_layers=28, tie_word_embeddings=False, **plan.QWEN2[size]
        )
    )


def small_model(dtype: str, kind: str = "qwen2", layers: int = 3, vocabulary: int = 40, **sizes):
    return tiny_model(
        kind,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        **sizes,
    ).to(DTYPES[dtype])


def config_only(folder, size: str = "1.5B"):
    """A model directory without weights and tokenizer."""
    config = transformers.Qwen2Config(
        num_hidden_layers=28,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        **plan.QWEN2[size],
    )
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]})
    )
    return str(folder)


# --------------------------------------------------------------------------------------------------
# What is really allocated
# --------------------------------------------------------------------------------------------------
def saved_bytes(model, tokens: int) -> int:
    """Bytes that a forward pass of one row really keeps for the backward pass, weights and buffers
    left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, seen = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # alive, so that no other storage gets the same address
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False
        )
    assert output.last_hidden_state.grad_fn is not None
    return sum(seen.values())


def layer_bytes(tokens: int, dtype: str, **kwargs) -> int:
    """The same of one decoder layer: three layers minus two."""
    three, two = (
        saved_bytes(small_model(dtype, layers=layers, **kwargs), tokens) for layers in (3, 2)
    )
    return three - two


def peak_bytes(function) -> int:
    """The most that `function` has allocated at once, from the CPU allocator's own events (inside
    of operators included)."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def planned_bytes(config, shape, phase: str) -> float:
    """What `memory` says of everything but weights, gradients, moments and the guess."""
    fixed = ("weights", "Adam's moments", "reference", "gradients", "context, gaps")
    parts = plan.memory(config, shape, 1, phase)
    return plan.GIB * sum(size for name, size in parts.items() if name not in fixed)


@pytest.fixture
def cpu_kernels(monkeypatch):
    """On the CPU the fused attention kernel takes fp32 with grouped-query attention, too."""
    monkeypatch.setattr(plan, "FP32_GQA_STORES_ATTENTION", False)


# --------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts_equal_a_real_models(kind, tied, tmp_path):
    model = tiny_model(kind, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    shape = plan.parameter_counts(str(tmp_path))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layer, shape.root) == (layer, shape.parameters - 3 * layer)
    assert (
        shape.layers,
        shape.hidden,
        shape.inner,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
    ) == (3, 32, 48, 4, 2, 8)
    assert (shape.vocabulary, shape.normed_heads) == (40, kind == "qwen3")


def test_parameter_counts_of_the_papers_models_by_hand():
    # a layer: q (with bias), k and v, o, gate + up + down, two norms; then embedding, head, last
    # norm
    layer = 1536 * 1536 + 1536 + 2 * (1536 * 256 + 256) + 1536 * 1536 + 3 * 1536 * 8960 + 2 * 1536
    small = qwen2("1.5B")
    assert (
        (small.layer, small.root) == (layer, 2 * 151936 * 1536 + 1536) == (46_797_824, 466_748_928)
    )
    assert small.parameters == 28 * layer + small.root == 1_777_088_000
    assert qwen2("7B").parameters == 7_615_616_512


def test_a_directory_without_weights_is_planned_fast_and_in_little_memory(tmp_path):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    text = plan.describe(settings(model=config_only(tmp_path, "7B")), ranks=8)
    assert time.perf_counter() - started < 10
    # KiB; the weights are 30 million
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert "7,615,616,512 parameters" in text


def test_a_machine_without_a_gpu_is_told_whether_its_own_memory_is_enough(tmp_path, monkeypatch):
    """A 1.5B model, fp32: with 1000, 60 and 20 GiB. A vLLM plan is for GPUs only."""
    model = config_only(tmp_path, "1.5B")
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 0}
    monkeypatch.setattr(plan.os, "sysconf", pages.get)
    said = []
    for gib in (1000, 60, 20):
        pages["SC_PHYS_PAGES"] = gib * 2**30 // 4096
        sizes = dict(max_prompt=256, max_response=256, token_budget=8192)
        config = settings(model=model, engine="transformers", **sizes)
        said.append(plan.describe(config, ranks=1).splitlines()[3].strip())
    assert said[0].startswith("the machine at hand has no GPU and 1000 GiB: on its CPU the run")
    assert said[0].endswith("GiB: fits")
    most = float(said[0].split(" about ")[1].split()[0])
    assert f"may take {most} GiB: DOES NOT FIT; --token_budget " in said[1]
    budget, _, less = said[1].split("--token_budget ")[1].partition(" takes ")
    assert int(budget) in (4096, 2048, 1024, 512) and float(less) <= 60 < most
    assert said[2].endswith("DOES NOT FIT")
    assert "no GPU" not in plan.describe(settings(model=model), ranks=1)


def test_a_plan_says_which_files_are_not_here():
    """They may be on the machine that is planned for."""
    config = settings(problems="no.jsonl", test_problems="", test_fraction=0.1)
    said = "no.jsonl (no such file here), evaluated on 10 % of them, held back"
    assert plan.data_lines(config) == [said]
    both = replace(config, test_problems="x.jsonl")  # a preset's; training holds back, too
    assert plan.data_lines(both) == [said]
    config = settings(problems="toy:8:2:1", test_problems="hf:some/set")
    assert plan.data_lines(config) == ["toy:8:2:1, evaluated on hf:some/set"]


def test_a_plan_reads_the_columns_of_the_files_that_are_here(tmp_path):
    """So a wrong name is found before a run waits for its machine."""
    mine = tmp_path / "mine.jsonl"
    row = '{"question": "1 + 1?", "reply": "2", "solution": "It is 2."}\n'
    mine.write_text(2 * row)
    config = settings(problems=str(mine), test_problems="toy:8:2:1", answer_column="reply")
    assert plan.data_lines(config) == [f"{mine} (2 rows), evaluated on toy:8:2:1"]
    with pytest.raises(UserError, match=f"{mine}: --answer_column answr: no such column in"):
        plan.data_lines(replace(config, answer_column="answr"))
    mine.write_text('{"question": "1 + 1?", "answer": "2", "solution": "It is 2."}\n')
    said = f"{mine}: the problem is read from question, the answer from answer, nothing from"
    first, second = plan.data_lines(replace(config, answer_column=""))
    assert first.startswith(f"{mine} (1 row), ") and second == f"{said} solution"


@pytest.mark.parametrize(
    "broken", ["no-such-model", "/no/such/model", "empty", "no json", "unknown", "no decoder"]
)
def test_a_bad_model_directory_is_one_clear_line(broken, tmp_path):
    model = broken if "such" in broken else str(tmp_path)
    texts = {
        "no json": "{",
        "unknown": '{"model_type": "nonsense"}',
        "no decoder": '{"model_type": "vit"}',
    }
    if broken in texts:
        (tmp_path / "config.json").write_text(texts[broken])
    with pytest.raises(UserError) as error:
        plan.describe(settings(model=model), ranks=1)
    assert str(error.value).startswith(f"--model {model}: cannot be loaded (") and "\n" not in str(
        error.value
    )


# --------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_what_a_layer_saves_equals_saved_tensors_hooks(kind, dtype, sizes):
    shape = plan.count(small_model(dtype, kind, **sizes).config)
    for tokens in (64, 256):
        assert layer_bytes(tokens, dtype, kind=kind, **sizes) == tokens * plan.saved_per_token(
            shape, DTYPES[dtype].itemsize
        )


def test_attention_that_is_stored_costs_a_row_of_weights_per_token_and_head():
    """What CUDA does with fp32 and grouped-query attention: SDPA's math kernel, which the CPU has
    as well."""

    def per_token(tokens):
        with sdpa_kernel(SDPBackend.MATH):
            return layer_bytes(tokens, "fp32", **SHAPES[0]) / tokens

    assert per_token(512) - per_token(256) == 4 * 8 * 256  # 4 bytes, 8 heads, 256 more keys
    shape = plan.count(small_model("fp32", **SHAPES[0]).config)
    config = settings(
        dtype="fp32",
        parallel="ddp",
        engine="transformers",
        max_prompt=56,
        max_response=200,
        token_budget=1,
    )
    kept = plan.memory(config, shape, 1, "update")["activations"] * plan.GIB
    assert kept / 3 / 256 == pytest.approx(per_token(256), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes, vocabulary", [(SHAPES[0], 40), (SHAPES[1], 40), (SHAPES[2], 40), (SHAPES[0], 6000)]
)
def test_memory_of_an_update_is_what_pytorch_allocates(
    sizes, vocabulary, dtype, checkpointing, cpu_kernels
):
    """Forward and backward pass of two rows; their largest allocation against "activations" +
    "working space"."""
    model = small_model(dtype, vocabulary=vocabulary, **sizes)
    if checkpointing:
        for layer in model.model.layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )

    def update(tokens=1000):
        token_logprobs(model, [[Sequence([1], [2] * (tokens - 1))]] * 2, 1.0, with_entropy=False)[
            0
        ].sum().backward()

    update(10)  # gradients exist from here on
    config = settings(
        dtype=dtype,
        parallel="ddp",
        max_prompt=1,
        max_response=999,
        token_budget=2000,
        kl_coef=0.0,
        activation_checkpointing=checkpointing,
    )
    planned = planned_bytes(config, plan.count(model.config), "update")
    assert peak_bytes(update) == pytest.approx(planned, rel=0.2)


@pytest.fixture
def group_of_one():
    dist.start("cpu", alone=True)
    yield
    dist.stop()


@pytest.mark.parametrize(
    "tokens, vocabulary, checkpointing", [(8, 20000, True), (1500, 40, True), (1500, 40, False)]
)
def test_memory_of_an_fsdp2_update_is_what_pytorch_allocates(
    tokens, vocabulary, checkpointing, cpu_kernels, group_of_one
):
    """bf16 on one rank: layers are gathered and their gradients summed just the same. Many weights,
    or many tokens."""
    model = small_model(
        "fp32",
        layers=6,
        vocabulary=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    )
    shape = plan.count(model.config)
    forward = dist.spread(TokenLogprobs(model), "cpu", "fsdp", "bf16", checkpointing)

    def update(tokens=tokens):
        token_logprobs(forward, [[Sequence([1], [2] * (tokens - 1))]], 1.0, with_entropy=False)[
            0
        ].sum().backward()

    update(4)  # sharded gradients exist from here on
    config = settings(
        max_prompt=1,
        max_response=tokens - 1,
        token_budget=tokens,
        activation_checkpointing=checkpointing,
    )
    planned = max(planned_bytes(config, shape, phase) for phase in ("update", "optimizer"))
    assert peak_bytes(update) == pytest.approx(planned, rel=0.2)


def test_adamw_needs_one_more_copy_of_the_weights_for_a_moment():
    weights = [torch.nn.Parameter(torch.zeros(1000, 100)) for _ in range(10)]
    optimizer = torch.optim.AdamW(weights, foreach=True)  # the default on a GPU
    for _ in range(2):  # the first step makes the moments
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        most = peak_bytes(optimizer.step)
    assert most == pytest.approx(4 * 10 * 100_000, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes, vocabulary", [(SHAPES[0], 40), (SHAPES[1], 40), (SHAPES[2], 40), (SHAPES[0], 6000)]
)
def test_memory_of_the_scoring_pass_is_what_pytorch_allocates(
    sizes, vocabulary, dtype, cpu_kernels
):
    model = small_model(dtype, vocabulary=vocabulary, **sizes)
    bounds = [*range(0, 992, plan.TOKENS_PER_STEP), 999]
    rows = [Sequence([1], [2] * 999, bounds)] * 2
    config = settings(
        dtype=dtype,
        parallel="ddp",
        engine="transformers",
        max_prompt=1,
        max_response=999,
        token_budget=2000,
    )
    planned = planned_bytes(config, plan.count(model.config), "scoring")
    measured = peak_bytes(lambda: score(model, rows, token_budget=2000))
    # FCI and a layer's MLP are added, though one follows the other
    assert 0.7 * planned < measured < 1.1 * planned


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("prompt, response", [(900, 20), (10, 150)])
def test_memory_of_sampling_is_an_upper_bound_of_what_pytorch_allocates(
    prompt, response, dtype, cpu_kernels
):
    """Pairs of requests with one prompt, as two continuations of a branch point."""
    model = small_model(dtype, **SHAPES[0])
    requests = [Request([1 + i // 2] + [2] * (prompt - 1), response, 1.0, i) for i in range(8)]
    engine = TransformersEngine(model, [-1], 10**6)
    config = settings(
        dtype=dtype,
        parallel="ddp",
        engine="transformers",
        max_prompt=prompt,
        max_response=response,
        eval_max_response=0,
        rollout_tokens=8 * (prompt + response),
    )
    shape = plan.count(model.config)
    # all prompts as long as can be: so it is with late branch points
    planned = planned_bytes(config, shape, "sampling")
    cache = 8 * (prompt + response) * plan.kv_per_token(shape, DTYPES[dtype].itemsize)
    assert (
        max(cache, 0.8 * planned * (prompt == 900))
        < peak_bytes(lambda: engine.generate(requests))
        < 1.1 * planned
    )


def test_kv_cache_bytes_equal_a_real_cache():
    for dtype in DTYPES:
        model = small_model(dtype, **SHAPES[0])
        cache = model(
            input_ids=torch.zeros(2, 50, dtype=torch.long), use_cache=True
        ).past_key_values
        real = sum(
            t.numel() * t.element_size()
            for layer in cache.layers
            for t in (layer.keys, layer.values)
        )
        assert real == 2 * 50 * plan.kv_per_token(plan.count(model.config), DTYPES[dtype].itemsize)
    assert (
        plan.kv_per_token(qwen2("1.5B"), 2) == 28_672
        and plan.kv_per_token(qwen2("7B"), 2) == 57_344
    )


# --------------------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------------------
def test_states_by_hand_whole_sharded_and_offloaded():
    shape, gib = qwen2("1.5B"), 1_777_088_000 / 2**30
    states = ("weights", "gradients", "Adam's moments", "reference")
    whole = plan.memory(settings(dtype="fp32", parallel="ddp"), shape, 8, "update")
    assert [whole[name] for name in states] == pytest.approx([4 * gib, 4 * gib, 8 * gib, 4 * gib])
    assert "gathered weights" not in whole
    shard = plan.memory(settings(), shape, 8, "update")
    assert [shard[name] for name in states] == pytest.approx([gib / 2, gib / 2, gib, gib / 2])
    assert shard["gathered weights"] == pytest.approx(2 * (466_748_928 + 2 * 46_797_824) / 2**30)
    # 28 layers x 103,480 bytes a token x 16,384 tokens; with checkpointing 28 hidden states
    assert (
        shard["activations"]
        == pytest.approx(28 * 103_480 * 16384 / 2**30)
        == pytest.approx(44.2, abs=0.05)
    )
    lean = plan.memory(
        settings(activation_checkpointing=True, cpu_offload=True, kl_coef=0.0), shape, 8, "update"
    )
    assert lean["activations"] == pytest.approx(28 * 1536 * 2 * 16384 / 2**30)
    assert not set(states) & set(lean)


def test_each_phase_has_its_parts():
    shape, alone = qwen2("1.5B"), settings(dtype="fp32", parallel="ddp", engine="transformers")
    parts = {phase: set(plan.memory(alone, shape, 1, phase)) for phase in plan.PHASES}
    assert "gradients" not in parts["sampling"] | parts["scoring"]
    assert "gradients" in plan.memory(alone, shape, 2, "sampling")  # DDP's buckets stay
    assert "engine: weights" not in parts["sampling"]  # it samples with the policy itself
    assert "engine: weights" in plan.memory(settings(engine="transformers"), shape, 1, "sampling")
    for phase in plan.PHASES:  # vLLM sleeps during the update
        vllm = plan.memory(settings(), shape, 1, phase).get("engine: vLLM")
        assert vllm == (32.0 if phase in ("sampling", "scoring") else None)
    assert "reference" not in plan.memory(settings(kl_coef=0.0), shape, 1, "update")
    # its rewards need the initial model
    prl = plan.memory(settings(kl_coef=0.0, advantage="prl"), shape, 1, "scoring")
    assert "reference" in prl and "FCI" not in prl


@pytest.mark.parametrize("parallel, dtype", [("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16")])
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_more_tokens_never_need_less_and_more_ranks_never_more(parallel, dtype, engine):
    shape, make = qwen2("1.5B"), partial(settings, parallel=parallel, dtype=dtype, engine=engine)
    for phase in plan.PHASES:

        def total(ranks=8, make=make, phase=phase, **overrides):
            return sum(plan.memory(make(**overrides), shape, ranks, phase).values())

        for name, values in {
            "token_budget": (1024, 16384, 65536),
            "max_response": (512, 8192, 32768),
            "rollout_tokens": (1024, 65536, 262144),
            "kl_coef": (0.0, 0.001),
        }.items():
            needs = [total(**{name: value}) for value in values]
            assert needs == sorted(needs), (phase, name)
        needs = [total(ranks) for ranks in (64, 8, 2)]
        assert needs == sorted(needs), phase
        assert (
            total(activation_checkpointing=True) <= total() and total(cpu_offload=True) <= total()
        )


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_papers_small_model_fits_eight_gpus(engine, checkpointing):
    assert plan.fits(
        settings(engine=engine, activation_checkpointing=checkpointing), qwen2("1.5B"), 8, 80
    )


def test_remedies_are_small_and_work():
    shape = qwen2("7B")
    assert plan.remedy(settings(), shape, 8, 80) == "--activation_checkpointing true"
    for config, ranks in (
        (settings(), 8),
        (settings(dtype="fp32", parallel="ddp"), 8),
        (settings(), 1),
        (settings(), 2),
    ):
        assert not plan.fits(config, shape, ranks, 80)
        words = plan.remedy(config, shape, ranks, 80).split()
        read = {"true": True, "fsdp": "fsdp", "bf16": "bf16"}
        change = {
            name[2:]: read[value] if value in read else float(value)
            for name, value in zip(words[::2], words[1::2])
        }
        assert change and set(change) <= {f.name for f in fields(Config)}
        assert plan.fits(replace(config, **change), shape, ranks, 80)
    assert plan.remedy(settings(), shape, 1, 4) == ""  # nothing makes 7B fit 4 GiB


def test_vllm_must_hold_its_weights_and_one_response():
    shape = qwen2("7B")
    tokens = plan.vllm_tokens(settings(engine_memory=0.4), shape, 80)
    assert tokens == int((32 * 2**30 - 2 * 7_615_616_512) / 57_344) == 333_574
    assert plan.vllm_tokens(settings(engine_memory=0.1), shape, 80) == 0
    assert not plan.fits(settings(engine_memory=0.1, activation_checkpointing=True), shape, 8, 80)


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------
def test_the_plan_says_what_will_happen(tmp_path):
    config = settings(
        model=config_only(tmp_path),
        steps=500,
        eval_every=20,
        eval_samples=32,
        activation_checkpointing=True,
    )
    argv = ["--preset", "paper", "--model", "my model", "--dry_run", "--gpus", "8", "--seed", "1"]
    text = plan.describe(config, 8, 80.0, argv)
    for said in (
        "1,777,088,000 parameters",
        "8 GPUs of 80 GiB (--gpus, --gpu_gib), fsdp bf16, activation checkpointing on",
        "vLLM, 40% of a GPU",
        "deepscaler.json",
        "64 problems (16 to 256 later) x 6 responses = 384",
        "up to 1,536 continuations",
        "up to 1,920 leaves = training sequences (1,920 wanted) = 10 updates of 192",
        "up to 15.7 M tokens, 2.0 M a GPU",  # 1,920 x 8,192
        (
            "500 steps, up to 7,864 M tokens; 501 generation calls and 26 evaluations (32 samples a"
            " problem)"
        ),
        "fits: ",
        "host      53.0 GiB",
        "4 checkpoints of 19.9",
        (
            "command   torchrun --nproc_per_node 8 attnrl.py --preset paper --model 'my model'"
            " --seed 1"
        ),
    ):
        assert said in text, said
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 130
    for phase in plan.PHASES:  # the table's numbers are those of `memory`
        parts = plan.memory(config, qwen2("1.5B"), 8, phase)
        column = plan.PHASES.index(phase) - 4
        for name, size in [*parts.items(), ("sum", sum(parts.values()))]:
            row = next(line for line in text.splitlines() if line[10:].startswith(name))
            assert row.split()[column] == f"{size:.1f}", (phase, name)


def test_the_command_of_a_plan_is_not_a_plan_whatever_the_spelling():
    words = ["--dry-run", "--steps", "2", "--gpu-gib=40", "--gpus", "8"]
    assert plan.launch(words, 1) == "python attnrl.py --steps 2"


def test_a_plan_that_does_not_fit_says_what_to_change(tmp_path):
    model = config_only(tmp_path, "7B")
    text = plan.describe(settings(model=model), 8)
    assert "DOES NOT FIT: 140" in text and "would fit with: --activation_checkpointing true" in text
    assert "no option makes it fit" in plan.describe(settings(model=model), 1, gpu_gib=4)
    text = plan.describe(
        settings(model=model, engine_memory=0.1, activation_checkpointing=True, kl_coef=0.0), 8
    )
    assert "the share of vLLM does not hold" in text


@pytest.mark.parametrize(
    "overrides, calls, evaluations",
    [
        (dict(), 11, 4),
        (dict(one_step_off_policy=False), 20, 4),
        (dict(advantage="grpo"), 10, 4),
        (dict(advantage="grpo", one_step_off_policy=False), 10, 4),
        (dict(eval_every=0), 11, 2),
        (dict(eval_every=5), 11, 3),
    ],
)
def test_calls_and_evaluations_are_those_of_the_training_loop(overrides, calls, evaluations):
    config = settings(**(dict(model=str(TOY_MODEL), steps=10, eval_every=4) | overrides))
    text = plan.describe(config, 1)
    assert f" {calls} generation calls and {evaluations} evaluations" in text
    assert ("x 30 responses = 1,920, and up to 0 continuations" in text) == (
        config.advantage == "grpo"
    )


def test_one_gpu_needs_no_torchrun():
    assert plan.launch(["--dry_run", "true", "--steps", "2"], 1) == "python attnrl.py --steps 2"
    assert (
        plan.launch(["--steps=2", "--gpus=8", "--gpu_gib", "40"], 8)
        == "torchrun --nproc_per_node 8 attnrl.py --steps=2"
    )


def test_the_table_of_the_readme():
    lines = plan.memory_table().splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1.5B | 2k |") and lines[7].startswith("| 7B | 32k |")
    assert "**" in lines[7] and HEAD_CHUNK == 1024  # the table's numbers hold for it
