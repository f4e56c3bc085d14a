"Bad input: files and settings at random. Each ends in a clean result or in one line that says where; never in a traceback, a hang or a wrong number."
import dataclasses, gzip, json, os, re, signal, sys, time, tracemalloc, types, typing, unicodedata
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
import datasets, pytest
from hypothesis import assume, example, given, strategies as st
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from conftest import examples, program
from rlhf_flant5.config import compose, names, schema
from rlhf_flant5.core import files, hub
from rlhf_flant5.data import pairs
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.config.names import choices
from rlhf_flant5.config.schema import RULES
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.machine import best_device
from rlhf_flant5.core.files import MAX_LINE
from rlhf_flant5.core.hub import resolve_folder
from rlhf_flant5.data.pairs import data_file, encode, load_tokenizer, prepare_splits, read_pairs, read_rows
from rlhf_flant5.data.pairs import tokenize_pairs
from rlhf_flant5.data.toy import toy_tokenizer
from rlhf_flant5.train import main
from rlhf_flant5.training.build import load_data


@pytest.fixture(autouse=True)
def no_hang():
    "A test that hangs is a failure."
    def late(*_): raise AssertionError('hangs')
    old = signal.signal(signal.SIGALRM, late); signal.alarm(int(300*float(os.environ.get('FUZZ_EXAMPLES', 1))))
    yield
    signal.alarm(0); signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope='module', autouse=True)
def tables(tmp_path_factory):
    "The tables of `datasets`, apart from the user's."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('datasets')); datasets.disable_progress_bars()
        yield


def one_line(e, *said):
    "The error's text: one line that a terminal prints, with all of `said` in it."
    text = str(e)
    assert type(e) is ConfigError and text.isprintable() and len(text) < 12_000 and all(s in text for s in said), (text, said)
    return text


# data files

odd = st.sampled_from('\0\ufeff\r\n\t\x0b\x0c\x1b\x1c\x1e\x7f\x85\xa0\xad\u2028\u2029\u200b\u202e\ud800\udbff\udc00\udfff\uffff\U0010ffff"\\/{}[]:,</>＜／＞ａﬁ½①ſ')
text = st.text(st.one_of(odd, st.characters(), st.characters(categories=['Cs', 'Cc', 'Cf', 'Co', 'Cn', 'Zs', 'Mn', 'So'])), max_size=12)
spoken = st.one_of(text, st.sampled_from(['</s>', 'a <pad> b', '<extra_id_0>', '＜/s＞', '<unk>', '\n\nHuman: again', 'Human:', ' ', '']))
dialogue = st.builds('\n\nHuman: {}\n\nAssistant: {}'.format, spoken, spoken)
value = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.just(10**5000)), lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
row = st.one_of(st.builds(dict, chosen=dialogue, rejected=dialogue), st.builds(lambda c, r, more: dict(more, chosen=c, rejected=r), dialogue, dialogue, st.dictionaries(text, value, max_size=3)))


@st.composite
def as_json(draw, of):
    "Bytes of a row: escaped or not, spaced or not; a surrogate's half as \\ud800 or as three raw bytes."
    sys.set_int_max_str_digits(0)
    try: s = json.dumps(draw(of), ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(',', ':'), (', ', ': '), (',\r\t ', '\r:')])))
    finally: sys.set_int_max_str_digits(4300)
    return s.encode('utf-8', 'surrogatepass')


