#!/usr/bin/env python3
"""Write requirements*.lock: exact versions of everything that settings.ini's requirements and its `dev` extra need,
with the hashes of their files.

uv resolves for all platforms and Pythons at once, and gives the hashes of all files that the index holds of a version.
What is locked stays, hashes included, unless settings.ini asks for another version;
`lock.py NAME …` takes the newest of these packages, `lock.py all` of all, and their hashes anew.

requirements.lock holds what every machine needs, requirements-cuda.lock what torch's default build for Linux needs
beside. Then pip, as it is configured here, says which files it would take: a CPU-only build of torch (2.13.0+cpu for
2.13.0), which the index doesn't hold, is pinned in requirements-cpu.lock, and requirements.lock allows its file.
The locks hold names, versions and hashes: no index, no host."""
import json, os, re, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

uv = 'uv==0.13.9'
root = Path(__file__).resolve().parent.parent
every, cuda, cpu = (root/f'requirements{o}.lock' for o in ('', '-cuda', '-cpu'))
heads = {
    every: "Exact versions and hashes of everything, for Python {} or newer. "
           "Written by `make lock` from settings.ini: don't edit.\n"
           "Without make: pip install --require-hashes -r requirements.lock, and on Linux also "
           "-r requirements-cuda.lock, or -r requirements-cpu.lock where\n"
           "pip is pointed to torch's CPU-only builds.",
    cuda: "What torch's default build for Linux needs beside requirements.lock. Written by `make lock`: don't edit.",
    cpu: "torch's CPU-only build, beside requirements.lock, for where pip is pointed to such builds. "
         "Written by `make lock`: don't edit."}
PIP_INSTALL = ['pip', '--disable-pip-version-check', '-q', 'install']
UV_COMPILE = [
    'uv', 'pip', 'compile', '-q', '--universal', '--fork-strategy=fewest', '--generate-hashes',
    '--no-annotate', '--no-header', '--no-config', '--no-cache', '--no-python-downloads']


def read(text):
    "The pins of a lock, `name==version` and its marker, each with the hashes of its files"
    pins = {}
    for block in re.findall(r'^\w(?:.*\\\n)*.*', text, re.M):
        pin, *hashes = block.split(' \\\n    ')
        pins[pin] = {*hashes}
    return pins


def write(pins):
    "The text that `read` reads: packages in order, and under each its hashes"
    blocks = [[pin, *sorted(pins[pin])] for pin in sorted(pins, key=name)]
    return ''.join(' \\\n    '.join(block) + '\n' for block in blocks)


def name(pin): return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', pin)[0]).lower()


def index_url(config):
    "The index that pip is pointed to, by what `pip config list` prints, or None"
    urls = dict(re.findall(r"^(\S+)\.index-url='(.+)'$", config, re.M))
    return urls.get(':env:') or urls.get('install') or urls.get('global')


def resolve(cfg, newest, run, tmp):
    "The pins that settings.ini asks for, by uv: what is locked stays, but for the packages `newest`"
    asked, lock = tmp/'asked.txt', tmp/'lock.txt'
    asked.write_text('\n'.join(cfg['requirements'].split() + cfg['dev_requirements'].split()))
    lock.write_text(every.read_text() + cuda.read_text())
    upgrade = ['--upgrade'] if newest == ['all'] else [f'--upgrade-package={o}' for o in newest]
    url = index_url(run('pip', 'config', 'list'))
    env = os.environ | ({'UV_DEFAULT_INDEX': url} if url else {})
    run(*UV_COMPILE, asked, '-o', lock, f'--python-version={cfg["min_python"]}', *upgrade, env=env)
    return read(lock.read_text())


def files_pip_takes(pins, run, tmp):
    "What pip, as it is configured here, would install for `pins`: the entries of its report"
    wanted, report = tmp/'wanted.txt', tmp/'report.json'
    wanted.write_text('\n'.join(pins))
    run(*PIP_INSTALL, '--dry-run', '--ignore-installed', '--no-deps', '--report', report, '-r', wanted)
    return json.loads(report.read_text())['install']


def allow(taken, pins, for_cpu):
    "Add the hashes of the files that pip takes to `pins`; a CPU-only build gets a pin of its own in `for_cpu`"
    pin_of = {name(pin): pin for pin in pins}
    for o in taken:
        info, version = o['download_info'], o['metadata']['version']
        pin = pin_of[name(o['metadata']['name'])]
        hash = f'--hash=sha256:{info["archive_info"]["hashes"]["sha256"]}'
        if version.endswith('+cpu'):
            for_cpu.setdefault(f'{name(pin)}=={version}', set()).add(hash)
        elif hash not in pins[pin]:
            file = unquote(Path(info['url']).name)
            print(f'{pin}: allows {file} too, which the index does not hold')
        pins[pin].add(hash)
    for pin, hashes in for_cpu.items(): pins[pin.split('+')[0]] |= hashes


def main(newest):
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        python = tmp/'venv'/'bin'/'python'
        def run(*args, **kw):
            return subprocess.run([python, '-m', *args], check=True, text=True, stdout=subprocess.PIPE, **kw).stdout
        venv.create(tmp/'venv', with_pip=True)
        run(*PIP_INSTALL, uv)
        pins = resolve(cfg, newest, run, tmp)
        for_cuda = {pin: pins.pop(pin) for pin in [*pins] if re.match(r'(nvidia|cuda|triton)\b', pin)}
        taken = files_pip_takes(pins, run, tmp)

    still_locked = read(cpu.read_text()).items()
    for_cpu = {pin: hashes for pin, hashes in still_locked if pin.split('+')[0] in pins}
    allow(taken, pins, for_cpu)
    for path, chosen in zip(heads, (pins, for_cuda, for_cpu)):
        head = heads[path].format(cfg['min_python'])
        comment = ''.join(f'# {line}\n' for line in head.split('\n'))
        path.write_text(comment + write(chosen))
        n_hashes = sum(map(len, chosen.values()))
        print(f'{path.name}: {len(chosen)} packages, {n_hashes} hashes')


if __name__ == '__main__': main(sys.argv[1:])
