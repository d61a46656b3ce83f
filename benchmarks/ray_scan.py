"""A scan on a Ray cluster of this machine beside a local one: `python benchmarks/ray_scan.py`

The same pictures, one process with the model on each side, no decode processes, no OCR. Says what the
cluster costs, whether the results are the same, and how many bytes a row of a shard takes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from scan_speed import write_pictures

from hysafe.app.output import RESULTS
from hysafe.app.pipeline import ScanOptions, load
from hysafe.app.ray_scan import ClusterOptions, ray_scan
from hysafe.app.scan import scan
from hysafe.data.sources import data_root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--side", type=int, default=0, help="enlarge the pictures to this side")
    parser.add_argument("--model", default="mini")
    a = parser.parse_args()
    model, options = load(a.model), ScanOptions(64, 0)
    model.place(model.view())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "in", data_root(a.data), a.items, a.side)
        source = [str((folder / "in").resolve())]
        clock = time.perf_counter()
        scan(source, folder / "local", model, options=options, report=False)
        local = time.perf_counter() - clock
        cluster = ClusterOptions(shards=str(folder / "shards"), actors=1)
        clock = time.perf_counter()
        found = ray_scan(source, folder / "ray", model, cluster, options=options, report=False)
        whole = time.perf_counter() - clock
        clock = time.perf_counter()
        ray_scan(source, folder / "ray", model, cluster, options=options, report=False)
        again = time.perf_counter() - clock
        one, other = lines(folder / "local"), lines(folder / "ray")
        same = sum(one[key] == other.get(key) for key in one)
        size = sum(p.stat().st_size for p in (folder / "shards").rglob("*") if p.is_file())
        print(f"{found.items:,} items, {same:,} of {len(one):,} lines as of the local scan")
        print(f"ray / local on the clock: {whole / local:.2f} ({whole - local:.0f} s more)")
        print(f"the same scan again, nothing encoded: {again / local:.2f}")
        print(f"shards: {size / max(1, found.items):,.0f} bytes a row")


def lines(folder: Path) -> dict[str, Any]:
    rows = map(json.loads, (folder / RESULTS).read_text("utf-8").splitlines())
    return {row["id"]: row for row in rows}


if __name__ == "__main__":
    main()
