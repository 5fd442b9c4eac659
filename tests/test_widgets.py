"Controls begin where they are told to."
import pytest

from course_lib.widgets import make_control


def test_a_fraction_is_not_cut():
    assert make_control('x', (0, 2), .5).value == .5 and make_control('x', (0, 2), 1).value == 1

def test_a_menu_begins_with_one_of_its_own():
    with pytest.raises(ValueError, match="layer can't start at 'c'; there are"): make_control('layer', ['a', 'b'], 'c')
