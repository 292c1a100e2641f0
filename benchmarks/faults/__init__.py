"""Whole jobs killed, cut off and damaged; what is lost is counted: ``python -m benchmarks.faults``.

__main__: the table of disturbances, and what each one did
jobs: one job as a process, followed to its end or killed
testbed: the data, bundle and undisturbed results that a job is compared with
failing_storage: jobs on a store that fails, stalls or is cut off
broken_files: jobs on damaged inputs and outputs
hostile_files: images and labels broken in every way that a reader may meet
coverage_guided_fuzz: a fuzz of decoder and label readers, guided by the lines that inputs reach
"""
