"Folders, caches and data that somebody else has made: what they bring is never run, never followed out of its place, and refused in one line."
import ast, json, locale, os, pickle, shutil, struct, subprocess, sys, time
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np
import pytest, torch
from conftest import root, saved_run, short
from rlhf_flant5 import compare
from rlhf_flant5.backbone.t5 import Backbone, load_flan_t5
from rlhf_flant5.comparison.report import write_report
from rlhf_flant5.comparison.comparisons import comparisons
from rlhf_flant5.comparison.runs import load_runs
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.batches import PairBatches, pad_ids
from rlhf_flant5.data.pairs import encode, load_tokenizer, read_pairs
from rlhf_flant5.training.states import keep_states
from rlhf_flant5.models.attention_pooled_encoder import RewardFromAttentionPooledEncoder
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.data.toy import toy_tokenizer, toy_transformer
from rlhf_flant5.training.build import model_class
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Model


def refused(f, says=''):
    "One printable line that says why."
    with pytest.raises(ConfigError) as e: f()
    said = str(e.value); assert said.isprintable() and len(said) < 1000 and says in said, said


def evil(marker): return f"open({str(marker)!r}, 'w').close()\nfrom transformers import T5Config, T5Model, PreTrainedTokenizerFast\nclass Evil(T5Model): config_class = T5Config\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"


class Bomb:
    "Writes a file when it is unpickled."
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, 'w')


@pytest.fixture
def marker(tmp_path, monkeypatch):
    "A file that nothing may write. Whoever asks on the terminal whether to run code is told yes; nobody may ask."
    asked = []; monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y'); monkeypatch.syspath_prepend(tmp_path/'path')
    path = tmp_path/'executed'; (tmp_path/'path').mkdir(); (tmp_path/'path'/'evil.py').write_text(evil(path))
    yield path
    assert not path.exists() and not asked and 'evil' not in sys.modules


@pytest.fixture
def model(model_folder, tmp_path): return shutil.copytree(model_folder, tmp_path/'model')

@pytest.fixture(scope='module')
def kept_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kept')/'model'
    RewardFromAttentionPooledEncoder(Backbone(toy_transformer(cls=T5EncoderModel)), 16, None, [8]).save_pretrained(folder, toy_tokenizer())
    return folder

@pytest.fixture
def saved(kept_model, tmp_path): return shutil.copytree(kept_model, tmp_path/'saved')


def change(path, **changes):
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))

def same(a, b): return a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items())


def test_the_traps_work(tmp_path):
    "What the other tests look for would be there if the code ran."
    bomb, code = tmp_path/'a', tmp_path/'b'
    pickle.loads(pickle.dumps(Bomb(bomb))).close(); exec(evil(code), {})
    assert bomb.exists() and code.exists()


# --- models


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'pytorch_model-00001-of-00001.bin', 'model.safetensors'])
def test_pickles_alone_are_refused(model, saved, marker, name):
    for folder, load in ((model, load_flan_t5), (saved, RewardModel.from_pretrained)):
        (folder/'model.safetensors').unlink(); (folder/name).write_bytes(pickle.dumps(Bomb(marker)))
        if '-of-' in name: (folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map={'shared.weight': name})))
        refused(lambda: load(str(folder)), 'do not load' if name == 'model.safetensors' else 'safetensors')


