"""What a run reports is what its saved model gives, whatever precision it trained in.

Every readout, trained, on kept states and over a shared pass."""
import gzip, json
from types import SimpleNamespace
import numpy as np
import pytest, torch
from conftest import summary_of
from rlhf_flant5 import RewardModel
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.config.names import choices
from rlhf_flant5.metrics.accuracy import margins, read_pair_table, write_pair_table
from rlhf_flant5.metrics.calibration import fit_temperature
from rlhf_flant5.models.base import readout_class
from rlhf_flant5.train import main
from rlhf_flant5.training.budget import compile_if_it_pays
from rlhf_flant5.training.build import build_model
from rlhf_flant5.training.runs import find_runs

WHOLE = [m for m in choices('model') if not readout_class(m).reads_answer]      # these can share a pass
APART = [m for m in choices('model') if readout_class(m).reads_answer]
alike = pytest.mark.parametrize('models', [WHOLE, APART], ids=['whole', 'apart'])


@pytest.fixture
def train(results, model_folder, pairs_folder):
    "The program with a few batches on 160 pairs; the runs' folders."
    def train(precision, *settings):
        every = ['validation', 'checkpointing', 'train_status_update', 'progress_logging']
        overrides = [f'data.name={pairs_folder}', 'data.subdirs=[helpful-base,harmless-base]',
                     'data.val_fraction=0.2', f'model.transformer_name={model_folder}',
                     f'training.precision={precision}', 'training.token_budget=1024', 'training.loop.n_batches=6',
                     'training.loop.train_batch_size=16',
                     'training.optimizer.init_lr=1e-2', 'training.optimizer.final_lr=1e-2',
                     *(f'training.loop.intervals.{k}.interval_type=never' for k in every),
                     'device_name=cpu', 'sim_man.allow_untracked=true']
        assert main([*overrides, *settings]) == 0
        return find_runs(results)
    return train


def texts(run, split):
    with gzip.open(run/'data'/f'{split}_texts.jsonl.gz', 'rt', encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    return [r['chosen'] for r in rows] + [r['rejected'] for r in rows]


def reported_and_given(run):
    "Rewards of a run's tables and of its saved model, validation then test, (2, pairs) each."
    model = RewardModel.from_pretrained(run/'simulation'/'best_model')
    for split in ('validation', 'test'):
        table = read_pair_table(run/'results'/f'{split}_pairs.jsonl')
        yield np.stack([table.reward_chosen, table.reward_rejected]), model.score(texts(run, split)).reshape(2, -1)


def check(run, precision):
    "Tables, temperature and what stands beside the weights are those of the saved model."
    summary, rewards = summary_of(run), []
    for reported, given in reported_and_given(run):
        assert reported.shape == given.shape
        assert given.std() > 1e-3
        off = abs(reported - given).max()
        assert off < 1e-5, (run.name, off, given.std())
        rewards.append(given)
    assert summary['precision'] == precision
    temperature = fit_temperature(margins(*rewards[0]))
    assert summary['temperature'] == pytest.approx(temperature, rel=1e-3)
    kept = json.loads((run/'simulation'/'best_model'/'config.json').read_text(encoding='utf-8'))
    assert kept['temperature'] == summary['temperature']
    assert kept['validation'] == summary['validation']


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('model', choices('model'))
def test_trained(train, precision, model):
    [run] = train(precision, f'model={model}')
    check(run, precision)


@alike
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_kept_states(train, precision, models):
    "The states of validation and test are kept in float32, those to train on as the settings say."
    cacheable = [m for m in models if readout_class(m).cacheable]
    runs = train(precision, f'model=[{",".join(cacheable)}]', 'model.train_transformer=false')
    assert len(runs) == len(cacheable) > 0
    for run in runs:
        check(run, precision)
        assert summary_of(run)['cached_states']


@alike
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_shared_pass(train, precision, models):
    runs = train(precision, f'model=[{",".join(models)}]', 'model.train_transformer=false',
                 'model.use_pretrained_output=false')
    assert len(runs) == len(models) > 0
    for run in runs:
        check(run, precision)
        assert not summary_of(run)['cached_states']


def test_compiled_blocks(train, monkeypatch):
    "A run that trains on compiled blocks scores with plain ones."
    passes, n_at_tables = [], []

    def recording(graph, _):
        def run(*args):
            passes.append(graph)
            return graph(*args)
        return run

    def compile_blocks(self):
        for block in self.transformer.encoder.block: block.layer[-1].compile(backend=recording, dynamic=True)

    def write_table(table, path):
        n_at_tables.append(len(passes))
        return write_pair_table(table, path)

    monkeypatch.setattr(Backbone, 'compile_blocks', compile_blocks)
    monkeypatch.setattr('rlhf_flant5.training.scores.write_pair_table', write_table)
    [run] = train('bf16', 'model=attention_pooled_encoder', 'training.compile=true')
    at_validation, at_test = n_at_tables
    assert at_validation > 6
    assert at_validation == at_test == len(passes)
    check(run, 'bf16')


@pytest.mark.parametrize('device, precision, pays', [
    ('cpu', 'bf16', True), ('cuda', 'fp32', True), ('mps', 'fp32', False), ('mps', 'bf16', False)])
def test_auto_compiles_where_the_saving_is_known(monkeypatch, device, precision, pays):
    cfg = load_config(['experiment=toy', 'model.transformer_name=toy'])
    assert cfg.training.compile == 'auto'
    model = build_model(cfg.model, 1)
    compiled = []
    monkeypatch.setattr(Backbone, 'compile_blocks', lambda self: compiled.append(self))
    so_slow_that_all_pays = 1.
    monkeypatch.setattr('rlhf_flant5.training.budget.matmul_rate', lambda *_: so_slow_that_all_pays)
    mixed = 'no' if precision == 'fp32' else precision
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=mixed)
    train = SimpleNamespace(n_steps=10, tokens=np.full(100, 50))
    assert compile_if_it_pays(cfg, model, train, accelerator) is pays
    assert len(compiled) == pays
