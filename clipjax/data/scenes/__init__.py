"""SCENES: an endless, embedded set of captioned pictures, small enough to train on while you watch.

A picture shows one or two coloured shapes on a quiet background; five captions of it say true things in different
words. Twelve of the eighty combinations of colour and shape never occur in training, so that `unseen` measures
whether a model composes what it has learned. Reading order: `world` (what there is), `drawing` (scene to pixels),
`language` (scene to captions), `builder` (the TFDS data set; the only module here that imports TFDS).
"""
