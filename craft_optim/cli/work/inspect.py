"""The work of craft-optim inspect: tables, the page, and drift of a model on a few anchors."""

import argparse
from pathlib import Path

from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.sampling import spread
from craft_optim.cli.options import require_one_model
from craft_optim.cli.output import print_table
from craft_optim.cli.work.processes import device_of
from craft_optim.cli.work.sources import (
    factory_source,
    load_policy,
    load_text_model,
    policy_reading,
    teachers_tokenizer,
    tokenizer_of,
)
from craft_optim.evaluation.drift import Drift, drifts, verdict
from craft_optim.inspection import bytes_in_words, facts, lengths, tensors

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    require_one_model(args)
    cache = AnchorCache.open(args.cache)
    kept = [("Keeps", told.describe(cache.features.outputs[name].size)) for name, told in cache.kept().items()]
    print_table(str(cache.path), [*facts(cache), *kept])
    varying = {row.name: f"{row.shortest} / {row.mean:.3g} / {row.longest}" for row in lengths(cache)}
    print_table(
        "Tensors: shape of one anchor, dtype, length (least / mean / most)",
        [(name, f"{shape}  {dtype}  {varying.get(name, '')}".rstrip()) for name, shape, dtype in tensors(cache)],
    )
    if args.verify:
        cache.verify()
        print(f"\nChecksums: all {len(cache)} anchors are as they were written.")
    indices = spread(len(cache), args.count)
    measured: list[Drift] = []
    judged, tokenizer = None, args.tokenizer
    reading: Reading | None
    if args.policy or args.model or args.factory:
        if args.model:
            model, reading = load_text_model(args.model, device_of(args.device)), None
            tokenizer = tokenizer or args.model
        elif args.policy:
            model = load_policy(args.policy, device_of(args.device))
            reading = policy_reading(model, cache)
            tokenizer = tokenizer or getattr(model.config, "text_tokenizer_name", None)
        else:
            source = factory_source(args.factory, None if args.device == "auto" else args.device)
            model, reading = source.model, source.reading
        measured = drifts(model, cache, indices, reading=reading)
        judged = verdict(cache, model, measured)
        rows = [(drift.kind, f"{drift.value:.3g} {drift.unit}, worst {max(drift.each):.3g}") for drift in measured]
        print_table(f"Drift on {len(indices)} of {len(cache)} anchors", rows)
        print(f"\n{judged[1]}")
    if args.html:
        from craft_optim.report.cache_page import render

        page = render(
            cache,
            indices,
            verified=args.verify,
            measured=measured,
            verdict=judged,
            decode=teachers_tokenizer(cache.model_id) if tokenizer is None else tokenizer_of(tokenizer),
        )
        Path(args.html).write_text(page, encoding="utf-8")
        print(f"\nPage: {args.html} ({bytes_in_words(len(page))})")
