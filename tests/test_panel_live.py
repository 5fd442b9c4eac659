"""Lesson 33's panel in a real JupyterLab: Run, live progress, Stop, an error that is seen, and the line that repeats it."""
import pytest

CELL = '''
from course_lib.style_transfer import TransferPanel
panel = TransferPanel(size=64)
panel
'''
LINE = 'panel.line.value, panel.painting'


@pytest.fixture(scope='module')
def cells(lab):
    "The panel's cell, and one that asks it."
    with lab.notebook([CELL, LINE]) as page:
        lab.run(page)
        cells = page.locator('.jp-CodeCell')
        cells.nth(0).get_by_role('button', name='Run', exact=True).wait_for()
        yield cells.nth(0), cells.nth(1)

def button(cell, name): return cell.get_by_role('button', name=name, exact=True)
def picture(cell): return cell.locator('.jp-OutputArea img').get_attribute('src')
def enabled(cell, name): cell.page.wait_for_function('b => !b.disabled', arg=button(cell, name).element_handle())
def line(cell): return cell.locator('textarea').input_value()

def steps(cell, n):
    box = cell.locator('.widget-hslider').filter(has_text='steps').locator('.widget-readout')
    box.click()
    box.fill(str(n))
    box.press('Enter')

def test_run_paints_and_says_how(cells):
    cell = cells[0]
    steps(cell, 20)
    button(cell, 'Run').click()
    enabled(cell, 'Run')
    cell.page.wait_for_function('i => i.naturalWidth > 0', arg=cell.locator('.jp-OutputArea img').element_handle())
    assert line(cell).startswith("transfer(find_picture('chelsea', 64), find_picture('night', 64)")
    assert 'steps=20' in line(cell)

def test_stop_keeps_the_picture(cells):
    cell = cells[0]
    before = picture(cell)
    steps(cell, 1000)
    button(cell, 'Run').click()
    cell.page.wait_for_function('([i, old]) => i.src != old', arg=[cell.locator('.jp-OutputArea img').element_handle(), before])   # live
    button(cell, 'Stop').click()
    enabled(cell, 'Run')
    cells[1].locator('.cm-content').click()
    cell.page.keyboard.press('Shift+Enter')
    cells[1].get_by_text('stopped early').wait_for()

def test_an_error_is_seen(cells):
    cell = cells[0]
    for slider in cell.locator('input[type=number]').all()[2:]:   # every style layer's weight
        slider.fill('0')
        slider.press('Enter')
    button(cell, 'Run').click()
    cell.get_by_text('needs at least one layer').wait_for()
    enabled(cell, 'Run')
