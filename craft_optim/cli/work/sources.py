"""Sources of a command's model and anchors: a lerobot policy and a dataset, or a function of the user's."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from craft_optim import anchors
from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.reading import with_fields
from craft_optim.cli.options import UsageError

__all__ = [
    "Source",
    "factory_source",
    "load_policy",
    "load_text_model",
    "policy_reading",
    "policy_source",
    "text_source",
    "tokenizer_of",
    "user_function",
]


@dataclass(frozen=True)
class Source:
    """A teacher, and how a cache of it is built.

    Attributes:
        build: `anchors.build` of it and its batches; takes the path and further settings.
        reading: As `anchors.build` takes it.
        usage: The next lines of code, with "{cache}" and "{kind}" to be filled in.
        policy: Folder or hub id of a lerobot policy; None for other models.
    """

    model: nn.Module
    build: Callable[..., AnchorCache]
    reading: Reading | None
    usage: str
    policy: str | None = None


def factory_source(spec: str, device: str | None) -> Source:
    """Source from the function of `script.py:function` or `package.module:function`.

    Args:
        spec: Place of the function; it takes no arguments and returns `(model, batches)` or `(model, batches,
            settings)`, settings those of `anchors.build`.
        device: Device to move the model to; None: it stays.

    Raises:
        UsageError: There is no such file, module or function, or it returns something else.
    """
    made = user_function(spec)()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        found = f"a tuple of {[type(x).__name__ for x in made]}" if isinstance(made, tuple) else type(made).__name__
        raise UsageError(
            f"--factory={spec}: the function must return (model, batches) or (model, batches, settings), settings a "
            f"dict of arguments of anchors.build. Found {found}."
        )
    model, batches, settings = made if len(made) == 3 else (*made, {})
    if not isinstance(settings, Mapping):
        raise UsageError(f"--factory={spec}: settings must be a dict. Found {type(settings).__name__}.")
    if device is not None:
        model.to(device)
    # A cache is read with what it was built with, be it said in a Reading or by its fields
    said = {field.name: settings[field.name] for field in fields(Reading) if field.name in settings}
    rest = {name: value for name, value in settings.items() if name not in said}
    reading = rest.pop("reading", None)
    if said:
        reading = with_fields(reading or Reading(), said, "build")
    return Source(
        model,
        lambda path, **more: anchors.build(model, batches, path, **{"reading": reading, **rest, **more}),
        reading,
        "from craft_optim.anchors import AnchorCache\n"
        f"cache = AnchorCache.open({{cache!r}}{'' if reading is None else ', reading'})\n"
        "retention = cache.retention(model{kind})",
    )


def text_source(args: argparse.Namespace, device: str, autocast: Any) -> Source:
    """A language model of transformers, and chats, prompts or texts, as the options of build-anchors name them.

    Raises:
        ImportError: transformers is not installed, or datasets.
        ValueError: The model or the data cannot be used.
    """
    from craft_optim.chat import chat_anchors, load_language_model, read_records

    names = ("answers", "counted", "max_length", "max_new_tokens", "temperature", "count", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    count = given.pop("count", 512)
    # First: what is wrong with them is found in seconds
    records = "self" if args.data == "self" else read_records(args.data, count)
    model, tokenizer = load_language_model(args.model, device=device)
    given |= {"count": count if args.data == "self" else None, "autocast": autocast, "model_id": args.model}
    return Source(
        model,
        partial(chat_anchors, model, tokenizer, records, **given),
        None,
        "from craft_optim.anchors import AnchorCache\nretention = AnchorCache.open({cache!r}).retention(model)",
    )


def user_function(spec: str, option: str = "--factory") -> Callable[[], Any]:
    """The function of `script.py:function` or `package.module:function`, as an option names it.

    Raises:
        UsageError: There is no such file, module or function.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"{option} must be script.py:function or package.module:function. Found {spec!r}.")
    function = getattr(_module(place, option), name, None)
    if not callable(function):
        raise UsageError(f"{option}={spec}: there is no function {name!r} in {place}.")
    found: Callable[[], Any] = function
    return found


def _module(place: str, option: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, something that it imports is not
            raise UsageError(f"{option}: there is no module {place!r}. Give a script as path/to/it.py.") from None
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"{option}: there is no file {place!r}.")
    sys.path.insert(0, str(path.parent.resolve()))  # as running the script does
    spec = importlib.util.spec_from_file_location("craft_optim_factory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_policy(path: str, device: str) -> Any:
    """`craft_optim.lerobot.pretrained.load_policy`.

    Raises:
        UsageError: lerobot is not installed.
        ValueError: The checkpoint cannot be used.
    """
    try:
        from craft_optim.lerobot.pretrained import load_policy as load
    except ImportError as error:
        raise UsageError(f"--policy.path needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    return load(path, device)


def load_text_model(path: str, device: str) -> nn.Module:
    """The model of `craft_optim.chat.load_language_model`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: The checkpoint cannot be used.
    """
    from craft_optim.chat import load_language_model

    return load_language_model(path, device=device)[0]


def policy_source(args: argparse.Namespace, device: str) -> Source:
    """A lerobot policy, and frames after its saved preprocessor, as the options of build-anchors name them.

    Raises:
        UsageError: lerobot is not installed.
        ValueError: The policy or the frames cannot be used, or do not fit together.
    """
    try:
        from craft_optim.lerobot import adapter_for, anchor_batches, open_frames, spread_frames
        from craft_optim.lerobot.frames import SOURCES, require_count
        from craft_optim.lerobot.pretrained import load_config, load_preprocessor
        from craft_optim.lerobot.settings import AnchorSettings
    except ImportError as error:
        raise UsageError(f"--policy.path needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    config = load_config(args.policy)
    preprocessor = load_preprocessor(config, args.policy, device)
    frames = open_frames(config, preprocessor, **{name: getattr(args, name) for name in SOURCES})
    dataset = frames.dataset
    most = AnchorSettings().count or len(dataset)
    rows = spread_frames(dataset, min(most, len(dataset)) if args.count is None else args.count)
    out = getattr(args, "out", None) or getattr(args, "kept", None)
    if out is not None and not getattr(args, "overwrite", False):
        require_count(out, len(rows))
    policy = load_policy(args.policy, device)  # after what can be refused in seconds
    adapter = adapter_for(policy, frames.keep)
    how: dict[str, Any] = {"batch_size": args.batch_size or 16, "workers": args.workers or 0, "prompts": frames.prompts}
    batches = anchor_batches(dataset, preprocessor, adapter, indices=rows, **how)
    return Source(
        policy,
        partial(adapter.build, policy, batches, model_id=args.policy),
        adapter.reading,
        "from craft_optim.anchors import AnchorCache\n"
        "from craft_optim.lerobot import adapter_for\n"
        f"retention = adapter_for(policy, {adapter.keep!r}).retention(policy, AnchorCache.open({{cache!r}}))",
        args.policy,
    )


def policy_reading(policy: nn.Module, cache: AnchorCache) -> Reading:
    """The reading of the adapter that the cache was built with.

    Raises:
        ValueError: None of this policy's was.
    """
    from craft_optim.lerobot.adapters import adapter_of

    return adapter_of(policy, cache).reading


def tokenizer_of(name: str, **settings: Any) -> Callable[[list[int]], str]:
    """Ids -> text, by transformers' AutoTokenizer; `settings` are those of its `from_pretrained`.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(f"--tokenizer needs transformers ({error}): pip install transformers.") from error
    tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    total = len(tokenizer)

    def decode(ids: Iterable[int]) -> str:
        return str(tokenizer.decode([i for i in ids if 0 <= i < total]))

    return decode
