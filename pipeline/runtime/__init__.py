"""What a job asks of its cluster and shows while it runs: resources, progress, logs, metrics.

resources: CPUs, GPUs, object store and disk that a job needs; refused with numbers where they are missing
ray_tasks: a function mapped by Ray tasks; the tracebacks of a failed execution dropped
compiled: torch.compile with a way back where a function cannot be compiled
memory: the C library told to keep freed memory
progress: counts of a stage, and where they are shown: a terminal, or a board that Ray workers write on
json_log: messages and progress as JSON lines, and back onto a terminal
prometheus: the table of metrics, and the recorder that hands them to Ray
tensorboard: a run's curves as TensorBoard event files
"""
