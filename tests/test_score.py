"Scores as a user gets them: alone and in batches, and the program on streams, with bad lines, killed and resumed."
import csv, gzip, io, json, os, pydoc, random, re, signal, subprocess, sys, time
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import root
from rlhf_flant5 import RewardModel
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.config.names import choices
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.machine import best_device, set_seed
from rlhf_flant5.data.dialogue import dialogue
from rlhf_flant5.data.tokens import load_tokenizer
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer
from rlhf_flant5.models.base import readout_class
from rlhf_flant5.score import main
from rlhf_flant5.use.elsewhere import export_backbone
from rlhf_flant5.use.stream import numbered_lines, score_lines, text_of, windows
from transformers import T5EncoderModel, T5Model


def widen(weights):
    "Add noise to a parameter, so that pools weigh and rewards differ."
    spread = weights.data.std().nan_to_num(.3).clamp(min=.1)
    weights.data += .3*spread*weights.data.new_empty(weights.shape).normal_()


def build(name, **kwargs):
    set_seed(3)
    readout = readout_class(name)
    transformer = toy_transformer(cls=T5Model if readout.reads_decoder else T5EncoderModel)
    model = readout(Backbone(transformer, **kwargs)).eval()
    model.tokenizer, model.config = toy_tokenizer(), dict(max_tokens=128, temperature=2.)
    for weights in model.readout_parameters(): widen(weights)
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('score')/'model'
    model = build('layerwise_attention')
    model.save_pretrained(path, model.tokenizer, max_tokens=128, temperature=2.)
    return path


texts = toy_pairs(150, seed=2)['chosen'][:]


# ---- rewards

@pytest.mark.parametrize('name', choices('model'))
def test_alone_in_batches_and_in_any_order(name):
    model = build(name)
    alone = np.array([model.score(text) for text in texts])
    assert alone.std() > 1e-3

    order = random.Random(1).sample(range(150), 150)
    shuffled = model.score([texts[i] for i in order])[np.argsort(order)]
    together = dict(
        at_once=model.score(texts),
        one_by_one=model.score(iter(texts), token_budget=1),
        in_one_batch=model.score(texts, token_budget=10**9),
        shuffled=shuffled)
    for how, rewards in together.items():
        assert np.abs(rewards - alone).max() < 1e-5*alone.std() + 1e-6, how


@pytest.mark.parametrize('name', choices('model'))
def test_no_dropout_and_the_mode_is_put_back(name):
    model = build(name)
    rewards = model.score(texts)
    assert not model.training
    assert np.abs(model.train().score(texts) - rewards).max() < 1e-5
    assert model.training


@pytest.mark.parametrize('name', choices('model'))
@pytest.mark.parametrize('frozen', [False, True], ids=['trained', 'frozen'])
def test_explanation_adds_up(name, frozen):
    model = build(name, train_transformer=not frozen)
    why = model.explain(texts[0])
    assert abs(why.reward - model.score(texts[0])) < 1e-5
    assert len(why.tokens) == why.token_weights.shape[1] == len(why.token_effects)
    assert np.allclose(why.token_weights.sum(1), 1, atol=1e-5)
    assert model.backbone.trained is not frozen

    moved = why.reward - why.blank_reward
    for effects, gap in zip((why.token_effects, why.block_effects), why.gaps, strict=True):
        assert abs(effects.sum() + gap - moved) < 1e-5
        assert abs(gap) <= .011*abs(moved) + 1e-5

    prompt = texts[0].rpartition('\n\nAssistant:')[0] + '\n\nAssistant:'
    n_prompt = len(model.token_ids([prompt])[0]) - 1       # without the end token
    assert not why.token_effects[:n_prompt].any()
    assert why.token_effects[n_prompt:-1].all()


messages = [dict(role='user', content='a'), dict(role='assistant', content='b'), dict(role='user', content='c')]
whole = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d'


@pytest.mark.parametrize('prompt', [
    pytest.param('\n\nHuman: a\n\nAssistant: b\n\nHuman: c', id='dialogue'),
    pytest.param('\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:', id='dialogue with an open turn'),
    pytest.param(messages, id='messages')])
