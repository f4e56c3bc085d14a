"A card that says what the run's files say, adapters merged on export, and, where they are installed, TRL's trainers and RewardBench's loop."
import gzip, http.server, json, os, re, shutil, subprocess, sys, threading
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from conftest import root
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


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run's folder, written by hand: ten pairs, seven of them right, one a tie."
    run = tmp_path_factory.mktemp('runs')/'desc-by-hand,index-0'; model = build('layerwise_attention', lora=dict(r=2, alpha=4, target_modules=['q', 'v'])); pairs = toy_pairs(10, split='test')
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=.5)
    for d in ('data', 'results', 'simulation'): (run/d).mkdir(parents=True)
    table = pair_table(pairs['id'][:], ['harmless-base']*5 + ['helpful-base']*5, [2.]*7 + [1.] + [0.]*2, [1.]*10, [9]*10, [8]*10, [5]*10); write_pair_table(table, run/'results'/'test_pairs.jsonl')
    scores = pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    model.save_pretrained(run/'simulation'/'best_model', model.tokenizer, max_tokens=128, temperature=2., trained_on=dict(name='Anthropic/hh-rlhf', subdirs=['harmless-base', 'helpful-base'], counts={}))
    (run/'results'/'summary.json').write_text(json.dumps(dict(readout='layerwise_attention', seed=7, transformer_name='google/flan-t5-small', best_reachable_accuracy=None, train_transformer=True, n_trained_parameters=1234, n_parameters=56789,
        n_batches=40, best_batch=30, validation=scores, test=scores, precision='fp32')))
    (run/'data'/'counts.json').write_text(json.dumps({'harmless-base/train': {'read': 1200, 'too long': 34}}))
    (run/'data'/'provenance.json').write_text(json.dumps(dict(device='cuda', source=dict(version='0.1.0', commit='c0ffee', dirty=True))))
    (run/'data'/'command.txt').write_text('python -m rlhf_flant5.train index=0\n')
    with gzip.open(run/'data'/'test_texts.jsonl.gz', 'wt') as f: f.writelines(json.dumps({k: r[k] for k in ('id', 'chosen', 'rejected')}) + '\n' for r in pairs)
    return run


def test_card_says_what_the_files_say(run):
    card = re.sub(' +', ' ', model_card(run, 'me/it', 'mit'))
    for said in ('license: "mit"', 'base_model: "google/flan-t5-small"', 'datasets: ["Anthropic/hh-rlhf"]', '| **this model** | 75.0 (42.4 to 92.4) | 100.0 (56.6 to 100.0) | 50.0 (', '| longer reply |', 'T = 2.000', '1,200 read, 34 too long',
                 'Seed 7, 40 batches', '`c0ffee`, with uncommitted changes, on cuda', 'python -m rlhf_flant5.train index=0', "from_pretrained('me/it')", 'offensive', 'not a safety filter'): assert said in card, said
    assert 'toy world' not in card and 'No model can reach' not in card
    sure, unsure = (1 - 1/(1 + np.exp(-m/2)) for m in (1, -1))                                # Brier at T = 2, by hand: seven right by 1, a tie, two wrong by 1
    assert '| T = 2.000 | ' in card and f'{(7*sure**2 + .25 + 2*unsure**2)/10:.4f}' in card


@pytest.fixture()
def copy(run, tmp_path): return shutil.copytree(run, tmp_path/run.name)


