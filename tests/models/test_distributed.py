"""Training on several processes: DistributedDataParallel and FSDP2 over gloo, and synchronised batch norms.

Run as a script, `test_distributed.py FOLDER RANK`, this file is one process of the group.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed import fsdp

import timm_gsa

WORLD = 2
HAS_FSDP2 = hasattr(fsdp, 'fully_shard')  # torch 2.5 has it elsewhere


def whole(tensor):
    """A copy of all of a tensor, wherever its shards are."""
    return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().clone()


def step(model, optimizer, x, target):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    grads = {key.removeprefix('module.'): None if p.grad is None else whole(p.grad)
             for key, p in model.named_parameters()}
    optimizer.step()
    return grads


def train(model, x, target):
    """Gradients of the first of two steps, and the state after both; norms in eval, as their batches differ."""
    optimizer = torch.optim.SGD(model.eval().parameters(), lr=1e-3)
    grads = step(model, optimizer, x, target)
    step(model, optimizer, x, target)
    return grads


def shard(model, blocks):
    """The model with each of the blocks named, and what is left, sharded over all processes."""
    mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (WORLD,))
    for module in [*(model.get_submodule(name) for name in blocks), model]:
        fsdp.fully_shard(module, mesh=mesh)
    return model


def worker(folder, rank):
    """One process: trains on its share of the batch what it finds in the folder, and leaves its results there."""
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo' if sys.platform == 'linux' else 'lo0'
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD)
    for path in sorted(folder.glob('*.job')):
        job = torch.load(path, weights_only=True)
        x, target = (job[name].chunk(WORLD)[rank] for name in ('x', 'target'))
        model = timm.create_model(**job['arguments'], dtype=torch.float64)
        if rank == 0:
            model.load_state_dict(job['state_dict'])  # the others get it from here
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        result = dict(ddp=dict(grads=train(parallel, x, target), state_dict=model.state_dict()))
        if job['fsdp']:
            model = timm.create_model(**job['arguments'], dtype=torch.float64)
            model.load_state_dict(job['state_dict'])
            grads = train(shard(model, job['blocks']), x, target)
            shares = [p.to_local().numel() / p.numel() for p in model.parameters()]
            state_dict = {key: whole(tensor) for key, tensor in model.state_dict().items()}
            result['fsdp'] = dict(grads=grads, state_dict=state_dict, shares=shares)
        torch.save(result, path.with_suffix(f'.{rank}'))
    torch.distributed.destroy_process_group()


def run_workers(folder):
    path = os.pathsep.join([str(Path(timm_gsa.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env={**os.environ, 'PYTHONPATH': path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, '\n'.join(outputs)


@pytest.fixture(scope='module')
def trained(families, create, tmp_path_factory, pytestconfig):
    """What every process found for every model, beside what one process finds on the whole batch."""
    from .blocks import BLOCKS  # not at the top: the script is no part of a package

    folder, alone = tmp_path_factory.mktemp('ddp'), {}
    for name, arguments in families.items():
        model = create(name, num_classes=7, dtype=torch.float64)
        x, target = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
        torch.save(dict(
            arguments=dict(arguments, model_name=name, num_classes=7),
            state_dict=model.state_dict(), x=x, target=target,
            fsdp=HAS_FSDP2 and pytestconfig.getoption('--slow'),
            blocks=[key for key, module in model.named_modules() if isinstance(module, BLOCKS)],
        ), folder / f'{name}.job')
        alone[name] = dict(grads=train(model, x, target), state_dict=model.state_dict())
    run_workers(folder)
    return {
        name: (alone[name], [torch.load(folder / f'{name}.{rank}', weights_only=True) for rank in range(WORLD)])
        for name in families
    }


@pytest.fixture(params=['ddp', pytest.param('fsdp', marks=pytest.mark.slow)])
def kind(request):
    """What the training ran in."""
    if request.param == 'fsdp' and not HAS_FSDP2:
        pytest.skip(f'fully_shard of torch {torch.__version__} has it elsewhere')
    return request.param


def test_gradients_are_those_of_the_joined_batch(name, trained, kind):
    alone, ranks = trained[name]
    for rank in ranks:
        grads = rank[kind]['grads']
        assert [key for key, grad in grads.items() if grad is None] == []
        for key, grad in alone['grads'].items():
            torch.testing.assert_close(grads[key], grad, msg=lambda text, key=key: f'{key}: {text}')


def test_processes_stay_equal(name, trained, kind):
    alone, (first, second) = trained[name]
    for key, tensor in alone['state_dict'].items():
        assert torch.equal(first[kind]['state_dict'][key], second[kind]['state_dict'][key]), key
        torch.testing.assert_close(
            first[kind]['state_dict'][key], tensor, msg=lambda text, key=key: f'{key}: {text}')


@pytest.mark.slow
def test_each_process_holds_its_share(name, trained):
    """Of every parameter: `fully_shard` reached all blocks, and what is outside of them."""
    if not HAS_FSDP2:
        pytest.skip(f'fully_shard of torch {torch.__version__} has it elsewhere')
    for share, other in zip(*(rank['fsdp']['shares'] for rank in trained[name][1]), strict=True):
        assert share + other == 1. and (share, other) != (0., 1.)


@pytest.mark.parametrize(
    'convert', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm], ids=['timm', 'torch'])
def test_batch_norms_become_synchronised_ones(name, create, convert):
    model = create(name).eval()
    norms = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        converted = convert(model)
        torch.testing.assert_close(converted.eval()(x), before, rtol=0., atol=0.)
    assert norms == [key for key, module in converted.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) > 10 and not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())


if __name__ == '__main__':
    worker(Path(sys.argv[1]), int(sys.argv[2]))
