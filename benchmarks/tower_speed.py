"""Pictures a second of the small image towers, trained and encoding: `python benchmarks/tower_speed.py`

Processor time of one thread on random pixels, best of several turns in turns, so ratios hold where a
clock would not. *Trained*: forward, backward and AdamW in bfloat16, with torch's convolutions and with
:func:`hysafe.encoder.unfolded.unfold_convolutions`. *Fused*: :func:`hysafe.encoder.fused.fused_trunk`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn import functional as F

import hysafe.encoder.fine_stem
from hysafe.encoder.fused import fused_trunk
from hysafe.encoder.unfolded import unfold_convolutions

TOWERS = ("resnet10t", "hysafe_resnet10t_fine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    a = parser.parse_args()
    assert hysafe.encoder.fine_stem  # timm knows the second tower by it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = torch.randn(a.batch, 3, a.side, a.side).contiguous(memory_format=torch.channels_last)
    work: dict[tuple[str, str], Callable[[], None]] = {}
    for name in TOWERS:
        plain, unfolded = tower(name), tower(name)
        unfold_convolutions(unfolded)
        work[name, "trained"] = trained(plain, pixels)
        work[name, "trained, matrix products"] = trained(unfolded, pixels)
        for dtype in (torch.float32, torch.bfloat16):
            label = f"encoding, {str(dtype).removeprefix('torch.')}"
            work[name, label] = encoded(tower(name).eval(), pixels, dtype)
        fused = fused_trunk(timm.create_model(name, num_classes=0).eval(), a.side)
        if fused is not None:
            work[name, "encoding, float32, fused"] = encoded(fused, pixels, torch.float32)
    best = dict.fromkeys(work, float("inf"))
    for _ in range(a.turns):
        for key, step in work.items():
            start = time.process_time()
            step()
            best[key] = min(best[key], time.process_time() - start)
    kinds = list(dict.fromkeys(kind for _, kind in work))
    print(f"| pictures a second | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name in TOWERS:
        print(f"| {name} | {' | '.join(f'{a.batch / best[name, k]:.0f}' for k in kinds)} |")


def tower(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=177).to(memory_format=torch.channels_last)


def trained(model: nn.Module, pixels: torch.Tensor) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    classes = torch.randint(0, 177, (len(pixels),))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels)
        F.cross_entropy(logits.float(), classes).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def encoded(model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One batch without gradients."""

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(pixels)

    return step


if __name__ == "__main__":
    main()
