"""Analysis of a traced graph: what depends on the samples, what is written, what is held."""
