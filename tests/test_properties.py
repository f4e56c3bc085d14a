"What holds for all inputs: splitting, drawing, batching, pooling, metrics, intervals and rates, each against a plain way of saying the same."
import math, types
from collections import Counter
from fractions import Fraction
import numpy as np
import pytest, torch
from datasets import Dataset
from hypothesis import assume, given, strategies as st
from conftest import examples
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.batches import PairBatches, cut_by_budget, deal, epoch_order
from rlhf_flant5.data.pairs import draw, first_human_turn, split_validation
from rlhf_flant5.training.schedule import learning_rate, n_warmup
from rlhf_flant5.training.step import is_due, n_due
from rlhf_flant5.metrics.accuracy import pair_scores, score_rows, wilson
from rlhf_flant5.metrics.calibration import calibration_error
from rlhf_flant5.models.pooling import AttentionPooling, GeGLU, RewardHead, WeightedPooling

seeds = st.integers(0, 2**32 - 1)


# splitting

def talks(questions): return Dataset.from_list([dict(id=str(i), chosen=f'\n\nHuman: {q}\n\nAssistant: {i}', rejected=f'\n\nHuman: {q}\n\nAssistant: no') for i, q in enumerate(questions)])


@examples(40)
@given(st.lists(st.text('ab \n\0é', max_size=3), min_size=1, max_size=30), st.floats(.01, .99), seeds, st.randoms(use_true_random=False))
def test_split(questions, fraction, seed, random):
    "Disjoint and complete, in the old order; a conversation goes to one side, the same whatever else is read and in whatever order."
    pairs = talks(questions); train, val = split_validation(pairs, fraction, seed)
    ids = [[int(i) for i in ds['id'][:]] for ds in (train, val)]
    assert sorted(ids[0] + ids[1]) == [*range(len(pairs))] and all(i == sorted(i) for i in ids)
    names = [{first_human_turn(t) for t in ds['chosen'][:]} for ds in (train, val)]
    assert not names[0] & names[1]
    some = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    other = [{int(i) for i in ds['id'][:]} for ds in split_validation(pairs.select(some), fraction, seed)]
    assert other == [{*i} & {*some} for i in ids]


@pytest.mark.parametrize('fraction', [.02, .1, .5])
def test_share_of_validation(fraction):
    "Of 20,000 conversations the share is as near as chance lets it be (five standard deviations), and a larger share takes all of a smaller one."
    pairs = talks(range(20_000)); val = split_validation(pairs, fraction, 192)[1]['id'][:]
    assert abs(len(val) - 20_000*fraction) < 5*math.sqrt(20_000*fraction*(1 - fraction))
    assert {*val} < {*split_validation(pairs, fraction + .1, 192)[1]['id'][:]}
    assert len({*val} & {*split_validation(pairs, fraction, 193)[1]['id'][:]}) < 2*fraction*len(val) + 50     # another seed: another draw


@examples(60)
@given(st.integers(1, 60), st.integers(0, 80), seeds)
def test_draw(n, k, seed):
    "So many different pairs, in their old order; all for 0 or too many; a smaller draw is part of a larger one."
    pairs = Dataset.from_dict(dict(i=range(n))); drawn = draw(pairs, k, seed)['i'][:]
    assert len(drawn) == (min(k, n) or n) and drawn == sorted({*drawn}) and {*drawn} <= {*range(n)}
    if k: assert {*drawn} <= {*draw(pairs, k + 1, seed)['i'][:]}


def test_draw_is_uniform():
    "Each of ten pairs in 3 of 10 of 600 draws, within five standard deviations."
    pairs = Dataset.from_dict(dict(i=range(10))); hits = Counter(i for s in range(600) for i in draw(pairs, 3, s)['i'][:])
    assert all(abs(hits[i] - 180) < 5*math.sqrt(600*.3*.7) for i in range(10))


# batching

@examples(300)
@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 5000), st.integers(1, 70))
def test_cut_by_budget(lengths, budget, most):
    "A partition, longest first; no micro-batch exceeds the budget unless it is one pair, none the number of pairs; none could take the next pair too."
    lengths = np.array(lengths, dtype=int); cuts = cut_by_budget(lengths, budget, most)
    assert sorted(i for c in cuts for i in c) == [*range(len(lengths))]
    ordered = [lengths[i] for c in cuts for i in c]; assert ordered == sorted(ordered, reverse=True)
    for c in cuts: assert 1 <= len(c) <= most and (len(c) == 1 or 2*len(c)*lengths[c].max() <= budget)
    for c in cuts[:-1]: assert len(c) == most or 2*(len(c) + 1)*lengths[c].max() > budget


