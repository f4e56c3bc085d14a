"""The statistics of nbs/40_metrics/41_accuracy.ipynb once more, by libraries that know nothing of it,
and what must hold for any rewards."""
import json, math
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
import statsmodels.api as sm
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, log_loss
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.metrics.accuracy import accuracy_interval, design_effect, pair_scores, pair_table
from rlhf_flant5.metrics.accuracy import read_pair_table, score_rows, wilson, write_pair_table
from rlhf_flant5.metrics.calibration import (
    calibration, fit_temperature, group_scores, length_correlation, length_groups, length_matched, table_scores)
from rlhf_flant5.metrics.statistics import bootstrap_difference, compare_models, compare_seeds
from rlhf_flant5.metrics.statistics import holm, over_seeds, seeds_accuracy
from conftest import examples


def table(margin, n_chosen=None, n_rejected=None):
    "A table of pairs of one subset, with these margins; 9 tokens a text unless lengths are given."
    n = len(margin)
    ids = [str(i) for i in range(n)]
    if n_chosen is None: n_chosen = np.full(n, 9)
    if n_rejected is None: n_rejected = np.full(n, 9)
    return pair_table(ids, ['s']*n, margin, np.zeros(n), n_chosen, n_rejected, n_shared=np.ones(n, int))


def longer_by(difference, margin):
    "A table in which each chosen text is `difference` tokens longer than the rejected one, of 100 tokens."
    return table(margin, 100 + difference, np.full(len(margin), 100))


def right(margin): return (margin > 0).astype(float)


def ends(interval): return interval['low'], interval['high']


@pytest.fixture(scope='module')
def g(): return np.random.default_rng(0)


@pytest.fixture(scope='module')
def margin(g): return g.normal(.5, 2, 900)


def test_wilson_is_statsmodels():
    for k, n in ((0, 5), (3, 7), (70, 100), (1000, 1000)):
        assert wilson(k, n) == pytest.approx(proportion_confint(k, n, method='wilson'), abs=1e-6)


def test_calibration_is_sklearns(margin):
    after = calibration(margin, 3.)['after']
    p = 1/(1 + np.exp(-margin/3))
    both = np.concatenate([p, 1 - p])       # each pair from either side
    labels = np.repeat([1, 0], len(p))
    assert after['brier'] == pytest.approx(brier_score_loss(labels, both), abs=1e-12)
    assert after['log_loss'] == pytest.approx(log_loss(labels, both), abs=1e-12)


def test_temperature_is_a_logistic_regression_of_one_weight(margin):
    n = len(margin)
    e = 1/(n + 2)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12)
    labels, weights = np.repeat([1, 0], n), np.repeat([1 - e, e], n)
    fit.fit(np.tile(margin, 2)[:, None], labels, sample_weight=weights)
    assert fit_temperature(margin) == pytest.approx(1/fit.coef_[0, 0], rel=1e-5)


def test_mcnemar_is_statsmodels(g, margin):
    other = margin + g.normal(0, 2, len(margin))
    s = compare_models(table(margin), table(other))
    counts = pd.crosstab(margin > 0, other > 0).to_numpy()
    a_wrong = [s['both_wrong'], s['only_b']]
    a_right = [s['only_a'], s['both_right']]
    assert [a_wrong, a_right] == counts.tolist()
    assert s['p'] == pytest.approx(mcnemar(counts, exact=True).pvalue, rel=1e-9)


def test_bootstrap_is_scipys(g, margin):
    other = margin + g.normal(0, 2, len(margin))
    d = right(margin) - right(other)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=10_000, method='percentile', rng=1)
    assert bootstrap_difference(d) == pytest.approx(tuple(theirs.confidence_interval), abs=1.5e-3)
    assert bootstrap_difference(margin) == bootstrap_difference(margin)
    assert bootstrap_difference(margin) != bootstrap_difference(margin, seed=1)


def test_bootstrap_over_seeds_is_the_plain_one(g):
    of_pairs = g.normal(.1, 1, (4, 60))
    of_seeds = g.normal(0, .3, (4, 1))
    d = np.sign(of_pairs.round(0) + of_seeds.round(0))
    def resampled_mean():
        seeds, pairs = g.integers(0, 4, 4), g.integers(0, 60, 60)
        return d[seeds][:, pairs].mean()
    means = [resampled_mean() for _ in range(10_000)]
    assert bootstrap_difference(d) == pytest.approx(np.quantile(means, [.025, .975]), abs=.02)


def test_holm_is_statsmodels(g):
    for p in (g.random(7)**3, [.5], [.01]*4):
        theirs = multipletests(p, method='holm')[1]
        assert holm(p) == pytest.approx(theirs)


def test_seeds_interval_is_scipys():
    v = [71.2, 70.4, 73.9, 72.]
    theirs = stats.ttest_1samp(v, 0).confidence_interval(.95)
    assert ends(over_seeds(v)) == pytest.approx(tuple(theirs))


