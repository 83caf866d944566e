"""Kernels and fused passes under what training puts around a model: sharding, checkpointed activations, CUDA graphs.

Sharding runs on a CPU too, in two processes over gloo; on a GPU in one process, and in two where there are two of them.
"""

import datetime

import pytest
import torch
from families import ids, tiny_model
from torch import distributed, multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_linear.modules import fused

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
names = pytest.mark.parametrize("name", ["gla", "retnet"])


def gradients(model, input_ids):
    loss = model(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train_sharded(rank, processes, rendezvous):
    """Two steps of a model whose layers are sharded, each process on its rows, beside two steps of the whole model on all."""
    if ON_GPU:
        torch.cuda.set_device(rank)
    else:
        fused.runs_triton = lambda device: True
    distributed.init_process_group(
        "nccl" if ON_GPU else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    for name in ("gla", "retnet"):
        single, sharded = (tiny_model(name, dtype=torch.float32).to(DEVICE).train() for _ in range(2))
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        rows = ids(4, 30).to(DEVICE)
        mine = rows.chunk(processes)[rank]
        for _ in range(2):
            expected, found = gradients(single, rows), gradients(sharded, mine)
            distributed.all_reduce(found[0])
            found[0] /= processes
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(whole(x), y, rtol=1e-4, atol=1e-6)
            for model in (single, sharded):
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()
        assert any(isinstance(p, DTensor) for p in sharded.parameters())
    distributed.destroy_process_group()


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param(1, marks=pytest.mark.gpu),
        pytest.param(2, marks=pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none")),
    ],
)
def test_sharded_training_is_that_of_one_process(processes, tmp_path):
    # A process of the fork server ends without Python's teardown, in which gloo's threads, that outlive their group, may abort.
    arguments = (processes, tmp_path / "rendezvous")
    multiprocessing.start_processes(train_sharded, arguments, nprocs=processes, start_method="forkserver")


@names
def test_checkpointed_activations_change_nothing(name, monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(fused, "runs_triton", lambda device: True)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(name, dtype=torch.float32, fuse_linear_cross_entropy=True).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(gradients(model, ids(2, 30).to(DEVICE)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@names
def test_gpu_autocast_is_close_to_full_precision(name):
    results = []
    for autocast in (False, True):
        model = tiny_model(name, dtype=torch.float32).to(DEVICE).train()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            results.append(gradients(model, ids(2, 200).to(DEVICE)))
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert (x - y).norm() < 0.05 * x.norm()  # a dozen products deep, each rounded to 2^-9


@pytest.mark.gpu
@names
def test_gpu_training_step_in_a_cuda_graph(name):
    model = tiny_model(name, dtype=torch.bfloat16).to(DEVICE).train()
    input_ids = ids(2, 200).to(DEVICE)
    expected = [x.clone() for x in gradients(model, input_ids)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made on the first calls is made before the capture
        for _ in range(2):
            model.zero_grad()
            gradients(model, input_ids)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model, input_ids)
    for x in found:
        x.zero_()
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
