"`python -m rlhf_flant5.evaluate`: seven layouts of the same pairs, bad files, whole runs of the program."
import errno, gzip, json, os, signal
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, strategies as st
from rlhf_flant5 import evaluate
from rlhf_flant5.data import formats
from rlhf_flant5.backbone.t5 import Backbone
from rlhf_flant5.core.files import ConfigError
from rlhf_flant5.data.pairs import conversation_keys
from rlhf_flant5.metrics.accuracy import pair_scores, read_pair_table
from rlhf_flant5.models.base import readout_class
from rlhf_flant5.models.base import RewardModel
from rlhf_flant5.data.toy import toy_pairs, toy_tokenizer, toy_transformer
from transformers import T5Model
from rlhf_flant5.train import train
from conftest import examples, pairs_folder, program, short


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')/'model'; torch.manual_seed(0)
    readout_class('decoder_output')(Backbone(toy_transformer(cls=T5Model))).save_pretrained(folder, toy_tokenizer(), max_tokens=40, temperature=.01)
    return folder


@pytest.fixture(scope='module')
def pairs(): return toy_pairs(60, split='test').to_pandas()


def rows(pairs, layout):
    for p in pairs.itertuples():
        prompt, _, good = p.chosen.rpartition('\n\nAssistant: '); bad = p.rejected.rpartition('\n\nAssistant: ')[2]
        said = prompt.split('\n\n')[1:]; asked = [dict(role='user' if s.startswith('Human') else 'assistant', content=s.split(': ', 1)[1]) for s in said]
        answer = lambda text: [dict(role='assistant', content=text)]
        yield dict(id=p.id, subset=p.subset) | dict(
            hh=dict(chosen=p.chosen, rejected=p.rejected), texts=dict(prompt=prompt if len(said) > 1 else asked[0]['content'], chosen=good, rejected=bad),
            messages=dict(prompt=asked, chosen=answer(good), rejected=answer(bad)), conversations=dict(chosen=asked + answer(good), rejected=asked + answer(bad)),
            mixed=dict(prompt=asked, chosen=good, rejected=bad), beside=dict(prompt='not read', chosen=asked + answer(good), rejected=asked + answer(bad)))[layout]


def write(path, rows):
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wt') as f: f.write(''.join(json.dumps(r) + '\n' for r in rows))
    return path


@pytest.mark.parametrize('layout', ['texts', 'messages', 'conversations', 'mixed', 'beside'])
def test_every_layout_gives_the_rewards_of_hh(saved, pairs, layout, tmp_path):
    model = RewardModel.from_pretrained(saved); table = lambda path: evaluate.score_pairs(model, formats.read_pair_file(path)[0])
    hh = table(write(tmp_path/'hh.jsonl.gz', rows(pairs, 'hh'))); assert len(hh) > 40
    pd.testing.assert_frame_equal(table(write(tmp_path/'other.jsonl', rows(pairs, layout))), hh, check_exact=True)
    pd.DataFrame(rows(pairs, layout)).to_parquet(tmp_path/'other.parquet')
    pd.testing.assert_frame_equal(table(tmp_path/'other.parquet'), hh, check_exact=True)


def test_a_folder_is_the_same_as_its_files(saved, pairs_folder, tmp_path):
    model = RewardModel.from_pretrained(saved); folder = formats.load_pairs(str(pairs_folder), subsets=['helpful-base'])[0]; file = formats.load_pairs(str(pairs_folder/'helpful-base'/'test.jsonl.gz'))[0]
    assert len(folder) == 20 and [*folder.chosen] == [*file.chosen] and {*file.subset} == {'test'}
    assert evaluate.score_pairs(model, folder).margin.tolist() == evaluate.score_pairs(model, file).margin.tolist()
    assert len(formats.load_pairs(str(pairs_folder))[0]) == 80 and len(formats.load_pairs(str(pairs_folder), 'train')[0]) == 240


