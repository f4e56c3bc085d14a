"More epochs for a run that is done, and a run that begins with the weights of another."
import json
import pytest
from rlhf_flant5.config.compose import load_config, with_file
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.train import main, train

longer = ['experiment=toy', 'device_name=cpu', 'sim_man.allow_untracked=true', 'data.n_train_data=48', 'data.n_test_data=20', 'training.loop.n_val_data=40', 'training.precision=fp32',
          'training.loop.train_batch_size=16', 'training.loop.intervals.validation={interval_val: 1, interval_type: per-epoch}', 'training.optimizer.final_lr=7e-4']


def run_files(results, desc): return results/'Reward-Model-Training'/f'desc-{desc},index-0'


def test_a_run_that_is_done_goes_on_to_more_epochs(results):
    "Two epochs, and then four, are the four of an unbroken run."
    from safetensors.torch import load_file
    whole = train([*longer, 'desc=whole', 'training.loop.n_epochs=4'])
    train([*longer, 'desc=part', 'training.loop.n_epochs=2'])
    again = train([*longer, 'desc=part', 'training.loop.n_epochs=4', 'resume=true'])
    assert again['n_batches'] == whole['n_batches'] and again['test'] == whole['test']
    weights = [load_file(run_files(results, d)/'simulation'/'best_model'/'model.safetensors') for d in ('whole', 'part')]
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[0])
    assert 'n_epochs: 4' in (run_files(results, 'part')/'data'/'config.yaml').read_text()
    train([*longer, 'desc=part', 'training.loop.n_epochs=4', 'resume=true'])      # is done already
    given_back = load_config(with_file(run_files(results, 'whole'), ['desc=again', 'resume=true']))      # what --config <run> reads
    assert given_back == load_config([*longer, 'desc=again', 'training.loop.n_epochs=4', 'resume=true'])
    for settings, says in (['training.loop.n_epochs=3'], 'n_epochs was 4, now 3'), (['training.loop.n_epochs=5', 'seed=7'], 'seed was 103, now 7'):
        with pytest.raises(ConfigError, match=says): train([*longer, 'desc=part', 'resume=true', *settings])


def test_more_epochs_under_a_decaying_rate_are_refused(results):
    decays = [*longer[:-1], 'training.optimizer.final_lr=1e-4', 'desc=decays', 'resume=true', 'training.loop.n_batches=2']
    train([*decays, 'training.loop.n_epochs=2'])
    with pytest.raises(ConfigError, match='the rate was planned for 2 epochs.*model.start_from'): train([*decays, 'training.loop.n_epochs=3'])


@pytest.mark.parametrize('how', [[], ['model.train_transformer=False'], ['model.lora.r=2']])
def test_warm_start(results, how, capsys):
    tiny = [*longer, 'training.loop.n_batches=2', *how]
    first = train([*tiny, 'desc=first'])
    still = ['training.optimizer.init_lr=1e-30', 'training.optimizer.final_lr=1e-30', 'seed=5', 'training.loop.n_batches=1']
    warm = train([*tiny, *still, 'desc=warm', f'model.start_from={first["folder"]}'])
    assert warm['test']['loss'] == pytest.approx(first['test']['loss'], abs=1e-6) and warm['test']['accuracy'] == first['test']['accuracy']
    assert train([*tiny, *still, 'desc=cold'])['test']['loss'] != pytest.approx(first['test']['loss'], abs=1e-6)
    came = json.loads((warm['folder']/'data'/'provenance.json').read_text())['start_from']
    assert came['model'] == str(first['folder']) and len(came['weights']) == 64
    for other, says in (['model=decoder_output'], 'its readout is attention_pooled_encoder'), (['model.pooling_output_dim=8'], 'differ in name or shape'):
        assert main([*tiny, *other, 'desc=other', f'model.start_from={first["folder"]}/simulation/best_model']) == 2
        assert says in capsys.readouterr().err and not run_files(results, 'other').exists()
