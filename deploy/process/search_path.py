"""Imported first by the program: from then on nothing is imported from the user's folder.

`python -m` puts that folder first, and so does an empty entry in PYTHONPATH (`PYTHONPATH=$PYTHONPATH:/opt/site`).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where our packages lie


def is_current_folder(entry: str) -> bool:
    """An entry of a search path; an empty one means it."""
    try:
        return not entry or Path(entry).samefile(".")
    except OSError:  # one of them is not there: nothing is imported from it
        return False


sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() == ROOT or not is_current_folder(entry)]
