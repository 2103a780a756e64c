"""From an adapter to weights other programs load: merge, verify, and files of their formats."""
