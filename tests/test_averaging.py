"Averages that survive kill -9, and trainings that don't notice that they are averaged."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.averaging import AverageCB, EMACB, SWACB, estimate_bn, float_values, mean_step, measuring_bn, mix, swapped_in, try_weights
from course_lib.callbacks import BatchTransformCB, CheckpointCB, MetricsCB, capture_preds, load_state, lr_find
from course_lib.core import set_seed
from course_lib.data import DataLoaders, TensorLoader
from course_lib.learner import (Callback, CancelBatchException, CancelEpochException, CancelFitException, Learner, MomentumCB, TrainCB,
                                synth_learner)
from course_lib.schedules import TrainingPhase, fit_phases

from killed import equal, kill_at, posix

RUN = '''
import time, torch
import torch.nn.functional as F
from torch import nn
from course_lib.averaging import EMACB, SWACB
from course_lib.callbacks import CheckpointCB, MetricsCB, accuracy, save_state
from course_lib.data import DataLoaders, TensorLoader
from course_lib.learner import Callback, Learner, TrainCB
from killed_run import checkpoint, pause, result, x, y


class SlowCB(Callback):
    def after_batch(self, learn):
        print(f'{"train" if learn.training else "valid"} {learn.epoch} {learn.iter}', flush=True)
        time.sleep(pause if learn.training else 10 * pause)   # who reads the line has time to kill, before the epoch is saved

model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(144, 2))
dls = DataLoaders(TensorLoader(x[:160], y[:160], bs=20, shuffle=True), TensorLoader(x[160:], y[160:], bs=20))
swa, ema, metrics = SWACB(start=2), EMACB(.9, validate=False), MetricsCB(accuracy)
learn = Learner(model, dls, F.cross_entropy, lr=.1, cbs=[TrainCB(), metrics, swa, ema, SlowCB(), CheckpointCB(checkpoint)])
learn.fit(5)
with swa.averaged(learn): mean = {k: v.clone() for k, v in model.state_dict().items()}
save_state(dict(model=dict(model.state_dict()), mean=mean, swa=swa.state_dict(), ema=ema.state_dict(), rows=metrics.rows,
                rng=torch.get_rng_state()), result)
'''

@posix
def test_killed_while_the_mean_is_swapped_in(start, tmp_path):
    whole, pieces, checkpoint = tmp_path/'whole.safetensors', tmp_path/'pieces.safetensors', tmp_path/'run.safetensors'
    uninterrupted = start(tmp_path/'other.safetensors', whole, 1)   # runs beside the others
    kill_at(start(checkpoint, pieces, 1, pause=.02), 'valid 3 0')   # SWA began at the end of epoch 1; its mean is swapped in
    assert load_state(checkpoint)['done'] == 3
    last = start(checkpoint, pieces, 3)
    assert last.stdout.readline() == 'train 3 0\n' and last.wait() == uninterrupted.wait() == 0
    a, b = load_state(whole), load_state(pieces)
    assert equal(a, b)
    assert b['swa']['n'] == 4 and b['ema']['n'] == 5 * 8
    assert not equal(b['mean'], b['model'])


def images(n=60, shuffle=True):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=gen)
    y = (x.mean((1, 2, 3)) > 0).long()
    return DataLoaders(TensorLoader(x, y, bs=20, shuffle=shuffle), TensorLoader(x, y, bs=20))

def net(): return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(.2), nn.Flatten(), nn.Linear(48, 2))

def learner(*cbs, model=None):
    set_seed(0)
    return Learner(model or net(), images(), F.cross_entropy, lr=.1, cbs=[TrainCB(), *cbs])

def trained(*cbs, n_epochs=3):
    learn = learner(*cbs)
    learn.fit(n_epochs)
    return learn

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

def noise(batch): return batch[0] + .1 * torch.randn_like(batch[0]), batch[1]

@pytest.mark.parametrize('others', [(), (MomentumCB(.5),), (BatchTransformCB(noise),)], ids=['alone', 'momentum in the gradients', 'random transforms'])
@pytest.mark.parametrize('make', [SWACB, lambda: EMACB(.9), lambda: EMACB(.9, buffers=False)], ids=['swa', 'ema', 'ema, statistics measured'])
def test_training_does_not_notice(make, others):
    plain = trained(*others, MetricsCB())
    averaged = trained(*others, MetricsCB(), make())
    train_rows = [[r for r in learn.cbs[-1 - extra].rows if r['train']] for learn, extra in ((plain, 0), (averaged, 1))]
    assert equal(*train_rows)
    assert equal(weights(plain), weights(averaged))
    assert not averaged.active_cbs[-1].opened._exit_callbacks

