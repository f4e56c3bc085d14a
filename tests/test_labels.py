'Labels beside pairs, from file to gradient: margins, weights, soft labels, ties, ranked answers.'
import json
import numpy as np
import pytest
from conftest import short
from rlhf_flant5 import train
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.reading import load_pairs, read_any
from rlhf_flant5.data.toy import toy_pairs
from rlhf_flant5.training.pipeline import read_data

small = dict(model='decoder_output', transformer='toy-random', device_name='cpu', precision='fp32', quiet=True,
             allow_untracked=True, max_tokens=128, epochs=1, train_batch_size=16, compile=False)


@pytest.fixture(scope='module')
def rows():
    "Toy pairs as rows without labels."
    table = toy_pairs(160).to_pandas()[['chosen', 'rejected']]
    return table.to_dict('records')


def labelled(rows, **columns):
    "The rows with a value of each column, in turn."
    return [row | {k: values[i % len(values)] for k, values in columns.items()} for i, row in enumerate(rows)]


def turned(row): return dict(chosen=row['rejected'], rejected=row['chosen'])


def splits(pairs, *settings):
    return read_data(load_config(['data.name=from-python', 'experiment=toy', *short, *settings]), pairs)


def scores(pairs, **settings):
    result = train(pairs, **small | settings)
    history = [json.loads(line) for line in (result.folder/'results'/'history.jsonl').read_text().splitlines()]
    return [line for line in history if 'train/loss' in line], result


BAD = dict(
    margin=(dict(margin=-1), 'margin is -1, must be at least 0 and finite'),
    weight=(dict(weight=0), 'weight is 0, must be above 0 and finite'),
    weight_text=(dict(weight='heavy'), "weight is 'heavy', must be above 0"),
    p=(dict(p=1.2), 'p is 1.2, must be from 0 to 1'),
    tie=(dict(tie=2), 'tie is 2, must be 0 or 1, or false or true'),
    margin_of_the_rejected=(dict(p=.2, margin=1), 'swap chosen and rejected'))


@pytest.mark.parametrize('label, message', BAD.values(), ids=BAD)
def test_a_bad_label_is_a_bad_row(rows, label, message, tmp_path):
    path = tmp_path/'mine.jsonl'
    odd = [*rows[:3], rows[3] | label, *rows[4:8]]
    path.write_text(''.join(json.dumps(row) + '\n' for row in odd))
    with pytest.raises(ConfigError) as e: read_any(str(path))
    assert f'{path}:4: ' in str(e.value) and message in str(e.value) and '\n' not in str(e.value)
    reading = read_any(str(path), bad_rows='drop')
    assert len(reading.pairs) == 7 and len(reading.bad) == 1


def test_columns_of_another_name_and_texts_of_a_table(rows, tmp_path):
    path = tmp_path/'mine.jsonl'
    path.write_text(''.join(json.dumps(row | dict(strength='2', even='true')) + '\n' for row in rows[:8]))
    reading = read_any(str(path), columns=dict(margin='strength', tie='even'))
    assert reading.pairs['margin'][:] == [2.]*8 and reading.pairs['tie'][:] == [1.]*8
    assert not reading.unused and any('labels    margin, tie' in line for line in reading.lines())


def test_the_answer_that_most_prefer_is_chosen(rows):
    least = [turned(row) | dict(p=.3) for row in rows[:60]]
    most = [row | dict(p=.7) for row in rows[:60]]
    a, b = (splits(pairs).splits['train'] for pairs in (least, most))
    assert a['chosen'][:] == b['chosen'][:] and np.allclose(a['p'][:], b['p'][:])


def test_ties_teach_and_are_not_judged(rows, tmp_path):
    data = splits(labelled(rows, tie=[0, 1]))
    assert sum(data.splits['train']['tie'][:]) > 20
    for split in ('validation', 'test'): assert sum(data.splits[split]['tie'][:]) == 0
    counted = sum(c['ties not judged'] for c in data.counts.values())
    assert counted > 10
    path = tmp_path/'mine.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in labelled(rows[:20], p=[.9, .5])))
    assert len(load_pairs(str(path))[0]) == 10


def test_labels_that_say_nothing_change_nothing(results, rows):
    plain, _ = scores(rows)
    silent, _ = scores(labelled(rows, margin=[0], weight=[1], p=[1], tie=[False]))
    for name in ('train/loss', 'train/gradient_norm'):
        assert [line[name] for line in plain] == [line[name] for line in silent]


def test_equal_weights_are_no_weights(results, rows):
    plain, three = (scores(pairs)[0] for pairs in (rows, labelled(rows, weight=[3])))
    assert np.allclose([line['train/gradient_norm'] for line in plain],
                       [line['train/gradient_norm'] for line in three], rtol=1e-4)


