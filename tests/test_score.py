"Scores as a user gets them: alone and in batches for each readout, and the program on streams, with bad lines, killed and resumed."
import csv, gzip, io, json, os, pydoc, random, re, shutil, signal, subprocess, sys, time
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import root
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.config.names import choices
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.machine import best_device, set_seed
from rlhf_flant5.data.pairs import load_tokenizer
from rlhf_flant5.models.base import readout_class
from rlhf_flant5.data.dialogue import dialogue
from rlhf_flant5 import RewardModel
from rlhf_flant5.score import main
from rlhf_flant5.use.stream import numbered_lines, score_lines, text_of, windows
from rlhf_flant5.use.elsewhere import export_backbone
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer
from transformers import T5EncoderModel, T5Model


def build(name, **kwargs):
    set_seed(3)
    cls = readout_class(name); model = cls(Backbone(toy_transformer(cls=T5Model if cls.reads_decoder else T5EncoderModel), **kwargs)).eval()
    model.tokenizer, model.config = toy_tokenizer(), dict(max_tokens=128, temperature=2.)
    for p in model.readout_parameters(): p.data += .3*p.data.std().nan_to_num(.3).clamp(min=.1)*p.data.new_empty(p.shape).normal_()   # so that pools weigh and rewards differ
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    model = build('layerwise_attention'); path = tmp_path_factory.mktemp('score')/'model'
    model.save_pretrained(path, model.tokenizer, max_tokens=128, temperature=2.)
    return path


texts = toy_pairs(150, seed=2)['chosen'][:]


@pytest.mark.parametrize('name', choices('model'))
def test_alone_in_batches_and_in_any_order(name):
    model = build(name); want = np.array([model.score(t) for t in texts]); shuffled = random.Random(1).sample(range(150), 150)
    assert want.std() > 1e-3
    for got in (model.score(texts), model.score(iter(texts), token_budget=1), model.score(texts, token_budget=10**9), model.score([texts[i] for i in shuffled])[np.argsort(shuffled)]):
        assert np.abs(got - want).max() < 1e-5*want.std() + 1e-6
    assert not model.training and np.abs(model.train().score(texts) - want).max() < 1e-5 and model.training      # no dropout, and the mode is put back


@pytest.mark.parametrize('name', choices('model'))
@pytest.mark.parametrize('frozen', [False, True])
def test_explanation_adds_up(name, frozen):
    model = build(name, train_transformer=not frozen); why = model.explain(texts[0])
    assert abs(why.reward - model.score(texts[0])) < 1e-5 and len(why.tokens) == why.token_weights.shape[1] == len(why.token_effects)
    for effects, gap in ((why.token_effects, why.gaps[0]), (why.block_effects, why.gaps[1])):
        assert abs(effects.sum() + gap - (why.reward - why.blank_reward)) < 1e-5 and abs(gap) <= .011*abs(why.reward - why.blank_reward) + 1e-5
    assert np.allclose(why.token_weights.sum(1), 1, atol=1e-5) and model.backbone.trained is not frozen
    n_prompt = len(model.token_ids([texts[0].rpartition('\n\nAssistant:')[0] + '\n\nAssistant:'])[0]) - 1
    assert not why.token_effects[:n_prompt].any() and why.token_effects[n_prompt:-1].all()


def test_prompts_that_are_no_plain_question():
    same = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d'; messages = [dict(role=r, content=c) for r, c in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]
    for prompt in ('\n\nHuman: a\n\nAssistant: b\n\nHuman: c', '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:', messages): assert dialogue(prompt, ' d ') == same
    assert dialogue(messages + [dict(role='assistant', content='d')]) == same and dialogue('\n\nHuman: a', '') == '\n\nHuman: a\n\nAssistant: '
    for bad in (('\n\nAssistant:', 'x'), ('\n\nAssistant: hi', 'x'), ([], 'x'), ([dict(role='user', content=None)], 'x'), (messages, [dict(role='user', content='x')]), ('a', 7)):
        with pytest.raises(ConfigError): dialogue(*bad)


