"""S3 over HTTP: an unreliable store only costs time, and a missing store is distinguished from a broken object."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray import storage
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.errors import ImcapError, InputError
from imcap_ray.exports.captions_rows import ExportSummary
from imcap_ray.exports.export import ExportOptions, export_captions
from imcap_ray.runs.captioned_images import CaptionedImageSource
from tests import small_data
from tests.flaky_s3 import Fault, S3Store

NUM_OBJECTS = 200


@pytest.mark.parametrize("fault", [500, 503, "reset", "cut"])
def test_an_unreliable_store_is_written_listed_and_read_completely(s3: S3Store, fault: Fault) -> None:
    # Most of them shorter than the text of an error, which pyarrow then loses.
    contents = {f"{number % 3}/{number}.bin": bytes([number]) * number for number in range(NUM_OBJECTS)}
    s3.proxy.every, s3.proxy.fault = 7, fault

    with ThreadPoolExecutor(16) as pool:  # or each wait would be the test's
        list(pool.map(lambda name: storage.write_bytes(f"{s3.uri}/{name}", contents[name]), contents))
        listed = {file.location: file.name for file in storage.list_files(s3.uri)}
        read = dict(zip(listed.values(), pool.map(storage.read_bytes, listed), strict=True))
        beginnings = list(pool.map(lambda location: storage.read_beginning(location, 8), listed))

    assert read == contents
    assert beginnings == [contents[name][:8] for name in listed.values()]
    assert s3.proxy.num_faults > 3 * NUM_OBJECTS // 7


def test_hundreds_of_requests_that_fail_once_all_succeed_in_one_process(s3: S3Store) -> None:
    locations = [f"{s3.uri}/{number}.jpg" for number in range(250)]
    write_all(locations)
    s3.proxy.each_once, s3.proxy.fault = True, 503

    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(storage.read_bytes, locations))

    assert read == [location.encode() for location in locations]
    assert s3.proxy.num_faults >= 2 * len(locations)  # each asks for the size and for the content


def test_a_store_that_throttles_a_fifth_of_all_requests_answers_seven_hundred_reads(s3: S3Store) -> None:
    locations = [f"{s3.uri}/{number}.jpg" for number in range(700)]
    write_all(locations)
    s3.proxy.rate, s3.proxy.fault = 0.2, 503

    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(storage.read_bytes, locations))

    assert read == [location.encode() for location in locations]
    assert s3.proxy.num_faults > 250


def write_all(locations: list[str]) -> None:
    """Write its name to each location, repeated to be longer than the text of an error."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda location: storage.write_bytes(location, location.encode()), locations))


def test_a_store_that_throttles_nine_of_ten_requests_is_reachable(s3: S3Store) -> None:
    storage.exists(s3.uri)
    s3.proxy.fail_next, s3.proxy.fault = 9, 503

    assert storage.is_reachable(s3.uri)
    assert s3.proxy.num_faults == 9


