"The sweep: what it decides itself, what it says of the work, and other processes in the same folder."
import json, os, subprocess, sys, threading, time
import pytest
from rlhf_flant5 import sweep
from rlhf_flant5.training.jobs import Pool
from rlhf_flant5.training.runs import find_runs, hold
from conftest import root

few = ['experiment=toy', 'desc=s', 'data.n_train_data=64', 'data.n_test_data=64', 'training.loop.n_val_data=64', 'training.loop.n_batches=2', 'sim_man.allow_untracked=true']
two = ['--readouts', 'decoder_output', '--seeds', '2', '--transformer', 'trained']


@pytest.mark.parametrize('setting, option', [
    ('model=attention_pooled_encoder,layerwise_attention', '--readouts attention_pooled_encoder,layerwise_attention'), ('model=decoder_output', '--readouts decoder_output'),
    ('model=[decoder_output]', '--readouts decoder_output'), ('seed=7', '--seeds 7,'), ('seed=1,2', '--seeds 1,2'), ('seed=range(1,4)', '--seeds 1,2,3'),
    ('model.train_transformer=False', '--transformer frozen'), ('model.train_transformer=True,False', '--transformer trained,frozen'), ('resume=false', 'leave it out')])
def test_its_own_settings_are_refused_with_the_option(results, capsys, setting, option):
    for more in ([], ['--dry-run']):
        assert sweep.main(['--seeds', '2', *few, setting, *more]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f'error: {setting}: ') and said.err.rstrip().endswith(option) and said.err.count('\n') == 1 and not said.out
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
    said = capsys.readouterr().out.splitlines()
    assert said == ['2 runs, 0 of them done; 2 processes to start, 1 at a time', 'to train: 2 runs of 2 batches, 256 pairs in all; the first that ends tells the time',
                    '[1/2] decoder_output, trained, seed 1 (s-trained-decoder_output-1): 60 s; about 60 s left', 'trained',
                    '[2/2] decoder_output, trained, seed 2 (s-trained-decoder_output-2): 60 s', 'trained', f'next: python -m rlhf_flant5.compare {results}']
    assert sweep.main([*two, '--no-baselines', *few]) == 0
    assert capsys.readouterr().out.splitlines() == ['2 runs, 2 of them done; 0 processes to start, 1 at a time', said[-1]]


def test_pairs_are_counted_once_a_run_has_read_them(results):
    jobs = sweep.plan([s for s in few if 'n_batches' not in s] + ['training.loop.n_epochs=3'], ['decoder_output'], [1, 2], ['trained'])
    (data := jobs[1].folders[0]/'data').mkdir(parents=True)
    (data/'counts.json').write_text('{"a/train": {"read": 99, "used for train": 40}, "b/train": {"used for train": 2}, "b/test": {"used for test": 7}}')
    assert '2 runs of 3 epochs, 252 pairs in all' in sweep.cost(sweep.unfinished(jobs), sweep.n_train_pairs(f for j in jobs for f in j.folders))


@pytest.mark.parametrize('code, gives', [(-9, 1), (1, 1), (2, 2), (75, 75)])
def test_a_job_that_fails_decides_the_exit_code(results, trainings, capsys, code, gives):
    trainings[2][0] = code
    assert sweep.main([*two, '--no-baselines', *few]) == gives
    said = capsys.readouterr().out
    assert said.count(f'failed with {code}: error: it failed') == 2 and 'the same command goes on' in said and 'next:' not in said


def at_work(folder, seconds, end=lambda: None, until=lambda: True):
    "Hold a run as another process would, until something is so and some seconds more; a lock belongs to the thread that took it."
    begun = threading.Event()
    def work():
        lock = hold(folder)
        begun.set()
        while not until(): time.sleep(.05)
        time.sleep(seconds)
        end()
        lock.release()
    folder.mkdir(parents=True)
    (thread := threading.Thread(target=work)).start()
    begun.wait()
    return thread


@pytest.mark.parametrize('ends_well', [True, False])
def test_a_run_at_work_elsewhere_is_left_and_waited_for(results, trainings, capsys, ends_well):
    "Another sweep, or a training that outlived its own: the rest is done first; one that ends unfinished is taken over."
    done, begun, _ = trainings
    jobs = sweep.plan(few, ['decoder_output'], [1, 2], ['trained'])
    folder = jobs[0].folders[0]
    other = at_work(folder, .3, lambda: done.update([folder.name]*ends_well), until=lambda: begun)
    assert sweep.main([*two, '--no-baselines', *few]) == 0
    other.join()
    said = capsys.readouterr().out
    assert f'at work elsewhere: {jobs[0].label}' in said and f'[1/2] {jobs[1].label}' in said and 'waits for 1' in said
    assert begun == [jobs[1].label] + [jobs[0].label]*(not ends_well) and f'[2/2] {jobs[0].label}: {"done elsewhere" if ends_well else "60 s"}' in said


@pytest.mark.parametrize('seconds', [0, 1])
def test_a_run_that_another_takes_first_is_no_failure(results, trainings, capsys, monkeypatch, seconds):
    "Both looked when it was free; the second is told so by the run itself, maybe when the first has just ended."
    done, _, _ = trainings
    job, = sweep.plan(few, ['decoder_output'], [1], ['trained'])
    def too_late(job, pool):
        at_work(job.folders[0], seconds, lambda: done.add(job.folders[0].name))
        time.sleep(.5*(not seconds))
        return sweep.Ended(2, '', 'error: another process is at work in this run', 1.)
    monkeypatch.setattr(sweep, 'train_job', too_late)
    assert sweep.run_jobs([job], Pool(1)) == 0 and 'done elsewhere' in capsys.readouterr().out


def test_a_baseline_at_work_elsewhere(results, trainings, capsys, monkeypatch):
    "It is told, left alone, and taken over when it ends unfinished."
    monkeypatch.setattr(sweep, 'is_done', lambda settings: sweep.run_folder(settings).joinpath('results', 'summary.json').exists())
    folder = sweep.run_folder(sweep.linear_settings(few, 'tf-idf'))
    folder.mkdir(parents=True)
    lock = hold(folder)
    assert sweep.classical(few) == [folder] and 'tf-idf per subset: validation' in capsys.readouterr().out
    lock.release()
    assert sweep.classical(few) == [] and capsys.readouterr().out.startswith('tf-idf: validation')
    summary = json.loads((folder/'results'/'summary.json').read_text())
    assert summary['test']['n_conversations'] <= 64 and summary['test']['design_effect'] > 0


def test_two_sweeps_at_once(results):
    "The same command twice at the same time: both end well, and each run is trained once."
    args = [sys.executable, '-m', 'rlhf_flant5.sweep', '--readouts', 'decoder_output', '--seeds', '1', '--transformer', 'trained', *few]
    both = [subprocess.Popen(args, env=os.environ | {'PYTHONPATH': str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(find_runs()) == 3
    for run in find_runs():
        origin = json.loads((run/'data'/'provenance.json').read_text())
        assert origin['status'] == 'done' and origin['resumed'] == [], run
    assert all('next: python -m rlhf_flant5.compare' in out for out, _ in said)
