"""The stages: one script each, one YAML file a run."""

import logging
import warnings

# On a CPU, bitsandbytes warns at import about 4-bit kernels that are not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21 asks a model by a name that transformers 5.23 has deprecated
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
