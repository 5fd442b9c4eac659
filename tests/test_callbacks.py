"Progress where a notebook can't go: terminals, pipes, closed outputs, a real kernel; and what the callbacks cost."
import os, statistics, subprocess, sys, time

import nbformat
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient
from torch import nn

from course_lib.callbacks import (BatchSchedCB, DeviceCB, MetricsCB, ProgressCB, RecorderCB, TextView, halfway, rng_state,
                                  set_rng_state)
from course_lib.data import DataLoaders
from course_lib.learner import Learner, TrainCB

RUN = '''
import sys, time, torch.nn.functional as F
from course_lib.callbacks import MetricsCB, ProgressCB
from course_lib.learner import Callback, synth_learner
class SlowCB(Callback):
    def after_batch(self, learn): time.sleep(.005)
def train(**metrics):
    learn = synth_learner([MetricsCB(F.l1_loss, **metrics), ProgressCB(every=0), SlowCB()])
    learn.fit(3)
    return learn.model.a.item()
'''
ONCE = RUN + "open(sys.argv[1], 'w').write(str(train()))"

def run(tmp_path, code=ONCE, **kw):
    result = tmp_path/'a.txt'
    return subprocess.Popen([sys.executable, '-c', code, result], stderr=subprocess.PIPE, **kw), result

PASSES = [f'epoch {e}/3 {kind}' for e in (1, 2, 3) for kind in ('train', 'valid')]

@pytest.fixture(scope='module')
def log(tmp_path_factory):
    "What a log says, and the trained number."
    process, result = run(tmp_path_factory.mktemp('log'), stdout=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0 and not err, err
    return out, result.read_text()

@pytest.fixture(scope='module')
def wanted(log): return log[1]

def test_a_log_has_plain_lines(log):
    out = log[0]
    passes = [line for line in out.decode().splitlines() if 'batch' not in line]
    assert [p.partition(':')[0] for p in passes] == PASSES and all('l1_loss' in p for p in passes)
    assert b'\r' not in out and b'\033' not in out

@pytest.mark.skipif(os.name == 'nt', reason='no pty')
def test_a_terminal_rewrites_one_line(tmp_path, wanted):
    import fcntl, pty, struct, termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 30, 0, 0))   # narrow: the line has to be cut
    env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES')}
    process, result = run(tmp_path, stdout=theirs, env=env)
    os.close(theirs)
    out = b''
    while True:
        try: chunk = os.read(ours, 65536)
        except OSError: break   # Linux's way to say that the other side is gone
        if not chunk: break
        out += chunk
    os.close(ours)
    assert process.wait() == 0 and result.read_text() == wanted
    shown = out.decode().replace('\n', '\r').split('\r')
    live = [text for text in shown if text.strip() and text.partition(':')[0] not in PASSES]
    assert len(live) > 5 and all(text.startswith('epoch ') and len(text) < 30 for text in live)   # a wrapped line could not be taken back
    assert [text.partition(':')[0] for text in shown if text.partition(':')[0] in PASSES] == PASSES

