"""Proposals: name, parent, the file a person edits, and the way into a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hysafe.discover import (
    Cluster,
    Proposal,
    accepted_policy,
    best_parent,
    central_name,
    propose,
    read_proposals,
    write_proposals,
)
from hysafe.errors import ConfigError, TaxonomyError
from hysafe.geometry import Points
from hysafe.guard.naming import Naming
from hysafe.taxonomy import Policy, PolicyView, load_taxonomy
from hysafe.taxonomy.policy import Example

TAXONOMY = load_taxonomy()
IDS = [n.id for n in TAXONOMY]
PLACES = {"ivory trade": (1, 0.1), "tusk sale": (1, 0.3), "ivory trade offers": (1, 0),
          "stray cats": (-1, -0.1)}  # fmt: skip


@pytest.fixture(scope="module")
def view() -> PolicyView:
    return Policy().apply(TAXONOMY)


def encode(names: Sequence[str]) -> np.ndarray:
    return np.array([PLACES[n] for n in names], float)


def margins(n: int = 4, **inside: float) -> np.ndarray:
    """Margins of n items, -1 but for the nodes given (D6=0.2)."""
    rows = np.full((n, len(IDS)), -1.0)
    for node, value in inside.items():
        rows[:, IDS.index(node.strip("_").replace("_", "."))] = value
    return rows


def a_proposal(view: PolicyView, key: int = 1, **rule: object) -> Proposal:
    torch.manual_seed(0)
    points = Points.from_tangent(torch.randn(1, 3).double(), 1.0)
    apexes = Points.from_tangent(torch.randn(len(IDS), 3).double(), 1.0)
    trade = Naming("ivory trade", "near")
    names = [trade, Naming("tusk sale", ""), None, trade]
    made = propose(
        Cluster(np.array([7, 3, 5, 9]), 0.75), names, encode,
        margins(D6=0.2, _6_1=0, D2=-0.1), points, apexes, view,
        ids=["g", "c", "e", "i"], channel="text", p_unsafe=0.4, key=key,
    )  # fmt: skip
    return Proposal(**{**vars(made), "rule": {**made.rule, **rule}})


def test_the_name_is_the_most_central_one_and_agreement_counts_like_names() -> None:
    votes = ["tusk sale", "ivory trade", "ivory trade offers", "ivory trade", "stray cats"]
    named = central_name(votes, encode)
    assert named is not None
    assert named.name == "ivory trade"
    assert named.agreement == pytest.approx(3 / 5)  # "offers" shares enough words
    assert named.others == ("ivory trade offers", "tusk sale")  # a third single name is a stray
    twice = central_name([*votes, "stray cats", "tusk sale", "ivory trade"], encode)
    assert twice is not None
    assert twice.others == ("tusk sale", "stray cats")  # two members each: no single one is needed
    one = central_name([*votes, "stray cats"], encode)
    assert one is not None
    assert one.others == ("ivory trade offers", "stray cats")  # of the single ones, the nearest
    assert central_name([], encode) is None


def test_the_parent_is_the_domain_whose_cone_holds_most(view: PolicyView) -> None:
    both = margins(D6=0.1, D2=0.9)
    both[:1, IDS.index("D2")] = -0.1  # three of four, though deeper
    assert best_parent(both, view) == ("D6", 1.0)
    few = margins(D6=-0.5, D2=-0.4)
    few[:1, IDS.index("D6")] = 0.1  # holds one of four: the nearest counts, on average
    assert best_parent(few, view) == ("D6", 0.25)
    few[:, IDS.index("D2")] = -0.1
    assert best_parent(few, view) == ("D2", 0.0)


def test_a_domain_that_is_off_is_no_parent() -> None:
    off = Policy.from_dict({"nodes": {"D6": {"status": "non_violating"}}}).apply(TAXONOMY)
    assert best_parent(margins(D6=0.5, D2=0.1), off)[0] == "D2"
    every = {n.id: {"status": "non_violating"} for n in TAXONOMY.domains}
    with pytest.raises(ConfigError, match="no domain that is on"):
        best_parent(margins(), Policy.from_dict({"nodes": every}).apply(TAXONOMY))


def test_a_proposal_has_all_that_a_person_needs(view: PolicyView) -> None:
    data = a_proposal(view).to_dict()
    assert data["accept"] is False
    assert data["name"] == "Ivory trade"
    assert data["definition"].startswith("Proposed: ")
    assert data["synonyms"] == ["ivory trade", "tusk sale"]
    assert data["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert (data["parent"], data["held"], data["size"], data["purity"]) == ("D6", 1.0, 4, 0.75)
    assert data["rationale"] == "near"
    assert data["examples"] == ["g", "c", "e", "i"]
    assert len(data["nearest"]) == 4
    assert all(n["distance"] > 0 for n in data["nearest"])


def test_a_cluster_that_cannot_be_named_still_has_a_proposal(view: PolicyView) -> None:
    points = Points.from_tangent(torch.ones(1, 3).double(), 1.0)
    apexes = Points.from_tangent(torch.ones(len(IDS), 3).double(), 1.0)
    made = propose(Cluster(np.arange(4), 1.0), [None] * 4, encode, margins(), points, apexes, view,
                   ids=list("abcd"), key=3)  # fmt: skip
    assert made.name == "Unnamed 3"
    assert made.agreement == 0


def test_pictures_of_the_members_become_examples_of_the_node(
    view: PolicyView, tmp_path: Path
) -> None:
    shown = [Example(str(tmp_path / f"{k}.png"), f"{k}" * 64) for k in range(3)]
    points = Points.from_tangent(torch.ones(1, 3).double(), 1.0)
    apexes = Points.from_tangent(torch.ones(len(IDS), 3).double(), 1.0)

    def made(**inside: float) -> Proposal:
        return propose(Cluster(np.arange(4), 1.0), [None] * 4, encode, margins(**inside), points,
                       apexes, view, ids=list("abcd"), channel="image", pictures=shown)  # fmt: skip

    path = tmp_path / "p.yaml"
    write_proposals(path, [made(D6=0.2)], Policy(), {})
    path.write_text(
        path.read_text().replace(f"  - file: {shown[1].file}\n    sha256: '{'1' * 64}'\n", "")
    )
    (read,), _, _ = read_proposals(path)
    assert read.pictures == (shown[0], shown[2])  # a person took one out
    policy, nodes = accepted_policy([read], Policy(), TAXONOMY, only=[1])
    assert policy.rules[nodes[1]].examples == (shown[0], shown[2])
    text_only = next(n.id for n in TAXONOMY if n.kind == "category" and n.text_only)
    moved = replace(read, rule={**read.rule, "parent": text_only})
    policy, nodes = accepted_policy([moved], Policy(), TAXONOMY, only=[1])
    assert policy.rules[nodes[1]].examples == ()
    path.write_text("proposals: [{key: 1, name: n, parent: D6, definition: d, pictures: 3}]")
    with pytest.raises(ConfigError, match="`pictures` is no list"):
        read_proposals(path)


def test_a_file_comes_back_as_a_person_left_it(view: PolicyView, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    policy = Policy.from_dict({"name": "shop", "nodes": {"D1": {"status": "non_violating"}}})
    write_proposals(path, [a_proposal(view), a_proposal(view, 2)], policy, {"collection": "c"})
    text = path.read_text()
    assert text.startswith("# Proposed by hysafe discover")
    path.write_text(text.replace("accept: false", "accept: true", 1).replace("Ivory", "Tusk", 1))
    (one, two), own, facts = read_proposals(path)
    assert (one.accept, one.name, two.accept, two.name) == (
        True,
        "Tusk trade",
        False,
        "Ivory trade",
    )
    assert (own.hash, facts) == (policy.hash, {"collection": "c"})
    assert (two.size, two.purity, two.channel) == (4, 0.75, "text")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": "one"}, "number as its `key`"),
        ({"accept": "yes"}, "Write true or false"),
        ({"name": ""}, "no `name`"),
        ({"parent": None}, "no `parent`"),
    ],
)
def test_mistakes_of_a_person_are_named(
    view: PolicyView, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"proposals": [a_proposal(view).to_dict() | change]}))
    with pytest.raises(ConfigError, match=problem):
        read_proposals(path)


def test_other_files_are_no_proposals(tmp_path: Path, view: PolicyView) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: shop\nnodes: {}\n")
    with pytest.raises(ConfigError, match="no list `proposals`"):
        read_proposals(path)
    same = a_proposal(view).to_dict()
    path.write_text(yaml.safe_dump({"proposals": [same, same]}))
    with pytest.raises(ConfigError, match="key 1 is given twice"):
        read_proposals(path)


def test_accepted_proposals_become_nodes_with_ids_that_are_free(view: PolicyView) -> None:
    taken = {"parent": "D1", "name": "Own", "definition": "Own."}
    policy = Policy.from_dict({"nodes": {"x.2": taken, "6.1": {"threshold": 0.4}}})
    proposals = [a_proposal(view, k, threshold=0.3 + k / 10) for k in (1, 2, 3)]
    made, nodes = accepted_policy(proposals, policy, TAXONOMY, only=[1, 3])
    assert nodes == {1: "x.1", 3: "x.3"}
    applied = made.apply(TAXONOMY)
    assert applied.taxonomy["x.2"].name == "Own"
    assert applied.taxonomy["x.1"].kind == "category"
    assert applied.threshold("x.3") == pytest.approx(0.6)
    assert applied.threshold("6.1") == pytest.approx(0.4)
    inside = applied.taxonomy  # ids of the taxonomy itself are taken, too
    again, more = accepted_policy(proposals[:1], Policy(), inside, only=[1])
    assert more == {1: "x.4"}
    assert again.apply(inside).taxonomy["x.4"].parent == "D6"


def test_only_what_was_accepted_is_taken(view: PolicyView) -> None:
    one, two = a_proposal(view, 1), a_proposal(view, 2)
    yes = Proposal(**{**vars(two), "accept": True})
    assert accepted_policy([one, yes], Policy(), TAXONOMY)[1] == {2: "x.1"}
    with pytest.raises(ConfigError, match="no proposal is accepted"):
        accepted_policy([one, two], Policy(), TAXONOMY)
    with pytest.raises(ConfigError, match="no proposal 9"):
        accepted_policy([one, two], Policy(), TAXONOMY, only=[9])
    wrong = a_proposal(view, 1, parent="D99")
    with pytest.raises(TaxonomyError, match="unknown parent 'D99'"):
        accepted_policy([wrong], Policy(), TAXONOMY, only=[1])


def test_example_texts_that_are_not_two_are_named_with_their_proposal(tmp_path: Path) -> None:
    path = tmp_path / "proposals.yaml"
    head = "proposals: [{key: 7, name: n, parent: D6, definition: d, example_texts: "
    for given, problem in (("[one]", "one example text"), ("3", "`example_texts` is no list")):
        path.write_text(f"{head}{given}}}]")
        with pytest.raises(ConfigError, match=rf"proposals\.yaml: proposal 7: {problem}"):
            read_proposals(path)
