"Blocks as others use them: every choice of norm and act, odd inputs, copies and checkpoints, half precision, gradients."
import copy, io
from functools import partial

import pytest
import torch
from torch import nn

from course_lib.blocks import (Branches, ConcatPool, FadeIn, GeneralRelu, PreActBlock, ResBlock, concat_head, conv, dense_blocks,
                               down_path, factored, flatten_head, inception, kaiming, low_rank, lsuv, pre_conv, res_blocks, res_net,
                               up_path, zero_branches)

BLOCKS = ResBlock, PreActBlock, inception
NORMS = nn.BatchNorm2d, nn.InstanceNorm2d, partial(nn.GroupNorm, 2), None
ACTS = nn.ReLU, partial(GeneralRelu, leak=.1, sub=.4), None


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize('block', BLOCKS)
def test_every_norm_and_act_trains(block, act, norm):
    net = res_net(3, (8, 16), 5, n_blocks=2, block=block, act=act, norm=norm)
    out = net(torch.randn(2, 3, 16, 16))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert act is None or any(type(m) is type(act()) for m in net.modules())
    assert norm is not None or not any('Norm' in type(m).__name__ for m in net.modules())


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('size', [(7, 7), (8, 8), (5, 12), (1, 1)])
def test_stride_two_rounds_up_on_every_path(block, size):
    h, w = size
    assert block(4, 8, stride=2).eval()(torch.randn(2, 4, h, w)).shape == (2, 8, (h + 1) // 2, (w + 1) // 2)


@pytest.mark.parametrize('make', [lambda: conv(1, 2, ks=2), lambda: conv(1, 2, ks=(1, 4)), lambda: factored(1, 2, ks=6), lambda: pre_conv(1, 2, ks=0),
                                  lambda: res_blocks(0, 1, 2), lambda: res_net(1, (4, 8), 2, n_blocks=0), lambda: inception(4, 6)])
def test_bad_arguments(make):
    with pytest.raises(ValueError): make()


@pytest.mark.parametrize('alpha', [-.1, 1.1, float('nan'), float('inf')])
def test_fade_refuses(alpha):
    fade = FadeIn(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError): fade.set(alpha)
    assert fade.alpha == 0


def test_fade_remembers_alpha():
    make = lambda: FadeIn(nn.Identity(), nn.Conv2d(2, 2, 1))
    fade, other = make(), make()
    fade.set(.25)
    other.load_state_dict(fade.state_dict())
    x = torch.randn(1, 2, 3, 3)
    assert other.alpha == .25 and torch.equal(other(x), fade(x))
    torch.testing.assert_close(fade(x), torch.lerp(x, fade.new(x), .25))


def test_fade_trains_the_new_way_only_when_it_counts():
    fade = FadeIn(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    fade(torch.ones(1, 2, 3, 3)).sum().backward()
    assert fade.new.weight.grad.abs().max() == 0 and fade.old.weight.grad.abs().max() > 0


def test_copies_and_files():
    net = res_net(1, (4, 8), 3, block=PreActBlock).eval()
    net.head = concat_head(8, 3)
    x, file = torch.randn(2, 1, 8, 8), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in copy.deepcopy(net), torch.load(file, weights_only=False): assert torch.equal(other(x), net(x))


def test_half_precision_and_channels_last():
    net = res_net(1, (8, 16), 3, block=inception).eval().to(memory_format=torch.channels_last)
    net.stem = FadeIn(net.stem, conv(1, 8)).eval()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): half = net(x)
    with torch.no_grad(): full = net(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=.1, rtol=.1)


def test_paths_meet():
    x = torch.randn(2, 4, 16, 16)
    for block in ResBlock, PreActBlock: assert up_path((16, 8, 4), block)(down_path((4, 8, 16), block)(x)).shape == x.shape


def test_zero_branches_inside_anything():
    net = zero_branches(nn.ModuleDict(dict(a=res_blocks(3, 4, 4, norm=None), b=nn.Sequential(PreActBlock(4, 4, norm=None)))))
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(net['a'](x), x) and torch.equal(net['b'](x - 1), x - 1)


def test_dense_reads_everything():
    dense = dense_blocks(3, 4, 2).eval()
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    dense(x)[:, -2:].sum().backward()   # the last one's channels
    assert all(x.grad[0, c].abs().max() > 0 for c in range(4))


def test_heads():
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(ConcatPool()(x), torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1))
    assert flatten_head(4, 2, size=5)(x).shape == (3, 2)


def test_branches_must_have_one_size():
    with pytest.raises(RuntimeError): Branches(nn.Identity(), nn.MaxPool2d(2))(torch.randn(1, 2, 4, 4))


def test_low_rank_is_nearest():
    matrix = torch.randn(5, 7)
    error = (low_rank(matrix, 2) - matrix).norm()
    for _ in range(50):
        u = torch.randn(5, 2)
        assert (u @ torch.linalg.lstsq(u, matrix).solution - matrix).norm() >= error - 1e-4
    torch.testing.assert_close(low_rank(matrix, 5), matrix)


class Swapped(nn.Module):
    "Defined in another order than called."
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(8, 8), nn.Linear(4, 8)
        self.unused = nn.Linear(3, 3)
    def forward(self, x): return self.second(self.first(x).relu())


def test_lsuv_follows_the_calls():
    model, xb = Swapped(), torch.randn(200, 4) * 3 + 1
    unused = model.unused.weight.clone()
    assert lsuv(model.train(), xb) is model and model.training
    first = model.first(xb)
    for out in first, model.second(first.relu()):
        assert abs(out.mean()) < 1e-4 and abs(out.std() - 1) < 1e-4
    assert torch.equal(model.unused.weight, unused)


def test_lsuv_leaves_no_hook_and_no_statistics_behind():
    net = res_net(1, (4, 8), 3)
    before = {k: v.clone() for k, v in net.state_dict().items() if 'running' in k}
    lsuv(net, torch.randn(8, 1, 8, 8))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize('bad', [0., float('nan'), float('inf')])
def test_lsuv_refuses(bad):
    model = kaiming(nn.Sequential(nn.Linear(4, 8)))
    with pytest.raises(ValueError, match='cannot rescale 0'): lsuv(model, torch.full((16, 4), bad))
    assert count_hooks_of(model) == 0


def count_hooks_of(model): return sum(len(m._forward_hooks) for m in model.modules())
