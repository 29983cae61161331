"""The Hugging Face Trainer with CraftOptimizer: it trains, logs, stops and resumes as it does without."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, small_llama
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache, LogitRetention, OnlineRetention, build
from craft_optim.dual import DualAscent

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from craft_optim.metrics import METRICS  # noqa: E402
from craft_optim.retention import Retention  # noqa: E402
from craft_optim.transformers import CraftCallback, craft_optimizer  # noqa: E402

# The constraint is never active: what the base steps on is the task gradient, to the bit.
INACTIVE = {"epsilon": 1e6, "dual": DualAscent(0.0), "projection": "never"}


def model(dropout: float = 0.1) -> nn.Module:
    return small_llama(
        vocab_size=30, hidden_size=16, intermediate_size=24, attention_dropout=dropout, initializer_range=0.2
    )


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 30, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> AnchorCache:
    batches = [{k: torch.stack([r[k] for r in rows(24, 1)]) for k in ("input_ids", "attention_mask")}]
    return build(
        model(), batches, tmp_path_factory.mktemp("anchors"), dtype=torch.float32, progress=False, class_dim=-1
    )


def arguments(folder: Path, **kwargs: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | kwargs))


class Job(Retention):
    """A Trainer, its model, and a retention closure that counts its calls."""

    def __init__(
        self,
        folder: Path,
        cache: AnchorCache,
        how: str = "factory",
        craft: dict[str, Any] | None = None,
        strict: bool = True,
        callbacks: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.args = model(), arguments(folder, **kwargs)
        self.retention = LogitRetention(self.model, cache, 8, strict=strict)
        self.passes = 0
        craft = {"epsilon": 0.01} if craft is None else craft
        given: dict[str, Any] = {}
        if how == "factory":
            given["optimizer_cls_and_kwargs"] = craft_optimizer(self.args, self, **craft)
        elif how == "class":
            bound = CraftOptimizer.bind(torch.optim.AdamW, self, **craft)
            given["optimizer_cls_and_kwargs"] = (bound, {"lr": 1e-2})
        elif how == "object":
            base = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
            given["optimizers"] = (CraftOptimizer(base, self, **craft), None)
        if callbacks is None:
            callbacks = () if how == "plain" else (CraftCallback(metrics=METRICS),)
        self.trainer = Trainer(
            self.model,
            self.args,
            train_dataset=rows(40, 2),
            eval_dataset=rows(8, 4),
            callbacks=list(callbacks),
            **given,
        )

    def loss(self, number: int) -> Tensor:
        self.passes += torch.is_grad_enabled()  # a look without gradients at where a step has led is none
        return self.retention.loss(number)

    def parameters(self) -> list[nn.Parameter]:
        return self.retention.parameters()

    @property
    def drawn(self) -> float:
        """Batches of anchors."""
        return self.craft.param_groups[0]["craft_anchor_position"]

    def train(self, resume: Path | None = None) -> "Job":
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return self

    @property
    def craft(self) -> CraftOptimizer:
        found: CraftOptimizer = self.trainer.optimizer.optimizer
        return found

    @property
    def logs(self) -> list[dict[str, float]]:
        return [row for row in self.trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("how", ["factory", "class", "object"])
def test_it_trains_and_logs(how: str, cache: AnchorCache, tmp_path: Path) -> None:
    start = copy.deepcopy(model().state_dict())
    job = Job(tmp_path, cache, how).train()
    assert isinstance(job.craft, CraftOptimizer)
    assert job.passes == 8 == job.drawn
    assert [row["craft/retention_step"] for row in job.logs] == list(range(8))
    assert job.logs[0]["craft/retention_loss"] == pytest.approx(0.0, abs=1e-5)
    assert all(type(value) is float for row in job.logs for name, value in row.items() if name.startswith("craft/"))
    assert job.logs[-1]["craft/lambda"] == job.craft.metrics["lambda"] == job.craft.param_groups[0]["craft_lambda"] > 0
    assert job.logs[-1]["craft/retention_loss"] > 1e-4
    rates = [row["learning_rate"] for row in job.logs]
    assert rates == pytest.approx([1e-2 * (8 - i) / 8 for i in range(8)])
    assert all(not torch.equal(v, start[k]) for k, v in job.model.state_dict().items())
    assert job.logs[-1]["loss"] < job.logs[0]["loss"]


def test_the_factory_builds_what_the_trainer_would(cache: AnchorCache, tmp_path: Path) -> None:
    settings = {"weight_decay": 0.1, "adam_beta2": 0.95, "learning_rate": 3e-3, "adam_epsilon": 1e-6}
    optimizers = []
    for how in ("plain", "factory"):
        trainer = Job(tmp_path, cache, how, **settings).trainer
        optimizers.append(trainer.create_optimizer())
    plain, craft = optimizers
    assert isinstance(craft, CraftOptimizer)
    assert type(craft.base_optimizer) is type(plain)
    assert [len(group["params"]) for group in craft.param_groups] == [len(g["params"]) for g in plain.param_groups]
    for a, b in zip(craft.param_groups, plain.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params" and not k.startswith("craft_")} == {
            k: v for k, v in b.items() if k != "params"
        }
    assert {group["weight_decay"] for group in craft.param_groups} == {0.0, 0.1}
    assert craft.param_groups[0]["betas"][1] == 0.95


def test_bitsandbytes_keeps_its_embeddings_in_32_bits(cache: AnchorCache, tmp_path: Path) -> None:
    """The Trainer recognises its 8-bit optimizers by the name of their class."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    job = Job(tmp_path, cache, optim="adamw_bnb_8bit")
    optimizer = job.trainer.create_optimizer()
    assert type(optimizer.base_optimizer).__module__.startswith("bitsandbytes")
    triples = [(id(m), config) for m, name, config in manager.module_weight_config_triple if name == "weight"]
    assert (id(job.model.get_input_embeddings()), {"optim_bits": 32}) in triples


