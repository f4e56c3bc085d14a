"`python -m rlhf_flant5.evaluate`: seven layouts of the same pairs, bad files, whole runs of the program."
import errno, gzip, json, os, signal
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import examples, program, summary_of
from datasets import Dataset
from hypothesis import given, strategies as st
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data import formats, reading
from rlhf_flant5.data.pairs import conversation_keys
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer
from rlhf_flant5.evaluate import main
from rlhf_flant5.metrics.accuracy import pair_scores, read_pair_table
from rlhf_flant5.models.base import readout_class, RewardModel
from rlhf_flant5.use import evaluation
from rlhf_flant5.use.evaluation import evaluate, FILES, REWARDBENCH, score_pairs, show_report, write_report
from transformers import T5Model


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'model'
    torch.manual_seed(0)
    model = readout_class('decoder_output')(Backbone(toy_transformer(cls=T5Model)))
    model.save_pretrained(folder, toy_tokenizer(), max_tokens=40, temperature=.01)
    return folder


@pytest.fixture(scope='module')
def model(saved): return RewardModel.from_pretrained(saved)


@pytest.fixture(scope='module')
def pairs(): return toy_pairs(60, split='test').to_pandas()


def as_messages(turns):
    "Turns such as `Human: Who?` as messages."
    roles = dict(Human='user', Assistant='assistant')
    for turn in turns:
        speaker, content = turn.split(': ', 1)
        yield dict(role=roles[speaker], content=content)


def in_layout(layout, pair):
    prompt, _, good = pair.chosen.rpartition('\n\nAssistant: ')
    bad = pair.rejected.rpartition('\n\nAssistant: ')[2]
    turns = [*as_messages(prompt.split('\n\n')[1:])]
    question = prompt if len(turns) > 1 else turns[0]['content']
    good_answer, bad_answer = ([dict(role='assistant', content=text)] for text in (good, bad))
    return dict(
        hh=dict(chosen=pair.chosen, rejected=pair.rejected),
        texts=dict(prompt=question, chosen=good, rejected=bad),
        messages=dict(prompt=turns, chosen=good_answer, rejected=bad_answer),
        conversations=dict(chosen=turns + good_answer, rejected=turns + bad_answer),
        mixed=dict(prompt=turns, chosen=good, rejected=bad),
        beside=dict(prompt='not read', chosen=turns + good_answer, rejected=turns + bad_answer))[layout]


def rows(pairs, layout):
    for pair in pairs.itertuples(): yield dict(id=pair.id, subset=pair.subset) | in_layout(layout, pair)


