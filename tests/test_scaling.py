"""Retention in float16: small gradients are not lost, and large ones do not overflow."""

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, Retention
from craft_optim._step.gradients import graph_of
from craft_optim._step.scaling import grown, initial_scale, reaches_float16, shrunk
from craft_optim.dual import DualAscent


class Drift(Retention):
    """`factor` times the mean squared output, its forward and backward in float16 if wanted."""

    def __init__(self, model, factor, half=True):
        self.model, self.factor, self.half, self.calls = model, factor, half, 0

    def loss(self, number):
        self.calls += 1
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        with torch.autocast("cpu", dtype=torch.float16, enabled=self.half):
            y = self.model(x)
        return self.factor * y.float().square().mean()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


class Keep(torch.optim.SGD):
    """Keeps what it is given to step on."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)

    def step(self, closure=None):
        self.seen = [p.grad.clone() for g in self.param_groups for p in g["params"]]


def retention_gradients(factor, half=True, scale=None):
    """What the base gets where the task has next to nothing, with lambda = 1; the optimizer, and the closure."""
    model = network()
    drift = Drift(model, factor, half)
    craft = CraftOptimizer(
        Keep(model.parameters()), drift, dual=DualAscent(1.0, 0.0), projection="never", rho=1e38, trust_region=None
    )
    if scale is not None:
        craft.param_groups[0]["craft_scale"] = scale
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-30)
    craft.step()
    assert craft.metrics["lambda"] == 1.0
    return craft.base_optimizer.seen, craft, drift


def relative_error(gradients, exact):
    return max(float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True))


def gradients_of_a_plain_backward(factor, half):
    model = network()
    Drift(model, factor, half)().backward()
    return [p.grad for p in model.parameters()]


def test_small_gradients_survive_float16():
    exact = gradients_of_a_plain_backward(1e-5, half=False)
    kept, craft, _ = retention_gradients(1e-5)
    assert relative_error(gradients_of_a_plain_backward(1e-5, half=True), exact) > 0.05, "without a scale"
    assert relative_error(kept, exact) < 0.005
    norm = float(torch.cat([e.flatten() for e in exact]).norm())
    assert craft.metrics["retention_grad_norm"] == pytest.approx(norm, rel=5e-3)


def test_an_overflow_repeats_the_pass_on_the_same_anchors_with_a_smaller_scale():
    kept, craft, drift = retention_gradients(5.0, scale=2.0**24)
    assert drift.calls > 1
    assert craft.param_groups[0]["craft_anchor_position"] == 1
    assert 1.0 <= craft.param_groups[0]["craft_scale"] < 2.0**24
    assert craft.metrics["skipped"] == 0.0
    assert relative_error(kept, gradients_of_a_plain_backward(5.0, half=False)) < 0.005


def test_what_no_scale_helps_is_skipped_and_leaves_the_scale():
    model = network()
    drift = Drift(nn.Sequential(model, Poison()), 1.0)
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), drift)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="retention pass is not finite"):
        craft.step()
    assert drift.calls == 5, "2^16, 2^12, 2^8, 2^4, 1"
    assert craft.param_groups[0]["craft_scale"] == initial_scale()["craft_scale"]
    assert craft.param_groups[0]["craft_anchor_position"] == 1


class Poison(nn.Module):
    """Finite forward, backward that is not."""

    def forward(self, x):
        y = x * 1.0
        y.register_hook(lambda g: g * float("nan"))
        return y


def test_in_float32_nothing_is_scaled():
    kept, craft, drift = retention_gradients(1.0, half=False)
    assert drift.calls == 1
    assert {k: v for k, v in craft.param_groups[0].items() if k.startswith("craft_scale")} == initial_scale()
    assert relative_error(kept, gradients_of_a_plain_backward(1.0, half=False)) < 1e-6


def test_a_closure_that_is_set_later_is_looked_at_anew():
    _, craft, drift = retention_gradients(1.0, half=False)
    drift.half = True
    craft.retention_closure = lambda: drift()
    craft.step()
    assert craft.param_groups[0]["craft_scale_passes"] == 1.0


@pytest.mark.parametrize("closure", ["its class", "a function"])
def test_float16_may_begin_and_end_at_any_step(closure):
    """Mixed precision after a warm-up: what is small without a scale must not round to zero then."""
    model = network()
    drift = Drift(model, 1e-4, half=False)
    craft = CraftOptimizer(Keep(model.parameters()), drift if closure == "its class" else lambda: drift.loss(0))
    norms = []
    for half in (False, True, True, False, True):
        craft.param_groups[0]["craft_anchor_position"] = 0.0
        drift.half = half
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        craft.step()
        norms.append(craft.metrics["retention_grad_norm"])
    assert norms == pytest.approx([norms[0]] * 5, rel=2e-2)
    assert norms[0] > 0.0
    assert craft.param_groups[0]["craft_scale_passes"] == 3.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_float16_within_a_checkpoint(reentrant):
    """The graph shows nothing of what a reentrant one will run."""
    model, half = network(), nn.Linear(4, 2).half()
    parameters = [*model.parameters(), *half.parameters()]
    x = torch.ones(2, 8)

    def drift():
        run = torch.utils.checkpoint.checkpoint(
            lambda y: half(y.half()).float(), model(x), use_reentrant=reentrant, preserve_rng_state=False
        )
        return 1e-8 * run.sum()

    craft = CraftOptimizer(Keep(parameters), drift)
    for p in parameters:
        p.grad = torch.ones_like(p)
    craft.step()
    half.float()
    exact = torch.autograd.grad(1e-8 * half(model(x)).sum(), parameters)
    norm = float(torch.cat([g.flatten() for g in exact]).norm())
    assert craft.metrics["retention_grad_norm"] == pytest.approx(norm, rel=1e-2)


def test_scales_are_powers_of_two_that_shrink_to_one_and_grow_after_many_passes():
    state = initial_scale()
    for _ in range(10):
        state = shrunk(state)
    assert state == {"craft_scale": 1.0, "craft_scale_passes": 0.0}
    for _ in range(2000):
        assert state["craft_scale"] == 1.0
        state = grown(state)
    assert state == {"craft_scale": 2.0, "craft_scale_passes": 0.0}


def test_a_scale_shrinks_by_16_and_grows_to_2_to_the_64_at_most():
    assert initial_scale() == {"craft_scale": 65536.0, "craft_scale_passes": 0.0}
    assert shrunk({"craft_scale": 65536.0, "craft_scale_passes": 7.0}) == {
        "craft_scale": 4096.0,
        "craft_scale_passes": 0.0,
    }
    for before, after in [(2.0**63, 2.0**64), (2.0**64, 2.0**64)]:
        grew = {"craft_scale": after, "craft_scale_passes": 0.0}
        assert grown({"craft_scale": before, "craft_scale_passes": 1999.0}) == grew


@pytest.mark.parametrize("checkpointed", [False, True, "reentrant"])
@pytest.mark.parametrize("half", [False, True])
def test_float16_is_found_anywhere_in_the_graph(half, checkpointed):
    model = network()
    x = torch.randn(3, 8, requires_grad=True)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            return model(x)

    if checkpointed:
        y = torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=checkpointed == "reentrant")
    else:
        y = forward(x)
    hidden = checkpointed == "reentrant"  # which shows nothing of what it will run
    assert reaches_float16(graph_of(y.float().mean())) is (half or hidden)


def test_pure_float16_and_bfloat16():
    for dtype, found in ((torch.float16, True), (torch.bfloat16, False)):
        assert reaches_float16(graph_of(network().to(dtype)(torch.ones(1, 8, dtype=dtype)).float().mean())) is found


def test_a_parameter_in_float16_is_enough():
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    assert reaches_float16(graph_of(p.float().sum()))
    assert not reaches_float16(graph_of(p.detach().float().requires_grad_().sum()))


class Halves(torch.autograd.Function):
    """One node with two outputs, of which one is float16."""

    @staticmethod
    def forward(ctx, x):
        return x.half(), x * 1.0

    @staticmethod
    def backward(ctx, half, single):
        return half.float() + single


def test_one_output_of_several_in_float16_is_enough():
    half, single = Halves.apply(torch.ones(2, requires_grad=True))
    assert reaches_float16(graph_of(half.float().sum() + single.sum()))


def test_every_node_is_visited_once():
    x = torch.ones(1, requires_grad=True)
    for _ in range(100):  # 2^100 ways through 100 nodes
        x = x + x
    assert not reaches_float16(graph_of(x.sum()))
