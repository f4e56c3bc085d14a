"What all programs share: answers before PyTorch is imported, signals, exit codes, output in any locale."
import importlib, json, os, pickle, re, signal, subprocess, sys, time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
import pytest
from omegaconf import OmegaConf
from rlhf_flant5.config import compose, names, schema
from rlhf_flant5.core import files, program as programs
from conftest import program, root, saved_run

WATCH = '''
import os, signal, sys
class Watch:   # names the moment at which a module is asked for
    def find_spec(self, name, *_):
        if name == os.environ.get('STOP_AT'): os.kill(os.getpid(), int(os.environ['STOP_BY']))
        if name == os.environ.get('MUST_NOT'): os.write(1, b'imported ' + name.encode())
sys.meta_path.insert(0, Watch())
'''


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
    "Run a program whose imports are watched."
    folder = tmp_path_factory.mktemp('watch')
    (folder/'sitecustomize.py').write_text(WATCH)
    return lambda *args, **env: program(*args, env={'PYTHONPATH': f'{folder}:{root}'} | env)


@pytest.mark.parametrize('name', programs.PROGRAMS)
def test_help_needs_no_torch(watched, name):
    done = watched(f'rlhf_flant5.{name}', '--help', MUST_NOT='torch')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'imported torch' not in done.stdout
    for part in (programs.PROGRAMS[name], '  75 interrupted by', '--version'): assert part in done.stdout


MISTAKES = {
    'train experimnt=toy': "did you mean 'experiment'?",
    'train -m model=decoder_output,layerwise_attention lr=3': 'here it is training.optimizer.init_lr',
    'train experiment=toy training.loop.n_epochs=0': 'must be at least 1',
    'sweep --seads 3': 'did you mean --seeds?',
    'doctor data.nam=x': "did you mean 'data.name'?",
    'evaluate x': 'the following arguments are required: pairs',
    'publish pusch a b': 'invalid choice'}


@pytest.mark.parametrize('command, answer', MISTAKES.items(), ids=MISTAKES)
def test_mistakes_need_no_torch(watched, command, answer):
    name, *rest = command.split()
    done = watched(f'rlhf_flant5.{name}', *rest, MUST_NOT='torch')
    assert (done.returncode, done.stdout) == (2, '')
    assert re.fullmatch(r'error: [^\n]*\n', done.stderr), done.stderr
    assert answer in done.stderr


@pytest.mark.parametrize('args, answer', [
    pytest.param(['rlhf_flant5.score', '--version'], 'rlhf_flant5 0.1', id='version'),
    pytest.param(['rlhf_flant5'], '  sweep        Train readouts', id='list'),
    pytest.param(['rlhf_flant5', 'train', '--help-settings'], 'model.cross_layer_pooling_output_dim=256', id='settings'),
    pytest.param(['rlhf_flant5', 'doctor', '--cfg', 'seed=7'], 'seed: 7 ', id='configuration')])
def test_answers_need_no_torch(watched, args, answer):
    done = watched(*args, MUST_NOT='torch')
    assert (done.returncode, done.stderr) == (0, '')
    assert answer in done.stdout and 'imported torch' not in done.stdout, done.stdout


def test_a_program_that_is_none(watched):
    done = watched('rlhf_flant5', 'trian')
    assert (done.returncode, done.stderr) == (2, "error: 'trian' is no program; did you mean train?\n")


@pytest.mark.parametrize('at, by', [
    ('argparse', signal.SIGINT),
    ('hydra', signal.SIGTERM),
    ('torch', signal.SIGINT),
    ('transformers', signal.SIGTERM),
    ('datasets', signal.SIGINT)])
def test_interrupted_while_it_is_imported(watched, at, by, tmp_path):
    env = dict(STOP_AT=at, STOP_BY=str(int(by)), RESULTS_ROOT_DIR=str(tmp_path))
    done = watched('rlhf_flant5.train', 'experiment=toy', **env)
    assert (done.returncode, done.stdout, done.stderr) == (75, '', f'interrupted ({by.name})\n')
    assert not [*tmp_path.iterdir()]


