"A T5 from a folder: an architecture within bounds and whole, finite weights, or a refusal in one line; its logits."
import json, math, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForTextEncoding, T5Config, T5ForConditionalGeneration
from rlhf_flant5.backbone.output import load_seq2seq
from rlhf_flant5.backbone.t5 import Backbone, build_flan_t5, flan_t5_config, load_flan_t5
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.hub import t5_config
from rlhf_flant5.data.toy import toy_tokenizer
from rlhf_flant5.models.attention_pooled_encoder import RewardFromAttentionPooledEncoder
from rlhf_flant5.training.states import weights_digest
from rlhf_flant5.use.elsewhere import export_backbone
from rlhf_flant5.use.scorer import RewardModel

query = 'encoder.block.1.layer.0.SelfAttention.q.weight'


@pytest.fixture
def folder(model_folder, tmp_path): return shutil.copytree(model_folder, tmp_path/'model')


def refused(folder, says):
    with pytest.raises(ConfigError) as e: load_flan_t5(str(folder))
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_only_the_architecture_is_read():
    "What else a config.json says (a kernel, a file of weights, a name) has no effect."
    config = flan_t5_config('small').to_dict()
    more = dict(attn_implementation='owner/kernel', transformers_weights='../x.safetensors', name_or_path='a')
    assert t5_config(config | more, 'here').to_dict() == t5_config(config, 'here').to_dict()


@pytest.mark.parametrize('changes, says', [
    pytest.param(dict(model_type='bert'), "a 'bert' model", id='another architecture'),
    pytest.param(dict(auto_map=dict(AutoModel='evil.T5')), 'never run', id='code of its own'),
    pytest.param(dict(d_model=10**9), 'd_model 1000000000 in config.json: must be', id='too large'),
    pytest.param(dict(num_layers='8'), 'must be a whole number', id='a number as text'),
    pytest.param(dict(dropout_rate=float('nan')), 'dropout_rate nan', id='NaN'),
    pytest.param(dict(feed_forward_proj='os'), "feed_forward_proj 'os'", id='unknown feed-forward')])
def test_refused_architecture(folder, changes, says):
    config = flan_t5_config('small').to_dict() | changes
    with pytest.raises(ConfigError) as e: t5_config(config, 'here')
    assert says in str(e.value)
    (folder/'config.json').write_text(json.dumps(config))
    refused(folder, says)


@pytest.mark.parametrize('change, says', [
    pytest.param(lambda w: None, f'1 weights are missing or of another shape, {query} first', id='missing'),
    pytest.param(lambda w: w[:3].clone(), '1 weights are missing or of another shape', id='another shape'),
    pytest.param(lambda w: w.long(), f'{query} is of type I64', id='whole numbers'),
    pytest.param(lambda w: w.log(), f'{query} has NaN or infinite values', id='NaN')])
def test_refused_weight(folder, change, says):
    weights = load_file(folder/'model.safetensors')
    changed = change(weights.pop(query))
    if changed is not None: weights[query] = changed
    save_file(weights, folder/'model.safetensors')
    refused(folder, says)


def test_refused_damaged_file(folder):
    "The header's length is the first thing in the file."
    with open(folder/'model.safetensors', 'r+b') as f: f.write((2**62).to_bytes(8, 'little'))
    refused(folder, 'its weights do not load')


def test_refused_index_of_another_place(folder):
    weights = folder/'model.safetensors'
    names = [*load_file(weights)]
    weights.rename(folder.parent/'outside.safetensors')
    index = dict(weight_map=dict.fromkeys(names, '../outside.safetensors'))
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    (folder/'other.safetensors').touch()
    refused(folder, 'in the same folder')


def test_pickles_are_not_read(folder):
    (folder/'model.safetensors').unlink()
    (folder/'pytorch_model.bin').write_bytes(b'pickle')
    (folder/'other.safetensors').touch()
    refused(folder, 'read from safetensors alone')


# ---- the output layer

def write_whole(folder, own_layer, dtype=torch.float32, shards=False, vocab_size=300):
    "FLAN-T5-small's architecture with two blocks a stack, written by transformers."
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=vocab_size, d_model=512, d_kv=64, d_ff=1024, num_layers=2, num_heads=6,
        feed_forward_proj='gated-gelu', decoder_start_token_id=0, tie_word_embeddings=not own_layer)
    model = T5ForConditionalGeneration(config)
    if own_layer: model.lm_head.weight = nn.Parameter(torch.randn(vocab_size, 512) * 512**-0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size='4MB' if shards else '1GB')


def change_config(folder, **changes):
    "Of its `config.json`; `...` takes a key out."
    path = folder/'config.json'
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@torch.no_grad()
def logits_of(model):
    "At each position of two answers."
    torch.manual_seed(6)
    texts, answers = torch.randint(3, 300, (2, 20)), torch.randint(3, 300, (2, 7))
    return model(input_ids=texts, labels=answers).logits.float()


def theirs(folder, dtype=torch.float32):
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def off(ours, theirs): return ((ours - theirs).norm()/theirs.norm()).item()


