"""TensorFlow and Keras models as JAX functions, and JAX functions on TensorFlow tensors."""
