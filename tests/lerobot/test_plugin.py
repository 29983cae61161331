"""What the plugin does to a run besides training: metrics, checkpoints, settings; and nothing without its flag."""

import importlib.util
import json
import logging
import re
import shutil
import sys
from types import SimpleNamespace

import gymnasium as gym
import pytest
import small
import torch
from lerobot.scripts import lerobot_train
from lerobot.utils import import_utils
from safetensors.torch import load_file, save_file
from table import Table
from training import (
    CRAFT,
    EXAMPLES,
    NEW,
    OLD,
    arguments,
    assert_same_run,
    checkpoint,
    copied,
    late_dataset,
    pretrained,
    replaced,
    resume,
    rows,
    train,
)

from craft_optim import CraftOptimizer
from craft_optim.cli import main
from craft_optim.lerobot import _noise, plugin, run_anchors


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    return pretrained("act", tmp_path_factory.mktemp("policies") / "act")


@pytest.fixture(scope="module")
def pi0_fast(tmp_path_factory):
    return pretrained("pi0_fast", tmp_path_factory.mktemp("policies") / "pi0_fast")


@pytest.fixture(scope="module")
def finished_run(act, tmp_path_factory):
    """Two checkpoints of a run with retention; tests work on copies."""
    out = tmp_path_factory.mktemp("run") / "out"
    train("act", act, *arguments(act, out), *CRAFT)
    return out


def stopped_with(capsys, name, policy, *given, status=2):
    with pytest.raises(SystemExit) as stopped:
        train(name, policy, *given)
    assert stopped.value.code == status
    return capsys.readouterr().err


# Its metrics


class Recorder:
    """In the place of lerobot's WandBLogger."""

    logged: list = []  # noqa: RUF012

    def __init__(self, cfg):
        self.logged.clear()

    def log_dict(self, values, step=None, mode="train", **_):
        self.logged.append((step, values))

    def log_policy(self, checkpoint_dir):
        pass


