"""What a run says: its first lines, how far it is, why it ended, what a sweep came to.

On the terminal, in its log and in TensorBoard."""
import json, re
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from rlhf_flant5.train import main

few = ['experiment=toy', 'model=decoder_output', 'data.n_train_data=134', 'data.n_test_data=60',
       'training.loop.n_val_data=40', 'training.loop.train_batch_size=16', 'training.compile=false',
       'training.token_budget=4096', 'device_name=cpu', 'sim_man.allow_untracked=true']
EACH_BATCH = '{interval_val: 1, interval_type: batches}'


def interval(name, value): return f'training.loop.intervals.{name}={value}'
def run(results, name): return results/'Reward-Model-Training'/f'desc-{name},index-0'
def json_lines(path): return [json.loads(line) for line in path.read_text().splitlines()]
def summary(results, name): return json.loads((run(results, name)/'results'/'summary.json').read_text())
def history(results, name): return json_lines(run(results, name)/'results'/'history.jsonl')


def test_first_lines(results, capsys):
    """Readout, parameters, device, precision, pairs, batches, rate; then one format for a line.

    The last line has the time of the loop and of all."""
    every_batch = interval('progress_logging.interval_val', 1)
    assert main([*few, 'desc=a', 'training.precision=bf16', 'training.loop.n_epochs=3', every_batch]) == 0
    out, err = capsys.readouterr()
    lines, s = err.splitlines(), summary(results, 'a')
    trained, n = s['n_trained_parameters'], s['n_parameters']
    assert lines[0] == f'run {run(results, "a")}'
    opening = [f'decoder_output on toy, trained: {trained:,} of {n:,} parameters trained ({trained/n:.2%})',
               'on cpu in bf16',
               'pairs: 134 to train on, 40 for validation, 60 to test on',
               '9 batches of 16 pairs an epoch, 27 in all (3 epochs); validations: 2, checkpoints: 2',
               'learning rate up to 0.002 over 20 batches, then from 0.002 to 0.0005 once an epoch, '
               'exponentially, over 3 epochs']
    for line in opening: assert line in lines

    scores = r'batch \d+ of 27: (train|validation) \d+\.\d% \(.*\) of \d+(, \d+ ties?)?, loss \d\.\d{4}.*'
    of_batches = [l for l in lines if l.startswith('batch ')]
    assert of_batches
    for line in of_batches: assert re.fullmatch(scores, line)
    assert any(re.search(r'rate 0\.0\d+, [\d,.]+ pairs/s, \d+ s left$', l) for l in of_batches)

    spent = re.search(r'training (\d+) s of (\d+) s in all\n', out)
    assert spent and int(spent[1]) <= int(spent[2])
    assert s['seconds'] < s['seconds_in_all']
    assert not s['stopped_early']


def test_precision_says_why(results, capsys):
    assert main([*few, 'desc=a', 'training.loop.n_batches=1', 'training.optimizer.warmup=0']) == 0
    err = capsys.readouterr().err
    why = r'(bf16 \(auto: the cpu computes in it\)|fp32 \(auto: the cpu does not compute in bf16\))'
    assert re.search(rf'^on cpu in {why}$', err, re.M)
    assert ('learning rate constant at 0.002: schedule=epochs decays between epochs, this run has one, '
            'so final_lr=0.0005 is not used; take training.optimizer.schedule=linear') in err


def test_nine_batches_an_epoch_do_not_write_nine_models(results):
    "The default intervals, ten times an epoch, have a floor of 20 batches; the last batch is validated and kept."
    every = '{interval_val: 10, interval_type: per-epoch, max_n_intervals: -1}'
    assert main([*few, 'desc=a', 'training.loop.n_epochs=5', 'training.loop.n_checkpoints=9',
                 interval('validation', every), interval('checkpointing', every)]) == 0
    validated = [r['batch'] for r in history(results, 'a') if 'validation/loss' in r]
    assert validated == [20, 40, 45]
    checkpoints = run(results, 'a')/'simulation'/'checkpoints'
    assert sorted(p.name for p in checkpoints.iterdir()) == ['batch-0000020', 'batch-0000040', 'batch-0000045']


@pytest.mark.parametrize('schedule, n_batches', [('epochs', 30), ('cosine', 13)])     # of 9 an epoch, 18 in n_epochs
def test_the_rate_ends_at_final_lr(results, schedule, n_batches):
    assert main([*few, 'desc=a', 'training.loop.n_epochs=2', f'training.loop.n_batches={n_batches}',
                 f'training.optimizer.schedule={schedule}', 'training.optimizer.warmup=0',
                 interval('train_status_update', EACH_BATCH)]) == 0
    rates = [r['train/learning_rate'] for r in history(results, 'a') if 'train/learning_rate' in r]
    assert len(rates) == n_batches
    assert rates[0] == 2e-3
    assert rates[-1] == pytest.approx(5e-4, rel=1e-12)
    assert min(rates) >= 5e-4*(1 - 1e-12)


