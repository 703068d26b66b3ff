"""Loraplex beside its peers: the same work, one run, engines in turn."""
