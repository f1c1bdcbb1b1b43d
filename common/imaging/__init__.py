"""Images and labels, from files to training patches and back to whole predictions.

`discovery` finds the cases (`case`) of a folder, `readers` fill a `volume` from TIFF, NIfTI and DICOM, `checks` say
whether a case is fit to be trained on, `splits` divides cases by patient; `loading` reads and prepares one:
`preprocessing` puts its images on one `grid` (`geometry`, `resampling`) and in one range (`intensity`). `patches` cuts
it, `augmentation` varies it (the only package here that loads TensorFlow), and `sliding_window` predicts images larger
than the network's input.
"""
