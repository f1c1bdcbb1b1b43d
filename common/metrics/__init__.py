"""How good a segmentation is: metrics as pure functions of predicted and true class indices.

`overlap` counts voxels and makes Dice and IoU of the counts; `losses`, beside them, is what training minimizes (it
loads TensorFlow).
"""
