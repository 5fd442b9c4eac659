"Diffusion: training that is killed and goes on, worker processes, other norms and sizes, samplers in float64, bad input."
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from course_lib.callbacks import CheckpointCB
from course_lib.core import set_seed
from course_lib.data import get_dls
from course_lib.ddpm import (LMSStep, UNet, UnwrapCB, add_noise, cosine_schedule, ddim_step, draw_by, euler_step, fit_ddpm, heun_step, init_ddpm, karras_collate, karras_sigmas,
                             karras_walk, last_losses, linear_schedule, noisify, noisify_collate, remap_schedule, sample, spread_steps, steer, visits)
from course_lib.learner import Callback

SMALL = dict(nfs=(8, 16))

def pictures(n=64, size=16): return [(im, 0) for im in torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0))]
def dls(n=64, **kw): return get_dls(pictures(n), pictures(16), 16, collate_fn=noisify_collate(linear_schedule(), **kw))


class DieCB(Callback):
    order = 2000   # after the checkpoint
    def after_epoch(self, learn):
        if learn.epoch == 1 and not learn.training: raise KeyboardInterrupt

def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    def run(path, cbs=()):
        set_seed(1)
        return fit_ddpm(init_ddpm(UNet(**SMALL)), dls(), 3, cbs=[CheckpointCB(path), *cbs]).model.state_dict()
    whole = run(tmp_path/'whole.safetensors')
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'cut.safetensors', [DieCB()])
    resumed = run(tmp_path/'cut.safetensors')
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_collation_in_worker_processes():
    assert pickle.loads(pickle.dumps(noisify_collate(linear_schedule(), draw_by(torch.ones(1000))))) is not None   # what spawn does
    assert pickle.loads(pickle.dumps(karras_collate(.5))) is not None
    loader = torch.utils.data.DataLoader(pictures(8), 4, collate_fn=noisify_collate(linear_schedule()), num_workers=2)
    batches = list(loader)
    assert [tuple(p.shape) for p in batches[0]] == [(4, 1, 16, 16), (4,), (4, 1, 16, 16)]
    assert not torch.equal(batches[0][2], batches[1][2])   # two workers, two noises


@pytest.mark.parametrize('kw', [dict(ni=3, nf=3), dict(n_blocks=2), dict(norm=partial(nn.GroupNorm, 4)), dict(norm=None), dict(act=nn.ReLU), dict(nfs=(8,)), dict(nfs=(8, 8, 8))])
def test_unets_of_all_kinds(kw):
    model = init_ddpm(UNet(**SMALL | kw))
    x = torch.randn(2, kw.get('ni', 1), 16, 24)
    assert torch.equal(model(x, torch.tensor([0, 999])), torch.zeros_like(x))
    set_seed(0)
    model = UNet(**SMALL | kw).eval()
    early, late = model(x, torch.zeros(2)), model(x, torch.full((2,), 500.5))
    assert early.shape == x.shape and not torch.allclose(early, late)   # it listens to the time

def test_without_batch_norm_pictures_are_apart():
    set_seed(0)
    model = UNet(**SMALL, norm=partial(nn.GroupNorm, 4)).double()
    x, t = torch.randn(4, 1, 16, 16).double(), torch.arange(4)
    torch.testing.assert_close(model(x, t)[1:2], model(x[1:2], t[1:2]))


@pytest.mark.parametrize('schedule', [linear_schedule, cosine_schedule])
@pytest.mark.parametrize('n', [25, 200, 1000, 4000])
def test_schedules_fall_from_one_to_nothing(schedule, n):
    abar = schedule(n)
    assert len(abar) == n and abar.dtype == torch.float32 and (abar.diff() < 0).all() and 1 > abar[0] > .95 and 0 < abar[-1] < 1e-3

