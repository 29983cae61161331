"""Joint passes train as separate passes do, or say why not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from craft_optim import CraftOptimizer
from craft_optim._warn import CraftWarning
from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    CombinedRetention,
    HiddenRetention,
    LogitRetention,
    TokenRetention,
    build,
)
from craft_optim.anchors.joint import JointPass, JointPassError
from craft_optim.anchors.joint.check import other_gradients, same_values
from craft_optim.anchors.joint.join import JoinError, join
from craft_optim.anchors.joint.joint_pass import _Deposit

Make = Callable[[nn.Module, AnchorCache], Any]


def text(size: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 59, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled(size: int, length: int, seed: int) -> dict[str, Tensor]:
    batch = text(size, length, seed)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def quiet(model: nn.Module) -> nn.Module:
    """Without dropout, in float64."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model.double()


class Run:
    """Steps of a loop, with or without joint passes."""

    def __init__(self, model: nn.Module, retention: Any, *, joint: bool, lr: float = 0.1, **settings: Any) -> None:
        self.model = model
        base = torch.optim.SGD(model.parameters(), lr=lr)
        self.optimizer = CraftOptimizer(base, retention, **({"epsilon": 1e-3} | settings))
        self.joint = JointPass(self.optimizer) if joint else None

    def output(self, batch: Any) -> Any:
        if self.joint is not None:
            return self.joint.run(batch)
        if isinstance(batch, dict):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple) else self.model(batch)

    def step(self, batch: Any, loss_of: Callable[[Any], Tensor] = lambda output: output.loss) -> dict[str, float]:
        self.optimizer.zero_grad()
        loss = loss_of(self.output(batch))
        loss.backward()
        task = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        self.optimizer.step()
        self.task = task
        return self.optimizer.metrics | {"task_loss": loss.item()}


def same(runs: tuple[Run, Run], batches: list[Any], tolerance: float = 1e-9, **kwargs: Any) -> None:
    """The two runs make the same steps, and the second of them all in joint passes."""
    for batch in batches:
        metrics = [run.step(batch, **kwargs) for run in runs]
        assert metrics[1] == pytest.approx(metrics[0], rel=tolerance, abs=1e-10)
        for separate, joint in zip(runs[0].task, runs[1].task, strict=True):
            if separate is None:  # a joint pass may say zero where a pass of its own reaches nothing
                assert joint is None or not joint.any()
            else:
                torch.testing.assert_close(joint, separate, rtol=tolerance, atol=tolerance)
        for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
            torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
    assert runs[1].joint is not None
    assert runs[1].joint.joined == len(batches)
    assert runs[0].optimizer.metrics["retention_grad_norm"] > 0.0


def twins(model: nn.Module, cache: AnchorCache, make: Make, **settings: Any) -> tuple[Run, Run]:
    copies = copy.deepcopy(model), copy.deepcopy(model)
    return tuple(
        Run(twin, make(twin, cache), joint=joint, **settings) for twin, joint in zip(copies, (False, True), strict=True)
    )  # type: ignore[return-value]


