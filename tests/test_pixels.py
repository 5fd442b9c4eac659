"A film of several fits."
import torch
from torch import nn

from course_lib.callbacks import lr_find
from course_lib.data import DataLoaders
from course_lib.learner import Learner, TrainCB
from course_lib.pixels import ImageLogCB


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.im = nn.Parameter(torch.rand(1, 3, 4, 4))
    def forward(self, *xb): return self.im

def test_a_second_fit_and_a_search_for_the_rate():
    log, batches = ImageLogCB(2), [(torch.zeros(1), torch.zeros(1, 3, 4, 4))] * 6
    learn = Learner(Pixels(), DataLoaders(batches, None), lr=.01, cbs=[TrainCB(), log])
    for _ in range(2):
        learn.fit()
        assert log.steps == [0, 2, 4, 6] and len(log.frames) == 4
    lr_find(learn, max_batches=10)
    assert log.steps == [0, 2, 4, 6]   # a side fit leaves no trace
