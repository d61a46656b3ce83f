"""Damaged input of every kind through a whole scan: a row for each, whatever it is, and no crash.

``python benchmarks/fuzz.py --items 5000`` makes JPEG, PNG, WebP, GIF, Parquet and JSONL files, damages
each in one to four ways, scans them all at once and counts what became of them. Exit code 1 where a
picture has not exactly one row, or a table none.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hysafe.app.output import RESULTS
from hysafe.app.pipeline import SafetyModel, ScanOptions, load
from hysafe.app.scan import scan

PICTURES = ("jpg", "png", "webp", "gif")
TABLES = ("parquet", "jsonl")
MOST_DAMAGES = 4
ROWS = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "in", Path(name) / "out"
        kinds = write_files(source, a.items, a.seed)
        print("made " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
        start = time.monotonic()
        counts, faults = run(source, out, load(a.model), workers=a.workers)
        print(f"scanned in {time.monotonic() - start:.1f} s\n")
    outcomes = sorted({outcome for _, outcome in counts})
    print("| kind | " + " | ".join(outcomes) + " |")
    print("|---" * (len(outcomes) + 1) + "|")
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(str(counts[kind, o]) for o in outcomes) + " |")
    print("\n" + ("\n".join(faults) or f"{a.items} files, a row for each, no crash"))
    return 1 if faults else 0


def run(
    source: Path, out: Path, model: SafetyModel, *, workers: int = 1
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Scan a folder of damaged files.

    Returns:
        Rows by (suffix, outcome), and what should not be.
    """
    scan([str(source)], out, model, options=ScanOptions(workers=workers), report=False)
    rows: Counter[str] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    for line in (out / RESULTS).read_text("utf-8").splitlines():
        result = json.loads(line)
        name = result["id"].split("/", 1)[1].split("#")[0]
        rows[name] += 1
        error = result["error"]
        counts[name.rsplit(".", 1)[1], error["type"] if error else "judged"] += 1
        if error and result["rating"] == "safe":
            faults.append(f"{result['id']}: safe in spite of {error['type']}")
    for file in sorted(source.iterdir()):
        found = rows.pop(file.name, 0)
        if found != 1 and (found == 0 or file.suffix[1:] in PICTURES):
            faults.append(f"{file.name}: {found} rows")
    faults += [f"{name}: a row of no file" for name in rows]
    return counts, faults


def write_files(folder: Path, count: int, seed: int) -> Counter[str]:
    """Write damaged files, of all kinds in turn; the same ones for the same seed."""
    folder.mkdir()
    chance = random.Random(seed)
    whole = {kind: [make(chance) for make in makers] for kind, makers in MAKERS.items()}
    kinds = [*PICTURES, *TABLES]
    made: Counter[str] = Counter()
    for n in range(count):
        kind = kinds[n % len(kinds)]
        data = chance.choice(whole[kind])
        for _ in range(chance.randint(1, MOST_DAMAGES)):
            data = chance.choice(DAMAGES)(data, chance)
        if not data.strip():  # an empty table has no rows
            data = b"\0"
        (folder / f"{n:06d}.{kind}").write_bytes(data)
        made[kind] += 1
    return made


# ---------------------------------------------------------------- whole files


def _picture(form: str, mode: str = "RGB", frames: int = 1) -> Callable[[random.Random], bytes]:
    def make(chance: random.Random) -> bytes:
        numbers = np.random.default_rng(chance.getrandbits(32))

        def frame() -> Image.Image:
            values = numbers.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            return Image.fromarray(values).convert(mode)

        buffer = io.BytesIO()
        more = [frame() for _ in range(frames - 1)]
        extra = {"save_all": True, "append_images": more} if more else {}
        frame().save(buffer, form, **extra)
        return buffer.getvalue()

    return make


def _parquet(chance: random.Random) -> bytes:
    png = _picture("PNG")(chance)
    table = pa.table(
        {
            "text": [f"row {n} of a table" for n in range(ROWS)],
            "image": pa.array([{"bytes": png, "path": None}] * ROWS),
        }
    )
    buffer = io.BytesIO()
    codec = chance.choice(["snappy", "zstd", "none"])
    pq.write_table(table, buffer, row_group_size=ROWS // 2, compression=codec)
    return buffer.getvalue()


def _jsonl(chance: random.Random) -> bytes:
    import base64

    png = "data:image/png;base64," + base64.b64encode(_picture("PNG")(chance)).decode()
    rows = [{"text": f"row {n} äöü"} if n % 2 else {"text": "x", "image": png} for n in range(ROWS)]
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


MAKERS: dict[str, list[Callable[[random.Random], bytes]]] = {
    "jpg": [_picture("JPEG"), _picture("JPEG", "L"), _picture("JPEG", "CMYK")],
    "png": [_picture("PNG"), _picture("PNG", "RGBA"), _picture("PNG", "P"), _picture("PNG", "1")],
    "webp": [_picture("WEBP"), _picture("WEBP", "RGBA"), _picture("WEBP", frames=3)],
    "gif": [_picture("GIF", "P"), _picture("GIF", "P", frames=3)],
    "parquet": [_parquet] * 3,
    "jsonl": [_jsonl],
}

# ---------------------------------------------------------------- damage


def _flip(data: bytes, chance: random.Random) -> bytes:
    """Some bits anywhere."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 8, 64))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _header(data: bytes, chance: random.Random) -> bytes:
    """Bytes near the beginning or the end, where sizes and offsets stand."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(64, len(changed))) if changed else 0
        at = at if chance.random() < 0.5 else -1 - at
        if changed:
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))]


def _remove(data: bytes, chance: random.Random) -> bytes:
    start, size = _span(data, chance)
    return data[:start] + data[start + size :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start, size = _span(data, chance)
    return data[: start + size] * chance.choice((1, 1, 3)) + data[start:]


def _noise(data: bytes, chance: random.Random) -> bytes:
    start, size = _span(data, chance)
    return data[:start] + chance.randbytes(size) + data[start + size :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    start, _ = _span(data, chance)
    return data[:start] + chance.randbytes(chance.randint(1, 64)) + data[start:]


def _huge(data: bytes, chance: random.Random) -> bytes:
    """The greatest number in four bytes, somewhere in the header."""
    at = chance.randint(4, max(4, min(64, len(data))))
    return data[:at] + chance.choice((b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")) + data[at + 4 :]


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    *(_flip, _flip, _header, _header, _cut, _remove, _repeat, _noise, _insert, _huge)
]


def _span(data: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randint(0, len(data))
    return start, min(chance.choice((1, 4, 16, 256)), len(data) - start)


if __name__ == "__main__":
    raise SystemExit(main())
