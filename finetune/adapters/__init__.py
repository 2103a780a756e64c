"""The trainable part: expert LoRA, attaching it, adapter files and their layouts."""

import logging

# peft imports bitsandbytes, which warns on every machine without a GPU about a kernel that nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
