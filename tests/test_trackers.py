"""Trackers by name: what a run tells them, and that a run that goes on is the same run there.
The packages need not be installed: stand-ins write down what they get. Those that are installed are tried, too."""
import json, sys
from importlib.util import find_spec
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.train import main
from rlhf_flant5.training.pipeline import train_run

SERVICES = 'wandb', 'mlflow', 'trackio'

small = ['experiment=toy', 'model=decoder_output', 'device_name=cpu', 'sim_man.allow_untracked=true',
         'training.precision=fp32', 'data.n_train_data=32', 'data.n_test_data=20', 'training.loop.n_val_data=20',
         'training.loop.train_batch_size=16', 'training.optimizer.init_lr=1e-3', 'training.optimizer.final_lr=1e-3',
         'training.optimizer.warmup=0', 'desc=followed', 'resume=true']


def settings(names, n_epochs): return [*small, f'training.trackers=[{names}]', f'training.loop.n_epochs={n_epochs}']


# what each package has for Accelerate, as far as a run needs it; `note` appends a line to a file
NOTE = '''
import json, os
def note(what, **facts):
    with open(os.environ['NOTES'], 'a') as f: f.write(json.dumps(dict(what=what) | facts) + '\\n')
'''
RUNS = NOTE + '''
class Run:
    def __init__(self, id, name): self.id, self.name = id, name
    def log(self, values, step): note('log', step=step, values=values)
    def finish(self): note('end')
def init(project, name=None, id=None, config=None, resume=None, dir=None, reinit=None):
    note('begin', id=id or name, known=resume in ('allow', 'must'), config=config)
    return Run(id or 'made-here', name)
'''
MLFLOW = NOTE + '''
from types import SimpleNamespace as NS
utils = NS(validation=NS(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
def is_tracking_uri_set(): return False
def set_tracking_uri(uri): note('place', uri=uri)
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location, tags): return '1'
def start_run(run_id, experiment_id, run_name, nested, tags, description):
    note('begin', id=run_id or run_name, known=run_id is not None, config=None)
    return NS(info=NS(run_id=run_id or 'made-here'))
def log_params(config): note('config', config=config)
def log_metrics(values, step): note('log', step=step, values=values)
def end_run(): note('end')
'''


@pytest.fixture
def notes(tmp_path, monkeypatch):
    "Stand-ins of the packages, and a function that reads what they were told."
    folder = tmp_path/'packages'
    folder.mkdir()
    for name in SERVICES: (folder/f'{name}.py').write_text(MLFLOW if name == 'mlflow' else RUNS)
    monkeypatch.setenv('NOTES', str(tmp_path/'notes'))
    monkeypatch.syspath_prepend(folder)
    for name in SERVICES: monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path/'notes').read_text().splitlines()]
    for name in SERVICES: sys.modules.pop(name, None)


@pytest.mark.parametrize('name', SERVICES)
def test_a_run_and_its_continuation_are_one(results, notes, name):
    folder = train_run(settings(name, n_epochs=1))['folder']
    train_run(settings(name, n_epochs=2))
    assert not (folder/'simulation'/'tensorboard').exists()

    began, again = (n for n in notes() if n['what'] == 'begin')
    assert not began['known'] and again['known']
    assert began['id'] is None or 'followed' in began['id']
    assert json.loads((folder/'data'/'trackers.json').read_text()) == {name: again['id']}
    config = next(n['config'] for n in notes() if n.get('config'))
    assert (config['data.n_train_data'], config['training.loop.n_epochs']) == (32, 1)

    told = [(n['step'], v['validation/loss']) for n in notes() if 'validation/loss' in (v := n.get('values', {}))]
    history = [json.loads(line) for line in (folder/'results'/'history.jsonl').read_text().splitlines()]
    assert told == [(h['batch'], h['validation/loss']) for h in history if 'validation/loss' in h]
    tested = [n for n in notes() if 'test/accuracy' in n.get('values', {})]
    assert [n['step'] for n in tested] == [2, 4] and 'test/accuracy_low' in tested[0]['values']
    assert [n['what'] for n in notes()].count('end') == 2


def test_a_service_that_fails_ends_no_run(results, notes, monkeypatch, capsys):
    def gone(*args, **kwargs): raise ConnectionError('the service is gone')
    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS['trackio'], 'log', gone)
    assert main(settings('tensorboard,trackio', n_epochs=1)) == 0
    assert capsys.readouterr().err.count('trackio gets no more numbers (the service is gone)') == 1
    assert notes()[-1]['what'] == 'begin'


def test_a_service_that_does_not_start_ends_it_before_the_first_step(results, notes, monkeypatch):
    def refuse(*args, **kwargs): raise PermissionError('nobody is logged in')
    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS['wandb'], 'start', refuse)
    with pytest.raises(ConfigError, match=r'wandb does not start \(nobody is logged in\)'):
        train_run(settings('tensorboard,wandb', n_epochs=1))
    assert not [*results.rglob('desc-*')]


def test_what_cannot_be_followed_is_refused_first(results, notes, capsys):
    side_by_side = ['model=[layerwise_attention,full_attention_pooling]', 'model.train_transformer=False']
    assert main([*settings('mlflow', n_epochs=1), *side_by_side]) == 2
    assert 'mlflow follows one run of a process, 2 are to train side by side' in capsys.readouterr().err
    assert main([*small, 'training.trackers=[wandb,wandb]']) == 2
    assert 'must be a list of different names out of tensorboard, wandb' in capsys.readouterr().err
    assert not [*results.rglob('desc-*')]


@pytest.mark.parametrize('name', SERVICES)
def test_a_package_that_is_not_there(results, name, capsys):
    if find_spec(name): pytest.skip(f'{name} is installed')
    assert main(settings(name, n_epochs=1)) == 2
    assert capsys.readouterr().err.count(f'{name} is not installed; pip install {name}, or leave it out') == 1


@pytest.mark.parametrize('name', SERVICES)
def test_the_package_itself(results, name, monkeypatch):
    "Without a network; MLflow's own reader says what has arrived."
    if not find_spec(name): pytest.skip(f'{name} is not installed')
    for variable in ('MLFLOW_TRACKING_URI', 'WANDB_DIR', 'WANDB_PROJECT'): monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('TRACKIO_DIR', str(results/'trackio'))
    folder = train_run(settings(name, n_epochs=1))['folder']
    known = json.loads((folder/'data'/'trackers.json').read_text())
    train_run(settings(name, n_epochs=2))
    assert json.loads((folder/'data'/'trackers.json').read_text()) == known

    if name == 'wandb':
        parts = [*(folder/'logs'/'wandb').glob(f'offline-run-*-{known[name]}')]
        assert len(parts) == 2
    if name == 'mlflow':
        client = __import__('mlflow').MlflowClient(f'sqlite:///{folder.parent/"mlflow.db"}')
        assert client.get_run(known[name]).data.params['training.loop.n_epochs'] == '1'
        assert [m.step for m in client.get_metric_history(known[name], 'test/accuracy')] == [2, 4]
