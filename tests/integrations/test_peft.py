"""Adapters of PEFT: switched off they are the teacher, and nothing else about the model changes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from runs import small_llama
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import (
    AnchorCacheError,
    AnchorMismatchError,
    LogitRetention,
    OnlineRetention,
    Reading,
    build,
    fingerprint,
)
from craft_optim.anchors.fingerprint import compare_fingerprints

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, init_lora_weights="gaussian"),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 4]),
    "head": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.fixture
def anchors() -> list[dict[str, Tensor]]:
    """Eight rows of eight tokens, some of them padded."""
    ids = torch.randint(1, 40, (8, 8), generator=torch.Generator().manual_seed(1))
    rows = []
    for i, row in enumerate(ids):
        mask = (torch.arange(8) < 8 - i % 3).long()
        rows.append({"input_ids": row * mask, "attention_mask": mask, "labels": row})
    return rows


def adapted(kind: str = "lora", **kwargs: Any) -> Any:
    config = ADAPTERS[kind]()
    for name, value in kwargs.items():
        setattr(config, name, value)
    return peft.get_peft_model(small_llama(), config)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * scale)


def kl_to(teacher: nn.Module, model: nn.Module, rows: list[dict[str, Tensor]]) -> float:
    """Computed another way: two models, float64, one row after the other."""
    total, count = 0.0, 0
    teacher, model = copy.deepcopy(teacher).eval(), copy.deepcopy(model).eval()
    for row in rows:
        inputs = {name: row[name][None] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (teacher, model))
        kl = (p.exp() * (p - q)).sum(-1)[inputs["attention_mask"].bool()]
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count


def everything(model: nn.Module) -> dict[str, Any]:
    layers = [m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property)]
    return {
        "training": [m.training for m in model.modules()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "off": [layer.disable_adapters for layer in layers],
        "active": [list(layer.active_adapters) for layer in layers],
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, on norms other than LayerNorm
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_teacher_is_the_model_without_its_adapter(kind: str, anchors: list[dict[str, Tensor]]) -> None:
    model = adapted(kind).train()
    retention = OnlineRetention(model, anchors, 4)
    if kind == "head" and peft.__version__.startswith(("0.17.", "0.18.")):
        with pytest.raises(ValueError, match=r"uses 1 trainable parameters, such as .*original_module\.weight"):
            retention()
        return
    before = everything(model)
    first = retention()
    assert everything(model) == before
    assert first.item() == 0.0 if kind != "dora" else first.item() < 1e-7
    disturb(model)
    assert retention.drift() == pytest.approx(kl_to(small_llama(), model, anchors), rel=1e-4)
    before = everything(model)
    loss = retention()
    assert loss.item() > 1e-4
    loss.backward()
    assert everything(model) == before
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == set(trainable(model)), "all of what is trained, and nothing else, is reached"


def test_frozen_parts_of_an_adapter_stay_frozen(anchors: list[dict[str, Tensor]]) -> None:
    """PEFT's own switch makes everything in an active adapter trainable."""
    model = adapted()
    frozen = [name for name in trainable(model) if "lora_A" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = everything(model)
    during: list[set[str]] = []
    model.register_forward_pre_hook(lambda *_: during.append(set(trainable(model))))
    retention = OnlineRetention(model, anchors, 4)
    retention().backward()
    retention.drift()
    assert everything(model) == before
    assert all("lora_B" in name for name in trainable(model))
    # nor does the teacher's pass show any of it: FSDP2 takes the flags over at its first forward
    # A pass and a drift of two batches, of both; two find out about the head
    assert during == [set(trainable(model))] * 8


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_adapters_are_on_again_after_an_exception(where: str, anchors: list[dict[str, Tensor]]) -> None:
    model = adapted()
    before = everything(model)
    layer = next(m for m in model.modules() if hasattr(m, "disable_adapters") and hasattr(m, "lora_A"))

    def forward(model: nn.Module, batch: Any) -> Any:
        output = model(**batch)
        if layer.disable_adapters == (where == "teacher"):
            raise RuntimeError("out of memory")
        return output

    retention = OnlineRetention(model, anchors, 4, reading=Reading(forward))
    for run in (retention, retention.drift):
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        assert everything(model) == before
    assert retention.position == 0


@pytest.mark.parametrize("wrapped", ["add_adapter", "inject", "base", "module"])
def test_other_ways_to_put_adapters_in(wrapped: str, anchors: list[dict[str, Tensor]]) -> None:
    inner = small_llama()
    if wrapped == "add_adapter":
        try:
            inner.add_adapter(ADAPTERS["lora"]())
        except ValueError as error:
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(f"transformers wants another peft than {peft.__version__}: {error}")
    elif wrapped == "inject":
        peft.inject_adapter_in_model(ADAPTERS["lora"](), inner)
        for name, p in inner.named_parameters():
            p.requires_grad_("lora_" in name)
    else:
        outer = peft.get_peft_model(inner, ADAPTERS["lora"]())
        inner = nn.DataParallel(outer) if wrapped == "module" else inner
    retention = OnlineRetention(inner, anchors, 4)
    before = everything(inner)
    assert retention().item() == 0.0
    assert everything(inner) == before
    disturb(inner)
    student = inner.module if wrapped == "module" else inner
    assert retention.drift() == pytest.approx(kl_to(small_llama(), student, anchors), rel=1e-4)
    before = everything(inner)
    loss = retention()
    loss.backward()
    assert everything(inner) == before
    assert {n for n, p in inner.named_parameters() if p.grad is not None} == set(trainable(inner))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, anchors: list[dict[str, Tensor]]) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted().train()
        torch.manual_seed(1)
        disturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on checkpoints without gradients: the teacher's
            OnlineRetention(model, anchors, 4, strict=False)().backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside: bool, anchors: list[dict[str, Tensor]]) -> None:
    model = adapted().train()
    reading = Reading(autocast=None if outside else torch.bfloat16)
    retention = OnlineRetention(model, anchors, 4, reading=reading)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert retention().item() == 0.0
    disturb(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        loss = retention()
        drift = retention.drift()
    loss.backward()
    assert drift == pytest.approx(kl_to(small_llama(), model, anchors), rel=0.1)
    assert all(p.grad is not None for p in trainable(model).values())


# Where the model without its adapter is not the model before fine-tuning


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("kind", ["bias", "norm", "base", "merged", "off", "prompt", "unloaded", "pissa", "trained"])
def test_a_teacher_that_would_be_another_model_is_refused(kind: str, anchors: list[dict[str, Tensor]]) -> None:
    error: type[Exception] = ValueError
    strict = True
    if kind == "prompt":
        model = peft.get_peft_model(small_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        words = r"learned prompt.*teacher=model\.disable_adapter"
    elif kind == "bias":
        config = transformers.LlamaConfig(**{**small_llama().config.to_dict(), "mlp_bias": True})
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=TARGETS, bias="all")
        )
        words = r"uses 6 trainable parameters, such as .*bias.*bias='none' for LoRA"
    elif kind == "unloaded":
        model = adapted().merge_and_unload()
        words = "no adapters that can be switched off.*Pass teacher="
    elif kind == "pissa":
        model = peft.get_peft_model(small_llama(), peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"))
        error, words = AnchorMismatchError, r"does not reproduce its teacher.*PiSSA.*Pass teacher="
    else:
        model = adapted()
        if kind == "norm":
            model.base_model.model.model.norm.weight.requires_grad_(True)
            words = r"1 trainable parameters, such as .*norm\.weight: .*modules_to_save"
        elif kind == "base":
            for p in model.parameters():
                p.requires_grad_(True)
            words = r"uses \d+ trainable parameters"
        elif kind == "merged":
            disturb(model)
            model.merge_adapter()
            words, strict = r"unmerge_adapter\(\)", False
        elif kind == "off":
            model.base_model.disable_adapter_layers()
            words = "switched off already"
        else:
            disturb(model)
            error, words = AnchorMismatchError, "adapters that are not new"
    before = everything(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=words):
        OnlineRetention(model, anchors, 4, strict=strict)()
    assert everything(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_learned_prompt_with_a_teacher_and_a_forward(anchors: list[dict[str, Tensor]]) -> None:
    model = peft.get_peft_model(small_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))

    def forward(model: Any, batch: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, -batch["input_ids"].shape[1] :]

    with pytest.raises(AnchorMismatchError, match=r"\(4, 11, 40\), its teacher \(4, 8, 40\).*learned prompt"):
        OnlineRetention(model, anchors, 4, teacher=model.disable_adapter, strict=False)()
    settings: dict[str, Any] = {"teacher": model.disable_adapter, "reading": Reading(forward), "strict": False}
    retention = OnlineRetention(model, anchors, 4, **settings)
    loss = retention()
    assert loss.item() > 0
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trainable(model))


