"The toy world's FLAN-T5: blanks that can be undone, and a cache that is damaged, shared or closed."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import T5EncoderModel
from rlhf_flant5.backbone import toy_flan
from rlhf_flant5.backbone.toy_flan import blank_out, noise_mask, Recipe, recipe_digest, toy_flan_t5
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.toy import toy_transformer
from rlhf_flant5.training.build import build_model

short = Recipe(n_texts=100, span_steps=2, answer_steps=2)


def filled_in(example):
    "The text again: each sentinel of the inputs gives way to what the target lists after it."
    spans, lowest = {}, 400
    for i in example.target[:-1]:
        if i > lowest: spans[at := i] = []
        else: spans[at].append(i)
    assert spans.popitem()[1] == [], 'one more sentinel at the end'
    return [j for i in example.inputs for j in spans.get(i, [i])]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, 300), min_size=2, max_size=60), st.integers(0, 2**32 - 1),
       st.floats(.01, .99), st.floats(1, 10))
def test_blanks_can_be_filled_in_again(text, seed, density, mean_span):
    mask = noise_mask(np.random.default_rng(seed), len(text), density, mean_span)
    assert 0 < mask.sum() < len(text)
    assert mask.sum() == min(max(round(len(text)*density), 1), len(text) - 1)
    assert filled_in(blank_out([*text, 1], mask)) == [*text, 1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, and nothing in memory."
    monkeypatch.setenv('RLHF_FLANT5_CACHE', str(tmp_path))
    toy_flan._weights.cache_clear()
    yield tmp_path
    toy_flan._weights.cache_clear()


def test_a_damaged_copy_is_made_again(cache):
    weights = toy_flan_t5(recipe=short).lm_head.weight
    file, = cache.rglob('*.safetensors')
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    toy_flan._weights.cache_clear()
    assert torch.equal(toy_flan_t5(recipe=short).lm_head.weight, weights)
    assert file.read_bytes() == whole


def test_a_cache_that_refuses_is_told_in_one_line(cache, monkeypatch):
    monkeypatch.setenv('RLHF_FLANT5_CACHE', '/dev/null')
    with pytest.raises(ConfigError, match='set RLHF_FLANT5_CACHE to another folder') as e: toy_flan_t5(recipe=short)
    assert '\n' not in str(e.value)


def test_the_digest_is_of_all_that_matters(monkeypatch):
    assert recipe_digest(short) != recipe_digest(Recipe(n_texts=100, span_steps=2, answer_steps=3))
    before = recipe_digest(short)
    recipe_digest.cache_clear()
    monkeypatch.setitem(toy_flan.TOY_T5, 'd_ff', 65)
    assert recipe_digest(short) != before
    recipe_digest.cache_clear()


@pytest.mark.parametrize('name, expected', [('toy', toy_flan_t5), ('toy-random', toy_transformer)])
def test_the_settings_name_either_toy(name, expected):
    cfg = load_config(['experiment=toy', f'model.transformer_name={name}'])
    built = build_model(cfg.model, 1).backbone.transformer.shared.weight
    assert torch.equal(built, expected(cls=T5EncoderModel).shared.weight)
    assert load_config(['experiment=toy']).model.transformer_name == 'toy'
