"""Segmentations to files, each in the format of the image it was made of: TIFF, NIfTI, DICOM-SEG.

Every writer takes a path that does not exist yet; `whole_file.appearing_whole` makes files appear whole or not at all.
"""