@pytest.mark.parametrize('shards', [False, True], ids=['one file', 'shards'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bf16'])
@pytest.mark.parametrize('own_layer', [False, True], ids=['tied', 'untied'])
def test_logits_of_transformers(tmp_path, own_layer, dtype, shards):
    "From either type of file, computed in float32; and in bf16, to its rounding (2^-8 is one step)."
    write_whole(tmp_path, own_layer, dtype, shards)
    assert (len([*tmp_path.glob('*.safetensors')]) > 1) == shards
    model = load_seq2seq(str(tmp_path))
    assert (model.lm_head.weight is model.shared.weight) == (not own_layer)
    assert model.config.scale_decoder_outputs == (not own_layer)
    expected = logits_of(theirs(tmp_path))
    assert off(logits_of(model), expected) < 1e-5
    half = logits_of(model.to(torch.bfloat16))
    assert off(half, logits_of(theirs(tmp_path, torch.bfloat16))) < 2**-8
    assert off(half, expected) < .05


@pytest.mark.parametrize('changes', [
    pytest.param({}, id='as transformers 5 writes it'),
    pytest.param(dict(tie_word_embeddings=False, scale_decoder_outputs=...), id='as the hub has FLAN-T5'),
    pytest.param(dict(tie_word_embeddings=False), id='both')])
def test_the_flag_in_either_form(tmp_path, changes):
    write_whole(tmp_path, own_layer=True)
    expected = logits_of(theirs(tmp_path))
    change_config(tmp_path, **changes)
    assert off(logits_of(theirs(tmp_path)), expected) < 1e-5
    assert off(logits_of(load_seq2seq(str(tmp_path))), expected) < 1e-5


def test_a_lost_flag_is_seen(tmp_path):
    "Logits shrink by the root of the width; nothing but that: the same greedy tokens."
    write_whole(tmp_path, own_layer=True)
    right = logits_of(load_seq2seq(str(tmp_path)))
    change_config(tmp_path, tie_word_embeddings=..., scale_decoder_outputs=...)
    wrong = logits_of(load_seq2seq(str(tmp_path)))
    assert off(wrong, logits_of(theirs(tmp_path))) < 1e-5
    assert off(wrong, right * 512**-.5) < 1e-5 < .9 < off(wrong, right)
    assert (wrong.argmax(-1) == right.argmax(-1)).all()
    assert (wrong.log_softmax(-1) - right.log_softmax(-1)).abs().max() > 1


def test_tied_by_transformers_5(tmp_path):
    "It ties even a fresh T5 that asks for a layer of its own, does not scale it, and says so in its config."
    T5ForConditionalGeneration(flan_t5_config('small', vocab_size=300, num_layers=2)).save_pretrained(tmp_path)
    model = load_seq2seq(str(tmp_path))
    assert model.lm_head.weight is model.shared.weight
    assert off(logits_of(model), logits_of(theirs(tmp_path))) < 1e-5


def test_a_tied_layer_that_is_stored_twice_stays_tied(tmp_path):
    write_whole(tmp_path, own_layer=False)
    weights = load_file(tmp_path/'model.safetensors')
    weights['lm_head.weight'] = weights['shared.weight'].clone()
    save_file(weights, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    model = load_seq2seq(str(tmp_path))
    assert model.lm_head.weight is model.shared.weight
    assert off(logits_of(model), logits_of(theirs(tmp_path))) < 1e-5


@pytest.mark.parametrize('changes', [
    pytest.param(dict(tie_word_embeddings=False), id='untied, as the hub has FLAN-T5'),
    pytest.param(dict(architectures=['T5Model']), id='saved without the layer')])
def test_a_lost_layer_is_refused(tmp_path, changes):
    write_whole(tmp_path, own_layer=True)
    weights = load_file(tmp_path/'model.safetensors')
    del weights['lm_head.weight']
    save_file(weights, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match='no lm_head.weight') as e: load_seq2seq(str(tmp_path))
    assert len(str(e.value).splitlines()) == 1
    load_flan_t5(str(tmp_path), decoder=True)       # a readout does without


@pytest.mark.parametrize('own_layer', [False, True], ids=['tied', 'untied'])
def test_a_pretraining_step(own_layer):
    "A fresh model begins near a guess where its layer is its own, and every weight but the tied copy learns."
    torch.manual_seed(1)
    model = build_flan_t5('small', vocab_size=300, d_model=64, num_layers=2, tie_word_embeddings=not own_layer)
    assert (model.lm_head.weight is model.shared.weight) == (not own_layer)
    texts, answers = torch.randint(3, 300, (8, 20)), torch.randint(3, 300, (8, 7))
    loss = model(input_ids=texts, labels=answers).loss
    assert not own_layer or abs(loss.item() - math.log(300)) < 1
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


# ---- the flag in what a reward model keeps

def test_a_saved_reward_model_keeps_the_flag(tmp_path):
    "It loads with the flag of today, and with the one that was written before it was kept; to the same rewards."
    write_whole(tmp_path/'t5', own_layer=True, vocab_size=1000)
    backbone = Backbone(load_flan_t5(str(tmp_path/'t5'), dropout=0.), train_transformer=False)
    settings = dict(pooling_output_dim=8, n_blocks_to_use=2, readout_additional_layers=[])
    RewardFromAttentionPooledEncoder(backbone, **settings).save_pretrained(tmp_path/'now', toy_tokenizer())
    old = shutil.copytree(tmp_path/'now', tmp_path/'before')
    architecture = json.loads((old/'config.json').read_text())['transformer']
    assert architecture['scale_decoder_outputs'] is False
    change_config(old, transformer=architecture | dict(scale_decoder_outputs=True))
    now, before = (RewardModel.from_pretrained(tmp_path/name, 'cpu') for name in ('now', 'before'))
    assert now.score('Who?', 'Me.') == before.score('Who?', 'Me.')
    # a run that was begun before goes on, and its kept states are found
    assert weights_digest(now.backbone) == weights_digest(before.backbone)
    export_backbone(tmp_path/'now', tmp_path/'plain')
    assert json.loads((tmp_path/'plain'/'config.json').read_text())['tie_word_embeddings'] is False
    assert AutoModelForTextEncoding.from_pretrained(tmp_path/'plain').config.scale_decoder_outputs is False
