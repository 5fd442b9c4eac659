"What runs before there is an environment: make, the installer script, packaging. Without network: installers are stood in for."
import os, shutil, subprocess, sys
from zipfile import ZipFile

import pytest

import environment

posix = pytest.mark.skipif(os.name == 'nt', reason='make and shell scripts')
FAKE_UV = '''#!/bin/sh
echo "$@" >> calls
case "$*" in
  "venv "*) mkdir -p .venv/bin && ln -sf "$(command -v python3)" .venv/bin/python;;
  *sync*) {sync};;
esac
'''

@pytest.fixture
def clone(root, tmp_path):
    "What setting up needs, in a folder with a space in its name, with a stand-in for uv first on the path."
    folder = tmp_path/'a clone'
    for name in ['Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'requirements-dev.lock', 'tools/environment.py']:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, folder/name)
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin/python3').symlink_to(sys.executable)
    return folder

def setup(folder, sync='true', target='env', **kw):
    "Run make there: exit code, all it said, and how often the installer was called."
    uv = folder.parent/'bin/uv'
    uv.write_text(FAKE_UV.format(sync=sync))
    uv.chmod(0o755)
    (folder/'calls').write_text('')
    env = dict(os.environ, PATH=f'{folder.parent}/bin:/usr/bin:/bin', **kw)
    done = subprocess.run(['make', target], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, len((folder/'calls').read_text().splitlines())

@posix
def test_the_environment_is_made_once(clone):
    code, said, calls = setup(clone)
    assert (code, calls) == (0, 3) and 'Making .venv' in said and 'ready' in said
    assert setup(clone)[::2] == (0, 0)                                    # nothing to do the second time
    (clone/'settings.ini').write_text((clone/'settings.ini').read_text() + '\n')
    assert setup(clone)[::2] == (0, 1)                                    # the project alone anew
    with (clone/'requirements-dev.lock').open('a') as f: f.write('\n')
    assert setup(clone)[::2] == (0, 3)                                    # another lock, another environment

@posix
def test_a_moved_environment_is_made_anew(clone):
    setup(clone)
    moved = clone.rename(clone.parent/'elsewhere')
    assert setup(moved)[::2] == (0, 3)

@posix
def test_an_interrupted_environment_is_not_taken_for_whole(clone):
    code, _, _ = setup(clone, sync='kill -9 $PPID')
    assert code and (clone/'.venv/bin/python').exists()
    code, said, calls = setup(clone)
    assert (code, calls) == (0, 3) and 'ready' in said

@posix
@pytest.mark.parametrize('error, sentence', [
    ('error: Failed to fetch: https://pypi.org/simple/torch/', 'The package registry cannot be reached'),
    ('ERROR: No space left on device', 'The disk is full'),
    ('error: hash mismatch for torch', 'Installing failed: error: hash mismatch for torch'),
])
def test_a_failed_installation_says_why_in_one_sentence(clone, error, sentence):
    code, said, _ = setup(clone, sync=f'echo "{error}" >&2; exit 1')
    stopped = [o for o in said.splitlines() if o.startswith('Stopped: ')]
    assert code and len(stopped) == 1 and sentence in stopped[0] and 'Traceback' not in said
    assert setup(clone)[::2] == (0, 3)

@pytest.mark.parametrize('version, word', [((3, 10), 'old'), ((2, 7), 'old'), ((3, 14), 'new'), ((4, 0), 'new')])
def test_other_pythons_are_refused(version, word, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(environment.Failed, match=f'too {word}: this course needs 3.11 to 3.13'): environment.check_python(version)

@pytest.mark.parametrize('minor', [11, 12, 13])
def test_these_pythons_are_accepted(minor, root, monkeypatch):
    monkeypatch.chdir(root)
    environment.check_python((3, minor))

@posix
def test_docs_without_quarto(clone):
    code, said, calls = setup(clone, target='docs')
    assert code and calls == 0 and 'Stopped: the site is built by Quarto' in said

@posix
def test_clean_keeps_lessons_and_environment(root, tmp_path):
    folder = tmp_path/'a clone'
    made = ['_docs/x', '_proc/x', 'out/x', 'nbs/out/x', 'build/x', 'a.egg-info/x',
            'nbs/sidebar.yml', 'nbs/.ipynb_checkpoints/x', 'tools/__pycache__/x']
    kept = ['nbs/00_a.ipynb', 'out/train_a/checkpoint', '.venv/bin/python', 'course_lib/a.py', 'tests/a.py', 'assets/a.png']
    for name in made + kept:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    shutil.copy(root/'Makefile', folder)
    subprocess.run(['make', 'clean'], cwd=folder, check=True, capture_output=True)
    assert [n for n in made + kept if (folder/n).exists()] == kept

def test_a_wheel_brings_its_assets(root, tmp_path):
    src = tmp_path/'src'
    src.mkdir()
    for name in 'setup.py', 'pyproject.toml', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE': shutil.copy(root/name, src)
    shutil.copytree(root/'course_lib', src/'course_lib')
    (src/'assets/pictures').mkdir(parents=True, exist_ok=True)
    (src/'assets/pictures/probe.txt').write_text('here')
    def python(*args, **kw): return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kw)
    done = python('-c', f'from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})', cwd=src)
    assert done.returncode == 0, done.stderr
    with ZipFile(next(tmp_path.glob('*.whl'))) as z: z.extractall(tmp_path/'site')
    probe = "import course_lib.core as c; print(c.__file__, c.assets_path('pictures', 'probe.txt').read_text())"
    done = python('-S', '-c', f'import sys; sys.path[:0] = [{str(tmp_path/"site")!r}, *{sys.path!r}]; {probe}', cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path/'site/course_lib/core.py'), 'here'], done.stderr
    meta = next((tmp_path/'site').glob('*.dist-info/METADATA')).read_text()
    assert 'Requires-Python: >=3.11,<3.14' in meta and 'Requires-Dist: torch' in meta and 'nbdev==2.4.14; extra == "dev"' in meta

@posix
@pytest.mark.timeout(600)
def test_the_site_can_be_staged(root, tmp_path):
    "All of `make docs` but Quarto itself: nbdev imports the modules and writes the pages that Quarto would render."
    site, quarto = tmp_path/'a site', tmp_path/'bin/quarto'
    site.mkdir(), quarto.parent.mkdir()
    for name in 'settings.ini', 'pyproject.toml', '_quarto.yml': shutil.copy(root/name, site)
    for name in 'nbs', 'course_lib', 'assets', 'tools':
        shutil.copytree(root/name, site/name, ignore=shutil.ignore_patterns('out', '__pycache__', '.ipynb_checkpoints'))
    quarto.write_text(f'#!/bin/sh\n"{sys.executable}" ../tools/stage_assets.py && mkdir _docs && touch _docs/index.html\n')
    quarto.chmod(0o755)
    env = dict(os.environ, PATH=f"{quarto.parent}:{os.environ['PATH']}")
    done = subprocess.run([sys.executable, 'tools/docs.py'], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'The site is in _docs' in done.stdout, done.stdout + done.stderr
    pages = sorted(p.name for p in (site/'_proc').glob('*.ipynb'))
    assert pages == sorted(p.name for p in (site/'nbs').glob('[!_]*.ipynb'))
    assert not any('../assets/' in (site/'_proc'/p).read_text(encoding='utf-8') for p in pages)
    assert (site/'_proc/assets').is_dir() and (site/'_docs/index.html').exists()

def test_the_site_brings_its_assets(root, tmp_path):
    (tmp_path/'assets').mkdir()
    (tmp_path/'assets/a.txt').touch()
    for folder in 'nbs', '_proc':
        (tmp_path/folder).mkdir()
        (tmp_path/folder/'x.ipynb').write_text('![a](../assets/a.txt)')
        subprocess.run([sys.executable, root/'tools/stage_assets.py'], cwd=tmp_path/folder, check=True)
    assert (tmp_path/'nbs/x.ipynb').read_text() == '![a](../assets/a.txt)' and not (tmp_path/'nbs/assets').exists()
    assert (tmp_path/'_proc/x.ipynb').read_text() == '![a](assets/a.txt)' and (tmp_path/'_proc/assets/a.txt').exists()
