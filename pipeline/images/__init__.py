"""Encoded bytes -> frames that a network takes, and back: decoding, framing, geometry of boxes.

input_settings: size, fit and normalisation of what a network is given
decode: bytes -> upright RGB pixels, with limits on hostile files
jpeg: plain JPEGs by libjpeg-turbo, at a reduced size where that is enough
jpeg_markers: the one parser of JPEG markers and of the EXIF orientation
gpu_decode: baseline JPEGs by a GPU, the rest by the host
buffer_pool: memory for pixels that is used again
layout: where each image goes in the canvas that the network sees
host_frames: images into their canvases, on the CPU
gpu_frames: images into their canvases, on the GPU
frame_labels: masks and boxes into the same canvases
batch: the batch that travels from collating through augmentation to the model
unframe: maps and boxes of the network's frame back in an image's own pixels
boxes: overlap, suppression and clipping of boxes
affine: matrices that place an image, and boxes with it
"""
