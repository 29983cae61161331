"""One forward on two ranges of rows gives each range's gradients, module by module."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim.anchors.joint.row_gradients import Aliases, RowsError, _Linear, parts_with_parameters, rows_apart

SIZE, CUT = 5, 3


class LlamaLikeRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Positions(nn.Module):
    """What GPT-2 does: positions of no row in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.table(torch.arange(x.shape[1]).unsqueeze(0)))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), LlamaLikeRMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.flatten(0, 1))).unflatten(0, x.shape[:2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.middle(self.words(ids)))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linear, norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.first, self.second = nn.Sequential(linear, norm, nn.Tanh()), nn.Sequential(norm, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _points() -> Tensor:
    return torch.randn(SIZE, 4, 6, dtype=torch.float64)


def _ids() -> Tensor:
    return torch.randint(0, 9, (SIZE, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), _points),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()), _points),
    "rms norm": (lambda: nn.Sequential(LlamaLikeRMSNorm(6), nn.Tanh(), nn.Linear(6, 6), LlamaLikeRMSNorm(6)), _points),
    "torch's rms norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)), _points),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2)), _points),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)), _ids),
    "sparse embedding": (lambda: nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 2)), _ids),
    "positions": (Positions, _points),
    "flattened rows": (Flattened, _points),
    "tied weights": (Tied, _ids),
    "shared modules": (Shared, _points),
    "weight norm": (Parametrized, _points),
    "attention": (Attention, _points),
}


REFUSED = [("weight norm", True)]


def _dense(x: Tensor | None) -> Tensor | None:
    return x.to_dense() if x is not None and x.is_sparse else x


@pytest.mark.parametrize(
    ("name", "frozen"), [(name, frozen) for name in MODELS for frozen in (False, True) if (name, frozen) not in REFUSED]
)
def test_each_range_has_its_own_gradients(name: str, frozen: bool) -> None:
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, x = make().double(), batch()
    if frozen:  # the weight of the first module
        next(model.parameters()).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for rows in (x[:CUT], x[CUT:]):
        (model(rows).cos() * 3.0).sum().backward()
        expected.append([_dense(p.grad) for p in parameters])
        model.zero_grad()

    aliases = Aliases()
    with rows_apart(parts_with_parameters(model), aliases, SIZE, CUT):
        output = model(x)
    torch.testing.assert_close(output, model(x), rtol=1e-12, atol=1e-12)
    (output.cos() * 3.0).sum().backward()
    others = aliases.take_gradients()
    for p, ours, theirs in zip(parameters, *expected, strict=True):
        torch.testing.assert_close(_dense(p.grad), ours, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(_dense(others[p]), theirs, rtol=1e-12, atol=1e-12)
    assert not any("forward" in vars(m) or "weight" in vars(m) for m in model.modules())


def test_aliases_share_memory() -> None:
    parameter, alias = nn.Parameter(torch.zeros(3)), Aliases()
    assert alias(parameter) is alias(parameter)
    assert alias(parameter).data_ptr() == parameter.data_ptr()  # type: ignore[union-attr]
    frozen = parameter.detach()
    assert alias(frozen) is frozen
    assert alias(None) is None


def test_the_input_has_a_gradient_too() -> None:
    model, x = nn.Sequential(nn.Linear(6, 2), nn.LayerNorm(2)).double(), _points().requires_grad_()
    with rows_apart(parts_with_parameters(model), Aliases(), SIZE, CUT):
        output = model(x)
    torch.testing.assert_close(torch.autograd.grad(output.cos().sum(), x), torch.autograd.grad(model(x).cos().sum(), x))


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_passes_gradcheck(transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        _points()[:, :2],
        torch.randn(*((6, 3) if transposed else (3, 6))).double(),
        torch.randn(3).double(),
    )

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # both leaves are one parameter: gradients add up
        return _Linear.apply(x, CUT, w, w, b, b, transposed)

    assert torch.autograd.gradcheck(linear, tuple(leaf.requires_grad_() for leaf in (x, weight, bias)))


def test_autocast_is_that_of_the_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)), _points().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with rows_apart(parts_with_parameters(model), Aliases(), SIZE, CUT):
            output = model(x)
        afterwards = model(x)  # a cast that was kept without a graph would leave a weight without gradient
    for loss in (afterwards, output):
        model.zero_grad()
        loss.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_rows_that_cannot_be_told_are_an_error() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = Transposed().double()
    with (
        pytest.raises(RowsError, match=r"'inner' is given a tensor of shape \(4, 5, 6\) where 5 rows"),
        rows_apart(parts_with_parameters(model), Aliases(), SIZE, CUT),
    ):
        model(_points())
    assert "forward" not in vars(model.inner)


def test_a_module_that_makes_a_weight_is_an_error() -> None:
    model = Parametrized().double()
    model.linear.bias.requires_grad_(False)  # otherwise the layer is run twice, and makes the weight twice
    with (
        pytest.raises(RowsError, match=r"'linear\.parametrizations\.weight' is given no tensor"),
        rows_apart(parts_with_parameters(model), Aliases(), SIZE, CUT),
    ):
        model(_points())


def test_a_model_that_owns_parameters_itself_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.zeros(6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.inner(x + self.token))

    with pytest.raises(RowsError, match="Own itself owns trainable parameters, token"):
        parts_with_parameters(Own())
    model = Own()
    model.token.requires_grad_(False)
    assert parts_with_parameters(model) == {"inner": model.inner}
