"""How long tests wait before they consider something to hang.

Nothing is asserted on speed with these: a machine that is busy with other things may be ten times slower than an idle
one. What has to be fast is asserted by what it does not do.
"""

from __future__ import annotations

from typing import Final

TIMEOUT_SECONDS: Final = {"unit": 180, "integration": 600, "end_to_end": 900, "chaos": 900}
"""Time limit of a test, by folder. The slowest test of a folder takes about a tenth of it on two idle cores."""

HANG_SECONDS: Final = 250
"""Time limit of one step, such as the end of a process. It is below that of a test, so that the test names the step."""
