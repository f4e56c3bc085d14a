"The docs site as far as it goes without Quarto: every page is prepared, has title, description and a place in the sidebar; README.md is current."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
notebooks = sorted(f.relative_to(root/'nbs').as_posix() for f in (root/'nbs').rglob('[!._]*.ipynb'))


def run(code, cwd):
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, text=True, capture_output=True, env=os.environ | {'PYTHONPATH': str(root)})


def cells(path): return json.loads(Path(path).read_text(encoding='utf-8'))['cells']


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what the docs are made from, where the build may write"
    path = tmp_path_factory.mktemp('docs')
    shutil.copy(root/'settings.ini', path)
    shutil.copytree(root/'nbs', path/'nbs', ignore=shutil.ignore_patterns('.*'))
    return path


def test_sidebar_lists_every_notebook():
    def hrefs(o): return [o] if isinstance(o, str) else [h for c in o['contents'] for h in hrefs(c)]
    listed = hrefs(yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar'])
    assert sorted(listed) == notebooks
    assert listed[0] == 'index.ipynb' and listed[1:] == sorted(listed[1:])


@pytest.mark.parametrize('name', notebooks)
def test_title_cell_holds_nothing_else(name):
    # subtle: the docs build takes title and description from the first cell, then drops the cell with all else in it
    assert re.fullmatch(r'# .+\n+> .+\n*', ''.join(cells(root/'nbs'/name)[0]['source']))


@pytest.mark.parametrize('name', notebooks)
def test_saved_outputs_hold_no_path_and_no_warning(name):
    said = [json.dumps({k: v for k, v in (o.get('data') or o).items() if not k.startswith('image/')}) for c in cells(root/'nbs'/name) for o in c.get('outputs', [])]
    assert not [x[:200] for x in said if re.search(r'site-packages|Warning:|[" ]/(home|root|tmp|work)/', x)]


@pytest.mark.parametrize('name', notebooks)
def test_imports_stand_alone(name):
    # subtle: the docs build runs cells with imports whole, but not what they may need from the cells above
    for src in (''.join(c['source']) for c in cells(root/'nbs'/name) if c['cell_type'] == 'code'):
        if re.search(r'^#\|\s*(export|eval: false)', src, re.M) or 'nbdev_export()' in src or src.startswith('%'): continue
        kinds = {type(n) for n in ast.walk(ast.parse(src))}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}), src


def test_pages_are_prepared(copy):
    "All of nbdev_docs but the rendering"
    res = run('if __name__ == "__main__":\n    from nbdev.serve import proc_nbs; proc_nbs(force=True)', copy)
    assert res.returncode == 0, res.stderr
    for name in notebooks:
        meta = yaml.safe_load(''.join(cells(copy/'_proc'/name)[0]['source']).split('---')[1])
        assert meta['title'] and meta['description']


def test_settings_are_in_nbdev_yml(copy):
    res = run('from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', copy)
    assert res.returncode == 0, res.stderr
    for name in ('nbdev.yml', '_quarto.yml'): assert (copy/'nbs'/name).read_text() == (root/'nbs'/name).read_text()


def test_readme_is_current():
    res = subprocess.run([sys.executable, root/'tools/make_readme.py', '--check'], text=True, capture_output=True)
    assert res.returncode == 0, res.stderr
