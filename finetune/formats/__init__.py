"""Adapters and models as other programs read them, and adapters from elsewhere."""