def test_what_lies_beside_is_ignored(model, saved, marker):
    "Pickles, adapters, code, and settings that would fetch or open something: the weights are those of the plain folder."
    plain, theirs = load_flan_t5(str(model)).state_dict(), RewardModel.from_pretrained(saved).state_dict()
    for folder in (model, saved):
        for name in ('pytorch_model.bin', 'adapter_model.bin', 'training_args.bin', 'optimizer.pt', 'rng.pth'): (folder/name).write_bytes(pickle.dumps(Bomb(marker)))
        for name in ('modeling_t5.py', 'evil.py', '__init__.py', 'handler.py', 'requirements.txt'): (folder/name).write_text(evil(marker))
        (folder/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', base_model_name_or_path='evil/evil', auto_mapping=dict(base_model_class='Evil', parent_library='evil'), r=1, target_modules=['q'])))
    more = dict(attn_implementation='evil/kernel', _attn_implementation='evil/kernel', transformers_weights='adapter_model.bin', custom_code='evil.py', custom_pipelines=dict(evil=dict(impl='evil.Evil')),
                quantization_config=dict(quant_method='bitsandbytes', load_in_8bit=True), configuration_files=['config.9.0.0.json'], architectures=['Evil'], _target_='evil.Evil')
    change(model/'config.json', **more); change(saved/'config.json', **more, transformer=json.loads((saved/'config.json').read_text())['transformer'] | more)
    assert same(plain, load_flan_t5(str(model)).state_dict()) and same(theirs, RewardModel.from_pretrained(saved).state_dict())


def test_code_of_a_model_is_refused(model, saved, marker):
    named = dict(auto_map=dict(AutoConfig='evil.Evil', AutoModel='evil.Evil', AutoModelForSeq2SeqLM='evil/evil--evil.Evil'))
    (model/'evil.py').write_text(evil(marker)); (saved/'evil.py').write_text(evil(marker))
    change(model/'config.json', **named); refused(lambda: load_flan_t5(str(model)), 'never run')
    change(saved/'config.json', transformer=json.loads((saved/'config.json').read_text())['transformer'] | named); refused(lambda: RewardModel.from_pretrained(saved), 'never run')


@pytest.mark.parametrize('changes', [
    dict(auto_map=dict(AutoTokenizer=['evil.EvilTokenizer', 'evil.EvilTokenizer'])), dict(auto_map=['evil.EvilTokenizer', None]), dict(auto_map=dict(AutoTokenizer=[None, 'evil/evil--evil.EvilTokenizer']), tokenizer_class='EvilTokenizer'),
    dict(tokenizer_class='EvilTokenizer'), dict(tokenizer_class='evil.EvilTokenizer'), dict(tokenizer_class='AutoModel'), dict(tokenizer_class='AutoTokenizer'), dict(tokenizer_class='pipeline'), dict(tokenizer_class='../../evil'),
    dict(tokenizer_class=['T5Tokenizer']), dict(extra_ids=10**9), dict(extra_ids='9'), dict(eos_token=[]), dict(pad_token=None), dict(added_tokens_decoder={'x': 1})], ids=lambda c: '-'.join(f'{k}={v}'[:40] for k, v in c.items()))
def test_hostile_tokenizer_settings(model, saved, marker, changes):
    "With a config.json that names code as well: transformers would ask on the terminal, and run it."
    change(model/'config.json', model_type=..., auto_map=dict(AutoModel='evil.Evil', AutoConfig='evil.Evil'))
    for folder, load in ((model, load_tokenizer), (saved/'tokenizer', lambda _: RewardModel.from_pretrained(saved))):
        (folder/'evil.py').write_text(evil(marker)); change(folder/'tokenizer_config.json', **changes); refused(lambda: load(str(folder)))


@pytest.mark.parametrize('text', ['garbage', '{}', '[', '['*10**5, '{"model": ' + '{"type": '*10**5, '\x00'*100, '{"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": []}}'], ids=range(7))
def test_hostile_vocabulary(model, saved, text):
    for folder, load in ((model, load_tokenizer), (saved/'tokenizer', lambda _: RewardModel.from_pretrained(saved))):
        (folder/'tokenizer.json').write_text(text); refused(lambda: load(str(folder)), 'tokenizer')
        (folder/'tokenizer.json').unlink(); refused(lambda: load(str(folder)), 'tokenizer')
        (folder/'spiece.model').write_text(text); change(folder/'tokenizer_config.json', tokenizer_class='T5Tokenizer'); refused(lambda: load(str(folder)), 'tokenizer')
        (folder/'tokenizer_config.json').write_text(text); refused(lambda: load(str(folder)), 'tokenizer')
        shutil.rmtree(folder); refused(lambda: load(str(folder)))


def test_a_panic_is_one_line(model, capfd):
    "The tokenizer's library ends in a panic, which Python's Exception does not cover."
    tokens = json.loads((model/'tokenizer.json').read_text()); tokens['post_processor']['special_tokens'] = {}
    (model/'tokenizer.json').write_text(json.dumps(tokens)); refused(lambda: load_tokenizer(str(model)), 'does not load')


def test_files_of_a_tokenizer_stay_in_its_folder(model, tmp_path):
    "Names of other files in the settings are not followed, templates not rendered, lengths not obeyed."
    want, texts = load_tokenizer(str(model)), ['\n\nHuman: What is a wasp?\n\nAssistant: It is an insect.', 'x </s> y']
    other = shutil.copytree(model, tmp_path/'tokenizer.'); tokens = json.loads((other/'tokenizer.json').read_text()); tokens['added_tokens'] = []; (tmp_path/'tokenizer.json').write_text(json.dumps(tokens))
    template = '{{ cycler.__init__.__globals__.os.system("exit 1") }}'; (model/'chat_template.jinja').write_text(template); (model/'additional_chat_templates').mkdir(); (model/'additional_chat_templates'/'tool.jinja').write_text(template)
    change(model/'tokenizer_config.json', fast_tokenizer_files=['tokenizer./../../tokenizer.json'], tokenizer_file='../tokenizer.json', vocab_file='../spiece.model', gguf_file='../x.gguf', init_inputs=['../x'], chat_template=template, name_or_path='evil/evil')
    (model/'special_tokens_map.json').write_text(json.dumps(dict(tokenizer_file='../tokenizer.json', tokenizer_object=1, vocab=[])))
    tokens = json.loads((model/'tokenizer.json').read_text()) | dict(padding=dict(strategy=dict(Fixed=10**9), direction='Left', pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token='<pad>'),
                                                                     truncation=dict(direction='Right', max_length=3, strategy='LongestFirst', stride=0))
    (model/'tokenizer.json').write_text(json.dumps(tokens))
    got = load_tokenizer(str(model)); assert got.chat_template is None and encode(got, texts) == encode(want, texts)


@pytest.mark.parametrize('name', ['../outside.safetensors', '{}/outside.safetensors', 'a/../../outside.safetensors', '..\\outside.safetensors', 'file:///outside.safetensors', 'pytorch_model.bin', 'nowhere.safetensors', '', 7, None, ['a']])
def test_an_index_stays_in_its_folder(model, tmp_path, name):
    shutil.move(model/'model.safetensors', tmp_path/'outside.safetensors'); (model/'pytorch_model.bin').touch(); (model/'a').mkdir(); (model/'x.safetensors').touch()
    if isinstance(name, str): name = name.format(tmp_path)
    (model/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(load_file(tmp_path/'outside.safetensors'), name))))
    refused(lambda: load_flan_t5(str(model)), 'must be a .safetensors file in the same folder')


