"""Bad input: files and settings at random.
Each ends in a clean result or in one line that says where; never in a traceback, a hang or a wrong number."""
import dataclasses, gzip, json, os, re, signal, sys, time, tracemalloc, types, typing, unicodedata
from collections import Counter, defaultdict
import datasets, pytest
from hypothesis import assume, example, given, strategies as st
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from conftest import examples, program
from rlhf_flant5.config import compose, names, schema
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.config.names import choices
from rlhf_flant5.config.schema import RULES
from rlhf_flant5.core import files, hub
from rlhf_flant5.core.files import MAX_LINE, ConfigError, RowError
from rlhf_flant5.core.hub import resolve_folder
from rlhf_flant5.core.machine import best_device
from rlhf_flant5.data.pairs import read_pairs, read_rows
from rlhf_flant5.data.tokens import encode, load_tokenizer, prepare_splits, tokenize_pairs
from rlhf_flant5.data.toy import toy_tokenizer
from rlhf_flant5.train import main
from rlhf_flant5.training.build import load_data


@pytest.fixture(autouse=True)
def no_hang():
    "A test that hangs is a failure."
    def late(*_): raise AssertionError('hangs')
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(300*float(os.environ.get('FUZZ_EXAMPLES', 1))))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope='module', autouse=True)
def tables(tmp_path_factory):
    "The tables of `datasets`, apart from the user's."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('datasets'))
        datasets.disable_progress_bars()
        yield


def one_line(e, *parts):
    "The error's text: one line that a terminal prints, with all of `parts` in it."
    text = str(e)
    assert type(e) in (ConfigError, RowError)
    assert text.isprintable() and len(text) < 12_000, text
    assert all(part in text for part in parts), (text, parts)
    return text


def refusal(call, *parts):
    "The one line with which a call is refused."
    with pytest.raises(ConfigError) as e: call()
    return one_line(e.value, *parts)


# data files

odd = st.sampled_from(
    '\0\ufeff\r\n\t\x0b\x0c\x1b\x1c\x1e\x7f\x85\xa0\xad\u2028\u2029\u200b\u202e'
    '\ud800\udbff\udc00\udfff\uffff\U0010ffff"\\/{}[]:,</>＜／＞ａﬁ½①ſ')
odd_kinds = st.characters(categories=['Cs', 'Cc', 'Cf', 'Co', 'Cn', 'Zs', 'Mn', 'So'])
text = st.text(st.one_of(odd, st.characters(), odd_kinds), max_size=12)
marks = ['</s>', 'a <pad> b', '<extra_id_0>', '＜/s＞', '<unk>', '\n\nHuman: again', 'Human:', ' ', '']
spoken = st.one_of(text, st.sampled_from(marks))
dialogue = st.builds('\n\nHuman: {}\n\nAssistant: {}'.format, spoken, spoken)

leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.just(10**5000))
value = st.recursive(
    leaf, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
plain_row = st.builds(dict, chosen=dialogue, rejected=dialogue)
rich_row = st.builds(lambda chosen, rejected, more: dict(more, chosen=chosen, rejected=rejected),
                     dialogue, dialogue, st.dictionaries(text, value, max_size=3))
row = st.one_of(plain_row, rich_row)
some_sides = st.dictionaries(st.sampled_from(['chosen', 'rejected', 'Chosen']), dialogue | value, max_size=3)


@st.composite
def as_json(draw, of):
    "Bytes of a row: escaped or not, spaced or not; a surrogate's half as \\ud800 or as three raw bytes."
    separators = st.sampled_from([(',', ':'), (', ', ': '), (',\r\t ', '\r:')])
    sys.set_int_max_str_digits(0)
    try: s = json.dumps(draw(of), ensure_ascii=draw(st.booleans()), separators=draw(separators))
    finally: sys.set_int_max_str_digits(4300)
    return s.encode('utf-8', 'surrogatepass')


spoilers = st.sampled_from([
    b'', b'\n', b'\r', b'\0', b'"', b'\\', b'}', b'\xff',
    b'\xed\xa0\x80', b'\xef\xbb\xbf', b'\xe2\x80\xa8', b'1', b'NaN']) | st.binary(max_size=2)


def spoil(draw, line):
    "A byte changed, taken away or put in."
    i, put_in, n_lost = draw(st.integers(0, len(line))), draw(spoilers), draw(st.integers(0, 2))
    return line[:i] + put_in + line[i + n_lost:]


@st.composite
def spoiled(draw): return spoil(draw, draw(as_json(row)))


@st.composite
def keys_twice(draw):
    one = draw(as_json(row))
    again = draw(st.sampled_from([one[1:], b'"chosen": ""}', b'"a": {"b": 1, "b": 1}}']))
    return one[:-1] + b',' + again


LINES = dict(
    row=as_json(row),
    value=as_json(value),
    sides=as_json(some_sides),
    spoiled=spoiled(),
    twice=keys_twice(),
    bytes=st.binary(max_size=20),
    blank=st.sampled_from([b'', b' ', b'\t\r', b'\x0b\x0c']),
    literal=st.sampled_from([
        b'NaN', b'{"chosen": Infinity}', b'null', b'[]', b'{}', b'"', b'1e999', b'9'*5000,
        b'\xef\xbb\xbf{}', b'{"chosen": "a" "rejected": "b"}', b"{'chosen': 'a'}"]))


@st.composite
def lines(draw):
    kind = draw(st.sampled_from(['row']*6 + ['spoiled'] + [*LINES][1:]))
    return draw(LINES[kind])


content = st.builds(
    lambda lines, end, last: end.join(lines) + last,
    st.lists(lines(), max_size=6), st.sampled_from([b'\n', b'\r\n']), st.sampled_from([b'', b'\n', b'\n\n \n']))


def is_dialogue(t):
    if not isinstance(t, str) or not t.strip(): return False
    has_half = any(unicodedata.category(c) == 'Cs' for c in t)
    return bool(re.search('\n\n(Human|Assistant):', t)) and not has_half


def expected(content):
    """What a reader owes: the rows with their line numbers, and the number of the first line that is none
    (0: there is no row at all)."""
    rows = []
    for n, line in enumerate(content.split(b'\n'), 1):
        if not line.strip(): continue
        twice = []

        def note_keys(items):
            twice.append(len({k for k, _ in items}) < len(items))
            return dict(items)
        try: r = json.loads(str(line, 'utf-8'), object_pairs_hook=note_keys)
        except (ValueError, RecursionError): return rows, n
        is_pair = isinstance(r, dict) and is_dialogue(r.get('chosen')) and is_dialogue(r.get('rejected'))
        if any(twice) or not is_pair: return rows, n
        rows.append((n, r))
    return rows, None if rows else 0


def read(path):
    "The rows before the first bad one, and the line that names it."
    got = []
    try:
        for item in read_rows(path): got.append(item)
    except ConfigError as e: return got, one_line(e, str(path))
    return got, None


def check_file(path, content):
    (got, error), (rows, bad) = read(path), expected(content)
    assert repr(got) == repr(rows)     # as texts: NaN is not NaN
    if bad is None: assert error is None, error
    elif bad == 0: assert error.startswith(f'{path}: no row'), error
    else: assert error.startswith(f'{path}:{bad}: '), (error, bad)


@examples(300)
@given(content)
def test_plain_files(tmp_path_factory, content):
    "Every row as `json.loads` gives it, with its line's number, or one line that names the first bad one."
    path = tmp_path_factory.getbasetemp()/'plain.jsonl'
    path.write_bytes(content)
    check_file(path, content)


@examples(100)
@given(content, st.lists(st.integers(0, 400), max_size=3))
def test_packed_files(tmp_path_factory, content, cuts):
    "The same packed, in one member or several, with zeros behind them as tapes have."
    path = tmp_path_factory.getbasetemp()/'packed.jsonl.gz'
    cuts = [0, *sorted(cuts), None]
    members = [gzip.compress(content[a:b], 1) for a, b in zip(cuts, cuts[1:])]
    path.write_bytes(b''.join(members) + bytes(len(cuts) - 2))
    check_file(path, content)


def numbered(i):
    pair = dict(chosen=f'\n\nHuman: {i}\n\nAssistant: é <pad>', rejected=f'\n\nHuman: {i}\n\nAssistant: \u2028 "b"')
    return json.dumps(pair, ensure_ascii=i == 1).encode() + b'\n'


three = b''.join(map(numbered, range(3)))


@examples(250)
@given(st.data())
def test_spoiled_files(tmp_path_factory, data):
    "A whole file in which a few bytes were changed, lost or put in."
    path, content = tmp_path_factory.getbasetemp()/'spoiled.jsonl', three
    for _ in range(data.draw(st.integers(1, 3))): content = spoil(data.draw, content)
    path.write_bytes(content)
    check_file(path, content)


@examples(150)
@given(st.sampled_from(['cut', 'flip', 'garbage', 'lost']), st.integers(0, 10**6), st.integers(0, 7),
       st.binary(min_size=1, max_size=40))
def test_damaged_archives(tmp_path_factory, kind, at, bit, more):
    "An archive that was cut, changed or extended is an error, or gives exactly what was packed."
    path, whole = tmp_path_factory.getbasetemp()/'damaged.jsonl.gz', gzip.compress(three, mtime=0)
    at %= len(whole)
    flipped = bytes([whole[at] ^ 1 << bit])
    damaged = dict(
        cut=whole[:at],
        flip=whole[:at] + flipped + whole[at + 1:],
        garbage=whole + more,
        lost=whole[:at] + whole[at + 1:])
    path.write_bytes(damaged[kind])
    rows, error = read(path)
    if error is None:
        # a bit of the header's time, or of the stream's last byte, may mean nothing; and so may zeros
        assert rows == expected(three)[0]
        assert kind == 'flip' or kind == 'garbage' and not more.strip(b'\0')
    elif kind in ('cut', 'garbage'):
        assert 'cut off or damaged' in error or 'no row' in error


pair = dict(chosen='\n\nHuman: a\n\nAssistant: b', rejected='\n\nHuman: a\n\nAssistant: c c')
whole = json.dumps(pair).encode()


def nest(opening, closing, n=100_000): return whole[:-1] + b', "more": ' + opening*n + closing*n + b'}'
def answer_b(b): return whole.replace(b'b"', b)          # the chosen answer ends so


named = {
    'nothing': (b'', 'no row'),
    'blank lines': (b'\n \r\n', 'no row'),
    'open lists': (b'['*100_000, ':1: nested too deeply'),
    'open objects': (b'{"a":'*100_000, ':1: nested too deeply'),
    'nested lists': (nest(b'[', b']'), ':1: nested too deeply'),
    'nested objects': (nest(b'{"a":', b'}', 50_000)[:-1], ':1: nested too deeply'),
    'long line': (whole + b'\n' + b'x'*(MAX_LINE + 1), ':2: a line of more than 16 MiB'),
    'many blank lines': (whole + b'\n'*1500, ':1002: 1,000 blank lines'),
    'a key twice': (whole.replace(b'}', b', "chosen": "\\n\\nHuman: b"}'), "'chosen' stands twice"),
    'byte order mark': (b'\xef\xbb\xbf' + whole, ':1: not JSON (Unexpected UTF-8 BOM'),
    'utf-16': (whole.decode().encode('utf-16'), ':1: not UTF-8'),
    'carriage return': (whole + b'\r' + whole, ':1: not JSON (Extra data'),
    'escaped surrogate': (answer_b(b'\\ud800"'), ':1: chosen holds half of a surrogate'),
    'raw surrogate': (answer_b(b'\xed\xa0\x80"'), ':1: not UTF-8'),
    'long number': (whole[:-1] + b', "n": ' + b'9'*5000 + b'}', ':1: not JSON (Exceeds')}


@pytest.mark.parametrize('content, message', named.values(), ids=[*named])
def test_named_files(tmp_path, content, message):
    path = tmp_path/'named.jsonl'
    path.write_bytes(content)
    refusal(lambda: [*read_rows(path)], f'{path}', message)
    packed = tmp_path/'named.jsonl.gz'
    packed.write_bytes(gzip.compress(content))
    refusal(lambda: [*read_rows(packed)], message)


def test_a_line_of_many_megabytes_is_read(tmp_path):
    path = tmp_path/'long.jsonl'
    long = dict(pair, chosen=pair['chosen'] + '\u2028 word'*1_500_000)
    path.write_text(json.dumps(pair) + '\n' + json.dumps(long, ensure_ascii=False) + '\n')
    assert path.stat().st_size > 12_000_000
    assert [*read_rows(path)] == [(1, pair), (2, long)]


@pytest.mark.parametrize('byte, message', [
    pytest.param(b'\0', 'a line of more than', id='zeros'),
    pytest.param(b'\n', 'blank lines', id='line ends'),
    pytest.param(b' ', 'a line of more than', id='spaces')])
def test_bombs(tmp_path, byte, message):
    "Four gigabytes in a file of four megabytes: refused at once, in bounded memory."
    path = tmp_path/'bomb.jsonl.gz'
    path.write_bytes(gzip.compress(byte*2**26, 1)*64)
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message): [*read_rows(path)]
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 4*MAX_LINE
    assert time.monotonic() - begun < 30


