"Folders, caches and data that somebody else has made: what they bring is never run, never followed out of its place, and refused in one line."
import ast, itertools, json, locale, os, pickle, shutil, struct, subprocess, sys, time
from collections import Counter, defaultdict
import numpy as np
import pytest, torch
from conftest import root, saved_run, short
from datasets import Dataset
from rlhf_flant5 import compare
from rlhf_flant5.backbone.t5 import Backbone, load_flan_t5
from rlhf_flant5.comparison.report import write_report
from rlhf_flant5.comparison.comparisons import comparisons
from rlhf_flant5.comparison.runs import load_runs
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.batches import PairBatches
from rlhf_flant5.data.pairs import read_pairs
from rlhf_flant5.data.tokens import encode, load_tokenizer
from rlhf_flant5.data.toy import toy_tokenizer, toy_transformer
from rlhf_flant5.models.attention_pooled_encoder import RewardFromAttentionPooledEncoder
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.training.build import model_class
from rlhf_flant5.training.runs import run_dir
from rlhf_flant5.training.states import keep_states
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Model


def refused(f, says=''):
    "One printable line that says why."
    with pytest.raises(ConfigError) as e: f()
    message = str(e.value)
    assert message.isprintable() and len(message) < 1000 and says in message, message


def evil(marker):
    "The source of a module that leaves a file where it is imported."
    return f'''open({str(marker)!r}, 'w').close()
from transformers import T5Config, T5Model, PreTrainedTokenizerFast
class Evil(T5Model): config_class = T5Config
class EvilTokenizer(PreTrainedTokenizerFast): pass
'''


class Bomb:
    "Writes a file when it is unpickled."
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return open, (self.marker, 'w')


@pytest.fixture
def marker(tmp_path, monkeypatch):
    "A file that nothing may write. Whoever asks on the terminal whether to run code is told yes; nobody may ask."
    asked = []
    def answer(*args):
        asked.append(args)
        return 'y'
    monkeypatch.setattr('builtins.input', answer)

    path, importable = tmp_path/'executed', tmp_path/'path'
    importable.mkdir()
    (importable/'evil.py').write_text(evil(path))
    monkeypatch.syspath_prepend(importable)
    yield path
    assert not path.exists() and not asked and 'evil' not in sys.modules


@pytest.fixture
def model(model_folder, tmp_path): return shutil.copytree(model_folder, tmp_path/'model')

@pytest.fixture(scope='module')
def kept_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kept')/'model'
    backbone = Backbone(toy_transformer(cls=T5EncoderModel))
    RewardFromAttentionPooledEncoder(backbone, 16, None, [8]).save_pretrained(folder, toy_tokenizer())
    return folder

@pytest.fixture
def saved(kept_model, tmp_path): return shutil.copytree(kept_model, tmp_path/'saved')


def read(path): return json.loads(path.read_text())
def write(path, found): path.write_text(json.dumps(found))

def change(path, **changes):
    "Give a JSON object other values; ... takes a key away."
    found = read(path) | changes
    write(path, {k: v for k, v in found.items() if v is not ...})

def same(a, b): return a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items())

def weights(loaded): return loaded.state_dict()


def loaders(model, saved):
    "A plain T5 and a saved reward model, each with what loads it."
    return (model, load_flan_t5), (saved, RewardModel.from_pretrained)

def tokenizers(model, saved):
    return (model, load_tokenizer), (saved/'tokenizer', lambda _: RewardModel.from_pretrained(saved))


def test_the_traps_work(tmp_path):
    "What the other tests look for would be there if the code ran."
    bomb, code = tmp_path/'a', tmp_path/'b'
    pickle.loads(pickle.dumps(Bomb(bomb))).close()
    exec(evil(code), {})
    assert bomb.exists() and code.exists()


# --- models


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'pytorch_model-00001-of-00001.bin', 'model.safetensors'])
def test_pickles_alone_are_refused(model, saved, marker, name):
    for folder, load in loaders(model, saved):
        (folder/'model.safetensors').unlink()
        (folder/name).write_bytes(pickle.dumps(Bomb(marker)))
        if '-of-' in name: write(folder/'pytorch_model.bin.index.json', dict(metadata={}, weight_map={'shared.weight': name}))
        refused(lambda: load(str(folder)), 'do not load' if name == 'model.safetensors' else 'safetensors')


PICKLES = 'pytorch_model.bin', 'adapter_model.bin', 'training_args.bin', 'optimizer.pt', 'rng.pth'
CODE = 'modeling_t5.py', 'evil.py', '__init__.py', 'handler.py', 'requirements.txt'
ADAPTER = dict(peft_type='LORA', base_model_name_or_path='evil/evil', r=1, target_modules=['q'],
               auto_mapping=dict(base_model_class='Evil', parent_library='evil'))
FETCHES = dict(attn_implementation='evil/kernel', _attn_implementation='evil/kernel',
               transformers_weights='adapter_model.bin', custom_code='evil.py',
               custom_pipelines=dict(evil=dict(impl='evil.Evil')), configuration_files=['config.9.0.0.json'],
               quantization_config=dict(quant_method='bitsandbytes', load_in_8bit=True),
               architectures=['Evil'], _target_='evil.Evil')

