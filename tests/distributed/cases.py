"""What the ranks run. Every case is one training run on the same global batches, however many processes share them."""

import contextlib
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, gelu
from torch.nn.parallel import DistributedDataParallel

from craft_optim import Constraint, CraftOptimizer
from craft_optim._step import gradients as gradient_lists
from craft_optim._step.averaging import Averaging
from craft_optim.anchors import AnchorCache, HiddenRetention, LogitRetention
from craft_optim.anchors.names import plain_name
from craft_optim.retention import Retention

BATCH, ANCHORS = 8, 8  # of all processes together
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "zero 1": lambda p: ZeroRedundancyOptimizer(list(p), torch.optim.AdamW, lr=1e-2),
    "stateless": lambda p: torch.optim.SGD(p, lr=0.1),
}


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Hidden states of `blocks.0` do not need the second block, nor the head: a retention pass on a part."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(6, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h = self.inlet(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def network():
    torch.manual_seed(5)
    return Net()


# -- the ways to spread a model ----------------------------------------------------------------------------------------


def _plain(model):
    return model, dist.get_rank(), dist.get_world_size()


def _ddp(**options):
    def wrap(model):
        return DistributedDataParallel(model, **options), dist.get_rank(), dist.get_world_size()

    return wrap


def _fsdp2(shape, names, **options):
    def wrap(model):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, **options)
        return model, dist.get_rank(), dist.get_world_size()

    return wrap


_TENSOR_PARALLEL = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _fsdp2_and_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], _TENSOR_PARALLEL)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["data"])
    return model, mesh["data"].get_local_rank(), 2


def _tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, _TENSOR_PARALLEL)
    return model, 0, 1


