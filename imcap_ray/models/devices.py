"""Chooses the device of a process, and explains why a reserved GPU cannot be used. Knows nothing of models."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import torch

from imcap_ray.errors import ImcapError

_OLDEST_DRIVERS: Final = {11: 450, 12: 525, 13: 580}
"""The oldest driver for each major version of CUDA (NVIDIA, CUDA compatibility, minor version compatibility)."""


def choose_device(gpus: float) -> torch.device:
    """Choose the device of a process for which Ray has reserved this many GPUs.

    Raises:
        ImcapError: GPUs are reserved, but CUDA cannot be used.
    """
    if gpus:
        require_cuda()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_cuda() -> None:
    """Raise ImcapError, with the versions of CUDA and of the driver, if PyTorch cannot use a GPU in this process."""
    if torch.cuda.is_available():
        return
    built_for, driver = torch.version.cuda, driver_version()
    driver_text = f"the NVIDIA driver is {driver}" if driver else "no NVIDIA driver was found"
    if built_for is None:
        reason = f"PyTorch {torch.__version__} is built without CUDA: install a build with it; {driver_text}"
    else:
        oldest = _OLDEST_DRIVERS.get(int(built_for.partition(".")[0]))
        requirement = f", and CUDA {built_for} needs driver {oldest} or newer" if oldest else ""
        reason = f"PyTorch {torch.__version__} is built for CUDA {built_for}{requirement}; {driver_text}"
    raise ImcapError(
        f"a GPU is reserved for this process, but CUDA cannot be used: {reason}; use --gpus-per-worker 0 to run on CPUs"
    )


def driver_version() -> str:
    """Version of this machine's NVIDIA driver; "" if there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", text):
            return match[1]
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.strip().partition("\n")[0] if re.match(r"\d+\.\d", output) else ""
