"""How good a segmentation is: metrics as pure functions of prediction and truth, in values that add where they can.

`overlap` counts voxels: Dice, IoU, precision, recall. `surface` measures between borders: HD95 and surface Dice.
`instances` matches objects: average precision by IoU, F1 by size. `calibration` compares confidence with accuracy.
docs/metrics.md has the definitions, the units and what an empty mask means. `losses`, beside them, is what training
minimizes (it loads TensorFlow).
"""
