"""How long tests wait before they take something for hanging.

Nothing is asserted on speed with these: a machine that is busy with other things may be ten times slower than an idle
one. What has to be fast is asserted by what it does not do.
"""

from __future__ import annotations

from typing import Final

TIMEOUT_SECONDS: Final = {"unit": 180, "integration": 600, "end_to_end": 900, "chaos": 900}
"""For a test, by its folder. On two idle cores, the slowest test of a folder takes about a tenth of that."""

HANG_SECONDS: Final = 250
"""For one step of a test, such as the end of a process. Shorter than the test's limit, so that the test says which."""
