"""Shared by all tests: the repository's root is importable, and torch uses one thread (CI machines
have few cores)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
