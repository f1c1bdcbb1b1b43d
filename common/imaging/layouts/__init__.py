"""How hospitals' systems lay out images: each module turns one kind of folder into cases, without opening pixels.

`manifest` reads a table, `named_files` goes by the names of files, `dicom_sessions` by the headers of DICOM. `options`
is what a user may say about a folder; `tree` lists it. `common.imaging.discovery` chooses between them.
"""
