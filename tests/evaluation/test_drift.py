"""Drift of models on caches: against the closures' own, anchor by anchor, by hand, and from the command line."""

import json
import math
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from craft_optim import anchors
from craft_optim.anchors import Reading
from craft_optim.anchors.cache import AnchorCache
from craft_optim.cli import main
from craft_optim.evaluation.actions import action_drift, predicted_actions
from craft_optim.evaluation.checkpoints import Checkpoint, short_names
from craft_optim.evaluation.drift import drifts, spread_over
from craft_optim.evaluation.plots import draw_checkpoints

ROOT = Path(__file__).parents[2]

COUNT, WIDTH = 11, 9
LENGTHS = torch.arange(COUNT) % 6 + 2
CLOSURES = {"logits": anchors.LogitRetention, "hidden": anchors.HiddenRetention, "tokens": anchors.TokenRetention}


class Reader(nn.Module):
    """Logits at each token; looks at the tokens before; its maps are [C, 3, 3], its turned states [T, B, D]."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.map, self.turned, self.drop = nn.Identity(), nn.Identity(), nn.Dropout(0.5)

    def forward(self, batch):
        hidden = self.drop(self.body(self.embed(batch["input_ids"]).cumsum(1) / 2).tanh())
        self.map(hidden.mT.unflatten(-1, (3, 3)))
        self.turned(hidden.transpose(0, 1))
        return self.head(hidden)


def forward(model, batch):
    return model(batch)


def pooled(model, batch):
    """One vector of logits per anchor."""
    return model(batch).mean(1)


def written(model, batch):
    """The likeliest next token after each of the last valid ones."""
    labels = model(batch).argmax(-1)
    mask = batch["attention_mask"].bool()
    return batch, torch.where(mask & (torch.arange(WIDTH) > 0), labels, -100)


def halves(model, batch):
    mask = batch["attention_mask"].bool()
    return {"first": mask & (torch.arange(WIDTH) < 2), "rest": mask & (torch.arange(WIDTH) != 1)}


def batches():
    mask = (torch.arange(WIDTH) < LENGTHS[:, None]).long()
    ids = torch.randint(1, 20, (COUNT, WIDTH), generator=torch.Generator().manual_seed(3)) * mask
    for rows in torch.arange(COUNT).split(4):
        yield {"input_ids": ids[rows], "attention_mask": mask[rows]}


def unmasked():
    for batch in batches():
        yield {"input_ids": batch["input_ids"]}


HELD = {
    "all kinds": (Reading(forward, tokens=written), {"layers": ["body"], "shard_size": 4}),
    "top k": (Reading(forward), {"top_k": 3}),
    "one vector of logits": (Reading(pooled), {"dtype": torch.float32}),
    "spans": (
        Reading(forward, spans=halves, pooling={"first": "mean", "rest": "last"}),
        {"output": None, "layers": ["embed", "body"]},
    ),
    "spans, every position": (
        Reading(forward, spans=halves, pooling={"first": "none", "rest": "none"}),
        {"output": None, "layers": ["body"]},
    ),
    "maps": (Reading(forward, pooling={"all": "none"}), {"output": None, "layers": ["map"]}),
    "anchors second": (Reading(forward, batch_dim=1), {"output": None, "layers": ["turned"]}),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Reader()


def hold(model, path, what):
    reading, settings = HELD[what]
    settings = {"dtype": torch.float16, **settings}
    return anchors.build(model, unmasked() if what == "maps" else batches(), path, reading, **settings, class_dim=-1)


def move(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("what", HELD)
def test_it_is_the_closures_own_drift_and_that_of_each_anchor_alone(model, tmp_path, what):
    cache = hold(model, tmp_path, what)
    assert all(abs(drift.value) < 1e-4 for drift in drifts(model, cache))
    move(model)
    found = drifts(model, cache, batch_size=4)
    assert [drift.kind for drift in found] == (
        ["logits", "hidden", "tokens"] if what == "all kinds" else [found[0].kind]
    )
    for drift in found:
        retention = CLOSURES[drift.kind](model, cache, 4, strict=False)
        assert drift.value > 0.001
        assert drift.value == pytest.approx(retention.drift(), rel=1e-5)
        alone = [retention.drift([cache.read([i])]) for i in range(COUNT)]
        assert drift.each == pytest.approx(alone, rel=1e-4, abs=1e-6)
        for part in drift.layers:
            names = {
                "layers": [part.layer],
                "weights": {(part.layer, s): s == part.span for s in cache.features.pooling},
            }
            own = anchors.HiddenRetention(model, cache, 4, strict=False, **names)
            assert part.value == pytest.approx(own.drift(), rel=1e-5)
            assert part.each[3] == pytest.approx(own.drift([cache.read([3])]), rel=1e-4)
        assert len(drift.layers) == len(cache.features.variances) * (drift.kind == "hidden")


def test_some_anchors_in_an_order_of_their_own(model, tmp_path):
    cache = hold(model, tmp_path, "all kinds")
    move(model)
    whole = drifts(model, cache)
    for some, drift in zip(drifts(model, cache, [7, 2, 9], batch_size=2), whole, strict=True):
        assert some.each == pytest.approx([drift.each[i] for i in (7, 2, 9)], rel=1e-4, abs=1e-6)
    retention = anchors.LogitRetention(model, cache, 4, strict=False)
    some = drifts(model, cache, [7, 2, 9])[0]
    assert some.value == pytest.approx(retention.drift([cache.read([7, 2, 9])]), rel=1e-5)


def test_long_anchors_weigh_more_in_the_mean_and_not_in_the_mean_per_anchor(model, tmp_path):
    cache = hold(model, tmp_path, "all kinds")
    move(model)
    drift = drifts(model, cache)[0]
    compared = LENGTHS - 1  # all tokens but the first were written
    by_hand = sum(x * n for x, n in zip(drift.each, compared.tolist(), strict=True)) / int(compared.sum())
    assert drift.value == pytest.approx(by_hand, rel=1e-6)
    per_anchor = spread_over(drift.each).anchor_mean
    assert per_anchor == pytest.approx(sum(drift.each) / COUNT)
    assert abs(per_anchor - drift.value) > 1e-3 * drift.value, "or this test shows nothing"


def test_a_scaled_layer_moves_itself_and_the_later_ones_by_what_can_be_computed(tmp_path):
    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 6, bias=False) for name in "abc"}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    points = torch.randn(32, 6) + 1.0
    cache = anchors.build(model, [points], tmp_path, output=None, layers="abc", dtype=torch.float32)
    with torch.no_grad():
        states = dict(zip("abc", [layers["a"](points), model[:2](points), model(points)], strict=True))
        layers["b"].weight *= 1.2
    (drift,) = drifts(model, cache, batch_size=5)
    found = {part.layer: part for part in drift.layers}
    assert found["a"].value == pytest.approx(0.0, abs=1e-12)
    assert found["a"].each == pytest.approx([0.0] * 32, abs=1e-12)
    for name in "bc":  # every state h has become 1.2 h
        variance = states[name].var(0, correction=0).mean()
        expected = 0.04 * states[name].square() / variance
        assert found[name].value == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found[name].each == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
    assert drift.value == pytest.approx((found["b"].value + found["c"].value) / 3)
    assert drift.unit == "shares of the teacher's variance"


def test_the_model_is_left_as_it_was(model, tmp_path):
    cache = hold(model, tmp_path, "all kinds")
    model.train()
    model.body.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    drifts(model, cache)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_model_is_refused_in_the_closures_words(model, tmp_path):
    cache = hold(model, tmp_path, "top k")

    def changed(model, batch):
        return pooled(model, batch)

    changed.__qualname__ = "forward"
    model.head = nn.Linear(8, 21)
    with pytest.raises(anchors.AnchorMismatchError, match="another model, or another `forward=`"):
        drifts(model, cache)
    with pytest.raises(anchors.AnchorMismatchError, match="another model, or another `forward=`"):
        drifts(model, cache, reading=Reading(changed))
    with pytest.raises(ValueError, match="Found 0 and 16"):
        drifts(model, cache, [])


def test_anchors_without_a_valid_position_are_named(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    labels = torch.full((3, WIDTH), -100)
    labels[[0, 2], 4] = 7
    ids = torch.randint(3, 20, (3, WIDTH))
    shard = {"pixel_values": torch.rand(3, 3, 8, 8), "input_ids": ids, "attention_mask": torch.ones(3, WIDTH).long()}
    torch.save({**shard, "labels": labels}, old / "shard_0000.pt")
    (old / "metadata.json").write_text(json.dumps({"num_shards": 1, "num_anchors": 3}))
    cache = anchors.convert(old, tmp_path / "new")
    with pytest.raises(ValueError, match=r"No position of the anchors 1 in .*new is valid"):
        drifts(Reader(), cache, reading=Reading(forward))


def test_spread_over_anchors():
    each = [0.4, 0.1, 0.3, 0.2, 0.5]
    spread = spread_over(each, [10, 11, 12, 13, 14], threshold=0.3, worst=2)
    assert spread.quantiles == pytest.approx({"5%": 0.12, "25%": 0.2, "50%": 0.3, "75%": 0.4, "95%": 0.48, "max": 0.5})
    assert spread.over == pytest.approx(0.4), "0.3 itself is not above"
    assert spread.worst == [(14, 0.5), (10, 0.4)]
    assert spread.anchor_mean == pytest.approx(0.3)
    assert spread_over(each).over is None
    broken = spread_over([0.1, math.nan], threshold=0.3, worst=1)
    assert broken.over == 0.5, "a number that is none is not within"
    assert broken.worst[0][0] == 1


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["o/c/000100/p", "o/c/000200/p"], ["000100", "000200"]),
        (["/a/000100/p", "/a/last/x/p"], ["000100", "last/x"]),
        (["you/policy"], ["you/policy"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["same", "same"], ["same", "same"]),
        (["me/x", "you/y"], ["me/x", "you/y"]),
    ],
)
def test_short_names(paths, expected):
    assert short_names(paths) == expected


class Actor(nn.Module):
    """A policy that draws noise, keeps queues, and decodes at a temperature."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.body, self.scale = nn.Linear(4, 6), scale
        self.config = SimpleNamespace(temperature=0.7)
        self._queues, self._action_queue = {"action": deque([1], maxlen=3), "state": deque(maxlen=2)}, deque([5])
        self.seen = []

    def predict_action_chunk(self, batch):
        self.eval()
        self.seen.append((self.config.temperature, len(self._queues["action"]), len(self._action_queue)))
        self._queues["state"].append(batch["state"])
        drawn = torch.randn(len(batch["state"]), 2, 3)
        return self.scale * (self.body(batch["state"]).unflatten(1, (2, 3)) + drawn)


