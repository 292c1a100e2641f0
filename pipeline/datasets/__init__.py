"""People's images and labels made into datasets, which are opened, read and compared.

dataset: a committed dataset opened: classes, counts, row groups
ingest: images and labels -> a committed dataset, as one Ray Data job
splits: which split an image belongs to
shard_writer: sources -> validated rows -> one Parquet shard
shard_reader: row groups of a shard, checked against what was written
metadata: dataset.json, digests and rejects
image_fetch: images that rows only refer to, fetched a bounded number at a time
diff: what is new, changed and gone between two datasets
formats: label formats, one file each
"""
