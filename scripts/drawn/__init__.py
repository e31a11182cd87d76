"""Pictures drawn by formulas, with a seed: images of no class of CIFAR-10, and classes that CIFAR-10 does not have."""
