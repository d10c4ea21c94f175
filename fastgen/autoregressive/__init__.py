"""Sampling of image-autoregressive models (PixelCNNs and their like) at the cost of one pass over the image."""
