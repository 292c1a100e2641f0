"""Encoded bytes -> frames that a network takes, and back: decoding, framing, geometry of boxes.

decode: encoded bytes -> upright RGB, with limits on hostile files
jpeg: plain JPEGs by libjpeg-turbo
jpeg_markers: the markers of a JPEG file, and its EXIF orientation
gpu_decode: JPEGs decoded on a GPU, what it cannot do on the host
buffer_pool: memory for pixels that is used again
input_settings: size, fit and normalisation of a network's input
layout: where each image goes in the canvas
host_frames: images and masks put into their canvases on the CPU
gpu_frames: images that a GPU decoded put into one canvas there
frame_labels: masks, boxes and matrices in the canvases
unframe: from the network's frame back to an image's own pixels
batch: the batch that travels from collate to the model
affine: matrices that place an image in its frame, and boxes moved by them
boxes: overlap, suppression and clipping of boxes
"""
