"Kept states where a cell can't go: processes killed or two at once, full disks, whole runs that share an entry."
import errno, json, logging, multiprocessing, os, random, re, resource, shutil, signal, time
from collections import Counter, defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
import numpy as np
import pytest, torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import T5Model
from datasets import Dataset
from rlhf_flant5.training import segments, states
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.batches import PairBatches, pad_ids
from rlhf_flant5.data.tokens import encode, tokenize_pairs
from rlhf_flant5.training.states import keep_states
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer

N, SEGMENT = 200, 16
n_segments = -(-N//SEGMENT)


# --- helpers


def world(n=N):
    "A frozen backbone and pairs of random tokens."
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 500, size=rng.integers(4, 40)).tolist() for _ in range(2*n)]
    pairs = dict(chosen_ids=ids[:n], rejected_ids=ids[n:], id=[*map(str, range(n))], subset=['x']*n)
    backbone = Backbone(toy_transformer(cls=T5Model), train_transformer=False)
    return backbone, PairBatches(Dataset.from_dict(pairs), 0, 8, 512)


def work(folder, notes, slow=0.):
    "Keep the states in a process of its own; `notes` gets what it logs and the first row of each segment it begins."
    torch.set_num_threads(1)
    states.SEGMENT, compute = SEGMENT, states.first_states
    logging.basicConfig(filename=notes, level=logging.INFO, format='%(message)s')

    def noted(backbone, batches, rows, autocast):
        logging.info(f'begins {rows[0]}')
        time.sleep(slow/2)
        out = compute(backbone, batches, rows, autocast)
        time.sleep(slow/2)
        return out

    states.first_states = noted
    backbone, batches = world()
    kept = keep_states(backbone, batches, folder)
    logging.info(f'sum {float(np.asarray(kept.states, np.float64).sum())}')


@pytest.fixture(scope='module')
def spawn():
    "Start `work` in a process of its own; the modules are imported once, by the server that forks them."
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['rlhf_flant5.training.states', 'rlhf_flant5.data.toy'])
    def start(*args):
        p = processes.Process(target=work, args=args)
        p.start()
        return p
    return start


def count_pairs(monkeypatch):
    "A counter of the pairs that pass through the backbone from now on."
    count, compute = SimpleNamespace(pairs=0), states.first_states
    def counted(backbone, batches, rows, autocast):
        count.pairs += len(rows)
        return compute(backbone, batches, rows, autocast)
    monkeypatch.setattr(states, 'first_states', counted)
    return count


@pytest.fixture
def few(monkeypatch):
    "Small segments; counts the pairs that pass through the backbone."
    monkeypatch.setattr(states, 'SEGMENT', SEGMENT)
    return count_pairs(monkeypatch)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, 'rlhf_flant5.training.states')
    return caplog


def begun(notes):
    "The first row of each segment that was begun, as often as it was."
    return re.findall(r'^begins (\d+)$', notes.read_text(), re.M) if notes.exists() else []


def entry(folder): return next(folder.glob('states/*'))
def segment(folder, i): return folder/f'segment-{i:05}.safetensors'
def files_there(folder): return {p.name: p.read_bytes() for p in folder.glob('states/*/segment-*')}


# --- kills, and several processes


def kill_at_random(process, notes, n_before, rng, in_the_pass):
    "Kill a process, perhaps before its pass, or after it has begun another segment."
    if in_the_pass:
        end = time.monotonic() + 60
        while process.is_alive() and len(begun(notes)) == n_before and time.monotonic() < end: time.sleep(.001)
    process.join(rng.uniform(0, .2 if in_the_pass else .3))
    process.kill()
    process.join()


def test_kills_cost_time_only(tmp_path, spawn):
    """Processes killed at random moments, then one left alone: the bytes of an unbroken pass,
    no segment that was there begun again."""
    whole, broken, notes = tmp_path/'whole', tmp_path/'broken', tmp_path/'notes'
    p = spawn(whole, tmp_path/'unbroken')
    p.join(60)
    assert p.exitcode == 0

    first_rows = np.argsort(-world()[1].lengths, kind='stable')[::SEGMENT]
    name_of = {str(row): segment(broken, i).name for i, row in enumerate(first_rows)}
    rng, kills = random.Random(1), 0
    for attempt in range(40):
        before, n = files_there(broken), len(begun(notes))
        p = spawn(broken, notes, .02)
        kill_at_random(p, notes, n, rng, in_the_pass=attempt % 3)
        assert not before.keys() & {name_of[row] for row in begun(notes)[n:]}
        assert before.items() <= files_there(broken).items()
        assert p.exitcode in (0, -signal.SIGKILL)      # any other end is a crash
        kills += p.exitcode != 0
        if p.exitcode == 0: break

    assert p.exitcode == 0 and kills >= 4
    assert files_there(broken) == files_there(whole)
    assert len(files_there(broken)) == n_segments
    half_written = {p.name for p in entry(broken).iterdir()} - {*files_there(broken), 'lock'}
    assert not half_written
    print(f'{kills} kills, {len(begun(notes))} segments begun of {n_segments}')