def test_an_optimizer_that_leaves_no_gradients_is_refused(
    cache: AnchorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    for found in ((torch.optim.AdamW, {"model": None}), (torch.optim.SGD, {"optimizer_dict": {}}), (object, {})):
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_, found=found: found))
        with pytest.raises(ValueError, match=r"steps after the backward.*adamw_torch"):
            craft_optimizer(args, None)


# Logs


class Seen(TrainerCallback):
    """Stands where an integration of `report_to` does: before all of `callbacks=`."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("when", ["init", "later"])
def test_what_reports_to_others_gets_the_metrics_too(when: str, cache: AnchorCache, tmp_path: Path) -> None:
    seen, craft = Seen(), CraftCallback()
    job = Job(tmp_path, cache, callbacks=(seen, craft) if when == "init" else (), max_steps=4, logging_steps=2)
    if when == "later":
        job.trainer.add_callback(seen)
        job.trainer.add_callback(craft)
    order = [type(callback) for callback in job.trainer.callback_handler.callbacks]
    job.train()
    after = [type(callback) for callback in job.trainer.callback_handler.callbacks]
    assert sorted(map(str, order)) == sorted(map(str, after)), "none lost, none twice"
    rows = [row for row in seen.logs if "loss" in row]
    assert len(rows) == 2
    for row, history in zip(rows, job.logs, strict=True):
        assert row == {k: v for k, v in history.items() if k != "step"}
        assert row["craft/lambda"] > 0
    others = [row for row in seen.logs if not {"loss", "train_runtime"} & row.keys()]
    assert not any("craft/lambda" in row for row in others)


def test_evaluations_measure_the_drift_on_other_anchors(cache: AnchorCache, tmp_path: Path) -> None:
    job = Job(
        tmp_path, cache, callbacks=(CraftCallback(drift=lambda: online.drift()),), max_steps=6, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_craft/drift_heldout", greater_is_better=False,
    )  # fmt: skip
    online = OnlineRetention(job.model, rows(12, 5), 4, teacher=model())
    before = job.trainer.evaluate()
    assert before["eval_craft/drift_heldout"] == 0.0
    job.train()
    measured = [row["eval_craft/drift_heldout"] for row in job.trainer.state.log_history if "eval_loss" in row]
    assert len(measured) == 3
    assert all(drift > 1e-4 for drift in measured)
    assert job.trainer.state.best_metric == min(measured)
    assert online.drift() == min(measured), "the best model is loaded"


def test_another_optimizer_is_named(cache: AnchorCache, tmp_path: Path) -> None:
    job = Job(tmp_path, cache, "plain", callbacks=(CraftCallback(),))
    with pytest.raises(TypeError, match=r"Found AdamW: pass `optimizer_cls_and_kwargs="):
        job.train()
    assert job.trainer.state.global_step == 0, "before the first step"


@pytest.mark.parametrize(("epsilon", "words"), [(1e-7, "not held"), (10.0, "held, with room")])
def test_the_end_of_training_has_the_verdict(
    epsilon: float, words: str, cache: AnchorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, cache, craft={"epsilon": epsilon, "trust_region": None}, callbacks=(CraftCallback(),)).train()
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "Drift ended" in line]
    assert said.startswith("training: ")
    assert words in said
    *_, end = job.trainer.state.log_history
    assert end["craft/drift"] == job.craft.metrics["drift"]
    assert end["craft/epsilon"] == epsilon


def test_a_line_of_the_log_has_a_few_metrics_unless_more_are_asked_for(cache: AnchorCache, tmp_path: Path) -> None:
    few = {"craft/retention_loss", "craft/drift", "craft/epsilon", "craft/lambda", "craft/capped"}
    of_heldout = {"heldout", "epsilon_heldout"}
    for callback, wanted in (
        (CraftCallback(), few),
        (CraftCallback(metrics=["grad_cos"]), {"craft/grad_cos"}),
        (CraftCallback(metrics=METRICS), {f"craft/{name}" for name in METRICS.keys() - of_heldout}),
    ):
        job = Job(tmp_path, cache, callbacks=(callback,), max_steps=2).train()
        assert {name for name in job.logs[0] if name.startswith("craft/")} == wanted
    job = Job(tmp_path, cache, callbacks=(CraftCallback(),), max_steps=1)
    job.trainer.optimizer_cls_and_kwargs = craft_optimizer(job.args, {"a": job, "b": lambda: job.retention.loss(0)})
    job.train()
    assert {f"{name}/{each}" for name in few for each in "ab"} < set(job.logs[0])
    assert "craft/grad_cos/a" not in job.logs[0]
    with pytest.raises(ValueError, match=r"`metrics` must be of retention_loss, .* Found 'lam'"):
        CraftCallback(metrics=["lam"])


def test_epsilon_may_be_the_drift_on_held_out_anchors(cache: AnchorCache, tmp_path: Path) -> None:
    model_inputs = [{k: torch.stack([r[k] for r in rows(8, 9)]) for k in ("input_ids", "attention_mask")}]
    heldout = build(model(), model_inputs, tmp_path / "h", dtype=torch.float32, progress=False, class_dim=-1)
    trained = model()
    args = arguments(tmp_path / "out")
    retention = LogitRetention(trained, cache, 8)
    craft = craft_optimizer(args, retention, epsilon=0.01, heldout=heldout)
    trainer = Trainer(
        trained, args, train_dataset=rows(40, 2), optimizer_cls_and_kwargs=craft, callbacks=[CraftCallback()]
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert "craft/heldout" not in logs[0], "nothing has drifted yet"
    assert logs[0]["craft/epsilon"] == logs[0]["craft/epsilon_heldout"] == 0.01
    assert logs[-1]["craft/heldout"] > 0.0
    assert logs[-1]["craft/epsilon"] != 0.01 == logs[-1]["craft/epsilon_heldout"]


def test_the_optimizer_is_told_how_long_training_is(cache: AnchorCache, tmp_path: Path) -> None:
    job = Job(tmp_path, cache).train()
    assert job.craft.rules.total_steps == 8
    job.trainer.args.max_steps = 3
    job.trainer.train()
    assert job.craft.rules.total_steps == 11, "counted from its own first step"
    given = Job(tmp_path, cache, craft={"total_steps": 5}, max_steps=2).train()
    assert given.craft.rules.total_steps == 5


@pytest.mark.filterwarnings("ignore:.*is not finite")
def test_a_pass_that_was_skipped_is_in_the_log(cache: AnchorCache, tmp_path: Path) -> None:
    class Fails(Job):
        def loss(self, number: int) -> Tensor:
            return super().loss(number) * (float("nan") if number == 1 else 1.0)

    job = Fails(tmp_path, cache, callbacks=(CraftCallback(),), max_steps=4).train()
    assert [row.get("craft/skipped") for row in job.logs] == [None, 1.0, 1.0, 1.0]


# What the Trainer changes after it was made


CHANGES: dict[str, Any] = {
    "learning_rate": 1e-4,
    "weight_decay": 0.3,
    "adam_beta1": 0.5,
    "adam_epsilon": 1e-3,
    "optim": "sgd",
    "optim_args": "momentum=0.7",
}


@pytest.mark.parametrize("how", ["set", "replaced"])
@pytest.mark.parametrize("name", CHANGES)
def test_arguments_are_read_when_the_optimizer_is_built(
    name: str, how: str, cache: AnchorCache, tmp_path: Path
) -> None:
    groups = []
    for kind in ("plain", "factory"):
        job = Job(tmp_path, cache, kind, **({"optim": "sgd"} if name == "optim_args" else {}))
        if how == "set":
            setattr(job.trainer.args, name, CHANGES[name])
        else:
            job.trainer.args = copy.copy(job.args)
            setattr(job.trainer.args, name, CHANGES[name])
        built = job.trainer.create_optimizer()
        groups.append([{k: v for k, v in g.items() if k != "params" and "craft_" not in k} for g in built.param_groups])
        if kind == "factory":
            assert job.passes == 0
    assert groups[0] == groups[1]


def test_keywords_that_were_changed_go_before_the_arguments(cache: AnchorCache, tmp_path: Path) -> None:
    job = Job(tmp_path, cache)
    job.trainer.optimizer_cls_and_kwargs[1]["betas"] = (0.1, 0.2)
    for rate in (1e-3, 1e-4):
        job.args.learning_rate = rate
        job.trainer.optimizer = None
        (group, *_) = job.trainer.create_optimizer().param_groups
        assert (group["betas"], group["lr"]) == ((0.1, 0.2), rate)


def test_an_optimizer_that_makes_its_groups_of_the_model(
    cache: AnchorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GaLore's way: the groups come with the keywords, of the model that is trained."""

    def chosen(args: Any, model: Any) -> Any:
        groups = [] if model is None else [{"params": list(model.lm_head.parameters()), "rank": 2.0}]
        return torch.optim.SGD, {"lr": args.learning_rate, "params": groups}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))
    args = arguments(tmp_path, max_steps=2)
    pair = craft_optimizer(args, lambda of: LogitRetention(of, cache, 8))
    trainer = Trainer(model_init=lambda: model(), args=args, train_dataset=rows(8, 2), optimizer_cls_and_kwargs=pair)
    for _ in range(2):
        trainer.train()
        (group,) = trainer.optimizer.optimizer.param_groups
        assert group["params"] == list(trainer.model.lm_head.parameters())
        assert group["rank"] == 2.0
        assert trainer.optimizer.optimizer.metrics["retention_step"] == 1.0


