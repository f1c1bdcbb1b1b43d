"""Who speaks and what was said: certificates and identities, signatures, the audit log. Imports no TensorFlow."""
