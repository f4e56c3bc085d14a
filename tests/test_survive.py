"""Runs that are killed, stopped, starved and started twice: what a cell can't do to itself.

KILLS=200 makes the kill test longer (8 kills for each of its four kinds of run otherwise)."""
import json, multiprocessing, os, pickle, random, re, resource, shutil, signal, subprocess, sys, threading, time
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
import pytest, torch
from conftest import root
from rlhf_flant5.core.processes import launch
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.train import main
from rlhf_flant5.training import checkpoint, loop, origin, pipeline, states
from rlhf_flant5.training.runs import Run, find_runs, unprotect

# where a run can be hit: name -> (owner, function)
EARLY = dict(record=(Run, 'record'), data=(pipeline, 'load_data'), begin=(pipeline, 'begin_runs'),
             texts=(origin, 'save_texts'))
LATE = dict(step=(loop, 'train_step'), validation=(loop, 'evaluate_all'), best=(RewardModel, 'save_pretrained'),
            checkpoint=(checkpoint, 'write_checkpoint'), seal=(checkpoint, 'seal'),
            scores=(pipeline, 'final_scores'), summary=(pipeline, 'finish'))
ONCE = 'data', 'begin', 'texts', 'scores', 'summary'         # in the life of a process
ANY = tuple(EARLY | LATE)
PHASES = EARLY | LATE | dict(cache=(states.KeptStates, 'write_segment'), close=(Run, '__exit__'))

# exit code of a run of so many processes; any other one is a crash
KILLED = {1: -signal.SIGKILL, 2: 128 + signal.SIGKILL}
N_BATCHES = 12                                              # of every run here


# What happens to a process

def kill(disk): os.kill(os.getpid(), signal.SIGKILL)


def no_file_grows_beyond(n_bytes):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))


def fill(disk):
    "From now on the disk is full, or no file of this process may grow where there is no small disk to be had."
    if not os.path.ismount(disk): return no_file_grows_beyond(0)
    with open(disk/'filler', 'wb', buffering=0) as f:
        for size in (2**20, 2**12):
            with suppress(OSError):
                while f.write(bytes(size)): pass


def arm(phase, nth, delay, act, disk):
    "Kill this process, or fill the disk, `delay` seconds after the nth call of a function."
    owner, name = PHASES[phase]
    f, calls = getattr(owner, name), iter(range(1, 10**6))

    def armed(*args, **kwargs):
        if next(calls) == nth:
            if delay: threading.Timer(delay, act, [disk]).start()
            else: act(disk)
        return f(*args, **kwargs)

    setattr(owner, name, armed)


def bomb_for(rng, n, phases=ANY):
    "A phase at random, with when and in which of n processes it kills: (phase, nth call, delay, rank)."
    phase = rng.choice(phases)
    nth = 1 if phase in ONCE else rng.choice((1, 2, 3))
    return phase, nth, rng.uniform(0, .02), rng.randrange(n)


# The program, in a process of its own

def work(argv, where, bomb=None, act=kill):
    torch.set_num_threads(1)
    states.SEGMENT = 16
    os.environ.update(where)
    if bomb:
        *what, rank = bomb
        disk = Path(where['RESULTS_ROOT_DIR']).parent
        if int(os.environ.get('RANK', 0)) == rank: arm(*what, act, disk)
    return main(argv)


def write_words_to(said):
    "Both output streams of this process go to a file."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    # subtle: the old ones believe that they can seek
    sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))


def attempt(argv, where, n=1, bomb=None, said=os.devnull, act=kill):
    "The program in `n` processes, in a process of its own; its words go to `said`."
    write_words_to(said)
    if n == 1: sys.exit(work(argv, where, bomb, act))
    sys.exit(launch(n, work, argv, where, bomb, method='fork', grace=10))


def exit_code(process):
    process.join(120)
    return process.exitcode


@pytest.fixture(scope='module')
def spawn():
    "Start `attempt` in a process of its own; the modules are imported once, by the server that forks them."
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['rlhf_flant5.train', 'test_survive'])

    def start(*args, target=attempt, **kwargs):
        p = processes.Process(target=target, args=args, kwargs=kwargs)
        p.start()
        return p

    return start


def every(n): return '{interval_val: %d, interval_type: batches, max_n_intervals: -1}' % n


