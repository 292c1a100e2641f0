"""Dubito's library: what is possible. Importing it starts nothing.

storage -> datasets -> stream -> augment -> models, losses -> training -> scoring -> predictions (Parquet)
-> retraining, report. Imports point one way, from the right to the left of that line;
tests/test_architecture.py keeps it so.

schema: column names, Arrow schemas, axis letters, conventions of boxes and labels
environment: every environment variable that is read, named, documented and checked
errors: what a person meets: what was wanted, what was found, where, what to do
config: typed settings from YAML and ``--set a.b=c``
storage: files by URI: atomic commits, retries, checksums, leases
runtime: progress, logs, metrics, and resources of the cluster
images: encoded bytes to frames, and back
datasets: label formats to shards and dataset.json, and reading them
augment: image, mask and boxes augmented together on the device
losses: losses as functions that return a sum and a count
uncertainty: measures of uncertainty, box fusion, test-time augmentation, calibration
metrics: figures whose counts merge in any order
models: networks, pretrained weights, bundles
tasks: segmentation and detection behind one interface
stream: the order of a training run as one Ray Dataset
predictions: prediction rows to Parquet, and back
scoring: every image through every member: predict, evaluate, calibrate
verify: every committed file compared with its digest
training: settings, loop, Ray Train, checkpoints, ensembles
retraining: scheduled runs, drift, promotion, registry
report: plots and pictures
"""

__version__ = "0.1.0"
