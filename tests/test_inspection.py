"""What is said of a cache, the page about it, and the drift of a model on it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from craft_optim import anchors
from craft_optim.anchors import Reading
from craft_optim.anchors.sampling import spread
from craft_optim.evaluation.drift import drifts, verdict
from craft_optim.inspection import bytes_in_words, facts, lengths
from craft_optim.report.cache_page import render

Image = pytest.importorskip("PIL.Image", reason="pip install 'craft-optim[report]'")

EVIL = "<script>alert('x')</script>"
QUOTED = 'x" onload="y"><script>'
COUNT = 10
VALID = torch.arange(COUNT) % 4 + 3  # tokens of each anchor
VOID = {"img", "meta"}


class Reader(nn.Module):
    """Logits at each token; a hidden state per token; looks at the states."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, batch):
        return self.head(self.body(self.embed(batch["input_ids"]) + batch["state"].mean(-1)[:, None, None]).tanh())


def forward(model, batch):
    return model(batch)


def written(model, batch):
    """The likeliest next token after each of the prompt's last three."""
    labels = model(batch).argmax(-1)
    labels[:, :-3] = -100
    return batch, labels


def frames(black, white):
    """Of each anchor 3 x 8 x 12 values that reach from black to white, another picture for each."""
    ramp = torch.linspace(0, 1, 3 * 8 * 12).reshape(3, 8, 12)
    return torch.stack([ramp.roll(i, -1) for i in range(COUNT)]) * (white - black) + black


PICTURES = {
    "pixels": frames(0.0, 1.0),
    "pixel_values": frames(-1.0, 1.0),
    "bytes": frames(0, 255).round().to(torch.uint8),
    "stack": torch.stack([frames(-2.1, 2.6), frames(-2.1, 2.6).flip(-1)], 1),
    "last.channel": frames(0.0, 1.0).movedim(1, -1),
    "clip": frames(0.0, 255.0)[:, None].repeat(1, 11, 1, 1, 1),
}


def batches():
    mask = (torch.arange(8) < VALID[:, None]).long()
    ids = torch.randint(1, 20, (COUNT, 8), generator=torch.Generator().manual_seed(3)) * mask
    state = torch.arange(COUNT * 2).reshape(COUNT, 2) / 10
    whole = {"input_ids": ids, "attention_mask": mask, "state": state, EVIL: torch.ones(COUNT, 5, 2), **PICTURES}
    whole[QUOTED] = torch.zeros(COUNT, 1, 8, 8)  # looks like a picture, and is shown as one
    whole["attention_mask.4d"] = torch.zeros(COUNT, 1, 8, 8)  # does not
    for rows in torch.arange(COUNT).split(4):
        yield {name: x[rows] for name, x in whole.items()}


@pytest.fixture
def model():
    return Reader()


@pytest.fixture
def cache(model, tmp_path):
    settings = {"layers": ["body"], "dtype": torch.float32, "model_id": EVIL, "shard_size": 4}
    return anchors.build(model, batches(), tmp_path / "cache & <b>", Reading(forward), **settings, class_dim=-1)


