"""Speed beside other tools, both sides in one call.

feed: encoded JPEGs to batches
feed_baselines: the other tools of ``feed``, as their documentation shows them
augment: image, mask and boxes through augmentation
train_step: training through the real stream, and on one resident batch
end_to_end: one training run of ``train_step``
predict: batch inference beside Ray's documented pattern
ensemble: one pass of M members, and M passes
evaluate: mAP and mean IoU beside other implementations
write_predictions: masks and maps in Parquet, and as PNG
"""
