"Muon on all kinds of parameters; killed, resumed, in phases, in two processes."
import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from course_lib.callbacks import BatchSchedCB, MetricsCB, RecorderCB, accuracy, load_state
from course_lib.core import set_seed
from course_lib.distributed import AccelerateCB, launch
from course_lib.learner import TrainCB
from course_lib.optimizers import Muon, orthogonalize
from course_lib.schedules import TrainingPhase, fit_phases

from distributed_run import classifier, outcome
from killed import equal, kill_at, posix

RUN = '''
import torch.nn.functional as F
from functools import partial
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from course_lib.callbacks import BatchSchedCB, CheckpointCB, MetricsCB, accuracy, save_state
from course_lib.data import DataLoaders, TensorLoader
from course_lib.learner import Learner, TrainCB
from course_lib.optimizers import Muon
from killed_run import SlowCB, checkpoint, result, x, y

model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 20, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 2))
dls = DataLoaders(TensorLoader(x[:160], y[:160], bs=20, shuffle=True), TensorLoader(x[160:], y[160:], bs=40))
sched, metrics = BatchSchedCB(partial(OneCycleLR, max_lr=.01, total_steps=32)), MetricsCB(accuracy)
learn = Learner(model, dls, F.cross_entropy, .01, [TrainCB(), sched, metrics, SlowCB(), *([CheckpointCB(checkpoint)] if checkpoint != '-' else [])], Muon)
learn.fit(4)
save_state(dict(model=dict(model.state_dict()), opt=learn.opt.state_dict(), rows=metrics.rows), result)
'''

@posix
def test_killed_and_gone_on_bit_for_bit(start, tmp_path):
    whole, pieces, checkpoint = tmp_path/'whole.safetensors', tmp_path/'pieces.safetensors', tmp_path/'run.safetensors'
    uninterrupted = start('-', whole, 1)
    kill_at(start(checkpoint, pieces, 1, pause=.02), 'batch 2 3')
    assert load_state(checkpoint)['done'] == 2
    last = start(checkpoint, pieces, 3)
    assert last.stdout.readline() == 'batch 2 0\n' and last.wait() == uninterrupted.wait() == 0
    a, b = load_state(whole), load_state(pieces)
    assert equal(a, b) and [s.get('n') for s in b['opt']['state'].values()] == [None, 32, 32, 32, None, 32, 32, 32]   # two kernels keep a mean only


def stepped(p, **kw):
    "The parameter after one step with a random gradient, and the root mean square of the step."
    before = p.detach().clone()
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    Muon([p], lr=.01, weight_decay=0, **kw).step()
    return p, (p.detach().double() - before.double()).pow(2).mean().sqrt().item()

@pytest.mark.parametrize('shape', [(8, 4, 3, 3), (64, 2, 3, 3), (6, 20, 1, 1), (20, 6, 1, 1), (5, 3, 7), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernels_of_any_form_move_by_a_fifth_of_the_rate(shape, dtype):
    _, rms = stepped(nn.Parameter(torch.zeros(shape, dtype=dtype)))
    assert rms == pytest.approx(.002, rel=.2)

def test_the_memory_layout_makes_no_difference():
    w = torch.randn(8, 4, 3, 3)
    plain, last = (stepped(nn.Parameter(w.clone().contiguous(memory_format=layout)))[0] for layout in (torch.contiguous_format, torch.channels_last))
    assert torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)

def test_matrices_are_matrices_only_if_asked():
    assert stepped(nn.Parameter(torch.zeros(20, 30)))[1] == pytest.approx(.01, rel=.01)   # Adam's first step is the sign
    assert stepped(nn.Parameter(torch.zeros(20, 30)), min_ndim=2)[1] == pytest.approx(.002, rel=.2)

def test_groups_have_settings_of_their_own():
    slow, fast = nn.Parameter(torch.zeros(4, 9)), nn.Parameter(torch.zeros(4, 9))
    slow.grad, fast.grad = torch.ones(4, 9), torch.randn(4, 9)
    Muon([dict(params=[slow], lr=.001), dict(params=[fast], min_ndim=2)], lr=.1, weight_decay=0).step()
    assert torch.allclose(slow, torch.full((4, 9), -.001)) and (torch.linalg.svdvals(fast.detach()) / (.1 * .2 * 3) - 1).abs().max() < .4

def test_without_gradient_nothing_moves():
    frozen, still = nn.Parameter(torch.ones(3, 2, 2)), nn.Parameter(torch.ones(3, 2, 2))
    still.grad = torch.zeros(3, 2, 2)
    opt = Muon([frozen, still], lr=.1, weight_decay=.5)
    opt.step()
    assert torch.equal(frozen, torch.ones(3, 2, 2)) and frozen not in opt.state
    assert torch.allclose(still, torch.full((3, 2, 2), .95))   # decay alone, and no NaN of 0/0

def test_a_closure_is_called_with_gradients():
    p = nn.Parameter(torch.ones(2, 3, 1))
    opt = Muon([p], lr=.1)
    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss
    assert opt.step(closure).item() == 6 and opt.step(closure).item() < 6

def test_directions_are_kept():
    g = torch.randn(12, 30, generator=torch.Generator().manual_seed(2))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.T @ orthogonalize(g) @ vt.T
    assert (inside - torch.diag(inside.diag())).abs().max() < .05 and .6 < inside.diag().min() and inside.diag().max() < 1.25


@pytest.mark.parametrize('fast', [False, True], ids=['float32', 'bfloat16'])
def test_either_precision_comes_near_the_orthogonal_matrix(monkeypatch, fast):
    monkeypatch.setattr('course_lib.optimizers.bf16_is_fast', lambda device: fast)
    for shape in (12, 30), (30, 12), (300, 3):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        found, (u, _, vt) = orthogonalize(g), torch.linalg.svd(g, full_matrices=False)
        assert found.dtype == torch.float32 and found.shape == g.shape
        assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vt).flatten(), dim=0) > .95

