"""Who speaks and what was said: certificates and identities, signatures, the audit log. Imports no TensorFlow."""

AUTHORITY_VARIABLE = "WARDROUND_AUTHORITY"
"""The environment variable that names the file with the authorities to trust, where no option does."""
