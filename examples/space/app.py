"""The demo as a Hugging Face Space, or on any other machine: `python app.py --model MODEL --teacher TEACHER`.

The arguments are those of `rectified-diffusers demo`. A Space has no command line: there, its variables MODEL, TEACHER
and CONTROLNET replace the options of the same names. Without a model, the bundled one is served.
"""

import os
import sys

from rectified_diffusers.cli import main


def arguments(options: list[str], environment: dict[str, str]) -> list[str]:
    """Return the arguments of the command: served to the network under the Space's name, then the given options."""
    served = ["demo", "--host", "0.0.0.0", "--port", environment.get("PORT", "7860")]
    if "SPACE_HOST" in environment:
        served += ["--allow-host", environment["SPACE_HOST"]]
    for name in ("MODEL", "TEACHER", "CONTROLNET"):
        if environment.get(name):
            served += [f"--{name.lower()}", environment[name]]
    return [*served, *options]


if __name__ == "__main__":  # the process that generates images imports this file
    sys.exit(main(arguments(sys.argv[1:], dict(os.environ))))
