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


def test_no_file_names_a_folder_outside():
    found = []
    for path in tracked():
        lines = path.read_bytes().decode('utf-8', 'replace').splitlines()
        found += [f'{path.relative_to(root)}:{n}: {line.strip()[:100]}' for n, line in enumerate(lines, 1) if re.search(ELSEWHERE, line)]
    assert not found, '\n'.join(found)
    for seen in ('root.parent/"{}"', "Path('../{}/x')"): assert re.search(ELSEWHERE, seen.format('shared'))


def imported(path):
    "The first parts of all names that a module imports, but its own package's."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (n.split('.')[0] for n in names)


def test_what_is_imported_is_declared():
    "In settings.ini, for the module's own package or for one of its extras. (TRL is something that the chapter on speed may compare with.)"
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    declared = {canonicalize_name(Requirement(r).name) for k, v in ini['DEFAULT'].items() if k.endswith('requirements') and k != 'dev_requirements' for r in v.split()}
    called = {'sklearn': 'scikit-learn', 'hydra': 'hydra-core', 'yaml': 'pyyaml'}
    used = {n for path in (root/'rlhf_flant5').rglob('*.py') for n in imported(path)} - {*sys.stdlib_module_names, 'rlhf_flant5', 'trl'}
    assert not sorted(n for n in used if canonicalize_name(called.get(n, n)) not in declared)


# as make: says where it runs and what stands there, then what pytest says at its end
MAKE = r'''#!/bin/bash
echo "$1 with $(ls | tr '\n' ' ')beside $(ls ..)" >> "$CALLS"
[[ $1 == check ]] && exit "${CHECK:-0}"
echo '..... [100%]'; echo "$CLOSING"; echo 'make: the last word' >&2
exit "${TEST:-0}"
'''


def ci(tmp_path, **env):
    "`.ci/run` of a small repository that has a neighbour, with a stand-in for make."
    project = tmp_path/'project'
    for folder in (project/'.ci', tmp_path/'bin', tmp_path/'neighbour', tmp_path/'tmp'): folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(root/'.ci'/'run', project/'.ci'/'run')
    (project/'committed').write_text('')
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b']
    for args in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'all']): subprocess.run([*git, *args], cwd=project, check=True)
    (project/'untracked').write_text('')
    (tmp_path/'bin'/'make').write_text(MAKE)
    (tmp_path/'bin'/'make').chmod(0o755)
    env = os.environ | dict(PATH=f'{tmp_path/"bin"}:{os.environ["PATH"]}', CALLS=str(tmp_path/'calls'), TMPDIR=str(tmp_path/'tmp')) | env
    done = subprocess.run(['bash', project/'.ci'/'run'], text=True, capture_output=True, env=env, cwd=tmp_path)
    assert not [*(tmp_path/'tmp').iterdir()]
    return done


@pytest.mark.parametrize('closing, code', [
    ('412 passed, 3 skipped in 612.34s (0:10:12)', 0), ('1 failed, 411 passed in 600.01s (0:10:00)', 2), ('411 passed, 5 errors in 60.01s (0:01:00)', 2)])
def test_ci_runs_in_a_clone_that_stands_alone(tmp_path, closing, code):
    done = ci(tmp_path, CLOSING=closing, TEST=str(code))
    assert done.returncode == code and done.stdout.splitlines()[-1] == closing, done
    assert (tmp_path/'calls').read_text().splitlines() == [f'{what} with committed beside clone' for what in ('check', 'test')]


def test_ci_ends_where_the_check_fails(tmp_path):
    done = ci(tmp_path, CLOSING='412 passed in 1.00s', CHECK='3')
    assert done.returncode == 3 and 'passed' not in done.stdout and 'did not come to their end' in done.stdout
