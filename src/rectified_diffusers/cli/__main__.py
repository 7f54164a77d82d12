"""Entry point of `python -m rectified_diffusers.cli`, which `accelerate launch -m` needs."""

import sys

from rectified_diffusers.cli import main

sys.exit(main())
