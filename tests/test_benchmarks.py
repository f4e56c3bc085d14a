"""Benchmarks of several answers: the scores beside their makers' formulas, recomputed in the plainest way;
files with faults; whole runs of the program."""
import itertools, json, math
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import examples
from hypothesis import given, strategies as st
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.answers import load_answers, POOLS, REWARDBENCH_2, RM_BENCH
from rlhf_flant5.data.toy import toy_tokenizer, toy_transformer
from rlhf_flant5.evaluate import main
from rlhf_flant5.metrics.pools import best_of_k, best_of_points, error_at_top, style_matrix, style_scores, ties_score
from rlhf_flant5.models.base import readout_class, RewardModel
from rlhf_flant5.use.benchmarks import ANSWER_FILES, evaluate_answers
from transformers import T5EncoderModel

rewards = st.lists(st.integers(-3, 3), min_size=2, max_size=6)


@examples(50)
@given(rewards)
def test_the_best_of_four_gives_a_tie_its_share(r):
    draws = [k for k, reward in enumerate(r) if reward == max(r)]       # one of the best is taken at random
    assert best_of_points(r) == pytest.approx(draws.count(0)/len(draws))


def plain_ties(tied, ref):
    "RewardBench 2's formula, prompt by prompt."
    def stats(rewards, n_right):
        right, wrong = rewards[:n_right], rewards[n_right:]
        return min(right) > max(wrong), max(right) - min(right), min(right) - max(wrong)
    tied, ref = ({k: stats(*v) for k, v in form.items()} for form in (tied, ref))
    n, preferred, strictly, margins = 0, 0, 0, 0.
    for k in tied:
        if k not in ref: continue
        n += 1
        b, a, a_ref = tied[k][1], tied[k][2], ref[k][2]
        preferred += a > b
        strictly += min(a, a_ref) > b
        least = min(a, a_ref)
        if b > 0: margins += math.tanh(least/b - 1)
        elif least: margins += math.copysign(1, least)                  # tanh of an infinity; 0/0 counts 0
    accuracy = [sum(s[0] for s in form.values())/len(form) for form in (tied, ref)]
    return .3*accuracy[0] + .3*accuracy[1] + .2*preferred/n + .2*strictly/n + .01*margins/n


@examples(50)
@given(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=5), st.booleans())
def test_the_score_of_ties_is_its_makers(prompts, more):
    tied = {str(k): ([*a, 0], len(a)) for k, (a, _) in enumerate(prompts)}
    ref = {str(k): (b, 1) for k, (_, b) in enumerate(prompts)}
    if more: ref['of this form alone'] = ([1, 0], 1)
    assert ties_score(tied, ref)['score'] == pytest.approx(plain_ties(tied, ref))


@examples(50)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_three_styles_are_their_makers(prompts):
    right = np.zeros((3, 3))
    for p in prompts:
        for i, j in itertools.product(range(3), repeat=2): right[i, j] += p[i] > p[3 + j]
    right /= len(prompts)
    found = style_scores(style_matrix([p[:3] for p in prompts], [p[3:] for p in prompts]))
    plain = dict(hard=np.sum(np.triu(right, 1))/3, normal=np.mean(np.diag(right)), easy=np.sum(np.tril(right, -1))/3)
    for k, v in plain.items(): assert found[k] == pytest.approx(v)


@examples(50)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-5, 5)), min_size=1, max_size=6), st.data())
def test_best_of_k_is_the_mean_over_all_draws(pool, data):
    r, g = map(np.array, zip(*pool))
    k = data.draw(st.integers(1, len(pool)))
    tops = []
    for draw in itertools.combinations(range(len(pool)), k):
        best = [g[i] for i in draw if r[i] == max(r[j] for j in draw)]
        tops.append(sum(best)/len(best))
    assert best_of_k(r, g, k) == pytest.approx(np.mean(tops))
    assert error_at_top(r, g)[0] == pytest.approx(g.max() - best_of_k(r, g, len(pool)))


def write(path, rows):
    text = json.dumps(rows) if path.suffix == '.json' else ''.join(json.dumps(row) + '\n' for row in rows)
    path.write_text(text)
    return path


FOUR = dict(id='1', subset='Math', prompt='2 + 2?', chosen=['4.'], rejected=['5.', '6.', '7.'])
TIED = dict(id='tied:1', subset='Ties', prompt='Even?', chosen=['2.', '4.'], rejected=['1.', '3.'])
REF = dict(id='ref:1', subset='Ties', prompt='Even below 3?', chosen=['2.'], rejected=['1.'])
STYLES = dict(id='a', domain='math', prompt='2 + 2?', chosen=['4.', 'It is 4.', '**4**'], rejected=['5.', 'It is 5.', '**5**'])
POOL = dict(prompt='2 + 2?', answers=['4.', '5.', 'Four.'], gold=[1, 0, .5])
GOOD = {REWARDBENCH_2: [FOUR, TIED, REF], RM_BENCH: [STYLES], POOLS: [POOL, POOL]}


