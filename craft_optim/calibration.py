"""The meaning of epsilon for a model and its anchors: drift by rounding and by plain steps, and a first epsilon."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from craft_optim._numbers import whole
from craft_optim._warn import warn
from craft_optim.anchors import AnchorCache, AnchorRetention
from craft_optim.anchors.passes import device_of
from craft_optim.optimizer import CraftOptimizer
from craft_optim.overlap import Overlap, OverlapSearch
from craft_optim.retention import Retention, measurable
from craft_optim.rewind import Rewind, rewound

__all__ = ["Calibration", "PlainSteps", "Suggestion", "calibrate", "suggest"]

_LAST_LOSSES = 10
_WARMING_UP = 0.5  # of a schedule's first learning rate: steps at less say little about the run
# Tight, first and loose. Nats are how far distributions are apart, whatever the model: in sweeps on digits, characters
# and pi0_fast, over learning rates a factor of ten apart, the best epsilon lay between the outer two or below
_NATS = (0.003, 0.02, 0.1)
# Shares of the plain steps' drift, for other units: the best in sweeps of hidden states and outputs lay this far apart
_SHARES = (0.003, 0.01, 0.1)
_ABOVE_ROUNDING = 10.0


@dataclass(frozen=True)
class PlainSteps:
    """Drift after `steps` steps without retention, from the unchanged model; `heldout` on held-out anchors, if any.

    `loss` is the mean of the last ten values, or fewer, that `train_step` returned; None if it returned none.
    """

    steps: int
    drift: float
    heldout: float | None
    loss: float | None


@dataclass(frozen=True)
class Suggestion:
    """Epsilons to begin with: the first to try, the smallest and the largest worth a try, and their reason in words."""

    tight: float
    epsilon: float
    loose: float
    reason: str


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`; `print` it.

    Attributes:
        unit: Unit of all drifts here, in words.
        anchors: Largest number of anchors that the drifts are measured on.
        noise: Drift of the unchanged model by rounding: the larger of those in train and eval mode.
        bfloat16_weights: The same with weights rounded to bfloat16; None if the weights are no more precise.
        bfloat16_autocast: The same under autocast to bfloat16; None if autocast was on anyway.
        plain: Drift after plain steps.
        learning_rate: Largest learning rate of the plain steps; None without training.
        overlap: Anchors that the plain steps trained on; None where nothing could be compared.
        suggestion: Epsilons to begin with; None without training, or if it moved the model no further than rounding
            does.
    """

    unit: str
    anchors: int
    noise: float
    bfloat16_weights: float | None
    bfloat16_autocast: float | None
    plain: tuple[PlainSteps, ...]
    learning_rate: float | None
    overlap: Overlap | None
    suggestion: Suggestion | None

    @property
    def floor(self) -> float:
        """Largest drift that may be rounding: ten times the largest of `noise` and the two of bfloat16."""
        return _floor(self.noise, self.bfloat16_weights, self.bfloat16_autocast)

    def to_dict(self) -> dict[str, Any]:
        """The result in the types of JSON."""
        return {**asdict(self), "floor": self.floor}

    def __str__(self) -> str:
        rows = [
            ("unchanged", self.noise, None, None),
            ("weights in bfloat16", self.bfloat16_weights, None, None),
            ("computed in bfloat16", self.bfloat16_autocast, None, None),
            *((f"{x.steps} plain step{'s' * (x.steps > 1)}", x.drift, x.heldout, x.loss) for x in self.plain),
        ]
        header = ("drift after", "on anchors", "on held-out", "task loss")
        cells = [header, *((name, *map(_short, values)) for name, *values in rows if values[0] is not None)]
        shown = [i for i in range(4) if any(row[i] for row in cells[1:])]
        widths = {i: max(len(row[i]) for row in cells) for i in shown}
        lines = [
            "  ".join(f"{row[i]:>{widths[i]}}" if i else f"{row[i]:{widths[i]}}" for i in shown).rstrip()
            for row in cells
        ]
        more = [f"in {self.unit}, on at most {self.anchors} anchors"]
        if self.learning_rate is not None:
            more.append(f"plain steps at a learning rate of {self.learning_rate:.3g}")
        found = self.suggestion
        if found is not None:
            more.append(
                f"\nepsilon: try {found.epsilon:.2g} (tight {found.tight:.2g}, loose {found.loose:.2g})\n{found.reason}"
            )
        elif self.plain:
            more.append("\nepsilon: none to suggest, the plain steps moved the model no further than rounding does")
        else:
            more.append(f"\nepsilon: above {self.floor:.2g}; `train_step=` makes it a suggestion")
        return "\n".join([*lines, *more])


