"Augmentation: parity with torchvision over all levels and sizes, odd inputs, devices, repeats, pictures in pairs."
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from course_lib.augment import (MOVES, OPS, RANGES, AugmentedLoader, augment_batch, bench_augment, box_pixels, draw_trivial,
                                flip, loader_rates, magnitude, move, normalize_bytes, pad_crop, random_copy, random_erase,
                                same_draw, source_maps, trivial_augment, tta, tta_views)
from course_lib.core import set_seed

LEVELS = torch.arange(-30, 31)
DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available()
EXACT = set(OPS) - {'Color', 'Contrast', 'Sharpness'}   # the others need a fused multiply-add to be exact

def smooth(n, c, h, w, seed=0):
    "Pictures with edges, gradients and equal channels here and there."
    gen = torch.Generator().manual_seed(seed)
    small = torch.randint(256, (n, c, 5, 4), generator=gen).float()
    x = torch.nn.functional.interpolate(small, (h, w), mode='bilinear').to(torch.uint8)
    x[:, :, h//2:, :w//3] = x[:, :1, h//2:, :w//3]
    return x

def reference(name, im, level):
    m = magnitude(name, torch.tensor(level)).item() if name in RANGES else None
    if name in MOVES: return MOVES[name](im, m)
    factor = dict(Brightness=tvf.adjust_brightness, Color=tvf.adjust_saturation, Contrast=tvf.adjust_contrast,
                  Sharpness=tvf.adjust_sharpness)
    if name in factor: return factor[name](im, 1 + m)
    return dict(Identity=lambda: im, Posterize=lambda: tvf.posterize(im, round(m)), AutoContrast=lambda: tvf.autocontrast(im),
                Solarize=lambda: tvf.solarize(im, 255 * m), Equalize=lambda: tvf.equalize(im))[name]()

SAMPLES = {'rgb': smooth(1, 3, 64, 64), 'grey': smooth(1, 1, 28, 28), 'odd': smooth(1, 3, 37, 53),
           'noise': torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
           'flat': torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)}

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', OPS)
def test_each_operation_is_torchvisions_at_every_level(name, device):
    for kind, x in SAMPLES.items():
        ours = OPS[name](x.expand(61, -1, -1, -1).to(device), LEVELS.clone()).cpu()
        theirs = torch.stack([reference(name, x[0], level) for level in LEVELS.tolist()])
        worst = (ours.int() - theirs.int()).abs().max().item()
        assert worst <= (name not in EXACT), f'{kind}: off by {worst}'
        assert ours.dtype == torch.uint8

def test_here_even_the_mixes_are_exact():
    "With the fused instruction that x86 has, torchvision's own arithmetic is met to the bit."
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        pytest.skip('torch runs without fused multiply-add here')
    for name in ('Color', 'Contrast', 'Sharpness'):
        x = SAMPLES['rgb']
        theirs = torch.stack([reference(name, x[0], level) for level in LEVELS.tolist()])
        assert torch.equal(OPS[name](x.expand(61, -1, -1, -1), LEVELS), theirs)

def test_reference_is_what_the_class_does():
    im = SAMPLES['rgb'][0]
    for seed in range(150):
        torch.manual_seed(seed)
        out = v2.TrivialAugmentWide()(im)
        torch.manual_seed(seed)
        name = list(OPS)[int(torch.randint(14, ()))]
        level = int(torch.randint(31, ())) if name in RANGES else 0
        if name in RANGES and name not in ('Posterize', 'Solarize') and torch.rand(()) <= .5: level = -level
        assert torch.equal(out, reference(name, im, level)), (name, level)

def test_magnitudes_are_the_classes():
    space = getattr(v2.TrivialAugmentWide, '_AUGMENTATION_SPACE', None)
    if space is None: pytest.skip('torchvision keeps its table elsewhere now')
    assert list(space) == list(OPS)
    for name, (values, signed) in space.items():
        theirs = values(31, 64, 64)
        assert (theirs is None) == (name not in RANGES)
        if theirs is None: continue
        ours = magnitude(name, torch.arange(31))
        assert torch.equal(ours.round() if name == 'Posterize' else ours, theirs.double())
        assert signed == (magnitude(name, torch.tensor([-7])) < 0).item()

def test_the_draw_is_even():
    set_seed(0)
    ops, levels = draw_trivial(28_000)
    assert 1800 < ops.bincount(minlength=14).min() and ops.bincount(minlength=14).max() < 2200
    assert levels.min() == -30 and levels.max() == 30
    assert abs((levels > 0).float().mean() - 15 / 31) < .02

@pytest.mark.parametrize('device', DEVICES)
def test_a_mixed_batch_is_its_pictures_one_by_one(device):
    x = smooth(40, 3, 24, 24, seed=3).to(device)
    draw = draw_trivial(40)
    whole = trivial_augment(x, draw)
    alone = torch.cat([trivial_augment(x[i:i+1], tuple(d[i:i+1] for d in draw)) for i in range(40)])
    assert torch.equal(whole, alone) and whole.device.type == device

