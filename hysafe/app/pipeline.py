"""SafetyModel: from pictures and texts to results, one batched call per stage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hysafe.data.decoding import DecodePool
from hysafe.data.images import content_hash, decode, to_pixels
from hysafe.data.inputs import iter_items
from hysafe.encoder.model import HyperbolicEncoder
from hysafe.encoder.pretrained import BUNDLED, load_encoder, resolve_folder
from hysafe.errors import HysafeError, InputError
from hysafe.geometry import Points
from hysafe.score.calibration import Calibration, conformal_p_values
from hysafe.score.leaves import NodeTable, score_margins
from hysafe.score.triage import TriagePolicy, weighted_risk
from hysafe.taxonomy import Policy, PolicyView, Taxonomy, load_taxonomy
from hysafe.types import ErrorRecord, Hashes, Item, NodeScore, NoveltyScores, Rating, Result

__all__ = ["Judgement", "SafetyModel", "ScanOptions", "load"]

# A node is listed for an item from this score on.
LIST_FROM = 0.1
# Longer texts are read through this many windows; what lies beyond makes the item `review`.
MAX_WINDOWS = 32
# Tokens of a window left for the two special tokens and for words that split unevenly.
WINDOW_SLACK = 8
DIGITS = 4
RANK: dict[Rating, int] = {"safe": 0, "review": 1, "unsafe": 2}
# A picture whose tower says "picture of text" must have been read to be safe.
TEXT_PICTURE_NODE = "S.b11"
TEXT_PICTURE_SHARE = 0.5


@dataclass(frozen=True)
class ScanOptions:
    """How a scan runs; none of it changes a result.

    Args:
        batch: items a batch. workers: decode processes; 0 decodes in this one.
    """

    batch: int = 64
    workers: int = 1


@dataclass(frozen=True)
class Judgement:
    """A result with what the collection stores beside it.

    Args:
        item: what was judged (with its encoded picture).
        result: the judgement.
        vector, text_vector: tangent vectors [D] of the item and of its text, or None.
        scores: category scores, or None.
        text: the text that was judged (given or read), "" for none.
    """

    item: Item
    result: Result
    vector: np.ndarray | None = None
    text_vector: np.ndarray | None = None
    scores: np.ndarray | None = None
    text: str = ""


@dataclass
class _Channel:
    """One channel of a batch: the rows it speaks for and what it says of them."""

    rows: list[int]
    points: Points
    margins: Tensor
    nodes: Tensor
    p_unsafe: Tensor
    risk: Tensor
    over: Tensor
    novelty: list[NoveltyScores]
    radius: list[float]
    tangent: np.ndarray
    top: list[str | None]
    truncated: dict[int, bool] = field(default_factory=dict)


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
    """

    def __init__(
        self,
        encoder: HyperbolicEncoder,
        taxonomy: Taxonomy | None = None,
        calibration: Calibration | None = None,
        *,
        name: str = "model",
        triage: TriagePolicy | None = None,
        cache: Path | None = None,
    ) -> None:
        self.encoder = encoder.eval()
        self.taxonomy = taxonomy or load_taxonomy()
        self.calibration = calibration or Calibration()
        self.name, self.triage = name, triage or TriagePolicy()
        self.hash = self._hash()
        self._cache = cache
        self._features: dict[tuple[str, ...], Tensor] = {}
        self._views: dict[str, tuple[NodeTable, Points]] = {}
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

    def _encode_pixels(self, pixels: Tensor) -> Points:
        with torch.inference_mode():
            return _frozen(self.encoder.encode_image(pixels.to(self.encoder.device)))

    # ------------------------------------------------------------ the taxonomy on the space

    def view(self, policy: Policy | None = None) -> PolicyView:
        """The taxonomy under a policy."""
        return (policy or Policy()).apply(self.taxonomy)

    def place(self, view: PolicyView) -> tuple[NodeTable, Points]:
        """Node table and cone apexes [N, D] of a view; only unknown phrases are encoded."""
        key = f"{view.taxonomy.hash}/{view.policy.hash}"
        if key not in self._views:
            self._views[key] = (NodeTable(view), self._apexes(view.taxonomy))
        return self._views[key]

    def _apexes(self, taxonomy: Taxonomy) -> Points:
        banks = [n.phrases for n in taxonomy]
        missing = [b for b in banks if b not in self._features]
        if missing:
            features = self.encoder.node_features(missing)
            self._features.update(zip(missing, features.clone(), strict=True))
            if taxonomy.hash == self.taxonomy.hash:
                self._store(banks)
        stack = torch.stack([self._features[b] for b in banks])
        depth = torch.tensor([taxonomy.depth(n.id) for n in taxonomy])
        with torch.inference_mode():
            return _frozen(self.encoder.place_nodes(stack, depth.to(stack.device), banks))

    def _store_path(self) -> Path | None:
        if self._cache is None:
            return None
        return self._cache / f"nodes-{self.hash}-{self.taxonomy.hash}.safetensors"

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
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": torch.stack([self._features[b] for b in banks])}, temporary)
            temporary.replace(path)
        except OSError:  # a cache that cannot be written costs time, nothing else
            self._cache = None

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
        options = ScanOptions(workers=0)
        return [j.result for j in self.judge(items, policy=policy, ocr=ocr, options=options)]

    def judge(
        self,
        items: Iterable[Item],
        *,
        policy: Policy | None = None,
        ocr: Any | None = None,
        options: ScanOptions | None = None,
    ) -> Iterator[Judgement]:
        """Judgements in the order of `items`, in flat memory.

        An item that cannot be read or decoded is a result with an error and the rating review.
        """
        options = options or ScanOptions()
        view = self.view(policy)
        self.place(view)
        size = self.encoder.image_size
        with (
            DecodePool(size, workers=options.workers) as pool,
            ThreadPoolExecutor(1) as reader,
        ):
            decoded = iter(pool.decode(items))
            batch = _Batch(list(islice(decoded, options.batch)), ocr, reader)
            while batch.pairs:
                # the next batch is decoded and read while this one is encoded
                following = _Batch(list(islice(decoded, options.batch)), ocr, reader)
                yield from self._judge_batch(batch, view)
                batch = following

    def _judge_batch(self, batch: _Batch, view: PolicyView) -> list[Judgement]:
        table, apexes = self.place(view)
        items = [item for item, _ in batch.pairs]
        read = batch.read()
        items = [
            item if read[i][1] is None or item.error else replace(item, error=read[i][1])
            for i, item in enumerate(items)
        ]
        channels: dict[str, _Channel] = {}
        rows = [i for i, (item, pixels) in enumerate(batch.pairs) if pixels is not None]
        if rows:
            stack = torch.from_numpy(np.stack([p for _, p in batch.pairs if p is not None]))
            points = self._encode_pixels(stack)
            channels["image"] = self._channel("image", rows, points, table, apexes)
        # the text of an item whose picture is broken still speaks
        texts = {i: str(item.text) for i, item in enumerate(items) if item.text}
        written = {i: t for i, (t, _) in enumerate(read) if t}
        for name, found in (("text", texts), ("ocr", written)):
            if found:
                channels[name] = self._text_channel(name, found, table, apexes)
        hashes = (self.hash_with(batch.ocr), view.taxonomy.hash, view.policy.hash)
        return [
            self._join(i, item, channels, table, batch, read[i][0], hashes)
            for i, item in enumerate(items)
        ]

    def _channel(
        self, name: str, rows: list[int], points: Points, table: NodeTable, apexes: Points
    ) -> _Channel:
        margins = points.margin(apexes)
        fit = self.calibration.channel(name)
        scores = score_margins(
            margins, table, scale=self.encoder.cone_scale_value, slope=fit.slope,
            offset=fit.offset, temperature=fit.temperature,
        )  # fmt: skip
        risk, over = weighted_risk(scores, table)
        if fit.distribution and fit.policy:
            distribution = conformal_p_values(scores.energy, fit.distribution, fit.n).tolist()
            unheld = conformal_p_values(scores.policy_evidence, fit.policy, fit.n).tolist()
            novelty = [
                NoveltyScores(_rounded(a), _rounded(b))
                for a, b in zip(unheld, distribution, strict=True)
            ]
        else:
            novelty = [NoveltyScores(None, None)] * len(rows)
        return _Channel(
            rows,
            points,
            margins,
            scores.nodes,
            scores.p_unsafe,
            risk,
            over,
            novelty,
            points.radius().tolist(),
            points.tangent().numpy(),
            _top_categories(scores.nodes, table),
        )

    def _text_channel(
        self, name: str, texts: dict[int, str], table: NodeTable, apexes: Points
    ) -> _Channel:
        """Long texts go through windows; the riskiest window speaks."""
        rows = list(texts)
        windows, owner, truncated = [], [], {}
        counts = self.encoder.towers.token_counts([texts[i] for i in rows])
        limit = self.encoder.towers.context_length
        for row, count in zip(rows, counts, strict=True):
            parts, cut = _windows(texts[row], count, limit)
            truncated[row] = cut
            windows += parts
            owner += [row] * len(parts)
        every = self._channel(name, owner, self.encode_text(windows), table, apexes)
        best: dict[int, int] = {}
        for k, row in enumerate(owner):
            if row not in best or float(every.risk[k]) > float(every.risk[best[row]]):
                best[row] = k
        pick = torch.tensor([best[row] for row in rows])
        return _Channel(
            rows, every.points[pick], every.margins[pick], every.nodes[pick],
            every.p_unsafe[pick], every.risk[pick], every.over[pick],
            [every.novelty[best[row]] for row in rows], [every.radius[best[row]] for row in rows],
            every.tangent[pick.numpy()], [every.top[best[row]] for row in rows], truncated,
        )  # fmt: skip

    def _join(
        self,
        row: int,
        item: Item,
        channels: dict[str, _Channel],
        table: NodeTable,
        batch: _Batch,
        written: str,
        hashes: tuple[str, str, str],
    ) -> Judgement:
        """The riskier channel counts; the report says which one spoke."""
        spoken: dict[str, int] = {}
        for name, channel in channels.items():
            if row in channel.rows:
                spoken[name] = channel.rows.index(row)
        content = item.content_hash
        stamp = Hashes(content, *hashes)
        if not spoken:
            error = item.error or ErrorRecord("InputError", "nothing to judge: no picture, no text")
            result = Result(item.id, item.source, item.modality, "review", None, (),
                            NoveltyScores(None, None), None, {}, error, stamp)  # fmt: skip
            return Judgement(item, result)
        record: dict[str, Any] = {}
        ratings: dict[str, tuple[Rating, str]] = {}
        for name, k in spoken.items():
            channel = channels[name]
            rating, reason = self.triage.rate(
                float(channel.risk[k]), bool(channel.over[k]), channel.novelty[k].distribution
            )
            if rating == "safe" and channel.truncated.get(row):
                rating, reason = "review", "too long to read whole"
            if name == "image" and rating != "unsafe":
                rating, reason = self._text_picture(
                    rating, reason, channel, k, table, batch, written
                )
            ratings[name] = (rating, reason)
            top = channel.top[k]
            record[name] = {"p_unsafe": _rounded(float(channel.p_unsafe[k])), "top": top,
                            "rating": rating}  # fmt: skip
        if "ocr" in record:
            record["ocr"]["text"] = written
        decided = max(
            spoken, key=lambda n: (RANK[ratings[n][0]], float(channels[n].p_unsafe[spoken[n]]))
        )
        rating, reason = ratings[decided]
        if item.error is not None and rating == "safe":
            rating, reason = "review", item.error.message
        record["decided_by"], record["reason"] = decided, reason
        paths = _paths([(channels[n], k) for n, k in spoken.items()], table)
        channel, k = channels[decided], spoken[decided]
        novelty = NoveltyScores(
            _least(channels[n].novelty[i].policy for n, i in spoken.items()),
            channel.novelty[k].distribution,
        )
        main = "image" if "image" in spoken else next(iter(spoken))
        vector = _tangent(channels[main], spoken[main])
        other = next((n for n in ("ocr", "text") if n in spoken and n != main), None)
        categories = table.leaves[table.risk | table.inactive]
        scores = torch.stack([channels[n].nodes[i, categories] for n, i in spoken.items()]).amax(0)
        result = Result(
            item.id, item.source, item.modality, rating,
            _rounded(max(float(channels[n].p_unsafe[i]) for n, i in spoken.items())),
            paths, novelty, _rounded(channel.radius[k]), record,
            item.error, stamp,
        )  # fmt: skip
        return Judgement(
            item, result, vector,
            _tangent(channels[other], spoken[other]) if other else None,
            scores.numpy(), item.text or written,
        )  # fmt: skip

    def _text_picture(
        self, rating: Rating, reason: str, channel: _Channel, k: int, table: NodeTable,
        batch: _Batch, written: str,
    ) -> tuple[Rating, str]:  # fmt: skip
        """The picture channel alone cannot clear a picture of text, and need not suspect one that
        was read."""
        if TEXT_PICTURE_NODE not in table.leaf_ids:
            return rating, reason
        position = table.leaf_ids.index(TEXT_PICTURE_NODE)
        logits = channel.margins[k, table.leaves] * self.encoder.cone_scale_value
        if float(torch.softmax(logits, -1)[position]) < TEXT_PICTURE_SHARE:
            return rating, reason
        if written:
            return "safe", "a picture of text, judged by what it says"
        if not batch.reads:
            return "review", "a picture of text that was not read (OCR is off)"
        return rating, reason

    # ------------------------------------------------------------ identity

    def hash_with(self, ocr: Any | None) -> str:
        """Hash of the model as a result depends on it: reading text in pictures is part of it."""
        if ocr is None:
            return self.hash
        version = getattr(ocr, "version", "unnamed reader")
        return hashlib.sha256(f"{self.hash}/{version}".encode()).hexdigest()[:16]

    def _hash(self) -> str:
        digest = hashlib.sha256(self.encoder.hash().encode())
        digest.update(repr(self.calibration).encode())
        digest.update(repr(self.triage).encode())
        return digest.hexdigest()[:16]


