"The comparison over runs whose numbers are known, and the sweep as a program."
import gzip, json, math, os, subprocess, sys, time, warnings
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest
from conftest import program, root, saved_run
from scipy import stats
from statsmodels.stats.multitest import multipletests
from rlhf_flant5 import compare, sweep
from rlhf_flant5.comparison import figures, report as report_module
from matplotlib.text import Text
from rlhf_flant5.comparison.comparisons import comparisons, origin_notes
from rlhf_flant5.comparison.figures import calibration_numbers
from rlhf_flant5.comparison.runs import load_runs
from rlhf_flant5.comparison.scores import all_scores, pair_differences, votes
from rlhf_flant5.comparison.tables import cost_table
from rlhf_flant5.training.runs import hold


@pytest.fixture
def three(results):
    "Three readouts with three seeds each: which of 40 pairs are right is drawn with 60, 60 and 85%."
    g, k, right = np.random.default_rng(1), 0, {}
    for readout, p in (('attention_pooled_encoder', .6), ('decoder_output', .6), ('layerwise_attention', .85)):
        for seed in (1, 2, 3):
            right[readout, seed] = g.random(40) < p
            saved_run(results, k, right[readout, seed], seed, readout=readout)
            k += 1
    return right


def test_numbers_by_another_way(three, results):
    """Accuracies, differences, intervals and corrected p-values recomputed from the drawn outcomes with scipy and
    statsmodels."""
    c, = comparisons(load_runs(results)[0])
    scores = all_scores(c)
    points = {r: np.array([three[r, s] for s in (1, 2, 3)], float) for r in ('attention_pooled_encoder', 'decoder_output', 'layerwise_attention')}
    assert [s['name'] for s in scores[:3]] == [f'{r}, trained' for r in points]
    assert scores[0]['changes'] == []
    assert scores[1]['changes'] == ['readout']
    for s, x in zip(scores, points.values()):
        assert s['test']['accuracy'] == pytest.approx(x.mean())
        assert s['test']['std'] == pytest.approx(x.mean(1).std(ddof=1))
        assert s['seeds'] == [1, 2, 3]
        assert s['subsets']['s']['accuracy'] == pytest.approx(x[:, ::2].mean())
        assert s['subsets']['s']['n'] == 20
    x, y = points['layerwise_attention'], points['attention_pooled_encoder']
    d = x.mean(0) - y.mean(0)
    parts = np.array([stats.sem(d)**2, stats.sem(x.mean(1))**2, stats.sem(y.mean(1))**2])
    df = parts.sum()**2/(parts**2/np.array([39, 2, 2])).sum()
    got = scores[2]['difference']
    low, high = stats.t.interval(.95, df, d.mean(), math.sqrt(parts.sum()))
    assert (got['difference'], got['low'], got['high']) == pytest.approx((d.mean(), low, high))
    assert got['p'] == pytest.approx(2*stats.t.sf(abs(d.mean())/math.sqrt(parts.sum()), df))
    others = [s['difference'] for s in scores if s['difference']]
    assert [d['p_corrected'] for d in others] == pytest.approx(multipletests([d['p'] for d in others], method='holm')[1])
    assert votes(c)['decoder_output, trained'].to_numpy() == pytest.approx(points['decoder_output'].mean(0))


@pytest.fixture
def few(monkeypatch):
    "One figure in a report instead of seven, where figures are not what is tested."
    monkeypatch.setattr(report_module, 'FIGURES', dict(cost=report_module.FIGURES['cost']))


RATE = 'training: {optimizer: {init_lr: %s}}\n'


def change_summary(folder, **changes):
    path = folder/'results'/'summary.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def report(results, name='comparison'): return (results/name/'report.md').read_text(encoding='utf-8')


def test_what_is_one_row(results, few):
    "Other settings are another row and are named; runs of other pairs stand apart."
    for i, (seed, rate) in enumerate(((1, .1), (2, .1), (1, .2))):
        saved_run(results, i, seed=seed, settings=RATE % rate)
    saved_run(results, 3, right=[True]*12, readout='layerwise_attention')
    one, other = comparisons(load_runs(results)[0])
    assert [(r.name, len(r.runs)) for r in one.models] == [('init_lr=0.1', 2), ('init_lr=0.2', 1)]
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
    printed, (c,) = capsys.readouterr().out, comparisons(load_runs(results)[0])
    assert [(r.name, [x.folder.name for x in r.runs]) for r in c.models] == [('decoder_output, trained', ['desc-x,index-1']), ('layerwise_attention, trained', ['desc-x,index-3'])]
    for text in (printed, report(results)):
        assert all(f'desc-x,index-{i} is left out: desc-x,index-' in text for i in (0, 2))
        assert 'has the same recipe and seed (1) and ended later' in text


