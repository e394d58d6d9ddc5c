"""`imcap` and `python -m imcap_ray`: the command line, with SIGTERM as an interruption from the first moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from imcap_ray.errors import INTERRUPTED


def main(words: Sequence[str] | None = None) -> None:
    """Run the command of these words, or of the process's arguments."""
    # The imports take seconds on a busy machine, and an interruption in them would be a traceback.
    signal.signal(signal.SIGTERM, _end)
    from imcap_ray.cli.main import main as run

    run(words)


def _end(number: int, frame: object) -> None:
    os.write(2, b"imcap: interrupted before work began\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
