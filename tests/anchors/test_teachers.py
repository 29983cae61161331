"""Snapshots: within the block the model of before, afterwards the one of now, to the bit. Adapters: test_peft.py."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import OnlineRetention, Reading, teachers
from craft_optim.anchors.teachers import Snapshot


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def is_as(state: dict[str, Tensor], model: nn.Module) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], x) for name, x in state.items())


def trajectory(model: nn.Module, teacher: Any, rows: list[Any], micro_batches: int = 1) -> tuple[Any, ...]:
    """Weights and drifts of a short run; dropout is on."""
    retention = OnlineRetention(model, rows, 4, teacher=teacher)
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), retention, epsilon=0.01)
    ids = torch.stack([row["input_ids"] for row in rows])
    drifts = []
    torch.manual_seed(3)
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            (model(input_ids=ids, labels=ids).loss / micro_batches).backward()
        optimizer.step()
        drifts.append(optimizer.metrics["retention_loss"])
    return frozen(model), drifts, retention.drift()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_the_same_as_with_a_copy_of_the_model(
    micro_batches: int, llama: nn.Module, token_batches: Callable[..., list[dict[str, Tensor]]]
) -> None:
    (batch,) = token_batches((8, 6))
    rows = [{name: x[i] for name, x in batch.items()} for i in range(8)]
    twin = copy.deepcopy(llama)
    copied = trajectory(twin, copy.deepcopy(twin), rows, micro_batches)
    swapped = trajectory(llama, Snapshot(llama), rows, micro_batches)
    assert swapped[1:] == copied[1:]
    assert is_as(copied[0], llama)
    assert swapped[1][0] == 0.0
    assert swapped[1][-1] > 1e-3


def test_everything_that_training_changes_is_swapped_in_place(noisy: Any, points: Tensor) -> None:
    """Weights and BatchNorm's statistics, integers among them; never what is frozen, nor a pointer or a flag."""
    noisy.head.bias.requires_grad_(False)
    noisy.register_buffer("scratch", torch.zeros(3), persistent=False)
    snapshot, original = Snapshot(noisy), frozen(noisy)
    disturb(noisy)
    original["head.bias"] = noisy.head.bias.clone()
    noisy.scratch = torch.zeros(5)
    noisy(points)
    tensors = {**dict(noisy.named_parameters()), **dict(noisy.named_buffers())}
    gradients = [torch.randn_like(p) for p in noisy.parameters()]
    for p, g in zip(noisy.parameters(), gradients, strict=True):
        p.grad = g
    pointers, current = [x.data_ptr() for x in tensors.values()], frozen(noisy)
    flags = [p.requires_grad for p in noisy.parameters()]
    for _ in range(2):
        with snapshot():
            assert is_as(original, noisy)
            assert torch.is_grad_enabled()
            with snapshot():
                assert is_as(original, noisy)
            assert is_as(original, noisy)
        assert is_as(current, noisy)
    assert all(x is tensors[name] for name, x in [*noisy.named_parameters(), *noisy.named_buffers()])
    assert pointers == [x.data_ptr() for x in tensors.values()]
    assert all(p.grad is g for p, g in zip(noisy.parameters(), gradients, strict=True))
    assert flags == [p.requires_grad for p in noisy.parameters()]


def test_tied_weights_are_copied_once_and_stay_tied(classifier: nn.Sequential) -> None:
    classifier.append(nn.Linear(4, 4))
    classifier.append(classifier[3])
    classifier.append(nn.Linear(4, 4))
    classifier[5].weight.data = classifier[3].weight.data.t()  # another view of the same memory
    snapshot, original = Snapshot(classifier), frozen(classifier)
    assert len(snapshot._parameters) == len(list(classifier.parameters()))
    disturb(classifier)
    current = frozen(classifier)
    with snapshot():
        assert is_as(original, classifier)
    assert is_as(current, classifier)
    assert classifier[4].weight is classifier[3].weight
    assert classifier[5].weight.data_ptr() == classifier[3].weight.data_ptr()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_current_weights(error: type[BaseException], noisy: Any, points: Tensor) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        if not torch.is_grad_enabled():
            raise error
        return out

    retention = OnlineRetention(
        noisy, points, 16, teacher=Snapshot(noisy), reading=Reading(forward, class_dim=-1), strict=False
    )
    disturb(noisy)
    noisy(points).sum().backward()
    current = frozen(noisy)
    with pytest.raises(error):
        CraftOptimizer(torch.optim.SGD(noisy.parameters(), lr=0.1), retention).step()
    assert is_as(current, noisy)