def test_two_processes_compute_once(tmp_path, spawn):
    notes = tmp_path/'notes'
    both = [spawn(tmp_path, notes, .02) for _ in range(2)]
    for p in both: p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    text = notes.read_text()
    assert len(begun(notes)) == len({*begun(notes)}) == n_segments
    assert text.count('another process computes these states; waiting for it') == 1
    assert text.count('states kept: ') == 1
    assert len({*re.findall(r'^sum .*$', text, re.M)}) == 1


# --- what an entry depends on


def toy_batches(pairs, max_tokens=128):
    rows = tokenize_pairs(pairs, toy_tokenizer(), max_tokens, 'truncate_left', 'train', defaultdict(Counter))
    return PairBatches(rows, 0, 8, 512)


def toy_backbone(**changes): return Backbone(toy_transformer(cls=T5Model, **changes), train_transformer=False)


def test_what_makes_another_entry(tmp_path):
    pairs = toy_pairs(12, seed=2)
    one_text = pairs.map(lambda row, i: dict(chosen=row['chosen'] + ' Yes.'*(i == 7)), with_indices=True)
    another_order = pairs.select([*range(1, 12), 0])
    half_precision = dict(autocast=lambda: torch.autocast('cpu', torch.bfloat16), precision='bf16')
    plain, batches = toy_backbone(), toy_batches(pairs)
    entries = dict(plain=keep_states(plain, batches, tmp_path),
                   text=keep_states(plain, toy_batches(one_text), tmp_path),
                   order=keep_states(plain, toy_batches(another_order), tmp_path),
                   max_tokens=keep_states(plain, toy_batches(pairs, 20), tmp_path),
                   weights=keep_states(toy_backbone(seed=1), batches, tmp_path),
                   architecture=keep_states(toy_backbone(layer_norm_epsilon=1e-5), batches, tmp_path),
                   dtype=keep_states(plain, batches, tmp_path, 'float32'),
                   precision=keep_states(plain, batches, tmp_path, **half_precision))
    n_folders = len({*(tmp_path/'states').iterdir()})
    assert len({e.key for e in entries.values()}) == n_folders == len(entries)
    assert keep_states(toy_backbone(dropout_rate=.3), batches, tmp_path).key == entries['plain'].key

    numbers = {k: np.asarray(entries[k].states, np.float32) for k in ('plain', 'dtype', 'precision')}
    assert 0 < abs(numbers['precision'] - numbers['plain']).max() < .2
    assert abs(numbers['dtype'] - numbers['plain']).max() < 2e-3


# --- damage


def flip_byte(path, at):
    "Change a byte of a file; `at` counts from the end if it is negative."
    with open(path, 'r+b') as f:
        f.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 16]))

