"""Every documented command line: in the README, in --help, in docstrings, in YAML and in the model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imcap_ray.cli.main import main

ROOT = Path(__file__).parent.parent
FILES = (
    ROOT / "README.md",
    ROOT / "jobs" / "CAPTIONERS.md",
    ROOT / "jobs" / "OWN_IMAGES.md",
    ROOT / "jobs" / "RESULTS.md",
    *sorted((ROOT / "jobs").glob("*.py")),
    *sorted((ROOT / "jobs" / "benchmarks").glob("*.py")),
    *sorted((ROOT / "jobs").glob("*.yaml")),
    ROOT / "cluster.yaml",
    *sorted((ROOT / "imcap_ray" / "pretrained").glob("*/README.md")),
)

# At the start of a line, possibly after a comment sign, a variable or the folder of a virtual environment.
_LINE = re.compile(
    r"^[#\s]*((?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?"
    r"(?:(?:imcap|ray job submit|python jobs/\w+\.py) \S.*|python jobs/benchmarks/\w+\.py.*))$"
)
# In running text, with arguments: just `imcap train` is a name.
_INLINE = re.compile(r"`(imcap [a-z]+ [^`]+|python jobs/\w+\.py [^`]+|python jobs/benchmarks/\w+\.py[^`]*)`")


@dataclass(frozen=True)
class Shown:
    """A command line and where the documentation shows it."""

    where: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words without variables, from `imcap` on: jobs/train.py is `imcap train` as a program."""
        words = shlex.split(self.line)
        if words[:3] == ["ray", "job", "submit"]:
            words = words[words.index("--") + 1 :]
        while "=" in words[0]:
            words = words[1:]
        if words[0] == "python" and not words[1].startswith("jobs/benchmarks/"):
            return ["imcap", Path(words[1]).stem, *words[2:]]
        return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def example_captioner() -> str:
    """Return the module `brightness.py` of the documentation."""
    return (ROOT / "jobs" / "CAPTIONERS.md").read_text().partition("```python\n")[2].partition("```")[0]


def shown_commands() -> list[Shown]:
    """Each line once, in the order of the files and then of --help."""
    commands = [shown for path in FILES for shown in _in_file(path)]
    commands += [
        Shown(f"imcap {name} --help", _without_remark(line.strip()))
        for name, command in [("", main), *main.commands.items()]
        for line in (command.help or "").splitlines()
        if line.strip().startswith("imcap ") and not line.rstrip().endswith(".")
    ]
    return list({shown.line: shown for shown in reversed(commands)}.values())[::-1]


def _in_file(path: Path) -> Iterator[Shown]:
    is_code = path.suffix != ".md"
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        where = f"{path.relative_to(ROOT)}:{number}"
        is_code = not is_code if path.suffix == ".md" and line.startswith("```") else is_code
        is_shown = is_code or line.startswith("    ")  # the card's way to show a command
        if is_shown and (match := _LINE.match(line)) and "`" not in line:
            yield Shown(where, _without_remark(match[1]))
        elif path.suffix == ".md" and not is_shown:
            yield from (Shown(where, match[1]) for match in _INLINE.finditer(line))


def _without_remark(line: str) -> str:
    """Return the command without a comment after a # or two spaces."""
    return re.split(r"\s+#|\s{2,}", line)[0]
