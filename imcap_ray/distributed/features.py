"""Images -> cached features of a frozen CNN, by Ray Data. A cache is resumed like a captioning run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from imcap_ray import storage
from imcap_ray.captioner import COMPUTE_BATCH_SIZE
from imcap_ray.config import EncoderConfig, PreprocessingConfig, to_mapping
from imcap_ray.distributed.images import BatchReporter, Progress, map_images, stack_pixels
from imcap_ray.encoders import Encoder, EncoderWeights
from imcap_ray.errors import DatasetError
from imcap_ray.manifest import FAILED, MANIFEST_SCHEMA, OK

FEATURES_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("features", pa.large_binary()),  # float16 (views, R, F); b"" where the image cannot be read
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Features of the images of one split."""

    folder: str
    shape: tuple[int, int, int]
    """Views of an image (1, or 2 with the mirrored one), regions, channels."""
    num_images: int
    failures: list[dict[str, str]]
    """Images without features: image_id, error_code, error_message."""

    def files(self) -> list[str]:
        """The Parquet files, sorted."""
        return [path for path, name in storage.list_files(self.folder, recursive=False) if name.endswith(".parquet")]


class EncodeImages:
    """Loaded images -> their features. One lives in each actor of the pool."""

    def __init__(self, *, load_encoder: Callable[[], Encoder], flip: bool, reporter: BatchReporter) -> None:
        self._encoder = load_encoder()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder.to(self._device).eval()
        self._flip = flip
        self._reporter = reporter

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A table of `LOADED_SCHEMA` -> `FEATURES_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            features = iter(self._encode(stack_pixels(rows, self._encoder.image_size)))
            codes = rows["error_code"].to_pylist()
            values = [b"" if code else next(features).tobytes() for code in codes]
            counts[FAILED] = sum(map(bool, codes))
            counts[OK] = len(codes) - counts[FAILED]
            return rows.select(["manifest_id", "image_id", "error_code", "error_message"]).append_column(
                "features", pa.array(values, pa.large_binary())
            )

    @torch.inference_mode()
    def _encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Pixels (B, 3, S, S) -> float16 (B, views, R, F)."""
        images = torch.from_numpy(pixels)
        views = [images, images.flip(-1)] if self._flip else [images]
        encoded = []
        for start in range(0, len(images), COMPUTE_BATCH_SIZE):
            chunk = slice(start, start + COMPUTE_BATCH_SIZE)
            encoded.append(torch.stack([self._encoder(view[chunk].to(self._device)) for view in views], dim=1))
        return torch.cat(encoded).half().cpu().numpy() if encoded else np.empty((0,), np.float16)


def cache_key(
    image_ids: pa.ChunkedArray,
    *,
    location: str,
    encoder: EncoderConfig,
    weights: EncoderWeights,
    preprocessing: PreprocessingConfig,
    flip: bool,
) -> str:
    """Name of the cache of these images under this encoder: another encoder or other images, another name."""
    settings = [location, to_mapping(encoder), asdict(weights), to_mapping(preprocessing), flip]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image_id in image_ids.to_pylist():
        digest.update(image_id.encode() + b"\0")
    return digest.hexdigest()[:16]


def cache_features(
    images: pa.Table,
    folder: str,
    *,
    encoder: Encoder,
    flip: bool,
    num_actors: int,
    gpus_per_actor: float,
    on_progress: Callable[[Progress], None],
) -> FeatureCache:
    """Features of each image of a table of `DATASET_SCHEMA`, in Parquet files in `folder`.

    Images that an earlier call has written are not encoded again.

    Raises:
        DatasetError: not one image could be read.
    """
    shape = (2 if flip else 1, encoder.num_regions, encoder.num_channels)
    work = storage.join(folder, "_imcap")
    complete = storage.join(work, "complete")
    if not storage.exists(complete):
        storage.make_folder(folder)
        count = images.num_rows
        manifest = pa.table(
            [
                pa.array(range(count), pa.int64()),
                images["image_id"],
                images["image_path"],
                pa.array([""] * count),
                pa.array([-1] * count, pa.int32()),
                pa.array([-1] * count, pa.int32()),
            ],
            schema=MANIFEST_SCHEMA,
        )
        sink = pa.BufferOutputStream()
        pq.write_table(manifest, sink)
        storage.write_bytes(storage.join(work, "manifest", "part-0.parquet"), sink.getvalue().to_pybytes())
        map_images(
            storage.join(work, "manifest"),
            folder,
            work=work,
            schema=FEATURES_SCHEMA,
            actor_class=EncodeImages,
            # Through the object store, so that weights from a file of this machine reach every node.
            actor_arguments={"load_encoder": partial(ray.get, ray.put(encoder)), "flip": flip},
            image_size=encoder.image_size,
            num_images=count,
            num_actors=num_actors,
            gpus_per_actor=gpus_per_actor,
            batch_size=2 * COMPUTE_BATCH_SIZE,
            on_progress=on_progress,
        )
        storage.write_bytes(complete, b"")
    cache = FeatureCache(folder, shape, images.num_rows, [])
    for path in cache.files():
        filesystem, inner = storage.resolve(path)
        failed = pq.read_table(
            inner,
            filesystem=filesystem,
            columns=["image_id", "error_code", "error_message"],
            filters=pa.compute.field("error_code") != "",
        )
        cache.failures.extend(failed.to_pylist())
    if len(cache.failures) == cache.num_images:
        storage.remove(folder)  # or the images would be taken for unreadable when they are back
        first = cache.failures[0]
        raise DatasetError(
            f"none of the {cache.num_images:,} images can be read, the first is {first['image_id']}: "
            f"{first['error_message']} ({first['error_code']})"
        )
    return cache
