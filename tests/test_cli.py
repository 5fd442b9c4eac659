"The command `course`: bad input meets a sentence and an exit code, and what is left behind is whole."
import html, http.server, inspect, json, os, re, resource, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from course_lib import cli, data, features

FAST = ['--size', '48', '--steps', '2', '--backbone', 'course_vgg', '--quiet']
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and limits are different on Windows')
START = 'import sys; from course_lib.cli import main; sys.exit(main())'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Each test in an empty folder of its own, without data, without network."
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'data'))
    for k in 'http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY': monkeypatch.setenv(k, 'http://127.0.0.1:9')
    monkeypatch.setenv('no_proxy', 'localhost,127.0.0.1')
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path/'here'

@pytest.fixture
def course(capsys):
    "Run a command in this process: exit code, stdout, stderr."
    def run(*words):
        try: code = cli.main([str(w) for w in words])
        except SystemExit as e: code = e.code
        said = capsys.readouterr()
        assert 'Traceback' not in said.err + said.out
        return code, said.out, said.err
    return run

@pytest.fixture
def process(root):
    "Start a command in a process of its own, which ends with the test."
    started = []
    def start(*words, env={}, **kw):
        env = dict(os.environ, PYTHONPATH=str(root), **env)
        started.append(subprocess.Popen([sys.executable, '-c', START, *map(str, words)], stdout=subprocess.PIPE, text=True, env=env, **{'stderr': subprocess.PIPE, **kw}))
        return started[-1]
    yield start
    for p in started: p.kill()

def picture(name='me.png', size=(48, 40), mode='RGB', **kw):
    "A picture file of noise."
    shape = size[::-1] if mode in ('L', 'I;16') else (*size[::-1], len(Image.new(mode, (1, 1)).getbands()))
    top, kind = (65535, np.uint16) if mode == 'I;16' else (255, np.uint8)
    im = Image.fromarray(np.random.default_rng(0).integers(0, top, shape, kind, endpoint=True), mode if mode == 'CMYK' else None)
    im.save(name, **kw)
    return name

def left(): return sorted(p.name for p in Path().iterdir())


# --- course style: pictures of every kind

def grey(): return picture(mode='L')
def deep(): return picture(mode='I;16')
def inks(): return picture('me.jpg', mode='CMYK')
def glass(): return picture(mode='RGBA')
def film():
    frames = [Image.new('RGB', (48, 40), c) for c in ('red', 'green', 'blue')]
    frames[0].save('me.gif', save_all=True, append_images=frames[1:])
    return 'me.gif'
def wide():
    Image.new('L', (20_000, 5_000), 99).save('me.jpg')
    return 'me.jpg'
def spaces(): return picture('my own Bild ü.png')

@pytest.mark.parametrize('make', [grey, deep, inks, glass, film, wide, spaces], ids=lambda f: f.__name__)
def test_pictures_of_any_kind(course, make):
    given = make()
    w, h = (20_000, 5_000) if make is wide else (48, 40)
    code, out, err = course('style', given, 'night', *FAST, '--size', 128, '--out', 'new folder/x.png')
    assert code == 0, err
    im, clip = Image.open('new folder/x.png'), Image.open('new folder/x.webp')
    assert im.mode == 'RGB' and im.size == clip.size == (128, round(128*h/w)) and clip.n_frames > 1
    assert str(Path('new folder/x.png')) in out.splitlines() and sorted(os.listdir('new folder')) == ['x.png', 'x.webp']
    assert err == ('course: me.gif has 3 frames; the first is read\n' if make is film else '')

def missing(): return 'nobody.jpg', 'there is no picture file nobody.jpg'
def no_such_name(): return 'nobody', "neither a file nor a known name: astronaut"
def folder():
    Path('me.png').mkdir()
    return 'me.png', 'is a folder'
def cut():
    picture('me.jpg', (200, 200))
    Path('me.jpg').write_bytes(Path('me.jpg').read_bytes()[:3000])
    return 'me.jpg', 'damaged or cut short'
def empty():
    Path('me.png').touch()
    return 'me.png', 'is empty'
def words():
    Path('me.png').write_text('no picture at all')
    return 'me.png', 'not a picture in a known format'
def dot(): return picture(size=(1, 1)), 'must be at least 32'
def thread(): return picture(size=(20_000, 9)), 'must be at least 32'
def huge():
    Image.new('1', (20_000, 20_000)).save('me.png')
    return 'me.png', '400 million pixels'

