"""Images -> cached features of a frozen CNN, by Ray Data. A cache is resumed like a captioning run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.batches import FixedBatches
from imcap_ray.captions import compute_batch_size, no_memory
from imcap_ray.config import EncoderConfig, PreprocessingConfig, to_mapping
from imcap_ray.distributed.images import BatchReporter, map_images, stack_pixels
from imcap_ray.distributed.progress_counter import Progress
from imcap_ray.distributed.seals import find_damage, seal
from imcap_ray.encoders import Encoder, EncoderWeights, optimize_for_inference, resolve_preprocessing
from imcap_ray.errors import DatasetError, ImcapError
from imcap_ray.image_sources import root_of
from imcap_ray.manifest import FAILED, OK, write_table
from imcap_ray.training import augmentation

FEATURES_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("features", pa.large_binary()),  # float16 (views, R, F); b"" where the image cannot be read
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)

_WORK_FOLDER: Final = "_imcap"
_SEAL: Final = "_imcap/seal.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """What is encoded of each image: itself, and what else. Or nothing: then it is only seen whether it can be read."""

    original: bool = True
    """The image as it is."""
    flip: bool = False
    """Its mirror image."""
    crops: int = 0
    """So many random crops, mirrored half of the time."""
    min_crop_area: float = 1.0
    """Smallest share of its area that these show."""

    @property
    def count(self) -> int:
        """All of them."""
        return self.original + self.flip + self.crops

    def draw(self, pixels: Tensor) -> list[Tensor]:
        """The views of uint8 pixels (B, 3, S, S), each like these; the same ones whenever the same batch comes."""
        views = [pixels] if self.original else []
        if self.flip:
            views.append(pixels.flip(-1))
        if self.crops:
            augment = augmentation(pixels.shape[-1], min_crop_area=self.min_crop_area)
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(int(pixels.sum(dtype=torch.int64)))
                views += [augment(pixels) for _ in range(self.crops)]
        return views


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Features of the images of one split."""

    folder: str
    shape: tuple[int, int, int]
    """Views of an image, regions, channels."""
    num_images: int
    failures: list[dict[str, str]]
    """Images without features: image_id, error_code, error_message."""

    notes: list[str] = field(default_factory=list)
    """What was damaged and is made anew."""

    def files(self) -> list[str]:
        """The Parquet files, sorted."""
        return storage.list_parquet(self.folder)


