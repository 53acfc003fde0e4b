"""Training and evaluation with Detectron2 (``d2``) or with torchvision's models (``tv``), from the same configs."""
