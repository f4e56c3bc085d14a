"""What holds for all inputs: splitting, drawing, batching, pooling, metrics, intervals and rates,
each against a plain way of saying the same."""
import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
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
randoms = st.randoms(use_true_random=False)


# splitting

def talks(questions):
    "A pair for each question, which may come several times."
    begin = '\n\nHuman: {}\n\nAssistant: {}'.format
    return Dataset.from_list([dict(id=str(i), chosen=begin(question, i), rejected=begin(question, 'no'))
                              for i, question in enumerate(questions)])


def ids_of(pairs): return [int(i) for i in pairs['id'][:]]

def questions_of(pairs): return {first_human_turn(text) for text in pairs['chosen'][:]}


@examples(40)
@given(st.lists(st.text('ab \n\0é', max_size=3), min_size=1, max_size=30), st.floats(.01, .99), seeds, randoms)
def test_split(questions, fraction, seed, random):
    """Disjoint and complete, in the old order; a conversation goes to one side,
    the same whatever else is read and in whatever order."""
    pairs = talks(questions)
    train, val = split_validation(pairs, fraction, seed)
    assert sorted(ids_of(train) + ids_of(val)) == [*range(len(pairs))]
    for side in (train, val): assert ids_of(side) == sorted(ids_of(side))
    assert not questions_of(train) & questions_of(val)
    some = random.sample(range(len(pairs)), random.randint(1, len(pairs)))
    sides_of_some = split_validation(pairs.select(some), fraction, seed)
    for side, of_some in zip((train, val), sides_of_some, strict=True):
        assert {*ids_of(of_some)} == {*ids_of(side)} & {*some}


@pytest.mark.parametrize('fraction', [.02, .1, .5])
def test_share_of_validation(fraction):
    """Of 20,000 conversations the share is as near as chance lets it be (five standard deviations),
    and a larger share takes all of a smaller one."""
    n = 20_000
    pairs = talks(range(n))
    val_ids = lambda fraction, seed: {*ids_of(split_validation(pairs, fraction, seed)[1])}
    val = val_ids(fraction, 192)
    assert abs(len(val) - n*fraction) < 5*math.sqrt(n*fraction*(1 - fraction))
    assert val < val_ids(fraction + .1, 192)
    assert len(val & val_ids(fraction, 193)) < 2*fraction*len(val) + 50     # another seed: another draw


@examples(60)
@given(st.integers(1, 60), st.integers(0, 80), seeds)
def test_draw(n, k, seed):
    "So many different pairs, in their old order; all for 0 or too many; a smaller draw is part of a larger one."
    pairs = Dataset.from_dict(dict(i=range(n)))
    drawn = draw(pairs, k, seed)['i'][:]
    assert len(drawn) == (min(k, n) or n)
    assert drawn == sorted({*drawn})
    assert {*drawn} <= {*range(n)}
    if k: assert {*drawn} <= {*draw(pairs, k + 1, seed)['i'][:]}


def test_draw_is_uniform():
    "Each of ten pairs in 3 of 10 of 600 draws, within five standard deviations."
    pairs = Dataset.from_dict(dict(i=range(10)))
    hits = Counter()
    for seed in range(600): hits.update(draw(pairs, 3, seed)['i'][:])
    for i in range(10): assert abs(hits[i] - 180) < 5*math.sqrt(600*.3*.7)


# batching

@examples(300)
@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 5000), st.integers(1, 70))
def test_cut_by_budget(lengths, budget, most):
    """A partition, longest first; no micro-batch exceeds the budget unless it is one pair, none the number of pairs;
    none could take the next pair too."""
    lengths = np.array(lengths, dtype=int)
    cuts = cut_by_budget(lengths, budget, most)
    order = [i for cut in cuts for i in cut]
    assert sorted(order) == [*range(len(lengths))]
    ordered = [lengths[i] for i in order]
    assert ordered == sorted(ordered, reverse=True)
    cost = lambda n, cut: 2*n*lengths[cut].max()         # padded tokens of n pairs as long as the longest
    for cut in cuts:
        assert 1 <= len(cut) <= most
        assert len(cut) == 1 or cost(len(cut), cut) <= budget
    for cut in cuts[:-1]: assert len(cut) == most or cost(len(cut) + 1, cut) > budget


