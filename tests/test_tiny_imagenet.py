"Tiny ImageNet on bad days: archives cut short, pictures that don't decode, files missing or too many, full disks, killed runs; nothing half-written, whatever happens."
import errno, hashlib, shutil, zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib import data, tiny_imagenet as tiny
from killed import kill_at, posix, until

SIZES = 3, 6, 5
quiet = dict(sizes=SIZES, progress=False)
VICTIM = 'train/n90000001/images/n90000001_2.JPEG'

@pytest.fixture(scope='session')
def made(tmp_path_factory): return tiny.write_micro(tmp_path_factory.mktemp('tiny')/'micro', *SIZES)

@pytest.fixture
def micro(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'micro'))

@pytest.fixture
def small_parts(monkeypatch): monkeypatch.setattr(tiny, 'PART', 4)   # 18 + 5 pictures: 5 + 2 parts

def zipped(folder, kind=zipfile.ZIP_STORED):
    path = folder.with_suffix('.zip')
    with zipfile.ZipFile(path, 'w', kind) as z:
        for p in sorted(folder.rglob('*')): z.write(p, Path('tiny-imagenet-200', p.relative_to(folder)))
    return path

def content(store): return {p.name: p.read_bytes() for p in store.iterdir()}

def left(folder): return sorted(p.name for p in folder.iterdir() if p.name.startswith(('store', '.store')))


# --- the miniature

def test_the_same_seed_writes_the_same(made, tmp_path):
    def all_of(p): return {f.relative_to(p).as_posix(): f.read_bytes() for f in p.rglob('*') if f.is_file()}
    again, other = (tiny.write_micro(tmp_path/str(seed), *SIZES, seed=seed) for seed in (0, 1))
    assert all_of(again) == all_of(made) != all_of(other) and all_of(made).keys() == all_of(other).keys()

@pytest.mark.parametrize('n', [0, 41])
def test_classes_of_the_miniature(n, tmp_path):
    with pytest.raises(ValueError, match=f'1 to 40 classes; got {n}'): tiny.write_micro(tmp_path/'x', n)
    assert not (tmp_path/'x').exists()

def test_the_miniature_can_be_learned():
    rng = np.random.default_rng(0)
    def features(n): return torch.cat([torch.from_numpy(tiny.draw_class(c, n, rng)).float().unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1) / 255 for c in range(10)])
    x, xv, y, yv = features(60), features(30), torch.arange(10).repeat_interleave(60), torch.arange(10).repeat_interleave(30)
    w = torch.linalg.lstsq(torch.cat([x, torch.ones(600, 1)], 1).T @ torch.cat([x, torch.ones(600, 1)], 1) + torch.eye(193), torch.cat([x, torch.ones(600, 1)], 1).T @ torch.nn.functional.one_hot(y).float()).solution
    right = ((torch.cat([xv, torch.ones(300, 1)], 1) @ w).argmax(1) == yv).float().mean()
    assert .25 < right < .9   # a linear model on 8x8 blocks: far from guessing, far from done

def test_without_data(tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'none'))
    monkeypatch.setenv('COURSE_OUT', str(tmp_path/'out'))
    train, valid = tiny.tiny_ds('train'), tiny.tiny_ds('valid')
    assert (len(train), len(valid)) == (1000, 200) and 'write_micro' in train.source and not (tmp_path/'none').exists()
    x, y = train[3]
    assert x.shape == (3, 64, 64) and 0 <= x.min() < x.max() <= 1 and isinstance(y, int) and train.labels.dtype == torch.long
    assert (train.labels.bincount() == 100).all() and train.ims.is_contiguous(memory_format=torch.channels_last)
    xb, yb = next(iter(data.TensorLoader(train.ims, train.labels, bs=8)))
    assert xb.dtype == torch.uint8 and xb.shape == (8, 3, 64, 64) and yb.tolist() == train.labels[:8].tolist()


# --- structure

def test_a_whole_set(micro):
    index = tiny.check_structure(micro, SIZES)
    labels = dict(l.split('\t')[:2] for l in (micro/'val/val_annotations.txt').read_text().splitlines())
    assert [f for f, _ in index.train] == sorted(f for f, _ in index.train) and len(index.train) == 18 and len(set(index.names)) == 3
    assert all(index.wnids[y] == f.split('/')[1] for f, y in index.train) and all(index.wnids[y] == labels[Path(f).name] for f, y in index.valid)

