"launch/: what the scripts hand to Slurm and to torchrun, and what they make of an exit code."
import json, math, os, socket, subprocess, sys
from pathlib import Path
import pytest
from conftest import root

# the tasks at once, each with its numbers; the highest exit code
SRUN = '''#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
    pids[i]=$!
done
code=0
for p in "${pids[@]}"; do
    wait "$p"
    c=$?
    ((c > code)) && code=$c
done
exit $code
'''
SCONTROL = '''#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [[ $1 == show ]]; then printf "%s\\n" ${HOSTS:-node7 node8}; fi
'''
PYTHON = '''#!/bin/bash
said=python
for name in RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS; do said+=" $name=${!name}"; done
echo "$said [$(printf "<%s>" "$@")]" >> "$CALLS"
exit ${CODE:-0}
'''
TORCHRUN = '''#!/bin/bash
echo "torchrun [$(printf "<%s>" "$@")]" >> "$CALLS"
exit ${CODE:-0}
'''
STAND_INS = dict(srun=SRUN, scontrol=SCONTROL, python=PYTHON, torchrun=TORCHRUN)
slurm = dict(SLURM_JOB_ID='41234', SLURM_JOB_NODELIST='node[7-8]', SLURM_CPUS_PER_TASK='3')


def launched(tmp_path, script, *args, stand_ins, **env):
    "Start a script of launch/ with stand-ins for some programs; their calls go to `calls`."
    programs = tmp_path/'bin'
    programs.mkdir(exist_ok=True)
    for name in stand_ins:
        (programs/name).write_text(STAND_INS[name])
        (programs/name).chmod(0o755)
    known = dict(PATH=f'{programs}:{Path(sys.executable).parent}:{os.environ["PATH"]}', PYTHONPATH=str(root),
                 CALLS=str(tmp_path/'calls'), RESULTS_ROOT_DIR=str(tmp_path), RLHF_FLANT5_CACHE=str(tmp_path/'cache'))
    return subprocess.Popen(['bash', root/'launch'/script, *args], cwd=tmp_path, env=os.environ | known | env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def calls(tmp_path, name):
    lines = (tmp_path/'calls').read_text().splitlines()
    return [line.removeprefix(f'{name} ') for line in lines if line.startswith(f'{name} ')]


def free_port() -> int: # among those that slurm.sh takes
    def free(port):
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) != 0
    return next(port for port in range(10000 + os.getpid() % 10000, 30000) if free(port))


def test_slurm_names_the_processes(tmp_path):
    done = launched(tmp_path, 'slurm.sh', 'desc=a b', 'model=[x,y]', stand_ins=('srun', 'scontrol', 'python'), **slurm)
    assert done.wait(60) == 0, done.stderr.read()
    group = f'WORLD_SIZE=2 MASTER_ADDR=node7 MASTER_PORT={10000 + 41234 % 20000} OMP_NUM_THREADS=3'
    command = '[<-m><rlhf_flant5.train><resume=true><desc=a b><model=[x,y]>]'
    assert sorted(calls(tmp_path, 'python')) == [f'RANK={i} LOCAL_RANK={i} {group} {command}' for i in (0, 1)]
    assert calls(tmp_path, 'scontrol') == ['show hostnames node[7-8]']
    # a site may default to 1, which would kill the process that writes the checkpoint
    assert '--kill-on-bad-exit=0' in calls(tmp_path, 'srun')[0]


@pytest.mark.parametrize('code', [75, 0, 1, 2, 137])
def test_slurm_queues_again_what_was_interrupted(tmp_path, code):
    done = launched(tmp_path, 'slurm.sh', stand_ins=('srun', 'scontrol', 'python'), CODE=str(code), **slurm)
    assert done.wait(60) == code
    assert calls(tmp_path, 'scontrol')[1:] == ['requeue 41234']*(code == 75)


def test_slurm_wants_shared_folders(tmp_path):
    done = launched(tmp_path, 'slurm.sh', stand_ins=('srun', 'scontrol', 'python'), RESULTS_ROOT_DIR='', **slurm)
    assert done.wait(60) != 0 and 'RESULTS_ROOT_DIR: name a directory' in done.stderr.read()
    assert not (tmp_path/'calls').exists()


def test_slurm_asks_for_what_it_uses():
    "A task a GPU, a signal before the end to the tasks, and leave to be queued again."
    lines = (root/'launch/slurm.sh').read_text().splitlines()
    asked = [line.removeprefix('#SBATCH --').strip().partition('=') for line in lines if line.startswith('#SBATCH')]
    asked = {name: value for name, _, value in asked}
    assert asked['ntasks-per-node'] == asked['gpus-per-node']
    assert asked['signal'].startswith('TERM@') and 'requeue' in asked


def test_two_machines_call_torchrun(tmp_path):
    done = launched(tmp_path, 'two_machines.sh', '1', '10.0.0.5', 'desc=a b', stand_ins=('torchrun',), CODE='3')
    assert done.wait(60) == 3
    where = '<--nnodes=2><--node-rank=1><--master-addr=10.0.0.5><--master-port=29500><--nproc-per-node=gpu>'
    assert calls(tmp_path, 'torchrun') == [f'[{where}<-m><rlhf_flant5.train><desc=a b>]']


def test_two_machines_take_a_port_and_a_number(tmp_path):
    done = launched(tmp_path, 'two_machines.sh', '0', 'host', stand_ins=('torchrun',), MASTER_PORT='1234', PROCESSES='2')
    assert done.wait(60) == 0
    where = '<--node-rank=0><--master-addr=host><--master-port=1234><--nproc-per-node=2>'
    assert where in calls(tmp_path, 'torchrun')[0]


@pytest.mark.parametrize('args', [[], ['0'], ['2', 'host'], ['0', 'desc=x']],
                         ids=['nothing', 'no host', 'third machine', 'setting as host'])
def test_two_machines_say_how(tmp_path, args):
    done = launched(tmp_path, 'two_machines.sh', *args, stand_ins=('torchrun',))
    assert done.wait(60) == 2 and done.stderr.read().startswith('usage:')
    assert not (tmp_path/'calls').exists()


settings = ['experiment=toy', 'desc=two', 'index=1', 'training.loop.n_batches=2', 'training.loop.train_batch_size=8',
            'device_name=cpu', 'sim_man.allow_untracked=true']

def check_trained(tmp_path):
    "Two steps from a reward of about 0: the loss is still near ln 2."
    summary = json.loads((tmp_path/'Reward-Model-Training/desc-two,index-1/results/summary.json').read_text())
    assert summary['n_batches'] == 2 and summary['n_processes'] == 2
    assert abs(summary['validation']['loss'] - math.log(2)) < .1


def test_slurm_trains(tmp_path):
    "Two real processes that find each other by what the script tells them."
    job = slurm | dict(SLURM_JOB_ID=str(free_port() - 10000))
    done = launched(tmp_path, 'slurm.sh', *settings, stand_ins=('srun', 'scontrol'), HOSTS='127.0.0.1', **job)
    assert done.wait(300) == 0, done.stderr.read()
    check_trained(tmp_path)
    assert len(calls(tmp_path, 'scontrol')) == 1


def test_two_machines_train(tmp_path):
    "Both machines are this one."
    env = dict(MASTER_PORT=str(free_port()), PROCESSES='1')
    both = [launched(tmp_path, 'two_machines.sh', i, '127.0.0.1', *settings, stand_ins=(), **env) for i in '01']
    for p in both: assert p.wait(300) == 0, p.stderr.read()
    check_trained(tmp_path)
