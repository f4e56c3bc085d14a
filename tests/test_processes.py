"Several processes: the same training, exact evaluation, one that fails or dies, states computed together."
import gzip, json, math, multiprocessing, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch
from rlhf_flant5 import train
from rlhf_flant5.training import loop, origin, states
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.processes import launch, rank
from rlhf_flant5.training.runs import Run, find_runs
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.train import main
from conftest import program
from test_survive import where


def at_work(argv, env, change=None):
    torch.set_num_threads(1); states.SEGMENT = 16; os.environ.update(env)
    if change: change()
    return main(argv)


def together(argv, env, n, change, said):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1); os.dup2(1, 2)
    sys.exit(launch(n, at_work, argv, env, change, method='fork', grace=5))


@pytest.fixture(scope='module')
def run():
    "The program in n processes; (exit code, what it said)."
    processes = multiprocessing.get_context('forkserver'); processes.set_forkserver_preload(['rlhf_flant5.train', 'test_processes'])
    def run(folder, argv, n, change=None):
        said = folder/'said'; said.parent.mkdir(parents=True, exist_ok=True)
        p = processes.Process(target=together, args=(argv, where(folder), n, change, said)); p.start(); p.join(180)
        assert p.exitcode is not None, 'hangs: ' + said.read_text()[-2000:]
        return p.exitcode, said.read_text()
    return run


@pytest.fixture(scope='module')
def settings(model_folder, pairs_folder):
    every = lambda n: '{interval_val: %d, interval_type: batches, max_n_intervals: -1}' % n
    return [f'data.name={pairs_folder}', 'data.subdirs=[helpful-base,harmless-base]', f'model.transformer_name={model_folder}', 'model=attention_pooled_decoder', 'data.val_fraction=0.2', 'training.precision=fp32',
            'training.token_budget=256', 'training.compile=false', 'training.loop.train_batch_size=16', 'training.loop.n_batches=8', 'training.optimizer.init_lr=1e-3', 'training.optimizer.final_lr=1e-4',
            f'training.loop.intervals.validation={every(4)}', f'training.loop.intervals.checkpointing={every(4)}', f'training.loop.intervals.train_status_update={every(1)}',
            'device_name=cpu', 'sim_man.allow_untracked=true', 'desc=many']


def told(folder, kind):
    r = Run(find_runs(folder/'results')[0])
    return [x for x in map(json.loads, (r.results/'history.jsonl').read_text().splitlines()) if f'{kind}/loss' in x]
def losses(folder): return np.array([r['train/loss'] for r in told(folder, 'train')])
def summary(folder): return json.loads((find_runs(folder/'results')[0]/'results'/'summary.json').read_text())
def rewards(folder): return np.array([(r['reward_chosen'], r['reward_rejected']) for r in map(json.loads, (find_runs(folder/'results')[0]/'results'/'test_pairs.jsonl').read_text().splitlines())])


@pytest.fixture(scope='module')
def alone(tmp_path_factory, run, settings):
    folder = tmp_path_factory.mktemp('alone'); code, said = run(folder, settings, 1); assert code == 0, said[-2000:]
    return folder