@examples(100)
@given(st.integers(1, 300), seeds, st.integers(0, 10**6))
def test_epoch_order(n, seed, epoch):
    "A permutation, the same each time; of some length another one for another epoch or seed."
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == [*range(n)]
    assert (order == epoch_order(n, seed, epoch)).all()
    if n > 20:
        assert (order != epoch_order(n, seed, epoch + 1)).any()
        assert (order != epoch_order(n, seed + 1, epoch)).any()


@st.composite
def batches(draw):
    "Pairs of random lengths whose ids say which pair and side they are; the padding is 0."
    length = st.integers(1, 9)
    lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=25))
    n = len(lengths)
    ids = lambda side: [[2*i + side + 1]*both[side] for i, both in enumerate(lengths)]
    columns = dict(id=[str(i) for i in range(n)], subset=['s']*n, chosen_ids=ids(0), rejected_ids=ids(1))
    pairs = Dataset.from_dict(columns)
    size, seed = draw(st.integers(1, 30)), draw(seeds)
    return lengths, lambda budget: PairBatches(pairs, 0, size, budget, seed=seed)


def rows_of(micro_batches): return [m.rows.tolist() for m in micro_batches]

def pairs_of(micro_batches): return sorted(sum(rows_of(micro_batches), []))


def check_micro_batch(m, lengths):
    """Chosen texts, then rejected ones of the same pairs; each text whole, in its row, then padding;
    the counts are right."""
    ids, mask = m.inputs['input_ids'], m.inputs['attention_mask']
    longest = max(max(lengths[i]) for i in m.rows)
    assert ids.shape == mask.shape == (2*len(m), longest)
    assert m.n_positions == ids.numel()
    assert m.n_tokens == mask.sum() == sum(sum(lengths[i]) for i in m.rows)
    texts = [(i, side) for side in (0, 1) for i in m.rows]
    for text_ids, text_mask, (i, side) in zip(ids, mask, texts, strict=True):
        n = lengths[i][side]
        assert (text_ids[:n] == 2*i + side + 1).all() and not text_ids[n:].any()
        assert text_mask[:n].all() and not text_mask[n:].any()


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(0, 5))
def test_steps(made, budget, epoch):
    "Micro-batches within the budget, unless of one pair; all steps are full but the last."
    lengths, make = made
    batches = make(budget)
    steps = [*batches.steps(epoch)]
    assert len(steps) == batches.n_steps == math.ceil(len(lengths)/batches.batch_size)
    for step in steps:
        for m in step.micro_batches:
            check_micro_batch(m, lengths)
            assert len(m) == 1 or m.n_positions <= budget
        assert step.n_tokens == sum(m.n_tokens for m in step.micro_batches)
        assert pairs_of(step.micro_batches) == sorted(step.rows)
    for step in steps[:-1]: assert len(step.rows) == batches.batch_size


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(1, 400), st.integers(0, 5), st.data())
def test_pair_batches(made, budget, other, epoch, data):
    """Every pair once an epoch; the steps are the same sets for every token budget,
    and from whatever step on they begin."""
    lengths, make = made
    batches = make(budget)
    steps = [*batches.steps(epoch)]
    sets = lambda steps: [pairs_of(step.micro_batches) for step in steps]
    assert sorted(sum(sets(steps), [])) == [*range(len(lengths))]
    assert sets(steps) == sets(make(other).steps(epoch))
    start = data.draw(st.integers(0, len(steps)))
    rest = batches.steps(epoch, start=start)
    assert [rows_of(step.micro_batches) for step in rest] == [rows_of(step.micro_batches) for step in steps[start:]]


@examples(60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_deal(sizes, n):
    """A partition, in order; no process has more than the least one and an item
    (so at most 4/3 of the best possible, Graham 1969)."""
    dealt = deal(np.array(sizes), n)
    assert len(dealt) == n
    assert sorted(i for part in dealt for i in part) == [*range(len(sizes))]
    for part in dealt: assert list(part) == sorted(part)
    loads = [sum(sizes[i] for i in part) for part in dealt]
    assert max(loads) - min(loads) <= max(sizes)
    mean, largest = math.ceil(sum(sizes)/n), sorted(sizes, reverse=True)
    two_share = sum(largest[n - 1:n + 1]) if len(sizes) > n else 0     # two of the n + 1 largest meet in one process
    assert max(loads) <= 4/3*max(mean, largest[0], two_share) + 1


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(2, 6), st.integers(0, 3))
def test_steps_of_several_processes(made, budget, n, epoch):
    "The same steps, each pair with one process; as many passes with each."
    _, make = made
    parts = zip(*(make(budget).for_process(k, n).steps(epoch) for k in range(n)))
    for whole, parts_of_step in zip(make(budget).steps(epoch), parts, strict=True):
        for part in parts_of_step:
            assert (part.rows == whole.rows).all()
            assert part.n_tokens == whole.n_tokens
            for m in part.micro_batches:
                assert (part.rows[part.places(m)] == m.rows).all()
                assert len(m.inputs['input_ids']) == 2*max(len(m), 1)
        assert len({len(part.micro_batches) for part in parts_of_step}) == 1
        assert pairs_of(m for part in parts_of_step for m in part.micro_batches) == sorted(whole.rows)


