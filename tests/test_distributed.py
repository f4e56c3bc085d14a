"The chapter on many GPUs as a program: a plan, and the exchange measured between real processes."
import json
from conftest import program


def test_exchange_is_measured(tmp_path):
    "Real processes, a narrow step: each way is timed and the rates are there."
    done = program('rlhf_flant5.scaling', 'measure', '--parts', 'exchange', '--processes', '1', '2', '--pairs', '1', '--steps', '1', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path/'exchange.json').read_text())
    assert row['n'] == 2 and row['seconds'].keys() == {'alone', 'ddp', 'fsdp', 'link'} and min(row['seconds'].values()) > 0 and row['link'] > 0
    assert '| 2 |' in done.stdout and sorted(p.name for p in tmp_path.iterdir()) == ['exchange.json']


def test_plan_is_printed():
    done = program('rlhf_flant5.scaling', 'plan', '--sizes', 'xxl', '--gpus', '1', '8', '--gpu', 'h200')
    assert done.returncode == 0, done.stderr
    assert 'xxl on 8: ddp fits; take it' in done.stdout or 'xxl on 8: take distributed.strategy=fsdp' in done.stdout
    assert program('rlhf_flant5.scaling', 'plan', '--gpus', '12').stderr == 'error: 12 GPUs: machines have 8, so more than one of them must be full; take a multiple of 8\n'
