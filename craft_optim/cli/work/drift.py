"""The work of craft-optim drift: models one after another on the same anchors, and the tables."""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.categories import by_category, in_line
from craft_optim.anchors.fingerprint import compare_fingerprints, fingerprint
from craft_optim.anchors.manifest import MANIFEST
from craft_optim.anchors.sampling import spread
from craft_optim.cli.options import UsageError, require_folder
from craft_optim.cli.output import emit_json, print_grid
from craft_optim.cli.work.build_anchors import OF_DATASET, check_build, source_of
from craft_optim.cli.work.processes import device_of
from craft_optim.cli.work.sources import factory_source, load_policy, load_text_model, policy_reading
from craft_optim.evaluation.actions import action_drift, predicted_actions
from craft_optim.evaluation.checkpoints import Checkpoint, layer_name, record, short_names
from craft_optim.evaluation.drift import QUANTILES, Drift, drifts, spread_over
from craft_optim.evaluation.plots import draw_checkpoints, require_matplotlib
from craft_optim.report.numbers import number
from craft_optim.report.summary import BAND, LABELS

__all__ = ["run"]

_FRAMES = {  # what only goes with a dataset: name -> option
    **OF_DATASET,
    "prompts": "--prompts",
    "workers": "--workers",
    "keep": "--keep",
    "layers": "--layers",
    "top_k": "--top-k",
    "kept": "--cache",
}


_CATEGORIES = 20  # rows of a table


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    models = _check(args)
    epsilon = _epsilons(args.epsilon or [])
    device = device_of(args.device)
    with redirect_stdout(sys.stderr) if args.json == "-" else nullcontext(), _opened(args, device) as (cache, teacher):
        epsilon = _resolved(epsilon, cache, bool(args.teacher) and not args.no_actions)
        places = spread(len(cache), args.count if args.cache and args.count else len(cache))
        acting = {"batch_size": args.batch_size or 16, "seed": args.seed, "progress": None}
        expected = None
        if teacher and not args.no_actions:
            expected = predicted_actions(teacher.pop(), cache, places, title="the teacher", **acting)
        teacher.clear()
        _free()
        found = []
        for path, name in zip(models, short_names(models), strict=True):
            model, reading = _loaded(args, path, device, cache)
            found.append(_measured(model, reading, path, name, cache, places, expected, acting))
            del model, reading
            _free()
        categories = [cache.categories[place] for place in places] if any(cache.categories) else []
        about = {
            "cache": None if args.kept is None and args.cache is None else str(cache.path),
            "teacher": args.teacher or cache.model_id,
            "anchors": len(places),
            "places": places,
            "epsilon": epsilon,
            "checkpoints": record(found, places, epsilon, args.worst, categories),
        }
    if args.json != "-":
        _print(found, places, epsilon, args.worst, len(cache), categories)
    if args.json:
        emit_json(args.json, about)
    if args.plot:
        draw_checkpoints(found, epsilon, args.plot)
        print(f"\nPlot: {args.plot}", file=sys.stderr if args.json == "-" else sys.stdout)


def _check(args: argparse.Namespace) -> list[str]:
    """The models to measure; refuses what does not go together before anything is loaded."""
    if sum(map(bool, (args.policies, args.texts, args.factories))) != 1:
        raise UsageError(
            "which models? Pass --policy.path for lerobot's, --model.path for language models, or --factory for others"
        )
    require_folder("--json", args.json)
    require_folder("--plot", args.plot)
    if args.plot:
        require_matplotlib()
    models = args.factories or [part for path in args.policies or args.texts for part in _split(path)]
    frames = {name: option for name, option in _FRAMES.items() if getattr(args, name) is not None}
    if args.teacher and not args.policies:
        raise UsageError("--teacher.path goes with --policy.path: the teacher of other models is in the cache")
    if args.cache:
        if frames:
            raise UsageError(f"{next(iter(frames.values()))} goes with a dataset, not with the cache {args.cache}")
        if not (Path(args.cache) / MANIFEST).is_file():
            AnchorCache.open(args.cache)  # says what is wrong with it
    elif not (args.teacher and {"repo_id", "root", "prompts"} & frames.keys()):
        raise UsageError(
            "there is nothing to compare with: pass the folder of a cache before the options, or --teacher.path and "
            "--dataset.repo_id or --dataset.root"
        )
    else:
        check_build(_of_teacher(args))
    return models


