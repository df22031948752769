"""Layers whose blocks leave their device between the steps that need them."""