@pytest.mark.parametrize('text', ['[]', '{"weight_map": 1}', '{"weight_map": {}}', '{', '['*10**6])
def test_a_damaged_index(model, text):
    shutil.move(model/'model.safetensors', model/'x.safetensors'); (model/'model.safetensors.index.json').write_text(text); refused(lambda: load_flan_t5(str(model)))


def raw(header, data=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header)) + header + data

def f32(*offsets, shape=(1,), dtype='F32'): return dict(dtype=dtype, shape=[*shape], data_offsets=[*offsets])

@pytest.mark.parametrize('content', [b'', b'\x00'*7, struct.pack('<Q', 2**62) + b'{}', struct.pack('<Q', 2**64 - 1), raw(b'{'), raw(b'['*10**5), raw({}), raw(dict(a=f32(0, 4), b=f32(2, 6)), b'\x00'*6), raw(dict(a=f32(0, 2**62, shape=(2**60,)))),
                                     raw(dict(a=f32(0, 4, shape=(2**32, 2**32))), b'\x00'*4), raw(dict(a=f32(4, 0)), b'\x00'*4), raw(dict(a=f32(0, 4, dtype='OBJ')), b'\x00'*4), raw({'a\n\x1b[2J': f32(0, 4, shape=(3,))}, b'\x00'*4), raw(dict(a=f32(-4, 4))), raw(dict(a=f32(0, 4))),
                                     raw(dict(__metadata__=dict(a=1), a=f32(0, 4)), b'\x00'*4), raw({f'a{i}\x1b': f32(4*i, 4*i + 4) for i in range(9)}, b'\x00'*36)], ids=range(17))
def test_damaged_safetensors(model, saved, content):
    for folder, load in ((model, load_flan_t5), (saved, RewardModel.from_pretrained)):
        (folder/'model.safetensors').write_bytes(content); refused(lambda: load(str(folder)))


@pytest.mark.parametrize('name', ['encoder.block.0.layer.0.SelfAttention.q.weight', 'shared.weight'])
@pytest.mark.parametrize('harm, says', [(lambda w: w.long(), 'of type I64'), (lambda w: w.bool(), 'of type BOOL'), (lambda w: w.log(), 'NaN or infinite'), (lambda w: w.double()*1e300, 'NaN or infinite'), (lambda w: w.flatten(), 'another shape'),
                                        (lambda w: w.T.contiguous()[:, :-1].contiguous(), 'another shape'), (lambda w: None, 'missing')], ids='long bool nan overflow flat cut none'.split())
def test_a_hostile_weight_is_named(model, saved, name, harm, says):
    for folder, load, prefix in ((model, load_flan_t5, ''), (saved, RewardModel.from_pretrained, 'backbone.transformer.')):
        weights = load_file(folder/'model.safetensors'); key = prefix + name
        if key not in weights: key = prefix + 'encoder.embed_tokens.weight'      # the shared weight has two names, one of which is stored
        new = harm(weights[key]); save_file({k: v for k, v in (weights | {key: new}).items() if v is not None}, folder/'model.safetensors')
        refused(lambda: load(str(folder)), says)
        with pytest.raises(ConfigError, match='shared.weight' if 'block' not in name else 'SelfAttention.q.weight'): load(str(folder))


def test_weights_too_many(saved):
    save_file(load_file(saved/'model.safetensors') | {'a\x1b\n': torch.ones(1)}, saved/'model.safetensors'); refused(lambda: RewardModel.from_pretrained(saved), '1 weights too many')


T = 'transformer'
@pytest.mark.parametrize('changes', [
    dict(format='rlhf_flant5 reward model 2'), dict(format=...), dict(format=['x'*10**5]), dict(readout='../../evil'), dict(readout='evil'), dict(readout='os'), dict(readout='__init__'), dict(readout='base'), dict(readout='attention_pooled_encoder.os'),
    dict(readout='\x1b[2J\n'), dict(readout=7), dict(readout=...), dict(settings=...), dict(settings=[]), dict(settings=dict(evil=1)), dict(settings=dict(backbone=1)), dict(settings=dict(self=1)), dict(settings=dict(_target_='evil.Evil')),
    dict(settings={'__class__': 1}), dict(settings=dict(pooling_output_dim='16')), dict(settings=dict(pooling_output_dim=True)), dict(settings=dict(pooling_output_dim=0)), dict(settings=dict(pooling_output_dim=None)), dict(settings=dict(n_blocks_to_use=-1)),
    dict(settings=dict(readout_additional_layers='evil')), dict(settings=dict(readout_additional_layers=[1.5])), dict(settings=dict(readout_additional_layers=[[8]])), dict(has_decoder='no'), dict(has_decoder=True), dict(train_transformer=1), dict(lora=None),
    dict(lora={}), dict(lora=dict(r=-1)), dict(lora=dict(r=2, alpha=4, target_modules='.*')), dict(lora=dict(r=2, alpha=4, target_modules=[1])), dict(lora=dict(r=2, alpha=4, target_modules=['nothing'])), dict(lora=dict(r=2, alpha=4, target_modules=['layer_norm'])),
    dict(lora=dict(r=2, alpha=4, target_modules=['q'], init_lora_weights='evil')), dict(lora=dict(r=2, alpha=float('inf'), target_modules=['q'])), {T: ...}, {T: []}, {T: {}}, {T: dict(model_type='evil')}, {T: dict(d_model=-1)}, {T: dict(d_model='32')},
    {T: dict(num_layers=1.0)}, {T: dict(dropout_rate=float('nan'))}, {T: dict(layer_norm_epsilon=float('inf'))}, {T: dict(feed_forward_proj='gated-../../evil')}, {T: dict(feed_forward_proj=['relu'])}, {T: dict(decoder_start_token_id=-1)}],
    ids=lambda c: '-'.join(f'{k}={v}'[:40].encode('unicode_escape').decode() for k, v in c.items()))
