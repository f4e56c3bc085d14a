"The chapter on many GPUs as a program: a plan, and the exchange measured between real processes."
import json
import pytest
from conftest import program


def scaling(*args): return program('rlhf_flant5.scaling', *args)


def test_exchange_is_measured(tmp_path):
    "Real processes, a narrow step: each way is timed and the rates are there."
    done = scaling('measure', '--parts', 'exchange', '--processes', '1', '2', '--pairs', '1', '--steps', '1',
                   '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    assert '| 2 |' in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ['exchange.json']
    row, = json.loads((tmp_path/'exchange.json').read_text())
    assert row['n'] == 2
    assert row['seconds'].keys() == {'alone', 'ddp', 'fsdp', 'link'}
    assert min(row['seconds'].values()) > 0
    assert row['link'] > 0


def test_plan_is_printed():
    done = scaling('plan', '--sizes', 'xxl', '--gpus', '1', '8', '--gpu', 'h200')
    assert done.returncode == 0, done.stderr
    advised = [line for line in done.stdout.splitlines() if line.startswith('xxl on 8: ')]
    assert len(advised) == 1, done.stdout
    assert advised[0].startswith(('xxl on 8: ddp fits; take it', 'xxl on 8: take distributed.strategy=fsdp'))


@pytest.mark.parametrize('args, message', [
    pytest.param(['--gpus', '12'],
                 '12 GPUs: machines have 8, so more than one of them must be full; take a multiple of 8',
                 id='a machine half full'),
    pytest.param(['--batch-size', '512'],
                 '--batch-size 512: 1024 GPUs need a pair each, at least; raise it or name fewer --gpus',
                 id='fewer pairs than GPUs')])
def test_plan_is_refused_in_a_line(args, message):
    done = scaling('plan', *args)
    assert done.returncode == 2
    assert done.stderr == f'error: {message}\n'
