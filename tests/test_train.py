"The entry point of all long runs: resumed, killed, in several processes, misused."
import json, os, re, signal, subprocess, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from course_lib import cli, train
from course_lib.callbacks import CheckpointCB, MetricsCB, ProgressCB, RecorderCB, TextView, load_state, save_state
from course_lib.distributed import AccelerateCB, launch
from course_lib.learner import Callback

from distributed_run import classifier
from killed import equal

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'), pytest.mark.timeout(120), pytest.mark.usefixtures('warm')]

def train_toy(path=None, n_epochs=3, lr=.5, bs=8, n_items=37, drop=0., mixed_precision='no', seed=3, cbs=()):
    "Two classes, float64, no batch norm."
    cbs = [AccelerateCB(mixed_precision=mixed_precision), MetricsCB(), RecorderCB(), ProgressCB(make_view=TextView), *cbs]
    learn = classifier([*cbs, CheckpointCB(path)] if path else cbs, bs, n_items=n_items, drop=drop, lr=lr, seed=seed)
    learn.fit(n_epochs)
    return learn

TOY = 'toy', train_toy, {'quick': {}, 'noisy': dict(drop=.5)}

if __name__ == '__main__':   # launched by a test below
    train.register(*TOY)
    sys.exit(train.main())

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Each test in an empty folder of its own, which has assets too, with a toy registered, without data."
    for k, v in dict(COURSE_DEVICE='cpu', COURSE_DATA=str(tmp_path/'data'), COURSE_SCALE='laptop').items(): monkeypatch.setenv(k, v)
    for k in 'COURSE_OUT', 'WORLD_SIZE', 'RANK': monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(train, 'TRAININGS', dict(train.TRAININGS))
    train.register(*TOY)
    def assets(*parts): return tmp_path.joinpath('repo/assets', *parts)
    for module in 'train', 'results': monkeypatch.setattr(f'course_lib.{module}.assets_path', assets)
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path

@pytest.fixture
def course(capfd):
    "Run a command in this process: exit code, stdout, stderr."
    def run(*words):
        capfd.readouterr()   # what was said before
        try: code = cli.main(['train', *map(str, words)])
        except SystemExit as e: code = e.code
        said = capfd.readouterr()
        assert 'Traceback' not in said.err + said.out
        return code, said.out, said.err
    return run

class DieCB(Callback):
    "Kill the process of rank 0 the hard way, in the second epoch."
    def before_batch(self, learn):
        if (learn.epoch, learn.training, learn.iter) == (1, True, 2) and os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)

class CtrlCCB(Callback):
    def before_batch(self, learn):
        if (learn.epoch, learn.iter) == (1, 2): raise KeyboardInterrupt

def toy(out, preset='quick', fresh=False, procs=None, cbs=(), **changes):
    "A run of the toy: what should not depend on how it was done."
    learn = train.train(train.plan('toy', preset, out, **changes), fresh, procs, cbs)
    return dict(weights=dict(learn.model.state_dict()), rows=learn.cbs[1].rows, losses=learn.cbs[2].records['loss'])

def test_a_training_that_comes_to_no_number_says_so(course):
    code, _, err = course('toy', 'lr=1e300', 'n_epochs=5', '--out', 'a')
    assert code == 1 and 'the training came to no number: train loss, valid loss; begin anew with --fresh and a smaller lr' in err
    assert course('toy', 'lr=.1', '--out', 'a', '--fresh')[0] == 0

def row_of(out, table='train_toy_quick'): return json.loads(Path(out, f'{table}.json').read_text())['rows'][0]

def near(a, b, eps=1e-5):
    assert a['losses'] == pytest.approx(b['losses'], abs=eps) and len(a['rows']) == len(b['rows'])
    for x, y in zip(a['rows'], b['rows']): assert x == pytest.approx(y, abs=eps)
    for k in a['weights']: assert torch.allclose(a['weights'][k], b['weights'][k], atol=eps)


