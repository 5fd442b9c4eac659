"Backbones by name: what is used, what is refused, what is stored. No network: downloads go to a dead address or to a server in this process."
import functools, hashlib, threading
from collections import OrderedDict
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from course_lib import data, features
from course_lib.data import DataFile, FetchError
from course_lib.features import (RECIPES, Backbone, backbone_names, calc_features, course_vgg, freeze, load_backbone,
                                 store_features)
from course_lib.fid import save_classifier

DEAD = 'http://127.0.0.1:9/'     # the discard port: refused at once


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "An empty data folder, and no course_vgg that somebody trained."
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    monkeypatch.setattr(features, 'assets_path', lambda *parts: tmp_path/'assets'/'/'.join(parts))
    return tmp_path


@pytest.fixture(scope='module')
def squeeze():
    "Weights of the whole SqueezeNet, as torchvision's file has them, but random."
    torch.manual_seed(0)
    return RECIPES['squeezenet'].build().state_dict()


def download_from(monkeypatch, url, content=b'', sha256=None):
    "Let SqueezeNet's recipe point to `url`; returns the DataFile."
    file = DataFile('weights/squeezenet1_1-b8a52dc0.pth', (url + 'weights.pth',), sha256 or hashlib.sha256(content).hexdigest(), len(content), 'test')
    monkeypatch.setitem(data._registry, file.name, file)
    monkeypatch.setitem(RECIPES, 'squeezenet', replace(RECIPES['squeezenet'], download=file))
    return file


@pytest.fixture
def server(folder):
    "Serves folder/www; yields its address."
    (folder/'www').mkdir()
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=str(folder/'www')))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/'
    httpd.shutdown()


def weights_in(folder): return sorted(p.name for p in (folder/'data'/'weights').glob('*')) if (folder/'data'/'weights').exists() else []


def test_nothing_here_chooses_the_course_net_and_says_so():
    b = load_backbone()
    assert b.name == 'course_vgg' and 'random weights' in b.source and not b.learned
    assert features.backbones_here() == ['course_vgg']


def test_random_weights_are_the_same_each_time_and_leave_the_seed_alone():
    torch.manual_seed(7)
    a, drawn = load_backbone('course_vgg'), torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    b = load_backbone('course_vgg')
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_trained_course_net_is_used_when_it_is_there(folder):
    model = course_vgg()
    whole = nn.Sequential(OrderedDict(features=model, head=nn.Linear(256, 200)))
    save_classifier(whole, folder/'assets/weights/course_vgg.safetensors', mean=[.5, .4, .3], std=[.2, .3, .25])
    b = load_backbone('course_vgg')
    assert (b.mean, b.std) == ((.5, .4, .3), (.2, .3, .25))
    assert 'trained by this course' in b.source and b.learned
    torch.testing.assert_close(b.model[0].weight, model[0].weight, atol=1e-3, rtol=1e-3)
    assert b.model[1].num_batches_tracked.dtype == torch.int64


def test_a_name_is_never_replaced_silently(monkeypatch, folder):
    download_from(monkeypatch, DEAD)
    with pytest.raises(FetchError) as e: load_backbone('squeezenet')
    text = str(e.value)
    assert 'could not be downloaded' in text and DEAD in text and 'put it at' in text and 'course_vgg' in text and '\n' not in text
    assert weights_in(folder) == []


def test_unknown_names():
    with pytest.raises(ValueError, match="no backbone 'vgg11'; there are " + ', '.join(backbone_names())): load_backbone('vgg11')
    with pytest.raises(ValueError, match="it must be 'max' or 'avg'"): load_backbone('course_vgg', pool='mean')
    with pytest.raises(ValueError, match="no layer 'fire2'; it has conv1_1"): load_backbone('course_vgg').index('fire2')
    with pytest.raises(ValueError, match='no layer 99'): load_backbone('course_vgg').index(99)


def test_copy_in_the_data_folder_is_used_without_network(monkeypatch, folder, squeeze):
    download_from(monkeypatch, DEAD)
    recipe = RECIPES['squeezenet']
    recipe.path.parent.mkdir(parents=True)
    save_file({k: v.half() for k, v in squeeze.items()}, recipe.path)       # complete, with its classifier
    b = load_backbone('squeezenet')
    assert b.model[0].weight.dtype == torch.float32 and 'data folder' in b.source and b.learned
    assert features.backbones_here() == ['squeezenet', 'course_vgg']
    assert [f.shape[1] for f in calc_features(b, torch.rand(3, 64, 64), b.style_layers)] == [64, 128, 256, 256]


@pytest.mark.parametrize('last', [28, 34])
def test_vgg19_as_far_as_its_file_goes(last):
    "A file that ends at conv5_1 gives a network that ends at relu5_1; a whole one ends at pool5."
    with torch.device('meta'): shapes = {k: v.shape for k, v in RECIPES['vgg19'].build().features.state_dict().items()}
    store_features({f'features.{k}': torch.zeros(s) for k, s in shapes.items() if int(k.split('.')[0]) <= last}, RECIPES['vgg19'].path)
    b = load_backbone()                     # found without being asked for
    assert b.name == 'vgg19' and list(b.layers)[-1] == {28: 'relu5_1', 34: 'pool5'}[last]
    assert [b.index(l) for l in b.style_layers] == [1, 6, 11, 20, 29]