def test_what_lies_beside_is_ignored(model, saved, marker):
    "Pickles, adapters, code, and settings that would fetch or open something: the weights are those of the plain folder."
    before = [weights(load(str(folder))) for folder, load in loaders(model, saved)]
    for folder in (model, saved):
        for name in PICKLES: (folder/name).write_bytes(pickle.dumps(Bomb(marker)))
        for name in CODE: (folder/name).write_text(evil(marker))
        write(folder/'adapter_config.json', ADAPTER)
    change(model/'config.json', **FETCHES)
    change(saved/'config.json', **FETCHES, transformer=read(saved/'config.json')['transformer'] | FETCHES)
    after = [weights(load(str(folder))) for folder, load in loaders(model, saved)]
    assert same(before[0], after[0]) and same(before[1], after[1])


def test_code_of_a_model_is_refused(model, saved, marker):
    named = dict(AutoConfig='evil.Evil', AutoModel='evil.Evil', AutoModelForSeq2SeqLM='evil/evil--evil.Evil')
    for folder in (model, saved): (folder/'evil.py').write_text(evil(marker))
    change(model/'config.json', auto_map=named)
    refused(lambda: load_flan_t5(str(model)), 'never run')
    change(saved/'config.json', transformer=read(saved/'config.json')['transformer'] | dict(auto_map=named))
    refused(lambda: RewardModel.from_pretrained(saved), 'never run')


HOSTILE_TOKENIZERS = {
    'code': dict(auto_map=dict(AutoTokenizer=['evil.EvilTokenizer', 'evil.EvilTokenizer'])),
    'code in a list': dict(auto_map=['evil.EvilTokenizer', None]),
    'code of another repository': dict(auto_map=dict(AutoTokenizer=[None, 'evil/evil--evil.EvilTokenizer']),
                                       tokenizer_class='EvilTokenizer'),
    'own class': dict(tokenizer_class='EvilTokenizer'),
    'class of a module': dict(tokenizer_class='evil.EvilTokenizer'),
    'AutoModel': dict(tokenizer_class='AutoModel'),
    'AutoTokenizer': dict(tokenizer_class='AutoTokenizer'),
    'pipeline': dict(tokenizer_class='pipeline'),
    'path as class': dict(tokenizer_class='../../evil'),
    'list as class': dict(tokenizer_class=['T5Tokenizer']),
    'many tokens': dict(extra_ids=10**9),
    'text as number': dict(extra_ids='9'),
    'list as token': dict(eos_token=[]),
    'no padding': dict(pad_token=None),
    'added under a word': dict(added_tokens_decoder={'x': 1})}

@pytest.mark.parametrize('changes', HOSTILE_TOKENIZERS.values(), ids=HOSTILE_TOKENIZERS)
def test_hostile_tokenizer_settings(model, saved, marker, changes):
    "With a config.json that names code as well: transformers would ask on the terminal, and run it."
    change(model/'config.json', model_type=..., auto_map=dict(AutoModel='evil.Evil', AutoConfig='evil.Evil'))
    for folder, load in tokenizers(model, saved):
        (folder/'evil.py').write_text(evil(marker))
        change(folder/'tokenizer_config.json', **changes)
        refused(lambda: load(str(folder)))


HOSTILE_VOCABULARIES = {
    'garbage': 'garbage', 'empty object': '{}', 'cut off': '[', 'nested lists': '['*10**5,
    'nested models': '{"model": ' + '{"type": '*10**5, 'zero bytes': '\x00'*100,
    'no words': '{"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": []}}'}

@pytest.mark.parametrize('text', HOSTILE_VOCABULARIES.values(), ids=HOSTILE_VOCABULARIES)
def test_hostile_vocabulary(model, saved, text):
    for folder, load in tokenizers(model, saved):
        (folder/'tokenizer.json').write_text(text)
        refused(lambda: load(str(folder)), 'tokenizer')
        (folder/'tokenizer.json').unlink()
        refused(lambda: load(str(folder)), 'tokenizer')

        (folder/'spiece.model').write_text(text)
        change(folder/'tokenizer_config.json', tokenizer_class='T5Tokenizer')
        refused(lambda: load(str(folder)), 'tokenizer')
        (folder/'tokenizer_config.json').write_text(text)
        refused(lambda: load(str(folder)), 'tokenizer')

        shutil.rmtree(folder)
        refused(lambda: load(str(folder)))


def test_a_panic_is_one_line(model):
    "The tokenizer's library ends in a panic, which Python's Exception does not cover."
    tokens = read(model/'tokenizer.json')
    tokens['post_processor']['special_tokens'] = {}
    write(model/'tokenizer.json', tokens)
    refused(lambda: load_tokenizer(str(model)), 'does not load')


def test_files_of_a_tokenizer_stay_in_its_folder(model, tmp_path):
    "Names of other files in the settings are not followed, templates not rendered, lengths not obeyed."
    texts = ['\n\nHuman: What is a wasp?\n\nAssistant: It is an insect.', 'x </s> y']
    want = encode(load_tokenizer(str(model)), texts)

    outside = shutil.copytree(model, tmp_path/'tokenizer.')          # the prefix of `tokenizer./../..`
    write(tmp_path/'tokenizer.json', read(outside/'tokenizer.json') | dict(added_tokens=[]))
    change(model/'tokenizer_config.json', fast_tokenizer_files=['tokenizer./../../tokenizer.json'],
           tokenizer_file='../tokenizer.json', vocab_file='../spiece.model', gguf_file='../x.gguf',
           init_inputs=['../x'], name_or_path='evil/evil')
    write(model/'special_tokens_map.json', dict(tokenizer_file='../tokenizer.json', tokenizer_object=1, vocab=[]))

    template = '{{ cycler.__init__.__globals__.os.system("exit 1") }}'
    change(model/'tokenizer_config.json', chat_template=template)
    (model/'chat_template.jinja').write_text(template)
    (model/'additional_chat_templates').mkdir()
    (model/'additional_chat_templates'/'tool.jinja').write_text(template)

    padding = dict(strategy=dict(Fixed=10**9), direction='Left', pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token='<pad>')
    truncation = dict(direction='Right', max_length=3, strategy='LongestFirst', stride=0)
    change(model/'tokenizer.json', padding=padding, truncation=truncation)
    got = load_tokenizer(str(model))
    assert got.chat_template is None and encode(got, texts) == want