# --- one run

def test_a_run_is_the_function(course):
    assert equal(toy('a'), toy('b', fresh=True))
    by_hand = train_toy()
    assert equal(dict(by_hand.model.state_dict()), load_state('a/checkpoint.safetensors')['model'])
    assert sorted(os.listdir('a')) == ['checkpoint.safetensors', 'train_toy_quick.json']

def test_the_table():
    toy('a', lr='0.25')
    whole = json.loads(Path('a/train_toy_quick.json').read_text())
    row, = whole['rows']
    assert {k: row[k] for k in ('preset', 'n_epochs', 'lr', 'bs', 'drop', 'processes')} == dict(preset='quick', n_epochs=3, lr=.25, bs=8, drop=0., processes='1')
    last = load_state('a/checkpoint.safetensors')
    rows = dict(last['cbs'])['MetricsCB']['rows'][-2:]
    assert [row['train loss'], row['valid loss']] == [r['loss'] for r in rows] and rows[0]['epoch'] == 2
    assert whole['machine']['device'] == 'cpu' and whole['what'] == 'Two classes, float64, no batch norm: 114 parameters; data: made on the spot'

def test_only_a_plain_preset_gets_into_assets(course, elsewhere):
    repo = elsewhere/'repo'
    assert course('toy')[0] == 0   # no repository: installed
    assert row_of('out/train_toy_quick')['lr'] == .5 and not repo.exists()
    repo.mkdir()
    (repo/'settings.ini').touch()
    assert course('toy', '--out', 'a')[0] == course('toy', 'lr=.1', '--fresh')[0] == 0 and not (repo/'assets').exists()
    code, out, _ = course('toy', '--fresh', '--preset', 'noisy')
    assert code == 0 and os.listdir(repo/'assets/results') == ['train_toy_noisy.json'] and 'files in out/train_toy_noisy' in out

def test_what_is_said(course):
    code, out, err = course('toy', '--out', 'a', 'n_epochs=2')
    lines = out.splitlines()
    assert code == 0 and err == '' and lines[0].startswith('toy, preset quick with changes: n_epochs=2, lr=0.5') and lines[1] == '1 process on cpu; files in a' and lines[2] == 'begins'
    assert [line.split(':')[0] for line in lines[3:]] == [f'epoch {e}/2 {p}' for e in (1, 2) for p in ('train', 'valid')]


# --- stopped, killed, gone on

def test_stopped_and_gone_on(course, monkeypatch):
    whole = toy('whole', 'noisy')
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train', partial(train.train, cbs=[CtrlCCB()]))
        code, out, err = course('toy', '--preset', 'noisy', '--out', 'a')
    assert (code, err) == (130, 'course: stopped\n') and os.listdir('a') == ['checkpoint.safetensors']
    code, out, err = course('toy', '--preset', 'noisy', '--out', 'a')
    assert code == 0 and [line.split(':')[0] for line in out.splitlines()[2:5]] == ['goes on after epoch 1 of 3', 'epoch 2/3 train', 'epoch 2/3 valid']
    assert equal(toy('a', 'noisy'), whole)   # loads what is there

@pytest.mark.parametrize('n_procs', [1, 2])
def test_killed_and_gone_on_bit_for_bit(n_procs):
    run = partial(launch, n_procs=n_procs)
    whole = run(partial(toy, 'whole', 'noisy'))[0]
    with pytest.raises(RuntimeError, match=f'process 0 of {n_procs} was ended by SIGKILL'): run(partial(toy, 'a', 'noisy', cbs=[DieCB()]))
    assert load_state('a/checkpoint.safetensors')['done'] == 1 and os.listdir('a') == ['checkpoint.safetensors']
    assert equal(run(partial(toy, 'a', 'noisy'))[0], whole)
    found, wanted = row_of('a', 'train_toy_noisy'), row_of('whole', 'train_toy_noisy')
    assert found == wanted and found['processes'] == str(n_procs)

