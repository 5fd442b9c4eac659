"Mixed precision: what a notebook can't hold: a kill, silent fallbacks of torch, contexts of others, every moment at which a batch can end."
import contextlib, math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.callbacks import CheckpointCB, capture_preds, load_state, lr_find
from course_lib.core import set_seed
from course_lib.data import DataLoaders
from course_lib.learner import Callback, CancelBatchException, CancelEpochException, CancelFitException, Learner, TrainCB
from course_lib.mixed_precision import AutocastCB, MixedPrecision, autocast_dtype, fast_dtype

from killed import equal, kill_at, posix

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
MOMENTS = 'before_batch', 'after_predict', 'after_loss', 'after_backward', 'after_step', 'after_batch'

def batches(n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    xs = torch.randn(n, 16, 8, generator=gen)
    return [(x, x[:, :1] * x[:, 1:2]) for x in xs]

def net():
    set_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

def learner(*cbs, valid=None, data=None, model=None, lr=1e-2, opt_func=torch.optim.Adam):
    return Learner(model or net(), DataLoaders(data or batches(), valid), lr=lr, cbs=[TrainCB(), *cbs], opt_func=opt_func)

def same(a, b): return all(map(torch.equal, a.parameters(), b.parameters()))

@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    left = torch.is_autocast_enabled('cpu')
    torch.set_autocast_enabled('cpu', False)
    torch.clear_autocast_cache()
    assert not left

def fail_at(event, exc, training=True, order=0):
    def fail(self, learn):
        if learn.training == training and learn.iter == 1: raise exc('on purpose')
    return type('FailCB', (Callback,), {event: fail, 'order': order})()


ENDS = CancelBatchException, CancelEpochException, CancelFitException, KeyError, KeyboardInterrupt
@pytest.mark.parametrize('event, exc, order', [*((e, x, 20) for e in MOMENTS for x in ENDS), *((e, KeyError, -20) for e in MOMENTS)])
def test_autocast_is_left_however_a_batch_ends(event, exc, order):
    learn = learner(MixedPrecision(FP16), fail_at(event, exc, order=order), valid=batches(2))
    try: learn.fit(2)
    except (KeyError, KeyboardInterrupt): pass
    assert not torch.is_autocast_enabled('cpu')
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)   # and the nesting is back at zero: casts of weights are not kept from one block to the next
    for _ in range(2):
        with torch.autocast('cpu', BF16): out = layer(x)
        assert torch.allclose(out.float(), layer(x), atol=.05)
        with torch.no_grad(): layer.weight += 1
    learn.cbs = learn.cbs[:2]
    learn.fit()   # and the scaler of a new fit knows nothing of it
    assert math.isfinite(learn.loss.item())

@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_loss', 'after_batch'])
def test_validation_too(event):
    with pytest.raises(KeyError): learner(AutocastCB(BF16), fail_at(event, KeyError, training=False), valid=batches(3)).fit()
    assert not torch.is_autocast_enabled('cpu')

def test_autocast_around_the_fit_survives():
    with torch.autocast('cpu', BF16):
        learner(MixedPrecision(FP16), fail_at('after_loss', CancelBatchException)).fit()
        assert torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == BF16
    assert not torch.is_autocast_enabled('cpu')

def test_only_predictions_and_loss_are_under_autocast():
    seen = {}
    class LookCB(Callback):
        order = 5
        def before_batch(self, learn): seen['before_batch'] = torch.is_autocast_enabled('cpu')
        def after_predict(self, learn): seen['after_predict'] = torch.is_autocast_enabled('cpu')
        def after_loss(self, learn): seen['after_loss'] = torch.is_autocast_enabled('cpu')
        def after_backward(self, learn): seen['after_backward'] = torch.is_autocast_enabled('cpu')
        def after_batch(self, learn): seen['after_batch'] = torch.is_autocast_enabled('cpu')
    learner(MixedPrecision(BF16), LookCB()).fit()
    assert seen == dict(before_batch=True, after_predict=True, after_loss=False, after_backward=False, after_batch=False)