def suggest(floor: float, plain: float, *, nats: bool) -> Suggestion | None:
    """A range of epsilon to begin with; None if plain training moves the model no further than rounding.

    Args:
        floor: Largest drift that may be rounding.
        plain: Drift of plain training, after about a hundred steps.
        nats: True if both are in nats.

    Example:
        >>> found = suggest(1e-4, 2.4, nats=True)
        >>> found.tight, found.epsilon, found.loose
        (0.003, 0.02, 0.1)
    """
    if not plain > floor:
        return None
    wanted = _NATS if nats else tuple(share * plain for share in _SHARES)
    tight, epsilon, loose = (min(max(x, floor), plain) for x in wanted)
    kind = (
        "Nats mean the same for every model"
        if nats
        else "No value in this unit carries over from other models, so sweep between tight and loose: "
        + ", ".join(f"{x:.1%}" for x in _SHARES)
        + " of what the plain steps do"
    )
    bounds = f"kept between rounding, {floor:.2g}, and the plain steps' drift, {plain:.2g}"
    return Suggestion(tight, epsilon, loose, f"{kind}; {bounds}.")


def calibrate(
    model: nn.Module,
    retention: Retention | AnchorCache,
    *,
    train_step: Callable[[], Any] | None = None,
    steps: Sequence[int] = (1, 100),
    heldout: Any = None,
    anchors: int = 256,
    task_batches: Iterable[Any] | None = None,
    restore: Iterable[Any] = (),
    bfloat16: bool = True,
) -> Calibration:
    """Measures what epsilon means for this model and these anchors, and suggests one.

    Run it before fine-tuning, on the model that the anchors were built from. Afterwards, also after an exception,
    everything is restored bit for bit, except that the closure's check of pass 0 is done.

    Example:
        batches = iter(loader)
        def train_step():
            optimizer.zero_grad()
            loss = model(**next(batches)).loss
            loss.backward()
            optimizer.step()
            return loss
        print(craft_optim.calibrate(model, retention, train_step=train_step, heldout=heldout_cache))

    Args:
        model: The model in training, before its first step; not sharded over processes.
        retention: The closure to train with, or a cache that one kind of closure fits.
        train_step: Function that does one step of your loop without retention, at the learning rate that matters:
            without a scheduler, which may still be warming up, and on batches of its own iterator, which nothing
            rewinds. May return the loss. None: only rounding is measured, and nothing is suggested.
        steps: Numbers of steps after which to measure, ascending. The drift after the last is that of plain training.
        heldout: Held-out anchors, as `retention.drift` takes them.
        anchors: Largest number of anchors to measure on, evenly spaced; also of `heldout`.
        task_batches: Batches of the new task, with the inputs that the cache was built from, to search for anchors.
            None: the model's inputs in `train_step`, if they have the same names.
        restore: Other objects with `state_dict` that `train_step` changes: scheduler, scaler. Optimizers of torch are
            found automatically.
        bfloat16: True to measure with bfloat16, too.

    Raises:
        AnchorMismatchError: The model is not the one that the anchors were built from.
        ValueError: A cache fits several closures, `steps` are not ascending, the plain steps diverge, or none was done.
        TypeError: `retention` cannot be measured, or `train_step` steps a CraftOptimizer.

    Cost: `steps[-1]` steps of training, and about six forwards over `anchors`. Memory: a copy of the model's values, of
    its gradients and its optimizer's state on the CPU.
    """
    steps, restore = tuple(steps), list(restore)
    if not steps or sorted({whole("steps", x) for x in steps}) != list(steps):
        raise ValueError(f"`steps` must be whole numbers >= 1, ascending. Found steps={steps!r}.")
    steps, anchors = tuple(map(int, steps)), whole("anchors", anchors)
    closure = _closure(model, retention)
    search = _search(closure, anchors)
    for batch in task_batches or ():
        search.look(batch)

    def drift(others: Any = None) -> float:
        return closure.drift(others, anchors)

    with rewound(model, restore) as rewind:
        noise = _noise(model, closure, drift)
        weights, autocast = _in_bfloat16(model, closure, drift, rewind) if bfloat16 else (None, None)
        floor = _floor(noise, weights, autocast)
        plain: list[PlainSteps] = []
        rate = None
        if train_step is not None:
            with _seen_by(model, search) if task_batches is None else nullcontext(), _refusing_retention():
                plain, rate = _plain(train_step, steps, drift, heldout, rewind, schedule_is_known=bool(restore))
    overlap = search.found
    if overlap is not None and overlap.anchors:
        warn(
            f"{overlap.anchors} of {overlap.looked_for} anchors are inputs of the new task, too, equal to the bit. "
            "There the constraint holds the model to what it says now, and keeps it from learning: take anchors of "
            "what it must keep. If these are old examples that you replay among the new ones, all is well."
        )
    return Calibration(
        unit=closure.unit,
        anchors=anchors,
        noise=noise,
        bfloat16_weights=weights,
        bfloat16_autocast=autocast,
        plain=tuple(plain),
        learning_rate=rate,
        overlap=overlap,
        suggestion=suggest(floor, plain[-1].drift, nats=closure.unit.startswith("nats")) if plain else None,
    )


