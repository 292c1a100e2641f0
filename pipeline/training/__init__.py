"""One member or many are trained: settings, the loop on tensors, Ray Train around it, ensembles.

train_config: the whole tree of settings of a training run, and what it resolves to
loop: the training loop on tensors: step, validate, checkpoint; what it leaves to its caller (``TrainHooks``)
worker: one data-parallel process: model, optimiser, task, augmentation, ledger
optimizer: optimiser, learning-rate schedule, penalties, clipping and averaged weights
loss_readback: losses on their way from the device to the host
step_timer: how long steps take, and how long they wait for data
run_state: where a run stands (saved in every checkpoint), and how long it is
checkpoint: the files of a checkpoint, written and read
member_run: one member's run, as it is sent to the processes that train it
ray_train: Ray Train around the loop: what a worker executes, and ``train_member``
ray_dataset: the rows that remain of a run, as one Ray Dataset, split over the workers
ray_checkpoint: checkpoints that go through Ray Train, and batches whose loss is not finite
member_scheduler: members trained side by side, and taken up again where they fail
ensemble: members trained and bound into one bundle
"""