def test_prompts_that_are_no_plain_question(prompt): assert dialogue(prompt, ' d ') == whole


def test_messages_and_an_empty_response():
    assert dialogue([*messages, dict(role='assistant', content='d')]) == whole
    assert dialogue('\n\nHuman: a', '') == '\n\nHuman: a\n\nAssistant: '


@pytest.mark.parametrize('prompt, response', [
    pytest.param('\n\nAssistant:', 'x', id='no question'),
    pytest.param('\n\nAssistant: hi', 'x', id='begins with an answer'),
    pytest.param([], 'x', id='no message'),
    pytest.param([dict(role='user', content=None)], 'x', id='message without text'),
    pytest.param(messages, [dict(role='user', content='x')], id='response of the user'),
    pytest.param('a', 7, id='response is a number')])
def test_what_is_no_dialogue(prompt, response):
    with pytest.raises(ConfigError): dialogue(prompt, response)


def test_memory_that_does_not_suffice(monkeypatch):
    def out_of_memory(*_): raise torch.OutOfMemoryError()
    model = build('decoder_output')
    monkeypatch.setattr(type(model), 'features', out_of_memory)
    with pytest.raises(ConfigError, match='4,096 tokens at once do not fit'): model.score(texts)


def test_compared_prompts_are_the_same():
    model = build('decoder_output')
    no = [dict(role='user', content='a')], 'no'
    assert model.compare(('a', 'yes'), no) == model.compare(('\n\nHuman: a\n\nAssistant:', 'yes'), no)
    with pytest.raises(ConfigError, match='comparison 0: the prompts differ'): model.compare(('b', 'yes'), no)
    with pytest.raises(ConfigError, match='comparison 1: the prompts differ'):
        model.compare([('a', 'x'), ('a', 'x')], [('a', 'y'), ('c', 'y')])


def test_compare_takes_a_prompt_and_two_responses():
    model = build('decoder_output')
    p = model.compare(('a', 'yes'), ('a', 'no'))
    assert model.compare('a', 'yes', 'no') == p
    assert model.compare([dict(role='user', content='a')], 'yes', 'no') == p
    assert [*model.compare(['a', 'a'], ['yes', 'no'], ['no', 'yes'])] == pytest.approx([p, 1 - p])
    assert model.compare(a=texts[0], b=texts[0]) == .5


# ---- streams

def test_windows_depend_on_the_lines_alone():
    lines = [(n, b'x'*(n % 7)) for n in range(100)]
    assert [len(window) for window in windows(lines, 32)] == [32, 32, 32, 4]
    assert [row for window in windows(lines, 32, 20) for row in window] == lines


class EndlessLine:
    "A file whose first line comes in forty pieces."
    n_pieces = 40

    def readline(self, n):
        self.n_pieces -= 1
        if self.n_pieces < 0: return b''
        return b'{}\n' if self.n_pieces == 0 else b'x'*n


def test_a_line_beyond_the_limit_is_passed_over(): assert [*numbered_lines(EndlessLine())] == [(1, None)]


class NanFor:
    "A model whose reward is NaN for texts that hold a word."
    def __init__(self, model, word):
        self.model, self.bad = model, {*model.token_ids([word])[0][:-1]}
        self.broken = build('decoder_output')
        self.broken.readout = lambda features: features.flatten(1).sum(1)*float('nan')

    def __getattr__(self, name): return getattr(self.model, name)

    def rewards_of(self, ids, *args, **kwargs):
        has_word = any(self.bad <= {*text} for text in ids)
        return (self.broken if has_word else self.model).rewards_of(ids, *args, **kwargs)


def test_one_nan_is_one_error():
    model = build('decoder_output')
    mixed = [*texts[:5], '\n\nHuman: Who?\n\nAssistant: %%%', *texts[5:9]]
    lines = [json.dumps(dict(text=text)).encode() for text in mixed]
    found = score_lines(NanFor(model, '%%%'), enumerate(lines, 1))
    assert ['error' in row for row in found] == [i == 5 for i in range(10)]
    assert 'NaN' in found[5]['error']
    rewards = [row['reward'] for row in found if 'reward' in row]
    assert np.allclose(rewards, model.score(texts[:9]), atol=1e-5)


