"A card that says what the run's files say, adapters merged on export, and, where they are installed, TRL's trainers and RewardBench's loop."
import gzip, http.server, json, os, re, shutil, subprocess, sys, threading
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from conftest import root, summary_of
from test_score import build
from transformers import AutoModel
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.hub import resolve_folder
from rlhf_flant5.data.pairs import turns
from rlhf_flant5.data.baselines import BASELINES
from rlhf_flant5.metrics.accuracy import pair_scores, pair_table, write_pair_table
from rlhf_flant5.data.dialogue import dialogue
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.publish import main, push_to_hub
from rlhf_flant5.use.card import model_card
from rlhf_flant5.use.elsewhere import export_backbone, reward_function, rewardbench_entry
from rlhf_flant5.use.facts import read_facts
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer


def model_with_adapters():
    "Its adapters are as if trained: the second of their factors begins at zero."
    model = build('layerwise_attention', lora=dict(r=2, alpha=4, target_modules=['q', 'v']))
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=.5)
    return model


def write_results(run, pairs):
    "Ten pairs, seven of them right by 1, one a tie, two wrong by 1."
    subsets = ['harmless-base']*5 + ['helpful-base']*5
    chosen, rejected = [2.]*7 + [1.] + [0.]*2, [1.]*10
    table = pair_table(pairs['id'][:], subsets, chosen, rejected, [9]*10, [8]*10, [5]*10)
    write_pair_table(table, run/'results'/'test_pairs.jsonl')
    scores = pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    summary = dict(
        readout='layerwise_attention', transformer_name='google/flan-t5-small', precision='fp32', seed=7,
        train_transformer=True, n_trained_parameters=1234, n_parameters=56789, n_batches=40, best_batch=30,
        best_reachable_accuracy=None, validation=scores, test=scores)
    (run/'results'/'summary.json').write_text(json.dumps(summary))


def write_data(run, pairs):
    "What was read, from where, by which command, and the texts of the test pairs."
    counts = {'harmless-base/train': {'read': 1200, 'too long': 34}}
    origin = dict(device='cuda', source=dict(version='0.1.0', commit='c0ffee', dirty=True))
    (run/'data'/'counts.json').write_text(json.dumps(counts))
    (run/'data'/'provenance.json').write_text(json.dumps(origin))
    (run/'data'/'command.txt').write_text('python -m rlhf_flant5.train index=0\n')
    with gzip.open(run/'data'/'test_texts.jsonl.gz', 'wt') as f:
        for row in pairs: f.write(json.dumps({k: row[k] for k in ('id', 'chosen', 'rejected')}) + '\n')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run's folder, written by hand."
    run, pairs = tmp_path_factory.mktemp('runs')/'desc-by-hand,index-0', toy_pairs(10, split='test')
    for d in ('data', 'results', 'simulation'): (run/d).mkdir(parents=True)
    write_data(run, pairs)
    write_results(run, pairs)
    model = model_with_adapters()
    trained_on = dict(name='Anthropic/hh-rlhf', subdirs=['harmless-base', 'helpful-base'], counts={})
    model.save_pretrained(run/'simulation'/'best_model', model.tokenizer,
                          max_tokens=128, temperature=2., trained_on=trained_on)
    return run


@pytest.fixture()
def copy(run, tmp_path): return shutil.copytree(run, tmp_path/run.name)


