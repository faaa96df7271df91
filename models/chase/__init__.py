"""Chase: follow pointers to the root; how many hops that takes is nowhere in the input."""
