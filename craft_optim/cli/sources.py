"""Where a command's model and anchors come from: a lerobot policy and a dataset, or a function of the user's."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from craft_optim import anchors
from craft_optim.anchors import AnchorCache
from craft_optim.anchors.passes import Forward

__all__ = ["Source", "UsageError", "factory_source", "load_policy", "policy_forward", "policy_source", "tokenizer_of"]


class UsageError(Exception):
    """A wrong argument on the command line; the message has the remedy."""


@dataclass(frozen=True)
class Source:
    """A model, and how a cache of it is built.

    Attributes:
        model: The teacher.
        build: `anchors.build` of it and its batches; takes the path and further settings.
        forward: As `anchors.build` takes it.
        usage: The next lines of code, with "{cache}" and "{closure}" to be filled in.
    """

    model: nn.Module
    build: Callable[..., AnchorCache]
    forward: Forward | None
    usage: str


def factory_source(spec: str, device: str | None) -> Source:
    """What the function of `script.py:function` or `package.module:function` returns.

    Args:
        spec: Where the function is; it takes no arguments and returns `(model, batches)` or `(model, batches,
            settings)`, settings those of `anchors.build`.
        device: Where to move the model; None: it stays where it is.

    Raises:
        UsageError: There is no such file, module or function, or it returns something else.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"--factory must be script.py:function or package.module:function. Found {spec!r}.")
    function = getattr(_module(place), name, None)
    if not callable(function):
        raise UsageError(f"--factory={spec}: there is no function {name!r} in {place}.")
    made = function()
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
    forward = settings.get("forward")
    name = getattr(forward, "__name__", "")
    how = "" if forward is None else f", forward={name if name.isidentifier() else 'forward'}"
    return Source(
        model,
        lambda path, **more: anchors.build(model, batches, path, **{**settings, **more}),
        forward,
        "from craft_optim.anchors import AnchorCache, {closure}\n"
        f"retention = {{closure}}(model, AnchorCache.open({{cache!r}}){how})",
    )


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")  # as `python -m` does
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, something that it imports is not
            raise UsageError(f"--factory: there is no module {place!r}. Give a script as path/to/it.py.") from None
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"--factory: there is no file {place!r}.")
    sys.path.insert(0, str(path.parent.resolve()))  # as running the script does
    spec = importlib.util.spec_from_file_location("craft_optim_factory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_policy(path: str, device: str) -> Any:
    """A lerobot policy by its own `from_pretrained`, in eval mode.

    Raises:
        UsageError: lerobot is not installed, or the checkpoint holds adapters only.
        ValueError: The weights cannot be read, or lerobot could not use them and went on with untrained ones.
    """
    try:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies import get_policy_class
    except ImportError as error:
        raise UsageError(f"--policy.path needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    config = PreTrainedConfig.from_pretrained(path)
    if config.use_peft:
        raise UsageError(f"--policy.path={path} holds adapters only: load them in a function, and pass --factory.")
    config.device = device
    try:
        policy = get_policy_class(config.type).from_pretrained(path, config=config)
        _check_weights(policy, path)
    except SafetensorError as error:
        raise ValueError(f"The weights of --policy.path={path} cannot be read ({error}): copy them anew.") from error
    return policy.eval()


def _check_weights(policy: nn.Module, path: str) -> None:
    """Raises unless most of some tensors are those in the file: lerobot's pi0 family survives an unreadable one."""
    from huggingface_hub import hf_hub_download

    name = "model.safetensors"
    file = Path(path) / name if Path(path).is_dir() else Path(hf_hub_download(path, name))
    own = policy.state_dict()
    with safe_open(file, framework="pt") as saved:
        keys = [key for key in sorted(saved.keys()) if key in own or f"model.{key}" in own]
        same = []
        for key in keys[:: max(1, len(keys) // 16)]:
            theirs, ours = saved.get_tensor(key), own[key if key in own else f"model.{key}"].cpu()
            same.append(theirs.shape == ours.shape and torch.equal(theirs.to(ours.dtype), ours))
    if 2 * sum(same) <= len(same):
        raise ValueError(
            f"The policy does not have the weights in {file}: lerobot could not load them, and went on without. Its "
            "messages above say why; a checkpoint of another version or size is the usual reason."
        )


def policy_source(
    path: str,
    *,
    device: str,
    keep: str | None,
    repo_id: str | None,
    root: str | None,
    episodes: int | None,
    count: int | None,
    batch_size: int,
    prompts: str | None,
    workers: int,
) -> Source:
    """A lerobot policy, and frames of a LeRobotDataset after the policy's saved preprocessor.

    Raises:
        UsageError: As for `load_policy`.
    """
    policy = load_policy(path, device)
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    from craft_optim.lerobot import adapter_for, anchor_batches, spread_frames
    from craft_optim.lerobot import prompts as read_prompts

    adapter = adapter_for(policy, keep)
    name = repo_id or f"local/{Path(root or '').resolve().name}"
    deltas = resolve_delta_timestamps(policy.config, LeRobotDatasetMetadata(name, root=root))
    some = None if episodes is None else list(range(episodes))
    dataset = LeRobotDataset(name, root=root, episodes=some, delta_timestamps=deltas)
    rows = list(range(len(dataset))) if count is None else spread_frames(dataset, count)
    batches = anchor_batches(
        _InOrder(dataset, rows, workers) if workers else dataset,
        _preprocessor(policy, path, device),
        adapter,
        batch_size=batch_size,
        indices=rows,
        prompts=None if prompts is None else read_prompts(prompts),
    )
    return Source(
        policy,
        partial(adapter.build, policy, batches, model_id=path),
        adapter.forward,
        "from craft_optim.anchors import AnchorCache\n"
        "from craft_optim.lerobot import adapter_for\n"
        f"retention = adapter_for(policy, {adapter.keep!r}).retention(policy, AnchorCache.open({{cache!r}}))",
    )


class _InOrder:
    """A dataset whose samples are read ahead by worker processes, for a reader that takes these rows in this order."""

    def __init__(self, dataset: Any, rows: list[int], workers: int) -> None:
        self.meta = dataset.meta
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=rows, num_workers=workers)
        self._samples = zip(rows, loader, strict=True)

    def __getitem__(self, row: int) -> Any:
        place, sample = next(self._samples)
        assert place == row
        return sample


def _preprocessor(policy: Any, path: str, device: str) -> Any:
    from lerobot.policies import make_pre_post_processors

    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": device}}
    if policy.name == "pi0_fast":
        # Of the action tokenizer lerobot saves neither, and would take the defaults
        overrides["action_tokenizer_processor"] = {
            "paligemma_tokenizer_name": policy.config.text_tokenizer_name,
            "fast_skip_tokens": policy.config.fast_skip_tokens,
        }
    return make_pre_post_processors(policy.config, pretrained_path=path, preprocessor_overrides=overrides)[0]


def policy_forward(policy: nn.Module, cache: AnchorCache) -> Forward:
    """The forward of the adapter that the cache was built with.

    Raises:
        ValueError: None of this policy's was.
    """
    from craft_optim.lerobot import adapter_for

    for keep in ("logits", "actions", "prefix"):
        try:
            adapter = adapter_for(policy, keep)
        except ValueError:
            continue
        if getattr(adapter.forward, "__qualname__", None) == cache.features.forward:
            return adapter.forward
    raise ValueError(
        f"The cache {cache.path} was built with forward={cache.features.forward}, which is not one of "
        f"craft_optim.lerobot for {getattr(policy, 'name', 'this policy')}: pass --factory with a function that "
        "returns the model and its `forward`."
    )


def tokenizer_of(name: str) -> Callable[[list[int]], str]:
    """Ids -> text, by transformers' AutoTokenizer.

    Raises:
        UsageError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(f"--tokenizer needs transformers ({error}): pip install transformers.") from error
    tokenizer = AutoTokenizer.from_pretrained(name)
    total = len(tokenizer)

    def decode(ids: Iterable[int]) -> str:
        return str(tokenizer.decode([i for i in ids if 0 <= i < total]))

    return decode