def change(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_card_says_what_the_files_say(run):
    card = re.sub(' +', ' ', model_card(run, 'me/it', 'mit'))
    expected = [
        'license: "mit"', 'base_model: "google/flan-t5-small"', 'datasets: ["Anthropic/hh-rlhf"]',
        '| **this model** | 75.0 (42.4 to 92.4) | 100.0 (56.6 to 100.0) | 50.0 (', '| longer reply |',
        'T = 2.000', '1,200 read, 34 too long', 'Seed 7, 40 batches',
        '`c0ffee`, with uncommitted changes, on cuda', 'python -m rlhf_flant5.train index=0',
        "from_pretrained('me/it')", 'offensive', 'not a safety filter']
    assert [text for text in expected if text not in card] == []
    assert 'toy world' not in card and 'No model can reach' not in card


def test_card_of_a_trained_run(trained_run):
    "What a real run writes is enough for its card."
    card = re.sub(' +', ' ', model_card(trained_run, 'me/it', 'mit'))
    accuracy = summary_of(trained_run)['test']['accuracy']
    assert f'| **this model** | {100*accuracy:.1f} (' in card
    assert 'toy world' in card and 'No model can reach' in card


def test_brier_score_by_hand(run):
    "At T = 2: seven right by 1, a tie, two wrong by 1."
    sure, unsure = 1 - 1/(1 + np.exp(-1/2)), 1 - 1/(1 + np.exp(1/2))
    brier = (7*sure**2 + .25 + 2*unsure**2)/10
    card = re.sub(' +', ' ', model_card(run, 'me/it', 'mit'))
    assert '| T = 2.000 | ' in card and f'{brier:.4f}' in card


def test_card_of_other_data_and_of_a_local_folder(copy):
    (copy/'data'/'counts.json').write_text('{"mine/train": {"read": 3}}')
    change(copy/'results'/'summary.json', transformer_name='/home/me/models/t5')
    change(copy/'simulation'/'best_model'/'config.json', trained_on=dict(name='~/secret/pairs'))
    (copy/'data'/'command.txt').write_text(
        "/home/me/bin/python -m rlhf_flant5.train data.name=~/secret/pairs "
        "'model.transformer_name=/home/me/my models/t5' a=../../me/x 'b=[/home/me/y,x/../../me/z]' c=a/b d=1e-3 "
        "e=https://x.org/a f=file:///home/me/g\n")
    card = model_card(copy, license='mit')
    not_said = ['offensive', 'English', 'language', 'base_model', 'datasets']
    not_shown = ['home', 'secret', 'my models', '../', '/me/']
    assert [word for word in not_said + not_shown if word in card] == []
    assert ("…/python' -m rlhf_flant5.train 'data.name=…/pairs' 'model.transformer_name=…/t5' 'a=…/x' "
            "'b=[…/y,…/z]' c=a/b d=1e-3 e=https://x.org/a 'f=file:…/g'") in card


# ---- damaged runs

TEXTS, SUMMARY, COMMAND = 'data/test_texts.jsonl.gz', 'results/summary.json', 'data/command.txt'
COUNTS, ORIGIN, CONFIG = 'data/counts.json', 'data/provenance.json', 'simulation/best_model/config.json'

def is_refused(run, says):
    with pytest.raises(ConfigError) as e: model_card(run)
    assert says in str(e.value) and '\n' not in str(e.value)


def test_a_whole_run_is_not_refused(copy): model_card(copy)


@pytest.mark.parametrize('damage', [
    pytest.param(lambda data: data[:20] + b'x'*30 + data[50:], id='bytes changed'),
    pytest.param(lambda data: data[:-9], id='cut off')])
def test_damaged_texts_are_refused_in_one_line(copy, damage):
    data = (copy/TEXTS).read_bytes()
    (copy/TEXTS).write_bytes(damage(data))
    is_refused(copy, 'cut off or damaged')


@pytest.mark.parametrize('edit, says', [
    pytest.param(lambda rows: rows.replace(b'"id"', b'"no"'), 'no id', id='no id'),
    pytest.param(lambda rows: rows.replace(b'"id": "', b'"id": "x'), 'not the texts of the pairs', id='other ids'),
    pytest.param(lambda rows: b'3\n', 'must be a JSON object', id='a number')])
def test_other_texts_are_refused_in_one_line(copy, edit, says):
    rows = gzip.decompress((copy/TEXTS).read_bytes())
    (copy/TEXTS).write_bytes(gzip.compress(edit(rows)))
    is_refused(copy, says)


@pytest.mark.parametrize('name', [TEXTS, COMMAND])
def test_a_file_that_is_gone_is_refused_in_one_line(copy, name):
    (copy/name).unlink()
    is_refused(copy, 'cannot be read')


@pytest.mark.parametrize('name, held, says', [
    pytest.param(COMMAND, b"a 'b", 'no command', id='no command'),
    pytest.param(COUNTS, b'{"a": {"read": "many"}}', 'must hold a whole number', id='a count in words')])
def test_a_damaged_file_is_refused_in_one_line(copy, name, held, says):
    (copy/name).write_bytes(held)
    is_refused(copy, says)


@pytest.mark.parametrize('name, key, value', [
    (SUMMARY, 'seed', None), (SUMMARY, 'seed', '7'), (SUMMARY, 'validation', []),
    (SUMMARY, 'best_reachable_accuracy', 'x'), (ORIGIN, 'source', None), (ORIGIN, 'device', 3),
    (CONFIG, 'temperature', 'x'), (CONFIG, 'trained_on', [])])
def test_a_value_that_no_run_writes_is_refused_in_one_line(copy, name, key, value):
    change(copy/name, **{key: value})
    is_refused(copy, f'{key} missing or not what a run writes')


# ---- to the hub

class Api:
    "Keeps what the hub is sent."
    def __init__(self, **_): pass
    def create_repo(self, *_, **__): pass
    def create_commit(self, repo, operations, **_):
        Api.sent = sorted(o.path_in_repo for o in operations)
        return SimpleNamespace(commit_url='there')


def test_what_goes_to_the_hub(copy, monkeypatch):
    monkeypatch.setattr('rlhf_flant5.publish.HfApi', Api)
    folder = copy/'simulation'/'best_model'
    (folder/'notes.txt').write_text('mine')
    (folder/'tokenizer'/'.env').write_text('mine')
    push_to_hub(copy, 'me/it', token='x')
    assert Api.sent == ['README.md', 'config.json', 'model.safetensors',
                        'tokenizer/tokenizer.json', 'tokenizer/tokenizer_config.json']


def test_no_link_goes_to_the_hub(copy, tmp_path, monkeypatch):
    "Neither a file that is a link, nor one that lies behind a link."
    monkeypatch.setattr('rlhf_flant5.publish.HfApi', Api)
    link = copy/'simulation'/'best_model'/'tokenizer'/'tokenizer_x.json'
    (tmp_path/'secret').write_text('{}')
    link.symlink_to(tmp_path/'secret')
    with pytest.raises(ConfigError, match='tokenizer_x.json: a link'): push_to_hub(copy, 'me/it', token='x')
    link.unlink()
    (copy/'simulation').rename(tmp_path/'away')
    (copy/'simulation').symlink_to(tmp_path/'away')
    with pytest.raises(ConfigError, match='best_model: a link, or behind one'): push_to_hub(copy, 'me/it', token='x')


def test_not_logged_in(run, monkeypatch):
    monkeypatch.setattr('rlhf_flant5.publish.get_token', lambda: None)
    with pytest.raises(ConfigError, match='not logged in'): push_to_hub(run, 'me/it')


# ---- the program

@pytest.mark.parametrize('what, path, says', [
    pytest.param('export', 'file/t5', 'file', id='below a file'),
    pytest.param('export', 'x'*300, 'too long', id='export, long name'),
    pytest.param('card', 'x'*300, 'too long', id='card, long name')])
def test_program_refuses_a_path_in_one_line(copy, tmp_path, capsys, what, path, says):
    (tmp_path/'file').write_text('')
    model = [str(copy/'simulation'/'best_model')] if what == 'export' else []
    assert main([what, *model, str(tmp_path/path)]) == 2
    said = capsys.readouterr().err.rpartition('\r')[2]
    assert re.search(r'^(.*\n)?error: .*\n$', said), said
    assert says in said and '.new-' not in said and 'Traceback' not in said, said


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_program_on_a_full_disk(copy):
    command = [sys.executable, '-m', 'rlhf_flant5.publish', 'card', str(copy)]
    env = os.environ | {'PYTHONPATH': str(root)}
    with open('/dev/full', 'w') as full:
        res = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert (res.returncode, res.stderr) == (1, 'failed: the system: No space left on device\n')


def test_program_interrupted_leaves_nothing(copy, tmp_path, monkeypatch, capsys):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr('rlhf_flant5.use.elsewhere._merge', stop)
    assert main(['export', str(copy/'simulation'/'best_model'), str(tmp_path/'t5')]) == 75
    assert capsys.readouterr().err == 'interrupted (SIGINT)\n'
    assert [p.name for p in tmp_path.iterdir()] == [copy.name]


# ---- a plain T5

def test_exported_encoder_has_its_adapters_merged(run, tmp_path):
    from transformers import AutoModelForTextEncoding
    folder = read_facts(run).folder
    export_backbone(folder, tmp_path/'t5')
    model = RewardModel.from_pretrained(folder, 'cpu')
    plain = AutoModelForTextEncoding.from_pretrained(tmp_path/'t5').eval()
    assert not [name for name in plain.state_dict() if 'lora' in name]
    ids = torch.tensor(model.token_ids(toy_pairs(1)['chosen'][:]))
    with torch.no_grad():
        ours = model.backbone(ids, torch.ones_like(ids), 1).tokens[-1]
        theirs = plain(input_ids=ids).last_hidden_state[0]
    assert (ours - theirs).abs().max() < 1e-4


def test_exported_decoder(tmp_path):
    model = build('decoder_output')
    model.save_pretrained(tmp_path/'d', model.tokenizer)
    export_backbone(tmp_path/'d', tmp_path/'d5')
    plain = AutoModel.from_pretrained(tmp_path/'d5').eval()
    ids, start = torch.tensor(model.token_ids(toy_pairs(1)['chosen'][:])), torch.zeros(1, 1, dtype=int)
    with torch.no_grad():
        ours = model.backbone(ids, torch.ones_like(ids)).decoder[-1]
        theirs = plain(input_ids=ids, decoder_input_ids=start).last_hidden_state[0]
    assert (ours - theirs).abs().max() < 1e-4


# ---- in other people's programs

def random_policy():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}\n\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    return LlamaForCausalLM(config), tokenizer


