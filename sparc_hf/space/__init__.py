"""The Space: a web page to look at a model's concepts."""