def _search(closure: Retention, count: int) -> OverlapSearch:
    try:
        return OverlapSearch(closure.examples(count))
    except (TypeError, ValueError):  # rows do not belong to anchors, as in flat picture tensors
        return OverlapSearch(())


def _floor(*drifts: float | None) -> float:
    return _ABOVE_ROUNDING * max(x for x in drifts if x is not None)


def _closure(model: nn.Module, retention: object) -> Retention:
    if isinstance(retention, AnchorCache):
        if retention.kind is None:
            closures = " or ".join(f"cache.retention(model, {kind!r})" for kind in retention.kinds)
            raise ValueError(
                f"{retention.path} holds {' and '.join(retention.kinds)}, whose units differ: pass the closure that "
                f"you will train with, {closures}."
            )
        return retention.retention(model, batch_size=min(16, len(retention)), workers=0)
    closure, mine = measurable(retention), {id(p) for p in model.parameters()}
    reached = list(closure.parameters())
    if reached and not any(id(p) in mine for p in reached):
        raise ValueError(
            "`retention` must measure `model`. Found a closure of another one: it shares no parameter with this "
            f"{type(model).__name__}. Make the closure with the model that is trained."
        )
    return closure


def _noise(model: nn.Module, closure: Retention, drift: Callable[[], float]) -> float:
    """Drift of the model as it is; refuses one that has moved already."""
    closure.loss(0)  # a strict one compares in pass 0, and says what is wrong
    modes, found = [(module, module.training) for module in model.modules()], []
    for training in (True, False):
        model.train(training)
        found.append(abs(drift()))
    for module, training in modes:
        module.training = training
    if max(found) > (rounding := closure.tolerance):
        raise ValueError(
            f"The unchanged model's drift must be rounding, at most {rounding:.3g}. Found {max(found):.3g}: calibrate "
            "the model that the anchors were built of, before it is fine-tuned. Imported tokens without the teacher's "
            "log-probabilities cannot be calibrated, their drift does not begin at 0."
        )
    return max(found)


