"""Published models at work: run by LiteRT, on images of any size; nothing in here needs TensorFlow."""
