"The classifier of Tiny ImageNet: a run that was broken off goes on, what is kept is what was trained, what can't be is refused."
from functools import partialmethod
from inspect import signature

import pytest
import torch

from course_lib import tiny_classifier as tiny
from course_lib.callbacks import MetricsCB, capture_preds
from course_lib.learner import Callback
from course_lib.tiny_classifier import (TINY_NETS, TINY_PRESETS, TinyBatchCB, keep_tiny, load_tiny, side_at, tiny_dls, tiny_net,
                                        tiny_res, train_tiny)

SMALL = dict(width=3, n_epochs=3, bs=40, n_items=80)


@pytest.fixture(autouse=True)
def drawn(monkeypatch, tmp_path):
    "The drawn figures, on the processor, wherever the tests run."
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('COURSE_DEVICE', 'cpu')


class BreakCB(Callback):
    "As Ctrl-C in the middle of the second epoch."
    def after_batch(self, learn):
        if learn.epoch == 1 and learn.training: raise KeyboardInterrupt


def rows(learn): return next(cb for cb in learn.cbs if isinstance(cb, MetricsCB)).rows


@pytest.mark.parametrize('settings', [{}, dict(net='basic', augment='trivial', mix='cutmix', erase=True, smoothing=0.), dict(opt='muon', anneal='linear')],
                         ids=['light', 'everything', 'muon'])
def test_a_broken_run_goes_on_bit_for_bit(tmp_path, settings):
    settings = SMALL | settings
    whole = train_tiny(**settings)
    path = tmp_path/'checkpoint.safetensors'
    with pytest.raises(KeyboardInterrupt): train_tiny(path, cbs=[BreakCB()], **settings)
    resumed = train_tiny(path, **settings)
    assert rows(resumed) == rows(whole)
    for name, w in whole.model.state_dict().items(): assert torch.equal(w, resumed.model.state_dict()[name]), name
    assert type(resumed.opt) is tiny.TINY_OPTS[settings.get('opt', 'adamw')]
    assert (resumed.opt.param_groups[0]['eps'], resumed.opt.param_groups[0]['weight_decay']) == (1e-5, .02)


def test_kept_weights_are_the_trained_ones(tmp_path):
    path = tmp_path/'checkpoint.safetensors'
    learn = train_tiny(path, **SMALL)
    model, card = load_tiny(keep_tiny(path, tmp_path/'kept.safetensors', width=3, licence='none'))
    assert card['accuracy'] == rows(learn)[-1]['top1'] and card['licence'] == 'none' and not model.training
    for name, w in learn.model.state_dict().items(): torch.testing.assert_close(model.state_dict()[name], w, rtol=1e-3, atol=1e-6)


def test_kept_weights_need_the_net_they_were_trained_in(tmp_path):
    train_tiny(path := tmp_path/'checkpoint.safetensors', **SMALL)
    with pytest.raises(ValueError, match='checkpoint of another model'): keep_tiny(path, tmp_path/'kept.safetensors', width=6)
    assert not (tmp_path/'kept.safetensors').exists()


def test_a_run_that_is_not_over_is_not_kept(tmp_path):
    path = tmp_path/'checkpoint.safetensors'
    with pytest.raises(KeyboardInterrupt): train_tiny(path, cbs=[BreakCB()], **SMALL)
    with pytest.raises(ValueError, match='stopped after 2 of 6 batches; let it go on first'): keep_tiny(path, tmp_path/'kept.safetensors', width=3)


def test_a_trained_learner_predicts_at_full_size(tmp_path):
    seen = []
    class LookCB(Callback):
        def before_batch(self, learn): seen.append(learn.batch[0].shape[-1])
    learn = train_tiny(cbs=[LookCB()], **SMALL)
    assert sorted(set(seen)) == [40, 64]
    seen.clear()
    capture_preds(learn)
    assert set(seen) == {64}


