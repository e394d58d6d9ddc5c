"""The unit tests compute little: threads that wait for each other would take most of their time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
