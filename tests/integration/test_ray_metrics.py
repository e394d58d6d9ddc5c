"""Metrics of a captioning run for Prometheus and the dashboard, on a real Ray in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imcap_ray.distributed.pipeline.ray_metrics import ActorMetrics, RunMetrics
from tests.malformed_images import encode, photo

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys, threading, time, urllib.request
from pathlib import Path
import ray
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import connect
from tests.fakes import TakesSteps

cluster = connect("local", num_actors=2)
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
ended, scrapes, names = threading.Event(), [], set()

def list_processes():
    while not ended.wait(0.05):  # a decoding task is short
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if os.getsid(int(path.parent.name)) == os.getsid(0):  # of this run
                    names.add(path.read_text(errors="replace").strip("\\0"))
            except OSError:
                pass  # the process has ended

def scrape_metrics():
    while not ended.wait(0.5):
        try:
            scrapes.append(urllib.request.urlopen(url, timeout=5).read().decode())
        except OSError:
            pass

threading.Thread(target=list_processes, daemon=True).start()
threading.Thread(target=scrape_metrics, daemon=True).start()
photographs, output = sys.argv[1:]
config = CaptioningConfig(input=photographs, output=output, max_failure_rate=1.0)
resources = ResourcesConfig(num_actors=2, batch_size=8)
summary = caption_images(config, resources, cluster=cluster, load_captioner=TakesSteps)

def total(scrape):
    lines = [line for line in scrape.splitlines() if line.startswith("ray_imcap_images_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

deadline = time.monotonic() + 60
while time.monotonic() < deadline and not (scrapes and total(scrapes[-1]) >= summary.num_images):
    time.sleep(0.5)
time.sleep(3)  # for what would be counted twice
ended.set()
Path(output, "seen.json").write_text(json.dumps({"scrapes": scrapes, "names": sorted(names), "counts": summary.counts}))
"""


def samples(scrape: str) -> dict[str, dict[tuple[str, str], float]]:
    """Parse our metrics from one response of the endpoint: name -> (operator, status) -> sum over all processes."""
    found: dict[str, dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            if sample.name.startswith("ray_imcap_") and "le" not in sample.labels:
                labels = sample.labels["operator"], sample.labels.get("status", "")
                found[sample.name][labels] += sample.value
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Metrics of a run over 199 photographs, two of them identical, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("monitoring")
    photographs, output = folder / "photographs", folder / "captions"
    photographs.mkdir()
    for number in range(199):
        (photographs / f"{number:03}.jpg").write_bytes(encode(photo(40 + min(number, 197), 50), "JPEG"))
    (photographs / "none.jpg").write_bytes(b"no image")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(photographs), str(output)],
        # Processes report their metrics to their agent every ten seconds by default.
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_metrics_report_interval_ms": "1000"},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((output / "seen.json").read_text())
    return found


pytestmark = pytest.mark.timeout(620)


def test_the_metrics_endpoint_counts_the_images_by_status(seen: dict[str, Any]) -> None:
    counts = {status: count for (_, status), count in samples(seen["scrapes"][-1])["ray_imcap_images_total"].items()}

    assert seen["counts"] == {"ok": 198, "failed": 1, "duplicate": 1}
    assert counts == seen["counts"]


def test_the_metrics_endpoint_reports_waits_beam_steps_and_speed(seen: dict[str, Any]) -> None:
    last, actor = samples(seen["scrapes"][-1]), ("CaptionImages", "")
    rates = [samples(scrape)["ray_imcap_images_per_second"].get(actor, 0.0) for scrape in seen["scrapes"]]

    num_batches = last["ray_imcap_beam_steps_total"][actor] / 7
    assert num_batches == int(num_batches) >= 200 / 8
    # Each of the two actors waits between two batches; before its first it loads.
    assert num_batches - 2 <= last["ray_imcap_queue_wait_seconds_count"][actor] <= num_batches - 1
    assert 1 < max(rates) < 40, "two actors of 17 images/s each, for six seconds"


def test_the_dashboard_and_the_process_list_name_our_operators(seen: dict[str, Any]) -> None:
    operators = set(re.findall(r'ray_data_\w+{[^}]*operator="([^"]+)_\d+"', "".join(seen["scrapes"])))
    titles = {name.partition("\0")[0] for name in seen["names"]}

    assert {"MapBatches(LoadImages)", "MapBatches(CaptionImages)", "Write"} <= operators
    assert "ray::MapBatches(LoadImages)" in titles
    assert any(title.startswith("ray::MapWorker(MapBatches(CaptionImages))") for title in titles)


def test_metrics_without_ray_are_discarded() -> None:
    actor = ActorMetrics("CaptionImages")
    actor.count_images({"ok": 3, "failed": 0})
    actor.observe_wait(0.0)
    actor.report_beam_steps(7)
    actor.report_beam_steps(7)
    RunMetrics("CaptionImages").set_rate(12.5)
