"""The command line. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 the command finished (whatever it found); 1 it failed, with one line that says why;
2 a wrong option, path or setting, with one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysafe import __version__
from hysafe.app.collection_commands import add_commands, local_path
from hysafe.errors import (
    ConfigError,
    HysafeError,
    InputError,
    MissingExtraError,
    ModelError,
    TaxonomyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from hysafe.app.pipeline import SafetyModel
    from hysafe.app.scan import ScanSummary
    from hysafe.taxonomy import Taxonomy

__all__ = ["main"]

# Limits of a decode process: a day, and what it takes to start.
LONGEST_DECODE, LEAST_MEMORY = 86_400, 64

# Options of one suite of `hysafe eval`.
CARD_ONLY = ("control", "fit", "write")
NOVELTY_ONLY = ("settings", "held_out", "unseen", "limit", "seed")
# Options of `hysafe scan --engine ray`.
RAY_ONLY = ("address", "shards", "actors", "timeout")

USAGE_ERRORS = (ConfigError, InputError, MissingExtraError, ModelError, TaxonomyError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if arguments.command is None:
        parser.print_help()
        return 0
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(name)s: %(message)s",
    )
    _quiet_libraries(arguments.verbose)
    try:
        return int(arguments.run(arguments))
    except USAGE_ERRORS as error:
        return _fail(error, 2)
    except HysafeError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("hysafe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _joined(argv: Sequence[str]) -> list[str]:
    """``discover accept`` is one command of two words."""
    if list(argv[:2]) == ["discover", "accept"]:
        return ["discover accept", *argv[2:]]
    return list(argv)


def _fail(error: Exception, code: int) -> int:
    print(f"hysafe: {' '.join(str(error).split())}", file=sys.stderr)
    return code


class _OneLineParser(argparse.ArgumentParser):
    """A wrong option is one line and exit code 2."""

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {message}. Try: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="hysafe",
        description="Content safety in hyperbolic space: judge collections of pictures and texts "
        "against a safety taxonomy.",
    )
    parser.add_argument("--version", action="version", version=f"hysafe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_OneLineParser)

    scan = commands.add_parser("scan", help="judge pictures and texts, write results and a report")
    scan.add_argument("paths", nargs="+", metavar="PATH",
                      help="picture, folder, .parquet, .jsonl, .txt, here or at s3://, gs://, hf:// "
                      "(a pattern there, too), or - for lines of stdin")  # fmt: skip
    scan.add_argument("--out", required=True, type=local_path, metavar="DIR", help="output folder")
    _add_scan_options(scan)
    scan.add_argument("--text-column", metavar="NAME", help="of tables; found by name if not given")
    scan.add_argument(
        "--image-column", metavar="NAME", help="of tables; found by name if not given"
    )
    scan.add_argument("--title", default="", help="of the report")
    scan.add_argument("--watch", type=float, metavar="SECONDS",
                      help="scan, and again when something has changed, until Ctrl-C")  # fmt: skip
    scan.add_argument("--retry", action="store_true",
                      help="decode and read again what failed in an earlier scan")  # fmt: skip
    scan.add_argument("--fresh", action="store_true",
                      help="encode everything again, also what is known from an earlier scan")  # fmt: skip
    scan.add_argument("--engine", choices=["local", "ray"], default="local",
                      help="where it runs: this process, or the workers of a Ray cluster")  # fmt: skip
    ray = scan.add_argument_group("engine ray only")
    ray.add_argument("--address", metavar="ADDR",
                     help="HOST:PORT of a running cluster, or auto (default: start one here)")  # fmt: skip
    ray.add_argument("--shards", metavar="PLACE", help="folder or address of the Parquet shards, seen "
                     "by all machines (default: DIR/shards)")  # fmt: skip
    ray.add_argument("--actors", type=int, metavar="N",
                     help="workers (default: as many as there are CPUs for)")  # fmt: skip
    ray.add_argument("--timeout", type=float, metavar="S",
                     help="give up after so many seconds without a finished shard (default: 1800)")  # fmt: skip
    scan.set_defaults(run=_scan)

    demo = commands.add_parser("demo", help="scan the bundled demo collection")
    demo.add_argument("--out", type=local_path, default=Path("hysafe-demo"), metavar="DIR",
                      help="output folder (default: hysafe-demo)")  # fmt: skip
    demo.add_argument("--open", action="store_true", help="open the report in a browser")
    _add_scan_options(demo)
    demo.set_defaults(run=_demo)

    add_commands(commands)

    tree = commands.add_parser("taxonomy", help="show the taxonomy, a node, or check a policy")
    tree.add_argument("node", nargs="?", help="node id, e.g. D6 or 6.1")
    tree.add_argument("--policy", type=Path, metavar="FILE", help="policy to apply")
    tree.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    tree.add_argument("--verbose", action="store_true")
    tree.set_defaults(run=_taxonomy)

    evaluate = commands.add_parser("eval", help="figures of a model on validation data")
    evaluate.add_argument("suite", choices=["card", "novelty"],
                          help="card: the figures of the model card; novelty: novelty scorers beside "
                          "pytorch-ood's")  # fmt: skip
    evaluate.add_argument(
        "--model", default="mini", help="mini, mini-photo, a folder, open_clip:ARCH/TAG"
    )
    evaluate.add_argument("--data", metavar="DIR", help="development data (default: HYSAFE_DATA)")
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="write SUITE.json and SUITE.md here"
    )
    card = evaluate.add_argument_group("card only")
    card.add_argument("--control", metavar="DIR", help="Euclidean control to stand beside it")
    card.add_argument("--fit", action="store_true", default=None,
                      help="fit the calibration of a model folder first, and store it there")  # fmt: skip
    card.add_argument("--write", type=Path, nargs="+", metavar="PAGE",
                      help="put the table into these Markdown pages")  # fmt: skip
    only = evaluate.add_argument_group("novelty only")
    only.add_argument("--settings", metavar="A,B", help="some of near, far, clinc150, contrast, "
                      "catqa, policy (default: all)")  # fmt: skip
    only.add_argument("--held-out", type=Path, metavar="FILE",
                      help="class names that are novel in `near` (default: a bundled list of 17)")  # fmt: skip
    only.add_argument("--unseen", action="store_true", default=None,
                      help="the model was trained without the held-out classes")  # fmt: skip
    only.add_argument("--limit", type=int, metavar="N", help="at most N items of each class")
    only.add_argument(
        "--seed", type=int, metavar="N", help="of folds and far pictures (default: 0)"
    )
    evaluate.add_argument("--verbose", action="store_true")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_scan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help="policy YAML over the taxonomy")
    parser.add_argument("--taxonomy", type=Path, metavar="FILE", help="another taxonomy YAML")
    parser.add_argument("--model", default="mini",
                        help="mini (default), mini-photo, a model folder, a hub id, or open_clip:ARCH/TAG")  # fmt: skip
    parser.add_argument("--ocr", action=argparse.BooleanOptionalAction, default=None,
                        help="read text in pictures (default: if the extra [ocr] is installed)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="decode processes (default: cores - 1, at least 1; 0: none)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="items a batch")
    parser.add_argument("--bf16", action="store_true",
                        help="encode in bfloat16: faster, scores differ in the third digit")  # fmt: skip
    parser.add_argument("--decode-seconds", type=float, default=60.0, metavar="S",
                        help="time limit of one picture in a decode process (default: 60)")  # fmt: skip
    parser.add_argument("--decode-memory", type=int, default=2048, metavar="MB",
                        help="memory limit of a decode process, on Linux (default: 2048)")  # fmt: skip
    parser.add_argument("--guard", metavar="NAME",
                        help="mini-guard or a folder: put novel items into words (a rating never "
                        "depends on it)")  # fmt: skip
    parser.add_argument("--no-report", dest="report", action="store_false", help="skip report.html")
    parser.add_argument("--verbose", action="store_true", help="log what happens")


# ---------------------------------------------------------------- commands


def _scan(arguments: argparse.Namespace) -> int:
    from hysafe.data.inputs import check_paths

    columns = {"text_column": arguments.text_column, "image_column": arguments.image_column}
    check_paths(arguments.paths, **columns)
    engine = _ray_engine(arguments)
    if arguments.watch is not None:
        from hysafe.app.watch import check_watch
        from hysafe.data.remote import is_remote

        check_watch(arguments.paths, arguments.watch)
        if remote := next(filter(is_remote, arguments.paths), None):
            raise ConfigError(
                f"--watch: {remote} is no local folder, and is not watched. Run the scan again from "
                "time to time: what is known is not encoded again."
            )
    run, taxonomy = _scanner(
        arguments, arguments.paths, arguments.title, engine,
        fresh=arguments.fresh, retry=arguments.retry, **columns,
    )  # fmt: skip
    if arguments.watch is None:
        _print_summary(*run(), arguments.report, taxonomy)
        return 0
    return _watch(arguments, run)


def _ray_engine(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of a cluster; None for a scan in this process."""
    given = {k: v for k in RAY_ONLY if (v := getattr(arguments, k)) is not None}
    if arguments.engine == "local":
        if given:
            names = ", ".join(f"--{k}" for k in given)
            raise ConfigError(f"{names}: of --engine ray only. Add it, or leave them out.")
        return None
    if arguments.watch is not None:
        raise ConfigError("--watch: of --engine local only. Run the scan again from time to time.")
    if given.get("actors", 1) < 1 or not 0 < given.get("timeout", 1.0) < float("inf"):
        raise ConfigError("--actors must be at least 1 and --timeout more than 0.")
    from hysafe.app.ray_scan import check_ray

    check_ray()
    return given


