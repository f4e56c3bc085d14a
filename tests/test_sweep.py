"The sweep: what it decides itself, what it says of the work, and other processes in the same folder."
import json, os, subprocess, sys, threading, time
import pytest
from rlhf_flant5 import sweep
from rlhf_flant5.training.jobs import Pool
from rlhf_flant5.training.runs import find_runs, hold
from conftest import root

few = ['experiment=toy', 'desc=s', 'data.n_train_data=64', 'data.n_test_data=64', 'training.loop.n_val_data=64',
       'training.loop.n_batches=2', 'sim_man.allow_untracked=true']
two = ['--readouts', 'decoder_output', '--seeds', '2', '--transformer', 'trained']


OWN_OPTIONS = {
    'model=attention_pooled_encoder,layerwise_attention': '--readouts attention_pooled_encoder,layerwise_attention',
    'model=decoder_output': '--readouts decoder_output',
    'model=[decoder_output]': '--readouts decoder_output',
    'seed=7': '--seeds 7,',
    'seed=1,2': '--seeds 1,2',
    'seed=range(1,4)': '--seeds 1,2,3',
    'model.train_transformer=False': '--transformer frozen',
    'model.train_transformer=True,False': '--transformer trained,frozen',
    'resume=false': 'leave it out'}


@pytest.mark.parametrize('more', [[], ['--dry-run']], ids=['run', 'dry run'])
@pytest.mark.parametrize('setting, option', OWN_OPTIONS.items(), ids=OWN_OPTIONS)
def test_its_own_settings_are_refused_with_the_option(results, capsys, setting, option, more):
    assert sweep.main(['--seeds', '2', *few, setting, *more]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f'error: {setting}: ') and err.rstrip().endswith(option)
    assert err.count('\n') == 1 and not out
    assert not any(results.iterdir())


@pytest.fixture
def trainings(monkeypatch):
    "Trainings that take no time: what is done is a set of names. Returns (done, begun, what a training gives)."
    done, begun, gives = set(), [], [0]
    def train(job, pool):
        begun.append(job.label)
        if gives[0] == 0: done.update(f.name for f in job.folders)
        return sweep.Ended(gives[0], 'trained\n', 'error: it failed', 60.)
    monkeypatch.setattr(sweep, 'train_job', train)
    monkeypatch.setattr(sweep, 'is_done', lambda settings: sweep.run_folder(settings).name in done)
    return done, begun, gives


def test_it_says_how_much_there_is_and_what_is_left(results, trainings, capsys):
    assert sweep.main([*two, '--no-baselines', *few]) == 0
    compare = f'next: python -m rlhf_flant5.compare {results}'
    assert capsys.readouterr().out.splitlines() == [
        '2 runs, 0 of them done; 2 processes to start, 1 at a time',
        'to train: 2 runs of 2 batches, 256 pairs in all; the first that ends tells the time',
        '[1/2] decoder_output, trained, seed 1 (s-trained-decoder_output-1): 60 s; about 60 s left',
        'trained',
        '[2/2] decoder_output, trained, seed 2 (s-trained-decoder_output-2): 60 s',
        'trained',
        compare]
    assert sweep.main([*two, '--no-baselines', *few]) == 0
    again = ['2 runs, 2 of them done; 0 processes to start, 1 at a time', compare]
    assert capsys.readouterr().out.splitlines() == again


def test_pairs_are_counted_once_a_run_has_read_them(results):
    settings = [s for s in few if 'n_batches' not in s] + ['training.loop.n_epochs=3']
    jobs = sweep.plan(settings, ['decoder_output'], [1, 2], ['trained'])
    folders = [folder for job in jobs for folder in job.folders]
    counts = {'a/train': {'read': 99, 'used for train': 40}, 'b/train': {'used for train': 2},
              'b/test': {'used for test': 7}}
    (folders[1]/'data').mkdir(parents=True)
    (folders[1]/'data'/'counts.json').write_text(json.dumps(counts))
    n_train = sweep.n_train_pairs(folders)
    assert n_train == 42
    assert '2 runs of 3 epochs, 252 pairs in all' in sweep.cost(sweep.unfinished(jobs), n_train)