# In training


def train(name: str, anchors: list[dict[str, Tensor]], epsilon: float, steps: int = 60) -> tuple[Any, float, float]:
    """Another language: after token i comes i + 1. Returns the model, its drift and its task loss."""
    torch.manual_seed(0)
    model = adapted(lora_dropout=0.0).train()
    retention = OnlineRetention(model, anchors, 8)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3)
    if name == "craft":
        optimizer = CraftOptimizer(optimizer, retention, epsilon=epsilon)
    ids = (torch.arange(8) + torch.arange(1, 30, 3)[:, None]) % 39 + 1
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, retention.drift(), loss.item()


def test_craft_holds_epsilon_where_adamw_does_not(anchors: list[dict[str, Tensor]]) -> None:
    epsilon = 0.05
    _, plain_drift, plain_loss = train("adamw", anchors, epsilon)
    _, drift, loss = train("craft", anchors, epsilon)
    _, _, at_first = train("adamw", anchors, epsilon, steps=1)
    assert plain_drift > 5 * epsilon
    assert drift < 1.5 * epsilon
    assert loss < at_first - 0.5 * (at_first - plain_loss), "and it learns the task"


def test_adapters_are_saved_and_loaded(anchors: list[dict[str, Tensor]], tmp_path: Any) -> None:
    """What is saved is the adapter alone; the drift of the loaded model is what it was."""
    model, drift, _ = train("craft", anchors, 0.05, steps=10)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path, is_trainable=True)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    retention = OnlineRetention(loaded, anchors, 8)
    assert retention.drift() == drift > 0
    with pytest.raises(AnchorMismatchError, match="loads its optimizer's state, or passes strict=False"):
        retention()
    retention.loss(10)  # as with a checkpoint of the optimizer


