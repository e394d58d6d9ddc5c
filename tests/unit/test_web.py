"""Images by their web address, from a server on this machine."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from imcap_ray import storage, web
from imcap_ray.cli.main import main
from imcap_ray.config import load_recipe
from imcap_ray.data.dataset_check import check_dataset
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.image_reading import read_file, read_rows
from imcap_ray.data.manifest import InputOptions, build_manifest
from imcap_ray.errors import DatasetError, ImageError, InputError
from tests.small_data import jpeg

BUSY_TIMES = 2


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name, _, status = self.path.strip("/").partition("/")
        is_free = name == "busy" and self.server.requests.count(self.path) > BUSY_TIMES
        if is_free or name.startswith(("a%20dog.jpg", "%C3%A9t%C3%A9.jpg")):
            self._send(jpeg(1))
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "/a%20dog.jpg")
            self.end_headers()
        elif name == "short":
            self._send(jpeg(1), num_missing=7)
        elif name == "page":
            self._send(b"<!doctype html><p>Sign in to see this photograph</p>")
        elif name == "slow":
            self.server.closing.wait(30)
        elif name == "noise":
            self.wfile.write(b"no HTTP at all\n")
        else:
            self.send_error(int(status or (503 if name == "busy" else 404)))

    def _send(self, data: bytes, *, num_missing: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) - num_missing])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(web, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(web, "FIRST_WAIT_SECONDS", 0.01)
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.closing.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["a%20dog.jpg", "a dog.jpg", "a dog.jpg?w=20#top", "été.jpg", "moved", "busy"])
def test_an_image_is_read_by_its_web_address(server: _Server, path: str) -> None:
    assert read_file(f"{server.address}/{path}", None) == jpeg(1)


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("no.jpg", "missing", "no such file: http://127.0.0.1:"),
        ("status/410", "missing", "no such file"),
        ("status/403", "permission_denied", "not allowed to read"),
        ("status/418", "read_error", "cannot read .*: the server answered with HTTP status 418"),
        ("status/503", "read_error", "cannot read .*: the server answered with HTTP status 503"),
        ("slow", "read_error", "cannot read .*timed out"),
        ("short", "read_error", r"the connection ended after [\d,]+ of [\d,]+ bytes"),
        ("noise", "read_error", "cannot read .*: BadStatusLine: no HTTP at all"),
    ],
)
def test_a_web_server_that_fails_costs_its_row(server: _Server, path: str, code: str, message: str) -> None:
    error = read_file(f"{server.address}/{path}", str(Path(__file__).parent))

    assert isinstance(error, ImageError)
    assert error.code == code
    assert re.search(message, error.message)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/a.jpg", "https://127.0.0.1:9/a.jpg", "https://[/a.jpg", "http://"]
)
def test_a_web_address_without_a_server_costs_its_row(address: str) -> None:
    error = read_file(address, None)

    assert isinstance(error, ImageError)
    assert error.code == "read_error"


def test_a_file_of_the_web_above_the_maximum_is_not_read(server: _Server) -> None:
    with pytest.raises(OSError, match="too large") as error:
        storage.read_bytes(f"{server.address}/a dog.jpg", max_bytes=100)
    assert error.value.errno == errno.EFBIG


def test_web_addresses_in_a_parquet_table_require_permission(server: _Server, tmp_path: Path) -> None:
    names = ["a dog.jpg", "moved", "no.jpg", "page"]
    pq.write_table(pa.table({"uri": [f"{server.address}/{name}" for name in names]}), tmp_path / "a.parquet")

    with pytest.raises(InputError, match="leads out of .*--allow-outside-paths"):
        build_manifest(str(tmp_path / "a.parquet"), str(tmp_path / "manifest"))
    assert server.requests == []
    options = InputOptions(allow_outside_paths=True)
    build_manifest(str(tmp_path / "a.parquet"), str(tmp_path / "manifest"), options)
    assert server.requests == []

    rows = pq.read_table(tmp_path / "manifest").to_pylist()
    data = dict(zip(names, (data for _, data in read_rows(rows, str(tmp_path / "a.parquet"))), strict=True))
    assert data["a dog.jpg"] == data["moved"] == jpeg(1)
    assert isinstance(data["no.jpg"], ImageError)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "metadata.jsonl", "a.parquet"])
def test_web_addresses_in_a_data_set_require_permission(server: _Server, tmp_path: Path, name: str) -> None:
    addresses = [f"{server.address}/{image}" for image in ("a dog.jpg", "moved", "no.jpg")]
    rows = [{"file_name": address, "caption": "a dog"} for address in addresses]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name.endswith(".csv"):
        (tmp_path / name).write_text("url,caption\n" + "".join(f"{address},a dog\n" for address in addresses))
    else:
        lines = map(json.dumps, rows)
        (tmp_path / name).write_text(f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines))

    with pytest.raises(DatasetError, match="leads out of .*--allow-outside-paths"):
        load_dataset(str(tmp_path / name))
    dataset = load_dataset(str(tmp_path / name), allow_outside_paths=True)
    manifest = dataset.manifest(dataset.table)
    assert server.requests == []

    assert sorted(manifest["image_path"].to_pylist()) == addresses
    check = check_dataset(dataset, recipe=load_recipe("lite2-attention"))
    problems = [finding for finding in check.findings if finding.code in ("missing", "unreadable")]
    assert [problem.count for problem in problems] == [1]
    assert "odd_names" not in [finding.code for finding in check.findings]  # an address need not end like an image


@pytest.mark.parametrize("use", [storage.exists, storage.is_folder, lambda path: storage.write_bytes(path, b"")])
def test_a_web_address_of_anything_but_an_image_is_refused(use: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="https://host is a web server, .*: download anything else first"):
        use("https://host/folder/a.parquet")


def test_an_image_of_the_web_is_captioned_on_stdout(server: _Server, model_dir: Path) -> None:
    address = f"{server.address}/a dog.jpg"

    result = CliRunner().invoke(main, ["caption", address, f"{address}?w=20", "--model", str(model_dir)])

    first, second = result.stdout.splitlines()
    assert first.startswith(f"{address}: ")
    assert second.removeprefix(f"{address}?w=20") == first.removeprefix(address)
    failed = CliRunner().invoke(main, ["caption", f"{server.address}/no.jpg", "--model", str(model_dir)])
    assert failed.exit_code == 2
    assert "no such file" in failed.stderr
    run = CliRunner().invoke(main, ["caption", f"{server.address}/folder", "captions"])
    assert "is a web server, from which only single images are read" in run.stderr
