"""Runs that are killed, stopped, starved and started twice: what a cell can't do to itself.

KILLS=200 makes the kill test longer (8 kills for each of its four kinds of run otherwise)."""
import errno, json, multiprocessing, os, random, re, resource, shutil, signal, subprocess, sys, threading, time
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
import pytest, torch
from rlhf_flant5 import train
from rlhf_flant5.training import checkpoint, loop, origin, states
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.core.processes import launch
from rlhf_flant5.training.runs import Run, find_runs
from rlhf_flant5.train import main
from conftest import root, program

EARLY = dict(record=(Run, 'record'), data=(train, 'load_data'), begin=(train, 'begin_runs'), texts=(origin, 'keep_texts'))
LATE = dict(step=(loop, 'train_step'), validation=(loop, 'evaluate_all'), best=(RewardModel, 'save_pretrained'), checkpoint=(checkpoint, 'write_checkpoint'), seal=(checkpoint, 'seal'),
            scores=(train, 'final_scores'), summary=(train, 'finish'))
ONCE = 'data', 'begin', 'texts', 'scores', 'summary'         # in the life of a process
PHASES = EARLY | LATE | dict(cache=(states.KeptStates, 'write_segment'), close=(Run, '__exit__'))
KILLED = {1: -signal.SIGKILL, 2: 128 + signal.SIGKILL}      # exit code of a run of so many processes; any other one is a crash


def kill(disk): os.kill(os.getpid(), signal.SIGKILL)

def fill(disk):
    "From now on the disk is full, or no file of this process may grow where there is no small disk to be had."
    if not os.path.ismount(disk): return resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with open(disk/'filler', 'wb', buffering=0) as f:
        for size in (2**20, 2**12):
            with suppress(OSError):
                while f.write(bytes(size)): pass


def arm(phase, nth, delay, act, disk):
    "Kill this process, or fill the disk, `delay` seconds after the nth call of a function."
    owner, name = PHASES[phase]; f, calls = getattr(owner, name), iter(range(1, 10**6))
    def armed(*args, **kwargs):
        if next(calls) == nth: threading.Timer(delay, act, [disk]).start() if delay else act(disk)
        return f(*args, **kwargs)
    setattr(owner, name, armed)


def work(argv, where, bomb=None, act=kill):
    torch.set_num_threads(1); states.SEGMENT = 16; os.environ.update(where)
    if bomb and int(os.environ.get('RANK', 0)) == bomb[3]: arm(*bomb[:3], act, Path(where['RESULTS_ROOT_DIR']).parent)
    return main(argv)


def attempt(argv, where, n=1, bomb=None, said=os.devnull, act=kill):
    "The program in `n` processes, in a process of its own; its words go to `said`."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1); os.dup2(1, 2)
    sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))      # subtle: the old ones believe that they can seek
    sys.exit(launch(n, work, argv, where, bomb, method='fork', grace=10) if n > 1 else work(argv, where, bomb, act))


@pytest.fixture(scope='module')
def spawn():
    "Start `attempt` in a process of its own; the modules are imported once, by the server that forks them."
    processes = multiprocessing.get_context('forkserver'); processes.set_forkserver_preload(['rlhf_flant5.train', 'test_survive'])
    def start(*args, **kwargs): p = processes.Process(target=attempt, args=args, kwargs=kwargs); p.start(); return p
    return start


@pytest.fixture(scope='module')
def settings(model_folder, pairs_folder):
    "A run of 12 batches on some 40 pairs, with dropout, four validations and a checkpoint every other batch."
    every = lambda n: '{interval_val: %d, interval_type: batches, max_n_intervals: -1}' % n
    return [f'data.name={pairs_folder}', 'data.subdirs=[helpful-base]', f'model.transformer_name={model_folder}', 'model=attention_pooled_encoder', 'model.dropout=0.1', 'data.val_fraction=0.2', 'training.precision=fp32',
            'training.token_budget=256', 'training.compile=false', 'training.loop.train_batch_size=8', 'training.loop.n_batches=12', 'training.loop.n_epochs=4', 'training.optimizer.init_lr=1e-3', 'training.optimizer.final_lr=1e-4',
            f'training.loop.intervals.validation={every(3)}', f'training.loop.intervals.checkpointing={every(2)}', f'training.loop.intervals.train_status_update={every(2)}',
            'device_name=cpu', 'sim_man.allow_untracked=true', 'resume=true']


