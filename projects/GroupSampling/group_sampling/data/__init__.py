"""Data sets as typed records, their images, augmentation, and the loaders of both engines."""
