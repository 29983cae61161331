"""Processes: layout of several processes, which average their gradients, add up their sums and decide alike.

For processes i with the local parts t_i, r_i of the task and retention gradients and the drift L_i of their anchors:

    <g_t, g_r> = sum_i share_i <t_i, r_i>,        L = mean_i L_i

share_i is 1 over the number of processes that hold the same elements, so that every element counts once, sharded or
replicated. One all-reduce forms all sums; its result, and so every decision, is the same on every process.

| parameters are | retention gradients | share |
|---|---|---|
| plain, on N processes (DDP) | averaged here | 1/N |
| DTensors (FSDP2, HSDP, TP) | reduced by FSDP2's own hooks | 1 / (replicas within the mesh x processes outside of it) |
| FSDP1's | reduced by FSDP1's own hooks | size of the shard group / N |
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .averaging import Averaging
from .gradients import Gradients, any_of
from .layout import ONE_PROCESS, Averaged, Layout

__all__ = ["Processes", "find_layout"]


@dataclass(frozen=True)
class Processes(Layout):
    """Several processes, or one with DTensors.

    Attributes:
        everyone: Groups; summing over them in turn sums over all processes that decide together.
        averaged_over: ProcessGroup for averaging gradients that no framework reduces; None if there are none.
        rank: Place of this process, see `Layout`.
        world_size: Number of processes, see `Layout`.
        ddp: DDP modules, whose own reduction is off during a retention pass.
        sharding: FSDP1 and FSDP2 modules.
        fsdp1: id of a parameter that FSDP1 sharded -> number of processes it is sharded over.
        shares: Weights of the parameters, see `Layout`.
        has_dtensors: True if any parameter is a DTensor.
        averagings: Name of a constraint -> `Averaging` of its gradients, with the agreement of all processes.
    """

    everyone: tuple[ProcessGroup, ...] = ()
    averaged_over: ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1
    ddp: tuple[DistributedDataParallel, ...] = ()
    sharding: tuple[nn.Module, ...] = ()
    fsdp1: dict[int, int] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    has_dtensors: bool = True
    averagings: dict[str | None, Averaging] = field(default_factory=dict)
    several = True

    @property
    def size(self) -> int:
        return math.prod(group.size() for group in self.everyone)

    @property
    def first(self) -> bool:
        return all(group.rank() == 0 for group in self.everyone)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits on each."""
        for group in self.everyone:
            dist.all_reduce(tensor, group=group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.total(tensor.clone()) / self.size

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        found: list[float] = self.total(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()
        return [x > 0.0 for x in found]

    def elements(self, parameters: Sequence[Tensor]) -> list[int]:
        sizes = [p.numel() for p in parameters]
        if not self.fsdp1:  # FSDP1's parameters, unlike DTensors, know only their shard
            return sizes
        here = torch.tensor(sizes, dtype=torch.float64) * torch.tensor(self.shares, dtype=torch.float64)
        return [round(x) for x in self.total(here.to(parameters[0].device)).tolist()]

    @cached_property
    def _waits_for_nobody(self) -> bool:
        """True if a backward is known to have no collectives of its own.

        Two NCCL groups busy at once, in another order on each process, may deadlock.
        """
        models = [m for ddp in self.ddp for m in ddp.modules()]
        alone = models and not self.sharding and not self.has_dtensors
        return bool(alone) and not any(isinstance(m, nn.SyncBatchNorm) for m in models)

    @contextmanager
    def own_reduction(self) -> Iterator[None]:
        # DDP's buckets would be those of the task gradients, or await them all
        with ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(module.no_sync())
            yield

    @contextmanager
    def without_backward(self) -> Iterator[None]:
        with self.own_reduction():
            yield
        # The backward would free the gathered parameters. Without it the next forward would find old values of the
        # parameters
        for module in self.sharding:
            if isinstance(module, FSDPModule):
                module.reshard()
            elif (handle := cast(Any, module)._handle) is not None and handle.uses_sharded_strategy:
                _reshard(cast(Any, module), handle, True)

    def during_backward(self, parameters: Sequence[Tensor], name: str | None = None) -> AbstractContextManager[object]:
        if self.averaged_over is None or not self._waits_for_nobody:
            return nullcontext()
        averaging = self._averaging(self.averaged_over, parameters, name)
        return averaging.during_backward(self._at(averaging.parameters, parameters))

    def averaged(
        self, gradients: Gradients, parameters: Sequence[Tensor], wanted: list[bool], name: str | None = None
    ) -> Averaged:
        if self.averaged_over is None:
            return Averaged(gradients, wanted)
        averaging = self._averaging(self.averaged_over, parameters, name)
        mine = averaging.parameters
        means = averaging.means(self._at(mine, gradients), self._at(mine, parameters), [wanted[i] for i in mine])
        some = means.begun or any_of(gradients, parameters)
        found, anywhere = list(gradients), list(wanted)
        for i, g, want in zip(mine, means.gradients, means.wanted, strict=True):
            found[i], anywhere[i] = self._whole(g, parameters[i]), want
        return Averaged(found, anywhere, wanted, means.rest, (float(means.more), float(some)))

    def added(self, averaged: Averaged, parameters: Sequence[Tensor], name: str | None = None) -> Averaged:
        averaging = self.averagings[name]
        mine, here = averaging.parameters, averaged.here
        extra, agreed = averaging.added(averaged.rest, self._at(mine, parameters), [here[i] for i in mine])
        found, wanted = list(averaged.gradients), list(averaged.wanted)
        for i, part, want in zip(mine, extra, agreed, strict=True):
            g, more, wanted[i] = found[i], self._whole(part, parameters[i]), want
            if g is None or more is None:
                found[i] = g if more is None else more
            else:  # a sparse tensor can be added to a dense one, not vice versa
                found[i] = more + g if g.is_sparse else g + more
        return Averaged(found, wanted)

    def _averaging(self, group: ProcessGroup, parameters: Sequence[Tensor], name: str | None) -> Averaging:
        if name not in self.averagings:
            self.averagings[name] = Averaging(group, self._not_reduced(parameters, group))
        return self.averagings[name]

    def _at(self, places: Sequence[int], tensors: Sequence[Any]) -> list[Any]:
        """The parts on this process of the tensors at some places."""
        return [_local(tensors[i]) for i in places] if self.has_dtensors else [tensors[i] for i in places]

    def _whole(self, local: Tensor | None, parameter: Tensor) -> Tensor | None:
        return _like(local, parameter) if self.has_dtensors and local is not None else local

    def _not_reduced(self, parameters: Sequence[Tensor], group: ProcessGroup) -> list[int]:
        """Places of the parameters whose gradients no framework has averaged over the group."""
        spanned = set(dist.get_process_group_ranks(group))

        def is_reduced(p: Tensor) -> bool:
            # FSDP2 averages if the parameter's mesh spans the group; a mesh of tensor parallelism does not.
            return spanned <= _ranks(p.device_mesh) if isinstance(p, DTensor) else id(p) in self.fsdp1

        return [i for i, p in enumerate(parameters) if not is_reduced(p)]

    def local(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        if not self.has_dtensors:
            return gradients
        return [
            _local(g.redistribute(p.device_mesh, p.placements))
            if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements
            else _local(g)
            for g, p in zip(gradients, parameters, strict=True)
        ]

    def wrapped(self, local: Gradients, parameters: Sequence[Tensor], *whole: Gradients) -> Gradients:
        if not self.has_dtensors:
            return local
        # Making a DTensor costs as much as ten of its local operations.
        known = {id(_local(g)): g for gradients in whole for g in gradients if g is not None}
        return [
            None if g is None else known[id(g)] if id(g) in known else _like(g, p)
            for g, p in zip(local, parameters, strict=True)
        ]

    def reduce(self, sums: Tensor) -> Tensor:  # type: ignore[override]  # an attribute there, since one has none
        """Adds up the products over all processes and averages the scalars, for `GradientSets.inner_products`."""
        sums[3] /= self.size
        return self.total(sums)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor) or isinstance(local, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.size(),
        stride=parameter.stride(),
    )


def find_layout(parameters: Sequence[Tensor], process_group: ProcessGroup | Literal[False] | None) -> Layout:
    """Finds the layout of the parameters; `ONE_PROCESS` for a process that decides alone, on plain tensors.

    torch.distributed must be initialised.

    Args:
        parameters: The optimizer's parameters when training begins.
        process_group: Group over which task gradients of plain parameters are averaged; False for none; None to find
            the DDP, FSDP1 or FSDP2 modules that hold the parameters.

    Raises:
        RuntimeError: There are several processes, and nothing shows whether plain parameters are replicas.
    """
    several = dist.get_world_size() > 1
    meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)]
    if not (several or meshes):
        return ONE_PROCESS
    modules = _parallel_modules(parameters)
    ddp = tuple(m for m in modules if isinstance(m, DistributedDataParallel))
    fsdp1 = [m for m in modules if isinstance(m, FullyShardedDataParallel)]
    fsdp2 = [info for m in modules if isinstance(m, FSDPModule) for info in _mesh_infos(m)]

    sharded: dict[int, int] = {}
    for handle in (cast(Any, module)._handle for module in fsdp1):
        if handle is not None:  # a module may leave all its parameters to its submodules
            shard = handle.world_size if handle.uses_sharded_strategy else 1
            flat = handle.flat_param
            sharded |= {id(p): shard for p in [flat, *(getattr(flat, "_params", None) or ())]}
    fsdp1_groups = _fsdp1_groups(fsdp1[0]) if fsdp1 else []

    group = process_group or None
    if process_group is None and ddp:
        group = ddp[0].process_group
    plain = [p for p in parameters if not isinstance(p, DTensor) and id(p) not in sharded]
    if several and group is None and process_group is None and plain and (fsdp1 or fsdp2 or not meshes):
        raise RuntimeError(
            f"torch.distributed runs {dist.get_world_size()} processes, and no DistributedDataParallel or FSDP module "
            f"holds {len(plain)} of the optimizer's parameters (the first has shape {tuple(plain[0].shape)}). If their "
            "gradients are averaged in another way, pass `process_group=torch.distributed.group.WORLD`, or the group "
            "they are averaged over; if every process trains a model of its own, pass `process_group=False`."
        )

    if fsdp2:
        info = max(fsdp2, key=_data_size)
        rank, world_size = _data_rank(info), _data_size(info)
    elif fsdp1:
        rank, world_size = 0, 1
        for outer in fsdp1_groups:
            rank, world_size = outer.rank() * world_size + rank, outer.size() * world_size
    elif group is not None:
        rank, world_size = group.rank(), group.size()
    else:
        rank, world_size = 0, 1

    everyone = _everyone(meshes, group, fsdp1_groups)
    if not everyone:
        return ONE_PROCESS
    sharding = tuple(m for m in modules if not isinstance(m, DistributedDataParallel))
    size = math.prod(one.size() for one in everyone)
    shares = tuple(_share(p, size, sharded) for p in parameters)
    return Processes(everyone, group, rank, world_size, ddp, sharding, sharded, shares, bool(meshes))