def _sequence_parallel(model):
    """The gradients of the norms' weights are partial sums until someone adds them up."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard, whole = Shard(0), Replicate()
    for block in model.blocks:
        parallelize_module(
            block, mesh, PrepareModuleInput(input_layouts=whole, desired_input_layouts=shard, use_local_output=True)
        )
        parallelize_module(block, mesh, PrepareModuleOutput(output_layouts=shard, desired_output_layouts=whole))
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=shard),
            "down": RowwiseParallel(output_layouts=shard),
        }
        parallelize_module(block, mesh, plan)
    return model, 0, 1


def _fsdp1(hybrid=False, **options):
    def wrap(model):
        if hybrid:
            options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model.blocks[0] = FullyShardedDataParallel(model.blocks[0], device_id=torch.device("cpu"), **options)
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        return model, dist.get_rank(), dist.get_world_size()

    return wrap


PARALLEL = {
    "plain": _plain,
    "ddp": _ddp(),
    "ddp bucket view": _ddp(gradient_as_bucket_view=True),
    "ddp unused": _ddp(find_unused_parameters=True),
    "ddp static graph": _ddp(static_graph=True),
    "fsdp2": lambda model: _fsdp2((dist.get_world_size(),), ("data",))(model),
    "fsdp2 no reshard": lambda model: _fsdp2((dist.get_world_size(),), ("data",), reshard_after_forward=False)(model),
    "hsdp": _fsdp2((2, 2), ("replicate", "shard")),
    "fsdp2 x tp": _fsdp2_and_tensor_parallel,
    "tp": _tensor_parallel,
    "sequence parallel": _sequence_parallel,
    "fsdp1": _fsdp1(use_orig_params=True),
    "fsdp1 hybrid": _fsdp1(hybrid=True, use_orig_params=True, sharding_strategy=ShardingStrategy.HYBRID_SHARD),
    "fsdp1 flat": _fsdp1(use_orig_params=False),
    "fsdp1 no shard": _fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD),
}


def full(model):
    """Name -> whole parameter, on every rank."""
    whole = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with whole:
        return {
            plain_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def outcome(model, optimizer, metrics):
    """What must be the same on every rank, and in one process."""
    state = {k: v for k, v in optimizer.param_groups[0].items() if k.startswith("craft_")}
    return {"parameters": full(model), "metrics": metrics, "state": state}


# -- closures ----------------------------------------------------------------------------------------------------------


def logits(model, cache, world_size):
    return LogitRetention(model, cache, ANCHORS // world_size, tolerance=1.0)


def masked(model, cache, world_size):
    """How many of its anchors count differs from rank to rank."""
    return LogitRetention(model, cache, ANCHORS // world_size, tolerance=1.0, mask=lambda x: x[:, 0] > 0.3)


def hidden(model, cache, world_size):
    return HiddenRetention(model, cache, ANCHORS // world_size, layers=["blocks.0"], tolerance=1.0)


CLOSURES = {"logits": logits, "masked": masked, "hidden": hidden}


# -- cases -------------------------------------------------------------------------------------------------------------


def samples(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, x[:, :5].argmin(1)


IS_HOST = gradient_lists._is_host


def train(
    cache,
    parallel="plain",
    closure="logits",
    base="adamw",
    through="wrapped",
    steps=6,
    micro_batches=1,
    average_by_hand=False,
    load=None,
    save=None,
    options=None,
    in_the_background=False,
    heldout=None,
    **craft,
):
    """Trains, from a checkpoint or the start; whole parameters, each step's metrics, and the anchors' position."""
    # As if the main memory were another device's, if gradients wait there; a process serves many tests.
    gradient_lists._is_host = (lambda device: False) if craft.get("gradient_memory") == "host" else IS_HOST
    model = network()
    wrapped, rank, world_size = PARALLEL[parallel](model)
    with torch.no_grad():  # away from the teacher, so that both gradients matter from the first step
        torch.manual_seed(6)
        for p in wrapped.parameters() if parallel.startswith("fsdp1") else model.parameters():
            p.mul_(1.1)
    if average_by_hand:
        craft["process_group"] = dist.group.WORLD
    run = wrapped if through == "wrapped" else model
    closures = {name: CLOSURES[name](run, AnchorCache.open(cache), world_size) for name in closure.split(" and ")}
    epsilon = craft.pop("epsilon", 0.01)
    constraints = {
        name: Constraint(
            one,
            epsilon[name] if isinstance(epsilon, dict) else epsilon,
            heldout=AnchorCache.open(heldout) if heldout else None,
        )
        for name, one in closures.items()
    }
    optimizer = CraftOptimizer(
        BASES[base](wrapped.parameters()),
        constraints if len(constraints) > 1 else constraints[closure],
        **{"max_grad_norm": 2.2} | craft,
    )
    options = StateDictOptions(**options or {})
    if load:
        model_state, optimizer_state = get_state_dict(wrapped, optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(state, checkpoint_id=load)
        set_state_dict(
            wrapped,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
    metrics = []
    for step in range(int(optimizer.param_groups[0]["craft_step"]), steps):
        optimizer.zero_grad()
        x, y = (t.chunk(world_size)[rank] for t in samples(step))
        for i, (xs, ys) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)):
            last = i == micro_batches - 1
            with contextlib.nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
                if hasattr(wrapped, "set_requires_gradient_sync"):
                    wrapped.set_requires_gradient_sync(last)
                (cross_entropy(wrapped(xs), ys) / micro_batches).backward()
        if average_by_hand:
            for p in model.parameters():
                dist.all_reduce(p.grad.div_(world_size))
        optimizer.step()
        metrics.append(dict(optimizer.metrics))
    if save:
        model_state, optimizer_state = get_state_dict(wrapped, optimizer, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        if in_the_background:
            checkpoint.async_save(state, checkpoint_id=save).result()
        else:
            checkpoint.save(state, checkpoint_id=save)
    return outcome(wrapped, optimizer, metrics)


def average_of(seed, kinds):
    """One gradient per word of `kinds`, a letter per rank: d(ense), s(parse), n(one), c(omplex), h(alf)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    gradients, parameters = [], []
    for i, kind in enumerate(kinds):
        generator = torch.Generator().manual_seed(seed + 100 * i + rank)
        dtype = {"c": torch.complex64, "h": torch.float16}.get(kind[rank % len(kind)], torch.float32)
        g = torch.randn(3, 4 + i, generator=generator, dtype=dtype).transpose(0, 1)
        g[1] = 0
        parameters.append(torch.zeros(g.shape, dtype=dtype))
        of_rank = kind[rank % len(kind)]
        gradients.append(None if of_rank == "n" else g.contiguous().to_sparse(1) if of_rank == "s" else g)
    everyones = [None] * size
    dist.all_gather_object(everyones, [g if g is None or not g.is_sparse else g.to_dense() for g in gradients])
    expected = []
    for i, p in enumerate(parameters):
        present = [of_rank[i] for of_rank in everyones if of_rank[i] is not None]
        expected.append(sum(present, torch.zeros_like(p)) / size if present else None)
    flags = [i % size == rank or i % 3 == 0 for i in range(len(kinds))]
    averaging = Averaging(dist.group.WORLD)
    means = averaging.means(gradients, parameters, flags)
    found = means.gradients
    assert not means.more, "of the first pass all have agreed on everything"
    assert means.wanted == [True] * len(kinds), "set on any rank"
    return [
        (f, None if f is None else f.to_dense() if f.is_sparse else f, e) for f, e in zip(found, expected, strict=True)
    ]