@pytest.mark.parametrize('eta', [0, .5, 1])
def test_a_step_keeps_the_distribution(eta):
    "If the picture is known, the noised picture must have the next level's mean and variance, whatever eta is."
    set_seed(0)
    abar, after = torch.tensor(.3).double(), torch.tensor(.6).double()
    x0 = torch.full((400_000,), 2.).double()
    x = ddim_step(add_noise(x0, torch.randn_like(x0), abar), x0, abar, after, eta)
    assert abs(x.mean() - 2 * after.sqrt()) < .01 and abs(x.var() - (1 - after)) < .01

def test_remapping_keeps_the_mean_of_any_function_of_the_level():
    set_seed(0)
    abar, weights = cosine_schedule(), torch.rand(1000) + torch.linspace(0, 3, 1000)
    for f in torch.sqrt, torch.square, torch.sin:
        wanted = (weights * f(abar)).sum() / weights.sum()
        assert abs(f(remap_schedule(abar, weights)).mean() - wanted) < 2e-3

def cloud(x, sigma): return x * .25 / (.25 + sigma**2)

@pytest.mark.parametrize('make,order', [(lambda: euler_step, 1), (lambda: heun_step, 2), (lambda: LMSStep(2), 2), (lambda: LMSStep(4), 3)])
def test_orders_of_the_samplers(make, order):
    x = torch.linspace(-200, 200, 101).double()
    exact = x * .5 / (.25 + 80**2)**.5
    error = [(karras_walk(make(), cloud, x, karras_sigmas(n)) - exact).abs().mean() for n in (20, 40)]
    assert error[0] / error[1] > 2**order * .85

def test_churn_keeps_the_spread():
    set_seed(0)
    x = 80 * torch.randn(50_000).double()
    for churn in .05, .2, .4: assert abs(karras_walk(partial(heun_step, churn=churn), cloud, x, karras_sigmas(100)).std() - .5) < .02

def test_steering_with_no_push_is_the_plain_walk():
    set_seed(0)
    model = UNet(**SMALL).eval()   # not from `init_ddpm`, which begins by predicting 0
    x, abar, ts = torch.randn(2, 1, 16, 16), linear_schedule(), spread_steps(1000, 5)
    ends = [sample(model, x, abar, ts, 0), sample(model, x, abar, lambda p: p.sum(), ts, 0, push=0, walk=steer)]
    torch.testing.assert_close(*ends)
    assert not ends[1].requires_grad and all(p.grad is None for p in model.parameters())

def test_sampling_leaves_the_mode_of_the_model():
    model = init_ddpm(UNet(**SMALL)).train()
    sample(model, torch.randn(1, 1, 16, 16), linear_schedule(), spread_steps(1000, 2))
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize('call,error,words', [
    (lambda: linear_schedule(10), ValueError, 'n_steps must be above 20; got 10'),
    (lambda: cosine_schedule(0), ValueError, 'a step at least; got 0'),
    (lambda: spread_steps(100, 0), ValueError, 'visit 1 to 100; got 0'),
    (lambda: noisify(torch.zeros(2, 3, dtype=torch.uint8), linear_schedule()), TypeError, 'divide the pictures by 255'),
    (lambda: UNet(**SMALL)(torch.zeros(1, 1, 15, 16), torch.zeros(1)), ValueError, 'multiples of 2'),
    (lambda: sample(UNet(**SMALL), torch.zeros(1, 1, 16, 16), linear_schedule(), [9, 0], eta=-1), ValueError, 'from 0 to 1; got -1'),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as e: call()
    assert words in str(e.value)


def test_a_model_of_diffusers():
    diffusers = pytest.importorskip('diffusers')
    model = diffusers.UNet2DModel(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), norm_num_groups=8,
                                  down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)
    learn = fit_ddpm(model, dls(), 1, cbs=[UnwrapCB()])
    assert last_losses(learn)['valid'] < 2

def test_a_walk_goes_down():
    with pytest.raises(ValueError, match='the steps to visit must fall'): list(visits(cosine_schedule(100), range(0, 100, 10), torch.zeros(1)))
