"""Rows for objectives that compare or judge answers: a prompt, and two completions, one with a label, or none."""
