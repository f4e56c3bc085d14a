"The comparison over runs whose numbers are known, and the sweep as a program."
import gzip, json, math, os, subprocess, sys, time, warnings
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from conftest import program, root, saved_run
from matplotlib.text import Text
from scipy import stats
from statsmodels.stats.multitest import multipletests
from rlhf_flant5 import compare, sweep
from rlhf_flant5.comparison import figures, report as report_module
from rlhf_flant5.comparison.comparisons import comparisons, origin_notes
from rlhf_flant5.comparison.figures import calibration_numbers
from rlhf_flant5.comparison.runs import load_runs
from rlhf_flant5.comparison.scores import all_scores, pair_differences, votes
from rlhf_flant5.comparison.tables import cost_table
from rlhf_flant5.training.runs import hold

READOUTS = ['attention_pooled_encoder', 'decoder_output', 'layerwise_attention']
SEEDS = [1, 2, 3]


def compared(folder):
    "The comparisons of a folder's runs."
    return comparisons(load_runs(folder)[0])


def run_folder(results, i): return results/'Reward-Model-Training'/f'desc-x,index-{i}'


def report(results, name='comparison'): return (results/name/'report.md').read_text(encoding='utf-8')


def provenance(folder): return json.loads((folder/'data'/'provenance.json').read_text())


def change_summary(folder, **changes):
    path = folder/'results'/'summary.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def runs_of_rows(c): return [(r.name, len(r.runs)) for r in c.models]


def holm_of(differences):
    "The p-values of a table, corrected by statsmodels."
    return multipletests([d['p'] for d in differences], method='holm')[1]


def p_corrected(differences): return [d['p_corrected'] for d in differences]


@pytest.fixture
def three(results):
    "Three readouts with three seeds each: which of 40 pairs are right is drawn with 60, 60 and 85%."
    g, right = np.random.default_rng(1), {}
    for readout, p in zip(READOUTS, (.6, .6, .85)):
        for seed in SEEDS:
            drawn = g.random(40) < p
            saved_run(results, len(right), drawn, seed, readout=readout)
            right[readout, seed] = drawn
    return right


def welch(x, y):
    """Difference of two recipes' accuracies over the same pairs, seeds x pairs each, with its interval and p-value:
    the variance has a part of the pairs and one of either recipe's seeds; degrees of freedom after Satterthwaite."""
    d = x.mean(0) - y.mean(0)
    samples = [d, x.mean(1), y.mean(1)]
    parts = np.array([stats.sem(v)**2 for v in samples])
    freedom = np.array([len(v) - 1 for v in samples])
    df = parts.sum()**2/(parts**2/freedom).sum()
    error = math.sqrt(parts.sum())
    low, high = stats.t.interval(.95, df, d.mean(), error)
    p = 2*stats.t.sf(abs(d.mean())/error, df)
    return dict(difference=d.mean(), low=low, high=high, p=p)


def test_numbers_by_another_way(three, results):
    """Accuracies, differences, intervals and corrected p-values recomputed from the drawn outcomes with scipy and
    statsmodels."""
    c, = compared(results)
    scores = all_scores(c)
    points = {r: np.array([three[r, seed] for seed in SEEDS], float) for r in READOUTS}
    assert [s['name'] for s in scores[:3]] == [f'{r}, trained' for r in READOUTS]
    assert scores[0]['changes'] == []
    assert scores[1]['changes'] == ['readout']
    for s, x in zip(scores, points.values()):
        assert s['test']['accuracy'] == pytest.approx(x.mean())
        assert s['test']['std'] == pytest.approx(x.mean(1).std(ddof=1))
        assert s['seeds'] == SEEDS
        subset = s['subsets']['s']
        assert subset['accuracy'] == pytest.approx(x[:, ::2].mean())
        assert subset['n'] == 20
    expected = welch(points['layerwise_attention'], points['attention_pooled_encoder'])
    got = scores[2]['difference']
    assert {k: got[k] for k in expected} == pytest.approx(expected)
    others = [s['difference'] for s in scores if s['difference']]
    assert p_corrected(others) == pytest.approx(holm_of(others))
    assert votes(c)['decoder_output, trained'].to_numpy() == pytest.approx(points['decoder_output'].mean(0))


