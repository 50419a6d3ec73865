"""How to become it: the stages of safety alignment, from recipes to artifacts."""

import logging

# peft imports bitsandbytes in every process, which then warns of a kernel that only 4-bit models on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
