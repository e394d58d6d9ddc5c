"""Encoding of loaded images by an actor, without Ray."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.distributed.features import EncodeImages, Views
from imcap_ray.distributed.pipeline.image_loading import loaded_schema
from imcap_ray.errors import ImcapError
from imcap_ray.models.encoders import Encoder, build_encoder, resolve_preprocessing

SIZE = 32
NUM_IMAGES = 5


class Reporter:
    """Records what an actor reports."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.batch_size = 0

    @contextlib.contextmanager
    def batch(self) -> Iterator[Counter[str]]:
        yield self.counts

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def report_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size


@pytest.fixture
def encoder() -> Encoder:
    config = EncoderConfig(name="timm:test_efficientnet")
    torch.manual_seed(0)
    return build_encoder(
        config, resolve_preprocessing(config, PreprocessingConfig(image_size=SIZE)), load_weights=False
    )


@pytest.fixture
def rows() -> pa.Table:
    """Five images, the second of them unreadable."""
    generator = np.random.default_rng(0)
    codes = ["truncated" if number == 1 else "" for number in range(NUM_IMAGES)]
    pixels = [None if code else generator.integers(0, 256, (3, SIZE, SIZE), np.uint8).tobytes() for code in codes]
    return pa.table(
        {
            "manifest_id": range(NUM_IMAGES),
            "image_id": [f"{number}.jpg" for number in range(NUM_IMAGES)],
            "pixels": pa.array(pixels, loaded_schema((3, SIZE, SIZE)).field("pixels").type),
            "error_code": codes,
            "error_message": ["cut" if code else "" for code in codes],
            "origin": [f"origin {number}" for number in range(NUM_IMAGES)],
        }
    )


def encode(encoder: Encoder, rows: pa.Table, **options: Any) -> tuple[list[dict[str, Any]], Reporter]:
    reporter = Reporter()
    actor = EncodeImages(load_encoder=lambda: encoder, is_pooled=False, reporter=reporter, **options)  # type: ignore[arg-type]
    return actor(rows).to_pylist(), reporter


def test_each_image_has_features_or_an_error(encoder: Encoder, rows: pa.Table) -> None:
    done, reporter = encode(encoder, rows, views=Views(flip=True))

    assert [row["image_id"] for row in done] == rows["image_id"].to_pylist()
    assert [row["error_code"] for row in done] == ["", "truncated", "", "", ""]
    assert [row["origin"] for row in done] == rows["origin"].to_pylist()
    assert done[1]["features"] == b""
    assert reporter.counts == {"ok": 4, "failed": 1}
    for row, pixels in zip(done, rows["pixels"].to_pylist(), strict=True):
        if pixels:
            image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, 3, SIZE, SIZE)
            views = np.frombuffer(row["features"], np.float16).reshape(2, encoder.num_regions, -1)
            for view, expected in zip(views, (image, image.flip(-1)), strict=True):
                np.testing.assert_allclose(view, encoder(expected)[0].numpy(), rtol=2e-3, atol=2e-3)


def test_random_crops_are_reproducible_views(encoder: Encoder, rows: pa.Table) -> None:
    views = Views(flip=True, crops=3, min_crop_area=0.5)

    first, _ = encode(encoder, rows, views=views)
    second, _ = encode(encoder, rows, views=views)
    plain, _ = encode(encoder, rows, views=Views(flip=True))

    assert first == second
    for row, without in zip(first, plain, strict=True):
        features = np.frombuffer(row["features"], np.float16).reshape(
            -1, views.count, encoder.num_regions, encoder.num_channels
        )
        assert features[:, :2].tobytes() == without["features"]
        assert len({view.tobytes() for image in features for view in image}) == views.count * len(features)


def test_without_views_images_are_only_checked_for_readability(encoder: Encoder, rows: pa.Table) -> None:
    def check(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        assert len(arguments[0]) == 1, "no batch is encoded"  # one image is, when batch normalisations are folded

    encoder.register_forward_pre_hook(check)
    done, reporter = encode(encoder, rows, views=Views(original=False))

    assert [row["error_code"] for row in done] == ["", "truncated", "", "", ""]
    assert [row["features"] for row in done] == [b""] * 5
    assert reporter.counts == {"ok": 4, "failed": 1}


def test_when_memory_runs_out_the_encoding_batch_shrinks(encoder: Encoder, rows: pa.Table) -> None:
    expected, _ = encode(encoder, rows, views=Views())

    def check(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("planted")

    encoder.register_forward_pre_hook(check)
    done, reporter = encode(encoder, rows, views=Views())

    assert reporter.batch_size == 2
    for row, as_before in zip(done, expected, strict=True):
        assert row["error_code"] == as_before["error_code"]
        actual, wanted = (np.frombuffer(one["features"], np.float16) for one in (row, as_before))
        np.testing.assert_allclose(actual, wanted, rtol=2e-3, atol=2e-3)


def test_an_image_too_large_for_memory_is_skipped_and_named(encoder: Encoder, rows: pa.Table) -> None:
    too_much = torch.frombuffer(bytearray(rows["pixels"][3].as_py()), dtype=torch.uint8).view(3, SIZE, SIZE)

    def check(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if any(torch.equal(image, too_much) for image in arguments[0]):
            raise torch.OutOfMemoryError("planted")

    encoder.register_forward_pre_hook(check)
    done, reporter = encode(encoder, rows, views=Views())

    assert [row["error_code"] for row in done] == ["", "truncated", "", "out_of_memory", ""]
    assert [bool(row["features"]) for row in done] == [True, False, True, False, True]
    assert reporter.counts == {"ok": 3, "failed": 2}


def test_an_image_whose_features_are_not_finite_is_a_failed_row(encoder: Encoder, rows: pa.Table) -> None:
    expected, _ = encode(encoder, rows, views=Views(flip=True))
    overflowing = torch.frombuffer(bytearray(rows["pixels"][3].as_py()), dtype=torch.uint8).view(3, SIZE, SIZE)

    def spoil(module: torch.nn.Module, arguments: tuple[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        is_overflowing = torch.tensor([torch.equal(image, overflowing) for image in arguments[0]])
        return features.masked_fill(is_overflowing[:, None, None], 1e30)  # infinity in float16

    encoder.register_forward_hook(spoil)
    done, reporter = encode(encoder, rows, views=Views(flip=True))

    assert [row["error_code"] for row in done] == ["", "truncated", "", "internal", ""]
    assert done[3]["error_message"] == "the features of the image are not finite numbers"
    assert done[3]["features"] == b""
    assert [row for row in done if row != done[3]] == [row for row in expected if row != expected[3]]
    assert reporter.counts == {"ok": 3, "failed": 2}


def test_an_actor_whose_gpu_is_unusable_does_not_encode_on_the_cpu(
    encoder: Encoder, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    with pytest.raises(
        ImcapError, match=r"a GPU is reserved .* for CUDA 13\.0, and CUDA 13\.0 needs driver 580 or newer"
    ):
        encode(encoder, rows, views=Views(), gpus=0.5)