MISSING = dict(
    no_response=(dict(prompt='x'), "has only 'prompt'; a row holds text, or prompt and response, or messages"),
    other_name=(dict(prompt='x', completion='y'), "has 'prompt, completion'; a row holds"),
    a_pair=(dict(prompt='x', chosen='a', rejected='b'), 'a pair, and a reward is of one text'),
    nothing=({}, 'has no column'),
    two_forms=(dict(text='a', messages=[]), "has 'text, messages'; a row holds"))


@pytest.mark.parametrize('row, says', MISSING.values(), ids=MISSING)
def test_what_a_row_lacks_is_said(row, says):
    with pytest.raises(ConfigError) as e: text_of(row)
    assert says in str(e.value)


# ---- the program

def write_rows(path, n, more=b''):
    "A file of n rows of different texts, and something at its end."
    rows = (dict(id=i, text=texts[i % 150] + ' So.'*(i % 5)) for i in range(n))
    content = b''.join(json.dumps(row).encode() + b'\n' for row in rows) + more
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
    return path


def run(model, *args): return main([str(model), *map(str, args)])


def read_rows(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_program(folder, tmp_path, capsys):
    path = write_rows(tmp_path/'in.jsonl.gz', 30, b'{"text": "no turn"}\n')
    assert run(folder, path) == 1
    printed = capsys.readouterr()
    assert 'line 31: no turn' in printed.err
    assert '31 lines, 30 scored, 1 bad' in printed.err
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row['line'] for row in rows] == [*range(1, 32)]
    assert [row.get('id') for row in rows] == [*range(30), None]
    assert 'error' in rows[-1]


def test_lines_that_are_bad_alone(folder, tmp_path, capsys):
    path = tmp_path/'bad.jsonl'
    path.write_text('7\n\n7\n')
    assert run(folder, path, '--token-budget', '100') == 1
    assert capsys.readouterr().out.count('"error"') == 2


@pytest.mark.parametrize('name, more, says', [
    pytest.param('cut.jsonl.gz', ['--out', 'scored'], 'cut off or damaged', id='gzip cut off'),
    pytest.param('nowhere.jsonl', [], 'No such file', id='no file'),
    pytest.param('', [], 'directory', id='a folder'),
    pytest.param('in.jsonl', ['--token-budget', '0'], 'at least 1', id='no token at once')])
def test_input_that_cannot_be_scored(folder, tmp_path, capsys, monkeypatch, name, more, says):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path/'in.jsonl', 2)
    cut = write_rows(tmp_path/'cut.jsonl.gz', 3000)
    cut.write_bytes(cut.read_bytes()[:-100])
    assert run(folder, tmp_path/name, *more) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith('error: ') and says in printed.err
    assert printed.err.count('\n') == 1


FOREIGN = dict(
    a_note=b'a note',
    two_lines=b'two\nlines\n',
    a_number=b'3\n',
    no_line_number=b'{"reward": "x"}\n',
    reward_is_text=b'{"line": 1, "reward": "x"}\n',
    another_reward=b'{"line": 1, "id": 0, "reward": 1000.0}\n{"l',
    nested=b'['*9999 + b'\n',
    no_text=b'\xff\n',
    another_tail=b'{"line": 7')


def assert_refused(folder, source, out, capsys):
    before = out.read_bytes()
    capsys.readouterr()
    assert run(folder, source, '--out', out, '--resume') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: what is in the file') and error.count('\n') == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize('content', FOREIGN.values(), ids=FOREIGN)
def test_resume_leaves_a_foreign_file_alone(folder, tmp_path, capsys, content):
    source, out = write_rows(tmp_path/'in', 3), tmp_path/'out'
    out.write_bytes(content)
    assert_refused(folder, source, out, capsys)


def test_resume_refuses_more_rows_than_there_are(folder, tmp_path, capsys):
    source, out = write_rows(tmp_path/'in', 2), tmp_path/'out'
    assert run(folder, source, '--out', out) == 0
    out.write_bytes(out.read_bytes() + b'{"line": 3')
    assert_refused(folder, source, out, capsys)


