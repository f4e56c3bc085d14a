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
from rlhf_flant5.metrics.accuracy import (
    accuracy_interval, design_effect, pair_scores, pair_table, read_pair_table, score_rows, wilson,
    write_pair_table)
from rlhf_flant5.metrics.calibration import (
    calibration, fit_temperature, group_scores, length_correlation, length_groups, length_matched, table_scores)
from rlhf_flant5.metrics.statistics import (
    bootstrap_difference, compare_models, compare_seeds, holm, over_seeds, seeds_accuracy)
from conftest import examples


def table(margin, n_chosen=None, n_rejected=None):
    n = len(margin)
    lengths = lambda given: np.full(n, 9) if given is None else given
    return pair_table([*map(str, range(n))], ['s']*n, margin, np.zeros(n), lengths(n_chosen), lengths(n_rejected), np.ones(n, int))


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
    both, labels = np.concatenate([p, 1 - p]), np.repeat([1, 0], len(p))       # each pair from either side
    assert after['brier'] == pytest.approx(brier_score_loss(labels, both), abs=1e-12)
    assert after['log_loss'] == pytest.approx(log_loss(labels, both), abs=1e-12)


def test_temperature_is_a_logistic_regression_of_one_weight(margin):
    n = len(margin)
    e = 1/(n + 2)
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12).fit(np.tile(margin, 2)[:, None], np.repeat([1, 0], n), np.repeat([1 - e, e], n))
    assert fit_temperature(margin) == pytest.approx(1/fit.coef_[0, 0], rel=1e-5)


def test_mcnemar_is_statsmodels(g, margin):
    other = margin + g.normal(0, 2, len(margin))
    s = compare_models(table(margin), table(other))
    counts = pd.crosstab(margin > 0, other > 0).to_numpy()
    assert [[s['both_wrong'], s['only_b']], [s['only_a'], s['both_right']]] == counts.tolist()
    assert s['p'] == pytest.approx(mcnemar(counts, exact=True).pvalue, rel=1e-9)


def test_bootstrap_is_scipys(g, margin):
    d = (margin > 0).astype(float) - (margin + g.normal(0, 2, len(margin)) > 0)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=10_000, method='percentile', rng=1).confidence_interval
    assert bootstrap_difference(d) == pytest.approx((theirs.low, theirs.high), abs=1.5e-3)
    assert bootstrap_difference(margin) == bootstrap_difference(margin) != bootstrap_difference(margin, seed=1)


def test_bootstrap_over_seeds_is_the_plain_one(g):
    d = np.sign(g.normal(.1, 1, (4, 60)).round(0) + g.normal(0, .3, (4, 1)).round(0))
    means = [d[g.integers(0, 4, 4)][:, g.integers(0, 60, 60)].mean() for _ in range(10_000)]
    assert bootstrap_difference(d) == pytest.approx(np.quantile(means, [.025, .975]), abs=.02)


def test_holm_is_statsmodels(g):
    for p in (g.random(7)**3, [.5], [.01]*4): assert holm(p) == pytest.approx(multipletests(p, method='holm')[1])


def test_seeds_interval_is_scipys():
    v = [71.2, 70.4, 73.9, 72.]
    s = over_seeds(v)
    assert (s['low'], s['high']) == pytest.approx(stats.ttest_1samp(v, 0).confidence_interval(.95))


def test_length_matched_is_a_balanced_accuracy(g, margin):
    difference = g.integers(-30, 50, len(margin))
    t = table(margin, 100 + difference, np.full(len(margin), 100))
    keep = difference != 0
    # the model's favourite is the longer one or not; the truth is whether the chosen one is
    assert length_matched(t)['accuracy'] == pytest.approx(balanced_accuracy_score((difference > 0)[keep], np.where(margin > 0, difference > 0, difference < 0)[keep]))


def test_correlation_covers_as_a_bootstrap_does(g):
    d = g.integers(-50, 50, 300)
    m = d/40 + g.normal(0, 1, 300)
    s = length_correlation(table(m, 100 + d, np.full(300, 100)))
    theirs = stats.bootstrap((m, d), lambda a, b: stats.spearmanr(a, b).statistic, paired=True, vectorized=False, n_resamples=1000, rng=1).confidence_interval
    assert (s['low'], s['high']) == pytest.approx((theirs.low, theirs.high), abs=.03)