good = dict(prompt='Where is Nepal?', chosen='It is in Asia.', rejected='I do not know.')
@pytest.mark.parametrize('content, says', [
    ('{}\n', ':2: no chosen and no rejected'), ('[]\n', ':2: a row must be a JSON object'), ('{"chosen"\n', ':2: not JSON'), (json.dumps(good | dict(prompt=None)), ':2: HH-RLHF\'s dialogues, but the file began with'),
    (json.dumps(good | dict(prompt=[])), ':2: a prompt of messages'), (json.dumps(good | dict(chosen=3)), ':2: prompt is text, chosen int'), (json.dumps(good | dict(subset='a\x1b[31m')), ':2: subset'),
    (json.dumps(good | dict(chosen='\ud83d')), ':2: chosen: the text holds'), (json.dumps(good | dict(chosen=[dict(role='assistant', content=7)], rejected=[])), ':2: prompt is text, chosen answer')])
def test_a_bad_row_is_told_by_file_and_line(saved, tmp_path, capsys, content, says):
    path = tmp_path/'mine.jsonl'; path.write_text(json.dumps(good) + '\n' + content)
    assert evaluate.main([str(saved), str(path), '--out', str(tmp_path/'out')]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f'error: {path}') and says in said and said.count('\n') == 1 and '\x1b' not in said and not (tmp_path/'out').exists()


value = st.none() | st.text(max_size=8) | st.integers() | st.just('\n\nHuman: a\n\nAssistant: b') | st.lists(st.fixed_dictionaries({}, optional=dict(role=st.sampled_from(['user', 'assistant', 'system', 'tool']), content=st.text(max_size=5) | st.none())), max_size=3)
@examples(150)
@given(st.fixed_dictionaries({}, optional=dict(prompt=value, chosen=value, rejected=value, subset=value, id=value)))
def test_any_row_is_a_pair_or_one_line(row):
    try: pair = formats.as_pair(row, formats.row_format(row, 'f:1'), 'f:1', 's', 'i')
    except ConfigError as e: assert str(e).startswith('f:1: ') and '\n' not in str(e)
    else: assert all('\n\nHuman:' in pair[k] or '\n\nAssistant:' in pair[k] for k in ('chosen', 'rejected'))


