"Kept states where a cell can't go: processes killed in the middle, two at once, full disks, whole runs that share an entry."
import errno, json, logging, multiprocessing, os, random, re, resource, shutil, signal, time
from collections import Counter, defaultdict
from types import SimpleNamespace
import numpy as np
import pytest, torch
from transformers import T5Model
from rlhf_flant5.training import states
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.batches import PairBatches, pad_ids
from rlhf_flant5.data.pairs import encode, tokenize_pairs
from rlhf_flant5.training.states import keep_states
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer

N, SEGMENT = 200, 16
n_segments = -(-N//SEGMENT)


def world(n=N):
    "A frozen backbone and pairs of random tokens."
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 500, size=rng.integers(4, 40)).tolist() for _ in range(2*n)]
    pairs = dict(chosen_ids=ids[:n], rejected_ids=ids[n:], id=[*map(str, range(n))], subset=['x']*n)
    return Backbone(toy_transformer(cls=T5Model), train_transformer=False), PairBatches(pairs, 0, 8, 512)


def work(folder, notes, slow=0.):
    "Keep the states in a process of its own; `notes` gets what it logs and the first row of each segment that it begins."
    torch.set_num_threads(1); states.SEGMENT, compute = SEGMENT, states.first_states
    logging.basicConfig(filename=notes, level=logging.INFO, format='%(message)s')
    def noted(backbone, batches, rows, autocast):
        logging.info(f'begins {rows[0]}'); time.sleep(slow/2)
        out = compute(backbone, batches, rows, autocast); time.sleep(slow/2)
        return out
    states.first_states = noted
    backbone, batches = world()
    kept = keep_states(backbone, batches, folder)
    logging.info(f'sum {float(kept.states.astype(np.float64).sum())}')


@pytest.fixture(scope='module')
def spawn():
    "Start `work` in a process of its own; the modules are imported once, by the server that forks them."
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['rlhf_flant5.training.states', 'rlhf_flant5.data.toy'])
    def start(*args):
        p = processes.Process(target=work, args=args); p.start()
        return p
    return start


@pytest.fixture
def few(monkeypatch):
    "Small segments; counts the pairs that pass through the backbone."
    monkeypatch.setattr(states, 'SEGMENT', SEGMENT)
    count, compute = SimpleNamespace(pairs=0), states.first_states
    def counted(backbone, batches, rows, autocast): count.pairs += len(rows); return compute(backbone, batches, rows, autocast)
    monkeypatch.setattr(states, 'first_states', counted)
    return count


def begun(notes): return re.findall(r'^begins (\d+)$', notes.read_text(), re.M) if notes.exists() else []
def promised(folder): return {int(i) for j in folder.glob('states/*/journal') for i in re.findall(r'^(\d+) \d+$', j.read_text(), re.M)}
def entry(folder): return next(folder.glob('states/*'))


def test_kills_cost_time_only(tmp_path, spawn):
    "Processes killed at random moments, then one that is left alone: the bytes of an unbroken pass, and no promised segment twice."
    whole, broken, notes = tmp_path/'whole', tmp_path/'broken', tmp_path/'notes'
    p = spawn(whole, tmp_path/'unbroken'); p.join(60); assert p.exitcode == 0
    rows = [*map(str, np.argsort(-world()[1].lengths, kind='stable')[::SEGMENT])]   # the first of each segment
    rng, kills = random.Random(1), 0
    for attempt in range(40):
        before, n = promised(broken), len(begun(notes))
        p = spawn(broken, notes, .02)
        if attempt % 3:   # in the pass
            end = time.monotonic() + 60
            while p.is_alive() and len(begun(notes)) == n and time.monotonic() < end: time.sleep(.001)
            p.join(rng.uniform(0, .2))
        else: p.join(rng.uniform(0, .3))   # perhaps before it
        p.kill(); p.join()
        assert not before & {rows.index(r) for r in begun(notes)[n:]}
        assert before <= promised(broken)
        assert p.exitcode in (0, -signal.SIGKILL)      # any other end is a crash
        kills += p.exitcode != 0
        if p.exitcode == 0: break
    assert p.exitcode == 0 and kills >= 4
    assert (entry(broken)/'states.bin').read_bytes() == (entry(whole)/'states.bin').read_bytes()
    assert len(promised(broken)) == n_segments
    print(f'{kills} kills, {len(begun(notes))} segments begun of {n_segments}')


def test_two_processes_compute_once(tmp_path, spawn):
    notes = tmp_path/'notes'
    both = [spawn(tmp_path, notes, .02) for _ in range(2)]
    for p in both: p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    text = notes.read_text()
    assert len(begun(notes)) == len({*begun(notes)}) == n_segments
    assert text.count('another process computes these states; waiting for it') == 1 and text.count('states kept: ') == 1
    assert len({*re.findall(r'^sum .*$', text, re.M)}) == 1


