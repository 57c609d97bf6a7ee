"""Which estimator of log p(x) is right, at which cost, and which says so when it is not?"""
