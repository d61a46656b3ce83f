"""Commands on a stored collection. Heavy imports happen inside them, as in :mod:`hysafe.app.cli`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from hysafe.errors import ConfigError

__all__ = ["add_commands"]

SOURCE_SHOWN = 60
EXAMPLES = 10
RATINGS = ("unsafe", "review", "safe")
EXPORTS = ("csv", "parquet", "labelstudio", "fiftyone")


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
    _add_judging(search)
    _add_listing(search)
    search.set_defaults(run=_search)

    rescore = commands.add_parser(
        "rescore", help="judge a collection again under another policy, without its pictures"
    )
    _add_collection(rescore)
    rescore.add_argument("--out", type=Path, metavar="DIR",
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
    redirect.add_argument("--review", action="store_true",
                          help="also return items rated review (never unsafe ones)")  # fmt: skip
    redirect.add_argument("--threshold", type=float, metavar="P",
                          help="risk below which a place is safe (default: 0.5, as for items)")  # fmt: skip
    _add_judging(redirect)
    _add_listing(redirect, k=10)
    redirect.set_defaults(run=_redirect)

    export = commands.add_parser("export", help="results for a spreadsheet, Label Studio, FiftyOne")
    _add_collection(export)
    export.add_argument("--format", required=True, choices=EXPORTS)
    export.add_argument("out", type=Path, metavar="OUT", help="file (fiftyone: folder) to write")
    export.add_argument("--verbose", action="store_true", help="log what happens")
    export.set_defaults(run=_export)

    decisions = commands.add_parser("import", help="keep people's decisions with a collection")
    _add_collection(decisions)
    decisions.add_argument("decisions", type=Path, metavar="DECISIONS",
                           help="JSONL with id, rating, author, time, reason")  # fmt: skip
    decisions.add_argument("--verbose", action="store_true", help="log what happens")
    decisions.set_defaults(run=_import)

    annotate = commands.add_parser(
        "annotate", help="Parquet shards in, the same shards with ratings and nodes out"
    )
    annotate.add_argument("shards", nargs="+", metavar="SHARD",
                          help="Parquet file, or a folder of them")  # fmt: skip
    annotate.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
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
    parser.add_argument("collection", type=Path, metavar="COLLECTION",
                        help="output folder of hysafe scan")  # fmt: skip


def _add_judging(
    parser: argparse.ArgumentParser,
    policy: str = "judge under this policy (default: the collection's own)",
) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help=policy)
    parser.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    parser.add_argument("--model", metavar="NAME",
                        help="where the collection's model is now (default: where it was)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log what happens")


def _add_listing(parser: argparse.ArgumentParser, k: int = 50) -> None:
    parser.add_argument("-k", type=int, default=k, metavar="N",
                        help=f"items at most (default: {k})")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with pictures")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


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
        raise ConfigError("hysafe search: give one of TEXT, --image, --like and --node.")
    policy = _policy(arguments)
    from hysafe.app.search import search, search_json, write_found
    from hysafe.app.stored import model_of, view_of
    from hysafe.index import Collection

    collection = Collection.open(arguments.collection)
    towers = arguments.text is not None or arguments.image is not None
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy, towers=towers)
    found = search(
        collection, model, text=arguments.text, image=arguments.image, like=arguments.like,
        node=arguments.node, policy=policy, where=arguments.where, k=arguments.k,
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


def _rescore(arguments: argparse.Namespace) -> int:
    policy = _policy(arguments)
    from hysafe.app.rescore import diff_json, rescore, write_diff
    from hysafe.app.stored import model_of
    from hysafe.index import Collection

    collection = Collection.open(arguments.collection)
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy)
    start = time.perf_counter()
    summary = rescore(collection, model, policy, out=arguments.out, report=arguments.report)
    seconds = time.perf_counter() - start
    view = model.view(policy)
    if arguments.html is not None:
        write_diff(arguments.html, summary.diff, collection, view.taxonomy, view.policy.name)
    if arguments.json:
        sys.stdout.write(diff_json(summary.diff))
        return 0
    _print_rescore(summary, collection.meta.policy_name, view, seconds, arguments.diff)
    if arguments.html is not None:
        print(arguments.html)
    return 0


def _print_rescore(summary: Any, before: str, view: Any, seconds: float, diff: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    done, changes = summary.scan, summary.diff
    how = "its new nodes encoded" if summary.encoded else "nothing encoded"
    table = Table()
    for name in ("rating", before, view.policy.name):
        table.add_column(name, justify="left" if name == "rating" else "right")
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
        for kind, kept in changes.examples.items():
            shown = Table(title=f"{kind} ({changes.counts()[kind]})")
            for name in ("item", "was", "is", "node before", "node now"):
                shown.add_column(name)
            for c in kept[:EXAMPLES]:
                words = (
                    c.result.id if c.item.modality != "text" else f"{c.result.id}: {c.item.text}"
                )
                shown.add_row(Text(_short(words)), c.before, c.result.rating,
                              c.node_before or "", c.node or "")  # fmt: skip
            console.print(shown)
    console.print(f"{done.out}/: version {summary.version} of items.lance, results.jsonl",
                  highlight=False)  # fmt: skip


def _redirect(arguments: argparse.Namespace) -> int:
    if (arguments.text is None) == (arguments.image is None):
        raise ConfigError("hysafe redirect: give one of TEXT and --image.")
    policy = _policy(arguments)
    from hysafe.app.redirect import redirect_queries
    from hysafe.app.search import encode_query, search_line, write_found
    from hysafe.app.stored import model_of, view_of
    from hysafe.index import Collection

    collection = Collection.open(arguments.collection)
    model = model_of(collection, name=arguments.model, taxonomy=arguments.taxonomy, towers=True)
    (answer,) = redirect_queries(
        collection, model, encode_query(model, text=arguments.text, image=arguments.image),
        channel="text" if arguments.image is None else "image", policy=policy,
        threshold=arguments.threshold, review=arguments.review, k=arguments.k,
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
        print(f"moved: radius {far:.3f} -> {near:.3f}, risk {risk:.4f} -> {left:.4f}")
    if not answer.reached:
        print("nowhere on the way is safe: answered where the risk is least, with safe items only")
    _print_found(answer.found, len(collection))
    if arguments.html is not None:
        print(arguments.html)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from hysafe.app.export import export
    from hysafe.index import Collection

    collection = Collection.open(arguments.collection)
    written, left_out = export(collection, arguments.out, arguments.format)
    print(f"{arguments.out}: {written} items")
    if left_out:
        print(f"{left_out} items are no picture files and were left out")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from hysafe.app.export import import_decisions
    from hysafe.index import Collection

    read, new = import_decisions(Collection.open(arguments.collection), arguments.decisions)
    print(f"{read} decisions, {new} of them new")
    return 0


def _annotate(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1 or arguments.workers < 0:
        raise ConfigError("--batch must be at least 1 and --workers at least 0.")
    from hysafe.app.annotate import AUDIT, annotate, shard_paths

    policy = _policy(arguments)
    shard_paths(arguments.shards)
    from hysafe.app.cli import ocr_reader
    from hysafe.app.pipeline import ScanOptions, load

    ocr = ocr_reader(arguments.ocr)
    model = load(arguments.model, taxonomy=arguments.taxonomy)
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