@examples(60)
@given(batches(), st.integers(1, 400), st.integers(2, 6))
def test_evaluation_of_several_processes(made, budget, n):
    "The same micro-batches, each with one process; as many passes with each."
    _, make = made
    by_process = [rows_of(make(budget).for_process(k, n).once()) for k in range(n)]
    assert len({len(passes) for passes in by_process}) == 1
    not_empty = [rows for passes in by_process for rows in passes if rows]
    assert sorted(not_empty) == sorted(rows_of(make(budget).once()))


@examples(60)
@given(batches(), st.integers(1, 400))
def test_once(made, budget):
    "Every pair once, longest first."
    lengths, make = made
    micro_batches = [*make(budget).once()]
    for m in micro_batches: check_micro_batch(m, lengths)
    rows = [i for m in micro_batches for i in m.rows]
    assert sorted(rows) == [*range(len(lengths))]
    longest = [max(lengths[i]) for i in rows]
    assert longest == sorted(longest, reverse=True)


# pooling

@st.composite
def sets(draw, d=4):
    "Vectors (N, L, D), a mask with a member in each row at least, and a pooling with a query."
    n, l = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    g = torch.Generator().manual_seed(draw(seeds))
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x = normal(n, l, d)*draw(st.sampled_from([1e-3, 1., 1e3]))
    mask = torch.randint(0, 2, (n, l), generator=g)
    mask[torch.arange(n), torch.randint(0, l, (n,), generator=g)] = 1
    pool = AttentionPooling(d).double().requires_grad_(False)
    pool.query.data = normal(d)*draw(st.sampled_from([0., 1., 30.]))
    return x, mask, pool


