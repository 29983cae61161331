"""Processes: the layout of several, which average their gradients, add up their sums and decide alike.

For processes i with the local parts t_i, r_i of the task and retention gradients and the drift L_i of their anchors:

    <g_t, g_r> = sum_i share_i <t_i, r_i>,        L = mean_i L_i

share_i is 1 over the number of processes that hold the same elements, so that every element counts once, however it is
sharded or replicated. One all-reduce forms all sums; its result, and so every decision, is the same on every process.

| parameters are | retention gradients | share |
|---|---|---|
| plain, on N processes (DDP) | averaged here | 1/N |
| DTensors (FSDP2, HSDP, TP) | reduced by FSDP2's own hooks | 1 / (replicas within the mesh x processes outside of it) |
| FSDP1's | reduced by FSDP1's own hooks | size of the shard group / N |
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
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

from .gradients import Gradients
from .layout import ONE_PROCESS, Layout

__all__ = ["Processes", "average", "find_layout"]

# Bytes that are copied into one buffer and averaged by one collective.
_BUCKET = 1 << 25


@dataclass(frozen=True)
class Processes(Layout):
    """Several processes, or one with DTensors.

    Attributes:
        everyone: Groups; a sum over one after another is the sum over all processes that decide together.
        averaged_over: ProcessGroup over which gradients that nobody else reduces are averaged; None if there are none.
        rank: See `Layout`.
        world_size: See `Layout`.
        ddp: DDP modules, whose own reduction is off during a retention pass.
        sharding: FSDP1 and FSDP2 modules.
        fsdp1: id of a parameter that FSDP1 sharded -> number of processes it is sharded over.
    """

    everyone: tuple[ProcessGroup, ...] = ()
    averaged_over: ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1
    ddp: tuple[DistributedDataParallel, ...] = ()
    sharding: tuple[nn.Module, ...] = ()
    fsdp1: dict[int, int] = field(default_factory=dict)
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
        if not self.fsdp1:  # its parameters, unlike DTensors, know only their shard
            return sizes
        here = torch.tensor(sizes, dtype=torch.float64) * torch.tensor(self.shares(parameters), dtype=torch.float64)
        return [round(x) for x in self.total(here.to(parameters[0].device)).tolist()]

    def shares(self, parameters: Sequence[Tensor]) -> list[float]:
        return [self._share(p) for p in parameters]

    def _share(self, p: Tensor) -> float:
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            replicas = math.prod(mesh.size(d) for d, place in enumerate(p.placements) if place.is_replicate())
            return mesh.size() / (replicas * self.size)
        return self.fsdp1.get(id(p), 1) / self.size

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
        # The backward would let go of what a forward has gathered. The next forward would find it there, and not what
        # has become of the parameters since
        for module in self.sharding:
            if isinstance(module, FSDPModule):
                module.reshard()
            elif (handle := cast(Any, module)._handle) is not None and handle.uses_sharded_strategy:
                _reshard(cast(Any, module), handle, True)

    def averaged(
        self, gradients: Gradients, parameters: Sequence[Tensor], wanted: list[bool]
    ) -> tuple[Gradients, list[bool]]:
        if self.averaged_over is None:
            return gradients, wanted
        spanned = set(dist.get_process_group_ranks(self.averaged_over))

        def is_reduced(p: Tensor) -> bool:
            # By FSDP2, if the parameter's mesh spans the group; a mesh of tensor parallelism does not.
            return spanned <= _ranks(p.device_mesh) if isinstance(p, DTensor) else id(p) in self.fsdp1

        mine = [i for i, p in enumerate(parameters) if not is_reduced(p)]
        local = [_local(gradients[i]) for i in mine]
        of_mine = [_local(parameters[i]) for i in mine]
        reduced, agreed = average(local, of_mine, self.averaged_over, [wanted[i] for i in mine])
        result, wanted = list(gradients), list(wanted)
        for i, g, anywhere in zip(mine, reduced, agreed, strict=True):
            result[i], wanted[i] = None if g is None else _like(g, parameters[i]), anywhere
        return result, wanted

    def local(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        return [
            _local(g.redistribute(p.device_mesh, p.placements))
            if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements
            else _local(g)
            for g, p in zip(gradients, parameters, strict=True)
        ]

    def wrapped(self, local: Gradients, parameters: Sequence[Tensor], *whole: Gradients) -> Gradients:
        # To make a DTensor costs as much as ten of its local operations.
        known = {id(_local(g)): g for gradients in whole for g in gradients if g is not None}
        return [
            None if g is None else known[id(g)] if id(g) in known else _like(g, p)
            for g, p in zip(local, parameters, strict=True)
        ]

    def reduce(self, sums: Tensor) -> Tensor:  # type: ignore[override]  # an attribute there, since one has none
        """For `GradientSets.inner_products`: the products of all processes added up, the scalars averaged."""
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


@torch.no_grad()
def average(
    gradients: Gradients, parameters: Sequence[Tensor], group: ProcessGroup, flags: Sequence[bool]
) -> tuple[Gradients, list[bool]]:
    """The mean of each gradient over the group.

    Two collectives at least: one says which gradients exist anywhere (a gradient that is None here but not elsewhere
    counts as zero), then one per 32 MiB of gradients, which are copied into one buffer, and one per sparse gradient.

    Args:
        gradients: Dense or sparse, of any floating or complex dtype; dense ones are overwritten.
        parameters: Plain tensors of the same shapes.
        group: The process group.
        flags: One for each gradient, which go along with the first collective.

    Returns:
        The means, None where the gradient is None on every process; and the flags that are set on any process.
    """
    if not gradients:
        return [], []
    absent, dense = 0, 99  # between them, sparse gradients by their number of sparse dimensions
    here = [absent if g is None else g.sparse_dim() if g.is_sparse else dense for g in gradients]
    told = torch.tensor([here, list(flags)], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    kinds, anywhere = told.tolist()
    size = group.size()
    result: Gradients = []
    bucket: list[Tensor] = []
    held = 0

    def reduce_bucket() -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0].div_(size), group=group)
        elif bucket:
            real = [_real(g) for g in bucket]
            flat = torch.cat([g.reshape(-1) for g in real]).div_(size)
            dist.all_reduce(flat, group=group)
            pieces = torch.split_with_sizes(flat, [g.numel() for g in real])
            torch._foreach_copy_(real, [x.view_as(g) for x, g in zip(pieces, real, strict=True)])
        bucket.clear()

    for g, p, kind in zip(gradients, parameters, kinds, strict=True):
        if kind == absent:
            result.append(None)
        elif kind < dense:
            if g is None:
                places = torch.zeros(kind, 0, dtype=torch.int64, device=p.device)
                g = torch.sparse_coo_tensor(places, p.new_zeros(0, *p.shape[kind:]), p.shape, check_invariants=False)
            g = (g / size).coalesce()
            dist.all_reduce(g, group=group)
            result.append(g)
        else:
            g = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            if bucket and ((bucket[0].dtype, bucket[0].device) != (g.dtype, g.device) or held + g.nbytes > _BUCKET):
                reduce_bucket()
                held = 0
            bucket.append(g)
            held += g.nbytes
            result.append(g)
    reduce_bucket()
    return result, [bool(flag) for flag in anywhere]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def find_layout(parameters: Sequence[Tensor], process_group: ProcessGroup | Literal[False] | None) -> Layout:
    """How the parameters are spread over processes; `ONE_PROCESS` for one that decides alone, on plain tensors.

    torch.distributed must be initialised.

    Args:
        parameters: The optimizer's, as they are when training begins.
        process_group: Over which the task gradients of plain parameters are averaged; False if over none; None to find
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
        if handle is not None:  # a module may leave all its parameters to those within it
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
    return Processes(everyone, group, rank, world_size, ddp, sharding, sharded)


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

    A parameter does not know its wrapper, and frameworks wrap after the closure and the optimizer are made: so all live
    objects are searched, once, before the first retention pass.
    """
    kinds = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    wanted = {id(p) for p in parameters}
    return [m for m in gc.get_objects() if issubclass(type(m), kinds) and any(id(p) in wanted for p in m.parameters())]


def _mesh_infos(module: Any) -> list[Any]:
    """FSDP2 keeps the mesh that it shards and replicates over, without tensor parallelism, in its private state."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group.mesh_info for group in groups if group is not None]


def _data_size(info: Any) -> int:
    return int(getattr(info, "replicate_mesh_size", 1) * getattr(info, "shard_mesh_size", 1))


def _data_rank(info: Any) -> int:
    shard, replica = getattr(info, "shard_mesh_rank", 0), getattr(info, "replicate_mesh_rank", 0)
    return int(replica * getattr(info, "shard_mesh_size", 1) + shard)


def _fsdp1_groups(module: Any) -> list[ProcessGroup]:
    """The group that shards, then the one that replicates, if there is one."""
    return [module.process_group, *([module._inter_node_pg] if getattr(module, "_inter_node_pg", None) else [])]