def test_memory_that_does_not_suffice(monkeypatch):
    model = build('decoder_output'); monkeypatch.setattr(type(model), 'features', lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(ConfigError, match='4,096 tokens at once do not fit'): model.score(texts)


def test_windows_depend_on_the_lines_alone():
    lines = [(n, b'x'*(n % 7)) for n in range(100)]
    assert [len(w) for w in windows(lines, 32)] == [32, 32, 32, 4] and [r for w in windows(lines, 32, 20) for r in w] == lines
    class Endless:       # a line beyond the limit is passed over in pieces
        left = 40
        def readline(self, n): self.left -= 1; return b'' if self.left < 0 else b'{}\n' if self.left == 0 else b'x'*n
    assert [(n, line) for n, line in numbered_lines(Endless())] == [(1, None)]


def rows(n): return b''.join(json.dumps(dict(id=i, text=texts[i % 150] + ' So.'*(i % 5))).encode() + b'\n' for i in range(n))


def test_program(folder, tmp_path, capsysbinary):
    def run(*args): return main([str(folder), *map(str, args)]), *(s.decode() for s in capsysbinary.readouterr())
    (tmp_path/'in.jsonl.gz').write_bytes(gzip.compress(rows(30) + b'{"text": "no turn"}\n'))
    code, said, errors = run(tmp_path/'in.jsonl.gz'); out = [json.loads(l) for l in said.splitlines()]
    assert code == 1 and 'line 31: no turn' in errors and '31 lines, 30 scored, 1 bad' in errors
    assert [r['line'] for r in out] == [*range(1, 32)] and [r.get('id') for r in out] == [*range(30), None] and 'error' in out[-1]
    (tmp_path/'bad.jsonl').write_text('7\n\n7\n'); code, said, errors = run(tmp_path/'bad.jsonl', '--token-budget', '100'); assert code == 1 and said.count('"error"') == 2
    (tmp_path/'cut.jsonl.gz').write_bytes(gzip.compress(rows(3000))[:-100])
    for args, says in (((tmp_path/'cut.jsonl.gz', '--out', tmp_path/'cut'), 'cut off or damaged'), ((tmp_path/'nowhere.jsonl',), 'No such file'), ((tmp_path,), 'directory'), ((tmp_path/'bad.jsonl', '--token-budget', '0'), 'at least 1')):
        code, said, errors = run(*args); assert (code, said, says in errors, errors[:7], errors.count('\n')) == (2, '', True, 'error: ', 1)


@pytest.mark.parametrize('held', [b'a note', b'two\nlines\n', b'3\n', b'{"reward": "x"}\n', b'{"line": 1, "reward": "x"}\n', b'{"line": 1, "id": 0, "reward": 1000.0}\n{"l', b'['*9999 + b'\n', b'\xff\n', b'{"line": 7', 'all'])
def test_resume_leaves_a_foreign_file_alone(folder, tmp_path, capsys, held):
    (tmp_path/'in').write_bytes(rows(2 if held == 'all' else 3))
    if held == 'all': main([str(folder), str(tmp_path/'in'), '--out', str(tmp_path/'out')]); held = (tmp_path/'out').read_bytes() + b'{"line": 3'     # a row more than there is to score
    (tmp_path/'out').write_bytes(held); capsys.readouterr()
    assert main([str(folder), str(tmp_path/'in'), '--out', str(tmp_path/'out'), '--resume']) == 2
    said = capsys.readouterr().err; assert said.startswith('error: what is in the file') and said.count('\n') == 1 and (tmp_path/'out').read_bytes() == held


def test_out_that_would_be_compressed(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path), '--out', str(tmp_path/'out.jsonl.gz')]) == 2
    assert f'name it {tmp_path}/out.jsonl, and' in capsys.readouterr().err and not (tmp_path/'out.jsonl.gz').exists()


class Nan:
    "A model whose reward is NaN for texts that hold a word."
    def __init__(self, model, word): self.model, self.bad = model, {*model.token_ids([word])[0][:-1]}
    def __getattr__(self, name): return getattr(self.model, name)
    def rewards_of(self, ids, *args, **kwargs): return type(self.model).rewards_of(self.model if not any(self.bad <= {*t} for t in ids) else self.broken(), ids, *args, **kwargs)
    def broken(self): model = build('decoder_output'); model.readout = lambda features: features.flatten(1).sum(1)*float('nan'); return model


def test_one_nan_is_one_error():
    model = build('decoder_output'); lines = [json.dumps(dict(text=t)).encode() for t in (*texts[:5], '\n\nHuman: Who?\n\nAssistant: %%%', *texts[5:9])]
    found = score_lines(Nan(model, '%%%'), enumerate(lines, 1))
    assert ['error' in r for r in found] == [i == 5 for i in range(10)] and 'NaN' in found[5]['error']
    assert np.allclose([r['reward'] for r in found if 'reward' in r], model.score(texts[:9]), atol=1e-5)


