"""Retention closures: what they return, what they refuse, and that nothing around them notices."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim._warn import CraftWarning
from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    AnchorRetention,
    HiddenRetention,
    LogitRetention,
    Reading,
    build,
)
from craft_optim.anchors.importers import write_cache
from craft_optim.anchors.manifest import FeatureSpec

Batches = Callable[..., list[dict[str, Any]]]


def reads(change: Callable[[Tensor], Any] = lambda x: x, after: Callable[[Tensor], Any] = lambda out: out) -> Reading:
    """Readings that have one name, as a function has that was changed since the cache was built."""

    def forward(model: nn.Module, x: Tensor) -> Any:
        return after(model(change(x)))

    return Reading(forward)


def disturb(model: nn.Module, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


@pytest.fixture
def cache(classifier: nn.Module, points: Tensor, tmp_path: Path) -> AnchorCache:
    settings: dict[str, Any] = {"shard_size": 16, "layers": ("1",), "dtype": torch.float32}
    return build(classifier, points.split(7), tmp_path / "cache", reads(), **settings, class_dim=-1)


def make(kind: str, model: nn.Module, cache: AnchorCache, batch_size: int = 16, **kwargs: Any) -> AnchorRetention:
    if kind == "kl":
        return LogitRetention(model, cache, batch_size, **kwargs)
    return HiddenRetention(model, cache, batch_size, loss=kind, **kwargs)


KINDS = ["kl", "mse", "l1", "cosine"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unmodified_model_has_no_drift(kind: str, classifier: nn.Module, cache: AnchorCache) -> None:
    retention = make(kind, classifier, cache)
    loss = retention()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert abs(loss.item()) < 1e-6
    assert abs(retention.drift()) < 1e-6
    loss.backward()
    assert retention.parameters() == list(classifier.parameters())


def by_hand(kind: str, model: nn.Module, teacher: nn.Module, x: Tensor, variance: float) -> float:
    with torch.no_grad():
        if kind == "kl":
            p, q = (m(x).double().log_softmax(-1) for m in (teacher, model))
            return float((p.exp() * (p - q)).sum() / len(x))
        h, h0 = (torch.tanh(m[0](x)).double() for m in (model, teacher))
        if kind == "cosine":
            return float(sum(1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(h, h0, strict=True)) / len(x))
        if kind == "mse":
            return float((h - h0).square().sum() / len(x) / (variance * 16))
        return float((h - h0).abs().sum() / (len(x) * 16) / variance**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_what_it_says(kind: str, classifier: nn.Module, cache: AnchorCache, points: Tensor) -> None:
    teacher = copy.deepcopy(classifier)
    with torch.no_grad():
        variance = float(torch.tanh(teacher[0](points)).double().var(0, unbiased=False).mean())
    retention = make(kind, classifier, cache, strict=False)
    disturb(classifier)
    assert retention.drift() == pytest.approx(by_hand(kind, classifier, teacher, points, variance), rel=1e-4)
    assert retention.drift(batch_size=7) == pytest.approx(retention.drift(batch_size=50), rel=1e-5)
    rows = retention._sampler.indices(0)
    loss = retention()
    assert loss.item() == pytest.approx(by_hand(kind, classifier, teacher, points[rows], variance), rel=1e-4)
    loss.backward()
    # one plain gradient step reduces it
    before = retention.drift()
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
    assert retention.drift() < before


def test_positions_determine_the_anchors(classifier: nn.Module, cache: AnchorCache) -> None:
    disturb(classifier)
    retention = LogitRetention(classifier, cache, 16, strict=False)
    losses = [retention().item() for _ in range(5)]
    assert retention.position == 5
    assert len(set(losses)) == 5
    again = LogitRetention(classifier, cache, 16)
    again.position = 3
    assert [again().item() for _ in range(2)] == losses[3:]
    retention.position = 0
    assert retention().item() == losses[0]
    retention.drift()
    assert retention.position == 1
    assert LogitRetention(classifier, cache, 16, strict=False, seed=1)().item() != losses[0]
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match="position"):
            retention.position = bad


def test_ranks_draw_different_anchors(classifier: nn.Module, cache: AnchorCache) -> None:
    disturb(classifier)
    whole = LogitRetention(classifier, cache, 16, strict=False)().item()
    parts = []
    for rank in (0, 1):
        retention = LogitRetention(classifier, cache, 8, strict=False)
        assert not retention.shared
        retention.shard(rank, 2)
        assert retention.shared
        parts.append(retention().item())
    assert parts[0] != parts[1]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_held_out_anchors_have_their_own_drift(
    kind: str, classifier: nn.Module, cache: AnchorCache, points: Tensor, tmp_path: Path
) -> None:
    other = build(
        classifier, [torch.randn(9, 6)], tmp_path / "held-out", layers=("1",), dtype=torch.float32, class_dim=-1
    )
    disturb(classifier)
    retention = make(kind, classifier, cache, strict=False)
    held_out = retention.drift(other)
    assert held_out > 0
    assert held_out != pytest.approx(retention.drift())
    batches = [other.read(range(4)), other.read(range(4, 9))]
    assert retention.drift(batches) == pytest.approx(held_out, rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        retention.drift([])
    plain = build(classifier, [points], tmp_path / "logits", class_dim=-1)
    if kind == "mse":
        with pytest.raises(ValueError, match="hidden states"):
            retention.drift(plain)


def test_a_look_without_gradients_keeps_no_graph(noisy: Any, points: Tensor, tmp_path: Path) -> None:
    """Its activations would be held until the loss is read."""
    cache = build(noisy, [points], tmp_path, dtype=torch.float32, progress=False, class_dim=-1)
    retention = make("kl", noisy, cache)
    with torch.no_grad():
        noisy.head.weight.mul_(1.5)
        looked = retention.loss(3)
    assert not looked.requires_grad
    assert looked > 1e-3
    torch.testing.assert_close(looked, retention.loss(3).detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_nothing_around_a_pass_notices(
    kind: str, training: bool, fails: bool, noisy: Any, points: Tensor, tmp_path: Path
) -> None:
    noisy.train(training)
    noisy.head.bias.requires_grad_(False)
    failing = False

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        torch.rand(3)
        if failing and kind == "mse":
            raise RuntimeError("out of memory")
        out: Tensor = model(x)
        if failing:
            raise RuntimeError("out of memory")
        return out

    cache = build(noisy, [points], tmp_path, Reading(forward), layers=("attention",), dtype=torch.float32, class_dim=-1)
    failing = fails
    layers = {} if kind == "kl" else {"layers": ("attention",)}
    retention = make(kind, noisy, cache, **layers)

    def state() -> list[Any]:
        return [
            [m.training for m in noisy.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in noisy.modules()],
            [p.requires_grad for p in noisy.parameters()],
            {k: v.clone() for k, v in noisy.state_dict().items()},
            torch.get_rng_state(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            retention.position if fails else None,
        ]

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return all(torch.equal(a[k], b[k]) for k in a)
        return bool(a == b)

    for run in (retention, retention.drift):
        before = state()
        with torch.no_grad():
            if fails:
                with pytest.raises(RuntimeError, match="out of memory"):
                    run()
            else:
                result = run()
                if isinstance(result, Tensor):
                    with torch.enable_grad():
                        result.backward()
        after = state()
        assert [same(a, b) for a, b in zip(before, after, strict=True)] == [True] * len(before)
    if not fails:
        assert any(p.grad is not None for p in noisy.parameters())


def test_a_look_after_a_step_builds_no_graph(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    """It would keep the activations of a training pass. In a loop of one's own the loss is for a backward."""
    retention = LogitRetention(classifier, build(classifier, [points], tmp_path, class_dim=-1), 16)
    with torch.no_grad():
        assert not retention.loss(1).requires_grad
        assert retention().requires_grad