def test_an_optimizer_that_is_refused_later_is_refused_all_the_same(
    cache: AnchorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, cache)
    job.args.optim = "adafactor"
    assert type(job.trainer.create_optimizer().base_optimizer).__name__ == "Adafactor"
    job.trainer.optimizer = None
    found = (torch.optim.AdamW, {"optimizer_dict": {}})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_: found))
    with pytest.raises(ValueError, match="steps after the backward"):
        job.trainer.create_optimizer()


def test_each_model_of_model_init_has_its_retention_and_its_arguments(cache: AnchorCache, tmp_path: Path) -> None:
    made: list[LogitRetention] = []

    def retention(of: nn.Module) -> LogitRetention:
        made.append(LogitRetention(of, cache, 8))
        return made[-1]

    def drift(of: LogitRetention) -> float:
        assert of is made[-1]
        return of.drift()

    args = arguments(tmp_path, eval_strategy="epoch", max_steps=6)
    trainer = Trainer(
        model_init=lambda: model(),
        args=args,
        train_dataset=rows(40, 2),
        eval_dataset=rows(8, 4),
        optimizer_cls_and_kwargs=craft_optimizer(args, retention, epsilon=0.01),
        callbacks=[CraftCallback(drift)],
    )
    assert "eval_craft/drift_heldout" not in trainer.evaluate(), "there is no retention yet"
    for number, rate in enumerate((1e-3, 1e-2), 1):
        trainer.args.learning_rate = rate
        trainer.train()
        assert len(made) == number
        assert made[-1].model is trainer.model
        logs = [row for row in trainer.state.log_history if "loss" in row]
        assert logs[0]["learning_rate"] == rate
        assert logs[0]["craft/retention_loss"] == pytest.approx(0.0, abs=1e-5)
        assert logs[-1]["craft/retention_loss"] > 1e-5
        assert [row for row in trainer.state.log_history if "eval_craft/drift_heldout" in row]
    assert made[0].model is not made[1].model

    trainer.train()
    again = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in again] == [row["loss"] for row in logs], "nothing is left of the trial before"