def test_seconds_add_up(monkeypatch):
    clock = [100.]
    monkeypatch.setattr(train.time, 'perf_counter', lambda: clock[0])
    class TickCB(Callback):
        def after_epoch(self, learn): clock[0] += 10 * learn.training
    with pytest.raises(KeyboardInterrupt): toy('a', cbs=[TickCB(), CtrlCCB()])
    clock[0] += 1000
    toy('a', cbs=[TickCB()])
    assert json.loads(Path('a/train_toy_quick.json').read_text())['seconds'] == 30

def test_a_finished_run_changes_nothing(course):
    toy('a')
    before = {p.name: p.read_bytes() for p in Path('a').iterdir()}
    code, out, _ = course('toy', '--out', 'a')
    assert code == 0 and out.splitlines()[2:] == ['all 3 epochs are done; --fresh starts anew'] and {p.name: p.read_bytes() for p in Path('a').iterdir()} == before
    Path('a/train_toy_quick.json').unlink()   # killed between the checkpoint and the table
    assert course('toy', '--out', 'a')[0] == 0
    old = json.loads(before['train_toy_quick.json'])
    assert row_of('a') == old['rows'][0]

def test_fresh(course):
    toy('a', lr=.1)
    code, out, _ = course('toy', '--out', 'a', '--fresh')
    assert code == 0 and 'begins' in out and row_of('a')['lr'] == .5 and equal(toy('a'), toy('b'))


# --- several processes

@pytest.mark.parametrize('n_procs', [2, 3, 5])
def test_several_processes_equal_one(n_procs):
    alone, all_ = toy('one'), launch(partial(toy, 'many'), n_procs=n_procs)
    for found in all_: near(found, alone)
    assert row_of('many')['processes'] == str(n_procs)
    assert row_of('many')['valid loss'] == pytest.approx(row_of('one')['valid loss'], abs=1e-5)

def test_another_number_of_processes(course):
    def begin():
        try: toy('a', cbs=[CtrlCCB()])
        except KeyboardInterrupt: return 'stopped'
    assert launch(begin, n_procs=2) == ['stopped'] * 2
    code, out, _ = course('toy', '--out', 'a')
    assert code == 0 and 'goes on after epoch 1 of 3' in out
    near(toy('a'), toy('one'))
    assert row_of('a')['processes'] == '2, then 1'

def test_only_the_main_process_writes(monkeypatch, elsewhere):
    (elsewhere/'repo').mkdir()
    (elsewhere/'repo/settings.ini').touch()
    save, log = train.save_results, elsewhere/'log'
    def logged(name, rows, **kw):
        path = save(name, rows, **kw)
        with log.open('a') as f: f.write(f"{os.environ['RANK']} {path.relative_to(elsewhere) if path.is_absolute() else path}\n")
    monkeypatch.setattr(train, 'save_results', logged)
    launch(partial(toy, None))
    assert log.read_text().splitlines() == ['0 repo/assets/results/train_toy_quick.json', '0 out/train_toy_quick/train_toy_quick.json']

def test_a_setting_that_the_checkpoint_does_not_know():
    toy('a', n_epochs=1)
    run = train.plan('toy', out='a', n_epochs=1)
    assert train.epochs_done(run) == 1
    with pytest.raises(ValueError, match=r'\(width=unknown there, width=None here\)'): train.epochs_done(replace(run, settings=run.settings | dict(width=None)))

def test_the_source_is_found_inside():
    class Held:
        def __init__(self, **kw): vars(self).update(kw)
    clothes = Held(source='clothes, by hand')
    for what in clothes, Held(dataset=clothes), Held(ds=Held(dataset=clothes)), Held(dl=Held(dataset=clothes)): assert train.source_of(what) == 'clothes, by hand'
    assert train.source_of(Held()) == train.source_of(iter(())) == 'made on the spot'

