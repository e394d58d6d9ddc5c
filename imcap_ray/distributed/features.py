"""Images -> cached features of a frozen CNN, by Ray Data.

A cache is resumed per image, like a captioning run. An image whose file has changed is encoded again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from imcap_ray.config import EncoderConfig, PreprocessingConfig, to_mapping
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.data.image_reading import root_of
from imcap_ray.data.parquet_files import write_table
from imcap_ray.data.schemas import FAILED, OK
from imcap_ray.distributed.pipeline.image_loading import origin_of, stack_pixels
from imcap_ray.distributed.pipeline.image_pipeline import ActorPool, ActorReporter, PipelineFiles, map_images
from imcap_ray.errors import DatasetError, FullClusterError, ImageError, ImcapError
from imcap_ray.models.batching import FixedBatches
from imcap_ray.models.caption import compute_batch_size, no_memory, not_finite
from imcap_ray.models.devices import choose_device
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import Encoder, resolve_preprocessing
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.runs.checksums import checksummed_files, find_corrupt_files, write_checksums
from imcap_ray.runs.feature_folder import CHECKSUM_FILE, FeatureFolder
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, repeating
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.training.batches import augmentation

FEATURES_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("features", pa.large_binary()),  # float16 (views, R, F); b"" if the image cannot be read
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        (
            "origin",
            pa.string(),
        ),  # of which file, in which state, see `origin_of`; earlier versions wrote none
    ]
)

_ROWS_AT_A_TIME: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Which views of each image are encoded. If there are none, images are only checked to be readable."""

    original: bool = True
    """The image as it is."""
    flip: bool = False
    """Its mirror image."""
    crops: int = 0
    """Number of random crops, half of them mirrored."""
    min_crop_area: float = 1.0
    """Smallest share of the image's area that a crop shows."""

    @property
    def count(self) -> int:
        """Number of views of an image."""
        return self.original + self.flip + self.crops

    def draw(self, pixels: Tensor) -> list[Tensor]:
        """The views of uint8 pixels (B, 3, S, S), each of that shape. The same batch gets the same crops."""
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
    parts: list[str] = field(default_factory=list)
    """Names of the Parquet files, which have the features of every other image once."""
    notes: list[str] = field(default_factory=list)
    """What was corrupt, has changed or is unknown, for people."""
    use: FeatureFolder | None = None
    """Keeps other trainings from removing the parts, as long as it has heartbeats."""

    def files(self) -> list[str]:
        """Locations of the Parquet files, which may also have rows of images without features."""
        return [storage.join(self.folder, name) for name in self.parts]


