"""Folders that stand for what can't be fetched:
a narrow FLAN-T5 with the toy world's tokenizer, a tokenizer of T5's kind,
pairs in the layout of the hub's data set."""
import gzip, io, json, os, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import HealthCheck, settings

root = Path(__file__).parent.parent


def program(*args, **kwargs):
    "Run `python -m rlhf_flant5.<args>` as a user would."
    env = os.environ | {'PYTHONPATH': str(root)} | kwargs.pop('env', {})
    return subprocess.run([sys.executable, '-m', *args], text=True, capture_output=True, env=env, **kwargs)


def write_rows(path, rows):
    "A gzipped file of one JSON object a line."
    with gzip.open(path, 'wt', encoding='utf-8') as f:
        for row in rows: f.write(json.dumps(row) + '\n')


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    "Kept states of the tests, apart from the user's."
    os.environ['RLHF_FLANT5_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    from rlhf_flant5.backbone.t5 import build_flan_t5
    from rlhf_flant5.core.machine import set_seed
    from rlhf_flant5.data.toy import toy_tokenizer
    folder = tmp_path_factory.mktemp('flan-t5-narrow')
    set_seed(1)
    narrow = dict(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    build_flan_t5('small', **narrow).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def t5_tokenizer(tmp_path_factory):
    """A tokenizer as T5 is given away: spiece.model and tokenizer.json, padding, end and unknown token first,
    100 sentinels, letters folded by NFKC, no piece for '<'."""
    import sentencepiece
    from transformers import T5Tokenizer
    from rlhf_flant5.data.toy import toy_pairs
    folder, model = tmp_path_factory.mktemp('t5-tokenizer'), io.BytesIO()
    pairs = toy_pairs(400, seed=5)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pairs['chosen'][:] + pairs['rejected'][:]), model_writer=model,
        vocab_size=300, hard_vocab_limit=False, required_chars='/>_0123456789',
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name='nmt_nfkc', num_threads=1, minloglevel=2)
    (folder/'spiece.model').write_bytes(model.getvalue())
    tokens = dict(pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    config = dict(tokenizer_class='T5Tokenizer', extra_ids=100, **tokens)
    (folder/'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def pairs_folder(tmp_path_factory):
    from rlhf_flant5.data.toy import toy_pairs
    folder = tmp_path_factory.mktemp('pairs')
    for subset in ('harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled'):
        (folder/subset).mkdir()
        for split, n in (('train', 60), ('test', 20)):
            pairs = toy_pairs(n, seed=5, split=split)
            rows = [dict(chosen=pair['chosen'], rejected=pair['rejected']) for pair in pairs]
            write_rows(folder/subset/f'{split}.jsonl.gz', rows)
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv('RESULTS_ROOT_DIR', str(tmp_path))
    return tmp_path


def summary_of(run):
    "What a finished run says of itself."
    return json.loads((run/'results'/'summary.json').read_text(encoding='utf-8'))


short = [
    'training.loop.n_batches=2',
    'training.loop.train_batch_size=8',
    'device_name=cpu',
    'sim_man.allow_untracked=true']


@pytest.fixture(scope='session')
def trained_run(tmp_path_factory):
    "The folder of a run on the toy world: two batches, judged on all its test pairs. Take a copy to change it."
    from rlhf_flant5.training.pipeline import train_run
    settings = ['experiment=toy', 'model=decoder_output', 'desc=trained', 'training.precision=fp32',
                'data.n_train_data=64', 'data.n_test_data=0', 'training.loop.n_val_data=64']
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RESULTS_ROOT_DIR', str(tmp_path_factory.mktemp('results')))
        return train_run([*settings, *short])['folder']


def examples(n):
    """Settings of a property test: `n` examples, the same ones each time;
    $FUZZ_EXAMPLES times as many, and others each time, if that is set."""
    times = os.environ.get('FUZZ_EXAMPLES')
    return settings(
        max_examples=max(1, int(n*float(times or 1))), derandomize=times is None,
        database=None, deadline=None, suppress_health_check=[*HealthCheck])


HISTORY = """\
{"batch": 5, "validation/accuracy": 0.5}
{"batch": 9, "validation/accuracy": 0.6}
"""
SUMMARY = dict(
    readout='decoder_output', train_transformer=True, cached_states=False, transformer_name='a', data_name='b',
    best_reachable_accuracy=None, n_trained_parameters=7, seconds=1., pairs_per_second=9.,
    peak_memory_bytes=2**30, temperature=1.5)


def dialogue(k, word, times): return f'\n\nHuman: {k}?\n\nAssistant: {word*times}'


def saved_run(results, i, right=None, seed=1, settings='', origin={}, turned=False, **changes):
    """A finished run's folder, written by hand: `right` says which of its ten pairs it has right
    (or more, for more pairs); `origin` goes into its provenance. `turned` has chosen and rejected texts
    exchanged in every pair, with lengths that don't show it."""
    from rlhf_flant5.data.pairs import fingerprint
    from rlhf_flant5.metrics.accuracy import pair_scores, pair_table, write_pair_table
    folder = results/'Reward-Model-Training'/f'desc-x,index-{i}'
    for name in ('data', 'results'): (folder/name).mkdir(parents=True)

    right = [True]*6 + [False]*4 if right is None else [*right]
    n = len(right)
    ids = [f's/test:{k}' for k in range(n)]
    subsets = ['s', 't']*(n//2)
    margins = [1. + k/10 if is_right else -1. - k/10 for k, is_right in enumerate(right)]
    n_chosen = [20 + k % 3 for k in range(n)]
    n_rejected = [20 + k % 5 for k in range(n)]
    table = pair_table(ids, subsets, margins, [0.]*n, n_chosen, n_rejected, n_shared=[9]*n)
    chosen = [dialogue(k, 'yes ', k % 3 + 1) for k in range(n)]
    rejected = [dialogue(k, 'no ', k % 5 + 1) for k in range(n)]
    if turned: chosen, rejected = rejected, chosen
    columns = dict(id=ids, subset=subsets, chosen=chosen, rejected=rejected)
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    for split in ('validation', 'test'):
        write_pair_table(table, folder/'results'/f'{split}_pairs.jsonl')
        write_rows(folder/'data'/f'{split}_texts.jsonl.gz', rows)

    scores = pair_scores(margins, [0.]*n, subsets)
    summary = SUMMARY | dict(seed=seed, validation=scores, test=scores) | changes
    (folder/'results'/'summary.json').write_text(json.dumps(summary))
    (folder/'results'/'history.jsonl').write_text(HISTORY)
    (folder/'data'/'config.yaml').write_text(f'seed: {seed}\n{settings}', encoding='utf-8')
    ended = f'2026-01-01T00:00:{i:02}+00:00'
    pairs = dict.fromkeys(('train', 'validation', 'test'), fingerprint(columns))
    source = dict(commit='c'*40, dirty=False)
    provenance = dict(status='done', started=ended, ended=ended, source=source, pairs=pairs) | origin
    (folder/'data'/'provenance.json').write_text(json.dumps(provenance))
    return folder
