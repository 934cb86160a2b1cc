# make demo       train AttnRL on the toy (a few minutes on 2 cores)
# make test       the quick suite (under 10 minutes on 2 cores)
# make test-full  everything
# make bench      timings and memory of FCI against a plain forward pass and the naive way
# Each sets up .venv first. For a GPU: python -m venv .venv && .venv/bin/pip install -r requirements-gpu.txt && touch .venv/ready

PYTHON ?= python3
# Idle OpenMP threads must sleep, not spin: on two cores a spinning pool starves every other process.
export OMP_WAIT_POLICY = passive
export TOKENIZERS_PARALLELISM = false

demo: .venv/ready
	.venv/bin/python attnrl.py

test: .venv/ready
	.venv/bin/python -m pytest -q -m "not full" --durations=5

test-full: .venv/ready
	.venv/bin/python -m pytest -q --durations=10

bench: .venv/ready
	.venv/bin/python bench/fci.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

.PHONY: demo test test-full bench
