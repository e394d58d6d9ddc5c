"""An S3 store on this machine, and a proxy in front of it that makes requests fail as real stores and networks do."""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal

Fault = Literal["reset", "cut", "hang"] | int
"""An HTTP status, or what happens to the connection: reset before the answer, cut in the middle of it, no answer."""

_STARTUP_SECONDS: Final = 60.0
_XML: Final = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>planted</Message></Error>'
_CODES: Final = {400: "ExpiredToken", 403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}
_OF_CHUNKS: Final = ("content-encoding", "x-amz-trailer", "x-amz-decoded-content-length", "x-amz-content-sha256")
_OF_ONE_CONNECTION: Final = ("connection", "transfer-encoding", "content-length", "expect", "date", "server")


@dataclass(frozen=True)
class S3Store:
    """A bucket that is reachable only through `proxy`; environment variables point every process to it."""

    uri: str
    """s3://bucket, a new and empty one."""
    proxy: FlakyProxy


@contextmanager
def moto_server() -> Iterator[str]:
    """Run an S3 store in a separate process and yield the URL of its endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the variables by which a client finds the endpoint, with arbitrary credentials."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_bucket(endpoint: str, bucket: str = "") -> str:
    """Create a bucket and return its name."""
    bucket = bucket or f"bucket-{uuid.uuid4().hex}"
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=10)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()
    return bucket


class FlakyProxy:
    """Forwards HTTP requests to `target` and makes some of them fail.

    All settings can be changed while it runs:

        every     every n-th request fails; None for none
        rate      share of requests that fail, chosen at random
        each_once each request (its method, path and range) fails the first time
        fail_next number of following requests that fail
        fault     how they fail
        is_down   every connection is reset
        forbidden requests for a path that ends with it are answered 403
        decodes_chunks  whether what the AWS library encodes as aws-chunked is decoded, as not every store does
        broken    requests for a path that ends with it fail

    `num_requests` and `num_faults` are counters.
    """

    def __init__(self, target: str, *, every: int | None = None, fault: Fault = 500) -> None:
        self.target = target.removeprefix("http://")
        self.every = every
        self.rate = 0.0
        self.each_once = False
        self.fail_next = 0
        self.fault: Fault = fault
        self.is_down = False
        self.forbidden: str | None = None
        self.decodes_chunks = True
        self.broken: str | None = None
        self.num_requests = 0
        self.num_faults = 0
        self._random = random.Random(0)
        self._seen: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL for clients."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening and release hanging responses."""
        self._closing.set()
        self.is_down = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault_of_next_request(self, path: str, *request: str) -> Fault | None:
        """Count the request, and return how it is to fail, if it is to. `request` is what tells it from others."""
        with self._lock:
            self.num_requests += 1
            fault: Fault | None = None
            if self.is_down:
                fault = "reset"
            elif self.forbidden is not None and path.partition("?")[0].endswith(self.forbidden):
                fault = 403
            elif self.broken is not None and path.partition("?")[0].endswith(self.broken):
                fault = self.fault
            elif self.fail_next:
                self.fail_next -= 1
                fault = self.fault
            elif self._is_drawn():
                fault = self.fault
            elif self.each_once and (path, *request) not in self._seen:
                self._seen.add((path, *request))
                fault = self.fault
            self.num_faults += fault is not None
            return fault

    def _is_drawn(self) -> bool:
        is_nth = self.every is not None and self.num_requests % self.every == 0
        return is_nth or self._random.random() < self.rate

    def hang(self) -> None:
        """Block until the proxy is closed."""
        self._closing.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FlakyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away in the middle of a planted fault are the point


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.server.proxy.fault_of_next_request(self.path, self.command, self.headers.get("Range", ""))
        if fault == "hang":
            self.server.proxy.hang()
        if fault in ("reset", "hang"):
            self._reset()
        elif isinstance(fault, int):
            self._answer(fault, {"Content-Type": "application/xml"}, _XML.format(code=_CODES[fault]).encode())
        else:
            connection = http.client.HTTPConnection(self.server.proxy.target, timeout=30)
            try:
                left_out = _OF_ONE_CONNECTION if self.server.proxy.decodes_chunks else _OF_ONE_CONNECTION + _OF_CHUNKS
                headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                content = response.read()
                headers = {k: v for k, v in response.getheaders() if k.lower() not in _OF_ONE_CONNECTION}
                if self.command == "HEAD":
                    self._answer(response.status, headers, b"", response.getheader("Content-Length", "0"))
                else:
                    self._answer(response.status, headers, content, is_cut=fault == "cut")
            finally:
                connection.close()

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # what follows the last chunk
            pass
        return b"".join(chunks)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, length: str | None = None, is_cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut:
            self._reset()

    def _reset(self) -> None:
        """Reset the connection."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"moto's server ended with exit code {process.returncode}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
