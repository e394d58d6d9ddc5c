"""Hosts for tests, made of Linux namespaces: each has processes, a network and a /tmp/ray of its own, and a real Ray.

They share only the installed programs, on a file system that they cannot write to, and a network with an S3 store over
HTTP. Everything is inside namespaces that end with the process that made them, however that process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.flaky_s3 import s3_environment
from tests.ray_head import TOKEN

BUCKET: Final = "s3://bucket"
_NETWORK: Final = "10.77.0"
_STORE: Final = f"http://{_NETWORK}.1:5000"
_RAY_PORT: Final = 6379
_OBJECT_STORE_BYTES: Final = 200 * 2**20
_STARTED: Final = "Ray runtime started"
_START_TRIES: Final = 3
"""Ray gives its own processes 30 s, which a machine that is busy with other things may need for their imports."""
_REPOSITORY: Final = Path(__file__).parents[1]
_PRIVATE: Final = "/tmp/ray"
"""Where Ray puts its sessions; a host's own, as /dev/shm is."""

_ISOLATED: Final = ("--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc")

# The first process of a host. Its end ends all others, and it ends when its standard input does: with the test's
# process, even if that is killed.
_INIT: Final = f"""
set -e
mount -o remount,bind,ro /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs {_PRIVATE}
mkdir {_PRIVATE}/home
echo "$0" > /proc/sys/kernel/hostname
ip link set lo up
echo ready
exec cat > /dev/null
"""

_PUT: Final = """
import sys
from pathlib import Path
from imcap_ray import storage
folder, uri = sys.argv[1:]
for path in sorted(Path(folder).rglob("*")):
    if path.is_file():
        storage.write_bytes(f"{uri}/{path.relative_to(folder)}", path.read_bytes())
"""

_ROWS: Final = """
import json, sys
import pyarrow.dataset as pads
from imcap_ray import storage
parts = [storage.resolve(part)[1] for part in storage.list_parquet(sys.argv[1])]
print(json.dumps(pads.dataset(parts, filesystem=storage.resolve(sys.argv[1])[0]).to_table().to_pylist()))
"""

_TEXT: Final = """
import sys
from imcap_ray import storage
sys.stdout.buffer.write(storage.read_bytes(sys.argv[1]))
"""

