"""Tests, by package; a package of their own, because some library installs another one of this name."""
