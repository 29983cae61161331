"""A plan in words: tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from craft_optim.inspection import bytes_in_words
from craft_optim.planning.gpus import Fit

__all__ = ["in_words"]

_SHARES = ((0.25, "a quarter of the anchors"), (0.5, "half of them"), (1.0, "all of them"))
_EVERY = (1, 2, 5, 10)


def in_words(plan: Any, gpus: Sequence[float] = ()) -> str:
    """All tables of a `Plan`, with the number of GPUs of these sizes, GiB, that it needs."""
    parts = [_held(plan), _peaks(plan, gpus), *([_head(plan)] if plan.phases.logits else []), _cost(plan), _disk(plan)]
    return "\n\n".join([*parts, *plan.notes])


def binary(size: float) -> str:
    """Bytes in units of 1024, as GPUs are sold."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _grid(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = [f"{x:>{width}}" if i else f"{x:{width}}" for i, (x, width) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _held(plan: Any) -> str:
    of = plan.phases
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("of them trained", f"{plan.trained:,}"),
        ("weights", binary(of.weights)),
        ("gradients", binary(of.gradients)),
        ("state of the base optimizer", binary(of.state)),
        ("what its step works with", binary(of.base_step)),
        *(
            (f'task gradients in wait, gradient_memory="{memory}"', binary(plan.waiting(memory)))
            for memory in ("copy", "bfloat16", "host")
        ),
        ("parameters that the trust region copies", binary(plan.values("copy"))),
    ]
    return _grid(f"Batches of {plan.batch_size}, {plan.anchor_batch_size} anchors per pass", rows)


def _peaks(plan: Any, gpus: Sequence[float]) -> str:
    ways = [on for on in (False, True) if plan.passed("task", on) is not None]
    names = {False: "without checkpointing", True: "with checkpointing"}
    rows = [["", *(names[on] for on in ways)]]
    for which, label in (("task", "activations of the task"), ("anchors", "activations of the anchors")):
        rows.append([label, *(binary(plan.passed(which, on).activations) for on in ways)])
    for held, label in (
        ("base", "peak of the base optimizer alone"),
        ("copy", 'peak with retention, gradient_memory="copy"'),
        ("bfloat16", 'the same, "bfloat16"'),
        ("host", 'the same, "host"'),
    ):
        rows.append([label, *(binary(plan.peak(held, on)) for on in ways)])
    rows += [[f"GPUs of {gib:g} GiB", *(_fit(plan.fits(gib, checkpointing=on)) for on in ways)] for gib in gpus]
    return _grid("Memory", rows)


def _fit(fit: Fit) -> str:
    if fit.one:
        return "1" if fit.ddp else "1 (not under DDP)"
    return "no number" if fit.fsdp is None else f"{fit.fsdp} (FSDP2)"


def _head(plan: Any) -> str:
    of = plan.phases
    how = "the head runs in pieces" if of.left_out else "they are computed as a whole: the head is not a plain one"
    rows = [("all", binary(of.logits)), ("compared at a time", binary(of.piece))]
    return _grid(f"Logits of a pass over anchors in float32; {how}", rows)


def _cost(plan: Any) -> str:
    rows = [["", *(f"K = {every}" for every in _EVERY)]]
    rows += [[label, *(f"{plan.cost(every, share):.2f}" for every in _EVERY)] for share, label in _SHARES]
    return _grid("Operations of a step with a pass on every K-th, over those of the base alone", rows)


def _disk(plan: Any) -> str:
    rows = [
        ("an anchor", bytes_in_words(plan.per_anchor)),
        (f"{plan.count:,} anchors", bytes_in_words(plan.disk)),
    ]
    return _grid("Disk of the cache, at most", rows)