def test_metrics_go_to_the_console_the_tracker_and_a_file(act, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lerobot_train, "WandBLogger", Recorder)
    configured = {}
    wandb = SimpleNamespace(run="a run", config=SimpleNamespace(update=lambda held, **_: configured.update(held)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    console, listener = [], logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: console.append(record.getMessage()))  # it changes later
    monkeypatch.setattr(logging.root, "handlers", [listener])
    caplog.set_level("INFO")
    train("act", act, *arguments(act, tmp_path / "out", "--wandb.enable=true", "--wandb.project=p"), *CRAFT)
    written = rows(tmp_path / "out")
    assert [step for step, _ in Recorder.logged] == [1, 2, 3, 4]
    for row, (_, logged) in zip(written, Recorder.logged, strict=True):
        for name in ("retention_loss", "lambda", "task_grad_norm", "capped"):
            assert logged[f"craft/{name}"] == row[name]
    assert "craft/drift_heldout" in Recorder.logged[1][1], "where lerobot saves"
    line = next(said for said in console if said.startswith("step:4 "))
    assert f" drift:{written[-1]['drift']:.3g} eps:0.01 lam:{written[-1]['lambda']:.3g}" in line
    assert "task_grad_norm" not in line
    assert configured["craft"]["epsilon"] == 0.01
    (said,) = [said for said in console if said.startswith("craft: step 4")]
    (following,) = [said for said in console if said.startswith("craft: next: ")]
    assert following.split()[2:5] == ["craft-optim", "report", f"{tmp_path / 'out'}"]
    assert f"{written[-1]['drift_heldout']:.3g} on held-out ones" in said


def test_without_an_epsilon_it_is_that_of_what_is_kept(act, tmp_path):
    train("act", act, *arguments(act, tmp_path / "out"), *(flag for flag in CRAFT if "epsilon" not in flag))
    assert {row["epsilon"] for row in rows(tmp_path / "out")} == {0.01}
    (kept,) = {file.read_text() for file in (tmp_path / "out").rglob("checkpoints/000004/training_state/craft.json")}
    assert json.loads(kept)["settings"]["epsilon"] == 0.01, "it goes on with the same"


def test_without_a_size_a_pass_has_half_of_a_batch_at_least_8_of_it(act, tmp_path):
    few = ["--craft.anchors.count=16", "--craft.anchors.heldout=0"]
    for batch, expected in ((2, 2), (8, 8), (12, 8), (24, 12)):
        out = tmp_path / str(batch)
        run = train("act", act, *arguments(act, out, f"--batch_size={batch}", steps=1), *CRAFT, *few)
        assert run.retention.batch_size == expected


def test_drift_is_measured_as_often_as_asked(act, tmp_path):
    given = [*arguments(act, tmp_path / "out"), *CRAFT, "--craft.drift_every=3", "--craft.retention_every=2"]
    train("act", act, *given)
    written = rows(tmp_path / "out")
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    assert ["drift_anchors" in row for row in written] == [False, False, True, True]
    assert ["retention_loss" in row for row in written] == [True, False, True, False], "every step has its own"


def test_the_fields_of_a_checkpoint_are_those_of_the_documentation(finished_run):
    page = (EXAMPLES.parent / "docs" / "lerobot.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?`) \|", page.split("## Checkpoints and resuming")[1].split("\n## ")[0], re.MULTILINE)
    written = json.loads((finished_run / "checkpoints" / "000004" / "training_state" / "craft.json").read_text())
    assert {name for row in table for name in re.findall(r"`(\w+)`", row)} == written.keys()


def test_epsilon_may_be_the_drift_on_held_out_frames(act, tmp_path, capsys):
    """Measured by the optimizer; resumed to the bit; what is not there is refused."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run = train("act", act, *arguments(act, straight), *CRAFT, "--craft.epsilon_of=heldout")
    assert run.optimizer.constraints[None].heldout is run._anchors.heldout
    assert run.optimizer.rules.total_steps == 4
    last = rows(straight)[-1]
    assert last["epsilon_heldout"] == 0.01
    assert last["epsilon"] == pytest.approx(0.01 * last["drift"] / last["heldout"], rel=0.7)
    assert last["epsilon"] != 0.01
    copied(straight, stopped, until=2)
    train("act", act, *resume(stopped, 2))
    assert_same_run(straight, stopped, 4)

    shutil.rmtree(stopped / "craft" / "anchors-heldout")
    copied(stopped, tmp_path / "bare", until=2)
    said = stopped_with(capsys, "act", act, *resume(tmp_path / "bare", 2))
    assert "anchors-heldout: build a cache there" in said
    train("act", act, *resume(tmp_path / "bare", 2), "--craft.epsilon_of=anchors")


# With and without it


def test_a_checkpoint_resumes_without_the_plugin(act, finished_run, tmp_path):
    out = copied(finished_run, tmp_path / "out", until=2)
    assert train("act", act, *resume(out, 2), with_plugin=False) is None
    plain, state = checkpoint(out, 4)
    assert state is None
    held, _ = checkpoint(finished_run, 4)
    assert plain.keys() == held.keys()
    assert any(not torch.equal(x, held[name]) for name, x in plain.items())


def test_a_plain_checkpoint_resumes_with_the_plugin(act, finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    train("act", act, *arguments(act, out), with_plugin=False)
    shutil.rmtree(out / "checkpoints" / "000004")
    said = stopped_with(capsys, "act", act, *resume(out, 2), *CRAFT)
    assert "made without craft" in said
    assert "--craft.anchors.path=FOLDER" in said
    anchors = finished_run / "craft" / "anchors"
    run = train("act", act, *resume(out, 2), f"--craft.anchors.path={anchors}", "--craft.epsilon=0.02")
    assert [row["step"] for row in rows(out)] == [3, 4]
    assert rows(out)[0]["retention_loss"] > 0.0, "the teacher is the pretrained policy, not the checkpoint"
    assert run.optimizer.constraints[None].schedule(0) == 0.02
    assert run.optimizer.rules.total_steps == 2, "what is left"


def test_with_a_multiplier_of_zero_it_is_the_plain_run(act, tmp_path):
    """Same batches, same dropout: building anchors, passes and measuring drift leave no trace."""
    train("act", act, *arguments(act, tmp_path / "plain"), with_plugin=False)
    none = ["--craft.dual=ascent", "--craft.lambda_init=0", "--craft.lambda_max=0", "--craft.projection=never",
            "--craft.trust_region=null"]  # fmt: skip
    train("act", act, *arguments(act, tmp_path / "held"), *CRAFT, *none, "--craft.max_grad_norm=1e9")
    plain, held = checkpoint(tmp_path / "plain", 4)[0], checkpoint(tmp_path / "held", 4)[0]
    assert all(torch.equal(x, held[name]) for name, x in plain.items())
    assert rows(tmp_path / "held")[-1]["retention_loss"] > 0.0


def test_the_module_alone_changes_nothing():
    before = {name: getattr(lerobot_train, name) for name in plugin.REPLACED}
    sys.modules.pop(plugin.__name__)
    try:
        __import__(plugin.__name__)
    finally:
        sys.modules[plugin.__name__] = plugin
    assert all(getattr(lerobot_train, name) is value for name, value in before.items())


def test_it_goes_on_after_a_part_without_it(act, finished_run, tmp_path):
    """The metrics of both parts stay; another way to find lambda begins anew, and the anchors go on."""
    out = copied(finished_run, tmp_path / "out", until=2)
    run = train("act", act, *resume(out, 2), "--craft.dual=nupi", "--steps=3")
    assert {name for name in run.optimizer.param_groups[0] if name.startswith("craft_dual_")} == {
        f"craft_dual_{name}" for name in run.optimizer.constraints[None].controller.initial_state()
    }
    assert run.optimizer.param_groups[0]["craft_anchor_position"] == 3
    train("act", act, *resume(out, 3, "--steps=5"), with_plugin=False)
    anchors = finished_run / "craft" / "anchors"
    train("act", act, *resume(out, 5, "--steps=6"), f"--craft.anchors.path={anchors}")
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 6]


def test_two_runs_in_one_process(act, finished_run, tmp_path):
    with replaced():
        plugin.install(CRAFT)
        run = lerobot_train.craft_run
        run.retention = run._saved = "of the first"
        with pytest.raises(AttributeError):
            run.prepare(SimpleNamespace(resume=False))
        assert (run.retention, run._saved) == (None, None)
    with replaced():
        plugin.install(CRAFT)
        plugin.install(CRAFT)
        first = lerobot_train.make_optimizer_and_scheduler
        assert first.__wrapped__.__module__ == "lerobot.optim.factory", "replaced once"
        plugin.install([*CRAFT, "--craft.rho=3"])
        assert lerobot_train.craft_run.settings.rho == 3.0
        with pytest.raises(SystemExit):
            plugin.install([*CRAFT, "--craft.anchor.count=3"])


def test_the_program_called_again_in_this_process_reads_its_own_flags(monkeypatch):
    with replaced():
        plugin.install(CRAFT)
        run, prepared = lerobot_train.craft_run, []
        monkeypatch.setattr(run, "prepare", lambda cfg: prepared.append(run.flags))
        for rho in ("2", "4"):
            given = [plugin.TRAIN_FLAG, *CRAFT, f"--craft.rho={rho}"]
            monkeypatch.setattr(sys, "argv", ["lerobot-train", *given])
            with pytest.raises(AttributeError):
                lerobot_train.make_train_eval_datasets(None)
    assert [flags[-1] for flags in prepared] == ["--rho=2", "--rho=4"]


def test_a_copied_run_does_not_go_on_in_the_first_ones_folder(act, finished_run, tmp_path, capsys):
    out = copied(finished_run, tmp_path / "out", until=2)
    before = rows(finished_run)
    there = [flag for flag in resume(out, 2) if not flag.startswith("--output_dir")]
    said = stopped_with(capsys, "act", act, *there)
    assert f"is not in the folder that this run would go on in, {finished_run}" in said
    assert f"Pass --output_dir={out}, or a new folder." in said
    assert rows(finished_run) == before


# Its anchors


def test_they_are_never_made_anew(act, finished_run, tmp_path, capsys):
    out = copied(finished_run, tmp_path / "moved", until=2)
    shutil.rmtree(out / "craft" / "anchors-heldout")
    train("act", act, *resume(out, 2))
    assert "drift_heldout" not in rows(out)[-1]
    assert "drift_heldout" in rows(out)[1]

    out = copied(finished_run, tmp_path / "other", until=2)
    file = out / "checkpoints" / "000002" / "training_state" / "craft.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "fingerprint": "v1-another"}))
    assert "not those that this run began with" in stopped_with(capsys, "act", act, *resume(out, 2))
    file.write_text(json.dumps({**held, "anchors": str(tmp_path / "nowhere"), "anchors_from_here": "nowhere"}))
    assert "There are no anchors in" in stopped_with(capsys, "act", act, *resume(out, 2))
    file.write_text("{")
    assert "cannot be read" in stopped_with(capsys, "act", act, *resume(out, 2))


def test_a_cache_that_is_there_is_used(act, finished_run, tmp_path):
    cache = finished_run / "craft" / "anchors"
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    train("act", act, *arguments(act, tmp_path / "out"), f"--craft.anchors.path={cache}", "--craft.epsilon=0.01")
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == before
    assert not (tmp_path / "out" / "craft" / "anchors").exists()
    assert rows(tmp_path / "out")[0]["retention_loss"] == pytest.approx(0.0, abs=1e-3)
    assert "drift_heldout" in rows(tmp_path / "out")[-1], "it lies beside the cache"


def test_a_cache_of_another_policy(act, finished_run, tmp_path, capsys):
    other = shutil.copytree(act, tmp_path / "other")
    weights = load_file(act / "model.safetensors")
    save_file({name: x * 1.1 if x.is_floating_point() else x for name, x in weights.items()}, other / "new")
    (other / "new").replace(other / "model.safetensors")
    cache = f"--craft.anchors.path={finished_run / 'craft' / 'anchors'}"
    said = stopped_with(capsys, "act", other, *arguments(other, tmp_path / "out"), cache)
    assert said.count("craft: The model does not reproduce") == 1
    assert "Traceback" not in said


def test_pictures_and_prompts_without_a_dataset(pi0_fast, tmp_path):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 9, 9)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"task": "open a drawer", "image_path": f"{number}.png"}) for number in range(4)]
    (tmp_path / "anchors.jsonl").write_text("\n".join(lines))
    own = [f"--craft.anchors.prompts={tmp_path / 'anchors.jsonl'}", "--craft.anchors.heldout=0.25"]
    run = train("pi0_fast", pi0_fast, *arguments(pi0_fast, tmp_path / "out", steps=2), *own)
    assert run.retention.cache.features.tokens is not None, "what the policy itself would do"
    assert len(run.retention.cache) == 3
    assert "drift_heldout" in rows(tmp_path / "out")[-1]


# What else lerobot-train can do


def test_adapters(pi0_fast, tmp_path):
    peft = ["--peft.method_type=LORA", "--peft.r=4", "--peft.target_modules=[q_proj,v_proj]"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train("pi0_fast", pi0_fast, *arguments(pi0_fast, whole), *CRAFT, *peft)
    assert rows(whole)[0]["retention_loss"] == pytest.approx(0.0, abs=1e-3)
    weights, _ = checkpoint(whole, 4)
    assert any("lora_B" in name and x.abs().sum() > 0 for (_, name), x in weights.items())
    copied(whole, stopped, until=2)
    train("pi0_fast", pi0_fast, *resume(stopped, 2))
    again, _ = checkpoint(stopped, 4)
    assert all(torch.equal(x, again[name]) for name, x in weights.items())


def test_mixed_precision(act, tmp_path):
    run = train("act", act, *arguments(act, tmp_path / "out", "--policy.use_amp=true"), *CRAFT)
    assert run.retention.reading.autocast == torch.bfloat16
    assert run.retention.cache.features.autocast == "bfloat16"
    assert rows(tmp_path / "out")[0]["retention_loss"] < 1e-3


class Wide(Table):
    width = 4  # as the datasets have


def test_evaluations_in_between(act, tmp_path, monkeypatch, capsys):
    """On held-out frames of the new task, and in a simulator."""
    monkeypatch.setitem(gym.registry, "gym_pusht/PushT-v0", gym.envs.registration.EnvSpec("gym_pusht/PushT-v0", Wide))
    heldout = ["--dataset.eval_split=0.5", "--eval_steps=2"]
    simulator = [
        "--env.type=pusht", "--env_eval_freq=2", "--eval.n_episodes=1", "--eval.batch_size=1",
        f"--env.observation_height={small.IMAGE}", f"--env.observation_width={small.IMAGE}",
    ]  # fmt: skip
    out = tmp_path / "out"
    train("act", act, *arguments(act, out, *heldout, *simulator), *CRAFT)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    assert len(list((out / "eval").glob("videos_step_*"))) == 2
    train("act", act, *arguments(act, tmp_path / "without"), *CRAFT, "--dataset.eval_split=0.5")
    same = [[row["loss"] for row in rows(run)] for run in (out, tmp_path / "without")]
    assert same[0][:2] == same[1][:2], "until the first simulation, which draws random numbers"


@pytest.mark.parametrize(("choice", "source"), [("dataset", NEW), ("pretrained", OLD)])
def test_whose_statistics_a_checkpoint_holds(act, tmp_path, choice, source):
    train("act", act, *arguments(act, tmp_path / "out", steps=1), *CRAFT, f"--craft.statistics={choice}")
    folder = tmp_path / "out" / "checkpoints" / "000001" / "pretrained_model"
    expected = json.loads((source / "meta" / "stats.json").read_text())["action"]["mean"]
    for kind in ("preprocessor", "postprocessor"):
        (file,) = folder.glob(f"policy_{kind}_step_*normalizer*.safetensors")
        assert load_file(file)["action.mean"].tolist() == pytest.approx(expected, rel=1e-5)


# What it refuses


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--craft.epsilom=1"], "--craft.epsilon"),
        (["--craft.anchors.heldout=2"], "must be in [0, 1)"),
        (["--craft.anchors.root=null"], "craft needs examples"),
        (["--craft.epsilon_start=1"], "belong together"),
        (["--craft.config=nowhere.yaml"], "nowhere.yaml"),
        (["--craft.rho=-1"], "--craft.rho must be a number > 0. Found --craft.rho=-1"),
        (["--craft.retention_every=0"], "Found --craft.retention_every=0"),
        (["--craft.conflict_threshold=-2"], "must be in [-1, 1]. Found -2"),
        (["--craft.merge=sum"], "must be one of weighted, equal, task_priority. Found 'sum'"),
    ],
)
def test_wrong_settings(act, tmp_path, capsys, change, words):
    assert words in stopped_with(capsys, "act", act, *arguments(act, tmp_path / "out"), *CRAFT, *change)
    assert not (tmp_path / "out").exists()


def never(*_, **__):
    raise AssertionError("loaded, although it is known that the run cannot be")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--craft.epsilon=-1"], "--craft.epsilon must be a finite number >= 0"),
        (["--craft.anchors.root=/nowhere/data"], "--craft.anchors.root must hold a LeRobotDataset"),
        (["--craft.anchors.root=null", "--craft.anchors.path=nowhere"], "Found nowhere, which is no folder"),
        (["--craft.anchors.episodes=[99]"], "has 40 episodes, 0 to 39. Found --craft.anchors.episodes=[99]"),
        (["--craft.anchors.keep=prefix"], "`keep` must be one of ('actions',) for act"),
        (["--craft.anchors.top-k=3"], "--craft.anchors.top_k is of logits, and of act actions are kept"),
        (['--craft.anchors.rename_map={"observation.image": "observation.front"}'], "act looks at the cameras"),
        (["--craft.anchors.video_backend=vhs"], "must be one of torchcodec, pyav"),
        (["--craft.anchors.tolerance_s=-1"], "must be seconds > 0"),
        (["--craft.anchors.revision=main"], "is of datasets of the hub"),
        (["--craft.epsilon_of=heldout", "--craft.anchors.heldout=0"], "Found --craft.anchors.heldout=0: take a share"),
        (["--craft.epsilon_of=heldout", "--craft.anchors.episodes=1"], "Found one episode, or one frame: take more"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(act, tmp_path, capsys, monkeypatch, change, words):
    for name in ("make_train_eval_datasets", "make_policy"):
        monkeypatch.setattr(lerobot_train, name, never)
    said = stopped_with(capsys, "act", act, *arguments(act, tmp_path / "out"), *CRAFT, *change)
    (line,) = [line for line in said.splitlines() if line.startswith("craft: ")]
    assert words.replace("`keep`", "--craft.anchors.keep") in line
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_setting_of_a_run_that_goes_on(act, finished_run, tmp_path, capsys, monkeypatch):
    """Its settings are those of the checkpoint, changed: what belongs together need not be given together."""
    out = copied(finished_run, tmp_path / "out", until=2)
    monkeypatch.setattr(lerobot_train, "make_train_eval_datasets", never)
    for flag, words in (("epsilon=-1", "--craft.epsilon must be"), ("epsilon_start=1", "belong together")):
        said = stopped_with(capsys, "act", act, *resume(out, 2), f"--craft.{flag}")
        assert words in said
        assert said.count("craft: ") == 1


def test_the_processes_of_a_machine_tell_it_once(capsys, monkeypatch):
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with replaced(), pytest.raises(SystemExit):
            plugin.install(["--craft.epsilon=-1"])
        assert capsys.readouterr().err.count("craft: ") == times


def test_who_wants_the_traceback_has_it(capsys):
    with replaced(), pytest.raises(ValueError, match="must be a finite number"):
        plugin.install(["--craft.epsilon=-1"], debug=True)


def test_anchors_are_built_before_lerobot_draws_its_bar(act, tmp_path, monkeypatch):
    order = []

    class Bar:
        def __init__(self, **_):
            order.append("drawn")

        def update(self, number):
            order.append("step")

        def refresh(self):
            pass

        close = refresh

    def build(*args, **settings):
        order.append("built")
        return run_anchors.build_anchors(*args, **settings)

    monkeypatch.setattr(lerobot_train, "tqdm", Bar)
    monkeypatch.setattr("craft_optim.lerobot.run.build_anchors", build)
    train("act", act, *arguments(act, tmp_path / "out", steps=2), *CRAFT)
    assert order == ["built", "drawn", "step", "step"]


def test_the_trainings_settings_read_the_anchors(act, tmp_path, capsys):
    """Time stamps that lie 2 ms beside the video's, as robots record them."""
    late = late_dataset(tmp_path / "late")
    given = [*CRAFT, f"--craft.anchors.root={late}"]
    said = stopped_with(capsys, "act", act, *arguments(act, tmp_path / "a", steps=1), *given)
    assert "(FrameTimestampError: " in said
    assert "pass a larger `tolerance_s`" in said
    assert said.count("craft: ") == 1
    train("act", act, *arguments(act, tmp_path / "b", steps=1), *given, "--tolerance_s=0.01")
    train("act", act, *arguments(act, tmp_path / "c", steps=1), *given, "--craft.anchors.tolerance-s=0.01")


def test_a_cache_of_another_number_of_anchors(act, tmp_path, capsys):
    given = [*CRAFT, f"--craft.anchors.path={tmp_path / 'anchors'}"]
    train("act", act, *arguments(act, tmp_path / "a", steps=1), *given)
    train("act", act, *arguments(act, tmp_path / "b", steps=1), *given)
    said = stopped_with(capsys, "act", act, *arguments(act, tmp_path / "c", steps=1), *given, "--craft.anchors.count=6")
    assert "holds a finished cache of 8 anchors, and 4 were asked for" in said


def test_a_policy_that_was_never_trained(act, tmp_path, capsys):
    fresh = [x for x in arguments(act, tmp_path / "out") if not x.startswith("--policy.path")]
    random = "--policy.pretrained_backbone_weights=null"
    said = stopped_with(capsys, "act", act, *fresh, "--policy.type=act", "--policy.device=cpu", *CRAFT, random)
    assert "random weights: pass --policy.path" in said


def test_a_remote_job(act, tmp_path):
    with pytest.raises(SystemExit, match="no craft-optim"):
        train("act", act, *arguments(act, tmp_path / "out", "--job.target=a10g-small"), *CRAFT)


def test_the_command(act, tmp_path, monkeypatch):
    """`craft-optim train` starts lerobot's script with the flag that loads this package."""
    started = []
    monkeypatch.setattr(lerobot_train, "main", lambda: started.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", [])
    with replaced():
        assert main(["train", "--craft.epsilon=1", "--craft.anchors.repo-id=you/old", "--policy.path=a"]) == 0
        assert lerobot_train.craft_run.settings.epsilon == 1.0, "and the hooks are in place"
    assert started[0][:3] == ["lerobot-train", plugin.TRAIN_FLAG, "--craft.epsilon=1"]


def test_errors_of_lerobot_are_one_line_until_training_has_begun(tmp_path, monkeypatch, capsys):
    anchors = "--craft.anchors.repo_id=you/old"

    def stopped(error, begun):
        def run():
            lerobot_train.craft_run.retention = begun
            raise error

        monkeypatch.setattr(lerobot_train, "main", run)
        with replaced():
            return main(["train", anchors])

    monkeypatch.setattr(sys, "argv", [])
    assert stopped(FileExistsError("Output directory out already exists"), None) == 1
    assert capsys.readouterr().err == "craft-optim train: Output directory out already exists (--debug shows where)\n"
    assert stopped(KeyError("stats"), None) == 1
    assert capsys.readouterr().err == "craft-optim train: KeyError: 'stats' (--debug shows where)\n"
    with pytest.raises(KeyError):
        stopped(KeyError("stats"), "a retention")
    assert stopped(KeyboardInterrupt(), "a retention") == 130
    assert "--resume=true --config_path=" in capsys.readouterr().err
    with replaced(), pytest.raises(ValueError, match="must be a finite number"):
        main(["train", "--debug", "--craft.epsilon=-1"])


def test_the_help_has_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert "\n  --craft.epsilon=null\n      The allowed drift" in said
    assert "\n  --craft.anchors.heldout=0.1\n" in said


def test_one_line_where_torchcodec_cannot_be_loaded(monkeypatch):
    """lerobot says it in a hundred, for each dataset again."""
    said, listener = [], logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("lerobot.utils.import_utils")
    monkeypatch.setattr(logger, "handlers", [listener])
    monkeypatch.setattr(_noise, "_said", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def cannot(name):
        raise RuntimeError("Could not load libtorchcodec\nTraceback\n libavutil.so")

    monkeypatch.setattr(importlib, "import_module", cannot)
    assert [import_utils.get_safe_default_video_backend() for _ in range(2)] == ["pyav", "pyav"]
    assert said == ["'torchcodec' is installed but cannot be loaded. Falling back to 'pyav' as a default decoder."]
    logger.warning("another\nmessage")
    assert said[1:] == ["another\nmessage"]


def test_its_optimizer_is_the_presets(act, tmp_path):
    run = train("act", act, *arguments(act, tmp_path / "out", steps=2), *CRAFT, "--craft.gradient_memory=bfloat16")
    assert isinstance(run.optimizer, CraftOptimizer)
    groups = run.optimizer.base_optimizer.param_groups
    assert type(run.optimizer.base_optimizer) is torch.optim.AdamW
    assert len(groups) == 2, "ACT trains its backbone at a rate of its own"
    assert run.optimizer.rules.max_grad_norm == 10.0
    assert run.optimizer.rules.gradient_memory == "bfloat16"
    assert run.optimizer.metrics["retention_step"] == 1.0
