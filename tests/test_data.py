"""Downloads, as the library does them: a web server on the loopback interface, good and bad; nothing half-written, whatever happens."""
import gzip, hashlib, os, signal, struct, subprocess, sys, time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from course_lib import core, data

CONTENT = bytes(range(256)) * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()

class Server(SimpleHTTPRequestHandler):
    "/half/X announces all of X and hangs up in the middle, /short/X says nothing of its size, /error/X fails, /slow/X never ends."
    def log_message(self, *args): pass
    def do_GET(self):
        self.server.asked.append(self.path)
        how, _, name = self.path[1:].rpartition('/')
        if not how: return super().do_GET()
        if how == 'error': return self.send_error(500)
        whole = Path(self.directory, name).read_bytes()
        self.send_response(200)
        if how != 'short': self.send_header('Content-Length', str(len(whole)))
        self.end_headers()
        self.wfile.write(whole[:len(whole) // 2])
        self.wfile.flush()
        while how == 'slow' and not self.server.over: time.sleep(.05)

@pytest.fixture
def server(tmp_path, monkeypatch):
    web = tmp_path/'web'
    web.mkdir()
    (web/'net').write_bytes(CONTENT)
    (web/'other').write_bytes(CONTENT[::-1])
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Server, directory=web)) as s:
        s.url, s.asked, s.over = f'http://127.0.0.1:{s.server_port}', [], False
        Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
        for k in 'no_proxy', 'NO_PROXY': monkeypatch.setenv(k, '127.0.0.1')
        monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
        monkeypatch.setattr(data, '_registry', dict(data._registry))
        yield s
        s.over = True
        s.shutdown()

@pytest.fixture
def put(server):
    "Register CONTENT as a/net, to be had from the given places of the server."
    return lambda *places, sha256=SHA, size=len(CONTENT): data.register(
        data.DataFile('a/net', tuple(p if ':' in p else f'{server.url}/{p}' for p in places), sha256, size, 'none')).name

def left(): return [p for p in core.data_path().rglob('*') if p.is_file()]

def test_fetch_once(server, put):
    name = put('net')
    path = data.fetch(name, progress=False)
    assert path == core.data_path('a', 'net') == data.fetch(name) == data.find(name) and path.read_bytes() == CONTENT
    assert server.asked == ['/net'] and left() == [path]

def test_progress_is_text(put, capsys):
    data.fetch(put('net'))
    said = capsys.readouterr()
    assert said.out == '' and 'net: 100%' in said.err

def test_no_progress(put, capsys):
    data.fetch(put('net'), progress=False)
    assert capsys.readouterr() == ('', '')

@pytest.mark.parametrize('dead', ['http://127.0.0.1:9/net', 'missing', 'error/net', 'half/net', 'short/net', 'other', 'http://no-such-host.invalid/net', 'nonsense:/net'])
def test_next_mirror(put, dead):
    assert data.fetch(put(dead, 'net'), progress=False).read_bytes() == CONTENT and len(left()) == 1

@pytest.mark.parametrize('place, reason', [
    ('http://127.0.0.1:9/net', 'ConnectionError'), ('missing', 'HTTP 404'), ('error/net', 'HTTP 500'), ('half/net', 'before all 256,000 bytes had come'),
    ('short/net', f'should have 256,000 bytes with sha256 {SHA[:16]}, but has 128,000 with sha256 {hashlib.sha256(CONTENT[:128000]).hexdigest()[:16]}'),
    ('other', f'a/net should have 256,000 bytes with sha256 {SHA[:16]}, but has 256,000 with sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()[:16]}')])
def test_refused_in_one_sentence(put, place, reason):
    with pytest.raises(data.FetchError) as e: data.fetch(put(place), progress=False)
    said = str(e.value)
    assert reason in said and '\n' not in said and said.startswith('a/net (0.3 MB) is not in the data folder') and said.endswith(f"put it at {core.data_path('a', 'net')}")
    assert left() == []

def test_every_reason_is_named(put):
    with pytest.raises(data.FetchError, match='HTTP 404.* or .*HTTP 500'): data.fetch(put('missing', 'error/net'), progress=False)

def test_by_hand(server, put):
    name = put('http://127.0.0.1:9/net')
    core.data_path('a').mkdir(parents=True)
    core.data_path('a', 'net').write_bytes(CONTENT)
    assert data.fetch(name).read_bytes() == CONTENT and server.asked == []

def test_a_wrong_copy_is_never_used(server, put):
    path = data.fetch(name := put('net'), progress=False)
    path.write_bytes(CONTENT[:-1] + b'x')
    for use in data.find, data.fetch:
        with pytest.raises(ValueError, match='delete .*net and fetch it anew'): use(name)
    assert len(server.asked) == 1   # what somebody has put there is not overwritten

def test_prefix_of_a_hash(put):
    assert data.fetch(put('net', sha256=SHA[:8]), progress=False).exists()

