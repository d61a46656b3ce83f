r"""Rewards of the guard's training, with TRL's signature, and metrics that never are one.

A reward is ``reward(prompts, completions, **columns) -> list[float | None]``; None is "cannot judge"
and counts in no mean. The columns are those of :meth:`hysafe.guard.protocol.Episode.columns`. What
needs a taxonomy or an embedding model is made by a function that takes them. A row is *novel* when
it has a bank: its true category is not in the policy of its prompt.

:func:`proguard_reward` is the published form. :func:`guard_rewards` are ours; they repair its leaks:

=====================================  ========================  ===============================
leak                                   published                 ours
=====================================  ========================  ===============================
novel item put into a listed category  paid (floor, query term)  costs ``MISSED``
any text as a name                     floor of 0.5              0
thresholds                             0.7 and 0.6, any model    calibrated for each model
a listed category in other words       paid as similar           0
keywords, one word, a sentence         paid as similar           costs ``BAD_FORM``
a name from another branch             paid as similar           fades outside the parent's cone
refusing a benign sibling              0                         costs ``REFUSED``
an answer that ignores the policy      paid on one twin          paid on both twins or not
=====================================  ========================  ===============================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hysafe.errors import ConfigError, InputError
from hysafe.geometry import Points
from hysafe.guard.formats import Reading, read
from hysafe.guard.protocol import (
    Answer,
    ParseError,
    PromptPolicy,
    parse_answer,
)
from hysafe.taxonomy import Taxonomy

__all__ = [
    "Reward",
    "Similarity",
    "Thresholds",
    "WuPalmer",
    "binary_reward",
    "calibrate_similarity",
    "category_reward",
    "completion_text",
    "cone_margins",
    "cone_reward",
    "cosine_similarity",
    "format_reward",
    "guard_rewards",
    "is_well_formed",
    "novel_name_reward",
    "over_refusal_reward",
    "pay_together",
    "proguard_novelty",
    "proguard_reward",
    "token_f1",
    "total_reward",
]

Reward = Callable[..., list[float | None]]
# names [A], phrases [M] -> similarities [A, M]
Similarity = Callable[[Sequence[str], Sequence[str]], Tensor]
# names [A], parents [A] -> cone margins [A] in radians, > 0 inside
ConeMargins = Callable[[Sequence[str], Sequence[str]], Tensor]

# Synonym banks hold phrases of 2 to 6 words; so must a name.
NAME_WORDS = (2, 6)
# A category's name joins up to three things ("A, B & C"). Five words or more without one that
# binds them are keywords. All rules together refuse 2 of the 510 phrases of the bundled banks.
MAX_JOINTS = 2
BARE_WORDS = 5
# Costs. A missed novel item is worse than a bad name for it, or naming would not be tried; both
# errors of detection (missed, or novel without need) cost alike, so that neither answer is a bet.
MISSED = 0.5
BAD_FORM = 0.25
REFUSED = 1.0
MALFORMED = 1.0
# Radians outside the parent's cone over which the reward fades to 0, as a slope to learn from.
CONE_SLACK = 0.2
# Quantiles of the calibration.
UNRELATED_QUANTILE = 0.95
SYNONYM_QUANTILE = 0.5
# ProGuard's thresholds, for its own embedding model.
PUBLISHED = {"max": 0.7, "mean": 0.6, "floor": 0.5}

_CACHED = 65_536
_FUNCTION_WORDS = frozenset((
    "a", "an", "the", "of", "and", "or", "in", "on", "for", "to", "with", "without", "by",
    "from", "at", "as", "via", "into", "about", "against", "over", "who", "that", "which",
    "what", "how", "their", "them", "they", "its", "it", "is", "are", "be", "not", "no",
))  # fmt: skip


# ---------------------------------------------------------------- plain rewards


def format_reward(
    prompts: Sequence[Any], completions: Sequence[Any], *, policy: Sequence[str], **columns: Any
) -> list[float | None]:
    """1 for an answer that parses under the prompt's policy, 0 for any other."""
    return [float(isinstance(a, Answer)) for a in _answers(completions, policy)]


