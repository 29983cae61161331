"""An anchor cache as one HTML page: pictures, prompts, states, what the teacher says, and where a model has drifted.

What a person can judge comes first; what the files hold is folded below it.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.structure import flatten
from craft_optim.evaluation.drift import Drift
from craft_optim.inspection import bytes_in_words, facts, lengths, tensors
from craft_optim.report.markup import Markup, asset, folded, page, table, tag
from craft_optim.report.numbers import number, percent

__all__ = ["render"]

Decode = Callable[[list[int]], str]

_SIDE = 224  # pixels of the longer side of a thumbnail
_VIEWS = 8  # pictures per anchor and input: a clip of 300 frames is told by its first ones
_POSITIONS = 6  # of the teacher's predictions
_IDS = re.compile(r"(^|[._])(input_ids|tokens|labels)$")
_LABELS = re.compile(r"(^|[._])labels$")
# Inputs of one whole number that say where an anchor is from -> word before the number
_PLACES = {
    "dataset_index": "dataset",
    "episode_index": "episode",
    "frame_index": "frame",
    "index": "row",
    "row": "row",
    "id": "id",
}


def render(
    cache: AnchorCache,
    indices: Sequence[int],
    shown: int | None = None,
    *,
    verified: bool = False,
    measured: Sequence[Drift] = (),
    verdict: tuple[bool, str] | None = None,
    decode: Decode | None = None,
) -> str:
    """The page.

    Args:
        indices: Anchors to choose from.
        shown: How many to show: those with the largest drift, if one was measured; else the first. None: all.
        measured: From `evaluation.drift.drifts`, on the same anchors; `verdict` from `evaluation.drift.verdict`.
        decode: Token ids -> text. None: ids are shown as numbers.

    Raises:
        ImportError: There are pictures, and Pillow is not installed.

    Cost: reads these anchors; per picture some kilobytes of page.
    """
    order = list(range(len(indices)))
    if measured:
        order.sort(key=lambda place: -abs(measured[0].each[place]))
    order = order[:shown]
    views = _Views(cache, [indices[place] for place in order])
    cards, without_words = [], False
    for rank, place in enumerate(order):
        batch = cache.read([indices[place]])
        flat = flatten(batch.inputs, batch.lengths)
        inputs = {name: x if name in flat.lengths else x[0] for name, x in flat.tensors.items()}
        sources = {name: x for name, x in inputs.items() if _is_place(name, x)}
        rest = {name: x for name, x in inputs.items() if name not in sources}
        without_words |= decode is None and any(_are_ids(name, x) for name, x in rest.items())
        head = [tag("h3", _title(cache, indices[place])), *_source(sources), *_badges(measured, place)]
        card = [
            tag("header", *head),
            *views.pictures(rank),
            _rows(rest, views.names, decode),
            _teacher(batch.features, decode),
        ]
        cards.append(tag("article", *(part for part in card if part)))

    few = len(order) < len(indices)
    caption = (
        f"all {len(cache):,}" if len(indices) == len(cache) else f"{len(indices):,} of {len(cache):,}, evenly spread"
    )
    caption = f"{len(order):,} of {caption}" if few else f"{caption[0].upper()}{caption[1:]}"
    caption += "; the largest drift first." if measured else "."
    if without_words:
        caption += " Numbers stand for tokens: the teacher's tokenizer is not here. --tokenizer=PATH shows words."
    named = [*facts(cache), ("Checksums", "verified" if verified else "not compared (--verify does)")]
    about = [part for label, text in named for part in (tag("dt", label), tag("dd", text))]
    teacher = cache.model_id or cache.settings["teacher"].get("class") or "a teacher without a name"
    lead = f"{len(cache):,} anchors of {teacher}: {cache.features.describe()}"
    name = cache.path.resolve().name
    sections = [
        tag("header", tag("p", "anchor cache", class_="kind"), tag("h1", name), tag("p", lead, class_="quiet lead")),
        _drift_section(measured, verdict),
        tag("section", tag("h2", "Anchors"), tag("p", caption, class_="quiet"), tag("div", *cards, class_="cards")),
        folded("About the cache", tag("dl", *about)),
        folded("Tensors", _tensors(cache)),
    ]
    return page(f"Anchors: {name}", sections, asset("cache.css"))


def _title(cache: AnchorCache, place: int) -> str:
    category = cache.categories[place].encode("utf-8", "replace").decode()
    return f"Anchor {place}" + (f": {category}" if category else "")


def _shown(name: str) -> str:
    """The name of an input; a place in a tuple is none by itself."""
    return f"input {name}" if name.isdigit() else name


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_place(name: str, x: Tensor) -> bool:
    return _last(name) in _PLACES and x.numel() == 1 and not x.is_floating_point()


def _source(places: Mapping[str, Tensor]) -> list[Markup]:
    """Where an anchor is from, as far as its inputs tell."""
    found = {_last(name): int(x.reshape(-1)[0]) for name, x in places.items()}
    told = [f"{word} {found[name]:,}" for name, word in _PLACES.items() if name in found]
    return [tag("span", " · ".join(told), class_="source")] if told else []


def _tensors(cache: AnchorCache) -> Markup:
    varying = {row.name: f"{row.shortest:,} / {number(row.mean)} / {row.longest:,}" for row in lengths(cache)}
    rows = [[name, shape, dtype, varying.get(name, "")] for name, shape, dtype in tensors(cache)]
    words = f"{bytes_in_words(cache.nbytes)} on disk. Shapes are those of one anchor; lengths leave out padding."
    columns = ["name", "shape", "dtype on disk -> read", "length: least / mean / most"]
    return Markup(tag("p", words, class_="quiet") + table(columns, rows))


def _drift_section(measured: Sequence[Drift], verdict: tuple[bool, str] | None) -> Markup:
    if verdict is None:
        return Markup("")
    rows = [
        [
            drift.kind,
            number(drift.value),
            number(median(drift.each)),
            number(max(drift.each)),
            "" if drift.tolerance is None else number(drift.tolerance),
            drift.unit,
        ]
        for drift in measured
    ]
    fits, words = verdict
    return tag(
        "section",
        tag("h2", "Drift of the model"),
        tag("p", words, class_="verdict fits" if fits else "verdict"),
        table(["kind", "mean", "median anchor", "worst anchor", "rounding", "unit"], rows),
    )


def _badges(measured: Sequence[Drift], place: int) -> list[Markup]:
    badges = []
    for drift in measured:
        share = abs(drift.each[place]) / max(max(map(abs, drift.each)), drift.tolerance or 0.0, 1e-12)
        bar = tag("i", style=f"width:{100 * share:.1f}%")
        words = f"{drift.kind} drift {number(drift.each[place])}"
        badges.append(tag("span", words, tag("b", bar), class_="drift", title=drift.unit))
    return badges


# Pictures


def _views_of(name: str, x: Tensor) -> Tensor | None:
    """An input of one anchor as pictures `[N, C, H, W]`, float32; None if it is something else.

    Pictures are bytes or floats `[C, H, W]` or `[N, C, H, W]` of 1 or 3 channels, which may also come last.
    """
    kind = x.dtype == torch.uint8 or x.is_floating_point()
    if not kind or x.ndim not in (3, 4) or "mask" in name.lower():
        return None
    x = x if x.ndim == 4 else x[None]
    if x.shape[1] not in (1, 3) and x.shape[-1] in (1, 3):
        x = x.movedim(-1, 1)
    return x.float() if x.shape[1] in (1, 3) and min(x.shape[2:]) >= 8 else None


def _range(pictures: Sequence[Tensor], are_bytes: bool) -> tuple[float, float]:
    """The values of black and white: one of the usual ranges, else that of nearly all values (normalised pictures)."""
    if are_bytes:
        return 0.0, 255.0
    values = torch.cat([x.reshape(-1)[:: max(1, x.numel() // 4096)] for x in pictures])
    values = values[values.isfinite()]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    for black, white in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if low >= black - 1e-3 and high <= white + 1e-3:
            return black, white
    low, high = torch.quantile(values, torch.tensor([0.005, 0.995])).tolist()
    return low, max(high, low + 1e-6)


class _Views:
    """The pictures of some anchors, made small; those of one input share their black and white."""

    def __init__(self, cache: AnchorCache, indices: Sequence[int]) -> None:
        self._small: list[dict[str, list[Tensor]]] = []
        self._hidden: list[dict[str, int]] = []
        are_bytes: dict[str, bool] = {}
        for i in indices:
            small, hidden = {}, {}
            batch = cache.read([i], features=False)
            flat = flatten(batch.inputs, batch.lengths)
            for name, x in flat.tensors.items():
                views = _views_of(name, x if name in flat.lengths else x[0])
                if views is not None:
                    are_bytes[name] = x.dtype == torch.uint8
                    small[name], hidden[name] = [_shrunk(view) for view in views[:_VIEWS]], max(0, len(views) - _VIEWS)
            self._small.append(small)
            self._hidden.append(hidden)
        self.names = set(are_bytes)
        self._ranges = {
            name: _range([x for small in self._small for x in small.get(name, ())], flag)
            for name, flag in are_bytes.items()
        }

    def pictures(self, place: int) -> list[Markup]:
        """The pictures of the anchor at this place in `indices`."""
        figures = []
        for name, views in self._small[place].items():
            black, white = self._ranges[name]
            title = f"{name}, shown from {number(black)} to {number(white)}"
            images = [tag("img", src=_data_uri(x, black, white), alt=name, title=title) for x in views]
            more = self._hidden[place][name]
            caption = tag("figcaption", _shown(name) + (f" and {more} more" if more else ""))
            figures.append(tag("figure", *images, caption))
        return [tag("div", *figures, class_="pictures")] if figures else []


def _shrunk(picture: Tensor) -> Tensor:
    height, width = picture.shape[1:]
    factor = _SIDE / max(height, width)
    if factor >= 1.0:
        return picture
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]


def _data_uri(picture: Tensor, black: float, white: float) -> str:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("Pictures on the page need Pillow: pip install 'craft-optim[report]'.") from None
    scaled = ((picture - black) / (white - black)).nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = scaled.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    kind = "PNG" if max(pixels.shape[:2]) <= 96 else "JPEG"  # of small pictures every pixel matters
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


# Everything else of an anchor


def _rows(inputs: Mapping[str, Tensor], pictures: set[str], decode: Decode | None) -> Markup:
    parts = []
    ids = [name for name, x in inputs.items() if _are_ids(name, x)]
    texts = [name for name in ids if not _LABELS.search(name)]
    whole = "prompt" if texts == ids else "text"  # with labels it has the answer, too
    # Words first: states and the like are for a second look
    for name, x in sorted(inputs.items(), key=lambda item: item[0] not in ids):
        if name in pictures or x.dtype == torch.bool or "mask" in name.lower():
            continue
        label = "counted for drift" if name in ids and name not in texts else _shown(name)
        if name in texts and (len(texts) == 1 or "language" in name):
            label = whole
        text = _text(_trimmed(x.tolist()), decode) if name in ids else _numbers(x)
        look = "text" if name in ids and decode else "numbers"
        parts += [tag("dt", label, title=name), tag("dd", text, class_=look)]
    return tag("dl", *parts, class_="inputs") if parts else Markup("")


def _are_ids(name: str, x: Tensor) -> bool:
    if x.ndim != 1 or x.is_floating_point() or x.dtype == torch.bool or not len(x):
        return False
    # Batches that are no mapping have no names to go by
    return bool(_IDS.search(name)) or (name.isdigit() and int(x.max()) > 1)


def _trimmed(ids: list[int]) -> list[int]:
    """Ids less the runs of one id at both ends, which are padding or the places of image tokens."""
    for _ in range(2):
        ids = ids[::-1]
        run = next((i for i, x in enumerate(ids) if x != ids[0]), len(ids))
        ids = ids[run:] if 1 < run < len(ids) else ids
    return ids


def _text(ids: list[int], decode: Decode | None) -> str:
    ids = [i for i in ids if i >= 0]
    text, longest = (" ".join(map(str, ids)), 240) if decode is None else (decode(ids).strip(), 600)
    return text if len(text) <= longest else text[:longest] + " ..."


def _numbers(x: Tensor) -> str:
    if x.ndim == 0 or (x.ndim == 1 and len(x) <= 32):
        return " ".join(_exact(value) for value in x.reshape(-1).tolist())
    shape = " x ".join(map(str, x.shape))
    if not x.numel() or x.is_complex():
        return shape
    low, mean, high = float(x.min()), float(x.double().mean()), float(x.max())
    return f"{shape}, from {number(low)} to {number(high)}, mean {number(mean)}"


def _exact(value: Any) -> str:
    """Whole numbers have all their digits: they may be names."""
    return number(value) if isinstance(value, float) else str(value)


def _teacher(features: Mapping[str, Tensor], decode: Decode | None) -> Markup:
    """What the teacher said, for each of its outputs that is kept: classes, labels, values, or what it wrote."""
    parts = list[Markup]()
    for key, x in features.items():
        kind, _, name = key.partition(".")
        of = f", {name}" if name else ""
        if kind in ("logprobs", "topk_logprobs"):
            places = features[key.replace("topk_logprobs", "topk_indices", 1)] if kind == "topk_logprobs" else None
            parts += _chances("classes", of, x.float().exp(), places, decode)
        elif kind == "logits":
            parts += _chances("labels", of, x.float().sigmoid(), None, None)
        elif kind == "values":
            parts += [tag("h4", f"The teacher's values{of}"), tag("p", _numbers(x[0].float()), class_="numbers")]
        elif kind == "tokens":
            parts += [
                tag("h4", f"The teacher wrote{of}"),
                tag("p", _text(x.reshape(-1).tolist(), decode), class_="text"),
            ]
    return tag("div", *parts, class_="teacher") if parts else Markup("")


def _chances(what: str, of: str, chances: Tensor, classes: Tensor | None, decode: Decode | None) -> list[Markup]:
    """The likeliest at each of the first positions that count.

    Args:
        what: "classes" or "labels".
        of: Name of the output, for the heading.
        chances: `[1, ..., n]`, the probabilities.
        classes: `[1, ..., n]`, what they are of, the likeliest first. None: they are of all, in order.
        decode: Class -> text.
    """
    flat = chances.flatten(0, -2)
    values, places = flat[:_POSITIONS].topk(min(3, flat.shape[-1]))
    if classes is not None:
        places = classes.flatten(0, -2)[:_POSITIONS].gather(-1, places)
    lines = []
    for position, (row, chosen) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        words = [
            tag("span", tag("code", _class(index, decode)), f" {percent(chance)}", style=f"--p:{100 * chance:.0f}%")
            for index, chance in zip(chosen, row, strict=True)
            if chance >= 0.005 or index == chosen[0]
        ]
        lines.append(tag("li", *([tag("small", str(position))] if len(flat) > 1 else []), *words))
    part = f"first {len(lines)} of {len(flat):,} positions" if len(lines) < len(flat) else f"all {len(flat)} positions"
    heading = f"The teacher's likeliest {what}{of}" if len(flat) == 1 else f"The teacher{of}, {part}"
    return [tag("h4", heading), tag("ol", *lines)]


def _class(index: int, decode: Decode | None) -> str:
    return str(index) if decode is None else repr(decode([index]))[1:-1] or str(index)
