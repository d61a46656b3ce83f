"""The tutorial as a new user runs it: `python benchmarks/tutorial.py --write`

Runs the `hysafe` commands and the Python blocks of docs/tutorial.md in order, in an empty folder (or `--folder`), prints what
they say, and with `--write` puts the tables into the page: into each `text` block that follows a command, and into what
stands below a command in its own block. A command that fails ends the run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
RUN = ("hysafe ", "cmp ")
COLUMNS = "100"
SKIP = ("path/to/",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where it is run (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="put what they say into the page")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = a.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        page = PAGE.read_text("utf-8")
        new = followed(page, folder)
    if a.write:
        PAGE.write_text(new, "utf-8")
    elif timeless(new) != timeless(page):
        sys.exit("The page shows something else: --write changes it. What it says around the tables is for a person.")


def timeless(page: str) -> str:
    return re.sub(r"\d+\.\d s,", "", page)


def followed(page: str, folder: Path) -> str:
    """The page with what its commands say in `folder` now."""
    parts: list[str] = []
    end, said, python = 0, "", ""
    for block in BLOCK.finditer(page):
        parts.append(page[end : block.start()])
        kind, body = block[1], block[2]
        if kind == "console":
            body, said = console(body, folder)
        elif kind == "text" and said:
            body, said = said, ""
        elif kind == "yaml" and (file := re.findall(r"`(\S+\.yaml)`:\s*$", "".join(parts))):
            (folder / file[-1]).write_text(body, "utf-8")
        elif kind == "python":
            before, python = spoken(python, folder), python + body
            print(body + spoken(python, folder).removeprefix(before))
        if kind not in ("console", "text"):
            said = ""
        parts.append(f"```{kind}\n{body}```\n")
        end = block.end()
    return "".join([*parts, page[end:]])


def console(body: str, folder: Path) -> tuple[str, str]:
    """A block with what its commands say below them, and what the last one says where nothing stood."""
    lines, last, shown = [], "", False
    commands = [line for line in body.splitlines() if line.startswith("$ ")]
    if not all(runs(command) for command in commands):  # a block is run whole or stays
        return body, ""
    shows = len(commands) < len(body.splitlines())
    for command in commands:
        lines.append(command)
        last = shell(command[2:], folder)
        print(f"{command}\n{last}")
        if shows:
            lines.append(last.rstrip("\n"))
            shown = True
    return "\n".join(lines) + "\n", "" if shown else last


def runs(command: str) -> bool:
    return command[2:].startswith(RUN) and not any(part in command for part in SKIP)


def shell(command: str, folder: Path) -> str:
    ended = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": COLUMNS, "TERM": "dumb"},
    )
    return "".join(f"{line.rstrip()}\n" for line in ended.stdout.splitlines() if line.strip())


def spoken(code: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    main()