def test_what_makes_another_entry(tmp_path):
    tokenizer, pairs = toy_tokenizer(), toy_pairs(12, seed=2)
    def batches(pairs, max_tokens=128): return PairBatches(tokenize_pairs(pairs, tokenizer, max_tokens, 'truncate_left', 'train', defaultdict(Counter)), 0, 8, 512)
    def backbone(**changes): return Backbone(toy_transformer(cls=T5Model, **changes), train_transformer=False)
    changed = pairs.map(lambda row, i: dict(chosen=row['chosen'] + ' Yes.'*(i == 7)), with_indices=True)
    entries = dict(plain=keep_states(backbone(), batches(pairs), tmp_path),
                   text=keep_states(backbone(), batches(changed), tmp_path), order=keep_states(backbone(), batches(pairs.select([*range(1, 12), 0])), tmp_path),
                   max_tokens=keep_states(backbone(), batches(pairs, 20), tmp_path), weights=keep_states(backbone(seed=1), batches(pairs), tmp_path),
                   architecture=keep_states(backbone(layer_norm_epsilon=1e-5), batches(pairs), tmp_path), dtype=keep_states(backbone(), batches(pairs), tmp_path, 'float32'),
                   precision=keep_states(backbone(), batches(pairs), tmp_path, autocast=lambda: torch.autocast('cpu', torch.bfloat16), precision='bf16'))
    assert len({e.key for e in entries.values()}) == len({*(tmp_path/'states').iterdir()}) == len(entries)
    assert keep_states(backbone(dropout_rate=.3), batches(pairs), tmp_path).key == entries['plain'].key
    error = abs(entries['precision'].states.astype(float) - entries['plain'].states).max()
    assert 0 < error < .2 and abs(entries['dtype'].states - entries['plain'].states).max() < 2e-3


def flip(path, at):
    with open(path, 'r+b') as f: f.seek(at); byte = f.read(1)[0]; f.seek(at); f.write(bytes([byte ^ 16]))

@pytest.mark.parametrize('damage, again', [
    (lambda e: flip(e/'states.bin', 777), 1), (lambda e: os.truncate(e/'states.bin', N*256), None), (lambda e: (e/'states.bin').unlink(), n_segments),
    (lambda e: os.truncate(e/'states.bin', N*512 + 5), 0), (lambda e: flip(e/'journal', 30), n_segments), (lambda e: (e/'journal').unlink(), n_segments),
    (lambda e: os.truncate(e/'journal', (e/'journal').stat().st_size - 4), 1), (lambda e: shutil.copy(e/'journal', e/'states.bin'), n_segments)],
    ids='flipped-byte half-the-file no-file longer-file flipped-journal no-journal cut-journal another-file'.split())
