"""Shared by all tests: torch has one thread, for CI machines have few cores and pytest-xdist (-n 2)
runs a test on each. OpenMP reads its variable once, so this comes before anything imports torch."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)