def flipped_byte(folder): flip_byte(segment(folder, 3), -777)
def flipped_header(folder): flip_byte(segment(folder, 3), 30)
def flipped_header_size(folder): flip_byte(segment(folder, 3), 7)
def half_a_file(folder): os.truncate(segment(folder, 3), segment(folder, 3).stat().st_size//2)
def empty_file(folder): os.truncate(segment(folder, 3), 0)
def longer_file(folder): os.truncate(segment(folder, 3), segment(folder, 3).stat().st_size + 5)
def no_file(folder): segment(folder, 3).unlink()
def no_files(folder): shutil.rmtree(folder)
def another_segment(folder): shutil.copy(segment(folder, 2), segment(folder, 3))
def text_file(folder): segment(folder, 3).write_text('no numbers')

def rewrite(folder, tensors, origin=lambda origin: origin):
    "Segment 3 as something else would write it: other numbers, or another header."
    with safe_open(segment(folder, 3), 'np') as f: header = json.loads(f.metadata()['origin'])
    metadata = dict(origin=json.dumps(origin(header), sort_keys=True))
    save_file(tensors(load_file(segment(folder, 3))), segment(folder, 3), metadata)

def another_key(origin): return origin | dict(entry=origin['entry'] | dict(tokens='0'*64))
def another_name(folder): rewrite(folder, lambda tensors: dict(numbers=tensors['states']))
def another_type(folder): rewrite(folder, lambda tensors: dict(states=tensors['states'].view(np.int16)))
def another_shape(folder): rewrite(folder, lambda tensors: dict(states=tensors['states'].reshape(-1, 4)))
def another_entry(folder): rewrite(folder, lambda tensors: tensors, another_key)
def another_checksum(folder): rewrite(folder, lambda tensors: tensors, lambda origin: origin | dict(crc32=1))

ONE_SEGMENT = [flipped_byte, flipped_header, flipped_header_size, half_a_file, empty_file, longer_file, no_file, text_file,
               another_segment, another_name, another_type, another_shape, another_entry, another_checksum]
DAMAGE = dict.fromkeys(ONE_SEGMENT, 1)
DAMAGE[no_files] = n_segments


@pytest.mark.parametrize('damage, n_again', DAMAGE.items(), ids=[f.__name__ for f in DAMAGE])
def test_damage_is_mended(tmp_path, few, logged, damage, n_again):
    "What is damaged is reported in one line and computed again; nothing damaged is served."
    backbone, batches = world()
    want = np.asarray(keep_states(backbone, batches, tmp_path).states)
    whole = files_there(tmp_path)
    damage(entry(tmp_path))
    few.pairs = 0
    logged.clear()

    kept = keep_states(backbone, batches, tmp_path)
    assert (np.asarray(kept.states) == want).all() and files_there(tmp_path) == whole
    assert -(-few.pairs//SEGMENT) == n_again
    assert sum('damaged' in m or 'to compute' in m for m in logged.messages) == 1
    few.pairs = 0
    keep_states(backbone, batches, tmp_path)
    assert few.pairs == 0


# --- caches that can only be read


@pytest.fixture
def read_only(monkeypatch):
    "The cache lies on a mount that can only be read: whatever is written, made or locked there is refused."
    def refuse(*_, **__): raise OSError(errno.EROFS, 'Read-only file system')
    def begin():
        monkeypatch.setattr(os, 'access', lambda path, mode: not mode & os.W_OK)
        monkeypatch.setattr(states.Path, 'mkdir', refuse)
        monkeypatch.setattr(segments, 'write_file', refuse)
        for name in ('remove_leftovers', 'FileLock'): monkeypatch.setattr(states, name, refuse)
    return begin


def test_a_whole_entry_of_a_read_only_cache_is_used(tmp_path, few, logged, read_only):
    backbone, batches = world()
    want = np.asarray(keep_states(backbone, batches, tmp_path).states)
    few.pairs = 0
    read_only()
    kept = keep_states(backbone, batches, tmp_path)
    assert (np.asarray(kept.states) == want).all()
    assert few.pairs == 0 and 'states kept: ' in logged.text


@pytest.mark.parametrize('damage', [flipped_byte, half_a_file, no_file, no_files])
def test_half_an_entry_of_a_read_only_cache_is_refused(tmp_path, few, read_only, damage):
    backbone, batches = world()
    keep_states(backbone, batches, tmp_path)
    damage(entry(tmp_path))
    few.pairs = 0
    read_only()
    remedy = 'cannot be kept here .Read-only file system.; make room, or set RLHF_FLANT5_CACHE'
    with pytest.raises(ConfigError, match=remedy): keep_states(backbone, batches, tmp_path)
    assert few.pairs == 0


# --- full disks


def refusal(backbone, batches, folder) -> str:
    "The line in which the states are refused."
    with pytest.raises(ConfigError) as e: keep_states(backbone, batches, folder)
    line = str(e.value)
    assert '\n' not in line and str(folder) in line and 'RLHF_FLANT5_CACHE' in line
    return line


@contextmanager
def largest_file(nbytes):
    "No file of this process may grow beyond `nbytes`; the kernel refuses."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_before_any_work(tmp_path, few, monkeypatch):
    backbone, batches = world()
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=50_000))
        assert '0.0 MiB are free' in refusal(backbone, batches, tmp_path)
    assert few.pairs == 0 and not files_there(tmp_path)
    keep_states(backbone, batches, tmp_path)
    assert few.pairs == N