def test_processes_that_see_different_folders():
    toy('0', n_epochs=1)
    def apart(): return toy(os.environ['RANK'], n_epochs=1)
    with pytest.raises(RuntimeError, match=r'different checkpoints, after \[1, 0\] epochs: --out must be a folder that all see'): launch(apart)

def test_fewer_processes_than_asked_for(course, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '1')   # a launcher that started one
    code, out, err = course('toy', '--procs', 2, '--out', 'a')
    assert code == 1 and err == 'course: --procs 2: but the number of processes here is 1\n' and out == '' and not Path('a').exists()

def test_procs_starts_them(course, monkeypatch):
    def forked(*args, start, **kw):
        assert start == 'spawn'
        return launch(*args, **kw)
    monkeypatch.setattr(train, 'launch', forked)
    code, out, err = course('toy', '--procs', 2, '--out', 'a')
    assert code == 0 and row_of('a')['processes'] == '2' and err == ''
    monkeypatch.setattr(train, 'train', partial(train.train, cbs=[DieCB()]))
    code, out, err = course('toy', '--procs', 2, '--out', 'b')
    assert code == 1 and err == 'course: process 0 of 2 was ended by SIGKILL, so the others were ended too\n'

@pytest.mark.timeout(300)   # starts Python twice, which takes ten seconds of a processor each time
def test_procs_for_real(course):
    "Spawned: new Pythons, which know what the library registers."
    code, out, err = course('clothes', '--procs', 2, '--out', 'a', 'n_epochs=1', 'n_items=32', 'bs=16')
    assert code == 0, err
    assert '2 processes on cpu; files in a' in out.splitlines() and row_of('a', 'train_clothes_quick')['processes'] == '2'

ACCELERATE = ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']

