"The repository needs nothing beside it: no file names a folder outside, and what CI runs, it runs in a clone that stands alone."
import ast, os, re, shutil, subprocess, sys
from configparser import ConfigParser
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from conftest import root

ELSEWHERE = r'''(\.\./|parent\s*/\s*['"])share[d]\b|/wor[k]/|see[d]-readme'''


def tracked():
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, check=True).stdout.decode()
    return [root/name for name in listed.split('\0') if name and (root/name).is_file()]


def lines_with(pattern, path):
    lines = path.read_bytes().decode('utf-8', 'replace').splitlines()
    for n, line in enumerate(lines, 1):
        if re.search(pattern, line): yield f'{path.relative_to(root)}:{n}: {line.strip()[:100]}'


def test_no_file_names_a_folder_outside():
    found = [place for path in tracked() for place in lines_with(ELSEWHERE, path)]
    assert not found, '\n'.join(found)
    for seen in ('root.parent/"{}"', "Path('../{}/x')"): assert re.search(ELSEWHERE, seen.format('shared'))


def imported(path):
    "The first parts of all names that a module imports, but its own package's."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        for name in names: yield name.split('.')[0]


def declared():
    "What settings.ini asks for, for the package or for one of its extras."
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    for key, value in ini['DEFAULT'].items():
        if not key.endswith('requirements') or key == 'dev_requirements': continue
        for requirement in value.split(): yield canonicalize_name(Requirement(requirement).name)


def test_what_is_imported_is_declared():
    "TRL is something that the chapter on speed may compare with."
    packages = dict(sklearn='scikit-learn', hydra='hydra-core', yaml='pyyaml')
    used = {name for path in (root/'rlhf_flant5').rglob('*.py') for name in imported(path)}
    used -= {*sys.stdlib_module_names, 'rlhf_flant5', 'trl'}
    asked = {canonicalize_name(packages.get(name, name)) for name in used}
    assert not sorted(asked - {*declared()})


# as make: says where it runs and what stands there, then what pytest says at its end
MAKE = r'''#!/bin/bash
echo "$1 with $(ls | tr '\n' ' ')beside $(ls ..)" >> "$CALLS"
[[ $1 == check ]] && exit "${CHECK:-0}"
echo '..... [100%]'; echo "$CLOSING"; echo 'make: the last word' >&2
exit "${TEST:-0}"
'''


def commit_all(folder):
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b']
    for args in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'all']):
        subprocess.run([*git, *args], cwd=folder, check=True)


def ci(tmp_path, **env):
    "`.ci/run` of a small repository that has a neighbour, with a stand-in for make."
    project, programs, temporary = tmp_path/'project', tmp_path/'bin', tmp_path/'tmp'
    for folder in (project/'.ci', programs, temporary, tmp_path/'neighbour'): folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(root/'.ci'/'run', project/'.ci'/'run')
    (project/'committed').write_text('')
    commit_all(project)
    (project/'untracked').write_text('')
    (programs/'make').write_text(MAKE)
    (programs/'make').chmod(0o755)

    known = dict(PATH=f'{programs}:{os.environ["PATH"]}', CALLS=str(tmp_path/'calls'), TMPDIR=str(temporary))
    done = subprocess.run(['bash', project/'.ci'/'run'], text=True, capture_output=True, cwd=tmp_path,
                          env=os.environ | known | env)
    assert not [*temporary.iterdir()]
    return done


@pytest.mark.parametrize('closing, code', [
    pytest.param('412 passed, 3 skipped in 612.34s (0:10:12)', 0, id='passed'),
    pytest.param('1 failed, 411 passed in 600.01s (0:10:00)', 2, id='failed'),
    pytest.param('411 passed, 5 errors in 60.01s (0:01:00)', 2, id='errors')])
def test_ci_runs_in_a_clone_that_stands_alone(tmp_path, closing, code):
    done = ci(tmp_path, CLOSING=closing, TEST=str(code))
    assert done.returncode == code and done.stdout.splitlines()[-1] == closing, done
    calls = (tmp_path/'calls').read_text().splitlines()
    assert calls == ['check with committed beside clone', 'test with committed beside clone']


def test_ci_ends_where_the_check_fails(tmp_path):
    done = ci(tmp_path, CLOSING='412 passed in 1.00s', CHECK='3')
    assert done.returncode == 3
    assert 'passed' not in done.stdout and 'did not come to their end' in done.stdout