def test_dropout_in_the_pass_is_off_but_training_goes_on(noisy: Any, points: Tensor, tmp_path: Path) -> None:
    """Without that, dropout puts a floor under the drift, and the task draws other masks than without retention."""
    noisy.body[1].eval()  # its statistics would drift with the task's batches
    cache = build(noisy, [points], tmp_path, class_dim=-1)
    retention = LogitRetention(noisy, cache, 16)
    torch.manual_seed(3)
    plain = [noisy(points).sum().item() for _ in range(2)]
    torch.manual_seed(3)
    first = noisy(points).sum().item()
    assert abs(retention().item()) < 1e-5
    assert [first, noisy(points).sum().item()] == plain
    assert plain[0] != plain[1]


def test_passes_that_draw_random_numbers_are_reproducible(classifier: nn.Module, cache: AnchorCache) -> None:
    reading = reads(lambda x: x + torch.randn_like(x))
    retention = LogitRetention(classifier, cache, 16, reading=reading, strict=False)
    first = [retention().item(), retention().item()]
    retention.position = 0
    torch.manual_seed(99)
    assert [retention().item(), retention().item()] == first


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", ["all", 8])
def test_rounding_stays_far_below_the_tolerance(
    llama: nn.Module, token_batches: Batches, tmp_path: Path, compute: str, dtype: torch.dtype, top_k: Any
) -> None:
    if compute == "bfloat16":
        llama.bfloat16()
    reading = Reading(autocast=torch.bfloat16 if compute == "autocast" else None)
    cache = build(llama, token_batches((9, 12)), tmp_path, reading, top_k=top_k, layers=(1, -1), dtype=dtype)
    for kind in KINDS:
        retention = make(kind, llama, cache, 4)
        drift = retention().item()
        assert drift <= retention.tolerance / 10
        assert drift > -1e-6


