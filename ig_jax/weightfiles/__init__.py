"""Files of weights, read without PyTorch or TensorFlow and without executing anything in them."""
