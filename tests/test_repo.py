"The checks of tools/checks.py can fail: each is shown a small good project, then one with a fault."
import json, os, shutil, subprocess, sys

import pytest

import checks, readme, test as runner
from course_lib.core import code_hash

SETTINGS = '''[DEFAULT]
lib_name = tiny_lib
repo = tiny
user = tiny-owner
author = A
author_email = a@example.org
branch = main
description = d
version = 0.1
min_python = 3.11
lib_path = tiny_lib
nbs_path = nbs
doc_path = _docs
recursive = True
tst_flags = notest slow gpu net
git_url = https://example.org/%(user)s/%(repo)s
doc_host =
doc_baseurl =
requirements = alpha>=2
dev_requirements = beta==1.0
'''
PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


def code(src, *outputs): return dict(cell_type='code', source=src, outputs=list(outputs))
def prose(src): return dict(cell_type='markdown', source=src)
def shows(**data): return dict(output_type='display_data', metadata={}, data=data)
def result(said): return dict(output_type='execute_result', metadata={}, execution_count=None, data={'text/plain': said})

class Project:
    "A project of two lessons and an index, in the form that the checks want."
    def __init__(self, root):
        self.root, self.nbs = root, root/'nbs'
        self.nbs.mkdir()
        (root/'settings.ini').write_text(SETTINGS)
        (root/'pyproject.toml').write_text('[project]\nname="tiny_lib"\n')
        (root/'requirements-dev.lock').write_text('alpha==2.1 \\\n    --hash=sha256:00\nbeta==1.0 \\\n    --hash=sha256:00\n')
        self.write('index', [prose('# Tiny\n> An index.'), prose(readme.TABLE)])
        self.lesson('00_a', '#| exports\ndef one(): return 1')
        self.lesson('01_b', '#| export\nfrom tiny_lib.a import one', '#| exports\ndef two(): return 2*one()', 'assert two() == 2')
        self.finish()

    def write(self, name, cells):
        cells = [{**dict(id=f'c{i}', metadata={}), **c, 'source': c['source'].splitlines(True)} for i, c in enumerate(cells)]
        for c in cells:
            if c['cell_type'] == 'code': c.setdefault('execution_count', None)
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (self.nbs/f'{name}.ipynb').write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')

    def lesson(self, name, *cells, stamp=None):
        "A lesson of these cells with a stamp that fits, or the output `stamp`."
        cells = [code(f"#| default_exp {name.partition('_')[2]}\nfrom course_lib.core import stamp"), prose(f'# {name}\n> What it is.'),
                 *(code(c) if isinstance(c, str) else c for c in cells)]
        last = f"stamp('{name}')"
        self.write(name, [*cells, code(last)])
        made = code_hash(self.nbs/f'{name}.ipynb')
        self.write(name, [*cells, code(last, result(stamp or f'laptop scale · 1 s · cpu · code {made}'))])

    def finish(self):
        "Export, and make README and table anew."
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
        subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=self.root, env=env, check=True)
        self.refresh()

    def refresh(self):
        nb = readme.index(self.nbs)
        (self.nbs/'index.ipynb').write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n')
        (self.root/'README.md').write_text(readme.markdown(nb))

    def edit(self, file, old, new):
        path = self.root/file
        said = path.read_text()
        assert old in said
        path.write_text(said.replace(old, new))

@pytest.fixture(scope='session')
def good(tmp_path_factory): return Project(tmp_path_factory.mktemp('tiny'))

@pytest.fixture
def tiny(good, tmp_path):
    "A copy of the good project, to spoil."
    p = object.__new__(Project)
    p.root, p.nbs = tmp_path/'tiny', tmp_path/'tiny/nbs'
    shutil.copytree(good.root, p.root)
    return p


@pytest.mark.parametrize('name', checks.CHECKS)
def test_a_good_project_passes(good, name):
    assert checks.CHECKS[name](good.root) == []


def spoilt(*changes):
    "Run a test once for each of these faults, all changes of the tiny project."
    return pytest.mark.parametrize('change', changes, ids=lambda f: f.__name__)

def edited_module(p): p.edit('tiny_lib/a.py', 'return 1', 'return 3')
def module_by_hand(p): (p.root/'tiny_lib/extra.py').write_text('x = 1\n')
def module_missing(p): (p.root/'tiny_lib/b.py').unlink()
def renamed_project(p): p.edit('pyproject.toml', 'tiny_lib', 'other')
@spoilt(edited_module, module_by_hand, module_missing, renamed_project)
def test_exports(tiny, change): change(tiny); assert 'nbdev_export' in checks.exports(tiny.root)[0]

