"More epochs for a run that is done, and a run that begins with the weights of another."
import json
import pytest
from safetensors.torch import load_file
from rlhf_flant5.config.compose import load_config, with_file
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.train import main
from rlhf_flant5.training.pipeline import train_run

longer = ['experiment=toy', 'device_name=cpu', 'sim_man.allow_untracked=true', 'training.precision=fp32',
          'data.n_train_data=48', 'data.n_test_data=20', 'training.loop.n_val_data=40',
          'training.loop.train_batch_size=16', 'training.optimizer.init_lr=7e-4', 'training.optimizer.final_lr=7e-4',
          'training.loop.intervals.validation={interval_val: 1, interval_type: per-epoch, min_batches: 0}']


def n_epochs(n): return f'training.loop.n_epochs={n}'
def run_files(results, desc): return results/'Reward-Model-Training'/f'desc-{desc},index-0'
def best_weights(results, desc):
    return load_file(run_files(results, desc)/'simulation'/'best_model'/'model.safetensors')


def test_a_run_that_is_done_goes_on_to_more_epochs(results):
    "Two epochs, and then four, are the four of an unbroken run."
    whole = train_run([*longer, 'desc=whole', n_epochs(4)])
    train_run([*longer, 'desc=part', n_epochs(2)])
    again = train_run([*longer, 'desc=part', n_epochs(4), 'resume=true'])
    assert again['n_batches'] == whole['n_batches']
    assert again['test'] == whole['test']

    of_whole, of_part = best_weights(results, 'whole'), best_weights(results, 'part')
    assert of_whole.keys() == of_part.keys()
    for name, w in of_whole.items(): assert (w == of_part[name]).all(), name
    assert 'n_epochs: 4' in (run_files(results, 'part')/'data'/'config.yaml').read_text()
    train_run([*longer, 'desc=part', n_epochs(4), 'resume=true'])      # is done already

    from_config = with_file(run_files(results, 'whole'), ['desc=again', 'resume=true'])      # what --config <run> reads
    assert load_config(from_config) == load_config([*longer, 'desc=again', n_epochs(4), 'resume=true'])

    other_settings = {'n_epochs was 4, now 3': [n_epochs(3)],
                      'seed was 103, now 7': [n_epochs(5), 'seed=7']}
    for says, settings in other_settings.items():
        with pytest.raises(ConfigError, match=says): train_run([*longer, 'desc=part', 'resume=true', *settings])


def test_more_epochs_under_a_decaying_rate_are_refused(results):
    decays = [s for s in longer if 'final_lr' not in s]
    decays += ['training.optimizer.final_lr=1e-4', 'desc=decays', 'resume=true', 'training.loop.n_batches=2']
    train_run([*decays, n_epochs(2)])
    with pytest.raises(ConfigError, match='the rate was planned for 2 epochs.*model.start_from'):
        train_run([*decays, n_epochs(3)])


@pytest.mark.parametrize('how', [
    pytest.param([], id='trained'),
    pytest.param(['model.train_transformer=False'], id='frozen'),
    pytest.param(['model.lora.r=2'], id='lora')])
def test_warm_start(results, how, capsys):
    "A run on the weights of another begins where that one ended; with another readout it does not begin."
    tiny = [*longer, 'training.loop.n_batches=2', *how]
    first = train_run([*tiny, 'desc=first'])
    begin_with = f'model.start_from={first["folder"]}'
    hardly_trained = [*tiny, 'training.optimizer.init_lr=1e-30', 'training.optimizer.final_lr=1e-30', 'seed=5',
                      'training.loop.n_batches=1']

    warm = train_run([*hardly_trained, 'desc=warm', begin_with])
    assert warm['test']['loss'] == pytest.approx(first['test']['loss'], abs=1e-6)
    assert warm['test']['accuracy'] == first['test']['accuracy']
    cold = train_run([*hardly_trained, 'desc=cold'])
    assert cold['test']['loss'] != pytest.approx(first['test']['loss'], abs=1e-6)

    origin = json.loads((warm['folder']/'data'/'provenance.json').read_text())['start_from']
    assert origin['model'] == str(first['folder'])
    assert len(origin['weights']) == 64

    other_models = {'its readout is attention_pooled_encoder': 'model=decoder_output',
                    'differ in name or shape': 'model.pooling_output_dim=8'}
    for says, other in other_models.items():
        assert main([*tiny, other, 'desc=other', f'{begin_with}/simulation/best_model']) == 2
        assert says in capsys.readouterr().err
        assert not run_files(results, 'other').exists()