def test_out_that_would_be_compressed(folder, tmp_path, capsys):
    out = tmp_path/'out.jsonl.gz'
    assert run(folder, tmp_path, '--out', out) == 2
    assert f'name it {tmp_path}/out.jsonl, and' in capsys.readouterr().err
    assert not out.exists()


def start(model, *args, **kwargs):
    "The program as a process of its own."
    env = os.environ | {'PYTHONPATH': str(root)}
    return subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.score', str(model), *map(str, args)], env=env, **kwargs)


def size(path): return os.path.getsize(path) if path.exists() else 0


def stop_when_it_writes(model, source, part, sign, *more):
    "Start, wait until the file grows, send a signal; the exit code and what was shown."
    before = size(part)
    process = start(model, source, '--out', part, *more, stderr=subprocess.PIPE, text=True)
    while size(part) <= before:
        assert process.poll() is None
        time.sleep(.01)
    process.send_signal(sign)
    shown = process.communicate()[1]
    return process.returncode, shown


def test_killed_and_resumed(folder, tmp_path):
    """SIGKILL once a window is written, SIGTERM in the middle of the next attempt, then to the end.

    What it ends with are the bytes of an unbroken run."""
    source, unbroken, part = write_rows(tmp_path/'in', 6000), tmp_path/'whole', tmp_path/'part'
    assert run(folder, source, '--out', unbroken) == 0

    code, shown = stop_when_it_writes(folder, source, part, signal.SIGKILL)
    assert code == -9 and 'go on with --resume' not in shown
    code, shown = stop_when_it_writes(folder, source, part, signal.SIGTERM, '--resume')
    assert code == 75 and 'go on with --resume' in shown

    with open(part, 'ab') as f: f.write(b'{"line": ')        # half a line, as a power cut leaves it
    assert 0 < size(part) < size(unbroken)
    assert run(folder, source, '--out', part, '--resume') == 0
    assert part.read_bytes() == unbroken.read_bytes()


def test_reader_that_leaves_early(folder, tmp_path):
    process = start(folder, write_rows(tmp_path/'in', 6000), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(process.stdout.readline())['line'] == 1
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait() == 1


# ---- as a library

def test_a_runs_folder_is_a_models_too(trained_run, tmp_path, capsys):
    best = trained_run/'simulation'/'best_model'
    of_run, of_model = (RewardModel.from_pretrained(path).score(texts[0]) for path in (trained_run, best))
    assert of_run == of_model
    assert run(trained_run, write_rows(tmp_path/'in.jsonl', 2)) == 0
    assert capsys.readouterr().out.count('"reward"') == 2
    export_backbone(trained_run, tmp_path/'t5')
    assert (tmp_path/'t5'/'model.safetensors').exists()


def test_loaded_where_it_is_asked_for(folder):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match='not available here; this machine has'):
            RewardModel.from_pretrained(folder, device='cuda')
    half = RewardModel.from_pretrained(folder, device='cpu', dtype=torch.bfloat16)
    full = RewardModel.from_pretrained(folder, device=torch.device('cpu'))
    assert half.backbone.transformer.dtype == torch.bfloat16
    assert full.backbone.transformer.dtype == torch.float32
    assert np.corrcoef(half.score(texts), full.score(texts))[0, 1] > .98
    assert RewardModel.from_pretrained(folder).backbone.transformer.device.type == best_device().type


def test_a_plain_t5_is_named_as_such(folder, model_folder, trained_run, capsys):
    with pytest.raises(ConfigError, match='this is a plain T5, not a reward model; train one with'):
        RewardModel.from_pretrained(str(model_folder))
    for name in (trained_run, folder):
        with pytest.raises(ConfigError, match='this is a saved reward model, not a plain T5'): load_tokenizer(str(name))
    assert run(model_folder) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'this is a plain T5' in error


def test_saved_again_with_what_it_knows(folder, tmp_path):
    model = RewardModel.from_pretrained(folder, 'cpu')
    model.save_pretrained(tmp_path/'again', note='mine')
    again = RewardModel.from_pretrained(tmp_path/'again', 'cpu')
    assert again.config == model.config | dict(note='mine')
    assert again.score(texts[0]) == model.score(texts[0])
    del model.tokenizer
    with pytest.raises(ConfigError, match=r'no tokenizer to save; give one, as save_pretrained\(folder, tokenizer\)'):
        model.save_pretrained(tmp_path/'none')
    assert not (tmp_path/'none').exists()


