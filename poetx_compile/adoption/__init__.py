"""How a model that nobody prepared comes to train through rotations."""
