"""Our implementation equals timm's, layer by layer and bit by bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from imcap_ray.models.efficientnet_lite import EfficientNetLite
from tests.small_data import randomise_batch_normalisation


@pytest.mark.parametrize("image_size", [224, 65])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_features_equal_those_of_timm(number: int, image_size: int) -> None:
    judge = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=0).eval()
    randomise_batch_normalisation(judge)
    ours = EfficientNetLite(number).eval()
    ours.load_state_dict(judge.state_dict())
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(number))

    with torch.inference_mode():
        assert torch.equal(ours(pixels), judge.forward_features(pixels))


def test_it_can_be_trained() -> None:
    cnn = EfficientNetLite(0)

    cnn(torch.randn(2, 3, 64, 64)).sum().backward()  # type: ignore[no-untyped-call]

    assert all(parameter.grad is not None for parameter in cnn.parameters())


@pytest.mark.parametrize("trains_filters", [True, False])
def test_gradients_in_fine_tuning_equal_those_of_timm(trains_filters: bool) -> None:
    judge = timm.create_model("tf_efficientnet_lite0", num_classes=0).double().eval()
    randomise_batch_normalisation(judge)
    ours = EfficientNetLite(0).double().eval()
    ours.load_state_dict(judge.state_dict())
    pixels = torch.randn(2, 3, 65, 64, generator=torch.Generator().manual_seed(0)).double()

    for cnn in (ours, judge):
        for name, parameter in cnn.named_parameters():
            parameter.requires_grad_(name.startswith("blocks") and (trains_filters or "conv_dw" not in name))
    ours(pixels).square().mean().backward()
    judge.forward_features(pixels).square().mean().backward()

    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    expected = {name: parameter.grad for name, parameter in judge.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys() and any("conv_dw" in name for name in gradients) == trains_filters
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        assert scale > 0 and torch.allclose(gradient, expected[name], rtol=0, atol=1e-9 * scale), name


def test_a_captioner_is_loaded_without_timm_and_torchvision() -> None:
    program = (
        "import sys; from imcap_ray import Captioner; Captioner.load()\n"
        "print([name for name in ('timm', 'torchvision', 'torch._dynamo', 'ray') if name in sys.modules])"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)

    assert run.stdout.strip() == "[]"
