"FID and KID: references, degenerate features, bad input, and ranges of every kind."
import json, warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from course_lib.core import assets_path, default_device
from course_lib.fid import (Judge, check_ends, classifier, ends_of, fashion_heap, fid, frechet, kid, load_judge, look, mmd,
                            moments, save_classifier)


@pytest.fixture(scope='module')
def judge(): return load_judge()


@pytest.fixture(scope='module')
def reals(): return fashion_heap('valid', 80)[0]


@pytest.fixture(scope='module')
def good(judge, reals): return look(judge, reals)


def features(n, width, seed, shift=0.):
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=gen) / width**.5
    return (torch.randn(n, width, generator=gen) @ mix).relu() + shift


def scipy_fid(a, b):
    (m1, s1), (m2, s2) = ((f.double().mean(0).numpy(), np.cov(f.double().numpy().T)) for f in (a, b))
    return ((m1 - m2)**2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2)).real


@pytest.mark.parametrize('n, width', [(300, 3), (1000, 64), (1500, 256)])
def test_fid_is_scipys(n, width):
    a, b = features(n, width, 0), features(n + 100, width, 1, .1)
    assert fid(a, b) == pytest.approx(scipy_fid(a, b), rel=1e-6)


def test_fid_is_torchmetrics():
    torchmetrics = pytest.importorskip('torchmetrics.image.fid')
    a, b = features(1000, 64, 0), features(1000, 64, 1, .1)
    metric = torchmetrics.FrechetInceptionDistance(feature=Given(64))
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert fid(a, b) == pytest.approx(metric.compute().item(), rel=1e-3)


class Given(torch.nn.Module):
    "Gives back the features it is given, as torchmetrics' own extractors do."
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features
    def forward(self, x): return x.reshape(-1, self.num_features)


def test_kid_is_torchmetrics():
    module = pytest.importorskip('torchmetrics.image.kid')
    a, b = features(300, 16, 0), features(300, 16, 1, .1)
    assert mmd(a, b) == pytest.approx(module.poly_mmd(a.double(), b.double()).item(), rel=1e-3)


@pytest.mark.parametrize('spoil', [
    lambda x: x * 0,                                   # nothing at all
    lambda x: x * 0 + 3,                               # constant
    lambda x: torch.cat([x[:, :8], x[:, :8]], 1),      # everything twice
    lambda x: x * torch.tensor([1.] * 8 + [0.] * 8),   # dead features
    lambda x: x[:5],                                   # fewer samples than features
    lambda x: x * 1e-20, lambda x: x * 1e8, lambda x: x + 1e4])
def test_degenerate_features_have_a_real_distance(spoil):
    a, b = spoil(features(200, 16, 0)), spoil(features(200, 16, 1))
    scale = 1 + moments(a)[1].trace().item() + moments(b)[1].trace().item()
    found = frechet(moments(a), moments(b))
    assert isinstance(found, float) and found > -1e-9 * scale
    assert frechet(moments(a), moments(a)) == pytest.approx(0, abs=1e-6 * scale)
    assert frechet(moments(b), moments(a)) == pytest.approx(found, abs=1e-6 * scale)


@pytest.mark.parametrize('a, b, says', [
    (torch.zeros(100, 4), torch.zeros(100, 5), 'equally many features; got 4 and 5'),
    (torch.zeros(4, 4), torch.zeros(100, 4), '4 features need more than 4 samples on each side'),
    (torch.zeros(100, 4), torch.zeros(100), 'N x D; got shape (100,)'),
    (torch.zeros(100, 4), torch.zeros(100, 4).index_fill(0, torch.tensor([7]), torch.nan), 'first is number 7'),
    (torch.zeros(100, 4), torch.zeros(100, 4) / 0, '100 of 100 rows are not finite')])
def test_bad_features_are_refused(a, b, says):
    for first, second in ((a, b), (b, a)):
        with pytest.raises(ValueError) as e: fid(first, second)
        assert says in str(e.value) or says == 'equally many features; got 4 and 5' and 'got 5 and 4' in str(e.value)


def test_kid_says_what_is_wrong():
    with pytest.raises(ValueError, match='2 samples are needed at least; got 1'): kid(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match='got 4 and 5'): kid(torch.zeros(9, 4), torch.zeros(9, 5))
    with pytest.raises(ValueError, match='not finite'): kid(torch.zeros(9, 4), torch.full((9, 4), torch.inf))


def test_lists_arrays_and_other_types_are_features():
    a, b = features(50, 4, 0), features(50, 4, 1, .2)
    wanted = fid(a, b)
    for kind in (lambda x: x.numpy(), lambda x: x.double(), lambda x: x.requires_grad_()):
        assert fid(kind(a.clone()), kind(b.clone())) == pytest.approx(wanted, rel=1e-6)


def test_half_precision_features_dont_overflow():
    a, b = 200 * features(100, 4, 0), 200 * features(100, 4, 1)
    assert fid(a.half(), b.half()) == pytest.approx(fid(a, b), rel=.01)


