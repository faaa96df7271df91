"""Two processes: with granularity=world they halt at the same step, and DDP goes on working."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import haltkit
from cases import STEPS, WIDTH, Refiner

pytestmark = pytest.mark.slow

RANKS = 2


def inputs(rank: int) -> Tensor:
    """Each rank's rows settle at a step of their own."""
    return (0.01 if rank else 3.0) * torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(rank))


def on_ranks(work: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What each process saved in ``FOLDER/RANK.pt``."""
    mp.spawn(work, args=(str(folder),), nprocs=RANKS, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = Refiner()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    found: dict[str, Any] = {}
    for spec in (
        "norm:tau=0.4,granularity=batch",
        "norm:tau=0.4,granularity=world",
        "accel:tau=2,granularity=world,pool=max",
    ):
        with haltkit.attach(parallel.module, spec, body=["core"]) as session:
            out = parallel(inputs(rank))
            found[spec] = (
                int(session.steps["loop"].max()),
                torch.equal(out, model(inputs(rank), int(session.steps["loop"].max()))),
            )
            if "world" in spec:
                model.zero_grad()
                out.sum().backward()
                found[spec + " gradient"] = model.core.weight.grad.clone()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def work_with_a_broken_row(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: list[int] = []
    for execution in ("masked", "compact"):
        for pool in ("mean", "max"):
            taken = 0

            def body(x: Tensor) -> Tensor:
                nonlocal taken
                taken += 1
                broken = torch.zeros(len(x), 1, dtype=torch.bool)
                broken[1] = rank == 0 and taken >= 2
                return (x / 2).masked_fill(broken, torch.nan)

            policy = haltkit.policy(f"norm:tau=0.05,granularity=world,pool={pool}")
            x0 = (1 + rank) * torch.ones(3, 4)
            haltkit.run_loop(body, x0, policy, execution=execution)
            found.append(taken)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
@pytest.mark.filterwarnings("ignore")  # spawned processes import under other filters
def test_a_row_that_breaks_on_one_rank_leaves_the_ranks_in_step(tmp_path: Path) -> None:
    first, second = on_ranks(work_with_a_broken_row, tmp_path)
    assert first == second
    assert first[:2] == first[2:]  # masked and compact
    # Rank 1's rows move by 2 / 2^k * 2 each: under 0.05 from step 7 on; the mean with rank 0's halves, one step sooner.
    assert first[:2] == [7, 7]


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
@pytest.mark.filterwarnings("ignore")  # spawned processes import under other filters
def test_a_region_halts_together_on_all_ranks(tmp_path: Path) -> None:
    ranks = on_ranks(work, tmp_path)
    alone, mean, largest = (key for key in ranks[0] if "gradient" not in key)
    assert ranks[0][alone][0] != ranks[1][alone][0]  # what the option is for
    for spec in (mean, largest):
        assert ranks[0][spec] == ranks[1][spec]
        assert ranks[0][spec][1]  # each output is the model's own with that many loops
        assert 1 < ranks[0][spec][0] < STEPS
        assert torch.equal(ranks[0][f"{spec} gradient"], ranks[1][f"{spec} gradient"])
    # The mean over both ranks' rows decides: a single process that sees all rows stops at the same step.
    with torch.no_grad(), haltkit.attach(Refiner(), mean.replace("world", "batch"), body=["core"]) as session:
        session.model(torch.cat([inputs(0), inputs(1)]))
    assert int(session.steps["loop"].max()) == ranks[0][mean][0]


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(ValueError, match="no process group"):
        haltkit.run_loop(lambda x: x, torch.zeros(2, 3), haltkit.policy("norm:tau=1,granularity=world"))