def where(folder): 
    for f in ('results', 'cache'): (folder/f).mkdir(parents=True, exist_ok=True)
    return dict(RESULTS_ROOT_DIR=str(folder/'results'), RLHF_FLANT5_CACHE=str(folder/'cache'))


def digest(folder, name='') -> dict:
    "What a run leaves behind, but for times: that of `name`, or the only one."
    run = next(Run(f) for f in find_runs(folder/'results') if name in f.name)
    timed = lambda k: 'per_second' in k or k in ('seconds', 'seconds_in_all', 'peak_memory_bytes')
    rows = [{k: v for k, v in json.loads(l).items() if not timed(k)} for l in (run.results/'history.jsonl').read_text().splitlines()]
    summary = {k: v for k, v in json.loads((run.results/'summary.json').read_text()).items() if not timed(k)}
    kept = {p.relative_to(run.dir).as_posix(): p for p in run.dir.rglob('*') if p.is_file() and not re.search(r'tfevents|changes-\d+', p.name)}
    told = ('provenance.json', 'train.log', 'history.jsonl', 'summary.json', 'recent.json', 'state.json', 'digests.json',      # with times in them
            'command.txt', 'config.yaml', 'changes.diff')                                                                 # what was typed, and where
    return dict(history=rows, summary=summary, files={f: '' if p.name in told else sha256(p.read_bytes()).hexdigest() for f, p in sorted(kept.items())})


FROZEN = ['model.train_transformer=False']

def bomb_for(rng, n, phases=tuple(EARLY | LATE)):
    "A phase at random, with when and in which process it kills."
    phase = rng.choice(phases)
    return phase, 1 if phase in ONCE else rng.choice((1, 2, 3)), rng.uniform(0, .02), rng.randrange(n)


def test_kills_change_nothing(tmp_path, spawn, settings):
    "Runs killed again and again, in one or two processes, trained or frozen, end as the one that never was."
    rng, per_kind, table = random.Random(1), int(os.environ.get('KILLS', 32))//4, []
    for kind, more, n in (('trained', [], 1), ('frozen', FROZEN, 1), ('trained', [], 2), ('frozen', FROZEN, 2)):
        argv, name = [*settings, *more, 'desc=kill', f'index={n}'], f'{kind}-{n}'
        p = spawn(argv, where(tmp_path/name), n, said=tmp_path/'words'); p.join(120); assert p.exitcode == 0, (tmp_path/'words').read_text()[-2000:]
        want, kills, k = digest(tmp_path/name), {}, 0
        while sum(kills.values()) < per_kind:
            k += 1; folder = tmp_path/f'{name}-{k}'
            for i in range(40):
                bomb = bomb_for(rng, n, ('cache',) if kind == 'frozen' and i == 0 else tuple(EARLY | LATE))     # states are written first, and once
                p = spawn(argv, where(folder), n, bomb, said=folder/'words'); p.join(120)
                assert p.exitcode is not None, f'hangs after {bomb}'
                if p.exitcode == 0: break
                assert p.exitcode == KILLED[n], f'{p.exitcode} after {bomb}: {(folder/"words").read_text()[-2000:]}'
                kills[bomb[0]] = kills.get(bomb[0], 0) + 1
            else: p = spawn(argv, where(folder), n); p.join(120); assert p.exitcode == 0
            assert digest(folder) == want, f'{name} after {kills}'
        table.append(f'{name}: {sum(kills.values())} kills in {k} runs ({", ".join(f"{v} {k}" for k, v in sorted(kills.items()))}), weights {want["files"]["simulation/best_model/model.safetensors"][:16]}')
    print('\n'.join(table))


def run_of(folder): return Run(find_runs(folder/'results')[0])
def unbroken(tmp_path_factory, spawn, settings, n=1):
    folder = tmp_path_factory.mktemp('whole'); p = spawn([*settings, 'desc=whole'], where(folder), n, said=folder/'said'); p.join(120)
    assert p.exitcode == 0, (folder/'said').read_text()[-2000:]
    return folder

@pytest.fixture(scope='module')
def whole(tmp_path_factory, spawn, settings): return unbroken(tmp_path_factory, spawn, settings)


