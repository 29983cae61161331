"""An anchor cache as one HTML page: pictures, prompts, states, what the teacher says, and where a model has drifted."""

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
from craft_optim.report.markup import Markup, asset, page, table, tag

__all__ = ["render"]

Decode = Callable[[list[int]], str]

_SIDE = 224  # pixels of the longer side of a thumbnail
_VIEWS = 8  # pictures per anchor and input: a clip of 300 frames is told by its first ones
_POSITIONS = 6  # of the teacher's predictions
_IDS = re.compile(r"(^|[._])(input_ids|tokens|labels)$")


def render(
    cache: AnchorCache,
    indices: Sequence[int],
    *,
    verified: bool = False,
    measured: Sequence[Drift] = (),
    verdict: tuple[bool, str] | None = None,
    decode: Decode | None = None,
) -> str:
    """The page.

    Args:
        indices: Anchors to show; those with the largest drift come first, if one was measured.
        measured: From `evaluation.drift.drifts`, on the same anchors; `verdict` from `evaluation.drift.verdict`.
        decode: Token ids -> text. None: ids are shown as numbers.

    Raises:
        ImportError: There are pictures, and Pillow is not installed.

    Cost: reads these anchors; per picture some kilobytes of page.
    """
    order = list(range(len(indices)))
    if measured:
        order.sort(key=lambda place: -abs(measured[0].each[place]))
    views = _Views(cache, indices)
    cards = []
    for place in order:
        batch = cache.read([indices[place]])
        flat = flatten(batch.inputs, batch.lengths)
        inputs = {name: x if name in flat.lengths else x[0] for name, x in flat.tensors.items()}
        card = [
            tag("header", tag("h3", _title(cache, indices[place])), *_badges(measured, place)),
            *views.pictures(place),
            _rows(inputs, views.names, decode),
            _teacher(batch.features, decode),
        ]
        cards.append(tag("article", *(part for part in card if part)))

    which = f"All {len(cache)}" if len(indices) == len(cache) else f"{len(indices)} of {len(cache)}, evenly spread"
    caption = f"{which}; the largest drift first." if measured else f"{which}."
    named = [*facts(cache), ("Checksums", "verified" if verified else "not compared (--verify does)")]
    about = [part for label, text in named for part in (tag("dt", label), tag("dd", text))]
    sections = [
        tag("header", tag("p", "anchor cache", class_="kind"), tag("h1", cache.path.resolve().name)),
        _drift_section(measured, verdict),
        tag("section", tag("h2", "What it is"), tag("dl", *about)),
        tag("section", tag("h2", "Tensors"), _tensors(cache)),
        tag("section", tag("h2", "Anchors"), tag("p", caption, class_="quiet"), tag("div", *cards, class_="cards")),
    ]
    return page(f"Anchors: {cache.path.resolve().name}", sections, asset("cache.css"))


def _title(cache: AnchorCache, place: int) -> str:
    category = cache.categories[place].encode("utf-8", "replace").decode()
    return f"Anchor {place}" + (f": {category}" if category else "")


def _tensors(cache: AnchorCache) -> Markup:
    varying = {row.name: f"{row.shortest} / {row.mean:.3g} / {row.longest}" for row in lengths(cache)}
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
            f"{drift.value:.3g}",
            f"{median(drift.each):.3g}",
            f"{max(drift.each):.3g}",
            "" if drift.tolerance is None else f"{drift.tolerance:.1g}",
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
        words = f"{drift.kind} {drift.each[place]:.3g}"
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
            title = f"{name}, shown from {black:.3g} to {white:.3g}"
            images = [tag("img", src=_data_uri(x, black, white), alt=name, title=title) for x in views]
            more = self._hidden[place][name]
            caption = tag("figcaption", name + (f" and {more} more" if more else ""))
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
    for name, x in inputs.items():
        if name in pictures or x.dtype == torch.bool or "mask" in name.lower():
            continue
        text = _text(_trimmed(x.tolist()), decode) if _are_ids(name, x) else _numbers(x)
        parts += [tag("dt", name), tag("dd", text, class_="text" if _are_ids(name, x) and decode else "numbers")]
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
    text, longest = (" ".join(map(str, ids)), 240) if decode is None else (decode(ids), 600)
    return text if len(text) <= longest else text[:longest] + " ..."


def _numbers(x: Tensor) -> str:
    if x.ndim == 0 or (x.ndim == 1 and len(x) <= 32):
        return " ".join(_number(value) for value in x.reshape(-1).tolist())
    shape = " x ".join(map(str, x.shape))
    if not x.numel() or x.is_complex():
        return shape
    low, mean, high = float(x.min()), float(x.double().mean()), float(x.max())
    return f"{shape}, from {_number(low)} to {_number(high)}, mean {_number(mean)}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _teacher(features: Mapping[str, Tensor], decode: Decode | None) -> Markup:
    """The likeliest classes at the first positions that count, or what the teacher wrote."""
    lines = []
    predictions, total = _predictions(features)
    for position, guesses in enumerate(predictions):
        words = [
            tag("span", tag("code", _class(number, decode)), f" {chance:.0%}", style=f"--p:{100 * chance:.0f}%")
            for number, chance in guesses
            if chance >= 0.005 or number == guesses[0][0]
        ]
        lines.append(tag("li", tag("small", str(position)), *words))
    heading = "The teacher" if total == 1 else f"The teacher, first {len(lines)} of {total} positions"
    parts = [tag("h4", heading), tag("ol", *lines)] if lines else []
    if "tokens" in features:
        written = _text(features["tokens"].reshape(-1).tolist(), decode)
        parts += [tag("h4", "The teacher wrote"), tag("p", written, class_="text")]
    return tag("div", *parts, class_="teacher") if parts else Markup("")


def _class(number: int, decode: Decode | None) -> str:
    return str(number) if decode is None else repr(decode([number]))[1:-1] or str(number)


def _predictions(features: Mapping[str, Tensor]) -> tuple[list[list[tuple[int, float]]], int]:
    """(class, probability) of the three likeliest at each of the first positions, and the number of positions."""
    if "logprobs" in features:
        logprobs = features["logprobs"].flatten(0, -2)
        values, classes = logprobs[:_POSITIONS].float().topk(min(3, logprobs.shape[-1]))
    elif "topk_logprobs" in features:
        logprobs = features["topk_logprobs"].flatten(0, -2)
        values = logprobs[:_POSITIONS, :3].float()
        classes = features["topk_indices"].flatten(0, -2)[:_POSITIONS, :3]
    else:
        return [], 0
    pairs = zip(classes.tolist(), values.exp().tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs], len(logprobs)
