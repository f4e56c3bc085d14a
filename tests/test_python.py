"Training by a call: what may be pairs, where the run goes, and that it is the command's own run."
import json, logging, os, signal, subprocess, sys
import pytest
from datasets import Dataset
from conftest import root, summary_of
from rlhf_flant5 import train
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.toy import toy_pairs
from rlhf_flant5.train import main         # the program, a module with the function's name
from rlhf_flant5.training.runs import Run

few = dict(n_train_data=48, n_test_data=20, n_val_data=20, train_batch_size=16)
small = dict(model='decoder_output', device_name='cpu', allow_untracked=True, precision='fp32', quiet=True, **few)
own = small | dict(transformer='toy', max_tokens=128)


@pytest.fixture(scope='module')
def table(): return toy_pairs(300).to_pandas()[['chosen', 'rejected', 'subset']]


def test_the_package_gives_the_function_and_stays_quick():
    code = '''
import rlhf_flant5, sys
assert 'train' in dir(rlhf_flant5) and not {'torch', 'pandas'} & sys.modules.keys()
import rlhf_flant5.train as program
from rlhf_flant5 import train, RewardModel
assert program is train and train.__module__ == 'rlhf_flant5.use.python'
assert sys.modules['rlhf_flant5.train'].main
'''
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | dict(PYTHONPATH=str(root)),
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_call_is_the_command(results):
    called = train('toy', epochs=1, desc='called', **small)
    words = ['experiment=toy', 'model=decoder_output', 'training.loop.n_epochs=1', 'desc=commanded', 'device_name=cpu',
             'data.n_train_data=48', 'data.n_test_data=20', 'training.loop.n_val_data=20', 'training.precision=fp32',
             'training.loop.train_batch_size=16', 'sim_man.allow_untracked=true']
    assert main(words) == 0
    commanded = summary_of(results/'Reward-Model-Training'/'desc-commanded,index-0')
    assert called.scores == {split: commanded[split] for split in ('validation', 'test')}
    assert called.summary['best_reachable_accuracy'] == commanded['best_reachable_accuracy'] > .8


KINDS = dict(
    frame=lambda table: table,
    dataset=lambda table: Dataset.from_pandas(table),
    rows=lambda table: table.to_dict('records'),
    conversations=lambda table: [
        {side: [dict(role='user', content=f'Question {k}'), dict(role='assistant', content=row[side])]
         for side in ('chosen', 'rejected')} for k, row in enumerate(table.head(200).to_dict('records'))])


@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_pairs(results, table, kind):
    result = train(KINDS[kind](table), epochs=1, **own)
    counts = json.loads((result.folder/'data'/'counts.json').read_text())
    read = sum(c['read'] for c in counts.values() if 'read' in c)
    assert read == len(KINDS[kind](table)) and result.summary['data_name'] == 'from-python'
    prints = Run(result.folder).provenance['pairs']
    assert len({*prints.values()}) == 3
    if kind in ('dataset', 'rows'): assert result.scores == train(table, epochs=1, **own).scores


def test_test_pairs_of_their_own(results, table):
    apart = dict(train=table.head(200), test=table.tail(100))
    result = train(apart, epochs=1, name='mine', **own | dict(n_test_data=0))
    assert (result.summary['data_name'], result.scores['test']['n']) == ('mine', 100)
    with pytest.raises(ConfigError, match='no train among the splits training'): train(dict(training=table), **own)


def test_settings_of_files_hold_for_tables(results, table, tmp_path):
    named = table.rename(columns=dict(chosen='better', rejected='worse'))
    named.loc[3, 'worse'] = None
    hard = tmp_path/'hard.csv'
    named.tail(40)[['better', 'worse']].to_csv(hard, index=False)
    columns = dict(chosen='better', rejected='worse')
    result = train(named.head(200), epochs=1, columns=columns, bad_rows='drop', tests=dict(hard=str(hard)), **own)
    assert [*result.scores] == ['validation', 'hard'] and 'hard: ' in repr(result)
    bad, = (result.folder/'data'/'bad_rows.jsonl').read_text().splitlines()
    assert json.loads(bad)['place'] == 'row:3'
    assert len(result.model.score(table.chosen.head(2).tolist())) == 2


def test_without_a_place_results_stand_in_the_working_directory(tmp_path, monkeypatch, table):
    monkeypatch.delenv('RESULTS_ROOT_DIR', raising=False)
    monkeypatch.chdir(tmp_path)
    folder = train(table, epochs=1, **own).folder
    assert folder == (tmp_path/'results'/'Reward-Model-Training'/'desc-reward-model,index-0').resolve()


class PressCtrlC(logging.Handler):
    "Once, at the second validation."
    def emit(self, record):
        if 'validation' not in record.getMessage() or 'batch 2 of' not in record.getMessage(): return
        logging.getLogger().removeHandler(self)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_and_resume(results, table):
    often = {f'training.loop.intervals.{k}': dict(interval_val=1, interval_type='batches')
             for k in ('validation', 'checkpointing')}
    call = dict(n_batches=3, **own, **often)
    whole = train(table, **call)
    press = PressCtrlC()
    logging.getLogger().addHandler(press)
    try:
        with pytest.raises(KeyboardInterrupt): train(table, **call)
    finally: logging.getLogger().removeHandler(press)
    result = train(table, resume=True, **call)
    assert result.folder.name == 'desc-reward-model,index-1' and result.scores == whole.scores
    assert Run(result.folder).provenance['resumed'][0]['after'] == 'interrupted'
