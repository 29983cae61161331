"""A whole training step (forward, backward, optimizer) with retention, over the same step with AdamW alone.

There are as many anchors as training examples, or a quarter of that. All optimizers of a model share it and its AdamW.

make bench GROUP=step
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gpu_memory import require_gpu
from shapes import gpt2, tensors
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorRetention, LogitRetention, build

Compare = Callable[..., None]
Note = Callable[..., None]

RATE = 1e-5


class Setting(NamedTuple):
    """What a step with retention is; the anchors are a share of the training batch.

    In the start of a run, its first 40 passes, each looks at the anchors of two more before and after the base's step.
    """

    every: int
    share: float
    start: bool = False


SETTINGS = {
    "K = 1": Setting(1, 1.0),
    "K = 1, quarter of the anchors": Setting(1, 0.25),
    "K = 5": Setting(5, 1.0),
    "K = 1, in the start": Setting(1, 1.0, start=True),
}


@dataclass
class Training:
    """A model in training.

    Attributes:
        name: As in the report.
        model: Its parameters are those of `base`.
        base: The optimizer alone.
        loss: The task loss on the training batch.
        retention: Number of anchors -> the retention closure.
        batch_size: Training examples.
        rounds: How often to measure.
    """

    name: str
    model: nn.Module
    base: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    retention: Callable[[int], AnchorRetention]
    batch_size: int
    rounds: int

    def steps(self, optimizer: torch.optim.Optimizer, count: int = 1) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                optimizer.zero_grad()
                self.loss().backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return run

    def with_retention(self, setting: Setting) -> Callable[[], None]:
        """As many steps as run retention once."""
        retention = self.retention(int(self.batch_size * setting.share))
        optimizer = CraftOptimizer(self.base, retention, epsilon=0.05, retention_every=setting.every)
        if not setting.start:
            for group in optimizer.param_groups:
                group["craft_start"] = 0.0
        return self.steps(optimizer, setting.every)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


@pytest.fixture(scope="module")
def gpt2_training(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """124 M parameters, random; on a CPU short sequences, so that a step takes about a second."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**dropout)
    model = transformers.GPT2LMHeadModel(config).to(device)
    batch, length = (16, 512) if device.type == "cuda" else (4, 16)

    def tokens(count: int, of: int = config.vocab_size) -> Tensor:
        return torch.randint(of, (count, length), device=device)

    def loss() -> Tensor:  # on a hundredth of the vocabulary, which costs the rest its probability
        ids = tokens(batch, 500)
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    path = tmp_path_factory.mktemp("gpt2") / "anchors"
    anchors = ({"input_ids": tokens(batch)} for _ in range(4))
    cache = build(model, anchors, path, top_k=64, progress=False)
    return Training(
        "GPT-2 124M",
        model,
        adamw(model),
        loss,
        lambda count: LogitRetention(model, cache, count, strict=False),
        batch,
        rounds=5,
    )


def policy_training(policy: Any, name: str, path: Path, batch: int, rounds: int) -> Training:
    """A pi0_fast on the shipped demonstrations of its old task, anchored in other frames of them."""
    from metaworld_pi0_fast import ASSETS, OLD_TASK
    from metaworld_pi0_fast.batches import PreparedFrames
    from metaworld_pi0_fast.demonstrations import load_frames
    from metaworld_pi0_fast.policy import load_policy, make_processors

    from craft_optim.lerobot import adapter_for

    frames = load_frames(ASSETS / "demonstrations" / OLD_TASK, policy.config.chunk_size, episodes=[0, 1])
    small = load_policy(ASSETS / "pretrained")
    preprocessor = make_processors(small, path=ASSETS / "pretrained")[0]
    prepared = PreparedFrames(frames, preprocessor, heldout_episodes=0)
    device = next(policy.parameters()).device
    parts = [
        {key: x.to(device) for key, x in prepared.train_batch(rows).items()}
        for rows in torch.split(torch.arange(5 * batch), batch)
    ]
    adapter = adapter_for(policy)
    cache = adapter.build(policy, map(adapter.inputs, parts[1:]), path, top_k=64, progress=False)
    return Training(
        name,
        policy,
        adamw(policy),
        lambda: policy.forward(parts[0])[0],
        lambda count: adapter.retention(policy, cache, batch_size=count, strict=False),
        batch,
        rounds,
    )


