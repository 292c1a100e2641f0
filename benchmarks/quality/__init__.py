"""What models and their uncertainty are worth, on real images and in simulation.

overfitting: what regularisation does on a small training set
second_observer: models beside a second human observer
review_threshold: how often the guarantee of the review threshold holds, in simulation
out_of_fold: which measure of uncertainty ranks errors best, on images predicted out of fold
"""
