"""What a plan says: its sums, what it leaves alone, what it refuses."""

import dataclasses
import json
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from craft_optim import Plan, Rules, plan
from craft_optim.anchors import Reading
from craft_optim.planning.gpus import Blocks, blocks_of
from craft_optim.planning.live_memory import LiveMemory
from craft_optim.planning.phases import Pass, Phases

MB = 10**6


class Words(nn.Module):
    """Embedding, layers, head; what a step of it does can be told by a flag."""

    def __init__(self, classes=300, width=32, trap=""):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, classes, bias=False)
        self.register_buffer("scale", torch.ones(1))
        self.dropout, self.trap = nn.Dropout(0.5), trap

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        if self.trap == "branch" and bool((ids > 3).all()):
            return None
        if self.trap == "shape":
            ids = ids[ids > 0].unsqueeze(0)
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        if self.trap == "log":
            x.mean().item()
        return self.head(x)


def next_words(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def ids(size=4, length=12):
    return torch.randint(0, 300, (size, length))


def planned(model=None, batch=None, **settings):
    model = Words() if model is None else model
    return plan(model, ids() if batch is None else batch, **{"loss": next_words, "class_dim": -1, **settings})


@pytest.fixture
def numbers():
    """A plan of round numbers, in MB."""
    phases = Phases(
        weights=100 * MB,
        inputs=1 * MB,
        state=200 * MB,
        gradients=100 * MB,
        rounded=50 * MB,
        trained=100 * MB,
        trained_count=25 * MB,
        base_step=100 * MB,
        passes={
            ("task", False): Pass(400 * MB, 350 * MB, 1000),
            ("anchors", False): Pass(300 * MB, 250 * MB, 500),
            ("task", True): Pass(150 * MB, 60 * MB, 1300),
            ("anchors", True): Pass(120 * MB, 40 * MB, 650),
        },
        checkpointing=False,
        question=20 * MB,
        look=Pass(30 * MB, 30 * MB, 100),
        kept=24000.0,
        logits=80 * MB,
        piece=16 * MB,
        left_out=True,
        read=0,
    )
    return Plan(phases, 25 * MB, 25 * MB, 8, 4, 512, 50_000.0, Blocks(20 * MB, 40 * MB), Rules())


def test_peaks_are_sums(numbers):
    held = {name: numbers.peak(name) / MB for name in ("base", "copy", "bfloat16", "host")}
    # 301 there; 400 of the task, or 100 + 300 of the anchors, or 100 in wait, 100, 100 of values and 100 to work with
    assert held == {"base": 701, "copy": 701, "bfloat16": 701, "host": 701}
    held = {name: numbers.peak(name, True) / MB for name in ("base", "copy", "bfloat16", "host")}
    assert held == {"base": 501, "copy": 701, "bfloat16": 651, "host": 501}
    without = dataclasses.replace(numbers, rules=Rules(trust_region=None))
    assert without.peak("copy", True) / MB == 601
    assert numbers.disk == 25_600_000


def test_the_cost_of_a_step(numbers):
    assert (numbers.cost(1), numbers.cost(5), numbers.cost(1, 0.5)) == (1.5, 1.1, 1.25)


def test_gpus(numbers):
    def fits(gib, checkpointing=None):
        found = numbers.fits(gib, checkpointing=checkpointing)
        return found.one, found.ddp, found.fsdp

    assert fits(1.0) == (True, True, 1)
    assert fits(0.75) == (True, False, 1)  # 725 MB: 701, and no room for buckets
    # 604 MB: of 101 gathered and 350 activations 153 are left for shares of 500; in the step 473 for 700
    assert fits(0.625) == (False, False, 4)
    assert fits(0.4) == (False, False, None)  # 387 MB are not enough for what is not sharded
    assert fits(0.4, True) == (False, False, 3)  # 226 left for 500; 256 for 700


def test_all_of_it_is_json_and_words(numbers):
    about = json.loads(json.dumps(numbers.as_dict((80.0,))))
    assert about["peaks"]["with checkpointing"]["bfloat16"] == 651 * MB
    assert about["gpus"]["without checkpointing"] == [{"gib": 80.0, "one": True, "ddp": True, "fsdp": 1}]
    said = str(numbers)
    for words in ("25,000,000", "95.4 MiB", "K = 10", "25.6 MB", "with checkpointing"):
        assert words in said, words


def test_a_model_with_weights_one_without_and_a_real_run_are_planned_alike():
    with torch.device("meta"):
        empty = Words()
    model, batch = Words(), ids()
    assert planned(empty, batch).as_dict() == planned(model, batch).as_dict()
    real = planned(model, batch, values=True)
    for held in ("base", "copy"):
        assert real.peak(held) == pytest.approx(planned(model, batch).peak(held), rel=0.02)


def test_nothing_is_changed():
    model = Words().eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    parameters, generator = list(model.parameters()), torch.get_rng_state()
    for values in (False, True):
        planned(model, values=values, batch=torch.ones(4, 12, dtype=torch.long))
    assert not model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in parameters)
    assert isinstance(model.scale, torch.Tensor)
    assert model(ids()).shape == (4, 12, 300)