def read_subset(folder, subset): return read_pairs(folder, [subset], 'train', defaultdict(Counter))


def test_no_file_at_all(tmp_path):
    (tmp_path/'folder.jsonl').mkdir()
    (tmp_path/'link.jsonl').symlink_to('nowhere')
    (tmp_path/'loop.jsonl').symlink_to('loop.jsonl')
    (tmp_path/'file').touch()
    absent = ['none.jsonl', 'file/x.jsonl', 'none.jsonl.gz', 'n'*300 + '.jsonl']
    for name in ('folder.jsonl', 'link.jsonl', 'loop.jsonl', *absent):
        refusal(lambda: [*read_rows(tmp_path/name)], 'cannot be read')

    for name in ('folder', 'link', 'loop'):
        (tmp_path/name).mkdir()
        (tmp_path/f'{name}.jsonl').rename(tmp_path/name/'train.jsonl')
        refusal(lambda: read_subset(tmp_path, name), f'{name}/train.jsonl', 'no such file')


def test_two_files_for_one_split(tmp_path):
    (tmp_path/'both').mkdir()
    for name in ('train.jsonl', 'train.jsonl.gz'): (tmp_path/'both'/name).touch()
    refusal(lambda: read_subset(tmp_path, 'both'), 'two files for one split')