def test_embedded_judge_is_small_and_has_its_card(judge):
    path = assets_path('weights', 'fashion_classifier.safetensors')
    assert path.stat().st_size < 500_000 and path.stat().st_size == judge.card['bytes']
    assert {'data', 'recipe', 'accuracy', 'accuracy_of', 'seconds', 'sha256', 'licence', 'span'} <= judge.card.keys()
    assert judge.card['accuracy'] > .9 and judge.span == (-1, 1)


def test_judge_needs_no_data_folder(judge, tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path))
    again = load_judge()
    pics = fashion_heap('valid', 20)[0]
    assert torch.equal(again.features(pics), judge.features(pics))


def test_saved_classifier_comes_back(tmp_path):
    model = classifier((4, 8))
    path = save_classifier(model, tmp_path/'j.safetensors', nfs=(4, 8), span=(0, 1))
    back = load_judge(path)
    assert back.span == (0, 1) and back.card['bytes'] == path.stat().st_size
    x = torch.rand(3, 1, 32, 32)
    assert torch.allclose(back.model(x.to(default_device())).cpu(), model.eval()(x), atol=.02)


def test_wrong_fingerprint_is_refused(tmp_path):
    path = save_classifier(classifier((4, 8)), tmp_path/'j.safetensors', nfs=(4, 8), span=(0, 1))
    card = json.loads(path.with_suffix('.json').read_text())
    path.with_suffix('.json').write_text(json.dumps(card | dict(sha256='0' * 64)))
    with pytest.raises(ValueError, match='j.safetensors is not the file of its card'): load_judge(path)


def test_judge_leaves_training_mode_and_batch_norm_alone(reals):
    judge = Judge(classifier((4, 8)))
    before = {k: v.clone() for k, v in judge.model.state_dict().items()}
    judge.model.train()
    one = judge.features(reals[:2])
    assert judge.model.training and all(torch.equal(v, before[k]) for k, v in judge.model.state_dict().items())
    assert torch.allclose(one, judge.features(reals[:50])[:2], atol=1e-5)   # no picture depends on its neighbours


RANGES = {'[0, 1]': lambda x: (x + 1) / 2, '[-0.5, 0.5]': lambda x: x / 2, '[0, 255]': lambda x: (x + 1) * 127.5,
          'twice': lambda x: 2 * x, 'normalised': lambda x: (x - x.mean()) / x.std(), 'dark': lambda x: (x + 1) / 3 - 1}


@pytest.mark.parametrize('name', RANGES)
def test_fid_refuses_other_ranges_on_either_side(judge, reals, good, name):
    bad = look(judge, RANGES[name](reals))
    for sides, which in (((bad, good), 'first'), ((good, bad), 'second'), ((bad, bad), 'first')):
        for score in fid, kid:
            with pytest.raises(ValueError, match=f'the {which} pictures fill'): score(*sides)


@pytest.mark.parametrize('name, span', [('[0, 1]', (0, 1)), ('[-0.5, 0.5]', (-.5, .5)), ('[0, 255]', (0, 255)), ('twice', (-2, 2))])
def test_a_stated_range_is_converted(judge, reals, good, name, span):
    told = look(judge, RANGES[name](reals), span)
    assert torch.allclose(good.feats, told.feats, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fid(good, told) == pytest.approx(0, abs=1e-4)


def test_bytes_are_understood(judge, reals, good):
    told = look(judge, ((reals + 1) * 127.5).round().byte(), span=(0, 255))
    assert torch.allclose(told.feats, good.feats, atol=1e-2)


def test_a_small_overshoot_is_no_error(judge, reals, good):
    gen = torch.Generator().manual_seed(0)
    spill = reals + .03 * torch.randn(reals.shape, generator=gen)
    spill[0, 0, 0, :3] = 9.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fid(good, look(judge, spill)) > 0


def test_who_states_a_range_that_is_exceeded_is_refused(judge, reals, good):
    with pytest.raises(ValueError, match='the second pictures fill'): fid(good, look(judge, reals, (-.5, .5)))


def test_a_stated_range_that_is_not_filled_warns(judge, reals, good):
    grey = look(judge, reals / 2, (-1, 1))
    for score in fid, kid:
        with pytest.warns(UserWarning, match='is that meant'): score(good, grey)
        with pytest.warns(UserWarning, match='is that meant'): score(grey, good)


def test_two_judges_or_half_known_sides_are_refused(reals, good):
    other = Judge(classifier((4, 8)))
    with pytest.raises(ValueError, match='different judges'): fid(good, look(other, reals))
    with pytest.raises(TypeError, match='bare features'): fid(good, good.feats)


def test_look_says_what_is_wrong(judge, reals):
    for bad, says in ((reals[0], 'N x 1 x H x W'), (reals[:0], 'N x 1 x H x W'), (reals / 0, 'not finite')):
        with pytest.raises(ValueError, match=says): look(judge, bad)
    for span in ((1, 1), (1, 0)):
        with pytest.raises(ValueError, match='from low to high'): look(judge, reals, span)


def test_check_ends_alone(reals, good):
    check_ends(good, 'these')
    assert ends_of(reals) == (-1, 1)
