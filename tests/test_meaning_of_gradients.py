"""What the base takes a gradient for: one to ascend, one that is not there, one with a graph, one with a sign bit."""

import math

import pytest
import torch
from torch import nn

from craft_optim import Constraint, CraftOptimizer
from craft_optim.dual import DualAscent
from craft_optim.functional import gram, project_and_merge_


def quadratic():
    """Two parameters, and a loss whose descent takes them away from where they are kept."""
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    return [a, b], lambda: (a - 1.0).square().sum() + (b + 1.0).square().sum()


SETTINGS = {
    "one": {},
    "host": {"gradient_memory": "host"},
    "bfloat16": {"gradient_memory": "bfloat16"},
    "every third": {"retention_every": 3},
    "clipped": {"max_grad_norm": 0.5, "retention_every": 1},
    "never": {"projection": "never", "rho": 2.0},
    "several": {"several": True},
}


def trained(maximize, make, several=False, **settings):
    """The parameters after training; `maximize` says of each group whether its sign is turned round, twice."""
    parameters, loss = quadratic()
    groups = [{"params": [p], "maximize": up} for p, up in zip(parameters, maximize, strict=True)]

    def drift():
        return sum(p.square().sum() for p in parameters)

    closure = {"a": drift, "b": Constraint(lambda: 0.5 * parameters[1].square().sum(), 0.02)} if several else drift
    optimizer = CraftOptimizer(make(groups), closure, **({} if several else {"epsilon": 0.1}), **settings)
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        for p, group in zip(parameters, optimizer.param_groups, strict=True):
            if group["maximize"]:
                p.grad.neg_()
        optimizer.step()
    return parameters, optimizer.metrics


@pytest.mark.parametrize("settings", SETTINGS)
def test_ascending_the_negative_loss_is_descending_the_loss_bit_for_bit(settings):
    make = {"one": lambda g: torch.optim.AdamW(g, lr=0.01)}.get(settings, lambda g: torch.optim.SGD(g, lr=0.02))
    expected, metrics = trained((False, False), make, **SETTINGS[settings])
    assert metrics["violation"] < 1.3
    for maximize in ((True, True), (True, False), (False, True)):
        found, of_ascent = trained(maximize, make, **SETTINGS[settings])
        assert all(map(torch.equal, expected, found))
        assert of_ascent == metrics


def test_a_group_that_changes_its_mind_is_asked_at_every_step():
    parameters, loss = quadratic()
    optimizer = CraftOptimizer(
        torch.optim.SGD(parameters, lr=0.02), lambda: sum(p.square().sum() for p in parameters), epsilon=0.1
    )
    for step in range(300):
        sign = 1.0 if step % 2 else -1.0
        optimizer.param_groups[0]["maximize"] = sign < 0
        optimizer.zero_grad()
        (sign * loss()).backward()
        optimizer.step()
    assert 0.8 < optimizer.metrics["violation"] < 1.2


def test_bases_that_keep_the_sign_for_themselves():
    class Ascent(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.maximize = True
            for group in self.param_groups:
                del group["maximize"]

        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(p.grad, alpha=group["lr"])

    parameters, loss = quadratic()
    optimizer = CraftOptimizer(Ascent(parameters, 0.02), lambda: sum(p.square().sum() for p in parameters), epsilon=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-loss()).backward()
        optimizer.step()
    assert 0.8 < optimizer.metrics["violation"] < 1.2


def test_gradients_with_a_graph_are_refused_before_anything_runs():
    (a, b), _ = quadratic()
    base = torch.optim.SGD([a, b], lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="Found differentiable=True in group 0: leave it out"):
        CraftOptimizer(base, lambda: a.square().sum())
    assert CraftOptimizer(base).param_groups[0]["differentiable"]
    later = CraftOptimizer(torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1), lambda: a.square().sum())
    later.param_groups[1]["differentiable"] = True
    a.grad = torch.ones(3)
    with pytest.raises(ValueError, match="in group 1"):
        later.step()
    assert torch.equal(a, torch.zeros(3))
    with pytest.raises(ValueError, match="in group 0"):
        CraftOptimizer(base).retention_closure = lambda: a.square().sum()


