"""The unit tests compute little: threads that wait for each other would take most of their time."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests.documented import ROOT

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# By default an example that takes more than 200 ms fails, which on a busy machine any may do.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture(scope="session")
def benchmark() -> ModuleType:
    """The program `jobs/benchmark.py` as a module."""
    path = ROOT / "jobs" / "benchmark.py"
    specification = importlib.util.spec_from_file_location("benchmark", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["benchmark"] = module  # dataclasses and pickle look there for their own module
    specification.loader.exec_module(module)
    return module
