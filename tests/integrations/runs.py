"""A small model in training under CraftOptimizer, and what it takes to compare two such runs bit for bit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bases import in_train_mode, make, ways
from torch import Tensor, nn

from craft_optim import CraftOptimizer, anchors
from craft_optim._tensors import copies_of, parts_of


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


def evaluation(model, optimizer, step, then=lambda: None):
    """A closure: the task gradients of this step, and what else there is to do about them."""

    def closure():
        torch.manual_seed(step)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = loss_of(model, step)
        loss.backward()
        then()
        return loss

    return closure


def advance(optimizer, closure, way):
    if way == "backward, closure":
        closure()
    if "closure" in way:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


class Counted(anchors.LogitRetention):
    """Counts its passes; a look without gradients at where a step has led is none."""

    calls = 0

    def loss(self, number: int) -> Tensor:
        self.calls += torch.is_grad_enabled()
        return super().loss(number)


@dataclass
class Run:
    """Everything that one training owns."""

    model: nn.Module
    retention: Counted
    optimizer: CraftOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    way: str = "loop"

    def train(self, first: int, last: int) -> "Run":
        for step in range(first, last):
            advance(self.optimizer, self._evaluation(step), self.way)
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def _evaluation(self, step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, step)
            loss.backward()
            return loss

        return closure

    def everything(self) -> dict[str, Any]:
        """A copy of all that a resumed run must have in common with one that was never stopped."""
        optimizer = self.optimizer.state_dict()
        if "state" in optimizer:
            # An optimizer without state has no entry for a parameter, or, after some routes, an empty one.
            optimizer["state"] = {k: v for k, v in optimizer["state"].items() if v}
        entries = [x for entry in self.optimizer.state.values() for x in getattr(entry, "values", list)()]
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state(),  # of the dropout masks
                "metrics": self.optimizer.metrics,
            },
            copies_of(entries),
        )


BASES = ("AdamW", "SGD", "Adafactor")  # of `bases.OPTIMIZERS`, where one does for all


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
    optimizer = in_train_mode(wrap(make(base)(model.parameters()), given, **craft))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return Run(model, retention, optimizer, scheduler, ways(base)[0])


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equality through dicts and sequences, bit for bit for tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        for x, y in zip(parts_of(torch.as_tensor(a)), parts_of(torch.as_tensor(b)), strict=True):
            if x.dtype == torch.float8_e4m3fn:  # which cannot be compared
                x, y = x.view(torch.uint8), y.view(torch.uint8)
            assert torch.equal(x, y), where
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
