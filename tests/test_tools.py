"tools/: notebooks are re-executed in place, and README.md holds the outputs of index.ipynb."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

tools = Path(__file__).parent.parent/'tools'


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
