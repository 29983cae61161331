"""lerobot-train in the tests: small pretrained policies of every kind, and the command in this process or its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import pandas
import small
import torch
from draccus.wrappers import docstring
from lerobot.configs import parser
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import get_policy_class
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.processor.tokenizer_processor import ActionTokenizerProcessorStep
from lerobot.scripts import lerobot_train
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from metaworld_pi0_fast.unpacked import unpack
from safetensors.torch import load_file, load_model
from transformers import AutoTokenizer

from craft_optim.lerobot import plugin

OLD, NEW = (ASSETS / "demonstrations" / name for name in (OLD_TASK, NEW_TASK))
EXAMPLES = ASSETS.parents[1]
# What lerobot's models have in their code, and here have smaller
REBUILT = ("pi0", "pi05", "smolvla")
# For every field that it has a flag for, and every run, draccus would parse the source again
docstring.get_attribute_docstring = cache(docstring.get_attribute_docstring)


def pretrained(name, folder, **settings):
    """A checkpoint for --policy.path, with its own statistics: those of the old task."""
    if name == "pi0_fast":
        return unpack(folder)
    policy = small.build(name, folder.with_name(f"{name}-vlm"), **_sizes(name), **settings)
    stats = LeRobotDatasetMetadata(f"local/{OLD_TASK}", root=OLD).stats
    with offline():
        processors = make_pre_post_processors(policy.config, dataset_stats=stats)
    for made in (policy, *processors):
        made.save_pretrained(folder)
    return folder


def _sizes(name):
    sizes = small.features(small.TOP)
    if name == "diffusion":
        del sizes["chunk_size"], sizes["n_action_steps"]
    return sizes


@contextmanager
def offline():
    """Within the block tokenizers are the shipped one, whatever their names."""
    shipped = AutoTokenizer.from_pretrained(small.TOKENIZER)
    with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=shipped):
        yield


@contextmanager
def replaced():
    """Within the block what plugins and our small sizes replace in lerobot may be; afterwards it is lerobot's own."""
    names = [(lerobot_train, name) for name in plugin.REPLACED]
    names += [(parser, "filter_arg"), (ActionTokenizerProcessorStep, "get_config")]
    names += [(PI0FastPolicy, name) for name in ("__init__", "from_pretrained")]
    kept = [(owner, name, owner.__dict__[name]) for owner, name in names]
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        lerobot_train.__dict__.pop("craft_run", None)
        sys.modules.pop("small_pi0_fast", None)


@contextmanager
def small_sizes(name, folder):
    """Within the block lerobot loads a policy of ours in place of one with its own sizes."""

    def from_pretrained(cls, pretrained_name_or_path, *, config, **_):
        policy = small.build(name, folder.with_name(f"{name}-vlm"), **_sizes(name))
        load_model(policy, Path(pretrained_name_or_path) / "model.safetensors")
        return policy

    if name not in REBUILT:
        yield
        return
    with offline(), mock.patch.object(get_policy_class(name), "from_pretrained", classmethod(from_pretrained)):
        yield


def arguments(policy, out, *more, steps=4):
    """A short run on the new task, its checkpoints halfway and at the end; anchors are frames of the old one."""
    return [
        f"--policy.path={policy}", f"--output_dir={out}", f"--steps={steps}", f"--save_freq={max(1, steps // 2)}",
        "--dataset.repo_id=local/new", f"--dataset.root={NEW}", "--dataset.episodes=[0,1]", "--batch_size=2",
        "--num_workers=0", "--log_freq=1", "--policy.push_to_hub=false", "--wandb.enable=false",
        *more,
    ]  # fmt: skip


# Of 12 frames a third is held out
CRAFT = [f"--craft.anchors.root={OLD}", "--craft.anchors.episodes=2", "--craft.anchors.count=12",
         "--craft.epsilon=0.01", "--craft.anchors.heldout=0.33", "--craft.drift_anchors=4",
         "--craft.anchors.batch_size=4"]  # fmt: skip


def resume(out, at, *more):
    """A run that goes on from the checkpoint of a step."""
    config = Path(out) / "checkpoints" / f"{at:06d}" / "pretrained_model" / "train_config.json"
    return ["--resume=true", f"--config_path={config}", f"--output_dir={out}", *more]