def test_what_the_kernel_refuses(tmp_path, few):
    "One line after the first segment, and nothing half-written is left."
    backbone, batches = world()
    with largest_file(5_000): assert 'File too large' in refusal(backbone, batches, tmp_path)
    assert few.pairs == SEGMENT and [p.name for p in entry(tmp_path).iterdir()] == ['lock']
    few.pairs = 0
    keep_states(backbone, batches, tmp_path)
    assert few.pairs == N


def test_full_disk_in_the_middle(tmp_path, few, monkeypatch):
    "What is done stays: the next call computes the rest."
    backbone, batches = world()
    write = states.KeptStates.write_segment
    def runs_full(self, i, *args):
        if i == 5: raise OSError(errno.ENOSPC, 'No space left on device')
        write(self, i, *args)
    with monkeypatch.context() as m:
        m.setattr(states.KeptStates, 'write_segment', runs_full)
        with pytest.raises(ConfigError, match='No space left on device.*what is done stays'):
            keep_states(backbone, batches, tmp_path)
    few.pairs = 0
    keep_states(backbone, batches, tmp_path)
    assert few.pairs == N - 5*SEGMENT


def test_room_for_the_rest_is_enough(tmp_path, few, monkeypatch):
    "Of an entry that is there but for a segment, the room of that segment is asked for."
    backbone, batches = world()
    keep_states(backbone, batches, tmp_path)
    no_file(entry(tmp_path))
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=SEGMENT*512))
    keep_states(backbone, batches, tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=SEGMENT*512 - 1))
    no_file(entry(tmp_path))
    assert 'MiB are free' in refusal(backbone, batches, tmp_path)


# --- whole passes and whole runs


def test_rest_is_estimated(tmp_path, few, monkeypatch, logged):
    backbone, batches = world()
    seconds = iter([0., 60.])
    monkeypatch.setattr(states.time, 'monotonic', lambda: next(seconds, 99.))
    keep_states(backbone, batches, tmp_path)
    first = np.sort(batches.lengths)[::-1][:SEGMENT].sum()
    assert f'about {(batches.lengths.sum() - first)/first:,.1f} minutes are left' in logged.messages


def test_maps_hold_no_file_open(tmp_path, few):
    "An entry of many segments does not use up the files that a process may open; a row is what a pass gives."
    backbone, batches = world()
    kept = keep_states(backbone, batches, tmp_path)
    n_open = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else None
    assert len(kept.states.maps) == n_segments
    if n_open: assert len(os.listdir('/proc/self/fd')) == n_open
    rows = np.array([7, 7, 199, 0])
    want = states.first_states(backbone, batches, rows, None)
    assert abs(kept.states[rows] - want).max() < 5e-3
    assert (kept.encoder[rows] == kept.states[rows][:, :, :2]).all()
    assert (kept.decoder[rows] == kept.states[rows][:, :, 2:]).all()


def shared_run(model, seed):
    from rlhf_flant5.training.pipeline import train_run
    settings = ['experiment=toy', f'model={model}', f'seed={seed}', 'model.train_transformer=False',
                'data.n_train_data=96', 'data.n_test_data=40', 'training.loop.n_val_data=40',
                'training.loop.n_epochs=1', 'desc=share', f'index={seed}', 'device_name=cpu',
                'sim_man.allow_untracked=true']
    return train_run(settings)


def first_test_row(run):
    with open(run['folder']/'results'/'test_pairs.jsonl') as f: return json.loads(f.readline())


def test_runs_share_the_entries(results, monkeypatch):
    """Three readouts with three seeds: the first run computes, the others find.
    The encoder's readout is saved without the decoder it borrowed."""
    from rlhf_flant5.models.base import RewardModel
    monkeypatch.setenv('RLHF_FLANT5_CACHE', str(results/'cache'))
    count = count_pairs(monkeypatch)
    chosen = {row['id']: row['chosen'] for row in toy_pairs(split='test')}
    n_computed = []
    for seed, name in enumerate(('attention_pooled_encoder', 'attention_pooled_decoder', 'decoder_output')):
        run = shared_run(name, seed)
        n_computed.append(count.pairs)
        assert run['cached_states']
        model = RewardModel.from_pretrained(run['folder']/'simulation'/'best_model')
        assert model.backbone.has_decoder == (name != 'attention_pooled_encoder')
        row = first_test_row(run)
        batch = pad_ids(encode(model.tokenizer, [chosen[row['id']]]), 0)
        assert abs(model(**batch).item() - row['reward_chosen']) < 1e-3   # half precision
    assert n_computed == [176]*3
    assert len([*(results/'cache'/'states').iterdir()]) == 3