def test_unreadable_file(tmp_path, monkeypatch):
    "No right to read, tried as a refused `open`, since the rights of files do not bind root."
    path = tmp_path/'s'/'train.jsonl'
    path.parent.mkdir()
    path.write_bytes(whole)
    def refuse(path, *_, **__): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(files, 'open', refuse, raising=False)
    message = 's/train.jsonl: cannot be read (Permission denied)'
    refusal(lambda: [*read_rows(path)], message)
    refusal(lambda: read_subset(tmp_path, 's'), message)


def write(folder, subset, split, content, packed):
    (folder/subset).mkdir(parents=True, exist_ok=True)
    for p in (folder/subset).glob(f'{split}.*'): p.unlink()
    name = f'{split}.jsonl.gz' if packed else f'{split}.jsonl'
    (folder/subset/name).write_bytes(gzip.compress(content, 1) if packed else content)


@examples(30)
@given(st.lists(st.tuples(content, st.booleans()), min_size=1, max_size=2))
@example([(three, True), (whole + b'\n\n' + whole.replace(b'c c"', b'b"'), False)])
def test_folders(tmp_path_factory, files):
    "`read_pairs` gives the rows of all subsets, less those of two equal texts, or names the file of the first bad one."
    folder, counts = tmp_path_factory.getbasetemp()/'folders', defaultdict(Counter)
    rows, bad = [], None                         # of all files; the first file with a bad line
    for i, (content, packed) in enumerate(files):
        write(folder, f's{i}', 'train', content, packed)
        good, bad_line = expected(content)
        if bad_line is not None and bad is None: bad = i
        for n, r in good:
            rows.append(dict(id=f's{i}/train:{n}', subset=f's{i}', chosen=r['chosen'], rejected=r['rejected']))
    different = [r for r in rows if r['chosen'] != r['rejected']]

    try: ds = read_pairs(folder, [f's{i}' for i in range(len(files))], 'train', counts)
    except ConfigError as e:
        if bad is not None:
            one_line(e, f's{bad}/train.jsonl')
        else:
            assert not different
            one_line(e, 'no train pair is left')
    else:
        assert bad is None
        assert ds.to_list() == different
        assert sum(c['read'] for c in counts.values()) == len(rows)
        assert sum(c['equal texts'] for c in counts.values()) == len(rows) - len(ds)


