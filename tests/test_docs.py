"""The docs site as far as it goes without Quarto:
every page is prepared, has title, description and a place in the sidebar; README.md is current."""
import ast, json, os, re, shutil, subprocess, sys
import pytest, yaml
from conftest import root

nbs = root/'nbs'
notebooks = sorted(f.relative_to(nbs).as_posix() for f in nbs.rglob('[!._]*.ipynb'))


def run(code, cwd):
    env = os.environ | {'PYTHONPATH': str(root)}
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, text=True, capture_output=True)


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell): return ''.join(cell['source'])


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what the docs are made from, where the build may write"
    path = tmp_path_factory.mktemp('docs')
    shutil.copy(root/'settings.ini', path)
    shutil.copytree(nbs, path/'nbs', ignore=shutil.ignore_patterns('.*'))
    return path


def pages(entry):
    "The pages of an entry of the sidebar: a page, or a section with entries of its own"
    if isinstance(entry, str): yield entry
    else:
        for o in entry['contents']: yield from pages(o)


def test_sidebar_lists_every_notebook():
    sidebar = yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']
    listed = [*pages(sidebar)]
    assert sorted(listed) == notebooks
    assert listed[0] == 'index.ipynb'
    assert listed[1:] == sorted(listed[1:])


@pytest.mark.parametrize('name', notebooks)
def test_title_cell_holds_nothing_else(name):
    # subtle: the docs build takes title and description from the first cell, then drops the cell with all else in it
    first, *_ = cells(nbs/name)
    assert re.fullmatch(r'# .+\n+> .+\n*', source(first))


def saved_texts(name):
    "All saved outputs of a notebook but figures, each as JSON"
    for cell in cells(nbs/name):
        for output in cell.get('outputs', []):
            data = output.get('data') or output
            yield json.dumps({k: v for k, v in data.items() if not k.startswith('image/')})


@pytest.mark.parametrize('name', notebooks)
def test_saved_outputs_hold_no_path_and_no_warning(name):
    unwanted = re.compile(r'site-packages|Warning:|[" ]/(home|root|tmp|work)/')
    assert not [text[:200] for text in saved_texts(name) if unwanted.search(text)]


def runs_in_docs(src):
    "Whether the docs build looks for imports in a cell of this source"
    if re.search(r'^#\|\s*(export|eval: false)', src, re.M): return False
    return 'nbdev_export()' not in src and not src.startswith('%')


@pytest.mark.parametrize('name', notebooks)
def test_imports_stand_alone(name):
    # subtle: the docs build runs cells with imports whole, but not what they may need from the cells above
    for cell in cells(nbs/name):
        src = source(cell)
        if cell['cell_type'] != 'code' or not runs_in_docs(src): continue
        kinds = {type(n) for n in ast.walk(ast.parse(src))}
        imports, works = kinds & {ast.Import, ast.ImportFrom}, kinds & {ast.Expr, ast.Assign}
        assert not (imports and works), src


PREPARE = '''\
if __name__ == "__main__":
    from nbdev.serve import proc_nbs
    proc_nbs(force=True)
'''


def test_pages_are_prepared(copy):
    "All of nbdev_docs but the rendering"
    res = run(PREPARE, copy)
    assert res.returncode == 0, res.stderr
    for name in notebooks:
        first, *_ = cells(copy/'_proc'/name)
        meta = yaml.safe_load(source(first).split('---')[1])
        assert meta['title']
        assert meta['description']


def test_nothing_is_fetched_from_elsewhere():
    "Fonts are the reader's own, and formulas are MathML, which needs no script."
    settings = yaml.safe_load((nbs/'_quarto.yml').read_text())
    html = settings['format']['html']
    assert html['html-math-method'] == 'mathml'
    for theme in html['theme'].values(): assert theme[-1] == 'site.scss'
    assert '$web-font-path: false;' in (nbs/'site.scss').read_text()
    for name in ('site.scss', 'styles.css'): assert '//' not in re.sub('^//.*$', '', (nbs/name).read_text(), flags=re.M)


def test_view_source_leads_to_the_notebooks():
    website = yaml.safe_load((nbs/'_quarto.yml').read_text())['website']
    assert website['repo-subdir'] == 'nbs' and (nbs/website['favicon']).exists()


@pytest.mark.parametrize('name', notebooks)
def test_no_cell_is_dropped_by_the_build(name):
    "The build deletes a cell of Markdown that begins with # and ends with a hyphen after a space, with all that is in it."
    texts = [source(cell).strip() for cell in cells(nbs/name) if cell['cell_type'] == 'markdown']
    assert not [text for text in texts if text.endswith(' -')]


LINK = re.compile(r'\]\(([^)#:]+)(#[^)]*)?\)')

@pytest.mark.parametrize('name', notebooks)
def test_links_lead_to_files(name):
    "Links within the book name notebooks, not the pages that are made of them."
    for cell in cells(nbs/name):
        if cell['cell_type'] != 'markdown': continue
        for target, _ in LINK.findall(source(cell)):
            assert not target.endswith('.html'), target
            assert (nbs/name).parent.joinpath(target).exists(), target


def test_settings_are_in_nbdev_yml(copy):
    res = run('from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', copy)
    assert res.returncode == 0, res.stderr
    for name in ('nbdev.yml', '_quarto.yml'):
        written = (copy/'nbs'/name).read_text()
        assert written == (nbs/name).read_text()


def test_readme_is_current():
    res = subprocess.run([sys.executable, root/'tools/make_readme.py', '--check'], text=True, capture_output=True)
    assert res.returncode == 0, res.stderr