def spoil(draw, line):
    "A byte changed, taken away or put in."
    i, b = draw(st.integers(0, len(line))), draw(st.sampled_from([b'', b'\n', b'\r', b'\0', b'"', b'\\', b'}', b'\xff', b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\xe2\x80\xa8', b'1', b'NaN']) | st.binary(max_size=2))
    return line[:i] + b + line[i + draw(st.integers(0, 2)):]


@st.composite
def lines(draw):
    kind = draw(st.sampled_from(['row']*6 + ['value', 'sides', 'spoiled', 'spoiled', 'twice', 'bytes', 'blank', 'literal']))
    if kind == 'row': return draw(as_json(row))
    if kind == 'value': return draw(as_json(value))
    if kind == 'sides': return draw(as_json(st.dictionaries(st.sampled_from(['chosen', 'rejected', 'Chosen']), dialogue | value, max_size=3)))
    if kind == 'spoiled': return spoil(draw, draw(as_json(row)))
    if kind == 'twice': one = draw(as_json(row)); return one[:-1] + b',' + draw(st.sampled_from([one[1:], b'"chosen": ""}', b'"a": {"b": 1, "b": 1}}']))
    if kind == 'bytes': return draw(st.binary(max_size=20))
    if kind == 'blank': return draw(st.sampled_from([b'', b' ', b'\t\r', b'\x0b\x0c']))
    return draw(st.sampled_from([b'NaN', b'{"chosen": Infinity}', b'null', b'[]', b'{}', b'"', b'1e999', b'9'*5000, b'\xef\xbb\xbf{}', b'{"chosen": "a" "rejected": "b"}', b"{'chosen': 'a'}"]))


content = st.builds(lambda ls, end, last: end.join(ls) + last, st.lists(lines(), max_size=6), st.sampled_from([b'\n', b'\r\n']), st.sampled_from([b'', b'\n', b'\n\n \n']))


def expected(content):
    "What a reader owes: the rows with their line numbers, and the number of the first line that is none (0: there is no row at all)."
    def keys(items): twice.append(len({k for k, _ in items}) < len(items)); return dict(items)
    rows = []
    for n, line in enumerate(content.split(b'\n'), 1):
        if not line.strip(): continue
        twice = []
        try: r = json.loads(str(line, 'utf-8'), object_pairs_hook=keys)
        except (ValueError, RecursionError): return rows, n
        good = isinstance(r, dict) and all(isinstance(t := r.get(k), str) and t.strip() and re.search('\n\n(Human|Assistant):', t) and not any(unicodedata.category(c) == 'Cs' for c in t) for k in ('chosen', 'rejected'))
        if any(twice) or not good: return rows, n
        rows.append((n, r))
    return rows, None if rows else 0


def read(path):
    got = []
    try:
        for item in read_rows(path): got.append(item)
    except ConfigError as e: return got, one_line(e, str(path))
    return got, None


def check_file(path, content):
    (got, error), (rows, bad) = read(path), expected(content)
    assert repr(got) == repr(rows)     # as texts: NaN is not NaN
    if bad is None: assert error is None, error
    else: assert error.startswith(f'{path}:{bad}: ' if bad else f'{path}: no row'), (error, bad)


@examples(300)
@given(content)
def test_plain_files(tmp_path_factory, content):
    "Every row as `json.loads` gives it, with its line's number, or one line that names the first bad one."
    path = tmp_path_factory.getbasetemp()/'plain.jsonl'
    path.write_bytes(content); check_file(path, content)


@examples(100)
@given(content, st.lists(st.integers(0, 400), max_size=3))
def test_packed_files(tmp_path_factory, content, cuts):
    "The same packed, in one member or several, with zeros behind them as tapes have."
    path, cuts = tmp_path_factory.getbasetemp()/'packed.jsonl.gz', [0, *sorted(cuts), None]
    path.write_bytes(b''.join(gzip.compress(content[a:b], 1) for a, b in zip(cuts, cuts[1:])) + bytes(len(cuts) - 2)); check_file(path, content)


three = b''.join(json.dumps(dict(chosen=f'\n\nHuman: {i}\n\nAssistant: é <pad>', rejected=f'\n\nHuman: {i}\n\nAssistant: \u2028 "b"'), ensure_ascii=i == 1).encode() + b'\n' for i in range(3))


@examples(250)
@given(st.data())
def test_spoiled_files(tmp_path_factory, data):
    "A whole file in which a few bytes were changed, lost or put in."
    path, content = tmp_path_factory.getbasetemp()/'spoiled.jsonl', three
    for _ in range(data.draw(st.integers(1, 3))): content = spoil(data.draw, content)
    path.write_bytes(content); check_file(path, content)


@examples(150)
@given(st.sampled_from(['cut', 'flip', 'garbage', 'lost']), st.integers(0, 10**6), st.integers(0, 7), st.binary(min_size=1, max_size=40))
def test_damaged_archives(tmp_path_factory, kind, at, bit, more):
    "An archive that was cut, changed or extended is an error, or gives exactly what was packed."
    path, whole = tmp_path_factory.getbasetemp()/'damaged.jsonl.gz', gzip.compress(three, mtime=0)
    at %= len(whole)
    damaged = dict(cut=whole[:at], flip=whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:], garbage=whole + more, lost=whole[:at] + whole[at + 1:])[kind]
    path.write_bytes(damaged); rows, error = read(path)
    if error is None: assert rows == expected(three)[0] and (kind == 'flip' or kind == 'garbage' and not more.strip(b'\0'))   # a bit of the header's time, or of the stream's last byte, may mean nothing
    elif kind in ('cut', 'garbage'): assert 'cut off or damaged' in error or 'no row' in error


pair = dict(chosen='\n\nHuman: a\n\nAssistant: b', rejected='\n\nHuman: a\n\nAssistant: c c')
whole = json.dumps(pair).encode()
nest = lambda a, b, n=100_000: whole[:-1] + b', "more": ' + a*n + b*n + b'}'


@pytest.mark.parametrize('content, says', [(b'', 'no row'), (b'\n \r\n', 'no row'), (b'['*100_000, ':1: nested too deeply'), (b'{"a":'*100_000, ':1: nested too deeply'),
    (nest(b'[', b']'), ':1: nested too deeply'), (nest(b'{"a":', b'}', 50_000)[:-1], ':1: nested too deeply'), (whole + b'\n' + b'x'*(MAX_LINE + 1), ':2: a line of more than 16 MiB'),
    (whole + b'\n'*1500, ':1002: 1,000 blank lines'), (whole.replace(b'}', b', "chosen": "\\n\\nHuman: b"}'), "'chosen' stands twice"),
    (b'\xef\xbb\xbf' + whole, ':1: not JSON (Unexpected UTF-8 BOM'), (whole.decode().encode('utf-16'), ':1: not UTF-8'), (whole + b'\r' + whole, ':1: not JSON (Extra data'),
    (whole.replace(b'b"', b'\\ud800"'), ':1: chosen holds half of a surrogate'), (whole.replace(b'b"', b'\xed\xa0\x80"'), ':1: not UTF-8'), (whole[:-1] + b', "n": ' + b'9'*5000 + b'}', ':1: not JSON (Exceeds')])
def test_named_files(tmp_path, content, says):
    path = tmp_path/'named.jsonl'; path.write_bytes(content)
    with pytest.raises(ConfigError) as e: [*read_rows(path)]
    one_line(e.value, f'{path}', says)
    (tmp_path/'named.jsonl.gz').write_bytes(gzip.compress(content))
    with pytest.raises(ConfigError) as e: [*read_rows(tmp_path/'named.jsonl.gz')]
    one_line(e.value, says)


def test_a_line_of_many_megabytes_is_read(tmp_path):
    long = dict(pair, chosen=pair['chosen'] + '\u2028 word'*1_500_000)
    (tmp_path/'long.jsonl').write_text(json.dumps(pair) + '\n' + json.dumps(long, ensure_ascii=False) + '\n')
    assert (tmp_path/'long.jsonl').stat().st_size > 12_000_000 and [*read_rows(tmp_path/'long.jsonl')] == [(1, pair), (2, long)]


@pytest.mark.parametrize('byte, says', [(b'\0', 'a line of more than'), (b'\n', 'blank lines'), (b' ', 'a line of more than')])
def test_bombs(tmp_path, byte, says):
    "Four gigabytes in a file of four megabytes: refused at once, in bounded memory."
    (tmp_path/'bomb.jsonl.gz').write_bytes(gzip.compress(byte*2**26, 1)*64); begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=says): [*read_rows(tmp_path/'bomb.jsonl.gz')]
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 4*MAX_LINE and time.monotonic() - begun < 30


def test_no_file_at_all(tmp_path):
    (tmp_path/'folder.jsonl').mkdir(); (tmp_path/'link.jsonl').symlink_to('nowhere'); (tmp_path/'loop.jsonl').symlink_to('loop.jsonl'); (tmp_path/'file').touch()
    for name in ('none.jsonl', 'folder.jsonl', 'link.jsonl', 'loop.jsonl', 'file/x.jsonl', 'none.jsonl.gz', 'n'*300 + '.jsonl'):
        with pytest.raises(ConfigError) as e: [*read_rows(tmp_path/name)]
        one_line(e.value, 'cannot be read')
    for name in ('folder', 'link', 'loop'):
        (tmp_path/name).mkdir(); (tmp_path/f'{name}.jsonl').rename(tmp_path/name/'train.jsonl')
        with pytest.raises(ConfigError) as e: read_pairs(tmp_path, [name], 'train', defaultdict(Counter))
        one_line(e.value, f'{name}/train.jsonl', 'no such file')
    (tmp_path/'both').mkdir(); [(tmp_path/'both'/f'train.jsonl{gz}').touch() for gz in ('', '.gz')]
    with pytest.raises(ConfigError) as e: read_pairs(tmp_path, ['both'], 'train', defaultdict(Counter))
    one_line(e.value, 'two files for one split')


def test_unreadable_file(tmp_path, monkeypatch):
    "No right to read, tried as a refused `open`, since the rights of files do not bind root."
    (tmp_path/'s').mkdir(); (tmp_path/'s'/'train.jsonl').write_bytes(whole)
    def refuse(path, *_, **__): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(files, 'open', refuse, raising=False)
    for call in (lambda: [*read_rows(tmp_path/'s'/'train.jsonl')], lambda: read_pairs(tmp_path, ['s'], 'train', defaultdict(Counter))):
        with pytest.raises(ConfigError) as e: call()
        one_line(e.value, 's/train.jsonl: cannot be read (Permission denied)')


def write(folder, subset, split, content, packed):
    (folder/subset).mkdir(parents=True, exist_ok=True)
    for p in (folder/subset).glob(f'{split}.*'): p.unlink()
    (folder/subset/(f'{split}.jsonl' + '.gz'*packed)).write_bytes(gzip.compress(content, 1) if packed else content)


@examples(30)
@given(st.lists(st.tuples(content, st.booleans()), min_size=1, max_size=2))
@example([(three, True), (whole + b'\n\n' + whole.replace(b'c c"', b'b"'), False)])
def test_folders(tmp_path_factory, files):
    "`read_pairs` gives the rows of all subsets, less those of two equal texts, or names the file of the first bad one."
    folder, counts = tmp_path_factory.getbasetemp()/'folders', defaultdict(Counter)
    for i, (c, packed) in enumerate(files): write(folder, f's{i}', 'train', c, packed)
    wanted = [expected(c) for c, _ in files]
    bad = next((i for i, (_, n) in enumerate(wanted) if n is not None), None)
    rows = [dict(id=f's{i}/train:{n}', subset=f's{i}', chosen=r['chosen'], rejected=r['rejected']) for i, (rs, _) in enumerate(wanted) for n, r in rs]
    try: ds = read_pairs(folder, [f's{i}' for i in range(len(files))], 'train', counts)
    except ConfigError as e:
        if bad is None: assert all(r['chosen'] == r['rejected'] for r in rows); one_line(e, 'no train pair is left')
        else: one_line(e, f's{bad}/train.jsonl')
    else:
        assert bad is None and ds.to_list() == [r for r in rows if r['chosen'] != r['rejected']]
        assert sum(c['read'] for c in counts.values()) == len(rows) == len(ds) + sum(c['equal texts'] for c in counts.values())


# tokens

@pytest.fixture(scope='module')
def tokenizers(t5_tokenizer):
    "The toy world's; one that folds variants of letters and holds its special tokens as pieces; one as T5 is given away."
    tk = Tokenizer(models.Unigram()); tk.pre_tokenizer = pre_tokenizers.Metaspace()
    tk.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(r'\s+'), ' ')])
    extra = [f'<extra_id_{i}>' for i in range(10)]
    tk.train_from_iterator(['\n\nHuman: What ends a text?\n\nAssistant: </s> and <extra_id_0>'], trainers.UnigramTrainer(vocab_size=80, special_tokens=['<pad>', '</s>', '<unk>', *extra], unk_token='<unk>', show_progress=False))
    tk.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    small = PreTrainedTokenizerFast(tokenizer_object=tk, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', additional_special_tokens=extra)
    return [toy_tokenizer(), small, load_tokenizer(str(t5_tokenizer))]


wide = {ord(a): b for a, b in zip('<>/sexp', '＜＞／ｓｅｘｐ')}
marks = st.lists(st.one_of(text, st.builds(lambda t, w: t.translate(w), st.sampled_from(['</s>', '<pad>', '<unk>', '<extra_id_0>', '<extra_id_9>', '</s', 's>', '<', '</s><pad>', '▁</s>']), st.sampled_from([{}, wide]))), max_size=5)


@examples(150)
@given(marks)
@example(['＜/s＞']) 
@example(['</ſ>', '<extra_id_０>'])
def test_no_special_token_inside(tokenizers, parts):
    "Text that spells a special token, in whatever letters, stays text; all other text gets the tokenizer's own ids."
    t = '\n\nHuman: ' + ''.join(parts) + '\n\nAssistant: x'
    assume(not any(unicodedata.category(c) == 'Cs' for c in t))
    for tokenizer in tokenizers:
        ids, plain = encode(tokenizer, [t])[0], tokenizer([t]).input_ids[0]
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        assert ids[-1] == tokenizer.eos_token_id and not special & {*ids[:-1]}, tokenizer.convert_ids_to_tokens(ids)
        if not special & {*plain[:-1]} and '<unk>' not in t: assert ids == plain
        assert encode(tokenizer, ['x', t, 'y'])[1] == ids


pairs_of = st.lists(st.builds(dict, chosen=dialogue, rejected=dialogue).filter(lambda r: not re.search('[\ud800-\udfff]', r['chosen'] + r['rejected'])), min_size=1, max_size=12)


def write_splits(folder, train, test):
    for split, rows in (('train', train), ('test', test)): write(folder, 'a', split, '\n'.join(map(json.dumps, rows)).encode(), split == 'train')


def check_splits(splits, tokenizer, counts, max_tokens, train, test):
    "Every pair of the files is used, with its own tokens, or counted as dropped."
    for split, file in dict(train=train, validation=train, test=test).items():
        for r in splits[split]:
            assert {k: r[k] for k in pair} == file[int(r['id'].split(':')[1]) - 1] and r['chosen_ids'] != r['rejected_ids']
            for k in pair: assert r[f'{k}_ids'] == encode(tokenizer, [r[k]])[0][-max_tokens:]
    for split, rows in (('train', train), ('test', test)):
        c = counts[f'a/{split}']
        used, dropped = (sum(n for k, n in c.items() if f(k)) for f in (lambda k: k.startswith('used'), lambda k: k in ('equal texts', 'equal tokens', 'too long')))
        assert c['read'] == len(rows) == used + dropped
    assert {s: len(d) for s, d in splits.items()} == dict(train=counts['a/train']['used for train'], validation=counts['a/train']['used for validation'], test=counts['a/test']['used for test'])


@examples(20)
@given(pairs_of, pairs_of, st.sampled_from(['drop', 'truncate_left', 'error']), st.sampled_from([8, 12, 16, 10**6]), st.sampled_from([.1, .5, .9]))
def test_from_file_to_splits(tmp_path_factory, tokenizers, train, test, too_long, max_tokens, val_fraction):
    folder, counts = tmp_path_factory.getbasetemp()/'splits', defaultdict(Counter); write_splits(folder, train, test)
    cfg = types.SimpleNamespace(max_tokens=max_tokens, too_long=too_long, val_fraction=val_fraction, seed=1, n_train_data=0, n_test_data=0)
    try: splits = prepare_splits({s: read_pairs(folder, ['a'], s, counts) for s in ('train', 'test')}, tokenizers[0], cfg, 10**6, counts)
    except ConfigError as e: assert re.search(r'pair is left|a/(train|test):\d+: a text of \d+ tokens', one_line(e))
    else: check_splits(splits, tokenizers[0], counts, max_tokens, train, test)


def test_load_data(tmp_path):
    "As the program calls it; and a bad line is told from there too."
    said, counts = '</s> <pad> ＜/s＞ \0 \u2028 \ufeff é'.split(' '), defaultdict(Counter)
    rows = [dict(chosen=f'\n\nHuman: {i}\n\nAssistant: It is a bird. {w}', rejected=f'\n\nHuman: {i}\n\nAssistant: {w}') for i, w in enumerate(said*8)]
    write_splits(tmp_path, rows, rows[:3])
    cfg = load_config([f'data.name="{tmp_path}"', 'data.subdirs=[a]', 'model.transformer_name=toy', 'data.max_tokens=64', 'data.val_fraction=0.4'])
    tokenizer, splits, best = load_data(cfg, counts); check_splits(splits, tokenizer, counts, 64, rows, rows[:3]); assert best is None and len(splits['train']) > 10
    write(tmp_path, 'a', 'test', whole + b'\n[]', False)
    with pytest.raises(ConfigError) as e: load_data(cfg, counts)
    one_line(e.value, f'{tmp_path}/a/test.jsonl:2: a row must be a JSON object')


@pytest.mark.parametrize('too_long', ['drop', 'truncate_left', 'error'])
def test_100_000_tokens(tokenizers, too_long):
    long, counts, tokenizer = dict(pair, id='s/train:2', subset='s', chosen=pair['chosen'] + ' word'*100_000), defaultdict(Counter), tokenizers[0]
    ds, ids = datasets.Dataset.from_list([dict(pair, id='s/train:1', subset='s'), long]), encode(tokenizer, [long['chosen']])[0]
    assert len(ids) > 100_000
    if too_long == 'error':
        with pytest.raises(ConfigError) as e: tokenize_pairs(ds, tokenizer, 512, too_long, 'train', counts)
        one_line(e.value, f's/train:2: a text of {len(ids)} tokens'); return
    out = tokenize_pairs(ds, tokenizer, 512, too_long, 'train', counts)
    if too_long == 'drop': assert out['id'][:] == ['s/train:1'] and counts['s/train'] == {'too long': 1}
    else: assert len(out) == 2 and out[1]['chosen_ids'] == ids[-512:] and not counts['s/train']


# settings

every_key = sorted({k for m in choices('model') for k in compose._keys_with((f'model={m}',))})
misspelt = st.builds(lambda k, i, c: k[:i % len(k)] + c + k[i % len(k) + 1:], st.sampled_from(every_key), st.integers(0, 99), st.sampled_from(['', 'x', '.', '..', ' ', '@', ':', '/', '\0', 'é', '[0]', '=']))
key = st.one_of(st.sampled_from(every_key), st.sampled_from(every_key), misspelt, st.builds('{}{}'.format, st.sampled_from(['+', '~', '++', '.', 'hydra.']), st.sampled_from(every_key)),
                st.sampled_from(['model', 'experiment', 'model@data', 'experiment@_global_', '', 'hydra/launcher', 'defaults', 'seed@x']), st.text(max_size=8))
number = st.one_of(st.integers(-3, 600), st.integers(), st.floats(), st.floats(0, 1), st.sampled_from(['inf', '-inf', 'nan', '1e400', '-0', '0x10', '1_0', '1e-400', '00', '1.', '.5', 10**30, 2**31, 2**32, 2**32 - 1, 65536, '9'*400, '9'*4090])).map(str)
readable = '0 1 2 -1 true false null none yes toy auto drop truncate_left error float16 bf16 fp16 AdamW never batches cpu cuda:99 decoder_output google/flan-t5-small ../x /etc . .. a=b str(1) float(nan) int(3.7) sort([2,1]) [] {} [a] [a,a] [a,../b] [1,2] [64] [0] [[a]] [[1]] [null] [a,null] {a:1} {n_epochs:3} {r:4} {name:[1]} {interval_val:0} "a,b" "" "\n" "é" "\x1b[31m" "\ud800"'.split(' ') + ["' '", '"' + 'é'*300 + '"', 'x'*4000]
odd_ones = '??? ${seed} ${oc.env:HOME} ${oc.decode:1} ${nothing} ${desc} ${ [???] [${seed}] a,b range(1,3) range(0,1000000000) glob(*) choice(a,b) interval(0,1) shuffle(1,2,3) sort(3,1) tag(a,1) int(1e400) int(x) json(1) = == \\ \\, \' " [[[[ {{ : ~ ~/x "a \0'.split(' ') + ['', ' ', '  a  ', '"\\""', 'é', '['*300 + ']'*300, '{a:'*100 + '1' + '}'*100, '('*200, 'x'*100_000]
words, odd_words = st.sampled_from(readable), st.sampled_from(odd_ones)
good_key = st.sampled_from(every_key)
plausible = st.one_of(st.builds('{}={}'.format, good_key, number), st.builds('{}={}'.format, good_key, words), st.builds('{}=[{},{}]'.format, good_key, number, number), st.builds('{}={}'.format, st.sampled_from([k for k in every_key if k.count('.') < 2]), odd_words))
odd_override = st.one_of(st.builds('{}={}'.format, key, st.one_of(number, words, odd_words, st.text(max_size=10), st.lists(number | odd_words, max_size=3).map(lambda v: f'[{",".join(v)}]'), st.text(max_size=8).map(lambda t: f"'{t}'"))),
                         st.text(max_size=10), st.builds('model={}'.format, st.sampled_from(choices('model'))), st.just('experiment=toy'))


def typed(value, kind):
    "Whether a value is of the type that a dataclass names."
    if dataclasses.is_dataclass(kind): return {*value} >= {f.name for f in dataclasses.fields(kind)} and all(typed(value[k], t) for k, t in typing.get_type_hints(kind).items())
    if kind is typing.Any: return not isinstance(value, (dict, list))
    if typing.get_origin(kind) is typing.Union: return any(typed(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is list: return isinstance(value, list) and all(typed(v, typing.get_args(kind)[0]) for v in value)
    return type(value) is kind


def check_settings(overrides):
    try: cfg = load_config(overrides)
    except ConfigError as e: return one_line(e)
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert typed(tree, schema.Config), tree
    model = next(k for k in (schema.FullPooledModelConfig, schema.PooledModelConfig, schema.ModelConfig) if {f.name for f in dataclasses.fields(k)} == {*tree['model']})
    assert typed(tree['model'], model), tree
    for k in names.setting_keys(cfg):
        v = OmegaConf.select(cfg, k)
        for pattern, (ok, _) in RULES.items(): assert not re.fullmatch(pattern, k) or ok(v), (k, v)
        if isinstance(v, int): assert -2**32 < v < 2**32
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(cfg))) == tree       # what a run saves beside its results


@examples(45)
@given(st.lists(plausible, min_size=1, max_size=2), st.sampled_from([[], [], ['experiment=toy'], *([f'model={m}'] for m in choices('model'))]))
@example(['data.subdirs=[[a]]'], [])
@example(['model.readout_additional_layers=[[1]]'], [])
@example(['model.lora=???'], [])
@example(['data.val_fraction=' + '9'*400], [])
def test_settings(overrides, groups):
    "A configuration of the right types that keeps every rule, or one line."
    check_settings(overrides + groups)


@examples(300)
@given(st.lists(odd_override, min_size=1, max_size=2))
@example(["desc='${oc.env:HOME}'"])
@example(['data.subdirs=[${oc.env:HOME}]'])
def test_names_of_settings(overrides):
    "The part before Hydra composes is quick, so it is tried more often."
    try: compose._check_names(overrides)
    except ConfigError as e: one_line(e)
    else: assert all(re.fullmatch(r'[\w.]+=.*', o, re.S) and '${' not in o for o in overrides)


@pytest.mark.parametrize('depth', [30, 60, 90, 120, 2000])
def test_nested_settings(depth):
    "Brackets in brackets, from what Hydra reads to what no stack holds (outside of hypothesis, which makes the stack larger)."
    for value in ('['*depth + ']'*depth, '['*depth, '{a:'*depth + '1' + '}'*depth, 'str('*depth + '1' + ')'*depth): assert check_settings([f'training.token_budget={value}'])


refused = [('data.subdirs=[../x]', 'data.subdirs'), ('data.subdirs=[/etc]', 'data.subdirs'), ('data.subdirs=["a\0b"]', "data.subdirs=['a\\x00b']"), (f'data.subdirs=[.,{"s"*300}]', 'data.subdirs'),
           ('training.optimizer.weight_decay=inf', 'finite'), ('training.loop.n_epoch=3', "did you mean 'training.loop.n_epochs'"), ('desc=${oc.env:HOME}', '${oc.env:HOME}'), ('seed=4294967296', 'below 4,294,967,296'),
           ('desc=../../x', 'desc='), ('desc=/etc/x', 'desc='), ('desc=.', 'desc='), ('desc="two\nlines\0"', 'desc='), ('desc=' + 'x'*300, 'desc='), ('device_name=gpu', 'no such device'),
           ('data.name="\x1b[31m\n"', 'data.name=\\x1b[31m\\n'), ('data.name=' + 'x/'*2000, 'no such folder')]


@pytest.mark.parametrize('setting, says', refused, ids=[s[:30] for s, _ in refused])
def test_program_refuses(results, capsys, setting, says):
    "The program's own `main`: exit code 2, one line on stderr, no run's folder left."
    assert main(['experiment=toy', 'sim_man.allow_untracked=true', 'device_name=cpu', setting]) == 2
    said = capsys.readouterr()
    assert said.out == '' and re.fullmatch(r'error: [^\n]*\n', (tail := said.err.splitlines(True)[-1])) and says in tail and tail[:-1].isprintable(), said
    assert said.err == tail and not [*results.rglob('desc-*')]


def test_program_as_a_process(results):
    done = program('rlhf_flant5.train', 'experiment=toy', 'sim_man.allow_untracked=true', 'desc=../../x')
    assert done.returncode == 2 and done.stdout == '' and re.fullmatch(r'error: [^\n]+\n', done.stderr), done.stderr
    assert not [*results.rglob('*')]


@examples(100)
@given(st.one_of(st.text(max_size=12), st.sampled_from(['', '.', '..', '~', '~x', '~/..', '/', '*', 'a/b/c', 'a--b', 'hf://a/b', 'https://a/b']), st.builds(lambda t, n: t*n, st.sampled_from(['x', 'a/', '../', '~', 'é']), st.integers(1, 5000))))
def test_names_of_folders_and_devices(monkeypatch, name):
    monkeypatch.setattr(hub, '_from_hub', lambda name, key, *_: (_ for _ in ()).throw(ConfigError(f'{key}={name}: not asked')))
    assume('\0' not in name and name)     # refused by the settings
    with pytest.raises(ConfigError) as e: resolve_folder(name, 'data.name', ['no-such-file'], ['no-such-file'], 'dataset')
    one_line(e.value, 'data.name=')
    try: assert best_device(name).type == 'cpu'
    except ConfigError as e: one_line(e, 'device_name=')