def test_compared_prompts_are_the_same():
    model = build('decoder_output'); pair = lambda p: [(p, 'yes'), ([dict(role='user', content='a')], 'no')]
    assert model.compare(*pair('a')) == model.compare(*pair('\n\nHuman: a\n\nAssistant:'))
    with pytest.raises(ConfigError, match='comparison 0: the prompts differ'): model.compare(*pair('b'))
    with pytest.raises(ConfigError, match='comparison 1: the prompts differ'): model.compare([('a', 'x')]*2, [('a', 'y'), ('c', 'y')])


def start(folder, *args, **kwargs): return subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.score', str(folder), *args], env=os.environ | {'PYTHONPATH': str(root)}, **kwargs)


def test_killed_and_resumed(folder, tmp_path):
    "SIGKILL once a window is written, SIGTERM in the middle of the next attempt, then to the end: the bytes of an unbroken run."
    (tmp_path/'in').write_bytes(rows(6000))
    assert main([str(folder), str(tmp_path/'in'), '--out', str(tmp_path/'whole')]) == 0
    for k, (s, code) in enumerate(((signal.SIGKILL, -9), (signal.SIGTERM, 75))):
        p = start(folder, str(tmp_path/'in'), '--out', str(tmp_path/'part'), *['--resume']*k, stderr=subprocess.PIPE, text=True); size = os.path.getsize(tmp_path/'part') if k else 0
        while not (tmp_path/'part').exists() or os.path.getsize(tmp_path/'part') <= size: assert p.poll() is None; time.sleep(.01)
        p.send_signal(s); said = p.communicate()[1]; assert p.returncode == code and ('go on with --resume' in said) == (code == 75)
    with open(tmp_path/'part', 'ab') as f: f.write(b'{"line": ')        # half a line, as a power cut leaves it
    before = os.path.getsize(tmp_path/'part'); assert 0 < before < os.path.getsize(tmp_path/'whole')
    assert main([str(folder), str(tmp_path/'in'), '--out', str(tmp_path/'part'), '--resume']) == 0
    assert (tmp_path/'part').read_bytes() == (tmp_path/'whole').read_bytes()


def test_reader_that_leaves_early(folder, tmp_path):
    (tmp_path/'in').write_bytes(rows(6000))
    p = start(folder, str(tmp_path/'in'), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(p.stdout.readline())['line'] == 1
    p.stdout.close(); assert (p.stderr.read(), p.wait()) == (b'', 1)


# ---- as a library

def as_run(folder, tmp_path):
    run = tmp_path/'desc-x,index-0'
    (run/'simulation').mkdir(parents=True)
    shutil.copytree(folder, run/'simulation'/'best_model')
    return run


def test_a_runs_folder_is_a_models_too(folder, tmp_path, capsys):
    run = as_run(folder, tmp_path)
    (tmp_path/'in.jsonl').write_bytes(rows(2))
    assert RewardModel.from_pretrained(run).score(texts[0]) == RewardModel.from_pretrained(folder).score(texts[0])
    assert main([str(run), str(tmp_path/'in.jsonl')]) == 0 and capsys.readouterr().out.count('"reward"') == 2
    export_backbone(run, tmp_path/'t5')
    assert (tmp_path/'t5'/'model.safetensors').exists()


def test_loaded_where_it_is_asked_for(folder):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match='not available here; this machine has'): RewardModel.from_pretrained(folder, device='cuda')
    model = RewardModel.from_pretrained(folder, device='cpu', dtype=torch.bfloat16)
    whole = RewardModel.from_pretrained(folder, device=torch.device('cpu'))
    assert model.backbone.transformer.dtype == torch.bfloat16 and whole.backbone.transformer.dtype == torch.float32
    assert np.corrcoef(model.score(texts), whole.score(texts))[0, 1] > .98
    assert RewardModel.from_pretrained(folder).backbone.transformer.device.type == best_device().type


