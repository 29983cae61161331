"""The work of craft-optim inspect: tables, the page, and drift of a model on some anchors."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from craft_optim._paths import local
from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.kept import Kept
from craft_optim.anchors.sampling import spread
from craft_optim.cli.options import UsageError, require_folder, require_one_model
from craft_optim.cli.output import emit_json, print_table
from craft_optim.cli.work.processes import device_of
from craft_optim.cli.work.sources import factory_source, load_policy, load_text_model, policy_reading, tokenizer_of
from craft_optim.evaluation.drift import Drift, drifts, verdict
from craft_optim.inspection import as_json, bytes_in_words
from craft_optim.report.numbers import number

__all__ = ["run"]

_MEASURED = 256  # anchors that drift is measured on, or --count: a mean of 24 says little, and the worst are elsewhere


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    require_one_model(args)
    require_folder("--json", args.json)
    require_folder("--html", args.html)
    with redirect_stdout(sys.stderr) if args.json == "-" else nullcontext():
        about = _inspected(args)
    if args.json:
        emit_json(args.json, about)


def _inspected(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what there is to say, writes the page, and returns the same for --json."""
    cache = AnchorCache.open(args.cache)
    kept = cache.kept()
    about = as_json(cache) | {"verified": False, "drift": None, "page": None}
    if args.json != "-":
        _print(cache, kept, about)
    if args.verify:
        cache.verify()
        about["verified"] = True
        print(f"\nChecksums: all {len(cache)} anchors are as they were written.")
    indices = spread(len(cache), args.count)
    measured: list[Drift] = []
    judged = None
    if args.policy or args.model or args.factory:
        model, reading = _loaded(args, cache)
        indices = spread(len(cache), max(args.count, _MEASURED))
        measured = drifts(model, cache, indices, reading=reading, progress=None)
        judged = verdict(cache, model, measured)
        rows = [(x.kind, f"{number(x.value)} {x.unit}, worst {number(max(x.each))}") for x in measured]
        print_table(f"Drift on {len(indices)} of {len(cache)} anchors", rows)
        print(f"\n{judged[1]}")
        each = [{name: getattr(x, name) for name in ("kind", "unit", "value", "tolerance", "each")} for x in measured]
        about["drift"] = {"places": indices, "fits": judged[0], "words": judged[1], "measured": each}
    if args.html:
        from craft_optim.report.cache_page import render

        page = render(
            cache,
            indices,
            args.count,
            verified=args.verify,
            measured=measured,
            verdict=judged,
            decode=_decoder(args, cache),
        )
        Path(args.html).write_text(page, encoding="utf-8")
        about["page"] = args.html
        print(f"\nPage: {args.html} ({bytes_in_words(len(page))})")
    return about


def _print(cache: AnchorCache, kept: Mapping[str, Kept], about: dict[str, Any]) -> None:
    keeps = [("Keeps", told.describe(cache.features.outputs[name].size)) for name, told in kept.items()]
    print_table(str(cache.path), [*about["facts"].items(), *keeps])
    rows = []
    for tensor in about["tensors"]:
        length = " / ".join(map(number, tensor.get("length", ())))
        rows.append((tensor["name"], f"{tensor['shape']}  {tensor['dtype']}  {length}".rstrip()))
    print_table("Tensors: shape of one anchor, dtype, length (least / mean / most)", rows)


def _loaded(args: argparse.Namespace, cache: AnchorCache) -> tuple[Any, Reading | None]:
    if args.model:
        return load_text_model(args.model, device_of(args.device)), None
    if args.policy:
        policy = load_policy(args.policy, device_of(args.device))
        return policy, policy_reading(policy, cache)
    source = factory_source(args.factory, None if args.device == "auto" else args.device)
    return source.model, source.reading


# Words in the place of token ids


def _decoder(args: argparse.Namespace, cache: AnchorCache) -> Callable[[list[int]], str] | None:
    """Ids -> text, by the tokenizer that is named, else by that of the model or the teacher, if it is here."""
    if args.tokenizer:
        return tokenizer_of(args.tokenizer)
    for model in filter(None, (args.model, args.policy, cache.model_id)):
        for name in _tokenizers(model):
            try:
                return tokenizer_of(name, local_files_only=True)
            except (UsageError, ImportError, OSError, ValueError, LookupError, AttributeError, TypeError):
                continue  # numbers are shown in the place of words, and the page says so
    return None


def _tokenizers(model: str) -> Iterator[str]:
    """The names that a checkpoint's tokenizer may have: those in its files, beside these or as they are; and its own.

    Args:
        model: Folder or hub id, of a lerobot policy or a model of transformers.
    """
    steps = _read(model, "policy_preprocessor.json").get("steps", ())
    named = [_read(model, "config.json").get("text_tokenizer_name")]
    named += [step.get("config", {}).get("tokenizer_name") for step in steps]
    for name in filter(None, named):
        yield from (str(place) for place in [local(model) / name] if place.is_dir())
        yield str(name)
    yield str(local(model)) if local(model).is_dir() else model


def _read(model: str, name: str) -> dict[str, Any]:
    """A file of a checkpoint; empty if it is not on this machine."""
    file: Any = local(model) / name
    if not local(model).is_dir():
        try:
            from huggingface_hub import try_to_load_from_cache

            file = try_to_load_from_cache(model, name)
        except (ImportError, ValueError):  # a name that is no hub id
            return {}
    try:
        held = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str | Path) else {}
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