class EncodeImages:
    """Loaded images -> their features. One lives in each actor of the pool."""

    def __init__(self, *, load_encoder: Callable[[], Encoder], views: Views, reporter: BatchReporter) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder = optimize_for_inference(load_encoder(), device).to(device).eval()
        self._batches = FixedBatches(self._encoder.image_size, device)
        self._views = views
        self._reporter = reporter

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A table of `loaded_schema` -> `FEATURES_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            encoded = iter(self._encode(stack_pixels(rows, self._encoder.image_size)))
            done = rows.select(["manifest_id", "image_id", "error_code", "error_message"]).to_pylist()
            for row in done:
                features = None if row["error_code"] else next(encoded)
                row["features"] = b"" if features is None else features.tobytes()
                if features is None and not row["error_code"]:
                    error = no_memory()
                    row["error_code"], row["error_message"] = error.code, error.message
                counts[FAILED if features is None else OK] += 1
            self._reporter.tell_batch_size(self._batches.size)
            return pa.Table.from_pylist(done, FEATURES_SCHEMA.insert(0, rows.schema.field("manifest_id")))

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float16] | None]:
        """Of each image of pixels (B, 3, S, S) float16 features (views, R, F); None where memory runs out."""
        if not self._views.count:
            yield from itertools.repeat(np.empty(0, np.float16), len(pixels))
            return
        for features, count in self._batches.compute(pixels, self._encode_views):
            yield from itertools.repeat(None, count) if features is None else features[:count].numpy()

    @torch.inference_mode()
    def _encode_views(self, pixels: Tensor) -> Tensor:
        features = [self._encoder(view) for view in self._views.draw(pixels)]
        return torch.stack(features, dim=1).half().cpu()


def cache_key(
    image_ids: pa.ChunkedArray,
    *,
    location: str,
    encoder: EncoderConfig,
    weights: EncoderWeights,
    preprocessing: PreprocessingConfig,
    views: Views,
) -> str:
    """Name of the cache of these images under this encoder: another encoder or other images, another name."""
    settings = [
        location,
        to_mapping(encoder),
        asdict(weights),
        to_mapping(resolve_preprocessing(encoder, preprocessing)),
        asdict(views),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image_id in image_ids.to_pylist():
        digest.update(image_id.encode() + b"\0")
    return digest.hexdigest()[:16]


def _told_total(on_progress: Callable[[Progress, int], None], total: int, progress: Progress) -> None:
    on_progress(progress, total)


def cache_features(
    manifest: pa.Table,
    folder: str,
    *,
    encoder: Encoder,
    views: Views,
    num_actors: int,
    gpus_per_actor: float,
    on_progress: Callable[[Progress, int], None],
    can_grow: bool = False,
) -> FeatureCache:
    """Features of each image of a table of `MANIFEST_SCHEMA`, in Parquet files in `folder`.

    Images that an earlier call has written are not encoded again, unless their file is damaged: what is in the files
    counts, not what a work folder says of them.

    Args:
        on_progress: called about once a second with the progress and the number of images to do.

    Raises:
        DatasetError: not one image could be read.
        ImcapError: encoding failed; the same call goes on from there.
    """
    shape = (views.count, encoder.num_regions, encoder.num_channels)
    cache = FeatureCache(folder, shape, manifest.num_rows, [])
    damage = find_damage(folder, seal_name=_SEAL)
    if damage:
        if _SEAL not in damage:
            cache.notes.extend(f"{folder}/{name} {what}, its images are encoded anew" for name, what in damage.items())
        done = _keep_whole_parts(folder, damage)
        left = manifest.filter(
            pa.compute.invert(pa.compute.is_in(manifest["image_id"], pa.array(sorted(done), pa.string())))
        )
        if left.num_rows:
            _encode(
                left,
                folder,
                encoder=encoder,
                views=views,
                num_actors=num_actors,
                gpus_per_actor=gpus_per_actor,
                on_progress=partial(_told_total, on_progress, left.num_rows),
                can_grow=can_grow,
            )
            done = _keep_whole_parts(folder, {})
        if len(done) != manifest.num_rows:
            raise ImcapError(
                f"{folder} holds features of {len(done):,} images, expected {manifest.num_rows:,}: "
                "does another training write there? The same command makes what is missing"
            )
        seal(folder, [path.rpartition("/")[2] for path in cache.files()], seal_name=_SEAL)
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


def _keep_whole_parts(folder: str, damage: Mapping[str, str]) -> set[str]:
    """Remove the files that are damaged, unreadable, or hold an image a second time; the ids of those in the others."""
    done: set[str] = set()
    for path in storage.list_parquet(folder):
        filesystem, inner = storage.resolve(path)
        try:
            ids = pq.read_table(inner, filesystem=filesystem, columns=["image_id"])["image_id"].to_pylist()
        except (pa.ArrowException, OSError):
            ids = []
        if path.rpartition("/")[2] in damage or not ids or not done.isdisjoint(ids):
            storage.remove(path)
        else:
            done.update(ids)
    return done


def _encode(
    manifest: pa.Table,
    folder: str,
    *,
    encoder: Encoder,
    views: Views,
    num_actors: int,
    gpus_per_actor: float,
    on_progress: Callable[[Progress], None],
    can_grow: bool,
) -> None:
    """Add files with the features of these rows' images to the folder."""
    work = storage.join(folder, _WORK_FOLDER)
    storage.remove(work)
    write_table(storage.join(work, "manifest", "part-0.parquet"), manifest)
    map_images(
        storage.join(work, "manifest"),
        folder,
        work=work,
        root=root_of(manifest),
        schema=FEATURES_SCHEMA,
        actor_class=EncodeImages,
        # Through the object store, so that weights from a file of this machine reach every node.
        actor_arguments={"load_encoder": partial(ray.get, ray.put(encoder)), "views": views},
        image_size=encoder.image_size,
        num_images=manifest.num_rows,
        num_actors=num_actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=2 * compute_batch_size(on_gpu=gpus_per_actor > 0),
        on_progress=on_progress,
        can_grow=can_grow,
    )
