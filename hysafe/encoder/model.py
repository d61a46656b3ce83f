"""HyperbolicEncoder: towers, one head per modality, one space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hysafe.encoder.head import DEPTH_RADII, LorentzHead, NodeHead, Normalize
from hysafe.encoder.towers import Towers
from hysafe.errors import ModelError
from hysafe.geometry import BoundedScalar, Curvature, Points

__all__ = ["PREPROCESSING_VERSION", "HyperbolicEncoder", "bank_hash", "state_hash"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Part of every model's hash: raise it when the pixels or the letters that a tower sees change.
PREPROCESSING_VERSION = 2
# What texts and nodes do not depend on.
IMAGE_SIDE = ("towers.model.visual.", "heads.image.")
# In the header of a file that holds an image side alone: the folder beside it that has the rest, and its SHA-256.
TEXT_SIDE, TEXT_DIGEST = "text_side", "text_side_sha256"
# CLIP's temperature 0.07 and the bound of 0.01, as a factor on negative distances.
LOGIT_SCALE = (1 / 0.07, 1.0, 100.0)
# Inverse temperature of cone margins (radians): start, low, high.
CONE_SCALE = (10.0, 1.0, 100.0)


class HyperbolicEncoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="hysafe",
    license="apache-2.0",
    tags=["content-safety", "hyperbolic"],
):
    """Puts images, texts and taxonomy nodes on one hyperboloid.

    Args:
        architecture: of the towers, see :mod:`hysafe.encoder.towers`.
        dim: D, dimension of the space.
        space: ``lorentz`` or ``euclidean`` (the control: same towers, heads and data, flat space).
        curvature: starting c; learned within a factor of ten unless `learn_curvature` is false.
        normalize: features before each head: layer, unit or none.
        linear_heads: false for the untrained lift (D must equal the towers' width).
        instance_radius: starting geodesic radius of items, where heads normalise to unit length.
        known_nodes: :func:`bank_hash` of each node that has a learned offset.
        load_pretrained: read the weights that the architecture names.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        dim: int = 128,
        space: str = "lorentz",
        curvature: float = 1.0,
        learn_curvature: bool = True,
        normalize: Normalize = "layer",
        linear_heads: bool = True,
        instance_radius: float | None = None,
        known_nodes: Sequence[str] = (),
        load_pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "architecture": dict(architecture),
            "dim": dim,
            "space": space,
            "curvature": curvature,
            "learn_curvature": learn_curvature,
            "normalize": normalize,
            "linear_heads": linear_heads,
            "instance_radius": instance_radius,
        }
        if known_nodes:
            self.config["known_nodes"] = list(known_nodes)
        self._known_rows = {key: row for row, key in enumerate(known_nodes)}
        self._known_hash = self._known_text_hash = ""
        self._known_scale: float | None = None
        self.towers = Towers(architecture, load_pretrained=load_pretrained)
        width = self.towers.embed_dim
        dim = width if not linear_heads else dim
        self.dim, self.space = dim, space
        self.curvature = Curvature(curvature, learnable=learn_curvature)
        self.logit_scale = BoundedScalar(*LOGIT_SCALE)
        self.cone_scale = BoundedScalar(*CONE_SCALE)
        self.heads = nn.ModuleDict(
            {
                name: LorentzHead(
                    width, dim, normalize=normalize, linear=linear_heads, scale=instance_radius
                )
                for name in ("image", "text")
            }
        )
        self.node_head = NodeHead(
            width, dim, normalize=normalize, linear=linear_heads, radii=DEPTH_RADII,
            known=len(known_nodes),
        )  # fmt: skip

    # ------------------------------------------------------------ points

    def lift(self, modality: str, features: Tensor) -> Points:
        """Features [B, E] of ``image`` or ``text`` -> points."""
        c = self.curvature()
        return Points(self.heads[modality](features, c, self.space), c, self.space)

    def encode_image(self, pixels: Tensor) -> Points:
        """Pixels [B, 3, S, S] in [0, 255] -> points."""
        return self.lift("image", self.towers.encode_image(pixels))

    def encode_tokens(self, tokens: Tensor) -> Points:
        """Token ids [B, T] -> points."""
        return self.lift("text", self.towers.encode_text(tokens))

    def place_nodes(
        self, features: Tensor, depth: Tensor, banks: Sequence[Sequence[str]] | None = None
    ) -> Points:
        """Mean phrase features [N, E] and depths [N] -> apexes of the nodes' cones.

        Args:
            banks: the nodes' phrases; those known from training get their learned offsets.
        """
        c = self.curvature()
        rows = None if banks is None else self.known_rows(banks)
        return Points(self.node_head.place(features, depth, c, self.space, rows), c, self.space)

    def known_rows(self, banks: Sequence[Sequence[str]]) -> Tensor:
        """Row of each node's learned offset [N], -1 where the phrases were not seen in training."""
        rows = [self._known_rows.get(bank_hash(b), -1) for b in banks]
        return torch.tensor(rows, device=self.device)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
        """Features [len(texts), E] of texts, encoded in buckets of like length, in input order."""
        if not texts:
            return torch.empty(0, self.towers.embed_dim)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out: Tensor | None = None
        for chunk in _chunks(order, batch_size):
            tokens = self.towers.tokenize([texts[i] for i in chunk]).to(self.device)
            features = self.towers.encode_text(tokens).float()
            if out is None:
                out = torch.empty(len(texts), features.shape[-1], device=features.device)
            out[torch.tensor(chunk, device=out.device)] = features
        assert out is not None
        return out

    @torch.inference_mode()
    def node_features(self, phrases: Sequence[Sequence[str]], *, batch_size: int = 128) -> Tensor:
        """Mean feature [N, E] of each node's phrases (name, definition, synonyms)."""
        flat = [p for bank in phrases for p in bank]
        features = self.text_features(flat, batch_size=batch_size)
        means, start = [], 0
        for bank in phrases:
            means.append(features[start : start + len(bank)].mean(0))
            start += len(bank)
        return torch.stack(means)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def c(self) -> float:
        """The curvature magnitude as a number."""
        return float(self.curvature().detach())

    @property
    def cone_scale_value(self) -> float:
        """Inverse temperature of cone margins as a number."""
        if self._known_scale is not None:
            return self._known_scale
        return float(self.cone_scale().detach())

    @property
    def image_size(self) -> int:
        return self.towers.image_size

    # ------------------------------------------------------------ identity, saving, loading

    def prepare_inference(self) -> None:
        """Evaluation mode with adapter and batch norm folded in: faster, same outputs but for the last bits, same hash."""
        self._known_hash, self._known_text_hash = self.hash(), self.text_hash()
        self._known_scale = self.cone_scale_value
        self.eval()
        if self.config["architecture"].get("lora_rank"):
            self.towers.merge_lora()
        self.towers.fuse()

    def hash(self) -> str:
        """First 16 hex digits of the sha256 of config, own weights and preprocessing version."""
        if self._known_hash:
            return self._known_hash
        return state_hash(self.config, self._own_state())

    def text_hash(self) -> str:
        """As :meth:`hash`, of all but the image tower and its head.

        Encoders that agree on it put texts and nodes in the same places: their pictures may lie
        elsewhere.
        """
        return self._known_text_hash or text_state_hash(self.config, self._own_state())

    def image_tower_hash(self) -> str:
        """As :meth:`hash`, of the image tower alone, without its head."""
        visual = IMAGE_SIDE[0]
        return state_hash({}, {k: v for k, v in self._own_state().items() if k.startswith(visual)})

    def take_text_side(self, path: str | Path) -> None:
        """Take all but the image tower and its head from a saved encoder.

        Args:
            path: folder of an encoder with the same settings; its image tower may be another.

        Raises:
            ModelError: no encoder, or other settings than this one's.
        """
        other = self.load_directory(path)
        ours, theirs = _flat(_text_config(self.config)), _flat(_text_config(other.config))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise ModelError(
                    f"{path}: its {key} is another than this encoder's ({theirs.get(key)}, here "
                    f"{ours.get(key)}). Take the settings that it was trained with."
                )
        shapes = self.state_dict()
        self.load_state_dict(
            {
                k: v.reshape(shapes[k].shape)
                for k, v in other._own_state().items()
                if not k.startswith(IMAGE_SIDE)
            },
            strict=False,
        )

    def _own_state(self) -> dict[str, Tensor]:
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("towers.")}
        state.update({f"towers.{k}": v for k, v in self.towers.own_state().items()})
        # scalars have no byte view; keep every entry at least 1-d
        return {k: v.reshape(1) if v.ndim == 0 else v for k, v in state.items()}

    def save_directory(self, path: str | Path, *, tower_dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors.

        Args:
            path: folder, made if missing.
            tower_dtype: store the towers' convolutions and matrices in this dtype (bf16 halves
                the file); read back as float32. Norm statistics stay float32.
        """
        self._write(Path(path), self._own_state(), tower_dtype, {})

    def save_image_side(self, path: str | Path, text_side: str | Path) -> None:
        """Write config.json and only the image side of model.safetensors; the rest is read from another model.

        Args:
            path: folder, made if missing; a sibling of `text_side`.
            text_side: folder of the model that this one has its texts and nodes from
                (:meth:`take_text_side`).

        Raises:
            ModelError: the folders are no siblings or the same, their text sides differ, or `text_side` is an
                image side alone itself.
        """
        path, text_side = Path(path).resolve(), Path(text_side).resolve()
        if path == text_side:
            raise ModelError(f"{path}: that is the model itself. Give another folder beside it.")
        if (owner := _header(text_side).get(TEXT_SIDE)) is not None:
            raise ModelError(
                f"{text_side}: it has its texts and nodes from {owner!r}. Name that one."
            )
        if path.parent != text_side.parent:
            raise ModelError(
                f"{path}: no sibling of {text_side}, so it cannot be found from there."
            )
        if self.load_directory(text_side).text_hash() != self.text_hash():
            raise ModelError(f"{text_side}: its texts and nodes are not this encoder's.")
        state = {k: v for k, v in self._own_state().items() if k.startswith(IMAGE_SIDE)}
        origin = {TEXT_SIDE: text_side.name, TEXT_DIGEST: _digest(text_side / WEIGHTS)}
        self._write(path, state, torch.bfloat16, origin)

    def _write(
        self,
        path: Path,
        state: Mapping[str, Tensor],
        tower_dtype: torch.dtype | None,
        header: dict[str, str],
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        kept = {}
        for key, value in state.items():
            value = value.detach().cpu()
            if tower_dtype and key.startswith("towers.") and value.ndim >= 2:
                value = value.to(tower_dtype)
            kept[key] = value.clone(memory_format=torch.contiguous_format)
        save_file(kept, path / WEIGHTS, metadata={"format": "pt", **header})
        (path / CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_directory(cls, path: str | Path) -> HyperbolicEncoder:
        """Read a directory written by :meth:`save_directory` (or downloaded from the hub).

        Raises:
            ModelError: a file is missing or does not fit.
        """
        path = Path(path)
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise ModelError(
                    f"{path}: no {name}. A hysafe model folder holds {CONFIG}, {WEIGHTS}."
                )
        try:
            config = json.loads((path / CONFIG).read_text("utf-8"))
            model = cls(**config, load_pretrained=False)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ModelError(f"{path / CONFIG}: not a hysafe config ({error}).") from error
        state = read_weights(path)
        own = model._own_state()
        missing, extra = set(own) - set(state), set(state) - set(own)
        if missing or extra:
            raise ModelError(
                f"{path}: weights do not fit the config; missing {sorted(missing)[:3]}, unexpected "
                f"{sorted(extra)[:3]}. Was the folder copied whole?"
            )
        target = model.state_dict()
        fitted = {k: v.reshape(target[k].shape).to(target[k].dtype) for k, v in state.items()}
        model.load_state_dict(fitted, strict=False)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_directory(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HyperbolicEncoder:  # type: ignore[override]
        if Path(model_id).is_dir():
            return cls.load_directory(model_id)
        from huggingface_hub import snapshot_download

        keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        kwargs = {k: options[k] for k in keys if options.get(k) is not None}
        folder = snapshot_download(
            model_id, allow_patterns=["*.json", "*.safetensors", "*.md", "*.yaml"], **kwargs
        )
        return cls.load_directory(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model folder; one of an image side alone has the others from the folder beside it that it names.

    Raises:
        ModelError: a file is no safetensors; that folder is missing, or holds other weights than those that
            the image side was made with.
    """
    header, state = _header(folder), _load(folder)
    name = header.get(TEXT_SIDE)
    if name is None:
        return state
    other = folder.resolve().parent / name
    if name in ("", ".", "..") or Path(name).name != name or not (other / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: its texts and nodes are those of the model {name!r}, which has to lie beside it. Copy both."
        )
    if _digest(other / WEIGHTS) != header.get(TEXT_DIGEST):
        raise ModelError(
            f"{folder}: {other / WEIGHTS} is not the file that this image side was made with. Copy both anew."
        )
    return {k: v for k, v in _load(other).items() if not k.startswith(IMAGE_SIDE)} | state


