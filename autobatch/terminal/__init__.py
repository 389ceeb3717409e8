"""The terminal that training runs in: TensorFlow's lines of failures that were expected, and lines of our own."""