@pytest.fixture(scope='module')
def settings(model_folder, pairs_folder):
    "A run of 12 batches on some 40 pairs, with dropout, four validations and a checkpoint every other batch."
    return [f'data.name={pairs_folder}', 'data.subdirs=[helpful-base]', 'data.val_fraction=0.2',
            f'model.transformer_name={model_folder}', 'model=attention_pooled_encoder', 'model.dropout=0.1',
            'training.precision=fp32', 'training.token_budget=256', 'training.compile=false',
            'training.loop.train_batch_size=8', f'training.loop.n_batches={N_BATCHES}', 'training.loop.n_epochs=4',
            'training.optimizer.init_lr=1e-3', 'training.optimizer.final_lr=1e-4',
            f'training.loop.intervals.validation={every(3)}',
            f'training.loop.intervals.checkpointing={every(2)}',
            f'training.loop.intervals.train_status_update={every(2)}',
            'device_name=cpu', 'sim_man.allow_untracked=true', 'resume=true']


FROZEN = ['model.train_transformer=False']
KINDS = dict(trained=[], frozen=[*FROZEN, 'model.use_pretrained_output=False'], kept=FROZEN)


# What it leaves behind

def where(folder):
    "Where a run writes, as environment variables."
    for name in ('results', 'cache'): (folder/name).mkdir(parents=True, exist_ok=True)
    return dict(RESULTS_ROOT_DIR=str(folder/'results'), RLHF_FLANT5_CACHE=str(folder/'cache'))


def run_of(folder, name=''):
    return next(Run(f) for f in find_runs(folder/'results') if name in f.name)


def checkpoints(folder): return sorted((run_of(folder).simulation/'checkpoints').glob('batch-*'))
def n_of(path): return int(path.name.removeprefix('batch-'))


def untimed(row):
    timed = 'seconds', 'seconds_in_all', 'peak_memory_bytes'
    return {k: v for k, v in row.items() if 'per_second' not in k and k not in timed}


WITH_TIMES = ('provenance.json', 'train.log', 'history.jsonl', 'summary.json',
              'recent.json', 'state.json', 'digests.json')
AS_TYPED = 'command.txt', 'config.yaml', 'changes.diff'      # and where

def digest(folder, name='') -> dict:
    "What a run leaves behind, but for times: that of `name`, or the only one."
    run, files = run_of(folder, name), {}
    for p in sorted(run.dir.rglob('*')):
        if not p.is_file() or re.search(r'tfevents|changes-\d+', p.name): continue
        differs = p.name in WITH_TIMES + AS_TYPED
        files[p.relative_to(run.dir).as_posix()] = '' if differs else sha256(p.read_bytes()).hexdigest()
    history = [untimed(json.loads(line)) for line in (run.results/'history.jsonl').read_text().splitlines()]
    summary = untimed(json.loads((run.results/'summary.json').read_text()))
    return dict(history=history, summary=summary, files=files)


@pytest.fixture(scope='module')
def whole(tmp_path_factory, spawn, settings):
    "The folder of a run that was never cut short."
    folder = tmp_path_factory.mktemp('whole')
    p = spawn([*settings, 'desc=whole'], where(folder), said=folder/'said')
    assert exit_code(p) == 0, (folder/'said').read_text()[-2000:]
    return folder


def goes_on(folder, spawn, settings, whole):
    "The run ends as the one that was never cut short; what it said."
    p = spawn([*settings, 'desc=whole'], where(folder), said=folder/'again')
    code, said = exit_code(p), (folder/'again').read_text()
    assert code == 0, said[-2000:]
    assert digest(folder) == digest(whole)
    return said


# Kills

def killed_and_resumed(spawn, argv, folder, n, rng, first_phases):
    "A run that is killed until it comes to its end; how often in which phase."
    kills = {}
    for i in range(40):
        bomb = bomb_for(rng, n, first_phases if i == 0 else ANY)
        code = exit_code(spawn(argv, where(folder), n, bomb, said=folder/'words'))
        assert code is not None, f'hangs after {bomb}'
        if code == 0: return kills
        assert code == KILLED[n], f'{code} after {bomb}: {(folder/"words").read_text()[-2000:]}'
        kills[bomb[0]] = kills.get(bomb[0], 0) + 1
    assert exit_code(spawn(argv, where(folder), n)) == 0
    return kills


