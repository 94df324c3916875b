"""copd-engine: Co-Evolving Policy Distillation (arXiv 2604.27083)."""

__version__ = "0.1.0"
