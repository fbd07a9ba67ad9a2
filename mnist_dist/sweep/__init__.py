"""`python -m mnist_dist.sweep`: trainings with many values of some keys, to find the best ones."""