def _in_bfloat16(
    model: nn.Module, closure: Retention, drift: Callable[[], float], rewind: Rewind
) -> tuple[float | None, float | None]:
    """Drift with rounded weights, and under autocast; None where that changes nothing."""
    wide = [p for p in model.parameters() if p.dtype in (torch.float16, torch.float32, torch.float64)]
    weights = autocast = None
    if wide:
        with torch.no_grad():
            for p in wide:
                p.copy_(p.to(torch.bfloat16))
        weights = abs(drift())
        rewind.values_back()
    device = device_of(model).type
    own = closure.reading.autocast if isinstance(closure, AnchorRetention) else None
    if own is None and not torch.is_autocast_enabled(device):
        with torch.autocast(device, dtype=torch.bfloat16):
            autocast = abs(drift())
    return weights, autocast


def _plain(
    train_step: Callable[[], Any],
    steps: Sequence[int],
    drift: Callable[..., float],
    heldout: Any,
    rewind: Rewind,
    *,
    schedule_is_known: bool,
) -> tuple[list[PlainSteps], float | None]:
    """Trains and measures on the way; also returns the largest learning rate."""
    found, losses, rates = [], [], []
    for number in range(1, steps[-1] + 1):
        loss = train_step()
        losses.append(None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss))
        rates.append(_rates(rewind))
        if rates[-1] != rates[0] and not schedule_is_known:
            raise ValueError(
                "`train_step` changes the learning rate: a scheduler steps in it that is not in `restore`, and has now "
                f"done {number} steps. Leave it out of `train_step`, or pass restore=[scheduler]; make it anew."
            )
        if number not in steps:
            continue
        now, other = drift(), None if heldout is None else drift(heldout)
        if not math.isfinite(now):
            raise ValueError(
                f"`train_step` must train. After {number} steps the drift is {now}: the plain loop diverges at this "
                "learning rate."
            )
        last = [x for x in losses[-_LAST_LOSSES:] if x is not None]
        found.append(PlainSteps(number, now, other, fmean(last) if last else None))
    if not rewind.stepped:
        raise ValueError(
            "`train_step` must do one step of a torch optimizer. Found that none has stepped: call `optimizer.step()` "
            "in it."
        )
    largest = max((rate for now in rates for rate in now), default=None)
    begins = [float(g["initial_lr"]) for o in rewind.stepped for g in o.param_groups if "initial_lr" in g]
    if largest is not None and begins and largest < _WARMING_UP * max(begins):
        warn(
            f"The plain steps used a learning rate of at most {largest:.3g}, where a schedule begins from "
            f"{max(begins):.3g}: it is warming up, and the steps move the model less than the run will. Calibrate with "
            "an optimizer without scheduler."
        )
    return found, largest


def _rates(rewind: Rewind) -> list[float]:
    return [float(g["lr"]) for o in rewind.stepped for g in o.param_groups if "lr" in g]


@contextmanager
def _refusing_retention() -> Iterator[None]:
    """Makes a CraftOptimizer with a closure refuse to step within the block."""

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, CraftOptimizer) and optimizer.retention_closure is not None:
            raise TypeError(
                "`train_step` must step without retention. Found a CraftOptimizer with a closure: step its "
                "`base_optimizer`."
            )

    hook = register_optimizer_step_pre_hook(refuse)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _seen_by(model: nn.Module, search: OverlapSearch) -> Iterator[None]:
    """Searches the model's inputs within the block for anchors, if they have the anchors' names."""

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not (args and kwargs):  # training, not the passes that measure
            with suppress(TypeError, ValueError):
                search.look(kwargs or (args[0] if len(args) == 1 else args))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