def near(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@examples(150)
@given(sets(), st.integers(0, 5), st.sampled_from([0., 1., -1e6, 1e30]))
def test_pooling_ignores_padding_and_mates(made, more, filling):
    "The same for more padding, for whatever stands in it, alone or in company, and as over the members alone."
    x, mask, pool = made
    n, l, d = x.shape
    out = pool(x, mask)
    longer_mask = torch.cat([mask, torch.zeros(n, more, dtype=int)], 1)
    longer = torch.cat([x, torch.zeros(n, more, d, dtype=x.dtype)], 1)
    longer[longer_mask == 0] = filling
    near(pool(longer, longer_mask), out)
    for one_x, one_mask, one_out in zip(x, mask, out):
        near(pool(one_x[None], one_mask[None])[0], one_out)
        near(pool(one_x[None, one_mask.bool()])[0], one_out)


@examples(150)
@given(sets(), randoms)
def test_pooling_is_a_convex_combination(made, random):
    """Weights from 0 to 1 that sum to 1, none on padding; between the least and the greatest member;
    they follow a change of order, and the result does not; a query of zero is the mean."""
    x, mask, pool = made
    n, l, _ = x.shape
    weights, out = pool.weights(x, mask), pool(x, mask)
    near(weights.sum(-1), torch.ones(n, dtype=x.dtype))
    assert (weights >= 0).all() and not weights[mask == 0].any()
    padding, slack = mask[..., None] == 0, 1e-9*x.abs().max()
    assert (out >= x.masked_fill(padding, math.inf).amin(1) - slack).all()
    assert (out <= x.masked_fill(padding, -math.inf).amax(1) + slack).all()
    order = random.sample(range(l), l)
    near(pool.weights(x[:, order], mask[:, order]), weights[:, order])
    near(pool(x[:, order], mask[:, order]), out)
    if not pool.query.any(): near(out, (x*mask[..., None]).sum(1)/mask.sum(1, keepdim=True))


@examples(60)
@given(sets(), seeds)
def test_other_parts_by_loops(made, seed):
    "Weighted pooling, GeGLU and head against plain sums, one text at a time; no text changes another's."
    x, _, _ = made
    n, l, d = x.shape
    torch.manual_seed(seed)
    pool, glu, head = WeightedPooling(l).double(), GeGLU(d, 3).double(), RewardHead(3, [5]).double()
    pool.weight.data.normal_()
    gelu = lambda z: z*(1 + torch.erf(z/2**.5))/2
    with torch.no_grad():
        out = pool(x)
        near(out, sum(w*x[:, k] for k, w in enumerate(pool.weight)))
        z = glu(out)
        gate, value = (out @ layer.weight.T + layer.bias for layer in (glu.gate, glu.value))
        near(z, gelu(gate)*value)
        rewards = head(z)
        assert rewards.shape == (n,)
        for one_x, reward in zip(x, rewards): near(head(glu(pool(one_x[None])))[0], reward)


# metrics

@examples(300)
@given(st.integers(1, 10**6), st.data())
def test_wilson(n, data):
    """Holds the share, stays in 0 to 1, its ends solve the equation that defines it;
    turns around with the count, and more pairs make it narrower."""
    k = data.draw(st.integers(0, 2*n))/2
    low, high = wilson(k, n)
    z, p = 1.959964, k/n
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        variance = end*(1 - end)/n
        assert math.isclose((p - end)**2, z*z*variance, rel_tol=1e-6, abs_tol=1e-12)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    low_of_4, high_of_4 = wilson(4*k, 4*n)
    assert high_of_4 - low_of_4 < high - low


@pytest.mark.parametrize('k, n', [
    pytest.param(-.5, 5, id='below 0'), pytest.param(5.5, 5, id='above n'),
    pytest.param(math.nan, 5, id='NaN'), pytest.param(math.inf, 5, id='infinite'),
    pytest.param(1, 0, id='no pairs'), pytest.param(0, -1, id='fewer than none')])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match='must be from 0 to') as e: wilson(k, n)
    assert len(str(e.value).splitlines()) == 1


reward = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e4, 1e4, width=32))
subset = st.sampled_from(['a', 'b', 'harmless-base'])
scored_pairs = st.lists(st.tuples(reward, reward, subset), min_size=1, max_size=40)


@examples(150)
@given(scored_pairs)
def test_scores_by_counting(rows):
    "Against counting with exact fractions."
    chosen, rejected, names = map(list, zip(*rows))
    scores, n = pair_scores(chosen, rejected, names), len(rows)
    n_wins = sum(c > r for c, r, _ in rows)
    n_ties = sum(c == r for c, r, _ in rows)
    n_right = n_wins + Fraction(n_ties, 2)
    assert (scores['n'], scores['n_ties']) == (n, n_ties)
    assert scores['accuracy'] == float(n_right/n)
    assert (scores['low'], scores['high']) == wilson(float(n_right), n)
    margin = sum(Fraction(c) - Fraction(r) for c, r, _ in rows)/n
    assert scores['margin'] == pytest.approx(float(margin), rel=1e-9, abs=1e-9)
    softplus = lambda m: max(m, 0) + math.log1p(math.exp(-abs(m)))
    loss = sum(softplus(r - c) for c, r, _ in rows)/n
    assert scores['loss'] == pytest.approx(loss, rel=1e-9)


@examples(150)
@given(scored_pairs)
def test_scores_turned_and_reordered(rows):
    "Swapping the sides turns accuracy and margin around; pairs may stand in any order."
    chosen, rejected, names = map(list, zip(*rows))
    scores, turned = pair_scores(chosen, rejected, names), pair_scores(rejected, chosen, names)
    assert turned['n_ties'] == scores['n_ties']
    assert turned['accuracy'] == pytest.approx(1 - scores['accuracy'], abs=1e-12)
    assert turned['margin'] == pytest.approx(-scores['margin'], abs=1e-9)
    log_odds = turned['loss'] - scores['loss']
    assert log_odds == pytest.approx(scores['margin'], rel=1e-6, abs=1e-8)
    backwards = pair_scores(chosen[::-1], rejected[::-1], names[::-1])
    for key in ('accuracy', 'loss', 'margin', 'n_ties'):
        assert backwards[key] == pytest.approx(scores[key], rel=1e-9, abs=1e-9)


