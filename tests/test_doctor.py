"The data check as a user runs it: exit codes, the report as text and as JSON, data that is sick or hostile."
import errno, json, os, signal
import pytest
from conftest import program
from rlhf_flant5 import doctor
from rlhf_flant5.doctor import main


def pair(question, good, bad): return dict(chosen=f'\n\nHuman: {question}\n\nAssistant: {good}', rejected=f'\n\nHuman: {question}\n\nAssistant: {bad}')


well = [pair(f'What is {i} and {i}?', f'It is {2*i}.', 'No idea.') for i in range(40)]


def write(folder, train, test):
    (folder/'sums').mkdir(parents=True)
    for split, rows in dict(train=train, test=test).items():
        (folder/'sums'/f'{split}.jsonl').write_bytes(b''.join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b'\n' for r in rows))
    return folder


def settings(folder): return [f'data.name={folder}', 'data.subdirs=[sums]', 'experiment=toy']


def test_program(tmp_path):
    "Sick data through the program: 1, all bad lines named, and nothing that a terminal would obey."
    bell = '\x1b]0;owned\x07'
    folder = write(tmp_path/'sick', well + [b'{"chosen": "' + b'\x1b[2J', dict(chosen=bell, rejected='x'), pair('Ring?', bell, 'No.')], [pair('New?', 'Yes.', 'No.')])
    done = program('rlhf_flant5.doctor', *settings(folder), '--json', str(tmp_path/'report.json'))
    assert done.returncode == 1, done.stderr
    assert 'sums/train.jsonl:41: ' in done.stdout and 'sums/train.jsonl:42: ' in done.stdout and 'U+001B' in done.stdout
    assert all(c.isprintable() or c == '\n' for c in done.stdout)
    report = json.loads((tmp_path/'report.json').read_text())
    assert report['code'] == 1 and report['table']['sums/train']['refused'] == 2
    assert {x['what']: x['n'] for x in report['findings']}['a row is no pair'] == 2


def test_help_and_bad_input(tmp_path, capsys):
    done = program('rlhf_flant5.doctor', '--help')
    assert done.returncode == 0 and 'Check the pairs' in done.stdout and 'key=value' in done.stdout
    assert main([*settings(tmp_path/'none\x1b[2J')]) == 2
    said = capsys.readouterr()
    assert said.out == '' and len(said.err.splitlines()) == 1 and said.err.startswith('error: ') and '\x1b' not in said.err


def refused(*_): raise OSError(errno.EIO, os.strerror(errno.EIO), '/disk\x1b[2J')
@pytest.mark.parametrize('instead, code, says', [(refused, 1, r'failed: /disk\x1b[2J: Input/output error'), (lambda *_: signal.raise_signal(signal.SIGINT), 75, 'interrupted (SIGINT)')])
def test_a_bad_disk_and_ctrl_c_are_one_line(tmp_path, capsys, monkeypatch, instead, code, says):
    monkeypatch.setattr(doctor, 'try_rows', instead)       # while a file is read
    assert main([*settings(write(tmp_path/'sums', well, well[:3]))]) == code
    said = capsys.readouterr()
    assert said.out == '' and said.err == says + '\n'


def test_same_counts_as_a_run(tmp_path, capsys):
    "What the check says of a run is what the run's own reading says."
    from collections import Counter, defaultdict
    from rlhf_flant5.config.compose import load_config
    from rlhf_flant5.training.build import load_data
    long, same = pair('Long?', 'so ' * 200, 'No.'), pair('Same?', 'Yes.', 'Yes.')
    folder = write(tmp_path/'mixed', well + [long, same, same, long], well[:3] + [long])
    assert main([*settings(folder), 'data.val_fraction=0.3', '--json', str(tmp_path/'r.json')]) == 0
    said, counts = json.loads((tmp_path/'r.json').read_text()), defaultdict(Counter)
    _, splits, _ = load_data(load_config([*settings(folder), 'data.val_fraction=0.3']), counts)
    assert said['uses'] == {k: len(v) for k, v in splits.items()}
    for k, c in counts.items():
        row = said['table'][k]
        assert (row['pairs'], row['equal texts'], row['too long'], row['equal tokens']) == (c['read'], c['equal texts'], c['too long'], c['equal tokens'])
    assert 'a conversation is in train and in test' in capsys.readouterr().out
