"Training plans: killed in the middle of a phase, laid out for odd lengths, and all the ways to get one wrong."
import math, random, statistics, time

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from course_lib.callbacks import BatchSchedCB, CheckpointCB, MetricsCB, SingleBatchCB, load_state, lr_find
from course_lib.data import DataLoaders
from course_lib.learner import Callback, Learner, Line, TrainCB, synth_dls, synth_learner
from course_lib.results import compare_times
from course_lib.schedules import PhaseCB, TrainingPhase, fit_phases, lay_out, phases_1cycle, phases_sgdr, plot_lr

from killed import equal, kill_at, posix

RUN = '''
import torch
from torch import nn
import torch.nn.functional as F
from torch.optim import SGD, AdamW, RMSprop
from course_lib.callbacks import CheckpointCB, MetricsCB, RecorderCB, accuracy, save_state
from course_lib.data import DataLoaders, TensorLoader
from course_lib.learner import Learner, TrainCB
from course_lib.schedules import TrainingPhase, fit_phases
from killed_run import SlowCB, checkpoint, result, seed, x, y

def data(size):
    part = x[:, :, :size, :size].contiguous()
    train = TensorLoader(part[:160], y[:160], bs=20, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return DataLoaders(train, TensorLoader(part[160:], y[160:], bs=40))

small, large = data(6), data(8)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
phases = [TrainingPhase(.5, RMSprop, .001), TrainingPhase(2, AdamW, [.01, (.02, .001)], 'cosine', (.95, .85), 'linear', wd=.1),
          TrainingPhase(2.5, SGD, .05, 'linear', .9, wd=.1, decoupled_wd=True)]
metrics, recorder, cbs = MetricsCB(accuracy), RecorderCB(), [CheckpointCB(checkpoint)] if checkpoint != '-' else []
learn = Learner(model, small, F.cross_entropy, cbs=[TrainCB(), metrics, recorder, SlowCB(), *cbs])
rates = fit_phases(learn, phases, [small, small, large], stop_div=True, groups=lambda model: [model[:4], model[4:]]).rates
save_state(dict(model=dict(model.state_dict()), opt=learn.opt.state_dict(), rows=metrics.rows, records=recorder.records, lrs=rates.lrs, moms=rates.moms), result)
'''

@posix
def test_killed_in_the_middle_of_two_phases(start, tmp_path):
    "Epochs 0 to 2 are small pictures (2.5 of them, the last one of 4 batches), 3 to 5 large ones; AdamW works from batch 4 to 19, SGD after."
    whole, pieces, checkpoint = tmp_path/'whole.safetensors', tmp_path/'pieces.safetensors', tmp_path/'run.safetensors'
    uninterrupted = start('-', whole, 1)
    kill_at(start(checkpoint, pieces, 1, pause=.02), 'batch 1 3')
    assert load_state(checkpoint)['opt'][0] == 'AdamW' and load_state(checkpoint)['done'] == 1
    kill_at(start(checkpoint, pieces, 2, pause=.02), 'batch 4 2')
    assert load_state(checkpoint)['opt'][0] == 'SGD' and load_state(checkpoint)['done'] == 4
    last = start(checkpoint, pieces, 3)
    assert last.wait() == uninterrupted.wait() == 0
    assert last.stdout.read().splitlines()[0] == 'batch 4 0'
    a, b = load_state(whole), load_state(pieces)
    assert equal(a, b)
    assert [len(lrs) for lrs in b['lrs']] == [len(b['records']['loss'])] * 2 == [40, 40] and len(b['rows']) == 12


def stop_at(epoch):
    class StopCB(Callback):
        def before_epoch(self, learn):
            if learn.epoch == epoch: raise KeyboardInterrupt
    return StopCB()

def test_a_checkpoint_of_another_plan(tmp_path):
    path, plan = tmp_path/'run.safetensors', [TrainingPhase(1, Adam), TrainingPhase(1.5, SGD)]
    with pytest.raises(KeyboardInterrupt): fit_phases(synth_learner([CheckpointCB(path), stop_at(2)]), plan)
    with pytest.raises(ValueError, match=r'the phases in the file end after \[10, 25\] batches; these after \[10, 30\]'):
        fit_phases(synth_learner([CheckpointCB(path)]), [plan[0], TrainingPhase(2, SGD)])
    other = [plan[0], TrainingPhase(1.5, RMSprop)]
    with pytest.raises(ValueError, match='another optimizer or other callbacks'): fit_phases(synth_learner([CheckpointCB(path)]), other)
    longer = fit_phases(synth_learner([CheckpointCB(path)]), [*plan, TrainingPhase(1, SGD)])   # what is still to come may change
    assert len(longer.rates.lrs[0]) == 35