def averages_in_turn(seed, turns):
    """`average_of` for one pass after another, of gradients that need not be of the kinds of the pass before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    averaging, outcomes = Averaging(dist.group.WORLD), []
    for turn, kinds in enumerate(turns):
        gradients, parameters = [], []
        for i, kind in enumerate(kinds):
            generator = torch.Generator().manual_seed(seed + 1000 * turn + 100 * i + rank)
            g = torch.randn(3, 4, generator=generator)
            g[1] = 0
            parameters.append(torch.zeros(3, 4))
            of_rank = kind[rank % len(kind)]
            gradients.append(None if of_rank == "n" else g.to_sparse(1) if of_rank == "s" else g)
        everyones = [None] * size
        dist.all_gather_object(everyones, [g if g is None or not g.is_sparse else g.to_dense() for g in gradients])
        wanted = [(turn + i + rank) % 3 == 0 for i in range(len(kinds))]
        all_wanted = [any((turn + i + other) % 3 == 0 for other in range(size)) for i in range(len(kinds))]
        means = averaging.means(gradients, parameters, wanted)
        any_more = torch.tensor(float(means.more))
        dist.all_reduce(any_more)
        found, agreed = means.gradients, means.wanted
        if any_more > 0:
            extra, agreed = averaging.added(means.rest, parameters, wanted)
            found = [
                f if e is None else e if f is None else f.to_dense() + e.to_dense()
                for f, e in zip(found, extra, strict=True)
            ]
        assert agreed == all_wanted
        for i, f in enumerate(found):
            present = [of_rank[i] for of_rank in everyones if of_rank[i] is not None]
            expected = sum(present, torch.zeros(3, 4)) / size
            outcomes.append((None if f is None else f.to_dense() if f.is_sparse else f, bool(present), expected))
    return outcomes


class Drift(Retention):
    """Mean squared output; what it reaches, and whether it is finite, may depend on the rank."""

    def __init__(self, model, reach=lambda model: model, scale=1.0):
        self.model, self.reach, self.scale, self.told = model, reach, scale, None

    def shard(self, rank, world_size, mean):
        self.told = rank, world_size, mean(torch.tensor(float(dist.get_rank()))).item()

    def loss(self, number):
        return self.scale * self.reach(self.model)(torch.ones(2, 6)).square().mean()


def one_step(model, optimizer, step, rank, world_size):
    """A plain step on this rank's share of the samples."""
    optimizer.zero_grad()
    x, y = (t.chunk(world_size)[rank] for t in samples(step))
    cross_entropy(model(x), y).backward()
    optimizer.step()


def report(parallel="plain", poison=None, steps=2, **craft):
    """What a short run says on each rank: warnings, errors, metrics handed to the sink, the state."""
    model = network()
    wrapped, _, _ = PARALLEL[parallel](model)
    drift = Drift(wrapped)
    sunk = []
    optimizer = CraftOptimizer(BASES["sgd"](wrapped.parameters()), drift, on_metrics=sunk.append, **craft)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(steps):
                drift.scale = float("nan") if poison == dist.get_rank() and step == 1 else 1.0
                one_step(wrapped, optimizer, step, dist.get_rank(), dist.get_world_size())
        except RuntimeError as error:
            return {"error": str(error)}
    return {
        "warnings": [str(w.message) for w in caught if "not finite" in str(w.message)],
        "sunk": len(sunk),
        "shared": drift.told,
        "lambda": optimizer.param_groups[0]["craft_lambda"],
        "skipped": optimizer.param_groups[0]["craft_skipped"],
        "sum": sum(float(p.double().sum()) for p in full(wrapped).values()),
    }


def another_closure():
    """A closure that is set later has to be told its place, too."""
    ddp = DistributedDataParallel(network())
    first, second = Drift(ddp), Drift(ddp)
    optimizer = CraftOptimizer(BASES["sgd"](ddp.parameters()), first)
    for drift in (first, second):
        optimizer.retention_closure = drift
        one_step(ddp, optimizer, 0, 0, 1)
    return first.told, second.told


def reads(constraints=1, steps=9, **craft):
    """The calls of each step that read a tensor's values, or copy some of pageable memory: the host waits in both."""
    counted, tensor = [], torch.tensor
    names = ("tolist", "item", "cpu", "numpy", "__float__", "__bool__", "__int__")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def counting(name):
        def read(self, *arguments, **named):
            counted.append(name)
            return originals[name](self, *arguments, **named)

        return read

    ddp = DistributedDataParallel(network())
    closures = {str(i): Drift(ddp, scale=1.0 + i) for i in range(constraints)}
    optimizer = CraftOptimizer(BASES["stateless"](ddp.parameters()), closures, retention_every=1, **craft)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        x, y = (t.chunk(2)[dist.get_rank()] for t in samples(step))
        cross_entropy(ddp(x), y).backward()
        counted.clear()
        try:
            for name in names:
                setattr(torch.Tensor, name, counting(name))
            torch.tensor = lambda *arguments, **named: counted.append("tensor") or tensor(*arguments, **named)
            optimizer.step()
        finally:
            torch.tensor = tensor
            for name in names:
                setattr(torch.Tensor, name, originals[name])
        assert optimizer.metrics["fresh"] == 1.0
        found.append([name for name in counted if name != "numpy"])  # of what `cpu` has read
    return found


