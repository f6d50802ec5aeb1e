"""Prepared layers: what is trained, and how a model is prepared for it."""