def test_importing_the_package_is_light():
    code = '''if True:
        import rlhf_flant5, sys, signal
        assert 'torch' not in sys.modules and 'RewardModel' in dir(rlhf_flant5)
        import rlhf_flant5.core.program, rlhf_flant5.config.compose
        assert not {'torch', 'matplotlib', 'accelerate'} & sys.modules.keys()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        from rlhf_flant5 import RewardModel
        print(*[f for f in ('score', 'compare', 'rank', 'explain') if callable(getattr(RewardModel, f))])'''
    env = os.environ | {'PYTHONPATH': str(root)}
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, env=env)
    assert done.stdout == 'score compare rank explain\n', done.stderr


@pytest.fixture
def python(tmp_path, monkeypatch):
    "Whatever is started with Python's own name is this shell script."
    def be(script):
        path = tmp_path/'python'
        path.write_text(f'#!/bin/sh\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, 'executable', str(path))
    return be


@pytest.mark.parametrize('command', [
    'train -m -j 2 seed=1,2',
    'sweep --readouts decoder_output --seeds 1 --transformer frozen --no-baselines'])
def test_a_killed_process_is_a_failure(command, results, python):
    "-9 of a child is code 1 of its parent, not 0, -9 or 9."
    name, *args = command.split()
    main = importlib.import_module(f'rlhf_flant5.{name}').main
    python('kill -9 $$')
    assert main([*args, 'experiment=toy', 'sim_man.allow_untracked=true']) == 1


@pytest.mark.parametrize('command, line', [
    ('train -m -j 2 seed=1,2', r'reward-model-\d +threads (\d+)'),
    ('sweep --readouts decoder_output --seeds 1,2 --transformer trained --no-baselines -j 2', r'threads (\d+)')])
def test_processes_share_the_cores(command, line, results, python, monkeypatch, capsys):
    "Both ways of running several at a time give each its share, or what the user has set."
    monkeypatch.setattr(os, 'cpu_count', lambda: 6)
    name, *args = command.split()
    main = importlib.import_module(f'rlhf_flant5.{name}').main
    python('echo threads $OMP_NUM_THREADS; exit 0')
    for given, n_threads in (None, '3'), ('5', '5'):
        if given: monkeypatch.setenv('OMP_NUM_THREADS', given)
        else: monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        assert main([*args, 'experiment=toy', 'sim_man.allow_untracked=true']) == 0
        assert re.findall(line, capsys.readouterr().out) == [n_threads]*2


# options of a signature

def options_of(*argv):
    "What a function with every kind of parameter is called with."
    def work(
        first:Path,                                                          # by its place
        rest:list[int],                                                      # one or more
        *,
        out:str,                                                             # must be given: 100%
        n:Annotated[int, programs.Option('-n', metavar='N')]=1,
        only:Annotated[Sequence[str], programs.Option(action='append')]=(),  # given again
        kinds:Sequence[Literal['a', 'b']]=('a',),
        share:float|None=None,
        loud_words:bool=False,
        argv:list[str],
    ): called.update(locals())
    called = {}
    assert programs.program('score')(work)([*argv]) == 0
    return {k: v for k, v in called.items() if k != 'called'}


def test_options_of_a_signature():
    defaults = dict(first=Path('a'), rest=[1], out='b', n=1, only=[], kinds=['a'], share=None, loud_words=False)
    few = 'a', '1', '--out', 'b'
    many = (*few, '-n', '3', '--only', 'x', '--only', 'y', '--kinds', 'b', 'a', '--share', '.5', '--loud-words')
    given = dict(n=3, only=['x', 'y'], kinds=['b', 'a'], share=.5, loud_words=True)
    for argv, found in (few, {}), (many, given), (few, {}):       # an appended list is not the default of the next call
        assert options_of(*argv) == defaults | found | dict(argv=[*argv])


@pytest.mark.parametrize('words, answer', [
    ('a 1', 'the following arguments are required: --out'),
    ('a x --out b', "argument rest: invalid int value: 'x'"),
    ('a 1 --out b --kinds c', 'argument --kinds: invalid choice'),
    ('a 1 --out b --loudwords', 'did you mean --loud-words?')])
def test_mistakes_in_options(words, answer, capsys):
    with pytest.raises(SystemExit) as e: options_of(*words.split())
    err = capsys.readouterr().err
    assert (e.value.code, err.count('\n')) == (2, 1) and answer in err


def test_another_process_finds_a_program_by_its_name():
    from rlhf_flant5.doctor import main
    assert pickle.loads(pickle.dumps(main)) is main and main.__wrapped__.__name__ == 'main'


class Elsewhere(RuntimeError): pass

ENDS = {
    'a mistake':            (files.ConfigError('x'), 2, 'error: x'),
    'no such file':         (FileNotFoundError(2, 'No such file', 'a\x1b'), 2, r'error: a\x1b: No such file'),
    'a full disk':          (OSError(28, 'full', 'a'), 1, 'failed: a: full; make room'),
    'a named failure':      (ZeroDivisionError('d'), 1, 'failed: d'),
    'another process ended': (Elsewhere('e'), 1, 'failed: e'),
    'SIGTERM':              (KeyboardInterrupt('SIGTERM'), 75, 'interrupted (SIGTERM); again'),
    'Ctrl-C':               (KeyboardInterrupt(), 75, 'interrupted (SIGINT); again')}

def failing(error):
    "The `main` of a program whose work ends with this error."
    @programs.program('publish', failures=lambda: (ArithmeticError,), shared=lambda: (Elsewhere,),
                      go_on='again', remedy='make room')
    def main(): raise error
    return main


@pytest.mark.parametrize('error, code, line', ENDS.values(), ids=ENDS)
def test_what_each_end_means(error, code, line, capsys):
    assert failing(error)([]) == code
    assert capsys.readouterr().err == line + '\n'


@pytest.mark.parametrize('how', ['another process ended', 'SIGTERM', 'Ctrl-C'])
def test_what_ends_a_group_is_printed_once(how, capsys, monkeypatch):
    error, code, _ = ENDS[how]
    monkeypatch.setenv('RANK', '1')
    assert failing(error)([]) == code
    assert capsys.readouterr().err == ''


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError): failing(RuntimeError('a mistake of ours'))([])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# names that people bring from other trainers