@pytest.mark.parametrize('make', [missing, no_such_name, folder, cut, empty, words, dot, thread, huge], ids=lambda f: f.__name__)
@pytest.mark.parametrize('place', ['content', 'style'])
def test_pictures_refused(course, make, place):
    given, why = make()
    before = left()
    code, out, err = course('style', *((given, 'night') if place == 'content' else ('chelsea', given)), *FAST, '--out', 'new/x.png')
    assert code == 1 and err.startswith('course: ') and err.count('\n') == 1 and why in err
    assert out == '' and left() == before


# --- course style: wrong use

@pytest.mark.parametrize('options, code, why', [
    (['--backbone', 'vgg20'], 1, 'there are vgg16, vgg19, squeezenet, course_vgg'),
    (['--style-layers', 'relu9_9'], 1, "no layer 'relu9_9'; it has conv1_1"),
    (['--content-layers', 'relu1_1,nose=2'], 1, "no layer 'nose'"),
    (['--style-layers', 'relu1_1=-1'], 2, 'layers look like'),
    (['--style-layers', ','], 2, 'layers look like'),
    (['--steps', '0'], 2, 'argument --steps: must be a whole number, at least 1; got 0'),
    (['--steps', '1.5'], 2, 'argument --steps'),
    (['--size', '-64'], 2, 'argument --size: must be a whole number, at least 32; got -64'),
    (['--lr', 'nan'], 2, 'argument --lr'),
    (['--content-weight', '-1'], 2, 'argument --content-weight'),
    (['--start', 'middle'], 2, 'content'),
    (['--out', 'x.doc'], 1, 'a picture ends in .png, .jpg, .jpeg, .webp; got --out x.doc'),
    (['--out', 'x'], 1, 'a picture ends in'),
    (['--out', '.'], 1, 'a picture ends in'),
    (['--out', 'me.png'], 1, 'me.png is a picture you gave'),
    (['--out', 'other.jpg', '--style-size', '0'], 2, 'argument --style-size'),
])
def test_wrong_use(course, monkeypatch, options, code, why):
    picture()
    monkeypatch.setattr('course_lib.style_transfer.transfer', lambda *a, **k: pytest.fail('it painted'))
    got, out, err = course('style', 'me.png', 'night', *FAST, *options)
    assert got == code and why in err and left() == ['me.png']

def test_a_picture_at_home_or_of_the_course_is_not_replaced_either(course, monkeypatch, root):
    picture()
    monkeypatch.setenv('HOME', str(Path.cwd()))
    monkeypatch.setattr('course_lib.style_transfer.transfer', lambda *a, **k: pytest.fail('it painted'))
    for content, out in ('~/me.png', 'me.png'), ('me.png', root/'assets/pictures/night.jpg'):
        code, _, err = course('style', content, 'night', *FAST, '--out', out)
        assert code == 1 and f'{out} is a picture you gave' in err and left() == ['me.png']

def test_the_film_does_not_replace_a_picture_given_either(course):
    picture('me.webp')
    before = Path('me.webp').read_bytes()
    assert course('style', 'me.webp', 'night', *FAST, '--out', 'me.png')[0] == 1
    assert left() == ['me.webp'] and Path('me.webp').read_bytes() == before

def test_places_that_cannot_be_written(course):
    picture()
    code, _, err = course('style', 'me.png', 'night', *FAST, '--out', 'me.png/below/x.png')
    assert code == 1 and 'nothing can be written in the folder' in err
    Path('x.png').mkdir()
    code, _, err = course('style', 'me.png', 'night', *FAST, '--out', 'x.png')
    assert code == 1 and 'x.png is a folder' in err and left() == ['me.png', 'x.png']

@posix
def test_a_folder_without_permission(course, monkeypatch):
    Path('closed').mkdir(mode=0o555)
    if os.geteuid() == 0:   # who may write anywhere
        def refuse(**kw): raise PermissionError(13, 'Permission denied')
        monkeypatch.setattr(cli, 'TemporaryFile', refuse)
    code, _, err = course('style', 'chelsea', 'night', *FAST, '--out', 'closed/x.png')
    assert code == 1 and err == 'course: nothing can be written in the folder closed: Permission denied\n' and not os.listdir('closed')