@pytest.mark.parametrize('kind, n', [('trained', 1), ('frozen', 1), ('trained', 2), ('frozen', 2)])
def test_kills_change_nothing(tmp_path, spawn, settings, kind, n):
    "Runs killed again and again, in one or two processes, trained or frozen, end as the one that never was."
    rng = random.Random(f'{kind} {n}')
    wanted = int(os.environ.get('KILLS', 32))//4
    argv = [*settings, *(FROZEN if kind == 'frozen' else []), 'desc=kill', f'index={n}']
    first_phases = ('cache',) if kind == 'frozen' else ANY       # states are written first, and once
    p = spawn(argv, where(tmp_path/'whole'), n, said=tmp_path/'words')
    assert exit_code(p) == 0, (tmp_path/'words').read_text()[-2000:]
    want, kills, n_runs = digest(tmp_path/'whole'), {}, 0
    while sum(kills.values()) < wanted:
        n_runs += 1
        folder = tmp_path/f'{n_runs}'
        for phase, k in killed_and_resumed(spawn, argv, folder, n, rng, first_phases).items():
            kills[phase] = kills.get(phase, 0) + k
        assert digest(folder) == want, f'{kind}, {n} processes, after {kills}'
    phases = ', '.join(f'{k} {phase}' for phase, k in sorted(kills.items()))
    weights = want['files']['simulation/best_model/model.safetensors']
    print(f'{kind}-{n}: {sum(kills.values())} kills in {n_runs} runs ({phases}), weights {weights[:16]}')


def test_killed_before_the_first_step(tmp_path, settings, whole, spawn):
    "A run has all that it is judged on, wherever between its folder and its first step it was killed."
    provenance, counts, decided = ('record', 1), ('record', 1), ('record', 2)
    for phase, nth in (provenance, ('data', 1), counts, ('begin', 1), ('texts', 1), decided):
        p = spawn([*settings, 'desc=whole'], where(tmp_path), bomb=(phase, nth, 0., 0))
        assert exit_code(p) == -signal.SIGKILL
        assert not (run_of(tmp_path).results/'history.jsonl').exists()
    goes_on(tmp_path, spawn, settings, whole)


@pytest.mark.parametrize('transformer', ['toy-random', 'folder'])
def test_killed_while_side_by_side_runs_are_closed(tmp_path, settings, spawn, transformer):
    """The last run is closed first; those that are left go on without it.

    They end in the same bits, though it alone has read the decoder."""
    names = 'attention_pooled_encoder', 'layerwise_attention', 'decoder_output'
    argv = [s for s in settings if not s.startswith('model=')]
    argv += [f'model=[{",".join(names)}]', 'desc=x', *KINDS['frozen']]
    # the random toy's encoder has other weights without its decoder
    if transformer == 'toy-random': argv.append('model.transformer_name=toy-random')
    said = tmp_path/'said'
    assert exit_code(spawn(argv, where(tmp_path/'whole'), said=said)) == 0, said.read_text()[-2000:]
    for nth in (1, 2, 2):
        p = spawn(argv, where(tmp_path/'killed'), bomb=('close', nth, 0., 0), said=said)
        assert exit_code(p) == -signal.SIGKILL, said.read_text()[-2000:]
    p = spawn(argv, where(tmp_path/'killed'), said=tmp_path/'again')
    assert exit_code(p) == 0, (tmp_path/'again').read_text()[-2000:]
    assert (tmp_path/'again').read_text().count('is done already') == 2
    for name in names: assert digest(tmp_path/'killed', name) == digest(tmp_path/'whole', name)


# Signals, and the same run again

def wait_for_a_step(process, folder):
    history = folder/'results'/'Reward-Model-Training'/'desc-whole,index-0'/'results'/'history.jsonl'
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if history.exists() and history.read_text(): return
        time.sleep(.005)


@pytest.mark.parametrize('n, how', [
    pytest.param(1, signal.SIGTERM, id='SIGTERM'),
    pytest.param(1, signal.SIGINT, id='SIGINT'),
    pytest.param(2, signal.SIGTERM, id='SIGTERM-two-processes')])
def test_signals_ask_for_a_requeue(tmp_path, settings, whole, spawn, n, how):
    """The real program: SIGTERM and Ctrl-C write a checkpoint within the step and exit with 75.

    The same command goes on."""
    group = [f'distributed.n_processes={n}'] if n > 1 else []
    command = [sys.executable, '-m', 'rlhf_flant5.train', *settings, 'desc=whole', *group]
    env = os.environ | where(tmp_path) | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    p = subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for_a_step(p, tmp_path)
    p.send_signal(how)
    _, said = p.communicate(timeout=120)
    assert p.returncode == 75, said[-2000:]
    assert f'interrupted ({how.name}); go on with resume=true' in said
    assert 'Traceback' not in said

    stopped = int(re.search(rf'interrupted after batch (\d+) of {N_BATCHES}; checkpoint written', said)[1])
    assert 1 <= stopped < N_BATCHES
    assert run_of(tmp_path).provenance['status'] == 'interrupted'
    if n == 1: again = goes_on(tmp_path, spawn, settings, whole)
    else:
        p = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
        again = p.stderr
        assert p.returncode == 0, again[-2000:]
    assert f'goes on after batch {stopped} of {N_BATCHES}' in again


