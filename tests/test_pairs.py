"""Every pair of features either trains as a slow loop does that is written out below, or is refused by name."""

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_optim import CraftOptimizer
from craft_optim._step import gradients
from craft_optim.dual import Update
from craft_optim.schedules import Linear

WORDS = torch.randint(12, (16, 3), generator=torch.Generator().manual_seed(3))
TARGET = torch.randn(16, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
STEPS, LAMBDA, EPSILON = 6, 0.7, 0.01

# Name -> how it is tried, as the page has it
FEATURES = {
    "bfloat16 copies": '`gradient_memory="bfloat16"`',
    "host copies": '`gradient_memory="host"`',
    "two constraints": "two closures",
    "retention_every": "`retention_every=2`",
    "max_grad_norm": "`max_grad_norm=0.1`",
    "schedules": "of epsilon, and of the learning rate",
    "sink": "`on_metrics=`",
    "GradScaler": "float16 autocast with a loss scale",
    "accumulation": "two backwards for a step",
    "compiled": "`torch.compile` of the model",
    "checkpointing": "not reentrant",
    "reentrant checkpointing": "`use_reentrant=True`",
    "LBFGS": "`max_iter=2`",
    "line search": '`line_search_fn="strong_wolfe"`',
    "maximize": "`maximize=True`",
    "sparse": "`nn.Embedding(sparse=True)`",
    "frozen": "a head that does not train",
}
EITHER = [{"bfloat16 copies", "host copies"}, {"checkpointing", "reentrant checkpointing"}, {"LBFGS", "line search"}]
# Refused by torch, in these words
BY_TORCH = {
    ("GradScaler", "LBFGS"): "Closure use is not currently supported",
    ("GradScaler", "line search"): "Closure use is not currently supported",
    ("LBFGS", "maximize"): "unexpected keyword argument 'maximize'",
    ("line search", "maximize"): "unexpected keyword argument 'maximize'",
}
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in EITHER]
SEARCHES = {"LBFGS", "line search"}


class Fixed:
    """A controller whose multiplier is known."""

    def initial_state(self):
        return {}

    def __call__(self, state, *, cap, **_):
        return Update(min(LAMBDA, cap), {}, cap < LAMBDA)


class Net(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.words = nn.Embedding(12, 6, sparse="sparse" in features)
        self.body, self.head = nn.Sequential(nn.Linear(18, 8), nn.Tanh()), nn.Linear(8, 4)
        self.reentrant = (
            True if "reentrant checkpointing" in features else False if "checkpointing" in features else None
        )
        if "frozen" in features:
            self.head.requires_grad_(False)

    def forward(self, words):
        h = self.words(words).flatten(1)
        h = self.body(h) if self.reentrant is None else checkpoint(self.body, h, use_reentrant=self.reentrant)
        return self.head(h)


class Setup:
    """A model, its drifts and its task, as the features have it."""

    def __init__(self, features):
        torch.manual_seed(0)
        self.features, self.plain = features, Net(features)
        if "GradScaler" not in features:
            self.plain.double()
        self.teacher = copy.deepcopy(self.plain).requires_grad_(False)
        self.model = torch.compile(self.plain, backend="eager") if "compiled" in features else self.plain
        self.parameters = [p for p in self.plain.parameters() if p.requires_grad]
        sign = -1.0 if "maximize" in features else 1.0
        self.task = lambda x, y: sign * (self.model(x).to(y.dtype) - y).square().mean()
        drifts = [lambda: self.drift(0), lambda: self.drift(1)]
        self.drifts = drifts if "two constraints" in features else drifts[:1]
        if SEARCHES & features:
            search = "strong_wolfe" if "line search" in features else None
            others = {"maximize": True} if "maximize" in features else {}
            self.base = torch.optim.LBFGS(self.parameters, lr=0.05, max_iter=2, line_search_fn=search, **others)
        else:
            self.base = torch.optim.SGD(self.parameters, lr=0.1, maximize="maximize" in features)
        self.rate = torch.optim.lr_scheduler.StepLR(self.base, 2, 0.5) if "schedules" in features else None
        self.half = torch.autocast("cpu", torch.float16) if "GradScaler" in features else nullcontext()

    def drift(self, which):
        rows = slice(8 * which, 8 * which + 8)
        with self.half:
            return (
                (self.model(WORDS[rows]).to(TARGET.dtype) - self.teacher(WORDS[rows]).to(TARGET.dtype)).square().mean()
            )

    def epsilon(self, step):
        return Linear(2 * EPSILON, EPSILON, 4)(step) if "schedules" in self.features else EPSILON

    def halves(self):
        return WORDS.split(8), TARGET.split(8)

    def backward(self, scaled=lambda loss: loss):
        """The task's; of two micro-batches, if so asked. Returns the loss."""
        parts = list(zip(*self.halves(), strict=True)) if "accumulation" in self.features else [(WORDS, TARGET)]
        total = 0.0
        for x, y in parts:
            with self.half:
                loss = self.task(x, y) / len(parts)
            scaled(loss).backward()
            total = total + loss.detach()
        return total


def trained(features):
    setup, rows = Setup(features), []
    memory = "bfloat16" if "bfloat16 copies" in features else "host" if "host copies" in features else "copy"
    optimizer = CraftOptimizer(
        setup.base,
        dict(zip("ab", setup.drifts, strict=False)) if len(setup.drifts) > 1 else setup.drifts[0],
        epsilon=setup.epsilon,
        dual=Fixed(),
        gradient_memory=memory,
        retention_every=2 if "retention_every" in features else 1,
        trust_region=None,
        max_grad_norm=0.1 if "max_grad_norm" in features else None,
        on_metrics=rows.append if "sink" in features else None,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled="GradScaler" in features)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if SEARCHES & features:

            def evaluate():
                optimizer.zero_grad()
                return setup.backward()

            if "GradScaler" in features:
                scaler.step(optimizer, closure=evaluate)
            else:
                optimizer.step(evaluate)
        else:
            setup.backward(scaler.scale)
            scaler.step(optimizer)
            scaler.update()
        if setup.rate is not None:
            setup.rate.step()
    if "sink" in features:
        assert [row["retention_step"] for row in rows] == [*range(0, STEPS, 2 if "retention_every" in features else 1)]
    return setup


def by_hand(features):
    """The slow loop: dense float64 vectors and the formulas of docs/method.md and docs/constraints.md."""
    setup = Setup(features)
    parameters, every = setup.parameters, 2 if "retention_every" in features else 1
    rho = 3.0 * every
    averages = []  # of each drift over its passes

    def vector(rounds=False):
        found = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in parameters]
        if rounds:  # what is sparse is not
            pairs = zip(parameters, found, strict=True)
            found = [g if p.grad.is_sparse else g.bfloat16() for p, g in pairs]
        return torch.cat([g.reshape(-1).double() for g in found])

    def gradient(loss):
        for p in parameters:
            p.grad = None
        loss.backward()
        return vector()

    first = {}

    def merged(step):
        for p in parameters:
            p.grad = None
        value = setup.backward()
        if step % every:
            return value
        task = vector(rounds="bfloat16 copies" in features)
        sign = -1.0 if "maximize" in features else 1.0
        losses = [drift() for drift in setup.drifts]
        pulls = [sign * gradient(loss) for loss in losses]
        if "a" not in first:
            now = [float(x.detach()) for x in losses]
            averages[:] = [0.8 * old + 0.2 * x for old, x in zip(averages, now, strict=True)] if averages else now
            first["a"] = coefficients(task, pulls, averages, setup.epsilon(step), rho)
        weights, scale = first["a"], 1.0
        if "max_grad_norm" in features:
            norm = float((task + sum(w * r for w, r in zip(weights, pulls, strict=True))).norm())
            scale = first.setdefault("scale", min(1.0, 0.1 / norm))
        whole = scale * (task + sum(w * r for w, r in zip(weights, pulls, strict=True)))
        for p, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        return scale * (value + sign * sum(w * float(x.detach()) for w, x in zip(weights, losses, strict=True)))

    for step in range(STEPS):
        first.clear()
        if SEARCHES & features:
            setup.base.step(lambda step=step: merged(step))
        else:
            merged(step)
            setup.base.step()
        if setup.rate is not None:
            setup.rate.step()
    return setup