def counted(p): p.edit('nbs/00_a.ipynb', '"execution_count": null', '"execution_count": 7')
def with_metadata(p): p.edit('nbs/01_b.ipynb', '"metadata": {}', '"metadata": {"scrolled": true}')
@spoilt(counted, with_metadata)
def test_clean(tiny, change): change(tiny); assert 'nbdev_clean' in checks.clean(tiny.root)[0]

def readme_by_hand(p): p.edit('README.md', 'An index', 'An edited index')
def new_lesson(p): p.lesson('02_c', 'x = 1')
def new_title(p): p.edit('nbs/00_a.ipynb', 'What it is', 'What it became')
@spoilt(readme_by_hand, new_lesson, new_title)
def test_readme(tiny, change):
    change(tiny)
    assert checks.readme(tiny.root)
    tiny.refresh()
    assert checks.readme(tiny.root) == []

@pytest.mark.parametrize('src, complaint', [
    ('from tiny_lib.b import two', 'imports b'),
    ('def f():\n    import tiny_lib.b as b\n    return b', 'imports b'),
    ('class A:\n    def f(self):\n        from tiny_lib import b', 'imports b'),
    ('from .b import two', 'imports b'),
    ('from . import b', 'imports b'),
    ('try: from tiny_lib.b import two\nexcept ImportError: pass', 'imports b'),
    ("import importlib\nimportlib.import_module('tiny_lib.b')", 'imports b'),
    ('from tiny_lib.a import one', 'imports a'),          # a lesson's own module
    ('from tiny_lib.nowhere import x', 'imports nowhere'),
    ('from os.path import *', 'star'),
    ('#| export b\nx = 1', 'exports to b'),
    ('x = (', 'cell 2'),
])
def test_layers(tiny, src, complaint):
    tiny.lesson('00_a', src)
    assert any(complaint in o for o in checks.layers(tiny.root))

def test_layers_of_modules_too(tiny):
    tiny.edit('tiny_lib/a.py', 'def one(): return 1', 'def one():\n    from .b import two\n    return 1')
    assert 'a.py' in checks.layers(tiny.root)[0]

@pytest.mark.parametrize('src', ['def f(): return nowhere', "__all__ = ['nowhere']", 'def f():\n    x += 1', '#| gpu\n# needs one\nnowhere()'])
def test_undefined(tiny, src):
    tiny.lesson('00_a', src)
    assert '00_a.ipynb' in checks.undefined(tiny.root)[0]

def test_undefined_in_a_module(tiny):
    tiny.edit('tiny_lib/b.py', 'from .a import one', '')
    assert any(o.startswith('b.py') and 'one' in o for o in checks.undefined(tiny.root))

@pytest.mark.parametrize('line', ['import nowhere', "print('hello')", "import warnings; warnings.warn('old')"])
def test_fresh_imports(tiny, line):
    with (tiny.root/'tiny_lib/a.py').open('a') as f: f.write(f'\n{line}\n')
    assert checks.fresh_imports(tiny.root)

def changed_code(p): p.edit('nbs/01_b.ipynb', 'two() == 2', 'two() == 2 or None')
def no_stored_stamp(p): p.lesson('00_a', 'x = 1', stamp='nothing')
def stamp_of_tests(p): p.edit('nbs/00_a.ipynb', 'laptop scale', 'ci scale')
def foreign_stamp(p): p.edit('nbs/00_a.ipynb', "stamp('00_a')", "stamp('01_b')")
def no_stamp(p): p.write('00_a', [code('x = 1')])
def only_prose(p): p.write('00_a', [prose('# A')])
@spoilt(changed_code, no_stored_stamp, stamp_of_tests, foreign_stamp, no_stamp, only_prose)
def test_stamps(tiny, change): change(tiny); assert len(checks.stamps(tiny.root)) == 1

def test_a_stamp_minds_code_not_prose(tiny):
    tiny.edit('nbs/01_b.ipynb', 'What it is', 'What it is, in better words')
    assert checks.stamps(tiny.root) == []

@pytest.mark.parametrize('src', ['#| gpu\nx = 1', '#| notest\n# because\nx = 1', '#| eval: false\nx = 1',
                                 '#| slow\n#| fig-alt: a\nx = 1', '#| hide\n#| net\nx = 1'])
def test_skips(tiny, src):
    tiny.lesson('00_a', src)
    assert 'cell 2' in checks.skips(tiny.root)[0]

