"""Which parts of Ray's messages users see. No Ray is started."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError

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


SINCE_RAY_2_56 = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: 5b501543) was 30.83GB used / 31.54GB limit (0.977)
OOM kill reason: Memory usage 33103011840B exceeded threshold of 32175276064B (95% of 33865276063B limit)
Object store memory usage: [- objects spillable: 0
(global lru) used: 0%]
Ray killed 1 worker(s) based on the killing policy
To see more information about memory usage on this node, use `ray logs raylet.out -ip 192.0.2.2`
Top 10 memory users: PID	MEM(GB)	COMMAND
11767	0.73	python train.py --password of-another-user
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/debug-memory.html."""

RAY_2_55 = """Task was killed due to the node running low on memory.
Memory on the node (IP: 192.0.2.2, ID: 5b501543) where the task (task ID: ffff, name=f, pid=3) was running was 30.83GB \
/ 31.54GB (0.977), which exceeds the memory usage threshold of 0.95. Ray killed this worker (ID: a8ecaf) because it is \
the newest task.
Top 10 memory users: PID	MEM(GB)	COMMAND
11767	0.73	python train.py --password of-another-user"""

ACTOR = f"""The actor died unexpectedly before finishing this task.
  Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: {SINCE_RAY_2_56}"""


@pytest.mark.parametrize("text", [SINCE_RAY_2_56, RAY_2_55, ACTOR])
def test_a_full_node_is_one_sentence_without_the_command_lines_of_others(text: str) -> None:
    sentence = (
        "the node 192.0.2.2 ran out of memory (30.83 of 31.54 GB used), and Ray ended processes there: "
        "run fewer at a time, or give it more memory"
    )

    assert describe_error(OutOfMemoryError(text)) == sentence
    assert describe_error(RuntimeError(f"Traceback:\n  File\nRayTaskError: {text}")) == sentence
    assert without_ray_advice(text) == sentence


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


def test_our_own_message_tells_more_than_its_cause() -> None:
    text = (
        "ray::MapWorker(CaptionImages)\n"
        '  File "plugin.py", line 1, in load\n    import needed\n'
        "ModuleNotFoundError: No module named 'needed'\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "plugin.py", line 2, in load\n    raise ModelError\n'
        "imcap_ray.errors.ModelError: mine:Captioner cannot be imported: No module named 'needed'\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        'Traceback (most recent call last):\n  File "ray.py", line 3, in run\n    raise UserCodeException()\n'
        "ray.exceptions.UserCodeException"
    )

    assert describe_error(RuntimeError(text)) == "mine:Captioner cannot be imported: No module named 'needed'"
