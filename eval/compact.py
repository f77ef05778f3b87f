"""The command that makes a model folder compact: `python -m eval.compact model=DIR out=DIR2 [expand=true]`."""

import sys

from eval.model.compact import main

if __name__ == "__main__":
    main(sys.argv[1:])
