"""What doubt there is, and what it is worth.

measures: entropy, mutual information, agreement of members, per pixel and per image
box_fusion: boxes of any members -> one box an object: weighted boxes fusion, sequential clustering
box_clusters: the groups that fusion forms, and their statistics
tta: test-time augmentation and dropout passes as further members
calibration: calibrated probabilities, scores and spreads; the review threshold
"""