@pytest.mark.parametrize('how', ['resume=true', 'resume=false'])
def test_two_at_once(tmp_path, settings, whole, spawn, how):
    "One wins, the other is refused; nothing of the winner is touched. With and without `resume`."
    words = [tmp_path/f'said-{i}' for i in range(2)]
    both = [spawn([*settings, 'desc=whole', how], where(tmp_path), said=said) for said in words]
    codes = [exit_code(p) for p in both]
    assert sorted(codes) == [0, 2]
    said = words[codes.index(2)].read_text()
    assert re.search(r'error: .*(another process is at work in this run|exists already)', said)
    assert 'Traceback' not in said
    assert digest(tmp_path) == digest(whole)


def test_a_run_that_is_done_stays(settings, whole, spawn):
    before = digest(whole)
    assert exit_code(spawn([*settings, 'desc=whole'], where(whole), said=whole/'done')) == 0
    assert 'is done already' in (whole/'done').read_text()
    assert digest(whole) == before


def test_rights_of_a_finished_run(whole):
    "Everybody whom the umask lets may read it; files of the record are closed, folders are not."
    (whole/'probe').touch()
    rights = (whole/'probe').stat().st_mode & 0o777
    run = run_of(whole)
    for p in run.dir.rglob('*'):
        if p.name == '.lock': continue
        if p.is_dir(): want = rights | (rights & 0o444) >> 2
        elif p.is_relative_to(run.results): want = rights
        else: want = rights & 0o555
        assert p.stat().st_mode & 0o777 == want, p


def test_other_settings_are_refused_by_name(settings, whole, spawn):
    argv = [*settings, 'desc=whole', 'training.optimizer.init_lr=2e-3', 'seed=4']
    assert exit_code(spawn(argv, where(whole), said=whole/'other')) == 2
    said = (whole/'other').read_text()
    assert ('seed was 103, now 4; training.optimizer.init_lr was 0.001, now 0.002: '
            'a run goes on with the settings that it began with') in said
    assert said.count('\n') <= 2


def test_texts_of_a_finished_run_are_restored(tmp_path, settings, whole, monkeypatch, capsys):
    "An older version could leave a run without: opened again it gets them back, or one line says why not."
    shutil.copytree(whole, tmp_path/'old')
    run = run_of(tmp_path/'old')
    for k, v in where(tmp_path/'old').items(): monkeypatch.setenv(k, v)

    def texts(): return list(run.data.glob('*_texts.jsonl.gz'))

    def opened_without_texts():
        for p in texts(): p.unlink()
        run.data.chmod(0o555)
        assert main([*settings, 'desc=whole']) == 0
        return capsys.readouterr().err

    assert 'they are restored' in opened_without_texts()
    assert digest(tmp_path/'old') == digest(whole)
    for p in texts(): assert not p.stat().st_mode & 0o222

    run.note(pairs={})
    said = opened_without_texts()
    assert 'lacks data/*_texts.jsonl.gz' in said
    assert 'the pairs are not those that it was trained on' in said
    assert 'Traceback' not in said


# Checkpoints that are not what was written

def cut_short(folder, spawn, settings):
    "A run that was killed at its eighth step; its checkpoints, the older one first."
    p = spawn([*settings, 'desc=whole'], where(folder), bomb=('step', 8, 0., 0))
    assert exit_code(p) == -signal.SIGKILL
    return checkpoints(folder)


def flip(path):
    "Change a bit in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 16
    path.chmod(0o644)
    path.write_bytes(data)


HARMS = {'weights': lambda c: flip(c/'model.safetensors'),
         'moments': lambda c: flip(c/'optimizer.safetensors'),
         'best': lambda c: flip(c/'best'/'model.safetensors'),
         'rng': lambda c: os.truncate(c/'rng.json', 100),
         'state': lambda c: (c/'state.json').unlink(),
         'digests': lambda c: flip(c/'digests.json'),
         'no-best': lambda c: shutil.rmtree(c/'best')}

