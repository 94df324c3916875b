"""Adapters of transformers models to packed rows."""
