"""What grows with images, workers and ids, and what bounds it.

scaling: memory and cost of an image with 1, 4 and 16 times as many
workers: rate of images with 1, 2, 4 and 8 workers
driver_limits: what an image, a unit and a file cost the one driver, extrapolated
driver_cost: the driver's share of it, measured
store_cost: the share of the object store: requests and listings
ten_million_ids: a prediction job over ten million images in limited memory
cpu_time: CPU time of processes while a job runs
"""