def questions(chat):
    asked = [f'Where is {x}?' for x in ('Ghana', 'Mali', 'Nepal', 'Italy')]
    if chat: asked = [[dict(role='user', content=question)] for question in asked]
    return Dataset.from_dict(dict(prompt=asked))


@pytest.mark.parametrize('method, chat', [('GRPO', False), ('GRPO', True), ('RLOO', False)])
def test_in_trl_for_real(method, chat, tmp_path):
    "A few steps with a tiny random policy: what the trainer logs is what the model says of what was sampled."
    trl = pytest.importorskip('trl', reason='TRL is not installed')
    torch.manual_seed(0)
    policy, tokenizer = random_policy()
    model, seen = build('attention_pooled_encoder'), []
    before = model.score('Who?', 'I do not know.')
    reward = reward_function(model)
    def watched(prompts, completions, **kwargs):
        rewards = reward(prompts, completions, **kwargs)
        seen.append((prompts, completions, rewards))
        return rewards
    args = getattr(trl, f'{method}Config')(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=3, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy='no',
        disable_tqdm=True, learning_rate=1e-2)
    weights = policy.lm_head.weight.clone()
    trainer = getattr(trl, f'{method}Trainer')(
        model=policy, reward_funcs=watched, args=args, train_dataset=questions(chat), processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 3
    assert (policy.lm_head.weight - weights.to(policy.device)).abs().max() > 0
    for (prompts, completions, rewards), log in zip(seen, trainer.state.log_history):
        assert log['reward'] == pytest.approx(np.mean(rewards), abs=1e-4)
        assert isinstance(completions[0], list if chat else str)
        own = [model.score(dialogue(p, c)) for p, c in zip(prompts, completions)]
        assert rewards == pytest.approx(own, abs=1e-5)
    assert model.score('Who?', 'I do not know.') == before


def as_messages(text):
    roles = dict(Human='user', Assistant='assistant')
    return [dict(role=roles[who], content=content) for who, content in turns(text)]


def test_in_rewardbench_for_real(run, tmp_path, monkeypatch):
    "Its main loop on a file of pairs. Its own table of models is left out: its modules are written for other versions of transformers."
    pytest.importorskip('fastchat', reason='RewardBench is not installed')
    no_models = SimpleNamespace(REWARD_MODEL_CONFIG={}, DPO_MODEL_CONFIG={})
    monkeypatch.setitem(sys.modules, 'rewardbench.models', no_models)
    bench = pytest.importorskip('rewardbench.rewardbench', reason='RewardBench is not installed')
    monkeypatch.chdir(tmp_path)
    folder, pairs = str(read_facts(run).folder), toy_pairs(30)
    export_backbone(folder, tmp_path/'t5')
    bench.REWARD_MODEL_CONFIG[folder] = rewardbench_entry()
    rows = [json.dumps({side: as_messages(p[side]) for side in ('chosen', 'rejected')}) for p in pairs]
    (tmp_path/'rows.json').write_text('\n'.join(rows))
    bench.rewardbench(bench.Args(
        dataset=str(tmp_path/'rows.json'), load_json=True, model=folder, tokenizer=str(tmp_path/'t5'),
        output_dir='out/', save_all=True))
    got = [json.loads(line) for line in next(tmp_path.rglob('*_all.jsonl')).read_text().splitlines()]
    model = RewardModel.from_pretrained(folder)
    for side in ('chosen', 'rejected'):
        assert np.abs([r[side] for r in got] - model.score(pairs[side][:])).max() < 1e-5


# ---- what the hub answers

class Hub(http.server.BaseHTTPRequestHandler):
    "Answers `create` to the making of a repository, and `commit` to all that follows."
    create = commit = 200
    def log_message(self, *args): pass
    def answer(self, status, body):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        if self.path == '/api/validate-yaml': return self.answer(200, b'{"errors": [], "warnings": []}')
        status = self.create if self.path.endswith('/create') else self.commit
        self.answer(status, json.dumps(dict(error='no', url='http://localhost/me/it', files=[])).encode())


@pytest.fixture
def hub(monkeypatch):
    "A hub's address; `Hub.create` and `Hub.commit` say what it answers."
    monkeypatch.setattr('time.sleep', lambda *_: None)         # between the client's tries
    server = http.server.ThreadingHTTPServer(('localhost', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://localhost:{server.server_port}'
    server.shutdown()
    server.server_close()


NO_UPDATE = 'no such repository, or none that you may see; to make a new one, do not ask for an update'

@pytest.mark.parametrize('create, commit, args, says', [
    (401, 200, [], 'the hub does not know you (401); log in with `hf auth login`'),
    (403, 200, [], 'does not let you write there (403)'),
    (404, 200, [], 'the hub has no such place (404); what stands before the slash'),
    (409, 200, [], 'is there already; update it (--update, in Python update=True)'),
    (503, 200, [], 'the hub answered 503, it is overloaded or down; try again later'),
    (400, 200, [], 'the hub answered 400'),
    (200, 503, [], 'down; try again later. The repository was made and is empty: go on with --update'),
    (200, 409, ['--update'], 'another commit came in between (409)'),
    (200, 404, ['--update'], NO_UPDATE),
    (200, 401, ['--update'], 'does not know you')])
def test_what_the_hub_answers_is_one_line_with_its_remedy(run, hub, monkeypatch, capsys, create, commit, args, says):
    monkeypatch.setattr(Hub, 'create', create)
    monkeypatch.setattr(Hub, 'commit', commit)
    monkeypatch.setattr('rlhf_flant5.publish.HfApi', lambda **_: HfApi(endpoint=hub, token='x'))
    monkeypatch.setattr('rlhf_flant5.publish.get_token', lambda: 'x')
    assert main(['push', str(run), 'me/it', *args]) == 2
    said = capsys.readouterr().err.rpartition('\r')[2]
    assert said.startswith('error: me/it: ') and said.count('\n') == 1, said
    assert says in said and 'token=' not in said, said


class Lists(Hub):
    "Lists a file that lies out of the folder into which it is fetched."
    def do_GET(self):
        outside = dict(type='file', path='tokenizer/../../../evil.json', size=2, oid='a'*40)
        repo = dict(id='me/it', sha='1'*40, siblings=[], private=False, tags=[])
        self.answer(200, json.dumps([outside] if '/tree/' in self.path else repo).encode())


def test_a_hub_that_lists_a_path_out_of_its_folder(tmp_path, monkeypatch):
    "Nothing is written there, and it is said why, not that there is no network."
    server = http.server.ThreadingHTTPServer(('localhost', 0), Lists)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there, cache = f'http://localhost:{server.server_port}', tmp_path/'a'/'b'/'c'
    monkeypatch.setattr('rlhf_flant5.core.hub.HfApi', partial(HfApi, endpoint=there))
    download = partial(snapshot_download, endpoint=there, cache_dir=cache)
    monkeypatch.setattr('rlhf_flant5.core.hub.snapshot_download', download)
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match='what the hub lists is refused .*cannot contain a'):
                resolve_folder('me/it', 'model', ['tokenizer/*'], ['tokenizer'])
    finally:
        server.shutdown()
        server.server_close()
    assert not [*tmp_path.rglob('evil.json')]


# ---- the card as the hub reads it, and foreign text in it

def test_card_head_is_what_the_hub_reads(run):
    data = ModelCard(model_card(run, 'me/it')).data
    assert data.pipeline_tag == 'text-classification' and data.model_name == 'me/it'
    result, = data.eval_results
    assert (result.dataset_type, result.dataset_split) == ('Anthropic/hh-rlhf', 'test')
    assert (result.metric_type, result.metric_value) == ('accuracy', .75)


def fill_with(run, text):
    "Put `text` wherever a run's files hold words."
    (run/COUNTS).write_text(json.dumps({f'{text}/train': {text: 3}}))
    change(run/SUMMARY, transformer_name=text, precision=text, readout=text)
    change(run/CONFIG, trained_on=dict(name=text))
    change(run/ORIGIN, device=text, source=dict(version=text, commit=text, dirty=False))
    table = run/'results'/'test_pairs.jsonl'
    rows = [json.loads(line) | dict(subset=text) for line in table.read_text().splitlines()]
    table.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_card_shows_foreign_text_as_it_is(copy):
    fill_with(copy, '<img src=http://x/y>[a](http://b)![c](d)`*e')
    command = "python -m x 'a=```' b=\x1b[31m\x07 c=\u202e '\n```\n<img src=z>'\n"
    (copy/COMMAND).write_text(command, encoding='utf-8')
    card = model_card(copy, 'me/it')
    assert all(c.isprintable() or c == '\n' for c in card)
    _, head, body = card.split('---\n', 2)
    assert head.count('\n') == len(head.splitlines())

    # a fence that is longer than what stands in it
    block = re.search(r'^(````+)\n(.*)\n\1$', body, re.M)
    assert block and '```' in block[2] and '\n' not in block[2]
    words = re.sub(r'(?<!\\)`[^`\n]+`', '', body.replace(block[0], ''))      # what is not code
    assert '<img' not in words and '&lt;img' in words
    assert not re.search(r'(?<!\\)[\[`]', words.partition('## Use')[0])


def test_rules_that_tie_on_all_pairs_are_left_out(copy):
    card = model_card(copy)
    tied = card.partition('Left out, since they tie on all of these pairs: ')[2].partition('.')[0].split(', ')
    assert {*tied} <= {*BASELINES}
    with gzip.open(copy/TEXTS, 'rt', encoding='utf-8') as f: rows = [json.loads(line) for line in f]
    rows = [*{row['id']: row for row in rows}.values()]
    for name, rule in BASELINES.items():
        chosen, rejected = rule([row['chosen'] for row in rows]), rule([row['rejected'] for row in rows])
        assert (chosen == rejected).all() == (name in tied)
        assert (f'| {name} ' in card) == (name not in tied)


def test_exported_files_follow_the_umask(run, tmp_path):
    old = os.umask(0o027)
    try: export_backbone(read_facts(run).folder, tmp_path/'t5')
    finally: os.umask(old)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path/'t5').iterdir()}
    assert modes == {'0o640'} and (tmp_path/'t5').stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize('asked, gone', [(['query'], 'query'), (['q', 'values'], 'values')])