def test_the_program_from_files_to_files(saved, pairs, tmp_path, monkeypatch, capsys):
    names = [s for w in evaluate.REWARDBENCH.values() for s in w]
    path = write(tmp_path/'bench.jsonl', (r | dict(subset=names[i % 23], id=i) for i, r in enumerate(rows(pairs, 'texts'))))
    done = program('rlhf_flant5.evaluate', saved, path, '--device', 'cpu', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path/'bench-evaluation'; assert sorted(f.name for f in out.iterdir()) == sorted(evaluate.FILES) and 'Traceback' not in done.stderr
    table, report = read_pair_table(out/'pairs.jsonl'), json.loads((out/'evaluation.json').read_text())
    scores = pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    assert report['scores']['accuracy'] == scores['accuracy'] and report['temperature'] == .01 and report['baselines'].keys() >= {'longer reply'}
    assert sum(c['read'] for c in report['counts'].values()) == 60 == sum(c['scored'] + c['too long'] + c['equal tokens'] for c in report['counts'].values())
    accuracy = scores['subsets']; chat = evaluate.REWARDBENCH['Chat']
    assert report['rewardbench']['categories']['Chat'] == pytest.approx(sum(accuracy[s]['accuracy']*w for s, w in chat.items())/sum(chat.values()))
    assert 'mean of the four' in done.stdout and f'all{100*scores["accuracy"]:>48.1f}' in done.stdout and (out/'evaluation.txt').read_text().strip() in done.stdout
    n_wrong, sheet = int((table.margin < 0).sum()), (out/'wrong.md').read_text()
    assert sheet.startswith(f'# {min(n_wrong, 50)} of {n_wrong} pairs that the model gets wrong, the surest first\n') and 'every model' not in sheet and 'mean of' not in sheet
    monkeypatch.chdir(tmp_path); assert evaluate.main([str(saved), str(path)]) == 2
    assert capsys.readouterr().err == 'error: bench-evaluation: holds evaluation.json already; name another folder with --out, or replace an earlier evaluation with --force\n'


def test_force_writes_through_no_link(saved, pairs, tmp_path):
    out, precious = tmp_path/'out', tmp_path/'precious'; out.mkdir(); precious.write_text('mine')
    for name in evaluate.FILES: (out/name).symlink_to(precious)
    path = write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh'))
    assert evaluate.main([str(saved), str(path), '--out', str(out), '--force', '--device', 'cpu', '--too-long', 'truncate_left']) == 0
    assert precious.read_text() == 'mine' and not any((out/name).is_symlink() for name in evaluate.FILES)
    assert evaluate.main([str(saved), str(path), '--out', str(tmp_path/'none'), '--device', 'cpu', '--too-long', 'error']) == (2 if any(len(t) > 40 for t in toy_tokenizer()([*pairs.chosen[:5], *pairs.rejected[:5]]).input_ids) else 0)


def test_nothing_is_written_through_a_link(saved, pairs, tmp_path, capsys):
    there, link = tmp_path/'there', tmp_path/'link'; there.mkdir(); link.symlink_to(there)
    path = write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh')); args = [str(saved), str(path), '--device', 'cpu', '--too-long', 'truncate_left', '--out']
    says = f'{link} is a link, and nothing is written through links; remove it'
    for more in ([], ['--force']):
        assert evaluate.main([*args, str(link), *more]) == 2 and capsys.readouterr().err == f'error: {says}\n'
    model, few = RewardModel.from_pretrained(saved), formats.read_pair_file(path)[0]; table, report = evaluate.evaluate(model, few, 'truncate_left')
    with pytest.raises(ConfigError) as e: evaluate.write_report(link, table, report, few)
    assert str(e.value) == says and not any(there.iterdir())
    link.unlink(); link.symlink_to(tmp_path/'none'); assert evaluate.main([*args, str(link)]) == 2 and not (tmp_path/'none').exists()
    assert evaluate.main([*args, str(there)]) == 0


def failing(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
@pytest.mark.parametrize('instead, code, says', [(failing, 1, 'failed: the system: No space left on device; name another folder with --out'), (lambda *_: signal.raise_signal(signal.SIGINT), 75, 'interrupted (SIGINT); the same command begins again')])
def test_a_full_disk_and_ctrl_c_are_one_line(saved, pairs, tmp_path, capsys, monkeypatch, instead, code, says):
    monkeypatch.setattr(evaluate, 'write_file', instead); out = tmp_path/'out'
    assert evaluate.main([str(saved), str(write(tmp_path/'few.jsonl', rows(pairs[:5], 'hh'))), '--out', str(out), '--device', 'cpu', '--too-long', 'truncate_left']) == code
    assert capsys.readouterr().err == says.format(out=out) + '\n'


def test_parquet_that_is_no_utf_8(tmp_path):
    "Arrow does not look at the bytes of a text before it is asked for."
    path, good = tmp_path/'latin.parquet', pa.array(['\n\nHuman: a\n\nAssistant: b'])
    latin = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array(['caf\xe9'.encode('latin-1')]).buffers()[1:]])
    pq.write_table(pa.table(dict(chosen=good, rejected=latin)), path)
    with pytest.raises(ConfigError) as e: formats.read_pair_file(path)
    assert str(e.value).startswith(f'{path}: cannot be read as Parquet (\'utf-8\' codec') and '\n' not in str(e.value)


@pytest.mark.parametrize('facts, says', [(dict(temperature=0), 'temperature in the model'), (dict(temperature='1'), 'temperature in the model'), (dict(temperature=True), 'temperature in the model'), (dict(max_tokens=-3), 'max_tokens in the model')])
def test_a_hostile_config_is_refused(saved, pairs, facts, says):
    model = RewardModel.from_pretrained(saved); model.config |= facts
    with pytest.raises(ConfigError, match=says): evaluate.evaluate(model, pairs[:3])


@examples(60)
@given(st.binary(max_size=200), st.sampled_from(['.jsonl', '.jsonl.gz', '.parquet', '.csv']))
def test_any_file_is_pairs_or_one_line(tmp_path_factory, data, end):
    path = tmp_path_factory.mktemp('f')/f'x{end}'; path.write_bytes(data)
    with pytest.raises(ConfigError) as e: formats.read_pair_file(path)
    assert str(e.value).startswith(str(path)) and '\n' not in str(e.value)