class EncodeImages:
    """Loaded images -> their features. Each actor of the pool has one."""

    def __init__(
        self,
        *,
        load_encoder: Callable[[], Encoder],
        views: Views,
        is_pooled: bool,
        reporter: ActorReporter,
        gpus: float = 0.0,
    ) -> None:
        device = choose_device(gpus)
        with reporter.working():
            self._encoder = optimize_for_inference(load_encoder(), device).to(device).eval()
        self._batches = FixedBatches(self._encoder.image_size, device)
        self._views = views
        self._is_pooled = is_pooled
        self._reporter = reporter

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A table of `loaded_schema` -> `FEATURES_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            encoded = iter(self._encode(stack_pixels(rows, SquarePixels(self._encoder.image_size).shape)))
            done = rows.select(["manifest_id", "image_id", "error_code", "error_message", "origin"]).to_pylist()
            for row in done:
                row["features"] = b""
                if not row["error_code"]:
                    features = next(encoded)
                    if isinstance(features, ImageError):
                        row["error_code"], row["error_message"] = features.code, features.message
                    else:
                        row["features"] = features.tobytes()
                counts[FAILED if row["error_code"] else OK] += 1
            self._reporter.report_batch_size(self._batches.size)
            return pa.Table.from_pylist(done, FEATURES_SCHEMA.insert(0, rows.schema.field("manifest_id")))

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float16] | ImageError]:
        """The float16 features (views, R, F) of each image of pixels (B, 3, S, S), or an error."""
        if not self._views.count:
            yield from itertools.repeat(np.empty(0, np.float16), len(pixels))
            return
        for computed, count in self._batches.compute(pixels, self._encode_views):
            if computed is None:
                yield from itertools.repeat(no_memory(), count)
                continue
            for features in computed[:count].numpy():
                yield features if np.isfinite(features).all() else not_finite("features")

    @torch.inference_mode()
    def _encode_views(self, pixels: Tensor) -> Tensor:
        features = torch.stack([self._encoder(view) for view in self._views.draw(pixels)], dim=1)
        if self._is_pooled:
            features = features.mean(2, keepdim=True)
        return features.half().cpu()


def cache_key(
    image_ids: pa.ChunkedArray,
    *,
    location: str,
    encoder: EncoderConfig,
    weights: EncoderWeights,
    preprocessing: PreprocessingConfig,
    views: Views,
    image_columns: Sequence[str] = (),
) -> str:
    """Name of the cache of these images with this encoder. It differs for another encoder and for other images.

    Args:
        image_columns: columns of the tables that hold the images; other columns may hold other images.
    """
    settings = [
        location,
        to_mapping(encoder),
        asdict(weights),
        to_mapping(resolve_preprocessing(encoder, preprocessing)),
        asdict(views),
        *([list(image_columns)] if image_columns else []),  # images that are files keep the name of earlier versions
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image_id in image_ids.to_pylist():
        digest.update(image_id.encode() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureEncoding:
    """How features are computed, and on what."""

    encoder: Encoder
    views: Views
    is_pooled: bool = False
    """Whether only the mean over all regions is kept."""
    num_actors: int
    gpus_per_actor: float
    can_grow: bool = False
    """See `ActorPool`."""
    can_release: bool = False
    """See `ActorPool`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Views of an image, regions, channels."""
        return (self.views.count, 1 if self.is_pooled else self.encoder.num_regions, self.encoder.num_channels)

    def actor_pool(self) -> ActorPool:
        """The actors that encode."""
        # Through the object store, so that weights from a file of this machine reach every node.
        load_encoder = partial(ray.get, ray.put(self.encoder))
        return ActorPool(
            actor_class=EncodeImages,
            arguments={
                "load_encoder": load_encoder,
                "views": self.views,
                "is_pooled": self.is_pooled,
                "gpus": self.gpus_per_actor,
            },
            preparation=SquarePixels(self.encoder.image_size),
            batch_size=2 * compute_batch_size(on_gpu=self.gpus_per_actor > 0),
            num_actors=self.num_actors,
            gpus_per_actor=self.gpus_per_actor,
            can_grow=self.can_grow,
            can_release=self.can_release,
        )


def cache_features(
    manifest: pa.Table,
    use: FeatureFolder,
    encoding: FeatureEncoding,
    *,
    reporter: ProgressReporter,
    task: str = "",
    check: Callable[[], None] = lambda: None,
) -> FeatureCache:
    """Features of each image of a table of `MANIFEST_SCHEMA`, in Parquet files in a folder.

    Images that an earlier call has encoded are encoded again only if their part is corrupt, if their file, table or tar
    has changed since, or if they failed: what is in the parts counts, not what a work folder records. While another
    training encodes in this folder, this one waits for it.

    Args:
        use: this training's use of the folder.
        task: see `ProgressReporter.report_images`.
        check: raises if this training may not write any more.

    Raises:
        DatasetError: no image could be read.
        ImcapError: encoding failed; the same call resumes.
    """
    use.beat()
    with (
        repeating(use.try_to_beat, seconds=HEARTBEAT_SECONDS),
        use.encoding(report=reporter.report, check=check),
    ):
        encode = partial(_encode, use=use, encoding=encoding, reporter=reporter, task=task, check=check)
        return complete_cache(manifest, use, encode=encode, shape=encoding.shape)


def complete_cache(
    manifest: pa.Table, use: FeatureFolder, *, encode: Callable[[pa.Table], None], shape: tuple[int, int, int]
) -> FeatureCache:
    """Encode the images of a manifest that the folder lacks, and write checksums of the parts that have all of them."""
    folder, notes = use.location, []
    origins = {row["image_id"]: origin_of(row) for batch in manifest.to_batches() for row in batch.to_pylist()}
    corrupt = find_corrupt_files(folder, file_name=CHECKSUM_FILE)
    if CHECKSUM_FILE not in corrupt:
        notes = [f"{folder}/{name} {what}: its images are encoded again" for name, what in corrupt.items()]
        for name in corrupt:  # a part without a checksum counts as complete
            storage.remove(storage.join(folder, name))
    recorded = checksummed_files(folder, file_name=CHECKSUM_FILE)
    survey = _survey(folder, origins, recorded)
    notes += survey.describe(manifest)
    left = manifest.filter(
        pa.compute.invert(pa.compute.is_in(manifest["image_id"], pa.array(sorted(survey.images), pa.string())))
    )
    if left.num_rows:
        encode(left)
        survey = _survey(folder, origins, [*recorded, *survey.complete, *survey.mixed])
    unknown = origins.keys() - survey.images - survey.failed.keys()
    if unknown:
        raise ImcapError(
            f"{folder} has features of {len(survey.images):,} images, expected {manifest.num_rows:,}: "
            "the same command encodes the others"
        )
    failures = [survey.failed[image_id] for image_id in origins if image_id not in survey.images]
    if not survey.images:
        first = failures[0]
        raise DatasetError(
            f"none of the {manifest.num_rows:,} images can be read, the first is {first['image_id']}: "
            f"{first['error_message']} ({first['error_code']})"
        )
    parts = sorted(survey.complete) + [_copy_rows(folder, name, rows) for name, rows in survey.mixed.items()]
    if corrupt or set(parts) != set(recorded):
        write_checksums(folder, parts, file_name=CHECKSUM_FILE)
    use.remove_all_but(parts)
    return FeatureCache(folder, shape, manifest.num_rows, failures, parts, notes, use)


@dataclass(slots=True)
class _Survey:
    """Which of some images the parts of a folder have."""

    images: set[str] = field(default_factory=set)
    """Images whose features exist and are up to date."""
    complete: set[str] = field(default_factory=set)
    """Names of parts whose features are all of these images."""
    mixed: dict[str, list[int]] = field(default_factory=dict)
    """Parts of which only some rows are features of these images: the name and the numbers of these rows."""
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """The rows of images that failed, by image."""
    changed: set[str] = field(default_factory=set)
    """Images with features that are out of date."""
    of_earlier_version: set[str] = field(default_factory=set)
    """Images with features of unknown origin."""

    def describe(self, manifest: pa.Table) -> list[str]:
        """Lines: why images that were encoded before are encoded again, and which changes cannot be detected."""
        of_earlier_version = len(self.of_earlier_version - self.images)
        changed = len(self.changed - self.images - self.of_earlier_version)
        unknown = manifest.filter(pa.compute.equal(manifest["size"], -1))["image_path"].to_pylist()
        counts = (
            (changed, "changed since encoding: encoded again"),
            (of_earlier_version, "encoded by an earlier version, which did not record their files: encoded again"),
            (
                sum(map(storage.is_uri, unknown)),
                "without a known size and time in the store: changes to them are not detected",
            ),
        )
        return [f"{count:,} image{'s' * (count != 1)} {what}" for count, what in counts if count]


def _survey(folder: str, origins: Mapping[str, str], first: Iterable[str]) -> _Survey:
    """Which of the images with these origins the folder's parts have.

    Args:
        first: names of parts that are preferred if several have an image.
    """
    survey = _Survey()
    names = [path.rpartition("/")[2] for path in storage.list_parquet(folder)]
    preferred = [name for name in dict.fromkeys(first) if name in names]
    for name in dict.fromkeys([*preferred, *names]):
        filesystem, path = storage.resolve(storage.join(folder, name))
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
            has_origin = "origin" in schema.names
            columns = ["image_id", "error_code", "error_message", *["origin"] * has_origin]
            rows = pq.read_table(path, filesystem=filesystem, columns=columns).to_pylist()
        except (pa.ArrowException, OSError):
            continue
        numbers, num_features = [], 0
        for number, row in enumerate(rows):
            image_id = row["image_id"]
            is_current = has_origin and origins.get(image_id) == row["origin"]
            if row["error_code"]:
                if is_current:
                    survey.failed[image_id] = row
                continue
            num_features += 1
            if not is_current:
                (survey.changed if has_origin else survey.of_earlier_version).add(image_id)
            elif image_id not in survey.images:
                survey.images.add(image_id)
                numbers.append(number)
        if numbers and len(numbers) == num_features:
            survey.complete.add(name)
        elif numbers:
            survey.mixed[name] = numbers
    return survey


def _copy_rows(folder: str, name: str, numbers: list[int]) -> str:
    """Write these rows of a part to a new part. Returns its name."""
    copy, wanted, start = f"{uuid.uuid4().hex}_000000.parquet", pa.array(numbers), 0
    filesystem, path = storage.resolve(storage.join(folder, name))
    with (
        filesystem.open_input_file(path) as stream,
        pq.ParquetFile(stream) as part,
        storage.replacing(storage.join(folder, copy)) as file,
        pq.ParquetWriter(file, FEATURES_SCHEMA, compression="zstd") as writer,
    ):
        for batch in part.iter_batches(batch_size=_ROWS_AT_A_TIME):
            is_wanted = pa.compute.is_in(pa.array(range(start, start + len(batch))), wanted)
            start += len(batch)
            kept = pa.Table.from_batches([batch]).filter(is_wanted)
            if kept.num_rows:
                writer.write_table(kept.cast(FEATURES_SCHEMA))
    return copy


def _encode(
    manifest: pa.Table,
    *,
    use: FeatureFolder,
    encoding: FeatureEncoding,
    reporter: ProgressReporter,
    task: str,
    check: Callable[[], None],
) -> None:
    """Add parts with the features of these rows' images to the folder."""
    files = PipelineFiles(
        manifest=storage.join(use.work, "manifest"),
        root=root_of(manifest),
        output=use.location,
        schema=FEATURES_SCHEMA,
        work=use.work,
        require_lease=check,
    )
    observer = _EncodingObserver(reporter, task, manifest.num_rows)
    write_table(storage.join(files.manifest, "part-0.parquet"), manifest)
    pool, is_done = encoding.actor_pool(), False
    while not is_done:
        try:
            map_images(files, pool, observer, num_images=manifest.num_rows)
            is_done = True
        except FullClusterError as error:
            pool = pool.halve(error, is_resumed=True, require_lease=check, observer=observer)
    storage.remove(use.work)


@dataclass(frozen=True, slots=True)
class _EncodingObserver:
    reporter: ProgressReporter
    task: str
    num_images: int

    def report_progress(self, num_images: int) -> float | None:
        self.reporter.report_images(num_images, self.num_images, self.task)
        return self.reporter.rate(self.task)

    def report_waiting(self, reason: str) -> None:
        if reason:
            self.reporter.report(reason)
