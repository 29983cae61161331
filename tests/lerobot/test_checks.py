"""What is told of a training run's settings before its policy and its data are loaded."""

import contextlib
import warnings
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import NormalizerProcessorStep
from metaworld_pi0_fast import ASSETS, OLD_TASK
from torch import nn

from craft_optim import anchors
from craft_optim._warn import CraftWarning
from craft_optim.anchors import AnchorCache
from craft_optim.cli.settings_help import settings_in_words
from craft_optim.lerobot import run_anchors
from craft_optim.lerobot.checks import check_quantiles, check_source, find_cache, warn_of_few
from craft_optim.lerobot.run_anchors import open_source, split_count
from craft_optim.lerobot.settings import AnchorSettings, CraftSettings, SettingsError, read_settings, setting_names

DATA = ASSETS / "demonstrations" / OLD_TASK


# Values


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("epsilon=-1", "--craft.epsilon must be a finite number >= 0. Found --craft.epsilon=-1"),
        ("epsilon=nan", "--craft.epsilon must be a finite number"),
        ("epsilon=.inf", "--craft.epsilon must be a finite number"),
        ("epsilon=true", "--craft.epsilon must be a number. Found True"),
        ("epsilon=abc", "--craft.epsilon must be a number. Found 'abc'"),
        ("dual=foo", "--craft.dual must be one of 'pi', 'ascent', 'nupi', 'augmented_lagrangian'"),
        ("lambda_init=-1", "--craft.lambda_init must be a finite number > 0"),
        ("lambda_lr=-1", "--craft.lambda_lr must be a finite number >= 0"),
        ("lambda_max=3", "and --craft.dual='pi' has none of these. Found --craft.lambda_max=3.0: set --craft.rho, "),
        ("rho=-1", "--craft.rho must be a number > 0. Found --craft.rho=-1"),
        ("rho=null", "--craft.rho must be a number. Found null"),
        ("retention_every=2.5", "--craft.retention_every must be a whole number or 'auto'. Found 2.5"),
        ("retention_every=often", "--craft.retention_every must be a whole number or 'auto'. Found 'often'"),
        ("retention_every=true", "--craft.retention_every must be a whole number or 'auto'. Found True"),
        ("trust_region=1", "--craft.trust_region must be a finite number > 1, or None. Found --craft.trust_region=1"),
        ("total_steps=100", "There is no --craft.total_steps"),
        ("epsilon_of=frames", "--craft.epsilon_of must be one of anchors, heldout. Found frames"),
        ("batch_size=2.0", "--craft.batch_size must be a whole number. Found 2.0"),
        ("anchors=3", "--craft.anchors must hold names and values. Found 3"),
        ("anchors.count=true", "--craft.anchors.count must be a whole number. Found True"),
        ("anchors.count=0", "--craft.anchors.count must be a whole number >= 1. Found 0"),
        ("anchors.keep=foo", "--craft.anchors.keep must be one of logits, tokens, actions, prefix. Found foo"),
        ("anchors.layers=3", "--craft.anchors.layers must be a list, such as [8, 16]. Found 3"),
        ("anchors.layers=[3]", "--craft.anchors.layers needs --craft.anchors.keep=prefix"),
        ("anchors.rename_map=x", "--craft.anchors.rename_map must be names for names"),
        ("anchors.rename_map=[a]", "--craft.anchors.rename_map must be names for names"),
        ("anchors.episodes=foo", "--craft.anchors.episodes must be the first N as N"),
        ("anchors.heldout=nan", "--craft.anchors.heldout must be in [0, 1). Found nan"),
        ("anchors.repoid=x", "There is no --craft.anchors.repoid. Known: --craft.anchors.repo_id"),
    ],
)
def test_a_wrong_value_is_told_by_the_name_of_its_flag(flag, words):
    with pytest.raises(SettingsError) as told:
        read_settings([f"--{flag}"])
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_the_same_in_a_file(tmp_path):
    file = tmp_path / "craft.yaml"
    for text, words in (
        ("epsilon: [1]", "--craft.epsilon must be a number. Found [1]"),
        ("craft: {anchors: {count: many}}", "--craft.anchors.count must be a whole number. Found 'many'"),
        ("craft: {anchors: {cuont: 3}}", "There is no --craft.anchors.cuont. Known: --craft.anchors.count"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError) as told:
            read_settings([f"--config={file}"])
        assert words in str(told.value)


def test_what_belongs_together_may_come_from_the_checkpoint():
    saved = read_settings(["--epsilon_schedule=linear", "--epsilon_start=0.5"]).to_dict()
    assert read_settings(["--epsilon_start=0.2"], saved).epsilon_start == 0.2
    assert read_settings(["--epsilon_start=0.2"], complete=False).epsilon_start == 0.2
    with pytest.raises(SettingsError, match="belong together"):
        read_settings(["--epsilon_start=0.2"])


def test_the_help_lists_every_setting_with_its_default_and_what_it_is():
    lines = settings_in_words().splitlines()
    listed = {line.strip(): lines[place + 1] for place, line in enumerate(lines) if line.startswith("  --craft.")}
    defaults = {name: attrgetter(name)(CraftSettings()) for name in setting_names()}
    assert listed.keys() == {f"--craft.{name}={'null' if x is None else x}" for name, x in defaults.items()}
    assert next(iter(listed)) == "--craft.epsilon=null"
    assert all(len(text.strip()) > 10 for text in listed.values())
    assert "the clipping of the policy's optimizer" in listed["--craft.max_grad_norm=null"]  # lerobot's, not `Rules`'


def test_epsilon_depends_on_what_is_kept_unless_it_is_given():
    assert {keep: read_settings([]).for_kept(keep).epsilon for keep in ("logits", "tokens", "actions", "prefix")} == {
        "logits": 0.1, "tokens": 0.1, "actions": 0.01, "prefix": 0.005,
    }  # fmt: skip
    assert read_settings(["--epsilon=0.3"]).for_kept("prefix").epsilon == 0.3
    ending = read_settings(["--epsilon_schedule=linear", "--epsilon_start=0.5"]).for_kept("actions").schedule(10)
    assert ending(10) == pytest.approx(0.01)


# Where anchors come from


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a file").write_text("")
    Path("questions.jsonl").write_text("{}")
    model = nn.Linear(3, 4)
    anchors.build(model, [torch.randn(8, 3)], "cache", class_dim=-1)

    def stopped():
        yield torch.randn(2, 3)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        anchors.build(model, stopped(), "half", class_dim=-1, shard_size=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "craft needs examples of what the policy must keep"),
        ({"prompts": Path("a file")}, "craft needs examples of what the policy must keep"),
        ({"root": Path("nowhere")}, "--craft.anchors.root must hold a LeRobotDataset. Found nowhere: there is no such"),
        ({"root": Path("empty")}, "--craft.anchors.root must hold a LeRobotDataset. Found empty: there is no meta"),
        ({"prompts": Path("no.jsonl")}, "--craft.anchors.prompts must be a file. Found no.jsonl"),
        ({"prompts": Path("no.txt"), "root": DATA}, "--craft.anchors.prompts must be a file. Found no.txt"),
        ({"prompts": Path("questions.jsonl"), "root": DATA}, "leave out --craft.anchors.root"),
        ({"prompts": Path("questions.jsonl"), "tolerance_s": 0.1}, "leave out --craft.anchors.tolerance_s"),
        ({"path": Path("nowhere")}, "--craft.anchors.path must be a cache of anchors"),
        ({"path": Path("nowhere")}, "Found nowhere, which is no folder: correct the path"),
        ({"path": Path("empty")}, "Found empty, which has none in it: correct the path"),
        ({"path": Path("half")}, "Found half, which is half built: run the command that built it again"),
        ({"path": Path("a file"), "root": DATA}, "--craft.anchors.path must be a folder. Found a file"),
    ],
)
def test_a_source_that_is_not_there(folder, given, words):
    with pytest.raises(SettingsError) as told:
        check_source(AnchorSettings(**given))
    assert words in str(told.value)
    assert "been trained" not in str(told.value)


