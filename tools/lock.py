#!/usr/bin/env python3
"""Write requirements*.lock: exact versions of everything that settings.ini's requirements and its `dev` extra need, with the hashes of their files.

uv resolves for all platforms and Pythons at once, and gives the hashes of all files that the index holds of a version. What is locked stays, hashes included,
unless settings.ini asks for another version; `lock.py NAME …` takes the newest of these packages, `lock.py all` of all, and their hashes anew.
requirements.lock holds what every machine needs, requirements-cuda.lock what torch's default build for Linux needs beside. Then pip, as it is configured
here, says which files it would take: a CPU-only build of torch (2.13.0+cpu for 2.13.0), which the index doesn't hold, is pinned in requirements-cpu.lock,
and requirements.lock allows its file. The locks hold names, versions and hashes: no index, no host."""
import json, os, re, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote

uv = 'uv==0.13.9'
root = Path(__file__).resolve().parent.parent
every, cuda, cpu = (root/f'requirements{o}.lock' for o in ('', '-cuda', '-cpu'))
heads = {
    every: "Exact versions and hashes of everything, for Python {} or newer. Written by `make lock` from settings.ini: don't edit.\n"
           "Without make: pip install --require-hashes -r requirements.lock, and on Linux also -r requirements-cuda.lock, or -r requirements-cpu.lock where\n"
           "pip is pointed to torch's CPU-only builds.",
    cuda: "What torch's default build for Linux needs beside requirements.lock. Written by `make lock`: don't edit.",
    cpu: "torch's CPU-only build, beside requirements.lock, for where pip is pointed to such builds. Written by `make lock`: don't edit."}


def read(text):
    "The pins of a lock, `name==version` and its marker, each with the hashes of its files"
    return {pin: {*hashes} for pin, *hashes in (o.split(' \\\n    ') for o in re.findall(r'^\w(?:.*\\\n)*.*', text, re.M))}


def write(pins):
    "The text that `read` reads: packages in order, and under each its hashes"
    return ''.join(' \\\n    '.join([pin, *sorted(pins[pin])]) + '\n' for pin in sorted(pins, key=name))


def name(pin): return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', pin)[0]).lower()


def main(newest):
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    with tempfile.TemporaryDirectory() as tmp:
        def run(*args, **kw): return subprocess.run([f'{tmp}/venv/bin/python', '-m', *args], check=True, text=True, stdout=subprocess.PIPE, **kw).stdout
        pip = 'pip', '--disable-pip-version-check', '-q', 'install'
        asked, lock, wanted, report = (Path(tmp)/o for o in ('asked.txt', 'lock.txt', 'wanted.txt', 'report.json'))
        venv.create(f'{tmp}/venv', with_pip=True)
        run(*pip, uv)

        asked.write_text('\n'.join(cfg['requirements'].split() + cfg['dev_requirements'].split()))
        lock.write_text(every.read_text() + cuda.read_text())
        urls = dict(re.findall(r"^(\S+)\.index-url='(.+)'$", run('pip', 'config', 'list'), re.M))
        url = urls.get(':env:') or urls.get('install') or urls.get('global')
        run('uv', 'pip', 'compile', asked, '-o', lock, '-q', '--universal', '--fork-strategy=fewest', '--generate-hashes', '--no-annotate', '--no-header',
            '--no-config', '--no-cache', '--no-python-downloads', f'--python-version={cfg["min_python"]}',
            *(['--upgrade'] if newest == ['all'] else [f'--upgrade-package={o}' for o in newest]), env=os.environ | ({'UV_DEFAULT_INDEX': url} if url else {}))
        pins = read(lock.read_text())
        for_cuda = {o: pins.pop(o) for o in [*pins] if re.match(r'(nvidia|cuda|triton)\b', o)}

        wanted.write_text('\n'.join(pins))
        run(*pip, '--dry-run', '--ignore-installed', '--no-deps', '--report', report, '-r', wanted)
        taken = json.loads(report.read_text())['install']

    pin_of = {name(o): o for o in pins}
    for_cpu = {k: v for k, v in read(cpu.read_text()).items() if k.split('+')[0] in pins}
    for o in taken:
        info, version, pin = o['download_info'], o['metadata']['version'], pin_of[name(o['metadata']['name'])]
        hash = f'--hash=sha256:{info["archive_info"]["hashes"]["sha256"]}'
        if version.endswith('+cpu'): for_cpu.setdefault(f'{name(pin)}=={version}', set()).add(hash)
        elif hash not in pins[pin]: print(f'{pin}: allows {unquote(Path(info["url"]).name)} too, which the index does not hold')
        pins[pin].add(hash)
    for k, v in for_cpu.items(): pins[k.split('+')[0]] |= v

    for path, chosen in zip(heads, (pins, for_cuda, for_cpu)):
        path.write_text(''.join(f'# {o}\n' for o in heads[path].format(cfg['min_python']).split('\n')) + write(chosen))
        print(f'{path.name}: {len(chosen)} packages, {sum(map(len, chosen.values()))} hashes')


if __name__ == '__main__': main(sys.argv[1:])