WORDS = '''
learning_rate lr training.learning_rate training.optimizer.lr output_dir report_to
gradient_accumulation_steps training.gradient_accumulation_steps
per_device_train_batch_size num_train_epochs max_length lr_scheduler_type warmup_ratio warmup_steps
early_stopping_patience bf16 training.bf16 fp16
save_steps eval_steps model.name hydra.run.dir lora_r data.path'''.split()


def test_every_foreign_name_is_answered_with_a_key_that_is_there():
    keys = set(compose._keys_with(()))
    keys |= {'training.optimizer.schedule', 'training.optimizer.warmup'}
    for name, answer in names._foreign.items(): assert ' ' in answer or answer in keys, (name, answer)
    for name in names.FOREIGN: assert name == name.lower()
    missing = [w for w in WORDS if not {w, w.rpartition('.')[2]} & names._foreign.keys()]
    assert not missing


UNKNOWN = {
    'lr': 'here it is training.optimizer.init_lr',
    'training.learning_rate': 'here it is training.optimizer.init_lr',
    'training.bf16': 'here it is training.precision',
    'model.name': 'here it is model.transformer_name',
    'hydra.run.dir': 'RESULTS_ROOT_DIR',
    'report_to': 'here it is training.trackers',
    'gradient_accumulation_steps': 'nothing to accumulate',
    'training.gradient_accumulation_steps': 'nothing to accumulate',
    'early_stopping_patience': 'here it is training.loop.max_non_optim_vals',
    'output_dir': 'RESULTS_ROOT_DIR',
    'per_device_train_batch_size': 'here it is training.loop.train_batch_size',
    'fp16': 'overflows',
    'training.loop.n_epoch': "did you mean 'training.loop.n_epochs'",
    'n_epochs': "did you mean 'training.loop.n_epochs'",
    'zebra': '--help-settings'}


