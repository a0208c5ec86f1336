"""Vision-language models, built part by part. Each module is the home of one idea; import the one you need."""

__version__ = "0.1.0"
