"""The unit tests compute little: threads that wait for each other would take most of their time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# By default an example that takes more than 200 ms fails, which on a busy machine any may do.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