@pytest.mark.parametrize('f, shown', [
    (RewardModel.score, 'token_budget: padded tokens at once'),
    (RewardModel.from_pretrained, 'device: None: the best there is'),
    (RewardModel.compare, 'prompt: a plain question'),
    (RewardModel.save_pretrained, "tokenizer: None: the model's own"),
    (dialogue, 'returns: as HH-RLHF writes it')], ids=lambda x: getattr(x, '__name__', ''))
def test_help_shows_the_parameters(f, shown): assert shown in pydoc.render_doc(f, renderer=pydoc.plaintext)


def test_an_explanation_as_a_table_and_as_one_figure():
    why = build('layerwise_attention').explain(texts[0])
    assert [*why.table] == ['token', 'read', 'moved']
    assert np.array_equal(why.table.moved, why.token_effects)
    assert not re.search(r'[-+]0\.00(?!\d)', repr(why))
    assert repr(why).count('\n') == len(why.tokens) + 1
    assert '<table' in why._repr_html_()
    fig = why.plot()
    assert plt.get_fignums() == []
    scales = [ax for ax in fig.axes if ax.get_label() == '<colorbar>']
    assert [ax.get_ylabel() for ax in scales] == ['weight', 'change']
    fig.savefig(io.BytesIO())


# ---- own columns, CSV and Parquet

own = [dict(question='Who is it?', answer='It is a bird.', topic='a, "b"', id=0),
       dict(question='Who is he?', answer='I do not know.\nSorry.', topic='c', id=1),
       dict(question='Who is she?', answer='It is a fish.', topic='d', id=2)]
asked = '--prompt', 'question', '--response', 'answer'


def own_table(path):
    "The same three rows, as the kind of file that the name says."
    if path.suffix == '.parquet': pd.DataFrame(own).to_parquet(path)
    elif path.suffix == '.jsonl': path.write_text(''.join(json.dumps(row) + '\n' for row in own), encoding='utf-8')
    else:
        text = pd.DataFrame(own).to_csv(index=False)
        if path.suffix == '.gz': path.write_bytes(gzip.compress(text.encode()))
        else: path.write_text(text, encoding='utf-8')
    return path


def read_table(path):
    if path.suffix != '.csv': return read_rows(path)
    return [*csv.DictReader(io.StringIO(path.read_text(encoding='utf-8')))]


@pytest.mark.parametrize('name', ['x.csv', 'x.csv.gz', 'x.parquet', 'x.jsonl'])
@pytest.mark.parametrize('out', ['y.csv', 'y.jsonl'])
def test_own_columns_from_any_table_into_any(folder, tmp_path, name, out):
    source, out = own_table(tmp_path/name), tmp_path/out
    assert run(folder, source, *asked, '--keep', 'topic', '--out', out) == 0
    rows = read_table(out)
    assert [(str(row['id']), row['topic']) for row in rows] == [(str(row['id']), row['topic']) for row in own]
    rewards = RewardModel.from_pretrained(folder).score([r['question'] for r in own], [r['answer'] for r in own])
    assert [float(row['reward']) for row in rows] == pytest.approx([*rewards], abs=1e-5)
    starts = [2, 3, 5] if 'csv' in name else [1, 2, 3]      # where the row begins: one holds two lines
    assert [int(row['line']) for row in rows] == starts