CLOSURES: dict[str, tuple[dict[str, Any], Make]] = {
    "logits": ({}, lambda model, cache: LogitRetention(model, cache, 3)),
    "top k": ({"top_k": 5}, lambda model, cache: LogitRetention(model, cache, 3)),
    "mask": (
        {},
        lambda model, cache: LogitRetention(
            model, cache, 3, mask=lambda b: b["attention_mask"] * (b["input_ids"] > 20)
        ),
    ),
    "hidden": ({"logits": False, "layers": [1, -1]}, lambda model, cache: HiddenRetention(model, cache, 3)),
    "pooled": (
        {"logits": False, "layers": [1], "pooling": {"all": "masked_mean"}},
        lambda model, cache: HiddenRetention(model, cache, 3, loss="cosine"),
    ),
    "tokens": ({"tokens": 3}, lambda model, cache: TokenRetention(model, cache, 3)),
}


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steps_are_those_of_separate_passes(
    kind: str, closure: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings, make = CLOSURES[closure]
    model = quiet(request.getfixturevalue(kind))  # gpt2's head is tied to its embedding
    anchors = text(8, 7, 0)
    if closure == "tokens":
        anchors["attention_mask"].fill_(1)  # prompts are padded on the left, if at all
    cache = build(model, [anchors], tmp_path / "a", **settings)
    width = next(iter(cache.read([0]).inputs.values())).shape[1]
    model.get_input_embeddings().weight.requires_grad_(closure != "mask")
    same(twins(model, cache, make), [labelled(4, width, i) for i in range(3)])


@pytest.mark.parametrize("lengths", [(5, 9, 7), (9, 7)])
def test_the_shorter_batch_is_padded(lengths: tuple[int, ...], llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    same(runs, [labelled(4, length, i) for i, length in enumerate(lengths)])
    with torch.no_grad():  # what the loop gets has its own length
        assert runs[1].output(labelled(4, 9, 0)).logits.shape == (4, 9, 60)
    assert runs[1].output(labelled(4, 9, 0)).logits.shape == (4, 9, 60)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_tensors_and_tuples(as_tuple: bool, classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    def batch(x: Tensor) -> Any:
        return (x,) if as_tuple else x

    cache = build(classifier.double(), [batch(points[:20].double())], tmp_path / "a")
    runs = twins(classifier, cache, CLOSURES["logits"][1], lr=0.5)
    same(runs, [batch(points[20 + i : 25 + i].double()) for i in range(3)], loss_of=lambda y: y.logsumexp(1).mean())


class TwoHeads(nn.Module):
    """The task trains one head, the anchors hold another."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.task, self.old = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0, names: list[str] | None = None) -> dict[str, Any]:
        h = torch.tanh(self.body(x)) * scale
        return {"value": self.task(h), "logits": self.old(h), "names": names}


def test_what_only_one_side_reaches(points: Tensor, tmp_path: Path) -> None:
    model = TwoHeads().double()
    cache = build(model, [{"x": points[:20].double()}], tmp_path / "a")
    runs = twins(model, cache, CLOSURES["logits"][1], lr=0.5)
    batches = [{"x": points[20 + i : 25 + i].double(), "names": ["a"]} for i in range(3)]
    same(runs, batches, loss_of=lambda output: output["value"].pow(2).mean())
    assert not any(g.any() for g in (runs[1].task[4], runs[1].task[5]))  # of `old`


def test_a_closure_with_a_forward(points: Tensor, tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(batch["x"] * 2.0)["logits"]
        return logits

    model = TwoHeads().double()
    cache = build(model, [{"x": points[:20].double()}], tmp_path / "a", forward=forward)
    separate, joint = twins(model, cache, lambda m, c: LogitRetention(m, c, 3, forward=forward), lr=0.5)
    separate.output = lambda batch: forward(separate.model, batch)  # type: ignore[method-assign]
    batches = [{"x": points[20 + i : 25 + i].double()} for i in range(3)]
    same((separate, joint), batches, loss_of=lambda logits: logits.logsumexp(1).mean())


def test_autocast(llama: nn.Module, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cache = build(quiet(llama).float(), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    for batch in (labelled(4, 7, i) for i in range(2)):
        with torch.autocast("cpu", torch.bfloat16):
            separate, joint = (run.step(batch) for run in runs)
        assert joint["task_loss"] == pytest.approx(separate["task_loss"], rel=1e-2)
    assert joint["retention_loss"] == pytest.approx(separate["retention_loss"], rel=0.1)
    assert joint["retention_grad_norm"] == pytest.approx(separate["retention_grad_norm"], rel=0.1)
    wanting = LogitRetention(llama, cache, 3, autocast=torch.bfloat16)
    with pytest.raises(JointPassError, match=r"wants autocast torch\.bfloat16, the task's forward runs under None"):
        Run(llama, wanting, joint=True).step(labelled(4, 7, 0))


def test_accumulation_scales_and_second_backwards(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    for number in range(2):
        for run in runs:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            run.optimizer.zero_grad()
            for part in range(2):
                loss = run.output(labelled(4, 7, 2 * number + part)).loss
                loss /= 3.0
                scaler.scale(loss).backward(retain_graph=True)
                scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
        for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9)
    assert runs[1].joint is not None
    assert runs[1].joint.joined == 2  # of four forwards, one per step
    assert runs[1].optimizer.metrics["retention_grad_norm"] == pytest.approx(
        runs[0].optimizer.metrics["retention_grad_norm"]
    )


def test_steps_without_retention_run_the_model_alone(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1], retention_every=3)
    sizes: list[int] = []
    llama_of = runs[1].model
    for number in range(4):
        for run in runs:
            run.step(labelled(4, 7, number))
        if number == 0:
            llama_of.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    with torch.no_grad():
        runs[1].output(labelled(2, 7, 9))
    assert sizes == [4, 4, 7, 2]
    for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9)


def test_a_resumed_run_goes_on_with_the_next_anchors(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    whole = Run(llama, LogitRetention(llama, cache, 3), joint=True)
    for number in range(2):
        whole.step(labelled(4, 7, number))
    model, state = copy.deepcopy(llama), copy.deepcopy(whole.optimizer.state_dict())
    resumed = Run(model, LogitRetention(model, cache, 3, strict=False), joint=True)
    resumed.optimizer.load_state_dict(state)
    assert resumed.joint is not None
    assert resumed.joint.position == 2
    for number in range(2, 4):
        assert resumed.step(labelled(4, 7, number)) == pytest.approx(whole.step(labelled(4, 7, number)), rel=1e-12)


def test_an_error_in_the_forward_leaves_nothing_behind(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    same_first = labelled(4, 7, 0)
    for run in runs:
        run.step(same_first)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    for run in runs:
        handle = run.model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run.output(labelled(4, 7, 1))
        handle.remove()
    assert not any("forward" in vars(module) for module in runs[1].model.modules())
    assert runs[1].joint is not None
    assert runs[1].joint.position == 1
    metrics = [run.step(labelled(4, 7, 2)) for run in runs]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-9)
    assert runs[1].joint.joined == 2


@pytest.mark.parametrize("between", ["other weights", "other anchors", "no backward", "autograd.grad"])
def test_gradients_of_something_else_are_not_used(between: str, llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    for run in runs:
        run.step(labelled(4, 7, 0))
        run.optimizer.zero_grad()
        loss = run.output(labelled(4, 7, 1)).loss
        parameters = list(run.model.parameters())
        if between in ("no backward", "autograd.grad"):
            grads = torch.autograd.grad(loss, parameters) if between == "autograd.grad" else parameters
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g.detach().clone()
        else:
            loss.backward()
        if between == "other weights":
            with torch.no_grad():
                run.model.lm_head.weight.mul_(1.1)
        if between == "other anchors":
            run.optimizer.retention_closure.position = 5  # type: ignore[union-attr]
    runs[0].optimizer.step()
    with pytest.warns(CraftWarning, match="joint pass ran, and was of no use"):
        runs[1].optimizer.step()
    assert runs[1].optimizer.metrics == pytest.approx(runs[0].optimizer.metrics, rel=1e-9)


def test_what_begins_to_train_is_kept_apart_too(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    llama.model.layers[0].requires_grad_(False)
    runs = twins(llama, cache, CLOSURES["logits"][1])
    same(runs, [labelled(4, 7, 0)])
    for run in runs:
        run.model.model.layers[0].requires_grad_(True)
    assert runs[1].joint is not None
    runs[1].joint.joined = 0
    same(runs, [labelled(4, 7, 1), labelled(4, 7, 2)])


class Kernels(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_fewer_kernels_run(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    counts = []
    for run in twins(llama, cache, lambda m, c: LogitRetention(m, c, 3, workers=0)):
        run.step(labelled(4, 7, 0))
        batch = labelled(4, 7, 1)
        with Kernels() as task:
            output = run.output(batch)
            output.loss.backward()
        run.optimizer.zero_grad()
        with Kernels() as retention:
            run.optimizer.retention_closure().backward()  # type: ignore[misc]
        counts.append((task.count, retention.count))
    assert sum(counts[1]) < 0.7 * sum(counts[0])
    assert counts[1][1] < 6  # gradients are moved, not copied


def test_the_loss_that_the_optimizer_gets_may_be_scaled(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])
    for run in runs:
        run.step(labelled(4, 7, 0))
        run.output(labelled(4, 7, 1)).loss.backward()
        run.optimizer.zero_grad()
        loss = run.optimizer.retention_closure()  # type: ignore[misc]
        (loss * 4.0).backward(retain_graph=run is runs[1])
    with pytest.raises(RuntimeError, match="handed over once"):
        loss.backward()
    for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


def test_sparse_gradients_may_be_scaled() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    loss = _Deposit.apply(torch.tensor(2.0), [torch.eye(3, 2).to_sparse()], parameter)
    (loss * 4.0).backward()
    assert torch.equal(parameter.grad.to_dense(), 4.0 * torch.eye(3, 2))  # type: ignore[union-attr]


def test_an_error_in_the_backward_has_retention_run_its_own_pass(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    runs = twins(llama, cache, CLOSURES["logits"][1])

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    for run in runs:
        run.step(labelled(4, 7, 0))
        run.optimizer.zero_grad()
        loss = run.output(labelled(4, 7, 1)).loss
        handle = run.model.model.layers[1].mlp.up_proj.weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        handle.remove()
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)
    runs[0].optimizer.step()
    with pytest.warns(CraftWarning, match="of no use"):
        runs[1].optimizer.step()
    assert runs[1].optimizer.metrics == pytest.approx(runs[0].optimizer.metrics, rel=1e-9)


def test_another_model_than_the_cached_one_is_an_error(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(quiet(llama), [text(8, 7, 0)], tmp_path / "a")
    with torch.no_grad():
        llama.lm_head.weight.mul_(1.5)
    run = Run(llama, LogitRetention(llama, cache, 3), joint=True)
    with pytest.raises(AnchorMismatchError, match="does not reproduce the cache"):
        run.output(labelled(4, 7, 0))
    assert run.joint is not None
    assert run.joint.position == 0


def refused(model: nn.Module, cache: AnchorCache, batch: Any, match: str) -> None:
    run = Run(model, LogitRetention(model, cache, 3), joint=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(JointPassError, match=match):
        run.output(batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert run.joint is not None
    assert (run.joint.position, run.joint.joined) == (0, 0)


def test_dropout_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(llama, [text(8, 7, 0)], tmp_path / "a")
    refused(llama, cache, labelled(4, 7, 0), r"task batch in a joint pass.*self_attn.*cannot be used with dropout")


def test_batch_statistics_are_refused(tmp_path: Path, points: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    cache = build(model, [points[:20]], tmp_path / "a")
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LogitRetention(model, cache, 3))
    with pytest.raises(JointPassError, match="BatchNorm1d is in train mode"):
        JointPass(optimizer)
    model.eval()
    run = Run(model, LogitRetention(model, cache, 3, strict=False), joint=True)
    run.step(points[20:30], lambda logits: logits.logsumexp(1).mean())
    assert run.joint is not None
    assert run.joint.joined == 1
    model.train()
    with pytest.raises(JointPassError, match="BatchNorm1d is in train mode"):
        run.output(points[20:30])
    assert model[1].num_batches_tracked == 0


def test_a_loss_over_the_anchors_is_refused(tmp_path: Path, points: Tensor) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            return {"loss": F.cross_entropy(logits, target), "logits": logits}

    model, targets = WithLoss(), torch.arange(50) % 4
    cache = build(model, [{"x": points[:20], "target": targets[:20]}], tmp_path / "a")
    batch = {"x": points[20:26], "target": targets[20:26]}
    refused(model, cache, batch, "must leave out the rows of the anchors")
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), LogitRetention(model, cache, 3))
    joint = JointPass(optimizer, fill={"target": -100})
    torch.testing.assert_close(joint.run(batch)["loss"], model(**batch)["loss"])


class Functional(nn.Module):
    """Uses a weight without calling the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.second.weight, self.second.bias)


class Across(nn.Module):
    """Rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y - y.mean(0)


class Elsewhere(nn.Module):
    """Rows are the second dimension where the parameters are, and as many as the first has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        spread = x.unsqueeze(0).repeat(len(x), 1, 1) * torch.linspace(1.0, 2.0, len(x)).view(-1, 1, 1)
        return self.inner(spread).mean(0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Functional, r"gradient of 'second\.weight' on the task batch is another"),
        (Across, "something else for the task batch"),
        (Elsewhere, r"gradient of 'inner\.weight' on the task batch is another"),
    ],
)
def test_other_ways_to_use_parameters_and_rows_are_refused(
    make: Callable[[], nn.Module], match: str, tmp_path: Path, points: Tensor
) -> None:
    model = make()
    cache = build(model, [points[:20]], tmp_path / "a")
    if make is Across:  # separate passes would not agree with the cache either
        cache = build(model, [points[:3]], tmp_path / "b")
    refused(model, cache, points[20:26], match)