def test_a_swap_that_fails_half_way_is_undone(classifier: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(classifier)
    disturb(classifier)
    current, write = frozen(classifier), teachers._write

    def half(tensors: list[Tensor], values: list[Tensor]) -> None:
        monkeypatch.setattr(teachers, "_write", write)
        write(tensors[:2], values[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(teachers, "_write", half)
    with pytest.raises(KeyboardInterrupt), snapshot():
        pass
    assert is_as(current, classifier)


def test_a_swap_between_a_forward_and_its_backward_fails_loudly(classifier: nn.Module, points: Tensor) -> None:
    snapshot = Snapshot(classifier)
    loss = classifier(points).sum()
    with snapshot():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_keeps_no_casts_of_the_other_weights(classifier: nn.Module, points: Tensor) -> None:
    """A forward of the same autocast block has cast the current weights already."""
    teacher, snapshot = copy.deepcopy(classifier), Snapshot(classifier)
    disturb(classifier)
    with torch.autocast("cpu", torch.bfloat16):
        current = classifier(points)
        with snapshot():
            inside = classifier(points)
        assert torch.equal(inside, teacher(points))
        assert torch.equal(classifier(points), current)
    assert not torch.equal(inside, current)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_after_a_cast_the_teacher_is_the_cast_original(dtype: torch.dtype, noisy: Any) -> None:
    """Casts and moves keep parameters, and replace buffers."""
    original, snapshot = copy.deepcopy(noisy).to(dtype), Snapshot(noisy)
    noisy.to(dtype)
    disturb(noisy)
    noisy.body[1].running_mean.add_(1)
    with snapshot():
        assert is_as(frozen(original), noisy)
    assert not is_as(frozen(original), noisy)


def test_wrappers_may_come_later(classifier: nn.Sequential, points: Tensor) -> None:
    checkpointed = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    classifier.append(nn.BatchNorm1d(4))
    teacher, snapshot = copy.deepcopy(classifier), Snapshot(classifier)
    disturb(classifier)
    classifier(points)
    classifier[3] = checkpointed.checkpoint_wrapper(classifier[3])
    with snapshot():
        assert torch.equal(classifier.eval()(points), teacher.eval()(points))


# What is refused


@pytest.mark.parametrize("change", ["replaced", "removed", "reshaped", "unfrozen", "added", "buffer"])
def test_a_model_that_cannot_become_what_it_was(change: str, classifier: nn.Sequential) -> None:
    classifier.append(nn.BatchNorm1d(4))
    classifier[0].weight.requires_grad_(False)
    snapshot = Snapshot(classifier)
    if change == "replaced":
        classifier[2] = nn.Linear(16, 4)
    elif change == "removed":
        del classifier[2]
    elif change == "reshaped":
        classifier[2].weight.data = torch.randn(1, 16)
    elif change == "unfrozen":
        classifier[0].weight.requires_grad_(True)
    elif change == "added":
        classifier.append(nn.Linear(4, 4))
    else:
        classifier[3].running_mean = torch.zeros(1)
    current = frozen(classifier)
    message = {
        "replaced": r"2 tensors were replaced or reshaped.*such as 2\.weight, 2\.bias",
        "removed": r"2\.weight",
        "reshaped": r"1 tensors were replaced or reshaped.*such as 2\.weight",
        "unfrozen": r"1 tensors were made trainable or added.*such as 0\.weight",
        "added": r"2 tensors were made trainable or added.*such as 4\.weight",
        "buffer": r"such as 3\.running_mean",
    }[change]
    with pytest.raises(ValueError, match=message), snapshot():
        pytest.fail("the block must not be entered")
    assert is_as(current, classifier)


def test_a_model_of_which_nothing_is_trained(classifier: nn.Module) -> None:
    with pytest.raises(ValueError, match="No parameter of Sequential requires a gradient"):
        Snapshot(classifier.requires_grad_(False))
