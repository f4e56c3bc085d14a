'Training, sweep and doctor read pairs of every layout that an evaluation reads, and say what they did with them.'
import gzip, json
from collections import Counter
import pandas as pd
import pytest
from conftest import short, summary_of
from datasets import Dataset, DatasetDict
from rlhf_flant5.compare import main as compare
from rlhf_flant5.comparison.runs import load_runs
from rlhf_flant5.config.compose import load_config
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.examination import examine
from rlhf_flant5.data.reading import read_any
from rlhf_flant5.data.toy import toy_pairs
from rlhf_flant5.train import main
from rlhf_flant5.training.changes import changed_settings
from rlhf_flant5.training.pipeline import read_data, train_run


def parts(pair):
    "Prompt and two answers of a dialogue."
    prompt, _, chosen = pair['chosen'].rpartition('\n\nAssistant: ')
    return prompt, chosen, pair['rejected'].removeprefix(prompt).removeprefix('\n\nAssistant: ')


def one_turn(n, split='train'):
    "Toy pairs of one question and one answer."
    def is_one(p): return p['chosen'].count('Human') == p['rejected'].count('Human') == 1
    return [p for p in toy_pairs(6*n, split=split) if is_one(p)][:n]


def as_hh(p): return dict(chosen=p['chosen'], rejected=p['rejected'])


def as_texts(p):
    prompt, chosen, rejected = parts(p)
    return dict(prompt=prompt.removeprefix('\n\nHuman: '), chosen=chosen, rejected=rejected)


def message(role, content): return dict(role=role, content=content)


def as_messages(p):
    "TRL's conversational format."
    row = as_texts(p)
    return dict(prompt=[message('user', row['prompt'])],
                chosen=[message('assistant', row['chosen'])], rejected=[message('assistant', row['rejected'])])


def as_conversations(p):
    "The same with an implicit prompt."
    row = as_messages(p)
    return dict(chosen=row['prompt'] + row['chosen'], rejected=row['prompt'] + row['rejected'])


def as_rewardbench(p): return as_texts(p) | dict(subset='pairs')


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(row if isinstance(row, str) else json.dumps(row) + '\n' for row in rows)
    if path.suffix == '.gz': path.write_bytes(gzip.compress(text.encode()))
    else: path.write_text(text, encoding='utf-8')
    return path


def write_table(path, rows):
    table = pd.DataFrame(rows)
    if path.suffix == '.csv': table.to_csv(path, index=False)
    else: table.to_parquet(path)
    return path


FORMATS = dict(
    hh=lambda f, ps: write_lines(f/'pairs.jsonl', map(as_hh, ps)),
    gzipped=lambda f, ps: write_lines(f/'pairs.jsonl.gz', map(as_hh, ps)),
    texts=lambda f, ps: write_lines(f/'pairs.jsonl', map(as_texts, ps)),
    messages=lambda f, ps: write_lines(f/'pairs.jsonl', map(as_messages, ps)),
    conversations=lambda f, ps: write_lines(f/'pairs.jsonl', map(as_conversations, ps)),
    rewardbench=lambda f, ps: write_lines(f/'pairs.jsonl', map(as_rewardbench, ps)),
    csv=lambda f, ps: write_table(f/'pairs.csv', [*map(as_texts, ps)]),
    parquet=lambda f, ps: write_table(f/'pairs.parquet', [*map(as_messages, ps)]))


def settings(name, *more):
    return [f"data.name='{name}'", 'experiment=toy', *short, *more]


def splits_of(*overrides, pairs=None):
    return read_data(load_config(overrides), pairs)


@pytest.fixture(scope='module')
def forty(): return one_turn(40)


@pytest.fixture(scope='module')
def expected(forty, tmp_path_factory):
    "The fingerprints of the pairs as HH-RLHF's dialogues."
    return splits_of(*settings(FORMATS['hh'](tmp_path_factory.mktemp('hh'), forty))).fingerprints()


@pytest.mark.parametrize('write', FORMATS.values(), ids=FORMATS)
def test_every_layout_gives_the_same_run(write, forty, expected, tmp_path):
    data = splits_of(*settings(write(tmp_path, forty)))
    assert data.fingerprints() == expected
    assert [*data.splits] == ['train', 'validation']
    assert data.counts['pairs/train']['read'] == 40


def saved(rows, folder):
    Dataset.from_list(rows).save_to_disk(str(folder/'saved'))
    return str(folder/'saved')


TABLES = dict(
    rows=lambda rows, folder: rows,
    frame=lambda rows, folder: pd.DataFrame(rows),
    dataset=lambda rows, folder: Dataset.from_list(rows),
    splits=lambda rows, folder: DatasetDict(train=Dataset.from_list(rows), val=Dataset.from_list(rows[:5])))


