"""SafetyModel: from pictures and texts to results, one batched call per stage."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hysafe.app.known import Known, groups
from hysafe.data.decoding import DECODE_MEMORY, DECODE_SECONDS, DecodePool
from hysafe.data.images import content_hash, decode, to_pixels
from hysafe.data.inputs import iter_items
from hysafe.encoder.head import example_direction
from hysafe.encoder.model import HyperbolicEncoder, bank_hash
from hysafe.encoder.pretrained import BUNDLED, load_encoder, resolve_folder
from hysafe.encoder.towerless import TowerlessEncoder
from hysafe.errors import ConfigError, HysafeError, InputError
from hysafe.geometry import Points
from hysafe.index import Collection, EncodedItem, Row
from hysafe.score.calibration import Calibration, conformal_p_values
from hysafe.score.examples import example_tangent
from hysafe.score.leaves import LeafScores, NodeTable, score_margins
from hysafe.score.reference import load_reference, narrowing
from hysafe.score.triage import TriagePolicy, weighted_risk
from hysafe.taxonomy import Policy, PolicyView, Taxonomy, load_taxonomy
from hysafe.taxonomy.policy import Example
from hysafe.types import ErrorRecord, Hashes, Item, NodeScore, NoveltyScores, Rating, Result

__all__ = [
    *("Channel", "Judgement", "SafetyModel", "ScanOptions", "Scored"),
    *("ahead", "check_examples", "load", "rounded", "text_pictures"),
]

log = logging.getLogger(__name__)

# A node is listed for an item from this score on.
LIST_FROM = 0.1
# Longer texts are read through this many windows; what lies beyond cannot be safe.
MAX_WINDOWS = 32
# Tokens of a window left for the two special tokens and for words that split unevenly.
WINDOW_SLACK = 8
DIGITS = 4
# Above the rounding of a product with 10**DIGITS, as long as that is below 1e9.
NEAR_HALF = 1e-6
RANK: dict[Rating, int] = {"safe": 0, "review": 1, "unsafe": 2}
# A picture whose tower says "picture of text" must have been read to be safe.
TEXT_PICTURE_NODE = "S.b11"
TEXT_PICTURE_SHARE = 0.5
# Ratings with their reasons that no score alone leads to.
NOT_READ_WHOLE: tuple[Rating, str] = (
    "review",
    "not read whole: too long, or in letters or a language that the model does not know",
)
TEXT_READ: tuple[Rating, str] = ("safe", "a picture of text, judged by what it says")
TEXT_UNREAD: tuple[Rating, str] = ("review", "a picture of text that was not read (OCR is off)")
NOT_JUDGED = ErrorRecord("InputError", "nothing to judge: no picture, no text")
# Side to which an example picture is shrunk where it is only checked.
CHECKED_SIZE = 64
# Vectors scored at once: what belongs to them stays in a near cache.
SCORE_ROWS = 512
# A batch takes so many times as many texts as pictures: more of them are of like length. It also
# ends at this many bytes of pictures.
TEXTS_PER_PICTURE, BATCH_BYTES = 4, 64 << 20
# Tokens that the text tower sees at once, padding included: on a processor as many as stay in its
# near cache, on other devices as many as keep them busy.
TEXT_TOKENS, TEXT_TOKENS_DEVICE = 512, 16384


@dataclass(frozen=True)
class ScanOptions:
    """How a scan runs; none of it changes a result, but that of a picture beyond the limits,
    and with a `bf16` model last digits.

    Args:
        batch: pictures a batch; of texts it takes four times as many.
        workers: decode processes; 0 decodes in this one, without limits.
        commit: items that a scan which was killed does again at most, or one batch and those that
            were being encoded: the rest is on the disk.
        decode_seconds, decode_memory: limits of a decode process, see
            :func:`hysafe.data.decoding.decode_items`.
        encoders: batches encoded at once on a processor, at most as many as torch takes threads;
            0 encodes in the calling thread, each batch when it is asked for.
    """

    batch: int = 64
    workers: int = 1
    commit: int = 512
    decode_seconds: float = DECODE_SECONDS
    decode_memory: int = DECODE_MEMORY
    encoders: int = 2


@dataclass(frozen=True)
class Judgement:
    """A result with what the collection stores beside it.

    Args:
        row: the encoded item, its result and what else the collection holds.
        image: the encoded picture, where the item was judged from it and not from stored points.
    """

    row: Row
    image: bytes | None = None

    @property
    def result(self) -> Result:
        return self.row.result

    @property
    def vector(self) -> np.ndarray | None:
        """Tangent vector [D] of the item, or None."""
        return self.row.vector

    @property
    def text_vector(self) -> np.ndarray | None:
        """Tangent vector [D] of the text of an item with a picture, or None."""
        return self.row.text_vector

    @property
    def scores(self) -> np.ndarray | None:
        """Category scores, or None."""
        return self.row.scores

    @property
    def text(self) -> str:
        """The text that was judged (given or read), "" for none."""
        return self.row.item.text or self.row.item.read_text


@dataclass(frozen=True)
class Scored:
    """What the model says of n vectors of one channel.

    Attributes:
        margins, nodes: [n, N]. p_unsafe, risk, over, radius: [n]. top: best active category of
            each, as an index of nodes; -1 where the policy leaves none.
        policy, distribution: p-values [n] of novelty, rounded; None without a calibration.
    """

    margins: np.ndarray
    nodes: np.ndarray
    p_unsafe: np.ndarray
    risk: np.ndarray
    over: np.ndarray
    radius: np.ndarray
    top: np.ndarray
    policy: np.ndarray | None
    distribution: np.ndarray | None


@dataclass
class Channel:
    """One channel of a batch: what it says of each of its n items.

    Attributes:
        at: place in the batch -> row of the arrays. vectors: tangent vectors [n, D], float32.
        margins, nodes: [n, N]. p_unsafe, risk, over, radius: [n]. top: best category of each.
    """

    at: dict[int, int]
    vectors: np.ndarray
    margins: np.ndarray
    nodes: np.ndarray
    p_unsafe: list[float]
    risk: list[float]
    over: list[bool]
    novelty: list[NoveltyScores]
    radius: list[float]
    top: list[str | None]

    def pick(self, at: dict[int, int]) -> Channel:
        """The rows that `at` points to, renumbered."""
        rows = list(at.values())

        def of(values: list[Any]) -> list[Any]:
            return [values[k] for k in rows]

        return Channel(
            {i: k for k, i in enumerate(at)}, self.vectors[rows], self.margins[rows],
            self.nodes[rows], of(self.p_unsafe), of(self.risk), of(self.over), of(self.novelty),
            of(self.radius), of(self.top),
        )  # fmt: skip


class SafetyModel:
    """Encoder, taxonomy and calibration together: what ``hysafe.load`` returns.

    Args:
        encoder: in evaluation mode.
        taxonomy: the tree; the bundled one by default.
        calibration: of this encoder; the neutral one where none was fitted.
        name: as the user gave it.
        triage: thresholds of the rating.
        cache: folder for encoded taxonomies, keyed by model and taxonomy hash; None keeps them in
            memory only.
        bf16: what is judged goes through the towers in bfloat16; nodes, examples and queries do not.
        reference: tangent vectors [n, D] of ordinary items by channel (``text``, ``image``), by which
            the cones of nodes that a policy adds are narrowed.
    """

    def __init__(
        self,
        encoder: HyperbolicEncoder | TowerlessEncoder,
        taxonomy: Taxonomy | None = None,
        calibration: Calibration | None = None,
        *,
        name: str = "model",
        triage: TriagePolicy | None = None,
        cache: Path | None = None,
        bf16: bool = False,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.encoder = encoder.eval()
        self.taxonomy = taxonomy or load_taxonomy()
        self.calibration = calibration or Calibration()
        self.name, self.triage = name, triage or TriagePolicy()
        self.reference = dict(reference or {})
        self.hash = self._hash()
        self._cache, self.bf16 = cache, bf16
        self._tokenizer = Lock()  # it keeps its settings between calls
        self._features: dict[tuple[str, ...], Tensor] = {}
        self._examples: dict[str, Tensor] = {}
        self._views: dict[str, _Placed] = {}
        self._stored = self._load_stored()

    # ------------------------------------------------------------ points

    def encode_text(self, texts: Sequence[str]) -> Points:
        """Points [len(texts), D] of texts (the first window of long ones)."""
        with torch.inference_mode():
            return _frozen(self.encoder.lift("text", self.encoder.text_features(texts)))

    def encode_image(self, images: Sequence[Any]) -> Points:
        """Points [len(images), D] of PIL pictures."""
        size = self.encoder.image_size
        if not images:
            return Points(torch.empty(0, self.encoder.dim), self.encoder.c,
                          self.encoder.space)  # fmt: skip
        stack = np.stack([to_pixels(image, size) for image in images])
        return self._encode_pixels(torch.from_numpy(stack))

    def _encode_pixels(self, pixels: Tensor, *, bf16: bool = False) -> Points:
        device = self.encoder.device
        with torch.inference_mode():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = self.encoder.towers.encode_image(pixels.to(device))
            return _frozen(self.encoder.lift("image", features))

    # ------------------------------------------------------------ the taxonomy on the space

    def view(self, policy: Policy | None = None) -> PolicyView:
        """The taxonomy under a policy."""
        return (policy or Policy()).apply(self.taxonomy)

    def place(self, view: PolicyView) -> tuple[NodeTable, Points]:
        """Node table and cone apexes [N, D] of a view as its words place them; only unknown phrases and
        examples are encoded.

        Raises:
            ConfigError: an example picture of the policy cannot be read.
        """
        placed = self._placed(view)
        return placed.table, placed.apexes

    def _placed(self, view: PolicyView) -> _Placed:
        key = f"{view.taxonomy.hash}/{view.policy.hash}"
        if key not in self._views:
            pictures = self._example_points(view.policy)  # before any text is encoded
            table, apexes = NodeTable(view), self._apexes(view.taxonomy)
            shown = self._shown(table, apexes, pictures) if pictures else apexes
            texts = self._example_text_points(view.policy)
            said = self._said(view, apexes, texts) if texts else apexes
            narrowed = self._narrowed(table, {"text": said, "image": shown})
            self._views[key] = _Placed(table, apexes, said, shown, narrowed)
        return self._views[key]

    def _narrowed(self, table: NodeTable, cones: Mapping[str, Points]) -> dict[str, Tensor]:
        """By how much the cones [N] of a channel are narrowed: those of leaves that the policy adds."""
        new = self._new_leaves(table)
        if not new.any():
            return {}
        if not self.reference:
            log.warning(
                "%s has no reference.safetensors: scores of the nodes that the policy adds are not "
                "calibrated. Write it with: hysafe eval card --model FOLDER --fit", self.name,
            )  # fmt: skip
        found = {}
        for name, tangents in self.reference.items():
            apexes = cones[name]
            margins = Points.from_tangent(tangents, apexes.c, apexes.geometry).margin(apexes)
            found[name] = narrowing(
                margins, table, new, self.calibration.channel(name),
                scale=self.encoder.cone_scale_value,
            )  # fmt: skip
        return found

    def triage_of(self, view: PolicyView) -> TriagePolicy:
        """Thresholds of the rating under a view: the model's, but for the policy's review band."""
        band = view.policy.review
        return replace(
            self.triage,
            review_from=self.triage.review_from if band.risk is None else band.risk,
            novelty_level=self.triage.novelty_level if band.novelty is None else band.novelty,
        )

    def _shown(self, table: NodeTable, apexes: Points, examples: Mapping[str, Tensor]) -> Points:
        """Apexes with those of nodes that have example pictures drawn towards them."""
        own, placed = self.place(self.view())
        common = torch.nn.functional.normalize(placed.tangent()[own.leaves], dim=-1).mean(0)
        tangents, turned = apexes.tangent(), {}
        for node, points in examples.items():
            row = table.index[node]
            turned[row] = example_direction(tangents[row], points, common) * tangents[row].norm()
        return _turned(apexes, turned)

    def _said(self, view: PolicyView, apexes: Points, examples: Mapping[str, Tensor]) -> Points:
        """Apexes with those of nodes pointing to their example texts that find these better so."""
        table = NodeTable(view.all_active())
        ordinary = self.reference.get("text", torch.empty(0, self.encoder.dim))
        new = self._new_leaves(table)
        turned = {}
        for node, points in examples.items():
            row = table.index[node]
            tangent = example_tangent(
                row, points, ordinary, apexes, table, new, self.calibration.channel("text"),
                scale=self.encoder.cone_scale_value,
            )  # fmt: skip
            if tangent is not None:
                turned[row] = tangent
            else:
                log.warning(
                    "node %s: its words find its example texts better than these find one another, so texts "
                    "are judged by the words.", node,
                )  # fmt: skip
        return _turned(apexes, turned)

    def _new_leaves(self, table: NodeTable) -> Tensor:
        """bool [L]: which leaves of a table the policy has added."""
        return torch.tensor([n not in self.taxonomy for n in table.leaf_ids])

    def _example_points(self, policy: Policy) -> dict[str, Tensor]:
        """Tangent vectors [n, D] of each node's example pictures; only unknown ones are encoded.

        Raises:
            ConfigError: a picture cannot be read or decoded, or is not the one it was.
        """
        pixels: dict[str, np.ndarray] = {}
        for node, rule in policy.rules.items():
            for example in rule.examples:
                known = example.sha256 in self._examples or example.sha256 in pixels
                if not known and not self._load_example(example.sha256):
                    picture = _read_example(policy, node, example, self.encoder.image_size)
                    pixels[example.sha256] = picture
        for key, picture in pixels.items():  # one by one: the others of a batch play no part
            self._examples[key] = self._encode_pixels(torch.from_numpy(picture[None])).tangent()[0]
            path = self._example_path(key)
            if path is not None:
                self._write(path, self._examples[key])
        return {
            node: torch.stack([self._examples[key] for key in rule.example_hashes()])
            for node, rule in policy.rules.items()
            if rule.examples
        }

    def _example_text_points(self, policy: Policy) -> dict[str, Tensor]:
        """Tangent vectors [n, D] of each node's example texts; only unknown ones are encoded."""
        keys = {
            node: {
                hashlib.sha256(b"text\0" + t.encode()).hexdigest(): t for t in rule.example_texts
            }
            for node, rule in policy.rules.items()
            if rule.example_texts
        }
        unknown = {
            key: text
            for texts in keys.values()
            for key, text in texts.items()
            if key not in self._examples and not self._load_example(key)
        }
        for key, text in unknown.items():  # one by one, as pictures are
            self._examples[key] = self.encode_text([text]).tangent()[0]
            path = self._example_path(key)
            if path is not None:
                self._write(path, self._examples[key])
        self.warn_of_unread(list(unknown.values()))
        return {
            node: torch.stack([self._examples[key] for key in sorted(texts)])
            for node, texts in keys.items()
        }

    def _example_path(self, key: str) -> Path | None:
        """Where the tangent vector of an example is kept; the picture or text is not."""
        if self._cache is None:
            return None
        return self._cache / f"examples-{self.encoder.hash()}" / f"{key}.safetensors"

    def _load_example(self, key: str) -> bool:
        path = self._example_path(key)
        if path is None or not path.is_file():
            return False
        self._examples[key] = load_file(path)["features"]
        return True

    def _apexes(self, taxonomy: Taxonomy) -> Points:
        banks = [n.phrases for n in taxonomy]
        own = taxonomy.hash == self.taxonomy.hash
        if not own:
            self._load_phrases([b for b in banks if b not in self._features])
        missing = [b for b in banks if b not in self._features]
        if missing:
            features = self.encoder.node_features(missing)
            self._features.update(zip(missing, features.clone(), strict=True))
            if not own:
                self._store_phrases(missing)
            bundled = {n.phrases for n in load_taxonomy()}
            self.warn_of_unread([p for bank in missing if bank not in bundled for p in bank])
        if own and not self._stored:  # also where a policy had them encoded before
            self._stored = True
            self._store(banks)
        stack = torch.stack([self._features[b] for b in banks])
        depth = torch.tensor([taxonomy.depth(n.id) for n in taxonomy])
        with torch.inference_mode():
            return _frozen(self.encoder.place_nodes(stack, depth.to(stack.device), banks))

    def warn_of_unread(self, texts: Sequence[str]) -> None:
        """Say which texts of the user's are in letters or a language that the model does not know."""
        if not texts:
            return
        with self._tokenizer:
            known = self.encoder.towers.reads(texts)
        for text, read in zip(texts, known, strict=True):
            if not read:
                log.warning(
                    "%r is in letters or a language that %s does not know; what it finds has little "
                    "to do with it. Write it in English.", text, self.name,
                )  # fmt: skip

    def _store_path(self) -> Path | None:
        if self._cache is None:
            return None
        return self._cache / f"nodes-{self.encoder.hash()}-{self.taxonomy.hash}.safetensors"

    def _load_stored(self) -> bool:
        path = self._store_path()
        bundled = resolve_folder(self.name) if self.name in BUNDLED else None
        for candidate in (bundled / path.name if bundled and path else None, path):
            if candidate is None or not candidate.is_file():
                continue
            stack = load_file(candidate)["features"]
            banks = [n.phrases for n in self.taxonomy]
            if len(stack) == len(banks):
                self._features.update(zip(banks, stack.to(self.encoder.device), strict=True))
                return True
        return False

    def _store(self, banks: Sequence[tuple[str, ...]]) -> None:
        path = self._store_path()
        if path is not None:
            self._write(path, torch.stack([self._features[b] for b in banks]))

    def _write(self, path: Path, features: Tensor) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": features}, temporary)
            temporary.replace(path)
        except OSError:  # a cache that cannot be written costs time, nothing else
            self._cache = None
        return self._cache is not None

    def _phrase_path(self, bank: tuple[str, ...]) -> Path | None:
        """Where the features of a node that a policy adds or describes anew are kept."""
        if self._cache is None:
            return None
        return self._cache / f"phrases-{self.encoder.hash()}" / f"{bank_hash(bank)}.safetensors"

    def _load_phrases(self, banks: Sequence[tuple[str, ...]]) -> None:
        for bank in banks:
            path = self._phrase_path(bank)
            if path is not None and path.is_file():
                self._features[bank] = load_file(path)["features"].to(self.encoder.device)

    def _store_phrases(self, banks: Sequence[tuple[str, ...]]) -> None:
        for bank in banks:
            path = self._phrase_path(bank)
            if path is not None and not self._write(path, self._features[bank]):
                return

    # ------------------------------------------------------------ judging

    def moderate(
        self,
        texts: Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
        *,
        policy: Policy | None = None,
        ocr: Any | None = None,
    ) -> list[Result]:
        """One result per item: the texts first, then the images.

        Args:
            texts: plain texts.
            images: PIL pictures, paths or encoded bytes.
            policy: a policy over the taxonomy.
            ocr: a :class:`hysafe.data.ocr.Ocr` to read text in pictures; None does not read.
        """
        items = [
            Item(f"text-{i}", f"text-{i}", "text", text=t, content_hash=content_hash(None, t))
            for i, t in enumerate(texts or ())
        ]
        items += [_image_item(i, image) for i, image in enumerate(images or ())]
        options = ScanOptions(workers=0, encoders=0)
        return [j.result for j in self.judge(items, policy=policy, ocr=ocr, options=options)]

    def judge(
        self,
        items: Iterable[Item],
        *,
        policy: Policy | None = None,
        ocr: Any | None = None,
        options: ScanOptions | None = None,
        known: Known | None = None,
    ) -> Iterator[Judgement]:
        """Judgements in the order of `items`, in flat memory.

        An item that cannot be read or decoded is a result with an error and the rating review.

        Args:
            known: items that it finds are not encoded again.
        """
        batches = self.judge_batches(items, policy=policy, ocr=ocr, options=options, known=known)
        return chain.from_iterable(batches)

    def judge_batches(
        self,
        items: Iterable[Item],
        *,
        policy: Policy | None = None,
        ocr: Any | None = None,
        options: ScanOptions | None = None,
        known: Known | None = None,
    ) -> Iterator[list[Judgement]]:
        """As :meth:`judge`, in the batches that were encoded: a scan that begins after any of them
        makes the following ones as they would have been."""
        options = options or ScanOptions()
        view = self.view(policy)
        self.place(view)
        size = self.encoder.image_size
        with (
            DecodePool(
                size,
                workers=options.workers,
                seconds=options.decode_seconds,
                memory=options.decode_memory,
            ) as pool,
            ThreadPoolExecutor(1) as reader,
        ):
            seen = _batches(_decoded(items, pool, known), options.batch)
            batches = (_Batch(part, ocr, reader) for part in seen)
            encoders = min(options.encoders, torch.get_num_threads())
            if self.encoder.device.type != "cpu":
                encoders = min(encoders, 1)
            yield from ahead(lambda batch: self._judge_batch(batch, view), batches, encoders)

    def _judge_batch(self, batch: _Batch, view: PolicyView) -> list[Judgement]:
        judged = self.judge_encoded(
            self._encode(batch), view, reading=self.hash_with(batch.ocr), reads=batch.reads
        )
        return [replace(j, image=s.item.image) for j, s in zip(judged, batch.seen, strict=True)]

    def _encode(self, batch: _Batch) -> list[EncodedItem]:
        """What the towers see of a batch; no policy plays a part."""
        items = [s.item for s in batch.seen]
        read = batch.read()
        points: list[dict[str, np.ndarray]] = [{} for _ in items]
        cut: list[set[str]] = [set() for _ in items]
        rows = [i for i, s in enumerate(batch.seen) if s.pixels is not None]
        if rows:
            stack = torch.from_numpy(
                np.stack([s.pixels for s in batch.seen if s.pixels is not None])
            )
            vectors = self._encode_pixels(stack, bf16=self.bf16).tangent().numpy()
            for k, i in enumerate(rows):
                points[i]["image"] = vectors[k : k + 1]
        # the text of an item whose picture is broken still speaks
        texts = {
            i: str(s.item.text) for i, s in enumerate(batch.seen) if s.item.text and not s.known
        }
        written = {i: t for i, (t, _) in enumerate(read) if t}
        for name, found in (("text", texts), ("ocr", written)):
            for i, (vectors, truncated) in self._encode_long(found).items():
                points[i][name] = vectors
                if truncated:
                    cut[i].add(name)
        return [
            batch.seen[i].known or EncodedItem(
                item.id, item.source, item.modality, item.content_hash, points[i],
                frozenset(cut[i]), item.text or "", read[i][0], item.error or read[i][1],
            )
            for i, item in enumerate(items)
        ]  # fmt: skip

    def _encode_long(self, texts: dict[int, str]) -> dict[int, tuple[np.ndarray, bool]]:
        """Tangent vectors [W, D] of each text's windows, and whether some of it was not read."""
        if not texts:
            return {}
        rows = list(texts)
        windows, lengths, sizes, truncated = [], [], [], []
        with self._tokenizer:
            counts = self.encoder.towers.token_counts([texts[i] for i in rows])
        limit = self.encoder.towers.context_length
        for row, count in zip(rows, counts, strict=True):
            parts, beyond = _windows(texts[row], count, limit)
            windows += parts
            lengths += [min(count, limit)] * len(parts)
            sizes.append(len(parts))
            truncated.append(beyond)
        with self._tokenizer:
            known = self.encoder.towers.reads(windows)
        vectors = self._encode_windows(windows, lengths)
        ends = np.cumsum(sizes)[:-1]
        truncated = [t or not all(k) for t, k in zip(truncated, np.split(known, ends), strict=True)]
        split = np.split(vectors, ends)
        return dict(zip(rows, zip(split, truncated, strict=True), strict=True))

    def _encode_windows(self, windows: Sequence[str], lengths: Sequence[int]) -> np.ndarray:
        """Tangent vectors [n, D] of texts that fit the tower, encoded with those of like length."""
        towers, device = self.encoder.towers, self.encoder.device
        at_once = TEXT_TOKENS if device.type == "cpu" else TEXT_TOKENS_DEVICE
        features = torch.empty(len(windows), towers.embed_dim, device=device)
        with (
            torch.inference_mode(),
            # around all of them: it keeps the weights in bfloat16 until it ends
            torch.autocast(device.type, torch.bfloat16, enabled=self.bf16),
        ):
            for bucket in _buckets(lengths, at_once):
                with self._tokenizer:
                    tokens = towers.tokenize([windows[i] for i in bucket])
                features[bucket] = towers.encode_text(tokens.to(device)).float()
        with torch.inference_mode():
            points = _frozen(self.encoder.lift("text", features))
        vectors: np.ndarray = points.tangent().numpy()
        return vectors

    # ------------------------------------------------------------ judging stored points

    def judge_encoded(
        self, items: Sequence[EncodedItem], view: PolicyView, *, reading: str, reads: bool
    ) -> list[Judgement]:
        """Judgements of encoded items, in their order: what a scan and a rescore share.

        Scores are computed in float64 from the stored float32 vectors, so that they do not depend
        on how items fall into batches.

        Args:
            view: from :meth:`view`.
            reading: the model's hash with the reader of text in pictures, see :meth:`hash_with`.
            reads: text in pictures was read.
        """
        table, _ = self.place(view)
        channels = self.score_encoded(items, view)
        hashes = (reading, view.taxonomy.hash, view.policy.hash)
        kept = table.leaves[table.risk | table.inactive].numpy()
        written = None
        if "image" in channels:
            margins, scale = channels["image"].margins, self.encoder.cone_scale_value
            written = text_pictures(margins, table, scale)
        return [
            self._join(i, item, channels, table, kept, written, reads, hashes)
            for i, item in enumerate(items)
        ]

    def score_encoded(self, items: Sequence[EncodedItem], view: PolicyView) -> dict[str, Channel]:
        """What each channel says of encoded items; of a long text the riskiest window speaks."""
        channels: dict[str, Channel] = {}
        for name in ("image", "text", "ocr"):
            owner = [i for i, item in enumerate(items) for _ in item.points.get(name, ())]
            if not owner:
                continue
            stack = np.concatenate([item.points[name] for item in items if name in item.points])
            every = self._channel(name, stack, view)
            best: dict[int, int] = {}
            for k, i in enumerate(owner):
                if i not in best or every.risk[k] > every.risk[best[i]]:
                    best[i] = k
            channels[name] = every.pick(best) if len(best) < len(owner) else replace(every, at=best)
        return channels

    def risk(self, points: Points, view: PolicyView, channel: str = "text") -> Tensor:
        """Risk [B] of points as the rating weighs it: 1 at least where a node is over its own
        threshold."""
        table, _ = self.place(view)
        _, scores = self._scores(points, view, channel)
        risk, over = weighted_risk(scores, table)
        return torch.where(over, risk.clamp_min(1.0), risk)

    def _scores(self, points: Points, view: PolicyView, channel: str) -> tuple[Tensor, LeafScores]:
        """Margins [B, N] and calibrated scores of points."""
        placed = self._placed(view)
        table = placed.table
        margins = placed.margins(points, channel)
        fit = self.calibration.channel(channel)
        return margins, score_margins(
            margins, table, scale=self.encoder.cone_scale_value, slope=fit.slope,
            offset=fit.offset, temperature=fit.temperature,
        )  # fmt: skip

    def score_vectors(self, name: str, vectors: np.ndarray, view: PolicyView) -> Scored:
        """What the model says of stored vectors [n, D] of a channel, in float64."""
        table, apexes = self.place(view)
        fit = self.calibration.channel(name)
        n, nodes = len(vectors), len(table.ids)
        margins, scores = torch.empty(2, n, nodes, dtype=torch.double)
        told = torch.empty(5, n, dtype=torch.double)
        over, top = torch.empty(n, dtype=torch.bool), torch.full((n,), -1)
        p_unsafe, risk, radius, energy, unheld = told
        categories = table.leaves[table.risk]
        for start in range(0, n, SCORE_ROWS):
            part = slice(start, start + SCORE_ROWS)
            tangents = torch.from_numpy(np.ascontiguousarray(vectors[part])).double()
            points = Points.from_tangent(tangents, apexes.c, apexes.geometry)
            margins[part], found = self._scores(points, view, name)
            scores[part], p_unsafe[part] = found.nodes, found.p_unsafe
            energy[part], unheld[part] = found.energy, found.policy_evidence
            risk[part], over[part] = weighted_risk(found, table)
            radius[part] = points.radius()
            if len(categories):
                top[part] = categories[found.nodes[:, categories].argmax(-1)]
        policy = distribution = None
        if fit.distribution and fit.policy:
            policy = rounded(conformal_p_values(unheld, fit.policy, fit.n).numpy())
            distribution = rounded(conformal_p_values(energy, fit.distribution, fit.n).numpy())
        return Scored(
            margins.numpy(), scores.numpy(), p_unsafe.numpy(), risk.numpy(), over.numpy(),
            radius.numpy(), top.numpy(), policy, distribution,
        )  # fmt: skip

    def _channel(self, name: str, vectors: np.ndarray, view: PolicyView) -> Channel:
        table, _ = self.place(view)
        said = self.score_vectors(name, vectors, view)
        novelty = [NoveltyScores(None, None)] * len(vectors)
        if said.policy is not None and said.distribution is not None:
            pairs = zip(said.policy.tolist(), said.distribution.tolist(), strict=True)
            novelty = [NoveltyScores(a, b) for a, b in pairs]
        return Channel(
            {},
            vectors,
            said.margins,
            said.nodes,
            said.p_unsafe.tolist(),
            said.risk.tolist(),
            said.over.tolist(),
            novelty,
            said.radius.tolist(),
            [None if i < 0 else table.ids[i] for i in said.top.tolist()],
        )

    def _join(
        self,
        row: int,
        item: EncodedItem,
        channels: dict[str, Channel],
        table: NodeTable,
        kept: np.ndarray,
        written: np.ndarray | None,
        reads: bool,
        hashes: tuple[str, str, str],
    ) -> Judgement:
        """The riskier channel counts; the report says which one spoke. `kept`: indices of the
        nodes whose scores are stored. `written`: rows of the channel ``image`` that are pictures of
        text."""
        spoken = {name: c.at[row] for name, c in channels.items() if row in c.at}
        stamp = Hashes(item.content_hash, *hashes)
        if not spoken:
            error = item.error or NOT_JUDGED
            result = Result(item.id, item.source, item.modality, "review", None, (),
                            NoveltyScores(None, None), None, {}, error, stamp)  # fmt: skip
            return Judgement(Row(item, result))
        record: dict[str, Any] = {}
        triage = self.triage_of(table.view)
        ratings: dict[str, tuple[Rating, str]] = {}
        for name, k in spoken.items():
            channel = channels[name]
            rating, reason = triage.rate(
                channel.risk[k], channel.over[k], channel.novelty[k].distribution
            )
            if rating == "safe" and name in item.cut:
                rating, reason = NOT_READ_WHOLE
            if name == "image" and rating != "unsafe" and written is not None and written[k]:
                # The picture channel alone cannot clear a picture of text, and need not suspect
                # one that was read.
                if item.read_text:
                    rating, reason = TEXT_READ
                elif not reads:
                    rating, reason = TEXT_UNREAD
            ratings[name] = (rating, reason)
            record[name] = {"p_unsafe": _rounded(channel.p_unsafe[k]), "top": channel.top[k],
                            "rating": rating}  # fmt: skip
        if "ocr" in record:
            record["ocr"]["text"] = item.read_text
        decided = max(spoken, key=lambda n: (RANK[ratings[n][0]], channels[n].p_unsafe[spoken[n]]))
        rating, reason = ratings[decided]
        if item.error is not None and rating == "safe":
            rating, reason = "review", item.error.message
        record["decided_by"], record["reason"] = decided, reason
        nodes = _highest([channels[n].nodes[k] for n, k in spoken.items()])
        margins = _highest([channels[n].margins[k] for n, k in spoken.items()])
        channel, k = channels[decided], spoken[decided]
        novelty = NoveltyScores(
            _least(channels[n].novelty[i].policy for n, i in spoken.items()),
            channel.novelty[k].distribution,
        )
        main = "image" if "image" in spoken else next(iter(spoken))
        other = next((n for n in ("ocr", "text") if n in spoken and n != main), None)
        result = Result(
            item.id, item.source, item.modality, rating,
            _rounded(max(channels[n].p_unsafe[i] for n, i in spoken.items())),
            _paths(nodes, margins, table), novelty, _rounded(channel.radius[k]), record,
            item.error, stamp,
        )  # fmt: skip
        vectors = {n: channels[n].vectors[i] for n, i in spoken.items()}
        return Judgement(
            Row(item, result, vectors[main], vectors[other] if other else None, nodes[kept])
        )

    # ------------------------------------------------------------ collections

    def rescore(self, collection: Collection, policy: Policy | None = None, **options: Any) -> Any:
        """Judge a collection again, see :func:`hysafe.app.rescore.rescore`."""
        from hysafe.app.rescore import rescore

        return rescore(collection, self, policy, **options)

    def add(self, collection: Collection, paths: Sequence[str], **options: Any) -> Any:
        """Scan more paths into a collection, see :func:`hysafe.app.scan.add`."""
        from hysafe.app.scan import add

        return add(collection, self, paths, **options)

    # ------------------------------------------------------------ identity

    def hash_with(self, ocr: Any | None, *, bf16: bool | None = None) -> str:
        """Hash of the model as a result depends on it: reading text in pictures is part of it, and
        the numbers that items are encoded with (by default this model's)."""
        half = self.bf16 if bf16 is None else bf16
        if ocr is None and not half:
            return self.hash
        parts = [self.hash, *(["bf16"] if half else [])]
        if ocr is not None:
            parts.append(getattr(ocr, "version", "unnamed reader"))
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def _hash(self) -> str:
        digest = hashlib.sha256(self.encoder.hash().encode())
        digest.update(repr(self.calibration).encode())
        digest.update(repr(self.triage).encode())
        for name, tangents in sorted(self.reference.items()):  # scores of new nodes depend on them
            digest.update(name.encode())
            digest.update(tangents.double().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


Given = TypeVar("Given")
Made = TypeVar("Made")


class _Placed(NamedTuple):
    """A view on the space: apexes as phrases place them, with example texts, by which texts are judged,
    and as example pictures draw them, by which pictures are."""

    table: NodeTable
    apexes: Points
    said: Points
    shown: Points
    narrowed: Mapping[str, Tensor]

    def cones(self, channel: str) -> tuple[Points, Tensor | None]:
        """Apexes [N, D] of a channel, and by how much their cones are narrowed [N]."""
        apexes = self.shown if channel == "image" else self.said
        return apexes, self.narrowed.get("text" if channel == "ocr" else channel)

    def margins(self, points: Points, channel: str) -> Tensor:
        """Margins [B, N] of points of a channel."""
        apexes, narrowed = self.cones(channel)
        margins = points.margin(apexes)
        return margins if narrowed is None else margins - narrowed.to(margins)


def _turned(apexes: Points, tangents: Mapping[int, Tensor]) -> Points:
    """Apexes of which some [row] stand elsewhere (tangent vectors [D])."""
    space = apexes.space.clone()
    for row, tangent in tangents.items():
        space[row] = apexes.functions.exp_map0(tangent.to(space), apexes.c)
    return Points(space, apexes.c, apexes.geometry)


class _Seen(NamedTuple):
    """An item with its pixels, or with what is known of it."""

    item: Item
    pixels: np.ndarray | None
    known: EncodedItem | None


def _decoded(items: Iterable[Item], pool: DecodePool, known: Known | None) -> Iterator[_Seen]:
    """Items in their order; the pictures of known ones are not decoded."""
    found: dict[str, EncodedItem] = {}

    def looked_up() -> Iterator[Item]:
        if known is None:
            yield from items
            return
        for group in groups(items):
            found.update(known.find(group))
            yield from group

    for item, pixels in pool.decode(looked_up(), skip=lambda item: item.id in found):
        yield _Seen(item, pixels, found.pop(item.id, None))


def _batches(seen: Iterable[_Seen], pictures: int) -> Iterator[list[_Seen]]:
    """Batches of so many pictures, or more texts; where one ends depends on its items alone."""
    batch: list[_Seen] = []
    count = size = 0
    for one in seen:
        batch.append(one)
        if one.item.image is not None:
            count, size = count + 1, size + len(one.item.image)
        if count >= pictures or size >= BATCH_BYTES or len(batch) >= pictures * TEXTS_PER_PICTURE:
            yield batch
            batch, count, size = [], 0, 0
    if batch:
        yield batch


def _buckets(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of texts of so many tokens, short ones first, in groups of `tokens` with padding."""
    bucket: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if bucket and lengths[i] * (len(bucket) + 1) > tokens:
            yield bucket
            bucket = []
        bucket.append(i)
    if bucket:
        yield bucket


def ahead(work: Callable[[Given], Made], given: Iterable[Given], at_once: int) -> Iterator[Made]:
    """Work on each in turn, on so many at once, which share torch's threads.

    Several at once keep the cores busy where the threads of one would wait for each other, and for
    the decode processes.
    """
    if not at_once:
        yield from map(work, given)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // at_once)
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        try:
            for one in given:
                waiting.append(pool.submit(work, one))
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            torch.set_num_threads(threads)


class _Batch:
    """Decoded items and the texts being read in their pictures."""

    def __init__(self, seen: list[_Seen], ocr: Any | None, reader: ThreadPoolExecutor) -> None:
        self.seen = seen
        self.ocr, self.reads = ocr, ocr is not None
        self._futures: dict[int, Future[tuple[str, ErrorRecord | None]]] = {}
        if ocr is not None:
            for i, (item, pixels, _) in enumerate(seen):
                if pixels is not None and item.image is not None:
                    self._futures[i] = reader.submit(_read_text, ocr, item)

    def read(self) -> list[tuple[str, ErrorRecord | None]]:
        """Text read in each item's picture, and the error where reading failed."""
        return [
            self._futures[i].result() if i in self._futures else ("", None)
            for i in range(len(self.seen))
        ]


def load(
    name: str = "mini",
    *,
    taxonomy: str | Path | None = None,
    cache: Path | None = None,
    towers: bool = True,
    bf16: bool = False,
) -> SafetyModel:
    """Load a model by name.

    Args:
        name: ``mini``, ``mini-photo`` (bundled), a hysafe folder, a hub id, or ``open_clip:ARCH/TAG-or-FILE``
            (lifted without training, not calibrated).
        taxonomy: a taxonomy YAML; the bundled one by default.
        cache: where encoded taxonomies are kept; a user cache folder by default.
        towers: load the towers now. False loads only the heads of a model folder, which is enough
            to judge stored points; the towers follow when something has to be encoded.
        bf16: encode the items of a scan in bfloat16: faster where the processor has it, and
            a few ratings in a thousand differ. Points stay comparable with those of float32.

    Raises:
        ModelError: nothing of that name, or a damaged folder.
    """
    folder = resolve_folder(name) if not name.startswith("open_clip:") else None
    encoder: HyperbolicEncoder | TowerlessEncoder
    if folder is not None and not towers:
        encoder = TowerlessEncoder(folder)
    else:
        encoder = load_encoder(name)
        encoder.prepare_inference()
    calibration = Calibration.load(folder) if folder is not None else Calibration()
    return SafetyModel(
        encoder, load_taxonomy(taxonomy), calibration, name=name,
        cache=cache or _cache_folder(), bf16=bf16,
        reference=load_reference(folder) if folder is not None else None,
    )  # fmt: skip


def scan_items(paths: Sequence[str], **options: Any) -> Iterator[Item]:
    """Items under the paths of a scan; see :func:`hysafe.data.inputs.iter_items`."""
    return iter_items(paths, **options)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hysafe"


def _frozen(points: Points) -> Points:
    """Points with plain numbers: no gradient, no inference-mode tensors."""
    return Points(points.space.detach().cpu().clone(), float(points.c), points.geometry)


def _image_item(index: int, image: Any) -> Item:
    name = f"image-{index}"
    try:
        if isinstance(image, bytes):
            data = image
        elif isinstance(image, str | os.PathLike):
            name, data = str(image), Path(image).read_bytes()
        else:
            import io

            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
    except (OSError, AttributeError, ValueError) as error:
        record = ErrorRecord("InputError", f"{name}: cannot be read ({error}).")
        return Item(name, name, "image", error=record)
    return Item(name, name, "image", image=data, content_hash=content_hash(data, None))


def check_examples(policy: Policy) -> None:
    """Read the example pictures of a policy, as judging by it will.

    Raises:
        ConfigError: one cannot be read or decoded, or is not the one it was.
    """
    for node, rule in policy.rules.items():
        for example in rule.examples:
            _read_example(policy, node, example, CHECKED_SIZE)


def _read_example(policy: Policy, node: str, example: Example, size: int) -> np.ndarray:
    """Pixels [3, size, size] of an example picture that a policy gives for a node."""
    where = f"{policy.origin}: node {node}: example {example.file}"
    try:
        data = Path(example.file).read_bytes()
        pixels = to_pixels(decode(data, size=size), size)
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read ({error.strerror}). Put it back, or name another in "
            "`examples` of the policy file and give it again with --policy."
        ) from error
    except InputError as error:
        raise ConfigError(f"{where}: {error} Or remove it from `examples`.") from error
    if hashlib.sha256(data).hexdigest() != example.sha256:
        raise ConfigError(
            f"{where}: not the picture that it was when the policy was read. Put that one back, or "
            "give the policy file again with --policy."
        )
    return pixels


def _read_text(ocr: Any, item: Item) -> tuple[str, ErrorRecord | None]:
    try:
        return ocr.read(decode(item.image or b""), content_hash(item.image, None)).text, None
    except InputError as error:
        return "", ErrorRecord("InputError", str(error))
    except HysafeError:
        raise


def _windows(text: str, tokens: int, limit: int) -> tuple[list[str], bool]:
    """Parts of a text that fit the tower, and whether the end was left out."""
    if tokens <= limit:
        return [text], False
    words = text.split()
    if len(words) < 2:  # one endless word: characters instead
        words = [text[i : i + 16] for i in range(0, len(text), 16)]
    per_word = tokens / len(words)
    size = max(1, int((limit - WINDOW_SLACK) / per_word * 0.9))
    parts = [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
    return parts[:MAX_WINDOWS], len(parts) > MAX_WINDOWS


def text_pictures(margins: np.ndarray, table: NodeTable, scale: float) -> np.ndarray:
    """Whether the picture channel sees a picture of text: bool [n] from its margins [n, N]."""
    seen = np.zeros(len(margins), dtype=bool)
    if TEXT_PICTURE_NODE not in table.leaf_ids:
        return seen
    leaves = np.ascontiguousarray(margins[:, table.leaves.numpy()])  # rows are summed alike
    position = table.leaf_ids.index(TEXT_PICTURE_NODE)
    peak = leaves.max(-1)
    rows = np.flatnonzero(~(leaves[:, position] < peak))  # no other has half of it all
    weight = np.exp((leaves[rows] - peak[rows, None]) * scale)
    seen[rows] = ~(weight[:, position] / weight.sum(-1) < TEXT_PICTURE_SHARE)
    return seen


def rounded(values: np.ndarray) -> np.ndarray:
    """``round(value, DIGITS)`` of each value."""
    scaled = np.asarray(values, dtype=np.float64) * 10**DIGITS
    result: np.ndarray = np.rint(scaled) / 10**DIGITS
    halves = np.abs(scaled - np.floor(scaled) - 0.5) < NEAR_HALF
    for i in np.flatnonzero(halves).tolist():  # the product hides on which side these lie
        result[i] = round(float(values[i]), DIGITS)
    return result


def _highest(rows: list[np.ndarray]) -> np.ndarray:
    """Element-wise maximum of arrays [N]."""
    return rows[0] if len(rows) == 1 else np.maximum.reduce(rows)


def _paths(scores: np.ndarray, margins: np.ndarray, table: NodeTable) -> tuple[NodeScore, ...]:
    """Nodes that apply, best first: categories and concepts; a domain where none of its
    categories does. Scores and margins [N] are the highest of the channels."""
    taxonomy = table.view.taxonomy
    listed: list[NodeScore] = []
    covered: set[str] = set()
    domains: list[int] = []
    for i in np.flatnonzero(scores >= LIST_FROM).tolist():
        node = taxonomy[table.ids[i]]
        if not table.active[i]:
            continue
        if node.kind == "domain":
            domains.append(i)
            continue
        path = taxonomy.path(node.id)
        covered.add(path.ids[0])
        listed.append(
            NodeScore(node.id, path.names, _rounded(float(scores[i])), bool(margins[i] > 0))
        )
    for i in domains:
        node = taxonomy[table.ids[i]]
        if node.id not in covered:
            listed.append(
                NodeScore(node.id, (node.name,), _rounded(float(scores[i])), bool(margins[i] > 0))
            )
    return tuple(sorted(listed, key=lambda s: (-s.score, s.node)))


def _rounded(value: float) -> float:
    return round(value, DIGITS)


def _least(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return min(known) if known else None
