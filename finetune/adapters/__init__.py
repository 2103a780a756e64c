"""The trainable part: expert LoRA, attaching it, adapter files and their layouts."""