class _Batch:
    """Decoded items and the texts being read in their pictures."""

    def __init__(
        self,
        pairs: list[tuple[Item, np.ndarray | None]],
        ocr: Any | None,
        reader: ThreadPoolExecutor,
    ) -> None:
        self.pairs = pairs
        self.ocr, self.reads = ocr, ocr is not None
        self._futures: dict[int, Future[tuple[str, ErrorRecord | None]]] = {}
        if ocr is not None:
            for i, (item, pixels) in enumerate(pairs):
                if pixels is not None and item.image is not None:
                    self._futures[i] = reader.submit(_read_text, ocr, item)

    def read(self) -> list[tuple[str, ErrorRecord | None]]:
        """Text read in each item's picture, and the error where reading failed."""
        return [
            self._futures[i].result() if i in self._futures else ("", None)
            for i in range(len(self.pairs))
        ]


def load(
    name: str = "mini", *, taxonomy: str | Path | None = None, cache: Path | None = None
) -> SafetyModel:
    """Load a model by name.

    Args:
        name: ``mini`` (bundled), a hysafe folder, a hub id, or ``open_clip:ARCH/TAG-or-FILE``
            (lifted without training, not calibrated).
        taxonomy: a taxonomy YAML; the bundled one by default.
        cache: where encoded taxonomies are kept; a user cache folder by default.

    Raises:
        ModelError: nothing of that name, or a damaged folder.
    """
    encoder = load_encoder(name)
    folder = resolve_folder(name) if not name.startswith("open_clip:") else None
    encoder.prepare_inference()
    calibration = Calibration.load(folder) if folder is not None else Calibration()
    return SafetyModel(
        encoder, load_taxonomy(taxonomy), calibration, name=name, cache=cache or _cache_folder()
    )


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


