"""Two small problems with all of the drift in one pass: one parameter with noise, and a tanh network."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from craft_optim import CraftOptimizer, Retention

from .cases import Case, Found, Record, keywords

__all__ = ["Network", "Parameter", "run_problem"]

PARAMETER_STEPS, NETWORK_STEPS = 3000, 400


class Parameter(Retention):
    """theta^2 times log-normal noise of mean 1: what a batch of anchors says about their mean.

    Args:
        theta: One parameter, 0 in the pretrained model.
        std: Of the noise.
        seed: Of the noise.
    """

    def __init__(self, theta: Tensor, std: float, seed: int) -> None:
        self._theta, self._std, self._seed = theta, math.sqrt(math.log1p(std**2)), seed

    def true(self) -> Tensor:
        """Without noise."""
        return self._theta.square()

    def loss(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + number)
        drawn = torch.randn((), generator=generator, dtype=torch.float64).item()
        return self.true() * math.exp(self._std * drawn - self._std**2 / 2.0)


class Network(Retention):
    """KL from the untrained network on 64 points, all of them in each pass.

    Args:
        model: Inputs `[n, 8]` -> logits.
        inputs: The points.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        with torch.no_grad():
            self._before = model(inputs).log_softmax(-1)

    def true(self) -> Tensor:
        """The same as `loss`."""
        logits = self._model(self._inputs).log_softmax(-1)
        return functional.kl_div(logits, self._before, log_target=True, reduction="batchmean")

    def loss(self, number: int) -> Tensor:
        return self.true()


def run_problem(case: Case) -> Record:
    """Runs a case whose setting is "parameter" or "network"."""
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)
    if case.setting == "parameter":
        theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        retention: Parameter | Network = Parameter(theta, case.noise, case.seed)
        base: torch.optim.Optimizer = torch.optim.SGD([theta], lr=1e-3)
        steps = PARAMETER_STEPS

        def task() -> Tensor:
            return -theta
    else:
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        inputs, targets = torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)
        retention = Network(model, torch.randn(64, 8, generator=generator))
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps = NETWORK_STEPS

        def task() -> Tensor:
            return functional.cross_entropy(model(inputs), targets)

    found = Found(lambda: float(retention.true().detach()))
    optimizer = CraftOptimizer(base, retention, epsilon=case.epsilon, on_metrics=found.passed, **keywords(case))
    for _ in range(steps):
        base.zero_grad()
        (case.scale * task()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.stepped()
    return found.record(case)
