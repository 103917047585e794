"""The stages: one script each, one YAML file a run."""

import logging

# On a CPU, bitsandbytes warns at import about 4-bit kernels that are not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