class Page(HTMLParser):
    """Elements, properly nested, and the text outside of styles."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def pixels(attrs):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", attrs["src"]).groups()
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format == kind.upper()
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_the_page_is_well_formed_and_loads_nothing(cache, model):
    shown = drifts(model, cache, [1, 5, 8])
    text = render(cache, [1, 5, 8], verified=True, measured=shown, verdict=verdict(cache, model, shown))
    page = Page(text)
    assert "//" not in re.sub(r'src="data:[^"]*"', "", text), "no address of any kind"
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert QUOTED in {x["alt"] for x in page.all("img")}
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert [x["content"] for x in page.all("meta") if x.get("http-equiv") == "Content-Security-Policy"] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    words = " ".join(page.text)
    assert words.count(EVIL) >= 5, "as text: the teacher, the batches, the tensors, and each anchor"
    assert "cache & <b>" in words
    # Of each anchor five inputs with a picture, two views, eight of the eleven of the clip
    assert len(page.all("img")) == 3 * (5 + 2 + 8)
    assert "clip and 3 more" in words
    assert "attention_mask.4d" not in {x["alt"] for x in page.all("img")}
    assert words.index("Drift of the model") < words.index("Anchor 5") < words.index("About the cache")
    unfolded = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert "Anchor 5" in unfolded
    assert "Fingerprint" not in unfolded, "what the files hold is for who asks"
    assert "float32" not in unfolded.partition("<h2>Anchors")[2]


@pytest.mark.parametrize("name", ["pixels", "pixel_values", "bytes", "stack", "last.channel", "clip"])
def test_pictures_are_shown_from_black_to_white(cache, name):
    shown = [x for x in Page(render(cache, range(COUNT))).all("img") if x["alt"] == name]
    assert len(shown) == COUNT * {"stack": 2, "clip": 8}.get(name, 1)
    expected = frames(0.0, 255.0)
    for i in (0, 7):
        found = pixels(shown[i * len(shown) // COUNT]).float()
        # Of what is in no usual range, the outermost half percent on both sides is cut
        assert (found - expected[i]).abs().max() < (3.0 if name == "stack" else 1.0)


def test_large_pictures_are_made_small(tmp_path):
    cache = anchors.build(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 300 * 600, 2)),
        [torch.rand(2, 3, 300, 600)],
        tmp_path,
        class_dim=-1,
    )
    (picture, _) = Page(render(cache, [0, 1])).all("img")
    assert pixels(picture).shape == (3, 112, 224)
    assert len(picture["src"]) < 40_000


def test_words_and_numbers_of_an_anchor(cache):
    decoded = []

    def decode(ids):
        decoded.append(ids)
        return "".join(chr(96 + i) for i in ids)

    prompt = cache.read([6]).inputs["input_ids"][0][: VALID[6]].tolist()
    words = " ".join(Page(render(cache, [6], decode=decode)).text)
    assert prompt in decoded, "without its padding"
    assert decode(prompt) in words
    assert "1.2 1.3" in words, "the state"
    best = cache.read([6]).features["logprobs"][0].exp().topk(1)
    assert f"{decode(best.indices.tolist())}  {best.values[0]:.0%}".replace("%", " %") in words
    assert f"The teacher, all {VALID[6]} positions" in words
    assert "the teacher's tokenizer is not here" not in words
    without = " ".join(Page(render(cache, [6])).text)
    assert " ".join(map(str, prompt)) in without, "ids, where there is no tokenizer"
    assert "Numbers stand for tokens: the teacher's tokenizer is not here. --tokenizer=PATH shows words." in without


def card(cache, place, **settings):
    """The inputs of an anchor as its card names and shows them, and the line beside its title."""
    text = render(cache, [place], **settings).partition("<h2>Anchors")[2].partition("<details>")[0]
    named = re.findall(r'<dt title="[^"]*">([^<]*)</dt><dd class="[^"]*">([^<]*)</dd>', text)
    return dict(named), re.findall(r'<span class="source">([^<]*)</span>', text)


class Heads(nn.Module):
    def forward(self, x):
        return {"kind": x[:, :3], "tags": x[:, 3:5], "size": x[:, 5:]}


def told(cache):
    """What the page says of the first anchor's teacher, without elements."""
    (_, teacher) = render(cache, [0]).split('<div class="teacher">')
    plain = re.sub(r"<[^>]*>", "|", teacher.partition("</article>")[0]).replace("&#x27;", "'")
    return [part.strip() for part in plain.split("|") if part.strip()]


