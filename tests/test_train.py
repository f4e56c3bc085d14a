"The program as a user runs it: the original's command, names of the hub, interruption, exit codes."
import gzip, itertools, json, os, shutil, signal, socket, subprocess, sys, time
import pytest
from conftest import program, root, short
from rlhf_flant5.config.names import choices
from rlhf_flant5.data.tokens import encode, load_tokenizer
from rlhf_flant5.train import main


def run_folder(results, name): return results/'Reward-Model-Training'/name
def summary(results, name): return json.loads((run_folder(results, name)/'results'/'summary.json').read_text())


@pytest.fixture
def here(model_folder, pairs_folder):
    "Settings of a short run with a model and pairs of this machine."
    return [f'data.name={pairs_folder}', f'model.transformer_name={model_folder}', *short]


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


def test_original_command(results, here):
    "The command of the original's README, word for word, with local folders and a few batches."
    # the listing lacks a continuation before index=1
    words = ORIGINAL.removeprefix('python bin/train_reward_model.py ').replace('\\\n', ' ').split()
    done = program('rlhf_flant5.train', *words, *[s for s in here if 'batch_size' not in s])
    assert done.returncode == 0, done.stderr
    s = summary(results, 'desc-ete_attention_pooled_encoder,index-1')
    assert (s['readout'], s['n_batches'], s['test']['n']) == ('attention_pooled_encoder', 2, 80)


@pytest.mark.parametrize('model', choices('model'))
def test_readouts_trained_and_frozen(results, here, model):
    "Each readout end to end and frozen, in one process as `-m` runs them."
    both = ['-m', f'model={model}', 'model.train_transformer=True,False', 'desc=x']
    done = program('rlhf_flant5.train', *both, *here)
    assert done.returncode == 0, done.stderr
    trained, frozen = (summary(results, f'desc-x-{t},index-0') for t in (True, False))
    assert trained['n_trained_parameters'] > frozen['n_trained_parameters'] > 0
    cacheable = model not in ('layerwise_attention', 'full_attention_pooling')
    assert frozen['cached_states'] == cacheable
    assert ('are not kept' in done.stderr) == (not cacheable)
    assert 'use_pretrained_output' not in done.stderr        # nobody has set it


def test_side_by_side(results, here):
    "Lists of readouts and seeds share one pass of the frozen transformer; kept states and all tokens may be mixed."
    readouts = 'layerwise_attention', 'full_attention_pooling', 'decoder_output'
    lists = [f'model=[{",".join(readouts)}]', 'seed=[1,2]', 'model.train_transformer=False', 'desc=x']
    done = program('rlhf_flant5.train', *lists, *here)
    assert done.returncode == 0, done.stderr
    for model, seed in itertools.product(readouts, (1, 2)):
        s = summary(results, f'desc-x-{model}-{seed},index-0')
        assert (s['readout'], s['seed'], s['n_batches']) == (model, seed, 2)


def test_side_by_side_is_refused_for_a_trained_transformer(results, here):
    done = program('rlhf_flant5.train', 'seed=[1,2]', 'desc=y', *here)
    assert done.returncode == 2 and 'share the pass of a frozen transformer' in done.stderr
    assert not [*results.rglob('desc-y*')]


def lay_out(cache, repo_type, name, folder):
    "A snapshot as the hub's client lays it out."
    base = cache/'hub'/f'{repo_type}s--{name.replace("/", "--")}'
    (base/'refs').mkdir(parents=True)
    (base/'refs'/'main').write_text('0'*40)
    shutil.copytree(folder, base/'snapshots'/('0'*40))


def test_default_names_from_a_populated_cache(results, tmp_path, model_folder, pairs_folder):
    "No network and no local folder: the default names come from HF_HOME."
    cache = tmp_path/'hf'
    lay_out(cache, 'model', 'google/flan-t5-small', model_folder)
    lay_out(cache, 'dataset', 'Anthropic/hh-rlhf', pairs_folder)
    done = program('rlhf_flant5.train', 'desc=default', *short, env=dict(HF_HOME=str(cache), HF_HUB_OFFLINE='1'))
    assert done.returncode == 0, done.stderr
    s = summary(results, 'desc-default,index-0')
    assert s['data_name'] == 'Anthropic/hh-rlhf'
    subsets = {'harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled'}
    assert {*s['test']['subsets']} == subsets


def test_no_hub_and_no_cache(results, tmp_path):
    "One line that names the ways out, and exit code 2."
    nothing = dict(HF_HOME=str(tmp_path/'empty'), HF_ENDPOINT='http://127.0.0.1:9')
    done = program('rlhf_flant5.train', 'desc=none', *short, env=nothing)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: data.name=Anthropic/hh-rlhf: no such folder here, the hub cannot be reached')
    assert 'experiment=toy' in last and 'local folder' in last


ASK_THE_HUB = '''
import time
from rlhf_flant5.data.pairs import pairs_folder
begun = time.monotonic()
try: pairs_folder('Anthropic/hh-rlhf', ['harmless-base'])
except ValueError as e: print(e)
print(time.monotonic() - begun < 10)
'''


def test_a_hub_that_never_answers(tmp_path):
    "A network that swallows packets must not hold a run up: the question has a limit of its own."
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        silent.listen(8)
        hub = f'http://127.0.0.1:{silent.getsockname()[1]}'
        env = os.environ | dict(HF_HOME=str(tmp_path), HF_ENDPOINT=hub, PYTHONPATH=str(root))
        done = subprocess.run([sys.executable, '-c', ASK_THE_HUB], text=True, capture_output=True, timeout=120, env=env)
    message, in_time = done.stdout.splitlines()
    assert 'the hub cannot be reached' in message and in_time == 'True', done.stdout + done.stderr


