"""Whether a process computes on a GPU, and why it cannot where one is reserved for it. Knows nothing of models."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import torch

from imcap_ray.errors import ImcapError

_LEAST_DRIVERS: Final = {11: 450, 12: 525, 13: 580}
"""By major version of CUDA, the oldest driver for it (NVIDIA, CUDA compatibility, minor version compatibility)."""


def choose_device(gpus: float) -> torch.device:
    """The device of a process for which Ray has reserved so many GPUs.

    Raises:
        ImcapError: more than none, and CUDA cannot be used here.
    """
    if gpus:
        require_cuda()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_cuda() -> None:
    """Raise ImcapError, with the versions of CUDA and of the driver, if PyTorch cannot use a GPU in this process."""
    if torch.cuda.is_available():
        return
    built_for, driver = torch.version.cuda, driver_version()
    found = f"the NVIDIA driver is {driver}" if driver else "no NVIDIA driver is found"
    if built_for is None:
        reason = f"PyTorch {torch.__version__} is built without CUDA: install a build with it; {found}"
    else:
        least = _LEAST_DRIVERS.get(int(built_for.partition(".")[0]))
        rule = f", and CUDA {built_for} needs driver {least} or newer" if least else ""
        reason = f"PyTorch {torch.__version__} is built for CUDA {built_for}{rule}; {found}"
    raise ImcapError(
        f"a GPU is reserved for this process, but CUDA cannot be used: {reason}; use --gpus-per-worker 0 to run on CPUs"
    )


def driver_version() -> str:
    """Version of the NVIDIA driver of this machine; "" where none is found."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", text):
            return found[1]
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.strip().partition("\n")[0] if re.match(r"\d+\.\d", answer) else ""