def goes_on(folder, spawn, settings, whole, desc='whole'):
    "The run ends as the one that was never cut short."
    p = spawn([*settings, f'desc={desc}'], where(folder), said=folder/'again'); p.join(120)
    assert p.exitcode == 0, (folder/'again').read_text()[-2000:]
    assert digest(folder) == digest(whole)
    return (folder/'again').read_text()


@pytest.mark.parametrize('n, how', [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_signals_ask_for_a_requeue(tmp_path, settings, whole, spawn, n, how):
    "The real program: SIGTERM and Ctrl-C write a checkpoint within the step and exit with 75; the same command goes on."
    argv = [*settings, 'desc=whole', *([f'distributed.n_processes={n}'] if n > 1 else [])]
    env = os.environ | where(tmp_path) | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    p = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.train', *argv], env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    history = tmp_path/'results'/'Reward-Model-Training'/'desc-whole,index-0'/'results'/'history.jsonl'; end = time.monotonic() + 120
    while time.monotonic() < end and p.poll() is None and not (history.exists() and history.read_text()): time.sleep(.005)
    p.send_signal(how); _, said = p.communicate(timeout=120)
    assert p.returncode == 75 and f'interrupted ({how.name}); go on with resume=true' in said and 'Traceback' not in said, said[-2000:]
    stopped = int(re.search(r'interrupted after batch (\d+) of 12; checkpoint written', said)[1]); assert 1 <= stopped < 12
    assert run_of(tmp_path).provenance['status'] == 'interrupted'
    if n == 1: assert f'goes on after batch {stopped} of 12' in goes_on(tmp_path, spawn, settings, whole)
    else:
        p = subprocess.run([sys.executable, '-m', 'rlhf_flant5.train', *argv], env=env, text=True, capture_output=True, timeout=120)
        assert p.returncode == 0 and f'goes on after batch {stopped} of 12' in p.stderr, p.stderr[-2000:]


def test_two_at_once(tmp_path, settings, whole, spawn):
    "One wins, the other is refused; nothing of the winner is touched. With and without `resume`."
    for k, how in enumerate(('resume=true', 'resume=false')):
        folder = tmp_path/how; argv = [*settings, 'desc=whole', how]
        both = [spawn(argv, where(folder), said=folder/f'said-{i}') for i in range(2)]
        for p in both: p.join(120)
        assert sorted(p.exitcode for p in both) == [0, 2]
        loser = next(i for i, p in enumerate(both) if p.exitcode == 2); said = (folder/f'said-{loser}').read_text()
        assert re.search(r'error: .*(another process is at work in this run|exists already)', said) and 'Traceback' not in said
        assert digest(folder) == digest(whole)


def test_a_run_that_is_done_stays(tmp_path, settings, whole, spawn):
    before = digest(whole); p = spawn([*settings, 'desc=whole'], where(whole), said=whole/'done'); p.join(120)
    assert p.exitcode == 0 and 'is done already' in (whole/'done').read_text() and digest(whole) == before


def test_rights_of_a_finished_run(whole):
    "Everybody whom the umask lets may read it; files of the record are closed, folders are not."
    (whole/'probe').touch(); rights = (whole/'probe').stat().st_mode & 0o777; run = run_of(whole)
    for p in run.dir.rglob('*'):
        if p.name == '.lock': continue
        want = rights | (rights & 0o444) >> 2 if p.is_dir() else rights if p.is_relative_to(run.results) else rights & 0o555
        assert p.stat().st_mode & 0o777 == want, p


def test_other_settings_are_refused_by_name(tmp_path, settings, whole, spawn):
    p = spawn([*settings, 'desc=whole', 'training.optimizer.init_lr=2e-3', 'seed=4'], where(whole), said=whole/'other'); p.join(120); said = (whole/'other').read_text()
    assert p.exitcode == 2 and 'seed was 103, now 4; training.optimizer.init_lr was 0.001, now 0.002: a run goes on with the settings that it began with' in said and said.count('\n') <= 2


def test_killed_before_the_first_step(tmp_path, settings, whole, spawn):
    "A run has all that it is judged on, wherever between its folder and its first step it was killed."
    for phase, nth in (('record', 1), ('data', 1), ('record', 1), ('begin', 1), ('texts', 1), ('record', 2)):      # provenance, …, counts, …, decided
        p = spawn([*settings, 'desc=whole'], where(tmp_path), bomb=(phase, nth, 0., 0)); p.join(120)
        assert p.exitcode == -signal.SIGKILL and not (run_of(tmp_path).results/'history.jsonl').exists()
    goes_on(tmp_path, spawn, settings, whole)


@pytest.mark.parametrize('transformer', ['toy', 'folder'])
def test_killed_while_side_by_side_runs_are_closed(tmp_path, settings, spawn, transformer):
    "The last run is closed first; those that are left go on without it, to the same bits, though it alone has read the decoder."
    names = 'attention_pooled_encoder', 'layerwise_attention', 'decoder_output'
    argv = [s for s in settings if not s.startswith('model=')] + [f'model=[{",".join(names)}]', 'desc=x', 'model.train_transformer=False', 'model.use_pretrained_output=False']
    if transformer == 'toy': argv.append('model.transformer_name=toy')      # its encoder has other weights without its decoder
    p = spawn(argv, where(tmp_path/'whole'), said=tmp_path/'said'); p.join(120)
    assert p.exitcode == 0, (tmp_path/'said').read_text()[-2000:]
    for bomb in ('close', 1, 0., 0), ('close', 2, 0., 0), ('close', 2, 0., 0):
        p = spawn(argv, where(tmp_path/'killed'), bomb=bomb, said=tmp_path/'said'); p.join(120)
        assert p.exitcode == -signal.SIGKILL, (tmp_path/'said').read_text()[-2000:]
    p = spawn(argv, where(tmp_path/'killed'), said=tmp_path/'again'); p.join(120)
    said = (tmp_path/'again').read_text()
    assert p.exitcode == 0 and said.count('is done already') == 2, said[-2000:]
    for name in names: assert digest(tmp_path/'killed', name) == digest(tmp_path/'whole', name)


def test_texts_of_a_finished_run_are_restored(tmp_path, settings, whole, monkeypatch, capsys):
    "An older version could leave a run without: opened again it gets them back, or one line says why not."
    shutil.copytree(whole, tmp_path/'old'); run = run_of(tmp_path/'old')
    for k, v in where(tmp_path/'old').items(): monkeypatch.setenv(k, v)
    def again():
        for p in run.data.glob('*_texts.jsonl.gz'): p.unlink()
        run.data.chmod(0o555)
        assert main([*settings, 'desc=whole']) == 0
        return capsys.readouterr().err
    assert 'they are restored' in again() and digest(tmp_path/'old') == digest(whole)
    assert not any(p.stat().st_mode & 0o222 for p in run.data.glob('*_texts.jsonl.gz'))
    run.note(pairs={})
    said = again()
    assert 'lacks data/*_texts.jsonl.gz' in said and 'the pairs are not those that it was trained on' in said and 'Traceback' not in said


def cut_short(folder, spawn, settings, bomb=('step', 8, 0., 0)):
    p = spawn([*settings, 'desc=whole'], where(folder), bomb=bomb); p.join(120); assert p.exitcode == -signal.SIGKILL
    return sorted((run_of(folder).simulation/'checkpoints').glob('batch-*'))


def flip(path):
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 16; path.chmod(0o644); path.write_bytes(data)

@pytest.mark.parametrize('harm', [lambda c: flip(c/'model.safetensors'), lambda c: flip(c/'optimizer.safetensors'), lambda c: flip(c/'best'/'model.safetensors'), lambda c: os.truncate(c/'rng.json', 100),
                                  lambda c: (c/'state.json').unlink(), lambda c: flip(c/'digests.json'), lambda c: shutil.rmtree(c/'best')], ids='weights moments best rng state digests no-best'.split())
def test_a_damaged_checkpoint_is_passed_over(tmp_path, settings, whole, spawn, harm):
    old, new = cut_short(tmp_path, spawn, settings); harm(new)
    said = goes_on(tmp_path, spawn, settings, whole); assert said.count('passed over') == 1 and f'goes on after batch {int(old.name[6:])} of 12' in said


def test_all_checkpoints_damaged(tmp_path, settings, spawn):
    "Nothing is begun again behind the user's back; removing the folder begins it again."
    for c in cut_short(tmp_path, spawn, settings): flip(c/'model.safetensors')
    p = spawn([*settings, 'desc=whole'], where(tmp_path), said=tmp_path/'said'); p.join(120); said = (tmp_path/'said').read_text()
    assert p.exitcode == 2 and 'no older checkpoint is whole; remove the folder checkpoints' in said and 'Traceback' not in said
    from rlhf_flant5.training.runs import unprotect
    unprotect(run_of(tmp_path).simulation); shutil.rmtree(run_of(tmp_path).simulation/'checkpoints')
    p = spawn([*settings, 'desc=whole'], where(tmp_path), said=tmp_path/'said'); p.join(120); assert p.exitcode == 0 and 'no checkpoint yet: begins again' in (tmp_path/'said').read_text()


def full_disk(argv, env, said):
    "No file may grow beyond 20 kB from the sixth step on: the checkpoint's own write fails, in the kernel."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1); os.dup2(1, 2); step = loop.TrainingLoop.step
    def filling(self, *args):
        step(self, *args)
        if self.state.n_batches == 6: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    loop.TrainingLoop.step = filling; sys.exit(work(argv, env))

def read_only(argv, env, said):
    "The results turn read-only at the sixth step; root may write everywhere, so the process goes on as another user."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1); os.dup2(1, 2); step = loop.TrainingLoop.step
    def turning(self, *args):
        step(self, *args)
        if self.state.n_batches == 6:
            for p in (self.folder, *self.folder.rglob('*')):
                if p.is_dir(): p.chmod(0o555)
            if os.geteuid() == 0: os.seteuid(65534)
    loop.TrainingLoop.step = turning; code = work(argv, env)
    if os.getuid() == 0: os.seteuid(0)
    sys.exit(code)

