"""What is printed in the documents, as it can be run."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int
    """Of its first line in the document."""

    @property
    def file(self) -> str | None:
        """Which file it shows, if its first line is `# file: NAME`."""
        named = re.match(r"# file: (\S+)\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without comments and continuations."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text()
    return [
        Block(found[1], found[2], text[: found.start()].count("\n") + 2)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]


def files(document: Path) -> dict[str, str]:
    """The files that a document shows, by name."""
    return {block.file: block.text for block in blocks(document) if block.file}


def scripts(document: Path) -> list[Block]:
    """The Python of a document that is no file, in order."""
    return [block for block in blocks(document) if block.language == "python" and block.file is None]


def install(pyproject: str, folder: Path) -> None:
    """Leave what `pip install` makes of a pyproject.toml in a folder of the Python path: name, version and entry points."""
    project = tomllib.loads(pyproject)["project"]
    installed = folder / f"{project['name']}-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *(f"{key} = {value}" for key, value in names.items()))]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")


def write(document: Path, folder: Path) -> list[Path]:
    """Write the files that a document shows into a folder."""
    written = []
    for name, text in files(document).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        written.append(folder / name)
    return written


def execute(document: Path, block: Block, names: dict[str, object]) -> None:
    """Run a block of Python; a failure names the line of the document."""
    exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), names)