class RaiseCB(Callback):
    order = 950
    def __init__(self, event, error, epoch=1):
        def method(learn):
            if not learn.training and learn.epoch == epoch: raise error
        setattr(self, event, method)

@pytest.mark.parametrize('event', ['before_epoch', 'before_batch', 'after_predict', 'after_loss', 'after_batch', 'after_epoch', 'cleanup_batch', 'cleanup_epoch'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError, CancelBatchException, CancelEpochException, CancelFitException])
def test_trained_weights_come_back(event, error):
    "Wherever validation ends; with before_batch, in the middle of measuring the statistics."
    learn = learner(SWACB(), RaiseCB(event, error))
    try: learn.fit(2)
    except (KeyboardInterrupt, ZeroDivisionError, CancelBatchException, CancelEpochException, CancelFitException): pass
    assert equal(weights(learn), weights(trained(n_epochs=2)))
    bn = learn.model[1]
    assert bn.momentum == .1 and not any(m.training for m in learn.model.modules())

def test_statistics_are_left_alone_by_an_error_while_measuring():
    learn = trained(SWACB())
    before, modes = weights(learn), [m.training for m in learn.model.modules()]
    def broken():
        yield next(iter(learn.dls.train))
        raise OSError('disk')
    with pytest.raises(OSError), try_weights(learn, learn.cbs[1].means, dl=broken()): pass
    assert equal(before, weights(learn)) and learn.model[1].momentum == .1
    assert modes == [m.training for m in learn.model.modules()]

def test_the_checkpoint_holds_the_trained_weights(tmp_path):
    path = tmp_path/'run.safetensors'
    learn = trained(SWACB(), CheckpointCB(path))
    assert equal(load_state(path)['model'], weights(learn)) and load_state(path)['cbs'][0][1]['n'] == 3

def test_another_callback_in_the_checkpoint(tmp_path):
    path = tmp_path/'run.safetensors'
    trained(SWACB(), CheckpointCB(path), n_epochs=1)
    with pytest.raises(ValueError, match='other callbacks .*SWACB in the file, EMACB here'): trained(EMACB(), CheckpointCB(path))

def test_resumed_with_other_tensors(tmp_path):
    path = tmp_path/'run.safetensors'
    trained(EMACB(.9), CheckpointCB(path), n_epochs=1)
    with pytest.raises(ValueError, match='only in one of them: 1.running_mean, 1.running_var'): trained(EMACB(.9, buffers=False), CheckpointCB(path))

def test_looking_aside_leaves_the_mean():
    swa = SWACB()
    learn = trained(swa)
    means, n = {k: v.clone() for k, v in swa.means.items()}, swa.n
    lr_find(learn, max_batches=5)
    preds, _ = capture_preds(learn)
    learn.fit(train=False)
    assert swa.n == n and equal(means, swa.means)
    with swa.averaged(learn): assert not torch.equal(capture_preds(learn)[0], preds)
    assert torch.equal(capture_preds(learn)[0], preds)

def test_several_averages_at_once():
    swa, ema = SWACB(), EMACB(.9, validate=False)
    trained(swa, ema)
    alone = SWACB(), EMACB(.9)
    for cb, other in zip((swa, ema), alone):
        trained(other)
        assert equal(cb.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match='SWACB and EMACB would all validate'): trained(SWACB(), EMACB())

def test_a_new_fit_begins_a_new_mean():
    swa = SWACB()
    learn = learner(swa)
    learn.fit(3)
    learn.fit(1)
    assert swa.n == 1 and equal(swa.means, {k: v.clone() for k, v in float_values(learn.model).items()})

def test_without_batch_norm_there_is_no_pass():
    class CountCB(Callback):
        n = 0
        def before_batch(self, learn): self.n += 1
    counts = []
    for cbs in (), (SWACB(),):
        counter = CountCB()
        synth_learner([counter, *cbs]).fit(2)
        counts.append(counter.n)
    assert counts[0] == counts[1]