def _load(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS}: not readable as safetensors ({error}).") from error


def _header(folder: Path) -> dict[str, str]:
    """What the header of a folder's weights says."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as content:
            return content.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS}: not readable as safetensors ({error}).") from error


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def state_hash(config: dict[str, Any], state: Mapping[str, Tensor]) -> str:
    """Hash of a model from its config and own weights, see :meth:`HyperbolicEncoder.hash`."""
    digest = hashlib.sha256()
    header = {"config": config, "preprocessing": PREPROCESSING_VERSION}
    digest.update(json.dumps(header, sort_keys=True).encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        # flat first: a channels-last 1x1 kernel counts as contiguous with odd strides
        flat = value.detach().cpu().reshape(-1).clone()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def text_state_hash(config: dict[str, Any], state: Mapping[str, Tensor]) -> str:
    """Hash of a model without its image side, see :meth:`HyperbolicEncoder.text_hash`."""
    kept = {k: v for k, v in state.items() if not k.startswith(IMAGE_SIDE)}
    return state_hash(_text_config(config), kept)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that texts and nodes depend on."""
    architecture = {k: v for k, v in config["architecture"].items() if k not in ("mean", "std")}
    if "model_cfg" in architecture:
        architecture["model_cfg"] = {
            k: v for k, v in architecture["model_cfg"].items() if k != "vision_cfg"
        }
    return {**config, "architecture": architecture}


def _flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings under the names that lead to them, as in ``architecture.image_size``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(
            _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
        )
    return flat


def bank_hash(phrases: Sequence[str]) -> str:
    """First 12 hex digits of the sha256 of a node's phrases."""
    return hashlib.sha256(json.dumps(list(phrases)).encode()).hexdigest()[:12]


def _chunks(items: Sequence[int], size: int) -> Iterable[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