@pytest.fixture
def few(monkeypatch):
    "One figure in a report instead of seven, where figures are not what is tested."
    monkeypatch.setattr(report_module, 'FIGURES', dict(cost=report_module.FIGURES['cost']))


RATE = 'training: {optimizer: {init_lr: %s}}\n'


def test_what_is_one_row(results, few):
    "Other settings are another row and are named; runs of other pairs stand apart."
    for i, (seed, rate) in enumerate([(1, .1), (2, .1), (1, .2)]):
        saved_run(results, i, seed=seed, settings=RATE % rate)
    saved_run(results, 3, right=[True]*12, readout='layerwise_attention')
    one, other = compared(results)
    assert runs_of_rows(one) == [('init_lr=0.1', 2), ('init_lr=0.2', 1)]
    assert [r.name for r in other.models] == ['layerwise_attention, trained']
    assert one.key == {'all rows': 'decoder_output, trained', 'init_lr': 'training.optimizer.init_lr'}
    assert one.models[1].changes == ['training.optimizer.init_lr=0.2']
    assert compare.main([str(results)]) == 0
    assert 'comparison 2 of 2' in report(results, 'comparison-2')
    assert all_scores(one)[1]['difference']['recipes'] is False
    assert 'of one seed, which says nothing of recipes' in report(results, 'comparison-1')


def test_a_repeated_run_counts_once(results, capsys, few):
    "The one that ended last is taken, and that is said; the rest of the folder is compared as ever."
    good, bad = [True]*8 + [False]*2, [False]*8 + [True]*2
    saved_run(results, 0, right=bad, origin=dict(ended='2026-01-02T00:00:00+00:00'))
    saved_run(results, 1, right=good, origin=dict(ended='2026-01-03T00:00:00+00:00'))
    saved_run(results, 2, right=bad, origin=dict(ended='2026-01-01T00:00:00+00:00'))
    saved_run(results, 3, readout='layerwise_attention')
    assert compare.main([str(results)]) == 0
    printed = capsys.readouterr().out
    c, = compared(results)
    folders = {r.name: [run.folder.name for run in r.runs] for r in c.models}
    assert [*folders.items()] == [
        ('decoder_output, trained', ['desc-x,index-1']),
        ('layerwise_attention, trained', ['desc-x,index-3'])]
    assert len(c.models) == 2
    for text in (printed, report(results)):
        for i in (0, 2): assert f'desc-x,index-{i} is left out: desc-x,index-' in text
        assert 'has the same recipe and seed (1) and ended later' in text


def never_drawn(fig):
    "The labels of ticks outside their axis' view."
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high: yield from (tick.label1, tick.label2)


def cut_texts(fig):
    "The texts of a figure that leave its canvas."
    fig.draw_without_rendering()
    canvas, hidden = fig.bbox.padded(1), {*never_drawn(fig)}
    for text in fig.findobj(Text):
        if text in hidden or not text.get_visible() or not text.get_text().strip(): continue
        box = text.get_window_extent()
        if not box.width: continue
        if not (canvas.contains(*box.min) and canvas.contains(*box.max)): yield text.get_text()


@pytest.fixture
def cut(monkeypatch):
    "The texts that leave the canvas of any figure; a figure that warns fails."
    found, close = [], plt.close
    def look(fig):
        found.extend(cut_texts(fig))
        close(fig)
    monkeypatch.setattr(plt, 'close', look)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield found


@pytest.fixture
def readable(results, capsys, cut):
    """Compares the saved runs: short names, a key, no warning, and no text of any figure cut.
    Returns the rows' names and what was printed."""
    def check(missing=(), extensions=()):
        options = [o for e in extensions for o in ('--format', e)]
        assert compare.main([str(results), *options]) == 0
        out = capsys.readouterr()
        assert cut == []
        assert out.err == ''
        c, = compared(results)
        names = [r.name for r in c.models]
        assert len({*names}) == len(names)
        folder, expected = results/'comparison', {*report_module.FIGURES} - {*missing}
        assert {p.stem for p in folder.glob('*.png')} == expected
        for name in expected:
            for extension in ('csv', *extensions): assert (folder/f'{name}.{extension}').stat().st_size
        for name in missing: assert f'({name}) is left out' in report(results)
        return names, out.out
    return check


@pytest.fixture
def draw():
    "Which of 40 pairs a run has right, 70% of them, drawn anew for each run."
    g = np.random.default_rng(0)
    return lambda: g.random(40) < .7


