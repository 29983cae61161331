"""Tables of the runs, as Markdown. Pure.

A record is that of `running.run` with `build`, of `plan.BUILDS`, and of a setting with P and R, see `pareto.measures`.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_table import markdown_table
from pareto.measures import plasticity, retention
from pareto.summary import standard_error

from .plan import BATCH, EPSILONS, NOISES, SCALES, SHARES, rates

__all__ = ["TABLES", "rated"]

Rows = Sequence[Mapping[str, Any]]
KINDS = (("this", "auto"), ("this", "1"), ("earlier", "1"))
TITLES = {("this", "auto"): "auto", ("this", "1"): "K = 1", ("earlier", "1"): "earlier, K = 1"}


def rated(records: Rows, plain: Rows) -> list[dict[str, Any]]:
    """The records with `P` and `R`, where they are of a setting.

    Args:
        records: Of any builds.
        plain: Plain fine-tuning, as `pareto.training.fine_tune` says it, of each setting, seed and learning rate.

    Raises:
        ValueError: Two runs of a seed began with different networks.
    """
    of = {(row["setting"], row["seed"], row["lr"]): row for row in plain}
    found = []
    for row in map(dict, records):
        if "new" in row:
            reference = of[row["setting"], row["seed"], row["lr"]]
            begun = [(each["new_before"], each["old_before"]) for each in (row, reference)]
            if begun[0] != begun[1]:
                raise ValueError(f"Runs are paired by seed, and must begin alike. Found scores {begun}, of {row}.")
            row["P"] = plasticity(row["new"], before=row["new_before"], plain=reference["new"])
            row["R"] = retention(row["old"], before=row["old_before"], plain=reference["old"], chance=row["chance"])
        found.append(row)
    return found


def chosen(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """Those with these values; with `projection` "violated" and without held-out anchors, if nothing else is said."""
    wanted = {"projection": "violated", "heldout": ""} | wanted
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def over(rows: Rows, key: str) -> list[float]:
    """A drift over epsilon, per seed."""
    return [row[key] / row["epsilon"] for row in rows]


def _kinds(rows: Rows) -> list[tuple[str, str]]:
    """Without the earlier build, where there is none."""
    there = {row["build"] for row in rows}
    return [kind for kind in KINDS if kind[0] in there]


def _of(rows: Rows, kind: tuple[str, str], **wanted: Any) -> list[Mapping[str, Any]]:
    return chosen(rows, build=kind[0], every=kind[1], **wanted)


def _lines(rows: Rows) -> list[tuple[str, float, float]]:
    """Setting, learning rate and epsilon of each line of the tables of settings."""
    there = {row["setting"] for row in rows}
    return [(setting, *pair) for setting in BATCH if setting in there for pair in rates(setting)]


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}"


def _range(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{min(values):.2f} to {max(values):.2f}"


def noise(rows: Rows) -> str:
    """Final and highest drift / epsilon over all anchors, for each share of the anchors in a pass."""
    kinds = _kinds(rows)
    header = ["", "learning rate", "epsilon", "anchors per pass"]
    header += [f"final: {TITLES[kind]}" for kind in kinds] + [f"highest: {TITLES[kind]}" for kind in kinds]
    cells = []
    for setting, lr, epsilon in _lines(rows):
        for share in SHARES:
            of = [_of(rows, kind, setting=setting, lr=lr, epsilon=epsilon, share=share) for kind in kinds]
            ends = [_range(over(each, "final")) for each in of]
            tops = [f"{max(over(each, 'highest')):.2f}" for each in of]
            cells.append([setting, f"x{lr:g}", f"{epsilon:g}", _share(share), *ends, *tops])
    return markdown_table(header, cells)


def _share(share: float) -> str:
    return "all" if share == 1.0 else f"1/{round(1 / share)}"


def learned(rows: Rows) -> str:
    """P and R of the same runs, means over seeds."""
    kinds = _kinds(rows)
    header = ["", "learning rate", "epsilon", "anchors per pass"]
    header += [f"{what}: {TITLES[kind]}" for what in ("P", "R") for kind in kinds]
    cells = []
    for setting, lr, epsilon in _lines(rows):
        for share in SHARES:
            of = [_of(rows, kind, setting=setting, lr=lr, epsilon=epsilon, share=share) for kind in kinds]
            values = [_mean([row[what] for row in each]) for what in ("P", "R") for each in of]
            cells.append([setting, f"x{lr:g}", f"{epsilon:g}", _share(share), *values])
    return markdown_table(header, cells)


def parameter(rows: Rows) -> str:
    """True mean drift / epsilon of one parameter, over the second half of a run; lowest and highest of the seeds."""
    kinds = _kinds(rows)
    cells = [
        [f"{std:g}", *(_range(over(_of(rows, kind, setting="parameter", noise=std), "mean")) for kind in kinds)]
        for std in NOISES
    ]
    return markdown_table(["noise of L_ret", *(TITLES[kind] for kind in kinds)], cells)


def scale(rows: Rows) -> str:
    """Final, mean and highest drift / epsilon of the network, for each factor on its task loss.

    The mean is over the second half of the steps: at a constant rate the last step is one like another.
    """
    whats: dict[str, Callable[[Sequence[float]], str]] = {"final": _range, "mean": _range, "highest": _top}
    kinds = [kind for kind in (KINDS[0], KINDS[2]) if kind in _kinds(rows)]
    names = {"violated": "", "never": ", no projection"}
    header = ["task loss"]
    header += [f"{what}: {TITLES[k]}{end}" for k in kinds for end in names.values() for what in whats]
    cells = []
    for factor in SCALES:
        of = [
            _of(rows, k, setting="network", scale=factor, projection=projection) for k in kinds for projection in names
        ]
        cells.append([f"x {factor:g}", *(show(over(each, what)) for each in of for what, show in whats.items())])
    return markdown_table(header, cells)


def _top(values: Sequence[float]) -> str:
    return f"{max(values):.2f}"


def price(rows: Rows) -> str:
    """Passes per step of "auto", and what it gains or loses against K = 1, paired by seed."""
    others = _kinds(rows)[1:]
    header = ["", "learning rate", "epsilon", "passes / steps", "final drift / epsilon"]
    header += [f"{what} - {TITLES[kind]}" for kind in others for what in ("P", "R")]
    cells = []
    for setting, lr, epsilon in _lines(rows):
        wanted = {"setting": setting, "lr": lr, "epsilon": epsilon, "share": BATCH[setting]}
        ours = {row["seed"]: row for row in _of(rows, KINDS[0], **wanted)}
        passes = [row["passes"] / row["steps"] for row in ours.values()]
        by = []
        for kind in others:
            theirs = {row["seed"]: row for row in _of(rows, kind, **wanted)}
            for what in ("P", "R"):
                gains = [row[what] - theirs[seed][what] for seed, row in ours.items()]
                by.append(f"{fmean(gains):+.3f} ± {standard_error(gains):.3f}")
        cells.append([setting, f"x{lr:g}", f"{epsilon:g}", _mean(passes), _range(over([*ours.values()], "final")), *by])
    return markdown_table(header, cells)


def heldout(rows: Rows) -> str:
    """With epsilon of one half of the old test set, the drift on the other; without, the drift on both."""
    header = ["", "epsilon", "elsewhere: of anchors", "of held-out", "on anchors: of anchors", "of held-out"]
    header += [f"{what}: {of}" for what in ("P", "R") for of in ("of anchors", "of held-out")]
    cells = []
    there = {row["setting"] for row in rows}
    for setting in (name for name in BATCH if name in there):
        for epsilon in EPSILONS:
            wanted = {"build": "this", "every": "auto", "setting": setting, "epsilon": epsilon, "share": BATCH[setting]}
            wanted |= {"lr": 1.0}
            plain = chosen(rows, **wanted)
            even, odd = (chosen(rows, **(wanted | {"heldout": half})) for half in ("even", "odd"))
            aside = [*over(even, "drift_odd"), *over(odd, "drift_even")]
            without = [*over(plain, "drift_odd"), *over(plain, "drift_even")]
            both = [plain, [*even, *odd]]
            cells.append(
                [
                    setting,
                    f"{epsilon:g}",
                    _range(without),
                    _range(aside),
                    *(_range(over(each, "final")) for each in both),
                    *(_mean([row[what] for row in each]) for what in ("P", "R") for each in both),
                ]
            )
    return markdown_table(header, cells)


TABLES: dict[str, Callable[[Rows], str]] = {
    "noise": noise,
    "learned": learned,
    "parameter": parameter,
    "scale": scale,
    "price": price,
    "heldout": heldout,
}
