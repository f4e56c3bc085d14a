#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb, without Quarto; `--check` writes nothing and fails if they differ.

Prose stands as it is, with links from nbs/ turned into links from the root.
A code cell gives its source (unless `#| echo: false`) and its saved outputs: Markdown as it is,
figures as files nbs/images/index-1.png, ... (`#| fig-alt: text` describes one), text fenced.
Cells with `#| hide` give nothing."""
import argparse, json, posixpath, re, sys
from base64 import b64decode
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, readme = root/'nbs', root/'README.md'
directive = re.compile(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)\n?', re.M)


def from_root(text):
    "`text` with its relative links, which start from nbs/, starting from the root"
    def link(m): return f"]({posixpath.normpath('nbs/'+m[1])})"
    parts = re.split(r'(^```.*?^```$|`[^`\n]+`)', text, flags=re.M | re.S)
    prose = parts[::2]  # every second part is code
    parts[::2] = [re.sub(r'\]\((?!\w+:|#|/)([^)\s]+)\)', link, o) for o in prose]
    return ''.join(parts)


def fenced(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'


def show_output(out, files, alt):
    "One saved output as Markdown; a figure goes to `files` (path -> bytes)"
    if out['output_type'] == 'stream':
        return fenced(''.join(out['text'])) if out['name'] == 'stdout' else ''
    data = out['data']
    if 'text/markdown' in data: return from_root(''.join(data['text/markdown'])).strip()
    if 'image/png' in data:
        path = nbs/'images'/f'index-{len(files)+1}.png'
        files[path] = b64decode(data['image/png'])
        width = out['metadata'].get('image/png', {}).get('width')  # saved at twice the size it is shown in
        source = path.relative_to(root).as_posix()
        size = f' width="{width}"' if width else ''
        return f'<img src="{source}" alt="{alt}"{size}>'
    return fenced(''.join(data['text/plain']))


def build():
    "The files that index.ipynb asks for, path -> bytes"
    parts, files = ['<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->'], {}
    index = json.loads((nbs/'index.ipynb').read_text(encoding='utf-8'))
    for cell in index['cells']:
        src = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(from_root(src).strip())
        if cell['cell_type'] != 'code': continue
        flags = dict(directive.findall(src))
        if 'hide' in flags or flags.get('include') == 'false': continue
        code = directive.sub('', src).strip()
        if code and flags.get('echo') != 'false': parts.append(fenced(code, 'python'))
        if flags.get('output') == 'false': continue
        alt = flags.get('fig-alt', '')
        parts += [show_output(o, files, alt) for o in cell['outputs']]
    return {readme: ('\n\n'.join(filter(None, parts)) + '\n').encode()} | files


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true',
                   help='write nothing; exit 1 if README.md or a figure is not what the notebook says')
    args = p.parse_args()
    new, written = build(), [readme, *(nbs/'images').glob('index-*.png')]
    old = {f: f.read_bytes() for f in written if f.exists()}
    differing = [f for f in sorted(new.keys() | old) if new.get(f) != old.get(f)]
    changed = [f.relative_to(root).as_posix() for f in differing]
    if args.check and changed: return f"error: {', '.join(changed)} differs from nbs/index.ipynb: run `make readme`"
    if args.check: return 0
    for f in old.keys() - new: f.unlink()
    for f, data in new.items():
        f.parent.mkdir(exist_ok=True)
        f.write_bytes(data)
    print(f"wrote {', '.join(changed)}" if changed else 'README.md is current')


if __name__ == '__main__': sys.exit(main())