# tokens

def folding_tokenizer():
    "Folds variants of letters and holds its special tokens as pieces."
    extra = [f'<extra_id_{i}>' for i in range(10)]
    tk = Tokenizer(models.Unigram())
    tk.pre_tokenizer = pre_tokenizers.Metaspace()
    tk.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(r'\s+'), ' ')])
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=['<pad>', '</s>', '<unk>', *extra], unk_token='<unk>', show_progress=False)
    tk.train_from_iterator(['\n\nHuman: What ends a text?\n\nAssistant: </s> and <extra_id_0>'], trainer)
    tk.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tk, pad_token='<pad>', eos_token='</s>', unk_token='<unk>',
                                   additional_special_tokens=extra)


@pytest.fixture(scope='module')
def tokenizers(t5_tokenizer):
    "The toy world's; one whose special tokens are pieces; one as T5 is given away."
    return [toy_tokenizer(), folding_tokenizer(), load_tokenizer(str(t5_tokenizer))]


wide = {ord(a): b for a, b in zip('<>/sexp', '＜＞／ｓｅｘｐ')}
spelled = st.sampled_from(
    ['</s>', '<pad>', '<unk>', '<extra_id_0>', '<extra_id_9>', '</s', 's>', '<', '</s><pad>', '▁</s>'])
mark = st.builds(lambda token, letters: token.translate(letters), spelled, st.sampled_from([{}, wide]))


@examples(150)
@given(st.lists(st.one_of(text, mark), max_size=5))
@example(['＜/s＞'])
@example(['</ſ>', '<extra_id_０>'])
def test_no_special_token_inside(tokenizers, parts):
    "Text that spells a special token, in whatever letters, stays text; all other text gets the tokenizer's own ids."
    t = '\n\nHuman: ' + ''.join(parts) + '\n\nAssistant: x'
    assume(not any(unicodedata.category(c) == 'Cs' for c in t))
    for tokenizer in tokenizers:
        ids, plain = encode(tokenizer, [t])[0], tokenizer([t]).input_ids[0]
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        assert ids[-1] == tokenizer.eos_token_id
        assert not special & {*ids[:-1]}, tokenizer.convert_ids_to_tokens(ids)
        is_ordinary = not special & {*plain[:-1]} and '<unk>' not in t
        if is_ordinary: assert ids == plain
        assert encode(tokenizer, ['x', t, 'y'])[1] == ids


def is_whole(r): return not re.search('[\ud800-\udfff]', r['chosen'] + r['rejected'])


pairs_of = st.lists(plain_row.filter(is_whole), min_size=1, max_size=12)


def write_splits(folder, train, test):
    for split, rows in dict(train=train, test=test).items():
        lines = '\n'.join(map(json.dumps, rows)).encode()
        write(folder, 'a', split, lines, packed=split == 'train')


def check_splits(splits, tokenizer, counts, max_tokens, train, test):
    "Every pair of the files is used, with its own tokens, or counted as dropped."
    for split, file in dict(train=train, validation=train, test=test).items():
        for r in splits[split]:
            line = int(r['id'].split(':')[1])
            assert {side: r[side] for side in pair} == file[line - 1]
            assert r['chosen_ids'] != r['rejected_ids']
            for side in pair: assert r[f'{side}_ids'] == encode(tokenizer, [r[side]])[0][-max_tokens:]

    for split, rows in dict(train=train, test=test).items():
        count = counts[f'a/{split}']
        used = sum(n for what, n in count.items() if what.startswith('used'))
        dropped = sum(count[what] for what in ('equal texts', 'equal tokens', 'too long'))
        assert count['read'] == len(rows) == used + dropped
    assert len(splits['train']) == counts['a/train']['used for train']
    assert len(splits['validation']) == counts['a/train']['used for validation']
    assert len(splits['test']) == counts['a/test']['used for test']
    assert {*splits} == {'train', 'validation', 'test'}


