"""What the user asked for: the recipe's schema, YAML and overrides, and messages about mistakes."""
