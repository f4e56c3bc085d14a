"Ensembles: what may not be put together, and what an odd member does to the others."
import numpy as np
import pytest
import torch
from rlhf_flant5 import RewardModel
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer
from rlhf_flant5.models.base import readout_class
from rlhf_flant5.use.ensemble import Ensemble
from rlhf_flant5.use.evaluation import evaluate
from transformers import T5EncoderModel, T5Model

texts = toy_pairs(12, split='test')['chosen'][:]


def untrained(seed=0, readout='layerwise_attention', frozen=True, **facts):
    torch.manual_seed(seed)
    cls = readout_class(readout)
    transformer = toy_transformer(cls=T5Model if cls.reads_decoder else T5EncoderModel)
    model = cls(Backbone(transformer, not frozen)).eval()
    model.tokenizer = toy_tokenizer()
    model.config = dict(max_tokens=99, temperature=1. + seed, reward_mean=.1*seed) | facts
    return model


@pytest.mark.parametrize('combine', ['mean', 'worst', 'mean_minus_sd'])
@pytest.mark.parametrize('readout', ['layerwise_attention', 'full_attention_pooling', 'decoder_output'])
def test_an_ensemble_of_one_is_that_model(combine, readout):
    model = untrained(2, readout)
    one = Ensemble([model], combine)
    assert one.score(texts).tolist() == model.score(texts).tolist()
    assert one.compare(texts[:6], texts[6:]).tolist() == model.compare(texts[:6], texts[6:]).tolist()
    assert one.rank('Who?', ['I.', 'You.']).equals(model.rank('Who?', ['I.', 'You.']))


def test_a_larger_unit_and_another_zero_change_nothing():
    a, b = untrained(0), untrained(1)
    before = {way: Ensemble([a, b], way).compare(texts[:6], texts[6:]) for way in ('mean', 'worst', 'mean_minus_sd')}

    class Louder(type(b)):
        "The same model in other words: rewards ten times as large, and 5 higher."
        def readout(self, features): return 10*super().readout(features) + 5

    b.__class__ = Louder
    b.config |= dict(temperature=20., reward_mean=10*b.config['reward_mean'] + 5)
    for way, p in before.items():
        ensemble = Ensemble([a, b], way)
        unit = ensemble.temperature/np.mean([1., 2.])      # of the margins' own scale
        assert unit == pytest.approx(10.5/1.5)
        np.testing.assert_allclose(ensemble.compare(texts[:6], texts[6:]), p, atol=1e-5)


def test_readouts_of_one_frozen_transformer_share_a_pass():
    names = ['layerwise_attention', 'full_attention_pooling', 'attention_pooled_encoder']
    members = [untrained(k, name) for k, name in enumerate(names)]
    apart = np.stack([m.score(texts) for m in members])
    ensemble, passes = Ensemble(members), []
    members[0].backbone.register_forward_hook(lambda *_: passes.append(1))
    T, c = np.array([[1.], [2.], [3.]]), np.array([[0.], [.1], [.2]])
    np.testing.assert_allclose(ensemble.score(texts), 2*((apart - c)/T).mean(0) + .1, atol=1e-5)
    assert len(passes) == 1
    trained = Ensemble([untrained(k, frozen=False) for k in (1, 2)])
    assert trained.members[0].backbone is not trained.members[1].backbone


def test_what_is_no_ensemble():
    def refuses(contains, members, **kwargs):
        with pytest.raises(ConfigError, match=contains): Ensemble(members, **kwargs)
    a, b = untrained(0), untrained(1)
    refuses('of no model', [])
    refuses("combine='best'", [a, b], combine='best')
    refuses('sd_weight=-1', [a, b], sd_weight=-1)
    for bad in (0, -1, float('nan'), 'x', True): refuses('member 2: temperature', [a, untrained(1, temperature=bad)])
    refuses('member 2: reward_mean', [a, untrained(1, reward_mean=float('inf'))])
    nameless = untrained(1)
    nameless.tokenizer = None
    refuses('member 2 has no tokenizer', [a, nameless])
    other = untrained(1)
    other.tokenizer.add_tokens(['robin!'])
    refuses('another vocabulary', [a, other])


def test_a_member_without_a_mean_reward():
    a, old = untrained(0), untrained(1, reward_mean=None)
    for way in ('worst', 'mean_minus_sd'):
        with pytest.raises(ConfigError, match='member 2 of 2: no reward_mean'): Ensemble([a, old], way)
    mean = Ensemble([a, old])
    assert np.isfinite(mean.score(texts)).all()
    with pytest.raises(ConfigError, match='give zero_at=texts'): mean.uncertainty(texts)
    assert (Ensemble([a, old], zero_at=texts).uncertainty(texts) >= 0).all()


def test_the_programs_take_an_ensemble(tmp_path):
    for k in (0, 1):
        model = untrained(k)
        model.save_pretrained(tmp_path/f'{k}', **model.config)
    ensemble = RewardModel.from_pretrained([tmp_path/'0', str(tmp_path/'1')], 'cpu')
    table, report = evaluate(ensemble, toy_pairs(40, split='test').to_pandas())
    assert report['temperature'] == 1.5 and len(table) == report['scores']['n']
    with pytest.raises(ConfigError, match='2: no such'):
        RewardModel.from_pretrained([tmp_path/'0', tmp_path/'2'], 'cpu')