@examples(20)
@given(pairs_of, pairs_of, st.sampled_from(['drop', 'truncate_left', 'error']),
       st.sampled_from([8, 12, 16, 10**6]), st.sampled_from([.1, .5, .9]))
def test_from_file_to_splits(tmp_path_factory, tokenizers, train, test, too_long, max_tokens, val_fraction):
    folder, counts, tokenizer = tmp_path_factory.getbasetemp()/'splits', defaultdict(Counter), tokenizers[0]
    write_splits(folder, train, test)
    cfg = types.SimpleNamespace(max_tokens=max_tokens, too_long=too_long, val_fraction=val_fraction,
                                seed=1, n_train_data=0, n_test_data=0)
    try:
        raw = {split: read_pairs(folder, ['a'], split, counts) for split in ('train', 'test')}
        splits = prepare_splits(raw, tokenizer, cfg, 10**6, counts)
    except ConfigError as e:
        assert re.search(r'pair is left|a/(train|test):\d+: a text of \d+ tokens', one_line(e))
    else: check_splits(splits, tokenizer, counts, max_tokens, train, test)


def test_load_data(tmp_path):
    "As the program calls it; and a bad line is named from there too."
    words, counts = '</s> <pad> ＜/s＞ \0 \u2028 \ufeff é'.split(' '), defaultdict(Counter)
    rows = []
    for i, word in enumerate(words*8):
        begin = f'\n\nHuman: {i}\n\nAssistant: '
        rows.append(dict(chosen=f'{begin}It is a bird. {word}', rejected=f'{begin}{word}'))
    write_splits(tmp_path, rows, rows[:3])
    cfg = load_config([f'data.name="{tmp_path}"', 'data.subdirs=[a]', 'model.transformer_name=toy',
                       'data.max_tokens=64', 'data.val_fraction=0.4'])
    tokenizer, splits, best = load_data(cfg, counts)
    check_splits(splits, tokenizer, counts, 64, rows, rows[:3])
    assert best is None
    assert len(splits['train']) > 10

    write(tmp_path, 'a', 'test', whole + b'\n[]', packed=False)
    refusal(lambda: load_data(cfg, counts), f'{tmp_path}/a/test.jsonl:2: a row must be a JSON object')


@pytest.mark.parametrize('too_long', ['drop', 'truncate_left', 'error'])
def test_100_000_tokens(tokenizers, too_long):
    tokenizer, counts = tokenizers[0], defaultdict(Counter)
    short = dict(pair, id='s/train:1', subset='s')
    long = dict(pair, id='s/train:2', subset='s', chosen=pair['chosen'] + ' word'*100_000)
    ds, ids = datasets.Dataset.from_list([short, long]), encode(tokenizer, [long['chosen']])[0]
    assert len(ids) > 100_000

    def tokenize(): return tokenize_pairs(ds, tokenizer, 512, too_long, 'train', counts)
    if too_long == 'error':
        refusal(tokenize, f's/train:2: a text of {len(ids)} tokens')
    elif too_long == 'drop':
        assert tokenize()['id'][:] == ['s/train:1']
        assert counts['s/train'] == {'too long': 1}
    else:
        out = tokenize()
        assert len(out) == 2 and out[1]['chosen_ids'] == ids[-512:]
        assert not counts['s/train']


# settings

every_key = sorted({k for m in choices('model') for k in compose._keys_with((f'model={m}',))})
good_key = st.sampled_from(every_key)
top_keys = st.sampled_from([k for k in every_key if k.count('.') < 2])


def misspell(key, i, letter):
    i %= len(key)
    return key[:i] + letter + key[i + 1:]


misspelt = st.builds(misspell, good_key, st.integers(0, 99),
                     st.sampled_from(['', 'x', '.', '..', ' ', '@', ':', '/', '\0', 'é', '[0]', '=']))
prefixed = st.builds('{}{}'.format, st.sampled_from(['+', '~', '++', '.', 'hydra.']), good_key)
groups = st.sampled_from(['model', 'experiment', 'model@data', 'experiment@_global_', '', 'hydra/launcher',
                          'defaults', 'seed@x'])
