"Style losses and the buttons of the painter: two networks are never mixed, one job at a time."
import threading

import pytest
import torch
from ipywidgets import Output

from course_lib.features import forgotten, load_backbone
from course_lib.style import ContentLoss, LossSum, StyleLoss
from course_lib.style_transfer import RunStop


def test_a_forgotten_network_is_another_one():
    backbone, im = load_backbone('course_vgg'), torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match='one look needs one network'):
        LossSum(content=(1, ContentLoss(backbone, im)), style=(1, StyleLoss(forgotten(backbone), im)))

def test_one_job_at_a_time():
    begun, go_on = [], threading.Event()
    def job(stopped):
        begun.append(stopped())
        go_on.wait(10)
    buttons = RunStop(job, Output())
    for _ in range(2): buttons.go.click()
    go_on.set()
    buttons.thread.join()
    buttons.halt.click()   # too late
    buttons.go.click()
    buttons.thread.join()
    assert begun == [False, False]