rewards = st.lists(st.floats(-2.**100, 2.**100, width=32), min_size=1, max_size=30)
small = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


@examples(60)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, max_value=1e307, min_value=-1e307), min_size=1, max_size=30))
def test_a_table_comes_back_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp('t')/'t.jsonl'
    t = table(values)
    write_pair_table(t, path)
    pd.testing.assert_frame_equal(read_pair_table(path), t, check_exact=True)


@examples(100)
@given(st.binary(max_size=300) | st.builds(lambda k, v: json.dumps(dict(id='a', subset='s', reward_chosen=1., reward_rejected=0., margin=1., n_chosen=3, n_rejected=3, n_shared=1) | {k: v}).encode(),
       st.sampled_from(['id', 'subset', 'reward_chosen', 'margin', 'n_chosen', 'n_shared']), st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just(10**400)))
def test_a_strange_table_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('t')/'t.jsonl'
    path.write_bytes(data)
    try: assert len(read_pair_table(path)) == 1
    except ConfigError as e: assert str(path) in str(e) and '\n' not in str(e)


@examples(100)
@given(rewards, st.sampled_from([1e-3, 2., 1024.]))
def test_temperature_follows_the_unit(values, scale):
    m = np.array(values)
    T = fit_temperature(m)
    assert 0 < T < math.inf
    assert fit_temperature(m*scale) == pytest.approx(T*scale if m.any() else 1, rel=1e-6)


@examples(100)
@given(small)
def test_temperature_never_worsens_the_loss_it_is_fitted_to(values):
    m = np.array(values, float)
    e = 1/(len(m) + 2)
    loss = lambda T: ((1 - e)*np.logaddexp(0, -m/T) + e*np.logaddexp(0, m/T)).mean()
    best = loss(fit_temperature(m))
    for T in (.1, .5, 1, 2, 30): assert best <= loss(T) + 1e-9


@examples(60)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=40))
def test_comparing_the_other_way_turns_the_sign(rows):
    a, b = (table(np.array(c, float)) for c in zip(*rows))
    ab, ba = compare_models(a, b, 200), compare_models(b[::-1], a, 200)
    assert ab['both_right'] + ab['only_a'] + ab['only_b'] + ab['both_wrong'] + ab['both_tied'] == len(rows)
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
    ends = pd.Series(lengths).groupby(groups, observed=True).agg(['min', 'max'])
    assert len(ends) == len(groups.categories) <= n
    assert (ends['max'].to_numpy()[:-1] < ends['min'].to_numpy()[1:]).all()


@examples(60)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=40))
def test_the_whole_report_is_strict_json(rows):
    m, c, r = (np.array(x) for x in zip(*rows))
    s = table_scores(table(m.astype(float), c, r))
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    assert sum(v['n'] for v in s['by_length'].values()) == len(rows)
    if matched := s['length_matched']:
        assert -1e-9 <= matched['low'] <= matched['accuracy'] <= matched['high'] <= 1 + 1e-9


@pytest.mark.parametrize('sizes', [[1]*50, [4]*30, [1, 7, 2, 30, 5, 3]])
def test_the_design_effect_is_statsmodels(g, sizes):
    """The mean is a regression on a constant; its cluster covariance over the plain one,
    each with its small-sample factor."""
    names = np.repeat([f'c{i}' for i in range(len(sizes))], sizes)
    n = len(names)
    x = (np.repeat(g.normal(0, 1, len(sizes)), sizes) + g.normal(0, 1, n) > -.5).astype(float)
    effect, n_conversations = design_effect(x - x.mean(), names)
    codes = pd.factorize(names)[0]
    fit = lambda **kw: sm.OLS(x, np.ones(n)).fit(**kw)
    together = fit(cov_type='cluster', cov_kwds=dict(groups=codes, use_correction=True)).bse[0]**2
    assert n_conversations == len(sizes)
    assert effect == pytest.approx(together/fit().bse[0]**2, rel=1e-9)