@pytest.mark.parametrize('harm, reason', [(full_disk, 'File too large'), (read_only, 'Permission denied')], ids='full-disk read-only'.split())
def test_the_disk_refuses(tmp_path, settings, whole, spawn, harm, reason):
    "One line that says what cannot be written; what was kept is whole, and the run goes on from it."
    argv = [*settings, 'desc=whole']; tmp_path.chmod(0o755); [p.chmod(0o755) for p in tmp_path.parents if p.is_relative_to('/tmp') and p != Path('/tmp')]
    p = multiprocessing.get_context('forkserver').Process(target=harm, args=(argv, where(tmp_path), tmp_path/'said')); p.start(); p.join(120); said = (tmp_path/'said').read_text()
    assert p.exitcode == 1 and re.search(rf'failed: .* cannot be written \({reason}\); what was kept before is whole', said), said[-2000:]
    run = run_of(tmp_path); [d.chmod(0o755) for d in (run.simulation, *run.simulation.rglob('*')) if d.is_dir()]
    assert [c.name for c in sorted((run.simulation/'checkpoints').glob('batch-*'))][-1] == 'batch-0000004' and not [*(run.simulation/'checkpoints').glob('.new-*')]
    assert 'goes on after batch 4 of 12' in goes_on(tmp_path, spawn, settings, whole)