def test_empty_groups_and_batches():
    x = smooth(6, 3, 16, 16)
    for op in range(14): assert trivial_augment(x, (torch.full((6,), op), torch.full((6,), 9))).shape == x.shape
    assert trivial_augment(x[:0]).shape == (0, 3, 16, 16)
    for f in (pad_crop, flip, random_copy): assert f(x[:0]).shape == (0, 3, 16, 16)
    assert random_erase(x[:1].float()).shape == (1, 3, 16, 16)
    assert random_erase(x[:0].float()).shape == augment_batch(x[:0], [.5] * 3, [.25] * 3).shape == (0, 3, 16, 16)

def test_memory_order_does_not_matter():
    x = smooth(30, 3, 16, 20)
    last, draw = x.contiguous(memory_format=torch.channels_last), draw_trivial(30)
    assert torch.equal(trivial_augment(x, draw), trivial_augment(last, draw))
    for f in (pad_crop, flip, random_copy):
        set_seed(1); a = f(x)
        set_seed(1); b = f(last)
        assert torch.equal(a, b)

@pytest.mark.parametrize('f', [pad_crop, flip, random_copy, trivial_augment, lambda x: random_erase(x.float() / 255),
                               lambda x: augment_batch(x, [.5], [.25])])
def test_inputs_stay_and_seeds_repeat(f):
    for x in (smooth(20, 3, 32, 32), smooth(20, 1, 28, 28)):
        before = x.clone()
        set_seed(5); a = f(x)
        set_seed(5); b = f(x)
        assert torch.equal(a, b) and torch.equal(x, before) and a.shape == x.shape
        assert not torch.equal(a, f(x))

@pytest.mark.parametrize('device', DEVICES)
def test_everything_together_is_its_parts(device):
    x, stats = smooth(40, 3, 32, 32).to(device), ([.4, .5, .6], [.2, .3, .1])
    set_seed(3); together = augment_batch(x, *stats)
    set_seed(3); parts = random_erase(normalize_bytes(flip(pad_crop(trivial_augment(x), 8, 'reflect')), *stats))
    assert torch.equal(together, parts) and together.device.type == device

@pytest.mark.skipif(len(DEVICES) == 1, reason='one device only')
def test_devices_draw_alike():
    x = smooth(50, 3, 32, 32)
    for f in (pad_crop, flip, random_copy):
        set_seed(2); here = f(x)
        set_seed(2); there = f(x.to(DEVICES[1])).cpu()
        assert torch.equal(here, there)

def test_draws_are_per_item():
    x = torch.arange(1, 257, dtype=torch.int32).view(1, 1, 16, 16).expand(64, 3, -1, -1)
    set_seed(0)
    assert len(pad_crop(x, 4).flatten(1).unique(dim=0)) > 30
    assert len(flip(x).flatten(1).unique(dim=0)) == 2
    assert len(random_copy(x).flatten(1).unique(dim=0)) > 30

@pytest.mark.parametrize('mode', ['constant', 'reflect', 'replicate'])
def test_crops_are_windows_of_the_padded_picture(mode):
    x = smooth(30, 3, 12, 15)
    set_seed(3); out = pad_crop(x, 5, mode)
    set_seed(3); top, left = torch.randint(11, (2, 30))
    padded = torch.nn.functional.pad(x, [5] * 4, mode)
    for i in range(30): assert torch.equal(out[i], padded[i, :, top[i]:top[i] + 12, left[i]:left[i] + 15])

def test_boxes_lie_inside_and_reach_every_edge():
    set_seed(0)
    boxes = box_pixels(3000, 20, 30, pct=.3, max_num=3)
    item, row, col = (torch.cat(o) for o in zip(*boxes))
    assert item.max() < 3000 and (row.min(), row.max(), col.min(), col.max()) == (0, 19, 0, 29)
    assert (row.shape[1], col.shape[2]) == (6, 9)
    assert set(item.flatten().bincount(minlength=3000).unique().tolist()) == {0, 1, 2, 3}
    assert all(len(item.unique()) == len(item) for item, _, _ in boxes)   # an assignment with overlaps would be undefined

def test_all_numbers_of_boxes_are_as_frequent():
    set_seed(0)
    counts = torch.cat([item.flatten() for item, _, _ in box_pixels(5000, 8, 8)]).bincount(minlength=5000).bincount()
    assert len(counts) == 5 and 880 < counts.min() and counts.max() < 1120   # a thousand each, and four deviations

def test_copies_come_from_the_same_picture():
    x = torch.arange(50).view(-1, 1, 1, 1).expand(-1, 2, 16, 16).clone()   # each picture has one value
    assert torch.equal(random_copy(x, pct=.5), x)

