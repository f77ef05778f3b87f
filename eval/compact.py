"""The command `python -m eval.compact model=DIR out=DIR2 [dtype=bfloat16] [expand=true]`."""

import sys

from eval.model.compact import main

if __name__ == "__main__":
    main(sys.argv[1:])