class SilentAutocast(contextlib.nullcontext):
    "As torch.autocast is where it doesn't know the type: it does nothing."
    def __init__(self, *args, **kw): super().__init__()

def test_autocast_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(torch, 'autocast', SilentAutocast)
    for dtype in (FP16, BF16):
        with pytest.raises(ValueError, match=f'autocast to {dtype} on cpu gives torch.float32'): learner(MixedPrecision(dtype)).fit()
    learner(MixedPrecision(FP32)).fit()

def test_operations_that_do_not_exist_in_half_are_found(monkeypatch):
    def no_half(*args, **kw): raise RuntimeError('"slow_conv2d_cpu" not implemented for \'Half\'')
    monkeypatch.setattr(F, 'conv2d', no_half)
    with pytest.raises(ValueError, match="cpu does not train with autocast to torch.float16: .*not implemented for 'Half'"): autocast_dtype('cpu', FP16)

@pytest.mark.parametrize('dtype', [torch.float64, torch.int32, torch.complex64])
@pytest.mark.filterwarnings('ignore')
def test_other_types(dtype):
    with pytest.raises(ValueError, match='autocast to'): learner(MixedPrecision(dtype)).fit()

@pytest.mark.parametrize('dtype', ['fp16', 16, float])
def test_what_is_no_type_is_named(dtype):
    with pytest.raises(TypeError, match='dtype is a torch.dtype such as torch.bfloat16; got'): learner(MixedPrecision(dtype)).fit()
    assert not torch.is_autocast_enabled('cpu')

def test_the_default_works_here():
    learn = learner(MixedPrecision())
    learn.fit()
    assert learn.cbs[1].dtype == fast_dtype('cpu') and not learn.scaler.is_enabled()

def test_float32_changes_nothing():
    plain, off = learner(), learner(MixedPrecision(FP32))
    for l in (plain, off): l.fit(2)
    assert same(plain.model, off.model)


@pytest.mark.parametrize('event', ['after_backward', 'after_loss'])
def test_a_cancelled_batch_is_looked_at_but_not_learned(event):
    data = batches()
    data[1] = data[1][0], data[1][1] * math.inf
    learn = learner(MixedPrecision(FP16, init_scale=2.**8), fail_at(event, CancelBatchException), data=data)
    learn.fit()
    assert learn.scaler.get_scale() == (2.**7 if event == 'after_backward' else 2.**8)
    ref = learner(MixedPrecision(FP16, init_scale=2.**8), data=[data[0], *data[2:]])
    ref.fit()
    assert same(learn.model, ref.model)

def test_a_bad_batch_is_skipped():
    data = batches()
    data[2] = data[2][0], data[2][1] * math.nan
    learn = learner(MixedPrecision(FP16, init_scale=2.**8), data=data)
    ref = learner(MixedPrecision(FP16, init_scale=2.**8), data=[*data[:2], *data[3:]])
    for l in (learn, ref): l.fit()
    assert learn.scaler.get_scale() == 2.**7 and all(torch.allclose(p, q, atol=1e-3) for p, q in zip(learn.model.parameters(), ref.model.parameters()))

def test_frozen_and_unused_parameters():
    model = net()
    model[0].requires_grad_(False)
    model.register_parameter('unused', nn.Parameter(torch.ones(3)))
    frozen = model[0].weight.clone()
    learn = learner(MixedPrecision(FP16), model=model)
    learn.fit(2)
    assert torch.equal(model[0].weight, frozen) and torch.equal(model.unused, torch.ones(3))

def test_nested_predictions_become_float32():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
        def forward(self, x): return dict(out=self.net(x), rest=(self.net(x), 'a text'))
    seen = []
    def loss_func(preds, yb):
        seen.append((preds['out'].dtype, preds['rest'][0].dtype, preds['rest'][1]))
        return F.mse_loss(preds['out'], yb)
    learn = Learner(Two(), DataLoaders(batches(), None), loss_func, 1e-2, [TrainCB(), MixedPrecision(FP16)])
    learn.fit()
    assert set(seen) == {(FP32, FP32, 'a text')}

