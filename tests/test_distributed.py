"Several processes train as one would: equal weights, losses and metrics; killed, resumed, misused."
import os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from course_lib.averaging import SWACB
from course_lib.callbacks import CheckpointCB, MetricsCB, ProgressCB, RecorderCB, accuracy, load_state, lr_find
from course_lib.core import set_seed
from course_lib.data import DataLoaders, TensorLoader, get_dls
from course_lib.distributed import AccelerateCB, MultDL, check_precision, deal, launch
from course_lib.learner import CancelBatchException, Callback, Learner, MomentumCB, TrainCB, synth_dls
from course_lib.mixed_precision import MixedPrecision
from course_lib.schedules import TrainingPhase, fit_phases

from distributed_run import classifier, outcome
from killed import until

pytestmark = [pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks'), pytest.mark.timeout(120), pytest.mark.usefixtures('warm')]

@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch): monkeypatch.setenv('COURSE_DEVICE', 'cpu')

def fit(make_train=AccelerateCB, n_epochs=2, cbs=(), n_fits=1, **kw):
    learn = classifier([make_train(), MetricsCB(accuracy), RecorderCB(), *cbs], **kw)
    for _ in range(n_fits): learn.fit(n_epochs)
    return outcome(learn)

def same(found, wanted, eps=1e-6):
    assert found['weights'] == pytest.approx(wanted['weights'], abs=eps)
    assert found['losses'] == pytest.approx(wanted['losses'], abs=eps)
    assert [list(r) for r in found['rows']] == [list(r) for r in wanted['rows']]
    for f, w in zip(found['rows'], wanted['rows']): assert list(f.values()) == pytest.approx(list(w.values()), abs=eps)


# what gives the batches

def own_generator(train, valid, bs): return get_dls(train, valid, bs, generator=torch.Generator().manual_seed(5))
def tensors(train, valid, bs): return DataLoaders(TensorLoader(*train.tensors, bs=bs, shuffle=True), TensorLoader(*valid.tensors, bs=bs))
def lists(train, valid, bs): return DataLoaders(*(list(zip(*(t.split(bs) for t in ds.tensors))) for ds in (train, valid)))
def twice(train, valid, bs): return DataLoaders(MultDL(get_dls(train, valid, bs).train, 2), get_dls(train, valid, bs).valid)
def workers(train, valid, bs): return get_dls(train, valid, bs, num_workers=1)
def no_valid(train, valid, bs): return get_dls(train, None, bs)

@pytest.mark.parametrize('make_dls', [get_dls, own_generator, tensors, lists, twice, workers, no_valid], ids=lambda f: f.__name__)
def test_two_processes_equal_one(make_dls):
    wanted = fit(TrainCB, make_dls=make_dls)
    assert fit(AccelerateCB, make_dls=make_dls) == wanted   # one process: to the last bit
    first, second = launch(partial(fit, make_dls=make_dls))
    assert first['weights'] == second['weights'] and first['rows'] == second['rows']
    same(first, wanted)

@pytest.mark.parametrize('n_procs', [1, 3, 5])
def test_any_number_of_processes(n_procs): same(launch(fit, n_procs=n_procs)[-1], fit(TrainCB))

def test_a_second_fit():
    cb = AccelerateCB()
    learn = Learner(nn.Linear(1, 1), synth_dls(), cbs=[cb])
    learn.fit()
    prepared = cb.model
    learn.fit()
    assert cb.model is prepared and len(cb.acc._optimizers) == len(cb.acc._models) == 1   # nothing of the first fit is kept
    same(launch(partial(fit, n_fits=2))[0], fit(TrainCB, n_fits=2))

def test_order_is_the_main_process_s():
    "Though the processes' random numbers differ, each sample is seen once in each epoch."
    def seen():
        set_seed(int(os.environ['RANK']))
        train, seen = AccelerateCB(), []
        class SeenCB(Callback):
            def before_batch(self, learn): seen.extend(learn.batch[0].flatten().tolist())
        x = torch.arange(21.)[:, None]
        Learner(nn.Linear(1, 1), DataLoaders(DataLoader(list(zip(x, x)), 4, shuffle=True, drop_last=True), None), lr=1e-4, cbs=[train, SeenCB()]).fit()
        return seen
    seen = sum(launch(seen), [])
    assert len(seen) == len(set(seen)) == 20


# random numbers

def draws():
    drawn = []
    class DrawCB(Callback):
        def before_batch(self, learn): drawn.append(torch.rand(()).item())
    fit(cbs=[DrawCB()])
    return drawn