def test_bad_pairs_name_file_and_line(results, tmp_path, here, pairs_folder):
    folder = tmp_path/'pairs'
    shutil.copytree(pairs_folder, folder)
    bad = folder/'helpful-base'/'train.jsonl.gz'
    with gzip.open(bad, 'at') as f: f.write('{"chosen": "\\n\\nHuman: a", "rejected": 7}\n')
    others = [s for s in here if not s.startswith('data.name=')]
    done = program('rlhf_flant5.train', 'desc=bad', f'data.name={folder}', *others)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f'error: {bad}:61: rejected must be a text, this is int'
    assert not run_folder(results, 'desc-bad,index-0').exists()   # the name is free for the mended data


LONG = ['experiment=toy', 'desc=long', 'data.n_test_data=100', 'training.loop.n_val_data=100',
        'training.loop.n_epochs=1000', 'training.loop.max_non_optim_vals=1000', 'device_name=cpu',
        'sim_man.allow_untracked=true']


def interrupt_when(there, *args):
    "Ctrl-C as soon as a folder is there. Returns the exit code and standard error."
    command, env = [sys.executable, '-m', *args], os.environ | {'PYTHONPATH': str(root)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not there.is_dir() and time.monotonic() < deadline: time.sleep(.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_interruption_leaves_a_checkpoint(results):
    "Ctrl-C in the middle: exit code 75, a checkpoint, and the best model so far, whole, in both places."
    from rlhf_flant5.models.base import RewardModel
    run = run_folder(results, 'desc-long,index-0')
    best_model = run/'simulation'/'best_model'
    code, err = interrupt_when(best_model, 'rlhf_flant5.train', *LONG)
    assert code == 75 and 'Traceback' not in err, err
    assert json.loads((run/'data'/'provenance.json').read_text())['status'] == 'interrupted'
    last = sorted((run/'simulation'/'checkpoints').iterdir())[-1]
    state = json.loads((last/'state.json').read_text())
    assert state['n_batches'] == int(last.name.split('-')[1])
    assert f'after batch {state["n_batches"]}' in err
    for folder in (last/'best', best_model):
        assert RewardModel.from_pretrained(folder).config['batch'] == state['best_batch']


SCORE_THE_FIRST = '''
import gzip, json, sys, torch
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.data.tokens import encode
from rlhf_flant5.data.batches import pad_ids
run, pairs = sys.argv[1:]
torch.set_grad_enabled(False)
model = RewardModel.from_pretrained(f'{run}/simulation/best_model')
row = json.loads(open(f'{run}/results/test_pairs.jsonl').readline())
subset, line = row['id'].split('/test:')
lines = gzip.open(f'{pairs}/{subset}/test.jsonl.gz').read().splitlines()
pair = json.loads(lines[int(line) - 1])
ids = encode(model.tokenizer, [pair['chosen'], pair['rejected']])
chosen, rejected = model(**pad_ids(ids, model.tokenizer.pad_token_id)).tolist()
print(abs(chosen - row['reward_chosen']) < 1e-6, abs(rejected - row['reward_rejected']) < 1e-6)
'''


def test_saved_model_from_another_folder(results, tmp_path, here, pairs_folder):
    "Bit-equal rewards in another process, with another working directory."
    assert program('rlhf_flant5.train', 'desc=saved', 'model=decoder_output', *here).returncode == 0
    run = run_folder(results, 'desc-saved,index-0')
    command = [sys.executable, '-c', SCORE_THE_FIRST, str(run), str(pairs_folder)]
    env = os.environ | {'PYTHONPATH': str(root)}
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == ['True', 'True'], done.stdout + done.stderr


def test_literal_tokens_as_sentencepiece_has_them(t5_tokenizer):
    "What looks like a special token gets the ids that sentencepiece gives the text."
    import sentencepiece
    tokenizer = load_tokenizer(str(t5_tokenizer))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(t5_tokenizer/'spiece.model'))
    texts = ['\n\nHuman: a </s> b <pad> <extra_id_0> c\n\nAssistant: hi',
             '\n\nHuman: x\n\nAssistant: y',
             '\n\nHuman: </s></s>\n\nAssistant: <pad>.']
    for text, ids in zip(texts, encode(tokenizer, texts)):
        assert ids[-1] == 1 and 1 not in ids[:-1] and 0 not in ids
        assert plain.decode(ids[:-1]) == plain.decode(plain.encode(text))


def test_what_a_run_says_of_itself(results, capsys):
    "A warning only for what the user has set; at the end that the folder is closed, and how to remove it."
    toy = ['experiment=toy', 'data.n_train_data=64', 'data.n_test_data=20', 'training.loop.n_val_data=20', *short]
    assert main([*toy, 'desc=plain']) == 0
    out, err = capsys.readouterr()
    folder = run_folder(results, 'desc-plain,index-0')
    assert 'is ignored' not in err
    assert out.endswith(f'data, log and models are read-only now; to remove it: rm -rf {folder}\n')
    assert main([*toy, 'desc=set', 'model.use_pretrained_output=True']) == 0
    ignored = 'model.use_pretrained_output=True is ignored: the transformer is trained'
    assert capsys.readouterr().err.count(ignored) == 1
