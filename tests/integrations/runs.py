"""A small model in training under CraftOptimizer, and what it takes to compare two such runs bit for bit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer, anchors


def network() -> nn.Sequential:
    """The same weights on every call. The middle one is as small as 8-bit optimizers quantise."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
        )


def small_llama(**config: Any) -> nn.Module:
    """The same weights on every call."""
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {**sizes, **heads, "attention_dropout": 0.1, "initializer_range": 0.3, **config}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def build_cache(path, autocast=None):
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    reading = anchors.Reading(autocast=autocast)
    return anchors.build(network(), inputs.split(16), path, reading, dtype=torch.float32, progress=False, class_dim=-1)


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1000 + step))
    return x, x[:, :4].argmin(1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


class Counted(anchors.LogitRetention):
    """Counts its calls."""

    calls = 0

    def loss(self, number: int) -> Tensor:
        self.calls += 1
        return super().loss(number)


@dataclass
class Run:
    """Everything that one training owns."""

    model: nn.Module
    retention: Counted
    optimizer: CraftOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def train(self, first: int, last: int) -> "Run":
        for step in range(first, last):
            loss_of(self.model, step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def everything(self) -> dict[str, Any]:
        """A copy of all that a resumed run must have in common with one that was never stopped."""
        optimizer = self.optimizer.state_dict()
        # An optimizer without state has no entry for a parameter, or, after some routes, an empty one.
        optimizer["state"] = {k: v for k, v in optimizer["state"].items() if v}
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state(),  # of the dropout masks
                "metrics": self.optimizer.metrics,
            }
        )


BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),  # has no state
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-2),
}


def bare(base, retention, **craft):
    """Instead of CraftOptimizer: the base."""
    return base


def new_run(cache, base: str = "AdamW", wrap=CraftOptimizer, closures=None, **craft: Any) -> Run:
    """With these rates and this epsilon some steps project and others do not. Seeds the generator.

    Args:
        closures: What `wrap` is given, made of the run's own closure; None for that alone.
    """
    torch.manual_seed(7)
    model = network()
    retention = Counted(model, cache, 16)
    if closures is None:
        given, craft = retention, {"epsilon": 0.01} | craft
    else:
        given = closures(retention)
    optimizer = wrap(BASES[base](model.parameters()), given, **craft)
    return Run(model, retention, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40))


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equality through dicts and sequences, bit for bit for tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
