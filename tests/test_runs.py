"`rlhf_flant5.training.runs` where a cell can't go: hostile git settings, other installations, kills, names at random."
import json, logging, os, resource, shutil, signal, stat, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from rlhf_flant5.core import files
from rlhf_flant5.training import provenance, runs
from rlhf_flant5.core.files import ConfigError


@pytest.fixture
def repo(tmp_path):
    "A checkout of a package of one text file, one binary file and one file with an odd name"
    package = tmp_path/'repo'/'package'
    package.mkdir(parents=True)
    (package/'__init__.py').write_text('answer = 42\n')
    (package/'weights.bin').write_bytes(bytes(range(256)))
    (package/'a naïve "name".py').write_text('old\n')
    ident = '-c user.name=a -c user.email=a@b.c -c commit.gpgsign=false'
    for args in 'init -q -b main', 'add .', f'{ident} commit -qm first': provenance.git(package.parent, *args.split())
    return package.parent


@pytest.fixture
def root(tmp_path):
    (tmp_path/'results').mkdir()
    return tmp_path/'results'


@pytest.fixture
def package(tmp_path):
    "A package that no repository tracks"
    (tmp_path/'package').mkdir()
    (tmp_path/'package'/'__init__.py').touch()
    return tmp_path/'package'


def test_diff_survives_user_settings(repo, tmp_path, monkeypatch):
    "The diff brings the code back whatever the user's git settings are, and inside a hook's environment"
    config = tmp_path/'gitconfig'
    config.write_text('[color]\nui = always\n[diff]\nnoprefix = true\nexternal = false\nmnemonicPrefix = true\n'
                      '[status]\nshowUntrackedFiles = no\n[log]\nshowSignature = true\n[core]\nquotePath = true\n')
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', str(config))
    monkeypatch.setenv('GIT_DIR', str(tmp_path/'nowhere'))
    package = repo/'package'
    (package/'__init__.py').write_text('answer = 43\n')
    (package/'__init__.py').chmod(0o755)
    (package/'weights.bin').write_bytes(bytes(range(255, -1, -1)))
    (package/'a naïve "name".py').unlink()
    source, diff = provenance.read_source(package)
    assert source['dirty'] and len(source['commit']) == 40
    (package/'untracked.py').touch()
    with pytest.raises(ConfigError, match='package/untracked.py'): provenance.read_source(package)
    (package/'untracked.py').unlink()

    provenance.git(repo, 'reset', '-q', '--hard')
    (tmp_path/'changes.diff').write_bytes(diff)
    provenance.git(repo, 'apply', str(tmp_path/'changes.diff'))
    assert (package/'__init__.py').read_text() == 'answer = 43\n'
    assert (package/'__init__.py').stat().st_mode & stat.S_IXUSR
    assert (package/'weights.bin').read_bytes() == bytes(range(255, -1, -1))
    assert not (package/'a naïve "name".py').exists()


def test_another_owner_is_an_error(repo, monkeypatch):
    "Git refuses a folder of another owner: the guard must not take that for `no repository`"
    monkeypatch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')
    with pytest.raises(ConfigError, match='dubious ownership') as e: provenance.find_checkout(repo/'package')
    assert '\n' not in str(e.value)


def test_no_git_no_commit_detached(repo, tmp_path, monkeypatch):
    provenance.git(repo, 'checkout', '-q', '--detach')
    assert provenance.read_source(repo/'package')[0]['branch'] is None
    fresh = tmp_path/'fresh'/'package'
    fresh.mkdir(parents=True)
    (fresh/'__init__.py').touch()
    provenance.git(fresh, 'init', '-q', '..')
    provenance.git(fresh, 'add', '.')
    with pytest.raises(ConfigError, match='not have any commits yet'): provenance.read_source(fresh)
    monkeypatch.setenv('PATH', str(tmp_path))
    source, diff = provenance.read_source(repo/'package')
    assert source['commit'] is None and source['version']
    assert diff == b''


@settings(max_examples=300, deadline=None)
@given(desc=st.text(max_size=120), index=st.integers() | st.text(max_size=5))
def test_names(tmp_path_factory, desc, index):
    "Any name is refused in one line, or gives a folder directly below the root's, from which it can be read back"
    root = tmp_path_factory.getbasetemp()
    try: path = runs.run_dir(desc, index, root)
    except ConfigError as e: assert len(str(e).splitlines()) == 1
    else:
        assert path.parent == root.resolve()/'Reward-Model-Training'
        assert runs.parse_run(path) == (desc, str(index))


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r'[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,99}', fullmatch=True), st.text(max_size=200))
def test_good_names_and_suggestions(good, bad):
    assert runs.check_name('desc', good) == good
    try: runs.check_name('desc', bad)
    except ConfigError as e: runs.check_name('desc', str(e).rpartition('for instance desc=')[2])


NOTES_FOR_EVER = """
import sys
from rlhf_flant5.training.runs import *
root, package = sys.argv[1:]
with open_run('kill', 1, '', [], root=root, package_dir=package) as run:
    i = 0
    while True:
        run.note(i=i, filler='x'*100_000)
        i += 1
"""