def test_one_retention_for_models_that_are_made_anew_is_refused(cache: AnchorCache, tmp_path: Path) -> None:
    args, of_another = arguments(tmp_path), LogitRetention(model(), cache, 8)
    for given in (of_another, {"held": of_another}):
        pair = craft_optimizer(args, given)
        trainer = Trainer(
            model_init=lambda: model(), args=args, train_dataset=rows(8, 2), optimizer_cls_and_kwargs=pair
        )
        with pytest.raises(ValueError, match=r"another model.*model_init.*Pass a function"):
            trainer.train()


def test_a_search_of_hyperparameters_compares_different_runs(cache: AnchorCache, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    seen: list[float] = []

    class Rates(TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            seen.append(optimizer.optimizer.defaults["lr"])

    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(
        model_init=lambda: model(),
        args=args,
        train_dataset=rows(40, 2),
        eval_dataset=rows(8, 4),
        optimizer_cls_and_kwargs=craft_optimizer(args, lambda m: {"held": LogitRetention(m, cache, 8)}),
        callbacks=[CraftCallback(lambda of: of["held"].drift()), Rates()],
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-4, 1e-2])},
        lambda metrics: metrics["eval_craft/drift_heldout"],
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-4, 1e-2]}, seed=0),
    )
    assert set(seen) == {1e-4, 1e-2}
    assert best.hyperparameters == {"learning_rate": 1e-4}, "which drifts less"


