"""Work of the actors and the driver of a run -> Ray's metrics, for Prometheus.

Every node's agent serves them at its metrics port, which the head's `prom_metrics_service_discovery.json` lists, with
`ray_` before their names and the process as a label. Without an agent, or without Ray, they are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

WAIT_BOUNDARIES_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class ActorMetrics:
    """Metrics of one actor that works on images; `operator` is the name of its class, as in the dashboard."""

    def __init__(self, operator: str) -> None:
        tags = {"operator": operator}
        self._images = Counter(
            "imcap_images_total",
            "Images that actors are done with, by the status of their rows.",
            ("operator", "status"),
        ).set_default_tags(tags)
        self._waits = Histogram(
            "imcap_queue_wait_seconds",
            "Time that an actor waited for its next batch; a long time means that decoding cannot keep up.",
            WAIT_BOUNDARIES_SECONDS,
            ("operator",),
        ).set_default_tags(tags)
        self._steps = Counter(
            "imcap_beam_steps_total",
            "Positions that beam searches computed, each for all images and beams of a batch.",
            ("operator",),
        ).set_default_tags(tags)
        self._num_steps = 0

    def count_images(self, counts: Mapping[str, int]) -> None:
        """Add images, by status."""
        for status, count in counts.items():
            if count:
                self._images.inc(count, {"status": status})

    def observe_wait(self, seconds: float) -> None:
        """Add a wait for a batch."""
        self._waits.observe(seconds)

    def report_beam_steps(self, num_steps: int) -> None:
        """Set the number of steps since the actor began."""
        if num_steps > self._num_steps:
            self._steps.inc(num_steps - self._num_steps)
            self._num_steps = num_steps


class RunMetrics:
    """Metrics of a whole run, from its driver."""

    def __init__(self, operator: str) -> None:
        self._rate = Gauge(
            "imcap_images_per_second",
            "Images per second in the last two minutes of a run.",
            ("operator",),
        ).set_default_tags({"operator": operator})

    def set_rate(self, images_per_second: float) -> None:
        """Set the run's speed; 0 when it has ended."""
        self._rate.set(images_per_second)
