"""The torchvision engine: the same detectors and YAML files with what PyPI offers."""
