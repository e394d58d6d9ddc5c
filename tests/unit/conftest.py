"""Use one thread: unit tests compute little and would mostly wait for threads."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# By default, an example fails if it takes more than 200 ms, which can happen on a busy machine.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
