"""Tables and times: what a notebook cannot test without touching the tables that the project keeps."""
import json, os, signal, subprocess, sys, time

import pytest

from course_lib import results

KEYS = ['name', 'question', 'what', 'rows', 'scale', 'seconds', 'machine', 'commit', 'date']

def test_kept_tables_have_the_one_form(root):
    for path in sorted((root/'assets/results').glob('*.json')):
        table = json.loads(path.read_text(encoding='utf-8'))
        assert list(table) == KEYS and table['name'] == path.stem and table['scale'] in ('laptop', 'full'), path.name
        results.check_rows(table['rows'])
        assert table['what'] and not table['what'].endswith('.') and results.Results(table)._repr_markdown_()

@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'assets_path', lambda *parts: (tmp_path/'assets').joinpath(*parts))
    monkeypatch.setenv('COURSE_OUT', str(tmp_path/'out'))
    def save(scale, value):
        monkeypatch.setenv('COURSE_SCALE', scale)
        return results.save_results('t', [dict(a=value)], what='a test').relative_to(tmp_path).parts[0]
    return save

def test_a_larger_scale_is_never_overwritten(kept):
    assert [kept('ci', 1), kept('laptop', 2), kept('ci', 3), kept('full', 4), kept('laptop', 5), kept('full', 6)] == ['out', 'assets', 'out', 'assets', 'out', 'assets']
    assert results.load_results('t')['rows'] == [dict(a=6)]

def test_before_there_is_a_kept_table(kept):
    kept('ci', 1)
    assert results.show_results('t')['rows'] == [dict(a=1)]

def test_looking_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv('COURSE_OUT', raising=False)
    monkeypatch.chdir(tmp_path)
    results.load_results('tiny_ladder')
    assert not list(tmp_path.iterdir())

def test_the_commit_is_the_course_s(tmp_path, monkeypatch, root):
    here = results._commit()
    monkeypatch.chdir(tmp_path)
    assert results._commit() == here
    monkeypatch.setattr(results, 'assets_path', lambda *parts: tmp_path/'assets')   # installed without its repository
    assert results._commit() == 'unknown'

@pytest.mark.parametrize('name', ['', 'a/b', '../a', 'a.b', 'a b'])
def test_names(name, tmp_path):
    with pytest.raises(ValueError, match='letters'): results.save_results(name, [dict(a=1)], what='a test', folder=tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('rows, message', [
    ([], 'at least one row'), ([{'a': 1}, {'b': 1}], 'row 1 has the columns'), ([{'a': 1, 'b': 2}, {'b': 2, 'a': 1}], 'row 1 has the columns'),
    ([{'a': float('nan')}], "row 0, column 'a'"), ([{'a': [1, float('inf')]}], 'number 1 of 2 is inf'), ([{'a': []}], 'got none'), ([{'a': {}}], 'got dict')])
def test_rows_that_make_no_table(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message): results.save_results('t', rows, what='a test', folder=tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_killed_while_saving(tmp_path):
    code = f'''from course_lib.results import save_results
n = 0
while True:
    n += 1
    save_results('t', [dict(a=n, b='x' * 100_000)] * 20, what='a test', folder={str(tmp_path)!r})'''
    proc = subprocess.Popen([sys.executable, '-c', code])
    for _ in range(1200):
        if (tmp_path/'t.json').exists(): break
        time.sleep(.05)
    time.sleep(.3)
    proc.send_signal(signal.SIGKILL)
    proc.wait()
    assert len(results.load_results('t', tmp_path)['rows']) == 20

def test_turns_and_waiting(monkeypatch):
    said = []
    monkeypatch.setattr(results, '_sync', lambda: said.append('wait'))
    results.compare_times({n: lambda n=n: said.append(n) for n in 'abc'}, rounds=2, check=None)
    assert ''.join(o for o in said if o != 'wait') == 'abc' 'abc' 'cba'
    assert said[3:] == [o for n in 'abccba' for o in ('wait', n, 'wait')]

def test_check_may_raise():
    def check(a, b): assert a == b, 'not the same'
    with pytest.raises(AssertionError, match='not the same'): results.compare_times({'a': lambda: 1, 'b': lambda: 2}, check=check)
    assert results.compare_times({'a': lambda: 1, 'b': lambda: 1}, check=check).ratio('a') == 1

@pytest.mark.parametrize('fns, rounds', [({}, 7), ({'a': int}, 0)])
def test_nothing_to_time(fns, rounds):
    with pytest.raises(ValueError, match='a function and a round at least'): results.compare_times(fns, rounds=rounds, check=None)

def test_equal_repeats_have_no_spread():
    s = results.summarise([.7, .7, .7])
    assert (s.mean, s.sd) == (.7, 0) and str(s) == '0.7 (n=3)'