FIVE_SETTINGS = """\
data: {max_tokens: %d}
training:
  precision: %s
  optimizer: {type: %s, init_lr: %s}
  loop: {train_batch_size: %d, intervals: {validation: {interval_val: 10}}}
"""
CHOICES = [
    (128, 'bf16', 'Adam', 1e-4, 32),
    (128, 'fp32', 'Adam', 3e-4, 32),
    (256, 'bf16', 'AdamW', 3e-4, 64),
    (256, 'bf16', 'Adam', 1e-5, 64),
    (512, 'fp32', 'AdamW', 1e-4, 96),
    (128, 'fp32', 'AdamW', .003, 32),
    (512, 'bf16', 'Adam', 3e-4, 96)]


def test_a_sweep_of_five_settings_is_readable(results, draw, readable):
    "Seven runs: the rows have numbers for names, and a key says what each number stands for."
    recipe = dict(readout='attention_pooled_encoder', data_name='Anthropic/hh-rlhf')
    for i, choice in enumerate(CHOICES):
        saved_run(results, i, draw(), settings=FIVE_SETTINGS % choice, **recipe)
    names, printed = readable()
    assert names == [f'r{k}' for k in range(1, 8)]
    lines = printed.splitlines()
    assert max(map(len, lines)) < 230
    key = [line for line in lines if line.startswith('r3: ')]
    assert any(line.count('=') == 5 for line in key)
    assert '- r7: ' in report(results)


def test_a_sweep_of_one_setting_is_readable(results, draw, readable):
    for i, rate in enumerate((1e-4, 3e-4)):
        saved_run(results, i, draw(), settings=RATE % rate, readout='attention_pooled_encoder')
    names, _ = readable(extensions=['svg', 'pdf'])
    assert names == ['init_lr=1e-4', 'init_lr=3e-4']