def test_validation_alone_needs_no_scaler():
    learn = learner(MixedPrecision(FP16), valid=batches(2))
    learn.fit(train=False)
    assert not hasattr(learn, 'scaler') and learn.preds.dtype == FP32
    preds, targets = capture_preds(learn)
    assert preds.dtype == FP32 and len(preds) == 32 and not hasattr(learn, 'scaler')

def test_lr_find_leaves_no_trace():
    learn = learner(MixedPrecision(FP16, init_scale=2.**30))
    lr_find(learn, start_lr=1e-5)
    assert not hasattr(learn, 'scaler') and same(learn.model, net()) and learn.cbs[1].scaler is None
    learn.fit()
    state = learn.scaler.state_dict()
    lr_find(learn, start_lr=1e-5)
    assert learn.scaler.state_dict() == state and learn.cbs[1].scaler is None

def test_one_callback_may_serve_two_learners_in_turn():
    mixed = MixedPrecision(FP16, init_scale=2.**30)
    first, second, alone = learner(mixed), learner(mixed), learner(MixedPrecision(FP16, init_scale=2.**30))
    for l in (first, second, alone): l.fit()
    assert same(second.model, alone.model) and same(first.model, alone.model)


@pytest.mark.parametrize('before, after', [(FP16, BF16), (BF16, FP16)])
def test_a_checkpoint_goes_on_in_another_type(tmp_path, before, after):
    path = tmp_path/'a.safetensors'
    learner(MixedPrecision(before), CheckpointCB(path)).fit(1)
    learn = learner(MixedPrecision(after), CheckpointCB(path))
    learn.fit(2)
    assert learn.cbs[1].dtype == after and math.isfinite(learn.loss.item())

RUN = '''
import torch
from torch import nn
from course_lib.callbacks import CheckpointCB, save_state
from course_lib.data import DataLoaders, TensorLoader
from course_lib.learner import Learner, TrainCB
from course_lib.mixed_precision import MixedPrecision
from killed_run import SlowCB, checkpoint, result

x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(.2), nn.Linear(16, 1))
cbs = [CheckpointCB(checkpoint)] if checkpoint != '-' else []
learn = Learner(model, DataLoaders(TensorLoader(x, x[:, :1] * x[:, 1:2], bs=16, shuffle=True), None), lr=1e-2, opt_func=torch.optim.Adam,
                cbs=[TrainCB(), MixedPrecision(torch.float16, init_scale=2.**30, growth_interval=5), SlowCB(), *cbs])
learn.fit(4)
save_state(dict(model=dict(model.state_dict()), scaler=learn.scaler.state_dict()), result)
'''

@posix
def test_a_killed_run_goes_on_with_its_scale(start, tmp_path):
    whole, pieces, checkpoint = tmp_path/'whole.safetensors', tmp_path/'pieces.safetensors', tmp_path/'run.safetensors'
    uninterrupted = start('-', whole, 7)   # runs beside the other
    kill_at(start(checkpoint, pieces, 7, pause=.05), 'batch 2 3')
    assert not pieces.exists()
    last = start(checkpoint, pieces, 8)
    assert last.wait() == uninterrupted.wait() == 0
    assert last.stdout.read().startswith('batch 2 0')
    a, b = load_state(whole), load_state(pieces)
    assert equal(a, b) and a['scaler']['scale'] < 2**30

def test_two_that_open_autocast():
    "One inside the other, and closed in the same order, they would leave it open for the rest of the process."
    learn = Learner(nn.Linear(1, 1), DataLoaders([(torch.ones(2, 1), torch.ones(2, 1))], None), cbs=[TrainCB(), MixedPrecision(torch.bfloat16)])
    with pytest.raises(ValueError, match='MixedPrecision and AutocastCB would both open autocast'): learn.fit(cbs=[AutocastCB(torch.bfloat16)])
    assert not torch.is_autocast_enabled('cpu')
