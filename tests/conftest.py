"""Shared by all tests: torch has one thread, for CI machines have few cores and pytest-xdist (-n 2)
runs a test on each. OpenMP reads its variable once, so this comes before anything imports torch."""

import functools
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # the environment with vLLM has no pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """With -n: the tests of a file whose fixtures are made once a module (trained runs, models,
    a browser) stay with one worker; all others go, one by one, to whichever worker is free.

    Not --dist loadgroup: pytest-xdist 3.8 writes item._nodeid, which pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if shares_fixtures(config.rootpath / file) else nodeid

    return Together(config, log)


@functools.cache
def shares_fixtures(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")