@contextmanager
def small_disk(folder, size='24m'):
    "A disk of its own, if this user may mount one; else a plain folder."
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True).returncode == 0
    try: yield folder
    finally:
        if mounted: subprocess.run(['umount', '-l', folder], check=True)


def words_of(start, folder):
    "Exit code and words of a process that may have no room to write them down: they go through a pipe."
    os.mkfifo(folder/'pipe'); reader = os.open(folder/'pipe', os.O_RDWR | os.O_NONBLOCK)
    p = start(folder/'pipe'); p.join(120)
    with suppress(BlockingIOError): return p.exitcode, os.read(reader, 2**16).decode()
    return p.exitcode, ''


KINDS = dict(trained=[], frozen=['model.train_transformer=False', 'model.use_pretrained_output=False'], kept=FROZEN)

@pytest.mark.parametrize('kind', KINDS)
def test_a_full_disk_is_one_line(tmp_path, settings, spawn, kind):
    "The disk fills at random moments: one line, a failure's exit code, and the run goes on to the same end when there is room. FULL=10: that many moments."
    rng, argv, hits = random.Random(kind), [*settings, *KINDS[kind], 'desc=full'], []
    p = spawn(argv, where(tmp_path/'whole')); p.join(120); want = digest(tmp_path/'whole')
    for k in range(int(os.environ.get('FULL', 2))):
        (tmp_path/f'{k}').mkdir()
        with small_disk(tmp_path/f'{k}'/'disk') if k % 2 == 0 else nullcontext(tmp_path/f'{k}'/'disk') as disk:
            bomb = bomb_for(rng, 1, ('cache',) if kind == 'kept' and k == 0 else tuple(EARLY | LATE))
            code, said = words_of(lambda pipe: spawn(argv, where(disk), bomb=bomb, act=fill, said=pipe), tmp_path/f'{k}')
            full = os.path.ismount(disk); (disk/'filler').unlink(missing_ok=True)
            lines = [l for l in said.splitlines() if re.match('failed: |error: ', l)]
            where_ = f'{kind} {k}, {"disk" if full else "limit"} {bomb}: exit {code}: {said[-3000:]}'
            if code: assert len(lines) == 1 and said.splitlines()[-1] == lines[0] and re.search('No space left|File too large|are free', lines[0]), where_
            assert code in (0, 1, 2) and not re.search('Traceback|Logging error|Exception', said), where_
            p = spawn(argv, where(disk), said=tmp_path/f'{k}'/'again'); p.join(120)
            assert p.exitcode == 0, (tmp_path/f'{k}'/'again').read_text()[-2000:]
            assert digest(disk) == want, where_
            hits.append(f'{"disk" if full else "limit"} {bomb[0]} {code}')
    print(kind, ', '.join(hits))