def test_kill_leaves_whole_files(root, package):
    "A run killed while it rewrites its record leaves a whole record that says `running`"
    record = root/'Reward-Model-Training'/'desc-kill,index-1'/'data'/'provenance.json'
    def n_notes(): return json.loads(record.read_text()).get('i', 0) if record.exists() else 0
    job = subprocess.Popen([sys.executable, '-c', NOTES_FOR_EVER, str(root), str(package)])
    end = time.time() + 60
    while n_notes() <= 3: assert job.poll() is None and time.time() < end
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    left = json.loads(record.read_text())
    assert left['status'] == 'running' and left['i'] > 3


def test_protection(root, package, tmp_path):
    "Links, of files and of folders, are not followed; `unprotect` gives the owner alone the right back"
    alien = tmp_path/'alien'
    alien.mkdir()
    (alien/'file').touch()
    with runs.open_run('p', 1, '', [], root=root, package_dir=package) as run:
        (run.simulation/'folder').symlink_to(alien)
        (run.simulation/'.hidden').touch()
        (run.simulation/'deep'/'er').mkdir(parents=True)
        (run.simulation/'deep'/'er'/'file').touch()

    def rights(path): return path.stat().st_mode & 0o222
    below = [p for d in (run.data, run.logs, run.simulation) for p in (d, *d.rglob('*'))]
    files = [p for p in below if p.is_file() and not p.is_symlink()]
    assert len(files) == 7 and not any(map(rights, files))
    assert all(map(rights, (run.results, alien, alien/'file')))
    runs.unprotect(run.dir)
    assert {*map(rights, files)} == {0o200}


@pytest.fixture
def open_folder():
    "A folder for results that other users may read; pytest's folders are closed to them"
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    old = os.umask(0o022)
    yield folder
    os.umask(old)
    shutil.rmtree(folder)


def test_a_finished_run_is_its_owners(open_folder, package):
    "Everybody may read a finished run, nobody may write its files, and `rm -rf` by its owner removes it; root is not asked"
    nobody = 65534 if os.geteuid() == 0 else None
    with runs.open_run('p', 1, 'seed: 1', [], root=open_folder, package_dir=package) as run:
        (run.simulation/'model').write_bytes(b'weights')

    def shell(command):
        return subprocess.run(['sh', '-c', f'cd {run.dir} && {command}'], user=nobody, capture_output=True, text=True)
    assert shell('cat data/config.yaml simulation/model').stdout == 'seed: 1weights'
    if nobody:
        for p in (open_folder, *open_folder.rglob('*')): os.chown(p, nobody, -1)
    assert 'denied' in shell('echo 1 > simulation/model').stderr.lower()
    gone = shell(f'rm -rf {run.dir}')
    assert (gone.returncode, gone.stderr, run.dir.exists()) == (0, '', False)


@contextmanager
def full_disk():
    "No file of this process may grow, as on a full disk; the kernel refuses."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_refused_file_leaves_nothing(tmp_path):
    path = tmp_path/'record.json'
    runs.write_file(path, 'old')
    with full_disk(), pytest.raises(OSError, match='File too large.*record.json'): runs.write_file(path, 'new')
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == 'old'


def test_a_log_that_cannot_grow(root, package, capfd):
    "A full disk is an error of the run, with the file's name; nothing is printed; the run goes on when there is room"
    loop = logging.getLogger('rlhf_flant5.training.loop')
    def start(): return runs.open_run('full', 1, '', [], root=root, package_dir=package, resume=True)
    run = start()
    with pytest.raises(OSError, match='File too large.*train.log'), full_disk():
        with run: loop.info('step 1')
    with start() as run: loop.info('step 2')
    assert run.resumed and run.provenance['status'] == 'done'
    assert 'step 2' in (run.logs/'train.log').read_text()
    assert capfd.readouterr().err == ''


def test_whose_words_the_log_keeps(root, package):
    "This package's lines and the warnings of other libraries"
    with runs.open_run('words', 1, '', [], root=root, package_dir=package) as run:
        for name in 'rlhf_flant5.training.loop', 'httpx', 'rlhf_flant5_other':
            logging.getLogger(name).info('info')
            logging.getLogger(name).warning('warning')
    lines = [line.split(' ', 2)[2] for line in (run.logs/'train.log').read_text().splitlines()]
    assert lines == ['INFO rlhf_flant5.training.loop: info',
                     'WARNING rlhf_flant5.training.loop: warning',
                     'WARNING httpx: warning',
                     'WARNING rlhf_flant5_other: warning']


def test_log_is_removed_when_the_record_fails(root, package, monkeypatch):
    "The handler goes and the files are closed even if the outcome can't be written"
    run = runs.open_run('full', 1, '', [], root=root, package_dir=package)
    ours = logging.getLogger('rlhf_flant5')
    before = logging.getLogger().handlers[:], ours.level
    def full(*args): raise OSError(28, 'No space left on device')
    with pytest.raises(OSError, match='No space left'):
        with run: monkeypatch.setattr(files, 'write_file', full)
    assert (logging.getLogger().handlers, ours.level) == before
    assert not (run.data/'config.yaml').stat().st_mode & 0o222