def coefficients(task, pulls, drifts, epsilon, rho):
    """w_j of g = g_t + sum_j w_j g_j."""
    lams = [min(LAMBDA, rho * float(task.norm() / r.norm())) if float(r.norm()) else LAMBDA for r in pulls]
    pulled = sum(lam * r for lam, r in zip(lams, pulls, strict=True))
    if len(pulls) > 1 and float(pulled.norm()) > rho * float(task.norm()):
        lams = [lam * rho * float(task.norm() / pulled.norm()) for lam in lams]
    # The nearest to g_t in the cone of those that are violated: by trying all sets of active ones
    violated = [j for j, drift in enumerate(drifts) if drift > epsilon]
    best = None
    for count in range(len(violated) + 1):
        for active in itertools.combinations(violated, count):
            added = torch.zeros(len(pulls), dtype=torch.float64)
            if active:
                rows = torch.stack([pulls[j] for j in active])
                added[list(active)] = torch.linalg.lstsq(rows @ rows.T, -(rows @ task)[:, None]).solution[:, 0]
            moved = task + sum(a * r for a, r in zip(added, pulls, strict=True))
            feasible = all(float(moved @ pulls[j]) >= -1e-9 for j in violated) and bool((added >= -1e-12).all())
            if feasible and (best is None or float((moved - task).norm()) < best[0]):
                best = float((moved - task).norm()), added
    return [lam + float(a) for lam, a in zip(lams, best[1], strict=True)]


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in BY_TORCH], ids=" + ".join)
def test_a_pair_trains_as_the_slow_loop(pair, monkeypatch):
    monkeypatch.setattr(gradients, "_is_host", lambda device: False)  # a CPU's gradients go elsewhere, too
    found, expected, start = trained(set(pair)), by_hand(set(pair)), Setup(set(pair))
    share = 0.02 if "GradScaler" in pair else 1e-7
    for p, q, before in zip(found.parameters, expected.parameters, start.parameters, strict=True):
        moved = float((q - before).detach().abs().max())
        assert moved > 0.0
        assert float((p - q).detach().abs().max()) <= share * moved


@pytest.mark.parametrize("pair", BY_TORCH, ids=" + ".join)
def test_what_torch_refuses(pair):
    with pytest.raises((RuntimeError, TypeError), match=BY_TORCH[pair]):
        trained(set(pair))


def test_retention_takes_part(monkeypatch):
    with_it = trained(set()).parameters
    monkeypatch.setattr(Fixed, "__call__", lambda *_, **__: Update(0.0, {}, False))
    without = trained(set()).parameters
    assert float((with_it[-1] - without[-1]).detach().abs().max()) > 1e-3


def test_the_page_has_this_table():
    rows = ["| | tried as | not together with |", "|---|---|---|"]
    for name, tried in FEATURES.items():
        others = [next(iter(pair - {name})) for pair in EITHER if name in pair]
        others += [f"{one} (torch)" for pair in BY_TORCH if name in pair for one in pair if one != name]
        rows.append(f"| {name} | {tried} | {', '.join(others)} |")
    page = (Path(__file__).parents[1] / "docs" / "works_with.md").read_text()
    assert "\n".join(rows) in page, "\n" + "\n".join(rows)
