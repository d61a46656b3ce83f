"""From a name to an encoder: ``mini``, ``mini-photo``, a folder, a hub id, or any open_clip model lifted as it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from hysafe.encoder.model import HyperbolicEncoder
from hysafe.encoder.towers import open_clip_architecture
from hysafe.errors import ModelError

__all__ = ["BUNDLED", "lift_open_clip", "load_encoder", "resolve_folder"]

BUNDLED = ("mini", "mini-photo")
OPEN_CLIP = "open_clip:"
# Items of an untrained lift lie this far out, well outside the nodes (radius 0.63 at most).
LIFT_RADIUS = 1.5
# CLIP's cosines differ by hundredths; margins of the lift need a scale to match.
LIFT_CONE_SCALE = 60.0


def lift_open_clip(name: str, pretrained: str | None) -> HyperbolicEncoder:
    """Any open_clip model on the hyperboloid at once, without training.

    Text nodes keep the direction of their features and get the radius of their depth; items keep
    theirs and lie outside all nodes. Order along the tree follows from cosine similarity and depth;
    scores are not calibrated.

    Args:
        name: open_clip architecture, e.g. ``ViT-B-32``.
        pretrained: tag of open_clip, local weights file, or None (random weights: tests only).
    """
    encoder = HyperbolicEncoder(
        open_clip_architecture(name, pretrained),
        curvature=1.0,
        learn_curvature=False,
        normalize="unit",
        linear_heads=False,
        instance_radius=LIFT_RADIUS,
    )
    encoder.cone_scale.set(LIFT_CONE_SCALE)
    return encoder.eval()


def resolve_folder(name: str) -> Path | None:
    """Folder of a bundled or saved model; None where `name` is no folder."""
    if name in BUNDLED:
        with resources.as_file(resources.files("hysafe.assets") / name.replace("-", "_")) as folder:
            if not (folder / "model.safetensors").is_file():
                raise ModelError(f"the bundled model {name!r} is missing from this installation.")
            return folder
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def load_encoder(name: str, *, revision: str | None = None) -> HyperbolicEncoder:
    """Encoder by name.

    Args:
        name: ``mini``, ``mini-photo``; a hysafe folder; ``open_clip:ARCH/TAG`` or ``open_clip:ARCH/FILE`` (lifted
            without training); or a hub id ``owner/name``, which is downloaded.
        revision: of a hub id.

    Raises:
        ModelError: nothing of that name.
    """
    if name.startswith(OPEN_CLIP):
        architecture, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
        return lift_open_clip(architecture, tag or None)
    folder = resolve_folder(name)
    if folder is not None:
        return HyperbolicEncoder.load_directory(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no model {name!r}. Give mini, mini-photo, a folder with config.json and model.safetensors, "
            "open_clip:ViT-B-32/TAG, or a hub id owner/name."
        )
    return HyperbolicEncoder.from_pretrained(name, revision=revision)