@pytest.fixture
def strict(monkeypatch):
    "Figures that warn, or in which a text leaves the canvas, fail."
    cut, close = [], plt.close
    def look(fig):
        fig.draw_without_rendering()
        canvas, axes = fig.bbox.padded(1), [axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
        inside = lambda axis, tick: min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        outside = {t for axis in axes for tick in axis.get_major_ticks() if not inside(axis, tick) for t in (tick.label1, tick.label2)}      # never drawn
        for t in fig.findobj(Text):
            if t not in outside and t.get_visible() and t.get_text().strip():
                box = t.get_window_extent()
                if box.width and not (canvas.contains(*box.min) and canvas.contains(*box.max)): cut.append(t.get_text())
        close(fig)
    monkeypatch.setattr(plt, 'close', look)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield cut


SWEEP = 'data: {max_tokens: %d}\ntraining:\n  precision: %s\n  optimizer: {type: %s, init_lr: %s}\n  loop: {train_batch_size: %d, intervals: {validation: {interval_val: 10}}}\n'
CHOICES = [(128, 'bf16', 'Adam', 1e-4, 32), (128, 'fp32', 'Adam', 3e-4, 32), (256, 'bf16', 'AdamW', 3e-4, 64), (256, 'bf16', 'Adam', 1e-5, 64),
           (512, 'fp32', 'AdamW', 1e-4, 96), (128, 'fp32', 'AdamW', .003, 32), (512, 'bf16', 'Adam', 3e-4, 96)]


@pytest.mark.parametrize('kind', ['five settings', 'one setting', 'long names', 'one run'])
def test_sweeps_of_settings_are_readable(results, capsys, strict, kind):
    "Seven runs of five differing settings, and others: short names, a key, no warning, and no text of any figure cut."
    g = np.random.default_rng(0)
    draw = lambda: g.random(40) < .7
    if kind == 'five settings':
        for i, choice in enumerate(CHOICES):
            saved_run(results, i, draw(), settings=SWEEP % choice, readout='attention_pooled_encoder', data_name='Anthropic/hh-rlhf')
    if kind == 'one setting':
        for i, rate in enumerate((1e-4, 3e-4)):
            saved_run(results, i, draw(), settings=RATE % rate, readout='attention_pooled_encoder')
    if kind == 'long names':
        for i in range(12):
            saved_run(results, i, draw(), seed=i % 3, settings=RATE % (1e-4*(1 + i//6)), readout=('_' + 'my_own_readout_'*8, '$\\frac{a')[i//3 % 2], transformer_name=f'/models/数/{"flan-"*9}${i//6}$',
                      data_name='/home/somebody/数据/' + 'a-folder-of-pairs/'*5, train_transformer=i % 2 == 0, best_reachable_accuracy=.9)
    if kind == 'one run': saved_run(results, 0, draw(), train_transformer=False)
    others = ['--format', 'svg', '--format', 'pdf'] if kind == 'one setting' else []
    assert compare.main([str(results), *others]) == 0
    out, (c,) = capsys.readouterr(), comparisons(load_runs(results)[0])
    assert strict == [] and out.err == ''
    names = [r.name for r in c.models]
    assert len({*names}) == len(names)
    if kind == 'one setting': assert names == ['init_lr=1e-4', 'init_lr=3e-4']
    if kind == 'five settings':
        assert names == [f'r{k}' for k in range(1, 8)]
        assert max(map(len, out.out.splitlines())) < 230
        assert any(line.startswith('r3: ') and line.count('=') == 5 for line in out.out.splitlines())
        assert '- r7: ' in report(results)
    drawn = {p.stem for p in (results/'comparison').glob('*.png')}
    assert all((results/'comparison'/f'{n}.{e}').stat().st_size for n in drawn for e in ('csv', *others[1::2]))
    assert drawn == {*report_module.FIGURES} - ({'cost', 'disagreement'} if kind == 'one run' else set())
    for n in {*report_module.FIGURES} - drawn: assert f'({n}) is left out' in report(results)


def test_old_and_new_settings_in_one_table(results, few):
    "A setting that one run has and the other hasn't is named as such."
    saved_run(results, 0, settings='training: {optimizer: {init_lr: 0.1, n_warmup_batches: 0}}\n')
    saved_run(results, 1, settings='training: {optimizer: {init_lr: 0.1, schedule: epochs, warmup: 0}}\n')
    assert compare.main([str(results)]) == 0
    assert 'n_warmup_batches absent, schedule=epochs, warmup=0' in report(results)


def test_chosen_runs_reference_and_folder(results, capsys, few):
    """Several folders, folders of single runs, a pattern, a reference, another place for the report;
    what fits nothing is refused in one line."""
    a, b, out = results/'a', results/'b', results/'new'/'report'
    for i, readout in enumerate(('attention_pooled_encoder', 'decoder_output', 'layerwise_attention')):
        saved_run((a, b)[i == 2], i, readout=readout)
    one = b/'Reward-Model-Training'/'desc-x,index-2'
    def rows(*args):
        assert compare.main([*map(str, args), '--out', str(out)]) == 0
        return [s['name'].split(',')[0] for s in json.loads((out/'scores.json').read_text()) if not s['baseline']]
    assert rows(a, b) == ['attention_pooled_encoder', 'decoder_output', 'layerwise_attention']
    assert rows(one, a/'Reward-Model-Training', '--reference', 'decoder_output') == ['decoder_output', 'attention_pooled_encoder', 'layerwise_attention']
    assert rows(a, b, b, '--only', '*-[12]', '--reference', 'desc-x,index-2') == ['layerwise_attention', 'decoder_output']
    assert '--only' in (out/'report.md').read_text()
    assert rows(a, '--only', 'x') == ['attention_pooled_encoder', 'decoder_output']
    assert compare.main([str(one)]) == 0
    assert (b/'comparison'/'report.md').exists()
    assert not (a/'comparison').exists()
    capsys.readouterr()
    for args, says in ((['--only', 'y*'], '--only y*: fits no run; there are 2, such as x, x'), (['--reference', 'me'], '--reference me: no rows of that name; must be one of attention_pooled_encoder, trained; decoder_output, trained')):
        assert compare.main([str(a), *args]) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1
        assert says in err


def test_every_pair_is_tested(three, results, few):
    """All pairs of readouts, each difference as `compare_seeds` gives it,
    the p-values corrected over the table by statsmodels."""
    c, = comparisons(load_runs(results)[0])
    found = pair_differences(c)
    short = [(d['a'].split(',')[0], d['b'].split(',')[0]) for d in found]
    assert short == [('decoder_output', 'attention_pooled_encoder'), ('layerwise_attention', 'attention_pooled_encoder'), ('layerwise_attention', 'decoder_output')]
    mean = {r: np.mean([three[r, s] for s in (1, 2, 3)]) for r, _ in three}
    assert [d['difference'] for d in found] == pytest.approx([mean[a] - mean[b] for a, b in short])
    assert [d['p_corrected'] for d in found] == pytest.approx(multipletests([d['p'] for d in found], method='holm')[1])
    assert compare.main([str(results)]) == 0
    assert '## Every pair of trained readouts' in report(results)
    assert '3 pairs of this table' in report(results)
    assert len(pd.read_csv(results/'comparison'/'pairs.csv')) == 3


def test_report_says_where_it_comes_from(results, capsys, few):
    """Date, command, commits, what the columns mean, the interval of two seeds, captions,
    and rows without a speed of their own."""
    for seed in (1, 2):
        saved_run(results, seed, seed=seed, settings=RATE % 3e-4, pairs_per_second=7.)
        saved_run(results, seed + 2, seed=seed, settings=RATE % 3e-4, readout='layerwise_attention', train_transformer=False)
    assert compare.main([str(results), '--reference', 'decoder_output']) == 0
    text = report(results)
    for words in (f'Made {time.strftime("%Y")}', f'Command: python -m rlhf_flant5.compare {results} --reference decoder_output', 'from 4 runs of commit cccccccccccc', '[1] changes: ', '[3] spread over seeds: standard deviation',
                  '[4] p, corrected: ', ') [5]', 'has 1 degree of freedom', 'shared [6]', 'seeds 1, 2; init_lr=3e-4; commit cccccccccccc', 'n = 10 test and 10 validation pairs',
                  'Not shown, since their speed is shared: layerwise_attention, frozen', '10 test pairs are of 10 conversations', '    training.optimizer.init_lr: 3e-4'):
                      assert words in text, words
    assert pd.read_csv(results/'comparison'/'cost.csv').set_index('row').pairs_per_second.isna().to_dict() == {'decoder_output, trained': False, 'layerwise_attention, frozen': True}


def test_ece_of_figure_and_table(three, results):
    "Both are means over all seeds."
    for folder in (results/'Reward-Model-Training').glob('*'):
        change_summary(folder, temperature=.5 + int(folder.name[-1]))
    c, = comparisons(load_runs(results)[0])
    scores = all_scores(c)
    legends = [[t.get_text() for t in ax.get_legend().get_texts()] for ax in figures.plot_calibration(c, scores).axes if ax.get_legend()]
    plt.close('all')
    assert legends == [[f'as trained: ECE {100*s["ece"]:.1f}', f'with temperature: ECE {100*s["ece_calibrated"]:.1f}'] for s in scores[:3]]
    table = [line.split('|') for line in cost_table(c, scores).splitlines()[2:5]]
    assert [f'{words}: ECE {cell.strip()}' for row in table for words, cell in zip(('as trained', 'with temperature'), row[5:7])] == sum(legends, [])
    assert calibration_numbers(c).groupby(['row', 'what']).n.sum().eq(3*40).all()


def test_other_pairs_are_no_seeds_of_one_recipe(results):
    "Chosen and rejected exchanged in every pair, with equal ids and lengths; then other training pairs alone."
    saved_run(results, 0, seed=1)
    saved_run(results, 1, seed=2, turned=True)
    assert [[len(r.runs) for r in c.models] for c in comparisons(load_runs(results)[0])] == [[1], [1]]
    pairs = json.loads((results/'Reward-Model-Training'/'desc-x,index-0'/'data'/'provenance.json').read_text())['pairs']
    saved_run(results, 2, seed=3, origin=dict(pairs=pairs | dict(train='0'*64)))
    saved_run(results, 3, seed=3)
    one, _ = comparisons(load_runs(results)[0])
    assert [len(r.runs) for r in one.models] == [1, 2]
    assert one.models[1].changes == [f'data.train_sha256={pairs["train"][:12]}']
    assert any('was trained on other pairs than row 1' in n for n in origin_notes(one))


def test_a_run_without_a_record_of_its_pairs(results):
    "An older run, or a linear model: its kept texts say which pairs they are."
    saved_run(results, 0, origin=dict(pairs={}))
    saved_run(results, 1, turned=True)
    assert len(comparisons(load_runs(results)[0])) == 2
    saved_run(results, 2, readout='tf-idf', baseline=True, origin=dict(pairs={}))
    assert [[r.name for r in c.rows if r.runs] for c in comparisons(load_runs(results)[0])][0] == ['decoder_output, trained', 'tf-idf']


def test_machines_that_differ_are_named(results, few):
    """`auto` that was bf16 on one machine and fp32 on another is two rows;
    seeds of several commits are one, and both are said."""
    auto = 'training: {precision: auto}\n'
    for i, (precision, commit) in enumerate((('bf16', 'a'), ('bf16', 'b'), ('fp32', 'a'))):
        folder = saved_run(results, i, seed=i, settings=auto, origin=dict(source=dict(commit=commit*40, dirty=i == 1)))
        if i: (folder/'data'/'decided.json').write_text(json.dumps(dict(precision=precision, compile=False)))
        else: change_summary(folder, precision=precision)       # a run that was killed before it wrote what was decided
    assert compare.main([str(results)]) == 0
    (c,), text = comparisons(load_runs(results)[0]), report(results)
    assert [(r.name, len(r.runs)) for r in c.models] == [('precision=bf16', 2), ('precision=fp32', 1)]
    for words in ('decided differently, bf16 (2 runs), fp32 (1 run): rows of their own', 'several commits: aaaaaaaaaaaa (2 runs), bbbbbbbbbbbb with changes (1 run)',
                  'the seeds of "precision=bf16" come from several commits: aaaaaaaaaaaa, seeds 0; bbbbbbbbbbbb with changes, seeds 1'):
                      assert words in text, words


def test_a_run_that_lost_its_texts(results, few):
    "They are taken from another run of the same pairs."
    for i in (0, 1): saved_run(results, i, seed=i)
    for name in ('validation', 'test'):
        (results/'Reward-Model-Training'/'desc-x,index-0'/'data'/f'{name}_texts.jsonl.gz').unlink()
    assert compare.main([str(results)]) == 0


def test_conversations_widen_the_intervals(results, few):
    """Ten answers to each of four questions, right or wrong together:
    the design effect is said and the interval is wider."""
    right = [True]*20 + [False]*20
    alone, together = saved_run(results/'a', 0, right), saved_run(results/'b', 0, right, origin=dict(pairs={}))
    for split in ('validation', 'test'):
        path = together/'data'/f'{split}_texts.jsonl.gz'
        rows = [json.loads(l) for l in gzip.open(path, 'rt', encoding='utf-8')]
        with gzip.open(path, 'wt', encoding='utf-8') as f:
            for k, row in enumerate(rows):
                f.write(json.dumps({key: v.replace(f'Human: {k}?', f'Human: {k//10}?') for key, v in row.items()}) + '\n')
    width = lambda folder: (lambda t: t['high'] - t['low'])(all_scores(comparisons(load_runs(folder)[0])[0])[0]['test'])
    assert width(together) > 2*width(alone)
    assert compare.main([str(results/'b')]) == 0
    assert '40 test pairs are of 4 conversations' in report(results/'b')


@pytest.mark.parametrize('name, text, says', [('results/test_pairs.jsonl', '{}', 'test_pairs.jsonl:1'), ('data/test_texts.jsonl.gz', 'x', 'gzip'), ('data/config.yaml', '{', 'config.yaml'), ('results/history.jsonl', '[1]', 'history.jsonl')])
def test_damage(results, capsys, name, text, says):
    (saved_run(results, 0)/name).write_text(text)
    assert compare.main([str(results)]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert says in said


def test_sweep_goes_on(results, capsys):
    "A sweep over one seed, then over two in the same process: what is done is left alone and counted once."
    what = lambda n: ['--readouts', 'decoder_output', '--seeds', str(n), '--transformer', 'frozen', '-j', '2', '--no-baselines', 'experiment=toy', 'desc=s', 'data.n_train_data=64', 'data.n_test_data=64',
                      'training.loop.n_val_data=64', 'training.loop.n_batches=2', 'sim_man.allow_untracked=true']
    done = program('rlhf_flant5.sweep', *what(1))
    assert done.returncode == 0 and '1 run, 0 of them done' in done.stdout, done.stderr
    done = program('rlhf_flant5.sweep', *what(2))
    assert done.returncode == 0 and '2 runs, 1 of them done; 1 process to start' in done.stdout and '[2/2]' in done.stdout, done.stdout + done.stderr
    assert sweep.main([*what(2), '--dry-run']) == 0
    assert '2 of 2 done' in capsys.readouterr().out


def test_a_failing_run_does_not_stop_the_others(results):
    "A rate that ends in NaN: its run fails and says so, the other is done."
    done = program('rlhf_flant5.sweep', '--readouts', 'decoder_output', '--seeds', '1', '--transformer', 'trained', '--no-baselines', 'experiment=toy', 'desc=f', 'training.optimizer.init_lr=1e30,1e-4', 'training.optimizer.max_grad_norm=null',
                   'training.optimizer.warmup=0', 'data.n_train_data=64', 'data.n_test_data=64', 'training.loop.n_val_data=64', 'training.loop.n_batches=3', 'sim_man.allow_untracked=true')
    assert done.returncode == 1 and 'failed with 1: failed: gradient norm is not finite' in done.stdout and '[1/2]' in done.stdout, done.stdout + done.stderr


def test_sigterm_ends_the_runs_of_a_sweep(results):
    "Ended by a scheduler, a sweep takes its run along: the checkpoint is written, and nothing is left that works on."
    sweep_ = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.sweep', '--readouts', 'layerwise_attention', '--seeds', '1', '--transformer', 'trained', '--no-baselines', 'experiment=toy', 'desc=k', 'training.loop.n_epochs=99', 'sim_man.allow_untracked=true'],
                              env=os.environ | {'PYTHONPATH': str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, end = results/'Reward-Model-Training'/'desc-k-trained-layerwise_attention-1,index-0', time.monotonic() + 120
    while not [*folder.glob('simulation/checkpoints/batch-*')] and time.monotonic() < end: time.sleep(.2)
    sweep_.terminate()
    out, err = sweep_.communicate(timeout=120)
    assert sweep_.returncode == 75 and 'the same command goes on' in err, out + err
    with hold(folder):
        assert json.loads((folder/'data'/'provenance.json').read_text())['status'] == 'interrupted'       # its lock is free
