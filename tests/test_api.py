"""The notebook API: every name is there, and stays what it is whichever rooms were imported."""

from pathlib import Path

import finetune


def test_every_name_is_there():
    assert all(getattr(finetune, name) is not None for name in finetune.__all__)


def test_no_room_takes_the_place_of_a_function():
    rooms = {path.stem for path in Path(finetune.__file__).parent.iterdir()}
    assert rooms & set(dir(finetune)) == set()