# The same teacher


def batches(anchors: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    names = ("input_ids", "attention_mask")
    return [{name: torch.stack([row[name] for row in anchors]) for name in names}]


FRESH = {**ADAPTERS, "rank": lambda: peft.LoraConfig(r=8, target_modules="all-linear"), "bias": lambda: peft.LoraConfig(
    r=4, target_modules=TARGETS, lora_bias=True
), "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), "ada": lambda: (
    peft.AdaLoraConfig(target_modules=TARGETS, total_step=10)
), "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS)}  # fmt: skip
WITHOUT = {"lora", "rslora", "loha", "rank", "bias", "embedding", "ada", "lokr"}  # add nothing at first


def fresh(kind: str, seed: int) -> Any:
    with torch.random.fork_rng([]):
        base = small_llama()
        torch.manual_seed(seed)
        return peft.get_peft_model(base, FRESH[kind]())


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", FRESH)
def test_new_adapters_on_the_same_base_are_the_same_teacher(
    kind: str, anchors: list[dict[str, Tensor]], tmp_path: Any
) -> None:
    first, second = fresh(kind, 1), fresh(kind, 2)
    cache = build(first, batches(anchors), tmp_path, progress=False)
    seconds = trainable(second)
    moved = [name for name, p in trainable(first).items() if not torch.equal(p, seconds[name])]
    # those of the others are copies, ones, or drawn from a seed of their own
    assert moved or kind in ("tokens", "head", "ia3", "norms", "vera")
    assert build(second, batches(anchors), tmp_path, progress=False).path == cache.path
    bare = small_llama()
    assert (fingerprint(bare) == fingerprint(first)) == (kind in WITHOUT)
    if kind in WITHOUT:  # and a cache of either serves the other
        build(bare, batches(anchors), tmp_path, progress=False)
        assert abs(LogitRetention(second, cache, 4)().item()) < 1e-5
    disturb(second)
    with pytest.raises(AnchorCacheError, match="other weights"):
        build(second, batches(anchors), tmp_path, progress=False)
    assert compare_fingerprints(str(cache.fingerprint), fingerprint(second)) is not None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_has_trained_one_step_is_another_teacher(kind: str, anchors: list[dict[str, Tensor]]) -> None:
    model = fresh(kind, 1)
    before = fingerprint(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(**batches(anchors)[0], labels=batches(anchors)[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert fingerprint(model) != before
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(small_llama())


def test_which_adapter_is_in_use_tells(anchors: list[dict[str, Tensor]]) -> None:
    model = fresh("lora", 1)
    bare = fingerprint(model)
    disturb(model)
    trained = fingerprint(model)
    model.add_adapter("other", FRESH["rank"]())
    assert fingerprint(model) == trained != bare
    model.set_adapter("other")
    assert fingerprint(model) == bare
    model.set_adapter("default")
    model.merge_adapter()
    assert fingerprint(model) not in (bare, trained), "the weights are others"
    injected = peft.inject_adapter_in_model(FRESH["lora"](), small_llama())
    assert fingerprint(injected) == bare
    wrapped = torch.nn.Module()
    wrapped.module = fresh("lora", 3)
    assert fingerprint(wrapped) == bare
