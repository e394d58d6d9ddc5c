"""How long tests wait before they consider something to hang.

These limits do not check speed, because a busy machine can be ten times slower than an idle one. Tests of fast code
check that it does no slow work instead.
"""

from __future__ import annotations

from typing import Final

TIMEOUT_SECONDS: Final = {"unit": 180, "integration": 600, "end_to_end": 900, "chaos": 900}
"""Time limit of a test, by folder. The slowest test of a folder takes about a tenth of it on two idle cores."""

HANG_SECONDS: Final = 250
"""Time limit of one step, such as the end of a process. It is below that of a test, so that the test names the step."""