def test_download_is_verified_converted_and_deleted(monkeypatch, folder, server, squeeze):
    torch.save(squeeze, folder/'www'/'weights.pth')
    download_from(monkeypatch, server, (folder/'www'/'weights.pth').read_bytes())
    b = load_backbone('squeezenet')
    assert weights_in(folder) == ['squeezenet1_1.safetensors']
    stored = load_file(RECIPES['squeezenet'].path)
    assert {v.dtype for v in stored.values()} == {torch.float16} and all(k.startswith('features.') for k in stored)
    torch.testing.assert_close(b.model[0].weight, squeeze['features.0.weight'], atol=1e-3, rtol=1e-3)
    (folder/'www'/'weights.pth').unlink()
    load_backbone('squeezenet')             # the second time needs nothing from outside


def test_file_put_there_by_hand_is_converted_and_kept(monkeypatch, folder, squeeze):
    path = folder/'data'/'weights'/'squeezenet1_1-b8a52dc0.pth'
    path.parent.mkdir(parents=True)
    torch.save(squeeze, path)
    download_from(monkeypatch, DEAD, path.read_bytes())
    assert features.backbones_here() == ['squeezenet', 'course_vgg']
    assert load_backbone('squeezenet').name == 'squeezenet'
    assert weights_in(folder) == ['squeezenet1_1-b8a52dc0.pth', 'squeezenet1_1.safetensors']


def test_wrong_hash_leaves_nothing(monkeypatch, folder, server, squeeze):
    torch.save(squeeze, folder/'www'/'weights.pth')
    download_from(monkeypatch, server, (folder/'www'/'weights.pth').read_bytes(), sha256='0' * 64)
    with pytest.raises(FetchError, match='sha256 0000'): load_backbone('squeezenet')
    assert weights_in(folder) == []


def test_cut_short_download_leaves_nothing(monkeypatch, folder, server, squeeze):
    torch.save(squeeze, folder/'www'/'weights.pth')
    whole = (folder/'www'/'weights.pth').read_bytes()
    download_from(monkeypatch, server, whole)
    (folder/'www'/'weights.pth').write_bytes(whole[:1000])
    with pytest.raises(FetchError, match='1,000'): load_backbone('squeezenet')
    assert weights_in(folder) == []


@pytest.mark.parametrize('content', [b'', b'not safetensors at all', b'\xff' * 4096])
def test_damaged_file_is_named(monkeypatch, folder, content):
    path = RECIPES['vgg19'].path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for name in ('vgg19', None):            # nor does the choice without a name pass over it
        with pytest.raises(ValueError, match='vgg19_features.safetensors is damaged .*delete'): load_backbone(name)


def test_weights_of_another_network_are_refused(squeeze):
    store_features(squeeze, RECIPES['vgg19'].path)
    with pytest.raises(ValueError, match='holds the weights of another network'): load_backbone('vgg19')


def test_file_without_features_is_refused(folder):
    path = RECIPES['vgg16'].path
    path.parent.mkdir(parents=True)
    save_file({'classifier.0.weight': torch.zeros(2)}, path)
    with pytest.raises(ValueError, match='holds no weights named features'): load_backbone('vgg16')


def test_pool_avg_keeps_weights_and_shapes():
    a, b = load_backbone('course_vgg'), load_backbone('course_vgg', pool='avg')
    x = torch.rand(2, 3, 40, 56)
    fa, fb = (calc_features(o, x, ['relu1_2', 'relu4_2']) for o in (a, b))
    assert torch.equal(fa[0], fb[0]) and fa[1].shape == fb[1].shape and not torch.allclose(fa[1], fb[1])


def test_features_of_one_picture_and_of_many():
    b = load_backbone('course_vgg')
    x = torch.rand(2, 3, 48, 64)
    many, one = calc_features(b, x, [*b.style_layers]), calc_features(b, x[0], [*b.style_layers])
    for m, o in zip(many, one): torch.testing.assert_close(m[:1], o, atol=1e-5, rtol=1e-4)
    assert calc_features(b, x, []) == []
    again = calc_features(b, x, ['relu2_1', 2, 'relu2_1'])
    assert torch.equal(again[0], again[2]) and again[1].shape[1] == 24


@pytest.mark.parametrize('shape, text', [((3, 1, 1), 'a picture of 1x1 is too small'), ((1, 64, 64), '...x3xHxW; got'), ((64, 64, 3), '...x3xHxW; got')])
def test_pictures_that_do_not_fit(shape, text):
    b = load_backbone('course_vgg')
    with pytest.raises(ValueError) as e: calc_features(b, torch.rand(shape), b.style_layers)
    assert text in str(e.value)


def test_nothing_in_place_even_inside_blocks(squeeze):
    model = freeze(RECIPES['squeezenet'].build().features)
    assert not any(getattr(m, 'inplace', False) for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize('shape', [(3, 32, 48), (2, 3, 32, 48)])
def test_pictures_take_the_layout_of_the_weights(shape):
    b, x = load_backbone('course_vgg'), torch.rand(shape)
    plain = calc_features(b, x, ['relu2_1'])[0]
    fast = calc_features(b.to(memory_format=torch.channels_last), x, ['relu2_1'])[0]
    assert plain.is_contiguous() and fast.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_half_precision_weights_take_the_picture_along():
    b = load_backbone('course_vgg').to(torch.bfloat16)
    assert isinstance(b, Backbone) and calc_features(b, torch.rand(3, 32, 32), ['relu1_1'])[0].dtype == torch.bfloat16