def test_processes_draw_their_own_numbers_and_the_same_each_time():
    first, second = launch(draws)
    assert len({*first, *second}) == len(first) + len(second)
    assert launch(draws) == [first, second]

def test_resume_with_dropout_is_exact(tmp_path):
    def run(name, n_epochs): return launch(partial(fit, n_epochs=n_epochs, drop=.5, cbs=[CheckpointCB(tmp_path/name)]))[0]
    run('a.safetensors', 1)
    assert run('a.safetensors', 3) == run('b.safetensors', 3)


# other ways to fit

def test_lr_find_in_two_processes():
    def find():
        learn = classifier([AccelerateCB()])
        before = [p.clone() for p in learn.model.parameters()]
        losses = lr_find(learn, max_batches=20).losses
        assert all(map(torch.equal, before, learn.model.parameters()))
        return losses
    first, second = launch(find)
    assert first == second and len(first) == 20

def phases(make_train, data_list=None):
    learn = classifier([make_train(), MetricsCB(accuracy), RecorderCB()], lr=0.)
    fit_phases(learn, [TrainingPhase(1, torch.optim.SGD, lr=.5), TrainingPhase(1.4, torch.optim.Adam, lr=.01)], data_list and data_list(learn))
    return outcome(learn)

def test_phases_bring_optimizers_of_their_own():
    wanted = phases(TrainCB)
    assert phases(AccelerateCB) == wanted
    for found in launch(partial(phases, AccelerateCB)): same(found, wanted)

def test_phases_with_data_of_their_own():
    def others(learn): return [classifier([], seed=4).dls, learn.dls]
    assert phases(AccelerateCB, others) == phases(TrainCB, others)
    with pytest.raises(RuntimeError, match='each process would train on all of them'): launch(partial(phases, AccelerateCB, others))

def test_batch_norm_is_measured_over_all_batches():
    def measured():
        set_seed(3)
        x = torch.randn(40, 4).double()
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        learn = Learner(net, tensors(*[torch.utils.data.TensorDataset(x, x[:, :1])] * 2, 8), lr=.1, cbs=[AccelerateCB(), swa := SWACB()])
        learn.fit(2)
        with swa.averaged(learn): return (net[0].running_mean - x.mean(0)).abs().max().item(), net[1].weight.tolist()
    (first, w1), (second, w2) = launch(measured)
    assert max(first, second) < 1e-6 and w1 == w2

def test_the_loss_scale_is_kept():
    cb, other = AccelerateCB(), AccelerateCB()
    assert cb.state_dict() is None   # as long as there is none, a checkpoint goes with `TrainCB` as well
    cb.acc.scaler, other.acc.scaler = (torch.amp.GradScaler('cpu', init_scale=scale) for scale in (8., 1024.))
    other.load_state_dict(cb.state_dict())
    assert other.acc.scaler.state_dict()['scale'] == 8

class CancelCB(Callback):
    def after_backward(self, learn):
        if learn.iter == 0: raise CancelBatchException()

def test_a_cancelled_batch_in_fp16(monkeypatch):
    "The scaler forgets that batch; else the next one could not be unscaled."
    cb = AccelerateCB()
    cb.acc.scaler = scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    monkeypatch.setattr(cb.acc, 'unscale_gradients', lambda opt: scaler.unscale_(opt.optimizer))   # as it does in fp16, for which there must be a GPU
    learn = Learner(nn.Linear(1, 1), synth_dls(), cbs=[cb, CancelCB()])
    learn.fit(2)
    with pytest.raises(ValueError, match='MomentumCB would replace what AccelerateCB does'): learn.fit(cbs=[MomentumCB()])

def test_who_else_touches_gradients():
    def mixed(): Learner(nn.Linear(1, 1), synth_dls(), cbs=[AccelerateCB(), MixedPrecision(torch.float32)]).fit()
    mixed()   # alone, it does no harm
    with pytest.raises(RuntimeError, match='MixedPrecision would replace what AccelerateCB does'): launch(mixed)
    with pytest.raises(ValueError, match='does not accumulate gradients'): AccelerateCB(gradient_accumulation_steps=4)

def test_validation_alone():
    def validate():
        learn = classifier([AccelerateCB(), MetricsCB(accuracy)])
        learn.fit(train=False)
        return learn.cbs[1].rows
    learn = classifier([TrainCB(), MetricsCB(accuracy)])
    learn.fit(train=False)
    for rows in launch(validate): assert rows[0]['loss'] == pytest.approx(learn.cbs[1].rows[0]['loss'], abs=1e-6)

