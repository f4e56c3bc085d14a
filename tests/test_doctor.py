"The data check as a user runs it: exit codes, the report as text and as JSON, data that is sick or hostile."
import errno, json, os, signal
from collections import Counter, defaultdict
import pytest
from conftest import program
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.data import sources
from rlhf_flant5.doctor import main
from rlhf_flant5.training.build import load_data


def pair(question, good, bad):
    begin = f'\n\nHuman: {question}\n\nAssistant: '
    return dict(chosen=begin + good, rejected=begin + bad)


well = [pair(f'What is {i} and {i}?', f'It is {2*i}.', 'No idea.') for i in range(40)]


def write(folder, train, test):
    "Rows, or lines of bytes, as a data set with the one subset `sums`."
    (folder/'sums').mkdir(parents=True)
    for split, rows in dict(train=train, test=test).items():
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder/'sums'/f'{split}.jsonl').write_bytes(b'\n'.join(lines) + b'\n')
    return folder


def settings(folder): return [f'data.name={folder}', 'data.subdirs=[sums]', 'experiment=toy']


def test_program(tmp_path):
    "Sick data through the program: 1, all bad lines named, and nothing that a terminal would obey."
    bell = '\x1b]0;owned\x07'
    no_json, no_dialogue = b'{"chosen": "' + b'\x1b[2J', dict(chosen=bell, rejected='x')
    train = [*well, no_json, no_dialogue, pair('Ring?', bell, 'No.')]
    folder = write(tmp_path/'sick', train, [pair('New?', 'Yes.', 'No.')])

    done = program('rlhf_flant5.doctor', *settings(folder), '--json', str(tmp_path/'report.json'))
    assert done.returncode == 1, done.stderr
    for part in ('sums/train.jsonl:41: ', 'sums/train.jsonl:42: ', 'U+001B'): assert part in done.stdout
    assert all(c.isprintable() or c == '\n' for c in done.stdout)

    report = json.loads((tmp_path/'report.json').read_text())
    assert report['code'] == 1
    assert report['table']['sums/train']['refused'] == 2
    assert {x['what']: x['n'] for x in report['findings']}['a row is no pair'] == 2


def test_help():
    done = program('rlhf_flant5.doctor', '--help')
    assert done.returncode == 0
    assert 'Check the pairs' in done.stdout and 'key=value' in done.stdout


def test_bad_input(tmp_path, capsys):
    assert main([*settings(tmp_path/'none\x1b[2J')]) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert len(printed.err.splitlines()) == 1 and printed.err.startswith('error: ')
    assert '\x1b' not in printed.err


def bad_disk(*_, **__): raise OSError(errno.EIO, os.strerror(errno.EIO), '/disk\x1b[2J')
def ctrl_c(*_, **__): signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('instead, code, line', [
    pytest.param(bad_disk, 1, r'failed: /disk\x1b[2J: Input/output error', id='bad disk'),
    pytest.param(ctrl_c, 75, 'interrupted (SIGINT)', id='ctrl-c')])
def test_a_bad_disk_and_ctrl_c_are_one_line(tmp_path, capsys, monkeypatch, instead, code, line):
    monkeypatch.setattr(sources, 'try_rows', instead)       # while a file is read
    assert main([*settings(write(tmp_path/'sums', well, well[:3]))]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ('', line + '\n')


def test_same_counts_as_a_run(tmp_path, capsys):
    "What the check says of a run is what the run's own reading says."
    long, same = pair('Long?', 'so ' * 200, 'No.'), pair('Same?', 'Yes.', 'Yes.')
    folder = write(tmp_path/'mixed', [*well, long, same, same, long], [*well[:3], long])
    of_run = [*settings(folder), 'data.val_fraction=0.3']
    assert main([*of_run, '--json', str(tmp_path/'r.json')]) == 0
    report = json.loads((tmp_path/'r.json').read_text())

    counts = defaultdict(Counter)
    _, splits, _ = load_data(load_config(of_run), counts)
    assert report['uses'] == {k: len(v) for k, v in splits.items()}
    for part, count in counts.items():
        row = report['table'][part]
        assert row['pairs'] == count['read']
        for name in ('equal texts', 'too long', 'equal tokens'): assert row[name] == count[name]
    assert 'a conversation is in train and in test' in capsys.readouterr().out
