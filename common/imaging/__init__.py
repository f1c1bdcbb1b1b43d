"""Images and labels, from files to training patches and back to whole predictions.

`volume` is the one in-memory form, `readers` fill it from TIFF and NIfTI files, `folder` pairs and checks a site's
cases, `preprocessing` makes network input of a volume, `patches` cuts it, `augmentation` varies it (the only module
here that loads TensorFlow), and `sliding_window` predicts images larger than the network's input.
"""
