"What a run says: its first lines, how far it is, why it ended, what a sweep came to; on the terminal, in its log and in TensorBoard."
import json, re
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from rlhf_flant5.train import main

few = ['experiment=toy', 'model=decoder_output', 'data.n_train_data=134', 'data.n_test_data=60', 'training.loop.n_val_data=40', 'training.loop.train_batch_size=16',
       'training.compile=false', 'training.token_budget=4096', 'device_name=cpu', 'sim_man.allow_untracked=true']


def run(results, name): return results/'Reward-Model-Training'/f'desc-{name},index-0'
def summary(results, name): return json.loads((run(results, name)/'results'/'summary.json').read_text())
def history(results, name): return [json.loads(l) for l in (run(results, name)/'results'/'history.jsonl').read_text().splitlines()]


def test_first_lines(results, capsys):
    "Readout, parameters, device, precision, pairs, batches, rate; then one format for a line, and the time of the loop and of all."
    assert main([*few, 'desc=a', 'training.precision=bf16', 'training.loop.n_epochs=3', 'training.loop.intervals.progress_logging.interval_val=1']) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines(); s = summary(results, 'a')
    assert lines[0] == f'run {run(results, "a")}'
    assert f'decoder_output on toy, trained: {s["n_trained_parameters"]:,} of {s["n_parameters"]:,} parameters trained ({s["n_trained_parameters"]/s["n_parameters"]:.2%})' in lines
    assert 'on cpu in bf16' in lines
    assert 'pairs: 134 to train on, 40 for validation, 60 to test on' in lines
    assert '9 batches of 16 pairs an epoch, 27 in all (3 epochs); validations: 2, checkpoints: 2' in lines
    assert 'learning rate up to 0.0007 over 20 batches, then from 0.0007 to 0.0005 once an epoch, exponentially, over 3 epochs' in lines
    told = [l for l in lines if l.startswith('batch ')]
    assert told and all(re.fullmatch(r'batch \d+ of 27: (train|validation) \d+\.\d% \(.*\) of \d+(, \d+ ties?)?, loss \d\.\d{4}.*', l) for l in told)
    assert any(re.search(r'rate 0\.0\d+, [\d,.]+ pairs/s, \d+ s left$', l) for l in told)
    spent = re.search(r'training (\d+) s of (\d+) s in all\n', out)
    assert spent and int(spent[1]) <= int(spent[2]) and s['seconds'] < s['seconds_in_all'] and not s['stopped_early']


def test_precision_says_why(results, capsys):
    assert main([*few, 'desc=a', 'training.loop.n_batches=1', 'training.optimizer.warmup=0']) == 0
    err = capsys.readouterr().err
    assert re.search(r'^on cpu in (bf16 \(auto: the cpu computes in it\)|fp32 \(auto: the cpu does not compute in bf16\))$', err, re.M)
    assert 'learning rate constant at 0.0007: schedule=epochs decays between epochs, this run has one, so final_lr=0.0005 is not used; take training.optimizer.schedule=linear' in err


def test_nine_batches_an_epoch_do_not_write_nine_models(results):
    "The default intervals, ten times an epoch, have a floor of 20 batches; the last batch is validated and kept."
    every = '{interval_val: 10, interval_type: per-epoch, max_n_intervals: -1}'
    assert main([*few, 'desc=a', 'training.loop.n_epochs=5', 'training.loop.n_checkpoints=9', f'training.loop.intervals.validation={every}', f'training.loop.intervals.checkpointing={every}']) == 0
    assert [r['batch'] for r in history(results, 'a') if 'validation/loss' in r] == [20, 40, 45]
    assert sorted(p.name for p in (run(results, 'a')/'simulation'/'checkpoints').iterdir()) == ['batch-0000020', 'batch-0000040', 'batch-0000045']


@pytest.mark.parametrize('schedule, n_batches', [('epochs', 30), ('cosine', 13)])     # of 9 an epoch, 18 in n_epochs
def test_the_rate_ends_at_final_lr(results, schedule, n_batches):
    assert main([*few, 'desc=a', 'training.loop.n_epochs=2', f'training.loop.n_batches={n_batches}', f'training.optimizer.schedule={schedule}', 'training.optimizer.warmup=0',
                 'training.loop.intervals.train_status_update={interval_val: 1, interval_type: batches}']) == 0
    rates = [r['train/learning_rate'] for r in history(results, 'a') if 'train/learning_rate' in r]
    assert len(rates) == n_batches and rates[0] == 7e-4 and rates[-1] == pytest.approx(5e-4, rel=1e-12) and min(rates) >= 5e-4*(1 - 1e-12)


