"""Base and adapters as one checkpoint: the plan, the arithmetic, and what rounding leaves of the change."""