def test_what_is_counted():
    model = Words()
    found = planned(model, top_k=8, count=100)
    of, size = found.phases, sum(p.numel() for p in model.parameters())
    assert (found.parameters, found.trained) == (size, size)
    assert (of.gradients, of.rounded, of.weights) == (4 * size, 2 * size, 4 * size + 4)
    assert of.state == pytest.approx(8 * size, rel=0.01)
    assert of.base_step == pytest.approx(4 * size, rel=0.01), "AdamW over lists works with a copy"
    assert of.left_out
    assert of.logits == 4 * 48 * 300
    assert found.per_anchor == 12 * 8 + 12 * (8 * 6 + 2)
    assert found.disk == 100 * found.per_anchor
    assert blocks_of(model) == Blocks(4 * (32 * 32 + 32), 4 * 2 * 300 * 32)
    assert found.cost(1) == pytest.approx(2.0), "the same batch again"
    all_classes = planned(model, valid=0.5)
    assert all_classes.per_anchor == 12 * 8 + 6 * 600


def test_a_batch_may_hold_more_than_tensors():
    batch = UserDict(x=ids(), task=["a"] * 4, nothing=None)
    settings = {"loss": lambda model, given: next_words(model, given["x"]), "forward": lambda m, b: m(b["x"])}
    found = planned(batch=batch, **settings)
    assert found.as_dict() == {**planned(batch=batch["x"]).as_dict(), "inputs": found.phases.inputs}
    assert found.per_anchor == 12 * 8 + 12 * 600


def test_the_base_and_what_trains_count():
    model = Words()
    model.embed.requires_grad_(False)
    rest = 3 * (32 * 32 + 32) + 32 * 300
    found = planned(model, base=lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False))
    assert (found.trained, found.phases.gradients) == (rest, 4 * rest)
    assert found.phases.state < 100
    assert found.phases.base_step < 4 * 32 * 300


def test_what_is_taken_for_granted_is_noted():
    found = planned(Words(trap="log"), loss=None)
    assert found.notes[0].startswith("No loss of the task was given")
    assert found.notes[1].startswith("The plan has no values: where Words reads one of a tensor (")
    assert found.notes[2] == "It is not known how to turn activation checkpointing on in Words."
    assert all(note in str(found) for note in found.notes)
    assert any("`valid`" in note for note in planned(reading=Reading(mask=lambda batch: batch > 0)).notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": Words(trap="branch")}, r"needs the values of a tensor, by aten\._local_scalar_dense.* values=True"),
        ({"model": Words(trap="shape")}, r"needs the values of a tensor, by aten\.nonzero.*Leave masks out"),
        ({"loss": lambda model, x: model(x)}, "`loss` must return a scalar"),
        ({"valid": 1.5}, "must be <= 1. Found 1.5"),
        ({"valid": 0.0}, "valid"),
        ({"count": 0}, "count"),
        ({"top_k": 0}, "top_k"),
        ({"model": Words().requires_grad_(False)}, "Nothing of Words trains"),
        ({"model": nn.Sequential(nn.LazyLinear(3))}, "before it is sharded or quantised"),
        ({"output": None}, "Nothing is kept of the model"),
        ({"tokens": 3}, "`tokens`=3: leave it out"),
        ({"model": Words().to("meta"), "values": True}, "values=True needs a model with weights"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        planned(**settings)


def test_a_loss_is_asked_for_where_the_model_gives_none():
    with pytest.raises(ValueError, match=r"Words returned a tensor \(4, 12, 300\), which .* has none: put `labels`"):
        plan(Words(), ids())


def test_what_needs_values_runs_with_them():
    batch = torch.ones(4, 12, dtype=torch.long)
    assert planned(Words(trap="shape"), batch, values=True, loss=lambda model, x: model(x).mean()).peak("copy") > 0


def test_live_memory_of_real_tensors():
    with LiveMemory() as memory:
        x = torch.zeros(1000)
        view = x[:10]
        memory.begin()
        y = x + 1.0
        del y
        assert (memory.live, memory.peak) == (4000, 8000)
        memory.set_aside(x)
        memory.begin()
        assert memory.rest == 0
        del x
        assert memory.live == 4000, "a view of it is there"
        del view
        assert (memory.live, memory.rest) == (0, 0)
        x = torch.zeros(10, 100)
        memory.begin()
        x.logsumexp(-1)
        assert memory.peak == 2 * 4000 + 40, "a copy, of which no operation tells"
        torch.ones(8, 16) @ torch.ones(16, 4)
        assert memory.flops == 2 * 8 * 16 * 4


def test_shared_queries_and_products_in_place_count():
    q, k = torch.zeros(2, 4, 8, 16, requires_grad=True), torch.zeros(2, 2, 8, 16)
    with LiveMemory() as memory:
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        shared, _ = memory.flops, memory.begin()
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        forward = 2 * 2 * (2 * 4) * 8 * 8 * 16
        assert shared == forward
        assert memory.flops >= 3 * forward
        memory.begin()
        torch.zeros(3, 5).addmm_(torch.zeros(3, 4), torch.zeros(4, 5))
        assert memory.flops == 2 * 3 * 4 * 5