def test_frozen_tied_and_odd_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.frozen = nn.Linear(1, 1), nn.Parameter(torch.randn(3), requires_grad=False)
            self.b = self.a   # tied
            self.wave = nn.Parameter(torch.ones(1, dtype=torch.complex64))
            self.wide = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.register_buffer('mask', torch.tensor([True]))
        def forward(self, x): return self.b(self.a(x)) * self.wave.abs() + self.wide.float()
    learn = synth_learner([ema := EMACB(.9)], lr=.01)
    learn.model = Odd()
    frozen = learn.model.frozen.clone()
    learn.fit(2)
    assert sorted(ema.means) == ['a.bias', 'a.weight', 'frozen', 'wave', 'wide']
    assert ema.means['wave'].dtype == torch.complex64 and ema.means['wide'].dtype == torch.float64
    with ema.averaged(learn): assert torch.equal(learn.model.frozen, frozen) and not learn.model.a.weight.isnan().any()

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "The mean of many nearly equal halves is exact to float32, and resumes as float32."
    means = {}
    for n in range(1, 1001): mean_step(means, dict(w=torch.tensor([1 + (n % 2) / 64], dtype=dtype)), 1 / n)
    assert means['w'].dtype == torch.float32 and abs(means['w'].item() - (1 + 1 / 128)) < 1e-5

@pytest.mark.parametrize('make, said', [
    (lambda: SWACB(0), 'start counts epochs from 1; got 0'), (lambda: SWACB(-1), 'got -1'), (lambda: SWACB(2.5), 'got 2.5'), (lambda: SWACB('2'), "got '2'"),
    (lambda: EMACB(1), 'below 1; got 1'), (lambda: EMACB(-.1), 'got -0.1'), (lambda: EMACB(float('nan')), 'got nan'),
    (lambda: mix([{}, {}], [1]), 'a part of each of 2'), (lambda: mix([{}], [.5]), 'together 1'),
    (lambda: SWACB().averaged(None), 'SWACB has averaged nothing yet'),
    (lambda: estimate_bn(learner()), 'this learner has had none'),
    (lambda: trained(SWACB(4)), r'SWACB\(start=4\) would average nothing: this fit has 3 epochs'),
    (lambda: swapped_in(nn.Linear(1, 1), dict(w=torch.ones(1))).__enter__(), 'the model has no w; it has weight, bias'),
])
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said): make()

def test_a_fit_too_short_leaves_the_model_alone():
    learn = learner(SWACB(4))
    before = weights(learn)
    with pytest.raises(ValueError): learn.fit(3)
    assert equal(before, weights(learn))

def test_zero_decay_is_no_average():
    learn = trained(ema := EMACB(0))
    assert equal({k: v.clone() for k, v in float_values(learn.model, True).items()}, ema.means)

def test_base_class_needs_a_weight():
    with pytest.raises(AttributeError): AverageCB().add(synth_learner())

def test_measured_over_the_data_of_the_phase():
    def shifted(by): return DataLoaders([(torch.randn(16, 1) + by, torch.zeros(16, 1)) for _ in range(4)], None)
    set_seed(0)
    net, swa = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)), SWACB()
    learn = Learner(net, shifted(0), lr=.01, cbs=[TrainCB(), swa])
    fit_phases(learn, [TrainingPhase(2, lr=.01)], data_list=[shifted(100)])
    with swa.averaged(learn): assert abs(net[0].running_mean.item() - 100) < 1

def test_measuring_is_a_plain_mean():
    bn, batches = nn.BatchNorm1d(2), torch.randn(5, 8, 2) + 3
    with measuring_bn(bn):
        for xb in batches: bn(xb)
    torch.testing.assert_close(bn.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(bn.running_var, batches.var(1).mean(0))
    assert bn.momentum == .1 and bn.training

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_resumed_on_a_gpu(tmp_path):
    from course_lib.callbacks import DeviceCB
    def run(path, n):
        learn = learner(ema := EMACB(.9), DeviceCB('cuda'), CheckpointCB(path))
        learn.fit(n)
        return learn, ema
    run(tmp_path/'parts.safetensors', 1)
    for (learn, ema), n in ((run(tmp_path/'parts.safetensors', 3), 9), (run(tmp_path/'whole.safetensors', 3), 9)):
        assert ema.n == n and all(m.device.type == 'cuda' for m in ema.means.values())
