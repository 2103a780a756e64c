"""Where things are in a Qwen3: names, checkpoints on disk, loading."""
