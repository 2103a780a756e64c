"""From an adapter to weights other programs load: merge and verify."""