def drop(path): path.unlink()
def add(path, text): path.write_text(path.read_text() + text)
def edit(path, old, new): path.write_text(path.read_text().replace(old, new, 1))

@pytest.mark.parametrize('spoil, said', [
    (lambda m: drop(m/VICTIM), f'missing: {VICTIM}'),
    (lambda m: drop(m/'val/images/val_4.JPEG'), 'missing: val/images/val_4.JPEG'),
    (lambda m: shutil.rmtree(m/'train/n90000001'), 'missing: train/n90000001/images/n90000001_0.JPEG, .* and 3 more'),
    (lambda m: shutil.copytree(m/'train/n90000001', m/'train/n90000009'), 'too many: train/n90000009/images/n90000001_0.JPEG.* and 3 more'),
    (lambda m: edit(m/'val/val_annotations.txt', 'val_2.JPEG', 'val_77.JPEG'), r'without a line in val_annotations.txt: val_2.JPEG'),
    (lambda m: (m/'val/val_annotations.txt').write_text(''), 'without a line in val_annotations.txt: val_0.JPEG.* and 2 more'),
    (lambda m: edit(m/'val/val_annotations.txt', 'n9000000', 'n8000000'), 'val_annotations.txt that wnids.txt lacks: n8000000'),
    (lambda m: edit(m/'words.txt', 'n90000001', 'n70000001'), 'without a name in words.txt: n90000001'),
    (lambda m: (m/'wnids.txt').write_text('n90000000\n'), 'wnids.txt should name 3 classes; it names 1'),
    (lambda m: add(m/'wnids.txt', 'n90000000\n'), 'wnids.txt names a class more than once, in 4 lines for 3'),
    (lambda m: add(m/'val/val_annotations.txt', 'val_9'), "val_annotations.txt, line 6 needs a tab; it is 'val_9'"),
    (lambda m: add(m/'val/val_annotations.txt', '\n'), "val_annotations.txt, line 6 needs a tab; it is ''"),
    (lambda m: add(m/'words.txt', 'n90000001\tagain\n'), 'words.txt has more than one line for n90000001'),
    (lambda m: drop(m/'wnids.txt'), 'has no file wnids.txt'), (lambda m: drop(m/'words.txt'), 'has no file words.txt'),
    (lambda m: drop(m/'val/val_annotations.txt'), 'has no file val/val_annotations.txt')])
def test_spoilt_sets(micro, spoil, said):
    spoil(micro)
    for source in micro, zipped(micro):
        with pytest.raises(ValueError, match=said): tiny.decode_store(source, micro.parent/'store', **quiet)
    assert left(micro.parent) == []

def test_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match='neither a folder nor a zip'): tiny.check_structure(tmp_path/'none')


# --- archives

@pytest.mark.parametrize('share', [0, .3, .99])
def test_truncated_zip(micro, share):
    path = zipped(micro)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    for use in (partial(tiny.decode_store, store=micro.parent/'store', **quiet), partial(tiny.unpack_zip, folder=micro.parent/'out')):
        with pytest.raises(ValueError, match=r'micro.zip is no whole zip file.* bytes'): use(path)
    assert left(micro.parent) == [] and not (micro.parent/'out').exists()

def test_a_damaged_member_is_named(micro):
    path = zipped(micro)
    whole, jpeg = path.read_bytes(), (micro/VICTIM).read_bytes()
    at = whole.index(jpeg) + len(jpeg) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
    with pytest.raises(ValueError, match=f'1 of 23 pictures are unusable: {VICTIM} is damaged'): tiny.decode_store(path, micro.parent/'store', **quiet)
    with pytest.raises(ValueError, match='micro.zip is damaged'): tiny.unpack_zip(path, micro.parent/'out')
    assert not (micro.parent/'out').exists() and not list(micro.parent.glob('.unpack*'))