def evaluated(saved, path, out, *more): return evaluate.main([str(saved), str(path), '--out', str(out), '--device', 'cpu', *more])


def test_csv_gives_the_rewards_of_json(saved, pairs, tmp_path):
    model, texts = RewardModel.from_pretrained(saved), [*rows(pairs, 'texts')]
    pd.DataFrame(texts).to_csv(tmp_path/'a.csv', index=False, encoding='utf-8-sig')          # as Excel writes it
    table = lambda path: evaluate.score_pairs(model, formats.read_pair_file(path)[0])
    pd.testing.assert_frame_equal(table(tmp_path/'a.csv'), table(write(tmp_path/'a.jsonl', texts)), check_exact=True)


@pytest.mark.parametrize('name, text, says', [
    ('a.txt', 'x', '{path}: a file of another kind; evaluate reads .jsonl, .jsonl.gz, .csv, .parquet files, folders'), ('a.csv', 'chosen\n"', '{path}: cannot be read as CSV'),
    ('a.csv', 'prompt,chosen\na,b\n', '{path}:1: no rejected'), ('a.csv', '', '{path}: cannot be read as CSV'), ('a.csv', 'chosen,rejected\n', '{path}: no row')])
def test_a_file_of_another_kind(saved, tmp_path, capsys, name, text, says):
    (path := tmp_path/name).write_text(text)
    assert evaluated(saved, path, tmp_path/'out') == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ' + says.format(path=path)) and said.count('\n') == 1 and 'data.name' not in said