def test_hostile_config_of_a_saved_model(saved, marker, changes):
    before = json.loads((saved/'config.json').read_text())
    for key in ('settings', T):
        if isinstance(changes.get(key), dict) and changes[key]: changes = changes | {key: before[key] | changes[key]}
    change(saved/'config.json', **changes); refused(lambda: RewardModel.from_pretrained(saved))


@pytest.mark.parametrize('text', ['', '{', '[]', '7', 'null', '\ufeff{}', '{"a": 1e999999}', '{"a": ' + '9'*5000 + '}', '['*10**6, '{"a":'*10**6, '"\\ud800"', '{"\x1b[2J'])
def test_damaged_json(model, saved, text):
    for folder, load in ((model, load_flan_t5), (saved, RewardModel.from_pretrained)): (folder/'config.json').write_text(text); refused(lambda: load(str(folder)))


def test_no_plain_files(model, saved):
    "A pipe would be waited for, a folder is no file."
    for folder, load in ((model, load_flan_t5), (saved, RewardModel.from_pretrained)):
        for make in (os.mkfifo, os.mkdir):
            for name in ('model.safetensors', 'config.json'):
                path, away = folder/name, folder/'away'; path.rename(away); make(path); refused(lambda: load(str(folder)))
                path.rmdir() if path.is_dir() else path.unlink(); away.rename(path)
        load(str(folder))


def test_tokenizer_of_another_model(saved, model_folder):
    tokens = json.loads((saved/'tokenizer'/'tokenizer.json').read_text()); tokens['model']['vocab']['far'] = 10**6
    (saved/'tokenizer'/'tokenizer.json').write_text(json.dumps(tokens)); refused(lambda: RewardModel.from_pretrained(saved), 'not of one model')


ABSURD = '''
import json, os, resource, sys; from pathlib import Path
from rlhf_flant5.backbone.t5 import load_flan_t5; from rlhf_flant5.data.pairs import load_tokenizer; from rlhf_flant5.models.base import RewardModel; from rlhf_flant5.core.files import ConfigError
model, saved = map(Path, sys.argv[1:]); load_flan_t5(str(model)); RewardModel.from_pretrained(saved)
taken = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize(); resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30,)*2); start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def attempt(path, content, load):
    before = path.read_bytes(); path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(json.loads(before) | content))
    try: load(); print('loaded', path, str(content)[:60])
    except ConfigError as e: print('refused' if str(e).isprintable() else 'several lines')
    path.write_bytes(before)
flan, ours, transformer = lambda: load_flan_t5(str(model)), lambda: RewardModel.from_pretrained(saved), json.loads((saved/'config.json').read_text())['transformer']
sizes = [dict(d_model=10**9), dict(d_model=2**16, vocab_size=2**24, d_ff=2**20), dict(num_layers=10**9), dict(num_layers=256, num_decoder_layers=256), dict(num_heads=10**12), dict(relative_attention_num_buckets=2**16, num_heads=2**12), dict(vocab_size=2**70)]
files = [b'[' + b'[],'*3*10**5 + b'1]', b'{"a": "' + b'x'*10**7 + b'"}', b'['*3*10**6]
for c in [*sizes, *files]: attempt(model/'config.json', c, flan)
for c in [*[dict(transformer=transformer | s) for s in sizes], dict(lora=dict(r=2**20, alpha=1, target_modules=['q', 'k', 'v', 'o', 'wi_0'])), dict(settings=dict(pooling_output_dim=2**20, readout_additional_layers=[2**20]*100)),
          dict(settings=dict(readout_additional_layers=[1]*10**6)), *files]: attempt(saved/'config.json', c, ours)
for c in [dict(extra_ids=10**9), *files]: attempt(model/'tokenizer_config.json', c, lambda: load_tokenizer(str(model)))
for c in [b'[' + b'[],'*2*10**6 + b'1]', b'x'*10**8]: attempt(model/'tokenizer.json', c, lambda: load_tokenizer(str(model)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)//1024)
'''
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_absurd_sizes_take_no_memory(model, saved):
    "In a process that may take 1 GiB more than it has after loading the plain folders."
    done = subprocess.run([sys.executable, '-c', ABSURD, str(model), str(saved)], text=True, capture_output=True, timeout=300, env=os.environ | {'PYTHONPATH': str(root)})
    *said, mib = done.stdout.splitlines() or ['nothing', '0']
    assert done.returncode == 0 and said == ['refused']*29, done.stdout + done.stderr[-2000:]
    assert int(mib) < 600, f'{mib} MiB'