@pytest.mark.parametrize('n, strategy', [(2, 'ddp'), (4, 'ddp'), (2, 'fsdp')])
def test_same_training(tmp_path, run, settings, alone, n, strategy):
    "The same loss in each step to rounding, the same accuracies to the last digit, everything written once."
    code, said = run(tmp_path, [*settings, f'distributed.strategy={strategy}'], n); assert code == 0, said[-2000:]
    one, many = losses(alone), losses(tmp_path)
    print('\n'.join(f'{strategy} {n}: step {i + 1} {a:.8f} {b:.8f}' for i, (a, b) in enumerate(zip(one, many))))
    assert len(one) == len(many) == 8 and abs(one - many).max() < 1e-6 and one.std() > 1e-3
    a, b = summary(alone), summary(tmp_path)
    assert (b['n_processes'], b['strategy']) == (n, strategy)
    for split in ('validation', 'test'):
        for s, t in ((a[split], b[split]), *((a[split]['subsets'][k], b[split]['subsets'][k]) for k in a[split]['subsets'])): assert (s['accuracy'], s['n'], s['n_ties']) == (t['accuracy'], t['n'], t['n_ties'])
    assert [(r['batch'], r['validation/accuracy']) for r in told(alone, 'validation')] == [(r['batch'], r['validation/accuracy']) for r in told(tmp_path, 'validation')]
    assert np.allclose(rewards(alone), rewards(tmp_path), atol=1e-5)
    r = find_runs(tmp_path/'results'); assert len(r) == 1 and len([*(r[0]/'simulation'/'tensorboard').iterdir()]) == 1 and sorted(p.name for p in (r[0]/'simulation'/'checkpoints').iterdir()) == ['batch-0000004', 'batch-0000008']
    assert said.count('\ntest: ') == 1 and len(re.findall('^run .*many,index-0$', said, re.M)) == 1 and 'Warning' not in said
    model = RewardModel.from_pretrained(r[0]/'simulation'/'best_model')            # in one process
    from rlhf_flant5.data.batches import pad_ids
    from rlhf_flant5.data.pairs import encode, read_rows
    pairs = find_pairs(settings); texts = [pairs[i][side] for i in (0, 7) for side in ('chosen', 'rejected')]
    assert np.allclose(model(**pad_ids(encode(model.tokenizer, texts), 0)).tolist(), rewards(tmp_path)[[0, 7]].flatten(), atol=1e-5)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_rewards_of_the_saved_model(tmp_path, run, settings, strategy):
    "Trained in bf16 by two processes: the tables hold what the saved model gives in float32, in one."
    code, said = run(tmp_path, [*settings, 'training.precision=bf16', f'distributed.strategy={strategy}'], 2); assert code == 0, said[-2000:]
    folder = find_runs(tmp_path/'results')[0]
    rows = [json.loads(l) for l in gzip.open(folder/'data'/'test_texts.jsonl.gz', 'rt', encoding='utf-8')]
    given = RewardModel.from_pretrained(folder/'simulation'/'best_model').score([r[side] for r in rows for side in ('chosen', 'rejected')])
    assert summary(tmp_path)['precision'] == 'bf16' and given.std() > 1e-3
    assert abs(given - rewards(tmp_path).flatten()).max() < 1e-5


def find_pairs(settings):
    from rlhf_flant5.data.pairs import read_rows
    folder = Path(next(s for s in settings if s.startswith('data.name=')).removeprefix('data.name='))
    return [row for _, row in read_rows(folder/'helpful-base'/'test.jsonl.gz')]


def test_changing_the_number_of_processes(tmp_path, run, settings, alone):
    "A run that was cut short on two processes goes on with one, and shared out by FSDP: equal to rounding."
    code, said = run(tmp_path, [*settings, 'training.loop.n_batches=8'], 2, stop_at_6); assert code == 75 and 'interrupted' in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true', 'distributed.strategy=fsdp'], 2, stop_at_7); assert code == 75 and 'goes on after batch 6' in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true'], 1); assert code == 0 and 'begun on 2 processes, goes on with 1' in said, said[-2000:]
    assert abs(losses(alone) - losses(tmp_path)).max() < 1e-6 and summary(tmp_path)['test']['accuracy'] == summary(alone)['test']['accuracy']


def stop_at(n, who=1):
    step = loop.TrainingLoop.step
    def stopping(self, *args):
        step(self, *args)
        if self.state.n_batches == n and rank() == who: os.kill(os.getpid(), signal.SIGTERM)     # one process is asked, all stop
    loop.TrainingLoop.step = stopping
def stop_at_6(): stop_at(6)
def stop_at_7(): stop_at(7)


def fails_in_the_other():
    step = loop.TrainingLoop.step
    def failing(self, *args):
        if self.state.n_batches == 3 and rank() == 1: raise ConfigError('the second process found a mistake')
        step(self, *args)
    loop.TrainingLoop.step = failing

def dies_in_the_other():
    step = loop.TrainingLoop.step
    def dying(self, *args):
        if self.state.n_batches == 5 and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
        step(self, *args)
    loop.TrainingLoop.step = dying


def test_one_fails_all_end(tmp_path, run, settings):
    begun = time.monotonic(); code, said = run(tmp_path, settings, 2, fails_in_the_other)
    assert code == 2 and 'error: the second process found a mistake' in said and 'Traceback' not in said and time.monotonic() - begun < 60, said[-2000:]


