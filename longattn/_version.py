"""The package's version: pyproject.toml and ``longattn.__version__`` both read it here."""

__version__ = "0.1.0"