def test_checkpoints_and_other_closures_are_refused(llama: nn.Module, tmp_path: Path) -> None:
    cache = build(llama, [text(8, 7, 0)], tmp_path / "a")
    optimizer = CraftOptimizer(torch.optim.SGD(llama.parameters(), lr=0.1), LogitRetention(llama, cache, 3))
    llama.gradient_checkpointing_enable()
    with pytest.raises(JointPassError, match="checkpoints activations"):
        JointPass(optimizer)
    optimizer.retention_closure = CombinedRetention({"logits": LogitRetention(llama, cache, 3)})
    with pytest.raises(TypeError, match="Found CombinedRetention"):
        JointPass(optimizer)


def test_float16_and_several_processes_are_refused(tmp_path: Path, points: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    cache = build(model, [points[:20]], tmp_path / "a")
    run = Run(model, LogitRetention(model, cache, 3), joint=True)
    with torch.autocast("cpu", torch.float16), pytest.raises(JointPassError, match="Use bfloat16"):
        run.output(points[20:26])
    assert run.joint is not None
    with pytest.raises(JointPassError, match=r"are for one process\. Found 2"):
        run.joint.shard(0, 2)


def test_what_counts_as_the_same() -> None:
    zero, one, small = torch.zeros(2), torch.ones(2), torch.full((2,), 1e-5)
    assert other_gradients([one, None, zero, small, None], [one + 1e-5, zero, None, zero, None], 1e-3) == []
    assert other_gradients([one, None, one, one, small], [one, small, None, -one, one], 1e-3) == [1, 2, 3, 4]
    assert same_values([one, zero], [one + 1e-4, zero], 1e-3)
    assert same_values([torch.tensor([1.0, -torch.inf])], [torch.tensor([1.0, -torch.inf])], 1e-3)
    assert not same_values([one], [one + 0.01], 1e-3)
    assert not same_values([one], [one, one], 1e-3)
    assert not same_values([one], [torch.ones(3)], 1e-3)


@pytest.mark.parametrize(
    ("task", "anchors", "match"),
    [
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, {"x": torch.zeros(2, 3)}, r"rows of \['y'\] hold"),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3), "y": torch.zeros(2)}, r"anchors have \['x', 'y'\]"),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}, r"'x' is torch.float32 \(2, 3\).*float32 \(2, 4\)"),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3).long()}, "float32.*int64"),
    ],
)
def test_batches_that_do_not_fit(task: dict[str, Tensor], anchors: dict[str, Tensor], match: str) -> None:
    with pytest.raises(JoinError, match=match):
        join(task, anchors, {})


def test_joined_batches_hold_both() -> None:
    task = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 3).long()}
    task["attention_mask"] = task["attention_mask"].long()
    anchors = {"input_ids": torch.full((1, 5), 7), "attention_mask": torch.ones(1, 5).long()}
    joined = join({**task, "use_cache": False}, anchors, {"labels": -100, "absent": 3})
    assert joined.inputs["use_cache"] is False
    assert joined.inputs["input_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [7, 7, 7, 7, 7]]
    assert joined.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert joined.inputs["labels"].tolist() == [[1, 1, 1, -100, -100], [1, 1, 1, -100, -100], [-100] * 5]
    assert (joined.size, joined.cut, joined.lengths) == (3, 2, (3, 5))
    logits = torch.arange(3 * 5 * 2).view(3, 5, 2)
    first, second = joined.divide(logits) or ()
    assert torch.equal(first, logits[:2, :3])
    assert torch.equal(second, logits[2:])
    assert joined.divide(torch.zeros(())) is None