def test_options_reach_the_painting(course, monkeypatch):
    seen = {}
    def transfer(content, style, backbone, **kw):
        seen.update(kw, content=content.shape, style=style.shape, backbone=backbone.name)
        raise ValueError('enough')
    monkeypatch.setattr('course_lib.style_transfer.transfer', transfer)
    course('style', 'chelsea', 'night', '--backbone', 'course_vgg', '--size', 64, '--style-size', 40, '--content-layers', 'relu2_1', '--style-layers', 'relu1_1,relu2_1=.5',
           '--content-weight', .2, '--tv-weight', .3, '--start', 'noise', '--steps', 7, '--lr', .05, '--seed', 3, '--precision', 'fp32')
    assert max(seen.pop('content')) == 64 and max(seen.pop('style')) == 40 and callable(seen.pop('tell')) and seen.pop('log_every') == 1
    assert seen == dict(backbone='course_vgg', content_layers={'relu2_1': 1.}, style_layers={'relu1_1': 1., 'relu2_1': .5}, content_weight=.2, tv_weight=.3,
                        start='noise', steps=7, lr=.05, seed=3, precision='fp32')

def test_defaults_are_those_of_transfer():
    from course_lib.style_transfer import transfer
    args = vars(cli.parser().parse_args(['style', 'a', 'b']))
    usual = {k: p.default for k, p in inspect.signature(transfer).parameters.items() if k in args and p.default is not p.empty}
    assert {k: args[k] for k in usual} == usual and set(cli.SETTINGS) <= set(usual)

def test_the_same_seed_paints_the_same(course):
    for name in 'a.png', 'b.png': assert course('style', 'chelsea', 'night', *FAST, '--start', 'noise', '--no-film', '--out', name)[0] == 0
    assert left() == ['a.png', 'b.png'] and Path('a.png').read_bytes() == Path('b.png').read_bytes()

def test_no_film_is_in_nobody_s_way(tmp_path):
    given, out = tmp_path/'me.webp', tmp_path/'me.png'
    given.touch()
    assert cli.outputs(out, given, 'night', film=False)[0] == out
    with pytest.raises(ValueError, match='me.webp is a picture you gave'): cli.outputs(out, given, 'night')


# --- a full disk, a bad download, Ctrl-C

@posix
def test_a_full_disk(process):
    def small(): resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    p = process('style', 'chelsea', 'night', *FAST, '--size', '64', '--start', 'noise', '--out', 'new/x.png', preexec_fn=small, env=dict(PYTHONDONTWRITEBYTECODE='1'))
    out, err = p.communicate(timeout=120)
    assert p.returncode == 1 and re.fullmatch(r'course: new/x.png could not be written: .+ \([\d.,]+ .B free there\)\n', err), err
    assert os.listdir('new') == [] and 'new/x.png' not in out.splitlines()

def test_a_disk_that_is_full_after_the_picture(course, monkeypatch):
    def full(frames, path): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('course_lib.show.save_film', full)
    code, out, err = course('style', 'chelsea', 'night', *FAST, '--out', 'x.png')
    assert code == 1 and 'x.webp could not be written: No space left on device' in err
    assert left() == ['x.png'] and Image.open('x.png').size == (48, 32) and out.splitlines()[-1] == 'x.png'

@pytest.fixture
def served(monkeypatch):
    "A file registered for download, and a server that brings whatever `body` says."
    class Handler(http.server.BaseHTTPRequestHandler):
        body = b'right'
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import hashlib
    file = data.DataFile('probe/p.bin', (f'http://127.0.0.1:{server.server_port}/p',), hashlib.sha256(b'right').hexdigest(), 5, 'none')
    monkeypatch.setitem(data._registry, file.name, file)
    yield Handler, file
    server.shutdown()

def test_a_download(course, served):
    code, out, err = course('data', 'probe/p.bin')
    assert code == 0 and out.strip() == str(served[1].path) and served[1].path.read_bytes() == b'right'
    assert re.search(r'^here +5.0 bytes  probe/p.bin', course('data')[1], re.M)