def test_messages_name_no_setting_of_training(saved, pairs_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    (tmp_path/'empty').mkdir()
    for given, says in {str(tmp_path/'none'): 'no such folder', 'no one/pairs': 'no such folder', str(tmp_path/'empty'): 'no <subset>/test.jsonl.gz in this folder',
                        'mine/pairs': 'no such folder here'}.items():
        assert evaluated(saved, given, tmp_path/'out') == 2
        said = capsys.readouterr().err
        assert said.startswith(f'error: {given}: {says}') and 'evaluate reads .jsonl' in said and 'data.' not in said and 'experiment' not in said and said.count('\n') == 1
    assert evaluated(saved, pairs_folder, tmp_path/'out', '--subsets', 'mine') == 2
    assert 'no subset mine with a test.jsonl.gz; there are harmless-base, helpful-base' in capsys.readouterr().err


def test_pairs_in_memory(saved, pairs, tmp_path):
    "What `load_pairs` gives, a DataFrame and a data set, of any layout, give the rewards of the file."
    model, path = RewardModel.from_pretrained(saved), write(tmp_path/'a.jsonl', rows(pairs, 'messages'))
    loaded = formats.load_pairs(str(path)); table, report = evaluate.evaluate(model, loaded)
    parquet = tmp_path/'a.parquet'
    pd.DataFrame(rows(pairs, 'messages')).to_parquet(parquet)
    for given in (loaded[0], pd.DataFrame(rows(pairs, 'messages')), Dataset.from_list([*rows(pairs, 'messages')]), pd.read_parquet(parquet), Dataset.from_parquet(str(parquet))):
        same, other = evaluate.evaluate(model, given)
        pd.testing.assert_frame_equal(same, table, check_exact=True)
        assert other == report
    with pytest.raises(ConfigError, match='row:0: no chosen'): evaluate.evaluate(model, pd.DataFrame(dict(text=['a'])))


def test_own_columns_are_carried_and_named(saved, pairs, tmp_path, capsys):
    given = [{'question': r['prompt'], 'good': r['chosen'], 'rejected': r['rejected'], 'margin': i/7, 'who': 'caf\xe9', 'at': None if i else [1]} for i, r in enumerate(rows(pairs, 'texts'))]
    path = write(tmp_path/'a.jsonl', given)
    assert evaluated(saved, path, tmp_path/'out', '--prompt', 'question', '--chosen', 'good') == 0
    assert len(read_pair_table(tmp_path/'out'/'pairs.jsonl')) == len(lines := (tmp_path/'out'/'pairs.jsonl').read_text().splitlines())
    for line in map(json.loads, lines): assert line['own'] == {k: given[int(line['id'].split(':')[1]) - 1][k] for k in ('margin', 'who', 'at')} and line['margin'] == line['reward_chosen'] - line['reward_rejected']
    assert evaluated(saved, path, tmp_path/'out2', '--prompt', 'ask') == 2 and f"{path}:1: no column 'ask'; this row has 'question'" in capsys.readouterr().err


def test_a_share_of_bad_rows(saved, pairs, tmp_path, capsys):
    path = write(tmp_path/'a.jsonl', rows(pairs, 'hh'))
    path.write_text('no JSON\n' + path.read_text() + '{}\n')
    assert evaluated(saved, path, tmp_path/'out') == 2 and f'{path}:1: not JSON' in capsys.readouterr().err
    assert evaluated(saved, path, tmp_path/'out', '--tolerate', '.01') == 2
    assert '(the first of 2 bad rows of 62, more than the share of 0.01 that is tolerated)' in capsys.readouterr().err
    assert evaluated(saved, path, tmp_path/'out', '--tolerate', '.05') == 0
    said = capsys.readouterr().out
    assert f'left out  {path}:1: not JSON' in said and f'left out  {path}:62: no chosen' in said
    assert json.loads((tmp_path/'out'/'evaluation.json').read_text())['n_bad_rows'] == 2
    assert evaluated(saved, 'toy', tmp_path/'out3', '--tolerate', '.05') == 2 and 'for a file alone' in capsys.readouterr().err


def test_most_pairs_too_long_is_a_warning(saved, pairs):
    model = RewardModel.from_pretrained(saved)
    said = lambda most: evaluate.show_report((setattr(model, 'config', model.config | dict(max_tokens=most)), evaluate.evaluate(model, pairs))[1][1])
    c, r = (toy_tokenizer()([*pairs[side]]).input_ids for side in ('chosen', 'rejected'))
    lengths = sorted(max(len(a), len(b)) for a, b in zip(c, r))
    few = sum(n <= lengths[10] for n in lengths)
    assert f'warning: {60 - few} of 60 pairs are not scored, too long for the model (max_tokens {lengths[10]})' in said(lengths[10]) and 'warning' not in said(lengths[50])


def test_intervals_are_by_conversation(saved, pairs):
    model = RewardModel.from_pretrained(saved); many = pd.concat([pairs, pairs.assign(id=pairs.id + '-again')], ignore_index=True)
    table, report = evaluate.evaluate(model, many)
    keys = conversation_keys(many.set_index('id').loc[table.id].chosen)
    s, plain = report['scores'], pair_scores(table.reward_chosen, table.reward_rejected, table.subset)
    assert s['n_conversations'] == len({*keys}) and s['low'] < plain['low'] and s['design_effect'] > 1.5 and s['subsets'].keys() == plain['subsets'].keys()
    assert f'{len(table)} pairs of {len({*keys})} conversations, design effect {s["design_effect"]:.2f}' in evaluate.show_report(report)
    assert all('design_effect' in v for v in report['baselines'].values())


def test_a_runs_table_and_evaluate_agree(results, tmp_path, capsys):
    "In fp32 to the digit, intervals by conversation too; and what the run had is said beside it."
    summary = train(['experiment=toy', 'model=decoder_output', 'training.precision=fp32', 'data.n_train_data=64', 'data.n_test_data=0', 'training.loop.n_val_data=64', *short])
    assert evaluated(summary['folder']/'simulation'/'best_model', 'toy', tmp_path/'out') == 0
    said, report, own = capsys.readouterr().out, json.loads((tmp_path/'out'/'evaluation.json').read_text()), summary['test']
    assert own['n_conversations'] == 974 == report['scores']['n_conversations'] and own['design_effect'] > 0
    for k in ('accuracy', 'low', 'high', 'design_effect'): assert report['scores'][k] == pytest.approx(own[k], abs=2e-3)
    assert f'its run had {100*own["accuracy"]:.1f}% of 2,000 test pairs; ' in said
