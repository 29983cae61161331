"""The same runs through frameworks that make the processes' model and data parallel themselves. See cases.py."""

import os
import tempfile

import torch
import torch.distributed as dist
from cases import ANCHORS, BASES, BATCH, network, one_step, outcome, samples
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache, LogitRetention, OnlineRetention, Reading

STEPS = 6


class Samples(Dataset):
    """What `samples` gives, step after step, one by one."""

    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, i):
        x, y = samples(i // BATCH)
        return {"x": x[i % BATCH], "labels": y[i % BATCH]}


class WithLoss(nn.Module):
    """As transformers' models are called."""

    def __init__(self):
        super().__init__()
        self.net = network()
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(1.1)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def _start(cache):
    """A model, and its closure; made before any framework has touched the model."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_USE_CPU": "true",
        "TORCHELASTIC_RUN_ID": "0",  # Lightning: somebody else starts the processes
    }
    model = WithLoss()
    share = dist.get_world_size()
    return model, LogitRetention(model, AnchorCache.open(cache), ANCHORS // share, tolerance=1.0)


def accelerate(cache):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model, retention = _start(cache)
    accelerator = Accelerator(cpu=True)
    craft = CraftOptimizer(BASES["adamw"](model.parameters()), retention, epsilon=0.01, max_grad_norm=2.2)
    loader = DataLoader(Samples(), batch_size=BATCH // dist.get_world_size())
    wrapped, optimizer, loader = accelerator.prepare(model, craft, loader)
    metrics = []
    for batch in loader:
        accelerator.backward(wrapped(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        metrics.append(dict(craft.metrics))
    return type(wrapped).__name__, outcome(model.net, craft, metrics)


def trainer(cache):
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    model, retention = _start(cache)
    metrics = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    bound = CraftOptimizer.bind(
        torch.optim.AdamW, retention, epsilon=0.01, max_grad_norm=2.2, on_metrics=lambda m: metrics.append(dict(m))
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH // dist.get_world_size(),
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ddp_find_unused_parameters=False,
        )
        run = InOrder(model, args, train_dataset=Samples(), optimizer_cls_and_kwargs=(bound, {"lr": 1e-2}))
        run.train()
    craft = run.optimizer.optimizer
    return type(run.model_wrapped).__name__, outcome(model.net, craft, metrics)


def lightning(cache):
    import lightning.pytorch as pl

    model, retention = _start(cache)
    craft = CraftOptimizer(BASES["adamw"](model.parameters()), retention, epsilon=0.01, max_grad_norm=2.2)
    metrics, wrappers = [], set()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return craft

        def training_step(self, batch, i):
            return self.model(**batch)["loss"]

        def on_train_batch_end(self, *_):
            wrappers.add(type(self.trainer.strategy.model).__name__)
            metrics.append(dict(craft.metrics))

    in_order = DistributedSampler(Samples(), shuffle=False)  # Lightning's own would shuffle
    loader = DataLoader(Samples(), batch_size=BATCH // dist.get_world_size(), sampler=in_order)
    with tempfile.TemporaryDirectory() as folder:
        run = pl.Trainer(
            accelerator="cpu",
            strategy="ddp" if dist.get_world_size() > 1 else "auto",
            devices=dist.get_world_size(),
            max_epochs=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run.fit(Module(), loader)
    return wrappers.pop(), outcome(model.net, craft, metrics)


def peft(parallel):
    """LoRA, its teacher the same model with the adapters switched off, on whichever process holds which part."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(network(), LoraConfig(target_modules=["up", "down"], r=4))
    if parallel == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = model
        for module in (*model.base_model.model.blocks, model) if parallel == "fsdp2" else ():
            fully_shard(module)
    share = dist.get_world_size()
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    reading = Reading(mask=lambda x: x[:, 0] > 0.3, class_dim=-1)
    retention = OnlineRetention(model, inputs, ANCHORS // share, reading=reading)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = CraftOptimizer(BASES["adamw"](trainable), retention, epsilon=1e-3)
    metrics = []
    for step in range(STEPS):
        one_step(wrapped, optimizer, step, dist.get_rank(), share)
        metrics.append(dict(optimizer.metrics))
    return parallel, outcome(wrapped, optimizer, metrics)