def test_wrong_prefix(put):
    with pytest.raises(data.FetchError, match='sha256 00000000, but'): data.fetch(put('net', sha256='0' * 8), progress=False)

def test_folder_that_cannot_be_written(put, tmp_path, monkeypatch):
    (tmp_path/'file').touch()
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'file'))
    with pytest.raises(OSError, match='file'): data.fetch(put('net', 'net'), progress=False)

def test_full_disk(put, monkeypatch):
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data.HTTPDownloader, '__call__', full)
    with pytest.raises(OSError, match='No space left'): data.fetch(put('net', 'net'), progress=False)
    assert left() == []

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_interrupted(server, put, how):
    name = put('slow/net', 'net')
    listen = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '   # a shell's background jobs begin deaf
    code = listen + f'from course_lib import data; data.fetch(data.register({data.registry()[name]!r}).name)'.replace('DataFile(', 'data.DataFile(')
    proc = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, env=dict(os.environ))
    for _ in range(1200):
        if server.asked and left(): break
        time.sleep(.05)
    proc.send_signal(how)
    proc.communicate(timeout=30)
    assert proc.returncode and not core.data_path('a', 'net').exists()
    assert how == signal.SIGKILL or left() == []   # a killed process can't tidy up, but what it leaves has another name
    del data._registry['a/net']
    assert data.fetch(put('net'), progress=False).read_bytes() == CONTENT

def test_unknown_name():
    with pytest.raises(ValueError, match="no file 'nonsense' is registered; there are .*FashionMNIST/raw/t10k"): data.fetch('nonsense')

def test_fashion_files_are_registered():
    ours = [f for n, f in data.registry().items() if n.startswith('FashionMNIST/raw/')]
    assert len(ours) == 4 and all(len(f.sha256) == 64 and len(f.urls) == 2 and f.licence == 'MIT' for f in ours) and 30e6 < sum(f.size for f in ours) < 32e6

# --- data sets

def test_fashion_without_data(tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path))
    train, valid = data.fashion_ds('train'), data.fashion_ds('valid')
    assert (len(train), len(valid)) == (6000, 1000) and 'micro_fashion' in train.source and not (train.ims[:1000] == valid.ims).all()
    assert train[0][0].shape == (1, 28, 28) and isinstance(train[0][1], int)

def test_half_of_fashion_is_none(tmp_path, monkeypatch):
    "Drawn clothes for both, not photographs for training and drawings for validation."
    monkeypatch.setattr(data, 'find', lambda name: tmp_path/name if '/train-' in name else None)
    assert all('micro_fashion' in data.fashion_ds(split).source for split in ('train', 'valid'))

def test_a_broken_fashion_file_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path))
    (tmp_path/'FashionMNIST/raw').mkdir(parents=True)
    (tmp_path/'FashionMNIST/raw/train-images-idx3-ubyte.gz').write_bytes(b'half')
    with pytest.raises(ValueError, match='train-images-idx3-ubyte.gz should have 26,421,880 bytes'): data.fashion_ds('train')

@pytest.mark.parametrize('n', [0, 1, 7, 23])
def test_any_number_of_silhouettes(n):
    ds = data.micro_fashion(n)
    assert len(ds) == n == len(list(ds)) and ds.ims.shape == (n, 1, 28, 28)

def test_workers_load_the_same():
    ds = data.micro_fashion(40)
    here, there = (data.get_dls(ds, ds, bs=8, num_workers=n).valid for n in (0, 2))
    for a, b in zip(here, there, strict=True): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

def test_drawing_leaves_random_numbers_alone():
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    data.micro_fashion(20)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == legacy).all()

IDX = struct.pack('>4B2I', 0, 0, 8, 2, 2, 3) + bytes(6)

@pytest.mark.parametrize('content, message', [
    (b'', 'is no IDX file'), (b'\0\0\7\1' + IDX, 'is no IDX file'), (IDX[:7], 'is no IDX file'), (IDX[:-1], '2x3 numbers, 18 bytes in all; got 17'), (IDX + b'x', 'got 19'), (b'<html>', 'is no IDX file')])
@pytest.mark.parametrize('zipped', [False, True])
def test_bad_idx(tmp_path, content, message, zipped):
    path = tmp_path/('x.gz' if zipped else 'x')
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=message): data.read_idx(path)

@pytest.mark.parametrize('content', [gzip.compress(IDX)[:-3], IDX, b'', gzip.compress(IDX)[:10] + b'\xff' * 20])
def test_bad_gzip(tmp_path, content):
    (tmp_path/'x.gz').write_bytes(content)
    with pytest.raises(ValueError, match='x.gz is no'): data.read_idx(tmp_path/'x.gz')

def test_missing_idx(tmp_path):
    with pytest.raises(FileNotFoundError): data.read_idx(tmp_path/'x.gz')

def test_addresses_in_a_list():
    file = data.DataFile('net', ['a', 'b'], '0' * 8, 1, 'none')
    assert file.urls == ('a', 'b') and hash(file)