def test_one_dies_all_end_and_go_on(tmp_path, run, settings, alone):
    code, said = run(tmp_path, settings, 2, dies_in_the_other)
    assert code == 128 + signal.SIGKILL and 'process 2 of 2 was killed' in said and 'Traceback' not in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true'], 2); assert code == 0 and 'goes on after batch 4' in said, said[-2000:]
    assert abs(losses(alone) - losses(tmp_path)).max() < 1e-6


def test_fsdp_with_adapters(tmp_path, run, settings):
    "Trains as one process does, and a run that was cut short finds the weights that it began with, shared out or not."
    lora = [*settings, 'model.lora.r=2']
    code, said = run(tmp_path/'one', lora, 1); assert code == 0, said[-2000:]
    code, said = run(tmp_path/'two', [*lora, 'distributed.strategy=fsdp'], 2, stop_at_6); assert code == 75, said[-2000:]
    code, said = run(tmp_path/'two', [*lora, 'resume=true'], 1); assert code == 0 and 'goes on after batch 6' in said, said[-2000:]
    assert abs(losses(tmp_path/'one') - losses(tmp_path/'two')).max() < 1e-6
    assert np.allclose(rewards(tmp_path/'one'), rewards(tmp_path/'two'), atol=1e-5)


def unexpected_in(who):
    "An error that nobody foresaw, before the first step: in the first process while the other waits for it, or in the other."
    def failing(loops, share): raise LookupError(f'nobody foresaw this in {rank()}')
    if who == 0: train.begin_runs = lambda *_: failing(None, None)
    else:
        steps = train.run_loops
        train.run_loops = lambda *args: failing(*args) if rank() == who else steps(*args)
def unexpected_in_the_first(): unexpected_in(0)
def unexpected_in_the_other(): unexpected_in(1)


@pytest.mark.parametrize('change, who', [(unexpected_in_the_first, 0), (unexpected_in_the_other, 1)])
def test_an_unexpected_error_is_shown(tmp_path, run, settings, change, who):
    code, said = run(tmp_path, settings, 2, change)
    assert code == 1 and said.count('Traceback (most recent call last)') == 1, said[-2000:]
    assert f'process {who + 1} of 2:' in said and said.count(f'LookupError: nobody foresaw this in {who}') == 1, said[-2000:]


def deaf(behaviour, folder):
    "A process that does not hear SIGTERM; the other one dies of it, or fails, or is killed."
    me = int(os.environ['RANK'])
    if me == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(folder)/f'ready-{me}').touch()
    if me == 1 or behaviour == 'asked': time.sleep(60)
    if behaviour == 'killed': os.kill(os.getpid(), signal.SIGKILL)
    return 2


