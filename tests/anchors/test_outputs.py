"""What an output is: found out where it is certain, asked for otherwise, and held in its own unit."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim import CraftOptimizer, HeldOutDrift
from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    BernoulliRetention,
    CombinedRetention,
    LogitRetention,
    OnlineRetention,
    OutputRetention,
    Reading,
    build,
)
from craft_optim.anchors.kinds import Output
from craft_optim.evaluation.drift import drifts


def mlp(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def maps(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, channels, 1))


class Series(nn.Module):
    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(6, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x.unsqueeze(1).repeat(1, 5, 1) * torch.arange(1.0, 6.0)[:, None])
        return out


class Heads(nn.Module):
    """Two heads: in a tuple, or by name."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.body, self.kind, self.size, self.named = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 2), named

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        return {"kind": self.kind(h), "size": self.size(h)} if self.named else (self.kind(h), self.size(h))


def disturb(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale)


# Asked for


@pytest.mark.parametrize(
    ("model", "inputs", "ways"),
    [
        (mlp(1), torch.randn(4, 6), ['output="labels"', 'output="values"']),
        (mlp(3), torch.randn(4, 6), ["class_dim=-1 if its 3 entries", 'output="labels"', 'output="values"']),
        (nn.Sequential(mlp(1), nn.Flatten(0)), torch.randn(4, 6), ['output="labels"', 'output="values"']),
        (maps(5), torch.randn(4, 3, 6, 7), ["class_dim=1 if its 5 entries", 'output="labels"']),
        (maps(1), torch.randn(4, 3, 6, 7), ['output="labels"', 'output="values"']),
        (Series(), torch.randn(4, 6), ["class_dim=-1 if its 2 entries", 'output="values"']),
    ],
    ids=["one", "several", "squeezed", "map", "map of one", "series"],
)
def test_what_cannot_be_told_is_asked_for(model: nn.Module, inputs: Tensor, ways: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say what they are") as error:
        build(model, [inputs], tmp_path / "a")
    assert all(way in str(error.value) for way in ways)
    assert ("class_dim" in str(error.value)) == any("class_dim" in way for way in ways)
    assert not (tmp_path / "a" / "cache.json").exists()
    online = OnlineRetention(model, inputs, 2, teacher=copy.deepcopy(model))
    with pytest.raises(ValueError, match="does not say what they are"):
        online()


@pytest.mark.parametrize(("heads", "words"), [(Heads(), '"0"'), (Heads(named=True), '"kind"')])
def test_several_heads_are_asked_for_by_name(heads: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"say what its parts are, output=\{") as error:
        build(heads, [torch.randn(4, 6)], tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: (x.mean(), x), r'output=\{"1": "classes", \.\.\.\}'),  # a loss has no anchors
        (lambda x: [x, x], r'output=\{"0": "classes", "1": "classes"'),
        (lambda x: {"kind": x.argmax(-1), "out": x}, r'output=\{"out": "classes", \.\.\.\}'),
        (lambda x: {"a": {"deep": x}}, "Found dict of a: pass a `forward=`"),
    ],
)
def test_only_parts_that_can_be_outputs_are_offered(returned: Any, words: str, tmp_path: Path) -> None:
    model = mlp(4)
    with pytest.raises(ValueError, match=words):
        build(model, [torch.randn(5, 6)], tmp_path, forward=lambda m, x: returned(m(x)))
    with pytest.raises(ValueError, match="Found dict of deep there"):
        build(model, [torch.randn(5, 6)], tmp_path, forward=lambda m, x: {"a": {"deep": m(x)}}, output={"a": "labels"})


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (mlp(1), {"class_dim": -1}, "softmax is 1 whatever"),
        (nn.Sequential(mlp(1), nn.Flatten(0)), {"output": "classes"}, "softmax is 1 whatever"),
        (mlp(1), {"output": "classes"}, "softmax is 1 whatever"),
        (mlp(1), {"top_k": 1}, "softmax is 1 whatever"),
        (mlp(4), {"class_dim": 2}, "class_dim=2"),
        (mlp(4), {"class_dim": -2}, "class_dim=-2"),
        (mlp(4), {"class_dim": 0}, "class_dim=0"),
        (mlp(4), {"class_dim": 1, "output": "labels"}, "class_dim=1 with output='labels'"),
        (mlp(4), {"output": "logits"}, "output='logits'"),
        (mlp(4), {"output": {"a": "auto"}}, "'a': 'auto'"),
        (mlp(4), {"output": {"hidden": "classes"}}, "Found 'hidden'"),
        (mlp(4), {"output": {"a": "classes"}, "class_dim": {"b": 1}}, "'b': 1"),
        (mlp(4), {"output": {"a": "classes"}}, "its output 'a'"),
        (mlp(4), {"output": "labels", "top_k": 2}, "top_k=2 and an output of labels"),
        (mlp(4), {"output": "values", "tokens": 3}, "`tokens` need classes"),
        (mlp(4), {"output": "values", "class_dim": 5}, "class_dim=5"),
        (nn.Sequential(mlp(1), nn.Flatten(0)), {"output": "values", "class_dim": 5}, "class_dim=5"),
        (nn.Sequential(mlp(4), nn.LogSoftmax(-1)), {"output": "labels"}, "Found log-probabilities"),
        (mlp(4), {"output": {"T": "labels"}}, "Found one tensor, .*: leave its name out, output='labels'"),
        (nn.Sequential(mlp(4), nn.Softmax(-1)), {"class_dim": -1}, "Found probabilities"),
        (maps(4), {"output": "classes"}, "does not say which dimension"),
        (nn.Sequential(mlp(4), nn.Threshold(0.0, 0.0)), {"outputs": "classes"}, "no `outputs`"),
    ],
)
def test_what_it_cannot_be_is_refused(model: nn.Module, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    inputs = torch.randn(4, 3, 6, 7) if isinstance(model[0], nn.Conv2d) else torch.randn(4, 6)  # type: ignore[index]
    with pytest.raises((ValueError, TypeError), match=words):
        build(model, [inputs], tmp_path, **settings)
    assert not (tmp_path / "cache.json").exists()


def test_rows_of_a_picture_for_classes_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Dimension 3 .* 7 classes, .* Is it class_dim=1, 4 classes"):
        build(maps(4), [torch.randn(8, 3, 6, 7)], tmp_path, class_dim=-1)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Conv2d(3, 4, 2, 2), torch.randn(8, 3, 6, 8)),  # fewer places, in proportion
        (nn.Conv1d(3, 4, 3, padding=1), torch.randn(8, 3, 7)),
    ],
)
def test_places_of_a_convolution_are_warned_of(model: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Is it class_dim=1, 4 classes"):
        build(model, [inputs], tmp_path / "a", class_dim=-1)
    if inputs.ndim == 3:
        with pytest.warns(UserWarning, match=r"for 7 channels, .* Is it class_dim=1, 4 channels"):
            build(model, [inputs], tmp_path / "b", output="values")
    build(model, [inputs], tmp_path / "c", output="values", class_dim=1)


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("settings", [{"output": "labels"}, {"output": "classes"}])
def test_probabilities_are_warned_of(size: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where a batch alone has too few numbers to tell."""
    inputs = torch.randn(32, 6).split(size)
    with pytest.warns(UserWarning, match=r"numbers .* are in \[0, 1\]\. (Labels|Classes) are taken for logits") as seen:
        build(nn.Sequential(mlp(4), nn.Sigmoid()), inputs, tmp_path, **settings)
    assert len(seen) == 1


def test_logits_and_silent_heads_are_not_taken_for_probabilities(tmp_path: Path) -> None:
    silent = mlp(4)
    nn.init.zeros_(silent[2].weight)
    nn.init.zeros_(silent[2].bias)
    untrained = copy.deepcopy(silent)
    nn.init.constant_(untrained[2].bias, 0.2)
    nn.init.normal_(untrained[2].weight, std=0.01)
    for name, model in {"logits": mlp(4), "silent": silent, "untrained": untrained}.items():
        build(model, torch.randn(32, 6).split(8), tmp_path / name, output="labels")


# Found out


def test_log_probabilities_tell(tmp_path: Path) -> None:
    for at, (model, inputs, dim) in enumerate(
        [
            (nn.Sequential(mlp(4), nn.LogSoftmax(-1)), torch.randn(9, 6), 1),
            (nn.Sequential(maps(4), nn.LogSoftmax(1)), torch.randn(9, 3, 5, 4), 1),
            (nn.Sequential(maps(4), nn.LogSoftmax(3)), torch.randn(9, 3, 5, 4), 3),
        ]
    ):
        cache = build(model, [inputs], tmp_path / str(at))
        assert cache.features.outputs == {"": Output("classes", dim, 4)}
        assert abs(cache.retention(model, batch_size=4).drift()) < 1e-5


def test_a_vocabulary_tells(tmp_path: Path) -> None:
    ids = torch.randint(50, (9, 7))
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    assert build(model, [ids], tmp_path / "a").features.outputs == {"": Output("classes", 2, 50)}
    for at, other in enumerate(
        [
            nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)),  # hidden states
            nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 40)),
            nn.Sequential(nn.Embedding(50, 50), nn.Linear(50, 50)),  # either
        ]
    ):
        with pytest.raises(ValueError, match="does not say"):
            build(other, [ids], tmp_path / str(at))


def test_transformers_tell(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = transformers.BertConfig(**sizes, num_attention_heads=2)

    def with_labels(number: int, problem: str | None = None) -> Any:
        config = copy.deepcopy(bert)
        config.num_labels, config.problem_type = number, problem
        return config

    tiny = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    segformer = transformers.SegformerConfig(**tiny, num_labels=3)
    batch = {"input_ids": torch.randint(40, (5, 7)), "attention_mask": torch.ones(5, 7).long()}
    pictures = {"pixel_values": torch.randn(2, 3, 32, 32)}
    one = transformers.BertForSequenceClassification
    for at, (model, inputs, found) in enumerate(
        [
            (transformers.BertForMaskedLM(bert), batch, Output("classes", 2, 40)),
            (transformers.BertForTokenClassification(with_labels(3)), batch, Output("classes", 2, 3)),
            (one(with_labels(3)), batch, Output("classes", 1, 3)),
            (one(with_labels(3, "multi_label_classification")), batch, Output("labels", 1, 3)),
            (one(with_labels(3, "regression")), batch, Output("values", 1, 3)),
            (one(with_labels(1, "regression")), batch, Output("values", 1, 1)),
            (transformers.SegformerForSemanticSegmentation(segformer), pictures, Output("classes", 1, 3)),
        ]
    ):
        cache = build(model, [inputs], tmp_path / str(at))
        assert cache.features.outputs == {"": found}
        assert abs(cache.retention(model, batch_size=2).drift()) < 1e-4
    for model in (one(with_labels(1)), transformers.BertModel(bert)):  # a reward model, or a regression; hidden states
        with pytest.raises(ValueError, match=r"does not say|must give"):
            build(model, [batch], tmp_path / "unclear")
    retention = build(one(with_labels(1)).eval(), [batch], tmp_path / "reward", output="labels").features.outputs
    assert retention == {"": Output("labels", 1, 1)}


# What is measured


def bernoulli(student: Tensor, teacher: Tensor) -> float:
    p, q = teacher.double().sigmoid(), student.double().sigmoid()
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def shares(student: Tensor, teacher: Tensor, dim: int) -> float:
    s, t = (x.double().movedim(dim, -1).flatten(0, -2) for x in (student, teacher))
    return float(((s - t).square().mean(0) / t.var(0, correction=0)).mean())


CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any], type, Any]] = {
    "one logit": (lambda: mlp(1), (6,), {"output": "labels"}, BernoulliRetention, bernoulli),
    "squeezed": (
        lambda: nn.Sequential(mlp(1), nn.Flatten(0)), (6,), {"output": "labels"}, BernoulliRetention, bernoulli
    ),
    "labels": (lambda: mlp(5), (6,), {"output": "labels"}, BernoulliRetention, bernoulli),
    "dense labels": (lambda: maps(2), (3, 5, 4), {"output": "labels"}, BernoulliRetention, bernoulli),
    "regression": (lambda: mlp(3), (6,), {"output": "values"}, OutputRetention, lambda s, t: shares(s, t, 1)),
    "one value": (lambda: mlp(1), (6,), {"output": "values"}, OutputRetention, lambda s, t: shares(s, t, 1)),
    "series": (Series, (6,), {"output": "values"}, OutputRetention, lambda s, t: shares(s, t, 2)),
    "transposed": (
        Series, (6,), {"output": "values", "class_dim": 1}, OutputRetention, lambda s, t: shares(s, t, 1)
    ),
    "picture": (lambda: maps(2), (3, 5, 4), {"output": "values"}, OutputRetention, lambda s, t: shares(s, t, 1)),
    "segmentation": (
        lambda: maps(4), (3, 5, 4), {"class_dim": 1}, LogitRetention,
        lambda s, t: float(F.kl_div(s.double().log_softmax(1), t.double().log_softmax(1), log_target=True,
                                    reduction="none").sum(1).mean()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_drift_is_that_of_the_output(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, shape, settings, kind, reference = CASES[name]
    model, inputs = make(), torch.randn(20, *shape)
    teacher = copy.deepcopy(model)
    cache = build(model, inputs.split(7), tmp_path, dtype=dtype, **settings)
    retention = cache.retention(model, batch_size=8)
    assert type(retention) is kind
    assert retention().item() == pytest.approx(0.0, abs=1e-5)
    online = OnlineRetention(
        model, inputs, 8, teacher=teacher.requires_grad_(False), reading=Reading(**settings), strict=False
    )
    disturb(model)
    with torch.no_grad():
        expected = reference(model(inputs), teacher(inputs))
    rounding = 5e-3 if dtype == torch.float16 else 1e-4
    assert retention.drift() == pytest.approx(expected, rel=rounding)
    assert retention.drift_of_each(range(20)).value == pytest.approx(expected, rel=rounding)
    assert online.drift() == pytest.approx(expected, rel=1e-4)
    assert online.unit == retention.unit
    retention().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_embeddings_keep_their_directions_or_their_similarities(tmp_path: Path) -> None:
    model, inputs = mlp(8), torch.randn(12, 6)
    cache = build(model, [inputs], tmp_path, output="values", dtype=torch.float32)
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    with torch.no_grad():
        before = model(inputs)
        model[2].weight.copy_(turn @ model[2].weight)
        model[2].bias.copy_(turn @ model[2].bias)
        after = model(inputs)
    cosine, similarity = (OutputRetention(model, cache, 12, loss=x, strict=False) for x in ("cosine", "similarity"))
    assert cosine.drift() == pytest.approx(float((1 - F.cosine_similarity(before, after)).mean()), rel=1e-4)
    assert cosine.drift() > 0.1
    assert similarity.drift() == pytest.approx(0.0, abs=1e-9)
    disturb(model)
    with torch.no_grad():
        a, b = (F.normalize(x.double(), dim=1) for x in (before, model(inputs)))
    pairs = list(itertools.permutations(range(12), 2))
    expected = sum(float((a[i] @ a[j] - b[i] @ b[j]) ** 2) for i, j in pairs) / len(pairs)
    assert similarity.drift() == pytest.approx(expected, rel=1e-4)
    assert similarity().requires_grad
    with pytest.raises(TypeError, match="no single one has a drift"):
        similarity.drift_of_each([0])
    with pytest.raises(ValueError, match="batch_size"):
        OutputRetention(model, cache, 1, loss="similarity")


def test_channels_count_alike_whatever_their_unit(tmp_path: Path) -> None:
    """One is in metres, one in millimetres, and one that never changes is measured in the mean of the others."""
    model, inputs = mlp(3), torch.randn(50, 6)
    with torch.no_grad():
        model[2].weight[1] *= 1000.0
        model[2].bias[1] *= 1000.0
        model[2].weight[2], model[2].bias[2] = 0.0, 3.0
    cache = build(model, [inputs], tmp_path, output="values", dtype=torch.float32)
    retention = cache.retention(model, batch_size=10)
    variances = cache.features.scales[""]
    assert variances[2] == 0.0
    for channel, unit in ((0, variances[0]), (1, variances[1]), (2, sum(variances) / 3)):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved[2].bias[channel] += unit**0.5
        assert OutputRetention(moved, cache, 10, strict=False).drift() == pytest.approx(1 / 3, rel=1e-3)
    assert retention.drift() == pytest.approx(0.0, abs=1e-9)


def test_a_small_unit_beside_a_large_one_counts(tmp_path: Path) -> None:
    """Pascals beside a fraction: the fraction is not taken for a constant."""
    model, inputs = mlp(2), torch.randn(50, 6)
    with torch.no_grad():
        model[2].weight[0] *= 1e5
        model[2].bias[0] = 1e5
    cache = build(model, [inputs], tmp_path, output="values", dtype=torch.float32)
    reading, teacher = Reading(output="values"), copy.deepcopy(model)
    with torch.no_grad():
        model[2].bias[1] += cache.features.scales[""][1] ** 0.5
    for retention in (
        OutputRetention(model, cache, 10, strict=False),
        OnlineRetention(model, inputs, 10, teacher=teacher, reading=reading, strict=False),
    ):
        assert retention.drift() == pytest.approx(0.5, rel=1e-3)


def test_values_that_do_not_vary_have_no_unit(tmp_path: Path) -> None:
    model = mlp(2)
    with torch.no_grad():
        model[2].weight.zero_()
    cache = build(model, [torch.randn(9, 6)], tmp_path, output="values")
    with pytest.raises(ValueError, match="do not vary over the 9 anchors"):
        OutputRetention(model, cache, 4)
    assert OutputRetention(model, cache, 4, loss="cosine").drift() == pytest.approx(0.0, abs=1e-6)
    online = OnlineRetention(
        model, torch.randn(9, 6), 4, teacher=copy.deepcopy(model), reading=Reading(output="values")
    )
    with pytest.raises(ValueError, match="do not vary"):
        online()


def test_values_that_rounding_would_hide_are_refused(tmp_path: Path) -> None:
    model, inputs = mlp(2), torch.randn(9, 6)
    with torch.no_grad():
        model[2].bias += 3000.0
    with pytest.raises(ValueError, match=r"pass dtype=torch\.float32"):
        build(model, [inputs], tmp_path, output="values")
    assert (
        build(model, [inputs], tmp_path, output="values", dtype=torch.float32).retention(model, batch_size=4).drift()
        < 1e-4
    )


@pytest.mark.parametrize("size", [1, 3, 9])
def test_rounding_of_one_channel_is_not_hidden_by_another(size: int, tmp_path: Path) -> None:
    """Nor by a batch of one, which does not vary."""
    model, inputs = mlp(2), torch.randn(9, 6)
    with torch.no_grad():
        model[2].weight[0] *= 1e4
        model[2].bias[1] += 1000.0
    with pytest.raises(ValueError, match=r"values of 'size' vary so little .* pass dtype=torch\.float32"):
        build(model, inputs.split(size), tmp_path, forward=lambda m, x: {"size": m(x)}, output={"size": "values"})


def test_a_teacher_that_is_not_finite_is_named() -> None:
    model, inputs = mlp(3), torch.randn(9, 6)

    def masked(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    for kind in ("classes", "labels", "values"):
        retention = OnlineRetention(
            model, inputs, 4, teacher=copy.deepcopy(model), reading=Reading(forward=masked, output=kind)
        )
        with pytest.raises(ValueError, match="teacher's output is not finite"):
            retention()


# Heads


@pytest.mark.parametrize("named", [False, True])
def test_each_head_has_a_closure(named: bool, tmp_path: Path) -> None:
    model, inputs = Heads(named=named), torch.randn(24, 6)
    kinds = {"kind": "classes", "size": "values"} if named else {"0": "classes", "1": "values"}
    first, second = kinds
    calls: list[int] = []
    handle = model.body.register_forward_hook(lambda *_: calls.append(1))
    cache = build(model, inputs.split(8), tmp_path, output=kinds)
    assert len(calls) == 3  # one forward for both
    assert cache.kinds == (first, second)
    assert cache.describe().startswith(
        f"24 anchors, {first}: full logits of 4 classes and {second}: values of 2 channels"
    )
    closures = {name: cache.retention(model, name, batch_size=8) for name in cache.kinds}
    assert [type(x) for x in closures.values()] == [LogitRetention, OutputRetention]
    assert type(LogitRetention(model, cache)) is type(closures[first])  # the only one of its kind
    calls.clear()
    CombinedRetention(closures)().backward()
    assert len(calls) == 1
    handle.remove()
    model.zero_grad()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model.size.bias.add_(1.0)
    assert closures[first].drift() == pytest.approx(0.0, abs=1e-6)
    before, after = teacher(inputs), model(inputs)
    before, after = (x["size"] if named else x[1] for x in (before, after))
    assert closures[second].drift() == pytest.approx(shares(after, before, 1), rel=5e-3)
    opened = AnchorCache.open(tmp_path)
    assert opened.reading.output == kinds
    with pytest.raises(AnchorMismatchError, match="built with output="):
        AnchorCache.open(tmp_path, Reading(output="classes"))
    with pytest.raises(ValueError, match="output of labels"):
        BernoulliRetention(model, cache)
    with pytest.raises(ValueError, match="one output"):
        OnlineRetention(model, cache, teacher=copy.deepcopy(model))


def test_several_heads_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    model, inputs = Heads(), torch.randn(12, 6)
    cache = build(model, [inputs], tmp_path, output={"0": "labels", "1": "labels"})
    with pytest.raises(ValueError, match="say which, output='0'"):
        BernoulliRetention(model, cache)
    assert BernoulliRetention(model, cache, 4, output="1").held == Output("labels", 1, 2)


def test_heads_with_an_epsilon_each_are_held(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, new = Heads(), torch.randn(32, 6), torch.randn(16, 6) + 1.0
    cache = build(model, [inputs], tmp_path, output={"0": "classes", "1": "values"})
    heads = {name: cache.retention(model, name, batch_size=32) for name in cache.kinds}
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), heads, epsilon=0.02)
    for _ in range(150):
        kind, size = model(new)
        (F.cross_entropy(kind, torch.zeros(16).long()) + F.mse_loss(size, torch.ones(16, 2))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(0.005 < head.drift() < 0.03 for head in heads.values())


# Caches


def test_another_kind_or_dimension_is_another_build(tmp_path: Path) -> None:
    model, inputs = mlp(4), torch.randn(20, 6)
    cache = build(model, [inputs], tmp_path, output="labels")
    assert build(model, [inputs], tmp_path).features == cache.features  # finished: nothing is asked
    for other in ({"output": "values"}, {"class_dim": -1}):
        with pytest.raises(AnchorMismatchError, match="output='labels'"):
            build(model, [inputs], tmp_path, **other)
    with pytest.raises(ValueError, match="output of classes"):
        LogitRetention(model, cache)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_another_dimension_is_another_build_from_whichever_end_it_is_counted(kind: str, tmp_path: Path) -> None:
    model, inputs = maps(5), torch.randn(4, 3, 6, 7)
    build(model, [inputs], tmp_path, output=kind, class_dim=-3)
    assert AnchorCache.open(tmp_path, Reading(output=kind, class_dim=1)).features.outputs[""].dim == 1
    assert build(model, [inputs], tmp_path, output=kind, class_dim=-3).features.outputs[""].dim == 1
    for dim in (-1, -2, -4, -9, 2, 9):
        with pytest.raises(AnchorMismatchError, match=rf"class_dim=1\. Found class_dim={dim}"):
            build(model, [inputs], tmp_path, output=kind, class_dim=dim)


def test_held_out_anchors_have_the_same_output(tmp_path: Path) -> None:
    """Of another dimension with the same size the numbers would go through."""
    model, inputs = nn.Sequential(mlp(36), nn.Unflatten(1, (6, 6))), torch.randn(4, 6)
    for kind in ("classes", "values"):
        first, other = (build(model, [inputs], tmp_path / f"{kind}{dim}", output=kind, class_dim=dim) for dim in (1, 2))
        with pytest.raises(AnchorMismatchError, match=r"must hold 6 .* in dimension 1.* Found 6 .* in dimension 2"):
            first.retention(model, batch_size=4).drift(other)
    for kind in ("classes", "labels", "values"):
        first = build(mlp(4), [torch.randn(8, 6)], tmp_path / f"{kind}4", output=kind)
        other = build(mlp(5), [torch.randn(8, 6)], tmp_path / f"{kind}5", output=kind)
        with pytest.raises(AnchorMismatchError, match=r"must hold 4 .* Found 5 "):
            first.retention(mlp(4), batch_size=4, strict=False).drift(other)


def test_a_build_is_taken_up_with_the_same_outputs(tmp_path: Path) -> None:
    model, batches = mlp(4), torch.randn(20, 6).split(5)

    def dying() -> Any:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, dying(), tmp_path, shard_size=5, output="labels")
    with pytest.raises(ValueError, match=r"must give the same outputs.* when the build was begun and then"):
        build(model, batches, tmp_path, shard_size=5, output="values")
    assert build(model, batches, tmp_path, shard_size=5, output="labels").kinds == ("labels",)


def test_a_student_with_another_output_is_refused(tmp_path: Path) -> None:
    inputs = torch.randn(20, 6)
    cache = build(mlp(4), [inputs], tmp_path, output="labels")
    for other in (mlp(5), nn.Sequential(mlp(4), nn.Unflatten(1, (2, 2)))):
        with pytest.raises(AnchorMismatchError, match="another model, or another `forward=`"):
            BernoulliRetention(other, cache, strict=False)()


# Positions


def test_tokens_with_a_number_each(tmp_path: Path) -> None:
    """A tagger with one logit per token: what the mask leaves out does not count."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.head(self.embedding(input_ids)).squeeze(-1)
            return out

    model, mask = Tagger(), torch.ones(6, 5).long()
    mask[:, 3:] = 0
    batch = {"input_ids": torch.randint(9, (6, 5)), "attention_mask": mask}
    for kind in ("labels", "values"):
        cache = build(model, [batch], tmp_path / kind, output=kind)
        assert cache.features.outputs == {"": Output(kind, 2, 1)}  # type: ignore[arg-type]
        assert cache.read([0]).features["logits" if kind == "labels" else "values"].shape == (3, 1)


class Pooled(nn.Module):
    """As many labels as its inputs have tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(input_ids).mean(1))
        return out


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_as_many_labels_as_tokens_are_not_masked(kind: str, tmp_path: Path) -> None:
    model, mask = Pooled(), torch.ones(6, 5).long()
    mask[:, 3:] = 0
    batch = {"input_ids": torch.randint(9, (6, 5)), "attention_mask": mask}
    with pytest.raises(ValueError, match=r"numbers \(6, 5\): one of each of the mask's positions, or 5 of each anchor"):
        build(model, [batch], tmp_path, output=kind)
    caches = [build(model, [batch], tmp_path / "a", Reading(lambda m, b: m(**b).unsqueeze(1)), output=kind)]
    if kind == "values":
        caches.append(build(model, [batch], tmp_path / "b", output=kind, class_dim=1))
    for cache in caches:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.head.bias[4] += 1.0  # where the mask has none
        assert cache.retention(moved, batch_size=6, strict=False).drift() > 0.01


def test_as_many_labels_as_tokens_of_transformers_are_told_by_the_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=9, **sizes, num_labels=5, problem_type="multi_label_classification", pad_token_id=0
    )
    batch = {"input_ids": torch.randint(1, 9, (6, 5)), "attention_mask": torch.ones(6, 5).long()}
    model = transformers.BertForSequenceClassification(config)
    assert build(model, [batch], tmp_path).features.outputs == {"": Output("labels", 1, 5)}


@pytest.mark.parametrize("kind", ["T5", "Bart", "Bert", "Llama"])
def test_labels_select_the_positions_that_predict_them(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ids, labels = torch.randint(3, 40, (4, 6)), torch.randint(3, 40, (4, 6))
    labels[:, 4:] = -100
    labels[0, 0] = -100
    if kind == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=40, **sizes, decoder_start_token_id=0)
        )
    elif kind == "Bart":
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=40, **sizes, decoder_attention_heads=2, max_position_embeddings=32)
        )
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        made = transformers.BertForMaskedLM if kind == "Bert" else transformers.LlamaForCausalLM
        config = transformers.BertConfig if kind == "Bert" else transformers.LlamaConfig
        model = made(config(vocab_size=40, **sizes))
    batch = {"input_ids": ids, "labels": labels}
    cache = build(model, [batch], tmp_path, mask="labels", dtype=torch.float32)
    counts = labels != -100
    if kind == "Llama":
        counts = torch.cat([counts[:, 1:], torch.zeros(4, 1).bool()], 1)
    features = cache.read(range(4)).features
    assert torch.equal(features["mask"], counts)
    # Its own loss is over the same positions
    picked = torch.cat([y[1:] if kind == "Llama" else y for y in labels])
    nll = -features["logprobs"].gather(1, picked[picked != -100][:, None]).mean()
    assert float(nll) == pytest.approx(float(model.eval()(**batch).loss), rel=1e-4)


def test_labels_of_a_model_that_does_not_say_are_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    batch = {"ids": torch.randint(9, (4, 6)), "labels": torch.randint(9, (4, 6))}
    with pytest.raises(ValueError, match=r"mask=lambda batch"):
        build(model, [batch], tmp_path, Reading(lambda m, b: m(b["ids"]), mask="labels"))


def test_held_out_anchors_of_another_kind_are_refused_before_the_run(tmp_path: Path) -> None:
    model, inputs = mlp(4), torch.randn(20, 6)
    retention = build(model, [inputs], tmp_path / "a", output="labels").retention(model, batch_size=4)
    other = build(model, [inputs], tmp_path / "b", output="values")
    for closure in (retention, CombinedRetention({"only": retention})):
        with pytest.raises(ValueError, match="output of labels"):
            HeldOutDrift(closure, other)


def test_what_an_output_is_may_be_said_beside_the_examples() -> None:
    model, inputs = mlp(4), torch.randn(20, 6)
    teacher = copy.deepcopy(model).requires_grad_(False)
    said = OnlineRetention(model, inputs, 4, teacher=teacher, output="labels", seed=3)
    read = OnlineRetention(model, inputs, 4, teacher=teacher, reading=Reading(output="labels"), seed=3)
    assert said.reading == read.reading
    assert said.unit == BernoulliRetention.unit
    disturb(model)
    assert said.drift() == read.drift() > 0.0
    with pytest.raises(TypeError, match="`OnlineRetention` and `Reading` have no `outputs`"):
        OnlineRetention(model, inputs, 4, teacher=teacher, outputs="labels")


def test_held_out_anchors_are_measured_in_the_units_of_the_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, other = mlp(3), torch.randn(64, 6), 3.0 * torch.randn(32, 6)
    how: dict[str, Any] = {"output": "values", "layers": ["0"], "dtype": torch.float32}
    cache = build(model, [x], tmp_path / "anchors", **how)
    held = build(model, [other], tmp_path / "held", units_of=cache, **how)
    own = build(model, [other], tmp_path / "own", **how)
    disturb(model, 0.1)
    for kind, in_units, by_itself in zip(cache.kinds, drifts(model, held), drifts(model, own), strict=True):
        training = cache.retention(model, kind, batch_size=16, strict=False).drift(own)
        assert in_units.value == pytest.approx(training, rel=1e-5)
        assert by_itself.value < 0.5 * training, "its own variance is larger"
