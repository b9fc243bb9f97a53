"""Data-parallel training of the layer on Triton kernels: two processes give the gradients of one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moc import FfnShape, parse_selection
from moc.layers.moc import TritonMoCFFN

WORLD = 2
KINDS = ("ddp", "fsdp2")


def _layer() -> TritonMoCFFN:
    layer = TritonMoCFFN(FfnShape(8, 64), parse_selection("topk:12"))
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def _tokens() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(9))


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    return {
        name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def _worker(rank: int, folder: str, device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    for kind in KINDS:
        _average(rank, kind, folder, device_type)
    os._exit(0)  # while the interpreter ends, Gloo's threads may abort it (pytorch/pytorch#179291)


def _average(rank: int, kind: str, folder: str, device_type: str) -> None:
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD)
    layer, x = _layer().to(device_type), _tokens().chunk(WORLD)[rank].to(device_type)
    if kind == "ddp":
        gradients = _gradients(DistributedDataParallel(layer), x)
    else:
        fully_shard(layer, mesh=init_device_mesh(device_type, (WORLD,)))
        sharded = _gradients(layer, x)
        gradients = {name: grad.full_tensor() for name, grad in sharded.items()}  # type: ignore[attr-defined]
    if rank == 0:
        torch.save(gradients, Path(folder) / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two gloo processes on the CPU left the gradients of each kind."""
    folder = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        mp.spawn(_worker, (str(folder), "cpu"), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_gradients_of_one(kind: str, saved: Path) -> None:
    """DDP and FSDP2 over two gloo processes on the CPU: averaged gradients are those of the whole batch."""
    _assert_gradients_of_one(saved / f"{kind}.pt")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_two_gpus_give_the_gradients_of_one(tmp_path: Path) -> None:
    """DDP and FSDP2 over NCCL on two GPUs: averaged gradients are those of the whole batch."""
    mp.spawn(_worker, (str(tmp_path), "cuda"), nprocs=WORLD)
    for kind in KINDS:
        _assert_gradients_of_one(tmp_path / f"{kind}.pt")


def _assert_gradients_of_one(saved: Path) -> None:
    actual = torch.load(saved, map_location="cpu", weights_only=True)
    layer = _layer().to("cuda" if torch.cuda.is_available() else "cpu")
    expected = _gradients(layer, _tokens().to(layer.w_gate.device))
    assert sorted(actual) == sorted(expected) == ["w_down", "w_gate", "w_up"]
    for name, wanted in expected.items():
        error = (actual[name] - wanted.cpu()).norm() / wanted.norm()
        assert float(error) < 1e-6, name  # float32 sums in another order
