import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "A real JupyterLab with a browser (tests/lab.py), started when the first test asks for it."
    from lab import lab_server, why_not
    if why := why_not(): pytest.skip(why)
    with lab_server(tmp_path_factory.mktemp('lab'), PYTHONPATH=str(ROOT)) as server: yield server

@pytest.fixture(scope='module')
def warm():
    "What Accelerate imports when it is first used takes seconds; once here is better than in every fork."
    from course_lib.distributed import AccelerateCB
    from distributed_run import classifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('COURSE_DEVICE', 'cpu')
        classifier([AccelerateCB()]).fit(1)

@pytest.fixture
def start(request, tmp_path):
    "Starts the training that stands in the test's module as RUN, see tests/killed.py: start(checkpoint, result, seed, pause) -> Popen."
    from killed import runs
    script = tmp_path/'run.py'
    script.write_text(request.module.RUN)
    with runs(script) as start: yield start