key = st.one_of(good_key, good_key, misspelt, prefixed, groups, st.text(max_size=8))

odd_numbers = st.sampled_from([
    'inf', '-inf', 'nan', '1e400', '-0', '0x10', '1_0', '1e-400', '00', '1.', '.5',
    10**30, 2**31, 2**32, 2**32 - 1, 65536, '9'*400, '9'*4090])
number = st.one_of(st.integers(-3, 600), st.integers(), st.floats(), st.floats(0, 1), odd_numbers).map(str)
readable = [
    *'0 1 2 -1 true false null none yes toy auto drop truncate_left error float16 bf16 fp16 AdamW'.split(' '),
    *'never batches cpu cuda:99 decoder_output google/flan-t5-small ../x /etc . .. a=b'.split(' '),
    *'str(1) float(nan) int(3.7) sort([2,1]) [] {} [a] [a,a] [a,../b] [1,2] [64] [0]'.split(' '),
    *'[[a]] [[1]] [null] [a,null] {a:1} {n_epochs:3} {r:4} {name:[1]} {interval_val:0}'.split(' '),
    '"a,b"', '""', '"\n"', '"é"', '"\x1b[31m"', '"\ud800"', "' '", '"' + 'é'*300 + '"', 'x'*4000]
odd_ones = [
    *'??? ${seed} ${oc.env:HOME} ${oc.decode:1} ${nothing} ${desc} ${ [???] [${seed}]'.split(' '),
    *'a,b range(1,3) range(0,1000000000) glob(*) choice(a,b) interval(0,1) shuffle(1,2,3)'.split(' '),
    *'sort(3,1) tag(a,1) int(1e400) int(x) json(1)'.split(' '),
    '=', '==', '\\', '\\,', "'", '"', '[[[[', '{{', ':', '~', '~/x', '"a', '\0', '', ' ', '  a  ', '"\\""', 'é',
    '['*300 + ']'*300, '{a:'*100 + '1' + '}'*100, '('*200, 'x'*100_000]
words, odd_words = st.sampled_from(readable), st.sampled_from(odd_ones)

plausible = st.one_of(
    st.builds('{}={}'.format, good_key, number),
    st.builds('{}={}'.format, good_key, words),
    st.builds('{}=[{},{}]'.format, good_key, number, number),
    st.builds('{}={}'.format, top_keys, odd_words))
odd_list = st.lists(number | odd_words, max_size=3).map(lambda items: f'[{",".join(items)}]')
quoted = st.text(max_size=8).map(lambda t: f"'{t}'")
odd_value = st.one_of(number, words, odd_words, st.text(max_size=10), odd_list, quoted)
odd_override = st.one_of(
    st.builds('{}={}'.format, key, odd_value),
    st.text(max_size=10),
    st.builds('model={}'.format, st.sampled_from(choices('model'))),
    st.just('experiment=toy'))


def typed(value, kind):
    "Whether a value is of the type that a dataclass names."
    if dataclasses.is_dataclass(kind):
        has_all = {*value} >= {f.name for f in dataclasses.fields(kind)}
        return has_all and all(typed(value[k], t) for k, t in typing.get_type_hints(kind).items())
    if kind is typing.Any: return not isinstance(value, (dict, list))
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Union: return any(typed(value, k) for k in kinds)
    if typing.get_origin(kind) is list: return isinstance(value, list) and all(typed(v, kinds[0]) for v in value)
    if typing.get_origin(kind) is dict: return isinstance(value, dict) and all(typed(v, kinds[1]) for v in value.values())
    return type(value) is kind


def model_schema(settings):
    "The dataclass with these settings of a model."
    for kind in (schema.FullPooledModelConfig, schema.PooledModelConfig, schema.ModelConfig):
        if {f.name for f in dataclasses.fields(kind)} == {*settings}: return kind
    raise AssertionError(settings)


