"""Private parts of Keras and TensorFlow: the only place where they are imported or replaced."""
