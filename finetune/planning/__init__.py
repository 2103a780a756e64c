"""What a run will take before it is paid for: memory, tokens, hours, disk, from config.json and the recipe alone."""
