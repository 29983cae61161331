"""The work of craft-optim plan: model and batches without weights, and the count."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from craft_optim.anchors import Reading
from craft_optim.cli.options import UsageError, require_folder
from craft_optim.cli.output import emit_json, print_code
from craft_optim.cli.work.sources import user_function
from craft_optim.planning.make import adamw, plan
from craft_optim.planning.passes import task_loss
from craft_optim.planning.table import in_words

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    _check(args)
    with redirect_stdout(sys.stderr) if args.json == "-" else nullcontext():
        made = _of_policy if args.policy else _of_config if args.config else _of_factory
        model, batch, anchors, settings = made(args)
        if args.dtype and args.factory:
            model.to(getattr(torch, args.dtype))
        if args.train:
            _train_only(model, args.train)
        settings |= {name: value for name in ("top_k", "valid") if (value := getattr(args, name)) is not None}
        kind = getattr(torch.optim, args.optimizer)
        autocast = getattr(torch, args.autocast) if args.autocast else None
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            found = plan(
                model,
                batch,
                anchors,
                base=adamw if args.optimizer == "AdamW" else lambda parameters: kind(parameters, lr=1e-4),
                count=args.count,
                **settings,
            )
    if args.json != "-":
        print(f"\n{in_words(found, args.gpu)}")
        if args.policy:
            flags = shlex.join([f"--policy.path={args.policy}", "--dataset.repo_id=OLD_TASK", f"--count={args.count}"])
            print_code(f"craft-optim build-anchors anchors/ {flags}")
    if args.json:
        emit_json(args.json, found.as_dict(tuple(args.gpu)))


def _check(args: argparse.Namespace) -> None:
    given = [option for option in ("policy", "config", "factory") if getattr(args, option)]
    if len(given) != 1:
        what = "which model?" if not given else f"--{' and --'.join(given)} exclude each other:"
        raise UsageError(f"{what} Pass one of --policy.path, --config and --factory")
    if args.length and not args.config:
        raise UsageError("--length goes with --config: the others' batches have their own")
    if args.factory and (args.batch_size or args.anchor_batch_size):
        raise UsageError(
            "--batch-size goes with --policy.path and --config: the function's batches have their own size"
        )
    require_folder("--json", args.json)


def _sizes(args: argparse.Namespace, anchors: Callable[[int], int] = lambda size: size) -> tuple[int, int]:
    size = args.batch_size or 8
    return size, args.anchor_batch_size or anchors(size)


def _of_policy(args: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    try:
        from craft_optim.lerobot import adapter_for
        from craft_optim.lerobot.pretrained import load_config
        from craft_optim.lerobot.settings import anchors_per_pass
        from craft_optim.lerobot.shapes import batch_of_shapes, plan_settings, policy_without_weights
    except ImportError as error:
        raise UsageError(f"--policy.path needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    config = load_config(args.policy)
    if config.use_peft:
        raise UsageError(
            f"--policy.path={args.policy} holds adapters alone: give a function that returns the policy with them, and "
            "a batch, as --factory"
        )
    if args.dtype and hasattr(config, "dtype"):
        config.dtype = args.dtype  # the policy says which of its parts have another
    policy = policy_without_weights(config)
    if args.dtype and not hasattr(config, "dtype"):
        policy.to(getattr(torch, args.dtype))
    adapter = adapter_for(policy)
    batch, anchors = (batch_of_shapes(config, size) for size in _sizes(args, anchors_per_pass))
    return policy, batch, adapter.inputs(anchors), plan_settings(adapter)


def _of_config(args: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    from craft_optim.planning.from_transformers import batch_of_shapes, model_without_weights

    try:
        model = model_without_weights(args.config, getattr(torch, args.dtype) if args.dtype else None)
    except ImportError as error:
        raise UsageError(f"--config needs transformers ({error}): pip install transformers.") from error
    batch, anchors = (batch_of_shapes(model, size, args.length or 512) for size in _sizes(args))
    return model, batch, {name: x for name, x in anchors.items() if name != "labels"}, {}


def _of_factory(args: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    made = user_function(args.factory)()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise UsageError(
            f"--factory={args.factory}: the function must return (model, batches) or (model, batches, settings), "
            f"settings a dict of arguments of anchors.build. Found {type(made).__name__}"
        )
    model, batches, settings = made if len(made) == 3 else (*made, {})
    batch = next(iter(batches), None)
    if batch is None:
        raise UsageError(f"--factory={args.factory}: there is no batch. Return one at least")
    of_plan = {"reading", "layers", "top_k", "dtype", *(one.name for one in fields(Reading))}
    kept = {name: value for name, value in settings.items() if name in of_plan}
    labelled = isinstance(batch, Mapping) and "labels" in batch
    return model, batch, None, {**kept, "loss": task_loss if labelled else None}


def _train_only(model: nn.Module, pattern: str) -> None:
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise UsageError(f"--train must be a regular expression. Found {pattern!r}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and matches(name) is not None)
