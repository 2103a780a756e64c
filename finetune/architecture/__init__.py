"""What is known about the models: types, sizes and names. The only place that knows them; imports no torch."""
