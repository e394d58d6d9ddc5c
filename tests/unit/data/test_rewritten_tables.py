"""A caption always belongs to the bytes it was made from, even if their table or tar is rewritten."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray import storage
from imcap_ray.data import manifest, parquet_files
from imcap_ray.data.datasets import load_dataset, parquet
from imcap_ray.data.datasets.dataset import Collector
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import InputOptions, build_manifest, update_manifest
from imcap_ray.data.parquet_files import PlainParquetFile, read_table, write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, MANIFEST_SCHEMA, ManifestEntry, ManifestRow
from imcap_ray.data.table_listing import choose_ids, list_table_images
from imcap_ray.errors import DatasetError, ImageError, ImcapError
from imcap_ray.runs.captioned_images import CaptionedImageSource
from imcap_ray.runs.captions_folder import CaptionsFolder
from tests.small_data import jpeg, write_tar

CONTENTS = {name: jpeg(number, width=20, height=20) for number, name in enumerate("abcdexyz")}
CONTENTS["b"] = b"no image at all"
"""Content of each image by id; `b` is corrupt."""

RUN = "0123456789abcdef" * 2


def write_input(folder: Path, kind: str, names: str) -> None:
    """Write the images of these names, in this order, as a table or tar with a new modification time."""
    folder.mkdir(exist_ok=True)
    path = folder / ("t.tar" if kind == "tar" else "t.parquet")
    before = path.stat().st_mtime_ns if path.exists() else time.time_ns()
    if kind == "tar":
        write_tar(path, {f"{name}.jpg": CONTENTS[name] for name in names})
    else:
        images = [CONTENTS[name] for name in names]
        struct = [{"bytes": image, "path": f"{name}.jpg"} for name, image in zip(names, images, strict=True)]
        columns: dict[str, Any] = {"image": struct if kind == "struct" else images}
        if kind != "positions":
            columns["id"] = list(names)
        pq.write_table(pa.table(columns), path, row_group_size=2)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def manifest_rows(folder: str) -> list[ManifestRow]:
    return [row for part in storage.list_work_tables(folder) for row in read_table(part).to_pylist()]


def caption(folder: CaptionsFolder, source: Path, *, retry_failed: bool = False, limit: int | None = None) -> None:
    """A captioning run without Ray: list, delete the rows to be repeated, read, write."""
    if folder.read_run() is None:
        folder.write_run({"input": str(source), "state": "running"})
    summary = build_manifest(str(source), folder.manifest, InputOptions(limit=limit))
    folder.delete_changed_rows(summary.changed)
    if retry_failed:
        folder.delete_failed_rows()
    read_and_write(folder, manifest_rows(folder.manifest))


def read_and_write(folder: CaptionsFolder, rows: list[ManifestRow]) -> None:
    """Caption those of these rows that are not done with the name of their content."""
    done = set(folder.done_ids().tolist())
    left = [row for row in rows if row["manifest_id"] not in done]
    written = []
    for row, data in read_rows(left, folder.location):
        error = data if isinstance(data, ImageError) else None
        if data == CONTENTS["b"]:
            error = ImageError("not_an_image", "broken")
        content = next((name for name, content in CONTENTS.items() if content == data), "")
        written.append(
            dict.fromkeys(CAPTIONS_SCHEMA.names)
            | {"image_id": row["image_id"], "image_path": row["image_path"], "duplicate_of": ""}
            | {"status": "failed" if error else "ok", "error_code": error.code if error else ""}
            | {"caption": "" if error else content, "sha256": "", "manifest_id": row["manifest_id"]}
        )
    if not written:
        return
    name = f"{RUN}_{len(folder.parts()) + 1:06}.parquet"
    write_table(
        storage.join(folder.location, name),
        pa.Table.from_pylist(written, schema=CAPTIONS_SCHEMA.insert(0, MANIFEST_SCHEMA.field(0))).remove_column(0),
    )
    ids = pa.array([row["manifest_id"] for row in written], pa.int64())
    write_table(storage.join(folder.done, name), pa.table({"manifest_id": ids}))


def results(folder: CaptionsFolder) -> dict[str, str]:
    """Return the name of the captioned content, or the error code, by image id."""
    folder.verify_row_counts()
    rows = [row for part in folder.parts() for row in read_table(part).to_pylist()]
    return {row["image_id"]: row["caption"] or row["error_code"] for row in rows}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in"


@pytest.fixture
def folder(tmp_path: Path) -> CaptionsFolder:
    return CaptionsFolder(str(tmp_path / "out"))


KINDS = ["bytes", "struct", "tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_image_that_left_its_table_does_not_get_the_caption_of_another(
    source: Path, folder: CaptionsFolder, kind: str
) -> None:
    write_input(source, kind, "abcde")
    caption(folder, source)
    write_input(source, kind, "acde")

    caption(folder, source, retry_failed=True)

    assert results(folder) == {"a": "a", "b": "changed", "c": "c", "d": "d", "e": "e"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_whose_table_was_rewritten_mixes_up_no_captions(
    source: Path, folder: CaptionsFolder, kind: str
) -> None:
    write_input(source, kind, "axcde")
    folder.write_run({"input": str(source), "state": "running"})
    build_manifest(str(source), folder.manifest)
    read_and_write(folder, manifest_rows(folder.manifest)[:1])
    write_input(source, kind, "yecda")

    caption(folder, source)

    assert results(folder) == {"a": "a", "x": "changed", "c": "c", "d": "d", "e": "e", "y": "y"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_limit_of_a_resumed_run_count_as_changed_until_listed_again(
    source: Path, folder: CaptionsFolder, kind: str
) -> None:
    write_input(source, kind, "axcde")
    folder.write_run({"input": str(source), "state": "running"})
    build_manifest(str(source), folder.manifest)
    write_input(source, kind, "acdex")

    caption(folder, source, limit=2)
    limited = results(folder)
    caption(folder, source)

    assert limited == {"a": "a", "x": "changed", "c": "c", "d": "changed", "e": "changed"}
    assert results(folder) == {name: name for name in "axcde"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_is_rewritten_during_a_run_is_captioned_by_the_next_one(
    source: Path, folder: CaptionsFolder, kind: str
) -> None:
    write_input(source, kind, "acde")
    folder.write_run({"input": str(source), "state": "running"})
    build_manifest(str(source), folder.manifest)
    write_input(source, kind, "edca")  # of the same size

    read_and_write(folder, manifest_rows(folder.manifest))
    during = results(folder)
    caption(folder, source)

    assert during == dict.fromkeys("acde", "changed")
    assert results(folder) == {name: name for name in "acde"}


def test_a_row_identified_by_position_is_not_read_from_a_shortened_table(source: Path, folder: CaptionsFolder) -> None:
    write_input(source, "positions", "acdb")
    caption(folder, source)
    write_input(source, "positions", "xa")

    caption(folder, source, retry_failed=True)

    ids = {f"t.parquet#{number}": answer for number, answer in enumerate(["x", "a", "d", "changed"])}
    assert results(folder) == ids


def rows_of_table(tmp_path: Path, names: str, *, is_known: bool = True) -> list[ManifestRow]:
    shutil.rmtree(tmp_path / "manifest", ignore_errors=True)
    write_input(tmp_path / "in", "bytes", names)
    build_manifest(str(tmp_path / "in"), str(tmp_path / "manifest"))
    unknown = {} if is_known else {"size": -1, "modified_ns": 0}
    return [row | unknown for row in manifest_rows(str(tmp_path / "manifest"))]


def read_contents(rows: Sequence[ManifestRow]) -> list[bytes | str]:
    """Read each row, in order; return its content or error code."""
    answers = {row["manifest_id"]: data for row, data in read_rows(rows, None)}
    assert len(answers) == len(rows)
    return [data.code if isinstance(data := answers[row["manifest_id"]], ImageError) else data for row in rows]


def test_each_of_several_rows_at_the_same_position_is_read(tmp_path: Path) -> None:
    rows = rows_of_table(tmp_path, "acd")
    twin = rows[1] | {"image_id": "twin", "manifest_id": 7}
    stale = rows[1] | {"image_id": "stale", "manifest_id": 8, "modified_ns": 1}

    assert read_contents([*rows, twin, stale]) == [*(CONTENTS[name] for name in "acdc"), "changed"]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_table_with_fewer_row_groups_and_rows_than_before_does_not_crash(tmp_path: Path, is_known: bool) -> None:
    rows = rows_of_table(tmp_path, "acdexyz", is_known=is_known)
    write_input(tmp_path / "in", "bytes", "x")

    first = CONTENTS["x"] if not is_known else "changed"
    assert read_contents(rows) == [first, *["changed"] * 6]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_table_whose_columns_changed_fails_only_its_own_rows(tmp_path: Path, is_known: bool) -> None:
    rows = rows_of_table(tmp_path, "ac", is_known=is_known)
    (tmp_path / "single.jpg").write_bytes(CONTENTS["d"])
    single = rows[0] | {"manifest_id": 9, "table_path": "", "image_path": str(tmp_path / "single.jpg")}
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "in" / "t.parquet")

    code = "changed" if is_known else "read_error"
    assert read_contents([*rows, single]) == [code, code, CONTENTS["d"]]


def test_rows_of_a_deleted_table_are_missing(tmp_path: Path) -> None:
    rows = rows_of_table(tmp_path, "ac")
    (tmp_path / "in" / "t.parquet").unlink()

    assert read_contents(rows) == ["missing", "missing"]


@pytest.mark.parametrize("kind", ["tar", "bytes"])
def test_rows_read_before_a_table_was_rewritten_are_not_returned_afterwards(
    tmp_path: Path, source: Path, kind: str
) -> None:
    """The table is rewritten after some rows were read, so later rows belong to another table."""
    write_input(source, kind, "acde")
    build_manifest(str(source), str(tmp_path / "manifest"))
    reading = read_rows(manifest_rows(str(tmp_path / "manifest")), None, rows_per_check=2)

    answers = [next(reading), next(reading)]
    write_input(source, kind, "edca")
    answers += list(reading)

    codes = [data.code if isinstance(data, ImageError) else data for _, data in answers]
    assert codes == [CONTENTS["a"], CONTENTS["c"], "changed", "changed"]


def test_a_table_is_described_twice_and_opened_once_for_any_number_of_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in" / "t.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [CONTENTS["a"]] * 60}), path, row_group_size=1)
    build_manifest(str(path), str(tmp_path / "manifest"))
    calls = {"opened": 0, "described": 0}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return call(*arguments, **keywords)

        return counted

    monkeypatch.setattr(parquet_files, "PlainParquetFile", counting("opened", PlainParquetFile))
    monkeypatch.setattr(storage, "describe_regular_file", counting("described", storage.describe_regular_file))

    assert read_contents(manifest_rows(str(tmp_path / "manifest"))) == [CONTENTS["a"]] * 60
    assert calls == {"opened": 1, "described": 2}


@pytest.mark.parametrize("before", ["shorter", "longer"])
def test_a_table_rewritten_during_listing_gives_no_image_the_id_of_another(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    write_input(source, "bytes", "acd")
    shutil.copy(source / "t.parquet", tmp_path / "new.parquet")
    write_input(source, "bytes", "ac" if before == "shorter" else "acde")
    pq.write_table(pa.table({"image": [CONTENTS["x"]], "id": ["x"]}), source / "u.parquet")

    def rewritten_after(*arguments: Any) -> Any:
        ids = choose_ids(*arguments)
        shutil.copy(tmp_path / "new.parquet", source / "t.parquet")
        return ids

    monkeypatch.setattr(manifest, "choose_ids", rewritten_after)

    with pytest.raises(ImcapError, match="was rewritten while it was listed: run the same command again") as refused:
        build_manifest(str(source), str(tmp_path / "manifest"))
    assert refused.value.exit_code == 1


# ---- reports and exports


def captioned(folder: CaptionsFolder, source: Path, names: str) -> tuple[CaptionedImageSource, list[ManifestRow]]:
    write_input(source, "bytes", names)
    caption(folder, source)
    rows = [{"image_id": name, "image_path": ""} for name in names]
    return CaptionedImageSource(folder.location), rows


def read_all(images: Iterator[bytes | ImageError]) -> list[bytes | str]:
    return [data.code if isinstance(data, ImageError) else data for data in images]


def test_a_report_shows_no_image_of_a_table_rewritten_since_captioning(source: Path, folder: CaptionsFolder) -> None:
    images, rows = captioned(folder, source, "acd")
    assert read_all(images.load(rows)) == [CONTENTS[name] for name in "acd"]

    write_input(source, "bytes", "dca")

    assert read_all(images.load(rows)) == ["changed"] * 3


def with_hashes(rows: list[ManifestRow]) -> list[ManifestRow]:
    return [row | {"sha256": hashlib.sha256(CONTENTS[row["image_id"]]).hexdigest()} for row in rows]


@pytest.mark.parametrize("kind", ["bytes", "tar"])
def test_a_report_shows_unchanged_images_of_a_table_with_a_new_modification_time(
    source: Path, folder: CaptionsFolder, kind: str
) -> None:
    write_input(source, kind, "acd")
    caption(folder, source)
    rows = with_hashes([{"image_id": name, "image_path": ""} for name in "acd"])
    images = CaptionedImageSource(folder.location)

    write_input(source, kind, "acdex")  # touched, and longer

    assert read_all(images.load(rows)) == [CONTENTS[name] for name in "acd"]

    write_input(source, kind, "axd")

    assert read_all(images.load(rows)) == [CONTENTS["a"], "changed", CONTENTS["d"]]

    write_input(source, kind, "a")

    assert read_all(images.load(rows)) == [CONTENTS["a"], "changed", "changed"]


def test_a_row_with_a_hash_in_a_tar_of_other_files_has_changed(tmp_path: Path, source: Path) -> None:
    write_input(source, "tar", "ac")
    build_manifest(str(source), str(tmp_path / "manifest"))
    rows = [row | {"sha256": "0" * 64} for row in manifest_rows(str(tmp_path / "manifest"))]
    write_tar(source / "t.tar", {"z.jpg": bytes(range(256)) * 40})

    assert read_contents(rows[1:]) == ["changed"]  # and no read error, after which an export would ask for another try


def test_a_table_whose_version_cannot_be_queried_is_a_read_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_table(tmp_path, "ac")
    describe, calls = storage.describe_regular_file, 0

    def throttled(location: str) -> storage.ListedFile:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("SlowDown")
        return describe(location)

    monkeypatch.setattr(storage, "describe_regular_file", throttled)

    assert read_contents(rows) == ["read_error", "read_error"]


def test_a_table_removed_during_reading_counts_as_changed(tmp_path: Path) -> None:
    rows = rows_of_table(tmp_path, "ac")
    reading = read_rows(rows, None, rows_per_check=1)

    answers = [next(reading)[1]]
    (tmp_path / "in" / "t.parquet").unlink()
    answers += [data for _, data in reading]

    assert read_all(iter(answers)) == [CONTENTS["a"], "changed"]


def test_a_store_that_throttles_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(storage, "is_reachable", lambda location: bool(asked.append(location)) or len(asked) < 3)
    images = CaptionedImageSource(str(tmp_path))
    error = ImageError("read_error", "SlowDown")

    for number in range(100):
        images.require_reachable(f"s3://bucket/{number}.jpg", error)
    assert asked == ["s3://bucket/0.jpg"]

    images.require_still_reachable()  # about the last one that it was not asked about
    images.require_still_reachable()
    assert asked == ["s3://bucket/0.jpg", "s3://bucket/99.jpg"]

    images.require_reachable("s3://bucket/100.jpg", error)
    with pytest.raises(ImcapError, match="s3://bucket/100.jpg cannot be read"):
        images.require_still_reachable()


def test_an_old_output_with_two_images_at_one_position_can_be_reported_and_exported(
    source: Path, folder: CaptionsFolder
) -> None:
    """Earlier versions wrote such outputs: `a` has the position of `c`, from an earlier state of the table."""
    images, rows = captioned(folder, source, "acd")
    manifest = pa.Table.from_pylist(manifest_rows(folder.manifest), schema=MANIFEST_SCHEMA)
    moved = manifest.slice(0, 1).to_pylist()[0] | {"row": 1, "modified_ns": 5}
    update_manifest(folder.manifest, pa.Table.from_pylist([moved], schema=MANIFEST_SCHEMA))

    assert read_all(images.load(rows)) == ["changed", CONTENTS["c"], CONTENTS["d"]]


def test_a_manifest_without_sizes_and_times_is_read(source: Path, folder: CaptionsFolder) -> None:
    images, rows = captioned(folder, source, "acd")
    for part in storage.list_work_tables(folder.manifest):
        write_table(part, read_table(part).drop(["size", "modified_ns"]))

    assert read_all(images.load(rows)) == [CONTENTS[name] for name in "acd"]


# ---- comparing versions


@pytest.mark.parametrize(
    ("location", "before", "now", "expected"),
    [
        ("/t", (5, 1_500), (5, 1_500), True),
        ("/t", (5, 1_500), (6, 1_500), False),
        ("/t", (5, 1_500), (5, 1_501), False),
        ("/t", (5, 10**9), (5, 10**9 + 1), False),
        ("/t", (-1, 0), (6, 1_500), True),
        ("/t", (5, 0), (6, 1_500), False),
        ("/t", (5, 1_500), (0, 0), True),
        ("s3://b/t", (5, 3 * 10**9 + 123), (5, 3 * 10**9), True),  # listed with a fraction, asked for without
        ("s3://b/t", (5, 3 * 10**9 + 123), (5, 3 * 10**9 + 124), False),
        ("s3://b/t", (5, 3 * 10**9), (5, 4 * 10**9), False),
    ],
)
def test_files_are_compared_by_the_known_size_and_time(
    location: str, before: tuple[int, int], now: tuple[int, int], expected: bool
) -> None:
    assert storage.is_same_version(location, before, now) == expected


def test_a_rewritten_table_in_a_store_counts_as_changed(tmp_path: Path) -> None:
    place = "memory://rewritten-test/t.parquet"
    for names in ("acd", "ac"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [CONTENTS[name] for name in names], "id": list(names)}), sink)
        storage.write_bytes(place, sink.getvalue().to_pybytes())
        if names == "acd":
            build_manifest(place, str(tmp_path / "manifest"))
            rows = manifest_rows(str(tmp_path / "manifest"))
            assert read_contents(rows) == [CONTENTS[name] for name in "acd"]

    assert read_contents(rows) == ["changed"] * 3


@pytest.mark.parametrize("kind", ["tar", "table"])
@pytest.mark.parametrize("is_rewritten", [True, False])
def test_a_data_set_rewritten_during_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_rewritten: bool
) -> None:
    """Otherwise, every image would be trained on with the caption of another image."""
    path = tmp_path / ("t.tar" if kind == "tar" else "t.parquet")

    def write(names: str, seconds: int) -> None:
        if kind == "tar":
            write_tar(path, {f"{n}.{end}": data for n in names for end, data in (("jpg", CONTENTS[n]), ("txt", b"A"))})
        else:
            columns = {"image": [CONTENTS[name] for name in names], "id": list(names), "caption": list(names)}
            pq.write_table(pa.table(columns), path)
        os.utime(path, ns=(seconds * 10**9, seconds * 10**9))

    add = Collector.add

    def add_and_rewrite(self: Collector, *arguments: Any, **options: Any) -> None:
        add(self, *arguments, **options)
        if is_rewritten:
            write("ca", 2)

    write("ac", 1)
    monkeypatch.setattr(Collector, "add", add_and_rewrite)
    if is_rewritten:
        with pytest.raises(DatasetError, match=rf"{path} was rewritten while it was read: run the same command again"):
            load_dataset(str(tmp_path))
    else:
        dataset = load_dataset(str(tmp_path))
        assert {file.modified_ns for file in dataset.tables.values()} == {10**9}
        assert set(dataset.manifest(dataset.table)["modified_ns"].to_pylist()) == {10**9}


@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_data_set_is_refused_if_its_images_are_listed_from_another_table_of_the_same_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    pq.write_table(pa.table({"image": [CONTENTS["a"], CONTENTS["c"]], "caption": ["a", "c"]}), tmp_path / "t.parquet")

    def rewritten(*arguments: Any, **options: Any) -> Iterator[ManifestEntry]:
        entries = list(list_table_images(*arguments, **options))
        return iter(entries[:-1] if change == "shorter" else [*entries, entries[-1]])

    monkeypatch.setattr(parquet, "list_table_images", rewritten)

    with pytest.raises(DatasetError, match=f"{tmp_path} was rewritten while it was read: run the same command again"):
        load_dataset(str(tmp_path))