@pytest.mark.parametrize('make', TABLES.values(), ids=TABLES)
def test_tables_in_memory(make, forty, tmp_path):
    data = splits_of(*settings('toy'), pairs=make([*map(as_messages, forty)], tmp_path))
    assert [*data.splits] == ['train', 'validation', 'test']
    texts = {text for pairs in data.splits.values() for text in pairs['chosen'][:]}
    assert texts == {p['chosen'] for p in forty}
    assert data.best is None


def test_a_saved_data_set(forty, tmp_path):
    data = splits_of(*settings(saved([*map(as_messages, forty)], tmp_path)))
    assert sum(map(len, data.splits.values())) == 40


def test_columns_with_other_names(forty, expected, tmp_path):
    rows = [dict(question=r['prompt'], better=r['chosen'], worse=r['rejected']) for r in map(as_texts, forty)]
    path = write_lines(tmp_path/'pairs.jsonl', rows)
    named = settings(path, 'data.columns={prompt: question, chosen: better, rejected: worse}')
    assert splits_of(*named).fingerprints() == expected
    with pytest.raises(ConfigError) as e: splits_of(*settings(path))
    assert "no chosen and no rejected; a row needs both, this one has 'question', 'better', 'worse'" in str(e.value)


def test_a_flat_folder_with_its_own_validation(forty, tmp_path):
    for name, pairs in dict(train=forty[:20], val=forty[20:30], test=forty[30:]).items():
        write_lines(tmp_path/f'{name}.jsonl', map(as_texts, pairs))
    data = splits_of(*settings(tmp_path))
    assert {k: len(v) for k, v in data.splits.items()} == dict(train=20, validation=10, test=10)
    assert data.splits['train']['chosen'][:] == [p['chosen'] for p in forty[:20]]


def test_splits_in_pieces_with_names_of_their_own(forty, tmp_path):
    (tmp_path/'data').mkdir()
    write_table(tmp_path/'data'/'train_prefs-00000-of-00002.parquet', [*map(as_messages, forty[:20])])
    write_table(tmp_path/'data'/'train_prefs-00001-of-00002.parquet', [*map(as_messages, forty[20:])])
    with pytest.raises(ConfigError) as e: splits_of(*settings(tmp_path))
    assert 'there are data/train_prefs-00000-of-00002.parquet' in str(e.value)
    data = splits_of(*settings(tmp_path, 'data.splits.train=train_prefs'))
    assert sum(map(len, data.splits.values())) == 40
    assert len({*data.splits['train']['id'][:]}) == len(data.splits['train'])


def test_subsets_default_to_what_is_there(pairs_folder):
    everything = splits_of(*settings(pairs_folder))
    named = splits_of(*settings(pairs_folder, 'data.subdirs=[harmless-base,helpful-base,helpful-online,'
                                              'helpful-rejection-sampled]'))
    assert everything.fingerprints() == named.fingerprints()
    one = splits_of(*settings(pairs_folder, 'data.subdirs=[helpful-online]'))
    assert {*one.splits['train']['subset'][:]} == {'helpful-online'}


def test_a_validation_file_and_named_tests(forty, tmp_path):
    files = [write_lines(tmp_path/f'{i}.jsonl', map(as_texts, forty[i:i + 10])) for i in (0, 10, 20, 30)]
    data = splits_of(*settings(files[0], f"data.validation='{files[1]}'", f"data.tests={{test: '{files[2]}'}}",
                               f"data.tests.hard='{files[3]}'"))
    assert {k: v['chosen'][:] for k, v in data.splits.items()} == {
        name: [p['chosen'] for p in forty[i:i + 10]]
        for name, i in dict(train=0, validation=10, test=20, hard=30).items()}


def test_what_is_not_used_is_named(forty, tmp_path):
    rows = [as_texts(p) | dict(margin=1.5, source='me') for p in forty]
    reading = read_any(str(write_lines(tmp_path/'pairs.jsonl', rows)))
    assert reading.unused == ['source']
    assert reading.pairs['margin'][:] == [1.5]*40
    shown = '\n'.join(reading.lines())
    assert 'a prompt and responses, texts' in shown and 'labels    margin' in shown and 'columns not used: source' in shown


BAD = [dict(prompt='Why?', chosen='So.'), 'no JSON\n', dict(prompt='Why?', chosen=7, rejected='x'), [1],
       dict(prompt='', chosen='a', rejected='b')]
REASONS = {'no rejected': 1, 'not JSON': 1, 'of no layout': 1, 'no object': 1, 'no dialogue': 1}