def test_a_mask_says_which_positions_count(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches = token_batches((4, 6), (3, 9))
    cache = build(llama, batches, tmp_path, dtype=torch.float32)
    teacher = copy.deepcopy(llama).eval()
    disturb(llama, 0.02)
    total, count = 0.0, 0
    student = copy.deepcopy(llama).eval()
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.double().log_softmax(-1) for m in (teacher, student))
            kl = (p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()]
            total, count = total + float(kl.sum()), count + len(kl)
    retention = LogitRetention(llama, cache, 3, strict=False)
    assert retention.drift() == pytest.approx(total / count, rel=1e-3)

    def first(inputs: Any) -> Tensor:
        mask = torch.zeros_like(inputs["input_ids"])
        mask[:, 0] = 1
        return mask

    elsewhere = LogitRetention(llama, cache, 3, strict=False, mask=first).drift()
    with torch.no_grad():
        pairs = [[m(**b).logits[:, 0].double().log_softmax(-1) for m in (teacher, student)] for b in batches]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
    assert elsewhere == pytest.approx(float(kl.mean()), rel=1e-3)
    named = LogitRetention(llama, cache, 3, strict=False, mask="attention_mask")
    assert named.drift() == pytest.approx(total / count, rel=1e-3)
    with pytest.raises(ValueError, match="'labels'"):
        LogitRetention(llama, cache, 3, strict=False, mask="labels").drift()