@pytest.mark.parametrize('ending', ['jsonl', 'json', 'parquet'])
@pytest.mark.parametrize('kind', GOOD)
def test_a_file_is_known_by_its_columns(kind, ending, tmp_path):
    path = tmp_path/f'a.{ending}'
    pd.DataFrame(GOOD[kind]).to_parquet(path) if ending == 'parquet' else write(path, GOOD[kind])
    found = load_answers(str(path))
    assert found.kind == kind and len(found.table) == len(GOOD[kind])
    assert found.table.dialogues[0][0].endswith('\n\nAssistant: 4.')


BAD = dict(
    no_texts=([FOUR | dict(chosen=['a', 7])], None),
    two_chosen=([FOUR | dict(chosen=['a', 'b'])], ':1: there must be one chosen answer'),
    no_form=([TIED | dict(id='1')], 'must be tied:K or ref:K'),
    one_tied=([TIED | dict(chosen=['a'])], 'two right answers at least'),
    two_ref=([REF | dict(chosen=['a', 'b'])], 'one right answer'),
    twice=([FOUR, FOUR], 'stands twice'),
    styles=([STYLES | dict(rejected=['a'])], 'three styles each'),
    gold=([POOL | dict(gold=[1, 'x', 2])], 'gold must hold finite numbers'),
    gold_nan=([POOL | dict(gold=[1, float('nan'), 2])], 'gold must hold finite numbers'),
    one_answer=([POOL | dict(answers=['a'], gold=[1])], 'two texts at least'),
    name=([FOUR | dict(id={})], ':1: id {}: must be a name'),
    prompt=([FOUR | dict(prompt=7)], ':1: prompt of type int'),
    mixed=([FOUR, STYLES | dict(chosen=None)], ':2: no row of RewardBench 2'),
    a_list=([FOUR, []], ':2: no row of RewardBench 2'))


@pytest.mark.parametrize('rows,says', BAD.values(), ids=BAD)
def test_a_bad_row_is_named(rows, says, tmp_path):
    path = str(write(tmp_path/'bad.jsonl', rows))
    if says is None: assert load_answers(path) is None           # then the reader of pairs says what is wrong
    else:
        with pytest.raises(ConfigError, match=says.replace('{}', r'\{\}')): load_answers(path)


@pytest.mark.parametrize('text', ['', '{', '{}', '[]', '['*10**5])
def test_a_bad_array(text, tmp_path):
    (tmp_path/'bad.json').write_text(text)
    with pytest.raises(ConfigError, match='bad.json'): load_answers(str(tmp_path/'bad.json'))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'model'
    torch.manual_seed(0)
    model = readout_class('layerwise_attention')(Backbone(toy_transformer(cls=T5EncoderModel)), pooling_output_dim=8)
    model.save_pretrained(folder, toy_tokenizer(), max_tokens=40, temperature=1.)
    return folder


def run(saved, path, out, *more): return main([str(saved), str(path), '--out', str(out), '--device', 'cpu', *more])


@pytest.mark.parametrize('kind', GOOD)
def test_the_program(kind, saved, tmp_path, capsys):
    path, out = write(tmp_path/'bench.jsonl', GOOD[kind]), tmp_path/'out'
    assert run(saved, path, out) == 0
    assert sorted(f.name for f in out.iterdir()) == sorted(ANSWER_FILES)
    assert kind in capsys.readouterr().out
    report = json.loads((out/'evaluation.json').read_text())
    rows = [json.loads(line) for line in (out/'answers.jsonl').read_text().splitlines()]
    model = RewardModel.from_pretrained(saved, 'cpu')
    table, own = evaluate_answers(model, load_answers(str(path)))
    assert report['scores'] == json.loads(json.dumps(own['scores']))
    assert [row['rewards'] for row in rows] == [*table.rewards]
    assert run(saved, path, out) == 2 and run(saved, path, out, '--force') == 0
    assert run(saved, path, tmp_path/'new', '--chosen', 'chosen') == 2
    assert 'columns are named' in capsys.readouterr().err


def test_a_long_answer_costs_its_prompt(saved, tmp_path, capsys):
    path = write(tmp_path/'long.jsonl', [POOL, POOL | dict(answers=['4.', '5.', 'Four. '*60])])
    assert run(saved, path, tmp_path/'a') == 0
    assert '1 of 2 prompts are not scored' in capsys.readouterr().out
    assert run(saved, path, tmp_path/'b', '--too-long', 'truncate_left') == 0
    assert run(saved, path, tmp_path/'c', '--too-long', 'error') == 2
    assert run(saved, path, tmp_path/'d', '--subsets', 'none') == 2
    assert not (tmp_path/'c').exists()