def test_the_courses_own_network_is_what_its_card_says():
    model, card = load_tiny()
    assert card['net'] == 'vgg' and card['accuracy'] > .5 and card['bytes'] <= 4e6
    assert model(torch.rand(2, 3, 40, 40)).shape == (2, 200)


@pytest.mark.parametrize('net', TINY_NETS)
def test_every_net_takes_every_size_of_the_growth(net):
    model = tiny_net(net, 3).eval()
    with torch.no_grad(): assert {model(torch.rand(2, 3, side, side)).shape for side in (40, 52, 64)} == {(2, 200)}


def test_a_compiled_run_is_the_same_run(monkeypatch, tmp_path):
    "With the backend that writes no C++: what is tested is that settings, sizes and checkpoints go through."
    graphs, plain = [], train_tiny(**SMALL)
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, 'compile', partialmethod(torch.nn.Module.compile, backend=backend))
    compiled = train_tiny(tmp_path/'checkpoint.safetensors', compiled=True, **SMALL)
    assert graphs and rows(compiled) == rows(plain)
    again = train_tiny(tmp_path/'checkpoint.safetensors', **SMALL)   # a network that is not compiled reads it
    assert rows(again) == rows(plain)


def test_half_of_a_batch_gets_trivial_augment():
    xb = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    out = tiny.half_trivial(xb)
    assert torch.equal(out[32:], xb[32:]) and not torch.equal(out[:32], xb[:32])
    assert tiny.half_trivial(xb[:1]).shape == (1, 3, 8, 8)   # half of one is none


def test_presets_name_settings_that_exist():
    for name, settings in TINY_PRESETS.items():
        assert settings.keys() <= signature(train_tiny).parameters.keys(), name
        assert settings.get('net', 'vgg') in TINY_NETS and settings.get('augment', 'light') in tiny.AUGMENT
        assert settings.get('opt', 'adamw') in tiny.TINY_OPTS


@pytest.mark.parametrize('bad, said', [(dict(net='resnet'), "no net 'resnet'; there are vgg"), (dict(mix='blend'), "no mix 'blend'; there are none, mixup"),
                                       (dict(augment='more'), "no augment 'more'; there are none, light"), (dict(opt='lion'), "no opt 'lion'; there are adamw, muon")])
def test_settings_that_do_not_exist_are_refused(bad, said):
    with pytest.raises(ValueError, match=said): train_tiny(**(SMALL | bad))


def test_pictures_grow_to_their_full_size_in_any_number_of_epochs():
    for n in range(1, 40):
        sides = [side_at(epoch, n) for epoch in range(n)]
        assert sides == sorted(sides) and set(sides) <= {40, 52, 64}
        assert sides[-1] == 64 and (n == 1 or sides[0] == 40)


def test_few_items_are_spread_over_all_classes():
    train, valid = tiny_dls(10, 50), tiny_dls(10, 50).valid
    assert len(train.train.tensors[1].unique()) == 10 and len(valid.tensors[0]) == 50
    assert len(tiny_dls(10, 10**6).train.tensors[0]) == 1000


def test_validation_pictures_are_not_augmented():
    class Learn: training, epoch, n_epochs = False, 0, 1
    torch.manual_seed(0)
    xb, learn = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), Learn()
    cb = TinyBatchCB([.5] * 3, [.25] * 3, 'trivial', 'mixup', erase=True)
    learn.batch = xb, torch.arange(4)
    learn.model = tiny_net('vgg', 3)
    cb.before_fit(learn), cb.before_epoch(learn), cb.before_batch(learn)
    torch.testing.assert_close(learn.batch[0], (xb / 255 - .5) / .25)
    assert torch.equal(learn.batch[1], torch.arange(4))


def test_blocks_and_stages_must_agree():
    assert len(tiny_res((2, 1), width=4).stage1) == 2
    with pytest.raises(ValueError, match='at least one block'): tiny_res((1, 0), width=4)
