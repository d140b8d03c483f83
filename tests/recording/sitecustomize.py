"""Python imports this first in the processes of a run whose rounds are written down: see `fault_table.watched`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import fault_table

fault_table.note_rounds_of_runs()