@examples(150)
@given(scored_pairs)
def test_scores_of_subsets(rows):
    "Each subset's are those of its pairs alone, and they add up."
    chosen, rejected, names = map(list, zip(*rows))
    scores = pair_scores(chosen, rejected, names)
    subsets = scores['subsets']
    assert {*subsets} == {*names}
    for name, of_subset in subsets.items():
        own = [row[:2] for row in rows if row[2] == name]
        assert of_subset == score_rows(*map(np.array, zip(*own)))
    for key in ('n', 'n_ties'): assert sum(s[key] for s in subsets.values()) == scores[key]
    for key in ('accuracy', 'loss', 'margin'):
        mean = sum(s['n']*s[key] for s in subsets.values())/scores['n']
        assert mean == pytest.approx(scores[key], rel=1e-9, abs=1e-9)


@examples(100)
@given(scored_pairs, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 99), st.booleans())
def test_scores_refuse_what_is_no_number(rows, bad, i, first):
    """One line that says how many, wherever it stands, even against another infinity;
    as float32 too, as the model gives them."""
    chosen, rejected, names = map(list, zip(*rows))
    side = chosen if first else rejected
    side[i % len(rows)] = bad
    for dtype in (np.float64, np.float32):
        c, r, both = (np.array(x, dtype=dtype) for x in (chosen, rejected, side))
        calls = [lambda: pair_scores(c, r, names), lambda: pair_scores(both, both, names),
                 lambda: score_rows(c, r), lambda: calibration_error(c, r)]
        for call in calls:
            with pytest.raises(ConfigError) as e: call()
            message = str(e.value)
            assert message.startswith(f'1 of {len(rows)} pairs have a reward that is NaN or infinite')
            assert len(message.splitlines()) == 1


@pytest.mark.parametrize('chosen, rejected', [
    pytest.param([[1.], [2.]], [1., 2.], id='a column'), pytest.param([1., 2.], [[1., 2.]], id='a row'),
    pytest.param([1.], [1., 2.], id='other lengths'), pytest.param(1., 2., id='numbers'),
    pytest.param([[1.]], [[2.]], id='matrices')])
@pytest.mark.parametrize('metric', [score_rows, calibration_error])
def test_scores_refuse_other_shapes(metric, chosen, rejected):
    with pytest.raises(ValueError, match='one number for each pair'): metric(np.array(chosen), np.array(rejected))