@pytest.mark.parametrize('name', ['../evil', '/evil', 'a/../../evil', 'C:/evil', 'a\\..\\evil'])
def test_path_escape(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w') as z:
        z.writestr('a/good', 'good')
        z.writestr(name, 'evil')
    (tmp_path/'sub').mkdir()
    with pytest.raises(ValueError, match='would write outside its folder'): tiny.unpack_zip(tmp_path/'x.zip', tmp_path/'sub/out')
    assert list((tmp_path/'sub').iterdir()) == [] and [p.name for p in tmp_path.rglob('*evil*')] == []

@pytest.mark.parametrize('kind', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folder_and_archive_give_the_same(micro, kind, small_parts):
    path = zipped(micro, kind)
    out = tiny.unpack_zip(path, micro.parent/'out')
    stores = [tiny.decode_store(source, micro.parent/f'store{i}', procs=procs, **quiet) for i, (source, procs) in enumerate([(micro, 1), (path, 1), (out, 2), (path, 3)])]
    assert len(content(stores[0])) == 3 and all(content(o) == content(stores[0]) for o in stores[1:])

def test_the_reference_is_pillow(micro):
    ds, files = tiny.open_store(tiny.decode_store(micro, micro.parent/'store', **quiet), whole=True), tiny.check_structure(micro, SIZES)
    for split in 'train', 'valid':
        for im, (f, y), label in zip(ds[split].ims, getattr(files, split), ds[split].labels, strict=True):
            assert (im.permute(1, 2, 0).numpy() == np.array(Image.open(micro/f).convert('RGB'))).all() and y == label

def noisy(seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))

@pytest.mark.parametrize('form', [dict(format='PNG'), dict(format='JPEG', progressive=True), dict(format='JPEG', quality=95, subsampling=0), dict(format='JPEG', quality=30)], ids=str)
def test_other_forms_are_read_as_pillow_reads_them(form):
    data = BytesIO()
    noisy().save(data, **form)
    assert (tiny.decode_tiny(data.getvalue(), 'a picture') == np.array(Image.open(data))).all()

def test_printers_colours_are_read_nearly_as_pillow_reads_them():
    data = BytesIO()
    noisy().convert('CMYK').save(data, format='JPEG')
    wanted = np.array(Image.open(data).convert('RGB')).astype(int)
    assert abs(tiny.decode_tiny(data.getvalue(), 'a picture') - wanted).max() <= 1

def test_a_picture_that_claims_to_be_huge_is_named(monkeypatch):
    def no_memory(data): raise MemoryError
    monkeypatch.setattr(tiny, 'decode_jpeg', no_memory)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    data = BytesIO()
    noisy().save(data, format='JPEG')
    with pytest.raises(ValueError, match='^the victim is damaged or cut short'): tiny.decode_tiny(data.getvalue(), 'the victim')

def test_grey_pictures_become_rgb(micro):
    grey = Image.open(micro/VICTIM).convert('L')
    grey.save(micro/VICTIM, format='JPEG')
    ds = tiny.open_store(tiny.decode_store(micro, micro.parent/'store', **quiet))['train']
    x = ds.ims[[f for f, _ in tiny.check_structure(micro, SIZES).train].index(VICTIM)]
    assert (x == x[:1]).all()


# --- pictures that don't decode

@pytest.mark.parametrize('bad, said, procs', [(lambda b: b[:len(b) // 2], 'is damaged or cut short', 1), (lambda b: b'', 'is not a picture', 1), (lambda b: b'<html>404</html>', 'is not a picture', 2)])
def test_a_picture_that_does_not_decode(micro, bad, said, procs, small_parts):
    whole, store = (micro/VICTIM).read_bytes(), micro.parent/'store'
    (micro/VICTIM).write_bytes(bad(whole))
    with pytest.raises(ValueError, match=f'1 of 23 pictures are unusable: {VICTIM} {said}.*name them in skip of decode_store'): tiny.decode_store(micro, store, procs=procs, **quiet)
    assert left(micro.parent) == ['store.partial']
    (micro/VICTIM).write_bytes(whole)   # replaced: the run goes on
    assert len(tiny.open_store(tiny.decode_store(micro, store, **quiet), whole=True)['train']) == 18 and left(micro.parent) == ['store']

def test_going_on_without_it_when_asked(micro, small_parts):
    (micro/VICTIM).write_bytes(b'')
    with pytest.raises(ValueError): tiny.decode_store(micro, micro.parent/'store', **quiet)
    ds = tiny.open_store(tiny.decode_store(micro, micro.parent/'store', skip=[VICTIM], **quiet), whole=True)
    drop(micro/VICTIM)
    alone = tiny.open_store(tiny.decode_store(micro, micro.parent/'store2', skip=[VICTIM], **quiet), whole=True)
    assert len(ds['train']) == 17 and len(ds['valid']) == 5 and torch.equal(ds['train'].ims, alone['train'].ims) and torch.equal(ds['train'].labels, alone['train'].labels)

def test_all_that_do_not_decode_are_named_at_once(micro):
    victims = [f'train/n9000000{c}/images/n9000000{c}_{i}.JPEG' for c in range(3) for i in (1, 4)]
    for v in victims: (micro/v).write_bytes(b'')
    with pytest.raises(ValueError, match='6 of 23 pictures are unusable') as e: tiny.decode_store(micro, micro.parent/'store', **quiet)
    assert all(v in str(e.value) for v in victims)

def test_wrong_size(micro):
    Image.new('RGB', (32, 64)).save(micro/VICTIM, format='JPEG')
    with pytest.raises(ValueError, match=f'{VICTIM} should have 64x64 pixels; it has 32x64'): tiny.decode_store(micro, micro.parent/'store', **quiet)


# --- full disks, killed runs

def test_no_room_from_the_start(micro, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(tiny.shutil, 'disk_usage', lambda p: usage(p)._replace(free=20 * tiny.PICTURE))
    with pytest.raises(OSError, match='the disk is full: 0.3 MB are still needed and 0.2 MB free.* make room and call again') as e: tiny.decode_store(micro, micro.parent/'store', **quiet)
    assert e.value.errno == errno.ENOSPC and left(micro.parent) == []

def test_full_in_between(micro, monkeypatch, small_parts):
    store, real, n = micro.parent/'store', tiny.decode_part, []
    def full(files, part, folder):
        n.append(part)
        if len(n) == 4: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(files, part, folder)
    monkeypatch.setattr(tiny, 'decode_part', full)
    with pytest.raises(OSError, match='the disk is full'): tiny.decode_store(micro, store, procs=1, **quiet)
    assert left(micro.parent) == ['store.partial']
    tiny.decode_store(micro, store, procs=1, **quiet)
    assert len(n) == 4 + 7 - 3 and left(micro.parent) == ['store']   # the three parts that were done are not done again
    tiny.open_store(store, whole=True)

RUN = '''
import sys, time
from course_lib import tiny_imagenet as tiny
tiny.PART, noted = 4, tiny._write_note
def slow(part, crc, folder):
    noted(part, crc, folder)
    print('noted', part.split, part.start, flush=True)
    time.sleep(float(sys.argv[4]))
if __name__ == '__main__':
    tiny._write_note = slow
    print('done', tiny.decode_store(sys.argv[1], sys.argv[2], sizes=(3, 6, 5), procs=int(sys.argv[3]), progress=False), flush=True)
'''

@posix
def test_killed_and_called_again(micro, start, procs=2, n=2):
    store, clean = micro.parent/'store', tiny.decode_store(micro, micro.parent/'clean', **quiet)
    run = start(micro, store, procs, pause=.2)
    for _ in range(n): run.stdout.readline()
    kill_at(run, 'noted')
    assert left(micro.parent) == ['store.partial']
    with pytest.raises(FileNotFoundError, match='no store'): tiny.open_store(store)
    again = start(micro, store, procs).communicate(timeout=200)[0].splitlines()
    assert len(again) < 8 - n and again[-1].startswith('done') and left(micro.parent) == ['store']
    a, b = tiny.open_store(store, whole=True), tiny.open_store(clean)
    for split in a: assert torch.equal(a[split].ims, b[split].ims) and torch.equal(a[split].labels, b[split].labels)

def test_a_note_without_its_pictures_does_not_count(micro, small_parts, monkeypatch):
    store, finish = micro.parent/'store', tiny._finish
    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(tiny, '_finish', killed)
    with pytest.raises(KeyboardInterrupt): tiny.decode_store(micro, store, **quiet)
    with open(store.with_name('store.partial')/'train.u8', 'r+b') as f:   # lost in a power cut, say
        f.seek(5 * tiny.PICTURE)
        f.write(bytes(100))
    (store.with_name('store.partial')/'valid.u8').unlink()
    monkeypatch.setattr(tiny, '_finish', finish)
    tiny.open_store(tiny.decode_store(micro, store, **quiet), whole=True)

def test_another_was_quicker_while_this_one_looked(micro, monkeypatch):
    "It finishes in between: no error, and nothing is decoded a second time."
    store, look = micro.parent/'store', tiny.check_structure
    def second(*args):
        monkeypatch.setattr(tiny, 'check_structure', look)
        tiny.decode_store(micro, store, **quiet)
        return look(*args)
    monkeypatch.setattr(tiny, 'check_structure', second)
    assert tiny.decode_store(micro, store, **quiet) == store and left(micro.parent) == ['store']

def test_another_was_quicker_and_this_one_began(micro, small_parts, monkeypatch):
    "The other's store appears after this one has made a folder of its own, which must not stay."
    store, make_room = micro.parent/'store', tiny._make_room
    tiny.decode_store(micro, micro.parent/'ready', **quiet)
    def late(*args):
        make_room(*args)
        (micro.parent/'ready').rename(store)
    monkeypatch.setattr(tiny, '_make_room', late)
    assert tiny.decode_store(micro, store, **quiet) == store and left(micro.parent) == ['store']

def test_two_at_once(micro, small_parts, monkeypatch):
    store, finish = micro.parent/'store', tiny._finish
    def second(*args):   # while the first finishes, another process is quicker
        monkeypatch.setattr(tiny, '_finish', finish)
        tiny.decode_store(micro, store, **quiet)
        return finish(*args)
    monkeypatch.setattr(tiny, '_finish', second)
    assert tiny.decode_store(micro, store, **quiet) == store and left(micro.parent) == ['store']
    tiny.open_store(store, whole=True)


# --- stores

def test_a_store_is_not_overwritten(micro):
    store = tiny.decode_store(micro, micro.parent/'store', **quiet)
    with pytest.raises(FileExistsError, match='delete it to decode anew'): tiny.decode_store(micro, store, **quiet)

def cut(s): (s/'valid.u8').write_bytes((s/'valid.u8').read_bytes()[:-1])
def version(s): edit(s/'store.json', '"version": 1', '"version": 0')
def mixed(s): (s/'valid.u8').write_bytes((s/'valid.u8').read_bytes()[::-1])

@pytest.mark.parametrize('spoil, said', [(cut, 'valid.u8 should have 61,440 bytes; it has 61,439'), (version, 'has version 0, and this course reads 1'), (mixed, 'valid.u8 is not what was written')])
def test_broken_stores(micro, spoil, said):
    store = tiny.decode_store(micro, micro.parent/'store', **quiet)
    spoil(store)
    with pytest.raises(ValueError, match=f'{said}.*elete'): tiny.open_store(store)

def test_changes_stay_in_memory(micro):
    store = tiny.decode_store(micro, micro.parent/'store', **quiet)
    tiny.open_store(store)['train'].ims.zero_()
    assert tiny.open_store(store, whole=True)['train'].ims.any()

def test_the_data_folder_is_used_and_keeps_the_store(micro, tmp_path, monkeypatch):
    folder = tmp_path/'data'
    monkeypatch.setenv('COURSE_DATA', str(folder))
    monkeypatch.setenv('COURSE_OUT', str(tmp_path/'out'))
    shutil.copytree(micro, folder/'tiny-imagenet-200')
    with pytest.raises(ValueError, match='should name 200 classes; it names 3'): tiny.tiny_ds('train')   # a broken set is not passed over
    tiny.decode_store(micro, folder/tiny.STORE, **quiet)
    assert tiny.store_path() == folder/tiny.STORE and len(tiny.tiny_ds('valid')) == 5 and not (tmp_path/'out').exists()

def test_a_data_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('COURSE_OUT', str(tmp_path/'out'))
    (tmp_path/'data').mkdir()
    monkeypatch.setattr(tiny.os, 'access', lambda p, mode: False)
    assert tiny.store_path() == tmp_path/'out'/tiny.STORE

@pytest.mark.parametrize('split', ['test', '', None])
def test_wrong_split(split):
    with pytest.raises(ValueError, match="'train' or 'valid'"): tiny.tiny_ds(split)

def test_stats():
    ims = torch.randint(0, 256, (2500, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = tiny.channel_stats(ims)
    x = ims.double() / 255
    assert torch.allclose(mean.double(), x.mean((0, 2, 3)), atol=1e-7) and torch.allclose(std.double(), x.std((0, 2, 3), correction=0), atol=1e-7)


# --- downloads

CONTENT = bytes(range(256)) * 100

class Server(SimpleHTTPRequestHandler):
    "/cut/X sends 8,192 bytes of what is asked and hangs up; /whole/X doesn't know `Range`; /excuse/X and /unsized/X send a word instead; /wrong/X sends something else of that length; /slow/X waits in the middle until `go`; others send all that is asked."
    def log_message(self, *args): pass
    def do_GET(self):
        how = self.path.split('/')[1]
        start = 0 if how == 'whole' else int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
        self.server.asked.append((how, start))
        if how == 'missing': return self.send_error(404)
        if how in ('excuse', 'unsized'): return self.apologise(how == 'excuse')
        sent = CONTENT[::-1] if how == 'wrong' else CONTENT
        self.send_response(200 if how == 'whole' else 206)
        self.send_header('Content-Length', str(len(sent) - start))
        self.end_headers()
        if how == 'slow':
            self.wfile.write(sent[start:start + 8192])
            start += 8192
            self.server.begun.set()
            self.server.go.wait(20)
        self.wfile.write(sent[start:start + 8192] if how == 'cut' else sent[start:])
    def apologise(self, with_size):
        self.send_response(200)
        if with_size: self.send_header('Content-Length', '9')
        self.end_headers()
        self.wfile.write(b'not today')

@pytest.fixture
def server(tmp_path, monkeypatch):
    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as s:
        s.url, s.asked, s.begun, s.go = f'http://127.0.0.1:{s.server_port}', [], Event(), Event()
        Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
        for k in 'no_proxy', 'NO_PROXY': monkeypatch.setenv(k, '127.0.0.1')
        monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
        monkeypatch.setattr(data, '_registry', dict(data._registry))
        yield s
        s.shutdown()

def put(server, *hows): return data.register(data.DataFile('net', tuple(f'{server.url}/{h}/net' for h in hows), hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 'none')).path

def test_a_broken_download_goes_on(server):
    path = put(server, 'cut', 'cut')   # two addresses, one attempt each
    with pytest.raises(data.FetchError, match='connection broke before all 25,600 bytes had come.* or .*connection broke.*goes on from there'): tiny.fetch_resumed('net', progress=False)
    assert server.asked == [('cut', 0), ('cut', 8192)] and not path.exists() and path.with_name('.net.part').stat().st_size == 16384
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ['net']

def test_a_mirror_finishes_it(server):
    path = put(server, 'missing', 'cut', 'whole')
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT and [o[0] for o in server.asked] == ['missing', 'cut', 'whole']
    assert tiny.fetch_resumed('net') == path and len(server.asked) == 3

def test_something_else_is_refused_and_not_kept(server):
    path = put(server, 'wrong')
    with pytest.raises(data.FetchError, match=r'should have 25,600 bytes with sha256 .* but has 25,600') as e: tiny.fetch_resumed('net', progress=False)
    assert list(path.parent.iterdir()) == [] and 'kept' not in str(e.value)

def test_a_mirror_that_offers_something_else_does_no_harm(server):
    path = put(server, 'cut', 'excuse', 'cut')
    with pytest.raises(data.FetchError, match='excuse/net .net should have 25,600 bytes; 9 are offered.*goes on from there'): tiny.fetch_resumed('net', progress=False)
    assert server.asked == [('cut', 0), ('excuse', 8192), ('cut', 8192)] and path.with_name('.net.part').stat().st_size == 16384
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT

def test_what_came_to_its_end_and_is_wrong_is_not_added_to(server):
    path = put(server, 'unsized', 'whole')
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ['net']

def test_killed_before_the_last_rename(server):
    path = put(server, 'missing')
    path.parent.mkdir()
    path.with_name('.net.part').write_bytes(CONTENT)
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT and server.asked == []

def test_two_download_it_at_once(server, capsys):
    path, found = put(server, 'slow'), []
    threads = [Thread(target=lambda: found.append(tiny.fetch_resumed('net', True))) for _ in range(2)]
    threads[0].start()
    assert server.begun.wait(20)   # the first one has a part of it
    threads[1].start()
    until(lambda: 'another process is writing .net.part: waiting for it' in capsys.readouterr().out, 20)
    server.go.set()
    for t in threads: t.join(20)
    assert found == [path, path] and path.read_bytes() == CONTENT and server.asked == [('slow', 0)] and [p.name for p in path.parent.iterdir()] == ['net']

def test_old_bytes_that_are_wrong_are_not_the_address_fault(server):
    path = put(server, 'mirror')
    path.parent.mkdir()
    path.with_name('.net.part').write_bytes(b'x' * 8192)
    assert tiny.fetch_resumed('net', progress=False).read_bytes() == CONTENT and server.asked == [('mirror', 8192), ('mirror', 0)]

def test_tiny_imagenet_is_registered():
    file = data.registry()['tiny-imagenet-200.zip']
    assert len(file.sha256) == 64 and len(file.urls) == 2 and file.size == 248_100_043