def _watch(arguments: argparse.Namespace, run: Callable[[], tuple[ScanSummary, float]]) -> int:
    from hysafe.app.watch import watch

    rounds = watch(arguments.paths, arguments.out, lambda: run()[0], seconds=arguments.watch)
    for summary in rounds:
        counts = ", ".join(f"{summary.ratings[r]} {r}" for r in ("unsafe", "review", "safe"))
        new = summary.items - summary.known
        print(f"{time.strftime('%H:%M:%S')} {summary.items} items, {new} new: {counts}", flush=True)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from importlib import resources

    with resources.as_file(resources.files("hysafe.assets") / "demo") as folder:
        paths = [str(folder / "images"), str(folder / "texts.jsonl")]
        run, taxonomy = _scanner(arguments, paths, "hysafe demo")
        summary, seconds = run()
    _print_summary(summary, seconds, arguments.report, taxonomy)
    if arguments.open and arguments.report:
        import webbrowser

        webbrowser.open((summary.out / "report.html").resolve().as_uri())
    return 0


def _scanner(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    title: str,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Callable[[], tuple[ScanSummary, float]], Taxonomy]:
    """What scans with a command's options, as often as it is called, and gives the seconds, too;
    the taxonomy under the policy.

    Args:
        engine: settings of a cluster; None scans in this process.
    """
    if arguments.batch < 1 or (arguments.workers is not None and arguments.workers < 0):
        raise ConfigError("--batch must be at least 1 and --workers at least 0.")
    if not 0 < arguments.decode_seconds <= LONGEST_DECODE:
        raise ConfigError(f"--decode-seconds must be more than 0 and at most {LONGEST_DECODE}.")
    if arguments.decode_memory < LEAST_MEMORY:
        raise ConfigError(f"--decode-memory must be at least {LEAST_MEMORY} (MB).")
    if arguments.bf16 and engine is not None:
        raise ConfigError(
            "--bf16 is for the local engine. Leave it out, or leave out --engine ray."
        )
    from hysafe.taxonomy import Policy, load_taxonomy

    # settings are checked before the model is loaded
    policy = Policy.load(arguments.policy) if arguments.policy else None
    view = (policy or Policy()).apply(load_taxonomy(arguments.taxonomy))
    ocr = ocr_reader(arguments.ocr)
    with _progress() as bar:
        bar.add_task("loading the model", total=None)
        from hysafe.app.pipeline import ScanOptions, load
        from hysafe.app.scan import scan

        model = load(
            arguments.model, taxonomy=arguments.taxonomy, towers=engine is None,
            bf16=arguments.bf16,
        )  # fmt: skip
    if not model.calibration.fitted:
        print(
            f"hysafe: {arguments.model} is not calibrated: scores rank, they are no "
            "probabilities, and novelty has no p-values.",
            file=sys.stderr,
        )
    warn_of_taxonomy(model, arguments.taxonomy)
    workers = arguments.workers
    if workers is None:  # an actor of a cluster has one
        workers = max(1, (os.cpu_count() or 2) - 1) if engine is None else 1
    how = ScanOptions(
        arguments.batch, workers, decode_seconds=arguments.decode_seconds,
        decode_memory=arguments.decode_memory << 20,
    )  # fmt: skip
    scan_with: Callable[..., ScanSummary] = scan
    if engine is not None:
        from hysafe.app.ray_scan import ClusterOptions, ray_scan

        scan_with, options["cluster"] = ray_scan, ClusterOptions(**engine)

    def run() -> tuple[ScanSummary, float]:
        start = time.perf_counter()
        with _progress() as bar:
            task = bar.add_task("judging", total=None)
            summary = scan_with(
                paths, arguments.out, model, policy=policy, ocr=ocr, options=how,
                report=arguments.report, title=title, guard=arguments.guard,
                progress=lambda n: bar.update(task, completed=n), **options,
            )  # fmt: skip
        options.update({k: False for k in ("fresh", "retry") if k in options})  # once is enough
        return summary, time.perf_counter() - start

    return run, view.taxonomy