@examples(100)
@given(st.integers(1, 300), seeds, st.integers(0, 10**6))
def test_epoch_order(n, seed, epoch):
    "A permutation, the same each time; of some length another one for another epoch or seed."
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == [*range(n)] and (order == epoch_order(n, seed, epoch)).all()
    if n > 20: assert (order != epoch_order(n, seed, epoch + 1)).any() and (order != epoch_order(n, seed + 1, epoch)).any()


@st.composite
def batches(draw):
    "Pairs of random lengths whose ids say which pair and side they are; the padding is 0."
    lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=25))
    ids = lambda side: [[2*i + side + 1]*n[side] for i, n in enumerate(lengths)]
    pairs = Dataset.from_dict(dict(id=[str(i) for i in range(len(lengths))], subset=['s']*len(lengths), chosen_ids=ids(0), rejected_ids=ids(1)))
    size, seed = draw(st.integers(1, 30)), draw(seeds)
    return lengths, lambda budget: PairBatches(pairs, 0, size, budget, seed=seed)


def check_micro_batch(m, lengths):
    "Chosen texts, then rejected ones of the same pairs; each text whole, in its row, then padding; the counts are right."
    k, ids, mask = len(m), m.inputs['input_ids'], m.inputs['attention_mask']
    assert ids.shape == mask.shape == (2*k, max(max(lengths[i]) for i in m.rows)) and m.n_positions == ids.numel() and m.n_tokens == mask.sum() == sum(sum(lengths[i]) for i in m.rows)
    for row, (i, side) in enumerate([(i, side) for side in (0, 1) for i in m.rows]):
        n = lengths[i][side]; assert (ids[row, :n] == 2*i + side + 1).all() and not ids[row, n:].any() and mask[row, :n].all() and not mask[row, n:].any()


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(1, 400), st.integers(0, 5), st.data())
def test_pair_batches(made, budget, other, epoch, data):
    "Every pair once an epoch; the steps are the same sets for every token budget, and from whatever step on they begin."
    lengths, make = made; b = make(budget); steps = [*b.steps(epoch)]
    for step in steps:
        for m in step.micro_batches: check_micro_batch(m, lengths); assert len(m) == 1 or m.n_positions <= budget
        assert step.n_tokens == sum(m.n_tokens for m in step.micro_batches)
    sets = lambda steps: [sorted(i for m in step.micro_batches for i in m.rows) for step in steps]
    assert sets(steps) == [sorted(step.rows) for step in steps]
    assert len(steps) == b.n_steps == math.ceil(len(lengths)/b.batch_size) and all(len(s) == b.batch_size for s in sets(steps)[:-1])
    assert sorted(sum(sets(steps), [])) == [*range(len(lengths))]
    assert sets(steps) == sets(make(other).steps(epoch))
    start = data.draw(st.integers(0, len(steps)))
    rest = [*b.steps(epoch, start=start)]
    assert [[m.rows.tolist() for m in s.micro_batches] for s in rest] == [[m.rows.tolist() for m in s.micro_batches] for s in steps[start:]]


@examples(60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_deal(sizes, n):
    "A partition, in order; no process has more than the least one and an item (so at most 4/3 of the best possible, Graham 1969)."
    hands = deal(np.array(sizes), n); loads = [sum(sizes[i] for i in h) for h in hands]
    assert sorted(i for h in hands for i in h) == [*range(len(sizes))] and all(list(h) == sorted(h) for h in hands) and len(hands) == n
    assert max(loads) - min(loads) <= max(sizes) and max(loads) <= 4/3*max(math.ceil(sum(sizes)/n), max(sizes), sum(sorted(sizes)[::-1][n - 1:n + 1]) if len(sizes) > n else 0) + 1


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(2, 6), st.integers(0, 3))
def test_batches_of_several_processes(made, budget, n, epoch):
    "The same steps and the same micro-batches of an evaluation, each pair with one process; as many passes with each."
    lengths, make = made
    def part(k): return make(budget).for_process(k, n)
    for whole, parts in zip(make(budget).steps(epoch), zip(*(part(k).steps(epoch) for k in range(n))), strict=True):
        assert all((p.rows == whole.rows).all() and p.n_tokens == whole.n_tokens for p in parts) and len({len(p.micro_batches) for p in parts}) == 1
        assert sorted(i for p in parts for m in p.micro_batches for i in m.rows) == sorted(whole.rows)
        for p in parts:
            for m in p.micro_batches: assert (p.rows[p.places(m)] == m.rows).all() and len(m.inputs['input_ids']) == 2*max(len(m), 1)
    rounds = [[m.rows.tolist() for m in part(k).once()] for k in range(n)]
    assert len({*map(len, rounds)}) == 1 and sorted(r for rs in rounds for r in rs if r) == sorted(m.rows.tolist() for m in make(budget).once())