def binary_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    policy: Sequence[str],
    rating: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """1 for the right rating, else 0 (review is never right); None without a true rating."""
    return [
        None if true is None else float(a.rating == true)
        for a, true in zip(_answers(completions, policy), rating, strict=True)
    ]


def category_reward(taxonomy: Taxonomy, *, needless: float = 0.0) -> Reward:
    """Credit for the category of listed, unsafe items: depth of the lowest common ancestor over
    depth of the truth. 1 is exact, 1/2 the right domain for a category, 0 another domain.

    Args:
        taxonomy: the tree.
        needless: cost of a novel name where a listed category holds the item.

    Returns:
        Reward over the columns policy, rating, category; None for safe and for novel rows.
    """

    def category(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        policy: Sequence[str],
        rating: Sequence[str | None],
        category: Sequence[str | None],
        **columns: Any,
    ) -> list[float | None]:
        found: list[float | None] = []
        rows = zip(_answers(completions, policy), rating, category, strict=True)
        for answer, true_rating, true in rows:
            if true is None or true_rating != "unsafe":
                found.append(None)
            elif not isinstance(answer, Answer) or answer.rating != "unsafe":
                found.append(0.0)
            elif answer.category is None:
                found.append(-needless)
            else:
                line, said = taxonomy.path(true).ids, taxonomy.path(answer.category).ids
                found.append(len(set(line) & set(said)) / len(line))
        return found

    return category


def over_refusal_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    policy: Sequence[str],
    benign_of: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """Cost of rating the benign sibling of a category unsafe: -1, else 0; None for other rows."""
    return [
        None if sibling is None else (-REFUSED if a.rating == "unsafe" else 0.0)
        for a, sibling in zip(_answers(completions, policy), benign_of, strict=True)
    ]


