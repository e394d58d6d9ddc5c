"""Which parts of Ray's messages users see. No Ray is started."""

from __future__ import annotations

import pytest

from imcap_ray.distributed.cluster.ray_messages import describe_error, without_ray_advice

RETRIES = """[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device
Failed to write the file part-0.parquet after 1/10 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()` \
(`retried_io_errors` for I/O; `retried_map_errors` and `max_map_retries` for any task) if you believe this to be \
transient."""


def test_advice_for_ray_developers_is_removed_and_the_cause_is_kept() -> None:
    cause = (
        "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device "
        "Failed to write the file part-0.parquet after 1/10 attempts (total backoff 0.0s)."
    )

    assert without_ray_advice(RETRIES) == cause
    assert describe_error(OSError(RETRIES)) == cause


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("It died. To ignore this exception and continue, set DataContext.max_errored_blocks.", "It died."),
        ("No token. For more information, see: https://docs.ray.io/en/latest/token-auth.html", "No token."),
        (
            "Lineage is gone. To prevent this error, set the environment variable RAY_max_lineage_bytes=1.",
            "Lineage is gone.",
        ),
        ("Configure `ray.data.DataContext`.", "Configure `ray.data.DataContext`."),  # better than nothing
        ("cannot read s3://a.b/c.jpg. Or d.jpg", "cannot read s3://a.b/c.jpg. Or d.jpg"),
    ],
)
def test_only_advice_for_ray_developers_is_removed(text: str, rest: str) -> None:
    assert without_ray_advice(text) == rest
