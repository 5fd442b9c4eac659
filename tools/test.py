"""Everything that must hold: repository checks, every notebook, pytest. Needs no network and no data folder.

usage: python tools/test.py [checks] [notebooks [NAME ...]] [pytest]     all three without arguments
COURSE_TEST_LIMIT is the time a notebook may take, in seconds (300).
"""
import atexit, os, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Event

import checks

ROOT = Path(__file__).resolve().parent.parent
RUNNING, ENDED = set(), Event()   # notebooks to end on Ctrl-C
PASSED = '\0passed'   # the last word of a notebook's process
HALF = str(max(1, (os.cpu_count() or 2)//2))   # threads for each of two jobs
LIMIT = float(os.environ.get('COURSE_TEST_LIMIT') or 300)
# Importing torch and the rest takes seconds: once, in a server; each notebook is a fork of it.
CONTEXT = get_context('forkserver' if sys.platform == 'linux' else 'spawn')   # elsewhere a fork is not safe


@contextmanager
def environment(env):
    "What is started inside has this environment."
    before = dict(os.environ)
    try: os.environ.clear(); os.environ.update(env); yield
    finally: os.environ.clear(); os.environ.update(before)

def offline(tmp, **kw):
    "The environment of a test: no data folder, a dead proxy in place of the network, outputs thrown away."
    env = {k: v for k, v in os.environ.items() if k not in ('COURSE_SCALE', 'PYTHONWARNINGS')}
    dead = dict.fromkeys(('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'), 'http://127.0.0.1:9')
    return dict(env, IN_TEST='1', COURSE_DATA=f'{tmp}/no-data', COURSE_OUT=f'{tmp}/out', HF_HUB_OFFLINE='1',
                no_proxy='localhost,127.0.0.1', **dead, **kw)

def run_checks(root=ROOT):
    "The checks that complained."
    failed = []
    for name, check in checks.CHECKS.items():
        start = time.time()
        try: bad = check(root)
        except Exception as e: bad = [f'the check itself stopped: {type(e).__name__}: {e}']
        print(f'{"FAILED" if bad else "ok":7}{name:16}{time.time()-start:5.1f} s  {check.__doc__}', flush=True)
        for o in bad: print(f'       - {o}', flush=True)
        if bad: failed.append(name)
    skipped = [o for o in checks.skipped_cells(root) if o[2] != 'blank']
    print(f'{len(skipped)} cells are left out by tests:' if skipped else 'No cell is left out by tests.')
    for nb, i, flag, why in skipped: print(f'       {nb} cell {i}: {flag} ({why})')
    return failed

def stop(proc):
    "Interrupt, so that the traceback names the cell; then end the notebook and all its children."
    if proc.pid is None: return   # it never began
    for sig, wait in ((signal.SIGINT, 5), (signal.SIGKILL, None)):
        try: os.killpg(proc.pid, sig)
        except (ProcessLookupError, PermissionError): return   # nothing of it is left
        proc.join(wait)

def one_notebook(path, env, root, log):
    "In a process of its own, and a group of its own: run a notebook as nbdev_test does."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)   # what a shell starts in the background ignores it
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    for out in 1, 2: os.dup2(fd, out)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(path.parent)
    sys.path.insert(0, str(root))
    from nbdev.config import get_config
    from nbdev.test import test_nb
    cfg = get_config()
    try: passed, _ = test_nb(path, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    finally: atexit._run_exitfuncs()   # a fork leaves without them, and temporary folders would stay
    if passed: os.write(fd, PASSED.encode())

def run_notebook(path, env, root, limit=LIMIT):
    "(name, seconds, what went wrong or '')."
    start = time.time()
    with tempfile.NamedTemporaryFile('w+', encoding='utf-8', errors='replace') as log:
        proc = CONTEXT.Process(target=one_notebook, args=(path, env, root, log.name))
        RUNNING.add(proc)
        try:
            proc.start()
            proc.join(0 if ENDED.is_set() else limit)
            slow = proc.is_alive()
        finally: stop(proc); RUNNING.discard(proc)
        said = log.read()
    wrong = '' if said.endswith(PASSED) else f'STOPPED: still running after {limit:.0f} s' if slow else 'failed'
    said = said[-6000:] if wrong else ''
    seconds = time.time() - start
    print(f'{"FAILED" if wrong else "ok":7}{path.name:32}{seconds:6.1f} s  {wrong}\n{said}'.rstrip(), flush=True)
    return path.name, seconds, wrong

def run_notebooks(names=(), root=ROOT, limit=LIMIT):
    "The notebooks that failed; two at a time, long ones (the later lessons) first."
    paths = [p for p in reversed(checks.notebooks(root)) if not names or p.stem in names]
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        env = offline(tmp, OMP_NUM_THREADS=HALF, PYTHONPATH=str(root))
        CONTEXT.set_forkserver_preload(['nbdev.test', 'torch._dynamo', *checks.what_modules_import(root)])
        try:
            with environment(env): results = list(pool.map(lambda p: run_notebook(p, env, root, limit), paths))
        except KeyboardInterrupt:
            ENDED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for proc in list(RUNNING): stop(proc)
            raise
    return [name for name, _, wrong in results if wrong] + [f'no notebook {n}' for n in set(names) - {p.stem for p in paths}]

def run_pytest(root=ROOT):
    "The tests in two halves at once, since most of them keep one core busy; the first is seen live, then the second."
    files = sorted(str(p.relative_to(root)) for p in Path(root, 'tests').glob('test_*.py'))
    command = [sys.executable, '-m', 'pytest', '-q', '--durations=3']
    with tempfile.TemporaryDirectory() as tmp, tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as log:
        env = [offline(f'{tmp}/{half}', OMP_NUM_THREADS=HALF, MPLBACKEND='agg') for half in range(2)]
        with subprocess.Popen([*command, *files[1::2]], cwd=root, env=env[1], stdout=log, stderr=subprocess.STDOUT) as second:
            first = subprocess.run([*command, *files[::2]], cwd=root, env=env[0])
        codes = first.returncode, second.returncode
        log.seek(0)
        print(log.read(), end='', flush=True)
    return ['pytest'] if any(codes) else []

def main(args):
    start, failed, everything = time.time(), [], not args
    names = [a.removesuffix('.ipynb') for a in args if a not in ('checks', 'notebooks', 'pytest')]
    if everything or 'checks' in args: failed += run_checks()
    if everything or 'notebooks' in args: failed += run_notebooks(names)
    print(f'{time.time()-start:.0f} s so far.', flush=True)
    if everything or 'pytest' in args: failed += run_pytest()
    if failed: sys.exit(f'Failed: {", ".join(failed)} ({time.time()-start:.0f} s).')

if __name__ == '__main__':
    try: main(sys.argv[1:])
    except KeyboardInterrupt: sys.exit('Stopped by Ctrl-C.')
