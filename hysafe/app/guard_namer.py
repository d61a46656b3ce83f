"""The guard in the product: names for the novel items of a scan or of a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from hysafe.app.discover import novel_places
from hysafe.app.guard_data import evidence_of
from hysafe.app.output import SAID
from hysafe.app.pipeline import SafetyModel
from hysafe.app.report import NOVEL_AT
from hysafe.errors import ConfigError
from hysafe.guard.ask import answers_of, chosen_names, names_of
from hysafe.guard.corpus import PhraseIndex
from hysafe.guard.model import Evidence, GuardModel, PolicySpace
from hysafe.guard.naming import (
    THINGS,
    Naming,
    PhraseNamer,
    Whitening,
    bundled_phrases,
    restated,
)
from hysafe.guard.protocol import Answer, PromptPolicy
from hysafe.guard.similarity import minilm_embed
from hysafe.index import Collection
from hysafe.taxonomy import PolicyView

__all__ = ["GUARDS", "GuardNamer", "load_guard", "name_novel", "write_names"]

# Bundled guards and their folders in the package's assets.
GUARDS = {"mini-guard": "mini_guard"}
CHUNK = 4096
CHANNELS = ("image", "text", "ocr")


class GuardNamer:
    """Names by a trained guard: the phrase that it and the geometry like best together.

    Its phrases are for what texts say. What it finds novel in a picture without text is named by
    what the near words of :data:`hysafe.guard.naming.THINGS` agree on, the list of what pictures
    show.

    Args:
        guard: in evaluation mode.
        index: its phrases.
        model: the encoder it was trained on, or one that agrees with it on texts and nodes.

    Raises:
        ConfigError: the guard was trained on another encoder.
    """

    def __init__(self, guard: GuardModel, index: PhraseIndex, model: SafetyModel) -> None:
        trained_on = guard.config.encoder_hash
        if not guard.reads(model.encoder):
            raise ConfigError(
                f"the guard reads points of another encoder ({trained_on[:12]}; {model.name} is "
                f"{model.encoder.hash()[:12]}). Take the model it was trained on, or train a guard "
                "for this one: python train_guard.py fit --data.encoder ..."
            )
        if trained_on and trained_on != model.encoder.hash() and "image" in index.whitening:
            # the same texts and nodes, but pictures lie elsewhere than in its training
            known = model.reference.get("image")
            fitted = None if known is None else Whitening.fit(known.numpy())
            index = index.rewhitened("image", fitted)
        self.guard, self.index, self.model = guard, index, model
        self._shown: PhraseNamer | None = None
        if "image" in index.whitening:
            self._shown = PhraseNamer(
                model.encode_text, bundled_phrases(THINGS), meaning=minilm_embed,
                reference={"image": index.whitening["image"]},
            )  # fmt: skip

    def name(
        self,
        vectors: np.ndarray,
        modalities: Sequence[str],
        texts: Sequence[str],
        view: PolicyView,
    ) -> list[Naming | None]:
        """A name for each item, see :class:`hysafe.guard.naming.Namer`."""
        found: list[Naming | None] = [None] * len(modalities)
        for channel in dict.fromkeys(modalities):
            rows = [i for i, m in enumerate(modalities) if m == channel]
            stack = np.asarray(vectors, np.float32)[rows]
            if channel == "image" and self._shown is not None:
                named = self._of_pictures(stack, view)
            else:
                items = evidence_of(
                    self.model, {channel: stack}, [texts[i] for i in rows], self.index, view,
                    borrow=True, without=restated(self.index.phrases, view),
                )  # fmt: skip
                named = self.names(items, view, always=True)
            for i, naming in zip(rows, named, strict=True):
                found[i] = naming
        return found

    def names(
        self, items: Sequence[Evidence], view: PolicyView, *, always: bool = False
    ) -> list[Naming | None]:
        """Names of items, with the guard's rationale; a picture without text that has a name gets
        one of the list of what pictures show, with the words that led to it.

        Args:
            view: the policy.
            always: name also what the guard would put under a listed category, or call safe.
        """
        if not items:
            return []
        table, apexes = self.model.place(view)
        space = PolicySpace(table.ids, apexes.tangent().float())
        # slots are what the guard reads, never ids: a policy's own may be too long for a prompt
        policies = [PromptPolicy.from_view(view, numbered=True)] * len(items)
        said = answers_of(self.guard, items, policies, space)
        wanted = [
            i for i, a in enumerate(said)
            if always or (isinstance(a, Answer) and a.novel is not None)
        ]  # fmt: skip
        found: list[Naming | None] = [None] * len(items)
        for i, answer in enumerate(said):
            if isinstance(answer, Answer) and not always:
                found[i] = Naming("", _place(answer, view))
        asked = [items[i] for i in wanted], [policies[i] for i in wanted]
        names = chosen_names(self.guard, *asked, space)
        if not all(names):  # nothing to point at: words of its own
            own = names_of(self.guard, *asked, space)
            names = [a or b for a, b in zip(names, own, strict=True)]
        free = ~restated(names, view) if names else np.empty(0, bool)
        for i, name, ok in zip(wanted, names, free, strict=True):
            answer = said[i]
            why = answer.rationale if isinstance(answer, Answer) else ""
            if name and ok:
                found[i] = Naming(name, why)
            else:  # it says again what the policy lists
                found[i] = None if always else Naming("", "the guard finds no new name for it")
        pictures = [
            i
            for i, (item, naming) in enumerate(zip(items, found, strict=True))
            if naming and naming.name and item.channels == ("image",)
        ]
        if self._shown is not None and pictures:
            stack = np.concatenate([items[i].vectors for i in pictures])
            for i, shown in zip(pictures, self._of_pictures(stack, view), strict=True):
                found[i] = shown or found[i]
        return found

    def _of_pictures(self, vectors: np.ndarray, view: PolicyView) -> list[Naming | None]:
        """Names of pictures [n, D] by the list of what pictures show."""
        assert self._shown is not None
        return self._shown.name(vectors, ["image"] * len(vectors), [""] * len(vectors), view)


def _place(answer: Answer, view: PolicyView) -> str:
    """Where the guard puts an item that it does not call novel."""
    if answer.category is None:
        return f"the guard finds it {answer.rating}: {answer.rationale}"
    name = view.taxonomy[answer.category].name
    return f"the guard puts it under {name}: {answer.rationale}"


def load_guard(name: str, model: SafetyModel) -> GuardNamer:
    """A guard by its name or folder.

    Args:
        name: ``mini-guard`` or a folder that ``train_guard.py`` wrote.
        model: the encoder whose points it reads.

    Raises:
        ConfigError: there is none, or it was trained on another encoder.
    """
    folder = Path(name)
    if name in GUARDS:
        folder = Path(str(resources.files("hysafe.assets").joinpath(GUARDS[name])))
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(
            f"no guard {name!r}. Known: {', '.join(GUARDS)}, or a folder with config.json and "
            "model.safetensors from train_guard.py."
        )
    return GuardNamer(GuardModel.load(folder), PhraseIndex.load(folder), model)


def name_novel(
    collection: Collection,
    model: SafetyModel,
    view: PolicyView,
    namer: GuardNamer,
    *,
    alpha: float = NOVEL_AT,
) -> dict[str, Naming]:
    """Names of the novel items of a collection, by item id; only these reach the guard.

    Items of one kind that stand close together borrow from one another, in portions of CHUNK.
    """
    places = novel_places(collection, alpha)
    found: dict[str, Naming] = {}
    for start in range(0, len(places), CHUNK):
        rows = collection.take(places[start : start + CHUNK].tolist())
        spoken = model.score_encoded(rows, view)
        groups: dict[tuple[str, ...], list[int]] = {}
        for k, row in enumerate(rows):
            groups.setdefault(tuple(c for c in CHANNELS if c in row.points), []).append(k)
        for channels, members in groups.items():
            if not channels:
                continue
            # of a long text the riskiest window, as in the scan
            vectors = {
                c: np.stack([spoken[c].vectors[spoken[c].at[k]] for k in members]) for c in channels
            }
            texts = [rows[k].text or rows[k].read_text for k in members]
            items = evidence_of(
                model, vectors, texts, namer.index, view, borrow=True,
                without=restated(namer.index.phrases, view),
            )  # fmt: skip
            for k, naming in zip(members, namer.names(items, view), strict=True):
                if naming is not None:
                    found[rows[k].id] = naming
    return found


def _said(path: Path) -> bool:
    """Whether a guard has said something in a results.jsonl."""
    with path.open("rb") as lines:
        return any(SAID in line for line in lines)


def write_names(path: Path, names: Mapping[str, Naming]) -> int:
    """Put names into the lines of a results.jsonl; what stood there before is replaced.

    Returns:
        Lines that have a name now.
    """
    if not names and not _said(path):
        return 0  # a long file is not written again for nothing
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    count = 0
    try:
        with path.open(encoding="utf-8") as lines, temporary.open("w", encoding="utf-8") as out:
            for line in lines:
                data = json.loads(line)
                naming = names.get(data["id"])
                before = len(data["novelty"])
                for key in ("name", "rationale"):
                    data["novelty"].pop(key, None)
                had = len(data["novelty"]) < before
                if naming is not None:
                    data["novelty"] |= {"name": naming.name or None, "rationale": naming.rationale}
                    count += bool(naming.name)
                changed = had or naming is not None
                out.write(json.dumps(data, ensure_ascii=False) + "\n" if changed else line)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count