def changing_reach(asks_first):
    """What retention reaches, and what has a task gradient, is another on each rank and step."""
    model = network()
    rank = dist.get_rank()
    optimizer = None

    def reach(m):
        number = int(optimizer.param_groups[0]["craft_step"])
        parts = [m.inlet, lambda x: m.blocks[0].norm(m.inlet(x)), lambda x: m.blocks[1](m.inlet(x)), m]
        return parts[(number + 2 * rank) % 4] if number % 3 else parts[number % 4]

    base = torch.optim.AdamW(model.parameters(), lr=1e-2, maximize=True)
    optimizer = CraftOptimizer(base, Drift(model, reach), process_group=dist.group.WORLD, retention_every=1)
    for step in range(8):
        optimizer.zero_grad()
        (-cross_entropy(model(samples(step)[0]), samples(step)[1])).backward()
        if step % 4 == 1:
            model.head.bias.grad = None
        if step > 4:
            for p in model.blocks[0].parameters():
                p.grad = None
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad.div_(2))
        if asks_first:
            optimizer._forget_circumstances()
        optimizer.step()
    return full(model), dict(optimizer.metrics)


def subset_per_rank():
    """Each rank's retention loss reaches another part of the model."""
    model = network()
    ddp = DistributedDataParallel(model)
    drift = Drift(model, reach=lambda m: m.inlet if dist.get_rank() == 0 else (lambda x: m.blocks[0].norm(m.inlet(x))))
    optimizer = CraftOptimizer(BASES["sgd"](ddp.parameters()), drift)
    for step in range(2):
        one_step(ddp, optimizer, step, dist.get_rank(), dist.get_world_size())
    return full(ddp), dict(optimizer.metrics)


def priming():
    """A step on zero gradients where only one rank's shard is all zero is a step like any other."""
    outcomes = []
    for only_zero_here in (False, True):
        model = network()
        wrapped, rank, world_size = PARALLEL["fsdp2"](model)
        calls = []
        drift = Drift(wrapped)
        optimizer = CraftOptimizer(BASES["sgd"](wrapped.parameters()), lambda d=drift, c=calls: c.append(1) or d())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if only_zero_here and rank == world_size - 1:
            model.inlet.weight.grad.to_local().fill_(1.0)
        optimizer.step()
        outcomes.append((len(calls), optimizer.param_groups[0]["craft_step"]))
    return outcomes


def ignored_parameter():
    """A plain parameter beside sharded ones."""
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params={model.head.bias})
    outcomes = []
    for group in (None, dist.group.WORLD):
        optimizer = CraftOptimizer(BASES["sgd"](model.parameters()), Drift(model), process_group=group)
        model(samples(0)[0] * (1 + dist.get_rank())).sum().backward()
        dist.all_reduce(model.head.bias.grad)
        try:
            optimizer.step()
            outcomes.append(full(model))
        except RuntimeError as error:
            outcomes.append(str(error))
    return outcomes


def left_out(parallel):
    """A block without task gradients; a head that has one on the first rank only, where nothing averages it."""
    model, _, _ = PARALLEL[parallel](network())
    net = model.module if isinstance(model, DistributedDataParallel) else model
    group = dist.group.WORLD if parallel == "plain" else None
    optimizer = CraftOptimizer(BASES["adamw"](model.parameters()), Drift(model), process_group=group)
    before = full(model)
    x = torch.ones(2, 6) * (1 + dist.get_rank())
    (net.inlet(x) if parallel == "plain" else model(x)).square().sum().backward()
    kept = net.blocks[0]
    for p in kept.parameters():
        p.grad = None
    if parallel == "plain":
        for p in net.inlet.parameters():
            dist.all_reduce(p.grad)
        if dist.get_rank() == 0:
            net.head.bias.grad = torch.zeros_like(net.head.bias)
    optimizer.step()
    return before, full(model), optimizer.metrics


def ascent(parallel, maximize):
    """Whole parameters and metrics of a run that ascends the negative loss, or descends the loss."""
    model, rank, world_size = PARALLEL[parallel](network())
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, maximize=maximize)
    optimizer = CraftOptimizer(base, Drift(model), epsilon=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        x, y = (t.chunk(world_size)[rank] for t in samples(step))
        ((-1.0 if maximize else 1.0) * cross_entropy(model(x), y)).backward()
        optimizer.step()
    return full(model), optimizer.metrics