@pytest.mark.parametrize('typed, answer', UNKNOWN.items(), ids=UNKNOWN)
def test_unknown_settings(typed, answer):
    with pytest.raises(files.ConfigError) as e: compose.load_config([f'{typed}=1'])
    assert str(e.value).startswith(f"unknown setting '{typed}'; ") and answer in str(e.value)


def test_the_recipe_of_hh():
    cfg = compose.load_config(['experiment=hh', 'index=1'])
    assert (cfg.desc, cfg.data.name) == ('hh', 'Anthropic/hh-rlhf')
    assert (cfg.training.loop.train_batch_size, cfg.training.loop.n_epochs) == (96, 6)


def test_every_setting_has_a_meaning():
    assert 'training.loop.n_epochs=10 ' in compose.settings_help() and len(schema.meanings()) > 60
    assert set(compose._defaults(names.choices('model'))) <= schema.meanings().keys()


# files of settings

REFUSED = {
    'alias': ('a: &x [1]\nb: *x\n', 'an alias'),
    'list': ('[1, 2]', 'must hold settings'),
    'cut off': ('a: [', 'cannot be read as YAML'),
    'odd name': ('\xff', 'no name of a setting'),
    'code': ('x: !!python/object:os.system y\n', 'cannot be read as YAML'),
    'deep': ('a: ' + '['*30 + ']'*30, 'nested more than'),
    'large': ('#' * 70_000, 'more than 65,536 bytes'),
    'variable': ('seed: ${oc.env:HOME}', 'no ${'),
    'foreign name': ('training: {lr: 3}', 'init_lr'),
    'name with a space': ('"a b": 3', 'no name of a setting'),
    'twice': ('seed: 1\nseed: 2\n', 'duplicate')}


@pytest.mark.parametrize('text, answer', REFUSED.values(), ids=REFUSED)
def test_a_file_of_settings_is_refused_in_one_line(tmp_path, text, answer, capsys):
    from rlhf_flant5.train import main
    (tmp_path/'my.yaml').write_text(text, encoding='utf-8')
    begun = time.monotonic()
    assert main(['--config', str(tmp_path/'my.yaml'), '--cfg']) == 2
    assert time.monotonic() - begun < 5
    err = capsys.readouterr().err
    assert answer in err and re.fullmatch(r'error: [^\n]*\n', err), err


@pytest.mark.parametrize('value', [
    'a b', "it's", 'x\\', "\\'", 'a,b', '[x]', 'ü=ö', '{', '', ' ', 'null', '3', 'true', '1e3', "\\\\''\\"])
def test_texts_of_a_file_arrive_as_they_are(tmp_path, value):
    settings = OmegaConf.create({'data': {'name': value}})
    (tmp_path/'my.yaml').write_text(OmegaConf.to_yaml(settings), encoding='utf-8')
    override, = compose.with_file(tmp_path/'my.yaml', [])
    assert compose.parse_override(override).value() == value


def test_aliases_of_a_foreign_run_are_not_followed(results, capsys):
    "A config.yaml of less than 1 KiB with a billion leaves."
    from rlhf_flant5.compare import main
    def ten_of(item): return f'[{", ".join([item]*10)}]'
    lines = [f'a0: &a0 {ten_of("1")}']
    for i in range(1, 9): lines.append(f'a{i}: &a{i} {ten_of(f"*a{i - 1}")}')
    (saved_run(results, 0)/'data'/'config.yaml').write_text('\n'.join(lines), encoding='utf-8')
    begun = time.monotonic()
    assert main([str(results)]) == 2
    assert time.monotonic() - begun < 20
    assert ':2: an alias (*a0)' in capsys.readouterr().err


# C locale: every program in one process that can print nothing but ASCII

C_LOCALE = dict(
    LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='ascii', OMP_NUM_THREADS='1')
