"""Scan of JPEGs against decoding alone and encoding alone, in one run.

``python benchmarks/scan_speed.py --data $HYSAFE_DATA --items 2000`` prints pictures a second of each
and the ratio of the scan to the slower of the two. Decoding uses the scan's own worker processes,
encoding the scan's own batches; both are repeated around the scan and the best run counts.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from PIL import Image

# Decode processes import this file anew, so it stays as light as the command: no torch up here.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--side", type=int, default=0, help="enlarge the pictures to this side")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    a = parser.parse_args()
    import numpy as np
    import torch

    from hysafe.app.pipeline import ScanOptions, load
    from hysafe.app.scan import scan
    from hysafe.data.decoding import DecodePool
    from hysafe.data.inputs import iter_items
    from hysafe.data.sources import data_root

    model = load(a.model)
    model.place(model.view())
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "in"
        write_pictures(pictures, data_root(a.data), a.items, a.side)
        size = model.encoder.image_size
        options = ScanOptions(a.batch, a.workers)

        def decode_only() -> None:
            with DecodePool(size, workers=a.workers) as pool:
                for _ in pool.decode(iter_items([str(pictures)])):
                    pass

        pixels = torch.from_numpy(
            np.random.default_rng(0).integers(0, 255, (a.batch, 3, size, size), dtype=np.uint8)
        )

        def encode_only() -> None:
            for _ in range(0, a.items, a.batch):
                model._encode_pixels(pixels)

        def whole() -> None:
            scan([str(pictures)], Path(folder) / "out", model, options=options, report=False, fresh=True)

        best = {"decode": 0.0, "encode": 0.0, "scan": 0.0}
        for _ in range(a.repeats):
            for name, run in (("decode", decode_only), ("encode", encode_only), ("scan", whole)):
                best[name] = max(best[name], a.items / timed(run))
    slower = min(best["decode"], best["encode"])
    for name, rate in best.items():
        print(f"{name:<7}{rate:9.0f} pictures/s")
    print(f"scan / slower of the two: {best['scan'] / slower:.2f}")


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write_pictures(folder: Path, data: Path, count: int, side: int) -> None:
    from hysafe.data.sources import image_bytes, load_rows

    folder.mkdir()
    rows = load_rows(str(data / "images" / "tiny_imagenet" / "val.parquet"))
    for i, row in enumerate(islice(rows, count)):
        content = image_bytes(row["image"]) or b""
        if side:
            buffer = io.BytesIO()
            picture = Image.open(io.BytesIO(content)).convert("RGB").resize((side, side))
            picture.save(buffer, "JPEG", quality=85)
            content = buffer.getvalue()
        (folder / f"{i:05d}.jpg").write_bytes(content)


if __name__ == "__main__":
    main()
