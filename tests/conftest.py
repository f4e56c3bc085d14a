"Folders that stand for what can't be fetched: a narrow FLAN-T5 with the toy world's tokenizer, and pairs in the layout of the hub's data set."
import gzip, json, os, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck, settings

root = Path(__file__).parent.parent
shared = root.parent/'shared'   # real pairs and the real tokenizer, on some machines


def program(*args, **kwargs):
    "Run `python -m rlhf_flant5.<args>` as a user would."
    env = os.environ | {'PYTHONPATH': str(root)} | kwargs.pop('env', {})
    return subprocess.run([sys.executable, '-m', *args], text=True, capture_output=True, env=env, **kwargs)


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    "Kept states of the tests, apart from the user's."
    os.environ['RLHF_FLANT5_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    from rlhf_flant5.backbone import build_flan_t5
    from rlhf_flant5.config import set_seed
    from rlhf_flant5.toy import toy_tokenizer
    folder = tmp_path_factory.mktemp('flan-t5-narrow')
    set_seed(1)
    build_flan_t5('small', vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def pairs_folder(tmp_path_factory):
    from rlhf_flant5.toy import toy_pairs
    folder = tmp_path_factory.mktemp('pairs')
    for subset in ('harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled'):
        (folder/subset).mkdir()
        for split, n in (('train', 60), ('test', 20)):
            with gzip.open(folder/subset/f'{split}.jsonl.gz', 'wt') as f:
                for r in toy_pairs(n, seed=5, split=split): f.write(json.dumps({k: r[k] for k in ('chosen', 'rejected')}) + '\n')
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv('RESULTS_ROOT_DIR', str(tmp_path))
    return tmp_path


short = ['training.loop.n_batches=2', 'training.loop.train_batch_size=8', 'device_name=cpu', 'sim_man.allow_untracked=true']


def examples(n):
    "Settings of a property test: `n` examples, the same ones each time; $FUZZ_EXAMPLES times as many, and others each time, if that is set."
    times = os.environ.get('FUZZ_EXAMPLES')
    return settings(max_examples=max(1, int(n*float(times or 1))), derandomize=times is None, database=None, deadline=None, suppress_health_check=list(HealthCheck))