def test_adapters_for_layers_that_are_not_there(asked, gone):
    says = f"this T5 has no linear layer '{gone}'; it has k, o, q, v, wi_0, wi_1, wo"
    with pytest.raises(ConfigError, match=says):
        build('layerwise_attention', lora=dict(r=2, alpha=4, target_modules=asked))


# ---- an average of runs

def test_the_average_of_a_run_and_its_copy_is_the_run(trained_run, tmp_path, capsys):
    twin = shutil.copytree(trained_run, tmp_path/'Reward-Model-Training'/trained_run.name)
    assert main(['average', str(trained_run), str(twin), str(tmp_path/'mean'), '--device', 'cpu']) == 0
    said = capsys.readouterr().out
    assert said.count('run     ') == 2 and f'evaluate {tmp_path/"mean"} PAIRS' in said and 'note' not in said
    own, mean = (RewardModel.from_pretrained(folder, 'cpu') for folder in (trained_run, tmp_path/'mean'))
    texts = toy_pairs(9)['chosen'][:]
    assert mean.score(texts).tolist() == own.score(texts).tolist()
    summary = summary_of(trained_run)
    assert mean.config['temperature'] == pytest.approx(summary['temperature'], rel=1e-3)
    assert mean.config['reward_mean'] == pytest.approx(summary['reward_mean'], abs=1e-4)
    assert mean.config['averaged'] == 2 and 'test' not in mean.config
    assert f'{100*summary["validation"]["accuracy"]:.1f}% of the' in said


def test_what_can_not_be_averaged(trained_run, tmp_path, capsys):
    twin = shutil.copytree(trained_run, tmp_path/'Reward-Model-Training'/trained_run.name)
    def fails(says, *folders, out=tmp_path/'mean'):
        assert main(['average', *map(str, folders), str(out)]) == 2
        assert says in capsys.readouterr().err and not (tmp_path/'mean').exists()
    fails('one run; an average needs two', trained_run)
    fails('exists; name a new folder', trained_run, twin, out=twin)
    settings = twin/'data'/'config.yaml'
    settings.write_text(settings.read_text().replace('init_lr:', 'init_lr: 0.5 #'))
    fails('another recipe than', trained_run, twin)
    (twin/'results'/'summary.json').unlink()
    fails('not finished', trained_run, twin)


def test_other_seeds_are_noted(trained_run, tmp_path, capsys):
    twin = shutil.copytree(trained_run, tmp_path/'Reward-Model-Training'/trained_run.name)
    change(twin/'results'/'summary.json', seed=summary_of(trained_run)['seed'] + 1)
    assert main(['average', str(trained_run), str(twin), str(tmp_path/'mean'), '--device', 'cpu']) == 0
    assert ': each readout began elsewhere' in capsys.readouterr().out