@pytest.mark.parametrize('name', [
    '../outside.safetensors', '{}/outside.safetensors', 'a/../../outside.safetensors', '..\\outside.safetensors',
    'file:///outside.safetensors', 'pytorch_model.bin', 'nowhere.safetensors', '', 7, None, ['a']])
def test_an_index_stays_in_its_folder(model, tmp_path, name):
    outside = tmp_path/'outside.safetensors'
    shutil.move(model/'model.safetensors', outside)
    (model/'a').mkdir()
    for there in ('pytorch_model.bin', 'x.safetensors'): (model/there).touch()
    if isinstance(name, str): name = name.format(tmp_path)
    write(model/'model.safetensors.index.json', dict(metadata={}, weight_map=dict.fromkeys(load_file(outside), name)))
    refused(lambda: load_flan_t5(str(model)), 'must be a .safetensors file in the same folder')


@pytest.mark.parametrize('text', ['[]', '{"weight_map": 1}', '{"weight_map": {}}', '{', '['*10**6],
                         ids=['list', 'number', 'no weight', 'cut off', 'nested'])
def test_a_damaged_index(model, text):
    shutil.move(model/'model.safetensors', model/'x.safetensors')
    (model/'model.safetensors.index.json').write_text(text)
    refused(lambda: load_flan_t5(str(model)))


def raw(header, data=b''):
    "The bytes of a safetensors file."
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header)) + header + data

def f32(*offsets, shape=(1,), dtype='F32'): return dict(dtype=dtype, shape=[*shape], data_offsets=[*offsets])

DAMAGED = {
    'empty': b'',
    'shorter than its length': b'\x00'*7,
    'header of exabytes': struct.pack('<Q', 2**62) + b'{}',
    'header of the most bytes': struct.pack('<Q', 2**64 - 1),
    'cut off': raw(b'{'),
    'nested': raw(b'['*10**5),
    'no weight': raw({}),
    'overlapping': raw(dict(a=f32(0, 4), b=f32(2, 6)), b'\x00'*6),
    'exabytes': raw(dict(a=f32(0, 2**62, shape=(2**60,)))),
    'size overflows': raw(dict(a=f32(0, 4, shape=(2**32, 2**32))), b'\x00'*4),
    'ends before it begins': raw(dict(a=f32(4, 0)), b'\x00'*4),
    'unknown type': raw(dict(a=f32(0, 4, dtype='OBJ')), b'\x00'*4),
    'escapes in a name': raw({'a\n\x1b[2J': f32(0, 4, shape=(3,))}, b'\x00'*4),
    'begins before the file': raw(dict(a=f32(-4, 4))),
    'no data': raw(dict(a=f32(0, 4))),
    'odd metadata': raw(dict(__metadata__=dict(a=1), a=f32(0, 4)), b'\x00'*4),
    'escapes in many names': raw({f'a{i}\x1b': f32(4*i, 4*i + 4) for i in range(9)}, b'\x00'*36)}

