"""What a feature cache keeps, encodes again and shares between trainings; without Ray, with a hash as CNN."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray import storage
from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.data.datasets import DATASET_SCHEMA, CaptionedImages
from imcap_ray.data.datasets.dataset import PackedImage
from imcap_ray.data.parquet_files import write_table
from imcap_ray.distributed.features import FEATURES_SCHEMA, FeatureCache, Views, cache_key, complete_cache
from imcap_ray.distributed.pipeline.image_loading import origin_of
from imcap_ray.errors import DatasetError
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.runs import feature_folder
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.heartbeat import SILENT_SECONDS

NUM_IMAGES = 12
ROWS_PER_PART = 5


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"{number:02}.jpg").write_bytes(b"photograph %d" % number)
    return folder


def manifest_of(images: Path) -> pa.Table:
    rows = [
        {"image_id": f"{number:02}.jpg", "image_path": str(images / f"{number:02}.jpg"), "captions": [], "split": ""}
        for number in range(NUM_IMAGES)
    ]
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    return CaptionedImages(str(images), "", table).manifest(table)


def encoder_of(folder: str, encoded: list[str], *, seconds: float = 0.0) -> Callable[[pa.Table], None]:
    """Return a function that writes parts like the actors, with file hashes as features and empty files as failed."""

    def encode(manifest: pa.Table) -> None:
        for start in range(0, manifest.num_rows, ROWS_PER_PART):
            rows = []
            for row in manifest.slice(start, ROWS_PER_PART).to_pylist():
                path = Path(row["image_path"])
                data = path.read_bytes() if path.exists() else b""
                encoded.append(row["image_id"])
                rows.append(
                    {
                        "image_id": row["image_id"],
                        "features": hashlib.sha256(data).digest() if data else b"",
                        "error_code": "" if data else "missing",
                        "error_message": "" if data else "no such file",
                        "origin": origin_of(row),
                    }
                )
            time.sleep(seconds)
            part = pa.Table.from_pylist(rows, schema=FEATURES_SCHEMA)
            write_table(f"{folder}/{uuid.uuid4().hex}_000000.parquet", part)

    return encode


def cache(images: Path, folder: Path, *, training: str = "") -> tuple[FeatureCache, list[str]]:
    """Return the cache of a training and the images that it encoded."""
    encoded: list[str] = []
    use = FeatureFolder(str(folder), training)
    with use.encoding(report=lambda line: None, check=lambda: None):
        complete = complete_cache(manifest_of(images), use, encode=encoder_of(str(folder), encoded), shape=(1, 1, 16))
    return complete, encoded


def features_of(complete: FeatureCache) -> dict[str, bytes]:
    """Return the features in the files by image, and check that each image occurs once."""
    rows = [row for file in complete.files() for row in pq.read_table(file).to_pylist() if not row["error_code"]]
    assert len(rows) == len({row["image_id"] for row in rows})
    return {row["image_id"]: row["features"] for row in rows}


def expected(images: Path) -> dict[str, bytes]:
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in images.iterdir() if path.stat().st_size}


def test_only_a_changed_image_is_encoded_again(images: Path, tmp_path: Path) -> None:
    first, _ = cache(images, tmp_path / "cache")
    assert first.use
    first.use.leave()

    (images / "03.jpg").write_bytes(b"another photograph")
    second, encoded = cache(images, tmp_path / "cache")

    assert encoded == ["03.jpg"]
    assert features_of(second) == expected(images)
    assert second.notes == ["1 image changed since encoding: encoded again"]
    assert {file.name for file in (tmp_path / "cache").glob("*.parquet")} == set(second.parts), (
        "the old part is removed"
    )


def test_a_path_that_points_to_another_file_is_encoded_again(images: Path, tmp_path: Path) -> None:
    cache(images, tmp_path / "cache")
    time_ns = (images / "05.jpg").stat().st_mtime_ns

    (images / "05.jpg").rename(images / "moved.jpg")
    (images / "05.jpg").symlink_to(images / "06.jpg")
    os.utime(images / "06.jpg", ns=(time_ns + 1, time_ns + 1))
    complete, encoded = cache(images, tmp_path / "cache")

    assert encoded == ["05.jpg", "06.jpg"]
    assert features_of(complete)["05.jpg"] == features_of(complete)["06.jpg"]


def test_unchanged_images_are_not_encoded_again(images: Path, tmp_path: Path) -> None:
    first, _ = cache(images, tmp_path / "cache")
    second, encoded = cache(images, tmp_path / "cache")

    assert not encoded and not second.notes
    assert second.parts == first.parts


def test_a_failed_image_is_retried_each_time(images: Path, tmp_path: Path) -> None:
    (images / "04.jpg").write_bytes(b"")
    first, _ = cache(images, tmp_path / "cache")
    assert [row["image_id"] for row in first.failures] == ["04.jpg"]

    again, encoded = cache(images, tmp_path / "cache")
    assert encoded == ["04.jpg"]
    assert [row["error_code"] for row in again.failures] == ["missing"]

    (images / "04.jpg").write_bytes(b"photograph 4")
    complete, encoded = cache(images, tmp_path / "cache")
    assert encoded == ["04.jpg"] and not complete.failures
    assert features_of(complete) == expected(images)


def test_a_missing_image_is_not_served_from_the_cache(images: Path, tmp_path: Path) -> None:
    cache(images, tmp_path / "cache")

    (images / "07.jpg").unlink()
    complete, _ = cache(images, tmp_path / "cache")

    assert [row["image_id"] for row in complete.failures] == ["07.jpg"]
    assert "07.jpg" not in features_of(complete)


def test_features_of_a_version_that_did_not_record_their_files_are_recomputed(images: Path, tmp_path: Path) -> None:
    first, _ = cache(images, tmp_path / "cache")
    for path in map(Path, first.files()):
        write_table(str(path), pq.read_table(path).drop(["origin"]))
    (tmp_path / "cache" / "_imcap" / "seal.json").unlink()

    complete, encoded = cache(images, tmp_path / "cache")

    assert len(encoded) == NUM_IMAGES
    assert complete.notes == [
        f"{NUM_IMAGES} images encoded by an earlier version, which did not record their files: encoded again"
    ]
    assert features_of(complete) == expected(images)


def test_if_all_images_are_missing_it_is_an_error_until_they_are_back(images: Path, tmp_path: Path) -> None:
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"none of the 12 images can be read, the first is 00\.jpg: no such file"):
        cache(images, tmp_path / "cache")

    (tmp_path / "elsewhere").rename(images)
    complete, _ = cache(images, tmp_path / "cache")
    assert features_of(complete) == expected(images)


def test_images_of_a_table_that_was_rewritten_are_out_of_date(tmp_path: Path) -> None:
    rows = [{"image_id": str(row), "image_path": f"t/{row}", "captions": [], "split": ""} for row in range(3)]
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    location = str(tmp_path / "t.parquet")

    def origins() -> list[str]:
        packed = {f"t/{row}": PackedImage(location, 0, row) for row in range(3)}
        return [origin_of(row) for row in CaptionedImages("t", "", table, packed=packed).manifest(table).to_pylist()]

    pq.write_table(pa.table({"image": [b"a", b"b", b"c"]}), location)
    before = origins()
    assert origins() == before
    pq.write_table(pa.table({"image": [b"a", b"c", b"bb"]}), location)
    assert not set(origins()) & set(before)


def test_images_of_another_column_of_the_same_table_have_a_separate_cache() -> None:
    config = EncoderConfig(name="timm:test_efficientnet")
    key = partial(
        cache_key,
        pa.chunked_array([["t.parquet#0", "t.parquet#1"]]),
        location="t.parquet",
        encoder=config,
        weights=EncoderWeights(source="random", sha256=""),
        preprocessing=PreprocessingConfig(image_size=32),
        views=Views(),
    )

    assert len({key(), key(image_columns=["image"]), key(image_columns=["thumbnail"])}) == 3


# ---- several trainings


def test_concurrent_trainings_encode_each_image_once(images: Path, tmp_path: Path) -> None:
    start = threading.Barrier(3)
    encoded: list[str] = []
    caches: list[FeatureCache] = []

    def learn() -> None:
        use = FeatureFolder(str(tmp_path / "cache"))
        start.wait(20)
        with use.encoding(report=lambda line: None, check=lambda: None):
            encode = encoder_of(str(tmp_path / "cache"), encoded, seconds=0.3)
            caches.append(complete_cache(manifest_of(images), use, encode=encode, shape=(1, 1, 16)))

    trainings = [threading.Thread(target=learn) for _ in range(3)]
    for training in trainings:
        training.start()
    for training in trainings:
        training.join(50)

    assert sorted(encoded) == sorted(expected(images))
    assert [features_of(complete) for complete in caches] == [expected(images)] * 3


def test_a_training_that_waits_for_another_one_names_it(tmp_path: Path) -> None:
    lines: list[str] = []
    other = FeatureFolder(str(tmp_path), "host:runs/other")
    may_end = threading.Event()
    has_begun = threading.Event()

    def encode() -> None:
        with other.encoding(report=lambda line: None, check=lambda: None):
            has_begun.set()
            may_end.wait(20)

    def tell(line: str) -> None:
        lines.append(line)
        may_end.set()

    thread = threading.Thread(target=encode)
    thread.start()
    has_begun.wait(20)
    with FeatureFolder(str(tmp_path), "host:runs/mine").encoding(report=tell, check=lambda: None):
        thread.join()

    assert lines == [f"waiting for {tmp_path}: host:runs/other is encoding the same images there"]


def test_parts_being_written_by_another_training_are_neither_removed_nor_duplicated(
    images: Path, tmp_path: Path
) -> None:
    """The second training considers the stalled first one dead, and both finish."""
    folder = tmp_path / "cache"
    has_written, may_end = threading.Event(), threading.Event()
    results: list[FeatureCache] = []
    stalled = FeatureFolder(str(folder))
    stalled.beat()

    def encode_and_stall(manifest: pa.Table) -> None:
        encoder_of(str(folder), [])(manifest)
        has_written.set()
        may_end.wait(20)

    def train_slowly() -> None:
        results.append(complete_cache(manifest_of(images), stalled, encode=encode_and_stall, shape=(1, 1, 16)))

    thread = threading.Thread(target=train_slowly)
    thread.start()
    has_written.wait(20)
    (images / "02.jpg").write_bytes(b"changed meanwhile")
    second, encoded = cache(images, folder)
    may_end.set()
    thread.join()
    third, _ = cache(images, folder)

    assert encoded == ["02.jpg"]
    assert features_of(second) == features_of(third) == expected(images)
    assert features_of(results[0]).keys() == expected(images).keys()


def test_a_killed_training_is_waited_for_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    killed, other = FeatureFolder(str(tmp_path)), FeatureFolder(str(tmp_path))
    killed.beat()
    assert set(other.live_others()) == {killed.name}

    sign_of_life = tmp_path / "_imcap" / "users" / killed.name
    past = sign_of_life.stat().st_mtime - SILENT_SECONDS - 1
    os.utime(sign_of_life, (past, past))
    assert not other.live_others()


def test_a_training_whose_process_has_ended_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    script = "import sys; from imcap_ray.runs.feature_folder import FeatureFolder as F; F(sys.argv[1]).beat()"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=50)

    assert len(list((tmp_path / "_imcap" / "users").iterdir())) == 1
    assert not FeatureFolder(str(tmp_path)).live_others()


def test_a_restarted_training_does_not_wait_for_itself(tmp_path: Path) -> None:
    FeatureFolder(str(tmp_path), "host:runs/mine").beat()

    assert not FeatureFolder(str(tmp_path), "host:runs/mine").live_others()
    assert list(FeatureFolder(str(tmp_path), "host:runs/other").live_others().values()) == ["host:runs/mine"] * 2


@pytest.mark.parametrize(("age", "is_alive"), [(0.0, True), (SILENT_SECONDS + 9, False)])
def test_without_modification_times_the_time_in_the_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, is_alive: bool
) -> None:
    list_files = storage.list_files
    monkeypatch.setattr(
        storage,
        "list_files",
        lambda *args, **options: (f._replace(modified_ns=0) for f in list_files(*args, **options)),
    )
    with monkeypatch.context() as patch:
        now = time.time_ns()
        patch.setattr(feature_folder, "_machine", lambda: "another machine")
        patch.setattr(time, "time_ns", lambda: now - int(age * 1e9))
        FeatureFolder(str(tmp_path), "other").beat()

    assert [*FeatureFolder(str(tmp_path), "mine").live_others().values()] == ["other"] * is_alive


def test_a_process_of_another_machine_with_the_same_host_name_is_not_searched_locally(tmp_path: Path) -> None:
    other = FeatureFolder(str(tmp_path), "other")
    other.beat()
    file = tmp_path / "_imcap" / "users" / other.name
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    user = json.loads(file.read_text()) | {"process": ended.pid}
    assert user["machine"].startswith(socket.gethostname())

    file.write_text(json.dumps(user))
    assert not FeatureFolder(str(tmp_path), "mine").live_others()
    assert boot in user["machine"]
    file.write_text(json.dumps(user | {"machine": user["machine"].replace(boot, str(uuid.uuid4()))}))
    assert FeatureFolder(str(tmp_path), "mine").live_others()