def change(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_card_of_other_data_and_of_a_local_folder(copy):
    (copy/'data'/'counts.json').write_text('{"mine/train": {"read": 3}}')
    change(copy/'results'/'summary.json', transformer_name='/home/me/models/t5'); change(copy/'simulation'/'best_model'/'config.json', trained_on=dict(name='~/secret/pairs'))
    (copy/'data'/'command.txt').write_text("/home/me/bin/python -m rlhf_flant5.train data.name=~/secret/pairs 'model.transformer_name=/home/me/my models/t5' a=../../me/x 'b=[/home/me/y,x/../../me/z]' c=a/b d=1e-3 e=https://x.org/a f=file:///home/me/g\n")
    card = model_card(copy, license='mit')
    assert not [word for word in ('offensive', 'English', 'language', 'home', 'secret', 'my models', '../', '/me/', 'base_model', 'datasets') if word in card]
    assert "…/python' -m rlhf_flant5.train 'data.name=…/pairs' 'model.transformer_name=…/t5' 'a=…/x' 'b=[…/y,…/z]' c=a/b d=1e-3 e=https://x.org/a 'f=file:…/g'" in card


def test_damaged_runs_are_refused_in_one_line(copy):
    texts, summary, command = copy/'data'/'test_texts.jsonl.gz', copy/'results'/'summary.json', copy/'data'/'command.txt'; data, rows = texts.read_bytes(), gzip.decompress(texts.read_bytes())
    origin, config = copy/'data'/'provenance.json', copy/'simulation'/'best_model'/'config.json'
    cases = [(texts, d, says) for d, says in ((None, 'cannot be read'), (data[:20] + b'x'*30 + data[50:], 'cut off or damaged'), (data[:-9], 'cut off or damaged'), (gzip.compress(rows.replace(b'"id"', b'"no"')), 'no id'),
             (gzip.compress(rows.replace(b'"id": "', b'"id": "x')), 'not the texts of the pairs'), (gzip.compress(b'3\n'), 'must be a JSON object'))]
    cases += [(command, None, 'cannot be read'), (command, b"a 'b", 'no command'), (copy/'data'/'counts.json', b'{"a": {"read": "many"}}', 'must hold a whole number')]
    for path, bad in ((summary, dict(seed=None)), (summary, dict(seed='7')), (summary, dict(validation=[])), (summary, dict(best_reachable_accuracy='x')), (origin, dict(source=None)), (origin, dict(device=3)), (config, dict(temperature='x')), (config, dict(trained_on=[]))):
        cases.append((path, json.dumps(json.loads(path.read_text()) | bad).encode(), f'{[*bad][0]} missing or not what a run writes'))
    for path, held, says in cases:
        whole = path.read_bytes(); path.unlink()
        if held is not None: path.write_bytes(held)
        with pytest.raises(ConfigError) as e: model_card(copy)
        assert says in str(e.value) and '\n' not in str(e.value); path.write_bytes(whole)
    model_card(copy)


class Api:
    "What the hub is told."
    def __init__(self, **_): pass
    def create_repo(self, *_, **__): pass
    def create_commit(self, repo, operations, **_): Api.sent = sorted(o.path_in_repo for o in operations); return SimpleNamespace(commit_url='there')


def test_what_goes_to_the_hub(copy, tmp_path, monkeypatch):
    monkeypatch.setattr('rlhf_flant5.publish.HfApi', Api); folder = copy/'simulation'/'best_model'
    (folder/'notes.txt').write_text('mine'); (folder/'tokenizer'/'.env').write_text('mine')
    push_to_hub(copy, 'me/it', token='x'); assert Api.sent == ['README.md', 'config.json', 'model.safetensors', 'tokenizer/tokenizer.json', 'tokenizer/tokenizer_config.json']
    (tmp_path/'secret').write_text('{}'); (folder/'tokenizer'/'tokenizer_x.json').symlink_to(tmp_path/'secret')
    with pytest.raises(ConfigError, match='tokenizer_x.json: a link'): push_to_hub(copy, 'me/it', token='x')
    (folder/'tokenizer'/'tokenizer_x.json').unlink(); (copy/'simulation').rename(tmp_path/'away'); (copy/'simulation').symlink_to(tmp_path/'away')
    with pytest.raises(ConfigError, match='best_model: a link, or behind one'): push_to_hub(copy, 'me/it', token='x')


def test_program_says_in_one_line_what_stops_it(copy, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').write_text(''); folder = str(copy/'simulation'/'best_model')
    for args, says in ((['export', folder, str(tmp_path/'file'/'t5')], 'file'), (['export', folder, str(tmp_path/('x'*300))], 'too long'), (['card', str(tmp_path/('x'*300))], 'too long')):
        assert main(args) == 2; said = capsys.readouterr().err.rpartition('\r')[2]; assert re.search(r'^(.*\n)?error: .*\n$', said) and says in said and '.new-' not in said and 'Traceback' not in said, said
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full: res = subprocess.run([sys.executable, '-m', 'rlhf_flant5.publish', 'card', str(copy)], stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(root)})
        assert (res.returncode, res.stderr) == (1, 'failed: the system: No space left on device\n')
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr('rlhf_flant5.use.elsewhere._merge', stop)
    assert main(['export', folder, str(tmp_path/'t5')]) == 75 and capsys.readouterr().err == 'interrupted (SIGINT)\n' and not [p.name for p in tmp_path.iterdir() if p.name not in ('file', copy.name)]


def test_not_logged_in(run, monkeypatch):
    monkeypatch.setattr('rlhf_flant5.publish.get_token', lambda: None)
    with pytest.raises(ConfigError, match='not logged in'): push_to_hub(run, 'me/it')


def test_exported_backbone_has_its_adapters_merged(run, tmp_path):
    from transformers import AutoModelForTextEncoding
    folder = read_facts(run).folder; export_backbone(folder, tmp_path/'t5'); model = RewardModel.from_pretrained(folder, 'cpu'); plain = AutoModelForTextEncoding.from_pretrained(tmp_path/'t5').eval()
    ids = torch.tensor(model.token_ids(toy_pairs(1)['chosen'][:])); assert not [n for n in plain.state_dict() if 'lora' in n]
    with torch.no_grad(): ours, theirs = model.backbone(ids, torch.ones_like(ids), 1).tokens[-1], plain(input_ids=ids).last_hidden_state[0]
    assert (ours - theirs).abs().max() < 1e-4
    both = build('decoder_output'); both.save_pretrained(tmp_path/'d', both.tokenizer); export_backbone(tmp_path/'d', tmp_path/'d5'); plain = AutoModel.from_pretrained(tmp_path/'d5').eval()
    with torch.no_grad(): assert (both.backbone(ids, torch.ones_like(ids)).decoder[-1] - plain(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=int)).last_hidden_state[0]).abs().max() < 1e-4


