"The comparison over runs whose numbers are known, and the sweep as a program."
import json, math, os, subprocess, sys, time
import numpy as np, pytest
from conftest import program, root, saved_run
from scipy import stats
from statsmodels.stats.multitest import multipletests
from rlhf_flant5 import compare, sweep
from rlhf_flant5.compare import all_scores, comparisons, load_runs, votes
from rlhf_flant5.runs import hold


@pytest.fixture
def three(results):
    "Three readouts with three seeds each: which of 40 pairs are right is drawn with 60, 60 and 85%."
    g, k, right = np.random.default_rng(1), 0, {}
    for readout, p in (('attention_pooled_encoder', .6), ('decoder_output', .6), ('layerwise_attention', .85)):
        for seed in (1, 2, 3): right[readout, seed] = g.random(40) < p; saved_run(results, k, right[readout, seed], seed, readout=readout); k += 1
    return right


def test_numbers_by_another_way(three, results):
    "Accuracies, differences, intervals and corrected p-values recomputed from the drawn outcomes with scipy and statsmodels."
    c, = comparisons(load_runs(results)[0]); scores = all_scores(c); points = {r: np.array([three[r, s] for s in (1, 2, 3)], float) for r in ('attention_pooled_encoder', 'decoder_output', 'layerwise_attention')}
    assert [s['name'] for s in scores[:3]] == [f'{r}, trained' for r in points] and scores[0]['changes'] == [] and scores[1]['changes'] == ['readout']
    for s, x in zip(scores, points.values()):
        assert s['test']['accuracy'] == pytest.approx(x.mean()) and s['test']['std'] == pytest.approx(x.mean(1).std(ddof=1)) and s['seeds'] == [1, 2, 3]
        assert s['subsets']['s']['accuracy'] == pytest.approx(x[:, ::2].mean()) and s['subsets']['s']['n'] == 20
    x, y = points['layerwise_attention'], points['attention_pooled_encoder']; d = x.mean(0) - y.mean(0)
    parts = np.array([stats.sem(d)**2, stats.sem(x.mean(1))**2, stats.sem(y.mean(1))**2]); df = parts.sum()**2/(parts**2/np.array([39, 2, 2])).sum()
    got = scores[2]['difference']; low, high = stats.t.interval(.95, df, d.mean(), math.sqrt(parts.sum()))
    assert (got['difference'], got['low'], got['high']) == pytest.approx((d.mean(), low, high)) and got['p'] == pytest.approx(2*stats.t.sf(abs(d.mean())/math.sqrt(parts.sum()), df))
    others = [s['difference'] for s in scores if s['difference']]
    assert [d['p_corrected'] for d in others] == pytest.approx(multipletests([d['p'] for d in others], method='holm')[1])
    assert votes(c)['decoder_output, trained'].to_numpy() == pytest.approx(points['decoder_output'].mean(0))


def test_what_is_one_row(results, capsys):
    "Other settings are another row and are named; the same recipe and seed twice is refused; runs of other pairs stand apart."
    saved_run(results, 0, settings='training: {optimizer: {init_lr: 0.1}}\n'); saved_run(results, 1, seed=2, settings='training: {optimizer: {init_lr: 0.1}}\n')
    saved_run(results, 2, settings='training: {optimizer: {init_lr: 0.2}}\n'); saved_run(results, 3, right=[True]*12, readout='layerwise_attention')
    one, other = comparisons(load_runs(results)[0])
    assert [(r.name, len(r.runs)) for r in one.models] == [('decoder_output, trained', 2), ('decoder_output, trained, training.optimizer.init_lr=0.2', 1)] and [r.name for r in other.models] == ['layerwise_attention, trained']
    assert compare.main([str(results)]) == 0 and (results/'comparison-2'/'report.md').exists()
    assert all_scores(one)[1]['difference']['recipes'] is False and 'of one seed, which says nothing of recipes' in (results/'comparison-1'/'report.md').read_text()
    saved_run(results, 4, settings='training: {optimizer: {init_lr: 0.1}}\n'); capsys.readouterr()
    assert compare.main([str(results)]) == 2 and 'the same recipe with the same seed twice' in capsys.readouterr().err


@pytest.mark.parametrize('name, text, says', [('results/test_pairs.jsonl', '{}', 'test_pairs.jsonl:1'), ('data/test_texts.jsonl.gz', 'x', 'gzip'), ('data/config.yaml', '{', 'config.yaml'), ('results/history.jsonl', '[1]', 'history.jsonl')])
def test_damage(results, capsys, name, text, says):
    (saved_run(results, 0)/name).write_text(text); assert compare.main([str(results)]) == 2
    said = capsys.readouterr().err; assert said.count('\n') == 1 and says in said


def test_sweep_goes_on(results, capsys):
    "A sweep over one seed, then over two in the same process: what is done is left alone and counted once."
    what = lambda n: ['--readouts', 'decoder_output', '--seeds', str(n), '--transformer', 'frozen', '-j', '2', '--no-baselines', 'experiment=toy', 'desc=s', 'data.n_train_data=64', 'data.n_test_data=64',
                      'training.loop.n_val_data=64', 'training.loop.n_batches=2', 'sim_man.allow_untracked=true']
    done = program('rlhf_flant5.sweep', *what(1)); assert done.returncode == 0 and '1 run, 0 of them done' in done.stdout, done.stderr
    done = program('rlhf_flant5.sweep', *what(2)); assert done.returncode == 0 and '2 runs, 1 of them done; 1 process to start' in done.stdout and '[2/2]' in done.stdout, done.stdout + done.stderr
    assert sweep.main([*what(2), '--dry-run']) == 0 and '2 of 2 done' in capsys.readouterr().out


def test_a_failing_run_does_not_stop_the_others(results):
    "A rate that ends in NaN: its run fails and says so, the other is done."
    done = program('rlhf_flant5.sweep', '--readouts', 'decoder_output', '--seeds', '1', '--transformer', 'trained', '--no-baselines', 'experiment=toy', 'desc=f', 'training.optimizer.init_lr=1e30,1e-4', 'training.optimizer.max_grad_norm=null',
                   'training.optimizer.warmup=0', 'data.n_train_data=64', 'data.n_test_data=64', 'training.loop.n_val_data=64', 'training.loop.n_batches=3', 'sim_man.allow_untracked=true')
    assert done.returncode == 2 and 'failed with 2: error: ' in done.stdout and '[1/2]' in done.stdout, done.stdout + done.stderr


def test_sigterm_ends_the_runs_of_a_sweep(results):
    "Ended by a scheduler, a sweep takes its run along: the checkpoint is written, and nothing is left that works on."
    sweep_ = subprocess.Popen([sys.executable, '-m', 'rlhf_flant5.sweep', '--readouts', 'layerwise_attention', '--seeds', '1', '--transformer', 'trained', '--no-baselines', 'experiment=toy', 'desc=k', 'training.loop.n_epochs=99', 'sim_man.allow_untracked=true'],
                              env=os.environ | {'PYTHONPATH': str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, end = results/'Reward-Model-Training'/'desc-k-trained-layerwise_attention-1,index-0', time.monotonic() + 120
    while not [*folder.glob('simulation/checkpoints/batch-*')] and time.monotonic() < end: time.sleep(.2)
    sweep_.terminate(); out, err = sweep_.communicate(timeout=120)
    assert sweep_.returncode == 75 and 'the same command goes on' in err, out + err
    with hold(folder): assert json.loads((folder/'data'/'provenance.json').read_text())['status'] == 'interrupted'       # its lock is free