# --- caches, data, runs


@pytest.fixture
def world():
    ids = [torch.randint(3, 500, (int(n),), generator=torch.Generator().manual_seed(int(n))).tolist() for n in range(4, 44)]
    return Backbone(toy_transformer(cls=T5Model), train_transformer=False), PairBatches(dict(chosen_ids=ids[:20], rejected_ids=ids[20:], id=[*map(str, range(20))], subset=['x']*20), 0, 8, 512)


@pytest.mark.parametrize('link, name', [(link, name) for link in ('symlink', 'dangling', 'hardlink', 'fifo') for name in ('segment-00000.safetensors', 'lock', '') if name or link in ('symlink', 'dangling')])   # a folder has no other link
def test_links_in_a_cache_are_refused(tmp_path, world, name, link):
    kept = keep_states(*world, tmp_path/'cache'); path, victim = kept.path/name, tmp_path/'victim'
    if name: victim.write_text('mine'); path.unlink()
    else: victim.mkdir(); shutil.rmtree(path); (victim/'lock').write_text('mine'); (victim/'segment-00000.safetensors').write_text('mine')
    dict(symlink=lambda: path.symlink_to(victim), dangling=lambda: path.symlink_to(tmp_path/'nowhere'), hardlink=lambda: path.hardlink_to(victim), fifo=lambda: os.mkfifo(path))[link]()
    refused(lambda: keep_states(*world, tmp_path/'cache'), 'writing would change what it leads to')
    assert not (tmp_path/'nowhere').exists() and {f.read_text() for f in ([victim] if name else victim.iterdir())} == {'mine'}


def test_a_cache_on_a_linked_disk(tmp_path, world):
    "The user's own link above the entries is followed."
    (tmp_path/'disk').mkdir(); (tmp_path/'cache').symlink_to(tmp_path/'disk'); keep_states(*world, tmp_path/'cache'); assert [*(tmp_path/'disk'/'states').iterdir()]


def pickled(marker): return pickle.dumps(Bomb(marker))
def npy(marker): return b'\x93NUMPY\x01\x00' + pickle.dumps(np.array([Bomb(marker)]))
def header(text, size=None): return (len(text) if size is None else size).to_bytes(8, 'little') + text

HOSTILE_SEGMENTS = dict(
    pickle=pickled, npy=npy, empty=lambda _: b'', text=lambda _: b'x'*10**6,
    longer_header=lambda _: header(b'{}', 2**63), no_object=lambda _: header(b'[1]'), not_utf8=lambda _: header(b'\xff\xfe'),
    deep=lambda _: header(b'{"a":'*10**5), outside=lambda _: header(b'{"states":{"dtype":"F16","shape":[9],"data_offsets":[-9,9]}}'),
    beyond=lambda _: header(b'{"states":{"dtype":"F16","shape":[99999999999],"data_offsets":[0,199999999998]}}'),
    bfloat16=lambda _: header(b'{"states":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}') + b'12',
    no_metadata=lambda _: header(b'{"states":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}') + b'12')

@pytest.mark.parametrize('name', HOSTILE_SEGMENTS)
def test_a_hostile_segment(tmp_path, world, marker, name):
    "It is computed again; pickles beside are not opened."
    kept = keep_states(*world, tmp_path)
    want = np.array(kept.states)
    for beside in ('states.npy', 'states.npz', 'segment-00001.safetensors', 'journal.pkl'): (kept.path/beside).write_bytes(npy(marker))
    np.save(kept.path/'a.npy', np.array([Bomb(marker)]), allow_pickle=True)
    whole = kept.segment_path(0).read_bytes()
    kept.segment_path(0).write_bytes(HOSTILE_SEGMENTS[name](marker))
    assert (np.array(keep_states(*world, tmp_path).states) == want).all()
    assert kept.segment_path(0).read_bytes() == whole


def test_a_huge_segment_is_not_read_whole(tmp_path, world):
    kept = keep_states(*world, tmp_path)
    os.truncate(kept.segment_path(0), 2**40)
    keep_states(*world, tmp_path)
    assert kept.segment_path(0).stat().st_size < 2**20


def test_code_beside_the_pairs_is_not_run(pairs_folder, tmp_path, marker, monkeypatch):
    "The loading scripts that `datasets` used to run, in the folder and in its subsets, and named as the folder."
    folder = shutil.copytree(pairs_folder, tmp_path/'hh-rlhf')
    for where in (folder, folder/'helpful-base'):
        for name in ('hh-rlhf.py', 'helpful-base.py', 'evil.py', '__init__.py', 'json.py', 'train.py', 'dataset_loading_script.py'): (where/name).write_text(evil(marker))
        (where/'dataset_infos.json').write_text(json.dumps(dict(default=dict(builder_name='evil', dataset_name='evil', features=dict(chosen=dict(_type='evil.Evil')), download_checksums={'http://evil/': {}}))))
        (where/'README.md').write_text('---\nconfigs:\n- config_name: default\n  data_files: ../../../*\n  drop_labels: !!python/object/apply:os.system ["touch executed"]\n---\n')
        for name in ('state.json', 'dataset.arrow', 'train.pkl'): (where/name).write_bytes(pickle.dumps(Bomb(marker)))
    monkeypatch.chdir(folder); assert len(read_pairs(folder, ['helpful-base'], 'train', defaultdict(Counter))) > 50