@pytest.mark.parametrize('method, chat', [('GRPO', False), ('GRPO', True), ('RLOO', False)])
def test_in_trl_for_real(method, chat, tmp_path):
    "A few steps with a tiny random policy: what the trainer logs is what the model says of what was sampled."
    trl = pytest.importorskip('trl', reason='TRL is not installed')
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0); tokenizer = toy_tokenizer(); tokenizer.chat_template = "{% for m in messages %}\n\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, eos_token_id=1))
    model, seen = build('attention_pooled_encoder'), []; before = model.score('Who?', 'I do not know.')
    reward = reward_function(model)
    def watched(prompts, completions, **kwargs): seen.append((prompts, completions, reward(prompts, completions, **kwargs))); return seen[-1][2]
    asked = [f'Where is {x}?' for x in ('Ghana', 'Mali', 'Nepal', 'Italy')]
    data = Dataset.from_dict(dict(prompt=[[dict(role='user', content=a)] for a in asked] if chat else asked))
    args = getattr(trl, f'{method}Config')(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=3, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy='no', disable_tqdm=True, learning_rate=1e-2)
    weights = policy.lm_head.weight.clone(); trainer = getattr(trl, f'{method}Trainer')(model=policy, reward_funcs=watched, args=args, train_dataset=data, processing_class=tokenizer); trainer.train()
    assert len(seen) == 3 and (policy.lm_head.weight - weights.to(policy.device)).abs().max() > 0
    for (prompts, completions, rewards), log in zip(seen, trainer.state.log_history):
        assert log['reward'] == pytest.approx(np.mean(rewards), abs=1e-4) and isinstance(completions[0], list if chat else str)
        assert rewards == pytest.approx([model.score(dialogue(p, c)) for p, c in zip(prompts, completions)], abs=1e-5)
    assert model.score('Who?', 'I do not know.') == before


