"""Plots and text made of a run's results.

drawing: labels for plots, and a figure as a PNG
curves: loss curves of a training run
diagrams: reliability, risk-coverage and confusion of any metric's figures
detection: precision-recall curves, and the diagrams of detection
gallery: images with true labels and predictions side by side
evaluation: the plots beside an evaluation's file, and its main figures as text
summary: what the demo shows
"""
