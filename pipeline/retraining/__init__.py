"""One scheduled run: is there new data, is it worth a challenger, is that one better, who is champion.

run: the whole of a run, from the reason to the registry's entry
settings: what a scheduled run is given
reason: new labelled data since the champion, or uncertainty that drifted
drift: the stability index of the uncertainty between two folders of predictions
challenger: a challenger is trained, and compared with the champions
stored_metrics: metrics of a bundle on a split, counted once and stored
promotion: whether the challenger becomes champion, with every number and reason
registry: the champions of each model, and the decisions
"""