def write(path, rows):
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'wt') as f: f.write(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def file_scores(model, path): return score_pairs(model, reading.load_pairs(str(path))[0])


def longest(pairs):
    "Tokens of the longer text of each pair."
    chosen, rejected = (toy_tokenizer()([*pairs[side]]).input_ids for side in ('chosen', 'rejected'))
    return np.array([max(len(c), len(r)) for c, r in zip(chosen, rejected)])


def assert_same_table(a, b): pd.testing.assert_frame_equal(a, b, check_exact=True)


def run(saved, path, out, *more):
    "The program on a CPU; its exit code."
    return main([str(saved), str(path), '--out', str(out), '--device', 'cpu', *more])


def read_report(out): return json.loads((out/'evaluation.json').read_text())


@pytest.mark.parametrize('layout', ['texts', 'messages', 'conversations', 'mixed', 'beside'])
def test_every_layout_gives_the_rewards_of_hh(model, pairs, layout, tmp_path):
    hh = file_scores(model, write(tmp_path/'hh.jsonl.gz', rows(pairs, 'hh')))
    assert len(hh) > 40
    assert_same_table(file_scores(model, write(tmp_path/'other.jsonl', rows(pairs, layout))), hh)
    pd.DataFrame(rows(pairs, layout)).to_parquet(tmp_path/'other.parquet')
    assert_same_table(file_scores(model, tmp_path/'other.parquet'), hh)


def test_a_folder_is_the_same_as_its_files(model, pairs_folder):
    folder, _ = reading.load_pairs(str(pairs_folder), subsets=['helpful-base'])
    file, _ = reading.load_pairs(str(pairs_folder/'helpful-base'/'test.jsonl.gz'))
    assert len(folder) == 20
    assert [*folder.chosen] == [*file.chosen]
    assert {*file.subset} == {'test'}
    assert score_pairs(model, folder).margin.tolist() == score_pairs(model, file).margin.tolist()
    assert len(reading.load_pairs(str(pairs_folder))[0]) == 80
    assert len(reading.load_pairs(str(pairs_folder), 'train')[0]) == 240


good = dict(prompt='Where is Nepal?', chosen='It is in Asia.', rejected='I do not know.')
mixed_sides = dict(chosen=[dict(role='assistant', content=7)], rejected=[])
BAD_ROWS = dict(
    empty=('{}\n', ':2: no chosen and no rejected'),
    a_list=('[]\n', ':2: a row must be a JSON object'),
    cut_off=('{"chosen"\n', ':2: not JSON'),
    another_layout=(json.dumps(good | dict(prompt=None)), ":2: HH-RLHF's dialogues, but the file began with"),
    prompt_of_messages=(json.dumps(good | dict(prompt=[])), ':2: a prompt of messages'),
    chosen_is_a_number=(json.dumps(good | dict(chosen=3)), ':2: prompt is text, chosen int'),
    control_character=(json.dumps(good | dict(subset='a\x1b[31m')), ':2: subset'),
    half_a_surrogate=(json.dumps(good | dict(chosen='\ud83d')), ':2: chosen: the text holds'),
    unlike_sides=(json.dumps(good | mixed_sides), ':2: prompt is text, chosen answer'))


@pytest.mark.parametrize('content, says', BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_by_file_and_line(saved, tmp_path, capsys, content, says):
    path, out = tmp_path/'mine.jsonl', tmp_path/'out'
    path.write_text(json.dumps(good) + '\n' + content)
    assert main([str(saved), str(path), '--out', str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {path}')
    assert says in error
    assert error.count('\n') == 1 and '\x1b' not in error
    assert not out.exists()


roles = st.sampled_from(['user', 'assistant', 'system', 'tool'])
message = st.fixed_dictionaries({}, optional=dict(role=roles, content=st.text(max_size=5) | st.none()))
text = st.text(max_size=8) | st.just('\n\nHuman: a\n\nAssistant: b')
value = st.none() | text | st.integers() | st.lists(message, max_size=3)
any_row = st.fixed_dictionaries({}, optional=dict(prompt=value, chosen=value, rejected=value, subset=value, id=value))


@examples(150)
@given(any_row)
def test_any_row_is_a_pair_or_one_line(row):
    try: pair = formats.as_pair(row, formats.row_format(row, 'f:1'), 'f:1', 's', 'i')
    except ConfigError as e:
        assert str(e).startswith('f:1: ') and '\n' not in str(e)
        return
    for side in ('chosen', 'rejected'): assert '\n\nHuman:' in pair[side] or '\n\nAssistant:' in pair[side]


def test_the_program_from_files_to_files(saved, pairs, tmp_path, monkeypatch, capsys):
    names = [subset for weights in REWARDBENCH.values() for subset in weights]
    bench = [row | dict(subset=names[i % 23], id=i) for i, row in enumerate(rows(pairs, 'texts'))]
    path, out = write(tmp_path/'bench.jsonl', bench), tmp_path/'bench-evaluation'
    done = program('rlhf_flant5.evaluate', saved, path, '--device', 'cpu', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    assert sorted(f.name for f in out.iterdir()) == sorted(FILES)

    table, report = read_pair_table(out/'pairs.jsonl'), read_report(out)
    scores = pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    assert report['scores']['accuracy'] == scores['accuracy']
    assert report['temperature'] == .01
    assert report['baselines'].keys() >= {'longer reply'}
    counts = report['counts'].values()
    assert sum(c['read'] for c in counts) == 60
    assert sum(c['scored'] + c['too long'] + c['equal tokens'] for c in counts) == 60

    chat, subsets = REWARDBENCH['Chat'], scores['subsets']
    weighted = sum(subsets[s]['accuracy']*weight for s, weight in chat.items())/sum(chat.values())
    assert report['rewardbench']['categories']['Chat'] == pytest.approx(weighted)

    assert 'mean of the four' in done.stdout
    assert f'all{100*scores["accuracy"]:>48.1f}' in done.stdout
    assert (out/'evaluation.txt').read_text().strip() in done.stdout

    n_wrong, sheet = int((table.margin < 0).sum()), (out/'wrong.md').read_text()
    assert sheet.startswith(f'# {min(n_wrong, 50)} of {n_wrong} pairs that the model gets wrong, the surest first\n')
    assert 'every model' not in sheet and 'mean of' not in sheet

    monkeypatch.chdir(tmp_path)
    assert main([str(saved), str(path)]) == 2
    assert capsys.readouterr().err == ('error: bench-evaluation: holds evaluation.json already; '
                                       'name another folder with --out, '
                                       'or replace an earlier evaluation with --force\n')


def test_force_writes_through_no_link(saved, pairs, tmp_path):
    out, precious = tmp_path/'out', tmp_path/'precious'
    out.mkdir()
    precious.write_text('mine')
    for name in FILES: (out/name).symlink_to(precious)
    path = write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh'))
    assert run(saved, path, out, '--force', '--too-long', 'truncate_left') == 0
    assert precious.read_text() == 'mine'
    assert not any((out/name).is_symlink() for name in FILES)


def test_too_long_is_an_error_if_it_is_asked_for(saved, pairs, tmp_path, capsys):
    is_long = longest(pairs) > 40
    short_pairs, long_pairs = pairs[~is_long], pairs[is_long]
    assert len(short_pairs) and len(long_pairs)
    fits = write(tmp_path/'short.jsonl', rows(short_pairs[:5], 'hh'))
    assert run(saved, fits, tmp_path/'short', '--too-long', 'error') == 0
    beyond = write(tmp_path/'long.jsonl', rows(long_pairs[:1], 'hh'))
    assert run(saved, beyond, tmp_path/'long', '--too-long', 'error') == 2
    assert f'error: {long_pairs.id.iloc[0]}: a text of more than 40 tokens' in capsys.readouterr().err


def test_nothing_is_written_through_a_link(saved, model, pairs, tmp_path, capsys):
    folder, link = tmp_path/'there', tmp_path/'link'
    folder.mkdir()
    link.symlink_to(folder)
    path = write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh'))
    cut = '--too-long', 'truncate_left'
    says = f'{link} is a link, and nothing is written through links; remove it'
    for force in ([], ['--force']):
        assert run(saved, path, link, *cut, *force) == 2
        assert capsys.readouterr().err == f'error: {says}\n'

    few, _ = reading.load_pairs(str(path))
    table, report = evaluate(model, few, 'truncate_left')
    with pytest.raises(ConfigError) as e: write_report(link, table, report, few)
    assert str(e.value) == says
    assert not any(folder.iterdir())

    link.unlink()
    link.symlink_to(tmp_path/'none')
    assert run(saved, path, link, *cut) == 2
    assert not (tmp_path/'none').exists()
    assert run(saved, path, folder, *cut) == 0


def full_disk(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ctrl_c(*_): signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('instead, code, says', [
    (full_disk, 1, 'failed: the system: No space left on device; name another folder with --out'),
    (ctrl_c, 75, 'interrupted (SIGINT); the same command begins again')], ids=['full disk', 'Ctrl-C'])
def test_a_full_disk_and_ctrl_c_are_one_line(saved, pairs, tmp_path, capsys, monkeypatch, instead, code, says):
    monkeypatch.setattr(evaluation, 'write_file', instead)
    path = write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh'))
    assert run(saved, path, tmp_path/'out', '--too-long', 'truncate_left') == code
    assert capsys.readouterr().err == says + '\n'


def test_parquet_that_is_no_utf_8(tmp_path):
    "Arrow does not look at the bytes of a text before it is asked for."
    path, dialogue = tmp_path/'latin.parquet', pa.array(['\n\nHuman: a\n\nAssistant: b'])
    offsets_and_bytes = pa.array(['caf\xe9'.encode('latin-1')]).buffers()[1:]
    latin = pa.Array.from_buffers(pa.string(), 1, [None, *offsets_and_bytes])
    pq.write_table(pa.table(dict(chosen=dialogue, rejected=latin)), path)
    with pytest.raises(ConfigError) as e: reading.load_pairs(str(path))
    assert str(e.value).startswith(f"{path}: cannot be read as Parquet ('utf-8' codec")
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('facts, says', [
    pytest.param(dict(temperature=0), 'temperature in the model', id='temperature 0'),
    pytest.param(dict(temperature='1'), 'temperature in the model', id='temperature as text'),
    pytest.param(dict(temperature=True), 'temperature in the model', id='temperature true'),
    pytest.param(dict(temperature=float('nan')), 'temperature in the model', id='temperature NaN'),
    pytest.param(dict(max_tokens=-3), 'max_tokens in the model', id='max_tokens below 0'),
    pytest.param(dict(max_tokens=4.5), 'max_tokens in the model', id='max_tokens with a fraction'),
    pytest.param(dict(max_tokens=float('inf')), 'max_tokens in the model', id='max_tokens infinite')])
def test_a_hostile_config_is_refused(saved, pairs, facts, says):
    model = RewardModel.from_pretrained(saved)
    model.config |= facts
    with pytest.raises(ConfigError, match=says): evaluate(model, pairs[:3])


@examples(60)
@given(st.binary(max_size=200), st.sampled_from(['.jsonl', '.jsonl.gz', '.parquet', '.csv']))
def test_any_file_is_pairs_or_one_line(tmp_path_factory, data, end):
    path = tmp_path_factory.mktemp('f')/f'x{end}'
    path.write_bytes(data)
    with pytest.raises(ConfigError) as e: reading.load_pairs(str(path))
    assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)


def test_csv_gives_the_rewards_of_json(model, pairs, tmp_path):
    texts = [*rows(pairs, 'texts')]
    pd.DataFrame(texts).to_csv(tmp_path/'a.csv', index=False, encoding='utf-8-sig')          # as Excel writes it
    json_file = write(tmp_path/'a.jsonl', texts)
    assert_same_table(file_scores(model, tmp_path/'a.csv'), file_scores(model, json_file))


OTHER_FILES = dict(
    text=('a.txt', 'x', '{path}: a file of another kind; '
                        'pairs are read from .jsonl, .jsonl.gz, .csv, .parquet files, folders'),
    open_quote=('a.csv', 'chosen\n"', '{path}: cannot be read as CSV'),
    no_rejected=('a.csv', 'prompt,chosen\na,b\n', '{path}:1: no rejected'),
    empty=('a.csv', '', '{path}: cannot be read as CSV'),
    header_alone=('a.csv', 'chosen,rejected\n', '{path}: no row'))


@pytest.mark.parametrize('name, content, says', OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind(saved, tmp_path, capsys, name, content, says):
    path = tmp_path/name
    path.write_text(content)
    assert run(saved, path, tmp_path/'out') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ' + says.format(path=path))
    assert error.count('\n') == 1 and 'data.name' not in error


def test_messages_name_no_setting_of_training(saved, pairs_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    (tmp_path/'empty').mkdir()
    cases = {str(tmp_path/'none'): 'no such folder',
             'no one/pairs': 'no such folder',
             str(tmp_path/'empty'): 'no test file, such as test.jsonl.gz or <subset>/test.jsonl.gz; there are none',
             'mine/pairs': 'no such folder here'}
    for name, says in cases.items():
        assert run(saved, name, tmp_path/'out') == 2
        error = capsys.readouterr().err
        assert error.startswith(f'error: {name}: {says}')
        assert 'pairs are read from .jsonl' in error
        assert 'data.' not in error and 'experiment' not in error
        assert error.count('\n') == 1
    assert run(saved, pairs_folder, tmp_path/'out', '--subsets', 'mine') == 2
    assert 'no test file of mine, such as test.jsonl.gz or <subset>/test.jsonl.gz; there are harmless-base/test' in capsys.readouterr().err


def test_pairs_in_memory(model, pairs, tmp_path):
    "What `load_pairs` gives, a DataFrame and a data set, of any layout, give the rewards of the file."
    messages, parquet = [*rows(pairs, 'messages')], tmp_path/'a.parquet'
    pd.DataFrame(messages).to_parquet(parquet)
    loaded = reading.load_pairs(str(write(tmp_path/'a.jsonl', messages)))
    table, report = evaluate(model, loaded)
    kinds = dict(
        loaded=loaded[0],
        frame=pd.DataFrame(messages),
        dataset=Dataset.from_list(messages),
        frame_of_parquet=pd.read_parquet(parquet),
        dataset_of_parquet=Dataset.from_parquet(str(parquet)))
    for kind, in_memory in kinds.items():
        same, other = evaluate(model, in_memory)
        assert_same_table(same, table)
        assert other == report, kind
    with pytest.raises(ConfigError, match='row:0: no chosen'): evaluate(model, pd.DataFrame(dict(text=['a'])))


def test_own_columns_are_carried_and_named(saved, pairs, tmp_path, capsys):
    own = [dict(margin=i/7, who='caf\xe9', at=None if i else [1]) for i in range(len(pairs))]
    texts = [dict(question=row['prompt'], good=row['chosen'], rejected=row['rejected'])
             for row in rows(pairs, 'texts')]
    path, out = tmp_path/'a.jsonl', tmp_path/'out'
    write(path, [row | more for row, more in zip(texts, own)])
    assert run(saved, path, out, '--prompt', 'question', '--chosen', 'good') == 0

    written = [json.loads(line) for line in (out/'pairs.jsonl').read_text().splitlines()]
    assert len(read_pair_table(out/'pairs.jsonl')) == len(written)
    for pair in written:
        line = int(pair['id'].split(':')[1])
        assert pair['own'] == own[line - 1]
        assert pair['margin'] == pair['reward_chosen'] - pair['reward_rejected']

    assert run(saved, path, tmp_path/'out2', '--prompt', 'ask') == 2
    assert f"{path}:1: no column 'ask'; this row has 'question'" in capsys.readouterr().err


def test_a_share_of_bad_rows(saved, pairs, tmp_path, capsys):
    path, out = write(tmp_path/'a.jsonl', rows(pairs, 'hh')), tmp_path/'out'
    path.write_text('no JSON\n' + path.read_text() + '{}\n')
    assert run(saved, path, out) == 2
    assert f'{path}:1: not JSON' in capsys.readouterr().err

    assert run(saved, path, out, '--tolerate', '.01') == 2
    assert ('(the first of 2 bad rows of 62, more than the share of 0.01 that is tolerated)'
            in capsys.readouterr().err)

    assert run(saved, path, out, '--tolerate', '.05') == 0
    printed = capsys.readouterr().out
    assert f'left out  {path}:1: not JSON' in printed
    assert f'left out  {path}:62: no chosen' in printed
    assert read_report(out)['n_bad_rows'] == 2


def test_most_pairs_too_long_is_a_warning(saved, pairs):
    model = RewardModel.from_pretrained(saved)
    def report_for(max_tokens):
        model.config = model.config | dict(max_tokens=max_tokens)
        return show_report(evaluate(model, pairs)[1])
    lengths = np.sort(longest(pairs))
    n_lost = (lengths > lengths[10]).sum()
    warning = f'warning: {n_lost} of 60 pairs are not scored, too long for the model (max_tokens {lengths[10]})'
    assert warning in report_for(int(lengths[10]))
    assert 'warning' not in report_for(int(lengths[50]))


def test_intervals_are_by_conversation(model, pairs):
    again = pairs.assign(id=pairs.id + '-again')
    twice = pd.concat([pairs, again], ignore_index=True)
    table, report = evaluate(model, twice)
    n_conversations = len({*conversation_keys(twice.set_index('id').loc[table.id].chosen)})
    by_conversation = report['scores']
    plain = pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    assert by_conversation['n_conversations'] == n_conversations
    assert by_conversation['low'] < plain['low']
    assert by_conversation['design_effect'] > 1.5
    assert by_conversation['subsets'].keys() == plain['subsets'].keys()
    line = (f'{len(table)} pairs of {n_conversations} conversations, '
            f'design effect {by_conversation["design_effect"]:.2f}')
    assert line in show_report(report)
    assert all('design_effect' in scores for scores in report['baselines'].values())


def test_a_runs_table_and_evaluate_agree(trained_run, tmp_path, capsys):
    "In fp32 to the digit, intervals by conversation too; and what the run had is said beside it."
    best, out = trained_run/'simulation'/'best_model', tmp_path/'out'
    assert run(best, 'toy', out) == 0
    printed, scores, own = capsys.readouterr().out, read_report(out)['scores'], summary_of(trained_run)['test']
    assert scores['n_conversations'] == own['n_conversations'] == 974
    assert own['design_effect'] > 0
    for k in ('accuracy', 'low', 'high', 'design_effect'): assert scores[k] == pytest.approx(own[k], abs=2e-3)
    assert f'its run had {100*own["accuracy"]:.1f}% of 2,000 test pairs; ' in printed
