"""The gradual way for modules that run as a whole: any task, any input, the same scores, plans and proof."""