def test_length_matched_is_a_balanced_accuracy(g, margin):
    difference = g.integers(-30, 50, len(margin))
    matched = length_matched(longer_by(difference, margin))
    # the model's favourite is the longer one or not; the truth is whether the chosen one is
    chosen_is_longer = difference > 0
    favourite_is_longer = np.where(margin > 0, difference > 0, difference < 0)
    unequal = difference != 0
    theirs = balanced_accuracy_score(chosen_is_longer[unequal], favourite_is_longer[unequal])
    assert matched['accuracy'] == pytest.approx(theirs)


def test_correlation_covers_as_a_bootstrap_does(g):
    d = g.integers(-50, 50, 300)
    m = d/40 + g.normal(0, 1, 300)
    ours = length_correlation(longer_by(d, m))
    def correlation(a, b): return stats.spearmanr(a, b).statistic
    theirs = stats.bootstrap((m, d), correlation, paired=True, vectorized=False, n_resamples=1000, rng=1)
    assert ends(ours) == pytest.approx(tuple(theirs.confidence_interval), abs=.03)


rewards = st.lists(st.floats(-2.**100, 2.**100, width=32), min_size=1, max_size=30)
small = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


finite = st.floats(-1e307, 1e307, allow_nan=False, allow_infinity=False)


@examples(60)
@given(st.lists(finite, min_size=1, max_size=30))
def test_a_table_comes_back_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp('t')/'t.jsonl'
    t = table(values)
    write_pair_table(t, path)
    pd.testing.assert_frame_equal(read_pair_table(path), t, check_exact=True)


ROW = dict(id='a', subset='s', reward_chosen=1., reward_rejected=0., margin=1., n_chosen=3, n_rejected=3, n_shared=1)
numbers = st.integers() | st.floats() | st.just(10**400)
odd_values = numbers | st.none() | st.booleans() | st.text() | st.lists(st.integers())
columns = st.sampled_from(['id', 'subset', 'reward_chosen', 'margin', 'n_chosen', 'n_shared'])
spoilt_rows = st.builds(lambda column, value: json.dumps(ROW | {column: value}).encode(), columns, odd_values)


@examples(100)
@given(st.binary(max_size=300) | spoilt_rows)
def test_a_strange_table_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('t')/'t.jsonl'
    path.write_bytes(data)
    try: assert len(read_pair_table(path)) == 1
    except ConfigError as e:
        assert str(path) in str(e)
        assert '\n' not in str(e)


@examples(100)
@given(rewards, st.sampled_from([1e-3, 2., 1024.]))
def test_temperature_follows_the_unit(values, scale):
    m = np.array(values)
    T = fit_temperature(m)
    assert 0 < T < math.inf
    expected = T*scale if m.any() else 1
    assert fit_temperature(m*scale) == pytest.approx(expected, rel=1e-6)


@examples(100)
@given(small)
def test_temperature_never_worsens_the_loss_it_is_fitted_to(values):
    m = np.array(values, float)
    e = 1/(len(m) + 2)
    def loss(T):
        as_labelled = np.logaddexp(0, -m/T)
        other_way = np.logaddexp(0, m/T)
        return ((1 - e)*as_labelled + e*other_way).mean()
    best = loss(fit_temperature(m))
    for T in (.1, .5, 1, 2, 30): assert best <= loss(T) + 1e-9


two_margins = st.tuples(st.integers(-2, 2), st.integers(-2, 2))


@examples(60)
@given(st.lists(two_margins, min_size=1, max_size=40))
def test_comparing_the_other_way_turns_the_sign(rows):
    a, b = (table(np.array(c, float)) for c in zip(*rows))
    ab = compare_models(a, b, 200)
    ba = compare_models(b[::-1], a, 200)
    kinds = ('both_right', 'only_a', 'only_b', 'both_wrong', 'both_tied')
    assert sum(ab[kind] for kind in kinds) == len(rows)
    assert ab['difference'] == pytest.approx(-ba['difference'])
    assert ab['p'] == ba['p']
    assert (ab['only_a'], ab['only_b']) == (ba['only_b'], ba['only_a'])
    assert ab['low'] - 1e-9 <= ab['high']
    assert -1 <= ab['low']
    assert ab['high'] <= 1


@examples(60)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 8))
def test_length_groups_part_the_lengths(lengths, n):
    groups = length_groups(lengths, n)
    lowest_highest = pd.Series(lengths).groupby(groups, observed=True).agg(['min', 'max']).to_numpy()
    assert len(lowest_highest) == len(groups.categories) <= n
    lowest, highest = lowest_highest.T
    assert (highest[:-1] < lowest[1:]).all()


margin_and_lengths = st.tuples(st.integers(-2, 2), st.integers(1, 5), st.integers(1, 5))


@examples(60)
@given(st.lists(margin_and_lengths, min_size=1, max_size=40))
def test_the_whole_report_is_strict_json(rows):
    m, c, r = (np.array(x) for x in zip(*rows))
    s = table_scores(table(m.astype(float), c, r))
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    assert sum(v['n'] for v in s['by_length'].values()) == len(rows)
    if matched := s['length_matched']:
        assert -1e-9 <= matched['low'] <= matched['accuracy'] <= matched['high'] <= 1 + 1e-9


