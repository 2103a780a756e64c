"""TRL's trainers on accelerate: arguments from the recipe, callbacks, checkpoints, resume and metrics."""