@pytest.mark.parametrize('setting', ['warmup=-1', 'warmup=1.5', 'warmup=true', 'warmup=soon', 'warmup=[1]', 'schedule=exponential', 'n_warmup_batches=3'])
def test_schedules_that_are_none(setting, capsys):
    assert main([*few, f'training.optimizer.{setting}']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and {'w': 'a whole number of batches, or a share', 's': 'one of epochs, steps, linear', 'n': 'training.optimizer.warmup'}[setting[0]] in said


def test_stopped_early_says_so(results, capsys):
    assert main([*few, 'desc=a', 'data.subdirs=[toy-helpful]', 'training.loop.n_epochs=200', 'training.loop.max_non_optim_vals=1', 'training.optimizer.init_lr=.1', 'training.optimizer.final_lr=.1',
                 'training.loop.intervals.validation={interval_val: 1, interval_type: batches}']) == 0
    out, err = capsys.readouterr(); s = summary(results, 'a')
    line = f'stopped early: no lower validation loss in the last validation, batch {s["n_batches"]} of 1,800; the best is that of batch {s["best_batch"]}'
    assert line in err.splitlines() and line in (run(results, 'a')/'logs'/'train.log').read_text()
    assert s['stopped_early'] is True and f'stopped early after batch {s["n_batches"]}' in out


def test_quiet_and_a_sweep(results, capsys):
    "A sweep says which run it is at and ends with a table; `--quiet` leaves the final result, and the log every line."
    settings = [*few, 'training.loop.n_batches=2', 'seed=1,2']
    assert main(['-m', 'desc=a', *settings]) == 0
    out, err = capsys.readouterr()
    assert 'run 1 of 2: a-1' in err.splitlines() and 'run 2 of 2: a-2' in err.splitlines()
    table = out.splitlines()[-5:]
    assert table[0].startswith('| run') and table[-1] == f'next: python -m rlhf_flant5.compare {results}'
    assert [re.sub(' +', ' ', l).split(' (')[0] for l in table[2:4]] == [f'| a-{k} | {100*summary(results, f"a-{k}")["validation"]["accuracy"]:.1f}' for k in (1, 2)]
    assert main(['-m', '--quiet', 'desc=b', *settings]) == 0
    out, err = capsys.readouterr()
    assert err == '' and out.count('decoder_output, seed') == 2 and out.splitlines()[-1].startswith('next: ')
    assert 'learning rate' in (run(results, 'b-1')/'logs'/'train.log').read_text()
    assert main(['-q', *few, 'desc=b-1', 'seed=3']) == 2 and capsys.readouterr().err.startswith('error: ')


def test_one_subset_is_said_once(results, capsys, pairs_folder, model_folder):
    assert main(['desc=a', f'data.name={pairs_folder}', 'data.subdirs=[helpful-base]', f'model.transformer_name={model_folder}', 'training.loop.n_batches=1', 'training.loop.train_batch_size=8',
                 'device_name=cpu', 'sim_man.allow_untracked=true']) == 0
    assert '    helpful-base: ' not in capsys.readouterr().err


def test_tensorboard(results):
    "Each number says what it is; test scores, a row in the table of settings, where the run comes from, five pairs with their rewards."
    assert main([*few, 'desc=a', 'training.loop.n_batches=3']) == 0
    folder = run(results, 'a')/'simulation'/'tensorboard'
    assert len([*folder.iterdir()]) == 1
    events = EventAccumulator(str(folder)).Reload(); s = summary(results, 'a')
    numbers = [t for t in events.Tags()['tensors'] if 'text_summary' not in t]
    assert {'train/accuracy/low', 'validation/toy-helpful/accuracy/high', 'test/calibration_error'} <= {*numbers}
    assert not [t for t in numbers if not events.SummaryMetadata(t).summary_description]
    value = lambda t: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(t)]
    for k in ('accuracy', 'loss'): assert value(f'test/{k}') == [(s['best_batch'], pytest.approx(s['test'][k]))]
    assert '_hparams_/session_start_info' in events.summary_metadata
    page = lambda t: tensor_util.make_ndarray(events.Tensors(f'{t}/text_summary')[0].tensor_proto).item().decode()
    origin = json.loads((run(results, 'a')/'data'/'provenance.json').read_text())
    for what in ('python -m rlhf_flant5.train', str(origin['source']['commit']), '93 used for train', 'warmup: 20'): assert what in page('run'), page('run')
    rows = [json.loads(l) for l in (run(results, 'a')/'results'/'validation_pairs.jsonl').read_text().splitlines()[:5]]
    said = re.findall(r'\*\*Pair (\d), (chosen|rejected): reward (-?\d+\.\d{3})\*\*\n\n    \n', page('validation_pairs'))
    assert said == [(str(i + 1), k, f'{r[f"reward_{k}"]:.3f}') for i, r in enumerate(rows) for k in ('chosen', 'rejected')]
