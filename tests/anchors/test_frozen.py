"""Modules that do not train: their outputs are recorded once, and returned without running them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craft_optim.anchors import frozen, passes

TOWER = "model.vision_tower"


class Cameras(nn.Module):
    """Calls its tower once per camera, gets a structure, and changes it in place; as policies do."""

    def __init__(self, cameras: int = 2) -> None:
        super().__init__()
        self.tower, self.projector = Tower(), nn.Linear(4, 3)
        self.cameras = cameras

    def forward(self, images: Tensor) -> Tensor:
        total = torch.zeros(len(images), 3)
        for camera in range(self.cameras):
            output = self.tower(images[:, camera], scale=camera + 1.0)
            features = output["features"].mul_(2.0)
            assert output["name"] == "tower"
            assert output["places"].dtype == torch.int64
            total = total + (camera + 1) * self.projector(features + output["places"])
        return total


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.runs = nn.Linear(5, 4), nn.Dropout(0.5), 0

    def forward(self, image: Tensor, scale: float) -> dict[str, Any]:
        self.runs += 1
        features = self.drop(self.inner(image)) * scale
        return {"features": features, "name": "tower", "places": torch.arange(len(image))[:, None], "mask": None}


@pytest.fixture
def cameras() -> Cameras:
    torch.manual_seed(0)
    model = Cameras()
    model.tower.requires_grad_(False)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_vision_tower_is_not_run_and_nothing_else_changes(
    vlm: nn.Module, image_text_batches: list[dict[str, Tensor]]
) -> None:
    vlm.get_submodule(TOWER).requires_grad_(False)
    batch = image_text_batches[0]
    with passes.steady(vlm), torch.no_grad(), frozen.recorded(vlm, [TOWER]) as calls:
        vlm(**batch)
    stored = frozen.leaves(calls, 4)
    assert f"frozen.{TOWER}.0.0" in stored
    forms = frozen.forms_of(calls)

    def backward() -> dict[str, Tensor]:
        vlm.zero_grad()
        with passes.steady(vlm) as remember:
            loss = remember(vlm(**batch).logits.square().mean())
        loss.backward()
        return gradients(vlm) | {"loss": loss.detach()}

    expected = backward()
    ran: list[bool] = []
    within = next(m for m in vlm.get_submodule(TOWER).modules() if isinstance(m, nn.LayerNorm))
    handle = within.register_forward_pre_hook(lambda *_: ran.append(True))
    with frozen.replayed(vlm, stored, forms):
        found = backward()
    assert not ran
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient)
    with frozen.replayed(vlm, {k: x + 1.0 for k, x in stored.items()}, forms):
        assert not torch.equal(backward()["loss"], expected["loss"])  # what is stored counts
    backward()
    assert ran
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_gets_its_own_output_in_its_own_dtype(cameras: Cameras, dtype: torch.dtype) -> None:
    images = torch.randn(6, 2, 5)
    with passes.steady(cameras), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with frozen.recorded(cameras, ["tower"]) as calls:
            whole = cameras(images)
        stored = frozen.leaves(calls, 6)
        assert sorted(stored) == [f"frozen.tower.{i}.{j}" for i in (0, 1) for j in (0, 2)]  # the others are constants
        assert stored["frozen.tower.1.0"].dtype == dtype
        wide = {k: x.double() if x.is_floating_point() else x.int() for k, x in stored.items()}  # a cache's own dtypes
        forms, runs = frozen.forms_of(calls), cameras.tower.runs
        others = {"frozen.tower.inner.0.0": torch.ones(1), "mask": torch.ones(1)}
        for given in (wide | others, stored, stored):  # what the model changes in place is not what is stored
            with frozen.replayed(cameras, given, forms):
                assert torch.equal(cameras(images), whole)
        rows = [4, 1]
        with frozen.replayed(cameras, {k: x[rows] for k, x in stored.items()}, forms):
            torch.testing.assert_close(cameras(images[rows]), whole[rows])
    assert cameras.tower.runs == runs
    assert "forward" not in vars(cameras.tower)


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_within_a_checkpoint(vlm: nn.Module, reentrant: bool) -> None:
    """Their second run, in the backward, is the module's own; a checkpoint that compares the two finds the same."""
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") and not reentrant:
        pytest.skip("this torch does not tell: the backward raises CheckpointError")
    vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # within the tower, too
    tower, projector = vlm.get_submodule(TOWER).requires_grad_(False), nn.Linear(24, 3)
    model = nn.ModuleDict({"tower": tower, "projector": projector})
    images = torch.randn(2, 3, 3, 16, 16)

    def features(image: Tensor, _: Tensor) -> Tensor:
        return projector(tower(image).last_hidden_state)

    def loss() -> Tensor:
        some = torch.zeros((), requires_grad=True)  # without one, a reentrant checkpoint has no backward
        return torch.stack([checkpoint(features, x, some, use_reentrant=reentrant) for x in images]).square().mean()

    with passes.steady(model) as remember, frozen.recorded(model, ["tower"]) as calls:
        first = remember(loss())
    first.backward()
    expected = gradients(projector)
    projector.zero_grad()
    stored, forms = frozen.leaves(calls, 3), frozen.forms_of(calls)
    assert len(forms["tower"]) == 2
    with passes.steady(model) as remember, frozen.replayed(model, stored, forms):
        again = remember(loss())
    again.backward()
    assert torch.equal(again, first)
    for name, gradient in gradients(projector).items():
        assert torch.equal(gradient, expected.pop(name))
    assert not expected