def test_a_finished_run_does_nothing_more(tmp_path):
    path, plan = tmp_path/'run.safetensors', [TrainingPhase(1, Adam), TrainingPhase(.5, SGD, .1, 'linear')]
    done = synth_learner([CheckpointCB(path)])
    fit_phases(done, plan)
    again = synth_learner([CheckpointCB(path)])
    fit_phases(again, plan)
    assert equal(again.model.state_dict(), done.model.state_dict()) and equal(again.opt.state_dict(), done.opt.state_dict())


@pytest.mark.parametrize('error, what', [
    (ValueError, dict(epochs=0)), (ValueError, dict(epochs=-2)), (ValueError, dict(epochs=math.nan)), (ValueError, dict(epochs=math.inf)), (ValueError, dict(epochs='2')),
    (TypeError, dict(opt_fn='SGD')), (ValueError, dict(lr=-1)), (ValueError, dict(lr=math.nan)), (ValueError, dict(lr='big')), (ValueError, dict(lr=(.1, .2))), (ValueError, dict(lr=(.1,), lr_decay='linear')),
    (ValueError, dict(lr=(.1, .2, .3), lr_decay='linear')), (ValueError, dict(lr=[.1, (.1, -1)], lr_decay='linear')), (ValueError, dict(lr_decay='cosin')), (ValueError, dict(lr_decay=None)),
    (ValueError, dict(lr=(0., .1), lr_decay='exponential')), (ValueError, dict(lr=.1, lr_decay='exponential')), (ValueError, dict(momentum=1)), (ValueError, dict(momentum=(.9, .8))),
    (ValueError, dict(momentum=.9, momentum_decay='linear')), (ValueError, dict(momentum=(.9, 0.), momentum_decay='exponential')), (ValueError, dict(momentum=.9, momentum_decay='x')), (ValueError, dict(momentum_decay='linear')), (ValueError, dict(beta=1.)), (ValueError, dict(wd=-.1)),
    (ValueError, dict(wd=[.1, -.1])), (ValueError, dict(decoupled_wd=True)), (ValueError, dict(lr=[])), (TypeError, dict(lr_deacy='linear'))])
def test_a_phase_is_checked_where_it_is_written(error, what):
    with pytest.raises(error): TrainingPhase(**{'epochs': 1} | what)

OK = TrainingPhase(1)
BAD_PLANS = [([], {}), ([OK, TrainingPhase(.04)], {}), ([OK], dict(data_list=[])), ([OK, OK], dict(data_list=[synth_dls()])), ([OK], dict(data_list=[DataLoaders([], None)])),
             ([OK, TrainingPhase(1, lr=[.1, .2])], {}), ([OK, TrainingPhase(1, wd=[.1, .2])], {}), ([OK, TrainingPhase(1, momentum=[.1, .2])], {}), ([OK, TrainingPhase(1, beta=.9)], {}),
             ([OK, TrainingPhase(1, Adagrad, momentum=.9)], {}), ([OK], dict(groups=lambda model: [])), ([OK], dict(groups=lambda model: [model, model])), ([.1], {}),
             ([OK, TrainingPhase(1, lambda params, lr: SGD(params, lr, nesterov=True))], {})]

@pytest.mark.parametrize('phases, kw', BAD_PLANS)
def test_a_bad_plan_trains_nothing(phases, kw):
    learn, count = synth_learner(), []
    class CountCB(Callback):
        def before_batch(self, learn): count.append(1)
    with pytest.raises((ValueError, TypeError)): fit_phases(learn, phases, cbs=[CountCB()], **kw)
    assert not count and equal(learn.model.state_dict(), Line().state_dict())

def test_validation_sets_that_would_never_be_used():
    learn, phases, data_list = synth_learner(), [OK, OK], [synth_dls(), synth_dls()]
    learn.dls = DataLoaders(learn.dls.train, None)
    with pytest.raises(ValueError, match='the learner has no validation set'): fit_phases(learn, phases, data_list)
    fit_phases(learn, phases, data_list, valid=False)
    fit_phases(learn, phases, [DataLoaders(dls.train, None) for dls in data_list])

