"Several processes: the same training, exact evaluation, one that fails or dies, states computed together."
import gzip, json, multiprocessing, os, re, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch
from conftest import root
from rlhf_flant5 import RewardModel
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.processes import launch, rank
from rlhf_flant5.data.batches import pad_ids
from rlhf_flant5.data.pairs import read_rows
from rlhf_flant5.data.tokens import encode
from rlhf_flant5.train import main
from rlhf_flant5.training import loop, origin, pipeline, states
from rlhf_flant5.training.runs import find_runs
from test_survive import where


def at_work(argv, env, change=None):
    torch.set_num_threads(1)
    states.SEGMENT = 16
    os.environ.update(env)
    if change: change()
    return main(argv)


def together(argv, env, n, change, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.exit(launch(n, at_work, argv, env, change, method='fork', grace=5))


@pytest.fixture(scope='module')
def run():
    "The program in n processes; (exit code, what it said)."
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['rlhf_flant5.train', 'test_processes'])
    def run(folder, argv, n, change=None):
        folder.mkdir(parents=True, exist_ok=True)
        output = folder/'said'
        p = processes.Process(target=together, args=(argv, where(folder), n, change, output))
        p.start()
        p.join(180)
        said = output.read_text()
        assert p.exitcode is not None, 'hangs: ' + said[-2000:]
        return p.exitcode, said
    return run


@pytest.fixture(scope='module')
def finished(run):
    "As `run`, of what must succeed; what it said."
    def finished(*args):
        code, said = run(*args)
        assert code == 0, said[-2000:]
        return said
    return finished


def every(n): return f'{{interval_val: {n}, interval_type: batches, max_n_intervals: -1}}'

@pytest.fixture(scope='module')
def settings(model_folder, pairs_folder):
    intervals = 'training.loop.intervals'
    return [f'data.name={pairs_folder}', 'data.subdirs=[helpful-base,harmless-base]', 'data.val_fraction=0.2',
            f'model.transformer_name={model_folder}', 'model=attention_pooled_decoder',
            'training.precision=fp32', 'training.token_budget=256', 'training.compile=false',
            'training.loop.train_batch_size=16', 'training.loop.n_batches=8',
            'training.optimizer.init_lr=1e-3', 'training.optimizer.final_lr=1e-4',
            f'{intervals}.validation={every(4)}', f'{intervals}.checkpointing={every(4)}',
            f'{intervals}.train_status_update={every(1)}',
            'device_name=cpu', 'sim_man.allow_untracked=true', 'desc=many']


def lines_of(path): return [json.loads(line) for line in path.read_text().splitlines()]
def the_run(folder): return find_runs(folder/'results')[0]
def summary(folder): return json.loads((the_run(folder)/'results'/'summary.json').read_text())
def history(folder, kind): return [x for x in lines_of(the_run(folder)/'results'/'history.jsonl') if f'{kind}/loss' in x]
def losses(folder): return np.array([x['train/loss'] for x in history(folder, 'train')])
def accuracies(folder): return [(x['batch'], x['validation/accuracy']) for x in history(folder, 'validation')]

def rewards(folder): # of the test pairs, (n, 2)
    rows = lines_of(the_run(folder)/'results'/'test_pairs.jsonl')
    return np.array([(row['reward_chosen'], row['reward_rejected']) for row in rows])

def given_pairs(settings): # as their file has them
    folder = next(s.removeprefix('data.name=') for s in settings if s.startswith('data.name='))
    return [row for _, row in read_rows(Path(folder)/'helpful-base'/'test.jsonl.gz')]

def distance(a, b): return abs(losses(a) - losses(b)).max()


@pytest.fixture(scope='module')
def alone(tmp_path_factory, finished, settings):
    "The training in one process."
    folder = tmp_path_factory.mktemp('alone')
    finished(folder, settings, 1)
    return folder


@pytest.mark.parametrize('n, strategy', [(2, 'ddp'), (4, 'ddp'), (2, 'fsdp')])
def test_same_training(tmp_path, finished, settings, alone, n, strategy):
    "The same loss in each step to rounding, the same accuracies to the last digit, everything written once."
    said = finished(tmp_path, [*settings, f'distributed.strategy={strategy}'], n)
    check_losses(alone, tmp_path)
    check_scores(summary(alone), summary(tmp_path))
    assert (summary(tmp_path)['n_processes'], summary(tmp_path)['strategy']) == (n, strategy)
    assert accuracies(alone) == accuracies(tmp_path)
    assert np.allclose(rewards(alone), rewards(tmp_path), atol=1e-5)
    check_written_once(tmp_path, said)
    check_saved_model(tmp_path, settings)


