"""A model as parts that can be run: blocks, layers, head, and the memory they take."""