def test_a_fit_that_only_validates_leaves_the_rates():
    phased = fit_phases(learn := synth_learner(), [OK])
    before = [list(o) for o in phased.rates.lrs]
    learn.fit(1, train=False, cbs=[phased.rates])
    assert phased.rates.lrs == before and len(before[0]) == 10

def test_phase_cb_in_a_fit_of_another_length():
    with pytest.raises(ValueError, match='the phases take 1 epochs, the fit has 3; use fit_phases'): synth_learner().fit(3, cbs=[PhaseCB([OK])])


def test_layouts_of_random_plans():
    rng, lengths = random.Random(0), (7, 10, 23)
    data = [DataLoaders([None] * n, None) for n in lengths]
    for _ in range(200):
        phases = [TrainingPhase(rng.uniform(.2, 3)) for _ in range(rng.randint(1, 6))]
        chosen = [rng.choice(data) for _ in phases]
        ends, epochs = lay_out(phases, chosen)
        assert all(a < b for a, b in zip([0, *ends], ends))
        firsts = [first for _, first, _ in epochs]
        assert firsts == [sum(n for _, _, n in epochs[:i]) for i in range(len(epochs))] and firsts[-1] + epochs[-1][2] == ends[-1]
        for dls, first, n in epochs:   # each batch comes from the data of its phase
            assert 0 < n <= len(dls.train)
            assert {id(chosen[sum(i >= end for end in ends)]) for i in range(first, first + n)} == {id(dls)}
        for phase, dls, start, end in zip(phases, chosen, [0, *ends], ends): assert abs(end - start - phase.epochs * len(dls.train)) <= 1

def rates_of(phases, n_batches=10, **kw):
    learn = synth_learner(n=16 * n_batches)
    rates = fit_phases(learn, phases, valid=False, **kw).rates
    return rates.lrs[0], rates.moms[0]

@pytest.mark.parametrize('n, start, end', [(1, .1, .01), (13, .2, .0), (50, .01, .3)])
def test_equal_to_torch_at_other_lengths(n, start, end):
    pairs = dict(linear=lambda opt: LinearLR(opt, 1., end / start, total_iters=n) if end <= start else LinearLR(opt, start / end, 1., total_iters=n), cosine=lambda opt: CosineAnnealingLR(opt, n, eta_min=end))
    for decay, make in pairs.items():
        opt = SGD([torch.zeros(1, requires_grad=True)], lr=max(start, end) if decay == 'linear' else start)
        sched, theirs = make(opt), []
        for _ in range(n):
            theirs.append(opt.param_groups[0]['lr'])
            opt.step()
            sched.step()
        ours, _ = rates_of([TrainingPhase(1, lr=(start, end), lr_decay=decay)], n)
        assert ours == pytest.approx(theirs, abs=1e-9)

def test_plans_last_as_long_as_they_say():
    for cycle_len, mult, k in ((1, 2, 3), (2, 1, 4), (3, 3, 2)): assert sum(p.epochs for p in phases_sgdr(.1, SGD, k, cycle_len, mult)) == pytest.approx(sum(cycle_len * mult**i for i in range(k)))
    for pct in (0, 10, 50): assert sum(p.epochs for p in phases_1cycle(5, .1, pct=pct)) == pytest.approx(5)


def fit_line(phases, **kw):
    learn = synth_learner()
    fit_phases(learn, phases, **kw)
    return learn

@pytest.mark.parametrize('opt_fn', [Adam, AdamW, RMSprop, lambda params, lr: SGD(params, lr, momentum=.9)])
def test_a_boundary_leaves_no_trace(opt_fn):
    whole, cut = fit_line([TrainingPhase(2, opt_fn, .05, 'linear')]), fit_line([TrainingPhase(.7, opt_fn, (.05, .0325), 'linear'), TrainingPhase(1.3, opt_fn, .0325, 'linear')])
    assert torch.allclose(whole.model.a, cut.model.a, atol=1e-5) and torch.allclose(whole.model.b, cut.model.b, atol=1e-5)

def test_another_class_begins_anew():
    learn = fit_line([TrainingPhase(1, Adam), TrainingPhase(1, AdamW)])
    assert {int(s['step']) for s in learn.opt.state.values()} == {10}

@pytest.mark.parametrize('first, then', [(dict(opt_fn=RMSprop), dict(opt_fn=RMSprop, momentum=.9)), (dict(opt_fn=Adam), dict(opt_fn=lambda params, lr: Adam(params, lr, amsgrad=True))),
                                         (dict(opt_fn=SGD), dict(opt_fn=SGD, momentum=.9)), (dict(opt_fn=SGD, momentum=.9), dict(opt_fn=SGD))])