@pytest.mark.parametrize('code, gives', [(-9, 1), (1, 1), (2, 2), (75, 75)])
def test_a_job_that_fails_decides_the_exit_code(results, trainings, capsys, code, gives):
    trainings[2][0] = code
    assert sweep.main([*two, '--no-baselines', *few]) == gives
    out = capsys.readouterr().out
    assert out.count(f'failed with {code}: error: it failed') == 2
    assert 'the same command goes on' in out and 'next:' not in out


def at_work(folder, seconds, end=lambda: None, until=lambda: True):
    """Hold a run as another process would, until something is so and some seconds more.
    A lock belongs to the thread that took it."""
    begun = threading.Event()
    def work():
        lock = hold(folder)
        begun.set()
        while not until(): time.sleep(.05)
        time.sleep(seconds)
        end()
        lock.release()
    folder.mkdir(parents=True)
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    return thread


@pytest.mark.parametrize('ends_well', [True, False])
def test_a_run_at_work_elsewhere_is_left_and_waited_for(results, trainings, capsys, ends_well):
    "Another sweep, or a training that outlived its own: the rest is done first; one that ends unfinished is taken over."
    done, begun, _ = trainings
    jobs = sweep.plan(few, ['decoder_output'], [1, 2], ['trained'])
    held, free = jobs
    folder = held.folders[0]
    def end():
        if ends_well: done.add(folder.name)
    other = at_work(folder, .3, end, until=lambda: begun)
    assert sweep.main([*two, '--no-baselines', *few]) == 0
    other.join()
    out = capsys.readouterr().out
    for part in (f'at work elsewhere: {held.label}', f'[1/2] {free.label}', 'waits for 1'): assert part in out
    if ends_well:
        assert begun == [free.label] and f'[2/2] {held.label}: done elsewhere' in out
    else:
        assert begun == [free.label, held.label] and f'[2/2] {held.label}: 60 s' in out


@pytest.mark.parametrize('seconds', [0, 1])
def test_a_run_that_another_takes_first_is_no_failure(results, trainings, capsys, monkeypatch, seconds):
    "Both looked when it was free; the second is told so by the run itself, maybe when the first has just ended."
    done, _, _ = trainings
    job, = sweep.plan(few, ['decoder_output'], [1], ['trained'])
    def too_late(job, pool):
        folder, = job.folders
        at_work(folder, seconds, lambda: done.add(folder.name))
        if not seconds: time.sleep(.5)
        return sweep.Ended(2, '', 'error: another process is at work in this run', 1.)
    monkeypatch.setattr(sweep, 'train_job', too_late)
    assert sweep.run_jobs([job], Pool(1)) == 0
    assert 'done elsewhere' in capsys.readouterr().out


def test_a_baseline_at_work_elsewhere(results, trainings, capsys, monkeypatch):
    "It is told, left alone, and taken over when it ends unfinished."
    def has_summary(settings): return (sweep.run_folder(settings)/'results'/'summary.json').exists()
    monkeypatch.setattr(sweep, 'is_done', has_summary)
    folder = sweep.run_folder(sweep.linear_settings(few, 'tf-idf'))
    folder.mkdir(parents=True)
    lock = hold(folder)
    assert sweep.classical(few) == [folder]
    assert 'tf-idf per subset: validation' in capsys.readouterr().out
    lock.release()
    assert sweep.classical(few) == []
    assert capsys.readouterr().out.startswith('tf-idf: validation')
    summary = json.loads((folder/'results'/'summary.json').read_text())
    assert summary['test']['n_conversations'] <= 64 and summary['test']['design_effect'] > 0


def test_two_sweeps_at_once(results):
    "The same command twice at the same time: both end well, and each run is trained once."
    one = ['--readouts', 'decoder_output', '--seeds', '1', '--transformer', 'trained', *few]
    args, env = [sys.executable, '-m', 'rlhf_flant5.sweep', *one], os.environ | {'PYTHONPATH': str(root)}
    def begin(): return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [begin(), begin()]
    printed = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], printed
    assert len(find_runs()) == 3
    for run in find_runs():
        origin = json.loads((run/'data'/'provenance.json').read_text())
        assert origin['status'] == 'done' and origin['resumed'] == [], run
    for out, _ in printed: assert 'next: python -m rlhf_flant5.compare' in out