@pytest.mark.parametrize('body, said', [(b'wrong', ' with sha256'), (b'righ', '; 4 are offered'), (b'<html>log in first</html>', '; 25 are offered'), (b'', '; 0 are offered')])
def test_a_bad_download(course, served, body, said):
    served[0].body = body
    code, out, err = course('data', 'probe/p.bin')
    assert code == 1 and f'probe/p.bin should have 5 bytes{said}' in err and out == ''
    assert not served[1].path.exists() and os.listdir(served[1].path.parent) == []
    assert re.search(r'^- +5.0 bytes  probe/p.bin', course('data')[1], re.M)

def test_a_damaged_copy_is_named_and_kept(course, served):
    served[1].path.parent.mkdir(parents=True)
    served[1].path.write_bytes(b'wrong')
    code, _, err = course('data', 'probe/p.bin')
    assert code == 1 and f'delete {served[1].path}' in err and served[1].path.read_bytes() == b'wrong'
    assert re.search(r'^damaged +5.0 bytes  probe/p.bin', course('data')[1], re.M)

def test_what_was_made_of_a_download_is_not_fetched_again(course, served, monkeypatch, tmp_path):
    made = tmp_path/'made.safetensors'
    made.touch()
    monkeypatch.setitem(features.RECIPES, 'probe', SimpleNamespace(download=served[1], path=made))
    code, out, _ = course('data', 'probe/p.bin')
    assert (code, out.strip()) == (0, str(made)) and not served[1].path.exists()

def test_unknown_data(course):
    code, _, err = course('data', 'everything')
    assert code == 1 and "no file 'everything' is registered; there are FashionMNIST" in err

def test_weights_that_are_damaged_or_away(course, tmp_path):
    code, _, err = course('style', 'chelsea', 'night', *FAST, '--backbone', 'squeezenet')
    assert code == 1 and 'could not be downloaded' in err and "'course_vgg' needs no download" in err
    (tmp_path/'data/weights').mkdir(parents=True, exist_ok=True)
    (tmp_path/'data/weights/squeezenet1_1.safetensors').write_bytes(b'junk')
    code, _, err = course('style', 'chelsea', 'night', *FAST, '--backbone', 'squeezenet')
    assert code == 1 and 'squeezenet1_1.safetensors is damaged' in err and left() == []

def drain(fd):
    "Read what a terminal is sent, so that its sender need not wait."
    try:
        while os.read(fd, 1000): pass
    except OSError: pass

@posix
def test_ctrl_c_keeps_the_picture_so_far(process):
    import pty, termios
    ours, theirs = pty.openpty()   # the bar is for a terminal
    termios.tcsetwinsize(theirs, (40, 120))
    p = process('style', 'chelsea', 'night', '--size', '48', '--backbone', 'course_vgg', '--steps', '5000', '--out', 'x.png', stderr=theirs)
    os.close(theirs)
    bar = b''
    while not re.search(rb'[1-9]\d*/5000 .*loss=', bar): bar += os.read(ours, 1000)   # ends with an OSError if the process does
    p.send_signal(signal.SIGINT)
    threading.Thread(target=drain, args=(ours,), daemon=True).start()
    out, _ = p.communicate(timeout=60)
    assert p.returncode == 130 and 'the picture so far is kept' in out
    assert left() == ['x.png', 'x.webp'] and Image.open('x.png').size == (48, 32) and b'Traceback' not in bar


# --- course run

LESSON = [('markdown', '# A lesson\n![A night](../assets/pictures/night.jpg), [core](00_core.ipynb), [web](https://example.org)'),
          ('code', "#| hide\nimport sys, warnings\nfrom course_lib.core import out_path, scale"),
          ('code', "warnings.warn('beware')\nprint('on the page')\nout_path('made.txt').write_text('made')\n[sys.executable == EXE, scale()]"),
          ('markdown', '## A picture'),
          ('code', '#| fig-alt: "A line that rises"\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);'),
          ('code', '#| code-fold: true\n#| code-summary: "Solution"\nx = 1'),
          ('code', "#| echo: false\nprint('said', 'without', 'a word of code')")]

@pytest.fixture
def lesson(root):
    "Write a lesson beside the real folders: a function of its extra cells."
    def write(*code, folder='a course/nbs'):
        nbs = Path(folder)
        nbs.mkdir(parents=True, exist_ok=True)
        (nbs.parent/'assets').exists() or (nbs.parent/'assets').symlink_to(root/'assets')
        cells = [dict(cell_type=kind, id=f'c{i}', metadata={}, source=src.replace('EXE', repr(sys.executable)), **(dict(outputs=[], execution_count=None) if kind == 'code' else {}))
                 for i, (kind, src) in enumerate([*LESSON, *(('code', c) for c in code)])]
        for name in '00_core', '98_probe':
            (nbs/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='other', display_name='x')), nbformat=4, nbformat_minor=5)))
        return nbs/'98_probe.ipynb'
    return write