def test_a_difference_by_conversation_is_statsmodels(g):
    """Interval and p-value of two models over clustered pairs,
    by statsmodels with Student's distribution of G - 1 degrees of freedom."""
    names = np.repeat(np.arange(40), 5)
    ours, theirs = (table(np.repeat(g.normal(.3*k, 1, 40), 5) + g.normal(0, .5, 200)) for k in (2, 1))
    d = ((ours.margin > 0).astype(float) - (theirs.margin > 0)).to_numpy()
    fit = sm.OLS(d, np.ones(200)).fit(cov_type='cluster', cov_kwds=dict(groups=names), use_t=True)
    s = compare_seeds([ours], [theirs[::-1]], clusters=names)
    assert s['design_effect'] > 2
    assert s['n_conversations'] == 40
    assert (s['low'], s['high'], s['p']) == pytest.approx((*fit.conf_int()[0], fit.pvalues[0]), rel=1e-9)
    one = seeds_accuracy([ours], clusters=names)
    fit = sm.OLS((ours.margin > 0).to_numpy(float), np.ones(200)).fit(cov_type='cluster', cov_kwds=dict(groups=names), use_t=True)
    assert (one['low'], one['high']) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)


def test_pairs_of_their_own_are_independent(g, margin):
    "Each pair its own conversation: all intervals are those without."
    difference = g.integers(-30, 50, len(margin))
    t, other = table(margin, 100 + difference, np.full(len(margin), 100)), table(margin + g.normal(0, 2, len(margin)))
    own = [f'c{i}' for i in range(len(t))]
    kept = lambda s: {k: kept(v) if isinstance(v, dict) else v for k, v in s.items() if k not in ('design_effect', 'n_conversations')}
    same = lambda a, b: pd.json_normalize(kept(a)).T[0].map(float).to_dict() == pytest.approx(pd.json_normalize(b).T[0].map(float).to_dict(), rel=1e-9)
    assert same(table_scores(t, 2., clusters=own), table_scores(t, 2.))
    plain = compare_seeds([t, t], [other])
    clustered = compare_seeds([t, t], [other], clusters=own)
    assert clustered['design_effect'] == pytest.approx(1)
    assert clustered['n_conversations'] == len(t)
    assert all(clustered[k] == pytest.approx(plain[k]) for k in ('low', 'high', 'p', 'difference'))


def test_intervals_follow_their_rows(margin):
    "Conversations go with the rows of the first table, whatever the order of the others, and subsets take their own."
    names = np.repeat(np.arange(90), 10)
    t = table(np.repeat(margin[:90], 10)).assign(subset=['a', 'b']*450)
    assert compare_seeds([t], [t[::-1].assign(margin=0.)], clusters=names) == compare_seeds([t], [t.assign(margin=0.)], clusters=names)
    whole, half = pair_scores(t.reward_chosen, t.reward_rejected, t.subset, clusters=names), t[::2]
    assert whole['design_effect'] == pytest.approx(10*(90/89)*(899/900))
    assert whole['low'] < pair_scores(t.reward_chosen, t.reward_rejected, t.subset)['low']
    assert whole['subsets']['a'] == score_rows(half.reward_chosen, half.reward_rejected, names[::2])
    assert whole['subsets']['a']['n_conversations'] == 90
    assert group_scores(t[::-1], 'subset', clusters=names[::-1])['a']['low'] == pytest.approx(whole['subsets']['a']['low'])


@examples(100)
@given(st.lists(st.tuples(st.sampled_from([0., .5, 1.]), st.integers(0, 3)), min_size=1, max_size=40))
def test_an_interval_by_conversation_is_never_narrower(rows):
    points, names = map(np.array, zip(*rows))
    plain, own = accuracy_interval(points), accuracy_interval(points, names)
    assert 0 <= own['low'] <= plain['low'] + 1e-12
    assert plain['high'] - 1e-12 <= own['high'] <= 1
    assert own['design_effect'] >= 0