def test_no_file_names_a_class(saved, model, marker, results):
    "A class is imported by name for `model._target_` of the command line alone."
    for path in (saved/'config.json', model/'config.json', saved/'tokenizer'/'tokenizer_config.json'): change(path, _target_='evil.Evil', __class__='evil.Evil', py_class='evil.Evil')
    (model/'config.yaml').write_text('_target_: evil.Evil\n'); RewardModel.from_pretrained(saved); load_flan_t5(str(model)); load_tokenizer(str(model))
    (results/'evil.yaml').write_text('_target_: evil.Evil\n')
    for o in (f'hydra.searchpath=[file://{results}]', f'model={results}/evil', 'model=../../evil', f'experiment={results}/evil', f'+evil=evil', f'hydra/launcher=evil', 'hydra.run.dir=/', f'model@evil={results}/evil'): refused(lambda: load_config([o]))
    for name in ('os.system', 'rlhf_flant5.models.base.Path', 'nowhere.At.All', 'builtins.eval'): refused(lambda: model_class(load_config([f'model._target_={name}']).model), 'must be a subclass of RewardModel')


def test_an_own_readout_of_the_command_line(tmp_path, monkeypatch):
    "The wanted use stays: the command line is the user's own."
    (tmp_path/'mine.py').write_text('from rlhf_flant5.models.decoder_output import RewardFromDecoderOutput\nclass Mine(RewardFromDecoderOutput): pass\n'); monkeypatch.syspath_prepend(tmp_path)
    assert model_class(load_config(['model=decoder_output', 'model._target_=mine.Mine']).model).__name__ == 'Mine'


def test_compare_writes_through_no_link(results, capsys):
    "Somebody's results bring links with the names of what is written."
    victim, folder = results/'victim', results/'comparison'; victim.write_text('mine'); saved_run(results, 0); folder.mkdir()
    for name in ('report.md', 'scores.json', 'accuracy.png', 'suspicious.md'): (folder/name).symlink_to(victim)
    (folder/'notes.txt').write_text('kept')
    assert compare.main([str(results)]) == 0 and victim.read_text() == 'mine' and 'decoder_output' in (folder/'report.md').read_text() and (folder/'notes.txt').read_text() == 'kept'
    elsewhere = results/'elsewhere'; folder.rename(elsewhere); folder.symlink_to(elsewhere)
    assert compare.main([str(results)]) == 2 and 'is a link' in capsys.readouterr().err


@pytest.mark.parametrize('changes', [dict(readout='a\x1b[2Jb'), dict(readout='a\n| b'), dict(readout=7), dict(data_name=None), dict(seed='1'), dict(seconds=1e999), dict(validation={}), dict(test=dict(accuracy=2, low=0, high=1, n=1)), dict(best_reachable_accuracy='x'), dict(n_trained_parameters=[])])
def test_hostile_summary(results, capsys, changes):
    saved_run(results, 0); saved_run(results, 1, seed=2); path = results/'Reward-Model-Training'/'desc-x,index-1'/'results'/'summary.json'; path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert compare.main([str(results)]) == 2
    said = capsys.readouterr().err; assert said.count('\n') == 1 and said[:-1].isprintable() and [*changes][0] in said


ESCAPES = '\x1b]0;owned\x07\x1b[2J\x1b[31m', '\u202egnp.exe', 'a\u2066b', '\x9b31m'

@pytest.mark.parametrize('odd', ESCAPES)
@pytest.mark.parametrize('where', ['value', 'key', 'list', 'commit', 'precision'])
def test_escapes_in_settings_and_origin(results, capsys, odd, where):
    "What would write to the terminal or turn the reading order is refused in one printable line, or shown escaped."
    folder = saved_run(results, 0)
    saved_run(results, 1, seed=2)
    config = dict(value=dict(type=odd), key={odd: 1}, list=dict(type=[odd]))
    if where in config: (folder/'data'/'config.yaml').write_text(json.dumps(dict(seed=1, training=dict(optimizer=config[where]))))
    if where == 'commit': change(folder/'data'/'provenance.json', source=dict(commit=odd))
    if where == 'precision': (folder/'data'/'decided.json').write_text(json.dumps(dict(precision=odd)))
    code, said = compare.main([str(results)]), capsys.readouterr()
    assert code == (0 if where == 'list' else 2)
    if code: assert said.err.count('\n') == 1 and said.err[:-1].isprintable() and folder.name in said.err
    text = said.out + ''.join(p.read_text(encoding='utf-8') for p in results.glob('comparison/*.[mc][ds]*'))
    assert all(c.isprintable() or c == '\n' for c in text)


ALIASES = '\n'.join(['a: &a [x, x, x, x, x, x, x, x, x]', *(f'{b}: &{b} [{", ".join([f"*{a}"]*9)}]' for a, b in zip('abcdefgh', 'bcdefghi'))])

