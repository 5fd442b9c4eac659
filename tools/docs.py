"""Build the site into _docs. Run in the environment, with Quarto on the path (nbdev would try to install a missing one)."""
import os, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
if not shutil.which('quarto'): sys.exit('Stopped: the site is built by Quarto, which is not on PATH: install it from https://quarto.org first.')
env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
stage = [sys.executable, '-c', 'from nbdev.quarto import nbdev_proc_nbs; nbdev_proc_nbs()']   # in nbs/, as the lessons run
for what, command, folder in [('Staging the notebooks', stage, 'nbs'), ('Rendering the pages', ['quarto', 'render', '--no-cache'], '_proc')]:
    print(f'{what} ...', flush=True)
    if subprocess.run(command, cwd=root/folder, env=env).returncode: sys.exit(f'Stopped: {what.lower()} failed; the messages above say why.')
if not (root/'_proc/_docs/index.html').exists(): sys.exit('Stopped: Quarto ended without an error but made no _proc/_docs/index.html.')
shutil.rmtree(root/'_docs', ignore_errors=True)
shutil.move(root/'_proc/_docs', root/'_docs')
print('The site is in _docs; open _docs/index.html.')