def test_an_epoch_without_batches():
    def nothing():
        metrics = MetricsCB()
        Learner(nn.Linear(1, 1), DataLoaders([], None), cbs=[AccelerateCB(), metrics]).fit()
        return len(metrics.rows)
    assert launch(nothing) == [1, 1]

def test_bf16():
    def bf16():
        learn, inside = classifier([AccelerateCB(mixed_precision='bf16'), RecorderCB()]), []
        learn.model = learn.model.float()
        learn.dls = DataLoaders([(xb.float(), yb) for xb, yb in learn.dls.train], None)
        hook = learn.model[0].register_forward_hook(lambda m, i, out: inside.append(out.dtype))
        learn.fit(8)
        hook.remove()
        out = learn.model(torch.zeros(1, 4))   # after the fit the model is as it was
        losses = learn.cbs[1].records['loss']
        return {*map(str, inside)}, str(learn.preds.dtype), str(out.dtype), sum(losses[-5:]) < sum(losses[:5])
    assert launch(bf16) == [({'torch.bfloat16'}, 'torch.float32', 'torch.float32', True)] * 2


# launched from the command line

def environment(): return os.environ | dict(COURSE_DEVICE='cpu', ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHONPATH=str(Path(__file__).parent.parent))

TORCHRUN = ['torch.distributed.run', '--standalone', '--nproc_per_node', '2']
ACCELERATE = ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']

@pytest.fixture
def start(tmp_path):
    "start(launcher, pause) -> Popen of the script in two processes; all are killed at the end."
    running = []
    def go(launcher, pause=0.):
        command = [sys.executable, '-m', *launcher, Path(__file__).parent/'distributed_run.py', tmp_path/'run.safetensors', tmp_path/'result.safetensors', str(pause)]
        running.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True))
        return running[-1]
    yield go
    for p in running:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass   # all gone
        p.communicate()

def epochs_done(path): return load_state(path)['done'] if path.exists() else 0

def test_accelerate_launch(start, tmp_path):
    p = start(ACCELERATE)
    out, err = p.communicate(timeout=100)
    assert p.returncode == 0, err[-2000:]
    found = load_state(tmp_path/'result.safetensors')
    assert found.pop('n_procs') == 2
    same(found, fit(TrainCB, n_epochs=3))
    assert [line.split(':')[0] for line in out.splitlines() if line.startswith('epoch')] == [f'epoch {e}/3 {name}' for e in (1, 2, 3) for name in ('train', 'valid')]

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError: return False

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='/proc')
def test_a_killed_worker_ends_the_run_and_it_can_go_on(start, tmp_path):
    checkpoint = tmp_path/'run.safetensors'
    p = start(TORCHRUN, pause=.2)
    until(lambda: epochs_done(checkpoint) == 1, 100, p)
    pids = [int((tmp_path/f'result.{r}.pid').read_text()) for r in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    out, err = p.communicate(timeout=60)
    assert time.monotonic() - killed < 30 and p.returncode != 0
    assert f'Signal 9 (SIGKILL) received by PID {pids[1]}' in err
    assert not any(map(alive, pids)) and not (tmp_path/'result.safetensors').exists()
    assert epochs_done(checkpoint) in (1, 2)

    cbs = [TrainCB(), MetricsCB(accuracy), RecorderCB(), ProgressCB(), CheckpointCB(checkpoint)]   # without Accelerate, in one process
    learn = classifier(cbs)
    learn.fit(3)
    same(outcome(learn), fit(TrainCB, n_epochs=3))


def test_only_the_main_process_speaks(capfd):
    def speak():
        print('python', os.environ['RANK'], flush=True)
        os.system('echo system $RANK')
        time.sleep(.1)
    launch(speak)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ['python 0', 'system 0'] and err == ''


# what goes wrong, and how one hears of it

def test_killed_worker_of_launch(tmp_path):
    pids = tmp_path/'pids'
    class DieCB(Callback):
        def after_batch(self, learn):
            if learn.iter == 1: pids.with_suffix('.' + os.environ['RANK']).write_text(str(os.getpid()))
            if learn.iter == 2 and os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match='^process 0 of 2 was ended by SIGKILL, so the others were ended too$'): launch(partial(fit, cbs=[DieCB()]))
    for r in '01': assert not alive(int(pids.with_suffix(f'.{r}').read_text()))