@pytest.mark.parametrize('text', [ALIASES, 'a: &a {b: *a}\n', 'a: &a 1\nb: {<<: {c: *a}}\n', 'a: ' + '[' * 60000, 'x'*2**17, 'a: ' + '9'*5000, 'a: [0x' + 'f'*9999 + ']', '- 1\n', 'a: !!python/object/apply:os.system [ls]'])
def test_settings_that_grow(results, capsys, text):
    "Nine lines of aliases stand for 10^9 leaves; they are refused before they grow, as is all else that no run writes."
    path, begun = saved_run(results, 0)/'data'/'config.yaml', time.monotonic()
    path.write_text(text)
    assert compare.main([str(results)]) == 2 and time.monotonic() - begun < 20
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'config.yaml' in said


@pytest.mark.parametrize('name, text', [('results/summary.json', dict(seconds=10**400)), ('results/summary.json', dict(seed=-10**400)), ('results/history.jsonl', dict(batch=10**400)), ('results/history.jsonl', dict(batch='a')),
                                        ('results/history.jsonl', dict(batch=True)), ('results/history.jsonl', {'validation/accuracy': 7}), ('results/history.jsonl', {'validation/accuracy': None}),
                                        ('data/provenance.json', dict(source=[])), ('data/provenance.json', dict(pairs=dict(test='x'))), ('data/provenance.json', dict(ended=10**400))])
def test_odd_numbers_of_a_run(results, capsys, name, text):
    path = saved_run(results, 0)/name
    if name.endswith('history.jsonl'): path.write_text(json.dumps({'batch': 5, 'validation/accuracy': .5} | text) + '\n')
    else: change(path, **text)
    assert compare.main([str(results)]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and name.rpartition('/')[2] in said and len(said) < 1200


def test_a_report_loads_nothing(results):
    "Names, settings and subsets that are tags, pictures, code or formulas to a viewer are words in the report, the sheets and the numbers."
    bad = '<img src=http://evil/1>![x](http://evil/2)`code`'
    for i, rate in enumerate((.1, .2)):
        folder = saved_run(results, i, readout=('=HYPERLINK("http://evil/3")', 'decoder_output')[i], transformer_name=bad, data_name=bad, settings=f'training: {{optimizer: {{type: "{bad}", init_lr: {rate}, {json.dumps(bad)}: {i}}}}}\n')
        for split in ('validation', 'test'):
            path = folder/'results'/f'{split}_pairs.jsonl'
            path.write_text(path.read_text().replace('"subset": "s"', f'"subset": {json.dumps(bad)}'))
    assert compare.main([str(results), '--only', '*']) == 0
    out = results/'comparison'
    for name in ('report.md', 'suspicious.md', 'divided.md'):
        text = (out/name).read_text(encoding='utf-8')
        lines = [l for l in text.splitlines() if not l.startswith('    ')]      # indented: code
        assert '<img' not in ''.join(lines) and '](http' not in ''.join(lines) and '`code`' not in ''.join(lines), name
    assert '"\'=HYPERLINK' in (out/'cost.csv').read_text(encoding='utf-8') and '&lt;img src=' in (out/'report.md').read_text(encoding='utf-8')


def test_a_report_is_utf8_in_any_locale(results):
    "Files are written as UTF-8 where the locale's encoding is ASCII."
    saved_run(results, 0, readout='größer', data_name='größer/数')
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, 'C')
    try:
        assert locale.getencoding() != 'UTF-8'
        write_report(comparisons(load_runs(results)[0])[0], results/'out')
    finally: locale.setlocale(locale.LC_CTYPE, before)
    for name in ('report.md', 'suspicious.md', 'cost.csv'): assert 'größer' in (results/'out'/name).read_text(encoding='utf-8')


def test_names_are_shown_as_they_are(results, capsys):
    "A dollar begins no formula in the figure, a bar ends no cell in the table."
    saved_run(results, 0, readout='$\\frac{', transformer_name='$\\evil$', data_name='a|b'); assert compare.main([str(results)]) == 0
    saved_run(results, 1, readout='$\\frac{', transformer_name='$\\worse$', data_name='a|b'); assert compare.main([str(results)]) == 0      # in legends too


@pytest.mark.parametrize('desc', ['../x', '..', '.hidden', 'a/b', '/etc', 'a\nb', '-rf', '~', '$HOME', 'x'*101])
def test_a_run_stays_below_its_root(results, desc):
    from rlhf_flant5.training.runs import run_dir
    refused(lambda: run_dir(desc, 0)); refused(lambda: run_dir('x', desc))
    (results/'out').mkdir(); (results/'in').mkdir(); (results/'in'/'Reward-Model-Training').symlink_to(results/'out'); refused(lambda: run_dir('x', 0, results/'in'), 'leads out')


# --- the source