@pytest.mark.parametrize(("returned", "words"), [(None, r"Found None"), (3, r"must be callable|mapping")])
def test_a_function_of_the_model_must_return_a_retention(
    returned: Any, words: str, cache: AnchorCache, tmp_path: Path
) -> None:
    job = Job(tmp_path, cache)
    job.trainer.optimizer_cls_and_kwargs = craft_optimizer(job.args, lambda model: returned)
    with pytest.raises((TypeError, ValueError), match=words):
        job.trainer.create_optimizer()
    built, keywords = craft_optimizer(job.args, lambda model: job)
    with pytest.raises(ValueError, match="no Trainer was found"):
        built(job.model.parameters(), **keywords)


def test_of_several_trainers_each_gets_its_own_model(cache: AnchorCache, tmp_path: Path) -> None:
    """Given one class, and an earlier one over the same model with other arguments."""
    args = arguments(tmp_path)
    pair = craft_optimizer(args, lambda m: LogitRetention(m, cache, 8))
    trainers = [Trainer(model(), args, train_dataset=rows(4, 2), optimizer_cls_and_kwargs=pair) for _ in range(2)]
    for trainer in trainers:
        assert trainer.create_optimizer().retention_closure.model is trainer.model
    later = arguments(tmp_path, learning_rate=1e-5)
    pair = craft_optimizer(later, lambda m: LogitRetention(m, cache, 8))
    again = Trainer(trainers[0].model, later, train_dataset=rows(4, 2), optimizer_cls_and_kwargs=pair)
    assert again.create_optimizer().param_groups[0]["lr"] == 1e-5


# Checkpoints


def everything(job: Job) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": dict(job.model.state_dict()),
            "optimizer": job.craft.state_dict(),
            "metrics": job.craft.metrics,
            "rates": job.trainer.lr_scheduler.get_last_lr(),
        }
    )


@pytest.mark.parametrize("how", ["factory", "object"])
def test_a_resumed_run_is_the_straight_run(how: str, cache: AnchorCache, tmp_path: Path) -> None:
    straight = Job(tmp_path / "straight", cache, how, save_strategy="steps", save_steps=5).train()
    group = straight.craft.param_groups[0]
    assert (group["craft_step"], group["craft_anchor_position"]) == (8.0, 8.0)
    resumed = Job(tmp_path / "resumed", cache, how).train(tmp_path / "straight" / "checkpoint-5")
    assert resumed.passes == 3
    assert resumed.drawn == 8
    assert_same(everything(resumed), everything(straight))
    assert resumed.logs[5:] == straight.logs[5:]
    # and the state that made it so is needed
    state = torch.load(tmp_path / "straight" / "checkpoint-5" / "optimizer.pt", weights_only=True)
    for saved in state["param_groups"]:
        saved["craft_anchor_position"] = 0.0
    torch.save(state, tmp_path / "straight" / "checkpoint-5" / "optimizer.pt")
    other = Job(tmp_path / "other", cache, how, strict=False).train(tmp_path / "straight" / "checkpoint-5")
    assert other.logs[-1]["craft/retention_loss"] != straight.logs[-1]["craft/retention_loss"]


