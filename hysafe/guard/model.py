"""The small decoder: points of the frozen encoder in, a rating, a place or a name out.

A prompt is a row of tokens in which some are points: the item (each of its channels as K tokens),
then the listed categories whose cones are nearest, each as a slot and the apex of its cone, then the
nearest phrases of a list, each as a pointer and its point (the first also in words), and the beginning
of the item's text. A name is one of these phrases, by its pointer, or words of the decoder's own. The answer names a slot, so
a category may stand under any id, in any order, in any company; :meth:`GuardModel.spell` writes the
slot's id into the answer of :mod:`hysafe.guard.protocol`. Answers are drawn from the well-formed
ones only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from hysafe.encoder.towers import quiet_transformers
from hysafe.errors import ConfigError, ShapeError
from hysafe.guard.policy import Completions
from hysafe.guard.protocol import (
    MAX_NAME_WORDS,
    Entry,
    ParseError,
    PromptPolicy,
    load_object,
    tidy,
)
from hysafe.types import Rating

if TYPE_CHECKING:
    from hysafe.encoder import HyperbolicEncoder
    from hysafe.encoder.towerless import TowerlessEncoder

__all__ = [
    "NOVEL",
    "UNSAFE",
    "Evidence",
    "GuardConfig",
    "GuardModel",
    "GuardProcessor",
    "PolicySpace",
    "train_tokenizer",
]

# Listed categories a prompt shows at most; what is farther than eight others is not the answer.
SLOTS = 8
# Tokens each channel of an item is given.
POINT_TOKENS = 4
# Numbers beside the tangent vector of a point, see :func:`_features`.
NUMBERS = 6
KINDS = ("text", "image", "ocr", "entry")
# The beginning of the text that is read, in tokens; phrases shown, and shown in words; limits of an answer, in tokens.
TEXT_TOKENS = 24
PHRASES = 12
SPELLED = 3
NAME_TOKENS = 20
RATIONALE_TOKENS = 40

PAD, EOS, POINT, ITEM, POLICY, ALLOWED, NEAR, TEXT, NAME, ANSWER = (
    "<pad>", "<eos>", "<point>", "<item>", "<policy>", "<allowed>", "<near>", "<text>", "<name>",
    "<answer>",
)  # fmt: skip
SAFE, UNSAFE, REVIEW, NONE, NOVEL, WHY = (
    "<safe>", "<unsafe>", "<review>", "<none>", "<novel>", "<why>",
)  # fmt: skip
RATING_TOKENS: dict[str, Rating] = {SAFE: "safe", UNSAFE: "unsafe", REVIEW: "review"}
SLOT_TOKENS = tuple(f"<c{i}>" for i in range(SLOTS))
PHRASE_TOKENS = tuple(f"<n{i}>" for i in range(PHRASES))
SPECIAL = (
    PAD, EOS, POINT, ITEM, POLICY, ALLOWED, NEAR, TEXT, NAME, ANSWER, *RATING_TOKENS, NONE, NOVEL,
    WHY, *SLOT_TOKENS, *PHRASE_TOKENS,
)  # fmt: skip
_NAME_TOKEN = re.compile(r" ?[A-Za-z0-9&,/'’.-]*")
# Logits of what may not follow.
_NEVER = torch.finfo(torch.float32).min


# ---------------------------------------------------------------- what goes in


@dataclass(frozen=True)
class PolicySpace:
    """The nodes a policy may list, as cones.

    Args:
        ids: node ids.
        apexes: tangent vectors [N, D] of their apexes.
    """

    ids: tuple[str, ...]
    apexes: Tensor

    def __post_init__(self) -> None:
        if self.apexes.ndim != 2 or len(self.ids) != len(self.apexes):
            raise ShapeError(
                f"apexes expected [{len(self.ids)}, D], got {tuple(self.apexes.shape)}. One per id."
            )

    def rows(self) -> dict[str, int]:
        """Row of each node."""
        return {n: i for i, n in enumerate(self.ids)}

    def columns(self, policy: PromptPolicy) -> list[int]:
        """Rows of the nodes that a policy lists and the space knows."""
        rows = self.rows()
        return [rows[e.node] for e in policy.entries if e.node in rows]


@dataclass(frozen=True)
class Evidence:
    """What the encoder says of one item; no policy of a prompt plays a part.

    Args:
        channels: text, image or ocr, each M-th one with a point.
        vectors: tangent vectors [M, D].
        p_unsafe, distribution: calibrated probability of any risk, allowed or not, and p-value of
            novelty [M]; NaN for none.
        margins, scores: of the item in the cones of the space's nodes [N].
        text: given or read.
        phrases: what may name it, from a list, the best first.
        phrase_vectors, phrase_scores, phrase_cosines: their tangent vectors [k, D], their agreement [k]
            and cosines [k], see :meth:`hysafe.guard.corpus.PhraseIndex.choose`; without them none can be
            pointed at.
    """

    channels: tuple[str, ...]
    vectors: np.ndarray
    p_unsafe: np.ndarray
    distribution: np.ndarray
    margins: np.ndarray
    scores: np.ndarray
    text: str = ""
    phrases: tuple[str, ...] = ()
    phrase_vectors: np.ndarray | None = None
    phrase_scores: np.ndarray | None = None
    phrase_cosines: np.ndarray | None = None


def _features(
    kind: str,
    vectors: Tensor,
    *,
    token: int = 0,
    margin: float = 0.0,
    score: float = 0.0,
    p_unsafe: float = 0.0,
    distribution: float = 0.0,
    allowed: bool = False,
) -> Tensor:
    """One point [D] as the projector takes it [D + NUMBERS + kinds + tokens]."""
    numbers = (float(vectors.norm()) / 2, margin, score, p_unsafe, distribution, float(allowed))
    marks = torch.zeros(len(KINDS) + POINT_TOKENS)
    marks[KINDS.index(kind)] = 1.0
    marks[len(KINDS) + token] = 1.0
    return torch.cat([vectors.float(), torch.tensor(numbers), marks])


def point_width(dim: int) -> int:
    """Width of a point as the projector takes it, for tangent vectors of `dim`."""
    return dim + NUMBERS + len(KINDS) + POINT_TOKENS


def _log_odds(p: float) -> float:
    if math.isnan(p):
        return 0.0
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p)) / 4


# ---------------------------------------------------------------- tokens


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, in lower case, with the guard's special tokens.

    Args:
        texts: what its merges are learnt from.
        vocab: size with special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


# Tokens, points, ids behind the slots, which of them are allowed, phrases behind the pointers.
_Row = tuple[list[int], list[Tensor], list[str], list[bool], list[str]]


class GuardProcessor:
    """Evidence and policies to the decoder's batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        ids: Any = tokenizer.convert_tokens_to_ids(list(SPECIAL))
        missing = [t for t, i in zip(SPECIAL, ids, strict=True) if i is None or i < 0]
        if missing:
            raise ConfigError(
                f"the tokenizer has no {' '.join(missing)}. Make it with train_tokenizer."
            )
        self.special = dict(zip(SPECIAL, ids, strict=True))
        self.slots = [self.special[t] for t in SLOT_TOKENS]
        self.pointers = [self.special[t] for t in PHRASE_TOKENS]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GuardProcessor:
        """Read the tokenizer beside a model."""
        return cls(PreTrainedTokenizerFast.from_pretrained(str(folder)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder."""
        self.tokenizer.save_pretrained(str(folder))

    def words(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of text from outside; it cannot spell a special token."""
        plain = re.sub(r"[<>]", " ", tidy(text))
        found: list[int] = self.tokenizer.encode(plain, add_special_tokens=False)
        return found[:limit]

    def judge(
        self,
        items: Sequence[Evidence],
        policies: Sequence[PromptPolicy],
        space: PolicySpace,
    ) -> dict[str, Any]:
        """Prompts that ask for a verdict.

        Returns:
            input_ids, attention_mask [B, T], points [B, S, F], and the ids behind the slots.
        """
        rows = space.rows()
        made = [
            self._judge(item, policy, space, rows)
            for item, policy in zip(items, policies, strict=True)
        ]
        return self._batch(made)

    def describe(self, items: Sequence[Evidence]) -> dict[str, Any]:
        """Prompts that ask for a phrase that stands where the item stands."""
        s = self.special
        made: list[_Row] = []
        for item in items:
            tokens, points = self._item(item)
            made.append(([*tokens, s[NAME]], points, [], [], []))
        return self._batch(made)

    def _judge(
        self, item: Evidence, policy: PromptPolicy, space: PolicySpace, rows: Mapping[str, int]
    ) -> _Row:
        s = self.special
        tokens, points = self._item(item)
        known = [e for e in policy.entries if e.node in rows]
        near = sorted(known, key=lambda e: -float(item.margins[rows[e.node]]))[:SLOTS]
        tokens.append(s[POLICY])
        for slot, entry in zip(self.slots, near, strict=False):
            row = rows[entry.node]
            points.append(
                _features(
                    "entry", space.apexes[row], margin=float(item.margins[row]),
                    score=_log_odds(float(item.scores[row])), allowed=entry.allowed,
                )
            )  # fmt: skip
            tokens += [slot, s[POINT], *([s[ALLOWED]] if entry.allowed else [])]
        pointed = self._phrases(item, near, tokens, points)
        if item.text:
            tokens += [s[TEXT], *self.words(item.text, TEXT_TOKENS)]
        ids = [policy.renaming.prompt_id(e.node) for e in near]
        return [*tokens, s[ANSWER]], points, ids, [e.allowed for e in near], pointed

    def _phrases(
        self, item: Evidence, near: Sequence[Entry], tokens: list[int], points: list[Tensor]
    ) -> list[str]:
        """Put the nearest phrases into a prompt; those that can be pointed at."""
        s = self.special
        listed = {e.name.casefold() for e in near}
        shown = [k for k, p in enumerate(item.phrases) if p.casefold() not in listed][:PHRASES]
        pointed = []
        for place, k in enumerate(shown):
            given = item.phrase_vectors, item.phrase_scores, item.phrase_cosines
            if all(g is not None for g in given):
                vector, score, cosine = (torch.as_tensor(g[k]).float() for g in given)  # type: ignore[index]
                points.append(
                    _features("entry", vector, token=1, margin=float(score), score=float(cosine))
                )
                tokens += [self.pointers[place], s[POINT]]
                pointed.append(item.phrases[k])
            if place < SPELLED:
                tokens += [s[NEAR], *self.words(item.phrases[k], NAME_TOKENS)]
        return pointed

    def _item(self, item: Evidence) -> tuple[list[int], list[Tensor]]:
        points = [
            _features(
                kind, torch.as_tensor(item.vectors[m]), token=k,
                p_unsafe=_log_odds(float(item.p_unsafe[m])),
                distribution=_log_odds(float(item.distribution[m])),
            )
            for m, kind in enumerate(item.channels)
            for k in range(POINT_TOKENS)
        ]  # fmt: skip
        return [self.special[ITEM], *[self.special[POINT]] * len(points)], points

    def _batch(self, made: Sequence[_Row]) -> dict[str, Any]:
        length = max(len(tokens) for tokens, *_ in made)
        most = max(len(points) for _, points, *_ in made)
        ids = torch.full((len(made), length), self.special[PAD])
        mask = torch.zeros(len(made), length, dtype=torch.long)
        stack = torch.zeros(len(made), most, len(made[0][1][0]))
        for i, (tokens, points, *_) in enumerate(made):
            ids[i, length - len(tokens) :] = torch.tensor(tokens)
            mask[i, length - len(tokens) :] = 1
            stack[i, : len(points)] = torch.stack(points)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "points": stack,
            "slot_ids": [m[2] for m in made],
            "slot_allowed": [m[3] for m in made],
            "phrases": [m[4] for m in made],
        }


# ---------------------------------------------------------------- the shape of an answer

_RATING, _VERDICT, _PLACED, _IN_NAME, _IN_WHY, _PHRASE, _DONE = range(7)


class AnswerShape:
    """Which tokens may follow in an answer: rating, verdict, rationale; or a phrase.

    Args:
        processor: whose tokens.
        vocab: size of the model's vocabulary.
    """

    def __init__(self, processor: GuardProcessor, vocab: int) -> None:
        tokenizer, s = processor.tokenizer, processor.special
        texts = [str(tokenizer.decode([i])) if i < len(tokenizer) else "" for i in range(vocab)]
        special = set(s.values())
        plain = [i not in special and i < len(tokenizer) and bool(texts[i]) for i in range(vocab)]
        named = [p and bool(_NAME_TOKEN.fullmatch(t)) for p, t in zip(plain, texts, strict=True)]
        self.name = torch.tensor(named)
        self.free = torch.tensor(
            [p and t.isprintable() and "�" not in t for p, t in zip(plain, texts, strict=True)]
        )
        self.begins = torch.tensor(
            [n and t.startswith(" ") for n, t in zip(named, texts, strict=True)]
        )
        self.first = torch.tensor(
            [
                n and len(t) > 1 and t[0] == " " and t[1].isalpha()
                for n, t in zip(named, texts, strict=True)
            ]
        )
        self.s, self.slots, self.vocab = s, processor.slots, vocab
        self.pointers = processor.pointers

    def start(self, prompts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of each of B answers before its first token."""
        n = len(prompts["input_ids"])
        last = prompts["input_ids"][:, -1]
        asks = torch.where(last == self.s[NAME], _PHRASE, _RATING)
        listed = torch.zeros(n, len(self.slots), dtype=torch.bool)
        allowed = torch.zeros(n, len(self.slots), dtype=torch.bool)
        for i, flags in enumerate(prompts["slot_allowed"]):
            listed[i, : len(flags)] = True
            allowed[i, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
        pointed = torch.tensor([len(p) for p in prompts["phrases"]])
        phrases = torch.arange(len(self.pointers))[None] < pointed[:, None]
        zeros = torch.zeros(n, dtype=torch.long)
        return {
            "part": asks, "forbidden": listed & ~allowed, "allowed": allowed,
            "phrases": phrases, "safe": zeros > 0,
            "review": zeros > 0, "tokens": zeros.clone(), "words": zeros.clone(),
        }  # fmt: skip

    def allowed(self, state: Mapping[str, Tensor], *, rationale: bool = True) -> Tensor:
        """Tokens that may follow, bool [B, V].

        Args:
            rationale: without it the answer ends where the rationale would begin.
        """
        s, part = self.s, state["part"]
        may = torch.zeros(len(part), self.vocab, dtype=torch.bool)
        may[:, s[EOS]] = part == _DONE
        for token in RATING_TOKENS:
            may[:, s[token]] = part == _RATING
        verdict = part == _VERDICT
        unsafe = verdict & ~state["safe"] & ~state["review"]
        may[:, s[NOVEL]] = unsafe
        may[:, s[NONE]] = verdict & ~unsafe
        slots = torch.where(unsafe[:, None], state["forbidden"], state["allowed"])
        may[:, self.slots] = slots & (verdict & ~state["review"])[:, None]
        named = (part == _IN_NAME) | (part == _PHRASE)
        empty = state["tokens"] == 0
        goes_on = named & ~empty & (state["tokens"] < NAME_TOKENS)
        full = (state["words"] >= MAX_NAME_WORDS)[:, None] & self.begins[None]
        may |= (named & empty)[:, None] & self.first[None]
        begins = (part == _IN_NAME) & empty
        may[:, self.pointers] = state["phrases"] & begins[:, None]
        may |= goes_on[:, None] & self.name[None] & ~full
        may[:, s[WHY]] |= (part == _IN_NAME) & ~empty
        may[:, s[EOS]] |= (part == _PHRASE) & ~empty
        why = part == _IN_WHY
        if rationale:
            may |= (why & (state["tokens"] < RATIONALE_TOKENS))[:, None] & self.free[None]
        may[:, s[EOS]] |= why
        may[:, s[WHY]] |= part == _PLACED
        return may

    def advance(self, state: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """The state after one more token of each answer [B]."""
        s, part = self.s, state["part"]
        new = part.clone()
        new[part == _RATING] = _VERDICT
        new[part == _VERDICT] = _PLACED
        new[(part == _VERDICT) & (tokens == s[NOVEL])] = _IN_NAME
        pointer = torch.isin(tokens, torch.tensor(self.pointers))
        new[(part == _IN_NAME) & pointer] = _PLACED
        new[tokens == s[WHY]] = _IN_WHY
        new[tokens == s[EOS]] = _DONE
        inside = (new == part) & ((part == _IN_NAME) | (part == _PHRASE) | (part == _IN_WHY))
        return {
            **state,
            "part": new,
            "safe": state["safe"] | ((part == _RATING) & (tokens == s[SAFE])),
            "review": state["review"] | ((part == _RATING) & (tokens == s[REVIEW])),
            "tokens": torch.where(
                inside, state["tokens"] + 1, torch.where(new == part, state["tokens"], 0)
            ),
            "words": state["words"] + (inside & self.begins[tokens]).long(),
        }

    def along(
        self, prompts: Mapping[str, Any], tokens: Tensor, *, rationale: bool = True
    ) -> Tensor:
        """Tokens that might have stood at each place of answers [B, T]: bool [B, T, V]."""
        state, found = self.start(prompts), []
        for t in range(tokens.shape[1]):
            found.append(self.allowed(state, rationale=rationale))
            state = self.advance(state, tokens[:, t])
        return torch.stack(found, 1)


# ---------------------------------------------------------------- the model


class GuardConfig(PreTrainedConfig):
    """Configuration of :class:`GuardModel`.

    Args:
        text_config: of any causal language model.
        point_width: F, see :func:`point_width`.
        point_token_id: the token that stands for a point.
        encoder_hash: of the encoder whose points it was trained on; another's mean nothing to it.
        text_hash: of that encoder without its image side.
    """

    model_type = "hysafe-guard"
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: dict | PreTrainedConfig | None = None
    point_width: int = 142
    point_token_id: int = 2
    encoder_hash: str = ""
    text_hash: str = ""
    tie_word_embeddings: bool = True


class GuardModel(PreTrainedModel, GenerationMixin):
    """A causal language model that reads points among its tokens; see the module.

    It implements :class:`hysafe.guard.policy.Decoder` once it has a processor.
    """

    config_class = GuardConfig
    config: GuardConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: GuardConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        width = self.width
        self.projector = nn.Sequential(
            nn.Linear(config.point_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.processor: GuardProcessor | None = None
        # Without it answers end where the rationale would begin: half the time, for rewards.
        self.rationale = True
        self._shape: AnswerShape | None = None
        self.post_init()

    @property
    def width(self) -> int:
        """W, the width of the hidden states."""
        text: Any = self.config.text_config
        return int(text.hidden_size)

    @classmethod
    def new(
        cls,
        processor: GuardProcessor,
        *,
        dim: int,
        width: int = 256,
        layers: int = 6,
        heads: int = 4,
        encoder_hash: str = "",
        text_hash: str = "",
    ) -> GuardModel:
        """A small Llama with random weights for a tokenizer and for points of `dim`."""
        vocab = len(processor.tokenizer)
        text = LlamaConfig(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads,
            intermediate_size=width * 8 // 3 // 16 * 16, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=processor.special[EOS],
            pad_token_id=processor.special[PAD], initializer_range=0.02,
        )  # fmt: skip
        settings: dict[str, Any] = {
            "pad_token_id": processor.special[PAD], "eos_token_id": processor.special[EOS]
        }  # fmt: skip
        model = cls(
            GuardConfig(
                text_config=text, point_width=point_width(dim),
                point_token_id=processor.special[POINT], encoder_hash=encoder_hash,
                text_hash=text_hash, **settings,
            )
        )  # fmt: skip
        model.processor = processor
        return model

    def reads(self, encoder: HyperbolicEncoder | TowerlessEncoder) -> bool:
        """Whether it was trained on the points of this encoder.

        Another image side under the same texts and nodes will do: pictures are put where their
        texts and nodes are.
        """
        if self.config.encoder_hash in ("", encoder.hash()):
            return True
        return bool(self.config.text_hash) and self.config.text_hash == encoder.text_hash()

    @classmethod
    def load(cls, folder: str | Path) -> GuardModel:
        """A saved model with its processor, in evaluation mode, offline, from safetensors."""
        path = Path(folder)
        if not (path / "model.safetensors").is_file():
            raise ConfigError(
                f"{path} holds no guard: no model.safetensors. Make one with train_guard.py."
            )
        with quiet_transformers():
            model = cls.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
        model.processor = GuardProcessor.from_pretrained(path)
        return model.float().eval()  # type: ignore[no-any-return]

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json, model.safetensors and the tokenizer."""
        state = {k: v.to(dtype) for k, v in self.state_dict().items()}
        with quiet_transformers():
            self.save_pretrained(str(folder), state_dict=state)
        self._processor().save_pretrained(folder)

    # ------------------------------------------------------------ transformers

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        points: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with `labels` [B, T] (-100 is left out) the loss as well.

        Args:
            points: [B, S, F] in the order of the point tokens of each row; rows with fewer are
                padded at the end. Left out where `input_ids` hold none.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ShapeError("forward wants input_ids [B, T] or inputs_embeds [B, T, W].")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            place = input_ids == self.config.point_token_id
            if points is not None and bool(place.any()):
                inputs_embeds = self._with_points(inputs_embeds, place, points)
        for name in ("slot_ids", "slot_allowed", "phrases"):
            kwargs.pop(name, None)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
        )
        return output

    def _with_points(self, embeds: Tensor, place: Tensor, points: Tensor) -> Tensor:
        counts = place.sum(-1)
        if int(counts.max()) > points.shape[1]:
            raise ShapeError(
                f"a row has {int(counts.max())} point tokens, points are {tuple(points.shape)}. "
                "Give [B, S, F] with S at least that."
            )
        given = torch.arange(points.shape[1], device=points.device)[None] < counts[:, None]
        soft = self.projector(points[given].to(next(self.projector.parameters()).dtype))
        return embeds.masked_scatter(place[..., None], soft.to(embeds.dtype))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Points go in with the prompt, once."""
        points = kwargs.pop("points", None)
        parent: Any = super()
        made: dict[str, Any] = parent.prepare_inputs_for_generation(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            made["points"] = points
        return made

    # ------------------------------------------------------------ hysafe.guard.policy.Decoder

    def _processor(self) -> GuardProcessor:
        if self.processor is None:
            raise ConfigError("the guard has no processor. Load it with GuardModel.load(folder).")
        return self.processor

    @property
    def tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens."""
        return self._processor().special

    def prompts(
        self, items: Sequence[Evidence], policies: Sequence[PromptPolicy], space: PolicySpace
    ) -> dict[str, Any]:
        """Prompts that ask for verdicts, see :meth:`GuardProcessor.judge`."""
        return self._processor().judge(items, policies, space)

    @property
    def shape(self) -> AnswerShape:
        """Which answers are well-formed."""
        if self._shape is None:
            embeddings: Any = self.get_output_embeddings()
            vocab = int(embeddings.weight.shape[0])
            self._shape = AnswerShape(self._processor(), vocab)
        return self._shape

    @torch.no_grad()
    def sample(
        self,
        prompts: Mapping[str, Any],
        n: int = 1,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        begin: Sequence[str] = (),
    ) -> Completions:
        """n well-formed answers to each prompt; see :class:`hysafe.guard.policy.Decoder`.

        Args:
            begin: tokens that every answer begins with: ``(UNSAFE, NOVEL)`` asks for a name alone.
        """
        s, shape = self._processor().special, self.shape
        was_training = self.training
        self.eval()
        output = self(**_tensors(prompts), use_cache=True, logits_to_keep=1)
        past, logits = output.past_key_values, output.logits[:, -1]
        if n > 1:
            past.batch_repeat_interleave(n)
            logits = logits.repeat_interleave(n, 0)
            prompts = self.repeat(prompts, n)
        state, mask = shape.start(prompts), prompts["attention_mask"]
        position = mask.sum(-1, keepdim=True)
        drawn: list[Tensor] = []
        judged: list[Tensor] = []
        going = torch.ones(len(mask), dtype=torch.bool)
        while bool(going.any()):
            may = shape.allowed(state, rationale=self.rationale)
            if len(drawn) < len(begin):
                may = torch.zeros_like(may)
                may[:, s[begin[len(drawn)]]] = True
            scores = logits.float().masked_fill(~may, _NEVER)
            if temperature > 0:
                odds = (scores / temperature).softmax(-1)
                tokens = torch.multinomial(odds, 1, generator=generator).squeeze(-1)
            else:
                tokens = scores.argmax(-1)
            drawn.append(torch.where(going, tokens, s[PAD]))
            judged.append(going.clone())
            state = shape.advance(state, tokens)
            going = going & (tokens != s[EOS])
            if not bool(going.any()):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
            output = self(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=position,
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            past, logits, position = output.past_key_values, output.logits[:, -1], position + 1
        self.train(was_training)
        tokens, answered = torch.stack(drawn, 1), torch.stack(judged, 1)
        return Completions(tokens, answered, self.spell(prompts, tokens))

    def pointer_log_probs(self, prompts: Mapping[str, Any]) -> Tensor:
        """How likely each phrase of the prompts is as the name of a novel risk, among those that
        can be pointed at: [B, 12], -inf beyond the last one."""
        there = [[True] * len(p) for p in prompts["phrases"]]
        return self._choice(prompts, (UNSAFE, NOVEL), self._processor().pointers, there)

    def slot_log_probs(self, prompts: Mapping[str, Any]) -> Tensor:
        """How likely each category that the prompts list is as that of a risky item, novelty left
        out: [B, 8], -inf for allowed ones and beyond the last one."""
        there = [[not a for a in allowed] for allowed in prompts["slot_allowed"]]
        return self._choice(prompts, (UNSAFE,), self._processor().slots, there)

    @torch.no_grad()
    def _choice(
        self, prompts: Mapping[str, Any], begin: Sequence[str], choices: Sequence[int],
        there: Sequence[Sequence[bool]],
    ) -> Tensor:  # fmt: skip
        """Log-probabilities [B, C] of the next token after `begin` among the choices that are there
        in each prompt."""
        s, given = self.tokens, _tensors(prompts)
        after = torch.tensor([[s[t] for t in begin]]).repeat(len(given["input_ids"]), 1)
        mask = torch.cat([given["attention_mask"], torch.ones_like(after)], -1)
        output = self(
            input_ids=torch.cat([given["input_ids"], after], -1), attention_mask=mask,
            points=given["points"], position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=1, use_cache=False,
        )  # fmt: skip
        logits = output.logits[:, -1, list(choices)].float()
        may = torch.zeros_like(logits, dtype=torch.bool)
        for row, known in zip(may, there, strict=True):
            row[: len(known)] = torch.tensor(known, dtype=torch.bool)
        return logits.masked_fill(~may, _NEVER).log_softmax(-1).masked_fill(~may, -math.inf)

    def spell(self, prompts: Mapping[str, Any], tokens: Tensor) -> list[str]:
        """Answers [B, T] as texts: the protocol's JSON, or a phrase where one was asked for."""
        processor = self._processor()
        asks = prompts["input_ids"][:, -1] == processor.special[NAME]
        return [
            self._words(row) if bool(phrase) else self._answer(row, ids, near)
            for row, phrase, ids, near in zip(
                tokens.tolist(), asks, prompts["slot_ids"], prompts["phrases"], strict=True
            )
        ]

    def _words(self, tokens: Sequence[int]) -> str:
        processor = self._processor()
        special = set(processor.special.values())
        kept = [t for t in tokens if t not in special]
        return str(processor.tokenizer.decode(kept)).strip()

    def _answer(self, tokens: Sequence[int], ids: Sequence[str], near: Sequence[str]) -> str:
        s = self._processor().special
        names = {v: k for k, v in s.items()}
        rating = RATING_TOKENS.get(names.get(tokens[0], ""))
        why = tokens.index(s[WHY]) if s[WHY] in tokens else len(tokens)
        if rating is None or len(tokens) < 2:
            return self._words(tokens)
        body: dict[str, str | None] = {"rating": rating}
        if tokens[1] == s[NOVEL]:
            pointer = names.get(tokens[2], "") if len(tokens) > 2 else ""
            place = PHRASE_TOKENS.index(pointer) if pointer in PHRASE_TOKENS else len(near)
            body["novel"] = near[place] if place < len(near) else self._words(tokens[2:why])
        elif names.get(tokens[1]) in SLOT_TOKENS:
            slot = SLOT_TOKENS.index(names[tokens[1]])
            body["category"] = ids[slot] if slot < len(ids) else None
        else:
            body["category"] = None
        body["rationale"] = self._words(tokens[why:])
        return json.dumps(body, ensure_ascii=False)

    def complete(self, prompts: Mapping[str, Any], texts: Sequence[str]) -> Completions:
        """Answers given as texts, as :meth:`sample` would have returned them.

        Raises:
            ConfigError: a text is no answer to its prompt, or names no slot of it.
        """
        s = self._processor().special
        asks = prompts["input_ids"][:, -1] == s[NAME]
        rows = [
            [*self._processor().words(text, NAME_TOKENS), s[EOS]]
            if bool(phrase)
            else self._tokens(text, ids, near)
            for text, phrase, ids, near in zip(
                texts, asks, prompts["slot_ids"], prompts["phrases"], strict=True
            )
        ]
        length = max(map(len, rows))
        tokens = torch.full((len(rows), length), s[PAD])
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return Completions(tokens, mask, list(texts))

    def _tokens(self, text: str, ids: Sequence[str], near: Sequence[str]) -> list[int]:
        s, words = self._processor().special, self._processor().words
        body = load_object(text, 8192)
        rating = {v: k for k, v in RATING_TOKENS.items()}
        if isinstance(body, ParseError) or body.get("rating") not in rating:
            raise ConfigError(f"{text[:80]!r} is no answer. Write it with write_answer.")
        row = [s[rating[body["rating"]]]]
        if body.get("novel") in near:
            row += [s[NOVEL], self._processor().pointers[list(near).index(body["novel"])]]
        elif body.get("novel"):
            row += [s[NOVEL], *words(body["novel"], NAME_TOKENS)]
        elif body.get("category") is None:
            row.append(s[NONE])
        elif body["category"] in ids:
            row.append(self._processor().slots[list(ids).index(body["category"])])
        else:
            raise ConfigError(f"{body['category']!r} has no slot in its prompt; {list(ids)} have.")
        return [*row, s[WHY], *words(body.get("rationale") or "", RATIONALE_TOKENS), s[EOS]]

    def log_probs(
        self, prompts: Mapping[str, Any], completions: Completions
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T] among the tokens that may stand, and hidden states [B, T, W]."""
        tokens, answered = completions.tokens, completions.mask
        given = _tensors(prompts)
        start, length = given["input_ids"].shape[1], tokens.shape[1]
        mask = torch.cat([given["attention_mask"], answered.long()], -1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self(
            input_ids=torch.cat([given["input_ids"], tokens], -1), attention_mask=mask,
            points=given["points"], position_ids=position, output_hidden_states=True,
            logits_to_keep=length + 1, use_cache=False,
        )  # fmt: skip
        hidden = output.hidden_states[-1][:, start - 1 : start - 1 + length]
        may = self.shape.along(prompts, tokens, rationale=self.rationale)
        logits = output.logits[:, :length].float().masked_fill(~may, _NEVER)
        found = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return torch.where(answered, found, torch.zeros_like(found)), hidden

    def repeat(self, prompts: Mapping[str, Any], n: int) -> dict[str, Any]:
        """Every prompt n times, side by side."""
        return {
            k: v.repeat_interleave(n, 0)
            if isinstance(v, Tensor)
            else [x for x in v for _ in range(n)]
            for k, v in prompts.items()
        }


def _tensors(prompts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: prompts[k] for k in ("input_ids", "attention_mask", "points")}


AutoConfig.register("hysafe-guard", GuardConfig, exist_ok=True)
AutoModelForImageTextToText.register(GuardConfig, GuardModel, exist_ok=True)