@pytest.mark.parametrize('harm', HARMS)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, settings, whole, spawn, harm):
    old, new = cut_short(tmp_path, spawn, settings)
    HARMS[harm](new)
    said = goes_on(tmp_path, spawn, settings, whole)
    assert said.count('passed over') == 1
    assert f'goes on after batch {n_of(old)} of {N_BATCHES}' in said


def test_all_checkpoints_damaged(tmp_path, settings, spawn):
    "Nothing is begun again without asking the user; removing the folder begins it again."
    for c in cut_short(tmp_path, spawn, settings): flip(c/'model.safetensors')
    argv, said = [*settings, 'desc=whole'], tmp_path/'said'
    assert exit_code(spawn(argv, where(tmp_path), said=said)) == 2
    assert 'no older checkpoint is whole; remove the folder checkpoints' in said.read_text()
    assert 'Traceback' not in said.read_text()

    simulation = run_of(tmp_path).simulation
    unprotect(simulation)
    shutil.rmtree(simulation/'checkpoints')
    assert exit_code(spawn(argv, where(tmp_path), said=said)) == 0
    assert 'no checkpoint yet: begins again' in said.read_text()


class Marks:
    "Leaves a mark when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


PICKLED = None      # what a pickle does when it is read
NO_RNG = b'[{"python": [3, [1], null], "numpy": [], "torch": [1], "cuda": null}]'

@pytest.mark.parametrize('name, data', [
    pytest.param('model.safetensors', PICKLED, id='pickled-weights'),
    pytest.param('optimizer.safetensors', PICKLED, id='pickled-moments'),
    pytest.param('state.json', b'{"epoch": 0, "__class__": "os.system"}', id='state'),
    pytest.param('state.json', b'[]', id='no-state'),
    pytest.param('rng.json', NO_RNG, id='rng'),
    pytest.param('recent.json', b'{"steps": [{"chosen": "x"}], "seconds": 0}', id='recent'),
    pytest.param('state.json', b'{'*100_000, id='deep')])
def test_a_forged_checkpoint_is_refused(tmp_path, settings, spawn, name, data):
    "Checkpoints hold tensors and JSON; nothing in them is executed, whatever its digests say."
    mark, said = tmp_path/'mark', tmp_path/'said'
    newest = cut_short(tmp_path, spawn, settings)[-1]
    (newest/name).write_bytes(data or pickle.dumps(Marks(mark)))
    (newest/'digests.json').write_text(json.dumps(checkpoint.digests(newest)))
    assert exit_code(spawn([*settings, 'desc=whole'], where(tmp_path), said=said)) == 2
    words = said.read_text()
    assert words.count('error: ') == 1
    assert 'not a checkpoint of this run' in words
    assert 'Traceback' not in words, words[-2000:]
    assert not mark.exists()


# Disks that refuse

def after_each_step(act):
    "From now on `act(loop)` is called after each step of a loop."
    step = loop.TrainingLoop.step

    def then(self, *args):
        step(self, *args)
        act(self)

    loop.TrainingLoop.step = then


def full_disk(argv, env, said):
    "No file may grow beyond 20 kB from the sixth step on: the checkpoint's own write fails, in the kernel."
    def fills(loop):
        if loop.n_batches == 6: no_file_grows_beyond(20_000)

    write_words_to(said)
    after_each_step(fills)
    sys.exit(work(argv, env))


def read_only(argv, env, said):
    "The results turn read-only at the sixth step; root may write everywhere, so the process goes on as another user."
    def turns(loop):
        if loop.n_batches != 6: return
        for p in (loop.folder, *loop.folder.rglob('*')):
            if p.is_dir(): p.chmod(0o555)
        if os.geteuid() == 0: os.seteuid(65534)

    write_words_to(said)
    after_each_step(turns)
    code = work(argv, env)
    if os.getuid() == 0: os.seteuid(0)
    sys.exit(code)


@pytest.mark.parametrize('harm, reason', [
    pytest.param(full_disk, 'File too large', id='full-disk'),
    pytest.param(read_only, 'Permission denied', id='read-only')])