def _split(path: str) -> list[str]:
    return [path] if Path(path).exists() else [part for part in path.split(",") if part]


def _of_teacher(args: argparse.Namespace) -> argparse.Namespace:
    """The options as build-anchors takes them."""
    return argparse.Namespace(**{**vars(args), "policy": args.teacher, "model": None, "factory": None, "tokens": None})


def _epsilons(given: Sequence[str]) -> dict[str, float]:
    """Kind -> epsilon; "" for one that is given without a kind."""
    found: dict[str, float] = {}
    for text in given:
        kind, _, given_value = text.rpartition("=")
        try:
            value = float(given_value)
        except ValueError:
            value = 0.0
        if not 0.0 < value < float("inf") or kind in found:
            raise UsageError(
                "--epsilon must be a number > 0, or KIND=number once for each kind that is measured, such as logits "
                f"or hidden. Found {' '.join(given)!r}"
            )
        found[kind] = value
    return found


def _resolved(given: Mapping[str, float], cache: AnchorCache, actions: bool) -> dict[str, float]:
    """Each epsilon by its kind."""
    kinds, found = cache.kinds, dict(given)
    if "" in found:
        if cache.kind is None or cache.kind in found:
            raise UsageError(
                f"--epsilon={found['']:g} is of which kind? {cache.path} holds {' and '.join(kinds)}, whose units "
                f"differ: pass --epsilon {' '.join(f'{kind}=X' for kind in kinds)}"
            )
        found[cache.kind] = found.pop("")
    if unknown := sorted(found.keys() - {*kinds, *(["actions"] if actions else [])}):
        measured = " and ".join([*kinds, *(["actions"] if actions else [])])
        raise UsageError(f"--epsilon {unknown[0]}=X: here {measured} are measured")
    return found


@contextmanager
def _opened(args: argparse.Namespace, device: str) -> Iterator[tuple[AnchorCache, list[nn.Module]]]:
    """The cache and, in a list that lets go of it, the teacher, if it is needed."""
    if args.cache:
        cache = AnchorCache.open(args.cache)
        teacher = [load_policy(args.teacher, device)] if args.teacher and not args.no_actions else []
        if teacher and cache.fingerprint and (why := compare_fingerprints(cache.fingerprint, fingerprint(teacher[0]))):
            raise ValueError(
                f"--teacher.path={args.teacher} is not the model that {cache.path} was built from: {why}. Pass that "
                "one, or leave --teacher.path out to compare with the cache alone."
            )
        yield cache, teacher
        return
    with tempfile.TemporaryDirectory(prefix="craft-drift-") as folder:
        source = source_of(_of_teacher(args))
        settings = {name: value for name in ("layers", "top_k") if (value := getattr(args, name)) is not None}
        cache = source.build(args.kept or folder, **settings)
        teacher = [source.model]
        del source
        yield cache, teacher


def _loaded(args: argparse.Namespace, path: str, device: str, cache: AnchorCache) -> tuple[Any, Reading | None]:
    if args.policies:
        policy = load_policy(path, device)
        return policy, policy_reading(policy, cache)
    if args.texts:
        return load_text_model(path, device), None
    source = factory_source(path, None if args.device == "auto" else device)
    return source.model.eval(), source.reading


def _measured(
    model: Any,
    reading: Reading | None,
    path: str,
    name: str,
    cache: AnchorCache,
    places: list[int],
    expected: Tensor | None,
    acting: dict[str, Any],
) -> Checkpoint:
    size = acting["batch_size"]
    measured = drifts(model, cache, places, reading=reading, batch_size=size, progress=None, title=name)
    if expected is None:
        return Checkpoint(path, name, measured)
    actions = predicted_actions(model, cache, places, title=name, **acting)
    return Checkpoint(path, name, measured, action_drift(expected, actions))