@contextmanager
def few_anchors():
    """Within the block they are no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There are [0-9]+ anchors")
        yield


def train(name, folder, *given, with_plugin=True):
    """lerobot-train in this process; nothing of it stays behind."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what other tests have left would choose the precision
    given = [*([plugin.TRAIN_FLAG] if with_plugin else []), *map(str, given)]
    with replaced(), small_sizes(name, Path(folder)), mock.patch.object(sys, "argv", ["lerobot-train", *given]):
        if name == "pi0_fast":
            import_module("small_pi0_fast")
        if with_plugin:
            plugin.install(given)
        threads, state = torch.get_num_threads(), torch.random.get_rng_state()
        # torch's own tables of optimizers, which other tests import, make such flags read-only
        flags = torch.backends.ContextProp.__set__.__globals__
        free = mock.patch.dict(flags, {"__allow_nonbracketed_mutation_flag": True})
        torch.set_num_threads(1)  # as in a process of its own: other numbers round differently
        try:
            with free, torch.backends.cudnn.flags(), mock.patch.object(lerobot_train, "init_logging"), few_anchors():
                lerobot_train.train()
            return lerobot_train.__dict__.get("craft_run")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)
            torch.random.set_rng_state(state)


def console(*given, processes=1, fsdp=False, warm=None):
    """Starts the unmodified console script, with the plugins that the flags name; `warm`: a Python of warm.py."""
    script = [*(warm.runs if warm else []), str(Path(sys.executable).with_name("lerobot-train"))]
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [EXAMPLES, here, EXAMPLES.parent])),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    small = [f"--{name}.discover_packages_path=small_{name}" for name in ("pi0_fast", "act")]
    flags = [plugin.TRAIN_FLAG, *small]
    start = [sys.executable, *script]
    if processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--num_machines=1"]
        start = [sys.executable, *launch, f"--main_process_port={_free_port()}", *script]
    if fsdp:  # accelerate's launcher does not start it on CPUs
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *script,
        ]
        flags.append("--fsdp.discover_packages_path=cpu_fsdp")
        environment |= {
            "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1",
            "FSDP_USE_ORIG_PARAMS": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "ACTEncoderLayer",
        }  # fmt: skip
    return subprocess.Popen(
        [*start, *flags, *map(str, given)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finished(process):
    """Its output; fails if it did."""
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def copied(run, to, *, until):
    """A copy of a run as it was after the checkpoint of a step."""
    shutil.copytree(run, to, symlinks=True)
    for folder in (to / "checkpoints").iterdir():
        if folder.is_symlink():
            folder.unlink()
        elif int(folder.name) > until:
            shutil.rmtree(folder)
    (to / "checkpoints" / "last").symlink_to(f"{until:06d}")
    return to


def checkpoint(run, step):
    """Everything of a checkpoint that training made: tensors by name, and the plugin's floats."""
    folder = Path(run) / "checkpoints" / f"{step:06d}"
    files = {"weights": "pretrained_model/model.safetensors", "optimizer": "training_state/optimizer_state.safetensors"}
    adapters = folder / "pretrained_model" / "adapter_model.safetensors"
    if adapters.is_file():
        files["weights"] = "pretrained_model/adapter_model.safetensors"
    tensors = {(kind, name): x for kind, file in files.items() for name, x in load_file(folder / file).items()}
    side = folder / "training_state" / "craft.json"
    return tensors, json.loads(side.read_text())["state"] if side.is_file() else None


def rows(run):
    """Without the time of day, in which no two runs agree."""
    found = [json.loads(line) for line in (Path(run) / "craft" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


def assert_same_run(one, other, step):
    """Weights, the optimizer's state, lambda, the place among the anchors and the metrics are the same bits."""
    (tensors, state), (found, found_state) = checkpoint(one, step), checkpoint(other, step)
    assert tensors.keys() == found.keys()
    unlike = [name for name, x in tensors.items() if not torch.equal(x, found[name])]
    assert not unlike, unlike[:5]
    assert state == found_state
    assert [row for row in rows(one) if row["step"] <= step] == rows(other)


def late_dataset(folder):
    """The old task with time stamps 2 ms beside its videos'."""
    shutil.copytree(OLD, folder)
    for file in (folder / "data").rglob("*.parquet"):
        table = pandas.read_parquet(file)
        late = table["timestamp"] + 0.002 * (table["frame_index"] > 0)
        table.assign(timestamp=late.astype("float32")).to_parquet(file)
    return folder


def image_dataset(folder):
    """Frames of the new task as a dataset of pictures, not of videos."""
    source = LeRobotDataset("local/new", root=NEW, episodes=[0, 1], video_backend="pyav")
    names = [small.TOP, "observation.state", "action"]
    features = {name: dict(source.meta.features[name]) for name in names}
    features[small.TOP] = {**features[small.TOP], "dtype": "image", "info": None}
    made = LeRobotDataset.create("local/pictures", fps=source.fps, features=features, root=folder, use_videos=False)
    for episode in range(2):
        for place in range(episode * 40, episode * 40 + 16):
            frame = source[place]
            picture = (frame[small.TOP].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            made.add_frame({small.TOP: picture, "task": frame["task"], **{k: frame[k].numpy() for k in names[1:]}})
        made.save_episode()
    made.finalize()
    return folder
