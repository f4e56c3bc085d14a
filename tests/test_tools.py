"tools/: notebooks are re-executed in place, README.md holds the outputs of index.ipynb, and the lock's hashes are complete and enforced."
import hashlib, json, os, re, runpy, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement

tools = Path(__file__).parent.parent/'tools'
lock = runpy.run_path(tools/'lock.py')


def write(path, *cells):
    "A notebook of `cells`: code, or Markdown where one starts with `# `"
    def cell(i, src):
        c = dict(cell_type='markdown' if src.startswith('# ') else 'code', id=f'cell{i}', metadata={}, source=src.splitlines(True))
        return c if c['cell_type'] == 'markdown' else c | dict(execution_count=None, outputs=[])
    nb = dict(cells=[cell(*o) for o in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb), encoding='utf-8')


def outputs(path): return [c['outputs'] for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


@pytest.fixture
def project(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nrepo = p\nuser = u\nauthor = a\nnbs_path = nbs\nlib_path = p\ntst_flags = notest slow\n')
    shutil.copytree(tools, tmp_path/'tools')
    return tmp_path


def run(project, tool, *args):
    return subprocess.run([sys.executable, project/'tools'/tool, *args], cwd=project, text=True, capture_output=True)


def test_notebooks_run_in_place(project):
    nb = project/'nbs/00_one.ipynb'
    write(nb, '# One\n\n> A notebook', 'from tqdm import tqdm\nx = [o for o in tqdm(range(3))]\nx', 'import matplotlib.pyplot as plt\nplt.plot(x);',
          '#| slow\n1/0', '#| eval: false\n1/0', 'import nbdev; nbdev.nbdev_export()', 'print({"a", "b", "c"})')
    res = run(project, 'run_notebooks.py')
    assert res.returncode == 0, res.stderr
    first, figure, *skipped, last = outputs(nb)
    assert [o['data']['text/plain'] for o in first] == [['[0, 1, 2]']] and skipped == [[], [], []]
    assert [list(o['data']) for o in figure] == [['image/png', 'text/plain']] and last[0]['name'] == 'stdout'
    once = nb.read_bytes()
    assert run(project, 'run_notebooks.py').returncode == 0 and nb.read_bytes() == once

    write(project/'nbs/01_two.ipynb', 'print(1)', 'missing')
    before = (project/'nbs/01_two.ipynb').read_bytes()
    res = run(project, 'run_notebooks.py')
    assert res.returncode == 1 and "NameError in 01_two.ipynb" in res.stderr and 'Cell #2' in res.stderr
    assert (project/'nbs/01_two.ipynb').read_bytes() == before


def test_readme_holds_outputs_and_figures(project):
    index = project/'nbs/index.ipynb'
    write(index, '# Book\n\n[one](00_one.ipynb), [c](../C.md), [w](https://w.org/a.ipynb), `[x](y)`', '#| echo: false\nprint("hi")', '#| hide\n1',
          '#| fig-alt: a line\n#| echo: false\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);', '1+1')
    assert run(project, 'run_notebooks.py').returncode == 0
    assert run(project, 'make_readme.py', '--check').returncode == 1
    assert run(project, 'make_readme.py').returncode == 0
    text = (project/'README.md').read_text()
    assert '# Book\n\n[one](nbs/00_one.ipynb), [c](C.md), [w](https://w.org/a.ipynb), `[x](y)`\n\n```\nhi\n```\n\n<img ' in text
    assert 'src="nbs/images/index-1.png" alt="a line" width=' in text and text.endswith('```python\n1+1\n```\n\n```\n2\n```\n')
    assert (project/'nbs/images/index-1.png').read_bytes().startswith(b'\x89PNG')
    assert run(project, 'make_readme.py', '--check').returncode == 0
    (project/'nbs/images/index-1.png').write_bytes(b'')
    assert 'nbs/images/index-1.png differs' in run(project, 'make_readme.py', '--check').stderr


@pytest.mark.parametrize('which', ['every', 'cuda', 'cpu'])
def test_lock_has_hashes_and_names_no_url(which):
    text = lock[which].read_text()
    body = re.sub(r'\A(# .*\n)+', '', text)
    pins = lock['read'](text)
    assert lock['write'](pins) == body and len(pins) == len(re.findall(r'^\w', body, re.M)) > 0
    for pin, hashes in pins.items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+( ; [^#\\]+)?", pin)
        assert hashes and all(re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', o) for o in hashes), pin
    assert not re.search(r'://|[\w-]\.(org|com|net|io)\b|--(extra-)?index|--find-links', text)


def test_lock_holds_what_settings_ask_for():
    ini = ConfigParser()
    ini.read(tools.parent/'settings.ini', encoding='utf-8')
    every, cuda, cpu = ({lock['name'](o): (Requirement(o), v) for o, v in lock['read'](lock[k].read_text()).items()} for k in ('every', 'cuda', 'cpu'))
    def version(req): return str(req.specifier).removeprefix('==')
    for asked in map(Requirement, ini['DEFAULT']['requirements'].split() + ini['DEFAULT']['dev_requirements'].split()):
        pin, _ = every[lock['name'](asked.name)]
        assert pin.marker is None and version(pin) in asked.specifier, asked
    # nothing for CUDA but on Linux; and a CPU-only build is one of the version that is locked, its file allowed there too
    assert not every.keys() & cuda.keys() and not any(req.marker.evaluate({'sys_platform': 'darwin'}) for req, _ in cuda.values())
    for name, (req, hashes) in cpu.items(): assert version(req) == version(every[name][0]) + '+cpu' and hashes <= every[name][1]


def test_pip_refuses_a_file_with_another_hash(tmp_path):
    wheel = tmp_path/'tiny-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as f:
        f.writestr('tiny.py', 'x = 1\n')
        f.writestr('tiny-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n')
        f.writestr('tiny-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        f.writestr('tiny-1.0.dist-info/RECORD', 'tiny.py,,\ntiny-1.0.dist-info/METADATA,,\ntiny-1.0.dist-info/WHEEL,,\ntiny-1.0.dist-info/RECORD,,\n')

    def install(to, pins):
        (tmp_path/'tiny.lock').write_text(pins)
        return subprocess.run([sys.executable, '-m', 'pip', '--isolated', '--disable-pip-version-check', 'install', '--require-hashes', '--no-deps', '--no-index',
                               '--find-links', tmp_path, '--target', tmp_path/to, '-r', tmp_path/'tiny.lock'], text=True, capture_output=True)
    good = hashlib.sha256(wheel.read_bytes()).hexdigest()
    bad = good[:-1] + ('0' if good[-1] != '0' else '1')
    res = install('good', lock['write']({'tiny==1.0': {f'--hash=sha256:{good}', f'--hash=sha256:{bad}'}}))
    assert res.returncode == 0 and (tmp_path/'good/tiny.py').read_text() == 'x = 1\n', res.stderr
    res = install('bad', lock['write']({'tiny==1.0': {f'--hash=sha256:{bad}'}}))
    assert res.returncode == 1 and 'DO NOT MATCH THE HASHES' in res.stderr and not (tmp_path/'bad').exists()
    res = install('none', lock['write']({'tiny==1.0': set()}))
    assert res.returncode == 1 and 'Hashes are required' in res.stderr and not (tmp_path/'none').exists()
