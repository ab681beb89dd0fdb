"""Frozen features of images: computed by windows, kept in memory or on disk, and their photometric views."""