def _share(p: Tensor, size: int, fsdp1: dict[int, int]) -> float:
    """Weight of this process' sum over the parameter's elements, among `size` processes."""
    if isinstance(p, DTensor):
        mesh = p.device_mesh
        replicas = math.prod(mesh.size(d) for d, place in enumerate(p.placements) if place.is_replicate())
        return mesh.size() / (replicas * size)
    return fsdp1.get(id(p), 1) / size


def _everyone(
    meshes: list[DeviceMesh], group: ProcessGroup | None, fsdp1: list[ProcessGroup]
) -> tuple[ProcessGroup, ...]:
    if not meshes:
        return tuple(fsdp1) or (() if group is None else (group,))
    world = cast(ProcessGroup, dist.group.WORLD)
    roots = {id(root): root for root in map(_root_mesh, meshes)}
    root = next(iter(roots.values()))
    if len(roots) > 1 or root.size() == world.size():
        return (world,)
    if group is not None and not set(dist.get_process_group_ranks(group)) <= _ranks(root):
        return (world,)
    return tuple(root.get_all_groups())


@lru_cache(maxsize=16)
def _ranks(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch < 2.10

    return _mesh_resources.get_root_mesh(mesh)


def _parallel_modules(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """DDP, FSDP1 and FSDP2 modules that hold any of the parameters.

    A parameter does not know its wrapper, and frameworks wrap after the closure and the optimizer are made: so one
    search of all live objects precedes the first retention pass.
    """
    kinds = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    wanted = {id(p) for p in parameters}
    return [m for m in gc.get_objects() if issubclass(type(m), kinds) and any(id(p) in wanted for p in m.parameters())]


def _mesh_infos(module: Any) -> list[Any]:
    """The meshes of FSDP2's sharding and replication, without tensor parallelism, from its private state."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group.mesh_info for group in groups if group is not None]


def _data_size(info: Any) -> int:
    return int(getattr(info, "replicate_mesh_size", 1) * getattr(info, "shard_mesh_size", 1))


def _data_rank(info: Any) -> int:
    shard, replica = getattr(info, "shard_mesh_rank", 0), getattr(info, "replicate_mesh_rank", 0)
    return int(replica * getattr(info, "shard_mesh_size", 1) + shard)


def _fsdp1_groups(module: Any) -> list[ProcessGroup]:
    """The sharding group, then the replicating one if there is one."""
    return [module.process_group, *([module._inter_node_pg] if getattr(module, "_inter_node_pg", None) else [])]
