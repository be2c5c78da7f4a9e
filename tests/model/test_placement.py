"""Weights that are split over processes are refused with what to do, before any work."""

import copy

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from bitween import Bitween
from bitween.gradual import GradualQuantizer
from bitween.model.placement import check_placement


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/together", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [lambda m, t: Bitween(m, t, bits=4), lambda m, t: GradualQuantizer(m, t, 0.5)])
def test_a_sharded_model_is_refused(mesh, tiny_model, tiny_tokenizer, make):
    model = copy.deepcopy(tiny_model)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"weight: expected whole weights.*several processes.*get_model_state_dict"):
        make(model, tiny_tokenizer)


def test_a_tensor_parallel_module_is_refused(mesh):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"0.weight: expected whole weights"):
        Bitween(model, None, bits=4)
    check_placement(nn.Linear(4, 4))
