"""Commands on a stored collection. Heavy imports happen inside them, as in :mod:`hysafe.app.cli`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hysafe.errors import ConfigError, HysafeError, InputError

__all__ = ["add_commands", "local_path"]

SOURCE_SHOWN = 60
EXAMPLES = 10
RATINGS = ("unsafe", "review", "safe")
EXPORTS = ("csv", "parquet", "labelstudio", "fiftyone")


def local_path(text: str) -> Path:
    """A path of the command line that must be a local one."""
    if "://" in text:
        from hysafe.data.remote import local_folder

        try:
            return local_folder(text, "")
        except InputError as error:
            raise argparse.ArgumentTypeError(" ".join(str(error).split())) from error
    return Path(text)


def place(text: str) -> str | Path:
    """A path of the command line that may be an address."""
    return text if "://" in text else Path(text)


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's sub-parsers."""
    search = commands.add_parser("search", help="find items by text, picture, item or node")
    _add_collection(search)
    search.add_argument("text", nargs="?", metavar="TEXT", help="look for this text")
    search.add_argument("--image", metavar="FILE", help="look for a picture like this file")
    search.add_argument(
        "--like", metavar="ID", help="look for items like this one of the collection"
    )
    search.add_argument("--node", metavar="NODE", help="rank by the score of a node, e.g. 6.1")
    search.add_argument("--where", metavar="SQL", help="filter, e.g. \"rating = 'unsafe'\"")
    how = search.add_mutually_exclusive_group()
    how.add_argument("--approximate", action="store_true", default=None,
                     help="read only the part of the index nearest to the query (default: above "
                     "two million points, once `hysafe index` has been run)")  # fmt: skip
    how.add_argument("--exact", action="store_false", dest="approximate",
                     help="compare with every item")  # fmt: skip
    search.add_argument("--radius-share", type=_part, metavar="S",
                        help="order by the distance less S times the item's radius (default: 0.75; 0: "
                        "by the distance alone)")  # fmt: skip
    _add_judging(search)
    _add_listing(search, None, "50; with --node those of them with a score of 0.1 or more")
    search.set_defaults(run=_search)

    index = commands.add_parser("index", help="make a collection's index for approximate search")
    _add_collection(index)
    index.add_argument("--verbose", action="store_true", help="log what happens")
    index.set_defaults(run=_index)

    rescore = commands.add_parser(
        "rescore", help="judge a collection again under another policy, without its pictures"
    )
    _add_collection(rescore)
    rescore.add_argument("--out", type=local_path, metavar="DIR",
                         help="write a new collection here (default: a new version in place)")  # fmt: skip
    _add_judging(rescore, "policy YAML over the taxonomy (default: the default policy)")
    rescore.add_argument("--diff", action="store_true", help="print what changed, with examples")
    rescore.add_argument("--html", type=Path, metavar="OUT", help="write a page of what changed")
    rescore.add_argument("--json", action="store_true", help="print the changes as JSON lines")
    rescore.add_argument("--report", action=argparse.BooleanOptionalAction, default=None,
                         help="write report.html (default: if the collection has one)")  # fmt: skip
    rescore.set_defaults(run=_rescore)

    redirect = commands.add_parser(
        "redirect", help="answer a query with safe items only, moved out of the risky region"
    )
    _add_collection(redirect)
    redirect.add_argument("text", nargs="?", metavar="TEXT", help="the query")
    redirect.add_argument("--image", metavar="FILE", help="a picture as the query")
    redirect.add_argument("--where", metavar="SQL", help="filter, e.g. \"modality = 'image'\"")
    redirect.add_argument("--review", action="store_true",
                          help="also return items rated review (never unsafe ones)")  # fmt: skip
    redirect.add_argument("--threshold", type=float, metavar="P",
                          help="risk below which a place is safe (default: 0.5, as for items)")  # fmt: skip
    redirect.add_argument("--at-most", type=float, metavar="P",
                          help="highest p_unsafe of answers to a query of more risk (default: 0.1; picture: 0.02; with --review 1)")  # fmt: skip
    _add_judging(redirect)
    _add_listing(redirect, 10, "10")
    redirect.set_defaults(run=_redirect)

    discover = commands.add_parser("discover", help="propose nodes for what no node names")
    _add_collection(discover)
    discover.add_argument("--out", type=Path, metavar="FILE",
                          help="proposal file (default: proposals.yaml in the collection); the page "
                          "is written beside it")  # fmt: skip
    discover.add_argument(
        "--overwrite", action="store_true", help="replace the file if it is there"
    )
    discover.add_argument("--namer", default="phrases", metavar="NAME",
                          help="phrases (default; the nearest of a list), mini-guard, or a guard's "
                          "folder")  # fmt: skip
    discover.add_argument("--alpha", type=float, default=0.05, metavar="P",
                          help="novelty p-value up to which an item is novel (default: 0.05)")  # fmt: skip
    discover.add_argument("--min-size", type=int, default=8, metavar="N",
                          help="items a cluster has at least (default: 8)")  # fmt: skip
    discover.add_argument("--most", type=int, default=20_000, metavar="N",
                          help="novel items that are looked at, at most (default: 20,000)")  # fmt: skip
    discover.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples")
    discover.add_argument("--json", action="store_true", help="print JSON lines")
    _add_model(discover)
    discover.set_defaults(run=_discover)

    accept = commands.add_parser(
        "discover accept", help="turn accepted proposals into nodes of a policy"
    )
    accept.add_argument("proposals", type=Path, metavar="PROPOSALS",
                        help="file of hysafe discover, as a person left it")  # fmt: skip
    accept.add_argument("--policy", type=Path, metavar="FILE",
                        help="add to this policy (default: the one the proposals were made under)")  # fmt: skip
    accept.add_argument("--out", type=Path, required=True, metavar="FILE", help="policy to write")
    accept.add_argument("--only", type=_keys, metavar="KEY,...",
                        help="take these proposals (default: those with accept: true)")  # fmt: skip
    accept.add_argument("--rescore", type=local_path, metavar="COLLECTION",
                        help="then judge this collection again under the new policy")  # fmt: skip
    _add_model(accept)
    accept.set_defaults(run=_accept)

    export = commands.add_parser("export", help="results for a spreadsheet, Label Studio, FiftyOne")
    _add_collection(export)
    export.add_argument("--format", required=True, choices=EXPORTS)
    export.add_argument("out", type=place, metavar="OUT",
                        help="file (fiftyone: folder) to write, here or at s3://, gs://, hf://")  # fmt: skip
    export.add_argument("--verbose", action="store_true", help="log what happens")
    export.set_defaults(run=_export)

    decisions = commands.add_parser("import", help="keep people's decisions with a collection")
    _add_collection(decisions)
    decisions.add_argument("decisions", type=Path, metavar="DECISIONS",
                           help="JSONL with id, rating, author, time, reason")  # fmt: skip
    decisions.add_argument("--report", action=argparse.BooleanOptionalAction, default=None,
                           help="write report.html again, with the decisions (default: if the "
                           "collection has one)")  # fmt: skip
    decisions.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    decisions.add_argument("--model", metavar="NAME",
                           help="where the collection's model is now (default: where it was)")  # fmt: skip
    decisions.add_argument("--verbose", action="store_true", help="log what happens")
    decisions.set_defaults(run=_import)

    calibrate = commands.add_parser(
        "calibrate", help="thresholds that reach a precision, recall or cost on labelled items"
    )
    _add_collection(calibrate)
    calibrate.add_argument("--labels", type=Path, metavar="FILE",
                           help="JSONL with id and nodes or safe (default: people's decisions that "
                           "the collection keeps)")  # fmt: skip
    calibrate.add_argument("--target", default="precision=0.9", metavar="TARGET",
                           help="precision=0.9 (default), recall=0.85 or cost=MISS:FALSE_ALARM")  # fmt: skip
    calibrate.add_argument("--out", type=Path, metavar="FILE",
                           help="write the policy with its thresholds here")  # fmt: skip
    review = calibrate.add_mutually_exclusive_group()
    review.add_argument("--review", type=float, metavar="SHARE",
                        help="the review band that takes this share of items")  # fmt: skip
    review.add_argument("--review-error", type=float, metavar="RATE",
                        help="the review band that leaves this error rate on the rest")  # fmt: skip
    calibrate.add_argument("--least", type=int, default=20, metavar="N",
                           help="labelled items from which a node gets a threshold (default: 20)")  # fmt: skip
    calibrate.add_argument("--nodes", dest="use", default="auto",
                           choices=("auto", "all", "above", "none"),
                           help="which nodes get their own threshold in the policy: all, those above "
                           "that of p_unsafe, none; auto (default): as many as leave the rating at "
                           "its target")  # fmt: skip
    calibrate.add_argument("--share", type=float, default=0.5, metavar="SHARE",
                           help="part of the labels to choose on (default: 0.5)")  # fmt: skip
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="of the two parts")
    calibrate.add_argument("--plots", type=Path, metavar="DIR",
                           help="draw reliability and risk against coverage (extra [plots])")  # fmt: skip
    calibrate.add_argument("--json", action="store_true", help="print all of it as JSON")
    _add_judging(calibrate, "add the thresholds to this policy (default: the collection's own)")
    calibrate.set_defaults(run=_calibrate)

    annotate = commands.add_parser(
        "annotate", help="Parquet or webdataset shards in, the same with ratings and nodes out"
    )
    annotate.add_argument("shards", nargs="+", metavar="SHARD",
                          help="Parquet file, webdataset .tar, or a folder of them, here or at "
                          "s3://, gs://, hf:// (a pattern there, too)")  # fmt: skip
    annotate.add_argument("--out", required=True, type=place, metavar="DIR",
                          help="output folder, here or there")  # fmt: skip
    annotate.add_argument("--policy", type=Path, metavar="FILE", help="policy YAML")
    annotate.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    annotate.add_argument("--model", default="mini", help="as for scan")
    annotate.add_argument("--ocr", action=argparse.BooleanOptionalAction, default=None,
                          help="read text in pictures (default: if installed)")  # fmt: skip
    annotate.add_argument("--text-column", metavar="NAME", help="found by name if not given")
    annotate.add_argument("--image-column", metavar="NAME", help="found by name if not given")
    annotate.add_argument("--workers", type=int, default=0, metavar="N",
                          help="decode processes (default: 0, none)")  # fmt: skip
    annotate.add_argument("--batch", type=int, default=64, metavar="N", help="items a batch")
    annotate.add_argument("--verbose", action="store_true", help="log what happens")
    annotate.set_defaults(run=_annotate)