def test_every_output_of_the_teacher_is_shown(tmp_path):
    x = torch.tensor([[0.0, 3.0, 1.0, -1.0, 2.0, 0.25]]) * torch.tensor([[1.0], [1.5]])
    outputs = {"kind": "classes", "tags": "labels", "size": "values"}
    cache = anchors.build(Heads(), [x], tmp_path, output=outputs, dtype=torch.float32, class_dim=-1)
    found = told(cache)
    classes, labels = (found.index(f"The teacher's likeliest {what}") for what in ("classes, kind", "labels, tags"))
    assert found[classes + 1 : classes + 3] == ["1", f"{100 * x[0, :3].softmax(0)[1]:.0f} %"]
    assert found[labels + 1 : labels + 5] == ["1", "88 %", "0", "27 %"]
    values = found.index("The teacher's values, size")
    assert found[values + 1] == "0.25"


def test_of_the_likeliest_classes_alone_the_names_are_right(tmp_path):
    x = torch.arange(6.0).roll(2).repeat(2, 1)
    whole = anchors.build(nn.Identity(), [x], tmp_path / "all", class_dim=-1)
    some = anchors.build(nn.Identity(), [x], tmp_path / "some", class_dim=-1, top_k=4)
    assert told(whole) == told(some)
    assert told(some)[1::2][:3] == ["1", "0", "5"]


def test_words_come_before_numbers_and_have_names_of_everyday(model, tmp_path):
    def rows(labels):
        batch = next(batches())
        ids = batch["input_ids"]
        counted = {"labels": torch.where(torch.arange(8) > 1, ids, -100)} if labels else {}
        return [{"state": batch["state"], **counted, "input_ids": ids}]

    decode = " ".join
    words = {"decode": lambda ids: decode(chr(96 + i) for i in ids)}
    first = anchors.build(model, rows(labels=False), tmp_path / "a", Reading(forward), class_dim=-1)
    shown, _ = card(first, 1, **words)
    assert [*shown] == ["prompt", "state"], "though the state is the first input"
    ids = [i for i in next(batches())["input_ids"][1].tolist() if i]
    assert shown["prompt"] == words["decode"](ids)
    second = anchors.build(model, rows(labels=True), tmp_path / "b", Reading(forward), class_dim=-1)
    shown, _ = card(second, 1, **words)
    assert [*shown] == ["counted for drift", "text", "state"]
    assert shown["counted for drift"] == words["decode"](ids[2:])


def test_where_an_anchor_comes_from(model, tmp_path):
    batch = next(batches()) | {
        "category": ["open", "close", "open", "lift"],
        "episode_index": torch.tensor([3, 3, 4, 1200]),
        "observation.frame_index": torch.tensor([0, 17, 5, 9]),
        "reward": torch.tensor([0.5, 0.25, 0.0, 1.0]),
    }
    cache = anchors.build(model, [batch], tmp_path, Reading(forward), class_dim=-1)
    shown, source = card(cache, 3)
    assert source == ["episode 1,200 · frame 9"]
    assert "episode_index" not in shown
    assert shown["reward"] == "1"
    assert "<h3>Anchor 3: lift</h3>" in render(cache, [3])
    assert card(cache, 1)[1] == ["episode 3 · frame 17"]


def test_what_the_teacher_wrote(model, tmp_path):
    cache = anchors.build(model, batches(), tmp_path, Reading(forward, tokens=written), output=None)
    words = " ".join(Page(render(cache, [1], decode=lambda ids: "-".join(map(str, ids)))).text)
    assert f"The teacher wrote {'-'.join(map(str, cache.read([1]).features['tokens'].tolist()))}" in words


def test_facts(cache):
    found = dict(facts(cache))
    assert found["Anchors"] == "10 in 3 shards"
    assert found["Teacher"] == f"{EVIL} · Reader"
    assert found["Fingerprint"] == cache.fingerprint
    assert found["Built with"] == "forward=forward, images=uint8, shard_size=4"
    size = sum(file.stat().st_size for file in cache.path.glob("*.safetensors"))
    assert found["Size on disk"] == f"{size / 1e3:.3g} kB, {size / 1e4:.3g} kB per anchor"
    assert "Imported from" not in found