@examples(60)
@given(batches(), st.integers(1, 400))
def test_once(made, budget):
    "Every pair once, longest first."
    lengths, make = made; ms = [*make(budget).once()]
    for m in ms: check_micro_batch(m, lengths)
    rows = [i for m in ms for i in m.rows]; longest = [max(lengths[i]) for i in rows]
    assert sorted(rows) == [*range(len(lengths))] and longest == sorted(longest, reverse=True)


# pooling

@st.composite
def sets(draw, d=4):
    "Vectors (N, L, D), a mask with a member in each row at least, and a pooling with a query."
    n, l, g = draw(st.integers(1, 4)), draw(st.integers(1, 7)), torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(n, l, d, generator=g, dtype=torch.float64)*draw(st.sampled_from([1e-3, 1., 1e3]))
    mask = torch.randint(0, 2, (n, l), generator=g); mask[torch.arange(n), torch.randint(0, l, (n,), generator=g)] = 1
    pool = AttentionPooling(d).double(); pool.query.data = torch.randn(d, generator=g, dtype=torch.float64)*draw(st.sampled_from([0., 1., 30.]))
    return x, mask, pool.requires_grad_(False)


def near(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@examples(150)
@given(sets(), st.integers(0, 5), st.sampled_from([0., 1., -1e6, 1e30]))
def test_pooling_ignores_padding_and_mates(made, more, filling):
    "The same for more padding, for whatever stands in it, alone or in company, and as over the members alone."
    x, mask, pool = made; out, (n, l, d) = pool(x, mask), x.shape
    padded, longer = torch.cat([x, torch.full((n, more, d), filling, dtype=x.dtype)], 1), torch.cat([mask, torch.zeros(n, more, dtype=int)], 1)
    padded[longer == 0] = filling
    near(pool(padded, longer), out)
    for i in range(n):
        near(pool(x[i:i + 1], mask[i:i + 1])[0], out[i]); near(pool(x[i:i + 1, mask[i].bool()])[0], out[i])


@examples(150)
@given(sets(), st.randoms(use_true_random=False))
def test_pooling_is_a_convex_combination(made, random):
    "Weights from 0 to 1 that sum to 1, none on padding; between the least and the greatest member; they follow a change of order, and the result does not; a query of zero is the mean."
    x, mask, pool = made; w, out, (n, l, d) = pool.weights(x, mask), pool(x, mask), x.shape
    near(w.sum(-1), torch.ones(n, dtype=x.dtype)); assert (w >= 0).all() and not w[mask == 0].any()
    low, high = (f(1).values for f in (x.masked_fill(mask[..., None] == 0, math.inf).min, x.masked_fill(mask[..., None] == 0, -math.inf).max))
    slack = 1e-9*x.abs().max(); assert (out >= low - slack).all() and (out <= high + slack).all()
    order = random.sample(range(l), l); near(pool.weights(x[:, order], mask[:, order]), w[:, order]); near(pool(x[:, order], mask[:, order]), out)
    if not pool.query.any(): near(out, (x*mask[..., None]).sum(1)/mask.sum(1, keepdim=True))


@examples(60)
@given(sets(), seeds)
def test_other_parts_by_loops(made, seed):
    "Weighted pooling, GeGLU and head against plain sums, one text at a time; no text changes another's."
    x, _, _ = made; n, l, d = x.shape; torch.manual_seed(seed)
    wp, glu, head = WeightedPooling(l).double(), GeGLU(d, 3).double(), RewardHead(3, [5]).double(); wp.weight.data.normal_()
    with torch.no_grad():
        out = wp(x); near(out, sum(w*x[:, k] for k, w in enumerate(wp.weight)))
        gelu = lambda z: z*(1 + torch.erf(z/2**.5))/2
        z = glu(out); near(z, gelu(out @ glu.gate.weight.T + glu.gate.bias)*(out @ glu.value.weight.T + glu.value.bias))
        r = head(z); assert r.shape == (n,)
        for i in range(n): near(head(glu(wp(x[i:i + 1])))[0], r[i])


# metrics

@examples(300)
@given(st.integers(1, 10**6), st.data())
def test_wilson(n, data):
    "Holds the share, stays in 0 to 1, its ends solve the equation that defines it; turns around with the count, and more pairs make it narrower."
    k = data.draw(st.integers(0, 2*n))/2; z = 1.959964; low, high = wilson(k, n); p = k/n
    assert 0 <= low <= p <= high <= 1
    for end in (low, high): assert math.isclose((p - end)**2, z*z*end*(1 - end)/n, rel_tol=1e-6, abs_tol=1e-12)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson(4*k, 4*n)[1] - wilson(4*k, 4*n)[0] < high - low


@pytest.mark.parametrize('k, n', [(-.5, 5), (5.5, 5), (math.nan, 5), (math.inf, 5), (1, 0), (0, -1)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match='must be from 0 to') as e: wilson(k, n)
    assert len(str(e.value).splitlines()) == 1


reward = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e4, 1e4, width=32))
rewards = st.lists(st.tuples(reward, reward, st.sampled_from(['a', 'b', 'harmless-base'])), min_size=1, max_size=40)