def led(behaviour, folder):
    os.dup2(os.open(folder/'said', os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(launch(2, deaf, behaviour, folder, method='fork', grace=.5))


@pytest.mark.parametrize('behaviour, code, says', [
    ('asked', 75, 'interrupted (SIGTERM); go on with resume=true'), ('fails', 2, ''), ('killed', 128 + signal.SIGKILL, 'process 1 of 2 was killed (SIGKILL); out of memory?')])
def test_who_is_ended_by_the_program_was_not_out_of_memory(tmp_path, run, behaviour, code, says):
    p = multiprocessing.get_context('forkserver').Process(target=led, args=(behaviour, tmp_path)); p.start()
    end = time.monotonic() + 60
    while len([*tmp_path.glob('ready-*')]) < 2 and time.monotonic() < end: time.sleep(.02)
    if behaviour == 'asked':
        for _ in range(2): os.kill(p.pid, signal.SIGTERM); time.sleep(.1)
    p.join(60)
    said = (tmp_path/'said').read_text()
    assert p.exitcode == code and says in said and said.count('\n') == (1 if says else 0), (p.exitcode, said)


@pytest.mark.parametrize('named, says', [
    (dict(WORLD_SIZE=''), "WORLD_SIZE=''"), (dict(WORLD_SIZE='abc'), "WORLD_SIZE='abc'"), (dict(WORLD_SIZE='0'), "WORLD_SIZE='0'"),
    (dict(WORLD_SIZE='2'), 'WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    (dict(WORLD_SIZE='2', RANK='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500'), "RANK='2': must be a whole number from 0 to 1"),
    (dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='x'), "MASTER_PORT='x'")], ids=lambda v: v if isinstance(v, str) else '')
def test_half_a_group_is_refused(tmp_path, monkeypatch, capsys, settings, named, says):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(name, raising=False)
    for name, value in dict(named, RESULTS_ROOT_DIR=str(tmp_path)).items(): monkeypatch.setenv(name, value)
    assert main(settings) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and says in said and said.count('\n') == 1, said


@pytest.mark.parametrize('began, warns', [(torch.get_num_threads() + 1, True), (torch.get_num_threads(), False), (None, False)])
def test_other_threads_are_told(caplog, began, warns):
    noted = {}
    was = dict(n_threads=began) if began else {}
    origin.note_machine(SimpleNamespace(provenance=was, note=lambda **kw: noted.update(kw)), torch.device('cpu'))
    assert noted == dict(device='cpu', n_processes=1, n_threads=torch.get_num_threads())
    assert (f'begun with {began} threads' in caplog.text) == warns


def test_a_mistake_is_told_once(tmp_path, run, settings):
    for wrong, says in (('data.name=no/such/folder', 'no such folder'), ('training.loop.train_batch_size=1', 'a step needs a pair for each'), ('data.max_tokens=3', 'no train pair is left')):
        folder = tmp_path/wrong.split('=')[0]; code, said = run(folder, [*settings, wrong], 2)
        assert code == 2 and said.count('error: ') == 1 and says in said and 'Traceback' not in said, said[-2000:]
        assert not find_runs(folder/'results')


def counts_states():
    compute = states.first_states
    def counted(backbone, batches, rows, autocast):
        with open(Path(os.environ['RLHF_FLANT5_CACHE'])/f'rows-{rank()}', 'a') as f: f.write(f'{len(batches)} {" ".join(map(str, rows))}\n')
        return compute(backbone, batches, rows, autocast)
    states.first_states = counted


def test_states_are_computed_together(tmp_path, run, settings):
    "Each pair once, by one of the processes; the bytes are those of one process."
    frozen = [*settings, 'model.train_transformer=False']
    for n in (1, 2):
        code, said = run(tmp_path/str(n), frozen, n, counts_states); assert code == 0, said[-2000:]
    rows = [[(line.split()[0], r) for line in (tmp_path/'2'/'cache'/f'rows-{k}').read_text().splitlines() for r in line.split()[1:]] for k in (0, 1)]
    assert rows[0] and rows[1] and len({*rows[0], *rows[1]}) == len(rows[0]) + len(rows[1])
    assert sorted(rows[0] + rows[1]) == sorted((line.split()[0], r) for line in (tmp_path/'1'/'cache'/'rows-0').read_text().splitlines() for r in line.split()[1:])
    states = lambda n: {(p.parent.name, p.name): p.read_bytes() for p in (tmp_path/str(n)/'cache').glob('states/*/segment-*')}
    assert states(1) == states(2) and len({entry for entry, _ in states(1)}) == 3
    assert abs(losses(tmp_path/'1') - losses(tmp_path/'2')).max() < 1e-6


def runs_out_of_memory():
    "The second process has room for two pairs at once."
    forward = RewardModel.forward
    def small(self, *args, **kwargs):
        if rank() == 1 and torch.is_grad_enabled() and len(kwargs['input_ids']) > 4: torch.empty(2**50)      # the allocator's own error
        return forward(self, *args, **kwargs)
    RewardModel.forward = small


def test_out_of_memory_in_one_process(tmp_path, run, settings, alone):
    "It halves its budget and does the step again; the losses stay. While gradients are exchanged nothing can be repeated, and the error says what to set."
    code, said = run(tmp_path/'some', settings, 2, runs_out_of_memory)
    assert code == 0 and len(re.findall(r'another process was out of memory: the token budget is \d+ from here on', said)) == 1, said[-2000:]
    assert abs(losses(alone) - losses(tmp_path/'some')).max() < 1e-6
    code, said = run(tmp_path/'all', [*settings, 'training.token_budget=4096'], 2, runs_out_of_memory)
    assert code == 1 and said.count('while processes exchange gradients; set training.token_budget below') == 1 and 'Traceback' not in said, said[-2000:]


def test_torchrun(tmp_path, settings):
    "A group that something else started is joined."
    env = os.environ | where(tmp_path) | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS='1')
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'rlhf_flant5.train', *settings], env=env, text=True, capture_output=True, timeout=200)
    assert p.returncode == 0, p.stderr[-2000:]
    assert summary(tmp_path)['n_processes'] == 2 and p.stderr.count('\ntest: ') == 1