def check_settings(overrides):
    try: cfg = load_config(overrides)
    except ConfigError as e: return one_line(e)
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert typed(tree, schema.Config), tree
    assert typed(tree['model'], model_schema(tree['model'])), tree
    for k in names.setting_keys(cfg):
        v = OmegaConf.select(cfg, k)
        for pattern, (ok, _) in RULES.items():
            if re.fullmatch(pattern, k): assert ok(v), (k, v)
        if isinstance(v, int): assert -2**32 < v < 2**32
    saved = OmegaConf.create(OmegaConf.to_yaml(cfg))       # as a run saves it beside its results
    assert OmegaConf.to_container(saved) == tree


@examples(45)
@given(st.lists(plausible, min_size=1, max_size=2),
       st.sampled_from([[], [], ['experiment=toy'], *([f'model={m}'] for m in choices('model'))]))
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
    else:
        for o in overrides: assert re.fullmatch(r'[\w.]+=.*', o, re.S) and '${' not in o


NESTED = {
    'lists': lambda n: '['*n + ']'*n,
    'open lists': lambda n: '['*n,
    'dicts': lambda n: '{a:'*n + '1' + '}'*n,
    'calls': lambda n: 'str('*n + '1' + ')'*n}


@pytest.mark.parametrize('depth', [30, 60, 90, 120, 2000])
def test_nested_settings(depth):
    """Brackets in brackets, from what Hydra reads to what no stack holds
    (outside of hypothesis, which makes the stack larger)."""
    for nested in NESTED.values():
        assert check_settings([f'training.token_budget={nested(depth)}'])


refused = [
    ('data.subdirs=[../x]', 'data.subdirs'),
    ('data.subdirs=[/etc]', 'data.subdirs'),
    ('data.subdirs=["a\0b"]', "data.subdirs=['a\\x00b']"),
    (f'data.subdirs=[.,{"s"*300}]', 'data.subdirs'),
    ('training.optimizer.weight_decay=inf', 'finite'),
    ('training.loop.n_epoch=3', "did you mean 'training.loop.n_epochs'"),
    ('desc=${oc.env:HOME}', '${oc.env:HOME}'),
    ('seed=4294967296', 'below 4,294,967,296'),
    ('desc=../../x', 'desc='),
    ('desc=/etc/x', 'desc='),
    ('desc=.', 'desc='),
    ('desc="two\nlines\0"', 'desc='),
    ('desc=' + 'x'*300, 'desc='),
    ('device_name=gpu', 'no such device'),
    ('data.name="\x1b[31m\n"', 'data.name=\\x1b[31m\\n'),
    ('data.name=' + 'x/'*2000, 'no such folder')]


@pytest.mark.parametrize('setting, message', refused, ids=[s[:30] for s, _ in refused])
def test_program_refuses(results, capsys, setting, message):
    "The program's own `main`: exit code 2, one line on stderr, no run's folder left."
    assert main(['experiment=toy', 'sim_man.allow_untracked=true', 'device_name=cpu', setting]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert re.fullmatch(r'error: [^\n]*\n', err) and err[:-1].isprintable(), err
    assert message in err
    assert not [*results.rglob('desc-*')]


def test_program_as_a_process(results):
    done = program('rlhf_flant5.train', 'experiment=toy', 'sim_man.allow_untracked=true', 'desc=../../x')
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    assert re.fullmatch(r'error: [^\n]+\n', done.stderr), done.stderr
    assert not [*results.rglob('*')]


usual_names = st.sampled_from(['', '.', '..', '~', '~x', '~/..', '/', '*', 'a/b/c', 'a--b', 'hf://a/b', 'https://a/b'])
long_names = st.builds(lambda part, n: part*n, st.sampled_from(['x', 'a/', '../', '~', 'é']), st.integers(1, 5000))


@examples(100)
@given(st.one_of(st.text(max_size=12), usual_names, long_names))
def test_names_of_folders_and_devices(monkeypatch, name):
    def no_hub(name, key, *_): raise ConfigError(f'{key}={name}: not asked')
    monkeypatch.setattr(hub, '_from_hub', no_hub)
    assume('\0' not in name and name)     # refused by the settings
    refusal(lambda: resolve_folder(name, 'data.name', ['no-such-file'], ['no-such-file'], 'dataset'), 'data.name=')
    try: assert best_device(name).type == 'cpu'
    except ConfigError as e: one_line(e, 'device_name=')
