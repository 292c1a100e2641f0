"""The command line: what happens. One module for each verb, each ``dubito VERB`` and ``python -m jobs.cli VERB``.

cli: the verbs and their options; each verb's module is imported when it is called
session: what every job needs around it: a Ray session, a log, exit codes
submission: a command as a job of a Ray cluster
ingest: labels and images -> a dataset
train: one model
ensemble: several models that differ by seed, in one bundle
join: one ensemble of the members of several bundles
calibrate: a bundle calibrated, with a review threshold
evaluate: metrics and plots of a labelled split
predict: predictions and uncertainty of a dataset or a folder of images
verify: committed files compared with their digests
retrain: a challenger on new labelled data, compared with the champion
schedule: a verb run again and again
registry: champions listed and changed by hand
mlflow_log: a retraining written to MLflow
demo: the whole path on generated images
"""