# -- gradients that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["copy", "host", "bfloat16"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    ],
)
def test_no_gradient_means_do_not_touch(make, several, memory):
    """As of a bare torch optimizer: no step, no decay, no state; retention or not."""
    moving, still = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))

    def drift():
        return (moving.sum() + still.sum() - 5.0).square()

    closures = {"a": drift, "b": lambda: still.square().sum() + moving.square().sum()} if several else drift
    optimizer = CraftOptimizer(make([moving, still]), closures, gradient_memory=memory)
    for _ in range(5):
        optimizer.zero_grad()
        (moving.square().sum() + still.sum()).backward()
        still.grad = None
        optimizer.step()
        assert still.grad is None
    assert torch.equal(still, torch.ones(3))
    assert still not in optimizer.state
    assert (moving < 1.0).all()


def test_what_is_not_touched_takes_no_part_in_the_decision():
    moving, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([moving, still], lr=0.1), lambda: moving.sum() + 100.0 * still.sum())
    moving.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert optimizer.metrics["retention_grad_norm"] == pytest.approx(math.sqrt(2.0))


def test_a_parameter_may_be_left_out_for_a_while():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([a, b], lr=0.1), lambda: (a * b).sum())
    for step in range(6):
        before = b.detach().clone()
        optimizer.zero_grad()
        ((a + b) if step % 2 else a).sum().backward()
        optimizer.step()
        assert torch.equal(b, before) is (step % 2 == 0)


def test_it_is_no_failure_if_retention_reaches_only_what_is_left_out():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([a, b], lr=0.1), lambda: b.square().sum())
    a.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2,), 0.9))
    assert torch.equal(b, torch.ones(2))


def test_a_mask_by_a_hook_holds_for_both_gradients():
    embedding = nn.Embedding(6, 3)
    start = embedding.weight.detach().clone()
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])[:, None]
    embedding.weight.register_hook(lambda g: g * mask)
    optimizer = CraftOptimizer(
        torch.optim.SGD(embedding.parameters(), lr=0.1), lambda: (embedding.weight - start + 0.1).square().sum()
    )
    for _ in range(5):
        optimizer.zero_grad()
        embedding(torch.arange(6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(embedding.weight[:4], start[:4])
    assert not torch.equal(embedding.weight[4:], start[4:])


# -- gradients of another sign in memory, and very small and large ones ------------------------------------------------


def negative(*values, dtype=torch.float32):
    return torch._neg_view(torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_sign_bit_of_a_view_counts(compiled, dtype, monkeypatch):
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", compiled)
    plain = torch.tensor([1.0, 0.5], dtype=dtype)
    assert gram([negative(1.0, 2.0, dtype=dtype)], [plain]).tr == -2.0
    assert gram([plain], [negative(1.0, 2.0, dtype=dtype)]).tr == -2.0
    for task, retention in (
        (negative(1.0, 2.0, dtype=dtype), plain.clone()),
        (plain, negative(1.0, 2.0, dtype=dtype)),
        (negative(1.0, 2.0, dtype=dtype), negative(2.0, 4.0, dtype=dtype)),
        (None, negative(2.0, 4.0, dtype=dtype)),
    ):
        expected = 0.5 * retention + (0.0 if task is None else task)
        merged = [retention]
        project_and_merge_([task], merged, lam=0.5, project=False)
        assert torch.equal(merged[0], expected)


def test_the_conjugate_bit_counts():
    x, y = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j]), torch.tensor([0.5 - 1.0j, 2.0j])
    for task, retention in ((x.conj(), y.clone()), (x, y.clone().conj()), (x.conj(), torch._neg_view(y.clone()))):
        expected = task.resolve_conj() + 0.5 * retention.resolve_conj().resolve_neg()
        assert gram([task], [retention]).tr == pytest.approx(float((task * retention.conj()).real.sum()))
        merged = [retention]
        project_and_merge_([task], merged, lam=0.5, project=False)
        torch.testing.assert_close(merged[0].resolve_conj().resolve_neg(), expected)


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("merge", ["weighted", "equal", "task_priority"])
def test_no_size_of_a_retention_gradient_makes_more_of_the_task_than_there_was(
    compiled, dtype, size, merge, monkeypatch
):
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", compiled)
    for projected in ("always", "violated"):
        for sign in (1.0, -1.0):
            x = nn.Parameter(torch.zeros(3, dtype=dtype))
            direction = sign * torch.tensor([size, 0.0, 0.0], dtype=dtype)
            optimizer = CraftOptimizer(
                torch.optim.SGD([x], lr=1.0), lambda x=x, d=direction: (x * d).sum() + 1.0, epsilon=0.1,
                projection=projected, merge=merge,
            )  # fmt: skip
            x.grad = torch.tensor([1.0, 2.0, 2.0], dtype=dtype)
            optimizer.step()
            assert torch.isfinite(x).all()
            if merge != "equal" or size < 1e-20:
                assert x.detach().double().norm() <= 13.1  # (rho + |cos| + 1) |g_t|


@pytest.mark.parametrize("memory", ["copy", "host", "bfloat16"])
@pytest.mark.parametrize("other", [1.0, 1e-42])
def test_tiny_gradients_of_several_constraints(memory, other):
    x = nn.Parameter(torch.zeros(3))
    sizes = torch.tensor([[-1e-43, 0.0, 0.0], [0.0, -other, 0.0]])
    closures = {str(j): lambda j=j: (x * sizes[j]).sum() + 1.0 for j in range(2)}
    optimizer = CraftOptimizer(torch.optim.SGD([x], lr=1.0), closures, epsilon=0.1, gradient_memory=memory)
    x.grad = torch.tensor([1.0, 2.0, 2.0])
    optimizer.step()
    assert x.detach().norm() <= 13.1  # the bound of the retention gradients together is the same


@pytest.mark.parametrize("dual", [DualAscent(1e300, 0.0, 1e308), DualAscent(1e30, 0.0, 1e308)])
def test_a_merged_gradient_that_its_dtype_cannot_hold_is_a_counted_skip(dual):
    x = nn.Parameter(torch.zeros(2))
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=1.0), lambda: 1e20 * x.sum(), dual=dual, rho=math.inf, projection="never"
    )
    x.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="used the task gradient alone"):
        optimizer.step()
    assert torch.equal(x, -torch.ones(2))
    assert optimizer.param_groups[0]["craft_skipped"] == 1.0
    assert optimizer.param_groups[0]["craft_lambda"] == 0.0