@pytest.mark.parametrize(
    "given", [{"path": Path("cache")}, {"root": DATA}, {"repo_id": "you/old", "root": Path("nowhere")}]
)
def test_a_source_that_may_be_there(folder, given):
    check_source(AnchorSettings(**given))


def test_the_cache_of_a_run_that_goes_on(folder):
    cache = AnchorCache.open("cache")
    assert len(find_cache(Path("cache"), cache.fingerprint, trained=True)) == 8
    with pytest.raises(SettingsError, match="not those that this run began with"):
        find_cache(Path("cache"), "v1-another")
    with pytest.raises(SettingsError, match=r"which has none in it: correct the path\.$"):
        find_cache(Path("empty"), trained=True)
    with pytest.raises(SettingsError, match="cannot be made anew of a policy that has been trained"):
        find_cache(Path("nowhere"), trained=True)


def test_the_anchors_data_is_read_as_the_trainings(monkeypatch):
    asked = {}
    monkeypatch.setattr(run_anchors, "load_preprocessor", lambda *given: asked.update(revision_of_policy=given[3]))
    monkeypatch.setattr(run_anchors, "open_frames", lambda config, prepare, **given: asked.update(given))
    data = SimpleNamespace(repo_id="you/new", revision="v2", video_backend="pyav", depth_output_unit="m")
    policy = SimpleNamespace(pretrained_path="p", device="cpu", pretrained_revision="main")
    cfg = SimpleNamespace(policy=policy, dataset=data, tolerance_s=0.01)
    names = ("tolerance_s", "video_backend", "depth_output_unit", "revision", "revision_of_policy")
    for given, expected in (
        ({"repo_id": "you/old"}, (0.01, "pyav", "m", None, "main")),
        ({"repo_id": "you/old", "tolerance_s": 0.5, "revision": "v1"}, (0.5, "pyav", "m", "v1", "main")),
        ({"repo_id": "you/old", "video_backend": "torchcodec"}, (0.01, "torchcodec", "m", None, "main")),
        ({"repo_id": "you/new", "depth_output_unit": "mm"}, (0.01, "pyav", "mm", "v2", "main")),
        ({"repo_id": "you/new", "root": Path("x")}, (0.01, "pyav", "m", None, "main")),
        ({"prompts": Path("q.jsonl")}, (None, None, None, None, "main")),
    ):
        asked.clear()
        open_source(AnchorSettings(**given), cfg)
        assert tuple(asked[name] for name in names) == expected, given


