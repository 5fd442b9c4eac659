"The Learner from outside a notebook: real interrupts, every event cancelled, its cost, and the bare module in a fresh process."
import signal, statistics, subprocess, sys, time

import pytest
import torch
import torch.nn.functional as F

from course_lib.data import DataLoaders
from course_lib.learner import (ACTIONS, CANCELS, EVENTS, Callback, CancelBatchException, CancelFitException, Learner, Line, MomentumCB,
                                TrainCB, synth_dls, synth_learner)


def at(event, exception, order=50):
    "A callback that raises `exception` at `event`."
    def method(self, learn): raise exception
    return type('RaiseCB', (Callback,), {event: method, 'order': order})()

class TraceCB(Callback):
    "Writes down every event; speaks before the others."
    order = -100
    def __init__(self): self.seen = []

for name in EVENTS: setattr(TraceCB, name, lambda self, learn, name=name: self.seen.append(name))

def same_weights(model, other): return all(map(torch.equal, model.parameters(), other.parameters()))

def plain_fit(model, batches, n_epochs=1, **opt_args):
    opt = torch.optim.SGD(model.parameters(), lr=.1, **opt_args)
    for _ in range(n_epochs):
        for xb, yb in batches:
            opt.zero_grad()
            F.mse_loss(model(xb), yb).backward()
            opt.step()
    return model


# --- a fresh process

def run_python(code, **kw): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, **kw)

def test_library_alone():
    "The module trains without a notebook around it, and brings in no plotting and no progress bar."
    done = run_python('''
import sys
from course_lib.learner import synth_learner, MomentumCB
learn = synth_learner([MomentumCB()], lr=.02)
learn.fit(20)
assert abs(learn.model.a.item() - 3) < .1 and abs(learn.model.b.item() - 2) < .1, list(learn.model.parameters())
print([m for m in ('matplotlib', 'IPython', 'ipywidgets', 'accelerate', 'torchvision') if m in sys.modules])
''')
    assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stdout + done.stderr


# --- Ctrl-C

