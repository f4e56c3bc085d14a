"A T5 from a folder: an architecture within bounds and whole, finite weights, or a refusal in one line."
import json, shutil
import pytest
from safetensors.torch import load_file, save_file
from rlhf_flant5.backbone.t5 import flan_t5_config, load_flan_t5
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.hub import t5_config

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
