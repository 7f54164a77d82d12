"""Print the lowest supported release of each Hugging Face package, as setup.cfg states it, for pip."""

import configparser
import re

HUGGING_FACE = {"accelerate", "diffusers", "huggingface_hub", "peft", "safetensors", "transformers"}

config = configparser.ConfigParser()
config.read("setup.cfg", encoding="utf-8")
bounds = dict(re.findall(r"^([\w-]+)>=([\w.]+)", config["options"]["install_requires"], flags=re.MULTILINE))
missing = HUGGING_FACE - bounds.keys()
if missing:
    raise SystemExit(f"setup.cfg states no lower bound (name>=version) for: {', '.join(sorted(missing))}")
print(*(f"{name}=={bounds[name]}" for name in sorted(HUGGING_FACE)))
