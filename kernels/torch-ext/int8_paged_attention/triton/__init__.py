"""The Triton backend (`backend`): a file for each launch, and the parts that they share. The library of this name is
imported absolutely."""