def test_erased_noise_keeps_the_batchs_statistics():
    set_seed(1)
    x = torch.randn(64, 3, 32, 32)
    out = random_erase(x, pct=.5)
    changed = out[out != x]
    assert changed.numel() > x.numel() / 10
    assert abs(changed.mean()) < .05 and abs(changed.std() - 1) < .05
    assert x.min() <= changed.min() and changed.max() <= x.max()
    assert random_erase(x.half()).dtype == torch.float16
    assert torch.equal(random_erase(torch.full((2, 3, 8, 8), .5), pct=.5), torch.full((2, 3, 8, 8), .5))

@pytest.mark.parametrize('call, error, text', [
    (lambda x: pad_crop(x, 16), ValueError, 'pad should be 0 to 15 for 16x16 pixels; got 16'),
    (lambda x: pad_crop(x, -1), ValueError, 'got -1'),
    (lambda x: pad_crop(x[0]), ValueError, r'N x C x H x W; got shape \(3, 16, 16\)'),
    (lambda x: flip(x, 1.5), ValueError, 'p is a share from 0 to 1; got 1.5'),
    (lambda x: flip(x[0]), ValueError, 'N x C x H x W'),
    (lambda x: random_erase(x), TypeError, 'needs normalised floats; got torch.uint8'),
    (lambda x: random_erase(x.float(), pct=2), ValueError, 'pct is a share from 0 to 1; got 2'),
    (lambda x: random_copy(x, pct=-.1), ValueError, 'pct is a share'),
    (lambda x: random_copy(x, max_num=-1), ValueError, 'max_num should be 0 or more; got -1'),
    (lambda x: trivial_augment(x.float()), TypeError, 'needs bytes'),
    (lambda x: trivial_augment(x[:, :2]), ValueError, '1 or 3 channels; got 2'),
    (lambda x: trivial_augment(x[0]), ValueError, 'N x C x H x W'),
    (lambda x: trivial_augment(x, draw_trivial(3)), ValueError, 'a draw for each of 4 pictures; got 3'),
    (lambda x: tta_views(x, 16), ValueError, 'pad should be 0 to 15'),
    (lambda x: same_draw(flip, x, x[:2]), ValueError, 'alike in N, H and W')])
def test_misuse_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text): call(smooth(4, 3, 16, 16))

def test_pairs_move_together_whatever_their_types():
    x = smooth(32, 3, 16, 16)
    mask = (x[:, :1] > 99).long()
    a, b, c = same_draw(lambda o: flip(pad_crop(o, 6)), x, x.double(), mask)
    assert torch.equal(a.double(), b) and torch.equal((a[:, :1] > 99).long(), c)
    a, b = same_draw(trivial_augment, x, x.clone())
    assert torch.equal(a, b)

def test_same_draw_goes_on_drawing():
    "After it the random numbers stand where one call would have left them."
    x = smooth(8, 3, 16, 16)
    set_seed(0); same_draw(flip, x, x, x); after = torch.rand(3)
    set_seed(0); flip(x)
    assert torch.equal(after, torch.rand(3))

def test_views_and_their_mean():
    x = torch.randn(4, 3, 16, 16)
    views = tta_views(x, 2)
    assert len(views) == 10 and torch.equal(views[0], x) and torch.equal(views[1], x.flip(-1))
    assert torch.equal(views[2][..., 2:, 2:], x[..., :-2, :-2])
    def predict(v): return v.mean((2, 3))
    assert torch.allclose(tta(predict, x), predict(x), atol=1e-6)

def test_tables_are_kept():
    a = source_maps('Rotate', 8, 8, torch.device('cpu'))
    assert a is source_maps('Rotate', 8, 8, torch.device('cpu')) and a.shape == (61, 64)
    assert move('Rotate', smooth(2, 3, 8, 8), torch.tensor([0, 0])).equal(smooth(2, 3, 8, 8))

def test_normalize_bytes_is_torchvisions():
    x = smooth(2, 3, 8, 8)
    mean, std = [.4, .5, .6], [.2, .3, .1]
    assert torch.allclose(normalize_bytes(x, mean, std), tvf.normalize(x / 255, mean, std), atol=1e-6)

def test_bench_counts_pictures():
    rates = bench_augment(smooth(20, 3, 16, 16), rounds=2, bs=8, num_workers=0)
    assert list(rates) == ['PIL, item by item', 'the same from JPEG', 'in batches']
    assert all(len(r) == 2 and min(r) > 0 for r in rates.values())

def test_rates_come_from_every_pass(monkeypatch):
    loader = AugmentedLoader([(torch.zeros(3, 1, 2, 2), 0)] * 4, lambda x: x + 1)
    assert len(loader) == 4 and next(iter(loader))[0].min() == 1
    monkeypatch.setattr('course_lib.augment.perf_counter', map(float, range(100)).__next__)   # every look is a second later
    assert loader_rates({'a': loader, 'b': [(torch.zeros(5), 0)]}, rounds=3) == {'a': [12.] * 3, 'b': [5.] * 3}
