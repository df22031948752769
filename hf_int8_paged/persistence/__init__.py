"""A cache that outlives the call: files, and a store of prompts made of them."""