@pytest.mark.parametrize('name', ['x.csv', 'x.csv.gz', 'x.parquet', 'x.jsonl'])
def test_a_table_is_resumed_byte_for_byte(folder, tmp_path, name):
    args = own_table(tmp_path/name), *asked, '--keep', 'topic', '--out', tmp_path/'y.jsonl'
    assert run(folder, *args) == 0
    unbroken = (tmp_path/'y.jsonl').read_bytes()
    (tmp_path/'y.jsonl').write_bytes(unbroken[:len(unbroken)//2])
    assert run(folder, *args, '--resume') == 0
    assert (tmp_path/'y.jsonl').read_bytes() == unbroken


@pytest.mark.parametrize('name', ['x.csv', 'x.parquet', 'x.jsonl'])
def test_keep_all(folder, tmp_path, name):
    out = tmp_path/'out'
    assert run(folder, own_table(tmp_path/name), *asked, '--keep', 'all', '--out', out) == 0
    as_text = [{k: str(row[k]) for k in own[0]} for row in read_rows(out)]
    assert as_text == [{k: str(v) for k, v in row.items()} for row in own]


BROKEN_CSV = dict(
    twice='a,a\n1,2\n',
    nothing='',
    latin='question,answer\nWho?,\xe9\n',
    quote='prompt,response\nWho?,"a" b\n')


def write_tables(here):
    "What the cases below name, in one folder."
    for name in ('x.csv', 'x.parquet', 'x.jsonl'): own_table(here/name)
    for name, text in BROKEN_CSV.items(): (here/f'{name}.csv').write_bytes(text.encode('latin1'))
    (here/'no.parquet').write_text('no')
    good = (here/'x.parquet').read_bytes()
    (here/'cut.parquet').write_bytes(good[:100] + b'x'*40 + good[140:])
    (here/'x.xlsx').write_text('x')


REFUSED = {
    'no column named': (['x.csv'], "x.csv: has 'question, answer, topic, id'; a row holds text"),
    'no such columns': (['x.csv', '--prompt', 'q'], "and no 'q' and no 'response'"),
    'two forms': (['x.csv', '--text', 'answer', '--messages', 'topic'], '--text --messages: name text, or'),
    'keep a column of the output': (['x.csv', *asked, '--keep', 'reward'], 'a column of its own of that name'),
    'keep what is not there': (['x.csv', *asked, '--keep', 'topik'], 'no such column'),
    'Excel': (['x.xlsx'], 'is not read here; convert it to .jsonl or .csv'),
    'a name twice': (['twice.csv', '--text', 'a'], "'a' stands twice"),
    'empty CSV': (['nothing.csv'], 'must name the columns'),
    'Latin-1': (['latin.csv', *asked], 'UTF-8'),
    'odd quotes': (['quote.csv'], 'quote.csv: line 2: no CSV'),
    'no Parquet': (['no.parquet'], 'no Parquet file'),
    'damaged Parquet': (['cut.parquet', *asked], 'Parquet file is damaged'),
    'into Parquet': (['x.csv', *asked, '--out', 'y.parquet'], 'written as JSON lines or CSV'),
    'resumed CSV': (['x.csv', *asked, '--out', 'y.csv', '--resume'], 'CSV is written in one go'),
    'all of JSON into CSV': (['x.jsonl', *asked, '--keep', 'all', '--out', 'y.csv'], '--keep all: rows of JSON')}


@pytest.mark.parametrize('args, says', REFUSED.values(), ids=REFUSED)
def test_tables_are_refused_once_in_one_line(folder, tmp_path, capsys, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    write_tables(tmp_path)
    assert run(folder, *args) == 2
    error = capsys.readouterr().err.rpartition('\r')[2]      # after a progress bar
    assert error.startswith('error: ') and says in error
    assert error.count('\n') == 1
    assert not (tmp_path/'y.csv').exists()


@pytest.mark.parametrize('allowed, code', [('0', 1), ('1', 1), ('2', 0), ('0.1', 1), ('0.2', 0)])
def test_some_bad_lines_are_allowed(folder, tmp_path, capsys, allowed, code):
    path = write_rows(tmp_path/'in.jsonl', 8, b'7\n{"text": 3}\n')
    assert run(folder, path, '--max-bad-lines', allowed) == code
    printed = capsys.readouterr()
    assert printed.out.count('"error"') == 2
    assert 'line 9: ' in printed.err
    assert '10 lines, 8 scored, 2 bad' in printed.err


@pytest.mark.parametrize('allowed', ['-1', '1.5', 'few'])
def test_bad_lines_are_a_number_or_a_share(allowed, capsys):
    with pytest.raises(SystemExit) as e: run('model', '--max-bad-lines', allowed)
    assert e.value.code == 2
    assert '--max-bad-lines' in capsys.readouterr().err
