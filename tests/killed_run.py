"What the trainings that are killed have in common (see tests/killed.py): arguments, small pictures of two classes, a slow callback that says where it is."
import sys, time

import torch

from course_lib.core import set_seed
from course_lib.learner import Callback

checkpoint, result, seed, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(1)
gen = torch.Generator().manual_seed(0)
x = torch.randn(200, 1, 8, 8, generator=gen)
y = (x.mean((1, 2, 3)) > 0).long()
set_seed(seed)   # each process begins with other random numbers: they must come from the checkpoint

class SlowCB(Callback):
    def after_batch(self, learn):
        if learn.training:
            time.sleep(pause)
            print(f'batch {learn.epoch} {learn.iter}', flush=True)
