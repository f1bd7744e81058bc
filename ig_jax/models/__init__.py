"""Networks: the transformer with its two heads, autoencoders, InceptionV3."""
