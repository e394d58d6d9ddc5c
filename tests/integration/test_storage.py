"""S3 over HTTP: a store that fails now and then costs time only, one that is gone is told from a broken object."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from imcap_ray import storage
from tests.flaky_s3 import Fault, S3Store

NUM_OBJECTS = 200


@pytest.mark.parametrize("fault", [500, 503, "reset", "cut"])
def test_a_store_that_fails_now_and_then_is_written_listed_and_read_in_full(s3: S3Store, fault: Fault) -> None:
    # Most of them shorter than the text of an error, which pyarrow then loses.
    contents = {f"{number % 3}/{number}.bin": bytes([number]) * number for number in range(NUM_OBJECTS)}
    s3.proxy.every, s3.proxy.fault = 7, fault

    with ThreadPoolExecutor(16) as pool:  # or each wait would be the test's
        list(pool.map(lambda name: storage.write_bytes(f"{s3.uri}/{name}", contents[name]), contents))
        listed = {file.location: file.name for file in storage.list_files(s3.uri)}
        read = dict(zip(listed.values(), pool.map(storage.read_bytes, listed), strict=True))

    assert read == contents
    assert s3.proxy.num_faults > 3 * NUM_OBJECTS // 7


def test_what_is_written_is_read_listed_and_removed(s3: S3Store) -> None:
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


def test_an_answer_that_does_not_come_is_asked_for_again(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/a.txt", b"1")
    s3.proxy.fail_next, s3.proxy.fault = 1, "hang"

    assert storage.read_bytes(f"{s3.uri}/a.txt") == b"1"
    assert s3.proxy.num_faults == 1


def test_a_file_system_that_went_to_another_process_still_tries_again(s3: S3Store) -> None:
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


def test_a_missing_object_is_not_asked_for_twice(s3: S3Store) -> None:
    storage.exists(s3.uri)
    before = s3.proxy.num_requests

    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3.uri}/nowhere.jpg")
    assert s3.proxy.num_requests - before == 1


def test_an_object_that_may_not_be_read_is_a_permission_error_and_the_store_is_reachable(s3: S3Store) -> None:
    storage.write_bytes(f"{s3.uri}/secret.jpg", b"1")
    s3.proxy.forbidden = "/secret.jpg"

    with pytest.raises(PermissionError, match=r"not allowed to read: 's3://.*/secret.jpg'"):
        storage.read_bytes(f"{s3.uri}/secret.jpg")
    assert storage.is_reachable(f"{s3.uri}/secret.jpg")


def test_a_bucket_that_may_not_be_looked_at_is_reachable(s3: S3Store) -> None:
    s3.proxy.every, s3.proxy.fault = 1, 403

    assert storage.is_reachable(s3.uri)


@pytest.mark.parametrize("fault", [500, "reset", "hang"])
def test_a_store_that_is_gone_is_an_os_error_and_not_reachable(
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


def test_a_store_that_no_longer_listens_is_not_reachable(s3: S3Store) -> None:
    s3.proxy.close()

    assert not storage.is_reachable(s3.uri)


def test_a_bucket_that_does_not_exist_is_not_reachable(s3: S3Store) -> None:
    assert not storage.is_reachable(f"{s3.uri}-other")
