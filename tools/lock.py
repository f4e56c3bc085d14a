#!/usr/bin/env python3
"""Write requirements.lock: everything that settings.ini's requirements and its `dev` extra resolve to today, exactly.

The resolution is pip's own, in a fresh environment, and installs nothing. Only names and versions are kept: no index, no host, and no
local part of a version (2.13.0+cpu is 2.13.0). What torch brings for one kind of machine alone (CUDA's libraries, Triton) is left to pip."""
import json, re, subprocess, sys, tempfile, venv
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ini = ConfigParser()
ini.read(root/'settings.ini', encoding='utf-8')
lib_name, min_python = ini['DEFAULT']['lib_name'], ini['DEFAULT']['min_python']
this = '.'.join(map(str, sys.version_info[:2]))
if this != min_python: sys.exit(f'error: this is Python {this}; the lock is resolved with the oldest one supported: make lock PYTHON=python{min_python}')

with tempfile.TemporaryDirectory() as tmp:
    venv.create(f'{tmp}/venv', with_pip=True)
    pip = [f'{tmp}/venv/bin/python', '-m', 'pip', '--disable-pip-version-check']
    subprocess.run([*pip, 'install', '-q', '--dry-run', '--ignore-installed', '--report', f'{tmp}/report.json', f'{root}[dev]'], check=True)
    found = [o['metadata'] for o in json.loads(Path(f'{tmp}/report.json').read_text())['install']]

pins = {re.sub(r'[-_.]+', '-', o['name']).lower(): o['version'].split('+')[0] for o in found}
pins = {k: v for k, v in sorted(pins.items()) if k != lib_name.replace('_', '-') and not re.match(r'(nvidia|cuda|triton)\b', k)}
head = f"# Exact versions of everything, resolved with Python {min_python}. Written by `make lock` from settings.ini: don't edit.\n"
(root/'requirements.lock').write_text(head + ''.join(f'{k}=={v}\n' for k, v in pins.items()))
print(f'requirements.lock: {len(pins)} packages')