def _top_categories(scores: Tensor, table: NodeTable) -> list[str | None]:
    """Best active category of each row; None where the policy leaves none."""
    categories = table.leaves[table.risk]
    if not len(categories):
        return [None] * len(scores)
    best = categories[scores[:, categories].argmax(-1)]
    return [table.ids[i] for i in best.tolist()]


def _paths(spoken: list[tuple[_Channel, int]], table: NodeTable) -> tuple[NodeScore, ...]:
    """Nodes that apply, best first: categories and concepts; a domain where none of its
    categories does."""
    scores = torch.stack([c.nodes[k] for c, k in spoken]).amax(0)
    inside = torch.stack([c.margins[k] for c, k in spoken]).amax(0) > 0
    taxonomy = table.view.taxonomy
    listed: list[NodeScore] = []
    covered: set[str] = set()
    for i in (scores >= LIST_FROM).nonzero()[:, 0].tolist():
        node = taxonomy[table.ids[i]]
        if not table.active[i] or node.kind == "domain":
            continue
        path = taxonomy.path(node.id)
        covered.add(path.ids[0])
        listed.append(NodeScore(node.id, path.names, _rounded(float(scores[i])), bool(inside[i])))
    for node in taxonomy.domains:
        i = table.index[node.id]
        if table.active[i] and node.id not in covered and float(scores[i]) >= LIST_FROM:
            listed.append(
                NodeScore(node.id, (node.name,), _rounded(float(scores[i])), bool(inside[i]))
            )
    return tuple(sorted(listed, key=lambda s: (-s.score, s.node)))


def _tangent(channel: _Channel, k: int) -> np.ndarray:
    return np.asarray(channel.tangent[k])


def _rounded(value: float) -> float:
    return round(value, DIGITS)


def _least(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return min(known) if known else None
