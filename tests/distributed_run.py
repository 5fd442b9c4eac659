"A training to be launched in several processes by tests/test_distributed.py: distributed_run.py CHECKPOINT RESULT PAUSE"
import os, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from course_lib.callbacks import CheckpointCB, MetricsCB, ProgressCB, RecorderCB, accuracy, save_state
from course_lib.core import set_seed
from course_lib.data import get_dls
from course_lib.learner import Callback, Learner

class PauseCB(Callback):
    "Be slow, so that there is time to be killed; leave the number of this process in a file beside the result."
    def __init__(self, result, pause): self.result, self.pause = Path(result), pause
    def before_fit(self, learn): self.result.with_suffix(f".{os.environ.get('RANK', 0)}.pid").write_text(str(os.getpid()))
    def after_batch(self, learn): time.sleep(self.pause)

def classifier(cbs, bs=8, make_dls=get_dls, n_items=37, drop=0., lr=.5, seed=3):
    "37 samples, two classes, float64: the last batch has five."
    set_seed(seed)
    x = torch.randn(n_items, 4).double()
    ds = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 2)).double()
    return Learner(model, make_dls(ds, ds, bs), F.cross_entropy, lr=lr, cbs=cbs)

def outcome(learn):
    "What should not depend on the number of processes."
    cbs = {type(cb): cb for cb in learn.cbs}
    return dict(weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist(),
                rows=cbs[MetricsCB].rows, losses=cbs[RecorderCB].records['loss'])

if __name__ == '__main__':
    from course_lib.distributed import AccelerateCB
    checkpoint, result, pause = sys.argv[1:]
    train = AccelerateCB(timeout=20)
    learn = classifier([train, MetricsCB(accuracy), RecorderCB(), ProgressCB(), PauseCB(result, float(pause)), CheckpointCB(checkpoint)])
    learn.fit(3)
    if train.acc.is_main_process: save_state(dict(outcome(learn), n_procs=train.n), result)
    train.acc.end_training()