def test_long_names_are_readable(results, draw, readable):
    "Twelve runs with readouts, models and data of long names, with signs of other alphabets and of formulas."
    readouts = ['_' + 'my_own_readout_'*8, '$\\frac{a']
    data_name = '/home/somebody/数据/' + 'a-folder-of-pairs/'*5
    for i in range(12):
        transformer_name = f'/models/数/{"flan-"*9}${i//6}$'
        rate = 1e-4*(1 + i//6)
        saved_run(results, i, draw(), seed=i % 3, settings=RATE % rate, readout=readouts[i//3 % 2],
                  transformer_name=transformer_name, data_name=data_name, train_transformer=i % 2 == 0,
                  best_reachable_accuracy=.9)
    readable()


def test_one_run_is_readable(results, draw, readable):
    saved_run(results, 0, draw(), train_transformer=False)
    readable(missing=['cost', 'disagreement'])


def test_old_and_new_settings_in_one_table(results, few):
    "A setting that one run has and the other hasn't is named as such."
    saved_run(results, 0, settings='training: {optimizer: {init_lr: 0.1, n_warmup_batches: 0}}\n')
    saved_run(results, 1, settings='training: {optimizer: {init_lr: 0.1, schedule: epochs, warmup: 0}}\n')
    assert compare.main([str(results)]) == 0
    assert 'n_warmup_batches absent, schedule=epochs, warmup=0' in report(results)


@pytest.fixture
def two_folders(results):
    "Two runs in one folder of results, a third in another."
    a, b = results/'a', results/'b'
    for i, folder in enumerate((a, a, b)): saved_run(folder, i, readout=READOUTS[i])
    return a, b


def test_chosen_runs_reference_and_folder(two_folders, results, few):
    "Several folders, folders of single runs, a pattern, a reference, another place for the report."
    a, b = two_folders
    out, one = results/'new'/'report', run_folder(b, 2)
    def rows(*args):
        assert compare.main([*map(str, args), '--out', str(out)]) == 0
        scores = json.loads((out/'scores.json').read_text())
        return [s['name'].split(',')[0] for s in scores if not s['baseline']]
    pooled, decoder, layerwise = READOUTS
    assert rows(a, b) == [pooled, decoder, layerwise]
    assert rows(one, a/'Reward-Model-Training', '--reference', 'decoder_output') == [decoder, pooled, layerwise]
    assert rows(a, b, b, '--only', '*-[12]', '--reference', 'desc-x,index-2') == [layerwise, decoder]
    assert '--only' in (out/'report.md').read_text()
    assert rows(a, '--only', 'x') == [pooled, decoder]
    assert compare.main([str(one)]) == 0
    assert (b/'comparison'/'report.md').exists()
    assert not (a/'comparison').exists()


NO_SUCH_REFERENCE = ('--reference me: no rows of that name; '
                     'must be one of attention_pooled_encoder, trained; decoder_output, trained')


@pytest.mark.parametrize('args, message', [
    pytest.param(['--only', 'y*'], '--only y*: fits no run; there are 2, such as x, x', id='pattern'),
    pytest.param(['--reference', 'me'], NO_SUCH_REFERENCE, id='reference')])
def test_what_fits_no_run_is_refused_in_one_line(two_folders, capsys, few, args, message):
    a, _ = two_folders
    assert compare.main([str(a), *args]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert message in err


def test_every_pair_is_tested(three, results, few):
    """All pairs of readouts, each difference as `compare_seeds` gives it,
    the p-values corrected over the table by statsmodels."""
    c, = compared(results)
    found = pair_differences(c)
    readouts = [(d['a'].split(',')[0], d['b'].split(',')[0]) for d in found]
    assert readouts == [
        ('decoder_output', 'attention_pooled_encoder'),
        ('layerwise_attention', 'attention_pooled_encoder'),
        ('layerwise_attention', 'decoder_output')]
    mean = {r: np.mean([three[r, seed] for seed in SEEDS]) for r in READOUTS}
    expected = [mean[a] - mean[b] for a, b in readouts]
    assert [d['difference'] for d in found] == pytest.approx(expected)
    assert p_corrected(found) == pytest.approx(holm_of(found))
    assert compare.main([str(results)]) == 0
    assert '## Every pair of trained readouts' in report(results)
    assert '3 pairs of this table' in report(results)
    assert len(pd.read_csv(results/'comparison'/'pairs.csv')) == 3


REPORT = """\
from 4 runs of commit cccccccccccc
[1] changes:\x20
[3] spread over seeds: standard deviation
[4] p, corrected:\x20
) [5]
has 1 degree of freedom
shared [6]
seeds 1, 2; init_lr=3e-4; commit cccccccccccc
n = 10 test and 10 validation pairs
Not shown, since their speed is shared: layerwise_attention, frozen
10 test pairs are of 10 conversations
    training.optimizer.init_lr: 3e-4"""


def test_the_seeds_of_a_row_together(three, results, few):
    (c,) = compared(results)
    assert compare.main([str(results)]) == 0
    several = [row for row in c.models if len(row.runs) > 1]
    numbers = pd.read_csv(results/'comparison'/'ensembles.csv').set_index('name')
    assert [*numbers.index] == [row.name for row in several] and several
    for row in several:                                   # recomputed pair by pair
        tables = [(t.set_index('id').margin, r.summary['temperature']) for t, r in zip(row.tables['test'], row.runs)]
        points = [np.mean([m[i]/T for m, T in tables]) for i in tables[0][0].index]
        own = np.mean((np.sign(points) + 1)/2)
        alone = np.mean([((np.sign(m) + 1)/2).mean() for m, _ in tables])
        assert numbers.ensemble[row.name] == pytest.approx(own)
        assert numbers.gain[row.name] == pytest.approx(own - alone)
    assert '## The seeds of a row together' in report(results)


def test_report_says_where_it_comes_from(results, capsys, few):
    """Date, command, commits, what the columns mean, the interval of two seeds, captions,
    and rows without a speed of their own."""
    frozen = dict(readout='layerwise_attention', train_transformer=False)
    for seed in (1, 2):
        recipe = dict(seed=seed, settings=RATE % 3e-4)
        saved_run(results, seed, pairs_per_second=7., **recipe)
        saved_run(results, seed + 2, **recipe, **frozen)
    assert compare.main([str(results), '--reference', 'decoder_output']) == 0
    text = report(results)
    assert f'Made {time.strftime("%Y")}' in text
    assert f'Command: python -m rlhf_flant5.compare {results} --reference decoder_output' in text
    for words in REPORT.split('\n'): assert words in text, words
    cost = pd.read_csv(results/'comparison'/'cost.csv').set_index('row')
    no_speed = cost.pairs_per_second.isna().to_dict()
    assert no_speed == {'decoder_output, trained': False, 'layerwise_attention, frozen': True}


def test_ece_of_figure_and_table(three, results):
    "Both are means over all seeds."
    for folder in (results/'Reward-Model-Training').glob('*'):
        change_summary(folder, temperature=.5 + int(folder.name[-1]))
    c, = compared(results)
    scores = all_scores(c)
    axes = figures.plot_calibration(c, scores).axes
    legends = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in axes if ax.get_legend()]
    plt.close('all')
    assert legends == [
        [f'as trained: ECE {100*s["ece"]:.1f}', f'with temperature: ECE {100*s["ece_calibrated"]:.1f}']
        for s in scores[:3]]
    table = cost_table(c, scores).splitlines()[2:5]
    for line, legend in zip(table, legends, strict=True):
        as_trained, calibrated = (cell.strip() for cell in line.split('|')[5:7])
        assert legend == [f'as trained: ECE {as_trained}', f'with temperature: ECE {calibrated}']
    assert calibration_numbers(c).groupby(['row', 'what']).n.sum().eq(3*40).all()


def test_other_pairs_are_no_seeds_of_one_recipe(results):
    "Chosen and rejected exchanged in every pair, with equal ids and lengths; then other training pairs alone."
    saved_run(results, 0, seed=1)
    saved_run(results, 1, seed=2, turned=True)
    assert [[len(r.runs) for r in c.models] for c in compared(results)] == [[1], [1]]
    pairs = provenance(run_folder(results, 0))['pairs']
    saved_run(results, 2, seed=3, origin=dict(pairs=pairs | dict(train='0'*64)))
    saved_run(results, 3, seed=3)
    one, _ = compared(results)
    assert [len(r.runs) for r in one.models] == [1, 2]
    assert one.models[1].changes == [f'data.train_sha256={pairs["train"][:12]}']
    assert any('was trained on other pairs than row 1' in n for n in origin_notes(one))


def test_a_run_without_a_record_of_its_pairs(results):
    "An older run, or a linear model: its kept texts say which pairs they are."
    saved_run(results, 0, origin=dict(pairs={}))
    saved_run(results, 1, turned=True)
    assert len(compared(results)) == 2
    saved_run(results, 2, readout='tf-idf', baseline=True, origin=dict(pairs={}))
    first = compared(results)[0]
    assert [r.name for r in first.rows if r.runs] == ['decoder_output, trained', 'tf-idf']


DIFFERENT_MACHINES = [
    'decided differently, bf16 (2 runs), fp32 (1 run): rows of their own',
    'several commits: aaaaaaaaaaaa (2 runs), bbbbbbbbbbbb with changes (1 run)',
    'the seeds of "precision=bf16" come from several commits: '
    'aaaaaaaaaaaa, seeds 0; bbbbbbbbbbbb with changes, seeds 1']


def test_machines_that_differ_are_named(results, few):
    """`auto` that was bf16 on one machine and fp32 on another is two rows;
    seeds of several commits are one, and both are said."""
    machines = [('bf16', 'a', False), ('bf16', 'b', True), ('fp32', 'a', False)]
    for i, (precision, commit, dirty) in enumerate(machines):
        source = dict(commit=commit*40, dirty=dirty)
        folder = saved_run(results, i, seed=i, settings='training: {precision: auto}\n', origin=dict(source=source))
        if i == 0: change_summary(folder, precision=precision)   # killed before it wrote what was decided
        else: (folder/'data'/'decided.json').write_text(json.dumps(dict(precision=precision, compile=False)))
    assert compare.main([str(results)]) == 0
    c, = compared(results)
    assert runs_of_rows(c) == [('precision=bf16', 2), ('precision=fp32', 1)]
    text = report(results)
    for words in DIFFERENT_MACHINES: assert words in text, words


def test_a_run_that_lost_its_texts(results, few):
    "They are taken from another run of the same pairs."
    for i in (0, 1): saved_run(results, i, seed=i)
    for name in ('validation', 'test'):
        (run_folder(results, 0)/'data'/f'{name}_texts.jsonl.gz').unlink()
    assert compare.main([str(results)]) == 0


def share_questions(path, size):
    "Each `size` pairs in a row of a run's kept texts answer the same question."
    rows = [json.loads(line) for line in gzip.open(path, 'rt', encoding='utf-8')]
    with gzip.open(path, 'wt', encoding='utf-8') as f:
        for k, row in enumerate(rows):
            shared = {key: v.replace(f'Human: {k}?', f'Human: {k//size}?') for key, v in row.items()}
            f.write(json.dumps(shared) + '\n')


def interval_width(folder):
    "Of the accuracy of a folder's first row."
    test = all_scores(compared(folder)[0])[0]['test']
    return test['high'] - test['low']


def test_conversations_widen_the_intervals(results, few):
    """Ten answers to each of four questions, right or wrong together:
    the design effect is said and the interval is wider."""
    right = [True]*20 + [False]*20
    saved_run(results/'alone', 0, right)
    together = saved_run(results/'together', 0, right, origin=dict(pairs={}))
    for split in ('validation', 'test'): share_questions(together/'data'/f'{split}_texts.jsonl.gz', 10)
    assert interval_width(results/'together') > 2*interval_width(results/'alone')
    assert compare.main([str(results/'together')]) == 0
    assert '40 test pairs are of 4 conversations' in report(results/'together')


@pytest.mark.parametrize('name, text, message', [
    pytest.param('results/test_pairs.jsonl', '{}', 'test_pairs.jsonl:1', id='table'),
    pytest.param('data/test_texts.jsonl.gz', 'x', 'gzip', id='texts'),
    pytest.param('data/config.yaml', '{', 'config.yaml', id='settings'),
    pytest.param('results/history.jsonl', '[1]', 'history.jsonl', id='history')])
def test_damage(results, capsys, name, text, message):
    (saved_run(results, 0)/name).write_text(text)
    assert compare.main([str(results)]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert message in err


def sweep_args(desc, *settings, readout='decoder_output', seeds=1, transformer='trained'):
    "Options and settings of a sweep over one readout in the toy world."
    options = ['--readouts', readout, '--seeds', str(seeds), '--transformer', transformer, '--no-baselines']
    return [*options, 'experiment=toy', f'desc={desc}', 'sim_man.allow_untracked=true', *settings]


SMALL = ['data.n_train_data=64', 'data.n_test_data=64', 'training.loop.n_val_data=64']


def test_sweep_goes_on(results, capsys):
    "A sweep over one seed, then over two in the same process: what is done is left alone and counted once."
    settings = [*SMALL, 'training.loop.n_batches=2']
    def args(seeds): return ['-j', '2', *sweep_args('s', *settings, seeds=seeds, transformer='frozen')]
    done = program('rlhf_flant5.sweep', *args(seeds=1))
    assert done.returncode == 0, done.stderr
    assert '1 run, 0 of them done' in done.stdout
    done = program('rlhf_flant5.sweep', *args(seeds=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '2 runs, 1 of them done; 1 process to start' in done.stdout
    assert '[2/2]' in done.stdout
    assert sweep.main([*args(seeds=2), '--dry-run']) == 0
    assert '2 of 2 done' in capsys.readouterr().out


NO_GUARD = ['training.optimizer.max_grad_norm=null', 'training.optimizer.warmup=0']


def test_a_failing_run_does_not_stop_the_others(results):
    "A rate that ends in NaN: its run fails and says so, the other is done."
    rates = 'training.optimizer.init_lr=1e30,1e-4'
    done = program('rlhf_flant5.sweep', *sweep_args('f', rates, *NO_GUARD, *SMALL, 'training.loop.n_batches=3'))
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'failed with 1: failed: gradient norm is not finite' in done.stdout
    assert '[1/2]' in done.stdout


def test_sigterm_ends_the_runs_of_a_sweep(results):
    "Ended by a scheduler, a sweep takes its run along: the checkpoint is written, and nothing is left that works on."
    args = sweep_args('k', 'training.loop.n_epochs=99', readout='layerwise_attention')
    process = subprocess.Popen(
        [sys.executable, '-m', 'rlhf_flant5.sweep', *args], env=os.environ | {'PYTHONPATH': str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = results/'Reward-Model-Training'/'desc-k-trained-layerwise_attention-1,index-0'
    checkpoints, end = folder/'simulation'/'checkpoints', time.monotonic() + 120
    while time.monotonic() < end and not [*checkpoints.glob('batch-*')]: time.sleep(.2)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    assert 'the same command goes on' in err, out + err
    with hold(folder):                          # its lock is free
        assert provenance(folder)['status'] == 'interrupted'