EVERY_PROGRAM = r'''
import importlib, json, os, sys, locale
from pathlib import Path
assert locale.getpreferredencoding(False).upper() in ('ANSI_X3.4-1968', 'US-ASCII', 'ASCII')
here, pairs = Path(sys.argv[1]), sys.argv[2]
run = here/'Reward-Model-Training'/'desc-c,index-0'
model = str(run/'simulation'/'best_model')
tiny = ['experiment=toy', 'sim_man.allow_untracked=true', 'device_name=cpu', 'data.n_train_data=64',
        'training.loop.n_batches=2', 'training.loop.train_batch_size=16']
commands = dict(
    doctor=[f"data.name='{pairs}'", 'data.subdirs=[s]', 'model.transformer_name=toy',
            '--json', str(here/'check.json')],
    train=[*tiny, f"data.name='{pairs}'", 'data.subdirs=[s]', 'desc=c'],
    sweep=['--seeds', '1', '--readouts', 'decoder_output', '--transformer', 'frozen', '--dry-run', *tiny],
    evaluate=[model, pairs + '/s/test.jsonl', '--out', str(here/'evaluation'), '--device', 'cpu'],
    score=[model, pairs + '/s/rows.jsonl', '--device', 'cpu'],
    publish=['card', str(run)],
    compare=[str(here)],
    scaling=['plan', '--sizes', 'small', '--gpus', '1'])
codes = {}
for name, argv in commands.items(): codes[name] = importlib.import_module(f'rlhf_flant5.{name}').main(argv)
print('ü – 例')
from rlhf_flant5.core import program
for name in program.PROGRAMS:
    module = importlib.import_module(f'rlhf_flant5.{name}')
    module.main.parser().print_help()
Path(here/'codes.json').write_text(json.dumps(codes))
'''


def write_unicode_pairs(folder):
    "Pairs with letters that ASCII lacks, and a row to score."
    from rlhf_flant5.data.toy import toy_pairs
    def line(row): return json.dumps(row, ensure_ascii=False) + '\n'
    for split, n in (('train', 80), ('test', 20)):
        pairs = toy_pairs(n, seed=5, split=split)
        rows = [dict(chosen=r['chosen'] + ' naïve – ü', rejected=r['rejected'] + ' 例') for r in pairs]
        (folder/f'{split}.jsonl').write_text(''.join(map(line, rows)), encoding='utf-8')
    (folder/'rows.jsonl').write_text(line(dict(prompt='ü?', response='例', id='é')), encoding='utf-8')


def test_every_program_in_a_c_locale(tmp_path):
    folder, results = tmp_path/'pairs'/'s', tmp_path/'results'
    folder.mkdir(parents=True)
    results.mkdir()
    write_unicode_pairs(folder)
    (tmp_path/'every.py').write_text(EVERY_PROGRAM, encoding='utf-8')
    command = [sys.executable, str(tmp_path/'every.py'), str(results), str(folder.parent)]
    env = os.environ | C_LOCALE | {'PYTHONPATH': str(root), 'RESULTS_ROOT_DIR': str(results)}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env)

    written = results/'codes.json'
    codes = json.loads(written.read_text()) if written.exists() else {}
    assert set(codes.values()) == {0}, (codes, done.stderr.decode(errors='replace')[-3000:])
    assert done.stdout.isascii() and b'\\xfc' in done.stdout

    text = '.md', '.txt', '.log', '.yaml', '.jsonl', '.json'
    texts = {p: p.read_text(encoding='utf-8') for p in results.rglob('*') if p.suffix in text and p.is_file()}
    assert len(texts) > 15
    shown = results/'evaluation'/'wrong.md', results/'comparison'/'suspicious.md'
    assert any('naïve' in texts[path] for path in shown)


def test_a_setting_that_is_no_text_in_this_locale(capsys):
    "A folder's name as an ASCII locale hands it on: one line before any work, not a traceback after it."
    from rlhf_flant5.train import main
    assert main(['experiment=toy', "data.name='/tmp/p\udcc3\udca4'"]) == 2
    err = capsys.readouterr().err
    assert 'no text in the locale of this terminal; set LC_ALL=C.UTF-8' in err and err.count('\n') == 1