@pytest.mark.timeout(300)
def test_accelerate_launch(root):
    env = os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHONPATH=os.pathsep.join([str(root), str(root/'tests')]))
    done = subprocess.run([sys.executable, '-m', *ACCELERATE, __file__, 'toy', '--procs', '2', '--out', 'a'], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[1:3] == ['2 processes on cpu; files in a', 'begins'] and len(lines) == 3 + 6   # one voice
    assert row_of('a')['processes'] == '2'
    near(toy('a'), toy('one'))   # what they left


# --- ddpm, and the module as a program

SMALL = 'n_epochs=1', 'bs=8', 'n_items=16', 'nfs=(4,8)', 'n_blocks=1', 'mixed_precision=no'

def test_ddpm(course):
    code, out, err = course('ddpm', '--out', 'a', *SMALL)
    assert code == 0 and err == '', err
    whole = json.loads(Path('a/train_ddpm_quick.json').read_text())
    assert whole['rows'][0]['nfs'] == '(4, 8)' and 'silhouettes drawn by micro_fashion' in whole['what'] and 0 < whole['rows'][0]['valid loss'] < 1.5

def test_tiny(course, monkeypatch, tmp_path):
    monkeypatch.setenv('COURSE_DATA', str(tmp_path/'nothing'))
    code, out, err = course('tiny', '--out', 'a', 'width=3', 'n_epochs=1', 'n_items=40', 'bs=20', 'mixed_precision=no')
    assert code == 0 and err == '', err
    whole = json.loads(Path('a/train_tiny_vgg.json').read_text())
    assert 'figures drawn by write_micro' in whole['what'] and 0 <= whole['rows'][0]['valid top1'] <= 1

@pytest.mark.parametrize('device, dtype, wanted', [('cpu', torch.bfloat16, 'bf16'), ('cpu', torch.float32, 'no'), ('mps', torch.float16, 'no')])
def test_auto_is_written_out(monkeypatch, device, dtype, wanted):
    monkeypatch.setattr(train, 'default_device', lambda: torch.device(device))
    monkeypatch.setattr(train, 'fast_dtype', lambda device: dtype)
    assert train.plan('ddpm').settings['mixed_precision'] == wanted

def test_auto_is_fp16_on_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(train, 'default_device', lambda: torch.device('cuda'))
    monkeypatch.setattr('course_lib.core.torch.cuda.is_bf16_supported', lambda including_emulation: False)
    assert train.settings_of('ddpm', None, {})[1]['mixed_precision'] == 'fp16'

def test_presets_of_the_course():
    "The reference's settings, lesson 20."
    kept = {preset: train.plan('ddpm', preset).settings for preset in train.TRAININGS['ddpm'].presets}
    assert [kept['reference'][k] for k in ('n_epochs', 'bs', 'lr', 'n_blocks')] == [5, 128, 5e-3, 2]
    assert [kept['large-batch'][k] for k in ('n_epochs', 'bs', 'lr', 'n_blocks')] == [8, 512, 1e-2, 2]
    assert next(iter(kept)) == 'quick' and kept['quick']['n_epochs'] == 1

def test_the_module_as_a_program(capsys, monkeypatch):
    for words, code, said in (['toy', 'lr=fast'], 1, "train: lr must be a number, as 0.5; got 'fast'\n"), ([], 0, ''), (['toy', '--out', 'a'], 0, ''):
        monkeypatch.setattr(sys, 'argv', ['train.py', *words])
        assert train.main() == code and capsys.readouterr().err == said
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(sys, 'argv', ['train.py', 'toys'])
    assert train.main() == 1 and capsys.readouterr().err.startswith("train, process 1: there is no training 'toys'; did you mean toy?")
    monkeypatch.setenv('COURSE_TRACEBACK', '1')
    with pytest.raises(ValueError): train.main()


# --- the list, and what is refused

def test_the_list(course):
    code, out, err = course()
    assert code == 0 and err == ''
    assert out.startswith('ddpm: A U-Net') and 'clothes: Learn' in out and re.search(r'preset +n_epochs +bs +lr +n_blocks\n +quick +1 +64 +0.005 +1\n', out)
    assert re.search(r'preset  drop\n +quick   0.0\n +noisy   0.5\n', out)

@pytest.mark.parametrize('words, code, why', [
    (['toi'], 1, "there is no training 'toi'; did you mean toy? There are: ddpm, clothes, tiny, toy"),
    (['xyz'], 1, "there is no training 'xyz'. There are: ddpm, clothes, tiny, toy"),
    (['toy', '--preset', 'noise'], 1, "there is no preset of toy 'noise'; did you mean noisy?"),
    (['toy', 'epochs=3'], 1, "there is no setting of toy 'epochs'; did you mean n_epochs?"),
    (['toy', 'path=x'], 1, "there is no setting of toy 'path'"),
    (['toy', 'cbs=[]'], 1, "there is no setting of toy 'cbs'"),
    (['toy', 'lr'], 1, "a setting looks like lr=0.01, an option like --preset quick; got 'lr'"),
    (['toy', 'preset=noisy'], 1, "an option like --preset quick; got 'preset=noisy'"),
    (['toy', 'lr=.1', 'out=a'], 1, "an option like --preset quick; got 'out=a'"),
    (['toy', 'lr='], 1, "lr must be a number, as 0.5; got ''"),
    (['toy', 'lr=nan'], 1, 'lr must be a number'),
    (['toy', 'lr=1e999'], 1, 'lr must be a number'),
    (['toy', 'lr=__import__("os")'], 1, 'lr must be a number'),
    (['toy', 'bs=2.5'], 1, 'bs must be a whole number, as 8; got 2.5'),
    (['toy', 'n_epochs=0'], 1, 'n_epochs must be at least 1; got 0'),
    (['toy', 'bs=-8'], 1, 'bs must be at least 1; got -8'),
    (['toy', 'mixed_precision=fp16'], 1, "fp16 on a GPU only, and the device is a CPU; take 'bf16'"),
    (['toy', 'mixed_precision=half'], 1, "'bf16' or 'fp16'; got 'half'"),
    (['toy', '--procs', '0'], 1, 'at least one process; got n_procs=0'),
    (['toy', '--procs', '-2'], 1, 'at least one process; got n_procs=-2'),
    (['toy', '--procs', 'many'], 2, "argument --procs: invalid int value: 'many'"),
    (['toy', '--procs', '2', 'bs=1'], 1, 'a batch of 1 is too small for 2 processes'),
    (['toy', '--presets', 'quick'], 2, 'unrecognized arguments'),
    (['clothes', '--preset'], 2, 'expected one argument'),
])
def test_refused(course, words, code, why):
    got, out, err = course(*words)
    assert got == code and why in err and out == '' and not [p for p in Path().rglob('*') if p.is_file()]

def test_other_settings_are_refused(course):
    toy('a')
    before = {p.name: p.read_bytes() for p in Path('a').iterdir()}
    for words in (['lr=0.1'], ['lr=0.1', '--procs', '2']):
        code, out, err = course('toy', '--out', 'a', *words)
        assert code == 1 and err == 'course: a/checkpoint.safetensors is of a run with other settings (lr=0.5 there, lr=0.1 here): --fresh starts anew, --out names another folder\n' and out == ''
    code, out, err = course('toy', '--out', 'a', '--preset', 'noisy', 'n_epochs=5')
    assert code == 1 and '(n_epochs=3 there, n_epochs=5 here; drop=0.0 there, drop=0.5 here)' in err
    assert course('clothes', '--out', 'a')[0] == 1
    assert {p.name: p.read_bytes() for p in Path('a').iterdir()} == before

def test_files_that_are_something_else(course):
    Path('file').touch()
    code, _, err = course('toy', '--out', 'file')
    assert code == 1 and err == 'course: --out names a folder; file is a file\n'
    Path('a').mkdir()
    Path('a/checkpoint.safetensors').write_bytes(b'junk')
    code, _, err = course('toy', '--out', 'a')
    assert code == 1 and 'checkpoint.safetensors is not a whole safetensors file' in err
    for state in dict(x=1), [1], dict(cbs=[('MetricsCB', {})], done=1):
        save_state(state, 'a/checkpoint.safetensors')
        code, _, err = course('toy', '--out', 'a')
        assert code == 1 and err == 'course: a/checkpoint.safetensors was not made by this command; --out names another folder\n'
    train_toy('b/checkpoint.safetensors', n_epochs=1)   # made by hand
    assert course('toy', '--out', 'b')[0] == 1

def test_more_processes_than_gpus(course, monkeypatch):
    monkeypatch.setattr(train, 'default_device', lambda: torch.device('cuda'))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    code, _, err = course('toy', '--procs', '2')
    assert code == 1 and '2 processes need 2 GPUs, and the number here is 1' in err

def no_cbs(path=None, n_epochs=1): pass
def no_default(lr, path=None, n_epochs=1, cbs=()): pass
def fine(path=None, n_epochs=1, lr=.1, cbs=()): pass

@pytest.mark.parametrize('fn, presets, why', [
    (no_cbs, {'quick': {}}, 'no_cbs must take cbs'),
    (no_default, {'quick': {}}, 'no_default: lr must have a default'),
    (fine, {}, 'needs at least one preset'),
    (fine, {'quick': dict(n_epoch=1)}, "no setting of new 'n_epoch'; did you mean n_epochs?"),
    (fine, {'quick': dict(path='x')}, "no setting of new 'path'"),
    (fine, {'quick': dict(lr='fast')}, 'lr must be a number'),
])
def test_what_cannot_be_registered(fn, presets, why):
    with pytest.raises(ValueError, match=re.escape(why)): train.register('new', fn, presets)
    assert 'new' not in train.TRAININGS
