"""Which device a process computes on, and what is reported when its GPU cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from imcap_ray.errors import ImcapError
from imcap_ray.models.devices import choose_device, driver_version, require_cuda


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program of that name first on the path."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.133.20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.mark.usefixtures("no_cuda")
def test_a_process_without_a_gpu_uses_the_cpu() -> None:
    assert choose_device(0.0) == torch.device("cpu")


@pytest.mark.usefixtures("no_cuda")
def test_a_reserved_gpu_that_cuda_cannot_use_is_an_error_with_both_versions(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    with pytest.raises(ImcapError) as caught:
        choose_device(0.5)

    assert str(caught.value) == (
        "a GPU is reserved for this process, but CUDA cannot be used: "
        f"PyTorch {torch.__version__} is built for CUDA 13.0, and CUDA 13.0 needs driver 580 or newer; "
        f"the NVIDIA driver is {driver_version()}; use --gpus-per-worker 0 to run on CPUs"
    )


@pytest.mark.usefixtures("no_cuda")
def test_a_pytorch_for_cpus_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)

    with pytest.raises(ImcapError, match="is built without CUDA: install a build with it"):
        require_cuda()


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="the machine has a driver")
def test_the_driver_version_is_queried(nvidia_smi: Path) -> None:
    assert driver_version() == "570.133.20"
    nvidia_smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert driver_version() == ""
