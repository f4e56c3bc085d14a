#!/usr/bin/env python3
"""Re-execute notebooks in place, save their outputs, clean them.

    python tools/run_notebooks.py                        every notebook of nbs/, in order
    python tools/run_notebooks.py nbs/01_data.ipynb      one
    python tools/run_notebooks.py --flags slow -j 2      cells marked `#| slow` too, two notebooks at a time

What nbdev_test skips is skipped here too and keeps its saved outputs: cells with a flag of settings.ini's tst_flags
or with `eval: false`, calls of nbdev_export, notebooks with `skip_exec: true`.
Each notebook has a process of its own. The first error ends everything, leaves the notebook's file as it was,
and is printed with its traceback."""
import argparse, os, subprocess, sys, time
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

# what would make two runs of one notebook differ (sums depend on the number of threads), or fill its outputs with bars
STEADY = dict(PYTHONHASHSEED='0', OMP_NUM_THREADS='1', IN_TEST='1',
              TQDM_DISABLE='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_PROGRESS_BARS='1')


def slim(png):
    "The figure `png` (base64) on white, in 256 colours: a third of the bytes, and no difference to the eye."
    from PIL import Image
    im, out = Image.open(BytesIO(b64decode(png))).convert('RGBA'), BytesIO()
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    im.quantize(256, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True)
    return b64encode(out.getvalue()).decode()


def run_notebook(fname, flags):
    "Execute the notebook `fname` in this process and save its outputs; exits with the traceback at the first error."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    cfg = get_config(path=fname.parent)
    skipped_flags = set(cfg.tst_flags.split()) - set(flags)
    saved, nb = read_nb(fname), NBProcessor(fname, procs=FrontmatterProc, process=True).nb
    if str2bool(nb.frontmatter_.get('skip_exec', False)): return print(f'{fname.name}: skip_exec')

    def skip(cell):
        "As nbdev_test skips; what it does not skip loses its saved outputs"
        if cell.cell_type != 'code' or 'nbdev_export'+'(' in cell.source: return True
        if cell.directives_.get('eval:', ['true'])[0].lower() == 'false': return True
        if skipped_flags & cell.directives_.keys(): return True
        cell.outputs = []

    def keep_slim(cell):
        for data in (o.data for o in cell.outputs if 'data' in o):
            if 'image/png' in data: data['image/png'] = slim(data['image/png'])

    sys.path.insert(0, str(cfg.config_path))
    os.chdir(fname.parent)
    shell = CaptureShell(fname)
    try: shell.run_all(nb, exc_stop=True, preproc=skip, postproc=keep_slim)
    except Exception: sys.exit(shell.prettytb(fname=fname.name))
    # outputs go over to `saved`: `nb` lost its directives and front matter
    def code(o): return [c for c in o.cells if c.cell_type == 'code']
    for old, new in zip(code(saved), code(nb), strict=True): old.outputs = new.outputs
    write_nb(saved, fname)
    nbdev_clean(fname=str(fname))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', type=Path, help='default: all of nbs/')
    p.add_argument('--flags', default='', help="space separated flags whose cells run too, as nbdev_test's")
    p.add_argument('-j', type=int, default=1, help='notebooks at a time')
    # in this process: how main starts each notebook
    p.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    missing = [str(f) for f in args.notebooks if not f.is_file()]
    if missing: p.error(f"no such notebook: {', '.join(missing)}")
    if args.here: return run_notebook(args.notebooks[0].resolve(), args.flags.split())
    from nbdev.doclinks import nbglob
    files = args.notebooks or sorted(nbglob(as_path=True))
    failed, command = [], [sys.executable, __file__, '--here', '--flags', args.flags]

    def run_one(f):
        if failed: return
        start = time.time()
        done = subprocess.run([*command, f], env=os.environ | STEADY)
        if done.returncode: failed.append(f.name)
        else: print(f'{f.name}: {time.time()-start:.1f} s', flush=True)

    with ThreadPoolExecutor(args.j) as pool: list(pool.map(run_one, files))
    if failed: sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': main()