@pytest.mark.parametrize('content', DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors(model, saved, content):
    for folder, load in loaders(model, saved):
        (folder/'model.safetensors').write_bytes(content)
        refused(lambda: load(str(folder)))


HARMS = dict(
    long=(lambda w: w.long(), 'of type I64'),
    bool=(lambda w: w.bool(), 'of type BOOL'),
    nan=(lambda w: w.log(), 'NaN or infinite'),
    overflow=(lambda w: w.double()*1e300, 'NaN or infinite'),
    flat=(lambda w: w.flatten(), 'another shape'),
    cut=(lambda w: w.T.contiguous()[:, :-1].contiguous(), 'another shape'),
    none=(lambda w: None, 'missing'))

@pytest.mark.parametrize('name', ['encoder.block.0.layer.0.SelfAttention.q.weight', 'shared.weight'])
@pytest.mark.parametrize('harm, says', HARMS.values(), ids=HARMS)
def test_a_hostile_weight_is_named(model, saved, name, harm, says):
    for (folder, load), prefix in zip(loaders(model, saved), ('', 'backbone.transformer.')):
        held, key = load_file(folder/'model.safetensors'), prefix + name
        if key not in held: key = prefix + 'encoder.embed_tokens.weight'      # the shared weight has two names, one of which is stored
        held[key] = harm(held[key])
        save_file({k: v for k, v in held.items() if v is not None}, folder/'model.safetensors')
        refused(lambda: load(str(folder)), says)
        refused(lambda: load(str(folder)), 'SelfAttention.q.weight' if 'block' in name else 'shared.weight')


def test_weights_too_many(saved):
    more = load_file(saved/'model.safetensors') | {'a\x1b\n': torch.ones(1)}
    save_file(more, saved/'model.safetensors')
    refused(lambda: RewardModel.from_pretrained(saved), '1 weights too many')


# a key of `settings` or `transformer` alone is changed; ... takes a key away
HOSTILE_MODELS = dict(
    format=['rlhf_flant5 reward model 2', ..., ['x'*10**5]],
    readout=['../../evil', 'evil', 'os', '__init__', 'base', 'attention_pooled_encoder.os', '\x1b[2J\n', 7, ...],
    settings=[..., [], dict(evil=1), dict(backbone=1), dict(self=1), dict(_target_='evil.Evil'), {'__class__': 1},
              dict(pooling_output_dim='16'), dict(pooling_output_dim=True), dict(pooling_output_dim=0),
              dict(pooling_output_dim=None), dict(n_blocks_to_use=-1), dict(readout_additional_layers='evil'),
              dict(readout_additional_layers=[1.5]), dict(readout_additional_layers=[[8]])],
    has_decoder=['no', True],
    train_transformer=[1],
    lora=[None, {}, dict(r=-1), dict(r=2, target_modules=['q']), dict(r=2, alpha=float('inf'), target_modules=['q']),
          dict(r=2, alpha=4, target_modules='.*'), dict(r=2, alpha=4, target_modules=[1]),
          dict(r=2, alpha=4, target_modules=['nothing']), dict(r=2, alpha=4, target_modules=['layer_norm']),
          dict(r=2, alpha=4, target_modules=['q'], init_lora_weights='evil')],
    transformer=[..., [], {}, dict(model_type='evil'), dict(d_model=-1), dict(d_model='32'), dict(num_layers=1.0),
                 dict(dropout_rate=float('nan')), dict(layer_norm_epsilon=float('inf')),
                 dict(feed_forward_proj='gated-../../evil'), dict(feed_forward_proj=['relu']),
                 dict(decoder_start_token_id=-1)])
CASES = [pytest.param(key, value, id=f'{key}={value}'[:60].encode('unicode_escape').decode())
         for key, values in HOSTILE_MODELS.items() for value in values]

@pytest.mark.parametrize('key, value', CASES)
def test_hostile_config_of_a_saved_model(saved, marker, key, value):
    if key in ('settings', 'transformer') and isinstance(value, dict) and value:
        value = read(saved/'config.json')[key] | value
    change(saved/'config.json', **{key: value})
    refused(lambda: RewardModel.from_pretrained(saved))


DAMAGED_JSON = {
    'empty': '', 'cut off': '{', 'list': '[]', 'number': '7', 'null': 'null', 'byte order mark': '\ufeff{}',
    'infinity': '{"a": 1e999999}', 'digits': '{"a": ' + '9'*5000 + '}', 'nested lists': '['*10**6,
    'nested objects': '{"a":'*10**6, 'half a pair': '"\\ud800"', 'escape': '{"\x1b[2J'}

@pytest.mark.parametrize('text', DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_damaged_json(model, saved, text):
    for folder, load in loaders(model, saved):
        (folder/'config.json').write_text(text)
        refused(lambda: load(str(folder)))


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
@pytest.mark.parametrize('make, unmake', [(os.mkfifo, os.unlink), (os.mkdir, os.rmdir)], ids=['pipe', 'folder'])
def test_no_plain_files(model, saved, make, unmake, name):
    "A pipe would be waited for, a folder is no file."
    for folder, load in loaders(model, saved):
        path, away = folder/name, folder/'away'
        path.rename(away)
        make(path)
        refused(lambda: load(str(folder)))
        unmake(path)
        away.rename(path)
        load(str(folder))


def test_tokenizer_of_another_model(saved):
    tokens = read(saved/'tokenizer'/'tokenizer.json')
    tokens['model']['vocab']['far'] = 10**6
    write(saved/'tokenizer'/'tokenizer.json', tokens)
    refused(lambda: RewardModel.from_pretrained(saved), 'not of one model')


ABSURD = '''
import json, resource, sys
from pathlib import Path
from rlhf_flant5.backbone.t5 import load_flan_t5
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.tokens import load_tokenizer
from rlhf_flant5.models.base import RewardModel

model, saved = map(Path, sys.argv[1:])
def flan(): load_flan_t5(str(model))
def ours(): RewardModel.from_pretrained(saved)
def tokens(): load_tokenizer(str(model))
flan()
ours()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pages = int(Path('/proc/self/statm').read_text().split()[0])
most = pages*resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
start = peak()

def attempt(path, content, load):
    before = path.read_bytes()
    if not isinstance(content, bytes): content = json.dumps(json.loads(before) | content).encode()
    path.write_bytes(content)
    try:
        load()
        print('loaded', path, str(content)[:60])
    except ConfigError as e: print('refused' if str(e).isprintable() else 'several lines')
    path.write_bytes(before)

sizes = [dict(d_model=10**9), dict(d_model=2**16, vocab_size=2**24, d_ff=2**20), dict(num_layers=10**9),
         dict(num_layers=256, num_decoder_layers=256), dict(num_heads=10**12),
         dict(relative_attention_num_buckets=2**16, num_heads=2**12), dict(vocab_size=2**70)]
files = [b'[' + b'[],'*3*10**5 + b'1]', b'{"a": "' + b'x'*10**7 + b'"}', b'['*3*10**6]
for content in sizes + files: attempt(model/'config.json', content, flan)

transformer = json.loads((saved/'config.json').read_text())['transformer']
for size in sizes: attempt(saved/'config.json', dict(transformer=transformer | size), ours)
for content in [dict(lora=dict(r=2**20, alpha=1, target_modules=['q', 'k', 'v', 'o', 'wi_0'])),
                dict(settings=dict(pooling_output_dim=2**20, readout_additional_layers=[2**20]*100)),
                dict(settings=dict(readout_additional_layers=[1]*10**6)),
                dict(settings=dict(readout_additional_layers=['x']*8*10**5)), *files]:
    attempt(saved/'config.json', content, ours)

for content in [dict(extra_ids=10**9), *files]: attempt(model/'tokenizer_config.json', content, tokens)
for content in [b'[' + b'[],'*2*10**6 + b'1]', b'x'*10**8]: attempt(model/'tokenizer.json', content, tokens)
print((peak() - start)//1024)
'''

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_absurd_sizes_take_no_memory(model, saved):
    "In a process that may take 1 GiB more than it has after loading the plain folders."
    done = subprocess.run([sys.executable, '-c', ABSURD, str(model), str(saved)], text=True, capture_output=True,
                          timeout=300, env=os.environ | {'PYTHONPATH': str(root)})
    *answers, mib = done.stdout.splitlines() or ['nothing', '0']
    assert done.returncode == 0 and answers == ['refused']*30, done.stdout + done.stderr[-2000:]
    assert int(mib) < 600, f'{mib} MiB'


# --- caches, data, runs


@pytest.fixture
def world():
    "A frozen backbone and twenty pairs."
    lengths = range(4, 44)
    ids = [torch.randint(3, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    pairs = dict(chosen_ids=ids[:20], rejected_ids=ids[20:], id=[*map(str, range(20))], subset=['x']*20)
    return Backbone(toy_transformer(cls=T5Model), train_transformer=False), PairBatches(Dataset.from_dict(pairs), 0, 8, 512)


def link(path, kind, victim):
    if kind == 'symlink': path.symlink_to(victim)
    if kind == 'dangling': path.symlink_to(victim.parent/'nowhere')
    if kind == 'hardlink': path.hardlink_to(victim)
    if kind == 'fifo': os.mkfifo(path)

LINKS = 'symlink', 'dangling', 'hardlink', 'fifo'
FILE_LINKS = [(kind, name) for kind in LINKS for name in ('segment-00000.safetensors', 'lock')]
FOLDER_LINKS = [('symlink', ''), ('dangling', '')]        # a folder has no other link

@pytest.mark.parametrize('kind, name', FILE_LINKS + FOLDER_LINKS)
def test_links_in_a_cache_are_refused(tmp_path, world, name, kind):
    entry, victim = keep_states(*world, tmp_path/'cache').path, tmp_path/'victim'
    if name:
        victim.write_text('mine')
        (entry/name).unlink()
        held = [victim]
    else:
        victim.mkdir()
        shutil.rmtree(entry)
        held = [victim/'lock', victim/'segment-00000.safetensors']
        for path in held: path.write_text('mine')
    link(entry/name, kind, victim)
    refused(lambda: keep_states(*world, tmp_path/'cache'), 'writing would change what it leads to')
    assert not (tmp_path/'nowhere').exists()
    assert [path.read_text() for path in held] == ['mine']*len(held)
    if not name: assert sorted(victim.iterdir()) == held


def test_a_cache_on_a_linked_disk(tmp_path, world):
    "The user's own link above the entries is followed."
    (tmp_path/'disk').mkdir()
    (tmp_path/'cache').symlink_to(tmp_path/'disk')
    keep_states(*world, tmp_path/'cache')
    assert [*(tmp_path/'disk'/'states').iterdir()]


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
    for beside in ('states.npy', 'states.npz', 'segment-00001.safetensors', 'journal.pkl'):
        (kept.path/beside).write_bytes(npy(marker))
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


SCRIPTS = 'hh-rlhf.py', 'helpful-base.py', 'evil.py', '__init__.py', 'json.py', 'train.py', 'dataset_loading_script.py'
EVIL_INFO = dict(default=dict(builder_name='evil', dataset_name='evil', features=dict(chosen=dict(_type='evil.Evil')),
                              download_checksums={'http://evil/': {}}))
EVIL_README = '''---
configs:
- config_name: default
  data_files: ../../../*
  drop_labels: !!python/object/apply:os.system ["touch executed"]
---
'''

def test_code_beside_the_pairs_is_not_run(pairs_folder, tmp_path, marker, monkeypatch):
    "The loading scripts that `datasets` used to run, in the folder and in its subsets, and named as the folder."
    folder = shutil.copytree(pairs_folder, tmp_path/'hh-rlhf')
    for where in (folder, folder/'helpful-base'):
        for name in SCRIPTS: (where/name).write_text(evil(marker))
        for name in ('state.json', 'dataset.arrow', 'train.pkl'): (where/name).write_bytes(pickle.dumps(Bomb(marker)))
        write(where/'dataset_infos.json', EVIL_INFO)
        (where/'README.md').write_text(EVIL_README)
    monkeypatch.chdir(folder)
    assert len(read_pairs(folder, ['helpful-base'], 'train', defaultdict(Counter))) > 50


def test_no_file_names_a_class(saved, model):
    "What a file says of classes is not looked at."
    for path in (saved/'config.json', model/'config.json', saved/'tokenizer'/'tokenizer_config.json'):
        change(path, _target_='evil.Evil', __class__='evil.Evil', py_class='evil.Evil')
    (model/'config.yaml').write_text('_target_: evil.Evil\n')
    RewardModel.from_pretrained(saved)
    load_flan_t5(str(model))
    load_tokenizer(str(model))


@pytest.mark.parametrize('setting', [
    'hydra.searchpath=[file://{}]', 'model={}/evil', 'model=../../evil', 'experiment={}/evil', '+evil=evil',
    'hydra/launcher=evil', 'hydra.run.dir=/', 'model@evil={}/evil'])
def test_no_setting_names_a_file(results, marker, setting):
    (results/'evil.yaml').write_text('_target_: evil.Evil\n')
    refused(lambda: load_config([setting.format(results)]))


@pytest.mark.parametrize('name', ['os.system', 'rlhf_flant5.models.base.Path', 'nowhere.At.All', 'builtins.eval'])
def test_a_readout_is_a_readout(name):
    "A class is imported by name for `model._target_` of the command line alone."
    cfg = load_config([f'model._target_={name}'])
    refused(lambda: model_class(cfg.model), 'must be a subclass of RewardModel')


MINE = '''
from rlhf_flant5.models.decoder_output import RewardFromDecoderOutput
class Mine(RewardFromDecoderOutput): pass
'''

def test_an_own_readout_of_the_command_line(tmp_path, monkeypatch):
    "The wanted use stays: the command line is the user's own."
    (tmp_path/'mine.py').write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = load_config(['model=decoder_output', 'model._target_=mine.Mine'])
    assert model_class(cfg.model).__name__ == 'Mine'


def test_compare_writes_through_no_link(results, capsys):
    "Somebody's results bring links with the names of what is written."
    victim, folder = results/'victim', results/'comparison'
    victim.write_text('mine')
    saved_run(results, 0)
    folder.mkdir()
    for name in ('report.md', 'scores.json', 'accuracy.png', 'suspicious.md'): (folder/name).symlink_to(victim)
    (folder/'notes.txt').write_text('kept')
    assert compare.main([str(results)]) == 0
    assert victim.read_text() == 'mine' and (folder/'notes.txt').read_text() == 'kept'
    assert 'decoder_output' in (folder/'report.md').read_text()

    elsewhere = folder.rename(results/'elsewhere')
    folder.symlink_to(elsewhere)
    assert compare.main([str(results)]) == 2 and 'is a link' in capsys.readouterr().err


def assert_one_line(text, *words):
    assert text.count('\n') == 1 and text[:-1].isprintable(), text
    for word in words: assert word in text, text


HOSTILE_SUMMARIES = {
    'escape': ('readout', 'a\x1b[2Jb'), 'row of a table': ('readout', 'a\n| b'), 'number as word': ('readout', 7),
    'no data': ('data_name', None), 'word as number': ('seed', '1'), 'infinity': ('seconds', 1e999),
    'no scores': ('validation', {}), 'accuracy of 2': ('test', dict(accuracy=2, low=0, high=1, n=1)),
    'word as share': ('best_reachable_accuracy', 'x'), 'list as number': ('n_trained_parameters', [])}

@pytest.mark.parametrize('key, value', HOSTILE_SUMMARIES.values(), ids=HOSTILE_SUMMARIES)
def test_hostile_summary(results, capsys, key, value):
    saved_run(results, 0)
    change(saved_run(results, 1, seed=2)/'results'/'summary.json', **{key: value})
    assert compare.main([str(results)]) == 2
    assert_one_line(capsys.readouterr().err, key)


ESCAPES = '\x1b]0;owned\x07\x1b[2J\x1b[31m', '\u202egnp.exe', 'a\u2066b', '\x9b31m'

@pytest.mark.parametrize('odd', ESCAPES)
@pytest.mark.parametrize('where', ['value', 'key', 'list', 'commit', 'precision'])
def test_escapes_in_settings_and_origin(results, capsys, odd, where):
    "What would write to the terminal or turn the reading order is refused in one printable line, or shown escaped."
    folder = saved_run(results, 0)
    saved_run(results, 1, seed=2)
    config = dict(value=dict(type=odd), key={odd: 1}, list=dict(type=[odd]))
    if where in config: write(folder/'data'/'config.yaml', dict(seed=1, training=dict(optimizer=config[where])))
    if where == 'commit': change(folder/'data'/'provenance.json', source=dict(commit=odd))
    if where == 'precision': write(folder/'data'/'decided.json', dict(precision=odd))

    code, said = compare.main([str(results)]), capsys.readouterr()
    assert code == (0 if where == 'list' else 2)
    if code: assert_one_line(said.err, folder.name)
    text = said.out + ''.join(p.read_text(encoding='utf-8') for p in results.glob('comparison/*.[mc][ds]*'))
    assert all(c.isprintable() or c == '\n' for c in text)


NINES = [f'{new}: &{new} [{", ".join([f"*{old}"]*9)}]' for old, new in zip('abcdefgh', 'bcdefghi')]
HOSTILE_SETTINGS = {
    'aliases': '\n'.join(['a: &a [x, x, x, x, x, x, x, x, x]', *NINES]), 'alias of itself': 'a: &a {b: *a}\n',
    'merged alias': 'a: &a 1\nb: {<<: {c: *a}}\n', 'nested': 'a: ' + '['*60000, 'too long': 'x'*2**17,
    'digits': 'a: ' + '9'*5000, 'hexadecimal digits': 'a: [0x' + 'f'*9999 + ']', 'list': '- 1\n',
    'call': 'a: !!python/object/apply:os.system [ls]'}

@pytest.mark.parametrize('text', HOSTILE_SETTINGS.values(), ids=HOSTILE_SETTINGS)
def test_settings_that_grow(results, capsys, text):
    "Nine lines of aliases stand for 10^9 leaves; they are refused before they grow, as is all else that no run writes."
    path, begun = saved_run(results, 0)/'data'/'config.yaml', time.monotonic()
    path.write_text(text)
    assert compare.main([str(results)]) == 2 and time.monotonic() - begun < 20
    assert_one_line(capsys.readouterr().err, 'config.yaml')


ODD_NUMBERS = [
    ('results/summary.json', dict(seconds=10**400)), ('results/summary.json', dict(seed=-10**400)),
    ('results/history.jsonl', dict(batch=10**400)), ('results/history.jsonl', dict(batch='a')),
    ('results/history.jsonl', dict(batch=True)), ('results/history.jsonl', {'validation/accuracy': 7}),
    ('results/history.jsonl', {'validation/accuracy': None}),
    ('data/provenance.json', dict(source=[])), ('data/provenance.json', dict(pairs=dict(test='x'))),
    ('data/provenance.json', dict(ended=10**400))]

@pytest.mark.parametrize('name, changes', ODD_NUMBERS, ids=lambda v: str(v)[:40])
def test_odd_numbers_of_a_run(results, capsys, name, changes):
    path = saved_run(results, 0)/name
    if path.suffix == '.jsonl': path.write_text(json.dumps({'batch': 5, 'validation/accuracy': .5} | changes) + '\n')
    else: change(path, **changes)
    assert compare.main([str(results)]) == 2
    message = capsys.readouterr().err
    assert_one_line(message, path.name)
    assert len(message) < 1200


TAGS = '<img src=http://evil/1>![x](http://evil/2)`code`'

def run_with_tags(results, i, readout, rate):
    settings = f'training: {{optimizer: {{type: "{TAGS}", init_lr: {rate}, {json.dumps(TAGS)}: {i}}}}}\n'
    folder = saved_run(results, i, readout=readout, transformer_name=TAGS, data_name=TAGS, settings=settings)
    for split in ('validation', 'test'):
        path = folder/'results'/f'{split}_pairs.jsonl'
        path.write_text(path.read_text().replace('"subset": "s"', f'"subset": {json.dumps(TAGS)}'))

def test_a_report_loads_nothing(results):
    "Names, settings and subsets that are tags, pictures, code or formulas to a viewer are words in the report, the sheets and the numbers."
    run_with_tags(results, 0, '=HYPERLINK("http://evil/3")', .1)
    run_with_tags(results, 1, 'decoder_output', .2)
    assert compare.main([str(results), '--only', '*']) == 0
    def written(name): return (results/'comparison'/name).read_text(encoding='utf-8')
    for name in ('report.md', 'suspicious.md', 'divided.md'):
        lines = written(name).splitlines()
        prose = ''.join(line for line in lines if not line.startswith('    '))      # indented: code
        for active in ('<img', '](http', '`code`'): assert active not in prose, (name, active)
    assert '"\'=HYPERLINK' in written('cost.csv') and '&lt;img src=' in written('report.md')


def test_a_report_is_utf8_in_any_locale(results):
    "Files are written as UTF-8 where the locale's encoding is ASCII."
    saved_run(results, 0, readout='größer', data_name='größer/数')
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, 'C')
    try:
        assert locale.getencoding() != 'UTF-8'
        write_report(comparisons(load_runs(results)[0])[0], results/'out')
    finally: locale.setlocale(locale.LC_CTYPE, before)
    for name in ('report.md', 'suspicious.md', 'cost.csv'):
        assert 'größer' in (results/'out'/name).read_text(encoding='utf-8')


def tables(text): # each as its lines
    parts = itertools.groupby(text.splitlines(), key=lambda line: line.startswith('|'))
    return [[*lines] for is_table, lines in parts if is_table]

def test_names_are_shown_as_they_are(results):
    "A dollar begins no formula in the figure, a bar ends no cell in the table."
    odd = dict(readout='$\\frac{|', data_name='a|b')
    saved_run(results, 0, transformer_name='$\\evil|$', **odd)
    assert compare.main([str(results)]) == 0
    saved_run(results, 1, transformer_name='$\\worse|$', **odd)
    assert compare.main([str(results)]) == 0      # in legends too
    found = tables((results/'comparison'/'report.md').read_text(encoding='utf-8'))
    assert any('frac' in line for table in found for line in table)
    for table in found: assert len({line.count('|') for line in table}) == 1, table


@pytest.mark.parametrize('name', ['../x', '..', '.hidden', 'a/b', '/etc', 'a\nb', '-rf', '~', '$HOME', 'x'*101])
def test_a_run_stays_below_its_root(results, name):
    refused(lambda: run_dir(name, 0))
    refused(lambda: run_dir('x', name))


def test_a_link_leads_no_run_out(results):
    for name in ('out', 'in'): (results/name).mkdir()
    (results/'in'/'Reward-Model-Training').symlink_to(results/'out')
    refused(lambda: run_dir('x', 0, results/'in'), 'leads out')


# --- the source


RUNS_DATA = {'pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve', 'jsonpickle'}
RUNS_TEXT = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen',
             'yaml.load', 'yaml.unsafe_load', 'yaml.full_load'}
RUNS_SCRIPTS = {'load_dataset', 'datasets.load_dataset', 'torch.hub.load'}
IMPORTS = {'importlib.import_module', 'import_module', 'pydoc.locate', 'locate',
           'hydra.utils.instantiate', 'instantiate'}


def unsafe_import(node):
    module = getattr(node, 'module', None) or ''
    names = [a.name for a in node.names]
    modules = names if isinstance(node, ast.Import) else [module]
    for name in {m.split('.')[0] for m in modules} & RUNS_DATA: yield name
    if module.startswith('transformers') and any(name.startswith('Auto') or name == 'pipeline' for name in names):
        yield 'a class that a folder chooses'


def unsafe_call(node):
    called, keys = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in RUNS_TEXT | RUNS_SCRIPTS or called.startswith('Auto'): yield called
    if called.endswith('torch.load') and keys.get('weights_only') != 'True': yield 'torch.load'
    for key in ('trust_remote_code', 'allow_pickle', 'shell'):
        if keys.get(key, 'False') != 'False': yield key
    if called in IMPORTS: yield f'import by name, {called}({ast.unparse(node.args[0])})'


def unsafe(source):
    "(line, what) of all in a module that could run code from data."
    for node in ast.walk(ast.parse(source)):
        found = ()
        if isinstance(node, (ast.Import, ast.ImportFrom)): found = unsafe_import(node)
        if isinstance(node, ast.Call): found = unsafe_call(node)
        for what in found: yield node.lineno, what


@pytest.mark.parametrize('source', [
    'import pickle', 'from dill import loads', 'import torch; torch.load(f)', 'torch.load(f, weights_only=False)',
    'eval(x)', 'exec(x)', 'os.system(x)', 'subprocess.run(x, shell=True)', 'yaml.load(f, Loader=yaml.Loader)',
    'np.load(f, allow_pickle=True)', 'T.from_pretrained(f, trust_remote_code=True)',
    'T.from_pretrained(f, trust_remote_code=x)', 'from transformers import AutoTokenizer',
    'AutoModel.from_pretrained(f)', 'importlib.import_module(x)', 'datasets.load_dataset(x)'])
def test_the_source_test_finds(source): assert [*unsafe(source)]


def test_the_source_runs_nothing_from_data():
    files = [*(root/'rlhf_flant5').rglob('*.py')]
    assert len(files) > 15
    found = {(f.name, n, what) for f in files for n, what in unsafe(f.read_text())}
    one_of_five = "import by name, importlib.import_module(f'rlhf_flant5.models.{name}')"
    of_the_command_line = 'import by name, pydoc.locate(cfg._target_)'
    assert sorted(what for _, _, what in found) == [one_of_five, of_the_command_line], found


# --- the network


HOOK = '''
import sys
seen = []
ASKS = 'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto', 'socket.sendmsg'
def hook(event, args):
    if event not in ASKS: return
    seen.append(str(args[0] if event.startswith('socket.get') else args[1]))
    raise OSError('no network here')
sys.addaudithook(hook)
'''
CHOICES = {'HF_ENDPOINT', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'DO_NOT_TRACK',
           'DISABLE_TELEMETRY', 'HF_UPDATE_DOWNLOAD_COUNTS'}      # what a user may have set

def watched(code, *args, **env):
    "Run code that finds no network, and no choices of a user in its environment."
    untouched = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy') and k not in CHOICES}
    env = untouched | {'PYTHONPATH': str(root)} | {k: str(v) for k, v in env.items()}
    return subprocess.run([sys.executable, '-c', HOOK + code, *map(str, args)], text=True, capture_output=True,
                          timeout=300, env=env)


LOCAL_WORK = '''
import os
from rlhf_flant5.compare import main as compare      # first: it tells the libraries below to keep quiet
from rlhf_flant5.data.batches import pad_ids
from rlhf_flant5.data.tokens import encode
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.train import main
from rlhf_flant5.training.pipeline import train_run
import datasets.config, huggingface_hub.constants
from huggingface_hub.utils import build_hf_headers

assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
assert 'torch' not in build_hf_headers()['user-agent']

pairs, *settings = sys.argv[1:]
for i, trained in enumerate(('True', 'False')):
    summary = train_run([f'data.name={pairs}', f'index={i}', f'model.train_transformer={trained}', *settings])
    model = RewardModel.from_pretrained(summary['folder']/'simulation'/'best_model')
    model(**pad_ids(encode(model.tokenizer, ['\\n\\nHuman: a\\n\\nAssistant: b']), 0))
compare([os.environ['RESULTS_ROOT_DIR']])
print(seen)

print(main(['index=9', *settings]))      # the default data are of the hub
try: RewardModel.from_pretrained('nobody/nothing')
except ValueError as e: print(e)
print({*seen})
'''

def test_nothing_phones_home(results, model_folder, pairs_folder):
    "Local folders: training, frozen and not, loading, scoring and comparing ask the network for nothing. Names of the hub: only the hub is asked."
    done = watched(LOCAL_WORK, pairs_folder, f'model.transformer_name={model_folder}', *short, 'training.compile=false',
                   RLHF_FLANT5_CACHE=results/'cache', HF_HOME=results/'hf')
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    local, code, nobody, asked = done.stdout.splitlines()[-4:]
    error = done.stderr.strip().splitlines()[-1]
    unreachable = 'no such folder here, the hub cannot be reached'
    assert local == '[]' and code == '2'
    assert error.startswith(f'error: data.name=Anthropic/hh-rlhf: {unreachable}')
    assert f'model=nobody/nothing: {unreachable}' in nobody
    assert asked == "{'huggingface.co'}"


def test_who_sets_telemetry_decides():
    names = 'HF_HUB_DISABLE_TELEMETRY', 'HF_UPDATE_DOWNLOAD_COUNTS'
    code = f'import rlhf_flant5, os; print(*map(os.environ.get, {names}))'
    assert watched(code).stdout.split() == ['1', '0']
    assert watched(code, **dict(zip(names, (0, 1)))).stdout.split() == ['0', '1']
