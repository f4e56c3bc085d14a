"""tools/: notebooks are re-executed in place, README.md holds the outputs of index.ipynb,
and the lock's hashes are complete and enforced."""
import hashlib, json, re, runpy, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement

tools = Path(__file__).parent.parent/'tools'
lock = runpy.run_path(tools/'lock.py')


def write(path, *cells):
    "A notebook of `cells`: code, or Markdown where one starts with `# `"
    def cell(i, src):
        c = dict(id=f'cell{i}', metadata={}, source=src.splitlines(True))
        if src.startswith('# '): return c | dict(cell_type='markdown')
        return c | dict(cell_type='code', execution_count=None, outputs=[])
    nb = dict(cells=[cell(i, src) for i, src in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb), encoding='utf-8')


def outputs(path):
    cells = json.loads(path.read_text())['cells']
    return [c['outputs'] for c in cells if c['cell_type'] == 'code']


SETTINGS = '''\
[DEFAULT]
repo = p
user = u
author = a
nbs_path = nbs
lib_path = p
tst_flags = notest slow
'''


@pytest.fixture
def project(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text(SETTINGS)
    shutil.copytree(tools, tmp_path/'tools')
    return tmp_path


def run(project, tool, *args):
    command = [sys.executable, project/'tools'/tool, *args]
    return subprocess.run(command, cwd=project, text=True, capture_output=True)


NOTEBOOK = [
    '# One\n\n> A notebook',
    'from tqdm import tqdm\nx = [o for o in tqdm(range(3))]\nx',
    'import matplotlib.pyplot as plt\nplt.plot(x);',
    '#| slow\n1/0',
    '#| eval: false\n1/0',
    'import nbdev; nbdev.nbdev_export()',
    'print({"a", "b", "c"})']


def test_notebooks_run_in_place(project):
    nb = project/'nbs/00_one.ipynb'
    write(nb, *NOTEBOOK)
    res = run(project, 'run_notebooks.py')
    assert res.returncode == 0, res.stderr
    value, figure, *skipped, printed = outputs(nb)
    assert [o['data']['text/plain'] for o in value] == [['[0, 1, 2]']]
    assert [[*o['data']] for o in figure] == [['image/png', 'text/plain']]
    assert skipped == [[], [], []]
    assert printed[0]['name'] == 'stdout'
    once = nb.read_bytes()
    assert run(project, 'run_notebooks.py').returncode == 0
    assert nb.read_bytes() == once

    failing = project/'nbs/01_two.ipynb'
    write(failing, 'print(1)', 'missing')
    before = failing.read_bytes()
    res = run(project, 'run_notebooks.py')
    assert res.returncode == 1
    assert 'NameError in 01_two.ipynb' in res.stderr
    assert 'Cell #2' in res.stderr
    assert failing.read_bytes() == before


INDEX = [
    '# Book\n\n[one](00_one.ipynb), [c](../C.md), [w](https://w.org/a.ipynb), `[x](y)`',
    '#| echo: false\nprint("hi")',
    '#| hide\n1',
    '#| fig-alt: a line\n#| echo: false\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);',
    '1+1']
README = """\
# Book

[one](nbs/00_one.ipynb), [c](C.md), [w](https://w.org/a.ipynb), `[x](y)`

```
hi
```

<img """


def test_readme_holds_outputs_and_figures(project):
    write(project/'nbs/index.ipynb', *INDEX)
    assert run(project, 'run_notebooks.py').returncode == 0
    assert run(project, 'make_readme.py', '--check').returncode == 1
    assert run(project, 'make_readme.py').returncode == 0
    text = (project/'README.md').read_text()
    assert README in text
    assert 'src="nbs/images/index-1.png" alt="a line" width=' in text
    assert text.endswith('```python\n1+1\n```\n\n```\n2\n```\n')
    figure = project/'nbs/images/index-1.png'
    assert figure.read_bytes().startswith(b'\x89PNG')
    assert run(project, 'make_readme.py', '--check').returncode == 0
    figure.write_bytes(b'')
    assert 'nbs/images/index-1.png differs' in run(project, 'make_readme.py', '--check').stderr


@pytest.mark.parametrize('which', ['every', 'cuda', 'cpu'])
def test_lock_has_hashes_and_names_no_url(which):
    text = lock[which].read_text()
    body = re.sub(r'\A(# .*\n)+', '', text)
    pins = lock['read'](text)
    assert lock['write'](pins) == body
    assert len(pins) == len(re.findall(r'^\w', body, re.M)) > 0
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+( ; [^#\\]+)?", pin)
        assert hashes, pin
        for o in hashes: assert re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', o), pin
    assert not re.search(r'://|[\w-]\.(org|com|net|io)\b|--(extra-)?index|--find-links', text)


def requirements(which):
    "The pins of a lock, name -> its requirement and the hashes of its files"
    pins = lock['read'](lock[which].read_text())
    return {lock['name'](pin): (Requirement(pin), hashes) for pin, hashes in pins.items()}


def version(req): return str(req.specifier).removeprefix('==')


def test_lock_holds_what_settings_ask_for():
    ini = ConfigParser()
    ini.read(tools.parent/'settings.ini', encoding='utf-8')
    settings = ini['DEFAULT']
    every, cuda, cpu = (requirements(which) for which in ('every', 'cuda', 'cpu'))
    wanted = settings['requirements'].split() + settings['dev_requirements'].split()
    for asked in map(Requirement, wanted):
        pin, _ = every[lock['name'](asked.name)]
        assert pin.marker is None, asked
        assert version(pin) in asked.specifier, asked
    # nothing for CUDA but on Linux
    assert not every.keys() & cuda.keys()
    for req, _ in cuda.values(): assert not req.marker.evaluate({'sys_platform': 'darwin'})
    # and a CPU-only build is one of the version that is locked, its file allowed there too
    for name, (req, hashes) in cpu.items():
        locked, allowed = every[name]
        assert version(req) == version(locked) + '+cpu'
        assert hashes <= allowed


WHEEL = {
    'tiny.py': 'x = 1\n',
    'tiny-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n',
    'tiny-1.0.dist-info/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    'tiny-1.0.dist-info/RECORD':
        'tiny.py,,\ntiny-1.0.dist-info/METADATA,,\ntiny-1.0.dist-info/WHEEL,,\ntiny-1.0.dist-info/RECORD,,\n'}
PIP_INSTALL = [
    sys.executable, '-m', 'pip', '--isolated', '--disable-pip-version-check',
    'install', '--require-hashes', '--no-deps', '--no-index']


def test_pip_refuses_a_file_with_another_hash(tmp_path):
    wheel = tmp_path/'tiny-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as f:
        for name, text in WHEEL.items(): f.writestr(name, text)

    def install(to, *hashes):
        pins = lock['write']({'tiny==1.0': {f'--hash=sha256:{o}' for o in hashes}})
        (tmp_path/'tiny.lock').write_text(pins)
        where = ['--find-links', tmp_path, '--target', tmp_path/to, '-r', tmp_path/'tiny.lock']
        return subprocess.run([*PIP_INSTALL, *where], text=True, capture_output=True)

    good = hashlib.sha256(wheel.read_bytes()).hexdigest()
    bad = good[:-1] + ('0' if good[-1] != '0' else '1')
    res = install('good', good, bad)
    assert res.returncode == 0, res.stderr
    assert (tmp_path/'good/tiny.py').read_text() == 'x = 1\n'
    res = install('bad', bad)
    assert res.returncode == 1
    assert 'DO NOT MATCH THE HASHES' in res.stderr
    assert not (tmp_path/'bad').exists()
    res = install('none')
    assert res.returncode == 1
    assert 'Hashes are required' in res.stderr
    assert not (tmp_path/'none').exists()