def regression(points, **kw):
    "The mean of `points` as a regression on a constant."
    return sm.OLS(points, np.ones(len(points))).fit(**kw)


@pytest.mark.parametrize('sizes', [
    pytest.param([1]*50, id='single pairs'),
    pytest.param([4]*30, id='equal'),
    pytest.param([1, 7, 2, 30, 5, 3], id='unequal')])
def test_the_design_effect_is_statsmodels(g, sizes):
    """The mean is a regression on a constant; its cluster covariance over the plain one,
    each with its small-sample factor."""
    names = np.repeat([f'c{i}' for i in range(len(sizes))], sizes)
    n = len(names)
    of_conversations = np.repeat(g.normal(0, 1, len(sizes)), sizes)
    x = (of_conversations + g.normal(0, 1, n) > -.5).astype(float)
    effect, n_conversations = design_effect(x - x.mean(), names)
    groups = pd.factorize(names)[0]
    together = regression(x, cov_type='cluster', cov_kwds=dict(groups=groups, use_correction=True))
    alone = regression(x)
    assert n_conversations == len(sizes)
    assert effect == pytest.approx(together.bse[0]**2/alone.bse[0]**2, rel=1e-9)


def test_a_difference_by_conversation_is_statsmodels(g):
    """Interval and p-value of two models over clustered pairs,
    by statsmodels with Student's distribution of G - 1 degrees of freedom."""
    names = np.repeat(np.arange(40), 5)
    def clustered(mean):
        of_conversations, of_pairs = g.normal(mean, 1, 40), g.normal(0, .5, 200)
        return table(np.repeat(of_conversations, 5) + of_pairs)
    a, b = clustered(.6), clustered(.3)
    def theirs(points):
        return regression(points.to_numpy(), cov_type='cluster', cov_kwds=dict(groups=names), use_t=True)

    difference = compare_seeds([a], [b[::-1]], clusters=names)
    assert difference['design_effect'] > 2
    assert difference['n_conversations'] == 40
    fit = theirs(right(a.margin) - right(b.margin))
    assert ends(difference) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)
    assert difference['p'] == pytest.approx(fit.pvalues[0], rel=1e-9)

    accuracy = seeds_accuracy([a], clusters=names)
    fit = theirs(right(a.margin))
    assert ends(accuracy) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)


def flat(report):
    "The numbers of a nested report, each under its path."
    return pd.json_normalize(report).T[0].map(float).to_dict()


def test_pairs_of_their_own_are_independent(g, margin):
    "Each pair its own conversation: all intervals are those without."
    difference = g.integers(-30, 50, len(margin))
    t = longer_by(difference, margin)
    other = table(margin + g.normal(0, 2, len(margin)))
    own = [f'c{i}' for i in range(len(t))]
    scores = flat(table_scores(t, 2., clusters=own))
    of_conversations = [k for k in scores if k.endswith(('design_effect', 'n_conversations'))]
    for k in of_conversations: del scores[k]
    assert scores == pytest.approx(flat(table_scores(t, 2.)), rel=1e-9)
    plain = compare_seeds([t, t], [other])
    clustered = compare_seeds([t, t], [other], clusters=own)
    assert clustered['design_effect'] == pytest.approx(1)
    assert clustered['n_conversations'] == len(t)
    for k in ('low', 'high', 'p', 'difference'): assert clustered[k] == pytest.approx(plain[k])


def test_intervals_follow_their_rows(margin):
    "Conversations go with the rows of the first table, whatever the order of the others, and subsets take their own."
    names = np.repeat(np.arange(90), 10)
    t = table(np.repeat(margin[:90], 10)).assign(subset=['a', 'b']*450)
    tied = t.assign(margin=0.)
    in_order = compare_seeds([t], [tied], clusters=names)
    assert compare_seeds([t], [tied[::-1]], clusters=names) == in_order

    whole = pair_scores(t.reward_chosen, t.reward_rejected, t.subset, clusters=names)
    unclustered = pair_scores(t.reward_chosen, t.reward_rejected, t.subset)
    assert whole['design_effect'] == pytest.approx(10*(90/89)*(899/900))
    assert whole['low'] < unclustered['low']

    half, of_half = t[::2], whole['subsets']['a']
    assert of_half == score_rows(half.reward_chosen, half.reward_rejected, names[::2])
    assert of_half['n_conversations'] == 90
    turned = group_scores(t[::-1], 'subset', clusters=names[::-1])
    assert turned['a']['low'] == pytest.approx(of_half['low'])


point_and_conversation = st.tuples(st.sampled_from([0., .5, 1.]), st.integers(0, 3))


@examples(100)
@given(st.lists(point_and_conversation, min_size=1, max_size=40))
def test_an_interval_by_conversation_is_never_narrower(rows):
    points, names = map(np.array, zip(*rows))
    plain = accuracy_interval(points)
    own = accuracy_interval(points, names)
    assert 0 <= own['low'] <= plain['low'] + 1e-12
    assert plain['high'] - 1e-12 <= own['high'] <= 1
    assert own['design_effect'] >= 0