def pay_together(reward: Reward) -> Reward:
    """Policy twins get the lesser reward of the two: the i-th completion of each side with the
    i-th of the other.

    Rows with one value in the column ``pair`` belong together; they are told apart by ``policy``.
    A row whose twin is not in the batch cannot be judged. Rows without a pair are left alone.
    """

    @wraps(reward)
    def together(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        own = reward(prompts, completions, **columns)
        pair, policy = columns.get("pair"), columns["policy"]
        if pair is None:
            return own
        sides: dict[str, dict[str, list[int]]] = {}
        for i, name in enumerate(pair):
            if name is not None:
                sides.setdefault(name, {}).setdefault(policy[i], []).append(i)
        paid = list(own)
        for by_policy in sides.values():
            lists = list(by_policy.values())
            for rows in lists:
                for i in rows:
                    paid[i] = None
            if len(lists) < 2:
                continue
            for matched in zip(*lists, strict=False):
                values = [own[i] for i in matched]
                known = [v for v in values if v is not None]
                for i in matched:
                    paid[i] = min(known) if len(known) == len(values) else None
        return paid

    return together


def total_reward(terms: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> Reward:
    """The weighted sum of the terms that can judge; None where none can.

    Raises:
        ConfigError: a weight for no term.
    """
    scale = dict.fromkeys(terms, 1.0) | dict(weights or {})
    if set(scale) != set(terms):
        raise ConfigError(
            f"weights for {sorted(set(scale) - set(terms))}, which are no terms. Known: "
            f"{', '.join(terms)}."
        )

    def total(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        judged = [
            [None if v is None else scale[name] * v for v in term(prompts, completions, **columns)]
            for name, term in terms.items()
        ]
        sums: list[float | None] = []
        for values in zip(*judged, strict=True):
            known = [v for v in values if v is not None]
            sums.append(sum(known) if known else None)
        return sums

    return total


# ---------------------------------------------------------------- similarity


def cosine_similarity(embed: Callable[[Sequence[str]], Tensor]) -> Similarity:
    """Similarity by the cosine of embeddings; each text is embedded once.

    Args:
        embed: texts [N] -> embeddings [N, E].
    """
    cache: dict[str, Tensor] = {}

    def similarity(names: Sequence[str], phrases: Sequence[str]) -> Tensor:
        wanted = list(dict.fromkeys((*names, *phrases)))
        missing = [t for t in wanted if t not in cache]
        if missing:
            with torch.no_grad():
                units = torch.nn.functional.normalize(embed(missing).float(), dim=-1)
            cache.update(zip(missing, units.cpu(), strict=True))
        a = torch.stack([cache[t] for t in names])
        b = torch.stack([cache[t] for t in phrases])
        while len(cache) > _CACHED:
            del cache[next(iter(cache))]
        return a @ b.T

    return similarity


class Thresholds(NamedTuple):
    """Similarity to a bank that is worth nothing, and that is worth everything."""

    low: float
    high: float

    def score(self, similarity: float) -> float:
        """0 at `low` and below, 1 at `high` and above, linear between."""
        return min(1.0, max(0.0, (similarity - self.low) / (self.high - self.low)))


def calibrate_similarity(similarity: Similarity, banks: Sequence[Sequence[str]]) -> Thresholds:
    """Thresholds of one embedding model.

    A pair is a phrase and a bank; its similarity is that to the bank's nearest phrase, as the
    reward takes it (of pairs of single phrases the 95th percentile would be passed by chance,
    having ten tries a bank).

    Args:
        similarity: of the embedding model.
        banks: at least two, of at least two phrases.

    Returns:
        low: 95th percentile of phrases with the banks of others; high: median of phrases with the
        rest of their own.

    Raises:
        ConfigError: too few phrases, or the model cannot tell synonyms from strangers.
    """
    if len(banks) < 2 or min(map(len, banks)) < 2:
        raise ConfigError("calibration needs two banks or more, of two phrases or more each.")
    phrases = [p for bank in banks for p in bank]
    owner = torch.tensor([i for i, bank in enumerate(banks) for _ in bank])
    table = similarity(phrases, phrases).double().clone()
    same = torch.tensor([[a == b for b in phrases] for a in phrases])
    table[same] = -torch.inf  # a phrase is no synonym of itself
    nearest = torch.stack([table[:, owner == i].amax(-1) for i in range(len(banks))], -1)
    own = torch.nn.functional.one_hot(owner, len(banks)).bool()
    strangers, synonyms = nearest[~own], nearest[own]
    low = float(strangers[strangers.isfinite()].quantile(UNRELATED_QUANTILE))
    high = float(synonyms[synonyms.isfinite()].quantile(SYNONYM_QUANTILE))
    if not high > low:
        raise ConfigError(
            f"the median synonym ({high:.3f}) is no nearer than 95 % of strangers ({low:.3f}). "
            "Take another embedding model."
        )
    return Thresholds(low, high)


# ---------------------------------------------------------------- novel names


def is_well_formed(name: str) -> bool:
    """Whether a name is 2 to 6 words and no heap of keywords: no content word twice, not more than
    two joints (comma, slash, &, and), no five words without one that binds them."""
    words = _words(name)
    if not NAME_WORDS[0] <= len(name.split()) <= NAME_WORDS[1] or not words:
        return False
    content = [_stem(w) for w in words if w not in _FUNCTION_WORDS]
    joints = len(re.findall(r"[,;/|&+]|\band\b|\bor\b", name.lower()))
    bare = len(words) >= BARE_WORDS and len(content) == len(words)
    return len(set(content)) == len(content) > 0 and joints <= MAX_JOINTS and not bare


def novel_name_reward(
    similarity: Similarity,
    thresholds: Thresholds,
    *,
    cone: ConeMargins | None = None,
    missed: float = MISSED,
    bad_form: float = BAD_FORM,
) -> Reward:
    """What the name of a novel item is worth: -missed to 1.

    A listed category, a safe or a malformed answer is a missed item. A name of bad form costs, one
    that is nearer to a name the prompt shows (of a listed category, or of a domain above one) than
    to the bank is worth 0, any other what its similarity to the bank is by the thresholds, fading
    outside the cone of the hidden category's parent.

    Args:
        similarity, thresholds: of one embedding model, see :func:`calibrate_similarity`.
        cone: margins of names in the cones of parents, see :func:`cone_margins`; without it the
            geometry has no say.
        missed, bad_form: the costs.

    Returns:
        Reward over the columns policy, bank, parent; None for rows that are not novel.
    """

    def novel_name(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        policy: Sequence[str],
        bank: Sequence[Sequence[str] | None],
        parent: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        answers = _answers(completions, policy)
        rewards: list[float | None] = []
        judged = []
        for i, (answer, phrases) in enumerate(zip(answers, bank, strict=True)):
            if not phrases:
                rewards.append(None)
            elif not _named(answer):
                rewards.append(-missed)
            else:
                rewards.append(-bad_form)
                if is_well_formed(_named(answer)):
                    judged.append(i)
        if not judged:
            return rewards
        names = [_named(answers[i]) for i in judged]
        banks = [tuple(bank[i] or ()) for i in judged]
        shown = [_shown(policy[i]) for i in judged]
        scores = _scores(names, banks, shown, similarity, thresholds)
        if cone is not None:
            parents = [None if parent is None else parent[i] for i in judged]
            scores = [s * f for s, f in zip(scores, _inside(cone, names, parents), strict=True)]
        for i, score in zip(judged, scores, strict=True):
            rewards[i] = score
        return rewards

    return novel_name


def _scores(
    names: Sequence[str],
    banks: Sequence[tuple[str, ...]],
    shown: Sequence[tuple[str, ...]],
    similarity: Similarity,
    thresholds: Thresholds,
) -> list[float]:
    """Score of each name by its bank; 0 where it is nearer to what the prompt shows."""
    phrases = list(dict.fromkeys(p for group in (*banks, *shown) for p in group))
    column = {p: i for i, p in enumerate(phrases)}
    distinct = list(dict.fromkeys(names))
    table = dict(zip(distinct, similarity(distinct, phrases), strict=True))
    found = []
    for name, bank, others in zip(names, banks, shown, strict=True):
        row = table[name]
        own = float(row[[column[p] for p in bank]].max())
        other = float(row[[column[p] for p in others]].max()) if others else -1.0
        restated = other > own or _words(name) in [_words(p) for p in others]
        found.append(0.0 if restated else thresholds.score(own))
    return found


# ---------------------------------------------------------------- geometry


def cone_margins(
    encode: Callable[[Sequence[str]], Points], apexes: Points, nodes: Sequence[str]
) -> ConeMargins:
    """Margins of names in the cones of their parents.

    Args:
        encode: texts [A] -> their points, in the space of the apexes.
        apexes: points of the nodes.
        nodes: ids of the nodes, one per apex.

    Returns:
        Function (names [A], parents [A]) -> margins [A] in radians, > 0 inside, by
        :func:`hysafe.geometry.cones.pairwise_margin`.
    """
    column = {node: i for i, node in enumerate(nodes)}

    def margins(names: Sequence[str], parents: Sequence[str]) -> Tensor:
        unknown = [p for p in parents if p not in column]
        if unknown:
            raise ConfigError(f"no cone for node {unknown[0]!r}. Give its apex.")
        distinct = list(dict.fromkeys(names))
        with torch.no_grad():
            table = encode(distinct).margin(apexes)  # [A, N]
        place = {name: i for i, name in enumerate(distinct)}
        rows, columns = [place[n] for n in names], [column[p] for p in parents]
        return table[rows, columns]

    return margins


def cone_reward(cone: ConeMargins) -> Reward:
    """1 for a novel name inside its parent's cone, fading to 0 over ``CONE_SLACK`` radians outside;
    0 for a missed item, None for rows that are not novel or have no parent."""

    def name_in_cone(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        policy: Sequence[str],
        bank: Sequence[Sequence[str] | None],
        parent: Sequence[str | None],
        **columns: Any,
    ) -> list[float | None]:
        answers = _answers(completions, policy)
        found: list[float | None] = [
            0.0 if b and p is not None else None for b, p in zip(bank, parent, strict=True)
        ]
        named = [i for i, r in enumerate(found) if r is not None and _named(answers[i])]
        names, parents = [_named(answers[i]) for i in named], [parent[i] for i in named]
        for i, value in zip(named, _inside(cone, names, parents), strict=True):
            found[i] = value
        return found

    return name_in_cone


def _inside(cone: ConeMargins, names: Sequence[str], parents: Sequence[str | None]) -> list[float]:
    """Factor in [0, 1] of each name; 1 where it has no parent."""
    factors = [1.0] * len(names)
    known = [i for i, p in enumerate(parents) if p is not None]
    if known:
        margins = cone([names[i] for i in known], [str(parents[i]) for i in known])
        for i, factor in zip(known, (1 + margins / CONE_SLACK).clamp(0, 1).tolist(), strict=True):
            factors[i] = factor
    return factors


# ---------------------------------------------------------------- sets of rewards


def guard_rewards(
    similarity: Similarity,
    thresholds: Thresholds,
    taxonomy: Taxonomy,
    *,
    cone: ConeMargins | None = None,
) -> dict[str, Reward]:
    """Our terms by name: to be handed to TRL one by one, or summed by :func:`total_reward`.

    ======================  =====================  ==============================================
    term                    rows                   value
    ======================  =====================  ==============================================
    malformed               all                    0, or -1 where the answer does not parse
    right_rating            not novel              0 or 1; on policy twins both right or 0
    category                listed and unsafe      :func:`category_reward`, -0.5 for a needless name
    novel_name              novel                  :func:`novel_name_reward`
    over_refusal            benign siblings        0, or -1 where rated unsafe
    ======================  =====================  ==============================================

    No term pays on a novel row but the name: neither the rating nor the form is a floor.
    """

    def malformed(
        prompts: Sequence[Any], completions: Sequence[Any], *, policy: Sequence[str], **columns: Any
    ) -> list[float | None]:
        return [-MALFORMED * isinstance(a, ParseError) for a in _answers(completions, policy)]

    def right_rating(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        bank: Sequence[Sequence[str] | None],
        **columns: Any,
    ) -> list[float | None]:
        rated = binary_reward(prompts, completions, **columns)
        return [None if b else r for r, b in zip(rated, bank, strict=True)]

    return {
        "malformed": malformed,
        "right_rating": pay_together(right_rating),
        "category": category_reward(taxonomy, needless=MISSED),
        "novel_name": novel_name_reward(similarity, thresholds, cone=cone),
        "over_refusal": over_refusal_reward,
    }


def proguard_novelty(similarities: Sequence[float]) -> float:
    r"""ProGuard's category term for a novel item, from similarities s to its synonym bank.

    .. math:: 0.5 + \max\Bigl(0, \tfrac{0.5(\max s - 0.7)}{0.3}, \tfrac{0.5(\bar s - 0.6)}{0.4}\Bigr)

    Source: Yu et al. 2025 (ProGuard), the synonym-bank reward.
    """
    top, mean = max(similarities), sum(similarities) / len(similarities)
    floor, t_max, t_mean = PUBLISHED["floor"], PUBLISHED["max"], PUBLISHED["mean"]
    return floor + max(0.0, 0.5 * (top - t_max) / (1 - t_max), 0.5 * (mean - t_mean) / (1 - t_mean))


def proguard_reward(
    similarity: Similarity,
    *,
    answers: Literal["hysafe", "proguard"] = "hysafe",
    taxonomy: Taxonomy | None = None,
) -> Reward:
    r"""The published reward, to compare with: :math:`r = f \cdot (r_{query} + r_{response} +
    r_{category})`.

    The category term is :func:`proguard_novelty` on novel rows, whatever stands in the category's
    place; on others 1 for the exact category, or for none where the item is safe. The response term
    counts where there is a column ``response_rating`` and the format rates a response.

    Args:
        similarity: of the embedding model.
        answers: grammar of the completions: ours, or ProGuard's own.
        taxonomy: for its crosswalk; needed for ProGuard's grammar.

    Raises:
        ConfigError: ProGuard's grammar without a taxonomy.
    """
    if answers == "proguard" and taxonomy is None:
        raise ConfigError("reading ProGuard's answers needs a crosswalk. Pass taxonomy=.")

    def published(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        policy: Sequence[str],
        rating: Sequence[str | None],
        category: Sequence[str | None],
        bank: Sequence[Sequence[str] | None],
        response_rating: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        found: list[float | None] = []
        for i, completion in enumerate(completions):
            text = completion_text(completion)
            if taxonomy is not None and answers == "proguard":
                said = _said(read(text, "proguard", taxonomy))
            else:
                said = _said(parse_answer(text, _policy(policy[i])), _policy(policy[i]))
            if rating[i] is None:
                found.append(None)
                continue
            if said is None:  # f = 0
                found.append(0.0)
                continue
            query = float(said.query == rating[i])
            truth = None if response_rating is None else response_rating[i]
            response = float(truth is not None and said.response == truth)
            phrases = bank[i]
            if phrases:
                right = proguard_novelty(similarity([said.text], phrases)[0].tolist())
            elif rating[i] == "safe":
                right = float(said.text == "None")
            else:
                right = float(category[i] is not None and category[i] in said.nodes)
            found.append(query + response + right)
        return found

    return published


class _Said(NamedTuple):
    query: str
    response: str | None
    text: str  # in the category's place
    nodes: tuple[str, ...]


def _said(found: Answer | Reading | ParseError, policy: PromptPolicy | None = None) -> _Said | None:
    if isinstance(found, ParseError):
        return None
    if isinstance(found, Reading):
        text = found.novel or (found.codes[0] if found.codes else "None")
        return _Said(found.request or found.rating, found.response, text, found.nodes)
    text, nodes = found.novel or "None", ()
    if found.category is not None and policy is not None:
        return _Said(
            found.rating, None, policy.renaming.prompt_id(found.category), (found.category,)
        )
    return _Said(found.rating, None, text, nodes)


# ---------------------------------------------------------------- metrics that are never a reward


def token_f1(name: str, bank: Iterable[str]) -> float:
    """Greatest F1 of the stemmed content words of a name and of a phrase of the bank, in [0, 1]."""
    said = Counter(_content(name))
    best = 0.0
    for phrase in bank:
        wanted = Counter(_content(phrase))
        shared = (said & wanted).total()
        if shared:
            best = max(best, 2 * shared / (said.total() + wanted.total()))
    return best


class WuPalmer:
    r"""Wu-Palmer similarity over a file of hypernym edges: it knows no embedding.

    .. math:: \frac{2\,d(a)}{\ell(x, a) + \ell(y, a) + 2\,d(a)}

    with d the greatest depth (a virtual root has 1), l the least number of edges, and a the common
    ancestor that makes it greatest.

    Args:
        path: lines ``child<TAB>parent`` of synsets (``dog.n.01``).

    Raises:
        InputError: the file cannot be read or is no edge list.

    Source: Wu and Palmer 1994; phrases are compared noun by noun as in Mihalcea et al. 2006.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{path}: cannot be read ({error}). Give a hypernym edge list."
            raise InputError(problem) from error
        self._parents: dict[str, list[str]] = {}
        for number, line in enumerate(lines, 1):
            child, tab, parent = line.partition("\t")
            if not tab or not child or not parent:
                raise InputError(f"{path}:{number}: expected child<TAB>parent, got {line[:60]!r}.")
            self._parents.setdefault(child, []).append(parent)
            self._parents.setdefault(parent, [])
        self._senses: dict[str, list[str]] = {}
        for synset in self._parents:
            self._senses.setdefault(synset.split(".n.")[0].lower(), []).append(synset)
        self._depths: dict[str, int] = {}
        self._lines: dict[str, dict[str, int]] = {}

    def between(self, a: str, b: str) -> float:
        """Similarity of two synsets, in (0, 1].

        Raises:
            InputError: a synset is not in the file.
        """
        for synset in (a, b):
            if synset not in self._parents:
                raise InputError(f"no synset {synset!r} in the edge list. Write it as dog.n.01.")
        x, y = self._ancestors(a), self._ancestors(b)
        best = 0.0
        for common in x.keys() & y.keys():
            d = 2 * self._depth(common)
            best = max(best, d / (x[common] + y[common] + d))
        return best

    def to_synset(self, name: str, synset: str) -> float | None:
        """Similarity of the nearest noun in a name to a synset; None where it knows no noun."""
        senses = [s for noun in self._nouns(name) for s in noun]
        return max((self.between(s, synset) for s in senses), default=None)

    def to_bank(self, name: str, bank: Iterable[str]) -> float | None:
        """Similarity to the nearest phrase of a bank: the mean of each noun's nearest noun, both
        ways; None where either side has no noun that is known."""
        said = self._nouns(name)
        best: float | None = None
        for phrase in bank:
            wanted = self._nouns(phrase)
            if said and wanted:
                there = [max(self._near(n, m) for m in wanted) for n in said]
                back = [max(self._near(n, m) for n in said) for m in wanted]
                value = (sum(there) / len(there) + sum(back) / len(back)) / 2
                best = value if best is None else max(best, value)
        return best

    def _near(self, a: Sequence[str], b: Sequence[str]) -> float:
        return max(self.between(x, y) for x in a for y in b)

    def _nouns(self, phrase: str) -> list[list[str]]:
        """Senses of each noun of a phrase; of compounds the longest that is known."""
        words = _words(phrase)
        found, i = [], 0
        while i < len(words):
            for length in range(min(3, len(words) - i), 0, -1):
                compound = words[i : i + length]
                forms = ["_".join((*compound[:-1], last)) for last in _singulars(compound[-1])]
                senses = next((self._senses[f] for f in forms if f in self._senses), None)
                if senses and not (length == 1 and compound[0] in _FUNCTION_WORDS):
                    found.append(senses)
                    break
            i += length
        return found

    def _depth(self, synset: str) -> int:
        if synset == "":  # the virtual root above all roots of the file
            return 1
        if synset not in self._depths:
            above = self._parents[synset] or [""]
            self._depths[synset] = 1 + max(self._depth(p) for p in above)
        return self._depths[synset]

    def _ancestors(self, synset: str) -> dict[str, int]:
        """The synset, its ancestors and the virtual root, with the least number of edges."""
        if synset not in self._lines:
            edges, level, count = {synset: 0}, [synset], 0
            while level:
                count += 1
                level = [p for s in level if s for p in (self._parents[s] or [""])]
                level = [p for p in dict.fromkeys(level) if p not in edges]
                edges |= dict.fromkeys(level, count)
            self._lines[synset] = edges
        return self._lines[synset]


# ---------------------------------------------------------------- reading rows


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or a list of chat messages (the last one counts)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


@lru_cache(maxsize=1024)
def _policy(text: str) -> PromptPolicy:
    return PromptPolicy.from_json(text)


def _answers(completions: Sequence[Any], policy: Sequence[str]) -> list[Answer | ParseError]:
    return [
        parse_answer(completion_text(c), _policy(p))
        for c, p in zip(completions, policy, strict=True)
    ]


def _named(answer: Answer | ParseError) -> str:
    """The name an unsafe answer gives a novel risk; "" without one."""
    unsafe = isinstance(answer, Answer) and answer.rating == "unsafe"
    return (answer.novel or "") if unsafe and isinstance(answer, Answer) else ""


@lru_cache(maxsize=1024)
def _shown(policy: str) -> tuple[str, ...]:
    """Names a prompt with this policy shows: of the listed categories and of all above them."""
    return tuple(dict.fromkeys(n for e in _policy(policy).entries for n in e.path))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def _singulars(word: str) -> list[str]:
    """A word, and what it may be the plural of."""
    forms = [word]
    if word.endswith("ies") and len(word) > 4:
        forms.append(f"{word[:-3]}y")
    if word.endswith("es") and len(word) > 3:
        forms.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        forms.append(word[:-1])
    return forms


def _stem(word: str) -> str:
    """A word without the ending of its plural."""
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    plural = word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3
    return word[:-1] if plural else word


def _content(text: str) -> list[str]:
    return [_stem(w) for w in _words(text) if w not in _FUNCTION_WORDS]