def test_damage_is_mended(tmp_path, few, caplog, damage, again):
    "What is damaged is told in one line and computed again; nothing damaged is served."
    backbone, batches = world()
    want = np.array(keep_states(backbone, batches, tmp_path).states)
    damage(entry(tmp_path)); few.pairs = 0; caplog.clear()
    with caplog.at_level(logging.INFO, 'rlhf_flant5.training.states'): kept = keep_states(backbone, batches, tmp_path)
    assert (kept.states == want).all() and (kept.path/'states.bin').stat().st_size == kept.nbytes
    segments = -(-few.pairs//SEGMENT)
    assert segments == again if again is not None else 0 < segments <= n_segments
    if segments: assert sum('damaged' in m or 'to compute' in m for m in caplog.messages) <= 2
    few.pairs = 0; keep_states(backbone, batches, tmp_path); assert few.pairs == 0


@pytest.fixture
def read_only(monkeypatch):
    "The cache lies on a mount that can only be read: whatever is opened to write, made or locked there is refused."
    def read_only(folder):
        def refuse(*_, **__): raise OSError(errno.EROFS, 'Read-only file system')
        def guarded(path, mode='r', *args, **kwargs): return refuse() if {*mode} & {*'wax+'} else open(path, mode, *args, **kwargs)
        monkeypatch.setattr(os, 'access', lambda path, mode: not mode & os.W_OK)
        monkeypatch.setattr(states, 'open', guarded, raising=False)
        monkeypatch.setattr(states.Path, 'mkdir', refuse)
        monkeypatch.setattr(states, 'FileLock', refuse)
    return read_only


def test_a_whole_entry_of_a_read_only_cache_is_used(tmp_path, few, caplog, read_only):
    backbone, batches = world()
    want = np.array(keep_states(backbone, batches, tmp_path).states)
    few.pairs = 0; read_only(tmp_path)
    with caplog.at_level(logging.INFO, 'rlhf_flant5.training.states'): kept = keep_states(backbone, batches, tmp_path)
    assert (kept.states == want).all() and few.pairs == 0 and 'states kept: ' in caplog.text


@pytest.mark.parametrize('damage', [lambda e: flip(e/'states.bin', 777), lambda e: os.truncate(e/'states.bin', N*512 - 1), lambda e: (e/'journal').unlink(), shutil.rmtree],
                         ids='flipped-byte cut-off no-journal no-entry'.split())
def test_half_an_entry_of_a_read_only_cache_is_refused(tmp_path, few, read_only, damage):
    backbone, batches = world(); keep_states(backbone, batches, tmp_path)
    damage(entry(tmp_path)); few.pairs = 0; read_only(tmp_path)
    with pytest.raises(ConfigError, match='cannot be kept here .Read-only file system.; make room, or set RLHF_FLANT5_CACHE'): keep_states(backbone, batches, tmp_path)
    assert few.pairs == 0


def test_full_disk_before_any_work(tmp_path, few, monkeypatch):
    backbone, batches = world()
    def refused(): 
        with pytest.raises(ConfigError) as e: keep_states(backbone, batches, tmp_path)
        assert '\n' not in str(e.value) and str(tmp_path) in str(e.value) and 'RLHF_FLANT5_CACHE' in str(e.value) and few.pairs == 0
        return str(e.value)
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=50_000)); assert '0.0 MiB are free' in refused()
    def full(fd, start, size): os.ftruncate(fd, size//2); raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m: m.setattr(states, '_reserve', full); assert 'No space left on device' in refused()
    assert (entry(tmp_path)/'states.bin').stat().st_size == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try: assert 'File too large' in refused()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    keep_states(backbone, batches, tmp_path); assert few.pairs == N


def test_full_disk_in_the_middle(tmp_path, few, monkeypatch):
    "What is done stays: the next call computes the rest."
    backbone, batches = world(); write = states.KeptStates._write
    def runs_full(self, i, *args):
        if i == 5: raise OSError(errno.ENOSPC, 'No space left on device')
        write(self, i, *args)
    with monkeypatch.context() as m:
        m.setattr(states.KeptStates, '_write', runs_full)
        with pytest.raises(ConfigError, match='No space left on device.*what is done stays'): keep_states(backbone, batches, tmp_path)
    few.pairs = 0; keep_states(backbone, batches, tmp_path)
    assert few.pairs == N - 5*SEGMENT


def test_rest_is_estimated(tmp_path, few, monkeypatch, caplog):
    backbone, batches = world(); seconds = iter([0., 60.])
    monkeypatch.setattr(states.time, 'monotonic', lambda: next(seconds, 99.))
    with caplog.at_level(logging.INFO, 'rlhf_flant5.training.states'): keep_states(backbone, batches, tmp_path)
    first = np.sort(batches.lengths)[::-1][:SEGMENT].sum()
    assert f'about {(batches.lengths.sum() - first)/first:,.1f} minutes are left' in caplog.messages


def test_runs_share_the_entries(results, monkeypatch):
    "Three readouts with three seeds: the first run computes, the others find; the encoder's readout is saved without the decoder it borrowed."
    from rlhf_flant5.models.base import RewardModel
    from rlhf_flant5.train import train
    monkeypatch.setenv('RLHF_FLANT5_CACHE', str(results/'cache')); few = SimpleNamespace(pairs=0); compute = states.first_states
    def counted(backbone, batches, rows, autocast): few.pairs += len(rows); return compute(backbone, batches, rows, autocast)
    monkeypatch.setattr(states, 'first_states', counted); seen = []
    for seed, model in enumerate(('attention_pooled_encoder', 'attention_pooled_decoder', 'decoder_output')):
        s = train(['experiment=toy', f'model={model}', f'seed={seed}', 'model.train_transformer=False', 'data.n_train_data=96', 'data.n_test_data=40', 'training.loop.n_val_data=40',
                   'training.loop.n_epochs=1', 'desc=share', f'index={seed}', 'device_name=cpu', 'sim_man.allow_untracked=true'])
        seen.append(few.pairs); assert s['cached_states']
        model = RewardModel.from_pretrained(s['folder']/'simulation'/'best_model'); row = json.loads((s['folder']/'results'/'test_pairs.jsonl').read_text().splitlines()[0])
        text = {r['id']: r['chosen'] for r in toy_pairs(split='test')}[row['id']]
        assert model.backbone.has_decoder == (seed > 0)
        assert abs(model(**pad_ids(encode(model.tokenizer, [text]), 0)).item() - row['reward_chosen']) < 1e-3   # half precision
    assert seen == [176]*3 and len([*(results/'cache'/'states').iterdir()]) == 3