def warn_of_taxonomy(model: SafetyModel, path: Path | None) -> None:
    """Say that a calibration was made for the bundled taxonomy, where this is another one."""
    from hysafe.taxonomy import load_taxonomy

    if path is None or not model.calibration.fitted:
        return
    if model.taxonomy.hash != load_taxonomy().hash:
        print(
            f"hysafe: the calibration of {model.name} was made for the bundled taxonomy, not for "
            f"{path}: scores rank, but probabilities and p-values do not hold.",
            file=sys.stderr,
        )


def _progress() -> Progress:
    """A bar on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip


def ocr_reader(wanted: bool | None) -> Any | None:
    """The reader of text in pictures; None where it is off or (unasked) not installed."""
    if wanted is False:
        return None
    from hysafe.data.ocr import Ocr

    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache = Path(base) / "hysafe" / "ocr.sqlite3"
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        return Ocr(cache=cache)
    except OSError:
        return Ocr()
    except MissingExtraError:
        if wanted:
            raise
        print(
            "hysafe: text in pictures is not read: pip install 'hysafe[ocr]' (or --no-ocr).",
            file=sys.stderr,
        )
        return None


def _print_summary(summary: ScanSummary, seconds: float, report: bool, taxonomy: Taxonomy) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary.items} items in {seconds:.1f} s")
    table.add_column("rating")
    table.add_column("items", justify="right")
    for rating in ("unsafe", "review", "safe"):
        table.add_row(rating, str(summary.ratings[rating]))
    if summary.errors:
        table.add_row("of these with an error", str(sum(summary.errors.values())))
    console = Console()
    console.print(table)
    if summary.nodes:
        top = Table(title="what was found")
        top.add_column("node")
        top.add_column("name")
        top.add_column("items", justify="right")
        for node, count in summary.nodes.most_common(8):
            name = taxonomy[node].name if node in taxonomy else ""
            top.add_row(node, name, str(count))
        console.print(top)
    if summary.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.errors.most_common())
        console.print(f"errors: {kinds}. Which items and why: `error` in results.jsonl.")
    if summary.asked:
        console.print(
            f"{summary.asked} novel items reached the guard, {summary.named} have a name by it."
        )
    if summary.known:
        console.print(
            f"{summary.known} of them have the content of another item, or of an earlier scan, and were not "
            "encoded again."
        )
    if not summary.items:
        print("hysafe: nothing was there to judge. Are the paths right?", file=sys.stderr)
    if summary.skipped:
        console.print(f"{summary.skipped} files were neither pictures nor texts and were left out.")
    shown = "results.jsonl, items.lance" + (", report.html" if report else "")
    console.print(f"{summary.out}/: {shown}", highlight=False)


def _taxonomy(arguments: argparse.Namespace) -> int:
    from hysafe.taxonomy import Policy, load_taxonomy

    taxonomy = load_taxonomy(arguments.taxonomy)
    policy = Policy.load(arguments.policy) if arguments.policy else Policy()
    view = policy.apply(taxonomy)
    if any(rule.examples for rule in policy.rules.values()):
        from hysafe.app.pipeline import check_examples

        check_examples(policy)
    if arguments.node is None:
        print(f"{view.taxonomy!r}  hash {view.taxonomy.hash}  policy {policy.name} {policy.hash}")
        for node in view.taxonomy:
            if node.kind in ("domain", "category"):
                mark = "" if view.active(node.id) else "  [off]"
                indent = "" if node.kind == "domain" else "   "
                print(f"{indent}{node.id:<5} {node.name}{mark}")
        return 0
    node = view.taxonomy[arguments.node]
    print(f"{node.id}  {view.taxonomy.path(node.id)}\n{node.definition}")
    print(f"status {view.status(node.id)}, unsafe from {view.threshold(node.id):g}")
    rule = view.policy.rules.get(node.id)
    for title, values in (
        ("synonyms", node.synonyms), ("should not", node.should_not), ("can", node.can),
        ("example texts", rule.example_texts if rule else ()),
    ):  # fmt: skip
        if values:
            print(f"{title}: " + "; ".join(values))
    for scheme, found in sorted(node.crosswalk.items()):
        print(f"{scheme}: {', '.join(found)}")
    if node.sibling:
        print(f"benign sibling: {view.taxonomy[node.sibling].name}")
    for child in view.taxonomy.children(node.id):
        print(f"   {child.id:<7} {child.name}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    options = {"card": CARD_ONLY, "novelty": NOVELTY_ONLY}
    own = options.pop(arguments.suite)
    ((other, theirs),) = options.items()
    given = [o for o in theirs if getattr(arguments, o) is not None]
    if given:
        names = ", ".join("--" + o.replace("_", "-") for o in given)
        raise ConfigError(
            f"eval {arguments.suite}: {names}: of eval {other} only. Leave it out; this suite has "
            + ", ".join("--" + o.replace("_", "-") for o in own) + "."
        )  # fmt: skip
    if arguments.suite == "novelty":
        return _evaluate_novelty(arguments)
    from hysafe.app.card import evaluate_card

    return evaluate_card(
        arguments.model, control=arguments.control, data=arguments.data, fit=bool(arguments.fit),
        out=arguments.out, pages=arguments.write or [],
    )  # fmt: skip


def _evaluate_novelty(arguments: argparse.Namespace) -> int:
    from hysafe.app.pipeline import load
    from hysafe.evaluate.novelty import SETTINGS, check_settings, evaluate_novelty

    chosen = arguments.settings.split(",") if arguments.settings else SETTINGS
    # settings are checked before the model is loaded
    check_settings(chosen, arguments.limit)
    return evaluate_novelty(
        load(arguments.model), settings=chosen, data=arguments.data, held_out=arguments.held_out,
        unseen=bool(arguments.unseen), limit=arguments.limit, out=arguments.out,
        seed=arguments.seed or 0,
    )  # fmt: skip


def _quiet_libraries(verbose: bool) -> None:
    """Progress bars and reports of libraries do not belong into a user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # worker processes
        for name in ("LANCE_LOG", "LANCEDB_LOG", "RUST_LOG"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("root").setLevel(logging.ERROR)
        logging.getLogger("hysafe").setLevel(logging.WARNING)  # our own words are for the user


if __name__ == "__main__":
    raise SystemExit(main())