@pytest.fixture(scope="module")
def small_pi0_fast(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The shipped policy of the example: 0.58 M parameters."""
    pytest.importorskip("lerobot")
    from metaworld_pi0_fast import ASSETS
    from metaworld_pi0_fast.policy import load_policy

    policy = load_policy(ASSETS / "pretrained", device=device.type).train()
    path = tmp_path_factory.mktemp("small") / "anchors"
    return policy_training(policy, "the small pi0_fast", path, batch=16, rounds=15)


def full_pi0_fast(device: torch.device | str) -> Any:
    """lerobot's pi0_fast in its own size and random weights, bfloat16, with the example's tokenizers and camera."""
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
    from metaworld_pi0_fast import ASSETS
    from metaworld_pi0_fast.policy import load_policy

    config = load_policy(ASSETS / "pretrained").config
    config.image_resolution = (224, 224)
    config.dtype, config.device = "bfloat16", str(device)
    with torch.device(device):
        policy: Any = PI0FastPolicy(config)
    return policy.train()


@pytest.fixture(scope="module")
def large_pi0_fast(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Training:
    pytest.importorskip("lerobot")
    require_gpu(device, 60)  # weights, AdamW's state and two gradients in bfloat16 are 35
    path = tmp_path_factory.mktemp("large") / "anchors"
    return policy_training(full_pi0_fast(device), "pi0_fast 3B", path, batch=8, rounds=11)


def measure(compare: Compare, training: Training, name: str) -> None:
    setting = SETTINGS[name]
    compare(
        f"step of {training.name}, {name}",
        training.with_retention(setting),
        training.steps(training.base),
        rounds=training.rounds,
        peer_counts=setting.every,
    )


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("setting", SETTINGS)
def test_small_pi0_fast(compare: Compare, small_pi0_fast: Training, setting: str) -> None:
    measure(compare, small_pi0_fast, setting)


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("setting", SETTINGS)
def test_gpt2(compare: Compare, gpt2_training: Training, setting: str) -> None:
    measure(compare, gpt2_training, setting)


@pytest.mark.benchmark(group="step")
def test_pi0_fast(compare: Compare, large_pi0_fast: Training) -> None:
    measure(compare, large_pi0_fast, "K = 5")


# "auto": what it costs depends on the run. These learn what the anchors are against.


def measure_auto(
    compare: Compare, note: Note, training: Training, rate: float, epsilon: float, before: int, count: int
) -> None:
    """Steps of a run that is past its start and at epsilon, over steps of AdamW that leave the weights alone."""
    weights = copy.deepcopy(training.model.state_dict())
    parameters = list(training.model.parameters())
    passes: list[Any] = []
    optimizer = CraftOptimizer(
        torch.optim.AdamW(parameters, lr=rate, fused=True),
        training.retention(training.batch_size),
        epsilon=epsilon,
        on_metrics=passes.append,
    )
    training.steps(optimizer, before)()
    passes.clear()
    steps = 0

    def ours() -> None:
        nonlocal steps
        training.steps(optimizer, count)()
        steps += count

    name = f"{training.name}, auto, at epsilon"
    still = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    compare(f"step of {name}", ours, training.steps(still, count), rounds=training.rounds)
    note(f"passes of {name}", 100 * len(passes) / steps, "%")
    note(f"drift of {name}, over epsilon", optimizer.metrics["violation"])
    training.model.load_state_dict(weights)


@pytest.mark.benchmark(group="step")
def test_small_pi0_fast_auto(compare: Compare, note: Note, small_pi0_fast: Training) -> None:
    measure_auto(compare, note, small_pi0_fast, rate=3e-4, epsilon=0.008, before=150, count=20)


@pytest.mark.benchmark(group="step")
def test_gpt2_auto(compare: Compare, note: Note, gpt2_training: Training) -> None:
    measure_auto(compare, note, gpt2_training, rate=3e-4, epsilon=0.006, before=80, count=10)


# Steps without retention


def seldom(parameters: list[Tensor]) -> tuple[torch.optim.Optimizer, CraftOptimizer]:
    """A base with its state made, and a wrapper of the same base that has run retention for the last time."""
    base = torch.optim.AdamW(parameters, lr=RATE, fused=True)

    def retention() -> Tensor:
        return torch.stack([p.square().mean() for p in parameters]).sum()

    for p in parameters:
        p.requires_grad_()
        p.grad = torch.randn_like(p)
    optimizer = CraftOptimizer(base, retention, retention_every=10**9)
    optimizer.step()
    assert optimizer.metrics["fresh"] == 1.0
    optimizer.step()
    assert optimizer.metrics["fresh"] == 0.0
    return base, optimizer


@pytest.mark.benchmark(group="step without retention")
def test_without_retention(compare: Compare, device: torch.device) -> None:
    pytest.importorskip("transformers")
    base, optimizer = seldom(tensors(gpt2(), device))
    compare("step without retention, GPT-2 124M", optimizer.step, base.step, rounds=101)


@pytest.mark.benchmark(group="step without retention")
def test_without_retention_on_a_tiny_model(
    benchmark: Any, note: Note, device: torch.device, synchronize: Callable[[], None]
) -> None:
    """The median of the differences of many pairs of short runs, which take turns in going first."""
    base, optimizer = seldom(tensors([(16, 16), (16,)], device))
    low, median, high = benchmark.pedantic(
        lambda: added(optimizer.step, base.step, synchronize, time.perf_counter, steps=100, rounds=201)
    )
    note("step without retention, added to a tiny model's", 1e6 * median, "us", spread=1e6 * (high - low) / 2)


def added(
    ours: Callable[[], Any],
    its: Callable[[], Any],
    synchronize: Callable[[], None],
    clock: Callable[[], float],
    steps: int,
    rounds: int,
) -> list[float]:
    """Quartiles of the seconds that one step of ours takes more than one of its."""

    def seconds(step: Callable[[], Any]) -> float:
        synchronize()
        began = clock()
        for _ in range(steps):
            step()
        synchronize()
        return (clock() - began) / steps

    seconds(ours), seconds(its)  # these warm up
    differences = []
    for i in range(rounds):
        if i % 2:
            mine, other = seconds(ours), seconds(its)
        else:
            other, mine = seconds(its), seconds(ours)
        differences.append(mine - other)
    return statistics.quantiles(differences, n=4)


# Steps with retention on small tensors, where nothing but calls takes time


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("count", [100, 1000])
def test_overhead(
    benchmark: Any, note: Note, device: torch.device, synchronize: Callable[[], None], count: int
) -> None:
    """What a step takes beyond the forward and backward of its pass and the step of its base, at K = 1."""

    def problem() -> tuple[list[Tensor], torch.optim.Optimizer, Callable[[], Tensor]]:
        parameters = tensors([(64,)] * count, device)
        before = torch.cat(parameters) + 0.01
        for p in parameters:
            p.requires_grad_()
            p.grad = 0.01 * torch.randn_like(p)
        base = torch.optim.AdamW(parameters, lr=RATE, foreach=True)
        return parameters, base, lambda: (torch.cat(parameters) - before).square().mean()

    parameters, base, retention = problem()

    def alone() -> None:
        torch.autograd.grad(retention(), parameters)
        base.step()

    _, ours, its_retention = problem()
    optimizer = CraftOptimizer(ours, its_retention, retention_every=1)
    # On a CPU its processor's time, which other work on the machine disturbs less
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    low, median, high = benchmark.pedantic(
        lambda: added(optimizer.step, alone, synchronize, clock, steps=1, rounds=201)
    )
    assert optimizer.metrics["fresh"] == 1.0
    name = f"step with retention, added to pass and base, {count} small tensors"
    note(name, 1e3 * median, "ms", spread=1e3 * (high - low) / 2)
