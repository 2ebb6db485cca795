"""Train a SparcModel: `accelerate launch train.py --features FOLDER --output_dir FOLDER` (see --help).

The same as `sparc train`, as a script that `accelerate launch` and `torchrun` can start.
"""

import sys

from sparc_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