def test_lengths_leave_out_padding(cache):
    found = {row.name: row[1:] for row in lengths(cache)}
    expected = (3, float(VALID.float().mean()), 6)
    assert found["features.logprobs"] == pytest.approx(expected)
    assert found["inputs.input_ids"] == pytest.approx(expected)
    assert "inputs.state" not in found


@pytest.mark.parametrize(
    ("total", "count", "expected"), [(10, 3, [1, 5, 8]), (3, 24, [0, 1, 2]), (1, 1, [0]), (1000, 1, [500])]
)
def test_spread(total, count, expected):
    assert spread(total, count) == expected


def test_bytes_in_words():
    found = [bytes_in_words(x) for x in (0, 999, 1000, 15_300, 2.5e6, 3e9, 4e12)]
    assert found == ["0 bytes", "999 bytes", "1 kB", "15.3 kB", "2.5 MB", "3 GB", "4e+03 GB"]


def test_an_unmodified_model_fits_and_a_changed_one_does_not(cache, model):
    places = list(range(COUNT))
    same = drifts(model, cache, places)
    assert [drift.kind for drift in same] == ["logits", "hidden"]
    assert all(abs(drift.value) < 1e-6 for drift in same)
    assert verdict(cache, model, same) == (True, "The cache fits this model: its drift is rounding.")

    with torch.no_grad():
        model.embed.weight[cache.read([7]).inputs["input_ids"][0, 0]] += 2.0
        model.head.bias[3] += 0.01
    moved = drifts(model, cache, places)
    for drift, closure in zip(moved, (anchors.LogitRetention, anchors.HiddenRetention), strict=True):
        whole = closure(model, cache, batch_size=4).drift()
        assert drift.value == pytest.approx(whole) != pytest.approx(0.0, abs=drift.tolerance)
        weights = VALID if drift.kind == "logits" else torch.ones(COUNT)
        mean = (torch.tensor(drift.each) * weights).sum() / weights.sum()
        assert float(mean) == pytest.approx(whole, rel=1e-4), "each anchor's share"
    fits, words = verdict(cache, model, moved)
    assert not fits
    assert f"{moved[0].value:.3g} nats" in words
    assert "other weights" in words

    shown = [3, 7, 0, 5]
    each = drifts(model, cache, shown)
    heads = re.findall(r"Anchor (\d)", " ".join(Page(render(cache, shown, measured=each, verdict=(fits, words))).text))
    by_drift = sorted(shown, key=lambda i: -moved[0].each[i])
    assert list(map(int, heads)) == by_drift != shown


def test_the_teachers_weights_under_another_forward(cache, model):
    def other(model, batch):
        return model({**batch, "state": batch["state"] + 1})

    other.__qualname__ = forward.__qualname__  # changed since the cache was built
    fits, words = verdict(cache, model, drifts(model, cache, [0, 4], reading=Reading(other)))
    assert not fits
    assert "Its weights are those of the teacher" in words


def test_all_kinds_and_features_that_do_not_vary(model, tmp_path):
    reading = Reading(forward, tokens=written, autocast=torch.bfloat16)
    alike = [{name: x[:1] for name, x in next(batches()).items()}]
    cache = anchors.build(model, alike, tmp_path, reading, layers=["body"], dtype=torch.float32, class_dim=-1)
    assert cache.features.variances == {"hidden.module:body.all": 0.0}
    found = drifts(model, cache, [0])
    assert {drift.kind: drift.unit for drift in found} == {
        "logits": "nats per position (KL)",
        "hidden": "cosine distance",
        "tokens": "nats per token",
    }
    assert all(abs(drift.value) < 1e-5 for drift in found), "under the autocast of the build"


def test_without_pillow(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'craft-optim\[report\]'"):
        render(cache, [0])