@examples(60)
@given(st.lists(st.tuples(reward, reward), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_by_counting(rows, n_bins):
    "Against bins by hand, where no claim lies on the edge of a bin; from 0 to 1."
    chosen, rejected = np.array(rows, dtype=np.float32).T
    p = torch.sigmoid(torch.tensor(chosen - rejected)).double().numpy()
    claims, won = np.concatenate([p, 1 - p]), np.repeat([1., 0.], len(rows))
    from_edge = np.abs(claims*n_bins - np.round(claims*n_bins))
    assume(n_bins == 1 or (from_edge > 1e-4).all())
    bins = np.minimum((claims*n_bins).astype(int), n_bins - 1)
    expected = 0
    for b in {*bins}:
        inside = bins == b
        expected += abs(claims[inside].mean() - won[inside].mean())*inside.mean()
    error = calibration_error(chosen, rejected, n_bins)
    assert error == pytest.approx(expected, abs=1e-5)
    assert 0 <= error <= 1 + 1e-6


# intervals and rates

def multiples(k, total): return [n for n in range(1, total + 1) if n % k == 0]

def steps_between(xs): return [b - a for a, b in zip(xs, xs[1:])]

interval_types = st.sampled_from(['per-epoch', 'epochs', 'batches', 'never'])
epochs_of_batches = st.tuples(st.integers(1, 40), st.integers(1, 6))


@examples(200)
@given(st.integers(1, 30), interval_types, st.integers(-1, 8), epochs_of_batches, st.integers(0, 50))
def test_intervals(val, kind, most, epochs, floor):
    """Never fewer than before and never two at once; at most as many as allowed; as many over whole epochs
    as the setting says, the last with the epoch's last batch; per epoch never closer than the floor."""
    per_epoch, n_epochs = epochs
    total = n_epochs*per_epoch
    interval = SimpleNamespace(interval_val=val, interval_type=kind, max_n_intervals=most, min_batches=floor)
    due = [n for n in range(1, total + 1) if is_due(interval, n, per_epoch)]
    if kind == 'per-epoch':
        assert all(gap >= floor for gap in steps_between([0, *due]))
        if val*floor > per_epoch:         # the floor is what counts
            every = multiples(floor, total)
            assert due == (every if most < 0 else every[:most])
            return
    counts = [n_due(interval, n, per_epoch) for n in range(total + 1)]
    assert counts[0] == 0 and counts[-1] == len(due)
    assert {*steps_between(counts)} <= {0, 1}
    n_whole = {'per-epoch': n_epochs*min(val, per_epoch), 'epochs': n_epochs//val, 'batches': total//val, 'never': 0}
    assert len(due) == (n_whole[kind] if most < 0 else min(n_whole[kind], most))
    if most < 0: check_all_due(kind, val, due, per_epoch, total)


def check_all_due(kind, val, due, per_epoch, total):
    "Where no number limits them: at the multiples, or per epoch evenly and in each epoch alike."
    if kind == 'batches': assert due == multiples(val, total)
    if kind == 'epochs': assert due == multiples(val*per_epoch, total)
    if kind == 'per-epoch':
        assert {*multiples(per_epoch, total)} <= {*due}
        one_epoch_earlier = [n - per_epoch for n in due if n > per_epoch]
        assert one_epoch_earlier == due[:len(due) - min(val, per_epoch)]
        gaps = steps_between([0, *due])
        assert max(gaps) - min(gaps) <= 1


rates = st.floats(1e-8, 1)
schedules = st.sampled_from(['steps', 'linear', 'cosine', 'constant'])      # by the batch; `epochs` below
warmups = st.one_of(st.integers(0, 50), st.floats(0, .99))


def all_rates(init, final, schedule, warmup, n_total, per_epoch):
    "The rate of each batch, and the number of batches that warm up."
    opt = SimpleNamespace(init_lr=init, final_lr=final, schedule=schedule, warmup=warmup)
    return [learning_rate(opt, n, n_total, per_epoch) for n in range(n_total)], n_warmup(opt, n_total)


def check_bounds(got, n_warm, init, final):
    low, high = min(init, final)*(1 - 1e-9), max(init, final)*(1 + 1e-9)
    peak = max(n_warm, 1) - 1
    assert all(rate <= high for rate in got)
    assert all(rate >= low for rate in got[peak:])


@examples(200)
@given(rates, rates, schedules, warmups, st.integers(1, 200), st.integers(1, 30))
def test_learning_rate(init, final, schedule, warmup, n_total, per_epoch):
    "From the first rate to the last, which the last batch has, never beyond either; the warm-up rises evenly."
    got, n_warm = all_rates(init, final, schedule, warmup, n_total, per_epoch)
    check_bounds(got, n_warm, init, final)
    rising = [init*(n + 1)/n_warm for n in range(min(n_warm, n_total))]
    assert got[:n_warm] == pytest.approx(rising)
    if n_total > max(n_warm, 1): assert got[-1] == (init if schedule == 'constant' else final)      # to the bit
    direction, slack = np.sign(final - init), 1e-9*max(init, final)*(1 + 1e-9)
    after_warmup = got[max(n_warm, 1) - 1:]
    for step in steps_between(after_warmup): assert step*direction >= -slack      # one way only


@examples(200)
@given(rates, rates, warmups, st.integers(1, 200), st.integers(1, 30))
def test_learning_rate_of_epochs(init, final, warmup, n_total, per_epoch):
    "From the first rate to the last by the same factor each epoch, within an epoch the same; the warm-up rises evenly."
    got, n_warm = all_rates(init, final, 'epochs', warmup, n_total, per_epoch)
    check_bounds(got, n_warm, init, final)
    if n_total > per_epoch and n_total >= max(n_warm, 1): assert got[-1] == pytest.approx(final)
    warm = [min(1, (n + 1)/max(n_warm, 1)) for n in range(n_total)]
    by_epoch = [got[n]/warm[n] for n in range(0, n_total, per_epoch)]
    assert by_epoch[0] == pytest.approx(init)
    for a, b, c in zip(by_epoch, by_epoch[1:], by_epoch[2:]): assert a*c == pytest.approx(b*b)
    for n in range(n_total): assert got[n] == pytest.approx(by_epoch[n//per_epoch]*warm[n])