def test_a_plain_t5_is_named_as_such(folder, model_folder, tmp_path, capsys):
    for name in (model_folder, as_run(folder, tmp_path), folder):
        given, says = (RewardModel.from_pretrained, 'this is a plain T5, not a reward model; train one with') if name == model_folder else (load_tokenizer, 'this is a saved reward model, not a plain T5')
        with pytest.raises(ConfigError, match=says): given(str(name))
    assert main([str(model_folder)]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'this is a plain T5' in said


def test_saved_again_with_what_it_knows(folder, tmp_path):
    model = RewardModel.from_pretrained(folder, 'cpu')
    model.save_pretrained(tmp_path/'again', note='mine')
    again = RewardModel.from_pretrained(tmp_path/'again', 'cpu')
    assert again.config == model.config | dict(note='mine') and again.score(texts[0]) == model.score(texts[0])
    del model.tokenizer
    with pytest.raises(ConfigError, match=r'no tokenizer to save; give one, as save_pretrained\(folder, tokenizer\)'): model.save_pretrained(tmp_path/'none')
    assert not (tmp_path/'none').exists()


def test_compare_takes_a_prompt_and_two_responses():
    model = build('decoder_output')
    p = model.compare(('a', 'yes'), ('a', 'no'))
    assert model.compare('a', 'yes', 'no') == model.compare([dict(role='user', content='a')], 'yes', 'no') == p
    assert [*model.compare(['a', 'a'], ['yes', 'no'], ['no', 'yes'])] == pytest.approx([p, 1 - p])
    assert model.compare(a=texts[0], b=texts[0]) == .5


def test_help_shows_the_parameters():
    for f, shown in ((RewardModel.score, 'token_budget: padded tokens at once'), (RewardModel.from_pretrained, 'device: None: the best there is'), (RewardModel.compare, 'prompt: a plain question'),
                     (RewardModel.save_pretrained, "tokenizer: None: the model's own"), (dialogue, 'returns: as HH-RLHF writes it')):
        assert shown in pydoc.render_doc(f, renderer=pydoc.plaintext)


def test_an_explanation_as_a_table_and_as_one_figure():
    why = build('layerwise_attention').explain(texts[0])
    assert [*why.table] == ['token', 'read', 'moved'] and np.array_equal(why.table.moved, why.token_effects)
    assert not re.search(r'[-+]0\.00(?!\d)', repr(why)) and repr(why).count('\n') == len(why.tokens) + 1 and '<table' in why._repr_html_()
    fig = why.plot()
    assert plt.get_fignums() == [] and [ax.get_ylabel() for ax in fig.axes if ax.get_label() == '<colorbar>'] == ['weight', 'change']
    fig.savefig(io.BytesIO())


# ---- own columns, CSV and Parquet

own = [dict(question=f'Who is {w}?', answer=a, topic=t, id=i) for i, (w, a, t) in enumerate([('it', 'It is a bird.', 'a, "b"'), ('he', 'I do not know.\nSorry.', 'c'), ('she', 'It is a fish.', 'd')])]


def own_table(path):
    if path.suffix == '.parquet': pd.DataFrame(own).to_parquet(path)
    elif path.suffix == '.jsonl': path.write_text(''.join(json.dumps(r) + '\n' for r in own), encoding='utf-8')
    else:
        text = pd.DataFrame(own).to_csv(index=False)
        if path.suffix == '.gz': path.write_bytes(gzip.compress(text.encode()))
        else: path.write_text(text, encoding='utf-8')
    return path


@pytest.mark.parametrize('name', ['x.csv', 'x.csv.gz', 'x.parquet', 'x.jsonl'])
@pytest.mark.parametrize('out', ['y.csv', 'y.jsonl'])
def test_own_columns_from_any_table_into_any(folder, tmp_path, name, out):
    args = [str(folder), str(own_table(tmp_path/name)), '--prompt', 'question', '--response', 'answer', '--keep', 'topic', '--out', str(tmp_path/out)]
    assert main(args) == 0
    text = (tmp_path/out).read_text(encoding='utf-8')
    got = [*csv.DictReader(io.StringIO(text))] if out == 'y.csv' else [json.loads(line) for line in text.splitlines()]
    want = RewardModel.from_pretrained(folder).score([r['question'] for r in own], [r['answer'] for r in own])
    assert [(str(r['id']), r['topic']) for r in got] == [(str(r['id']), r['topic']) for r in own]
    assert [float(r['reward']) for r in got] == pytest.approx([*want], abs=1e-5)
    assert [int(r['line']) for r in got] == ([2, 3, 5] if 'csv' in name else [1, 2, 3])      # where the row begins: one holds two lines
    if out == 'y.jsonl':         # resumed, byte for byte
        whole = (tmp_path/out).read_bytes()
        (tmp_path/out).write_bytes(whole[:len(whole)//2])
        assert main([*args, '--resume']) == 0 and (tmp_path/out).read_bytes() == whole


def test_keep_all(folder, tmp_path):
    for name in ('x.csv', 'x.parquet', 'x.jsonl'):
        assert main([str(folder), str(own_table(tmp_path/name)), '--prompt', 'question', '--response', 'answer', '--keep', 'all', '--out', str(tmp_path/f'{name}.out')]) == 0
        got = [json.loads(line) for line in (tmp_path/f'{name}.out').read_text().splitlines()]
        assert [{k: str(r[k]) for k in own[0]} for r in got] == [{k: str(v) for k, v in r.items()} for r in own]


def test_tables_are_refused_once_in_one_line(folder, tmp_path, capsys):
    csv_file, parquet = own_table(tmp_path/'x.csv'), own_table(tmp_path/'x.parquet')
    held = dict(twice='a,a\n1,2\n', nothing='', latin='question,answer\nWho?,\xe9\n', quote='prompt,response\nWho?,"a" b\n')
    for k, text in held.items(): (tmp_path/f'{k}.csv').write_bytes(text.encode('latin1'))
    (tmp_path/'no.parquet').write_text('no')
    (tmp_path/'cut.parquet').write_bytes(parquet.read_bytes()[:100] + b'x'*40 + parquet.read_bytes()[140:])
    (tmp_path/'x.xlsx').write_text('x')
    asked = '--prompt', 'question', '--response', 'answer'
    for args, says in (((csv_file,), "x.csv: has 'question, answer, topic, id'; a row holds text"), ((csv_file, '--prompt', 'q'), "and no 'q' and no 'response'"), ((csv_file, '--text', 'answer', '--messages', 'topic'), '--text --messages: name text, or'),
                       ((csv_file, *asked, '--keep', 'reward'), 'a column of its own of that name'), ((csv_file, *asked, '--keep', 'topik'), 'no such column'), ((tmp_path/'x.xlsx',), 'is not read here; convert it to .jsonl or .csv'),
                       ((tmp_path/'twice.csv', '--text', 'a'), "'a' stands twice"), ((tmp_path/'nothing.csv',), 'must name the columns'), ((tmp_path/'latin.csv', *asked), 'UTF-8'), ((tmp_path/'quote.csv',), 'quote.csv: line 2: no CSV'),
                       ((tmp_path/'no.parquet',), 'no Parquet file'), ((tmp_path/'cut.parquet', *asked), 'Parquet file is damaged'), ((csv_file, *asked, '--out', tmp_path/'y.parquet'), 'written as JSON lines or CSV'),
                       ((csv_file, *asked, '--out', tmp_path/'y.csv', '--resume'), 'CSV is written in one go'), ((own_table(tmp_path/'x.jsonl'), *asked, '--keep', 'all', '--out', tmp_path/'y.csv'), '--keep all: rows of JSON')):
        assert main([str(folder), *map(str, args)]) == 2, args
        said = capsys.readouterr().err.rpartition('\r')[2]
        assert said.startswith('error: ') and says in said and said.count('\n') == 1, said
    assert not (tmp_path/'y.csv').exists()


@pytest.mark.parametrize('row, says', [(dict(prompt='x'), "has only 'prompt'; a row holds text, or prompt and response, or messages"), (dict(prompt='x', completion='y'), "has 'prompt, completion'; a row holds"),
                                       (dict(prompt='x', chosen='a', rejected='b'), 'a pair, and a reward is of one text'), ({}, 'has no column'), (dict(text='a', messages=[]), "has 'text, messages'; a row holds")])
def test_what_a_row_lacks_is_said(row, says):
    with pytest.raises(ConfigError) as e: text_of(row)
    assert says in str(e.value)


@pytest.mark.parametrize('allowed, code', [('0', 1), ('1', 1), ('2', 0), ('0.1', 1), ('0.2', 0)])
def test_some_bad_lines_are_allowed(folder, tmp_path, capsys, allowed, code):
    (tmp_path/'in.jsonl').write_bytes(rows(8) + b'7\n{"text": 3}\n')
    assert main([str(folder), str(tmp_path/'in.jsonl'), '--max-bad-lines', allowed]) == code
    said = capsys.readouterr()
    assert said.out.count('"error"') == 2 and 'line 9: ' in said.err and '10 lines, 8 scored, 2 bad' in said.err


@pytest.mark.parametrize('allowed', ['-1', '1.5', 'few'])
def test_bad_lines_are_a_number_or_a_share(allowed, capsys):
    with pytest.raises(SystemExit) as e: main(['model', '--max-bad-lines', allowed])
    assert e.value.code == 2 and '--max-bad-lines' in capsys.readouterr().err
