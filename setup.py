"Packages the library for pip; every value comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser()
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name = cfg['lib_name']
statuses = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
extras = {key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')}

setup(
    name=name, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], url=cfg['git_url'], license_expression={'apache2': 'Apache-2.0'}[cfg['license']], license_files=['LICENSE'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=[f"Development Status :: {statuses[cfg['status']]}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3'],
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[name, f'{name}.*']),
    package_data={name: ['config/**/*.yaml', 'backbone/*.safetensors']},
    entry_points={'nbdev': [f'{name}={name}._modidx:d'],
                  'console_scripts': [f'{name.replace("_", "-")}={name}.core.program:start']}, zip_safe=False)