@examples(150)
@given(rewards)
def test_scores_by_counting(rows):
    "Against counting with exact fractions; swapping the sides turns accuracy and margin around; pairs may stand in any order; subsets add up."
    c, r, names = map(list, zip(*rows)); s = pair_scores(c, r, names)
    half = Fraction(sum(2*(a > b) + (a == b) for a, b in zip(c, r)), 2*len(c)); margin = sum(Fraction(a) - Fraction(b) for a, b in zip(c, r))/len(c)
    assert (s['n'], s['n_ties'], s['accuracy']) == (len(c), sum(a == b for a, b in zip(c, r)), float(half)) and s['margin'] == pytest.approx(float(margin), rel=1e-9, abs=1e-9)
    assert (s['low'], s['high']) == wilson(float(half*len(c)), len(c))
    softplus = lambda m: max(m, 0) + math.log1p(math.exp(-abs(m)))
    assert s['loss'] == pytest.approx(sum(softplus(b - a) for a, b in zip(c, r))/len(c), rel=1e-9)
    t = pair_scores(r, c, names); assert t['accuracy'] == pytest.approx(1 - s['accuracy'], abs=1e-12) and t['n_ties'] == s['n_ties'] and t['margin'] == pytest.approx(-s['margin'], abs=1e-9)
    assert t['loss'] - s['loss'] == pytest.approx(s['margin'], rel=1e-6, abs=1e-8)       # log-odds are the margin
    assert {*s['subsets']} == {*names} and sum(x['n'] for x in s['subsets'].values()) == s['n'] and sum(x['n_ties'] for x in s['subsets'].values()) == s['n_ties']
    for k in ('accuracy', 'loss', 'margin'): assert sum(x['n']*x[k] for x in s['subsets'].values())/s['n'] == pytest.approx(s[k], rel=1e-9, abs=1e-9)
    for name, x in s['subsets'].items(): assert x == score_rows(*(np.array([v for v, n in zip(side, names) if n == name]) for side in (c, r)))
    back = pair_scores(c[::-1], r[::-1], names[::-1]); assert all(back[k] == pytest.approx(s[k], rel=1e-9, abs=1e-9) for k in ('accuracy', 'loss', 'margin', 'n_ties'))


@examples(100)
@given(rewards, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 99), st.booleans())
def test_scores_refuse_what_is_no_number(rows, bad, i, first):
    "One line that says how many, wherever it stands, even against another infinity; as float32 too, as the model gives them."
    c, r, names = map(list, zip(*rows)); (c if first else r)[i % len(c)] = bad
    for make in (np.array, lambda x: np.array(x, dtype=np.float32)):
        for call in (lambda: pair_scores(make(c), make(r), names), lambda: score_rows(make(c), make(r)), lambda: calibration_error(make(c), make(r)), lambda: pair_scores(make(c), make(c), names) if first else pair_scores(make(r), make(r), names)):
            with pytest.raises(ConfigError, match=f'^1 of {len(c)} pairs have a reward that is NaN or infinite') as e: call()
            assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('c, r', [([[1.], [2.]], [1., 2.]), ([1., 2.], [[1., 2.]]), ([1.], [1., 2.]), (1., 2.), ([[1.]], [[2.]])])
def test_scores_refuse_other_shapes(c, r):
    for f in (score_rows, calibration_error):
        with pytest.raises(ValueError, match='one number for each pair'): f(np.array(c), np.array(r))