def check_losses(one, many):
    for step, (a, b) in enumerate(zip(losses(one), losses(many)), 1): print(f'step {step} {a:.8f} {b:.8f}')
    assert len(losses(one)) == len(losses(many)) == 8
    assert distance(one, many) < 1e-6 and losses(one).std() > 1e-3

def check_scores(one, many):
    def exact(scores): return [scores[k] for k in ('accuracy', 'n', 'n_ties')]
    for split in ('validation', 'test'):
        a, b = one[split], many[split]
        assert exact(a) == exact(b)
        assert a['subsets'].keys() <= b['subsets'].keys()
        for name in a['subsets']: assert exact(a['subsets'][name]) == exact(b['subsets'][name])

def check_written_once(folder, said):
    found = find_runs(folder/'results')
    assert len(found) == 1
    simulation = found[0]/'simulation'
    assert len([*(simulation/'tensorboard').iterdir()]) == 1
    checkpoints = sorted(p.name for p in (simulation/'checkpoints').iterdir())
    assert checkpoints == ['batch-0000004', 'batch-0000008']
    assert said.count('\ntest: ') == 1 and len(re.findall('^run .*many,index-0$', said, re.M)) == 1
    assert 'Warning' not in said

def check_saved_model(folder, settings):
    "Loaded in one process, it gives the rewards that were written."
    model = RewardModel.from_pretrained(the_run(folder)/'simulation'/'best_model')
    pairs = given_pairs(settings)
    texts = [pairs[i][side] for i in (0, 7) for side in ('chosen', 'rejected')]
    given = model(**pad_ids(encode(model.tokenizer, texts), 0))
    assert np.allclose(given.tolist(), rewards(folder)[[0, 7]].flatten(), atol=1e-5)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_rewards_of_the_saved_model(tmp_path, finished, settings, strategy):
    "Trained in bf16 by two processes: the tables hold what the saved model gives in float32, in one."
    finished(tmp_path, [*settings, 'training.precision=bf16', f'distributed.strategy={strategy}'], 2)
    folder = the_run(tmp_path)
    with gzip.open(folder/'data'/'test_texts.jsonl.gz', 'rt', encoding='utf-8') as f: rows = [json.loads(line) for line in f]
    texts = [row[side] for row in rows for side in ('chosen', 'rejected')]
    given = RewardModel.from_pretrained(folder/'simulation'/'best_model').score(texts)
    assert summary(tmp_path)['precision'] == 'bf16' and given.std() > 1e-3
    assert abs(given - rewards(tmp_path).flatten()).max() < 1e-5


def before_step(act):
    "Call `act(batch)` before each step of the training."
    step = loop.TrainingLoop.step
    def changed(self, *args):
        act(self.state.n_batches)
        step(self, *args)
    loop.TrainingLoop.step = changed

def stop_at(n, who=1):
    "One process is asked to stop after so many batches; all do."
    step = loop.TrainingLoop.step
    def stopping(self, *args):
        step(self, *args)
        if self.state.n_batches == n and rank() == who: os.kill(os.getpid(), signal.SIGTERM)
    loop.TrainingLoop.step = stopping

def stop_at_6(): stop_at(6)
def stop_at_7(): stop_at(7)

def fails_in_the_other():
    def act(batch):
        if batch == 3 and rank() == 1: raise ConfigError('the second process found a mistake')
    before_step(act)

def dies_in_the_other():
    def act(batch):
        if batch == 5 and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    before_step(act)


def test_changing_the_number_of_processes(tmp_path, run, settings, alone):
    "A run that was cut short on two processes goes on with one, and shared out by FSDP: equal to rounding."
    code, said = run(tmp_path, settings, 2, stop_at_6)
    assert code == 75 and 'interrupted' in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true', 'distributed.strategy=fsdp'], 2, stop_at_7)
    assert code == 75 and 'goes on after batch 6' in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true'], 1)
    assert code == 0 and 'begun on 2 processes, goes on with 1' in said, said[-2000:]
    assert distance(alone, tmp_path) < 1e-6
    assert summary(tmp_path)['test']['accuracy'] == summary(alone)['test']['accuracy']


def test_one_fails_all_end(tmp_path, run, settings):
    begun = time.monotonic()
    code, said = run(tmp_path, settings, 2, fails_in_the_other)
    assert code == 2 and 'error: the second process found a mistake' in said, said[-2000:]
    assert 'Traceback' not in said and time.monotonic() - begun < 60, said[-2000:]