def unsafe(source):
    "What a module does that could run code from data."
    banned = {'pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve', 'jsonpickle'}
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            names = {a.name.split('.')[0] for a in n.names} if isinstance(n, ast.Import) else {(n.module or '').split('.')[0]}
            if names & banned: yield f'{n.lineno}: {names & banned}'
            if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith('transformers') and any(a.name.startswith('Auto') or a.name == 'pipeline' for a in n.names): yield f'{n.lineno}: a class that a folder chooses'
        if not isinstance(n, ast.Call): continue
        called, keys = ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}
        if called in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load'): yield f'{n.lineno}: {called}'
        if called.endswith('torch.load') and keys.get('weights_only') != 'True': yield f'{n.lineno}: torch.load'
        if keys.get('trust_remote_code', 'False') != 'False': yield f'{n.lineno}: trust_remote_code'
        if keys.get('allow_pickle', 'False') != 'False': yield f'{n.lineno}: allow_pickle'
        if keys.get('shell', 'False') != 'False': yield f'{n.lineno}: shell'
        if called.startswith('Auto') or called in ('load_dataset', 'datasets.load_dataset', 'torch.hub.load'): yield f'{n.lineno}: {called}'
        if called in ('importlib.import_module', 'import_module', 'pydoc.locate', 'locate', 'hydra.utils.instantiate', 'instantiate'): yield f'{n.lineno}: import by name, {called}({ast.unparse(n.args[0])})'


@pytest.mark.parametrize('source', ['import pickle', 'from dill import loads', 'import torch; torch.load(f)', 'torch.load(f, weights_only=False)', 'eval(x)', 'exec(x)', 'T.from_pretrained(f, trust_remote_code=True)', 'T.from_pretrained(f, trust_remote_code=x)',
                                    'subprocess.run(x, shell=True)', 'yaml.load(f, Loader=yaml.Loader)', 'np.load(f, allow_pickle=True)', 'from transformers import AutoTokenizer', 'AutoModel.from_pretrained(f)', 'importlib.import_module(x)', 'os.system(x)', 'datasets.load_dataset(x)'])
def test_the_source_test_finds(source): assert [*unsafe(source)]


def test_the_source_runs_nothing_from_data():
    files = [*(root/'rlhf_flant5').rglob('*.py')]; assert len(files) > 15
    found = {f'{f.name}:{u}' for f in files for u in unsafe(f.read_text())}
    by_name = {u.split(': ', 1)[1] for u in found if 'import by name' in u}
    assert len(by_name) == len(found) and by_name == {"import by name, importlib.import_module(f'rlhf_flant5.models.{name}')", 'import by name, pydoc.locate(cfg._target_)'}, found   # one of five; the command line's


# --- the network


HOOK = '''
import sys; seen = []
def hook(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'socket.sendmsg'):
        seen.append(str(args[0] if event.startswith('socket.get') else args[1])); raise OSError('no network here')
sys.addaudithook(hook)
'''
def watched(code, *args, **env):
    quiet = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy') and k not in ('HF_ENDPOINT', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'DISABLE_TELEMETRY', 'HF_UPDATE_DOWNLOAD_COUNTS')}
    return subprocess.run([sys.executable, '-c', HOOK + code, *map(str, args)], text=True, capture_output=True, timeout=300, env=quiet | {'PYTHONPATH': str(root)} | {k: str(v) for k, v in env.items()})


def test_nothing_phones_home(results, model_folder, pairs_folder):
    "Local folders: training, frozen and not, loading, scoring and comparing ask the network for nothing. Names of the hub: only the hub is asked."
    code = '''
from rlhf_flant5.train import main, train; from rlhf_flant5.compare import main as compare; from rlhf_flant5.models.base import RewardModel; from rlhf_flant5.data.pairs import encode; from rlhf_flant5.data.batches import pad_ids
import datasets.config, huggingface_hub.constants, os; from huggingface_hub.utils import build_hf_headers
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS and 'torch' not in build_hf_headers()['user-agent']
pairs, *settings = sys.argv[1:]
for i, frozen in enumerate(('True', 'False')):
    s = train([f'data.name={pairs}', f'index={i}', f'model.train_transformer={frozen}', *settings])
    m = RewardModel.from_pretrained(s['folder']/'simulation'/'best_model'); m(**pad_ids(encode(m.tokenizer, ['\\n\\nHuman: a\\n\\nAssistant: b']), 0))
compare([os.environ['RESULTS_ROOT_DIR']]); print(seen)
print(main(['index=9', *settings]))
try: RewardModel.from_pretrained('nobody/nothing')
except ValueError as e: print(e)
print({*seen})
'''
    done = watched(code, pairs_folder, f'model.transformer_name={model_folder}', *short, 'training.compile=false', RLHF_FLANT5_CACHE=results/'cache', HF_HOME=results/'hf')
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    local, code, nobody, asked = done.stdout.splitlines()[-4:]
    assert local == '[]' and code == '2' and done.stderr.strip().splitlines()[-1].startswith('error: data.name=Anthropic/hh-rlhf: no such folder here, the hub cannot be reached')
    assert 'model=nobody/nothing: no such folder here, the hub cannot be reached' in nobody and asked == "{'huggingface.co'}"


def test_who_sets_telemetry_decides():
    code = "import rlhf_flant5, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['HF_UPDATE_DOWNLOAD_COUNTS'])"
    assert watched(code).stdout.split() == ['1', '0'] and watched(code, HF_HUB_DISABLE_TELEMETRY=0, HF_UPDATE_DOWNLOAD_COUNTS=1).stdout.split() == ['0', '1']
