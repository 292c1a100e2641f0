"""Images through every member of a bundle, each once: predict, evaluate, calibrate.

job: one scoring job, from the plan to the commit
plan: what is scored, cut into units
unit_reader: read the encoded images of a unit, in tasks, without torch
scorer: what runs in the actors, and its options
unit_result: the row that an actor sends to the driver
actor_pool: how many actors there are, and what each takes
crash_guard: what becomes of units whose process died
run_metrics: what finished units add to the metrics of a run
predictor: rows of encoded images in, prediction rows out
member_forward: the members' networks, and how they are run
batch_norm_folding: batch norms folded into the convolution before them
batch_size: how many images go through the members at once
cuda_streams: streams of one model that several threads use
sliding_window: large images through overlapping windows
prediction_rows: prediction rows while they are being filled
ensemble_metrics: what is counted of pool and members, as one thing that merges
evaluate: metrics of a bundle on a split, and of shifted data
calibrate: calibration and review threshold of a bundle
"""