def test_a_matrix_that_becomes_none_starts_adam_anew():
    "Its mean is warm, and a mean square it never had: without a new start the first steps would be many times too long."
    p = nn.Parameter(torch.zeros(4, 6))
    opt = Muon([p], lr=.01, weight_decay=0, min_ndim=2)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        opt.step()
    opt.param_groups[0]['min_ndim'] = 3
    before = p.detach().clone()
    opt.step()
    assert torch.allclose(before - p, torch.full_like(p, .01), atol=1e-4)   # Adam's first step is the rate

@pytest.mark.parametrize('group, said', [(dict(min_ndim=1), 'two dimensions at least; got min_ndim=1'), (dict(lr=-1.), "can't be negative; got -1.0 and"),
                                         (dict(weight_decay=-.1), "can't be negative; got 0.003 and -0.1"), (dict(betas=(.9, 1.)), r'should lie in \[0,1\); got \(0.9, 1.0\)')])
def test_what_cannot_be(group, said):
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=said): Muon([p], **group)
    with pytest.raises(ValueError, match=said): Muon([dict(params=[p], **group)])

def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match='real parameters only'): Muon([nn.Parameter(torch.zeros(3, 3, 1, dtype=torch.complex64))])


def mlp_learner(*cbs):
    learn = classifier([TrainCB(), metrics := MetricsCB(accuracy), *cbs], lr=.05)
    learn.opt_func = partial(Muon, min_ndim=2)
    return learn, metrics

def test_cycles_take_it():
    learn, metrics = mlp_learner(BatchSchedCB(partial(OneCycleLR, max_lr=.1, total_steps=100)))
    learn.fit(20)
    assert learn.opt.param_groups[0]['betas'][0] == pytest.approx(.95, abs=.01)   # the cycle moves momentum, too
    assert metrics.rows[-1]['accuracy'] > .9

def test_phases_take_it():
    learn, metrics = mlp_learner()
    fit_phases(learn, [TrainingPhase(2, torch.optim.SGD, lr=.1), TrainingPhase(25, partial(Muon, min_ndim=2), (.1, .001), 'linear', (.95, .85), 'linear')])
    assert metrics.rows[-1]['accuracy'] > .9 and learn.opt.param_groups[0]['betas'][0] == pytest.approx(.85, abs=.02)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
@pytest.mark.usefixtures('warm')
def test_two_processes_train_one_model(monkeypatch):
    monkeypatch.setenv('COURSE_DEVICE', 'cpu')
    def fit(make_train=AccelerateCB):
        learn = classifier([make_train(), MetricsCB(accuracy), RecorderCB()], lr=.05)
        learn.opt_func = partial(Muon, min_ndim=2)
        set_seed(3)
        learn.fit(2)
        return outcome(learn)
    first, second = launch(fit)
    assert first['weights'] == second['weights']
    assert first['weights'] == pytest.approx(fit(TrainCB)['weights'], abs=5e-3)   # matrices are made orthogonal in sixteen bits
