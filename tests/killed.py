"For tests of trainings that are killed: a script of their own in a new process, SIGKILL at a line that it prints, results compared to the last bit."
import os, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

posix = pytest.mark.skipif(os.name == 'nt', reason='SIGKILL')

@contextmanager
def runs(script):
    "A function (checkpoint, result, seed, pause) -> Popen that starts the script; what still runs at the end is killed."
    running, here = [], str(Path(__file__).parent)
    env = dict(os.environ, PYTHONWARNINGS='ignore', PYTHONPATH=os.pathsep.join([here, *filter(None, [os.environ.get('PYTHONPATH')])]))   # killed_run is there
    def start(checkpoint, result, seed, pause=0.):
        args = [sys.executable, script, checkpoint, result, str(seed), str(pause)]
        running.append(subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, text=True, env=env))
        return running[-1]
    try: yield start
    finally:
        for p in running:
            if p.poll() is None: p.kill()
            p.communicate()

def kill_at(process, where):
    "SIGKILL as soon as it prints a line that begins with `where`."
    for line in process.stdout:
        if line.startswith(where): break
    else: pytest.fail(f'the training ended before {where}')
    process.kill()
    process.wait()
    assert process.returncode == -getattr(signal, 'SIGKILL', -1)

def until(done, seconds, process=None):
    "Wait for something; fail if it takes too long, or if the process ends before."
    end = time.monotonic() + seconds
    while not done():
        if process and process.poll() is not None: pytest.fail(f'the run ended too early: {process.communicate()[1][-1500:]}')
        if time.monotonic() > end: pytest.fail('it took too long')
        time.sleep(.05)

def equal(x, y):
    if isinstance(x, torch.Tensor): return torch.equal(x, y) and x.dtype == y.dtype
    if isinstance(x, dict): return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)): return len(x) == len(y) and all(map(equal, x, y))
    return x == y