@pytest.mark.parametrize("mode", ["masked_mean", "first", "last", "none"])
def test_hidden_states_of_a_vision_language_model(
    mode: str, vlm: nn.Module, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    pooling = {"image": mode, "text": mode}
    settings: dict[str, Any] = {"output": None, "layers": (1, -1), "dtype": torch.float32}
    cache = build(vlm, image_text_batches, tmp_path, Reading(pooling=pooling), **settings)
    retention = HiddenRetention(vlm, cache, 5, weights={1: 2.0, (3, "text"): 0.0})
    assert retention().item() < 1e-6
    teacher = copy.deepcopy(vlm).eval()
    disturb(vlm, 0.01)
    student = copy.deepcopy(vlm).eval()
    expected, weights = 0.0, {(1, "image"): 2.0, (1, "text"): 2.0, (3, "image"): 1.0}
    for (layer, span), weight in weights.items():
        pairs = []
        for batch in image_text_batches:
            image, attended = batch["input_ids"] == 59, batch["attention_mask"].bool()
            mask = image if span == "image" else attended & ~image
            states = [tap(m, batch, layer).double() for m in (student, teacher)]
            for s, t, valid in zip(*states, mask, strict=True):
                s, t = s[valid], t[valid]
                choose = {
                    "masked_mean": lambda x: x.mean(0, keepdim=True),
                    "first": lambda x: x[:1],
                    "last": lambda x: x[-1:],
                }
                pairs.append([choose.get(mode, lambda x: x)(x) for x in (s, t)])
        s, t = (torch.cat(x) for x in zip(*pairs, strict=True))
        expected += weight * float((s - t).square().mean() / t.var(0, unbiased=False).mean())
    assert retention.drift() == pytest.approx(expected / sum(weights.values()), rel=1e-3)


def tap(model: nn.Module, batch: dict[str, Tensor], layer: int) -> Tensor:
    """Residual entering a layer, the test's own way."""
    decoder, kept = model.model.language_model, []
    target = decoder.norm if layer == len(decoder.layers) else decoder.layers[layer]
    handle = target.register_forward_pre_hook(lambda m, a: kept.append(a[0].detach()))
    model(**batch)
    handle.remove()
    return kept[0]


def test_hidden_retention_runs_no_further_than_it_must(
    llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    cache = build(llama, token_batches((6, 8)), tmp_path, layers=(1, 2), dtype=torch.float32)
    reached = []
    for i, layer in enumerate(llama.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    llama.lm_head.register_forward_pre_hook(lambda *_: reached.append("head"))
    HiddenRetention(llama, cache, 4, layers=(1,))().backward()
    assert reached == [0, 1]
    assert llama.model.layers[0].mlp.up_proj.weight.grad is not None
    assert llama.model.layers[1].mlp.up_proj.weight.grad is None
    assert llama.lm_head.weight.grad is None


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: str, llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    cache = build(llama, token_batches((6, 8)), tmp_path, layers=(1, -1), dtype=torch.float32)
    disturb(llama)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            llama.gradient_checkpointing_enable()
        llama.zero_grad()
        make(kind, llama, cache, 4, strict=False)().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in llama.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


# What the first call finds out


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_named(kind: str, classifier: nn.Module, cache: AnchorCache) -> None:
    disturb(classifier)
    retention = make(kind, classifier, cache)
    with pytest.raises(AnchorMismatchError, match="other weights"):
        retention()
    assert retention.position == 0
    make(kind, classifier, cache, strict=False)()


def test_a_fine_tuned_checkpoint_may_continue(classifier: nn.Module, cache: AnchorCache) -> None:
    disturb(classifier)
    retention = LogitRetention(classifier, cache)
    retention.position = 7
    retention()


def test_another_dtype_is_named(classifier: nn.Module, cache: AnchorCache) -> None:
    with torch.no_grad():
        classifier[2].weight.mul_(1000)
    with pytest.raises(AnchorMismatchError, match="dtype"):
        LogitRetention(classifier.double(), cache, reading=reads(Tensor.double))()


def test_active_dropout_is_named(classifier: nn.Module, cache: AnchorCache) -> None:
    with pytest.raises(AnchorMismatchError, match="random: dropout"):
        LogitRetention(classifier, cache, reading=reads(nn.functional.dropout))()


def test_other_autocast_is_named(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        classifier[2].weight.mul_(30)
    cache = build(classifier, [points], tmp_path / "a", Reading(autocast=torch.bfloat16), class_dim=-1)
    with pytest.raises(AnchorMismatchError, match=r"built with autocast='bfloat16'\. Found autocast='float16'"):
        LogitRetention(classifier, cache, reading=Reading(autocast=torch.float16))
    for reading in (None, Reading(), Reading(autocast=torch.bfloat16)):
        assert abs(LogitRetention(classifier, cache, reading=reading)().item()) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(LogitRetention(classifier, cache)().item()) < 1e-4
    plain = build(classifier, [points], tmp_path / "b", class_dim=-1)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(AnchorMismatchError, match="under autocast None, this pass runs under bfloat16"),
    ):
        LogitRetention(classifier, plain, tolerance=1e-6)()


def test_another_path_through_the_model_is_named(classifier: nn.Module, cache: AnchorCache) -> None:
    """An extra token, another processor: the same weights see other inputs."""
    with pytest.raises(AnchorMismatchError, match=r"weights are the same.*forward="):
        LogitRetention(classifier, cache, reading=reads(lambda x: x.flip(1)))()


def test_another_layer_of_the_same_number_is_named(
    llama: nn.Module, gpt2: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    cache = build(llama, token_batches((4, 6)), tmp_path, output=None, layers=(1,))
    with pytest.raises(AnchorMismatchError, match="other tensors"):
        HiddenRetention(gpt2, cache, 4)()
    narrow = type(llama)(type(llama.config)(**{**llama.config.to_dict(), "hidden_size": 16, "head_dim": 8}))
    with pytest.raises(AnchorMismatchError, match=r"\(4, 16\).*\(4, 32\)"):
        HiddenRetention(narrow, cache, 4)()


def test_outputs_of_another_shape_are_named(classifier: nn.Module, cache: AnchorCache) -> None:
    wide = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    for strict in (True, False):
        with pytest.raises(AnchorMismatchError, match=r"\(16, 5\).*4 classes"):
            LogitRetention(wide, cache, strict=strict)()
    with pytest.raises(AnchorMismatchError, match="NoneType"):
        LogitRetention(classifier, cache, reading=reads(after=lambda out: None))()


def test_the_tolerance_can_be_set(classifier: nn.Module, cache: AnchorCache) -> None:
    disturb(classifier)
    LogitRetention(classifier, cache, tolerance=10.0)()
    with pytest.raises(ValueError, match="tolerance"):
        LogitRetention(classifier, cache, tolerance=-1.0)


def test_a_drift_that_is_not_a_number_is_a_mismatch(classifier: nn.Module, cache: AnchorCache) -> None:
    with pytest.raises(AnchorMismatchError, match="nan"):
        LogitRetention(classifier, cache, reading=reads(after=lambda out: out * torch.nan))()


# Caches that do not serve


def test_the_wrong_kind_of_cache_is_refused(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    logits = build(classifier, [points], tmp_path / "logits", top_k=2)
    hidden = build(classifier, [points], tmp_path / "hidden", output=None, layers=("1",))
    with pytest.raises(ValueError, match=r"needs a cache with an output of classes.*hidden states of layers 1"):
        LogitRetention(classifier, hidden)
    with pytest.raises(ValueError, match=r"needs a cache with hidden states.*the top 2 of 4 classes"):
        HiddenRetention(classifier, logits)
    with pytest.raises(ValueError, match=r"layers \['2'\].*layers 1"):
        HiddenRetention(classifier, hidden, layers=("2",))


def test_features_that_do_not_vary_have_no_scale(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    cache = build(classifier, [points[:1]], tmp_path, output=None, layers=("1",))
    for loss in ("mse", "l1"):
        with pytest.raises(ValueError, match="do not vary over the 1 anchors"):
            HiddenRetention(classifier, cache, 1, loss=loss)
    assert abs(HiddenRetention(classifier, cache, 1, loss="cosine")().item()) < 1e-5


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"loss": "huber"}, "'huber'"),
        ({"layers": ()}, "at least one layer"),
        ({"weights": {"1": -1.0}}, "-1.0"),
        ({"weights": {"1": 0.0}}, "all be zero"),
        ({"weights": {"5": 1.0}}, r"\['5'\]"),
        ({"batch_size": 51}, "batch_size <= 50"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments_out_of_range_are_refused(
    classifier: nn.Module, cache: AnchorCache, kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        HiddenRetention(classifier, cache, **kwargs)


def test_parameters_of_others_get_gradients_that_can_be_put_back(
    llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    cache = build(llama, token_batches((4, 6)), tmp_path)
    disturb(llama)
    retention = LogitRetention(llama, cache, 4, strict=False)
    retention().backward()
    reached = {id(p) for p in llama.parameters() if p.grad is not None}
    assert reached <= {id(p) for p in retention.parameters()}
    assert len(reached) == len(list(llama.parameters()))


def test_a_model_may_move_after_the_closure_is_made(classifier: nn.Module, cache: AnchorCache) -> None:
    retention = LogitRetention(classifier, cache, strict=False)
    classifier.to("meta")
    assert retention.device == torch.device("meta")
    assert LogitRetention(classifier, cache, device="cpu").device == torch.device("cpu")


class Shy(nn.Linear):
    """A model that another thread must not look at: FSDP1's changes its parameters' dicts while it runs."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        assert threading.current_thread() is threading.main_thread()
        return super().named_parameters(*args, **kwargs)


def test_reading_ahead_does_not_look_at_the_model(points: Tensor, tmp_path: Path) -> None:
    model = Shy(6, 4)
    retention = LogitRetention(model, build(model, [points], tmp_path, class_dim=-1), 16, workers=2)
    for _ in range(4):
        retention()


def test_a_span_whose_positions_nobody_knows_is_refused(llama: nn.Module, token_batches: Any, tmp_path: Path) -> None:
    """As in caches of earlier implementations, which keep the pooled states and not the masks."""
    (batch,) = token_batches((4, 6))
    llama.eval()
    with torch.no_grad():
        hidden = llama(**batch, output_hidden_states=True).hidden_states[1]
    states = {"hidden.1.text": hidden[:, :3].mean(1)}
    cache = write_cache(
        tmp_path, [(batch, states)], FeatureSpec(layers=(1,), pooling={"text": "masked_mean"}, dtype="float32")
    )
    with pytest.raises(AnchorMismatchError, match=r"does not say which positions the span 'text' has: pass `spans=`"):
        HiddenRetention(llama, cache, 4)()

    def spans(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        return {"text": torch.arange(6).expand(4, 6) < 3}

    assert HiddenRetention(llama, cache, 4, spans=spans)().item() < 1e-6


def test_running_statistics_that_the_first_task_forward_has_moved_are_no_other_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    points = torch.randn(32, 4)
    model(points)
    cache = build(model, [points], tmp_path, class_dim=-1)
    retention = LogitRetention(model, cache, 16)
    model(3 * points + 2).sum().backward()  # in train mode, before the optimizer asks for the retention loss
    moved = [x.clone() for x in model.buffers()]
    assert retention.drift() > 1e-3
    loss = retention()
    assert loss.item() > 1e-3, "the drift is that of the model as it is now"
    loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), moved, strict=True))
    other = LogitRetention(model, cache, 16)
    model(points)
    disturb(model, 0.5)
    moved = [x.clone() for x in model.buffers()]
    with pytest.raises(AnchorMismatchError, match="other weights"):
        other()
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), moved, strict=True))


def test_running_statistics_that_move_from_pass_to_pass_are_named(tmp_path: Path) -> None:
    def run(*, freeze: bool) -> LogitRetention:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        model = nn.Sequential(OrderedDict(zip(("in", "norm", "relu", "out"), layers, strict=True)))
        points = torch.randn(32, 4)
        cache = build(model, [points], tmp_path / f"{freeze}", class_dim=-1)
        retention = LogitRetention(model, cache, 16)
        model.train()
        if freeze:
            model.get_submodule("norm").eval()
        optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), retention, retention_every=1)
        for _ in range(4):
            model(points + 1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return retention

    with pytest.warns(CraftWarning, match=r"statistics have moved .* of 'norm': .*eval mode") as found:
        drifted = run(freeze=False)
    assert len(found) == 1, "it says so once"
    assert drifted.drift() > 1e-3, "although the learning rate is 0"
    assert run(freeze=True).drift() == pytest.approx(0.0, abs=1e-6)