def test_the_number_of_attempts_is_set_by_the_environment(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    storage.exists(s3.uri)
    s3.proxy.every, s3.proxy.fault = 1, 503
    before = s3.proxy.num_requests

    with pytest.raises(OSError, match="AWS Error"):
        storage.exists(f"{s3.uri}/a.jpg")
    assert s3.proxy.num_requests - before == 3


def test_an_outage_of_twelve_seconds_only_delays_requests(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a.txt", b"1")
    s3.proxy.every, s3.proxy.fault = 1, 503
    threading.Timer(12, lambda: setattr(s3.proxy, "every", None)).start()

    assert storage.read_bytes(f"{s3.uri}/a.txt") == b"1"


def test_written_files_are_read_listed_and_removed(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a/b/c.txt", b"1")
    storage.write_bytes(f"{s3.uri}/a/d.txt", b"")

    assert [file[:3] for file in storage.list_files(f"{s3.uri}/a")] == [
        (f"{s3.uri}/a/d.txt", "d.txt", 0),
        (f"{s3.uri}/a/b/c.txt", "b/c.txt", 1),
    ]
    assert all(file.modified_ns > 0 for file in storage.list_files(s3.uri))
    assert storage.is_folder(f"{s3.uri}/a") and storage.is_file(f"{s3.uri}/a/d.txt")
    storage.remove(f"{s3.uri}/a")
    assert not storage.exists(f"{s3.uri}/a/b/c.txt")


def test_a_request_without_a_response_is_retried(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a.txt", b"1")
    s3.proxy.fail_next, s3.proxy.fault = 1, "hang"

    assert storage.read_bytes(f"{s3.uri}/a.txt") == b"1"
    assert s3.proxy.num_faults == 1


def test_an_unpickled_file_system_still_retries(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a.txt", b"1")
    filesystem, path = pickle.loads(pickle.dumps(storage.resolve(f"{s3.uri}/a.txt")))
    s3.proxy.fail_next, s3.proxy.fault = 3, 503  # pyarrow itself would try three times

    with filesystem.open_input_file(path) as file:
        assert file.read() == b"1"


def test_a_large_object_is_read_in_two_requests(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a.jpg", bytes(3_000_000))
    before = s3.proxy.num_requests

    assert len(storage.read_bytes(f"{s3.uri}/a.jpg")) == 3_000_000
    assert s3.proxy.num_requests - before == 2  # its size, its content


def test_a_missing_object_is_not_requested_twice(s3: S3Store) -> None:
    storage.exists(s3.uri)
    before = s3.proxy.num_requests

    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3.uri}/nowhere.jpg")
    assert s3.proxy.num_requests - before == 1


def test_a_forbidden_object_is_a_permission_error_and_the_store_is_reachable(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/secret.jpg", b"1")
    s3.proxy.forbidden = "/secret.jpg"

    with pytest.raises(PermissionError, match=r"not allowed to read: 's3://.*/secret.jpg'"):
        storage.read_bytes(f"{s3.uri}/secret.jpg")
    assert storage.is_reachable(f"{s3.uri}/secret.jpg")


def test_a_bucket_that_cannot_be_listed_is_reachable(s3: S3Store) -> None:
    s3.proxy.every, s3.proxy.fault = 1, 403

    assert storage.is_reachable(s3.uri)


@pytest.mark.parametrize("fault", [500, "reset", "hang"])
def test_a_missing_store_is_an_os_error_and_not_reachable(
    s3: S3Store, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.write_bytes(f"{s3.uri}/a.jpg", b"1")
    assert storage.is_reachable(s3.uri)
    s3.proxy.every, s3.proxy.fault = 1, fault

    with pytest.raises(OSError, match="a.jpg.*AWS Error") as caught:
        storage.read_bytes(f"{s3.uri}/a.jpg")
    start = time.monotonic()
    assert not storage.is_reachable(f"{s3.uri}/a.jpg")
    assert time.monotonic() - start < 15
    assert type(caught.value) is OSError

    s3.proxy.every = None
    assert storage.is_reachable(s3.uri)


def test_a_stopped_store_is_not_reachable(s3: S3Store) -> None:
    s3.proxy.close()

    assert not storage.is_reachable(s3.uri)


def test_a_bucket_that_does_not_exist_is_not_reachable(s3: S3Store) -> None:
    assert not storage.is_reachable(f"{s3.uri}-other")


CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


def test_a_store_that_does_not_decode_chunks_gets_complete_files(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECKSUMS, raising=False)
    s3.proxy.decodes_chunks = False

    storage.write_bytes(f"{s3.uri}/a/1.txt", b"hello")
    storage.write_bytes(f"{s3.uri}/a/2.txt", bytes(8_000_000))
    storage.write_bytes(f"{s3.uri}/a/3.txt", b"")
    with storage.replacing(f"{s3.uri}/a/4.txt") as file:
        file.write(bytes(3_000_000))
    with pickle.loads(pickle.dumps(storage.resolve(s3.uri)[0])).open_output_stream(f"{s3.uri[5:]}/a/5.txt") as stream:
        stream.write(b"from another process")

    sizes = {file.name: file.size for file in storage.list_files(f"{s3.uri}/a")}
    assert sizes == {"1.txt": 5, "2.txt": 8_000_000, "3.txt": 0, "4.txt": 3_000_000, "5.txt": 20}
    assert storage.read_bytes(f"{s3.uri}/a/1.txt") == b"hello"
    storage.remove(f"{s3.uri}/a")
    assert not storage.exists(f"{s3.uri}/a/1.txt")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_store_that_keeps_chunk_encoding_is_an_error_that_names_the_setting(
    s3: S3Store, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    monkeypatch.setenv(CHECKSUMS, "when_supported")
    s3.proxy.decodes_chunks = False
    content = bytes(3500)

    with pytest.raises(
        InputError,
        match=rf"{s3.proxy.url} .* {s3.uri}/a.txt: expected 3,500 bytes, got [\d,]+; .* set {CHECKSUMS}=when_required",
    ):
        if is_streamed:
            with storage.replacing(f"{s3.uri}/a.txt") as file:
                file.write(content)
        else:
            storage.write_bytes(f"{s3.uri}/a.txt", content)


def test_a_store_that_decodes_chunks_is_checked_only_once(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKSUMS, "when_supported")
    storage.write_bytes(f"{s3.uri}/a.txt", b"hello")
    before = s3.proxy.num_requests

    storage.write_bytes(f"{s3.uri}/b.txt", b"hello")

    assert s3.proxy.num_requests - before == 1
    assert storage.read_bytes(f"{s3.uri}/a.txt") == b"hello"


@pytest.fixture
def captions(s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Captions of three images in the store, which gets two requests for each."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    rows = []
    for number, name in enumerate("abc"):
        storage.write_bytes(path := f"{s3.uri}/in/{name}.jpg", small_data.jpeg(number))
        row = dict.fromkeys(CAPTIONS_SCHEMA.names) | {"image_id": f"{name}.jpg", "image_path": path}
        rows.append(row | {"status": "ok", "caption": "a dog", "sha256": "", "format": "jpeg"})
    pq.write_table(pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA), tmp_path / "captions.parquet")
    return tmp_path / "captions.parquet"


def export(captions: Path, output: Path, format: Any) -> ExportSummary:
    images = CaptionedImageSource(str(captions), allow_outside_paths=True)
    return export_captions(str(captions), str(output), ExportOptions(format=format), images=images)


@pytest.mark.parametrize("format", ["webdataset", "hf"])
def test_an_export_waits_for_a_store_that_throttles(s3: S3Store, captions: Path, tmp_path: Path, format: str) -> None:
    """Also after hundreds of retries in the same process, which drain the quota of the AWS library's own strategy."""
    locations = [f"{s3.uri}/{number}.jpg" for number in range(150)]
    write_all(locations)
    s3.proxy.each_once, s3.proxy.fault = True, 503
    with ThreadPoolExecutor(16) as pool:
        pool.map(storage.read_bytes, locations)  # their errors are not collected: this test is about the export

    assert export(captions, tmp_path / "out", format).num_exported == 3


@pytest.mark.parametrize("format", ["webdataset", "hf"])
def test_an_export_fails_and_names_the_undelivered_image(
    s3: S3Store, captions: Path, tmp_path: Path, format: str
) -> None:
    s3.proxy.fault, s3.proxy.broken = 503, "/b.jpg"

    with pytest.raises(ImcapError, match=r"1 of 3 images are not in .*/out because .*: b\.jpg \(.*; 2 images were exp"):
        export(captions, tmp_path / "out", format)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_an_export_ends_when_the_store_is_missing(s3: S3Store, captions: Path, tmp_path: Path) -> None:
    s3.proxy.is_down = True

    with pytest.raises(ImcapError, match="s3://.*/a.jpg cannot be read any more"):
        export(captions, tmp_path / "out", "webdataset")
