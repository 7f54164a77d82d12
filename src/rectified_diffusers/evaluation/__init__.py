"""Metrics: straightness of a flow, Frechet distance of images, alignment of images with their captions."""