def test_one_dies_all_end_and_go_on(tmp_path, run, settings, alone):
    code, said = run(tmp_path, settings, 2, dies_in_the_other)
    assert code == 128 + signal.SIGKILL and 'process 2 of 2 was killed' in said, said[-2000:]
    assert 'Traceback' not in said, said[-2000:]
    code, said = run(tmp_path, [*settings, 'resume=true'], 2)
    assert code == 0 and 'goes on after batch 4' in said, said[-2000:]
    assert distance(alone, tmp_path) < 1e-6


def test_fsdp_with_adapters(tmp_path, run, finished, settings):
    "Trains as one process does, and a run that was cut short finds the weights that it began with, shared out or not."
    one, two, lora = tmp_path/'one', tmp_path/'two', [*settings, 'model.lora.r=2']
    finished(one, lora, 1)
    code, said = run(two, [*lora, 'distributed.strategy=fsdp'], 2, stop_at_6)
    assert code == 75, said[-2000:]
    code, said = run(two, [*lora, 'resume=true'], 1)
    assert code == 0 and 'goes on after batch 6' in said, said[-2000:]
    assert distance(one, two) < 1e-6
    assert np.allclose(rewards(one), rewards(two), atol=1e-5)


def nobody_foresaw(*args): raise LookupError(f'nobody foresaw this in {rank()}')

def unexpected_in_the_first():
    "Before the first step, while the other process waits for it."
    pipeline.begin_runs = nobody_foresaw

def unexpected_in_the_other():
    steps = pipeline.run_loops
    def failing(*args): return nobody_foresaw() if rank() == 1 else steps(*args)
    pipeline.run_loops = failing


@pytest.mark.parametrize('change, who', [(unexpected_in_the_first, 0), (unexpected_in_the_other, 1)])
def test_an_unexpected_error_is_shown(tmp_path, run, settings, change, who):
    code, said = run(tmp_path, settings, 2, change)
    assert code == 1 and said.count('Traceback (most recent call last)') == 1, said[-2000:]
    assert f'process {who + 1} of 2:' in said, said[-2000:]
    assert said.count(f'LookupError: nobody foresaw this in {who}') == 1, said[-2000:]


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


def wait_until(fits, seconds=60):
    end = time.monotonic() + seconds
    while not fits() and time.monotonic() < end: time.sleep(.02)


@pytest.mark.parametrize('behaviour, code, says', [
    ('asked', 75, 'interrupted (SIGTERM); go on with resume=true'),
    ('fails', 2, ''),
    ('killed', 128 + signal.SIGKILL, 'process 1 of 2 was killed (SIGKILL); out of memory?')])
def test_who_is_ended_by_the_program_was_not_out_of_memory(tmp_path, run, behaviour, code, says):
    p = multiprocessing.get_context('forkserver').Process(target=led, args=(behaviour, tmp_path))
    p.start()
    wait_until(lambda: len([*tmp_path.glob('ready-*')]) == 2)
    if behaviour == 'asked':
        for _ in range(2):
            os.kill(p.pid, signal.SIGTERM)
            time.sleep(.1)
    p.join(60)
    said = (tmp_path/'said').read_text()
    assert p.exitcode == code and says in said, (p.exitcode, said)
    assert said.count('\n') == (1 if says else 0), said


