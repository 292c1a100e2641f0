"""One run's order of rows, as one Ray Dataset, and what of it was used.

epoch_order: the order of an epoch, a pure function of seed and epoch; what remains of a run
run_stream: the order expanded in tasks into one Ray Dataset for all the rest of a run
ledger: the positions that optimiser steps have used
frame_cache: frames made in Ray tasks and kept in the object store
validation: each rank's validation rows
batches: tables of rows -> augmented batches on the device, ahead of the model
"""
