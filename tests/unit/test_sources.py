"""Calls that the sources of the package must not contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "imcap_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])

# Modules that run code from a file.
LOADERS = {"pickle", "cPickle", "cloudpickle", "ray.cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
LOADERS |= {"pandas", "torch.package", "nltk.data", "nltk.downloader"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
CODE = {"eval", "exec", "compile", "__import__"}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression; `?.c` if something other than names precedes the `.c`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def value(call: ast.Call, name: str) -> object:
    """Return the constant value of a keyword in a call; None if there is none."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
    return None


def dangers(source: str) -> Iterator[str]:
    """Yield lines of a program that load pickles, run code from data, or use a shell."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]:
                if name in LOADERS or name.split(".")[0] in LOADERS:
                    yield f"{node.lineno}: {name}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        first, dot, rest = called.partition(".")
        called = aliases.get(first, first) + dot + rest
        is_danger = (
            (called == "torch.load" and value(node, "weights_only") is not True)
            or (called.endswith("load_state_dict_from_url") and value(node, "weights_only") is not True)
            or called in ("torch.hub.load", "torch.jit.load")
            or (called in ("numpy.load", "np.load") and value(node, "allow_pickle") not in (None, False))
            or (called.startswith("yaml.") and "load" in called and not called.startswith("yaml.safe_load"))
            or (called.startswith("nltk.") and called.endswith((".load", ".download", ".find")))
            or called in CODE | SHELLS
            or value(node, "shell") not in (None, False)
        )
        if is_danger:
            yield f"{node.lineno}: {called}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_loads_a_pickle_runs_data_or_calls_a_shell(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import ray.cloudpickle as cp",
        "from ray import cloudpickle",
        "import joblib, shelve",
        "import torch; torch.load(p)",
        "from torch import load as restore; restore(p)",
        "import torch; torch.load(p, weights_only=False)",
        "import torch; torch.load(p, weights_only=flag)",
        "import torch; torch.hub.load('a/b', 'c')",
        "import numpy as np; np.load(p, allow_pickle=True)",
        "import yaml; yaml.load(p)",
        "import yaml; yaml.unsafe_load(p)",
        "import nltk; nltk.data.load(p)",
        "from nltk import download; download('punkt')",
        "eval(text)",
        "import os; os.system(text)",
        "import subprocess; subprocess.run(text, shell=True)",
    ],
)
def test_forbidden_calls_are_found(line: str) -> None:
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(p, weights_only=True)",
        "import numpy as np; np.load(p)",
        "from safetensors.torch import load; load(p)",
        "import json; json.load(p)",
        "import yaml; yaml.safe_load(p)",
        "model.eval(); model.to(device).eval()",
        "import re; re.compile(p)",
        "import subprocess; subprocess.run(['grep', p])",
    ],
)
def test_harmless_calls_are_allowed(line: str) -> None:
    assert list(dangers(line)) == []
