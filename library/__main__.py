"""python -m library VERB, or from any folder python PATH/TO/library VERB; see cli.py."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Called by its path, Python looks for modules inside this folder; prepare.py and model.py lie
# beside it.
sys.path[:] = [
    str(HERE.parent),
    *(place for place in sys.path if Path(place or ".").resolve() != HERE),
]

if __name__ == "__main__":
    # Before torch comes: threads that spin while they wait starve beside the decoding processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from library.cli import main

    sys.exit(main())
