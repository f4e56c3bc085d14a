"The house: folders are rooms on floors, imports point down, programs are imported by nobody."
import ast
import json
import pytest
from conftest import root

package = root/'rlhf_flant5'
notebooks = [p for p in sorted((root/'nbs').glob('*/*.ipynb')) if '.ipynb_checkpoints' not in p.parts]


def module_of(notebook):
    "The module that a notebook writes, `room.name` or `name`; None for one that writes none."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    directives = [l for c in cells for l in ''.join(c['source']).splitlines() if l.startswith('#| default_exp ')]
    return directives[0].split()[-1] if directives else None


modules = {module_of(p): p for p in notebooks if module_of(p)}
rooms = {p.name for p in package.iterdir() if (p/'__init__.py').exists()}
programs = {name for name in modules if '.' not in name}


def imported_by(name):
    "Modules of this package that a module imports, wherever in its text."
    text = (package/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8')
    here, found = name.split('.')[:-1], set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: path = here[:len(here) + 1 - node.level] + (node.module or '').split('.')
        elif (node.module or '').startswith('rlhf_flant5'): path = node.module.split('.')[1:]
        else: continue
        path = '.'.join(p for p in path if p)
        found |= {path} if path in modules else {f'{path}.{a.name}' for a in node.names} & set(modules)
    return found


def floor(notebook): return notebook.parent.name, notebook.name


@pytest.mark.parametrize('name', modules)
def test_imports_point_down(name):
    above = [m for m in imported_by(name) if floor(modules[m]) >= floor(modules[name])]
    assert not above, f'{modules[name].name} imports {above}, which the book tells later'


def test_programs_are_imported_by_nobody():
    found = {name: imported_by(name) & programs for name in modules}
    assert not {name: p for name, p in found.items() if p}


def test_a_program_stands_at_the_top_and_a_room_in_a_folder():
    assert {p.stem for p in package.glob('*.py')} == programs | {'__init__', '__main__', '_modidx'}
    assert {p.parent.name for p in map(modules.get, programs)} == {'80_programs'}
    assert {name.split('.')[0] for name in modules if '.' in name} <= rooms


def test_the_index_names_every_chapter():
    index = (root/'nbs'/'index.ipynb').read_text(encoding='utf-8')
    missing = [name for p in notebooks if f']({(name := f"{p.parent.name}/{p.name}")})' not in index]
    assert not missing
