"""Shared by all tests: torch has one thread, for CI machines have few cores and pytest-xdist (-n 2)
runs a test on each. OpenMP reads its variable once, so this comes before anything imports torch."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    # the environment with vLLM has no pytest-xdist
    config.addinivalue_line("markers", "xdist_group(name): tests that stay with one worker")


def pytest_collection_modifyitems(items):
    """With --dist loadgroup: the tests of a file that share a trained run or a loaded model stay
    with one worker, which makes it once; all others go to whichever worker is free."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        shares = any(one.scope == "module" for found in fixtures for one in found)
        if shares and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
