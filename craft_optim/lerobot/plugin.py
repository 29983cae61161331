"""Retention for lerobot-train, without a fork:

    lerobot-train --craft.discover_packages_path=craft_optim.lerobot --craft.anchors.repo_id=you/old_task \
        --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/new_task ...

lerobot imports the package that the first flag names, and with it this module, before it reads its own flags. The
module replaces functions that lerobot's training script calls by name (factories, the update, the checkpoint) by ones
that call the original and `craft_optim.lerobot.run`. Imported without that flag, it changes nothing.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from craft_optim.anchors import AnchorMismatchError
from craft_optim.lerobot._shared import speaks
from craft_optim.lerobot.checks import check_quantiles
from craft_optim.lerobot.run import CraftRun
from craft_optim.lerobot.settings import PREFIX, SettingsError, own_flags, without_flags

__all__ = ["PACKAGE", "REPLACED", "TRAIN_FLAG", "install"]

PACKAGE = "craft_optim.lerobot"
TRAIN_FLAG = f"{PREFIX}discover_packages_path={PACKAGE}"
REPLACED = (
    "make_optimizer_and_scheduler",
    "make_pre_post_processors",
    "make_train_eval_datasets",
    "save_checkpoint",
    "submit_to_hf",
    "tqdm",
    "update_policy",
)


def install(arguments: Sequence[str], *, debug: bool = False) -> None:
    """Replaces functions of lerobot's training script, for a command line without its program.

    Once; a later call in this process, for another run, gives the settings of that one.

    Args:
        debug: True to keep the traceback of errors before the first step.

    Raises:
        SystemExit: A setting is invalid, or lerobot's script is not the one that this was written for.
    """
    script = _script()
    missing = [name for name in REPLACED if not hasattr(script, name)]
    if missing:
        import lerobot

        sys.exit(
            f"craft: lerobot {lerobot.__version__} has no {', '.join(missing)} in {script.__name__}: craft-optim is "
            "made for lerobot 0.6. Install that, or a newer craft-optim."
        )
    from lerobot.configs.parser import parse_arg

    explained = contextmanager(functools.partial(_explained, debug=debug))
    run: CraftRun | None = getattr(script, "craft_run", None)
    with explained():
        # A config file may belong to a resumed run: then the checkpoint has the other settings
        flags, complete = own_flags(arguments), parse_arg("config_path", arguments) is None
        if run is not None:
            run.read(flags, complete=complete)
            return
        run = CraftRun(flags, complete=complete)
    _hide_flags()
    script.craft_run = run  # type: ignore[attr-defined]
    for name, replacement in _replacements(run, script, explained).items():
        setattr(script, name, functools.wraps(getattr(script, name))(replacement))


def _explained(*kinds: type[Exception], debug: bool) -> Iterator[None]:
    """Turns errors about settings or anchors into a message and exit status 2, without a traceback.

    Args:
        *kinds: Kinds of errors. None: errors of values, files and missing packages.
    """
    try:
        yield
    except Exception as error:
        if debug or not isinstance(error, kinds or (ValueError, OSError, ImportError)):
            raise
        if speaks():
            where = "" if isinstance(error, SettingsError) else " (`craft-optim train --debug` shows where)"
            print(f"craft: {' '.join(str(error).split())}{where}", file=sys.stderr)
        raise SystemExit(2) from error


class _Later:
    """A bar that is drawn at its first use: after the bar of the anchors, which are built earlier."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @functools.cached_property
    def _bar(self) -> Any:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def _script() -> ModuleType:
    """Module of lerobot's training script: as `python -m` runs it, or as the console script imports it."""
    main = sys.modules.get("__main__")
    if main is not None and hasattr(main, "update_policy") and hasattr(main, "make_optimizer_and_scheduler"):
        return main
    import lerobot.scripts.lerobot_train

    module: ModuleType = lerobot.scripts.lerobot_train
    return module


def _hide_flags() -> None:
    """Hides our flags together with the one that names a plugin, which lerobot removes by this function."""
    from lerobot.configs import parser

    original = parser.filter_arg

    @functools.wraps(original)
    def filter_arg(field: str, arguments: Sequence[str] | None = None) -> list[str]:
        return without_flags(original(field, arguments))

    parser.filter_arg = filter_arg


def _replacements(
    run: CraftRun, script: ModuleType, explained: Callable[..., AbstractContextManager[None]]
) -> dict[str, Callable[..., Any]]:
    original = {name: getattr(script, name) for name in REPLACED}
    bars: list[_Later] = []

    def make_train_eval_datasets(cfg: Any) -> Any:
        with explained():
            if _asked_for(sys.argv[1:]):  # the program may be called again, with other flags, in this process
                run.flags = own_flags(sys.argv[1:])
            run.prepare(cfg)
        return original["make_train_eval_datasets"](cfg)

    def make_pre_post_processors(*args: Any, **kwargs: Any) -> Any:
        preprocessor, postprocessor = original["make_pre_post_processors"](*args, **run.with_statistics(kwargs))
        if speaks():
            check_quantiles(preprocessor)
        return preprocessor, postprocessor

    def make_optimizer_and_scheduler(cfg: Any, policy: Any) -> Any:
        base, scheduler = original["make_optimizer_and_scheduler"](cfg, policy)
        with explained():
            return run.wrap(policy, base), scheduler

    def tqdm(*args: Any, **kwargs: Any) -> Any:
        bars[:] = [_Later(functools.partial(original["tqdm"], *args, **kwargs))]
        return bars[0]

    def update_policy(train_metrics: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
        if run.retention is None:
            with explained():
                run.begin(policy, kwargs.get("accelerator") or args[3], train_metrics.steps)
            for bar in bars:  # in the first process
                bar.refresh()
        with explained(AnchorMismatchError):  # the first pass compares
            updated = original["update_policy"](train_metrics, policy, *args, **kwargs)
        run.report(train_metrics)
        return updated

    def save_checkpoint(checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        original["save_checkpoint"](checkpoint_dir, *args, **kwargs)
        run.save(Path(checkpoint_dir))

    def submit_to_hf(*_: Any, **__: Any) -> None:
        sys.exit(
            "craft: a remote job (--job.target) would train without retention, because its machine has no craft-optim. "
            "Run `craft-optim train` there."
        )

    here = locals()
    return {name: here[name] for name in REPLACED}


def _asked_for(arguments: Sequence[str]) -> bool:
    from lerobot.configs.parser import parse_plugin_args

    return PACKAGE in parse_plugin_args("discover_packages_path", arguments).values()


if _asked_for(sys.argv[1:]):
    install(sys.argv[1:])
