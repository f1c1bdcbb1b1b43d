"""What crosses the wire: the tensor format (`tensors`), mutually authenticated channels (`channel`), the messages.

Imports no TensorFlow, so that commands that only ask for a status answer at once.
"""