def test_what_trains_runs(cameras: Cameras) -> None:
    images = torch.randn(6, 2, 5)
    with passes.steady(cameras), frozen.recorded(cameras, ["tower"]) as calls:
        cameras(images)
    stored, forms = frozen.leaves(calls, 6), frozen.forms_of(calls)
    assert not frozen.trains(cameras.tower)
    cameras.tower.inner.bias.requires_grad_(True)
    assert frozen.trains(cameras.tower)
    runs = cameras.tower.runs
    with passes.steady(cameras), frozen.replayed(cameras, stored, forms):
        cameras(images).sum().backward()
    assert cameras.tower.runs == runs + 2
    assert cameras.tower.inner.bias.grad is not None
    norms = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    assert frozen.trains(norms)  # its statistics move in the task's forwards
    assert not frozen.trains(nn.BatchNorm1d(2, track_running_stats=False).requires_grad_(False))


def test_what_is_no_constant_of_the_anchors_is_refused(cameras: Cameras) -> None:
    images = torch.randn(6, 2, 5)
    with passes.steady(cameras), frozen.recorded(cameras, ["tower"]) as calls:
        cameras(images)
    stored, forms = frozen.leaves(calls, 6), frozen.forms_of(calls)
    images.requires_grad_(True)  # as after a module that trains
    with pytest.raises(ValueError, match="'tower' is not a constant"), frozen.recorded(cameras, ["tower"]):
        cameras(images)
    with pytest.raises(ValueError, match="'tower' is not a constant"), frozen.replayed(cameras, stored, forms):
        cameras(images)
    with torch.no_grad(), frozen.replayed(cameras, stored, forms):
        cameras(images)


def test_another_forward_than_the_recorded_one_is_refused(cameras: Cameras) -> None:
    images = torch.randn(6, 3, 5)
    with passes.steady(cameras), frozen.recorded(cameras, ["tower"]) as calls:
        cameras(images)
    stored, forms = frozen.leaves(calls, 6), frozen.forms_of(calls)
    cameras.cameras = 3
    with pytest.raises(ValueError, match="more often than the 2 times"), frozen.replayed(cameras, stored, forms):
        cameras(images)
    assert "forward" not in vars(cameras.tower)
    more: Mapping[str, Tensor] = stored | {"frozen.tower.2.0": torch.ones(6, 4)}
    less: Mapping[str, Tensor] = {k: x for k, x in stored.items() if k != "frozen.tower.1.2"}
    for other in (more, less):
        with pytest.raises(ValueError, match="stored outputs of 'tower' are"), frozen.replayed(cameras, other, forms):
            pass
    # A forward that ended before the module: nothing is known of its outputs
    with frozen.replayed(cameras, stored, {"tower": []}):
        cameras(images)


def test_a_forward_that_was_set_on_the_instance_is_back(cameras: Cameras) -> None:
    own = cameras.tower.forward
    cameras.tower.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = cameras.tower.forward
    cameras.cameras = 3
    with pytest.raises(IndexError), frozen.recorded(cameras, ["tower"]) as calls:
        cameras(torch.randn(6, 2, 5))
    assert len(calls["tower"]) == 2
    assert cameras.tower.forward is before


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.part, self.spare, self.value = nn.Identity(), nn.Identity(), value

    def forward(self, x: Tensor) -> Any:
        self.part.forward = lambda _: self.value
        return self.part(x)


def test_outputs_that_cannot_be_stored_are_refused() -> None:
    x = torch.ones(3, 2)
    for value, error in ((torch.ones(()), r"3 anchors. Found \(\)"), (torch.ones(6, 2), r"Found \(6, 2\)")):
        model = Returns(value)
        model(x)
        with frozen.recorded(model, ["part"]) as calls:
            model.part(x)
        with pytest.raises(ValueError, match=error):
            frozen.leaves(calls, 3)
    with frozen.recorded(model, ["spare"]) as calls:
        model(x)
    with pytest.raises(ValueError, match="never calls 'spare'"):
        frozen.leaves(calls, 3)
    model.value = {"cache": object()}
    with pytest.raises(TypeError, match="'part' returns a object"), frozen.recorded(model, ["part"]):
        model.part(x)


def test_names_that_do_not_fit_are_refused(cameras: Cameras) -> None:
    wrapped = nn.DataParallel(cameras)
    assert frozen.resolve_frozen(wrapped, ["tower"]) == {"tower": cameras.tower}
    assert frozen.resolve_frozen(wrapped, ["module.tower"]) == {"tower": cameras.tower}
    for names, error in (
        (["nothing"], "no module 'nothing'"),
        ([""], "no module ''"),
        (["module"], "no module 'module'"),
        (["tower", "module.tower"], "'module.tower' comes twice"),
        (["tower.inner", "tower"], "'tower.inner' is within 'tower'"),
    ):
        with pytest.raises(ValueError, match=error), frozen.recorded(wrapped, names):
            pass
