"""Lesson 04's widgets in a real JupyterLab: what a mouse and a keyboard do, and what is then seen."""
import base64

import nbformat
import pytest
from lab import notebook
from nbclient import NotebookClient

CELL = '''
import matplotlib.pyplot as plt
from course_lib.widgets import explore

def draw(n=1):
    if n == 4: raise ValueError('four is too many')
    plt.figure(figsize=(2, 1))
    plt.plot(range(n + 2))

explorer = explore(draw, n=(0, 5))
'''

WEIGHT = '''
from course_lib.widgets import explore, weight_slider
explore(lambda style: f'the weight is {style!r}', style=weight_slider('style', .3))
'''


@pytest.fixture(scope='module')
def cells(lab):
    "Both cells of one running notebook."
    with lab.notebook([CELL, WEIGHT]) as page:
        lab.run(page)
        cells = page.locator('.jp-CodeCell')
        cells.nth(1).get_by_text('the weight is').wait_for()
        yield cells.nth(0), cells.nth(1)

def picture(cell): return cell.locator('.jp-OutputArea img').get_attribute('src')

def changed(cell, old):
    "The picture, once it is another than `old`."
    cell.page.wait_for_function('([cell, old]) => (im => im && im.src != old)(cell.querySelector(".jp-OutputArea img"))', arg=[cell.element_handle(), old])
    return picture(cell)

def test_moving_the_slider_changes_the_picture(cells):
    cell, handle = cells[0], cells[0].locator('.noUi-handle')
    first = changed(cell, '')
    assert base64.b64decode(first.split(',')[1].strip()).startswith(b'\x89PNG')
    handle.press('ArrowRight')
    second = changed(cell, first)
    handle.press('ArrowLeft')
    assert changed(cell, second) == first   # the picture of the same value

def test_an_error_is_seen_and_goes_away(cells):
    cell, handle = cells[0], cells[0].locator('.noUi-handle')
    first = changed(cell, '')
    for _ in range(3): handle.press('ArrowRight')
    error = cell.get_by_text('ValueError: four is too many (in draw')
    error.wait_for()
    assert cell.locator('.jp-OutputArea img').count() == 0   # no picture of another value above it
    handle.press('ArrowLeft')
    error.wait_for(state='detached')
    assert changed(cell, '') != first

def test_a_typed_weight_is_exact(cells):
    cell = cells[1]
    cell.get_by_text("the weight is 0.3").wait_for()
    box = cell.locator('input[type=number]')
    box.fill('0.0700001')
    box.press('Enter')
    cell.get_by_text('the weight is 0.0700001').wait_for()
    cell.locator('.noUi-handle').press('Home')
    cell.get_by_text("the weight is 0.0'").wait_for()

def test_a_page_made_by_a_program_keeps_the_picture_alone(root, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(root))
    monkeypatch.delenv('MPLBACKEND', raising=False)   # the notebook chooses its own
    nb = NotebookClient(nbformat.reads(notebook([CELL]), 4), timeout=60).execute()
    outputs = nb.cells[0].outputs
    assert [o.output_type for o in outputs] == ['display_data']
    assert set(outputs[0].data) == {'image/png', 'text/plain'}
