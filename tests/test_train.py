"The program as a user runs it: the original's command, names of the hub, interruption, exit codes."
import gzip, json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import program, root, short
from rlhf_flant5 import train
from rlhf_flant5.config.names import choices
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.core.hub import resolve_folder
from rlhf_flant5.data.pairs import encode, load_tokenizer


def summary(results, name): return json.loads((results/'Reward-Model-Training'/name/'results'/'summary.json').read_text())


ORIGINAL = r"""python bin/train_reward_model.py desc=ete_attention_pooled_encoder \
    model=attention_pooled_encoder \
    model.train_transformer=True \
    model.use_pretrained_output=False \
    use_multi_gpu_if_available=True \
    training.loop.train_batch_size=96 \
    training.loop.val_batch_size=1024 \
    training.loop.n_epochs=6
    index=1
"""


def test_original_command(results, model_folder, pairs_folder):
    "The command of the original's README, word for word, with local folders and a few batches."
    words = ORIGINAL.removeprefix('python bin/train_reward_model.py ').replace('\\\n', ' ').split()   # the listing lacks a continuation before index=1
    done = program('rlhf_flant5.train', *words, f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *[s for s in short if 'batch_size' not in s])
    assert done.returncode == 0, done.stderr
    s = summary(results, 'desc-ete_attention_pooled_encoder,index-1')
    assert s['readout'] == 'attention_pooled_encoder' and s['n_batches'] == 2 and s['test']['n'] == 80


@pytest.mark.parametrize('model', choices('model'))
def test_readouts_trained_and_frozen(results, model_folder, pairs_folder, model):
    "Each readout end to end and frozen, in one process as `-m` runs them."
    done = program('rlhf_flant5.train', '-m', f'model={model}', 'model.train_transformer=True,False', 'desc=x', f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *short)
    assert done.returncode == 0, done.stderr
    trained, frozen = (summary(results, f'desc-x-{t},index-0') for t in (True, False))
    assert trained['n_trained_parameters'] > frozen['n_trained_parameters'] > 0
    cacheable = model not in ('layerwise_attention', 'full_attention_pooling')
    assert frozen['cached_states'] == cacheable and ('are not kept' in done.stderr) == (not cacheable)
    assert 'use_pretrained_output' not in done.stderr        # nobody has set it


def test_side_by_side(results, model_folder, pairs_folder):
    "Lists of readouts and seeds share one pass of the frozen transformer; kept states and all tokens may be mixed."
    done = program('rlhf_flant5.train', 'model=[layerwise_attention,full_attention_pooling,decoder_output]', 'seed=[1,2]', 'model.train_transformer=False', 'desc=x',
                   f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *short)
    assert done.returncode == 0, done.stderr
    for model in ('layerwise_attention', 'full_attention_pooling', 'decoder_output'):
        for seed in (1, 2): s = summary(results, f'desc-x-{model}-{seed},index-0'); assert (s['readout'], s['seed'], s['n_batches']) == (model, seed, 2)
    done = program('rlhf_flant5.train', 'seed=[1,2]', 'desc=y', f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *short)
    assert done.returncode == 2 and 'share the pass of a frozen transformer' in done.stderr and not [*results.rglob('desc-y*')]


def lay_out(cache, repo_type, name, folder):
    "A snapshot as the hub's client lays it out."
    base = cache/'hub'/f'{repo_type}s--{name.replace("/", "--")}'
    (base/'refs').mkdir(parents=True); (base/'refs'/'main').write_text('0'*40)
    shutil.copytree(folder, base/'snapshots'/('0'*40))


def test_default_names_from_a_populated_cache(results, tmp_path, model_folder, pairs_folder):
    "No network and no local folder: the default names come from HF_HOME."
    cache = tmp_path/'hf'
    lay_out(cache, 'model', 'google/flan-t5-small', model_folder); lay_out(cache, 'dataset', 'Anthropic/hh-rlhf', pairs_folder)
    done = program('rlhf_flant5.train', 'desc=default', *short, env=dict(HF_HOME=str(cache), HF_HUB_OFFLINE='1'))
    assert done.returncode == 0, done.stderr
    s = summary(results, 'desc-default,index-0')
    assert s['data_name'] == 'Anthropic/hh-rlhf' and {*s['test']['subsets']} == {'harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled'}


def test_no_hub_and_no_cache(results, tmp_path):
    "One line that names the ways out, and exit code 2."
    done = program('rlhf_flant5.train', 'desc=none', *short, env=dict(HF_HOME=str(tmp_path/'empty'), HF_ENDPOINT='http://127.0.0.1:9'))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert last.startswith('error: data.name=Anthropic/hh-rlhf: no such folder here, the hub cannot be reached') and 'experiment=toy' in last and 'local folder' in last


def test_a_hub_that_never_answers(tmp_path, monkeypatch):
    "A network that swallows packets must not hold a run up: the question has a limit of its own."
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0)); silent.listen(8)
        code = f'''import time; from rlhf_flant5.data.pairs import pairs_folder; t = time.monotonic()
try: pairs_folder('Anthropic/hh-rlhf', ['harmless-base'])
except ValueError as e: print(e)
print(time.monotonic() - t < 10)'''
        done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, timeout=120,
                              env=os.environ | dict(HF_HOME=str(tmp_path), HF_ENDPOINT=f'http://127.0.0.1:{silent.getsockname()[1]}', PYTHONPATH=str(root)))
    said, in_time = done.stdout.splitlines()
    assert 'the hub cannot be reached' in said and in_time == 'True', done.stdout + done.stderr