def test_of_several_dtypes_the_narrowest_decides():
    """Each of these gradients fits; with nothing said, what is put together in float16 would be infinite."""
    x, y = nn.Parameter(torch.zeros(2, dtype=torch.float16)), nn.Parameter(torch.zeros(2))
    optimizer = CraftOptimizer(
        torch.optim.SGD([x, y], lr=1e-7), lambda: 100.0 * (x.float() + y + 1.0).sum(), dual=DualAscent(500.0)
    )
    for p in (x, y):
        p.grad = torch.full_like(p, 40000.0)
    with pytest.warns(UserWarning, match="merged gradient, in its dtype, is not finite"):
        optimizer.step()
    assert torch.isfinite(x).all()
    assert optimizer.param_groups[0]["craft_skipped"] == 1.0


@pytest.mark.parametrize("several", [False, True])
def test_parameters_of_whole_numbers_are_carried_along(several):
    """As those of a quantised model, all of which are given to the optimizer."""
    x, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    closures = [lambda: (x + 1.0).square().sum(), lambda: x.square().sum()]
    optimizer = CraftOptimizer(
        torch.optim.AdamW([frozen, x], lr=0.1), dict(zip("ab", closures, strict=True)) if several else closures[0]
    )
    for _ in range(11):
        x.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.metrics["retention_grad_norm"] > 0.0
    assert optimizer.metrics["skipped"] == 0.0
    assert torch.equal(frozen, torch.ones(3, dtype=torch.int8))


def test_a_controller_of_ones_own_must_return_a_multiplier():
    class Broken(DualAscent):
        def __call__(self, state, **measured):
            return super().__call__(state, **measured)._replace(multiplier=math.nan)

    x = nn.Parameter(torch.zeros(2))
    optimizer = CraftOptimizer(torch.optim.SGD([x], lr=1.0), lambda: x.sum(), dual=Broken())
    x.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"multiplier=nan of .*Broken"):
        optimizer.step()
    assert torch.equal(x, torch.zeros(2))
    assert torch.equal(x.grad, torch.ones(2))