@examples(60)
@given(st.lists(st.tuples(reward, reward), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_by_counting(rows, n_bins):
    "Against bins by hand, where no claim lies on the edge of a bin; from 0 to 1."
    c, r = np.array(rows, dtype=np.float32).T; p = torch.sigmoid(torch.tensor(c - r)).double().numpy(); p = np.concatenate([p, 1 - p])
    assume((np.abs(p*n_bins - np.round(p*n_bins)) > 1e-4).all() or n_bins == 1)
    won, bins = np.repeat([1., 0.], len(c)), np.minimum((p*n_bins).astype(int), n_bins - 1)
    want = sum(abs(p[bins == b].mean() - won[bins == b].mean())*(bins == b).mean() for b in {*bins})
    assert calibration_error(c, r, n_bins) == pytest.approx(want, abs=1e-5) and 0 <= calibration_error(c, r, n_bins) <= 1 + 1e-6


# intervals and rates

@examples(200)
@given(st.integers(1, 30), st.sampled_from(['per-epoch', 'epochs', 'batches', 'never']), st.integers(-1, 8), st.integers(1, 40), st.integers(1, 6), st.integers(0, 50))
def test_intervals(val, kind, most, per_epoch, n_epochs, floor):
    "Never fewer than before and never two at once; at most as many as allowed; as many over whole epochs as the setting says, the last with the epoch's last batch; per epoch never closer than the floor."
    i = types.SimpleNamespace(interval_val=val, interval_type=kind, max_n_intervals=most, min_batches=floor); total = n_epochs*per_epoch
    due = [n for n in range(1, total + 1) if is_due(i, n, per_epoch)]
    if kind == 'per-epoch':
        assert all(b - a >= floor for a, b in zip([0, *due], due))
        if val*floor > per_epoch:         # the floor is what counts
            every = [n for n in range(1, total + 1) if n % floor == 0]
            assert due == (every if most < 0 else every[:most])
            return
    counts = [n_due(i, n, per_epoch) for n in range(total + 1)]
    assert counts[0] == 0 and {b - a for a, b in zip(counts, counts[1:])} <= {0, 1} and len(due) == counts[-1]
    whole = {'per-epoch': n_epochs*min(val, per_epoch), 'epochs': n_epochs//val, 'batches': total//val, 'never': 0}[kind]
    assert len(due) == (whole if most < 0 else min(whole, most))
    if most < 0:
        if kind == 'batches': assert due == [n for n in range(1, total + 1) if n % val == 0]
        if kind == 'epochs': assert due == [n for n in range(1, total + 1) if n % (val*per_epoch) == 0]
        if kind == 'per-epoch':
            assert {e*per_epoch for e in range(1, n_epochs + 1)} <= {*due} and [n - per_epoch for n in due if n > per_epoch] == due[:len(due) - min(val, per_epoch)]     # each epoch like the one before
            gaps = {b - a for a, b in zip([0, *due], due)}; assert max(gaps) - min(gaps) <= 1        # evenly


rates, kinds = st.floats(1e-8, 1), st.sampled_from(['epochs', 'steps', 'linear', 'cosine', 'constant'])


@examples(200)
@given(rates, rates, kinds, st.one_of(st.integers(0, 50), st.floats(0, .99)), st.integers(1, 200), st.integers(1, 30))
def test_learning_rate(init, final, schedule, warmup, n_total, per_epoch):
    "From the first rate to the last, which the last batch has, never beyond either; the warm-up rises evenly; per epoch by the same factor each time."
    opt = types.SimpleNamespace(init_lr=init, final_lr=final, schedule=schedule, warmup=warmup)
    got = [learning_rate(opt, n, n_total, per_epoch) for n in range(n_total)]
    warm = n_warmup(opt, n_total); peak = max(warm, 1) - 1
    low, high = min(init, final)*(1 - 1e-9), max(init, final)*(1 + 1e-9)
    assert all(x <= high for x in got) and all(x >= low for x in got[peak:])
    if schedule != 'epochs':
        assert got[:warm] == pytest.approx([init*(n + 1)/warm for n in range(min(warm, n_total))])
        if n_total > max(warm, 1): assert got[-1] == (init if schedule == 'constant' else final)      # to the bit
        assert all((b - a)*np.sign(final - init) >= -1e-9*high for a, b in zip(got[peak:], got[peak + 1:]))      # one way only
        return
    if peak < n_total and n_total > per_epoch: assert got[-1] == pytest.approx(final)
    ends = [got[n]/min(1, (n + 1)/max(warm, 1)) for n in range(0, n_total, per_epoch)]
    assert ends[0] == pytest.approx(init)
    for a, b, c in zip(ends, ends[1:], ends[2:]): assert a*c == pytest.approx(b*b)
    for n in range(n_total): assert got[n] == pytest.approx(ends[n//per_epoch]*min(1, (n + 1)/max(warm, 1)))
