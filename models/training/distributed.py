"""Several processes, one run: torchrun starts them, DDP or FSDP carries the gradients, this file does the rest.

A run is defined by its *global* batch. Each process computes its rows of it, draws the loop counts that all others
draw (they are keyed by step, not by process) and the noise of its own samples, so the run is the same function of
its config on one process and on eight; only the order of floating-point sums differs.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from haltkit.files import partial_path
from haltkit.folders import atomic_folder
from haltkit.models.config import ConfigError
from haltkit.models.gpt.model import LoopedGPT, Noise

__all__ = [
    "Objective",
    "Processes",
    "Strategy",
    "full_weights",
    "join",
    "local",
    "shared_folder",
    "synchronized",
    "wrap",
]

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]
# The first process evaluates, writes and measures statistics while the others wait for it.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run, and what they do together.

    Every method that says "together" must be called by all processes, in the same order.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """This process's rows of a global batch; sizes differ by one at most.

        Raises:
            ConfigError: fewer rows than processes.
        """
        if batch < self.world:
            raise ConfigError(
                f"train.batch_size={batch} is the batch of all processes together and cannot be shared by "
                f"{self.world}: raise it (and lower train.grad_accumulation), or start fewer processes"
            )
        return range(batch * self.rank // self.world, batch * (self.rank + 1) // self.world)

    def sum(self, values: Tensor) -> Tensor:
        """Collective: the sum over processes, on the CPU, in float64."""
        if self.world == 1:
            return values.detach().cpu().double()
        total = values.detach().to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def greatest(self, value: int) -> int:
        """Collective: the greatest value of any process."""
        if self.world == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Collective: wait until every process has arrived."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Collective: the value of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def once(self, work: Callable[[], T]) -> T:
        """Collective: the result of ``work`` in the first process, or the error that it raises, in every process."""
        self.wait()  # another process may still be reading what it changes
        found: tuple[Any, Exception | None] = None, None
        if self.first:
            try:
                found = work(), None
            except Exception as error:
                found = None, error
        value, failure = self.gather(found)[0]
        if failure is not None:
            raise failure
        result: T = value
        return result


@contextmanager
def join() -> Iterator[Processes]:
    """The processes that torchrun started this one with; one process alone if it did not.

    A process group that exists already is used and not ended. What uses the group (a model under DDP) must be gone at
    the end of the block: in PyTorch 2.13, DDP destroys a group that it is the last to hold without giving up Python's
    lock, for which gloo's thread may be waiting, and then neither ever ends.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if own:
            gc.collect()  # a model under DDP is part of a cycle
            dist.destroy_process_group()


class Objective(nn.Module):
    """Mean cross-entropy of windows: the module that DDP or FSDP wraps, so that every gradient passes it.

    Args:
        model: its parameters are the run's.
        loss: of the model's last hidden states and targets.
        measure: the same without gradients (not compiled: evaluation's batches have sizes of their own).
    """

    def __init__(
        self,
        model: LoopedGPT,
        loss: Callable[[LoopedGPT, Tensor, Tensor], Tensor],
        measure: Callable[[LoopedGPT, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.measure = loss, measure

    def forward(
        self,
        windows: Tensor,
        loops: int | Mapping[str, int],
        noise: Noise | None = None,
        backprop_depth: int | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Loss of windows ``(B, T + 1)``, a scalar."""
        x = self.model.hidden(windows[:, :-1], loops, noise=noise, backprop_depth=backprop_depth, recompute=recompute)
        return (self.loss if torch.is_grad_enabled() else self.measure)(self.model, x, windows[:, 1:])


def wrap(objective: Objective, strategy: Strategy, processes: Processes) -> nn.Module:
    """The objective as the chosen engine runs it; itself on one process."""
    if processes.world == 1:
        return objective
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[processes.device] if processes.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **_no_buffers(),
            find_unused_parameters=_may_be_unused(objective.model),
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for layer in objective.model.layers.values():
        # A region as a whole: its weights are gathered once for all loops, and its gradients are reduced once.
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _no_buffers() -> dict[str, Any]:
    """The model's only buffer is a constant; the argument that says so changed its name in PyTorch 2.13."""
    names = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def _may_be_unused(model: LoopedGPT) -> bool:
    """Injection at the first step only: where gradients do not reach back that far, the projection gets none."""
    return any(region.injection == "first_step" for region in model.regions.values())


def synchronized(wrapped: nn.Module, last: bool) -> Any:
    """A context for one micro-step: DDP exchanges gradients in the last one only."""
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel) or last or wrapped.find_unused_parameters:
        return nullcontext()
    return wrapped.no_sync()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the whole unless FSDP has sharded it."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    assert isinstance(part, Tensor)
    return part


def full_weights(model: LoopedGPT) -> dict[str, Tensor]:
    """Collective: every weight whole, whatever the engine made of it."""
    return {
        name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()
        for name, weight in model.state_dict().items()
    }


@contextmanager
def shared_folder(path: Path, processes: Processes) -> Iterator[Path]:
    """Collective: :func:`~haltkit.folders.atomic_folder` that all processes may write into."""
    if processes.first:
        with atomic_folder(path) as partial:
            processes.wait()
            yield partial
            processes.wait()
    else:
        processes.wait()
        yield partial_path(path)
        processes.wait()