@pytest.fixture
def decoy(tmp_path, monkeypatch):
    "A kernel of the same name that leads nowhere."
    spec = tmp_path/'jupyter/kernels/python3/kernel.json'
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=['false', '{connection_file}'], display_name='x', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'jupyter'))
    monkeypatch.setenv('PYTHONPATH', str(Path(cli.__file__).parent.parent))

def test_run_leaves_a_lesson(course, lesson, decoy, monkeypatch):
    lesson()
    monkeypatch.chdir('a course')
    before = Path('nbs/98_probe.ipynb').read_bytes()
    code, out, err = course('run', '98', '--scale', 'ci', '--out', 'my out')
    assert code == 0, err
    assert out.splitlines()[0] == '98_probe'
    assert sorted(os.listdir('my out')) == ['98_probe.html', '98_probe.ipynb', 'made.txt'] and 'Open' in out and Path('nbs/98_probe.ipynb').read_bytes() == before
    assert err.splitlines() == ['98_probe: A lesson', '98_probe: A picture']
    page = Path('my out/98_probe.html').read_text(encoding='utf-8')
    nb = json.loads(Path('my out/98_probe.ipynb').read_text(encoding='utf-8'))
    assert 'on the page' in page and re.search(r"\[True, ('|&#39;)ci('|&#39;)\]", page) and 'UserWarning' not in page and 'out_path, scale' not in page and '#|' not in re.sub('<.*?>', '', page)
    assert 'alt="A night"' in page and 'src="data:image/jpeg;base64' in page and 'alt="A line that rises"' in page and '<summary>Solution</summary>' in page
    text = html.unescape(re.sub('<.*?>', '', page))
    assert 'said without a word of code' in text and "print('on the page')" in text and "'without'" not in text
    assert 'href="../nbs/00_core.ipynb"' in page and '](../nbs/00_core.ipynb)' in ''.join(nb['cells'][0]['source'])
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="(?!data:)', page) and str(Path.cwd()) not in page

def test_run_names_the_cell_that_failed(course, lesson, decoy):
    path = lesson("print('before')", '#| fig-alt: x\nopen("nowhere.txt")', "print('after')")
    code, out, err = course('run', path, '--out', 'out')
    assert code == 1 and "course: 98_probe stopped at cell 8, `open(\"nowhere.txt\")`: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.txt'" in err
    page = Path('out/98_probe.html').read_text(encoding='utf-8')
    assert '>before' in page and '>after' not in page and 'Open' not in out

def test_run_names_the_network_first(course, lesson, decoy):
    code, out, _ = course('run', lesson('from course_lib.features import load_backbone\nload_backbone()'), '--out', 'out')
    assert code == 0 and out.splitlines()[0].startswith('98_probe; network course_vgg: ') and 'trained by this course' in out.splitlines()[0]

def test_bench_compares_loaders(course):
    code, out, _ = course('bench', 'data', '--n', 32, '--rounds', 1, '--workers', 0)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4 and lines[0].startswith('32 pictures: ') and lines[1].endswith('1.00 times the first')
    rates = [float(re.search(r'([\d,]+) pictures a second', line)[1].replace(',', '')) for line in lines[1:]]
    times = [float(re.search(r'([\d.]+) times', line)[1]) for line in lines[1:]]
    assert times == pytest.approx([r / rates[0] for r in rates], abs=.02)

@pytest.mark.parametrize('option, value, least', [('--n', 0, 1), ('--rounds', 0, 1), ('--bs', -3, 1), ('--workers', -1, 0)])
def test_bench_refuses_nothing_to_do(course, option, value, least):
    code, _, err = course('bench', 'data', option, value)
    assert code == 2 and f'argument {option}: must be a whole number, at least {least}; got {value}' in err

def test_doctor_knows_all_requirements(root):
    known = dict(ipython='IPython', pillow='PIL', **{'scikit-image': 'skimage'})
    asked = re.search(r'^requirements = (.*)$', (root/'settings.ini').read_text(), re.M)[1].split()
    assert set(cli.NEEDED) == {known.get(name, name) for name in (re.match(r'[\w-]+', o)[0] for o in asked)}