@pytest.mark.parametrize('src', ['#| gpu\n# bf16 needs a GPU\nx = 1', '#| slow trains for an hour\nx = 1', '#| eval: false\ndef f(x): ...'])
def test_skips_with_a_reason(tiny, src):
    tiny.lesson('00_a', src)
    assert checks.skips(tiny.root) == [] and len(checks.skipped_cells(tiny.root)) == 1

def test_whole_notebooks_are_not_skipped(tiny):
    tiny.edit('nbs/00_a.ipynb', 'What it is.', 'What it is.\\n\\n---\\nskip_exec: true\\n---')
    (tiny.nbs/'.notest').touch()
    assert len(checks.skips(tiny.root)) == 2

@pytest.mark.parametrize('cell, complaint', [
    (code('x', shows(**{'image/png': PIXEL})), 'alt text'),
    (code('#| fig-alt:\nx', shows(**{'image/png': PIXEL})), 'alt text'),
    (prose('![](../assets/a.png)'), 'alt text'),
    (code('x', shows(**{'text/html': '<b>x</b>'})), 'text/html'),
    (code('x', shows(**{'application/vnd.jupyter.widget-view+json': {'model_id': '0'}})), 'widget-view'),
    (code('x', dict(output_type='stream', name='stderr', text='a.py:1: UserWarning: old')), 'warning'),
    (code('x', result("PosixPath('/home/me/x')")), 'path'),
    (code('x', result(r'C:\Users\me')), 'path'),
    (code('x', dict(output_type='error', ename='E', evalue='', traceback=['E'])), 'traceback'),
    (code('x', result('0'*2**20)), 'MB'),
])
def test_pages(tiny, cell, complaint):
    tiny.lesson('00_a', cell)
    assert [complaint in o for o in checks.pages(tiny.root)] == [True]

def test_widget_state(tiny):
    nb = json.loads((tiny.nbs/'00_a.ipynb').read_text())
    nb['metadata']['widgets'] = {}
    (tiny.nbs/'00_a.ipynb').write_text(json.dumps(nb))
    assert 'widget state' in checks.pages(tiny.root)[0]

def test_a_picture_with_alt_text_is_fine(tiny):
    tiny.lesson('00_a', code('#| fig-alt: One red pixel.\nx', shows(**{'image/png': PIXEL})), prose('![a pixel](../README.md)'))
    assert checks.pages(tiny.root) == []

@pytest.mark.parametrize('link', ['[x](02_none.ipynb)', '![x](../assets/none.png)', '[x](sub/none.md#part)'])
def test_links(tiny, link):
    tiny.lesson('00_a', prose(link))
    assert 'not there' in checks.links(tiny.root)[0]

def unlocked(p): p.edit('settings.ini', 'alpha>=2', 'alpha>=2 gamma')
def too_old(p): p.edit('settings.ini', 'alpha>=2', 'alpha>=3')
def other_pin(p): p.edit('requirements-dev.lock', 'beta==1.0', 'beta==1.1')
@spoilt(unlocked, too_old, other_pin)
def test_lock(tiny, change): change(tiny); assert 'CONTRIBUTING' in checks.lock(tiny.root)[0]

def test_owner(tiny):
    (tiny.root/'CONTRIBUTING.md').write_text('See https://example.org/tiny-owner/tiny')
    assert checks.owner(tiny.root)


# --- the notebook runner

def test_runner_passes_and_names_failures(tiny, capfd):
    tiny.lesson('00_a', 'assert 1 == 2')
    tiny.lesson('01_b', 'import os', 'assert os.environ["IN_TEST"]', '#| gpu\n# not here\n1/0', '#| eval: false\n1/0')
    assert runner.run_notebooks(root=tiny.root) == ['00_a.ipynb']
    said = capfd.readouterr().out
    assert 'ok     01_b.ipynb' in said and 'assert 1 == 2' in said

def test_runner_stops_and_names_a_hanging_notebook(tiny, capfd):
    tiny.write('00_a', [code('import subprocess, time'), code('child = subprocess.Popen(["sleep", "1000"])'), code('while True: time.sleep(.1)')])
    tiny.write('01_b', [code('x = 1')])
    assert runner.run_notebooks(root=tiny.root, limit=10) == ['00_a.ipynb']
    said = capfd.readouterr().out
    assert 'FAILED 00_a.ipynb' in said and 'still running after 10 s' in said and 'time.sleep(.1)' in said

def test_the_template_is_a_lesson_that_runs(tiny, root):
    shutil.copy(root/'nbs/_template.ipynb', tiny.nbs/'98_template.ipynb')
    tiny.edit('nbs/98_template.ipynb', "stamp('_template')", "stamp('98_template')")
    assert runner.run_notebooks(['98_template'], root=tiny.root) == []