def jumping(argv, env, said):
    "The clock is set back by a year at the fourth step and forward by ten at the eighth."
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1); os.dup2(1, 2); step, now, offset = loop.TrainingLoop.step, time.time, [0.]
    time.time = lambda: now() + offset[0]
    def jump(self, *args):
        step(self, *args); offset[0] = {4: -365*86400., 8: 3650*86400.}.get(self.state.n_batches, offset[0])
    loop.TrainingLoop.step = jump; sys.exit(work(argv, env))

def test_a_clock_that_jumps(tmp_path, settings, whole):
    p = multiprocessing.get_context('forkserver').Process(target=jumping, args=([*settings, 'desc=whole'], where(tmp_path), tmp_path/'said')); p.start(); p.join(120)
    assert p.exitcode == 0, (tmp_path/'said').read_text()[-2000:]
    assert digest(tmp_path) == digest(whole) and 0 < json.loads((run_of(tmp_path).results/'summary.json').read_text())['seconds'] < 100


def test_no_room_before_any_work(tmp_path, settings, monkeypatch, capsys):
    for k, v in where(tmp_path).items(): monkeypatch.setenv(k, v)
    usage = shutil.disk_usage('/')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=10_000))
    assert main([*settings, 'desc=whole']) == 2 and 'checkpoints and best models need' in capsys.readouterr().err


class Marks:
    "Leaves a mark when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)

def forged(c, name, data):
    (c/name).write_bytes(data); (c/'digests.json').write_text(json.dumps(checkpoint.digests(c)))

@pytest.mark.parametrize('name, data', [('model.safetensors', None), ('optimizer.safetensors', None), ('state.json', b'{"epoch": 0, "__class__": "os.system"}'), ('state.json', b'[]'), ('rng.json', b'[{"python": [3, [1], null], "numpy": [], "torch": [1], "cuda": null}]'),
                                        ('recent.json', b'{"steps": [{"chosen": "x"}], "seconds": 0}'), ('state.json', b'{' * 100_000)], ids='pickled-weights pickled-moments state no-state rng recent deep'.split())
def test_a_forged_checkpoint_is_refused(tmp_path, settings, spawn, name, data):
    "Checkpoints hold tensors and JSON; nothing in them is executed, whatever its digests say."
    import pickle
    new = cut_short(tmp_path, spawn, settings)[-1]; mark = tmp_path/'mark'
    forged(new, name, data or pickle.dumps(Marks(mark)))
    p = spawn([*settings, 'desc=whole'], where(tmp_path), said=tmp_path/'said'); p.join(120); said = (tmp_path/'said').read_text()
    assert p.exitcode == 2 and said.count('error: ') == 1 and 'not a checkpoint of this run' in said and 'Traceback' not in said and not mark.exists(), said[-2000:]