@pytest.mark.skipif(os.name == 'nt', reason='pipes end differently')
def test_a_reader_that_leaves(tmp_path, wanted):
    "As in `python train.py | head -1`."
    process, result = run(tmp_path, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait()
    assert result.read_text() == wanted, err

NOWHERE = RUN + '''
real, done = sys.stdout, []
for sys.stdout in open(1, 'w', encoding='ascii', closefd=False), None, open(1, 'w', closefd=False):
    if done: sys.stdout and sys.stdout.close()
    done.append(train(**{'Δ': F.mse_loss}))
sys.stdout = real
assert len(set(done)) == 1
open(sys.argv[1], 'w').write(str(done[0]))
'''

def test_no_place_to_print(tmp_path, wanted):
    "An output that takes no Greek, none at all, a closed one."
    process, result = run(tmp_path, NOWHERE, stdout=subprocess.PIPE)
    out, err = process.communicate()
    assert result.read_text() == wanted and not err
    assert len([line for line in out.decode().splitlines() if '\\u0394' in line]) == 6


KERNEL = '''
import time, torch.nn.functional as F
from course_lib.callbacks import MetricsCB, ProgressCB
from course_lib.learner import Callback, CancelFitException, synth_learner
class SlowCB(Callback):
    def after_batch(self, learn): time.sleep(.003)
class EndCB(Callback):
    def __init__(self, error): self.error = error
    def before_epoch(self, learn):
        if learn.epoch == 1 and self.error: raise self.error
def train(error=None, plot=True):
    learn = synth_learner([MetricsCB(F.l1_loss), ProgressCB(every=0, plot=plot), SlowCB(), EndCB(error)])
    learn.fit(3)
'''

@pytest.fixture(scope='module')
def outputs():
    "Outputs of one cell each, in a real kernel."
    cases = ['train()', 'train(plot=False)', 'train(CancelFitException)', 'train(KeyboardInterrupt)', 'train(ZeroDivisionError)']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in [KERNEL, *cases]])
    NotebookClient(nb, timeout=300, kernel_name='python3', allow_errors=True).execute()
    return {case: cell.outputs for case, cell in zip(cases, nb.cells[1:])}

def test_a_notebook_shows_one_table_and_one_curve(outputs):
    table, curve = outputs['train()']
    lines = table.data['text/markdown'].splitlines()
    assert lines[0].startswith('| epoch | train loss | train l1_loss | train time | valid loss') and len(lines) == 5
    assert 'image/png' in curve.data and 'text/html' not in table.data.keys() | curve.data.keys()

def test_a_notebook_without_curve(outputs): assert len(outputs['train(plot=False)']) == 1

@pytest.mark.parametrize('error', ['CancelFitException', 'KeyboardInterrupt', 'ZeroDivisionError'])
def test_a_fit_that_ends_early_leaves_its_table(outputs, error):
    table, curve, *rest = outputs[f'train({error})']
    assert len(table.data['text/markdown'].splitlines()) == 3 and 'image/png' in curve.data
    assert [o.output_type for o in rest] == ([] if 'Cancel' in error else ['error'])


batches = [(torch.randn(16, 1), torch.randn(16, 1))] * 300

def sched(opt): return torch.optim.lr_scheduler.ExponentialLR(opt, .9999)

def bare():
    model = nn.Linear(1, 1)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    s = sched(opt)
    for xb, yb in batches:
        opt.zero_grad()
        F.mse_loss(model(xb), yb).backward()
        opt.step()
        s.step()

def with_callbacks():
    cbs = [TrainCB(), DeviceCB('cpu'), MetricsCB(), RecorderCB(), ProgressCB(make_view=TextView), BatchSchedCB(sched)]
    Learner(nn.Linear(1, 1), DataLoaders(batches, None), lr=.01, cbs=cbs).fit()

def test_five_callbacks_are_cheap():
    "25 us a batch above the bare loop are the aim (the lesson measures it); this catches a wait or a copy in each batch, on a busy machine too."
    def seconds(f):
        start = time.thread_time()   # of this thread: others don't count
        f()
        return time.thread_time() - start
    rounds = [(seconds(bare), seconds(with_callbacks)) for _ in range(9)][1:]
    assert statistics.median((b - a) / a for a, b in rounds) < 1

def test_random_numbers_of_another_machine():
    "A checkpoint from a Mac, or from a machine with more GPUs, can be gone on with here."
    state = rng_state()
    before = torch.rand(3)
    set_rng_state(state | dict(mps=[torch.zeros(8, dtype=torch.uint8)], cuda=state['cuda'] + [torch.zeros(16, dtype=torch.uint8)]))
    assert torch.equal(torch.rand(3), before)

def test_a_loss_that_only_rose_has_no_halfway():
    with pytest.raises(ValueError, match='never fell in 10 batches'): halfway(range(10), [1, 1.1, 1.2, 1.4, 1.8, 2.5, 3, 3.5, 5, 9])
    with pytest.raises(ValueError, match='5 batches are too few'): halfway(range(5), [5, 4, 3, 2, 1])