SOFT = dict(
    p=(dict(p=[.8, .6]), {}), margin=(dict(margin=[2, 0]), {}), weight=(dict(weight=[1, 5]), {}),
    tie=(dict(tie=[0, 0, 1]), {}), rao_kupper=(dict(tie=[0, 0, 1]), dict(ties='rao_kupper')),
    smoothing=({}, dict(label_smoothing=.2)), centering=({}, dict(centering=.1)))


@pytest.mark.parametrize('columns, settings', SOFT.values(), ids=SOFT)
def test_each_of_them_reaches_the_gradient(results, rows, columns, settings):
    plain, _ = scores(rows)
    other, result = scores(labelled(rows, **columns), **settings)
    assert other[0]['train/gradient_norm'] != plain[0]['train/gradient_norm']
    assert ('agreement' in result.scores['validation']) == ('p' in columns)
    assert (result.summary['tie_threshold'] > 0) == ('ties' in settings)


def test_labels_go_with_their_pairs_whatever_the_budget(results, rows):
    pairs = labelled(rows, weight=[1, 2, 3], margin=[0, 1], p=[1, .7, .9], tie=[0, 0, 0, 1])
    curves = [[line['train/gradient_norm'] for line in scores(pairs, token_budget=budget, ties='rao_kupper')[0]]
              for budget in (100_000, 300)]
    assert np.allclose(*curves, rtol=1e-3)


def test_a_threshold_needs_ties(results, rows):
    with pytest.raises(ConfigError, match='no training pair has 1 in the column tie'):
        train(rows, **small, ties='rao_kupper')


def test_a_run_goes_on_with_its_own_labels(results, rows):
    pairs = labelled(rows, weight=[1, 2])
    constant = dict(desc='own', index=0, schedule='constant')
    scores(pairs, **constant)
    again = labelled(rows, weight=[2, 1])
    with pytest.raises(ConfigError, match='the labels are not those that the run began with'):
        train(again, **small | constant | dict(resume=True, epochs=2))


def ranked(n, k=4):
    "Prompts with k answers each, from best to worst by the toy world's gold reward."
    pairs = toy_pairs(3*n)
    prompts = [p['chosen'].rpartition('\n\nAssistant: ') for p in pairs]
    answers = [words for _, _, words in prompts]
    return [dict(prompt=prompts[i][0].removeprefix('\n\nHuman: '), answers=answers[i:i + k]) for i in range(n)]


def test_ranked_answers_are_all_their_pairs(tmp_path):
    path = tmp_path/'lists.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in ranked(10)))
    reading = read_any(str(path))
    assert len(reading.pairs) == 60 and {*reading.pairs['list'][:]} == {f'lists:{i}' for i in range(1, 11)}
    assert np.allclose(reading.pairs['weight'][:], 1/6)
    assert reading.layout == 'ranked answers, as pairs of a prompt and responses, texts'


BAD_LISTS = dict(
    one=(dict(answers=['a']), 'must be a list of two at least'),
    both=(dict(ranks=[1, 2], scores=[2, 1]), 'one of them says the order'),
    ranks=(dict(ranks=[1, 'x']), "ranks is [1, 'x'], must be 2 finite numbers"),
    weight=(dict(weight='heavy'), "weight is 'heavy', must be above 0"),
    no_weight=(dict(weight=0), 'weight is 0, must be above 0'))


@pytest.mark.parametrize('change, message', BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_list_is_a_bad_row(change, message, tmp_path):
    path = tmp_path/'lists.jsonl'
    row = dict(prompt='What do bees make?', answers=['Honey.', 'Nests.'])
    path.write_text(json.dumps(row) + '\n' + json.dumps(row | change) + '\n')
    with pytest.raises(ConfigError) as e: read_any(str(path))
    assert f'{path}:2: ' in str(e.value) and message in str(e.value)


@pytest.mark.parametrize('model', ['decoder_output', 'answer_decoder', 'layerwise_attention'])
def test_a_list_is_read_once_and_counts_as_its_pairs_do(results, model):
    'The same pairs without their list: the same loss on the first step of all of them, from twice as many texts.'
    lists = ranked(24)
    as_pairs = [dict(prompt=row['prompt'], chosen=row['answers'][i], rejected=row['answers'][j], weight=1/6)
                for row in lists for i in range(4) for j in range(i + 1, 4)]
    (of_lists, *_), (of_pairs, *_) = (scores(pairs, model=model, train_batch_size=1000)[0] for pairs in (lists, as_pairs))
    assert np.isclose(of_lists['train/gradient_norm'], of_pairs['train/gradient_norm'], rtol=1e-4)
    assert np.isclose(of_lists['train/loss'], of_pairs['train/loss'], rtol=1e-5)


def test_ranked_answers_train_frozen(results):
    result = train(ranked(60), **small | dict(train_transformer=False))
    assert result.summary['cached_states'] and result.scores['test']['n'] > 0