def test_waiting_has_an_end():
    def late():
        train = AccelerateCB(timeout=2)
        if train.rank: time.sleep(60)
        train.acc.wait_for_everyone()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match='process 0 of 2 failed.*[Tt]imed out'): launch(late)
    assert time.monotonic() - start < 40

def fails(): raise KeyError('no such picture')

@pytest.mark.parametrize('fn,message', [
    (fails, "process [01] of 2 failed, so the others were ended: KeyError: 'no such picture'"),
    (partial(fit, bs=1), 'a batch of 1 is too small for 2 processes'),
    (partial(fit, bs=12), 'a batch of 1 is too small for 2 processes'),   # the last one of 37
    (partial(fit, bs=1, make_dls=lists), 'a batch of 1 is too small for 2 processes'),
    (partial(fit, partial(AccelerateCB, n_inp=3)), 'n_inp is 3, but the batch has only 2'),
    (partial(fit, partial(AccelerateCB, mixed_precision='fp16')), "the device is a CPU; take 'bf16'"),
], ids=['error', 'bs 1', 'last batch', 'lists', 'n_inp', 'fp16'])
def test_errors_in_processes(fn, message):
    with pytest.raises(RuntimeError, match=message): launch(fn)

@pytest.mark.parametrize('n_procs', [0, -2, 1.5, None, '2'])
def test_number_of_processes(n_procs):
    with pytest.raises(ValueError, match='launch needs at least one process; got n_procs='): launch(os.getpid, n_procs=n_procs)

@pytest.mark.parametrize('precision', ['fp8', 'half', None, 16])
def test_precisions(precision):
    with pytest.raises(ValueError, match="should be 'no', 'bf16' or 'fp16'"): check_precision(precision, torch.device('cuda'))

def test_a_second_callback_that_trains():
    with pytest.raises(ValueError, match='take TrainCB out of cbs'): Learner(nn.Linear(1, 1), synth_dls(), cbs=[AccelerateCB(), TrainCB()]).fit()

@pytest.mark.parametrize('k', [0, -1, 1.5, None])
def test_multdl_wants_a_number(k):
    with pytest.raises(ValueError, match='at least once; got k='): MultDL([], k)

def test_multdl_shows_its_generator():
    "So that a checkpoint keeps it, and a resumed run shuffles as the uninterrupted one."
    g = torch.Generator()
    assert MultDL(TensorLoader(torch.arange(4), generator=g)).generator is g and MultDL([]).generator is None

def test_deal_leaves_what_is_no_tensor():
    batch = dict(x=torch.arange(5), scale=torch.tensor(3.), name='five')
    dealt = deal(batch, 1, 2)
    assert dealt['x'].tolist() == [1, 3] and dealt['scale'] == 3 and dealt['name'] == 'five'


# --- signals

def fail(): raise ValueError('no')

def test_signals_are_as_before():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    launch(os.getpid)
    with pytest.raises(RuntimeError, match='no'): launch(fail)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before

NAP = """
import time
from course_lib.distributed import launch
def nap():
    print('napping', flush=True)
    time.sleep(100)
try: launch(nap)
except KeyboardInterrupt: print('interrupted')
"""

@pytest.mark.parametrize('how, code', [(signal.SIGINT, 0), (signal.SIGTERM, 128 + 15)])
def test_a_signal_ends_all(how, code):
    with subprocess.Popen([sys.executable, '-c', NAP], stdout=subprocess.PIPE, text=True, start_new_session=True) as p:
        assert p.stdout.readline() == 'napping\n'
        os.killpg(p.pid, how)
        said, _ = p.communicate(timeout=60)
    assert (p.returncode, said) == (code, 'interrupted\n' if how == signal.SIGINT else '')

def test_a_gpu_asked_for_by_number(monkeypatch):
    "Accelerate alone trains on the current GPU, so the one that was asked for has to be that."
    chosen = []
    monkeypatch.setenv('COURSE_DEVICE', 'cuda:1')
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr('course_lib.distributed.Accelerator', lambda **kw: chosen.append('Accelerator') or 1 / 0)   # here is no GPU to go on with
    with pytest.raises(ZeroDivisionError): AccelerateCB()
    assert chosen == [torch.device('cuda:1'), 'Accelerator']

def test_processes_that_accelerate_does_not_join(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')   # as on a Mac, where each would train by itself
    with pytest.raises(ValueError, match='2 processes were started, and Accelerate joins 1 on cpu'): AccelerateCB()
