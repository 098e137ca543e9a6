"""Offline distillation of DeiT: a teacher's answers are computed once, students train from them."""

__version__ = "0.1.0"