NAMES = 'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'
GROUP = dict(zip(NAMES, ('2', '0', '0', '127.0.0.1', '29500')))
HALF_GROUPS = {
    'empty size': (dict(WORLD_SIZE=''), "WORLD_SIZE=''"),
    'word as size': (dict(WORLD_SIZE='abc'), "WORLD_SIZE='abc'"),
    'size 0': (dict(WORLD_SIZE='0'), "WORLD_SIZE='0'"),
    'size alone': (dict(WORLD_SIZE='2'), 'WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    'rank beyond the size': (GROUP | dict(RANK='2'), "RANK='2': must be a whole number from 0 to 1"),
    'word as port': (GROUP | dict(MASTER_PORT='x'), "MASTER_PORT='x'")}

@pytest.mark.parametrize('named, says', HALF_GROUPS.values(), ids=HALF_GROUPS)
def test_half_a_group_is_refused(tmp_path, monkeypatch, capsys, settings, named, says):
    for name in NAMES: monkeypatch.delenv(name, raising=False)
    for name, value in named.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv('RESULTS_ROOT_DIR', str(tmp_path))
    assert main(settings) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and says in said and said.count('\n') == 1, said


THREADS = torch.get_num_threads()

@pytest.mark.parametrize('began, warns', [
    pytest.param(THREADS + 1, True, id='more'),
    pytest.param(THREADS, False, id='as many'),
    pytest.param(None, False, id='unknown')])
def test_other_threads_are_told(caplog, began, warns):
    noted = {}
    provenance = dict(n_threads=began) if began else {}
    begun = SimpleNamespace(provenance=provenance, note=lambda **facts: noted.update(facts))
    origin.note_machine(begun, torch.device('cpu'))
    assert noted == dict(device='cpu', n_processes=1, n_threads=torch.get_num_threads())
    assert (f'begun with {began} threads' in caplog.text) == warns


@pytest.mark.parametrize('wrong, says', [
    ('data.name=no/such/folder', 'no such folder'),
    ('training.loop.train_batch_size=1', 'a step needs a pair for each'),
    ('data.max_tokens=3', 'no train pair is left')], ids=['folder', 'batch size', 'lengths'])
def test_a_mistake_is_told_once(tmp_path, run, settings, wrong, says):
    code, said = run(tmp_path, [*settings, wrong], 2)
    assert code == 2 and said.count('error: ') == 1 and says in said, said[-2000:]
    assert 'Traceback' not in said, said[-2000:]
    assert not find_runs(tmp_path/'results')


def counts_states():
    "Each process writes down which rows' states it computes, a line a call: the number of batches, then the rows."
    compute = states.first_states
    def counted(backbone, batches, rows, autocast):
        with open(Path(os.environ['RLHF_FLANT5_CACHE'])/f'rows-{rank()}', 'a') as f: print(len(batches), *rows, file=f)
        return compute(backbone, batches, rows, autocast)
    states.first_states = counted

def computed(folder, k): # by the kth process: (split, told by its number of batches, and row)
    lines = (folder/'cache'/f'rows-{k}').read_text().splitlines()
    return [(split, row) for split, *rows in map(str.split, lines) for row in rows]

def kept_states(folder): # entry -> file -> bytes
    found = {}
    for path in (folder/'cache').glob('states/*/segment-*'):
        found.setdefault(path.parent.name, {})[path.name] = path.read_bytes()
    return found


def test_states_are_computed_together(tmp_path, finished, settings):
    "Each pair once, by one of the processes; the bytes are those of one process."
    one, two, frozen = tmp_path/'1', tmp_path/'2', [*settings, 'model.train_transformer=False']
    finished(one, frozen, 1, counts_states)
    finished(two, frozen, 2, counts_states)
    first, other = computed(two, 0), computed(two, 1)
    assert first and other and len({*first, *other}) == len(first) + len(other)
    assert sorted(first + other) == sorted(computed(one, 0))
    assert kept_states(one) == kept_states(two) and len(kept_states(one)) == 3
    assert distance(one, two) < 1e-6


def runs_out_of_memory():
    "The second process has room for two pairs at once."
    forward = RewardModel.forward
    def small(self, *args, **kwargs):
        too_many = torch.is_grad_enabled() and len(kwargs['input_ids']) > 4
        if rank() == 1 and too_many: torch.empty(2**50)      # the allocator's own error
        return forward(self, *args, **kwargs)
    RewardModel.forward = small


def test_out_of_memory_in_one_process(tmp_path, run, settings, alone):
    "It halves its budget and does the step again; the losses stay."
    code, said = run(tmp_path, settings, 2, runs_out_of_memory)
    smaller = re.findall(r'another process was out of memory: the token budget is \d+ from here on', said)
    assert code == 0 and len(smaller) == 1, said[-2000:]
    assert distance(alone, tmp_path) < 1e-6


def test_out_of_memory_while_gradients_are_exchanged(tmp_path, run, settings):
    "Nothing can be repeated then, and the error says what to set."
    code, said = run(tmp_path, [*settings, 'training.token_budget=4096'], 2, runs_out_of_memory)
    assert code == 1 and 'Traceback' not in said, said[-2000:]
    assert said.count('while processes exchange gradients; set training.token_budget below') == 1, said[-2000:]


def test_torchrun(tmp_path, settings):
    "A group that something else started is joined."
    env = os.environ | where(tmp_path) | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command = [*torchrun, '-m', 'rlhf_flant5.train', *settings]
    p = subprocess.run(command, env=env, text=True, capture_output=True, timeout=200)
    assert p.returncode == 0, p.stderr[-2000:]
    assert summary(tmp_path)['n_processes'] == 2 and p.stderr.count('\ntest: ') == 1