def _free() -> None:
    """Gives back the memory of a model that is no longer named; closures and their model form cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _print(
    found: Sequence[Checkpoint],
    places: Sequence[int],
    epsilon: Mapping[str, float],
    worst: int,
    total: int,
    categories: Sequence[str],
) -> None:
    print(f"Drift on {len(places)} of {total} anchors. mean: over all valid positions; the others: of single anchors")

    def numbers(value: float, each: Sequence[float], threshold: float | None, of: Sequence[int] = places) -> list[str]:
        spread = spread_over(each, of, threshold, worst)
        over = [] if spread.over is None else [f"{spread.over:.0%}"]
        anchors = " ".join(str(place) for place, _ in spread.worst)
        return [*map(_short, (value, spread.anchor_mean, *spread.quantiles.values())), *over, anchors]

    def header(first: str, threshold: float | None) -> list[str]:
        over = [] if threshold is None else [f"> {threshold:g}"]
        return [first, "mean", "per anchor", *QUANTILES, *over, "worst"]

    def print_categories(kind: str, of_all: Sequence[Sequence[float]], threshold: float | None) -> None:
        parts = list(by_category(categories))
        if not 1 < len(parts) < len(places):
            return
        last = of_all[-1]
        parts.sort(key=lambda part: -fmean(last[i] for i in part[1]))
        left_out = f", {len(parts) - _CATEGORIES} others in --json" if len(parts) > _CATEGORIES else ""
        columns, rows = header("category", threshold), []
        columns[1] = "anchors"
        for name, some in parts[:_CATEGORIES]:
            row = [in_line(name), str(len(some))]
            if len(of_all) > 1:
                row += [_short(fmean(each[i] for i in some)) for each in of_all]
            else:
                row += numbers(0.0, [last[i] for i in some], threshold, [places[i] for i in some])[1:]
            rows.append(row)
        if len(of_all) > 1:
            columns = [*columns[:2], *(checkpoint.name for checkpoint in found)]
            print_grid(f"{kind} by category: means per anchor{left_out}", columns, rows)
        else:
            print_grid(f"{kind} by category{left_out}", columns, rows)

    for place, drift in enumerate(found[0].drifts):
        threshold = epsilon.get(drift.kind)
        of_all = [checkpoint.drifts[place] for checkpoint in found]
        rows = [[c.name, *numbers(d.value, d.each, threshold)] for c, d in zip(found, of_all, strict=True)]
        print_grid(f"{drift.kind}: {drift.unit}", header("checkpoint", threshold), rows)
        print_categories(drift.kind, [d.each for d in of_all], threshold)
        if drift.layers and len(found) == 1:
            rows = [[layer_name(p.layer, p.span), *numbers(p.value, p.each, threshold)] for p in drift.layers]
            print_grid(f"{drift.kind} by layer", header("layer", threshold), rows)
        elif drift.layers:
            print_grid(f"{drift.kind} by layer: means", ["checkpoint", *_layers(drift)], _by_layer(found, of_all))
    acted = [(checkpoint.name, checkpoint.actions) for checkpoint in found if checkpoint.actions is not None]
    if acted:
        threshold = epsilon.get("actions")
        columns = header("checkpoint", threshold)
        columns[1:3] = ["mean", "rms"]
        rows = []
        for name, apart in acted:
            row = [name, *numbers(apart.mean_abs, apart.each, threshold)]
            row[2] = _short(apart.rms)
            rows.append(row)
        print_grid("actions: |difference| to the teacher's, normalised units", columns, rows)
        print_categories("actions", [apart.each for _, apart in acted], threshold)
        dimensions = [str(i) for i in range(len(acted[0][1].rms_per_dimension))]
        rows = [[name, *map(_short, apart.mean_abs_per_dimension)] for name, apart in acted]
        print_grid("actions by dimension: mean |difference|", ["checkpoint", *dimensions], rows)
        rows = [[name, *map(_short, apart.rms_per_dimension)] for name, apart in acted]
        print_grid("actions by dimension: rms", ["checkpoint", *dimensions], rows)
    verdicts = [
        f"\n{checkpoint.name}, {drift.kind}: {number(drift.value / threshold)} x epsilon: "
        f"{LABELS['held' if drift.value <= BAND[1] * threshold else 'not held']}"
        for checkpoint in found
        for drift in checkpoint.drifts
        if (threshold := epsilon.get(drift.kind)) is not None
    ]
    if verdicts:
        print("".join(verdicts))


def _layers(drift: Drift) -> list[str]:
    return [layer_name(part.layer, part.span) for part in drift.layers]


def _by_layer(found: Sequence[Checkpoint], of_all: Sequence[Drift]) -> list[list[str]]:
    return [[c.name, *(_short(p.value) for p in d.layers)] for c, d in zip(found, of_all, strict=True)]


def _short(value: float) -> str:
    return f"{value:.3g}"
