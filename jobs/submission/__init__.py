"""A command as a job of a Ray cluster: sent, followed, listed, stopped.

client: connects to the cluster, sends a request once, names its environment and versions
request: a command as the job will read it, and the files that go along
follow: shows what a job says until it ends; its exit code
jobs_command: ``dubito jobs``: list, follow, stop
working_tree: the files that git would track, in one zip
visible_paths: paths that the cluster cannot see are refused
pinned_versions: versions taken where a job is submitted, and checked where it runs
"""