def test_options_that_need_more_memory(first, then):
    learn = fit_line([TrainingPhase(1, **first), TrainingPhase(1, **then)])
    assert math.isfinite(learn.loss.item())

def test_groups_and_frozen_parameters():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    learn = Learner(net, synth_dls(), cbs=[TrainCB()])
    rates = fit_phases(learn, [TrainingPhase(1, lr=[.01, .1], wd=[0., .1])], groups=lambda model: [model[0], model[2]]).rates
    assert rates.lrs == [[.01] * 10, [.1] * 10] and [g['weight_decay'] for g in learn.opt.param_groups] == [0., .1]
    assert [len(g['params']) for g in learn.opt.param_groups] == [1, 2] and torch.equal(net[0].weight, before)

def test_the_learners_validation_set_stands_in():
    learn, metrics = synth_learner(), MetricsCB()
    fit_phases(learn, [OK, OK], data_list=[learn.dls, DataLoaders(synth_dls(seed=1).train, None)], cbs=[metrics])
    assert [row['train'] for row in metrics.rows] == [True, False] * 2 and all(math.isfinite(row['loss']) for row in metrics.rows)
    learn.dls.valid = None
    fit_phases(learn, [OK], cbs=[metrics])
    assert [row['train'] for row in metrics.rows] == [True]

def test_other_loaders_are_only_borrowed():
    learn, other = synth_learner(), synth_dls(seed=1)
    dls = learn.dls
    fit_phases(learn, [OK, OK], data_list=[other, dls])
    assert learn.dls is dls and len(dls.train) == 10

def test_one_batch_of_each_epoch():
    learn = synth_learner([SingleBatchCB()])
    phased = fit_phases(learn, [TrainingPhase(.5, Adam), TrainingPhase(2, lr=.1), TrainingPhase(.6, lr=.2)])
    assert phased.rates.lrs == [[.01, .1, .1, .2]] and phased.names[-1] == 'SGD'

def test_a_side_fit_afterwards():
    learn = synth_learner()
    fit_phases(learn, [TrainingPhase(1, Adam)])
    opt = learn.opt
    lr_find(learn, max_batches=5)
    assert learn.opt is opt

class ScriptCB(Callback):
    order = 10
    def __init__(self, losses): self.losses = losses
    def get_loss(self, learn): learn.loss = 0 * learn.preds.mean() + self.losses[learn.iter]

@pytest.mark.parametrize('losses, n', [([1.] * 10, 10), ([1.] * 5 + [12.] + [1.] * 4, 10), ([1.] * 5 + [17.] * 5, 6), ([1., math.nan] + [1.] * 8, 2), ([1.] * 6 + [math.inf] * 4, 7), ([-1.] * 5 + [1.] * 5, 10), ([-1.] * 5 + [9.] * 5, 7)])
def test_stop_div(losses, n):
    rates = fit_phases(synth_learner([ScriptCB(losses)]), [OK], stop_div=True).rates
    assert len(rates.lrs[0]) == n

def test_rates_cost_at_most_microseconds():
    dls = DataLoaders(synth_dls().train * 40, None)
    def fit(*make): Learner(Line(), dls, lr=.01, cbs=[TrainCB(), *(m() for m in make)], opt_func=lambda params, lr: SGD(params, lr, momentum=.9)).fit()
    timing = compare_times(dict(bare=fit, phases=lambda: fit(lambda: PhaseCB(phases_1cycle(1, .1)))), rounds=15, check=None, clock=time.thread_time)
    more = statistics.median(p - b for b, p in zip(*timing.seconds.values())) / 400
    assert more < 25e-6   # about 3 on a quiet machine

def test_plot(monkeypatch):
    import matplotlib
    matplotlib.use('Agg')
    phased = fit_phases(synth_learner(), [TrainingPhase(1, Adam), TrainingPhase(1, SGD)])
    ax, moms = plot_lr(phased)
    assert [t.get_text() for t in ax.texts] == ['Adam', 'SGD'] and moms.get_ylabel() == 'momentum'
    ax, = plot_lr(phased, show_text=False, show_moms=False)
    assert not ax.texts

def test_a_scheduler_beside_phases():
    with pytest.raises(ValueError, match='a BatchSchedCB would do nothing'):
        fit_phases(synth_learner([BatchSchedCB(lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, .5))]), [OK])
