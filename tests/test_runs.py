"`rlhf_flant5.training.runs` where a cell can't go: hostile git settings, other installations, kills, and names at random."
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
    for args in 'init -q -b main', 'add .', '-c user.name=a -c user.email=a@b.c -c commit.gpgsign=false commit -qm first':
        provenance.git(package.parent, *args.split())
    return package.parent


@pytest.fixture
def root(tmp_path):
    (tmp_path/'results').mkdir()
    return tmp_path/'results'


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
    assert (package/'__init__.py').read_text() == 'answer = 43\n' and (package/'__init__.py').stat().st_mode & stat.S_IXUSR
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
    assert source['commit'] is None and source['version'] and diff == b''


@settings(max_examples=300, deadline=None)
@given(desc=st.text(max_size=120), index=st.one_of(st.integers(), st.text(max_size=5)))
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


def test_kill_leaves_whole_files(root, tmp_path):
    "A run killed while it rewrites its record leaves a whole record that says `running`"
    (tmp_path/'package').mkdir()
    (tmp_path/'package'/'__init__.py').touch()
    code = (f"from rlhf_flant5.training.runs import *\nwith open_run('kill', 1, '', [], root={str(root)!r}, package_dir={str(tmp_path/'package')!r}) as run:\n"
            "    i = 0\n    while True: run.note(i=i, filler='x'*100_000); i += 1")
    job = subprocess.Popen([sys.executable, '-c', code])
    record = root/'Reward-Model-Training'/'desc-kill,index-1'/'data'/'provenance.json'
    end = time.time() + 60
    while not (record.exists() and json.loads(record.read_text()).get('i', 0) > 3): assert job.poll() is None and time.time() < end
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    left = json.loads(record.read_text())
    assert left['status'] == 'running' and left['i'] > 3


def test_protection(root, tmp_path):
    "Links, of files and of folders, are not followed; `unprotect` gives the owner alone the right back"
    package, alien = tmp_path/'package', tmp_path/'alien'
    for d in package, alien: d.mkdir()
    (package/'__init__.py').touch()
    (alien/'file').touch()
    with runs.open_run('p', 1, '', [], root=root, package_dir=package) as run:
        (run.simulation/'folder').symlink_to(alien)
        (run.simulation/'.hidden').touch()
        (run.simulation/'deep'/'er').mkdir(parents=True)
        (run.simulation/'deep'/'er'/'file').touch()
    writable = lambda p: bool(p.stat().st_mode & 0o222)
    own = [p for d in (run.data, run.logs, run.simulation) for p in (d, *d.rglob('*')) if not p.is_symlink()]
    files = [p for p in own if p.is_file()]
    assert len(files) == 7 and not any(map(writable, files)) and writable(run.results)
    assert writable(alien) and writable(alien/'file')
    runs.unprotect(run.dir)
    assert all(p.stat().st_mode & 0o222 == 0o200 for p in files)


def test_a_finished_run_is_its_owners(tmp_path):
    "Everybody may read a finished run, nobody may write its files, and `rm -rf` by its owner removes it; root is not asked"
    nobody = 65534 if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp())       # subtle: pytest's folders are closed to other users
    folder.chmod(0o755)
    (tmp_path/'__init__.py').touch()
    old = os.umask(0o022)
    try:
        with runs.open_run('p', 1, 'seed: 1', [], root=folder, package_dir=tmp_path) as run: (run.simulation/'model').write_bytes(b'weights')
    finally: os.umask(old)
    def shell(command, user): return subprocess.run(['sh', '-c', f'cd {run.dir} && {command}'], user=user, capture_output=True, text=True)
    assert shell('cat data/config.yaml simulation/model', nobody).stdout == 'seed: 1weights'
    if nobody:
        for p in (folder, *folder.rglob('*')): os.chown(p, nobody, -1)
    assert 'denied' in shell('echo 1 > simulation/model', nobody).stderr.lower()
    gone = shell(f'rm -rf {run.dir}', nobody)
    assert (gone.returncode, gone.stderr, run.dir.exists()) == (0, '', False)
    shutil.rmtree(folder)


@contextmanager
def full_disk():
    "No file of this process may grow, as on a full disk; the kernel refuses."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_refused_file_leaves_nothing(tmp_path):
    runs.write_file(tmp_path/'record.json', 'old')
    with full_disk(), pytest.raises(OSError, match='File too large.*record.json'): runs.write_file(tmp_path/'record.json', 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['record.json'] and (tmp_path/'record.json').read_text() == 'old'


def test_a_log_that_cannot_grow(root, tmp_path, capfd):
    "A full disk is an error of the run, with the file's name; nothing is printed; the run goes on when there is room"
    (tmp_path/'__init__.py').touch()
    start = lambda: runs.open_run('full', 1, '', [], root=root, package_dir=tmp_path, resume=True)
    run = start()
    with pytest.raises(OSError, match='File too large.*train.log'), full_disk():
        with run: logging.getLogger('rlhf_flant5.training.loop').info('step 1')
    with start() as run: logging.getLogger('rlhf_flant5.training.loop').info('step 2')
    assert run.resumed and run.provenance['status'] == 'done' and 'step 2' in (run.logs/'train.log').read_text()
    assert capfd.readouterr().err == ''


def test_whose_words_the_log_keeps(root, tmp_path):
    "This package's lines and the warnings of other libraries"
    (tmp_path/'__init__.py').touch()
    with runs.open_run('words', 1, '', [], root=root, package_dir=tmp_path) as run:
        for name in 'rlhf_flant5.training.loop', 'httpx', 'rlhf_flant5_other':
            logging.getLogger(name).info('info'); logging.getLogger(name).warning('warning')
    said = [line.split(' ', 2)[2] for line in (run.logs/'train.log').read_text().splitlines()]
    assert said == ['INFO rlhf_flant5.training.loop: info', 'WARNING rlhf_flant5.training.loop: warning', 'WARNING httpx: warning', 'WARNING rlhf_flant5_other: warning']


def test_log_is_removed_when_the_record_fails(root, tmp_path, monkeypatch):
    "The handler goes and the files are closed even if the outcome can't be written"
    (tmp_path/'__init__.py').touch()
    run = runs.open_run('full', 1, '', [], root=root, package_dir=tmp_path)
    ours = logging.getLogger('rlhf_flant5')
    before = logging.getLogger().handlers[:], ours.level
    def full(*args): raise OSError(28, 'No space left on device')
    with pytest.raises(OSError, match='No space left'):
        with run: monkeypatch.setattr(files, 'write_file', full)
    assert (logging.getLogger().handlers, ours.level) == before
    assert not (run.data/'config.yaml').stat().st_mode & 0o222
