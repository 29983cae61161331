"""What a run of lerobot-train is warned of: anchors of the task that it learns, drift that is held on anchors alone."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import CRAFT, NEW, OLD, arguments, pretrained, resume, train

from craft_optim._warn import CraftWarning
from craft_optim.lerobot.checks import check_task
from craft_optim.lerobot.settings import AnchorSettings


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    return pretrained("act", tmp_path_factory.mktemp("policies") / "act")


def told(act, out, *given):
    """What it is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CraftWarning)
        train("act", act, *arguments(act, out, steps=2), *CRAFT, *given)
    return [str(warning.message) for warning in caught if issubclass(warning.category, CraftWarning)]


def test_anchors_of_the_new_task(act, tmp_path):
    relative = Path(NEW).parent / ".." / Path(NEW).parent.name / Path(NEW).name
    (said,) = told(act, tmp_path / "out", f"--craft.anchors.root={relative}")
    assert "anchors are frames of the dataset that the policy is trained on" in said
    assert "--craft.anchors.episodes" in said


@pytest.mark.parametrize(
    ("data", "chosen", "warns"),
    [
        ({"root": NEW}, "2", True),
        ({"root": NEW}, "[1, 7]", True),
        ({"root": NEW}, "1:", True),
        ({"root": NEW}, "2:4", False),
        ({"root": NEW}, "-2:", False),  # of how many is not known yet
        ({"root": NEW}, None, True),
        ({"root": NEW, "episodes": None}, "2:4", True),
        ({"root": OLD}, "2", False),
        ({"repo_id": "local/new"}, "2", False),  # the training's is a folder of that name
        ({"repo_id": "local/new", "its": {"root": None}}, "2", True),
        ({"repo_id": "local/old", "its": {"root": None}}, "2", False),
    ],
)
def test_which_anchors_are_of_the_new_task(data, chosen, warns):
    trained = {"repo_id": "local/new", "root": NEW, "episodes": [0, 1], **data.get("its", {})}
    if "episodes" in data:
        trained["episodes"] = data["episodes"]
    named = {name: data[name] for name in ("root", "repo_id") if name in data}
    anchors = AnchorSettings(**named, episodes=chosen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_task(SimpleNamespace(dataset=SimpleNamespace(**trained)), anchors)
    assert bool(caught) == warns


@pytest.mark.parametrize("statistics", ["dataset", "pretrained"])
def test_quantiles_without_a_width(tmp_path, statistics):
    """pi05 divides by them: the new data's, or those that it was trained with."""
    flat = shutil.copytree(NEW, tmp_path / "flat")
    file = flat / "meta" / "stats.json"
    stats = json.loads(file.read_text())
    stats["action"]["q01"][1] = stats["action"]["q99"][1]
    file.write_text(json.dumps(stats))
    policy = pretrained("pi05", tmp_path / "pi05")
    given = [*CRAFT, f"--dataset.root={flat}", f"--craft.statistics={statistics}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CraftWarning)
        train("pi05", policy, *arguments(policy, tmp_path / "out", steps=1), *given)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, CraftWarning)]
    assert len(said) == (statistics == "dataset")
    assert all("'action' is normalised by its quantiles q01 and q99" in text and "[1]" in text for text in said)


def test_other_anchors_of_a_run_that_goes_on(act, tmp_path):
    train("act", act, *arguments(act, tmp_path / "out", steps=2), *CRAFT)
    again = resume(tmp_path / "out", 2, "--steps=3")
    for flags, changed in ((CRAFT, []), (["--craft.epsilon=0.2"], []), (["--craft.anchors.count=5"], ["count"])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CraftWarning)
            train("act", act, *again, *flags)
        said = [str(warning.message) for warning in caught if issubclass(warning.category, CraftWarning)]
        assert [f"--craft.anchors.{name} changes nothing any more" in said[0] for name in changed] == [True] * len(said)


def test_drift_that_runs_away_is_told_once(act, tmp_path, monkeypatch):
    def drift(retention, cache, count):
        return 0.5 if cache.path.name.endswith("-heldout") else 0.01

    monkeypatch.setattr("craft_optim.anchors.AnchorRetention.drift", drift)
    (said,) = told(act, tmp_path / "out", "--craft.drift_every=1")
    assert "Drift is 0.5 on held-out anchors, 0.01 on those that are trained on" in said