def test_the_disk_refuses(tmp_path, settings, whole, spawn, harm, reason):
    "One line that says what cannot be written; what was kept is whole, and the run goes on from it."
    for p in (tmp_path, *tmp_path.parents):
        if p.is_relative_to('/tmp') and p != Path('/tmp'): p.chmod(0o755)
    p = spawn([*settings, 'desc=whole'], where(tmp_path), tmp_path/'said', target=harm)
    code, said = exit_code(p), (tmp_path/'said').read_text()
    assert code == 1, said[-2000:]
    assert re.search(rf'failed: .* cannot be written \({reason}\); what was kept before is whole', said), said[-2000:]

    simulation = run_of(tmp_path).simulation
    for folder in (simulation, *simulation.rglob('*')):
        if folder.is_dir(): folder.chmod(0o755)
    assert n_of(checkpoints(tmp_path)[-1]) == 4
    assert not list((simulation/'checkpoints').glob('.new-*'))
    assert f'goes on after batch 4 of {N_BATCHES}' in goes_on(tmp_path, spawn, settings, whole)


@contextmanager
def small_disk(folder, size='24m'):
    "A disk of its own, if this user may mount one; else a plain folder."
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try: yield folder
    finally:
        if mounted: subprocess.run(['umount', '-l', folder], check=True)


def words_of(start, folder):
    "Exit code and words of a process that may have no room to write them down: they go through a pipe."
    os.mkfifo(folder/'pipe')
    reader = os.open(folder/'pipe', os.O_RDWR | os.O_NONBLOCK)
    code = exit_code(start(folder/'pipe'))
    with suppress(BlockingIOError): return code, os.read(reader, 2**16).decode()
    return code, ''


def check_words(code, said, context):
    "A failure is one line, the last one; nothing else went wrong."
    assert code in (0, 1, 2), context
    assert not re.search('Traceback|Logging error|Exception', said), context
    if code == 0: return
    failures = [l for l in said.splitlines() if re.match('failed: |error: ', l)]
    assert failures == [said.splitlines()[-1]], context
    assert re.search('No space left|File too large|are free', failures[0]), context


@pytest.mark.parametrize('kind', KINDS)
def test_a_full_disk_is_one_line(tmp_path, settings, spawn, kind):
    """The disk fills at random moments: one line, a failure's exit code.

    The run goes on to the same end when there is room. FULL=10: that many moments."""
    rng, hits = random.Random(kind), []
    argv = [*settings, *KINDS[kind], 'desc=full']
    assert exit_code(spawn(argv, where(tmp_path/'whole'))) == 0
    want = digest(tmp_path/'whole')
    for k in range(int(os.environ.get('FULL', 2))):
        folder = tmp_path/f'{k}'
        folder.mkdir()
        with small_disk(folder/'disk') if k % 2 == 0 else nullcontext(folder/'disk') as disk:
            bomb = bomb_for(rng, 1, ('cache',) if kind == 'kept' and k == 0 else ANY)
            start = lambda pipe: spawn(argv, where(disk), bomb=bomb, act=fill, said=pipe)
            code, said = words_of(start, folder)
            hit = f'{"disk" if os.path.ismount(disk) else "limit"} {bomb[0]} {code}'
            (disk/'filler').unlink(missing_ok=True)
            context = f'{kind} {k}, {hit}, {bomb}: {said[-3000:]}'
            check_words(code, said, context)
            again = exit_code(spawn(argv, where(disk), said=folder/'again'))
            assert again == 0, (folder/'again').read_text()[-2000:]
            assert digest(disk) == want, context
            hits.append(hit)
    print(kind, ', '.join(hits))


def test_no_room_before_any_work(tmp_path, settings, monkeypatch, capsys):
    for k, v in where(tmp_path).items(): monkeypatch.setenv(k, v)
    usage = shutil.disk_usage('/')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=10_000))
    assert main([*settings, 'desc=whole']) == 2
    assert 'checkpoints and best models need' in capsys.readouterr().err


# A clock that jumps

def jumping(argv, env, said):
    "The clock is set back by a year at the fourth step and forward by ten at the eighth."
    now, offset, day = time.time, [0.], 86400.
    time.time = lambda: now() + offset[0]

    def jumps(loop):
        if loop.n_batches == 4: offset[0] = -365*day
        if loop.n_batches == 8: offset[0] = 3650*day

    write_words_to(said)
    after_each_step(jumps)
    sys.exit(work(argv, env))


def test_a_clock_that_jumps(tmp_path, settings, whole, spawn):
    p = spawn([*settings, 'desc=whole'], where(tmp_path), tmp_path/'said', target=jumping)
    assert exit_code(p) == 0, (tmp_path/'said').read_text()[-2000:]
    assert digest(tmp_path) == digest(whole)
    summary = json.loads((run_of(tmp_path).results/'summary.json').read_text())
    assert 0 < summary['seconds'] < 100
