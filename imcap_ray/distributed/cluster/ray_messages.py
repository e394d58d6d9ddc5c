"""What Ray prints and raises -> what a user of the command line should read."""

from __future__ import annotations

import logging
import os
import re
from typing import Final

import ray.data

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

_ADVICE: Final = re.compile(
    r"\bDataContext\b|\bds\.context\b|docs\.ray\.io|https://github\.com/ray-project|\bRAY_\w+=|"
    r"(set|setting) (the environment variable )?`?RAY_|s3fs|`ray (logs|stack|memory|start)|_system_config"
)

_ACTOR_WITHOUT_OWNER: Final = "all references to the actor were removed"
"""Also Ray's reason if a process with a token starts an actor on a cluster without: the cluster cannot ask after it."""


_OUT_OF_MEMORY: Final = re.compile(r"running low on memory|NODE_OUT_OF_MEMORY|Top \d+ memory users")
"""Parts of the pages, with the command lines of the node's processes, that Ray writes when a node's memory is full."""

_OWN_ERROR: Final = re.compile(r"^imcap_ray\.errors\.\w+: ", re.MULTILINE)

_NODE_MEMORY: Final = re.compile(r"Memory on the node \(IP: ([^,)]+).*? was ([\d.]+) ?\w+(?: used)? / ([\d.]+) ?(\w+)")


def without_ray_advice(text: str) -> str:
    """The text in one line, without the sentences in which Ray advises programmers what to set or to read.

    One sentence replaces all that Ray writes about a node whose memory is full.
    """
    line = " ".join(text.split())
    if _OUT_OF_MEMORY.search(line):
        match = _NODE_MEMORY.search(line)
        node = "a node ran out of memory"
        if match:
            node = f"the node {match[1]} ran out of memory ({match[2]} of {match[3]} {match[4]} used)"
        return f"{node}, and Ray ended processes there: run fewer at a time, or give it more memory"
    return " ".join(sentence for sentence in _SENTENCE_END.split(line) if not _ADVICE.search(sentence)) or line


def in_one_line(error: BaseException) -> str:
    """The error's message in one line, without Ray's advice for programmers."""
    return without_ray_advice(str(error))


def silence_ray_logs(*, verbose: bool) -> None:
    """Turn off Ray's progress bars and, unless `verbose`, its log lines."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # imcap prints a progress line of its own
    if not verbose:
        # Errors come back as exceptions, and are reported in one line of ours.
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def describe_error(error: BaseException) -> str:
    """The cause of an error of Ray in one line, from the tracebacks of its processes."""
    # A chain of exceptions from other processes arrives as text, the first cause on top, of which our own messages tell
    # more; the last indented line of a traceback is code, what follows is the exception.
    if _OUT_OF_MEMORY.search(str(error)):
        return without_ray_advice(str(error))
    causes = str(error).split("The above exception was the direct cause")
    cause = next((cause for cause in causes if _OWN_ERROR.search(cause)), causes[0])
    lines = cause.strip().splitlines()
    last_code = max((number for number, line in enumerate(lines) if line.startswith("  ")), default=-1)
    text = without_ray_advice("\n".join(lines[last_code + 1 :])) or type(error).__name__
    if _ACTOR_WITHOUT_OWNER in text and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        text += " If the cluster uses no token, set RAY_AUTH_MODE=disabled."
    return _OWN_ERROR.sub("", text)  # our own messages need no class name