def test_in_rewardbench_for_real(run, tmp_path, monkeypatch):
    "Its main loop on a file of pairs. Its own table of models is left out: its modules are written for other versions of transformers."
    pytest.importorskip('fastchat', reason='RewardBench is not installed'); monkeypatch.setitem(sys.modules, 'rewardbench.models', SimpleNamespace(REWARD_MODEL_CONFIG={}, DPO_MODEL_CONFIG={}))
    bench = pytest.importorskip('rewardbench.rewardbench', reason='RewardBench is not installed')
    folder, pairs = str(read_facts(run).folder), toy_pairs(30); export_backbone(folder, tmp_path/'t5'); bench.REWARD_MODEL_CONFIG[folder] = rewardbench_entry(); monkeypatch.chdir(tmp_path)
    as_messages = lambda text: [dict(role=dict(Human='user', Assistant='assistant')[who], content=said) for who, said in turns(text)]
    (tmp_path/'rows.json').write_text('\n'.join(json.dumps({k: as_messages(p[k]) for k in ('chosen', 'rejected')}) for p in pairs))
    bench.rewardbench(bench.Args(dataset=str(tmp_path/'rows.json'), load_json=True, model=folder, tokenizer=str(tmp_path/'t5'), output_dir='out/', save_all=True))
    got = [json.loads(line) for line in next(tmp_path.rglob('*_all.jsonl')).read_text().splitlines()]; model = RewardModel.from_pretrained(folder)
    assert np.abs([r['chosen'] for r in got] - model.score(pairs['chosen'][:])).max() < 1e-5 and np.abs([r['rejected'] for r in got] - model.score(pairs['rejected'][:])).max() < 1e-5


# ---- what the hub answers

class Hub(http.server.BaseHTTPRequestHandler):
    "Answers `create` to the making of a repository, and `commit` to all that follows."
    create = commit = 200
    def log_message(self, *args): pass
    def say(self, status, body):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        if self.path == '/api/validate-yaml': return self.say(200, b'{"errors": [], "warnings": []}')
        status = self.create if self.path.endswith('/create') else self.commit
        self.say(status, json.dumps(dict(error='no', url='http://localhost/me/it', files=[])).encode())


@pytest.fixture
def hub(monkeypatch):
    "A hub's address; `Hub.create` and `Hub.commit` say what it answers."
    monkeypatch.setattr('time.sleep', lambda *_: None)         # between the client's tries
    server = http.server.ThreadingHTTPServer(('localhost', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://localhost:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('create, commit, args, says', [
    (401, 200, [], 'the hub does not know you (401); log in with `hf auth login`'), (403, 200, [], 'does not let you write there (403)'), (404, 200, [], 'the hub has no such place (404); what stands before the slash'),
    (409, 200, [], 'is there already; update it (--update, in Python update=True)'), (503, 200, [], 'the hub answered 503, it is overloaded or down; try again later'), (400, 200, [], 'the hub answered 400'),
    (200, 503, [], 'down; try again later. The repository was made and is empty: go on with --update'), (200, 409, ['--update'], 'another commit came in between (409)'),
    (200, 404, ['--update'], 'no such repository, or none that you may see; to make a new one, do not ask for an update'), (200, 401, ['--update'], 'does not know you')])
def test_what_the_hub_answers_is_one_line_with_its_remedy(run, hub, monkeypatch, capsys, create, commit, args, says):
    monkeypatch.setattr(Hub, 'create', create)
    monkeypatch.setattr(Hub, 'commit', commit)
    monkeypatch.setattr('rlhf_flant5.publish.HfApi', lambda **_: HfApi(endpoint=hub, token='x'))
    monkeypatch.setattr('rlhf_flant5.publish.get_token', lambda: 'x')
    assert main(['push', str(run), 'me/it', *args]) == 2
    said = capsys.readouterr().err.rpartition('\r')[2]
    assert said.startswith('error: me/it: ') and says in said and said.count('\n') == 1 and 'token=' not in said, said