# How many


@pytest.mark.parametrize(
    ("count", "share", "there", "expected"),
    [
        (128, 0.1, (3600, 400), (115, 13)),
        (128, 0.1, (3600, 0), (128, 0)),
        (5000, 0.1, (3600, 400), (3600, 400)),
        (None, 0.1, (3600, 400), (3600, 400)),
        (3, 0.1, (3600, 400), (2, 1)),
        (1, 0.5, (3600, 400), (1, 0)),
        (100, 0.5, (10, 400), (10, 90)),
        (100, 0.1, (400, 3), (97, 3)),
    ],
)
def test_count_is_what_is_built_in_all(count, share, there, expected):
    assert split_count(count, share, *there) == expected


@pytest.mark.parametrize(("number", "batch", "warns"), [(2, 4, True), (63, 4, True), (64, 64, False), (100, 128, True)])
def test_too_few_anchors_are_told(number, batch, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few(number, batch)
    assert [f"There are {number} anchors" in str(x.message) for x in caught] == [True] * warns
    assert (f"less than the {batch} of one step" in str(caught[0].message) if caught else False) == (number < batch)


# Quantiles


def normaliser(mode, stats):
    features = {"observation.state": PolicyFeature(FeatureType.STATE, (3,))}
    step = NormalizerProcessorStep(features, {FeatureType.STATE: mode}, {"observation.state": stats})
    return SimpleNamespace(steps=[SimpleNamespace(), step])


LOW, HIGH = [0.0, 5.0, 1.0], [1.0, 5.0, 2.0]  # constant in its second dimension


@pytest.mark.parametrize(
    ("mode", "quantiles", "low", "high", "places"),
    [
        (NormalizationMode.QUANTILES, ("q01", "q99"), [0.1, 5.0, 1.5], [0.9, 5.0, 1.5], "[2]"),
        (NormalizationMode.QUANTILES, ("q01", "q99"), [0.5, 5.0, 1.5], [0.5 + 1e-8, 5.0, 1.5], "[0, 2]"),
        (NormalizationMode.QUANTILE10, ("q10", "q90"), [0.1, 5.0, 1.5], [0.9, 5.0, 1.5], "[2]"),
        (NormalizationMode.QUANTILES, ("q01", "q99"), [0.1, 5.0, 1.1], [0.9, 5.0, 1.9], None),
        (NormalizationMode.QUANTILES, ("q01", "q99"), [0.1, 5.0, 1.0], [0.9, 5.0, 1.0], "[2]"),
        (NormalizationMode.MEAN_STD, ("q01", "q99"), [0.1, 5.0, 1.5], [0.9, 5.0, 1.5], None),
        (NormalizationMode.MIN_MAX, ("q01", "q99"), [0.1, 5.0, 1.5], [0.9, 5.0, 1.5], None),
    ],
)
def test_dimensions_that_quantiles_give_no_width(mode, quantiles, low, high, places):
    for kind in (np.array, torch.tensor, list):
        stats = {name: kind(x) for name, x in zip(("min", *quantiles, "max"), (LOW, low, high, HIGH), strict=True)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CraftWarning)
            check_quantiles(normaliser(mode, stats))
        said = [str(x.message) for x in caught if issubclass(x.category, CraftWarning)]
        assert len(said) == (places is not None)
        assert not said or f"the same number in dimensions {places}, although its values are not" in said[0]


def test_small_units_are_no_concern():
    """Values in metres where they are nanometres."""
    width = torch.full((3,), 1e-8)
    stats = {"min": 0 * width, "q01": 0.01 * width, "q99": 0.99 * width, "max": width}
    check_quantiles(normaliser(NormalizationMode.QUANTILES, stats))


def test_the_quantiles_of_the_shipped_data_are_of_no_concern():
    policy = SimpleNamespace(config=small.build("act", None, **small.features(small.TOP)).config)
    check_quantiles(small.preprocessor(policy, None))