def _add_collection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collection", type=local_path, metavar="COLLECTION",
                        help="output folder of hysafe scan")  # fmt: skip


def _add_judging(
    parser: argparse.ArgumentParser,
    policy: str = "judge under this policy (default: the collection's own)",
) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help=policy)
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    parser.add_argument("--model", metavar="NAME",
                        help="where the collection's model is now (default: where it was)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log what happens")


def _keys(text: str) -> list[int]:
    """Numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers like 1,3") from error


def _count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        if (count := int(text)) >= 1:
            return count
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")


def _part(text: str) -> float:
    """A number in [0, 1]."""
    try:
        if 0 <= (part := float(text)) <= 1:
            return part
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number in [0, 1]")


def _add_listing(parser: argparse.ArgumentParser, k: int | None, said: str) -> None:
    parser.add_argument("-k", type=_count, default=k, metavar="N",
                        help=f"items at most (default: {said})")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with pictures")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def _collection(arguments: argparse.Namespace) -> Any:
    """The collection of the command line."""
    from hysafe.index import Collection
    from hysafe.index.collection import TABLE

    if not (arguments.collection / f"{TABLE}.lance").is_dir():
        raise ConfigError(
            f"{arguments.collection}: no collection there. Make one: hysafe scan PATH --out DIR"
        )
    return Collection.open(arguments.collection)


def _policy(arguments: argparse.Namespace) -> Any | None:
    """The policy of the command line, checked against the taxonomy before anything is loaded."""
    if arguments.policy is None:
        return None
    from hysafe.taxonomy import Policy, load_taxonomy

    policy = Policy.load(arguments.policy)
    policy.apply(load_taxonomy(arguments.taxonomy))
    return policy


def _search(arguments: argparse.Namespace) -> int:
    queries = (arguments.text, arguments.image, arguments.like, arguments.node)
    if sum(q is not None for q in queries) != 1:
        raise ConfigError("search: give one of TEXT, --image, --like and --node.")
    if arguments.node is not None and arguments.approximate:
        raise ConfigError("search: --node compares all items. Leave out --approximate.")
    policy = _policy(arguments)
    from hysafe.app.cli import _progress
    from hysafe.app.search import search, search_json, write_found
    from hysafe.app.stored import model_of, view_of
    from hysafe.index.collection import RADIUS_SHARE

    collection = _collection(arguments)
    towers = arguments.text is not None or arguments.image is not None
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy, towers=towers)
    with _progress() as bar:
        found = search(
            collection, model, text=arguments.text, image=arguments.image, like=arguments.like,
            node=arguments.node, policy=policy, where=arguments.where, k=arguments.k,
            approximate=arguments.approximate, progress=_share(bar, "making the index"),
            radius_share=RADIUS_SHARE if arguments.radius_share is None else arguments.radius_share,
        )  # fmt: skip
    if arguments.html is not None:
        title = next(str(q) for q in queries if q is not None)
        write_found(arguments.html, title, found, view_of(collection, model, policy), collection)
    if arguments.json:
        sys.stdout.write(search_json(found))
        return 0
    _print_found(found, len(collection))
    if arguments.html is not None:
        print(arguments.html)
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from hysafe.app.cli import _progress
    from hysafe.index.search import EXACT_UP_TO, FOLDER

    collection = _collection(arguments)
    start = time.perf_counter()
    with _progress() as bar:
        index = collection.index
        made = index.cells is None
        if made:
            index.group(collection, progress=_share(bar, "making the index"))
    seconds = time.perf_counter() - start
    cells = len(index.cells.centers) if index.cells else 0
    how = f"made in {seconds:.1f} s" if made else "up to date"
    print(f"{collection.folder / FOLDER}/: {len(index):,} points in {cells:,} cells, {how}")
    if len(index) <= EXACT_UP_TO:
        print(f"up to {EXACT_UP_TO:,} points it is used only by: hysafe search --approximate")
    return 0


def _share(bar: Any, what: str) -> Callable[[float], None]:
    """Shows a share done, from the first call on."""
    tasks: list[Any] = []

    def show(share: float) -> None:
        if not tasks:
            tasks.append(bar.add_task(what, total=100))
        bar.update(tasks[0], completed=round(100 * share))

    return show


def _rescore(arguments: argparse.Namespace) -> int:
    policy = _policy(arguments)
    from hysafe.app.cli import warn_of_taxonomy
    from hysafe.app.rescore import diff_json, policy_names, rescore, write_diff
    from hysafe.app.stored import model_of

    if arguments.html is not None and arguments.html.is_dir():
        raise ConfigError(f"--html {arguments.html} is a folder. Name a file.")
    collection = _collection(arguments)
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy)
    warn_of_taxonomy(model, arguments.taxonomy)
    start = time.perf_counter()
    summary = rescore(collection, model, policy, out=arguments.out, report=arguments.report)
    seconds = time.perf_counter() - start
    view = model.view(policy)
    if arguments.html is not None:
        write_diff(arguments.html, summary.diff, collection, view)
    if arguments.json:
        sys.stdout.write(diff_json(summary.diff))
        return 0
    names = policy_names(collection.meta, view.policy)
    _print_rescore(summary, names, view.taxonomy, seconds, arguments.diff)
    if arguments.html is not None:
        print(arguments.html)
    return 0


def _print_rescore(
    summary: Any, names: tuple[str, str], taxonomy: Any, seconds: float, diff: bool
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    done, changes = summary.scan, summary.diff
    how = "its new nodes encoded" if summary.encoded else "nothing encoded"
    table = Table()
    table.add_column("rating")
    for name in names:
        table.add_column(Text(name), justify="right")
    for rating in RATINGS:
        old = sum(n for (was, _), n in changes.ratings.items() if was == rating)
        table.add_row(rating, str(old), str(done.ratings[rating]))
    console = Console()
    console.print(f"{done.items} items in {seconds:.1f} s, {how}", highlight=False)
    console.print(table)
    console.print(
        ", ".join(f"{count} {kind}" for kind, count in changes.counts().items()), highlight=False
    )
    if diff:
        for kind in changes.counts():
            if not (kept := changes.examples.get(kind)):
                continue
            shown = Table(title=f"{kind} ({changes.counts()[kind]})")
            for name in ("item", "was", "is", "node before", "node now"):
                shown.add_column(name)
            for c in kept[:EXAMPLES]:
                words = (
                    c.result.id if c.item.modality != "text" else f"{c.result.id}: {c.item.text}"
                )
                shown.add_row(Text(_short(words)), _rated(c.before, c.p_before),
                              _rated(c.result.rating, c.result.p_unsafe),
                              _scored(c.node_before, c.score_before, taxonomy),
                              _scored(c.node, c.score, taxonomy))  # fmt: skip
            console.print(shown)
    console.print(f"{done.out}/: version {summary.version} of items.lance, results.jsonl",
                  highlight=False)  # fmt: skip


def _rated(rating: str, p_unsafe: float | None) -> str:
    return rating if p_unsafe is None else f"{rating} {p_unsafe:.2f}"


def _scored(node: str | None, score: float | None, taxonomy: Any) -> Any:
    from rich.text import Text

    if node is None:
        return Text("")
    name = f" {taxonomy[node].name}" if node in taxonomy else ""
    return Text(f"{node}{name}" + ("" if score is None else f" {score:.2f}"))


def _redirect(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.image is None):
        raise ConfigError("redirect: give one of TEXT and --image.")
    policy = _policy(arguments)
    from hysafe.app.redirect import redirect_queries
    from hysafe.app.search import encode_query, search_line, write_found
    from hysafe.app.stored import model_of, view_of

    collection = _collection(arguments)
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy, towers=True)
    (answer,) = redirect_queries(
        collection, model, encode_query(model, text=arguments.text, image=arguments.image),
        channel="text" if arguments.image is None else "image", policy=policy,
        threshold=arguments.threshold, review=arguments.review,
        at_most=arguments.at_most, where=arguments.where, k=arguments.k,
    )  # fmt: skip
    query = str(arguments.text if arguments.image is None else arguments.image)
    if arguments.html is not None:
        view = view_of(collection, model, policy)
        write_found(arguments.html, query, answer.found, view, collection)
    if arguments.json:
        line = {
            "query": query, "radius": [round(r, 6) for r in answer.radius],
            "risk": [round(r, 6) for r in answer.risk], "reached": answer.reached,
            "found": [search_line(f, rank) for rank, f in enumerate(answer.found, 1)],
        }  # fmt: skip
        print(json.dumps(line, ensure_ascii=False))
        return 0
    (far, near), (risk, left) = answer.radius, answer.risk
    if far == near:
        print(f"not moved: risk {risk:.4f}, radius {far:.3f}")
    else:
        shown = math.floor(left * 1e4) / 1e4  # rounded up, it would look like the threshold
        print(f"moved: radius {far:.3f} -> {near:.3f}, risk {risk:.4f} -> {shown:.4f}")
    if not answer.reached:
        print("nowhere on the way is safe: answered where the risk is least, with safe items only")
    if answer.at_most is not None and len(answer.found) < arguments.k:
        print(f"only items with a p_unsafe of at most {answer.at_most:g} answer it (--at-most)")
    _print_found(answer.found, len(collection))
    if arguments.html is not None:
        print(arguments.html)
    return 0


def _discover(arguments: argparse.Namespace) -> int:
    from hysafe.app.cli import _progress
    from hysafe.app.discover import PROPOSALS, discover, write_discovery, write_page
    from hysafe.app.stored import model_of

    collection = _collection(arguments)
    out = arguments.out or arguments.collection / PROPOSALS
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file.")
    if out.suffix == ".html":
        raise ConfigError(f"--out {out} ends in .html, as the page beside it will. Name a .yaml.")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(
            f"{out} is there and may hold what a person wrote. Name another file with --out, or give "
            "--overwrite."
        )
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy, towers=True)
    with _progress() as bar:
        task = bar.add_task("reading", total=None)
        found = discover(
            collection, model, namer=arguments.namer, alpha=arguments.alpha,
            min_size=arguments.min_size, most=arguments.most, seed=arguments.seed,
            progress=lambda what: bar.update(task, description=what),
        )  # fmt: skip
    write_discovery(out, found, collection)
    page = out.with_suffix(".html")
    write_page(page, found, collection, model)
    if arguments.json:
        for p in found.proposals:
            print(json.dumps(p.to_dict(), ensure_ascii=False))
        return 0
    _print_discovery(found)
    print(f"{out}\n{page}")
    return 0


def _print_discovery(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    looked = "" if found.used == found.novel else f", {found.used:,} of them looked at"
    console.print(f"{found.novel:,} of {found.items:,} items are novel{looked}; {found.clustered:,} are "
                  f"in {len(found.proposals)} clusters", highlight=False)  # fmt: skip
    if not found.proposals:
        return
    table = Table()
    for name in ("", "name", "items", "parent", "purity", "agreement", "nearest node"):
        right = name in ("", "items", "purity", "agreement")
        table.add_column(name, justify="right" if right else "left")
    for p in found.proposals:
        near = f"{p.nearest[0].node} {p.nearest[0].name}" if p.nearest else ""
        table.add_row(str(p.key), Text(p.name), str(p.size), p.parent, f"{p.purity:.2f}",
                      f"{p.agreement:.2f}", Text(near))  # fmt: skip
    console.print(table)


def _accept(arguments: argparse.Namespace) -> int:
    from hysafe.taxonomy import Policy, load_taxonomy

    if arguments.rescore is not None:
        arguments.collection = arguments.rescore
        _collection(arguments)  # before anything is written
    from hysafe.app.discover import accept

    taxonomy = load_taxonomy(arguments.taxonomy)
    policy = Policy.load(arguments.policy) if arguments.policy else None
    accepted = accept(
        arguments.proposals, arguments.out, taxonomy, policy=policy, only=arguments.only
    )
    for key, node in accepted.nodes.items():
        rule = accepted.policy.rules[node]
        print(f"proposal {key}: {node} {rule.name}, below {rule.parent}")
    print(arguments.out)
    if arguments.rescore is None:
        return 0
    arguments.policy, arguments.json, arguments.diff = arguments.out, False, False
    arguments.html = arguments.report = None
    arguments.out = None  # in place
    return _rescore(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from hysafe.app.export import export

    collection = _collection(arguments)
    written, left_out = export(collection, arguments.out, arguments.format)
    print(f"{arguments.out}: {written} items")
    if left_out:
        print(f"{left_out} items are no picture files and were left out")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from hysafe.app.export import import_decisions

    collection = _collection(arguments)
    read, new = import_decisions(collection, arguments.decisions)
    print(f"{read} decisions, {new} of them new")
    report = collection.folder / "report.html"
    if arguments.report or (arguments.report is None and report.is_file()):
        from hysafe.app.rescore import report_stored
        from hysafe.app.stored import model_of

        try:
            model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy)
            report_stored(collection, model)
            print(report)
        except HysafeError as error:
            if arguments.report:
                raise
            words = f"hysafe: the decisions are kept, but {report} does not show them: {error}"
            print(" ".join(words.split()), file=sys.stderr)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    policy = _policy(arguments)
    from hysafe.score.thresholds import Target

    # settings are checked before anything is loaded
    target = Target.parse(arguments.target)
    if arguments.plots is not None:
        from hysafe.evaluate.plots import require_matplotlib

        require_matplotlib()
    from hysafe.app.calibrate import (
        calibrate,
        calibrated_json,
        decided_labels,
        read_labels,
        write_plots,
        write_policy,
    )
    from hysafe.app.stored import model_of, view_of

    collection = _collection(arguments)
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy)
    if arguments.labels is None:
        labels = decided_labels(collection)
    else:
        labels = read_labels(arguments.labels, view_of(collection, model, policy).taxonomy)
    made = calibrate(
        collection, model, labels, target, policy=policy, least=arguments.least,
        share=arguments.share, seed=arguments.seed, review=arguments.review,
        review_error=arguments.review_error, use=arguments.use,
    )  # fmt: skip
    drawn = write_plots(arguments.plots, made) if arguments.plots is not None else []
    if arguments.out is not None:
        write_policy(arguments.out, made, collection)
    if arguments.json:
        print(json.dumps(calibrated_json(made), ensure_ascii=False, indent=1))
        return 0
    _print_calibrated(made)
    for path in drawn:
        print(path)
    if arguments.out is None:
        print("not written: --out FILE keeps these thresholds as a policy")
    else:
        print(f"{arguments.out}: judge by it with hysafe rescore {arguments.collection} --policy "
              f"{arguments.out}")  # fmt: skip
    return 0


def _print_calibrated(made: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    say(f"thresholds chosen on {made.chosen_on} labelled items, every figure measured on "
        f"{made.measured_on} others (seed {made.seed})")  # fmt: skip
    for count, what in (
        (made.absent, "labels name no item of the collection"),
        (made.unreadable, "labelled items could not be read, and have no score"),
        (made.unknown, "labels do not tell whether the item is unsafe under this policy"),
    ):
        if count:
            say(f"{count} {what}")
    table = Table(title=f"thresholds for {made.target}, with 95 % intervals")
    for name in ("node", "name", "was", "now", "positives", "precision", "recall"):
        table.add_column(name, justify="left" if name in ("node", "name") else "right")
    for n in (made.p_unsafe, *(n for n in made.nodes if n.chosen)):
        table.add_row(n.node, Text(n.name), f"{n.before:.3g}", f"{n.now:.3g}", str(n.positives),
                      _interval(n.reached.precision), _interval(n.reached.recall))  # fmt: skip
    console.print(table)
    if not made.p_unsafe.chosen:
        say(f"p_unsafe keeps its threshold: {made.p_unsafe.why}")
    kept: dict[str, list[str]] = {}
    for n in made.nodes:
        if not n.chosen:
            much = "" if n.proposal is None else f" ({n.proposal:.3g})"
            kept.setdefault(n.why, []).append(n.node + much)
    follow = set(made.followers)
    for why, nodes in kept.items():
        say(f"no threshold of their own, {why}: {', '.join(nodes)}")
    if kept and follow:
        say(f"of these {len(follow)} categories follow p_unsafe")
    theirs = [n for n in made.nodes if not n.chosen and n.before != made.p_unsafe.before]
    if theirs:
        say("and these keep that of the policy given: "
            + ", ".join(f"{n.node} {n.now:.3g}" for n in theirs))  # fmt: skip
    if made.use in ("above", "none") and any(n.proposal for n in made.nodes if not n.chosen):
        say("--nodes all puts those that are left out into the policy")

    ratings = Table(title="ratings of the measured items, all rules of a scan together")
    for name in ("policy", "unsafe: precision", "recall", "to review", "wrong on the rest"):
        ratings.add_column(name, justify="left" if name == "policy" else "right")
    rows = [("before", made.before), ("p_unsafe alone", made.alone)]
    if any(n.chosen for n in made.nodes):
        rows.append(("with all thresholds", made.after))
    for name, r in rows:
        ratings.add_row(name, _interval(r.unsafe.precision), _interval(r.unsafe.recall),
                        _interval(r.review), _interval(r.error))  # fmt: skip
    console.print(ratings)
    if worse := made.after.worse_than(made.alone):
        say(f"thresholds of single nodes cost the rating {' and '.join(worse)}: --nodes none leaves "
            "them out")  # fmt: skip
    if made.after.gains_nothing_over(made.before):
        say("neither precision nor recall is higher than before: keep the rules before, or choose "
            "another --target")  # fmt: skip

    review = Table(title=f"review band around p_unsafe {made.p_unsafe.now:.3g}")
    for name in ("p_unsafe from", "below", "to review", "error on the rest", "missed", "alarms"):
        review.add_column(name, justify="right")
    for b in (*made.curve, made.chosen):
        if b is not None:
            review.add_row(f"{b.low:.4f}", f"{min(b.high, 1):.4f}", _interval(b.share),
                           _interval(b.error), str(b.missed), str(b.alarms),
                           end_section=b is made.curve[-1])  # fmt: skip
    console.print(review)
    say(f"p_unsafe: calibration error {made.reliability.error:.3f} (adaptive bins), area under risk "
        f"and coverage {made.selective.area:.4f}")  # fmt: skip
    if made.chosen:
        say(f"asked for (last row): p_unsafe >= {made.chosen.low} AND p_unsafe < {made.chosen.high}, "
            "as a filter for --where")  # fmt: skip


def _interval(rate: Any) -> str:
    if not rate.n:
        return "-"
    low, high = rate.interval
    return f"{rate.value:.3f} ({low:.2f}-{high:.2f})"


def _annotate(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1 or arguments.workers < 0:
        raise ConfigError("--batch must be at least 1 and --workers at least 0.")
    from hysafe.app.annotate import AUDIT, annotate, shard_paths

    policy = _policy(arguments)
    shard_paths(arguments.shards)
    from hysafe.app.cli import ocr_reader, warn_of_taxonomy
    from hysafe.app.pipeline import ScanOptions, load

    ocr = ocr_reader(arguments.ocr)
    model = load(arguments.model, taxonomy=arguments.taxonomy)
    warn_of_taxonomy(model, arguments.taxonomy)
    audit = annotate(
        arguments.shards, arguments.out, model, policy=policy, ocr=ocr,
        options=ScanOptions(arguments.batch, arguments.workers),
        text_column=arguments.text_column, image_column=arguments.image_column,
    )  # fmt: skip
    _print_audit(audit, model.view(policy).taxonomy)
    print(f"{arguments.out}/: {audit.shards} shards, {AUDIT}")
    return 0


def _print_audit(audit: Any, taxonomy: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = ", ".join(f"{audit.ratings[r]} {r}" for r in RATINGS)
    table = Table(title=f"{audit.items} items: {counts}")
    for name in ("node", "name", *RATINGS):
        table.add_column(name, justify="right" if name in RATINGS else "left")
    for node in taxonomy:
        if node.id in audit.nodes and node.kind in ("domain", "category"):
            found = audit.nodes[node.id]
            indent = "" if node.kind == "domain" else "  "
            table.add_row(indent + node.id, node.name, *(str(found[r]) for r in RATINGS))
    Console().print(table)


def _short(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= SOURCE_SHOWN else words[: SOURCE_SHOWN - 1] + "…"


def _print_found(found: list[Any], size: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        print(f"nothing found among {size} items")
        return
    by_node = any(f.score is not None for f in found)
    table = Table(title=f"{len(found)} of {size} items")
    for name in ("", "score" if by_node else "distance", "rating", "item", "node"):
        table.add_column(name, justify="right" if name in ("", "score", "distance") else "left")
    for rank, f in enumerate(found, 1):
        value = f.score if by_node else f.distance
        path = " › ".join(f.result.paths[0].path) if f.result.paths else ""
        shown = f.result.id if f.item.modality != "text" else f"{f.result.id}: {f.item.text}"
        # plain text: square brackets of a name are no markup
        table.add_row(str(rank), f"{value:.4f}", f.result.rating, Text(_short(shown)), Text(path))
    Console().print(table)
