"""The command ``hf-int8-paged``: the demo on a real model, and what this machine offers."""