_MAKE_BUCKET: Final = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1].removeprefix("http://"), timeout=30)
connection.request("PUT", sys.argv[2].replace("s3:/", ""))
sys.exit(connection.getresponse().status != 200)
"""


@dataclass(frozen=True)
class Host:
    """A machine, from the point of view of its processes."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    log: Path
    """Output of the programs started here."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *words: object, timeout: float = 900) -> str:
        """Run a program, which must succeed, and return its standard output."""
        done = subprocess.run(
            self._command(*words), env=self._environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """Start a program whose output goes to the log."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self._command(*words), env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.started.append(process)
        return process

    def output(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def processes(self) -> list[str]:
        """The command lines of all processes of this host."""
        command_lines = []
        for path in Path("/proc", str(self.holder.pid), "root", "proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command_lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return command_lines

    def lose(self) -> None:
        """Kill every process at once and remove the network, as when the power fails."""
        self.holder.kill()  # the kernel then kills the first process, and with it everything in its namespace
        self.holder.communicate()
        for process in self.started:
            process.wait()

    def _command(self, *words: object) -> list[str]:
        pid = self.holder.pid
        there = ["--net", "--mount", "--ipc", "--uts", f"--pid=/proc/{pid}/ns/pid_for_children"]
        in_folder = ["sh", "-c", 'cd "$0" && exec "$@"', str(_REPOSITORY)]
        return ["nsenter", f"--target={pid}", *there, "--", *in_folder, *map(str, words)]

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return {
            **inherited,
            **s3_environment(_STORE),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": f"{_PRIVATE}/home",
            "TMPDIR": _PRIVATE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            # Ray Train takes one report in this time; its default of two seconds is longer than an epoch in tests.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }


@dataclass
class Hosts:
    """A store, and a Ray cluster with token authentication: a head that does no work, and workers."""

    folder: Path
    everyone: contextlib.ExitStack
    store: Host
    head: Host = field(init=False)
    workers: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = self._add("head")
        spared = ["--no-monitor", "--include-dashboard=false"]  # or a small machine has more to do than to caption
        self._start_ray(self.head, "--head", f"--port={_RAY_PORT}", "--num-cpus=0", *spared)

    @property
    def address(self) -> str:
        """HOST:PORT of the cluster."""
        return f"{self.head.address}:{_RAY_PORT}"

    def add_worker(self, *, num_cpus: int) -> Host:
        """Start another host and wait until its Ray has joined the cluster."""
        host = self._add(f"worker{len(self.workers) + 1}")
        self.workers.append(host)
        self._start_ray(host, f"--address={self.address}", f"--num-cpus={num_cpus}")
        return host

    def alive(self) -> list[Host]:
        """Workers that are not lost."""
        return [host for host in self.workers if host.holder.poll() is None]

    def imcap(self, *words: object) -> str:
        """Run a command on the head, which must succeed, and return its standard output."""
        return self.head.run(sys.executable, "-m", "imcap_ray", *words)

    def start_imcap(self, *words: object) -> subprocess.Popen[bytes]:
        """Start a command on the head; its output goes to the log of the head."""
        return self.head.start(sys.executable, "-m", "imcap_ray", *words)

    def put(self, folder: Path, uri: str) -> str:
        """Copy a folder into the store and return its URI."""
        self.store.run(sys.executable, "-c", _PUT, folder, uri)
        return uri

    def rows(self, uri: str) -> list[dict[str, Any]]:
        """Return the rows of the Parquet files of a folder, by image_id."""
        rows: list[dict[str, Any]] = json.loads(self.store.run(sys.executable, "-c", _ROWS, uri))
        return sorted(rows, key=lambda row: str(row["image_id"]))

    def text(self, uri: str) -> str:
        """Return the content of a file in the store."""
        return self.store.run(sys.executable, "-c", _TEXT, uri)

    def num_parts(self, uri: str) -> int:
        """Number of Parquet files written to a folder, from the log of the store."""
        return len(re.findall(f'"PUT /{re.escape(uri.removeprefix("s3://"))}/[^/]*[.]parquet ', self.store.output()))

    def num_writes(self, uri: str) -> int:
        """Number of times a small file was written, from the log of the store."""
        return self.store.output().count(f'"PUT /{uri.removeprefix("s3://")} ')

    def output(self) -> str:
        """Return the ends of all logs, for the message of a failed test."""
        return "\n".join(f"--- {host.name}\n{host.output()[-6000:]}" for host in (self.head, *self.workers))

    def _add(self, name: str) -> Host:
        number = 2 + len(self.workers) + (name != "head")
        host = _boot(self.everyone, name, f"{_NETWORK}.{number}", self.folder)
        cable = ["type", "veth", "peer", "name", "eth0", "netns", str(host.holder.pid)]
        # Only in the network of the store: its processes do not know the process ids of other hosts.
        in_network = ["nsenter", f"--target={self.store.holder.pid}", "--net", "ip", "link"]
        subprocess.run([*in_network, "add", f"port{number}", *cable], check=True)
        subprocess.run([*in_network, "set", f"port{number}", "master", "bridge", "up"], check=True)
        _set_address(host, "eth0")
        return host

    def _start_ray(self, host: Host, *options: str) -> None:
        words = ["--block", "--disable-usage-stats", f"--node-ip-address={host.address}"]
        words += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"]
        assert any(_stays(host.start("ray", "start", *options, *words), host) for _ in range(_START_TRIES)), (
            host.output()
        )


@contextlib.contextmanager
def running_hosts(folder: Path) -> Iterator[Hosts]:
    """Run a store with one empty bucket, and a cluster without workers, until the block ends.

    Skips the test if the machine does not allow namespaces.
    """
    if shutil.which("ip") is None:
        pytest.skip("NOT TESTED: several hosts, for there is no program `ip`: apt-get install iproute2")
    probe = ["unshare", *_ISOLATED, "ip", "link", "add", "bridge", "type", "bridge"]
    probed = subprocess.run(probe, capture_output=True, text=True, check=False)
    if probed.returncode:
        why = probed.stderr.strip()
        pytest.skip(f"NOT TESTED: several hosts, for this machine gives no namespaces (are you root?): {why}")
    with contextlib.ExitStack() as everyone:
        store = _boot(everyone, "store", f"{_NETWORK}.1", folder)
        store.run("ip", "link", "add", "bridge", "type", "bridge")
        _set_address(store, "bridge")
        store.start(sys.executable, "-m", "moto.server", "-H", store.address, "-p", "5000")
        wait_until(lambda: "Running on" in store.output(), store.output)
        store.run(sys.executable, "-S", "-c", _MAKE_BUCKET, _STORE, BUCKET)
        yield Hosts(folder, everyone, store)


def wait_until(condition: Callable[[], object], explain: Callable[[], str], *, seconds: float = 900) -> None:
    """Check several times a second until it is true; fails with an explanation."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.3)


def _stays(ray: subprocess.Popen[bytes], host: Host) -> bool:
    wait_until(lambda: _STARTED in host.output() or ray.poll() is not None, host.output)
    return ray.poll() is None


def _boot(everyone: contextlib.ExitStack, name: str, address: str, folder: Path) -> Host:
    with contextlib.suppress(FileExistsError):
        Path(_PRIVATE).mkdir()
        Path(_PRIVATE).chmod(0o1777)  # as Ray creates it, so that other users can start a Ray later
    holder = subprocess.Popen(
        ["unshare", *_ISOLATED, "sh", "-c", _INIT, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    host = Host(name, address, holder, folder / f"{name}.log")
    assert holder.stdout
    line = holder.stdout.readline().decode()
    everyone.callback(host.lose)
    assert line == "ready\n", f"{name} does not come up: {line}"
    return host


def _set_address(host: Host, device: str) -> None:
    host.run("ip", "address", "add", f"{host.address}/24", "dev", device)
    host.run("ip", "link", "set", device, "up")
    # Ray determines the address of a host by its default route, which leads nowhere here.
    host.run("ip", "route", "add", "default", "dev", device)
