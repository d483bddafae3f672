"""Training and evaluation of the models; runs from a checkout."""