def test_a_hub_that_lists_a_path_out_of_its_folder(tmp_path, monkeypatch):
    "Nothing is written there, and it is said why, not that there is no network."
    class Lists(Hub):
        def do_GET(self):
            if '/tree/' in self.path: return self.say(200, json.dumps([dict(type='file', path='tokenizer/../../../evil.json', size=2, oid='a'*40)]).encode())
            self.say(200, json.dumps(dict(id='me/it', sha='1'*40, siblings=[], private=False, tags=[])).encode())
    server = http.server.ThreadingHTTPServer(('localhost', 0), Lists)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f'http://localhost:{server.server_port}'
    monkeypatch.setattr('rlhf_flant5.core.hub.HfApi', partial(HfApi, endpoint=there))
    monkeypatch.setattr('rlhf_flant5.core.hub.snapshot_download', partial(snapshot_download, endpoint=there, cache_dir=tmp_path/'a'/'b'/'c'))
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match='what the hub lists is refused .*cannot contain a'): resolve_folder('me/it', 'model', ['tokenizer/*'], ['tokenizer'])
    finally:
        server.shutdown()
        server.server_close()
    assert not [*tmp_path.rglob('evil.json')]


# ---- the card as the hub reads it, and foreign text in it

def test_card_head_is_what_the_hub_reads(run):
    data = ModelCard(model_card(run, 'me/it')).data
    assert data.pipeline_tag == 'text-classification' and data.model_name == 'me/it'
    result, = data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_type, result.metric_value) == ('Anthropic/hh-rlhf', 'test', 'accuracy', .75)


def test_card_shows_foreign_text_as_it_is(copy):
    evil = '<img src=http://x/y>[a](http://b)![c](d)`*e'
    (copy/'data'/'counts.json').write_text(json.dumps({f'{evil}/train': {evil: 3}}))
    change(copy/'results'/'summary.json', transformer_name=evil, precision=evil, readout=evil)
    change(copy/'simulation'/'best_model'/'config.json', trained_on=dict(name=evil))
    change(copy/'data'/'provenance.json', device=evil, source=dict(version=evil, commit=evil, dirty=False))
    (copy/'data'/'command.txt').write_text("python -m x 'a=```' b=\x1b[31m\x07 c=\u202e '\n```\n<img src=z>'\n", encoding='utf-8')
    rows = [json.loads(line) for line in (copy/'results'/'test_pairs.jsonl').read_text().splitlines()]
    (copy/'results'/'test_pairs.jsonl').write_text(''.join(json.dumps(r | dict(subset=evil)) + '\n' for r in rows))
    card = model_card(copy, 'me/it')
    assert all(c.isprintable() or c == '\n' for c in card)
    _, head, body = card.split('---\n', 2)
    block = re.search(r'^(````+)\n(.*)\n\1$', body, re.M)                    # a fence that is longer than what stands in it
    assert block and '```' in block[2] and '\n' not in block[2]
    words = re.sub(r'(?<!\\)`[^`\n]+`', '', body.replace(block[0], ''))              # what is not code
    assert '<img' not in words and not re.search(r'(?<!\\)[\[`]', words.partition('## Use')[0]) and '&lt;img' in words
    assert head.count('\n') == len(head.splitlines())


def test_rules_that_tie_on_all_pairs_are_left_out(copy):
    card = model_card(copy)
    tied = card.partition('Left out, since they tie on all of these pairs: ')[2].partition('.')[0].split(', ')
    assert {*tied} <= {*BASELINES} and all(f'| {name} ' not in card for name in tied) and all(f'| {name} ' in card for name in {*BASELINES} - {*tied})
    texts = {row['id']: row for row in map(json.loads, gzip.open(copy/'data'/'test_texts.jsonl.gz', 'rt', encoding='utf-8'))}
    for name, rule in BASELINES.items():
        chosen, rejected = (rule([row[side] for row in texts.values()]) for side in ('chosen', 'rejected'))
        assert (chosen == rejected).all() == (name in tied)


def test_exported_files_follow_the_umask(run, tmp_path):
    old = os.umask(0o027)
    try: export_backbone(read_facts(run).folder, tmp_path/'t5')
    finally: os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path/'t5').iterdir()} == {'0o640'} and (tmp_path/'t5').stat().st_mode & 0o777 == 0o750


def test_adapters_for_layers_that_are_not_there():
    for asked, gone in ((['query'], 'query'), (['q', 'values'], 'values')):
        with pytest.raises(ConfigError, match=f"this T5 has no linear layer '{gone}'; it has k, o, q, v, wi_0, wi_1, wo"): build('layerwise_attention', lora=dict(r=2, alpha=4, target_modules=asked))