WRONG_WARMUP = 'a whole number of batches, or a share'

@pytest.mark.parametrize('setting, says', [
    *((f'warmup={v}', WRONG_WARMUP) for v in ('-1', '1.5', 'true', 'soon', '[1]')),
    ('schedule=exponential', 'one of epochs, steps, linear'),
    ('n_warmup_batches=3', 'training.optimizer.warmup')])
def test_schedules_that_are_none(setting, says, capsys):
    assert main([*few, f'training.optimizer.{setting}']) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert says in err


def test_stopped_early_says_so(results, capsys):
    assert main([*few, 'desc=a', 'data.subdirs=[toy-helpful]', 'training.loop.n_epochs=200',
                 'training.loop.max_non_optim_vals=1', interval('validation', EACH_BATCH),
                 'training.optimizer.init_lr=.1', 'training.optimizer.final_lr=.1']) == 0
    out, err = capsys.readouterr()
    s = summary(results, 'a')
    line = ('stopped early: no lower validation loss in the last validation, '
            f'batch {s["n_batches"]} of 1,800; the best is that of batch {s["best_batch"]}')
    assert line in err.splitlines()
    assert line in (run(results, 'a')/'logs'/'train.log').read_text()
    assert s['stopped_early'] is True
    assert f'stopped early after batch {s["n_batches"]}' in out


def test_quiet_and_a_sweep(results, capsys):
    """A sweep says which run it is at and ends with a table.

    `--quiet` leaves the final result, and the log every line."""
    settings = [*few, 'training.loop.n_batches=2', 'seed=1,2']
    assert main(['-m', 'desc=a', *settings]) == 0
    out, err = capsys.readouterr()
    for line in ('run 1 of 2: a-1', 'run 2 of 2: a-2'): assert line in err.splitlines()
    head, _, *rows, last = out.splitlines()[-5:]
    assert head.startswith('| run')
    assert last == f'next: python -m rlhf_flant5.compare {results}'
    for k, row in zip((1, 2), rows, strict=True):
        accuracy = summary(results, f'a-{k}')['validation']['accuracy']
        assert re.sub(' +', ' ', row).split(' (')[0] == f'| a-{k} | {100*accuracy:.1f}'

    assert main(['-m', '--quiet', 'desc=b', *settings]) == 0
    out, err = capsys.readouterr()
    assert err == ''
    assert out.count('decoder_output, seed') == 2
    assert out.splitlines()[-1].startswith('next: ')
    assert 'learning rate' in (run(results, 'b-1')/'logs'/'train.log').read_text()

    assert main(['-q', *few, 'desc=b-1', 'seed=3']) == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_one_subset_is_said_once(results, capsys, pairs_folder, model_folder):
    assert main(['desc=a', f'data.name={pairs_folder}', 'data.subdirs=[helpful-base]',
                 f'model.transformer_name={model_folder}', 'training.loop.n_batches=1',
                 'training.loop.train_batch_size=8', 'device_name=cpu', 'sim_man.allow_untracked=true']) == 0
    assert '    helpful-base: ' not in capsys.readouterr().err


@pytest.fixture
def board(results):
    "A run's folder, its summary, and what TensorBoard reads of it."
    assert main([*few, 'desc=a', 'training.loop.n_batches=3']) == 0
    folder = run(results, 'a')/'simulation'/'tensorboard'
    assert len([*folder.iterdir()]) == 1
    return run(results, 'a'), summary(results, 'a'), EventAccumulator(str(folder)).Reload()


def values(events, tag):
    return [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]


def page(events, tag): return values(events, f'{tag}/text_summary')[0][1].decode()


def test_tensorboard(board):
    """Each number says what it is; test scores, a row in the table of settings.

    Where the run comes from, and five pairs with their rewards."""
    folder, s, events = board
    numbers = [t for t in events.Tags()['tensors'] if 'text_summary' not in t]
    assert {'train/accuracy/low', 'validation/toy-helpful/accuracy/high', 'test/calibration_error'} <= {*numbers}
    for tag in numbers: assert events.SummaryMetadata(tag).summary_description, tag
    for k in ('accuracy', 'loss'):
        assert values(events, f'test/{k}') == [(s['best_batch'], pytest.approx(s['test'][k]))]
    assert '_hparams_/session_start_info' in events.summary_metadata

    origin = json.loads((folder/'data'/'provenance.json').read_text())
    commit = str(origin['source']['commit'])
    for what in ('python -m rlhf_flant5.train', commit, '93 used for train', 'warmup: 20'):
        assert what in page(events, 'run')

    pairs = json_lines(folder/'results'/'validation_pairs.jsonl')[:5]
    want = [(str(i + 1), side, f'{pair[f"reward_{side}"]:.3f}')
            for i, pair in enumerate(pairs) for side in ('chosen', 'rejected')]
    shown = r'\*\*Pair (\d), (chosen|rejected): reward (-?\d+\.\d{3})\*\*\n\n    \n'
    assert re.findall(shown, page(events, 'validation_pairs')) == want