def test_run_survives_a_kernel_that_dies(course, lesson, decoy):
    code, out, err = course('run', lesson('import os; os._exit(3)'), '--out', 'out')
    assert code == 1 and 'stopped at cell 7, `import os; os._exit(3)`: its kernel died' in err and Path('out/98_probe.html').exists()

@posix
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_run(process, lesson, decoy, sig):
    path = lesson('import os, time\nout_path("pid").write_text(str(os.getpid()))\ntime.sleep(100)')
    p = process('run', path, '--out', 'out')
    while not (Path('out/pid').exists() and Path('out/pid').read_text()) and p.poll() is None: time.sleep(.1)
    p.send_signal(sig)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and err.splitlines()[-1] == 'course: stopped' and 'Traceback' not in err
    assert 'on the page' in Path('out/98_probe.html').read_text(encoding='utf-8')
    with pytest.raises(ProcessLookupError): os.kill(int(Path('out/pid').read_text()), 0)

def test_run_refuses(course, lesson, root, monkeypatch):
    path = lesson()
    for words, why in {('99',): 'there are no lessons here' if not (root/'nbs').exists() else "there is no lesson '99'; there are 00_core", (path, '--out', path.parent): 'the folder of the lesson itself',
                       (path, '--out', path): 'nothing can be written in the folder'}.items():
        code, _, err = course('run', *words)
        assert code == 1 and why in err
    assert course('run', path, '--scale', 'huge')[0] == 2
    Path('broken.ipynb').write_text('{}')
    code, _, err = course('run', 'broken.ipynb')
    assert code == 1 and 'broken.ipynb is no notebook' in err


# --- course doctor, and the shell itself

def test_doctor(course):
    code, out, err = course('doctor')
    assert code == 0 and err == '' and all(f'\n{o} ' in f'\n{out}' for o in ('versions', 'device', 'bfloat16', 'data folder', 'disk', 'weights', 'packages'))
    assert '(not there yet)' in out and 'course_vgg' in out

def test_doctor_names_what_is_missing(course, monkeypatch):
    monkeypatch.setattr(cli, 'NEEDED', ['torch', 'no_such_package'])
    code, out, _ = course('doctor')
    assert code == 1 and 'no_such_package missing' in out and 'pip install' in out

def test_help_is_light_and_names_the_commands(root):
    code = 'import sys, course_lib.cli as c\ntry: c.main(["--help"])\nexcept SystemExit as e: sys.exit(e.code or len({"torch", "numpy", "nbclient"} & set(sys.modules)))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(root)))
    assert done.returncode == 0 and all(o in done.stdout for o in ('doctor', 'data', 'run', 'train', 'style')), done.stderr

def test_no_command_and_unknown_commands_are_wrong_use(course):
    for words in [], ['paint'], ['style'], ['style', 'chelsea'], ['run']: assert course(*words)[0] == 2

def test_an_error_nobody_thought_of_is_one_line(course, monkeypatch):
    def broken(): raise TypeError('oops')
    monkeypatch.setattr(cli, 'findings', broken)
    code, _, err = course('doctor')
    assert code == 1 and err == 'course: TypeError: oops (this should not happen; COURSE_TRACEBACK=1 shows where)\n'
    monkeypatch.setenv('COURSE_TRACEBACK', '1')
    with pytest.raises(TypeError, match='oops'): cli.main(['doctor'])

def test_links_to_another_drive(tmp_path, monkeypatch):
    "Windows has no relative path from one drive to another."
    def no_way(path, start): raise ValueError("path is on mount 'C:', start on mount 'D:'")
    (tmp_path/'a.md').write_text('')
    monkeypatch.setattr(cli.os.path, 'relpath', no_way)
    assert cli.relink('[a](a.md#b)', tmp_path, tmp_path/'out', False) == f'[a]({(tmp_path/"a.md").as_uri()}#b)'

def test_a_relative_data_folder_means_the_same_in_the_lesson(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COURSE_DATA', 'mine')
    monkeypatch.setattr(cli, 'execute', lambda nb, folder, name, env: seen.append(env['COURSE_DATA']))
    seen = []
    assert cli.main(['run', '05', '--out', 'page']) == 0 and seen == [str(tmp_path/'mine')]
