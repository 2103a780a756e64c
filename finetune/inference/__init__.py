"""Using what was trained: chat and evaluation."""