def test_a_plain_checkpoint_continues_with_craft_and_back(cache: AnchorCache, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    plain = Job(tmp_path / "plain", cache, "plain", **saving).train()
    # Of a model that was fine-tuned without it, the anchors' check would say that it is not the teacher.
    settings: dict[str, Any] = {"craft": INACTIVE, "strict": False}
    craft = Job(tmp_path / "craft", cache, **settings, **saving).train(tmp_path / "plain" / "checkpoint-4")
    assert craft.passes == 4
    assert craft.craft.param_groups[0]["craft_step"] == 4.0
    back = Job(tmp_path / "back", cache, "plain").train(tmp_path / "craft" / "checkpoint-8")
    assert_same(dict(craft.model.state_dict()), dict(plain.model.state_dict()))
    assert_same(dict(back.model.state_dict()), dict(plain.model.state_dict()))
    again = Job(tmp_path / "again", cache, "plain", max_steps=10).train(tmp_path / "craft" / "checkpoint-8")
    longer = Job(tmp_path / "longer", cache, "plain", max_steps=10).train(tmp_path / "plain" / "checkpoint-8")
    assert_same(dict(again.model.state_dict()), dict(longer.model.state_dict()))


# The training around it


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_retention_shifts_neither_data_nor_dropout(kind: str, cache: AnchorCache, tmp_path: Path) -> None:
    plain = Job(tmp_path, cache, "plain").train()
    job = Job(tmp_path, cache, craft=INACTIVE)
    if kind == "online":
        job.retention = OnlineRetention(job.model, rows(24, 1), 8, teacher=model())  # type: ignore[assignment]
    job.train()
    assert job.passes == 8
    assert [row["loss"] for row in job.logs] == [row["loss"] for row in plain.logs]
    assert [row["grad_norm"] for row in job.logs] == [row["grad_norm"] for row in plain.logs]
    assert_same(dict(job.model.state_dict()), dict(plain.model.state_dict()))
    assert job.logs[-1]["craft/lambda"] == 0.0
    assert job.logs[-1]["craft/retention_loss"] > 1e-4


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.01},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"optim": "sgd"},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_the_trainers_settings(kwargs: dict[str, Any], cache: AnchorCache, tmp_path: Path) -> None:
    """Each runs retention once per step of the optimizer and keeps the drift finite and measured from zero."""
    job = Job(tmp_path, cache, "factory", max_steps=4, strict=not kwargs.get("bf16"), **kwargs).train()
    assert job.passes == 4 == job.drawn
    assert [row["craft/retention_step"] for row in job.logs] == [0, 1, 2, 3]
    assert all(row["craft/skipped"] == 0 for row in job.logs)
    assert job.logs[0]["craft/retention_loss"] < 5e-3
    assert job.logs[-1]["craft/retention_loss"] > job.logs[0]["craft/retention_loss"]
    if kwargs.get("max_grad_norm"):
        assert all(row["craft/task_grad_norm"] == pytest.approx(0.01, rel=1e-3) for row in job.logs)
        assert all(row["grad_norm"] > 0.1 for row in job.logs)


@pytest.mark.parametrize("make", [lambda job: job.retention, lambda job: online(job.model)], ids=["cached", "online"])
def test_bf16_of_the_trainer_starts_without_drift(
    make: Callable[[Job], Any], cache: AnchorCache, tmp_path: Path
) -> None:
    """The Trainer puts autocast into the model's own forward. A teacher beside the model runs under it, too."""
    job = Job(tmp_path, cache, max_steps=2, bf16=True, strict=False)
    job.retention = make(job)
    job.train()
    first = job.logs[0]["craft/retention_loss"]
    assert first == 0.0 if isinstance(job.retention, OnlineRetention) else 0.0 < first < 5e-3


def online(student: nn.Module) -> OnlineRetention:
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), student)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return OnlineRetention(adapted, rows(24, 1), 8)


def test_the_logs_are_json(cache: AnchorCache, tmp_path: Path) -> None:
    job = Job(tmp_path, cache, max_steps=2).train()
    job.trainer.state.save_to_json(str(tmp_path / "state.json"))
    saved = json.loads((tmp_path / "state.json").read_text())
    assert saved["log_history"][0]["craft/epsilon"] == 0.01
