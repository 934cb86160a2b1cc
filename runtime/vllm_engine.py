"""vllm_engine.py: vLLM as the rollout engine, for real models. The same methods as
rollout.TransformersEngine.

    python attnrl.py --preset paper --model DIR ...         # or any run with --engine vllm

Details that matter, each learnt from a failure:
- vLLM runs in the training process, one engine per rank, so that it gets new weights without a copy
  on the disk.
- It starts with random weights and gets the policy's before the first rollout, so weights come in
  only one way.
- After new weights its prefix cache is emptied. Otherwise prefixes would be continued with the KV
  of the old policy.
- Seeds are per request: two ranks with engine seeds would sample the same rollouts.
- Log-probs are "processed", those of the sampled distribution; the raw ones ignore the temperature.
After each weight sync `engine_gap` (scoring.py) checks with a few tokens that new weights arrived.

    make test-vllm
"""

import logging
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoConfig

from runtime.cli import UserError
from runtime.dist import DTYPES, world
from runtime.rollout import Completion, Request


class VLLMEngine:
    """vLLM in this process, one engine per rank. `path`: a model directory. Only its configuration
    is read: the weights come from the trainer (`sync_weights` before the first `generate`).

    memory: share of the GPU for weights and KV cache. On the CPU the cache holds `token_budget`
    tokens. Must be created after the process group and, on a GPU, before the policy goes there.
    Raises UserError if vLLM is not installed.
    """

    def __init__(
        self,
        path: str,
        eos_ids: list[int],
        max_tokens: int,
        dtype: str = "fp32",
        device: str = "cpu",
        memory: float = 0.4,
        token_budget: int = 65536,
    ):
        # in this process, so that weights are not sent to another one
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # for vLLM to fix
        logging.getLogger("vllm").setLevel(logging.ERROR)
        # otherwise small kernels are compiled, which needs seconds and a C++ compiler
        if not device.startswith("cuda"):
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"--engine vllm: vLLM is not installed here ({error}); GPU: pip install -r"
                " requirements-gpu.txt, CPU: make .venv-vllm/ready, then .venv-vllm/bin/python"
            ) from error
        self.eos_ids, self.params, self.gpu, self.asleep = (
            eos_ids,
            SamplingParams,
            device.startswith("cuda"),
            False,
        )
        settings: dict[str, Any]
        if self.gpu:
            settings = dict(gpu_memory_utilization=memory, enable_sleep_mode=True)
        else:
            config = AutoConfig.from_pretrained(path).get_text_config()
            head = (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            one = (
                2
                * config.num_hidden_layers
                * config.num_key_value_heads
                * head
                * DTYPES[dtype].itemsize
            )
            # Prefixes are shared in whole blocks. On the CPU, chunked prefill does not work with
            # per-request seeds.
            settings = dict(
                kv_cache_memory_bytes=one * max(token_budget, 2 * max_tokens),
                block_size=32,
                enforce_eager=True,
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(max_tokens, 8192),
            )
        if world() > 1:  # the plain executor would put every rank's engine on the first GPU
            settings |= dict(distributed_executor_backend="external_launcher")
        # vLLM disables set_num_threads and changes the number of threads
        threads, count = torch.set_num_threads, torch.get_num_threads()
        self.llm = LLM(
            path,
            dtype=str(DTYPES[dtype]).removeprefix("torch."),
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=max_tokens,
            tensor_parallel_size=1,
            seed=0,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            **settings,
        )
        torch.set_num_threads = threads
        threads(count)

    def generate(self, requests: list[Request]) -> list[Completion]:
        """One Completion per request, in order. Each request has its own seed: with engine seeds,
        two ranks would sample the same rollouts."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": r.prompt_ids} for r in requests],
            [
                self.params(
                    temperature=r.temperature,
                    max_tokens=r.max_tokens,
                    seed=r.seed,
                    stop_token_ids=self.eos_ids,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for r in requests
            ],
            use_tqdm=False,
        )
        return [
            Completion(list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason == "stop")
            for output in outputs
            for o in output.outputs
        ]

    def sleep(self) -> None:
        """Free the GPU's memory for the update: drop the KV cache and the weights (level 2)."""
        if self.gpu:
            self.llm.sleep(level=2)
            torch.cuda.empty_cache()
            self.asleep = True

    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load new weights and drop the KV cache of the old ones: otherwise prefixes would be
        continued with it."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not forget the KV cache of the old weights: it still holds requests"
            )
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