@pytest.fixture
def with_bad_rows(forty, tmp_path):
    rows = [*map(as_texts, forty)]
    return write_lines(tmp_path/'pairs.jsonl', rows[:7] + BAD + rows[7:])


def test_the_first_bad_row_ends_a_run(with_bad_rows):
    with pytest.raises(ConfigError) as e: splits_of(*settings(with_bad_rows))
    assert str(e.value).startswith(f'{with_bad_rows}:8: no rejected')


def test_bad_rows_are_dropped_counted_and_listed(with_bad_rows, forty, results, capsys):
    summary = train_run(settings(with_bad_rows, 'data.bad_rows=drop', 'desc=few'))
    run = summary['folder']
    listed = [json.loads(line) for line in (run/'data'/'bad_rows.jsonl').read_text().splitlines()]
    assert [row['place'] for row in listed] == [f'{with_bad_rows}:{n}' for n in range(8, 13)]
    assert Counter(row['reason'] for row in listed) == REASONS
    counts = json.loads((run/'data'/'counts.json').read_text())['pairs/train']
    assert counts['read'] == 45 and counts.items() >= REASONS.items()
    assert '5 bad rows are left out' in (run/'logs'/'train.log').read_text()


def test_a_file_that_breaks_off_is_never_dropped(forty, tmp_path):
    path = write_lines(tmp_path/'pairs.jsonl.gz', map(as_texts, forty))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError) as e: splits_of(*settings(path, 'data.bad_rows=drop'))
    assert 'cut off or damaged' in str(e.value)


def test_the_doctor_reads_the_same(with_bad_rows):
    report = examine(load_config(settings(with_bad_rows)))
    assert report.code == 1 and report.uses['train'] + report.uses['validation'] == 40
    assert 'data.bad_rows=drop' in report.show()
    assert [f.places[0] for f in report.findings if f.fate == 'refused'][0].startswith('pairs.jsonl:8: no rejected')
    dropping = load_config(settings(with_bad_rows, 'data.bad_rows=drop'))
    assert examine(dropping).code == 0


def test_a_run_without_test_pairs(forty, results, tmp_path, capsys):
    path = FORMATS['parquet'](tmp_path, forty)
    summary = train_run(settings(path, 'desc=untested', 'model=decoder_output'))
    assert 'test' not in summary and summary['validation']['n'] > 0
    run = summary['folder']
    assert not (run/'results'/'test_pairs.jsonl').exists()
    assert 'no test pairs' in (run/'logs'/'train.log').read_text()
    (loaded,), _ = load_runs(run)
    assert not loaded.tested and len(loaded.tables['test']) == summary['validation']['n']
    assert compare([str(results)]) == 0
    assert 'these runs have no test pairs' in next(results.rglob('report.md')).read_text()


def test_named_tests_have_their_row_in_the_results(forty, results, tmp_path, capsys):
    path, hard = FORMATS['csv'](tmp_path, forty[:30]), write_lines(tmp_path/'hard.jsonl', map(as_messages, forty[30:]))
    assert main(settings(path, f"data.tests={{hard: '{hard}'}}", 'desc=named', 'model=decoder_output')) == 0
    run = next(results.rglob('desc-named*'))
    assert summary_of(run)['tests']['hard']['n'] == 10
    assert len((run/'results'/'hard_pairs.jsonl').read_text().splitlines()) == 10
    assert (run/'data'/'hard_texts.jsonl.gz').exists()
    assert '; test none; hard ' in capsys.readouterr().out
    again = load_config(['data.name=x', f"data.tests.hard='{hard}'"])
    assert dict(again.data.tests) == {'hard': str(hard)}


@pytest.mark.parametrize('setting, says', [
    ('data.bad_rows=skip', 'must be one of error, drop'),
    ('data.tests={train: x}', 'not train or validation'),
    ('data.tests={a-b: x}', 'not train or validation'),
    ('data.columns.chosn=x', "did you mean 'data.columns.chosen'?"),
    ('data.splits.train=""', 'must be null or a name'),
    ('data.validation=""', 'must be null or a name')])
def test_settings_that_are_refused(setting, says):
    with pytest.raises(ConfigError) as e: load_config([setting])
    assert says in str(e.value)


def test_a_run_of_an_earlier_version_goes_on():
    "It lacks these settings, and it named the subsets; what it trains on is checked by its fingerprint."
    old = 'data: {name: mine, subdirs: [a]}\n'
    new = ('data: {name: mine, subdirs: null, splits: {train: null}, columns: {id: null}, validation: null, '
           'tests: {}, bad_rows: error}\n')
    assert changed_settings(old, new) == []
    assert changed_settings(old, new.replace('error', 'drop')) == ["data.bad_rows was absent, now 'drop'"]