@pytest.fixture
def states(tmp_path):
    torch.manual_seed(0)
    batches = [{"state": torch.randn(5, 4), "task": torch.ones(5)} for _ in range(2)]
    actor = Actor()
    reading = Reading(lambda m, b: m.body(b["state"]))
    return anchors.build(actor, batches, tmp_path / "s", reading, dtype=torch.float32, class_dim=-1)


def test_actions_are_compared_under_the_same_noise(states):
    torch.manual_seed(0)
    teacher = Actor()
    student = Actor(1.5)
    student.load_state_dict(teacher.state_dict())
    drawn = torch.get_rng_state()
    first, same, moved = (predicted_actions(x, states, batch_size=4) for x in (teacher, teacher, student))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert first.shape == (10, 2, 3)
    assert torch.equal(first, same)
    torch.testing.assert_close(moved, 1.5 * first)
    assert not torch.equal(first, predicted_actions(teacher, states, batch_size=4, seed=1))
    apart = action_drift(first, moved)
    assert apart.mean_abs == pytest.approx(0.5 * float(first.abs().mean()))
    assert apart.rms == pytest.approx(0.5 * float(first.square().mean().sqrt()))
    assert apart.each == pytest.approx((0.5 * first.abs().mean((1, 2))).tolist())
    assert apart.mean_abs_per_dimension == pytest.approx((0.5 * first.abs().mean((0, 1))).tolist())
    assert apart.rms_per_dimension == pytest.approx((0.5 * first.square().mean((0, 1)).sqrt()).tolist())