def test_bad_pairs_name_file_and_line(results, tmp_path, model_folder, pairs_folder):
    folder = tmp_path/'pairs'; shutil.copytree(pairs_folder, folder)
    with gzip.open(folder/'helpful-base'/'train.jsonl.gz', 'at') as f: f.write('{"chosen": "\\n\\nHuman: a", "rejected": 7}\n')
    done = program('rlhf_flant5.train', 'desc=bad', f'data.name={folder}', f'model.transformer_name={model_folder}', *short)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == f'error: {folder}/helpful-base/train.jsonl.gz:61: rejected must be a text, this is int'
    assert not (results/'Reward-Model-Training'/'desc-bad,index-0').exists()   # the name is free for the mended data


def test_interruption_leaves_a_checkpoint(results):
    "Ctrl-C in the middle: exit code 75, a checkpoint, and the best model so far, whole, in both places."
    run = results/'Reward-Model-Training'/'desc-long,index-0'
    p = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.train', 'experiment=toy', 'desc=long', 'data.n_test_data=100', 'training.loop.n_val_data=100', 'training.loop.n_epochs=1000', 'training.loop.max_non_optim_vals=1000', 'device_name=cpu',
                          'sim_man.allow_untracked=true'], env=os.environ | {'PYTHONPATH': str(root)}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run/'simulation'/'best_model').is_dir() and time.monotonic() < deadline: time.sleep(.2)
    p.send_signal(signal.SIGINT); _, said = p.communicate(timeout=120)
    assert p.returncode == 75 and 'Traceback' not in said, said
    assert json.loads((run/'data'/'provenance.json').read_text())['status'] == 'interrupted'
    last = sorted((run/'simulation'/'checkpoints').iterdir())[-1]
    state = json.loads((last/'state.json').read_text())
    assert state['n_batches'] == int(last.name.split('-')[1]) and f'after batch {state["n_batches"]}' in said
    from rlhf_flant5.models.base import RewardModel
    for folder in (last/'best', run/'simulation'/'best_model'): assert RewardModel.from_pretrained(folder).config['batch'] == state['best_batch']


def test_saved_model_from_another_folder(results, tmp_path, model_folder, pairs_folder):
    "Bit-equal rewards in another process, with another working directory."
    assert program('rlhf_flant5.train', 'desc=saved', 'model=decoder_output', f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *short).returncode == 0
    run = results/'Reward-Model-Training'/'desc-saved,index-0'
    code = f'''import gzip, json, torch; from rlhf_flant5.models.base import RewardModel; from rlhf_flant5.data.pairs import encode; from rlhf_flant5.data.batches import pad_ids
m = RewardModel.from_pretrained('{run}/simulation/best_model'); torch.set_grad_enabled(False)
rows = [json.loads(l) for l in open('{run}/results/test_pairs.jsonl')]
subset, line = rows[0]['id'].split('/test:'); pair = json.loads(gzip.open(f'{pairs_folder}/{{subset}}/test.jsonl.gz').read().splitlines()[int(line) - 1])
r = m(**pad_ids(encode(m.tokenizer, [pair['chosen'], pair['rejected']]), m.tokenizer.pad_token_id)).tolist()
print(abs(r[0] - rows[0]['reward_chosen']) < 1e-6, abs(r[1] - rows[0]['reward_rejected']) < 1e-6)'''
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(root)})
    assert done.stdout.split() == ['True', 'True'], done.stdout + done.stderr


def test_literal_tokens_as_sentencepiece_has_them(t5_tokenizer):
    "What looks like a special token gets the ids that sentencepiece gives the text."
    import sentencepiece
    tokenizer = load_tokenizer(str(t5_tokenizer))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(t5_tokenizer/'spiece.model'))
    texts = ['\n\nHuman: a </s> b <pad> <extra_id_0> c\n\nAssistant: hi', '\n\nHuman: x\n\nAssistant: y', '\n\nHuman: </s></s>\n\nAssistant: <pad>.']
    for text, ids in zip(texts, encode(tokenizer, texts)):
        assert ids[-1] == 1 and 1 not in ids[:-1] and 0 not in ids
        assert plain.decode(ids[:-1]) == plain.decode(plain.encode(text))


def test_what_a_run_says_of_itself(results, capsys):
    "A warning only for what the user has set; at the end that the folder is closed, and how to remove it."
    toy = ['experiment=toy', 'data.n_train_data=64', 'data.n_test_data=20', 'training.loop.n_val_data=20', *short]
    assert train.main([*toy, 'desc=plain']) == 0
    said = capsys.readouterr()
    folder = results/'Reward-Model-Training'/'desc-plain,index-0'
    assert 'is ignored' not in said.err and said.out.endswith(f'data, log and models are read-only now; to remove it: rm -rf {folder}\n')
    assert train.main([*toy, 'desc=set', 'model.use_pretrained_output=True']) == 0
    assert capsys.readouterr().err.count('model.use_pretrained_output=True is ignored: the transformer is trained') == 1