INTERRUPTED = '''
import torch
from course_lib.learner import Callback, Learner, Line, TrainCB, synth_dls, synth_learner

class HookCB(Callback):
    def before_fit(self, learn): self.handle = learn.model.register_forward_hook(lambda *args: None)
    def cleanup_fit(self, learn): self.handle.remove()

class SlowCB(Callback):
    order = 10
    def after_backward(self, learn):
        if learn.epoch == 1 and learn.iter == 0: print('training', flush=True)
    def cleanup_batch(self, learn): self.batch_closed = learn.epoch, learn.iter
    def cleanup_epoch(self, learn): self.epoch_closed = learn.epoch
    def cleanup_fit(self, learn): self.fit_closed = True

slow = SlowCB()
learn = synth_learner([HookCB(), slow])
try: learn.fit(10**9)
except KeyboardInterrupt: print('interrupted')
assert not learn.model._forward_hooks and not learn.fitting
assert slow.fit_closed and slow.epoch_closed == learn.epoch and slow.batch_closed[0] in (learn.epoch, learn.epoch - 1)
assert torch.is_grad_enabled() and all(torch.isfinite(p).all() for p in learn.model.parameters())

learn.cbs, reference = [TrainCB()], synth_learner()
reference.model.load_state_dict(learn.model.state_dict())
learn.fit(3)        # a gradient left by the interrupted batch would show here
reference.fit(3)
assert all(map(torch.equal, learn.model.parameters(), reference.model.parameters()))
print('usable')
'''

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no SIGINT for one child process')
@pytest.mark.parametrize('delay', [0, .3])
def test_ctrl_c(delay):
    "A real SIGINT, at a moment of its own choosing, reaches the caller; all is cleaned up and the model can be trained on."
    p = subprocess.Popen([sys.executable, '-c', INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'training\n', p.stderr.read()
        time.sleep(delay)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=120)
    finally: p.kill()
    assert (p.returncode, out) == (0, 'interrupted\nusable\n'), err


# --- cancelling

LEVEL = {event: event.split('_')[1] for event in EVENTS} | {e: 'batch' for e in ('after_predict', 'after_loss', 'after_backward', 'after_step')}
RUNNING = dict(fit=('fit',), epoch=('epoch', 'fit'), batch=('batch', 'epoch', 'fit'))   # levels that a cancel can end, from an event of this one

@pytest.mark.parametrize('event', [e for e in EVENTS if not e.startswith('cleanup')])
@pytest.mark.parametrize('level', CANCELS)
def test_cancel_at_every_event(event, level):
    "Whatever level is cancelled at whatever event, what was begun is cleaned up once, and a level that doesn't run can't be cancelled."
    trace = TraceCB()
    learn = synth_learner([trace, at(event, CANCELS[level])])
    if level in RUNNING[LEVEL[event]]: learn.fit(2)
    else:
        with pytest.raises(CANCELS[level]): learn.fit(2)
    for l in CANCELS: assert trace.seen.count(f'before_{l}') == trace.seen.count(f'cleanup_{l}')
    assert trace.seen[-1] == 'cleanup_fit' and not learn.fitting
    ended = {'fit': 1, 'epoch': 4, 'batch': 2 * (10 + 3)}[level]
    if level == LEVEL[event]: assert trace.seen.count(f'cleanup_{level}') == ended   # each one was cancelled, and the next begun

@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_error_at_every_event(event, error):
    "An error at any event reaches the caller, after the cleanup of every level that was begun."
    trace = TraceCB()
    learn = synth_learner([trace, at(event, error('stop'))])
    with pytest.raises(error, match='stop'): learn.fit(2)
    for l in CANCELS: assert trace.seen.count(f'before_{l}') == trace.seen.count(f'cleanup_{l}')
    assert trace.seen[-1] == 'cleanup_fit' and not learn.fitting and torch.is_grad_enabled()
    learn.model, learn.cbs = Line(), [TrainCB()]
    learn.fit(3)
    assert same_weights(learn.model, plain_fit(Line(), learn.dls.train, 3))

@pytest.mark.parametrize('event', ['cleanup_batch', 'cleanup_epoch', 'cleanup_fit'])
def test_failing_cleanup_keeps_the_others_and_the_first_error(event):
    trace = TraceCB()
    learn = synth_learner([trace, at('after_loss', ValueError('first'), 1), at(event, OSError('second'), 2), at(event, LookupError('third'), 3)])
    with pytest.raises(OSError, match='second') as e: learn.fit()
    assert trace.seen[-3:] == ['cleanup_batch', 'cleanup_epoch', 'cleanup_fit']
    causes = [e.value]
    while causes[-1].__context__: causes.append(causes[-1].__context__)
    assert [str(c) for c in causes] == ['second', 'third', 'first']

def test_cancelled_batch_leaves_no_gradient():
    class SkipCB(Callback):
        def after_backward(self, learn):
            if learn.iter % 3 == 0: raise CancelBatchException()
    learn = synth_learner([SkipCB()])
    learn.fit(2)
    kept = [b for i, b in enumerate(learn.dls.train) if i % 3]
    assert same_weights(learn.model, plain_fit(Line(), kept, 2))


# --- fits

def test_validation_has_no_gradient_and_eval_mode():
    class LookCB(Callback):
        def before_fit(self, learn): self.seen = set()
        def after_loss(self, learn): self.seen.add((learn.training, learn.model.training, learn.loss.requires_grad))
    look = LookCB()
    synth_learner([look]).fit(2)
    assert look.seen == {(True, True, True), (False, False, False)}

@pytest.mark.parametrize('train, valid, passes', [(True, True, 'TVTV'), (True, False, 'TT'), (False, True, 'VV'), (False, False, '')])
def test_passes(train, valid, passes):
    class PassCB(Callback):
        def before_fit(self, learn): self.seen = ''
        def before_epoch(self, learn): self.seen += 'T' if learn.training else 'V'
    cb = PassCB()
    learn = synth_learner([cb])
    learn.fit(2, train=train, valid=valid)
    assert cb.seen == passes and (learn.opt is not None) == train
    learn.dls.valid = None
    learn.fit(2, train=train, valid=valid)
    assert cb.seen == passes.replace('V', '')

def test_callbacks_and_rate_of_one_fit():
    "What is given to `fit` holds for that fit only."
    rates = []
    class RateCB(Callback):
        def before_fit(self, learn): rates.append(learn.opt.param_groups[0]['lr'])
    learn = synth_learner(lr=.1)
    learn.fit(cbs=[RateCB()], lr=.5)
    learn.fit(cbs=[RateCB()])
    learn.fit()
    assert rates == [.5, .1] and len(learn.cbs) == 1

def test_nested_fits():
    "Another learner may fit inside a callback, also in validation, and its cancels stay its own; the same learner refuses, and recovers."
    class InnerCB(Callback):
        def after_epoch(self, learn):
            self.inner = synth_learner([at('after_batch', CancelFitException)] if learn.training else [])
            self.inner.fit(3)
    cb = InnerCB()
    learn = synth_learner([cb])
    learn.fit(3)
    assert same_weights(learn.model, plain_fit(Line(), learn.dls.train, 3)) and same_weights(cb.inner.model, learn.model)

    class SelfCB(Callback):
        def after_epoch(self, learn): learn.fit()
    with pytest.raises(RuntimeError, match='is in a fit'): learn.fit(cbs=[SelfCB()])
    learn.fit()

def test_momentum():
    "Equal to torch's own, bit for bit, in a first and a second fit, also after an interrupt, and with a frozen parameter."
    batches = synth_dls().train
    learn = Learner(Line(), DataLoaders(batches, None), lr=.1, cbs=[TrainCB(), MomentumCB(.6)])
    reference = plain_fit(Line(), batches, 2, momentum=.6)
    learn.fit(2)
    assert same_weights(learn.model, reference)
    with pytest.raises(KeyboardInterrupt): learn.fit(cbs=[at('after_backward', KeyboardInterrupt)])
    learn.fit(2)
    assert same_weights(learn.model, plain_fit(reference, batches, 2, momentum=.6))
    learn.model.a.requires_grad_(False)
    before = learn.model.a.item()
    learn.fit(2)
    assert learn.model.a.item() == before

def test_changed_epochs():
    "A callback that resumes a training may shorten the fit."
    class ResumeCB(Callback):
        def before_fit(self, learn): learn.epochs = range(3, learn.n_epochs)
    learn = synth_learner([ResumeCB()])
    learn.fit(5)
    assert same_weights(learn.model, plain_fit(Line(), learn.dls.train, 2)) and learn.epoch == 4


# --- mistakes

@pytest.mark.parametrize('name', ['befor_fit', 'before_step', 'after_lost', 'cleanup_train', 'beforeFit', 'after_zero_grad'])
def test_misspelt_event(name):
    with pytest.raises(ValueError, match=f'TypoCB.{name} is no event'): type('TypoCB', (Callback,), {name: lambda self, learn: None})

@pytest.mark.parametrize('name', ['update', 'log', 'plot', 'fit', 'batch', 'state_dict', '_before_fit', 'every', 'step', 'steps'])
def test_other_names_are_free(name): type('FreeCB', (Callback,), {name: lambda self: None})

@pytest.mark.parametrize('batch, n_inp, error', [
    (torch.zeros(2, 1), 1, TypeError), ({'x': torch.zeros(2, 1)}, 1, TypeError), ((torch.zeros(2, 1),), 2, ValueError), ((), 1, ValueError)])
def test_bad_batch(batch, n_inp, error):
    with pytest.raises(error, match='batch'): Learner(Line(), DataLoaders([batch], None), cbs=[TrainCB(n_inp)]).fit()

@pytest.mark.parametrize('action', ACTIONS)
def test_missing_action(action):
    "One message names what is missing, before anything has run."
    bring = type('BringCB', (Callback,), {a: lambda self, learn: None for a in ACTIONS if a != action})
    trace = TraceCB()
    with pytest.raises(ValueError, match=f'no callback brings {action}; add TrainCB'): Learner(Line(), synth_dls(), cbs=[bring(), trace]).fit()
    assert not trace.seen

def test_class_instead_of_callback():
    with pytest.raises(TypeError, match=r'write TrainCB\(\)'): Learner(Line(), synth_dls(), cbs=[TrainCB]).fit()


# --- cost

class Nothing:
    "Stands for a model, a loss and an optimizer, and does nothing: what is left is the loop."
    requires_grad = True
    def __call__(self, *args, **kw): return self
    def parameters(self): return [self]
    def train(self, training=True): pass
    backward = step = zero_grad = lambda self: None

def test_overhead():
    "A guard, not a measurement: lesson 10 holds the loop to 3 µs a batch on a quiet machine, this bound leaves room for a busy one."
    nothing, batches = Nothing(), [(1, 2)] * 1000
    learn = Learner(nothing, DataLoaders(batches, None), nothing, cbs=[TrainCB()], opt_func=nothing)
    def bare():
        nothing.train(True)
        for xb, yb in batches:
            nothing.zero_grad()
            loss = nothing(nothing(xb), yb)
            loss.backward()
            nothing.step()
    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    extra = statistics.median(seconds(learn.fit) - seconds(bare) for _ in range(15)) / len(batches)
    assert extra < 15e-6, f'{extra * 1e6:.1f} µs a batch above a bare loop'

def test_an_attribute_with_the_name_of_an_event():
    class CountCB(Callback):
        def before_fit(self, learn): self.step = 0   # an action's name
    learn = synth_learner([CountCB()])
    learn.fit()
    with pytest.raises(TypeError, match='CountCB.step has the name of an event or action, so it must be a method; got 0'): learn.fit()