def test_a_policy_is_left_with_its_queues_modes_and_temperature(states):
    actor = Actor().train()
    actor.body.eval()
    queues, queue = actor._queues, actor._action_queue
    predicted_actions(actor, states, [3, 1, 0], batch_size=2)
    assert actor.seen == [(0.0, 0, 0)] * 2, "greedy, and every batch without a past"
    assert actor._queues is queues
    assert actor._action_queue is queue
    assert (list(queues["action"]), len(queues["state"]), list(queue)) == ([1], 0, [5])
    assert (actor.training, actor.body.training, actor.config.temperature) == (True, False, 0.7)
    assert all(p.grad is None for p in actor.parameters())


def test_anchors_that_a_policy_cannot_act_on(states, model):
    actor = Actor()
    actor.predict_action_chunk = lambda batch: batch["observation.state"]
    with pytest.raises(ValueError, match=r"do not hold 'observation.state'.*They hold state, task"):
        predicted_actions(actor, states)
    assert actor.config.temperature == 0.7
    with pytest.raises(ValueError, match=r"predict_action_chunk.*Reader"):
        predicted_actions(model, states)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3, 5\)"):
        action_drift(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


SCRIPT = """
from collections import OrderedDict
import torch
from torch import nn

def teacher(scale=1.0):
    torch.manual_seed(0)
    made = nn.Sequential(OrderedDict(body=nn.Linear(6, 16), bend=nn.Tanh(), head=nn.Linear(16, 4)))
    with torch.no_grad():
        made.head.weight.mul_(scale)
    return made, [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]

def taught():
    return *teacher(), {"layers": ["body", "head"], "dtype": torch.float32, "class_dim": -1}

def of_categories():
    model, batches = teacher()
    return model, [{"input": x, "category": ["lift", "push"] * 4} for x in batches], {"class_dim": -1}

def step_100():
    print("words of a library that loads a model")
    return teacher(1.1)

def step_200():
    return teacher(1.4)

def broken():
    return teacher(float("nan"))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["build-anchors", "a", "--factory=mine.py:taught"]) == 0
    return "mine.py"


def test_several_checkpoints_in_tables_json_and_a_picture(script, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'craft-optim[report]'")
    capsys.readouterr()
    models = ["mine.py:taught", "mine.py:step_100", "mine.py:step_200"]
    epsilon = ["--epsilon", "logits=0.01", "hidden=0.05"]
    files = ["--json=drift.json", "--plot=drift.png"]
    assert main(["drift", "a", "--factory", *models, *epsilon, *files, "--worst=3", "--batch-size=7"]) == 0
    said = capsys.readouterr().out
    found = json.loads(Path("drift.json").read_text())
    assert (found["cache"], found["anchors"], found["epsilon"]) == ("a", 40, {"logits": 0.01, "hidden": 0.05})
    assert [row["path"] for row in found["checkpoints"]] == models
    still, little, much = (row["drift"] for row in found["checkpoints"])
    assert abs(still["logits"]["mean"]) < 1e-6
    assert still["logits"]["share_over_epsilon"] == 0.0
    assert 1e-4 < little["logits"]["mean"] < much["logits"]["mean"]
    cache = AnchorCache.open("a")
    model = sys.modules["craft_optim_factory"].step_200()[0]
    for kind in ("logits", "hidden"):
        assert much[kind]["mean"] == pytest.approx(CLOSURES[kind](model, cache, strict=False).drift(), rel=1e-5)
        each = much[kind]["each"]
        assert len(each) == 40
        assert much[kind]["share_over_epsilon"] == sum(x > found["epsilon"][kind] for x in each) / 40
        worst = sorted(range(40), key=lambda i: -each[i])[:3]
        assert [row["anchor"] for row in much[kind]["worst"]] == worst
        assert re.search(rf"step_200 .* {' '.join(map(str, worst))}\n", said)
        assert re.search(rf"step_200 +{much[kind]['mean']:.3g} +{much[kind]['anchor_mean']:.3g} ", said)
    body, head = much["hidden"]["layers"]
    assert (body["layer"], head["layer"], head["span"]) == ("body", "head", "all")
    assert body["mean"] == 0.0 < head["mean"]
    assert re.search(rf"step_200 +0 +{head['mean']:.3g}\n", said)
    assert Path("drift.png").read_bytes().startswith(b"\x89PNG")


def test_json_in_the_place_of_tables_is_nothing_but_json(script, capsys):
    capsys.readouterr()
    assert main(["drift", "a", "--factory=mine.py:step_100", "--json", "--count=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["places"] == [5, 15, 25, 35]
    assert main(["drift", "a", "--factory", "mine.py:broken", "--epsilon", "logits=1", "hidden=9", "--json"]) == 0
    broken = json.loads(capsys.readouterr().out)["checkpoints"][0]["drift"]["logits"]
    assert broken["mean"] is None
    assert broken["share_over_epsilon"] == 1.0, "a diverged model is not within epsilon"


def test_categories_are_told_apart(script, capsys):
    assert main(["build-anchors", "b", "--factory=mine.py:of_categories"]) == 0
    assert main(["inspect", "b", "--html=b.html"]) == 0
    assert re.search(r"Categories +lift 20, push 20\n", capsys.readouterr().out)
    titles = re.findall(r"Anchor (\d+): (lift|push)", Path("b.html").read_text())
    assert len(titles) == 24
    assert all(category == ("lift", "push")[int(place) % 2] for place, category in titles)
    assert main(["drift", "b", "--factory=mine.py:step_200", "--epsilon=0.01", "--json=d.json", "--worst=2"]) == 0
    said = capsys.readouterr().out
    about = json.loads(Path("d.json").read_text())["checkpoints"][0]["drift"]["logits"]
    for number, name in enumerate(("lift", "push")):
        of, each = about["categories"][name], about["each"][number::2]
        assert of["each"] == each
        assert of["anchor_mean"] == pytest.approx(sum(each) / 20)
        worst = [row["anchor"] for row in of["worst"]]
        assert worst == sorted(range(number, 40, 2), key=lambda place: -about["each"][place])[:2]
        shares = " +".join([f"{of['anchor_mean']:.3g}", *(f"{x:.3g}" for x in of["quantiles"].values())])
        over = f"{of['share_over_epsilon']:.0%}"
        assert re.search(rf"\n +{name} +20 +{shares} +{over} +{worst[0]} {worst[1]}\n", said)
    assert main(["drift", "b", "--factory", "mine.py:step_100", "mine.py:step_200"]) == 0
    found = capsys.readouterr().out
    columns = r"logits by category: means per anchor\n +category +anchors +mine.py:step_100 +mine.py:step_200\n"
    assert re.search(columns + r" +(lift|push) +20 +\S+ +\S+\n +(lift|push) +20 +\S+ +\S+\n", found)


def test_of_many_categories_the_worst_have_a_row(script, capsys, monkeypatch):
    monkeypatch.setattr("craft_optim.cli.work.drift._CATEGORIES", 2)
    source = Path("mine.py").read_text().replace('["lift", "push"] * 4', '["", "none", "a" * 300, "b\\nc"] * 2')
    Path("mine.py").write_text(source)
    assert main(["build-anchors", "c", "--factory=mine.py:of_categories"]) == 0
    capsys.readouterr()
    assert main(["drift", "c", "--factory=mine.py:step_200", "--json=d.json"]) == 0
    said = capsys.readouterr().out
    about = json.loads(Path("d.json").read_text())["checkpoints"][0]["drift"]["logits"]["categories"]
    assert about.keys() == {"", "none", "a" * 300, "b\nc"}
    worst = sorted(about, key=lambda name: -about[name]["anchor_mean"])
    shown = {"": "(none)", "none": "none", "a" * 300: "a" * 19 + " ... " + "a" * 16, "b\nc": "b c"}
    assert "logits by category, 2 others in --json" in said
    table = said.split("by category")[1]
    assert [name for name in worst if re.search(rf"\n +{re.escape(shown[name])} +10 ", table)] == worst[:2]


def test_where_each_anchor_has_its_own_category_there_is_no_second_table(script, capsys):
    source = Path("mine.py").read_text().replace('["lift", "push"] * 4', '[f"{float(row.sum())}" for row in x]')
    Path("mine.py").write_text(source)
    assert main(["build-anchors", "c", "--factory=mine.py:of_categories"]) == 0
    assert main(["drift", "c", "--factory=mine.py:step_200"]) == 0
    assert "by category" not in capsys.readouterr().out


def test_one_checkpoint_has_a_row_of_numbers_for_each_layer(script, capsys):
    capsys.readouterr()
    assert main(["drift", "a", "--factory=mine.py:step_200"]) == 0
    said = capsys.readouterr().out
    assert "Drift on 40 of 40 anchors" in said
    assert re.search(
        r"hidden by layer\n +layer +mean +per anchor +5% .*worst\n +body, all +0 +0 .*\n +head, all ", said
    )
    assert ">" not in said, "no share without an epsilon"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["a"], "--model.path for language models, or --factory"),
        (["a", "--factory=mine.py:taught", "--policy.path=p"], "--model.path for language models, or --factory"),
        (["--factory=mine.py:taught"], "pass the folder of a cache before the options"),
        (["--policy.path=p", "--teacher.path=t"], "--dataset.repo_id or --dataset.root"),
        (["--policy.path=p", "--dataset.repo_id=d"], "--teacher.path"),
        (["--policy.path=p", "--teacher.path=t", "--dataset.root=."], "no meta/info.json"),
        (["a", "--factory=mine.py:taught", "--teacher.path=t"], "--teacher.path goes with --policy.path"),
        (["a", "--policy.path=p", "--dataset.repo_id=d"], "--dataset.repo_id goes with a dataset"),
        (["a", "--policy.path=p", "--cache=b"], "--cache goes with a dataset"),
        (["a", "--factory=mine.py:taught", "--epsilon=0"], "must be a number > 0"),
        (["a", "--factory=mine.py:taught", "--epsilon", "kl=1"], "--epsilon kl=X: here logits and hidden are measured"),
        (["a", "--factory=mine.py:taught", "--epsilon", "logits=1", "logits=2"], "once for each"),
        (["a", "--factory=mine.py:taught", "--epsilon=0.1"], "pass --epsilon logits=X hidden=X"),
        (["a", "--factory=mine.py:taught", "--epsilon", "actions=1"], "here logits and hidden are measured"),
    ],
)
def test_wrong_arguments(script, capsys, arguments, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(["drift", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert remedy in said
    assert said.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["drift", "--help"])
    assert stopped.value.code == 0
    assert "craft-optim drift --" in capsys.readouterr().out


def test_a_file_that_could_not_be_written_is_refused_first(script, capsys):
    with pytest.raises(SystemExit):
        main(["drift", "a", "--factory=mine.py:taught", "--json=none/d.json"])
    assert "there is no folder none" in capsys.readouterr().err


def test_no_cache_in_the_folder(script, capsys):
    assert main(["drift", "nowhere", "--factory=mine.py:taught"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_picture_of_one_checkpoint_and_actions(tmp_path, states):
    pytest.importorskip("matplotlib", reason="pip install 'craft-optim[report]'")
    apart = action_drift(torch.zeros(10, 2, 3), torch.ones(10, 2, 3))
    actor = Actor()
    measured = drifts(actor, states)
    draw_checkpoints([Checkpoint("p", "p", measured, apart)], {"actions": 0.5}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000


def test_the_core_needs_none_of_the_extras():
    missing = ["scipy", "tqdm", "PIL", "rich", "matplotlib", "transformers", "lerobot"]
    commands = [file.stem for file in (ROOT / "craft_optim" / "cli" / "work").glob("*.py")]
    imports = "".join(f"; import craft_optim.cli.work.{name}" for name in commands)
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})){imports}; import craft_optim; craft_optim.plan"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_output_is_a_kind(script, tmp_path, capsys):
    """Of labels, values and named outputs, epsilon is told by the names that the cache has."""
    heads = "import torch\nfrom torch import nn\n\nclass Heads(nn.Module):\n"
    heads += "    def __init__(self):\n        super().__init__()\n"
    heads += "        torch.manual_seed(0)\n        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)\n"
    heads += "    def forward(self, x):\n        return self.a(x), self.b(x)\n\n"
    heads += 'def taught():\n    return Heads(), [torch.randn(8, 3)], {"output": {"0": "labels", "1": "values"}}\n'
    (tmp_path / "heads.py").write_text(heads)
    assert main(["build-anchors", "h", "--factory=heads.py:taught"]) == 0
    capsys.readouterr()
    assert main(["drift", "h", "--factory=heads.py:taught", "--epsilon", "0=1", "1=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["checkpoints"][0]["drift"]) == ["0", "1"]
