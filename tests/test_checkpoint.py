"A training that is killed goes on as if nothing had happened: to the last bit, in a process of its own each time."
import subprocess, sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from course_lib.callbacks import BatchSchedCB, CheckpointCB, load_state, save_state
from course_lib.core import set_seed
from course_lib.data import DataLoaders
from course_lib.learner import Callback, Learner, TrainCB, synth_dls

from killed import equal, kill_at, posix

RUN = '''
import torch
from functools import partial
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from course_lib.callbacks import BatchSchedCB, CheckpointCB, MetricsCB, ProgressCB, RecorderCB, accuracy, save_state
from course_lib.data import DataLoaders
from course_lib.learner import Learner, MomentumCB, TrainCB
from killed_run import SlowCB, checkpoint, result, x, y

model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.Flatten(), nn.Linear(144, 2))
train = DataLoader(TensorDataset(x[:160], y[:160]), batch_size=20, shuffle=True)
valid = DataLoader(TensorDataset(x[160:], y[160:]), batch_size=40)
sched = BatchSchedCB(lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, .01, total_steps=5 * 8))
metrics, recorder, cbs = MetricsCB(accuracy), RecorderCB(), [CheckpointCB(checkpoint)] if checkpoint != '-' else []
learn = Learner(model, DataLoaders(train, valid), F.cross_entropy, lr=.01, opt_func=partial(torch.optim.AdamW, amsgrad=True),
                cbs=[TrainCB(), MomentumCB(.5), metrics, recorder, sched, ProgressCB(), SlowCB(), *cbs])
learn.fit(5)
save_state(dict(model=dict(model.state_dict()), opt=learn.opt.state_dict(), rows=metrics.rows, records=recorder.records, rng=torch.get_rng_state()), result)
'''

@posix
def test_killed_twice(start, tmp_path):
    whole, pieces, checkpoint = tmp_path/'whole.safetensors', tmp_path/'pieces.safetensors', tmp_path/'run.safetensors'
    uninterrupted = start('-', whole, 1)   # runs beside the others
    kill_at(start(checkpoint, pieces, 1, pause=.02), 'batch 1 3')
    assert load_state(checkpoint)['done'] == 1
    kill_at(start(checkpoint, pieces, 2, pause=.02), 'batch 3 6')
    assert load_state(checkpoint)['done'] == 3 and not pieces.exists()
    last = start(checkpoint, pieces, 3)
    assert last.wait() == uninterrupted.wait() == 0
    said = last.stdout.read().splitlines()
    assert said[0] == 'batch 3 0' and any(line.startswith('epoch 5/5 valid: loss') for line in said)
    a, b = load_state(whole), load_state(pieces)
    assert equal(a, b)
    assert len(b['records']['loss']) == 5 * 8 and len(b['rows']) == 10

    saved = checkpoint.read_bytes()   # a finished run does nothing more
    again = start(checkpoint, pieces, 4)
    assert again.wait() == 0 and 'batch' not in again.stdout.read()
    assert checkpoint.read_bytes() == saved
    assert equal(load_state(pieces), a)

def shuffled(path, stop=None):
    "A learner whose loader shuffles with a generator of its own."
    class StopCB(Callback):
        def before_epoch(self, learn):
            if learn.epoch == stop: raise KeyboardInterrupt
    xb = torch.arange(40.)[:, None] / 40
    loader = DataLoader(TensorDataset(xb, 3 * xb), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    return Learner(nn.Linear(1, 1), DataLoaders(loader, None), cbs=[TrainCB(), CheckpointCB(path), StopCB()])

def test_a_loaders_own_generator(tmp_path):
    set_seed(0)
    whole = shuffled(tmp_path/'whole.safetensors')
    whole.fit(3)
    set_seed(0)
    with pytest.raises(KeyboardInterrupt): shuffled(tmp_path/'pieces.safetensors', stop=2).fit(3)
    set_seed(5)
    resumed = shuffled(tmp_path/'pieces.safetensors')
    resumed.fit(3)
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


LIMITED = '''
import resource, signal, sys, torch
from course_lib.callbacks import save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
save_state({'weight': torch.zeros(100_000)}, sys.argv[1])
'''

@posix
def test_full_disk_leaves_the_old_file(tmp_path):
    "A limit on the size of files stands in for a full disk: the system refuses to write in the middle of the file."
    path = tmp_path/'run.safetensors'
    save_state({'weight': torch.ones(10)}, path)
    done = subprocess.run([sys.executable, '-c', LIMITED, path], capture_output=True, text=True)
    assert done.returncode == 1 and 'OSError: run.safetensors could not be written, what was there before is kept' in done.stderr
    assert torch.equal(load_state(path)['weight'], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ['run.safetensors']


def learner(path, n=1): return Learner(nn.Linear(1, n), synth_dls(), cbs=[TrainCB(), CheckpointCB(path)])

@pytest.mark.parametrize('length', [0, 7, 8, 100, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, length):
    path = tmp_path/'run.safetensors'
    learner(path).fit()
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match='run.safetensors is not a whole safetensors file: .* bytes'): learner(path).fit(2)

def test_another_models_checkpoint(tmp_path):
    path = tmp_path/'run.safetensors'
    learner(path).fit()
    with pytest.raises(ValueError, match=r'run.safetensors is the checkpoint of another model \(weight: \(1, 1\) in the file, \(3, 1\) here'): learner(path, 3).fit(2)

def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match='is a folder'): learner(tmp_path).fit()

def test_loading_leaves_the_file_free(tmp_path):
    "It is overwritten after each epoch, by the process that has loaded it."
    path = tmp_path/'run.safetensors'
    save_state({'weight': torch.ones(1000)}, path)
    weight = load_state(path)['weight']
    save_state({'weight': torch.zeros(1000)}, path)
    path.write_bytes(b'')
    assert weight.sum() == 1000

def test_validating_does_not_touch_the_checkpoint(tmp_path):
    path = tmp_path/'run.safetensors'
    learn = learner(path)
    learn.fit(2)
    saved = path.read_bytes()
    learn.fit(1, train=False)
    assert path.read_bytes() == saved

def test_a_sampler_with_a_generator_of_its_own(tmp_path):
    def fit(n_epochs, *cbs):
        set_seed(1)
        sampler = torch.utils.data.RandomSampler(range(12), generator=torch.Generator().manual_seed(5))
        seen = SeenCB()
        x = torch.arange(12.)[:, None]
        Learner(nn.Linear(1, 1), DataLoaders(DataLoader(TensorDataset(x, x), 4, sampler=sampler), None), lr=1e-4, cbs=[TrainCB(), seen, *cbs]).fit(n_epochs)
        return seen.items
    path = tmp_path/'run.safetensors'
    whole, begun, rest = fit(3), fit(1, CheckpointCB(path)), fit(3, CheckpointCB(path))
    assert begun + rest == whole and whole[:12] != whole[12:24] != whole[24:]

def test_a_schedule_of_another_length_is_refused(tmp_path):
    def fit(n_epochs):
        sched = BatchSchedCB(lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, .01, total_steps=n_epochs * 10))
        Learner(nn.Linear(1, 1), synth_dls(), cbs=[TrainCB(), sched, CheckpointCB(tmp_path/'run.safetensors')]).fit(n_epochs)
    fit(1)
    with pytest.raises(ValueError, match='the schedule in the file has 10 steps, this one 20'): fit(2)

class SeenCB(Callback):
    def __init__(self): self.items = []
    def before_batch(self, learn): self.items += learn.batch[0].flatten().tolist()
