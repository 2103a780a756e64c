"""Documents that people write: YAML with places, checked against a pydantic model, mistakes reported in plain words."""
